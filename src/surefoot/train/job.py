"""From a configuration to everything a run needs, with every check made before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.data import Dataset, load
from surefoot.errors import InputError
from surefoot.models import build, check_shapes
from surefoot.train.batches import steps_per_epoch
from surefoot.train.config import TrainConfig
from surefoot.train.distributed import ALONE, Team, local_device
from surefoot.train.objective import Objective, choose_loss
from surefoot.train.optimizers import Stepper
from surefoot.train.widening import widen_for_rank

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class Job:
    """A run that is ready to start."""

    config: TrainConfig
    device: torch.device
    data: Dataset
    model: nn.Module
    objective: Objective
    stepper: Stepper
    batch_size: int
    per_epoch: int
    steps: int
    eval_every: int
    team: Team  # the processes that share the work,
    forward: nn.Module  # and what each of them calls to train: the model, or what spreads it over them

    @property
    def title(self) -> str:
        """Say what is trained on what, with what."""
        model = self.config.model if ":" not in self.config.model else Path(self.config.model).name
        return f"{model} on {self.data.name}, {self.config.optimizer}"

    def spread(self, team: Team) -> Job:
        """Return the job as this process's part of the team's work."""
        row = self.data.train_x[:1].to(self.device)
        forward = team.spread(self.model, row, half=self.config.autocast == "bf16")
        stepper = Stepper(self.config, [p for p in self.model.parameters() if p.requires_grad])
        return dataclasses.replace(self, team=team, forward=forward, stepper=stepper)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which model and loss are worked out."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.autocast == "bf16" else nullcontext()

    def data_summary(self) -> dict[str, Any]:
        """Return what the report says about the data, and a fingerprint of it."""
        summary = {**self.data.summary(), "fingerprint": fingerprint(self.data)}
        return summary | ({"task": "autoencoding"} if self.objective.task == "autoencoding" else {})

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self.stepper.params)


def prepare(config: TrainConfig) -> Job:
    """Load the data, build model and optimizer, and check that they fit; nothing is written.

    Raises:
        InputError: an option that makes no sense, with the fix.
    """
    from surefoot.train.certified_start import at_certificate, with_covered_lr  # which know what a job is

    config = (config if config.from_certificate is None else with_covered_lr(config)).resolved()
    device = _device(local_device(config.device))
    dtype = DTYPES[config.dtype]
    data = load(
        config.data,
        target=config.target,
        task=config.task,
        image_size=config.image_size,
        context=config.context,
        test_fraction=config.test_fraction,
        limit=config.limit,
        dtype=dtype,
    )
    task = "autoencoding" if config.model == "vae" else data.task
    loss = choose_loss(config.loss, task, config.model)
    seed_everything(config.seed)
    model = build(
        config.model,
        kind=data.kind,
        task=data.task,
        input_shape=data.input_shape,
        outputs=data.outputs,
        vocabulary_size=len(data.vocabulary) if data.vocabulary else None,
        width=config.width,
        depth=config.depth,
        activation=config.activation,
    ).to(device=device, dtype=dtype)
    widen_for_rank(model, config, len(data.train_x), data.train_x[:3].to(device))
    x, y = data.train_x[:2].to(device), data.train_y[:2].to(device)
    check_shapes(model, x, y, task=data.task, outputs=data.outputs, loss=loss)
    rows = len(data.train_x)
    batch_size = rows if config.batch_size == "full" else min(config.batch_size, rows)
    per_epoch = steps_per_epoch(rows, batch_size)
    steps = config.steps if config.steps is not None else max(1, round((config.epochs or 0) * per_epoch))
    # The thread count decides the last bits, so a repeated run must know it; local paths must outlive the folder.
    config = dataclasses.replace(
        config,
        loss=config.loss if loss == "elbo" else loss,
        threads=config.threads or torch.get_num_threads(),
        data=str(Path(config.data).resolve())
        if Path(config.data).exists() and config.data != "digits"
        else config.data,
        model=_absolute_model(config.model),
    )
    job = Job(
        config=config,
        device=device,
        data=data,
        model=model,
        objective=Objective(task, loss, data.outputs, tuple(data.statistics.get("target_std", ()))),
        stepper=Stepper(config, [p for p in model.parameters() if p.requires_grad]),
        batch_size=batch_size,
        per_epoch=per_epoch,
        steps=steps,
        eval_every=config.eval_every or max(per_epoch, -(-steps // 100)),
        team=ALONE,
        forward=model,
    )
    return job if config.from_certificate is None else at_certificate(job)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used ({reason}); leave it out for the processor") from error
    return device


def _absolute_model(model: str) -> str:
    path, colon, factory = model.rpartition(":")
    return f"{Path(path).resolve()}:{factory}" if colon else model


def fingerprint(data: Dataset) -> str:
    """Return a hash of every number of a data set, so that a resumed run can tell that it sees the same."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (data.train_x, data.train_y, data.test_x, data.test_y):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().reshape(-1).view(np.uint8).data if tensor.numel() else memoryview(b"")


def seed_everything(seed: int) -> None:
    """Fix torch's, NumPy's and Python's random numbers."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def repeatable(threads: int | None) -> Iterator[None]:
    """Make torch repeat itself bit for bit for as long as the context lasts, with this many threads."""
    deterministic: Any = torch.utils.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        deterministic.fill_uninitialized_memory = before[3]
