"""Telling the user where a run stands: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Self


def duration(seconds: float) -> str:
    """Return seconds as 42s, 3m10s or 2h05m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Progress:
    """Reports loss, gradient norm, regimes, rows a second and time left.

    Args:
        steps: how many steps the whole run has.
        start: steps already taken (a resumed run).
        every: seconds between lines where standard output is no terminal.
        quiet: say nothing.
    """

    def __init__(self, steps: int, *, start: int = 0, every: float = 5.0, quiet: bool = False) -> None:
        self.steps, self.start, self.every, self.quiet = steps, start, every, quiet
        self.began = self.last = time.monotonic()
        self.rows = 0
        self.live = None
        if sys.stdout.isatty() and not quiet:
            from rich.progress import BarColumn, Progress, TextColumn

            self.live = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self.task = self.live.add_task("", total=steps, completed=start)

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    @property
    def rows_per_second(self) -> float:
        """Rows gone through a second, since this process began."""
        return self.rows / max(time.monotonic() - self.began, 1e-9)

    def update(self, step: int, rows: int, loss: float, norm: float, counts: dict[str, int]) -> None:
        """Count a step of `rows` rows, and say something if it is time to."""
        self.rows += rows
        if not self._is_time(step):
            return
        total = max(1, sum(counts.values()))
        regimes = " ".join(f"{name} {n / total:.0%}" for name, n in counts.items() if n)
        left = (self.last - self.began) / max(1, step - self.start) * (self.steps - step)
        line = (
            f"step {step}/{self.steps}  loss {loss:.4g}  |g| {norm:.3g}  {regimes}  "
            f"{self.rows_per_second:,.0f} rows/s  {duration(left)} left"
        )
        self._show(step, line)

    def last_layer(self, step: int, loss: float, bound: float) -> None:
        """Say where the last layer stands, if it is time to."""
        if self._is_time(step):
            under = f" <= {bound:.4g}" if math.isfinite(bound) else ""
            self._show(step, f"step {step}/{self.steps}  last layer: loss {loss:.4g}{under}")

    def _is_time(self, step: int) -> bool:
        now = time.monotonic()
        pause = 0.2 if self.live is not None else self.every
        if self.quiet or (now - self.last < pause and step < self.steps):
            return False
        self.last = now
        return True

    def _show(self, step: int, line: str) -> None:
        if self.live is not None:
            self.live.update(self.task, completed=step, description=line)
        else:
            print(line, flush=True)
