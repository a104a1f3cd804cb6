"""What does a verified smallest eigenvalue cost? Ours against one Cholesky factorisation and one matrix product.

    python benchmarks/eigen.py                                   # n = 1000 to 8000, 1 and 2 threads: an hour
    python benchmarks/eigen.py --sizes 1000 --threads 1 --rounds 3

The matrix is the Gram of n random vectors in 1.2 n dimensions, float64. All ways in turn in one process a number of
threads; medians and ratios. Relative error: of the value to LAPACK's (torch.linalg.eigvalsh), which has its own, about
1e-16 lambda_max / lambda_min. Alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from common import RESULTS, environment, in_process_of, measure, seconds, summary, write
from scipy.sparse.linalg import eigsh
from torch import Tensor

from surefoot.measure.contraction import mirror
from surefoot.measure.eigen import lambda_min

PACKAGES = ("torch", "numpy", "scipy")
OURS = "surefoot lambda_min, verified"
LAPACK = "torch.linalg.eigvalsh"


def matrix(n: int) -> Tensor:
    """Return a Gram, symmetric to the bit."""
    X = torch.randn(n, n + n // 5, dtype=torch.float64)
    K = X @ X.T / n
    mirror(K)
    return K


def ways(K: Tensor) -> dict[str, Callable[[], Any]]:
    """Return each way as a call; it returns its value of lambda_min, the floor nothing."""
    out, N = torch.empty_like(K), K.numpy()

    def floor() -> None:
        L = torch.linalg.cholesky(K)
        torch.mm(L, L.T, out=out)

    return {
        OURS: lambda: lambda_min(K).value,
        "surefoot lambda_min, estimate": lambda: lambda_min(K, level="estimate").value,
        "floor: Cholesky + GEMM": floor,
        "Cholesky alone": lambda: (torch.linalg.cholesky(K), None)[1],
        LAPACK: lambda: torch.linalg.eigvalsh(K)[0].item(),
        "numpy.linalg.eigvalsh": lambda: np.linalg.eigvalsh(N)[0],
        "scipy.linalg.eigvalsh, the smallest alone": lambda: scipy.linalg.eigvalsh(N, subset_by_index=[0, 0])[0],
        "scipy eigsh, sigma=0": lambda: eigsh(N, 1, sigma=0, return_eigenvectors=False)[0],
    }


def run(n: int, rounds: int) -> dict[str, Any]:
    """Measure all ways at one size."""
    calls, first, values = ways(matrix(n)), {}, {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        values[name] = call()
        first[name] = time.perf_counter() - start
        print(f"  n = {n}: {name} {seconds(first[name])}", flush=True)
    assert values[OURS] <= values[LAPACK] * (1 + 1e-9), "a lower bound above the eigenvalue"
    found: dict[str, Any] = summary(measure(calls, first, rounds))
    for name, value in values.items():
        if value is not None:
            found[name]["value"] = value
            found[name]["relative_error"] = value / values[LAPACK] - 1
    for fact in found.values():
        fact["to_floor"] = fact["s"] / found["floor: Cholesky + GEMM"]["s"]
    return found


def table(document: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    env = document["environment"]
    lines = [
        "# What a verified smallest eigenvalue costs",
        "",
        f"{env['processor']}, {env['cores']} cores, "
        + ", ".join(f"{p} {env[p]}" for p in PACKAGES)
        + "; float64. Medians "
        f"of {document['rounds']} rounds (fewer for what takes long, three at least). In brackets: ratio to the floor, "
        "one Cholesky factorisation and one matrix product of that size.",
    ]
    for key, sizes in document["runs"].items():
        lines += ["", f"## {key}", "", "| way | " + " | ".join(f"n = {n}" for n in sizes) + " | relative error |"]
        lines += ["|---" * (len(sizes) + 2) + "|"]
        for name in next(iter(sizes.values())):
            cells = [f"{seconds(found[name]['s'])} ({found[name]['to_floor']:.3g})" for found in sizes.values()]
            errors = [abs(found[name]["relative_error"]) for found in sizes.values() if "relative_error" in found[name]]
            error = f"{max(errors):.0e}" if errors and name != LAPACK else ""
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {error} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write results/eigen.json and results/eigen.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 2000, 4000, 8000])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "eigen.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None:
        document: dict[str, Any] = {"environment": environment(PACKAGES), "rounds": args.rounds, "runs": {}}
        for threads in args.threads:
            key = f"{threads} thread{'s' if threads > 1 else ''}"
            options = ["--rounds", str(args.rounds), "--sizes", *map(str, args.sizes)]
            document["runs"][key] = in_process_of(threads, __file__, options)
            write(document, table(document), args.out)
        return
    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    args.worker.write_text(json.dumps({str(n): run(n, args.rounds) for n in args.sizes}))


if __name__ == "__main__":
    main()
