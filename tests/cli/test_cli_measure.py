"""`surefoot measure` as a user types it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from surefoot.cli.main import main
from surefoot.cli.measure import MeasureArgs
from surefoot.train import probes
from surefoot.train.config import flag
from surefoot.train.measuring import NAMES

MODEL = """
from torch import nn

def net(input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, outputs))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--limit", "60", "--width", "16", "--steps", "15", "--threads", "1"]
    assert main(["train", *options, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def measured(folder: Path) -> dict:
    return json.loads((folder / "measurements.json").read_text(encoding="utf-8"))


def test_a_run_is_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.relative_to(run) for p in run.rglob("*")}
    assert main(["measure", str(run)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "the weights after step 15",
        "Verified bounds",
        "Exact up to rounding",
        "Estimates",
        "lambda_min(K)",
        "‖grad f‖",
        "rank(Phi)",
        "tangent Gram",
        "note: ",
    ):
        assert text in printed, text
    assert printed.strip().endswith(f"report: {run / 'report.html'}")
    assert {p.relative_to(run) for p in run.rglob("*")} - before <= {Path("measurements.json"), Path("report.html")}
    document = measured(run)
    assert (document["format"], document["version"]) == ("surefoot.measurements", 1)
    assert document["subject"]["step"] == 15
    assert document["seconds"] > 0
    assert document["budget"] == 60
    names = {m["name"] for m in document["measurements"]}
    assert names >= {
        "equal training rows",
        "f, the loss",
        "‖grad f‖",
        "‖grad f‖^2 / (2 (f - f*))",
        "sigma²",
        "rank(Phi)",
        "lambda_max(Hessian)",
        "lambda_max(Gauss-Newton matrix)",
        "L0",
        "L1",
        "lambda_min(K)",
        "lambda_max(K)",
        "sqrt(lambda_max(K) / lambda_min(K))",
        "r^T K r / ‖r‖^2",
    }
    page = (run / "report.html").read_text(encoding="utf-8")
    for part in ("fig-spectrum", "fig-sharpness", 'id="measurements"', "fig-regimes"):
        assert part in page


def test_the_report_keeps_the_panels(run: Path) -> None:
    assert main(["measure", str(run), "--only", "gram", "--samples", "5"]) == 0
    page = (run / "report.html").read_bytes()
    assert b"fig-spectrum" in page
    for command in (["report", str(run)], ["train", "--resume", str(run)]):
        (run / "report.html").unlink()
        assert main(command) == 0
        assert (run / "report.html").read_bytes() == page


def test_some_of_the_measurements(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", str(run), "--only", "gradient, gram", "--samples", "7"]) == 0
    document = measured(run)
    assert not {m["name"] for m in document["measurements"]} & {"sigma²", "L0", "rank(Phi)", "lambda_max(Hessian)"}
    [smallest] = [m for m in document["measurements"] if m["name"] == "lambda_min(K)"]
    assert smallest["samples"] == 7
    assert document["series"]["spectrum"]["total"] == 70
    assert "7 of 60 training rows" in capsys.readouterr().out


def test_measuring_again_replaces_and_elsewhere_leaves_alone(run: Path, tmp_path: Path) -> None:
    assert main(["measure", str(run), "--only", "gradient"]) == 0
    first = (run / "measurements.json").read_bytes()
    assert main(["measure", str(run), "--only", "noise", "--out", str(tmp_path / "other")]) == 0
    assert (run / "measurements.json").read_bytes() == first
    assert {p.name for p in (tmp_path / "other").iterdir()} == {"measurements.json", "report.html"}
    assert "Which regime" in (tmp_path / "other" / "report.html").read_text(encoding="utf-8")
    assert main(["measure", str(run), "--only", "noise"]) == 0
    assert (run / "measurements.json").read_bytes() != first


def test_a_model_and_data_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    options = ["--model", f"{tmp_path / 'mine.py'}:net", "--data", "digits", "--limit", "50", "--threads", "1"]
    assert main(["measure", *options, "--loss", "mse"]) == 0
    printed = capsys.readouterr().out
    assert "the initial weights" in printed
    assert "dropout is off" in printed
    assert "report:" not in printed
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]
    assert main(["measure", *options, "--expressivity", "--out", str(tmp_path / "out")]) == 1  # 12 units for 50 rows
    document = measured(tmp_path / "out")
    assert {m["name"] for m in document["measurements"]} <= {
        "rank(Phi)",
        "s_N(Phi)",
        "s_1(Phi)",
        "steps of gradient descent on the last layer",
    }
    assert "What was measured" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_the_budget_does_not_allow_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # finding out what things cost takes longer than this on any machine, so nothing is left for what takes time
    assert main(["measure", str(run), "--budget", "0.001s"]) == 0
    printed = capsys.readouterr().out
    assert "left out: tangent Gram: more than the budget allows (needs about --budget " in printed


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["{tmp}/nothing"], ["nothing: no such folder"]),
        (["{tmp}"], ["holds no run.json"]),
        (["{run}", "--budget", "soon"], ["--budget soon", "60s, 2m or 1h"]),
        (["{run}", "--budget", "60"], ["--budget 60"]),
        (["{run}", "--only", "grams"], ["'grams'", "did you mean gram"]),
        (["{run}", "--only", "gram", "--expressivity"], ["contradict"]),
        (["{run}", "--model", "mlp", "--batch-size", "7"], ["leave out --model, --batch-size"]),
        (["{run}", "--samples", "0"], ["--samples 0"]),
        (["{run}", "--samples", "61"], ["--samples 61", "60 training rows"]),
        (["{run}", "--out", "{run}"], ["is not empty"]),
        ([], ["nothing to measure", "--model and --data"]),
        (["--model", "mlpp", "--data", "digits"], ["'mlpp'"]),
        (["--data", "nothing-here"], ["nothing-here"]),
        (["--model", "vae", "--data", "digits", "--only", "gram"], ["variational autoencoder"]),
    ],
)
def test_bad_input_is_named_and_writes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], parts: list[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert main(["measure", *(a.replace("{tmp}", str(tmp_path)).replace("{run}", str(run)) for a in args)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("surefoot measure: ")
    for part in parts:
        assert part in error
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_run_without_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    assert main(["measure", str(run)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-00000015" / "model.safetensors").write_bytes(b"no weights")
    assert main(["measure", str(run)]) == 2
    assert "step-00000015" in capsys.readouterr().err


def test_a_comparison_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "sgd", "--seeds", "1", "--steps", "2", "--limit", "20", "--width", "4", "--threads", "1"]
    assert main(["compare", *options, "--out", str(tmp_path / "c")]) == 0
    assert main(["measure", str(tmp_path / "c")]) == 2
    assert f"give one of its runs, such as {tmp_path / 'c' / 'sgd' / 'seed-0'}" in capsys.readouterr().err


def test_changed_data_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,b,y\n" + "".join(f"{i}.5,{i * i},{i / 7}\n" for i in range(30)))
    options = ["--data", str(table), "--target", "y", "--width", "4", "--steps", "3", "--threads", "1"]
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 0
    table.write_text(table.read_text().replace("0.5,0,", "0.7,0,"))
    assert main(["measure", str(tmp_path / "run")]) == 2
    assert "not those it was trained on" in capsys.readouterr().err


def test_a_gram_larger_than_the_memory(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "available", lambda: 8 * probes.GRAMS * 105**2)
    assert main(["measure", str(run), "--only", "gram", "--samples", "20"]) == 2
    error = capsys.readouterr().err
    assert "20 samples with 10 outputs each" in error
    assert "--samples 10 fits" in error
    assert main(["measure", str(run), "--only", "gram"]) == 0
    assert "on 10 of 60 samples; more do not fit into the memory" in capsys.readouterr().out


def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    options = ["--data", str(shared_data / "fashion_mnist"), "--limit", "300", "--width", "16", "--threads", "1"]
    assert main(["measure", "--model", "mlp", *options, "--only", "gradient,gram", "--samples", "10"]) == 0


def test_options_and_names_are_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "measure.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([^`\n]+)`", page))
    options = {flag(f.name) for f in dataclasses.fields(MeasureArgs)} - {"--run"}
    assert options <= words
    assert {word for word in words if word.startswith("--")} - options == {"--budget 60s", "--probe-smoothness"}
    assert set(NAMES) <= words


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (["--width", "64", "--activation", "tanh"], 0, ["PROVED: the last layer (3) alone", "the 50 training rows"]),
        (["--width", "20"], 1, ["REFUTED", "21 columns cannot have rank 50", "49 units is the least", "--widen 49"]),
        (["--width", "20", "--samples", "10"], 0, ["PROVED", "on the 10 of the 50 training rows"]),
    ],
)
def test_expressivity_answers_the_question(
    capsys: pytest.CaptureFixture[str], options: list[str], code: int, parts: list[str]
) -> None:
    subject = ["--model", "mlp", "--data", "digits", "--limit", "50", "--threads", "1"]
    assert main(["measure", *subject, *options, "--expressivity"]) == code
    answer = capsys.readouterr().out.splitlines()[-1]
    for part in parts:
        assert part in answer


def test_expressivity_names_equal_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i},{i * i % 7},{i % 5}.5" for i in range(12)] + ["3,2,1.5", "3,2,1.5"]
    (tmp_path / "t.csv").write_text("a,b,y\n" + "\n".join(rows) + "\n")
    options = ["--data", str(tmp_path / "t.csv"), "--target", "y", "--width", "64", "--test-fraction", "0.1"]
    assert main(["measure", *options, "--expressivity", "--threads", "1"]) == 1
    answer = capsys.readouterr().out.splitlines()[-1]
    assert answer.startswith("REFUTED")
    assert "rows with equal features" in answer
    assert " = " in answer
