"""Rounding: what float64 arithmetic can be off by, and norms, products and eigenvalues with that counted.

The rules used throughout (u = 2^-53, round to nearest; Higham, Accuracy and Stability of Numerical Algorithms, ch. 3):

    a dot product of k terms, in any order, is off by at most gam(k) sum |x_i y_i|,  gam(k) = k u / (1 - k u);
    a number made of non-negative numbers by at most 4,000 additions, multiplications, divisions and square roots is
    off by less than a factor 1 + 2^-40: `up` makes an upper bound of it.

Underflow, flushed to zero or gradual, is off by at most 2^-1022 an operation, so a norm by at most 2^-490. No number
of a certificate other than 0 is below SMALLEST (`reading` sees to that): TINY, in every norm and error, covers it,
and a product of two numbers that are at least TINY does not underflow.
"""

from typing import Any

import numpy as np

Array = np.ndarray
U = 2.0**-53
TINY, SMALLEST, LARGEST = 1e-130, 1e-100, 1e100
BLOCK = 1024  # rows and columns that lower_bound works on at a time


def gam(k: int) -> float:
    """Return an upper bound of k u / (1 - k u)."""
    if k >= 2**40:
        raise OverflowError(f"a sum of {k} terms")
    return k * U * (1 + 2.0**-12)


def up(x: Any) -> Any:
    """Return an upper bound of what a short computation with non-negative numbers should have given."""
    return x * (1 + 2.0**-40) + TINY


def norms(x: Array) -> Array:
    """Return upper bounds of the Euclidean norms of x's rows (everything but the first index): (N,)."""
    flat = x.reshape(len(x), -1)
    return up(np.sqrt(np.einsum("ij,ij->i", flat, flat)) * (1 + gam(flat.shape[1] + 2)))


def norm(x: Array) -> float:
    """Return an upper bound of the Euclidean norm of all of x."""
    return float(norms(x[None])[0])


def affine(A: Array, M: Array, b: Array | float) -> tuple[Array, Array]:
    """Return A M^T + b for A (N, ..., k) and M (m, k), and for each of the N an upper bound of its error's norm."""
    # A = A1 + A2 and M = M1 + M2, exactly, with the leading bits in A1 and M1. An entry of A1 M1^T is a sum of k
    # products of two whole numbers up to 2^bits, in one unit: none of its partial sums passes 2^53, so it is exact in
    # every order. A product in A1 M2^T + A2 M^T goes through k + 1 roundings at most, and ||A|| ||M|| bounds
    # || |A| |M|^T ||_F. The two additions that are left round once each.
    k = M.shape[1]
    bits = (53 - k.bit_length()) // 2
    A1, M1 = leading(A, bits), leading(M, bits)
    A2, M2 = A - A1, M - M1
    z = A1 @ M1.T + (A1 @ M2.T + A2 @ M.T)
    h = z + b
    rest = gam(k + 2) * (norms(A1) * norm(M2) + norms(A2) * norm(M))
    return h, up(rest + U * (norms(z) + norms(h)))


def leading(x: Array, bits: int) -> Array:
    """Return each row (last index) rounded to multiples of one power of two, at most 2^bits of them a number."""
    top = np.abs(x).max(-1, keepdims=True)
    unit = np.ldexp(1.0, np.frexp(np.maximum(top, TINY))[1] - bits)
    return np.rint(x / unit) * unit


def lower_bound(K: Array, t: float, block: int = BLOCK) -> float:
    """Return a rigorous lower bound of lambda_min(K), near t if K - t I is positive definite, else -inf.

    For ANY lower triangular L:  K = t I + L L^T + E  gives  lambda_min(K) >= t - ||E||_2, since L L^T >= 0. L is a
    Cholesky factor of K - t I, worked out in place and block by block from the left; E's blocks fall out on the way,
        S_ik = K_ik - t I_ik - sum_{j<k} L_ij L_kj^T,    L_ik = S_ik L_kk^-T,    E_ik = S_ik - L_ik L_kk^T.
    An entry of E is a sum of K_ik, t and dot products of at most `block` terms, one a block: float64 arithmetic is off
    by gam(block + blocks + 2) (|L| |L|^T + |K| + |t| I), of norm at most gam(...) (||L||_F^2 + ||K||_F + |t| sqrt n).
    K's blocks on and above the diagonal are read; what lies below is overwritten. If the diagonal blocks are not quite
    symmetric it is a bound of x^T K x / x^T x.
    """
    n = len(K)
    blocks = [slice(i, min(i + block, n)) for i in range(0, n, block)]
    e2 = l2 = k2 = 0.0  # upper bounds of the sums of squares of E, L, K
    for k, cols in enumerate(blocks):
        below = slice(cols.stop, n)
        S, R = K[cols, cols] - t * np.eye(cols.stop - cols.start), K[cols, below].T.copy()
        k2 += norm(K[cols, cols]) ** 2 + 2 * norm(R) ** 2
        for done in blocks[:k]:
            S -= K[cols, done] @ K[cols, done].T
            R -= K[below, done] @ K[cols, done].T
        try:
            L = np.linalg.cholesky(S)
            P = R @ np.linalg.inv(L).T
        except np.linalg.LinAlgError:
            return -np.inf
        e2 += norm(S - L @ L.T) ** 2 + 2 * norm(R - P @ L.T) ** 2
        l2 += norm(L) ** 2 + norm(P) ** 2
        K[below, cols] = P
    rounding = gam(block + len(blocks) + 4) * (l2 + np.sqrt(k2) + abs(t) * np.sqrt(n))
    return float(np.nextafter(t - up(np.sqrt(e2) + rounding), -np.inf))


def spectral_norm(W: Array) -> float:
    """Return a rigorous upper bound of ||W||_2, usually within 1e-9 of it."""
    # ||W||^2 = s - lambda_min(s I - W^T W), s a little above the computed largest eigenvalue; or the Frobenius norm.
    V = W if W.shape[0] >= W.shape[1] else W.T
    M, frobenius = V.T @ V, norm(W)
    M = np.triu(M) + np.triu(M, 1).T
    off = gam(len(V) + 2) * frobenius**2  # >= ||fl(V^T V) - V^T V||_F
    s = float(np.linalg.eigvalsh(M)[-1]) * (1 + 1e-9)
    least = min(lower_bound(s * np.eye(len(M)) - M, 0.0), 0.0)
    # fl(s - M_ii) is off by at most u (s + M_ii), and M_ii <= ||M||: 4 u (s - least) covers it.
    return min(frobenius, float(up(np.sqrt(s - least + off + 4 * U * (s - least)))))
