"""What every probe of smoothness promises, as tests that anybody's own probe can be run through."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Closure = Callable[[], Tensor]
SIXTHS = tuple(i / 6 for i in range(1, 7))


class ProbeSuite:
    """The conformance tests of a probe that measures ||grad f(x + a d) - grad f(x)|| / (a ||d||) along a step d.

    Subclass it in a test file under a name that begins with Test and say how a step is probed; pytest (or any runner
    that calls the methods named test_*) does the rest. Each failure says in words which promise was broken.

    Attributes:
        probe: probe(model, optimizer, closure) takes one step of the optimizer, with the gradients that are there, and
            returns (smoothness, grad_norm): the largest quotient over the points and ||grad f(x)||; smoothness is NaN
            where nothing can be measured. The closure returns the loss of the batch, without backward().
        points: the a that the probe looks at, in (0, 1].

    Example:
        >>> from surefoot.measure.smoothness import SmoothnessProbe
        >>> class TestMine(ProbeSuite):
        ...     @staticmethod
        ...     def probe(model, optimizer, closure):
        ...         seen = SmoothnessProbe(model).step(optimizer, closure)
        ...         return seen.smoothness, seen.grad_norm
        >>> TestMine().test_a_quadratic_has_its_curvature()
    """

    probe: Callable[[nn.Module, torch.optim.Optimizer, Closure], tuple[float, float]]
    points: Sequence[float] = SIXTHS

    # ----------------------------------------------------------------------------------------------- the right numbers

    def test_a_quadratic_has_its_curvature(self) -> None:
        """For f = ||A x||²/2 it is ||A²d||/||d||, at every point of the step."""
        for seed in range(3):
            values = torch.Generator().manual_seed(seed)
            w = _leaf(torch.randn(5, generator=values, dtype=torch.float64))
            scale = torch.rand(5, generator=values, dtype=torch.float64) + 0.5
            seen, norm = self._probed(_model(w), lambda w=w, scale=scale: (scale * w).square().sum() / 2, lr=0.1)
            grad = scale**2 * seen.start[0]
            _close(seen.smoothness, float((scale**2 * grad).norm() / grad.norm()), "smoothness of a quadratic", 1e-9)
            _close(norm, float(grad.norm()), "norm of the gradient", 1e-12)

    def test_a_quartic_has_the_largest_quotient_over_the_points(self) -> None:
        """For f = x⁴, forwards and backwards: max over a of 4((x + a d)³ - x³)/(a d)."""
        for x, lr in ((2.0, 0.01), (1.0, -0.05), (-3.0, 0.002)):
            w = _leaf([x])
            d = -lr * 4 * x**3
            right = max(abs(4 * ((x + a * d) ** 3 - x**3) / (a * d)) for a in self.points)
            seen, norm = self._probed(_model(w), lambda w=w: (w**4).sum(), lr=lr)
            _close(seen.smoothness, right, f"smoothness of x⁴ from {x} by {d:.3g}", 1e-9)
            _close(norm, abs(4 * x**3), "norm of the gradient", 1e-12)

    def test_smoothness_and_norm_have_one_unit(self) -> None:
        """A loss times 10 has 10 times the smoothness and 10 times the norm, however many rows the batch has."""
        x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
        found = []
        for unit, rows in ((1.0, x), (10.0, x), (1.0, x.repeat(7, 1))):
            w = _leaf([0.3, -0.2])
            loss = lambda w=w, unit=unit, rows=rows: unit * (rows @ w - 1).square().mean()  # noqa: E731
            seen, norm = self._probed(_model(w), loss, lr=0.01 / unit)
            found.append((seen.smoothness / unit, norm / unit))
        for smoothness, norm in found[1:]:
            _close(smoothness, found[0][0], "smoothness in the unit of the loss", 1e-9)
            _close(norm, found[0][1], "norm in the unit of the loss", 1e-9)

    def test_any_step_will_do(self) -> None:
        """The step that was taken counts: with momentum and decay, and of Adam, it is not along the gradient."""
        scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
        for make in (
            lambda w: torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.5),
            lambda w: torch.optim.Adam([w], lr=0.1),
        ):
            w = _leaf([1.0, -2.0])
            opt = make(w)
            for _ in range(2):
                seen, _ = self._probed(_model(w), lambda w=w: (scale * w.square()).sum() / 2, optimizer=opt)
                d = w.detach() - seen.start[0]
                _close(seen.smoothness, float((scale * d).norm() / d.norm()), "smoothness along the step taken", 1e-6)

    # ------------------------------------------------------------------------------------ the same function both times

    def test_both_gradients_are_of_the_closure_s_batch(self) -> None:
        """p.grad may be of another batch, scaled or clipped: it makes the step and is no part of the quotient."""
        w = _leaf([1.0, 2.0])
        opt = torch.optim.SGD([w], lr=0.01)
        w.grad = torch.tensor([-30.0, 50.0], dtype=torch.float64)
        smoothness, norm = self.probe(_model(w), opt, lambda: w.square().sum())
        _close(smoothness, 2.0, "smoothness, with a p.grad of another batch", 1e-9)
        _close(norm, math.sqrt(20.0), "norm, with a p.grad of another batch", 1e-12)

    def test_both_gradients_see_the_same_random_numbers(self) -> None:
        """Dropout masks from torch, noise from NumPy and Python: the same at both ends, or noise is all there is."""
        draws: dict[str, Callable[[Tensor], Tensor]] = {
            "torch": lambda w: nn.functional.dropout(torch.ones_like(w), 0.5),
            "NumPy": lambda w: torch.from_numpy(1.0 + np.random.rand(w.numel())),
            "Python": lambda w: torch.tensor([1.0 + random.random() for _ in range(w.numel())], dtype=torch.float64),
        }
        for name, draw in draws.items():
            w = _leaf(torch.ones(20))
            seen, _ = self._probed(_model(w), lambda w=w, draw=draw: (draw(w) * w).square().sum() / 2, lr=1e-4)
            assert seen.smoothness <= 4 + 1e-6, (
                f"random numbers of {name} differ: {seen.smoothness} where 4 is the most"
            )

    def test_dropout_in_eval_mode_stays_off(self) -> None:
        """A probe measures the model in the mode that it is in."""
        for training in (True, False):
            w = _leaf(torch.ones(20))
            model = nn.Sequential(nn.Dropout(0.5))
            model.register_parameter("w", w)
            model.train(training)
            seen, _ = self._probed(model, lambda model=model, w=w: model(w).square().sum() / 2, lr=1e-3)
            assert model.training is training, "the mode was changed"
            assert model[0].training is training, "the mode of a part was changed"
            right = 4.0 if training else 1.0  # kept entries are doubled
            _close(seen.smoothness, right, f"smoothness with dropout, training={training}", 1e-6)

    def test_both_gradients_see_the_same_buffers(self) -> None:
        """A loss that depends on a buffer that its own forward moves has one value of it at both ends."""
        model = _Counting()
        w = model.w
        seen, _ = self._probed(model, model.loss, lr=1e-3)
        _close(seen.smoothness, 1.0, "smoothness where a buffer counts the evaluations", 1e-9)
        assert w.numel() == 3

    # ------------------------------------------------------------------------------------------------ no trace is left

    def test_the_step_is_the_step_without_a_probe(self) -> None:
        """Weights, state of the optimizer, p.grad, lr, buffers and random states: bit for bit as without."""
        for training in (True, False):
            (model, opt, closure), (plain, plain_opt, _) = (_network(training) for _ in range(2))
            for _ in range(3):
                for some, one in ((model, opt), (plain, plain_opt)):
                    torch.manual_seed(5)
                    one.zero_grad()
                    _network_loss(some).backward()
                grads = [p.grad for p in model.parameters()]
                with _random_numbers_kept("a probe"):
                    self.probe(model, opt, closure)
                plain_opt.step()
                assert all(p.grad is g for p, g in zip(model.parameters(), grads)), "p.grad was replaced"
                for name, left, right in (
                    ("p.grad", [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]),
                    ("a weight", model.parameters(), plain.parameters()),
                    ("a buffer", model.buffers(), plain.buffers()),
                    ("the optimizer's state", _state(opt), _state(plain_opt)),
                ):
                    assert _same_bits(left, right), f"{name} is another one than without a probe"
                assert opt.param_groups[0]["lr"] == plain_opt.param_groups[0]["lr"], "lr was changed"
                assert [m.training for m in model.modules()] == [m.training for m in plain.modules()], "mode changed"

    def test_the_running_statistics_of_batch_norm_are_put_back(self) -> None:
        """The probe's own forward passes leave no mark on them, nor on the count of batches."""
        model, opt, closure = _network(training=True)
        closure().backward()
        before = [b.clone() for b in model.buffers()]
        smoothness, _ = self.probe(model, opt, closure)
        assert math.isfinite(smoothness), "nothing was measured"
        assert _same_bits(model.buffers(), before), "the running statistics moved"

    def test_settings_are_left_alone(self) -> None:
        """Default dtype, gradients enabled or not, requires_grad, also where only some parameters are trained."""
        model, opt, closure = _network(training=True)
        closure().backward()
        frozen = next(model.parameters())
        frozen.requires_grad_(False)
        before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        required = [p.requires_grad for p in model.parameters()]
        self.probe(model, opt, closure)
        now = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        assert now == before, "a global setting was changed"
        assert [p.requires_grad for p in model.parameters()] == required, "requires_grad was changed"

    def test_nothing_is_copied_that_cannot_be(self) -> None:
        """A model that refuses copy.deepcopy and pickle is probed like any other."""
        w = _leaf([1.0, 2.0])
        model = _Uncopyable(w)
        opt = torch.optim.SGD([w], lr=0.1)
        w.square().sum().backward()
        smoothness, _ = self.probe(model, opt, lambda: w.square().sum())
        _close(smoothness, 2.0, "smoothness of a model that cannot be copied", 1e-9)

    def test_all_is_put_back_after_an_exception(self) -> None:
        """The closure raises at its 1st, 2nd, ... call: the error comes out, and the weights are at x or at x + d."""
        for fails_at in range(1, 2 + len(self.points)):
            (model, opt, closure), (plain, plain_opt, plain_closure) = (_network(training=True) for _ in range(2))
            for loss in (closure, plain_closure):
                torch.manual_seed(5)
                loss().backward()
            start = [p.detach().clone() for p in model.parameters()]
            grads = [p.grad for p in model.parameters()]
            buffers = [b.clone() for b in model.buffers()]
            with _random_numbers_kept(f"an exception at call {fails_at}"):
                try:
                    self.probe(model, opt, _failing(model, closure, fails_at))
                except _Planned:
                    pass
                else:
                    raise AssertionError(f"the exception at call {fails_at} was swallowed")
            plain_opt.step()
            whole = _same_bits(model.parameters(), plain.parameters()) or _same_bits(model.parameters(), start)
            assert whole, f"an exception at call {fails_at} left the weights between x and x + d"
            assert all(p.grad is g for p, g in zip(model.parameters(), grads)), "p.grad was not put back"
            assert _same_bits(model.buffers(), buffers), "the buffers were not put back"
            assert all(m.training for m in model.modules()), "the mode was not put back"

    # ------------------------------------------------------------------------------------ where nothing can be measured

    def test_a_loss_that_is_no_number_is_no_smoothness(self) -> None:
        """NaN or infinite at x, or at x + d only: the step is taken as ever, and what comes out is NaN."""
        for bad, far in ((math.nan, False), (math.inf, False), (math.nan, True)):
            w = _leaf([1.0])
            opt = torch.optim.SGD([w], lr=0.25)
            w.grad = torch.ones_like(w)

            def closure(w: Tensor = w, bad: float = bad, far: bool = far) -> Tensor:
                here = w.detach().item() == 1.0
                return (w * bad).sum() if here != far else w.square().sum()

            smoothness, _ = self.probe(_model(w), opt, closure)
            assert math.isnan(smoothness), f"a loss of {bad} {'after' if far else 'before'} the step gave {smoothness}"
            assert w.item() == 0.75, f"a loss of {bad} changed the step: {w.item()}, not 0.75"

    def test_a_step_of_no_length_is_no_smoothness(self) -> None:
        """0/0 is neither 0 nor infinite."""
        w = _leaf([1.0])
        w.grad = torch.ones_like(w)
        smoothness, norm = self.probe(_model(w), torch.optim.SGD([w], lr=0.0), lambda: w.square().sum())
        assert math.isnan(smoothness), f"a step of no length has smoothness {smoothness}"
        _close(norm, 2.0, "norm before a step of no length", 1e-12)

    def test_a_quotient_of_rounding_errors_is_no_smoothness(self) -> None:
        """float32, gradient 1000 and a step of 1e-4: what the difference holds is rounding."""
        w = _leaf(torch.full((4,), 1000.0), torch.float32)
        w.grad = torch.ones_like(w)
        smoothness, _ = self.probe(_model(w), torch.optim.SGD([w], lr=1e-4), lambda: w.square().sum() / 2)
        assert math.isnan(smoothness), f"smoothness {smoothness} was made of rounding errors"

    def test_the_difference_is_added_up_in_double_precision(self) -> None:
        """Squares of float32 overflow above 1e19: a curvature of 1e25 is a number all the same."""
        w = _leaf([1.0, 2.0, -1.0], torch.float32)
        w.grad = torch.tensor([0.25, 0.5, 0.5])
        smoothness, norm = self.probe(_model(w), torch.optim.SGD([w], lr=1.0), lambda: 0.5e25 * w.square().sum())
        _close(smoothness, 1e25, "a large smoothness in float32", 1e-5)
        _close(norm, 1e25 * math.sqrt(6), "a large norm in float32", 1e-5)

    def test_parameters_without_gradient_and_shared_ones_are_taken(self) -> None:
        """One parameter that the loss does not use, one that is frozen, one under two names: once each."""
        w, unused, frozen = _leaf([1.0, 2.0]), _leaf([5.0]), _leaf([7.0])
        frozen.requires_grad_(False)
        model = nn.Module()
        model.one, model.other = nn.ParameterList([w, unused, frozen]), nn.ParameterList([w])
        seen, norm = self._probed(model, lambda: (frozen.sum() * w.square()).sum(), lr=0.001)
        _close(seen.smoothness, 14.0, "smoothness beside parameters that take no part", 1e-9)
        _close(norm, 14 * math.sqrt(5), "norm beside parameters that take no part", 1e-12)

    # --------------------------------------------------------------------------------------------------------- helpers

    def _probed(
        self, model: nn.Module, closure: Closure, *, lr: float = 0.0, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[_Seen, float]:
        """Take one step along the closure's own gradient."""
        params = [p for p in model.parameters() if p.requires_grad]
        opt = optimizer or torch.optim.SGD(params, lr=abs(lr), maximize=lr < 0)
        opt.zero_grad()
        with _random_numbers_kept("the suite", put_back=True):
            buffers = [b.clone() for b in model.buffers()]
            closure().backward()
            for buffer, value in zip(model.buffers(), buffers):
                buffer.copy_(value)
        start = [p.detach().clone() for p in params]
        smoothness, norm = self.probe(model, opt, closure)
        return _Seen(smoothness, start), norm


class _Seen:
    def __init__(self, smoothness: float, start: list[Tensor]) -> None:
        self.smoothness, self.start = smoothness, start


class _Planned(Exception):
    """What the suite raises in the middle of a probe."""


class _Stubborn:
    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the model was copied with copy.deepcopy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AssertionError("the model was pickled")


class _Uncopyable(nn.Module, _Stubborn):
    def __init__(self, w: nn.Parameter) -> None:
        super().__init__()
        self.w = w


class _Counting(nn.Module):
    """f = c ||w||²/2, where c counts the evaluations from 1: another function each time, unless c is put back."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = _leaf([1.0, 2.0, 3.0])
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def loss(self) -> Tensor:
        self.count += 1
        return self.count.clone() * self.w.square().sum() / 2


def _failing(model: nn.Module, closure: Closure, at: int) -> Closure:
    """Return the closure with an accident at one of its calls."""
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            torch.rand(1)
            model.eval()
            raise _Planned
        return closure()

    return failing


def _network(training: bool) -> tuple[nn.Module, torch.optim.Optimizer, Closure]:
    """Return a network with dropout and batch norm, the same each time, its optimizer and the loss of one batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
    model.train(training)
    opt = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    return model, opt, lambda: _network_loss(model)


def _network_loss(model: nn.Module) -> Tensor:
    x = torch.linspace(-1.0, 1.0, 32).view(8, 4).sin()
    return (model(x) - x[:, :2]).square().mean()


def _model(w: nn.Parameter) -> nn.Module:
    return nn.ParameterList([w])


def _leaf(value: Any, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(value, dtype=dtype).clone())


@contextmanager
def _random_numbers_kept(what: str, *, put_back: bool = False) -> Iterator[None]:
    """See that no random state has changed at the end, or put them back."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    if put_back:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
    assert torch.equal(torch.get_rng_state(), before[0]), f"{what} left torch's random numbers elsewhere"
    assert random.getstate() == before[1], f"{what} left Python's random numbers elsewhere"
    same = all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2]))
    assert same, f"{what} left NumPy's random numbers elsewhere"


def _state(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [v for entries in opt.state.values() for v in entries.values() if isinstance(v, Tensor)]


def _same_bits(left: Any, right: Any) -> bool:
    return all(
        torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))
        for a, b in zip(list(left), list(right), strict=True)
    )


def _close(found: float, right: float, what: str, tolerance: float) -> None:
    assert math.isclose(found, right, rel_tol=tolerance), f"{what} is {found}, not {right}"
