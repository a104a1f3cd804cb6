"""Saving and resuming, copying and pickling."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from optim_helpers import RULES, backward, batches, buffers_of, leaf, make, network, same_bits
from torch import nn

from surefoot import DeltaGClip, GClip
from surefoot.optim._base import ClippedOptimizer

every_rule = pytest.mark.parametrize("rule", RULES)
OPTIONS: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


def run(net: nn.Module, opt: ClippedOptimizer, start: int, stop: int) -> None:
    for batch in batches(stop)[start:]:
        backward(net, batch)
        opt.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # weights only: nothing in it needs more


@every_rule
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_resumed_run_is_bit_identical_telemetry_included(rule: str, scope: str) -> None:
    straight = network()
    opt = make(rule, straight.parameters(), 0.1, scope=scope, **OPTIONS)
    run(straight, opt, 0, 10)

    first = network()
    half = make(rule, first.parameters(), 0.1, scope=scope, **OPTIONS)
    run(first, half, 0, 5)
    saved = through_a_file({"net": first.state_dict(), "opt": half.state_dict()})

    second = network()
    other = make(rule, second.parameters(), 7.7, scope=scope)  # its options come from the checkpoint
    second.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    run(second, other, 5, 10)
    assert same_bits(second.parameters(), straight.parameters())
    left, right = opt.telemetry(), other.telemetry()
    assert left == right
    assert left["steps"] == 10
    assert left["clipped"] > 0
    assert same_bits(
        list(buffers_of(other).values()),
        list(buffers_of(opt).values()),
    )


def test_a_checkpoint_from_before_the_first_step_resumes_too() -> None:
    net = network()
    opt = make("delta_gclip", net.parameters(), 0.1, **OPTIONS)
    saved = through_a_file(opt.state_dict())
    run(net, opt, 0, 3)
    again = network()
    other = make("delta_gclip", again.parameters(), 0.1, **OPTIONS)
    run(again, other, 0, 1)  # its count of one step goes
    again.load_state_dict(network().state_dict())
    other = make("delta_gclip", again.parameters(), 0.1, **OPTIONS)
    other.load_state_dict(saved)
    run(again, other, 0, 3)
    assert same_bits(net.parameters(), again.parameters())
    assert other.telemetry()["steps"] == 3


def test_loading_restores_each_groups_options() -> None:
    def two() -> list[dict[str, Any]]:
        return [{"params": [leaf([1.0], [5.0])]}, {"params": [leaf([1.0], [5.0])], "gamma": 3.0, "delta": 0.5}]

    opt = DeltaGClip(two(), 0.1, gamma=1.0, delta=0.2)
    opt.param_groups[0]["lr"] = 0.05
    other = DeltaGClip(two(), 9.0, gamma=9.0, delta=0.9)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert [g["lr"] for g in other.param_groups] == [0.05, 0.1]
    assert [(g["gamma"], g["delta"]) for g in other.param_groups] == [(1.0, 0.2), (3.0, 0.5)]


def test_later_steps_do_not_change_the_saved_counts() -> None:
    w = leaf([1.0], [5.0])
    opt = GClip([w], 0.1, gamma=1.0)
    opt.step()
    saved = opt.state_dict()
    counts = saved["telemetry"].clone()
    opt.step()
    opt.telemetry()
    assert same_bits([saved["telemetry"]], [counts])
    other = GClip([leaf([1.0], [5.0])], 0.1, gamma=1.0)
    other.load_state_dict(saved)
    other.step()
    assert same_bits([saved["telemetry"]], [counts])
    assert other.telemetry()["steps"] == 2


def test_loading_leaves_the_dictionary_as_it_was() -> None:
    net = network()
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    saved = sgd.state_dict()
    keys = [set(group) for group in saved["param_groups"]]
    GClip(network().parameters(), 0.1, gamma=1.0).load_state_dict(saved)
    assert [set(group) for group in saved["param_groups"]] == keys
    assert set(saved) == {"state", "param_groups"}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_rule
def test_a_copied_optimizer_goes_on_by_itself(how: str, rule: str) -> None:
    net = network()
    opt = make(rule, net.parameters(), 0.1, scope="tensor", nonfinite="raise", **OPTIONS)
    run(net, opt, 0, 3)
    pair = (net, opt)
    copied_net, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert type(copied) is type(opt)
    assert (copied.scope, copied.nonfinite) == ("tensor", "raise")
    assert copied.telemetry(reset=False) == opt.telemetry(reset=False)
    run(net, opt, 3, 6)
    assert copied.telemetry(reset=False)["steps"] == 3
    run(copied_net, copied, 3, 6)
    assert same_bits(net.parameters(), copied_net.parameters())
    assert opt.telemetry() == copied.telemetry()
