"""Run the grids the tuner is held against: a line of JSON a run, appended, so that a stopped run goes on.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/tune/grid.py [--workload NAME ...] [--method NAME ...] [--seeds 3]

Every cell of a grid is run with seed 0; then the best six (`--reseeded`) by the test metric with the other seeds too.
Runs of the workloads that are set aside go to a file of their own, and nothing of them is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from training import DELTA, Cell, train
from workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parents[1] / "results" / "tune"
GRID, HELD_OUT = RESULTS / "grid.jsonl", RESULTS / "heldout.jsonl"
METHODS = ("delta-gclip", "sgd", "sgd-clip", "adamw-clip", "autoclip", "zclip")
DEFAULT_LR = {"sgd": 0.1, "adamw": 1e-3}

Row = dict[str, Any]


def spaced(centre: float, step: float, count: int) -> list[float]:
    """Return numbers a factor 10^step apart around a centre, with three digits."""
    return [float(f"{centre * 10 ** (step * (k - count // 2)):.3g}") for k in range(count)]


def cells(workload: Workload, method: str, rows: Iterable[Row]) -> list[Cell]:
    """Return the cells of a method's grid; `rows` hold the runs of plain SGD, whose best lr AutoClip and ZClip get."""
    gammas = spaced(workload.gamma, 0.75, 5)
    if method == "delta-gclip":
        fixed = {"optimizer": "delta-gclip", "delta": DELTA}
        return [{**fixed, "lr": lr, "gamma": g} for lr, g in product(spaced(workload.lr, 0.75, 5), gammas)]
    if method == "sgd":
        return [{"optimizer": "sgd", "lr": lr} for lr in spaced(workload.lr, 0.5, 7)]
    if method == "sgd-clip":
        return [{"optimizer": "sgd", "lr": lr, "gamma": g} for lr, g in product(spaced(workload.lr, 0.75, 5), gammas)]
    if method == "adamw-clip":
        lrs = spaced(workload.adam_lr, 0.5, 5)
        return [{"optimizer": "adamw", "lr": lr, "gamma": g} for lr, g in product(lrs, gammas)]
    best = best_cells(workload, [r for r in rows if r["workload"] == workload.name and r["method"] == "sgd"], 1)
    found = [{"optimizer": o, "lr": lr, "gamma": method} for o, lr in DEFAULT_LR.items()]
    return found + [c for c in ({**cell, "gamma": method} for cell in best) if c not in found]


def key(cell: Cell) -> str:
    """Return a name of a cell that does not depend on the order of its letters."""
    return json.dumps(cell, sort_keys=True)


def by_cell(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the runs of each cell."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row["cell"]), []).append(row)
    return found


def value(workload: Workload, row: Row) -> float:
    """Return a run's test metric; a run that diverged has learned nothing."""
    return workload.naive() if row["metric"] is None else row["metric"]


def merit(workload: Workload, runs: list[Row]) -> float:
    """Return the mean test metric over the seeds, signed so that more is better."""
    mean = sum(value(workload, r) for r in runs) / len(runs)
    return mean if workload.metric.higher_is_better else -mean


def best_cells(workload: Workload, rows: Iterable[Row], count: int) -> list[Cell]:
    """Return the best cells by the test metric, among those run with the most seeds."""
    groups = list(by_cell(rows).values())
    most = max(map(len, groups), default=0)
    ranked = sorted((g for g in groups if len(g) == most), key=lambda g: -merit(workload, g))
    return [g[0]["cell"] for g in ranked[:count]]


def read(path: Path) -> list[Row]:
    """Return the lines of a file of results, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(path: Path, row: Row) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def rounded(row: Row) -> Row:
    """Return a row with six digits, and None for what is no number."""
    return {k: (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in row.items()}


class Grid:
    """The runs there are, and those still to do."""

    def __init__(self, seeds: int, reseeded: int) -> None:
        self.seeds, self.reseeded = seeds, reseeded
        self.rows = read(GRID) + read(HELD_OUT)

    def of(self, workload: Workload, method: str) -> list[Row]:
        """Return the runs of a method."""
        return [r for r in self.rows if r["workload"] == workload.name and r["method"] == method]

    def fill(self, workload: Workload, method: str) -> int:
        """Run what is missing of a method's grid; return how many runs that took."""
        grid = cells(workload, method, self.rows)
        took = self._run(workload, method, grid, [0])
        first = [r for r in self.of(workload, method) if r["seed"] == 0]
        again = grid if method in ("autoclip", "zclip") else best_cells(workload, first, self.reseeded)
        return took + self._run(workload, method, again, range(1, self.seeds))

    def _run(self, workload: Workload, method: str, grid: list[Cell], seeds: Iterable[int]) -> int:
        done = {(key(r["cell"]), r["seed"]) for r in self.of(workload, method)}
        wanted = [(cell, seed) for cell in grid for seed in seeds if (key(cell), seed) not in done]
        for cell, seed in wanted:
            row = {"workload": workload.name, "method": method, "cell": cell, "seed": seed}
            row = rounded(row | train(workload, cell, seed))
            append(HELD_OUT if workload.held_out else GRID, row)
            self.rows.append(row)
        return len(wanted)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reseeded", type=int, default=6, help="cells of a method that are run with every seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[1]))
    from common import environment

    RESULTS.mkdir(parents=True, exist_ok=True)
    about = environment(["torch", "numpy", "transformers"])
    (RESULTS / "environment.json").write_text(json.dumps(about, indent=1) + "\n")
    for name in args.workload:
        WORKLOADS[name].make(0)  # everything is read and imported before the first run
    grid = Grid(args.seeds, args.reseeded)
    begin = time.perf_counter()
    for method in args.method:
        for name in args.workload:
            took = grid.fill(WORKLOADS[name], method)
            print(f"{(time.perf_counter() - begin) / 60:6.1f} min  {method}, {name}: {took} runs", flush=True)


if __name__ == "__main__":
    main()
