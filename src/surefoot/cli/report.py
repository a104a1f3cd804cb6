"""`surefoot report`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from surefoot.report import write_report
from surefoot.train.document import rebuild_run


@dataclass(frozen=True)
class ReportArgs:
    """Rebuild report.html from the files of a run or a comparison, also of one that was killed."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a run or of a comparison."""


def main(argv: list[str]) -> int:
    """Run `surefoot report` and return its exit code."""
    folder = tyro.cli(ReportArgs, args=argv, prog="surefoot report").run
    comparison = folder / "comparison.json"
    if comparison.is_file():
        document = json.loads(comparison.read_text(encoding="utf-8"))
    else:
        document = rebuild_run(folder)
    print(f"report: {write_report(document, folder / 'report.html')}")
    return 0
