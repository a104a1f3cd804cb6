"""The finished runs of a recipe as numbers by experiment, arm and seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surefoot.reproduce.recipe import Experiment


@dataclass(frozen=True)
class Summary:
    """Mean of n numbers and its standard error, s/sqrt(n); None where n < 2."""

    mean: float
    error: float | None
    n: int


def summary(values: Sequence[float]) -> Summary | None:
    """Return mean and standard error; None without values.

    Example:
        >>> summary([1.0, 3.0])
        Summary(mean=2.0, error=1.0, n=2)
    """
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n < 2:
        return Summary(mean, None, n)
    return Summary(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n), n)


class Results:
    """What the runs gave.

    Args:
        experiments: those asked for, in the recipe's order.
        lines: finished runs, as they are kept: experiment, part, seed, seconds, data, arms.
    """

    def __init__(self, experiments: Sequence[Experiment], lines: Sequence[Mapping[str, Any]]) -> None:
        self.experiments = tuple(experiments)
        names = {e.name for e in experiments}
        self.lines = sorted((line for line in lines if line["experiment"] in names), key=lambda line: line["seed"])

    def arms(self, experiment: str) -> list[str]:
        """Return the arms that an experiment has, as they come."""
        found = [arm for line in self.lines if line["experiment"] == experiment for arm in line["arms"]]
        return list(dict.fromkeys(found))

    def by_seed(self, experiment: str, arm: str, measure: str) -> dict[int, Any]:
        """Return a measure's values by seed, without those that are None."""
        return {
            line["seed"]: line["arms"][arm][measure]
            for line in self.lines
            if line["experiment"] == experiment and line["arms"].get(arm, {}).get(measure) is not None
        }

    def summary(self, experiment: str, arm: str, measure: str) -> Summary | None:
        """Return mean and standard error of a measure over the seeds; None where it is not there."""
        return summary([float(v) for v in self.by_seed(experiment, arm, measure).values()])

    def difference(self, experiment: str, arm: str, base: str, measure: str) -> Summary | None:
        """Return mean and standard error of arm - base, seed by seed."""
        a, b = self.by_seed(experiment, arm, measure), self.by_seed(experiment, base, measure)
        return summary([a[seed] - b[seed] for seed in a if seed in b])

    def words(self, experiment: str, arm: str, measure: str) -> Counter[str]:
        """Return how often each word came as a measure's value."""
        return Counter(str(v) for v in self.by_seed(experiment, arm, measure).values())

    def seeds(self, experiment: str) -> list[int]:
        """Return the seeds that are there, whatever their part."""
        return sorted({line["seed"] for line in self.lines if line["experiment"] == experiment})
