"""How far from a usual initialisation is the first proof, and what is it worth?

Letters: F the outputs at all training rows, E = 1/2 ||F - y||^2, rho = ||F - y||, K the tangent Gram,
q = beta rho/s_0^2 the Kantorovich number, below 1/2 of which a certificate is to be had, S its radius. Steps h are on
E.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surefoot.certificates import Certificate, certify
from surefoot.certificates.polish import polish
from surefoot.data import Dataset
from surefoot.measure import tangent_gram
from surefoot.models import build
from surefoot.optim import DeltaGClip
from surefoot.reproduce.figures import COLOURS, INK, MUTED
from surefoot.reproduce.recipe import Arms, Column, Drawing, Experiment, Finding, Job, Outcome, Recipe, Setting, Table
from surefoot.reproduce.results import Results
from surefoot.theorems.verdict import Verdict
from surefoot.train.certified_steps import CertifiedSteps, Step, Violation
from surefoot.train.job import seed_everything

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAMMA, DELTA = 1.0, 0.1  # of delta-GClip, on the gradient of E
GROWTH = 1.15  # from one attempt to the next
LIMIT = 0.5  # of q


def run(job: Job) -> Arms:
    """Train with delta-GClip until a certificate fires, then go on by its rule and hold every step against it."""
    s = job.experiment.setting
    x, y = rows(job.data, s["rows"], job.seed)
    seed_everything(job.seed)
    model = network(job.data, [int(m) for m in job.part.split("-")])
    top = float(torch.linalg.eigvalsh(tangent_gram(model, x))[-1])
    optimizer = DeltaGClip(model.parameters(), 1 / top, gamma=GAMMA, delta=DELTA)
    curve: dict[str, list[float]] = {"steps": [], "q": [], "loss left": []}
    first, due, spent = residual(model, x, y), 0, 0.0
    began = time.process_time()
    verdict = None
    for t in range(s["cap"] + 1):
        if t == due:
            due = max(t + 1, int(t * GROWTH))
            at = time.process_time()
            verdict = certify(model, x, y, source=f"{job.experiment.name}, {job.part}, seed {job.seed}")
            spent += time.process_time() - at
            curve["steps"].append(t)
            curve["q"].append(_q(verdict))
            curve["loss left"].append((residual(model, x, y) / first) ** 2)
            if verdict:
                break
            job.progress(f"step {t:,}, q = {curve['q'][-1]:.3g}")
        step(model, optimizer, x, y)
    assert verdict is not None
    told = optimizer.telemetry()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "q at first": curve["q"][0],
        "fired": "yes" if verdict else "no",
        "clipped": told["clip_fraction"],
        "training seconds": time.process_time() - began - spent,
        "attempts": len(curve["q"]),
        "attempt seconds": spent / len(curve["q"]),
        **{f"curve of {name}": values for name, values in curve.items()},
    }
    if verdict:
        left = curve["loss left"][-1]
        found |= {
            "step": curve["steps"][-1],
            "residual": verdict.certificate.claims["residual"],
            "loss left": left,
            "orders": -math.log10(left) if left > 0 else None,
            **_worth(model, x, y, verdict.certificate, s["after"]),
        }
    return {job.part: found}


def rows(data: Dataset | None, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of `count` training rows drawn by a seed, float64; classes as one-hot rows."""
    assert data is not None
    picked = np.sort(np.random.default_rng(seed).permutation(len(data.train_x))[:count])
    x, y = data.train_x[picked].double(), data.train_y[picked]
    return x, y.double() if data.task == "regression" else F.one_hot(y, data.outputs).double()


def network(data: Dataset | None, width: list[int], activation: str = "tanh") -> nn.Module:
    """Return a float64 network with PyTorch's initial weights."""
    assert data is not None
    return build(
        "mlp", kind=data.kind, task=data.task, input_shape=data.input_shape, outputs=data.outputs, width=tuple(width),
        activation=activation,
    ).double()  # fmt: skip


@torch.no_grad()
def residual(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return ||F - y||."""
    return float((model(x) - y).norm())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Take a step on E."""
    optimizer.zero_grad()
    (0.5 * (model(x) - y).square().sum()).backward()
    optimizer.step()


def _q(verdict: Verdict) -> float:
    """Return q by the constants of an attempt, beta on the ball that it came to (the weights alone, if none)."""
    rho, s0, beta, _ = (float(m) for m in verdict.measurements)
    return beta * rho / s0**2 if s0 > 0 else math.inf


def _worth(model: nn.Module, x: Tensor, y: Tensor, certificate: Certificate, after: int) -> dict[str, Any]:
    """Return what a certificate's promises come to: how near the minimum is, and how the certified steps go."""
    c = certificate.claims
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    norm = math.hypot(*[float(p.norm()) for p in start])
    rho = residual(model, x, y)
    top = float(torch.linalg.eigvalsh(tangent_gram(model, x))[-1])
    held = CertifiedSteps(c, rho, weights=norm, targets=float(y.norm()))
    optimizer = DeltaGClip(params, c["eta_max"], gamma=GAMMA, delta=DELTA)
    guaranteed, kept = 0.0, "yes"
    for _ in range(after):
        before = [p.detach().clone() for p in params]
        step(model, optimizer, x, y)
        h = c["eta_max"] * optimizer.telemetry()["scale"]
        try:
            held.take(Step(h, residual(model, x, y), _distance(params, before), _distance(params, start)))
        except Violation as error:
            kept = str(error)
            break
        guaranteed -= math.log1p(-(1 - c["epsilon"]) * h * c["sigma_star"] ** 2)
    found = {
        "radius": c["radius"],
        "kept": kept,
        "rate / guaranteed": math.log(rho / held.residual) / guaranteed if guaranteed else None,
        "longest step / 2/lambda_max": c["eta_max"] * top / 2,
        "path / radius": held.path / c["radius"],
    }
    with torch.no_grad():
        for p, q in zip(params, start):
            p.copy_(q)
    at = time.process_time()
    found["checker"], size = _checked(certificate)
    moved = polish(model, x, y, tolerance=1e-9 * rho)
    found |= {
        "minimum / radius": moved.distance / c["radius"],
        "radius / weights": c["radius"] / norm,
        "certificate bytes": size,
        "check seconds": time.process_time() - at,
    }
    return found


def _distance(params: list[nn.Parameter], start: list[Tensor]) -> float:
    return math.hypot(*[float((p.detach() - q).norm()) for p, q in zip(params, start)])


def _checked(certificate: Certificate) -> tuple[str, int]:
    """Return whether the independent checker, in a process of its own, accepts a certificate, and the file's size."""
    with tempfile.TemporaryDirectory() as folder:
        where = certificate.save(Path(folder) / "certificate")
        size = sum(f.stat().st_size for f in Path(where).rglob("*") if f.is_file())
        command = [sys.executable, "-m", "surefoot.check", str(where)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return ("yes" if done.returncode == 0 else "no"), size


# ----------------------------------------------------------------------------------------------------------- the judge


def judge(results: Results) -> list[Finding]:
    """Decide each part of the claim by the rule of the tolerance."""
    found: list[Finding] = []
    for e in results.experiments:
        arms = [arm["q at first"] for line in _lines(results, e.name) for arm in line.values()]
        fired = [arm["fired"] for line in _lines(results, e.name) for arm in line.values()]
        low = min(_number(q) for q in arms)
        yes = fired.count("yes")
        found += [
            _finding(f"{e.name}: none at the initialisation", low >= LIMIT, f"q is {low:.3g} at least, of {len(arms)}"),
            _finding(f"{e.name}: training comes to one", yes == len(fired), f"{yes} of {len(fired)} runs"),
        ]
        held = [arm for line in _lines(results, e.name) for arm in line.values() if arm["fired"] == "yes"]
        good = sum(arm["kept"] == arm["checker"] == "yes" for arm in held)
        found.append(
            _finding(f"{e.name}: promises kept, the checker accepts", good == len(held), f"{good} of {len(held)}")
        )
        for what, arm, base, sign in e.setting["compare"]:
            d = results.difference(e.name, arm, base, "orders")
            if d is None:
                continue
            said = f"{d.mean:+.2f} orders of magnitude of the loss, {arm} beside {base}"
            if d.error is None:
                found.append(
                    Finding(f"{e.name}: {what}", "not testable here", f"{said}; one seed has no standard error")
                )
            else:
                fits = sign * d.mean > 2 * d.error
                found.append(_finding(f"{e.name}: {what}", fits, f"{said}, standard error {d.error:.2g}, {d.n} seeds"))
    return found


def _finding(what: str, fits: bool, reason: str) -> Finding:
    outcome: Outcome = "reproduced" if fits else "not reproduced"
    return Finding(what, outcome, reason)


def _lines(results: Results, name: str) -> list[Any]:
    return [line["arms"] for line in results.lines if line["experiment"] == name]


def _number(value: Any) -> float:
    return float(value)  # "inf" is a word in runs.jsonl


def _paint(figure: Figure, results: Results) -> None:
    axes = figure.subplots()
    name = results.experiments[0].name
    axes.axhspan(1e-3, LIMIT, color=COLOURS[2], alpha=0.13, linewidth=0)
    colours = dict(zip(results.arms(name), COLOURS))
    farthest = sorted(colours, key=lambda arm: -max(map(_number, results.by_seed(name, arm, "q at first").values())))
    for arm in farthest:
        colour = colours[arm]
        for line in _lines(results, name):
            if arm not in line:
                continue
            left = line[arm]["curve of loss left"]
            q = [_number(v) for v in line[arm]["curve of q"]]
            label = arm if arm not in axes.get_legend_handles_labels()[1] else None
            axes.plot(left, q, color=colour, alpha=0.55, linewidth=1.3, label=label)
            if line[arm]["fired"] == "yes":
                axes.plot(left[-1], q[-1], "o", color=colour, markersize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.08)
    axes.invert_xaxis()
    axes.axhline(LIMIT, color=MUTED, linewidth=1)
    axes.text(1.5, 0.2, "proved: an exact global minimum\nlies within the radius", color=INK, va="center", size=11)
    axes.set_xlabel("part of the initial training loss that is left")
    axes.set_ylabel("q, which has to be below 1/2")
    axes.grid()
    axes.legend(title="hidden widths", loc="upper right")


# ------------------------------------------------------------------------------------------------------------ settings

_CLASSES: dict[str, Any] = {"rows": 20, "cap": 30_000, "after": 500}
SMALL = (
    Experiment(
        "digits-20", "digits", options={"limit": 500},
        setting={
            **_CLASSES,
            "compare": [["wider needs less training", "1024", "64", -1], ["deeper needs more", "64-64-64", "64", 1]],
        },
        parts=("64", "256", "1024", "64-64", "256-256", "64-64-64"),
    ),
    Experiment(
        "fashion-20", "zalando-datasets/fashion_mnist", ("fashion_mnist",), {"limit": 500},
        {**_CLASSES, "compare": [["wider needs less training", "256", "64", -1]]}, ("64", "256", "64-64"),
    ),
    Experiment(
        "energy-40", "", ("uci/energy.csv",), {"target": "y"},
        {**_CLASSES, "rows": 40, "compare": []}, ("64",),
    ),
)  # fmt: skip
_LARGE: dict[str, Any] = {"rows": 300, "cap": 1_000_000, "after": 1000}
FULL = (
    Experiment(
        "digits-300", "digits",
        setting={
            **_LARGE,
            "compare": [
                ["wider needs less training", "4096", "512", -1], ["deeper needs more", "512-512-512", "512", 1]
            ],
        },
        parts=("512", "1024", "4096", "512-512", "1024-1024", "512-512-512"),
    ),
    Experiment(
        "fashion-300", "zalando-datasets/fashion_mnist", ("fashion_mnist",), {},
        {**_LARGE, "compare": [["wider needs less training", "4096", "512", -1]]}, ("512", "4096", "512-512"),
    ),
)  # fmt: skip

RECIPE = Recipe(
    name="first-certificate",
    paper="none: a question of our own, about the path-length theorem (docs/theorems/path-length.md)",
    claim="At the usual initialisation of a network of moderate width nothing can be proved; full-batch delta-GClip "
    "training, without any polishing, comes to a point where it can, earlier in a wider network and later in a deeper "
    "one; and what the first certificate promises is kept.",
    scaled="20 images of ten classes or 40 rows of a table, one to three hidden layers of 64 to 1,024 units of tanh; "
    "five seeds take about ten minutes of one core. The full size has 300 images: a Gram of 3,000 rows an attempt.",
    tolerance="At step 0 no run has q below 1/2. Within 30,000 steps (full size: 1,000,000) every run has a "
    "certificate. For every certificate the independent checker, in a process of its own, accepts it, and 500 further "
    "delta-GClip steps of the longest certified size (full size: 1,000) keep the rate, the path and the radius, each "
    "step. Wider: the orders of magnitude that the loss has fallen at the first certificate are fewer, by more than "
    "two standard errors of the difference paired by seed, for 1,024 units than for 64 (fashion: 256; full size: 4,096 "
    "than for 512); deeper: more, for three layers than for one.",
    settings=(
        Setting("loss", "1/2 ||F - y||^2 over all rows, one-hot classes, full batches, float64", "what is certified"),
        Setting("optimizer", "delta-GClip, gamma 1, delta 0.1", "ours"),
        Setting("step", "1/lambda_max(K) at the initialisation, half of what is stable there", "ours"),
        Setting("networks", "MLPs of tanh, PyTorch's initial weights, all layers trained", "ours"),
        Setting("attempts", "after step 0, 1, 2, ... each 1.15 times the one before", "ours"),
        Setting("steps", "30,000 at most", "ours: the budget", full="1,000,000 at most"),
        Setting("rows", "drawn by the seed: 20 images, 40 rows of energy", "ours: the budget", full="300 images"),
        Setting("inputs", "standardised as surefoot train does", "surefoot.data"),
        Setting(
            "nearest minimum", "Gauss-Newton from the certified weights, the distance it goes",
            "ours: an upper estimate of the true distance",
        ),
    ),
    experiments=SMALL,
    full=FULL,
    run=run,
    judge=judge,
    tables=(
        Table(
            "How far the first certificate is",
            (
                Column("q at first", "q at the initialisation", ",.3g"),
                Column("step", "first certificate after steps", ",.0f"),
                Column("residual", "residual there", ".2g"),
                Column("orders", "orders of magnitude the loss has fallen", ".2f"),
                Column("clipped", "steps clipped", ".1%"),
                Column("fired", "fired"),
            ),
        ),
        Table(
            "What it is worth",
            (
                Column("radius", "radius S", ".2g"),
                Column("radius / weights", "S / norm of the weights", ".1e"),
                Column("minimum / radius", "nearest minimum found / S", ".2f"),
                Column("path / radius", "path of 500 steps / S", ".2f"),
                Column("rate / guaranteed", "rate / guaranteed rate", ".3g"),
                Column("longest step / 2/lambda_max", "longest step / what is stable", ".3f"),
                Column("kept", "promises kept"),
                Column("checker", "checker accepts"),
            ),
        ),
        Table(
            "What it costs",
            (
                Column("parameters", "parameters", ",.0f"),
                Column("training seconds", "training, s", ".2f"),
                Column("attempts", "attempts", ",.0f"),
                Column("attempt seconds", "an attempt, s", ".3f"),
                Column("certificate bytes", "certificate, bytes", ",.0f"),
            ),
        ),
    ),
    drawings=(
        Drawing(
            "first-certificate",
            "From a usual initialisation (left) to the first proof (dots), 20 digits of ten classes, five seeds: q "
            "falls with the training loss. In the green band an exact global minimum is proved to lie "
            "nearby. Two orders of magnitude of the loss buy one of q.",
            _paint,
            (8.0, 5.2),
        ),
    ),
)  # fmt: skip
