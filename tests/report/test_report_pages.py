"""Documents of every kind, the odd ones above all, and what their pages say."""

import copy
import html
import re
import stat
from html.parser import HTMLParser

import pytest
import report_samples as samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surefoot.errors import InputError
from surefoot.report import render, write_report

VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and keeps the text and the attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.figures: list[str] = []
        self.labels: list[str] = []
        self.parts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(name, value or "") for name, value in attrs]
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "figure":
            self.figures.append(found["id"])
        if found.get("role") == "img":
            self.labels.append(found["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)


def page(document) -> Page:
    source = render(document)
    parsed = Page(source)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert all(parsed.labels)
    assert "script" not in re.findall(r"<\s*([a-zA-Z]+)", source)
    assert "://" not in re.sub(r"<(main)>.*</main>", "", source, flags=re.S)
    for name, value in parsed.attributes:
        if name in ("href", "src", "xlink:href", "action", "srcset", "data", "poster"):
            assert value.startswith(("#", "data:"))
        assert not name.startswith("on")
    assert "#01" not in source.partition("</style>")[2]  # no stand-in colour is left
    return parsed


RUN_FIGURES = ["fig-regimes", "fig-loss", "fig-evals", "fig-norm", "fig-multiplier", "fig-step-length"]


def test_a_run_shows_everything():
    document = samples.run(skipped=(300, 301, 900))
    assert document["regimes"]["unclipped"]
    assert document["regimes"]["clipped"]
    assert document["regimes"]["floored"]
    found = page(document)
    assert found.figures == RUN_FIGURES
    for text in (
        "mlp on digits, delta-gclip",
        "52,650 parameters",
        "1,437 training rows, 360 test rows",
        "h = η · min{1, max{δ, γ/‖g‖}}",
        "final train loss",
        "12.3 s",
        "4,313",
        "Which regime the 1,500 steps were in",
        "3 steps were skipped for a gradient that was not finite.",
        "The step length is exactly ηγ.",
        "running median over 25",
        "Linux-6.8.0-x86_64-with-glibc2.39",
        "The learning rate follows a cosine",
        "γ/δ",
        "ηδ",
    ):
        assert text in found.text, text
    assert f"{100 * document['summary']['primary']['value']:.2f}%" in found.text


def test_size_and_determinism():
    document = samples.run(2000, skipped=(7,), evals=False)
    first = render(document)
    assert len(first.encode()) < 700_000
    assert render(copy.deepcopy(document)) == first


def test_matplotlib_is_left_as_it_was():
    import matplotlib

    matplotlib.rcParams["lines.linewidth"] = 7.5
    before = dict(matplotlib.rcParams)
    thick = render(samples.run(20, evals=False))
    assert dict(matplotlib.rcParams) == before
    matplotlib.rcParams["lines.linewidth"] = 1.5
    assert render(samples.run(20, evals=False)) == thick


def test_the_document_is_left_as_it_was():
    for document in (samples.run(20, evals=False), samples.comparison(2, steps=10)):
        before = copy.deepcopy(document)
        render(document)
        assert document == before


def test_no_steps():
    found = page(samples.run(0))
    assert found.figures == ["fig-regimes"]
    assert "No steps were taken." in found.text


def test_a_single_step_is_a_dot():
    found = page(samples.run(1))
    assert found.figures == RUN_FIGURES
    assert "Which regime the step was in" in found.text


def test_nothing_but_a_format():
    assert "No steps were taken." in page({"format": "surefoot.run", "version": 1}).text
    assert "No arm ended" in page({"format": "surefoot.comparison", "version": 1}).text


@pytest.mark.parametrize("status", ["diverged", "interrupted", "running", "failed"])
def test_an_unfinished_run_says_so(status):
    document = samples.run(0) | {"status": status, "message": "The loss was not finite at step 5."}
    text = page(document).text
    assert "This run" in text
    assert "The loss was not finite at step 5." in text
    assert "This run" not in page(samples.run(0)).text


def test_every_number_missing():
    document = samples.run(40)
    for column in document["series"]:
        if column not in ("step", "rows", "stride"):
            document["series"][column] = [None] * 40
    document["summary"] = dict.fromkeys(document["summary"])
    document["evals"] = {"step": [10, 20], "epoch": [None, None], "test_loss": [None, None]}
    found = page(document)
    assert "fig-evals" not in found.figures
    assert found.text.count("Nothing to draw: no finite value was recorded.") == 4


def test_infinite_values_are_gaps():
    document = samples.run(30, evals=False)
    for column in ("loss", "grad_norm", "scale", "step_length"):
        document["series"][column][3:27] = [float("nan"), float("inf"), None] * 8
        document["series"][column][15] = 1e308
        document["series"][column][16] = -1e308
    page(document)


def test_thinned_series_says_so():
    document = samples.run(300, evals=False)
    document["series"] |= {"rows": 899, "stride": 3}
    assert "Every 3rd of 899 steps is shown." in page(document).text
    assert "is shown." not in page(samples.run(300, evals=False)).text


def test_the_threshold_may_move():
    document = samples.run(50, evals=False)
    document["series"]["gamma"] = [1.0 + 0.1 * i for i in range(50)]
    document["series"]["delta"] = [None, 0.0, *([0.1] * 48)]
    document["series"]["gamma"][7] = None
    assert "1 → 5.9" in page(document).text


def _counts(document, **counts):
    document["regimes"] = {"unclipped": 0, "clipped": 0, "floored": 0, "skipped": 0, **counts}
    return page(document).text


def test_the_sentence_says_what_the_regimes_mean():
    document = samples.run(0)  # without steps there is nothing to draw: quick
    text = _counts(document, clipped=1500)
    assert "Every step was clipped: this is normalised gradient descent: every step has length η·γ." in text
    assert "The floor δ never acted: the run is plain clipping." in text
    assert "Nearly every step was clipped" in _counts(document, clipped=1499, floored=1)
    assert "this is plain gradient descent" in _counts(document, unclipped=10)
    assert "small learning rate η·δ" in _counts(document, floored=10)
    assert "25% were unclipped and 75% clipped" in _counts(document, unclipped=1, clipped=3)
    assert "Every step was skipped" in _counts(document, skipped=3)
    momentum = samples.run(0, config={"momentum": 0.9})
    text = _counts(momentum, clipped=10)
    assert "every scaled gradient has length η·γ" in text
    assert "exactly ηγ (dashed)" not in text
    assert "momentum μ = 0.9" in text


def test_plain_optimizers_have_no_thresholds():
    text = page(samples.run(50, evals=False, optimizer="adamw", gamma=None, delta=None)).text
    assert "This run had no threshold." in text
    assert "every step was made with the full learning rate" in text
    assert "γ" not in text
    assert "β" not in text


def test_infinite_threshold_is_gradient_descent():
    text = page(samples.run(50, evals=False, gamma=None, delta=0.1)).text
    assert "This rule has no threshold" in text
    assert "γ/δ" not in text


def test_clipping_before_another_optimizer():
    text = page(samples.run(50, evals=False, optimizer="adamw")).text
    assert "η · AdamW(g · min{1, max{δ, γ/‖g‖}})" in text
    assert "AdamW sees a gradient of norm exactly γ." in text
    assert "step length is exactly" not in text


def test_normalized_and_smooth_have_their_own_thresholds():
    text = page(samples.run(50, evals=False, optimizer="normalized-gd", delta=None, config={"beta": 1.0})).text
    assert "h = η / (‖g‖ + β)" in text
    assert "β plays the part of the threshold" in text
    assert "γ" not in text
    text = page(samples.run(50, evals=False, optimizer="smooth-clip", delta=None, config={"L0": 2.0, "L1": 2.0})).text
    assert "h = η / (L₀ + L₁‖g‖)" in text
    assert "L₀/L₁" in text
    assert "η/L₁" in text
    assert "γ" not in text


def test_gclip_has_no_floor():
    text = page(samples.run(50, evals=False, optimizer="gclip", delta=0.0)).text
    assert "h = η · min{1, γ/‖g‖}" in text
    assert "This run had no floor (δ = 0)." in text
    assert "γ/δ" not in text


@pytest.mark.parametrize("make", [lambda: samples.run(12), lambda: samples.comparison(2, steps=12)])
def test_everything_is_escaped(make):
    bad = "<script>alert(1)</script>\"'&<b>"
    document = make()
    document |= {"title": bad, "status": bad, "message": bad, "notes": [bad]}
    for part in ("config", "environment", "data", "model"):
        document[part] = {bad: bad, "name": bad, "optimizer": bad, "task": bad, "input_shape": [bad], "outputs": bad}
    document["metric"] = {"name": bad}
    for arm in document.get("arms", []):
        arm |= {"name": bad, "settings": {bad: bad}, "failed": [{"seed": bad, "message": bad}]}
    if "summary" in document:
        document["summary"] |= {"primary": {"name": bad, "value": 1}, "steps": bad, "evaluation": {bad: bad}}
        document["evals"][bad] = document["evals"]["test_loss"]
    source = render(document)
    assert "<script" not in source
    assert "<b>" not in source.replace("<b>surefoot</b>", "").replace("<b>unclipped", "").replace(
        "<b>clipped", ""
    ).replace("<b>floored", "").replace("<b>skipped", "")
    assert html.escape(bad, quote=False).split('"')[0] in source
    page(document)


@pytest.mark.parametrize("name", ["\x00\x01", "\ud800", "损失", "a$b$c", "\n"])
def test_odd_letters(name, tmp_path):
    document = samples.run(12)
    document |= {"title": name, "series": {}}
    document["evals"][name] = document["evals"]["test_loss"]
    write_report(document, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8")


def test_comparison_shows_every_arm():
    document = samples.comparison(3)
    found = page(document)
    assert found.figures == ["fig-loss", "fig-metric"]
    assert "arms" in found.ids
    for text in (
        "best test accuracy, higher is better",
        "97.20 ± 0.18%",
        "adamw",
        "seed 3 failed: the loss was not finite at step 212",
        "5, 1 failed",
        "unclipped 31%, clipped 52%, floored 17%",
    ):
        assert text in found.text, text


def _verdict(first, second, *, higher=True, seeds=5):
    document = samples.comparison(2, steps=8)
    document["metric"] = {"name": "test loss", "higher_is_better": higher, "percent": False}
    for arm, (mean, se) in zip(document["arms"], (first, second)):
        arm |= {"metric": {"mean": mean, "se": se}, "seeds": list(range(seeds)), "curves": {}, "eval_curves": {}}
    found = page(document).text
    return found.partition("is better ")[2][:420]


def test_headline_is_honest():
    assert _verdict((0.5, 0.01), (0.4, 0.01)).startswith("delta-gclip")
    assert _verdict((0.5, 0.01), (0.4, 0.01), higher=False).startswith("adamw")
    assert "more than twice over" in _verdict((0.5, 0.01), (0.4, 0.01))
    assert "though by less than a factor of two" in _verdict((0.5, 0.03), (0.45, 0.01))
    assert "do not tell the two apart" in _verdict((0.5, 0.1), (0.45, 0.1))
    assert "With 2 seeds a standard error is itself rough." in _verdict((0.5, 0.01), (0.4, 0.01), seeds=2)
    assert "cannot be said" in _verdict((0.5, None), (0.4, None), seeds=1)
    assert "no other arm ended with a value" in _verdict((0.5, None), (None, None))


def test_arms_of_the_same_name_have_one_best():
    document = samples.comparison(2, steps=8)
    document["arms"][1]["name"] = document["arms"][0]["name"]
    assert render(document).count('class="badge"') == 1


def test_best_arm_with_failed_seeds_says_so():
    document = samples.comparison(2, steps=8)
    document["arms"][0]["failed"] = [{"seed": 4, "message": "diverged"}]
    assert "1 of its 5 seeds failed and is not in the mean." in page(document).text


def test_an_arm_with_nothing():
    document = samples.comparison(2, steps=8)
    document["arms"].append({"name": "hopeless", "failed": [{"seed": 0, "message": "diverged at once"}]})
    assert "diverged at once" in page(document).text


def test_long_comparison_stays_small():
    assert len(render(samples.comparison(6, steps=2000)).encode()) < 1_500_000


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "expected an object"),
        ({}, "format is None"),
        ({"format": "surefoot.ran", "version": 1}, "'surefoot.ran'"),
        ({"format": ["surefoot.run"], "version": 1}, "surefoot.comparison"),
        ({"format": "surefoot.run", "version": 2}, "version is 2"),
        ({"format": "surefoot.run"}, "version is None"),
        ({"format": "surefoot.run", "version": 1, "config": 3}, "config: expected an object, got 3"),
        ({"format": "surefoot.run", "version": 1, "notes": "a"}, "notes: expected a list"),
        (
            {"format": "surefoot.run", "version": 1, "series": {"step": [1, 2], "loss": [1]}},
            "series.loss: 1 values, but series.step has 2",
        ),
        ({"format": "surefoot.run", "version": 1, "series": {"step": [1], "loss": ["low"]}}, "series.loss"),
        ({"format": "surefoot.comparison", "version": 1, "arms": [1]}, r"arms\[0\]"),
        (
            {"format": "surefoot.comparison", "version": 1, "arms": [{"curves": {"step": [], "loss_mean": [1]}}]},
            r"arms\[0\].curves.loss_mean",
        ),
    ],
)
def test_nonsense_is_refused(document, says, tmp_path):
    with pytest.raises(InputError, match=says):
        write_report(document, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_file_is_replaced_whole(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    assert write_report(samples.run(0), target) == target
    before = target.read_text(encoding="utf-8")
    assert before == render(samples.run(0))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o400

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            write_report(samples.run(0) | {"title": "another"}, target)
    assert target.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    write_report(samples.run(0) | {"title": "another"}, target)
    assert target.read_text(encoding="utf-8") != before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist; create"):
        write_report(samples.run(0), tmp_path / "nowhere" / "report.html")


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'surefoot\[cli\]'"):
        render(samples.run(3))


any_number = st.one_of(st.none(), st.floats(), st.integers(-5, 5), st.sampled_from([0.0, 1.0, 1e-320, -1e308, 1e308]))
anything = st.one_of(any_number, st.text(max_size=4), st.booleans())


@st.composite
def random_run(draw):
    n, m = draw(st.integers(0, 6)), draw(st.integers(0, 3))
    column = st.lists(any_number, min_size=n, max_size=n)
    names = ("loss", "grad_norm", "lr", "gamma", "delta", "scale", "step_length")
    few = {name: draw(column) for name in draw(st.sets(st.sampled_from(names)))}
    regimes = st.sampled_from(["unclipped", "clipped", "floored", "skipped", "other", None])
    return {
        "format": "surefoot.run",
        "version": 1,
        "config": {
            "optimizer": draw(st.sampled_from(["delta-gclip", "adamw", "normalized-gd", "smooth-clip", "sgd", None])),
            **draw(st.dictionaries(st.sampled_from(["gamma", "delta", "lr", "beta", "L0", "L1"]), anything)),
        },
        "summary": draw(st.dictionaries(st.sampled_from(["steps", "seconds", "train_loss", "epochs"]), anything)),
        "regimes": draw(st.dictionaries(st.sampled_from(["unclipped", "clipped", "floored"]), any_number)),
        "series": {"step": list(range(n)), "regime": draw(st.lists(regimes, min_size=n, max_size=n)), **few},
        "evals": {"step": list(range(m)), "value": draw(st.lists(any_number, min_size=m, max_size=m))},
    }


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(random_run())
def test_any_run_renders(document):
    page(document)
