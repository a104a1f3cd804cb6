"""Polish: damped Gauss-Newton in function space, from a trained network to a point that can be certified.

With K = J J^T and r = F - y:  (K + lambda I) z = r,  w <- w - t J^T z.  The Jacobian is never formed: K comes from the
tangent Gram, J^T z from one backward pass. Near a zero of r the same factor serves several steps (chord method).

Memory: K and one factor, 16 n^2 bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.shifted import Shifted
from surefoot.measure.tangent import tangent_gram

CHORDS = 12  # steps with the same factor
SHORTEST = 2.0**-20  # part of a Gauss-Newton step below which there is none


@dataclass
class Polished:
    """What polishing did.

    Attributes:
        residuals: ||F - y|| before the first and after each step.
        distance: how far the weights moved.
        grams: how many Grams were worked out.
        seconds: what it took.
        message: why it stopped.
    """

    residuals: list[float]
    distance: float = 0.0
    grams: int = 0
    seconds: float = 0.0
    message: str = ""


def polish(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    tolerance: float = 0.0,
    max_steps: int = 40,
    done: Callable[[Shifted], bool] | None = None,
    progress: Callable[[str], None] | None = None,
    max_memory: int | str | None = None,
) -> Polished:
    """Move a float64 module's trainable parameters, in place, towards a zero of F - y.

    Args:
        module: float64, deterministic.
        inputs: (N, ...) float64.
        targets: (N, C) float64.
        tolerance: stop once ||F - y|| is at most this.
        max_steps: Gauss-Newton steps (a Gram and a factor each).
        done: asked after each step, with the factor of K at the step's beginning; true stops.
        progress: told a line a step.
        max_memory: for the Gram, see `tangent_gram`.

    Raises:
        InputError: the outputs and targets do not fit, or the residual is no number.
    """
    walk = _Walk(module, inputs, targets)
    found = Polished([walk.rho])
    began = time.monotonic()
    found.message = f"{max_steps} steps taken"
    for _ in range(max_steps):
        if walk.rho <= tolerance:
            found.message = "the residual is as small as was asked for"
            break
        before = walk.rho
        factor = _factor(tangent_gram(module, inputs, max_memory=max_memory), walk.rho)
        found.grams += 1
        if not walk.step(factor, found.residuals):
            found.message = "no step makes the residual smaller"
            break
        if progress:
            progress(f"polish: residual {before:.3g} -> {walk.rho:.3g}")
        if done is not None and done(factor):
            found.message = "certifiable"
            break
        del factor
    found.distance, found.seconds = walk.distance(), time.monotonic() - began
    return found


class _Walk:
    """A module on its way, with its residual r and rho = ||r||."""

    def __init__(self, module: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.module, self.inputs, self.targets = module, inputs, targets
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            shape = module(inputs).shape
        if shape != targets.shape:
            raise InputError(f"targets of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(shape)}")
        self.r, self.rho = self._residual()
        if not math.isfinite(self.rho):
            raise InputError(f"the residual is {self.rho}: the network's outputs must be finite numbers")

    def step(self, factor: Shifted, residuals: list[float]) -> bool:
        """Take a damped step and chords after it, each noted in `residuals`; false if nothing makes rho smaller."""
        t = 1.0
        while not self._try(factor, t):
            t /= 2
            if t < SHORTEST:
                return False
        residuals.append(self.rho)
        for _ in range(CHORDS if t == 1.0 else 0):
            before = self.rho
            if before == 0.0 or not self._try(factor, 1.0):
                break
            residuals.append(self.rho)
            if self.rho > 0.5 * before:
                break
        return True

    def distance(self) -> float:
        """Return how far the parameters are from where they started."""
        return math.hypot(*(float((p.detach() - s).norm()) for p, s in zip(self.params, self.start)))

    def _try(self, factor: Shifted, t: float) -> bool:
        """Take w <- w - t J^T z if that makes the residual smaller."""
        z = factor.solve(self.r * factor.c)
        with torch.enable_grad():
            grads = torch.autograd.grad(self.module(self.inputs).flatten() @ z, self.params)
        before = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, g in zip(self.params, grads):
                p -= t * g
        r, rho = self._residual()
        if rho < self.rho:
            self.r, self.rho = r, rho
            return True
        with torch.no_grad():
            for p, b in zip(self.params, before):
                p.copy_(b)
        return False

    def _residual(self) -> tuple[Tensor, float]:
        with torch.no_grad():
            r = (self.module(self.inputs) - self.targets).flatten()
        return r, float(r.norm())


def _factor(K: Tensor, rho: float) -> Shifted:
    """Return a Cholesky factor of K + lambda I, lambda as small as the residual and rounding allow."""
    A = Shifted(K)
    damping = min(1e-2, 1e-4 * rho * rho) * abs(A.c) if rho >= 1e-3 else 0.0
    floor = 1e-13 * float(A.diagonal.max()) or 1.0
    while not A.factor(-damping):
        damping = max(floor, 10 * damping)
    return A
