"""One forward pass, to see before training whether a model, its input and its targets fit each other."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.errors import InputError

ROWS = 2  # one row would hide a squeeze() that drops the batch


def check_shapes(model: nn.Module, x: Tensor, y: Tensor, *, task: str, outputs: int, loss: str) -> None:
    """Check that the model takes the input and that its output is what the loss and the targets need.

    Runs the first two rows in eval mode without gradients. It leaves no trace: weights, buffers, training flags, the
    inputs and the random generators (torch's, NumPy's, Python's) are afterwards what they were, bit for bit.

    Args:
        model: The model, on the device of `x`.
        x: Inputs (N, ...), N >= 1.
        y: Targets: (N,) class numbers for "classification", (N, outputs) numbers for "regression", (N, T) token ids for
            "language". Not used for the loss "elbo".
        task: "classification", "regression" or "language".
        outputs: The number of outputs.
        loss: The name of the loss; for "elbo" the model returns (reconstruction, mu, logvar), for every other one
            a tensor: (N, outputs) or, for "language", (N, T, outputs).

    Raises:
        InputError: If the model does not run on the input, or its output has another shape. It names both shapes.
    """
    x, y = x[:ROWS], y[:ROWS]
    with _no_trace(model), torch.no_grad():
        model.eval()
        try:
            output = model(x.clone())
        except Exception as error:
            raise InputError(
                f"the model does not run on an input of shape {_shape(x)} ({x.dtype}): "
                f"{type(error).__name__}: {error}. "
                f"Build it for rows of shape {tuple(x.shape[1:])}, or change the data to what it expects"
            ) from error
    if loss == "elbo":
        _check_vae(output, x)
        return
    needed = tuple(y.shape) if task == "regression" else (*y.shape, outputs)
    if not isinstance(output, Tensor):
        raise InputError(
            f"the model returns a {type(output).__name__}, and loss={loss!r} needs a tensor of shape {needed}: "
            "return the tensor itself from forward (a variational autoencoder goes with loss='elbo')"
        )
    if tuple(output.shape) != needed:
        raise InputError(
            f"the model's output has shape {_shape(output)} for an input of shape {_shape(x)}, and loss={loss!r} with "
            f"targets of shape {_shape(y)} and outputs={outputs} needs {needed}: change the model's last layer"
        )


def _check_vae(output: object, x: Tensor) -> None:
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output)):
        raise InputError(
            f"loss='elbo' needs a model that returns (reconstruction, mu, logvar), and this one returns a "
            f"{type(output).__name__}: take model='vae', or another loss"
        )
    reconstruction, mu, logvar = output
    if reconstruction.shape != x.shape:
        raise InputError(
            f"the reconstruction has shape {_shape(reconstruction)}, and the input it is compared with has {_shape(x)}"
        )
    if mu.shape != logvar.shape or mu.ndim != 2 or len(mu) != len(x):
        raise InputError(f"mu has shape {_shape(mu)} and logvar {_shape(logvar)}: both must be ({len(x)}, latent)")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    devices = {tensor.device for tensor, _ in values if tensor.is_cuda}
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for module, flag in training:
            module.training = flag
        for module, before in buffers:
            module._buffers.clear()
            module._buffers.update(before)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # an expanded buffer cannot be written to, nor has it changed
                    tensor.copy_(value)
