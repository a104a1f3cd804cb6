"""What is said of a certificate: on the page of its run, and in the terminal."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from surefoot.errors import InputError
from surefoot.report import figures
from surefoot.report.drawing import Drawing
from surefoot.report.formats import MISSING, is_number, number, percent, plural, quantity
from surefoot.report.measured import value_text
from surefoot.report.read import Table, listing, mapping

FORMAT, VERSION = "surefoot.certified", 1
Row = tuple[str, str, str]  # name, value, meaning

_OUTCOMES = {"proved": "PROVED", "refuted": "REFUTED", "undecided": "NOT PROVED"}
_NUMBERS = {
    "q": ("q", "β ρ/s₀², the Kantorovich number: the theorem needs q < (1 − ε)/2"),
    "epsilon": ("ε", "the part of the rate given up for longer steps"),
    "radius": ("radius", "an exact global minimum is no farther than this, and no path of steps is longer"),
    "sigma_star": (
        "σ*",
        "s_min(J) ≥ σ* on that ball; a step h multiplies ‖F − y‖ by at most 1 − (1 − ε) h σ*²",
    ),
    "sigma_min": ("s_min", "the features with the constant have full rank"),
    "infimum": ("infimum", "of the loss over the last layer"),
    "eta_max": ("eta_max", "the longest step on ½‖F − y‖² that is covered"),
}


@dataclass(frozen=True)
class Certified:
    """The certificate's part of a page."""

    outcome: str
    title: str
    conclusion: str
    groups: list[list[Row]]
    polished: str
    criteria: str
    short: list[tuple[str, str, str, str]]
    drawings: list[Drawing]
    folder: str
    notes: list[str]


def certified(document: dict[str, Any]) -> Certified | None:
    """Return what a page says of a document of format `surefoot.certified`; None for an empty one.

    Raises:
        InputError: it is of another format or version, or a part of it makes no sense.
    """
    if not document:
        return None
    found = document.get("format"), document.get("version")
    if found != (FORMAT, VERSION):
        raise InputError(f"certificate: format is {found[0]!r} of version {found[1]!r}, not {FORMAT!r} of {VERSION}")
    verdict = mapping(document, "verdict")
    conclusion = str(verdict.get("conclusion") or "")
    return Certified(
        outcome=str(verdict.get("outcome") or "undecided"),
        title=f"{outcome_text(verdict)}: {verdict.get('theorem') or 'no theorem'}",
        conclusion=str(document.get("statement") or conclusion),
        groups=certified_rows(document),
        polished=polished_text(document),
        criteria=criteria_text(document),
        short=[
            (str(f.get("outcome")), str(f.get("hypothesis")), str(f.get("reason") or ""), str(f.get("remedy") or ""))
            for f in _entries(verdict, "findings")
            if f.get("outcome") != "proved"
        ],
        drawings=_steps(mapping(document, "series"), document),
        folder=str(document.get("folder") or ""),
        notes=[str(note) for note in listing(document, "notes")],
    )


def certificate_page(document: dict[str, Any]) -> dict[str, Any]:
    """The template's variables for a document of format `surefoot.certified` without a run."""
    return {
        "kind": "certificate",
        "title": str(document.get("title") or "Untitled"),
        "status": "finished",
        "verdict": "",
        "message": "",
        "subject": [],
        "certified": certified(document),
    }


def outcome_text(verdict: dict[str, Any]) -> str:
    """`PROVED`, `NOT PROVED` or `REFUTED`."""
    return _OUTCOMES.get(str(verdict.get("outcome")), "NOT PROVED")


def certified_rows(document: dict[str, Any]) -> list[list[Row]]:
    """The rows of the certificate's table, in groups: what it is about, its constants, what follows."""
    verdict = mapping(document, "verdict")
    samples, rows, outputs = document.get("samples"), document.get("rows"), document.get("outputs")
    of_all = "all of them" if samples == rows else f"the first of {number(rows)}: no word of the others"
    layers = "the last dense layer on frozen features" if document.get("layers") == "last" else "all layers"
    polished = "then polished" if document.get("polishing") else ""
    about: list[Row] = [
        ("training rows", number(samples), of_all),
        ("outputs a row", number(outputs), f"loss {document.get('loss')}; {layers}"),
        (
            ("weights after step", number(document["step"]), polished)
            if document.get("step") is not None
            else ("weights", MISSING, "as the model came" + (f", {polished}" if polished else ""))
        ),
    ]
    constants = [
        (str(m.get("name")), value_text(m), str(m.get("how") or "")) for m in _entries(verdict, "measurements")
    ]
    follows: list[Row] = [
        (_NUMBERS[name][0], number(value), _NUMBERS[name][1])
        for name, value in mapping(verdict, "numbers").items()
        if name in _NUMBERS
    ]
    if is_number(document.get("lr_max")):
        follows.append(("lr_max", number(document["lr_max"]), f"the same in torch's mse: {document.get('rule')}"))
    return [group for group in (about, constants, follows) if group]


def polished_text(document: dict[str, Any]) -> str:
    """What polishing moved and what it did to what was held out; nothing where nothing was polished."""
    p = mapping(document, "polishing")
    if not p:
        return ""
    residual, held_out = listing(p, "residual"), listing(p, "held_out")
    moved, norm = p.get("distance"), p.get("norm")
    share = f" ({percent(moved / norm)} of their norm)" if is_number(moved) and is_number(norm) and norm > 0 else ""
    said = f"Polishing moved the weights by {number(moved)}{share}"
    if len(residual) == 2:
        said += f" and took ‖F − y‖ from {number(residual[0])} to {number(residual[1])}"
    if len(held_out) == 2:
        before, after = (quantity(v, bool(p.get("percent"))) for v in held_out)
        said += f"; {p.get('metric')} on {number(p.get('held_out_rows'))} rows went from {before} to {after}"
    return said + ". The certificate is about the polished weights, which it holds."


def criteria_text(document: dict[str, Any]) -> str:
    """Which published criteria would also have applied."""
    criteria = mapping(mapping(document, "verdict"), "criteria")
    if not criteria:
        return ""
    yes = "; ".join(k for k, v in criteria.items() if v) or "none"
    no = "; ".join(k for k, v in criteria.items() if not v) or "none"
    return f"On the same constants these criteria apply: {yes}. Not: {no}."


def _steps(given: dict[str, Any], document: dict[str, Any]) -> list[Drawing]:
    """The steps taken after the certificate, below what it guarantees."""
    table = Table(given, "certificate.series")
    if not table.rows:
        return []
    step = table.numbers("step")
    residual, envelope = table.numbers("residual"), table.numbers("envelope")
    distance, path = table.numbers("distance"), table.numbers("path")
    out = []
    if not figures.nothing_to_draw(residual):
        svg = figures.guaranteed(
            "fig-envelope",
            step,
            [("residual", residual, "series")],
            ("limit", envelope),
            True,
            f"Residual: {figures.describe(residual)}; guaranteed: {figures.describe(envelope)}",
        )
        text = (
            f"‖F − y‖ after each of the {plural(table.rows, 'step')} shown, and what the certificate and the length of "
            "the steps guarantee (dashed). A step above it would have stopped the run."
        )
        out.append(Drawing("fig-envelope", "Residual under its guarantee", text, svg))
    radius = mapping(mapping(document, "verdict"), "numbers").get("radius")
    if is_number(radius) and not figures.nothing_to_draw(distance):
        svg = figures.guaranteed(
            "fig-distance",
            step,
            [("path", path, "arm-1"), ("distance", distance, "series")],
            ("radius", np.full(table.rows, float(radius))),
            False,
            f"Distance: {figures.describe(distance)}; radius {number(float(radius))}",
        )
        text = (
            "How far the weights are from those of the certificate, how long the path there was, and the radius that "
            "neither leaves (dashed)."
        )
        out.append(Drawing("fig-distance", "Distance under the certified radius", text, svg))
    return out


def _entries(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = listing(document, key)
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(
                f"certificate.verdict.{key}[{i}]: expected an object, got {entry!r}; write what to_json gave"
            )
    return entries
