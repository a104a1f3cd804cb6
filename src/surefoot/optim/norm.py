"""The one gradient norm: right to 1e-6 at any size and dtype, over every shard, without waiting for the device.

On the CPU torch's own float32 norms lose digits with size (1.5e-3 at 25 million elements), because one accumulator
takes them all. Here float32 gradients are squared and added in short rows, and the rows in float64, in the same time.
On other devices the accumulation is float64 throughout.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

SCOPES = ("global", "group", "tensor")
ROW = 1 << 10  # elements added up in float32: few enough for 4e-7 even if all are equal, 1e-9 if they vary
SMALL = 1 << 15  # tensors up to this size are gathered into one before they are squared,
GATHERED = 1 << 17  # this many elements at a time, so that the copy stays in the cache


def squares(grads: Sequence[Tensor]) -> float | Tensor:
    """Return the sum of squares over all of `grads`: a float if they are all on the CPU, else () float64.

    Args:
        grads: real tensors of any shape and floating dtype, local ones (no DTensor).
    """
    if all(g.device.type == "cpu" for g in grads) and not torch.compiler.is_compiling():
        return _squares_on_cpu(grads)
    norms = torch._foreach_norm(list(grads), 2, dtype=torch.float64) if grads else []
    return sum((n.to(norms[0].device).square() for n in norms[1:]), norms[0].square()) if norms else 0.0


def _squares_on_cpu(grads: Sequence[Tensor]) -> float:
    total = 0.0
    count = gathered = 0
    small: list[Tensor] = []
    for g in grads:
        n = g.numel()
        count += n
        if g.dtype is torch.float32 and n <= SMALL:
            small.append(g)
            gathered += n
            if gathered > GATHERED:
                total += _sum_of_squares(_flatten_dense_tensors(small))
                small, gathered = [], 0
        else:
            total += _sum_of_squares(g.view(-1) if g.is_contiguous() else _dense(g))
    if small:
        total += _sum_of_squares(_flatten_dense_tensors(small))
    # Squares of float32 vanish below 1e-38 and overflow above 1e38: then, and only then, count again in float64.
    if total < 1e-30 * count or total == math.inf:
        sizes = [float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in grads]
        total = sum([x * x for x in sizes])  # not x**2, which raises where it overflows
    return total


def _sum_of_squares(flat: Tensor) -> float:
    if flat.dtype is torch.float64:
        return torch.dot(flat, flat).item()
    whole = flat.numel() // ROW * ROW
    total = 0.0
    if whole:
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=torch.float32).double()
        total = torch.dot(rows, rows).item()
    if whole < flat.numel():
        rest = flat[whole:].float()
        total += torch.dot(rest, rest).item()
    return total


def is_dense(tensor: Tensor) -> bool:
    """Say whether the elements lie in memory without gaps or overlap, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _dense(g: Tensor) -> Tensor:
    """Return the elements of `g` as a vector in the order of memory, without a copy if they lie without gaps."""
    if is_dense(g):
        return g.as_strided((g.numel(),), (1,))
    return g.reshape(-1)


def root(total: float | Tensor) -> float | Tensor:
    """Return the square root of a sum of squares, a float or a tensor as it came."""
    return torch.sqrt(total) if isinstance(total, Tensor) else math.sqrt(total) if total >= 0 else math.nan


def real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with complex ones seen as their real and imaginary parts: ||a + ib||² = ||a||² + ||b||²."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def hypot(pieces: Sequence[Any]) -> Any:
    """Return sqrt(x1² + x2² + ...) of floats or of () tensors."""
    tensors = [x for x in pieces if isinstance(x, Tensor)]
    if tensors:  # a piece without a gradient is the number 0
        return torch.linalg.vector_norm(
            torch.stack([x if isinstance(x, Tensor) else torch.full_like(tensors[0], x) for x in pieces])
        )
    return math.hypot(*pieces)


def is_distributed(*tensors: Tensor) -> bool:
    """Say whether any of the tensors is a DTensor (without importing torch.distributed where nobody has)."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    kind = module.DTensor
    return any([isinstance(t, kind) for t in tensors])


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, any other tensor as it is."""
    return tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def shard_group(param: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """Return over which dimensions of which mesh a parameter is cut up, or None if every rank has all of it."""
    if not is_distributed(param):
        return None
    # whatever is not a copy is a part: FSDP on top of tensor parallelism has a placement that is no Shard by name
    dims = tuple(i for i, placement in enumerate(param.placements) if not placement.is_replicate())  # type: ignore[attr-defined]
    return (param.device_mesh, dims) if dims else None  # type: ignore[attr-defined]


def local_gradient(param: Tensor) -> Tensor | None:
    """Return this rank's part of a parameter's gradient, cut up the way the parameter is."""
    grad = param.grad
    if grad is None or not is_distributed(grad):
        return grad
    if grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(grad)


def reduce_squares(sums: Sequence[float | Tensor], where: tuple[Any, tuple[int, ...]]) -> list[float | Tensor]:
    """Add up sums of squares over the ranks that hold the other parts: one collective a mesh dimension.

    Args:
        sums: K sums of squares of this rank's parts; every rank must come with as many.
        where: mesh and dimensions, from `shard_group`.
    """
    import torch.distributed as dist

    mesh, dims = where
    device = next((s.device for s in sums if isinstance(s, Tensor)), torch.device(mesh.device_type))
    values = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=device) for s in sums])
    for dim in dims:
        dist.all_reduce(values, group=mesh.get_group(dim))
    return list(values.unbind()) if device.type != "cpu" else list(values.tolist())


def sums_of_squares(
    units: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor | None]]
) -> list[float | Tensor]:
    """Return the sum of squares of each unit, over all its shards.

    Args:
        units: K lists of parameters. They decide which collectives are run, so that ranks on which a gradient is
            missing take part all the same.
        grads: for each unit, this rank's part of the gradients, or None where there is none.

    Returns:
        K floats if everything is on the CPU, else () float64 tensors.
    """
    totals: list[float | Tensor] = [0.0] * len(units)
    cut: dict[Any, dict[int, list[Tensor]]] = {}
    for k, (params, unit_grads) in enumerate(zip(units, grads)):
        if not is_distributed(*params):
            totals[k] = squares(real([g for g in unit_grads if g is not None]))
            continue
        whole: list[Tensor] = []
        for p, g in zip(params, unit_grads):
            where = shard_group(p)
            mine = whole if where is None else cut.setdefault(where, {}).setdefault(k, [])
            if g is not None:
                mine.extend(real([g]))
        totals[k] = squares(whole)
    for where, pieces in cut.items():
        reduced = reduce_squares([squares(found) for found in pieces.values()], where)
        for k, value in zip(pieces, reduced):
            totals[k] = totals[k] + value
    return totals


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return ||g|| = sqrt(sum of squares over all tensors), () float64.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item()
        5.0
    """
    return torch.as_tensor(root(squares(real(tensors))), dtype=torch.float64)
