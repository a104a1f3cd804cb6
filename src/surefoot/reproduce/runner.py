"""Running a recipe: every finished run is at once a line of runs.jsonl, and a second call goes on from there."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.errors import InputError
from surefoot.reproduce.recipe import Arms, Experiment, Job, Recipe
from surefoot.reproduce.results import Results
from surefoot.reproduce.sources import Sources
from surefoot.train.config import unknown
from surefoot.train.files import write_bytes
from surefoot.train.job import fingerprint, repeatable
from surefoot.train.progress import duration

LINES = "runs.jsonl"
PAUSE = 30.0  # seconds between lines within a run
Key = tuple[str, str, int]  # experiment, part, seed


def chosen(recipe: Recipe, *, full: bool, only: Sequence[str]) -> list[Experiment]:
    """Return the experiments of a size, or those of them that are asked for.

    Raises:
        InputError: one is not known.
    """
    there = {e.name: e for e in (recipe.full if full else recipe.experiments)}
    for name in only:
        if name not in there:
            raise InputError(unknown("--only", name, list(there)))
    return [e for e in there.values() if not only or e.name in only]


def run(
    recipe: Recipe,
    out: Path,
    *,
    full: bool = False,
    seeds: int | None = None,
    only: Sequence[str] = (),
    sources: Sources | None = None,
    device: str = "cpu",
    threads: int | None = 1,
    tell: Callable[[str], object] = print,
) -> Results:
    """Do what is not done yet, seed after seed so that all experiments grow together, and return all results.

    Args:
        recipe: what to run.
        out: the folder of the results; made if it is not there.
        full: the paper's size.
        seeds: so many of each experiment; None: the recipe's number.
        only: names of experiments; () for all.
        sources: of the data; None: the hub.
        device: "cpu" or another, for the recipe.
        threads: of the CPU; results are repeated bit for bit at the same number.
        tell: told a line a run.

    Raises:
        InputError: a name that is not known, data that are missing or others than before, or runs in `out` that were
            made with other settings. Whatever is finished stays.
    """
    asked = chosen(recipe, full=full, only=only)
    seeds = recipe.seeds if seeds is None else seeds
    if seeds < 1:
        raise InputError(f"--seeds {seeds} is too small; give at least 1")
    sources = sources or Sources()
    sources.check(asked)
    everything = recipe.full if full else recipe.experiments
    lines = read_lines(out)
    _check_same(recipe, out, lines, everything)
    done = {_key(line) for line in lines}
    jobs = [(e, part, seed) for seed in range(seeds) for e in asked for part in e.parts]
    left = [job for job in jobs if (job[0].name, job[1], job[2]) not in done]
    if len(left) < len(jobs):
        tell(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
    out.mkdir(parents=True, exist_ok=True)
    with repeatable(threads):
        for i, (experiment, part, seed) in enumerate(left):
            data = sources.load(experiment)
            about = {} if data is None else {**data.summary(), "fingerprint": fingerprint(data)}
            about.pop("source", None)  # a path of this machine
            _check_data(out, lines, experiment, about)
            name = f"{experiment.name}{f' {part}' if part else ''}, seed {seed}"
            began = time.monotonic()
            arms = recipe.run(Job(experiment, part, seed, data, device, _Now(name, tell)))
            line = {
                "recipe": recipe.name,
                "experiment": experiment.name,
                "part": part,
                "seed": seed,
                "setting": experiment.digest(),
                "seconds": round(time.monotonic() - began, 2),
                "data": about,
                "arms": strict(arms),
            }
            _append(out / LINES, line)
            lines.append(line)
            spent = duration(line["seconds"]) + _time_left(lines, left[i + 1 :])
            tell(f"[{len(jobs) - len(left) + i + 1}/{len(jobs)}] {name}: {_scores(recipe, line['arms'])} ({spent})")
    there = {line["experiment"] for line in lines}
    return Results([e for e in everything if e.name in there], lines)


def read_lines(out: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a folder, each once; a last line that was cut short is taken away.

    Raises:
        InputError: the folder holds something else, or a line in the middle is damaged.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    path = out / LINES
    if not path.exists():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"--out {out} is not empty and holds no {LINES}; give another folder")
        return []
    content = path.read_bytes()
    whole, newline, torn = content.rpartition(b"\n")
    if torn:
        write_bytes(path, whole + newline)
    found: dict[Key, dict[str, Any]] = {}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            found.setdefault(_key(line), line)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--out {out}: line {number} of {LINES} is damaged; delete it, and it is run again"
            ) from error
    return list(found.values())


def strict(value: Any) -> Any:
    """Return a value that strict JSON can hold: "nan", "inf" and "-inf" as words."""
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------------------------


class _Now:
    """Tells how far a run is, at most every half minute."""

    def __init__(self, name: str, tell: Callable[[str], object]) -> None:
        self.name, self.tell, self.last = name, tell, time.monotonic()

    def __call__(self, how_far: str) -> None:
        if time.monotonic() - self.last >= PAUSE:
            self.last = time.monotonic()
            self.tell(f"  {self.name}: {how_far}")


def _scores(recipe: Recipe, arms: Arms) -> str:
    """Return the first column of the first table that an arm has, arm by arm."""
    table = recipe.tables[0]
    said = []
    for name in table.arms or arms:
        numbers = ((c.form, arms.get(name, {}).get(c.measure)) for c in table.columns)
        said += [f"{name} {value:{form}}" for form, value in numbers if isinstance(value, float | int)][:1]
    return ", ".join(said)


def _key(line: Mapping[str, Any]) -> Key:
    return line["experiment"], line["part"], line["seed"]


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _check_same(
    recipe: Recipe, out: Path, lines: Sequence[Mapping[str, Any]], experiments: Sequence[Experiment]
) -> None:
    digests = {e.name: e.digest() for e in experiments}
    for line in lines:
        if line["recipe"] != recipe.name:
            raise InputError(f"--out {out} holds runs of {line['recipe']}, not of {recipe.name}; give another folder")
        if digests.get(line["experiment"]) != line["setting"]:
            raise InputError(
                f"--out {out} holds runs of {line['experiment']} that were made with other settings (or --full); give "
                "another folder"
            )


def _check_data(
    out: Path, lines: Sequence[Mapping[str, Any]], experiment: Experiment, about: Mapping[str, Any]
) -> None:
    for line in lines:
        if line["experiment"] == experiment.name and line["data"].get("fingerprint") != about.get("fingerprint"):
            raise InputError(
                f"--out {out} holds runs of {experiment.name} on other data ({line['data']['train_rows']:,} + "
                f"{line['data']['test_rows']:,} rows, now {about['train_rows']:,} + {about['test_rows']:,}); give "
                "another folder, or the same data"
            )


def _time_left(lines: Sequence[Mapping[str, Any]], left: Sequence[tuple[Experiment, str, int]]) -> str:
    """Return how long the rest takes, once each experiment in it has been seen."""
    seen: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        seen.setdefault((line["experiment"], line["part"]), []).append(line["seconds"])
    if not left or any((e.name, part) not in seen for e, part, _ in left):
        return ""
    total = sum(sum(seen[e.name, part]) / len(seen[e.name, part]) for e, part, _ in left)
    return f", {duration(total)} left"
