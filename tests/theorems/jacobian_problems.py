"""Problems whose constants are known: F(w) = A w + B sin(w), so that J = A + B diag(cos w) is ||B||_2-Lipschitz."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from surefoot.measure.measurement import Kind, Level, Measurement

ROOM = 1 + 1e-9  # for what numpy's singular values are off


def measured(value: float, kind: Kind, level: Level = "verified") -> Measurement:
    return Measurement("a number", value, kind, level, "known by construction")


@dataclass(frozen=True)
class Problem:
    A: np.ndarray  # (n, P)
    B: np.ndarray  # (n, P)
    w0: np.ndarray  # (P,)
    y: np.ndarray  # (n,)
    rho: float
    s0: float
    beta: float
    L: float

    def residual(self, w: np.ndarray) -> np.ndarray:
        return self.A @ w + self.B @ np.sin(w) - self.y

    def jacobian(self, w: np.ndarray) -> np.ndarray:
        return self.A + self.B * np.cos(w)

    def measurements(self) -> tuple[Measurement, Measurement, Measurement, Measurement]:
        return (
            measured(self.rho, "upper bound"),
            measured(self.s0, "lower bound"),
            measured(self.beta, "upper bound"),
            measured(self.L, "upper bound"),
        )


def problem(rng: np.random.Generator, q: float) -> Problem:
    """A random one with Kantorovich number q."""
    n = int(rng.integers(1, 5))
    P = n + int(rng.integers(1, 9))
    A, B = rng.normal(size=(n, P)), rng.normal(size=(n, P)) * rng.uniform(0.05, 0.6)
    w0 = rng.normal(size=P)
    s0 = float(np.linalg.svd(A + B * np.cos(w0), compute_uv=False)[-1]) / ROOM
    beta = float(np.linalg.norm(B, 2)) * ROOM
    direction = rng.normal(size=n)
    rho = q * s0**2 / beta
    y = A @ w0 + B @ np.sin(w0) + direction / np.linalg.norm(direction) * rho
    L = (float(np.linalg.norm(A, 2)) + float(np.linalg.norm(B, 2))) * ROOM
    return Problem(A, B, w0, y, rho * ROOM, s0, beta, L)


@dataclass(frozen=True)
class At:
    """After a step: E, the path so far, the distance from w0, the step, and whether E is above rounding."""

    E: float
    before: float
    path: float
    distance: float
    step: float


def descend(p: Problem, steps: list[float]) -> Iterator[At]:
    """Gradient descent on E = 1/2 ||F - y||^2 until rounding matters."""
    w, path = p.w0, 0.0
    first = E = float(p.residual(w) @ p.residual(w)) / 2
    for h in steps:
        g = p.jacobian(w).T @ p.residual(w)
        w = w - h * g
        path += h * float(np.linalg.norm(g))
        before, E = E, float(p.residual(w) @ p.residual(w)) / 2
        if 1e-20 * first > E:
            return
        yield At(E, before, path, float(np.linalg.norm(w - p.w0)), h)


def policies(rng: np.random.Generator, eta_max: float, count: int) -> list[list[float]]:
    """Constant, log-random over three decades, cosine, and on and off."""
    return [
        [eta_max] * count,
        [eta_max * 10 ** -float(u) for u in rng.uniform(0, 3, count)],
        [eta_max * (1 + float(np.cos(np.pi * k / count))) / 2 for k in range(count)],
        [eta_max * float(b) for b in rng.integers(0, 2, count)],
    ]
