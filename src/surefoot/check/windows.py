"""The geometry of convolution and pooling, in one place."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from surefoot.check.rounding import Array


@dataclass(frozen=True)
class Windows:
    """Windows on an image: tap (i, j) of window (p, q) is pixel (s1 p + d1 i - pad1, s2 q + d2 j - pad2), 0 outside."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)

    @property
    def overlap(self) -> int:
        """nu, the most windows a pixel can be in: s p + d i = x leaves every (s / gcd(s, d))-th tap i."""
        each = zip(self.kernel, self.stride, self.dilation)
        return math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in each)

    def padded(self, size: tuple[int, ...]) -> list[int]:
        """Return height and width with the padding."""
        return [n + 2 * p for n, p in zip(size, self.padding)]

    def positions(self, size: tuple[int, ...]) -> list[int]:
        """Return how many windows fit into an image of this size, downwards and across."""
        each = zip(self.padded(size), self.kernel, self.stride, self.dilation)
        return [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in each]

    def views(self, padded: Array, size: tuple[int, ...]) -> Iterator[tuple[int, int, Array]]:
        """Yield each tap (i, j) and the pixels it sees in all windows, as a view (..., t1, t2) of the padded image."""
        (s1, s2), (d1, d2), (t1, t2) = self.stride, self.dilation, self.positions(size)
        for i, j in np.ndindex(*self.kernel):
            rows = slice(d1 * i, d1 * i + s1 * (t1 - 1) + 1, s1)
            yield i, j, padded[..., rows, d2 * j : d2 * j + s2 * (t2 - 1) + 1 : s2]

    def patches(self, h: Array) -> Array:
        """Return the windows' contents: (N, c, height, width) -> (N, T, c k1 k2)."""
        (p1, p2), size = self.padding, h.shape[2:]
        padded = np.pad(h, ((0, 0), (0, 0), (p1, p1), (p2, p2)))
        A = np.empty((len(h), *self.positions(size), h.shape[1], *self.kernel), h.dtype)
        for i, j, view in self.views(padded, size):
            A[..., i, j] = view.transpose(0, 2, 3, 1)
        return A.reshape(len(h), -1, math.prod(A.shape[3:]))

    def spread(self, shape: tuple[int, ...], piece: Callable[[int, int], Array], dtype: Any = float) -> Array:
        """Add piece(i, j), (..., t1, t2) for each tap, up at the pixels that it sees: an image (..., height, width)."""
        (p1, p2), (height, width) = self.padding, shape[-2:]
        padded = np.zeros((*shape[:-2], *self.padded((height, width))), dtype)
        for i, j, view in self.views(padded, (height, width)):
            view += piece(i, j)
        return padded[..., p1 : p1 + height, p2 : p2 + width]
