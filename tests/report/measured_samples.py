"""A document of measurements as `surefoot measure` writes it, made by hand."""

from typing import Any

import numpy as np

Document = dict[str, Any]


def measurement(name: str, value: Any, kind: str, level: str = "estimate", **more: Any) -> Document:
    """One measurement, as Measurement.to_json gives it."""
    blank = {"samples": None, "seed": None, "error": None, "unit": "", "cost": "", "notes": [], "details": {}}
    return {
        "name": name,
        "value": value,
        "kind": kind,
        "level": level,
        "how": "by hand",
        "dtype": "float64",
        **blank,
        **more,
    }


def measurements() -> Document:
    """Every kind and level, both figures, something left out, and a note."""
    rng = np.random.default_rng(0)
    values = 1e3 * np.exp(-14 * np.linspace(0, 1, 400) ** 0.5)
    step = np.arange(1, 1501, 3)
    limit = 4 + 40 * rng.random(step.size) * np.exp(-step / 500)
    return {
        "format": "surefoot.measurements",
        "version": 1,
        "title": "mlp on digits, delta-gclip",
        "budget": 60.0,
        "seconds": 41.3,
        "subject": {
            "weights": "the weights after step 1,500",
            "about": ["52,650 parameters", "1,437 training rows", "loss cross-entropy"],
        },
        "measurements": [
            measurement("equal training rows", 2, "exact", "verified", samples=1437, notes=["rows 3 and 17 are equal"]),
            measurement("lambda_min(K)", 8.1e-4, "lower bound", "verified", samples=40, error=1e-9),
            measurement("lambda_max(K)", 1003.2, "upper bound", "verified", samples=40),
            measurement("sqrt(lambda_max(K) / lambda_min(K))", "inf", "upper bound", samples=40),
            measurement("f, the loss", 0.0123, "exact", samples=1437, dtype="float32"),
            measurement("lambda_max(Hessian)", 3.41, "estimate", error=0.03, samples=512, seed=0),
            measurement("L1", 4.2, "assumed"),
        ],
        "series": {
            "spectrum": {
                "index": list(range(1, 401)),
                "value": values.tolist(),
                "bound": 8.1e-4,
                "total": 400,
                "samples": 40,
                "outputs": 10,
            },
            "sharpness": {"step": [0, 750, 1500], "value": [2.1, 3.0, 3.41]},
            "stability": {"step": step.tolist(), "value": limit.tolist(), "last": 5.5},
        },
        "left_out": [
            {"what": "tangent Gram", "why": "on 40 of 1,437 samples", "budget": "2.2h"},
            {"what": "smoothness along steps", "why": "more than the budget allows", "budget": None},
        ],
        "notes": ["Eval mode: dropout is off (2 modules), which it was not in training."],
    }
