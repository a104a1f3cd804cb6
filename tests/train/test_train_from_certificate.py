"""`--from-certificate`: a run that begins at a certificate's weights, under its eyes from the first step on."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from surefoot.certificates import Certificate
from surefoot.cli.main import main
from surefoot.train import until_certified
from surefoot.train.certified_start import certified_options
from surefoot.train.config import TrainConfig
from surefoot.train.loop import resume, train
from surefoot.train.subject import from_run

SMALL = (
    "--limit", "12", "--width", "64", "--depth", "1", "--activation", "tanh", "--loss", "mse", "--threads", "1",
)  # fmt: skip
LONG = ("--batch-size", "full", "--dtype", "float64", "--lr", "0.2", "--gamma", "0.1", "--steps", "1500")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at its certificate: there is a residual left to bring down."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *SMALL, *LONG, "--until-certified", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def polished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 run by minibatches, polished; its first 9 rows are certified."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *SMALL, "--batch-size", "4", "--momentum", "0.9", "--epochs", "3", "--out", str(folder)]) == 0
    assert main(["certify", str(folder), "--samples", "9"]) == 0
    return folder


def rows(folder: Path, name: str = "certified") -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def go_on(run: Path, out: Path, *options: str, steps: int = 100) -> int:
    given = ["--from-certificate", str(run / "certificate"), "--steps", str(steps), *options, "--out", str(out)]
    return main(["train", *given])


def options(run: Path, steps: int, optimizer: str | None = None, **changes: Any) -> TrainConfig:
    config = certified_options(run / "certificate", optimizer=optimizer)
    return TrainConfig(**{**vars(config), "steps": steps, **changes})


def check(out: Path, steps: int) -> None:
    certificate = Certificate.load(out / "certificate")
    claims, held = certificate.claims, rows(out)
    assert [r["step"] for r in held] == list(range(1, steps + 1))
    assert all(r["residual"] <= r["envelope"] <= claims["residual"] * (1 + 1e-6) for r in held)
    assert all(r["distance"] <= r["path"] * (1 + 1e-9) <= claims["radius"] for r in held)
    assert held[-1]["residual"] < 0.9 * held[0]["residual"]  # not vacuous
    # The certified rule: the largest lr that is covered, on the mean squared error.
    assert 0.5 < max(r["step_size"] for r in held) / claims["eta_max"] <= 1 + 1e-9
    # The first gradient is that of the certificate's weights.
    first = rows(out, "metrics")[0]["loss"]
    assert first == pytest.approx(claims["residual"] ** 2 / certificate.tensors["targets"].numel(), rel=1e-5)


def test_every_step_from_the_first_on_is_held(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "on"
    assert go_on(trained, out, steps=200) == 0
    check(out, 200)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["batch_size"], config["limit"]) == ("float64", "full", 12)
    assert (config["gamma"], config["optimizer"]) == (0.1, "delta-gclip")  # of the run
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="fig-envelope"' in page
    assert 'id="fig-distance"' in page


@pytest.mark.parametrize(
    ("optimizer", "letters"), [("gclip", {"gamma": 1e-4}), ("normalized-gd", {"beta": 0.01}), ("sgd", {})]
)
def test_other_rules(trained: Path, tmp_path: Path, optimizer: str, letters: dict[str, float]) -> None:
    out = tmp_path / "on"
    assert train(options(trained, 200, optimizer, **letters), out, quiet=True)["status"] == "finished"
    check(out, 200)


def test_from_polished_weights_on_the_rows_that_are_certified(
    polished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "on"
    assert go_on(polished, out, steps=20) == 0
    printed = capsys.readouterr().out
    for part in ("verifying", "PROVED", "the training rows are the 9 of the certificate", "began at the weights of"):
        assert part in printed, part
    config = json.loads((out / "config.json").read_text())
    assert config["momentum"] == 0.0
    assert len(rows(out)) == 20
    before, after = (Certificate.load(run / "certificate").tensors for run in (polished, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The run is one like any other: it can be measured, its data are what they were.
    assert len(from_run(out).job.data.train_x) == 9
    assert main(["verify", str(out / "certificate")]) == 0


def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, at = options(trained, 80), 30
    assert train(config, tmp_path / "whole", quiet=True)["status"] == "finished"
    original = until_certified.UntilCertified.after_step

    def stop(self: Any, step: int, row: dict[str, Any]) -> None:
        original(self, step, row)
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(until_certified.UntilCertified, "after_step", stop)
        assert train(config, tmp_path / "run", quiet=True)["status"] == "interrupted"
    assert resume(tmp_path / "run", quiet=True)["status"] == "finished"
    for name in ("certified", "metrics"):
        assert rows(tmp_path / "run", name) == rows(tmp_path / "whole", name)


def test_a_false_certificate_does_not_start(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    path = run / "certificate" / "certificate.json"
    document = json.loads(path.read_text())
    document["claims"]["sigma_min"] *= 3
    path.write_text(json.dumps(document))
    assert go_on(run, tmp_path / "on") == 2
    error = capsys.readouterr().err
    assert "does not verify" in error
    assert "sigma_min" in error
    assert not (tmp_path / "on").exists()


def test_a_step_that_contradicts_it_is_loud(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Certificate.load.__func__  # type: ignore[attr-defined]

    def lie(cls: Any, path: Any) -> Certificate:
        found = load(cls, path)
        return Certificate(**{**vars(found), "claims": {**found.claims, "sigma_star": 30 * found.claims["sigma_star"]}})

    monkeypatch.setattr(Certificate, "load", classmethod(lie))
    assert go_on(trained, tmp_path / "on") == 1
    assert "the certificate does not hold at step 1:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--limit", "11"], ["other rows", "--data digits"]),
        (["--width", "63"], ["another network", "--config RUN/config.json"]),
        (["--activation", "sigmoid"], ["another network"]),
        (["--dtype", "float32"], ["--dtype float32", "--dtype float64"]),
        (["--batch-size", "4"], ["--batch-size 4", "--from-certificate needs --batch-size full"]),
        (["--momentum", "0.9"], ["--momentum 0.9"]),
        (["--optimizer", "adam"], ["--optimizer adam", "delta-gclip"]),
        (["--until-certified"], ["contradict"]),
        (["--explore-exploit"], ["contradict"]),
    ],
)
def test_what_makes_no_sense_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], parts: list[str]
) -> None:
    assert go_on(trained, tmp_path / "on", *given) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error, error
    assert not (tmp_path / "on").exists()


def test_other_certificates_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert main(["certify", str(run), "--layers", "last", "--out", str(run / "last")]) == 0
    for path, part in ((run / "last", "last layer alone"), (run, "does not verify"), (run / "no", "does not verify")):
        given = ["train", "--from-certificate", str(path), "--config", str(run / "config.json"), "--steps", "3"]
        assert main([*given, "--out", str(tmp_path / "on")]) == 2
        assert part in capsys.readouterr().err
    assert main(["compare", *SMALL, "--from-certificate", str(run / "certificate"), "--out", str(tmp_path / "c")]) == 2
    assert "--from-certificate" in capsys.readouterr().err
