"""The page of a suggestion: the table, what speaks against it, the figures."""

from typing import Any

import pytest

from surefoot.errors import InputError
from surefoot.report import render


def suggested(points: int = 12) -> dict[str, Any]:
    steps = list(range(1, points + 1))
    series = {"step": steps, "loss": [1.0] * points, "grad_norm": [2.0 + s for s in steps], "rows": points, "stride": 1}
    series |= {"smoothness": [4.0 + (s % 3) for s in steps], "h": [0.2] * points}
    reason = {"name": "lr", "value": 0.5, "low": 0.4, "high": 0.6, "constants": "L = 4", "rule": "lr = 2 / L"}
    other = {"rule": "Prop. 7", "lr": 0.1, "gamma": "inf", "source": "surefoot, Prop. 7"}
    measurement = {"name": "L along steps of 1/L", "value": 4.0, "kind": "estimate", "level": "estimate", "how": "so"}
    return {
        "format": "surefoot.suggestion",
        "version": 1,
        "title": "mlp on digits, delta-gclip",
        "suggested": {"lr": 0.5},
        "L": 4.0,
        "reasons": [reason | {"source": "edge of stability"}],
        "others": [other],
        "doubts": ["L went from 1 to 4 <b>"],
        "notes": ["your lr of 9 is 18 times as large as the one suggested"],
        "measurements": [measurement],
        "cost": 25,
        "steps": 250,
        "seconds": 1.5,
        "smoothness": {"series": series, "fit": None, "message": "too few"},
        "config": {"lr": 0.5},
    }


def test_the_page_says_it_all() -> None:
    page = render(suggested())
    for text in (
        "0.4 to 0.6",
        "lr = 2 / L",
        "edge of stability",
        "Measuring took 25 gradients, 10% of a run of 250. It took 1.5 s.",
        "<h3>Not sure</h3>",
        "L went from 1 to 4 &lt;b&gt;",
        "18 times as large",
        "Prop. 7",
        "∞",
        "proves nothing",
    ):
        assert text in page, text
    for figure in ("fig-smoothness", "fig-probing-smoothness", "fig-probing-h"):
        assert page.count(f'<figure id="{figure}">') == 1
    assert page == render(suggested())


def test_nothing_speaks_against_it() -> None:
    page = render(suggested() | {"doubts": []})
    assert "Not sure" not in page
    assert '<span class="status sure">' in page


@pytest.mark.parametrize("key", [k for k in suggested() if k not in ("format", "version")])
def test_any_part_may_be_missing(key: str) -> None:
    document = suggested()
    if key not in ("L", "suggested", "smoothness"):  # drawing takes most of the time
        del document["smoothness"]
    assert "<h1>" in render({k: v for k, v in document.items() if k != key})
    assert "<h1>" in render(document | {key: None})


def test_odd_numbers_are_left_out() -> None:
    document = suggested(3)
    document["smoothness"]["series"] |= {"smoothness": [None, 2.0, None], "h": [None] * 3}
    assert "fig-probing-h" not in render(document)
    document["reasons"][0] |= {"value": None, "low": "inf"}
    assert "<h1>" in render(document)


def test_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match="doubts: expected a list"):
        render(suggested() | {"doubts": "no"})
