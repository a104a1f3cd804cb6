"""Folders of parquet files, laid out as on the Hugging Face hub."""

import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from surefoot.data import load, words
from surefoot.errors import InputError


def write(folder: Path, **splits: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in splits.items():
        pq.write_table(pa.table(columns), folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def png(value: int, size: int = 4) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size), value, dtype=np.uint8) + np.arange(size, dtype=np.uint8)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def images(count: int, start: int = 0) -> dict[str, Any]:
    return {"img": [png(start + i) for i in range(count)], "label": [i % 2 for i in range(count)]}


def sentences(count: int = 10) -> dict[str, Any]:
    return {
        "sentence": [f"good {i}" if i % 2 else "bad , bad" for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }


def numbers(count: int = 30) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=count), "b": list(range(count)), "y": rng.normal(size=count)}


# -- real data -------------------------------------------------------------------------------------------------------


def test_fashion_mnist(shared_data: Path, network_calls: list[str]) -> None:
    folder = shared_data / "fashion_mnist"
    data = load(str(folder), limit=200)
    assert (data.name, data.task, data.kind, data.outputs) == ("fashion_mnist", "classification", "image", 10)
    assert data.train_x.shape == (200, 1, 28, 28)
    assert data.test_x.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.train_y).tolist() == [20] * 10
    assert data.classes is not None
    assert data.classes[9] == "Ankle boot"
    first = pq.read_table(folder / "test-00000-of-00001.parquet").slice(0, 1).to_pylist()[0]
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(first["image"]["bytes"])))) / 255
    shown = data.test_x[0, 0] * data.statistics["input_std"][0] + data.statistics["input_mean"][0]
    assert torch.allclose(shown, pixels, atol=1e-6)
    assert data.test_y[0] == first["label"]
    assert not network_calls


def test_cifar10_subset(shared_data: Path) -> None:
    data = load(str(shared_data / "cifar10_10k2k"))
    assert data.train_x.shape == (10_000, 3, 32, 32)
    assert len(data.test_x) == 2_000
    assert data.classes is not None
    assert data.classes[0] == "airplane"
    assert data.train_x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (data.train_x.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert len(set(data.statistics["input_mean"])) == 3


def test_sst2(shared_data: Path) -> None:
    folder = shared_data / "sst2"
    data = load(str(folder), context=20)
    assert (data.task, data.kind, data.outputs, data.classes) == ("classification", "text", 2, ("0", "1"))
    assert data.train_x.shape == (67_349, 20)
    assert data.test_x.shape == (872, 20)
    assert "tested on the validation split" in data.notes
    assert data.vocabulary is not None
    assert data.vocabulary[:2] == ("<pad>", "<unk>")
    rows = pq.read_table(folder / "train-00000-of-00001.parquet")
    counts = Counter(word for sentence in rows.column("sentence").to_pylist() for word in words.words(sentence))
    assert set(data.vocabulary[2:]) == {word for word, count in counts.items() if count >= 2}
    sentence = rows.column("sentence")[5].as_py()
    ids = [i for i in data.train_x[5].tolist() if i]
    assert [data.vocabulary[i] for i in ids] == words.words(sentence)[:20]
    assert data.train_y.tolist() == rows.column("label").to_pylist()
    assert not (data.train_x == 0).all(1).any()


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_data_and_configuration_subfolders_and_single_files(tmp_path: Path) -> None:
    flat = load(write(tmp_path / "set", train=images(10), test=images(4, 50)))
    write(tmp_path / "other" / "data", train=images(10), test=images(4, 50))
    inner = load(str(tmp_path / "other"))
    assert (flat.name, inner.name) == ("set", "other")
    assert torch.equal(flat.train_x, inner.train_x)
    write(tmp_path / "several" / "plain", train=images(10))
    assert torch.equal(
        load(str(tmp_path / "several"), limit=4).train_x, load(str(tmp_path / "several"), limit=4).train_x
    )
    write(tmp_path / "several" / "fancy", train=images(10))
    with pytest.raises(InputError, match=r"parquet files lie in fancy, plain: give one of them"):
        load(str(tmp_path / "several"))
    single = load(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    assert len(single.train_x) + len(single.test_x) == 10


def test_shards_and_strangers(tmp_path: Path) -> None:
    whole = load(write(tmp_path / "whole", train=images(12), test=images(4, 50)))
    write(tmp_path / "parts", test=images(4, 50))
    for part, rows in enumerate((slice(0, 5), slice(5, 12))):
        columns = {name: values[rows] for name, values in images(12).items()}
        pq.write_table(pa.table(columns), tmp_path / "parts" / f"train-0000{part}-of-00002.parquet")
    pq.write_table(pa.table(images(3)), tmp_path / "parts" / "latest.parquet")
    parts = load(str(tmp_path / "parts"))
    assert torch.equal(whole.train_x, parts.train_x)
    assert torch.equal(whole.train_y, parts.train_y)
    assert parts.notes == ("1 parquet files are named after no split: not used",)


def test_which_split_tests(tmp_path: Path) -> None:
    three = load(write(tmp_path / "three", train=images(10), validation=images(4, 50), test=images(6, 90)))
    assert len(three.test_x) == 6
    hidden = {**images(6, 90), "label": [-1] * 6}
    data = load(write(tmp_path / "hidden", train=images(10), validation=images(4, 50), test=hidden))
    assert len(data.test_x) == 4
    assert data.notes == ("the test split has no labels: not used", "tested on the validation split")
    data = load(write(tmp_path / "neither", train=images(10), test=hidden))
    assert (len(data.train_x), len(data.test_x)) == (8, 2)
    assert "no test split: 20% of the rows held out (seed 0)" in data.notes


def test_progress_bars_are_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not datasets.are_progress_bars_disabled()
    load(write(tmp_path / "a", train=images(10)))
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


# -- columns ---------------------------------------------------------------------------------------------------------


def test_target_names_the_label_where_two_could_be(tmp_path: Path) -> None:
    both = {"image": images(12)["img"], "coarse": [i % 2 for i in range(12)], "fine": [i % 3 for i in range(12)]}
    source = write(tmp_path / "a", train=both)
    with pytest.raises(InputError, match=r"coarse and fine could each be the label: name one with target"):
        load(source)
    data = load(source, target="fine")
    assert data.outputs == 3
    assert "columns not used: coarse" in data.notes


def test_text_labels_and_gaps(tmp_path: Path) -> None:
    text = {**images(12), "label": ["cow" if i % 2 else "bee" for i in range(12)]}
    assert load(write(tmp_path / "a", train=text), target="label").classes == ("bee", "cow")
    gaps = {**images(12), "label": [3 + 4 * (i % 2) for i in range(12)]}
    data = load(write(tmp_path / "b", train=gaps))
    assert data.classes == ("3", "7")
    assert set(data.train_y.tolist()) == {0, 1}


def test_sentences_have_a_vocabulary_of_the_training_rows(tmp_path: Path) -> None:
    test = {"sentence": ["new new words", ""], "label": [0, 1]}
    data = load(write(tmp_path / "a", train=sentences(), test=test))
    assert data.vocabulary == ("<pad>", "<unk>", "bad", ",", "good")
    assert data.input_shape == (3,)  # the longest of the training sentences, less than context
    assert data.test_x.tolist() == [[1, 1, 1], [1, 0, 0]]
    short = load(write(tmp_path / "a", train=sentences(), test=test), context=2)
    assert short.input_shape == (2,)
    assert "6 sentences cut to 2 words" in short.notes
    assert len(load(str(tmp_path / "a"), limit=4).train_x) == 4


def test_numbers_are_a_table(tmp_path: Path) -> None:
    source = write(tmp_path / "a", train=numbers(), test=numbers(5))
    data = load(source, target="y", dtype=torch.float64)
    assert (data.kind, data.task, data.input_shape, len(data.test_x)) == ("table", "regression", (2,), 5)
    assert data.statistics["columns"] == ["a", "b"]
    assert data.statistics["input_mean"][1] == pytest.approx(14.5)
    assert torch.equal(data.train_x[:5, 0], data.test_x[:, 0])
    named = {"a": numbers()["a"], "kind": ["u" if i % 2 else "v" for i in range(30)]}
    assert load(write(tmp_path / "b", train=named), target="kind").classes == ("u", "v")


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "arguments", "said"),
    [
        ({"train": {"img": images(6)["img"]}}, {}, "no label column of whole numbers among img"),
        (
            {"train": {**images(6), "label": [0, 1, 0, -1, 1, 0]}},
            {},
            "row 4 of the train split has the label -1 in 'label'",
        ),
        ({"train": {**images(6), "label": [0, 1, None, 1, 1, 0]}}, {}, "row 3 of the train split has no 'label'"),
        ({"train": {**images(6), "label": [1] * 6}}, {}, "every training row has the same 'label'"),
        ({"train": images(6), "test": {**images(2), "label": [0, 5]}}, {}, "the test split has the label '5'"),
        (
            {"train": {**images(6), "img": [png(i) for i in range(5)] + [None]}},
            {"test_fraction": 0.01},
            "no image in row 6",
        ),
        (
            {"train": {**images(6), "img": [png(i, 4 if i < 5 else 9) for i in range(6)]}},
            {},
            "is 9x9: give image_size",
        ),
        (
            {"train": {**images(6), "img": [{"bytes": b"x", "path": None}] * 6}},
            {},
            "the image in row 1 of the train split cannot be read",
        ),
        ({"train": images(6)}, {"target": "lable"}, "did you mean 'label'?"),
        ({"train": images(6)}, {"target": "img"}, "does not hold class labels"),
        ({"train": images(6)}, {"task": "regression"}, "task='regression' has no effect"),
        ({"train": {**images(6), "more": images(6)["img"]}}, {}, "has 2 image columns (img, more)"),
        ({"train": sentences()}, {"image_size": 8}, "image_size=8 has no effect"),
        (
            {"train": {"premise": ["a"] * 6, "hypothesis": ["b"] * 6, "label": [0, 1] * 3}},
            {},
            "has 2 text columns (premise, hypothesis)",
        ),
        (
            {"train": {"sentence": ["a", None] * 3, "label": [0, 1] * 3}},
            {},
            "row 2 of the train split has no 'sentence'",
        ),
        ({"train": numbers()}, {}, "needs target (--target COLUMN)"),
        (
            {"train": {**numbers(4), "b": [1.0, 2.0, float("nan"), 3.0]}},
            {"target": "y"},
            "row 3 of the train split holds nan",
        ),
        ({"train": {**numbers(4), "b": [1.0, None, 2.0, 3.0]}}, {"target": "y"}, "row 2 of the train split has no 'b'"),
        ({"train": {**numbers(4), "b": [[1.0]] * 4}}, {"target": "y"}, "column 'b' does not hold numbers"),
        ({"train": numbers(), "test": {"a": [1.0], "y": [1.0]}}, {"target": "y"}, "give every split the same columns"),
        ({"test": images(6), "validation": images(6)}, {}, "is called train"),
        ({"train": {"img": [], "label": []}}, {}, "has no rows"),
        ({"train": images(2)}, {}, "2 training rows are too few"),
    ],
)
def test_bad_folders(tmp_path: Path, splits: dict[str, Any], arguments: dict[str, Any], said: str) -> None:
    source = write(tmp_path / "bad", **splits)
    with pytest.raises(InputError) as caught:
        load(source, **arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 400])
def test_a_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    source = write(tmp_path / "a", train=images(10), test=images(4))
    file = tmp_path / "a" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet is cut short or damaged"):
        load(source)


def test_a_file_damaged_inside(tmp_path: Path) -> None:
    source = write(tmp_path / "a", train=numbers(3000))
    file = tmp_path / "a" / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:3000] = bytes(2996)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"train-00000-of-00001\.parquet"):
        load(source, target="y")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    first = load(write(tmp_path / "a", train=images(10)))
    shutil.rmtree(tmp_path / "a")
    second = load(write(tmp_path / "a", train=images(10, 100)))
    assert first.statistics != second.statistics
