"""`surefoot reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape
from rich.table import Table

from surefoot.cli.show import console
from surefoot.cli.train import FLAGS
from surefoot.errors import InputError
from surefoot.reproduce.recipe import Finding, Recipe, overall
from surefoot.reproduce.recipes import names, recipe
from surefoot.reproduce.report import SIZES, rows, write
from surefoot.reproduce.results import Results
from surefoot.reproduce.runner import run
from surefoot.reproduce.sources import Sources
from surefoot.train.environment import environment
from surefoot.train.job import _device


@dataclass(frozen=True)
class ReproduceArgs:
    """Run a paper's experiment, scaled down unless --full; tables, figures and a verdict beside the paper's claim.

    Without NAME: list the recipes. A second call with the same --out goes on where the first was stopped. Exit code 0:
    reproduced; 1: not reproduced, or nothing of it can be tested.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """The recipe."""
    full: bool = False
    """The paper's size, in place of what one core does in an hour."""
    seeds: int | None = None
    """Seeds of each experiment (the recipe's number)."""
    only: tuple[str, ...] = ()
    """These experiments of the recipe only."""
    data_root: Path | None = None
    """A folder that holds the data sets, in place of the Hugging Face hub."""
    out: Path | None = None
    """The folder of the results (runs/reproduce-NAME, or runs/reproduce-NAME-full)."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""
    threads: int = 1
    """Threads of the CPU; results are repeated bit for bit at the same number."""


def main(argv: list[str]) -> int:
    """Run `surefoot reproduce` and return its exit code."""
    args = tyro.cli(ReproduceArgs, args=argv, prog="surefoot reproduce", config=FLAGS)
    if args.threads < 1:
        raise InputError(f"--threads {args.threads} is too small; give at least 1")
    if args.name is None:
        listing()
        return 0
    found, device = recipe(args.name), _device(args.device)
    out = args.out or Path("runs") / f"reproduce-{found.name}{'-full' if args.full else ''}"
    print(f"{found.name}, {SIZES[args.full]}: {found.paper}\nclaim: {found.claim}", flush=True)
    try:
        results = run(
            found,
            out,
            full=args.full,
            seeds=args.seeds,
            only=args.only,
            sources=Sources(args.data_root),
            device=str(device),
            threads=args.threads,
            tell=_tell,
        )
    except KeyboardInterrupt:
        print(f"stopped; the same command with --out {out} goes on")
        return 130
    where = {**environment(device), "threads": args.threads}
    findings = write(found, results, out, full=args.full, where=where)
    show(found, results, findings)
    print(f"report: {out / 'report.md'}")
    return 0 if overall(findings) == "reproduced" else 1


def listing() -> None:
    """Print the recipes."""
    table = Table(title="surefoot reproduce NAME")
    for title in ("name", "paper", "claim", "experiments"):
        table.add_column(title)
    for name in names():
        one = recipe(name)
        table.add_row(*map(escape, (name, one.paper, one.claim, " ".join(e.name for e in one.experiments))))
    console().print(table)


def show(found: Recipe, results: Results, findings: list[Finding]) -> None:
    """Print the tables and the verdict."""
    for one in found.tables:
        header, body = rows(one, results)
        if body:
            _print(one.title, header, body)
    _print("verdict", ["what", "verdict", "why"], [[f.what, f.outcome, f.reason] for f in findings])
    print(f"tolerance: {found.tolerance}\n{overall(findings)}: {found.claim}")


def _print(title: str, header: list[str], body: list[list[str]]) -> None:
    table = Table(title=escape(title))
    for name in header:
        table.add_column(escape(name))
    for row in body:
        table.add_row(*map(escape, row))
    console().print(table)


def _tell(line: str) -> None:
    print(line, flush=True)
