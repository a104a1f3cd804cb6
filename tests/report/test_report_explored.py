"""What the page of a run says of explore/exploit, also where parts are missing."""

import copy
from typing import Any

import pytest

from surefoot.errors import InputError
from surefoot.report import render
from surefoot.report.explored import explored


def measured(name: str, value: float, kind: str) -> dict[str, Any]:
    return {"name": name, "value": value, "kind": kind, "level": "verified", "how": "Cholesky", "samples": 60}


def document() -> dict[str, Any]:
    rank = {
        "samples": 60, "columns": 81, "status": "PROVED", "s_min": measured("s_N(Phi)", 0.02, "lower bound"),
        "s_max": measured("s_1(Phi)", 30.0, "upper bound"), "rank_at_least": measured("rank(Phi)", 60, "lower bound"),
        "rank_at_most": measured("rank(Phi)", 60, "upper bound"),
    }  # fmt: skip
    trial = {"noise": 0.0, "status": "UNDECIDED", "s_min": 0.0, "steps": None, "loss": 0.3, "accuracy": 0.9}
    return {
        "format": "surefoot.explored", "version": 1, "rows": 60, "outputs": 10, "loss": "cross-entropy",
        "verdict": {
            "theorem": "the last layer", "outcome": "proved", "findings": [], "measurements": [],
            "numbers": {"infimum": 0.0, "loss": 0.25, "loss_bound": 0.3, "noise": 1e-3},
        },
        "tau": 0.6, "explore_steps": 6, "total_steps": 9, "solver": "gd", "taken": 3, "expected_steps": None,
        "noise": {"asked": "auto", "taken": 1e-3}, "head": "3", "rank": rank, "untrained": rank, "solved": "",
        "trade": [trial, trial | {"noise": 1e-3, "status": "PROVED", "steps": 7e12, "chosen": True}],
        "metric": "test accuracy", "percent": True, "held_out_rows": 20,
        "held_out": {"before": 0.8, "after": 0.75, "end": 0.85}, "notes": ["dropout is off"],
        "series": {"step": [6, 7, 8, 9], "loss": [0.3, 0.28, 0.26, 0.25], "bound": [0.3, 0.3, 0.3, 0.3]},
    }  # fmt: skip


def page(part: Any) -> str:
    series = {"step": [1, 2, 3], "loss": [2.0, 1.0, 0.5], "grad_norm": [1.0, 1.0, 1.0]}
    return render({"format": "surefoot.run", "version": 1, "title": "t", "series": series, "explored": part})


def test_everything_is_said() -> None:
    text = page(document())
    for part in (
        "PROVED: the last layer", "On these 60 training rows", "is guaranteed to be at most 0.3", "≥ 0.02", "7×10¹²",
        "0.001 ← taken", "fig-last-layer", "85.00%", "80.00% before the noise, 75.00% after it", "dropout is off",
        "lower bound, verified", "From the line on the last layer alone is trained",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("outcome", ["undecided", "refuted"])
def test_without_a_proof_nothing_is_promised(outcome: str) -> None:
    given = document()
    given["verdict"] |= {
        "outcome": outcome, "numbers": {"loss": 0.25},
        "findings": [{"outcome": outcome, "hypothesis": "rank N", "reason": "s_N = 0", "remedy": "more noise"}],
    }  # fmt: skip
    text = page(given)
    assert "Nothing is guaranteed. The loss is 0.25 now." in text
    assert "What would help:" in text
    assert "is guaranteed to be at most" not in text


def test_a_run_that_is_exploring_has_no_verdict_yet() -> None:
    given = document() | {"verdict": None, "rank": None, "series": None, "trade": [], "held_out": {}}
    text = page(given)
    assert "No verdict yet" in text
    assert "fig-last-layer" not in text


@pytest.mark.parametrize("key", sorted(set(document()) - {"format", "version"}))
def test_what_is_missing_or_null_is_left_out(key: str) -> None:
    for change in ({key: None}, {}):
        given = {**document(), **change}
        if not change:
            del given[key]
        assert explored(copy.deepcopy(given)) is not None


def test_a_document_of_another_kind_is_refused() -> None:
    assert explored({}) is None
    with pytest.raises(InputError, match=r"not 'surefoot\.explored' of 1"):
        explored({"format": "surefoot.explored", "version": 2})
