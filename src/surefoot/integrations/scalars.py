"""What the logging callbacks share: the optimizer inside its wrappers, and its telemetry under the names of a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surefoot.optim import ClippedOptimizer


def unwrap(optimizer: Any) -> ClippedOptimizer | None:
    """Return our optimizer inside whatever wraps it as `.optimizer`, None if there is none.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from surefoot import GClip
        >>> opt = GClip([torch.nn.Parameter(torch.zeros(1))], lr=0.1, gamma=1.0)
        >>> unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=opt))) is opt
        True
        >>> unwrap(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])) is None
        True
    """
    while not isinstance(optimizer, ClippedOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            return None
    return optimizer


def scalars(seen: Mapping[str, float]) -> dict[str, float]:
    """Return the entries of a log from what `telemetry()` returned; none if there was no step.

    `grad_norm/preclip`, `grad_norm/postclip` and `clip_coef` are of the last step: ||g||, scale ||g|| and the scale
    (0 for a step that was left out; with a scope other than "global" the largest norm and the smallest scale). The
    others are over the steps since the last log: `grad_norm/mean` and `grad_norm/max` before clipping,
    `clip_fraction`, `floor_fraction`, `skipped` and `path_length`.

    Example:
        >>> import torch
        >>> from surefoot import GClip
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = GClip([w], lr=0.1, gamma=1.0)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> opt.step()
        >>> log = scalars(opt.telemetry())
        >>> log["grad_norm/preclip"], log["grad_norm/postclip"], log["clip_coef"], log["clip_fraction"]
        (5.0, 1.0, 0.2, 1.0)
        >>> scalars(opt.telemetry())
        {}
    """
    if seen["steps"] == 0:
        return {}
    norm, scale = seen["norm"], seen["scale"]
    return {
        "grad_norm/preclip": norm,
        "grad_norm/postclip": scale * norm if scale else 0.0,  # the norm of a step that was left out is not a number
        "grad_norm/mean": seen["norm_mean"],
        "grad_norm/max": seen["norm_max"],
        "clip_coef": scale,
        "clip_fraction": seen["clip_fraction"],
        "floor_fraction": seen["floor_fraction"],
        "skipped": seen["skipped"],
        "path_length": seen["path_length"],
    }
