"""Gradients of every kind: layouts, sizes, precisions, complex and sparse ones."""

import math

import pytest
import torch
from optim_helpers import RULES, leaf, make, same_bits, values
from torch import nn

from surefoot import DeltaGClip, GClip, NormalizedGD

every_rule = pytest.mark.parametrize("rule", RULES)
SCOPES = ("global", "group", "tensor")


def layouts() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    base = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    return {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": torch.randn(2, 3, 4, 10, generator=g, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(1, 3, 4, 5, generator=g, dtype=torch.float64).expand(2, 3, 4, 5),
    }


@every_rule
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("scope", SCOPES)
def test_the_layout_of_a_gradient_does_not_matter(rule: str, layout: str, scope: str) -> None:
    grad = layouts()[layout]
    assert layout == "expanded" or not grad.is_contiguous()
    odd = nn.Parameter(torch.ones(2, 3, 4, 5, dtype=torch.float64))
    if layout == "channels_last":
        odd = nn.Parameter(odd.detach().contiguous(memory_format=torch.channels_last))
    plain = nn.Parameter(torch.ones(2, 3, 4, 5, dtype=torch.float64))
    odd.grad, plain.grad = grad, grad.contiguous()
    strides = odd.stride()
    for w in (odd, plain):
        opt = make(rule, [w], scope=scope, momentum=0.9, nesterov=True, weight_decay=0.1)
        opt.step()
        opt.step()
    torch.testing.assert_close(odd.detach(), plain.detach(), rtol=1e-14, atol=1e-15)
    assert odd.stride() == strides


@every_rule
@pytest.mark.parametrize("scope", SCOPES)
def test_scalars_and_empties_are_gradients_like_others(rule: str, scope: str) -> None:
    scalar, empty, usual = leaf(2.0, 3.0), leaf([], []), leaf([1.0, 1.0], [0.0, 4.0])
    opt = make(rule, [scalar, empty, usual], scope=scope, momentum=0.5, weight_decay=0.1)
    opt.step()
    opt.step()
    assert scalar.shape == ()
    assert scalar.item() < 2.0
    assert empty.shape == (0,)
    counts = opt.telemetry()
    assert counts["norm_max"] == (4.0 if scope == "tensor" else 5.0)
    assert sum(counts[k] for k in ("unclipped", "clipped", "floored")) == (6 if scope == "tensor" else 2)


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_but_empties_is_a_zero_gradient(scope: str) -> None:
    opt = GClip([leaf([], [])], 0.1, gamma=1.0, scope=scope)
    opt.step()
    counts = opt.telemetry()
    assert (counts["steps"], counts["unclipped"], counts["norm"]) == (1, 1, 0.0)


@every_rule
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_parameter_steps_like_its_two_real_parts(rule: str, dtype: torch.dtype) -> None:
    z = nn.Parameter(torch.tensor([1.0 + 2.0j, -1.0j], dtype=dtype))
    pair = nn.Parameter(torch.view_as_real(z.detach()).clone())
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    opts = [make(rule, [w], **options) for w in (z, pair)]
    for _ in range(3):
        z.grad = torch.tensor([3.0 - 4.0j, 12.0 + 0.0j], dtype=dtype)
        pair.grad = torch.view_as_real(z.grad).clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), pair.detach())
    seen = [opt.telemetry() for opt in opts]
    assert seen[0] == seen[1]
    assert seen[0]["norm"] == 13.0


def test_a_complex_parameter_with_delta_one_is_sgd() -> None:
    start = torch.tensor([1.0 + 2.0j, -1.0j])
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt = DeltaGClip([ours], 0.3, gamma=0.1, delta=1.0, momentum=0.9)
    sgd = torch.optim.SGD([theirs], 0.3, momentum=0.9)
    for _ in range(3):
        ours.grad = theirs.grad = torch.tensor([3.0 - 4.0j, 12.0 + 0.5j])
        opt.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_a_float16_gradient_whose_square_overflows_is_clipped_not_lost() -> None:
    w = leaf([0.0, 0.0], [60000.0, 0.0], torch.float16)
    opt = GClip([w], 0.5, gamma=1.0)
    opt.step()
    assert w.tolist() == [-0.5, 0.0]
    assert opt.telemetry()["norm"] == 60000.0  # itself a float16 number
    assert opt.telemetry()["skipped"] == 0


def test_many_float16_gradients_whose_norm_no_float16_holds() -> None:
    params = [leaf([0.0] * 100, [60000.0] * 100, torch.float16) for _ in range(10)]
    opt = GClip(params, 1.0, gamma=1.0)
    opt.step()
    length = math.sqrt(sum(float(p.detach().double().square().sum()) for p in params))
    assert length == pytest.approx(1.0, rel=1e-3)
    assert opt.telemetry()["norm"] == pytest.approx(60000 * math.sqrt(1000), rel=1e-6)


def test_float32_gradients_whose_squares_overflow_are_clipped() -> None:
    w = leaf(torch.zeros(128), torch.full((128,), 1e19), torch.float32)
    opt = GClip([w], 1.0, gamma=2.0)
    opt.step()
    assert w.detach().double().norm().item() == pytest.approx(2.0, rel=1e-6)
    assert opt.telemetry()["norm"] == pytest.approx(1e19 * math.sqrt(128), rel=1e-6)


def test_float32_gradients_whose_squares_vanish_still_have_a_norm() -> None:
    w = leaf([0.0, 0.0], [3e-30, 4e-30], torch.float32)
    opt = NormalizedGD([w], 1.0, beta=0.0)
    opt.step()
    assert opt.telemetry()["norm"] == pytest.approx(5e-30, rel=1e-6)
    torch.testing.assert_close(w.detach(), torch.tensor([-0.6, -0.8]), rtol=1e-6, atol=0)


def test_float16_normalized_gd_survives_a_multiplier_no_float16_holds() -> None:
    w = leaf([0.0] * 4, [1e-6] * 4, torch.float16)  # 1/||g|| is about 5e5
    NormalizedGD([w], 1.0, beta=0.0).step()
    assert w.tolist() == [-0.5] * 4


def test_float32_normalized_gd_survives_a_multiplier_no_float32_holds() -> None:
    w = leaf([0.0] * 4, [1e-40] * 4, torch.float32)
    NormalizedGD([w], 1.0, beta=0.0).step()
    torch.testing.assert_close(w.detach(), torch.full((4,), -0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("tensors", [1, 300])
def test_the_norm_of_bfloat16_gradients_is_right_to_1e_6(tensors: int) -> None:
    g = torch.Generator().manual_seed(2)
    params = [leaf(torch.zeros(50), torch.randn(50, generator=g), torch.bfloat16) for _ in range(tensors)]
    exact = math.sqrt(math.fsum(x * x for p in params for x in p.grad.double().tolist()))  # type: ignore[union-attr]
    opt = GClip(params, 1.0, gamma=1.0)
    opt.step()
    assert opt.telemetry()["norm"] == pytest.approx(exact, rel=1e-6)
    length = math.sqrt(sum(float(p.detach().double().square().sum()) for p in params))
    assert length == pytest.approx(1.0, rel=2**-8)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_follow_the_float64_ones(rule: str, dtype: torch.dtype) -> None:
    low, high = leaf([1.0, -2.0], dtype=dtype), leaf([1.0, -2.0])
    options = {"momentum": 0.5, "weight_decay": 0.1}
    opts = [make(rule, [w], 0.1, **options) for w in (low, high)]
    for t in range(4):
        high.grad = torch.tensor([3.0 + t, -4.0], dtype=torch.float64)
        low.grad = high.grad.to(dtype)
        for opt in opts:
            opt.step()
    assert low.dtype == dtype
    assert opts[0].state[low]["momentum_buffer"].dtype == dtype
    torch.testing.assert_close(low.detach().double(), high.detach(), rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_weights_of_several_precisions_share_one_norm() -> None:
    a, b = leaf([0.0], [3.0], torch.bfloat16), leaf([0.0], [4.0])
    opt = GClip([a, b], 1.0, gamma=2.5)
    opt.step()
    assert (a.item(), b.item()) == (-1.5, -2.0)


@every_rule
@pytest.mark.parametrize("scope", SCOPES)
def test_a_sparse_gradient_is_refused_before_anything_is_touched(rule: str, scope: str) -> None:
    table = nn.Embedding(5, 2, sparse=True)
    dense = leaf([1.0, 2.0], [3.0, 4.0], torch.float32)
    opt = make(rule, [dense, *table.parameters()], scope=scope, momentum=0.9, weight_decay=0.1)
    table(torch.tensor([1, 1])).sum().backward()
    before = values([dense, table.weight])
    with pytest.raises(TypeError, match=r"sparse gradient of shape \(5, 2\).*sparse=False"):
        opt.step()
    assert same_bits([dense, table.weight], before)
    assert not opt.state[dense]
    assert opt.telemetry()["steps"] == 0
