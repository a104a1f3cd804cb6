"""fused_clip_step: the clip folded into torch's fused step, against clip_grad_norm_ and step()."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from optim_helpers import backward, batches, leaf, network, same_bits, values
from test_optim_device_path import squares_as_tensor
from torch import Tensor, nn

from surefoot import GClip, clip_grad_
from surefoot.optim import Percentile, ZScore, fused_clip_step
from surefoot.optim import norm as norms
from surefoot.testing import NoSync

nan, inf = math.nan, math.inf
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params, **o: torch.optim.SGD(params, 0.1, **o),
    "sgd nesterov": lambda params, **o: torch.optim.SGD(
        params, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **o
    ),
    "sgd dampening": lambda params, **o: torch.optim.SGD(params, 0.1, momentum=0.9, dampening=0.5, **o),
    "adam": lambda params, **o: torch.optim.Adam(params, 0.01, weight_decay=0.01, **o),
    "adamw": lambda params, **o: torch.optim.AdamW(params, 0.01, amsgrad=True, **o),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def everything(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the weights and of every tensor of the state."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = [t for p in params for t in opt.state.get(p, {}).values() if isinstance(t, Tensor)]
    return values([*params, *state])


def gradients(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.3, 100.0])
def test_it_is_clip_grad_norm_and_step(make: Any, dtype: torch.dtype, gamma: float) -> None:
    ours, theirs = network(dtype), network(dtype)
    opts = make(ours.parameters(), fused=True), make(theirs.parameters())
    clipped = 0
    for batch in batches(10, dtype):
        backward(ours, batch)
        before = values(gradients(ours.parameters()))
        norm = fused_clip_step(opts[0], gamma=gamma)
        backward(theirs, batch)
        torchs = torch.nn.utils.clip_grad_norm_(theirs.parameters(), gamma)
        opts[1].step()
        assert norm.dtype == torch.float64
        assert norm.item() == pytest.approx(torchs.item(), rel=1e-5)
        scale = min(1.0, gamma / norm.item())
        clipped += scale < 1
        for g, old in zip(gradients(ours.parameters()), before):
            torch.testing.assert_close(g, scale * old, rtol=3e-7, atol=1e-9)  # the clipped gradient is left behind
        if scale == 1:
            assert same_bits(gradients(ours.parameters()), before)
    assert (clipped > 5) == (gamma == 0.3)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-5 if "Adam" in type(opts[0]).__name__ else 2e-7)
    assert not {"grad_scale", "found_inf"} & set(vars(opts[0]))


@pytest.mark.parametrize("name", ["sgd nesterov", "adamw"])
def test_one_step_agrees_to_1e_7(name: str) -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    a, b = OPTIMIZERS[name](ours.parameters(), fused=True), OPTIMIZERS[name](theirs.parameters())
    for net in (ours, theirs):
        backward(net, batches(1, torch.float64)[0])
    fused_clip_step(a, gamma=0.1, delta=0.01)
    clip_grad_(theirs.parameters(), gamma=0.1, delta=0.01)
    b.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("delta", "expected"), [(0.0, -1.0), (0.25, -2.5), (1.0, -10.0)])
def test_the_floor_acts(delta: float, expected: float) -> None:
    w = leaf([0.0], [10.0])
    assert fused_clip_step(torch.optim.SGD([w], 1.0, fused=True), gamma=1.0, delta=delta).item() == 10.0
    assert w.item() == pytest.approx(expected, rel=1e-7)


def test_the_norm_is_over_all_groups_that_have_gradients() -> None:
    params = [leaf([0.0], [3.0]), leaf([0.0], [4.0]), leaf([1.0])]
    opt = torch.optim.SGD([{"params": [p]} for p in params], 1.0, fused=True)
    assert fused_clip_step(opt, gamma=1.0).item() == 5.0
    assert [p.item() for p in params] == pytest.approx([-0.6, -0.8, 1.0], rel=1e-7)
    for p in params:
        p.grad = None
    assert fused_clip_step(opt, gamma=1.0).item() == 0.0


@every_optimizer
@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("first", [0, 1])
def test_a_bad_step_is_left_out_even_the_first(make: Any, bad: float, first: int) -> None:
    nets = network(), network()
    opts = [make(net.parameters(), fused=True) for net in nets]
    for t, batch in enumerate(batches(4)):
        backward(nets[0], batch)
        if t == first:
            next(nets[0].parameters()).grad.view(-1)[0] = bad
            left = values(gradients(nets[0].parameters()))
            before = everything(opts[0])
            assert not math.isfinite(fused_clip_step(opts[0], gamma=0.3).item())
            assert same_bits(gradients(nets[0].parameters()), left)
            if first:
                assert same_bits(everything(opts[0]), before)
            else:
                assert same_bits(nets[0].parameters(), network().parameters())
            continue
        fused_clip_step(opts[0], gamma=0.3)
        backward(nets[1], batch)
        fused_clip_step(opts[1], gamma=0.3)
    assert same_bits(everything(opts[0]), everything(opts[1]))


def test_torch_alone_would_take_its_first_momentum_from_anywhere() -> None:
    w = leaf(torch.zeros(3), torch.ones(3))
    opt = torch.optim.SGD([w], 0.1, momentum=0.9, fused=True)
    opt.found_inf = torch.ones(())
    opt.step()
    assert "momentum_buffer" in opt.state[w]  # made by empty_like, filled by nobody: why our first step waits


def test_a_momentum_that_comes_late() -> None:
    early, late = leaf([0.0], [1.0]), leaf([0.0])
    opt = torch.optim.SGD([{"params": [early]}, {"params": [late]}], 1.0, momentum=0.5, fused=True)
    fused_clip_step(opt, gamma=10.0)
    late.grad = torch.tensor([nan], dtype=torch.float64)
    fused_clip_step(opt, gamma=10.0)
    assert "momentum_buffer" not in opt.state.get(late, {})
    late.grad = torch.tensor([2.0], dtype=torch.float64)
    fused_clip_step(opt, gamma=10.0)
    assert (early.item(), late.item()) == (-2.5, -2.0)


@pytest.mark.parametrize(("grad", "norm"), [(1e100, 1e100), (1e200, inf)])
def test_a_multiplier_beyond_float32_leaves_the_step_out(grad: float, norm: float) -> None:
    w = leaf([1.0], [grad])
    assert fused_clip_step(torch.optim.SGD([w], 1.0, fused=True), gamma=1.0).item() == pytest.approx(norm)
    assert w.item() == 1.0
    if norm < inf:
        fused_clip_step(torch.optim.SGD([w], 1 / grad, fused=True), gamma=1.0, delta=1.0)
        assert w.item() == pytest.approx(0.0, abs=1e-12)


def test_a_threshold_follows_the_norms() -> None:
    w = leaf([0.0], [1.0])
    opt, rule = torch.optim.SGD([w], 1.0, fused=True), Percentile(0)
    for g, place in ((2.0, -2.0), (nan, -2.0), (8.0, -4.0), (1.0, -5.0)):
        w.grad = torch.tensor([g], dtype=torch.float64)
        fused_clip_step(opt, gamma=rule)
        assert w.item() == pytest.approx(place, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sgd_in_half_precision_on_the_cpu_is_refused(dtype: torch.dtype) -> None:
    w = leaf(torch.ones(50), torch.ones(50), dtype)
    opt = torch.optim.SGD([w], 0.5, fused=True)
    with pytest.raises(ValueError, match=f"{dtype} parameter on the CPU"):
        fused_clip_step(opt, gamma=1.0)
    assert torch.equal(w.detach(), torch.ones(50, dtype=dtype))
    opt.step()
    stayed = (w.detach() == 1).sum().item()
    assert stayed > 25, "torch has mended its kernel: then half precision need not be refused"


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adam_in_half_precision_moves_every_weight(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(77, generator=generator)
    grads = 5 * torch.randn(6, 77, generator=generator)
    ours, theirs = leaf(start, dtype=dtype), leaf(start.to(dtype), dtype=torch.float64)
    a, b = OPTIMIZERS[name]([ours], fused=True), OPTIMIZERS[name]([theirs])
    for grad in grads:
        ours.grad = grad.to(dtype)
        fused_clip_step(a, gamma=4.0)
        theirs.grad = grad.to(dtype).double()
        clip_grad_([theirs], gamma=4.0)
        b.step()
    torch.testing.assert_close(ours.double(), theirs, rtol=0.03, atol=0.03)
    assert (ours != start.to(dtype)).sum() > 70


def test_what_it_refuses_before_anything_is_touched() -> None:
    w = leaf([1.0], [5.0])
    refused: list[tuple[Any, str]] = [
        (torch.optim.SGD([w], 0.1), r"SGD.param_groups\[0\] has fused=None"),
        (torch.optim.AdamW([w], 0.1, foreach=True), "fused=None|fused=False"),
        (torch.optim.RMSprop([w], 0.1), "optimizer=RMSprop is not torch's SGD, Adam or AdamW"),
        (GClip([w], 0.1, gamma=1.0), "optimizer=GClip"),
        ([w], "optimizer=list"),
    ]
    for opt, message in refused:
        with pytest.raises(ValueError, match=message):
            fused_clip_step(opt, gamma=1.0)
    opt = torch.optim.SGD([w], 0.1, fused=True)
    for name, value in (("gamma", 0), ("gamma", nan), ("delta", 2.0)):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            fused_clip_step(opt, **{"gamma": 1.0, name: value})
    assert (w.item(), w.grad.item()) == (1.0, 5.0)
    w.grad = w.grad.to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        fused_clip_step(opt, gamma=1.0)


def test_with_a_grad_scaler() -> None:
    nets = network(), network()
    opts = [OPTIMIZERS["adamw"](net.parameters(), fused=True) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t, batch in enumerate(batches(5)):
        backward(nets[0], batch)
        nets[1].zero_grad()
        scaler.scale(nn.functional.cross_entropy(nets[1](batch[0]), batch[1])).backward()
        if t == 2:
            for net in nets:
                next(net.parameters()).grad.fill_(inf)
        fused_clip_step(opts[0], gamma=0.3)
        scaler.unscale_(opts[1])
        fused_clip_step(opts[1], gamma=0.3)
        scaler.update()
    assert scaler.get_scale() == 512.0
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_waits_but_the_first_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "squares", squares_as_tensor)
    asked = []

    def step(self: torch.optim.Optimizer) -> None:
        asked.append((self.grad_scale, self.found_inf))

    for make in OPTIMIZERS.values():
        w = leaf([1.0], [5.0])
        opt = make([w], fused=True)
        for gamma in (1.0, ZScore(warmup=1)):
            fused_clip_step(opt, gamma=gamma)  # with momentum, torch makes its buffers
            with monkeypatch.context() as patch:
                patch.setattr(type(opt), "step", step)  # torch's own asks lr and the like on the CPU
                with NoSync():
                    fused_clip_step(opt, gamma=gamma)
    assert len(asked) == 2 * len(OPTIMIZERS)


def test_an_error_in_the_step_leaves_no_attributes_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    w = leaf([1.0], [5.0])
    opt = torch.optim.SGD([w], 0.1, fused=True)

    def broken() -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(opt, "step", broken)
    with pytest.raises(RuntimeError, match="no"):
        fused_clip_step(opt, gamma=1.0)
    assert not {"grad_scale", "found_inf"} & set(vars(opt))
