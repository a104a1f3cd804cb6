"""How large can what is certified be, what does it take, and does a separate process verify it?

Each case runs in a process of its own (its peak memory is measured), is saved, and `python -m surefoot.check` verifies
it in another one. `--only NAME ...` runs some cases, `--scale 0.1` all of them at a tenth of the samples, as a trial.

    .venv/bin/python benchmarks/certify.py --threads 2
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write
from torch import Tensor, nn

from surefoot.certificates.certify import certify
from surefoot.measure.duplicates import equal_rows
from surefoot.optim import DeltaGClip

DATA = Path(os.environ.get("SUREFOOT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
D = torch.float64
Case = tuple[nn.Module, Tensor, Tensor, dict[str, Any]]  # network, inputs, targets, options of certify and notes


# ---------------------------------------------------------------------------------------------------------------- data


def digits(samples: int, *, pictures: bool = False) -> tuple[Tensor, Tensor]:
    """Handwritten digits of scikit-learn, centred, every row of norm sqrt 8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=D), torch.tensor(found.target)
    x = x - x.mean(0)
    x = (x / x.norm(dim=1, keepdim=True) * math.sqrt(8))[:samples]
    return (x.view(-1, 1, 8, 8) if pictures else x), y[:samples]


def uci(name: str, samples: int) -> tuple[Tensor, Tensor, str]:
    """A regression set, standardised, rows with equal inputs left out but for the first."""
    with (DATA / "uci" / f"{name}.csv").open(encoding="utf-8") as file:
        rows = [[float(v) for v in row] for row in list(csv.reader(file))[1:]]
    table = torch.tensor(rows, dtype=D)
    groups = equal_rows(table[:, :-1])
    gone = {i for group in groups for i in group[1:]}
    table = table[[i for i in range(len(table)) if i not in gone]]
    picked = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:samples]
    table = table[picked.sort().values]
    std = table.std(0)
    table = (table - table.mean(0)) / torch.where(std > 0, std, 1.0)
    return table[:, :-1], table[:, -1:], f"{len(gone)} of {len(rows)} rows repeat the inputs of another one"


def cifar(samples: int) -> tuple[Tensor, Tensor]:
    """The first rows of the CIFAR-10 subset, (N, 3, 32, 32) in -1 .. 1."""
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    file = min((DATA / "cifar10_10k2k").rglob("*train*.parquet"))
    rows = parquet.read_table(file).slice(0, samples).to_pylist()
    arrays = [np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))) for row in rows]
    x = torch.tensor(np.stack(arrays), dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
    return x, torch.tensor([row["label"] for row in rows])


def fashion(samples: int) -> tuple[Tensor, Tensor]:
    """The first pictures of Fashion-MNIST, centred, every row of norm sqrt 8."""
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    file = min((DATA / "fashion_mnist").rglob("*train*.parquet"))
    rows = parquet.read_table(file).slice(0, samples).to_pylist()
    arrays = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    x = torch.tensor(np.stack(arrays), dtype=D).flatten(1) / 255
    x = x - x.mean(0)
    return x / x.norm(dim=1, keepdim=True) * math.sqrt(8), torch.tensor([row["label"] for row in rows])


# ------------------------------------------------------------------------------------------------------------ networks


def mlp(sizes: list[int], activation: Callable[[], nn.Module] = nn.Tanh, gain: float = 1.5) -> nn.Sequential:
    """Dense layers with hidden weights of standard deviation gain/sqrt(fan in)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        linear = nn.Linear(a, b, dtype=D)
        if b != sizes[-1]:
            nn.init.normal_(linear.weight, std=gain / math.sqrt(a))
            nn.init.normal_(linear.bias, std=0.1)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Two convolutions and a head on 8x8 pictures."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(512, 10),
    ).double()  # fmt: skip


def trained_by_steps(net: nn.Module, x: Tensor, y: Tensor, limit: float) -> tuple[Any, dict[str, Any]]:
    """Train with delta-GClip alone, from torch's initialisation, until the certificate fires."""
    eigenvalue = float(torch.linalg.eigvalsh(_gram(net, x))[-1])
    lr = 0.9 * y.numel() / eigenvalue  # on the mean squared error: 1.8 over the curvature at the start
    optimizer = DeltaGClip(net.parameters(), lr, gamma=1.0, delta=0.01)
    begin, steps, asked = time.perf_counter(), 0, 500
    while time.perf_counter() - begin < limit:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        steps += 1
        if steps == asked:
            verdict = certify(net, x, y)
            if verdict:
                return verdict, {"first-order steps": steps, "lr": lr, "gamma": 1.0, "delta": 0.01}
            asked = int(1.5 * asked)
    return certify(net, x, y), {"first-order steps": steps, "lr": lr}


def _gram(net: nn.Module, x: Tensor) -> Tensor:
    from surefoot.measure.tangent import tangent_gram

    return tangent_gram(net, x)


# --------------------------------------------------------------------------------------------------------------- cases


def digits_mlp(samples: int, width: int, activation: Callable[[], nn.Module] = nn.Tanh) -> Case:
    """A dense network on digits."""
    x, y = digits(samples)
    return mlp([64, width, width, 10], activation), x, y, {}


def digits_cnn(samples: int) -> Case:
    """A convolutional network on digits."""
    x, y = digits(samples, pictures=True)
    return cnn(), x, y, {}


def regression(name: str, samples: int, width: int) -> Case:
    """A dense network on a regression set."""
    x, y, note = uci(name, samples)
    return mlp([x.shape[1], width, width, 1]), x, y, {"note": note}


def first_order(samples: int, width: int) -> Case:
    """One wide hidden layer on digits, parity as the target, without polish."""
    x, labels = digits(samples)
    y = (labels % 2 * 2.0 - 1.0).to(D)[:, None]
    return mlp([64, width, 1], gain=1.5), x, y, {"first_order": 110.0, "note": "odd or even, one output"}


def resnet_features(samples: int) -> Case:
    """The last layer of a ResNet with 512 features on CIFAR pictures, cross-entropy."""
    from surefoot.models.resnet import resnet18

    torch.manual_seed(0)
    x, y = cifar(samples)
    return resnet18((3, 32, 32), 10).eval(), x, y, {"layers": "last", "loss": "cross-entropy", "note": "untrained"}


def wide_resnet(samples: int, loss: str) -> Case:
    """ResNet-20, an epoch of training, its last hidden layer widened to 1.25 units a sample; the last layer alone.

    Rank needs samples - 1 units, and torch's initialisation would have it, but with s_min(Phi)^2 below what float64 can
    tell from 0. Two reasons, put right here: a square random matrix is nearly singular, hence a quarter more units; and
    the body's features are alike in their mean, which drowns what distinguishes the pictures, hence the widened layer's
    arguments are centred and scaled to standard deviation 3 on the data, by its bias and weights.
    """
    from surefoot.models.resnet import resnet20
    from surefoot.train.widening import widen_last_hidden

    torch.manual_seed(0)
    x, y = cifar(samples)
    net = resnet20((3, 32, 32), 10)
    optimizer = DeltaGClip(net.parameters(), 0.1, gamma=1.0, delta=0.01, momentum=0.9)
    for rows in torch.randperm(len(x)).split(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        features = torch.cat([net[:-1](piece) for piece in x.split(250)])
        right = int((net[-1](features).argmax(1) == y).sum())
    widen_last_hidden(net, round(1.25 * samples), "tanh")
    hidden = net[-3]
    assert isinstance(hidden, nn.Linear)
    with torch.no_grad():
        hidden.bias.zero_()
        z = torch.cat([hidden(piece) for piece in features.split(250)])
        scale = 3 / z.std(0)
        hidden.weight *= scale[:, None]
        hidden.bias.copy_(-scale * z.mean(0))
    note = f"one epoch brought {right / len(x):.1%} of the training pictures; then widened, with a new head"
    return net, x, y, {"layers": "last", "loss": loss, "note": note}


def fashion_mlp(samples: int, width: int, epochs: int) -> Case:
    """A dense network on Fashion-MNIST, trained by Adam in float32 first: from a cold start polishing takes longer."""
    x, y = fashion(samples)
    net = mlp([784, width, width, 10]).float()
    inputs, wanted = x.float(), nn.functional.one_hot(y, 10).float()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-samples // 100))
    generator = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(samples, generator=generator).split(100):
            optimizer.zero_grad()
            ((net(inputs[rows]) - wanted[rows]).square().sum() / len(rows)).backward()
            optimizer.step()
            schedule.step()
    note = f"{epochs} epochs of Adam before, {time.perf_counter() - begin:.0f} s that are not in the table"
    return net.double(), x, y, {"note": note}


CASES: dict[str, tuple[Callable[[int], Case], int]] = {
    "500 digits x 10, tanh 256-256": (lambda n: digits_mlp(n, 256), 500),
    "1,797 digits x 10, tanh 512-512": (lambda n: digits_mlp(n, 512), 1797),
    "3,000 Fashion-MNIST x 10, tanh 1024-1024": (lambda n: fashion_mlp(n, 1024, 200), 3000),
    "300 digits x 10, CNN": (digits_cnn, 300),
    "300 digits x 10, ReLU 256-256": (lambda n: digits_mlp(n, 256, nn.ReLU), 300),
    "yacht, tanh 256-256": (lambda n: regression("yacht", n, 256), 308),
    "energy, tanh 512-512": (lambda n: regression("energy", n, 512), 768),
    "concrete, 700 rows, tanh 512-512": (lambda n: regression("concrete", n, 512), 700),
    "concrete, all rows, tanh 512-512": (lambda n: regression("concrete", n, 512), 1030),
    "power plant, 1,000 rows, tanh 512-512": (lambda n: regression("power-plant", n, 512), 1000),
    "power plant, 2,000 rows, tanh 512-512": (lambda n: regression("power-plant", n, 512), 2000),
    "digits odd or even, delta-GClip alone": (lambda n: first_order(n, 1000), 40),
    "CIFAR-10, last layer of ResNet-18": (resnet_features, 400),
    "CIFAR-10, last layer of a wide ResNet-20, mse": (lambda n: wide_resnet(n, "mse"), 10_000),
    "CIFAR-10, last layer of a wide ResNet-20, cross-entropy": (lambda n: wide_resnet(n, "cross-entropy"), 10_000),
}


def worker(name: str, scale: float, folder: Path, threads: int) -> dict[str, Any]:
    """Run one case and save its certificate."""
    torch.set_num_threads(threads)
    make, samples = CASES[name]
    net, x, y, options = make(max(8, round(samples * scale)))
    note = options.pop("note", "")
    found: dict[str, Any] = {"case": name, "N": len(x), "note": note}
    begin = time.perf_counter()
    if "first_order" in options:
        verdict, more = trained_by_steps(net, x, y, options["first_order"])
        found |= more
    elif options:
        verdict = certify(net, x, y, **options)
    else:
        verdict = certify(net, x, y, polish=True, progress=lambda line: print(f"  {line}", flush=True))
    found["seconds"] = time.perf_counter() - begin
    found["peak_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found["outcome"] = verdict.outcome.value
    found["P"] = sum(p.numel() for p in net.parameters() if p.requires_grad)
    if verdict:
        certificate = verdict.certificate
        found["n"] = certificate.data["samples"] * certificate.data["outputs"]
        found["P"] = sum(
            certificate.tensors[o[k]].numel()
            for o in certificate.operations
            if o.get("trainable")
            for k in ("weight", "bias")
            if o[k]
        )
        found["claims"] = dict(certificate.claims)
        certificate.save(folder / "certificate")
    else:
        found["findings"] = [str(f.reason) + "; " + f.remedy for f in verdict.findings if f.remedy]
        found["measured"] = {m.name: m.value for m in verdict.measurements}
    return found


def run(name: str, scale: float, threads: int) -> dict[str, Any]:
    """Run a case in one process, and the checker in another."""
    env = os.environ | {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        options = ["--scale", str(scale), "--threads", str(threads)]
        subprocess.run([sys.executable, __file__, "--worker", name, "--into", folder, *options], env=env, check=True)
        found = json.loads(out.read_text())
        if found["outcome"] == "proved":
            begin = time.perf_counter()
            checked = subprocess.run(
                [sys.executable, "-m", "surefoot.check", str(Path(folder) / "certificate")],
                env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            found["verified"], found["check_seconds"] = checked.returncode == 0, time.perf_counter() - begin
            if checked.returncode:
                found["checker"] = (checked.stdout + checked.stderr)[-2000:]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    head = ["case", "N", "n", "P", "outcome", "s", "GB", "ρ", "s₀", "β", "q", "S", "verified", "s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        c = r.get("claims", {})
        numbers = [f"{c[k]:.3g}" if k in c else "" for k in ("residual", "sigma_min", "beta", "q", "radius")]
        checked = ["yes" if r["verified"] else "NO", f"{r['check_seconds']:.1f}"] if "verified" in r else ["", ""]
        cells = [r["case"], f"{r['N']:,}", f"{r['n']:,}" if "n" in r else "", f"{r['P']:,}", r["outcome"]]
        cells += [f"{r['seconds']:.1f}", f"{r['peak_GB']:.2f}", *numbers, *checked]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {r['case']}: {r['note']}." for r in rows if r.get("note")]
    notes += [f"- {r['case']}: {r['first-order steps']:,} first-order steps." for r in rows if "first-order steps" in r]
    notes += [f"- {r['case']}: {' / '.join(r['findings'])}" for r in rows if r.get("findings")]
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="cases whose name contains one of these")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "certify.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = worker(args.worker, args.scale, args.into, args.threads)
        (args.into / "found.json").write_text(json.dumps(found))
        return
    rows = []
    for name in CASES:
        if any(word in name for word in args.only):
            print(name, flush=True)
            rows.append(run(name, args.scale, args.threads))
            print(json.dumps(rows[-1]), flush=True)
    about = environment(["torch", "numpy", "scipy", "surefoot"]) | {"threads": args.threads, "scale": args.scale}
    write({"environment": about, "rows": rows}, table(rows), args.out)


if __name__ == "__main__":
    main()
