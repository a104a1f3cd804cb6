"""The path-length theorem: its numbers exactly, its extremal case, and what it refuses."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.theorems.path_length import (
    PathLengthNumbers,
    best_epsilon,
    check_path_length,
    criteria,
    path_length,
    shortage,
)
from surefoot.theorems.verdict import Outcome, Verdict

positive = st.floats(1e-12, 1e12)


def verified(value: float, kind: str = "upper bound") -> Measurement:
    return Measurement("a number", value, kind, "verified", "by hand")  # type: ignore[arg-type]


def verdict(residual: float = 0.01, sigma: float = 1.0, beta: float = 1.0, L: float = 2.0, **options: float) -> Verdict:
    bounds = verified(residual), verified(sigma, "lower bound"), verified(beta), verified(L)
    return check_path_length(*bounds, **options)


@settings(deadline=None, max_examples=200)
@given(positive, positive, st.one_of(st.just(0.0), positive), positive, st.one_of(st.none(), st.floats(1e-6, 0.999)))
def test_every_inequality_holds_exactly(rho: float, s0: float, beta: float, L: float, epsilon: float | None) -> None:
    found = path_length(rho, s0, beta, L, epsilon)
    q = Fraction(beta) * Fraction(rho) / Fraction(s0) ** 2
    limit = (1 - Fraction(epsilon)) / 2 if epsilon is not None else Fraction(1, 2)
    if found is None:
        assert q > limit * (1 - Fraction(1, 10**6))
        return
    assert q < limit
    r, s, b, eps, S = (Fraction(x) for x in (rho, s0, beta, found.epsilon, found.radius))
    assert 0 < eps < 1
    assert Fraction(found.q) >= q
    assert b * S < s
    assert (1 - eps) * (s * S - b * S * S / 2) >= r
    assert 0 < Fraction(found.sigma_star) <= s - b * S
    assert 0 < Fraction(found.eta_max) * (Fraction(L) ** 2 + b * r) <= 2 * eps
    if epsilon is not None and beta > 0 and q < limit * Fraction(99, 100):
        x = float(q / limit)
        assert found.radius == pytest.approx(s0 / beta * x / (1 + math.sqrt(1 - x)), rel=1e-9)


def test_closed_form() -> None:
    """With q = 0.18 and epsilon = 0.1: x = 0.4, S = 1 - sqrt(0.6)."""
    found = path_length(0.18, 1.0, 1.0, 1.0, 0.1)
    assert found is not None
    assert found.radius == pytest.approx(1 - math.sqrt(0.6), rel=1e-12)
    assert found.sigma_star == pytest.approx(math.sqrt(0.6), rel=1e-12)
    assert found.eta_max == pytest.approx(0.2 / 1.18, rel=1e-12)
    linear = path_length(3.0, 2.0, 0.0, 5.0, 0.25)
    assert linear is not None
    assert linear.radius == pytest.approx(3 / (0.75 * 2), rel=1e-12)
    assert linear.q == 0


def test_the_extremal_network_has_no_nearer_zero() -> None:
    """F(w) = rho - w + w^2/2 has its zero at 1 - sqrt(1 - 2 rho): S tends to that as epsilon tends to 0."""
    for rho in (0.1, 0.3, 0.49):
        found = path_length(rho, 1.0, 1.0, 1.0, 1e-6)
        assert found is not None
        exact = 1 - math.sqrt(1 - 2 * rho)
        assert exact <= found.radius <= exact * 1.01


def test_the_edge() -> None:
    """At q = (1 - epsilon)/2 and above there is nothing: F(w) = rho - w + w^2/2 with rho > 1/2 has no zero at all."""
    assert path_length(0.449, 1.0, 1.0, 1.0, 0.1) is not None
    assert path_length(0.45 * (1 + 1e-12), 1.0, 1.0, 1.0, 0.1) is None
    assert path_length(0.5, 1.0, 1.0, 1.0) is None
    assert path_length(1.0, 0.0, 1.0, 1.0) is None
    assert path_length(1.0, -1.0, 1.0, 1.0) is None
    for bad in ((math.inf, 1.0, 1.0, 1.0), (1e-3, 1.0, math.inf, 1.0), (1e-3, 1.0, 1.0, math.inf)):
        assert path_length(*bad) is None
    assert path_length(1e300, 1e-300, 1e300, 1.0) is None


def test_the_best_epsilon() -> None:
    """(1 - epsilon) eta a^2 at eta_max is eps (1 - eps - 2 q) s0^2 2/(L^2 + beta rho): best at (1 - 2 q)/2."""
    for q in (0.0, 0.1, 0.3, 0.45):
        best = best_epsilon(q)

        def rate(eps: float, q: float = q) -> float:
            return eps * (1 - eps - 2 * q)

        assert all(rate(best) >= rate(best + d) - 1e-12 for d in (-0.01, 0.01) if 0 < best + d < 1)
        assert 0 < best < 1 - 2 * q
    assert best_epsilon(0.5) == 0.0


def test_contraction() -> None:
    found = path_length(0.18, 1.0, 1.0, 1.0, 0.1)
    assert found is not None
    assert found.contraction(0.0) == 1.0
    exact = 1 - (1 - Fraction(0.1)) * Fraction(found.eta_max) * Fraction(found.sigma_star) ** 2
    assert Fraction(found.contraction(found.eta_max)) >= exact
    for step in (-1.0, found.eta_max * 1.000001, math.nan):
        with pytest.raises(InputError, match=r"step=.*eta_max"):
            found.contraction(step)


def test_proved() -> None:
    v = verdict()
    assert v
    assert set(v.numbers) == set(PathLengthNumbers.__dataclass_fields__)
    assert "exact global minimum lies within" in v.conclusion
    assert v.criteria["path length, any steps"]
    assert all(f.outcome is Outcome.PROVED for f in v.findings)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("broken", ["estimate", "other side"])
def test_an_estimate_proves_nothing(which: int, broken: str) -> None:
    kinds = ["upper bound", "lower bound", "upper bound", "upper bound"]
    bounds = [verified(v, k) for v, k in zip((0.01, 1.0, 1.0, 2.0), kinds)]
    if broken == "estimate":
        bounds[which] = Measurement("a number", bounds[which].value, "estimate", "estimate", "sampled")
    else:
        other = "lower bound" if kinds[which] == "upper bound" else "upper bound"
        bounds[which] = verified(bounds[which].value, other)
    v = check_path_length(*bounds)
    assert v.outcome is Outcome.UNDECIDED
    assert v.conclusion == ""
    assert not v.numbers
    assert "verified" in " ".join(f.remedy for f in v.findings)


def test_a_residual_too_large_is_undecided_with_the_factor() -> None:
    v = verdict(residual=50.0)
    assert v.outcome is Outcome.UNDECIDED
    assert "factor 100" in str(v)
    assert "2.0 orders of magnitude" in str(v)
    assert "10 times larger" in str(v)
    assert not v.criteria["path length, any steps"]
    assert "factor 1.11" in str(verdict(residual=0.5, epsilon=0.1))


def test_no_bound_of_s_min_is_undecided() -> None:
    v = verdict(sigma=0.0)
    assert v.outcome is Outcome.UNDECIDED
    assert "duplicate" in str(v)
    assert "duplicate" in shortage(1.0, 0.0, 1.0)


def test_infinite_bounds_are_undecided() -> None:
    assert verdict(beta=math.inf).outcome is Outcome.UNDECIDED
    assert verdict(L=math.inf).outcome is Outcome.UNDECIDED
    assert verdict(residual=math.inf).outcome is Outcome.UNDECIDED


def test_a_ball_too_small_is_undecided() -> None:
    assert verdict(ball=0.1)
    v = verdict(ball=0.001)
    assert v.outcome is Outcome.UNDECIDED
    assert "larger ball" in str(v)


def test_epsilon_out_of_range() -> None:
    for epsilon in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(InputError, match="epsilon="):
            verdict(epsilon=epsilon)


def test_criteria_are_nested() -> None:
    """What an older criterion certifies, this one does."""
    for q in (0.001, 0.05, 0.1, 0.2, 0.3, 0.49, 0.6):
        found = criteria(q, 1.0, 3.0, 0.01)
        order = list(found.values())
        assert order[0] or not any(order)
        assert found["path length, any steps"] or not found["Chatterjee, gradient descent"]
        assert found["Chatterjee, gradient flow"] or not found["Oymak-Soltanolkotabi"]
    assert all(criteria(1e-9, 1.0, 3.0, 0.01).values())
