"""The function on the weights that gradient and curvature are taken of: f(w) = the mean loss over some data.

It is built on a copy of the model, in the mode the model is in, whose buffers start afresh at every evaluation: the
model itself, its gradients and the running statistics of batch norm are never touched, nor are the random numbers.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surefoot.errors import InputError
from surefoot.measure.capture import call, choose_parameters, logits
from surefoot.measure.inputs import count, take

LossFn = Callable[[Any, Any], Tensor]


class Piece(NamedTuple):
    """Samples that are evaluated together, and their share of all samples."""

    inputs: Any
    targets: Any
    weight: float
    batch: int


class Objective:
    """f(w) = sum over the batches of (n_b / N) loss_fn(outputs, targets), at the weights w that the model has.

    Args:
        model: left as it is; measured in the mode it is in.
        loss_fn: (outputs, targets) -> a scalar, the mean over the samples.
        data: one pair (inputs, targets), or batches of them: a list or a loader, read once and kept. The inputs are a
            tensor, a tuple of arguments or a dictionary of keyword arguments. They go to the device of the weights.
        params: names of parameters or modules, or parameters themselves; None: all that require a gradient.
        rows: evaluate at most so many samples at a time; None: batch by batch.
        output: takes the outputs out of what the model returns; None: itself, or its logits.
        dtype: torch.float64 or torch.float32 to calculate in; None: that of the model, float32 at least.

    Raises:
        InputError: there is nothing to measure, or f is no function of the weights alone.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        *,
        params: Sequence[str | nn.Parameter] | None = None,
        rows: int | None = None,
        output: Callable[[Any], Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # what torch.compile makes cannot be differentiated twice
        chosen = choose_parameters(model, params)
        if dtype not in (None, torch.float32, torch.float64):
            raise InputError(f"dtype={dtype} cannot be measured in; choose torch.float64 or torch.float32")
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise InputError(f"rows={rows!r} must be a positive integer, or None for whole batches")
        self.model = _twin(model, chosen, dtype)
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.params)
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.rows = rows
        self._loss_fn = copy.deepcopy(loss_fn).to(self.dtype) if isinstance(loss_fn, nn.Module) else loss_fn
        self._output = output or logits
        self._cast = dtype is not None or any(p.dtype.itemsize < 4 for p in model.parameters())
        self._buffers = [(m, name, b) for m in self.model.modules() for name, b in m._buffers.items() if b is not None]
        with self.untouched():
            self.pieces = self._split(_batches(data))
            self._check()
        self.samples = sum(count(piece.inputs) for piece in self.pieces)

    def loss(self, piece: Piece) -> Tensor:
        """Return the mean loss of a piece: ()."""
        return self.loss_of(self.outputs(piece), piece)

    def outputs(self, piece: Piece) -> Any:
        """Return what the model makes of a piece."""
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer.clone()
        return self._output(call(self.model, piece.inputs))

    def loss_of(self, outputs: Any, piece: Piece) -> Tensor:
        """Return the mean loss of the outputs of a piece: ().

        Raises:
            InputError: it is no scalar, or NaN, or infinite.
        """
        loss = self._loss_fn(outputs, piece.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise InputError(f"loss_fn returns {found}; it must return a scalar tensor, the mean over the samples")
        if not torch.isfinite(loss):
            raise InputError(
                f"loss_fn returns {loss.item()} on batch {piece.batch}; look for NaN in the data and the weights"
            )
        return loss.reshape(())

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Give the random numbers and torch's settings back as they were; everything between is evaluated in it."""
        python, numpy = random.getstate(), np.random.get_state()
        default, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
        devices = [self.device] if self.device.type == "cuda" else []
        # cuDNN's recurrent kernels have no second derivative.
        recurrent = any(isinstance(m, nn.RNNBase) for m in self.model.modules())
        cudnn = torch.backends.cudnn.flags(enabled=False) if devices and recurrent else nullcontext()
        try:
            with (
                torch.random.fork_rng(devices),
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(self.device.type, enabled=False),
                sdpa_kernel(SDPBackend.MATH),  # the others have no second derivative
                cudnn,
            ):
                torch.backends.mha.set_fastpath_enabled(False)
                if self._cast:
                    torch.set_default_dtype(self.dtype)
                yield
        finally:
            torch.set_default_dtype(default)
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(python)
            np.random.set_state(numpy)

    def _split(self, batches: list[tuple[Any, Any]]) -> list[Piece]:
        pieces: list[Piece] = []
        for b, (inputs, targets) in enumerate(batches):
            inputs, targets = self._moved(inputs), self._moved(targets)
            n = count(inputs)
            if n == 0:
                raise InputError(f"data: batch {b} holds no sample; give at least one")
            if (len(batches) > 1 or self.rows is not None) and count(targets) != n:
                raise InputError(
                    f"data: batch {b} has {n} samples and {count(targets)} targets; give a target a sample"
                )
            step = self.rows or n
            for start in range(0, n, step):
                part = slice(start, start + step)
                whole = step >= n
                x, y = (inputs, targets) if whole else (take(inputs, part), take(targets, part))
                pieces.append(Piece(x, y, count(x), b))
        N = sum(piece.weight for piece in pieces)
        return [piece._replace(weight=piece.weight / N) for piece in pieces]

    def _moved(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(self.device, self.dtype if self._cast and x.is_floating_point() else x.dtype)
        if isinstance(x, Mapping):
            return {name: self._moved(v) for name, v in x.items()}
        return type(x)(self._moved(v) for v in x) if type(x) in (tuple, list) else x

    def _check(self) -> None:
        """Evaluate the first piece and see whether f is a function of the weights alone, and a mean."""
        mixing = [
            name or "model"
            for name, m in self.model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        ]
        if mixing and self.rows is not None:
            raise InputError(
                f"rows={self.rows} would change what batch norm in train mode normalises by: {', '.join(mixing[:5])}; "
                "call model.eval(), or leave rows out"
            )
        piece = self.pieces[0]
        try:
            outputs = self.outputs(piece)
            loss = self.loss_of(outputs, piece)
        except InputError:
            raise
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"data: the model or loss_fn cannot take inputs {_shape(piece.inputs)} with targets "
                f"{_shape(piece.targets)}: {error}"
            ) from error
        if not loss.requires_grad:
            raise InputError(
                f"loss_fn's value does not depend on the parameters {self.names[:5]}; choose others, or detach less"
            )
        with torch.no_grad():
            again = self.loss(piece)
            # On an accelerator sums may come in any order.
            same = torch.equal(loss, again) if self.device.type == "cpu" else torch.allclose(loss, again, rtol=1e-5)
            if not same:
                raise InputError(
                    "model is not deterministic: two evaluations of the same batch differ"
                    + _to_blame(self.model)
                    + "; call model.eval(), or fix its random numbers"
                )
            if len(self.pieces) > 1:
                self._check_mean(outputs, loss, piece)

    def _check_mean(self, outputs: Any, loss: Tensor, piece: Piece) -> None:
        """The same samples twice have the same mean loss; a sum over the samples doubles."""
        if not isinstance(outputs, Tensor) or not isinstance(piece.targets, Tensor) or not piece.targets.dim():
            return
        twice = self._loss_fn(torch.cat([outputs, outputs]), torch.cat([piece.targets, piece.targets]))
        if loss != 0 and torch.allclose(twice, 2 * loss, rtol=1e-3, atol=0):
            raise InputError(
                "loss_fn sums over the samples, so batches cannot be averaged; let it return the mean "
                "(reduction='mean'), or give data as one pair"
            )


def _twin(model: nn.Module, chosen: set[str], dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of the model in which the chosen parameters require a gradient, and no others."""
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"model={type(model).__name__} cannot be copied ({str(error).splitlines()[0]}); hand in a fresh one whose "
            "attributes are parameters, buffers and plain values"
        ) from error
    if dtype is None and any(p.dtype.itemsize < 4 for p in model.parameters()):
        dtype = torch.float32  # second derivatives in half precision are noise
    if dtype is not None:
        twin.to(dtype)
    for m in twin.modules():
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
            m.sparse = False  # sparse gradients cannot be differentiated
    for name, p in twin.named_parameters():
        p.grad = None
        p.requires_grad_(name in chosen)
        if name in chosen and p.is_complex():
            raise InputError(f"params: {name} is complex; measure a model with real parameters, or leave it out")
    return twin


def _batches(data: Any) -> list[tuple[Any, Any]]:
    """Return the data as a list of pairs (inputs, targets).

    Raises:
        InputError: there are none, or they are no pairs.
    """
    wanted = "give a pair (inputs, targets), or a list or loader of such pairs"
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise InputError(f"data={type(data).__name__} yields single samples; put it into a torch.utils.data.DataLoader")
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise InputError(f"data={type(data).__name__} has no targets; {wanted}")
    if _is_pair(data):
        return [tuple(data)]  # type: ignore[list-item]
    found = list(data)
    if not found:
        raise InputError(f"data={type(data).__name__} is empty; {wanted}")
    for b, batch in enumerate(found):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InputError(f"data: batch {b} is a {type(batch).__name__}, not (inputs, targets); {wanted}")
    return [tuple(batch) for batch in found]


def _is_pair(data: Any) -> bool:
    """A tuple of two is a pair; a list of two is one if it begins with inputs, as a loader's batches do."""
    if isinstance(data, tuple):
        return len(data) == 2
    return isinstance(data, list) and len(data) == 2 and isinstance(data[0], (Tensor, Mapping))


def _shape(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"of shape {tuple(x.shape)} in {str(x.dtype).removeprefix('torch.')}"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{name}: {_shape(v)}" for name, v in x.items()) + "}"
    return f"[{', '.join(map(_shape, x))}]" if isinstance(x, (tuple, list)) else type(x).__name__


def _to_blame(model: nn.Module) -> str:
    """Return the modules in train mode that draw random numbers."""
    words = ("Dropout", "DropPath", "StochasticDepth", "RReLU")
    found = [
        f"{name or 'model'} ({type(m).__name__})"
        for name, m in model.named_modules()
        if m.training and (any(w in type(m).__name__ for w in words) or getattr(m, "dropout", 0))
    ]
    return f"; in train mode: {', '.join(found[:5])}" if found else ""
