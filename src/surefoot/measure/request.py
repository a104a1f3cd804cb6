"""What a tangent Gram is asked for: options, samples and model, held against what makes sense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.capture import Network, call, exact_kernels, float64_copy, logits
from surefoot.measure.contraction import Term
from surefoot.measure.forms import Form, Layout
from surefoot.measure.inputs import count, describe, take, to_float64

Method = Literal["auto", "ghost", "materialise"]


@dataclass
class Gram:
    """What is to be worked out, and the terms of the blocks at hand."""

    network: Network
    inputs: Any
    other: Any
    layout: Layout
    method: Method
    kept: dict[tuple[bool, int, int], list[Term]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many samples the rows have: N."""
        return count(self.inputs)

    @property
    def m(self) -> int:
        """How many samples the columns have: M."""
        return self.n if self.layout.symmetric else count(self.other)

    def terms(self, left: slice, right: slice) -> tuple[list[Term], list[Term]]:
        """Return the terms of a pair of blocks; what neither needs is forgotten first."""
        symmetric = self.layout.symmetric
        keys = [(True, left.start, left.stop), (symmetric, right.start, right.stop)]
        self.kept = {key: terms for key, terms in self.kept.items() if key in keys}
        for key in keys:
            if key not in self.kept:
                samples = self.inputs if key[0] else self.other
                self.kept[key] = self.network.terms(take(samples, slice(*key[1:])))
        return self.kept[keys[0]], self.kept[keys[1]]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.network.parameters.values())).device


def check_options(form: Any, other: Any, method: Any, tile: Any) -> None:
    """Raise InputError for options that make no sense, whatever the model."""
    if form not in get_args(Form):
        raise InputError(f"form={form!r} is no form of the Gram; choose one of {get_args(Form)}")
    if form == "sample blocks" and other is not None:
        raise InputError("other= has no sample blocks with inputs=; leave it out, or ask for another form")
    if method not in get_args(Method):
        raise InputError(f"method={method!r} is no way to contract; choose one of {get_args(Method)}")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise InputError(f"tile={tile!r} is no number of samples; give 1 or more, or None")


def check_path(path: Path) -> Path:
    """Return the path of a file that can be there."""
    if not path.parent.is_dir():
        raise InputError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if path.is_dir():
        raise InputError(f"path={str(path)!r} is a folder; name a .npy file in it")
    return path


def prepare(
    model: nn.Module,
    inputs: Any,
    other: Any,
    form: Form,
    classes: Sequence[int] | None,
    params: Sequence[str | nn.Parameter] | None,
    output: Callable[[Any], Tensor] | None,
    method: Method,
) -> Gram:
    """Return what is asked for, ready to be worked out.

    Raises:
        InputError: samples, model, outputs or parameters that cannot be treated.
    """
    inputs = to_float64(inputs)
    output = _one_row_a_sample(output or logits)
    cotangents = None
    if classes is not None or form == "sum of outputs":
        F = _look(float64_copy(model), inputs, output, "inputs")
        chosen = _choose_outputs(classes, F.shape[1]) if classes is not None else torch.ones(F.shape[1], 1).double()
        cotangents = (chosen.sum(1, keepdim=True) if form == "sum of outputs" else chosen).to(F.device)
    try:
        network = Network(model, inputs, params=params, output=output, cotangents=cotangents)
    except InputError:
        raise
    except Exception:
        _look(float64_copy(model), inputs, output, "inputs")  # says so if the model itself cannot be called
        raise
    C = network.outputs(take(inputs, slice(0, 1))).shape[1]
    if other is not None:
        other = to_float64(other)
        if (found := _look(network.model, other, output, "other").shape[1]) != C:
            raise InputError(f"other: its samples have {found} outputs each, those of inputs {C}; give samples alike")
    outputs = C if cotangents is None else cotangents.shape[1]
    return Gram(network, inputs, other, Layout(form, outputs, other is None), method)


def _one_row_a_sample(output: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Return `output` with its numbers in rows, one a sample, held against what outputs have to be."""

    def checked(found: Any) -> Tensor:
        F = output(found)
        if not isinstance(F, Tensor) or not F.is_floating_point():
            what = str(F.dtype) if isinstance(F, Tensor) else type(F).__name__
            raise InputError(
                f"output= gives {what}; it has to return a tensor of floating-point numbers, samples in front"
            )
        return F.reshape(-1, 1) if F.dim() < 2 else F.flatten(1)

    return checked


def _look(model: nn.Module, inputs: Any, output: Callable[[Any], Tensor], name: str) -> Tensor:
    """Call the model on a few samples and return its outputs.

    Raises:
        InputError: it cannot be called on them, or returns something else than a row a sample.
    """
    few = take(inputs, slice(0, 2))
    try:
        with torch.no_grad(), exact_kernels():
            F = output(call(model, few))
    except InputError:
        raise
    except Exception as error:  # the model is the user's: it may raise anything
        raise InputError(
            f"{name}: the model (in float64) cannot be called on {describe(few)}: {str(error).splitlines()[0]!r}; "
            "check shapes, and dtypes: token ids and class numbers as integers, everything else as floats"
        ) from error
    if len(F) != count(few):
        raise InputError(
            f"{name}: the outputs for {count(few)} samples come in {len(F)} rows; the samples have to be in front, and "
            "not averaged away: pass output=, or another model"
        )
    return F


def _choose_outputs(classes: Sequence[int], C: int) -> Tensor:
    """Return a column of zeros and a one for each chosen output: (C, k)."""
    chosen = list(classes)
    wrong = [c for c in chosen if isinstance(c, bool) or not isinstance(c, Integral) or not 0 <= c < C]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"classes={chosen} are no choice of outputs; give different ones of 0 .. {C - 1}")
    columns = torch.zeros(C, len(chosen), dtype=torch.float64)
    columns[chosen, range(len(chosen))] = 1.0
    return columns


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Give back the random numbers that the model draws."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        yield
