"""L0 and L1 from what a smoothness probe saw: an upper-quantile line with intervals, and the refutation of a claim.

Letters: K observations, R bootstrap resamples, A points on a step; n_k the gradient norm, Lhat_k the smoothness,
u = a ||d|| how far along the step a point lies. phi(t) = (e^t - 1)/t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.measure.noise import mean_noise

Array = np.ndarray[Any, np.dtype[np.float64]]

POINTS = tuple(i / 6 for i in range(1, 7))
FEWEST = 10  # observations that a line is fitted to
ROUNDS = 3  # of the fixed point in L1
_GOLDEN = (math.sqrt(5) - 1) / 2
_CHUNK = 2_000_000  # numbers in memory at once


@dataclass(frozen=True)
class Observation:
    """What one probe of one step saw.

    Attributes:
        step: its number, 1 for the first.
        loss: of the probe's batch, before the step.
        grad_norm: n = ||grad f_B(x)||, before the step, nothing clipped.
        step_length: ||d||, d the step that was taken.
        smoothness: Lhat, the largest of `ratios`; NaN where nothing could be measured.
        noise: sigma² of one sample's gradient; NaN where the batch came in one piece.
        rounding: the error that one gradient is allowed, in its own unit.
        outcome: "measured", "rounding" (nothing stood out of it), "not finite" or "no step".
        ratios: ||grad f_B(x + a d) - grad f_B(x)|| / (a ||d||) at each point a; NaN where the point was dropped.
    """

    step: int
    loss: float
    grad_norm: float
    step_length: float
    smoothness: float
    noise: float
    rounding: float
    outcome: str
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Interval:
    """An estimate between the ends of its interval; NaN where it has no meaning."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Refutation:
    """Whether constants (L0, L1) that somebody claims are contradicted by an observation; truthy if they are.

    Attributes:
        refuted: one observation at least lies above what the constants allow.
        step: where the excess is largest, relative to what is allowed; None where nothing was observed.
        observed: the difference quotient there, less its rounding.
        allowed: (L0 + L1 n) phi(L1 u) there.
        checked: the number of difference quotients that were compared.
    """

    refuted: bool
    L0: float
    L1: float
    step: int | None
    observed: float
    allowed: float
    checked: int

    def __bool__(self) -> bool:
        return self.refuted

    def __str__(self) -> str:
        claim = f"(L0, L1) = ({self.L0:g}, {self.L1:g})"
        if not self.refuted:
            return f"{claim} is not refuted by {self.checked:,} difference quotients, which proves nothing"
        return (
            f"{claim} is refuted at step {self.step}: the gradient changes by {self.observed:.6g} a unit length there, "
            f"and {self.allowed:.6g} is allowed (surefoot, Prop. 6, for the function of that batch)"
        )


@dataclass(frozen=True)
class SmoothnessFit:
    """The line L0 + L1 n over the observations, how sure it is, and what that says about clipping.

    Attributes:
        L0: Measurement of kind "estimate"; `details["interval"]` is its bootstrap interval.
        L1: likewise.
        quantile: the part of the observations that is to lie below the line.
        level: of every interval.
        points: K, the observations that the line was fitted to.
        left_out: how many were not used, by outcome.
        decades: log10(max n / min n).
        spearman: rank correlation of n and Lhat.
        slope: of log Lhat on log n: 0 where L1 n is nothing, 1 where L0 is.
        above: the part of the observations above the line.
        longest: the largest L1 u: where it exceeds 1, Prop. 6's correction is larger than 1.72.
        decision: "not identifiable", "undecided", "L1 ~ 0", "L0 ~ 0" or "both".
        advice: the decision in a sentence.
        noise: sigma², or None.
    """

    L0: Measurement
    L1: Measurement
    quantile: float
    level: float
    points: int
    left_out: Mapping[str, int]
    decades: float
    spearman: Interval
    slope: Interval
    above: float
    longest: float
    decision: str
    advice: str
    noise: Measurement | None = None
    notes: tuple[str, ...] = field(default=())

    def line(self, n: float) -> float:
        """Return L0 + L1 n."""
        return self.L0.value + self.L1.value * n

    def __str__(self) -> str:
        rows = [
            ("L0", _with_interval(self.L0)),
            ("L1", _with_interval(self.L1)),
            ("Spearman(n, L)", str(self.spearman)),
            ("log-log slope", str(self.slope)),
            ("observations", f"{self.points:,}" + "".join(f", {v:,} {k}" for k, v in self.left_out.items() if v)),
            ("range of n", f"{self.decades:.2f} decades"),
            ("above the line", f"{self.above:.1%} (quantile {self.quantile:g})"),
        ]
        if self.noise is not None:
            rows.append(("sigma²", f"{self.noise.value:.4g}"))
        rows.append(("decision", f"{self.decision}: {self.advice}"))
        head = f"smoothness along the steps: an estimate, no certificate ({self.level:.0%} intervals; {self.L0.cost})"
        return "\n".join([head, *(f"  {name:<15} {text}" for name, text in rows), *(f"  {n}" for n in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold; what has no meaning is null."""
        found: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("L0", "L1"):
            found[name] = found[name].to_json()
        found["noise"] = None if self.noise is None else self.noise.to_json()
        for name in ("spearman", "slope"):
            found[name] = {k: _plain(v) for k, v in asdict(found[name]).items()}
        return {**found, "left_out": dict(self.left_out), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SmoothnessFit:
        """Return the fit that `to_json` wrote.

        Raises:
            InputError: a field is missing or unknown.
        """
        if set(document) != set(cls.__dataclass_fields__):
            raise InputError(
                f"document={sorted(document)} is no fit; its fields are {sorted(cls.__dataclass_fields__)}"
            )
        found = dict(document)
        for name in ("L0", "L1"):
            found[name] = Measurement.from_json(found[name])
        found["noise"] = None if found["noise"] is None else Measurement.from_json(found["noise"])
        for name in ("spearman", "slope"):
            found[name] = Interval(**{k: math.nan if v is None else v for k, v in found[name].items()})
        return cls(**{**found, "notes": tuple(found["notes"])})


def phi(t: Any) -> Any:
    """By how much a step of L1 u = t may raise the difference quotient: (e^t - 1)/t, and 1 at 0."""
    t = np.minimum(np.asarray(t, dtype=np.float64), 700.0)
    return np.where(t > 1e-12, np.expm1(t) / np.maximum(t, 1e-12), 1.0)


def envelope(n: Array, L: Array, quantile: float) -> tuple[Array, Array]:
    """Return the line with min_{L0, L1 >= 0} sum_k pinball(L_k - L0 - L1 n_k): the linear program of a quantile.

    pinball(r) = quantile r for r >= 0 and (quantile - 1) r below. For a fixed L1 the best L0 is an order statistic;
    what remains is convex in L1, and golden-section search shrinks its interval 10^11 times. Every row is a program of
    its own; all are solved at once.

    Args:
        n: (R, K) gradient norms, at least 0.
        L: (R, K) smoothness.
        quantile: in (0, 1).

    Returns:
        L0 and L1, (R,) each.
    """
    K = n.shape[1]
    rank = min(K, max(1, math.ceil(quantile * K - 1e-9))) - 1

    def best(L1: Array) -> tuple[Array, Array]:  # (R,) -> L0 and the objective, (R,) each
        rest = L - L1[:, None] * n
        rest.partition(rank, axis=1)
        L0 = np.maximum(rest[:, rank], 0.0)
        rest -= L0[:, None]
        return L0, quantile * rest.sum(1) - np.minimum(rest, 0.0).sum(1)

    with np.errstate(divide="ignore", invalid="ignore"):
        steepest = np.where(n > 0, L / n, 0.0).max(1)  # beyond it every observation lies below a line with L0 = 0
    low, high = np.zeros(len(n)), steepest
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = best(left)[1], best(right)[1]
    for _ in range(53):
        smaller = at_left <= at_right
        low, high = np.where(smaller, low, left), np.where(smaller, right, high)
        new = np.where(smaller, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = best(new)[1]
        left, right = np.where(smaller, new, right), np.where(smaller, left, new)
        at_left, at_right = np.where(smaller, at_new, at_right), np.where(smaller, at_left, at_new)
    L1 = np.where(best(np.zeros(len(n)))[1] <= np.minimum(at_left, at_right), 0.0, (low + high) / 2)
    return best(L1)[0], L1


def corrected_envelope(n: Array, ratios: Array, u: Array, quantile: float) -> tuple[Array, Array, Array]:
    """Return the envelope after dividing each difference quotient by phi(L1 u): surefoot, Prop. 6.

    A step of length u may raise the quotient by phi(L1 u) over what (L0, L1) allow at its beginning. L1 is what is
    sought, so fit, correct, fit again, three times.

    Args:
        n: (R, K) gradient norms.
        ratios: (R, K, A) difference quotients, NaN where a point was dropped; one a row is there at least.
        u: (R, K, A) how far from the beginning of the step each was taken.
        quantile: in (0, 1).

    Returns:
        L0 and L1, (R,) each, and the corrected smoothness, (R, K).
    """
    L = np.nanmax(ratios, axis=2)
    L0, L1 = envelope(n, L, quantile)
    for _ in range(ROUNDS):
        if float((L1[:, None, None] * u).max()) < 1e-8:  # of steps this short phi is 1
            break
        L = np.nanmax(ratios / phi(L1[:, None, None] * u), axis=2)
        L0, L1 = envelope(n, L, quantile)
    return L0, L1, L


def blocks(K: int, resamples: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the rows of a moving-block bootstrap: (R, K) indices, in blocks of about sqrt(K) successive ones."""
    length = max(1, round(math.sqrt(K)))
    starts = np.random.default_rng(seed).integers(0, K - length + 1, (resamples, -(-K // length)))
    return (starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, :K]


def fit_smoothness(
    observations: Sequence[Observation],
    *,
    points: Sequence[float] = POINTS,
    quantile: float = 0.9,
    level: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
    dtype: str = "float64",
    cost: str = "",
) -> SmoothnessFit:
    """Fit L0 + L1 n over the observations, as `SmoothnessProbe.fit` does.

    Args:
        observations: of successive probes, in order; those that could not be measured are left out.
        points: the a at which every observation's ratios were taken.
        quantile: the part of the observations that is to lie below the line, in [0.5, 1).
        level: of the intervals, in (0, 1).
        resamples: of the moving-block bootstrap, at least 100.
        seed: of the bootstrap.
        dtype: of the gradients.
        cost: what a probe took, for the reader.

    Returns:
        The line with everything that says how far it may be trusted.

    Raises:
        InputError: fewer than ten observations, or an option out of its range.

    Example:
        >>> seen = [Observation(k, 1.0, n, 1e-3, 2 + n, 0.0, 0.0, "measured", (2 + n,) * 6)
        ...         for k, n in enumerate([10 ** (i / 9) for i in range(10)])]
        >>> fit = fit_smoothness(seen)
        >>> round(fit.L0.value, 2), round(fit.L1.value, 2)
        (2.0, 1.0)
    """
    for name, value, low, high in (("quantile", quantile, 0.5, 1.0), ("level", level, 0.0, 1.0)):
        if not low <= value < high or value == 0:
            raise InputError(f"{name}={value!r} is outside [{low:g}, {high:g}); give for example {name}=0.9")
    if resamples < 100:
        raise InputError(f"resamples={resamples!r} is too few for an interval; give at least 100")
    used = [o for o in observations if o.outcome == "measured"]
    if len(used) < FEWEST:
        raise InputError(
            f"observations: {len(used)} of {len(observations)} could be used, and a line takes {FEWEST}; "
            "probe more steps"
        )
    n = np.array([o.grad_norm for o in used])
    ratios = np.array([o.ratios for o in used], dtype=np.float64)
    u = np.array([o.step_length for o in used])[:, None] * np.array(points)
    rounding = np.array([o.rounding / o.step_length for o in used])
    L0, L1, L = (x[0] for x in corrected_envelope(n[None], ratios[None], u[None], quantile))

    rows = blocks(len(used), resamples, seed)
    chunk = max(1, _CHUNK // ratios.size)
    pairs = [
        corrected_envelope(n[some], ratios[some], u[some], quantile)[:2]
        for some in (rows[i : i + chunk] for i in range(0, resamples, chunk))
    ]
    L0s, L1s = (np.concatenate(found) for found in zip(*pairs))
    # Without noise an interval is a point, and rounding alone would put the truth beside it.
    spread = float(np.median(rounding))
    ends = {}
    for name, draws, value, error in (("L0", L0s, L0, spread), ("L1", L1s, L1, spread / max(float(n.max()), 1e-300))):
        low, high = bootstrap_ends(draws, float(value), level, max(4.0, math.sqrt(len(used)) - 1))
        ends[name] = (max(0.0, low - error), high + error)
    spearman = _interval(_correlation, _ranks(n), _ranks(L), rows, level)
    seen = (n > 0) & (L > 0)
    log_n, log_L = (np.log(np.where(seen, x, 1.0)) for x in (n, L))
    slope = _interval(_slope, log_n, log_L, rows, level) if seen.all() else Interval(math.nan, math.nan, math.nan)
    positive = n[n > 0]
    decades = math.log10(float(positive.max()) / float(positive.min())) if positive.size else 0.0
    decision, advice = decide(decades, slope)
    longest = float(L1) * float(u.max())
    notes = (
        () if longest <= 1 else (f"steps are long: L1 u reaches {longest:.3g}, where the correction for it is rough",)
    )

    def measured(name: str, value: float, draws: Array) -> Measurement:
        return Measurement(
            name,
            float(value),
            "estimate",
            "estimate",
            f"line below which {quantile:g} of the steps' difference quotients lie, corrected for the steps' length",
            samples=len(used),
            seed=seed,
            dtype=dtype,
            error=float(draws.std(ddof=1)),
            cost=cost,
            notes=("a lower bound of the curvature along the steps: it refutes, it certifies nothing", *notes),
            details={"interval": list(ends[name]), "level": level, "resamples": resamples, "quantile": quantile},
        )

    return SmoothnessFit(
        L0=measured("L0", L0, L0s),
        L1=measured("L1", L1, L1s),
        quantile=quantile,
        level=level,
        points=len(used),
        left_out={name: sum(o.outcome == name for o in observations) for name in ("rounding", "not finite", "no step")},
        decades=decades,
        spearman=spearman,
        slope=slope,
        above=float(((L0 + L1 * n) * (1 + 1e-9) < L).mean()),
        longest=longest,
        decision=decision,
        advice=advice,
        noise=mean_noise([o.noise for o in observations], dtype=dtype),
        notes=notes,
    )


def decide(decades: float, slope: Interval) -> tuple[str, str]:
    """Return the word for what the observations tell about L0 and L1, and what it means for clipping.

    A slope counts as 0 or 1 within 0.1.
    """
    if decades < 0.5:
        return (
            "not identifiable",
            f"the gradient norm ranged over {decades:.2g} decades, and half a decade is needed to tell L0 from L1 n; "
            "probe more of the run, or with a larger step",
        )
    zero, one = slope.low <= 0.1, slope.low <= 1.1 and slope.high >= 0.9
    if math.isnan(slope.low) or (zero and one):
        return "undecided", "the log-log slope may be 0 or 1; probe more steps"
    if zero:
        return "L1 ~ 0", "the curvature does not grow with the gradient: clipping only as a safety net"
    if one or slope.low > 1.1:
        return "L0 ~ 0", "the curvature grows in proportion to the gradient: normalise, clip at a small threshold"
    return "both", "the curvature grows with the gradient from a floor: clip, the threshold near L0/L1"


def refutation(
    observations: Sequence[Observation], L0: float, L1: float, *, points: Sequence[float] = POINTS
) -> Refutation:
    """Compare every difference quotient with what (L0, L1) allow: surefoot, Prop. 6.

    If ||Hess f|| <= L0 + L1 ||grad f|| on the segment, then with u = a ||d||

        ||grad f(x + a d) - grad f(x)|| / u <= (L0 + L1 n) (e^{L1 u} - 1)/(L1 u).

    One quotient above, by more than ten times the rounding of two gradients, refutes the constants for the function of
    that batch. Quotients below certify nothing.

    Args:
        observations: of probes.
        L0: claimed, at least 0.
        L1: claimed, at least 0.
        points: the a at which every observation's ratios were taken.

    Returns:
        A Refutation: truthy if the claim is refuted.

    Raises:
        InputError: a claim that is negative or no finite number.

    Example:
        >>> seen = [Observation(1, 1.0, 1.0, 1e-3, 3.0, 0.0, 1e-16, "measured", (3.0,))]
        >>> bool(refutation(seen, 2.0, 0.5, points=[1.0])), bool(refutation(seen, 2.0, 1.0, points=[1.0]))
        (True, False)
    """
    for name, value in (("L0", L0), ("L1", L1)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name}={value!r} is no finite number of at least 0; give the constant that is claimed")
    worst: tuple[int | None, float, float] = (None, 0.0, 0.0)
    excess, checked = -math.inf, 0
    for o in observations:
        for a, ratio in zip(points, o.ratios):
            if math.isnan(ratio):
                continue
            checked += 1
            u = a * o.step_length
            allowed = (L0 + L1 * o.grad_norm) * float(phi(L1 * u))
            slack = 10 * (2 * o.rounding / u + (o.rounding / o.grad_norm * ratio if o.grad_norm else 0.0))
            observed = ratio - slack
            relative = (observed - allowed) / max(allowed, 1e-300)
            if relative > excess:
                excess, worst = relative, (o.step, observed, allowed)
    return Refutation(excess > 0, L0, L1, *worst, checked)


def bootstrap_ends(draws: Array, value: float, level: float, dof: float) -> tuple[float, float]:
    """Return the ends of an interval for a constant that is at least 0: all that two intervals cover.

    The percentile interval alone is too short at an upper quantile: with a hundred observations it holds L1 in 85 of
    100 runs where 95 are promised. So it is joined with value ± t SE, t of Student's distribution with as many degrees
    of freedom as there are independent blocks, less one.

    Args:
        draws: (R,) resampled values.
        value: the estimate.
        level: of the interval.
        dof: degrees of freedom.
    """
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    reach = student(level, dof) * float(draws.std(ddof=1))
    return max(0.0, min(float(low), value - reach)), max(float(high), value + reach)


def student(level: float, dof: float) -> float:
    """Return the t with P(|T| < t) = level, by Cornish and Fisher's expansion: to 2% from 4 degrees of freedom on."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    return z + (z**3 + z) / (4 * dof) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)


def _interval(statistic: Any, x: Array, y: Array, rows: Any, level: float) -> Interval:
    """Return a statistic of (x, y) with its percentile interval; NaN where it has no meaning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, draws = float(statistic(x[None], y[None])[0]), statistic(x[rows], y[rows])
    draws = draws[np.isfinite(draws)]
    if not math.isfinite(value) or not draws.size:
        return Interval(math.nan, math.nan, math.nan)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _slope(x: Array, y: Array) -> Array:  # (R, K) -> (R,)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return (x * y).sum(1) / (x * x).sum(1)


def _correlation(x: Array, y: Array) -> Array:  # (R, K) -> (R,)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def _ranks(x: Array) -> Array:
    """Return the ranks, equal values sharing theirs."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[where]


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with_interval(m: Measurement) -> str:
    low, high = m.details["interval"]
    return str(Interval(m.value, low, high))
