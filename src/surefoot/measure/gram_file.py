"""A Gram on disk: a .npy file that grows tile by tile, and a small JSON beside it that says which tiles are there."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.tiles import Pair, format_bytes

FORMAT = "surefoot tangent Gram 1"
CLOSE = 1e-6  # relative: how near the outputs of two runs of the same model are on any machine


class GramFile:
    """A float64 array in a .npy file, written by one process or several, gone on with after any of them died.

    A tile counts as finished when its numbers have been handed to the disk and its name written into the journal, in
    this order, so that a tile torn by a kill is worked out again.

    Args:
        path: of the file; the journals lie beside it as path.json and, for ranks above 0, path.<rank>.json.
        shape: of the array.
        about: what the numbers follow from, as JSON has it; "outputs" is compared as numbers.
        rank: of this process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], about: dict[str, Any], rank: int = 0) -> None:
        self.path = path
        self.shape = shape
        self.about = about
        self.journal = path.with_name(f"{path.name}.{rank}.json" if rank else f"{path.name}.json")
        self.tile = 0
        self.done: list[Pair] = []

    def prepare(self, tile: int) -> None:
        """Begin the file, or find out how far it has come, whose tiles then decide: `self.tile`, `self.done`.

        Raises:
            InputError: the file is another's, or there is no room for it.
        """
        if not self.journal.exists():
            if self.path.exists():
                raise InputError(
                    f"path={str(self.path)!r} is there and no Gram of this program; choose another or remove it"
                )
            self._check_disk(0)
            self.begin(tile)
            self._create()
            return
        found = self._read(self.journal)
        self._compare(found)
        self.tile = found["tile"]
        done = {tuple(pair) for pair in found["done"]}
        name = glob.escape(self.path.name)
        for torn in [*self.path.parent.glob(f"{name}.new"), *self.path.parent.glob(f"{name}.*json.new")]:
            torn.unlink()  # was being written when its process died
        others = sorted(self.path.parent.glob(f"{name}.[0-9]*.json"))
        for other in others:
            theirs = self._read(other)
            self._compare(theirs)
            done |= {tuple(pair) for pair in theirs["done"]}
        if not self.path.exists():
            done = set()
            self._check_disk(0)
            self._create()
        elif self._open("r").shape != self.shape:
            raise InputError(f"path={str(self.path)!r} does not have the shape {self.shape}; remove it and begin anew")
        else:
            self._check_disk(self.path.stat().st_blocks * 512)
        self.done = sorted(done)
        self._write_journal()
        for other in others:
            other.unlink()

    def begin(self, tile: int) -> None:
        """Begin this process's journal."""
        self.tile = tile
        self.done = []
        self._write_journal()

    def write(self, pair: Pair, parts: Sequence[tuple[tuple[slice, ...], Tensor]]) -> None:
        """Write a pair of blocks' numbers to the disk, then into the journal that they are there."""
        array = self._open("r+")  # opened anew for every tile, so that no more of it stays in memory than that
        for index, numbers in parts:
            array[index] = numbers.numpy()
        array.flush()
        self.done.append(pair)
        self._write_journal()

    def tensor(self) -> Tensor:
        """Return the array, read from the disk as it is used; what is written to it stays off the disk."""
        return torch.from_numpy(self._open("c"))

    def _open(self, mode: Any) -> np.memmap[Any, Any]:
        try:
            return cast("np.memmap[Any, Any]", np.lib.format.open_memmap(self.path, mode=mode))
        except ValueError as error:
            raise InputError(
                f"path={str(self.path)!r} is no .npy file ({error}); choose another or remove it"
            ) from error

    def _create(self) -> None:
        fresh = self.path.with_name(f"{self.path.name}.new")
        np.lib.format.open_memmap(fresh, mode="w+", dtype=np.float64, shape=self.shape)
        fresh.replace(self.path)  # whole or not at all

    def _check_disk(self, there: int) -> None:
        need = 8 * math.prod(self.shape)
        free = shutil.disk_usage(self.path.parent).free + there
        if need > free:
            raise InputError(
                f"path={str(self.path)!r}: the result of shape {self.shape} takes {format_bytes(need)} and the disk "
                f"has {format_bytes(free)}, enough for {math.sqrt(free / need):.0%} of the samples; take fewer, "
                "another form, or another disk"
            )

    def _read(self, journal: Path) -> dict[str, Any]:
        try:
            found = json.loads(journal.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"path={str(self.path)!r}: {journal.name} beside it cannot be read; remove both"
            ) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(
                f"path={str(self.path)!r}: {journal.name} beside it is not this program's; choose another path"
            )
        return found

    def _compare(self, found: dict[str, Any]) -> None:
        there = found["about"]
        differing = [name for name in self.about if name != "outputs" and there.get(name) != self.about[name]]
        mine, theirs = self.about["outputs"], there.get("outputs", [])
        largest = max((abs(x) for x in mine), default=0.0)
        if not differing and (
            len(mine) != len(theirs) or any(abs(x - y) > CLOSE * largest for x, y in zip(mine, theirs))
        ):
            differing = ["outputs"]
        if found["shape"] != list(self.shape) or differing:
            raise InputError(
                f"path={str(self.path)!r} holds another Gram: {', '.join(differing or ['shape'])} differ; choose "
                f"another path, or remove it and {self.journal.name}"
            )

    def _write_journal(self) -> None:
        document = {
            "format": FORMAT,
            "shape": list(self.shape),
            "tile": self.tile,
            "about": self.about,
            "done": [list(pair) for pair in self.done],
        }
        fresh = self.journal.with_name(f"{self.journal.name}.new")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.journal)


def fingerprint(value: Any) -> str:
    """Return a hash of the numbers of a model, of tensors in tuples and dictionaries, or of what has a fixed repr."""
    digest = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, nn.Module):
            add({**dict(x.named_parameters()), **dict(x.named_buffers())})
        elif isinstance(x, Tensor):
            digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(x, dict):
            for name, one in x.items():
                digest.update(f"{name}:".encode())
                add(one)
        elif isinstance(x, (tuple, list)):
            digest.update(f"{len(x)} of".encode())
            for one in x:
                add(one)
        else:
            digest.update(repr(x).encode())

    add(value)
    return digest.hexdigest()
