"""`surefoot certify`: from a run to a certificate of its training rows, and the document that the report shows."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.certificates import Certificate, NoRule, certify
from surefoot.errors import InputError
from surefoot.theorems.verdict import Verdict
from surefoot.train.certified_run import Layers, check_subject, describe, in_options, rows_of, rule
from surefoot.train.document import read_run
from surefoot.train.job import Job
from surefoot.train.record import json_number
from surefoot.train.subject import Subject, from_run

Tell = Callable[[str], None]


def read_subject(run: Path) -> Subject:
    """Return a run at its newest checkpoint, ready to be certified.

    Raises:
        InputError: it is no run, has no checkpoint, or diverged.
    """
    subject = from_run(run, device="cpu")
    if (document := read_run(run))["status"] == "diverged":
        raise InputError(f"RUN {run} diverged ({document['message']}); train again, and certify that run")
    return subject


def certify_subject(
    subject: Subject,
    *,
    layers: Layers = "all",
    polish: bool = True,
    samples: int | None = None,
    epsilon: float | None = None,
    tell: Tell = lambda line: None,
) -> tuple[Verdict, dict[str, Any]]:
    """Certify the training rows of a run, and return the verdict and its document, certificate.json.

    Args:
        subject: the run at its newest checkpoint, or a model as its factory made it and data.
        layers: "all", or "last" for the last dense layer on frozen features.
        polish: first move a copy of the weights to where the certificate fires (all layers only).
        samples: certify the first so many training rows, and say so; None: all.
        epsilon: of the path-length theorem; None: the best.
        tell: told a line now and then.

    Raises:
        InputError: the loss, a module or a number has no certificate.
    """
    job, began = subject.job, time.monotonic()
    check_subject(job, layers, f"--model {job.config.model}" if subject.folder is None else f"RUN {subject.folder}")
    x, y = rows_of(job, samples)
    which = "training rows" if len(x) == subject.rows else f"first {len(x):,} of the {subject.rows:,} training rows"
    title = job.title if subject.folder is not None else job.title.rpartition(", ")[0]
    source = f"the {which} of {job.data.name}, at {subject.weights} of {title}"
    options: dict[str, Any] = {"loss": job.objective.loss, "layers": layers, "epsilon": epsilon, "source": source}
    try:
        verdict = certify(job.model, x, y, polish=polish and layers == "all", progress=tell, **options)
    except NoRule as error:
        raise InputError(in_options(str(error))) from error
    if verdict.certificate is not None and len(x) < subject.rows:
        said = f" The samples are the {which}: nothing is said of the other {subject.rows - len(x):,}."
        statement = verdict.certificate.statement + said
        verdict = verdict.with_certificate(replace(verdict.certificate, statement=statement))
    document = describe(verdict, job, subject.step, samples=len(x), layers=layers, notes=subject.notes)
    if subject.folder is None:
        document |= {"title": title, "step": None, "rule": rule(replace(job.config, lr=None), document["lr_max"])}
    if verdict.certificate is not None and polish and layers == "all":
        document["polishing"] = _polishing(job, x, y, verdict.certificate)
    return verdict, document | {"seconds": time.monotonic() - began}


def check_new(out: Path, option: str) -> None:
    """Raise InputError if a certificate cannot be written to a folder because it is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{option} {out} exists already; give another folder with --out, or delete it")


def _polishing(job: Job, x: Tensor, y: Tensor, certificate: Certificate) -> dict[str, Any]:
    """Say how far the certified weights are from those of the run, and what that did to what was held out."""
    before = copy.deepcopy(job.model).double()
    after = copy.deepcopy(before)
    own = dict(after.named_parameters())
    moved = 0.0
    with torch.no_grad():
        for name, p in own.items():
            moved += float((certificate.tensors[name] - p).square().sum())
            p.copy_(certificate.tensors[name])
    metric = job.objective.metric
    norm = torch.stack([p.detach().norm() for p in before.parameters()]).norm()
    return {
        "distance": moved**0.5,
        "norm": float(norm),
        "residual": [_residual(model, x, y) for model in (before, after)],
        "metric": metric.name,
        "percent": metric.percent,
        "held_out": [json_number(_held_out(job, model)[metric.column]) for model in (before, after)],
        "held_out_rows": len(job.data.test_x),
    }


@torch.no_grad()
def _residual(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x.double()) - y).norm())


def _held_out(job: Job, model: nn.Module) -> dict[str, float]:
    data = job.data
    y = data.test_y.double() if data.test_y.is_floating_point() else data.test_y
    return job.objective.evaluate(model, data.test_x.double(), y, rows=1000, device=torch.device("cpu"))
