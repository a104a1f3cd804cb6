"""The operations of a certificate: value and transposed map at its weights, each with a bound of its rounding error.

Shapes: N samples, C outputs, h (N, ...) the values between two operations, B (N, C, ...) the outputs' gradients there.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from surefoot.check.rounding import SMALLEST, Array, U, affine, gam, norm, norms, spectral_norm, up

Fields = dict[str, Any]
Tensors = dict[Any, Array]
Shape = tuple[int, ...]
NAMES = ("weight", "bias", "mean", "var")  # the fields that name tensors


class Refused(ValueError):
    """The files are no certificate of this format, or a condition could not be confirmed; the message says which."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Refused(message)


class State(NamedTuple):
    """What is known between two operations, for each sample; d is a direction with the norm a_l in operation l."""

    h: Array  # (N, ...): the values at the certificate's weights, as computed
    dh: Array  # (N,) >= ||computed - exact||
    e: Array  # (N, L): ||Dh d|| <= sum_l e_l a_l on the ball
    Q: Array  # (N, L, L): ||D^2h(d, d)|| <= a^T Q a on the ball
    move: Array  # (N,) >= R ||e||: how far h can move on the ball


class Share(NamedTuple):
    """How trainable U, u enter a value: as U A_t + u at each of T places t (a gain: U o A_t + u)."""

    A: Array  # (N, T, a)
    dA: Array  # (N,) >= ||computed - exact||_F
    k: float  # A moves by at most k times what h moves by, the map's norm by at most k ||U||
    ones: int  # what u adds to ||A||^2: T, or 0 where there is no u
    elementwise: bool = False


class Step(NamedTuple):
    """An operation at the certificate's weights."""

    h: Array
    dh: Array
    w: float  # a bound of the norm of its derivative in its argument
    back: Callable[[Array], Array]  # its transposed derivative
    off: Array | float  # ||computed back(B) - exact back(B)||_F <= off ||B||_F for each sample
    s2: float = 0.0  # an activation's Lipschitz constant of the derivative
    share: Share | None = None  # of weights


class Windows:
    """Windows on an image: tap (i, j) of window (p, q) is pixel (s1 p + d1 i - pad1, s2 q + d2 j - pad2), 0 outside."""

    def __init__(self, o: Fields, kernel: Shape, shape: Shape) -> None:
        self.size, self.places = shape[1:], places(o, kernel, shape)
        size, pixels = self.size, self.size[0] * self.size[1]
        each = zip(self.places, kernel, o["stride"], o.get("padding", (0, 0)), o.get("dilation", (1, 1)))
        y, x = (s * np.arange(t)[:, None] + d * np.arange(k) - p for t, k, s, p, d in each)  # (t1, k1), (t2, k2)
        y, x = y[:, None, :, None], x[None, :, None, :]
        inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
        self.seen = np.where(inside, y * size[1] + x, pixels).reshape(-1, kernel[0] * kernel[1])  # (T, taps)
        self.overlap = int(np.bincount(self.seen.ravel(), minlength=pixels + 1)[:-1].max())  # nu: windows on a pixel

    def patches(self, h: Array) -> Array:
        """Return the windows' contents: (N, c, height, width) -> (N, T, c k1 k2)."""
        flat = h.reshape(*h.shape[:2], -1)
        A = np.concatenate([flat, np.zeros_like(flat[..., :1])], 2)[:, :, self.seen]  # (N, c, T, taps)
        return A.transpose(0, 2, 1, 3).reshape(len(h), len(self.seen), -1)

    def spread(self, piece: Callable[[int], Array]) -> Array:
        """Add piece(tap), (..., T), up at the pixels that the tap sees: an image (..., height, width)."""
        first = piece(0)
        image = np.zeros_like(first, shape=(*first.shape[:-1], self.size[0] * self.size[1] + 1))
        for tap in range(self.seen.shape[1]):
            image[..., self.seen[:, tap]] += piece(tap)  # different windows, different pixels (but for those outside)
        return image[..., :-1].reshape(*first.shape[:-1], *self.size)


def places(o: Fields, kernel: Shape, shape: Shape) -> Shape:
    """Return how many windows fit into images (c, height, width), downwards and across; () if not any do."""
    each = zip(shape[1:], kernel, o["stride"], o.get("padding", (0, 0)), o.get("dilation", (1, 1)))
    fits = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)
    return fits if len(shape) == 3 and len(kernel) == 2 and min(fits) > 0 else ()


def flatten(o: Fields, tensors: Tensors, s: State) -> Step:
    return Step(s.h.reshape(len(s.h), -1), s.dh, 1.0, lambda B: B.reshape(*B.shape[:2], *s.h.shape[1:]), 0.0)


def scale(o: Fields, tensors: Tensors, s: State) -> Step:
    c = float(o["factor"])
    return Step(c * s.h, up(abs(c) * s.dh + U * norms(c * s.h)), abs(c), lambda B: c * B, 2 * U * abs(c))


def linear(o: Fields, tensors: Tensors, s: State) -> Step:
    W = tensors[o["weight"]]
    w, (h, off) = spectral_norm(W), affine(s.h, W, tensors.get(o["bias"], 0.0))
    share = Share(s.h[:, None], s.dh, 1.0, int(o["bias"] is not None))
    return Step(h, up(w * s.dh + off), w, lambda B: B @ W, gam(len(W) + 2) * norm(W), share=share)


def conv2d(o: Fields, tensors: Tensors, s: State) -> Step:
    """Return the cross-correlation: M times the windows' contents A, and ||A||_F <= sqrt(nu) ||h||."""
    W = tensors[o["weight"]]
    M, taps = W.reshape(len(W), -1), W.reshape(*W.shape[:2], -1).transpose(2, 0, 1).copy()  # (k1 k2, b, c)
    windows = Windows(o, W.shape[2:], s.h.shape[1:])
    A, root = windows.patches(s.h), float(up(math.sqrt(windows.overlap)))  # A (N, T, c k1 k2)
    z, off = affine(A, M, tensors.get(o["bias"], 0.0))
    w = float(up(min(root * spectral_norm(M), sum(map(spectral_norm, taps)) * (1 + gam(len(taps))))))

    def back(B: Array) -> Array:
        G = np.ascontiguousarray(B.reshape(*B.shape[:3], -1).swapaxes(2, 3))  # (N, C, T, b)
        return windows.spread(lambda tap: (G @ taps[tap]).swapaxes(2, 3))

    h = z.swapaxes(1, 2).reshape(len(z), len(W), *windows.places)
    share = Share(A, up(root * s.dh), root, A.shape[1] if o["bias"] is not None else 0)
    return Step(h, up(w * s.dh + off), w, back, gam(len(W) + windows.overlap + 4) * root * norm(W), share=share)


def batch_norm(o: Fields, tensors: Tensors, s: State) -> Step:
    """Return g x + b with x = (h - mean)/sqrt(var + eps), a channel each."""
    g, b, mean, var = (tensors[o[k]].reshape(1, -1, *[1] * (s.h.ndim - 2)) for k in NAMES)
    need(float((var + float(o["eps"])).min()) >= SMALLEST, "batch_norm: var + eps is not positive")
    root = np.sqrt(var + float(o["eps"]))
    x = (s.h - mean) / root
    A = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)  # (N, T, c)
    T, root_T = A.shape[1], math.sqrt(A.shape[1])
    k, w = float(up(1 / root.min())), float(up(np.max(np.abs(g) / root)))
    # h - mean, divided, multiplied, added: each a rounding; the mean itself may be larger than the difference.
    dx = up(k * s.dh + 8 * U * (norms(x) + k * (norms(s.h) + root_T * norm(mean))))
    dh = up(float(np.abs(g).max()) * dx + 8 * U * (norms(x * g) + root_T * norm(b)))
    return Step(x * g + b, dh, w, lambda B: B * (g / root)[:, None], 8 * U * w, share=Share(A, dx, k, T, True))


def avg_pool2d(o: Fields, tensors: Tensors, s: State) -> Step:
    windows, k = Windows(o, o["kernel"], s.h.shape[1:]), math.prod(o["kernel"])
    w = float(up(math.sqrt(windows.overlap / k)))
    sums = windows.patches(s.h.reshape(-1, 1, *s.h.shape[2:])).sum(2)
    h, off = sums.reshape(*s.h.shape[:2], *windows.places) / k, gam(k + 2) * w
    dh = up(w * s.dh + off * norms(s.h))
    return Step(h, dh, w, lambda B: windows.spread(lambda tap: B.reshape(*B.shape[:3], -1) / k), off)


def activation(o: Fields, tensors: Tensors, s: State) -> Step:
    """Return sigma entry by entry; a piecewise linear one may not change its slope on the ball."""
    name, flat = o["name"], s.h.reshape(len(s.h), -1)
    if name in ("relu", "leaky_relu"):
        slope = float(o.get("slope", 0.0))
        gap = np.abs(flat).min(1) - s.dh
        kept = bool(np.all(gap > up(s.move)))
        need(kept, f"{name}: an argument may change its sign on the ball; the smallest is {gap.min():.3g}")
        h, d = np.where(s.h > 0, s.h, slope * s.h), np.where(s.h > 0, 1.0, slope)
        s1, s2, relative, absolute, dd = max(1.0, abs(slope)), 0.0, 1.0, 0.0, 0.0
    else:
        value, derivative, s1, s2, relative, absolute = ACTIVATIONS[name]
        h, d = value(s.h), derivative(s.h)
        dd = up(s2 * s.dh + SLOPE)  # sigma' at the computed argument, and evaluated in floating point
    dh = up(s1 * s.dh + U * (relative * norms(h) + absolute * math.sqrt(flat.shape[1])))
    return Step(h, dh, s1, lambda B: B * d[:, None], up(dd + 2 * U * (s1 + dd)), s2)


def _normal(z: Array) -> Array:  # its distribution function
    return np.asarray(np.frompyfunc(math.erfc, 1, 1)(-z / math.sqrt(2)), np.float64) / 2


def _sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1 + e)


# sigma, sigma', s1 >= sup |sigma'|, s2 >= the Lipschitz constant of sigma', and r, a: sigma(z) as computed is off by
# at most u (r |sigma(z)| + a), sigma'(z) by SLOPE. exp, expm1, log1p, tanh, erfc are good to 8 units in the last place,
# 16 u. sigmoid: e to 16 u, 1 + e to 9 u, the quotient to 26 u. softplus: log1p(e) to 32 u. gelu: x = -z/sqrt 2 to 2 u,
# which moves z erfc(x)/2 by at most 4 u x^2 exp(-x^2) < 2 u; erfc and the product to 17 u. sigma' is made of at most
# four such functions and products of numbers below 2.
SLOPE, ROOT_2PI = 256 * U, math.sqrt(2 * math.pi)
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array], float, float, float, float]] = {
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2, 1.0, 0.7699, 16, 0),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z), 0.25, 0.0963, 32, 0),
    "softplus": (lambda z: np.logaddexp(0.0, z), _sigmoid, 1.0, 0.25, 40, 0),
    "gelu": (lambda z: z * _normal(z), lambda z: _normal(z) + z * np.exp(-z * z / 2) / ROOT_2PI, 1.13, 0.8, 32, 8),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * _sigmoid(-z)), 1.1, 0.5, 32, 0),
    "elu": (lambda z: np.maximum(z, np.expm1(np.minimum(z, 0))), lambda z: np.exp(np.minimum(z, 0)), 1, 1, 16, 0),
    "identity": (lambda z: z, np.ones_like, 1.0, 0.0, 0, 0),
}


def flattened(operations: list[Fields]) -> list[Fields]:
    """Return all operations in the order in which they are counted: depth first, a residual before its branch."""
    return [p for o in operations for p in (o, *flattened(o.get("branch", [])))]


AFFINE = "weight:text bias:text? trainable:flag"
CONV = AFFINE + " stride:pair padding:padding dilation:pair"
NORM = "weight:text bias:text mean:text var:text eps:number>=0 trainable:flag"
# op: its fields and their kinds (in `reading`); the shape it makes of x with weights of shape W, () if none; its rule
OPERATIONS: dict[str, tuple[str, Callable[[Fields, Shape, Shape], Shape], Callable[[Fields, Tensors, State], Step]]] = {
    "flatten": ("", lambda o, W, x: (math.prod(x),), flatten),
    "linear": (AFFINE, lambda o, W, x: W[:1] if W[1:] == x[:1] == x else (), linear),
    "conv2d": (CONV, lambda o, W, x: W[:1] + p if W[1:2] == x[:1] and (p := places(o, W[2:], x)) else (), conv2d),
    "batch_norm": (NORM, lambda o, W, x: x if x[:1] == W and len(x) in (1, 3) else (), batch_norm),
    "activation": ("name:activation", lambda o, W, x: x, activation),
    "avg_pool2d": (
        "kernel:pair stride:pair",
        lambda o, W, x: (p := places(o, o["kernel"], x)) and x[:1] + p,
        avg_pool2d,
    ),
    "scale": ("factor:number", lambda o, W, x: x, scale),
}
