"""Chatterjee's local criterion on real data: from the positive initialisation, and along training from a usual one.

Letters: f the mean squared error of one output, f0 at the start, E = N f/2, N rows of d numbers, alpha the least
||grad f||^2/f on the ball of radius R, K the tangent Gram, q = beta rho/s_0^2. The criterion is 4 f0 < R^2 alpha.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surefoot.certificates import certify
from surefoot.data import Dataset
from surefoot.measure import sharpness, tangent_gram
from surefoot.models import build
from surefoot.reproduce.figures import COLOURS, MUTED
from surefoot.reproduce.recipe import Arms, Column, Drawing, Experiment, Finding, Job, Recipe, Setting, Table
from surefoot.reproduce.results import Results
from surefoot.theorems.local_pl import check_local_pl_jacobian
from surefoot.theorems.positive_init import positive_init_
from surefoot.theorems.verdict import Verdict
from surefoot.train.job import seed_everything

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIVE, POSITIVE_BEST, USUAL_BEST = "positive, certified step", "positive, best step", "usual, best step"
LEFT = 0.1  # part of the initial loss to come to
RATES = (0.5, 1.0, 2.0)  # over the sharpness at the start
GROWTH = 1.2  # from one attempt to the next
ROOM = 1e-9  # of a guaranteed factor, for the rounding of a step
FLOOR = 1e-20  # a loss below is rounding


def run(job: Job) -> Arms:
    """Do what the experiment's setting says."""
    return {"positive": _positive, "along training": _along}[job.experiment.setting["kind"]](job)


def rows(data: Dataset | None, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (N, d) inputs and (N, 1) targets, 1 for the lower half of the classes and -1 for the upper."""
    assert data is not None
    picked = np.sort(np.random.default_rng(seed).permutation(len(data.train_x))[:count])
    x = data.train_x[picked].flatten(1).double()
    y = 1.0 - 2.0 * (data.train_y[picked] >= data.outputs // 2).double()
    return x, y[:, None]


def network(inputs: int, width: list[int], activation: str) -> nn.Module:
    """Return a float64 network of one output with PyTorch's initial weights."""
    return build(
        "mlp", kind="table", task="regression", input_shape=(inputs,), outputs=1, width=tuple(width),
        activation=activation,
    ).double()  # fmt: skip


# ------------------------------------------------------------------------------------------ the positive initialisation


def _positive(job: Job) -> Arms:
    s = job.experiment.setting
    x, y = rows(job.data, s["rows"], job.seed)
    x = x / math.sqrt(x.shape[1])
    seed_everything(job.seed)
    model = network(x.shape[1], [int(m) for m in job.part.split("-")], "tanh")
    usual = copy.deepcopy(model)
    assert isinstance(model, nn.Sequential)
    found = positive_init_(model, x, y, target=LEFT * float(y.square().mean()))
    numbers = found.verdict.numbers
    arms: dict[str, dict[str, Any]] = {
        f"{POSITIVE}, {job.part}": {"criterion": found.verdict.outcome.value, **_certified(model, x, y, found, s)}
        if found
        else {"criterion": found.verdict.outcome.value}
    }
    for name, start in ((POSITIVE_BEST, model), (USUAL_BEST, usual)):
        top = sharpness(start, F.mse_loss, (x, y)).value
        steps, c = min((_steps_to(start, x, y, c / top, s["cap"]), c) for c in RATES)
        arms[f"{name}, {job.part}"] = {"steps": steps, "rate over sharpness": c, "step": c / top}
        job.progress(name)
    if found:
        arms[f"{POSITIVE}, {job.part}"]["steps"] = numbers["steps"]
    return arms


def _certified(start: nn.Module, x: Tensor, y: Tensor, found: Any, s: Any) -> dict[str, Any]:
    """Take steps of the longest certified size and hold them against rate and radius."""
    numbers = found.verdict.numbers
    model = copy.deepcopy(start)
    went = _held(model, x, y, found.eta_max, numbers["drop"], numbers["radius"], s["after"], scale=1 / len(x))
    return {
        "A": found.A,
        "t": found.t,
        "radius": numbers["radius"],
        "step": found.eta_max,
        "drop": numbers["drop"],
        "alpha": found.alpha,
        "ratio / alpha": went.pop("least ratio") / found.alpha,
        **went,
    }


def _held(
    model: nn.Module, x: Tensor, y: Tensor, h: float, drop: float, radius: float, steps: int, *, scale: float
) -> dict[str, Any]:
    """Take steps h on f = scale ||F - y||^2; count those that lose less than `drop` of f or leave the radius."""
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    values: list[float] = []
    ratio, far, broken = math.inf, 0.0, 0
    for t in range(steps + 1):
        f = scale * (model(x) - y).square().sum()
        values.append(float(f.detach()))
        if t and values[-1] > values[-2] * (1 - drop) * (1 + ROOM) and values[-1] > FLOOR:
            broken += 1
        g = torch.autograd.grad(f, params)
        if values[-1] > FLOOR:
            ratio = min(ratio, math.fsum(float(p.square().sum()) for p in g) / values[-1])
        far = max(far, math.hypot(*[float((p.detach() - q).norm()) for p, q in zip(params, start)]))
        if t < steps:
            with torch.no_grad():
                for p, d in zip(params, g):
                    p.sub_(d, alpha=h)
    last = max(values[-1], FLOOR)
    return {
        "broken": broken + (far > radius * (1 + ROOM)),
        "rate / guaranteed": math.log(values[0] / last) / steps / -math.log1p(-drop),
        "distance / radius": far / radius,
        "least ratio": ratio,
    }


def _steps_to(start: nn.Module, x: Tensor, y: Tensor, h: float, cap: int) -> int:
    """Return the steps of gradient descent until LEFT of ||y||^2/N is left, `cap` at most."""
    model = copy.deepcopy(start)
    params = list(model.parameters())
    goal = LEFT * float(y.square().mean())
    for t in range(cap):
        f = F.mse_loss(model(x), y)
        value = float(f.detach())
        if value <= goal:
            return t
        if not value < 1e6:
            break
        g = torch.autograd.grad(f, params)
        with torch.no_grad():
            for p, d in zip(params, g):
                p.sub_(d, alpha=h)
    return cap


# -------------------------------------------------------------------------------------------- along a usual training


def _along(job: Job) -> Arms:
    """Train by gradient descent and find the first steps after which the criteria hold, by proved constants."""
    s = job.experiment.setting
    x, y = rows(job.data, s["rows"], job.seed)
    activation, _, width = job.part.partition(" ")
    seed_everything(job.seed)
    model = network(x.shape[1], [int(m) for m in width.split("-")], activation)
    params = list(model.parameters())
    h = 1 / float(torch.linalg.eigvalsh(tangent_gram(model, x))[-1])
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in params)}
    first, due = math.nan, 0
    local = None
    for t in range(s["cap"] + 1):
        E = 0.5 * (model(x) - y).square().sum()
        if t == 0:
            first = float(E.detach())
        if t == due:
            due = max(t + 1, int(t * GROWTH))
            verdict = certify(model, x, y)
            left = float(E.detach()) / first
            if t == 0:
                found["q at first"] = _q(verdict)
            if verdict and "path length: step" not in found:
                found |= {"path length: step": t, "path length: orders": -math.log10(left)}
            local = _local(verdict)
            if local:
                found |= {"step": t, "orders": -math.log10(left)}
                break
            job.progress(f"step {t:,}, q = {_q(verdict):.3g}")
        h = _descend(model, params, x, y, E, h)
    found["held"] = "yes" if local else "no"
    if local:
        numbers = local.numbers
        went = _held(model, x, y, numbers["eta_max"], numbers["drop"], numbers["radius"], s["after"], scale=0.5)
        found |= {"ratio / alpha": went.pop("least ratio") / numbers["alpha"], "drop": numbers["drop"], **went}
    return {job.part: found}


def _descend(model: nn.Module, params: list[nn.Parameter], x: Tensor, y: Tensor, E: Tensor, h: float) -> float:
    """Take a step h on E, halved until E does not rise; return h."""
    g = torch.autograd.grad(E, params)
    with torch.no_grad():
        for p, d in zip(params, g):
            p.sub_(d, alpha=h)
        while h > 1e-300 and not 0.5 * (model(x) - y).square().sum() <= E:
            h /= 2
            for p, d in zip(params, g):
                p.add_(d, alpha=h)
    return h


def _q(verdict: Verdict) -> float:
    rho, s0, beta, _ = (float(m) for m in verdict.measurements)
    return beta * rho / s0**2 if s0 > 0 else math.inf


def _local(verdict: Verdict) -> Verdict | None:
    """Return the local criterion's verdict on a certificate's constants, with the largest eps that fits its ball."""
    if not verdict:
        return None
    eps = (1 - 4 * _q(verdict)) / 2
    for k in range(8):
        if eps <= 0:
            return None
        ball = verdict.certificate.claims["ball"]
        found = check_local_pl_jacobian(*verdict.measurements, ball=ball, epsilon=eps / 2**k)
        if found:
            return found
    return None


# ----------------------------------------------------------------------------------------------------------- the judge


def judge(results: Results) -> list[Finding]:
    """Decide each part of the claim by the rule of the tolerance."""
    found: list[Finding] = []
    for e in results.experiments:
        arms = [
            arm for line in results.lines if line["experiment"] == e.name for arm in line["arms"].items()
        ]  # fmt: skip
        if e.setting["kind"] == "positive":
            started = [arm for name, arm in arms if name.startswith(POSITIVE + ",")]
            proved = sum(arm["criterion"] == "proved" for arm in started)
            what = "the criterion holds before the first step"
            found.append(_finding(f"{e.name}: {what}", proved, len(started), "proved in"))
            held = [arm for arm in started if "broken" in arm]
        else:
            held = [arm for _, arm in arms if arm["held"] == "yes"]
        if held:
            good = sum(arm["broken"] == 0 for arm in held)
            found.append(_finding(f"{e.name}: rate and radius are kept", good, len(held), "at every step of"))
    return found


def _finding(what: str, good: int, all_: int, said: str) -> Finding:
    return Finding(what, "reproduced" if good == all_ else "not reproduced", f"{said} {good} of {all_} runs")


# --------------------------------------------------------------------------------------------------------- the figures


def _paint(figure: Figure, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    _paint_first(left, results)
    _paint_speed(right, results)


def _paint_first(axes: Axes, results: Results) -> None:
    names = [e.name for e in results.experiments if e.setting["kind"] == "along training"]
    for name in names[:1]:
        arms = results.arms(name)
        for k, (measure, label) in enumerate((("path length: orders", "path length"), ("orders", "Chatterjee"))):
            for at, arm in enumerate(arms):
                values = list(results.by_seed(name, arm, measure).values())
                axes.plot(
                    values, [at + 0.15 * (2 * k - 1)] * len(values), "o", color=COLOURS[1 - k], alpha=0.6,
                    markersize=5, markeredgewidth=0, label=label if at == 0 else None,
                )  # fmt: skip
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_title(name)
    axes.set_xlabel("orders of magnitude that the loss has fallen")
    axes.grid(axis="x")
    if names:
        axes.legend(title="first proof by", fontsize=9)


def _paint_speed(axes: Axes, results: Results) -> None:
    labels: list[str] = []
    for e in results.experiments:
        for part in e.parts if e.setting["kind"] == "positive" else ():
            at = len(labels)
            labels.append(f"{e.name}\n{part}")
            for colour, kind in zip(COLOURS, (POSITIVE, POSITIVE_BEST, USUAL_BEST)):
                values = list(results.by_seed(e.name, f"{kind}, {part}", "steps").values())
                axes.plot(
                    values, [at] * len(values), "o", color=colour, alpha=0.6, markersize=5.5, markeredgewidth=0,
                    label=kind if at == 0 else None,
                )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("steps to a tenth of the loss (certified step: guaranteed)", color=MUTED)
    axes.grid(axis="x")
    axes.legend(fontsize=9)


# ------------------------------------------------------------------------------------------------------------ settings

FASHION = {"data": "zalando-datasets/fashion_mnist", "local": ("fashion_mnist",)}
_START: dict[str, Any] = {"kind": "positive", "after": 500, "cap": 4000}
_TRAIN: dict[str, Any] = {"kind": "along training", "rows": 20, "after": 300, "cap": 10_000}
SMALL = (
    Experiment("fashion-20", **FASHION, options={"limit": 500}, setting={**_START, "rows": 20}, parts=("16", "16-16")),
    Experiment("digits-40", "digits", options={"limit": 500}, setting={**_START, "rows": 40}, parts=("16", "16-16")),
    Experiment(
        "digits-20-training", "digits", options={"limit": 500}, setting=_TRAIN,
        parts=("tanh 64", "tanh 256", "tanh 64-64", "tanh 64-64-64", "softplus 64", "relu 64"),
    ),
)  # fmt: skip
_NETS = ("64", "64-64", "64-64-64")
FULL = (
    Experiment("fashion-500", **FASHION, setting={**_START, "rows": 500, "cap": 100_000}, parts=_NETS),
    Experiment("digits-65", "digits", setting={**_START, "rows": 65, "cap": 100_000}, parts=_NETS),
    Experiment(
        "digits-500-training", "digits", setting={**_TRAIN, "rows": 500, "cap": 1_000_000},
        parts=(
            "tanh 1024", "tanh 4096", "tanh 1024-1024", "tanh 1024-1024-1024", "softplus 1024", "gelu 1024",
            "relu 1024",
        ),
    ),
)  # fmt: skip

RECIPE = Recipe(
    name="chatterjee",
    paper="S. Chatterjee: Convergence of gradient descent for deep neural networks, arXiv 2203.16462",
    claim="If 4 f < R^2 alpha at the weights, alpha the least ||grad f||^2/f within R, gradient descent goes to loss 0 "
    "within R at an exponential rate; and where the inputs' dimension is at least the number of samples this can be "
    "had before the first step, by first weights 0, positive hidden weights and large output weights.",
    scaled="20 images of Fashion-MNIST and 40 digits, one output, one or two hidden layers of 16 units of tanh; along "
    "training 20 digits and 64 to 256 units. Five seeds take some minutes of one core.",
    tolerance="Positive initialisation: the criterion is PROVED before the first step, for every network and seed, and "
    "in 500 steps of the longest certified size no step loses less of f than is guaranteed and none is further away "
    "than the radius. Along training from a usual initialisation: from the first attempt at which the criterion is "
    "PROVED the same holds for 300 steps, in every run in which it comes to that. When it first holds, and how fast "
    "the positive initialisation is beside a usual one, is shown and not judged: no number of the paper on that could "
    "be read.",
    settings=(
        Setting("positive initialisation", "W_1 = 0, hidden entries t, outputs A, biases 0", "the paper, abstract"),
        Setting("t, A, R", "the least A on a grid, eps = 1/2", "surefoot, Prop. 11"),
        Setting("constants", "proved, rounding included; steps by operator norms", "surefoot, Prop. 1"),
        Setting("targets", "1 for the lower half of the classes, -1 for the upper: one output", "ours"),
        Setting("inputs", "standardised; from the positive initialisation also divided by sqrt(d)", "ours"),
        Setting(
            "rows", "20 of 784 numbers, 40 of 64, drawn by the seed", "the paper: at most the dimension; number ours",
            full="500 of 784, 65 of 64",
        ),
        Setting("networks", "hidden 16 and 16-16", "ours", full="64, 64-64, 64-64-64"),
        Setting(
            "best step", "of 1/2, 1 and 2 over the sharpness at the start, to a tenth of the loss of F = 0, 4,000 "
            "steps at most", "ours", full="100,000 steps at most",
        ),
        Setting(
            "along training", "PyTorch's initial weights, full batches, step 1/lambda_max(K) on 1/2 ||F - y||^2, "
            "halved when that rises, 10,000 steps at most, an attempt each 1.2 times the one before", "ours",
            full="500 digits, 1,000,000 steps at most",
        ),
    ),
    experiments=SMALL,
    full=FULL,
    run=run,
    judge=judge,
    tables=(
        Table(
            "The positive initialisation",
            (
                Column("criterion", "criterion"),
                Column("A", "A", ".3g"),
                Column("radius", "radius", ".2g"),
                Column("step", "longest step", ".2e"),
                Column("drop", "guaranteed drop", ".1e"),
                Column("rate / guaranteed", "rate / guaranteed", ".3g"),
                Column("ratio / alpha", "least ratio met / alpha", ".3g"),
                Column("distance / radius", "distance / radius", ".2g"),
                Column("broken", "steps broken", ".0f"),
                Column("steps", "guaranteed steps to a tenth", ".2e"),
            ),
            tuple(f"{POSITIVE}, {part}" for part in ("16", "16-16", *_NETS)),
        ),
        Table(
            "Steps to a tenth of the loss, each with its best step",
            (
                Column("steps", "steps", ",.0f"),
                Column("rate over sharpness", "step x sharpness at the start", ".2g"),
                Column("step", "step", ".2e"),
            ),
            tuple(f"{kind}, {part}" for part in ("16", "16-16", *_NETS) for kind in (POSITIVE_BEST, USUAL_BEST)),
        ),
        Table(
            "When it first holds, from a usual initialisation",
            (
                Column("q at first", "q at the initialisation", ",.3g"),
                Column("path length: step", "path length holds after steps", ",.0f"),
                Column("path length: orders", "orders of the loss", ".2f"),
                Column("step", "Chatterjee holds after steps", ",.0f"),
                Column("orders", "orders of the loss ", ".2f"),
                Column("held", "came to it"),
                Column("rate / guaranteed", "rate / guaranteed", ".3g"),
                Column("ratio / alpha", "least ratio met / alpha", ".3g"),
                Column("broken", "steps broken", ".0f"),
            ),
            tuple(
                dict.fromkeys(part for e in (*SMALL, *FULL) if e.setting["kind"] != "positive" for part in e.parts)
            ),
        ),
    ),
    drawings=(
        Drawing(
            "chatterjee",
            "Left: how far the loss has fallen when the criterion first holds on the way from a usual initialisation, "
            "beside the path-length theorem on the same constants; a dot a seed. Right: steps to a tenth of the "
            "loss.",
            _paint,
            (11.0, 4.6),
        ),
    ),
)  # fmt: skip
