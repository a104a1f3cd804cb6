"""The networks of `tangent.py`, in torch and, with the same weights stored the way JAX likes them, in JAX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Layer:
    """The sizes of a layer's matrix products for one sample."""

    T: int  # places
    a: int  # inputs
    b: int  # outputs


@dataclass
class Case:
    """A network and its samples, in float64; `twin(x)` returns the same for JAX: f(params, x), params, x."""

    title: str
    model: nn.Module
    x: Tensor  # (N, ...)
    twin: Callable[[Tensor], tuple[Callable[..., Any], Any, Any]] | None
    outputs: int = 10
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.double()
        self.layers = layer_sizes(self.model, self.x)

    def part(self, n: int) -> Case:
        """Return the same network with the first n samples."""
        return Case(self.title, self.model, self.x[:n], self.twin, self.outputs)

    @property
    def parameters(self) -> int:
        """The number of parameters: P."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def jacobian_bytes(self) -> int:
        """What the Jacobian takes: 8 N C P."""
        return 8 * len(self.x) * self.outputs * self.parameters


def layer_sizes(model: nn.Module, x: Tensor) -> list[Layer]:
    """Return the sizes of all dense and convolutional layers, those inside attention too."""
    found: list[Layer] = []

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(module, nn.Linear):
            found.append(Layer(args[0][0].numel() // module.in_features, module.in_features, module.out_features))
        elif isinstance(module, nn.Conv2d):
            found.append(Layer(out[0, 0].numel(), module.weight[0].numel(), module.out_channels))
        elif isinstance(module, nn.MultiheadAttention):
            T, d = args[0].shape[1], module.embed_dim
            found.extend([Layer(T, d, 3 * d), Layer(T, d, d)])

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    with torch.no_grad():
        model(x[:1])
    for handle in handles:
        handle.remove()
    return found


def digits(n: int) -> Tensor:
    """Return n handwritten digits, (n, 64); past the 1,797 there are, repeated with a little noise."""
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data)[torch.arange(n) % 1797] / 16
    return x + 1e-2 * (torch.arange(n) // 1797)[:, None] * torch.randn(n, 64, dtype=torch.float64)


def mlp(title: str, sizes: tuple[int, ...], x: Tensor) -> Case:
    """Return a ReLU network of dense layers."""
    dense = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*[m for layer in dense for m in (layer, nn.ReLU())][:-1])

    def twin(x: Tensor) -> tuple[Callable[..., Any], Any, Any]:
        import jax
        from jax import numpy as jnp

        def f(params: Any, x: Any) -> Any:
            for W, b in params[:-1]:
                x = jax.nn.relu(x @ W + b)
            return x @ params[-1][0] + params[-1][1]

        return f, [(jnp.array(m.weight.detach().T), jnp.array(m.bias.detach())) for m in dense], jnp.array(x)

    return Case(title, model, x, twin)


def cnn(title: str, channels: tuple[int, ...], strides: tuple[int, ...], x: Tensor) -> Case:
    """Return 3x3 convolutions with ReLU, the mean over the map and a dense layer."""
    convs = [nn.Conv2d(a, b, 3, s, 1) for a, b, s in zip(channels, channels[1:], strides)]
    head = nn.Linear(channels[-1], 10)
    model = nn.Sequential(
        *[m for conv in convs for m in (conv, nn.ReLU())], nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    )

    def twin(x: Tensor) -> tuple[Callable[..., Any], Any, Any]:
        import jax
        from jax import numpy as jnp

        # XLA has no quick float64 convolution for CPUs (10 s where this takes 0.3 s): nine slices and a
        # matrix product.
        def f(params: Any, x: Any) -> Any:
            for (W, b), s in zip(params, strides):
                h, w = x.shape[1:3]
                x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
                patches = [x[:, i : i + h : s, j : j + w : s] for i in range(3) for j in range(3)]
                x = jax.nn.relu(jnp.concatenate(patches, -1) @ W + b)
            return x.mean((1, 2)) @ params[-1][0] + params[-1][1]

        params = [
            (jnp.array(m.weight.detach().permute(2, 3, 1, 0).flatten(0, 2)), jnp.array(m.bias.detach())) for m in convs
        ]
        params.append((jnp.array(head.weight.detach().T), jnp.array(head.bias.detach())))
        return f, params, jnp.array(x.permute(0, 2, 3, 1))

    return Case(title, model, x, twin)


class Mean(nn.Module):
    """The mean over the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, d) -> (N, d)."""
        return x.mean(1)


def transformer(title: str, d: int, heads: int, blocks: int, x: Tensor) -> Case:
    """Return torch's own encoder blocks (norm first, GELU, no dropout), the mean over the places and a dense layer."""
    block = [
        nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
        for _ in range(blocks)
    ]
    head = nn.Linear(d, 10)
    model = nn.Sequential(*block, Mean(), head)

    def twin(x: Tensor) -> tuple[Callable[..., Any], Any, Any]:
        import jax
        from jax import numpy as jnp

        def norm(x: Any, gain: Any, bias: Any) -> Any:
            x = x - x.mean(-1, keepdims=True)
            return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain + bias

        def dense(x: Any, layer: tuple[Any, Any]) -> Any:
            return x @ layer[0] + layer[1]

        def f(params: Any, x: Any) -> Any:
            N, T, _ = x.shape
            for p in params[:-1]:
                h = norm(x, *p["norm1"])
                q, k, v = (
                    dense(h, p[name]).reshape(N, T, heads, d // heads).transpose(0, 2, 1, 3) for name in ("q", "k", "v")
                )
                weights = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / (d // heads) ** 0.5, axis=-1)
                x = x + dense((weights @ v).transpose(0, 2, 1, 3).reshape(N, T, d), p["out"])
                x = x + dense(jax.nn.gelu(dense(norm(x, *p["norm2"]), p["up"]), approximate=False), p["down"])
            return dense(x.mean(1), params[-1])

        def array(t: Tensor) -> Any:
            return jnp.array(t.detach())

        def pair(layer: nn.Linear) -> tuple[Any, Any]:
            return array(layer.weight.T), array(layer.bias)

        params: list[Any] = []
        for b in block:
            W, c = b.self_attn.in_proj_weight, b.self_attn.in_proj_bias
            found = {n: (array(w.T), array(v)) for n, w, v in zip("qkv", W.chunk(3), c.chunk(3))}
            found |= {"out": pair(b.self_attn.out_proj), "up": pair(b.linear1), "down": pair(b.linear2)}
            found |= {n: (array(m.weight), array(m.bias)) for n, m in (("norm1", b.norm1), ("norm2", b.norm2))}
            params.append(found)
        return f, [*params, pair(head)], jnp.array(x)

    return Case(title, model, x, twin)


def resnet20(title: str, n: int) -> Case:
    """Return the library's ResNet-20 in eval mode; no rival is asked."""
    from surefoot.models.resnet import resnet20 as build

    return Case(title, build((3, 32, 32), 10).eval(), torch.randn(n, 3, 32, 32, dtype=torch.float64), None)


def noise(*shape: int) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


CASES: dict[str, Callable[[], Case]] = {
    "mlp64": lambda: mlp("MLP 64-256-256-10, N=128", (64, 256, 256, 10), digits(128)),
    "mlp784-64": lambda: mlp("MLP 784-512-512-10, N=64", (784, 512, 512, 10), noise(64, 784)),
    "mlp784-128": lambda: mlp("MLP 784-512-512-10, N=128", (784, 512, 512, 10), noise(128, 784)),
    "cnn-digits": lambda: cnn(
        "CNN 1-16-32-32 on 8x8 digits, N=32", (1, 16, 32, 32), (1, 2, 1), digits(32).view(-1, 1, 8, 8)
    ),
    "cnn-wide": lambda: cnn(
        "CNN 3-32-64-128-256 on 16 to 4 px, N=32", (3, 32, 64, 128, 256), (1, 1, 2, 2), noise(32, 3, 16, 16)
    ),
    "transformer": lambda: transformer("2 encoder blocks, d=64, T=16, N=32", 64, 4, 2, noise(32, 16, 64)),
    "resnet20": lambda: resnet20("ResNet-20, 256 images of 3x32x32", 256),
}
