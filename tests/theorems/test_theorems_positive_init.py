"""The positive initialisation: the rate is there before the first step, and at every step after it."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from surefoot.data import load
from surefoot.errors import InputError
from surefoot.measure import lambda_min, pl_ratio, tangent_gram
from surefoot.optim import DeltaGClip
from surefoot.theorems.positive_init import (
    ACTIVATIONS,
    PositiveInit,
    layer_bounds,
    least_output_weight,
    path_gain,
    positive_init_,
)
from surefoot.theorems.verdict import Outcome


def network(d: int, widths: Sequence[int], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Flatten()]
    for a, b in zip((d, *widths), widths):
        parts += [nn.Linear(a, b), activation()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 1)).double()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def hold_at_every_step(
    model: nn.Sequential, X: Tensor, y: Tensor, found: PositiveInit, steps: int, delta: float | None
) -> tuple[float, float]:
    """Train with plain steps of eta_max, or with delta-GClip; return distance/radius and f_T/f_0."""
    n = found.verdict.numbers
    lr, y = n["eta_max"], y.reshape(-1, 1)
    rule = torch.optim.SGD(model.parameters(), lr=lr)
    if delta is not None:
        gamma = 0.3 * math.sqrt(2 * n["smoothness"] * n["loss"])
        rule = DeltaGClip(model.parameters(), lr=lr, gamma=gamma, delta=delta)
    begin = flat(model)
    f = nn.functional.mse_loss(model(X), y)
    assert f.item() <= n["loss"] * (1 + 1e-12)
    path, last = 0.0, begin
    for _ in range(steps):
        rule.zero_grad()
        f.backward()
        g = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        before = f.item()
        assert g * g >= n["alpha"] * before
        rule.step()
        now = flat(model)
        moved = float((now - last).norm())
        path, last = path + moved, now
        f = nn.functional.mse_loss(model(X), y)
        factor = 1 - (1 - n["epsilon"]) * n["alpha"] * moved / g
        assert f.item() <= before * factor * (1 + 1e-9)
        if delta is not None:
            assert moved / g >= lr * delta * (1 - 1e-6)
        assert path <= n["radius"]
    return path / n["radius"], f.item() / n["loss"]


def random_case(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    N = 2 + seed % 4
    d = N + seed % 5
    widths = [3 + seed % 4] if seed % 3 else [3 + seed % 4, 4]
    activation = list(ACTIVATIONS)[seed % 5]
    X = torch.randn(N, d, dtype=torch.float64) * (0.3 + seed % 7)
    return network(d, widths, activation), X, torch.randn(N, dtype=torch.float64) * 10.0 ** (seed % 4 - 2)


def hold_on_random_data(seed: int) -> list[tuple[float, float]]:
    seen = []
    for delta in (None, 0.2):
        model, X, y = random_case(seed)
        found = positive_init_(model, X, y)
        assert found, found
        seen.append(hold_at_every_step(model, X, y, found, 12, delta))
    return seen


def test_rate_at_every_step_on_random_data() -> None:
    seen = [pair for seed in range(100) for pair in hold_on_random_data(seed)]
    assert max(path for path, _ in seen) > 0.1
    assert min(left for _, left in seen) < 0.3


@pytest.mark.nightly
def test_rate_on_a_thousand_problems() -> None:
    for seed in range(1000, 2000):
        hold_on_random_data(seed)


def test_rate_until_the_loss_is_reached() -> None:
    torch.manual_seed(3)
    X, y = torch.randn(6, 30, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    model = network(30, [8])
    found = positive_init_(model, X, y, target=1e-4)
    steps = int(found.verdict.numbers["steps"])
    assert 50 < steps < 5000
    path, left = hold_at_every_step(model, X, y, found, steps, None)
    assert left * found.verdict.numbers["loss"] <= 1e-4
    assert 0.05 < path <= 1


@pytest.mark.parametrize("delta", [None, 0.3])
def test_rate_on_digits(delta: float | None) -> None:
    """Real images of 64 pixels, 24 of them: is it a digit above 4?"""
    data = load("digits", dtype=torch.float64)
    X, y = data.train_x[:24], (data.train_y[:24] > 4).double() * 2 - 1
    model = network(64, [16, 8])
    found = positive_init_(model, X, y)
    assert found, found
    _, left = hold_at_every_step(model, X, y, found, 150, delta)
    assert left < 0.98


def test_rate_on_fashion_mnist(shared_data: Path) -> None:
    data = load(str(shared_data / "fashion_mnist"), limit=30, dtype=torch.float64)
    X, y = data.train_x, (data.train_y > 4).double() * 2 - 1
    model = network(784, [32])
    found = positive_init_(model, X, y)
    assert found, found
    _, left = hold_at_every_step(model, X, y, found, 100, None)
    assert left < 0.9


def test_rate_on_yacht(shared_data: Path) -> None:
    """Six columns, so at most seven rows; an eighth is refused."""
    data = load(str(shared_data / "uci" / "yacht.csv"), target="y", dtype=torch.float64)
    rows = torch.randperm(len(data.train_x))[:8]
    X, y = data.train_x[rows], data.train_y[rows]
    model = network(6, [8])
    found = positive_init_(model, X[:5], y[:5])
    assert found, found
    hold_at_every_step(model, X[:5], y[:5], found, 100, None)
    assert positive_init_(network(6, [8]), X, y).verdict.outcome is Outcome.REFUTED


# ----------------------------------------------------------------------------------------------------------------------


def test_constants_hold_all_over_the_ball() -> None:
    """alpha, ||J|| and the smoothness against what they bound, at random points of the ball and its sphere."""
    tightest = [0.0, 0.0]
    for seed in range(15):
        model, X, y = random_case(seed)
        found = positive_init_(model, X, y)
        n, centre = len(X), flat(model)
        for share in (0.0, 0.5, 1.0):
            step = torch.randn_like(centre)
            w = centre + found.ball * share * step / step.norm()
            nn.utils.vector_to_parameters(w, model.parameters())
            kernel = 4 / n * lambda_min(tangent_gram(model, X), level="estimate").value
            assert found.alpha <= kernel
            ratio = pl_ratio(model, nn.functional.mse_loss, (X, y.reshape(-1, 1)))
            assert found.alpha <= 2 * ratio.value
            tightest[0] = max(tightest[0], found.alpha / kernel)
            if ratio.details["loss"] > found.verdict.numbers["loss"]:
                continue
            true = hessian_norm(model, X, y)
            assert true <= found.smoothness
            tightest[1] = max(tightest[1], true / found.smoothness)
    assert tightest[0] > 0.05
    assert tightest[1] > 0.5


def hessian_norm(model: nn.Sequential, X: Tensor, y: Tensor) -> float:
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        return nn.functional.mse_loss(torch.func.functional_call(model, values, (X,)), y.reshape(-1, 1))

    return float(torch.linalg.matrix_norm(torch.autograd.functional.hessian(loss, flat(model)), 2))


def test_activations_are_bounded_as_they_say() -> None:
    z = torch.linspace(-8, 8, 160_001, dtype=torch.float64, requires_grad=True)
    for kind, known in ACTIVATIONS.items():
        sigma = kind()(z)
        (slope,) = torch.autograd.grad(sigma.sum(), z)
        assert kind()(torch.zeros(1)).item() == 0
        assert slope.abs().max().item() <= known.s1
        # elu' has a kink, so s2 is the Lipschitz constant of sigma' and not a second derivative
        assert ((slope[1:] - slope[:-1]).abs() / 1e-4).max().item() <= known.s2 + 1e-6
        assert sigma.abs().max().item() <= known.top
        for M in (0.0, 0.01, 0.1, 0.5, 0.74, 1.0, 1.3, 2.0, 5.0, 8.0):
            inside = z.abs() <= M + 1e-12
            assert known.slope(M) <= slope[inside].min().item() + 1e-12 or known.slope(M) <= 0
            assert known.size(M) >= sigma[inside].abs().max().item() - 1e-12
        assert known.slope(0.1) > 0.3
        assert known.slope(1e4) <= 1


def test_path_gain_is_below_the_gradient_on_the_ball() -> None:
    tanh = ACTIVATIONS[nn.Tanh]
    model = network(3, [4, 5])
    X = torch.randn(6, 3, dtype=torch.float64)
    A, t, R = 6.0, 1.0, 0.02
    gain = path_gain([4, 5], [tanh, tanh], t, R, float(X.norm(dim=1).max()) * (1 + 1e-12))
    assert gain > 0
    least = math.inf
    for _ in range(50):
        with torch.no_grad():
            for k in (1, 3, 5):
                model[k].weight.fill_({1: 0.0, 3: t, 5: A}[k])
                model[k].bias.zero_()
        step = torch.randn_like(flat(model))
        nn.utils.vector_to_parameters(flat(model) + R * step / step.norm(), model.parameters())
        z = model[1](X).detach().requires_grad_()
        (V,) = torch.autograd.grad(model[2:](z).sum(), z)
        assert V.min().item() >= gain * (A - R)
        least = min(least, V.min().item() / (gain * (A - R)))
    assert least < 2


def test_layer_bounds_of_one_linear_layer_are_exact() -> None:
    L, beta = layer_bounds([0.0], [], [], 0.5, 4, 2.0, 3.0)
    assert pytest.approx(3.0) == L
    assert beta == 0


def test_a_smaller_output_weight_is_not_proved() -> None:
    """What A must exceed is where 4 f0 = (1 - eps)^2 R^2 alpha."""
    need = least_output_weight(0.7, 0.3, 2.0, 1.5, 9, 0.5)
    for A, enough in ((need * 1.0001, True), (need * 0.9999, False)):
        v = 0.7 * (A - 0.3)
        assert ((0.5 * 0.3) ** 2 * 4 * 1.5**2 * 9 * v * v > 4 * 2.0**2) == enough
    assert least_output_weight(0.0, 0.3, 2.0, 1.5, 9) == math.inf


def test_the_weights_are_as_the_theorem_has_them() -> None:
    model, X, y = network(8, [5, 4, 3]), torch.randn(6, 8), torch.randn(6, 1)
    model = model.float()
    found = positive_init_(model, X, y, t=0.4, epsilon=0.25)
    assert found
    assert found.t == torch.tensor(0.4).item()
    linears = [m for m in model if isinstance(m, nn.Linear)]
    sizes = [0.0, found.t, found.t, found.A]
    for layer, size in zip(linears, sizes):
        assert (layer.weight == size).all()
        assert not layer.bias.any()
    assert not model(X).any()
    assert found.verdict.numbers["epsilon"] == 0.25
    assert found.ball < found.t
    assert found.ball < found.A


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["too many", "twice"])
def test_without_rank_nothing_is_written(case: str) -> None:
    X = torch.randn(6, 4 if case == "too many" else 9, dtype=torch.float64)
    if case == "twice":
        X[4] = X[1]
    model = network(X.shape[1], [5])
    before = flat(model)
    found = positive_init_(model, X, torch.randn(6))
    assert found.verdict.outcome is Outcome.REFUTED
    assert not found
    assert torch.equal(flat(model), before)
    assert ("at most 5 samples" if case == "too many" else "duplicates") in str(found)


def test_near_duplicates_are_open() -> None:
    X = torch.randn(6, 9, dtype=torch.float64)
    X[4] = X[1]
    X[4, 0] = math.nextafter(X[4, 0].item(), 9.0)
    model = network(9, [5])
    before = flat(model)
    assert positive_init_(model, X, torch.randn(6)).verdict.outcome is Outcome.UNDECIDED
    assert torch.equal(flat(model), before)


def frozen() -> nn.Sequential:
    model = network(4, [3])
    model[1].weight.requires_grad_(False)
    return model


def shared() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (nn.Linear(4, 1), "no nn.Sequential"),
        (nn.Sequential(nn.Linear(4, 1)), "1 linear layers"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)), "ReLU"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 1)), "Sigmoid"),
        (nn.Sequential(nn.Linear(4, 3), nn.ELU(2.0), nn.Linear(3, 1)), "ELU"),
        (nn.Sequential(nn.Linear(4, 3), nn.GELU("tanh"), nn.Linear(3, 1)), "GELU"),
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "2 outputs"),
        (nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 1)), "bias"),
        (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh()), "4 parts"),
        (nn.Sequential(nn.Conv1d(1, 1, 1), nn.Tanh(), nn.Linear(3, 1)), "Conv1d"),
        (frozen(), "not trained"),
        (shared(), "twice"),
    ],
)
def test_models_of_another_form_are_refused(model: nn.Module, word: str) -> None:
    before = flat(model)
    with pytest.raises(InputError, match=word):
        positive_init_(model, torch.randn(3, 4), torch.randn(3))  # pyright: ignore[reportArgumentType]
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize(
    ("X", "y", "options", "word"),
    [
        (torch.randn(3, 5), torch.randn(3), {}, "takes 4"),
        (torch.randn(3, 4), torch.randn(2), {}, "3 inputs"),
        (torch.randn(3, 4), torch.zeros(3), {}, "0 everywhere"),
        (torch.full((3, 4), math.nan), torch.ones(3), {}, "NaN"),
        (torch.randn(3, 4), torch.randn(3), {"t": 0.0}, "t=0.0"),
        (torch.randn(3, 4), torch.randn(3), {"epsilon": 1.0}, "epsilon"),
    ],
)
def test_bad_data_and_options(X: Tensor, y: Tensor, options: dict[str, float], word: str) -> None:
    with pytest.raises(InputError, match=word):
        positive_init_(network(4, [3]), X, y, **options)
