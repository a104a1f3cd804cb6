"""A network forward and backward at a certificate's weights, with the bounds of the format on the ball of radius R."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from surefoot.check.operations import RULES, State, Step
from surefoot.check.rounding import Array, U, grown, norms, up

Operations = list[dict[str, Any]]


class Block(NamedTuple):
    """A trainable operation's part of J: J_i^c = sum_t B_i^c[t] (x) [A_i[t], 1]; a gain's: [B o A, B]."""

    position: int  # of the operation in the flattened list
    A: Array  # (N, T, a)
    B: Array  # (N, C, T, b)
    bias: bool  # whether there is the 1
    elementwise: bool
    dJ: Array  # (N,) >= ||computed - exact||_F, A and B being multiplied exactly


class Network:
    """Forward and backward through the operations; `trainable` are the positions of those that go with e_1, e_2, ..."""

    def __init__(self, operations: Operations, tensors: Mapping[str, Array], R: float) -> None:
        self.operations, self.tensors, self.R = operations, tensors, R
        self.trainable = [i for i, o in enumerate(flattened(operations)) if o.get("trainable")]

    def forward(self, x: Array) -> State:
        """Return the state at the outputs."""
        N, L = len(x), len(self.trainable)
        end, self._done = self._run(
            self.operations, 0, self._state(x, np.zeros(N), np.zeros((N, L)), np.zeros((N, L, L)))
        )
        return end

    def _state(self, h: Array, dh: Array, e: Array, Q: Array) -> State:
        e = grown(e)
        return State(h, dh, e, grown(Q), up(norms(h) + dh), up(self.R * up(np.sqrt(np.einsum("ij,ij->i", e, e)))))

    def _run(self, operations: Operations, index: int, s: State) -> tuple[State, list[tuple[int, Step | list[Any]]]]:
        """Return the last state, and for each operation its position and its step (a residual's: its branch's)."""
        done: list[tuple[int, Step | list[Any]]] = []
        for o in operations:
            if o["op"] == "residual":
                r, step = self._run(o["branch"], index + 1, s)
                h = s.h + r.h
                s = self._state(h, up(s.dh + r.dh + U * norms(h)), s.e + r.e, s.Q + r.Q)
            else:
                step = RULES[o["op"]](o, self.tensors, s)
                s = self._state(step.h, step.dh, *self._on_ball(step, index, s))
            done.append((index, step))
            index += len(flattened([o]))
        return s, done

    def _on_ball(self, step: Step, index: int, s: State) -> tuple[Array, Array]:
        """Return e and Q after a step: z = sigma(h) or W h + b, with W and b on the ball if they are trainable.

        ||D^2 z(d, d)|| <= w ||D^2 h(d, d)|| + s2 ||Dh d||^2 + 2 k a_l ||Dh d||.
        """
        share = step.share if index in self.trainable else None
        w = step.w if share is None else float(up(step.w + share.k * self.R))
        e, Q = w * s.e, w * s.Q + step.s2 * s.e[:, :, None] * s.e[:, None, :]
        if share is not None:
            slot = self.trainable.index(index)
            reach = up(norms(share.A) + share.dA + share.k * s.move)  # ||A|| on the ball
            e[:, slot] += up(np.sqrt(reach**2 + (share.A.shape[1] if share.bias else 0)))
            Q[:, slot, :] += share.k * s.e
            Q[:, :, slot] += share.k * s.e
        return e, Q

    def backward(self, N: int, C: int) -> Iterator[Block]:
        """Yield every trainable operation's Block, from the last to the first. The forward pass comes first."""
        yield from self._back(self._done, np.broadcast_to(np.eye(C), (N, C, C)), np.zeros(N))

    def _back(self, done: list[tuple[int, Step | list[Any]]], B: Array, dB: Array) -> Iterator[Block]:
        """Take B (N, C, ...) and dB (N,) >= ||computed - exact||_F back, and return the new ones."""
        for index, step in reversed(done):
            if isinstance(step, list):
                G, dG = yield from self._back(step, B, dB)
                B = B + G
                dB = up(dB + dG + U * norms(B))
                continue
            share, size = step.share, norms(B)
            if share is not None and index in self.trainable:
                ones = share.A.shape[1] if share.bias else 0
                dJ = up(dB * (np.sqrt(norms(share.A) ** 2 + ones) + share.dA) + size * share.dA)
                places = B.reshape(*B.shape[:3], -1).swapaxes(2, 3)  # (N, C, T, b)
                yield Block(index, share.A, places, share.bias, share.elementwise, dJ)
            B, dB = step.back(B), up(step.w * dB + step.off * size)
        return B, dB


def flattened(operations: Operations) -> Operations:
    """Return all operations in the order in which they are counted: depth first, a residual before its branch."""
    return [p for o in operations for p in (o, *flattened(o.get("branch", [])))]
