"""Small networks for the tests of certificates, and what is true of them by automatic differentiation."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from surefoot.certificates.bounds import BoundedNetwork
from surefoot.certificates.layers import Layers, read_layers, run

D = torch.float64


class Block(nn.Module):
    """x + tanh(bn(conv(x))), a forward of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.conv(x)))


class Skip(nn.Module):
    """Dense with a skip and a factor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.outer(torch.tanh(self.inner(x)))


def settle(net: nn.Module) -> nn.Module:
    """Give batch norm statistics and gains that are no special case; float64, eval mode."""
    generator = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight, 0.5), (m.bias, -0.5)):
                assert t is not None
                t.data.copy_(low + torch.rand(t.shape, generator=generator))
    return net.double().eval()


def dense(activation: nn.Module, *, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), activation, nn.Linear(4, 2, bias=bias))


# name -> (network, shape of a sample)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        type(a).__name__: (lambda a=a: dense(a), (3,))
        for a in (nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.GELU(), nn.SiLU(), nn.ELU())
    },
    "linear, no bias": (lambda: dense(nn.Tanh(), bias=False), (3,)),
    "three layers": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)),
        (3,),
    ),
    "skip and scale": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Skip(4), nn.Linear(4, 2)), (3,)),
    "batch norm 1d": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        (3,),
    ),
    "conv, padding": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)),
        (1, 4, 4),
    ),
    "conv, stride": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2, stride=2), nn.Tanh(), nn.Conv2d(2, 2, 2, bias=False), nn.Flatten(), nn.Linear(2, 1)
        ),
        (1, 4, 4),
    ),
    "conv, dilation": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, (2, 3), stride=(1, 2), dilation=(2, 1)), nn.SiLU(), nn.Flatten()),
        (2, 4, 5),
    ),
    "overlapping pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(3, 1), nn.Flatten(), nn.Linear(8, 2)
        ),
        (1, 4, 4),
    ),
    "residual with batch norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), Block(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 1)),
        (1, 3, 3),
    ),
}


def small(name: str, samples: int = 3) -> tuple[nn.Module, Tensor]:
    """A network of `NETS` and inputs for it."""
    make, shape = NETS[name]
    torch.manual_seed(3)
    net = settle(make())
    return net, torch.randn(samples, *shape, dtype=D)


def bounded(net: nn.Module, x: Tensor) -> tuple[Layers, BoundedNetwork]:
    read = read_layers(net, x[:1])
    return read, BoundedNetwork(read.operations, read.tensors, x)


class Flat:
    """F as a function of all trainable numbers in one vector."""

    def __init__(self, read: Layers, x: Tensor) -> None:
        self.read, self.x = read, x
        self.shapes = [read.tensors[n].shape for n in read.parameters]
        self.w0 = torch.cat([read.tensors[n].flatten() for n in read.parameters])

    def __call__(self, w: Tensor) -> Tensor:
        parts = torch.split(w, [math.prod(s) for s in self.shapes])
        named = {n: p.view(s) for n, p, s in zip(self.read.parameters, parts, self.shapes)}
        return run(self.read.operations, {**self.read.tensors, **named}, self.x).flatten()

    def jacobian(self, w: Tensor) -> Tensor:
        found = torch.autograd.functional.jacobian(self, w)
        assert isinstance(found, Tensor)
        return found

    def curvature(self, w: Tensor, restarts: int = 2, steps: int = 12) -> float:
        """The largest ||D^2 F(w)(v, v)|| over unit v that is found, by a fixed-point iteration."""
        best = 0.0
        H = torch.stack([torch.autograd.functional.hessian(lambda u, k=k: self(u)[k], w) for k in range(len(self(w)))])
        for _ in range(restarts):
            v = torch.randn(len(w), dtype=D)
            v /= v.norm()
            for _ in range(steps):
                z = torch.einsum("kij,i,j->k", H, v, v)
                best = max(best, float(z.norm()))
                values, vectors = torch.linalg.eigh(torch.einsum("kij,k->ij", H, z))
                v = vectors[:, int(values.abs().argmax())]
        return best

    def points(self, R: float, count: int = 4) -> list[Tensor]:
        """The centre and points on the sphere of radius R, one of them towards larger weights."""
        away = [self.w0] + [torch.randn_like(self.w0) for _ in range(count - 1)]
        return [self.w0] + [self.w0 + R * d / d.norm() for d in away]
