"""The panel of the smoothness probe: dots, a line, what it says in words."""

import copy
import math

import numpy as np
import pytest
import report_samples as samples

from surefoot.errors import InputError
from surefoot.report import render


def probed(points: int = 40):
    rng = np.random.default_rng(0)
    norm = 10 ** np.linspace(2, 0, points)
    series = {
        "step": list(range(10, 10 * points + 1, 10)),
        "grad_norm": [float(v) for v in norm],
        "smoothness": [float(v) for v in (2 + norm) * rng.uniform(0.5, 1, points)],
        "rows": points,
        "stride": 1,
    }
    fit = {
        "L0": {"value": 1.9, "details": {"interval": [1.2, 2.5]}},
        "L1": {"value": 0.95, "details": {"interval": [0.8, 1.1]}},
        "quantile": 0.9,
        "decision": "both",
        "advice": "clip, the threshold near L0/L1",
    }
    return samples.run(20, evals=False) | {"smoothness": {"series": series, "fit": fit, "message": ""}}


def panel(document) -> str:
    return render(document).partition('<figure id="fig-smoothness">')[2].partition("</figure>")[0]


def dots(found: str) -> int:
    """The dots of the wide drawing."""
    wide = found.partition('class="compact"')[0]
    return sum("<use" in element and "var(--series)" in element for element in wide.split("/>"))


def test_the_panel_shows_dots_line_and_words():
    found = panel(probed())
    for text in ("below which 90% of them lie", "L₀ = 1.9 (1.2 to 2.5)", "L₁ = 0.95 (0.8 to 1.1)", "no certificate"):
        assert text in found, text
    assert "In a word, both: clip, the threshold near L0/L1." in found
    assert found.count('class="wide"') == found.count('class="compact"') == 1
    assert dots(found) == 40
    assert len({part.partition('"')[0] for part in found.split("fill-opacity: ")[1:]} | {"1"}) >= 2
    assert "gradient norm</text>" in found
    assert ">line</text>" in found


def test_without_a_probe_there_is_no_panel():
    assert "fig-smoothness" not in render(samples.run(20, evals=False))


def test_without_a_fit_the_dots_stand_alone():
    document = probed()
    document["smoothness"] |= {"fit": None, "message": "3 of 3 could be used"}
    found = panel(document)
    assert "No line was fitted: 3 of 3 could be used." in found
    assert ">line</text>" not in found
    assert dots(found) == 40


@pytest.mark.parametrize("bad", [None, math.nan, 0.0, -1.0, math.inf, 1e308])
def test_odd_values_are_left_out(bad):
    document = probed()
    document["smoothness"]["series"]["smoothness"][3] = bad
    document["smoothness"]["series"]["grad_norm"][5] = bad
    assert "<svg" in panel(document)
    nothing = copy.deepcopy(document)
    nothing["smoothness"]["series"]["smoothness"] = [None] * 40
    assert "Nothing to draw" in panel(nothing)


@pytest.mark.parametrize("line", [(0.0, 0.95), (1.9, 0.0), (0.0, 0.0)])
def test_lines_along_the_edges(line):
    document = probed()
    for name, value in zip(("L0", "L1"), line):
        document["smoothness"]["fit"][name]["value"] = value
    assert "<svg" in panel(document)


def test_one_dot_is_enough():
    assert "<svg" in panel(probed(1))


def test_nonsense_is_refused():
    document = probed()
    document["smoothness"]["series"]["smoothness"] = [1.0]
    with pytest.raises(InputError, match=r"smoothness.series.smoothness: 1 values"):
        render(document)
