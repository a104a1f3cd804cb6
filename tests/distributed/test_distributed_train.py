"""`surefoot train` under torchrun follows one process, stops and goes on, and never leaves a rank waiting."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from distributed_launch import run_all

from surefoot.errors import InputError
from surefoot.train import TrainConfig, resume, train
from surefoot.train.checkpoint import checkpoints
from surefoot.train.config import read_config
from surefoot.train.distributed import Team, shares

MODELS = """
import os
import signal

import torch
from torch import nn


class Eventful(nn.Module):
    # Does something to one rank at one step, as EVENT=rank,step,what says.
    def __init__(self, outputs, *extra):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 20), *extra, nn.Tanh())])
        self.head = nn.Linear(20, outputs)
        self.idle = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, x):
        h = x.flatten(1)
        for block in self.blocks:
            h = block(h)
        out = self.head(h)
        self.calls += self.training
        rank, call, what = os.environ.get("EVENT", "-1,0,none").split(",")
        if self.training and os.environ.get("RANK", "0") == rank and self.calls == int(call):
            if what == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            elif what == "crash":
                raise RuntimeError("a fault of this rank alone")
            elif what == "nan":
                out = out * float("nan")
        return out


def plain(input_shape, outputs):
    return Eventful(outputs)


def noisy(input_shape, outputs):
    return Eventful(outputs, nn.BatchNorm1d(20), nn.Dropout(0.3))
"""
SECONDS = 300  # a case takes ten; beside other work ten times as long


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MODELS)
    return path


def torchrun(folder: Path, *args: str | Path, ranks: int = 2) -> tuple[int | None, str]:
    """Run `surefoot train` under torchrun; return its exit code (None: it hung) and all that was printed."""
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    [result] = run_all([[*module, "-m", "surefoot.cli.main", "train", *map(str, args)]], folder, SECONDS)
    return result


def options(config: TrainConfig) -> list[str]:
    """The command line of a configuration."""
    words = []
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def rows(folder: Path, name: str = "metrics") -> dict[str, list[Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pydict()


def exact(path: Path) -> TrainConfig:
    """Batches that two ranks share unequally, gone through in pieces, the last of an epoch smaller."""
    return TrainConfig(
        model=f"{path}:plain", dtype="float64", optimizer="delta-gclip", lr=0.5, gamma=1.2, delta=0.9, momentum=0.9,
        weight_decay=1e-3, batch_size=33, micro_batch=7, limit=170, steps=14, threads=1, eval_every=5,
    )  # fmt: skip


def assert_same_rows(ours: Path, expected: Path, rel: float) -> None:
    for table in ("metrics", "evals"):
        mine, wanted = rows(ours, table), rows(expected, table)
        assert mine.keys() == wanted.keys()
        for name, values in wanted.items():
            if name == "regime":
                assert mine[name] == values
            else:
                assert mine[name] == pytest.approx(values, rel=rel, nan_ok=True), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_stopped_and_finished_by_one_process_are_one_run(
    parallel: str, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = exact(model_file)
    train(config, tmp_path / "alone", quiet=True)
    # Ctrl-C reaches rank 1 alone, at its call 19: in the 7th step, of 3 pieces each.
    monkeypatch.setenv("EVENT", "1,19,interrupt")
    folder = tmp_path / "team"
    given = ["--parallel", parallel] if parallel == "fsdp" else []  # ddp is what several processes mean
    code, printed = torchrun(tmp_path, *options(config), *given, "--out", folder)
    assert code not in (0, None), printed
    assert printed.count("stopped after step 7 of 14") == 1, printed
    assert printed.count("report: ") == 1
    monkeypatch.delenv("EVENT")
    stored = dataclasses.replace(read_config(folder / "config.json"), parallel="none")
    assert resume(folder, stored, quiet=True)["status"] == "finished"
    assert_same_rows(folder, tmp_path / "alone", rel=1e-9)
    assert len(set(rows(folder)["regime"])) >= 2


def test_a_run_with_dropout_and_batch_norm_stopped_and_resumed_is_the_same_bit_for_bit(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(exact(model_file), model=f"{model_file}:noisy", dtype="float32", parallel="fsdp")
    code, printed = torchrun(tmp_path, *options(config), "--out", tmp_path / "whole")
    assert code == 0, printed
    assert "arning" not in printed, printed
    monkeypatch.setenv("EVENT", "0,25,interrupt")
    torchrun(tmp_path, *options(config), "--out", tmp_path / "stopped")
    assert len(rows(tmp_path / "stopped")["step"]) == 9
    monkeypatch.delenv("EVENT")
    code, printed = torchrun(tmp_path, "--resume", tmp_path / "stopped")
    assert code == 0, printed
    for table in ("metrics", "evals"):
        assert repr(rows(tmp_path / "stopped", table)) == repr(rows(tmp_path / "whole", table))
    last = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "stopped")]
    assert last[0].name == last[1].name == "step-00000014"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name


def test_a_gpt_cut_up_in_bfloat16_gives_the_curve_of_one_process(shared_data: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(shared_data / "text" / "tinyshakespeare.txt"), model="gpt", width=(64,), depth=2, context=32,
        test_fraction=0.001, limit=400, batch_size=8, steps=8, lr=1.0, gamma=0.25, autocast="bf16", threads=1,
    )  # fmt: skip
    train(config, tmp_path / "alone", quiet=True)
    code, printed = torchrun(tmp_path, *options(config), "--parallel", "fsdp", "--out", tmp_path / "team")
    assert code == 0, printed
    ours, alone = rows(tmp_path / "team"), rows(tmp_path / "alone")
    assert ours["loss"] == pytest.approx(alone["loss"], rel=0.01)
    assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.05)
    assert ours["loss"] != alone["loss"]  # or one of them was not in bfloat16
    assert alone["loss"][-1] < alone["loss"][0] - 0.4


def test_an_error_on_one_rank_ends_all(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENT", "1,4,crash")
    code, printed = torchrun(tmp_path, *options(exact(model_file)), "--out", tmp_path / "run")
    assert code not in (0, None), "it hung"
    assert "a fault of this rank alone" in printed


def test_a_loss_that_is_no_number_on_one_rank_ends_the_run_on_all(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVENT", "1,10,nan")
    code, printed = torchrun(tmp_path, *options(exact(model_file)), "--parallel", "fsdp", "--out", tmp_path / "run")
    assert code not in (0, None), "it hung"
    assert printed.count("loss became nan at step 4") == 1, printed
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_request_that_makes_no_sense_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    code, printed = torchrun(tmp_path, "--steps", "2", "--out", tmp_path / "run")
    assert code not in (0, None), "it hung"
    assert printed.count("is not empty") == 1, printed


def test_parallel_needs_torchrun(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--parallel fsdp needs torchrun: torchrun --nproc-per-node 2"):
        train(TrainConfig(parallel="fsdp"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_autocast_and_float64_contradict_each_other() -> None:
    with pytest.raises(InputError, match="--autocast bf16 and --dtype float64"):
        TrainConfig(autocast="bf16", dtype="float64").resolved()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [None, 1, 3, 100])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 33])
def test_shares_are_every_row_once_in_as_many_pieces(size: int, most: int | None, count: int) -> None:
    pieces = [shares(count, Team(rank, size), most) for rank in range(size)]
    assert len({len(p) for p in pieces}) == 1
    assert [i for p in pieces for start, end in p for i in range(start, end)] == list(range(count))
    assert all(end - start <= (most or count) for p in pieces for start, end in p)
    totals = [sum(end - start for start, end in p) for p in pieces]
    assert max(totals) - min(totals) <= 1


def test_each_rank_and_step_has_draws_of_its_own() -> None:
    def draw(rank: int, size: int, step: int) -> float:
        torch.manual_seed(0)
        Team(rank, size).seed(5, step)
        return torch.rand(1).item()

    assert len({draw(0, 2, 0), draw(1, 2, 0), draw(0, 2, 1), draw(1, 2, 1)}) == 4
    assert draw(1, 2, 1) == draw(1, 2, 1)
    alone = draw(0, 1, 7)
    torch.manual_seed(0)
    assert alone == torch.rand(1).item()  # a process alone draws as it always did
