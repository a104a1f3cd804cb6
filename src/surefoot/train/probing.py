"""`--probe-smoothness`: a probe around the steps of a run, its rows in smoothness.parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import Observation
from surefoot.train.distributed import shares
from surefoot.train.job import Job
from surefoot.train.record import SMOOTHNESS_COLUMNS, Table


class Probing:
    """A run's smoothness probe.

    Args:
        job: its `probe_smoothness` says how often; each rank goes through its share of the batch, in the same pieces as
            training does.
    """

    def __init__(self, job: Job) -> None:
        assert job.config.probe_smoothness is not None
        self.job, self.table = job, Table(SMOOTHNESS_COLUMNS)
        self.probe = SmoothnessProbe(
            job.model,
            every=job.config.probe_smoothness,
            eps=torch.finfo(torch.bfloat16).eps if job.config.autocast == "bf16" else None,
            all_reduce=_all_reduce() if job.team.size > 1 else None,
        )

    @contextmanager
    def around(self, step: int, x: Tensor, y: Tensor) -> Iterator[None]:
        """Be the context in which step number `step` is taken, on the batch (x, y)."""
        job = self.job

        def pieces() -> Iterator[tuple[Tensor, int]]:
            for start, end in shares(len(x), job.team, job.config.micro_batch):
                if end > start:
                    xs, ys = x[start:end].to(job.device), y[start:end].to(job.device)
                    with job.precision():
                        loss = job.objective.value(job.model(xs), xs, ys)
                    yield loss, end - start

        with self.probe.around(pieces, step=step):
            yield
        for seen in self.probe.observations:
            self.table.append({**asdict(seen), "ratios": list(seen.ratios)})
        self.probe.observations.clear()


def observations(table: Table) -> list[Observation]:
    """Return the rows of smoothness.parquet as the probe saw them."""
    rows = zip(*(table.columns[name] for name in SMOOTHNESS_COLUMNS))
    found = (dict(zip(SMOOTHNESS_COLUMNS, row)) for row in rows)
    return [Observation(**{**row, "ratios": tuple(row["ratios"])}) for row in found]


def _all_reduce() -> Callable[[Tensor], object]:
    import torch.distributed as dist

    return dist.all_reduce
