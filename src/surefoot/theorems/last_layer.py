"""The last layer: if the features have rank N, convex training of the head alone reaches the whole network's infimum.

Letters: N samples, C outputs, H (N, m) the last hidden features, frozen, Phi = [H, 1], W (m + 1, C) the head,
Z0 = Phi W0 its outputs at the beginning; f(W) = (1/N) sum_i l((Phi W)_i, y_i), l convex with an L_l-Lipschitz gradient;
s_1 and s_N the largest and the N-th singular value of Phi; h_t steps on f, 0 < h_t <= 1/L_H, S = sum h_t.

    s_N > 0   =>   Phi W takes any value, so inf_W f = (1/N) sum inf_q l(q, y_i): the infimum for the whole network
    L_H = (L_l/N) s_1^2                                                       Lipschitz constant of grad f
    f(W_T) - f(W) <= ||W_0 - W||_F^2/(2 S)    for every W, steps chosen in any way                          (Prop. 13)
    ||r_T|| <= ||r_0|| prod (1 - h_t L_l s_N^2/N)                               squared loss                (Prop. 14)
    f(W_T) <= log(1 + (C-1) e^-k) + ||P (k Y - Z0)||_F^2/(2 s_N^2 S)            cross-entropy, any k > 0    (Prop. 15)

P takes off the mean over the outputs: the cross-entropy does not see it. One multiplier a step for all of the head:
delta-GClip with the global norm is covered (h_t >= lr delta), norms a tensor are not.

Source: K. Kawaguchi and Q. Sun, arXiv 2104.05785 (the idea); surefoot, Prop. 12 to 15.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from surefoot.errors import InputError
from surefoot.measure.features import FeatureRank
from surefoot.measure.measurement import Measurement
from surefoot.theorems.outward import above, below
from surefoot.theorems.verdict import Finding, Outcome, Verdict, bounded, conclude

THEOREM = "training the last layer reaches the infimum of the whole network's loss"
SOURCE = "surefoot, Prop. 12 to 15 (idea: Kawaguchi and Sun, arXiv 2104.05785)"
SAFE = 1 + 1e-12  # on a few operations with logarithms, far above their rounding


@dataclass(frozen=True)
class Loss:
    """A loss whose infimum over all functions is 0 where every sample has one target of its own.

    Attributes:
        torch: what computes f.
        smoothness: C -> L_l, in f = (1/N) sum l.
    """

    torch: str
    smoothness: Callable[[int], Fraction]


LOSSES = {
    "mse": Loss("torch.nn.MSELoss()", lambda C: Fraction(2, C)),
    "half-squared": Loss("(F - y).square().sum() / (2 * N)", lambda C: Fraction(1)),
    "cross-entropy": Loss("torch.nn.CrossEntropyLoss(), one class a sample", lambda C: Fraction(1, 2)),
    "bce": Loss("torch.nn.BCEWithLogitsLoss(), targets 0 and 1", lambda C: Fraction(1, 4 * C)),
}


def head_smoothness(s_max: float, samples: int, loss_smoothness: float | Fraction) -> float:
    """Return L_H = L_l s_1^2/N, rounded up.

    Example:
        >>> head_smoothness(4.0, 8, 0.5)
        1.0
    """
    return above(Fraction(loss_smoothness) * Fraction(s_max) ** 2 / samples)


def convex_gap(distance: float, total_step: float) -> float:
    """Return ||W_0 - W||^2/(2 sum h_t), rounded up: f(W_T) - f(W) is at most that (Prop. 13).

    Args:
        distance: of W_0 from the W that is compared with, an upper bound.
        total_step: sum h_t, each h_t in (0, 1/L_H], a lower bound; at 0 the bound is infinite.

    Example:
        >>> convex_gap(4.0, 100.0)
        0.08
    """
    return above(Fraction(distance) ** 2 / (2 * Fraction(total_step))) if total_step > 0 else math.inf


def squared_factor(s_min: float, samples: int, loss_smoothness: float | Fraction, step: float) -> float:
    """Return 1 - h L_l s_N^2/N, rounded up: the factor on ||r|| of one step h <= 1/L_H, squared loss (Prop. 14).

    Example:
        >>> squared_factor(2.0, 8, 1, 1.0)
        0.5
    """
    return max(0.0, above(1 - Fraction(step) * Fraction(loss_smoothness) * Fraction(s_min) ** 2 / samples))


def cross_entropy_bound(
    samples: int, classes: int, s_min: float, total_step: float, *, size: float = 0.0, fit: float | None = None
) -> tuple[float, float]:
    """Return the bound of the mean cross-entropy after the steps, and the k it is taken at (Prop. 15).

    min over k > 0 of log(1 + (C-1) e^-k) + ||P (k Y - Z0)||_F^2/(2 s_N^2 S): a bound at any k, so a search will do.

    Args:
        samples: N.
        classes: C >= 2.
        s_min: s_N, a lower bound.
        total_step: S = sum h_t, a lower bound.
        size: ||P Z0||_F, an upper bound; 0 where the head begins at 0.
        fit: <P Y, Z0>, a lower bound: the sum of the right class's centred outputs; None: -size ||P Y||_F.

    Example:
        >>> bound, k = cross_entropy_bound(100, 10, s_min=2.0, total_step=1e4)
        >>> round(bound, 4), round(k, 1)
        (0.0609, 6.4)
    """
    square = samples * (1 - 1 / classes)
    return _logistic(lambda k: _softplus_sum(k, classes - 1), square, s_min, total_step, size, fit)


def bce_bound(
    samples: int, outputs: int, s_min: float, total_step: float, *, size: float = 0.0, fit: float | None = None
) -> tuple[float, float]:
    """Return the same for the mean of N C binary cross-entropies: log(1 + e^-k) + ||k (2 Y - 1) - Z0||_F^2/(2 s_N^2 S).

    Args:
        samples: N.
        outputs: C.
        s_min: s_N, a lower bound.
        total_step: S, a lower bound.
        size: ||Z0||_F, an upper bound.
        fit: <2 Y - 1, Z0>, a lower bound; None: -size sqrt(N C).
    """
    return _logistic(lambda k: _softplus_sum(k, 1), float(samples * outputs), s_min, total_step, size, fit)


def sgd_gap(distance: float, gradient: float, total_step: float, total_square: float) -> float:
    """Return (R^2 + G^2 sum h_t^2)/(2 sum h_t), rounded up: E f(best) - inf f under SGD (standard).

    Args:
        distance: R = ||W_0 - W*||, an upper bound.
        gradient: G^2 bounds the mean square of every stochastic gradient.
        total_step: sum h_t.
        total_square: sum h_t^2.
    """
    R, G, S, S2 = (Fraction(x) for x in (distance, gradient, total_step, total_square))
    return above((R**2 + G**2 * S2) / (2 * S))


def check_last_layer(
    rank: FeatureRank,
    *,
    loss: str = "mse",
    outputs: int = 1,
    lr: float | None = None,
    shortest: float | None = None,
    steps: int | None = None,
    start: Measurement | None = None,
    fit: Measurement | None = None,
    target: float | None = None,
    smoothness: float | None = None,
    infimum: float | None = None,
    refutations: Sequence[Finding] = (),
) -> Verdict:
    """Hold the last-layer theorem against the features at the weights now, which stay as they are.

    Args:
        rank: `surefoot.measure.feature_rank` of the features, worked out in eval mode, without dropout; every augmented
            copy of a sample is one.
        loss: "mse", "half-squared", "cross-entropy", "bce" (`LOSSES` says which function of torch) or "convex".
        outputs: C >= 1.
        lr: the longest step on f; None: eta_max.
        shortest: the shortest step; None: lr. lr delta for delta-GClip.
        steps: T >= 1, to say the loss after them.
        start: of the squared losses ||r_0||_F; of the cross-entropy ||P Z0||_F and of "bce" ||Z0||_F, for which None
            means a head that is 0; of "convex" ||W_0 - W*||_F. An upper bound.
        fit: of the cross-entropies <P Y, Z0>, <2 Y - 1, Z0>, a lower bound: sharper for a head that is not 0.
        target: a loss > the infimum to say the number of steps for.
        smoothness: L_l of a "convex" l.
        infimum: of a "convex" f over all outputs.
        refutations: what is known already: `surefoot.theorems.delta_gclip.uncovered(momentum=...)`.

    Returns:
        Verdict: its `numbers` are infimum, eta_max (1/L_H), s_min and s_max; with steps also loss_after; with a target
        steps.

    Raises:
        InputError: an option out of its range.

    Example:
        >>> import torch
        >>> from surefoot.measure import feature_rank
        >>> rank = feature_rank(torch.eye(4, dtype=torch.float64))
        >>> v = check_last_layer(rank, loss="cross-entropy", outputs=3, steps=10_000)
        >>> v.outcome.value, v.numbers["infimum"], v.numbers["loss_after"] < 0.01
        ('proved', 0.0, True)
    """
    _check_options(loss, outputs, steps, lr, target, smoothness, infimum)
    L_l = Fraction(smoothness) if smoothness is not None else LOSSES[loss].smoothness(outputs)
    least = 0.0 if infimum is None else infimum
    N, s_N, s_1 = rank.samples, rank.s_min.value, rank.s_max.value
    findings = [*refutations, _rank(rank), bounded(rank.s_max, "upper bound")]
    # infinite only where a feature is: that is refused before
    L_H = head_smoothness(s_1, N, L_l)
    eta_max = below(1 / Fraction(L_H)) if L_H > 0 else math.inf
    longest = eta_max if lr is None else lr
    shortest_ = longest if shortest is None else shortest
    if not 0 < shortest_ <= longest:
        raise InputError(f"shortest={shortest!r} must be above 0 and at most lr={longest!r}")
    fits = longest <= eta_max
    findings.append(
        Finding(
            "steps are at most 1/L_H",
            Outcome.PROVED if fits else Outcome.UNDECIDED,
            f"lr = {longest:.4g}, 1/L_H >= {eta_max:.4g}",
            "" if fits else f"lr of at most {eta_max:.4g}",
        )
    )
    if target is not None and not target > least:
        raise InputError(f"target={target!r} is never reached: the infimum is {least!r}; give a larger loss")
    numbers = {"infimum": least, "eta_max": eta_max, "s_min": s_N, "s_max": s_1}
    conclusion = f"the infimum over the last layer is {least:.4g}, that of the whole network"
    measurements = [rank.s_min, rank.s_max]
    if (steps is not None or target is not None) and s_N > 0 and fits:
        begin = _begin(start, loss)
        findings.append(bounded(begin, "upper bound"))
        measurements.append(begin)
        if fit is not None:
            findings.append(bounded(fit, "lower bound", remedy="or leave fit out"))
            measurements.append(fit)
        after = _after(loss, N, outputs, L_l, s_N, least, float(begin), None if fit is None else float(fit))
        if steps is not None:
            numbers["loss_after"] = after(below(steps * Fraction(shortest_)), shortest_, steps)
            conclusion += f"; after {steps:,} steps f <= {numbers['loss_after']:.4g}"
        if target is not None:
            numbers["steps"] = _least_steps(
                lambda T: after(below(T * Fraction(shortest_)), shortest_, T) <= target,
            )
            conclusion += f"; {numbers['steps']:.6g} steps bring f to {target:.4g}"
    return conclude(
        THEOREM, tuple(findings), tuple(measurements), conclusion=conclusion, numbers=numbers, source=SOURCE
    )


# ----------------------------------------------------------------------------------------------------------------------


def _check_options(
    loss: str,
    outputs: int,
    steps: int | None,
    lr: float | None,
    target: float | None,
    smoothness: float | None,
    infimum: float | None,
) -> None:
    if loss not in LOSSES and loss != "convex":
        raise InputError(f"loss={loss!r} is unknown; choose one of {(*LOSSES, 'convex')}")
    if (loss == "convex") != (smoothness is not None) or (loss == "convex") != (infimum is not None):
        raise InputError(
            f"loss={loss!r} with smoothness={smoothness!r}, infimum={infimum!r}: 'convex' needs both, others neither"
        )
    if smoothness is not None and not 0 < smoothness < math.inf:
        raise InputError(f"smoothness={smoothness!r} must be a finite number above 0")
    if outputs < 1 or (loss == "cross-entropy" and outputs < 2):
        raise InputError(f"outputs={outputs!r} with loss={loss!r}: give the number of outputs, 2 and up for classes")
    if steps is not None and not steps >= 1:
        raise InputError(f"steps={steps!r} must be at least 1")
    if lr is not None and not 0 < lr < math.inf:
        raise InputError(f"lr={lr!r} must be a finite number above 0")
    if target is not None and not math.isfinite(target):
        raise InputError(f"target={target!r} must be a finite number")


def _rank(rank: FeatureRank) -> Finding:
    outcome = {"PROVED": Outcome.PROVED, "REFUTED": Outcome.REFUTED}.get(rank.status, Outcome.UNDECIDED)
    hypothesis = "rank [H, 1] = N at these weights"
    if outcome is Outcome.PROVED:
        return Finding(hypothesis, outcome, str(rank.s_min))
    if rank.duplicates:
        remedy = f"samples {rank.duplicates[0]} have equal features: keep one of each group"
    elif rank.columns < rank.samples:
        remedy = f"a last hidden layer of {rank.samples - 1:,} units, or at most {rank.columns:,} samples"
    else:
        remedy = (
            f"leave near-duplicates out (samples {rank.suspects}?), or perturb the hidden weights and measure again"
        )
    return Finding(hypothesis, outcome, rank.s_min.how, remedy)


def _begin(start: Measurement | None, loss: str) -> Measurement:
    if start is not None:
        return start
    if loss not in ("cross-entropy", "bce"):
        what = "||W_0 - W*||_F" if loss == "convex" else "||r_0||_F = ||Phi W_0 - y||_F"
        raise InputError(f"start=None: to say the loss after some steps of loss={loss!r} give {what}")
    return Measurement("||Z0||_F", 0.0, "exact", "verified", "a head that begins at 0")


def _after(
    loss: str, N: int, C: int, L_l: Fraction, s_N: float, least: float, begin: float, fit: float | None
) -> Callable[[float, float, float], float]:
    """Return (sum of steps, shortest step, T) -> an upper bound of f after T steps."""
    if loss == "cross-entropy":
        return lambda total, _h, _T: cross_entropy_bound(N, C, s_N, total, size=begin, fit=fit)[0]
    if loss == "bce":
        return lambda total, _h, _T: bce_bound(N, C, s_N, total, size=begin, fit=fit)[0]
    if loss == "convex":
        return lambda total, _h, _T: above(Fraction(least) + Fraction(convex_gap(begin, total)))
    first = L_l * Fraction(begin) ** 2 / (2 * N)

    def squared(total: float, h: float, T: float) -> float:
        drop = below(Fraction(h) * L_l * Fraction(s_N) ** 2 / N)
        if drop >= 1:
            return 0.0
        return max(above(first) * math.exp(2 * T * math.log1p(-drop)) * (1 + 1e-11), 5e-324) if first else 0.0

    return squared


def _least_steps(enough: Callable[[int], bool]) -> float:
    """Return a number of steps that is enough, within 1 % of the least one; infinite beyond 1e18."""
    T = 1
    while not enough(T):
        T *= 2
        if T > 10**18:
            return math.inf
    low = T // 2
    while T - low > max(1, T // 100):
        middle = (low + T) // 2
        low, T = (low, middle) if enough(middle) else (middle, T)
    return float(T)


def _softplus_sum(k: float, others: int) -> float:
    return math.log1p(others * math.exp(-k))


def _logistic(
    level: Callable[[float], float], square: float, s_min: float, total_step: float, size: float, fit: float | None
) -> tuple[float, float]:
    """Return min over k of level(k) + (k^2 square - 2 k fit + size^2)/(2 s_N^2 S) and that k."""
    if not (s_min > 0 and total_step > 0):
        return math.inf, math.nan
    scale = 2 * s_min * s_min * total_step

    def bound(k: float) -> float:
        if fit is None:
            far = k * math.sqrt(square) + size
            return (level(k) + far * far / scale) * SAFE
        # rounding of a difference is relative to its parts
        parts = k * k * square + size * size
        cross = 2 * k * fit
        return (level(k) + max(0.0, parts - cross + 1e-12 * (parts + abs(cross))) / scale) * SAFE

    low, high = 0.0, 700.0
    for _ in range(200):
        # level and square are convex in k, so is their sum
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if bound(a) <= bound(b) else (a, high)
    k = (low + high) / 2
    return bound(k), k
