"""`surefoot measure`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import tyro

from surefoot.cli.show import console
from surefoot.cli.subject import SubjectArgs, subject_config
from surefoot.cli.train import FLAGS
from surefoot.errors import InputError
from surefoot.report import write_report
from surefoot.report.measured import GROUPS, group_of, value_text
from surefoot.train.budget import parse_budget
from surefoot.train.document import rebuild_run, with_additions
from surefoot.train.files import write_json
from surefoot.train.loop import check_out
from surefoot.train.measuring import choose, measure
from surefoot.train.subject import Subject, from_config, from_run


@dataclass(frozen=True)
class _MeasureArgs:
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


@dataclass(frozen=True)
class MeasureArgs(SubjectArgs, _MeasureArgs):
    """Measure what the theory speaks of, at the weights of a run or of a model and data that are named."""

    optimizer: str | None = None
    """Whose steps smoothness is measured along."""
    lr: float | None = None
    """η, beside which sharpness is put."""
    batch_size: int | Literal["full"] | None = None
    """Rows a step."""
    device: str | None = None
    """cpu, cuda, cuda:1 ..."""
    threads: int | None = None
    """Threads of the CPU."""


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
        document = measure(
            make,
            seconds,
            names,
            samples=args.samples,
            asked=args.only is not None,
            expressivity=args.expressivity,
            tell=progress.tell,
        )
    show(document)
    _write(args, document)
    return _answer(document) if args.expressivity else 0


def _subject(args: MeasureArgs) -> Callable[[], Subject]:
    """Return what makes the subject: from the run, or from the options of training."""
    machine: dict[str, Any] = {"device": args.device, "threads": args.threads}
    config = subject_config(args, args.run, "optimizer", "lr", "batch_size", verb="measure", **machine)
    if config is not None:
        return partial(from_config, config)
    assert args.run is not None
    return partial(from_run, args.run, **machine)


def _write(args: MeasureArgs, document: dict[str, Any]) -> None:
    """Write measurements.json and the report: into the run's folder, or a new one."""
    folder = args.out or args.run
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "measurements.json", document)
    page = document if args.run is None else with_additions(rebuild_run(args.run), folder)
    print(f"report: {write_report(page, folder / 'report.html')}")


def _answer(document: dict[str, Any]) -> int:
    """Say in a sentence whether the last layer alone fits any targets, and what would do; return the exit code."""
    found = document["expressivity"]
    if found is None:
        print("not decided: " + "; ".join(e["why"] for e in document["left_out"]))
        return 1
    n, width = found["samples"], found["width"]
    rows = f"{n:,} training rows" if n == found["rows"] else f"{n:,} of the {found['rows']:,} training rows"
    what = f"the last layer ({found['layer']}) alone fits any targets on the {rows}"
    if found["status"] == "PROVED":
        print(f"PROVED: {what}, at {document['subject']['weights']}: s_N >= {found['s_min']:.4g}")
        return 0
    word = {"REFUTED": "REFUTED", "UNDECIDED": "NOT PROVED"}[found["status"]]
    why = []
    if found["columns"] < n:
        why.append(
            f"{found['columns']:,} columns cannot have rank {n:,}. A last hidden layer of {width:,} units is the least "
            f"that can (surefoot train --explore-exploit --widen {width}; --widen auto takes twice the rows, far "
            "better conditioned)"
        )
    if groups := found["duplicates"]:
        shown = "; ".join(" = ".join(map(str, g)) for g in groups[:5]) + "; ..." * (len(groups) > 5)
        why.append(f"rows with equal features ({shown}): where the rows themselves are equal no width helps, keep one")
    if not why:
        why.append("s_N cannot be told from 0. Noise on the hidden weights lifts it (--explore-exploit --noise auto)")
    print(f"{word}: {what}: {'. And '.join(why)}")
    return 1


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
