"""A network forward and backward at a certificate's weights, with the format's bounds on the ball, and its Gram."""

from collections.abc import Generator, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from surefoot.check.operations import OPERATIONS, Fields, Share, State, Tensors, flattened
from surefoot.check.rounding import BLOCK, Array, U, gam, lower_bound, norm, norms, up

COLUMNS, WORKSPACE = 2**11, 2**24  # of J^ at a time; numbers in a working matrix


class Block(NamedTuple):
    """A trainable operation's part of J: J_i^c = sum_t B_i^c[t] (x) [A_i[t], 1]; a gain's: [B o A, B]."""

    position: int  # of the operation in the flattened list
    share: Share  # with A (N, T, a)
    B: Array  # (N, C, T, b)
    dJ: Array  # (N,) >= ||computed - exact||_F; only the sum over places is worked out, products are taken as exact

    def parts(self) -> Iterator[tuple[Array, float, Array]]:
        """Yield A (N, a), 0 or 1, B (N C, b): columns of J^ for B, none for A, where entries are sums or a gain's."""
        share, B, (N, C, T, b) = self.share, self.B, self.B.shape
        if share.elementwise:
            rows = np.concatenate([np.einsum("ncta,nta->nca", B, share.A), B.sum(2)], 2)
            yield np.zeros((N, 0)), 1.0, rows.reshape(N * C, -1)
        elif T == 1:
            yield share.A[:, 0], float(share.ones), B.reshape(N * C, b)
        else:
            A = np.concatenate([share.A, np.ones((N, T, 1))], 2) if share.ones else share.A
            step = max(1, min(COLUMNS, WORKSPACE // (N * C)) // A.shape[2])
            for k in range(0, b, step):
                rows = B[..., k : k + step].transpose(0, 1, 3, 2).reshape(N, -1, T) @ A
                yield np.zeros((N, 0)), 1.0, rows.reshape(N * C, -1)


class Network:
    """Forward and backward through the operations; `trainable` are the positions of those that go with e_1, e_2, ..."""

    def __init__(self, operations: list[Fields], tensors: Tensors, R: float) -> None:
        self.operations, self.tensors, self.R = operations, tensors, R
        self.trainable = [i for i, o in enumerate(flattened(operations)) if o.get("trainable")]
        self.done: list[Any] = []  # forward: (position, Step), or the like list of a residual's branch

    def forward(self, x: Array) -> State:
        """Return the state at the outputs."""
        N, L = len(x), len(self.trainable)
        start = self._state(x, np.zeros(N), np.zeros((N, L)), np.zeros((N, L, L)))
        return self._run(self.operations, start, self.done, count())

    def _run(self, operations: list[Fields], s: State, done: list[Any], positions: Iterator[int]) -> State:
        for o, position in zip(operations, positions):
            if o["op"] == "residual":
                done.append([])
                r = self._run(o["branch"], s, done[-1], positions)
                h = s.h + r.h
                s = self._state(h, up(s.dh + r.dh + U * norms(h)), s.e + r.e, s.Q + r.Q)
                continue
            step = OPERATIONS[o["op"]][2](o, self.tensors, s)
            share = step.share if o.get("trainable") else None
            done.append((position, step._replace(share=share)))
            # on the ball ||D^2 z(d, d)|| <= w ||D^2 h(d, d)|| + s2 ||Dh d||^2 + 2 k a_l ||Dh d||, z after h
            w = step.w if share is None else float(up(step.w + share.k * self.R))
            e, Q = w * s.e, w * s.Q + step.s2 * s.e[:, :, None] * s.e[:, None, :]
            if share is not None:
                slot = self.trainable.index(position)
                reach = up(norms(share.A) + share.dA + share.k * s.move)  # ||A|| on the ball
                e[:, slot] += up(np.sqrt(reach**2 + share.ones))
                Q[:, slot, :] += share.k * s.e
                Q[:, :, slot] += share.k * s.e
            s = self._state(step.h, step.dh, e, Q)
        return s

    def _state(self, h: Array, dh: Array, e: Array, Q: Array) -> State:
        # e and Q are sums of products of two numbers, each 0 or at least TINY: their zeros are exact.
        e, Q = (np.where(x > 0, up(x), 0.0) for x in (e, Q))
        return State(h, dh, e, Q, up(self.R * up(np.sqrt(np.einsum("ij,ij->i", e, e)))))

    def backward(self, N: int, C: int) -> Iterator[Block]:
        """Yield every trainable operation's Block, from the last to the first. The forward pass comes first."""
        yield from _back(self.done, np.broadcast_to(np.eye(C), (N, C, C)), np.zeros(N))


def _back(done: list[Any], B: Array, dB: Array) -> Generator[Block, None, tuple[Array, Array]]:
    """Take B (N, C, ...) and dB (N,) >= ||computed - exact||_F back through what was done; return them at its start."""
    for one in reversed(done):
        if isinstance(one, list):  # a residual's branch
            G, dG = yield from _back(one, B, dB)
            B = B + G
            dB = up(dB + dG + U * norms(B))
            continue
        (position, step), size = one, norms(B)
        if (share := step.share) is not None:
            reach, T = np.sqrt(norms(share.A) ** 2 + share.ones), share.A.shape[1]
            dJ = up(dB * (reach + share.dA) + size * share.dA)
            if T > 1 or share.elementwise:  # each sum is off by gam(T + 2) sum_t |B_t| |A_t|
                dJ = up(dJ + gam(T + 2) * reach * size)
            yield Block(position, share, B.reshape(*B.shape[:3], -1).swapaxes(2, 3), dJ)
        B, dB = step.back(B), up(step.w * dB + step.off * size)
    return B, dB


class Gram:
    """K = J J^T of the chosen blocks: entries on and above the diagonal tiles, index i C + c."""

    def __init__(self, N: int, C: int, blocks: Iterable[Block]) -> None:
        n, t = N * C, max(1, BLOCK // C) * C  # a tile holds whole samples
        self.K, self.tile = np.zeros((n, n)), t
        self.tiles = [(slice(i, i + t), slice(j, j + t)) for i in range(0, n, t) for j in range(i, n, t)]
        squares, dJ2, longest, terms = 0.0, 0.0, 0, 8
        for block in blocks:
            for A, one, B in block.parts():  # this part of K is (A A^T + one) o (B B^T)
                for i, j in self.tiles:
                    inner = A[i.start // C : i.stop // C] @ A[j.start // C : j.stop // C].T + one
                    self.K[i, j] += (B[i] @ B[j].T) * inner.repeat(C, 0).repeat(C, 1)
                squares += norm(np.sqrt(norms(A) ** 2 + one) * norms(B.reshape(N, -1))) ** 2  # ||J^||_F^2
                longest, terms = max(longest, A.shape[1] + B.shape[1] + 3), terms + 1
            dJ2 += norm(block.dJ) ** 2
        # J^ is the Jacobian of the computed factors A, B (sums over several places: the computed ones); `off` bounds
        # ||K - J^ J^^T||_2, `dJ` ||J^ - J||_F. An entry, a sum of `terms` dot products or products of two, is off by
        # gam(longest + terms) times that of |J^| |J^|^T, whose Frobenius norm is at most ||J^||_F^2 = squares.
        self.off, self.dJ = float(up(2 * gam(longest + terms) * squares)), float(up(np.sqrt(dJ2)))

    def jacobian_norm(self) -> float:
        """Return an upper bound of s_max(J)."""
        # x^T K x <= sum_ij |K_ij| (x_i^2 + x_j^2)/2: the largest mean of a row's and a column's sum bounds s_max^2.
        sums = np.zeros(len(self.K))
        for i, j in self.tiles:
            part = np.abs(self.K[i, j]) / (2 if i == j else 1)  # a diagonal tile is met both ways
            sums[i] += part.sum(1)
            sums[j] += part.sum(0)
        return float(up(np.sqrt(up(sums.max() * (1 + gam(2 * len(sums)))) + self.off) + self.dJ))

    def proves(self, s0: float) -> bool:
        """Whether s_min(J) >= s0: lambda_min(K) >= (s0 + dJ)^2 + off is enough. The matrix is used up."""
        n, t = len(self.K), self.tile
        need = float(up(up(s0 + self.dJ) ** 2 + self.off))
        trace = float(np.trace(self.K))
        spare = 4 * gam(t + n // t + 8) * (trace + float(np.sqrt(n)) * need)  # what lower_bound will take off
        return lower_bound(self.K, need + 2 * spare + n * U * trace, t) >= need
