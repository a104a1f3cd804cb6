"""Bad options: the exception, and a message with the argument's name and value."""

import math
from typing import Any

import pytest
import torch
from optim_helpers import RULES, leaf, make, same_bits, values

from surefoot import DeltaGClip, GClip

nan, inf = math.nan, math.inf

# what every rule refuses: option, value, exception
SHARED: list[tuple[str, Any, type[Exception]]] = [
    ("lr", 0, ValueError),
    ("lr", 0.0, ValueError),
    ("lr", -1, ValueError),
    ("lr", nan, ValueError),
    ("lr", inf, ValueError),
    ("lr", "a", TypeError),
    ("lr", None, TypeError),
    ("lr", True, TypeError),
    ("lr", torch.tensor(-0.5), ValueError),
    ("lr", torch.tensor([0.5, 0.25]), TypeError),
    ("momentum", -1, ValueError),
    ("momentum", nan, ValueError),
    ("momentum", inf, ValueError),
    ("momentum", "a", TypeError),
    ("dampening", nan, ValueError),
    ("dampening", inf, ValueError),
    ("dampening", None, TypeError),
    ("weight_decay", -1, ValueError),
    ("weight_decay", nan, ValueError),
    ("weight_decay", inf, ValueError),
    ("weight_decay", False, TypeError),
]
OWN: dict[str, list[tuple[str, Any, type[Exception]]]] = {
    "delta_gclip": [
        ("gamma", 0, ValueError),
        ("gamma", -1, ValueError),
        ("gamma", nan, ValueError),
        ("gamma", None, TypeError),
        ("gamma", True, TypeError),
        ("delta", -0.1, ValueError),
        ("delta", 1.1, ValueError),
        ("delta", nan, ValueError),
        ("delta", inf, ValueError),
        ("delta", "a", TypeError),
    ],
    "gclip": [("gamma", 0, ValueError), ("gamma", -1, ValueError), ("gamma", nan, ValueError)],
    "normalized": [
        ("beta", -1, ValueError),
        ("beta", nan, ValueError),
        ("beta", inf, ValueError),
        ("beta", None, TypeError),
    ],
    "smooth_clip": [
        ("L0", 0, ValueError),
        ("L0", -1, ValueError),
        ("L0", nan, ValueError),
        ("L0", inf, ValueError),
        ("L1", -1, ValueError),
        ("L1", nan, ValueError),
        ("L1", inf, ValueError),
        ("L1", "a", TypeError),
    ],
}
TABLE = [(rule, *row) for rule in RULES for row in SHARED + OWN[rule]]
# only of the constructor: one a optimizer, not one a group
CHOICES = [("scope", "layer"), ("scope", None), ("nonfinite", "zero"), ("nonfinite", True)]


def says(caught: pytest.ExceptionInfo[Exception], name: str, value: Any) -> bool:
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return f"{name}={number!r}" in str(caught.value)


def title(value: Any) -> str | None:
    return None if isinstance(value, type) else repr(value)


@pytest.mark.parametrize(("rule", "name", "value", "error"), TABLE, ids=title)
def test_the_constructor_refuses(rule: str, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        make(rule, [leaf([1.0])], **{"lr": 0.5, name: value})
    assert says(caught, name, value)


@pytest.mark.parametrize(("rule", "name", "value", "error"), TABLE, ids=title)
def test_a_group_with_it_is_refused(rule: str, name: str, value: Any, error: type[Exception]) -> None:
    groups = [{"params": [leaf([1.0])]}, {"params": [leaf([2.0])], name: value}]
    with pytest.raises(error) as caught:
        make(rule, groups)
    assert says(caught, name, value)


# A schedule may write lr = 0 (warm-up) and even a rounding error less; otherwise the same things make no sense.
REWRITES = [row for row in TABLE if row[1] != "lr" or row[3] is TypeError or not math.isfinite(row[2])]


@pytest.mark.parametrize(("rule", "name", "value", "error"), REWRITES, ids=title)
def test_a_group_rewritten_to_it_is_refused_before_anything_is_touched(
    rule: str, name: str, value: Any, error: type[Exception]
) -> None:
    params = [leaf([1.0], [3.0]), leaf([2.0], [4.0])]
    opt = make(rule, [{"params": params[:1]}, {"params": params[1:]}], momentum=0.9)
    opt.step()
    before, counts = values(params), opt.telemetry(reset=False)
    buffers = values(opt.state[p]["momentum_buffer"] for p in params)
    opt.param_groups[1][name] = value
    with pytest.raises(error) as caught:
        opt.step()
    assert says(caught, name, value)
    assert same_bits(params, before)
    assert same_bits([opt.state[p]["momentum_buffer"] for p in params], buffers)
    assert opt.telemetry() == counts


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "value"), CHOICES)
def test_an_unknown_choice_is_refused_with_the_known_ones(rule: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        make(rule, [leaf([1.0])], **{name: value})
    assert says(caught, name, value)
    assert {"scope": "'global', 'group', 'tensor'", "nonfinite": "'skip', 'raise', 'propagate'"}[name] in str(
        caught.value
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}, {}])
def test_nesterov_needs_momentum_and_no_dampening(rule: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"nesterov=True needs momentum > 0 and dampening = 0") as caught:
        make(rule, [leaf([1.0])], nesterov=True, **options)
    for name in ("momentum", "dampening"):
        assert says(caught, name, options.get(name, 0.0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["gama", "betas", "foreach_"])
def test_an_unknown_option_is_refused_by_name(rule: str, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        make(rule, [leaf([1.0])], **{name: 1.0})


@pytest.mark.parametrize("rule", RULES)
def test_the_letters_of_a_rule_must_be_given(rule: str) -> None:
    cls, letters = RULES[rule]
    for name in letters:
        with pytest.raises(TypeError, match=name):
            cls([leaf([1.0])], 0.5, **{k: v for k, v in letters.items() if k != name})


def test_gclip_takes_no_delta() -> None:
    with pytest.raises(TypeError, match=r"delta=0\.1.*DeltaGClip"):
        GClip([leaf([1.0])], 0.5, gamma=1.0, delta=0.1)


def test_the_end_points_are_allowed() -> None:
    for letters in ({"gamma": inf, "delta": 0}, {"gamma": 1e-300, "delta": 1}):
        DeltaGClip([leaf([1.0])], 1, **letters)
    make("normalized", [leaf([1.0])], beta=0)
    make("smooth_clip", [leaf([1.0])], L1=0)
    make("gclip", [leaf([1.0])], momentum=0, dampening=0, weight_decay=0)


@pytest.mark.parametrize("rule", RULES)
def test_params_must_be_an_iterable_of_some_leaves(rule: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        make(rule, [])
    with pytest.raises(TypeError, match="params"):
        make(rule, leaf([1.0]))
    with pytest.raises(ValueError, match="leaf"):
        make(rule, [leaf([1.0]) * 2])
    w = leaf([1.0])
    with pytest.raises(ValueError, match="more than one"):
        make(rule, [{"params": [w]}, {"params": [w]}])
