"""Where the data of an experiment come from: the hub by default, a folder where one is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from surefoot.data import Dataset, load
from surefoot.errors import InputError
from surefoot.reproduce.recipe import Experiment


class Sources:
    """The data sets of experiments, the last one kept in memory.

    Args:
        root: a folder that holds them under the names that the experiments give; None: the hub.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is not None and not root.is_dir():
            raise InputError(f"--data-root {root} is not a folder; give one that holds the data sets, or leave it out")
        self.root = root
        self._kept: tuple[Experiment, Dataset] | None = None

    def check(self, experiments: Sequence[Experiment]) -> None:
        """Raise InputError if the data of any of these cannot be found; the hub is not asked."""
        missing = [e for e in experiments if self._where(e) is None]
        if not missing:
            return
        wanted = "; ".join(f"{e.name} is looked for as {' or '.join(e.local)}" for e in missing)
        rest = [e.name for e in experiments if e not in missing]
        skip = f", or leave them out (--only {' '.join(rest)})" if rest else ""
        if self.root is None:
            raise InputError(f"--data-root is needed for {wanted}: give a folder that holds them{skip}")
        raise InputError(f"--data-root {self.root} lacks some data: {wanted}; put them there{skip}")

    def load(self, experiment: Experiment) -> Dataset | None:
        """Return an experiment's data; None where it names none."""
        if self._kept is None or self._kept[0] != experiment:
            where = self._where(experiment)
            if where is None or not where:
                return None
            self._kept = (experiment, load(where, **experiment.options))
        return self._kept[1]

    def _where(self, experiment: Experiment) -> str | None:
        """Return what to load, "" where nothing is to be loaded, None where it is missing."""
        if not experiment.local:
            return experiment.data
        if self.root is None:
            return experiment.data or None
        return next((str(self.root / name) for name in experiment.local if (self.root / name).exists()), None)
