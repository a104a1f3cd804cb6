"""The processes that `torchrun` starts, as one team: who they are, what they tell each other, how a model is spread.

Rows are shared out, not copied: together the ranks go through the batch that one process would have, and the loss and
its gradient are means over that whole batch, also where the shares are unequal.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.optim.norm import is_distributed

T = TypeVar("T")
HOW = "torchrun --nproc-per-node 2 -m surefoot.cli.main train ..."


@dataclass(frozen=True)
class Team:
    """This process among those that train one model together; by default it is alone.

    Args:
        rank: 0, ..., size - 1; rank 0 is the one that prints and writes.
        size: number of processes.
        parallel: "none", "ddp" (every rank has the whole model) or "fsdp" (every rank has a part of each parameter).
    """

    rank: int = 0
    size: int = 1
    parallel: str = "none"

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks."""
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, act: Callable[[], T]) -> T:
        """Act on every rank; where one fails with InputError or OSError, all of them do.

        Raises:
            InputError: as the first rank that failed, so that none waits for it.
            OSError: likewise.
        """
        if self.size == 1:
            return act()
        import torch.distributed as dist

        result: Any = None
        error: InputError | OSError | None = None
        try:
            result = act()
        except (InputError, OSError) as caught:
            error = caught
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, error)
        if error is None:
            error = next((e for e in errors if e is not None), None)
        if error is not None:
            raise error
        return result

    def on_main(self, act: Callable[[], T]) -> T:
        """Act on rank 0 alone and return what it returned, or raise what it raised, on all."""
        if self.size == 1:
            return act()
        import torch.distributed as dist

        box = [self.agree(lambda: act() if self.main else None)]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def seed(self, seed: int, step: int) -> None:
        """Give each rank random draws of its own (dropout), fixed by seed, step and rank."""
        if self.size > 1:
            digest = hashlib.blake2b(f"rank {self.rank} {seed} {step}".encode(), digest_size=7).digest()
            torch.manual_seed(int.from_bytes(digest))

    def spread(self, model: nn.Module, row: Tensor, *, half: bool) -> nn.Module:
        """Return the module that training calls: `model`, alone, wrapped for ddp, or cut up in place for fsdp.

        Args:
            model: the same on every rank; for fsdp each child of a `ModuleList` is gathered by itself.
            row: (1, ...) input, where the model is.
            half: gather parameters in bfloat16 (fsdp); gradients are added up in float32.
        """
        if self.parallel == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            devices = [row.device] if row.device.type == "cuda" else None
            idle = has_idle_parameters(model, row)
            return DistributedDataParallel(
                model, device_ids=devices, forward_sync_buffers=False, find_unused_parameters=idle
            )
        if self.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            mesh = init_device_mesh(row.device.type, (self.size,))
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
            lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
            for block in [b for found in lists for b in found if not isinstance(b, (nn.ModuleList, nn.ModuleDict))]:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    def share_buffers(self, model: nn.Module) -> None:
        """Make the buffers that are saved (statistics of batch norm) those of rank 0."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    dist.broadcast(buffer, src=0)


ALONE = Team()


def shares(rows: int, team: Team, most: int | None) -> list[tuple[int, int]]:
    """Return the pieces (start, end) of a batch that a rank goes through: as many on every rank, some perhaps empty.

    Args:
        rows: rows of the batch.
        team: who shares them.
        most: rows a piece may have; None: any number.

    Example:
        >>> shares(7, Team(0, 2), None), shares(7, Team(1, 2), None), shares(7, Team(1, 2), 2)
        ([(0, 3)], [(3, 7)], [(3, 5), (5, 7)])
    """
    largest = -(-rows // team.size)
    pieces = -(-largest // (most or largest))
    start, end = team.rank * rows // team.size, (team.rank + 1) * rows // team.size
    return [(start + i * (end - start) // pieces, start + (i + 1) * (end - start) // pieces) for i in range(pieces)]


def has_idle_parameters(model: nn.Module, row: Tensor) -> bool:
    """Say whether a trainable parameter takes no part in the output: ddp has to look for it at every step."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng():
        out = model.eval()(row)
    for module, mode in modes.items():
        module.training = mode
    outputs = [t.sum() for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
    params = [p for p in model.parameters() if p.requires_grad]
    return any(g is None for g in torch.autograd.grad(outputs, params, allow_unused=True))


def without_sync(module: nn.Module, last: bool) -> Any:
    """Return a context in which ddp does not yet add up gradients, unless this piece is the last of its step."""
    return nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this rank may hold a part; every rank must ask for it."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor`, cut up as `like` is if they have the same shape."""
    if not is_distributed(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


def launched() -> bool:
    """Say whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_device(name: str) -> str:
    """Return the device that is this process's own: of "cuda" the one with its local rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and launched() else name


@contextmanager
def joined(parallel: str, device: str) -> Iterator[Team]:
    """Join the team that torchrun started, for as long as the context lasts; within another such context, the same one.

    Args:
        parallel: "none" (ddp where there are several processes), "ddp" or "fsdp".
        device: what the model is trained on: nccl serves CUDA, gloo the processor.

    Raises:
        InputError: parallel training was asked for, and there is no torchrun.
    """
    if not launched():
        if parallel != "none":
            raise InputError(f"--parallel {parallel} needs torchrun: {HOW} --parallel {parallel}")
        yield ALONE
        return
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if parallel == "none" and size == 1:
        yield ALONE
        return
    team = Team(rank, size, "ddp" if parallel == "none" else parallel)
    if dist.is_initialized():
        yield team
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(local_device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    yield team
    gc.collect()  # a model that was cut up holds on to the group; freed only at exit, gloo's threads would abort
    dist.destroy_process_group()  # not after an error: others may still be in the middle of something
