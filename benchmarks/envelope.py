"""Does training ever contradict a certificate? Certified networks, trained for long, every step held against the proof.

The networks are those of the tests (tests/train/train_certified.py): float64, a hidden layer of 20 to 40 units, 6 to 20
samples, the targets so far off that the certificate just about fires. Steps are eta_max long before the rule shortens
them, for every other network a random part of it. Each certificate is saved first, and `python -m surefoot.check` has
to accept it.

    nice -n 10 .venv/bin/python benchmarks/envelope.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "train"))
from train_certified import RULES, Certified, certified, train

from surefoot.train.certified_steps import Violation


def verified(c: Certified) -> bool:
    """Whether the independent checker, in a process of its own, accepts the certificate."""
    with tempfile.TemporaryDirectory() as folder:
        path = c.certificate.save(Path(folder) / "certificate")
        command = [sys.executable, "-m", "surefoot.check", str(path)]
        env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def campaign(rule: str, networks: list[Certified], steps: int) -> dict[str, Any]:
    """Train every network by a rule."""
    violations: list[str] = []
    rows = []
    begin = time.perf_counter()
    for seed, c in enumerate(networks):
        claims = c.certificate.claims
        try:
            found = train(c, rule, steps, claims, seed=seed)
        except Violation as error:
            violations.append(f"network {seed}: {error}")
            continue
        rows.append(
            {
                "network": seed,
                "q": claims["q"],
                "steps": found.watch.steps,
                "worst residual/envelope from step": found.worst,
                "residual at the end over that at the start": found.watch.residual / claims["residual"],
                "path/radius": found.watch.path / claims["radius"],
                "distance/radius": found.distance,
                "steps that the rule shortened": found.shortened,
            }
        )
    return {"rule": rule, "violations": violations, "seconds": time.perf_counter() - begin, "networks": rows}


def table(found: list[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    firsts = list(found[0]["networks"][0]["worst residual/envelope from step"])
    head = ["rule", "networks", "steps", "violations"]
    head += [f"residual/envelope from step {first:,}" for first in firsts]
    head += ["path/radius", "distance/radius", "steps shortened"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for f in found:
        rows = f["networks"]
        cells = [f["rule"], str(len(rows)), f"{sum(r['steps'] for r in rows):,}", str(len(f["violations"]))]
        cells += [f"{max(r['worst residual/envelope from step'][first] for r in rows):.6f}" for first in firsts]
        cells += [f"{max(r[name] for r in rows):.3f}" for name in ("path/radius", "distance/radius")]
        cells.append(f"{sum(r['steps that the rule shortened'] for r in rows) / len(rows):.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    text = "The largest of all networks; steps shortened: the mean. Above 1 the certificate would be contradicted."
    return "\n".join([*lines, "", text, ""])


def main() -> None:
    """Run all rules on the same networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "envelope.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    networks = [certified(seed) for seed in range(args.networks)]
    accepted = sum(verified(c) for c in networks)
    print(f"{accepted} of {len(networks)} certificates verified", flush=True)
    found = []
    for rule in RULES:
        found.append(campaign(rule, networks, args.steps))
        print(f"{rule}: {len(found[-1]['violations'])} violations, {found[-1]['seconds']:.0f} s", flush=True)
    about = environment(["torch", "numpy", "surefoot"]) | {"steps": args.steps, "certificates verified": accepted}
    qs = [c.certificate.claims["q"] for c in networks]
    note = (
        f"{accepted} of {len(networks)} certificates accepted by `python -m surefoot.check`; q from {min(qs):.2f} to "
        f"{max(qs):.2f}.\n"
    )
    write({"environment": about, "rules": found}, table(found) + note, args.out)


if __name__ == "__main__":
    main()
