"""The same rules for any other optimizer: scale the gradients in place between backward() and step()."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from surefoot.optim import norm as norms
from surefoot.optim import scales
from surefoot.optim.checks import check_choice, check_number, nonfinite_message, refuse_sparse
from surefoot.optim.thresholds import Threshold, check_gamma

NONFINITE = ("zero", "raise", "propagate")


@torch.no_grad()
def clip_grad_(
    parameters: Tensor | Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    gamma: float | Threshold,
    delta: float = 0.0,
    scope: str = "global",
    nonfinite: str = "zero",
) -> Tensor:
    """Multiply the gradients in place by min{1, max{δ, γ/||g||}} and return the norm before.

    Args:
        parameters: a tensor, tensors, or an optimizer's `param_groups`; those without a gradient are passed over.
        gamma: threshold γ in (0, inf]; inf never clips. Or an object that follows the norms, such as
            `surefoot.optim.ZScore()`: pass the same one at every step; its `state()` and `load()` are yours to save.
        delta: floor δ in [0, 1].
        scope: "global" takes one norm over everything, "group" one a group (needs groups), "tensor" one a tensor.
        nonfinite: what to do when the norm is NaN or infinite. "zero" sets every gradient to zero, so that the step
            that follows sees nothing of this batch (its momentum and decay still act: an optimizer of ours can leave
            out the step altogether); "raise" raises before touching anything; "propagate" does what torch does.

    Returns:
        () float64, the norm over all gradients before clipping, whatever the scope.

    Raises:
        FloatingPointError: with nonfinite="raise", when the norm is not finite.
        ValueError: an option out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_([w], gamma=1.0).item()
        5.0
        >>> w.grad
        tensor([0.6000, 0.8000])

    Source: arXiv 2404.08624, Definition 2; δ = 0 is `torch.nn.utils.clip_grad_norm_` without its 1e-6.
    """
    check_number("delta", delta, 0.0, 1.0, fix="0 is plain clipping, 1 no clipping")
    check_choice("scope", scope, norms.SCOPES)
    check_gamma(gamma, scope)
    check_choice("nonfinite", nonfinite, NONFINITE)
    entries = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if entries and isinstance(entries[0], dict):
        groups = [list(cast(dict[str, Any], group)["params"]) for group in entries]
    elif scope == "group":
        raise ValueError("scope='group' needs parameter groups: pass optimizer.param_groups")
    else:
        groups = [cast(list[Tensor], entries)]
    grads = [[norms.local_gradient(p) for p in group] for group in groups]
    for g in (g for group in grads for g in group if g is not None):
        if g.is_sparse:
            refuse_sparse(g)
    units = [[[p] for p in group] for group in groups] if scope == "tensor" else [[group] for group in groups]
    unit_grads = [[[g] for g in group] for group in grads] if scope == "tensor" else [[group] for group in grads]
    sums = norms.sums_of_squares([u for group in units for u in group], [u for group in unit_grads for u in group])
    roots = [norms.root(total) for total in sums]
    total = norms.hypot(roots) if roots else 0.0
    norm = torch.as_tensor(total, dtype=torch.float64)
    everything = [g for group in grads for g in group if g is not None]
    if nonfinite != "propagate" and not torch.isfinite(norm):
        if nonfinite == "raise":
            raise FloatingPointError(nonfinite_message(everything, float(norm)))
        for g in everything:
            g.zero_()
        return norm
    if isinstance(gamma, Threshold):
        gamma = float(gamma.threshold(total))
    rest = iter(roots)
    for group in unit_grads:
        for unit in group:
            own = next(rest)
            judged = torch.as_tensor(total if scope == "global" else own, dtype=torch.float64)
            found = [g for g in unit if g is not None]
            if found:
                torch._foreach_mul_(found, float(scales.delta_gclip(judged, gamma, delta)))
    return norm
