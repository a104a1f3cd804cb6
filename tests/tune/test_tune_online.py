"""γ = "measured": it follows the curvature, resumes bit for bit, and says what it costs."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surefoot import DeltaGClip, GClip, MixedClip, clip_grad_
from surefoot.errors import InputError
from surefoot.optim import Measured
from surefoot.testing import NoSync
from surefoot.tune import Online


def gamma_of(optimizer: torch.optim.Optimizer) -> Measured:
    found = optimizer.param_groups[0]["gamma"]
    assert isinstance(found, Measured)
    return found


def take(online: Online, loss: Callable[[], Tensor]) -> Any:
    online.optimizer.zero_grad()
    loss().backward()
    return online.step(loss)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))


def trained(steps: range, model: nn.Module, online: Online) -> None:
    generator = torch.Generator()
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(8, 5, generator=generator.manual_seed(step))
        take(online, lambda x=x: F.mse_loss(model(x), 4 * x.prod(1, keepdim=True)))


def made(**options: Any) -> tuple[nn.Module, Online]:
    model = net()
    optimizer = DeltaGClip(model.parameters(), 0.3, gamma="measured", delta=0.1, momentum=0.9)
    return model, Online(model, optimizer, **{"every": 3, **options})


def test_gamma_is_the_median_until_something_is_measured() -> None:
    gamma, found = Measured(), 0.0
    norms = torch.rand(120, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    for i, norm in enumerate(norms):
        found = gamma.threshold(float(norm))
        assert found == pytest.approx(1.5 * float(norms[max(0, i - 49) : i + 1].quantile(0.5)), rel=1e-12)
    gamma.observe(3.0)
    assert gamma.threshold(1.0) == pytest.approx(found, rel=0.1)  # at most 1
    gamma.observe(0.25)
    assert gamma.threshold(1.0) == pytest.approx(found / 4, rel=0.1)
    assert gamma.threshold(math.nan) == gamma.gamma


def test_it_follows_a_curvature_that_rises() -> None:
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = DeltaGClip([w], lr=0.5, gamma="measured", delta=0.0)
    online = Online(nn.ParameterList([w]), optimizer, every=4)
    seen = []
    for step in range(120):
        L = 1.02**step  # steps of lr are stable until lr L = 2, at step 70
        take(online, lambda L=L, step=step: L * w.square().sum() / 2 + w[step % 4])
        seen.append((L, online.reach, gamma_of(optimizer).gamma / float(median_of(optimizer))))
    assert online.smoothness == pytest.approx(1.02 ** (120 - 1 - 8), rel=1e-6)  # the middle one of the last five
    _, reach, times = seen[59]
    assert reach > 1
    assert times == pytest.approx(1.5)
    L, reach, times = seen[-1]
    assert 0.3 < 2 / (0.5 * L) < reach < 0.6
    assert times == pytest.approx(1.5 * seen[-2][1])
    assert torch.isfinite(w).all()


def median_of(optimizer: torch.optim.Optimizer) -> Tensor:
    norms = gamma_of(optimizer).state()["norms"]
    return norms[norms.isfinite()].quantile(0.5)


def test_lr_and_momentum_of_now_enter() -> None:
    model, online = made(every=1)
    trained(range(3), model, online)
    L = online.smoothness
    assert L is not None
    assert online.reach == pytest.approx(2 * 0.1 / (0.3 * L))
    online.optimizer.param_groups[0]["lr"] = torch.tensor(0.03)
    assert online.reach == pytest.approx(2 * 0.1 / (0.03 * L))


def test_the_cost_is_counted() -> None:
    model, online = made(every=3)
    calls = 0
    forward = model.forward

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(x)

    model.forward = counted
    trained(range(20), model, online)
    assert online.gradients == calls - 20 == 2 * 6 + 1
    assert online.cost == "2 extra gradients every 3 steps"
    assert 2 / 40 == 0.05  # of a run with the default
    assert Online(model, online.optimizer).probe.every == 40


def test_training_is_left_as_it_is() -> None:
    (model, online), (plain, silent) = made(every=1), made(every=10**6)
    for step in range(6):
        trained(range(step, step + 1), model, online)
        trained(range(step, step + 1), plain, silent)
        gamma_of(online.optimizer).observe(1.0)  # what was measured is not the question here
    assert (len(online.probe.observations), silent.gradients) == (6, 0)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values()):
        assert torch.equal(a, b)


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    model, online = made()
    trained(range(30), model, online)
    other, half = made()
    trained(range(17), other, half)
    weights = copy.deepcopy(other.state_dict())
    saved, optimizer = json.loads(json.dumps(half.state_dict())), copy.deepcopy(half.optimizer.state_dict())
    fresh, resumed = made()
    fresh.load_state_dict(weights)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.load_state_dict(saved)
    assert resumed.gradients == half.gradients
    assert resumed.smoothness == half.smoothness
    trained(range(17, 30), fresh, resumed)
    assert any(o.outcome == "measured" for o in resumed.probe.observations)
    assert online.reach < 1  # or γ would not depend on what was measured
    for a, b in zip(model.state_dict().values(), fresh.state_dict().values()):
        assert torch.equal(a, b)
    for name, value in gamma_of(online.optimizer).state().items():
        assert torch.equal(value, gamma_of(resumed.optimizer).state()[name]), name


def test_the_same_again_gives_the_same() -> None:
    first, second = made(), made()
    for model, online in (first, second):
        trained(range(12), model, online)
    assert first[1].state_dict() == second[1].state_dict()
    assert gamma_of(first[1].optimizer).gamma == gamma_of(second[1].optimizer).gamma


def test_observing_does_not_wait_for_the_device() -> None:
    gamma = Measured()
    with NoSync():
        gamma.threshold(torch.ones((), dtype=torch.float64))
        gamma.observe(0.5)
        gamma.observe(torch.tensor(0.25))
        found = gamma.threshold(torch.ones((), dtype=torch.float64))
    assert found.item() == 1.5 * 0.25


def test_the_word_means_the_object() -> None:
    w = nn.Parameter(torch.ones(2))
    for optimizer in (GClip([w], 0.1, gamma="measured"), DeltaGClip([w], 0.1, gamma="measured", delta=0.5)):
        assert repr(gamma_of(optimizer)) == "Measured(times=1.5, history=50)"
    groups = [{"params": [w]}, {"params": [nn.Parameter(torch.ones(2))], "gamma": "measured"}]
    assert isinstance(GClip(groups, 0.1, gamma=1.0).param_groups[1]["gamma"], Measured)
    with pytest.raises(TypeError, match="gamma='measure' is a str"):
        GClip([w], 0.1, gamma="measure")
    with pytest.raises(ValueError, match="needs scope='global'"):
        GClip([w], 0.1, gamma="measured", scope="tensor")
    w.grad = torch.ones(2)
    with pytest.raises(TypeError, match="gamma='measured' is a str"):
        clip_grad_([w], gamma="measured")  # type: ignore[arg-type]


def test_bad_input_is_named() -> None:
    model = net()
    for optimizer in (torch.optim.SGD(model.parameters(), 0.1), GClip(model.parameters(), 0.1, gamma=1.0)):
        with pytest.raises(InputError, match=r'has no group that follows .* build it with gamma="measured"'):
            Online(model, optimizer)
    with pytest.raises(InputError, match=r"has no group that follows"):
        Online(model, MixedClip(model.parameters(), 0.1, gamma=1.0))
    with pytest.raises(InputError, match=r"momentum=1.5"):
        Online(model, GClip(model.parameters(), 0.1, gamma="measured", momentum=1.5))
    with pytest.raises(InputError, match=r"every=0"):
        Online(model, GClip(model.parameters(), 0.1, gamma="measured"), every=0)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="reach="):
            Measured().observe(bad)
    with pytest.raises(ValueError, match="times="):
        Measured(0.0)
    with pytest.raises(ValueError, match="history="):
        Measured(history=0)
