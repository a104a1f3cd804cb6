"""clip_grad_: the same multipliers in place, for any other optimizer."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import backward, batches, leaf, network, same_bits, values
from torch import Tensor, nn

from surefoot import DeltaGClip, clip_grad_


def three() -> list[nn.Parameter]:
    """Norms 3, 4 and 12: 5 for the first two, 13 for all."""
    return [leaf([0.0], [3.0]), leaf([0.0], [-4.0]), leaf([0.0, 0.0], [0.0, 12.0])]


def grads(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def sizes(params: list[nn.Parameter]) -> list[float]:
    return [g.norm().item() for g in grads(params)]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:]}]


@pytest.mark.parametrize(
    "given_as",
    [
        lambda params: params,
        lambda params: tuple(params),
        lambda params: (p for p in params),
        lambda params: groups(params),
        lambda params: iter(groups(params)),
        lambda params: torch.optim.AdamW(groups(params)).param_groups,
        lambda params: nn.ParameterList(params).parameters(),
    ],
    ids=["list", "tuple", "generator", "groups", "iterator of groups", "param_groups", "module.parameters()"],
)
def test_parameters_may_come_in_any_form(given_as: Any) -> None:
    params = three()
    norm = clip_grad_(given_as(params), gamma=1.3)
    assert norm.shape == ()
    assert norm.dtype == torch.float64
    assert norm.item() == 13.0
    assert sizes(params) == pytest.approx([0.3, 0.4, 1.2], rel=1e-14)
    assert all(not p.detach().any() for p in params)


def test_a_single_tensor_will_do() -> None:
    w = leaf([0.0, 0.0], [3.0, 4.0])
    assert clip_grad_(w, gamma=1.0).item() == 5.0
    assert w.grad is not None
    assert w.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-15)


@pytest.mark.parametrize(
    ("scope", "delta", "expected"),
    [
        ("global", 0.0, [6 / 13, 8 / 13, 24 / 13]),
        ("global", 0.5, [1.5, 2.0, 6.0]),
        ("group", 0.0, [1.2, 1.6, 2.0]),
        ("group", 0.25, [1.2, 1.6, 3.0]),
        ("tensor", 0.0, [2.0, 2.0, 2.0]),
        ("tensor", 0.25, [2.0, 2.0, 3.0]),
        ("global", 1.0, [3.0, 4.0, 12.0]),
    ],
)
def test_every_scope_and_the_floor(scope: str, delta: float, expected: list[float]) -> None:
    params = three()
    norm = clip_grad_(groups(params), gamma=2.0, delta=delta, scope=scope)
    assert norm.item() == 13.0  # over everything, whatever the scope
    assert sizes(params) == pytest.approx(expected, rel=1e-14)
    assert params[1].grad is not None
    assert params[1].grad.item() < 0


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_same_step_as_the_optimizer_takes(scope: str) -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    opt = DeltaGClip(ours.parameters(), 0.1, gamma=0.4, delta=0.3, scope=scope, momentum=0.9, weight_decay=0.1)
    sgd = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for batch in batches(10, torch.float64):
        backward(ours, batch)
        opt.step()
        backward(theirs, batch)
        clip_grad_(theirs.parameters(), gamma=0.4, delta=0.3, scope=scope)
        sgd.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.01, 0.5, 100.0])
def test_it_is_torchs_clip_grad_norm_up_to_the_1e_6_there(gamma: float) -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    for net in (ours, theirs):
        backward(net, batches(1, torch.float64)[0])
    norm = clip_grad_(ours.parameters(), gamma=gamma)
    torchs = torch.nn.utils.clip_grad_norm_(theirs.parameters(), gamma)
    assert norm.item() == pytest.approx(torchs.item(), rel=1e-14)
    coefficients = (min(1.0, gamma / norm.item()), min(1.0, gamma / (norm.item() + 1e-6)))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad / coefficients[0], q.grad / coefficients[1], rtol=1e-13, atol=1e-16)


def test_adamw_behind_it_takes_the_steps_it_takes_behind_torchs() -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    opts = [torch.optim.AdamW(net.parameters(), 1e-2) for net in (ours, theirs)]
    norms = []
    for batch in batches(15, torch.float64):
        backward(ours, batch)
        norms.append(clip_grad_(ours.parameters(), gamma=1.0).item())
        backward(theirs, batch)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for opt in opts:
            opt.step()
    assert max(norms) > 1.0
    for a, b, start in zip(ours.parameters(), theirs.parameters(), network(torch.float64).parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.equal(a, start)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("options", [{"gamma": math.inf}, {"gamma": 13.0}, {"gamma": 0.1, "delta": 1.0}])
def test_gradients_that_need_no_clipping_stay_bit_identical(scope: str, options: dict[str, float]) -> None:
    params = [leaf(torch.zeros(7), torch.randn(7) / 3, torch.float32), *three()]
    params[0].grad = None if options["gamma"] == 13.0 else params[0].grad  # 13 exactly: at the threshold
    before = values(grads(params))
    clip_grad_(groups(params), scope=scope, **options)
    assert same_bits(grads(params), before)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=5),
    st.floats(1e-10, 1e10),
    st.floats(0.0, 1.0),
    st.sampled_from(["global", "tensor"]),
)
def test_no_entry_ever_grows_or_changes_its_sign(entries: list[float], gamma: float, delta: float, scope: str) -> None:
    params = [leaf([x], [x]) for x in entries]
    norm = clip_grad_(params, gamma=gamma, delta=delta, scope=scope).item()
    assert norm == pytest.approx(math.hypot(*entries), rel=1e-12, abs=1e-150)
    after = [g.item() for g in grads(params)]
    for x, y in zip(entries, after):
        assert abs(y) <= abs(x)
        assert x * y >= 0
        assert abs(y) >= delta * abs(x) * (1 - 1e-15)
    if scope == "global" and delta == 0:
        assert math.hypot(*after) <= max(gamma, 0.0) * (1 + 1e-14)


def test_parameters_without_gradient_and_no_parameters_at_all() -> None:
    params = [leaf([1.0]), *three()]
    assert clip_grad_(params, gamma=1.0).item() == 13.0
    assert params[0].grad is None
    for nothing in ([], [leaf([1.0])], [{"params": []}], iter(())):
        assert clip_grad_(nothing, gamma=1.0).item() == 0.0


def test_a_zero_gradient_stays_zero() -> None:
    w = leaf([1.0, 1.0], [0.0, 0.0])
    assert clip_grad_(w, gamma=1.0).item() == 0.0
    assert w.grad is not None
    assert w.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_zero_empties_every_gradient_of_a_bad_batch(bad: float, scope: str) -> None:
    params = three()
    params[0].grad = torch.tensor([bad], dtype=torch.float64)
    norm = clip_grad_(groups(params), gamma=1.0, scope=scope)
    assert not math.isfinite(norm.item())
    assert sizes(params) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_raise_touches_nothing(bad: float, scope: str) -> None:
    params = three()
    params[2].grad = torch.tensor([1.0, bad], dtype=torch.float64)
    before = values(grads(params))
    with pytest.raises(FloatingPointError, match=r"1 of 3 gradients.*number 2.*shape \(2,\)"):
        clip_grad_(groups(params), gamma=1.0, scope=scope, nonfinite="raise")
    assert same_bits(grads(params), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_propagate_does_what_torch_does(bad: float) -> None:
    ours, theirs = three(), three()
    for params in (ours, theirs):
        params[2].grad = torch.tensor([1.0, bad], dtype=torch.float64)
    clip_grad_(ours, gamma=1.0, nonfinite="propagate")
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for a, b in zip(grads(ours), grads(theirs)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_low_precision_gradients_keep_their_type_and_their_norm() -> None:
    half = leaf([0.0] * 100, [60000.0] * 100, torch.float16)
    brain = leaf([0.0] * 300, [30.0] * 300, torch.bfloat16)
    single = leaf([0.0] * 128, [1e19] * 128, torch.float32)
    for w, size in ((half, 600000.0), (brain, 30 * math.sqrt(300)), (single, 1e19 * math.sqrt(128))):
        assert clip_grad_(w, gamma=1.0).item() == pytest.approx(size, rel=1e-6)
        assert w.grad is not None
        assert w.grad.dtype == w.dtype
        assert w.grad.double().norm().item() == pytest.approx(1.0, rel=2 * torch.finfo(w.dtype).eps)


def test_complex_gradients_are_clipped_by_both_parts() -> None:
    z = nn.Parameter(torch.zeros(1, dtype=torch.complex128))
    z.grad = torch.tensor([3.0 + 4.0j], dtype=torch.complex128)
    assert clip_grad_(z, gamma=1.0).item() == 5.0
    assert z.grad.item() == pytest.approx(0.6 + 0.8j, rel=1e-15)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"gamma": 0.0}, ValueError, ["gamma", "0.0"]),
        ({"gamma": -1}, ValueError, ["gamma", "-1"]),
        ({"gamma": math.nan}, ValueError, ["gamma", "nan"]),
        ({"gamma": "1"}, TypeError, ["gamma", "'1'"]),
        ({"gamma": None}, TypeError, ["gamma", "None"]),
        ({"gamma": True}, TypeError, ["gamma", "True"]),
        ({"gamma": 1.0, "delta": -0.1}, ValueError, ["delta", "-0.1"]),
        ({"gamma": 1.0, "delta": 1.1}, ValueError, ["delta", "1.1"]),
        ({"gamma": 1.0, "delta": math.nan}, ValueError, ["delta", "nan"]),
        ({"gamma": 1.0, "scope": "layer"}, ValueError, ["scope", "'layer'", "'tensor'"]),
        ({"gamma": 1.0, "scope": "group"}, ValueError, ["scope", "'group'", "param_groups"]),
        ({"gamma": 1.0, "nonfinite": "skip"}, ValueError, ["nonfinite", "'skip'", "'zero'"]),
        ({"gamma": 1.0, "norm_type": 1}, TypeError, ["norm_type"]),
        ({}, TypeError, ["gamma"]),
    ],
)
def test_bad_options_are_refused_before_anything_is_touched(
    options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    params = three()
    before = values(grads(params))
    with pytest.raises(error) as caught:
        clip_grad_(params, **options)
    assert all(word in str(caught.value) for word in words)
    assert same_bits(grads(params), before)


def test_a_sparse_gradient_is_refused_before_anything_is_touched() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    dense = leaf([0.0], [3.0], torch.float32)
    with pytest.raises(TypeError, match="sparse=False"):
        clip_grad_([dense, table.weight], gamma=1.0)
    assert dense.grad is not None
    assert dense.grad.item() == 3.0
