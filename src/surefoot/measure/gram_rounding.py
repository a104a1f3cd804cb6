"""How far rounding may have taken a Gram from the exact Gram of its terms (surefoot, Prop. 31)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from surefoot.measure.contraction import Lookup, Outer, Rows, Term, is_tiled
from surefoot.measure.rounding import gam, sum_up, up


def gram_rounding(terms: Sequence[Term], *, method: str = "auto") -> float:
    """Return an upper bound of ‖fl(K) - K‖_2, with K the exact Gram of the terms and fl(K) what `add_gram` makes of 0.

    Entry by entry the two differ by at most sum_l gam(k_l) |J_l| |J_l|^T, with |J_l| the rows that the absolute values
    of a term's factors would give and k_l the most roundings that one of its products goes through. That matrix is
    positive semidefinite, and so its norm is at most its trace: sum_l gam(k_l) ‖ |J_l| ‖_F^2. Nothing of the size of K
    is formed.

    Args:
        terms: as `Network.terms` returns them, all samples of K; in float64, taken as exact numbers.
        method: as it was given to `add_gram`.

    Returns:
        The bound, rounded up. It holds for any order of the sums, with or without fused multiply-adds; not for
        Strassen's or reduced-precision products, nor where numbers under- or overflow.

    Example:
        >>> import torch
        >>> x = torch.rand(4, 1, 1, 3, dtype=torch.float64)
        >>> gram_rounding([Outer(x, torch.ones(1, 4, 1, 1, 2, dtype=torch.float64))]) < 1e-13
        True
    """
    tiled = [not isinstance(term, Rows) and is_tiled(term, term, method) for term in terms]
    # Sums over rows go on in K, and every Hadamard or ghost term is one more product or sum there.
    after = sum(2 if t else _width(term) + 1 for term, t in zip(terms, tiled))
    return sum_up(*(up(gam(after + _depth(term, t)) * _trace(term)) for term, t in zip(terms, tiled)))


def _width(term: Term) -> int:
    """Return how many numbers a row has that is written out."""
    if isinstance(term, Rows):
        return term.rows.shape[2]
    assert isinstance(term, Outer)
    return term.grads.shape[2] * term.grads.shape[4] * term.inputs.shape[3]


def _depth(term: Term, tiled: bool) -> int:
    """Return how many roundings a product of four factors goes through before it is added to K."""
    if isinstance(term, Rows):
        return 1
    T, b = term.grads.shape[-2:]
    if not tiled:
        return 2 * T + 2
    return (0 if isinstance(term, Lookup) else term.inputs.shape[3]) + T + T * b + 3


def _trace(term: Term) -> float:
    """Return an upper bound of ‖ |J| ‖_F^2 = sum over samples, outputs and pairs of places of <|A|, |A|> <|B|, |B|>."""
    if isinstance(term, Rows):
        return _sum_up(term.rows.square(), term.rows.numel())
    total = []
    T, b = term.grads.shape[-2:]
    for i in range(term.grads.shape[1]):
        if isinstance(term, Lookup):
            ids = term.ids[i]
            same, a = ((ids[:, None] == ids) & (ids >= 0)).double(), 0
            B = term.grads[:, i].abs()
        else:
            A = term.inputs[i].abs()  # (G, T, a)
            same, a = A @ A.transpose(1, 2), A.shape[2]
            B = term.grads[:, i].abs()  # (C, G, T, b)
        total.append(_sum_up(same * (B @ B.transpose(-1, -2)), B.numel() // b * T + a + b))
    return sum_up(*total)


def _sum_up(x: Tensor, roundings: int) -> float:
    """Return an upper bound of the sum of numbers >= 0 that so many roundings, sums included, lie in."""
    return up(float(x.sum()) * up(1 + 2 * gam(roundings + 2)))
