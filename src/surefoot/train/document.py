"""The run folder read back as the one JSON document that the report shows."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from surefoot.errors import InputError
from surefoot.measure.smoothness_fit import POINTS, fit_smoothness
from surefoot.optim.telemetry import REGIMES
from surefoot.train.files import write_json
from surefoot.train.probing import observations
from surefoot.train.record import (
    CERTIFIED_COLUMNS,
    LAST_LAYER_COLUMNS,
    SMOOTHNESS_COLUMNS,
    STEP_COLUMNS,
    Table,
    json_number,
    thinned,
)

FORMAT, VERSION = "surefoot.run", 1
CERTIFIED = "certificate.json"
EXPLORED = "explored.json"


def read_run(folder: Path, option: str = "RUN") -> dict[str, Any]:
    """Return the run.json of a folder, or raise InputError naming `option`."""
    path = folder / "run.json"
    if not folder.is_dir():
        raise InputError(f"{option} {folder}: no such folder")
    if not path.is_file():
        raise InputError(f"{option} {folder} is not a run: it holds no run.json; give a folder that --out made")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document["format"], document["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{option} {folder}: run.json cannot be read ({error!r})") from error
    if found != (FORMAT, VERSION):
        raise InputError(f"{option} {folder} holds a {found[0]} of version {found[1]}, not a {FORMAT} of {VERSION}")
    return document


def update_run(
    folder: Path, head: dict[str, Any], metrics: Table, evals: Table, smoothness: Table | None = None
) -> dict[str, Any]:
    """Write run.json from its head (what does not follow from the rows) and the rows of a run; return it."""
    document = {**head, **_from_rows(head, metrics.columns, evals.columns), **_smoothness(head, smoothness)}
    write_json(folder / "run.json", document)
    return document


def rebuild_run(folder: Path, option: str = "RUN") -> dict[str, Any]:
    """Return the document of a run as its files stand now: also of one that was killed."""
    head = read_run(folder, option)
    metrics = Table(STEP_COLUMNS)
    evals = Table(tuple(head["evals"]))
    if (folder / "metrics.parquet").is_file():
        metrics.load(folder / "metrics.parquet", through=2**62)
        evals.load(folder / "evals.parquet", through=2**62)
    smoothness = None
    if (folder / "smoothness.parquet").is_file():
        smoothness = Table(SMOOTHNESS_COLUMNS)
        smoothness.load(folder / "smoothness.parquet", through=2**62)
    if head["status"] == "running":
        head["message"] = "not finished: still running, or killed"
    return {**head, **_from_rows(head, metrics.columns, evals.columns), **_smoothness(head, smoothness)}


def _smoothness(head: dict[str, Any], table: Table | None) -> dict[str, Any]:
    """Return what the probes saw and the line fitted to it, under the key "smoothness"; nothing without a table."""
    if table is None:
        return {}
    config = head["config"]
    found = observations(table)
    probed: dict[str, Any] = {"every": config["probe_smoothness"], "points": list(POINTS), "fit": None, "message": ""}
    cost = f"{len(POINTS) + 1} extra gradients every {config['probe_smoothness']} steps"
    dtype = "bfloat16" if config["autocast"] == "bf16" else config["dtype"]
    try:
        probed["fit"] = fit_smoothness(found, seed=config["seed"], dtype=dtype, cost=cost).to_json()
    except InputError as error:
        probed["message"] = str(error)
    shown = {name: values for name, values in table.columns.items() if name != "ratios"}
    return {"smoothness": {**probed, "series": thinned(shown)}}


def with_additions(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a run's document with what else its folder holds: measurements, a certificate, explore/exploit."""
    additions: dict[str, Any] = {}
    for key, name, again in (
        ("measurements", "measurements.json", "measure"),
        ("certificate", CERTIFIED, "certify"),
        ("explored", EXPLORED, "train"),
    ):
        path = folder / name
        if path.is_file():
            try:
                additions[key] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{path} cannot be read as JSON ({error}); delete it, or {again} again") from error
    if "certificate" in additions and (folder / "certified.parquet").is_file():
        table = Table(CERTIFIED_COLUMNS)
        table.load(folder / "certified.parquet", through=2**62)
        additions["certificate"]["series"] = _some(table)
    if "explored" in additions and (folder / "last_layer.parquet").is_file():
        table = Table(LAST_LAYER_COLUMNS)
        table.load(folder / "last_layer.parquet", through=2**62)
        additions["explored"]["series"] = _some(table)
    return {**document, **additions}


def _some(table: Table, most: int = 2000) -> dict[str, Any]:
    """Return at most so many rows of a table, evenly, the first and the last among them."""
    last = len(table) - 1
    stride = max(1, -(-last // (most - 1)))
    picked = [*range(0, last, stride), last] if last >= 0 else []
    return {name: [json_number(values[i]) for i in picked] for name, values in table.columns.items()}


def _from_rows(head: dict[str, Any], steps: dict[str, list[Any]], evals: dict[str, list[Any]]) -> dict[str, Any]:
    count = Counter(steps["regime"])
    regimes = {name: count.get(name, 0) for name in REGIMES}
    taken = [(n, h, r) for n, h, r in zip(steps["grad_norm"], steps["step_length"], steps["regime"]) if r != "skipped"]
    norms = [n for n, _, _ in taken if math.isfinite(n)]
    total = max(1, len(steps["step"]))
    telemetry = {
        "steps": len(steps["step"]),
        **regimes,
        "clip_fraction": regimes["clipped"] / total,
        "floor_fraction": regimes["floored"] / total,
        "norm_min": min(norms, default=math.nan),
        "norm_mean": sum(norms) / len(norms) if norms else math.nan,
        "norm_max": max(norms, default=math.nan),
        "path_length": math.fsum(h for _, h, _ in taken if math.isfinite(h)),
    }
    last = {name: values[-1] for name, values in evals.items()} if evals["step"] else {}
    metric = head["metric"]
    seconds, rows = head["seconds"], head["rows"]
    summary = {
        "steps": len(steps["step"]) + head.get("last_layer_steps", 0),
        "epochs": steps["epoch"][-1] if steps["step"] else 0.0,
        "seconds": seconds,
        "rows_per_second": rows / seconds if seconds else None,
        "train_loss": json_number(last.get("train_loss")),
        "primary": {**metric, "value": json_number(last.get(metric["column"]))},
        "evaluation": {k: json_number(v) for k, v in last.items() if k.startswith("test_")},
    }
    return {
        "summary": summary,
        "regimes": regimes,
        "telemetry": {k: json_number(v) for k, v in telemetry.items()},
        "series": thinned(steps),
        "evals": {name: [json_number(v) for v in values] for name, values in evals.items()},
        "notes": [*head["data"].get("notes", []), *_notes(head["config"], regimes, total)],
    }


def _notes(config: dict[str, Any], regimes: dict[str, int], total: int) -> list[str]:
    notes = []
    if config["gamma"] is not None and config["delta"] and not regimes["floored"] and sum(regimes.values()):
        notes.append(
            f"delta = {config['delta']:g} has had no effect: no step reached the floor at ||g|| >= gamma/delta, so "
            "this run is plain clipping. A larger delta, or a smaller gamma, would bring the floor into play."
        )
    if regimes["clipped"] > 0.99 * total:
        plain = config["optimizer"] not in ("adam", "adamw") and not config["momentum"] and not config["weight_decay"]
        which = "this is normalised gradient descent, every step of length lr times gamma"
        other = "every gradient was rescaled to the length gamma"
        notes.append(
            f"More than 99% of the steps were clipped: {which if plain else other}. "
            "A larger gamma lets small gradients take small steps."
        )
    if regimes["skipped"]:
        notes.append(
            f"{regimes['skipped']} of {total} steps were skipped because the gradient norm was NaN or infinite; "
            "a smaller lr usually ends this."
        )
    return notes
