"""The conformance suite: our own rules pass it, and a rule that breaks one promise fails the test of that promise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot import DeltaGClip, GClip, NormalizedGD, SmoothClip
from surefoot.optim import ClippedOptimizer
from surefoot.testing import NoSync, OptimizerSuite


class TestDeltaGClip(OptimizerSuite):
    make = staticmethod(lambda params, lr, **o: DeltaGClip(params, lr, gamma=1.0, delta=0.1, **o))
    scale = staticmethod(lambda norm: min(1.0, max(0.1, 1.0 / norm)) if norm else 1.0)
    thresholds = (1.0, 10.0)


class TestGClip(OptimizerSuite):
    make = staticmethod(lambda params, lr, **o: GClip(params, lr, gamma=2.0, **o))
    scale = staticmethod(lambda norm: min(1.0, 2.0 / norm) if norm else 1.0)
    thresholds = (2.0, math.inf)


class TestNormalizedGD(OptimizerSuite):
    make = staticmethod(lambda params, lr, **o: NormalizedGD(params, lr, beta=0.5, **o))
    scale = staticmethod(lambda norm: 1 / (norm + 0.5))
    thresholds = (0.5, math.inf)


class TestSmoothClip(OptimizerSuite):
    make = staticmethod(lambda params, lr, **o: SmoothClip(params, lr, L0=2.0, L1=0.5, **o))
    scale = staticmethod(lambda norm: 1 / (2.0 + 0.5 * norm))
    thresholds = (4.0, math.inf)


PROMISES = [name for name in dir(OptimizerSuite) if name.startswith("test_")]


def broken_promises(suite: OptimizerSuite) -> set[str]:
    broken = set()
    for name in PROMISES:
        try:
            getattr(suite, name)()
        except Exception:  # as pytest would: an error is a failure too
            broken.add(name)
    return broken


class Right(ClippedOptimizer):
    """Clipping at 1, written anew; the wrong ones below are made of it."""

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        super().__init__(params, lr, {}, **options)

    def check_rule(self, group: dict[str, Any]) -> None:
        pass

    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return (1.0 / norm).clamp(max=1.0)

    def thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        return 1.0, math.inf

    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def suite_of(cls: type[ClippedOptimizer]) -> OptimizerSuite:
    class Suite(OptimizerSuite):
        make = staticmethod(cls)
        scale = staticmethod(lambda norm: min(1.0, 1.0 / norm) if norm else 1.0)
        thresholds = (1.0, math.inf)

    return Suite()


class WritesGradients(Right):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.params():
            if p.grad is not None:
                p.grad.mul_(0.5)
        return loss


class ReplacesGradients(Right):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.params():
            p.grad = None if p.grad is None else p.grad.clone()
        return loss


class DrawsRandomNumbers(Right):
    def step(self, closure: Any = None) -> Any:
        torch.rand(1)
        return super().step(closure)


class ForgetsTheLoss(Right):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


class WritesLr(Right):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.5
        return loss


class AnotherFormula(Right):
    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return (1.0 / (norm + 1e-6)).clamp(max=1.0)


class OneMultiplierForAll(Right):
    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return (1.0 / norm.max()).clamp(max=1.0).expand(norm.shape)


class AsksTheDevice(Right):
    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return super().scale(torch.tensor(norm.tolist(), dtype=norm.dtype), group)


class DividesByZero(Right):
    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return norm.clamp(max=1.0) / norm


class NormOfAGroup(Right):
    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.scope = "group" if self.scope == "global" else self.scope


class DecaysWhatHasNoGradient(Right):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.params():
                if p.grad is None:
                    p.mul_(0.99)
        return loss


class PropagatesAlways(Right):
    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.nonfinite = "propagate"


class ForgetsToSave(Right):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "state": {}}


class ForgetsTheCounts(Right):
    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        del found["telemetry"]
        return found


class ForgetsItsScopeWhenCopied(Right):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "scope": "global"}


class CountsOtherwise(Right):
    def thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        return 3.0, math.inf


class LetsEverythingIn(Right):
    def _check_group(self, group: dict[str, Any]) -> None:
        pass


class IgnoresTheScaler(Right):
    def step(self, closure: Any = None) -> Any:
        self.__dict__.pop("grad_scale", None)
        return super().step(closure)


class RefusesSparseTooLate(Right):
    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in self.params():
                p.mul_(0.9) if any(q.grad is not None and q.grad.is_sparse for q in self.params()) else None
        return super().step(closure)


class OneLrForAll(Right):
    def step(self, closure: Any = None) -> Any:
        kept = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = kept[0]
        loss = super().step(closure)
        for group, lr in zip(self.param_groups, kept):
            group["lr"] = lr
        return loss


# what is wrong -> the promise that it breaks
WRONG: dict[type[ClippedOptimizer], str] = {
    WritesGradients: "test_gradients_are_read_and_never_written",
    ReplacesGradients: "test_gradients_are_read_and_never_written",
    DrawsRandomNumbers: "test_random_numbers_and_defaults_are_left_alone",
    ForgetsTheLoss: "test_a_closure_runs_once_with_gradients_and_its_loss_is_returned",
    WritesLr: "test_the_step_leaves_lr_to_the_schedule",
    AnotherFormula: "test_the_multiplier_is_the_formula",
    OneMultiplierForAll: "test_the_multiplier_takes_any_number_of_norms_and_does_not_wait_for_the_device",
    AsksTheDevice: "test_the_multiplier_takes_any_number_of_norms_and_does_not_wait_for_the_device",
    DividesByZero: "test_a_zero_gradient_moves_nothing_but_what_decay_moves",
    NormOfAGroup: "test_the_norm_is_over_all_groups",
    DecaysWhatHasNoGradient: "test_parameters_without_gradient_are_passed_over",
    PropagatesAlways: "test_skip_leaves_everything_bit_for_bit_and_counts",
    ForgetsToSave: "test_a_resumed_run_is_bit_for_bit_the_same",
    ForgetsTheCounts: "test_a_resumed_run_is_bit_for_bit_the_same",
    ForgetsItsScopeWhenCopied: "test_copies_go_on_by_themselves",
    CountsOtherwise: "test_telemetry_counts_what_happened",
    LetsEverythingIn: "test_options_out_of_range_are_refused_by_name",
    IgnoresTheScaler: "test_a_grad_scaler_is_unscaled_before_it_is_judged",
    RefusesSparseTooLate: "test_a_sparse_gradient_is_refused_before_anything_is_touched",
    OneLrForAll: "test_groups_keep_their_own_lr",
}
# those that break nothing else
ALONE = (ReplacesGradients, DrawsRandomNumbers, AsksTheDevice, ForgetsTheCounts, IgnoresTheScaler)


def test_the_right_one_keeps_every_promise() -> None:
    assert len(PROMISES) >= 24
    assert broken_promises(suite_of(Right)) == set()


@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_rule_fails_the_test_of_what_it_breaks(wrong: type[ClippedOptimizer]) -> None:
    broken = broken_promises(suite_of(wrong))
    assert WRONG[wrong] in broken
    assert len(broken) < len(PROMISES) / 2, "it fails for some other reason"
    if wrong in ALONE:
        assert broken == {WRONG[wrong]}


def test_a_multiplier_that_never_varies_tests_nothing() -> None:
    suite = suite_of(Right)
    suite.norms = (0.1, 0.2)
    with pytest.raises(AssertionError, match="nothing is tested"):
        suite.test_the_norm_is_over_all_groups()


QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.item(),
    "bool": bool,
    "float": float,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "mask": lambda x: torch.ones(2)[x.expand(2) > 0],
    "assign to mask": lambda x: torch.ones(2).__setitem__(x.expand(2) > 0, torch.ones(2)),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_sync_notices(name: str) -> None:
    x = torch.tensor(1.0)
    with NoSync(), pytest.raises(AssertionError, match="wait"):
        QUESTIONS[name](x)
    QUESTIONS[name](x)


def test_no_sync_lets_the_rest_through() -> None:
    x = torch.arange(4.0)
    with NoSync():
        total = torch.where(x > 1, x, 0.0).sum() + x[1:3].sum() + x[torch.tensor([0, 3])].sum()
    assert total.item() == 11.0
