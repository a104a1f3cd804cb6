"""`--explore-exploit`: killed in either phase and resumed, a run ends bit for bit as if it had been left alone."""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from surefoot.train import TrainConfig, resume, train

# Dropout and batch norm: random state and buffers matter in the first phase, eval mode in the second.
MODEL = """
from torch import nn

def build(input_shape, outputs):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 60), nn.BatchNorm1d(60), nn.Tanh(), nn.Dropout(0.3), nn.Linear(60, outputs)
    )
"""


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of everything that must be the same."""
    last = max(folder.glob("checkpoints/step-*"))
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.safetensors")}
    for name in ("metrics", "evals", "last_layer"):
        found[name] = repr(pq.read_table(folder / f"{name}.parquet").to_pydict())
    return found | {"last": last.name, "explored": (folder / "explored.json").read_text()}


def steps_done(folder: Path) -> int:
    return max((int(p.name[5:]) for p in folder.glob("checkpoints/step-*")), default=-1)


def test_kills_in_either_phase_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    explores, steps = 100, 1000
    c = TrainConfig(
        model=f"{tmp_path / 'model.py'}:build", limit=50, batch_size=16, momentum=0.9, steps=steps, threads=1,
        explore_exploit=True, tau=explores / steps, noise=1e-3, solver="delta-gclip", loss="mse", eval_every=100,
        checkpoint_seconds=0.05,
    )  # fmt: skip
    train(c, tmp_path / "whole", quiet=True)
    folder, at = tmp_path / "killed", []
    command = [sys.executable, "-m", "surefoot.cli.main", "train"]
    for args, reached in ((["--config", tmp_path / "whole" / "config.json", "--out", folder], 20), (
        ["--resume", folder], explores)):  # fmt: skip
        with subprocess.Popen([*command, *map(str, args)], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and steps_done(folder) < reached:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        at.append(steps_done(folder))
    assert 0 < at[0] < explores <= at[1] < steps, at
    assert resume(folder, quiet=True)["status"] == "finished"
    assert contents(folder)["last"] == f"step-{steps:08d}"
    assert "extra.safetensors" in contents(folder)
    assert contents(folder) == contents(tmp_path / "whole")


def config(**changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "limit": 60, "width": (80,), "depth": 1, "activation": "tanh", "steps": 20, "explore_exploit": True,
        "noise": 1e-3, "threads": 1, "eval_every": 5, "checkpoint_seconds": 1e-9,
    }  # fmt: skip
    return TrainConfig(**(base | changes))


def explored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "explored.json").read_text())


@pytest.mark.parametrize(("solver", "tau"), [("gd", 0.6), ("sgd", 0.6), ("direct", 0.6), ("direct", 0.0)])
def test_a_resume_from_the_switch_is_bit_identical(tmp_path: Path, solver: str, tau: float) -> None:
    for name in ("whole", "broken"):
        train(config(solver=solver, tau=tau), tmp_path / name, quiet=True)
    broken = tmp_path / "broken"
    shutil.rmtree(max(broken.glob("checkpoints/step-*")))
    run = broken / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"status": "running"}))
    assert round(20 * tau) <= steps_done(broken) < 20
    assert resume(broken, quiet=True)["status"] == "finished"
    assert contents(broken) == contents(tmp_path / "whole")


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_the_history_goes_on_and_the_loss_stays_under_its_bound(tmp_path: Path, loss: Any) -> None:
    document = train(config(solver="gd", loss=loss, noise="auto", steps=40), tmp_path / "run", quiet=True)
    last = pq.read_table(tmp_path / "run" / "last_layer.parquet").to_pydict()
    metrics = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pydict()
    assert metrics["step"] == list(range(1, 25))
    assert last["step"] == list(range(24, 41))
    assert document["evals"]["step"] == [0, 5, 10, 15, 20, 24, 25, 30, 35, 40]
    assert document["summary"]["steps"] == 40
    assert last["loss"][-1] < last["loss"][0]
    assert all(math.isfinite(b) and v <= b * (1 + 1e-9) for v, b in zip(last["loss"], last["bound"]))
    found = explored(tmp_path / "run")
    assert found["verdict"]["outcome"] == "proved"
    assert found["verdict"]["numbers"]["loss"] == last["loss"][-1]
    assert found["verdict"]["numbers"]["loss_bound"] == last["bound"][-1]
    assert found["rank"]["s_min"]["kind"] == "lower bound"
    assert len(found["trade"]) == 6
    assert sum(row["chosen"] for row in found["trade"]) == 1
    assert set(found["held_out"]) == {"before", "after", "end"}
    assert found["held_out"]["before"] == document["evals"]["test_accuracy"][5]
    assert found["held_out"]["end"] == document["evals"]["test_accuracy"][-1]


def test_a_direct_solver_reaches_the_infimum(tmp_path: Path) -> None:
    document = train(config(loss="mse", solver="direct"), tmp_path / "run", quiet=True)
    numbers = explored(tmp_path / "run")["verdict"]["numbers"]
    assert numbers["infimum"] == 0.0
    assert numbers["loss"] < 1e-20
    assert "loss_bound" not in numbers
    assert document["summary"]["train_loss"] < 1e-20


def test_a_network_that_cannot_be_told_from_a_deficient_one_is_not_proved(tmp_path: Path) -> None:
    """Softplus deep in its tail: features that float64 cannot tell apart."""
    (tmp_path / "model.py").write_text(
        "from torch import nn\n"
        "def build(input_shape, outputs):\n"
        "    first = nn.Linear(64, 80)\n"
        "    nn.init.constant_(first.weight, 1e-9)\n"
        "    return nn.Sequential(nn.Flatten(), first, nn.Softplus(), nn.Linear(80, outputs))\n"
    )
    c = config(model=f"{tmp_path / 'model.py'}:build", width=None, depth=None, activation=None, noise=0.0, steps=4,
               optimizer="sgd", lr=1e-12)  # fmt: skip
    train(c, tmp_path / "run", quiet=True)
    found = explored(tmp_path / "run")
    assert found["untrained"]["status"] != "PROVED"
    assert found["verdict"]["outcome"] != "proved"
