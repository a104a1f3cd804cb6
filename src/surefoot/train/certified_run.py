"""What a run says of its certificate: which rows, which steps, the document of a verdict and its files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.theorems.verdict import Verdict
from surefoot.train.config import TrainConfig
from surefoot.train.document import CERTIFIED, with_additions
from surefoot.train.files import write_json
from surefoot.train.job import Job
from surefoot.train.record import json_number

FORMAT, VERSION = "surefoot.certified", 1
Layers = Literal["all", "last"]


def check_subject(job: Job, layers: Layers, what: str) -> None:
    """Raise InputError, which begins with `what`, unless there is a kind of certificate for a job's loss and data."""
    loss = job.objective.loss
    if job.objective.task not in ("classification", "regression"):
        raise InputError(
            f"{what}: there is no certificate for {job.objective.task} (loss {loss}); there are those for classes and "
            "real targets"
        )
    if loss == "cross-entropy" and layers == "all":
        raise InputError(
            f"{what}: --loss cross-entropy has no smallest value that is reached; give (and train with) --loss mse, or "
            "certify the last layer alone, by --layers last of surefoot certify"
        )


def rows_of(job: Job, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first training rows (all of them for None) and what their outputs are compared with, (N, C) for mse.

    Raises:
        InputError: there are not as many rows.
    """
    x, y = job.data.train_x, job.data.train_y
    if samples is not None and not 1 <= samples <= len(x):
        raise InputError(f"--samples {samples} is not between 1 and the {len(x):,} training rows")
    x, y = x[:samples], y[:samples]
    return x, job.objective.wanted(y, torch.float64).double() if job.objective.loss == "mse" else y


def describe(
    verdict: Verdict, job: Job, step: int, *, samples: int, layers: Layers = "all", notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the document of a verdict on a run, in strict JSON."""
    certificate = verdict.certificate
    lr_max = None if certificate is None else certificate.units.get("lr_max")
    said = verdict.to_json()
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": job.title,
        "verdict": said | {"numbers": {k: json_number(v) for k, v in said["numbers"].items()}},
        "statement": "" if certificate is None else certificate.statement,
        "folder": None,
        "step": step,
        "layers": layers,
        "loss": job.objective.loss,
        "samples": samples,
        "rows": len(job.data.train_x),
        "outputs": job.objective.outputs,
        "lr_max": lr_max,
        "rule": rule(job.config, lr_max),
        "polishing": None,
        "notes": list(notes),
    }


def certified_lr(config: TrainConfig, lr_max: float) -> float | None:
    """Return the largest lr with which no step of a run's rule multiplies the gradient by more than lr_max.

    None where no lr does: momentum, decay and Adam make other steps than multiples of the gradient.
    """
    if config.optimizer in ("adam", "adamw") or config.momentum or config.weight_decay:
        return None
    if config.optimizer == "normalized-gd":
        return lr_max * config.beta if config.beta else None
    if config.optimizer == "smooth-clip":
        assert config.L0 is not None
        return lr_max * config.L0
    return lr_max


def write_certificate(document: dict[str, Any], verdict: Verdict, run: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the certificate, if there is one, and certificate.json into the run; return the document."""
    if verdict.certificate is not None:
        folder = verdict.certificate.save(out or run / "certificate")
        document = document | {"folder": str(folder)}
    write_json(run / CERTIFIED, document)
    return document


def read_document(run: Path) -> dict[str, Any] | None:
    """Return a run's certificate.json; None where there is none."""
    return with_additions({}, run).get("certificate")


def remove_certificate(run: Path) -> None:
    """Delete what a run wrote about its certificate."""
    shutil.rmtree(run / "certificate", ignore_errors=True)
    for name in (CERTIFIED, "certified.parquet"):
        (run / name).unlink(missing_ok=True)


def in_options(message: str) -> str:
    """Return a message of the library in the words of the command line."""
    return message.replace("certify(..., layers='last')", "--layers last of surefoot certify")


def rule(config: TrainConfig, lr_max: float | None) -> str | None:
    """Say in a run's own options which steps are covered; None where lr_max is."""
    if lr_max is None:
        return None
    lr = certified_lr(config, lr_max)
    used = "" if config.lr is None else f" (this run used {config.lr:g})"
    if config.optimizer == "normalized-gd" and config.beta:
        return f"--optimizer normalized-gd --beta {config.beta:g} with --lr up to {lr:.4g}{used}"
    if config.optimizer == "smooth-clip":
        return f"--optimizer smooth-clip --L0 {config.L0:g} with --lr up to {lr:.4g}{used}, whatever --L1"
    if lr is None:
        return f"any clipped or plain gradient step with --lr up to {lr_max:.4g}, without momentum and decay"
    letters = {"delta-gclip": ", whatever --gamma and --delta", "gclip": ", whatever --gamma"}.get(config.optimizer, "")
    return f"--optimizer {config.optimizer} with --lr up to {lr:.4g}{used}{letters}"
