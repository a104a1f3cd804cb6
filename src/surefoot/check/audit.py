"""The second opinion: the claims of a certificate repeated in ball arithmetic (Arb, by python-flint).

The claims that follow from others always; of a small network the rest too, from an evaluation of the network in balls
of 256 bits: A - t I is positive definite if every pivot of its ball Cholesky factor is positive. That is s_min(J) >= s0
for A = K, t = s0^2, and ||W|| <= s for A = -W^T W, t = -s^2; beta and the Jacobian's norm go by the format's table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from surefoot.check.operations import ACTIVATIONS, Fields, Refused, Windows
from surefoot.check.reading import Certificate
from surefoot.check.rounding import Array
from surefoot.check.verify import Line

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
    matrices = [x.reshape(len(x), -1).shape for x in certificate.tensors.values() if x.ndim > 1]
    if N * C > LARGEST_N or (N * C) ** 2 * P + sum(min(shape) ** 3 for shape in matrices) > WORK:
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

    claims, (N, C) = certificate.claims, certificate.targets.shape
    operations, data = certificate.document["network"], certificate.document["data"]
    tensors = {name: _balls(x) for name, x in certificate.tensors.items()}
    x, y = tensors[data["inputs"]], tensors[data["targets"]]
    end, back = _run(operations, tensors, x)
    _, parts = back(np.broadcast_to(_balls(np.eye(C)), (N, C, C)))
    J = arb_mat(np.concatenate([part.reshape(N * C, -1) for part in parts], 1).tolist())
    K = np.array((J * J.transpose()).tolist(), dtype=object)
    s0 = arb(claims["sigma_min"])
    lines = [Line("sigma_min", claims["sigma_min"], _positive_definite(K, s0 * s0), "in ball arithmetic")]
    if "residual" not in claims:
        return lines
    R = arb(claims["ball"])
    state = _state(operations, tensors, (x, _zeros(N, len(parts)), _zeros(N, len(parts), len(parts))), R, 0)[0]
    beta = _norm(np.array([_top_eigenvalue(Q) for Q in state[2]], dtype=object))
    rest = arb(claims["jacobian_norm"]) - beta * R  # s_max(J) <= rest at the weights is enough, whatever e says
    reach = _norm(state[1])
    near = bool(rest > 0) and _positive_definite(-K, -rest * rest)
    for name, found, holds in (
        ("residual", _norm(end - y), False), ("jacobian_norm", reach, near), ("beta", beta, False)
    ):  # fmt: skip
        text = f"in ball arithmetic: {float(found.mid()):.17g}"
        lines.append(Line(name, claims[name], holds or bool(found <= arb(claims[name])), text))
    return lines


State = tuple[Array, Array, Array]  # h (N, ...), e (N, L), Q (N, L, L), as the format defines them


def _state(operations: list[Fields], tensors: dict[str, Array], s: State, R: Any, slot: int) -> tuple[State, int]:
    """Take the state of the ball of radius R through the operations, the first trainable one of which is u_slot."""
    for o in operations:
        h, e, Q = s
        if o["op"] == "residual":
            (end, f, P), slot = _state(o["branch"], tensors, s, R, slot)
            s = h + end, e + f, Q + P
            continue
        w, s2, k, A, T = _constants(o, tensors, h)
        lengths = np.array([_norm(row) for row in e], dtype=object)
        if o.get("name") in ("relu", "leaky_relu"):
            for z, move in zip(h.reshape(len(h), -1), R * lengths):
                if not all(abs(v) > move for v in z):
                    raise Refused(f"audit: an argument of {o['name']} may change its sign on the ball")
        trainable = bool(o.get("trainable"))
        w = w + k * R if trainable else w
        f, P = w * e, w * Q + s2 * e[:, :, None] * e[:, None, :]
        if trainable:
            reach = np.array([_norm(a) for a in A], dtype=object) + k * R * lengths
            f[:, slot] += np.array([(x * x + T).sqrt() for x in reach], dtype=object)
            P[:, slot, :] += k * e
            P[:, :, slot] += k * e
            slot += 1
        s = _RULES[o["op"]](o, tensors, h)[0], f, P
    return s, slot


def _constants(o: Any, tensors: dict[str, Array], h: Array) -> tuple[Any, float, Any, Array, int]:
    """Return w and s2, and of operations with weights sqrt(nu) or m, the windows' contents (N, ...), and T."""
    from flint import arb

    op, one = o["op"], arb(1)
    if op == "scale":
        return abs(arb(float(o["factor"]))), 0.0, one, h, 0
    if op == "activation" and o["name"] in ACTIVATIONS:
        s1, s2 = ACTIVATIONS[o["name"]][2:4]
        return arb(s1), s2, one, h, 0
    if op == "activation":
        return arb(max(1.0, abs(float(o.get("slope", 0.0))))), 0.0, one, h, 0
    if op == "avg_pool2d":
        overlap = Windows(o, o["kernel"], h.shape[1:]).overlap
        return (arb(overlap) / int(np.prod(o["kernel"]))).sqrt(), 0.0, one, h, 0
    if op == "linear":
        return _spectral_norm(tensors[o["weight"]]), 0.0, one, h, int(o["bias"] is not None)
    if op == "conv2d":
        W = tensors[o["weight"]]
        windows = _windows(o, W, h)
        A, root = windows.patches(h), arb(windows.overlap).sqrt()
        taps = sum((_spectral_norm(W[:, :, i, j]) for i, j in np.ndindex(*W.shape[2:])), arb(0))
        w = taps.min(root * _spectral_norm(W.reshape(len(W), -1)))
        return w, 0.0, root, A, A.shape[1] if o["bias"] is not None else 0
    if op == "batch_norm":
        x, g, root = _normalised(o, tensors, h)
        m = _largest([1 / v for v in root.ravel()])
        return _largest([abs(v) for v in (g / root).ravel()]), 0.0, m, x, int(np.prod(h.shape[2:]))
    return one, 0.0, one, h, 0


def _spectral_norm(W: Array) -> Any:
    """Return a number that ||W||_2 is certainly below: s with s^2 I - W^T W positive definite."""
    V = W if W.shape[0] >= W.shape[1] else W.T
    M, s = V.T @ V, _norm(V)
    guess = np.linalg.norm(np.array([[float(v.mid()) for v in row] for row in V]), 2) * (1 + 1e-12)
    near = type(s)(float(guess))
    return near if _positive_definite(-M, -near * near) else s


def _top_eigenvalue(Q: Array) -> Any:
    """Return a number that lambda_max(Q) is at most, Q >= 0: max_l (Q x)_l / x_l for a positive x."""
    rough = np.array([[float(v.mid()) for v in row] for row in Q])
    x = np.abs(np.linalg.eigh(rough)[1][:, -1]) + 1e-10
    tried = [np.ones(len(Q)), x]
    for _ in range(30):
        y = rough @ x
        x = y / max(y.max(), 1e-300) + 1e-10
        tried.append(x)
    best = _balls(min(tried, key=lambda x: float((rough @ x / x).max())))
    return _largest(list((Q @ best) / best))


def _norm(x: Array) -> Any:
    from flint import arb

    return sum((v * v for v in x.ravel()), arb(0)).sqrt()


def _largest(values: list[Any]) -> Any:
    """Return a ball no number of which is below any of the values."""
    top = values[0]
    for v in values[1:]:
        top = top.max(v)
    return top


def _zeros(*shape: int) -> Array:
    return _balls(np.zeros(shape))


def _positive_definite(K: Array, t: Any) -> bool:
    """Whether K - t I is: elimination with balls, every pivot of which is certainly positive."""
    n = len(K)
    S = K - t * np.eye(n, dtype=int).astype(object)
    for i in range(n):
        if not S[i, i] > 0:
            return False
        S[i + 1 :, i + 1 :] -= np.outer(S[i + 1 :, i] / S[i, i], S[i, i + 1 :])
    return True


# gradients (N, C, ...) -> those before, and J's part (N, C, any) of each trainable operation
Back = Callable[[Array], tuple[Array, list[Array]]]


def _run(operations: list[Fields], tensors: dict[str, Array], h: Array) -> tuple[Array, Back]:
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


def _together(parts: list[Array]) -> list[Array]:
    return [np.concatenate([x.reshape(*x.shape[:2], -1) for x in parts], 2)]


def _flatten(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    return h.reshape(len(h), -1), lambda B: (B.reshape(*B.shape[:2], *h.shape[1:]), [])


def _scale(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    from flint import arb

    c = arb(float(o["factor"]))
    return h * c, lambda B: (B * c, [])


def _linear(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    W = tensors[o["weight"]]

    def back(B: Array) -> tuple[Array, list[Array]]:
        parts = [B[..., None] * h[:, None, None, :], *([B] if o["bias"] else [])]
        return B @ W, _together(parts) if o["trainable"] else []

    return h @ W.T + (tensors[o["bias"]] if o["bias"] else 0), back


def _conv2d(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    W = tensors[o["weight"]]
    windows, taps = _windows(o, W, h), W.reshape(*W.shape[:2], -1)
    A = windows.patches(h)
    z = (A @ W.reshape(len(W), -1).T + (tensors[o["bias"]] if o["bias"] else 0)).swapaxes(1, 2)

    def back(B: Array) -> tuple[Array, list[Array]]:
        G = B.reshape(*B.shape[:3], -1)  # (N, C, b, T)
        parts = [G @ A[:, None], *([G.sum(3)] if o["bias"] else [])]
        below = windows.spread(lambda tap: taps[:, :, tap].T @ G)
        return below, _together(parts) if o["trainable"] else []

    return z.reshape(*z.shape[:2], *windows.places), back


def _windows(o: Any, W: Array, h: Array) -> Windows:
    return Windows(o, W.shape[2:], h.shape[1:])


def _normalised(o: Any, tensors: Any, h: Array) -> tuple[Array, Array, Array]:
    """Return (h - mean)/sqrt(var + eps), the gain and the root."""
    from flint import arb

    g, mean, var = (tensors[o[k]].reshape(1, -1, *[1] * (h.ndim - 2)) for k in ("weight", "mean", "var"))
    root = np.frompyfunc(lambda v: (v + arb(float(o["eps"]))).sqrt(), 1, 1)(var)
    return (h - mean) / root, g, root


def _batch_norm(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    x, g, root = _normalised(o, tensors, h)
    b = tensors[o["bias"]].reshape(1, -1, *[1] * (h.ndim - 2))

    def back(B: Array) -> tuple[Array, list[Array]]:
        G, T = B.reshape(*B.shape[:3], -1), x.reshape(*x.shape[:2], -1)
        parts = [np.concatenate([(G * T[:, None]).sum(3), G.sum(3)], 2)] if o["trainable"] else []
        return B * (g / root)[:, None], parts

    return x * g + b, back


def _avg_pool2d(o: Any, tensors: Any, h: Array) -> tuple[Array, Back]:
    windows = Windows(o, o["kernel"], h.shape[1:])
    k = int(np.prod(o["kernel"]))
    means = windows.patches(h.reshape(-1, 1, *h.shape[2:])).sum(2) / k

    def back(B: Array) -> tuple[Array, list[Array]]:
        return windows.spread(lambda tap: B.reshape(*B.shape[:3], -1) / k), []

    return means.reshape(*h.shape[:2], *windows.places), back


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
                raise Refused(f"audit: an argument of {o['name']} is too near to 0")
            return (z, arb(1)) if z > 0 else (arb(slope) * z, arb(slope))

        return sigma

    def elu(z: Any) -> tuple[Any, Any]:
        if not (z > 0 or z <= 0):
            raise Refused("audit: an argument of elu is too near to 0")
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
