"""The network of a certificate as a torch module again, so that it can be measured and moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surefoot.certificates.layers import Layers


class ExactSoftplus(nn.Module):
    """log(1 + e^z), without the straight line that nn.Softplus takes above 20."""

    def forward(self, z: Tensor) -> Tensor:
        """(...) -> (...)."""
        return torch.logaddexp(torch.zeros_like(z), z)


class Scale(nn.Module):
    """A fixed factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, h: Tensor) -> Tensor:
        """(...) -> (...)."""
        return self.factor * h


class Residual(nn.Module):
    """h + branch(h)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, h: Tensor) -> Tensor:
        """(...) -> (...)."""
        return h + self.branch(h)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of a channel each, for values of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": ExactSoftplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "identity": nn.Identity,
}


def to_module(layers: Layers) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return a float64 module in eval mode that computes the layers, and its parameters by the layers' names.

    Only trainable operations require gradients. The module's numbers are copies.
    """
    parameters: dict[str, nn.Parameter] = {}
    module = _sequence(layers.operations, layers.tensors, parameters).double().eval()
    return module, parameters


def _sequence(
    operations: list[dict[str, Any]], tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]
) -> nn.Module:
    return nn.Sequential(*[_one(o, tensors, parameters) for o in operations])


def _one(o: dict[str, Any], tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> nn.Module:
    op = o["op"]
    if op == "flatten":
        return nn.Flatten()
    if op == "scale":
        return Scale(o["factor"])
    if op == "residual":
        return Residual(_sequence(o["branch"], tensors, parameters))
    if op == "avg_pool2d":
        return nn.AvgPool2d(tuple(o["kernel"]), tuple(o["stride"]))
    if op == "activation":
        return nn.LeakyReLU(o["slope"]) if o["name"] == "leaky_relu" else ACTIVATIONS[o["name"]]()
    W = tensors[o["weight"]]
    module: Any
    if op == "linear":
        module = nn.Linear(W.shape[1], W.shape[0], bias=o["bias"] is not None, device="meta")
    elif op == "conv2d":
        module = nn.Conv2d(
            W.shape[1],
            W.shape[0],
            (W.shape[2], W.shape[3]),
            tuple(o["stride"]),
            tuple(o["padding"]),
            tuple(o["dilation"]),
            bias=o["bias"] is not None,
            device="meta",  # no random numbers are drawn
        )
    else:
        assert op == "batch_norm"
        module = _batch_norm(o, tensors)
    for name in ("weight", "bias"):
        if o[name] is not None:
            parameter = nn.Parameter(tensors[o[name]].clone(), requires_grad=o["trainable"])
            setattr(module, name, parameter)
            parameters[o[name]] = parameter
    return module


def _batch_norm(o: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    mean, var = tensors[o["mean"]], tensors[o["var"]]
    module = BatchNorm(len(mean), eps=o["eps"], dtype=torch.float64)
    assert module.running_mean is not None
    assert module.running_var is not None
    with torch.no_grad():
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)
    return module
