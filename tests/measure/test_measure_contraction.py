"""Contractions against the Jacobian written out, and their rounding against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from surefoot.measure import contraction
from surefoot.measure.contraction import Lookup, Outer, Rows, Term, add_gram, ghost_is_cheaper, mirror
from surefoot.measure.gram_rounding import gram_rounding

VOCABULARY = 7


def jacobian(term: Term) -> Tensor:
    """Return the rows of a term (n C, p), by its definition."""
    if isinstance(term, Rows):
        return term.rows.flatten(0, 1)
    if isinstance(term, Lookup):
        onehot = (term.ids[..., None] == torch.arange(VOCABULARY)).double()
        return torch.einsum("ntv,cntd->ncvd", onehot, term.grads).flatten(2).flatten(0, 1)
    return torch.einsum("cngtb,ngta->ncgba", term.grads, term.inputs).flatten(2).flatten(0, 1)


def random_terms(n: int, C: int, seed: int, T: int = 5) -> list[Term]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def ids(places: int) -> Tensor:
        return torch.randint(-1, VOCABULARY, (n, places), generator=rng)

    return [
        Outer(normal(n, 1, 1, 9), normal(C, n, 1, 1, 4)),  # Hadamard
        Outer(normal(n, 1, T, 30), normal(C, n, 1, T, 40)),  # ghost
        Outer(normal(n, 1, 3 * T, 3), normal(C, n, 1, 3 * T, 4)),  # materialised
        Outer(normal(n, 2, T, 3), normal(C, n, 2, T, 4)),  # grouped
        Outer(normal(n, 1, 1, 2), normal(C, n, 1, 1, 3).transpose(0, 1).contiguous().transpose(0, 1)),
        Lookup(ids(1), normal(C, n, 1, 3)),
        Lookup(ids(T), normal(C, n, T, 3)),
        Rows(normal(n, C, 6)),
    ]


def right_gram(left: list[Term], right: list[Term]) -> Tensor:
    return sum(jacobian(a) @ jacobian(b).T for a, b in zip(left, right))  # type: ignore[return-value]


def difference(K: Tensor, right: Tensor) -> float:
    return float((K - right).norm() / right.norm())


@pytest.fixture(params=["as it is", "little room"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles and pieces also where the matrices are small."""
    if request.param == "little room":
        monkeypatch.setattr(contraction, "WORKSPACE", 512)
        monkeypatch.setattr(contraction, "panel_height", lambda rows: 4)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("method", ["auto", "ghost", "materialise"])
@pytest.mark.parametrize(("n", "C"), [(1, 1), (7, 1), (7, 3), (30, 10)])
def test_symmetric(n: int, C: int, method: str) -> None:
    terms = random_terms(n, C, seed=n + C)
    right = right_gram(terms, terms)
    K = torch.zeros(n * C, n * C, dtype=torch.float64)
    add_gram(K, terms, terms, symmetric=True, method=method)
    mirror(K)
    assert difference(K, right) < 1e-14
    assert torch.equal(K, K.T)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("method", ["auto", "ghost", "materialise"])
def test_other_samples_and_other_lengths(method: str) -> None:
    left, right = random_terms(6, 3, seed=1), random_terms(9, 3, seed=2, T=8)
    K = torch.zeros(18, 27, dtype=torch.float64)
    add_gram(K, left, right, symmetric=False, method=method)
    assert difference(K, right_gram(left, right)) < 1e-14


def test_adds_to_what_is_there() -> None:
    terms = random_terms(5, 2, seed=3)
    K = torch.ones(10, 10, dtype=torch.float64)
    add_gram(K, terms, terms, symmetric=False)
    assert difference(K - 1, right_gram(terms, terms)) < 1e-14


def test_every_way_is_taken() -> None:
    hadamard, ghost, rows, *_ = random_terms(30, 10, seed=0)
    assert isinstance(ghost, Outer)
    assert isinstance(rows, Outer)
    assert ghost_is_cheaper(ghost, 30)
    assert not ghost_is_cheaper(rows, 30)
    assert contraction.is_tiled(hadamard, hadamard, "auto")


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_mirror(n: int) -> None:
    K = torch.randn(n, n, dtype=torch.float64)
    upper = K.triu()
    mirror(K)
    assert torch.equal(K, upper + upper.triu(1).T)


def exact_gram(terms: list[Term]) -> list[list[Fraction]]:
    """Return the Gram of the terms in rational numbers."""

    def fractions(term: Term) -> list[list[Fraction]]:
        if isinstance(term, Rows):
            return [[Fraction(v) for v in row] for row in term.rows.flatten(0, 1).tolist()]
        if isinstance(term, Lookup):
            onehot = (term.ids[..., None] == torch.arange(VOCABULARY)).double()
            term = Outer(onehot[:, None], term.grads[:, :, None])
        A = [[[[Fraction(v) for v in t] for t in g] for g in i] for i in term.inputs.tolist()]
        B = [[[[[Fraction(v) for v in t] for t in g] for g in i] for i in c] for c in term.grads.tolist()]
        C, n, G, T, b = term.grads.shape
        return [
            [
                sum((B[c][i][g][t][y] * A[i][g][t][x] for t in range(T)), Fraction(0))
                for g in range(G)
                for y in range(b)
                for x in range(term.inputs.shape[3])
            ]
            for i in range(n)
            for c in range(C)
        ]

    rows = [[v for part in parts for v in part] for parts in zip(*(fractions(term) for term in terms))]
    return [[sum((p * q for p, q in zip(r, s)), Fraction(0)) for s in rows] for r in rows]


@pytest.mark.parametrize("method", ["auto", "ghost", "materialise"])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_bounded(seed: int, method: str) -> None:
    terms = [t for k, t in enumerate(random_terms(3, 2, seed=seed, T=2)) if k != 1]
    K = torch.zeros(6, 6, dtype=torch.float64)
    add_gram(K, terms, terms, symmetric=True, method=method)
    mirror(K)
    off = [[float(Fraction(v) - e) for v, e in zip(*r)] for r in zip(K.tolist(), exact_gram(terms))]
    error = float(torch.linalg.matrix_norm(torch.tensor(off, dtype=torch.float64), 2))
    bound = gram_rounding(terms, method=method)
    assert 0 < error <= bound  # there is something to bound
    assert bound < 1e-12 * float(K.trace())


def test_rounding_where_sums_cancel() -> None:
    # The Gram is 0, its products are not: what is bounded is relative to them.
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64) / 3
    B = torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64)
    terms: list[Term] = [Outer(x.reshape(1, 1, 2, 1), torch.stack([B[:, 0], -B[:, 0]], 1).reshape(2, 1, 1, 2, 1))]
    assert right_gram(terms, terms).abs().max() == 0
    assert gram_rounding(terms) > 0


def test_rounding_of_rows_is_gam_times_the_trace() -> None:
    rows = Rows(torch.ones(4, 1, 1000, dtype=torch.float64))
    assert 1000 * 2**-53 * 4000 <= gram_rounding([rows]) <= 1.01 * 1010 * 2**-53 * 4000
