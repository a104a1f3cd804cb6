"""Cheap refutations: what counting and comparing show at once, before anything is measured.

Each returns a Finding that says which hypothesis fails, or None where nothing speaks against it. Letters: N samples,
C outputs, n = N C residuals, P parameters, K = J J^T the tangent Gram (n x n), E = 1/2 ||F - y||^2.

surefoot, Prop. 29.
"""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure.duplicates import equal_rows
from surefoot.theorems.outward import below
from surefoot.theorems.verdict import Finding, Outcome

INTERPOLATES = "the least value of the loss is 0"


def fewer_parameters(parameters: int, residuals: int) -> Finding | None:
    """Refute lambda_min(K) > 0 where P < n: the rank of the n x n Gram is P at most.

    This ends every argument by way of lambda_min(K). It does not refute the PL* inequality itself, which can hold with
    a singular K for special targets (F(w) = (w, w), y = (1, 1)).

    Args:
        parameters: P, those that are trained.
        residuals: n = N C.

    Example:
        >>> fewer_parameters(10, 12).outcome
        <Outcome.REFUTED: 'refuted'>
        >>> fewer_parameters(12, 12) is None
        True
    """
    if parameters >= residuals:
        return None
    return Finding(
        "lambda_min(K) > 0",
        Outcome.REFUTED,
        f"{parameters:,} parameters for {residuals:,} residuals: the rank of K is {parameters:,} at most",
        "take a wider network, or fewer samples",
    )


def duplicate_inputs(inputs: Tensor) -> Finding | None:
    """Refute lambda_min(K) > 0 where two samples have equal inputs: their rows of J are equal.

    Holds where an output depends on its own sample alone: no dropout, no batch normalisation in train mode.

    Args:
        inputs: (N, ...), finite.

    Example:
        >>> duplicate_inputs(torch.tensor([[1.0, 2.0], [1.0, 2.0]])).reason
        'samples 0 and 1 have equal inputs, so K is singular'
    """
    groups = equal_rows(inputs.reshape(len(inputs), -1))
    if not groups:
        return None
    return Finding(
        "lambda_min(K) > 0",
        Outcome.REFUTED,
        f"samples {groups[0][0]} and {groups[0][1]} have equal inputs, so K is singular{_more(len(groups) - 1)}",
        "keep one of each",
    )


def squared_loss_floor(inputs: Tensor, targets: Tensor) -> float:
    """Return a lower bound of E = 1/2 ||F - y||^2 over all functions: what equal inputs with different targets leave.

    The best that a function can do on equal inputs is the mean of their targets. Divide as your loss does: by n/2 for
    torch's MSELoss.

    Args:
        inputs: (N, ...), finite.
        targets: (N, ...), finite.

    Returns:
        the bound, rounded down; 0 where no inputs are equal.

    Example:
        >>> squared_loss_floor(torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]]))
        0.25
    """
    _same_length(inputs, targets)
    y = targets.detach().reshape(len(targets), -1).double().tolist()
    total = Fraction(0)
    for group in equal_rows(inputs.reshape(len(inputs), -1)):
        for column in zip(*[y[i] for i in group]):
            if min(column) == max(column):
                continue
            exact = [Fraction(v) for v in column]
            mean = sum(exact, Fraction(0)) / len(exact)
            total += sum(((v - mean) ** 2 for v in exact), Fraction(0)) / 2
    return below(total)


def conflicting_targets(inputs: Tensor, targets: Tensor) -> Finding | None:
    """Refute that the squared loss can reach 0: equal inputs have different targets.

    Args:
        inputs: (N, ...), finite.
        targets: (N, ...), finite.
    """
    floor = squared_loss_floor(inputs, targets)
    if not floor > 0:
        return None
    return Finding(
        INTERPOLATES,
        Outcome.REFUTED,
        f"equal inputs have different targets: E = 1/2 ||F - y||^2 is at least {_short(floor)} whatever the weights",
        "remove the duplicates, or give them one target",
    )


def cross_entropy_floor(inputs: Tensor, labels: Tensor) -> float:
    """Return a lower bound of the summed cross-entropy over all functions, in nats; divide by N for the mean.

    On m equal inputs the best prediction is the frequency p of their labels, which leaves m times its entropy.

    Args:
        inputs: (N, ...), finite.
        labels: (N,) whole numbers.

    Example:
        >>> round(cross_entropy_floor(torch.zeros(2, 1), torch.tensor([0, 1])) / math.log(2), 6)
        2.0
    """
    _same_length(inputs, labels)
    if labels.dim() != 1 or torch.is_floating_point(labels):
        raise InputError(f"labels of shape {tuple(labels.shape)}, {labels.dtype}: give N whole numbers, one a sample")
    y = labels.tolist()
    total = 0.0
    for group in equal_rows(inputs.reshape(len(inputs), -1)):
        m = len(group)
        total += sum(k * math.log(m / k) for k in Counter(y[i] for i in group).values() if k < m)
    return total * (1 - 1e-9)  # far more than N roundings of a logarithm


def conflicting_labels(inputs: Tensor, labels: Tensor) -> Finding | None:
    """Refute that the cross-entropy can come near 0: equal inputs have different labels, so no weights separate them.

    Args:
        inputs: (N, ...), finite.
        labels: (N,) whole numbers.
    """
    floor = cross_entropy_floor(inputs, labels)
    if not floor > 0:
        return None
    return Finding(
        INTERPOLATES,
        Outcome.REFUTED,
        f"equal inputs have different labels: cross-entropy, summed, is at least {_short(floor)} whatever the weights",
        "remove the duplicates, or give them one label",
    )


def weight_decay(value: float) -> Finding | None:
    """Refute that the loss that is minimised can reach 0: with decay it is E + value/2 ||w||^2.

    That is 0 at w = 0 alone, and only if the network with all weights 0 fits the targets. Decoupled decay has no loss
    at all that its steps descend along.

    Args:
        value: the optimizer's weight_decay, >= 0.

    Example:
        >>> weight_decay(0.0) is None, weight_decay(1e-4).outcome.value
        (True, 'refuted')
    """
    if value == 0:
        return None
    return Finding(
        "no weight decay",
        Outcome.REFUTED,
        f"weight_decay = {value:g}: the minimum of E + {value:g}/2 ||w||^2 does not fit the targets, unless w = 0 does",
        "weight_decay=0",
    )


def first(*found: Finding | None) -> tuple[Finding, ...]:
    """Return the refutations among `found`, to give to a check: `check_delta_gclip(..., refutations=first(...))`."""
    return tuple(f for f in found if f is not None)


def _more(count: int) -> str:
    return f" ({count:,} more group{'s' * (count > 1)} of equal inputs)" if count else ""


def _short(x: float) -> str:
    """Four digits, rounded down."""
    unit = 10.0 ** (math.floor(math.log10(x)) - 3)
    return f"{max(math.floor(x / unit) - 1, 0) * unit:.4g}" if float(f"{x:.4g}") > x else f"{x:.4g}"


def _same_length(inputs: Tensor, targets: Tensor) -> None:
    if len(inputs) != len(targets):
        raise InputError(f"targets: {len(targets)} for {len(inputs)} inputs; give one a sample")
