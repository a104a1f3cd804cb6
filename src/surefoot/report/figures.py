"""The figures, one function each: numbers to inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surefoot.report.axes import (
    TEXT,
    Box,
    corners,
    edge_labels,
    log_x_axis,
    quiet,
    running_median,
    spans_a_decade,
    step_axis,
    value_axis,
)
from surefoot.report.formats import number, quantity
from surefoot.report.read import Array, known
from surefoot.report.svg import ARM_COLOURS, COMPACT, WIDE, colour, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REGIMES = ("unclipped", "clipped", "floored", "skipped")

# A median line is drawn over a cloud of at least this many points; below, the points are a line already.
_CLOUD = 200
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_CURVE_POINTS = 600
_AGES = (0.2, 0.35, 0.5, 0.7, 1.0)  # opacity of dots, from the first fifth of a run to the last


@dataclass(frozen=True)
class Guide:
    """A reference line that may move: its label and its value at every step, NaN where there is none."""

    label: str
    values: Array  # (rows,)


@dataclass(frozen=True)
class Panel:
    """One evaluation curve."""

    title: str
    step: Array
    values: Array
    as_percent: bool


@dataclass(frozen=True)
class Curve:
    """One arm's mean and standard error over its seeds."""

    arm: int
    step: Array
    mean: Array
    se: Array


def median_window(rows: int) -> int:
    """Over how many drawn points the bold line takes its median; 1 where it is the curve itself."""
    return 1 if rows < _CLOUD else 2 * (rows // 120) + 1


def loss(step: Array, values: Array, label: str, switch: float | None = None) -> str:
    """Training loss over the steps; log scale where it spans a decade; a line where another phase begins."""

    def paint(figure: "Figure", compact: bool) -> None:
        axes = _single(figure, compact)
        _curve(axes, step, values)
        value_axis(axes, values, log=spans_a_decade(known(values)))
        step_axis(axes, step, compact)
        if switch is not None:
            axes.axvline(switch, color=colour("guide"), linewidth=1.2, linestyle=(0, (5, 3)))

    return draw("fig-loss", label, paint, wide=280, compact=250)


def evaluations(panels: Sequence[Panel], label: str) -> str:
    """A panel for every evaluated quantity, two or three abreast where there is room."""
    columns = len(panels) if len(panels) <= 3 else 2 if len(panels) == 4 else 3

    def paint(figure: "Figure", compact: bool) -> None:
        abreast = 1 if compact else columns
        across = (COMPACT if compact else WIDE) / abreast
        for i, panel in enumerate(panels):
            left, right = (54, 58) if compact else (58, 72)
            box = Box(across * (i % abreast) + left, 240 * (i // abreast) + 36, across - left - right, 160)
            axes = box.add_to(figure)
            quiet(axes)
            plain = "".join(c if c.isprintable() else " " for c in panel.title)
            axes.annotate(
                plain,
                (0, 1),
                xycoords="axes fraction",
                xytext=(0, 16),
                textcoords="offset points",
                fontsize=TEXT + 0.5,
                fontweight="bold",
                color=colour("ink"),
            )
            _plot(axes, panel.step, panel.values, markers=panel.values.size <= 60)
            log = not panel.as_percent and spans_a_decade(known(panel.values))
            value_axis(axes, panel.values, log=log, as_percent=panel.as_percent)
            step_axis(axes, panel.step, compact or abreast > 1)
            last = known(panel.values)[-1]
            edge_labels(axes, [(float(last), quantity(float(last), panel.as_percent), "series")])

    return draw("fig-evals", label, paint, wide=240 * -(-len(panels) // columns), compact=240 * len(panels))


def gradient_norm(step: Array, norm: Array, guides: Sequence[Guide], regimes: Sequence[str | None], label: str) -> str:
    """The norm on a log scale, its thresholds, what lies between them shaded, and the regimes in a strip below.

    Args:
        step: the steps shown.
        norm: their gradient norms.
        guides: none, or the threshold, or the threshold and the norm at which the floor takes over.
        regimes: the regime of every step shown; empty draws no strip.
        label: what a screen reader says.
    """

    def paint(figure: "Figure", compact: bool) -> None:
        strip = 14 if regimes else 0
        axes = _single(figure, compact, below=strip + 8 if strip else 0)
        value_axis(axes, norm, log=True, include=_levels(guides))
        step_axis(axes, step, compact)
        if guides:
            _shade(axes, step, guides)
        _curve(axes, step, norm)
        _guides(axes, step, guides)
        if strip:
            box = axes.get_position()
            height = 72 * figure.get_size_inches()[1]
            low = box.y0 - (strip + 8) / height
            band = figure.add_axes((box.x0, low, box.width, strip / height), sharex=axes)
            _regime_strip(band, step, regimes)
            axes.tick_params(axis="x", length=0, labelbottom=False)
            axes.set_xlabel("")
            step_axis(band, step, compact)

    return draw("fig-norm", label, paint, wide=320, compact=300)


def multiplier(
    step: Array, values: Array, guides: Sequence[Guide], label: str, figure_id: str = "fig-multiplier"
) -> str:
    """The factor between gradient and step, or another positive number, with the lines that bound it."""

    def paint(figure: "Figure", compact: bool) -> None:
        axes = _single(figure, compact)
        value_axis(axes, values, log=True, include=_levels(guides))
        step_axis(axes, step, compact)
        _curve(axes, step, values)
        _guides(axes, step, guides)

    return draw(figure_id, label, paint, wide=260, compact=250)


def step_length(step: Array, values: Array, guides: Sequence[Guide], label: str) -> str:
    """How far each step moved; log scale where that spans a decade."""

    def paint(figure: "Figure", compact: bool) -> None:
        axes = _single(figure, compact)
        found = known(values)
        value_axis(axes, values, log=spans_a_decade(found[found > 0]), include=_levels(guides))
        step_axis(axes, step, compact)
        _curve(axes, step, values)
        _guides(axes, step, guides)

    return draw("fig-step-length", label, paint, wide=260, compact=250)


def smoothness(norm: Array, values: Array, line: tuple[float, float] | None, label: str) -> str:
    """Smoothness against gradient norm, both on log scales, the later a step the stronger its dot.

    Args:
        norm: of the gradient, by step.
        values: the smoothness; only pairs of positive numbers are drawn, and there is one at least.
        line: L0 and L1 of the fitted line; None draws none.
        label: what a screen reader says.
    """
    shown = (norm > 0) & (values > 0)
    norm, values = norm[shown], values[shown]

    def paint(figure: "Figure", compact: bool) -> None:
        axes = _single(figure, compact)
        log_x_axis(axes, norm, compact, "gradient norm")
        ends = [] if line is None else [v for n in axes.get_xlim() if (v := line[0] + line[1] * n) > 0]
        value_axis(axes, values, log=True, include=ends)
        for some, alpha in zip(np.array_split(np.arange(norm.size), len(_AGES)), _AGES):
            axes.plot(
                norm[some],
                values[some],
                color=colour("series"),
                alpha=alpha,
                linestyle="none",
                marker="o",
                markersize=5.5,
                mew=0,
            )
        if ends and line is not None:
            x = np.geomspace(*axes.get_xlim(), 60)
            axes.plot(x, line[0] + line[1] * x, color=colour("guide"), linewidth=1.4, linestyle=(0, (5, 3)))
            edge_labels(axes, [(float(line[0] + line[1] * x[-1]), "line", "guide")])

    return draw("fig-smoothness", label, paint, wide=320, compact=300)


def arms(figure_id: str, curves: Sequence[Curve], as_percent: bool, label: str) -> str:
    """The arms' curves over one another, each within a band of one standard error either side."""
    curves = [_thinned(curve) for curve in curves]

    def paint(figure: "Figure", compact: bool) -> None:
        axes = _single(figure, compact)
        means = np.concatenate([known(c.mean) for c in curves])
        log = not as_percent and spans_a_decade(means)
        bands = [(np.fmin(c.mean, c.mean - c.se), np.fmax(c.mean, c.mean + c.se)) for c in curves]
        seen = means if log else np.concatenate([means, *(known(b) for pair in bands for b in pair)])
        value_axis(axes, seen, log=log, as_percent=as_percent)
        step_axis(axes, np.concatenate([c.step for c in curves]), compact)
        floor = axes.get_ylim()[0] if log else -np.inf
        for curve, (low, high) in zip(curves, bands):
            hue = colour(f"arm-{curve.arm % ARM_COLOURS}")
            axes.fill_between(curve.step, np.fmax(low, floor), high, color=hue, alpha=0.18, linewidth=0)
        for curve in curves:
            _plot(
                axes,
                curve.step,
                curve.mean,
                hue=f"arm-{curve.arm % ARM_COLOURS}",
                width=1.7,
                dashes=_DASHES[curve.arm // ARM_COLOURS % len(_DASHES)],
                markers=curve.mean.size <= 20,
            )

    return draw(figure_id, label, paint, wide=320, compact=290)


def spectrum(index: Array, values: Array, bound: float | None, label: str) -> str:
    """Eigenvalues, largest first, on a log scale, with a lower bound of the smallest as a line.

    Args:
        index: 1 for the largest.
        values: those that are not positive are not drawn.
        bound: drawn where it is positive; None where nothing is known.
        label: what a screen reader says.
    """
    shown = np.where(values > 0, values, np.nan)
    guides = [Guide("bound", np.full(index.size, bound))] if bound is not None and bound > 0 else []

    def paint(figure: "Figure", compact: bool) -> None:
        axes = _single(figure, compact)
        value_axis(axes, np.concatenate([shown, *(g.values for g in guides)]), log=True)
        step_axis(axes, index, compact, "eigenvalue, largest first")
        _plot(axes, index, shown, markers=shown.size <= 60)
        _guides(axes, index, guides)

    return draw("fig-spectrum", label, paint, wide=300, compact=270)


def sharpness(step: Array, values: Array, along: Array, limit: Array, label: str) -> str:
    """Sharpness at some steps as dots, and 2/h along the run as a line."""

    def paint(figure: "Figure", compact: bool) -> None:
        axes = _single(figure, compact)
        seen = known(np.concatenate([values, limit]))
        value_axis(axes, seen, log=spans_a_decade(seen[seen > 0]))
        step_axis(axes, np.concatenate([step, along]), compact)
        _plot(axes, along, limit, hue="guide", width=0.9)
        _plot(axes, step, values, markers=True)
        edge_labels(axes, [(float(known(limit)[-1]), "2/h", "guide")])

    return draw("fig-sharpness", label, paint, wide=280, compact=260)


def guaranteed(
    figure_id: str,
    step: Array,
    curves: Sequence[tuple[str, Array, str]],
    limit: tuple[str, Array],
    log: bool,
    label: str,
) -> str:
    """Curves below a limit that they must not cross.

    Args:
        figure_id: of the figure.
        step: the steps shown.
        curves: label, values and colour variable of each.
        limit: label and values of the limit, dashed.
        log: on a log scale where they span a decade, else from 0.
        label: what a screen reader says.
    """

    def paint(figure: "Figure", compact: bool) -> None:
        axes = _single(figure, compact)
        seen = known(np.concatenate([limit[1], *(values for _, values, _ in curves)]))
        value_axis(axes, seen if log else np.append(seen, 0.0), log=log and spans_a_decade(seen[seen > 0]))
        step_axis(axes, step, compact)
        axes.plot(step, limit[1], color=colour("guide"), linewidth=1.4, linestyle=(0, (5, 3)))
        for _, values, hue in curves:
            _plot(axes, step, values, hue=hue, markers=values.size <= 60)
        ends = [(float(known(v)[-1]), name, hue) for name, v, hue in curves if known(v).size]
        edge_labels(axes, [*ends, (float(known(limit[1])[-1]), limit[0], "guide")] if known(limit[1]).size else ends)

    return draw(figure_id, label, paint, wide=300, compact=270)


def _single(figure: "Figure", compact: bool, below: float = 0) -> "Axes":
    """One pair of axes that fills the figure, with room for tick labels and for labels at the right edge."""
    height = 72 * figure.get_size_inches()[1]
    left, right = (50, 40) if compact else (54, 56)
    axes = Box(left, 18, (COMPACT if compact else WIDE) - left - right, height - 18 - 42 - below).add_to(figure)
    quiet(axes)
    return axes


def _curve(axes: "Axes", step: Array, values: Array) -> None:
    """Every point, thin; and where they are many, their running median on top."""
    window = median_window(values.size)
    if window == 1:
        _plot(axes, step, values, markers=values.size <= 60)
        return
    _plot(axes, step, values, width=0.8, alpha=0.45)
    found = np.isfinite(values)
    if found.sum() >= window:
        axes.plot(step[found], running_median(values[found], window), color=colour("series"), linewidth=2)


def _plot(
    axes: "Axes",
    step: Array,
    values: Array,
    *,
    hue: str = "series",
    width: float = 1.8,
    alpha: float | None = None,
    dashes: str | tuple[int, tuple[float, ...]] = "solid",
    markers: bool = False,
) -> None:
    """A line that breaks at missing values; a point alone between two of them is a dot."""
    axes.plot(step, values, color=colour(hue), linewidth=width, alpha=alpha, linestyle=dashes)
    found = np.concatenate([[False], np.isfinite(values), [False]])
    alone = found[1:-1] & ~found[:-2] & ~found[2:]
    dots = found[1:-1] if markers else alone
    if dots.any():
        axes.plot(
            step[dots],
            values[dots],
            color=colour(hue),
            linestyle="none",
            marker="o",
            markersize=4.5,
            mew=0,
            clip_on=False,
        )


def _levels(guides: Sequence[Guide]) -> list[float]:
    """The lowest and highest level of every guide."""
    levels = [known(guide.values) for guide in guides]
    return [float(edge(level)) for level in levels if level.size for edge in (np.min, np.max)]


def _guides(axes: "Axes", step: Array, guides: Sequence[Guide]) -> None:
    for guide in guides:
        x, y = corners(step, guide.values)
        if x.size == 1:
            x, y = np.array(axes.get_xlim()), np.repeat(y, 2)
        axes.plot(x, y, color=colour("guide"), linewidth=1.2, linestyle=(0, (5, 3)))
    last = [(float(known(g.values)[-1]), g.label, "guide") for g in guides if known(g.values).size]
    edge_labels(axes, last)


def _shade(axes: "Axes", step: Array, guides: Sequence[Guide]) -> None:
    """The three regimes by their norms. A threshold that is missing at a step is infinite there."""
    low, high = axes.get_ylim()
    levels = [np.clip(np.nan_to_num(g.values, nan=high), low, high) for g in guides]
    edges = [np.full(step.size, low), *levels, np.full(step.size, high)]
    x, *edges = corners(step, *edges)
    if x.size == 1:
        x, edges = np.array(axes.get_xlim()), [np.repeat(edge, 2) for edge in edges]
    for regime, lower, upper in zip(REGIMES, edges, edges[1:]):
        if (upper > lower).any():
            axes.fill_between(x, lower, upper, color=colour(regime), alpha=0.13, linewidth=0, zorder=0)


def _regime_strip(axes: "Axes", step: Array, regimes: Sequence[str | None]) -> None:
    """The share of every regime in each stretch of the run, as stacked stairs."""
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.tick_params(axis="x", length=4, width=0.8, color=colour("muted"), labelcolor=colour("muted"), labelsize=TEXT)
    axes.set_ylim(0, 1)
    bins = min(len(regimes), 120)
    which = np.arange(len(regimes)) * bins // len(regimes)
    shares = np.zeros((len(REGIMES), bins))
    for row, regime in enumerate(REGIMES):
        hits = np.array([r == regime for r in regimes])
        shares[row] = np.bincount(which[hits], minlength=bins)
    shares /= np.maximum(shares.sum(axis=0), 1)
    first = np.searchsorted(which, np.arange(bins))
    edges = np.append(step[first], step[-1])
    if bins == 1:
        edges = np.array(axes.get_xlim())
    base = np.zeros(bins)
    for regime, share in zip(REGIMES, shares):
        if share.any():
            top = base + share
            x, lower, upper = corners(edges, np.append(base, base[-1]), np.append(top, top[-1]))
            axes.fill_between(x, lower, upper, step="post", color=colour(regime), linewidth=0)
            base = top


def _thinned(curve: Curve) -> Curve:
    """At most `_CURVE_POINTS` points, evenly: several bands of thousands would make a heavy page."""
    if curve.step.size <= _CURVE_POINTS:
        return curve
    keep = np.unique(np.linspace(0, curve.step.size - 1, _CURVE_POINTS).round().astype(int))
    return Curve(curve.arm, curve.step[keep], curve.mean[keep], curve.se[keep])


def nothing_to_draw(values: Array) -> bool:
    """True where no value is finite."""
    return known(values).size == 0


def describe(values: Array) -> str:
    """`from 2.301 to 0.04512, lowest 0.0441, highest 2.35`: what a figure shows, for those who cannot see it."""
    found = known(values)
    if not found.size:
        return "no finite value"
    return (
        f"from {number(float(found[0]))} to {number(float(found[-1]))}, "
        f"lowest {number(float(found.min()))}, highest {number(float(found.max()))}"
    )
