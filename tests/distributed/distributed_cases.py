"""What every rank of a group runs: the optimizers in each parallel setting, against one process on the whole batch.

A case is a function without arguments that every rank calls; `python distributed_cases.py FOLDER RANKS` runs those
registered for that number of ranks and leaves in FOLDER one file a case with what went wrong, empty if nothing did.
"""

import copy
import math
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from surefoot import DeltaGClip, NormalizedGD, clip_grad_
from surefoot.tune import Online

CASES: dict[str, tuple[tuple[int, ...], Callable[[], None]]] = {}
STEPS = 10
ROWS = 8
SCOPES = ("global", "group", "tensor")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "decoupled": {"momentum": 0.5, "weight_decay": 0.02, "decoupled_weight_decay": True},
}


def case(*ranks: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        CASES[function.__name__] = (ranks, function)
        return function

    return register


class Net(nn.Module):
    """Two linear layers cut up by tensor parallelism, a norm and a head that are not, and a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 12)
        self.down = nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)
        self.temperature = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(h) * self.temperature


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    return x, 3 * torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, and vectors with a smaller γ."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.ndim == 2]}, {"params": [p for p in params if p.ndim < 2], "gamma": 0.4}]


class Ours:
    """δ-GClip with thresholds at which every regime occurs."""

    def __init__(self, model: nn.Module, scope: str, **options: Any) -> None:
        self.optimizer = DeltaGClip(groups(model), lr=0.05, gamma=1.0, delta=0.4, scope=scope, **options)

    def step(self) -> dict[str, float]:
        self.optimizer.step()
        return self.optimizer.telemetry()


class Clipped:
    """`clip_grad_` and AdamW."""

    def __init__(self, model: nn.Module, scope: str) -> None:
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.02)
        self.scope, self.groups = scope, groups(model)

    def step(self) -> dict[str, float]:
        norm = clip_grad_(self.groups, gamma=0.7, delta=0.1, scope=self.scope)
        self.optimizer.step()
        return {"norm": norm.item()}


STEPPERS: dict[str, Callable[[nn.Module, str], Any]] = {
    **{name: partial(Ours, **options) for name, options in OPTIONS.items()},
    "clip_grad_": Clipped,
}


# Each way of stepping in a scope or in all.
COMPARED = [
    *(("nesterov", scope) for scope in SCOPES),
    *(("clip_grad_", scope) for scope in ("tensor", "group", "global")),
    ("plain", "tensor"),
    ("momentum", "group"),
    ("decoupled", "global"),
]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def one_step(forward: nn.Module, stepper: Any, step: int, share: int = 1, place: int = 0) -> dict[str, float]:
    """Step on this rank's share of a batch; the mean over shares of equal size is the mean over the batch."""
    x, y = (t.chunk(share)[place] for t in batch(step))
    stepper.optimizer.zero_grad()
    (forward(x) - y).square().mean().backward()
    return stepper.step()


def trajectory(model: nn.Module, forward: nn.Module, stepper: Any, **shares: int) -> list[tuple[Any, Any]]:
    seen = []
    for step in range(STEPS):
        told = one_step(forward, stepper, step, **shares)
        seen.append(([whole(p) for p in model.parameters()], told))
    return seen


def assert_same(ours: list[tuple[Any, Any]], expected: list[tuple[Any, Any]]) -> None:
    for step, ((params, told), (wanted, wanted_told)) in enumerate(zip(ours, expected, strict=True)):
        for p, w in zip(params, wanted, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-12, atol=1e-12, msg=lambda m, s=step: f"step {s}: {m}")
        assert told.keys() == wanted_told.keys()
        for name, value in wanted_told.items():
            close = math.isclose(told[name], value, rel_tol=1e-12) or (math.isnan(told[name]) and math.isnan(value))
            assert close, f"step {step}: {name} = {told[name]}, not {value}"


@cache
def alone(name: str, scope: str) -> list[tuple[Any, Any]]:
    """The trajectory of one process."""
    model = net()
    return trajectory(model, model, STEPPERS[name](model, scope))


def compare(spread: Callable[[nn.Module], nn.Module], **shares: int) -> None:
    """Hold every optimizer in every scope against one process; `spread` makes a model parallel and returns it."""
    for name, scope in COMPARED if dist.get_world_size() == 2 else COMPARED[:4]:
        model = net()
        forward = spread(model)
        assert_same(trajectory(model, forward, STEPPERS[name](model, scope), **shares), alone(name, scope))


def mine() -> dict[str, int]:
    return {"share": dist.get_world_size(), "place": dist.get_rank()}


@case(2)
def one_process_sees_every_regime() -> None:
    told = [told for name, scope in COMPARED if name != "clip_grad_" for _, told in alone(name, scope)]
    for regime in ("unclipped", "clipped", "floored"):
        assert any(t[regime] for t in told), f"no step was {regime}"


@case(2, 4)
def ddp() -> None:
    compare(lambda model: DistributedDataParallel(model, find_unused_parameters=True), **mine())


@case(2, 4)
def fsdp() -> None:
    def spread(model: nn.Module) -> nn.Module:
        fully_shard(model.up)
        return fully_shard(model)

    compare(spread, **mine())
    model = fully_shard(net())
    sizes = {name: p.to_local().numel() for name, p in model.named_parameters()}
    if dist.get_rank() == dist.get_world_size() - 1:  # or the case would be an even one
        assert sizes["temperature"] == 0
        assert sizes["head.weight"] < 15 / dist.get_world_size()


@case(4)
def hsdp() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    compare(lambda model: fully_shard(model, mesh=mesh), **mine())


def cut(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


@case(2, 4)
def tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    compare(lambda model: cut(model, mesh))


@case(4)
def tensor_parallel_and_fsdp() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def spread(model: nn.Module) -> nn.Module:
        return fully_shard(cut(model, mesh["tensor"]), mesh=mesh["data"])

    compare(spread, share=2, place=dist.get_rank() // 2)


@case(2)
def replicated_dtensors_are_counted_once() -> None:
    mesh = init_device_mesh("cpu", (2,))
    value = torch.arange(6, dtype=torch.float64)
    for placement in (Replicate(), Shard(0)):
        p = nn.Parameter(distribute_tensor(torch.zeros_like(value), mesh, [placement]))
        p.grad = distribute_tensor(value, mesh, [placement])
        assert clip_grad_([p], gamma=math.inf).item() == math.sqrt(55)


def sharded_pair() -> tuple[list[nn.Parameter], list[Tensor]]:
    """Two parameters cut up over all ranks and a plain one, all ones, with gradients of ones."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = [torch.ones(6, 2, dtype=torch.float64), torch.ones(5, dtype=torch.float64), torch.ones(2).double()]
    params = [nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for v in values[:2]] + [nn.Parameter(values[2])]
    for p, v in zip(params, values):
        p.grad = distribute_tensor(v, mesh, [Shard(0)]) if isinstance(p, DTensor) else v.clone()
    return params, [whole(p) for p in params]


def poison(params: list[nn.Parameter], rank: int, value: float) -> None:
    if dist.get_rank() == rank:
        params[0].grad.to_local()[0, 0] = value  # type: ignore[union-attr]


@case(2, 4)
def nan_on_one_rank_is_skipped_on_all() -> None:
    for scope in SCOPES:
        for value in (math.nan, math.inf):
            params, before = sharded_pair()
            poison(params, 1, value)
            pieces = [{"params": [p]} for p in params]
            opt = DeltaGClip(pieces, lr=0.1, gamma=1.0, delta=0.1, scope=scope, momentum=0.9)
            opt.step()
            told = opt.telemetry()
            assert told["skipped"] == {"global": 1, "group": 3, "tensor": 3}[scope], told
            for p, b in zip(params, before):
                torch.testing.assert_close(whole(p), b, rtol=0, atol=0)
            clip_grad_(params if scope != "group" else pieces, gamma=1.0, scope=scope)
            assert all(not whole(p.grad).any() for p in params if p.grad is not None)


@case(2, 4)
def nan_on_one_rank_raises_on_all() -> None:
    for act in (
        lambda params: DeltaGClip(params, lr=0.1, gamma=1.0, delta=0.1, nonfinite="raise").step(),
        lambda params: clip_grad_(params, gamma=1.0, nonfinite="raise"),
    ):
        params, before = sharded_pair()
        poison(params, 1, math.nan)
        try:
            act(params)
        except FloatingPointError:
            pass
        else:
            raise AssertionError("no FloatingPointError on this rank")
        for p, b in zip(params, before):
            torch.testing.assert_close(whole(p), b, rtol=0, atol=0)


@case(2, 4)
def a_missing_gradient_does_not_hang() -> None:
    rank = dist.get_rank()
    for scope in SCOPES:
        for missing, where in [
            ([0], [1]),
            ([0, 1, 2], [1]),
            ([1], range(4)),
            ([0, 1], range(4)),
            ([0, 1, 2], range(4)),
        ]:
            params, _ = sharded_pair()
            squares = [whole(p.grad).square().sum() for p in params]  # type: ignore[arg-type]
            if rank in where:
                for i in missing:
                    params[i].grad = None
            gone = list(where) == list(range(4))
            pieces = [{"params": [p]} for p in params]
            opt = DeltaGClip(pieces, lr=0.1, gamma=0.5, delta=0.01, scope=scope, weight_decay=0.1)
            norm = clip_grad_(pieces, gamma=math.inf, scope=scope)
            opt.step()
            if gone:
                left = math.sqrt(sum(float(s) for i, s in enumerate(squares) if i not in missing))
                assert math.isclose(norm.item(), left, rel_tol=1e-12), (norm, left)
                for i in missing:
                    assert bool((whole(params[i]) == 1).all())


@case(2)
def nan_elsewhere_and_no_gradient_here_is_skipped_on_all() -> None:
    for scope in SCOPES:
        params, before = sharded_pair()
        poison(params, 1, math.nan)
        if dist.get_rank() == 0:
            params[0].grad = None
        opt = DeltaGClip(params, lr=0.1, gamma=1.0, delta=0.1, scope=scope)
        opt.step()
        for p, b in zip(params, before):
            torch.testing.assert_close(whole(p), b, rtol=0, atol=0)


@case(2)
def a_checkpoint_goes_on_with_the_same_trajectory() -> None:
    def used() -> nn.Module:
        model = net()
        model.unused.requires_grad_(False)  # torch's checkpointer wants a state of whatever could be trained
        return fully_shard(model)

    for options in OPTIONS.values():
        first = used()
        ours = Ours(first, "global", **options)
        expected = trajectory(first, first, ours, **mine())
        again = used()
        ours = Ours(again, "global", **options)
        for step in range(STEPS // 2):
            one_step(again, ours, step, **mine())
        dcp.save(state(again, ours.optimizer), checkpoint_id=FOLDER / "dcp")
        # Into an optimizer that has not stepped, and into one whose momentum is in another place.
        for steps in (0, 2):
            fresh = used()
            late = Ours(fresh, "global", **options)
            for step in range(steps):
                one_step(fresh, late, STEPS + step, **mine())
            loaded = state(fresh, late.optimizer)
            dcp.load(loaded, checkpoint_id=FOLDER / "dcp")
            set_model_state_dict(fresh, loaded["model"])
            set_optimizer_state_dict(fresh, late.optimizer, loaded["optimizer"])
            late.optimizer.telemetry()
            for step in range(STEPS // 2, STEPS):
                told = one_step(fresh, late, step, **mine())
                assert_same([([whole(p) for p in fresh.parameters()], told)], [expected[step]])


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


@case(2)
def a_plain_state_dictionary_goes_on_bit_for_bit() -> None:
    first = fully_shard(net())
    ours = Ours(first, "global", **OPTIONS["nesterov"])
    expected = trajectory(first, first, ours, **mine())
    again = fully_shard(net())
    ours = Ours(again, "global", **OPTIONS["nesterov"])
    for step in range(STEPS // 2):
        one_step(again, ours, step, **mine())
    fresh = Ours(again, "global", **OPTIONS["nesterov"])
    fresh.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    for step in range(STEPS // 2, STEPS):
        one_step(again, fresh, step, **mine())
    for p, w in zip(again.parameters(), expected[-1][0]):
        assert torch.equal(whole(p), w)


@case(2, 4)
def half_precision_follows_one_rank() -> None:
    def losses(share: int, place: int) -> list[float]:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
        if share > 1:
            model = fully_shard(model, mp_policy=policy)
        context = torch.autocast("cpu", torch.bfloat16, enabled=share == 1)
        optimizer = DeltaGClip(model.parameters(), lr=0.3, gamma=1.0, delta=0.05, momentum=0.5)
        x, y = (t.float() for t in batch(0))
        seen = []
        for _ in range(30):
            optimizer.zero_grad()
            with context:
                out = model(x.chunk(share)[place]).float()
            loss = (out - y.chunk(share)[place]).square().mean()
            loss.backward()
            optimizer.step()
            mean = loss.detach() / share
            if share > 1:
                dist.all_reduce(mean)
            seen.append(mean.item())
        return seen

    ours, expected = losses(**mine()), losses(1, 0)
    assert ours[-1] < ours[0] / 5, ours
    worst = max(abs(a - b) / expected[0] for a, b in zip(ours, expected))
    assert worst < 0.01, (worst, ours, expected)


@case(2)
def normalized_gd_too() -> None:
    single = net()
    expected = NormalizedGD(single.parameters(), lr=0.1, beta=0.1)
    model = fully_shard(net())
    ours = NormalizedGD(model.parameters(), lr=0.1, beta=0.1)
    for step in range(STEPS):
        for forward, optimizer, shares in ((single, expected, {"share": 1, "place": 0}), (model, ours, mine())):
            x, y = (t.chunk(shares["share"])[shares["place"]] for t in batch(step))
            optimizer.zero_grad()
            (forward(x) - y).square().mean().backward()
            optimizer.step()
        for p, w in zip(model.parameters(), single.parameters()):
            torch.testing.assert_close(whole(p), w.detach(), rtol=1e-12, atol=1e-12)


@case(2)
def a_measured_threshold_is_the_same_on_every_rank() -> None:
    """γ = "measured" with its probe, under DDP: as one process on the whole batch, and equal bits on all ranks."""

    def train(model: nn.Module, forward: nn.Module, share: int, place: int, **options: Any) -> tuple[Any, float, float]:
        optimizer = DeltaGClip(model.parameters(), lr=0.4, gamma="measured", delta=0.1, momentum=0.5)
        online = Online(model, optimizer, every=4, **options)
        for step in range(STEPS):
            x, y = (t.chunk(share)[place] for t in batch(step))
            optimizer.zero_grad()
            (forward(x) - y).square().mean().backward()
            online.step(lambda x=x, y=y: (((model(x) - y).square().mean(), len(x)),))
        return list(model.parameters()), optimizer.param_groups[0]["gamma"].gamma, online.reach

    single = net()
    expected = train(single, single, 1, 0)
    assert expected[2] < 1  # the probe has its say
    model = net()
    spread = DistributedDataParallel(model, find_unused_parameters=True)
    found = train(model, spread, **mine(), all_reduce=dist.all_reduce)
    for p, w in zip(found[0], expected[0]):
        torch.testing.assert_close(p, w, rtol=1e-9, atol=1e-12)
    assert math.isclose(found[1], expected[1], rel_tol=1e-9), (found, expected)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found[1:])
    assert len(set(everyone)) == 1, everyone


@contextmanager
def group(folder: Path, rank: int, ranks: int) -> Iterator[None]:
    """A gloo group whose collectives give up after a while: a rank that waits in vain says where."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=20)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch's own remarks: no unused parameter in this step; writing a checkpoint looks up a class it has deprecated
    warnings.filterwarnings("ignore", module="torch")
    with group(folder, rank, ranks):
        for name, (sizes, function) in CASES.items():
            if ranks not in sizes:
                continue
            error = ""
            try:
                function()
            except BaseException:  # torch's CheckpointException is no Exception
                error = f"rank {rank}:\n{traceback.format_exc()}"
            errors: list[Any] = [None] * ranks
            dist.all_gather_object(errors, error)
            if rank == 0:
                (folder / f"{name}.txt").write_text("\n".join(filter(None, errors)), encoding="utf-8")


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    fork = multiprocessing.get_context("fork")  # importing torch once is most of the time of a small case
    ranks = int(sys.argv[2])
    for rank in range(ranks):
        fork.Process(target=main, args=(FOLDER, rank, ranks)).start()
