"""`surefoot measure`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import tyro

from surefoot.cli.show import console
from surefoot.cli.train import FLAGS
from surefoot.errors import InputError
from surefoot.report import write_report
from surefoot.report.measured import GROUPS, group_of, value_text
from surefoot.train.budget import parse_budget
from surefoot.train.config import TrainConfig, flag
from surefoot.train.document import rebuild_run, with_additions
from surefoot.train.files import write_json
from surefoot.train.loop import check_out
from surefoot.train.measuring import choose, measure
from surefoot.train.subject import Subject, from_config, from_run


@dataclass(frozen=True)
class MeasureArgs:
    """Measure what the theory speaks of, at the weights of a run or of a model and data that are named."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """The folder of a run; without one, --model and --data say what is measured."""
    budget: str = "60s"
    """The time it may take: 60s, 2m, 1h. What does not fit is left out and listed."""
    only: str | None = None
    """Some of the measurements, with commas between: gradient, noise, features, sharpness, gauss-newton, smoothness,
    gram."""
    samples: int | None = None
    """Samples of the Gram and of the features, in place of as many as the budget allows."""
    expressivity: bool = False
    """The rank of the last hidden layer's features alone."""
    out: Path | None = None
    """A new folder for measurements.json and report.html (a run: its own)."""

    data: str | None = None
    """As for surefoot train, like all options from here on."""
    target: str | None = None
    """The column of a CSV (or numeric parquet) to predict; several separated by commas."""
    task: Literal["auto", "classification", "regression"] | None = None
    """What a table's target is, where its values leave that open."""
    image_size: int | None = None
    """Resize images to this many pixels a side."""
    context: int | None = None
    """Characters in a window of text, and the most words of a sentence."""
    test_fraction: float | None = None
    """The part held out where the data has no test split."""
    limit: int | None = None
    """Take this many training rows only."""
    model: str | None = None
    """mlp, resnet20, ... or path/to/file.py:factory."""
    width: tuple[int, ...] | None = None
    """Units in each hidden layer."""
    depth: int | None = None
    """Number of hidden layers."""
    activation: str | None = None
    """relu, tanh, sigmoid, softplus, gelu, silu, elu, leaky-relu or identity."""
    loss: Literal["auto", "mse", "cross-entropy"] | None = None
    """mse is torch's mean over rows and outputs."""
    optimizer: str | None = None
    """Whose steps smoothness is measured along."""
    lr: float | None = None
    """η, beside which sharpness is put."""
    batch_size: int | Literal["full"] | None = None
    """Rows a step."""
    seed: int | None = None
    """Fixes the initial weights and the choice of samples."""
    dtype: Literal["float32", "float64"] | None = None
    """Precision of the model; the Gram and all bounds are in float64."""
    device: str | None = None
    """cpu, cuda, cuda:1 ..."""
    threads: int | None = None
    """Threads of the CPU."""


_OF_THE_COMMAND = ("run", "budget", "only", "samples", "expressivity", "out", "device", "threads")


def main(argv: list[str]) -> int:
    """Run `surefoot measure` and return its exit code."""
    args = tyro.cli(MeasureArgs, args=argv, prog="surefoot measure", config=FLAGS)
    seconds = parse_budget(args.budget)
    names = choose(args.only, expressivity=args.expressivity)
    if args.samples is not None and args.samples < 1:
        raise InputError(f"--samples {args.samples} is too small; give at least 1")
    if args.out is not None:
        check_out(args.out)
    make = _subject(args)
    with _Progress() as progress:
        progress.tell("loading the data", 0.0)
        document = measure(make, seconds, names, samples=args.samples, asked=args.only is not None, tell=progress.tell)
    show(document)
    return _write(args, document)


def _subject(args: MeasureArgs) -> Callable[[], Subject]:
    """Return what makes the subject: from the run, or from the options of training."""
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in _OF_THE_COMMAND}
    given = {name: value for name, value in options.items() if value is not None}
    machine: dict[str, Any] = {"device": args.device, "threads": args.threads}
    if args.run is not None:
        if given:
            raise InputError(f"RUN {args.run} says what is measured: leave out {', '.join(map(flag, given))}")
        return partial(from_run, args.run, **machine)
    if "model" not in given and "data" not in given:
        raise InputError("nothing to measure: give the folder of a run, or --model and --data")
    return partial(from_config, TrainConfig(**given, **{k: v for k, v in machine.items() if v is not None}))


def _write(args: MeasureArgs, document: dict[str, Any]) -> int:
    """Write measurements.json and the report: into the run's folder, or a new one."""
    folder = args.out or args.run
    if folder is None:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "measurements.json", document)
    page = document if args.run is None else with_additions(rebuild_run(args.run), folder)
    print(f"report: {write_report(page, folder / 'report.html')}")
    return 0


def show(document: dict[str, Any]) -> None:
    """Print the measurements by kind, what was left out, and the notes."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{document['title']}: {document['subject']['weights']}"))
    for name in ("quantity", "value", "n", "how"):
        table.add_column(name, justify="right" if name == "n" else "left", no_wrap=name == "value")
    entries = document["measurements"]
    for group, (title, _) in GROUPS.items():
        rows = [e for e in entries if group_of(e) == group]
        if rows:
            table.add_row(f"[bold]{title}[/bold]")
        for e in rows:
            n = "" if e["samples"] is None else f"{e['samples']:,}"
            table.add_row("  " + escape(e["name"]), escape(value_text(e)), n, escape(e["how"]))
        if rows:
            table.add_section()
    console().print(table)
    for entry in document["left_out"]:
        needs = f" (needs about --budget {entry['budget']})" if entry["budget"] else ""
        print(f"left out: {entry['what']}: {entry['why']}{needs}")
    for entry in entries:
        for note in entry["notes"]:
            print(f"note: {entry['name']}: {note}")
    for note in document["notes"]:
        print(f"note: {note}")


class _Progress:
    """What is being measured now: a live line on a terminal, a plain line each elsewhere."""

    def __init__(self) -> None:
        self.live = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self.live = Progress(*columns, transient=True)
            self.task = self.live.add_task("", total=1.0)

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def tell(self, what: str, part: float) -> None:
        """Say what is being done, and which part of the budget is spent."""
        if self.live is not None:
            self.live.update(self.task, description=what, completed=part)
        else:
            print(f"{part:4.0%}  {what}", flush=True)
