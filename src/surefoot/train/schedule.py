"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def lr_factor(schedule: str, step: int, steps: int, warmup: int = 0) -> float:
    """Return what lr is multiplied by at `step` (0, ..., steps - 1).

    ========  =====================================================================
    constant  1
    linear    1 - t
    cosine    (1 + cos(π t)) / 2
    step      1, then 0.1 from one half of the steps, then 0.01 from three quarters
    ========  =====================================================================

    with t = (step - warmup) / (steps - warmup) after `warmup` steps of linear rise, (step + 1) / (warmup + 1).

    Example:
        >>> [round(lr_factor("cosine", s, 4), 3) for s in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - t
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * t)) / 2
    if schedule == "step":
        return 1.0 if step < steps / 2 else 0.1 if step < 3 * steps / 4 else 0.01
    raise ValueError(f"schedule={schedule!r} is not constant, linear, cosine or step")
