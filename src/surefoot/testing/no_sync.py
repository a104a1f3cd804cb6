"""Forbids asking a tensor for its value: on a GPU each such question waits until everything before it is done."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# .tolist() and .numpy() read the memory of a CPU tensor without an operation of torch
METHODS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu)
OPERATIONS = (
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class NoSync:
    """A context in which whatever makes a GPU wait raises AssertionError, on the CPU too, so that it can be tested.

    Such are `.item()`, `float(x)`, `bool(x)` and with it `if x > 0`, `.tolist()`, `.cpu()`, `x[mask]`, `torch.equal`.

    Example:
        >>> with NoSync():
        ...     total = torch.ones(3).sum()    # nobody has asked yet
        >>> total.item()
        3.0
    """

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(_Methods())
            stack.enter_context(_Operations())
            self._modes = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._modes.__exit__(*error)


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            _refuse(func)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func in INDEXING and any(i is not None and i.dtype is torch.bool for i in args[1])
        if masked or func in OPERATIONS:
            _refuse(func)
        return func(*args, **(kwargs or {}))


def _refuse(func: Any) -> None:
    raise AssertionError(f"{func} asks a tensor for its value: on a GPU everything would wait for it")
