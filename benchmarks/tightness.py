"""How far above the truth are the bounds on a ball? Small networks of every operation, float64, every Hessian formed.

The networks are those of the tests (tests/certificates/certificates_nets.py). "True" is the largest value found at the
centre and on the sphere, the directions by a fixed-point iteration: a lower bound of the supremum.

    .venv/bin/python benchmarks/tightness.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "certificates"))
from certificates_nets import NETS, Flat, bounded, small


def measure(name: str, R: float, points: int) -> dict[str, Any]:
    """Compare both bounds with what is attained."""
    net, x = small(name)
    read, network = bounded(net, x)
    f, ball = Flat(read, x), network.on_ball(R)
    places = f.points(R, points)
    norm = max(float(torch.linalg.matrix_norm(f.jacobian(w), 2)) for w in places)
    curvature = max(f.curvature(w, 4, 20) for w in places)
    return {
        "network": name, "R": R, "P": len(f.w0), "beta": ball.beta, "curvature": curvature,
        "beta_ratio": ball.beta / curvature, "L": ball.jacobian_norm, "norm": norm,
        "L_ratio": ball.jacobian_norm / norm,
    }  # fmt: skip


def main() -> None:
    """Run all networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "tightness.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, R, args.points) for name in NETS for R in (1e-6, 0.1)]
    lines = [
        "| network | P | β bound / attained, R → 0 | R = 0.1 | L bound / attained, R → 0 | R = 0.1 |",
        "|---" * 6 + "|",
    ]
    for near, far in zip(rows[::2], rows[1::2]):
        lines.append(
            f"| {near['network']} | {near['P']} | {near['beta_ratio']:.2f} | {far['beta_ratio']:.2f} "
            f"| {near['L_ratio']:.2f} | {far['L_ratio']:.2f} |"
        )
    about = environment(["torch", "numpy"]) | {"points": args.points}
    write({"environment": about, "rows": json.loads(json.dumps(rows))}, "\n".join([*lines, ""]), args.out)


if __name__ == "__main__":
    main()
