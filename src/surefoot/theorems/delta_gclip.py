"""The δ-GClip theorem: linear convergence near a minimum under the PL* inequality, whatever is clipped.

Letters: E >= 0 the loss, w0 the weights now, B the closed ball of radius R around them; on B the gradient of E is
beta-Lipschitz and 1/2 ||grad E||^2 >= mu E (PL*, "half convention"). A step is w+ = w - D grad E, where D holds
h = lr min{1, max{delta, gamma/||g||}} once for all weights or block by block; eps = beta lr/2 < 1.

    G0 = sqrt(2 beta E0),  k = delta_eff = max{delta, min{1, gamma/G0}},  c = 1, block by block c = 2 sqrt(k)/(1 + k)
    sqrt(2 E0/mu)/((1 - eps) c) <= R   =>   the path is no longer than that, w_t -> w* with E(w*) = 0, and
    E_T <= E0 (1 - 2 (1 - eps) mu lr k)^T   and   E_T <= E0 (1 - 2 (1 - eps) mu lr)^(T - M),  M = radius/(lr gamma).

With the global norm the radius knows neither delta nor gamma. With noise of variance sigma^2, E beta-smooth everywhere
and lr <= delta/(2 beta), a bound remains, whose clipping bias does not vanish with lr.

surefoot, Prop. 1 to 4 (idea: Tucat, Mukherjee, Sen, Sun and Rivasplata, arXiv 2404.08624). In exact arithmetic: the
rounding of the training itself is not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.theorems import refutations as cheap
from surefoot.theorems.outward import above, below, sqrt_above, sqrt_below, steps_until
from surefoot.theorems.verdict import Finding, Outcome, Verdict, bounded, conclude

SOURCE = "surefoot, Prop. 1 to 3 (idea: arXiv 2404.08624)"
SOURCE_STOCHASTIC = "surefoot, Prop. 4 (idea: arXiv 2404.08624, Definition 5)"

SCOPES = {
    "global": "one norm over all weights: D = h I",
    "group": "a norm a parameter group: D is block diagonal",
    "tensor": "a norm a tensor: D is block diagonal",
    "unit": "a norm an output unit: D is block diagonal",
    "coordinate": "a norm an entry: D is diagonal",
    "sample": "a norm a sample: the step is not D grad E",
}


@dataclass(frozen=True)
class DeltaGClipNumbers:
    """The conclusion's numbers, each rounded to the safe side.

    Attributes:
        loss: E0.
        epsilon: beta lr/2.
        gradient: G0, no gradient on the way is longer (upper).
        delta_eff: k: no multiplier on the way is below lr k (lower).
        cosine: c, of the angle between step and gradient (lower).
        drop: a step multiplies E by 1 - drop at most (lower).
        drop_plain: the same for a step in which nothing is clipped (lower).
        radius: the path is no longer, and a minimum with E = 0 no further (upper).
        clipped_steps: M, how many steps clip anything or stand on the floor; infinite for gamma = 0 (upper).
    """

    loss: float
    epsilon: float
    gradient: float
    delta_eff: float
    cosine: float
    drop: float
    drop_plain: float
    radius: float
    clipped_steps: float

    def loss_after(self, steps: int) -> float:
        """Return an upper bound of E after `steps` steps: the better of the two rates."""
        plain = max(0.0, steps - self.clipped_steps)
        log = min(
            steps * math.log1p(-min(self.drop, 1 - 2**-53)), plain * math.log1p(-min(self.drop_plain, 1 - 2**-53))
        )
        # where exp is not 0, log is 746 at most: some 1e-13 off
        return max(self.loss * math.exp(log) * (1 + 1e-11), 5e-324) if self.loss else 0.0

    def steps_to(self, target: float) -> float:
        """Return a number of steps after which E <= target."""
        uniform = steps_until(self.loss, target, self.drop)
        return min(uniform, self.clipped_steps + steps_until(self.loss, target, self.drop_plain))


def effective_delta(delta: float, gamma: float, gradient: float) -> float:
    """Return delta_eff = max{delta, min{1, gamma/G0}}, rounded down: the least multiplier while no gradient exceeds G0.

    So plain clipping (delta = 0) has a floor too, and delta does something for the rate only above gamma/G0.

    Example:
        >>> effective_delta(0.0, 1.0, 8.0), effective_delta(0.5, 1.0, 8.0)
        (0.125, 0.5)
    """
    if gradient <= gamma:
        return 1.0
    return max(delta, below(Fraction(gamma) / Fraction(gradient)) if math.isfinite(gradient) else 0.0)


def block_cosine(k: float) -> float:
    """Return c = 2 sqrt(k)/(1 + k), rounded down: the cosine between g and D g, eigenvalues of D in [k h, h] (Prop. 2).

    Example:
        >>> block_cosine(1.0), round(block_cosine(0.01), 3)
        (1.0, 0.198)
    """
    return sqrt_below(4 * Fraction(k) / (1 + Fraction(k)) ** 2)


def delta_gclip(
    loss: float,
    mu: float,
    beta: float,
    *,
    lr: float,
    gamma: float,
    delta: float,
    scope: str = "global",
    gradient_bound: float = math.inf,
) -> DeltaGClipNumbers | None:
    """Return the conclusion's numbers, or None where the theorem has none: mu <= 0, or lr >= 2/beta.

    Args:
        loss: E0, an upper bound, >= 0, of the loss that is trained, in its own units.
        mu: a lower bound, of the same loss.
        beta: an upper bound, > 0.
        lr: > 0; the largest, if a schedule is meant, and then `drop` goes with the least.
        gamma: threshold in [0, inf]; the least, if it varies.
        delta: floor in [0, 1].
        scope: "global", or of blocks: "group", "tensor", "unit", "coordinate".
        gradient_bound: another bound of ||grad E|| where E <= E0, such as ||J|| ||F - y||; the less counts.

    Example:
        >>> found = delta_gclip(2.0, mu=0.25, beta=4.0, lr=0.25, gamma=1.0, delta=0.0)
        >>> found.radius, found.delta_eff, found.drop  # R2 = sqrt(8 E0/mu), gamma/G0, lr k mu
        (8.0, 0.25, 0.015625)
        >>> found.clipped_steps
        32
    """
    if not (mu > 0 and math.isfinite(mu) and 0 < beta < math.inf and 0 <= loss < math.inf):
        return None
    E0, m, b, step = Fraction(loss), Fraction(mu), Fraction(beta), Fraction(lr)
    eps = b * step / 2
    if not eps < 1:
        return None
    gradient = min(sqrt_above(2 * b * E0), gradient_bound)
    k = effective_delta(delta, gamma, gradient)
    c = 1.0 if scope == "global" else block_cosine(k)
    shortest = sqrt_above(2 * E0 / m)
    if not (c > 0 and shortest < math.inf):
        return None
    radius = Fraction(shortest) / ((1 - eps) * Fraction(c))
    plain = 2 * (1 - eps) * m * step
    if gradient <= gamma:
        clipped = 0.0
    else:
        clipped = math.floor(radius / (step * Fraction(gamma))) if gamma > 0 else math.inf
    return DeltaGClipNumbers(
        loss,
        above(eps),
        gradient,
        k,
        c,
        min(below(plain * Fraction(k)), 1.0),
        min(below(plain), 1.0),
        above(radius),
        clipped,
    )


def largest_lr(loss: float, mu: float, beta: float, ball: float, cosine: float = 1.0) -> float:
    """Return the largest lr with sqrt(2 E0/mu)/((1 - beta lr/2) c) <= ball, rounded down; 0 where there is none.

    It stays below 2/beta. The rate of an unclipped step is best at 1/beta, where the radius is R2 = sqrt(8 E0/mu)/c.

    Args:
        loss: E0.
        mu: of PL*, > 0.
        beta: > 0.
        ball: R, the radius on which mu and beta hold; may be infinite.
        cosine: c, from `block_cosine` for a scope of blocks.

    Example:
        >>> largest_lr(2.0, 0.25, 4.0, ball=8.0), largest_lr(2.0, 0.25, 4.0, ball=3.0)
        (0.25, 0.0)
    """
    b = Fraction(beta)
    if math.isinf(ball):
        return math.nextafter(below(2 / b), 0.0)
    if not ball > 0:
        return 0.0
    shortest = Fraction(sqrt_above(2 * Fraction(loss) / Fraction(mu)))
    return max(0.0, below(2 / b * (1 - shortest / (Fraction(cosine) * Fraction(ball)))))


def radii(loss: float, mu: float, beta: float, delta: float, jacobian_norm: float = math.inf) -> dict[str, float]:
    """Return each radius that is known to hold a minimum and the path to it, for lr <= 1/beta and the global norm.

    R2 is never above the others; they are there to compare. Rounded up.

    Args:
        loss: E0.
        mu: of PL*, > 0.
        beta: > 0.
        delta: floor; 0 makes R1 and R1' infinite.
        jacobian_norm: L >= ||J|| where E = 1/2 ||F - y||^2, for R1'.

    Example:
        >>> {name: round(r, 3) for name, r in radii(2.0, 0.25, 4.0, delta=0.5, jacobian_norm=2.0).items()}
        {'R2': 8.0, 'R1': 64.0, "R1'": 64.0}
    """
    E0, m = Fraction(loss), Fraction(mu)
    found = {"R2": sqrt_above(8 * E0 / m), "R1": math.inf, "R1'": math.inf}
    if delta > 0:
        found["R1"] = above(2 * Fraction(sqrt_above(2 * Fraction(beta) * E0)) / (Fraction(delta) * m))
        if math.isfinite(jacobian_norm):
            rho = Fraction(sqrt_above(2 * E0))
            found["R1'"] = above(2 * Fraction(jacobian_norm) * rho / (Fraction(delta) * m))
    return found


def check_delta_gclip(
    loss: Measurement,
    mu: Measurement,
    beta: Measurement,
    *,
    lr: float,
    gamma: float,
    delta: float,
    ball: float = math.inf,
    scope: str = "global",
    gradient_bound: Measurement | None = None,
    target: float | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dropout: bool = False,
    minibatches: bool = False,
    refutations: Sequence[Finding] = (),
) -> Verdict:
    """Hold the δ-GClip theorem against measurements, all of the loss that is trained and in its units.

    Args:
        loss: E(w0), an upper bound.
        mu: of 1/2 ||grad E||^2 >= mu E on the ball, a lower bound; for E = 1/2 ||F - y||^2 any lower bound of
            lambda_min(K) there; for torch's MSELoss over n numbers 2/n times that.
        beta: Lipschitz constant of the gradient on the ball, an upper bound.
        lr: the optimizer's, > 0.
        gamma: the optimizer's, in [0, inf].
        delta: the optimizer's, in [0, 1]; 0 is plain clipping, which is covered too.
        ball: R, the radius around the weights on which mu and beta hold.
        scope: "global", "group", "tensor", "unit", "coordinate" or "sample".
        gradient_bound: of ||grad E|| where E <= E(w0) in the ball, an upper bound; may make delta_eff larger.
        target: a loss > 0 to say the number of steps for.
        momentum: the optimizer's.
        weight_decay: the optimizer's.
        dropout: whether the loss is random (dropout, augmentation, noise).
        minibatches: whether a step sees a part of the data.
        refutations: what speaks against it already, from `surefoot.theorems.refutations.first`.

    Returns:
        Verdict: its `numbers` are those of `DeltaGClipNumbers`, lr_max for this ball, and steps if a target is given;
        its `criteria` say whether clip and floor can act at all, and whether the paper's form of radius fits the ball.

    Raises:
        InputError: an option out of its range.
    """
    _check_rule(lr, gamma, delta, scope)
    if target is not None and not target > 0:
        raise InputError(f"target={target!r} is never reached exactly; give a loss above 0")
    measurements = (loss, mu, beta, *([gradient_bound] if gradient_bound is not None else []))
    findings = [
        *refutations,
        *uncovered(momentum=momentum, weight_decay=weight_decay, dropout=dropout, minibatches=minibatches),
        bounded(loss, "upper bound"),
        bounded(mu, "lower bound"),
        bounded(beta, "upper bound"),
    ]
    if gradient_bound is not None:
        findings.append(bounded(gradient_bound, "upper bound", remedy="or leave gradient_bound out"))
    E0, m, b = float(loss), float(mu), float(beta)
    other = math.inf if gradient_bound is None else float(gradient_bound)
    findings.append(_positive(m))
    findings.append(_short_enough("lr < 2/beta", lr, Fraction(2), b))
    found = delta_gclip(E0, m, b, lr=lr, gamma=gamma, delta=delta, scope=scope, gradient_bound=other)
    # c does not depend on lr: short steps have it too where these are too long
    short = found or (
        delta_gclip(E0, m, b, lr=min(1 / b, lr), gamma=gamma, delta=delta, scope=scope, gradient_bound=other)
        if b > 0
        else None
    )
    findings.append(_scope(scope, delta, gamma, short))
    lr_max = 0.0 if short is None else largest_lr(E0, m, b, ball, short.cosine)
    numbers: dict[str, float] = {}
    criteria: dict[str, bool] = {}
    conclusion = ""
    if found is None:
        findings.append(_nothing_follows(E0, m, b))
    else:
        findings.append(_fits(found, ball, lr, lr_max, m, E0))
        findings.append(_consistent(m, b))
        numbers = {**vars(found), "lr_max": lr_max}
        steps = ""
        if target is not None:
            numbers["steps"] = found.steps_to(target)
            steps = f"; {numbers['steps']:.6g} steps bring E to {target:.4g}"
        conclusion = (
            f"a minimum with E = 0 lies within {found.radius:.4g} of these weights, and every step multiplies E by at "
            f"most 1 - {found.drop:.4g}" + steps
        )
        if found.clipped_steps and math.isfinite(found.clipped_steps):
            conclusion += f"; at most {found.clipped_steps:.6g} of the steps are clipped"
        criteria = {
            "the clip can act (gamma < G0)": gamma < found.gradient,
            "the floor can act, and delta improves the rate (delta > gamma/G0)": delta * found.gradient > gamma,
            "the radius of the paper's form fits the ball (R1)": radii(E0, m, b, delta)["R1"] <= ball,
        }
    return conclude(
        "delta-GClip converges to a global minimum nearby (PL*)",
        tuple(findings),
        measurements,
        conclusion=conclusion,
        numbers=numbers,
        criteria=criteria,
        source=SOURCE,
    )


def uncovered(
    *, momentum: float = 0.0, weight_decay: float = 0.0, dropout: bool = False, minibatches: bool = False
) -> tuple[Finding, ...]:
    """Return a finding for each setting in which a step is not D grad E of one fixed E: nothing if there is none.

    Example:
        >>> [(f.outcome.value, f.remedy) for f in uncovered(momentum=0.9)]
        [('undecided', 'momentum=0, or check angle and length at every step (Prop. 21)')]
    """
    found = []
    if momentum != 0:
        found.append(
            Finding(
                "no momentum",
                Outcome.UNDECIDED,
                f"momentum = {momentum:g}: a step need not go down, nobody has checked its angle with the gradient",
                "momentum=0, or check angle and length at every step (Prop. 21)",
            )
        )
    found.extend(cheap.first(cheap.weight_decay(weight_decay)))
    if dropout:
        found.append(
            Finding(
                "the loss is one function of the weights",
                Outcome.REFUTED,
                "with dropout (augmentation, noise) every step has a loss of its own",
                "switch it off: model.eval(), or p=0",
            )
        )
    if minibatches:
        found.append(
            Finding(
                "a step sees the whole loss",
                Outcome.UNDECIDED,
                "with minibatches a step follows the gradient of a part of the loss",
                "the whole data in a step (accumulate gradients), or the stochastic theorem, which bounds the mean",
            )
        )
    return tuple(found)


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StochasticNumbers:
    """Bounds of means over the noise, each rounded up.

    Attributes:
        mean_square: of (1/T) sum_t E||grad E(w_t)||^2.
        bias: the part of it that clipping leaves however small lr and however large T: (1-delta)^2 sigma^2/(2 delta^2).
        loss: of the mean of E(w_T), under PL*; infinite without mu.
        floor: what `loss` tends to as T grows; infinite without mu.
    """

    mean_square: float
    bias: float
    loss: float
    floor: float


def stochastic_delta_gclip(
    gap: float, beta: float, noise: float, *, lr: float, delta: float, steps: int, mu: float = 0.0
) -> StochasticNumbers | None:
    """Return the bounds of Prop. 4, or None where it has none: delta = 0, or lr > delta/(2 beta).

        (1/T) sum E||grad E||^2 <= 2 gap/(lr delta T) + (1-delta)^2 sigma^2/(2 delta^2) + beta lr sigma^2/delta
        E[E_T] <= (1 - lr delta mu)^T gap + [(1-delta)^2 sigma^2/(4 delta) + beta lr sigma^2/2]/(delta mu)

    gamma does not matter, nor does the scope: the bounds hold for every rule with multipliers in [lr delta, lr].

    Args:
        gap: E(w0) - inf E, an upper bound; with mu E(w0), whose infimum is 0 then.
        beta: of E everywhere, an upper bound, > 0.
        noise: sigma^2 >= E||g_batch - grad E||^2, of the batches that are stepped with.
        lr: > 0, constant.
        delta: in [0, 1].
        steps: T >= 1.
        mu: of PL* everywhere, a lower bound; 0 if there is none.

    Example:
        >>> stochastic_delta_gclip(1.0, 1.0, 0.0, lr=0.25, delta=0.5, steps=100).mean_square
        0.16
    """
    if not (delta > 0 and 0 < beta < math.inf and 0 <= noise < math.inf and 0 <= gap < math.inf):
        return None
    if not Fraction(lr) <= Fraction(delta) / (2 * Fraction(beta)):
        return None
    D, b, s2, h, d, m = (Fraction(x) for x in (gap, beta, noise, lr, delta, max(mu, 0.0)))
    bias = (1 - d) ** 2 * s2 / (2 * d**2)
    mean = 2 * D / (h * d * steps) + bias + b * h * s2 / d
    loss = floor = math.inf
    if m > 0:
        rest = ((1 - d) ** 2 * s2 / (4 * d) + b * h * s2 / 2) / (d * m)
        floor = above(rest)
        drop = below(h * d * m)
        shrunk = max(gap * math.exp(steps * math.log1p(-min(drop, 1 - 2**-53))) * (1 + 1e-11), 5e-324)
        loss = above(Fraction(shrunk) + rest)
    return StochasticNumbers(above(mean), above(bias), loss, floor)


def check_stochastic_delta_gclip(
    gap: Measurement,
    beta: Measurement,
    noise: Measurement,
    *,
    lr: float,
    delta: float,
    steps: int,
    mu: Measurement | None = None,
    scope: str = "global",
    independent: bool = True,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    refutations: Sequence[Finding] = (),
) -> Verdict:
    """Hold the stochastic bounds against measurements, all of the loss that is trained.

    Args:
        gap: E(w0) - inf E, an upper bound; E(w0) itself where E >= 0.
        beta: Lipschitz constant of grad E, everywhere, an upper bound.
        noise: sigma^2 of the gradient of the batches that are stepped with, everywhere, an upper bound.
        lr: the optimizer's, > 0, constant.
        delta: the optimizer's, in [0, 1].
        steps: T >= 1.
        mu: of PL* everywhere, a lower bound; None: no bound of the loss.
        scope: as in `check_delta_gclip`; any but "sample" is covered.
        independent: whether every batch is drawn anew; False where an epoch goes through a shuffled data set.
        momentum: the optimizer's.
        weight_decay: the optimizer's.
        refutations: what speaks against it already.

    Raises:
        InputError: an option out of its range.
    """
    _check_rule(lr, 0.0, delta, scope)
    if not steps >= 1:
        raise InputError(f"steps={steps!r} must be at least 1")
    measurements = (gap, beta, noise, *([mu] if mu is not None else []))
    findings = [
        *refutations,
        *uncovered(momentum=momentum, weight_decay=weight_decay),
        bounded(gap, "upper bound"),
        bounded(beta, "upper bound"),
        bounded(
            noise, "upper bound", remedy="a measured sigma^2 is an estimate; a proof needs a bound for all weights"
        ),
        *([bounded(mu, "lower bound"), _positive(float(mu))] if mu is not None else []),
    ]
    if not independent:
        findings.append(
            Finding(
                "batches are drawn independently of each other",
                Outcome.UNDECIDED,
                "within an epoch of a shuffled data set a batch depends on those before it",
                "draw every batch anew from all samples",
            )
        )
    if scope == "sample":
        findings.append(_scope(scope, delta, 0.0, None))
    b = float(beta)
    findings.append(
        Finding("delta > 0", Outcome.PROVED, f"delta = {delta:g}")
        if delta > 0
        else Finding(
            "delta > 0",
            Outcome.UNDECIDED,
            "delta = 0: with noise, plain clipping has no such bound (it may stop anywhere)",
            "a floor delta > 0",
        )
    )
    findings.append(_short_enough("lr <= delta/(2 beta)", lr, Fraction(delta) / 2, b, closed=True))
    found = stochastic_delta_gclip(
        float(gap), b, float(noise), lr=lr, delta=delta, steps=steps, mu=0.0 if mu is None else float(mu)
    )
    numbers = {} if found is None else {k: v for k, v in vars(found).items() if math.isfinite(v)}
    conclusion = ""
    if found is None:
        findings.append(_nothing_follows(float(gap), float(noise), b))
    else:
        conclusion = (
            f"over {steps:,} steps the mean of ||grad E||^2 is at most {found.mean_square:.4g} in expectation, "
            f"{found.bias:.4g} of it the bias of clipping"
        )
        if math.isfinite(found.loss):
            conclusion += f"; the mean of E at the end is at most {found.loss:.4g}"
    return conclude(
        "delta-GClip with noisy gradients stays near a minimum",
        tuple(findings),
        measurements,
        conclusion=conclusion,
        numbers=numbers,
        source=SOURCE_STOCHASTIC,
    )


# ----------------------------------------------------------------------------------------------------------------------


def _check_rule(lr: float, gamma: float, delta: float, scope: str) -> None:
    if not 0 < lr < math.inf:
        raise InputError(f"lr={lr!r} must be a finite number above 0")
    if not gamma >= 0:
        raise InputError(f"gamma={gamma!r} must be a number of at least 0; inf never clips")
    if not 0 <= delta <= 1:
        raise InputError(f"delta={delta!r} must lie in [0, 1]; 0 is plain clipping, 1 none")
    if scope not in SCOPES:
        raise InputError(f"scope={scope!r} is unknown; choose one of {tuple(SCOPES)}")


def _positive(mu: float) -> Finding:
    if mu > 0:
        return Finding("mu > 0", Outcome.PROVED, f"mu >= {mu:.4g}")
    return Finding(
        "mu > 0",
        Outcome.UNDECIDED,
        f"mu >= {mu:.4g} only",
        "a smaller ball, a smaller loss to begin with, or a wider network without near-duplicate inputs",
    )


def _short_enough(hypothesis: str, lr: float, numerator: Fraction, beta: float, *, closed: bool = False) -> Finding:
    """Hold lr < numerator/beta (or <=)."""
    if not 0 < beta < math.inf:
        return Finding(hypothesis, Outcome.UNDECIDED, f"beta <= {beta:.4g}", "a finite bound of beta above 0")
    longest = numerator / Fraction(beta)
    proved = Fraction(lr) <= longest if closed else Fraction(lr) < longest
    return Finding(
        hypothesis,
        Outcome.PROVED if proved else Outcome.UNDECIDED,
        f"lr = {lr:.4g}, limit {below(longest):.4g}",
        "" if proved else f"lr below {below(longest):.4g}, or a smaller bound of beta",
    )


def _nothing_follows(*bounds: float) -> Finding:
    return Finding(
        "the bounds give a conclusion",
        Outcome.UNDECIDED,
        "none with these: " + ", ".join(f"{x:.4g}" for x in bounds),
        "see the hypotheses above; every bound must be finite, and beta positive",
    )


def _scope(scope: str, delta: float, gamma: float, short: DeltaGClipNumbers | None) -> Finding:
    hypothesis = "the scope of the clip is covered"
    if scope == "sample":
        return Finding(
            hypothesis,
            Outcome.REFUTED,
            f"{SCOPES[scope]}, and can point uphill: gradients 3, -1 and -1 clipped at 1 add up to -1",
            "clip the sum over the samples: scope='global'",
        )
    if scope == "global":
        return Finding(hypothesis, Outcome.PROVED, f"{SCOPES[scope]}, c = 1 for every delta")
    if delta == 0 and gamma == 0:
        return Finding(
            hypothesis, Outcome.REFUTED, "gamma = delta = 0: no block need move at all", "gamma or delta > 0"
        )
    if short is None:
        return Finding(hypothesis, Outcome.UNDECIDED, f"{SCOPES[scope]}, c not known without mu and beta", "see above")
    return Finding(
        hypothesis,
        Outcome.PROVED,
        f"{SCOPES[scope]}, entries in [{short.delta_eff:.4g} lr, lr], so c >= {short.cosine:.4g}",
    )


def _fits(found: DeltaGClipNumbers, ball: float, lr: float, lr_max: float, mu: float, loss: float) -> Finding:
    hypothesis = "radius <= the ball on which mu and beta hold"
    reason = f"radius {found.radius:.4g}, R = {ball:.4g}"
    if found.radius <= ball:
        return Finding(hypothesis, Outcome.PROVED, reason)
    if lr_max > 0:
        remedy = f"lr of at most {lr_max:.4g}"
    else:
        need = found.cosine**2 * ball**2 * mu / 2
        remedy = f"train to a loss below {need:.4g} first (now {loss:.4g}), or measure mu and beta on a larger ball"
    return Finding(hypothesis, Outcome.UNDECIDED, reason, remedy)


def _consistent(mu: float, beta: float) -> Finding:
    """Hold mu <= beta, which follows from the rest unless E is 0 already."""
    if mu <= beta:
        return Finding("mu <= beta", Outcome.PROVED, f"mu >= {mu:.4g}, beta <= {beta:.4g}")
    return Finding(
        "mu <= beta",
        Outcome.UNDECIDED,
        f"mu >= {mu:.4g} and beta <= {beta:.4g} contradict each other, unless the loss is 0 already",
        "measure again: are both of the same loss, in the same units?",
    )
