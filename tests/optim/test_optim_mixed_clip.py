"""MixedClip against its formula in float64, and what every optimizer of ours promises."""

import copy
import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optim_helpers import backward, batches, leaf, network, same_bits, values
from test_optim_device_path import squares_as_tensor
from torch import Tensor, nn

from surefoot import GClip, MixedClip
from surefoot.optim import norm as norms
from surefoot.testing import NoSync

nan, inf = math.nan, math.inf
every_scope = pytest.mark.parametrize("scope", ["global", "group", "tensor"])


class Twin:
    """The formula, one tensor at a time, in float64; groups of (parameters, options)."""

    def __init__(self, groups: list[tuple[list[Tensor], dict[str, Any]]], scope: str) -> None:
        self.groups = [([p.detach().double().clone() for p in params], options) for params, options in groups]
        self.m = [[torch.zeros_like(w) for w in params] for params, _ in self.groups]
        self.scope = scope
        self.clipped = 0

    def norm(self, tensors: list[list[Tensor]], i: int, j: int) -> float:
        chosen = {"global": [t for ts in tensors for t in ts], "group": tensors[i], "tensor": [tensors[i][j]]}
        return math.sqrt(math.fsum(x * x for t in chosen[self.scope] for x in t.flatten().tolist()))

    def step(self, grads: list[list[Tensor]]) -> None:
        g = []
        for (params, o), group in zip(self.groups, grads):
            sign = -1.0 if o.get("maximize") else 1.0
            decay = 0.0 if o.get("decoupled_weight_decay") else o.get("weight_decay", 0.0)
            g.append([sign * x.double() + decay * w for x, w in zip(group, params)])
        for ms, gs, (_, o) in zip(self.m, g, self.groups):
            b = o["momentum"]
            for j, x in enumerate(gs):
                ms[j] = b * ms[j] + (1 - b) * x
        for i, (params, o) in enumerate(self.groups):
            eta, nu, longest = o["lr"], o["nu"], o["lr"] * o["gamma"]
            for j, w in enumerate(params):
                of_m, of_g = self.norm(self.m, i, j), self.norm(g, i, j)
                self.clipped += of_m > o["gamma"]
                step = nu * min(eta, longest / of_m) * self.m[i][j] + (1 - nu) * min(eta, longest / of_g) * g[i][j]
                if o.get("decoupled_weight_decay"):
                    w = w - eta * o["weight_decay"] * w
                params[j] = w - step


def run(
    net: nn.Module,
    opt: MixedClip,
    start: int,
    stop: int,
    bad: tuple[int, ...] = (),
    around: Callable[[], Any] = nullcontext,
) -> None:
    dtype = next(net.parameters()).dtype
    for t, batch in enumerate(batches(stop, dtype)):
        if t >= start:
            backward(net, batch)
            if t in bad:
                next(net.parameters()).grad.view(-1)[0] = nan
            with around():
                opt.step()


@every_scope
@pytest.mark.parametrize("nu", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"maximize": True}],
    ids=lambda options: ",".join(options) or "plain",
)
def test_it_is_the_formula(scope: str, nu: float, options: dict[str, Any]) -> None:
    net = network(torch.float64)
    params = list(net.parameters())
    first = {"lr": 0.3, "gamma": 0.2, "nu": nu, "momentum": 0.8, **options}
    second = {**first, "lr": 0.1, "gamma": 0.1, "momentum": 0.5}
    opt = MixedClip([{"params": params[:3]}, {"params": params[3:], **second}], scope=scope, **first)
    twin = Twin([(params[:3], first), (params[3:], second)], scope)
    for batch in batches(12, torch.float64):
        backward(net, batch)
        grads = [p.grad for p in params]
        before = values(grads)
        opt.step()
        assert same_bits(grads, before)
        twin.step([grads[:3], grads[3:]])
    assert twin.clipped > 3
    for p, w in zip(params, [w for ws, _ in twin.groups for w in ws]):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


def test_nothing_but_the_gradient_is_gclip() -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    opt = MixedClip(ours.parameters(), 0.3, gamma=0.4, nu=0.0)
    twin = GClip(theirs.parameters(), 0.3, gamma=0.4)
    for batch in batches(8, torch.float64):
        for net, o in ((ours, opt), (theirs, twin)):
            backward(net, batch)
            o.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    left, right = opt.telemetry(), twin.telemetry()
    assert left == pytest.approx(right, rel=1e-10)
    assert left["clipped"] > 0


def test_no_step_is_longer_than_lr_times_gamma() -> None:
    w = leaf(torch.zeros(5))
    opt = MixedClip([w], 0.5, gamma=2.0, nu=0.6, momentum=0.5)
    generator = torch.Generator().manual_seed(0)
    longest = 0.0
    for _ in range(30):
        before = w.detach().clone()
        w.grad = 20 * torch.randn(5, generator=generator, dtype=torch.float64)
        opt.step()
        longest = max(longest, (w.detach() - before).norm().item())
    assert 0.9 < longest <= 1.0 + 1e-12
    seen = opt.telemetry()
    assert seen["clipped"] == 30
    assert seen["path_length"] == pytest.approx(30.0)  # both parts at their longest


def test_telemetry_judges_by_the_momentum() -> None:
    w = leaf([0.0], [4.0])
    opt = MixedClip([w], 1.0, gamma=3.0, nu=0.5, momentum=0.5)
    opt.step()  # m = 2
    first = opt.telemetry()
    assert (first["unclipped"], first["norm"], first["scale"]) == (1, 2.0, 1.0)
    assert w.item() == -(0.5 * 2 + 0.5 * 3)
    assert first["path_length"] == 2.5
    w.grad = torch.tensor([10.0], dtype=torch.float64)
    opt.step()  # m = 6
    second = opt.telemetry()
    assert (second["clipped"], second["norm"], second["scale"], second["norm_max"]) == (1, 6.0, 0.5, 6.0)


@every_scope
@pytest.mark.parametrize("bad", [nan, inf])
def test_skip_leaves_weights_and_average_bit_identical(scope: str, bad: float) -> None:
    net = network()
    opt = MixedClip(net.parameters(), 0.3, gamma=0.2, scope=scope, weight_decay=0.1, decoupled_weight_decay=True)
    run(net, opt, 0, 3)
    before = [*values(net.parameters()), *(opt.state[p]["average"].clone() for p in net.parameters())]
    opt.telemetry()
    next(net.parameters()).grad.fill_(bad)
    opt.step()
    after = [*net.parameters(), *(opt.state[p]["average"] for p in net.parameters())]
    assert same_bits(after, before)
    seen = opt.telemetry()
    assert seen["skipped"] == (8 if scope == "tensor" else 1)
    assert seen["path_length"] == 0


def test_a_skipped_first_step_leaves_no_trace() -> None:
    nets = network(), network()
    opts = [MixedClip(net.parameters(), 0.3, gamma=0.2) for net in nets]
    backward(nets[0], batches(1)[0])
    next(nets[0].parameters()).grad.fill_(nan)
    opts[0].step()
    for net, opt in zip(nets, opts):
        run(net, opt, 0, 4)
    assert same_bits(nets[0].parameters(), nets[1].parameters())


def test_raise_touches_nothing_and_propagate_lets_nan_through() -> None:
    w, v = leaf([1.0], [nan]), leaf([1.0], [1.0])
    opt = MixedClip([w, v], 0.5, gamma=1.0, nonfinite="raise")
    with pytest.raises(FloatingPointError, match="1 of 2 gradients"):
        opt.step()
    assert not opt.state
    assert (w.item(), v.item()) == (1.0, 1.0)
    opt = MixedClip([w, v], 0.5, gamma=1.0, nonfinite="propagate")
    opt.step()
    assert w.isnan()
    assert v.isnan()
    assert opt.telemetry()["skipped"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_resumed_run_is_bit_identical(dtype: torch.dtype) -> None:
    def fresh() -> tuple[nn.Module, MixedClip]:
        net = network(dtype)
        return net, MixedClip(net.parameters(), 0.3, gamma=0.2, weight_decay=0.01)

    straight, opt = fresh()
    run(straight, opt, 0, 8, bad=(2, 5))
    first, half = fresh()
    run(first, half, 0, 4, bad=(2,))
    file = io.BytesIO()
    torch.save((first.state_dict(), half.state_dict()), file)
    file.seek(0)
    saved = torch.load(file)  # weights only: nothing in it needs more
    second, other = fresh()
    other.param_groups[0]["lr"] = 99.0
    second.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    kept = copy.deepcopy(saved[1]["state"][0]["average"])
    run(second, other, 4, 8, bad=(5,))
    assert same_bits(second.parameters(), straight.parameters())
    assert opt.telemetry() == other.telemetry()
    assert same_bits([saved[1]["state"][0]["average"]], [kept])


def test_half_precision_keeps_its_average_in_float32() -> None:
    w = leaf(torch.full((40,), 64.0), torch.full((40,), 3.0), torch.bfloat16)
    opt = MixedClip([w], 1.0, gamma=inf, nu=1.0, momentum=0.99)
    for _ in range(200):
        opt.step()
    m = 3 * (1 - 0.99**200)
    average = opt.state[w]["average"]
    assert average.dtype is torch.float32
    torch.testing.assert_close(average, torch.full((40,), m), rtol=1e-5, atol=0)  # in bfloat16 it would stop at 1.5
    assert w.dtype is torch.bfloat16
    assert (w < 0).all()


def test_complex_weights_are_their_parts() -> None:
    z = nn.Parameter(torch.tensor([1 + 2j, -1j], dtype=torch.complex128))
    x = nn.Parameter(torch.view_as_real(z.detach()).clone())
    opts = [MixedClip([p], 0.3, gamma=1.0, momentum=0.5, weight_decay=0.1) for p in (z, x)]
    for k in range(5):
        z.grad = torch.tensor([3 + 1j * k, 2 - 1j], dtype=torch.complex128)
        x.grad = torch.view_as_real(z.grad).clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), x.detach(), rtol=1e-13, atol=1e-14)
    assert opts[0].telemetry()["clipped"] > 0


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_any_layout_and_parameters_without_gradient(memory: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=memory))
    v = nn.Parameter(w.detach().clone(memory_format=torch.contiguous_format))
    idle = leaf([1.0])
    for p in (w, v):
        opt = MixedClip([p, idle], 0.3, gamma=0.5, momentum=0.5, weight_decay=0.1)
        g = torch.Generator().manual_seed(1)
        for _ in range(4):
            p.grad = torch.randn(2, 2, 3, 4, generator=g).permute(3, 2, 0, 1)
            opt.step()
    torch.testing.assert_close(w, v)
    assert idle.item() == 1.0


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}], ids=["plain", "decay"])
@every_scope
def test_steps_on_a_device_are_those_on_the_host(
    nonfinite: str, options: dict[str, Any], scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(around: Callable[[], Any]) -> tuple[nn.Module, dict[str, float]]:
        net = network(torch.float64)
        opt = MixedClip(net.parameters(), 0.3, gamma=0.2, momentum=0.5, nonfinite=nonfinite, scope=scope, **options)
        run(net, opt, 0, 8, (0, 3) if nonfinite == "skip" else (), around)
        return net, opt.telemetry()

    on_host = steps(nullcontext)
    monkeypatch.setattr(norms, "squares", squares_as_tensor)
    on_device = steps(NoSync)
    for a, b in zip(on_host[0].parameters(), on_device[0].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert on_device[1] == pytest.approx(on_host[1], rel=1e-10)
    assert on_host[1]["clipped"] > 0
    assert (on_host[1]["skipped"] > 0) == (nonfinite == "skip")


@every_scope
def test_a_step_on_a_device_does_not_wait(scope: str) -> None:
    params = [nn.Parameter(torch.zeros(3, device="meta")) for _ in range(3)]  # no values: asking for one raises
    opt = MixedClip([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}], 0.1, gamma=1.0, scope=scope)
    for _ in range(3):
        for p in params[:2]:
            p.grad = torch.zeros_like(p)
        opt.step()


def test_a_grad_scaler_unscales_first() -> None:
    nets = network(), network()
    opts = [MixedClip(net.parameters(), 0.3, gamma=0.2, weight_decay=0.1) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for t, batch in enumerate(batches(5)):
        backward(nets[0], batch)
        nets[1].zero_grad()
        scaler.scale(nn.functional.cross_entropy(nets[1](batch[0]), batch[1])).backward()
        if t == 2:
            next(nets[0].parameters()).grad.fill_(inf)
            next(nets[1].parameters()).grad.fill_(inf)
        opts[0].step()
        scaler.step(opts[1])
        scaler.update()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("gamma", 0, ValueError),
        ("gamma", nan, ValueError),
        ("gamma", "a", TypeError),
        ("nu", -0.1, ValueError),
        ("nu", 1.1, ValueError),
        ("momentum", 1.0, ValueError),
        ("momentum", -0.1, ValueError),
        ("weight_decay", -1, ValueError),
        ("lr", 0, ValueError),
    ],
)
def test_what_is_out_of_range_is_refused(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name}={value!r}"):
        MixedClip([leaf([1.0])], **{"lr": 0.5, "gamma": 1.0, name: value})


@pytest.mark.parametrize("option", [{"dampening": 0.5}, {"nesterov": True}])
def test_options_that_mean_nothing_here_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no meaning for MixedClip"):
        MixedClip([{"params": [leaf([1.0])], **option}], 0.5, gamma=1.0)
    with pytest.raises(TypeError):
        MixedClip([leaf([1.0])], 0.5, gamma=1.0, **option)
