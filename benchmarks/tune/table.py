"""The grids and the tuner side by side, as Markdown.

    .venv/bin/python benchmarks/tune/table.py [--workload NAME ...] > benchmarks/results/tune/table.md
    .venv/bin/python benchmarks/tune/table.py --held-out > benchmarks/results/tune/heldout.md     # once, at the end

The README says what the columns are.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

from grid import GRID, HELD_OUT, METHODS, Row, best_cells, by_cell, key, merit, read, value
from run_tuner import TUNER, TUNER_HELD_OUT
from workloads import WORKLOADS, Workload

TUNERS = ("tuner", "tuner-tenfold")
ENOUGH = 0.99


def relative(workload: Workload, metric: float, best: float) -> float:
    """Return how much of the best a metric reaches: their ratio, the other way round where less is better."""
    return metric / best if workload.metric.higher_is_better else best / metric


def gain(workload: Workload, metric: float, best: float) -> float:
    """Return the share of what the best gains over a constant prediction."""
    naive = workload.naive()
    return (metric - naive) / (best - naive)


def metric_of(workload: Workload, runs: list[Row]) -> float:
    """Return the mean test metric of runs of one cell."""
    return abs(merit(workload, runs)) if not workload.metric.higher_is_better else merit(workload, runs)


def loss_of(runs: list[Row]) -> float:
    """Return the mean final training loss, infinite if a run diverged."""
    return statistics.fmean(math.inf if r["train_loss"] is None else r["train_loss"] for r in runs)


def rank(workload: Workload, runs: list[Row], grid: list[Row]) -> int:
    """Return 1 + the number of the grid's cells that are better, each by the seeds that both were run with."""
    own = {r["seed"]: r for r in runs}
    better = 0
    for cell in by_cell(grid).values():
        shared = [r for r in cell if r["seed"] in own]
        better += merit(workload, shared) > merit(workload, [own[r["seed"]] for r in shared])
    return 1 + better


def letters(cell: dict[str, Any]) -> str:
    """Return a cell as text."""
    shown = {k: v for k, v in cell.items() if k in ("lr", "gamma", "delta", "momentum") and v != 0}
    head = "AdamW, " if cell["optimizer"] == "adamw" else ""
    return head + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def spread(workload: Workload, runs: list[Row]) -> str:
    """Return the mean of the test metric and its standard error."""
    values = [value(workload, r) for r in runs]
    if len(values) == 1:
        return f"{values[0]:.4f} (1 seed)"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


class Found:
    """All runs of a workload, by method."""

    def __init__(self, workload: Workload, rows: list[Row]) -> None:
        self.workload = workload
        self.runs = {
            m: [r for r in rows if r["workload"] == workload.name and r["method"] == m] for m in METHODS + TUNERS
        }
        self.grid = self.runs["delta-gclip"]
        self.best = self.best_of("delta-gclip")
        self.best_metric = metric_of(workload, self.best)

    def best_of(self, method: str) -> list[Row]:
        """Return the runs of a method's best cell."""
        [cell] = best_cells(self.workload, self.runs[method], 1)
        return by_cell(self.runs[method])[key(cell)]

    def enough(self, method: str) -> tuple[int, int]:
        """Return how many cells reach 99 % of δ-GClip's best, by the seeds they were run with, and of how many."""
        cells = list(by_cell(self.runs[method]).values())
        good = [c for c in cells if relative(self.workload, metric_of(self.workload, c), self.best_metric) >= ENOUGH]
        return len(good), len(cells)

    def table(self) -> str:
        """Return the workload's section."""
        w = self.workload
        lines = [
            f"### {w.name}",
            "",
            f"{w.metric.name} on the test rows ({w.naive():.4g} for a constant prediction), {w.steps} steps.",
            "",
            f"| method | best cell | {w.metric.name} | of δ-GClip's best | of the gain | training loss | clipped "
            "| floor | cells at 99 % | cells diverged | runs |",
            "|" + "---|" * 11,
        ]
        for method, runs in self.runs.items():
            if not runs:
                continue
            best = runs if method in TUNERS else self.best_of(method)
            metric = metric_of(w, best)
            good, count = self.enough(method)
            lost = sum(any(r["diverged"] for r in c) for c in by_cell(runs).values())
            cost = f"{statistics.fmean(r['cost_runs'] for r in runs):.2f} + 1" if method in TUNERS else f"{count}"
            lines.append(
                f"| {method} | {'; '.join(dict.fromkeys(letters(r['cell']) for r in best))} | {spread(w, best)} "
                f"| {relative(w, metric, self.best_metric):.3f} | {gain(w, metric, self.best_metric):.3f} "
                f"| {loss_of(best):.4g} | {_mean(best, 'clip_fraction'):.2f} | {_mean(best, 'floor_fraction'):.2f} "
                f"| {good} of {count} | {lost} | {cost} |"
            )
        return "\n".join(lines)

    def line(self, method: str) -> tuple[str, float]:
        """Return the tuner's line of the summary, and what it reaches."""
        w, runs = self.workload, self.runs[method]
        metric = metric_of(w, runs)
        reached = relative(w, metric, self.best_metric)
        losses = [loss_of(c) for c in by_cell(self.grid).values()]
        good, count = self.enough("delta-gclip")
        return (
            f"| {w.name} | {self.best_metric:.4f} | {spread(w, runs)} | {reached:.3f} "
            f"| {gain(w, metric, self.best_metric):.3f} | {rank(w, runs, self.grid)} of {count + 1} "
            f"| {good} of {count} | {loss_of(runs):.4g} | {loss_of(self.best):.4g} | {min(losses):.4g} "
            f"| {statistics.fmean(r['cost_runs'] for r in runs):.2f} |"
        ), reached


def _mean(runs: list[Row], name: str) -> float:
    known = [r[name] for r in runs if r[name] is not None]
    return statistics.fmean(known) if known else math.nan


def summary(found: list[Found], method: str) -> str:
    """Return how a tuner did on all workloads."""
    lines = [
        f"## {method}",
        "",
        "| workload | grid's best | tuner | of the best | of the gain | rank | cells at 99 % | training loss "
        "| of the best cell | lowest of the grid | cost in runs |",
        "|" + "---|" * 11,
    ]
    each = [f.line(method) for f in found if f.runs[method]]
    lines += [line for line, _ in each]
    reached = [r for _, r in each]
    lines += ["", f"99 % of the best or more on {sum(r >= ENOUGH for r in reached)} of {len(reached)} workloads; "]
    lines[-1] += f"95 % on {sum(r >= 0.95 for r in reached)}; least {min(reached):.3f}."
    return "\n".join(lines)


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS)
    parser.add_argument("--held-out", action="store_true", help="the workloads that were set aside, and no other")
    args = parser.parse_args()
    rows = read(HELD_OUT) + read(TUNER_HELD_OUT) if args.held_out else read(GRID) + read(TUNER)
    have = {r["workload"] for r in rows if r["method"] == "delta-gclip"}
    found = [Found(w, rows) for n, w in WORKLOADS.items() if n in have and n in (args.workload or WORKLOADS)]
    parts = [summary(found, method) for method in TUNERS if any(f.runs[method] for f in found)]
    print("\n\n".join([*parts, *(f.table() for f in found)]))


if __name__ == "__main__":
    main()
