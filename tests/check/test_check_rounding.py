"""The forward pass and its rounding, against exact arithmetic: rational numbers and balls of 160 bits."""

import math
from fractions import Fraction

import numpy as np
import pytest
from check_cases import balls, bits, case, networks, values_and_jacobian

from surefoot.check.network import Network
from surefoot.check.rounding import U, affine, gam, leading, norm, norms


def exactly(A: np.ndarray, M: np.ndarray, b: np.ndarray) -> list[list[Fraction]]:
    """Return A M^T + b, each entry a sum of whole numbers over one power of two."""
    shift = 2**1200  # makes every number here whole

    def whole(x: np.ndarray) -> list[list[int]]:
        return [[n * (shift // d) for n, d in (float(v).as_integer_ratio() for v in row)] for row in x]

    dots = [[sum(map(int.__mul__, row, column)) for column in whole(M)] for row in whole(A)]
    return [[Fraction(dot, shift**2) + Fraction(float(c)) for dot, c in zip(row, b)] for row in dots]


def error(h: np.ndarray, exact: list[list[Fraction]]) -> np.ndarray:
    """Return the norms of the rows' errors; scaled, since squares of small ones underflow."""
    off = [[abs(Fraction(float(v)) - w) for v, w in zip(*rows)] for rows in zip(h, exact)]
    top = max(max(row) for row in off) or Fraction(1)
    return np.array([math.sqrt(sum(float(v / top) ** 2 for v in row)) * float(top) for row in off])


RNG = np.random.default_rng(0)
MATRICES = {
    "ordinary": (RNG.standard_normal((3, 512)), RNG.standard_normal((20, 512)) / 22, RNG.standard_normal(20)),
    "one term": (RNG.standard_normal((2, 1)), RNG.standard_normal((3, 1)), np.zeros(3)),
    "all of one sign": (RNG.uniform(0.5, 1, (2, 300)), RNG.uniform(0.5, 1, (4, 300)), np.zeros(4)),
    "many sizes": (
        RNG.standard_normal((3, 40)) * 10.0 ** RNG.uniform(-30, 30, (3, 40)),
        RNG.standard_normal((5, 40)) * 10.0 ** RNG.uniform(-30, 30, (5, 40)),
        np.ones(5),
    ),
    "rows of many sizes": (
        RNG.standard_normal((4, 64)) * np.array([[1e-90], [1e90], [1.0], [0.0]]),
        RNG.standard_normal((4, 64)) * np.array([[1e-5], [1.0], [1e5], [0.0]]),
        np.zeros(4),
    ),
    "cancelling": (np.tile([1.0, -1.0], (2, 128)) + 1e-9, np.tile([1 / 3, 1 / 3], (3, 128)), np.zeros(3)),
    "powers of two": (np.full((2, 33), 2.0**20), np.full((2, 33), 2.0**-20), np.zeros(2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_affine_is_within_its_bound_and_the_bound_is_small(name: str) -> None:
    A, M, b = MATRICES[name]
    h, bound = affine(A, M, b)
    off = error(h, exactly(A, M, b))
    assert np.all(off <= bound)
    assert np.all(bound <= 4 * U * (norms(h) + norm(b)) + 1e-6 * gam(M.shape[1] + 2) * norms(A) * norm(M) + 1e-120)


def test_affine_is_much_sharper_than_a_dot_product_in_any_order() -> None:
    A, M, b = MATRICES["ordinary"]
    h, bound = affine(A, M, b)
    before = gam(M.shape[1] + 2) * (norm(M) * norms(A) + norm(b))
    assert np.all(before > 500 * bound)
    assert np.all(bound < 10 * error(h, exactly(A, M, b)))  # nor is there much left to gain


def test_the_leading_product_is_exact_in_any_order() -> None:
    for k in (1, 2, 31, 32, 33, 1000, 5000):
        bits = (53 - k.bit_length()) // 2
        A, M = (
            RNG.standard_normal((2, k)) * 1e3,
            np.sign(RNG.standard_normal((2, k))) * 1.9999,
        )  # as large as they can be
        A1, M1 = leading(A, bits), leading(M, bits)
        exact = exactly(A1, M1, np.zeros(2))
        assert np.all(error(A1 @ M1.T, exact) == 0)
        order = RNG.permutation(k)
        one_by_one = np.array([[sum((A1[i] * M1[j])[order].tolist()) for j in range(2)] for i in range(2)])
        assert np.all(error(one_by_one, exact) == 0)
        assert np.all(leading(A1, bits) == A1)
        assert all(
            Fraction(v) == Fraction(w) + Fraction(v - w) for v, w in zip(A.ravel().tolist(), A1.ravel().tolist())
        )
        assert np.abs(A - A1).max() <= 2.0**-bits * np.abs(A).max()


@pytest.mark.parametrize("name", sorted(networks()))
def test_the_outputs_of_every_network_are_within_their_bound(name: str) -> None:
    for seed in range(3):
        c = case(name, seed)
        end = Network(c.operations, c.tensors, 1e-3).forward(c.tensors["inputs"])
        with bits(160):
            F, _ = values_and_jacobian(c.operations, c.tensors, True)
            off = (F - balls(end.h).ravel()).astype(float).reshape(end.h.shape)
        assert np.all(np.linalg.norm(off, axis=1) <= end.dh)
        assert np.all(end.dh < 2e-13)
