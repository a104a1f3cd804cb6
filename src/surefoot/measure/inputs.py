"""Inputs of any shape: a tensor, a tuple or list of tensors, or a dictionary of them, the samples in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.duplicates import equal_rows


def first(inputs: Any) -> Tensor:
    """Return the tensor that says how many samples there are."""
    tensors = (
        list(inputs.values()) if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    )
    for x in tensors:
        if isinstance(x, Tensor) and x.dim():
            return x
    raise InputError(
        f"inputs of type {type(inputs).__name__} hold no tensor; give a tensor, or a tuple or dictionary of them"
    )


def count(inputs: Any) -> int:
    """Return the number of samples."""
    return len(first(inputs))


def take(inputs: Any, rows: Any) -> Any:
    """Return some of the samples; what is no tensor goes along as it is."""
    n = count(inputs)

    def some(x: Any) -> Any:
        return x[rows] if isinstance(x, Tensor) and x.dim() and len(x) == n else x

    if isinstance(inputs, dict):
        return {name: some(x) for name, x in inputs.items()}
    return type(inputs)(some(x) for x in inputs) if isinstance(inputs, (tuple, list)) else some(inputs)


def to_float64(inputs: Any) -> Any:
    """Return the inputs with every floating tensor in float64, checked.

    Raises:
        InputError: no samples, or numbers that are NaN or infinite.
    """
    if count(inputs) == 0:
        raise InputError(f"inputs of shape {tuple(first(inputs).shape)} hold no sample; give at least one")

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        bad = ~torch.isfinite(x).flatten(1).all(1) if x.dim() > 1 else ~torch.isfinite(x)
        if bad.any():
            rows = bad.nonzero().flatten().tolist() if x.dim() else []
            raise InputError(
                f"inputs hold NaN or infinite numbers in {len(rows)} samples, the first {rows[:5]}; leave them out"
            )
        return x.detach().double()

    if isinstance(inputs, dict):
        return {name: one(x) for name, x in inputs.items()}
    return type(inputs)(one(x) for x in inputs) if isinstance(inputs, (tuple, list)) else one(inputs)


def describe(inputs: Any) -> str:
    """Return the dtypes and shapes of inputs."""
    if isinstance(inputs, dict):
        return "{" + ", ".join(f"{name}: {describe(x)}" for name, x in inputs.items()) + "}"
    if isinstance(inputs, (tuple, list)):
        return "(" + ", ".join(describe(x) for x in inputs) + ")"
    if isinstance(inputs, Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} of shape {tuple(inputs.shape)}"
    return type(inputs).__name__


def duplicates(inputs: Any) -> list[list[int]]:
    """Return the groups of samples that are the same number for number, each in order: K is singular with any.

    Args:
        inputs: a tensor, or a tuple, list or dictionary of them, the samples in front.

    Returns:
        Lists of two indices or more, the first sample that has a copy in front; none where all differ.

    Example:
        >>> duplicates(torch.tensor([[1.0], [2.0], [1.0]]))
        [[0, 2]]
    """
    n = count(inputs)
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    parts = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    tensors = [x.detach() for x in parts if isinstance(x, Tensor) and x.dim() and len(x) == n]
    labels = torch.arange(n, dtype=torch.float64).repeat(len(tensors), 1).T.clone()  # (n, tensors)
    for k, x in enumerate(tensors):
        for group in equal_rows((x if x.is_floating_point() else x.double()).reshape(n, -1)):
            labels[group, k] = group[0]
    return equal_rows(labels)


def deterministic(model: nn.Module, inputs: Any, output: Callable[[Any], Tensor]) -> None:
    """Evaluate twice and compare.

    Raises:
        InputError: the outputs differ or are not finite, or batch norm is in train mode; the modules to blame are
            named.
    """
    training = [
        f"{name or 'model'} ({type(m).__name__})"
        for name, m in model.named_modules()
        if m.training and isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    if training:
        raise InputError(
            f"model has batch norm in train mode: {', '.join(training[:5])}; there a sample's output depends on the "
            "others and has no Jacobian of its own: call model.eval()"
        )
    few = take(inputs, slice(0, 3))

    def evaluate() -> Tensor:
        with torch.no_grad():
            found = (
                model(**few) if isinstance(few, dict) else model(*few) if isinstance(few, (tuple, list)) else model(few)
            )
            return output(found)

    found = evaluate()
    if not torch.isfinite(found).all():
        raise InputError(
            "model's outputs are NaN or infinite for finite inputs; look for the weight or layer that makes them"
        )
    if not torch.equal(found, evaluate()):
        random = [
            f"{name} ({type(m).__name__})"
            for name, m in model.named_modules()
            if m.training and ("Dropout" in type(m).__name__ or getattr(m, "dropout", 0))
        ]
        raise InputError(
            "model is not deterministic: two evaluations of the same samples differ"
            + (f"; in train mode: {', '.join(random[:5])}" if random else "")
            + "; call model.eval(), or fix its random numbers"
        )
