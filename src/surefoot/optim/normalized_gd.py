"""Normalized gradient descent (arXiv 1905.11881)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from surefoot.optim import scales
from surefoot.optim._base import ClippedOptimizer
from surefoot.optim.checks import check_number


class NormalizedGD(ClippedOptimizer):
    """Normalized gradient descent: w <- w - h g with h = lr / (||g|| + β).

    Equal to clipping up to a factor of two: with η = lr/β and γ = β, η min{1, γ/||g||} / 2 <= h <= η min{1, γ/||g||}.
    `telemetry()` counts by that threshold: unclipped where ||g|| <= β, clipped above; there is no floor.

    Args:
        params: parameters or groups of them.
        lr: the longest step, > 0.
        beta: β in [0, inf); 0 always steps by exactly lr (and by nothing where the gradient vanishes).
        options: the further options of `DeltaGClip`: momentum, dampening, nesterov, weight_decay,
            decoupled_weight_decay, scope, nonfinite, maximize, master_weights.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = NormalizedGD([w], lr=1.0, beta=5.0)
        >>> (w.square().sum() / 2).backward()
        >>> opt.step()
        >>> w.detach()
        tensor([2.7000, 3.6000])

    Source: Zhang, He, Sra, Jadbabaie, arXiv 1905.11881.
    """

    def __init__(self, params: ParamsT, lr: float | Tensor, *, beta: float, **options: Any) -> None:
        super().__init__(params, lr, {"beta": beta}, **options)

    def check_rule(self, group: dict[str, Any]) -> None:
        check_number("beta", group["beta"], 0.0, math.inf)

    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return scales.normalized(norm, group["beta"])

    def thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        return group["beta"], math.inf
