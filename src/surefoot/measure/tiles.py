"""Tiles of samples: how large they may be, in what order they are worked out, and by whom.

A Gram too large for the memory is worked out pair of blocks by pair of blocks. Every pair costs the derivatives of its
samples, t (1 + 2 C) forward passes, and the contraction, t^2 times a count that depends on the layers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

import torch

from surefoot.errors import InputError
from surefoot.measure.contraction import Lookup, Outer, Term
from surefoot.measure.forms import Layout
from surefoot.measure.memory import available

Pair = tuple[int, int]
SHARE = 0.5  # of the memory that is available, what is taken if nobody says otherwise
UNKNOWN = 4e9  # bytes taken to be there where the system does not say
BUILD = 3  # working out a block's terms takes so many times their size, what autograd keeps included
CONTRACT = 2  # contracting them: themselves and a copy
LEAST_ROWS = 1024  # blocks are not made smaller than this for the sake of shares and of resuming alone
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(value: int | float | str | None) -> int | None:
    """Return a number of bytes: 4e9, "4GB", "500 MB", "1.5 GiB"; None: None.

    Raises:
        InputError: no such number, or none above zero.
    """
    if value is None:
        return None
    number, unit, binary = value, "", ""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", value, re.IGNORECASE)
        if not found or (found[3] and not found[2]):
            raise InputError(f'max_memory={value!r} is no amount of memory; write bytes, or "4GB", "500 MB", "1.5 GiB"')
        number, unit, binary = float(found[1]), found[2].lower(), found[3]
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number < 1:
        raise InputError(f'max_memory={value!r} is no amount of memory; give bytes above zero, or "4GB"')
    factor = 1024 ** " kmgt".index(unit) if binary else _UNITS[unit]
    return int(number * factor)


def format_bytes(number: float) -> str:
    """Return a number of bytes as a reader would write it."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.3g} {unit}"


def default_memory(device: torch.device) -> int:
    """Return the share of what is available that a process may take, on a machine that it may have to share."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    most = int(SHARE * (available() or UNKNOWN) / here)
    return min(most, int(SHARE * torch.cuda.mem_get_info(device)[0])) if device.type == "cuda" else most


def term_bytes(terms: Sequence[Term]) -> int:
    """Return the bytes that terms hold, what they share counted once."""
    storages = {}
    for term in terms:
        for tensor in vars(term).values():
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def multiplications(terms: Sequence[Term]) -> tuple[float, float]:
    """Count what one sample's derivatives cost, and the contraction of a pair of samples."""
    sample = pair = 0.0
    for term in terms:
        if isinstance(term, Outer):
            C, _, G, T, b = term.grads.shape
            a = term.inputs.shape[-1]
            sample += (1 + 2 * C) * G * T * a * b
            ways = [G * (T * T * (a + C * b) + C * C * T * b), G * C * C * a * b]
            pair += a + C * C * b if G * T == 1 else min(ways)
        elif isinstance(term, Lookup):
            C, _, T, d = term.grads.shape
            sample += C * T * d
            pair += T * T * C * d + C * C * T * d
        else:
            _, C, p = term.rows.shape
            sample += (1 + 2 * C) * p
            pair += C * C * p
    return sample, pair


def tile_memory(layout: Layout, sample_bytes: int, t: int) -> int:
    """Return the bytes that two blocks of t samples and their tile take."""
    sides = BUILD if layout.form == "sample blocks" else max(2 * CONTRACT, BUILD + 1)
    return t * sample_bytes * sides + layout.size(t, t)


def largest_tile(layout: Layout, sample_bytes: int, samples: int, room: float) -> int:
    """Return how many samples a block may have so that `tile_memory` is no more than `room`; 0: none."""
    low, high = 0, samples
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tile_memory(layout, sample_bytes, middle) <= room else (low, middle - 1)
    return low


def fits_whole(layout: Layout, sample_bytes: int, n: int, m: int, memory: float) -> bool:
    """Return whether result and terms of all samples fit at once."""
    terms = BUILD * n if layout.symmetric else n + BUILD * m
    return layout.size(n, m) + max(terms, CONTRACT * (n if layout.symmetric else n + m)) * sample_bytes <= memory


def split(layout: Layout, tile: int, n: int, least_pairs: int) -> int:
    """Return a tile that makes at least so many pairs of blocks, unless blocks become too small to be worth it."""
    if layout.form == "sample blocks":
        blocks = least_pairs
    else:
        blocks = math.ceil((math.sqrt(8 * least_pairs + 1) - 1) / 2)
    return max(1, min(tile, max(math.ceil(n / blocks), LEAST_ROWS // layout.outputs)))


def blocks_of(n: int, tile: int) -> list[slice]:
    """Return n samples in blocks of `tile`, the last one what is left."""
    return [slice(start, min(n, start + tile)) for start in range(0, n, tile)]


def pairs_of(layout: Layout, rows: int, columns: int) -> list[Pair]:
    """Return the pairs of blocks, to and fro, so that a row begins with the block that the last one ended with."""
    if layout.form == "sample blocks":
        return [(i, i) for i in range(rows)]
    found = []
    for i in range(rows):
        row = [(i, j) for j in range(i if layout.symmetric else 0, columns)]
        found += row if i % 2 == 0 else row[::-1]
    return found


def cost_of(pair: Pair, left: slice, right: slice, layout: Layout, counts: tuple[float, float]) -> float:
    """Return the multiplications that a pair of blocks takes."""
    n, m = left.stop - left.start, right.stop - right.start
    same = layout.symmetric and pair[0] == pair[1]
    if layout.form == "sample blocks":
        return n * sum(counts)
    return m * counts[0] + n * m * counts[1] * (0.5 if same else 1.0)


def share_out(costs: Sequence[float], ranks: int) -> list[int]:
    """Return the rank of each pair: neighbours together, the costs as even as that allows."""
    total, before, found = sum(costs), 0.0, []
    for cost in costs:
        found.append(min(ranks - 1, int(ranks * (before + cost / 2) / total)))
        before += cost
    return found
