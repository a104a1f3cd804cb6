"""The recipe first-certificate: a certificate that fires and is checked, and one that claims too much."""

from typing import Any

import pytest
import torch

from surefoot.certificates import certify
from surefoot.data import load
from surefoot.reproduce.figures import svg
from surefoot.reproduce.recipe import Experiment, Job
from surefoot.reproduce.recipes.first_certificate import LIMIT, RECIPE, SMALL, _worth, judge, network, rows
from surefoot.reproduce.results import Results

SETTING = {"rows": 5, "cap": 2000, "after": 30, "compare": [["wider needs less training", "32", "16", -1]]}


def arms(part: str, **setting: Any) -> Any:
    experiment = Experiment("digits", "digits", options={"limit": 60}, setting=SETTING | setting, parts=(part,))
    return RECIPE.run(Job(experiment, part, 3, load("digits", limit=60)))[part]


@pytest.fixture(scope="module")
def one() -> Any:
    return arms("32")


def test_training_comes_to_a_certificate_that_is_kept(one: Any) -> None:
    assert one["q at first"] > LIMIT > one["curve of q"][-1]
    assert one["fired"] == one["kept"] == one["checker"] == "yes"
    assert one["step"] == one["curve of steps"][-1] > 0
    assert one["loss left"] == one["curve of loss left"][-1] < 1e-3
    assert 0 < one["minimum / radius"] <= 1
    assert 0 < one["path / radius"] <= 1
    assert one["rate / guaranteed"] >= 1
    assert one["certificate bytes"] > 1000


def test_too_few_steps_come_to_none() -> None:
    found = arms("32", cap=2)
    assert found["fired"] == "no"
    assert found["curve of steps"] == [0, 1, 2]
    assert "step" not in found


def test_a_claim_too_many_is_seen() -> None:
    torch.manual_seed(0)
    data = load("digits", limit=60)
    x, y = rows(data, 5, 0)
    model = network(data, [32])
    certificate = certify(model, x, y, polish=True).certificate
    assert certificate is not None
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(certificate.tensors[name])
        next(model.parameters()).add_(1e-3)  # not the weights it is about
    found = _worth(model, x, y, certificate, 5)
    assert found["kept"] != "yes"
    assert found["checker"] == "yes"  # the file itself is as it was


def results(one: Any, **changed: Any) -> Results:
    """Return results of three seeds, of which the wider network fires two orders earlier."""
    lines = [
        {
            "experiment": "digits", "seed": seed,
            "arms": {"16": {**one, "orders": 6 + 0.1 * seed}, "32": {**one, "orders": 4 + 0.2 * seed, **changed}},
        }
        for seed in range(3)
    ]  # fmt: skip
    return Results([Experiment("digits", "digits", setting=SETTING, parts=("16", "32"))], lines)


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, []),
        ({"q at first": 0.4}, [0]),
        ({"fired": "no"}, [1]),
        ({"checker": "no"}, [2]),
        ({"kept": "the residual rose"}, [2]),
        ({"orders": 7.0}, [3]),
        ({"q at first": "inf"}, []),
    ],
)
def test_the_judge_keeps_to_the_tolerance(one: Any, changed: dict[str, Any], wrong: list[int]) -> None:
    found = judge(results(one, **changed))
    assert len(found) == 4
    assert [i for i, f in enumerate(found) if f.outcome != "reproduced"] == wrong


def test_the_figure_is_drawn(one: Any) -> None:
    text = svg(RECIPE.drawings[0], results(one)).decode()
    assert "an exact global minimum" in text
    assert "hidden widths" in text
    assert SMALL[0].name == "digits-20"  # which the figure is about: the first experiment
