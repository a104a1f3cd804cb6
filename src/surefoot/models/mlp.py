"""Multilayer perceptrons."""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise

from torch import nn

from surefoot.errors import InputError
from surefoot.models.widths import layer_widths

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
}


def activation_class(name: str) -> type[nn.Module]:
    """The module class of an activation.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in ACTIVATIONS:
        close = get_close_matches(name.lower().replace("_", "-"), ACTIVATIONS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"activation={name!r} is not known: {hint}There are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def dense(sizes: Sequence[int], activation: type[nn.Module]) -> list[nn.Module]:
    """The layers Linear, activation, ..., Linear through `sizes`, with no activation after the last one."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return layers[:-1]


def mlp(
    input_shape: tuple[int, ...],
    outputs: int,
    *,
    width: tuple[int, ...] | None = None,
    depth: int | None = None,
    activation: str = "relu",
) -> nn.Sequential:
    """Fully connected layers on the flattened row: `Flatten, Linear, activation, ..., Linear`.

    A plain `nn.Sequential`, so that tools which go through a network layer by layer can read it. PyTorch's default
    initialisation.

    Args:
        input_shape: The shape of one row, without the batch.
        outputs: The number of outputs.
        width: Hidden widths; default (256, 256).
        depth: The number of hidden layers, when one width stands for all of them.
        activation: One of `ACTIVATIONS`.

    Returns:
        A module (N, *input_shape) -> (N, outputs).

    Raises:
        InputError: If the activation is not known or `depth` contradicts `width`.

    Example:
        >>> mlp((4,), 2, width=(8,), activation="tanh")
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=4, out_features=8, bias=True)
          (2): Tanh()
          (3): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    hidden = layer_widths(width, depth, default=(256, 256))
    sizes = (math.prod(input_shape), *hidden, outputs)
    return nn.Sequential(nn.Flatten(), *dense(sizes, activation_class(activation)))
