"""Grams and Cholesky factors that lie in files, worked on in panels: what is larger than the memory.

Everything goes through memory in panels of PANEL rows. Time is that of the arithmetic as long as the disk gives a few
hundred MB/s: a factor of size n is read n/(3 PANEL) times over. The files are temporary and have no name: they go
away with the tensors, or with the process.

Shapes: V (p, q), K (n, n), L (n, n) the factor, kept as F = L^T so that a panel of its columns lies in one piece.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure.rounding import TINY, gam, norm_up, sum_up, up
from surefoot.measure.shifted import BLOCK, Shifted

PANEL = 2048  # rows in memory at a time


class MappedShifted(Shifted):
    """`Shifted` with the factor in a file; K may be mapped as well.

    Args:
        K: (n, n), symmetric, float64.
        folder: where the file lies.
        sign: +1, or -1 for -K.
    """

    def __init__(self, K: Tensor, folder: Path, *, sign: int = 1) -> None:
        super().__init__(K, sign=sign)
        self._F = new_file((self.n, self.n), folder)
        self._factor = self._F.mT
        self.panel = PANEL

    def factor(self, s: float) -> bool:
        """Factor c K - s I, from the left panel by panel; False where it is not positive definite."""
        F, n = self._F, self.n
        self.shift, self.factorisations = s, self.factorisations + 1
        for j in range(0, n, PANEL):
            end = min(j + PANEL, n)
            P = self.K[j:end, j:] * self.c  # K is symmetric: these are its columns j to end, from row j on
            P.diagonal().sub_(s)
            for k in range(0, j, PANEL):
                above = F[k : k + PANEL, j:]
                P.addmm_(above[:, : end - j].mT, above, alpha=-1)
            corner, info = torch.linalg.cholesky_ex(P[:, : end - j])
            if info.item():
                return False
            F[j:end, j:end] = corner.mT
            F[j:end, end:] = torch.linalg.solve_triangular(corner, P[:, end - j :], upper=False)
        return True

    def solve(self, v: Tensor) -> Tensor:
        """Return (L L^T)^-1 v."""
        F, n, x = self._F, self.n, v.clone()
        panels = [slice(j, min(j + PANEL, n)) for j in range(0, n, PANEL)]
        for here in panels:
            corner = F[here, here].mT
            x[here] = torch.linalg.solve_triangular(corner, x[here, None], upper=False)[:, 0]
            x[here.stop :] -= F[here, here.stop :].mT @ x[here]
        for here in reversed(panels):
            x[here] -= F[here, here.stop :] @ x[here.stop :]
            x[here] = torch.linalg.solve_triangular(F[here, here], x[here, None], upper=True)[:, 0]
        return x


def new_file(shape: tuple[int, int], folder: Path) -> Tensor:
    """Return zeros in a nameless file: a tensor that takes no memory to speak of."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, np.float64, "w+", shape=shape))


def mapped_gram(rows: Callable[[slice], Tensor], shape: tuple[int, int], folder: Path) -> tuple[Tensor, float]:
    """Return fl(V V^T) in a file, symmetric to the bit, and a rigorous bound of ||fl(V V^T) - V V^T||_2.

    As `surefoot.measure.eigen.gram` (surefoot, Prop. 31), of which the numbers are the same but for the order of sums.

    Args:
        rows: gives rows of V, float64, no number above 1 by much.
        shape: (p, q) of V.
        folder: where the file lies.
    """
    p, q = shape
    G, sizes = new_file((p, p), folder), []
    panels = [slice(i, min(i + PANEL, p)) for i in range(0, p, PANEL)]
    for i, here in enumerate(panels):
        V = rows(here)
        sizes.append(norm_up(V))
        for there in panels[: i + 1]:
            W = V if there == here else rows(there)
            tile = torch.zeros(len(V), len(W), dtype=torch.float64)
            for k in range(0, q, BLOCK):
                tile += V[:, k : k + BLOCK] @ W[:, k : k + BLOCK].mT
            if there == here:
                tile = tile.tril() + tile.tril(-1).mT
            G[here, there] = tile
            G[there, here] = tile.mT
    size = norm_up(torch.tensor(sizes, dtype=torch.float64))
    roundings = min(BLOCK, q) + math.ceil(q / BLOCK) + 1
    return G, sum_up(up(gam(roundings) * up(size * size)), up(8.0 * p * (q + 8) * TINY))


def require_disk(needed: int, folder: Path, what: str) -> None:
    """Refuse what does not fit on the disk, before any of it is made.

    Raises:
        InputError: fewer than `needed` bytes are free; the message begins with `what`.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{what} needs {needed / 1e9:.3g} GB of disk in {str(folder)!r} and {free / 1e9:.3g} GB are free: take "
            f"fewer rows (about {math.sqrt(free / needed):.0%} of them fit), or name another folder by TMPDIR"
        )
