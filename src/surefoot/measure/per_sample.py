"""Jacobian rows by automatic differentiation of one sample at a time: exact for any code, and slower than any rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from surefoot.measure.inputs import count, take

CHUNK = 32  # how many samples torch.func takes together


def rows_one_by_one(evaluate: Callable[[Any], Tensor], params: Mapping[str, Tensor], inputs: Any) -> dict[str, Tensor]:
    """Return each parameter's rows, (n, C, p), with a forward pass a sample and a backward pass an output.

    Args:
        evaluate: F of some samples, (n, C).
        params: by name; all require a gradient.
        inputs: the samples.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for i in range(count(inputs)):
        F = evaluate(take(inputs, slice(i, i + 1))).flatten()
        seeds = torch.eye(len(F), dtype=F.dtype, device=F.device)
        grads = [
            torch.autograd.grad(F, list(params.values()), seed, retain_graph=True, allow_unused=True) for seed in seeds
        ]
        for k, (name, p) in enumerate(params.items()):
            rows = [torch.zeros_like(p) if (g := each[k]) is None else dense(g) for each in grads]
            found[name].append(torch.stack(rows).flatten(1))
    return {name: torch.stack(rows) for name, rows in found.items()}


def rows_together(
    model: nn.Module, output: Callable[[Any], Tensor], params: Mapping[str, Tensor], inputs: Any
) -> dict[str, Tensor]:
    """Return the same by torch.func, some samples at a time.

    Raises:
        RuntimeError, UserWarning: the model does something that torch.func cannot do to several samples at once.
    """
    n = count(inputs)
    leaves, tree = tree_flatten(inputs)
    mapped = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == n for x in leaves]

    def one(params: dict[str, Tensor], *sample: Any) -> Tensor:
        alone = tree_unflatten([x[None] if m else x for x, m in zip(sample, mapped)], tree)
        if isinstance(alone, dict):
            return output(functional_call(model, params, (), alone)).flatten()
        args = tuple(alone) if isinstance(alone, (tuple, list)) else (alone,)
        return output(functional_call(model, params, args)).flatten()

    rows = vmap(jacrev(one), in_dims=(None, *(0 if m else None for m in mapped)), chunk_size=CHUNK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operation without a batching rule is quicker sample by sample
        found = rows({name: p.detach() for name, p in params.items()}, *leaves)
    return {name: J.flatten(2) for name, J in found.items()}


def dense(grad: Tensor) -> Tensor:
    """Return a gradient that may be sparse, as those of embeddings can be, in full."""
    return grad.to_dense() if grad.is_sparse else grad
