"""The forms a tangent Gram can be asked for, each as a rule for one tile: two blocks of samples and their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surefoot.measure.contraction import Lookup, Outer, Rows, Term, add_gram, mirror

Form = Literal["full", "class blocks", "sample blocks", "sum of outputs"]


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a Gram lie.

    Attributes:
        form: which numbers there are.
        outputs: C, how many outputs (or sums of them) the terms have.
        symmetric: whether rows and columns are the same samples.
    """

    form: Form
    outputs: int
    symmetric: bool

    def shape(self, n: int, m: int) -> tuple[int, ...]:
        """Return the shape for n samples against m."""
        C = self.outputs
        if self.form == "class blocks":
            return C, n, m
        return (n, C, C) if self.form == "sample blocks" else (n * C, m * C)

    def size(self, n: int, m: int) -> int:
        """Return the bytes for n samples against m."""
        return 8 * torch.Size(self.shape(n, m)).numel()

    def index(self, rows: slice, columns: slice) -> tuple[slice, ...]:
        """Return where the tile of some samples against others lies in the whole."""
        C = self.outputs
        if self.form == "class blocks":
            return slice(None), rows, columns
        if self.form == "sample blocks":
            return (rows,)
        return slice(rows.start * C, rows.stop * C), slice(columns.start * C, columns.stop * C)

    def fill(self, tile: Tensor, left: Sequence[Term], right: Sequence[Term], *, diagonal: bool, method: str) -> None:
        """Add a tile's numbers to zeros; `diagonal`: left is right."""
        if self.form == "sample blocks":
            _add_sample_blocks(tile, left)
        elif self.form == "class blocks":
            for c, part in enumerate(tile):
                mine = [_one_output(term, c) for term in left]
                theirs = mine if diagonal else [_one_output(term, c) for term in right]
                add_gram(part, mine, theirs, symmetric=diagonal, method=method)
                if diagonal:
                    mirror(part)
        else:
            add_gram(tile, list(left), list(right), symmetric=diagonal, method=method)
            if diagonal:
                mirror(tile)


def _one_output(term: Term, c: int) -> Term:
    """Return the Jacobian of one output."""
    if isinstance(term, Rows):
        return Rows(term.rows[:, c : c + 1])
    if isinstance(term, Lookup):
        return Lookup(term.ids, term.grads[c : c + 1])
    return Outer(term.inputs, term.grads[c : c + 1])


def _add_sample_blocks(K: Tensor, terms: Sequence[Term]) -> None:
    """Add J_i J_i^T for every sample i: (n, C, C), symmetric to the bit."""
    for term in terms:
        if isinstance(term, Rows):
            K.baddbmm_(term.rows, term.rows.mT)
        elif isinstance(term, Lookup):
            same = (term.ids[:, :, None] == term.ids[:, None, :]) & (term.ids >= 0)[:, :, None]  # (n, T, T)
            _add_ghost(K, same.to(K.dtype)[:, None], term.grads[:, :, None])
        elif _ghost(term):
            _add_ghost(K, term.inputs @ term.inputs.mT, term.grads)
        else:
            b = term.grads.shape[-1]
            step = max(1, b * term.inputs.numel() // max(1, term.grads.numel()))  # rows as large as the gradients are
            for start in range(0, b, step):
                J = term.rows(start, min(b, start + step))
                K.baddbmm_(J, J.mT)
    K.copy_(K.triu() + K.triu(1).mT)


def _ghost(term: Outer) -> bool:
    """Count the multiplications a sample: G = A A^T and <B, G B>, or the rows and their products."""
    C, _, _, T, b = term.grads.shape
    a = term.inputs.shape[-1]
    return T * T * (a + C * b) + C * C * T * b <= C * T * a * b + C * C * a * b


def _add_ghost(K: Tensor, G: Tensor, B: Tensor) -> None:
    """K[i, c, e] += <B_i^c, G_i B_i^e>; G: (n, g, T, T), B: (C, n, g, T, b)."""
    B = B.transpose(0, 1)  # (n, C, g, T, b)
    K.baddbmm_(B.flatten(2), (G[:, None] @ B).flatten(2).mT)
