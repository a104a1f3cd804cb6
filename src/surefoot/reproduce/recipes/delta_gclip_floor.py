"""Where the floor of δ-GClip is reached, does it help, harm or do nothing, beside plain clipping (δ = 0)?

Letters: η lr, γ gamma, δ delta. The floor acts on a step iff ||g|| >= γ/δ. All arms of a seed share first weights,
order of rows and what is done to them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from surefoot.data import Dataset
from surefoot.errors import InputError
from surefoot.reproduce.figures import COLOURS, GRID, MUTED
from surefoot.reproduce.recipe import Arms, Column, Drawing, Experiment, Finding, Job, Recipe, Setting, Table
from surefoot.reproduce.recipes.delta_gclip_parity import PAPER
from surefoot.reproduce.results import Results, Summary
from surefoot.reproduce.trials import Rule, Task, tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DELTAS = (0.1, 0.5)
PLAIN, SGD = "δ = 0", "SGD"
TOLERANCES = {"accuracy": 0.01, "R2": 0.01, "bits": 0.02, "log loss": 0.1}
UNITS = {"accuracy": "accuracy", "R2": "R²", "bits": "bits per character", "log loss": "decades of training loss"}
CONFIDENCE = 0.99
RARE = 0.01  # the floor was reached if it acted on this part of the steps
Effect = Literal["helps", "harms", "does nothing", "does no harm", "undecided"]


def own(delta: float) -> str:
    """Return the arm: δ at its own best η and γ."""
    return f"δ = {delta:g}"


def added(delta: float) -> str:
    """Return the arm: δ at the best η and γ of δ = 0."""
    return f"δ = {delta:g}, η γ of δ = 0"


def removed(delta: float) -> str:
    """Return the arm: δ = 0 at the best η and γ of δ."""
    return f"δ = 0, η γ of δ = {delta:g}"


COMPARISONS = {
    "each at its own best η, γ": lambda d: (own(d), PLAIN),
    "floor added at the best η, γ of δ = 0": lambda d: (added(d), PLAIN),
    "floor taken away at the best η, γ of δ": lambda d: (own(d), removed(d)),
}
ARMS = (PLAIN, *map(own, DELTAS), SGD, *map(added, DELTAS), *map(removed, DELTAS))


class Upset(Task):
    """A task in which some batches, or every gradient, are not what they should be: `setting["upset"]`.

    ============  ================================================================================================
    kind          what happens
    ============  ================================================================================================
    mislabelled   in a part `share` of the batches every label is drawn anew
    rescaled      in a part `share` of the batches the inputs are multiplied by `factor`
    noise         to each gradient a vector is added: random direction, length `length` s, P(s > x) = x^-tail, x >= 1
    targets       the training targets get noise: `length` times Student's t with `tail` degrees of freedom
    rare          rows of the classes from `first` on come in batches of their own, a part `share` of all batches
    ============  ================================================================================================

    Validation and test rows are left as they are, with all classes.
    """

    def __init__(self, data: Dataset, setting: Any, device: str = "cpu") -> None:
        super().__init__(data, setting, device)
        self.upset = setting.get("upset", {"kind": "nothing"})
        self._noise: tuple[int, Tensor] | None = None

    def gradient(self, model: nn.Module, t: int, seed: int) -> float:
        kind = self.upset["kind"]
        draw = torch.Generator().manual_seed(_number(f"{kind} {seed} {t}"))
        rows = self._of_some_classes(t, seed, draw) if kind == "rare" else self.rows(t, seed)
        x, y = self.train[0][rows], self.train[1][rows]
        if kind == "targets":
            y = y + self._target_noise(seed)[rows].to(y)
        if kind in ("mislabelled", "rescaled") and float(torch.rand((), generator=draw)) < self.upset["share"]:
            if kind == "mislabelled":
                y = torch.randint(self.data.outputs, y.shape, generator=draw).to(y.device)
            else:
                x = x * self.upset["factor"]
        loss = self.backward(model, x, y)
        if kind == "noise":
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            direction = [torch.randn(g.shape, generator=draw).to(g) for g in grads]
            s = float(torch.rand((), generator=draw, dtype=torch.float64).clamp(min=1e-12)) ** (-1 / self.upset["tail"])
            norm = math.sqrt(sum(float(d.double().square().sum()) for d in direction))
            for g, d in zip(grads, direction):
                g.add_(d, alpha=self.upset["length"] * s / norm)
        return loss

    def _of_some_classes(self, t: int, seed: int, draw: torch.Generator) -> Tensor:
        rare = float(torch.rand((), generator=draw)) < self.upset["share"]
        there = (self.train[1] >= self.upset["first"]).cpu() == rare
        found = there.nonzero()[:, 0]
        return found[torch.randint(len(found), (self.batch,), generator=draw)].to(self.device)

    def _target_noise(self, seed: int) -> Tensor:
        if self._noise is not None and self._noise[0] == seed:
            return self._noise[1]
        draw = torch.Generator().manual_seed(_number(f"targets {seed}"))
        shape, tail = self.train[1].shape, self.upset["tail"]
        chi2 = torch.randn((*shape, tail), generator=draw, dtype=torch.float64).square().sum(-1)
        student = torch.randn(shape, generator=draw, dtype=torch.float64) / (chi2 / tail).sqrt()
        self._noise = seed, self.upset["length"] * student
        return self._noise[1]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def grids(experiment: Experiment) -> dict[str, list[Rule]]:
    """Return the grid of each arm that is tuned."""
    s = experiment.setting
    found = {name: [Rule(lr, gamma, delta) for lr in s["lr"] for gamma in s["gamma"]]
             for name, delta in {PLAIN: 0.0, **{own(d): d for d in DELTAS}}.items()}  # fmt: skip
    return found | {SGD: [Rule(lr) for lr in s["lr"]]}


def run(job: Job) -> Arms:
    """Tune with seed 0, then train all arms with seed job.seed + 1."""
    assert job.data is not None
    task = Upset(job.data, job.experiment.setting, job.device)
    rules = dict(tuned(job, task, grids(job.experiment)))
    for delta in DELTAS:
        rules[added(delta)] = replace(rules[PLAIN], delta=delta)
        rules[removed(delta)] = replace(rules[own(delta)], delta=0.0)
    found: dict[Rule, dict[str, Any]] = {}
    for name in ARMS:
        rule = rules[name]
        if rule not in found:
            found[rule] = task.trial(rule, job.seed + 1, on_test=True)
        job.progress(name)
    return {name: found[rules[name]] for name in ARMS}


# ----------------------------------------------------------------------------------------------------------------------


def interval(difference: Summary, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Student's confidence interval of a mean of paired differences.

    Example:
        >>> low, high = interval(Summary(1.0, 0.5, 2), 0.5)
        >>> round(low, 9), round(high, 9)
        (0.5, 1.5)
    """
    try:
        from scipy.stats import t
    except ImportError as missing:
        raise InputError("reproduce: scipy is not installed; pip install 'surefoot[measure]'") from missing
    assert difference.error is not None
    half = float(t.ppf((1 + confidence) / 2, difference.n - 1)) * difference.error
    return difference.mean - half, difference.mean + half


def effect(low: float, high: float, tolerance: float) -> Effect:
    """Say what an interval of (with the floor) - (without) means; the first that fits.

    Example:
        >>> effect(-0.001, 0.002, 0.01), effect(0.02, 0.05, 0.01), effect(-0.05, -0.02, 0.01), effect(-0.05, 0.03, 0.01)
        ('does nothing', 'helps', 'harms', 'undecided')
    """
    if -tolerance <= low and high <= tolerance:
        return "does nothing"
    if low > 0:
        return "helps"
    if high < 0:
        return "harms"
    return "does no harm" if low >= -tolerance else "undecided"


def judge(results: Results) -> list[Finding]:
    """Say of each setting, δ and comparison what the floor does."""
    return [
        _compared(results, e, how, delta)
        for e in results.experiments
        for delta in DELTAS
        for how in COMPARISONS
    ]  # fmt: skip


def _compared(results: Results, e: Experiment, how: str, delta: float) -> Finding:
    what = f"{e.name}, δ = {delta:g}: {how}"
    arm, base = COMPARISONS[how](delta)
    difference, floored = results.difference(e.name, arm, base, "score"), results.summary(e.name, arm, "floored")
    if difference is None or floored is None or difference.error is None:
        return Finding(what, "not testable here", "fewer than two seeds")
    said = f"floor on {floored.mean:.1%} of the steps"
    if not floored.mean >= RARE:
        return Finding(what, "not testable here", f"{said}: not reached")
    score = e.setting["score"]
    low, high = interval(difference)
    word = effect(low, high, TOLERANCES[score])
    points, unit = (100, "points of accuracy") if score == "accuracy" else (1, UNITS[score])
    said = f"**{word}**: {points * difference.mean:+.3g} [{points * low:+.3g}, {points * high:+.3g}] {unit}; {said}"
    if word == "undecided":
        return Finding(what, "not testable here", said)
    return Finding(what, "not reproduced" if word == "harms" else "reproduced", said)


def _paint(figure: Figure, results: Results) -> None:
    axes = figure.subplots(1, len(DELTAS), sharey=True)
    for panel, delta in zip(axes, DELTAS):
        panel.axvspan(-1, 1, color=GRID, zorder=0, label="tolerance")
        panel.axvline(0, color=MUTED, linewidth=1)
        for k, (how, pair) in enumerate(COMPARISONS.items()):
            arm, base = pair(delta)
            drawn = False
            for row, e in enumerate(results.experiments):
                found = results.difference(e.name, arm, base, "score")
                floored = results.summary(e.name, arm, "floored")
                if found is None or floored is None or found.error is None:
                    continue
                unit = TOLERANCES[e.setting["score"]]
                low, high = interval(found)
                reached = floored.mean >= RARE
                panel.errorbar(
                    found.mean / unit, row + (k - 1) * 0.23, xerr=(high - low) / 2 / unit, fmt="o", color=COLOURS[k],
                    capsize=2.5, markersize=5, linewidth=1.4, label=None if drawn else how,
                    markerfacecolor=COLOURS[k] if reached else "white",
                )  # fmt: skip
                drawn = True
        panel.set_xscale("symlog", linthresh=2.0)
        ticks = [-50, -10, -1, 0, 1, 10, 50]
        panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
        panel.set_xlim(-130, 130)
        panel.set_title(f"δ = {delta:g}")
        panel.set_yticks(range(len(results.experiments)), [e.name for e in results.experiments])
        panel.set_ylim(len(results.experiments) - 0.5, -0.5)
        panel.grid(axis="x")
    figure.supxlabel("with the floor minus without, in tolerances (right: the floor is better)", color=MUTED, size=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


CLASSES: dict[str, Any] = {
    "model": "mlp", "network": {"width": [64], "depth": 3}, "loss": "cross-entropy", "score": "accuracy", "batch": 64,
    "steps": 300, "valid": 1000, "test": 0, "schedule": "constant", "lr": [0.03, 0.1, 0.3, 1.0],
    "gamma": [0.15, 0.5, 1.5, 4.5],
}  # fmt: skip
FULL_BATCH: dict[str, Any] = {
    "model": "mlp", "network": {"width": [64], "depth": 2, "activation": "tanh"}, "loss": "mse", "score": "log loss",
    "batch": 0, "steps": 300, "valid": 0, "test": 0, "schedule": "constant", "lr": [0.3, 1.0, 3.0, 10.0],
    "gamma": [0.003, 0.01, 0.03, 0.1],
}  # fmt: skip
REGRESSION: dict[str, Any] = {
    "model": "mlp", "network": {"width": [64], "depth": 2}, "loss": "mse", "score": "R2", "batch": 32, "steps": 600,
    "valid": 150, "test": 0, "schedule": "constant", "lr": [0.03, 0.1, 0.3, 1.0], "gamma": [0.1, 0.3, 1.0, 3.0],
    "upset": {"kind": "targets", "tail": 1, "length": 0.5},
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "model": "lstm", "network": {"width": [64], "depth": 1}, "loss": "cross-entropy", "score": "bits", "batch": 8,
    "steps": 200, "valid": 200, "test": 400, "schedule": "constant", "lr": [1.0, 3.0, 10.0, 30.0],
    "gamma": [0.02, 0.07, 0.2, 0.6],
}  # fmt: skip
UPSETS: dict[str, dict[str, Any]] = {
    "mislabelled": {"kind": "mislabelled", "share": 0.2},
    "rescaled": {"kind": "rescaled", "share": 0.05, "factor": 20.0},
    "heavy-noise": {"kind": "noise", "tail": 1.2, "length": 1.0},
    "rare-classes": {"kind": "rare", "share": 0.1, "first": 8},
}
HUB, TEXT = "zalando-datasets/fashion_mnist", ("text/tinyshakespeare.txt",)


def _settings(*, large: bool) -> tuple[Experiment, ...]:
    rows = {} if large else {"limit": 5000}
    classes, full_batch, regression, language = (
        _larger(s) if large else s for s in (CLASSES, FULL_BATCH, REGRESSION, LANGUAGE)
    )
    small = {**classes, "gamma": [0.01], "lr": [1.0, 3.0, 10.0, 30.0, 100.0]}

    def fashion(name: str, setting: dict[str, Any]) -> Experiment:
        return Experiment(name, HUB, ("fashion_mnist",), options=rows, setting=setting)

    return (
        fashion("clean", classes),
        fashion("small-gamma", small),
        Experiment("full-batch", "digits", options={"test_fraction": 0.5}, setting=full_batch),
        *(fashion(name, {**classes, "upset": upset}) for name, upset in UPSETS.items()),
        Experiment(
            "heavy-targets", local=("uci/concrete.csv",), options={"target": "y", "task": "regression"},
            setting=regression,
        ),
        Experiment("long-context", local=TEXT, options={"context": 128}, setting=language),
    )  # fmt: skip


def _larger(setting: dict[str, Any]) -> dict[str, Any]:
    network = {**setting["network"], "width": [8 * w for w in setting["network"]["width"]]}
    return {**setting, "network": network, "steps": 20 * setting["steps"]}


RECIPE = Recipe(
    name="delta-gclip-floor",
    folder="delta-gclip",
    paper=PAPER,
    claim="Where the floor of δ-GClip is reached (||g|| >= γ/δ), which it was in no published run that can be "
    "checked, it trains at least as well as plain clipping, δ = 0: each at its own best η and γ, and at the same η "
    "and γ.",
    scaled="nine settings in which the floor is likely to be reached, each a training of half a second; 10 seeds "
    "take about a quarter of an hour of one core.",
    tolerance="For each setting, δ (0.1, 0.5) and comparison: the 99 % interval (Student, paired by seed, 10 seeds) "
    "of the test score with the floor minus that without. Within ± 1 point of accuracy (0.01 of R², 0.02 bits per "
    "character, 0.1 decades of training loss) the floor does nothing; else wholly above 0 it helps, wholly below 0 "
    "it harms, above minus that width it does no harm; else it is undecided. Harm is not reproduced, undecided is "
    "not testable here, the rest is reproduced. Where the floor acted on fewer than 1 % of the steps, on average "
    "over the seeds, it is not testable here.",
    settings=(
        Setting("δ", "0.1, 0.5", "the largest in the authors' public code: 0.1 (VAE), 0.5 (KAN)"),
        Setting("η, γ", "the best of a grid by the validation score of seed 0, for each δ by itself: four η, a "
                "factor of about 3 apart and more where the best is at an end (up to four times), and four γ, about "
                "0.1, 0.3, 1 and 3 of the typical gradient norm (small-gamma: 0.01 only)", "ours"),
        Setting("seeds", "10 (1, 2, ...; 0 is for tuning alone): first weights, order of rows, upsets; the same for "
                "all arms", "ours"),
        Setting("clean", "5,000 images of Fashion-MNIST, MLP 64-64-64, batch 64, 300 steps", "ours",
                full="60,000 images, MLP 512-512-512, batch 64, 6,000 steps"),
        Setting("small-gamma", "as clean, γ = 0.01: normalised descent for δ = 0, SGD of η δ where δ > 0", "ours"),
        Setting("full-batch", "899 digits at once, tanh MLP 64-64, squared error, 300 steps, score: -log10 "
                "training loss", "ours: the deterministic setting of the theory", full="tanh MLP 512-512, 6,000 steps"),
        Setting("mislabelled", "as clean; in a fifth of the batches all labels are drawn anew", "ours"),
        Setting("rescaled", "as clean; in 5 % of the batches the inputs are 20 times as large", "ours"),
        Setting("heavy-noise", "as clean; to each gradient a random vector is added whose length has a Pareto tail of "
                "index 1.2 (no variance), at least 1", "ours: the noise of arXiv 2609.12785"),
        Setting("rare-classes", "as clean; two of the ten classes come in batches of their own, 10 % of all: large "
                "gradients that matter", "ours"),
        Setting("heavy-targets", "concrete, MLP 64-64, batch 32, 600 steps; Cauchy noise of scale 0.5 on the "
                "standardised training targets", "ours", full="MLP 512-512, 12,000 steps"),
        Setting("long-context", "LSTM of 64 on windows of 128 characters of Shakespeare, batch 8, 200 steps", "ours",
                full="LSTM of 512, 4,000 steps"),
        Setting("momentum, weight decay, schedule", "none", "the paper's definition"),
        Setting("worth of a run that diverged", "that of a constant prediction", "ours"),
    ),
    experiments=_settings(large=False),
    full=_settings(large=True),
    run=run,
    judge=judge,
    tables=(
        Table("Scores on clean test rows, and how often the floor was reached", (
            Column("score", "score", ".4f"),
            Column("diverged", "diverged", ".0%"),
            Column("lr", "η"),
            Column("gamma", "γ"),
            Column("floored", "on the floor", ".1%"),
            Column("clipped", "clipped", ".1%"),
            Column("median norm", "median norm", ".3g"),
            Column("largest norm", "largest norm", ".3g"),
        ), ARMS),
    ),
    drawings=(
        Drawing("floor", "Test score with the floor minus without, 99 % intervals, in units of the tolerance (linear "
                "up to 2); a hollow point: the floor acted on fewer than 1 % of the steps.", _paint, (10.0, 6.2)),
    ),
    seeds=10,
)  # fmt: skip
