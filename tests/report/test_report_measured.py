"""What pages say of measurements: the table by kind and level, the figures, what was left out."""

import copy

import pytest
import report_samples as samples
from measured_samples import measurement, measurements
from test_report_pages import page

from surefoot.errors import InputError
from surefoot.report import render, write_report
from surefoot.report.measured import group_of, value_text

FIGURES = ["fig-spectrum", "fig-sharpness"]


def with_measurements(**changes):
    return samples.run(200) | {"measurements": measurements() | changes}


def test_a_run_shows_its_measurements():
    found = page(with_measurements())
    assert [f for f in found.figures if f in FIGURES] == FIGURES
    assert "measurements" in found.ids
    for text in (
        "Measured at the weights after step 1,500, in 41.3 s of the 60 s allowed.",
        "Verified bounds Every rounding error is counted",
        "≥ 8.1×10⁻⁴",
        "≤ 1,003.2",
        "≤ ∞",
        "≈ 3.410 ± 0.030",
        "= 2 exact by hand",
        "rows 3 and 17 are equal",
        "n = 512, seed 0, float64",
        "The 400 eigenvalues of K = JJᵀ, largest first, at 40 samples of 10 outputs each",
        "Dashed: the verified lower bound of the smallest.",
        "The last dot stands at 62% of 2/h = 5.5, its median over the last steps.",
        "tangent Gram on 40 of 1,437 samples 2.2h",
        "Eval mode: dropout is off",
    ):
        assert text in found.text, text


def test_a_run_without_measurements_says_nothing_of_them():
    text = page(samples.run(20)).text
    assert "What was measured" not in text


def test_measurements_alone():
    found = page(measurements())
    assert found.figures == FIGURES
    assert "52,650 parameters" in found.text
    assert "Which regime" not in found.text


def test_groups_stand_in_the_order_of_their_strength():
    text = page(measurements()).text
    titles = ["Exact Counted", "Verified bounds", "Exact up to rounding", "Estimates", "Assumed"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("kind", "level", "group"),
    [
        ("exact", "verified", "exact"),
        ("lower bound", "verified", "proved"),
        ("upper bound", "audited", "proved"),
        ("lower bound", "estimate", "rounded"),
        ("exact", "estimate", "rounded"),
        ("estimate", "estimate", "estimate"),
        ("assumed", "estimate", "assumed"),
    ],
)
def test_only_what_is_verified_stands_among_the_proofs(kind, level, group):
    assert group_of(measurement("x", 1.0, kind, level)) == group


def test_values_are_written_with_their_sign():
    assert value_text(measurement("x", "-inf", "lower bound")) == "≥ −∞"
    assert value_text(measurement("x", 2.5, "estimate")) == "≈ 2.5"
    assert value_text(measurement("x", 1438.0, "exact", unit="rows")) == "= 1,438 rows"


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (8.1e-4, "Dashed: the verified lower bound"),
        (-1e-9, "No positive lower bound of the smallest could be verified."),
        (None, "(computed in floating point)."),
    ],
)
def test_the_bound_is_drawn_where_there_is_one(bound, said):
    document = measurements()
    document["series"]["spectrum"]["bound"] = bound
    source = render(document)
    assert said in page(document).text
    assert (source.count(">bound<") == 2) == (bound == 8.1e-4)  # once in each size


def test_values_that_a_log_axis_cannot_show_are_counted():
    document = measurements()
    document["series"]["spectrum"]["value"][-3:] = [0.0, -1e-12, None]
    assert "2 values at or below 0 cannot be drawn." in page(document).text


def test_what_is_missing_is_left_away():
    found = page({"format": "surefoot.measurements", "version": 1})
    assert found.figures == []
    assert "measurements" not in found.ids
    document = measurements()
    document["series"] = {"sharpness": document["series"]["sharpness"]}
    assert page(document).figures == []


def test_the_document_is_left_as_it_was():
    document = with_measurements()
    before = copy.deepcopy(document)
    assert render(document) == render(document)
    assert document == before


def test_markup_in_a_name_is_text():
    document = measurements()
    document["measurements"][0]["name"] = "<script>1</script>"
    document["left_out"][0]["why"] = "<img src=x>"
    page(document)


@pytest.mark.parametrize(
    "changes",
    [{"version": 2}, {"format": "surefoot.run"}, {"measurements": [3]}, {"measurements": {}}, {"series": []}],
)
def test_another_form_is_refused(changes):
    with pytest.raises(InputError, match=r"measurements|series"):
        render(with_measurements(**changes))


@pytest.mark.browser
@pytest.mark.parametrize("alone", [False, True])
def test_page_is_whole_in_a_browser(browser, tmp_path, alone):
    path = write_report(measurements() if alone else with_measurements(), tmp_path / "report.html")
    for width in (1280, 900, 700, 390):
        for scheme in ("light", "dark"):
            browser.open(path, width=width, scheme=scheme)
            assert browser.script("return innerWidth") == width
            assert browser.script("return document.documentElement.scrollWidth") <= width
            for element in (*FIGURES, "measurements"):
                rectangle = f"document.getElementById('{element}').getBoundingClientRect()"
                box = browser.script(f"const b = {rectangle}; return [b.width, b.height]")
                assert min(box) > 50, (element, width, box)
    over = browser.script(
        """
        return [...document.querySelectorAll('#fig-spectrum > svg, #fig-sharpness > svg')].flatMap(svg => {
          const s = svg.getBoundingClientRect(), card = svg.parentElement.getBoundingClientRect();
          if (!s.height) return [];
          return [...svg.querySelectorAll('text')].filter(t => {
            const b = t.getBoundingClientRect();
            return b.left < card.left || b.right > card.right || b.top < s.top - 2 || b.bottom > s.bottom + 2;
          }).map(t => t.textContent);
        });
        """
    )
    assert over == []
    assert browser.console() == []
    assert [url for url in browser.requests() if not url.startswith("data:")][-1] == path.as_uri()
