"""Steps after a certificate, held against what it guarantees.

w_0 are the certificate's weights, h_t the step on E = 1/2 ||F - y||^2, S the radius, a = sigma_star; for h_t <= eta_max

    ||F(w_{t+1}) - y|| <= (1 - (1 - eps) h_t a^2) ||F(w_t) - y||,      ||w_t - w_0|| <= path_t <= S.

Real training rounds: each step may move the residual by as much as weights and outputs are rounded, and that is added
to what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Roundings of a weight, an output and a sum of a few hundred terms, each at most 2^-53 of what is rounded.
ROOM = 64 * 2.0**-53


class Violation(Exception):
    """A certificate does not hold; the message says at which step, by which numbers."""


@dataclass(frozen=True)
class Step:
    """What one step came to.

    Attributes:
        step_size: h_t.
        residual: ||F - y|| after it, as measured.
        length: how far it moved the weights.
        distance: from w_0 after it.
    """

    step_size: float
    residual: float
    length: float
    distance: float


class CertifiedSteps:
    """What a certificate allows, step by step.

    Args:
        claims: the certificate's.
        residual: ||F(w_0) - y|| as measured.
        weights: ||w_0||, and
        targets: ||y||, which say how much rounding there is.

    Attributes:
        envelope: what ||F - y|| is at most, by the claims and the steps so far.
        path: how far the weights have travelled.
    """

    def __init__(self, claims: Mapping[str, float], residual: float, *, weights: float, targets: float) -> None:
        self.claims = claims
        self.steps, self.path = 0, 0.0
        self.residual = residual
        self.envelope = max(claims["residual"], residual)
        self.rounding = ROOM * (claims["jacobian_norm"] * weights + targets)
        self.weights_rounding = ROOM * weights

    def take(self, step: Step) -> None:
        """Count a step.

        Raises:
            Violation: it contradicts the certificate.
        """
        c = self.claims
        self.steps += 1
        self.path += step.length
        factor = 1 - (1 - c["epsilon"]) * step.step_size * c["sigma_star"] ** 2
        allowed = max(factor, 0.0) * self.residual + self.rounding
        self.envelope = max(factor, 0.0) * self.envelope + self.rounding
        room = c["radius"] + self.steps * self.weights_rounding
        before, self.residual = self.residual, step.residual
        if not step.step_size <= c["eta_max"] * (1 + 1e-12):
            raise Violation(f"the step size {step.step_size:.6g} is above eta_max = {c['eta_max']:.6g}")
        if not step.residual <= allowed:
            raise Violation(
                f"the step took the residual from {before:.6g} to {step.residual:.6g}, and it guarantees at most "
                f"{allowed:.6g} (a factor {factor:.8g})"
            )
        if not step.residual <= self.envelope:
            raise Violation(f"the residual {step.residual:.6g} is above the guaranteed envelope {self.envelope:.6g}")
        if not step.distance <= room:
            raise Violation(f"the weights are {step.distance:.6g} away, beyond the radius {c['radius']:.6g}")
        if not self.path <= room:
            raise Violation(f"the weights have travelled {self.path:.6g}, beyond the radius {c['radius']:.6g}")
