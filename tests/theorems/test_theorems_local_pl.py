"""Chatterjee's criterion: the bounds at every step of problems with known constants, and every hypothesis counts."""

import math

import numpy as np
import pytest
import torch
from jacobian_problems import Problem, descend, measured, policies, problem
from torch import nn

from surefoot.errors import InputError
from surefoot.measure import Measurement, lambda_min, pl_ratio, tangent_gram
from surefoot.theorems.delta_gclip import uncovered
from surefoot.theorems.local_pl import (
    ball_from_jacobian,
    best_ball,
    check_local_pl,
    check_local_pl_jacobian,
    check_path_integral,
    first_layer_bound,
    first_layer_decay,
    flow_radius,
    largest_epsilon,
    local_pl,
    path_integral,
)
from surefoot.theorems.verdict import Outcome

F0 = measured(4.0, "exact")
ALPHA = measured(1.0, "lower bound")
BETA = measured(4.0, "upper bound")


def hold_at_every_step(rng: np.random.Generator, q: float) -> tuple[float, float]:
    """Return the largest path/radius and E_T/E_0 seen."""
    p = problem(rng, q)
    v = check_local_pl_jacobian(*p.measurements())
    assert v, v
    n = v.numbers
    assert n["radius"] <= n["ball"]
    widest, least = 0.0, 1.0
    for steps in policies(rng, n["eta_max"], 40):
        for at in descend(p, steps):
            factor = 1 - (1 - n["epsilon"]) * n["alpha"] * at.step
            assert at.before * factor * (1 + 1e-9) >= at.E
            assert at.distance <= at.path + 1e-12
            assert at.path <= n["radius"]
            widest, least = max(widest, at.path / n["radius"]), min(least, at.E / n["loss"])
    return widest, least


def test_bound_holds_at_every_step_of_random_problems() -> None:
    rng = np.random.default_rng(0)
    seen = [hold_at_every_step(rng, q) for q in rng.uniform(0.005, 0.245, 120)]
    assert max(path for path, _ in seen) > 0.6
    assert sum(left < 0.2 for _, left in seen) > 30


@pytest.mark.nightly
def test_bound_holds_on_a_thousand_problems() -> None:
    rng = np.random.default_rng(1)
    for q in rng.uniform(0.001, 0.249, 1000):
        hold_at_every_step(rng, q)


def test_flow_of_random_linear_problems() -> None:
    rng = np.random.default_rng(2)
    closest = 0.0
    for _ in range(100):
        n = int(rng.integers(1, 5))
        J, r0 = rng.normal(size=(n, n + 3)), rng.normal(size=n)
        values, U = np.linalg.eigh(J @ J.T)
        f0, alpha = float(r0 @ r0) / 2, 2 * float(values[0]) * (1 - 1e-9)
        v = check_local_pl(measured(f0, "exact"), measured(alpha, "lower bound"), target=f0 / 100)
        assert v
        for t in np.linspace(0, 3 / values[0], 20):
            c = U.T @ r0
            r = U @ (np.exp(-values * t) * c)
            moved = J.T @ (U @ ((1 - np.exp(-values * t)) / values * c))
            assert r @ r / 2 <= math.exp(-v.numbers["rate"] * t) * f0 * (1 + 1e-9)
            assert np.linalg.norm(moved) <= v.numbers["radius"]
            closest = max(closest, float(np.linalg.norm(moved)) / v.numbers["radius"])
        r = np.exp(-values * v.numbers["time"]) * (U.T @ r0)
        assert r @ r / 2 <= f0 / 100
    assert closest > 0.9


def test_radius_of_the_flow_is_attained() -> None:
    """With f = w^2/2 from 1: alpha = 2, and the minimum is 1 away."""
    assert flow_radius(0.5, 2.0) == 1.0
    assert largest_epsilon(0.5, 2.0, ball=1.0) == 0.0
    assert local_pl(0.5, 2.0, 1.0, ball=1.0) is None
    assert local_pl(0.5, 2.0, 1.0, ball=1.01) is not None


def test_path_integral_is_attained_and_asks_for_half() -> None:
    """F = rho - s0 w + beta w^2/2: the first zero is exactly where the integral reaches the residual."""
    s0, beta = 1.0, 1.0
    for rho in (0.1, 0.24, 0.3, 0.49):
        zero = 1 - math.sqrt(1 - 2 * rho)
        slope, decay = math.sqrt(2) * s0 * (1 - 1e-12), math.sqrt(2) * beta * (1 + 1e-12)
        v = check_path_integral(
            measured(rho**2 / 2 * (1 + 1e-12), "upper bound"),
            measured(slope, "lower bound"),
            measured(decay, "upper bound"),
        )
        assert v
        assert zero <= v.numbers["radius"] <= zero * (1 + 1e-8)
        found = path_integral(rho**2 / 2, lambda s: math.sqrt(2) * (1 - s), 0.9999, points=4000)
        assert found
        assert zero <= found[0] <= zero * 1.02 + 1e-3
        assert (ball_from_jacobian(rho, s0, beta) is not None) == (rho < 0.25)
    over = check_path_integral(
        measured(0.125, "upper bound"), measured(math.sqrt(2), "lower bound"), measured(math.sqrt(2), "upper bound")
    )
    assert over.outcome is Outcome.UNDECIDED


def test_path_integral_flow_of_random_problems() -> None:
    """Small Euler steps stand for the flow: a hundredth of what gradient descent may take."""
    rng = np.random.default_rng(3)
    for q in rng.uniform(0.05, 0.49, 100):
        p = problem(rng, q)
        v = check_path_integral(
            measured(p.rho**2 / 2 * (1 + 1e-12), "upper bound"),
            measured(math.sqrt(2) * p.s0 * (1 - 1e-12), "lower bound"),
            measured(math.sqrt(2) * p.beta * (1 + 1e-12), "upper bound"),
        )
        assert v
        h = 0.01 / (p.L**2 + p.beta * p.rho)
        for k, at in enumerate(descend(p, [h] * 60), 1):
            assert at.distance <= v.numbers["radius"]
            assert math.exp(-v.numbers["rate"] * h * k) * v.numbers["loss"] * (1 + 1e-9) >= at.E


def test_growing_slope_is_refused() -> None:
    with pytest.raises(InputError, match="A grows"):
        path_integral(1.0, lambda s: 1 + s, 2.0)
    with pytest.raises(InputError, match="finite radius"):
        path_integral(1.0, lambda s: 1.0, math.inf)


def test_best_ball_agrees_with_the_closed_form() -> None:
    p: Problem = problem(np.random.default_rng(4), 0.2)
    R = best_ball(p.rho**2 / 2, lambda R: 2 * max(0.0, p.s0 - p.beta * R) ** 2, p.s0 / p.beta)
    closed = ball_from_jacobian(p.rho, p.s0, p.beta)
    assert closed is not None
    assert pytest.approx(closed, rel=1e-9) == R
    assert best_ball(p.rho**2, lambda R: 2 * max(0.0, p.s0 - p.beta * R) ** 2, p.s0 / p.beta) is None
    with pytest.raises(InputError, match="upto"):
        best_ball(1.0, lambda R: 1.0, math.inf)


def estimate(m: Measurement) -> Measurement:
    return measured(m.value, "estimate", "estimate")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_estimate_proves_nothing(which: int) -> None:
    given = [F0, ALPHA, BETA]
    assert check_local_pl(*given, ball=10)
    given[which] = estimate(given[which])
    assert check_local_pl(*given, ball=10).outcome is Outcome.UNDECIDED


@pytest.mark.parametrize("which", range(4))
def test_an_estimate_of_the_jacobian_proves_nothing(which: int) -> None:
    given = list(problem(np.random.default_rng(5), 0.1).measurements())
    assert check_local_pl_jacobian(*given)
    given[which] = estimate(given[which])
    assert check_local_pl_jacobian(*given).outcome is Outcome.UNDECIDED


def test_each_hypothesis_counts() -> None:
    assert check_local_pl(F0, ALPHA, BETA, ball=8.0, epsilon=0.5)
    assert not check_local_pl(F0, ALPHA, BETA, ball=7.99, epsilon=0.5)
    assert check_local_pl(F0, ALPHA, BETA, ball=7.99), "a smaller epsilon fits"
    assert not check_local_pl(F0, ALPHA, ball=4.0), "the flow needs 4 f0 < R^2 alpha, not equality"
    assert check_local_pl(F0, ALPHA, ball=4.001)
    assert not check_local_pl(F0, measured(0.0, "lower bound"), BETA)
    assert check_local_pl(F0, measured(9.0, "lower bound"), BETA).outcome is Outcome.REFUTED  # alpha > 2 beta
    assert check_local_pl(F0, ALPHA, BETA, refutations=uncovered(weight_decay=0.1)).outcome is Outcome.REFUTED
    assert check_local_pl(F0, ALPHA, BETA, refutations=uncovered(momentum=0.9)).outcome is Outcome.UNDECIDED
    p = problem(np.random.default_rng(6), 0.24)
    need = check_local_pl_jacobian(*p.measurements()).numbers["ball"]
    assert check_local_pl_jacobian(*p.measurements(), ball=need)
    assert not check_local_pl_jacobian(*p.measurements(), ball=need * 0.99)
    assert not check_local_pl_jacobian(*problem(np.random.default_rng(6), 0.2501).measurements())
    assert not check_local_pl_jacobian(*p.measurements(), epsilon=0.2)


def test_the_ratio_at_the_weights_refutes_and_never_proves() -> None:
    ratio = Measurement("ratio", 0.4, "exact", "estimate", "one gradient")
    small = check_local_pl(F0, measured(0.5, "lower bound"), BETA, ball=4.0, ratio=ratio)
    assert small.outcome is Outcome.REFUTED
    assert "R must exceed 4.47" in str(small)
    assert check_local_pl(F0, estimate(ALPHA), BETA, ball=1.0, ratio=ratio).outcome is Outcome.REFUTED
    assert check_local_pl(F0, estimate(ALPHA), BETA, ratio=ratio).outcome is Outcome.UNDECIDED
    assert check_local_pl(F0, ALPHA, BETA, ratio=ratio).outcome is Outcome.REFUTED, "alpha = 1 > 0.8"
    guess = Measurement("ratio", 0.4, "estimate", "estimate", "a batch")
    assert check_local_pl(F0, measured(0.5, "lower bound"), BETA, ball=4.0, ratio=guess).outcome is Outcome.UNDECIDED
    stuck = Measurement("ratio", 0.0, "exact", "estimate", "one gradient")
    assert check_local_pl(F0, estimate(ALPHA), BETA, ratio=stuck).outcome is Outcome.REFUTED


def test_a_stationary_network_is_refuted_from_its_gradient() -> None:
    """All weights 0: the gradient of the mean-free targets is 0."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    X = torch.randn(4, 3, dtype=torch.float64)
    y = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]], dtype=torch.float64)
    ratio = pl_ratio(model, nn.functional.mse_loss, (X, y))
    loss = measured(ratio.details["loss"], "exact", "estimate")
    assert check_local_pl(loss, measured(1.0, "estimate", "estimate"), ratio=ratio).outcome is Outcome.REFUTED


def test_numbers_and_steps() -> None:
    v = check_local_pl(F0, ALPHA, BETA, ball=10.0, target=1e-3)
    found = local_pl(4.0, 1.0, 4.0, ball=10.0)
    assert found
    assert v.numbers["steps"] == found.steps_to(1e-3)
    T = int(v.numbers["steps"])
    assert 4 * found.contraction(found.eta_max) ** T <= 1e-3 < 4 * found.contraction(found.eta_max) ** (T - 1)
    assert found.steps_to(1e-3, step=found.eta_max / 2) > T
    assert found.contraction(0.0) == 1.0
    with pytest.raises(InputError, match="eta_max"):
        found.contraction(1.0)
    with pytest.raises(InputError, match="eta_max"):
        found.steps_to(1e-3, step=1.0)


def test_steps_that_are_too_long_diverge() -> None:
    """On 1/2 lambda w^2 a step of 2/beta goes nowhere: eta_max, which tends to it, cannot be longer."""
    for eps in (0.5, 0.9, 0.999):
        found = local_pl(0.5, 2.0, 1.0, epsilon=eps)
        assert found
        assert abs(1 - found.eta_max) < 1
        assert abs(1 - found.eta_max * 2.01 / (2 * eps)) > 1


@pytest.mark.parametrize(
    ("options", "word"), [({"epsilon": 1.0}, "epsilon"), ({"target": 0.0}, "target"), ({"ball": 0.0}, "ball")]
)
def test_bad_options(options: dict[str, float], word: str) -> None:
    with pytest.raises(InputError, match=word):
        check_local_pl(F0, ALPHA, BETA, **options)
    with pytest.raises(InputError, match="negative"):
        check_local_pl(measured(-1.0, "exact"), ALPHA, BETA)


# ----------------------------------------------------------------------------------------------------------------------


def backward(model: nn.Sequential, X: torch.Tensor) -> torch.Tensor:
    """V (N, C, m): the gradient of every output in what the first layer gives."""
    z = model[0](X).detach().requires_grad_()
    out = model[1:](z)
    rows = [torch.autograd.grad(out[:, c].sum(), z, retain_graph=True)[0] for c in range(out.shape[1])]
    return torch.stack(rows, 1)


def test_first_layer_bound_is_below_the_kernel() -> None:
    gaps = []
    for seed in range(30):
        torch.manual_seed(seed)
        N, C = 5, 1 + seed % 3
        model = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, C)).double()
        X = torch.randn(N, 7, dtype=torch.float64)
        bound = first_layer_bound(X, backward(model, X))
        true = lambda_min(tangent_gram(model, X), level="estimate").value
        assert 0 < bound.value <= true
        assert bound.proves
        assert bound.kind == "lower bound"
        gaps.append(bound.value / true)
    assert max(gaps) > 0.02


def test_first_layer_bound_of_a_linear_network_is_sharp() -> None:
    """With orthogonal inputs and equal V the Schur product is a multiple of X X^T + 1 1^T."""
    X = torch.randn(4, 6, dtype=torch.float64)
    V = torch.full((4, 1, 9), 2.0)
    Phi = torch.cat([X, torch.ones(4, 1)], 1)
    true = float(torch.linalg.eigvalsh(Phi @ Phi.T * 36)[0])
    bound = first_layer_bound(X, V)
    assert true * (1 - 1e-5) < bound.value <= true
    s0, beta = first_layer_decay(bound, 0.5)
    assert s0**2 <= bound.value
    assert beta == pytest.approx(0.5 * math.sqrt(bound.details["inputs"]))


def test_first_layer_bound_says_why_it_is_zero() -> None:
    X = torch.randn(6, 3, dtype=torch.float64)
    assert "at most d + 1 samples" in first_layer_bound(X, torch.ones(6, 2)).notes[0]
    X = torch.randn(3, 3, dtype=torch.float64)
    equal = torch.ones(3, 2, 4)  # two outputs with the same gradient
    bound = first_layer_bound(X, equal)
    assert bound.value == 0
    assert "V_i" in bound.notes[0]
    with pytest.raises(InputError, match="does not fit"):
        first_layer_bound(X, torch.ones(4, 2))
    with pytest.raises(InputError, match="NaN"):
        first_layer_bound(X * math.nan, torch.ones(3, 2))
