"""Chatterjee's local criterion: from the loss at one point and the slope around it to a global minimum in the ball.

Letters: f >= 0 the loss in its own units, f0 = f(x0) at the weights now, B the closed ball of radius R around them,
beta a Lipschitz constant of grad f on B where f <= f0, h_t a step, eps in (0, 1).

    alpha = inf over B, f != 0, of ||grad f||^2/f   (2 lambda_min(K) for 1/2 ||F - y||^2; 4/n of it for its mean over n)

    flow   4 f0 < R^2 alpha   =>   it stays in B, f(t) <= e^(-alpha t) f0, and it ends in f = 0, 2 sqrt(f0/alpha) away
    steps  4 f0 <= (1-eps)^2 R^2 alpha, any h_t <= 2 eps/beta   =>   they stay within 2 sqrt(f0/alpha)/(1-eps),
           f_{t+1} <= (1 - (1-eps) alpha h_t) f_t, and if sum h_t = inf they converge to a point with f = 0
    path   ||grad f||^2/f >= A(s)^2 at distance s, sqrt(f0) < 1/2 int_0^R A   =>   the flow ends in f = 0 and stays
           within s1, where 1/2 int_0^s1 A = sqrt(f0)

The flow is Chatterjee's theorem; the steps are Prop. 1 with mu = alpha/2 (operator norms, no ball of radius 2 R); the
path is Prop. 9. In exact arithmetic: the rounding of the training itself is not part of it.

Source: S. Chatterjee, arXiv 2203.16462 (the idea); surefoot, Prop. 1, 9, 10 and 22.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure.eigen import gram, lambda_min
from surefoot.measure.measurement import Measurement
from surefoot.measure.rounding import TINY, down, gam, power_of_two, up
from surefoot.theorems.outward import above, below, sqrt_above, sqrt_below, steps_until
from surefoot.theorems.path_length import criteria
from surefoot.theorems.verdict import Finding, Outcome, Verdict, bounded, conclude

THEOREM = "a global minimum with f = 0 lies nearby (Chatterjee's local criterion)"
SOURCE_FLOW = "Chatterjee, arXiv 2203.16462; surefoot, Prop. 9"
SOURCE_STEPS = "surefoot, Prop. 1 with mu = alpha/2 (idea: Chatterjee, arXiv 2203.16462)"
SOURCE_PATH = "surefoot, Prop. 9 (idea: Chatterjee, arXiv 2203.16462)"
CLOSE = 1e-6  # plain floating point refutes only by more than this


@dataclass(frozen=True)
class LocalPLNumbers:
    """The conclusion's numbers for steps, each rounded to the safe side.

    Attributes:
        loss: f0.
        alpha: inf ||grad f||^2/f on the ball (lower).
        epsilon: as chosen.
        radius: the path is no longer, and a minimum with f = 0 no further (upper).
        eta_max: the longest step on f (lower).
        drop: a step of eta_max multiplies f by 1 - drop at most (lower).
    """

    loss: float
    alpha: float
    epsilon: float
    radius: float
    eta_max: float
    drop: float

    def contraction(self, step: float) -> float:
        """Return the guaranteed factor on f of one step 0 <= h <= eta_max on f (upper)."""
        if not 0 <= step <= self.eta_max:
            raise InputError(f"step={step!r} is not between 0 and eta_max={self.eta_max!r}")
        return max(0.0, above(1 - (1 - Fraction(self.epsilon)) * Fraction(self.alpha) * Fraction(step)))

    def steps_to(self, target: float, step: float | None = None) -> float:
        """Return a number of steps, each at least `step` (eta_max) long, after which f <= target; infinite at 0."""
        if step is not None and not 0 < step <= self.eta_max:
            raise InputError(f"step={step!r} is not above 0 and at most eta_max={self.eta_max!r}")
        drop = (
            self.drop if step is None else below((1 - Fraction(self.epsilon)) * Fraction(self.alpha) * Fraction(step))
        )
        return steps_until(self.loss, target, min(drop, 1.0))


def flow_radius(loss: float, alpha: float) -> float:
    """Return 2 sqrt(f0/alpha), rounded up: how far gradient flow goes; infinite for alpha <= 0.

    Example:
        >>> flow_radius(4.0, 1.0)
        4.0
    """
    return sqrt_above(4 * Fraction(loss) / Fraction(alpha)) if alpha > 0 else math.inf


def largest_epsilon(loss: float, alpha: float, ball: float) -> float:
    """Return the eps <= 1/2 with the best guaranteed rate whose path fits the ball; 0 where none does.

    Example:
        >>> largest_epsilon(4.0, 1.0, ball=5.0), largest_epsilon(4.0, 1.0, ball=4.0)
        (0.19999980926513672, 0.0)
    """
    if math.isinf(ball):
        return 0.5
    room = 1 - Fraction(flow_radius(loss, alpha)) / Fraction(ball) if ball > 0 and alpha > 0 else Fraction(0)
    return min(0.5, math.floor(room * 2**20) / 2**20) if room > 0 else 0.0


def local_pl(
    loss: float, alpha: float, beta: float, *, ball: float = math.inf, epsilon: float | None = None
) -> LocalPLNumbers | None:
    """Return the conclusion's numbers for steps chosen in any way, or None where 4 f0 > (1-eps)^2 R^2 alpha.

    Args:
        loss: f0, an upper bound, >= 0.
        alpha: on the ball, a lower bound, > 0.
        beta: Lipschitz constant of grad f on the ball where f <= f0, an upper bound, > 0.
        ball: R, may be infinite.
        epsilon: in (0, 1); None: the best for the rate, which is 1/2 where there is room.

    Example:
        >>> found = local_pl(4.0, alpha=1.0, beta=4.0)
        >>> found.radius, found.eta_max, found.drop
        (8.0, 0.25, 0.125)
    """
    if not (0 <= loss < math.inf and 0 < alpha < math.inf and 0 < beta < math.inf):
        return None
    eps_ = largest_epsilon(loss, alpha, ball) if epsilon is None else epsilon
    eps = Fraction(eps_)
    if not 0 < eps < 1:
        return None
    radius = above(Fraction(flow_radius(loss, alpha)) / (1 - eps))
    if not radius <= ball:
        return None
    eta = below(2 * eps / Fraction(beta))
    return LocalPLNumbers(loss, alpha, eps_, radius, eta, min(1.0, below((1 - eps) * Fraction(alpha) * Fraction(eta))))


def least_ball(holds: Callable[[Fraction], bool], low: float, high: float) -> float | None:
    """Return the least R in [low, high] for which `holds`, if it holds from there to `high`; None if not at `high`.

    Args:
        holds: an exact test of a radius.
        low: > 0, a radius at or below the least one.
        high: >= low, where the test has the best chance.
    """
    if not holds(Fraction(high)):
        return None
    while high > low * (1 + 2.0**-40):
        middle = math.sqrt(low) * math.sqrt(high)
        if not low < middle < high:
            break
        if holds(Fraction(middle)):
            high = middle
        else:
            low = middle
    return high


def best_ball(
    loss: float, alpha: Callable[[float], float], upto: float, *, epsilon: float = 0.0, points: int = 400
) -> float | None:
    """Return the smallest ball found on which 4 f0 < (1-eps)^2 R^2 alpha(R); it has the largest alpha, the best rate.

    Radii are tried on a geometric grid, then between two of its points.

    Args:
        loss: f0, an upper bound, > 0.
        alpha: R -> a lower bound of alpha on the ball of radius R; non-increasing.
        upto: the largest radius that is tried, finite.
        epsilon: in [0, 1); 0 for the flow.
        points: of the grid, which ends at `upto` and begins at 1e-8 of it.

    Returns:
        R, or None if no radius of the grid will do.

    Example:
        >>> round(best_ball(0.5, lambda R: 2 * max(0.0, 4 - R) ** 2, 4.0), 4)  # R (4 - R) > 1
        0.2679
    """
    if not (upto > 0 and math.isfinite(upto) and points >= 2):
        raise InputError(f"upto={upto!r}, points={points!r}: give a finite radius above 0 and at least 2 points")

    def holds(R: float | Fraction) -> bool:
        least = alpha(float(R))
        return least > 0 and 4 * Fraction(loss) < ((1 - Fraction(epsilon)) * Fraction(R)) ** 2 * Fraction(least)

    grid = [upto * 1e-8 ** (1 - k / (points - 1)) for k in range(points)]
    before = grid[0]
    for R in grid:
        if holds(R):
            return least_ball(holds, before, R)
        before = R
    return None


def ball_from_jacobian(residual: float, sigma_min: float, beta: float, epsilon: float = 0.0) -> float | None:
    """Return the least R with rho < (1-eps) R (s0 - beta R), for E = 1/2 ||F - y||^2 and s_min(J) >= s0 - beta s.

    There is one if and only if q = beta rho/s0^2 < (1-eps)/4 (Prop. 22); alpha on it is 2 (s0 - beta R)^2.

    Args:
        residual: rho, an upper bound, >= 0.
        sigma_min: s0, a lower bound, > 0.
        beta: Lipschitz constant of J, an upper bound, >= 0.
        epsilon: in [0, 1).

    Example:
        >>> round(ball_from_jacobian(1.0, 4.0, 1.0), 4), ball_from_jacobian(4.0, 4.0, 1.0)
        (0.2679, None)
    """
    if not sigma_min > 0 or not math.isfinite(residual) or not math.isfinite(beta):
        return None
    rho, s0, b, keep = Fraction(residual), Fraction(sigma_min), Fraction(beta), 1 - Fraction(epsilon)
    low = below(rho / (keep * s0)) or 5e-324
    high = max(low * (1 + 2.0**-30), 1e-300) if b == 0 else float(s0 / (2 * b))
    return least_ball(lambda R: keep * R * (s0 - b * R) > rho, min(low, high), high)


def path_integral(
    loss: float, A: Callable[[float], float], ball: float, *, points: int = 2000
) -> tuple[float, float] | None:
    """Return s1 with 1/2 int_0^s1 A > sqrt(f0), and the rate min A^2 up to it; None if R is too small (Prop. 9).

    The integral is bounded from below by its values at the right of each piece.

    Args:
        loss: f0, an upper bound, >= 0.
        A: s -> a lower bound of ||grad f||/sqrt(f) at distance s and below; non-increasing.
        ball: R, finite: how far A holds.
        points: how many pieces.

    Raises:
        InputError: A grows.

    Example:
        >>> path_integral(1.0, lambda s: 2 - s, 2.0) is None  # 1/2 (2 s - s^2/2) = 1 at s = 2 only, where A = 0
        True
        >>> s1, rate = path_integral(0.75, lambda s: 2.0, 2.0)
        >>> round(s1, 2), rate
        (0.87, 4.0)
    """
    if not (ball > 0 and math.isfinite(ball)):
        raise InputError(f"ball={ball!r} must be a finite radius above 0")
    wanted, total = 2 * Fraction(sqrt_above(Fraction(loss))), Fraction(0)
    grid = [ball * k / points for k in range(points + 1)]
    last = math.inf
    for s, t in pairwise(grid):
        least = A(t)
        if least > last:
            raise InputError(f"A grows from {last!r} to {least!r} at {t!r}; give a non-increasing lower bound")
        last = least
        if least <= 0:
            return None
        total += (Fraction(t) - Fraction(s)) * Fraction(least)
        if total > wanted:
            return t, below(Fraction(least) ** 2)
    return None


# ----------------------------------------------------------------------------------------------------------------------


def first_layer_bound(X: Tensor, V: Tensor) -> Measurement:
    """Return lambda_min(X X^T + 1 1^T) min_i lambda_min(V_i V_i^T) <= lambda_min(K), verified (Prop. 10).

    K is a sum of Grams, one a layer; that of a first dense layer with bias is the Schur product of X X^T + 1 1^T and
    V V^T, and lambda_min(A o B) >= lambda_min(A) min_i lambda_min(B_ii). It costs N^2 d + N^3/3.

    Args:
        X: (N, ...) inputs, flattened here; no number is rounded.
        V: (N, C, m) or, with one output, (N, m): the gradient of output c of sample i with respect to what the first
            layer gives before its activation. The claim is about these numbers.

    Returns:
        a lower bound, 0 where nothing positive is known. Its details: "inputs" and "backward", the two factors.

    Raises:
        InputError: shapes that do not fit, or numbers that are not finite.

    Example:
        >>> X = torch.eye(3, dtype=torch.float64)
        >>> found = first_layer_bound(X, torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, 6.0]]))
        >>> round(found.value, 3), found.level  # 1 times 25
        (25.0, 'verified')
    """
    X = X.detach().flatten(1).double()
    V = V.detach().double()
    V = V.unsqueeze(1) if V.dim() == 2 else V
    if V.dim() != 3 or len(V) != len(X) or not len(X):
        raise InputError(f"V of shape {tuple(V.shape)} does not fit {len(X)} inputs; give (N, C, m), or (N, m)")
    if not (torch.isfinite(X).all() and torch.isfinite(V).all()):
        raise InputError("X or V hold NaN or infinite numbers; leave those samples out")
    inputs = _gram_min(torch.cat([X, X.new_ones(len(X), 1)], 1))
    backward = min(_gram_min(v) for v in V) if V.shape[1] > 1 else _least_square(V[:, 0])
    notes = ()
    if inputs == 0:
        notes = ("[X, 1] is not shown to have rank N: there must be at most d + 1 samples, and no near-duplicates",)
    elif backward == 0:
        notes = ("some V_i has no positive lower bound",)
    return Measurement(
        "lambda_min(K)",
        down(inputs * backward) if inputs * backward > 0 else 0.0,
        "lower bound",
        "verified",
        "first-layer bound: lambda_min(X X^T + 1 1^T) min_i lambda_min(V_i V_i^T)",
        samples=len(X),
        notes=notes,
        details={"inputs": inputs, "backward": backward},
    )


def first_layer_decay(bound: Measurement, lipschitz: float) -> tuple[float, float]:
    """Return s0 and beta with s_min(J) >= s0 - beta s at distance s, from `first_layer_bound`.

    a(s) = sqrt(lambda_min(X X^T + 1 1^T)) max(0, min_i s_min(V_i) - Lip s).

    Args:
        bound: of `first_layer_bound`.
        lipschitz: of every V_i, in the operator norm, on the ball; an upper bound, >= 0.
    """
    inputs, backward = Fraction(bound.details["inputs"]), Fraction(bound.details["backward"])
    return sqrt_below(inputs * backward), above(Fraction(sqrt_above(inputs)) * Fraction(lipschitz))


def _gram_min(M: Tensor) -> float:
    """Return a lower bound of lambda_min(M M^T), 0 where none is positive."""
    top = float(M.abs().max())
    if top == 0 or M.shape[0] > M.shape[1]:
        return 0.0
    scale = power_of_two(top)
    G, error = gram(M * scale)
    # scaling may have lost numbers below the smallest normal one
    found = lambda_min(G, perturbation=up(error + 4 * M.numel() * TINY)).value
    return max(0.0, down(down(found / scale) / scale)) if found > 0 else 0.0


def _least_square(V: Tensor) -> float:
    """Return a lower bound of min_i ||v_i||^2 for the rows of V."""
    top = float(V.abs().max())
    if top == 0:
        return 0.0
    scale = power_of_two(top)
    least = float((V * scale).square().sum(1).min())
    least = down(least * down(1 - gam(V.shape[1] + 2))) - 8 * V.shape[1] * TINY
    return max(0.0, down(down(least / scale) / scale))


# ----------------------------------------------------------------------------------------------------------------------


def check_local_pl(
    loss: Measurement,
    alpha: Measurement,
    smoothness: Measurement | None = None,
    *,
    ball: float = math.inf,
    epsilon: float | None = None,
    target: float | None = None,
    ratio: Measurement | None = None,
    refutations: Sequence[Finding] = (),
) -> Verdict:
    """Hold the local criterion against measurements, all of the loss that is trained and in its units.

    Args:
        loss: f(x0), an upper bound; f >= 0.
        alpha: inf ||grad f||^2/f on the ball, a lower bound.
        smoothness: Lipschitz constant of grad f on the ball where f <= f(x0), an upper bound; None: for gradient flow.
        ball: R, the radius on which they hold.
        epsilon: in (0, 1), for steps; None: the best for the rate.
        target: a loss > 0 to say the number of steps (the time) for.
        ratio: ||grad f||^2/(2 f) at the weights, from `surefoot.measure.pl_ratio`: alpha is at most twice that,
            which can refute the criterion and proves nothing.
        refutations: what is known already, from `surefoot.theorems.refutations.first` or
            `surefoot.theorems.delta_gclip.uncovered`.

    Returns:
        Verdict: its `numbers` are those of `LocalPLNumbers`; of the flow loss, alpha, radius and rate. With a target
        also steps, or time.

    Raises:
        InputError: an option out of its range.

    Example:
        >>> f0 = Measurement("f(x0)", 4.0, "exact", "verified", "by hand")
        >>> alpha = Measurement("alpha", 1.0, "lower bound", "verified", "by hand")
        >>> beta = Measurement("beta", 4.0, "upper bound", "verified", "by hand")
        >>> v = check_local_pl(f0, alpha, beta, ball=10.0, target=1e-6)
        >>> v.outcome.value, v.numbers["radius"], v.numbers["eta_max"], v.numbers["steps"]
        ('proved', 8.0, 0.25, 114.0)
        >>> bool(check_local_pl(f0, alpha, beta, ball=3.0))
        False
    """
    _check_options(epsilon, target, ball)
    findings = [*refutations, bounded(loss, "upper bound"), bounded(alpha, "lower bound")]
    if smoothness is not None:
        findings.append(bounded(smoothness, "upper bound"))
    f0, a, b = float(loss), float(alpha), math.nan if smoothness is None else float(smoothness)
    if f0 < 0:
        raise InputError(f"loss={f0!r} is negative; the theorem is about f >= 0: subtract a number f never falls below")
    findings.append(_positive(a))
    flow = smoothness is None
    found = None if flow else local_pl(f0, a, b, ball=ball, epsilon=epsilon)
    radius = flow_radius(f0, a) if flow else found.radius if found else math.inf
    holds = radius < ball if flow else found is not None
    findings.append(_criterion(loss, a, ball, holds, radius, ratio, epsilon, flow=flow))
    claimed = _refutes(alpha, "lower bound")
    if ratio is not None and claimed and _refutes(ratio, "upper bound") and a > 2 * float(ratio) * (1 + CLOSE):
        findings.append(
            Finding(
                "alpha <= ||grad f||^2/f at the weights",
                Outcome.REFUTED,
                f"alpha >= {a:.4g}, the ratio is {2 * float(ratio):.4g}",
                "measure again: are both of the same loss, in the same units?",
            )
        )
    contradicts = claimed and smoothness is not None and _refutes(smoothness, "upper bound")
    if contradicts and found is not None and a > 2 * b and found.radius < ball:
        findings.append(
            Finding(
                "alpha <= 2 beta",
                Outcome.REFUTED,
                f"alpha >= {a:.4g} and beta <= {b:.4g} cannot both hold on the ball",
                "measure again: are both of the same loss, in the same units?",
            )
        )
    numbers, conclusion = _conclusion(f0, a, found, radius, target) if holds else ({}, "")
    return conclude(
        THEOREM,
        tuple(findings),
        tuple(m for m in (loss, alpha, smoothness, ratio) if m is not None),
        conclusion=conclusion,
        numbers=numbers,
        source=SOURCE_FLOW if flow else SOURCE_STEPS,
    )


def check_local_pl_jacobian(
    residual: Measurement,
    sigma_min: Measurement,
    beta: Measurement,
    jacobian_norm: Measurement,
    *,
    ball: float = math.inf,
    epsilon: float | None = None,
    target: float | None = None,
    refutations: Sequence[Finding] = (),
) -> Verdict:
    """Hold the local criterion against what is known of the Jacobian, for E = 1/2 ||F - y||^2 and steps on E.

    It looks for the least ball on which s_min(J) >= s0 - beta R is large enough; grad E is (L^2 + beta rho)-Lipschitz
    where E <= E(w0). The path-length theorem needs q to be half as small only, on the same constants.

    Args:
        residual: rho = ||F(w0) - y||, an upper bound.
        sigma_min: s0, of J(w0), a lower bound.
        beta: Lipschitz constant of J on the ball, an upper bound.
        jacobian_norm: L >= ||J|| on the ball, an upper bound.
        ball: R, the radius on which beta and jacobian_norm hold.
        epsilon: in (0, 1); None: (1 - 4 q)/2.
        target: a value of E > 0 to say the number of steps for.
        refutations: what is known already.

    Returns:
        Verdict: its `numbers` are those of `LocalPLNumbers`, q and ball, the radius R used; its `criteria` those of the
        path-length theorem.
    """
    _check_options(epsilon, target, ball)
    rho, s0, b, L = (float(m) for m in (residual, sigma_min, beta, jacobian_norm))
    q = above(Fraction(b) * Fraction(rho) / Fraction(s0) ** 2) if s0 > 0 and math.isfinite(b * rho) else math.inf
    eps = epsilon if epsilon is not None else max(math.floor((1 - 4 * q) / 2 * 2**20) / 2**20, 0.0) if q < 1 else 0.0
    findings = [
        *refutations,
        bounded(residual, "upper bound"),
        bounded(sigma_min, "lower bound"),
        bounded(beta, "upper bound"),
        bounded(jacobian_norm, "upper bound"),
    ]
    R = ball_from_jacobian(rho, s0, b, eps) if 0 < eps < 1 else None
    found = None if R is None else _on_ball(rho, s0, b, L, R, eps)
    hypothesis = "q = beta rho/s0^2 < (1 - epsilon)/4"
    if found is None:
        findings.append(
            Finding(
                hypothesis,
                Outcome.UNDECIDED,
                f"q <= {q:.4g}, epsilon = {eps:.4g}" if s0 > 0 else f"s0 >= {s0:.4g} only",
                "the path-length theorem asks for half as much; or a smaller residual, a larger s_min(J)",
            )
        )
    else:
        findings.append(Finding(hypothesis, Outcome.PROVED, f"q <= {q:.4g}, epsilon = {eps:.4g}"))
        inside = found[1] <= ball
        findings.append(
            Finding(
                "radius <= the ball on which beta and L hold",
                Outcome.PROVED if inside else Outcome.UNDECIDED,
                f"radius {found[1]:.4g}, R = {ball:.4g}",
                "" if inside else "measure beta and the Jacobian's norm on a larger ball",
            )
        )
    numbers, conclusion = {}, ""
    if found is not None:
        local, R = found
        numbers, conclusion = _conclusion(local.loss, local.alpha, local, local.radius, target)
        numbers |= {"q": q, "ball": R}
    return conclude(
        THEOREM,
        tuple(findings),
        (residual, sigma_min, beta, jacobian_norm),
        conclusion=conclusion,
        numbers=numbers,
        criteria=criteria(q, s0, L, eps),
        source=SOURCE_STEPS,
    )


def check_path_integral(
    loss: Measurement,
    slope: Measurement,
    decay: Measurement,
    *,
    ball: float = math.inf,
    target: float | None = None,
    refutations: Sequence[Finding] = (),
) -> Verdict:
    """Hold the path-integral criterion, for gradient flow, against A(s) = A0 - D s (Prop. 9).

    sqrt(f0) < 1/2 int_0^R A, so with D = 0 it is Chatterjee's; otherwise it asks for half as much.

    Args:
        loss: f(x0), an upper bound.
        slope: A0 <= ||grad f||/sqrt(f) at the weights, a lower bound; sqrt(2) s_min(J) for 1/2 ||F - y||^2.
        decay: D, by how much it falls per distance, an upper bound; sqrt(2) beta for 1/2 ||F - y||^2.
        ball: R, the radius on which decay holds.
        target: a loss > 0 to say the time for.
        refutations: what is known already.

    Returns:
        Verdict: its `numbers` are loss, radius (s1) and rate (f falls at least like e^(-rate t)), with a target time.
    """
    _check_options(None, target, ball)
    findings = [
        *refutations,
        bounded(loss, "upper bound"),
        bounded(slope, "lower bound"),
        bounded(decay, "upper bound"),
    ]
    f0, A0, D = float(loss), float(slope), float(decay)
    root = Fraction(sqrt_above(Fraction(f0)))
    s1 = rate = None
    if A0 > 0 and D >= 0 and math.isfinite(D):
        A, d = Fraction(A0), Fraction(D)
        high = min(ball, float(A / d) * (1 - 2.0**-40) if d else math.inf, 1e300)
        low = min(below(2 * root / A) or 5e-324, high)
        s1 = least_ball(lambda s: A * s - d * s * s / 2 > 2 * root, low, min(high, max(low * (1 + 2.0**-30), 1e-300)))
        s1 = s1 or least_ball(lambda s: A * s - d * s * s / 2 > 2 * root, low, high)
        rate = None if s1 is None else below((A - d * Fraction(s1)) ** 2)
    hypothesis = "sqrt(f0) < 1/2 int_0^R A"
    numbers, conclusion = {}, ""
    if s1 is None or rate is None:
        most = 0.0 if A0 <= 0 else A0**2 / D / 4 if D > 0 and D * ball >= A0 else (A0 - D * ball / 2) * ball / 2
        findings.append(
            Finding(
                hypothesis,
                Outcome.UNDECIDED,
                f"sqrt(f0) <= {float(root):.4g}, the integral gives {most:.4g}",
                "a smaller loss to begin with, a larger slope, or a larger ball",
            )
        )
    else:
        findings.append(Finding(hypothesis, Outcome.PROVED, f"s1 <= {s1:.4g}, R = {ball:.4g}"))
        numbers = {"loss": f0, "radius": s1, "rate": rate}
        conclusion = (
            f"gradient flow stays within {s1:.4g} of these weights, ends in f = 0, and f <= e^(-{rate:.4g} t) f0"
        )
        if target is not None:
            numbers["time"] = _time(f0, rate, target)
    return conclude(
        "gradient flow reaches a global minimum nearby (path integral)",
        tuple(findings),
        (loss, slope, decay),
        conclusion=conclusion,
        numbers=numbers,
        source=SOURCE_PATH,
    )


# ----------------------------------------------------------------------------------------------------------------------


def _check_options(epsilon: float | None, target: float | None, ball: float) -> None:
    if epsilon is not None and not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r} must lie between 0 and 1; 0.5 is a good choice, or leave it out")
    if target is not None and not target > 0:
        raise InputError(f"target={target!r} is never reached exactly; give a loss above 0")
    if not ball > 0:
        raise InputError(f"ball={ball!r} must be a radius above 0; inf if the bounds hold everywhere")


def _on_ball(rho: float, s0: float, b: float, L: float, R: float, eps: float) -> tuple[LocalPLNumbers, float] | None:
    """Return the numbers on a ball of radius R, or of one a little larger where rounding has made that too small."""
    E0 = above(Fraction(rho) ** 2 / 2)
    smoothness = above(Fraction(L) ** 2 + Fraction(b) * Fraction(rho))
    for _ in range(20):
        a = Fraction(s0) - Fraction(b) * Fraction(R)
        found = local_pl(E0, below(2 * a * a), smoothness, ball=R, epsilon=eps) if a > 0 else None
        if found is not None:
            return found, R
        R *= 1 + 2.0**-44
    return None


def _positive(alpha: float) -> Finding:
    if alpha > 0:
        return Finding("alpha > 0", Outcome.PROVED, f"alpha >= {alpha:.4g}")
    return Finding("alpha > 0", Outcome.UNDECIDED, f"alpha >= {alpha:.4g} only", "a smaller ball, or a wider network")


def _refutes(m: Measurement, kind: str) -> bool:
    """Whether a number may refute as a bound of this kind: of any level, with room for rounding."""
    return m.kind in (kind, "exact")


def _criterion(
    loss: Measurement,
    alpha: float,
    ball: float,
    holds: bool,
    radius: float,
    ratio: Measurement | None,
    epsilon: float | None,
    *,
    flow: bool,
) -> Finding:
    hypothesis = "4 f(x0) < R^2 alpha" if flow else "4 f(x0) <= (1 - epsilon)^2 R^2 alpha"
    f0 = float(loss)
    if ratio is not None and _refutes(ratio, "upper bound") and _refutes(loss, "lower bound") and f0 > 0:
        most = 2 * float(ratio)
        keep = 1.0 if epsilon is None or flow else 1 - epsilon
        if most == 0 or 4 * f0 > (keep * ball) ** 2 * most * (1 + CLOSE):
            where = "no radius will do" if most == 0 else f"R must exceed {2 * math.sqrt(f0 / most) / keep:.4g}"
            return Finding(
                hypothesis,
                Outcome.REFUTED,
                f"alpha is at most {most:.4g}, the ratio at the weights, and R = {ball:.4g}",
                f"{where}; train to a smaller loss first",
            )
    if holds:
        return Finding(hypothesis, Outcome.PROVED, f"radius {radius:.4g}, R = {ball:.4g}")
    need = flow_radius(f0, alpha)
    return Finding(
        hypothesis,
        Outcome.UNDECIDED,
        f"2 sqrt(f0/alpha) = {need:.4g}, R = {ball:.4g}",
        "alpha and the smoothness on a larger ball, a smaller epsilon, or a smaller loss to begin with",
    )


def _conclusion(
    f0: float, alpha: float, found: LocalPLNumbers | None, radius: float, target: float | None
) -> tuple[dict[str, float], str]:
    nearby = f"a global minimum with f = 0 lies within {radius:.4g} of these weights; "
    if found is None:
        numbers = {"loss": f0, "alpha": alpha, "radius": radius, "rate": alpha}
        text = nearby + f"gradient flow reaches one, and f <= e^(-{alpha:.4g} t) f0"
        if target is not None:
            numbers["time"] = _time(f0, alpha, target)
            text += f"; f <= {target:.4g} from t = {numbers['time']:.4g}"
        return numbers, text
    numbers = {**vars(found)}
    text = nearby + (
        f"steps up to {found.eta_max:.4g}, chosen in any way, reach one; one of {found.eta_max:.4g} multiplies f by at "
        f"most 1 - {found.drop:.4g}"
    )
    if target is not None:
        numbers["steps"] = float(found.steps_to(target))
        text += f"; {numbers['steps']:.6g} such steps bring f to {target:.4g}"
    return numbers, text


def _time(f0: float, rate: float, target: float) -> float:
    return 0.0 if f0 <= target else (math.log(f0) - math.log(target)) / rate * (1 + 1e-12)
