"""What the page of one run says, part by part; the template only lays it out."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from surefoot.report import figures, rules
from surefoot.report.certified import certified
from surefoot.report.drawing import Drawing
from surefoot.report.explored import explored
from surefoot.report.figures import REGIMES
from surefoot.report.formats import (
    MISSING,
    anything,
    duration,
    is_number,
    number,
    ordinal,
    percent,
    plural,
    quantity,
    words,
)
from surefoot.report.measured import measured
from surefoot.report.read import Table, count, known, listing, mapping

_VERDICTS = {
    "interrupted": "was interrupted.",
    "diverged": "diverged.",
    "running": "is still going: these are the numbers so far.",
    "failed": "failed.",
}


@dataclass(frozen=True)
class Segment:
    """A regime's part of the stacked bar, in percent of its width."""

    regime: str
    start: float
    width: float
    count: str
    share: str


def run_page(document: dict[str, Any]) -> dict[str, Any]:
    """The template's variables for a document of format `surefoot.run`."""
    config = mapping(document, "config")
    series = Table(mapping(document, "series"), "series")
    rule = rules.read_rule(config, series)
    counts = {regime: count(mapping(document, "regimes").get(regime)) for regime in REGIMES}
    summary = mapping(document, "summary")
    sentence = rules.regime_sentence(rule, counts)
    if not series.rows and not sum(counts.values()) and count(summary.get("steps")):
        sentence = "The regimes of the steps were not recorded."
    return {
        **frame(document, "run"),
        "kind": "run report",
        "rule": rule,
        "hero": _primary(summary),
        "tiles": _tiles(summary),
        "segments": segments(counts),
        "regime_label": ", ".join(f"{regime} {n:,}" for regime, n in counts.items()),
        "regime_title": _regime_title(sum(counts.values()), " of exploration" if document.get("explored") else ""),
        "sentence": sentence,
        "reading": _reading(document, series.rows),
        "learning": _learning(document, series),
        "stepping": _stepping(series, rule),
        "smoothness": smoothness_drawing(mapping(document, "smoothness")),
        "certified": certified(mapping(document, "certificate")),
        "explored": explored(mapping(document, "explored")),
        "measured": measured(mapping(document, "measurements")),
        "definitions": rules.definitions(rule),
        "tables": tables(document, ("config", "telemetry", "data", "model", "environment")),
    }


def _regime_title(total: int, of: str) -> str:
    if total < 2:
        return "Which regime the step was in" if total else "Regimes of the steps"
    return f"Which regime the {total:,} steps{of} were in"


def frame(document: dict[str, Any], what: str) -> dict[str, Any]:
    """What the pages of a run and of a comparison (`what`) share: title, status, what was trained, notes."""
    status = str(document.get("status") or "unknown")
    return {
        "title": str(document.get("title") or "Untitled"),
        "status": status,
        "verdict": f"This {what} {_VERDICTS[status]}" if status in _VERDICTS else "",
        "message": str(document.get("message") or ""),
        "subject": _subject(document),
        "notes": [str(note) for note in listing(document, "notes")],
    }


def tables(document: dict[str, Any], keys: tuple[str, ...]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The document's flat parts as tables of (name, value)."""
    titles = {"config": "Configuration", "model": "Network"}
    out = []
    for key in keys:
        rows = [(words(name), anything(value)) for name, value in mapping(document, key).items() if name != "notes"]
        if rows:
            out.append((titles.get(key, key.capitalize()), rows))
    return out


def segments(counts: dict[str, Any]) -> list[Segment]:
    """The stacked bar of counts or fractions. What happened at all is wide enough to be seen."""
    values = {regime: max(float(v), 0.0) if is_number(v := counts.get(regime)) else 0.0 for regime in REGIMES}
    total = sum(values.values())
    if not total:
        return []
    widths = {regime: max(value / total, 0.006) if value else 0.0 for regime, value in values.items()}
    out, start = [], 0.0
    for regime, value in values.items():
        width = 100 * widths[regime] / sum(widths.values())
        out.append(Segment(regime, start, width, f"{value:,.0f}", percent(value / total)))
        start += width
    return out


def _subject(document: dict[str, Any]) -> list[str]:
    """`mlp, 52,650 parameters`; `digits (classification)`; `1,437 training rows, 360 test rows`; `8×8 → 10`."""
    data, model = mapping(document, "data"), mapping(document, "model")
    out = []
    if model.get("name"):
        size = f", {number(model['parameters'])} parameters" if model.get("parameters") is not None else ""
        out.append(f"{model['name']}{size}")
    if data.get("name"):
        task = f" ({data['task']})" if data.get("task") else ""
        out.append(f"{data['name']}{task}")
    rows = [
        f"{number(data[key])} {name} rows"
        for key, name in (("train_rows", "training"), ("test_rows", "test"))
        if data.get(key) is not None
    ]
    if rows:
        out.append(", ".join(rows))
    shape = data.get("input_shape")
    if isinstance(shape, list) and data.get("outputs") is not None:
        out.append(f"{'×'.join(str(n) for n in shape) or 'scalar'} in, {number(data['outputs'])} out")
    return out


def _primary(summary: dict[str, Any]) -> dict[str, str] | None:
    primary = mapping(summary, "primary")
    if not primary:
        return None
    higher = primary.get("higher_is_better")
    direction = "higher is better" if higher is True else "lower is better" if higher is False else ""
    return {
        "name": words(primary.get("name") or "metric"),
        "value": quantity(primary.get("value"), bool(primary.get("percent"))),
        "hint": direction,
    }


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, small print)."""
    primary = mapping(summary, "primary")
    shown = {words(primary.get("name")), words(primary.get("column"))}
    epochs = summary.get("epochs")
    tiles = [
        ("final train loss", number(summary.get("train_loss")), ""),
        ("steps", number(summary.get("steps")), f"{number(epochs)} epochs" if epochs is not None else ""),
        ("time", duration(summary.get("seconds")), ""),
        ("rows per second", number(summary.get("rows_per_second"), 3), ""),
    ]
    for name, value in mapping(summary, "evaluation").items():
        if words(name) not in shown:
            tiles.insert(1, (words(name), quantity(value, _is_share(name)), ""))
    return [tile for tile in tiles if tile[1] != MISSING or tile[0] in ("final train loss", "steps")]


def _is_share(name: str) -> bool:
    return "accuracy" in words(name).split()


def _learning(document: dict[str, Any], series: Table) -> list[Drawing]:
    out: list[Drawing] = []
    step, values = series.numbers("step"), series.numbers("loss")
    text, switch = "The loss on each step's batch.", None
    last = Table(mapping(mapping(document, "explored"), "series"), "explored.series")
    if last.rows:
        step = np.concatenate([step, last.numbers("step")])
        values = np.concatenate([values, last.numbers("loss")])
        switch = float(last.numbers("step")[0])
        text += " From the line on the last layer alone is trained, and it is the loss of all rows."
    if values.size:
        label = f"Loss: {figures.describe(values)}"
        svg = "" if figures.nothing_to_draw(values) else figures.loss(step, values, label, switch)
        out.append(Drawing("fig-loss", "Training loss", _caption(svg, text), svg))
    evals = Table(mapping(document, "evals"), "evals")
    panels = []
    for name in evals.names():
        column = evals.numbers(name) if name not in ("step", "epoch") else evals.numbers("")
        if known(column).size:
            panels.append(figures.Panel(words(name), evals.numbers("step"), column, _is_share(name)))
    if panels:
        label = "; ".join(f"{p.title}: {figures.describe(p.values)}" for p in panels)
        svg = figures.evaluations(panels, f"Evaluation: {label}")
        caption = f"Measured {plural(evals.rows, 'time')} during training; the last value stands at the end."
        out.append(Drawing("fig-evals", "Evaluation", caption, svg))
    return out


def _stepping(series: Table, rule: rules.Rule) -> list[Drawing]:
    if not series.rows:
        return []
    step = series.numbers("step")
    return [_norm(step, series, rule), _multiplier(step, series, rule), _length(step, series, rule)]


def _norm(step: figures.Array, series: Table, rule: rules.Rule) -> Drawing:
    norm = series.numbers("grad_norm")
    guides = rules.norm_guides(rule, series)
    regimes = [r if r in REGIMES else None for r in series.raw("regime")] if guides else []
    if not any(regimes):
        regimes = []
    if not guides:
        text = "The norm of each step's gradient. This run had no threshold."
    elif rule.kind in ("clip", "wrapped"):
        lines = "γ, and γ/δ, where the floor takes over" if rule.has_floor else "γ"
        text = f"The norm of each step's gradient. Dashed: the threshold {lines}; the tint shows the regime of a norm."
    else:
        text = f"The norm of each step's gradient. {rule.threshold} plays the part of the threshold (dashed)."
    if regimes:
        text += " The strip below shows the share of each regime along the run."
    svg = ""
    if not figures.nothing_to_draw(norm):
        svg = figures.gradient_norm(step, norm, guides, regimes, f"Gradient norm: {figures.describe(norm)}")
    shown = {"unclipped", "clipped", *(("floored",) if rule.has_floor else ()), *(r for r in regimes if r)}
    legend = tuple(r for r in REGIMES if r in shown) if guides and svg else ()
    return Drawing("fig-norm", "Gradient norm", _caption(svg, text), svg, legend)


def _multiplier(step: figures.Array, series: Table, rule: rules.Rule) -> Drawing:
    values, guides = rules.multiplier(rule, series)
    between = "between ηδ and η" if rule.has_floor else "at most η"
    text = {
        "clip": f"h = {rule.formula.removeprefix('h = ')}, {between}.",
        "wrapped": f"η times what the gradient was multiplied by before {rule.title} saw it: {between}.",
        "normalized": f"{rule.formula}: at most η/β, and half of that where ‖g‖ = β.",
        "smooth": f"{rule.formula}: at most η/L₀, and half of that where ‖g‖ = L₀/L₁.",
        "plain": "Without a threshold it is the learning rate itself.",
    }[rule.kind]
    svg = ""
    if not figures.nothing_to_draw(values):
        svg = figures.multiplier(step, values, guides, f"Multiplier h: {figures.describe(values)}")
    return Drawing("fig-multiplier", "Multiplier h", _caption(svg, text), svg)


def _length(step: figures.Array, series: Table, rule: rules.Rule) -> Drawing:
    values, guides = series.numbers("step_length"), rules.length_guides(rule, series)
    guides = [guide for guide in guides if known(guide.values).size]
    text = "How far each step moved the weights."
    if guides:
        text += {
            "clip": " A clipped step has length ηγ (dashed).",
            "normalized": " No step is longer than η (dashed).",
            "smooth": " No step is longer than η/L₁ (dashed).",
        }[rule.kind]
    elif rule.kind == "clip" and rule.momentum:
        text += " Momentum adds earlier steps to it."
    svg = ""
    if not figures.nothing_to_draw(values):
        svg = figures.step_length(step, values, guides, f"Step length: {figures.describe(values)}")
    return Drawing("fig-step-length", "Step length", _caption(svg, text), svg)


def smoothness_drawing(probed: dict[str, Any]) -> Drawing | None:
    """What the smoothness probe saw; None where there was none."""
    if not probed:
        return None
    series, fit = Table(mapping(probed, "series"), "smoothness.series"), mapping(probed, "fit")
    norm, values = series.numbers("grad_norm"), series.numbers("smoothness")
    constants = {name: mapping(fit, name) for name in ("L0", "L1")}
    found = [m.get("value") for m in constants.values()]
    line = (float(found[0]), float(found[1])) if is_number(found[0]) and is_number(found[1]) else None
    text = (
        "How much the gradient changed along a step, for each unit of length, against its norm: both before clipping, "
        "on the batch of that step. The later the step, the stronger the dot."
    )
    if line is not None:
        L0, L1 = (_constant(symbol, m) for symbol, m in zip(("L₀", "L₁"), constants.values()))
        text += (
            f" Dashed: the line L₀ + L₁‖g‖ below which {percent(fit.get('quantile'))} of them lie, once corrected for "
            f"the length of the steps, {L0} and {L1}: estimates, no certificate. In a word, {fit.get('decision')}: "
            f"{fit.get('advice')}."
        )
    elif probed.get("message"):
        text += f" No line was fitted: {probed['message']}."
    svg = ""
    if ((norm > 0) & (values > 0)).any():
        svg = figures.smoothness(norm, values, line, f"Smoothness: {figures.describe(values)}")
    return Drawing("fig-smoothness", "Smoothness against gradient norm", _caption(svg, text), svg)


def _constant(symbol: str, measured: dict[str, Any]) -> str:
    """`L₀ = 0.91 (0 to 2.7)`."""
    interval = mapping(measured, "details").get("interval")
    ends = (
        f" ({number(interval[0])} to {number(interval[1])})"
        if isinstance(interval, list) and len(interval) == 2
        else ""
    )
    return f"{symbol} = {number(measured.get('value'))}{ends}"


def _caption(svg: str, text: str) -> str:
    return text if svg else f"{text} Nothing to draw: no finite value was recorded."


def _reading(document: dict[str, Any], drawn: int) -> str:
    """How to read the lines: which steps they show, and what is thin and bold."""
    series = mapping(document, "series")
    stride = count(series.get("stride"))
    rows = count(series.get("rows")) or count(mapping(document, "summary").get("steps"))
    said = [f"Every {ordinal(stride)} of {plural(rows, 'step')} is shown."] if stride > 1 else []
    window = figures.median_window(drawn)
    if window > 1:
        said.append(f"Thin lines show every point, bold lines the running median over {window} of them.")
    return " ".join(said)
