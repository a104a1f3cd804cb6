"""Weights in half precision: the norm in more, the step rounded once, masters in float32."""

import io
import math
from typing import Any

import pytest
import torch
from optim_helpers import RULES, leaf, make, same_bits, values
from torch import nn

from surefoot import DeltaGClip, GClip

every_rule = pytest.mark.parametrize("rule", RULES)
both = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
]
every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(o) or "plain")


def parameter(size: int, dtype: torch.dtype, seed: int = 1) -> nn.Parameter:
    g = torch.Generator().manual_seed(seed)
    w = nn.Parameter(torch.randn(size, generator=g).to(dtype))
    w.grad = torch.randn(size, generator=g).to(dtype)
    return w


@both
@every_combination
def test_every_element_moves_whatever_the_size(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The fused SGD of torch 2.13 on the CPU leaves all but the tail of a half-precision tensor where it is."""
    for size in range(1, 101):
        w = parameter(size, dtype)
        exact = nn.Parameter(w.detach().double())
        opts = [DeltaGClip([p], 1.0, gamma=1e3, delta=0.1, **options) for p in (w, exact)]
        for _ in range(2):
            exact.grad = w.grad.double()  # type: ignore[union-attr]
            for opt in opts:
                opt.step()
        apart = (w.detach().double() - exact.detach()).abs()
        assert (apart <= 8 * torch.finfo(dtype).eps * (1 + exact.detach().abs())).all(), f"size {size}"


@both
@pytest.mark.parametrize("size", [100_000, 70_001])
def test_the_norm_is_accumulated_and_returned_in_more(dtype: torch.dtype, size: int) -> None:
    w = parameter(size, dtype)
    exact = math.sqrt(math.fsum(x * x for x in w.grad.double().tolist()))  # type: ignore[union-attr]
    opt = GClip([w], 1.0, gamma=1.0)
    opt.step()
    seen = opt.telemetry()["norm"]
    assert seen == pytest.approx(exact, rel=1e-6)
    assert seen != float(torch.tensor(seen, dtype=dtype))  # no number of that precision


@both
def test_a_thousand_tiny_steps_arrive_with_masters_only(dtype: torch.dtype) -> None:
    """Steps of 1e-4 from 1 on: half precision rounds each of them away."""
    lost, kept = nn.Parameter(torch.ones(8, dtype=dtype)), nn.Parameter(torch.ones(8, dtype=dtype))
    opts = [GClip([lost], 1e-4, gamma=math.inf), GClip([kept], 1e-4, gamma=math.inf, master_weights=True)]
    for _ in range(1000):
        lost.grad = kept.grad = torch.ones(8, dtype=dtype)
        for opt in opts:
            opt.step()
    assert lost.tolist() == [1.0] * 8
    master = opts[1].state[kept]["master"]
    assert master.dtype is torch.float32
    torch.testing.assert_close(master, torch.full((8,), 0.9), rtol=1e-4, atol=0)
    assert kept.dtype is dtype
    assert same_bits([kept], [master.to(dtype)])
    assert "master" not in opts[0].state[lost]


@every_rule
@both
@every_combination
def test_masters_follow_float32_training(rule: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    half, full = parameter(37, dtype), parameter(37, dtype)
    full = nn.Parameter(full.detach().float())
    opts = [make(rule, [half], 0.01, master_weights=True, **options), make(rule, [full], 0.01, **options)]
    g = torch.Generator().manual_seed(4)
    for _ in range(20):
        half.grad = torch.randn(37, generator=g).to(dtype)
        full.grad = half.grad.float()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(opts[0].state[half]["master"], full.detach(), rtol=1e-5, atol=1e-6)
    assert same_bits([half], [opts[0].state[half]["master"].to(dtype)])
    if "momentum" in options:
        assert opts[0].state[half]["momentum_buffer"].dtype is torch.float32


@every_rule
@both
@every_combination
def test_masters_survive_a_checkpoint_bit_for_bit(rule: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The load_state_dict() of torch rounds floating-point state to the dtype of the parameter."""
    straight = parameter(19, dtype)
    opt = make(rule, [straight], 0.01, master_weights=True, **options)
    for _ in range(5):
        opt.step()
    file = io.BytesIO()
    torch.save({"w": straight.detach().clone(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed = nn.Parameter(saved["w"])
    resumed.grad = straight.grad
    other = make(rule, [resumed], 0.5, master_weights=True)
    other.load_state_dict(saved["opt"])
    assert same_bits([other.state[resumed]["master"]], [opt.state[straight]["master"]])
    assert not same_bits([other.state[resumed]["master"]], [resumed.detach().float()])  # it holds more than the weight
    for _ in range(5):
        opt.step()
        other.step()
    assert same_bits([resumed], [straight])
    for key, value in opt.state[straight].items():
        again = other.state[resumed][key]
        assert same_bits([again], [value]) if isinstance(value, torch.Tensor) else again == value, key


@both
def test_a_skipped_step_leaves_masters_alone(dtype: torch.dtype) -> None:
    w = parameter(5, dtype)
    opt = GClip([w], 0.01, gamma=1.0, momentum=0.9, master_weights=True)
    opt.step()
    before = values([w, *(v for v in opt.state[w].values())])
    assert w.grad is not None
    w.grad[2] = math.nan
    opt.step()
    assert same_bits([w, *(v for v in opt.state[w].values())], before)


def test_full_precision_weights_get_no_master() -> None:
    low, full = leaf([1.0], [2.0], torch.bfloat16), leaf([1.0], [2.0], torch.float32)
    opt = GClip([low, full], 0.1, gamma=1.0, master_weights=True)
    opt.step()
    assert list(opt.state[low]) == ["master"]
    assert not opt.state.get(full)


@both
@every_combination
def test_gradients_in_float32_for_half_precision_weights(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """As some mixed-precision schemes keep them; the dtype of a gradient may be freed with `grad_dtype`."""
    w = nn.Parameter(torch.ones(40, dtype=dtype))
    if not hasattr(w, "grad_dtype"):
        pytest.skip("this torch ties the dtype of a gradient to that of its parameter")
    w.grad_dtype = torch.float32
    w.grad = torch.linspace(-1, 1, 40)
    opt = GClip([w], 0.25, gamma=100.0, master_weights=True, **options)
    opt.step()
    exact = nn.Parameter(torch.ones(40))
    exact.grad = torch.linspace(-1, 1, 40)
    GClip([exact], 0.25, gamma=100.0, **options).step()
    torch.testing.assert_close(opt.state[w]["master"], exact.detach())


@both
def test_layouts_and_odd_shapes_in_half_precision(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(9)
    values_ = torch.randn(2, 3, 5, 5, generator=g).to(dtype)
    for master in (False, True):
        plain, odd = nn.Parameter(values_.clone()), nn.Parameter(values_.contiguous(memory_format=torch.channels_last))
        scalar, empty = leaf(1.0, 2.0, dtype), leaf([], [], dtype)
        plain.grad, odd.grad = values_.clone(), values_.clone()
        for w in (plain, odd):
            opt = GClip([w, scalar, empty], 0.5, gamma=1.0, momentum=0.9, master_weights=master)
            opt.step()
            opt.step()
        assert odd.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(plain, odd, rtol=2 * torch.finfo(dtype).eps, atol=0)
