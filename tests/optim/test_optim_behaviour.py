"""What a step promises: gradients untouched, closures, groups, scopes, the lengths of the regimes, schedules."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import RULES, backward, batches, leaf, make, network, same_bits, values
from torch import nn

from surefoot import DeltaGClip, GClip, NormalizedGD, SmoothClip

every_rule = pytest.mark.parametrize("rule", RULES)
SCOPES = ("global", "group", "tensor")
EVERYTHING = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}


def moved(before: torch.Tensor, w: nn.Parameter) -> float:
    return float((w.detach() - before).norm())


@every_rule
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("extra", [{}, {"maximize": True}, {"decoupled_weight_decay": True}], ids=lambda e: "".join(e))
def test_step_leaves_the_gradients_and_the_rng_as_they_were(rule: str, scope: str, extra: dict[str, Any]) -> None:
    net = network()
    opt = make(rule, net.parameters(), scope=scope, **EVERYTHING, **extra)
    rng = torch.get_rng_state()
    start = values(net.parameters())
    for batch in batches(3):
        backward(net, batch)
        grads = [p.grad for p in net.parameters()]
        copies = values(g for g in grads if g is not None)
        opt.step()
        after = [p.grad for p in net.parameters()]
        assert all(a is b for a, b in zip(grads, after))
        assert same_bits([g for g in after if g is not None], copies)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() == torch.float32
    assert all(p.requires_grad for p in net.parameters())
    assert not same_bits(net.parameters(), start)


@every_rule
def test_step_runs_the_closure_with_gradients_enabled_and_returns_its_loss(rule: str) -> None:
    w = leaf([3.0, 4.0])
    opt = make(rule, [w])
    seen = []

    def closure() -> torch.Tensor:
        opt.zero_grad()
        seen.append(torch.is_grad_enabled())
        loss = w.square().sum() / 2
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True]
    assert loss.detach().item() == 12.5  # at the weights before the step
    twin = leaf([3.0, 4.0], [3.0, 4.0])
    make(rule, [twin]).step()
    assert same_bits([w], [twin])
    assert not torch.equal(w.detach(), torch.tensor([3.0, 4.0], dtype=torch.float64))


def test_step_without_closure_returns_none() -> None:
    assert make("gclip", [leaf([1.0], [1.0])]).step() is None
    assert make("gclip", [leaf([1.0])]).step() is None
    assert make("gclip", [leaf([1.0])]).step(lambda: 7.0) == 7.0


@every_rule
@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_without_any_gradient_does_nothing_and_counts_nothing(rule: str, scope: str) -> None:
    w = leaf([3.0, 4.0])
    opt = make(rule, [w], scope=scope, **EVERYTHING)
    opt.step()
    assert w.tolist() == [3.0, 4.0]
    counts = opt.telemetry()
    assert counts["steps"] == 0
    assert math.isnan(counts["norm"])


@every_rule
@pytest.mark.parametrize("scope", SCOPES)
def test_parameters_without_gradient_are_passed_over(rule: str, scope: str) -> None:
    used, unused, frozen = leaf([1.0], [4.0]), leaf([2.0]), leaf([3.0]).requires_grad_(False)
    opt = make(rule, [{"params": [unused, used]}, {"params": [frozen]}], scope=scope, **EVERYTHING)
    alone = leaf([1.0], [4.0])
    other = make(rule, [alone], scope=scope, **EVERYTHING)
    for _ in range(3):
        opt.step()
        other.step()
    assert same_bits([used], [alone])
    assert unused.item() == 2.0  # no decay either: torch does the same
    assert frozen.item() == 3.0
    assert opt.telemetry() == other.telemetry()


# ------------------------------------------------------------------------------------------------ scopes and groups


def five_and_twelve(scope: str, gamma: float = 1.0) -> tuple[GClip, nn.Parameter, nn.Parameter]:
    a, b = leaf([0.0, 0.0], [3.0, 4.0]), leaf([0.0, 0.0], [0.0, 12.0])
    return GClip([{"params": [a]}, {"params": [b]}], 1.0, gamma=gamma, scope=scope), a, b


def test_the_global_norm_is_over_all_groups() -> None:
    opt, a, b = five_and_twelve("global")
    opt.step()
    torch.testing.assert_close(a.detach(), torch.tensor([-3.0, -4.0], dtype=torch.float64) / 13, rtol=1e-15, atol=0)
    torch.testing.assert_close(b.detach(), torch.tensor([0.0, -12.0], dtype=torch.float64) / 13, rtol=1e-15, atol=0)
    assert opt.telemetry()["norm"] == 13.0


def test_scope_group_takes_a_norm_a_group() -> None:
    opt, a, b = five_and_twelve("group")
    opt.step()
    torch.testing.assert_close(a.detach(), torch.tensor([-0.6, -0.8], dtype=torch.float64), rtol=1e-15, atol=0)
    assert b.tolist() == [0.0, -1.0]
    counts = opt.telemetry()
    assert (counts["norm_min"], counts["norm_max"], counts["clipped"]) == (5.0, 12.0, 2)


def test_scope_tensor_takes_a_norm_a_tensor() -> None:
    a, b, c = leaf([0.0], [3.0]), leaf([0.0], [-4.0]), leaf([0.0], [0.5])
    opt = GClip([{"params": [a, b]}, {"params": [c]}], 1.0, gamma=2.0, scope="tensor")
    opt.step()
    assert [a.item(), b.item(), c.item()] == [-2.0, 2.0, -0.5]
    counts = opt.telemetry()
    assert (counts["clipped"], counts["unclipped"], counts["steps"]) == (2, 1, 1)


def test_default_scope_is_global() -> None:
    opt = GClip([leaf([0.0])], 1.0, gamma=1.0)
    assert opt.scope == "global"


def test_groups_have_their_own_lr_gamma_and_delta_under_one_global_norm() -> None:
    a, b = leaf([0.0, 0.0], [3.0, 4.0]), leaf([0.0, 0.0], [0.0, 12.0])  # 13 together
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lr": 2.0, "gamma": 1.3, "delta": 0.5}]
    opt = DeltaGClip(groups, 1.0, gamma=6.5, delta=0.0)
    opt.step()
    torch.testing.assert_close(a.detach(), torch.tensor([-1.5, -2.0], dtype=torch.float64), rtol=1e-15, atol=0)
    assert b.tolist() == [0.0, -12.0]
    counts = opt.telemetry()  # a verdict for each of the two rules
    assert (counts["steps"], counts["clipped"], counts["floored"]) == (1, 1, 1)


@every_rule
def test_a_group_added_later_joins_the_norm_and_starts_its_own_momentum(rule: str) -> None:
    a = leaf([0.0], [5.0])
    opt = make(rule, [a], momentum=0.9)
    opt.step()
    b = leaf([0.0], [12.0])
    opt.add_param_group({"params": [b], "lr": 0.25})
    opt.step()
    assert opt.telemetry()["norm"] == 13.0
    buffer = opt.state[b]["momentum_buffer"]
    assert b.item() == pytest.approx(-0.25 * buffer.item(), rel=1e-15)
    assert buffer.item() == pytest.approx(12.0 * opt.telemetry()["scale"], rel=1e-12)


@pytest.mark.parametrize(
    "bad", [{"gamma": -1.0}, {"lr": 0.0}, {"delta": 2.0}, {"momentum": math.nan}, {"nesterov": True, "dampening": 0.5}]
)
def test_a_rejected_group_leaves_the_optimizer_unchanged(bad: dict[str, Any]) -> None:
    a = leaf([0.0], [5.0])
    opt = make("delta_gclip", [a], momentum=0.9)
    opt.step()
    before, where = opt.state_dict(), values([a])
    with pytest.raises(ValueError):
        opt.add_param_group({"params": [leaf([0.0], [1.0])], **bad})
    with pytest.raises(ValueError):
        opt.add_param_group({"params": [a]})  # in two groups
    assert len(opt.param_groups) == 1
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert same_bits([a], where)
    opt.step()
    assert opt.telemetry()["steps"] == 2


# --------------------------------------------------------------------------------------------------- the rule itself


@pytest.mark.parametrize(
    ("norm", "regime", "length"),
    [
        (0.5, "unclipped", 0.3 * 0.5),
        (2.0, "unclipped", 0.3 * 2.0),  # at γ
        (2.1, "clipped", 0.3 * 2.0),
        (19.9, "clipped", 0.3 * 2.0),
        (20.0, "floored", 0.3 * 2.0),  # at γ/δ
        (1000.0, "floored", 0.3 * 0.1 * 1000.0),
    ],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_has_the_length_of_its_regime(norm: float, regime: str, length: float, scope: str) -> None:
    w = leaf([1.0, 2.0], [0.6 * norm, 0.8 * norm])
    before = w.detach().clone()
    opt = DeltaGClip([w], 0.3, gamma=2.0, delta=0.1, scope=scope)
    opt.step()
    assert moved(before, w) == pytest.approx(length, rel=1e-12)
    counts = opt.telemetry()
    assert counts[regime] == 1
    assert counts["path_length"] == pytest.approx(length, rel=1e-14)
    assert 0.1 <= counts["scale"] <= 1.0
    assert counts["scale"] == pytest.approx(length / 0.3 / norm, rel=1e-14)


def test_at_the_threshold_the_step_is_the_plain_one_bit_for_bit() -> None:
    for gamma in (0.1, 0.3, 0.7, 0.7447330639678139, 1.1, 3.3):
        w, plain = leaf([1.0], [gamma]), leaf([1.0], [gamma])
        GClip([w], 0.3, gamma=gamma).step()
        torch.optim.SGD([plain], 0.3).step()
        assert same_bits([w], [plain])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.sampled_from(sorted(RULES)))
def test_the_global_scope_does_not_see_a_rotation_of_the_coordinates(seed: int, size: float, rule: str) -> None:
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    weights = torch.randn(6, generator=g, dtype=torch.float64)
    plain, turned = ([leaf(x[:2]), leaf(x[2:])] for x in (weights, rotation @ weights))
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    left, right = make(rule, plain, **options), make(rule, turned, **options)
    for _ in range(3):
        grad = torch.randn(6, generator=g, dtype=torch.float64) * 10**size
        for params, x in ((plain, grad), (turned, rotation @ grad)):
            params[0].grad, params[1].grad = x[:2].clone(), x[2:].clone()
        left.step()
        right.step()
    there = rotation @ torch.cat([p.detach() for p in plain])
    here = torch.cat([p.detach() for p in turned])
    assert (here - there).norm() <= 1e-12 * (1 + there.norm() + 10**size)


def test_scope_tensor_does_see_it() -> None:
    params = [leaf([0.0], [5.0]), leaf([0.0], [0.0])]
    turned = [leaf([0.0], [3.0]), leaf([0.0], [4.0])]
    for group in (params, turned):
        make("gclip", group, scope="tensor").step()
    lengths = [math.hypot(a.item(), b.item()) for a, b in (params, turned)]
    assert lengths == [0.5, pytest.approx(0.5 * math.sqrt(2))]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "make_zero",
    [
        lambda p, o: DeltaGClip(p, 0.5, gamma=1.0, delta=0.1, **o),
        lambda p, o: GClip(p, 0.5, gamma=1.0, **o),
        lambda p, o: NormalizedGD(p, 0.5, beta=1.0, **o),
        lambda p, o: NormalizedGD(p, 0.5, beta=0.0, **o),
        lambda p, o: SmoothClip(p, 0.5, L0=2.0, L1=1.0, **o),
        lambda p, o: SmoothClip(p, 0.5, L0=2.0, L1=0.0, **o),
    ],
    ids=["delta_gclip", "gclip", "normalized", "beta=0", "smooth_clip", "L1=0"],
)
def test_a_zero_gradient_still_decays_the_weights(make_zero: Any, scope: str, decoupled: bool) -> None:
    w = leaf([1.0, -2.0], [0.0, 0.0])
    opt = make_zero([w], {"weight_decay": 0.2, "decoupled_weight_decay": decoupled, "scope": scope})
    opt.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.9, -1.8], dtype=torch.float64), rtol=1e-15, atol=0)
    counts = opt.telemetry()
    assert (counts["unclipped"], counts["path_length"], counts["norm"]) == (1, 0.0, 0.0)


def test_normalized_gd_without_beta_steps_by_exactly_lr_whatever_the_gradient() -> None:
    for size in (1e-120, 1e-30, 1.0, 1e30, 1e120):
        w = leaf([0.0, 0.0], [3 * size, 4 * size])
        NormalizedGD([w], 0.25, beta=0.0).step()
        torch.testing.assert_close(w.detach(), torch.tensor([-0.15, -0.2], dtype=torch.float64), rtol=1e-14, atol=0)


def test_smooth_clip_without_L1_is_gradient_descent_with_step_one_over_L0() -> None:
    w = leaf([0.0, 0.0], [300.0, 400.0])
    opt = SmoothClip([w], L0=4.0, L1=0.0)  # lr is 1 unless told otherwise
    opt.step()
    assert w.tolist() == [-75.0, -100.0]
    assert opt.telemetry()["unclipped"] == 1


@pytest.mark.parametrize("rule", ["normalized", "smooth_clip"])
def test_rules_without_a_floor_count_clipped_above_their_threshold(rule: str) -> None:
    letters = {"beta": 2.0} if rule == "normalized" else {"L0": 4.0, "L1": 2.0}  # threshold 2 both times
    w = leaf([0.0])
    opt = make(rule, [w], **letters)
    for g in (1.0, 2.0, 2.5, 1e9):
        w.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
    counts = opt.telemetry()
    assert (counts["unclipped"], counts["clipped"], counts["floored"]) == (2, 2, 0)


# -------------------------------------------------------------------------------------------------------- schedules


def test_step_lr_reads_and_writes_eta_not_the_step_size() -> None:
    w = leaf([0.0], [100.0])
    opt = GClip([w], 1.0, gamma=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.1)
    places = []
    for _ in range(5):
        opt.step()
        schedule.step()
        places.append(w.item())
    assert places == pytest.approx([-1.0, -2.0, -2.1, -2.2, -2.21], rel=1e-14)
    assert opt.param_groups[0]["gamma"] == 1.0  # the schedule's own gamma is another one


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5, dtype=torch.float64)], ids=["number", "tensor"])
def test_lambda_lr_may_warm_up_from_zero(lr: Any) -> None:
    w = leaf([1.0], [100.0])
    opt = GClip([w], lr, gamma=1.0, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: t / 2)
    places = []
    for _ in range(3):
        opt.step()
        schedule.step()
        places.append(w.item())
    assert places == pytest.approx([1.0, 1 - 0.25 * 1.5, 1 - 0.25 * 1.5 - 0.5 * 1.75], rel=1e-14)
    assert opt.telemetry()["path_length"] == pytest.approx(0.75)


def test_a_schedule_may_end_a_rounding_error_below_zero() -> None:
    w = leaf([0.0], [1.0])
    opt = GClip([w], 0.1, gamma=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1 / 3, 0.0, 4)
    for _ in range(4):
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["lr"] < 0  # torch's own rounding
    before = w.item()
    opt.step()
    assert w.item() == pytest.approx(before, rel=1e-15)


def test_one_cycle_drives_lr_and_momentum_as_it_drives_sgd() -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    opt = DeltaGClip(ours.parameters(), 0.1, gamma=0.1, delta=1.0, momentum=0.9)
    sgd = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, fused=True)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=12) for o in (opt, sgd)]
    momenta = set()
    for batch in batches(12, torch.float64):
        backward(ours, batch)
        backward(theirs, batch)
        opt.step()
        sgd.step()
        for schedule in schedules:
            schedule.step() if schedule.last_epoch < 11 else None
        momenta.add(opt.param_groups[0]["momentum"])
    assert len(momenta) > 5
    assert same_bits(ours.parameters(), theirs.parameters())


def test_gamma_and_delta_may_be_rewritten_by_hand() -> None:
    w = leaf([0.0], [100.0])
    opt = DeltaGClip([w], 1.0, gamma=1.0, delta=0.0)
    opt.step()
    opt.param_groups[0]["gamma"] = 10.0
    opt.step()
    opt.param_groups[0]["delta"] = 0.5
    opt.step()
    assert w.item() == pytest.approx(-1.0 - 10.0 - 50.0)
    counts = opt.telemetry()
    assert (counts["clipped"], counts["floored"]) == (2, 1)


@every_rule
def test_a_number_and_a_tensor_lr_take_the_same_steps(rule: str) -> None:
    nets = [network(torch.float64), network(torch.float64)]
    opts = [
        make(rule, net.parameters(), lr, **EVERYTHING)
        for net, lr in zip(nets, (0.1, torch.tensor(0.1, dtype=torch.float64)))
    ]
    for batch in batches(5, torch.float64):
        for net, opt in zip(nets, opts):
            backward(net, batch)
            opt.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_a_grad_scaler_unscales_first_and_holds_back_overflowed_steps() -> None:
    plain, scaled = leaf([1.0, 2.0], dtype=torch.float32), leaf([1.0, 2.0], dtype=torch.float32)
    opts = [DeltaGClip([w], 0.5, gamma=1.0, delta=0.1, momentum=0.9) for w in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        for opt in opts:
            opt.zero_grad()
        (plain.square().sum() * (math.inf if t == 0 else 1.0)).backward()
        scaler.scale(scaled.square().sum() * (math.inf if t == 0 else 1.0)).backward()
        opts[0].step()
        scaler.step(opts[1])
        scaler.update()
    assert same_bits([plain], [scaled])
    seen = [opt.telemetry() for opt in opts]
    assert seen[0] == seen[1]  # unscaled before it is judged
    assert (seen[0]["skipped"], seen[0]["steps"]) == (1, 4)
