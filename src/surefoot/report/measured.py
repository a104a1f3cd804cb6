"""What a page says of measurements: a table by kind and level, the figures, and what was left out."""

from dataclasses import dataclass
from typing import Any

from surefoot.errors import InputError
from surefoot.report import figures
from surefoot.report.drawing import Drawing
from surefoot.report.formats import MISSING, duration, is_number, mean_se, number, percent, plural
from surefoot.report.read import Table, known, listing, mapping

FORMAT, VERSION = "surefoot.measurements", 1

# (heading, what it means), in the order of the page.
GROUPS = {
    "exact": ("Exact", "Counted, without any rounding."),
    "proved": ("Verified bounds", "Every rounding error is counted: a proof may build on them."),
    "rounded": ("Exact up to rounding", "No approximation, but computed in floating point: they refute, never prove."),
    "estimate": ("Estimates", "The right size, without a guarantee: for choosing and comparing, not for proving."),
    "assumed": ("Assumed", "Somebody said so."),
}
_SIGNS = {"upper bound": "≤", "lower bound": "≥", "exact": "="}


@dataclass(frozen=True)
class Row:
    """A measurement as the table shows it."""

    name: str
    value: str
    kind: str
    how: str
    basis: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Measurements of one kind and level."""

    title: str
    meaning: str
    rows: list[Row]


@dataclass(frozen=True)
class Measured:
    """The measurements' part of a page."""

    subject: str
    groups: list[Group]
    drawings: list[Drawing]
    left_out: list[tuple[str, str, str]]
    notes: list[str]


def measured(document: dict[str, Any]) -> Measured | None:
    """Return what a page says of a document of format `surefoot.measurements`; None for an empty one.

    Raises:
        InputError: it is of another format or version, or a part of it makes no sense.
    """
    if not document:
        return None
    found = document.get("format"), document.get("version")
    if found != (FORMAT, VERSION):
        raise InputError(f"measurements: format is {found[0]!r} of version {found[1]!r}, not {FORMAT!r} of {VERSION}")
    entries = listing(document, "measurements")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"measurements[{i}]: expected an object, got {entry!r}; write what to_json gave")
    series = mapping(document, "series")
    subject = mapping(document, "subject")
    return Measured(
        subject=_subject(subject, document),
        groups=_groups(entries),
        drawings=[d for d in (_spectrum(series), _sharpness(series)) if d is not None],
        left_out=[_left_out(e) for e in listing(document, "left_out") if isinstance(e, dict)],
        notes=[str(note) for note in listing(document, "notes")],
    )


def measurements_page(document: dict[str, Any]) -> dict[str, Any]:
    """The template's variables for a document of format `surefoot.measurements` without a run."""
    subject = mapping(document, "subject")
    return {
        "kind": "measurements",
        "title": str(document.get("title") or "Untitled"),
        "status": "finished",
        "verdict": "",
        "message": "",
        "subject": [str(part) for part in listing(subject, "about")],
        "measured": measured(document),
    }


def _subject(subject: dict[str, Any], document: dict[str, Any]) -> str:
    """`Measured at the weights after step 938, in 41.2 s of the 60 s allowed.`"""
    said = f"Measured at {subject['weights']}" if subject.get("weights") else "Measured"
    if is_number(document.get("seconds")):
        said += f", in {duration(document['seconds'])}"
        if is_number(document.get("budget")):
            said += f" of the {duration(document['budget'])} allowed"
    return said + "."


def _groups(entries: list[dict[str, Any]]) -> list[Group]:
    found: dict[str, list[Row]] = {name: [] for name in GROUPS}
    for entry in entries:
        found[group_of(entry)].append(_row(entry))
    return [Group(*GROUPS[name], rows) for name, rows in found.items() if rows]


def group_of(entry: dict[str, Any]) -> str:
    """Return under which of `GROUPS` a measurement stands, by its kind and level."""
    kind = entry.get("kind")
    if kind in ("exact", "upper bound", "lower bound"):
        if entry.get("level") not in ("verified", "audited"):
            return "rounded"
        return "exact" if kind == "exact" else "proved"
    return "assumed" if kind == "assumed" else "estimate"


def value_text(entry: dict[str, Any]) -> str:
    """Return a measurement's value with its sign: `≥ 0.0123`, `≈ 3.41 ± 0.08`."""
    value, error = _finite(entry.get("value")), entry.get("error")
    text = number(value, 5)
    if entry.get("kind") == "estimate" and is_number(value) and is_number(error) and error > 0:
        text = mean_se(value, error)
    elif is_number(value) and value == int(value) and abs(value) < 1e15:
        text = number(int(value))
    unit = f" {entry['unit']}" if entry.get("unit") else ""
    return f"{_SIGNS.get(str(entry.get('kind')), '≈')} {text}{unit}"


def _row(entry: dict[str, Any]) -> Row:
    samples, level = entry.get("samples"), str(entry.get("level") or "")
    kind = str(entry.get("kind") or "estimate")
    basis = [f"n = {number(samples)}"] if samples is not None else []
    basis += [str(entry[key]) for key in ("dtype", "cost") if entry.get(key)]
    if entry.get("seed") is not None:
        basis.insert(1 if samples is not None else 0, f"seed {entry['seed']}")
    return Row(
        name=str(entry.get("name") or MISSING),
        value=value_text(entry),
        kind=f"{kind}, audited" if level == "audited" else kind,  # the group says the rest
        how=str(entry.get("how") or ""),
        basis=", ".join(basis),
        notes=tuple(str(note) for note in listing(entry, "notes")),
    )


def _finite(value: Any) -> Any:
    """The number that JSON holds, or the infinity that it holds as a word."""
    return float(value) if value in ("inf", "-inf") else value


def _left_out(entry: dict[str, Any]) -> tuple[str, str, str]:
    budget = entry.get("budget")
    return str(entry.get("what") or MISSING), str(entry.get("why") or ""), str(budget or MISSING)


def _spectrum(series: dict[str, Any]) -> Drawing | None:
    given = mapping(series, "spectrum")
    table = Table({"step": given.get("index"), "value": given.get("value")}, "series.spectrum")
    values = table.numbers("value")
    if not (values > 0).any():
        return None
    bound, total = _finite(given.get("bound")), given.get("total")
    samples, outputs = given.get("samples"), given.get("outputs")
    text = (
        f"The {plural(int(total or values.size), 'eigenvalue')} of K = JJᵀ, largest first, at {number(samples)} "
        f"samples of {number(outputs)} outputs each (computed in floating point)."
    )
    if is_number(bound):
        text += (
            " Dashed: the verified lower bound of the smallest."
            if bound > 0
            else " No positive lower bound of the smallest could be verified."
        )
    hidden = int((values <= 0).sum())
    if hidden:
        text += f" {plural(hidden, 'value')} at or below 0 cannot be drawn."
    label = f"Spectrum of the tangent Gram, {figures.describe(values)}"
    svg = figures.spectrum(table.numbers("step"), values, bound if is_number(bound) else None, label)
    return Drawing("fig-spectrum", "Spectrum of the tangent Gram", text, svg)


def _sharpness(series: dict[str, Any]) -> Drawing | None:
    given, limit = mapping(series, "sharpness"), mapping(series, "stability")
    table = Table({"step": given.get("step"), "value": given.get("value")}, "series.sharpness")
    line = Table({"step": limit.get("step"), "value": limit.get("value")}, "series.stability")
    values, bound = table.numbers("value"), line.numbers("value")
    if not (values > 0).any() or not known(bound).size:
        return None
    last = float(known(values)[-1])
    edge = limit["last"] if is_number(limit.get("last")) and limit["last"] > 0 else float(known(bound)[-1])
    text = (
        "Dots: the largest eigenvalue of the loss's Hessian at the checkpoints kept. Line: 2/h, with h the multiplier "
        "of the step; gradient descent on a quadratic is unstable above it. "
        f"The last dot stands at {percent(last / edge)} of 2/h = {number(float(edge))}, its median over the last steps."
    )
    label = f"Sharpness {number(last)} against 2/h = {number(float(edge))} at the end"
    svg = figures.sharpness(table.numbers("step"), values, line.numbers("step"), bound, label)
    return Drawing("fig-sharpness", "Sharpness against 2/h", text, svg)
