"""`surefoot train` as a user types it."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from surefoot.cli.main import main

MODEL = """
import torch
from torch import nn

def good(input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))

def too_wide(input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs + 1))

class Bomb(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        out = self.layer(x.flatten(1))
        return out * (float("nan") if self.calls >= 25 else 1.0)

def bomb():
    return Bomb()

number = 3
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MODEL)
    return path


def run(folder: Path, *args: str | Path) -> int:
    return main(["train", *map(str, args), "--out", str(folder), "--threads", "1"])


def test_a_run_leaves_everything_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--epochs", "2", "--loss", "mse") == 0
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert printed.strip().endswith(f"report: {folder / 'report.html'}")
    names = {p.name for p in folder.iterdir()}
    expected = {"config.json", "data.json", "metrics.parquet", "evals.parquet", "run.json", "report.html"}
    assert names == expected | {"tensorboard", "checkpoints"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["lr"], config["gamma"], config["delta"], config["loss"]) == (1.0, 0.25, 0.01, "mse")
    rows = pq.read_table(folder / "metrics.parquet").to_pydict()
    assert list(rows) == [
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "lr",
        "gamma",
        "delta",
        "scale",
        "regime",
        "step_length",
    ]
    document = json.loads((folder / "run.json").read_text())
    assert document["status"] == "finished"
    assert len(rows["step"]) == document["summary"]["steps"] == sum(document["regimes"].values())
    with safe_open(folder / "checkpoints" / f"step-{len(rows['step']):08d}" / "model.safetensors", "pt") as weights:
        assert sum(weights.get_tensor(k).numel() for k in weights.keys()) == document["model"]["parameters"]  # noqa: SIM118
    assert any(p.name.startswith("events") for p in (folder / "tensorboard").iterdir())


def test_the_rows_obey_the_rule(tmp_path: Path) -> None:
    """Every row against the formula: scale = min(1, max(δ, γ/||g||)), step_length = lr scale ||g||."""
    folder = tmp_path / "run"
    assert run(folder, "--epochs", "3", "--lr", "0.3", "--gamma", "0.6", "--delta", "0.7", "--batch-size", "16") == 0
    rows = pq.read_table(folder / "metrics.parquet").to_pylist()
    assert {r["regime"] for r in rows} == {"unclipped", "clipped", "floored"}
    for r in rows:
        scale = min(1.0, max(r["delta"], r["gamma"] / r["grad_norm"]))
        assert r["scale"] == pytest.approx(scale, rel=1e-12)
        assert r["step_length"] == pytest.approx(r["lr"] * scale * r["grad_norm"], rel=1e-12)
        regime = "unclipped" if r["grad_norm"] <= 0.6 else "clipped" if r["grad_norm"] < 0.6 / 0.7 else "floored"
        assert r["regime"] == regime


def test_step_length_with_momentum_is_the_distance_moved(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--steps", "2", "--momentum", "0.9", "--checkpoint-seconds", "1e-9") == 0
    weights = []
    for step in (1, 2):
        with safe_open(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors", "pt") as file:
            weights.append({k: file.get_tensor(k).double() for k in file.keys()})  # noqa: SIM118
    moved = sum((weights[1][k] - weights[0][k]).square().sum() for k in weights[0]).sqrt()
    row = pq.read_table(folder / "metrics.parquet").to_pylist()[1]
    assert row["step_length"] == pytest.approx(moved.item(), rel=1e-6)
    assert row["step_length"] > 1.3 * row["lr"] * row["scale"] * row["grad_norm"]


def test_config_json_repeats_the_run_bit_for_bit(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(first, "--steps", "60", "--width", "32", "--momentum", "0.9", "--seed", "7") == 0
    assert main(["train", "--config", str(first / "config.json"), "--out", str(second)]) == 0
    name = "checkpoints/step-00000060/model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    rows = [pq.read_table(f / "metrics.parquet") for f in (first, second)]
    assert rows[0].equals(rows[1])
    third = tmp_path / "third"
    assert main(["train", "--config", str(first / "config.json"), "--seed", "8", "--out", str(third)]) == 0
    assert not pq.read_table(third / "metrics.parquet").equals(rows[0])


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer gclip --gamma 0.1",
        "--optimizer normalized-gd",
        "--optimizer smooth-clip --momentum 0.5 --nesterov",
        "--optimizer sgd --lr 0.5 --momentum 0.9 --lr-schedule step",
        "--optimizer sgd --lr 0.5 --gamma 0.1 --delta 0.5",
        "--optimizer adam",
        "--optimizer adamw --gamma 0.5 --weight-decay 0.01 --lr-schedule linear --warmup 5",
        "--optimizer delta-gclip --batch-size full --dtype float64 --micro-batch 500 --loss mse",
        "--model vae",
        "--data digits --model resnet20 --limit 100",
        "--model vit-tiny --depth 1 --width 64 --limit 100 --optimizer adam",
    ],
)
def test_every_choice_trains(tmp_path: Path, options: str) -> None:
    folder = tmp_path / "run"
    assert run(folder, *options.split(), "--steps", "12") == 0
    loss = pq.read_table(folder / "metrics.parquet")["loss"].to_pylist()
    assert len(loss) == 12
    assert loss[-1] < loss[0]


def test_micro_batches_are_the_same_mathematics(tmp_path: Path) -> None:
    args = ["--batch-size", "full", "--steps", "5", "--dtype", "float64", "--loss", "mse", "--lr", "2"]
    assert run(tmp_path / "a", *args) == 0
    assert run(tmp_path / "b", *args, "--micro-batch", "100") == 0
    a, b = (pq.read_table(tmp_path / n / "metrics.parquet")["grad_norm"].to_pylist() for n in "ab")
    assert a == pytest.approx(b, rel=1e-12)


def test_the_users_own_model(tmp_path: Path, model_file: Path) -> None:
    assert run(tmp_path / "run", "--model", f"{model_file}:good", "--steps", "20") == 0


def test_a_loss_that_turns_nan_stops_the_run_and_keeps_the_last_weights(
    tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--model", f"{model_file}:bomb", "--steps", "50") == 2
    message = capsys.readouterr().err
    for part in ("loss became nan at step 25", "the gradient norm was", "at step 24", "--lr (now 1)", "--gamma (now"):
        assert part in message
    document = json.loads((folder / "run.json").read_text())
    assert document["status"] == "diverged"
    assert (folder / "report.html").is_file()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000000"]


CSV = "a,b,y\n1,2,0.5\n2,3,0.7\n3,4,0.1\n5,1,0.9\n2,2,0.4\n4,4,0.2\n"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--data", "nothing-here"], ["nothing-here"]),
        (["--data", "{tmp}/t.csv"], ["--target", "a, b, y"]),
        (["--data", "{tmp}/t.csv", "--target", "z"], ["'z'"]),
        (["--data", "{tmp}/words.csv", "--target", "y"], ["'b'", "line 3"]),
        (["--data", "{tmp}/nan.csv", "--target", "y"], ["'a'", "line 4"]),
        (["--data", "{tmp}/t.csv", "--target", "y", "--loss", "cross-entropy"], ["--loss cross-entropy"]),
        (["--data", "{tmp}/broken"], ["train-00000.parquet"]),
        (["--model", "{tmp}/mine.py:nothing"], ["nothing"]),
        (["--model", "{tmp}/mine.py:number"], ["number"]),
        (["--model", "{tmp}/missing.py:f"], ["missing.py"]),
        (["--model", "{tmp}/mine.py:too_wide"], ["11", "10"]),
        (["--model", "mlpp"], ["mlp"]),
        (["--model", "vae", "--loss", "mse"], ["--loss mse"]),
        (["--gamma", "0"], ["--gamma 0"]),
        (["--delta", "2"], ["--delta 2"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--lr", "-1"], ["--lr -1"]),
        (["--device", "cuda:77"], ["--device cuda:77"]),
        (["--config", "{tmp}/missing.json"], ["missing.json"]),
    ],
)
def test_bad_input_is_named_and_writes_nothing(
    tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str], args: list[str], parts: list[str]
) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    (tmp_path / "words.csv").write_text(CSV.replace("2,3,", "2,three,"))
    (tmp_path / "nan.csv").write_text(CSV.replace("3,4,", ",4,"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train-00000.parquet").write_bytes(b"PAR1 and then nothing")
    folder = tmp_path / "run"
    assert run(folder, *(a.replace("{tmp}", str(tmp_path)) for a in args)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("surefoot train: ")
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in captured.err
    assert not folder.exists()


@pytest.mark.parametrize("args", [["--nonsense"], ["--lr", "fast"], ["--batch-size", "half"], ["--loss", "hinge"]])
def test_what_cannot_be_parsed_exits_with_2(args: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *args)
    assert stop.value.code == 2
    assert not (tmp_path / "run").exists()


def test_out_and_resume_are_guarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    assert run(full, "--steps", "1") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in full.iterdir()] == ["precious"]
    assert main(["train", "--resume", str(full)]) == 2
    assert "is not a run" in capsys.readouterr().err
    folder = tmp_path / "run"
    assert run(folder, "--steps", "3") == 0
    assert main(["train", "--resume", str(folder), "--lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "another configuration" in error
    assert "--lr is 1.0 there, not 0.5" in error
    assert main(["train", "--resume", str(folder)]) == 0


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file stands in for a disk that fills up while a checkpoint is written."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "surefoot.cli.main", "train", "--width", "256", "256", "--threads", "1"]
    limit = 400_000  # bytes: the first checkpoint fits (0.35 MB), that with Adam's moments does not
    result = subprocess.run(
        [*command, "--out", str(folder), "--steps", "30", "--optimizer", "adam"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000000"]
    assert main(["train", "--resume", str(folder)]) == 0
    assert pq.read_table(folder / "metrics.parquet").num_rows == 30


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert "compare" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "'trian' is not a command" in capsys.readouterr().err
