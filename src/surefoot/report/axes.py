"""Axes for the page: quiet, with readable ticks on linear and logarithmic scales and labels at the ends of lines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from surefoot.report.formats import number, percent, power_of_ten
from surefoot.report.read import Array, known
from surefoot.report.svg import colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = 12.5
_ROUND = (1, 2, 2.5, 5, 10)
_LABEL_GAP = 14.0  # pixels between two labels at the edge


@dataclass(frozen=True)
class Box:
    """Where axes lie in their figure, in pixels from its left and top edges."""

    left: float
    top: float
    width: float
    height: float

    def add_to(self, figure: "Figure", **options: Any) -> "Axes":
        """New axes here."""
        w, h = 72 * figure.get_size_inches()
        return figure.add_axes(
            (self.left / w, 1 - (self.top + self.height) / h, self.width / w, self.height / h), **options
        )


def quiet(axes: "Axes") -> None:
    """Grid lines across, an axis below, no frame."""
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour("muted"))
    axes.spines["bottom"].set_linewidth(0.8)
    axes.grid(axis="y", color=colour("grid"), linewidth=0.8)
    axes.tick_params(axis="x", length=4, width=0.8, color=colour("muted"), labelcolor=colour("muted"), labelsize=TEXT)
    axes.tick_params(axis="y", which="both", length=0, pad=6, labelcolor=colour("muted"), labelsize=TEXT)


def step_axis(axes: "Axes", steps: Array, compact: bool, label: str = "step") -> None:
    """Whole steps from the first to the last, and from 0 where that is near."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    found = known(steps)
    low, high = (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)
    if 0 < low < 0.15 * high:
        low = 0.0
    pad = 0.01 * (high - low) if high > low else 0.5
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if compact else 8, steps=_ROUND, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value))))
    axes.set_xlabel(label, color=colour("muted"), fontsize=TEXT, labelpad=4)


def spans_a_decade(values: Array) -> bool:
    """All positive, and the largest at least ten times the smallest."""
    return bool(values.size and values.min() > 0 and values.max() >= 10 * values.min())


def value_axis(
    axes: "Axes", values: Array, *, log: bool, as_percent: bool = False, include: Sequence[float] = ()
) -> None:
    """Limits and ticks that show `values`.

    Args:
        axes: where.
        values: what is drawn; missing ones are ignored, and on a log scale so are those that are not positive.
        log: logarithmic, where there is any positive value.
        as_percent: fractions, labelled as percentages.
        include: further values to show where that costs at most a factor of 30 of the scale (log only).
    """
    found = known(values)
    positive = found[found > 0]
    if log and positive.size:
        low, high = float(positive.min()), float(positive.max())
        for value in include:
            if value > 0 and low / 30 <= value <= 30 * high:
                low, high = min(low, value), max(high, value)
        _log_axis(axes, low, high)
        return
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    low, high = (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)
    pad = 0.06 * (high - low)
    if pad <= 1e-9 * max(abs(low), abs(high)):
        pad = 0.05 * max(abs(low), abs(high)) or 1.0
    bottom, top = low - pad, high + pad
    if as_percent and low >= 0 and high <= 1:
        bottom, top = max(bottom, 0.0), min(top, 1.0)
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_ROUND))
    if as_percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 3) if value else "0%"))
        return
    formatter = ScalarFormatter(useOffset=False, useMathText=False)
    formatter.set_powerlimits((-4, 6))
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.get_offset_text().set(color=colour("muted"), fontsize=TEXT)


def log_x_axis(axes: "Axes", values: Array, compact: bool, label: str) -> None:
    """A logarithmic x axis that shows `values`, all positive, under a label."""
    _log_axis(axes, float(values.min()), float(values.max()), across=True, most=4 if compact else 6)
    axes.set_xlabel(label, color=colour("muted"), fontsize=TEXT, labelpad=4)


def _log_axis(axes: "Axes", low: float, high: float, *, across: bool = False, most: int = 6) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    reach = max(0.06 * math.log10(high / low), 0.08)
    bottom, top = low * 10**-reach, high * 10**reach
    if across:
        axes.set_xscale("log")
        axes.set_xlim(bottom, top)
    else:
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
    ticks = log_ticks(bottom, top, most)
    axis = axes.xaxis if across else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: log_label(value)))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_minor_formatter(NullFormatter())


def log_ticks(bottom: float, top: float, most: int = 6) -> list[float]:
    """Round values within the limits of a log axis: whole decades where there are enough, else finer ones."""
    first, last = math.ceil(math.log10(bottom) - 1e-9), math.floor(math.log10(top) + 1e-9)
    decades = last - first + 1
    if decades >= 3:
        stride = math.ceil(decades / most)
        return [10.0**e for e in range(first, last + 1) if e % stride == 0]
    for mantissas in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [m * 10.0**e for e in range(first - 1, last + 1) for m in mantissas]
        ticks = [t for t in ticks if bottom <= t <= top]
        if len(ticks) >= 3:
            return ticks
    # Less than a quarter of a decade: round steps as on a linear axis.
    raw = (top - bottom) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    size *= next(m for m in (1, 2, 5, 10) if m * size >= raw)
    return [k * size for k in range(math.ceil(bottom / size), math.floor(top / size) + 1)]


def log_label(value: float) -> str:
    """`0.02`, `500`, `10⁻⁴`, `3×10⁷`."""
    if 1e-3 <= value < 1e5:
        return number(float(value), 6)
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = f"{value / 10.0**exponent:.4g}"
    return power_of_ten(exponent) if mantissa == "1" else f"{mantissa}×{power_of_ten(exponent)}"


def edge_labels(axes: "Axes", labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, text, colour variable) right of the axes at the height of each value, without overlap.

    A value outside the limits is written at the edge with an arrow.
    """
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height  # pixels: there are 72 dots an inch
    scale = math.log10 if axes.get_yscale() == "log" else float
    placed = []
    for value, text, variable in labels:
        if not math.isfinite(value) or (axes.get_yscale() == "log" and value <= 0):
            continue
        inside = min(max(value, low), high)
        arrow = " ↑" if value > high else " ↓" if value < low else ""
        at = height * (scale(inside) - scale(low)) / (scale(high) - scale(low))
        placed.append((at, text + arrow, variable))
    placed.sort()
    heights = _spread([at for at, _, _ in placed], height)
    for at, (_, text, variable) in zip(heights, placed):
        axes.annotate(
            text,
            (1, at / height),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            color=colour(variable),
            fontsize=TEXT,
            annotation_clip=False,
        )


def _spread(heights: list[float], top: float) -> list[float]:
    """Push sorted positions apart to `_LABEL_GAP`: up from the bottom, then down from the top."""
    out: list[float] = []
    for at in heights:
        out.append(max(at, out[-1] + _LABEL_GAP) if out else at)
    for i in range(len(out) - 1, -1, -1):
        out[i] = min(out[i], top if i == len(out) - 1 else out[i + 1] - _LABEL_GAP)
    return out


def corners(x: Array, *columns: Array) -> tuple[Array, ...]:
    """Drop the points at which no column changes before or after: constants and stairs need few points."""
    if x.size <= 2:
        return (x, *columns)
    keep = np.zeros(x.size, dtype=bool)
    keep[[0, -1]] = True
    for column in columns:
        same = (column[1:] == column[:-1]) | (np.isnan(column[1:]) & np.isnan(column[:-1]))
        keep[1:-1] |= ~(same[:-1] & same[1:])
    return (x[keep], *(column[keep] for column in columns))


def running_median(values: Array, window: int) -> Array:
    """The median over `window` (odd) neighbours, the ends repeated; `values` are all finite."""
    padded = np.pad(values, window // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)
