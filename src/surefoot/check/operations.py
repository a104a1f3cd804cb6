"""The operations of a certificate: value and transposed map at its weights, each with a bound of its rounding error.

Shapes: N samples, C outputs, h (N, ...) the values between two operations, B (N, C, ...) the outputs' gradients there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surefoot.check.cholesky import spectral_norm
from surefoot.check.rounding import ULPS, Array, U, gam, norm, norms, up
from surefoot.check.windows import Windows

Fields = Mapping[str, Any]
Tensors = Mapping[str, Array]


class Unproved(Exception):
    """A condition of the certificate could not be confirmed."""


@dataclass(frozen=True)
class State:
    """What is known between two operations, for each sample; d is a direction with the norm a_l in operation l."""

    h: Array  # (N, ...): the values at the certificate's weights, as computed
    dh: Array  # (N,) >= ||computed - exact||
    e: Array  # (N, L): ||Dh d|| <= sum_l e_l a_l on the ball
    Q: Array  # (N, L, L): ||D^2h(d, d)|| <= a^T Q a on the ball
    size: Array  # (N,) >= ||exact h||
    move: Array  # (N,) >= R ||e||: how far h can move on the ball


@dataclass(frozen=True)
class Share:
    """How trainable U, u enter a value: as U A_t + u at each of T places t (a gain: U o A_t + u)."""

    A: Array  # (N, T, a)
    dA: Array  # (N,) >= ||computed - exact||_F
    k: float  # A moves by at most k times what h moves by, the map's norm by at most k ||U||
    bias: bool = True  # whether there is u
    elementwise: bool = False


@dataclass(frozen=True)
class Step:
    """An operation at the certificate's weights."""

    h: Array
    dh: Array
    w: float  # a bound of the norm of its derivative in its argument
    back: Callable[[Array], Array]  # its transposed derivative
    off: Array | float  # ||computed back(B) - exact back(B)||_F <= off ||B||_F for each sample
    s2: float = 0.0  # an activation's Lipschitz constant of the derivative
    share: Share | None = None  # of weights


def flatten(f: Fields, tensors: Tensors, s: State) -> Step:
    """Return h as one vector."""
    shape = s.h.shape[1:]
    return Step(s.h.reshape(len(s.h), -1), s.dh, 1.0, lambda B: B.reshape(*B.shape[:2], *shape), 0.0)


def scale(f: Fields, tensors: Tensors, s: State) -> Step:
    """Return a fixed multiple."""
    c = float(f["factor"])
    w = abs(c)
    return Step(c * s.h, up(w * s.dh + U * w * s.size), w, lambda B: c * B, 2 * U * w)


def linear(f: Fields, tensors: Tensors, s: State) -> Step:
    """Return W h + b."""
    W, b = tensors[f["weight"]], _bias(f, tensors)
    w, F = spectral_norm(W), norm(W)
    dh = up(w * s.dh + gam(W.shape[1] + 2) * (F * s.size + norm(b)))
    share = Share(s.h[:, None], s.dh, 1.0, f["bias"] is not None)
    return Step(s.h @ W.T + b, dh, w, lambda B: B @ W, gam(len(W) + 2) * F, share=share)


def conv2d(f: Fields, tensors: Tensors, s: State) -> Step:
    """Return the cross-correlation: M times the windows' contents A, and ||A||_F <= sqrt(nu) ||h||."""
    W, b = tensors[f["weight"]], _bias(f, tensors)
    M = W.reshape(len(W), -1)
    windows = Windows(W.shape[2:], f["stride"], f["padding"], f["dilation"])
    A, root, F = windows.patches(s.h), float(up(math.sqrt(windows.overlap))), norm(W)  # A (N, T, c k1 k2)
    z = (A @ M.T + b).swapaxes(1, 2)
    taps = sum(spectral_norm(W[:, :, i, j]) for i, j in np.ndindex(*W.shape[2:]))
    w = min(float(up(root * spectral_norm(M))), float(up(taps * (1 + gam(W.size)))))
    dh = up(w * s.dh + gam(M.shape[1] + 2) * (F * root * s.size + math.sqrt(A.shape[1]) * norm(b)))

    def back(B: Array) -> Array:
        G = np.ascontiguousarray(B.reshape(*B.shape[:3], -1).swapaxes(2, 3))  # (N, C, T, b)

        def piece(i: int, j: int) -> Array:
            return (G @ np.ascontiguousarray(W[:, :, i, j])).swapaxes(2, 3).reshape(*B.shape[:2], -1, *B.shape[3:])

        return windows.spread((*B.shape[:2], *s.h.shape[1:]), piece)

    h = z.reshape(*z.shape[:2], *windows.positions(s.h.shape[2:]))
    share = Share(A, up(root * s.dh), root, f["bias"] is not None)
    return Step(h, dh, w, back, gam(len(W) + windows.overlap + 4) * root * F, share=share)


def batch_norm(f: Fields, tensors: Tensors, s: State) -> Step:
    """Return g x + b with x = (h - mean)/sqrt(var + eps), a channel each."""
    each = (tensors[f[k]].reshape(1, -1, *[1] * (s.h.ndim - 2)) for k in ("weight", "bias", "mean", "var"))
    g, b, mean, var = each
    root = np.sqrt(var + float(f["eps"]))
    x = (s.h - mean) / root
    A = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)  # (N, T, c)
    T = math.sqrt(A.shape[1])
    k, w = float(up(1 / root.min())), float(up(np.max(np.abs(g) / root)))
    # h - mean, divided, multiplied, added: each a rounding; the mean itself may be larger than the difference.
    dx = up(k * s.dh + 8 * U * (norms(x) + k * (s.size + T * norm(mean))))
    dh = up(float(np.abs(g).max()) * dx + 8 * U * (norms(x * g) + T * norm(b)))
    factor = (g / root)[:, None]
    return Step(x * g + b, dh, w, lambda B: B * factor, 8 * U * w, share=Share(A, dx, k, elementwise=True))


def avg_pool2d(f: Fields, tensors: Tensors, s: State) -> Step:
    """Return the means over windows."""
    windows, shape = Windows(f["kernel"], f["stride"]), s.h.shape[1:]
    k = math.prod(windows.kernel)
    w = float(up(math.sqrt(windows.overlap / k)))
    sums = windows.patches(s.h.reshape(-1, 1, *shape[1:])).sum(2)
    h = sums.reshape(*s.h.shape[:2], *windows.positions(shape[1:])) / k
    off = gam(k + 2) * w

    def back(B: Array) -> Array:
        part = B / k
        return windows.spread((*B.shape[:2], *shape), lambda i, j: part)

    return Step(h, up(w * s.dh + off * s.size), w, back, off)


def activation(f: Fields, tensors: Tensors, s: State) -> Step:
    """Return sigma entry by entry; a piecewise linear one may not change its slope on the ball."""
    name, flat = f["name"], s.h.reshape(len(s.h), -1)
    if name in ("relu", "leaky_relu"):
        slope = float(f.get("slope", 0.0))
        gap = np.abs(flat).min(1) - s.dh
        if not np.all(gap > up(s.move)):
            raise Unproved(f"{name}: an argument may change its sign on the ball; the smallest is {gap.min():.3g}")
        h, d = np.where(s.h > 0, s.h, slope * s.h), np.where(s.h > 0, 1.0, slope)
        s1, s2, dd = max(1.0, abs(slope)), 0.0, 0.0
    else:
        value, derivative, s1, s2 = ACTIVATIONS[name]
        h, d = value(s.h), derivative(s.h)
        # sigma' at the computed argument, and evaluated in floating point (z exp(-z^2/2) and its like stay below 2)
        dd = up(s2 * s.dh + 4 * ULPS)
    dh = up(s1 * s.dh + ULPS * (norms(h) + math.sqrt(flat.shape[1])))
    return Step(h, dh, s1, lambda B: B * d[:, None], up(dd + 2 * U * (s1 + dd)), s2)


RULES = {f.__name__: f for f in (flatten, scale, linear, conv2d, batch_norm, avg_pool2d, activation)}


def _bias(f: Fields, tensors: Tensors) -> Array:
    return np.zeros(1) if f["bias"] is None else tensors[f["bias"]]


def _normal(z: Array) -> Array:  # its distribution function
    return np.asarray(np.frompyfunc(math.erfc, 1, 1)(-z / math.sqrt(2)), np.float64) / 2


def _density(z: Array) -> Array:
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1 + e)


def _elu(z: Array) -> Array:
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


# sigma, sigma', s1 >= sup |sigma'|, s2 >= the Lipschitz constant of sigma'. sigma(z) is off by at most
# ULPS (1 + |sigma(z)|), sigma'(z) by at most 4 ULPS.
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array], float, float]] = {
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2, 1.0, 0.7699),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z), 0.25, 0.0963),
    "softplus": (lambda z: np.logaddexp(0.0, z), _sigmoid, 1.0, 0.25),
    "gelu": (lambda z: z * _normal(z), lambda z: _normal(z) + z * _density(z), 1.13, 0.8),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * _sigmoid(-z)), 1.1, 0.5),
    "elu": (_elu, lambda z: np.exp(np.minimum(z, 0)), 1.0, 1.0),
    "identity": (lambda z: z, np.ones_like, 1.0, 0.0),
}
