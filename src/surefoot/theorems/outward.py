"""Rounding to the safe side: floats above and below exact rational numbers, and counts of steps."""

from __future__ import annotations

import math
import sys
from fractions import Fraction


def above(x: Fraction) -> float:
    """Return a float >= x, the least one; infinity beyond all of them.

    Example:
        >>> Fraction(above(Fraction(1, 3))) > Fraction(1, 3) > Fraction(below(Fraction(1, 3)))
        True
    """
    try:
        f = float(x)
    except OverflowError:
        return math.inf if x > 0 else -sys.float_info.max
    return f if Fraction(f) >= x else math.nextafter(f, math.inf)


def below(x: Fraction) -> float:
    """Return a float <= x, the greatest one."""
    return -above(-x)


def sqrt_above(x: Fraction) -> float:
    """Return a float >= sqrt(x), for x >= 0."""
    f = math.sqrt(above(x))
    while math.isfinite(f) and Fraction(f) ** 2 < x:
        f = math.nextafter(f, math.inf)
    return f


def sqrt_below(x: Fraction) -> float:
    """Return a float <= sqrt(x), for x >= 0."""
    f = math.sqrt(below(x))
    while Fraction(f) ** 2 > x:
        f = math.nextafter(f, 0.0)
    return f


def steps_until(start: float, target: float, drop: float) -> float:
    """Return T such that start (1 - drop)^T <= target: the least one, or a few more where rounding leaves it open.

    Args:
        start: >= 0.
        target: >= 0; at 0 no number of steps will do, unless start is 0 or drop 1.
        drop: in [0, 1], rounded down.

    Returns:
        a whole number, or infinity.

    Example:
        >>> steps_until(1.0, 1e-3, 0.5)
        10
    """
    if start <= target:
        return 0
    if drop >= 1:
        return 1
    if target <= 0 or drop <= 0 or not math.isfinite(start):
        return math.inf
    # log and log1p are right to a few units in the last place, and no logarithm of a float exceeds 745
    needed = math.log(start) - math.log(target) + 1e-12
    return math.ceil(needed / -math.log1p(-drop) * (1 + 1e-14))
