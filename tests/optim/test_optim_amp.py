"""Mixed precision: unscaling is part of the step, the rule judges ||g||, an overflowed step is left out."""

import math
from typing import Any

import pytest
import torch
from optim_helpers import RULES, backward, batches, buffers_of, leaf, make, network, same_bits, values
from torch import Tensor, nn

from surefoot import DeltaGClip, GClip

every_rule = pytest.mark.parametrize("rule", RULES)
every_policy = pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.05},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
]
every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(o) or "plain")


def scaler(scale: float = 1024.0, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def scaled_backward(net: nn.Module, batch: tuple[Tensor, Tensor], by: torch.amp.GradScaler) -> None:
    net.zero_grad()
    by.scale(nn.functional.cross_entropy(net(batch[0]), batch[1])).backward()


@every_rule
@every_combination
def test_fifty_scaled_steps_are_fifty_plain_ones(rule: str, options: dict[str, Any]) -> None:
    plain, scaled = network(), network()
    opts = [make(rule, net.parameters(), 0.1, **options) for net in (plain, scaled)]
    by = scaler(growth_interval=7)  # grows as it goes
    for batch in batches(50):
        backward(plain, batch)
        opts[0].step()
        scaled_backward(scaled, batch, by)
        by.step(opts[1])
        by.update()
    assert by.get_scale() == 1024.0 * 2**7
    for a, b in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    seen = [opt.telemetry() for opt in opts]
    assert seen[0]["steps"] == seen[1]["steps"] == 50
    assert seen[1]["skipped"] == 0
    assert seen[1]["norm_mean"] == pytest.approx(seen[0]["norm_mean"], rel=1e-4)
    assert seen[1]["path_length"] == pytest.approx(seen[0]["path_length"], rel=1e-4)


@every_rule
@every_combination
def test_the_step_leaves_the_scaled_gradients_as_they_are(rule: str, options: dict[str, Any]) -> None:
    net = network()
    opt = make(rule, net.parameters(), 0.1, **options)
    by = scaler()
    for batch in batches(2):
        scaled_backward(net, batch, by)
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        before = values(grads)
        by.step(opt)
        by.update()
        assert same_bits(grads, before)  # still times the scale: nothing went over them to unscale them
        assert max(float(g.abs().max()) for g in grads) > 10


def test_regimes_are_those_of_the_unscaled_norm() -> None:
    w = leaf([0.0])
    opt = DeltaGClip([w], 1.0, gamma=1.0, delta=0.1)
    opt.grad_scale = torch.tensor(4096.0)  # type: ignore[attr-defined]
    for norm in (0.5, 1.0, 2.0, 9.0, 10.0, 50.0):
        w.grad = torch.tensor([norm * 4096], dtype=torch.float64)
        opt.step()
    seen = opt.telemetry()
    assert (seen["unclipped"], seen["clipped"], seen["floored"]) == (2, 2, 2)
    assert (seen["norm_min"], seen["norm_max"]) == (0.5, 50.0)
    assert w.item() == pytest.approx(-(0.5 + 1 + 1 + 1 + 1 + 5))


@every_rule
@pytest.mark.parametrize("scale", [1e-3, 3.0, 2.0**30, 1e12])
def test_a_hand_made_scaler(rule: str, scale: float) -> None:
    """Two attributes are all: grad_scale, which the gradients carry, and found_inf, whether to leave the step out."""
    plain, scaled = leaf([1.0, 2.0]), leaf([1.0, 2.0])
    opts = [make(rule, [w], momentum=0.9, nesterov=True, weight_decay=0.1) for w in (plain, scaled)]
    opts[1].grad_scale = torch.tensor(scale, dtype=torch.float64)  # type: ignore[attr-defined]
    for t in range(6):
        plain.grad = torch.tensor([3.0, 4.0 - t], dtype=torch.float64)
        scaled.grad = plain.grad * scale
        opts[1].found_inf = torch.tensor(float(t == 2))  # type: ignore[attr-defined]
        if t != 2:
            opts[0].step()
        opts[1].step()
    torch.testing.assert_close(scaled.detach(), plain.detach(), rtol=1e-12, atol=0)
    assert opts[1].telemetry()["skipped"] == 1


@every_rule
@every_policy
def test_an_overflow_is_left_out_under_every_policy(rule: str, nonfinite: str) -> None:
    """An overflow is how a scaler looks for its scale and no error: even "raise" and "propagate" leave it out."""
    net = network()
    opt = make(rule, net.parameters(), 0.1, nonfinite=nonfinite, momentum=0.9, weight_decay=0.05)
    by = scaler(2.0**127)
    before = values(net.parameters())
    scaled_backward(net, batches(1)[0], by)
    with torch.no_grad():
        for p in net.parameters():
            assert p.grad is not None
            p.grad.mul_(1e6)
    assert not all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    by.step(opt)
    by.update()
    assert same_bits(net.parameters(), before)
    assert by.get_scale() == 2.0**126
    seen = opt.telemetry()
    assert (seen["steps"], seen["skipped"], seen["scale"], seen["path_length"]) == (1, 1, 0.0, 0.0)


@every_policy
def test_found_inf_is_honoured_even_where_the_gradients_are_finite(nonfinite: str) -> None:
    """It may come from another rank, or from another optimizer of the same scaler."""
    w = leaf([1.0], [3.0])
    opt = GClip([w], 1.0, gamma=1.0, momentum=0.9, nonfinite=nonfinite)
    opt.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    opt.step()
    assert w.item() == 1.0
    assert not opt.state[w]
    seen = opt.telemetry()
    assert seen["skipped"] == 1
    assert math.isnan(seen["norm"])


def test_raise_still_raises_on_what_the_scaler_did_not_find() -> None:
    """Finite gradients whose norm overflows float64; or a scaler that does not look."""
    w = leaf([1.0], [math.nan])
    opt = GClip([w], 1.0, gamma=1.0, nonfinite="raise")
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="1 of 1 gradients"):
        opt.step()
    assert w.item() == 1.0


@every_rule
@every_combination
def test_momentum_is_right_after_a_skipped_first_step(rule: str, options: dict[str, Any]) -> None:
    plain, scaled = leaf([1.0, 2.0], dtype=torch.float32), leaf([1.0, 2.0], dtype=torch.float32)
    opts = [make(rule, [w], 0.1, **options) for w in (plain, scaled)]
    by = scaler()
    for t in range(5):
        grad = torch.tensor([3.0 + t, -4.0])
        if t:
            plain.grad = grad
            opts[0].step()
        scaled.grad = grad * by.get_scale() * (1 if t else math.inf)
        by.scale(torch.zeros(()))  # the scaler wants to have scaled something
        by.step(opts[1])
        by.update()
    assert by.get_scale() == 512.0
    torch.testing.assert_close(plain, scaled, rtol=1e-6, atol=1e-6)
    for a, b in zip(buffers_of(opts[0]).values(), buffers_of(opts[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_rule
def test_gradients_unscaled_by_hand_are_not_unscaled_twice(rule: str) -> None:
    plain, scaled = network(), network()
    opts = [make(rule, net.parameters(), 0.1, momentum=0.9) for net in (plain, scaled)]
    by = scaler()
    for batch in batches(4):
        backward(plain, batch)
        opts[0].step()
        scaled_backward(scaled, batch, by)
        by.unscale_(opts[1])
        for a, b in zip(plain.parameters(), scaled.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        by.step(opts[1])
        by.update()
    for a, b in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert opts[1].telemetry()["norm_mean"] == pytest.approx(opts[0].telemetry()["norm_mean"], rel=1e-4)


def test_scaled_and_unscaled_steps_may_alternate() -> None:
    """What the scaler left on the optimizer does not outlive its step."""
    w = leaf([0.0], dtype=torch.float32)
    opt = GClip([w], 1.0, gamma=1.0)
    by = scaler()
    for scaled in (True, False, True):
        w.grad = torch.tensor([0.5 * (by.get_scale() if scaled else 1.0)])
        by.scale(torch.zeros(()))
        if scaled:
            by.step(opt)
            by.update()
        else:
            opt.step()
    assert w.item() == pytest.approx(-1.5)


def test_one_scaler_for_two_optimizers() -> None:
    a, b = leaf([0.0], dtype=torch.float32), leaf([0.0], dtype=torch.float32)
    ours, theirs = GClip([a], 1.0, gamma=1.0), torch.optim.SGD([b], 1.0)
    by = scaler()
    by.scale((3 * a + 0.5 * b).sum()).backward()
    by.step(ours)
    by.step(theirs)
    by.update()
    assert (a.item(), b.item()) == (pytest.approx(-1.0), pytest.approx(-0.5))


def test_torch_takes_no_closure_with_a_scaler_and_a_hand_made_one_does() -> None:
    w = leaf([3.0, 4.0], dtype=torch.float32)
    opt = GClip([w], 1.0, gamma=1.0)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = w.square().sum() / 2
        (loss * 8.0).backward()
        return loss

    by = scaler()
    by.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        by.step(opt, closure=closure)
    assert w.tolist() == [3.0, 4.0]
    opt.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
    assert opt.step(closure).item() == 12.5
    torch.testing.assert_close(w.detach(), torch.tensor([2.4, 3.2]))


def test_a_disabled_scaler_is_not_there() -> None:
    w = leaf([3.0, 4.0], dtype=torch.float32)
    opt = GClip([w], 1.0, gamma=1.0)
    by = torch.amp.GradScaler("cpu", enabled=False)
    by.scale(w.square().sum() / 2).backward()
    by.step(opt)
    by.update()
    torch.testing.assert_close(w.detach(), torch.tensor([2.4, 3.2]))


@every_rule
def test_float16_gradients_under_a_scale_that_they_need(rule: str) -> None:
    """Gradients too small for float16 arrive through the scale; master weights take the steps."""
    w = nn.Parameter(torch.ones(4, dtype=torch.float16))
    exact = leaf([1.0] * 4)
    opts = [make(rule, [w], 0.5, master_weights=True, momentum=0.9), make(rule, [exact], 0.5, momentum=0.9)]
    opts[0].grad_scale = torch.tensor(2.0**16)  # type: ignore[attr-defined]
    small = 2.0**-26  # half the smallest number of float16
    assert torch.tensor(small, dtype=torch.float16) == 0
    for _ in range(10):
        w.grad = torch.full((4,), small * 2.0**16, dtype=torch.float16)
        exact.grad = torch.full((4,), small, dtype=torch.float64)
        for opt in opts:
            opt.step()
    moved = 1 - exact.detach()
    assert (moved > 0).all()
    master = opts[0].state[w]["master"]
    torch.testing.assert_close(1 - master.double(), moved, rtol=0, atol=1e-6)
    assert opts[0].telemetry()["norm"] == pytest.approx(2 * small, rel=1e-6)


def test_autocast_in_bfloat16_needs_no_scaler() -> None:
    net = network()
    opt = DeltaGClip(net.parameters(), 0.5, gamma=0.5, delta=0.1, momentum=0.9)
    losses = []
    batch = batches(1)[0]
    for _ in range(30):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = net(batch[0])
            assert out.dtype is torch.bfloat16
            loss = nn.functional.cross_entropy(out.float(), batch[1])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.dtype is torch.float32 for p in net.parameters())
    assert opt.telemetry()["skipped"] == 0
