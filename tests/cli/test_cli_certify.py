"""`surefoot certify` as a user types it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from surefoot.certificates import Certificate
from surefoot.check import verify
from surefoot.cli.certify import CertifyArgs
from surefoot.cli.main import main
from surefoot.train.config import flag

MODELS = """
import torch
from torch import nn

def normed(input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, outputs))

class Bomb(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return self.layer(x.flatten(1)) * (float("nan") if self.calls >= 5 else 1.0)

def bomb():
    return Bomb()
"""
TRAINED = """
import torch
from torch import nn

def trained(input_shape=(), outputs=10):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10))
"""
SMALL = ("--limit", "12", "--width", "48", "--depth", "1", "--activation", "tanh", "--loss", "mse", "--epochs", "40")


def train(folder: Path, *options: str | Path) -> int:
    return main(["train", *map(str, options), "--threads", "1", "--out", str(folder)])


def certify(run: Path, *options: str | Path) -> int:
    return main(["certify", str(run), "--threads", "1", *map(str, options)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder, *SMALL) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def by_cross_entropy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(folder, *SMALL, "--loss", "cross-entropy") == 0
    return folder


def said(run: Path) -> dict:
    def strict(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((run / "certificate.json").read_text(encoding="utf-8"), parse_constant=strict)


def test_a_run_is_proved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert certify(run) == 0
    printed = capsys.readouterr().out
    for part in (
        "PROVED",
        "all of them",
        "s_min(J(w0))",
        "radius",
        "eta_max",
        "lr_max",
        "these criteria apply",
        "Polishing moved the weights by",
        "test accuracy on 359 rows went from",
        f"surefoot verify {run / 'certificate'}",
    ):
        assert part in printed, part
    assert printed.strip().endswith(f"report: {run / 'report.html'}")
    changed = {p for p, content in before.items() if (run / p).read_bytes() != content}
    assert changed == {Path("report.html")}
    new = {p.relative_to(run) for p in run.rglob("*") if p.is_file()} - before.keys()
    files = {Path("certificate/certificate.json"), Path("certificate/tensors.safetensors")}
    assert new == {Path("certificate.json"), *files}
    assert verify(run / "certificate")
    document = said(run)
    assert document["verdict"]["outcome"] == "proved"
    assert document["samples"] == document["rows"] == 12
    assert document["rule"].startswith("--optimizer delta-gclip with --lr up to")
    assert document["lr_max"] == Certificate.load(run / "certificate").units["lr_max"]
    before_, after = document["polishing"]["residual"]
    assert after < 1e-3 < before_
    # The statement and the sentence after it count from the same weights.
    assert f"the residual fell from {before_:.4g} to " in document["statement"]
    assert f"they moved by {document['polishing']['distance']:.4g}," in document["statement"]
    assert f"output bias taken to mean 0, residual {before_:.3g} -> " in printed
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="certificate"' in page
    assert "PROVED" in page


def test_the_targets_are_those_of_training(run: Path) -> None:
    from surefoot.train.subject import from_run

    assert certify(run) == 0
    data = from_run(run).job.data
    tensors = Certificate.load(run / "certificate").tensors
    assert torch.equal(tensors["targets"], torch.nn.functional.one_hot(data.train_y, 10).double())
    assert torch.equal(tensors["inputs"], data.train_x.double())


def test_some_samples_are_said_to_be_some(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "proof"
    assert certify(run, "--samples", "5", "--out", out, "--epsilon", "0.3") == 0
    assert "the first of 12: no word of the others" in capsys.readouterr().out
    certificate = Certificate.load(out)
    assert len(certificate.tensors["inputs"]) == 5
    assert "first 5 of the 12 training rows: nothing is said of the other 7" in certificate.statement
    assert "first 5 of the 12 training rows of digits" in certificate.data["source"]
    assert certificate.claims["epsilon"] == 0.3
    assert not (run / "certificate").exists()
    assert said(run)["folder"] == str(out)


def test_what_is_not_proved_says_what_would_help(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert certify(run, "--no-polish") == 1
    printed = capsys.readouterr().out
    assert "UNDECIDED" not in printed
    for part in ("NOT PROVED", "undecided: q = beta rho/s0^2", "what would help: ", "polish"):
        assert part in printed, part
    assert not (run / "certificate").exists()
    assert said(run)["verdict"]["outcome"] == "undecided"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "NOT PROVED" in page
    assert "What would help" in page
    assert certify(run) == 0  # a later proof takes its place
    assert "NOT PROVED" not in (run / "report.html").read_text(encoding="utf-8")


def test_data_that_nothing_interpolates_are_refuted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "twice.csv"
    table.write_text("a,b,y\n" + "".join(f"{i % 4},{i % 3},{i / 10}\n" for i in range(40)))
    options = ("--data", table, "--target", "y", "--steps", "5", "--width", "64", "--activation", "tanh")
    assert train(tmp_path / "run", *options) == 0
    assert certify(tmp_path / "run") == 1
    printed = capsys.readouterr().out
    assert "REFUTED" in printed
    assert "what would help: " in printed


def test_a_regression_is_proved(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    rows = "".join(f"{i},{(7 * i) % 11},{(i * i) % 13 / 3}\n" for i in range(15))
    table.write_text("a,b,y\n" + rows)
    options = (
        "--data",
        table,
        "--target",
        "y",
        "--steps",
        "50",
        "--width",
        "64",
        "--depth",
        "1",
        "--activation",
        "tanh",
    )
    assert train(tmp_path / "run", *options, "--task", "regression", "--optimizer", "normalized-gd") == 0
    assert certify(tmp_path / "run") == 0
    assert verify(tmp_path / "run" / "certificate")
    document = said(tmp_path / "run")
    assert "--optimizer normalized-gd --beta 0.25 with --lr up to" in document["rule"]
    assert document["polishing"]["metric"] == "test RMSE"


def test_the_last_layer_under_cross_entropy(
    by_cross_entropy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(by_cross_entropy, tmp_path / "run"))
    assert certify(run) == 2
    error = capsys.readouterr().err
    assert "--layers last" in error
    assert "--loss mse" in error
    assert certify(run, "--layers", "last") == 0
    assert verify(run / "certificate")
    assert said(run)["polishing"] is None
    assert "the last dense layer on frozen features" in capsys.readouterr().out


def test_the_last_layer_under_mse(run: Path) -> None:
    assert certify(run, "--layers", "last") == 0
    assert verify(run / "certificate")


def trained_factory(folder: Path) -> str:
    (folder / "mine.py").write_text(TRAINED)
    return f"{folder / 'mine.py'}:trained"


def test_a_model_and_data_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = (
        "--model",
        trained_factory(tmp_path),
        "--limit",
        "8",
        "--loss",
        "mse",
        "--threads",
        "1",
        "--out",
        str(out),
    )
    assert main(["certify", *options]) == 0
    printed = capsys.readouterr().out
    assert "as the model came, then polished" in printed
    assert "this run used" not in printed
    assert printed.strip().endswith(f"report: {out / 'report.html'}")
    assert {p.name for p in out.iterdir()} == {"certificate", "certificate.json", "report.html"}
    assert verify(out / "certificate")
    document = said(out)
    assert document["step"] is None
    assert document["title"] == "mine.py:trained on digits"
    assert (
        Certificate.load(out / "certificate")
        .data["source"]
        .endswith("at the initial weights of mine.py:trained on digits")
    )
    # The factory's own weights are where polishing began.
    tensors = Certificate.load(out / "certificate").tensors
    moved = sum(float((tensors[name] - p).square().sum()) for name, p in trained_weights().items()) ** 0.5
    assert document["polishing"]["distance"] == pytest.approx(moved, rel=1e-6)
    assert "Certificate" in (out / "report.html").read_text(encoding="utf-8")
    assert main(["certify", *options]) == 2
    assert f"--out {out} is not empty" in capsys.readouterr().err


def trained_weights() -> dict[str, torch.Tensor]:
    space: dict = {}
    exec(TRAINED, space)
    return {name: p.detach().double() for name, p in space["trained"]().named_parameters()}


def test_without_a_run_and_without_a_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ("--model", "mlp", "--width", "64", "--activation", "tanh", "--limit", "8", "--loss", "mse")
    assert main(["certify", *options, "--no-polish", "--threads", "1", "--out", str(out)]) == 1
    assert "NOT PROVED" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"certificate.json", "report.html"}
    assert "NOT PROVED" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["nothing to certify", "--model and --data"]),
        (["somewhere", "--model", "mlp"], ["RUN somewhere says what to certify", "leave out --model"]),
        (["--model", "mlp", "--limit", "8"], ["--model mlp", "--loss cross-entropy", "--loss mse", "--layers last"]),
        (["--model", "mlp", "--limit", "8", "--loss", "mse", "--samples", "9"], ["--samples 9", "8"]),
    ],
)
def test_nonsense_without_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["certify", *options]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error, error
    assert list(tmp_path.iterdir()) == []


def nothing(run: Path) -> None:
    shutil.rmtree(run)


def no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def there_already(run: Path) -> None:
    (run / "certificate").mkdir()
    (run / "certificate" / "precious").write_text("x")


@pytest.mark.parametrize(
    ("spoil", "options", "parts"),
    [
        (nothing, [], ["no such folder"]),
        (no_checkpoint, [], ["no checkpoint", "--resume"]),
        (there_already, [], ["exists already", "--out"]),
        (None, ["--out", "{run}"], ["--out", "exists already"]),
        (None, ["--samples", "0"], ["--samples 0", "12"]),
        (None, ["--samples", "13"], ["--samples 13", "12"]),
        (None, ["--epsilon", "1"], ["--epsilon 1", "between 0 and 1"]),
        (None, ["--threads", "0"], ["--threads 0"]),
    ],
)
def test_nonsense_is_named_and_writes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], spoil: object, options: list[str], parts: list[str]
) -> None:
    if callable(spoil):
        spoil(run)
    before = sorted(run.rglob("*"))
    assert certify(run, *(o.replace("{run}", str(run)) for o in options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("surefoot certify: ")
    assert "Traceback" not in error
    for part in parts:
        assert part in error, error
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (("--model", "{mine}:normed", "--loss", "mse"), 0, ["LayerNorm", "--layers last of surefoot certify"]),
        (("--model", "{mine}:bomb", "--loss", "mse"), 2, ["diverged", "loss became nan"]),
        (("--model", "vae"), 0, ["no certificate for autoencoding"]),
    ],
    ids=["no rule", "diverged", "vae"],
)
def test_runs_without_a_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], code: int, parts: list[str]
) -> None:
    (tmp_path / "mine.py").write_text(MODELS)
    given = (o.replace("{mine}", str(tmp_path / "mine.py")) for o in options)
    assert train(tmp_path / "run", *given, "--limit", "20", "--steps", "8") == code
    capsys.readouterr()
    assert certify(tmp_path / "run") == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error, error
    assert not (tmp_path / "run" / "certificate.json").exists()


def test_a_module_without_a_rule_still_has_a_last_layer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODELS)
    assert train(tmp_path / "run", "--model", f"{tmp_path / 'mine.py'}:normed", "--limit", "20", "--steps", "8") == 0
    assert certify(tmp_path / "run", "--layers", "last") == 0
    assert verify(tmp_path / "run" / "certificate")


def test_every_option_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "certify.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(CertifyArgs):
        assert field.name == "run" or f"`{flag(field.name)}`" in page, field.name


def test_comparisons_do_not_stop_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SMALL, "--until-certified", "--out", str(tmp_path / "c")]) == 2
    assert "--until-certified" in capsys.readouterr().err
