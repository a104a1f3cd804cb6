"""δ-GClip: clipping with a floor (arXiv 2404.08624)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from surefoot.optim import scales
from surefoot.optim._base import ClippedOptimizer
from surefoot.optim.checks import check_number, floor_threshold


class DeltaGClip(ClippedOptimizer):
    """δ-GClip: w <- w - h g with h = η min{1, max{δ, γ/||g||}}.

    ==========  ===================  ==========  ================
    regime      when                 h           length of step
    ==========  ===================  ==========  ================
    unclipped   ||g|| <= γ           η           η ||g|| <= η γ
    clipped     γ < ||g|| < γ/δ      η γ/||g||   η γ
    floored     ||g|| >= γ/δ         η δ         η δ ||g|| >= η γ
    skipped     ||g|| not finite     0           0
    ==========  ===================  ==========  ================

    With d = scale g + λ w, momentum and Nesterov act on d exactly as in `torch.optim.SGD`, so δ = 0 is
    `clip_grad_norm_(max_norm=γ)` followed by SGD in every option. (The authors' code also multiplies the decay by the
    scale and so shrinks it on clipped steps; ours does not.)

    Args:
        params: parameters or groups of them; each group may have its own lr, gamma, delta and so on.
        lr: η > 0. The longest clipped step has length η γ.
        gamma: threshold γ in (0, inf] on the gradient norm; inf never clips.
        delta: floor δ in [0, 1]: h never falls below η δ. 0 is plain clipping, 1 plain gradient descent.
        momentum: μ >= 0; 0 keeps no buffer.
        dampening: τ, the gradient enters the buffer with weight 1 - τ.
        nesterov: step along d + μ b; needs momentum > 0 and dampening = 0.
        weight_decay: λ >= 0. Any decay voids the convergence theorem.
        decoupled_weight_decay: shrink w by lr λ before the step, as AdamW does, untouched by clipping.
        scope: "global" takes one norm over every parameter of every group (the theorem's case), "group" one a group,
            "tensor" one a tensor.
        nonfinite: "skip" leaves parameters and state untouched and counts the step, "raise" raises
            FloatingPointError before touching anything, "propagate" lets NaN through as torch does.
        maximize: ascend instead of descend.
        master_weights: keep a float32 copy of half-precision parameters in the state and step that.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = DeltaGClip([w], lr=1.0, gamma=1.0, delta=0.1)
        >>> (w.square().sum() / 2).backward()
        >>> opt.step()
        >>> w.detach()                       # ||g|| = 5, so the step has length η γ = 1
        tensor([2.4000, 3.2000])
        >>> opt.telemetry()["clipped"]
        1

    Source: Tucat, Mukherjee, Sen, Sun, Rivasplata, arXiv 2404.08624, Definition 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        gamma: float,
        delta: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        scope: str = "global",
        nonfinite: str = "skip",
        maximize: bool = False,
        master_weights: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            {"gamma": gamma, "delta": delta},
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            scope=scope,
            nonfinite=nonfinite,
            maximize=maximize,
            master_weights=master_weights,
        )

    def _check_rule(self, group: dict[str, Any]) -> None:
        check_number("gamma", group["gamma"], 0.0, math.inf, open_low=True, inf=True)
        check_number("delta", group["delta"], 0.0, 1.0, fix="0 is plain clipping, 1 plain gradient descent")

    def _scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return scales.delta_gclip(norm, group["gamma"], group["delta"])

    def _thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        return group["gamma"], floor_threshold(group["gamma"], group["delta"])
