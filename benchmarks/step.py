"""What does a clipped step cost? Ours against torch's ways to clip and step, and against the floor.

The floor is one norm over the gradients (torch's fastest) plus torch's own unclipped fused step with the same options:
clipping for the price of reading the gradient once.

    python benchmarks/step.py                       # every model, 1 and 2 threads, 31 rounds: about half an hour
    python benchmarks/step.py --models small --threads 1 --rounds 5

All arms run in one process, in turn, one call of each a round, on the same parameters and gradients (momentum buffers
are each arm's own); medians over the rounds and their ratio to the floor's median. Alone on the machine: with anything
else running, two-thread timings can be ten times too long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surefoot import DeltaGClip, clip_grad_
from surefoot.optim.norm import global_norm

RESULTS = Path(__file__).parent / "results"
LR = 1e-9
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 1e-4},
    "momentum": {"momentum": 0.9},
    "nesterov+decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
}


def gpt2_small() -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2 small: 124 million parameters in 148 tensors."""
    shapes: list[tuple[int, ...]] = [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
        shapes += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [*shapes, (768,), (768,)]


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50: 25.6 million parameters in 161 tensors."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            inner: list[tuple[int, ...]] = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for shape in inner + ([(4 * width, channels, 1, 1)] if block == 0 else []):
                shapes += [shape, (shape[0],), (shape[0],)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


MODELS = {"124M": gpt2_small, "25M": resnet50, "small": lambda: [(32, 32)] * 1000}


class PublishedDeltaGClip(torch.optim.Optimizer):
    """The published δ-GClip step, straight: the gradients concatenated for the norm, then a loop over tensors."""

    def __init__(self, params: Any, lr: float, gamma: float, delta: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "gamma": gamma, "delta": delta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            norm = torch.norm(torch.cat([p.grad.view(-1) for p in group["params"]]))
            h = group["lr"] * min(1.0, max(group["delta"], (group["gamma"] / norm).item()))
            for p in group["params"]:
                d = p.grad if group["weight_decay"] == 0 else p.grad.add(p, alpha=group["weight_decay"])
                p.add_(d, alpha=-h)


def autoclip(history: list[float], norm: float) -> float:
    """Return the 10th percentile of all norms so far, as AutoClip does."""
    history.append(norm)
    return float(np.percentile(history, 10))


def zclip(state: dict[str, float], norm: float, z: float = 2.5, alpha: float = 0.97) -> float:
    """Return ZClip's threshold for this norm (published defaults, after its warm-up)."""
    mean, std = state["mean"], math.sqrt(state["var"])
    score = (norm - mean) / (std + 1e-6)
    clipped = mean + z * z / score * std if score > z else norm
    state["mean"] = alpha * mean + (1 - alpha) * clipped
    state["var"] = alpha * state["var"] + (1 - alpha) * (clipped - state["mean"]) ** 2
    return clipped


def arms(params: list[nn.Parameter], options: dict[str, Any], gamma: float) -> dict[str, Callable[[], Any]]:
    """Return a step of each way, ready to be called."""
    grads = [p.grad for p in params if p.grad is not None]
    clip = torch.nn.utils.clip_grad_norm_

    def sgd(**how: Any) -> torch.optim.SGD:
        return torch.optim.SGD(params, LR, **options, **how)

    def norm() -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    floor, loop, foreach, fused = sgd(fused=True), sgd(foreach=False), sgd(foreach=True), sgd(fused=True)
    trick, auto, zc = sgd(fused=True), sgd(fused=True), sgd(fused=True)
    ours = DeltaGClip(params, LR, gamma=gamma, delta=0.01, **options)
    quiet = DeltaGClip(params, LR, gamma=gamma, delta=0.01, **options)
    quiet._telemetry.record = lambda verdicts, length: None  # type: ignore[method-assign]
    history: list[float] = [gamma] * 100
    state = {"mean": gamma, "var": (0.1 * gamma) ** 2}

    def with_trick() -> None:
        n = torch.nn.utils.get_total_norm(grads)
        trick.grad_scale = torch.clamp((n + 1e-6) / gamma, min=1.0)  # type: ignore[attr-defined]
        trick.found_inf = (~torch.isfinite(n)).float()  # type: ignore[attr-defined]
        trick.step()

    # Both in their best form: one norm, and ZClip touches the gradients only when it sees a spike.
    def with_autoclip() -> None:
        n = norm()
        torch.nn.utils.clip_grads_with_norm_(params, autoclip(history, n.item()), n)
        auto.step()

    def with_zclip() -> None:
        n = norm()
        value = n.item()
        threshold = zclip(state, value)
        if threshold < value:
            torch.nn.utils.clip_grads_with_norm_(params, threshold, n)
        zc.step()

    found: dict[str, Callable[[], Any]] = {
        "floor: norm + unclipped fused SGD": lambda: (norm(), floor.step()),
        "unclipped fused SGD alone": floor.step,
        "surefoot DeltaGClip": ours.step,
        "surefoot without telemetry": quiet.step,
        "clip_grad_norm_ + SGD loop": lambda: (clip(params, gamma, foreach=False), loop.step()),
        "clip_grad_norm_ + SGD foreach": lambda: (clip(params, gamma), foreach.step()),
        "clip_grad_norm_ + SGD fused": lambda: (clip(params, gamma), fused.step()),
        "SGD fused through grad_scale": with_trick,
        "AutoClip + SGD fused": with_autoclip,
        "ZClip + SGD fused": with_zclip,
    }
    if not options.get("momentum"):
        published = PublishedDeltaGClip(params, LR, gamma, 0.01, options.get("weight_decay", 0.0))
        found["published δ-GClip"] = published.step
    return found


def adamw_arms(params: list[nn.Parameter], gamma: float) -> dict[str, Callable[[], Any]]:
    """Return AdamW, unclipped, clipped by torch and clipped by us."""
    grads = [p.grad for p in params if p.grad is not None]
    opts = [torch.optim.AdamW(params, LR, fused=True) for _ in range(2)]

    def norm() -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    return {
        "floor: norm + unclipped fused AdamW": lambda: (norm(), opts[0].step()),
        "clip_grad_norm_ + AdamW fused": lambda: (torch.nn.utils.clip_grad_norm_(params, gamma), opts[1].step()),
        "surefoot clip_grad_ + AdamW fused": lambda: (clip_grad_(params, gamma=gamma), opts[1].step()),
    }


def compiled_arms(params: list[nn.Parameter], options: dict[str, Any], gamma: float) -> dict[str, Callable[[], Any]]:
    """Return torch.compile of clip + SGD and of the unclipped step."""
    torch._dynamo.reset()  # or the eighth optimizer to be compiled would quietly run uncompiled
    clipped, plain = torch.optim.SGD(params, LR, foreach=True, **options), torch.optim.SGD(params, LR, **options)

    @torch.compile
    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, gamma)
        clipped.step()

    return {"compiled clip_grad_norm_ + SGD": clip_and_step, "compiled unclipped SGD": torch.compile(plain.step)}


def measure(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time each way once a round, in an order that turns by one from round to round; milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
        call()
    order = deque(ways)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            ways[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
        order.rotate(-1)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return medians, quartiles and the median over rounds of the ratio to the floor (the first way)."""
    floor = next(iter(times.values()))
    result = {}
    for name, each in times.items():
        low, mid, high = statistics.quantiles(each, n=4)
        ratio = statistics.median(a / b for a, b in zip(each, floor))
        result[name] = {"ms": mid, "quarter": low, "three_quarters": high, "to_floor": ratio}
    return result


def norms(grads: list[Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """Return time and relative error of ways to take the norm, against float64."""
    exact = math.sqrt(math.fsum(float(g.double().square().sum()) for g in grads))
    ways: dict[str, Callable[[], Any]] = {
        "torch _foreach_norm": lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))),
        "torch get_total_norm": lambda: torch.nn.utils.get_total_norm(grads),
        "torch dtype=float64": lambda: torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64))
        ),
        "surefoot": lambda: global_norm(grads),
    }
    times = summary(measure(ways, rounds))
    for name, call in ways.items():
        times[name]["relative_error"] = abs(float(call()) / exact - 1)
    return times


def environment() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }


def table(document: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    env = document["environment"]
    lines = [
        "# What a clipped step costs",
        "",
        f"{env['processor']}, {env['cores']} cores, torch {env['torch']}; medians of {document['rounds']} rounds, all "
        "ways in turn in one process. In brackets: ratio to the floor, one norm (torch's) plus the unclipped fused "
        "step.",
    ]
    for key, runs in document["runs"].items():
        names = list(dict.fromkeys(name for run in runs.values() for name in run))
        lines += ["", f"## {key}", "", "| way | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
        for name in names:
            cells = [f"{r[name]['ms']:.2f} ms ({r[name]['to_floor']:.2f})" if name in r else "" for r in runs.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## The norm alone", "", "| way | case | ms | relative error |", "|---|---|---|---|"]
    for key, ways in document["norms"].items():
        lines += [f"| {n} | {key} | {w['ms']:.2f} | {w['relative_error']:.1e} |" for n, w in ways.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write results/step.json and results/step.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes of compiling)")
    parser.add_argument(
        "--only", nargs="+", default=[], help="measure only the ways whose name holds one of these words"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    args = parser.parse_args()
    document: dict[str, Any] = {"environment": environment(), "rounds": args.rounds, "runs": {}, "norms": {}}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for model in args.models:
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in MODELS[model]()]
            for p in params:
                p.grad = torch.randn_like(p) * 1e-3
            key = f"{model}, {threads} thread{'s' if threads > 1 else ''}"
            document["norms"][key] = norms([p.grad for p in params if p.grad is not None], args.rounds)
            runs = document["runs"][key] = {}
            for name, options in OPTIONS.items():
                gamma = 0.9999 * float(global_norm([p.grad for p in params if p.grad is not None]))
                ways = arms(params, options, gamma)
                if args.compile:
                    ways |= compiled_arms(params, options, gamma)
                if args.only:
                    kept = ("floor", *args.only)
                    ways = {n: way for n, way in ways.items() if any(word in n for word in kept)}
                runs[name] = summary(measure(ways, args.rounds))
                print(key, name, {n: round(w["to_floor"], 2) for n, w in runs[name].items()}, flush=True)
            if args.only:
                continue
            runs["AdamW"] = summary(measure(adamw_arms(params, gamma), args.rounds))
            print(key, "AdamW", {n: round(w["to_floor"], 2) for n, w in runs["AdamW"].items()}, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(document))
    print(f"{args.out} and {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
