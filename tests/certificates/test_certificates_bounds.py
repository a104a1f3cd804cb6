"""Bounds on a ball: at least what is true there, operation by operation, and not absurdly more."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from certificates_nets import NETS, D, Flat, bounded, small
from torch import nn

from surefoot.certificates import bounds
from surefoot.certificates.bounds import ACTIVATIONS, RULES, norm_of, top_eigenvalue
from surefoot.errors import InputError


def flat(operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for o in operations for p in (o, *flat(o.get("branch", [])))]


def test_every_rule_is_tested() -> None:
    ops = [o for name in NETS for o in flat(bounded(*small(name))[0].operations)]
    assert {o["op"] for o in ops} == {*RULES, "residual"}
    assert {o["name"] for o in ops if o["op"] == "activation"} == set(ACTIVATIONS) - {"identity"}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("R", [0.05, 0.5])
def test_ball(name: str, R: float) -> None:
    """Norm, curvature and Lipschitz constant of the Jacobian, attained at points of the ball: below the bounds."""
    net, x = small(name)
    read, network = bounded(net, x)
    f, ball = Flat(read, x), network.on_ball(R)
    points = f.points(R)
    jacobians = [f.jacobian(w) for w in points]
    norms = [float(torch.linalg.matrix_norm(J, 2)) for J in jacobians]
    curvature = max(f.curvature(w) for w in points[:3])
    slopes = [
        float(torch.linalg.matrix_norm(J - jacobians[0], 2) / (w - points[0]).norm())
        for J, w in zip(jacobians[1:], points[1:])
    ]
    assert 0 < max(norms) <= ball.jacobian_norm
    assert 0 < max(curvature, *slopes) <= ball.beta
    # Not absurd: the bound is for all signs of all layers at once, and grows with the ball.
    assert ball.beta <= (150 if R < 0.1 else 3000) * curvature
    assert network.on_ball(0.0).jacobian_norm <= 8 * norms[0]


@pytest.mark.parametrize("name", NETS)
def test_bounds_grow_with_the_ball(name: str) -> None:
    _, network = bounded(*small(name))
    balls = [network.on_ball(R) for R in (0.0, 1e-9, 0.1, 1.0)]
    for a, b in itertools.pairwise(balls):
        assert a.beta <= b.beta
        assert a.jacobian_norm <= b.jacobian_norm


@pytest.mark.parametrize("name", NETS)
def test_the_operations_compute_the_model(name: str) -> None:
    net, x = small(name)
    _, network = bounded(net, x)
    torch.testing.assert_close(network.outputs, net(x), rtol=1e-12, atol=1e-13)
    assert float(network.error.max()) < 1e-11


def test_linear_network_has_the_norm_of_its_features() -> None:
    """One linear layer: no curvature, and J is known."""
    net = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=D)
    _, network = bounded(net, x)
    ball = network.on_ball(10.0)
    assert ball.beta == 0
    assert ball.jacobian_norm == pytest.approx(float((x.square().sum() + 4).sqrt()), rel=1e-9)


def test_two_layer_curvature_is_nearly_attained() -> None:
    """v2 tanh(v1 x) for one small sample: D^2 F is the mixed term, and the bound is sharp."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity(), nn.Linear(1, 1, bias=False)).double()
    x = torch.ones(1, 1, dtype=D)
    read, network = bounded(net, x)
    assert network.on_ball(0.0).beta == pytest.approx(Flat(read, x).curvature(Flat(read, x).w0), rel=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_constants(name: str) -> None:
    sigma, s1, s2 = ACTIVATIONS[name][:3]
    z = torch.cat([torch.linspace(-8, 8, 100_001, dtype=D), torch.tensor([-40.0, 40.0], dtype=D)]).requires_grad_(True)
    (slope,) = torch.autograd.grad(sigma(z).sum(), z, create_graph=True)
    assert 0.99 * s1 < float(slope.detach().abs().max()) <= s1
    rise = (slope.detach()[1:-2] - slope.detach()[:-3]).abs().max() / (16 / 100_000)
    assert 0.99 * s2 - 1e-9 < float(rise) <= s2 or name == "elu"  # ELU's slope is steepest at 0, from below
    assert float(rise) <= s2 + 1e-9


def test_top_eigenvalue() -> None:
    Q = torch.rand(50, 4, 4, dtype=D)
    Q = Q + Q.mT
    Q[0] = 0
    Q[1] = torch.diag(torch.tensor([1.0, 0, 0, 3.0]))
    exact = torch.linalg.eigvalsh(Q)[:, -1]
    found = top_eigenvalue(Q)
    assert (found >= exact).all()
    assert (found <= exact * 1.01 + 1e-12).all()


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (3, 0, 1), (2, 2, 2)])
def test_convolution_norm(stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv2d(2, 3, 3, stride=stride, padding=padding, dilation=dilation).double()
    x = torch.randn(1, 2, 7, 7, dtype=D)
    _, network = bounded(nn.Sequential(conv, nn.Flatten()), x)
    (step, _) = network.steps
    zero = conv(torch.zeros_like(x)).detach()
    M = torch.stack([(conv(e.view_as(x)) - zero).detach().flatten() for e in torch.eye(98, dtype=D)], 1)
    assert float(torch.linalg.matrix_norm(M, 2)) <= step.w
    # The Jacobian in the weights: patches, each pixel in at most nu of them.
    read, _ = bounded(nn.Sequential(conv, nn.Flatten()), x)
    f = Flat(read, x)
    assert float(torch.linalg.matrix_norm(f.jacobian(f.w0), 2)) <= network.on_ball(0.0).jacobian_norm


def test_spectral_norm_is_above() -> None:
    for shape in ((5, 3), (1, 7), (40, 40)):
        W = torch.randn(shape, dtype=D)
        exact = float(torch.linalg.matrix_norm(W, 2))
        assert exact < norm_of(W) < 1.02 * exact


def test_rounding_errors_are_bounded() -> None:
    """F and J in float64 against 64-bit mantissas: below the bounds, and the bounds are small."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    x = 3 * torch.randn(5, 6, dtype=D)
    read, network = bounded(net, x)
    f = Flat(read, x)
    W = [np.asarray(p.detach().numpy(), np.longdouble) for p in net.parameters()]
    h0 = x.numpy().astype(np.longdouble)
    h1 = np.tanh(h0 @ W[0].T + W[1])
    h2 = np.tanh(h1 @ W[2].T + W[3])
    out = h2 @ W[4].T + W[5]
    rows = []
    for i in range(5):
        for c in range(2):
            d2 = W[4][c] * (1 - h2[i] ** 2)
            d1 = (d2 @ W[2]) * (1 - h1[i] ** 2)
            last = np.zeros((2, 20), np.longdouble)
            last[c] = h2[i]
            parts = [np.outer(d1, h0[i]), d1, np.outer(d2, h1[i]), d2, last, np.eye(2, dtype=np.longdouble)[c]]
            rows.append(np.concatenate([p.reshape(-1) for p in parts]))
    errors = np.linalg.norm((network.outputs.numpy() - out).astype(float), axis=1)
    assert (errors <= network.error.numpy()).all()
    assert errors.max() > 0
    off = float(np.linalg.norm((f.jacobian(f.w0).numpy() - np.stack(rows)).astype(float)))
    assert 0 < off <= network.on_ball(0.0).rounding < 1e-9


def test_cells_of_relu() -> None:
    """Inside the ball that the cell condition allows no argument changes its sign; twice as far out one does."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.LeakyReLU(0.1), nn.Linear(4, 1)).double()
    x = torch.randn(4, 3, dtype=D)
    read, network = bounded(net, x)
    unit = network.on_ball(1e-6).cell / 1e-6
    R = 0.5 / unit
    ball = network.on_ball(R)
    assert 0 < ball.cell < 1
    f = Flat(read, x)

    def signs(w: torch.Tensor) -> torch.Tensor:
        W1, b1, W2, b2 = (p.view(s) for p, s in zip(torch.split(w, [15, 5, 20, 4, 4, 1]), [(5, 3), (5,), (4, 5), (4,)]))
        z1 = x @ W1.T + b1
        return torch.cat([z1, torch.relu(z1) @ W2.T + b2], 1) > 0

    for w in f.points(R, 200):
        assert torch.equal(signs(w), signs(f.w0))
        assert float(torch.linalg.matrix_norm(f.jacobian(w), 2)) <= ball.jacobian_norm
    assert max(f.curvature(w, 1, 5) for w in f.points(R)) <= ball.beta
    # sharp for the first layer: along the gradient of the smallest argument
    z = net[0](x).detach()
    i, k = divmod(int(z.abs().argmin()), 5)
    first = network.steps[1].gap
    assert first is not None
    d = torch.zeros_like(f.w0)
    d[3 * k : 3 * k + 3], d[15 + k] = x[i], 1.0
    reach = float(first[i]) / float(d.norm())
    step = -torch.sign(z[i, k]) * d / d.norm() * reach
    assert not torch.equal(signs(f.w0 + 1.001 * step), signs(f.w0))
    assert torch.equal(signs(f.w0 + 0.999 * step), signs(f.w0))


def test_an_argument_at_a_kink_has_no_cell() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    _, network = bounded(net, torch.ones(1, 2, dtype=D))
    assert network.on_ball(1e-12).cell > 1


def test_an_operation_without_a_rule_is_named() -> None:
    with pytest.raises(InputError, match="'softmax' has no rule"):
        bounds.BoundedNetwork([{"op": "softmax"}], {}, torch.ones(1, 2, dtype=D))


def test_a_rule_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function: here a fixed rotation of two numbers."""
    monkeypatch.setattr(bounds, "RULES", dict(RULES))

    @bounds.rule("turn")
    def measure_turn(o: Any, tensors: Any, h: Any, dh: Any, size: Any) -> Any:
        return h.flip(1), dh, bounds.Step("turn", None, 1.0)

    linear = {"op": "linear", "weight": "w", "bias": None, "trainable": True}
    network = bounds.BoundedNetwork([linear, {"op": "turn"}], {"w": torch.eye(2, dtype=D)}, torch.ones(1, 2, dtype=D))
    assert network.on_ball(0.0).jacobian_norm == pytest.approx(math.sqrt(2), rel=1e-9)
