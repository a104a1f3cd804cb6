"""torch.compile(opt.step): one graph, the steps of eager, no compilation anew when a schedule writes lr."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from optim_helpers import RULES, backward, batches, buffers_of, leaf, make, network, same_bits, values
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from surefoot import DeltaGClip, GClip
from surefoot.optim import ClippedOptimizer

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(opt: ClippedOptimizer, backend: Any = "aot_eager") -> Callable[[], None]:
    return torch.compile(opt.step, fullgraph=True, backend=backend)


def pair(rule: str, dtype: torch.dtype = torch.float64, lr: Any = 0.1, **options: Any) -> list[Any]:
    nets = [network(dtype) for _ in range(2)]
    rates = [lr.clone() if isinstance(lr, Tensor) else lr for _ in nets]
    return [nets, [make(rule, net.parameters(), rate, **options) for net, rate in zip(nets, rates)]]


def assert_same_run(nets: list[nn.Module], opts: list[ClippedOptimizer], rtol: float) -> None:
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    for a, b in zip(buffers_of(opts[0]).values(), buffers_of(opts[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    assert opts[1].telemetry() == pytest.approx(opts[0].telemetry(), rel=max(rtol, 1e-6), nan_ok=True)


@pytest.mark.parametrize(
    ("rule", "options"),
    [("delta_gclip", options) for options in COMBINATIONS] + [(rule, {}) for rule in RULES],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "plain",
)
def test_a_compiled_step_is_one_graph_and_the_step_of_eager(rule: str, options: dict[str, Any]) -> None:
    nets, opts = pair(rule, **options)
    steps = [opts[0].step, compiled(opts[1])]
    for t, batch in enumerate(batches(5, torch.float64)):
        for net, step in zip(nets, steps):
            backward(net, batch)
            if t == 2:
                next(net.parameters()).grad.view(-1)[0] = torch.nan
            before = [p.grad.clone() for p in net.parameters()]
            step()
            assert same_bits([p.grad for p in net.parameters()], before)
    assert_same_run(nets, opts, 1e-11)


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_other_scopes(scope: str) -> None:
    nets, opts = pair("delta_gclip", scope=scope, momentum=0.9)
    steps = [opts[0].step, compiled(opts[1])]
    for batch in batches(4, torch.float64):
        for net, step in zip(nets, steps):
            backward(net, batch)
            step()
    assert_same_run(nets, opts, 1e-11)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # built after: torch misses the compiled step
def test_a_schedule_compiles_nothing_anew(lr: Any, built: str) -> None:
    """The second step is compiled again, for the state that the first one made. Then no more, whatever lr is."""
    nets, opts = pair("delta_gclip", lr=lr, momentum=0.9)
    counter = CompileCounterWithBackend("aot_eager")
    build = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda t: 0.8**t)
    if built == "before":  # torch has wrapped step() in a function that the compiler passes over
        schedules = [build(opt) for opt in opts]
        steps = [opts[0].step, torch.compile(opts[1].step, backend=counter)]
    else:
        steps = [opts[0].step, compiled(opts[1], counter)]
        schedules = [build(opt) for opt in opts]
    counts = []
    for batch in batches(10, torch.float64):
        for net, step, schedule in zip(nets, steps, schedules):
            backward(net, batch)
            step()
            schedule.step()
        counts.append(sum(len(g.graph.nodes) > 0 for g in counter.graphs))
    assert float(opts[1].param_groups[0]["lr"]) == pytest.approx(0.1 * 0.8**10)
    assert counts[0] == 1  # one graph, without breaks
    assert counts[2:] == [2] * 8
    assert_same_run(nets, opts, 1e-11)


def test_eager_and_compiled_steps_may_alternate() -> None:
    """Nesterov's buffer, which eager steps on the CPU keep up to a scalar, is understood by compiled ones."""
    nets, opts = pair("delta_gclip", momentum=0.9, nesterov=True, weight_decay=0.05)
    step = compiled(opts[1])
    for t, batch in enumerate(batches(6, torch.float64)):
        for net, opt in zip(nets, opts):
            backward(net, batch)
            step() if opt is opts[1] and t in (2, 3) else opt.step()
    assert_same_run(nets, opts, 1e-11)


def test_a_whole_training_step_compiles() -> None:
    nets, opts = pair("delta_gclip", momentum=0.9)

    def train(net: nn.Module, opt: ClippedOptimizer, x: Tensor, y: Tensor) -> None:
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        opt.zero_grad()

    runs = [train, torch.compile(train, backend="aot_eager")]
    for x, y in batches(4, torch.float64):
        for run, net, opt in zip(runs, nets, opts):
            run(net, opt, x, y)
    assert_same_run(nets, opts, 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master_weights", [False, True])
def test_half_precision_weights(dtype: torch.dtype, master_weights: bool) -> None:
    starts = torch.linspace(-1, 1, 50).to(dtype)
    weights = [nn.Parameter(starts.clone()) for _ in range(2)]
    opts = [GClip([w], 0.1, gamma=1.0, momentum=0.9, master_weights=master_weights) for w in weights]
    steps = [opts[0].step, compiled(opts[1])]
    for t in range(3):
        for w, step in zip(weights, steps):
            w.grad = torch.linspace(-2, 1 + t, 50).to(dtype)
            step()
    assert not torch.equal(weights[0], starts)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_scaler_reaches_the_compiled_step() -> None:
    plain, scaled = leaf([3.0, 4.0]), leaf([3.0, 4.0])
    opts = [DeltaGClip([w], 0.5, gamma=1.0, delta=0.1, momentum=0.9) for w in (plain, scaled)]
    step = compiled(opts[1])
    for t in range(4):
        plain.grad = torch.tensor([3.0, 4.0 + t], dtype=torch.float64)
        scaled.grad = plain.grad * 64
        opts[1].grad_scale = torch.tensor(64.0)  # type: ignore[attr-defined]
        opts[1].found_inf = torch.tensor(float(t == 1))  # type: ignore[attr-defined]
        if t != 1:
            opts[0].step()
        step()
    torch.testing.assert_close(plain.detach(), scaled.detach(), rtol=1e-12, atol=0)
    assert opts[1].telemetry()["skipped"] == 1


def test_a_refused_option_is_refused_in_a_compiled_step_too() -> None:
    w = leaf([3.0], [4.0])
    opt = GClip([w], 0.5, gamma=1.0)
    step = compiled(opt)
    step()
    before = values([w])
    opt.param_groups[0]["gamma"] = -1.0
    with pytest.raises(Exception, match=r"gamma|ValueError"):
        step()
    assert same_bits([w], before)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself, as it loads inductor
def test_inductor_compiles_the_step() -> None:
    weights = [leaf([1.0, 2.0, 3.0], dtype=torch.float32) for _ in range(2)]
    opts = [DeltaGClip([w], 0.1, gamma=1.0, delta=0.1, momentum=0.9, nesterov=True) for w in weights]
    steps = [opts[0].step, compiled(opts[1], "inductor")]
    for t in range(4):
        for w, step in zip(weights, steps):
            w.grad = torch.tensor([30.0, 0.0, float(t)]) / 10**t
            step()
    torch.testing.assert_close(weights[0], weights[1])
    seen = [opt.telemetry() for opt in opts]
    assert [seen[0][k] for k in ("floored", "clipped", "unclipped")] == [1, 1, 2]
    assert seen[1] == pytest.approx(seen[0])
