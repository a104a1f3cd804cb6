"""`surefoot train`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from surefoot.check import verify
from surefoot.cli.show import certificate_table, explored_table, run_table
from surefoot.errors import InputError
from surefoot.report import write_report
from surefoot.train.certified_start import certified_options
from surefoot.train.config import TrainConfig, read_config
from surefoot.train.distributed import joined
from surefoot.train.document import with_additions
from surefoot.train.loop import default_name, resume, train


@dataclass(frozen=True)
class TrainArgs(TrainConfig):
    """Train on a data set or your own model; write a run folder with report.html."""

    out: Path | None = None
    """The run folder to make (a new one under runs/)."""
    resume: Path | None = None
    """Go on with the run in this folder."""
    config: Path | None = None
    """A run's config.json: repeat it, with the other options given here changed."""


def main(argv: list[str]) -> int:
    """Run `surefoot train` and return its exit code."""
    args = parse(argv)
    config = settings(args)
    if args.resume is not None and args.out is not None:
        raise InputError(f"--out {args.out} and --resume {args.resume} contradict each other; give one")
    with joined(config.parallel, config.device) as team:
        if args.resume is not None:
            folder, document = args.resume, resume(args.resume, config)
        else:
            if config.from_certificate is not None:
                _verify(config.from_certificate)
            folder = team.on_main(lambda: args.out or Path("runs") / default_name(config))
            document = train(config, folder)
        return team.on_main(lambda: tell(document, folder))


def tell(document: dict[str, Any], folder: Path) -> int:
    """Write the report, print what the run came to, and return the exit code."""
    document = with_additions(document, folder)
    report = write_report(document, folder / "report.html")
    status = document["status"]
    if status in ("diverged", "failed"):
        print(f"surefoot train: {document['message']}", file=sys.stderr)
        print(f"report: {report}", flush=True)
        return 2 if status == "diverged" else 1
    run_table(document)
    if status == "interrupted":
        print(document["message"])
    proved = True
    options = document["config"]
    if options["explore_exploit"] and document["explored"]["verdict"] is not None:
        explored_table(document["explored"])
        proved = document["explored"]["verdict"]["outcome"] == "proved"
    if (options["until_certified"] or options.get("from_certificate")) and status == "finished":
        certificate_table(document["certificate"])
        proved = document["certificate"]["verdict"]["outcome"] == "proved"
    print(f"report: {report}", flush=True)
    return 130 if status != "finished" else 0 if proved else 1


def _verify(certificate: str) -> None:
    """Let the independent checker look at a certificate before anything is said by it.

    Raises:
        InputError: it does not hold.
    """
    print(f"verifying {certificate}", flush=True)
    if not (result := verify(certificate)):
        raise InputError(f"--from-certificate {certificate} does not verify; nothing was trained.\n{result}")


def parse(argv: list[str]) -> TrainArgs:
    """Read the options; those of --config or --resume stand where none is given."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--resume", type=Path)
    early.add_argument("--from-certificate", type=Path)
    early.add_argument("--optimizer")
    found, _ = early.parse_known_args(argv)
    stored: dict[str, Any] = {}
    if found.config is not None and found.resume is not None:
        raise InputError(f"--config {found.config} and --resume {found.resume} contradict each other; give one")
    if found.from_certificate is not None and found.resume is None:
        config = None if found.config is None else read_config(found.config)
        stored = shallow(certified_options(found.from_certificate, config, found.optimizer))
    elif found.config is not None:
        stored = shallow(read_config(found.config))
    elif found.resume is not None:
        path = found.resume / "config.json"
        if not path.is_file():
            raise InputError(f"--resume {found.resume} is not a run: it holds no config.json")
        stored = shallow(read_config(path))
    return tyro.cli(TrainArgs, args=argv, prog="surefoot train", default=TrainArgs(**stored), config=FLAGS)


# Flags without "--no-" twins, as command lines have them.
FLAGS = (tyro.conf.FlagCreatePairsOff,)


def shallow(config: TrainConfig) -> dict[str, Any]:
    """Return the options of a configuration as keyword arguments."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def settings(args: TrainConfig, **changes: Any) -> TrainConfig:
    """Return the training options of parsed arguments, without the command line's own and with `changes`."""
    return TrainConfig(**{**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)}, **changes})
