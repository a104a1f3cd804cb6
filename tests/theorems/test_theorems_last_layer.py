"""The last layer: bounds at every step on random heads, and rank N proved, refuted or open on real features."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.data import load
from surefoot.errors import InputError
from surefoot.measure import Measurement, feature_rank
from surefoot.measure.features import FeatureRank
from surefoot.optim import DeltaGClip
from surefoot.theorems.delta_gclip import uncovered
from surefoot.theorems.last_layer import (
    LOSSES,
    bce_bound,
    check_last_layer,
    convex_gap,
    cross_entropy_bound,
    head_smoothness,
    sgd_gap,
    squared_factor,
)
from surefoot.theorems.verdict import Outcome

STEPS = 30


def features(N: int, m: int) -> Tensor:
    return torch.tanh(torch.randn(N, 5, dtype=torch.float64) @ torch.randn(5, m, dtype=torch.float64))


def loss_of(loss: str, Z: Tensor, y: Tensor) -> Tensor:
    if loss == "mse":
        return F.mse_loss(Z, y)
    if loss == "half-squared":
        return (Z - y).square().sum() / (2 * len(Z))
    return F.cross_entropy(Z, y) if loss == "cross-entropy" else F.binary_cross_entropy_with_logits(Z, y)


def targets(loss: str, N: int, C: int) -> Tensor:
    if loss == "cross-entropy":
        return torch.randint(C, (N,))
    if loss == "bce":
        return torch.randint(2, (N, C)).double()
    return torch.randn(N, C, dtype=torch.float64)


def number(value: float, kind: str = "upper bound", level: str = "verified") -> Measurement:
    return Measurement("a number", value, kind, level, "by hand")  # pyright: ignore[reportArgumentType]


def hold_at_every_step(loss: str, seed: int) -> float:
    """Train a head by delta-GClip; return the largest f/bound."""
    torch.manual_seed(seed)
    N, C = 3 + seed % 5, 2 + seed % 3
    H = features(N, N + seed % 6)
    Phi = torch.cat([H, torch.ones(N, 1)], 1)
    y = targets(loss, N, C)
    W = torch.randn(Phi.shape[1], C, dtype=torch.float64) * (seed % 2)
    Z0 = Phi @ W
    fit = None
    if loss == "cross-entropy":
        P = Z0 - Z0.mean(1, keepdim=True)
        start, fit = P.norm().item(), P.gather(1, y[:, None]).sum().item()
    elif loss == "bce":
        start, fit = Z0.norm().item(), ((2 * y - 1) * Z0).sum().item()
    else:
        start = (Z0 - y).norm().item()
    rank = feature_rank(H)
    lr = check_last_layer(rank, loss=loss, outputs=C).numbers["eta_max"]
    delta = 0.3
    W.requires_grad_()
    opt = DeltaGClip([W], lr=lr, gamma=0.5 * start / N if start else 0.1, delta=delta)
    sharp = None if fit is None or seed % 4 else number(fit - 1e-9 * (1 + abs(fit)), "lower bound")
    tightest, before = 0.0, math.inf
    for t in range(1, STEPS + 1):
        f = loss_of(loss, Phi @ W, y)
        opt.zero_grad()
        f.backward()
        opt.step()
        after = loss_of(loss, Phi @ W, y).item()
        assert after <= f.item() <= before
        before = f.item()
        v = check_last_layer(
            rank,
            loss=loss,
            outputs=C,
            lr=lr,
            shortest=lr * delta,
            steps=t,
            start=number(start * (1 + 1e-9) + 1e-12),
            fit=sharp,
        )
        assert v, v
        assert after <= v.numbers["loss_after"] * (1 + 1e-9)
        tightest = max(tightest, after / v.numbers["loss_after"])
    return tightest


@pytest.mark.parametrize("loss", LOSSES)
def test_bound_holds_at_every_step_of_random_heads(loss: str) -> None:
    tightest = [hold_at_every_step(loss, seed) for seed in range(30)]
    assert max(tightest) > (0.5 if loss in ("mse", "half-squared") else 0.05)


@pytest.mark.nightly
@pytest.mark.parametrize("loss", LOSSES)
def test_bound_holds_on_a_thousand_heads(loss: str) -> None:
    for seed in range(1000, 1250):
        hold_at_every_step(loss, seed)


@pytest.mark.parametrize("loss", LOSSES)
def test_smoothness_bounds_the_hessian_of_the_head(loss: str) -> None:
    tightest = 0.0
    for _ in range(20):
        N, C = 4, 3
        H = features(N, 5)
        Phi = torch.cat([H, torch.ones(N, 1)], 1)
        y = targets(loss, N, C)
        W = torch.randn(6, C, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda W, Phi=Phi, y=y: loss_of(loss, Phi @ W, y), W).reshape(
            6 * C, 6 * C
        )
        true = torch.linalg.eigvalsh(hessian)[-1].item()
        bound = head_smoothness(feature_rank(H).s_max.value, N, LOSSES[loss].smoothness(C))
        assert true <= bound
        tightest = max(tightest, true / bound)
    assert tightest > 0.4


def test_convex_bound_with_any_steps_against_any_point() -> None:
    """Prop. 13 on 100 random problems: f(W_T) - f(W) <= ||W_0 - W||^2/(2 S) for every W, rank N or not."""
    tightest = 0.0
    for seed in range(100):
        torch.manual_seed(seed)
        N, C = 6, 3
        Phi = torch.cat([features(N, 1 + seed % 8), torch.ones(N, 1)], 1)
        y = targets("cross-entropy", N, C)
        W0 = torch.randn(Phi.shape[1], C, dtype=torch.float64)
        L = torch.linalg.matrix_norm(Phi, 2).item() ** 2 / (2 * N) * (1 + 1e-9)
        W, total = W0.clone().requires_grad_(), 0.0
        others = [W0 + torch.randn_like(W0) * s for s in (0.1, 1, 3)]
        for h in (torch.rand(25) / L).tolist():
            (g,) = torch.autograd.grad(F.cross_entropy(Phi @ W, y), W)
            W = (W - h * g).detach().requires_grad_()
            total += h
            f = F.cross_entropy(Phi @ W, y).item()
            for other in others:
                gap = f - F.cross_entropy(Phi @ other, y).item()
                bound = convex_gap((W0 - other).norm().item(), total)
                assert gap <= bound * (1 + 1e-9)
                tightest = max(tightest, gap / bound)
    assert tightest > 0.05


def test_steps_too_long_break_the_bound() -> None:
    """Past 2/L_H the loss grows: the hypothesis on the step is needed, and the verdict asks for it."""
    H = features(5, 8)
    rank, y = feature_rank(H), targets("mse", 5, 2)
    Phi = torch.cat([H, torch.ones(5, 1)], 1)
    good = check_last_layer(rank, loss="mse", outputs=2)
    assert check_last_layer(rank, loss="mse", outputs=2, lr=good.numbers["eta_max"])
    too_long = check_last_layer(rank, loss="mse", outputs=2, lr=good.numbers["eta_max"] * 1.001)
    assert too_long.outcome is Outcome.UNDECIDED
    W = torch.zeros(9, 2, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.SGD([W], lr=good.numbers["eta_max"] * 2.1)
    for _ in range(200):
        opt.zero_grad()
        loss_of("mse", Phi @ W, y).backward()
        opt.step()
    assert loss_of("mse", Phi @ W, y) > 10 * loss_of("mse", 0 * y, y)


def test_target_steps_are_enough() -> None:
    rank = feature_rank(features(6, 12))
    for loss, start in (("mse", number(3.0)), ("cross-entropy", None), ("bce", None)):
        v = check_last_layer(rank, loss=loss, outputs=3, start=start, target=0.01)
        T = int(v.numbers["steps"])
        after = check_last_layer(rank, loss=loss, outputs=3, start=start, steps=T).numbers["loss_after"]
        assert 0 < after <= 0.01
        less = check_last_layer(rank, loss=loss, outputs=3, start=start, steps=int(T * 0.97)).numbers["loss_after"]
        assert less > 0.01
    v = check_last_layer(
        rank, loss="convex", outputs=1, smoothness=1.0, infimum=0.5, start=number(2.0), target=0.6, steps=10
    )
    assert v.numbers["infimum"] == 0.5
    assert v.numbers["loss_after"] == pytest.approx(0.5 + 4 / (20 * v.numbers["eta_max"]))
    assert 0.5 + 4 / (2 * v.numbers["eta_max"] * v.numbers["steps"]) <= 0.6


def test_formulas() -> None:
    assert squared_factor(1.0, 4, 1, 0.0) == 1.0
    assert squared_factor(10.0, 1, 1, 1.0) == 0.0
    assert convex_gap(1.0, 0.0) == math.inf
    assert cross_entropy_bound(5, 3, 0.0, 1.0)[0] == math.inf
    assert sgd_gap(2.0, 3.0, 4.0, 5.0) == (4 + 45) / 8
    # with its own outputs known the bound is never worse
    rough = bce_bound(5, 2, 1.0, 100.0, size=3.0)[0]
    assert bce_bound(5, 2, 1.0, 100.0, size=3.0, fit=2.0)[0] < rough
    # a search over k finds what a grid finds
    grid = min(math.log1p(2 * math.exp(-k / 50)) + (k / 50) ** 2 * 5 * (2 / 3) / 200 for k in range(1, 2000))
    assert cross_entropy_bound(5, 3, 1.0, 100.0)[0] == pytest.approx(grid, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------


def digits(rows: int, width: int) -> FeatureRank:
    return feature_rank(digit_features(rows, width))


def digit_features(rows: int, width: int) -> Tensor:
    X = load("digits", dtype=torch.float64).train_x[:rows].flatten(1)
    return torch.tanh(X @ (torch.randn(X.shape[1], width, dtype=torch.float64) / 8))


def test_real_features_of_a_wide_layer() -> None:
    v = check_last_layer(digits(100, 200), loss="cross-entropy", outputs=10, target=0.1)
    assert v
    assert v.numbers["infimum"] == 0
    assert v.numbers["s_min"] > 0.01
    assert 1 < v.numbers["steps"] < math.inf


def test_real_features_of_a_narrow_layer_and_of_duplicates() -> None:
    narrow = check_last_layer(digits(100, 60), loss="cross-entropy", outputs=10)
    assert narrow.outcome is Outcome.REFUTED
    assert "99 units" in str(narrow)
    H = digit_features(100, 200)
    H[7] = H[3]
    twice = check_last_layer(feature_rank(H), loss="mse", outputs=10)
    assert twice.outcome is Outcome.REFUTED
    assert "(3, 7)" in str(twice)
    H[7] = H[3] * (1 + 1e-16 * torch.randn(200, dtype=torch.float64))
    H[7, 0] = math.nextafter(H[3, 0].item(), 2.0)
    near = check_last_layer(feature_rank(H), loss="mse", outputs=10, steps=10, start=number(1.0))
    assert near.outcome is Outcome.UNDECIDED
    assert not near.numbers


def test_each_hypothesis_counts() -> None:
    rank = feature_rank(features(5, 9))
    good = check_last_layer(rank, loss="mse", outputs=2, steps=5, start=number(1.0))
    assert good
    guess = number(1.0, "estimate", "estimate")
    assert check_last_layer(rank, loss="mse", outputs=2, steps=5, start=guess).outcome is Outcome.UNDECIDED
    assert check_last_layer(rank, loss="mse", outputs=2, start=guess), "the infimum needs no start"
    bad_fit = check_last_layer(rank, loss="bce", steps=5, start=number(1.0), fit=guess)
    assert bad_fit.outcome is Outcome.UNDECIDED
    decay = check_last_layer(rank, loss="mse", refutations=uncovered(weight_decay=0.1))
    assert decay.outcome is Outcome.REFUTED
    assert check_last_layer(rank, refutations=uncovered(dropout=True)).outcome is Outcome.REFUTED
    assert check_last_layer(rank, refutations=uncovered(momentum=0.9)).outcome is Outcome.UNDECIDED


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"loss": "hinge"}, "hinge"),
        ({"loss": "convex"}, "needs both"),
        ({"smoothness": 1.0}, "needs both"),
        ({"loss": "cross-entropy", "outputs": 1}, "outputs"),
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"shortest": 1e9}, "shortest"),
        ({"target": 0.0}, "target"),
        ({"steps": 5}, "start"),
        ({"target": math.nan}, "target"),
        ({"loss": "convex", "smoothness": 0.0, "infimum": 0.0}, "smoothness"),
    ],
)
def test_bad_options(options: dict[str, float], word: str) -> None:
    with pytest.raises(InputError, match=word):
        check_last_layer(feature_rank(torch.eye(3)), **options)  # pyright: ignore[reportArgumentType]
