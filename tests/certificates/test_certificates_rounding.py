"""The certifier's bound of the forward pass's rounding, against balls of 160 bits."""

import numpy as np
import pytest
import torch
from certificates_nets import NETS, D, bounded, small
from flint import arb, ctx
from torch import Tensor, nn

from surefoot.certificates.bounds import ACTIVATIONS, BoundedNetwork, U, accurate
from surefoot.certificates.layers import run


@pytest.fixture(autouse=True)
def _precision():
    before, ctx.prec = ctx.prec, 160
    yield
    ctx.prec = before


def balls(x: Tensor) -> np.ndarray:
    return np.asarray(np.frompyfunc(lambda v: arb(float(v)), 1, 1)(x.numpy()), dtype=object)


def off(computed: Tensor, exact: np.ndarray) -> np.ndarray:
    """Return the norm of each sample's error."""
    far = (balls(computed).reshape(len(computed), -1) - exact.reshape(len(computed), -1)).astype(float)
    return np.linalg.norm(far, axis=1)


def test_a_dense_layer() -> None:
    """Within the bound, the bound within some twenty of the error, and far below gam(k) ||W||_F ||h||."""
    h, W, b = torch.randn(5, 512, dtype=D), torch.randn(30, 512, dtype=D) / 22, torch.randn(30, dtype=D)
    end, bound = accurate(torch.nn.functional.linear, h, W, b)
    exact = off(end, balls(h) @ balls(W).T + balls(b))
    assert (exact <= bound.numpy()).all()
    assert (bound.numpy() <= 20 * exact).all()
    assert (bound < 514 * U * W.norm() * h.norm(dim=1) / 300).all()


def test_numbers_of_many_sizes() -> None:
    h = torch.randn(6, 40, dtype=D) * 10.0 ** torch.empty(6, 40, dtype=D).uniform_(-25, 25)
    h[0] = 0
    W = torch.randn(7, 40, dtype=D) * 10.0 ** torch.empty(7, 40, dtype=D).uniform_(-25, 25)
    end, bound = accurate(torch.nn.functional.linear, h, W, None)
    assert (off(end, balls(h) @ balls(W).T) <= bound.numpy()).all()
    assert torch.isfinite(bound).all()


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_a_convolution(stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv2d(3, 4, 3, stride=stride, padding=padding, dilation=dilation).double()
    h = torch.randn(3, 3, 7, 7, dtype=D)
    _, network = bounded(nn.Sequential(conv, nn.Flatten()), h)
    patches = torch.nn.functional.unfold(h, 3, dilation=dilation, padding=padding, stride=stride)  # (N, c k k, T)
    W, b = balls(conv.weight.detach().flatten(1)), balls(conv.bias.detach())
    exact = np.stack([W @ balls(p) + b[:, None] for p in patches])
    error = off(network.outputs, exact)
    assert (error <= network.error.numpy()).all()
    assert (network.error.numpy() <= 30 * error).all()


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"identity"}))
def test_activations(name: str) -> None:
    sigma, _, _, relative, absolute = ACTIVATIONS[name]
    z = torch.cat([torch.randn(1500, dtype=D) * s for s in (1e-9, 1e-3, 1, 5, 30)])

    def exact(z: float) -> arb:
        x, one = arb(z), arb(1)
        return {
            "tanh": lambda: x.tanh(),
            "sigmoid": lambda: one / (one + (-x).exp()),
            "softplus": lambda: x.exp().log1p(),
            "gelu": lambda: x * (-x / arb(2).sqrt()).erfc() / 2,
            "silu": lambda: x / (one + (-x).exp()),
            "elu": lambda: x if z > 0 else x.expm1(),
        }[name]()

    error = np.array([abs(float(arb(float(v)) - exact(float(x)))) for v, x in zip(sigma(z), z)])
    assert (error <= U * (relative * sigma(z).abs().numpy() + absolute) / 3 + 1e-300).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", NETS)
def test_the_two_sides_agree_within_what_ours_allows(name: str) -> None:
    """What is certified must be what the checker finds, or less: |F - F'| + its bound <= our bound."""
    from surefoot.check.network import Network

    net, x = small(name)
    read, network = bounded(net, x)
    tensors = {k: v.numpy() for k, v in read.tensors.items()}
    end = Network(read.operations, tensors, 1e-9).forward(x.numpy())
    apart = np.linalg.norm(end.h - network.outputs.numpy(), axis=1)
    assert (apart + end.dh <= network.error.numpy()).all()
    assert (network.error.numpy() <= 40 * end.dh).all()


def test_deep_and_wide() -> None:
    """Widths 8-512-512-1: below the plain forward pass's worst case by hundreds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 1)).double()
    x = torch.randn(4, 8, dtype=D)
    read, network = bounded(net, x)
    assert isinstance(network, BoundedNetwork)
    tensors = {k: balls(v) for k, v in read.tensors.items()}
    h = balls(x)
    for i in (0, 2, 4):
        h = h @ tensors[f"{i}.weight"].T + tensors[f"{i}.bias"]
        h = h if i == 4 else np.frompyfunc(lambda z: z.tanh(), 1, 1)(h)
    error, plain = off(network.outputs, h), off(run(read.operations, read.tensors, x), h)
    assert (error <= network.error.numpy()).all()
    assert network.error.max() < 1e-13
    assert plain.max() < 1e-12
