"""Rows that are equal to the bit: the usual reason why a Gram is singular."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def equal_rows(X: Tensor, block: int = 1024) -> list[list[int]]:
    """Return the groups of two and more equal rows of X, each in ascending order.

    Args:
        X: (n, p), finite; 0 and -0 are equal.
        block: how many rows are worked on at a time.

    Example:
        >>> equal_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
        [[0, 2]]
    """
    groups: dict[bytes, list[int]] = {}
    for start in range(0, len(X), block):
        rows = (X[start : start + block].double() + 0.0).contiguous().cpu().numpy()  # + 0.0: no negative zeros
        for i, row in enumerate(rows, start):
            groups.setdefault(hashlib.blake2b(row.data, digest_size=16).digest(), []).append(i)
    # a digest only says where to look
    return [g for g in groups.values() if len(g) > 1 and all(torch.equal(X[g[0]], X[i]) for i in g[1:])]


def equal_columns(X: Tensor, block: int = 1024) -> list[list[int]]:
    """Return the groups of two and more equal columns of X, in one pass over blocks of its rows.

    Args:
        X: (n, p), finite; 0 and -0 are equal.
        block: how many rows are worked on at a time.

    Example:
        >>> equal_columns(torch.tensor([[1.0, 2.0, 1.0], [3.0, 4.0, 3.0]]))
        [[0, 2]]
    """
    digests = [hashlib.blake2b(digest_size=16) for _ in range(X.shape[1])]
    for start in range(0, len(X), block):
        columns = (X[start : start + block].double() + 0.0).mT.contiguous().cpu().numpy()
        for digest, column in zip(digests, columns):
            digest.update(column.data)
    groups: dict[bytes, list[int]] = {}
    for j, digest in enumerate(digests):
        groups.setdefault(digest.digest(), []).append(j)
    return [g for g in groups.values() if len(g) > 1 and all(torch.equal(X[:, g[0]], X[:, j]) for j in g[1:])]
