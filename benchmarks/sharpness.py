"""What does the sharpness cost? `surefoot.measure.sharpness` against curvlinops and scipy at equal tolerance.

    python benchmarks/sharpness.py                               # in the rivals' environment, see README.md
    python benchmarks/sharpness.py --cases cnn --threads 1 --rounds 3

The largest eigenvalue of the cross-entropy's Hessian in float64, eigsh(k=1, which="LA") to the tolerance; both from the
model and the data on, ours with its checks and the product for the residual. curvlinops with scipy's default of 20
Lanczos vectors and with the 10 that we take, its check for determinism off. Alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, in_process_of, measure, seconds, summary, write
from scipy.sparse.linalg import eigsh
from tangent_cases import Case, cnn, digits, mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from surefoot.measure.curvature import sharpness

PACKAGES = ("torch", "numpy", "scipy", "curvlinops-for-pytorch")
TOLERANCES = (1e-3, 1e-6)
CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: mlp("MLP 64-256-256-10, 1,797 digits", (64, 256, 256, 10), digits(1797)),
    "cnn": lambda: cnn("CNN 1-16-32-32, 256 digits", (1, 16, 32, 32), (1, 2, 1), digits(256).view(-1, 1, 8, 8)),
}


def labels(n: int) -> Tensor:
    """Return the first n digits' labels."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().target)[:n]


def ways(case: Case, tolerance: float) -> dict[str, Callable[[], tuple[float, int]]]:
    """Return each way as a call that returns the eigenvalue and how many products with the Hessian it took."""
    from curvlinops import HessianLinearOperator

    x, y = case.x, labels(len(case.x))
    params = list(case.model.parameters())

    def ours() -> tuple[float, int]:
        found = sharpness(case.model, cross_entropy, (x, y), tolerance=tolerance)
        return found.value, found.details["products"]

    def theirs(basis: int) -> tuple[float, int]:
        H = HessianLinearOperator(
            case.model, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=False, num_data=len(x)
        ).to_scipy()
        products, matvec = 0, H._matvec

        def counted(v: Any) -> Any:
            nonlocal products
            products += 1
            return matvec(v)

        H._matvec = counted  # type: ignore[method-assign]
        value = eigsh(H, 1, which="LA", tol=tolerance, ncv=basis, return_eigenvectors=False)[0]
        return float(value), products

    return {
        "surefoot": ours,
        "curvlinops + eigsh, 20 vectors": lambda: theirs(20),
        "curvlinops + eigsh, 10 vectors": lambda: theirs(10),
    }


def run(case: Case, tolerance: float, rounds: int) -> dict[str, Any]:
    """Measure all ways on one case."""
    torch.manual_seed(0)
    calls, first, values = ways(case, tolerance), {}, {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        values[name] = call()
        first[name] = time.perf_counter() - start
        print(f"  {case.title}, {tolerance:g}: {name} {seconds(first[name])}, {values[name]}", flush=True)
    found: dict[str, Any] = summary(measure(calls, first, rounds))
    reference = values["surefoot"][0]
    for name, (value, products) in values.items():
        found[name] |= {"value": value, "products": products, "difference": abs(value / reference - 1)}
        assert found[name]["difference"] < 10 * tolerance, f"{name} finds another eigenvalue: {value} and {reference}"
    return found


def table(document: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    env = document["environment"]
    lines = [
        "# What the sharpness costs",
        "",
        f"{env['processor']}, {env['cores']} cores, "
        + ", ".join(f"{p} {env[p]}" for p in PACKAGES)
        + "; float64. Medians "
        f"of {document['rounds']} rounds (fewer for what takes long, three at least). In brackets: ratio to ours. "
        "Products with the Hessian: of one run, curvlinops' start being random. Difference: of the eigenvalue to ours, "
        "relative.",
    ]
    for key, cases in document["runs"].items():
        lines += ["", f"## {key}", "", "| case | tolerance | way | time | products | difference |", "|---" * 6 + "|"]
        for title, by_tolerance in cases.items():
            for tolerance, found in by_tolerance.items():
                for name, f in found.items():
                    time_ = f"{seconds(f['s'])} ({f['ratio']:.2f})"
                    lines.append(
                        f"| {title} | {tolerance} | {name} | {time_} | {f['products']} | {f['difference']:.0e} |"
                    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write results/sharpness.json and results/sharpness.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharpness.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None:
        document: dict[str, Any] = {"environment": environment(PACKAGES), "rounds": args.rounds, "runs": {}}
        for threads in args.threads:
            key = f"{threads} thread{'s' if threads > 1 else ''}"
            options = ["--rounds", str(args.rounds), "--cases", *args.cases]
            document["runs"][key] = in_process_of(threads, __file__, options)
            write(document, table(document), args.out)
        return
    torch.set_num_threads(args.threads[0])
    found = {}
    for name in args.cases:
        torch.manual_seed(0)
        case = CASES[name]()
        found[case.title] = {f"{tol:g}": run(case, tol, args.rounds) for tol in TOLERANCES}
    args.worker.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
