"""Outward rounding: what a rigorous bound needs on top of floating-point arithmetic.

Python and torch round every float64 operation to nearest, so the next number up (down) from a result is a rigorous
upper (lower) bound of that one operation. A sum of k products, in any order, with or without fused multiply-adds, is
off by at most gam(k) times the sum of their absolute values, and by the smallest normal number for each product that
underflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

U = 2.0**-53  # the unit roundoff u of float64
TINY = 2.0**-1022  # the smallest normal number: what one operation may lose to underflow, flushing to zero included


def up(x: float) -> float:
    """Return the next number above: an upper bound of the exact result that was rounded to x."""
    return math.nextafter(x, math.inf)


def down(x: float) -> float:
    """Return the next number below: a lower bound of the exact result that was rounded to x."""
    return math.nextafter(x, -math.inf)


def sum_up(*terms: float) -> float:
    """Return an upper bound of the exact sum."""
    return up(math.fsum(terms))


def gam(k: int) -> float:
    """Return an upper bound of the relative error of k roundings, one upon the other: k u / (1 - k u).

    Args:
        k: how many, from 0 to 2^52.

    Returns:
        the bound, in float64 (u = 2^-53).

    Raises:
        ValueError: k is out of its range.

    Example:
        >>> 1000 * U < gam(1000) < 1000.000001 * U
        True

    Source: Higham, Accuracy and Stability of Numerical Algorithms, Lemma 3.1.
    """
    if not 0 <= k <= 2**52:
        raise ValueError(f"k={k!r} roundings have no bound gam(k); split the sum into blocks of 2^52 terms at most")
    return up(k * U / (1.0 - k * U))  # k u and 1 - k u are exact


def norm_up(x: Tensor) -> float:
    """Return an upper bound of the Frobenius norm.

    Scaled by a power of two first, so that squares neither overflow nor get lost.

    Args:
        x: finite or infinite numbers of any shape; float64, or narrower (which are converted without error).

    Returns:
        the bound; infinite where a number of x is infinite or NaN, 0 where x is 0 or empty.

    Example:
        >>> 5 <= norm_up(torch.tensor([3.0, 4.0])) < 5.00000001
        True
    """
    top = float(torch.linalg.vector_norm(x, math.inf)) if x.numel() else 0.0
    if top == 0.0:
        return 0.0
    if not math.isfinite(top):
        return math.inf
    scale = power_of_two(top)
    y = (x.double() * scale).flatten()
    # scaling loses at most TINY of a number that is 4 at most, squaring another TINY
    squares = up(up(float(y @ y) * up(1.0 + gam(len(y) + 2))) + up(len(y) * 16 * TINY))
    return up(up(math.sqrt(squares)) / scale)


def power_of_two(top: float) -> float:
    """Return the power of two that brings `top` between 1/2 and 1 (as near as normal numbers allow: at most 4)."""
    return math.ldexp(1.0, -min(1022, max(-1000, math.frexp(top)[1])))
