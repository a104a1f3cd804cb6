"""K - s I against L L^T, with every rounding error counted: the step that turns a Cholesky factor into a proof.

Proposition 30 (surefoot): for a symmetric K, any number s and ANY matrix L, with E = K - s I - L L^T,

    lambda_min(K) >= s - ||E||_2,

because L L^T >= 0. L is a Cholesky factor of K - s I in practice, so that E is little but rounding; were it anything
else, the bound would be poor and still hold. What has to be right is the residual, and its rounding is bounded entry by
entry: |fl(E) - E| <= gam(k) (|L| |L|^T + |K| + |s| I), with k the number of roundings that a term goes through.

Shapes: K, L (n, n); v (n,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure.rounding import TINY, down, gam, norm_up, power_of_two, sum_up, up

BLOCK = 256  # products summed before they are subtracted, and columns of the residual at a time
TILE = 1024  # for passes that only read K


class Shifted:
    """A symmetric matrix c K, its shifts, and one factor at a time: L L^T ~ c K - s I.

    c is +1 or -1, times a power of two where K's numbers are extreme; shifts and bounds are in units of c K. K is only
    read. One buffer of K's size holds the factor.

    Attributes:
        c: the factor on K, |c| a power of two.
        top: the largest |c K_ij|.
        frobenius: an upper bound of ||c K||_F.
        shift: s of the last factor.
        factorisations: how many were tried.
        panel: columns of the residual at a time.
    """

    def __init__(self, K: Tensor, *, sign: int = 1) -> None:
        self.K, self.n = K, len(K)
        top, frobenius = _read(K)
        self.c = sign * (1.0 if 2.0**-300 <= top <= 2.0**300 or top == 0.0 else power_of_two(top))
        self.top, self.frobenius = top * abs(self.c), up(frobenius * abs(self.c))
        self.diagonal = K.diagonal() * self.c
        self.shift, self.factorisations, self.panel = 0.0, 0, BLOCK
        self._roundings = min(BLOCK, self.n) + math.ceil(self.n / BLOCK) + 2
        self._factor: Tensor | None = None

    @property
    def L(self) -> Tensor:
        """The factor's buffer, in columns as LAPACK wants it; what is right of the diagonal blocks counts as 0."""
        if self._factor is None:
            self._factor = torch.empty_like(self.K, memory_format=torch.contiguous_format).mT
        return self._factor

    def factor(self, s: float) -> bool:
        """Factor c K - s I in place; False where it is not positive definite to working precision."""
        L = self.L
        L.mT.copy_(self.K)  # K is symmetric: its rows are L's columns
        if self.c != 1.0:
            L.mul_(self.c)
        L.diagonal().sub_(s)
        info = torch.empty((), dtype=torch.int32, device=L.device)
        torch.linalg.cholesky_ex(L, out=(L, info))
        self.shift, self.factorisations = s, self.factorisations + 1
        return not info.item()

    def solve(self, v: Tensor) -> Tensor:
        """Return (L L^T)^-1 v."""
        x = torch.linalg.solve_triangular(self.L, v.unsqueeze(1), upper=False)
        return torch.linalg.solve_triangular(self.L.mT, x, upper=True).squeeze(1)

    def multiply(self, v: Tensor) -> Tensor:
        """Return c K v, scaled half before and half after."""
        before = math.ldexp(1.0, (math.frexp(self.c)[1] - 1) // 2)
        return self.K @ (v * before) * (self.c / before)

    def bound(self, s: float) -> tuple[float, float, float]:
        """Return a rigorous lower bound of lambda_min(c K), whatever L is; and ||fl(E)||_F, and the allowance."""
        n, L = self.n, self.L
        out, product = (torch.empty(n, min(self.panel, n), dtype=L.dtype, device=L.device) for _ in range(2))
        residual, factor = [], []
        for j in range(0, n, self.panel):  # on and below the diagonal block of columns j: to end
            end = min(j + self.panel, n)
            E, P = out[j:, : end - j], product[j:, : end - j]
            torch.mul(self.K[j:, j:end], self.c, out=E)
            E.diagonal().sub_(s)
            for k in range(0, end, BLOCK):  # L[j:end] has nothing but zeros after column end
                columns = slice(k, min(k + BLOCK, end))
                E.sub_(torch.mm(L[j:, columns], L[j:end, columns].mT, out=P))
            below = norm_up(E[end - j :])
            residual += [norm_up(E[: end - j]), below, below]  # a block below stands above as well
            factor.append(norm_up(L.mT[j:end, j:]))
        residual, factor = _norm_of_norms(residual), _norm_of_norms(factor)
        allowance = self.allowance(s, up(factor * factor))
        return down(s - sum_up(residual, allowance)), residual, allowance

    def allowance(self, s: float, factor: float) -> float:
        """Return an upper bound of ||fl(E) - E||_2, where `factor` is one of ||L||_F^2."""
        underflow = up(8.0 * self.n * (self.n + 8) * TINY)
        return sum_up(up(gam(self._roundings) * sum_up(factor, self.frobenius, abs(s))), underflow)

    def expected_allowance(self, s: float = 0.0) -> float:
        """Return about what `allowance` will be: ||L||_F^2 is the trace of c K - s I."""
        return self.allowance(s, float(self.diagonal.abs().sum()) + self.n * abs(s))

    def rayleigh(self, v: Tensor) -> float:
        """Return a rigorous upper bound of lambda_min(c K): <v, c K v> / <v, v> (surefoot, Prop. 29)."""
        squares = float(v @ v)
        low, high = down(squares * (1 - gam(self.n + 2))), up(squares * (1 + gam(self.n + 2)))
        error = up(up(gam(2 * self.n + 4) * self.frobenius) * high)
        top = sum_up(float(v @ self.multiply(v)), error, float(self.n) ** 2 * 2.0**-480)  # the last for underflow
        return up(top / low) if top > 0 else up(top / high)


def lanczos(
    apply: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 80, tol: float = 1e-10
) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of a symmetric operator, about (Ritz: not above but for rounding), and its vector.

    Lanczos with full reorthogonalisation, until two steps change the value by less than `tol`, relative.
    """
    n = len(start)
    Q = torch.zeros(min(steps, n), n, dtype=start.dtype, device=start.device)  # (steps, n)
    T = torch.zeros(len(Q), len(Q), dtype=torch.float64)
    q, last, calm = start / start.norm(), -math.inf, 0
    value, vector = last, q
    for j in range(len(Q)):
        Q[j] = q
        w = apply(q)
        T[j, j] = w @ q
        for _ in range(2):
            w = w - Q[: j + 1].T @ (Q[: j + 1] @ w)
        values, vectors = torch.linalg.eigh(T[: j + 1, : j + 1])
        value, vector = float(values[-1]), vectors[:, -1]
        calm = calm + 1 if abs(value - last) <= tol * abs(value) else 0
        b, last = float(w.norm()), value
        if calm == 2 or b <= 1e-14 * abs(value) or j + 1 == len(Q):
            break
        T[j, j + 1] = T[j + 1, j] = b
        q = w / b
    ritz = Q[: len(vector)].T @ vector.to(Q.device)
    return value, ritz / ritz.norm()


def _norm_of_norms(norms: list[float]) -> float:
    return norm_up(torch.tensor(norms, dtype=torch.float64))


def _read(K: Tensor) -> tuple[float, float]:
    """Return the largest |K_ij| and an upper bound of ||K||_F.

    Raises:
        InputError: a number is NaN or infinite, or K is not symmetric to the bit.
    """
    n, top, norms = len(K), 0.0, []
    for i in range(0, n, TILE):
        for j in range(0, i + 1, TILE):
            lower, upper = K[i : i + TILE, j : j + TILE], K[j : j + TILE, i : i + TILE].mT
            most = float(torch.linalg.vector_norm(lower, math.inf))
            if not math.isfinite(most) or not torch.equal(lower, upper):
                raise InputError(_what_is_wrong(K))
            top = max(top, most)
            norms += [norm_up(lower)] * (1 if i == j else 2)
    return top, _norm_of_norms(norms)


def _what_is_wrong(K: Tensor) -> str:
    for i in range(len(K)):
        if bad := (~torch.isfinite(K[i])).nonzero().flatten().tolist():
            return f"K[{i}, {bad[0]}]={float(K[i, bad[0]])!r} is no finite number; leave out what it comes from"
    for i in range(len(K)):
        if bad := (K[i] != K[:, i]).nonzero().flatten().tolist():
            a, b = float(K[i, bad[0]]), float(K[bad[0], i])
            return (
                f"K[{i}, {bad[0]}]={a!r} and K[{bad[0]}, {i}]={b!r} differ: K has to be symmetric to the bit; "
                "give (K + K.T) / 2 and add what that changes to perturbation="
            )
    raise AssertionError("K is finite and symmetric after all")
