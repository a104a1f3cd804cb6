"""Certified networks trained by the optimizers, every step held against the proof; false ones are caught.

benchmarks/envelope.py runs the long campaign and writes down what it saw.
"""

from collections.abc import Callable

import pytest
from train_certified import RULES, certified, train

from surefoot.train.certified_steps import CertifiedSteps, Step, Violation


@pytest.mark.parametrize("rule", RULES)
def test_no_step_contradicts_a_certificate(rule: str) -> None:
    campaign(rule, networks=5, steps=300)


@pytest.mark.nightly
@pytest.mark.parametrize("rule", RULES)
def test_no_step_contradicts_a_certificate_in_a_long_campaign(rule: str) -> None:
    campaign(rule, networks=50, steps=10_000)


def campaign(rule: str, *, networks: int, steps: int) -> None:
    fell, used, shortened = [], [], []
    for seed in range(networks):
        c = certified(seed)
        claims = c.certificate.claims
        found = train(c, rule, steps, claims, seed=seed)
        assert found.watch.steps == steps
        assert found.worst[1] <= 1
        fell.append(found.watch.residual / claims["residual"])
        used.append(found.watch.path / claims["radius"])
        shortened.append(found.shortened)
    # Not vacuous: the residuals fell, a fair part of the radius was used, and the rule shortened steps.
    assert min(fell) < 0.3
    assert max(fell) < 1
    assert max(used) > 0.1
    assert min(shortened) > 0


@pytest.mark.parametrize(
    ("lie", "direction", "epsilon", "message"),
    [
        (lambda c: {"radius": c["radius"] / 2}, "bottom", 0.3, "beyond the radius"),
        (lambda c: {"eta_max": 4 * c["eta_max"]}, "top", 0.9, "guarantees at most"),
        (lambda c: {"sigma_star": 3 * c["sigma_star"]}, "bottom", 0.3, "guarantees at most"),
        (lambda c: {"epsilon": c["epsilon"] - 0.7, "sigma_star": 2 * c["sigma_star"]}, "bottom", 0.8, "guarantees"),
    ],
    ids=["radius halved", "eta_max times 4", "sigma_star times 3", "rate too good"],
)
def test_a_false_certificate_is_caught(lie: Callable, direction: str, epsilon: float, message: str) -> None:
    c = certified(3, direction, epsilon)
    train(c, "delta-gclip", 200, c.certificate.claims)  # the true one holds
    with pytest.raises(Violation, match=message):
        train(c, "delta-gclip", 3000, {**c.certificate.claims, **lie(c.certificate.claims)})


def test_a_step_that_is_too_long_is_named() -> None:
    watch = CertifiedSteps(certified(0).certificate.claims, 1e-3, weights=1.0, targets=1.0)
    with pytest.raises(Violation, match="eta_max"):
        watch.take(Step(1e9, 0.0, 0.0, 0.0))
