"""The line: the linear program's optimum, intervals that hold the truth as often as they say, decisions in words."""

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.measure.smoothness_fit import (
    Interval,
    Observation,
    SmoothnessFit,
    blocks,
    corrected_envelope,
    decide,
    envelope,
    fit_smoothness,
    phi,
    student,
)

SEEDS = 200


def observed(n: Any, L: Any, length: float = 1e-9) -> list[Observation]:
    """Observations at one point, of steps so short that they need no correction."""
    return [
        Observation(k, 1.0, float(a), length, float(b), math.nan, 1e-16 * float(a), "measured", (float(b),))
        for k, (a, b) in enumerate(zip(n, L), 1)
    ]


def pinball(n: Any, L: Any, L0: float, L1: float, tau: float) -> float:
    rest = L - L0 - L1 * n
    return float(np.maximum(tau * rest, (tau - 1) * rest).sum())


def test_the_envelope_is_the_optimum_of_the_linear_program() -> None:
    from scipy.optimize import linprog

    rng = np.random.default_rng(0)
    for case in range(40):
        K, tau = int(rng.integers(3, 60)), float(rng.choice([0.5, 0.8, 0.9, 0.95]))
        n = 10 ** rng.uniform(-2, 2, K)
        L = (rng.choice([0.0, 2.0]) + rng.choice([-0.02, 0.0, 1.0]) * n).clip(0) + rng.exponential(1.0, K)
        # variables L0, L1, r+ (K), r- (K): L0 + L1 n + r+ - r- = L
        cost = np.concatenate([[0, 0], np.full(K, tau), np.full(K, 1 - tau)])
        A = np.hstack([np.ones((K, 1)), n[:, None], np.eye(K), -np.eye(K)])
        best = linprog(cost, A_eq=A, b_eq=L)
        L0, L1 = (float(x[0]) for x in envelope(n[None], L[None], tau))
        assert L0 >= 0, case
        assert L1 >= 0, case
        assert pinball(n, L, L0, L1, tau) == pytest.approx(best.fun, rel=1e-8), case


def test_every_row_is_a_problem_of_its_own() -> None:
    rng = np.random.default_rng(1)
    n, L = 10 ** rng.uniform(0, 2, (7, 30)), rng.exponential(1.0, (7, 30))
    together = envelope(n, L, 0.9)
    for i in range(7):
        alone = envelope(n[i : i + 1], L[i : i + 1], 0.9)
        assert (together[0][i], together[1][i]) == (alone[0][0], alone[1][0])


def test_phi() -> None:
    assert [float(phi(t)) for t in (0.0, 1e-14)] == [1.0, 1.0]
    assert [round(float(phi(t)), 2) for t in (0.1, 0.5, 1.0)] == [1.05, 1.3, 1.72]
    assert np.isfinite(phi(np.array([1e4]))).all()


def test_long_steps_are_corrected() -> None:
    """Where f'' = 2 + f', uphill, in steps with L1 u up to 1: what is seen is too large by phi, and is put right."""
    rng = np.random.default_rng(2)
    points = np.array([0.5, 1.0])
    n, u = 10 ** rng.uniform(0, 2, 80), rng.uniform(0.2, 1.0, 80)
    ratios = (2 + n)[:, None] * phi(u[:, None] * points)
    seen = [
        Observation(k, 1.0, float(a), float(b), float(r.max()), math.nan, 0.0, "measured", tuple(map(float, r)))
        for k, (a, b, r) in enumerate(zip(n, u, ratios))
    ]
    raw = [float(x[0]) for x in envelope(n[None], ratios.max(1)[None], 0.9)]
    assert raw[1] > 1.4, "nothing to correct"
    fit = fit_smoothness(seen, points=points)
    assert fit.L1.value == pytest.approx(1.0, rel=0.06)
    assert fit.L0.value == pytest.approx(2.0, rel=0.3)
    assert 0.9 < fit.longest < 1.1


def test_the_correction_takes_the_best_of_the_points() -> None:
    n = np.linspace(1, 10, 12)[None]
    ratios = np.repeat(n[:, :, None], 2, 2).copy()
    ratios[:, ::2, 1] = np.nan
    L0, L1, L = corrected_envelope(n, ratios, np.full((1, 12, 2), 1e-12), 0.9)
    assert np.allclose(L, n)
    assert (float(L0[0]), float(L1[0])) == pytest.approx((0.0, 1.0), abs=1e-6)


def trajectory(rng: Any, K: int) -> Any:
    """Norms that fall over two decades, as along a descent."""
    return 10 ** np.linspace(2, 0, K) * np.exp(0.2 * rng.standard_normal(K))


def quadratic(rng: Any, K: int) -> tuple[Any, Any, float, float]:
    """||A d||/||d|| along random directions of a quadratic with curvatures 1 and 5: L1 = 0."""
    angle = rng.uniform(0, 2 * np.pi, K)
    return trajectory(rng, K), np.hypot(np.cos(angle), 5 * np.sin(angle)), _quantile_of_angles(), 0.0


@cache
def _quantile_of_angles() -> float:
    angle = np.linspace(0, 2 * np.pi, 200_001)
    return float(np.quantile(np.hypot(np.cos(angle), 5 * np.sin(angle)), 0.9))


def exponential(rng: Any, K: int) -> tuple[Any, Any, float, float]:
    """For f = c(e^x - 2x), of which batches have a share between 0.5 and 1: f'' = 2c + f', seen up to a factor."""
    n = trajectory(rng, K)
    return n, (2 + n) * rng.uniform(0.5, 1.0, K), 0.95 * 2, 0.95


def pure_exponential(rng: Any, K: int) -> tuple[Any, Any, float, float]:
    """For f = e^x likewise: L0 = 0."""
    n = trajectory(rng, K)
    return n, n * rng.uniform(0.5, 1.0, K), 0.0, 0.95


@pytest.mark.parametrize("known", [quadratic, exponential, pure_exponential])
def test_the_intervals_hold_the_true_line_as_often_as_they_say(known: Callable[..., Any]) -> None:
    """At 95%, in 200 runs of 60 observations: at least 92%, three standard errors of a count below."""
    held = np.zeros(2)
    lengths = []
    for seed in range(SEEDS):
        n, L, L0, L1 = known(np.random.default_rng(seed), 60)
        fit = fit_smoothness(observed(n, L), points=(1.0,), resamples=100, seed=seed)
        for i, (m, true) in enumerate(((fit.L0, L0), (fit.L1, L1))):
            low, high = m.details["interval"]
            held[i] += low - 1e-9 <= true <= high * (1 + 1e-9)
        low, high = (fit.L1 if L1 else fit.L0).details["interval"]
        lengths.append((high - low) / (L1 or L0))
    assert (held / SEEDS >= 0.92).all(), held / SEEDS
    assert np.median(lengths) < 0.8, "an interval that holds everything says nothing"


def test_exact_observations_have_intervals_of_rounding_alone() -> None:
    n = 10 ** np.linspace(2, 0, 40)
    fit = fit_smoothness(observed(n, np.full(40, 3.0), length=0.1), points=(1.0,))
    low, high = fit.L0.details["interval"]
    assert low <= 3.0 <= high
    assert high - low < 1e-6
    assert fit.decision == "L1 ~ 0"
    fit = fit_smoothness(observed(n, 0.5 * n), points=(1.0,))
    assert fit.L1.value == pytest.approx(0.5)
    assert fit.decision == "L0 ~ 0"
    assert (fit.spearman.value, fit.slope.value) == pytest.approx((1.0, 1.0))


def test_the_fit_says_what_it_is() -> None:
    n, L, *_ = exponential(np.random.default_rng(5), 120)
    fit = fit_smoothness(observed(n, L), points=(1.0,), seed=3, dtype="float32", cost="7 extra gradients every step")
    assert isinstance(fit.L0, Measurement)
    assert (fit.L0.kind, fit.L0.level, fit.L0.dtype, fit.L0.seed, fit.L0.samples) == (
        "estimate",
        "estimate",
        "float32",
        3,
        120,
    )
    assert not fit.L0.proves
    assert fit.above == pytest.approx(0.1, abs=0.02)
    assert fit.decision == "both"
    assert fit.decades == pytest.approx(2.0, abs=0.4)
    assert fit.line(2.0) == fit.L0.value + 2 * fit.L1.value
    text = str(fit)
    for part in ("no certificate", "95% intervals", "7 extra gradients", "Spearman", "log-log slope", "above the line"):
        assert part in text
    assert SmoothnessFit.from_json(json.loads(json.dumps(fit.to_json()))) == fit
    assert fit_smoothness(observed(n, L), points=(1.0,), seed=3).L1.value == fit.L1.value
    with pytest.raises(InputError, match="is no fit"):
        SmoothnessFit.from_json({})


def test_decisions() -> None:
    assert decide(0.4, Interval(1.0, 0.9, 1.1))[0] == "not identifiable"
    assert decide(2.0, Interval(0.0, -0.2, 0.2))[0] == "L1 ~ 0"
    assert decide(2.0, Interval(-0.5, -0.7, -0.3))[0] == "L1 ~ 0"
    assert decide(2.0, Interval(1.0, 0.9, 1.1))[0] == "L0 ~ 0"
    assert decide(2.0, Interval(0.5, 0.3, 0.7))[0] == "both"
    assert decide(2.0, Interval(0.5, -0.1, 1.2))[0] == "undecided"
    assert decide(2.0, Interval(math.nan, math.nan, math.nan))[0] == "undecided"


def test_blocks_are_of_successive_rows() -> None:
    rows = blocks(100, 50, 0)
    assert rows.shape == (50, 100)
    assert (rows.min(), rows.max()) == (0, 99)
    assert (np.diff(rows.reshape(50, 10, 10), axis=2) == 1).all()
    assert (blocks(100, 50, 0) == rows).all()


def test_student() -> None:
    from scipy.stats import t

    for dof in (4, 9, 30):
        assert student(0.95, dof) == pytest.approx(t.ppf(0.975, dof), rel=0.02)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantile": 0.3}, "quantile=0.3"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"level": 0.0}, "level=0.0"),
        ({"level": math.nan}, "level=nan"),
        ({"resamples": 5}, "resamples=5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        fit_smoothness(observed(np.ones(20), np.ones(20)), points=(1.0,), **options)


def test_too_few_observations_are_refused() -> None:
    with pytest.raises(InputError, match="9 of 9 could be used"):
        fit_smoothness(observed(np.ones(9), np.ones(9)), points=(1.0,))
