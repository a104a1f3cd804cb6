"""What a page says of a suggestion: the table of reasons, what speaks against it, and what was seen."""

from typing import Any

import numpy as np

from surefoot.report import figures
from surefoot.report.drawing import Drawing
from surefoot.report.formats import MISSING, duration, is_number, number, percent, plural
from surefoot.report.measured import measured
from surefoot.report.read import Table, known, listing, mapping
from surefoot.report.run_page import smoothness_drawing, tables


def suggestion_page(document: dict[str, Any]) -> dict[str, Any]:
    """The template's variables for a document of format `surefoot.suggestion`."""
    doubts = [str(doubt) for doubt in listing(document, "doubts")]
    probed = mapping(document, "smoothness")
    drawings = [smoothness_drawing(probed), *_along(document, probed)]
    return {
        "kind": "suggestion",
        "title": str(document.get("title") or "Untitled"),
        "status": "not sure" if doubts else "sure",
        "verdict": "",
        "message": "",
        "subject": [str(part) for part in listing(mapping(document, "subject"), "about")],
        "rows": reason_rows(document),
        "doubts": doubts,
        "cost": _cost(document),
        "others": [_other(o) for o in listing(document, "others") if isinstance(o, dict)],
        "drawings": [d for d in drawings if d is not None],
        "measured": _measured(document),
        "notes": [str(note) for note in listing(document, "notes")],
        "tables": tables(document, ("config", "data", "environment")),
    }


def reason_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return (name, value, interval, from, rule, source) of every number suggested, as text."""
    rows = []
    for reason in listing(document, "reasons"):
        if isinstance(reason, dict):
            low, high = reason.get("low"), reason.get("high")
            span = f"{number(low, 3)} to {number(high, 3)}" if is_number(low) and is_number(high) and low < high else ""
            words = (str(reason.get(key) or "") for key in ("constants", "rule", "source"))
            rows.append((str(reason.get("name") or MISSING), number(reason.get("value")), span, *words))
    return rows


def _cost(document: dict[str, Any]) -> str:
    cost, steps = document.get("cost"), document.get("steps")
    if not is_number(cost) or not is_number(steps) or steps < 1:
        return ""
    took = f" It took {duration(document['seconds'])}." if is_number(document.get("seconds")) else ""
    return f"Measuring took {plural(int(cost), 'gradient')}, {percent(cost / steps)} of a run of {number(steps)}.{took}"


def _other(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    gamma = entry.get("gamma")
    return (
        str(entry.get("rule") or MISSING),
        number(entry.get("lr"), 3),
        number(float(gamma) if gamma == "inf" else gamma, 3),
        str(entry.get("source") or ""),
    )


def _measured(document: dict[str, Any]) -> Any:
    entries = listing(document, "measurements")
    whole = {"format": "surefoot.measurements", "version": 1, "measurements": entries}
    return measured({**whole, "subject": {"weights": "the first steps of the run"}}) if entries else None


def _along(document: dict[str, Any], probed: dict[str, Any]) -> list[Drawing]:
    """L and h over the probing steps, each with the level that the suggestion takes from it."""
    series = Table(mapping(probed, "series"), "smoothness.series")
    step, out = series.numbers("step"), []
    for column, title, text, level, label in (
        (
            "smoothness",
            "Smoothness along the probing run",
            "L of each probing step. Dashed: the L that was taken.",
            document.get("L"),
            "L",
        ),
        (
            "h",
            "Steps of the probing run",
            "The multiplier h of each probing step, about 1/L. Dashed: the lr that is suggested.",
            mapping(document, "suggested").get("lr"),
            "lr",
        ),
    ):
        values = series.numbers(column)
        if known(values[values > 0] if values.size else values).size:
            guides = [figures.Guide(label, np.full(step.size, float(level)))] if is_number(level) and level > 0 else []
            said = f"{title}: {figures.describe(values)}"
            svg = figures.multiplier(step, values, guides, said, f"fig-probing-{column}")
            out.append(Drawing(f"fig-probing-{column}", title, text, svg))
    return out
