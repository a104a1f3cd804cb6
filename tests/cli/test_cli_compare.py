"""`surefoot compare` and `surefoot report`."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from surefoot.cli.main import main
from surefoot.train.compare import Comparison, arm_config, mean_and_error
from surefoot.train.config import TrainConfig

FAST = ["--steps", "30", "--width", "16", "--threads", "1"]


def test_four_optimizers_with_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "compared"
    arms = ["delta-gclip", "gclip:gamma=0.1", "sgd:lr=0.5,momentum=0.9", "adamw:gamma=1"]
    assert main(["compare", "--optimizer", *arms, "--seeds", "3", "--out", str(folder), *FAST]) == 0
    printed = capsys.readouterr().out
    assert "±" in printed
    document = json.loads((folder / "comparison.json").read_text())
    assert [a["name"] for a in document["arms"]] == arms
    for arm in document["arms"]:
        values = []
        for seed in range(3):
            run = json.loads(
                (folder / arm["name"].replace(":", "_").replace(",", "_") / f"seed-{seed}" / "run.json").read_text()
            )
            values.append(run["summary"]["primary"]["value"])
            assert run["config"]["seed"] == seed
        assert arm["metric"]["mean"] == pytest.approx(np.mean(values))
        assert arm["metric"]["se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
        assert len(arm["curves"]["step"]) == 30
    assert document["arms"][1]["settings"]["gamma"] == 0.1
    assert (folder / "report.html").is_file()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()


def test_parallel_runs_are_the_same_bits(tmp_path: Path) -> None:
    options = ["--optimizer", "delta-gclip", "adam", "--seeds", "2", *FAST]
    assert main(["compare", *options, "--out", str(tmp_path / "one")]) == 0
    assert main(["compare", *options, "--out", str(tmp_path / "two"), "--jobs", "2"]) == 0
    for path in (tmp_path / "one").rglob("model.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "compared"
    command = [sys.executable, "-m", "surefoot.cli.main", "compare", "--out", str(folder), "--seeds", "2"]
    options = ["--steps", "1500", "--width", "16", "--threads", "1", "--checkpoint-seconds", "0.1"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, start_new_session=True)
    finished = folder / "delta-gclip" / "seed-0" / "run.json"
    while not (finished.is_file() and '"finished"' in finished.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stamp = finished.stat().st_mtime_ns
    assert not (folder / "comparison.json").exists()
    assert main(["report", str(folder)]) == 0  # what there is of it
    assert "of 4 runs have ended" in (folder / "report.html").read_text()
    assert main(["compare", "--resume", str(folder)]) == 0
    assert finished.stat().st_mtime_ns == stamp
    document = json.loads((folder / "comparison.json").read_text())
    assert [len(a["seeds"]) for a in document["arms"]] == [2, 2]


def test_ctrl_c_stops_the_comparison_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "compared"
    command = [sys.executable, "-m", "surefoot.cli.main", "compare", "--out", str(folder), "--seeds", "2"]
    options = ["--steps", "100000", "--width", "16", "--threads", "1", "--checkpoint-seconds", "0.1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        while len(list(folder.glob("delta-gclip/seed-0/checkpoints/step-*"))) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode == 130
    assert f"--resume {folder}" in output
    assert not (folder / "sgd").exists()


def test_a_diverging_arm_is_reported_not_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "sgd:lr=1e30", "delta-gclip", "--seeds", "2", *FAST]
    assert main(["compare", *options, "--out", str(tmp_path / "c")]) == 0
    document = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [f["seed"] for f in document["arms"][0]["failed"]] == [0, 1]
    assert document["arms"][0]["metric"] == {"mean": None, "se": None}
    assert "2 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--optimizer", "delta-gclip", "nadam"], "'nadam' is not known"),
        (["--optimizer", "sgd:gama=1"], "did you mean gamma"),
        (["--optimizer", "sgd:lr=fast"], "lr='fast'"),
        (["--optimizer", "sgd", "sgd"], "names an arm twice"),
        (["--optimizer", "sgd", "adam", "--beta", "1"], "--beta 1 has no effect"),
        (["--seeds", "0"], "--seeds 0"),
        (["--jobs", "0"], "--jobs 0"),
        (["--data", "nothing-here"], "nothing-here"),
    ],
)
def test_bad_input_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], part: str
) -> None:
    assert main(["compare", *args, "--out", str(tmp_path / "c")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_resume_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--resume", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_shared_letters_reach_the_arms_that_take_them() -> None:
    base = TrainConfig(lr=0.3, gamma=2.0, momentum=0.5)
    assert arm_config(base, "delta-gclip").gamma == 2.0
    assert arm_config(base, "adamw").gamma is None
    assert arm_config(base, "adamw:gamma=1").gamma == 1.0
    assert arm_config(base, "adamw").lr == 0.3
    assert arm_config(base, "sgd").momentum == 0.5
    assert Comparison(base, ("sgd", "gclip"), 1).configs()["gclip"].gamma == 2.0


def test_standard_error_of_one_value_is_unknown() -> None:
    assert mean_and_error([2.0]) == {"mean": 2.0, "se": None}
    assert mean_and_error([1.0, 3.0]) == {"mean": 2.0, "se": 1.0}
    assert mean_and_error([None]) == {"mean": None, "se": None}
