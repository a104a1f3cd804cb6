"""Whether a model computes in float64 all the way: a conversion to float32 inside it would go unnoticed otherwise."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surefoot.errors import InputError

LOWER = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)


class Float64Only(TorchDispatchMode):
    """Refuse operations of a model that take float64 numbers and return less precise ones.

    Example:
        >>> model = nn.Linear(2, 1).double()
        >>> with Float64Only(model):
        ...     F = model(torch.zeros(3, 2, dtype=torch.float64))

    Raises:
        InputError: there is one; it names the module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inside: list[str] = []

    def __enter__(self) -> Any:
        self._hooks = ExitStack()
        for name, module in self.model.named_modules():
            label = f"{name or 'model'} ({type(module).__name__})"
            before = module.register_forward_pre_hook(lambda *_, label=label: self.inside.append(label))
            after = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)

    def _leave(self) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it makes of float64."""
        found = func(*args, **(kwargs or {}))
        lower = [x.dtype for x in tree_leaves(found) if isinstance(x, Tensor) and x.dtype in LOWER]
        if lower and any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves((args, kwargs))):
            where = self.inside[-1] if self.inside else "output="
            raise InputError(
                f"model: {where} turns float64 into {str(lower[0]).removeprefix('torch.')} ({func.name()}), so nothing "
                "measured would be exact; let it keep the dtype of its input"
            )
        return found
