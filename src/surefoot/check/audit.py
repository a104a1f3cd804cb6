"""The second opinion: claims of a certificate repeated in ball arithmetic (Arb, by python-flint).

The scalar claims always; of a small network the residual and the smallest singular value too, from an evaluation of the
network in balls of 256 bits: K - s0^2 I is positive definite if every pivot of its ball Cholesky factor is positive.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from surefoot.check.network import Operations
from surefoot.check.operations import Unproved
from surefoot.check.reading import Certificate
from surefoot.check.rounding import Array
from surefoot.check.verify import Line
from surefoot.check.windows import Windows

BITS, LARGEST_N, WORK = 256, 300, 10**8


def audit_claims(certificate: Certificate) -> tuple[list[Line], str]:
    """Return the repeated claims and, in words, what was repeated.

    Raises:
        ModuleNotFoundError: python-flint is not installed.
    """
    with _precision(8 * BITS):
        lines = list(_scalars(certificate)) if certificate.document["loss"] == "squared error" else []
    N, C = certificate.targets.shape
    P = sum(x.size for x in certificate.tensors.values()) - certificate.inputs.size - certificate.targets.size
    if N * C > LARGEST_N or (N * C) ** 2 * P > WORK:
        return lines, f"audit: scalar claims audited only, the network is too large ({N * C} values, {P:,} numbers)"
    with _precision(BITS):
        lines += _network(certificate)
    return lines, f"audit: {', '.join(line.claim for line in lines)} repeated in ball arithmetic"


def _scalars(certificate: Certificate) -> Iterator[Line]:
    from flint import arb

    c = {name: arb(value) for name, value in certificate.claims.items()}
    rho, s0, L, beta, eps, S = (c[k] for k in ("residual", "sigma_min", "jacobian_norm", "beta", "epsilon", "radius"))
    lr, n = arb(float(certificate.document["units"]["lr_max"])), certificate.targets.size
    rules = {
        "q": c["q"] >= beta * rho / s0**2,
        "epsilon": 0 < eps < 1,
        "ball": c["ball"] >= S,
        "radius": beta * S < s0 and (1 - eps) * (s0 * S - beta * S**2 / 2) >= rho,
        "sigma_star": 0 < c["sigma_star"] <= s0 - beta * S,
        "eta_max": 0 < c["eta_max"] <= 2 * eps / (L**2 + beta * rho),
    }
    for name, holds in rules.items():
        yield Line(name, certificate.claims[name], bool(holds), "in ball arithmetic")
    yield Line("lr_max", float(lr), bool(lr <= c["eta_max"] * n / 2), "in ball arithmetic")


def _network(certificate: Certificate) -> list[Line]:
    from flint import arb, arb_mat

    claims, y = certificate.claims, certificate.targets
    N, C = y.shape
    tensors = {name: _balls(x) for name, x in certificate.tensors.items()}
    end, back = _run(certificate.document["network"], tensors, tensors[certificate.document["data"]["inputs"]])
    _, parts = back(np.broadcast_to(_balls(np.eye(C)), (N, C, C)))
    J = arb_mat(np.concatenate([x.reshape(N * C, -1) for x in parts], 1).tolist())
    K = np.array((J * J.transpose()).tolist(), dtype=object)
    s0 = arb(claims["sigma_min"])
    lines = [Line("sigma_min", claims["sigma_min"], _positive_definite(K, s0 * s0), "in ball arithmetic")]
    if "residual" in claims:
        r = (end - tensors[certificate.document["data"]["targets"]]).ravel()
        rho = sum((x * x for x in r), arb(0)).sqrt()
        text = f"in ball arithmetic: {float(rho.mid()):.17g}"
        lines.append(Line("residual", claims["residual"], bool(rho <= arb(claims["residual"])), text))
    return lines


def _positive_definite(K: Array, t: Any) -> bool:
    """Whether K - t I is: elimination with balls, every pivot of which is certainly positive."""
    n = len(K)
    S = K - t * np.eye(n, dtype=int).astype(object)
    for i in range(n):
        if not S[i, i] > 0:
            return False
        S[i + 1 :, i + 1 :] -= np.outer(S[i + 1 :, i] / S[i, i], S[i, i + 1 :])
    return True


Back = Callable[[Array], tuple[Array, list[Array]]]  # gradients (N, C, ...) -> those before, parts (N, C, any) of J


def _run(operations: Operations, tensors: dict[str, Array], h: Array) -> tuple[Array, Back]:
    """Return the value after the operations and the way back."""
    backs: list[Back] = []
    for o in operations:
        if o["op"] == "residual":
            end, branch = _run(o["branch"], tensors, h)
            h = h + end
            backs.append(_beside(branch))
        else:
            h, back = _RULES[o["op"]](o, tensors, h)
            backs.append(back)

    def all_back(B: Array) -> tuple[Array, list[Array]]:
        parts: list[Array] = []
        for back in reversed(backs):
            B, more = back(B)
            parts += more
        return B, parts

    return h, all_back


def _beside(branch: Back) -> Back:
    def back(B: Array) -> tuple[Array, list[Array]]:
        G, parts = branch(B)
        return B + G, parts

    return back


def _flatten(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    return h.reshape(len(h), -1), lambda B: (B.reshape(*B.shape[:2], *h.shape[1:]), [])


def _scale(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    from flint import arb

    c = arb(float(o["factor"]))
    return h * c, lambda B: (B * c, [])


def _linear(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    W = tensors[o["weight"]]

    def back(B: Array) -> tuple[Array, list[Array]]:
        parts = [B[..., None] * h[:, None, None, :], *([B] if o["bias"] else [])] if o["trainable"] else []
        return B @ W, [x.reshape(*B.shape[:2], -1) for x in parts]

    return h @ W.T + (tensors[o["bias"]] if o["bias"] else 0), back


def _conv2d(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    W = tensors[o["weight"]]
    windows = Windows(W.shape[2:], o["stride"], o["padding"], o["dilation"])
    A = windows.patches(h)
    z = (A @ W.reshape(len(W), -1).T + (tensors[o["bias"]] if o["bias"] else 0)).swapaxes(1, 2)

    def back(B: Array) -> tuple[Array, list[Array]]:
        G = B.reshape(*B.shape[:3], -1)  # (N, C, b, T)
        parts = [G @ A[:, None], *([G.sum(3)] if o["bias"] else [])] if o["trainable"] else []

        def piece(i: int, j: int) -> Array:
            return (W[:, :, i, j].T @ G).reshape(*B.shape[:2], -1, *B.shape[3:])

        below = windows.spread((*B.shape[:2], *h.shape[1:]), piece, object)
        return below, [x.reshape(*B.shape[:2], -1) for x in parts]

    return z.reshape(*z.shape[:2], *windows.positions(h.shape[2:])), back


def _batch_norm(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    from flint import arb

    each = (tensors[o[k]].reshape(1, -1, *[1] * (h.ndim - 2)) for k in ("weight", "bias", "mean", "var"))
    g, b, mean, var = each
    root = np.frompyfunc(lambda v: (v + arb(float(o["eps"]))).sqrt(), 1, 1)(var)
    x = (h - mean) / root

    def back(B: Array) -> tuple[Array, list[Array]]:
        G, T = B.reshape(*B.shape[:3], -1), x.reshape(*x.shape[:2], -1)
        parts = [(G * T[:, None]).sum(3), G.sum(3)] if o["trainable"] else []
        return B * (g / root)[:, None], parts

    return x * g + b, back


def _avg_pool2d(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    windows = Windows(o["kernel"], o["stride"])
    k = int(np.prod(o["kernel"]))
    means = windows.patches(h.reshape(-1, 1, *h.shape[2:])).sum(2) / k

    def back(B: Array) -> tuple[Array, list[Array]]:
        return windows.spread((*B.shape[:2], *h.shape[1:]), lambda i, j: B / k, object), []

    return means.reshape(*h.shape[:2], *windows.positions(h.shape[2:])), back


def _activation(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    both = np.frompyfunc(_sigma(o), 1, 2)
    value, derivative = both(h)
    return value, lambda B: (B * derivative[:, None], [])


def _sigma(o: Any) -> Callable[[Any], tuple[Any, Any]]:
    """Return z -> sigma(z), sigma'(z)."""
    from flint import arb

    def sigmoid(z: Any) -> Any:
        return 1 / (1 + (-z).exp())

    def normal(z: Any) -> Any:
        return (-z / arb(2).sqrt()).erfc() / 2

    def density(z: Any) -> Any:
        return (-z * z / 2).exp() / (2 * arb.pi()).sqrt()

    def kinked(slope: float) -> Callable[[Any], tuple[Any, Any]]:
        def sigma(z: Any) -> tuple[Any, Any]:
            if not (z > 0 or z < 0):
                raise Unproved(f"audit: an argument of {o['name']} is too near to 0")
            return (z, arb(1)) if z > 0 else (arb(slope) * z, arb(slope))

        return sigma

    def elu(z: Any) -> tuple[Any, Any]:
        if not (z > 0 or z <= 0):
            raise Unproved("audit: an argument of elu is too near to 0")
        return (z, arb(1)) if z > 0 else (z.expm1(), z.exp())

    functions: dict[str, Callable[[Any], tuple[Any, Any]]] = {
        "tanh": lambda z: (z.tanh(), 1 - z.tanh() ** 2),
        "sigmoid": lambda z: (sigmoid(z), sigmoid(z) * sigmoid(-z)),
        "softplus": lambda z: (z.exp().log1p(), sigmoid(z)),
        "gelu": lambda z: (z * normal(z), normal(z) + z * density(z)),
        "silu": lambda z: (z * sigmoid(z), sigmoid(z) * (1 + z * sigmoid(-z))),
        "elu": elu,
        "identity": lambda z: (z, arb(1)),
        "relu": kinked(0.0),
        "leaky_relu": kinked(float(o.get("slope", 0.0))),
    }
    return functions[o["name"]]


_RULES: dict[str, Callable[[Any, Any, Array], tuple[Array, Back]]] = {
    "flatten": _flatten,
    "scale": _scale,
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "avg_pool2d": _avg_pool2d,
    "activation": _activation,
}


def _balls(x: Array) -> Array:
    from flint import arb

    return np.asarray(np.frompyfunc(lambda v: arb(float(v)), 1, 1)(x))


@contextmanager
def _precision(bits: int) -> Iterator[None]:
    from flint import ctx

    before, ctx.prec = ctx.prec, bits
    try:
        yield
    finally:
        ctx.prec = before
