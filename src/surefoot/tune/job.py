"""What `surefoot tune` does: from the configuration of a run to a suggestion, its document, and the run with it."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surefoot.errors import InputError
from surefoot.train.batches import batch_rows
from surefoot.train.config import TrainConfig
from surefoot.train.distributed import shares
from surefoot.train.environment import environment
from surefoot.train.job import Job, prepare, repeatable
from surefoot.train.record import thinned
from surefoot.tune.rules import MEAN_OF_SCHEDULE
from surefoot.tune.suggest import OPTIMIZERS, Suggestion, suggest

FORMAT, VERSION = "surefoot.suggestion", 1


def tune(
    config: TrainConfig, budget: float | None = None, *, tell: Callable[[str], None] = lambda text: None
) -> tuple[Suggestion, dict[str, Any]]:
    """Suggest lr, γ, δ and a warm-up for a run, and return the suggestion with its document, suggestion.json.

    The batches measured are the first of the run, in its order. The document's `config` holds every option of the run
    with what is suggested, ready for `surefoot train --config`.

    Args:
        config: the run to come; its `lr` is taken for what you would have chosen.
        budget: in (0, 1], as for `suggest`.
        tell: called with what is done next.

    Raises:
        InputError: a request that makes no sense.
    """
    _check(config)
    began = time.monotonic()
    tell("loading the data")
    job = prepare(dataclasses.replace(config, parallel="none"))
    job.model.train()
    resolved = job.config
    assert resolved.momentum is not None
    tell(f"measuring along the first steps of a run of {job.steps:,}")
    with repeatable(resolved.threads):
        try:
            found = suggest(
                job.model,
                lambda model, batch: _loss(job, model, *batch),
                _Batches(job),
                steps=job.steps,
                budget=budget,
                optimizer=resolved.optimizer,
                schedule=resolved.lr_schedule,
                momentum=resolved.momentum,
                lr=config.lr,
                eps=torch.finfo(torch.bfloat16).eps if resolved.autocast == "bf16" else None,
                seed=resolved.seed,
            )
        except InputError as error:
            raise InputError(_in_options(str(error))) from error
    changed = {**found.config(), "warmup": max(resolved.warmup, found.warmup), "parallel": config.parallel}
    return found, _document(job, found, dataclasses.replace(resolved, **changed), time.monotonic() - began)


def _check(config: TrainConfig) -> None:
    if config.optimizer not in OPTIMIZERS:
        raise InputError(
            f"--optimizer {config.optimizer} is none that the rules are about; choose {', '.join(OPTIMIZERS)}"
        )
    if config.optimizer == "sgd" and config.gamma is not None:
        raise InputError(
            f"--optimizer sgd with --gamma {config.gamma:g} clips; say --optimizer gclip, which takes the same steps"
        )
    if config.lr_schedule not in MEAN_OF_SCHEDULE:
        raise InputError(
            f"--lr-schedule {config.lr_schedule} is none that the rules are about; choose {', '.join(MEAN_OF_SCHEDULE)}"
        )
    if config.from_certificate is not None:
        raise InputError(
            f"--from-certificate {config.from_certificate} says itself which lr it covers; there is nothing to tune"
        )


class _Batches:
    """The batches of a run, in its order: a pass each time one iterates."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __len__(self) -> int:
        return self._job.per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self._job.data
        for step in range(self._job.per_epoch):
            rows = batch_rows(step, len(data.train_x), self._job.batch_size, self._job.config.seed)
            yield (data.train_x, data.train_y) if rows is None else (data.train_x[rows], data.train_y[rows])


def _loss(job: Job, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of a batch as training has it; with micro-batches the activations of one piece at a time."""

    def part(start: int, end: int) -> Tensor:
        xs, ys = x[start:end].to(job.device), y[start:end].to(job.device)
        with job.precision():
            return job.objective.value(model(xs), xs, ys)

    pieces = shares(len(x), job.team, job.config.micro_batch)
    if len(pieces) == 1:
        return part(0, len(x))
    total = torch.zeros((), device=job.device)
    for start, end in pieces:
        loss = checkpoint(part, start, end, use_reentrant=False)
        assert isinstance(loss, Tensor)
        total = total + loss * ((end - start) / len(x))
    return total


def _document(job: Job, found: Suggestion, config: TrainConfig, seconds: float) -> dict[str, Any]:
    plain = found.to_json()
    columns = ("step", "loss", "grad_norm", "smoothness", "h")
    fit, series = plain["fit"], {name: [float(o[name]) for o in found.observations] for name in columns}
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": job.title,
        "sure": found.sure,
        "suggested": plain["config"],
        "L": found.measurements[0].value,
        **{name: plain[name] for name in ("reasons", "doubts", "notes", "others", "cost", "steps")},
        "subject": {
            "about": [
                f"{job.parameters:,} parameters",
                f"{len(job.data.train_x):,} training rows",
                f"loss {job.objective.loss}",
                f"batches of {job.batch_size:,}",
            ],
        },
        "measurements": plain["measurements"],
        "smoothness": {
            "series": thinned(series),
            "fit": fit,
            "message": "" if fit else "it takes ten steps that could be measured",
        },
        "config": config.to_json(),
        "data": job.data_summary(),
        "environment": {**environment(job.device), "started": datetime.now(UTC).isoformat(timespec="seconds")},
        "seconds": seconds,
    }


def _in_options(message: str) -> str:
    """Return a message of `suggest` in the words of the command line."""
    message = re.sub(r"\bsteps=(\d+)", r"the run's \1 steps", message)
    for word, ours in (
        ("budget=", "--budget "),
        ("loss_fn gives", "the model gives"),
        ("loss_fn has", "the loss has"),
        ("loss_fn: only", "only"),
        ("give eps=torch.finfo(torch.bfloat16).eps, or measure in float32", "leave --autocast out"),
        ("closure is", "the model is"),
        ("give more steps", "give more --steps or --epochs"),
    ):
        message = message.replace(word, ours)
    return message
