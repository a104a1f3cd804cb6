"""Documents like those that training writes: simulated runs whose gradient norm decays through the three regimes."""

import math
from typing import Any

import numpy as np

Document = dict[str, Any]


def _plain(values: Any) -> list[Any]:
    return [float(v) if math.isfinite(v) else None for v in values]


def run(
    steps: int = 1500,
    *,
    optimizer: str = "delta-gclip",
    lr: float = 0.5,
    gamma: float | None = 1.0,
    delta: float | None = 0.05,
    skipped: tuple[int, ...] = (),
    evals: bool = True,
    seed: int = 0,
    config: Document | None = None,
) -> Document:
    """A finished run: mlp on digits, with every part that a document can have."""
    rng = np.random.default_rng(seed)
    step = np.arange(1, steps + 1)
    progress = step / max(steps, 1)
    norm = 60 * np.exp(-6.5 * progress) * np.exp(0.45 * rng.standard_normal(steps))
    loss = 2.4 * np.exp(-4.2 * progress) * np.exp(0.25 * rng.standard_normal(steps)) + 0.004
    for at in skipped:
        norm[at] = math.nan
    threshold, floor = (math.inf if gamma is None else gamma), (delta or 0.0)
    scale = np.minimum(1, np.maximum(floor, threshold / norm)) if steps else np.zeros(0)
    regime = np.where(norm <= threshold, "unclipped", np.where(scale > floor, "clipped", "floored"))
    if optimizer == "normalized-gd":
        scale = 1 / (norm + threshold)
        regime = np.where(norm <= threshold, "unclipped", "clipped")
    if optimizer == "smooth-clip":
        scale = 1 / (2.0 + 2.0 * norm)
        regime = np.where(norm <= 1.0, "unclipped", "clipped")
    regime[~np.isfinite(norm)] = "skipped"
    eta = lr * (0.55 + 0.45 * np.cos(np.pi * progress))
    epochs = max(1, steps // 50)
    at = np.linspace(steps / epochs, steps, epochs).astype(int) if steps and evals else np.zeros(0, int)
    accuracy = 0.975 - 0.8 * np.exp(-7 * at / max(steps, 1)) + 0.004 * rng.standard_normal(at.size)
    return {
        "format": "surefoot.run",
        "version": 1,
        "title": f"mlp on digits, {optimizer}",
        "status": "finished",
        "message": "",
        "config": {
            "optimizer": optimizer,
            "lr": lr,
            "gamma": gamma,
            "delta": delta,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "scope": "global",
            "nonfinite": "skip",
            "batch_size": 32,
            "epochs": 30,
            "seed": 0,
            "schedule": "cosine",
            "data": "digits",
            "model": "mlp",
            "hidden": [256, 128],
            "device": "cpu",
            **(config or {}),
        },
        "environment": {
            "surefoot": "0.1.0",
            "python": "3.12.3",
            "torch": "2.13.0+cpu",
            "numpy": "2.3.1",
            "platform": "Linux-6.8.0-x86_64-with-glibc2.39",
            "threads": 1,
        },
        "data": {
            "name": "digits",
            "task": "classification",
            "train_rows": 1437,
            "test_rows": 360,
            "input_shape": [1, 8, 8],
            "outputs": 10,
            "fingerprint": "9f2c4be81d77a03be2f98d5b30f8a5cf9f2c4be81d77a03be2f98d5b30f8a5cf",
        },
        "model": {"name": "mlp", "parameters": 52650},
        "summary": {
            "steps": steps,
            "epochs": 30,
            "seconds": 12.34,
            "rows_per_second": 4312.7,
            "train_loss": float(loss[-1]) if steps else None,
            "primary": {
                "name": "test accuracy",
                "value": float(accuracy[-1]) if at.size else None,
                "higher_is_better": True,
                "percent": True,
            },
            "evaluation": {"test_loss": 0.0921, "test_accuracy": float(accuracy[-1]) if at.size else None},
        },
        "regimes": {name: int((regime == name).sum()) for name in ("unclipped", "clipped", "floored", "skipped")},
        "telemetry": {"steps": steps, "clip_fraction": 0.42, "norm_max": 91.3, "path_length": 402.7},
        "series": {
            "step": [int(s) for s in step],
            "epoch": _plain(progress * 30),
            "loss": _plain(loss),
            "grad_norm": _plain(norm),
            "lr": _plain(eta),
            "gamma": [gamma] * steps,
            "delta": [delta] * steps,
            "scale": _plain(scale),
            "regime": [str(r) for r in regime],
            "step_length": _plain(eta * scale * norm),
            "rows": steps,
            "stride": 1,
        },
        "evals": {
            "step": [int(s) for s in at],
            "epoch": _plain(30 * at / max(steps, 1)),
            "train_loss": _plain(0.04 + 2.2 * np.exp(-6.5 * at / max(steps, 1))),
            "test_loss": _plain(0.09 + 2 * np.exp(-6 * at / max(steps, 1))),
            "test_accuracy": _plain(accuracy),
        },
        "notes": ["The learning rate follows a cosine from 0.5 to 0.05."],
    }


def comparison(arms: int = 3, *, seeds: int = 5, steps: int = 600) -> Document:
    """Several optimizers on digits, each with its own speed."""
    rng = np.random.default_rng(1)
    names = ["delta-gclip", "adamw", "sgd", "normalized-gd", "smooth-clip", "gclip"]
    entries = []
    for i in range(arms):
        step = np.arange(1, steps + 1)
        mean = 2.3 * np.exp(-(4.5 - 0.6 * i) * step / steps) * np.exp(0.05 * rng.standard_normal(steps)) + 0.01
        at = np.linspace(steps / 20, steps, 20).astype(int)
        metric = 0.972 - 0.006 * i
        curve = metric - 0.7 * np.exp(-(7 - i) * at / steps) + 0.002 * rng.standard_normal(20)
        alone = seeds == 1
        entries.append(
            {
                "name": names[i % len(names)] + ("" if i < len(names) else f" {i // len(names) + 1}"),
                "settings": {"lr": 0.5 / (i + 1), "gamma": 1.0, "delta": 0.05} if i % 2 == 0 else {"lr": 0.001},
                "seeds": list(range(seeds)),
                "failed": [{"seed": 3, "message": "the loss was not finite at step 212"}] if i == 2 else [],
                "train_loss": {"mean": float(mean[-1]), "se": None if alone else 0.0021},
                "metric": {"mean": metric, "se": None if alone else 0.0018 + 0.001 * i},
                "seconds": {"mean": 11.2 + i, "se": None if alone else 0.3},
                "regimes": {"unclipped": 0.31, "clipped": 0.52, "floored": 0.17, "skipped": 0.0}
                if i % 2 == 0
                else {"unclipped": 1.0, "clipped": 0.0, "floored": 0.0, "skipped": 0.0},
                "curves": {
                    "step": [int(s) for s in step],
                    "loss_mean": _plain(mean),
                    "loss_se": [None] * steps if alone else _plain(0.12 * mean),
                },
                "eval_curves": {
                    "step": [int(s) for s in at],
                    "mean": _plain(curve),
                    "se": [None] * 20 if alone else _plain(0.006 + 0 * curve),
                },
            }
        )
    base = run(0)
    return {
        "format": "surefoot.comparison",
        "version": 1,
        "title": "mlp on digits: three optimizers",
        "status": "finished",
        "message": "",
        "config": {"data": "digits", "model": "mlp", "epochs": 30, "batch_size": 32},
        "environment": base["environment"],
        "data": base["data"],
        "model": base["model"],
        "metric": {"name": "test accuracy", "higher_is_better": True, "percent": True},
        "arms": entries,
        "notes": ["All arms saw the same rows in the same order."],
    }
