"""`--explore-exploit`: what a run does besides its steps, from the question before the first to the verdict at the end.

A checkpoint of the second phase holds the last layer in float64; the features are worked out again from the frozen
weights, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.duplicates import equal_rows
from surefoot.measure.features import FeatureRank
from surefoot.train.distributed import launched
from surefoot.train.document import EXPLORED
from surefoot.train.exploit_solvers import FIRST_ORDER, MANY, expected_steps
from surefoot.train.explore_exploit import ExploreExploit
from surefoot.train.expressivity import expressivity, head_name, linear
from surefoot.train.files import write_json
from surefoot.train.job import Job
from surefoot.train.record import LAST_LAYER_COLUMNS, Table, json_number

FORMAT, VERSION = "surefoot.explored", 1
CHUNK = 50  # steps of the last layer between two looks at the clock
WORSE = 0.01  # of accuracy, or relative: a fall of the held-out metric that is worth a note
NAMED = 5  # groups of equal rows in a message

Evaluate = Callable[[], dict[str, float]]


def explorable(job: Job) -> Job:
    """Return a job whose --explore-exploit makes sense, if it is given.

    Raises:
        InputError: what does not go together, a model without a last layer of its own, or rows that cannot be told
            apart by any network, or not by one as wide as this.
    """
    c = job.config
    if not c.explore_exploit:
        return job
    if launched():
        raise InputError("--explore-exploit runs in one process; leave out torchrun")
    if job.objective.task not in ("classification", "regression"):
        raise InputError(
            f"--explore-exploit: there is no guarantee for {job.objective.task}; there are those for classes and real "
            "targets"
        )
    if c.solver == "newton-cg" and job.objective.loss == "mse":
        raise InputError("--solver newton-cg is for --loss cross-entropy; of mse --solver direct is exact")
    x, N = job.data.train_x, len(job.data.train_x)
    try:
        name = head_name(job.model, x[:3].to(job.device), _head(job))
        _machine(job)
    except InputError as error:
        raise InputError(f"--explore-exploit: {in_options(str(error))}") from error
    m = linear(job.model, name).in_features
    if m + 1 < N:
        given = "" if c.widen is None else f" (--widen {c.widen})"
        raise InputError(
            f"--explore-exploit: {N:,} training rows, and the last hidden layer has {m:,} units{given}: [H, 1] has "
            f"{m + 1:,} columns and cannot have rank {N:,}. Give --widen {N - 1} or more (--widen auto takes "
            f"{2 * N}, far better conditioned), or --limit {m + 1}"
        )
    if groups := equal_rows(x.flatten(1)):
        raise InputError(f"--explore-exploit: {_equal(groups, job.data.train_y)}")
    return job


def ask(job: Job) -> FeatureRank:
    """Return the rank of the untrained network's features, [H, 1]."""
    return expressivity(job.model, job.data.train_x.to(job.device), head=_head(job))


class Exploring:
    """The two phases of a run.

    Args:
        job: what is trained.
        folder: the run's.
        untrained: the rank before the first step; None in a resumed run, which knows it.
        quiet: print nothing.
    """

    def __init__(self, job: Job, folder: Path, untrained: FeatureRank | None, *, quiet: bool) -> None:
        self.job, self.folder, self.quiet = job, folder, quiet
        self.table = Table(LAST_LAYER_COLUMNS)
        self.machine = _machine(job)
        self.x = job.data.train_x.to(job.device)
        self.facts: dict[str, Any] = {"untrained": None, "expected_steps": None, "held_out": {}, "solved": ""}
        if untrained is not None:
            self.facts["untrained"] = _rank(untrained)
            self._tell(f"explore/exploit on {len(self.x):,} training rows, as they are: no augmented copy is meant")
            self._tell(f"the untrained network: {_said(untrained)}; {self._outlook(untrained)}")

    @property
    def exploiting(self) -> bool:
        """Whether the hidden layers are frozen."""
        return self.machine.rank is not None

    @property
    def taken(self) -> int:
        """Steps of the last layer; a direct solver's iterations."""
        return max(0, len(self.table) - 1)

    def due(self, step: int) -> bool:
        """Whether exploration ends after this step."""
        return not self.exploiting and step >= self.machine.explore_steps

    def switch(self, step: int, before: dict[str, float], evaluate: Evaluate) -> None:
        """Perturb, freeze and verify; say what to expect of the last layer.

        Args:
            step: that was taken last.
            before: the evaluation after it.
            evaluate: what works out another one.

        Raises:
            InputError: features are NaN or infinite.
        """
        machine, column = self.machine, self.job.objective.metric.column
        machine.steps_taken = step
        train_before = self._train_accuracy()
        rank = machine.begin_exploitation(self.x, self.job.data.train_y)
        after = evaluate() if machine.noise else before
        self.facts["held_out"] = {"before": json_number(before[column]), "after": json_number(after[column])}
        self.facts["train"] = {"before": train_before, "after": self._train_accuracy()}
        self.facts["expected_steps"] = json_number(self._expected(rank))
        self._append_start()
        self._tell(f"step {step}: hidden layers frozen, noise {machine.noise:g}; {_said(rank)}")
        for line in self._modes():
            self._tell(line)
        self._tell(self._plan(rank))

    def go_on(self, until: int) -> list[dict[str, float]]:
        """Take some steps of the last layer, to step `until` at most, or solve it; return their rows.

        Raises:
            InputError: the loss is no number any more.
        """
        machine, solver = self.machine, self.job.config.solver
        assert solver is not None
        if solver in FIRST_ORDER:
            found = machine.exploit(solver, steps=min(CHUNK, until - machine.steps_taken), say=None)
        else:
            found = machine.exploit(solver, say=None)
            self.facts["solved"] = found.note
        first = self.table.columns["step"][-1] + 1
        bounds = found.bounds or [math.inf] * len(found.losses)
        rows = [
            {"step": first + i, "loss": loss, "bound": _finite(bound)}
            for i, (loss, bound) in enumerate(zip(found.losses[1:], bounds[1:]))
        ]
        for row in rows:
            self.table.append(row)
        return rows

    def losses(self, since: int) -> list[float]:
        """Return the losses after the steps of the last layer beyond `since`; of a direct solver only the last."""
        if self.job.config.solver not in FIRST_ORDER:
            return self.table.columns["loss"][-1:] if self.taken else []
        return [v for s, v in zip(self.table.columns["step"][1:], self.table.columns["loss"][1:]) if s > since]

    def save(self, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a checkpoint holds of the phases: strict JSON, and tensors."""
        if not self.exploiting:
            self.machine.steps_taken = step
        state = self.machine.state_dict()
        tensors = {} if state["weights"] is None else {"last_layer": state["weights"]}
        # a run never takes its noise back
        state |= {"weights": None, "before": {}}
        return {"machine": _packed(state), "facts": self.facts}, tensors

    def restore(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from what `save` gave, after model and optimizer were loaded."""
        self.facts = dict(saved["facts"])
        state = _unpacked(saved["machine"])
        self.machine.load_state_dict({**state, "weights": tensors.get("last_layer")})
        path = self.folder / "last_layer.parquet"
        if self.exploiting:
            self.machine.attach(self.x, self.job.data.train_y)
            done = self.machine.phase == "done"  # a direct solver's iterations may be more than the steps it stands for
            self.table.load(path, through=2**62 if done else step)

    def write(self) -> None:
        """Write last_layer.parquet and the document, explored.json."""
        if len(self.table):
            self.table.write(self.folder / "last_layer.parquet")
        write_json(self.folder / EXPLORED, self.describe())

    def describe(self) -> dict[str, Any]:
        """Return the document of the phases, in strict JSON; its verdict is null before the second."""
        job, machine, metric = self.job, self.machine, self.job.objective.metric
        verdict, rank = None, machine.rank
        if rank is not None:
            said = machine.report().to_json()
            verdict = said | {"numbers": {k: json_number(v) for k, v in said["numbers"].items()}}
        return {
            "format": FORMAT,
            "version": VERSION,
            "title": job.title,
            "verdict": verdict,
            "rows": len(self.x),
            "outputs": job.objective.outputs,
            "loss": job.objective.loss,
            "tau": job.config.tau,
            "explore_steps": machine.explore_steps,
            "total_steps": job.steps,
            "solver": job.config.solver,
            "taken": self.taken,
            "noise": {"asked": job.config.noise, "taken": None if rank is None else machine.noise},
            "head": _head_of(machine, job),
            "rank": None if rank is None else _rank(rank),
            "trade": [{k: json_number(v) for k, v in vars(row).items()} for row in machine.trade],
            "metric": metric.name,
            "percent": metric.percent,
            "held_out_rows": len(job.data.test_x),
            "notes": [*self._modes(), *self._cost()],
            **self.facts,
        }

    def finish(self, evaluation: dict[str, float]) -> None:
        """Note the held-out metric at the end."""
        self.facts["held_out"]["end"] = json_number(evaluation[self.job.objective.metric.column])
        self.facts["train"]["end"] = self._train_accuracy()

    # ------------------------------------------------------------------------------------------------------------------

    def _append_start(self) -> None:
        loss, bound = self.machine.loss_and_bound()
        self.table.append({"step": self.machine.steps_taken, "loss": loss, "bound": _finite(bound)})

    @torch.no_grad()
    def _train_accuracy(self) -> float | None:
        """Return the share of training rows that are right, in eval mode; None for a regression."""
        if self.job.objective.task != "classification":
            return None
        job = self.job
        found = job.objective.evaluate(job.model, job.data.train_x, job.data.train_y, rows=1000, device=job.device)
        return found[job.objective.metric.column]

    def _expected(self, rank: FeatureRank) -> float:
        return expected_steps(rank, self.job.objective.loss, self.job.objective.outputs).value

    def _outlook(self, rank: FeatureRank) -> str:
        steps = self._expected(rank)
        if math.isinf(steps):
            return "no number of first-order steps is known to be enough"
        return f"{_count(steps)} first-order steps would be enough"

    def _plan(self, rank: FeatureRank) -> str:
        """Say how many first-order steps would be enough, beside what is going to be done."""
        solver, left = self.job.config.solver, self.job.steps - self.machine.explore_steps
        goal = "a cross-entropy of 0.01" if self.job.objective.loss == "cross-entropy" else "a residual 1e-6 as large"
        steps = self._expected(rank)
        said = (
            "no number of first-order steps is known to be enough"
            if math.isinf(steps)
            else f"{_count(steps)} first-order steps are enough for {goal}, whatever the targets"
        )
        if solver not in FIRST_ORDER:
            return f"last layer: {said}; --solver {solver} stands for the {left:,} that are left"
        advice = "; --solver direct needs none of them" if steps > left else ""
        return f"last layer: {said}; --solver {solver} takes the {left:,} that are left{advice}"

    def _modes(self) -> list[str]:
        kinds = {"dropout": nn.modules.dropout._DropoutNd, "batch norm": nn.modules.batchnorm._BatchNorm}
        said = {"dropout": "off", "batch norm": "on its running statistics"}
        at = self.machine.explore_steps
        found = {name: sum(isinstance(m, kind) for m in self.job.model.modules()) for name, kind in kinds.items()}
        return [
            f"{name} ({n} module{'s' * (n > 1)}) is {said[name]} from step {at} on: the guarantee is about the frozen "
            "features"
            for name, n in found.items()
            if n
        ]

    def _cost(self) -> list[str]:
        """Say so where the last layer was bad for what was held out."""
        metric, found = self.job.objective.metric, self.facts["held_out"]
        before, end = found.get("before"), found.get("end")
        if before is None or end is None:
            return []
        worse = end < before - WORSE if metric.higher_is_better else end > before * (1 + WORSE)
        if not worse:
            return []
        advice = "" if self.job.config.solver == "gd" else " --solver gd stays nearer to the network that explored."
        return [
            f"The {metric.name} was {before:.4g} before the last layer was trained alone and is {end:.4g} now: to fit "
            f"the training rows better has cost what was held out.{advice}"
        ]

    def _tell(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)


# ----------------------------------------------------------------------------------------------------------------------


def in_options(message: str) -> str:
    """Return a message of the library in the words of the command line."""
    for word, option in (
        ("head=", "--head "),
        ("tau=", "--tau "),
        ("noise=", "--noise "),
        ("total_steps=", "--steps "),
    ):
        message = message.replace(word, option)
    return message.replace(
        "requires_grad_(True), or load_state_dict() if this is a resume", "let the factory leave requires_grad on"
    )


def _head(job: Job) -> str | None:
    # a layer that was widened has another name
    return job.config.head if job.config.widen is None else None


def _head_of(machine: ExploreExploit, job: Job) -> str | None:
    return machine.state_dict()["head"] or job.config.head


def _machine(job: Job) -> ExploreExploit:
    c = job.config
    assert c.tau is not None
    assert c.noise is not None
    return ExploreExploit(
        job.model,
        job.stepper.optimizer,
        job.steps,
        tau=c.tau,
        noise=c.noise,
        head=_head(job),
        seed=c.seed,
        loss=job.objective.loss,
    )


def _equal(groups: list[list[int]], y: Tensor) -> str:
    clashes = sum(any(not torch.equal(y[g[0]], y[i]) for i in g[1:]) for g in groups)
    shown = "; ".join(" = ".join(map(str, g)) for g in groups[:NAMED]) + "; ..." * (len(groups) > NAMED)
    told = f", {clashes:,} of them with different targets" if clashes else ""
    return (
        f"{sum(map(len, groups)) - len(groups):,} training rows are equal to another one ({shown}, counted from 0 in "
        f"the order of training){told}: no network tells them apart, and [H, 1] cannot have full rank. Keep one row of "
        "each kind in --data"
    )


def _said(rank: FeatureRank) -> str:
    words = {"PROVED": "is proved", "REFUTED": "is refuted", "UNDECIDED": "is neither proved nor refuted"}
    said = f"rank {rank.samples:,} in {rank.columns:,} columns {words[rank.status]}"
    if rank.status == "PROVED":
        return f"{said}, s_N >= {rank.s_min.value:.3g}, s_1 <= {rank.s_max.value:.3g}"
    return f"{said} ({rank.notes[-1]})" if rank.notes else said


def _count(steps: float) -> str:
    if steps < MANY:
        return f"{steps:,.0f}"
    mantissa, _, exponent = f"{steps:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _rank(rank: FeatureRank) -> dict[str, Any]:
    found = rank.to_json()
    return {k: found[k] for k in ("samples", "columns", "status", "s_min", "s_max", "rank_at_least", "rank_at_most")}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _packed(value: Any) -> Any:
    """Return plain values as strict JSON; an infinity is a word."""
    if isinstance(value, Mapping):
        return {k: _packed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _unpacked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpacked(v) for v in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
