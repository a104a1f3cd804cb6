"""CSV tables."""

from pathlib import Path

import numpy as np
import pytest
import torch

from surefoot.data import Dataset, load
from surefoot.errors import InputError


def table(path: Path, lines: list[str], **arguments) -> Dataset:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load(str(path), **arguments)


def rows(count: int = 40) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{a:.6f},{b:.6f},{a - b:.6f}" for a, b in rng.normal(3, 2, (count, 2))]


@pytest.mark.parametrize(
    ("name", "count", "inputs"),
    [("concrete", 1030, 8), ("energy", 768, 8), ("yacht", 308, 6), ("power-plant", 9568, 4)],
)
def test_real_tables(shared_data: Path, name: str, count: int, inputs: int) -> None:
    path = shared_data / "uci" / f"{name}.csv"
    data = load(str(path), target="y", dtype=torch.float64)
    assert (data.name, data.task, data.kind, data.outputs) == (f"{name}.csv", "regression", "table", 1)
    assert data.input_shape == (inputs,)
    assert len(data.train_x) + len(data.test_x) == count
    assert len(data.test_x) == round(0.2 * count)
    assert data.train_x.mean(0).abs().max() < 1e-9
    assert (data.train_x.std(0, unbiased=False) - 1).abs().max() < 1e-9
    assert data.train_y.shape == (len(data.train_x), 1)
    # back in the user's units, every row of the file is there once
    statistics = data.statistics
    back = torch.cat([data.train_y, data.test_y])[:, 0] * statistics["target_std"][0] + statistics["target_mean"][0]
    column = np.genfromtxt(path, delimiter=",", skip_header=1)[:, -1]
    np.testing.assert_allclose(np.sort(back.numpy()), np.sort(column), rtol=1e-9)


def test_statistics_come_from_the_training_rows_alone(tmp_path: Path) -> None:
    lines = rows()
    first = table(tmp_path / "a.csv", ["a,b,y", *lines], target="y", dtype=torch.float64)
    mean, std = (np.array(first.statistics[key]) for key in ("input_mean", "input_std"))
    held_out = {tuple(np.round(row, 5)) for row in first.test_x.numpy() * std + mean}
    changed = [
        "1e6,-1e6,1e9" if tuple(np.round([float(v) for v in line.split(",")[:2]], 5)) in held_out else line
        for line in lines
    ]
    assert sum(a != b for a, b in zip(lines, changed)) == 8
    second = table(tmp_path / "b.csv", ["a,b,y", *changed], target="y", dtype=torch.float64)
    assert second.statistics == first.statistics
    assert torch.equal(second.train_x, first.train_x)
    assert second.test_x.abs().min() > 1e5


def test_several_targets_and_a_comma_in_a_name(tmp_path: Path) -> None:
    data = table(tmp_path / "a.csv", ["a,b,y", *rows()], target="b, y")
    assert (data.outputs, data.input_shape, data.statistics["targets"]) == (2, (1,), ["b", "y"])
    assert data.train_y.shape == (32, 2)
    data = table(tmp_path / "b.csv", ['a,b,"y,z"', *rows()], target="y,z")
    assert data.statistics["targets"] == ["y,z"]


def test_text_targets_are_classes(tmp_path: Path) -> None:
    lines = [f"{i},{'pear' if i % 3 else 'apple'}" for i in range(30)]
    data = table(tmp_path / "a.csv", ["size,fruit", *lines], target="fruit", dtype=torch.float64)
    assert (data.task, data.classes, data.outputs) == ("classification", ("apple", "pear"), 2)
    sizes = data.train_x[:, 0] * data.statistics["input_std"][0] + data.statistics["input_mean"][0]
    assert torch.equal(data.train_y, (sizes.round().long() % 3 != 0).long())
    assert torch.bincount(data.test_y).tolist() == [2, 4]  # a fifth of ten and of twenty


def test_whole_numbers_are_classes_if_few_and_task_overrides(tmp_path: Path) -> None:
    few = ["x,y", *(f"{i},{i % 2 * 2 - 1}" for i in range(40))]
    data = table(tmp_path / "a.csv", few, target="y")
    assert (data.task, data.classes) == ("classification", ("-1", "1"))
    assert any("read as 2 classes" in note for note in data.notes)
    assert table(tmp_path / "a.csv", few, target="y", task="regression").task == "regression"
    many = ["x,y", *(f"{i % 7},{i // 2}" for i in range(50))]
    assert table(tmp_path / "b.csv", many, target="y").task == "regression"
    assert table(tmp_path / "b.csv", many, target="y", task="classification").outputs == 25


def test_constant_columns_are_zero_and_noted(tmp_path: Path) -> None:
    data = table(tmp_path / "a.csv", ["a,c,y", *(f"{i},0.1,{i / 3}" for i in range(20))], target="y")
    assert (data.train_x[:, 1] == 0).all()
    assert "1 constant columns left at zero: c" in data.notes


def test_bom_crlf_blank_lines_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf"a","y"\r\n\r\n' + b"".join(b'"%d", %d.5\r\n' % (i, i) for i in range(20)))
    data = load(str(path), target="y")
    assert data.statistics["columns"] == ["a"]
    assert len(data.train_x) + len(data.test_x) == 20


@pytest.mark.parametrize(
    ("lines", "arguments", "said"),
    [
        (["a,y", "1,2"], {}, "needs target (--target COLUMN), the column to predict; its columns are a, y"),
        (["length,y", *rows()], {"target": "lenght"}, "did you mean 'length'? its columns are length, y"),
        (["a,b,y", *rows()], {"target": "y,y"}, "target='y,y' names a column twice"),
        (["a,b", "1,2"], {"target": "a,b"}, "target='a,b' names every column"),
        (["a,b,y", *rows(5), "1,red,2"], {"target": "y"}, "line 7, column 'b' holds 'red'"),
        (["a,b,y", *rows(5), "", "1,,2"], {"target": "y"}, "line 8, column 'b' is empty"),
        (["a,b,y", *rows(5), "1,nan,2"], {"target": "y"}, "line 7, column 'b' holds 'nan'"),
        (["a,b,y", *rows(5), "-inf,1,2"], {"target": "y"}, "line 7, column 'a' holds '-inf'"),
        (["a,b,y", *rows(5), "1_0,1,2"], {"target": "y"}, "line 7, column 'a' holds '1_0'"),
        (["a,b,y", *rows(5), "1,1,"], {"target": "y"}, "line 7, column 'y' is empty"),
        (["a,b,y", *rows(5), "1,1,NaN"], {"target": "y"}, "line 7, column 'y' holds 'NaN'"),
        (["a,b,y", *rows(5), "1,1,two"], {"target": "y"}, "line 7, column 'y' holds 'two', where other rows hold"),
        (['a,"b,c",y', '1,"2\n3",4'], {"target": "y"}, "line 3, column 'b,c' holds '2\\n3'"),
        (["a,b,y", *rows(5), "1,2"], {"target": "y"}, "line 7 has 2 cells, the header has 3"),
        (["a,b,y", *rows(5), '1,"2,3'], {"target": "y"}, "line 7 is not well-formed CSV"),
        (["a,a,y", *rows()], {"target": "y"}, "two columns are called 'a'"),
        ([",a,y", *rows()], {"target": "y"}, "column 1 has no name"),
        ([*rows()], {"target": "y"}, "the first line holds numbers"),
        (["a;b;y", "1;2;3"], {"target": "y"}, "has one column, 'a;b;y'"),
        ([""], {"target": "y"}, "is empty"),
        (["a,y"], {"target": "y"}, "no rows"),
        (["a,b,y", *rows(2)], {"target": "y"}, "2 training rows are too few"),
        (["a,b,y", *rows(10)], {"target": "y", "test_fraction": 0.95}, "test_fraction=0.95 of 10 rows leaves"),
        (["a,y", *(f"{i},red" for i in range(9))], {"target": "y"}, "one class only ('red')"),
        (["a,y", *(f"{i},0.5" for i in range(9))], {"target": "y"}, "the same in every training row"),
        (["a,y", *(f"{i},red" for i in range(9))], {"target": "y", "task": "regression"}, "line 2 holds 'red'"),
        (["a,b,y", *rows()], {"target": "y", "task": "classification"}, "which is not a whole number"),
        (["a,b,y", *rows()], {"target": "y,b", "task": "classification"}, "takes one target column"),
        (["a,b,y", *rows()], {"target": "y", "image_size": 8}, "image_size=8 has no effect"),
        (["a,y", *(f"{i}e200,{i}.5" for i in range(9))], {"target": "y"}, "column 'a' holds numbers whose squares"),
    ],
)
def test_bad_tables(tmp_path: Path, lines: list[str], arguments: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        table(tmp_path / "bad.csv", lines, **arguments)
    assert said in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("größe,y\n1,2\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load(str(tmp_path / "a.csv"), target="y")
