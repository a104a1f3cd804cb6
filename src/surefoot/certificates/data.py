"""Samples and targets of a certificate: what makes no sense is refused, what cannot be interpolated is named."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure.duplicates import equal_rows
from surefoot.theorems.verdict import Finding, Outcome


def check_options(loss: str, epsilon: float | None, layers: str) -> None:
    """Refuse options that make no sense.

    Raises:
        InputError: which, and what there is instead.
    """
    if layers not in ("all", "last"):
        raise InputError(f"layers={layers!r} must be 'all' or 'last'")
    if loss not in ("mse", "cross-entropy"):
        raise InputError(f"loss={loss!r} has no certificate; there are 'mse' and, with layers='last', 'cross-entropy'")
    if loss != "mse" and layers == "all":
        raise InputError(f"loss={loss!r} has a certificate for the last layer only; pass layers='last', or loss='mse'")
    if epsilon is not None and not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r} must lie between 0 and 1; leave it out for the best one")


def check_inputs(inputs: Any) -> Tensor:
    """Return inputs (N, ...) in float64.

    Raises:
        InputError: they are no tensor of samples, or hold NaN or infinities.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or len(inputs) == 0:
        what = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"inputs must be a tensor (N, ...) with at least one sample, not {what}")
    X = inputs.detach().double().contiguous()
    _finite("inputs", X)
    return X


def check_targets(targets: Tensor, samples: int, outputs: int, loss: str) -> Tensor:
    """Return targets (N, C) in float64; class numbers become one-hot.

    Raises:
        InputError: they fit neither the samples nor the outputs, or are none that the loss takes.
    """
    if not isinstance(targets, Tensor) or targets.dim() == 0 or len(targets) != samples:
        what = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"targets of {what} do not fit {samples} samples; give one row a sample")
    if not targets.is_floating_point():
        if targets.dim() != 1:
            raise InputError(f"targets of dtype {targets.dtype} must be class numbers (N,), not {tuple(targets.shape)}")
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs:
            raise InputError(
                f"targets hold classes {low} to {high} and the model has {outputs} outputs; number them from 0, "
                "or give floating-point targets for a regression"
            )
        return torch.nn.functional.one_hot(targets.long(), outputs).double()
    Y = targets.detach().double()
    Y = (Y[:, None] if Y.dim() == 1 else Y.flatten(1)).contiguous()
    if Y.shape[1] != outputs:
        raise InputError(f"targets have {Y.shape[1]} columns and the model {outputs} outputs; give as many")
    _finite("targets", Y)
    if loss == "cross-entropy" and not (((Y == 0) | (Y == 1)).all() and (Y.sum(1) == 1).all()):
        raise InputError("targets of a cross-entropy certificate must be class numbers (N,) or one-hot rows")
    return Y


def refute(X: Tensor, Y: Tensor, parameters: int) -> Finding | None:
    """Return why there can be no certificate whatever the weights: equal samples, or too few parameters."""
    groups = equal_rows(X.flatten(1))
    conflicts = [g for g in groups if not torch.equal(Y[g], Y[g[:1]].expand(len(g), -1))]
    if conflicts:
        least = sum(float((Y[g] - Y[g].mean(0)).square().sum()) / 2 for g in conflicts)
        return Finding(
            "some weights interpolate the data",
            Outcome.REFUTED,
            f"samples {conflicts[0]} are equal and their targets differ ({_groups(conflicts)}), so E >= {least:.4g} "
            "whatever the weights",
            "remove or merge these samples",
        )
    if groups:
        return Finding(
            "s_min(J) > 0",
            Outcome.REFUTED,
            f"samples {groups[0]} are equal ({_groups(groups)}), so J has equal rows",
            "keep one sample of each group",
        )
    if Y.numel() > parameters:
        return Finding(
            "s_min(J) > 0",
            Outcome.REFUTED,
            f"{parameters:,} trainable parameters are fewer than the {Y.numel():,} residuals: J has no full row rank",
            "take a wider network or fewer samples",
        )
    return None


def _groups(groups: list[list[int]]) -> str:
    return "the only such group" if len(groups) == 1 else f"{len(groups)} such groups"


def _finite(name: str, x: Tensor) -> None:
    bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"{name} hold NaN or infinite numbers in {len(bad)} samples, the first {bad[:5]}; leave them out"
        )
