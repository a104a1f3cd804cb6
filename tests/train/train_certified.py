"""Small certified networks, trained by the optimizers under the eyes of their certificates; for a benchmark too."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surefoot import DeltaGClip, GClip, NormalizedGD
from surefoot.certificates import Certificate, certify
from surefoot.measure.tangent import tangent_gram
from surefoot.train.certified_steps import CertifiedSteps, Step

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.Softplus)


@dataclass
class Certified:
    """A network, its data and its certificate."""

    net: nn.Module
    X: Tensor
    Y: Tensor
    certificate: Certificate


def certified(seed: int, direction: str = "random", epsilon: float | None = None) -> Certified:
    """A small network whose certificate just about fires: its targets lie a little way from its outputs."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    N, width, C = draw.randint(6, 20), draw.randint(20, 40), draw.randint(1, 2)
    X = torch.randn(N, 12, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(12, width), ACTIVATIONS[seed % 3](), nn.Linear(width, C)).double()
    with torch.no_grad():
        F = net(X)
    K = tangent_gram(net, X)
    U = torch.linalg.eigh(K).eigenvectors
    u = {"random": torch.randn(N * C, dtype=torch.float64), "bottom": U[:, 0], "top": U[:, -1]}[direction]
    u = (u / u.norm()).view_as(F)
    close = certify(net, X, F + 1e-8 * u)
    _, s0, beta, _ = (float(m) for m in close.measurements)
    far = (0.5 - (epsilon or 0.0) / 2) * s0**2 / beta * draw.uniform(0.3, 0.8)
    for t in (far, far / 4, far / 16):
        if verdict := certify(net, X, F + t * u, epsilon=epsilon):
            return Certified(net, X, F + t * u, verdict.certificate)
    raise AssertionError(f"seed {seed} could not be certified")


def gclip(params: list[Tensor], h: float, norm: float) -> torch.optim.Optimizer:
    """Clip until the gradient is a third of the first."""
    return GClip(params, h, gamma=norm / 3)


def delta_gclip(params: list[Tensor], h: float, norm: float) -> torch.optim.Optimizer:
    """On the floor until the gradient is half of the first, then clip."""
    return DeltaGClip(params, h, gamma=norm / 5, delta=0.4)


def normalized_gd(params: list[Tensor], h: float, norm: float) -> torch.optim.Optimizer:
    """At most h: lr / beta."""
    return NormalizedGD(params, h * norm / 10, beta=norm / 10)


RULES: dict[str, Callable[[list[Tensor], float, float], torch.optim.Optimizer]] = {
    "gclip": gclip,
    "delta-gclip": delta_gclip,
    "normalized-gd": normalized_gd,
}


@dataclass
class Trained:
    """What training came to.

    Attributes:
        watch: after the last step.
        worst: the largest measured residual over its envelope, over the steps from a number on.
        distance: the largest distance from the start over the radius.
        shortened: steps whose multiplier was below 0.999 of the full one, as a part of all.
    """

    watch: CertifiedSteps
    worst: dict[int, float] = field(default_factory=dict)
    distance: float = 0.0
    shortened: float = 0.0


def train(c: Certified, rule: str, steps: int, claims: Mapping[str, float], *, seed: int = 0) -> Trained:
    """Train for some steps of size eta_max, or random parts of it for odd seeds, from the certificate's weights.

    Raises:
        Violation: a step contradicts the claims.
    """
    params = list(c.net.parameters())
    start = [c.certificate.tensors[name] for name, _ in c.net.named_parameters()]
    with torch.no_grad():
        for p, s in zip(params, start):
            p.copy_(s)
    draw = random.Random(seed)

    def gradient() -> Tensor:
        r = c.net(c.X) - c.Y
        for p, g in zip(params, torch.autograd.grad(r.square().sum() / 2, params)):
            p.grad = g
        return r.detach()

    r = gradient()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in params if p.grad is not None))
    opt = RULES[rule](params, claims["eta_max"] * (1 - 1e-12), norm)
    most = opt.param_groups[0]["lr"]
    weights = math.sqrt(sum(float(s.square().sum()) for s in start))
    watch = CertifiedSteps(claims, float(r.norm()), weights=weights, targets=float(c.Y.norm()))
    found = Trained(watch, worst={first: 0.0 for first in (1, 10, 100, 1000, 10_000) if first <= steps})
    for t in range(1, steps + 1):
        part = draw.random() if seed % 2 else 1.0
        opt.param_groups[0]["lr"] = most * part
        opt.step()
        last = opt.telemetry(reset=False)  # type: ignore[attr-defined]
        h = opt.param_groups[0]["lr"] * last["scale"]
        r = gradient()
        with torch.no_grad():
            distance = math.sqrt(sum(float((p - s).square().sum()) for p, s in zip(params, start)))
        watch.take(Step(h, float(r.norm()), h * last["norm"], distance))
        for first in found.worst:
            if t >= first:
                found.worst[first] = max(found.worst[first], watch.residual / watch.envelope)
        found.distance = max(found.distance, distance / claims["radius"])
        found.shortened += (h < 0.999 * part * claims["eta_max"]) / steps
    return found
