"""To mean 0 and deviation 1 on the training rows; statistics are exact sums in float64, the result is cast once.

The test rows go through the same map and never enter the statistics.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.errors import InputError

ROWS_AT_ONCE = 4096  # counting and looking up need an integer index a pixel: in slices it stays small beside the result


def pixels(
    train: np.ndarray, test: np.ndarray, dtype: torch.dtype, *, white: int = 255
) -> tuple[Tensor, Tensor, dict[str, Any], list[str]]:
    """Images from bytes to floats: ``(p / white - mean) / std`` a channel.

    Args:
        train: ``(N, H, W, C)`` uint8.
        test: ``(M, H, W, C)`` uint8.
        dtype: Type of the result.
        white: The byte that stands for 1.

    Returns:
        Both as ``(N, C, H, W)`` of `dtype`, the statistics (pixels in [0, 1]) and notes.
    """
    # A byte has 256 values: a histogram gives mean and variance without a float copy of the images.
    level = np.arange(256) / white
    means, deviations, notes = [], [], []
    for channel in range(train.shape[3]):
        share = _histogram(train[..., channel]) / train[..., channel].size
        mean = float(share @ level)
        deviation = float(np.sqrt(share @ (level - mean) ** 2))
        if np.count_nonzero(share) == 1:
            mean, deviation = float(level[share.argmax()]), 1.0
            notes.append(f"channel {channel} is constant in the training images: left at zero")
        means.append(mean)
        deviations.append(deviation)
    table = torch.tensor((level - np.array(means)[:, None]) / np.array(deviations)[:, None]).to(dtype)  # (C, 256)
    statistics = {"input_mean": means, "input_std": deviations}
    return _looked_up(train, table), _looked_up(test, table), statistics, notes


def columns(
    names: list[str], train: np.ndarray, test: np.ndarray, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[float], list[float], np.ndarray]:
    """Columns of numbers: ``(v - mean) / std`` a column, with std 1 for a constant one.

    Args:
        names: What the d columns are called, for messages.
        train: ``(N, d)`` float64, finite.
        test: ``(M, d)`` float64, finite.
        dtype: Type of the result.

    Returns:
        Both standardised, the means, the deviations, and which columns are constant, ``(d,)`` bool.

    Raises:
        InputError: The numbers are too large to square.
    """
    constant = train.max(axis=0) == train.min(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.where(constant, train[0], train.mean(axis=0))
        deviation = np.where(constant, 1.0, train.std(axis=0))
    usable = np.isfinite(mean) & np.isfinite(deviation) & (deviation > 0)
    if not usable.all():
        name = names[int(usable.argmin())]
        raise InputError(f"column {name!r} holds numbers whose squares leave the range of float64: change its unit")
    scaled = [torch.from_numpy((part - mean) / deviation).to(dtype) for part in (train, test)]
    return scaled[0], scaled[1], mean.tolist(), deviation.tolist(), constant


def _histogram(values: np.ndarray) -> np.ndarray:
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(values), ROWS_AT_ONCE):
        counts += np.bincount(values[start : start + ROWS_AT_ONCE].ravel(), minlength=256)
    return counts


def _looked_up(images: np.ndarray, table: Tensor) -> Tensor:
    rows, height, width, channels = images.shape
    out = torch.empty((rows, channels, height, width), dtype=table.dtype)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = torch.from_numpy(images[start : start + ROWS_AT_ONCE]).to(torch.int32)
        for channel in range(channels):
            out[start : start + ROWS_AT_ONCE, channel] = table[channel][part[..., channel]]
    return out
