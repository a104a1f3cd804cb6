"""The one gradient norm: accumulated in float64, over whichever gradients belong together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCOPES = ("global", "group", "tensor")


def tensor_norms(grads: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of each gradient, accumulated in float64 so that squares neither overflow nor vanish.

    Args:
        grads: K gradients of any shapes and floating or complex dtypes; they may live on several devices.

    Returns:
        (K,) float64 on the first gradient's device. NaN or infinite where an entry is.
    """
    if not grads:
        return torch.zeros(0, dtype=torch.float64)
    # A complex gradient counts as its real and imaginary parts: ||a + ib||^2 = ||a||^2 + ||b||^2.
    real = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in real]
    return torch.stack([n.to(norms[0].device) for n in norms])


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return ||g|| = sqrt(sum of squares over every gradient), () float64.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item()
        5.0
    """
    return combine(tensor_norms(grads))


def combine(norms: Tensor) -> Tensor:
    """Return the norm of a concatenation from the (K,) norms of its pieces: ().

    Scaled by the largest piece, so that the squares stay in range.
    """
    if norms.numel() == 0:
        return norms.new_zeros(())
    return torch.linalg.vector_norm(norms)


def judged(per_tensor: Tensor, sizes: Sequence[int], scope: str) -> list[Tensor]:
    """Return for each group the norms its multipliers are taken from.

    Args:
        per_tensor: (sum of sizes,) norms, group after group.
        sizes: number of tensors in each group.
        scope: one of `SCOPES`.

    Returns:
        One tensor a group: (1,) by "global" (the same for all) and "group", (size,) by "tensor".
    """
    if scope == "global":
        return [combine(per_tensor).reshape(1)] * len(sizes)
    pieces = list(per_tensor.split(list(sizes)))
    return pieces if scope == "tensor" else [combine(piece).reshape(1) for piece in pieces]
