"""The path of a GPU, where norms stay tensors and nothing waits, run on the CPU against the other path and the twin.

Where there is a GPU, on that as well.
"""

import random
from typing import Any

import pytest
import test_optim_twin as twin
import torch
from optim_helpers import RULES, backward, batches, buffers_of, leaf, make, network, same_bits, values
from torch import Tensor, nn

from surefoot import DeltaGClip, GClip
from surefoot.optim import norm as norms
from surefoot.testing import NoSync

every_rule = pytest.mark.parametrize("rule", RULES)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"maximize": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
]
every_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(o) or "plain")


def squares_as_tensor(grads: list[Tensor]) -> Tensor:
    """What `norm.squares` does on a device."""
    found = (
        torch._foreach_norm(list(grads), 2, dtype=torch.float64) if grads else [torch.zeros((), dtype=torch.float64)]
    )
    return sum((n.square() for n in found[1:]), found[0].square())


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "squares", squares_as_tensor)


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("seed", range(60))
def test_the_fixed_problems_agree_with_the_twin(seed: int, dtype: torch.dtype) -> None:
    problem = twin.random_problem(random.Random(seed), dtype)
    # The device cannot know whether the first step of a buffer is taken: it makes one of zeros all the same.
    found = [f for f in twin.differences(problem) if "momentum buffer" not in f]
    assert found == []


@pytest.mark.usefixtures("device_path")
def test_it_is_the_device_path_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = make("gclip", [leaf([1.0], [3.0])])
    monkeypatch.setattr(opt, "_finish_on_host", None)
    opt.step()
    assert opt.telemetry()["clipped"] == 1


@every_rule
@every_combination
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_both_paths_take_the_same_steps(
    rule: str, options: dict[str, Any], scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for squares in (norms.squares, squares_as_tensor):
        monkeypatch.setattr(norms, "squares", squares)
        net = network(torch.float64)
        opt = make(rule, net.parameters(), 0.1, scope=scope, **options)
        for t, batch in enumerate(batches(6, torch.float64)):
            backward(net, batch)
            if t in (0, 3):
                next(net.parameters()).grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]
            opt.step()
        ran.append((values(net.parameters()), list(buffers_of(opt).values()), opt.telemetry()))
    (host, host_buffers, host_counts), (device, device_buffers, device_counts) = ran
    for a, b in zip(host + host_buffers, device + device_buffers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert device_counts == pytest.approx(host_counts, rel=1e-12, nan_ok=True)
    assert device_counts["skipped"] > 0


@pytest.mark.usefixtures("device_path")
@every_rule
@every_combination
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_nothing_waits(rule: str, options: dict[str, Any], nonfinite: str, scope: str) -> None:
    net = network()
    params = list(net.parameters())
    opt = make(rule, [{"params": params[:3]}, {"params": params[3:]}], scope=scope, nonfinite=nonfinite, **options)
    start = values(params)
    for batch in batches(3):
        backward(net, batch)
        with NoSync():
            opt.step()
    assert opt.telemetry()["steps"] == 3
    assert not same_bits(params, start)


@pytest.mark.usefixtures("device_path")
def test_nothing_waits_under_a_scaler() -> None:
    w = leaf([1.0, 2.0], [300.0, 400.0], torch.float32)
    opt = DeltaGClip([w], 1.0, gamma=1.0, delta=0.1, momentum=0.9)
    opt.grad_scale, opt.found_inf = torch.tensor(100.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    with NoSync():
        opt.step()
    assert opt.telemetry()["norm"] == pytest.approx(5.0)
    torch.testing.assert_close(w.detach(), torch.tensor([0.4, 1.2]))


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_a_scalers_overflow_is_left_out_under_every_policy(nonfinite: str) -> None:
    w = leaf([1.0, 2.0], [torch.inf, 4.0], torch.float32)
    opt = GClip([w], 1.0, gamma=1.0, momentum=0.9, nonfinite=nonfinite)
    opt.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    opt.step()
    assert w.tolist() == [1.0, 2.0]
    assert opt.telemetry()["skipped"] == 1


@pytest.mark.usefixtures("device_path")
def test_raise_waits_and_touches_nothing() -> None:
    w = leaf([1.0], [torch.nan])
    opt = GClip([w], 1.0, gamma=1.0, nonfinite="raise", momentum=0.9)
    with pytest.raises(FloatingPointError, match="1 of 1 gradients"):
        opt.step()
    assert w.item() == 1.0
    assert not opt.state[w]


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_run_may_change_paths(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of the CPU goes on on a GPU and back: a buffer kept up to a scalar is understood there."""
    nets = [network(torch.float64) for _ in range(2)]
    opts = [
        DeltaGClip(n.parameters(), 0.1, gamma=0.3, delta=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
        for n in nets
    ]
    squares = norms.squares
    for t, batch in enumerate(batches(9, torch.float64)):
        for net, opt in zip(nets, opts):
            backward(net, batch)
            on_device = opt is opts[1] and 3 <= t < 6
            monkeypatch.setattr(norms, "squares", squares_as_tensor if on_device else squares)
            opt.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert opts[1].telemetry() == pytest.approx(opts[0].telemetry(), rel=1e-11)


def test_nesterov_may_be_switched_off_in_the_middle() -> None:
    """The buffer that Nesterov keeps up to a scalar is made a plain one again."""
    w = leaf([1.0, 2.0])
    opt = GClip([w], 0.1, gamma=1.0, momentum=0.9, nesterov=True)
    b, x = torch.zeros(2, dtype=torch.float64), w.detach().clone()
    for t in range(4):
        opt.param_groups[0]["nesterov"] = nesterov = t < 2
        w.grad = torch.tensor([30.0, 40.0 + t], dtype=torch.float64)
        opt.step()
        d = w.grad / w.grad.norm()
        b = 0.9 * b + d
        x = x - 0.1 * (d + 0.9 * b if nesterov else b)
        torch.testing.assert_close(w.detach(), x, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------- on a GPU


def pair_on(device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    return network(dtype), network(dtype).to(device)


@needs_cuda
@every_rule
@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_gpu_takes_the_steps_of_the_cpu_and_nothing_waits(
    rule: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    host, device = pair_on("cuda", dtype)
    opts = [make(rule, net.parameters(), 0.1, **options) for net in (host, device)]
    for batch in batches(5, dtype):
        backward(host, batch)
        backward(device, (batch[0].cuda(), batch[1].cuda()))
        opts[0].step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            opts[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    eps = torch.finfo(dtype).eps
    for a, b in zip(host.parameters(), device.parameters()):
        torch.testing.assert_close(a, b.cpu(), rtol=1e3 * eps, atol=1e3 * eps)
    assert opts[1].telemetry() == pytest.approx(opts[0].telemetry(), rel=1e3 * eps, nan_ok=True)


@needs_cuda
@every_combination
def test_half_precision_weights_move_on_a_gpu(options: dict[str, Any]) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        host, device = (nn.Parameter(torch.linspace(-1, 1, 100).to(dtype).to(d)) for d in ("cpu", "cuda"))
        opts = [make("delta_gclip", [w], 0.1, **options) for w in (host, device)]
        for t in range(3):
            for w, opt in zip((host, device), opts):
                w.grad = torch.linspace(1 + t, -2, 100).to(w)
                opt.step()
        torch.testing.assert_close(host.detach(), device.detach().cpu(), rtol=0, atol=8 * torch.finfo(dtype).eps)


@needs_cuda
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}], ids=["plain", "nesterov"])
def test_a_cuda_graph_captures_the_step(options: dict[str, Any]) -> None:
    host, device = (nn.Parameter(torch.tensor([3.0, 4.0], device=d)) for d in ("cpu", "cuda"))
    opts = [DeltaGClip([w], 0.1, gamma=1.0, delta=0.1, **options) for w in (host, device)]
    for w in (host, device):
        w.grad = torch.zeros_like(w)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        opts[1].step()  # makes the buffers
    torch.cuda.current_stream().wait_stream(stream)
    opts[0].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opts[1].step()
    for size in (30.0, 2.0, 0.1):
        for w in (host, device):
            assert w.grad is not None
            w.grad.copy_(torch.tensor([size, -size]))
        opts[0].step()
        graph.replay()
    torch.testing.assert_close(host.detach(), device.detach().cpu())
    assert opts[1].telemetry() == pytest.approx(opts[0].telemetry(), rel=1e-6)
