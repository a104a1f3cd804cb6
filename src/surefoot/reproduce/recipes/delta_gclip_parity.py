"""Whether surefoot.DeltaGClip takes the step that the paper defines, held against the formula in plain float64.

Letters: w weights, g gradient, h = η min{1, max{δ, γ/||g||}}, u the rounding unit of the weights' type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from surefoot.optim import DeltaGClip
from surefoot.reproduce.figures import COLOURS
from surefoot.reproduce.recipe import Arms, Column, Drawing, Experiment, Finding, Job, Recipe, Setting, Table
from surefoot.reproduce.results import Results
from surefoot.reproduce.trials import Task
from surefoot.train.job import seed_everything

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOUBLE, SINGLE = "float64", "float32"
ONE_STEP = 8.0  # rounding units of |w| + |h g|, for the worst coordinate of the worst step
WHOLE_RUN = 1e-9  # relative distance of the weights at the end
LEAST = 20  # steps in each regime
REGIMES = ("unclipped", "clipped", "floored")
POINTS = 50  # of a curve

PAPER = (
    "M. Tucat, A. Mukherjee, P. Sen, M. Sun, O. Rivasplata: Regularized Gradient Clipping Provably Trains Wide and "
    "Deep Neural Networks, TMLR 2025, arXiv 2404.08624"
)

Vectors = list[np.ndarray[Any, np.dtype[np.float64]]]


def paper_step(w: Vectors, g: Vectors, eta: float, gamma: float, delta: float) -> tuple[Vectors, float, str]:
    """Return w - h g with h = η min{1, max{δ, γ/||g||}}, h, and the regime; float64, nothing else.

    Example:
        >>> w, h, regime = paper_step([np.zeros(2)], [np.array([3.0, 4.0])], eta=1.0, gamma=1.0, delta=0.1)
        >>> h, regime
        (0.2, 'clipped')
    """
    norm = math.sqrt(math.fsum(float(np.dot(a.ravel(), a.ravel())) for a in g))
    h = eta * min(1.0, max(delta, gamma / norm)) if norm else eta
    regime = "unclipped" if norm <= gamma else "floored" if norm * delta >= gamma else "clipped"
    return [a - h * b for a, b in zip(w, g)], h, regime


def run(job: Job) -> Arms:
    """Train with our optimizer in both types, and with the formula alone in float64."""
    return {DOUBLE: _compared(job, torch.float64), SINGLE: _compared(job, torch.float32)}


def _compared(job: Job, dtype: torch.dtype) -> dict[str, Any]:
    """Take every step with our optimizer, hold it against the formula's from the same w and g, and count the worst.

    In float64 a second network goes its own way by the formula alone, and a third does so from weights that are each
    moved to a neighbouring number: how far the formula's own runs part.
    """
    s = job.experiment.setting
    assert job.data is not None
    task = Task(job.data, s, job.device)
    task.train = task.train[0].to(dtype), task.train[1]
    eta, gamma, delta = s["lr"], s["gamma"], s["delta"]
    model, alone, beside = (_network(task, job.seed, dtype) for _ in range(3))
    draw = np.random.default_rng(job.seed)
    _put(beside, [np.nextafter(a, draw.choice([-np.inf, np.inf], a.shape)) for a in _weights(beside)])
    optimizer = DeltaGClip(model.parameters(), eta, gamma=gamma, delta=delta)
    unit = torch.finfo(dtype).eps / 2
    counts: dict[str, int] = dict.fromkeys(REGIMES, 0)
    worst, disagreements, apart, parted = 0.0, 0, [], []
    for t in range(task.steps):
        task.gradient(model, t, job.seed)
        w, g = _weights(model), _gradients(model)
        wanted, h, regime = paper_step(w, g, eta, gamma, delta)
        optimizer.step()
        counts[regime] += 1
        disagreements += optimizer.telemetry()[regime] != 1
        for got, want, before, b in zip(_weights(model), wanted, w, g):
            scale = unit * (np.abs(before) + np.abs(h * b))
            error = np.abs(got - want)
            assert not error[scale == 0].any()
            worst = max(worst, float(np.max(error[scale > 0] / scale[scale > 0], initial=0.0)))
        if dtype is torch.float64:
            for network in (alone, beside):
                task.gradient(network, t, job.seed)
                _put(network, paper_step(_weights(network), _gradients(network), eta, gamma, delta)[0])
            if (t + 1) % max(1, task.steps // POINTS) == 0:
                own = _weights(alone)
                apart.append(_distance(_weights(model), own))
                parted.append(_distance(_weights(beside), own))
        job.progress(f"step {t + 1:,} of {task.steps:,}, {dtype}")
    found = {"steps": task.steps, "worst": worst, "disagreements": disagreements, **counts}
    if not apart:
        return found
    return found | {"apart": apart[-1], "parted": parted[-1], "curve": apart, "own curve": parted}


def _network(task: Task, seed: int, dtype: torch.dtype) -> nn.Module:
    seed_everything(seed)
    return task.make().to(task.device, dtype).train()


def _weights(model: nn.Module) -> Vectors:
    return [p.detach().cpu().double().numpy().copy() for p in model.parameters()]


def _gradients(model: nn.Module) -> Vectors:
    return [torch.zeros_like(p).cpu().double().numpy() if p.grad is None else p.grad.cpu().double().numpy().copy()
            for p in model.parameters()]  # fmt: skip


@torch.no_grad()
def _put(model: nn.Module, w: Vectors) -> None:
    for p, a in zip(model.parameters(), w):
        p.copy_(torch.from_numpy(a))


def _distance(a: Vectors, b: Vectors) -> float:
    apart = math.sqrt(sum(float(np.sum((x - y) ** 2)) for x, y in zip(a, b)))
    return apart / math.sqrt(sum(float(np.sum(y**2)) for y in b))


def judge(results: Results) -> list[Finding]:
    """Hold the worst step, the regimes and the whole run against the tolerance."""
    return [found for e in results.experiments for arm in (DOUBLE, SINGLE) for found in _judged(results, e.name, arm)]


def _judged(results: Results, name: str, arm: str) -> Iterator[Finding]:
    runs = [line["arms"][arm] for line in results.lines if line["experiment"] == name]
    steps, least = runs[0]["steps"], min(r[regime] for r in runs for regime in REGIMES)
    if least < LEAST:
        yield Finding(f"{name}, {arm}", "not testable here", f"a regime had {least} of {steps:,} steps")
        return
    worst, mixed = max(r["worst"] for r in runs), sum(r["disagreements"] for r in runs)
    fits = worst <= ONE_STEP and not mixed
    said = f"worst coordinate of {steps:,} steps: {worst:.1f} rounding units; {mixed} steps in another regime"
    yield Finding(f"{name}, {arm}: each step", "reproduced" if fits else "not reproduced", said)
    if arm == DOUBLE:
        apart, parted = max(r["apart"] for r in runs), max(r["parted"] for r in runs)
        said = f"weights {apart:.0e} apart at the end; the formula's own from neighbouring weights: {parted:.0e}"
        chaotic = "not testable here" if parted > WHOLE_RUN else "not reproduced"
        yield Finding(f"{name}, {arm}: the whole run", "reproduced" if apart <= WHOLE_RUN else chaotic, said)


def _paint(figure: Figure, results: Results) -> None:
    axes = figure.add_subplot()
    for k, e in enumerate(results.experiments):
        for measure, style in (("curve", "-"), ("own curve", ":")):
            for seed, curve in results.by_seed(e.name, DOUBLE, measure).items():
                steps = results.by_seed(e.name, DOUBLE, "steps")[seed]
                at = [(j + 1) * steps / len(curve) for j in range(len(curve))]
                shown = [c or math.nan for c in curve]  # exactly equal: not on a log axis
                label = e.name if measure == "curve" and seed == results.seeds(e.name)[0] else None
                axes.plot(at, shown, style, color=COLOURS[k % len(COLOURS)], label=label)
    axes.axhline(WHOLE_RUN, color=COLOURS[-1], linestyle="--", linewidth=1, label="tolerance at the end")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("relative distance of the weights")
    axes.grid(axis="y")
    figure.legend(loc="outside upper center", ncols=4)


COMMON: dict[str, Any] = {
    "loss": "cross-entropy", "score": "accuracy", "batch": 32, "steps": 1000, "valid": 0, "test": 0,
    "schedule": "constant",
}  # fmt: skip
VIT = {**COMMON, "model": "vit-tiny", "network": {"width": [32], "depth": 2}}
LARGE = {**COMMON, "batch": 512}

RECIPE = Recipe(
    name="delta-gclip-parity",
    folder="delta-gclip",
    paper=PAPER,
    claim="surefoot.DeltaGClip takes the step that the paper defines: w - h g with h = η min{1, max{δ, γ/||g||}} "
    "and g the gradient of a mini-batch, at every one of 1,000 steps of a real network, in all three regimes.",
    scaled="four small networks on the 8x8 digits, two to three minutes of one core.",
    tolerance="Against the formula written down plainly in float64, from the same weights and gradient: no "
    "coordinate of any step is off by more than 8 rounding units (2^-53, or 2^-24 for float32) of |w| + |h g|, "
    "and no step is counted in another regime. Started from the same weights and each going its own way in "
    "float64, the two end within a relative distance of 1e-9; where the formula's own runs from neighbouring "
    "float64 weights part further than that, a longer distance is not testable. Each regime has at least 20 of "
    "the 1,000 steps, else it is not testable.",
    settings=(
        Setting("networks", "MLP 64-64; ResNet-20 of 4 channels with batch norm; ViT of 2 blocks of 32", "ours: small",
                full="ResNet-18 (the paper's); ViT-Tiny (the paper's)"),
        Setting("η, γ, δ", "see results.json", "ours: so that all three regimes occur; with the paper's δ of 1e-3 and "
                "less the floor is not reached"),
        Setting("batch, steps", "32, 1,000", "ours", full="512, 1,000"),
        Setting("momentum, weight decay", "none", "the paper's definition"),
    ),
    experiments=(
        Experiment("mlp", "digits", setting={
            **COMMON, "model": "mlp", "network": {"width": [64], "depth": 2}, "lr": 0.1, "gamma": 0.6, "delta": 0.5}),
        Experiment("resnet20", "digits", setting={
            **COMMON, "model": "resnet20", "network": {"width": [4]}, "lr": 0.1, "gamma": 0.8, "delta": 0.5}),
        Experiment("vit", "digits", setting={**VIT, "lr": 0.1, "gamma": 1.0, "delta": 0.5}),
        Experiment("vit-slow", "digits", setting={**VIT, "lr": 0.02, "gamma": 0.8, "delta": 0.8}),
    ),
    full=(
        Experiment("resnet18", "uoft-cs/cifar10", ("cifar10",), setting={
            **LARGE, "model": "resnet18", "network": {}, "lr": 0.1, "gamma": 0.8, "delta": 0.5}),
        Experiment("vit-tiny", "uoft-cs/cifar10", ("cifar10",), options={"image_size": 64}, setting={
            **LARGE, "model": "vit-tiny", "network": {}, "lr": 0.1, "gamma": 1.0, "delta": 0.5}),
    ),
    run=run,
    judge=judge,
    tables=(
        Table("The step and the formula", (
            Column("worst", "worst step, rounding units", ".2f"),
            Column("disagreements", "steps in another regime", ".0f"),
            Column("apart", "weights apart at the end", ".1e"),
            Column("parted", "formula, from neighbouring weights", ".1e"),
            Column("unclipped", "unclipped", ".0f"),
            Column("clipped", "clipped", ".0f"),
            Column("floored", "on the floor", ".0f"),
        )),
    ),
    drawings=(
        Drawing("parity", "How far the weights of our optimizer and of the formula are apart when each goes its own "
                "way, in float64; dotted: of the formula and of itself, from neighbouring first weights.", _paint),
    ),
    seeds=1,
)  # fmt: skip
