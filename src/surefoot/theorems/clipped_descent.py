"""Clipped and normalised descent under (L0, L1)-smoothness: how many steps bring the gradient below epsilon.

Letters: f the loss, D >= f(x0) - inf f, and on the set where f <= f(x0)

    ||Hess f|| <= L0 + L1 ||grad f||.

Then no gradient there is longer than M = 3 L1 D + sqrt(2 L0 D). A clipped step is h = lr min{1, max{delta, c/||g||}},
c the threshold (max_norm, gamma); a normalised one h = lr/(||g|| + b). No step is longer than u; t = L1 u. With

    clipped:     u = lr min{M, max{c, delta M}},  kappa = 1 - (lr L0 + t) psi(t)
    normalised:  u = lr M/(M + b),                kappa = 1 - max{lr L0/b, lr L1} psi(t)
                                                  psi(t) = (e^t - 1 - t)/t^2

every step lowers f by kappa h ||g||^2, so some ||g_k|| <= epsilon after D/(kappa h(epsilon) epsilon^2) steps, if
kappa > 0. lr = 1/(2 L0), c lr = 1/(3 L1) is Prop. 7: kappa >= 0.53. c = infinity is plain gradient descent.

Where L0 and L1 were fitted to what a run did they are lower bounds of the true ones: then the verdict is UNDECIDED.

surefoot, Prop. 5 to 8 (ideas: Zhang, He, Sra and Jadbabaie, arXiv 1905.11881; the descent lemma as in Vankov et al.,
arXiv 2410.10800). In exact arithmetic, and for steps along the gradient of all of f.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.measure.smoothness_fit import POINTS, Observation, refutation
from surefoot.theorems.delta_gclip import uncovered
from surefoot.theorems.outward import above, below, sqrt_above
from surefoot.theorems.verdict import Finding, Outcome, Verdict, bounded, conclude

SOURCE = "surefoot, Prop. 5 to 8 (idea: arXiv 1905.11881)"
OBSERVED = "constants seen along a run are lower bounds of the true ones; give constants proved for this loss"

Form = Literal["clipped", "normalized"]


@dataclass(frozen=True)
class StepRule:
    """A step rule as an optimizer takes it, and whose it is.

    Attributes:
        name: for tables.
        lr: the optimizer's.
        threshold: c of "clipped" (gamma, max_norm; infinite: never clips), b of "normalized" (beta).
        form: "clipped" is GClip, "normalized" NormalizedGD.
        source: whose, and what is known of it.
    """

    name: str
    lr: float
    threshold: float
    form: Form
    source: str

    def multiplier(self, norm: float) -> float:
        """Return h at a gradient of this norm."""
        if self.form == "normalized":
            return self.lr / (norm + self.threshold)
        return self.lr if norm <= self.threshold else self.lr * self.threshold / norm


def default_rule(L0: float, L1: float) -> StepRule:
    """Return lr = 1/(2 L0), c = 2 L0/(3 L1): the longest steps of Prop. 7.

    Example:
        >>> rule = default_rule(4.0, 3.0)
        >>> rule.lr, round(rule.threshold, 6)
        (0.125, 0.888889)
    """
    _check_constants(L0, L1)
    lr = below(1 / (2 * Fraction(L0)))
    return StepRule("default", lr, _threshold(lr, L1, 3), "clipped", "surefoot, Prop. 7")


def conservative_rule(L0: float, L1: float) -> StepRule:
    """Return lr = 1/(10 L0), c = min{10 L0, L0/L1}: the published theorem's.

    Example:
        >>> conservative_rule(4.0, 2.0).threshold
        2.0
    """
    _check_constants(L0, L1)
    lr = below(1 / (10 * Fraction(L0)))
    c = below(min(10 * Fraction(L0), Fraction(L0) / Fraction(L1) if L1 else 10 * Fraction(L0)))
    return StepRule("conservative", lr, c, "clipped", "Zhang et al., arXiv 1905.11881, Theorem 3")


def ggnc_rule(L0: float, L1: float) -> StepRule:
    """Return lr = 1/(2 L0), c = L0/L1: the condition lr <= 1/(L0 + c L1) with equality.

    Example:
        >>> ggnc_rule(4.0, 2.0).threshold
        2.0
    """
    _check_constants(L0, L1)
    lr = below(1 / (2 * Fraction(L0)))
    return StepRule(
        "ggnc", lr, _threshold(lr, L1, 2), "clipped", "Pethick et al., arXiv 2506.01913, condition of Thm 4.3"
    )


def soft_rule(L0: float, L1: float) -> StepRule:
    """Return h = 1/(L0 + 1.5 L1 ||g||) as a normalised step: lr = 1/(1.5 L1), b = L0/(1.5 L1).

    Raises:
        InputError: L1 = 0, where the step is 1/L0 and has no such form.

    Example:
        >>> rule = soft_rule(4.0, 2.0)
        >>> round(rule.multiplier(2.0), 12)  # 1/(4 + 6)
        0.1
    """
    _check_constants(L0, L1)
    if L1 == 0:
        raise InputError("L1=0 leaves nothing to normalise; take plain steps with lr=1/L0")
    lr = below(1 / (Fraction(3, 2) * Fraction(L1)))
    b = above(Fraction(lr) * Fraction(L0))
    return StepRule("soft", lr, b, "normalized", "Vankov et al., arXiv 2410.10800")


def plain_rule(L0: float, L1: float, gradient: float) -> StepRule:
    """Return lr = 1/(2 (L0 + L1 M)), nothing clipped: what gradient descent needs where clipping is not used.

    Args:
        L0: > 0.
        L1: >= 0.
        gradient: M, no gradient where f <= f(x0) is longer: `gradient_bound`, or a smaller proved one.

    Example:
        >>> plain_rule(4.0, 3.0, gradient=100.0).lr == 1 / 608
        True
    """
    _check_constants(L0, L1)
    lr = below(1 / (2 * (Fraction(L0) + Fraction(L1) * Fraction(gradient))))
    return StepRule("plain", lr, math.inf, "clipped", "Zhang et al., arXiv 1905.11881 (the step of gradient descent)")


def step_rules(L0: float, L1: float, gap: float) -> tuple[StepRule, ...]:
    """Return all of them, the default first.

    Args:
        L0: > 0.
        L1: >= 0.
        gap: D, for the plain rule.
    """
    soft = (soft_rule(L0, L1),) if L1 else ()
    plain = plain_rule(L0, L1, gradient_bound(L0, L1, gap))
    return (default_rule(L0, L1), conservative_rule(L0, L1), ggnc_rule(L0, L1), *soft, plain)


def normalized_from_clipped(lr: float, c: float) -> tuple[float, float]:
    """Return (lr, b) of the normalised step with h_clipped/2 <= h <= h_clipped at every gradient: lr c and c.

    Example:
        >>> normalized_from_clipped(0.5, 2.0)
        (1.0, 2.0)
    """
    return lr * c, c


def gradient_bound(L0: float, L1: float, gap: float) -> float:
    """Return M = 3 L1 D + sqrt(2 L0 D), rounded up: no gradient where f <= inf f + D is longer.

    Example:
        >>> gradient_bound(2.0, 1.0, 4.0)
        16.0
    """
    if not math.isfinite(gap):
        return math.inf
    D = Fraction(gap)
    root = sqrt_above(2 * Fraction(L0) * D)
    return above(3 * Fraction(L1) * D + Fraction(root)) if math.isfinite(root) else math.inf


def psi(t: Fraction) -> Fraction:
    """Return an upper bound of (e^t - 1 - t)/t^2 = sum t^n/(n + 2)!, for 0 <= t <= 2; off by 1e-25 at most.

    Example:
        >>> psi(Fraction(0)) - Fraction(1, 2) < 1e-25, round(float(psi(Fraction(1))), 9)
        (True, 0.718281828)
    """
    if not 0 <= t <= 2:
        raise ValueError(f"t={float(t)!r} is outside [0, 2]")
    total, power, factorial = Fraction(0), Fraction(1), 2
    for n in range(30):
        total += power / factorial
        power *= t
        factorial *= n + 3
    return total + 2 * Fraction(2) ** 30 / factorial  # the rest: a geometric series of ratio 2/33 at most


@dataclass(frozen=True)
class ClippedDescentNumbers:
    """The conclusion's numbers, each rounded to the safe side.

    Attributes:
        kappa: a step lowers f by kappa h ||g||^2 at least (lower).
        gradient: M, no gradient on the way is longer (upper).
        longest: u, no step is longer (upper).
        steps: after so many a gradient of norm epsilon or less has been met (upper).
        steps_plain: the same for gradient descent with lr = 1/(2 (L0 + L1 M)), for comparison.
    """

    kappa: float
    gradient: float
    longest: float
    steps: float
    steps_plain: float


def clipped_descent(
    L0: float,
    L1: float,
    gap: float,
    *,
    lr: float,
    threshold: float,
    epsilon: float,
    delta: float = 0.0,
    form: Form = "clipped",
    gradient: float = math.inf,
) -> ClippedDescentNumbers | None:
    """Return the conclusion's numbers, or None if kappa <= 0: steps too long for these constants.

    Args:
        L0: an upper bound, >= 0.
        L1: an upper bound, >= 0.
        gap: D, an upper bound of f(x0) - inf f, >= 0.
        lr: > 0; the largest of a schedule would do for kappa, the count of steps is for a constant one.
        threshold: c of a clipped step, in (0, inf]; b > 0 of a normalised one.
        epsilon: > 0.
        delta: floor of a clipped step, in [0, 1].
        form: "clipped" or "normalized".
        gradient: another bound of ||grad f|| where f <= f(x0); the less counts.

    Example:
        >>> rule = default_rule(4.0, 3.0)  # for x^4 from x = 10
        >>> found = clipped_descent(4.0, 3.0, 1e4, lr=rule.lr, threshold=rule.threshold, epsilon=0.1)
        >>> found.kappa > 0.53, found.steps, round(found.steps_plain / found.steps)
        (True, 15012006.0, 51362)
    """
    if not (0 <= gap < math.inf and 0 <= L0 < math.inf and 0 <= L1 < math.inf):
        return None
    M = min(gradient_bound(L0, L1, gap), gradient)
    D, e = Fraction(gap), Fraction(epsilon)
    kappa, longest = _kappa(L0, L1, lr, threshold, delta, form, M)
    if not kappa > 0:
        return None
    h = Fraction(lr) * _share(e, threshold, delta) if form == "clipped" else Fraction(lr) / (e + Fraction(threshold))
    steps = math.ceil(D / (Fraction(kappa) * h * e**2))
    plain = plain_steps(L0, L1, gap, epsilon, M)
    return ClippedDescentNumbers(kappa, M, longest, _count(steps), plain)


def plain_steps(L0: float, L1: float, gap: float, epsilon: float, gradient: float) -> float:
    """Return the number of steps of gradient descent with lr = 1/(2 (L0 + L1 M)), by the same argument.

    Args:
        L0: an upper bound, >= 0.
        L1: an upper bound, >= 0.
        gap: D, an upper bound.
        epsilon: > 0.
        gradient: M.
    """
    total = Fraction(L0) + Fraction(L1) * Fraction(gradient)
    if total == 0:
        return 0.0  # a function without curvature that is bounded below is constant
    t = Fraction(L1) * Fraction(gradient) / (2 * total)
    kappa = 1 - psi(t) / 2
    return _count(math.ceil(Fraction(gap) * 2 * total / (kappa * Fraction(epsilon) ** 2)))


def check_clipped_descent(
    L0: Measurement,
    L1: Measurement,
    gap: Measurement,
    *,
    lr: float,
    threshold: float,
    epsilon: float,
    delta: float = 0.0,
    form: Form = "clipped",
    gradient: Measurement | None = None,
    observations: Sequence[Observation] = (),
    points: Sequence[float] = POINTS,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dropout: bool = False,
    minibatches: bool = False,
    refutations: Sequence[Finding] = (),
) -> Verdict:
    """Hold clipped (normalised) descent against constants, all of the loss that is trained.

    Args:
        L0: on the set where f <= f(x0), an upper bound. A fitted one is an estimate, and the verdict UNDECIDED.
        L1: likewise.
        gap: f(x0) - inf f, an upper bound; f(x0) itself where f >= 0.
        lr: the optimizer's, > 0.
        threshold: gamma (max_norm) of a clipped step, in (0, inf]; beta > 0 of a normalised one.
        epsilon: the gradient norm to reach, > 0.
        delta: floor of a clipped step, in [0, 1].
        form: "clipped" (GClip, DeltaGClip) or "normalized" (NormalizedGD).
        gradient: of ||grad f|| where f <= f(x0), an upper bound; may be better than M.
        observations: of a `SmoothnessProbe`: they may refute the constants.
        points: the probe's.
        momentum: the optimizer's.
        weight_decay: the optimizer's.
        dropout: whether the loss is random.
        minibatches: whether a step sees a part of the data; observations of parts refute nothing of the whole.
        refutations: what speaks against it already.

    Returns:
        Verdict: its `numbers` are those of `ClippedDescentNumbers`. Where it is UNDECIDED because the constants are
        not proved, the last finding says what they would give.

    Raises:
        InputError: an option out of its range.
    """
    _check_options(lr, threshold, epsilon, delta, form)
    given = [gradient] if gradient is not None else []
    findings = [
        *refutations,
        *uncovered(momentum=momentum, weight_decay=weight_decay, dropout=dropout, minibatches=minibatches),
        bounded(L0, "upper bound", remedy=OBSERVED),
        bounded(L1, "upper bound", remedy=OBSERVED),
        bounded(gap, "upper bound"),
        *(bounded(m, "upper bound", remedy="or leave gradient out") for m in given),
    ]
    a0, a1, D = float(L0), float(L1), float(gap)
    seen = refuted_by(observations, a0, a1, points=points, minibatches=minibatches) if observations else None
    if seen is not None:
        findings.append(seen)
    M = math.inf if gradient is None else float(gradient)
    found = clipped_descent(a0, a1, D, lr=lr, threshold=threshold, epsilon=epsilon, delta=delta, form=form, gradient=M)
    hypothesis = "steps are short enough: kappa > 0"
    numbers: dict[str, float] = {}
    conclusion = ""
    if found is None:
        findings.append(Finding(hypothesis, Outcome.UNDECIDED, *_too_long(a0, a1, D, lr, threshold, delta, form, M)))
    else:
        numbers = dict(vars(found))
        findings.append(
            Finding(
                hypothesis,
                Outcome.PROVED,
                f"kappa >= {found.kappa:.4g}, and a gradient of norm {epsilon:.4g} within {found.steps:.6g} steps "
                f"(plain gradient descent: {found.steps_plain:.6g})",
            )
        )
        conclusion = (
            f"within {found.steps:.6g} steps a gradient of norm {epsilon:.4g} or less is met; a step lowers the loss "
            f"by at least {found.kappa:.4g} h ||g||^2 (plain gradient descent: {found.steps_plain:.6g} steps)"
        )
    return conclude(
        f"{form} descent reaches a small gradient ((L0, L1)-smoothness)",
        tuple(findings),
        (L0, L1, gap, *given),
        conclusion=conclusion,
        numbers=numbers,
        source=SOURCE,
    )


def refuted_by(
    observations: Sequence[Observation],
    L0: float,
    L1: float,
    *,
    points: Sequence[float] = POINTS,
    minibatches: bool = False,
) -> Finding | None:
    """Return a finding if an observation contradicts the claimed constants (Prop. 6), None if none does.

    An observation speaks of the function of its batch. Where that is a part of the data it refutes nothing of the
    whole loss: the finding is UNDECIDED then.

    Args:
        observations: of a `SmoothnessProbe`.
        L0: claimed, >= 0.
        L1: claimed, >= 0.
        points: the probe's.
        minibatches: whether the batches were parts of the data.

    Raises:
        InputError: a claim that is negative or no finite number.

    Example:
        >>> seen = [Observation(1, 1.0, 1.0, 1e-3, 3.0, 0.0, 1e-16, "measured", (3.0,))]
        >>> refuted_by(seen, 2.0, 0.5, points=[1.0]).outcome
        <Outcome.REFUTED: 'refuted'>
        >>> refuted_by(seen, 2.0, 1.0, points=[1.0]) is None
        True
    """
    found = refutation(observations, L0, L1, points=points)
    if not found:
        return None
    return Finding(
        "no observation contradicts L0 and L1",
        Outcome.UNDECIDED if minibatches else Outcome.REFUTED,
        str(found),
        "give larger constants" + (", or observe the whole loss" if minibatches else ""),
    )


def floor_warning(L1: float, *, lr: float, delta: float, norm: float) -> Finding | None:
    """Return a finding if a floor step was, or would be, longer than 1/(3 L1) (Prop. 8), None if it is not.

    Prop. 7 is for steps of that length at most; a clipped step keeps to it, one on the floor grows with the gradient.
    L1 may be fitted here: a warning needs no proof.

    Args:
        L1: >= 0.
        lr: the optimizer's.
        delta: the optimizer's.
        norm: the longest gradient, such as telemetry's norm_max.

    Example:
        >>> floor_warning(2.0, lr=0.1, delta=0.01, norm=100.0) is None
        True
        >>> print(floor_warning(2.0, lr=0.1, delta=0.5, norm=100.0).remedy)
        delta of at most 0.01667
    """
    length = lr * delta * norm
    if 3 * L1 * length <= 1:
        return None
    return Finding(
        "floor steps are no longer than 1/(3 L1)",
        Outcome.UNDECIDED,
        f"lr delta ||g|| = {length:.4g} at ||g|| = {norm:.4g}, and 1/(3 L1) = {1 / (3 * L1):.4g}",
        f"delta of at most {1 / (3 * L1 * lr * norm):.4g}",
    )


# ----------------------------------------------------------------------------------------------------------------------


def _kappa(
    L0: float, L1: float, lr: float, threshold: float, delta: float, form: Form, M: float
) -> tuple[float, float]:
    """Return kappa, rounded down, and the length of the longest step, rounded up; kappa = -inf where t > 2."""
    step = Fraction(lr)
    if form == "normalized":
        ratio = 1 if math.isinf(M) else Fraction(M) / (Fraction(M) + Fraction(threshold))
        longest = step * ratio
        weight = max(step * Fraction(L0) / Fraction(threshold), step * Fraction(L1))
    else:
        # at a gradient as long as M: lr M min{1, max{delta, c/M}} = lr min{M, max{c, delta M}}
        if math.isinf(M) and (delta or math.isinf(threshold)):
            return -math.inf, math.inf
        exact = Fraction(threshold) if math.isfinite(threshold) else Fraction(M)
        if math.isfinite(M):
            exact = min(Fraction(M), max(exact, Fraction(delta) * Fraction(M)))
        longest = step * exact
        weight = step * Fraction(L0) + Fraction(L1) * longest
    t = Fraction(L1) * longest
    return (below(1 - weight * psi(t)) if t <= 2 else -math.inf), above(longest)


def _share(norm: Fraction, threshold: float, delta: float) -> Fraction:
    """Return min{1, max{delta, c/||g||}}."""
    return Fraction(1) if norm <= threshold else max(Fraction(delta), Fraction(threshold) / norm)


def _threshold(lr: float, L1: float, times: int) -> float:
    """Return the largest c with lr c <= 1/(times L1)."""
    return below(1 / (times * Fraction(L1) * Fraction(lr))) if L1 else math.inf


def _count(steps: int) -> float:
    return above(Fraction(steps))


def _too_long(
    L0: float, L1: float, gap: float, lr: float, threshold: float, delta: float, form: Form, M: float
) -> tuple[str, str]:
    """Say what is too long and what would do."""
    if not all(0 <= x < math.inf for x in (L0, L1, gap)):
        return f"L0 = {L0:.4g}, L1 = {L1:.4g}, D = {gap:.4g}", "finite bounds of at least 0"
    M = min(M, gradient_bound(L0, L1, gap))
    kappa, longest = _kappa(L0, L1, lr, threshold, delta, form, M)
    reason = f"a step may be {longest:.4g} long and kappa {kappa:.4g}"
    if delta and form == "clipped" and _kappa(L0, L1, lr, threshold, 0.0, form, M)[0] > 0:
        return reason, f"the floor is too high: delta of at most {1 / (3 * L1 * lr * M):.4g} (Prop. 8)"
    if L0 == 0:
        return reason, f"lr times threshold of at most 1/(3 L1) = {1 / (3 * L1):.4g}"
    rule = default_rule(L0, L1)
    return reason, f"lr = {rule.lr:.4g} with threshold = {rule.threshold:.4g} clipped (Prop. 7)"


def _check_constants(L0: float, L1: float) -> None:
    if not 0 < L0 < math.inf:
        raise InputError(f"L0={L0!r} must be a finite number above 0; a larger one than the true is safe")
    if not 0 <= L1 < math.inf:
        raise InputError(f"L1={L1!r} must be a finite number of at least 0")


def _check_options(lr: float, threshold: float, epsilon: float, delta: float, form: str) -> None:
    if form not in ("clipped", "normalized"):
        raise InputError(f"form={form!r} is unknown; choose 'clipped' or 'normalized'")
    if not 0 < lr < math.inf:
        raise InputError(f"lr={lr!r} must be a finite number above 0")
    if not threshold > 0 or (form == "normalized" and math.isinf(threshold)):
        raise InputError(f"threshold={threshold!r} must be above 0" + (" and finite" if form == "normalized" else ""))
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon={epsilon!r} must be a finite number above 0")
    if not 0 <= delta <= 1:
        raise InputError(f"delta={delta!r} must lie in [0, 1]; 0 is plain clipping, 1 none")
    if form == "normalized" and delta:
        raise InputError(f"delta={delta!r} has no meaning for form='normalized'; leave it out")
