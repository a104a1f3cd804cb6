"""Several optimizers on the same job, over several seeds: mean and standard error."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surefoot.errors import InputError
from surefoot.optim.telemetry import REGIMES
from surefoot.train.config import LETTERS, OPTIMIZERS, TrainConfig, flag, unknown
from surefoot.train.files import write_json
from surefoot.train.job import prepare
from surefoot.train.loop import check_out, resume, train
from surefoot.train.record import STEP_COLUMNS, Table, json_number

FORMAT, VERSION = "surefoot.comparison", 1
OWN_LETTERS = ("lr", "gamma", "delta", "beta", "L0", "L1", "momentum")
WINDOWS = 200


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        base: the options shared by all arms; its letters go to every arm that takes them (γ and δ only to those that
            always clip).
        arms: optimizers, each with letters of its own if wanted: "sgd", "adamw:lr=3e-4,gamma=1".
        seeds: number of seeds, base.seed, base.seed + 1, ...
    """

    base: TrainConfig
    arms: tuple[str, ...]
    seeds: int

    def configs(self) -> dict[str, TrainConfig]:
        """Return each arm's configuration for the first seed, or raise InputError."""
        if self.seeds < 1:
            raise InputError(f"--seeds {self.seeds} is too small; give at least 1")
        if len(set(self.arms)) < len(self.arms):
            raise InputError(f"--optimizer {' '.join(self.arms)} names an arm twice")
        configs = {arm: arm_config(self.base, arm) for arm in self.arms}
        for letter in OWN_LETTERS:
            value = getattr(self.base, letter)
            if value is not None and not any(_inherits(c.optimizer, letter) for c in configs.values()):
                raise InputError(f"{flag(letter)} {value:g} has no effect on any of {', '.join(self.arms)}")
        return configs

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as strict JSON."""
        return {"base": self.base.to_json(), "arms": list(self.arms), "seeds": self.seeds}


def _inherits(optimizer: str, letter: str) -> bool:
    return letter in LETTERS[optimizer] and (letter not in ("gamma", "delta") or LETTERS[optimizer][letter] is not None)


def arm_config(base: TrainConfig, arm: str) -> TrainConfig:
    """Return the resolved configuration of an arm such as "adamw:lr=3e-4,gamma=1"."""
    name, _, settings = arm.partition(":")
    if name not in OPTIMIZERS:
        raise InputError(unknown("--optimizer", name, OPTIMIZERS))
    letters: dict[str, float | None] = {k: (getattr(base, k) if _inherits(name, k) else None) for k in OWN_LETTERS}
    for setting in filter(None, settings.split(",")):
        letter, _, text = setting.partition("=")
        if letter not in LETTERS[name]:
            raise InputError(f"--optimizer {arm}: {unknown('letter', letter, tuple(LETTERS[name]))}")
        try:
            letters[letter] = float(text)
        except ValueError:
            raise InputError(f"--optimizer {arm}: {letter}={text!r} is no number; write {letter}=0.1") from None
    nesterov = base.nesterov and bool(letters["momentum"])
    return dataclasses.replace(base, optimizer=name, nesterov=nesterov, **letters).resolved()


def compare(
    comparison: Comparison, folder: Path, *, jobs: int = 1, tell: Callable[[str], None] = print, resumed: bool = False
) -> dict[str, Any]:
    """Run every arm with every seed and return the comparison's document, comparison.json.

    Args:
        comparison: what is compared.
        folder: a new or empty folder, or with `resumed` that of a comparison that was stopped: finished runs are kept,
            unfinished ones go on from their checkpoints.
        jobs: processes at a time, each with its share of the cores.
        tell: called with a line for each run that ends.
        resumed: whether `folder` was begun before.

    Raises:
        KeyboardInterrupt: Ctrl-C; the runs under way have written a checkpoint.
    """
    if jobs < 1:
        raise InputError(f"--jobs {jobs} is too small; give at least 1")
    configs = comparison.configs()
    if not resumed:
        check_out(folder)
        prepare(next(iter(configs.values())))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", comparison.to_json())
    threads = comparison.base.threads or max(1, (os.cpu_count() or 1) // jobs)
    work = [
        (arm, seed, dataclasses.replace(config, seed=seed, threads=threads), run_folder(folder, arm, seed))
        for seed in range(comparison.base.seed, comparison.base.seed + comparison.seeds)
        for arm, config in configs.items()
    ]
    import joblib

    done: Any = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(
        joblib.delayed(_one)(*item) for item in work
    )
    for number, (arm, seed, document) in enumerate(done, 1):
        if document["status"] == "interrupted":
            raise KeyboardInterrupt
        metric = document["summary"]["primary"]
        value = "diverged" if document["status"] == "diverged" else f"{metric['name']} {metric['value']:.4g}"
        tell(f"{number}/{len(work)}  {arm}, seed {seed}: {value}")
    document = summarise(comparison, folder)
    write_json(folder / "comparison.json", document)
    return document


def is_comparison(folder: Path) -> bool:
    """Say whether a folder was made by `compare` (and not by `train`)."""
    path = folder / "config.json"
    return path.is_file() and '"arms"' in path.read_text(encoding="utf-8")


def read_comparison(folder: Path) -> Comparison:
    """Return the comparison that was begun in a folder, or raise InputError."""
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        base = TrainConfig.from_json(stored["base"], source=str(path))
        return Comparison(base, tuple(stored["arms"]), int(stored["seeds"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {folder} is no comparison ({error}); give a folder that compare made") from error


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """Return where an arm's run with a seed lives."""
    return folder / re.sub(r"[^A-Za-z0-9.+=-]+", "_", arm) / f"seed-{seed}"


def _one(arm: str, seed: int, config: TrainConfig, folder: Path) -> tuple[str, int, dict[str, Any]]:
    if (folder / "config.json").is_file():
        return arm, seed, resume(folder, quiet=True)
    return arm, seed, train(config, folder, quiet=True)


def summarise(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Return the comparison's document from its run folders: also of one that was stopped, as far as it came."""
    seeds = range(comparison.base.seed, comparison.base.seed + comparison.seeds)
    documents: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in comparison.arms}
    for arm in comparison.arms:
        for seed in seeds:
            path = run_folder(folder, arm, seed) / "run.json"
            if path.is_file():
                documents[arm][seed] = json.loads(path.read_text(encoding="utf-8"))
    known = [d for runs in documents.values() for d in runs.values()]
    if not known:
        raise InputError(f"{folder} holds no run yet; go on with surefoot compare --resume {folder}")
    first = known[0]
    done = sum(d["status"] in ("finished", "diverged") for d in known)
    wanted = len(comparison.arms) * comparison.seeds
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": f"{first['title'].rpartition(', ')[0]}: {', '.join(comparison.arms)}",
        "status": "finished" if done == wanted else "running",
        "message": "" if done == wanted else f"{done} of {wanted} runs have ended",
        "config": comparison.base.to_json() | {"optimizer": ", ".join(comparison.arms), "seeds": comparison.seeds},
        "environment": first["environment"],
        "data": first["data"],
        "model": first["model"],
        "metric": first["metric"],
        "arms": [_arm(arm, config, documents[arm], folder) for arm, config in comparison.configs().items()],
        "notes": [],
    }


def _arm(arm: str, config: TrainConfig, documents: dict[int, dict[str, Any]], folder: Path) -> dict[str, Any]:
    good = {s: d for s, d in documents.items() if d["status"] == "finished"}
    total = max(1, sum(sum(d["regimes"].values()) for d in documents.values()))
    letters = {k: v for k, v in config.to_json().items() if k in OWN_LETTERS and v is not None}
    return {
        "name": arm,
        "settings": {k: v for k, v in letters.items() if k != "momentum" or v},
        "seeds": list(good),
        "failed": [{"seed": s, "message": d["message"]} for s, d in documents.items() if d["status"] == "diverged"],
        "train_loss": mean_and_error([d["summary"]["train_loss"] for d in good.values()]),
        "metric": mean_and_error([d["summary"]["primary"]["value"] for d in good.values()]),
        "seconds": mean_and_error([d["summary"]["seconds"] for d in good.values()]),
        "regimes": {name: sum(d["regimes"][name] for d in documents.values()) / total for name in REGIMES},
        "curves": _loss_curves([run_folder(folder, arm, s) for s in good]),
        "eval_curves": _metric_curves(list(good.values())),
    }


def mean_and_error(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean and standard error (sample standard deviation over the root of the count; None for one value)."""
    known = [v for v in values if v is not None]
    if not known:
        return {"mean": None, "se": None}
    se = float(np.std(known, ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)), "se": se}


def _columns(step: Sequence[float], runs: list[Sequence[float | None]], prefix: str) -> dict[str, Any]:
    each = [mean_and_error(values) for values in zip(*runs)]
    return {
        "step": list(step),
        f"{prefix}mean": [json_number(e["mean"]) for e in each],
        f"{prefix}se": [json_number(e["se"]) for e in each],
    }


def _loss_curves(folders: list[Path]) -> dict[str, Any]:
    """Return the training loss averaged over windows of steps, then over seeds."""
    if not folders:
        return {"step": [], "loss_mean": [], "loss_se": []}
    runs: list[Sequence[float | None]] = []
    centres: list[float] = []
    for folder in folders:
        table = Table(STEP_COLUMNS)
        table.load(folder / "metrics.parquet", through=2**62)
        loss = np.array_split(np.asarray(table.columns["loss"]), min(WINDOWS, len(table)))
        step = np.array_split(np.asarray(table.columns["step"]), min(WINDOWS, len(table)))
        centres = [float(s.mean()) for s in step]
        runs.append([float(window.mean()) for window in loss])
    return _columns(centres, runs, "loss_")


def _metric_curves(documents: list[dict[str, Any]]) -> dict[str, Any]:
    if not documents:
        return {"step": [], "mean": [], "se": []}
    column = documents[0]["metric"]["column"]
    return _columns(documents[0]["evals"]["step"], [d["evals"][column] for d in documents], "")
