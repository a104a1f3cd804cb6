"""`surefoot report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from surefoot.report import write_report
from surefoot.train.compare import is_comparison, read_comparison, summarise
from surefoot.train.document import rebuild_run, with_additions


@dataclass(frozen=True)
class ReportArgs:
    """Rebuild report.html from the files of a run or a comparison, also of one that was killed."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a run or of a comparison."""


def main(argv: list[str]) -> int:
    """Run `surefoot report` and return its exit code."""
    folder = tyro.cli(ReportArgs, args=argv, prog="surefoot report").run
    if is_comparison(folder):
        document = summarise(read_comparison(folder), folder)
    else:
        document = with_additions(rebuild_run(folder), folder)
    print(f"report: {write_report(document, folder / 'report.html')}")
    return 0
