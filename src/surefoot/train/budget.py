"""What can be afforded in a given time: tasks, cheap ones first, each on as many samples as its share of it allows."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surefoot.errors import InputError

MARGIN = 0.9  # of the budget is planned with: the report and what was guessed wrong take the rest
_UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_budget(text: str) -> float:
    """Return the seconds that 60s, 2m or 1h stand for.

    Raises:
        InputError: another form, or no time at all.

    Example:
        >>> parse_budget("60s"), parse_budget("1.5m"), parse_budget("1h")
        (60.0, 90.0, 3600.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not found or not float(found[1]) > 0:
        raise InputError(f"--budget {text} is no length of time; write it as 60s, 2m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def budget_text(seconds: float) -> str:
    """Return the shortest budget, rounded up to two digits, that is at least `seconds`.

    Example:
        >>> budget_text(41.2), budget_text(130), budget_text(12345)
        ('42s', '2.2m', '3.5h')
    """
    for unit, size in _UNITS.items():
        value = seconds / size
        if value < 100 or unit == "h":
            step = 10.0 ** max(0, math.floor(math.log10(max(value, 1))) - 1) if unit == "s" or value >= 10 else 0.1
            rounded = math.ceil(max(value, 1e-9) / step - 1e-9) * step
            if rounded < 100 or unit == "h":
                return f"{rounded:.10g}{unit}"
    raise AssertionError(seconds)


@dataclass(frozen=True)
class LeftOut:
    """Something that was not measured, or on fewer samples than there are.

    Args:
        what: as a reader would call it.
        why: a sentence without a full stop.
        budget: the --budget that would do, in seconds; None where time is not what is missing.
    """

    what: str
    why: str
    budget: float | None = None


@dataclass(frozen=True)
class Task:
    """Something to measure.

    Args:
        name: what --only calls it.
        title: what it is.
        share: of the budget, before what the others leave over.
        least: the fewest samples that make sense.
        most: the most samples that there are, or that fit.
        seconds: n samples -> what it takes.
        run: measures on n samples.
        unit: what `least` and `most` count.
        whole: all there are, where more than `most` do not fit into the memory; 0: `most`.
    """

    name: str
    title: str
    share: float
    least: int
    most: int
    seconds: Callable[[int], float]
    run: Callable[[int], None]
    unit: str = "samples"
    whole: int = 0


class Planner:
    """Goes through tasks in their order within a time; what one leaves over goes to those after it.

    Args:
        seconds: the time.
        clock: tells the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.began = clock()
        self.left_out: list[LeftOut] = []

    @property
    def spent(self) -> float:
        """Seconds since the planner was made."""
        return self.clock() - self.began

    def go(self, tasks: Sequence[Task], tell: Callable[[str, float], None], *, asked: bool = False) -> None:
        """Run what can be afforded.

        Args:
            tasks: in the order in which they are to run.
            tell: called with a title and the part of the time that is spent, before each task and at the end.
            asked: the user named the tasks: an InputError of one of them is the user's, else it is told as left out.
        """
        before = self.spent
        for i, task in enumerate(tasks):
            rest = sum(t.share for t in tasks[i:])
            allowed = max(MARGIN * self.seconds - self.spent, 0.0) * task.share / rest
            n = affordable(task, allowed)
            if n < task.least:
                needed = self._budget_for(task, task.least, tasks, before)
                self.left_out.append(LeftOut(task.title, "more than the budget allows", needed))
                continue
            tell(task.title, min(1.0, self.spent / self.seconds))
            try:
                task.run(n)
            except InputError as error:
                if asked:
                    raise
                self.left_out.append(LeftOut(task.title, str(error)))
                continue
            whole = max(task.most, task.whole)
            if n < whole:
                why = f"on {n:,} of {whole:,} {task.unit}"
                if n == task.most:
                    self.left_out.append(LeftOut(task.title, f"{why}; more do not fit into the memory"))
                else:
                    more = f"; no more than {task.most:,} fit into the memory" if task.most < whole else ""
                    needed = self._budget_for(task, task.most, tasks, before)
                    self.left_out.append(LeftOut(task.title, why + more, needed))
        tell("done", 1.0)

    def _budget_for(self, task: Task, n: int, tasks: Sequence[Task], before: float) -> float:
        """Return the budget of which a task's share is enough for n samples."""
        wanted = before + task.seconds(n) * sum(t.share for t in tasks) / task.share
        return max(wanted / MARGIN, 1.1 * self.seconds)


def affordable(task: Task, seconds: float) -> int:
    """Return the most samples, up to `task.most`, that take no longer than `seconds`; 0 if the least take longer."""
    if task.seconds(task.least) > seconds:
        return 0
    if task.seconds(task.most) <= seconds:
        return task.most
    low, high = task.least, task.most
    while high - low > 1:
        middle = (low + high) // 2
        if task.seconds(middle) <= seconds:
            low = middle
        else:
            high = middle
    return low
