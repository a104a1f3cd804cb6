"""Clipping folded into the step of torch's fused optimizers: one pass over the gradients less."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from surefoot.optim import norm as norms
from surefoot.optim import scales
from surefoot.optim.checks import check_number, refuse_sparse
from surefoot.optim.thresholds import Threshold, check_gamma
from surefoot.optim.update import HALF

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
LARGEST = torch.finfo(torch.float32).max


@torch.no_grad()
def fused_clip_step(optimizer: Optimizer, *, gamma: float | Threshold, delta: float = 0.0) -> Tensor:
    """Clip by the norm over all gradients and take `optimizer`'s step in one go; return the norm before.

    The same as `clip_grad_(params, gamma=γ, delta=δ)` followed by `optimizer.step()`, up to the rounding of float32
    (the multiplier travels as one). But the fused kernels multiply while they read the gradient (they were given that
    for loss scaling), so that the pass over memory that clips is saved. A step whose norm is not finite is left out:
    weights and state stay as they are, without waiting for the device.

    Afterwards `p.grad` holds the clipped gradient, because the kernels write it back; after a step that was left out,
    or not clipped on the CPU, it is as it was.

    With `torch.amp.GradScaler`: `scaler.unscale_(optimizer)`, this, `scaler.update()`, and no `scaler.step()`.

    Args:
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW`, built with fused=True.
        gamma: threshold γ in (0, inf], or an object that follows the norms, the same one at every step.
        delta: floor δ in [0, 1].

    Returns:
        () float64, the norm over the gradients of all groups before clipping.

    Raises:
        ValueError: an option out of range, or an optimizer that has no fused kernel; nothing has been touched.
        TypeError: a sparse gradient or a DTensor; nothing has been touched.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> sgd = torch.optim.SGD([w], lr=0.5, fused=True)
        >>> w.grad = torch.tensor([30.0, 40.0])
        >>> fused_clip_step(sgd, gamma=1.0).item()
        50.0
        >>> w.detach(), w.grad
        (tensor([2.7000, 3.6000]), tensor([0.6000, 0.8000]))

    Source: the `grad_scale` and `found_inf` that `torch.amp.GradScaler` hands to fused optimizers.
    """
    check_gamma(gamma, "global")
    check_number("delta", delta, 0.0, 1.0, fix="0 is plain clipping, 1 no clipping")
    _check(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    (total,) = norms.sums_of_squares([params], [[p.grad for p in params]])
    size = norms.root(total)
    norm = torch.as_tensor(size, dtype=torch.float64)
    limit = gamma.threshold(size) if isinstance(gamma, Threshold) else gamma
    divisor = 1 / scales.delta_gclip(norm, limit, delta)  # what the kernels divide by, in float32
    skip = ~torch.isfinite(norm) | (divisor > LARGEST)
    if _lacks_buffers(optimizer) and bool(skip):
        # torch would make its momentum buffers of memory as it comes, and leave the filling to this step
        return norm
    if isinstance(size, Tensor) or divisor != 1:  # on the CPU, where asking costs nothing, only if it has to clip
        optimizer.grad_scale = divisor.to(torch.float32)  # type: ignore[attr-defined]
    optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
    return norm


def _check(optimizer: Optimizer) -> None:
    """Refuse what has no fused kernel, or one that does something else."""
    if not isinstance(optimizer, FUSED):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} is not torch's SGD, Adam or AdamW; use clip_grad_ before its step()"
        )
    for i, group in enumerate(optimizer.param_groups):
        if not group["fused"]:
            raise ValueError(
                f"{type(optimizer).__name__}.param_groups[{i}] has fused={group['fused']!r}; build it with fused=True, "
                "or use clip_grad_ before its step()"
            )
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                refuse_sparse(p.grad)
            if norms.is_distributed(p):
                raise TypeError("fused_clip_step does not take DTensors; use clip_grad_ before the step")
            if p.dtype in HALF and p.device.type == "cpu" and isinstance(optimizer, torch.optim.SGD):
                raise ValueError(
                    f"a {p.dtype} parameter on the CPU: torch's fused SGD leaves most of it as it is, without a word; "
                    "build SGD with fused=False and use clip_grad_, or use surefoot.GClip"
                )


def _lacks_buffers(optimizer: Optimizer) -> bool:
    """Say whether torch is yet to make a momentum buffer for one of the gradients."""
    if not isinstance(optimizer, torch.optim.SGD):
        return False
    moving = [p for group in optimizer.param_groups if group["momentum"] != 0 for p in group["params"]]
    return any(p.grad is not None and optimizer.state.get(p, {}).get("momentum_buffer") is None for p in moving)
