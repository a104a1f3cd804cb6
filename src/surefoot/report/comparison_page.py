"""What the page of a comparison says, part by part; the template only lays it out."""

import math
from dataclasses import dataclass
from typing import Any

from surefoot.errors import InputError
from surefoot.report import figures
from surefoot.report.drawing import Drawing
from surefoot.report.formats import anything, duration, is_number, mean_se, number, plural, words
from surefoot.report.read import Table, known, listing, mapping
from surefoot.report.run_page import Segment, frame, segments, tables


@dataclass(frozen=True)
class Metric:
    """What the arms are ranked by."""

    name: str
    higher_is_better: bool
    percent: bool


@dataclass(frozen=True)
class Arm:
    """One optimizer's row: texts for the table, numbers for the ranking."""

    index: int
    name: str
    settings: str
    seeds: int
    failed: tuple[tuple[str, str], ...]
    mean: float | None
    se: float | None
    metric: str
    train_loss: str
    seconds: str
    segments: list[Segment]
    shares: str


@dataclass(frozen=True)
class Headline:
    """The result in a sentence, and how far to trust it."""

    index: int | None
    best: str
    value: str
    text: str


def comparison_page(document: dict[str, Any]) -> dict[str, Any]:
    """The template's variables for a document of format `surefoot.comparison`."""
    given = mapping(document, "metric")
    metric = Metric(
        words(given.get("name") or "metric"), given.get("higher_is_better") is not False, bool(given.get("percent"))
    )
    entries = listing(document, "arms")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"arms[{i}]: expected an object, got {entry!r}; give every arm as {{'name': ..., ...}}")
    arms = [_arm(i, entry, metric) for i, entry in enumerate(entries)]
    return {
        **frame(document, "comparison"),
        "kind": "comparison",
        "metric": metric,
        "arms": arms,
        "any_failed": any(arm.failed for arm in arms),
        "any_regimes": any(arm.segments for arm in arms),
        "headline": headline(arms, metric),
        "curves": _curves(entries, metric),
        "colours": figures.ARM_COLOURS,
        "tables": tables(document, ("config", "data", "model", "environment")),
    }


def headline(arms: list[Arm], metric: Metric) -> Headline:
    """Which arm is best, and whether its lead exceeds the combined standard error."""
    ranked = [arm for _, arm in sorted(_ranks(arms, metric), key=lambda pair: pair[0])]
    if not ranked:
        return Headline(None, "", "", f"No arm ended with a value of {metric.name}.")
    best = ranked[0]
    said = []
    if best.failed:
        verb = "is" if len(best.failed) == 1 else "are"
        said.append(f"{len(best.failed)} of its {plural(best.seeds, 'seed')} failed and {verb} not in the mean.")
    if len(ranked) == 1:
        others = "it is the only arm" if len(arms) == 1 else "no other arm ended with a value"
        said.insert(0, f"There is nothing to compare it with: {others}.")
    else:
        said.insert(0, _lead(best, ranked[1], metric))
    return Headline(best.index, best.name, best.metric, " ".join(said))


def _ranks(arms: list[Arm], metric: Metric) -> list[tuple[float, Arm]]:
    """Arms with a value, each with the number to sort by: the least is the best."""
    return [(-arm.mean if metric.higher_is_better else arm.mean, arm) for arm in arms if arm.mean is not None]


def _lead(best: Arm, second: Arm, metric: Metric) -> str:
    """How far ahead the best is of the runner-up, said honestly."""
    assert best.mean is not None
    assert second.mean is not None
    gap = abs(best.mean - second.mean)
    lead = f"The runner-up is {second.name} with {second.metric}"
    if best.se is None or second.se is None:
        return (
            f"{lead}, {_amount(gap, metric)} behind. Without several seeds of both there is no standard error: "
            "whether that is more than chance cannot be said."
        )
    combined = math.hypot(best.se, second.se)
    few = min(best.seeds - len(best.failed), second.seeds - len(second.failed))
    rough = f" With {plural(few, 'seed')} a standard error is itself rough." if 0 < few < 5 else ""
    if gap <= combined:
        return (
            f"{lead}. The difference of {_amount(gap, metric)} does not exceed the combined standard error of "
            f"{_amount(combined, metric)}: these seeds do not tell the two apart."
        )
    strength = "more than twice over" if gap > 2 * combined else "though by less than a factor of two"
    return (
        f"{lead}. The difference of {_amount(gap, metric)} exceeds the combined standard error of "
        f"{_amount(combined, metric)}, {strength}.{rough}"
    )


def _amount(difference: float, metric: Metric) -> str:
    return f"{number(100 * difference, 2)} percentage points" if metric.percent else number(difference, 2)


def _arm(index: int, entry: dict[str, Any], metric: Metric) -> Arm:
    failed = []
    for failure in listing(entry, "failed"):
        failure = failure if isinstance(failure, dict) else {"seed": failure}
        failed.append((anything(failure.get("seed")), str(failure.get("message") or "no message")))
    seeds = {anything(seed) for seed in listing(entry, "seeds")} | {seed for seed, _ in failed}
    value, train, seconds = mapping(entry, "metric"), mapping(entry, "train_loss"), mapping(entry, "seconds")
    mean, se = (value.get(key) if is_number(value.get(key)) else None for key in ("mean", "se"))
    bar = segments(mapping(entry, "regimes"))
    return Arm(
        index=index,
        name=str(entry.get("name") or f"arm {index + 1}"),
        settings=", ".join(f"{words(k)} {_setting(v)}" for k, v in mapping(entry, "settings").items()),
        seeds=len(seeds),
        failed=tuple(failed),
        mean=mean,
        se=se,
        metric=mean_se(value.get("mean"), value.get("se"), metric.percent),
        train_loss=mean_se(train.get("mean"), train.get("se")),
        seconds=duration(seconds.get("mean")),
        segments=bar,
        shares=", ".join(f"{segment.regime} {segment.share}" for segment in bar if segment.width),
    )


def _setting(value: Any) -> str:
    return number(value) if isinstance(value, float) else anything(value)


def _curves(entries: list[dict[str, Any]], metric: Metric) -> list[Drawing]:
    out = []
    for figure_id, key, mean, se, title in (
        ("fig-loss", "curves", "loss_mean", "loss_se", "Training loss"),
        ("fig-metric", "eval_curves", "mean", "se", metric.name.capitalize()),
    ):
        curves = []
        for i, entry in enumerate(entries):
            table = Table(mapping(entry, key), f"arms[{i}].{key}")
            if known(table.numbers(mean)).size:
                curves.append(figures.Curve(i, table.numbers("step"), table.numbers(mean), table.numbers(se)))
        if not curves:
            continue
        label = "; ".join(f"{entries[c.arm].get('name')}: {figures.describe(c.mean)}" for c in curves)
        text = "Mean over the seeds"
        text += ", within one standard error either side." if any(known(c.se).size for c in curves) else "."
        as_percent = metric.percent and figure_id == "fig-metric"
        svg = figures.arms(figure_id, curves, as_percent, f"{title}: {label}")
        out.append(Drawing(figure_id, title, text, svg))
    return out
