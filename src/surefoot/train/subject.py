"""What is measured: a model with its weights in eval mode, its loss, its training rows, and the run they come from."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.train.checkpoint import checkpoints
from surefoot.train.compare import is_comparison
from surefoot.train.config import TrainConfig, read_config
from surefoot.train.document import read_run
from surefoot.train.job import Job, prepare
from surefoot.train.record import STEP_COLUMNS, Table


@dataclass
class Subject:
    """A model and its data, ready to be measured.

    Args:
        job: configuration, data, loss; its model has the weights, in eval mode.
        folder: the run; None for a model as its factory made it.
        step: how many steps the weights have behind them.
        checkpoints: of the run, oldest first; the newest is what is measured.
        notes: what a reader has to know, sentences.
    """

    job: Job
    folder: Path | None
    step: int
    checkpoints: list[Path]
    notes: list[str]

    @property
    def rows(self) -> int:
        """The number of training rows."""
        return len(self.job.data.train_x)

    @property
    def weights(self) -> str:
        """Say which weights these are."""
        return f"the weights after step {self.step:,}" if self.folder is not None else "the initial weights"

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return self.job.parameters

    def pick(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return n training rows, what the loss compares with, and their numbers; the seed fixes which."""
        if n == self.rows:
            chosen = torch.arange(n)
        else:
            generator = torch.Generator().manual_seed(self.job.config.seed)
            chosen = torch.randperm(self.rows, generator=generator)[:n].sort().values
        device = self.job.device
        x = self.job.data.train_x[chosen].to(device)
        # A variational autoencoder is compared with its own input.
        y = x if self.reconstructs else self.job.data.train_y[chosen].to(device)
        return x, y, chosen

    @property
    def reconstructs(self) -> bool:
        """Whether the loss is a variational autoencoder's."""
        return self.job.objective.loss == "elbo"

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean loss over some rows, as trained: ()."""
        return self.job.objective.value(outputs, targets, targets)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of the loss in the outputs, in the unit of a residual: F - y, or softmax(F) - y."""
        z = outputs.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(z, targets), [z])
        # mse is the mean of all squares; cross-entropy the mean over rows, or over tokens.
        mse = self.job.objective.loss == "mse"
        return g * (z.numel() / 2 if mse else z.numel() / self.job.objective.outputs)

    def steps_taken(self) -> Table | None:
        """Return the rows of the run's steps; None where there are none."""
        path = None if self.folder is None else self.folder / "metrics.parquet"
        if path is None or not path.is_file():
            return None
        table = Table(STEP_COLUMNS)
        table.load(path, through=self.step)
        return table if len(table) else None


def from_run(folder: Path, *, device: str | None = None, threads: int | None = None) -> Subject:
    """Return a run at its newest checkpoint.

    Raises:
        InputError: no such run, no checkpoint in it, or the data are no longer what it was trained on.
    """
    if is_comparison(folder):
        runs = [p.parent for p in sorted(folder.glob("*/*/run.json"))]
        such = f", such as {runs[0]}" if runs else ""
        raise InputError(f"RUN {folder} is a comparison; give one of its runs{such}")
    document = read_run(folder)
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise InputError(
            f"RUN {folder} holds no checkpoint, hence no weights; go on with surefoot train --resume {folder}"
        )
    job = prepare(_here(read_config(folder / "config.json"), device, threads))
    if document["data"]["fingerprint"] != job.data_summary()["fingerprint"]:
        raise InputError(f"RUN {folder}: the data at {job.config.data} are not those it was trained on; put them back")
    step = load_weights(found[-1], job.model)
    subject = Subject(job, folder, step, found, [])
    if document["status"] != "finished":
        subject.notes.append(f"The run is not finished ({document['status']}): measured at its newest checkpoint.")
    return _ready(subject)


def from_config(config: TrainConfig) -> Subject:
    """Return a model as its factory made it, and the data it would be trained on."""
    return _ready(Subject(prepare(config), None, 0, [], []))


def load_weights(checkpoint: Path, model: nn.Module) -> int:
    """Give a model the weights of a checkpoint; return the step.

    Raises:
        InputError: it cannot be read, or is another model's.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        weights = load((checkpoint / "model.safetensors").read_bytes())
        for alias, name in state["aliases"].items():
            weights[alias] = weights[name]
        model.load_state_dict(weights)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    return state["step"]


def at_checkpoint(subject: Subject, checkpoint: Path) -> tuple[nn.Module, int]:
    """Return a copy of the model with the weights of another checkpoint, and the step of that."""
    model = copy.deepcopy(subject.job.model)
    return model, load_weights(checkpoint, model)


def _here(config: TrainConfig, device: str | None, threads: int | None) -> TrainConfig:
    changes: dict[str, Any] = {"parallel": "none"}
    changes |= {} if device is None else {"device": device}
    changes |= {} if threads is None else {"threads": threads}
    return TrainConfig(**{**vars(config), **changes})


def _ready(subject: Subject) -> Subject:
    """Put the model in eval mode and say what that switches off."""
    config, model = subject.job.config, subject.job.model
    random = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if random:
        subject.notes.append(f"Eval mode: dropout is off ({len(random)} modules), which it was not in training.")
    if norms:
        subject.notes.append(
            f"Eval mode: batch norm uses its running statistics ({len(norms)} modules), training used each batch's own."
        )
    if config.weight_decay:
        subject.notes.append("The loss measured has no weight decay in it, the steps of training had.")
    if config.autocast != "none":
        subject.notes.append(f"Measured in {config.dtype}; training worked out products in {config.autocast}.")
    model.eval()
    return subject
