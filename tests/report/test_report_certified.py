"""The certificate's panel: what it says, what it draws, and what it does with nonsense."""

from pathlib import Path
from typing import Any

import pytest
from report_samples import run

from surefoot.errors import InputError
from surefoot.report import render, write_report


def certificate(**changes: Any) -> dict[str, Any]:
    verdict = {
        "theorem": "an exact global minimum lies nearby",
        "outcome": "proved",
        "conclusion": "an exact global minimum lies within 0.0018",
        "numbers": {"q": 0.1, "epsilon": 0.4, "radius": 0.0018, "sigma_star": 1.35, "eta_max": 8e-4},
        "findings": [{"hypothesis": "q is small", "outcome": "proved", "reason": "it is", "remedy": ""}],
        "measurements": [
            {"name": "||F(w0) - y||", "value": 1.65e-3, "kind": "upper bound", "level": "verified", "how": "forward"},
            {"name": "s_min(J(w0))", "value": 1.6487, "kind": "lower bound", "level": "verified", "how": "Cholesky"},
        ],
        "criteria": {"Chatterjee, gradient flow": True, "Liu-Zhu-Belkin": False},
        "source": "surefoot, Prop. 17",
    }
    steps = list(range(101, 181))
    series = {
        "step": steps,
        "residual": [1e-3 * 0.95**i for i in range(80)],
        "envelope": [1.1e-3 * 0.98**i for i in range(80)],
        "distance": [1e-3 * (1 - 0.95**i) for i in range(80)],
        "path": [1.1e-3 * (1 - 0.95**i) for i in range(80)],
        "step_size": [8e-4] * 80,
    }
    polishing = {
        "distance": 1.65,
        "norm": 5.0,
        "residual": [4.6, 4e-13],
        "metric": "test accuracy",
        "percent": True,
        "held_out": [0.9526, 0.9694],
        "held_out_rows": 360,
    }
    found = {
        "format": "surefoot.certified",
        "version": 1,
        "title": "mlp on digits",
        "verdict": verdict,
        "statement": "Within 0.0018 there are weights at which it takes the given values.",
        "folder": "runs/demo/certificate",
        "step": 100,
        "layers": "all",
        "loss": "mse",
        "samples": 20,
        "rows": 20,
        "outputs": 10,
        "lr_max": 0.08,
        "rule": "--optimizer delta-gclip with --lr up to 0.08",
        "polishing": polishing,
        "notes": ["Eval mode."],
        "series": series,
    }
    return {**found, **changes}


def undecided() -> dict[str, Any]:
    found = certificate(statement="", folder=None, lr_max=None, rule=None, polishing=None, series={})
    finding = {"hypothesis": "q < 1/2", "outcome": "undecided", "reason": "q <= 59", "remedy": "train longer"}
    found["verdict"] = {**found["verdict"], "outcome": "undecided", "numbers": {}, "findings": [finding]}
    return found


def page(document: dict[str, Any]) -> str:
    return render({**run(20), "certificate": document})


def test_a_proof_is_told_in_full() -> None:
    html = page(certificate())
    for part in (
        "PROVED: an exact global minimum lies nearby",
        "Within 0.0018 there are weights",
        "≤ 0.00165",
        "≥ 1.6487",
        "all of them",
        "8×10⁻⁴",
        "--optimizer delta-gclip with --lr up to 0.08",
        "Polishing moved the weights by 1.65 (33% of their norm)",
        "from 4.6 to 4×10⁻¹³",
        "test accuracy on 360 rows went from 95.26% to 96.94%",
        "these criteria apply: Chatterjee, gradient flow. Not: Liu-Zhu-Belkin.",
        "surefoot verify runs/demo/certificate",
        'id="fig-envelope"',
        'id="fig-distance"',
        "Eval mode.",
    ):
        assert part in html, part
    assert "What would help" not in html


def test_what_is_short_and_what_would_help() -> None:
    html = page(undecided())
    for part in ("NOT PROVED", "q &lt; 1/2: q &lt;= 59", "What would help:", "train longer"):
        assert part in html, part
    for part in ("fig-envelope", "surefoot verify", "Polishing", "lr_max"):
        assert part not in html, part


def test_some_samples_are_said_to_be_some() -> None:
    assert "the first of 500: no word of the others" in page(certificate(rows=500))


def test_no_certificate_no_panel() -> None:
    assert "Certificate" not in render(run(20))


@pytest.mark.parametrize("missing", ["verdict", "series", "polishing", "statement", "samples", "notes", "rule"])
def test_what_is_missing_or_null_is_left_out(missing: str) -> None:
    assert "Certificate" in page(certificate(**{missing: None}))
    document = certificate()
    del document[missing]
    assert "Certificate" in page(document)


def test_numbers_that_are_no_numbers() -> None:
    document = certificate()
    document["verdict"]["numbers"] = {"radius": None, "q": None}
    document["series"]["residual"] = [None] * 80
    html = page(document)
    assert "fig-envelope" not in html
    assert "fig-distance" not in html


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "surefoot.run"}, "surefoot.run"),
        ({"verdict": []}, "verdict"),
        ({"series": {"step": [1, 2], "residual": [1.0]}}, "certificate.series.residual"),
        ({"verdict": {"measurements": [3]}}, r"measurements\[0\]"),
    ],
)
def test_nonsense_is_named(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        page(certificate(**changes))


def test_nothing_escapes_into_the_page() -> None:
    evil = "<script>alert(1)</script>"
    html = page(certificate(statement=evil, rule=evil, folder=evil, notes=[evil]))
    assert "<script" not in html


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_panel_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    document = {**run(20), "certificate": certificate(statement="long " * 200)}
    browser.open(write_report(document, tmp_path / "report.html"), width=width, scheme=scheme)
    assert browser.console() == []
    assert browser.script("return document.documentElement.scrollWidth <= window.innerWidth")
    box = browser.script("return document.querySelector('.proof').getBoundingClientRect().width")
    assert box > 0.8 * min(width, 1080) - 40
    seen = "return [...document.querySelectorAll('#fig-envelope svg')].filter(s => s.clientHeight > 0).length"
    assert browser.script(seen) == 1
    assert "limit" in browser.script("return document.querySelector('#fig-envelope').textContent")
