"""What several of the optimizer tests build: leaves with a gradient, one optimizer of each rule, a small network."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surefoot import DeltaGClip, GClip, NormalizedGD, SmoothClip
from surefoot.optim._base import ClippedOptimizer

# rule -> its class and letters that make a gradient of norm 5 a clipped one (and 0.5 an unclipped one)
RULES: dict[str, tuple[Callable[..., ClippedOptimizer], dict[str, float]]] = {
    "delta_gclip": (DeltaGClip, {"gamma": 1.0, "delta": 0.1}),
    "gclip": (GClip, {"gamma": 1.0}),
    "normalized": (NormalizedGD, {"beta": 1.0}),
    "smooth_clip": (SmoothClip, {"L0": 1.0, "L1": 1.0}),
}


def make(rule: str, params: Iterable[Any], lr: float | Tensor = 0.5, **options: Any) -> ClippedOptimizer:
    """Return the optimizer of `rule` with the letters of `RULES`, unless `options` has others."""
    cls, letters = RULES[rule]
    return cls(params, lr, **{**letters, **options})


def leaf(value: Any, grad: Any = None, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """Return a parameter with the given gradient."""
    w = nn.Parameter(torch.as_tensor(value, dtype=dtype).clone())
    if grad is not None:
        w.grad = torch.as_tensor(grad, dtype=dtype).clone()
    return w


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a small convolutional network, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)
        )
    return net.to(dtype)


def batches(number: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and labels, the same at each call."""
    g = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 1, 6, 6, generator=g).to(dtype), torch.randint(4, (8,), generator=g)) for _ in range(number)
    ]


def backward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Leave the gradients of the cross-entropy in the network and return the loss."""
    net.zero_grad()
    loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
    loss.backward()
    return loss


def values(params: Iterable[Tensor]) -> list[Tensor]:
    """Return copies of the parameters."""
    return [p.detach().clone() for p in params]


def same_bits(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Tell whether all tensors agree bit for bit: NaN equals NaN, 0 differs from -0."""
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))
        for a, b in zip(list(left), list(right), strict=True)
    )


def buffers_of(opt: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return each parameter's momentum buffer as the state dictionary tells it."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = opt.state_dict()["state"]
    return {params[i]: entry["momentum_buffer"] for i, entry in state.items() if "momentum_buffer" in entry}
