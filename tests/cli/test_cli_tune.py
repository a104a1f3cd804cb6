"""`surefoot tune` as a user types it."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from surefoot.cli.main import main
from surefoot.cli.tune import TuneArgs, parse_part
from surefoot.train.config import flag
from surefoot.tune.probing_run import LEAST
from surefoot.tune.rules import EDGE

SMALL = ["--limit", "200", "--width", "16", "--threads", "1"]
MODEL = """
from torch import nn

def net(input_shape, outputs):
    hidden = (nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(12, outputs))
"""


def suggestion(folder: Path) -> dict:
    return json.loads((folder / "suggestion.json").read_text(encoding="utf-8"))


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_it_is_told_written_and_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tmp_path / "tuned"
    code = main(["tune", *SMALL, "--steps", "400", "--lr", "300", "--lr-schedule", "cosine", "--out", str(tuned)])
    printed = capsys.readouterr().out
    document = suggestion(tuned)
    assert code == (0 if document["sure"] else 1)
    assert ("not sure: " in printed) == (code == 1)
    assert {p.name for p in tuned.iterdir()} == {"config.json", "suggestion.json", "report.html"}
    for text in ("edge of stability", "Prop. 8", "J. Zhang 2020", "times as large as the one suggested", "cost: "):
        assert text in printed, text
    assert f"lr (cosine) = {EDGE:g} / L" in printed.replace("\n", " ")
    assert document["cost"] <= 0.1 * document["steps"]
    options = config(tuned)
    assert options == document["config"]
    assert options["lr"] == document["suggested"]["lr"] < 30
    assert (options["optimizer"], options["lr_schedule"], options["steps"]) == ("delta-gclip", "cosine", 400)
    page = (tuned / "report.html").read_text(encoding="utf-8")
    for part in ('id="suggestion"', "fig-smoothness", "fig-probing-smoothness", "fig-probing-h", 'id="others"'):
        assert part in page, part
    assert ("<h3>Not sure</h3>" in page) == (code == 1)

    [command] = re.findall(r"^next: surefoot (.*)$", printed, re.MULTILINE)
    assert main([*shlex.split(command), "--steps", "40", "--out", str(tmp_path / "run")]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert run["config"]["lr"] == options["lr"]
    assert run["telemetry"]["steps"] == 40
    assert run["regimes"]["unclipped"] + run["regimes"]["clipped"] == 40
    assert run["summary"]["train_loss"] < 2


def test_the_same_again_gives_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        main(["tune", *SMALL, "--steps", "300", "--out", str(tmp_path / name)])
    first, second = (suggestion(tmp_path / name) for name in ("a", "b"))
    for document in (first, second):
        del document["environment"], document["seconds"]
    assert first == second


def test_a_run_is_tuned_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *SMALL, "--steps", "5", "--warmup", "3", "--lr", "500", "--out", str(run)]) == 0
    file = tmp_path / "tuned.json"
    main(["tune", "--config", str(run / "config.json"), "--steps", "250", "--momentum", "0.9", "--out", str(file)])
    assert "your lr of 500 is " in capsys.readouterr().out
    options = json.loads(file.read_text(encoding="utf-8"))
    assert (options["steps"], options["momentum"], options["width"], options["limit"]) == (250, 0.9, [16], 200)
    assert options["lr"] < 5
    assert options["warmup"] >= 3
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("more", [["--batch-size", "full"], ["--micro-batch", "20"], ["--autocast", "bf16"]])
def test_kinds_of_training(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(MODEL, encoding="utf-8")
    options = ["--model", f"{tmp_path / 'mine.py'}:net", "--limit", "200", "--threads", "1", "--optimizer", "gclip"]
    assert main(["tune", *options, "--steps", "400", *more, "--out", str(tmp_path / "tuned")]) in (0, 1)
    assert config(tmp_path / "tuned")["delta"] is None
    assert ("the loader gives one batch" in capsys.readouterr().out) == ("full" in more)


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    found = []
    for name, more in (("whole", []), ("pieces", ["--micro-batch", "23"])):
        main(["tune", *SMALL, "--dtype", "float64", "--steps", "250", *more, "--out", str(tmp_path / name)])
        found.append(suggestion(tmp_path / name))
    assert found[0]["L"] == pytest.approx(found[1]["L"], rel=1e-6)
    assert found[0]["cost"] == found[1]["cost"]


def test_options_are_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tune.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([^`\n]+)`", page))
    options = {flag(f.name) for f in dataclasses.fields(TuneArgs)}
    assert options == {word for word in words if word.startswith("--")}


def test_budget() -> None:
    assert (parse_part("10%"), parse_part("0.5"), parse_part(" 2.5% ")) == (0.1, 0.5, 0.025)


BAD = {
    "budget": (["--budget", "fast"], "--budget fast is no part of a run; write it as 10% or 0.1"),
    "all": (["--budget", "200%"], "--budget 200% is no part of a run"),
    "small": (
        ["--budget", "5%", "--steps", "100"],
        f"--budget 0.05 of the run's 100 steps is 5 gradients; measuring anything takes {LEAST}: give --budget 0.25",
    ),
    "lr": (["--lr", "-1"], "--lr -1 is outside (0, infinity)"),
    "momentum": (["--momentum", "1"], "momentum=1.0 is outside [0, 1)"),
    "data": (["--data", "nowhere.csv"], "nowhere.csv"),
    "config": (["--config", "nowhere.json"], "--config nowhere.json: no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = BAD[name]
    assert main(["tune", *SMALL, *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "mine.json").write_text("x")
    for out, message in (("full", "is not empty"), ("mine.json", "exists"), ("no/such.json", "does not exist")):
        assert main(["tune", *SMALL, "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == "x"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"optimizer": "adamw"}, "--optimizer adamw is none that the rules are about; choose delta-gclip, gclip, sgd"),
        ({"optimizer": "sgd", "gamma": 1.0}, "say --optimizer gclip, which takes the same steps"),
        ({"lr_schedule": "step"}, "--lr-schedule step is none that the rules are about"),
        ({"from_certificate": "there"}, "there is nothing to tune"),
    ],
)
def test_runs_that_no_rule_is_about(
    stored: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    assert main(["tune", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "tuned")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()
