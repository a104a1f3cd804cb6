"""The recipe chatterjee: promises that are held, a promise that is broken, and when the criterion holds."""

from typing import Any

import pytest
import torch

from surefoot.data import load
from surefoot.reproduce.figures import svg
from surefoot.reproduce.recipe import Experiment, Job
from surefoot.reproduce.recipes.chatterjee import (
    _START,
    _TRAIN,
    POSITIVE,
    POSITIVE_BEST,
    RECIPE,
    SMALL,
    USUAL_BEST,
    _held,
    judge,
    network,
    rows,
)
from surefoot.reproduce.results import Results


def arms(setting: dict[str, Any], part: str) -> Any:
    experiment = Experiment("digits", "digits", options={"limit": 60}, setting=setting)
    return RECIPE.run(Job(experiment, part, 3, load("digits", limit=60)))


def test_the_positive_initialisation_keeps_its_promise() -> None:
    found = arms({**_START, "rows": 10, "after": 40, "cap": 200}, "8")
    assert list(found) == [f"{kind}, 8" for kind in (POSITIVE, POSITIVE_BEST, USUAL_BEST)]
    certified = found[f"{POSITIVE}, 8"]
    assert certified["criterion"] == "proved"
    assert certified["broken"] == 0
    assert certified["rate / guaranteed"] > 1
    assert certified["ratio / alpha"] > 1
    assert 0 < certified["distance / radius"] < 1
    assert found[f"{POSITIVE_BEST}, 8"]["steps"] < certified["steps"]
    assert found[f"{USUAL_BEST}, 8"]["step"] > found[f"{POSITIVE_BEST}, 8"]["step"]


def test_a_promise_too_many_is_broken() -> None:
    torch.manual_seed(0)
    x, y = rows(load("digits", limit=60), 10, 0)
    model = network(64, [8], "tanh")
    kept = _held(model, x, y, 1e-3, 1e-9, 1.0, 20, scale=0.5)
    assert kept["broken"] == 0
    assert _held(model, x, y, 1e-3, 0.5, 1.0, 20, scale=0.5)["broken"] == 20
    assert _held(model, x, y, 1e-3, 1e-9, 1e-6, 20, scale=0.5)["broken"] == 1


def test_the_criterion_comes_after_the_path_length() -> None:
    found = arms({**_TRAIN, "rows": 6, "after": 30, "cap": 4000}, "tanh 32")["tanh 32"]
    assert found["q at first"] > 0.5
    assert found["held"] == "yes"
    assert 0 < found["path length: step"] <= found["step"]
    assert found["broken"] == 0
    assert found["rate / guaranteed"] >= 1
    none = arms({**_TRAIN, "rows": 6, "cap": 3}, "tanh 32")["tanh 32"]
    assert none["held"] == "no"
    assert "step" not in none


def test_rows_are_of_two_kinds() -> None:
    data = load("digits", limit=60)
    x, y = rows(data, 20, 1)
    assert x.shape == (20, 64)
    assert x.dtype == y.dtype == torch.float64
    assert set(y.flatten().tolist()) == {1.0, -1.0}
    assert not torch.equal(x, rows(data, 20, 2)[0])


def results(*, criterion: str = "proved", broken: int = 0, held: str = "yes") -> Results:
    first = {f"{POSITIVE}, 16": {"criterion": criterion, "broken": broken, "steps": 1e5}}
    trained = {"tanh 64": {"held": held, **({"broken": broken, "orders": 5.0} if held == "yes" else {})}}
    lines = [
        {"experiment": SMALL[0].name, "seed": 0, "arms": first},
        {"experiment": SMALL[2].name, "seed": 0, "arms": trained},
    ]
    return Results([SMALL[0], SMALL[2]], lines)


@pytest.mark.parametrize(
    ("options", "outcomes"),
    [
        ({}, ["reproduced"] * 3),
        ({"criterion": "undecided"}, ["not reproduced", "reproduced", "reproduced"]),
        ({"broken": 1}, ["reproduced", "not reproduced", "not reproduced"]),
        ({"held": "no"}, ["reproduced"] * 2),
    ],
)
def test_the_judge_keeps_to_the_tolerance(options: dict[str, Any], outcomes: list[str]) -> None:
    assert [f.outcome for f in judge(results(**options))] == outcomes


def test_the_figure_is_drawn() -> None:
    text = svg(RECIPE.drawings[0], results()).decode()
    assert "tanh 64" in text
    assert "first proof by" in text
