"""A wide last hidden layer for a network you already have: N - 1 units are what rank [H, 1] = N needs at least."""

from __future__ import annotations

from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.models.mlp import activation_class
from surefoot.train.config import TrainConfig
from surefoot.train.expressivity import check_has_linear, check_not_shared, head_name, linear

ANALYTIC = ("softplus", "tanh", "sigmoid", "gelu", "silu")


def widen_last_hidden(model: nn.Module, width: int, activation: str = "tanh", *, head: str | None = None) -> nn.Module:
    """Put a linear layer of `width` units and an activation in front of a model's last linear layer.

    The last layer is replaced, in place: Linear(m, C) becomes Linear(m, width), activation, Linear(width, C), all with
    torch's initialisation (draw: torch's global generator). In an nn.Sequential that ends in it the three are entries
    of their own. Build the optimizer afterwards.

    Args:
        model: plain, torchvision-like (`fc`) or of transformers (`classifier`, `score`); it is changed.
        width: units, at least 1. Rank N needs N - 1 and up; 2 N are far better conditioned.
        activation: softplus, tanh, sigmoid, gelu or silu: analytic, so that rank N at one point means rank N almost
            everywhere (surefoot, Prop. 12); relu is not. The mean of tanh's features is near 0, which keeps s_1 small.
        head: the name of the last linear layer; None: the last one that the model holds.

    Returns:
        the model.

    Raises:
        InputError: no linear layer, one that shares its weights, or an option out of its range.

    Example:
        >>> widen_last_hidden(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 100)
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=100, bias=True)
          (3): Tanh()
          (4): Linear(in_features=100, out_features=2, bias=True)
        )

    Source: K. Kawaguchi and Q. Sun, arXiv 2104.05785, widen a ResNet so.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise InputError(f"width={width!r} must be a whole number from 1 up")
    if activation not in ANALYTIC:
        raise InputError(f"activation={activation!r} must be analytic; choose one of {ANALYTIC}")
    act = activation_class(activation)()
    name = check_has_linear(model)[-1] if head is None else head
    old = linear(model, name)
    if not name:
        raise InputError("model is itself a linear layer and cannot be replaced in place; wrap it in nn.Sequential")
    check_not_shared(model, name)
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    first = nn.Linear(old.in_features, width, **like)
    last = nn.Linear(width, old.out_features, **like)
    for m in (first, act, last):
        m.train(old.training)
    where, _, own = name.rpartition(".")
    parent = model.get_submodule(where)
    if type(parent) is nn.Sequential and list(parent.children())[-1] is old:
        del parent[-1]
        parent.extend([first, act, last])
    else:
        setattr(parent, own, nn.Sequential(first, act, last))
    return model


def widen_for_rank(model: nn.Module, config: TrainConfig, rows: int, few: Tensor) -> None:
    """Widen a run's model as `--widen` says; "auto": to 2 N units of tanh, where it has fewer than N - 1.

    Args:
        model: it is changed.
        config: of the run.
        rows: N.
        few: some of its rows, on the model's device.

    Raises:
        InputError: the model has no last layer that could be widened.
    """
    width = config.widen
    if width is None:
        return
    try:
        name = head_name(model, few, config.head)
        if width == "auto":
            if linear(model, name).in_features + 1 >= rows:
                return
            width = 2 * rows
        widen_last_hidden(model, width, head=name)
    except InputError as error:
        raise InputError(f"--widen {config.widen}: {error}") from error
