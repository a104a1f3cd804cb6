"""Runs are kept one by one, a second call goes on, and what does not fit together is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from reproduce_toy import numbers, toy

from surefoot.errors import InputError
from surefoot.reproduce.recipe import Arms, Experiment, Job
from surefoot.reproduce.runner import LINES, read_lines, run
from surefoot.reproduce.sources import Sources


def quiet(_line: str) -> None:
    """Say nothing."""


def counted() -> tuple[list[tuple[str, str, int]], "Counted"]:
    calls: list[tuple[str, str, int]] = []
    return calls, Counted(calls)


class Counted:
    """The toy's run, noting its calls; with `stop` it is interrupted after so many."""

    def __init__(self, calls: list[tuple[str, str, int]], stop: int | None = None) -> None:
        self.calls, self.stop = calls, stop

    def __call__(self, job: Job) -> Arms:
        if self.stop is not None and len(self.calls) >= self.stop:
            raise KeyboardInterrupt
        self.calls.append((job.experiment.name, job.part, job.seed))
        return numbers(job)


def test_every_run_is_a_line_and_seeds_go_round(tmp_path: Path) -> None:
    calls, go = counted()
    told: list[str] = []
    results = run(toy(go), tmp_path / "out", tell=told.append)
    assert calls[:3] == [("first", "", 0), ("second", "a", 0), ("second", "b", 0)]
    assert len(calls) == len(read_lines(tmp_path / "out")) == len(told) == 9
    assert results.by_seed("second", "b", "score") == pytest.approx({0: 0.45, 1: 0.46, 2: 0.47})
    assert json.loads((tmp_path / "out" / LINES).read_text().splitlines()[0])["arms"]["a"]["curve"] == [1.0, "inf"]


def test_a_long_run_says_now_and_then_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(job: Job) -> Arms:
        for step in range(3):
            job.progress(f"step {step}")
        return numbers(job)

    told: list[str] = []
    run(toy(go), tmp_path / "quiet", only=["first"], seeds=1, tell=told.append)
    assert told == ["[1/1] first, seed 0: a 0.50, b 0.50 (0s)"]
    monkeypatch.setattr("surefoot.reproduce.runner.PAUSE", 0.0)
    run(toy(go), tmp_path / "loud", only=["first"], seeds=1, tell=told.append)
    assert told[1:4] == [f"  first, seed 0: step {step}" for step in range(3)]


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    calls, go = counted()
    go.stop = 4
    with pytest.raises(KeyboardInterrupt):
        run(toy(go), tmp_path, tell=quiet)
    assert len(read_lines(tmp_path)) == 4
    go.stop = None
    results = run(toy(go), tmp_path, tell=quiet)
    assert len(calls) == len(set(calls)) == 9
    whole = run(toy(), tmp_path / "whole", tell=quiet)
    assert [line["arms"] for line in results.lines] == [line["arms"] for line in whole.lines]


def test_a_killed_process_loses_one_run_at_most(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; from reproduce_toy import slowly, toy; from surefoot.reproduce.runner import run\n"
        "run(toy(slowly), Path(sys.argv[1]), seeds=1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline().startswith("[")
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with (tmp_path / LINES).open("ab") as file:  # as if the kill had come while a line was written
        file.write(b'{"recipe": "toy", "experim')
    before = len(read_lines(tmp_path))
    assert before >= 5
    calls, go = counted()
    run(toy(go), tmp_path, seeds=before, tell=quiet)
    assert len(calls) == 3 * before - before


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_line_is_run_again(tmp_path: Path, cut: int) -> None:
    run(toy(), tmp_path, tell=quiet)
    path = tmp_path / LINES
    path.write_bytes(path.read_bytes()[:-cut])
    calls, go = counted()
    run(toy(go), tmp_path, tell=quiet)
    assert calls == [("second", "b", 2)]
    assert len(read_lines(tmp_path)) == 9


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run(toy(), tmp_path, tell=quiet)
    lines = (tmp_path / LINES).read_text().splitlines()
    lines[3] = lines[3][:40]
    (tmp_path / LINES).write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"line 4 of runs\.jsonl is damaged"):
        run(toy(), tmp_path, tell=quiet)


def test_only_adds_to_what_is_there(tmp_path: Path) -> None:
    first = run(toy(), tmp_path, only=["first"], seeds=2, tell=quiet)
    assert [e.name for e in first.experiments] == ["first"]
    both = run(toy(), tmp_path, only=["second"], seeds=1, tell=quiet)
    assert [e.name for e in both.experiments] == ["first", "second"]
    assert both.seeds("first") == [0, 1]
    assert both.seeds("second") == [0]


def test_full_is_another_set_of_experiments(tmp_path: Path) -> None:
    results = run(toy(), tmp_path, full=True, tell=quiet)
    assert results.by_seed("first", "b", "score")[0] == pytest.approx(0.44)
    with pytest.raises(InputError, match="first that were made with other settings"):
        run(toy(), tmp_path, tell=quiet)


def test_other_settings_are_refused_and_nothing_is_run(tmp_path: Path) -> None:
    run(toy(), tmp_path, tell=quiet)
    before = (tmp_path / LINES).read_bytes()
    calls, go = counted()
    with pytest.raises(InputError, match="second that were made with other settings"):
        run(toy(go, worse=0.2), tmp_path, seeds=9, tell=quiet)
    assert not calls
    assert (tmp_path / LINES).read_bytes() == before


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'secnd' is not known \(did you mean second\?\)"):
        run(toy(), tmp_path / "out", only=["secnd"], tell=quiet)
    with pytest.raises(InputError, match="--seeds 0 is too small"):
        run(toy(), tmp_path / "out", seeds=0, tell=quiet)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and holds no runs\.jsonl"):
        run(toy(), tmp_path, tell=quiet)
    with pytest.raises(InputError, match="is a file"):
        run(toy(), tmp_path / "file", tell=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_runs_of_another_recipe_are_refused(tmp_path: Path) -> None:
    run(toy(), tmp_path, tell=quiet)
    text = (tmp_path / LINES).read_text().replace('"recipe": "toy"', '"recipe": "other"')
    (tmp_path / LINES).write_text(text)
    with pytest.raises(InputError, match="holds runs of other, not of toy"):
        run(toy(), tmp_path, tell=quiet)


def test_data_come_from_the_root_and_must_stay_the_same(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "uci").mkdir(parents=True)
    table = root / "uci" / "t.csv"
    table.write_text("a,y\n" + "".join(f"{i},{i * i}.5\n" for i in range(30)))
    seen = []

    def go(job: Job) -> Arms:
        assert job.data is not None
        seen.append(len(job.data.train_x))
        return numbers(job)

    experiment = Experiment("t", local=("elsewhere.csv", "uci/t.csv"), options={"target": "y"}, setting={"worse": 0.0})
    recipe = replace(toy(go), experiments=(experiment,))
    run(recipe, tmp_path / "out", seeds=1, sources=Sources(root), tell=quiet)
    line = read_lines(tmp_path / "out")[0]
    assert seen == [24]
    assert line["data"]["train_rows"] == 24
    assert str(tmp_path) not in json.dumps(line)
    table.write_text(table.read_text() + "99,1.5\n")
    with pytest.raises(InputError, match=r"runs of t on other data \(24 \+ 6 rows, now 25 \+ 6\)"):
        run(recipe, tmp_path / "out", seeds=2, sources=Sources(root), tell=quiet)
    with pytest.raises(InputError, match=r"--data-root is needed for t is looked for as elsewhere\.csv or uci/t\.csv"):
        run(recipe, tmp_path / "new", tell=quiet)
    with pytest.raises(InputError, match="lacks some data"):
        run(recipe, tmp_path / "new", sources=Sources(tmp_path / "out"), tell=quiet)
    with pytest.raises(InputError, match="is not a folder"):
        Sources(tmp_path / "nowhere")
    assert not (tmp_path / "new").exists()
