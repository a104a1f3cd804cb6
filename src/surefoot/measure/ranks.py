"""Several processes that work out one thing together, or one process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from surefoot.errors import InputError

Found = TypeVar("Found")
PANEL = 2**23  # numbers that go over the wire at once


class Ranks:
    """The processes of torch.distributed's default group, if there is one.

    Attributes:
        rank: this process, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    def together(self, make: Callable[[], Found]) -> Found:
        """Return what `make` returns here; an InputError on one rank is an InputError on all, so that none waits.

        Raises:
            InputError: on some rank.
        """
        if self.count == 1:
            return make()
        found: Found | None = None
        cause: InputError | None = None
        try:
            found = make()
        except InputError as error:
            cause = error
        for rank, message in enumerate(self.gather(str(cause or ""))):
            if message:
                raise InputError(str(cause) if cause else f"rank {rank}: {message}") from cause
        return cast(Found, found)

    def gather(self, value: Found) -> list[Found]:
        """Return every rank's value, in the order of the ranks."""
        if self.count == 1:
            return [value]
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, value)
        return everyone

    def add_up(self, K: Tensor) -> None:
        """Put the sum over the ranks in place of K; where only one rank has something, its bits."""
        if self.count == 1:
            return
        device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
        flat = K.view(-1)
        for start in range(0, len(flat), PANEL):
            panel = flat[start : start + PANEL].to(device)
            dist.all_reduce(panel)
            flat[start : start + PANEL] = panel
