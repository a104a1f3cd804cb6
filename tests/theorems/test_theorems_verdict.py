"""Verdicts: only what is proved is proved; and the rounding that proofs rest on."""

import json
import math
import random
from fractions import Fraction
from itertools import product

import pytest
import torch

from surefoot.measure.measurement import Measurement
from surefoot.theorems import refutations as cheap
from surefoot.theorems.outward import above, below, sqrt_above, sqrt_below, steps_until
from surefoot.theorems.verdict import Finding, Outcome, Verdict, bounded, conclude

PROVED, REFUTED, UNDECIDED = Outcome.PROVED, Outcome.REFUTED, Outcome.UNDECIDED


def finding(outcome: Outcome) -> Finding:
    return Finding("a hypothesis", outcome, "a reason", "a remedy")


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((PROVED, PROVED), PROVED),
        ((PROVED, UNDECIDED), UNDECIDED),
        ((UNDECIDED, REFUTED, PROVED), REFUTED),
    ],
)
def test_a_verdict_is_as_good_as_its_worst_finding(outcomes: tuple[Outcome, ...], expected: Outcome) -> None:
    verdict = conclude(
        "a theorem", tuple(map(finding, outcomes)), (), conclusion="all is well", numbers={"rate": 0.5}, source="ours"
    )
    assert verdict.outcome is expected
    assert bool(verdict) is (expected is PROVED)
    assert verdict.conclusion == ("all is well" if verdict else "")
    assert dict(verdict.numbers) == ({"rate": 0.5} if verdict else {})


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        *product(("upper bound", "lower bound", "exact"), ("estimate", "verified", "audited")),
        ("estimate", "estimate"),
        ("assumed", "estimate"),
    ],
)
@pytest.mark.parametrize("needed", ["upper bound", "lower bound"])
def test_only_a_proved_bound_of_the_right_side_serves(kind: str, level: str, needed: str) -> None:
    found = bounded(Measurement("mu", 1.0, kind, level, "by hand"), needed)  # type: ignore[arg-type]
    assert (found.outcome is PROVED) is (level != "estimate" and kind in (needed, "exact"))
    assert found.outcome is not REFUTED
    assert bool(found.remedy) is (found.outcome is not PROVED)


def test_it_prints_and_goes_to_json() -> None:
    m = Measurement("mu", 1.0, "exact", "verified", "by hand")
    verdict = Verdict("a theorem", UNDECIDED, findings=(finding(UNDECIDED),), measurements=(m,), criteria={"a": True})
    assert str(verdict).splitlines() == ["UNDECIDED: a theorem", "  undecided  a hypothesis: a reason; a remedy"]
    document = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert document["outcome"] == "undecided"
    assert document["findings"][0]["remedy"] == "a remedy"
    assert Measurement.from_json(document["measurements"][0]) == m
    assert verdict.with_certificate("a proof").certificate == "a proof"
    assert verdict.certificate is None


def test_rounding_is_outward() -> None:
    numbers = random.Random(0)
    inexact = 0
    for _ in range(500):
        x = Fraction(numbers.getrandbits(80) + 1, numbers.getrandbits(70) + 1) * Fraction(2) ** numbers.randint(
            -900, 900
        )
        assert below(x) <= x <= above(x)
        assert above(x) <= math.nextafter(below(x), math.inf)
        inexact += below(x) < above(x)
        low, high = sqrt_below(x), sqrt_above(x)
        assert Fraction(low) ** 2 <= x <= Fraction(high) ** 2
        assert high <= math.nextafter(math.nextafter(low, math.inf), math.inf)
    assert inexact > 400
    huge = Fraction(10) ** 400
    assert above(huge) == math.inf
    assert below(huge) < math.inf
    assert below(-huge) == -math.inf
    assert sqrt_above(huge) == math.inf
    assert sqrt_above(Fraction(0)) == sqrt_below(Fraction(0)) == 0


def test_steps_until_is_enough_and_hardly_more() -> None:
    numbers = random.Random(1)
    for _ in range(100):
        drop, ratio = numbers.uniform(0.01, 0.9), 10 ** numbers.uniform(-8, -0.01)
        steps = int(steps_until(3.0, 3.0 * ratio, drop))
        rest = 1 - Fraction(drop)
        assert 3 * rest**steps <= Fraction(3.0 * ratio)
        assert 3 * rest ** (steps - 2) > Fraction(3.0 * ratio)
    assert steps_until(1.0, 2.0, 0.1) == 0
    assert steps_until(1.0, 0.5, 1.0) == 1
    assert steps_until(1.0, 0.0, 0.5) == steps_until(1.0, 0.5, 0.0) == math.inf
    assert steps_until(1e300, 1e-300, 1e-300) > 1e300


# ----------------------------------------------------------------------------------------------------------------------


def test_counting_refutes_a_positive_lambda_min_but_not_pl() -> None:
    assert cheap.fewer_parameters(20, 20) is None
    assert cheap.fewer_parameters(19, 20).outcome is REFUTED  # type: ignore[union-attr]
    # F(w) = (w, w), y = (1, 1): K is singular and 1/2 ||grad E||^2 >= 2 E
    for w in (-3.0, 0.5, 2.0):
        loss, gradient = (w - 1) ** 2, 2 * (w - 1)
        assert gradient**2 / 2 >= 2 * loss


def test_equal_inputs_leave_a_loss_that_no_weights_go_below() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 3, generator=generator)
    y = torch.randn(20, 2, generator=generator)
    assert cheap.conflicting_targets(X, y) is None
    assert cheap.duplicate_inputs(X) is None
    assert cheap.squared_loss_floor(X, y) == 0
    X[7] = X[3]
    X[11] = X[3]
    X[5] = X[4]
    y[5] = y[4]
    floor = cheap.squared_loss_floor(X, y)
    # the best of all functions: any values, one a distinct input
    groups = [[3, 7, 11]]
    best = sum(float((y[g].double() - y[g].double().mean(0)).square().sum()) / 2 for g in groups)
    assert 0 < floor <= best * (1 + 1e-14)
    assert floor == pytest.approx(best, rel=1e-12)
    found = cheap.conflicting_targets(X, y)
    assert found is not None
    assert found.outcome is REFUTED
    assert float(found.reason.split("at least ")[1].split()[0]) <= floor
    assert "3 and 7" in cheap.duplicate_inputs(X).reason  # type: ignore[union-attr]
    assert "1 more group" in cheap.duplicate_inputs(X).reason  # type: ignore[union-attr]


def test_equal_inputs_with_different_labels_are_not_separable() -> None:
    X = torch.arange(6.0).reshape(6, 1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert cheap.conflicting_labels(X, labels) is None
    X[1] = X[0]
    X[2] = X[0]
    X[5] = X[0]
    floor = cheap.cross_entropy_floor(X, labels)
    p = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)  # labels 0, 1, 2, 2 on one input
    best = float(torch.nn.functional.cross_entropy(p.log().expand(4, 3), labels[[0, 1, 2, 5]], reduction="sum"))
    assert 0 < floor <= best
    assert floor == pytest.approx(best, rel=1e-8)
    assert cheap.conflicting_labels(X, labels).outcome is REFUTED  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="whole numbers"):
        cheap.cross_entropy_floor(X, labels.double())
    with pytest.raises(ValueError, match="5 for 6 inputs"):
        cheap.squared_loss_floor(X, labels[:5])


def test_weight_decay_moves_the_minimum() -> None:
    assert cheap.weight_decay(0.0) is None
    found = cheap.weight_decay(1e-3)
    assert found is not None
    assert found.outcome is REFUTED
    assert cheap.first(None, found, None) == (found,)
