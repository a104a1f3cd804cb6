"""What the steps did, counted where the gradients live and turned into plain numbers only when asked."""

from __future__ import annotations

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
    return torch.where(torch.isfinite(norm), regime, 3)


class Telemetry:
    """Running counts over K norms a step (one with scope="global"): eleven float64 numbers on the device."""

    # 0 steps, 1-4 the regimes, 5 sum of norms, 6 path length, 7 min and 8 max norm, 9 last norm, 10 last scale
    SIZE = 11

    def __init__(self) -> None:
        self.values: Tensor | None = None

    @staticmethod
    def _empty(device: torch.device) -> Tensor:
        values = torch.zeros(Telemetry.SIZE, dtype=torch.float64, device=device)
        values[7] = float("inf")
        values[8] = float("-inf")
        return values

    def record(self, norm: Tensor, scale: Tensor, threshold: Tensor, floor_at: Tensor, length: Tensor) -> None:
        """Count one step.

        Args:
            norm: (K,) float64, the norms that were judged.
            scale: (K,) float64, their multipliers.
            threshold: (K,) γ.
            floor_at: (K,) γ/δ.
            length: () float64, the length of h g over all parameters.
        """
        old = self._empty(norm.device) if self.values is None else self.values
        regime = regime_index(norm, threshold, floor_at)
        taken = regime != 3
        finite = torch.where(taken, norm, 0.0)
        self.values = torch.stack(
            [
                old[0] + 1,
                *(old[1 + r] + (regime == r).sum() for r in range(4)),
                old[5] + finite.sum(),
                old[6] + torch.where(taken.all(), length, 0.0),
                torch.minimum(old[7], torch.where(taken, norm, float("inf")).min()),
                torch.maximum(old[8], torch.where(taken, norm, float("-inf")).max()),
                norm.max(),
                scale.min(),
            ]
        )

    def read(self, *, reset: bool) -> dict[str, float]:
        """Return plain numbers and, if `reset`, begin anew. The one place that waits for the device."""
        values = [0.0] * 7 + [float("nan")] * 4 if self.values is None else self.values.tolist()
        steps, *counts = (int(v) for v in values[:5])
        norm_sum, path, low, high, norm, scale = values[5:]
        taken = counts[0] + counts[1] + counts[2]
        units = taken + counts[3]
        nan = float("nan")
        if reset and self.values is not None:
            fresh = self._empty(self.values.device)
            fresh[9:] = self.values[9:]  # the last norm and scale stay true until the next step
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

    def state(self) -> Tensor | None:
        """Return the counts as a tensor, for a checkpoint (None before the first step)."""
        return None if self.values is None else self.values.clone()

    def load(self, state: Tensor | None) -> None:
        """Go on from the counts that `state()` gave."""
        self.values = None if state is None else state.clone()
