"""The whole gradient, the PL ratio, and what the kernel says about a residual."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from surefoot.errors import InputError
from surefoot.measure.gradient import alignment, full_gradient, jacobian_conditioning, pl_ratio, spectral_weights
from surefoot.measure.measurement import Kind, Level, Measurement

F64 = torch.float64


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(x).flatten()]
    return torch.stack([nn.utils.parameters_to_vector(row) for row in rows])


# ---------------------------------------------------------------------------------------------------- full gradient


def test_batches_and_rows_give_the_gradient_of_the_whole() -> None:
    model, x, y = mlp().double(), torch.randn(11, 4, dtype=F64), torch.arange(11) % 3
    f = cross_entropy(model(x), y)
    g = nn.utils.parameters_to_vector(torch.autograd.grad(f, list(model.parameters())))
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    for data, rows in (((x, y), None), ((x, y), 2), (batches, None), (iter(batches), 4)):
        loss, found = full_gradient(model, cross_entropy, data, rows=rows)
        assert loss == pytest.approx(f.item(), rel=1e-14)
        assert torch.allclose(found, g, rtol=0, atol=1e-15)
    assert all(p.grad is None for p in model.parameters())


def test_many_small_gradients_add_up_in_float64() -> None:
    model, data = nn.Linear(1, 1, bias=False), [(torch.ones(1, 1), torch.zeros(1, 1))]
    nn.init.constant_(model.weight, 0.1)
    batches = [*data, *[(torch.full((1, 1), 1e-4), torch.zeros(1, 1))] * 999]
    _, found = full_gradient(model, mse_loss, batches)
    assert found.dtype == F64
    w, tiny = float(torch.tensor(0.1)), float(torch.tensor(1e-4))
    assert found.item() == pytest.approx(2 * w * (1 + 999 * tiny**2) / 1000, rel=1e-7)
    assert float(torch.tensor(2 * w) + 2 * w * tiny**2) == float(torch.tensor(2 * w)), "lost in float32"


def test_frozen_and_unused_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.frozen(x))

    _, found = full_gradient(Model(), mse_loss, (torch.randn(5, 2), torch.randn(5, 1)))
    assert found.shape == (6,)
    assert (found[:3] != 0).all()
    assert (found[3:] == 0).all()


# --------------------------------------------------------------------------------------------------------- PL ratio


def test_pl_ratio_of_a_quadratic_lies_between_its_curvatures() -> None:
    x = torch.randn(6, 3, dtype=F64)
    model = nn.Linear(3, 1, bias=False).double()
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / 3)
    assert eigenvalues[0] > 1e-3
    data = x, torch.zeros(6, 1, dtype=F64)
    for _ in range(20):
        nn.init.normal_(model.weight)
        found = pl_ratio(model, mse_loss, data)
        assert eigenvalues[0] <= found.value <= eigenvalues[-1]
    g = full_gradient(model, mse_loss, data)[1]
    assert found.value == pytest.approx((g @ g).item() / (2 * found.details["loss"]), rel=1e-12)
    assert (found.kind, found.level, found.samples) == ("exact", "estimate", 6)


def test_pl_ratio_with_an_infimum() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    data = torch.ones(4, 1, dtype=F64), torch.ones(4, 1, dtype=F64)

    def raised(z: Tensor, y: Tensor) -> Tensor:
        return mse_loss(z, y) + 3

    assert pl_ratio(model, raised, data, infimum=3).value == pytest.approx(2, rel=1e-12)
    assert 0 < pl_ratio(model, raised, data).value < 2, "a number below f* makes the ratio too small"
    with pytest.raises(InputError, match="infimum=100 lies above the loss"):
        pl_ratio(model, raised, data, infimum=100)
    with pytest.raises(InputError, match="infimum=nan"):
        pl_ratio(model, raised, data, infimum=math.nan)


def test_pl_ratio_at_the_minimum_is_infinite() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    found = pl_ratio(model, mse_loss, (torch.ones(2, 1), torch.ones(2, 1)))
    assert found.value == math.inf
    assert Measurement.from_json(found.to_json()) == found


def test_pl_ratio_of_squares_is_the_effective_eigenvalue() -> None:
    model, x, y = mlp().double(), torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    J = jacobian(model, x)
    effective = alignment(J @ J.T, model(x) - y)

    def half_sum(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum() / 2

    assert effective.value == pytest.approx(pl_ratio(model, half_sum, (x, y)).value, rel=1e-12)
    mean = pl_ratio(model, mse_loss, (x, y)).value  # (2/n) E, so 2/n of the ratio
    assert mean == pytest.approx(effective.value * 2 / 15, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "data=list is empty"),
        ({"data": (torch.full((2, 4), math.nan), torch.zeros(2, 3))}, "nan on batch 0"),
        ({"loss_fn": lambda z, y: z}, "must return a scalar"),
        ({"model": mlp().requires_grad_(False)}, "no parameter requires a gradient"),
        ({"model": nn.Sequential(nn.Linear(4, 3), nn.Dropout())}, r"1 \(Dropout\)"),
        ({"loss_fn": lambda z, y: (z - z.detach()).square().sum().sqrt()}, "gradient that is NaN"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"model": mlp(), "loss_fn": mse_loss, "data": (torch.randn(2, 4), torch.randn(2, 3))}
    assert full_gradient(**good)[0] > 0
    for measure in (full_gradient, pl_ratio):
        with pytest.raises(InputError, match=message):
            measure(**(good | changes))


# ------------------------------------------------------------------------------------------------------ conditioning


def eigenvalue(value: float, kind: Kind, level: Level = "verified") -> Measurement:
    return Measurement("lambda", value, kind, "estimate" if kind in ("estimate", "assumed") else level, "by hand")


@pytest.mark.parametrize(
    ("smallest", "largest", "kind"),
    [
        ("lower bound", "upper bound", "upper bound"),
        ("exact", "upper bound", "upper bound"),
        ("exact", "exact", "upper bound"),
        ("upper bound", "lower bound", "lower bound"),
        ("exact", "lower bound", "lower bound"),
        ("lower bound", "lower bound", "estimate"),
        ("upper bound", "upper bound", "estimate"),
        ("lower bound", "estimate", "estimate"),
        ("lower bound", "assumed", "assumed"),
    ],
)
def test_conditioning_is_what_its_eigenvalues_are(smallest: Kind, largest: Kind, kind: Kind) -> None:
    found = jacobian_conditioning(smallest=eigenvalue(0.1, smallest), largest=eigenvalue(0.7, largest))
    assert found.kind == kind
    assert found.level == ("verified" if "bound" in kind else "estimate")
    assert found.value == pytest.approx(math.sqrt(7), rel=1e-14)


def test_conditioning_proves_no_more_than_the_weaker_of_the_two() -> None:
    for one, other, level in (
        ("audited", "verified", "verified"),
        ("audited", "audited", "audited"),
        ("estimate", "audited", "estimate"),
    ):
        found = jacobian_conditioning(
            smallest=eigenvalue(1, "lower bound", one),  # type: ignore[arg-type]
            largest=eigenvalue(2, "upper bound", other),  # type: ignore[arg-type]
        )
        assert (found.kind, found.level) == ("upper bound", level)


positive = st.floats(1e-300, 1e300)


@given(positive, positive)
@settings(max_examples=200, deadline=None)
def test_conditioning_is_rounded_outwards(a: float, b: float) -> None:
    from fractions import Fraction

    low, high = sorted((a, b))
    ratio = Fraction(high) / Fraction(low)
    above = jacobian_conditioning(smallest=eigenvalue(low, "lower bound"), largest=eigenvalue(high, "upper bound"))
    below = jacobian_conditioning(smallest=eigenvalue(low, "upper bound"), largest=eigenvalue(high, "lower bound"))
    assert Fraction(below.value) ** 2 <= ratio <= Fraction(above.value) ** 2
    assert above.value <= below.value * (1 + 1e-14)


def test_conditioning_of_a_gram() -> None:
    J = jacobian(mlp().double(), torch.randn(5, 4, dtype=F64))
    s = torch.linalg.svdvals(J)
    found = jacobian_conditioning(J @ J.T)
    assert found.value == pytest.approx((s[0] / s[-1]).item(), rel=1e-6)
    assert (found.kind, found.level) == ("estimate", "estimate")
    half = jacobian_conditioning(J @ J.T, smallest=eigenvalue(s[-1].item() ** 2, "lower bound"))
    assert half.kind == "estimate", "lambda_max came from eigvalsh"


def test_conditioning_without_a_smallest_is_infinite() -> None:
    for kind in ("lower bound", "upper bound", "estimate"):
        found = jacobian_conditioning(smallest=eigenvalue(-1e-9, kind), largest=eigenvalue(1, "exact"))
        assert found.value == math.inf
    assert jacobian_conditioning(torch.zeros(2, 2, dtype=F64)).value == math.inf
    unknown = jacobian_conditioning(smallest=eigenvalue(-math.inf, "lower bound"), largest=eigenvalue(1, "exact"))
    assert Measurement.from_json(unknown.to_json()) == unknown


# --------------------------------------------------------------------------------------------------------- alignment


@given(st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_alignment_is_the_sum_over_eigenvectors(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(n, n + 3, generator=generator, dtype=F64)
    r = torch.randn(n, generator=generator, dtype=F64)
    K = J @ J.T
    found = alignment(K, r, lr=0.01)
    eigenvalues, U = torch.linalg.eigh(K)
    c2 = (U.T @ r) ** 2
    assert found.value == pytest.approx(((eigenvalues * c2).sum() / (r @ r)).item(), rel=1e-10)
    assert eigenvalues[0] * (1 - 1e-9) <= found.value <= eigenvalues[-1] * (1 + 1e-9)
    kept = ((1 - 0.01 * eigenvalues) ** 2 * c2).sum() / c2.sum()
    assert found.details["predicted_decrease"] == pytest.approx(1 - kept.item(), rel=1e-9, abs=1e-12)
    shares = list(found.details["shares"].values())
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1 + 1e-12
    assert spectral_weights(K, r)[1][-1].item() == pytest.approx(1)


def test_the_residual_along_one_eigenvector() -> None:
    K = torch.diag(torch.arange(1, 101, dtype=F64))
    for i, (half, tenth) in {0: (1, 1), 9: (10, 1), 10: (11, 0), 99: (100, 0)}.items():
        found = alignment(K, torch.eye(100, dtype=F64)[i])
        assert found.value == i + 1
        assert found.details["half"] == pytest.approx(half)
        assert found.details["shares"]["10%"] == pytest.approx(tenth)


def test_predicted_decrease_is_that_of_a_small_step() -> None:
    model, x, y = mlp().double(), torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    J, r = jacobian(model, x), (model(x) - y).detach()
    for lr, agree in ((1e-2, 0.1), (1e-4, 1e-3)):
        w = nn.utils.parameters_to_vector(model.parameters()).detach()
        nn.utils.vector_to_parameters(w - lr * J.T @ r.flatten(), model.parameters())
        seen = 1 - ((model(x) - y).square().sum() / r.square().sum()).item()
        nn.utils.vector_to_parameters(w, model.parameters())
        assert seen > 0
        assert alignment(J @ J.T, r, lr=lr).details["predicted_decrease"] == pytest.approx(seen, rel=agree)


EYE = torch.eye(3, dtype=F64)


@pytest.mark.parametrize(
    ("K", "residual", "lr", "message"),
    [
        (EYE[:2], torch.ones(3), None, r"K of shape \(2, 3\) is no square"),
        (EYE.float(), torch.ones(3), None, "torch.float32 is too coarse"),
        (EYE * math.nan, torch.ones(3), None, "9 numbers that are NaN"),
        (EYE + torch.triu(torch.ones(3, 3, dtype=F64)), torch.ones(3), None, "not symmetric"),
        (EYE, torch.ones(2), None, r"residual of shape \(2,\) does not fit"),
        (EYE, torch.tensor([1.0, math.inf, 0]), None, "residual holds 1 numbers"),
        (EYE, torch.zeros(3), None, "residual is 0"),
        (EYE, torch.ones(3), 0.0, "lr=0.0"),
    ],
)
def test_alignment_refuses(K: Tensor, residual: Tensor, lr: float | None, message: str) -> None:
    assert alignment(EYE, torch.ones(3)).value == 1
    with pytest.raises(InputError, match=message):
        alignment(K, residual, lr=lr)


def test_conditioning_refuses() -> None:
    with pytest.raises(InputError, match="K=None needs both"):
        jacobian_conditioning(smallest=eigenvalue(1, "exact"))
    with pytest.raises(InputError, match=r"largest=-1\.0 is negative"):
        jacobian_conditioning(smallest=eigenvalue(-2, "exact"), largest=eigenvalue(-1, "exact"))
    with pytest.raises(InputError, match="no square"):
        jacobian_conditioning(torch.ones(3, dtype=F64))
