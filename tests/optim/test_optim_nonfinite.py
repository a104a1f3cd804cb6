"""NaN and infinite gradients: skip, raise, propagate."""

import copy
import math
from typing import Any

import pytest
import torch
from optim_helpers import RULES, backward, batches, leaf, make, network, same_bits, values
from torch import Tensor

from surefoot import DeltaGClip, GClip
from surefoot.optim._base import ClippedOptimizer

every_rule = pytest.mark.parametrize("rule", RULES)
every_scope = pytest.mark.parametrize("scope", ["global", "group", "tensor"])
every_bad = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
OPTIONS: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}


def everything(opt: ClippedOptimizer) -> list[Tensor]:
    params = [p for group in opt.param_groups for p in group["params"]]
    return values(params) + [opt.state[p]["momentum_buffer"].clone() for p in params if opt.state[p]]


def spoiled(rule: str, bad: float, **options: Any) -> ClippedOptimizer:
    """Return an optimizer three good steps old, in two groups, with one bad entry among the gradients."""
    net = network()
    params = list(net.parameters())
    opt = make(rule, [{"params": params[:3]}, {"params": params[3:]}], 0.1, **OPTIONS, **options)
    for batch in batches(3):
        backward(net, batch)
        opt.step()
    assert params[4].grad is not None
    params[4].grad[1] = bad
    return opt


@every_rule
@every_scope
@every_bad
def test_skip_leaves_weights_and_buffers_bit_identical_and_is_counted(rule: str, scope: str, bad: float) -> None:
    opt = spoiled(rule, bad, scope=scope)
    opt.telemetry()
    before = everything(opt)
    opt.step()
    assert same_bits(everything(opt), before)
    counts = opt.telemetry()
    units = {"global": 1, "group": 2, "tensor": 8}[scope]
    assert (counts["steps"], counts["skipped"]) == (1, units)
    assert [counts[k] for k in ("unclipped", "clipped", "floored")] == [0, 0, 0]
    assert (counts["clip_fraction"], counts["floor_fraction"]) == (0.0, 0.0)
    assert counts["path_length"] == 0.0
    assert counts["scale"] == 0.0
    assert not math.isfinite(counts["norm"])
    assert math.isnan(counts["norm_mean"])


@every_rule
@every_scope
def test_after_a_skipped_step_all_goes_on_as_if_it_had_not_been(rule: str, scope: str) -> None:
    nets = [network(), network()]
    opts = [make(rule, net.parameters(), 0.1, scope=scope, **OPTIONS) for net in nets]
    for t, batch in enumerate(batches(6)):
        backward(nets[0], batch)
        if t in (0, 3):  # the very first, when there are no buffers yet, and one in the middle
            next(nets[0].parameters()).grad[0] = math.nan
            opts[0].step()
            continue
        opts[0].step()
        backward(nets[1], batch)
        opts[1].step()
    assert same_bits(everything(opts[0]), everything(opts[1]))
    left, right = opts[0].telemetry(), opts[1].telemetry()
    assert (left.pop("steps"), right.pop("steps")) == (6, 4)
    assert left.pop("skipped") == 2 * (8 if scope == "tensor" else 1)
    assert right.pop("skipped") == 0
    for name in ("clip_fraction", "floor_fraction"):
        left.pop(name), right.pop(name)
    assert left == right


def test_momentum_is_right_after_a_skipped_first_step() -> None:
    w = leaf([0.0], [math.nan])
    opt = GClip([w], 1.0, gamma=1.0, momentum=0.5)
    opt.step()
    places = []
    for _ in range(3):
        w.grad = torch.tensor([10.0], dtype=torch.float64)
        opt.step()
        places.append(w.item())
    assert places == pytest.approx([-1.0, -2.5, -4.25], rel=1e-15)


@every_rule
@every_scope
@every_bad
def test_raise_touches_nothing_and_says_where(rule: str, scope: str, bad: float) -> None:
    opt = spoiled(rule, bad, scope=scope, nonfinite="raise")
    before, counts = everything(opt), opt.telemetry(reset=False)
    with pytest.raises(FloatingPointError) as caught:
        opt.step()
    message = str(caught.value)
    assert "1 of 8 gradients" in message
    assert "number 4" in message
    assert "shape (6,)" in message
    assert "nonfinite='skip'" in message
    assert same_bits(everything(opt), before)
    assert opt.telemetry() == counts


def test_raise_tells_an_overflowing_norm_from_bad_gradients() -> None:
    w = leaf([0.0, 0.0], [1.7e308, 1.7e308])  # the norm is beyond float64
    with pytest.raises(FloatingPointError, match=r"gradient norm is inf: the gradients are finite but .* overflows"):
        GClip([w], 1.0, gamma=1.0, nonfinite="raise").step()
    assert w.tolist() == [0.0, 0.0]


def test_raise_lets_good_steps_through() -> None:
    w = leaf([0.0], [10.0])
    GClip([w], 1.0, gamma=1.0, nonfinite="raise").step()
    assert w.item() == -1.0


@every_bad
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_propagate_does_what_torch_does(bad: float, momentum: float) -> None:
    ours, theirs = [[leaf([1.0, 2.0], [3.0, bad]), leaf([1.0], [4.0])] for _ in range(2)]
    GClip(ours, 0.5, gamma=1.0, momentum=momentum, nonfinite="propagate").step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, 0.5, momentum=momentum).step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=0, equal_nan=True)
    assert ours[0][1].isnan()
    assert ours[1].isnan().item() == math.isnan(bad)


@every_scope
def test_propagate_counts_the_bad_norms_as_skipped_and_reports_them(scope: str) -> None:
    good, bad = leaf([1.0], [4.0]), leaf([1.0], [math.nan])
    opt = DeltaGClip([good, bad], 0.5, gamma=1.0, delta=0.5, scope=scope, nonfinite="propagate")
    opt.step()
    assert bad.isnan()
    assert good.isnan().item() == (scope != "tensor")
    counts = opt.telemetry()
    assert counts["skipped"] == 1
    assert counts["floored"] == (scope == "tensor")
    assert counts["path_length"] == 0.0


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_the_policy_makes_no_difference_to_finite_steps(nonfinite: str) -> None:
    net, other = network(), network()
    opts = [
        make("delta_gclip", n.parameters(), 0.1, nonfinite=m, **OPTIONS) for n, m in ((net, nonfinite), (other, "skip"))
    ]
    for batch in batches(4):
        for n, opt in zip((net, other), opts):
            backward(n, batch)
            opt.step()
    assert same_bits(everything(opts[0]), everything(opts[1]))
    assert opts[0].telemetry() == opts[1].telemetry()


def test_skip_is_the_default() -> None:
    w = leaf([1.0], [math.nan])
    opt = DeltaGClip([w], 0.5, gamma=1.0, delta=0.1)
    twin = copy.deepcopy(opt)
    opt.step()
    assert w.item() == 1.0
    assert opt.nonfinite == twin.nonfinite == "skip"
