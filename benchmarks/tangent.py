"""What does the Gram of the tangent kernel cost? Ours against all that offer it, and against its matrix products alone.

    pip install -r benchmarks/rivals.txt ...        # an environment of its own, see README.md
    python benchmarks/tangent.py                    # all cases, 1 and 2 threads: hours
    python benchmarks/tangent.py --cases cnn-digits --threads 1 --rounds 3 --only torch.func floor

Everything in float64. One process a number of threads; in it all ways in turn, one call of each a round (a slow one in
three rounds at least), JAX compiled beforehand. Every way's Gram is held against ours before it is timed, and of a
way's several forms the quickest is taken. What does not fit into memory, or would take longer than `--limit` seconds,
is not run; the table says so. Alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, in_process_of, measure, seconds, summary, write
from tangent_cases import CASES, Case, digits, mlp
from tangent_rivals import FAMILIES, Way
from torch import Tensor

from surefoot.measure.tangent import tangent_gram

PACKAGES = ("torch", "numpy", "jax", "neural-tangents", "nngeometry", "curvlinops-for-pytorch")
SCALES = (125, 250, 500, 1000, 2000)
AGREE = 1e-9  # relative difference from which a way is not timed
LARGE = 2 * 10**9  # bytes of Jacobian from which a way is tried on a quarter of the samples first


def timed(way: Way) -> tuple[float, Any]:
    """Return how long a call takes, and what it returns."""
    start = time.perf_counter()
    found = way.call()
    return time.perf_counter() - start, found


def free_bytes() -> int:
    """Return how much memory the machine has to give."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def refused(way: Way, quarter: Way | None, limit: float) -> str:
    """Return why a way is not to be run, if so; `quarter` is the same on a quarter of the samples."""
    if way.needs > 0.8 * free_bytes():
        return f"needs about {way.needs / 1e9:.0f} GB"
    if quarter is not None:
        quarter.call()  # compiles
        if 16 * (took := timed(quarter)[0]) > limit:
            return f"a quarter of the samples takes {seconds(took)}"
    return ""


def reason(error: Exception) -> str:
    """Return what went wrong, in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def distance(way: Way, result: Any, truth: Tensor) -> float:
    """Return ||K - K_ours|| / ||K_ours||, Frobenius; 0 where there is nothing to compare."""
    if way.gram is None:
        return 0.0
    return float(torch.linalg.vector_norm(way.gram(result) - truth) / torch.linalg.vector_norm(truth))


def settle(case: Case, only: list[str], limit: float) -> tuple[dict[str, Way], dict[str, dict[str, Any]]]:
    """Return each way's quickest form that gives the right Gram, and what to say of each way."""
    chosen: dict[str, Way] = {}
    facts: dict[str, dict[str, Any]] = {}
    truth = tangent_gram(case.model, case.x)
    for family, build in FAMILIES.items():
        if family != "surefoot" and only and not any(word in family for word in only):
            continue
        probe = case.jacobian_bytes > LARGE and family not in ("surefoot", "floor")
        try:
            found, quarters = build(case), build(case.part(len(case.x) // 4)) if probe else {}
        except Exception as error:  # whatever a rival does, the others are measured; the table says what it was
            facts[family] = {"notes": [reason(error)]}
            continue
        for name, forms in found.items():
            fact: dict[str, Any] = {"notes": [], "first": math.inf}
            for i, way in enumerate(forms):
                label = f"{way.form}: " if way.form else ""
                try:
                    if why := refused(way, quarters[name][i] if probe else None, limit):
                        fact["notes"].append(label + why)
                        continue
                    compiling = timed(way)[0]
                    took, result = timed(way)
                    difference = distance(way, result, truth)
                    del result
                except Exception as error:
                    fact["notes"].append(label + reason(error))
                    continue
                if not difference < AGREE:
                    fact["notes"].append(f"{label}another Gram, {difference:.0e} from ours")
                elif took < fact["first"]:
                    chosen[name] = way
                    fact |= {"first": took, "with_compiling": compiling, "form": way.form}
                    fact |= {"difference": difference} if way.gram else {}
            facts[name] = fact
            print(" ", name, {k: v for k, v in fact.items() if k != "with_compiling"}, flush=True)
    return chosen, facts


def run_case(case: Case, rounds: int, only: list[str], limit: float) -> dict[str, Any]:
    """Measure one case, all ways in turn."""
    print(case.title, flush=True)
    chosen, facts = settle(case, only, limit)
    times = measure({n: w.call for n, w in chosen.items()}, {n: facts[n]["first"] for n in chosen}, rounds)
    ways = {name: facts[name] | summary(times).get(name, {}) for name in facts}
    for fact in ways.values():
        fact.pop("first", None)
    print(" ", {name: round(fact["ratio"], 2) for name, fact in ways.items() if "ratio" in fact}, flush=True)
    return {"title": case.title, "samples": len(case.x), "parameters": case.parameters, "ways": ways}


def run_once(name: str, threads: int) -> dict[str, Any]:
    """Measure ours alone, one call, with the memory it takes."""
    case, found = CASES[name](), alone(name, threads, 1)
    notes = [f"{found['bytes'] / 1e9:.2f} GB at the peak"]
    ways = {"surefoot": {"s": found["s"], "ratio": 1.0, "rounds": 1, "bytes": found["bytes"], "notes": notes}}
    print(case.title, seconds(found["s"]), *notes, flush=True)
    return {"title": case.title, "samples": len(case.x), "parameters": case.parameters, "ways": ways}


# ---------------------------------------------------------------------------------------------------------- scaling


def peak_memory() -> int:
    """Return the most memory this process has held so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def scaling_case(n: int) -> Case:
    """Return the network of the scaling figure with n samples."""
    return mlp(f"MLP 64-256-256-10 on {n} digits", (64, 256, 256, 10), digits(n))


def alone(which: str, threads: int, rounds: int) -> dict[str, float]:
    """Return time and peak memory of our Gram, from a process of its own, without which there is no peak."""
    options = ["--alone", which, "--threads", str(threads), "--rounds", str(rounds)]
    done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def alone_worker(which: str, rounds: int) -> None:
    """Print what `alone` returns: the median of the times, and the peak above the start."""
    case = CASES[which]() if which in CASES else scaling_case(int(which))
    tangent_gram(case.model, case.x[:4])  # loads what is loaded at first use
    before, times = peak_memory(), []
    for _ in range(rounds):
        start = time.perf_counter()
        tangent_gram(case.model, case.x)
        times.append(time.perf_counter() - start)
    print(json.dumps({"s": statistics.median(times), "bytes": max(peak_memory() - before, 1)}))


def predicted(case: Case) -> tuple[float, float]:
    """Return the multiplications (times two) and the bytes that the theory asks for."""
    N, C = len(case.x), case.outputs
    passes = (1 + 2 * C) * N * sum(2 * y.T * y.a * y.b for y in case.layers)
    pairs = N * N / 2 * sum(2 * (y.a + C * C * y.b) for y in case.layers)
    return passes + pairs, 8 * (N * C) ** 2 + 8 * N * sum(y.a + C * y.b for y in case.layers)


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the exponent p of y = c x^p, fitted."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.linear_regression(u, v).slope


def run_scaling(threads: int, rounds: int, scales: list[int]) -> dict[str, Any]:
    """Measure time and memory against the number of samples, and fit the exponents."""
    rows = []
    for n in scales:
        found = alone(str(n), threads, min(rounds, 5))
        flops, size = predicted(scaling_case(n))
        rows.append({"samples": n, **found, "predicted_flops": flops, "predicted_bytes": size})
        print("scaling", rows[-1], flush=True)
    last = rows[-3:]  # the smaller ones are overhead
    n = [row["samples"] for row in last]
    keys = ("s", "predicted_flops", "bytes", "predicted_bytes")
    exponents = {key: slope(n, [row[key] for row in last]) for key in keys}
    return {"rows": rows, "exponents": exponents}


# ------------------------------------------------------------------------------------------------------------ table


def table(document: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    env, runs = document["environment"], document["runs"]
    lines = [
        "# What the Gram of the tangent kernel costs",
        "",
        f"{env['processor']}, {env['cores']} cores, " + ", ".join(f"{p} {env[p]}" for p in PACKAGES) + "; float64, all "
        f"10 outputs. Medians of {document['rounds']} rounds (fewer for what takes long, three at least), all ways in "
        "turn in one process. In brackets: ratio to ours. Difference: of the Gram to ours, Frobenius, relative.",
    ]
    for name in dict.fromkeys(case for run in runs.values() for case in run if case != "scaling"):
        found = {key: run[name] for key, run in runs.items() if name in run}
        one = next(iter(found.values()))
        lines += ["", f"## {one['title']}, {one['parameters']:,} parameters", ""]
        lines += ["| way | " + " | ".join(found) + " | difference | form |", "|---" * (len(found) + 3) + "|"]
        for way in dict.fromkeys(w for each in found.values() for w in each["ways"]):
            facts = [each["ways"].get(way, {}) for each in found.values()]
            cells = [f"{seconds(f['s'])} ({f['ratio']:.3g})" if "s" in f else "not run" for f in facts]
            differences = [f["difference"] for f in facts if "difference" in f]
            notes = [f["form"] for f in facts if f.get("form")] + [note for f in facts for note in f.get("notes", [])]
            difference = f"{max(differences):.0e}" if differences and way != "surefoot" else ""
            lines.append(f"| {way} | " + " | ".join(cells) + f" | {difference} | {'; '.join(dict.fromkeys(notes))} |")
    for key, run in runs.items():
        if "scaling" in run:
            e = run["scaling"]["exponents"]
            lines += ["", f"## Time and memory against N, {key}: MLP 64-256-256-10 on digits, ours", ""]
            lines += ["| N | time | peak memory | the Gram and the layers' terms alone |", "|---" * 4 + "|"]
            for row in run["scaling"]["rows"]:
                size = f"{row['bytes'] / 1e9:.2f} GB | {row['predicted_bytes'] / 1e9:.2f} GB"
                lines.append(f"| {row['samples']} | {seconds(row['s'])} | {size} |")
            lines += [
                "",
                f"Fitted over the last three: time N^{e['s']:.2f} (operations N^{e['predicted_flops']:.2f}), memory "
                f"N^{e['bytes']:.2f} (predicted N^{e['predicted_bytes']:.2f}).",
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write results/tangent.json and results/tangent.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*CASES, "scaling"], choices=[*CASES, "scaling"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", nargs="+", default=[], help=f"rivals to run beside ours: words of {list(FAMILIES)}")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a call may be expected to take")
    parser.add_argument("--scales", nargs="+", type=int, default=list(SCALES), help="numbers of samples for scaling")
    parser.add_argument("--out", type=Path, default=RESULTS / "tangent.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None and args.alone is None:
        document: dict[str, Any] = {"environment": environment(PACKAGES), "rounds": args.rounds, "runs": {}}
        lists = {"--cases": args.cases, "--only": args.only, "--scales": args.scales}
        options = [str(word) for name, found in lists.items() if found for word in (name, *found)]
        for threads in args.threads:
            key = f"{threads} thread{'s' if threads > 1 else ''}"
            more = ["--rounds", str(args.rounds), "--limit", str(args.limit), *options]
            document["runs"][key] = in_process_of(threads, __file__, more)
            write(document, table(document), args.out)
        return
    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    if args.alone is not None:
        alone_worker(args.alone, args.rounds)
        return
    found: dict[str, Any] = {}
    for name in args.cases:
        torch.manual_seed(0)
        if name == "scaling":
            found[name] = run_scaling(args.threads[0], args.rounds, args.scales)
        elif name == "resnet20":
            found[name] = run_once(name, args.threads[0])
        else:
            found[name] = run_case(CASES[name](), args.rounds, args.only, args.limit)
    args.worker.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
