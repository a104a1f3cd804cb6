"""Killed at any moment and resumed, a run ends bit for bit as if it had never been stopped."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

KILLS = 20
STEPS = 6000

# Momentum, dropout (the random state matters), batch norm (buffers matter), a schedule, clipping in all regimes.
MODEL = """
from torch import nn

def build(input_shape, outputs):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, outputs)
    )
"""
OPTIONS = (
    "--optimizer delta-gclip --lr 0.5 --gamma 0.3 --delta 0.4 --momentum 0.9 --lr-schedule cosine --batch-size 32 "
    f"--steps {STEPS} --checkpoint-seconds 0.05 --threads 1 --eval-every 450"
)


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "surefoot.cli.main", "train", *map(str, args)]


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of everything that must be the same: weights, optimizer and telemetry, rows."""
    last = max(folder.glob("checkpoints/step-*"))
    found = {
        name: hashlib.sha256((last / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    }
    for name in ("metrics", "evals"):
        found[name] = repr(pq.read_table(folder / f"{name}.parquet").to_pydict())
    return found | {"last": last.name}


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(MODEL)
    options = ["--model", f"{model}:build", *OPTIONS.split()]
    # One run that is left alone, two that are killed again and again, side by side on two cores.
    with ThreadPoolExecutor() as pool:
        killed = [pool.submit(kill_and_resume, options, tmp_path / f"killed-{i}", KILLS // 2, i) for i in range(2)]
        whole = tmp_path / "whole"
        subprocess.run(command(*options, "--out", whole), check=True, stdout=subprocess.DEVNULL)
        at = [step for future in killed for step in future.result()]
    assert len(at) == KILLS
    assert len(set(at)) > KILLS / 2, "the kills did not fall at different steps"
    assert contents(whole)["last"] == f"step-{STEPS:08d}"
    for i in range(2):
        assert contents(tmp_path / f"killed-{i}") == contents(whole)


def kill_and_resume(options: list[str], folder: Path, kills: int, seed: int) -> list[int]:
    """Kill -9 a run `kills` times at random moments, each time resuming, and let it finish; return where it was."""
    draw = random.Random(seed)
    at = []
    args = [*options, "--out", folder]
    for kill in range(kills):
        with subprocess.Popen(command(*args), stdout=subprocess.DEVNULL) as process:
            before = steps_done(folder)
            while process.poll() is None and steps_done(folder) <= before:
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.3))
            assert process.poll() is None, f"the run ended before kill {kill + 1}: make it longer"
            process.send_signal(signal.SIGKILL)
        at.append(steps_done(folder))
        args = ["--resume", folder]
    subprocess.run(command("--resume", folder), check=True, stdout=subprocess.DEVNULL)
    return at


def steps_done(folder: Path) -> int:
    return max((int(p.name[5:]) for p in folder.glob("checkpoints/step-*")), default=-1)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    args = ["--out", folder, "--steps", "100000", "--checkpoint-seconds", "0.2", "--threads", "1"]
    with subprocess.Popen(command(*args), stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while steps_done(folder) <= 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        output = process.stdout.read()
        assert process.wait() == 130
    assert f"--resume {folder}" in output
    assert (folder / "report.html").is_file()
    rows = pq.read_table(folder / "metrics.parquet").num_rows
    assert rows == steps_done(folder) > 0


@pytest.mark.parametrize("optimizer", ["adamw", "smooth-clip"])
def test_other_optimizers_resume_too(tmp_path: Path, optimizer: str) -> None:
    from surefoot.train import TrainConfig, resume, train

    config = TrainConfig(optimizer=optimizer, steps=40, eval_every=10, threads=1, checkpoint_seconds=1e-9)
    train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "broken", quiet=True)
    # Take the last checkpoint away, so that there is something left to do.
    import json
    import shutil

    shutil.rmtree(max((tmp_path / "broken").glob("checkpoints/step-*")))
    run = tmp_path / "broken" / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"status": "running"}))
    assert steps_done(tmp_path / "broken") == 39
    assert resume(tmp_path / "broken", quiet=True)["status"] == "finished"
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
