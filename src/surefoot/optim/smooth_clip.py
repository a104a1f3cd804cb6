"""Smooth (L0, L1) clipping: the step that measured smoothness constants ask for."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from surefoot.optim import scales
from surefoot.optim._base import ClippedOptimizer
from surefoot.optim.checks import check_number


class SmoothClip(ClippedOptimizer):
    """Smooth clipping: w <- w - h g with h = lr / (L0 + L1 ||g||).

    For a function with ||∇²f|| <= L0 + L1 ||∇f||. `telemetry()` counts a step as clipped where L1 ||g|| > L0, that is
    above the threshold L0/L1; there is no floor.

    Args:
        params: parameters or groups of them.
        lr: a factor on the step, 1 unless a schedule changes it.
        L0: smoothness where the gradient vanishes, > 0.
        L1: growth of smoothness with the gradient norm, >= 0; 0 is gradient descent with step 1/L0.
        options: the further options of `DeltaGClip`: momentum, dampening, nesterov, weight_decay,
            decoupled_weight_decay, scope, nonfinite, maximize, master_weights.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([10.0]))
        >>> opt = SmoothClip([w], L0=4.0, L1=3.0)     # w^4 is (4, 3)-smooth
        >>> w.pow(4).sum().backward()
        >>> opt.step()
        >>> round(w.item(), 3)                        # 10 - 4000 / (4 + 3 * 4000)
        9.667

    Source: (L0, L1)-smoothness: arXiv 1905.11881; this step: Vankov et al., arXiv 2410.10800.
    """

    def __init__(self, params: ParamsT, lr: float | Tensor = 1.0, *, L0: float, L1: float, **options: Any) -> None:
        super().__init__(params, lr, {"L0": L0, "L1": L1}, **options)

    def check_rule(self, group: dict[str, Any]) -> None:
        check_number("L0", group["L0"], 0.0, math.inf, open_low=True)
        check_number("L1", group["L1"], 0.0, math.inf)

    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return scales.smooth_clip(norm, group["L0"], group["L1"])

    def thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        return (group["L0"] / group["L1"] if group["L1"] > 0 else math.inf), math.inf
