"""agc_ against its formula, one unit at a time in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import backward, batches, leaf, network, same_bits, values
from torch import Tensor, nn

from surefoot.optim import agc_

nan, inf = math.nan, math.inf


def size(entries: Tensor) -> float:
    return math.hypot(*[abs(x) for x in entries.flatten().tolist()])


def twin(w: Tensor, g: Tensor, clipping: float, eps: float) -> Tensor:
    """G_i min{1, λ max(||W_i||, ε)/||G_i||} for each row i, or for the whole of a vector or number."""
    wide = torch.complex128 if w.is_complex() else torch.float64
    w, g = w.detach().to(wide), g.detach().to(wide).clone()
    for i in range(len(w)) if w.ndim > 1 else [...]:
        norm = size(g[i])
        if norm > 0:
            g[i] = g[i] * min(1.0, clipping * max(size(w[i]), eps) / norm)
    return g


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([(), (1,), (7,), (4, 3), (1, 5), (5, 1), (3, 2, 2), (4, 2, 3, 3), (2, 2, 2, 1, 2), (0,), (3, 0)]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128]),
    st.floats(1e-3, 1.0),
    st.floats(1e-4, 1.0),
    st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    st.integers(0, 100),
)
def test_it_is_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, clipping: float, eps: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    w = nn.Parameter(torch.randn(shape, generator=generator, dtype=wide).to(dtype))
    w.grad = (scale * torch.randn(shape, generator=generator, dtype=wide)).to(dtype)
    before, weights = w.grad.clone(), w.detach().clone()
    expected = twin(w, w.grad, clipping, eps)
    norm = agc_(w, clipping=clipping, eps=eps)
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    assert norm.item() == pytest.approx(size(before), rel=1e-6)
    exact = torch.finfo(dtype).eps
    torch.testing.assert_close(w.grad.to(wide), expected, rtol=4 * exact, atol=torch.finfo(dtype).smallest_normal)
    assert w.grad.dtype == dtype
    assert same_bits([w], [weights])


def test_rows_are_clipped_one_by_one() -> None:
    w = leaf([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.01], [3.0, 4.0], [0.0, 0.0]])
    kept = w.grad[1].clone()
    agc_([w], clipping=0.01, eps=1e-3)
    assert [size(row) for row in w.grad] == pytest.approx([0.05, 0.01, 1e-5, 0.0])
    assert same_bits([w.grad[1]], [kept])


@pytest.mark.parametrize(
    "given_as",
    [
        lambda params: params,
        lambda params: iter(params),
        lambda params: torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}]).param_groups,
    ],
    ids=["list", "iterator", "param_groups"],
)
def test_parameters_may_come_in_any_form(given_as: Callable[[Any], Any]) -> None:
    params = [leaf([1.0], [3.0]), leaf([2.0]), leaf([[1.0]], [[4.0]])]
    assert agc_(given_as(params), clipping=0.1).item() == 5.0
    assert params[0].grad.item() == pytest.approx(0.1)
    assert params[1].grad is None
    assert params[2].grad.item() == pytest.approx(0.1)
    assert agc_([]).item() == 0.0


def test_a_network_of_many_layers() -> None:
    net = network(torch.float64)
    backward(net, batches(1, torch.float64)[0])
    before = values(p.grad for p in net.parameters())
    agc_(net.parameters(), clipping=0.02)
    clipped = 0
    for p, g in zip(net.parameters(), before):
        torch.testing.assert_close(p.grad, twin(p, g, 0.02, 1e-3), rtol=1e-12, atol=1e-15)
        clipped += not torch.equal(p.grad, g)
    assert clipped > 2


def test_channels_last_gradients_and_large_ones() -> None:
    w = nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))
    w.grad = torch.full((2, 3, 2, 2), 1e30)  # the squares overflow float32
    agc_(w, clipping=0.1)
    torch.testing.assert_close(w.grad, torch.full((2, 3, 2, 2), 0.1))


@pytest.mark.parametrize("bad", [nan, inf])
def test_what_a_bad_gradient_does(bad: float) -> None:
    def pair() -> list[nn.Parameter]:
        return [leaf([[1.0], [1.0]], [[bad], [5.0]]), leaf([1.0], [5.0])]

    params = pair()
    assert not math.isfinite(agc_(params).item())
    assert all(not p.grad.any() for p in params)
    params = pair()
    before = values(p.grad for p in params)
    with pytest.raises(FloatingPointError, match="1 of 2 gradients"):
        agc_(params, nonfinite="raise")
    assert same_bits([p.grad for p in params], before)
    agc_(params, nonfinite="propagate")
    assert params[0].grad[0].isnan()
    assert params[0].grad[1].item() == pytest.approx(0.01)
    assert params[1].grad.item() == pytest.approx(0.01)


def test_what_it_refuses() -> None:
    w = leaf([1.0], [1.0])
    for name, value in (("clipping", 0), ("clipping", nan), ("eps", 0.0), ("eps", inf), ("nonfinite", "skip")):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            agc_(w, **{name: value})
    with pytest.raises(TypeError, match="clipping='a'"):
        agc_(w, clipping="a")
    w.grad = torch.ones(1, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        agc_(w)


def test_dtensors_are_refused(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        w = nn.Parameter(DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (1,)), [Replicate()]))
        w.sum().backward()
        with pytest.raises(TypeError, match="DTensor"):
            agc_(w)
    finally:
        dist.destroy_process_group()
