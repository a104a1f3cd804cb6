"""What `surefoot measure` does: from a subject and a budget to the document of its measurements."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from surefoot.errors import InputError
from surefoot.train.budget import Planner, budget_text
from surefoot.train.environment import environment
from surefoot.train.job import repeatable
from surefoot.train.probes import Probes
from surefoot.train.subject import Subject

FORMAT, VERSION = "surefoot.measurements", 1
NAMES = ("gradient", "noise", "features", "sharpness", "gauss-newton", "smoothness", "gram")


def choose(only: str | None, *, expressivity: bool = False) -> tuple[str, ...]:
    """Return the names of the measurements that --only and --expressivity ask for; all where neither does.

    Raises:
        InputError: a name is unknown, or both are given.
    """
    if expressivity:
        if only is not None:
            raise InputError(
                f"--only {only} and --expressivity contradict each other; --expressivity is --only features"
            )
        return ("features",)
    if only is None:
        return NAMES
    found = [name.strip() for name in only.split(",") if name.strip()]
    for name in found:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(f"--only {name!r} is not known{meant}; choose from {', '.join(NAMES)}")
    if not found:
        raise InputError(f"--only {only!r} names nothing; choose from {', '.join(NAMES)}")
    return tuple(found)


def measure(
    make: Callable[[], Subject],
    seconds: float,
    names: tuple[str, ...] = NAMES,
    *,
    samples: int | None = None,
    asked: bool = False,
    expressivity: bool = False,
    tell: Callable[[str, float], None] = lambda what, part: None,
) -> dict[str, Any]:
    """Measure what can be afforded, and return the document of it, measurements.json.

    Args:
        make: makes what is measured, from a run or from a model and data; its time counts.
        seconds: the budget.
        names: some of `NAMES`.
        samples: of the Gram and the features; None: as many as the budget allows.
        asked: the names were asked for one by one: what is impossible among them is an error, not left out.
        expressivity: the question is whether the last layer alone fits all rows.
        tell: called with what is done next and the part of the budget that is spent.

    Raises:
        InputError: a request that makes no sense.
    """
    planner = Planner(seconds)
    subject = make()
    with repeatable(subject.job.config.threads):
        if expressivity and samples is None:
            samples = subject.rows  # the question is about all of them
        probes = Probes(subject, samples, seconds)
        tell("finding out what things cost", planner.spent / seconds)
        if names != ("features",):
            probes.duplicates()
        planner.go(probes.tasks(names), tell, asked=asked)
    job = subject.job
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": job.title if subject.folder is not None else job.title.rpartition(", ")[0],
        "subject": {
            "weights": subject.weights,
            "step": subject.step,
            "loss": job.objective.loss,
            "about": [
                f"{job.parameters:,} parameters",
                f"{subject.rows:,} training rows",
                f"loss {job.objective.loss}",
            ],
            "config": job.config.to_json(),
            "data": job.data_summary(),
        },
        "environment": {**environment(job.device), "started": datetime.now(UTC).isoformat(timespec="seconds")},
        "budget": seconds,
        "seconds": planner.spent,
        "measurements": [m.to_json() for m in probes.found],
        "series": probes.series,
        "left_out": [
            {"what": e.what, "why": e.why, "budget": None if e.budget is None else budget_text(e.budget)}
            for e in planner.left_out
        ],
        "notes": [*subject.notes, *probes.notes],
        **({"expressivity": probes.expressivity} if expressivity else {}),
    }
