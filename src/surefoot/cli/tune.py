"""`surefoot tune`."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from surefoot.cli.show import console
from surefoot.cli.subject import SubjectArgs
from surefoot.cli.train import FLAGS, shallow
from surefoot.errors import InputError
from surefoot.report import write_report
from surefoot.report.suggested import reason_rows
from surefoot.train.config import TrainConfig, read_config
from surefoot.train.files import write_json
from surefoot.train.loop import check_out, default_name
from surefoot.tune.job import tune


@dataclass(frozen=True)
class _TuneArgs:
    budget: str | None = None
    """The part of the run's gradients that measuring may take (10%, and at least 25 gradients)."""
    out: Path | None = None
    """A new folder for config.json, suggestion.json and report.html (one under runs/), or a new file for the config."""
    config: Path | None = None
    """A run's config.json: tune that run, with the other options given here changed; its lr counts as yours."""


@dataclass(frozen=True)
class TuneArgs(SubjectArgs, _TuneArgs):
    """Suggest lr, γ, δ and a warm-up for a run from constants that a short probing run measures."""

    optimizer: Literal["delta-gclip", "gclip", "sgd"] | None = None
    """Whose lr, γ and δ are wanted (delta-gclip)."""
    lr: float | None = None
    """η that you would have taken; you are told how far off it is."""
    lr_schedule: Literal["constant", "linear", "cosine"] | None = None
    """What lr does over the run to come; linear and cosine fall to 0."""
    momentum: float | None = None
    """μ in [0, 1) of the run to come."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float | None = None
    """λ of the run to come; what is measured is the loss without it."""
    batch_size: int | Literal["full"] | None = None
    """Rows a step."""
    micro_batch: int | None = None
    """Rows in memory at once."""
    epochs: float | None = None
    """Passes over the training rows of the run to come."""
    steps: int | None = None
    """Its number of steps, in place of --epochs."""
    autocast: Literal["none", "bf16"] | None = None
    """bf16 works out products in bfloat16."""
    device: str | None = None
    """cpu, cuda, cuda:1 ..."""
    threads: int | None = None
    """Threads of the CPU."""


def main(argv: list[str]) -> int:
    """Run `surefoot tune` and return its exit code."""
    args = tyro.cli(TuneArgs, args=argv, prog="surefoot tune", config=FLAGS)
    budget = None if args.budget is None else parse_part(args.budget)
    config = _config(args)
    out = args.out or Path("runs") / f"{default_name(config)}-tuned"
    check_file(out) if out.suffix == ".json" else check_out(out)
    found, document = tune(config, budget, tell=lambda text: print(text, flush=True))
    show(document)
    _write(out, document)
    return 0 if found.sure else 1


def parse_part(text: str) -> float:
    """Return the part of a run that 10% or 0.1 stand for.

    Raises:
        InputError: another form, or outside (0, 1].

    Example:
        >>> parse_part("10%"), parse_part("0.25")
        (0.1, 0.25)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", text.strip())
    part = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < part <= 1:
        raise InputError(f"--budget {text} is no part of a run; write it as 10% or 0.1, at most 100%")
    return part


def check_file(out: Path) -> None:
    """Raise InputError if there is a file already, or no folder for it."""
    if out.exists():
        raise InputError(f"--out {out} exists; give another name, or a folder")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out} lies in a folder that does not exist; make {out.parent} first")


def _config(args: TuneArgs) -> TrainConfig:
    own = {f.name for f in dataclasses.fields(_TuneArgs)}
    names = [f.name for f in dataclasses.fields(TuneArgs) if f.name not in own and f.name != "nesterov"]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.config is None:
        return TrainConfig(**given, nesterov=args.nesterov)
    stored = shallow(read_config(args.config))
    if "steps" in given or "epochs" in given:
        stored |= {"steps": None, "epochs": None}
    if "optimizer" in given and given["optimizer"] != stored["optimizer"]:
        stored |= {"lr": None, "gamma": None, "delta": None, "beta": None, "L0": None, "L1": None}
    return TrainConfig(**{**stored, **given, "nesterov": args.nesterov or stored["nesterov"]})


def show(document: dict[str, Any]) -> None:
    """Print the table of reasons, what speaks against it, what it cost, and what other rules say."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{document['title']}: suggested"))
    for name in ("", "value", "95% interval", "from", "rule", "source"):
        table.add_column(name, justify="left", no_wrap=name in ("", "value"))
    for row in reason_rows(document):
        table.add_row(*map(escape, row))
    console().print(table)
    for doubt in document["doubts"]:
        print(f"not sure: {doubt}")
    for note in document["notes"]:
        print(f"note: {note}")
    for other in document["others"]:
        gamma = other["gamma"] if isinstance(other["gamma"], str) else f"{other['gamma']:.3g}"
        print(f"for comparison, {other['rule']}: lr {other['lr']:.3g}, γ {gamma} ({other['source']})")
    part = document["cost"] / document["steps"]
    print(f"cost: {document['cost']:,} gradients, {part:.1%} of the run of {document['steps']:,} steps")


def _write(out: Path, document: dict[str, Any]) -> None:
    """Write the configuration, and beside it, in a folder, the document and the page; say what comes next."""
    config = out
    if out.suffix != ".json":
        out.mkdir(parents=True, exist_ok=True)
        config = out / "config.json"
        write_json(out / "suggestion.json", document)
    write_json(config, document["config"])
    if config != out:
        print(f"report: {write_report(document, out / 'report.html')}")
    print(f"next: surefoot train --config {shlex.quote(str(config))}")
