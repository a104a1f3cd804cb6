"""Small certificates made by hand, and the truth about them: forward-mode derivatives in balls or in float64.

Nothing here uses the checker's geometry or derivatives; only `certificate` asks it for its bounds, to claim just those.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flint import arb, arb_mat, ctx
from safetensors.numpy import save

from surefoot.check.network import Gram, Network
from surefoot.check.rounding import norm, spectral_norm, up

SMOOTH = ("tanh", "sigmoid", "softplus", "gelu", "silu", "elu", "identity")
CLAIMS = ("residual", "sigma_min", "ball", "jacobian_norm", "beta", "q", "epsilon", "radius", "sigma_star", "eta_max")


@dataclass
class Case:
    """A network, its data, and what is claimed of it."""

    operations: list[dict[str, Any]]
    tensors: dict[str, np.ndarray]
    claims: dict[str, float]
    gram: list[int]

    def document(self, raw: bytes) -> dict[str, Any]:
        y = self.tensors["targets"]
        return {
            "format": "surefoot-certificate", "version": 1, "kind": "interpolation", "statement": "a test",
            "loss": "squared error", "network": self.operations, "gram": self.gram,
            "data": {"samples": len(y), "outputs": y.shape[1], "inputs": "inputs", "targets": "targets", "source": ""},
            "tensors": {"file": "tensors.safetensors", "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)},
            "claims": self.claims, "units": {"lr_max": self.claims["eta_max"] * y.size / 2 * (1 - 2**-50)},
            "levels": {}, "assumptions": [], "made_by": {},
        }  # fmt: skip

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        raw = save({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in self.tensors.items()})
        (folder / "tensors.safetensors").write_bytes(raw)
        (folder / "certificate.json").write_text(json.dumps(self.document(raw)))
        return folder

    def copy(self) -> Case:
        return copy.deepcopy(self)


def flat(operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for o in operations for p in (o, *flat(o.get("branch", [])))]


# ------------------------------------------------------------------------------------------------------- networks


def linear(t: dict, name: str, rng: Any, b: int, a: int, bias: bool = True, trainable: bool = True) -> dict[str, Any]:
    t[f"{name}.w"] = rng.standard_normal((b, a)) / math.sqrt(a)
    if bias:
        t[f"{name}.b"] = rng.standard_normal(b) * 0.3
    return {"op": "linear", "weight": f"{name}.w", "bias": f"{name}.b" if bias else None, "trainable": trainable}


def conv(
    t: dict, name: str, rng: Any, b: int, c: int, k: tuple, s=(1, 1), p=(0, 0), d=(1, 1), bias=True, trainable=True
):
    t[f"{name}.w"] = rng.standard_normal((b, c, *k)) / math.sqrt(c * k[0] * k[1])
    if bias:
        t[f"{name}.b"] = rng.standard_normal(b) * 0.3
    return {
        "op": "conv2d", "weight": f"{name}.w", "bias": f"{name}.b" if bias else None, "trainable": trainable,
        "stride": list(s), "padding": list(p), "dilation": list(d),
    }  # fmt: skip


def batch_norm(t: dict, name: str, rng: Any, c: int, trainable: bool = True) -> dict[str, Any]:
    t[f"{name}.w"], t[f"{name}.b"] = 1 + 0.2 * rng.standard_normal(c), rng.standard_normal(c) * 0.3
    t[f"{name}.m"], t[f"{name}.v"] = rng.standard_normal(c) * 0.5, rng.uniform(0.5, 2.0, c)
    names = {"weight": f"{name}.w", "bias": f"{name}.b", "mean": f"{name}.m", "var": f"{name}.v"}
    return {"op": "batch_norm", **names, "eps": 1e-5, "trainable": trainable}


def act(name: str, **more: Any) -> dict[str, Any]:
    return {"op": "activation", "name": name, **more}


def networks() -> dict[str, Any]:
    """Return name -> function(rng) -> (operations, tensors, sample shape, N): every operation, odd geometries too."""

    def mlp(name: str, **more: Any):
        def make(rng: Any):
            t: dict = {}
            return [linear(t, "0", rng, 9, 4), act(name, **more), linear(t, "2", rng, 2, 9)], t, (4,), 4

        return make

    def deep(rng: Any):
        t: dict = {}
        ops = [linear(t, "0", rng, 7, 3), act("tanh"), linear(t, "1", rng, 6, 7, bias=False), act("gelu")]
        return [*ops, {"op": "scale", "factor": -0.75}, linear(t, "2", rng, 1, 6)], t, (3,), 5

    def residual(rng: Any):
        t: dict = {}
        inner = {"op": "residual", "branch": [linear(t, "2", rng, 5, 5), act("silu")]}
        branch = [linear(t, "1", rng, 5, 5), act("tanh"), inner, {"op": "scale", "factor": 0.5}]
        ops = [
            linear(t, "0", rng, 5, 3),
            {"op": "residual", "branch": branch},
            batch_norm(t, "3", rng, 5),
            act("softplus"),
        ]
        return [*ops, linear(t, "4", rng, 2, 5)], t, (3,), 4

    def frozen(rng: Any):
        t: dict = {}
        ops = [linear(t, "0", rng, 8, 3, trainable=False), act("sigmoid"), batch_norm(t, "1", rng, 8, trainable=False)]
        return [*ops, linear(t, "2", rng, 8, 8), act("elu"), linear(t, "3", rng, 2, 8, trainable=False)], t, (3,), 3

    def cnn(rng: Any):
        t: dict = {}
        branch = [batch_norm(t, "1", rng, 2), act("tanh"), conv(t, "2", rng, 2, 2, (3, 1), p=(1, 0))]
        ops = [conv(t, "0", rng, 2, 1, (3, 3), p=(1, 1)), {"op": "residual", "branch": branch}]
        ops += [{"op": "avg_pool2d", "kernel": [2, 2], "stride": [2, 2]}, {"op": "flatten"}, linear(t, "3", rng, 2, 8)]
        return ops, t, (1, 4, 4), 3

    def odd(rng: Any):  # stride 2 with dilation 3, stride 3 with dilation 2, overlapping pooling, T = 1 at the end
        t: dict = {}
        ops = [conv(t, "0", rng, 3, 2, (2, 3), s=(2, 3), p=(2, 3), d=(3, 2)), act("silu")]
        ops += [{"op": "avg_pool2d", "kernel": [2, 2], "stride": [1, 1]}, conv(t, "1", rng, 4, 3, (1, 2), bias=False)]
        return [*ops, {"op": "flatten"}, act("tanh"), linear(t, "2", rng, 1, _size(ops, (2, 4, 5)))], t, (2, 4, 5), 4

    def one(rng: Any):  # one sample, one output, one place, one number
        t: dict = {}
        return [conv(t, "0", rng, 1, 1, (2, 2)), {"op": "flatten"}], t, (1, 2, 2), 1

    def only_head(rng: Any):  # F is linear: beta = 0
        t: dict = {}
        return [linear(t, "0", rng, 9, 3, trainable=False), act("tanh"), linear(t, "1", rng, 2, 9)], t, (3,), 4

    return {
        **{name: mlp(name) for name in (*SMOOTH, "relu")}, "leaky_relu": mlp("leaky_relu", slope=0.125),
        "deep": deep, "residual": residual, "frozen": frozen, "cnn": cnn, "odd": odd, "one": one,
        "only_head": only_head,
    }  # fmt: skip


def _size(operations: list[dict[str, Any]], shape: tuple) -> int:
    """Return how many numbers the odd network has before its head."""
    h, w = shape[1:]
    for o in operations:
        if o["op"] == "conv2d" and o["weight"] == "0.w":
            h, w = (h + 4 - 3 * 1 - 1) // 2 + 1, (w + 6 - 2 * 2 - 1) // 3 + 1
        elif o["op"] == "avg_pool2d":
            h, w = h - 1, w - 1
        elif o["op"] == "conv2d":
            w -= 1
    return 4 * h * w


def case(name: str, seed: int = 0, ball: float = 1e-3, noise: float = 1e-7, margin: float = 1e-9) -> Case:
    """Return a certificate that holds: the targets are the outputs and noise, the claims what is found and a margin."""
    rng = np.random.default_rng([seed, *name.encode()])
    operations, tensors, shape, N = networks()[name](rng)
    tensors = {k: np.asarray(v) for k, v in tensors.items()}
    tensors["inputs"] = rng.standard_normal((N, *shape))
    network = Network(operations, tensors, ball)
    end = network.forward(tensors["inputs"])
    tensors["targets"] = end.h + noise * rng.standard_normal(end.h.shape)
    return claimed(operations, tensors, ball, margin)


def claimed(operations: list[dict[str, Any]], tensors: dict[str, np.ndarray], ball: float, margin: float) -> Case:
    """Claim of a network what the checker can confirm, and a margin."""
    y = tensors["targets"]
    network = Network(operations, tensors, ball)
    end = network.forward(tensors["inputs"])
    gram = Gram(*y.shape, network.backward(*y.shape))
    rho = float(up(norm(end.h - y) + norm(end.dh))) * (1 + margin)
    beta = norm(np.array([spectral_norm(Q) for Q in end.Q])) * (1 + margin) if end.Q.any() else 0.0
    L = min(norm(end.e), float(up(gram.jacobian_norm() + beta * ball))) * (1 + margin)
    K = np.triu(gram.K)
    K = K + np.triu(K, 1).T
    s0 = math.sqrt(np.linalg.eigvalsh(K)[0] * (1 - 1e-9) - 2 * gram.off) * (1 - 1e-9) - 2 * gram.dJ
    eps = 0.5
    q = beta * rho / s0**2
    assert 4 * q < 1 - eps, (q, rho, beta, s0)
    S = 2 * rho / ((1 - eps) * s0) / (1 + math.sqrt(1 - 2 * q / (1 - eps))) * (1 + 1e-12)
    down = 1 - 1e-12
    star, eta = (s0 - beta * S) * down, 2 * eps / (L**2 + beta * rho) * down
    claims = dict(zip(CLAIMS, (rho, s0, ball, L, beta, q * (1 + 1e-12), eps, S, star, eta)))
    return Case(operations, tensors, {k: float(v) for k, v in claims.items()}, network.trainable)


# ------------------------------------------------------------------------------------------------------- the truth


@contextmanager
def bits(n: int):
    before, ctx.prec = ctx.prec, n
    try:
        yield
    finally:
        ctx.prec = before


def balls(x: Any) -> np.ndarray:
    return np.asarray(np.frompyfunc(lambda v: arb(float(v)), 1, 1)(np.asarray(x, float)), dtype=object)


def values_and_jacobian(operations: list, tensors: dict[str, np.ndarray], exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return F (n,) and J (n, P), P the trainable numbers in the order of the operations, by forward differentiation.

    A number is (value, its P derivatives): h (1 + P, N, ...), so that an affine map treats all alike.
    """
    convert = balls if exact else np.asarray
    trained = [o[k] for o in flat(operations) if o.get("trainable") for k in ("weight", "bias") if o.get(k)]
    P = sum(tensors[name].size for name in trained)
    full, at = {}, 0
    for name, x in tensors.items():
        full[name] = convert(np.zeros((1 + P, *x.shape)))
        full[name][0] = convert(x)
    for name in trained:
        k = tensors[name].size
        full[name].reshape(1 + P, -1)[1 + at + np.arange(k), np.arange(k)] = convert(1.0)
        at += k
    h = run(operations, full, full["inputs"], exact)
    h = h.reshape(1 + P, -1)
    return h[0], h[1:].T


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply numbers with their derivatives; leading index 1 + P."""
    out = a[:1] * b + a * b[:1]
    out[0] = a[0] * b[0]
    return out


def run(operations: list, t: dict[str, np.ndarray], h: np.ndarray, exact: bool) -> np.ndarray:
    zero = arb(0) if exact else 0.0
    for o in operations:
        op = o["op"]
        if op == "flatten":
            h = h.reshape(*h.shape[:2], -1)
        elif op == "residual":
            h = h + run(o["branch"], t, h, exact)
        elif op == "scale":
            h = h * o["factor"]
        elif op == "linear":
            W = t[o["weight"]]
            z = h @ W[0].T + np.stack([h[0] @ dW.T for dW in W])
            z[0] = h[0] @ W[0].T
            h = z + (t[o["bias"]][:, None] if o["bias"] else 0)
        elif op == "conv2d":
            W = t[o["weight"]]
            (s1, s2), (p1, p2), (d1, d2), (k1, k2) = o["stride"], o["padding"], o["dilation"], W.shape[3:]
            height, width = h.shape[3:]
            t1, t2 = (height + 2 * p1 - d1 * (k1 - 1) - 1) // s1 + 1, (width + 2 * p2 - d2 * (k2 - 1) - 1) // s2 + 1
            z = np.full((*h.shape[:2], W.shape[1], t1, t2), zero, dtype=h.dtype)
            for p, q, i, j in np.ndindex(t1, t2, k1, k2):
                y, x = s1 * p + d1 * i - p1, s2 * q + d2 * j - p2
                if 0 <= y < height and 0 <= x < width:
                    pixel = h[:, :, :, y, x]
                    part = pixel @ W[0, :, :, i, j].T + np.stack([pixel[0] @ dW[:, :, i, j].T for dW in W])
                    part[0] = pixel[0] @ W[0, :, :, i, j].T
                    z[..., p, q] += part
            h = z + (t[o["bias"]][:, None, :, None, None] if o["bias"] else 0)
        elif op == "batch_norm":
            g, b, m, v = (
                t[o[k]].reshape(-1, 1, h.shape[2], *[1] * (h.ndim - 3)) for k in ("weight", "bias", "mean", "var")
            )
            v = v[:1] + o["eps"]
            root = np.frompyfunc(lambda x: x.sqrt(), 1, 1)(v) if exact else np.sqrt(v)
            h = times((h - m) / root, g) + b
        elif op == "avg_pool2d":
            (k1, k2), (s1, s2) = o["kernel"], o["stride"]
            t1, t2 = (h.shape[3] - k1) // s1 + 1, (h.shape[4] - k2) // s2 + 1
            z = np.full((*h.shape[:3], t1, t2), zero, dtype=h.dtype)
            for p, q in np.ndindex(t1, t2):
                z[..., p, q] = h[..., s1 * p : s1 * p + k1, s2 * q : s2 * q + k2].sum((3, 4)) / (k1 * k2)
            h = z
        else:
            value, slope = np.frompyfunc(sigma(o, exact), 1, 2)(h[0])
            z = h * slope.astype(h.dtype)
            z[0] = value
            h = z
    return h


def sigma(o: dict[str, Any], exact: bool):
    """The function z -> sigma, its derivative, by other formulas than the checker's where there are some."""
    one = arb(1) if exact else 1.0
    exp = (lambda z: z.exp()) if exact else math.exp
    erf = (lambda z: z.erf()) if exact else math.erf
    log = (lambda z: z.log()) if exact else math.log
    root2 = arb(2).sqrt() if exact else math.sqrt(2)
    pi = arb.pi() if exact else math.pi
    root2pi = (2 * pi).sqrt() if exact else math.sqrt(2 * pi)

    def tanh(z):
        a, b = exp(z), exp(-z)
        return (a - b) / (a + b), 4 / (a + b) ** 2

    def logistic(z):
        s = exp(z) / (one + exp(z))
        return s, s - s * s

    def gelu(z):
        p = (one + erf(z / root2)) / 2
        return z * p, p + z * exp(-z * z / 2) / root2pi

    def silu(z):
        s, d = logistic(z)
        return z * s, s + z * d

    def kinked(slope):
        return lambda z: (z, one) if z > 0 else (slope * z, slope * one)

    return {
        "tanh": tanh, "sigmoid": logistic, "softplus": lambda z: (log(one + exp(z)), logistic(z)[0]), "gelu": gelu,
        "silu": silu, "elu": lambda z: (z, one) if z > 0 else (exp(z) - one, exp(z)), "identity": lambda z: (z, one),
        "relu": kinked(0.0), "leaky_relu": kinked(o.get("slope")),
    }[o["name"]]  # fmt: skip


def true_residual(case: Case) -> Any:
    """Return ||F - y|| as a ball."""
    with bits(160):
        F = run(
            case.operations,
            {k: balls(v)[None] for k, v in case.tensors.items()},
            balls(case.tensors["inputs"])[None],
            True,
        )
        r = F.ravel() - balls(case.tensors["targets"]).ravel()
        return sum((x * x for x in r), arb(0)).sqrt()


def is_smallest(case: Case, s: float, J: np.ndarray | None = None) -> bool:
    """Whether s <= s_min(J) for certain: every leading minor of K - s^2 I is positive (as a ball of 160 bits)."""
    with bits(160):
        J = values_and_jacobian(case.operations, case.tensors, True)[1] if J is None else J
        M = arb_mat(J.tolist())
        K = M * M.transpose()
        n = K.nrows()
        for i in range(n):
            K[i, i] -= arb(s) ** 2
        return all(arb_mat([[K[i, j] for j in range(k)] for i in range(k)]).det() > 0 for k in range(1, n + 1))


def moved(case: Case, rng: Any, length: float) -> dict[str, np.ndarray]:
    """Return the tensors with the trainable ones moved by exactly that length in a random direction."""
    names = [o[k] for o in flat(case.operations) if o.get("trainable") for k in ("weight", "bias") if o.get(k)]
    steps = {name: rng.standard_normal(case.tensors[name].shape) for name in names}
    size = math.sqrt(sum(float((s**2).sum()) for s in steps.values()))
    return {k: v + steps[k] * (length / size) if k in steps else v for k, v in case.tensors.items()}


def on_the_ball(case: Case, rng: Any, tries: int = 4) -> tuple[float, float]:
    """Return the largest ||J|| and ||J(w) - J(w')||/||w - w'|| that some points of the ball show."""
    R = case.claims["ball"]
    longest = steepest = 0.0
    for _ in range(tries):
        near = moved(case, rng, R * rng.uniform(0, 0.9))
        w, v = Case(case.operations, near, case.claims, []), moved(Case(case.operations, near, {}, []), rng, R * 0.1)
        J, K = (values_and_jacobian(case.operations, t, False)[1] for t in (w.tensors, v))
        distance = math.sqrt(sum(float(((near[k] - v[k]) ** 2).sum()) for k in near))
        longest = max(longest, float(np.linalg.norm(J, 2)))
        steepest = max(steepest, float(np.linalg.norm(J - K, 2)) / distance)
    return longest, steepest
