"""What a recipe came to, as results.json, report.md and figures beside the claim."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surefoot.reproduce.figures import svg
from surefoot.reproduce.recipe import Column, Finding, Recipe, Table, overall
from surefoot.reproduce.results import Results, Summary
from surefoot.reproduce.runner import strict
from surefoot.train.files import write_bytes

SIZES = {False: "scaled down", True: "full size"}


def write(recipe: Recipe, results: Results, out: Path, *, full: bool, where: dict[str, Any]) -> list[Finding]:
    """Write results.json, report.md and the figures into `out`, and return the findings.

    Args:
        recipe: what was run.
        results: of it.
        out: the folder.
        full: whether it was the paper's size.
        where: the environment, plain values.
    """
    findings = recipe.judge(results)
    for drawing in recipe.drawings:
        write_bytes(out / f"{drawing.name}.svg", svg(drawing, results))
    document = {
        "format": "surefoot-reproduction",
        "version": 1,
        "recipe": recipe.name,
        "paper": recipe.paper,
        "claim": recipe.claim,
        "size": SIZES[full],
        "tolerance": recipe.tolerance,
        "verdict": overall(findings),
        "findings": [vars(finding) for finding in findings],
        "environment": where,
        "experiments": {e.name: _experiment(e.name, dict(e.setting), results) for e in results.experiments},
    }
    text = json.dumps(strict(document), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(out / "results.json", text.encode())
    write_bytes(out / "report.md", markdown(recipe, results, findings, full=full, where=where).encode())
    return findings


def rows(table: Table, results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table, in words."""
    kept = [c for c in table.columns if any(_cell(results, e.name, a, c) for e, a in _lines(table, results))]
    named = len(table.arms) != 1
    header = ["experiment", *(["arm"] if named else []), "seeds", *(c.title for c in kept)]
    body = []
    for experiment, arm in _lines(table, results):
        cells = [_cell(results, experiment.name, arm, c) for c in kept]
        if any(cells):
            seeds = len({line["seed"] for line in results.lines if _has(line, experiment.name, arm)})
            body.append([experiment.name, *([arm] if named else []), str(seeds), *(cell or "–" for cell in cells)])
    return header, body


def markdown(
    recipe: Recipe, results: Results, findings: Sequence[Finding], *, full: bool, where: dict[str, Any]
) -> str:
    """Return the report as Markdown."""
    command = f"surefoot reproduce {recipe.name}{' --full' if full else ''}"
    seconds = sum(line["seconds"] for line in results.lines)
    parts = [
        f"# {recipe.name}, {SIZES[full]}: {overall(list(findings))}",
        f"Paper: {recipe.paper}",
        f"**Claim.** {recipe.claim}",
        f"**Tolerance, fixed before the run.** {recipe.tolerance}",
        "## Verdict",
        _grid(["what", "verdict", "why"], [[f.what, f.outcome, f.reason] for f in findings]),
    ]
    for table in recipe.tables:
        header, body = rows(table, results)
        if body:
            parts += [f"## {table.title}", _grid(header, body)]
    parts.append("Mean ± standard error over the seeds; of words, how often each came.")
    parts += [f"![{d.caption}]({d.name}.svg)\n\n{d.caption}" for d in recipe.drawings]
    parts += [
        "## Settings",
        _grid(
            ["setting", "here", "source"],
            [[s.name, s.full or s.value if full else s.value, s.source] for s in recipe.settings],
        ),
        "## Data",
        _grid(
            ["experiment", "data", "training rows", "test rows"], [_data(e.name, results) for e in results.experiments]
        ),
        "## How it was run",
        f"`{command}`; {len(results.lines)} runs, {seconds / 60:.0f} minutes by the clock on {where['processor']} with "
        f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}, torch {where['torch']}, surefoot "
        f"{where['surefoot']}. The runs themselves are in runs.jsonl, the numbers of this page in results.json.",
    ]
    if not full:
        parts.append(f"Scaled down: {recipe.scaled}")
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------------------------


def _lines(table: Table, results: Results) -> list[tuple[Any, str]]:
    return [
        (e, arm)
        for e in results.experiments
        for arm in (table.arms or results.arms(e.name))
        if arm in results.arms(e.name)
    ]


def _has(line: Any, experiment: str, arm: str) -> bool:
    return line["experiment"] == experiment and arm in line["arms"]


def _cell(results: Results, experiment: str, arm: str, column: Column) -> str:
    values = list(results.by_seed(experiment, arm, column.measure).values())
    if not values:
        return ""
    if any(isinstance(v, str) for v in values):
        counts = results.words(experiment, arm, column.measure)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{word} {n}" for word, n in counts.most_common())
    found = results.summary(experiment, arm, column.measure)
    assert found is not None
    return number(found, column.form)


def number(found: Summary, form: str) -> str:
    """Return a mean with its standard error.

    Example:
        >>> number(Summary(0.5, 0.01, 5), ".1%")
        '50.0% ± 1.0%'
    """
    if not found.error or not math.isfinite(found.error):
        return f"{found.mean:{form}}" if found.mean else "0"
    return f"{found.mean:{form}} ± {found.error:{form}}"


def _experiment(name: str, setting: dict[str, Any], results: Results) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for arm in results.arms(name):
        measures = dict.fromkeys(m for line in results.lines if _has(line, name, arm) for m in line["arms"][arm])
        arms[arm] = {m: _measure(results, name, arm, m) for m in measures}
    data = next(line["data"] for line in results.lines if line["experiment"] == name)
    return {"data": data, "setting": setting, "seeds": results.seeds(name), "arms": arms}


def _measure(results: Results, experiment: str, arm: str, measure: str) -> Any:
    values = list(results.by_seed(experiment, arm, measure).values())
    if not values or any(isinstance(v, list) for v in values):
        return None  # curves are in runs.jsonl
    if any(isinstance(v, str) for v in values):
        return dict(results.words(experiment, arm, measure))
    found = results.summary(experiment, arm, measure)
    assert found is not None
    return {"mean": found.mean, "standard_error": found.error, "n": found.n}


def _data(name: str, results: Results) -> list[str]:
    data = next(line["data"] for line in results.lines if line["experiment"] == name)
    if not data:
        return [name, "none", "–", "–"]
    return [name, data["name"], f"{data['train_rows']:,}", f"{data['test_rows']:,}"]


def _grid(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
