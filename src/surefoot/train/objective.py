"""What is minimised and what is reported: losses and metrics for each task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.models.vae import elbo_loss
from surefoot.train.distributed import ALONE, Team, shares


@dataclass(frozen=True)
class Metric:
    """A number by which runs are compared."""

    column: str
    name: str
    higher_is_better: bool
    percent: bool = False


METRICS = {
    "classification": Metric("test_accuracy", "test accuracy", higher_is_better=True, percent=True),
    "regression": Metric("test_rmse", "test RMSE", higher_is_better=False),
    "language": Metric("test_perplexity", "test perplexity", higher_is_better=False),
    "autoencoding": Metric("test_loss", "test loss", higher_is_better=False),
}


@dataclass(frozen=True)
class Objective:
    """The loss of a task, averaged over rows so that batches of any size have the same units.

    Args:
        task: classification, regression, language or autoencoding.
        loss: "mse" (torch's mean over rows and outputs, one-hot targets for classes), "cross-entropy" or "elbo".
        outputs: number of classes, targets or tokens.
        target_std: (targets,) what regression targets were divided by: errors are told in the user's units.
    """

    task: str
    loss: str
    outputs: int
    target_std: tuple[float, ...] = ()

    @property
    def metric(self) -> Metric:
        """The number by which runs of this task are compared."""
        return METRICS[self.task]

    def value(self, out: Any, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch: ()."""
        if self.loss == "elbo":
            return elbo_loss(out, x)
        if self.loss == "mse":
            return F.mse_loss(out, self.wanted(y, out.dtype))
        return F.cross_entropy(out.reshape(-1, self.outputs), y.reshape(-1))

    def wanted(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what mse compares the outputs with, one-hot rows of `dtype` for classes: (n, outputs)."""
        return y if self.task == "regression" else F.one_hot(y, self.outputs).to(dtype)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, x: Tensor, y: Tensor, *, rows: int, device: torch.device, team: Team = ALONE
    ) -> dict[str, float]:
        """Return test_loss and the task's metric, in eval mode and leaving mode and random numbers as they were.

        Each rank goes through its share, `rows` rows at a time, and is told the result over all of them.
        """
        modes = {module: module.training for module in model.modules()}
        rng = torch.get_rng_state()
        model.eval()
        loss = right = squared = 0.0
        for xs, ys in zip(x.split(rows * team.size), y.split(rows * team.size)):
            [(start, end)] = shares(len(xs), team, None)
            picked = slice(start, end) if end > start else slice(0, 1)
            xs, ys = xs[picked].to(device), ys[picked].to(device)
            out = model(xs)  # also where the share is empty: fsdp needs every rank
            if start == end:
                continue
            loss += float(self.value(out, xs, ys)) * len(xs)
            if self.task == "classification":
                right += float((out.argmax(1) == ys).sum())
            elif self.task == "regression":
                error = (out - ys).double() * torch.tensor(self.target_std, dtype=torch.float64, device=device)
                squared += float(error.square().mean(1).sum())
        for module, mode in modes.items():
            module.training = mode
        torch.set_rng_state(rng)
        loss, right, squared = team.sum([loss, right, squared])
        result = {"test_loss": loss / len(x)}
        if self.task == "classification":
            result["test_accuracy"] = right / len(x)
        elif self.task == "regression":
            result["test_rmse"] = math.sqrt(squared / len(x))
        elif self.task == "language" and self.loss == "cross-entropy":
            result["test_perplexity"] = math.exp(min(result["test_loss"], 700.0))
        return result


def choose_loss(loss: str, task: str, model: str) -> str:
    """Return the loss that is meant by `--loss`, or raise InputError where it does not fit the task."""
    if model == "vae":
        if loss != "auto":
            raise InputError(f"--loss {loss} does not fit --model vae, which has its own; leave --loss out")
        return "elbo"
    if task == "regression":
        if loss == "cross-entropy":
            raise InputError(
                "--loss cross-entropy needs classes, and these targets are real numbers; use --loss mse, or "
                "--task classification if the target column holds classes"
            )
        return "mse"
    if task == "language" and loss == "mse":
        raise InputError("--loss mse does not fit next-character prediction; use --loss cross-entropy")
    return "cross-entropy" if loss == "auto" else loss
