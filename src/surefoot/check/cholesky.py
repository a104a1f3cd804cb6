"""A rigorous lower bound of the smallest eigenvalue of a symmetric matrix, in place and in blocks.

For ANY lower triangular L:  K = t I + L L^T + E  gives  lambda_min(K) >= t - ||E||_2, since L L^T >= 0. L is a Cholesky
factor of K - t I, worked out block by block from the left; E's blocks fall out on the way,

    S_ik = K_ik - t I_ik - sum_{j<k} L_ij L_kj^T,    L_ik = S_ik L_kk^-T,    E_ik = S_ik - L_ik L_kk^T.

An entry of E is a sum of K_ik, t and at most `blocks` dot products of at most BLOCK terms: float64 arithmetic is off by
gam(BLOCK + blocks + 2) (|L| |L|^T + |K| + |t| I), whose norm is at most gam(...) (||L||_F^2 + ||K||_F + |t| sqrt n).
"""

import numpy as np

from surefoot.check.rounding import Array, U, gam, up

BLOCK = 1024


def lower_bound(K: Array, t: float) -> float:
    """Return a rigorous lower bound of lambda_min(K), near t if K - t I is positive definite, else -inf.

    K's BLOCK x BLOCK blocks on and above the diagonal are read; what lies below is overwritten. If the diagonal blocks
    are not quite symmetric it is a bound of x^T K x / x^T x.
    """
    n = len(K)
    blocks = [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
    e2 = l2 = k2 = 0.0  # sums of squares of E, L, K
    for k, cols in enumerate(blocks):
        S = K[cols, cols] - t * np.eye(cols.stop - cols.start)
        k2 += _squares(K[cols, cols])
        for done in blocks[:k]:
            S -= K[cols, done] @ K[cols, done].T
        try:
            L = np.linalg.cholesky(S)
            inverse = np.linalg.inv(L).T
        except np.linalg.LinAlgError:
            return -np.inf
        e2 += _squares(S - L @ L.T)
        l2 += _squares(L)
        below = slice(cols.stop, n)
        S = K[cols, below].T.copy()
        k2 += 2 * _squares(S)
        for done in blocks[:k]:
            S -= K[below, done] @ K[cols, done].T
        panel = S @ inverse
        e2 += 2 * _squares(S - panel @ L.T)
        l2 += _squares(panel)
        K[below, cols] = panel
    # Sums of squares of at most n^2 numbers, added in any order: (n^2 + 8) u covers them, the roots and what follows.
    slack = 1 + 4 * (float(n) * n + 8) * U
    rounding = gam(BLOCK + len(blocks) + 4) * (l2 + np.sqrt(k2) + abs(t) * np.sqrt(n))
    return float(np.nextafter(t - up((np.sqrt(e2) + rounding) * slack), -np.inf))


def spectral_norm(W: Array) -> float:
    """Return a rigorous upper bound of ||W||_2, usually within 1e-6 of it.

    ||W||^2 = s - lambda_min(s I - W^T W), s a little above the computed largest eigenvalue; or the Frobenius norm.
    """
    V = W if W.shape[0] >= W.shape[1] else W.T
    frobenius = float(up(np.sqrt(_squares(V)) * (1 + gam(V.size + 2))))
    M = V.T @ V
    M = np.triu(M) + np.triu(M, 1).T
    off = gam(len(V) + 2) * frobenius**2  # >= ||fl(V^T V) - V^T V||_F
    s = float(np.linalg.eigvalsh(M)[-1]) * (1 + 1e-7)
    least = min(lower_bound(s * np.eye(len(M)) - M, 0.0), 0.0)
    # fl(s - M_ii) is off by at most u (s + M_ii), and M_ii <= ||M||: 4 u (s - least) covers it.
    return min(frobenius, float(up(np.sqrt(s - least + off + 4 * U * (s - least)))))


def _squares(x: Array) -> float:
    return float(np.einsum("ij,ij->", x, x))
