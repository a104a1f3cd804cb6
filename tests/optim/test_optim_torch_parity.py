"""Against torch: clip_grad_norm_ + SGD, plain SGD bit for bit, AdamW's decay, SGD's checkpoints."""

import copy
import math
from typing import Any

import pytest
import torch
from optim_helpers import backward, batches, buffers_of, network, same_bits
from torch import Tensor, nn

from surefoot import DeltaGClip, GClip
from surefoot.optim._base import ClippedOptimizer

STEPS = 50
LR = 0.1
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.4},
    {"momentum": 0.8, "nesterov": True},
    {"weight_decay": 0.05},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05, "maximize": True},
    {"maximize": True},
]
everywhere = pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(o) or "plain")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def clip_exactly_(params: list[nn.Parameter], gamma: float) -> float:
    """Do what clip_grad_norm_ says it does, without its 1e-6, and return the norm."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = math.sqrt(math.fsum(x * x for g in grads for x in g.flatten().tolist()))
    for g in grads:
        g.mul_(min(1.0, gamma / norm))
    return norm


def train(net: nn.Module, opt: torch.optim.Optimizer, clip: Any = None, steps: int = STEPS) -> list[Tensor]:
    dtype = next(net.parameters()).dtype
    for batch in batches(steps, dtype):
        backward(net, batch)
        if clip is not None:
            clip(list(net.parameters()))
        opt.step()
    return [p.detach() for p in net.parameters()]


def gamma_between(options: dict[str, Any]) -> float:
    """Return a threshold that some gradients of the run exceed and some do not: about the median of its norms."""
    gamma = 0.8
    for _ in range(2):
        net, found = network(torch.float64), []
        opt = torch.optim.SGD(net.parameters(), LR, **options)
        train(net, opt, lambda params: found.append(clip_exactly_(params, gamma)))  # noqa: B023
        gamma = sorted(found)[STEPS // 2]
    return gamma


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    return math.sqrt(
        sum(float((a.detach().double() - b.detach().double()).square().sum()) for a, b in zip(left, right, strict=True))
    )


@everywhere
def test_delta_zero_is_exact_clipping_followed_by_sgd(options: dict[str, Any]) -> None:
    gamma = gamma_between(options)
    ours, theirs, torchs = network(torch.float64), network(torch.float64), network(torch.float64)
    opt = DeltaGClip(ours.parameters(), LR, gamma=gamma, delta=0.0, **options)
    mine = train(ours, opt)
    counts = opt.telemetry()
    assert counts["clipped"] >= 5
    assert counts["unclipped"] >= 5
    assert counts["clipped"] + counts["unclipped"] == STEPS

    exact = train(theirs, torch.optim.SGD(theirs.parameters(), LR, **options), lambda p: clip_exactly_(p, gamma))
    assert distance(mine, exact) <= 1e-12 * distance(mine, list(network(torch.float64).parameters()))

    # torch divides by norm + 1e-6, so each clipped step is shorter by that part of itself. Steps have length <= LR
    # gamma / (1 - momentum); what an early difference becomes later is the network's affair (a factor of 10 is ample).
    clipped = train(
        torchs,
        torch.optim.SGD(torchs.parameters(), LR, **options),
        lambda p: torch.nn.utils.clip_grad_norm_(p, gamma),
    )
    shorter = 1e-6 / gamma * counts["clipped"] * LR * gamma / (1 - options.get("momentum", 0.0))
    assert 1e-3 * shorter < distance(mine, clipped) <= 10 * shorter


@everywhere
@both_dtypes
@pytest.mark.parametrize(
    "letters", [{"gamma": 0.3, "delta": 1.0}, {"gamma": math.inf, "delta": 0.2}], ids=["δ=1", "γ=∞"]
)
def test_delta_one_and_gamma_infinite_are_sgd_bit_for_bit(
    options: dict[str, Any], dtype: torch.dtype, letters: dict[str, float]
) -> None:
    ours, theirs = network(dtype), network(dtype)
    opt = DeltaGClip(ours.parameters(), LR, **letters, **options)
    sgd = torch.optim.SGD(theirs.parameters(), LR, fused=True, **options)
    mine = train(ours, opt)
    assert same_bits(mine, train(theirs, sgd))
    if options.get("momentum"):
        found = buffers_of(opt)
        buffers = [found[p] for p in ours.parameters()]
        assert same_bits(buffers, [sgd.state[p]["momentum_buffer"] for p in theirs.parameters()])
    counts = opt.telemetry()
    assert (counts["floored"] > 10) == (letters["delta"] == 1.0)  # far above γ, and still the plain step
    assert not same_bits(mine, list(network(dtype).parameters()))


@everywhere
@both_dtypes
def test_gclip_is_delta_gclip_with_delta_zero_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    left, right = network(dtype), network(dtype)
    a = GClip(left.parameters(), LR, gamma=0.7, **options)
    b = DeltaGClip(right.parameters(), LR, gamma=0.7, delta=0.0, **options)
    assert same_bits(train(left, a, steps=15), train(right, b, steps=15))
    seen = a.telemetry()
    assert seen["clipped"] > 0
    assert seen == b.telemetry()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_decay_shrinks_the_weights_first_and_knows_nothing_of_clipping(momentum: float) -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    opt = DeltaGClip(
        ours.parameters(), LR, gamma=0.2, delta=0.1, momentum=momentum, weight_decay=0.3, decoupled_weight_decay=True
    )
    bare = DeltaGClip(theirs.parameters(), LR, gamma=0.2, delta=0.1, momentum=momentum)
    for batch in batches(STEPS, torch.float64):
        backward(ours, batch)
        opt.step()
        backward(theirs, batch)
        with torch.no_grad():
            for p in theirs.parameters():
                p.mul_(1 - LR * 0.3)
        bare.step()
    assert distance(list(ours.parameters()), list(theirs.parameters())) <= 1e-12
    assert opt.telemetry()["clipped"] > 10


@both_dtypes
def test_decoupled_decay_is_adamws(dtype: torch.dtype) -> None:
    ours, theirs = network(dtype), network(dtype)
    for net in (ours, theirs):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)  # of AdamW's rule nothing but the decay is left
    DeltaGClip(ours.parameters(), LR, gamma=1.0, delta=0.1, weight_decay=0.3, decoupled_weight_decay=True).step()
    torch.optim.AdamW(theirs.parameters(), LR, weight_decay=0.3).step()
    assert same_bits(ours.parameters(), theirs.parameters())
    assert not same_bits(ours.parameters(), network(dtype).parameters())


@everywhere
def test_an_sgd_checkpoint_is_continued_as_sgd_would(options: dict[str, Any]) -> None:
    theirs = network()
    sgd = torch.optim.SGD(theirs.parameters(), LR, fused=True, **options)
    train(theirs, sgd, steps=10)
    ours = copy.deepcopy(theirs)
    # lr and the options of SGD come with its checkpoint; gamma and delta, which it does not know, stay ours
    opt = DeltaGClip(ours.parameters(), 9.9, gamma=0.1, delta=1.0)
    opt.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert opt.param_groups[0]["lr"] == LR
    assert opt.param_groups[0]["gamma"] == 0.1
    assert same_bits(train(ours, opt, steps=10), train(theirs, sgd, steps=10))
    assert opt.telemetry()["steps"] == 10


def test_a_checkpoint_with_other_groups_is_refused_and_changes_nothing() -> None:
    net = network()
    opt = GClip(net.parameters(), LR, gamma=1.0, momentum=0.9)
    train(net, opt, steps=3)
    before = copy.deepcopy(opt.state_dict())
    halves = [{"params": list(net.parameters())[:2]}, {"params": list(net.parameters())[2:]}]
    fewer = [{"params": list(net.parameters())[:3]}]
    more = [{"params": list(net.parameters())}, {"params": [nn.Parameter(torch.zeros(1))]}]
    for other in (halves, fewer, more):
        saved = torch.optim.SGD(other, LR, momentum=0.9).state_dict()
        with pytest.raises(ValueError, match="param"):
            opt.load_state_dict(saved)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert same_bits([after["telemetry"]], [before["telemetry"]])
    assert same_bits(
        [s["momentum_buffer"] for s in after["state"].values()],
        [s["momentum_buffer"] for s in before["state"].values()],
    )


@everywhere
def test_a_tensor_lr_steps_like_sgd_with_one(options: dict[str, Any]) -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    lr = torch.tensor(LR, dtype=torch.float64)
    opt: ClippedOptimizer = DeltaGClip(ours.parameters(), lr, gamma=0.3, delta=1.0, **options)
    mine = train(ours, opt, steps=10)
    theirs_after = train(theirs, torch.optim.SGD(theirs.parameters(), lr.clone(), **options), steps=10)
    assert distance(mine, theirs_after) <= 1e-13
