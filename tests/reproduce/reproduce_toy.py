"""A recipe that takes no time: two arms, one of them worse by a known amount."""

import math
import time
from collections.abc import Callable
from typing import Any

from surefoot.reproduce.recipe import Arms, Column, Drawing, Experiment, Finding, Job, Recipe, Setting, Table
from surefoot.reproduce.results import Results


def numbers(job: Job) -> Arms:
    start = 0.5 + 0.01 * job.seed
    found: dict[str, dict[str, Any]] = {
        "a": {"score": start, "word": "yes", "curve": [1.0, math.inf]},
        "b": {"score": start - job.experiment.setting["worse"], "word": "yes" if job.seed else "no", "gone": None},
    }
    return {name: arm for name, arm in found.items() if job.part in ("", name)}


def slowly(job: Job) -> Arms:
    time.sleep(0.05)
    return numbers(job)


def judge(results: Results) -> list[Finding]:
    found = []
    for experiment in results.experiments:
        d = results.difference(experiment.name, "b", "a", "score")
        assert d is not None
        found.append(Finding(experiment.name, "reproduced" if d.mean > -0.1 else "not reproduced", f"{d.mean:+.2f}"))
    return found


def paint(figure: Any, results: Results) -> None:
    figure.add_subplot().plot([results.summary(e.name, "a", "score").mean for e in results.experiments])  # type: ignore[union-attr]


def toy(run: Callable[[Job], Arms] = numbers, *, worse: float = 0.05) -> Recipe:
    """Return the recipe; `worse` is by how much the second experiment's b falls short."""
    return Recipe(
        name="toy",
        paper="Nobody: Nothing",
        claim="b is no worse than a",
        scaled="all of it",
        tolerance="0.1",
        settings=(Setting("worse", "0.05", "ours", full="0.06"),),
        experiments=(
            Experiment("first", setting={"worse": 0.0}),
            Experiment("second", setting={"worse": worse}, parts=("a", "b")),
        ),
        full=(Experiment("first", setting={"worse": 0.06}),),
        run=run,
        judge=judge,
        tables=(
            Table("Scores", (Column("score", "score", ".2f"), Column("word", "word"), Column("nowhere", "nowhere"))),
        ),
        drawings=(Drawing("scores", "The scores.", paint),),
        seeds=3,
    )
