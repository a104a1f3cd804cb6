"""The features of the last hidden layer: what goes into a model's last dense layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.capture import float64_copy, logits


def last_features(model: nn.Module, x: Tensor) -> tuple[Tensor, tuple[str, nn.Linear], bool]:
    """Return what goes into the last dense layer, worked out in float64.

    Returns:
        The features (n, m), or (n T, m) where a row has T tokens; the layer's name and the layer; whether its outputs
        are the model's.

    Raises:
        InputError: the model has no dense layer.
    """
    twin = float64_copy(model)
    seen: list[tuple[str, nn.Linear, Tensor, Tensor]] = []
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):

            def hook(m: nn.Linear, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                seen[:] = [(name, m, args[0], out)]

            module.register_forward_hook(hook)
    with torch.no_grad():
        found = logits(twin(x.double() if x.is_floating_point() else x))
    if not seen:
        raise InputError("the model has no dense layer (torch.nn.Linear), hence no features that one is fed with")
    name, layer, features, out = seen[0]
    is_last = out.numel() == found.numel() and torch.equal(out.flatten(), found.flatten())
    return features.flatten(0, -2), (name, layer), is_last
