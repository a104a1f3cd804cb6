"""The parts of the loop: schedules, data order, whole files, tables, losses."""

import json
import math
from pathlib import Path

import pytest
import torch

from surefoot.errors import InputError
from surefoot.train.batches import batch_rows, epoch_order, steps_per_epoch
from surefoot.train.files import write_bytes, write_folder, write_json
from surefoot.train.objective import Objective, choose_loss
from surefoot.train.record import STEP_COLUMNS, Table, thinned
from surefoot.train.schedule import lr_factor


def test_schedules() -> None:
    assert [lr_factor("constant", s, 4) for s in range(4)] == [1, 1, 1, 1]
    assert [lr_factor("linear", s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [lr_factor("step", s, 8) for s in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [lr_factor("constant", s, 9, warmup=3) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor("cosine", 2, 4) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="schedule='sine'"):
        lr_factor("sine", 0, 1)


@pytest.mark.parametrize(("rows", "size", "last"), [(103, 10, 3), (101, 10, 11), (100, 10, 10), (7, 1, 1), (5, 4, 5)])
def test_an_epoch_sees_every_row_once_and_no_batch_is_a_leftover_row(rows: int, size: int, last: int) -> None:
    batches = [batch_rows(s, rows, size, seed=3) for s in range(steps_per_epoch(rows, size))]
    assert sorted(i for b in batches for i in b.tolist()) == list(range(rows))  # type: ignore[union-attr]
    assert len(batches[-1]) == last  # type: ignore[arg-type]


def test_epochs_and_seeds_differ() -> None:
    rows = 103
    assert not torch.equal(epoch_order(rows, 3, 0), epoch_order(rows, 3, 1))
    assert not torch.equal(epoch_order(rows, 3, 0), epoch_order(rows, 4, 0))
    assert batch_rows(5, rows, rows, seed=3) is None


def test_the_order_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    epoch_order(50, 8, 9)
    assert torch.equal(torch.get_rng_state(), before)


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": math.nan})
    assert path.read_bytes() == b"old"
    write_folder(tmp_path / "folder", {"a": b"1", "b": b"2"})
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_table_survives_a_file_and_forgets_later_rows(tmp_path: Path) -> None:
    table = Table(("step", "epoch", "test_loss"))
    for step in range(1, 6):
        table.append({"step": step, "epoch": step / 2, "test_loss": math.nan if step == 2 else 0.1 * step})
    table.write(tmp_path / "t.parquet")
    again = Table(("step", "epoch", "test_loss"))
    again.load(tmp_path / "t.parquet", through=3)
    assert again.columns["step"] == [1, 2, 3]
    assert math.isnan(again.columns["test_loss"][1])
    other = Table(("step", "loss"))
    with pytest.raises(InputError, match="has the columns"):
        other.load(tmp_path / "t.parquet", through=3)
    (tmp_path / "t.parquet").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as a parquet file"):
        again.load(tmp_path / "t.parquet", through=3)


def test_thinning_keeps_the_spike() -> None:
    columns: dict[str, list[object]] = {name: [1.0] * 10_001 for name in STEP_COLUMNS}
    columns["step"] = list(range(1, 10_002))
    columns["grad_norm"] = [1.0] * 10_001
    columns["grad_norm"][7003] = 50.0
    columns["loss"][7003] = math.inf
    series = thinned(columns)
    assert len(series["step"]) <= 2000
    assert series["rows"] == 10_001
    assert series["stride"] == 6
    assert 7004 in series["step"]
    assert None in series["loss"]
    json.dumps(series, allow_nan=False)
    assert thinned({name: [] for name in STEP_COLUMNS})["rows"] == 0


def test_the_squared_loss_is_torchs_mean_over_one_hot_targets() -> None:
    out = torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1, 0])
    by_hand = sum((out[i, c] - (1.0 if y[i] == c else 0.0)) ** 2 for i in range(5) for c in range(3)) / 15
    loss = Objective("classification", "mse", 3).value(out, out, y)
    assert loss.item() == pytest.approx(float(by_hand), rel=1e-14)


def test_regression_errors_are_told_in_the_users_units() -> None:
    model = torch.nn.Linear(2, 2)
    x, y = torch.randn(7, 2), torch.randn(7, 2)
    objective = Objective("regression", "mse", 2, target_std=(10.0, 3.0))
    result = objective.evaluate(model, x, y, rows=3, device=torch.device("cpu"))
    error = (model(x) - y).detach().double() * torch.tensor([10.0, 3.0])
    assert result["test_rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)
    assert result["test_loss"] == pytest.approx((model(x) - y).square().mean().item(), rel=1e-5)


def test_evaluation_leaves_modes_and_random_numbers_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.BatchNorm1d(4))
    model[2].eval()
    x, y, stats = torch.randn(9, 4), torch.zeros(9, dtype=torch.long), model[2].running_mean.clone()
    model.register_forward_hook(lambda *_: print(torch.rand(1)))  # a model that draws even in eval mode
    before = torch.get_rng_state()
    Objective("classification", "cross-entropy", 4).evaluate(model, x, y, rows=4, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert model[0].training
    assert model[1].training
    assert not model[2].training
    assert torch.equal(model[2].running_mean, stats)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "task", "model", "part"),
    [
        ("cross-entropy", "regression", "mlp", "needs classes"),
        ("mse", "language", "lstm", "next-character"),
        ("mse", "autoencoding", "vae", "has its own"),
    ],
)
def test_a_loss_that_does_not_fit(loss: str, task: str, model: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        choose_loss(loss, task, model)
