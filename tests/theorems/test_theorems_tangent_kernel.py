"""Liu-Zhu-Belkin and Oymak-Soltanolkotabi, in the form kept here: bounds at every step, limits on q, honesty."""

import math

import numpy as np
import pytest
import torch
from jacobian_problems import descend, measured, problem

from surefoot.errors import InputError
from surefoot.theorems.path_length import check_path_length, criteria
from surefoot.theorems.refutations import duplicate_inputs, fewer_parameters, first
from surefoot.theorems.tangent_kernel import (
    Form,
    check_tangent_kernel,
    kernel_by_hessians,
    kernel_on_ball,
    published,
    tangent_kernel,
)
from surefoot.theorems.verdict import Outcome

FORMS: tuple[Form, ...] = ("liu-zhu-belkin", "oymak-soltanolkotabi")


def hold_at_every_step(rng: np.random.Generator, form: Form, share: float) -> tuple[float, float]:
    """Return path/radius and E_T/E_0, for a q that is this share of the limit."""
    seed = int(rng.integers(2**31))
    unit = problem(np.random.default_rng(seed), 1.0)
    limit = 2 / 27 * unit.s0 / unit.L if form == "liu-zhu-belkin" else 1 / 16
    p = problem(np.random.default_rng(seed), share * limit)
    v = check_tangent_kernel(*p.measurements(), form=form)
    assert v, v
    n, t, at = v.numbers, 0, None
    for t, at in enumerate(descend(p, [n["eta_max"]] * 60), 1):
        assert at.before * (1 - n["drop"]) * (1 + 1e-9) >= at.E
        assert n["loss"] * (1 - n["drop"]) ** t * (1 + 1e-9) >= at.E
        assert at.path <= n["radius"]
        assert np.linalg.norm(at.distance) <= n["radius"]
    assert at is not None
    assert t > 1
    return at.path / n["radius"], at.E / n["loss"]


@pytest.mark.parametrize("form", FORMS)
def test_bound_holds_at_every_step_of_random_problems(form: Form) -> None:
    rng = np.random.default_rng(0)
    seen = [hold_at_every_step(rng, form, share) for share in rng.uniform(0.05, 0.999, 110)]
    assert max(path for path, _ in seen) > 0.2
    assert sum(left < 0.2 for _, left in seen) > 30


@pytest.mark.nightly
@pytest.mark.parametrize("form", FORMS)
def test_bound_holds_on_a_thousand_problems(form: Form) -> None:
    rng = np.random.default_rng(1)
    for share in rng.uniform(0.01, 0.999, 1000):
        hold_at_every_step(rng, form, share)


@pytest.mark.parametrize("form", FORMS)
def test_the_limit_on_q_is_that_of_the_table(form: Form) -> None:
    rng = np.random.default_rng(2)
    name = "Liu-Zhu-Belkin" if form == "liu-zhu-belkin" else "Oymak-Soltanolkotabi"
    for _ in range(100):
        s0, beta, L = 1.0, float(rng.uniform(0.1, 10)), float(rng.uniform(1, 5))
        limit = 2 / 27 * s0 / L if form == "liu-zhu-belkin" else 1 / 16
        for share in (0.999, 1.001):
            rho = share * limit * s0**2 / beta
            found = tangent_kernel(rho, s0, beta, L, form)
            assert (found is not None) == (share < 1)
            row = {r.name: r for r in published(rho, s0, beta, L)}[name]
            assert row.holds == (share < 1)


def test_the_radius_is_the_least_with_the_published_form() -> None:
    found = tangent_kernel(0.01, 1.0, 1.0, 2.0)
    assert found
    assert found.mu == kernel_on_ball(1.0, 1.0, found.radius)
    assert found.radius == pytest.approx(2 * 2.0 * 0.01 / found.mu, rel=1e-9)
    assert found.radius >= 2 * 2.0 * 0.01 / found.mu
    other = tangent_kernel(0.01, 1.0, 1.0, 2.0, "oymak-soltanolkotabi")
    assert other
    assert other.radius >= 4 * 0.01 / math.sqrt(other.mu)
    T = found.steps_to(1e-12)
    assert found.loss * (1 - found.drop) ** T <= 1e-12


def test_what_they_prove_the_path_length_theorem_proves_with_a_smaller_radius() -> None:
    rng = np.random.default_rng(3)
    for q in rng.uniform(0.001, 0.02, 100):
        p = problem(rng, q)
        theirs, ours = check_tangent_kernel(*p.measurements()), check_path_length(*p.measurements(), epsilon=0.5)
        assert ours
        if theirs:
            assert ours.numbers["radius"] < theirs.numbers["radius"]


def test_hessians_know_less() -> None:
    rng = np.random.default_rng(4)
    for _ in range(100):
        s0, beta, R, n = (*(float(x) for x in rng.uniform(0.1, 2, 3)), int(rng.integers(1, 9)))
        L = s0 * float(rng.uniform(1, 4)) + beta * R
        # no Hessian of one output exceeds beta, and beta <= sqrt(n) times the largest
        bound = kernel_by_hessians(s0**2, beta, L, n, R)
        assert bound <= kernel_on_ball(s0, beta, R) * (1 + 1e-12) or bound <= 0
    assert kernel_on_ball(1.0, 1.0, 2.0) == 0


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("form", FORMS)
def test_an_estimate_proves_nothing(which: int, form: Form) -> None:
    given = list(problem(np.random.default_rng(5), 0.002).measurements())
    assert check_tangent_kernel(*given, form=form)
    given[which] = measured(given[which].value, "estimate", "estimate")
    v = check_tangent_kernel(*given, form=form)
    assert v.outcome is Outcome.UNDECIDED
    assert not v.numbers


@pytest.mark.parametrize("form", FORMS)
def test_each_hypothesis_counts(form: Form) -> None:
    p = problem(np.random.default_rng(6), 0.002)
    given = p.measurements()
    good = check_tangent_kernel(*given, form=form, target=1e-12)
    assert good
    assert good.numbers["steps"] > 0
    assert check_tangent_kernel(*given, form=form, ball=good.numbers["radius"])
    assert check_tangent_kernel(*given, form=form, ball=good.numbers["radius"] * 0.99).outcome is Outcome.UNDECIDED
    rho, s0, beta, L = given
    assert not check_tangent_kernel(measured(p.rho * 200, "upper bound"), s0, beta, L, form=form)
    assert not check_tangent_kernel(rho, measured(p.s0 / 20, "lower bound"), beta, L, form=form)
    assert not check_tangent_kernel(rho, s0, measured(p.beta * 200, "upper bound"), L, form=form)
    singular = check_tangent_kernel(rho, measured(0.0, "exact"), beta, L, form=form)
    assert singular.outcome is Outcome.REFUTED
    unknown = check_tangent_kernel(rho, measured(0.0, "lower bound"), beta, L, form=form)
    assert unknown.outcome is Outcome.UNDECIDED
    wrong = check_tangent_kernel(rho, s0, beta, measured(p.s0 / 2, "upper bound"), form=form)
    assert wrong.outcome is Outcome.REFUTED
    no = first(fewer_parameters(3, 4))
    assert check_tangent_kernel(*given, form=form, refutations=no).outcome is Outcome.REFUTED
    twice = first(duplicate_inputs(torch.ones(2, 3)))
    assert check_tangent_kernel(*given, form=form, refutations=twice).outcome is Outcome.REFUTED


def test_the_table_is_the_one_of_the_verdicts() -> None:
    rng = np.random.default_rng(7)
    for _ in range(100):
        rho, s0, beta = (float(x) for x in 10 ** rng.uniform(-2, 1, 3))
        L, delta, eps = s0 * float(rng.uniform(1, 9)), float(rng.uniform(0.01, 1)), float(rng.uniform(0.01, 0.9))
        rows = published(rho, s0, beta, L, epsilon=eps, delta=delta)
        assert {r.name: r.holds for r in rows} == criteria(rows[0].q, s0, L, eps, delta)
        assert all(r.holds == (r.q < r.limit) for r in rows)


def test_what_is_recalled_says_so() -> None:
    rows = {r.name: r for r in published(0.1, 1.0, 1.0, 2.0)}
    assert rows["Liu-Zhu-Belkin"].status == rows["Oymak-Soltanolkotabi"].status == "RECALLED"
    assert "RECALLED" in str(rows["Liu-Zhu-Belkin"])
    for form in FORMS:
        v = check_tangent_kernel(*problem(np.random.default_rng(8), 0.002).measurements(), form=form)
        assert "recalled" in v.source
        assert v.source.startswith("surefoot, Prop. 1")


def test_bad_options() -> None:
    given = problem(np.random.default_rng(9), 0.002).measurements()
    with pytest.raises(InputError, match="form"):
        check_tangent_kernel(*given, form="lzb")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="target"):
        check_tangent_kernel(*given, target=0.0)
    with pytest.raises(InputError, match="sigma_min"):
        published(1.0, 0.0, 1.0, 1.0)
    with pytest.raises(InputError, match="delta"):
        published(1.0, 1.0, 1.0, 1.0, delta=0.0)
    with pytest.raises(InputError, match="epsilon"):
        published(1.0, 1.0, 1.0, 1.0, epsilon=1.0)
