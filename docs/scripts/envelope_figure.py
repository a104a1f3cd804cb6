"""Draw docs/images/envelope.svg: training under the line that its certificate proved before.

    python docs/scripts/envelope_figure.py

Ten handwritten digits, one of each class, and a network of one hidden layer. δ-GClip trains it until `certify` proves
that an exact global minimum is near. From those weights three different trainings go on; the envelope was known before
any of them began.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import surefoot
from surefoot.check import verify

IMAGE = Path(__file__).parents[1] / "images" / "envelope.svg"
STEPS = 3000
MEASURED, PROVED, BEFORE = ("#0b6e4f", "#1f77b4", "#7b3fa0"), "#c0392b", "#555555"


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The first digit of each class, centred and of norm 1, and one-hot targets: (10, 64), (10, 10)."""
    found = load_digits()
    x = torch.tensor(found.data) - torch.tensor(found.data).mean(0)
    rows = [int((found.target == c).argmax()) for c in range(10)]
    return x[rows] / x[rows].norm(dim=1, keepdim=True), torch.eye(10, dtype=torch.float64)


class Training:
    """Gradient descent on E = ½‖F − y‖², one step at a time."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.net, (self.x, self.y) = net, digits()
        self.residuals: list[float] = []

    def step(self, opt: torch.optim.Optimizer) -> None:
        """Take a step, and note ‖F − y‖ before it."""
        opt.zero_grad()
        r = self.net(self.x) - self.y
        loss = r.square().sum() / 2
        loss.backward()
        self.residuals.append((2 * loss.item()) ** 0.5)
        opt.step()


def trained() -> tuple[Training, surefoot.certificates.Certificate]:
    """Train from random weights until there is a certificate."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10)).double()
    training = Training(net)
    opt = surefoot.DeltaGClip(net.parameters(), lr=0.05, gamma=0.5, delta=0.01)
    while True:
        for _ in range(100):
            training.step(opt)
        if verdict := surefoot.certify(net, training.x, training.y):
            return training, verdict.certificate


def continued(start: torch.nn.Module, make: Callable, schedule: Callable[[], float]) -> list[float]:
    """‖F − y‖ along `STEPS` steps from the certificate's weights; `schedule` gives each step's lr."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10)).double()
    net.load_state_dict(start.state_dict())
    training, opt = Training(net), make(net.parameters())
    for _ in range(STEPS):
        opt.param_groups[0]["lr"] = schedule()
        training.step(opt)
    return training.residuals


def main(image: Path = IMAGE) -> None:
    """Train, certify, have the certificate checked, train on, hold every step against it, and draw."""
    torch.set_num_threads(1)
    training, proof = trained()
    with tempfile.TemporaryDirectory() as folder:
        assert verify(proof.save(Path(folder) / "certificate")), "the checker does not accept the certificate"
    longest, uniform = proof.claims["eta_max"], random.Random(0).uniform
    sgd = torch.optim.SGD
    floored = functools.partial(surefoot.DeltaGClip, lr=longest, gamma=2e-5, delta=0.5)
    runs = {
        "steps of η_max": continued(training.net, sgd, lambda: longest),
        "steps of random length": continued(training.net, sgd, lambda: longest * uniform(0.5, 1)),
        "δ-GClip with δ = ½": continued(training.net, floored, lambda: longest),
    }
    shrink = proof.contraction(longest / 2)  # no step of these is shorter than half of η_max
    envelope = [proof.claims["residual"] * shrink**t for t in range(STEPS)]
    assert all(r <= e for run in runs.values() for r, e in zip(run, envelope, strict=True)), "above the envelope"
    draw(image, training.residuals, runs, envelope, proof)


def draw(image: Path, before: list[float], runs: dict[str, list[float]], envelope: list[float], proof: Any) -> None:
    """Draw ‖F − y‖ on a logarithmic axis: before the certificate, after it, and what it excludes."""
    plt.rcParams.update({"svg.hashsalt": "surefoot", "svg.fonttype": "none", "font.size": 11, "hatch.linewidth": 0.6})
    figure, axes = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
    first, top = len(before), 3 * max(before)
    after = range(first, first + STEPS)
    thin = slice(None, None, 10)
    axes.semilogy(before, color=BEFORE, lw=1.6)
    axes.fill_between(after[thin], envelope[thin], top, color=PROVED, alpha=0.1, lw=0, hatch="//", edgecolor=PROVED)
    axes.plot(after[thin], envelope[thin], color=PROVED, lw=2.2)
    for (name, run), color in zip(runs.items(), MEASURED, strict=True):
        axes.plot(after[thin], run[thin], color=color, lw=1.6, label=name)
    axes.plot(first, before[-1], "o", color=PROVED, ms=8, zorder=5)
    axes.annotate(
        f"here the certificate is written:\nan exact minimum lies within {proof.claims['radius']:.4f}",
        (first, before[-1]),
        (60, 3e-7),
        color=PROVED,
        va="top",
        arrowprops={"arrowstyle": "->", "color": PROVED},
    )
    note = {"color": PROVED, "ha": "center", "bbox": {"fc": "white", "ec": "none", "alpha": 0.85, "pad": 3}}
    axes.text(
        first + 0.55 * STEPS,
        0.05,
        "proved: no gradient steps of η_max/2 to η_max,\nhowever chosen, ever come here",
        **note,
    )
    axes.text(first * 0.55, 1.15 * max(before), "training", color=BEFORE, ha="center")
    axes.set(
        xlim=(0, first + STEPS),
        ylim=(runs["steps of η_max"][-1] / 3, top),
        xlabel="step",
        ylabel="‖F − y‖ on the training rows",
    )
    axes.legend(loc="lower left", title="what was measured afterwards", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(image, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
