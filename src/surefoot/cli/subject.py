"""The options of `surefoot train` that name a model and its data, for commands that do not train."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surefoot.errors import InputError
from surefoot.train.config import TrainConfig, flag


@dataclass(frozen=True)
class SubjectArgs:
    """A model and data."""

    data: str | None = None
    """As for surefoot train, like all options from here on."""
    target: str | None = None
    """The column of a CSV (or numeric parquet) to predict; several separated by commas."""
    task: Literal["auto", "classification", "regression"] | None = None
    """What a table's target is, where its values leave that open."""
    image_size: int | None = None
    """Resize images to this many pixels a side."""
    context: int | None = None
    """Characters in a window of text, and the most words of a sentence."""
    test_fraction: float | None = None
    """The part held out where the data has no test split."""
    limit: int | None = None
    """Take this many training rows only."""
    model: str | None = None
    """mlp, resnet20, ... or path/to/file.py:factory."""
    width: tuple[int, ...] | None = None
    """Units in each hidden layer."""
    depth: int | None = None
    """Number of hidden layers."""
    activation: str | None = None
    """relu, tanh, sigmoid, softplus, gelu, silu, elu, leaky-relu or identity."""
    loss: Literal["auto", "mse", "cross-entropy"] | None = None
    """mse is torch's mean over rows and outputs."""
    seed: int | None = None
    """Fixes the initial weights and the choice of samples."""
    dtype: Literal["float32", "float64"] | None = None
    """Precision of the model; the Gram and all bounds are in float64."""


def subject_config(args: SubjectArgs, run: Path | None, *more: str, verb: str, **machine: Any) -> TrainConfig | None:
    """Return the configuration that the options name; None where a run does.

    Args:
        args: parsed.
        run: the run's folder, if one is given.
        more: further attributes of `args` that belong to the configuration.
        verb: what the command does to it: "measure".
        machine: options of the configuration that go with a run too; None: not given.

    Raises:
        InputError: both a run and a model or data, or neither.
    """
    names = [f.name for f in dataclasses.fields(SubjectArgs)] + list(more)
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if run is not None:
        if given:
            raise InputError(f"RUN {run} says what to {verb}: leave out {', '.join(map(flag, given))}")
        return None
    if "model" not in given and "data" not in given:
        raise InputError(f"nothing to {verb}: give the folder of a run, or --model and --data")
    return TrainConfig(**given, **{name: value for name, value in machine.items() if value is not None})
