"""The recipe clipping-accelerates: its counts against naive ones, and a judge that can say all three words."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from surefoot.data import load
from surefoot.optim import GClip
from surefoot.reproduce.figures import svg
from surefoot.reproduce.recipe import Experiment, Job
from surefoot.reproduce.recipes.clipping_accelerates import (
    _ESTIMATOR,
    _RACE,
    CLIPPED,
    EPSILON,
    EXAMPLES,
    PLAIN,
    RECIPE,
    SMALL,
    SMALL_LR,
    _best_constant,
    _clipped_steps,
    _model,
    judge,
)
from surefoot.reproduce.results import Results
from surefoot.theorems.clipped_descent import default_rule
from surefoot.train.batches import batch_rows
from surefoot.train.job import seed_everything

TRAINING = Experiment(
    "digits", "digits", options={"limit": 60},
    setting={
        "kind": "training", "model": "mlp", "width": [8], "activation": "tanh", "batch": 20, "steps": 36, "every": 3,
        "points": [0.5, 1.0], "test_rows": 50,
        "rules": {CLIPPED: [2.0, 0.5], PLAIN: [1e38, None], SMALL_LR: [0.05, None]},
    },
    parts=(CLIPPED, PLAIN, SMALL_LR),
)  # fmt: skip


def job(experiment: Experiment, part: str = "", seed: int = 3) -> Job:
    return Job(experiment, part, seed, load("digits", **experiment.options) if experiment.data else None)


def test_the_probe_watches_plain_training() -> None:
    found = RECIPE.run(job(TRAINING, CLIPPED))[CLIPPED]
    assert found["observations"] == 12
    assert found["ended"] == "all steps"
    assert -1 <= found["spearman low"] <= found["spearman"] <= found["spearman high"] <= 1
    assert found["L1 low"] <= found["L1"] <= found["L1 high"]
    data = load("digits", limit=60)
    seed_everything(3)
    model = _model(data, TRAINING.setting)
    optimizer = GClip(model.parameters(), 2.0, gamma=0.5)
    losses, norms = [], []
    for t in range(36):
        rows = batch_rows(t, 60, 20, 3)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
        loss.backward()
        losses.append(loss.item())
        if (t + 1) % 3 == 0:
            norms.append(math.hypot(*[float(p.grad.norm()) for p in model.parameters() if p.grad is not None]))
        optimizer.step()
    assert found["train loss"] == pytest.approx(np.mean(losses[-20:]), rel=1e-6)
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 0.5  # the clip fires


def test_a_run_that_diverges_says_so() -> None:
    found = RECIPE.run(job(TRAINING, PLAIN))[PLAIN]
    assert found["ended"] == "diverged"
    assert "train loss" in found
    assert found["train loss"] is None
    assert "spearman" not in found


@pytest.mark.parametrize("name", EXAMPLES)
def test_constants_of_the_examples_hold(name: str) -> None:
    f = EXAMPLES[name]
    x = np.linspace(-20, 20, 4001)
    assert (f.curvature(x) <= (f.L0 + f.L1 * np.abs(f.slope(x))) * (1 + 1e-12)).all()
    h = 1e-5
    assert np.allclose((f.value(x + h) - f.value(x - h)) / (2 * h), f.slope(x), rtol=1e-5, atol=1e-5)


def test_steps_are_counted_as_one_would() -> None:
    f, rule = EXAMPLES["x^4"], default_rule(4.0, 3.0)
    x, steps = 7.0, 0
    while abs(4 * x**3) > EPSILON:
        x -= rule.multiplier(abs(4 * x**3)) * 4 * x**3
        steps += 1
    assert _clipped_steps(f, np.array([0.5, -7.0]), rule, 1000) == steps > 50
    assert _clipped_steps(f, np.array([7.0]), rule, 10) == 10
    best = 10**6
    for k in range(12):
        h, counts = 4 / (12 * 49) * 2 ** (-k / 2), []
        for x in (7.0, 3.0):
            n = 0
            while EPSILON < abs(4 * x**3) < 1e12 and n < 10**4:
                x -= h * 4 * x**3
                n += 1
            counts.append(n if abs(4 * x**3) <= EPSILON else 10**6)
        best = min(best, max(counts))
    assert _best_constant(f, np.array([7.0, 3.0]), 7.0, 10**4) == best


def test_clipping_wins_far_away_and_not_near() -> None:
    setting = {"kind": "examples", "function": "x^4", "starts": [1, 10], "cap": 10_000}
    arms = RECIPE.run(job(Experiment("x^4", setting=setting)))
    near, far = arms.values()
    assert near["ratio"] < 1 < far["ratio"]
    assert far["clipped"] < far["published"] < far["bound"] < far["constant bound"]


def test_the_race_takes_the_best_of_each() -> None:
    setting = {**_RACE, "scales": [2], "constant": [[1.0, None], [1e-6, None]], "clipped": [[2.0, 1.0]], "cap": 60}
    arms = RECIPE.run(job(Experiment("r", "digits", options={"limit": 40}, setting=setting)))
    one = arms["scale 2"]
    assert one["constant lr"] == 1.0
    assert one["constant rates that came there"] == 0.5
    assert 1 <= one["constant"] < 60
    assert one["log ratio"] == pytest.approx(math.log(one["constant"] / one["clipped"]))


def test_the_estimator_is_the_curvature_along_short_steps() -> None:
    setting = {**_ESTIMATOR, "width": [2], "steps": 16, "every": 8, "rules": {"plain": [1e-3, None]}}
    one = RECIPE.run(job(Experiment("h", "digits", options={"limit": 30}, setting=setting)))["plain"]
    assert one["observations"] == 2
    assert one["Lhat / line"] == pytest.approx(1, abs=1e-2)
    assert 0 < one["Lhat / Hessian"] < 1.01


def results(spearman: list[float], small: list[float], *, bound: float = 100.0) -> Results:
    lines: list[dict[str, Any]] = []
    for seed, (a, b) in enumerate(zip(spearman, small)):
        arms = {CLIPPED: {"spearman": a, "slope": a}, SMALL_LR: {"spearman": b}}
        lines.append({"experiment": SMALL[0].name, "seed": seed, "arms": arms})
        far = {"clipped": 50, "ratio": 3.0, "bound": bound, "constant": 150}
        arms = {"start within 1": far | {"ratio": 0.5, "constant": 25}, "start within 100": far}
        lines.append({"experiment": "x^4", "seed": seed, "arms": arms})
    return Results([SMALL[0], SMALL[2]], lines)


@pytest.mark.parametrize(
    ("spearman", "small", "outcomes"),
    [
        ([0.8, 0.82, 0.78], [0.2, 0.3, 0.1], ["reproduced", "reproduced", "reproduced"]),
        ([0.1, -0.1, 0.05], [0.2, 0.3, 0.1], ["not reproduced", "not reproduced", "not reproduced"]),
        ([0.9, 0.1, -0.5], [0.9, 0.1, -0.5], ["not testable here", "not testable here", "not reproduced"]),
        ([0.9], [0.1], ["not testable here"] * 3),
    ],
)
def test_the_judge_keeps_to_the_tolerance(spearman: list[float], small: list[float], outcomes: list[str]) -> None:
    assert [f.outcome for f in judge(results(spearman, small))][:3] == outcomes


def test_the_judge_holds_the_bound() -> None:
    good, bad = (judge(results([0.8], [0.2], bound=b))[3:] for b in (100.0, 49.0))
    assert [f.outcome for f in good] == ["reproduced", "reproduced"]
    assert [f.outcome for f in bad] == ["not reproduced", "reproduced"]


def test_the_figures_are_drawn() -> None:
    found = copy.deepcopy(RECIPE.run(job(TRAINING, CLIPPED)))
    lines = [{"experiment": SMALL[0].name, "seed": 0, "arms": found}]
    text = svg(RECIPE.drawings[0], Results(SMALL[:1], lines)).decode()
    assert "clipped, large lr: slope" in text
    assert "best constant step" in svg(RECIPE.drawings[1], results([0.8], [0.2])).decode()
    assert torch.get_default_dtype() is torch.float32
