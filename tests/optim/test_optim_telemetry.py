"""The counts: their keys, units and meaning, and when they begin anew."""

import math

import pytest
import torch
from optim_helpers import RULES, leaf, make

from surefoot import DeltaGClip

KEYS = {
    "steps",
    "unclipped",
    "clipped",
    "floored",
    "skipped",
    "clip_fraction",
    "floor_fraction",
    "norm_min",
    "norm_mean",
    "norm_max",
    "path_length",
    "norm",
    "scale",
}
COUNTS = ("steps", "unclipped", "clipped", "floored", "skipped")


def after(*norms: float, delta: float = 0.1, lr: float = 0.5) -> DeltaGClip:
    w = leaf([0.0])
    opt = DeltaGClip([w], lr, gamma=1.0, delta=delta)
    for norm in norms:
        w.grad = torch.tensor([norm], dtype=torch.float64)
        opt.step()
    return opt


@pytest.mark.parametrize("rule", RULES)
def test_keys_and_types_are_the_same_before_and_after_the_first_step(rule: str) -> None:
    w = leaf([0.0], [4.0])
    opt = make(rule, [w])
    for _ in range(3):
        seen = opt.telemetry()
        assert set(seen) == KEYS
        assert all(type(seen[k]) is int for k in COUNTS)
        assert all(type(seen[k]) is float for k in KEYS - set(COUNTS))
        opt.step()


def test_before_the_first_step_counts_are_zero_and_numbers_nan() -> None:
    seen = after().telemetry()
    assert [seen[k] for k in COUNTS] == [0] * 5
    assert seen["path_length"] == 0.0
    for name in ("clip_fraction", "floor_fraction", "norm_min", "norm_mean", "norm_max", "norm", "scale"):
        assert math.isnan(seen[name]), name


def test_the_meaning_of_every_number() -> None:
    seen = after(0.5, 4.0, math.nan, 40.0, -2.0).telemetry()
    assert [seen[k] for k in COUNTS] == [5, 1, 2, 1, 1]
    assert seen["clip_fraction"] == 2 / 5
    assert seen["floor_fraction"] == 1 / 5
    assert (seen["norm_min"], seen["norm_max"]) == (0.5, 40.0)
    assert seen["norm_mean"] == pytest.approx((0.5 + 4 + 40 + 2) / 4, rel=1e-15)
    assert seen["path_length"] == pytest.approx(0.5 * (0.5 + 1 + 40 * 0.1 + 1), rel=1e-15)
    assert (seen["norm"], seen["scale"]) == (2.0, 0.5)


def test_reading_begins_anew_but_keeps_the_last_norm_and_scale() -> None:
    opt = after(4.0, 8.0)
    first = opt.telemetry()
    assert first["steps"] == 2
    second = opt.telemetry()
    assert [second[k] for k in COUNTS] == [0] * 5
    assert second["path_length"] == 0.0
    assert all(math.isnan(second[k]) for k in ("clip_fraction", "floor_fraction", "norm_min", "norm_mean", "norm_max"))
    assert (second["norm"], second["scale"]) == (8.0, 0.125)


def test_counting_goes_on_after_a_reset_from_nothing() -> None:
    opt = after(4.0, 100.0)
    opt.telemetry()
    opt.param_groups[0]["params"][0].grad.fill_(0.25)
    opt.step()
    seen = opt.telemetry()
    assert [seen[k] for k in COUNTS] == [1, 1, 0, 0, 0]
    assert seen["norm_min"] == seen["norm_mean"] == seen["norm_max"] == seen["norm"] == 0.25
    assert seen["scale"] == 1.0
    assert seen["path_length"] == 0.125


def test_reading_without_reset_changes_nothing() -> None:
    opt = after(0.5, 4.0)
    assert opt.telemetry(reset=False) == opt.telemetry(reset=False) == opt.telemetry()


@pytest.mark.parametrize(
    ("scope", "counts", "norm", "scale", "mean"),
    [
        ("global", [1, 0, 1, 0, 0], 13.0, 1 / 13, 13.0),
        ("group", [1, 0, 1, 1, 0], 12.0, 0.1, 8.5),
        ("tensor", [1, 1, 2, 1, 0], 12.0, 0.1, (0.5 + math.sqrt(24.75) + 0 + 12) / 4),
    ],
)
def test_a_step_counts_one_norm_a_unit_of_its_scope(
    scope: str, counts: list[int], norm: float, scale: float, mean: float
) -> None:
    # groups of norms 5 and 12; in tensors 0.5, sqrt(24.75), 0 and 12
    first = [leaf([0.0], [0.5]), leaf([0.0], [math.sqrt(24.75)])]
    second = [leaf([0.0], [0.0]), leaf([0.0], [12.0])]
    opt = DeltaGClip([{"params": first}, {"params": second}], 0.5, gamma=1.0, delta=0.1, scope=scope)
    expected = dict(zip(COUNTS, counts))
    if scope == "group":
        expected |= {"clipped": 1, "floored": 1}
    if scope == "tensor":
        expected |= {"unclipped": 2, "clipped": 1, "floored": 1}
    if scope == "global":
        expected |= {"clipped": 0, "floored": 1}
    opt.step()
    seen = opt.telemetry()
    assert {k: seen[k] for k in COUNTS} == expected
    assert (seen["norm"], seen["norm_max"]) == (pytest.approx(norm), pytest.approx(norm))
    assert seen["scale"] == pytest.approx(max(scale, 0.1))
    assert seen["norm_mean"] == pytest.approx(mean)
    moved = math.sqrt(sum(float(p.detach().square().sum()) for p in first + second))
    assert seen["path_length"] == pytest.approx(moved, rel=1e-14)


def test_the_path_length_is_the_length_of_the_path() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = leaf(torch.zeros(3)), leaf(torch.zeros(2, 2))
    opt = DeltaGClip([{"params": [a]}, {"params": [b], "lr": 0.3, "gamma": 2.0}], 0.1, gamma=1.0, delta=0.2)
    length = 0.0
    for _ in range(10):
        before = torch.cat([a.detach().flatten(), b.detach().flatten()])
        a.grad = 3 * torch.randn(3, generator=g).double()
        b.grad = torch.randn(2, 2, generator=g).double()
        opt.step()
        length += float((torch.cat([a.detach().flatten(), b.detach().flatten()]) - before).norm())
    assert opt.telemetry()["path_length"] == pytest.approx(length, rel=1e-12)


def test_delta_without_effect_shows_as_a_floor_fraction_of_zero() -> None:
    seen = after(1.5, 2.0, 9.0, delta=1e-3).telemetry()
    assert (seen["clip_fraction"], seen["floor_fraction"]) == (1.0, 0.0)
