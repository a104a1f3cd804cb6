"""torch's fused SGD kernel spelled out in plain operations, for torch.compile, which cannot look into the kernel.

The compiler makes one kernel of them again. Letters as in `update.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def traced_sgd_(
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    found_inf: Tensor,
) -> None:
    """Take the step that `torch._fused_sgd_` takes with the same arguments; none if `found_inf`, () float, is not 0."""
    skip = found_inf != 0
    for i, (w, g) in enumerate(zip(weights, grads)):
        exact = torch.promote_types(w.dtype, torch.float32)  # half precision is computed in float32, rounded once
        d = (-g if maximize else g).to(exact)
        if weight_decay != 0:
            d = d + weight_decay * w.to(exact)
        if momentum != 0:
            b = momentum * buffers[i].to(exact) + (1 - dampening) * d
            buffers[i].copy_(torch.where(skip, buffers[i], b))
            d = d + momentum * b if nesterov else b
        w.copy_(torch.where(skip, w, w.to(exact) - lr * d))
