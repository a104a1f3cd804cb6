"""The conformance suite of probes: ours passes, and a probe with one defect fails the test of that defect.

Most defects are those of public code: another batch or another dropout mask for the second gradient, a norm divided by
the number of batches and a difference that is not, statistics of batch norm that move, a model that is copied, an
optimizer whose lr is rewritten.
"""

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.testing import ProbeSuite
from surefoot.testing.probe_suite import SIXTHS, Closure


class TestOurs(ProbeSuite):
    @staticmethod
    def probe(model: nn.Module, optimizer: torch.optim.Optimizer, closure: Closure) -> tuple[float, float]:
        seen = SmoothnessProbe(model).step(optimizer, closure)
        assert seen is not None
        return seen.smoothness, seen.grad_norm


class TestOursAsAContext(ProbeSuite):
    points = (0.5, 1.0)

    @staticmethod
    def probe(model: nn.Module, optimizer: torch.optim.Optimizer, closure: Closure) -> tuple[float, float]:
        probe = SmoothnessProbe(model, points=(0.5, 1.0))
        with probe.around(lambda: [(closure(), 3)]):  # the same in one piece of three rows
            optimizer.step()
        return probe.observations[0].smoothness, probe.observations[0].grad_norm


PROMISES = [name for name in dir(ProbeSuite) if name.startswith("test_")]


def broken_promises(probe: Any) -> set[str]:
    suite = ProbeSuite()
    suite.probe = probe
    broken = set()
    for name in PROMISES:
        kept = torch.get_rng_state(), torch.get_default_dtype()
        try:
            getattr(suite, name)()
        except Exception:  # as pytest would: an error is a failure too
            broken.add(name)
        torch.set_rng_state(kept[0])
        torch.set_default_dtype(kept[1])
    return broken


class Right:
    """A probe written anew, slowly; the wrong ones below are made of it."""

    points = SIXTHS

    def __call__(self, model: nn.Module, opt: torch.optim.Optimizer, closure: Closure) -> tuple[float, float]:
        self.model, self.opt, self.closure = model, opt, closure
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.random = self.get_random()
        self.buffers = [b.clone() for b in model.buffers()]
        self.modes = [m.training for m in model.modules()]
        start = [p.detach().clone() for p in self.params]
        try:
            here = self.gradient()
        finally:
            self.restore()
        opt.step()
        end = [p.detach().clone() for p in self.params]
        norm = self.size(here)
        try:
            return self.quotient(here, norm, start, end), self.norm(norm)
        finally:
            self.write(end)
            self.restore()

    def quotient(self, here: list[Tensor], norm: float, start: list[Tensor], end: list[Tensor]) -> float:
        found = [math.nan]
        for a in self.points:
            self.write([x + a * (y - x) for x, y in zip(start, end)])
            u = a * self.size([y - x for x, y in zip(start, end)])
            if u == 0:
                return self.no_step()
            self.rewind()
            there = self.gradient()
            ratio = self.size([g - h for g, h in zip(there, here)]) / u
            if self.trusted(ratio, norm, u):
                found.append(ratio)
        return max((r for r in found if r == r), default=math.nan)

    def trusted(self, ratio: float, norm: float, u: float) -> bool:
        return math.isfinite(ratio) and torch.finfo(self.params[0].dtype).eps * norm / u <= ratio / 10

    def no_step(self) -> float:
        return math.nan

    def norm(self, norm: float) -> float:
        return norm

    def gradient(self) -> list[Tensor]:
        found = torch.autograd.grad(self.closure(), self.params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found)]

    def size(self, tensors: list[Tensor]) -> float:
        return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))

    def write(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.params, values):
                p.copy_(value)

    def rewind(self) -> None:
        """Make ready for the same function as at the first gradient."""
        self.restore()

    def restore(self) -> None:
        with torch.no_grad():
            for b, value in zip(self.model.buffers(), self.buffers):
                b.copy_(value)
        for m, mode in zip(self.model.modules(), self.modes):
            m.training = mode
        self.set_random(self.random)

    def get_random(self) -> Any:
        return torch.get_rng_state(), random.getstate(), np.random.get_state()

    def set_random(self, state: Any) -> None:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])


class GradientOfTheStep(Right):
    """Takes p.grad for the gradient at x: another batch, or clipped."""

    first = True

    def gradient(self) -> list[Tensor]:
        there = super().gradient()
        first, self.first = self.first, False
        return [g if p.grad is None else p.grad for p, g in zip(self.params, there)] if first else there

    def __call__(self, *args: Any) -> tuple[float, float]:
        self.first = True
        return super().__call__(*args)


class NormByTheBatch(Right):
    """Divides the norm by the number of batches, and not the difference."""

    def norm(self, norm: float) -> float:
        return norm / 3


class AnotherMask(Right):
    def rewind(self) -> None:
        kept = self.get_random()
        self.restore()
        self.set_random(kept)


class TorchAlone(Right):
    """Forgets the random numbers of NumPy and Python."""

    def set_random(self, state: Any) -> None:
        torch.set_rng_state(state[0])


class DropoutOn(Right):
    def gradient(self) -> list[Tensor]:
        self.model.train()
        return super().gradient()


class MovingStatistics(Right):
    """Leaves its mark on the buffers, at the end alone."""

    def __call__(self, model: nn.Module, *args: Any) -> tuple[float, float]:
        found = super().__call__(model, *args)
        for b in model.buffers():
            b += 1
        return found


class OtherBuffers(Right):
    """Puts buffers back at the end, and not between the gradients."""

    def rewind(self) -> None:
        self.set_random(self.random)


class CopiesTheModel(Right):
    def __call__(self, model: nn.Module, *args: Any) -> tuple[float, float]:
        copy.deepcopy(model)
        return super().__call__(model, *args)


class RewritesLr(Right):
    def __call__(self, model: nn.Module, opt: torch.optim.Optimizer, closure: Closure) -> tuple[float, float]:
        found = super().__call__(model, opt, closure)
        opt.param_groups[0]["lr"] *= 0.5
        return found


class RestoresByArithmetic(Right):
    """Goes back by adding and taking away, which rounds."""

    def __call__(self, model: nn.Module, *args: Any) -> tuple[float, float]:
        found = super().__call__(model, *args)
        with torch.no_grad():
            for p in self.params:
                p.add_(0.1).sub_(0.1)
        return found


class WritesGradients(Right):
    def gradient(self) -> list[Tensor]:
        grads = super().gradient()
        for p, g in zip(self.params, grads):
            p.grad = g.clone() if p.grad is None else p.grad + 0 * g
        return grads


class ForgetsAfterAnException(Right):
    def write(self, values: list[Tensor]) -> None:
        import sys

        if sys.exc_info()[0] is None:
            super().write(values)


class EndPointOnly(Right):
    points = (1.0,)


class TakesTheGradientsDirection(Right):
    """Measures along the gradient, whatever step was taken."""

    def quotient(self, here: list[Tensor], norm: float, start: list[Tensor], end: list[Tensor]) -> float:
        length = self.size([y - x for x, y in zip(start, end)])
        return super().quotient(here, norm, start, [x - g * (length / norm) for x, g in zip(start, here)])


class InfiniteAtRest(Right):
    def no_step(self) -> float:
        return math.inf


class TrustsRounding(Right):
    def trusted(self, ratio: float, norm: float, u: float) -> bool:
        return math.isfinite(ratio)


class TrustsNaN(Right):
    def quotient(self, here: list[Tensor], norm: float, start: list[Tensor], end: list[Tensor]) -> float:
        found = super().quotient(here, norm, start, end)
        return 0.0 if math.isnan(found) and not math.isfinite(norm) else found


class SinglePrecision(Right):
    def size(self, tensors: list[Tensor]) -> float:
        return math.sqrt(sum(float(t.square().sum()) for t in tensors))


class CountsSharedTwice(Right):
    def gradient(self) -> list[Tensor]:
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        return super().gradient()

    def size(self, tensors: list[Tensor]) -> float:
        twice = sum(1 for _ in self.model.named_parameters(remove_duplicate=False)) > len(list(self.model.parameters()))
        return super().size(tensors) * (math.sqrt(2) if twice else 1)


class ChangesTheDefaultDtype(Right):
    def __call__(self, *args: Any) -> tuple[float, float]:
        found = super().__call__(*args)
        torch.set_default_dtype(torch.float64)
        return found


# what is wrong -> the promise that it breaks
WRONG: dict[type[Right], str] = {
    GradientOfTheStep: "test_both_gradients_are_of_the_closure_s_batch",
    NormByTheBatch: "test_a_quadratic_has_its_curvature",
    AnotherMask: "test_both_gradients_see_the_same_random_numbers",
    TorchAlone: "test_both_gradients_see_the_same_random_numbers",
    DropoutOn: "test_dropout_in_eval_mode_stays_off",
    MovingStatistics: "test_the_running_statistics_of_batch_norm_are_put_back",
    OtherBuffers: "test_both_gradients_see_the_same_buffers",
    CopiesTheModel: "test_nothing_is_copied_that_cannot_be",
    RewritesLr: "test_the_step_is_the_step_without_a_probe",
    RestoresByArithmetic: "test_the_step_is_the_step_without_a_probe",
    WritesGradients: "test_the_step_is_the_step_without_a_probe",
    ForgetsAfterAnException: "test_all_is_put_back_after_an_exception",
    EndPointOnly: "test_a_quartic_has_the_largest_quotient_over_the_points",
    TakesTheGradientsDirection: "test_any_step_will_do",
    InfiniteAtRest: "test_a_step_of_no_length_is_no_smoothness",
    TrustsRounding: "test_a_quotient_of_rounding_errors_is_no_smoothness",
    TrustsNaN: "test_a_loss_that_is_no_number_is_no_smoothness",
    SinglePrecision: "test_the_difference_is_added_up_in_double_precision",
    CountsSharedTwice: "test_parameters_without_gradient_and_shared_ones_are_taken",
    ChangesTheDefaultDtype: "test_settings_are_left_alone",
}
# those that break nothing else
ALONE = (
    DropoutOn,
    OtherBuffers,
    CopiesTheModel,
    RewritesLr,
    ForgetsAfterAnException,
    InfiniteAtRest,
    TrustsRounding,
    TrustsNaN,
    SinglePrecision,
)


def test_the_right_one_keeps_every_promise() -> None:
    assert len(PROMISES) >= 18
    assert broken_promises(Right()) == set()


@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_probe_fails_the_test_of_what_it_breaks(wrong: type[Right]) -> None:
    broken = broken_promises(wrong())
    assert WRONG[wrong] in broken
    assert len(broken) < len(PROMISES) / 2, "it fails for some other reason"
    if wrong in ALONE:
        assert broken == {WRONG[wrong]}
