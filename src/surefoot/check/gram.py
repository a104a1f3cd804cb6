"""K = J J^T from the trainable operations' blocks, and how far the computed matrix may be from the true one."""

from collections.abc import Iterable, Iterator

import numpy as np

from surefoot.check.cholesky import BLOCK, lower_bound
from surefoot.check.network import Block
from surefoot.check.rounding import Array, U, gam, norms, total, up

COLUMNS, WORKSPACE = 2**11, 2**24  # of J^ at a time; numbers in a working matrix


class Gram:
    """The Gram of the chosen blocks: entries on and above the diagonal blocks, index i C + c.

    J^ is the Jacobian that the computed factors A, B make (for sums over several places: the computed sums). `off` is
    an upper bound of ||K - J^ J^^T||_2, `dJ` of ||J^ - J||_F.
    """

    def __init__(self, N: int, C: int, blocks: Iterable[Block]) -> None:
        self.N, self.C, self.K = N, C, np.zeros((N * C, N * C))
        squares, dJ2, longest, terms = 0.0, 0.0, 0, 8
        for block in blocks:
            sums = block.elementwise or block.A.shape[1] > 1
            size, length, count = self._add_sums(block) if sums else self._add_products(block)
            squares, longest, terms = squares + size, max(longest, length), terms + count
            # a row's sums over T places, each off by gam(T + 2) sum_t |B_t| |A_t| <= gam ||B|| sqrt(||A||^2 + T)
            T = block.A.shape[1] if sums else 0
            dJ2 += total((block.dJ + gam(T + 2) * np.sqrt(norms(block.A) ** 2 + T) * norms(block.B)) ** 2)
        # An entry, a sum of `terms` dot products or products of two, is off by gam(longest + terms) times that of
        # |J^| |J^|^T, whose Frobenius norm is at most ||J^||_F^2 = squares.
        self.off = float(up(2 * gam(longest + terms) * squares))
        self.dJ = float(up(np.sqrt(dJ2)))

    def _add_products(self, block: Block) -> tuple[float, int, int]:
        """Add (A A^T + 1) o (B B^T); return ||J^||_F^2 of the block, the roundings in a summand, and the summands."""
        C, A, B = self.C, block.A[:, 0], block.B[:, :, 0]
        for i, j in self._tiles():
            left, right = B[i].reshape(-1, B.shape[2]), B[j].reshape(-1, B.shape[2])
            share = (left @ right.T).reshape(i.stop - i.start, C, j.stop - j.start, C)
            share *= (A[i] @ A[j].T + float(block.bias))[:, None, :, None]
            self.K[i.start * C : i.stop * C, j.start * C : j.stop * C] += share.reshape(len(left), len(right))
        return total((norms(A) ** 2 + float(block.bias)) * norms(B) ** 2), A.shape[1] + B.shape[2] + 3, 1

    def _add_sums(self, block: Block) -> tuple[float, int, int]:
        """Add rows of J^ times rows of J^, some columns at a time; return the same."""
        C, squares, length, count = self.C, 0.0, 0, 0
        for part in _columns(block):
            rows = np.ascontiguousarray(part.reshape(self.N * C, -1))
            for i, j in self._tiles():
                one, other = slice(i.start * C, i.stop * C), slice(j.start * C, j.stop * C)
                self.K[one, other] += rows[one] @ rows[other].T
            squares += total(norms(rows) ** 2)
            length, count = max(length, rows.shape[1]), count + 1
        return squares, length, count

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        """Yield pairs of sample ranges that cover every block of `lower_bound` on and above the diagonal."""
        t = max(1, BLOCK // self.C)
        for i in range(0, self.N, t):
            for j in range(0, self.N, t):
                # Samples before the block in which row i C begins are only needed up to the block's own start.
                if (j + t) * self.C > (i * self.C) // BLOCK * BLOCK:
                    yield slice(i, min(i + t, self.N)), slice(j, min(j + t, self.N))

    def jacobian_norm(self) -> float:
        """Return an upper bound of s_max(J).

        x^T K x <= sum_ij |K_ij| (x_i^2 + x_j^2)/2: the largest mean of a row's and a column's sum bounds s_max^2.
        """
        n = len(self.K)
        sums = np.zeros(n)
        for i in range(0, n, BLOCK):
            part = np.abs(self.K[i : i + BLOCK, i:])
            part[:, :BLOCK] /= 2  # the diagonal block is met both ways
            sums[i : i + BLOCK] += part.sum(1)
            sums[i:] += part.sum(0)
        return float(up(np.sqrt(up(sums.max() * (1 + gam(2 * n))) + self.off) + self.dJ))

    def proves(self, s0: float) -> bool:
        """Whether s_min(J) >= s0: lambda_min(K) >= (s0 + dJ)^2 + off is enough. The matrix is used up."""
        n = len(self.K)
        need = float(up(up(s0 + self.dJ) ** 2 + self.off))
        trace = float(np.trace(self.K))
        spare = 4 * gam(BLOCK + n // BLOCK + 8) * (trace + float(np.sqrt(n)) * need)  # what lower_bound will take off
        return lower_bound(self.K, need + 2 * spare + n * U * trace) >= need


def _columns(block: Block) -> Iterator[Array]:
    """Yield some columns of J^ at a time, (N, C, any)."""
    A, B = block.A, block.B
    N, C, T, b = B.shape
    if block.elementwise:
        yield np.concatenate([np.einsum("ncta,nta->nca", B, A), B.sum(2)], 2)
        return
    A = np.concatenate([A, np.ones((N, T, 1))], 2) if block.bias else A
    step = max(1, min(COLUMNS, WORKSPACE // (N * C)) // A.shape[2])
    for k in range(0, b, step):
        yield B[..., k : k + step].transpose(0, 1, 3, 2).reshape(N, -1, T) @ A
