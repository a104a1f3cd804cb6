"""Exact contractions of per-sample Jacobians into their Gram, layer by layer, without ever forming the Jacobian.

A layer's weight is used at T places (one for a dense layer, one a pixel or token otherwise), so that sample i's
Jacobian of output c with respect to it is  J_i^c = sum_t B_i^c[t] (x) A_i[t],  with A the layer's inputs and B the
gradients at its outputs. Its share of K[(i, c), (j, e)] is <J_i^c, J_j^e>, by whichever of three ways costs least:

    Hadamard      T = 1:  <A_i, A_j> <B_i^c, B_j^e>
    ghost         T > 1:  <B_i^c, G B_j^e>,  G = A_i A_j^T  (T x T)
    materialised          the rows J_i^c themselves, one matrix product

Shapes: n samples, C outputs, G groups (of a grouped convolution), T places, a inputs, b outputs of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How many numbers a working matrix may hold (8 MB in float64): that and the rest of a tile stay near the processor.
WORKSPACE = 2**20
# What a multiplication of the ghost form costs beside one of a large matrix product: its products are small. Measured.
GHOST_WEIGHT = 1.5


@dataclass
class Outer:
    """A weight's uses in n samples: J_i^c = sum_t B_i^c[t] (x) A_i[t], a bias being one more input that is 1."""

    inputs: Tensor  # A: (n, G, T, a)
    grads: Tensor  # B: (C, n, G, T, b)

    @property
    def places(self) -> int:
        """How often a sample uses the weight: T."""
        return self.inputs.shape[2]

    def rows(self, start: int, end: int, space: Tensor | None = None) -> Tensor:
        """Return the Jacobian rows with respect to the output channels [start, end): (n, C, G (end - start) a).

        They may lie in `space`, if there is one and it has room.
        """
        C, n, G, T, _ = self.grads.shape
        B = self.grads[..., start:end].permute(1, 2, 3, 0, 4).reshape(n * G, T, -1)
        A = self.inputs.reshape(n * G, T, -1)
        size = n * G * B.shape[2] * A.shape[2]
        out = None if space is None or space.numel() < size else space[:size].view(n * G, B.shape[2], A.shape[2])
        J = torch.bmm(B.transpose(1, 2), A, out=out)
        return J.view(n, G, C, B.shape[2] // C, -1).transpose(1, 2).reshape(n, C, -1)


@dataclass
class Lookup:
    """An embedding's uses in n samples: J_i^c = sum_t onehot(ids_i[t]) (x) B_i^c[t]."""

    ids: Tensor  # (n, T), -1 where nothing depends on the weight (padding)
    grads: Tensor  # B: (C, n, T, d)


@dataclass
class Rows:
    """Jacobian rows as they are."""

    rows: Tensor  # (n, C, p)


Term = Outer | Lookup | Rows


def ghost_is_cheaper(outer: Outer, samples: int) -> bool:
    """Count multiplications a pair of samples: ghost against materialised rows (each formed once)."""
    C, _, G, T, b = outer.grads.shape
    a = outer.inputs.shape[3]
    ghost = T * T * (a + C * b) + C * C * T * b
    return G == 1 and GHOST_WEIGHT * ghost < C * C * a * b + 2 * C * T * a * b / samples


def add_gram(K: Tensor, left: list[Term], right: list[Term], *, symmetric: bool, method: str = "auto") -> None:
    """Add sum_l <J_l, J_l'> to K, (n C, m C) with index i C + c; both sides list the same terms in the same order.

    With `symmetric` (left is right) only blocks on and above the diagonal are worked out: `mirror` fills the rest.
    """
    hadamard: list[tuple[Outer | Lookup, Outer | Lookup]] = []
    products = _Products(K, symmetric)
    for one, other in zip(left, right, strict=True):
        if isinstance(one, Rows):
            assert isinstance(other, Rows)
            products.add(one.rows.flatten(0, 1), other.rows.flatten(0, 1))
        elif not is_tiled(one, other, method):
            assert isinstance(one, Outer)
            assert isinstance(other, Outer)
            products.add_materialised(one, other)
        else:
            assert not isinstance(other, Rows)
            if _places(one) == _places(other) == 1:
                hadamard.append((one, other))
            else:
                _add_ghost(K, one, other, symmetric)
    products.flush()
    if hadamard:
        _add_hadamard(K, hadamard, symmetric)


def mirror(K: Tensor, block: int = 64) -> None:
    """Copy what lies above the diagonal below it: symmetric to the bit."""
    for i in range(0, len(K), block):
        corner = K[i : i + block, i : i + block]
        corner.copy_(corner.triu() + corner.triu(1).T)
        K[i + block :, i : i + block] = K[i : i + block, i + block :].T


def _places(term: Outer | Lookup) -> int:
    return term.grads.shape[-2]


def is_tiled(one: Term, other: Term, method: str) -> bool:
    """Whether a term goes through the Hadamard or ghost form, and not through its rows."""
    if isinstance(one, Lookup):
        return True
    assert isinstance(one, Outer)
    assert isinstance(other, Outer)
    if one.grads.shape[2] > 1 or method == "materialise":
        return False
    # Places may differ between the two sides (sequences of two lengths), hence the longer one decides.
    longer = one if one.places >= other.places else other
    return longer.places == 1 or method == "ghost" or ghost_is_cheaper(longer, other.grads.shape[1])


# -------------------------------------------------------------------------------------------------- materialised rows


class _Products:
    """K += R S^T over matrices of rows, the narrow ones side by side: a product has to be long to be worth its pass."""

    def __init__(self, K: Tensor, symmetric: bool) -> None:
        self.K, self.symmetric = K, symmetric
        self.width = max(512, WORKSPACE // max(1, *K.shape))
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.spaces: tuple[Tensor, Tensor] | None = None  # of the rows of either side that are multiplied at once

    def add(self, R: Tensor, S: Tensor) -> None:
        """Add R S^T, now or with others later; S is R if symmetric."""
        if self._is_wide(R.shape[1]):
            self._multiply(R, S)
            return
        self.waiting.append((R, S))
        if sum(R.shape[1] for R, _ in self.waiting) >= self.width:
            self.flush()

    def flush(self) -> None:
        """Add what has been waiting."""
        if self.waiting:
            R = torch.cat([R for R, _ in self.waiting], 1)
            S = R if self.symmetric else torch.cat([S for _, S in self.waiting], 1)
            self.waiting.clear()
            self._multiply(R, S)

    def add_materialised(self, one: Outer, other: Outer) -> None:
        """Add the products of two Outers' rows, some output channels at a time."""
        b, a = one.grads.shape[-1], one.inputs.shape[-1]
        G = one.grads.shape[2]
        step = max(1, -(-b // max(1, round(G * a * b / self.width))))  # as many equal parts as are needed
        for start in range(0, b, step):
            end = min(b, start + step)
            here, there = self._spaces(G * a * step) if self._is_wide(G * a * (end - start)) else (None, None)
            R = one.rows(start, end, here).flatten(0, 1)
            self.add(R, R if self.symmetric else other.rows(start, end, there).flatten(0, 1))

    def _is_wide(self, columns: int) -> bool:
        return columns >= self.width // 2

    def _spaces(self, columns: int) -> tuple[Tensor, Tensor]:
        n, m = self.K.shape
        if self.spaces is None or len(self.spaces[0]) < n * columns:
            left = self.K.new_empty(n * columns)
            self.spaces = left, left if self.symmetric else self.K.new_empty(m * columns)
        return self.spaces

    def _multiply(self, R: Tensor, S: Tensor) -> None:
        K = self.K
        if not self.symmetric:
            K.addmm_(R, S.T)
            return
        panel = panel_height(len(K))
        for i in range(0, len(K), panel):
            K[i : i + panel, i:].addmm_(R[i : i + panel], S[i:].T)


def panel_height(rows: int) -> int:
    """Return how many rows of a symmetric product to work out at once: few spare the lower half, many run fast."""
    return min(160, max(64, rows // 8))


# ------------------------------------------------------------------------------------------------- Hadamard and ghost


@dataclass
class _Side:
    """A term with samples and classes in the order of K."""

    A: Tensor  # (n, T, a), or the token ids (n, T)
    B: Tensor  # (n, C, T, b)

    @classmethod
    def of(cls, term: Outer | Lookup) -> _Side:
        if isinstance(term, Lookup):
            return cls(term.ids, term.grads.transpose(0, 1).contiguous())
        return cls(term.inputs[:, 0].contiguous(), term.grads[:, :, 0].transpose(0, 1).contiguous())

    def weights(self, rows: slice, other: _Side, columns: slice) -> Tensor:
        """<A_i[s], A_j[t]> for some samples on either side and all their places: (rows T, columns T')."""
        left, right = self.A[rows], other.A[columns]
        if self.A.dim() == 2:
            same = left.reshape(-1, 1) == right.reshape(1, -1)
            return (same & (left.reshape(-1, 1) >= 0)).to(self.B.dtype)
        return left.flatten(0, 1) @ right.flatten(0, 1).T


def _add_hadamard(K: Tensor, terms: list[tuple[Outer | Lookup, Outer | Lookup]], symmetric: bool) -> None:
    """K[(i, c), (j, e)] += sum over terms of <A_i, A_j> <B_i^c, B_j^e>, a tile of K after the other."""
    sides = [(one := _Side.of(left), one if symmetric else _Side.of(right)) for left, right in terms]
    (n, C), m = sides[0][0].B.shape[:2], len(sides[0][1].B)
    t = max(1, panel_height(n * C) // C)
    width = max(1, WORKSPACE // (4 * t * C * C))
    space = K.new_empty(t * C * min(m, width) * C)
    for i in range(0, n, t):
        for j in range(i if symmetric else 0, m, width):
            rows, columns = slice(i, min(n, i + t)), slice(j, min(m, j + width))
            height, length = rows.stop - i, columns.stop - j
            tile = K[i * C : rows.stop * C, j * C : columns.stop * C].view(height, C, length * C)
            work = space[: tile.numel()].view(height * C, length * C)
            for one, other in sides:
                torch.mm(one.B[rows].view(height * C, -1), other.B[columns].view(length * C, -1).T, out=work)
                weights = one.weights(rows, other, columns)[:, :, None].expand(-1, -1, C)
                tile.addcmul_(work.view_as(tile), weights.reshape(height, 1, length * C))


def _add_ghost(K: Tensor, left: Outer | Lookup, right: Outer | Lookup, symmetric: bool) -> None:
    """K[(i, c), (j, e)] += <B_i^c, G_ij B_j^e>, G_ij = A_i A_j^T, for one e at a time: what is between stays small."""
    one = _Side.of(left)
    other = one if symmetric else _Side.of(right)
    n, C, T, b = one.B.shape
    m, _, S, _ = other.B.shape
    K4 = K.view(n, C, m, C)
    t = max(1, 64 // T)
    width = max(1, min(32, WORKSPACE // (2 * t * T * max(b, S))))
    space = K.new_empty(width * t * T * b)
    for i in range(0, n, t):
        rows = slice(i, min(n, i + t))
        height = rows.stop - i
        B = one.B[rows].flatten(2).transpose(1, 2)  # (t, T b, C)
        for j in range(i if symmetric else 0, m, width):
            columns = slice(j, min(m, j + width))
            length = columns.stop - j
            G = one.weights(rows, other, columns).view(height * T, length, S).transpose(0, 1).contiguous()
            U = space[: length * height * T * b].view(length, height * T, b)
            for e in range(C):
                torch.bmm(G, other.B[columns, e], out=U)
                K4[rows, :, columns, e] += torch.bmm(U.view(length, height, T * b).transpose(0, 1), B).transpose(1, 2)
