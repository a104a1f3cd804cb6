"""The rules: from a gradient norm to the multiplier of the gradient. Pure functions of () or (K,) tensors.

A step moves by h g with h = lr * scale(||g||). Letters as in the papers: η is `lr`, γ `gamma`, δ `delta`, β `beta`.

=============  ==========================================  ===========================
rule           h(g)                                        source
=============  ==========================================  ===========================
delta_gclip    η min{1, max{δ, γ/||g||}}                   arXiv 2404.08624, Def. 2
gclip          η min{1, γ/||g||}                           arXiv 2404.08624, Def. 1
normalized     η / (||g|| + β)                             arXiv 1905.11881
smooth_clip    η / (L0 + L1 ||g||)                         arXiv 2410.10800
=============  ==========================================  ===========================
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_gclip(norm: Tensor, gamma: float | Tensor, delta: float) -> Tensor:
    """Return min{1, max{δ, γ/||g||}}, the δ-GClip multiplier in [δ, 1].

    Args:
        norm: ||g||, any shape, >= 0. At 0 the multiplier is 1; at infinity δ; at NaN NaN.
        gamma: threshold γ in [0, inf]; inf never clips. A () tensor where only the device knows it.
        delta: floor δ in [0, 1]; 0 is plain clipping, 1 plain gradient descent.

    Returns:
        Same shape as `norm`.

    Example:
        >>> delta_gclip(torch.tensor([0.5, 2.0, 100.0]), gamma=1.0, delta=0.1)
        tensor([1.0000, 0.5000, 0.1000])

    Source: Tucat, Mukherjee, Sen, Sun, Rivasplata, arXiv 2404.08624, Definition 2.
    """
    if isinstance(gamma, Tensor):
        limit = gamma
    elif gamma == float("inf"):
        return torch.ones_like(norm)
    else:
        # torch works out a number over a tensor as number * (1/tensor), rounded twice: ||g|| = γ would be clipped
        limit = torch.full_like(norm, gamma)
    ratio = (limit / norm).clamp(min=delta, max=1.0)
    return ratio.masked_fill((norm <= limit) | torch.isinf(limit), 1.0)  # 0/0 and ∞/∞ would be NaN


def gclip(norm: Tensor, gamma: float) -> Tensor:
    """Return min{1, γ/||g||}: δ-GClip with δ = 0, what `torch.nn.utils.clip_grad_norm_` does.

    Example:
        >>> gclip(torch.tensor([0.5, 4.0]), gamma=1.0)
        tensor([1.0000, 0.2500])
    """
    return delta_gclip(norm, gamma, 0.0)


def normalized(norm: Tensor, beta: float) -> Tensor:
    """Return 1/(||g|| + β), the multiplier of normalized gradient descent; β >= 0, and 1 where both are 0.

    Example:
        >>> normalized(torch.tensor([0.0, 3.0]), beta=1.0)
        tensor([1.0000, 0.2500])

    Source: Zhang, He, Sra, Jadbabaie, arXiv 1905.11881.
    """
    total = norm + beta
    return torch.where(total == 0, torch.ones_like(total), 1.0 / total)


def smooth_clip(norm: Tensor, L0: float, L1: float) -> Tensor:
    """Return 1/(L0 + L1 ||g||), the step of soft clipping under (L0, L1)-smoothness; L0 > 0, L1 >= 0.

    Example:
        >>> smooth_clip(torch.tensor([0.0, 2.0]), L0=2.0, L1=1.0)
        tensor([0.5000, 0.2500])

    Source: (L0, L1)-smoothness: arXiv 1905.11881; this step: Vankov et al., arXiv 2410.10800.
    """
    return 1.0 / (L0 + L1 * norm)
