"""Where the middle of each grid comes from: a coarse scan of lr by the training loss, seed 0, no clipping.

    .venv/bin/python benchmarks/tune/centres.py [WORKLOAD ...]

Prints the best lr of SGD and of AdamW and the mean gradient norm of the SGD run. The numbers stand in workloads.py,
rounded; nothing of the test rows is looked at.
"""

from __future__ import annotations

import math
import sys

import torch
from training import train
from workloads import WORKLOADS

SCAN = {"sgd": [10 ** (k / 2) for k in range(-5, 5)], "adamw": [10 ** (k / 2) for k in range(-8, -1)]}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for workload in [WORKLOADS[name] for name in sys.argv[1:] or WORKLOADS]:
        for optimizer, scan in SCAN.items():
            runs = {lr: train(workload, {"optimizer": optimizer, "lr": lr}, seed=0) for lr in scan}
            losses = {lr: math.inf if r["diverged"] else r["train_loss"] for lr, r in runs.items()}
            best = min(losses, key=lambda lr: losses[lr])
            shown = " ".join(f"{lr:.2g}:{loss:.3g}" for lr, loss in losses.items())
            seconds = sum(r["seconds"] for r in runs.values())
            print(
                f"{workload.name} {optimizer}: lr {best:.3g}, norm {runs[best]['norm']:.3g}, {seconds:.0f} s",
                flush=True,
            )
            print(f"  training losses {shown}", flush=True)
