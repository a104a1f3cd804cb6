"""Tables for the terminal."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from surefoot.report.certified import certified_rows, criteria_text, outcome_text, polished_text
from surefoot.report.explored import TRADE, conclusion_text, explored_rows, trade_rows
from surefoot.train.progress import duration


def console() -> Console:
    """Return a console that does not wrap tables where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=int(os.environ.get("COLUMNS", "120")))


def metric_text(metric: dict[str, Any], value: float | None, error: float | None = None) -> str:
    """Return a metric's value, with its standard error if there is one."""
    if value is None:
        return "-"
    if metric["percent"]:
        return f"{value:.2%}" + (f" ± {error:.2%}" if error is not None else "")
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def run_table(document: dict[str, Any]) -> None:
    """Print what a run came to."""
    summary, regimes = document["summary"], document["regimes"]
    table = Table(title=document["title"], show_header=False)
    table.add_column()
    table.add_column(justify="right")
    metric = document["metric"]
    table.add_row(metric["name"], metric_text(metric, summary["primary"]["value"]))
    if metric["column"] != "test_loss":
        table.add_row("test loss", _number(summary["evaluation"].get("test_loss")))
    table.add_row("train loss", _number(summary["train_loss"]))
    last = document.get("last_layer_steps", 0)
    table.add_row("steps", f"{summary['steps'] - last:,} ({summary['epochs']:.4g} epochs)")
    total = max(1, sum(regimes.values()))
    for name, count in regimes.items():
        table.add_row(f"  {name}", f"{count:,} ({count / total:.1%})")
    if last:
        table.add_row("steps of the last layer alone", f"{last:,}")
    table.add_row("time", f"{duration(summary['seconds'])} ({_number(summary['rows_per_second'])} rows/s)")
    console().print(table)
    for note in document["notes"]:
        print(f"note: {note}")


def comparison_table(document: dict[str, Any]) -> None:
    """Print the arms side by side: mean ± standard error over the seeds."""
    metric = document["metric"]
    table = Table(title=document["title"])
    for name in ("optimizer", "settings", metric["name"], "train loss", "clipped", "floored", "seconds", "runs"):
        table.add_column(name, justify="left" if name in ("optimizer", "settings") else "right")
    for arm in document["arms"]:
        failed = f" ({len(arm['failed'])} failed)" if arm["failed"] else ""
        loss = arm["train_loss"]
        table.add_row(
            arm["name"],
            " ".join(f"{k}={v if isinstance(v, str) else format(v, 'g')}" for k, v in arm["settings"].items()),
            metric_text(metric, arm["metric"]["mean"], arm["metric"]["se"]),
            _number(loss["mean"]) + (f" ± {loss['se']:.2g}" if loss["se"] is not None else ""),
            f"{arm['regimes']['clipped']:.0%}",
            f"{arm['regimes']['floored']:.0%}",
            _number(arm["seconds"]["mean"]),
            f"{len(arm['seeds'])}{failed}",
        )
    console().print(table)


def certificate_table(document: dict[str, Any]) -> None:
    """Print a certificate's verdict: what, its constants, what follows; else what is short and what would help."""
    from rich.markup import escape

    verdict = document["verdict"]
    rows = certified_rows(document)
    table = Table(title=escape(f"{outcome_text(verdict)}: {verdict['theorem']}"), show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for group in rows:
        for name, value, meaning in group:
            table.add_row(escape(name), escape(value), escape(meaning))
        table.add_section()
    console().print(table)
    for text in (document["statement"], polished_text(document), criteria_text(document)):
        if text:
            print(text)
    for finding in verdict["findings"]:
        if finding["outcome"] != "proved":
            print(f"{finding['outcome']}: {finding['hypothesis']}: {finding['reason']}")
            if finding["remedy"]:
                print(f"  what would help: {finding['remedy']}")
    for note in document["notes"]:
        print(f"note: {note}")
    if document["folder"]:
        print(f"certificate: {document['folder']}; check it with surefoot verify {document['folder']}")


def explored_table(document: dict[str, Any]) -> None:
    """Print the verdict of explore/exploit: the features, what follows, what it cost, the trade of the noise."""
    from rich.markup import escape

    verdict = document["verdict"]
    table = Table(title=escape(f"{outcome_text(verdict)}: {verdict['theorem']}"), show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for group in explored_rows(document):
        for name, value, meaning in group:
            table.add_row(escape(name), escape(value), escape(meaning))
        table.add_section()
    console().print(table)
    if trade := trade_rows(document):
        noises = Table(title="what noise would have done")
        for name in TRADE:
            noises.add_column(name, justify="right", no_wrap=True)
        for row in trade:
            noises.add_row(*map(escape, row))
        console().print(noises)
    print(conclusion_text(document))
    for finding in verdict["findings"]:
        if finding["outcome"] != "proved":
            print(f"{finding['outcome']}: {finding['hypothesis']}: {finding['reason']}")
            if finding["remedy"]:
                print(f"  what would help: {finding['remedy']}")
    for note in document["notes"]:
        print(f"note: {note}")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
