"""GClip: plain gradient clipping, δ-GClip without its floor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from surefoot.optim.delta_gclip import DeltaGClip
from surefoot.optim.thresholds import Threshold


class GClip(DeltaGClip):
    """Clipped gradient descent: w <- w - h g with h = η min{1, γ/||g||}; δ-GClip with δ = 0.

    The same steps as `torch.nn.utils.clip_grad_norm_(params, γ)` followed by `torch.optim.SGD(params, η)`, up to the
    1e-6 that torch adds to the norm; `p.grad` stays as it is.

    Args:
        params: parameters or groups of them.
        lr: η > 0.
        gamma: threshold γ in (0, inf], or an object that follows the norms, see `DeltaGClip`.
        options: the further options of `DeltaGClip`: momentum, dampening, nesterov, weight_decay,
            decoupled_weight_decay, scope, nonfinite, maximize, master_weights.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = GClip([w], lr=0.5, gamma=1.0)
        >>> (w.square().sum() / 2).backward()
        >>> opt.step()
        >>> w.detach()
        tensor([2.7000, 3.6000])

    Source: arXiv 2404.08624, Definition 1; why it helps: arXiv 1905.11881.
    """

    def __init__(self, params: ParamsT, lr: float | Tensor, *, gamma: float | Threshold | str, **options: Any) -> None:
        if "delta" in options:
            raise TypeError(f"GClip takes no delta (it is 0 here), got delta={options['delta']!r}; use DeltaGClip")
        super().__init__(params, lr, gamma=gamma, delta=0.0, **options)
