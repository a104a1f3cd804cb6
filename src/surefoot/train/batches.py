"""The order of the data: a pure function of seed and step, so that a resumed run sees what it would have seen."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of `rows` rows for an epoch: (rows,) int64."""
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.randperm(rows, generator=generator)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the number of batches in a pass; the last may be smaller, or larger by one.

    A single row left over joins the batch before it: batch norm has no use for a batch of one.
    """
    return rows if batch_size == 1 else max(1, math.ceil((rows - 1) / batch_size))


def batch_rows(step: int, rows: int, batch_size: int, seed: int) -> Tensor | None:
    """Return the indices of the rows of a step, or None for all of them in their own order."""
    if batch_size >= rows:
        return None
    batches = steps_per_epoch(rows, batch_size)
    epoch, position = divmod(step, batches)
    end = rows if position == batches - 1 else (position + 1) * batch_size
    return epoch_order(rows, seed, epoch)[position * batch_size : end]
