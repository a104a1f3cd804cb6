"""The trainings that the tuner is held against: small, real, about a second each on one thread.

WORKLOADS["digits-mse"].make(seed=0) has a model, `loss_fn(model, batch)`, a loader (every loop over it is one pass over
the training rows, in another order) and `evaluate()`: the loss on training rows and the metric on test rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surefoot.data import Dataset, load
from surefoot.models import build
from surefoot.train.batches import batch_rows, steps_per_epoch
from surefoot.train.objective import Objective

DATA = Path(os.environ.get("SUREFOOT_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
Batch = tuple[Tensor, Tensor]


class Metric(NamedTuple):
    """What is measured on the test rows."""

    name: str
    higher_is_better: bool


ACCURACY = Metric("accuracy", True)
R2 = Metric("R^2", True)
BITS = Metric("bits per character", False)
ELBO = Metric("negative ELBO", False)


class Loader:
    """Batches of tensors in an order that follows from the seed; each pass has another one, as with a DataLoader."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int) -> None:
        self.x, self.y, self.batch_size, self.seed = x, y, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return steps_per_epoch(len(self.x), self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for step in range(epoch * len(self), (epoch + 1) * len(self)):
            rows = batch_rows(step, len(self.x), self.batch_size, self.seed)
            yield (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])


@dataclass
class Task:
    """A training that is ready to start."""

    model: nn.Module
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    loader: Loader
    evaluate: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Workload:
    """A model, its data and how long it is trained.

    Attributes:
        name: what results call it.
        data: options of `surefoot.data.load`.
        model: a name for `surefoot.models.build`, or a function of the data set.
        loss: "mse", "cross-entropy" or "elbo".
        batch_size: rows a step, or "full".
        steps: gradient steps in a run.
        metric: what is measured on the test rows.
        lr, adam_lr, gamma: the centres of the grids, see grid.py.
        options: width, depth ... of the model.
        train_rows, test_rows: how many rows the evaluation looks at, the first ones.
        held_out: kept from whoever designs the rule.
    """

    name: str
    data: dict[str, Any]
    model: str | Callable[[Dataset], nn.Module]
    loss: str
    batch_size: int | str
    steps: int
    metric: Metric
    lr: float = 0.1
    adam_lr: float = 3e-3
    gamma: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 2000
    test_rows: int = 2000
    held_out: bool = False

    def make(self, seed: int) -> Task:
        """Return model, loss, batches and evaluation; the seed fixes initial weights, order and the draws of a VAE."""
        data = self.dataset()
        torch.manual_seed(seed)
        model = self.model(data) if callable(self.model) else self._build(self.model, data)
        task = "autoencoding" if self.loss == "elbo" else data.task
        std = tuple(data.statistics["target_std"]) if data.task == "regression" else ()
        objective = Objective(task, self.loss, data.outputs, std)
        batch_size = len(data.train_x) if self.batch_size == "full" else int(self.batch_size)
        device = torch.device("cpu")

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return objective.value(model(batch[0]), *batch)

        def evaluate() -> dict[str, float]:
            seen = data.train_x[: self.train_rows], data.train_y[: self.train_rows]
            new = data.test_x[: self.test_rows], data.test_y[: self.test_rows]
            train = objective.evaluate(model, *seen, rows=250, device=device)
            test = objective.evaluate(model, *new, rows=250, device=device)
            return {"train_loss": train["test_loss"], "metric": self._metric(test, new[1])}

        return Task(model, loss_fn, Loader(data.train_x, data.train_y, batch_size, seed), evaluate)

    def naive(self) -> float:
        """Return the metric of a constant prediction: what a run that learned nothing has."""
        data = self.dataset()
        if self.metric is ACCURACY:
            return 1 / data.outputs
        if self.metric is BITS:
            return math.log2(data.outputs)
        return 0.0 if self.metric is R2 else math.prod(data.input_shape) / 2  # pixels have variance 1

    def dataset(self) -> Dataset:
        """Return the data, which stay in memory."""
        options = {k: v for k, v in self.data.items() if k != "source"}
        return _read(self.data["source"], tuple(options.items()))

    def _build(self, name: str, data: Dataset) -> nn.Module:
        facts = {"kind": data.kind, "task": data.task, "input_shape": data.input_shape, "outputs": data.outputs}
        words = len(data.vocabulary) if data.vocabulary else None
        return build(name, **facts, vocabulary_size=words, **self.options)

    def _metric(self, found: dict[str, float], y: Tensor) -> float:
        if self.metric is ACCURACY:
            return found["test_accuracy"]
        if self.metric is R2:
            return 1 - found["test_loss"] / float(y.double().var(0, correction=0).mean())
        return found["test_loss"] / math.log(2) if self.metric is BITS else found["test_loss"]


@cache
def _read(source: str, options: tuple[tuple[str, Any], ...]) -> Dataset:
    return load(source if source == "digits" else str(DATA / source), **dict(options))


# ------------------------------------------------------------------------------------------- models surefoot has not


def cnn(data: Dataset) -> nn.Module:
    """Two strided convolutions and a head."""
    channels, height, width = data.input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * math.ceil(height / 4) * math.ceil(width / 4), data.outputs),
    )  # fmt: skip


class Sentences(nn.Module):
    """DistilBERT of `transformers`, small and untrained, and a head on the mean token: (N, T) -> (N, classes)."""

    def __init__(self, data: Dataset, *, hidden: int, layers: int) -> None:
        super().__init__()
        from transformers import DistilBertConfig, DistilBertModel

        assert data.vocabulary is not None
        settings: dict[str, Any] = {
            "vocab_size": len(data.vocabulary), "max_position_embeddings": data.input_shape[0], "dim": hidden,
            "hidden_dim": 4 * hidden, "n_layers": layers, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0,
            "attn_implementation": "eager",
        }  # fmt: skip
        self.bert = DistilBertModel(DistilBertConfig(**settings))
        self.head = nn.Linear(hidden, data.outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (N, T), 0 is padding -> logits (N, classes)."""
        real = tokens != 0
        states = self.bert(input_ids=tokens, attention_mask=real.long()).last_hidden_state  # (N, T, hidden)
        weight = real.unsqueeze(-1) / real.sum(1)[:, None, None]
        return self.head((states * weight).sum(1))


def transformer(data: Dataset) -> nn.Module:
    """Two blocks of 32 features."""
    return Sentences(data, hidden=32, layers=2)


# -------------------------------------------------------------------------------------------------------- workloads

DIGITS = {"source": "digits", "test_fraction": 0.5}
FASHION = {"source": "fashion_mnist", "limit": 4000}
CIFAR = {"source": "cifar10_10k2k", "image_size": 16}
SHAKESPEARE = {"source": "text/tinyshakespeare.txt", "context": 32}

_ALL = [
    Workload("digits-full", DIGITS, "mlp", "mse", "full", 300, ACCURACY, lr=1.0, adam_lr=0.01, gamma=0.02,
             options={"width": (64,), "depth": 2, "activation": "tanh"}),
    Workload("digits-mse", DIGITS, "mlp", "mse", 32, 700, ACCURACY, lr=3.0, adam_lr=3e-3, gamma=0.01,
             options={"width": (64,), "depth": 2}),
    Workload("fashion-mlp", FASHION, "mlp", "cross-entropy", 64, 400, ACCURACY, lr=0.1, adam_lr=3e-3, gamma=0.3,
             options={"width": (64,), "depth": 3}),
    Workload("fashion-vae", FASHION, "vae", "elbo", 100, 350, ELBO, lr=3e-3, adam_lr=5e-3, gamma=20.0,
             options={"width": (50, 50), "latent": 10}),
    Workload("cifar-resnet20", CIFAR, "resnet20", "cross-entropy", 64, 120, ACCURACY, lr=0.3, adam_lr=3e-3, gamma=0.4,
             options={"width": (4,)}, train_rows=500),
    Workload("cifar-vit", CIFAR, "vit-tiny", "cross-entropy", 32, 250, ACCURACY, lr=0.1, adam_lr=1e-3, gamma=0.25,
             options={"width": (32,), "depth": 2}, train_rows=500, test_rows=1000),
    Workload("shakespeare-lstm", SHAKESPEARE, "lstm", "cross-entropy", 32, 180, BITS, lr=5.0, adam_lr=0.02, gamma=0.05,
             options={"width": (64,), "depth": 1}, train_rows=500, test_rows=500),
    Workload("shakespeare-gpt", SHAKESPEARE, "gpt", "cross-entropy", 16, 220, BITS, lr=0.3, adam_lr=3e-3, gamma=0.15,
             options={"width": (32,), "depth": 2}, train_rows=500, test_rows=500),
    Workload("sst2-transformer", {"source": "sst2", "context": 24, "limit": 5000}, transformer, "cross-entropy", 32,
             200, ACCURACY, lr=0.1, adam_lr=3e-3, gamma=0.2, train_rows=1000),
    Workload("concrete", {"source": "uci/concrete.csv", "target": "y", "task": "regression"}, "mlp", "mse", 32, 800,
             R2, lr=0.1, adam_lr=3e-3, gamma=0.2, options={"width": (64,), "depth": 2}),
    Workload("energy", {"source": "uci/energy.csv", "target": "y", "task": "regression"}, "mlp", "mse", 32, 800, R2,
             lr=0.3, adam_lr=5e-3, gamma=0.1, options={"width": (64,), "depth": 2}, held_out=True),
    Workload("fashion-cnn", FASHION, cnn, "cross-entropy", 64, 250, ACCURACY, lr=0.1, adam_lr=5e-3, gamma=0.3,
             train_rows=1000, held_out=True),
]  # fmt: skip
WORKLOADS = {w.name: w for w in _ALL}
