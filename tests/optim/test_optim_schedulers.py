"""Every scheduler of torch drives our optimizers as it drives torch.optim.SGD: the same lr, the same momentum."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_helpers import RULES, leaf, make
from torch.optim import lr_scheduler as schedules
from torch.optim import swa_utils

LR = 0.4
STEPS = 20

# constructor -> how it is built over an optimizer
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: schedules.StepLR(o, 4, gamma=0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [3, 11], gamma=0.1),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.25, 7),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 9),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 15, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 10, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5, 2),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.5, 4),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=STEPS),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=2),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 5), schedules.CosineAnnealingLR(o, 15)], [5]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.1, 3), schedules.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, 6),
}


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    everything = {
        name
        for module in (schedules, swa_utils)
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, schedules.LRScheduler) and not name.startswith("_")
    }
    assert everything - {"LRScheduler"} == set(SCHEDULERS)


def sequence(opt: torch.optim.Optimizer, build: Callable[[torch.optim.Optimizer], Any]) -> list[tuple[float, ...]]:
    """Return lr and momentum of both groups as they are at each step."""
    schedule = build(opt)
    seen = []
    for t in range(STEPS):
        seen.append(tuple(float(x) for group in opt.param_groups for x in (group["lr"], group["momentum"])))
        opt.step()
        if t == STEPS - 1:
            break  # OneCycleLR counts
        if isinstance(schedule, schedules.ReduceLROnPlateau):
            schedule.step(max(1.0, 5.0 - t))
        else:
            schedule.step()
    return seen


def groups() -> list[dict[str, Any]]:
    return [{"params": [leaf([1.0], [3.0])]}, {"params": [leaf([1.0], [4.0])], "lr": 0.2}]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_sequence_is_that_of_sgd(name: str, rule: str) -> None:
    ours = make(rule, groups(), LR, momentum=0.9)
    theirs = torch.optim.SGD(groups(), LR, momentum=0.9)
    found = sequence(ours, SCHEDULERS[name])
    assert found == sequence(theirs, SCHEDULERS[name])
    assert len({lr for lr, *_ in found}) > 1  # it does something
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({momentum for _, momentum, *_ in found}) > 1
    assert ours.telemetry()["steps"] == STEPS


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"CyclicLR", "OneCycleLR"}))
def test_a_resumed_schedule_goes_on_where_it_was(name: str) -> None:
    straight, stopped, resumed = (make("delta_gclip", groups(), LR, momentum=0.9) for _ in range(3))
    build = SCHEDULERS[name]
    value = (5.0,) if name == "ReduceLROnPlateau" else ()
    lrs = []
    schedule, first = build(straight), build(stopped)
    for t in range(12):
        straight.step()
        schedule.step(*value)
        lrs.append(straight.param_groups[0]["lr"])
        if t < 6:
            stopped.step()
            first.step(*value)
    second = build(resumed)
    resumed.load_state_dict(stopped.state_dict())
    second.load_state_dict(first.state_dict())
    for t in range(6, 12):
        resumed.step()
        second.step(*value)
        assert resumed.param_groups[0]["lr"] == pytest.approx(lrs[t], rel=1e-12)
    assert resumed.telemetry() == straight.telemetry()


def test_a_tensor_lr_is_rewritten_in_place_and_read_at_each_step() -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    w = leaf([0.0], [3.0])
    opt = make("gclip", [w], lr)
    schedule = schedules.ExponentialLR(opt, 0.5)
    for _ in range(3):
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["lr"] is lr
    assert w.item() == pytest.approx(-(0.5 + 0.25 + 0.125), rel=1e-12)
