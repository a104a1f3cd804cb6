"""`surefoot compare`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from surefoot.cli.show import comparison_table
from surefoot.cli.train import FLAGS, settings, shallow
from surefoot.errors import InputError
from surefoot.report import write_report
from surefoot.train.compare import Comparison, compare, read_comparison
from surefoot.train.config import TrainConfig
from surefoot.train.distributed import launched
from surefoot.train.loop import check_out, default_name


@dataclass(frozen=True)
class CompareArgs(TrainConfig):
    """The same job with several optimizers and seeds: mean, standard error and one report with all curves.

    The options of `surefoot train` hold for every arm; an arm's own letters follow its name: adamw:lr=3e-4,gamma=1.
    """

    optimizer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME[:lr=..,gamma=..]")] = ("delta-gclip", "sgd")  # type: ignore[assignment]
    """The arms: optimizers, each with letters of its own if wanted."""
    seeds: int = 3
    """Seeds an arm, counted from --seed."""
    jobs: int = 1
    """Processes at a time, each with its share of the cores."""
    out: Path | None = None
    """The folder to make (a new one under runs/)."""
    resume: Path | None = None
    """Go on with the comparison in this folder: finished runs are kept."""


def main(argv: list[str]) -> int:
    """Run `surefoot compare` and return its exit code."""
    args = parse(argv)
    if launched() or args.parallel != "none":
        raise InputError("surefoot compare runs in one process: leave out torchrun and --parallel")
    if args.until_certified or args.check_certificate or args.from_certificate:
        raise InputError(
            "surefoot compare starts anew and runs to the end; leave out --until-certified, --check-certificate and "
            "--from-certificate"
        )
    comparison = Comparison(_base(args), args.optimizer, args.seeds)  # type: ignore[arg-type]
    if args.resume is not None:
        if args.out is not None:
            raise InputError(f"--out {args.out} and --resume {args.resume} contradict each other; give one")
        if comparison != read_comparison(args.resume):
            raise InputError(f"--resume {args.resume} was started with other options; leave them out")
        folder = args.resume
    else:
        folder = args.out or Path("runs") / default_name(_base(args)).replace("delta-gclip", "compare")
        check_out(folder)
    try:
        document = compare(comparison, folder, jobs=args.jobs, resumed=args.resume is not None, tell=_tell)
    except KeyboardInterrupt:
        print(f"stopped; go on with surefoot compare --resume {folder}")
        return 130
    report = write_report(document, folder / "report.html")
    comparison_table(document)
    print(f"report: {report}")
    return 0


def parse(argv: list[str]) -> CompareArgs:
    """Read the options; those of --resume stand where none is given."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume", type=Path)
    found, _ = early.parse_known_args(argv)
    stored: dict[str, Any] = {}
    if found.resume is not None:
        old = read_comparison(found.resume)
        stored = {**shallow(old.base), "optimizer": old.arms, "seeds": old.seeds}
    return tyro.cli(CompareArgs, args=argv, prog="surefoot compare", default=CompareArgs(**stored), config=FLAGS)


def _base(args: CompareArgs) -> TrainConfig:
    return settings(args, optimizer="delta-gclip")


def _tell(line: str) -> None:
    print(line, flush=True)
