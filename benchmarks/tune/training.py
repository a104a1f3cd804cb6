"""One run of a workload with one optimizer at one setting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from workloads import Task, Workload

from surefoot.optim import DeltaGClip, GClip, Percentile, ZScore, clip_grad_

DELTA = 0.1
THRESHOLDS: dict[str, Callable[[], Any]] = {"autoclip": lambda: Percentile(10), "zclip": ZScore}

Cell = dict[str, Any]
Step = Callable[[], None]


def train(workload: Workload, cell: Cell, seed: int) -> dict[str, Any]:
    """Train for the workload's steps and return what a line of the results says of it.

    A run has diverged if a loss is not finite (it ends there), or if the training loss ends above ten times the first;
    it counts as having learned nothing.
    """
    task = workload.make(seed)
    begin = time.perf_counter()
    step, told = stepper(task, cell)
    first = run(task, workload.steps, step)
    found = task.evaluate() if math.isfinite(first) else {"train_loss": math.nan, "metric": math.nan}
    good = all(map(math.isfinite, found.values())) and found["train_loss"] <= 10 * first
    return {
        "train_loss": found["train_loss"] if good else None,
        "metric": found["metric"] if good else None,
        "diverged": not good,
        **told(),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def run(task: Task, steps: int, step: Step) -> float:
    """Take the steps; return the first loss, NaN if some loss was not finite."""
    taken, first = 0, math.nan
    while True:
        for batch in task.loader:
            task.model.zero_grad(set_to_none=True)
            loss = task.loss_fn(task.model, batch)
            if not math.isfinite(loss.item()):
                return math.nan
            first = loss.item() if taken == 0 else first
            loss.backward()
            step()
            taken += 1
            if taken == steps:
                return first


def stepper(task: Task, cell: Cell) -> tuple[Step, Callable[[], dict[str, float]]]:
    """Return what takes a step, and what tells how often it clipped.

    Args:
        task: its model's parameters are stepped.
        cell: `optimizer` ("delta-gclip", "sgd" or "adamw"), `lr`; `gamma`, a number or a name in THRESHOLDS, absent
            for no clipping; `delta`, `momentum` for delta-gclip.
    """
    params = list(task.model.parameters())
    gamma: Any = cell.get("gamma", math.inf)
    gamma = THRESHOLDS[gamma]() if isinstance(gamma, str) else gamma
    if cell["optimizer"] != "adamw":
        momentum = cell.get("momentum", 0.0)
        if cell["optimizer"] == "delta-gclip":
            ours: Any = DeltaGClip(params, cell["lr"], gamma=gamma, delta=cell["delta"], momentum=momentum)
        else:
            ours = GClip(params, cell["lr"], gamma=gamma, momentum=momentum)  # δ = 0: SGD, and clip_grad_norm_ before

        def told() -> dict[str, float]:
            t = ours.telemetry()
            return {"clip_fraction": t["clip_fraction"], "floor_fraction": t["floor_fraction"], "norm": t["norm_mean"]}

        return ours.step, told

    adamw = torch.optim.AdamW(params, cell["lr"])
    norms: list[float] = []
    clipped: list[bool] = []

    def step() -> None:
        norms.append(float(clip_grad_(params, gamma=gamma, nonfinite="propagate")))
        clipped.append(norms[-1] > (gamma if isinstance(gamma, float) else gamma.gamma))
        adamw.step()

    def told_adamw() -> dict[str, float]:
        count = max(1, len(norms))
        return {"clip_fraction": sum(clipped) / count, "floor_fraction": 0.0, "norm": sum(norms) / count}

    return step, told_adamw
