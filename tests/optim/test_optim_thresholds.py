"""Thresholds that follow the norms: against slow twins, in the optimizers and in clip_grad_."""

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optim_helpers import backward, batches, leaf, network, same_bits
from test_optim_device_path import squares_as_tensor
from torch import Tensor, nn

from surefoot import DeltaGClip, GClip, clip_grad_
from surefoot.optim import Measured, Percentile, Threshold, ZScore
from surefoot.optim import norm as norms
from surefoot.optim import update as kernel
from surefoot.testing import NoSync

nan, inf = math.nan, math.inf

BUILT_IN: dict[str, Any] = {
    "percentile": lambda: Percentile(40.0),
    "percentile of 4": lambda: Percentile(40.0, history=4),
    "measured": lambda: Measured(0.8, history=8),
    "zscore": lambda: ZScore(z=1.0, alpha=0.8, warmup=3),
}
every_threshold = pytest.mark.parametrize("make", BUILT_IN.values(), ids=BUILT_IN)
NORMS = st.one_of(st.just(0.0), st.floats(1e-50, 10), st.sampled_from([0.0, 1e-12, 1.0, 1e3, 1e30, nan, inf]))
sequences = st.lists(NORMS, min_size=1, max_size=60)
property_test = settings(max_examples=150, deadline=None, derandomize=True, database=None)


class Constant(Threshold):
    """One's own: γ is a number, but the object counts its norms."""

    def __init__(self, value: float) -> None:
        self.value = value

    def start(self) -> dict[str, Tensor]:
        return {"count": torch.zeros((), dtype=torch.int64)}

    def update(self, norm: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.full_like(norm, self.value), {"count": state["count"] + 1}


def zclip_twin(sequence: list[float], z: float, alpha: float, warmup: int) -> list[float]:
    """ZClip as the paper and the authors' loop have it, without their 1e-6; finite norms only."""
    seen: list[float] = []
    mean = var = 0.0
    out = []
    for norm in sequence:
        if len(seen) < warmup:
            seen.append(norm)
            mean = math.fsum(seen) / len(seen)
            var = math.fsum((x - mean) ** 2 for x in seen) / len(seen)
            out.append(inf)
            continue
        std = math.sqrt(var)
        # where rounding decides whether there is a spike, two ways of counting may differ
        assume(std == 0 or abs((norm - mean) - z * std) > 1e-6 * (abs(mean) + z * std))
        assume(std == 0 or std > 1e-6 * mean)
        value, gamma = norm, inf
        if std > 0 and (norm - mean) / std > z:
            score = (norm - mean) / std
            value = gamma = mean + z**2 / score * std
        out.append(gamma)
        mean = alpha * mean + (1 - alpha) * value
        var = alpha * var + (1 - alpha) * (value - mean) ** 2
    return out


# the rules


@property_test
@given(sequences, st.floats(0, 100), st.none() | st.integers(1, 12))
def test_percentile_is_numpys(sequence: list[float], p: float, history: int | None) -> None:
    rule = Percentile(p, history)
    seen: list[float] = []
    for norm in sequence:
        gamma = rule.threshold(norm)
        if math.isfinite(norm):
            seen.append(norm)
        if not seen:
            assert gamma == inf
            continue
        window = seen if history is None else seen[-history:]
        assert gamma == pytest.approx(np.percentile(window, p), rel=1e-12, abs=1e-300)
        assert gamma == rule.gamma


@property_test
@given(sequences, st.floats(0.5, 4), st.floats(0.1, 0.99), st.integers(1, 10))
def test_zscore_is_zclip(sequence: list[float], z: float, alpha: float, warmup: int) -> None:
    finite = [x for x in sequence if math.isfinite(x)]
    expected = iter(zclip_twin(finite, z, alpha, warmup))
    rule = ZScore(z, alpha, warmup)
    last = inf
    for norm in sequence:
        gamma = rule.threshold(norm)
        if math.isfinite(norm):
            last = next(expected)
        assert gamma == pytest.approx(last, rel=1e-6)
        if math.isfinite(norm) and gamma < inf:
            assert gamma < norm


def test_zscore_clips_spikes_the_more_the_farther_they_are() -> None:
    gammas = []
    for spike in (20.0, 50.0, 200.0):
        rule = ZScore()
        calm = [rule.threshold(norm) for norm in np.random.default_rng(0).normal(5.0, 1.0, 100).tolist()]
        assert np.isinf(calm[:25]).all()
        assert np.isinf(calm).mean() > 0.9
        gammas.append(rule.threshold(spike))
    assert 8 > gammas[0] > gammas[1] > gammas[2] > 4


def test_a_spike_moves_the_statistics_only_as_far_as_it_was_clipped() -> None:
    rule = ZScore(z=2.0, alpha=0.9, warmup=4)
    for norm in (1.0, 3.0, 1.0, 3.0, 1e9):
        rule.threshold(norm)
    after = rule.state()
    assert after["mean"].item() == pytest.approx(2.0, abs=1e-6)
    assert rule.gamma == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_equal_norms_freeze_nothing(norm: float) -> None:
    rule = ZScore(warmup=5)
    assert [rule.threshold(norm) for _ in range(10)] == [inf] * 10
    assert rule.threshold(norm + 1) == inf


def test_zscore_survives_norms_whose_squares_overflow() -> None:
    rule = ZScore(z=1.0, alpha=0.5, warmup=2)
    for norm in (1e300, 3e300, 1e308):
        rule.threshold(norm)
    assert 2e300 < rule.gamma < 1e308
    assert all(math.isfinite(float(v)) for v in rule.state().values())


@every_threshold
@given(sequence=sequences)
@property_test
def test_bad_norms_leave_no_trace_and_floats_are_tensors(make: Any, sequence: list[float]) -> None:
    rule, clean, tensors = make(), make(), make()
    for norm in sequence:
        gamma = rule.threshold(norm)
        assert gamma >= 0
        as_tensor = tensors.threshold(torch.tensor(norm, dtype=torch.float64))
        assert isinstance(as_tensor, Tensor)
        assert as_tensor.item() == gamma
        if math.isfinite(norm):
            assert clean.threshold(norm) == gamma
    if any(math.isfinite(norm) for norm in sequence):
        assert rule.state().keys() == clean.state().keys()
        assert same_bits(rule.state().values(), clean.state().values())


@every_threshold
def test_it_goes_on_where_its_state_was_saved(make: Any) -> None:
    sequence = np.random.default_rng(1).lognormal(size=40).tolist()
    straight, first, second = make(), make(), make()
    expected = [straight.threshold(norm) for norm in sequence]
    for norm in sequence[:20]:
        first.threshold(norm)
    saved = first.state()
    first.threshold(1e6)  # changes its own tensors, not the copies
    second.load(saved)
    second.threshold(1e6)
    second.load(saved)
    assert [second.threshold(norm) for norm in sequence[20:]] == expected[20:]
    second.load(None)
    assert second.gamma == inf
    assert [second.threshold(norm) for norm in sequence] == expected


@every_threshold
def test_nothing_waits_for_the_device(make: Any) -> None:
    rule = make()
    for _ in range(3):
        gamma = rule.threshold(torch.zeros((), device="meta"))  # a tensor without a value: asking for it raises
    assert gamma.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = rule.gamma


def test_what_is_out_of_range_is_refused() -> None:
    for name, value in (("percentile", -1), ("percentile", 101), ("percentile", nan), ("history", 0), ("history", -3)):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            Percentile(**{name: value})
    for name, value in (("z", 0), ("z", inf), ("alpha", -0.1), ("alpha", 1.1), ("warmup", 0)):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            ZScore(**{name: value})
    for cls, name, value in ((Percentile, "history", 2.5), (ZScore, "warmup", True), (ZScore, "z", "a")):
        with pytest.raises(TypeError, match=f"{name}={value!r}"):
            cls(**{name: value})
    with pytest.raises(ValueError, match=r"statistics \['count', 'gamma', 'norms'\], not \['count'"):
        Percentile().load(ZScore().state())
    with pytest.raises(ValueError, match=r"norms has the shape \(3,\) instead of \(4,\)"):
        Percentile(history=4).load(Percentile(history=3).state())


@pytest.mark.parametrize("value", [-1.0, nan])
def test_a_threshold_of_ones_own_that_is_no_threshold_is_refused(value: float) -> None:
    rule = Constant(value)
    with pytest.raises(ValueError, match=rf"Constant\(value={value}\).*gamma={value}.*norm=2\.0"):
        rule.threshold(2.0)
    assert rule.state()["count"].item() == 0


# in an optimizer


def gradients(net: nn.Module, t: int) -> None:
    """Leave gradients in the network: every fourth ones are a spike, every fifth hold a NaN."""
    dtype = next(net.parameters()).dtype
    backward(net, batches(t + 1, dtype)[t])
    if t % 4 == 0:
        torch._foreach_mul_([p.grad for p in net.parameters()], 50.0 + t)
    if t % 5 == 4:
        next(net.parameters()).grad.view(-1)[0] = nan


def run(net: nn.Module, opt: DeltaGClip, start: int, stop: int, around: Callable[[], Any] = nullcontext) -> list[float]:
    """Take the steps and return each γ."""
    gammas = []
    for t in range(start, stop):
        gradients(net, t)
        with around():
            opt.step()
        gammas.append(opt.param_groups[0]["gamma"].gamma)
    return gammas


@every_threshold
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_each_step_is_that_of_the_number_it_gives(make: Any, delta: float) -> None:
    net, other = network(), network()
    rule = make()
    opt = DeltaGClip(net.parameters(), 0.5, gamma=rule, delta=delta, momentum=0.5)
    twin = DeltaGClip(other.parameters(), 0.5, gamma=1.0, delta=delta, momentum=0.5)
    for t in range(20):
        gradients(net, t)
        gradients(other, t)
        norm = norms.global_norm([p.grad for p in net.parameters()]).item()
        twin.param_groups[0]["gamma"] = max(rule.threshold(norm), 1e-300)
        opt.step()
        twin.step()
    assert same_bits(net.parameters(), other.parameters())
    left, right = opt.telemetry(), twin.telemetry()
    assert math.isnan(left.pop("norm"))
    assert math.isnan(right.pop("norm"))
    assert left == right
    assert left["skipped"] == 4
    assert left["clipped"] + left["floored"] >= 3
    assert left["unclipped"] >= 3


@every_threshold
def test_a_resumed_run_is_bit_identical(make: Any) -> None:
    def fresh() -> tuple[nn.Module, DeltaGClip]:
        net = network()
        return net, DeltaGClip(net.parameters(), 0.5, gamma=make(), delta=0.1, momentum=0.9, nesterov=True)

    straight, opt = fresh()
    expected = run(straight, opt, 0, 12)
    assert len(set(expected)) >= 2

    first, half = fresh()
    run(first, half, 0, 6)
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "opt": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights only: nothing in it needs more
    state = saved["opt"]
    assert state["param_groups"][0]["gamma"] == repr(make())
    # and as our own run folders keep it: groups in JSON, tensors in safetensors
    groups = json.loads(json.dumps(state["param_groups"]))
    statistics = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    assert len(statistics) > 2
    in_a_folder = {**safetensors.load(safetensors.save(statistics)), "state": state["state"], "param_groups": groups}

    for through in (state, in_a_folder):
        net, other = fresh()
        run(net, other, 0, 2)  # its own statistics go
        net.load_state_dict(saved["net"])
        other.load_state_dict(copy.deepcopy(through))
        assert run(net, other, 6, 12) == expected[6:]
        assert same_bits(net.parameters(), straight.parameters())
        assert str(other.telemetry(reset=False)) == str(opt.telemetry(reset=False))


def test_the_optimizers_take_copies() -> None:
    shared = Percentile(50)
    nets = network(), network()
    opts = [GClip(net.parameters(), 0.1, gamma=shared) for net in nets]
    run(nets[0], opts[0], 0, 3)
    assert shared.gamma == inf
    assert opts[1].param_groups[0]["gamma"].gamma == inf
    assert opts[0].param_groups[0]["gamma"].gamma < inf


def test_groups_follow_the_norm_over_everything_once_a_step() -> None:
    params = [leaf([0.0], [3.0]), leaf([0.0], [4.0]), leaf([0.0], [12.0])]
    own = Percentile(100)
    opt = DeltaGClip(
        [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:], "gamma": own, "delta": 0.5}],
        1.0,
        gamma=Constant(6.5),
        delta=0.0,
    )
    assert opt.param_groups[2]["gamma"] is not own
    opt.step()
    assert [p.item() for p in params] == pytest.approx([-1.5, -2.0, -12.0])  # half, half, and not clipped
    assert opt.param_groups[0]["gamma"] is opt.param_groups[1]["gamma"]
    assert opt.param_groups[0]["gamma"].state()["count"].item() == 1
    seen = opt.telemetry()
    assert (seen["clipped"], seen["unclipped"]) == (2, 1)  # where rules differ, every group counts


def test_groups_that_share_a_threshold_count_once() -> None:
    for gamma in (Constant(6.5), 6.5):
        params = [leaf([0.0], [5.0]), leaf([0.0], [12.0])]
        opt = DeltaGClip([{"params": params[:1]}, {"params": params[1:]}], 1.0, gamma=gamma, delta=0.1)
        opt.step()
        assert opt.telemetry()["clipped"] == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_threshold
def test_a_copied_optimizer_goes_on_by_itself(how: str, make: Any) -> None:
    net = network()
    opt = GClip(net.parameters(), 0.5, gamma=make())
    run(net, opt, 0, 4)
    pair = (net, opt)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert run(net, opt, 4, 9) == run(other, copied, 4, 9)
    assert same_bits(net.parameters(), other.parameters())


def test_propagate_and_raise_keep_bad_norms_out() -> None:
    for nonfinite in ("propagate", "raise"):
        w = leaf([0.0, 0.0], [3.0, 4.0])
        opt = GClip([w], 1.0, gamma=Constant(2.5), nonfinite=nonfinite)
        opt.step()
        w.grad = torch.tensor([inf, 1.0], dtype=torch.float64)
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError):
                opt.step()
        else:
            opt.step()
            assert w.isnan().tolist() == [True, False]
        assert opt.param_groups[0]["gamma"].state()["count"].item() == 1


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_a_step_that_a_grad_scaler_leaves_out_does_not_count(device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if device:
        monkeypatch.setattr(norms, "squares", squares_as_tensor)
    w = leaf([0.0, 0.0], [3.0, 4.0])
    opt = GClip([w], 1.0, gamma=Constant(2.5))
    for overflow, count in ((1.0, 0), (0.0, 1)):
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(overflow)  # the norm is finite all the same
        opt.step()
        assert opt.param_groups[0]["gamma"].state()["count"].item() == count
    assert w.tolist() == pytest.approx([-1.5, -2.0])


def test_a_threshold_of_zero_lets_zero_gradients_be() -> None:
    w = leaf([1.0, 1.0], [0.0, 0.0])
    opt = GClip([w], 1.0, gamma=Percentile(50))
    for _ in range(3):
        opt.step()
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opt.step()  # three of four norms are 0
    assert w.tolist() == [1.0, 1.0]
    assert (opt.telemetry(reset=False)["unclipped"], opt.telemetry()["clipped"]) == (3, 1)


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_only_the_global_scope_will_do(scope: str) -> None:
    with pytest.raises(
        ValueError, match=rf"gamma=ZScore\(z=2\.5, alpha=0\.97, warmup=25\).*scope={scope!r}|not '{scope}'"
    ):
        GClip([leaf([1.0])], 0.5, gamma=ZScore(), scope=scope)
    w = leaf([1.0], [1.0])
    with pytest.raises(ValueError, match="scope='global'"):
        clip_grad_([{"params": [w]}], gamma=ZScore(), scope=scope)


def test_a_state_of_another_threshold_is_refused_before_anything_is_touched() -> None:
    w = leaf([1.0], [5.0])
    saved = GClip([w], 0.5, gamma=Percentile(20)).state_dict()
    for gamma in (Percentile(30), ZScore(), 1.0):
        opt = GClip([w], 0.25, gamma=gamma)
        with pytest.raises(ValueError, match=r"param_groups\[0\] was saved with gamma=Percentile\(percentile=20, hist"):
            opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.25


def test_a_number_in_the_state_wins_and_a_state_of_torchs_sgd_begins_anew() -> None:
    w = leaf([1.0], [5.0])
    opt = GClip([w], 0.5, gamma=Percentile(20))
    opt.step()
    opt.load_state_dict(torch.optim.SGD([w], 0.1).state_dict())
    assert repr(opt.param_groups[0]["gamma"]) == "Percentile(percentile=20, history=None)"
    assert opt.param_groups[0]["gamma"].gamma == inf
    opt.load_state_dict(GClip([w], 0.5, gamma=3.0).state_dict())
    assert opt.param_groups[0]["gamma"] == 3.0
    opt.step()


# on a device


@every_threshold
def test_a_step_on_a_device_does_not_wait(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_fused", lambda *args, **options: None)  # torch has no such kernel for meta
    params = [nn.Parameter(torch.zeros(3, device="meta")) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:], "gamma": 1.0}]
    opt = DeltaGClip(groups, 0.1, gamma=make(), delta=0.1, momentum=0.9)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()


@every_threshold
def test_steps_on_a_device_are_those_on_the_host(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(around: Callable[[], Any]) -> tuple[list[float], dict[str, float], nn.Module]:
        net = network(torch.float64)
        opt = DeltaGClip(net.parameters(), 0.5, gamma=make(), delta=0.5)
        return run(net, opt, 0, 19, around), opt.telemetry(), net

    on_host = steps(nullcontext)
    monkeypatch.setattr(norms, "squares", squares_as_tensor)
    on_device = steps(NoSync)
    assert on_device[0] == pytest.approx(on_host[0], rel=1e-9)
    assert on_device[1] == pytest.approx(on_host[1], rel=1e-9)
    assert on_host[1]["skipped"] == 3
    assert on_host[1]["clipped"] + on_host[1]["floored"] >= 2
    for a, b in zip(on_host[2].parameters(), on_device[2].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# clip_grad_


@every_threshold
def test_clip_grad_does_the_same_as_the_optimizer(make: Any) -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    opt = GClip(ours.parameters(), 0.5, gamma=make())
    rule, sgd = make(), torch.optim.SGD(theirs.parameters(), 0.5)
    for t in range(19):
        gradients(ours, t)
        gradients(theirs, t)
        opt.step()
        clip_grad_(theirs.parameters(), gamma=rule)
        assert rule.gamma == pytest.approx(opt.param_groups[0]["gamma"].gamma, rel=1e-10)
        sgd.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert opt.telemetry()["clipped"] >= 2
