"""From the configuration to a stepper: our optimizers, and torch's with or without clipping, behind one face."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.optim import DeltaGClip, GClip, NormalizedGD, SmoothClip, clip_grad_
from surefoot.optim import norm as norms
from surefoot.optim.telemetry import REGIMES, regime_index
from surefoot.train.config import TrainConfig


@dataclass(frozen=True)
class StepReport:
    """What one step did. `scale` and `step_length` are 0 for a skipped step."""

    grad_norm: float
    scale: float
    regime: str
    step_length: float


class Stepper:
    """Takes the steps of a resolved configuration and says what each was.

    Args:
        config: resolved; its optimizer and letters are used.
        params: the trainable parameters.
    """

    def __init__(self, config: TrainConfig, params: Iterable[Tensor]) -> None:
        self.config = config
        self.params = list(params)
        self.optimizer = build_optimizer(config, self.params)
        self.ours = config.optimizer not in ("sgd", "adam", "adamw")
        # With momentum, decay or Adam's scaling a step is not h g: its length is then measured.
        self.plain = (self.ours or config.optimizer == "sgd") and not config.momentum and not config.weight_decay

    @property
    def thresholds(self) -> tuple[float, float]:
        """The norm above which a step counts as clipped, and the one from which the floor acts."""
        c = self.config
        gamma = {
            "normalized-gd": c.beta,
            "smooth-clip": None if not c.L1 else (c.L0 or 0.0) / c.L1,
        }.get(c.optimizer, c.gamma)
        if gamma is None:
            return math.inf, math.inf
        return gamma, gamma / c.delta if c.delta else math.inf

    def step(self, lr: float) -> StepReport:
        """Take a step with learning rate `lr` along the gradients that are there.

        Raises:
            FloatingPointError: a norm that is not finite, with nonfinite="raise".
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = None if self.plain else [norms.local(p).detach().clone() for p in self.params]
        norm, scale = self._step_ours() if self.ours else self._step_torch()
        finite = math.isfinite(norm)
        gamma, floor_at = (torch.tensor([v], dtype=torch.float64) for v in self.thresholds)
        regime = REGIMES[int(regime_index(torch.tensor([norm], dtype=torch.float64), gamma, floor_at))]
        if not finite and self.config.nonfinite == "skip":
            return StepReport(norm, 0.0, regime, 0.0)
        length = lr * scale * norm
        if before is not None:
            length = self._norm([norms.local(p).detach() - b for p, b in zip(self.params, before)])
        return StepReport(norm, scale, regime, length)

    def _norm(self, parts: list[Tensor | None]) -> float:
        """Return the norm over all ranks of this rank's parts, one a parameter."""
        with torch.no_grad():
            [total] = norms.sums_of_squares([self.params], [parts])
        return float(norms.root(total))

    def _step_ours(self) -> tuple[float, float]:
        self.optimizer.step()
        last = self.optimizer.telemetry(reset=False)  # type: ignore[attr-defined]
        return last["norm"], last["scale"]

    def _step_torch(self) -> tuple[float, float]:
        c = self.config
        norm = self._norm([norms.local_gradient(p) for p in self.params])
        if not math.isfinite(norm) and c.nonfinite == "raise":
            raise FloatingPointError(f"gradient norm is {norm}")
        if not math.isfinite(norm) and c.nonfinite == "skip":
            return norm, 0.0
        scale = 1.0
        if c.gamma is not None:
            delta = c.delta or 0.0
            clip_grad_(self.params, gamma=c.gamma, delta=delta, nonfinite="propagate")
            scale = min(1.0, max(delta, c.gamma / norm)) if norm > 0 else 1.0
        self.optimizer.step()
        return norm, scale


def build_optimizer(config: TrainConfig, params: list[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of a resolved configuration."""
    c = config
    assert c.lr is not None, "the configuration is not resolved"
    sgd: dict[str, Any] = {"momentum": c.momentum, "nesterov": c.nesterov, "weight_decay": c.weight_decay}
    ours = {**sgd, "nonfinite": c.nonfinite}
    if c.optimizer == "delta-gclip":
        assert c.gamma is not None
        assert c.delta is not None
        return DeltaGClip(params, c.lr, gamma=c.gamma, delta=c.delta, **ours)
    if c.optimizer == "gclip":
        assert c.gamma is not None
        return GClip(params, c.lr, gamma=c.gamma, **ours)
    if c.optimizer == "normalized-gd":
        assert c.beta is not None
        return NormalizedGD(params, c.lr, beta=c.beta, **ours)
    if c.optimizer == "smooth-clip":
        assert c.L0 is not None
        assert c.L1 is not None
        return SmoothClip(params, c.lr, L0=c.L0, L1=c.L1, **ours)
    if c.optimizer == "sgd":
        return torch.optim.SGD(params, c.lr, **sgd)
    cls = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam
    return cls(params, c.lr, weight_decay=c.weight_decay)
