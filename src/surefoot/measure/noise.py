"""Gradient noise: how far the gradients of single samples scatter, from the pieces that a batch is gone through in.

Letters: G_i the mean gradient of piece i with B_i samples, G the mean gradient of the whole batch with B = sum B_i,
sigma² = E||g_sample - E g||², the trace of the covariance of one sample's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement


def gradient_noise(norms: Sequence[float], sizes: Sequence[int], norm: float) -> float:
    """Return sigma² = (mean_i ||G_i||² - ||G||²) / (mean_i 1/B_i - 1/B), unbiased.

    E||G_i||² = ||E g||² + sigma²/B_i and E||G||² = ||E g||² + sigma²/B; the difference leaves sigma². It costs nothing
    where gradients are accumulated or come from several ranks. An unbiased estimate of a small number may be negative:
    average it over steps before you read it. Drawn without replacement, it is the variance of the data set with N - 1
    in the denominator.

    Args:
        norms: ||G_i||, one a piece.
        sizes: B_i >= 1, one a piece.
        norm: ||G|| of the mean over all samples, sum_i B_i G_i / B.

    Returns:
        sigma², in the unit of a squared gradient; NaN for fewer than two pieces.

    Raises:
        InputError: as many sizes as norms there are not, or a size is no positive number.

    Example:
        >>> gradient_noise([3.0, 1.0], [1, 1], 2.0)  # samples with gradients 3 and 1: variance 2
        2.0
    """
    if len(norms) != len(sizes):
        raise InputError(f"sizes={list(sizes)} has {len(sizes)} entries for {len(norms)} norms; give one a piece")
    if any(not size >= 1 for size in sizes):
        raise InputError(f"sizes={list(sizes)} holds a piece without a sample; leave it out")
    squares, inverses = math.fsum(x * x for x in norms), math.fsum(1 / size for size in sizes)
    return noise_from_sums(len(norms), squares, inverses, sum(sizes), norm)


def noise_from_sums(pieces: int, squares: float, inverses: float, rows: float, norm: float) -> float:
    """Return sigma² of `gradient_noise` from sums over the pieces, which is all that several ranks need to share.

    Args:
        pieces: how many there are.
        squares: sum_i ||G_i||².
        inverses: sum_i 1/B_i.
        rows: B = sum_i B_i.
        norm: ||G||.
    """
    return math.nan if pieces < 2 else (squares / pieces - norm * norm) / (inverses / pieces - 1 / rows)


def mean_noise(values: Sequence[float], *, dtype: str = "float64") -> Measurement | None:
    """Average sigma² over steps.

    Args:
        values: sigma² of each step; those that are not finite are left out.
        dtype: of the gradients.

    Returns:
        The mean with its standard error (from ten batches of successive steps, as steps are not independent; None below
        twenty steps), or None if there is no value.

    Example:
        >>> print(mean_noise([1.0, 3.0]))
        sigma² ~ 2 (estimate: unbiased, from pieces of a batch, mean over steps; n = 2; float64)
    """
    found = [v for v in values if math.isfinite(v)]
    if not found:
        return None
    mean = math.fsum(found) / len(found)
    error = None
    if len(found) >= 20:
        edges = [i * len(found) // 10 for i in range(11)]
        means = [math.fsum(found[i:j]) / (j - i) for i, j in pairwise(edges)]
        error = math.sqrt(math.fsum((m - mean) ** 2 for m in means) / 90)
    how = "unbiased, from pieces of a batch, mean over steps"
    return Measurement("sigma²", mean, "estimate", "estimate", how, samples=len(found), dtype=dtype, error=error)
