"""Certified networks trained by the optimizers, every step held against the proof; false ones are caught."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from surefoot import DeltaGClip, GClip, NormalizedGD
from surefoot.certificates import Certificate, certify
from surefoot.measure.tangent import tangent_gram
from surefoot.train.certified_steps import CertifiedSteps, Step, Violation

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.Softplus)


@dataclass
class Certified:
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
    return GClip(params, h, gamma=norm / 3)


def delta_gclip(params: list[Tensor], h: float, norm: float) -> torch.optim.Optimizer:
    return DeltaGClip(params, h, gamma=norm / 5, delta=0.4)


def normalized_gd(params: list[Tensor], h: float, norm: float) -> torch.optim.Optimizer:
    return NormalizedGD(params, h * norm / 10, beta=norm / 10)


RULES: dict[str, Callable[[list[Tensor], float, float], torch.optim.Optimizer]] = {
    "gclip": gclip,
    "delta-gclip": delta_gclip,
    "normalized-gd": normalized_gd,
}


def train(c: Certified, rule: str, steps: int, claims: Mapping[str, float], *, seed: int = 0) -> CertifiedSteps:
    """Train for some steps of size eta_max, or random parts of it for odd seeds, from the certificate's weights."""
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
    for _ in range(steps):
        opt.param_groups[0]["lr"] = most * draw.random() if seed % 2 else most
        opt.step()
        last = opt.telemetry(reset=False)  # type: ignore[attr-defined]
        h = opt.param_groups[0]["lr"] * last["scale"]
        r = gradient()
        with torch.no_grad():
            distance = math.sqrt(sum(float((p - s).square().sum()) for p, s in zip(params, start)))
        watch.take(Step(h, float(r.norm()), h * last["norm"], distance))
    return watch


@pytest.mark.parametrize("rule", RULES)
def test_no_step_contradicts_a_certificate(rule: str) -> None:
    campaign(rule, networks=5, steps=300)


@pytest.mark.nightly
@pytest.mark.parametrize("rule", RULES)
def test_no_step_contradicts_a_certificate_in_a_long_campaign(rule: str) -> None:
    campaign(rule, networks=50, steps=10_000)


def campaign(rule: str, *, networks: int, steps: int) -> None:
    fell, used = [], []
    for seed in range(networks):
        c = certified(seed)
        claims = c.certificate.claims
        watch = train(c, rule, steps, claims, seed=seed)
        assert watch.steps == steps
        fell.append(watch.residual / claims["residual"])
        used.append(watch.path / claims["radius"])
    # Not vacuous: the residuals fell, and a fair part of the radius was used.
    assert min(fell) < 0.3
    assert max(fell) < 1
    assert max(used) > 0.1


@pytest.mark.parametrize(
    ("lie", "direction", "epsilon", "message"),
    [
        (lambda c: {"radius": c["radius"] / 2}, "bottom", 0.3, "beyond the radius"),
        (lambda c: {"eta_max": 4 * c["eta_max"]}, "top", 0.9, "guarantees at most"),
        (lambda c: {"sigma_star": 3 * c["sigma_star"]}, "bottom", 0.3, "guarantees at most"),
        (lambda c: {"epsilon": c["epsilon"] - 0.7, "sigma_star": 2 * c["sigma_star"]}, "bottom", 0.8, "guarantees"),
    ],
    ids=["radius halved", "eta_max times 4", "sigma_star times 3", "rate too good"],
)
def test_a_false_certificate_is_caught(lie: Callable, direction: str, epsilon: float, message: str) -> None:
    c = certified(3, direction, epsilon)
    train(c, "delta-gclip", 200, c.certificate.claims)  # the true one holds
    with pytest.raises(Violation, match=message):
        train(c, "delta-gclip", 3000, {**c.certificate.claims, **lie(c.certificate.claims)})


def test_a_step_that_is_too_long_is_named() -> None:
    watch = CertifiedSteps(certified(0).certificate.claims, 1e-3, weights=1.0, targets=1.0)
    with pytest.raises(Violation, match="eta_max"):
        watch.take(Step(1e9, 0.0, 0.0, 0.0))
