"""The path-length theorem: from numbers at one point to an exact global minimum near it.

Letters: rho = ||F(w0) - y||, s0 <= s_min(J(w0)), L >= ||J|| and beta >= Lipschitz constant of J on a ball of radius R
around w0, E = 1/2 ||F - y||^2, q = beta rho / s0^2 (the Kantorovich number), eps in (0, 1).

    q < (1 - eps)/2,   S = (s0/beta)(1 - sqrt(1 - 2 q/(1 - eps))) <= R   =>
    an exact global minimum lies within S of w0; steps h_t <= eta_max = 2 eps/(L^2 + beta rho), chosen in any way, stay
    within S and multiply ||F - y|| by at most 1 - (1 - eps) h_t a^2, a = s0 - beta S.

surefoot, Prop. 17 (ideas: Chatterjee 2022; Liu, Zhu and Belkin 2022; Oymak and Soltanolkotabi 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.theorems.outward import above, below
from surefoot.theorems.verdict import Finding, Outcome, Verdict, bounded, conclude

SOURCE = "surefoot, Prop. 17"


@dataclass(frozen=True)
class PathLengthNumbers:
    """The conclusion's numbers, each rounded to the safe side.

    Attributes:
        q: Kantorovich number (upper).
        epsilon: as chosen.
        radius: S (upper).
        sigma_star: a = s0 - beta S, a lower bound of s_min(J) on the ball of radius S.
        eta_max: the longest step on E (lower).
    """

    q: float
    epsilon: float
    radius: float
    sigma_star: float
    eta_max: float

    def contraction(self, step: float) -> float:
        """Return the guaranteed factor on ||F - y|| of one step 0 <= h <= eta_max on E (upper)."""
        if not 0 <= step <= self.eta_max:
            raise InputError(f"step={step!r} is not between 0 and eta_max={self.eta_max!r}")
        factor = 1 - (1 - Fraction(self.epsilon)) * Fraction(step) * Fraction(self.sigma_star) ** 2
        return above(factor)


def best_epsilon(q: float) -> float:
    """Return the eps at which the guaranteed rate at eta_max is best: (1 - 2 q)/2, as a short number below it."""
    exact = (1 - 2 * q) / 2
    return max(math.floor(exact * 2**20) / 2**20, 2**-30) if exact > 0 else 0.0


def path_length(
    residual: float, sigma_min: float, beta: float, jacobian_norm: float, epsilon: float | None = None
) -> PathLengthNumbers | None:
    """Return the conclusion's numbers, or None if q >= (1 - eps)/2 or a bound is infinite.

    Every number returned satisfies its inequality exactly (they are checked in rational arithmetic).

    Args:
        residual: rho, an upper bound, > 0.
        sigma_min: s0, a lower bound, > 0.
        beta: an upper bound, >= 0.
        jacobian_norm: L, an upper bound, > 0.
        epsilon: in (0, 1); None: the best for the rate.
    """
    if not sigma_min > 0 or not math.isfinite(residual + beta + jacobian_norm + sigma_min):
        return None
    rho, s0, b, L = (Fraction(x) for x in (residual, sigma_min, beta, jacobian_norm))
    q = _number(beta, residual, sigma_min)
    eps_ = best_epsilon(q) if epsilon is None else epsilon
    eps = Fraction(eps_)
    if not 0 < eps < 1 or not q < 0.5 or not Fraction(q) < (1 - eps) / 2:
        return None
    x = 2 * q / (1 - eps_)
    # (1 - sqrt(1 - x))/x without cancellation
    S = math.nextafter(above(rho / ((1 - eps) * s0) * Fraction(2 / (1 + math.sqrt(max(0.0, 1 - x))))), math.inf)
    for _ in range(200):
        if b * Fraction(S) < s0 and (1 - eps) * (s0 * Fraction(S) - b * Fraction(S) ** 2 / 2) >= rho:
            break
        S *= 1 + 2.0**-44
    else:
        return None
    a, eta = below(s0 - b * Fraction(S)), below(2 * eps / (L**2 + b * rho))
    return PathLengthNumbers(q, eps_, S, a, eta) if a > 0 and eta > 0 else None


def check_path_length(
    residual: Measurement,
    sigma_min: Measurement,
    beta: Measurement,
    jacobian_norm: Measurement,
    *,
    ball: float = math.inf,
    epsilon: float | None = None,
) -> Verdict:
    """Hold the path-length theorem against measurements.

    Args:
        residual: ||F(w0) - y||, an upper bound.
        sigma_min: s_min(J(w0)), a lower bound.
        beta: Lipschitz constant of J on the ball, an upper bound.
        jacobian_norm: of J on the ball, an upper bound.
        ball: R, the radius on which beta and jacobian_norm hold.
        epsilon: in (0, 1); None: the best for the rate.

    Returns:
        Verdict: its `numbers` are q, epsilon, radius, sigma_star, eta_max; `criteria` says which published criterion
        would also have applied to the same constants.
    """
    if epsilon is not None and not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r} must lie between 0 and 1; 0.5 is a good choice, or leave it out")
    measurements = (residual, sigma_min, beta, jacobian_norm)
    findings = [
        bounded(residual, "upper bound"),
        bounded(sigma_min, "lower bound"),
        bounded(beta, "upper bound"),
        bounded(jacobian_norm, "upper bound"),
    ]
    rho, s0, b, L = (float(m) for m in measurements)
    found = path_length(rho, s0, b, L, epsilon)
    q = _number(b, rho, s0)
    eps = epsilon if epsilon is not None else best_epsilon(q)
    hypothesis = "q = beta rho/s0^2 < (1 - epsilon)/2"
    if found is None:
        findings.append(
            # The constants are bounds: that they do not suffice refutes nothing.
            Finding(
                hypothesis,
                Outcome.UNDECIDED,
                f"q <= {q:.4g}" if s0 > 0 else f"s0 >= {s0:.4g} only",
                shortage(rho, s0, b, 0.5 if epsilon is None else (1 - epsilon) / 2),
            )
        )
    else:
        findings.append(Finding(hypothesis, Outcome.PROVED, f"q <= {found.q:.4g}, epsilon = {found.epsilon:.4g}"))
        inside = found.radius <= ball
        findings.append(
            Finding(
                "radius <= the ball on which beta and L hold",
                Outcome.PROVED if inside else Outcome.UNDECIDED,
                f"S = {found.radius:.4g}, R = {ball:.4g}",
                "" if inside else "measure beta and the Jacobian's norm on a larger ball",
            )
        )
    numbers = {} if found is None else vars(found)
    return conclude(
        "an exact global minimum lies nearby (path length)",
        tuple(findings),
        measurements,
        conclusion=(
            f"an exact global minimum lies within {found.radius:.4g} of these weights; steps up to {found.eta_max:.4g} "
            "on 1/2 ||F - y||^2, chosen in any way, reach one if they sum up to infinity"
            if found is not None
            else ""
        ),
        numbers=numbers,
        criteria=criteria(q, s0, L, eps),
        source=SOURCE,
    )


def criteria(q: float, s0: float, L: float, eps: float, delta: float = 1.0) -> dict[str, bool]:
    """Return which published criterion holds on the same constants: thresholds on q (surefoot, Prop. 22)."""
    ratio = s0 / L if L > 0 else 0.0
    limits = {
        "path length, gradient flow (Newton-Kantorovich)": 1 / 2,
        "path length, any steps": (1 - eps) / 2,
        "Chatterjee, gradient flow": 1 / 4,
        "Chatterjee, gradient descent": (1 - eps) / 4,
        "Oymak-Soltanolkotabi": 1 / 16,
        "Liu-Zhu-Belkin": 2 / 27 * ratio,
        "delta-GClip, radius of the paper's form": 2 / 27 * delta * ratio,
    }
    return {name: bool(q < limit) for name, limit in limits.items()}


def shortage(rho: float, s0: float, beta: float, limit: float = 0.5) -> str:
    """Say by how much q is too large, and what would help.

    Args:
        rho: the residual.
        s0: s_min(J), if there is a positive bound.
        beta: the curvature bound.
        limit: what q has to be below: (1 - epsilon)/2.
    """
    if not s0 > 0:
        return (
            "s_min(J) has no positive lower bound: there may be duplicate or nearly equal inputs, or too few "
            "parameters; remove such samples or take a wider layer"
        )
    over = max(1.0, _number(beta, rho, s0) / limit)
    return (
        f"too large by a factor {over:.3g} ({math.log10(over):.1f} orders of magnitude): the residual ({rho:.3g}) "
        f"would have to be that much smaller (train longer, or polish), or s_min(J) ({s0:.3g}) {math.sqrt(over):.3g} "
        f"times larger (a wider layer, normalised inputs, no near-duplicates), or the curvature bound ({beta:.3g}) "
        "that much smaller (smaller weights, fewer layers)"
    )


def _number(beta: float, rho: float, s0: float) -> float:
    """Return beta rho/s0^2 without over- or underflow on the way; infinite where nothing is known."""
    if not s0 > 0 or not math.isfinite(beta + rho):
        return math.inf
    return above(Fraction(beta) * Fraction(rho) / Fraction(s0) ** 2)
