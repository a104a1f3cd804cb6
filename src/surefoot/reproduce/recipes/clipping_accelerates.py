"""Does smoothness grow with the gradient norm along training, and does clipping then beat constant steps?

Letters: n = ||grad f_B|| the gradient norm of a batch, Lhat the smoothness along a step as `SmoothnessProbe` sees it,
c the threshold of clipping, h = lr min{1, c/n} the step. ||Hess f|| <= L0 + L1 ||grad f|| is (L0, L1)-smoothness.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surefoot.data import Dataset
from surefoot.measure import sharpness
from surefoot.measure.curvature import hessian_product
from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import FEWEST, Array, SmoothnessFit
from surefoot.models import build
from surefoot.optim import GClip
from surefoot.reproduce.figures import COLOURS, MUTED
from surefoot.reproduce.recipe import Arms, Column, Drawing, Experiment, Finding, Job, Outcome, Recipe, Setting, Table
from surefoot.reproduce.results import Results, Summary, summary
from surefoot.theorems.clipped_descent import StepRule, clipped_descent, conservative_rule, default_rule
from surefoot.train.batches import batch_rows
from surefoot.train.job import seed_everything
from surefoot.train.objective import Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLIPPED, PLAIN, SMALL_LR = "clipped, large lr", "plain, large lr", "plain, small lr"
NOISE = 0.15  # a standard error of a correlation or a slope above this decides nothing
EPSILON = 0.01  # a gradient of this norm is a stationary point of the counter-examples
STARTS = 16  # points from which each step rule of the counter-examples is tried


def run(job: Job) -> Arms:
    """Do what the experiment's setting says."""
    return KINDS[job.experiment.setting["kind"]](job)


# ------------------------------------------------------------------------------------------------ along training


def _training(job: Job) -> Arms:
    """Train by one rule and probe the smoothness along its steps."""
    s, data = job.experiment.setting, job.data
    assert data is not None
    seed_everything(job.seed)
    model = _model(data, s).to(job.device)
    x, y = data.train_x.to(job.device), data.train_y.to(job.device)
    objective = Objective(data.task, "cross-entropy", data.outputs)
    lr, c = s["rules"][job.part]
    optimizer = _optimizer(model, lr, c)
    probe = SmoothnessProbe(model, every=s["every"], points=s["points"])
    losses: list[float] = []
    for t in range(s["steps"]):
        rows = batch_rows(t, len(x), s["batch"], job.seed)
        xs, ys = (x, y) if rows is None else (x[rows], y[rows])

        def loss_of_batch(xs: Tensor = xs, ys: Tensor = ys) -> Tensor:
            return objective.value(model(xs), xs, ys)

        optimizer.zero_grad()
        loss = loss_of_batch()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        probe.step(optimizer, loss_of_batch)
        job.progress(f"step {t + 1:,} of {s['steps']:,}")
    held_out = slice(s["test_rows"])
    test = objective.evaluate(
        model, data.test_x[held_out], data.test_y[held_out], rows=128, device=torch.device(job.device)
    )
    last = losses[-20:]
    found = {
        "train loss": math.fsum(last) / len(last) if math.isfinite(losses[-1]) else None,
        "test loss": test["test_loss"] if math.isfinite(test["test_loss"]) else None,
        "ended": "all steps" if len(losses) == s["steps"] and math.isfinite(losses[-1]) else "diverged",
        **_fitted(probe),
    }
    return {job.part: found}


def _fitted(probe: SmoothnessProbe) -> dict[str, Any]:
    """Return what the probe's observations come to; only their number where there are too few for a line."""
    used = [o for o in probe.observations if o.outcome == "measured"]
    found: dict[str, Any] = {"observations": len(used)}
    if len(used) >= FEWEST:
        fit = probe.fit()
        found |= _numbers(fit) | {"norms": [o.grad_norm for o in used], "smoothness": [o.smoothness for o in used]}
    return found


def _numbers(fit: SmoothnessFit) -> dict[str, Any]:
    low, high = fit.L1.details["interval"]
    found = {
        "spearman": fit.spearman.value,
        "spearman low": fit.spearman.low,
        "spearman high": fit.spearman.high,
        "slope": fit.slope.value,
        "slope low": fit.slope.low,
        "slope high": fit.slope.high,
        "L0": fit.L0.value,
        "L1": fit.L1.value,
        "L1 low": low,
        "L1 high": high,
        "decades": fit.decades,
    }
    return {k: v for k, v in found.items() if math.isfinite(v)} | {"decision": fit.decision}


def _model(data: Dataset, s: Any) -> nn.Module:
    options = {name: s[name] for name in ("depth", "activation") if name in s}
    return build(
        s["model"], kind=data.kind, task=data.task, input_shape=data.input_shape, outputs=data.outputs,
        vocabulary_size=data.outputs if data.kind == "text" else None, width=tuple(s["width"]), **options,
    )  # fmt: skip


def _optimizer(model: nn.Module, lr: float, c: float | None) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr) if c is None else GClip(model.parameters(), lr, gamma=c)


# --------------------------------------------------------------------------------------- functions with known constants


class Example(NamedTuple):
    """A function of one variable with its infimum at 0, and constants (L0, L1) that hold everywhere."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    curvature: Callable[[Array], Array]
    L0: float
    L1: float


EXAMPLES = {
    "x^4": Example(lambda x: x**4, lambda x: 4 * x**3, lambda x: 12 * x**2, 4.0, 3.0),
    "cosh x": Example(lambda x: np.cosh(x) - 1, np.sinh, np.cosh, 1.0, 1.0),  # cosh <= 1 + |sinh|
}


def _examples(job: Job) -> Arms:
    """Count steps to a stationary point from the worst of some starts, of clipped and of constant steps."""
    s = job.experiment.setting
    f = EXAMPLES[s["function"]]
    arms: dict[str, dict[str, Any]] = {}
    for far in s["starts"]:
        draws = np.random.default_rng((job.seed, int(far))).uniform(-far, far, STARTS)
        starts = np.append(draws[1:], far)
        end = np.array([float(far)])
        rule = default_rule(f.L0, f.L1)
        bound = clipped_descent(
            f.L0, f.L1, float(f.value(end)[0]), lr=rule.lr, threshold=rule.threshold, epsilon=EPSILON,
            gradient=float(f.slope(end)[0]),
        )  # fmt: skip
        assert bound is not None
        clipped = _clipped_steps(f, starts, rule, s["cap"])
        constant = _best_constant(f, starts, far, s["cap"])
        arms[f"start within {far:g}"] = {
            "clipped": clipped,
            "published": _clipped_steps(f, starts, conservative_rule(f.L0, f.L1), s["cap"]),
            "constant": constant,
            "ratio": constant / clipped,
            "bound": bound.steps,
            "constant bound": bound.steps_plain,
        }
        job.progress(f"starts within {far:g}")
    return arms


def _clipped_steps(f: Example, starts: Array, rule: StepRule, cap: int) -> int:
    """Return the steps after which a gradient of EPSILON has been met from every start, `cap` at most."""
    x, open_ = starts.copy(), np.ones(len(starts), bool)
    for t in range(cap):
        g = f.slope(x)
        n = np.abs(g)
        open_ &= n > EPSILON
        if not open_.any():
            return t
        x -= rule.lr * np.minimum(1.0, rule.threshold / np.maximum(n, 1e-300)) * g
    return cap


def _best_constant(f: Example, starts: Array, far: float, cap: int) -> int:
    """Return the same for the best constant step of a grid around 2/f''(far), which all starts share."""
    h = 4 / f.curvature(np.array([float(far)])) * 2 ** (-np.arange(12) / 2)
    x, open_ = np.repeat(starts[None], len(h), 0), np.ones((len(h), len(starts)), bool)
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(cap):
            g = f.slope(x)
            open_ &= ~(np.abs(g) <= EPSILON)  # a NaN stays open
            if not open_.any(1).all():
                return t
            x -= h[:, None] * g
    return cap


# --------------------------------------------------------------------------------------------- a network, badly begun


def _race(job: Job) -> Arms:
    """Count full-batch steps to a small loss from initialisations that are too large, the best rate of each rule."""
    s, data = job.experiment.setting, job.data
    assert data is not None
    arms: dict[str, dict[str, Any]] = {}
    for scale in s["scales"]:
        seed_everything(job.seed)
        model = _model(data, s).to(job.device)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
        counted = {
            name: [(_steps_to(model, data, lr, c, s, job), lr, c) for lr, c in rules]
            for name, rules in (("constant", s["constant"]), ("clipped", s["clipped"]))
        }
        best = {name: min(found, key=lambda one: one[0]) for name, found in counted.items()}
        arms[f"scale {scale:g}"] = {
            "constant": best["constant"][0],
            "clipped": best["clipped"][0],
            "log ratio": math.log(best["constant"][0] / best["clipped"][0]),
            "constant lr": best["constant"][1],
            "clipped lr": best["clipped"][1],
            "threshold": best["clipped"][2],
            "constant rates that came there": sum(n < s["cap"] for n, _, _ in counted["constant"]) / len(s["constant"]),
            "clipped rates that came there": sum(n < s["cap"] for n, _, _ in counted["clipped"]) / len(s["clipped"]),
        }
    return arms


def _steps_to(start: nn.Module, data: Dataset, lr: float, c: float | None, s: Any, job: Job) -> int:
    model = copy.deepcopy(start)
    optimizer = _optimizer(model, lr, c)
    x, y = data.train_x.to(job.device), data.train_y.to(job.device)
    for t in range(s["cap"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        value = float(loss.detach())
        if value <= s["target"]:
            return max(t, 1)
        if not math.isfinite(value):
            break
        loss.backward()
        optimizer.step()
        job.progress(f"lr {lr:g}, step {t + 1:,}")
    return s["cap"]


# ------------------------------------------------------------------------------------- the estimator against the truth


def _estimator(job: Job) -> Arms:
    """Train a small network and hold Lhat against the Hessian's largest eigenvalue and its product with the step."""
    s, data = job.experiment.setting, job.data
    assert data is not None
    x, y = data.train_x.double(), data.train_y
    arms: dict[str, dict[str, Any]] = {}
    for name, (lr, c) in s["rules"].items():
        seed_everything(job.seed)
        model = _model(data, s).double()
        params = list(model.parameters())
        optimizer = _optimizer(model, lr, c)
        probe = SmoothnessProbe(model, every=s["every"])
        norms: list[float] = []
        along: list[float] = []

        def loss_fn(model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model(x), y)

        for t in range(1, s["steps"] + 1):
            optimizer.zero_grad()
            loss_fn().backward()
            if not probe.due(t):
                optimizer.step()
                probe.steps += 1
                continue
            both = sharpness(model, F.cross_entropy, (x, y), which="both ends", seed=job.seed)
            norms.append(max(abs(v) for v in both.details["eigenvalues"]))
            twin = copy.deepcopy(model)  # the graph of H does not outlive a step of the weights themselves
            H = hessian_product(F.cross_entropy(twin(x), y), list(twin.parameters()))
            start = [p.detach().clone() for p in params]
            probe.step(optimizer, loss_fn)
            d = [p.detach() - q for p, q in zip(params, start)]
            along.append(_norm(H(d)) / _norm(d))
            job.progress(f"{name}: step {t:,} of {s['steps']:,}")
        seen = np.array([o.smoothness for o in probe.observations])
        n, true, line = np.array([o.grad_norm for o in probe.observations]), np.array(norms), np.array(along)
        arms[name] = {
            "Lhat and Hessian": _rank_correlation(seen, true),
            "Lhat and line": _rank_correlation(seen, line),
            "n and Hessian": _rank_correlation(n, true),
            "n and Lhat": _rank_correlation(n, seen),
            "Lhat / Hessian": float(np.median(seen / true)),
            "least Lhat / Hessian": float((seen / true).min()),
            "greatest Lhat / Hessian": float((seen / true).max()),
            "Lhat / line": float(np.median(seen / line)),
            "observations": len(seen),
            "norms": n.tolist(),
            "smoothness": seen.tolist(),
            "hessian": norms,
        }
    return arms


def _norm(tensors: Any) -> float:
    return math.hypot(*[float(torch.linalg.vector_norm(t.detach())) for t in tensors])


def _rank_correlation(a: Array, b: Array) -> float:
    """Return Spearman's coefficient; ties do not come up in what is measured here."""
    left, right = (np.argsort(np.argsort(v)).astype(np.float64) for v in (a, b))
    return float(np.corrcoef(left, right)[0, 1])


KINDS: dict[str, Callable[[Job], Arms]] = {
    "training": _training,
    "examples": _examples,
    "race": _race,
    "estimator": _estimator,
}


# ----------------------------------------------------------------------------------------------------------- the judge


def judge(results: Results) -> list[Finding]:
    """Decide each part of the claim by the rule of the tolerance."""
    found: list[Finding] = []
    for e in results.experiments:
        found += JUDGES[e.setting["kind"]](results, e)
    return found


def _above_zero(what: str, found: Summary | None, said: str, noise: float = math.inf) -> list[Finding]:
    """Return the finding that a mean lies above 0 by more than two standard errors; none without numbers."""
    if found is None:
        return []
    if found.error is None:
        return [Finding(what, "not testable here", f"{said} {found.mean:+.3g}; one seed has no standard error")]
    reason = f"{said} {found.mean:+.3g}, standard error {found.error:.2g}, {found.n} seeds"
    if found.error > noise:
        return [Finding(what, "not testable here", f"{reason}: too much noise between seeds")]
    outcome: Outcome = "reproduced" if found.mean > 2 * found.error else "not reproduced"
    return [Finding(what, outcome, reason)]


def _judge_training(results: Results, e: Experiment) -> list[Finding]:
    return [
        *_above_zero(
            f"{e.name}: smoothness grows with the gradient norm, {CLIPPED}",
            results.summary(e.name, CLIPPED, "spearman"), "Spearman", NOISE,
        ),
        *_above_zero(
            f"{e.name}: so does it in size, {CLIPPED}", results.summary(e.name, CLIPPED, "slope"),
            "log-log slope", NOISE,
        ),
        *_above_zero(
            f"{e.name}: more so than with a {SMALL_LR}",
            results.difference(e.name, CLIPPED, SMALL_LR, "spearman"), "difference of Spearman", NOISE,
        ),
    ]  # fmt: skip


def _judge_examples(results: Results, e: Experiment) -> list[Finding]:
    arms = results.arms(e.name)
    if not arms:
        return []
    by_start = {arm: results.by_seed(e.name, arm, "clipped") for arm in arms}
    worst = max(n / results.by_seed(e.name, arm, "bound")[seed] for arm in arms for seed, n in by_start[arm].items())
    near, far = (results.by_seed(e.name, arm, "ratio") for arm in (arms[0], arms[-1]))
    grows = all(far[seed] > max(1.0, near[seed]) for seed in far)
    return [
        Finding(
            f"{e.name}: clipped steps keep to their bound",
            "reproduced" if worst <= 1 else "not reproduced",
            f"at most {worst:.2g} of the bound",
        ),
        Finding(
            f"{e.name}: faster than the best constant step, the more so the worse the start",
            "reproduced" if grows else "not reproduced",
            f"{_range(near)} times as many steps, {arms[0]}; {_range(far)} times, {arms[-1]}",
        ),
    ]


def _range(by_seed: dict[int, float]) -> str:
    low, high = min(by_seed.values()), max(by_seed.values())
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _judge_race(results: Results, e: Experiment) -> list[Finding]:
    arms = results.arms(e.name)
    if not arms:
        return []
    what = f"{e.name}: clipping needs fewer steps from the worst initialisation"
    return _above_zero(what, results.summary(e.name, arms[-1], "log ratio"), "log of the ratio of steps")


def _judge_estimator(results: Results, e: Experiment) -> list[Finding]:
    each = [
        math.fsum(arm["Lhat and Hessian"] for arm in line["arms"].values()) / len(line["arms"])
        for line in results.lines
        if line["experiment"] == e.name
    ]
    return _above_zero(f"{e.name}: the estimator ranks steps as the Hessian's norm does", summary(each), "Spearman")


JUDGES: dict[str, Callable[[Results, Experiment], list[Finding]]] = {
    "training": _judge_training,
    "examples": _judge_examples,
    "race": _judge_race,
    "estimator": _judge_estimator,
}


# --------------------------------------------------------------------------------------------------------- the figures


def _of_kind(results: Results, kind: str) -> list[str]:
    return [e.name for e in results.experiments if e.setting["kind"] == kind]


def _first(results: Results, name: str, arm: str) -> dict[str, Any]:
    """Return an arm's numbers of the first seed."""
    return next((line["arms"][arm] for line in results.lines if line["experiment"] == name and arm in line["arms"]), {})


def _paint_smoothness(figure: Figure, results: Results) -> None:
    names = _of_kind(results, "training")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, max(1, len(names)))), names):
        for colour, arm in zip(COLOURS, (CLIPPED, SMALL_LR, PLAIN)):
            found = _first(results, name, arm)
            if "norms" in found:
                said = f"{arm}: slope {found['slope']:.2f}" if "slope" in found else arm
                axes.plot(
                    found["norms"], found["smoothness"], "o", color=colour, alpha=0.6, markersize=4,
                    markeredgewidth=0, label=said,
                )  # fmt: skip
        _log_log(axes, name, "gradient norm of the batch", "smoothness along the step")


def _paint_steps(figure: Figure, results: Results) -> None:
    examples, races = _of_kind(results, "examples"), _of_kind(results, "race")
    panels = np.atleast_1d(figure.subplots(1, max(1, len(examples) + len(races))))
    for axes, name in zip(panels, examples + races):
        arms = results.arms(name)
        at = [float(arm.rpartition(" ")[2]) for arm in arms]
        measures = [("constant", "best constant step"), ("clipped", "clipped")]
        measures += [("bound", "bound for clipped")] if name in examples else []
        for k, (measure, label) in enumerate(measures):
            means = [results.summary(name, arm, measure) for arm in arms]
            style = "--" if measure == "bound" else "o-"
            axes.plot(
                at, [math.nan if m is None else m.mean for m in means], style,
                color=MUTED if measure == "bound" else COLOURS[1 - k], label=label,
            )  # fmt: skip
        unit = "farthest start" if name in examples else "initial weights, times the usual"
        _log_log(axes, name, unit, "steps" if axes is panels[0] else "")
        axes.set_xticks(at, [f"{a:g}" for a in at])
        axes.set_xticks([], minor=True)


def _paint_estimator(figure: Figure, results: Results) -> None:
    for name in _of_kind(results, "estimator")[:1]:
        axes = figure.subplots()
        ends: list[float] = []
        for colour, arm in zip(COLOURS, results.arms(name)):
            found = _first(results, name, arm)
            axes.plot(
                found["hessian"], found["smoothness"], "o", color=colour, alpha=0.7, markersize=4.5,
                markeredgewidth=0, label=arm,
            )  # fmt: skip
            ends += found["hessian"]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=MUTED, linewidth=1, label="equal")
        _log_log(axes, "", "norm of the Hessian", "smoothness along the step")


def _log_log(axes: Axes, title: str, x: str, y: str) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if high < 300 * low:
            axis.set_major_locator(LogLocator(10, (1, 2, 5) if high > 8 * low else (1, 2, 3, 4, 5, 6, 8)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid()
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9)


# ------------------------------------------------------------------------------------------------------------ settings

POINTS3 = [1 / 3, 2 / 3, 1.0]
POINTS6 = [i / 6 for i in range(1, 7)]
_PARTS = (CLIPPED, PLAIN, SMALL_LR)
_LSTM: dict[str, Any] = {
    "kind": "training", "model": "lstm", "rules": {CLIPPED: [30, 0.25], PLAIN: [30, None], SMALL_LR: [1, None]},
    "points": POINTS6, "test_rows": 512,
}  # fmt: skip
_RESNET: dict[str, Any] = {
    "kind": "training", "model": "resnet20", "rules": {CLIPPED: [5, 0.2], PLAIN: [5, None], SMALL_LR: [0.1, None]},
    "points": POINTS3, "test_rows": 500,
}  # fmt: skip
_EXAMPLES = (
    Experiment("x^4", setting={"kind": "examples", "function": "x^4", "starts": [1, 10, 100], "cap": 300_000}),
    Experiment("cosh x", setting={"kind": "examples", "function": "cosh x", "starts": [2, 6, 12], "cap": 300_000}),
)
_RACE: dict[str, Any] = {
    "kind": "race", "model": "mlp", "width": [32], "activation": "tanh", "scales": [1, 4, 16], "target": 0.1,
    "constant": [[2.0**k, None] for k in range(-6, 4)],
    "clipped": [[2.0**k, c] for k in (-4, -2, 0, 2, 4) for c in (0.1, 1.0)], "cap": 400,
}  # fmt: skip
_DEEP: dict[str, Any] = {**_RACE, "width": [32] * 4, "activation": "relu", "scales": [1, 2, 4]}
_ESTIMATOR: dict[str, Any] = {
    "kind": "estimator", "model": "mlp", "width": [8], "activation": "tanh", "steps": 240, "every": 6,
    "rules": {"clipped": [4.0, 0.25], "plain": [0.5, None]},
}  # fmt: skip

SMALL = (
    Experiment(
        "lstm-shakespeare", "", ("text/tinyshakespeare.txt",), {"context": 32},
        {**_LSTM, "width": [64], "depth": 1, "batch": 16, "steps": 600, "every": 10}, _PARTS,
    ),
    Experiment(
        "resnet-cifar10", "uoft-cs/cifar10", ("cifar10", "cifar10_10k2k"), {"limit": 2000},
        {**_RESNET, "width": [4], "batch": 32, "steps": 240, "every": 6}, _PARTS,
    ),
    *_EXAMPLES,
    Experiment("digits-bad-start", "digits", options={"limit": 300}, setting=_RACE),
    Experiment("digits-deep-bad-start", "digits", options={"limit": 300}, setting=_DEEP),
    Experiment("digits-hessian", "digits", options={"limit": 100}, setting=_ESTIMATOR),
)  # fmt: skip
FULL = (
    Experiment(
        "lstm-wikitext", "", ("text/wikitext-2-train.txt",), {"context": 64},
        {**_LSTM, "width": [1150], "depth": 3, "batch": 80, "steps": 100_000, "every": 500}, _PARTS,
    ),
    Experiment(
        "resnet-cifar10", "uoft-cs/cifar10", ("cifar10",), {},
        {**_RESNET, "width": [16], "batch": 128, "steps": 78_000, "every": 390}, _PARTS,
    ),
    *_EXAMPLES,
    Experiment(
        "digits-bad-start", "digits", setting={**_RACE, "width": [256, 256], "scales": [1, 2, 4, 8, 16], "cap": 5000}
    ),
    Experiment("digits-deep-bad-start", "digits", setting={**_DEEP, "width": [256] * 4, "cap": 5000}),
    Experiment("digits-hessian", "digits", setting={**_ESTIMATOR, "width": [64], "steps": 2000, "every": 20}),
)  # fmt: skip

RECIPE = Recipe(
    name="clipping-accelerates",
    paper="J. Zhang, T. He, S. Sra, A. Jadbabaie: Why Gradient Clipping Accelerates Training: A Theoretical "
    "Justification for Adaptivity, ICLR 2020, arXiv 1905.11881",
    claim="Along training the smoothness of the loss grows with the gradient norm, in an LSTM language model and in a "
    "ResNet trained with clipping at a large learning rate; and where it does, clipped gradient descent comes to a "
    "stationary point faster than gradient descent with any constant step, the more so the worse the initialisation.",
    scaled="an LSTM of 64 features on characters of Shakespeare and a ResNet-20 of 4 channels on 2,000 images, some "
    "hundred steps each where the paper trains to the end; five seeds take about a quarter of an hour of one core. The "
    "functions with known constants are the same in both sizes.",
    tolerance="Training: over the seeds, the mean Spearman correlation of gradient norm and smoothness, with clipping "
    "at the large rate, is above 0 by more than two standard errors, and so is the mean log-log slope; the correlation "
    "is larger than with the small rate and no clipping, paired by seed, by more than two standard errors. Where a "
    "standard error is above 0.15 that part is not testable here. Functions with known constants: from the worst of 16 "
    "starts clipped descent needs no more steps than its bound, for every seed and distance; the best constant step of "
    "the grid needs more steps at the farthest distance, and by a larger factor than at the nearest, for every seed. "
    "Networks: from the largest initial weights the best of ten constant rates needs more steps than the best of ten "
    "clipped settings; the mean of the log of their ratio is above 0 by more than two standard errors. Estimator: the "
    "mean Spearman correlation, along a run, of the measured smoothness and the norm of the true Hessian is above 0 by "
    "more than two standard errors. The large rate without clipping is shown and not judged.",
    settings=(
        Setting("large rate", "LSTM 30, ResNet 5", "the paper: where its correlation is seen"),
        Setting(
            "threshold at the large rate",
            "LSTM 0.25, ResNet 0.2",
            "longest steps lr c = 7.5 and 1 as published by B. Zhang et al. 2020 (AWD-LSTM, ResNet-32)",
        ),
        Setting("small rate, no clipping", "LSTM 1, ResNet 0.1", "ours: constant steps that do not diverge"),
        Setting(
            "estimator",
            "max over points of a step, same batch and random numbers for both gradients; six points, ResNet three",
            "the paper: the maximum over a segment; the points are ours",
        ),
        Setting("fit", "0.9 quantile line, block bootstrap of 500, 95%", "ours: none are printed in the paper"),
        Setting("momentum, weight decay, dropout, augmentation", "none", "ours"),
        Setting(
            "LSTM",
            "1 layer of 64, windows of 32 characters, batch 16, 600 steps, each 10th probed",
            "ours: the budget",
            full="3 layers of 1,150, windows of 64 characters, batch 80, 100,000 steps, each 500th probed; the paper: "
            "AWD-LSTM",
        ),
        Setting(
            "ResNet-20",
            "4 channels, 2,000 images, batch 32, 240 steps, each 6th probed",
            "network: the paper; size ours",
            full="16 channels, batch 128, 78,000 steps (200 epochs), each 390th probed",
        ),
        Setting("constants of x^4 and cosh x", "(4, 3) and (1, 1), proved", "x^4: its curvature 12 x² <= 4 + 12|x|³"),
        Setting("clipped step there", "lr = 1/(2 L0), c = 2 L0/(3 L1)", "surefoot, Prop. 7"),
        Setting("published clipped step there", "lr = 1/(10 L0), c = min(10 L0, L0/L1)", "the paper, Theorem 3"),
        Setting("constant step there", "best of 12, factors of the root of 2 down from 4/f''(farthest)", "ours"),
        Setting("stationary", "gradient norm 0.01, 16 random starts that share the step", "ours"),
        Setting(
            "bad initialisation",
            "300 digits, 32 units of tanh, all weights times 1, 4, 16; four layers of 32 of relu, times 1, 2, 4; full "
            "batches to cross-entropy 0.1, 400 steps at most",
            "ours",
            full="all digits, 256-256 of tanh, times 1 to 16; four layers of 256 of relu; 5,000 steps at most",
        ),
        Setting("rates there", "constant 2^-6 to 2^3; clipped 2^-4 to 2^4 by 4, c 0.1 and 1", "ours: ten of each"),
        Setting(
            "estimator against the Hessian",
            "100 digits, 8 units of tanh, float64, full batches, 240 steps, each 6th",
            "ours",
            full="all digits, 64 units, 2,000 steps, each 20th",
        ),
    ),
    experiments=SMALL,
    full=FULL,
    run=run,
    judge=judge,
    tables=(
        Table(
            "Smoothness against gradient norm along training",
            (
                Column("spearman", "Spearman", ".2f"),
                Column("spearman low", "95% from", ".2f"),
                Column("spearman high", "to", ".2f"),
                Column("slope", "log-log slope", ".2f"),
                Column("slope low", "95% from", ".2f"),
                Column("slope high", "to", ".2f"),
                Column("decades", "decades of n", ".2f"),
                Column("decision", "decision"),
            ),
            _PARTS,
        ),
        Table(
            "The fitted line, and what training came to",
            (
                Column("L0", "L0", ".3g"),
                Column("L1", "L1", ".3g"),
                Column("L1 low", "95% from", ".3g"),
                Column("L1 high", "to", ".3g"),
                Column("train loss", "train loss, last 20", ".3g"),
                Column("test loss", "test loss", ".3g"),
                Column("ended", "ended"),
            ),
            _PARTS,
        ),
        Table(
            "Steps to a stationary point, worst of 16 starts",
            (
                Column("constant", "best constant step", ",.0f"),
                Column("clipped", "clipped", ",.0f"),
                Column("ratio", "ratio", ",.3g"),
                Column("published", "clipped, the paper's rule", ",.0f"),
                Column("bound", "bound, clipped", ",.3g"),
                Column("constant bound", "bound, constant", ",.3g"),
            ),
            tuple(f"start within {far:g}" for e in _EXAMPLES for far in e.setting["starts"]),
        ),
        Table(
            "Steps to a small loss from a bad initialisation",
            (
                Column("constant", "best constant rate", ",.0f"),
                Column("clipped", "best clipped", ",.0f"),
                Column("log ratio", "log of the ratio", ".2f"),
                Column("constant lr", "lr, constant", ".3g"),
                Column("clipped lr", "lr, clipped", ".3g"),
                Column("threshold", "c", ".3g"),
                Column("constant rates that came there", "constant rates that came there", ".0%"),
                Column("clipped rates that came there", "clipped settings that came there", ".0%"),
            ),
            tuple(f"scale {scale:g}" for scale in (1, 2, 4, 8, 16)),
        ),
        Table(
            "The estimator against the true Hessian",
            (
                Column("Lhat and Hessian", "Spearman of Lhat and norm of H", ".2f"),
                Column("n and Hessian", "of n and norm of H", ".2f"),
                Column("n and Lhat", "of n and Lhat", ".2f"),
                Column("Lhat / Hessian", "median Lhat / norm of H", ".3f"),
                Column("least Lhat / Hessian", "least", ".3f"),
                Column("greatest Lhat / Hessian", "greatest", ".3f"),
                Column("Lhat / line", "median Lhat / curvature along d", ".3f"),
            ),
            tuple(_ESTIMATOR["rules"]),
        ),
    ),
    drawings=(
        Drawing(
            "smoothness",
            "Smoothness along a step against the gradient norm before it, each probed step of seed 0. A straight line "
            "of slope 1 would be curvature in proportion to the gradient.",
            _paint_smoothness,
            (10.0, 4.6),
        ),
        Drawing(
            "steps",
            "Steps to a stationary point (the two functions) and to a small loss (the networks), by how bad the start "
            "is: mean over the seeds.",
            _paint_steps,
            (13.0, 4.2),
        ),
        Drawing(
            "estimator",
            "The smoothness that the probe sees along a step against the norm of the whole Hessian, a small network, "
            "seed 0. On the grey line they are equal.",
            _paint_estimator,
            (6.0, 4.6),
        ),
    ),
)  # fmt: skip
