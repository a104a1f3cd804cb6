"""What is said of explore/exploit: on the page of its run, and in the terminal."""

from dataclasses import dataclass
from typing import Any

from surefoot.errors import InputError
from surefoot.report import figures
from surefoot.report.certified import outcome_text
from surefoot.report.drawing import Drawing
from surefoot.report.formats import is_number, number, percent, plural, quantity
from surefoot.report.measured import value_text
from surefoot.report.read import Table, known, listing, mapping

FORMAT, VERSION = "surefoot.explored", 1
TRADE = ("noise", "rank N", "s_N at least", "steps, squared loss", "loss", "training accuracy")
Row = tuple[str, str, str]  # name, value, meaning

_STATUS = {"PROVED": "proved", "REFUTED": "refuted", "UNDECIDED": "open"}


@dataclass(frozen=True)
class Explored:
    """The part of a page that explore/exploit has."""

    outcome: str
    title: str
    conclusion: str
    groups: list[list[Row]]
    short: list[tuple[str, str, str, str]]
    trade_names: tuple[str, ...]
    trade: list[list[str]]
    drawings: list[Drawing]
    notes: list[str]


def explored(document: dict[str, Any]) -> Explored | None:
    """Return what a page says of a document of format `surefoot.explored`; None for an empty one.

    Raises:
        InputError: it is of another format or version, or a part of it makes no sense.
    """
    if not document:
        return None
    found = document.get("format"), document.get("version")
    if found != (FORMAT, VERSION):
        raise InputError(f"explored: format is {found[0]!r} of version {found[1]!r}, not {FORMAT!r} of {VERSION}")
    verdict = mapping(document, "verdict")
    if not verdict:
        title = "No verdict yet: the network is still exploring"
    else:
        title = f"{outcome_text(verdict)}: {verdict.get('theorem') or 'no theorem'}"
    return Explored(
        outcome=str(verdict.get("outcome") or "undecided"),
        title=title,
        conclusion=conclusion_text(document),
        groups=explored_rows(document),
        short=[
            (str(f.get("outcome")), str(f.get("hypothesis")), str(f.get("reason") or ""), str(f.get("remedy") or ""))
            for f in listing(verdict, "findings")
            if isinstance(f, dict) and f.get("outcome") != "proved"
        ],
        trade_names=TRADE,
        trade=trade_rows(document),
        drawings=_under_its_bound(document),
        notes=[str(note) for note in listing(document, "notes")],
    )


def conclusion_text(document: dict[str, Any]) -> str:
    """Say what is guaranteed, of which rows, and how far the loss is from it."""
    verdict = mapping(document, "verdict")
    numbers, rows = mapping(verdict, "numbers"), number(document.get("rows"))
    frozen = f"The hidden layers are frozen after step {number(document.get('explore_steps'))}"
    if not verdict:
        return f"{frozen} of {number(document.get('total_steps'))}."
    loss = numbers.get("loss")
    now = f" The loss is {number(loss)} now." if is_number(loss) else ""
    if verdict.get("outcome") != "proved":
        return f"Nothing is guaranteed.{now}"
    bound = numbers.get("loss_bound")
    under = f" After {plural(int(document.get('taken') or 0), 'step')} it is guaranteed to be at most {number(bound)}."
    return (
        f"On these {rows} training rows no network whatever has a loss below {number(numbers.get('infimum'))}, and the "
        f"last layer alone comes as close to it as you like.{now}{under if is_number(bound) else ''} Nothing is said "
        "of other rows."
    )


def explored_rows(document: dict[str, Any]) -> list[list[Row]]:
    """The rows of the table, in groups: the features, the last layer, what was held out."""
    rank, first, verdict = mapping(document, "rank"), mapping(document, "untrained"), mapping(document, "verdict")
    noise, numbers = mapping(document, "noise"), mapping(verdict, "numbers")
    features: list[Row] = []
    if first:
        features.append((
            "before the first step", _STATUS.get(str(first.get("status")), number(first.get("status"))),
            f"rank {number(first.get('samples'))} of [H, 1], {number(first.get('columns'))} columns; "
            f"s_N {value_text(mapping(first, 's_min'))}",
        ))  # fmt: skip
    if rank:
        features.append((
            "frozen", _STATUS.get(str(rank.get("status")), number(rank.get("status"))),
            f"the same after step {number(document.get('explore_steps'))} and noise {number(noise.get('taken'))}",
        ))  # fmt: skip
        features += [
            (str(m.get("name")), value_text(m), f"{m.get('kind')}, {m.get('level')}: {m.get('how')}")
            for m in (mapping(rank, key) for key in ("rank_at_least", "rank_at_most", "s_min", "s_max"))
            if m
        ]
    layer: list[Row] = []
    if rank:
        steps = document.get("expected_steps")
        enough = number(steps, 2) if is_number(steps) else "unknown"
        layer.append(("first-order steps", enough, "enough from the frozen features, whatever the targets"))
        solved = document.get("solved") or f"{plural(int(document.get('taken') or 0), 'step')} on cached features"
        layer.append(("solver", str(document.get("solver")), str(solved)))
    if is_number(numbers.get("loss")):
        layer.append(("f", number(numbers["loss"]), "the loss on the frozen features, in float64: an estimate"))
    if is_number(numbers.get("loss_bound")):
        layer.append(("f at most", number(numbers["loss_bound"]), "after these steps, but for their own rounding"))
    layer += [
        (str(m["name"]), value_text(m), f"{m.get('kind')}, {m.get('level')}: {m.get('how')}")
        for m in listing(verdict, "measurements")
        if isinstance(m, dict) and str(m.get("name")).startswith("f - ")
    ]
    return [group for group in (features, layer, _accuracies(document)) if group]


def trade_rows(document: dict[str, Any]) -> list[list[str]]:
    """What each noise that was tried came to; the one taken is marked. None where a number was asked for."""
    return [
        [
            number(row.get("noise")) + (" ← taken" if row.get("chosen") else ""),
            _STATUS.get(str(row.get("status")), number(row.get("status"))),
            number(row.get("s_min"), 3),
            number(row.get("steps"), 2) if is_number(row.get("steps")) else "unknown",
            number(row.get("loss"), 3),
            percent(row.get("accuracy")),
        ]
        for row in listing(document, "trade")
        if isinstance(row, dict)
    ]


# ----------------------------------------------------------------------------------------------------------------------


def _accuracies(document: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    as_percent = bool(document.get("percent"))
    for key, name, about in (
        ("held_out", str(document.get("metric")), f"on {number(document.get('held_out_rows'))} rows held out"),
        ("train", "training accuracy", f"on the {number(document.get('rows'))} training rows"),
    ):
        found = mapping(document, key)
        if not is_number(found.get("before")):
            continue
        end = quantity(found.get("end"), as_percent)
        before, after = (quantity(found.get(k), as_percent) for k in ("before", "after"))
        rows.append((name, end, f"at the end, {about}; {before} before the noise, {after} after it"))
    return rows


def _under_its_bound(document: dict[str, Any]) -> list[Drawing]:
    """The loss of the last layer, and below what it is guaranteed to stay."""
    table = Table(mapping(document, "series"), "explored.series")
    if table.rows < 2:
        return []
    step, loss, bound = table.numbers("step"), table.numbers("loss"), table.numbers("bound")
    if figures.nothing_to_draw(loss) or not known(bound).size:
        return []
    svg = figures.guaranteed(
        "fig-last-layer",
        step,
        [("loss", loss, "series")],
        ("bound", bound),
        True,
        f"Loss: {figures.describe(loss)}; guaranteed: {figures.describe(bound)}",
    )
    text = (
        f"The loss of all training rows after each of the {plural(table.rows - 1, 'step')} of the last layer, and what "
        "the singular values of the frozen features guarantee (dashed). The least loss of any network is 0."
    )
    return [Drawing("fig-last-layer", "Loss under its guarantee", text, svg)]
