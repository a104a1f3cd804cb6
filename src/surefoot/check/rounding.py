"""Rounding: what a float64 computation can be off by. u = 2^-53, round to nearest.

The rules used throughout (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3):

    a dot product of k terms, in any order, is off by at most gam(k) sum |x_i y_i|,  gam(k) = k u / (1 - k u);
    a number made of non-negative numbers by at most 4,000 additions, multiplications, divisions and square roots is
    off by less than a factor 1 + 2^-40: `up` makes an upper bound of it.

Underflow, flushed to zero or gradual, is off by at most 2^-1022 an operation, so a norm by at most 2^-490. No number
of a certificate other than 0 is below 1e-100 (`reading` sees to that): TINY, in every norm and error, covers it, and a
product of two numbers that are at least TINY does not underflow.
"""

from typing import Any

import numpy as np

Array = np.ndarray
U = 2.0**-53
TINY = 1e-130
ULPS = 64 * U  # of an elementary function and the few operations around it: libm's within 8 ulp = 16 u, and room


def gam(k: int) -> float:
    """Return an upper bound of k u / (1 - k u)."""
    if k >= 2**40:
        raise OverflowError(f"a sum of {k} terms")
    return k * U * (1 + 2.0**-12)


def up(x: Any) -> Any:
    """Return an upper bound of what a short computation with non-negative numbers should have given."""
    return x * (1 + 2.0**-40) + TINY


def grown(x: Array) -> Array:
    """Return the same where zeros are exact: sums of products of two numbers, each 0 or at least TINY."""
    return np.where(x > 0, up(x), 0.0)


def norms(x: Array) -> Array:
    """Return upper bounds of the Euclidean norms of x's rows (everything but the first index): (N,)."""
    flat = x.reshape(len(x), -1)
    return up(np.sqrt(np.einsum("ij,ij->i", flat, flat)) * (1 + gam(flat.shape[1] + 2)))


def norm(x: Array) -> float:
    """Return an upper bound of the Euclidean norm of all of x."""
    return float(norms(x.reshape(1, -1))[0])


def total(x: Array) -> float:
    """Return an upper bound of the sum of non-negative numbers."""
    return float(up(np.sum(x) * (1 + gam(x.size))))
