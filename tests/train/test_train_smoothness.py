"""`--probe-smoothness`: the same weights bit for bit, rows that resume, a fit in run.json and in the report."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from surefoot.errors import InputError
from surefoot.measure.smoothness_fit import SmoothnessFit
from surefoot.report import render
from surefoot.train import TrainConfig, resume, train
from surefoot.train.document import rebuild_run

# Dropout and batch norm: random state and buffers matter.
MODEL = """
from torch import nn

def build(input_shape, outputs):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, outputs)
    )
"""


def config(folder: Path, **options: Any) -> TrainConfig:
    model = folder / "model.py"
    model.write_text(MODEL)
    start: dict[str, Any] = {"steps": 60, "batch_size": 32, "momentum": 0.9, "lr": 0.5, "threads": 1, "eval_every": 20}
    return TrainConfig(model=f"{model}:build", checkpoint_seconds=1e-9, **{**start, **options})


def digests(folder: Path) -> list[str]:
    last = max(folder.glob("checkpoints/step-*"))
    return [hashlib.sha256((last / f"{name}.safetensors").read_bytes()).hexdigest() for name in ("model", "optimizer")]


def rows(folder: Path, name: str = "smoothness") -> dict[str, list[Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pydict()


def test_the_weights_are_those_without(tmp_path: Path) -> None:
    plain = train(config(tmp_path), tmp_path / "plain", quiet=True)
    probed = train(config(tmp_path, probe_smoothness=4), tmp_path / "probed", quiet=True)
    assert digests(tmp_path / "plain") == digests(tmp_path / "probed")
    assert repr(rows(tmp_path / "plain", "metrics")) == repr(rows(tmp_path / "probed", "metrics"))
    assert "smoothness" not in plain
    assert not (tmp_path / "plain" / "smoothness.parquet").exists()
    found = rows(tmp_path / "probed")
    assert found["step"] == list(range(4, 61, 4))
    assert set(found["outcome"]) == {"measured"}
    assert all(math.isnan(v) for v in found["noise"])
    at = [rows(tmp_path / "probed", "metrics")["step_length"][step - 1] for step in found["step"]]
    assert found["step_length"] == pytest.approx(at, rel=1e-5)
    fit = SmoothnessFit.from_json(probed["smoothness"]["fit"])
    assert fit.points == 15
    assert fit.L0.dtype == "float32"
    assert fit.L0.cost == "7 extra gradients every 4 steps"
    assert rebuild_run(tmp_path / "probed")["smoothness"] == probed["smoothness"]
    assert "Smoothness against gradient norm" in render(probed)


def test_micro_batches_measure_the_noise_of_the_same_batch(tmp_path: Path) -> None:
    """Without batch norm a batch in pieces is the same function; dropout is left out too."""
    options = {"model": "mlp", "width": (16,), "probe_smoothness": 5, "dtype": "float64", "steps": 50}
    whole = train(TrainConfig(**options, threads=1), tmp_path / "whole", quiet=True)
    pieces = train(TrainConfig(**options, threads=1, micro_batch=16), tmp_path / "pieces", quiet=True)
    one, other = rows(tmp_path / "whole"), rows(tmp_path / "pieces")
    assert one["smoothness"] == pytest.approx(other["smoothness"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
    assert whole["smoothness"]["fit"]["noise"] is None
    assert pieces["smoothness"]["fit"]["noise"]["value"] > 0
    # the norm is that of the training step
    at = [rows(tmp_path / "whole", "metrics")["grad_norm"][step - 1] for step in one["step"]]
    assert one["grad_norm"] == pytest.approx(at, rel=1e-9)


def test_a_resumed_run_has_the_same_rows(tmp_path: Path) -> None:
    options = config(tmp_path, probe_smoothness=3)
    whole = train(options, tmp_path / "whole", quiet=True)
    train(options, tmp_path / "broken", quiet=True)
    shutil.rmtree(max((tmp_path / "broken").glob("checkpoints/step-*")))
    run = tmp_path / "broken" / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"status": "running"}))
    resumed = resume(tmp_path / "broken", quiet=True)
    assert repr(rows(tmp_path / "broken")) == repr(rows(tmp_path / "whole"))
    assert resumed["smoothness"] == whole["smoothness"]
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_too_few_probes_are_said(tmp_path: Path) -> None:
    document = train(config(tmp_path, probe_smoothness=20), tmp_path / "run", quiet=True)
    assert document["smoothness"]["fit"] is None
    assert "3 of 3 could be used" in document["smoothness"]["message"]
    assert "No line was fitted" in render(document)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"probe_smoothness": 0}, "--probe-smoothness 0 is too small"),
        ({"probe_smoothness": 5, "parallel": "fsdp"}, "--probe-smoothness 5 needs whole parameters"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TrainConfig(**options).resolved()
