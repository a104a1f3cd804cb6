"""`surefoot certify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from surefoot.cli.show import certificate_table
from surefoot.cli.subject import SubjectArgs, subject_config
from surefoot.errors import InputError
from surefoot.report import write_report
from surefoot.train.certified_run import write_certificate
from surefoot.train.certifying import certify_subject, check_new, read_subject
from surefoot.train.document import rebuild_run, with_additions
from surefoot.train.job import repeatable
from surefoot.train.loop import check_out
from surefoot.train.subject import from_config


@dataclass(frozen=True)
class _CertifyArgs:
    run: Annotated[Path | None, tyro.conf.Positional] = None
    """The folder of a run; without one, --model and --data say what is certified, at the model's own weights."""
    polish: bool = True
    """First move a copy of the weights by Gauss-Newton steps to where the certificate fires (--layers all)."""
    layers: Literal["all", "last"] = "all"
    """The whole network, for --loss mse; or its last dense layer on features that stay as they are."""
    samples: int | None = None
    """The first so many training rows, in place of all."""
    epsilon: float | None = None
    """Between 0 and 1: how much of the rate is given up for longer steps (the best one)."""
    out: Path | None = None
    """The folder of the certificate (RUN/certificate); without a run, a new one for it and report.html (certified)."""
    threads: int | None = None
    """Threads of the processor (torch's choice)."""


@dataclass(frozen=True)
class CertifyArgs(SubjectArgs, _CertifyArgs):
    """Prove that an exact global minimum of the training loss lies next to a run's weights, or say what is short.

    Exit code 0: proved, and the certificate is written; 1: not proved, or refuted.
    """


def main(argv: list[str]) -> int:
    """Run `surefoot certify` and return its exit code."""
    args = tyro.cli(CertifyArgs, args=argv, prog="surefoot certify")
    if args.epsilon is not None and not 0 < args.epsilon < 1:
        raise InputError(f"--epsilon {args.epsilon:g} is not between 0 and 1; leave it out for the best one")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads {args.threads} is too small; give at least 1")
    config = subject_config(args, args.run, verb="certify")
    folder = args.out or Path("certified") if args.run is None else args.run
    if config is None:
        assert args.run is not None
        subject, proof = read_subject(args.run), args.out or args.run / "certificate"
        check_new(proof, "--out" if args.out else "RUN's")
    else:
        check_out(folder)
        subject, proof = from_config(config), folder / "certificate"
    with repeatable(args.threads):
        verdict, document = certify_subject(
            subject,
            layers=args.layers,
            polish=args.polish,
            samples=args.samples,
            epsilon=args.epsilon,
            tell=_tell,
        )
    folder.mkdir(parents=True, exist_ok=True)
    document = write_certificate(document, verdict, folder, proof)
    certificate_table(document)
    page = document if args.run is None else with_additions(rebuild_run(args.run), args.run)
    print(f"report: {write_report(page, folder / 'report.html')}")
    return 0 if verdict else 1


def _tell(line: str) -> None:
    if line.startswith("polish"):  # the verdict has a table of its own
        print(line, flush=True)
