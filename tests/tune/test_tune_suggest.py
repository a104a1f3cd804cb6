"""suggest: known constants are found, nothing is left behind, and bad input is named."""

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from surefoot.errors import InputError
from surefoot.train.config import TrainConfig
from surefoot.tune import Suggestion, suggest
from surefoot.tune.probing_run import ENOUGH_FOR_NOISE, LEAST, NOISE
from surefoot.tune.rules import (
    DELTA,
    EDGE,
    MEAN_OF_SCHEDULE,
    REACH,
    clipping_bias,
    floor_delta,
    proposition_7,
    zhang_2020,
)

Loss = Callable[[nn.Module, Any], Tensor]
SPECTRUM = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)


class Quadratic(nn.Module):
    """½ wᵀ diag(H) w, with a batch's own slope on top of it."""

    def __init__(self, H: Tensor) -> None:
        super().__init__()
        self.H = H
        self.w = nn.Parameter(torch.ones_like(H))

    def forward(self, slope: Tensor) -> Tensor:
        return (self.H * self.w.square()).sum() / 2 + slope @ self.w


def call(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def slopes(count: int = NOISE, scale: float = 0.1, size: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(scale * torch.randn(count, size, generator=generator, dtype=torch.float64))


def mse(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def rows(n: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, x.prod(1, keepdim=True) + x[:, :1])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 1))


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(rows(), batch_size=16, shuffle=True, **options)


def reason(found: Suggestion, name: str) -> Any:
    return next(r for r in found.reasons if r.name == name)


# known constants


def test_the_smoothness_of_a_round_quadratic_is_found_exactly() -> None:
    model = Quadratic(torch.full((3,), 5.0, dtype=torch.float64))
    found = suggest(model, call, slopes(), steps=1000)
    assert found.lr == pytest.approx(EDGE / 5, rel=1e-3)
    lr = reason(found, "lr")
    assert lr.low <= lr.value <= lr.high
    assert lr.low == pytest.approx(lr.high, rel=1e-9)
    assert (found.sure, found.doubts, found.warmup) == (True, (), 0)


def test_a_quadratic_with_a_spectrum() -> None:
    found = suggest(Quadratic(SPECTRUM), call, slopes(), steps=1000)
    lr = reason(found, "lr")
    assert EDGE / SPECTRUM.max() <= found.lr <= EDGE / SPECTRUM.min()
    assert EDGE / SPECTRUM.max() * 0.999 <= lr.low <= lr.value <= lr.high
    assert found.lr * found.gamma == pytest.approx(REACH * median_norm(found) / smoothness(found), rel=2e-3)


def smoothness(found: Suggestion) -> float:
    return float(found.measurements[0].value)


def median_norm(found: Suggestion) -> float:
    return float(next(m for m in found.measurements if m.name == "gradient norm").value)


def test_logistic_regression_lies_above_its_bound() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5, dtype=torch.float64)
    y = (x[:, :1] + 0.5 * torch.randn(64, 1, dtype=torch.float64) > 0).double()
    model = nn.Linear(5, 1, bias=False).double()
    bound = float(torch.linalg.eigvalsh(x.T @ x / 64)[-1]) / 4  # of the Hessian, anywhere
    found = suggest(
        model, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), [(x, y)], steps=1000, optimizer="gclip"
    )
    assert found.lr >= EDGE / bound * 0.999
    assert found.lr < 100 * EDGE / bound
    assert found.delta == 0


def test_momentum_and_schedule_correct_lr_and_the_longest_step() -> None:
    plain = suggest(net(), mse, shuffled(), steps=600)
    for momentum, schedule in ((0.9, "constant"), (0.0, "cosine"), (0.5, "linear")):
        other = suggest(net(), mse, shuffled(), steps=600, momentum=momentum, schedule=schedule)
        expected = plain.lr * (1 - momentum) / MEAN_OF_SCHEDULE[schedule]
        assert other.lr == pytest.approx(expected, rel=2e-3)
        assert other.lr * other.gamma == pytest.approx(plain.lr * plain.gamma * (1 - momentum), rel=4e-3)


def test_the_noise_of_a_batch() -> None:
    batches = slopes(NOISE, 1.0)  # a pass over them is what the noise is taken from
    found = suggest(Quadratic(SPECTRUM), call, batches, steps=10 * ENOUGH_FOR_NOISE)
    stacked = torch.stack(batches)
    sigma = math.sqrt(float((stacked - stacked.mean(0)).square().sum()) / (NOISE - 1))
    [seen] = [m.value for m in found.measurements if m.name.startswith("noise")]
    assert seen == pytest.approx(sigma, rel=1e-9)
    assert f"clipping bias {clipping_bias(found.delta, sigma):.3g}" in reason(found, "δ").constants
    assert not found.notes


def test_the_floor_gives_way_to_a_gradient_that_grows_with_the_curvature() -> None:
    def scaled(model: Any, batch: tuple[float, float]) -> Tensor:
        c, slope = batch  # smoothness c, and a gradient of about the size c
        return c * (model.w.square().sum() / 2 + slope * model.w.sum())

    batches = [(math.exp(2.5 * math.sin(i / 8)), 8 * (-1) ** i) for i in range(50)]
    found = suggest(Quadratic(SPECTRUM), scaled, batches, steps=1000)
    assert "L1 not identified" not in reason(found, "δ").constants
    assert 0 < found.delta < DELTA


@pytest.mark.parametrize(("tenth", "text"), [(10.0, "10 times as large as"), (0.1, "only 0.1 times")])
def test_a_wrong_lr_is_named_and_does_not_enter(tenth: float, text: str) -> None:
    plain = suggest(net(), mse, shuffled(), steps=600)
    wrong = suggest(net(), mse, shuffled(), steps=600, lr=tenth * plain.lr)
    assert (wrong.lr, wrong.gamma, wrong.doubts) == (plain.lr, plain.gamma, plain.doubts)
    [note] = set(wrong.notes) - set(plain.notes)
    assert note == f"your lr of {tenth * plain.lr:g} is {text} the one suggested, {plain.lr:g}"
    assert suggest(net(), mse, shuffled(), steps=600, lr=2 * plain.lr).notes == plain.notes


def test_constants_that_drift_are_doubted() -> None:
    class Rising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, batch: Tensor) -> Tensor:
            return batch * self.w.square().sum() / 2 + self.w.sum()

    batches = [torch.tensor(1.2**i, dtype=torch.float64) for i in range(60)]
    found = suggest(Rising(), call, batches, steps=1000)
    assert not found.sure
    assert any(doubt.startswith("L went from") for doubt in found.doubts)
    assert "not sure: L went from" in str(found)


# the suggestion as an object


@pytest.mark.parametrize("optimizer", ["delta-gclip", "gclip", "sgd"])
def test_the_options_are_those_of_surefoot_train(optimizer: str) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "momentum": 0.9, "schedule": "cosine"}
    found = suggest(net(), mse, shuffled(), steps=600, **options)
    config = TrainConfig.from_json(found.config(), source="test").resolved()
    assert (config.optimizer, config.lr, config.momentum) == (optimizer, found.lr, 0.9)
    assert (config.gamma, config.delta) == {
        "delta-gclip": (found.gamma, found.delta),
        "gclip": (found.gamma, None),
        "sgd": (None, None),
    }[optimizer]
    assert config.lr_schedule == "cosine"
    assert [r.name for r in found.reasons if r.name in "γδ"] == {"delta-gclip": ["γ", "δ"], "gclip": ["γ"], "sgd": []}[
        optimizer
    ]


def test_it_can_be_printed_and_stored() -> None:
    found = suggest(net(), mse, shuffled(), steps=600, lr=1e3)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["config"] == found.config()
    assert len(document["observations"]) == len(found.observations) >= 10
    for text in ("edge of stability", "Prop. 8", "J. Zhang 2020", f"cost: {found.cost:,} gradients", "note: your lr"):
        assert text in str(found)


@pytest.mark.parametrize("steps", [LEAST, 10 * ENOUGH_FOR_NOISE])
def test_every_gradient_is_counted(steps: int) -> None:
    calls = 0

    def counted(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return mse(model, batch)

    found = suggest(net(), counted, shuffled(), steps=steps)
    assert found.cost == calls
    assert calls <= max(LEAST, steps // 10)
    assert calls >= 0.8 * max(LEAST, steps // 10)


def test_the_same_again_gives_the_same() -> None:
    def once() -> dict[str, Any]:
        torch.manual_seed(3)
        return suggest(net(), mse, shuffled(), steps=600).to_json()

    assert once() == once()


def test_each_step_draws_anew() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1))
    masks = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        masks.append(tuple(nn.functional.dropout(torch.ones(8), 0.5).tolist()))
        return mse(model, batch)

    suggest(model, loss, [tuple(rows().tensors)], steps=300)
    assert len(set(masks)) >= len(masks) // 3  # two or three gradients a step share one


# nothing is left behind


class Draws:
    """A loader with draws, an order and a number of its own."""

    def __init__(self) -> None:
        self.numpy, self.python = np.random.default_rng(0), random.Random(0)
        self.order, self.passes = list(range(8)), 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        self.python.shuffle(self.order)
        x, y = rows().tensors
        for i in self.order:
            kept = torch.from_numpy(self.numpy.permutation(96)[:32])
            yield x[kept] + i / 100, y[kept]


LOADERS: dict[str, Callable[[], Any]] = {
    "generator": lambda: shuffled(generator=torch.Generator().manual_seed(5)),
    "global": shuffled,
    "workers": lambda: shuffled(num_workers=1),
    "its own": Draws,
}


def state(model: nn.Module, loader: Any) -> list[Any]:
    """All that must come back; the loader's is what it gives next, which is looked at only once."""
    found: list[Any] = [t.clone() for t in model.state_dict().values()]
    found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    found += [m.training for m in model.modules()]
    found += [torch.get_rng_state(), random.getstate()[1], np.random.get_state(legacy=False)["state"]["key"].tolist()]
    return found + [t.clone() for batch in loader for t in batch]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(left, right)
    )


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_everything_is_put_back(name: str, fails: bool) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        draws = random.random() + np.random.rand()
        assert draws >= 0
        if fails and calls == 12:
            model.eval()
            raise RuntimeError("no")
        return mse(model, batch)

    def ready() -> tuple[nn.Module, Any]:
        model = net()
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d)).eval()
        mse(model, rows()[:16]).backward()
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        return model, LOADERS[name]()

    untouched = state(*ready())
    model, loader = ready()
    gradients = [p.grad for p in model.parameters()]
    if fails:
        with pytest.raises(RuntimeError, match="no"):
            suggest(model, loss, loader, steps=300)
    else:
        assert suggest(model, loss, loader, steps=300).cost == calls
    assert calls >= 12
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients))
    assert same(state(model, loader), untouched)


def test_that_test_can_fail() -> None:
    model, loader = net(), shuffled(generator=torch.Generator().manual_seed(5))
    before = state(model, loader)
    assert not same(state(model, loader), before)  # the generator has gone on


def test_a_buffer_that_is_replaced_and_a_loss_that_calls_backward() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, batch: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return batch * self.w.square().sum()

    model = Counting()
    buffer = model.calls
    suggest(model, call, [torch.ones(())], steps=100)
    assert model.calls is buffer
    assert buffer == 0

    def backwards(model: nn.Module, batch: Tensor) -> Tensor:
        loss = model(batch)
        loss.backward(retain_graph=True)
        return loss

    model.w.grad = torch.ones(2)
    with pytest.raises(InputError, match=r"loss_fn has called backward"):
        suggest(model, backwards, [torch.ones(())], steps=100)
    assert torch.equal(model.w.grad, torch.ones(2))


# kinds of training


def test_accumulated_batches_are_one() -> None:
    x, y = (t.double() for t in rows().tensors)
    model = nn.Linear(6, 1).double()
    pieces = [(a, b) for a, b in zip(x.split(24), y.split(24))]
    whole = suggest(model, mse, [(x, y)], steps=300)
    parts = suggest(model, mse, pieces, steps=300, accumulate=4)
    assert parts.lr == pytest.approx(whole.lr, rel=1e-3)
    assert parts.cost == pytest.approx(4 * (whole.cost), rel=0.2)
    assert parts.notes[-1].endswith("batches are accumulated (accumulate > 1)")


def test_autocast_with_its_precision() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mse(model, batch)

    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    exact = suggest(model, mse, shuffled(generator=torch.Generator().manual_seed(0)), steps=600)
    half = suggest(
        model,
        loss,
        shuffled(generator=torch.Generator().manual_seed(0)),
        steps=600,
        eps=torch.finfo(torch.bfloat16).eps,
    )
    assert 1 / 3 < half.lr / exact.lr < 3


def test_one_batch_works_and_says_what_is_unknown() -> None:
    found = suggest(net(), mse, [tuple(rows().tensors)], steps=600)
    [note] = found.notes
    assert note.startswith("how far batches differ (the noise) is unknown: the loader gives one batch, ")
    assert not [m for m in found.measurements if m.name.startswith("noise")]


def test_a_small_budget_says_what_is_unknown() -> None:
    found = suggest(net(), mse, shuffled(), steps=LEAST, budget=1.0)
    assert found.cost <= LEAST
    assert found.notes[-1].endswith(f"it takes a budget of {ENOUGH_FOR_NOISE} gradients")


def test_a_run_that_ends_early_is_doubted() -> None:
    x, y = rows().tensors
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 96, 4)]
    batches[20] = (batches[20][0] * math.inf, batches[20][1])
    found = suggest(nn.Linear(6, 1), mse, batches, steps=600)
    [doubt] = [d for d in found.doubts if d.startswith("the probing run ended early")]
    assert doubt.endswith("the loss or gradient of step 21 is not finite")
    batches[1] = batches[20]
    with pytest.raises(
        InputError, match=r"only 1 of 2 steps .*: the loss or gradient of step 2 is not finite.* that batch"
    ):
        suggest(nn.Linear(6, 1), mse, batches, steps=600)


# bad input


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (
        lambda: suggest(net(), lambda m, b: mse(m, b) * math.nan, shuffled(), steps=300),
        r"loss_fn gives a loss of nan before the first step; look at the data",
    ),
    "flat": (
        lambda: suggest(net(), lambda m, b: 0 * mse(m, b), shuffled(), steps=300),
        r"loss_fn has a gradient of norm 0.0 before the first step",
    ),
    "iterator": (
        lambda: suggest(net(), mse, iter(shuffled()), steps=300),
        r"loader=_SingleProcessDataLoaderIter is an iterator: .* give what it was made from",
    ),
    "generator": (lambda: suggest(net(), mse, (b for b in shuffled()), steps=300), r"loader=generator is an iterator"),
    "empty": (lambda: suggest(net(), mse, [], steps=300), r"loader=list gives no batch"),
    "budget": (
        lambda: suggest(net(), mse, shuffled(), steps=100, budget=0.1),
        rf"budget=0.1 of steps=100 is 10 gradients; measuring anything takes {LEAST}: give budget=0.25 or more",
    ),
    "steps": (lambda: suggest(net(), mse, shuffled(), steps=10, budget=1), r"measuring anything .* give more steps"),
    "no parameters": (lambda: suggest(nn.Tanh(), mse, shuffled(), steps=300), r"model=Tanh has no parameter"),
    "two losses": (
        lambda: suggest(net(), lambda m, b: (m(b[0]) - b[1]).flatten(), shuffled(), steps=300),
        r"loss_fn gives a loss of shape \(16,\); return the mean loss",
    ),
    "a float": (lambda: suggest(net(), lambda m, b: 1.0, shuffled(), steps=300), r"loss_fn gives a loss of float"),  # type: ignore[arg-type]
    "detached": (
        lambda: suggest(net(), lambda m, b: mse(m, b).detach(), shuffled(), steps=300),
        r"loss_fn gives a loss without a gradient",
    ),
    "optimizer": (lambda: suggest(net(), mse, shuffled(), steps=300, optimizer="adam"), r"optimizer='adam' is none"),
    "schedule": (lambda: suggest(net(), mse, shuffled(), steps=300, schedule="step"), r"schedule='step' is unknown"),
    "momentum": (lambda: suggest(net(), mse, shuffled(), steps=300, momentum=1.0), r"momentum=1.0 is outside \[0, 1\)"),
    "lr": (lambda: suggest(net(), mse, shuffled(), steps=300, lr=0.0), r"lr=0.0 is no step size"),
    "accumulate": (lambda: suggest(net(), mse, shuffled(), steps=300, accumulate=0), r"accumulate=0 is no number of"),
    "budget 2": (lambda: suggest(net(), mse, shuffled(), steps=300, budget=2.0), r"budget=2.0 is outside \(0, 1\]"),
    "no steps": (lambda: suggest(net(), mse, shuffled(), steps=0), r"steps=0 is no number of steps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    ask, message = BAD[name]
    with pytest.raises(InputError, match=message):
        ask()


def test_draws_of_its_own_inside_the_loss_are_found() -> None:
    own = torch.Generator().manual_seed(0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return mse(model, (batch[0] + torch.randn(batch[0].shape, generator=own), batch[1]))

    with pytest.raises(InputError, match=r"loss_fn is not deterministic: .* not from a generator"):
        suggest(net(), loss, shuffled(), steps=300)


# the rules


def test_the_rules() -> None:
    assert floor_delta(1.0, 0.0, 1e9) == DELTA
    assert floor_delta(1.0, 10.0, 10.0) == pytest.approx(1 / 300)
    assert floor_delta(1.0, 10.0, 10.0, momentum=0.9) == pytest.approx(1 / 3000)
    assert clipping_bias(1.0, 5.0) == 0.0
    assert proposition_7(2.0, 0.0) == (0.25, math.inf)
    lr, gamma = proposition_7(3.0, 5.0)
    assert lr * gamma == pytest.approx(1 / (3 * 5.0))
    assert zhang_2020(3.0, 0.0) == pytest.approx((1 / 30, 30.0))
    assert zhang_2020(3.0, 5.0) == pytest.approx((1 / 30, 0.6))
