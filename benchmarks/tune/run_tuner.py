"""What the tuner suggests, trained once: the rows that table.py holds against the grids.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/tune/run_tuner.py [--workload NAME ...] [--seeds 3]
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/tune/run_tuner.py --held-out      # once, when the rule is settled

`tuner` is asked with no lr, `tuner-tenfold` with ten times the lr of the grid's best cell, as by a user who is wrong.
Older lines of the same workloads are replaced.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from grid import GRID, HELD_OUT, RESULTS, Row, append, best_cells, read, rounded
from training import train
from workloads import WORKLOADS, Workload

TUNER, TUNER_HELD_OUT = RESULTS / "tuner.jsonl", RESULTS / "tuner_heldout.jsonl"
TENFOLD = 10.0


def suggested(workload: Workload, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the cell that the tuner suggests, and what the suggestion cost."""
    from surefoot.tune import suggest  # pyright: ignore[reportMissingImports]

    task = workload.make(seed)
    begin = time.perf_counter()
    found = suggest(task.model, task.loss_fn, task.loader, steps=workload.steps, optimizer="delta-gclip", **options)
    cell = {"optimizer": "delta-gclip", "lr": float(found.lr), "gamma": float(found.gamma), "delta": float(found.delta)}
    return {
        "cell": cell | {"momentum": float(found.momentum)},
        "cost": found.cost,
        "cost_runs": found.cost / workload.steps,
        "probe_seconds": time.perf_counter() - begin,
    }


def one(workload: Workload, method: str, seed: int, options: dict[str, Any]) -> Row:
    """Return a line of the results."""
    found = suggested(workload, seed, options)
    row = {"workload": workload.name, "method": method, "seed": seed, **found}
    return rounded(row | train(workload, found["cell"], seed))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    open_to_all = [name for name, w in WORKLOADS.items() if not w.held_out]
    parser.add_argument("--workload", nargs="+", choices=open_to_all, default=open_to_all)
    parser.add_argument("--held-out", action="store_true", help="the workloads that were set aside, and no other")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [n for n, w in WORKLOADS.items() if w.held_out] if args.held_out else args.workload
    out, grid = (TUNER_HELD_OUT, read(HELD_OUT)) if args.held_out else (TUNER, read(GRID))
    kept = [row for row in read(out) if row["workload"] not in names]
    out.unlink(missing_ok=True)
    for row in kept:
        append(out, row)
    for workload in map(WORKLOADS.__getitem__, names):
        own = [r for r in grid if r["workload"] == workload.name and r["method"] == "delta-gclip"]
        [best] = best_cells(workload, own, 1)
        starts = {"tuner": {}, "tuner-tenfold": {"lr": float(f"{TENFOLD * best['lr']:.3g}")}}
        for method, options in starts.items():
            for seed in range(args.seeds):
                row = one(workload, method, seed, options)
                append(out, row)
                print({k: row[k] for k in ("workload", "method", "cell", "seed", "metric", "cost_runs")}, flush=True)


if __name__ == "__main__":
    main()
