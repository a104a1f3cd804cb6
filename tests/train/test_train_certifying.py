"""`--until-certified` and `--check-certificate`: a run that stops at its proof, and one that goes on under its eyes."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from surefoot.certificates import Certificate
from surefoot.check import verify
from surefoot.cli.main import main
from surefoot.train import until_certified
from surefoot.train.config import TrainConfig
from surefoot.train.loop import resume, train

SMALL: dict[str, Any] = {
    "limit": 12,
    "width": (64,),
    "activation": "tanh",
    "loss": "mse",
    "dtype": "float64",
    "batch_size": "full",
    "lr": 0.2,
    "gamma": 0.1,
    "steps": 1500,
    "threads": 1,
    "eval_every": 300,
    "until_certified": True,
}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL, **changes})


def flags(**changes: Any) -> list[str]:
    out = []
    for name, value in {**SMALL, **changes}.items():
        if value is not False and value is not None:
            values = [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
            out += ["--" + name.replace("_", "-"), *values]
    return out


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "checked"
    assert train(config(check_certificate=True), folder, quiet=True)["status"] == "finished"
    return folder


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "certificate.json").read_text(encoding="utf-8"))


def test_a_run_stops_at_its_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", *flags(), "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    for part in ("step 50: no certificate yet", "has to be below 0.5", "PROVED", "lr_max", "surefoot verify"):
        assert part in printed, part
    document = json.loads((folder / "run.json").read_text())
    assert document["status"] == "finished"
    step = document["summary"]["steps"]
    assert 100 < step < SMALL["steps"]
    assert step in until_certified.attempt_steps(SMALL["steps"])
    assert said(folder)["step"] == step
    assert verify(folder / "certificate")
    # The weights that training itself reached, not polished ones.
    model = dict(Certificate.load(folder / "certificate").tensors)
    from safetensors.torch import load_file

    weights = load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    assert all(torch.equal(model[name], w) for name, w in weights.items())
    assert resume(folder, quiet=True)["summary"]["steps"] == step


def test_attempts_leave_training_as_it_is(tmp_path: Path, checked: Path) -> None:
    train(config(until_certified=False, steps=200), tmp_path / "plain", quiet=True)
    plain, other = rows(tmp_path / "plain"), rows(checked)[:200]
    assert said(checked)["step"] > 200
    assert plain == other


def test_training_goes_on_by_the_certified_rule(checked: Path) -> None:
    document, steps = said(checked), rows(checked)
    claims, lr_max = document["verdict"]["numbers"], document["lr_max"]
    n = document["samples"] * document["outputs"]
    assert len(steps) == SMALL["steps"]
    assert lr_max == pytest.approx(claims["eta_max"] * n / 2, rel=1e-12)
    assert lr_max < SMALL["lr"]  # not vacuous
    assert {r["lr"] for r in steps[: document["step"]]} == {SMALL["lr"]}
    assert {r["lr"] for r in steps[document["step"] :]} == {lr_max}
    held = rows(checked, "certified")
    assert [r["step"] for r in held] == list(range(document["step"] + 1, SMALL["steps"] + 1))
    assert all(r["residual"] <= r["envelope"] for r in held)
    assert all(r["distance"] <= r["path"] * (1 + 1e-9) <= claims["radius"] * (1 + 1e-9) for r in held)
    assert held[-1]["residual"] < 0.5 * held[0]["residual"]
    # The loss of the next step is the residual after this one.
    for row, following in zip(held, steps[document["step"] + 1 :]):
        assert row["residual"] ** 2 / n == pytest.approx(following["loss"], rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("after", [-3, 5])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, checked: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    at = said(checked)["step"] + after
    original = until_certified.UntilCertified.after_step

    def stop(self: Any, step: int, row: dict[str, Any]) -> None:
        original(self, step, row)
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(until_certified.UntilCertified, "after_step", stop)
        assert train(config(check_certificate=True), folder, quiet=True)["status"] == "interrupted"
    assert (folder / "certificate").exists() == (after > 0)
    assert resume(folder, quiet=True)["status"] == "finished"
    assert rows(folder) == rows(checked)
    assert rows(folder, "certified") == rows(checked, "certified")


def test_what_a_killed_run_wrote_ahead_of_its_checkpoint_is_done_again(
    tmp_path: Path, checked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint is that before the first step; the certificate came later."""
    folder = tmp_path / "run"

    def crash(self: Any, step: int, row: dict[str, Any]) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(until_certified.Checking, "after_step", crash)
        with pytest.raises(MemoryError):
            train(config(check_certificate=True), folder, quiet=True)
    assert (folder / "certificate").is_dir()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000000"]
    resume(folder, quiet=True)
    assert rows(folder, "certified") == rows(checked, "certified")


@pytest.mark.parametrize(("claim", "message"), [("radius", "radius"), ("sigma_star", "guarantees at most")])
def test_a_violation_is_loud(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    claim: str,
    message: str,
) -> None:
    certify = until_certified.certify

    def lie(*args: Any, **options: Any) -> Any:
        verdict = certify(*args, **options)
        if not verdict:
            return verdict
        c = verdict.certificate
        false = {**c.claims, claim: c.claims[claim] * (0.01 if claim == "radius" else 30)}
        return verdict.with_certificate(dataclasses.replace(c, claims=false))

    monkeypatch.setattr(until_certified, "certify", lie)
    folder = tmp_path / "run"
    assert main(["train", *flags(check_certificate=True), "--out", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "the certificate does not hold at step" in error
    assert message in error
    document = json.loads((folder / "run.json").read_text())
    assert document["status"] == "failed"
    assert "does not hold at step" in (folder / "report.html").read_text()


def test_a_run_without_a_certificate_at_the_end_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", *flags(steps=60), "--out", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "NOT PROVED" in printed
    assert "what would help" in printed
    assert said(folder)["verdict"]["outcome"] == "undecided"
    assert not (folder / "certificate").exists()
    assert "NOT PROVED" in (folder / "report.html").read_text()


def test_a_run_that_cannot_be_certified_stops_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", *flags(width=(1,)), "--out", str(folder)]) == 1
    assert "REFUTED" in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["summary"]["steps"] == until_certified.FIRST


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"until_certified": False, "check_certificate": True}, ["--check-certificate", "--until-certified"]),
        ({"loss": "cross-entropy"}, ["--loss cross-entropy", "--layers last"]),
        ({"check_certificate": True, "dtype": "float32"}, ["--dtype float32", "--dtype float64"]),
        ({"check_certificate": True, "batch_size": 4}, ["--batch-size 4", "--batch-size full"]),
        ({"check_certificate": True, "momentum": 0.9}, ["--momentum 0.9"]),
        ({"check_certificate": True, "weight_decay": 0.1}, ["--weight-decay 0.1"]),
        ({"check_certificate": True, "optimizer": "adam", "gamma": None}, ["--optimizer adam", "delta-gclip"]),
        (
            {"check_certificate": True, "optimizer": "normalized-gd", "gamma": None, "beta": 0.0},
            ["--optimizer normalized-gd --beta 0"],
        ),
        ({"model": "vit-tiny", "depth": 1, "activation": None}, ["--until-certified", "no rule"]),
        ({"model": "vae", "loss": "auto", "activation": None}, ["autoencoding"]),
        ({"parallel": "ddp"}, ["--parallel"]),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], parts: list[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["train", *flags(**changes), "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error, error
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({}, 6.0),
        ({"optimizer": "gclip"}, 6.0),
        ({"optimizer": "sgd"}, 6.0),
        ({"optimizer": "normalized-gd", "beta": 0.5}, 3.0),
        ({"optimizer": "smooth-clip", "L0": 2.0}, 12.0),
        ({"optimizer": "adamw"}, None),
        ({"momentum": 0.9}, None),
        ({"weight_decay": 0.1}, None),
    ],
)
def test_the_largest_lr_keeps_every_multiplier_below_lr_max(changes: dict[str, Any], lr: float | None) -> None:
    found = until_certified.certified_lr(TrainConfig(**changes).resolved(), 6.0)
    assert found == lr
