"""Short trainings that compare step rules: one rule with its letters on one task, and the best of a grid.

Letters: η lr, γ gamma, δ delta. A trial's `score` is higher where it is better, whatever the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.data import Dataset
from surefoot.models import build
from surefoot.optim import DeltaGClip
from surefoot.optim._base import ClippedOptimizer
from surefoot.reproduce.recipe import Job
from surefoot.train.batches import batch_rows, steps_per_epoch
from surefoot.train.job import seed_everything
from surefoot.train.objective import Objective
from surefoot.train.schedule import lr_factor

ROWS = 250  # in one forward pass of an evaluation
OTHERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
TUNING_SEED = 0
GROWTH = 4  # how often a grid is made wider


@dataclass(frozen=True)
class Rule:
    """How steps are taken: δ-GClip, which is plain clipping with δ = 0 and SGD with δ = 1, or one of OTHERS."""

    lr: float
    gamma: float = math.inf
    delta: float = 0.0
    name: str = "delta-gclip"
    weight_decay: float = 0.0

    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer."""
        if self.name in OTHERS:
            return OTHERS[self.name](params, self.lr, weight_decay=self.weight_decay)
        assert self.name == "delta-gclip", self.name
        return DeltaGClip(params, self.lr, gamma=self.gamma, delta=self.delta, weight_decay=self.weight_decay)

    def letters(self) -> dict[str, str]:
        """Return lr, gamma and delta as a table shows them."""
        return {k: f"{v:.3g}" for k, v in asdict(self).items() if k in ("lr", "gamma", "delta")}


class Task:
    """A network, data in three parts and a loss.

    Args:
        data: of which the last `valid` training rows (in an order that never changes) are kept for tuning.
        setting: `model` and its options in `network`; `loss`; `score`, one of SCORES; `batch`, 0 for all rows;
            `steps` or `epochs`; `valid` and `test`, rows to look at (0: none, all); `schedule`.
        device: for all of it.
        make: the network in place of `build`.
    """

    def __init__(
        self,
        data: Dataset,
        setting: Mapping[str, Any],
        device: str = "cpu",
        make: Callable[[], nn.Module] | None = None,
    ) -> None:
        s = self.setting = setting
        self.data, self.device = data, torch.device(device)
        order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))
        kept = len(order) - s["valid"]
        test = s["test"] or len(data.test_x)
        self.train = data.train_x[order[:kept]].to(device), data.train_y[order[:kept]].to(device)
        self.valid = data.train_x[order[kept:]].to(device), data.train_y[order[kept:]].to(device)
        self.test = data.test_x[:test].to(device), data.test_y[:test].to(device)
        self.batch = s["batch"] or kept
        self.steps = s["steps"] if "steps" in s else s["epochs"] * steps_per_epoch(kept, self.batch)
        kind = "autoencoding" if s["loss"] == "elbo" else data.task
        self.objective = Objective(kind, s["loss"], data.outputs, tuple(data.statistics.get("target_std", ())))
        self.make = make or self._build

    def _build(self) -> nn.Module:
        data = self.data
        return build(
            self.setting["model"], kind=data.kind, task=data.task, input_shape=data.input_shape, outputs=data.outputs,
            vocabulary_size=len(data.vocabulary) if data.vocabulary else None, **self.setting["network"],
        )  # fmt: skip

    def rows(self, t: int, seed: int) -> Tensor | slice:
        """Return which training rows step t sees."""
        found = batch_rows(t, len(self.train[0]), self.batch, seed)
        return slice(None) if found is None else found.to(self.device)

    def gradient(self, model: nn.Module, t: int, seed: int) -> float:
        """Leave the gradient of step t in the model and return the loss."""
        rows = self.rows(t, seed)
        return self.backward(model, self.train[0][rows], self.train[1][rows])

    def backward(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        """Leave the gradient of a batch in the model and return the loss."""
        model.zero_grad()
        loss = self.objective.value(model(x), x, y)
        loss.backward()
        return float(loss.detach())

    def trial(self, rule: Rule, seed: int, *, on_test: bool) -> dict[str, Any]:
        """Train from the weights of a seed, with its order of rows, and return score and telemetry.

        A loss that is not finite ends the run. No score is below that of a constant prediction.
        """
        seed_everything(seed)
        model = self.make().to(self.device).train()
        optimizer = rule.optimizer(list(model.parameters()))
        norms: list[float] = []
        ended = 0.0
        for t in range(self.steps):
            if not math.isfinite(self.gradient(model, t, seed)):
                ended = 1.0
                break
            for group in optimizer.param_groups:
                group["lr"] = rule.lr * lr_factor(self.setting["schedule"], t, self.steps)
            optimizer.step()
            if isinstance(optimizer, ClippedOptimizer):
                norms.append(optimizer.telemetry(reset=False)["norm"])
        found = {"score": math.nan} if ended else self.score(model, self.test if on_test else self.valid)
        worthless = self.worthless()
        lost = not found["score"] > worthless
        found |= {"score": worthless if lost else found["score"], "diverged": ended, **rule.letters()}
        if isinstance(optimizer, ClippedOptimizer):
            told = optimizer.telemetry()
            spread = torch.tensor(sorted(norms) or [math.nan], dtype=torch.float64)
            found |= {
                "clipped": told["clip_fraction"], "floored": told["floor_fraction"],
                "median norm": float(spread.median()), "largest norm": float(spread[-1]),
            }  # fmt: skip
        return found

    def score(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Return the score on a part of the data, and the loss it is made from."""
        how = self.setting["score"]
        if how == "log loss":
            part = self.train
        found = self.objective.evaluate(model, *part, rows=ROWS, device=self.device)
        loss = found["test_loss"]
        if not math.isfinite(loss):
            return {"score": math.nan}
        if how == "accuracy":
            return {"score": found["test_accuracy"], "loss": loss}
        if how == "R2":
            return {"score": 1 - loss / float(part[1].double().var(0, correction=0).mean()), "loss": loss}
        if how == "bits":
            return {"score": -loss / math.log(2), "loss": loss}
        if how == "log loss":
            return {"score": -math.log10(loss) if loss else math.inf, "loss": loss}
        assert how == "elbo", how
        return {"score": 1 - loss / self._constant(), "loss": loss}

    def worthless(self) -> float:
        """Return the score of a constant prediction."""
        how = self.setting["score"]
        if how == "accuracy":
            return 1 / self.data.outputs
        if how == "bits":
            return -math.log2(self.data.outputs)
        return -math.log10(self._constant()) if how == "log loss" else 0.0

    def _constant(self) -> float:
        """Return the loss of a constant: pixels have variance 1, one-hot targets of K classes (1 - 1/K)/K."""
        if self.setting["score"] == "elbo":
            return math.prod(self.data.input_shape) / 2
        return (1 - 1 / self.data.outputs) / self.data.outputs


def tune(task: Task, rules: Sequence[Rule], tell: Callable[[str], object] = lambda _: None) -> Rule:
    """Return the rule with the best validation score at seed 0.

    While the best has the smallest or the largest lr, rules beyond that lr are tried too, at the ratio of the grid's
    first two, up to GROWTH times. A single rule needs no trial.

    Args:
        task: what is trained.
        rules: a grid; several lr, rising.
        tell: told how far it is.
    """
    if len(rules) == 1:
        return rules[0]
    scores: dict[Rule, float] = {}
    lrs = sorted({rule.lr for rule in rules})
    ratio = lrs[1] / lrs[0]
    best, waiting = rules[0], list(rules)
    for _ in range(GROWTH + 1):
        for i, rule in enumerate(waiting):
            scores[rule] = task.trial(rule, TUNING_SEED, on_test=False)["score"]
            tell(f"tuning {rule.name} δ={rule.delta:g}, {i + 1} of {len(waiting)}")
        best = max(scores, key=lambda rule: scores[rule])  # of equals the first that was tried
        lrs = sorted({rule.lr for rule in scores})
        if lrs[0] < best.lr < lrs[-1]:
            break
        beyond = lrs[0] / ratio if best.lr == lrs[0] else lrs[-1] * ratio
        waiting = list(dict.fromkeys(replace(rule, lr=beyond) for rule in rules))
    return best


_last: tuple[Any, dict[str, Rule]] | None = None  # of the experiment that a process is at


def tuned(job: Job, task: Task, grids: Mapping[str, Sequence[Rule]]) -> dict[str, Rule]:
    """Return the best of each grid; for the jobs of one experiment, which follow each other, it is worked out once."""
    global _last
    key = (job.experiment.digest(), id(job.data), job.device)
    if _last is None or _last[0] != key:
        _last = key, {name: tune(task, grid, job.progress) for name, grid in grids.items()}
    return _last[1]
