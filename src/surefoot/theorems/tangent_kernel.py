"""Published criteria that bound lambda_min of the tangent kernel on a ball: Liu-Zhu-Belkin and Oymak-Soltanolkotabi.

Letters: rho = ||F(w0) - y||, E = 1/2 rho^2, s0 <= s_min(J(w0)), beta >= Lipschitz constant of J and L >= ||J|| on the
ball of radius R around w0, a = s0 - beta R <= s_min(J) there, mu = a^2 <= lambda_min(K) there (PL*), q = beta rho/s0^2.

    Liu-Zhu-Belkin         R = 2 L rho/mu,  h = eta <= 1/(L^2 + beta rho)                 E_t <= (1 - eta mu)^t E_0
    Oymak-Soltanolkotabi   R = 4 rho/a,     h = eta <= min{1, a^2/(beta rho)}/(2 L^2)     E_t <= (1 - eta a^2/2)^t E_0

The constants are as we remember them; neither paper was read again. What is PROVED here does not depend on that: both
follow from Prop. 1 with eps = 1/2, whose radius is 2 rho/sqrt(mu) <= 2 L rho/mu. They hold where q <= (2/27) s0/L and
q <= 1/16; the path-length theorem, on the same constants, where q < 1/2. `published` shows all of them.

Source: C. Liu, L. Zhu and M. Belkin, arXiv 2003.00307; S. Oymak and M. Soltanolkotabi, arXiv 1812.10004 (the criteria);
surefoot, Prop. 1 and 22 (the proofs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.theorems.local_pl import least_ball
from surefoot.theorems.outward import above, below, steps_until
from surefoot.theorems.path_length import best_epsilon, criteria
from surefoot.theorems.verdict import Finding, Outcome, Verdict, bounded, conclude

Form = Literal["liu-zhu-belkin", "oymak-soltanolkotabi"]
Status = Literal["PROVED HERE", "RECALLED"]

THEOREM = {
    "liu-zhu-belkin": "a global minimum lies nearby (Liu-Zhu-Belkin, PL* by the tangent kernel)",
    "oymak-soltanolkotabi": "a global minimum lies nearby (Oymak-Soltanolkotabi)",
}
SOURCE = {
    "liu-zhu-belkin": "surefoot, Prop. 1 (form as recalled from Liu, Zhu and Belkin, arXiv 2003.00307)",
    "oymak-soltanolkotabi": "surefoot, Prop. 1 (form as recalled from Oymak and Soltanolkotabi, arXiv 1812.10004)",
}
HYPOTHESIS = {
    "liu-zhu-belkin": "R (s0 - beta R)^2 >= 2 L rho for some R",
    "oymak-soltanolkotabi": "R (s0 - beta R) >= 4 rho for some R",
}


@dataclass(frozen=True)
class TangentKernelNumbers:
    """The conclusion's numbers, each rounded to the safe side.

    Attributes:
        q: Kantorovich number beta rho/s0^2 (upper).
        radius: R: a minimum is no further, and steps of one size stay within.
        mu: lambda_min(K) on the ball (lower).
        eta_max: the longest step on E (lower).
        drop: a step of eta_max multiplies E by 1 - drop at most (lower).
        loss: E0 (upper).
    """

    q: float
    radius: float
    mu: float
    eta_max: float
    drop: float
    loss: float

    def steps_to(self, target: float) -> float:
        """Return a number of steps of eta_max after which E <= target."""
        return steps_until(self.loss, target, self.drop)


@dataclass(frozen=True)
class Criterion:
    """A published criterion held against constants.

    Attributes:
        name: as in the `criteria` of a verdict.
        requirement: in the letters of this module.
        status: "PROVED HERE": surefoot has a proof of this very form; "RECALLED": the constants are the paper's as we
            remember them, and what follows from them is proved by Prop. 1.
        limit: on q.
        q: as it is.
        holds: whether q is below the limit.
    """

    name: str
    requirement: str
    status: Status
    limit: float
    q: float
    holds: bool

    def __str__(self) -> str:
        return f"{'yes' if self.holds else 'no':3}  q = {self.q:.3g} < {self.limit:.3g}  {self.name} ({self.status})"


_ABOUT: dict[str, tuple[str, Status]] = {
    "path length, gradient flow (Newton-Kantorovich)": ("int_0^R (s0 - beta s) ds > rho", "PROVED HERE"),
    "path length, any steps": ("(1 - epsilon) int_0^R (s0 - beta s) ds > rho", "PROVED HERE"),
    "Chatterjee, gradient flow": ("R (s0 - beta R) > rho", "PROVED HERE"),
    "Chatterjee, gradient descent": ("(1 - epsilon) R (s0 - beta R) > rho", "PROVED HERE"),
    "Oymak-Soltanolkotabi": ("R (s0 - beta R) >= 4 rho", "RECALLED"),
    "Liu-Zhu-Belkin": ("R (s0 - beta R)^2 >= 2 L rho", "RECALLED"),
    "delta-GClip, radius of the paper's form": ("R (s0 - beta R)^2 >= 2 L rho/delta", "RECALLED"),
}


def kernel_on_ball(sigma_min: float, beta: float, radius: float) -> float:
    """Return (s0 - beta R)^2, rounded down: lambda_min(K) on the ball is at least that; 0 where R is too large.

    Example:
        >>> kernel_on_ball(4.0, 1.0, 1.0)
        9.0
    """
    a = Fraction(sigma_min) - Fraction(beta) * Fraction(radius)
    return below(a * a) if a > 0 else 0.0


def kernel_by_hessians(lambda_0: float, hessian: float, jacobian_norm: float, residuals: int, radius: float) -> float:
    """Return lambda_0 - 2 L sqrt(n) h R, rounded down: lambda_min(K) on the ball by ||K - K0|| <= 2 L ||J - J0||_F.

    It is `kernel_on_ball` with less information and never better at the same L; here to compare with.

    Args:
        lambda_0: lambda_min(K) at the centre, a lower bound.
        hessian: h, no Hessian of an output has a larger norm on the ball; an upper bound.
        jacobian_norm: L on the ball, an upper bound.
        residuals: n.
        radius: R.

    Example:
        >>> kernel_by_hessians(16.0, 0.5, 4.0, 4, 1.0)
        8.0
    """
    root = Fraction(above(Fraction(math.nextafter(math.sqrt(residuals), math.inf))))
    root = Fraction(math.isqrt(residuals)) if math.isqrt(residuals) ** 2 == residuals else root
    return below(Fraction(lambda_0) - 2 * Fraction(jacobian_norm) * root * Fraction(hessian) * Fraction(radius))


def tangent_kernel(
    residual: float, sigma_min: float, beta: float, jacobian_norm: float, form: Form = "liu-zhu-belkin"
) -> TangentKernelNumbers | None:
    """Return the conclusion's numbers on the least ball that will do, or None where there is none.

    Args:
        residual: rho, an upper bound, >= 0.
        sigma_min: s0, a lower bound, > 0.
        beta: an upper bound, >= 0.
        jacobian_norm: L, an upper bound, >= s0.
        form: "liu-zhu-belkin" or "oymak-soltanolkotabi".

    Example:
        >>> found = tangent_kernel(1.0, 4.0, 0.0, 4.0)
        >>> round(found.radius, 6), found.mu, found.eta_max, found.drop  # 2 4 1/16
        (0.5, 16.0, 0.0625, 1.0)
        >>> tangent_kernel(2.0, 4.0, 1.0, 4.0) is None, tangent_kernel(0.9, 4.0, 1.0, 4.0) is None  # q > 2/27 = 0.074
        (True, False)
    """
    if not (sigma_min > 0 and jacobian_norm > 0 and all(map(math.isfinite, (residual, beta, jacobian_norm)))):
        return None
    rho, s0, b, L = (Fraction(x) for x in (residual, sigma_min, beta, jacobian_norm))
    lzb = form == "liu-zhu-belkin"
    low = (below(2 * L * rho / s0**2) if lzb else below(4 * rho / s0)) or 5e-324
    high = max(low * (1 + 2.0**-30), 1e-300) if b == 0 else below(s0 / ((3 if lzb else 2) * b))

    def holds(R: Fraction) -> bool:
        a = s0 - b * R
        return a > 0 and (R * a * a >= 2 * L * rho if lzb else R * a >= 4 * rho)

    R = least_ball(holds, min(low, high), high)
    if R is None:
        return None
    mu = Fraction(kernel_on_ball(sigma_min, beta, R))
    if lzb:
        eta = below(1 / (L**2 + b * rho))
        drop = below(Fraction(eta) * mu)
    else:
        eta = below((min(Fraction(1), mu / (b * rho)) if b * rho else Fraction(1)) / (2 * L**2))
        drop = below(Fraction(eta) * mu / 2)
    return TangentKernelNumbers(above(b * rho / s0**2), R, float(mu), eta, min(1.0, drop), above(rho**2 / 2))


def check_tangent_kernel(
    residual: Measurement,
    sigma_min: Measurement,
    beta: Measurement,
    jacobian_norm: Measurement,
    *,
    form: Form = "liu-zhu-belkin",
    ball: float = math.inf,
    target: float | None = None,
    refutations: Sequence[Finding] = (),
) -> Verdict:
    """Hold a published criterion against measurements, for E = 1/2 ||F - y||^2 and steps on E.

    Args:
        residual: rho, an upper bound.
        sigma_min: s_min(J(w0)), a lower bound; an upper bound of 0 refutes.
        beta: Lipschitz constant of J on the ball, an upper bound.
        jacobian_norm: of J on the ball, an upper bound.
        form: "liu-zhu-belkin" or "oymak-soltanolkotabi".
        ball: R, the radius on which beta and jacobian_norm hold.
        target: a value of E > 0 to say the number of steps for.
        refutations: what is known already: `first(fewer_parameters(P, n), duplicate_inputs(X))` of
            `surefoot.theorems.refutations`, or `surefoot.theorems.delta_gclip.uncovered`.

    Returns:
        Verdict: its `numbers` are those of `TangentKernelNumbers`, with a target steps; its `criteria` say which others
        hold on the same constants.

    Raises:
        InputError: an option out of its range.
    """
    if form not in THEOREM:
        raise InputError(f"form={form!r} is unknown; choose one of {tuple(THEOREM)}")
    if target is not None and not target > 0:
        raise InputError(f"target={target!r} is never reached exactly; give a loss above 0")
    measurements = (residual, sigma_min, beta, jacobian_norm)
    rho, s0, b, L = (float(m) for m in measurements)
    singular = sigma_min.kind in ("upper bound", "exact") and s0 <= 0
    findings = [
        *refutations,
        bounded(residual, "upper bound"),
        Finding("lambda_min(K) > 0", Outcome.REFUTED, str(sigma_min), "leave duplicates out, or take a wider network")
        if singular
        else bounded(sigma_min, "lower bound"),
        bounded(beta, "upper bound"),
        bounded(jacobian_norm, "upper bound"),
    ]
    if s0 > L and sigma_min.kind in ("lower bound", "exact") and jacobian_norm.kind in ("upper bound", "exact"):
        findings.append(
            Finding(
                "s_min(J) <= ||J||",
                Outcome.REFUTED,
                f"s0 >= {s0:.4g} and L <= {L:.4g} cannot both hold",
                "measure again: are both of the same Jacobian?",
            )
        )
    found = tangent_kernel(rho, s0, b, L, form)
    q = above(Fraction(b) * Fraction(rho) / Fraction(s0) ** 2) if s0 > 0 and math.isfinite(b * rho) else math.inf
    limit = _limits(s0, L)[form]
    if found is None:
        findings.append(
            Finding(
                HYPOTHESIS[form],
                Outcome.UNDECIDED,
                f"q <= {q:.4g}, and the limit is {limit:.4g}" if s0 > 0 else f"s0 >= {s0:.4g} only",
                "the path-length theorem asks for q < 1/2; or a smaller residual, a larger s_min(J)",
            )
        )
    else:
        findings.append(Finding(HYPOTHESIS[form], Outcome.PROVED, f"R = {found.radius:.4g}, q <= {q:.4g}"))
        inside = found.radius <= ball
        findings.append(
            Finding(
                "radius <= the ball on which beta and L hold",
                Outcome.PROVED if inside else Outcome.UNDECIDED,
                f"radius {found.radius:.4g}, R = {ball:.4g}",
                "" if inside else "measure beta and the Jacobian's norm on a larger ball",
            )
        )
    numbers: dict[str, float] = {}
    conclusion = ""
    if found is not None:
        numbers = {**vars(found)}
        conclusion = (
            f"a global minimum with F = y lies within {found.radius:.4g} of these weights; steps of one size up to "
            f"{found.eta_max:.4g} on 1/2 ||F - y||^2 reach one, and each of {found.eta_max:.4g} multiplies it by at "
            f"most 1 - {found.drop:.4g}"
        )
        if target is not None:
            numbers["steps"] = float(found.steps_to(target))
            conclusion += f"; {numbers['steps']:.6g} of them bring it to {target:.4g}"
    return conclude(
        THEOREM[form],
        tuple(findings),
        measurements,
        conclusion=conclusion,
        numbers=numbers,
        criteria=criteria(q, s0, L, best_epsilon(q)),
        source=SOURCE[form],
    )


def published(
    residual: float,
    sigma_min: float,
    beta: float,
    jacobian_norm: float,
    *,
    epsilon: float | None = None,
    delta: float = 1.0,
) -> tuple[Criterion, ...]:
    """Return which published criterion holds on the same constants, from the weakest to the strongest requirement.

    All know only that s_min(J) >= s0 - beta s at distance s; each is a limit on q = beta rho/s0^2 (Prop. 22).

    Args:
        residual: rho, an upper bound.
        sigma_min: s0, a lower bound, > 0.
        beta: an upper bound.
        jacobian_norm: L, an upper bound.
        epsilon: of the criteria for steps, in (0, 1); None: (1 - 2 q)/2, the best for the path-length theorem's rate.
        delta: of delta-GClip, in (0, 1].

    Example:
        >>> for row in published(0.2, 1.0, 1.0, 2.0, epsilon=0.1):
        ...     print(row)
        yes  q = 0.2 < 0.5  path length, gradient flow (Newton-Kantorovich) (PROVED HERE)
        yes  q = 0.2 < 0.45  path length, any steps (PROVED HERE)
        yes  q = 0.2 < 0.25  Chatterjee, gradient flow (PROVED HERE)
        yes  q = 0.2 < 0.225  Chatterjee, gradient descent (PROVED HERE)
        no   q = 0.2 < 0.0625  Oymak-Soltanolkotabi (RECALLED)
        no   q = 0.2 < 0.037  Liu-Zhu-Belkin (RECALLED)
        no   q = 0.2 < 0.037  delta-GClip, radius of the paper's form (RECALLED)
    """
    if not (sigma_min > 0 and jacobian_norm > 0):
        raise InputError(f"sigma_min={sigma_min!r}, jacobian_norm={jacobian_norm!r} must be above 0")
    if not 0 < delta <= 1:
        raise InputError(f"delta={delta!r} must lie in (0, 1]")
    if epsilon is not None and not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r} must lie between 0 and 1, or be left out")
    q = above(Fraction(beta) * Fraction(residual) / Fraction(sigma_min) ** 2)
    eps = best_epsilon(q) if epsilon is None else epsilon
    ratio = sigma_min / jacobian_norm
    limits = {
        "path length, gradient flow (Newton-Kantorovich)": 1 / 2,
        "path length, any steps": (1 - eps) / 2,
        "Chatterjee, gradient flow": 1 / 4,
        "Chatterjee, gradient descent": (1 - eps) / 4,
        "Oymak-Soltanolkotabi": 1 / 16,
        "Liu-Zhu-Belkin": 2 / 27 * ratio,
        "delta-GClip, radius of the paper's form": 2 / 27 * delta * ratio,
    }
    found = criteria(q, sigma_min, jacobian_norm, eps, delta)
    return tuple(Criterion(name, *_ABOUT[name], limits[name], q, holds) for name, holds in found.items())


def _limits(s0: float, L: float) -> dict[Form, float]:
    return {"liu-zhu-belkin": 2 / 27 * s0 / L if L > 0 else 0.0, "oymak-soltanolkotabi": 1 / 16}
