"""What is told of the runs: tables, verdict, JSON, figures."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from reproduce_toy import toy

from surefoot.reproduce.figures import svg
from surefoot.reproduce.recipe import Finding, overall
from surefoot.reproduce.report import rows, write
from surefoot.reproduce.results import Results, summary
from surefoot.reproduce.runner import run

WHERE = {"processor": "a processor", "threads": 1, "torch": "2", "surefoot": "0"}


def finished(out: Path, *, worse: float = 0.05) -> Any:
    recipe = toy(worse=worse)
    return recipe, run(recipe, out, tell=lambda _: None)


def test_mean_and_standard_error() -> None:
    found = summary([1.0, 2.0, 6.0])
    assert found is not None
    assert found.mean == 3.0
    assert found.error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert summary([]) is None
    alone = summary([4.0])
    assert alone is not None
    assert alone.error is None


def test_differences_are_paired_by_seed() -> None:
    experiments = toy().experiments[:1]
    lines = [
        {"experiment": "first", "seed": seed, "part": "", "arms": {"a": {"score": a}, "b": {"score": a + 0.5}}}
        for seed, a in enumerate([0.0, 10.0, 20.0])
    ]
    lines.append({"experiment": "first", "seed": 3, "part": "", "arms": {"a": {"score": 99.0}}})
    d = Results(experiments, lines).difference("first", "b", "a", "score")
    assert d is not None
    assert (d.mean, d.error, d.n) == (0.5, 0.0, 3)


def test_tables_have_means_words_and_no_empty_column(tmp_path: Path) -> None:
    recipe, results = finished(tmp_path)
    header, body = rows(recipe.tables[0], results)
    assert header == ["experiment", "arm", "seeds", "score", "word"]
    assert body[0] == ["first", "a", "3", "0.51 ± 0.01", "yes"]
    assert body[3] == ["second", "b", "3", "0.46 ± 0.01", "yes 2, no 1"]
    header, body = rows(replace(recipe.tables[0], arms=("b",)), results)
    assert header[:2] == ["experiment", "seeds"]
    assert len(body) == 2


def test_the_files_say_the_same(tmp_path: Path) -> None:
    recipe, results = finished(tmp_path)
    write(recipe, results, tmp_path, full=False, where=WHERE)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    document = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert document["verdict"] == "reproduced"
    assert document["size"] == "scaled down"
    assert document["experiments"]["second"]["arms"]["b"]["score"]["n"] == 3
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# toy, scaled down: reproduced\n")
    for text in (recipe.claim, recipe.tolerance, "0.46 ± 0.01", "scores.svg", "| worse | 0.05 | ours |"):
        assert text in page
    ElementTree.fromstring((tmp_path / "scores.svg").read_bytes())


def test_the_full_size_says_so(tmp_path: Path) -> None:
    recipe = toy()
    write(recipe, run(recipe, tmp_path, full=True, tell=lambda _: None), tmp_path, full=True, where=WHERE)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# toy, full size: reproduced\n")
    assert "surefoot reproduce toy --full" in page
    assert "| worse | 0.06 | ours |" in page


def test_a_negative_result_stays_one(tmp_path: Path) -> None:
    recipe, results = finished(tmp_path, worse=0.2)
    findings = write(recipe, results, tmp_path, full=False, where=WHERE)
    assert [f.outcome for f in findings] == ["reproduced", "not reproduced"]
    assert (tmp_path / "report.md").read_text().startswith("# toy, scaled down: not reproduced\n")


def test_what_cannot_be_tested_decides_nothing() -> None:
    yes, no, open_ = (Finding("", o, "") for o in ("reproduced", "not reproduced", "not testable here"))
    assert overall([yes, open_]) == "reproduced"
    assert overall([yes, no, open_]) == "not reproduced"
    assert overall([open_]) == overall([]) == "not testable here"


def test_figures_do_not_depend_on_the_user(tmp_path: Path) -> None:
    import matplotlib

    recipe, results = finished(tmp_path)
    plain = svg(recipe.drawings[0], results)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 40}):
        assert svg(recipe.drawings[0], results) == plain
        assert matplotlib.rcParams["font.size"] == 40
