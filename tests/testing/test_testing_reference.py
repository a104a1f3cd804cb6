"""The slow twin itself, against numbers worked out by hand and in exact fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.testing import ReferenceGroup, ReferenceOptimizer, reference_scale


@pytest.mark.parametrize(
    ("rule", "norm", "letters", "expected"),
    [
        ("delta_gclip", 0.0, {"gamma": 2.0, "delta": 0.25}, 1.0),
        ("delta_gclip", 1.0, {"gamma": 2.0, "delta": 0.25}, 1.0),
        ("delta_gclip", 2.0, {"gamma": 2.0, "delta": 0.25}, 1.0),
        ("delta_gclip", 4.0, {"gamma": 2.0, "delta": 0.25}, 0.5),
        ("delta_gclip", 8.0, {"gamma": 2.0, "delta": 0.25}, 0.25),
        ("delta_gclip", 16.0, {"gamma": 2.0, "delta": 0.25}, 0.25),
        ("delta_gclip", 16.0, {"gamma": 2.0, "delta": 0.0}, 0.125),
        ("delta_gclip", 16.0, {"gamma": 2.0, "delta": 1.0}, 1.0),
        ("delta_gclip", 16.0, {"gamma": math.inf, "delta": 0.0}, 1.0),
        ("normalized", 0.0, {"beta": 0.0}, 1.0),
        ("normalized", 0.0, {"beta": 4.0}, 0.25),
        ("normalized", 4.0, {"beta": 0.0}, 0.25),
        ("normalized", 3.0, {"beta": 1.0}, 0.25),
        ("smooth_clip", 0.0, {"L0": 4.0, "L1": 3.0}, 0.25),
        ("smooth_clip", 4.0, {"L0": 4.0, "L1": 3.0}, 0.0625),
        ("smooth_clip", 4.0, {"L0": 4.0, "L1": 0.0}, 0.25),
    ],
)
def test_the_multipliers_are_those_worked_out_by_hand(
    rule: str, norm: float, letters: dict[str, float], expected: float
) -> None:
    assert reference_scale(rule, norm, **letters) == expected


def test_an_unknown_rule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rule='gclip'"):
        reference_scale("gclip", 1.0, gamma=1.0)


def twin(scope: str = "global", start: tuple[float, ...] = (0.0,), **options: float) -> ReferenceOptimizer:
    given_options = {"lr": 0.5, "gamma": 1.0, "delta": 0.125, **options}
    groups = [ReferenceGroup([torch.tensor([x], dtype=torch.float64)], dict(given_options)) for x in start]
    return ReferenceOptimizer("delta_gclip", groups, scope)


def place(reference: ReferenceOptimizer) -> list[float]:
    return [w.item() for group in reference.groups for w in group.params]


def grad(*entries: float) -> list[list[torch.Tensor | None]]:
    """Return one tensor a group."""
    return [[torch.tensor([x], dtype=torch.float64)] for x in entries]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-1e150, 1e150).filter(lambda x: x == 0 or abs(x) > 1e-150), min_size=1, max_size=6))
def test_its_norm_is_the_root_of_the_exact_sum_of_squares(entries: list[float]) -> None:
    square = sum((Fraction(x) ** 2 for x in entries), Fraction(0))
    reference = twin(start=(0.0,) * len(entries), gamma=math.inf, lr=1.0)
    reference.step(grad(*entries))  # never clipped, lr 1: the path length is the norm
    length = Fraction(reference.path_length)
    assert abs(length**2 - square) <= Fraction(1, 10**14) * square


def test_its_norm_counts_each_group_once() -> None:
    reference = twin(start=(0.0, 0.0), lr=1.0, gamma=1.0, delta=0.0)
    reference.step(grad(5.0, 12.0))
    assert place(reference) == pytest.approx([-5 / 13, -12 / 13], rel=1e-15)
    assert reference.path_length == pytest.approx(1.0, rel=1e-15)
    apart = twin("group", (0.0, 0.0), lr=1.0, gamma=1.0, delta=0.0)
    apart.step(grad(5.0, 12.0))
    assert place(apart) == pytest.approx([-1.0, -1.0], rel=1e-15)


def test_its_norm_neither_overflows_nor_vanishes() -> None:
    for size in (1e-150, 1e150):
        reference = twin(start=(0.0, 0.0), lr=1.0, gamma=math.inf)
        reference.step(grad(3 * size, 4 * size))
        assert reference.path_length == pytest.approx(5 * size, rel=1e-15)


def test_every_regime_by_hand() -> None:
    reference = twin(start=(1.0,))
    places = []
    for g in (0.5, 4.0, 16.0, math.nan, -math.inf, 0.0):
        reference.step(grad(g))
        places.append(place(reference)[0])
    # 1 - 0.25; then clipped to 1, so - 0.5; then the floor, 16/8 = 2, so - 1; then nothing three times
    assert places == [0.75, 0.25, -0.75, -0.75, -0.75, -0.75]
    assert reference.counts == {"unclipped": 2, "clipped": 1, "floored": 1, "skipped": 2, "steps": 6}
    assert reference.path_length == 0.25 + 0.5 + 1.0


def test_momentum_dampening_and_nesterov_by_hand() -> None:
    plain = twin(momentum=0.5)
    damped = twin(momentum=0.5, dampening=0.5)
    ahead = twin(momentum=0.5, nesterov=1.0)
    for reference in (plain, damped, ahead):
        reference.step(grad(4.0))  # d = 1
        reference.step(grad(4.0))
    assert place(plain) == [-0.5 * 1.0 - 0.5 * 1.5]
    assert place(damped) == [-0.5 * 1.0 - 0.5 * 1.0]
    assert place(ahead) == [-0.5 * 1.5 - 0.5 * 1.75]


def test_decay_and_ascent_by_hand() -> None:
    coupled = twin(start=(2.0,), weight_decay=0.5)
    decoupled = twin(start=(2.0,), weight_decay=0.5, decoupled_weight_decay=1.0)
    upward = twin(start=(2.0,), weight_decay=0.5, maximize=1.0)
    for reference in (coupled, decoupled, upward):
        reference.step(grad(4.0))  # d = 1
    assert place(coupled) == [2.0 - 0.5 * (1.0 + 1.0)]
    assert place(decoupled) == [2.0 * 0.75 - 0.5]
    assert place(upward) == [2.0 - 0.5 * (-1.0 + 1.0)]
    carried = twin(start=(2.0,), weight_decay=0.5, decoupled_weight_decay=1.0, momentum=0.5)
    carried.step(grad(4.0))
    assert place(carried) == [1.0]
    carried.step(grad(4.0))  # 0.75, then - 0.5 * 1.5: the decay is not in the buffer
    assert place(carried) == [0.0]


def test_missing_gradients_and_steps_without_any() -> None:
    reference = twin(start=(1.0, 2.0), weight_decay=0.5, momentum=0.5)
    reference.step([[None], [None]])
    assert reference.counts["steps"] == 0
    reference.step([[None], [torch.tensor([0.0])]])
    assert place(reference) == [1.0, 2.0 - 0.5 * 1.0]
    assert reference.groups[0].buffers == [None]


@pytest.mark.parametrize(("scope", "units"), [("global", 1), ("group", 2), ("tensor", 3)])
def test_it_counts_the_units_of_its_scope(scope: str, units: int) -> None:
    options = {"lr": 0.5, "gamma": 1.0, "delta": 0.0}
    tensors = [torch.zeros(2, dtype=torch.float64)] * 2
    reference = ReferenceOptimizer("delta_gclip", [ReferenceGroup(tensors, options) for _ in range(2)], scope)
    g = torch.ones(2)
    reference.step([[g, None], [2 * g, 3 * g]])
    reference.step([[g, None], [2 * g, math.nan * g]])
    assert reference.counts == {"unclipped": 0, "clipped": units, "floored": 0, "skipped": units, "steps": 2}


def test_under_one_norm_each_group_with_a_threshold_of_its_own_is_a_unit() -> None:
    reference = twin(start=(0.0, 0.0))
    reference.groups[1].options["gamma"] = 100.0
    reference.step(grad(3.0, 4.0))
    assert (reference.counts["unclipped"], reference.counts["clipped"]) == (1, 1)


def test_it_works_on_float64_copies_of_its_own() -> None:
    start = torch.tensor([1.0])
    reference = ReferenceOptimizer("normalized", [ReferenceGroup([start], {"lr": 1.0, "beta": 0.0})])
    g = torch.tensor([2.0])
    reference.step([[g]])
    assert reference.groups[0].params[0].dtype == torch.float64
    assert (start.item(), g.item(), place(reference)) == (1.0, 2.0, [0.0])
