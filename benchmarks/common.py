"""What the benchmarks with rivals share: rounds in turn, medians and ratios, one process a number of threads."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SECONDS = 15.0  # what a way may take over all its rounds, three at least


def measure(ways: dict[str, Callable[[], Any]], first: dict[str, float], rounds: int) -> dict[str, dict[int, float]]:
    """Time each way at most once a round, in an order that turns; the first way in every round.

    Args:
        ways: what to call; all have been called once.
        first: how long that call took, in seconds. A slow way takes part in fewer rounds (three if it takes 5 s or
            more), spread over all.
        rounds: how many for a way that is quick.

    Returns:
        Seconds, by way and by round.
    """
    times: dict[str, dict[int, float]] = {name: {} for name in ways}
    reference = next(iter(ways))
    turns = {name: min(rounds, max(3, round(SECONDS / first[name]))) for name in ways} | {reference: rounds}
    names = list(ways)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            k = turns[name]
            if (r + 1) * k // rounds > r * k // rounds:
                start = time.perf_counter()
                ways[name]()
                times[name][r] = time.perf_counter() - start
    return times


def summary(times: dict[str, dict[int, float]]) -> dict[str, dict[str, float]]:
    """Return medians, quartiles and the median over rounds of the ratio to the first way."""
    reference = next(iter(times.values()))
    result = {}
    for name, each in times.items():
        low, mid, high = statistics.quantiles(each.values(), n=4) if len(each) > 1 else [*each.values()] * 3
        ratio = statistics.median(t / reference[r] for r, t in each.items())
        result[name] = {"s": mid, "quarter": low, "three_quarters": high, "ratio": ratio, "rounds": len(each)}
    return result


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "python": platform.python_version(),
        "processor": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        **versions,
    }


def in_process_of(threads: int, script: str, options: list[str]) -> Any:
    """Run a script's `--worker` with this many threads, torch's, BLAS's and XLA's alike; return its JSON.

    One thread means one core too: XLA takes as many threads as the process has cores.
    """
    env = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    env |= {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, script, "--worker", str(out), "--threads", str(threads), *options]
        subprocess.run(command, env=env, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cores))
        return json.loads(out.read_text())


def seconds(value: float) -> str:
    """Return a time with three digits."""
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def write(document: dict[str, Any], table: str, out: Path) -> None:
    """Write the figures as JSON and beside it the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    out.with_suffix(".md").write_text(table)
    print(f"{out} and {out.with_suffix('.md')}")
