"""What the steps did, counted where the gradients live and turned into plain numbers only when asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

REGIMES = ("unclipped", "clipped", "floored", "skipped")


def regime_index(norm: Tensor, threshold: Tensor, floor_at: Tensor) -> Tensor:
    """Return the regime of each norm as an index into `REGIMES`.

    Args:
        norm: (K,) gradient norms.
        threshold: (K,) γ: unclipped iff norm <= γ.
        floor_at: (K,) γ/δ (infinite for δ = 0): floored iff norm >= γ/δ and norm > γ.

    Returns:
        (K,) int64: 0 unclipped, 1 clipped, 2 floored, 3 skipped (the norm is not finite).

    Example:
        >>> gamma, floor = torch.tensor([1.0]), torch.tensor([10.0])
        >>> [REGIMES[int(regime_index(torch.tensor([n]), gamma, floor))] for n in (1.0, 2.0, 10.0, float("nan"))]
        ['unclipped', 'clipped', 'floored', 'skipped']
    """
    above = norm > threshold
    regime = above.long() + (above & (norm >= floor_at)).long()
    return regime.masked_fill(~torch.isfinite(norm), 3)


def on_device(x: float | Tensor, device: torch.device) -> Tensor:
    """Return a number as a () float64 tensor: filled in there, since copying it over would wait for the device."""
    if isinstance(x, Tensor):
        return x.to(device, torch.float64)
    return torch.full((), x, dtype=torch.float64, device=device)


class Telemetry:
    """Running counts over the K norms of each step (one with scope="global").

    They are kept where the norms are: as plain numbers beside the CPU, as a tensor on any other device.
    """

    # 0 steps, 1-4 the regimes, 5 sum of norms, 6 path length, 7 min and 8 max norm, 9 last norm, 10 last scale
    EMPTY = (0.0,) * 7 + (math.inf, -math.inf, math.nan, math.nan)

    def __init__(self) -> None:
        self.values: list[float] | Tensor = list(self.EMPTY)

    def record(self, verdicts: Sequence[tuple[float, float, float, float]], length: float) -> None:
        """Count one step.

        Args:
            verdicts: K times norm, multiplier, γ and γ/δ.
            length: the length of h g over all parameters; 0 for a step that was left out.
        """
        v = self.values = self.values.tolist() if isinstance(self.values, Tensor) else self.values
        v[0] += 1
        v[6] += length if math.isfinite(length) else 0.0
        v[9], v[10] = 0.0, math.inf
        for norm, scale, threshold, floor_at in verdicts:
            v[9] = norm if not norm <= v[9] else v[9]
            v[10] = min(v[10], scale)
            if not math.isfinite(norm):
                v[4] += 1
                continue
            v[1 if norm <= threshold else 2 if norm < floor_at else 3] += 1
            v[5] += norm
            v[7] = min(v[7], norm)
            v[8] = max(v[8], norm)

    def record_on_device(self, verdicts: Sequence[tuple[Any, ...]], length: Tensor, skip: Tensor) -> None:
        """The same for () tensors; nothing waits for the device. `skip`, () bool, says that the step was left out."""
        device = length.device
        columns = [torch.stack([on_device(x, device) for x in c]) for c in zip(*verdicts)]
        norm, scale, threshold, floor_at = columns
        norm = norm.masked_fill(skip & torch.isfinite(norm), math.nan)  # torch.where would copy the number over
        if not isinstance(self.values, Tensor):
            self.values = torch.stack([on_device(v, device) for v in self.values])
        old = self.values
        regime = regime_index(norm, threshold, floor_at)
        taken = regime != 3
        finite = norm.masked_fill(~taken, 0.0)
        new = [
            old[0] + 1,
            *(old[1 + r] + (regime == r).sum() for r in range(4)),
            old[5] + finite.sum(),
            old[6] + length.masked_fill(skip | ~torch.isfinite(length), 0.0),
            torch.minimum(old[7], norm.masked_fill(~taken, math.inf).min()),
            torch.maximum(old[8], norm.masked_fill(~taken, -math.inf).max()),
            norm.max(),
            scale.min().masked_fill(skip, 0.0),
        ]
        self.values.copy_(torch.stack(new))  # in place, so that a captured graph counts too

    def read(self, *, reset: bool) -> dict[str, float]:
        """Return plain numbers and, if `reset`, begin anew. The one place that waits for the device."""
        values = self.values.tolist() if isinstance(self.values, Tensor) else list(self.values)
        steps, *counts = (int(v) for v in values[:5])
        norm_sum, path, low, high, norm, scale = values[5:]
        taken = counts[0] + counts[1] + counts[2]
        units = taken + counts[3]
        nan = math.nan
        if reset:  # the last norm and scale stay true until the next step
            fresh = [*self.EMPTY[:9], norm, scale]
            if isinstance(self.values, Tensor):
                self.values.copy_(torch.tensor(fresh, dtype=torch.float64))
            else:
                self.values = fresh
        return {
            "steps": steps,
            **dict(zip(REGIMES, counts)),
            "clip_fraction": counts[1] / units if units else nan,
            "floor_fraction": counts[2] / units if units else nan,
            "norm_min": low if taken else nan,
            "norm_mean": norm_sum / taken if taken else nan,
            "norm_max": high if taken else nan,
            "path_length": path,
            "norm": norm,
            "scale": scale,
        }

    def state(self) -> Tensor:
        """Return the counts as a tensor, for a checkpoint."""
        return torch.as_tensor(self.values, dtype=torch.float64).clone()

    def load(self, state: Tensor | None) -> None:
        """Go on from the counts that `state()` gave; None begins anew."""
        self.values = list(self.EMPTY) if state is None else state.tolist()
