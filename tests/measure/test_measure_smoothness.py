"""The probe: the right number, on the same function both times, without a trace, and words where there is none."""

import copy
import json
import math
import random
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.noise import gradient_noise, mean_noise
from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import POINTS, Observation

# f, f', f'' of functions whose smoothness is known
KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float], Callable[[float], float]]] = {
    "quartic": (lambda x: x**4, lambda x: 4 * x**3, lambda x: 12 * x * x),
    "cosh": (torch.cosh, math.sinh, math.cosh),
    "exponential": (torch.exp, math.exp, math.exp),
    "logistic": (
        lambda x: nn.functional.softplus(-x),
        lambda x: -1 / (1 + math.exp(x)),
        lambda x: math.exp(x) / (1 + math.exp(x)) ** 2,
    ),
    "quadratic": (lambda x: 1.5 * x * x, lambda x: 3 * x, lambda x: 3.0),
}
# constants with |f''| <= L0 + L1 |f'| everywhere, and others that are too small
CLAIMS = {
    "quartic": ((4.0, 3.0), (1.0, 0.5)),
    "cosh": ((1.0, 1.0), (1.0, 0.2)),
    "exponential": ((0.0, 1.0), (0.05, 0.5)),
    "logistic": ((0.0, 1.0), (0.0, 0.4)),
    "quadratic": ((3.0, 0.0), (2.9, 0.0)),
}


def scalar(value: float) -> tuple[nn.Parameter, nn.Module]:
    w = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    return w, nn.ParameterList([w])


def descend(name: str, start: float, lr: float, steps: int, **options: Any) -> SmoothnessProbe:
    """Gradient descent on a known function, every step probed."""
    w, model = scalar(start)
    f = KNOWN[name][0]
    probe = SmoothnessProbe(model, **options)
    opt = torch.optim.SGD([w], lr=lr)
    for _ in range(steps):
        opt.zero_grad()
        f(w).sum().backward()
        probe.step(opt, lambda: f(w).sum())
    return probe


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(x=st.floats(-2.5, 2.5), d=st.floats(1e-3, 0.5), up=st.booleans())
def test_the_value_is_the_largest_quotient(name: str, x: float, d: float, up: bool) -> None:
    f, slope, curvature = KNOWN[name]
    if abs(slope(x)) < 1e-6:
        return
    w, model = scalar(x)
    opt = torch.optim.SGD([w], lr=d / abs(slope(x)), maximize=up)
    f(w).sum().backward()
    seen = SmoothnessProbe(model).step(opt, lambda: f(w).sum())
    step = w.item() - x
    assert seen is not None
    assert seen.grad_norm == pytest.approx(abs(slope(x)), rel=1e-12)
    assert seen.step_length == pytest.approx(abs(step), rel=1e-9)
    for a, ratio in zip(POINTS, seen.ratios):
        assert ratio == pytest.approx(abs(slope(x + a * step) - slope(x)) / (a * abs(step)), rel=1e-7, abs=1e-9)
    grid = [curvature(x + t / 50 * step) for t in range(51)]
    assert min(grid) * (1 - 1e-2) - 1e-9 <= seen.smoothness <= max(grid) * (1 + 1e-2) + 1e-9


@pytest.mark.parametrize("name", KNOWN)
def test_true_constants_are_not_refuted_and_small_ones_are(name: str) -> None:
    true, small = CLAIMS[name]
    lr = {"quartic": 0.002, "exponential": 0.05, "logistic": 2.0}.get(name, 0.05)
    start = {"exponential": 2.0, "logistic": 0.0}.get(name, 3.0)
    for step in (lr, 4 * lr):
        probe = descend(name, start, step, 25)
        assert not probe.refutes(*true), str(probe.refutes(*true))
        assert probe.refutes(*true).checked == 25 * 6
        refuted = probe.refutes(*small)
        assert refuted
        assert refuted.observed > refuted.allowed
        assert "is refuted at step" in str(refuted)
        assert "proves nothing" in str(probe.refutes(*true))


def test_a_step_uphill_meets_prop_6_exactly() -> None:
    """For f = e^x the bound is an equality on every step uphill: the rounding allowance must not hide, nor invent."""
    w, model = scalar(1.0)
    probe = SmoothnessProbe(model)
    opt = torch.optim.SGD([w], lr=0.3, maximize=True)
    w.exp().sum().backward()
    probe.step(opt, lambda: w.exp().sum())
    assert probe.observations[0].step_length > 0.5  # the factor is 1.5 there
    assert not probe.refutes(0.0, 1.0)
    assert probe.refutes(0.0, 1.0 - 1e-9)


def test_rounding_alone_refutes_nothing() -> None:
    """A float32 network on steps near the limit of its precision, against constants seen in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    double = copy.deepcopy(model).double()
    x, y = torch.randn(16, 6), torch.randn(16, 1)
    seen = []
    for net, dtype in ((double, torch.float64), (model, torch.float32)):
        loss = lambda net=net, dtype=dtype: (net(x.to(dtype)) - y.to(dtype)).square().mean()  # noqa: E731
        probe = SmoothnessProbe(net)
        loss().backward()
        probe.step(torch.optim.SGD(net.parameters(), lr=2e-5), loss)
        seen.append(probe)
    assert seen[1].observations[0].outcome == "measured"
    exact = seen[0].observations[0].smoothness
    assert seen[1].observations[0].smoothness != pytest.approx(exact, rel=1e-6)
    assert not seen[1].refutes(exact, 0.0)


@pytest.mark.parametrize(("L0", "L1"), [(-1.0, 0.0), (1.0, math.nan), (math.inf, 0.0)])
def test_a_claim_that_is_no_claim_is_refused(L0: float, L1: float) -> None:
    with pytest.raises(InputError, match="is no finite number"):
        descend("cosh", 1.0, 0.1, 1).refutes(L0, L1)


# -------------------------------------------------------------------------------------- defects of public code, in turn


class Rows(nn.Module):
    """Rows of data behind a network with dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.4), nn.Linear(12, 1))
        self.x = torch.randn(64, 5)

    def loss(self, some: slice = slice(None)) -> Tensor:
        x = self.x[some]
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()


def test_another_batch_for_the_second_gradient_is_an_error() -> None:
    model = Rows()
    batches = iter(range(0, 64, 8))
    probe = SmoothnessProbe(model)
    model.loss().backward()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        at = next(batches)
        return model.loss(slice(at, at + 8))

    with pytest.raises(InputError, match=r"closure is not deterministic.*same batch.*dropout in train mode: net\.3"):
        probe.step(opt, closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)), "the step was taken all the same"
    assert probe.observations == []


def test_dropout_from_a_generator_of_its_own_is_an_error() -> None:
    w, model = scalar(1.0)
    own = torch.Generator().manual_seed(0)
    w.square().sum().backward()
    with pytest.raises(InputError, match="generator"):
        SmoothnessProbe(model).step(
            torch.optim.SGD([w], lr=0.1), lambda: w.square().sum() * torch.rand((), generator=own)
        )


def test_norm_and_smoothness_of_pieces_are_those_of_the_batch() -> None:
    """Unequal pieces, whatever their number: the same n and Lhat as in one."""
    found = []
    for cuts in ((0, 64), (0, 16, 64), (0, 1, 5, 30, 64)):
        model = Rows().double().eval()
        model.x = model.x.double()

        def pieces(model: Rows = model, cuts: tuple[int, ...] = cuts) -> Iterator[tuple[Tensor, int]]:
            for i, j in pairwise(cuts):
                yield model.loss(slice(i, j)), j - i

        model.loss().backward()
        probe = SmoothnessProbe(model)
        seen = probe.step(torch.optim.SGD(model.parameters(), lr=0.01), pieces)
        assert seen is not None
        found.append(seen)
    assert math.isnan(found[0].noise)
    for seen in found[1:]:
        assert (seen.smoothness, seen.grad_norm, seen.loss) == pytest.approx(
            (found[0].smoothness, found[0].grad_norm, found[0].loss), rel=1e-9
        )
        assert seen.noise > 0


def test_a_run_with_a_probe_is_the_run_without() -> None:
    """Weights, statistics, dropout masks of later steps, lr, optimizer: 12 steps, bit for bit."""
    runs = []
    for every in (None, 1, 5):
        model = Rows()
        opt = torch.optim.Adam(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k))
        probe = SmoothnessProbe(model, every=every) if every else None
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        for k in range(12):
            opt.zero_grad()
            some = slice(4 * k, 4 * k + 16)
            model.loss(some).backward()
            grads = [p.grad for p in model.parameters()]
            bits = [None if g is None else g.clone() for g in grads]
            if probe is None:
                opt.step()
            else:
                with probe.around(lambda model=model, some=some: model.loss(some)):
                    opt.step()
            for p, g, b in zip(model.parameters(), grads, bits):
                assert p.grad is g
                assert (g is None and b is None) or torch.equal(g, b)
            schedule.step()
        state = [*model.state_dict().values(), *(v for s in opt.state.values() for v in s.values())]
        runs.append((state, torch.get_rng_state(), random.getstate(), np.random.rand(), schedule.get_last_lr()))
        if probe is not None:
            assert [o.step for o in probe.observations] == list(range(every, 13, every))
            assert all(o.outcome == "measured" and 0 < o.smoothness < 1e4 for o in probe.observations)
    for state, torch_random, python_random, numpy_random, lr in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state, runs[0][0], strict=True))
        assert torch.equal(torch_random, runs[0][1])
        assert (python_random, numpy_random, lr) == runs[0][2:]


def test_gradients_without_probe_steps_cost_nothing() -> None:
    """The closure is called 2 + 6 times at the first probe, 1 + 6 at later ones, and never in between."""
    w, model = scalar(2.0)
    calls = []

    def closure() -> Tensor:
        calls.append(probe.steps)
        return w.square().sum()

    probe = SmoothnessProbe(model, every=3)
    opt = torch.optim.SGD([w], lr=0.1)
    for _ in range(6):
        w.grad = torch.ones_like(w)
        probe.step(opt, closure)
    assert calls == [3] * 8 + [6] * 7
    assert probe.cost == "7 extra gradients every 3 steps"


def test_autocast_s_cache_of_weights_is_emptied() -> None:
    """Inside one autocast region half copies of the weights are kept by name: stale ones would show no change."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(32, 8)
    probe = SmoothnessProbe(net, eps=torch.finfo(torch.bfloat16).eps)
    opt = torch.optim.SGD(net.parameters(), lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lambda: net(x).float().square().mean()  # noqa: E731
        loss().backward()
        seen = probe.step(opt, loss)
    assert seen is not None
    assert seen.outcome == "measured"
    assert seen.smoothness > 0


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
        ({"points": ()}, "points="),
        ({"points": (0.0, 1.0)}, "points="),
        ({"points": (0.5, 1.5)}, "points="),
        ({"eps": 0.0}, "eps=0.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        SmoothnessProbe(scalar(1.0)[1], **options)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="no parameter with requires_grad"):
        SmoothnessProbe(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("closure", "says"),
    [
        (lambda w: w.square(), "shape"),
        (lambda w: 3.0, "float"),
        (lambda w: torch.tensor(1.0), "without a gradient"),
        (lambda w: torch.ones(1, requires_grad=True).sum(), "depends on no trainable parameter"),
        (lambda w: [], "depends on no trainable parameter"),
    ],
)
def test_a_closure_of_no_use_is_refused(closure: Callable[[Tensor], Any], says: str) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    probe = SmoothnessProbe(nn.ParameterList([w]))
    with pytest.raises((InputError, TypeError), match=says):
        probe.before(lambda: closure(w))


def test_a_closure_that_goes_backward_is_refused_and_p_grad_is_kept() -> None:
    w, model = scalar(2.0)
    w.grad = torch.ones_like(w)
    kept = w.grad

    def closure() -> Tensor:
        loss = w.square().sum()
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(InputError, match="called backward"):
        SmoothnessProbe(model).step(torch.optim.SGD([w], lr=0.1), closure)
    assert w.grad is kept
    assert kept.item() == 1.0


def test_what_cannot_be_measured_is_counted() -> None:
    w, model = scalar(1.0)
    probe = SmoothnessProbe(model)
    bad = {1: math.nan, 2: math.inf}
    for step in range(1, 16):
        w.grad = torch.ones_like(w)
        lr = 0.0 if step == 3 else 1e-17 * 2e1 if step == 4 else 0.1
        with torch.no_grad():
            w.fill_(0.0 if step == 4 else 1.0 + step)
        shift = 1e10 if step == 4 else 0.0
        probe.step(
            torch.optim.SGD([w], lr=lr),
            lambda step=step, shift=shift: (w + shift).square().sum() * bad.get(step, 1.0),
        )
    outcomes = [o.outcome for o in probe.observations]
    assert outcomes[:5] == ["not finite", "not finite", "no step", "rounding", "measured"]
    fit = probe.fit()
    assert fit.left_out == {"rounding": 1, "not finite": 2, "no step": 1}
    assert fit.points == 11
    assert "11, 1 rounding, 2 not finite, 1 no step" in str(fit)


def test_an_exception_in_the_step_leaves_the_probe_ready() -> None:
    w, model = scalar(1.0)
    probe = SmoothnessProbe(model)
    with pytest.raises(ZeroDivisionError), probe.around(lambda: w.square().sum()):
        raise ZeroDivisionError
    assert probe.after() is None
    assert probe.observations == []


def test_state_goes_through_json() -> None:
    probe = descend("cosh", 3.0, 0.05, 12)
    other = SmoothnessProbe(scalar(0.0)[1])
    other.load_state_dict(json.loads(json.dumps(probe.state_dict())))
    assert other.steps == 12
    assert [o.ratios for o in other.observations] == [o.ratios for o in probe.observations]
    assert other.fit().L0 == probe.fit().L0
    with pytest.raises(InputError, match="points="):
        SmoothnessProbe(scalar(0.0)[1], points=(1.0,)).load_state_dict(probe.state_dict())


# ------------------------------------------------------------------------------------------------------- gradient noise


def test_noise_is_unbiased() -> None:
    """Samples of variance 3 in each of 4 dimensions, in unequal pieces: 12 on average, though single values vary."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        samples = 1.5 + math.sqrt(3) * rng.standard_normal((7, 4))
        pieces = [samples[:1], samples[1:3], samples[3:]]
        norms = [float(np.linalg.norm(p.mean(0))) for p in pieces]
        found.append(gradient_noise(norms, [1, 2, 4], float(np.linalg.norm(samples.mean(0)))))
    assert min(found) < 0 < max(found)
    assert np.mean(found) == pytest.approx(12.0, abs=4 * np.std(found) / math.sqrt(4000))
    measured = mean_noise(found)
    assert measured is not None
    assert measured.error is not None
    assert measured.error == pytest.approx(np.std(found) / math.sqrt(4000), rel=0.6)
    assert mean_noise([math.nan]) is None
    assert math.isnan(gradient_noise([1.0], [4], 1.0))
    for norms, sizes in (([1.0], [1, 2]), ([1.0, 1.0], [0, 2])):
        with pytest.raises(InputError, match="sizes="):
            gradient_noise(norms, sizes, 1.0)


def test_noise_of_the_probe_is_that_of_the_data() -> None:
    """The mean of (w - y_i)²/2 in pieces of 2: gradients w - y_i, their variance that of y."""
    y = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w, model = scalar(0.3)
    probe = SmoothnessProbe(model, points=(1.0,))
    opt = torch.optim.SGD([w], lr=1e-3)
    for i in range(0, 4000, 16):
        w.grad = torch.ones_like(w)
        probe.step(opt, lambda i=i: (((w - y[j : j + 2]).square().mean() / 2, 2) for j in range(i, i + 16, 2)))
    noise = probe.fit().noise
    assert noise is not None
    assert noise.error is not None
    assert noise.value == pytest.approx(float(y.var()), abs=4 * noise.error)
    assert noise.error < 0.2


def test_ranks_add_up() -> None:
    """Two ranks with shares of 3 and 5 rows see what one process with two pieces sees."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = [(0, 3), (3, 8)]

    def loss(w: Tensor, i: int, j: int) -> Tensor:
        return ((x[i:j] @ w) ** 4).mean()

    def probed(pieces: list[tuple[int, int]], **options: Any) -> Observation:
        w = nn.Parameter(torch.tensor([0.4, -0.2, 1.0], dtype=torch.float64))
        probe = SmoothnessProbe(nn.ParameterList([w]), **options)
        w.grad = torch.ones_like(w)
        seen = probe.step(torch.optim.SGD([w], lr=0.01), lambda: ((loss(w, i, j), j - i) for i, j in pieces))
        assert seen is not None
        return seen

    alone = probed(shares)
    barrier = threading.Barrier(2, timeout=20)
    results: list[Observation | None] = [None, None]
    handed_in: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def rank(me: int) -> None:
        def all_reduce(t: Tensor) -> None:
            handed_in[me] = t.clone()
            barrier.wait()
            total = handed_in[0] + handed_in[1]
            barrier.wait()
            t.copy_(total)

        results[me] = probed([shares[me]], all_reduce=all_reduce)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seen in results:
        assert seen is not None
        for name in ("smoothness", "grad_norm", "loss", "noise"):
            assert getattr(seen, name) == pytest.approx(getattr(alone, name), rel=1e-9), name
