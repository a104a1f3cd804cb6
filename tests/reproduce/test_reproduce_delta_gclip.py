"""The recipes of δ-GClip: the formula, upset batches, tuning, and judges that can say every word."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surefoot.data import Dataset, load
from surefoot.errors import InputError
from surefoot.optim import DeltaGClip
from surefoot.reproduce import trials
from surefoot.reproduce.figures import svg
from surefoot.reproduce.recipe import Experiment, Finding, Job, Recipe
from surefoot.reproduce.recipes import delta_gclip_floor as floor
from surefoot.reproduce.recipes import delta_gclip_parity as parity
from surefoot.reproduce.recipes import delta_gclip_table as table
from surefoot.reproduce.results import Results, Summary
from surefoot.reproduce.trials import Rule, Task, tune

MLP: dict[str, Any] = {
    "model": "mlp", "network": {"width": [16], "depth": 1}, "loss": "cross-entropy", "score": "accuracy", "batch": 32,
    "steps": 60, "valid": 200, "test": 300, "schedule": "constant",
}  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


# ------------------------------------------------------------------------------------------------------------ parity


def test_the_formula() -> None:
    w, g = [np.array([1.0, 2.0]), np.array([3.0])], [np.array([2.0, 3.0]), np.array([6.0])]  # ||g|| = 7
    for gamma, delta, h, regime in [
        (7.0, 0.5, 2.0, "unclipped"), (3.5, 0.1, 1.0, "clipped"), (0.7, 0.0, 0.2, "clipped"),
        (0.7, 0.5, 1.0, "floored"), (1.0, 1.0, 2.0, "floored"),
    ]:  # fmt: skip
        moved, found, word = parity.paper_step(w, g, 2.0, gamma, delta)
        assert found == pytest.approx(h)
        assert word == regime
        assert np.allclose(np.concatenate(moved), [1 - 2 * h, 2 - 3 * h, 3 - 6 * h])
    still, h, _ = parity.paper_step(w, [np.zeros(2), np.zeros(1)], 2.0, 1.0, 0.1)
    assert h == 2.0
    assert np.array_equal(still[0], w[0])


@pytest.fixture
def short(digits: Dataset) -> Job:
    first = parity.RECIPE.experiments[0]
    setting = {**first.setting, "steps": 40, "network": {"width": [16], "depth": 1}, "lr": 0.5, "gamma": 0.9}
    return Job(replace(first, setting=setting), "", 0, digits)


def test_our_step_is_the_formulas(short: Job) -> None:
    found = parity.run(short)
    for arm in (parity.DOUBLE, parity.SINGLE):
        assert found[arm]["clipped"] > 0
        assert found[arm]["floored"] > 0
        assert sum(found[arm][regime] for regime in parity.REGIMES) == 40
        assert 0 < found[arm]["worst"] <= parity.ONE_STEP
        assert found[arm]["disagreements"] == 0
    assert found[parity.DOUBLE]["apart"] < 1e-12
    assert 0 < found[parity.DOUBLE]["parted"] < 1e-12


def test_another_rule_is_noticed(short: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(DeltaGClip):
        def scale(self, norm: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
            return super().scale(norm + 1e-6, group)  # as torch's clip_grad_norm_ has it

    monkeypatch.setattr(parity, "DeltaGClip", Wrong)
    found = parity.run(short)
    assert found[parity.DOUBLE]["worst"] > 1e6
    assert found[parity.SINGLE]["worst"] > parity.ONE_STEP
    assert found[parity.DOUBLE]["apart"] > parity.WHOLE_RUN


def parity_results(**changed: float) -> Results:
    arm = {"steps": 1000, "worst": 4.0, "disagreements": 0, "unclipped": 300, "clipped": 300, "floored": 400,
           "apart": 1e-15, "parted": 1e-15, "curve": [1e-15], "own curve": [0.0]}  # fmt: skip
    arms = {parity.DOUBLE: {**arm, **changed}, parity.SINGLE: arm}
    return Results(parity.RECIPE.experiments[:1], [{"experiment": "mlp", "part": "", "seed": 0, "arms": arms}])


@pytest.mark.parametrize(
    ("changed", "outcomes"),
    [
        ({}, ["reproduced", "reproduced"]),
        ({"worst": 9.0}, ["not reproduced", "reproduced"]),
        ({"disagreements": 1}, ["not reproduced", "reproduced"]),
        ({"apart": 1e-3}, ["reproduced", "not reproduced"]),
        ({"apart": 1e-3, "parted": 1e-2}, ["reproduced", "not testable here"]),
        ({"floored": 19}, ["not testable here"]),
    ],
)
def test_parity_is_judged(changed: dict[str, float], outcomes: list[str]) -> None:
    found = parity.judge(parity_results(**changed))
    assert [f.outcome for f in found] == [*outcomes, "reproduced"]
    assert "mlp" in svg(parity.RECIPE.drawings[0], parity_results(**changed)).decode()


# ------------------------------------------------------------------------------------------------------------ trials


def test_the_parts_of_a_task_do_not_overlap(digits: Dataset) -> None:
    task = Task(digits, MLP)
    assert [len(part[0]) for part in (task.train, task.valid, task.test)] == [len(digits.train_x) - 200, 200, 300]
    rows = torch.cat([task.train[0], task.valid[0]]).flatten(1)
    assert torch.equal(rows.sort(dim=0).values, digits.train_x.flatten(1).sort(dim=0).values)


def test_a_trial_repeats_and_tells_its_regimes(digits: Dataset) -> None:
    task = Task(digits, MLP)
    found = task.trial(Rule(1.0, 0.5, 0.5), 3, on_test=True)
    assert found == task.trial(Rule(1.0, 0.5, 0.5), 3, on_test=True)
    assert found["score"] > 0.6
    assert found["floored"] > 0.1
    assert found["clipped"] > 0.1
    assert 0 < found["median norm"] < found["largest norm"]
    assert (found["lr"], found["gamma"], found["delta"]) == ("1", "0.5", "0.5")
    assert found["score"] != task.trial(Rule(1.0, 0.5, 0.5), 4, on_test=True)["score"]
    assert task.trial(Rule(0.01, name="adam"), 3, on_test=True)["score"] > 0.6
    plain = task.trial(Rule(1.0), 3, on_test=True)
    same = task.trial(Rule(1.0, 1e-3, 1.0), 3, on_test=True)  # δ = 1: always on the floor, which is SGD
    assert same["score"] == plain["score"]
    assert same["floored"] == 1.0


def test_a_run_that_blows_up_is_worth_a_constant(digits: Dataset) -> None:
    found = Task(digits, {**MLP, "loss": "mse"}).trial(Rule(1e9), 0, on_test=True)
    assert (found["score"], found["diverged"]) == (0.1, 1.0)
    log = Task(digits, {**MLP, "loss": "mse", "score": "log loss", "valid": 0})
    assert log.trial(Rule(1e9), 0, on_test=True)["score"] == pytest.approx(-math.log10(0.09))
    assert log.trial(Rule(0.5), 0, on_test=True)["score"] > 1.1


class Hill:
    """A task whose score has its top at an lr."""

    def __init__(self, top: float) -> None:
        self.top, self.tried = top, []

    def trial(self, rule: Rule, seed: int, *, on_test: bool) -> dict[str, float]:
        assert (seed, on_test) == (0, False)
        self.tried.append((rule.lr, rule.gamma))
        return {"score": -abs(math.log(rule.lr / self.top)) - 0.1 * abs(math.log(rule.gamma / 2.0))}


@pytest.mark.parametrize(
    ("top", "lr", "tries"), [(10.0, 10.0, 6), (1000.0, 1000.0, 10), (0.1, 0.1, 10), (1e9, 1e6, 14)]
)
def test_a_grid_grows_where_the_best_is_at_its_end(top: float, lr: float, tries: int) -> None:
    hill: Any = Hill(top)
    best = tune(hill, [Rule(lr, gamma) for lr in (1.0, 10.0, 100.0) for gamma in (1.0, 2.0)])
    assert best.lr == pytest.approx(lr)
    assert best.gamma == 2.0
    assert len(hill.tried) == len(set(hill.tried)) == tries


# ------------------------------------------------------------------------------------------------------------- floor


def upset(data: Dataset, **how: Any) -> floor.Upset:
    return floor.Upset(data, {**MLP, "upset": how})


def norms(task: floor.Upset, steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    model = task.make()
    found = []
    for t in range(steps):
        task.gradient(model, t, 5)
        found.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)))
    return found


def test_upset_batches(digits: Dataset) -> None:
    plain = norms(upset(digits, kind="nothing"))
    kinds: list[dict[str, Any]] = [
        {"kind": "rescaled", "share": 0.25, "factor": 30.0}, {"kind": "mislabelled", "share": 0.25}
    ]  # fmt: skip
    for how in kinds:
        found = norms(upset(digits, **how))
        changed = [a != b for a, b in zip(found, plain)]
        assert 0.1 < sum(changed) / 60 < 0.45
        assert found == norms(upset(digits, **how))  # so that all arms see the same
        if how["kind"] == "rescaled":
            assert all(a > 5 * b for a, b, c in zip(found, plain, changed) if c)
    noisy = norms(upset(digits, kind="noise", tail=1.2, length=10.0))
    assert min(noisy) > 10 - max(plain)
    assert max(noisy) > 5 * sorted(noisy)[30]


def test_rare_classes_come_by_themselves(digits: Dataset) -> None:
    task = upset(digits, kind="rare", share=0.25, first=8)
    rare = []
    for t in range(60):
        classes = task.train[1][task._of_some_classes(t, 1, torch.Generator().manual_seed(t))]
        assert len(classes) == 32
        rare.append(bool((classes >= 8).any()))
        assert bool((classes >= 8).all()) == rare[-1]
    assert 5 < sum(rare) < 30


def test_targets_keep_their_noise(digits: Dataset) -> None:
    task = upset(digits, kind="targets", tail=1, length=0.5)
    noise = task._target_noise(1)
    assert noise.shape == task.train[1].shape
    assert noise.abs().median() == pytest.approx(0.5, rel=0.15)  # of Cauchy's distribution
    assert noise.abs().max() > 50
    assert torch.equal(noise, task._target_noise(1))
    assert not torch.equal(noise, task._target_noise(2))


def test_a_floor_run_has_all_arms(digits: Dataset) -> None:
    setting = {**MLP, "upset": {"kind": "mislabelled", "share": 0.2}, "lr": [0.5, 1.0], "gamma": [0.05], "steps": 20}
    job = Job(Experiment("mislabelled", "digits", setting=setting), "", 1, digits)
    trials._last = None
    found = floor.run(job)
    assert list(found) == list(floor.ARMS)
    for delta in floor.DELTAS:
        assert found[floor.own(delta)]["floored"] > 0.5
        for arm, base in (pair(delta) for pair in floor.COMPARISONS.values()):
            assert found[arm]["delta"] == f"{delta:g}"
            assert found[base]["delta"] == "0"
        same = floor.added(delta), floor.PLAIN
        gone = floor.own(delta), floor.removed(delta)
        for one, other in (same, gone):
            assert all(found[one][letter] == found[other][letter] for letter in ("lr", "gamma"))
    assert floor.run(job) == found
    assert floor.run(replace(job, seed=2)) != found


def test_the_interval_is_students() -> None:
    low, high = floor.interval(Summary(1.0, 0.5, 10))
    assert (high - 1) / 0.5 == pytest.approx(3.249836, abs=1e-6)  # the tables' 99 % point with 9 degrees of freedom
    assert low + high == pytest.approx(2.0)


def floor_results(differences: list[float], *, floored: float = 0.2) -> Results:
    lines = []
    for seed, d in enumerate(differences):
        base = 0.5 + 0.1 * seed
        arms = {arm: {"score": base, "floored": floored} for arm in floor.ARMS}
        for delta in floor.DELTAS:
            arms[floor.own(delta)]["score"] = arms[floor.added(delta)]["score"] = base + d
        lines.append({"experiment": "clean", "part": "", "seed": seed, "arms": arms})
    return Results(floor.RECIPE.experiments[:1], lines)


@pytest.mark.parametrize(
    ("results", "word", "outcome"),
    [
        (floor_results([0.05, 0.051, 0.049, 0.05]), "helps", "reproduced"),
        (floor_results([-0.05, -0.051, -0.049, -0.05]), "harms", "not reproduced"),
        (floor_results([0.001, -0.001, 0.0005, 0.0]), "does nothing", "reproduced"),
        (floor_results([0.0, 0.0, 0.0, 0.0]), "does nothing", "reproduced"),
        (floor_results([0.02, 0.004, 0.012, 0.01]), "does no harm", "reproduced"),
        (floor_results([0.2, -0.2, 0.1, -0.1]), "undecided", "not testable here"),
        (floor_results([0.05, 0.051, 0.049, 0.05], floored=0.009), "not reached", "not testable here"),
        (floor_results([0.05]), "two seeds", "not testable here"),
    ],
)
def test_the_floor_is_judged(results: Results, word: str, outcome: str) -> None:
    found = floor.judge(results)
    assert len(found) == 6
    assert {f.outcome for f in found} == {outcome}
    assert all(word in f.reason for f in found)
    assert "clean" in svg(floor.RECIPE.drawings[0], results).decode()


# ------------------------------------------------------------------------------------------------------------- table


def sentences() -> Dataset:
    words = ("<pad>", "<unk>", "good", "bad", "film", "very", "a")
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(2, (120,), generator=draw)
    x = torch.randint(4, 7, (120, 8), generator=draw)
    x[:, 2], x[:, 6:] = 2 + y, 0
    x[0, 0] = 1
    return Dataset(
        name="tiny", source="tiny", task="classification", kind="text", train_x=x, train_y=y, test_x=x[:40],
        test_y=y[:40], outputs=2, vocabulary=words, classes=("no", "yes"), statistics={}, notes=(),
    )  # fmt: skip


def sentence_job(network: dict[str, Any]) -> Job:
    setting = {
        **table.CLASSES, "model": "distilbert", "network": network, "batch": 20, "steps": 30, "valid": 20,
        "rules": {"SGD": {"lr": [0.3]}, "GClip": {"lr": [0.3], "gamma": [0.5]},
                  table.OURS: {"lr": [0.3], "gamma": [0.5], "delta": 0.9},
                  "Adam(W)": {"name": "adamw", "lr": [0.01]}},
    }  # fmt: skip
    trials._last = None
    return Job(Experiment("tiny", setting=setting), "", 0, sentences())


def test_the_table_runs_every_optimizer() -> None:
    found = table.run(sentence_job({"width": 16, "depth": 1}))
    assert list(found) == ["SGD", "GClip", table.OURS, "Adam(W)"]
    assert found["Adam(W)"]["score"] == 1.0
    assert found[table.OURS]["floored"] > 0
    assert found["GClip"]["floored"] == 0
    assert found["GClip"]["clipped"] > 0


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = table.SentenceClassifier(7, 8, 2, width=16, depth=1).eval()
    x = sentences().train_x[:4]
    with torch.no_grad():
        assert torch.allclose(model(x), model(x[:, :6]), atol=1e-6)
        assert not torch.allclose(model(x), model(x[:, :3]), atol=1e-3)


def test_pretrained_weights_are_taken_and_their_tokenizer(tmp_path: Path) -> None:
    from transformers import BertTokenizer, DistilBertConfig, DistilBertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "bad", "good", "film", "very"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(1)
    config: Any = DistilBertConfig(vocab_size=10, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    body = DistilBertModel(config)
    body.save_pretrained(tmp_path)
    job = sentence_job({"pretrained": str(tmp_path)})
    task = table.make_task(job)
    assert task.data.train_x.shape == (120, 8)
    assert task.data.train_x[:, 0].eq(2).all()  # [CLS]
    assert task.data.train_x[0, 1] == 1  # a word that is not known
    taken: Any = task.make()
    assert all(torch.equal(a, b) for a, b in zip(taken.body.parameters(), body.parameters()))
    assert task.trial(Rule(0.01, name="adamw"), 0, on_test=True)["score"] > 0.8
    with pytest.raises(InputError, match="cannot be loaded; give a hub id"):
        table.make_task(sentence_job({"pretrained": str(tmp_path / "nowhere")}))


def table_results(differences: list[float], *, floored: float = 0.0) -> Results:
    lines = [
        {
            "experiment": "vit", "part": "", "seed": seed,
            "arms": {table.OURS: {"score": 0.3 + 0.1 * seed, "floored": floored},
                     **{rival: {"score": 0.3 + 0.1 * seed - d} for rival in table.RIVALS}},
        }
        for seed, d in enumerate(differences)
    ]  # fmt: skip
    return Results([e for e in table.RECIPE.experiments if e.name == "vit"], lines)


@pytest.mark.parametrize(
    ("results", "outcome"),
    [
        (table_results([0.02, 0.021, 0.019]), "reproduced"),
        (table_results([-0.009, -0.008, -0.01]), "reproduced"),
        (table_results([-0.02, -0.021, -0.019]), "not reproduced"),
        (table_results([-0.1, 0.1, 0.0]), "not testable here"),
        (table_results([0.0]), "not testable here"),
    ],
)
def test_the_table_is_judged(results: Results, outcome: str) -> None:
    found = table.judge(results)
    assert [f.what for f in found] == [f"vit: δ-GClip beside {rival}" for rival in table.RIVALS]
    assert {f.outcome for f in found} == {outcome}
    assert "GClip" in svg(table.RECIPE.drawings[0], results).decode()


def test_equal_runs_without_a_floor_test_nothing() -> None:
    def of(results: Results) -> Finding:
        return next(f for f in table.judge(results) if f.what.endswith(" GClip"))

    assert of(table_results([0.0, 0.0, 0.0])).outcome == "not testable here"
    assert "the same runs" in of(table_results([0.0, 0.0, 0.0])).reason
    assert of(table_results([0.0, 0.0, 0.0], floored=0.1)).outcome == "reproduced"


@pytest.mark.parametrize("recipe", [parity.RECIPE, floor.RECIPE, table.RECIPE], ids=lambda r: r.name)
def test_every_setting_is_complete(recipe: Recipe) -> None:
    for e in (*recipe.experiments, *recipe.full):
        s = e.setting
        assert {"model", "network", "loss", "score", "batch", "valid", "test", "schedule"} <= set(s)
        assert ("steps" in s) != ("epochs" in s)
        assert recipe is not floor.RECIPE or s["score"] in floor.TOLERANCES
