"""Smoothness along the steps of training: those of the run if it was probed, else a few more, taken on a copy."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import FEWEST, SmoothnessFit, fit_smoothness
from surefoot.train.batches import batch_rows
from surefoot.train.checkpoint import load_checkpoint
from surefoot.train.objective import Objective
from surefoot.train.optimizers import Stepper
from surefoot.train.probing import observations
from surefoot.train.record import SMOOTHNESS_COLUMNS, Table
from surefoot.train.subject import Subject


def recorded_fit(subject: Subject) -> SmoothnessFit | None:
    """Return the fit to what --probe-smoothness has seen along the run; None where it has seen too little."""
    path = None if subject.folder is None else subject.folder / "smoothness.parquet"
    if path is None or not path.is_file():
        return None
    table = Table(SMOOTHNESS_COLUMNS)
    table.load(path, through=subject.step)
    found = observations(table)
    if sum(o.outcome == "measured" for o in found) < FEWEST:
        return None
    config = subject.job.config
    dtype = "bfloat16" if config.autocast == "bf16" else config.dtype
    return fit_smoothness(found, seed=config.seed, dtype=dtype, cost="recorded in training")


def continued_fit(subject: Subject, n: int) -> SmoothnessFit:
    """Take n more steps as training did, on a copy in eval mode, and return the fit to what a probe of each has seen.

    Raises:
        InputError: fewer than ten of them could be measured.
    """
    job, config = subject.job, subject.job.config
    with _random_numbers_kept():
        model = copy.deepcopy(job.model)
        stepper = Stepper(config, [p for p in model.parameters() if p.requires_grad])
        if subject.checkpoints:
            load_checkpoint(subject.checkpoints[-1], model, stepper.optimizer)
        steps = subject.steps_taken()
        lr = config.lr
        if steps is not None:  # a schedule may have ended at 0
            lr = next((x for x in reversed(steps.columns["lr"]) if x > 0), lr)
        assert lr is not None
        probe = SmoothnessProbe(model)
        for step in range(subject.step, subject.step + n):
            picked = batch_rows(step, subject.rows, job.batch_size, config.seed)
            x, y = (z if picked is None else z[picked] for z in (job.data.train_x, job.data.train_y))
            closure = partial(_batch_loss, job.objective, model, x.to(job.device), y.to(job.device))
            stepper.optimizer.zero_grad(set_to_none=True)
            closure().backward()
            with probe.around(closure):
                stepper.step(lr)
        return probe.fit(seed=config.seed)


def _batch_loss(objective: Objective, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return objective.value(model(x), x, y)


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Give torch's, NumPy's and Python's random numbers back as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
