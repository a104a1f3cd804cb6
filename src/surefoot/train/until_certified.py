"""`--until-certified`: attempts at a certificate in training; `--check-certificate`: the steps after it, checked.

With `--from-certificate` the steps from the first on are checked.

Attempts come at steps 50, 75, 112, ... and at the last. What changes between two of them is above all the residual,
so an attempt first asks, by one forward pass, whether q = beta ||F - y||/s_min(J)^2
could be small enough if s_min(J) had doubled and beta stayed the same; only then is the Gram worked out.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.certificates import Certificate, NoRule, certify
from surefoot.certificates.layers import read_layers
from surefoot.errors import InputError
from surefoot.theorems.verdict import Outcome, Verdict
from surefoot.train.certified_run import (
    certified_lr,
    check_subject,
    describe,
    in_options,
    read_document,
    remove_certificate,
    rows_of,
    write_certificate,
)
from surefoot.train.certified_start import begin
from surefoot.train.certified_steps import CertifiedSteps, Step, Violation
from surefoot.train.config import TrainConfig
from surefoot.train.distributed import launched
from surefoot.train.job import Job
from surefoot.train.record import CERTIFIED_COLUMNS, Table

FIRST, GROWTH = 50, 1.5


def certifies(config: TrainConfig) -> bool:
    """Whether a run has to do with a certificate."""
    return config.until_certified or config.from_certificate is not None


def checked(job: Job) -> Job:
    """Return a job whose --until-certified, --check-certificate, --from-certificate make sense, if they are given.

    Raises:
        InputError: what does not go together, or a module without a rule.
    """
    c = job.config
    if c.check_certificate and not certifies(c):
        raise InputError("--check-certificate needs a certificate; give --until-certified too")
    if not certifies(c):
        return job
    given = "--until-certified" if c.until_certified else "--from-certificate"
    if c.until_certified and c.from_certificate is not None:
        raise InputError("--until-certified and --from-certificate contradict each other; give one")
    if c.explore_exploit:
        raise InputError(f"{given} and --explore-exploit contradict each other; give one")
    if c.parallel != "none" or launched():
        raise InputError(f"{given} runs in one process; leave out torchrun and --parallel")
    check_subject(job, "all", given)
    try:
        read_layers(_twin(job.model), job.data.train_x[:1].double())
    except NoRule as error:
        raise InputError(f"{given}: {in_options(str(error))}") from error
    if c.device != "cpu" or c.autocast != "none":
        raise InputError(f"{given} needs the processor's own arithmetic; leave out --device and --autocast")
    if c.check_certificate or c.from_certificate is not None:
        _check_rule(job)
    return job


def _check_rule(job: Job) -> None:
    c = job.config
    wish = "--check-certificate" if c.from_certificate is None else "--from-certificate"
    optimizer = f"--optimizer {c.optimizer}" + (" --beta 0" if c.beta == 0 else "")
    needs = [
        (c.dtype == "float64", f"--dtype {c.dtype}", "--dtype float64"),
        (job.batch_size >= len(job.data.train_x), f"--batch-size {c.batch_size}", "--batch-size full"),
        (not c.momentum, f"--momentum {c.momentum or 0:g}", "no momentum"),
        (not c.weight_decay, f"--weight-decay {c.weight_decay:g}", "no weight decay"),
        (certified_lr(c, 1.0) is not None, optimizer, "delta-gclip, gclip, sgd, or normalized-gd with --beta above 0"),
    ]
    for fits, given, fix in needs:
        if not fits:
            raise InputError(f"{given} is no rule that a certificate covers; {wish} needs {fix}")
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    if any(isinstance(m, random) for m in job.model.modules()):
        raise InputError(
            f"{wish}: --model {c.model} has dropout or batch norm, and trains another function than is "
            "certified; leave these modules out"
        )


def attempt_steps(last: int) -> set[int]:
    """Return the steps after which a certificate is tried: 50, 75, 112, ... and the last."""
    found, at = {last}, float(FIRST)
    while at < last:
        found.add(int(at))
        at *= GROWTH
    return found


class UntilCertified:
    """What a run does about its certificate, after each of its steps.

    Args:
        job: what is trained.
        folder: the run's.
    """

    def __init__(self, job: Job, folder: Path, *, quiet: bool) -> None:
        self.job, self.folder, self.quiet = job, folder, quiet
        self.table = Table(CERTIFIED_COLUMNS)
        self.attempts = attempt_steps(job.steps)
        self.last: Verdict | None = None
        self.checking: Checking | None = None
        self.x, self.y = rows_of(job)
        self.done = False
        if job.config.from_certificate is not None:
            self._certified(begin(job, folder))

    def restore(self, step: int) -> None:
        """Go on at a step: with the certificate that stood then, or none."""
        if self.job.config.from_certificate is None:
            document = read_document(self.folder)
            if document is None or document["verdict"]["outcome"] != Outcome.PROVED.value or document["step"] > step:
                remove_certificate(self.folder)
                return
            self._certified(Certificate.load(self.folder / "certificate"))
        if self.checking is not None and (self.folder / "certified.parquet").is_file():
            self.table.load(self.folder / "certified.parquet", through=step)
            self.checking.go_on(self.table)

    def write(self) -> None:
        """Write certified.parquet, a row a checked step."""
        if len(self.table):
            self.table.write(self.folder / "certified.parquet")

    def lr(self, lr: float) -> float:
        """Return the step size to use: after a certificate no more than it covers."""
        return lr if self.checking is None else min(lr, self.checking.most)

    def after_step(self, step: int, row: dict[str, Any]) -> None:
        """Attempt a certificate if it is time to, or hold the step against the one there is; `done` says to stop.

        Raises:
            Violation: the certificate does not hold.
        """
        if self.checking is not None:
            self.table.append(self.checking.after_step(step, row))
        elif step in self.attempts and not self.done:
            self._attempt(step, final=step == self.job.steps)

    def _attempt(self, step: int, *, final: bool) -> None:
        # The Gram is worth its time if q may have fallen below 1/2, s_min(J)^2 having grown fourfold at most.
        if not final and self.last is not None and (q := self._foreseen()) >= 2:
            self._tell(f"step {step}: no certificate yet, q is about {q:.3g} and has to be below 0.5")
            return
        verdict = certify(_twin(self.job.model), self.x, self.y, source=self._source(step))
        self.last = verdict
        if verdict or final or verdict.outcome is Outcome.REFUTED:
            remove_certificate(self.folder)
            write_certificate(describe(verdict, self.job, step, samples=len(self.x)), verdict, self.folder)
        if verdict.outcome is Outcome.REFUTED:
            self.done = True
        if verdict:
            self._tell(f"step {step}: {verdict.conclusion}")
            self._certified(verdict.certificate)
        else:
            self._tell(f"step {step}: no certificate yet, {_short(verdict)}")

    def _certified(self, certificate: Certificate) -> None:
        if self.job.config.check_certificate or self.job.config.from_certificate is not None:
            self.checking = Checking(self.job, certificate, self.x, self.y)
        else:
            self.done = True

    def _foreseen(self) -> float:
        """Return q with the residual of now and the other constants of the last attempt."""
        assert self.last is not None
        constants = [float(m) for m in self.last.measurements]
        if len(constants) != 4 or not constants[1] > 0:
            return 0.0
        return constants[2] * _residual(_twin(self.job.model), self.x, self.y) / constants[1] ** 2

    def _source(self, step: int) -> str:
        return f"the training rows of {self.job.data.name}, after step {step:,} of {self.job.title}"

    def _tell(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)


class Checking:
    """The steps of a run after its certificate."""

    def __init__(self, job: Job, certificate: Certificate, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = job.model, x, y
        self.params = dict(job.model.named_parameters())
        self.start = {name: certificate.tensors[name] for name in self.params}
        most = certified_lr(job.config, certificate.units["lr_max"])
        assert most is not None
        self.most = most
        twin = copy.deepcopy(job.model)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(self.start[name])
        norm = math.sqrt(math.fsum(float(p.square().sum()) for p in self.start.values()))
        self.steps = CertifiedSteps(certificate.claims, _residual(twin, x, y), weights=norm, targets=float(y.norm()))

    def go_on(self, table: Table) -> None:
        """Take up where the rows of a table end."""
        if len(table):
            last = {name: values[-1] for name, values in table.columns.items()}
            self.steps.steps = len(table)
            self.steps.residual, self.steps.envelope, self.steps.path = last["residual"], last["envelope"], last["path"]

    def after_step(self, step: int, row: dict[str, Any]) -> dict[str, Any]:
        """Hold a step against the certificate and return its row.

        Raises:
            Violation: by which numbers.
        """
        h = 2 * row["lr"] * row["scale"] / self.y.numel()
        with torch.no_grad():
            squares = [float((p - self.start[name]).square().sum()) for name, p in self.params.items()]
        distance = math.sqrt(math.fsum(squares))
        residual = _residual(self.model, self.x, self.y)
        try:
            self.steps.take(Step(h, residual, row["step_length"], distance))
        except Violation as error:
            raise Violation(f"the certificate does not hold at step {step}: {error}") from None
        return {
            "step": step,
            "residual": residual,
            "envelope": self.steps.envelope,
            "distance": distance,
            "path": self.steps.path,
            "step_size": h,
        }


@torch.no_grad()
def _residual(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x.double()) - y).norm())


def _twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def _short(verdict: Verdict) -> str:
    open_ones = [f for f in verdict.findings if f.outcome is not Outcome.PROVED]
    return "; ".join(f"{f.hypothesis}: {f.reason}" for f in open_ones)
