"""From measured constants to lr, γ, δ: every rule as a pure function, with its source.

Letters: L the smoothness measured along steps, g the gradient norm of a batch, beta the momentum, η = lr the step size.
Each suggestion is an estimate: smoothness seen along steps is a lower bound of the curvature, and proves nothing.

=================  ==============================================  ====================================================
rule               what it gives                                   source
=================  ==============================================  ====================================================
edge of stability  mean lr over the schedule = 1.5 (1 - beta) / L  gradient descent on a quadratic is stable up to 2/L
longest step       lr γ = 3 (1 - beta) g / L                       surefoot's own (docs/threshold.md), a heuristic
Prop. 7            lr = 1/(2 L0), γ = 2 L0/(3 L1)                  surefoot, Prop. 7
J. Zhang 2020      lr = 1/(10 L0), γ = min(10 L0, L0/L1)           arXiv 1905.11881, theorem 3
=================  ==============================================  ====================================================
"""

from __future__ import annotations

import math

EDGE = 1.5  # lr L; gradient descent is stable up to 2. Chosen by trial on ten small trainings: docs/threshold.md
REACH = 3.0  # the longest step, in units of g/L: twice a typical step at that lr. Chosen likewise
DELTA = 0.1  # the floor where nothing asks for another one
MEAN_OF_SCHEDULE = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}  # mean of lr over its peak


def edge_lr(L: float, *, schedule: str = "constant", momentum: float = 0.0) -> float:
    """Return the lr (its peak) at which the mean of lr over the schedule is 1.5 (1 - beta) / L.

    Example:
        >>> edge_lr(4.0), edge_lr(4.0, schedule="cosine"), round(edge_lr(4.0, momentum=0.9), 9)
        (0.375, 0.75, 0.0375)
    """
    return EDGE * (1 - momentum) / (MEAN_OF_SCHEDULE[schedule] * L)


def longest_step_gamma(L: float, g: float, lr: float, *, momentum: float = 0.0) -> float:
    """Return γ with lr γ = 3 (1 - beta) g / L: no step is longer than three steps of length g/L.

    Example:
        >>> longest_step_gamma(4.0, 1.0, 0.375)
        2.0
    """
    return REACH * (1 - momentum) * g / (L * lr)


def floor_delta(lr: float, L1: float, longest: float, *, momentum: float = 0.0) -> float:
    """Return δ: DELTA, or less where steps on the floor get too long: δ lr L1 g <= (1 - beta)/3 (surefoot, Prop. 8).

    Args:
        lr: η.
        L1: measured, 0 where nothing speaks for it.
        longest: the largest gradient norm that was seen.
        momentum: beta.

    Example:
        >>> floor_delta(0.5, 0.0, 10.0), round(floor_delta(0.5, 2.0, 10.0), 4)
        (0.1, 0.0333)
    """
    allowed = (1 - momentum) / (3 * lr * L1 * longest) if L1 > 0 else math.inf
    return min(DELTA, allowed)


def clipping_bias(delta: float, sigma: float) -> float:
    """Return (1 - δ)² σ² / (2 δ²): what clipping adds to the mean squared gradient norm for good (surefoot, Prop. 4).

    Args:
        delta: δ in (0, 1].
        sigma: standard deviation of a batch's gradient.

    Example:
        >>> clipping_bias(0.5, 2.0), clipping_bias(1.0, 2.0)
        (2.0, 0.0)
    """
    return ((1 - delta) * sigma / delta) ** 2 / 2


def proposition_7(L0: float, L1: float) -> tuple[float, float]:
    """Return lr = 1/(2 L0) and γ = 2 L0/(3 L1), infinite for L1 = 0.

    Example:
        >>> proposition_7(2.0, 4.0)
        (0.25, 0.3333333333333333)
    """
    return 1 / (2 * L0), 2 * L0 / (3 * L1) if L1 > 0 else math.inf


def zhang_2020(L0: float, L1: float) -> tuple[float, float]:
    """Return lr = 1/(10 L0) and γ = min(10 L0, L0/L1).

    Example:
        >>> zhang_2020(2.0, 4.0)
        (0.05, 0.5)
    """
    return 1 / (10 * L0), min(10 * L0, L0 / L1) if L1 > 0 else 10 * L0
