"""What a certificate promises about training, held against training: at every step of every policy."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from certificates_nets import D, Flat
from torch import Tensor, nn

from surefoot.certificates.bounds import BoundedNetwork
from surefoot.certificates.certificate import Certificate
from surefoot.certificates.certify import certify
from surefoot.certificates.layers import read_layers

ROOM = 1e-10  # relative: training itself is rounded

# A policy is made from eta_max and the first gradient's norm; then (t, norm of the gradient) -> step.
Policy = Callable[[int, float], float]


def constant(eta: float, g0: float, rng: torch.Generator) -> Policy:
    return lambda t, g: eta


def gclip(eta: float, g0: float, rng: torch.Generator) -> Policy:
    gamma = g0 * 10 ** _uniform(rng, -2, 0.5)
    return lambda t, g: eta * min(1.0, gamma / g)


def delta_gclip(eta: float, g0: float, rng: torch.Generator) -> Policy:
    gamma, delta = g0 * 10 ** _uniform(rng, -2, 0.5), 10 ** _uniform(rng, -3, 0)
    return lambda t, g: eta * min(1.0, max(delta, gamma / g))


def ngd(eta: float, g0: float, rng: torch.Generator) -> Policy:
    b = g0 * 10 ** _uniform(rng, -2, 1)
    return lambda t, g: b * eta / (g + b)


def random_steps(eta: float, g0: float, rng: torch.Generator) -> Policy:
    return lambda t, g: eta * 10 ** _uniform(rng, -3, 0)


def cosine(eta: float, g0: float, rng: torch.Generator) -> Policy:
    return lambda t, g: eta * (1 + math.cos(math.pi * (t % 50) / 50)) / 2


POLICIES = (constant, gclip, delta_gclip, ngd, random_steps, cosine)


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=D))


def certified(seed: int) -> tuple[Certificate, Tensor]:
    """A random small network and targets so far off that the certificate fires, somewhere up to the edge.

    s_min(J), beta and L do not depend on the targets, so that these can be put where q is what one likes.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    inputs, width, outputs = (int(torch.randint(a, b, (), generator=rng)) for a, b in ((2, 5), (6, 13), (1, 3)))
    samples = int(torch.randint(2, 6 - outputs, (), generator=rng))
    kind = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus, nn.SiLU, nn.ELU)[seed % 6]
    layers = [nn.Linear(inputs, width), kind(), nn.Linear(width, outputs)]
    if seed % 3 == 0:
        layers[2:] = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)]
    net = nn.Sequential(*layers).double()
    x = torch.randn(samples, inputs, dtype=D)
    read = read_layers(net, x[:1])
    f = Flat(read, x)
    s0 = float(torch.linalg.svdvals(f.jacobian(f.w0))[-1])
    beta = BoundedNetwork(read.operations, read.tensors, x).on_ball(0.0).beta
    away = torch.randn(samples, outputs, dtype=D)
    rho = 0.45 * s0**2 / beta
    epsilon = (None, 0.01, 0.1, 0.3)[seed % 4]
    for _ in range(30):
        verdict = certify(net, x, net(x).detach() + rho * away / away.norm(), epsilon=epsilon)
        if verdict:
            return verdict.certificate, x
        rho *= 0.8
    raise AssertionError(str(verdict))


def hold(certificate: Certificate, x: Tensor, policy: Policy, steps: int) -> tuple[float, float]:
    """Train and hold every claim at every step; return path/radius and how much the residual shrank."""
    c: Any = certificate.claims
    read = read_layers_of(certificate)
    f = Flat(read, x)
    y = certificate.tensors["targets"].flatten()
    s0, beta, eps, S = c["sigma_min"], c["beta"], c["epsilon"], c["radius"]
    w, path = f.w0.clone(), 0.0
    first = rho = float((f(w) - y).norm())
    assert rho <= c["residual"]
    for t in range(steps):
        w.requires_grad_(True)
        (g,) = torch.autograd.grad((f(w) - y).square().sum() / 2, w)
        w = w.detach()
        size = float(g.norm())
        h = policy(t, size)
        assert 0 <= h <= c["eta_max"] * (1 + 1e-12)
        w = w - h * g
        path += h * size
        after = float((f(w) - y).norm())
        assert path <= S * (1 + ROOM)
        assert float((w - f.w0).norm()) <= S * (1 + ROOM)
        assert after <= certificate.contraction(min(h, c["eta_max"])) * rho + ROOM * first
        envelope = c["residual"] - (1 - eps) * (s0 * path - beta * path**2 / 2)
        assert after <= envelope + ROOM * first
        rho = after
    return path / S, rho / first


def read_layers_of(certificate: Certificate) -> Any:
    from surefoot.certificates.layers import Layers

    names = [o[k] for o in certificate.operations if o.get("trainable") for k in ("weight", "bias")]
    return Layers(certificate.operations, dict(certificate.tensors), names)


def campaign(seeds: range, steps: int) -> None:
    used, shrank, qs = [], [], []
    for seed in seeds:
        certificate, x = certified(seed)
        rng = torch.Generator().manual_seed(seed)
        g0 = certificate.claims["sigma_min"] * certificate.claims["residual"]
        policy = POLICIES[seed % len(POLICIES)](certificate.claims["eta_max"], g0, rng)
        share, ratio = hold(certificate, x, policy, steps)
        used.append(share)
        shrank.append(ratio)
        qs.append(certificate.claims["q"])
    # Not vacuous: near the edge, a good part of the radius is used, and training gets somewhere.
    assert max(qs) > 0.25
    assert max(used) > 0.4
    assert min(shrank) < 0.05


def test_training_stays_within_what_was_certified() -> None:
    campaign(range(100), 80)


@pytest.mark.nightly
def test_training_stays_within_what_was_certified_at_length() -> None:
    campaign(range(1000, 2000), 500)


def test_the_radius_is_sharp() -> None:
    """F(w) = q - w + w^2/2 at 0, y = 0, s0 = beta = 1: small steps use up nearly all of the radius."""
    from surefoot.theorems.path_length import path_length

    for q, least in ((0.1, 0.99), (0.3, 0.99), (0.45, 0.98)):
        numbers = path_length(q, 1.0, 1.0, 1.0, 1e-3)
        assert numbers is not None
        w, h = 0.0, numbers.eta_max / 2
        for _ in range(200_000):
            r = q - w + w * w / 2
            w -= h * r * (w - 1)
            if r < 1e-9:
                break
        assert least <= w / numbers.radius <= 1
