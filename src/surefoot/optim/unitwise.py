"""Unit-wise (adaptive) gradient clipping: each output unit against the size of its own weights (arXiv 2102.06171)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from surefoot.optim import norm as norms
from surefoot.optim.checks import check_choice, check_number, nonfinite_message, refuse_sparse
from surefoot.optim.clip import NONFINITE


@torch.no_grad()
def agc_(
    parameters: Tensor | Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    clipping: float = 0.01,
    eps: float = 1e-3,
    nonfinite: str = "zero",
) -> Tensor:
    """Clip the gradient of each output unit in place to a share of its weights' norm; return the norm before.

        G_i <- G_i min{1, λ max(||W_i||, ε) / ||G_i||}

    A unit i is a row, W[i], of a tensor with two or more dimensions (of a linear or convolutional weight: what leads to
    one output); a vector or a number is one unit as a whole. The paper leaves out the last linear layer: pass the other
    parameters, `agc_(net.body.parameters())`.

    Args:
        parameters: a tensor, tensors, or an optimizer's `param_groups`; those without a gradient are passed over.
        clipping: λ > 0, the longest gradient relative to the weights: 0.01 for large batches, more for small ones.
        eps: ε > 0, the least weight norm that counts, so that units that start at 0 can leave it.
        nonfinite: what to do when the norm of any unit is NaN or infinite, as in `clip_grad_`: "zero" sets every
            gradient to zero, "raise" raises before touching anything, "propagate" lets it through.

    Returns:
        () float64, the norm over all gradients before clipping.

    Raises:
        FloatingPointError: with nonfinite="raise", when a norm is not finite.
        TypeError: a parameter is a DTensor or its gradient sparse; nothing has been touched.
        ValueError: an option out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> w.grad = torch.tensor([[0.0, 5.0], [0.0, 5e-6]])
        >>> round(agc_(w, clipping=0.01).item(), 6)
        5.0
        >>> w.grad                              # 0.01 * 5; the second row is within 0.01 * 0.001
        tensor([[0.0000e+00, 5.0000e-02],
                [0.0000e+00, 5.0000e-06]])

    Source: Brock, De, Smith, Simonyan, High-Performance Large-Scale Image Recognition Without Normalization,
    arXiv 2102.06171; units as in timm's `adaptive_clip_grad`.
    """
    check_number("clipping", clipping, 0.0, math.inf, open_low=True)
    check_number("eps", eps, 0.0, math.inf, open_low=True)
    check_choice("nonfinite", nonfinite, NONFINITE)
    entries = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if entries and isinstance(entries[0], dict):
        entries = [p for group in entries for p in cast(dict[str, Any], group)["params"]]
    params = [p for p in cast(list[Tensor], entries) if p.grad is not None]
    grads = [g for p in params if (g := p.grad) is not None]
    for g in grads:
        if g.is_sparse:
            refuse_sparse(g)
    if norms.is_distributed(*params):
        raise TypeError("agc_ does not take DTensors: the rows of a weight may be spread over ranks; use clip_grad_")
    sizes = [_unit_norms(g) for g in grads]
    total = norms.global_norm(sizes)
    if nonfinite != "propagate" and not torch.isfinite(total):
        if nonfinite == "raise":
            raise FloatingPointError(nonfinite_message(grads, float(total)))
        for g in grads:
            g.zero_()
        return total
    for p, g, size in zip(params, grads, sizes):
        longest = clipping * _unit_norms(p).clamp(min=eps)
        # not longest/size where the unit is within it, least of all at 0/0
        factor = torch.where(size <= longest, 1.0, longest / size)
        g.mul_(factor.to(torch.promote_types(g.real.dtype, torch.float32)))  # not rounded to half precision
    return total


def _unit_norms(tensor: Tensor) -> Tensor:
    """Return the norm of each row, shaped to be multiplied with the tensor, float64."""
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    return torch.linalg.vector_norm(tensor.detach(), dim=dims, keepdim=True, dtype=dtype)
