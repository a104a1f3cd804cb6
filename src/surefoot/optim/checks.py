"""Checks of options, and what to say when a norm is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, inf: bool = False, fix: str = ""
) -> None:
    """Raise TypeError or ValueError unless `value` is a number in [low, high] (or (low, high] with `open_low`).

    An infinite bound is not itself in the range, unless `inf` lets infinity in.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
    within = (low < value if open_low else low <= value) and value <= high
    if not within or (abs(value) == math.inf and not inf):
        left = f"({low:g}" if open_low or low == -math.inf else f"[{low:g}"
        right = "inf)" if high == math.inf and not inf else f"{high:g}]"
        raise ValueError(f"{name}={value!r} is outside {left}, {right}{'; ' + fix if fix else ''}")


def floor_threshold(gamma: float, delta: float) -> float:
    """Return γ/δ, the norm from which the floor acts: infinite for δ = 0."""
    return gamma / delta if delta > 0 else math.inf


def nonfinite_message(grads: Sequence[Tensor], norm: float) -> str:
    """Say which of the gradients are not finite."""
    bad = [i for i, g in enumerate(grads) if not torch.isfinite(g).all()]
    where = (
        f"{len(bad)} of {len(grads)} gradients hold NaN or infinity (the first: number {bad[0]}, shape "
        f"{tuple(grads[bad[0]].shape)})"
        if bad
        else "the gradients are finite but their norm overflows"
    )
    return f"gradient norm is {norm}: {where}; lower lr, or use nonfinite='skip' to leave out such steps"


def refuse_sparse(grad: Tensor) -> NoReturn:
    """Raise the TypeError for a sparse gradient."""
    raise TypeError(
        f"a sparse gradient of shape {tuple(grad.shape)}: build the embedding with sparse=False, "
        "or give these parameters an optimizer of their own"
    )
