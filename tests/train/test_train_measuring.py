"""`surefoot measure` from the inside: the plan, the subject, and the numbers against naive ones."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surefoot.errors import InputError
from surefoot.train.budget import MARGIN, Planner, Task, affordable, budget_text, parse_budget
from surefoot.train.config import TrainConfig
from surefoot.train.loop import train
from surefoot.train.measuring import NAMES, choose, measure
from surefoot.train.subject import from_config, from_run

TINY = TrainConfig(limit=40, width=(8,), steps=12, activation="tanh", loss="mse", dtype="float64", threads=1)

# ------------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("2m", 120), ("1h", 3600), (" 1.5m ", 90)])
def test_budgets_are_read(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["60", "", "s", "-5s", "0s", "1d", "2 m", "1m30s", "nan", "infs"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="write it as 60s, 2m or 1h"):
        parse_budget(text)


@given(st.floats(1e-3, 1e9))
@settings(deadline=None)
def test_a_budget_that_is_named_is_enough_and_not_much_more(seconds: float) -> None:
    named = parse_budget(budget_text(seconds))
    assert seconds * (1 - 1e-9) <= named <= max(seconds + 1, 1.2 * seconds)


def task(
    name: str, share: float, least: int, most: int, each: float, ran: list[tuple[str, int]], clock: list[float]
) -> Task:
    def run(n: int) -> None:
        ran.append((name, n))
        clock[0] += each * n

    return Task(name, name, share, least, most, lambda n: each * n, run)


@given(st.integers(1, 50), st.integers(0, 5000), st.floats(1e-3, 10), st.floats(0, 1000), st.sampled_from([1, 2, 3]))
@settings(deadline=None)
def test_affordable_is_the_most_there_is_time_for(least: int, more: int, each: float, time: float, power: int) -> None:
    most = least + more
    found = affordable(Task("t", "t", 1, least, most, lambda n: each * n**power, lambda n: None), time)
    if found == 0:
        assert each * least**power > time
    else:
        assert least <= found <= most
        assert each * found**power <= time
        assert found == most or each * (found + 1) ** power > time


def test_what_one_task_leaves_over_goes_to_the_next() -> None:
    ran: list[tuple[str, int]] = []
    clock = [0.0]
    planner = Planner(100.0 / MARGIN, lambda: clock[0])
    said: list[str] = []
    tasks = [
        task("cheap", 1, 1, 10, 1.0, ran, clock),
        task("dear", 1, 1000, 2000, 1.0, ran, clock),
        task("elastic", 1, 1, 500, 1.0, ran, clock),
    ]
    planner.go(tasks, lambda what, part: said.append(what))
    assert ran == [("cheap", 10), ("elastic", 90)]
    assert said == ["cheap", "elastic", "done"]
    dear, elastic = planner.left_out
    assert (dear.what, dear.why, dear.budget) == ("dear", "more than the budget allows", 3000.0 / MARGIN)
    assert (elastic.why, elastic.budget) == ("on 90 of 500 samples", 1500.0 / MARGIN)


def test_with_the_budget_named_nothing_is_left_out() -> None:
    for seconds, expected in ((100.0 / MARGIN, 90), (1500.0 / MARGIN, 500)):
        ran: list[tuple[str, int]] = []
        clock = [0.0]
        planner = Planner(seconds, lambda clock=clock: clock[0])
        tasks = [task(n, 1, 1, m, 1.0, ran, clock) for n, m in (("a", 5), ("b", 5), ("c", 500))]
        planner.go(tasks, lambda what, part: None)
        assert ran[-1] == ("c", expected)
        assert bool(planner.left_out) == (expected == 90)


@pytest.mark.parametrize(
    ("time", "why", "budget"),
    [
        (5.0, "on 5 of 50 samples; no more than 20 fit into the memory", 20.0),
        (100.0, "on 20 of 50 samples; more do not fit into the memory", None),
    ],
)
def test_what_the_memory_leaves_out_is_said(time: float, why: str, budget: float | None) -> None:
    planner = Planner(time / MARGIN, lambda: 0.0)
    planner.go([Task("t", "t", 1, 1, 20, float, lambda n: None, whole=50)], lambda what, part: None)
    [entry] = planner.left_out
    assert entry.why == why
    assert entry.budget == (None if budget is None else pytest.approx(budget / MARGIN))


def test_what_cannot_be_measured_is_told_or_an_error_if_asked_for() -> None:
    def run(n: int) -> None:
        raise InputError("this makes no sense")

    tasks = [Task("t", "the thing", 1, 1, 1, lambda n: 0.0, run)]
    planner = Planner(10)
    planner.go(tasks, lambda what, part: None)
    assert [(e.what, e.why, e.budget) for e in planner.left_out] == [("the thing", "this makes no sense", None)]
    with pytest.raises(InputError, match="makes no sense"):
        Planner(10).go(tasks, lambda what, part: None, asked=True)


def test_names_are_chosen() -> None:
    assert choose(None) == NAMES
    assert choose("gram, sharpness") == ("gram", "sharpness")
    assert choose(None, expressivity=True) == ("features",)
    with pytest.raises(InputError, match="did you mean sharpness"):
        choose("sharpnes")
    with pytest.raises(InputError, match="names nothing"):
        choose(",")
    with pytest.raises(InputError, match="contradict"):
        choose("gram", expressivity=True)


# ------------------------------------------------------------------------------------------------- against naive twins


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(TINY, folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def document(run: Path):
    return measure(lambda: from_run(run), 60)


def value(document, name: str) -> float:
    [found] = [m for m in document["measurements"] if m["name"] == name]
    return float(found["value"])


def naive(run: Path):
    """The model, all rows, one-hot targets, and the Jacobian of all outputs by autograd: (N C, P)."""
    subject = from_run(run)
    x, y, _ = subject.pick(subject.rows)
    model = subject.job.model
    out = model(x)
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(f, list(model.parameters()), retain_graph=True)])
            for f in out.flatten()]  # fmt: skip
    return model, x, F.one_hot(y, 10).double(), torch.stack(rows)


def test_everything_fits_a_small_job(document) -> None:
    assert document["left_out"] == []
    kinds = {m["name"]: (m["kind"], m["level"]) for m in document["measurements"]}
    assert kinds["lambda_min(K)"] == ("lower bound", "verified")
    assert kinds["lambda_max(K)"] == ("upper bound", "verified")
    assert kinds["lambda_max(Hessian)"][0] == "estimate"


def test_the_numbers_are_those_of_naive_twins(run: Path, document) -> None:
    model, x, y, J = naive(run)
    residual = (model(x) - y).detach().flatten()
    n = residual.numel()
    loss = residual.square().mean().item()
    gradient = 2 / n * J.T @ residual
    assert value(document, "f, the loss") == pytest.approx(loss, rel=1e-12)
    assert value(document, "‖grad f‖") == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert value(document, "‖grad f‖^2 / (2 (f - f*))") == pytest.approx(
        gradient.norm().item() ** 2 / 2 / loss, rel=1e-12
    )
    K = J @ J.T
    eigenvalues = torch.linalg.eigvalsh(K)
    assert value(document, "lambda_max(K)") == pytest.approx(eigenvalues[-1].item(), rel=1e-5)
    assert value(document, "lambda_max(K)") >= eigenvalues[-1].item()
    assert value(document, "lambda_min(K)") <= eigenvalues[0].item() + 1e-12
    assert value(document, "r^T K r / ‖r‖^2") == pytest.approx(
        (residual @ K @ residual / residual.square().sum()).item()
    )
    spectrum = document["series"]["spectrum"]
    assert (spectrum["total"], spectrum["samples"], spectrum["outputs"]) == (400, 40, 10)
    assert spectrum["value"] == pytest.approx(eigenvalues.flip(0).tolist(), abs=1e-9)
    gauss_newton = 2 / n * J.T @ J
    top = torch.linalg.eigvalsh(gauss_newton)[-1].item()
    assert value(document, "lambda_max(Gauss-Newton matrix)") == pytest.approx(top, rel=1e-2)


def test_sharpness_is_that_of_the_dense_hessian(run: Path, document) -> None:
    model, x, y, _ = naive(run)
    names, params = zip(*model.named_parameters())
    sizes = [p.numel() for p in params]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.view_as(p) for part, p in zip(flat.split(sizes), params)]
        return F.mse_loss(torch.func.functional_call(model, dict(zip(names, parts)), (x,)), y)

    H = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params]))
    assert value(document, "lambda_max(Hessian)") == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-2)
    points = document["series"]["sharpness"]
    assert points["step"] == [0, 12]
    assert points["value"][1] == value(document, "lambda_max(Hessian)")
    assert document["series"]["stability"]["step"] == list(range(1, 13))


def test_the_rank_is_that_of_the_last_hidden_layer(run: Path, document) -> None:
    model, x, _, _ = naive(run)
    hidden = model[:-1](x).detach()
    Phi = torch.cat([hidden, torch.ones(40, 1)], 1).double()
    assert Phi.shape == (40, 9)
    ranks = [m for m in document["measurements"] if m["name"] == "rank(Phi)"]
    assert [(m["kind"], m["level"], m["value"]) for m in ranks] == [
        ("lower bound", "verified", 9.0),
        ("upper bound", "verified", 9.0),
    ]
    assert torch.linalg.matrix_rank(Phi) == 9
    assert any("is refuted" in note for note in ranks[0]["notes"])
    top = torch.linalg.svdvals(Phi)[0].item()
    assert top <= value(document, "s_1(Phi)") <= top * (1 + 1e-5)


def test_a_wide_layer_at_initialisation_is_expressive() -> None:
    config = TrainConfig(limit=30, width=(64,), activation="tanh", threads=1)
    document = measure(lambda: from_config(config), 60, ("features",))
    found = document["measurements"]
    assert [m["name"] for m in found][:2] == ["rank(Phi)", "rank(Phi)"]
    assert found[0]["value"] == 30
    assert any("is proved" in note for note in found[0]["notes"])
    assert value(document, "s_N(Phi)") > 0


def test_residual_of_cross_entropy_is_softmax_less_target() -> None:
    subject = from_config(TrainConfig(limit=40, width=(8,), dtype="float64", threads=1))
    x, y, _ = subject.pick(7)
    out = subject.job.model(x)
    expected = out.softmax(1) - F.one_hot(y, 10)
    torch.testing.assert_close(subject.residual(out, y), expected.detach())


def test_noise_is_the_variance_of_one_rows_gradient(run: Path, document) -> None:
    model, x, y, _ = naive(run)
    params = list(model.parameters())
    each = [torch.autograd.grad(F.mse_loss(model(x[i : i + 1]), y[i : i + 1]), params) for i in range(40)]
    grads = torch.stack([torch.cat([g.flatten() for g in parts]) for parts in each])
    # 40 pieces are the 40 rows here; the mean over 20 pairs of the pair's variance.
    expected = grads.var(0, unbiased=True).sum().item()
    assert value(document, "sigma²") == pytest.approx(expected, rel=0.5)


# ------------------------------------------------------------------------------------------------------- the subject


def test_the_run_is_left_as_it_was(run: Path) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    torch.manual_seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    threads = torch.get_num_threads()
    subject = from_run(run)
    weights = {k: v.clone() for k, v in subject.job.model.state_dict().items()}
    torch.set_rng_state(states[0])
    np.random.seed(3)
    measure(lambda: subject, 60)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert all(torch.equal(v, weights[k]) for k, v in subject.job.model.state_dict().items())
    assert all(p.grad is None for p in subject.job.model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.get_num_threads() == threads


def test_the_same_rows_are_picked_every_time() -> None:
    subject = from_config(TINY)
    rows = subject.pick(10)[2]
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, from_config(TINY).pick(10)[2])
    assert set(rows.tolist()) <= set(subject.pick(20)[2].tolist())
    assert subject.pick(40)[2].tolist() == list(range(40))


def test_equal_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [f"{i}.5,{i * i},{i / 7}" for i in range(20)]
    rows += [rows[3], "5.5,25,0.9"]  # the second has another target
    (tmp_path / "t.csv").write_text("a,b,y\n" + "\n".join(rows) + "\n")
    (tmp_path / "test.csv").write_text("")
    config = TrainConfig(data=str(tmp_path / "t.csv"), target="y", width=(4,), threads=1, test_fraction=0.05)
    found = measure(lambda: from_config(config), 60, ("gradient",))
    [equal] = [m for m in found["measurements"] if m["name"] == "equal training rows"]
    assert (equal["kind"], equal["level"]) == ("exact", "verified")
    expected = 2 if len(equal["notes"]) == 3 else 1
    assert equal["value"] == expected
    assert equal["notes"][0].startswith("equal training rows: ")


def test_a_gram_of_more_rows_than_parameters_is_called_singular() -> None:
    config = TrainConfig(limit=40, width=(2,), threads=1)  # 160 parameters, 400 rows of K
    document = measure(lambda: from_config(config), 60, ("gram",))
    [smallest] = [m for m in document["measurements"] if m["name"] == "lambda_min(K)"]
    assert float(smallest["value"]) <= 0
    assert any("rank 160 at most" in note for note in smallest["notes"])


def test_dropout_and_batch_norm_are_switched_off_and_said_so(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "from torch import nn\n"
        "def net(outputs):\n"
        "    layers = nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, outputs)\n"
        "    return nn.Sequential(*layers)\n"
    )
    config = TrainConfig(model=f"{tmp_path / 'm.py'}:net", limit=40, threads=1)
    subject = from_config(config)
    assert not any(m.training for m in subject.job.model.modules())
    document = measure(lambda: subject, 60)
    assert any("dropout is off (1 modules)" in note for note in document["notes"])
    assert any("batch norm uses its running statistics" in note for note in document["notes"])
    assert math.isfinite(value(document, "L0"))
    assert isinstance(subject.job.model[2], nn.BatchNorm1d)
    assert subject.job.model[2].num_batches_tracked == 0


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam"},
        {"momentum": 0.9, "lr_schedule": "cosine"},
        {"model": "vae", "width": (8,), "loss": "auto"},
    ],
)
def test_other_jobs(tmp_path: Path, options: dict) -> None:
    base = {"limit": 60, "width": (8,), "steps": 15, "threads": 1, **options}
    train(TrainConfig(**base), tmp_path / "run", quiet=True)
    document = measure(lambda: from_run(tmp_path / "run"), 60)
    names = {m["name"] for m in document["measurements"]}
    assert {"f, the loss", "sigma²", "lambda_max(Hessian)", "L0", "L1"} <= names
    said = " ".join(document["notes"])
    if options.get("optimizer") == "adam":
        assert "no 2/h" in said
        assert "stability" not in document["series"]
    if options.get("momentum"):
        assert "2 (1 + momentum)/h" in said
    if options.get("model") == "vae":
        assert {e["what"] for e in document["left_out"]} >= {"tangent Gram", "Gauss-Newton"}
    else:
        assert "lambda_min(K)" in names


def test_smoothness_recorded_in_training_is_used(tmp_path: Path) -> None:
    config = TrainConfig(limit=40, width=(8,), steps=20, threads=1, batch_size=10, probe_smoothness=1)
    written = train(config, tmp_path / "run", quiet=True)["smoothness"]["fit"]
    document = measure(lambda: from_run(tmp_path / "run"), 60, ("smoothness",))
    assert value(document, "L0") == written["L0"]["value"]
    assert value(document, "L1") == written["L1"]["value"]
    assert any("along the run itself" in note for m in document["measurements"] for note in m["notes"])


def test_a_small_budget_leaves_out_and_names_what_it_takes() -> None:
    document = measure(lambda: from_config(TrainConfig(threads=1)), 0.5)
    assert document["left_out"]
    for entry in document["left_out"]:
        assert entry["budget"] is None or parse_budget(entry["budget"]) > 0.5
