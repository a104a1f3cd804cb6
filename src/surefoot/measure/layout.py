"""Where the samples are in what a module returns: found by asking the model for 2 samples and for 3.

A module may see the samples in front (n, ...), behind the places (T, n, ...), several rows a sample (n T, ...), or a
tensor that is the same for all of them, like the embedding of positions. Only shapes are looked at; what is concluded
from them is held against autograd with everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Which dimension of a module's output counts the samples.

    Attributes:
        dim: the dimension; None: the output is the same for all samples.
        fold: how many rows a sample has there.
        interleaved: whether all samples' first rows come before their second rows.
    """

    dim: int | None
    fold: int = 1
    interleaved: bool = False

    def front(self, x: Tensor, output: Tensor, n: int) -> tuple[Tensor, Tensor] | None:
        """Return a module's input and output with the samples in front, or None if they do not fit together."""
        if self.dim is None:
            if x.shape[:1] != (1,) or output.shape[:1] != (1,):
                x, output = x[None], output[None]
            return x.expand(n, *x.shape[1:]), output.expand(n, *output.shape[1:])
        rows = n * self.fold
        if min(x.dim(), output.dim()) <= self.dim or x.shape[self.dim] != rows or output.shape[self.dim] != rows:
            return None
        x, output = x.movedim(self.dim, 0), output.movedim(self.dim, 0)
        if self.interleaved:
            x, output = (z.unflatten(0, (self.fold, n)).transpose(0, 1).flatten(0, 1) for z in (x, output))
        return x, output

    def back(self, output: Tensor) -> Tensor:
        """Undo `front` for an output; what was the same for all samples stays repeated."""
        if self.interleaved:
            output = output.unflatten(0, (-1, self.fold)).transpose(0, 1).flatten(0, 1)
        return output.movedim(0, self.dim) if self.dim else output


class Layouts:
    """The layout of every recorded call of every module, by the order of the calls.

    Args:
        run: calls the model on so many samples, with a function that every recorded (module, output) passes through on
            its way, and returns the model's outputs.
    """

    def __init__(self, run: Callable[[int, Callable[[nn.Module, Tensor], Tensor]], Tensor]) -> None:
        two, three = _shapes(run, 2), _shapes(run, 3)
        self._calls = {
            module: [_compare(s, t) for s, t in zip(two[module], three[module])]
            for module in two
            if len(two[module]) == len(three.get(module, []))
        }
        if any(layout is not None and layout.dim is None for calls in self._calls.values() for layout in calls):
            self._try_shared(run)

    def get(self, module: nn.Module, call: int) -> Layout | None:
        """Return the layout of a module's call; None: unknown. Later calls (of longer sequences) are like the last."""
        calls = self._calls.get(id(module))
        return calls[min(call, len(calls) - 1)] if calls else None

    def swap(self, modules: set[int]) -> bool:
        """Take the rows of these modules (by id) as interleaved and of no others; return whether that changes any."""
        before = self._calls
        self._calls = {
            module: [
                layout and replace(layout, interleaved=module in modules and layout.fold > 1) for layout in layouts
            ]
            for module, layouts in before.items()
        }
        return self._calls != before

    def _try_shared(self, run: Callable[[int, Callable[[nn.Module, Tensor], Tensor]], Tensor]) -> None:
        """Forget the outputs that all samples share, if the model does not bear their being repeated for each."""
        calls: dict[int, int] = {}

        def repeat(module: nn.Module, output: Tensor) -> Tensor:
            call = calls[id(module)] = calls.get(id(module), -1) + 1
            layout = self.get(module, call)
            found = layout.front(output, output, 2) if layout is not None and layout.dim is None else None
            return output if found is None else found[1]

        try:
            borne = torch.equal(run(2, repeat), run(2, lambda module, output: output))
        except (RuntimeError, IndexError, ValueError, TypeError):
            borne = False  # a shape the model did not expect: its parameters go to per-sample gradients
        if not borne:
            self._calls = {
                module: [layout if layout is not None and layout.dim is not None else None for layout in layouts]
                for module, layouts in self._calls.items()
            }


def _shapes(run: Callable[[int, Callable[[nn.Module, Tensor], Tensor]], Tensor], n: int) -> dict[int, list[torch.Size]]:
    found: dict[int, list[torch.Size]] = {}

    def look(module: nn.Module, output: Tensor) -> Tensor:
        found.setdefault(id(module), []).append(output.shape)
        return output

    run(n, look)
    return found


def _compare(two: torch.Size, three: torch.Size) -> Layout | None:
    """Return the layout of an output that has one shape with 2 samples and another with 3."""
    if len(two) != len(three):
        return None
    different = [d for d, (s, t) in enumerate(zip(two, three)) if s != t]
    if not different:
        return Layout(None)
    d = different[0]
    return Layout(d, two[d] // 2) if len(different) == 1 and 3 * two[d] == 2 * three[d] else None
