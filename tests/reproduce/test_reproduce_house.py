"""The command, the recipes that there are, and their folders."""

import json
from pathlib import Path

import pytest
from reproduce_toy import toy

from surefoot.cli.main import main
from surefoot.reproduce.recipe import Arms, Job, Recipe
from surefoot.reproduce.recipes import names, recipe
from surefoot.reproduce.report import write
from surefoot.reproduce.results import Results
from surefoot.reproduce.runner import _check_same, read_lines

HOUSE = Path(__file__).parents[2] / "reproductions"


@pytest.fixture(params=names())
def found(request: pytest.FixtureRequest) -> Recipe:
    return recipe(request.param)


def test_there_are_recipes() -> None:
    assert "explore-exploit" in names()


def test_a_recipe_is_complete(found: Recipe) -> None:
    assert found.name in names()
    assert found.experiments
    assert found.full
    assert all((found.paper, found.claim, found.scaled, found.tolerance))
    assert all(s.name and s.value and s.source for s in found.settings)
    for size in (found.experiments, found.full):
        assert len({e.name for e in size}) == len(size)
        assert len({e.digest() for e in size}) == len(size)


def words(text: str) -> str:
    return " ".join(text.replace("\n> ", " ").split())


def test_its_folder_states_claim_and_tolerance(found: Recipe) -> None:
    folder = found.folder or found.name
    page = words((HOUSE / folder / "README.md").read_text(encoding="utf-8"))
    assert words(found.tolerance) in page
    assert f"surefoot reproduce {found.name}" in page
    assert f"({folder}/README.md)" in (HOUSE / "README.md").read_text(encoding="utf-8")


def test_committed_results_are_of_this_recipe(found: Recipe, tmp_path: Path) -> None:
    folder = HOUSE / found.folder / "results" / found.name if found.folder else HOUSE / found.name / "results"
    if not (folder / "results.json").is_file():
        pytest.skip("no finished results are there yet")
    lines = read_lines(folder)
    _check_same(found, folder, lines, found.experiments)
    there = {line["experiment"] for line in lines}
    results = Results([e for e in found.experiments if e.name in there], lines)
    where = json.loads((folder / "results.json").read_text())["environment"]
    write(found, results, tmp_path, full=False, where=where)
    for name in ("results.json", "report.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), f"{name} is not what runs.jsonl gives"


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    assert "explore-exploit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["explore-explot"], "recipe 'explore-explot' is not known (did you mean explore-exploit?)"),
        (["explore-exploit", "--only", "digit"], "--only 'digit' is not known (did you mean digits?)"),
        (["explore-exploit", "--seeds", "0"], "--seeds 0 is too small"),
        (["explore-exploit", "--threads", "0"], "--threads 0 is too small"),
        (["explore-exploit", "--device", "abacus"], "--device abacus cannot be used"),
        (["explore-exploit", "--data-root", "nowhere"], "--data-root nowhere is not a folder"),
        (["explore-exploit", "--only", "digits", "concrete"], "concrete is looked for as uci/concrete.csv"),
    ],
)
def test_requests_that_make_no_sense(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_ends_in_a_verdict_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("surefoot.cli.reproduce.recipe", lambda _name: toy(worse=0.2))
    out = tmp_path / "out"
    assert main(["reproduce", "toy", "--out", str(out), "--seeds", "1"]) == 1
    said = capsys.readouterr().out
    assert "claim: b is no worse than a" in said
    assert "[3/3] second b, seed 0: b 0.30 (0s)" in said
    assert "not reproduced: b is no worse than a" in said
    assert main(["reproduce", "toy", "--out", str(out)]) == 1
    assert "3 of 9 runs are there already" in capsys.readouterr().out
    assert {"report.md", "results.json", "runs.jsonl", "scores.svg"} == {p.name for p in out.iterdir()}
    monkeypatch.setattr("surefoot.cli.reproduce.recipe", lambda _name: toy())
    assert main(["reproduce", "toy", "--out", str(tmp_path / "good")]) == 0


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_job: Job) -> Arms:
        raise KeyboardInterrupt

    monkeypatch.setattr("surefoot.cli.reproduce.recipe", lambda _name: toy(stop))
    assert main(["reproduce", "toy", "--out", str(tmp_path / "out")]) == 130
    assert f"the same command with --out {tmp_path / 'out'} goes on" in capsys.readouterr().out
