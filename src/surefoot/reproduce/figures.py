"""Figures of a recipe: stand-alone SVG on white, and the pictures that several recipes draw."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surefoot.errors import InputError
from surefoot.reproduce.recipe import Drawing
from surefoot.reproduce.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2563a8", "#d1600f", "#2b8a5a", "#8a4fa8", "#a63348", "#5c6370")  # told apart without red against green
INK, MUTED, GRID = "#1c2430", "#5b6675", "#e3e7ec"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "surefoot",
    "font.size": 11,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}


def svg(drawing: Drawing, results: Results) -> bytes:
    """Return a drawing as an SVG file; the same results give the same bytes.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise InputError(f"reproduce: {missing.name} is not installed; pip install 'surefoot[cli]'") from missing
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
        figure = Figure(figsize=drawing.inches, layout="constrained", facecolor="white")
        drawing.paint(figure, results)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    lines = (line.rstrip() for line in file.getvalue().splitlines())
    return ("\n".join(lines) + "\n").encode()


def differences(
    axes: Axes,
    results: Results,
    *,
    arms: Sequence[str],
    base: str,
    measures: Sequence[str],
    tolerance: float,
    scale: float = 100.0,
    colours: Sequence[str] = COLOURS,
) -> None:
    """Draw arm - base, experiment by experiment: the mean with two standard errors, each seed a faint dot.

    Args:
        axes: where.
        results: of the runs.
        arms: from top to bottom within an experiment.
        base: what they are compared with.
        measures: the first that an experiment has is drawn.
        tolerance: half the width of the grey band, in the measure's unit.
        scale: what the measure is multiplied by: 100 for percentage points.
        colours: one an arm.
    """
    names = [e.name for e in results.experiments]
    axes.axvspan(-tolerance * scale, tolerance * scale, color=GRID, zorder=0, label="tolerance")
    axes.axvline(0, color=MUTED, linewidth=1)
    gap = 0.7 / max(1, len(arms))
    for k, arm in enumerate(arms):
        drawn = False
        for row, name in enumerate(names):
            measure = next((m for m in measures if results.by_seed(name, base, m)), None)
            found = None if measure is None else results.difference(name, arm, base, measure)
            if found is None or measure is None or not math.isfinite(found.mean):
                continue
            at = row + (k - (len(arms) - 1) / 2) * gap
            a, b = results.by_seed(name, arm, measure), results.by_seed(name, base, measure)
            each = [scale * (a[seed] - b[seed]) for seed in a if seed in b]
            colour = colours[k % len(colours)]
            axes.plot(each, [at] * len(each), "o", color=colour, alpha=0.25, markersize=4, markeredgewidth=0)
            axes.errorbar(
                scale * found.mean, at, xerr=2 * scale * (found.error or 0), fmt="o", color=colour, markersize=5.5,
                capsize=2.5, linewidth=1.4, label=None if drawn else arm,
            )  # fmt: skip
            drawn = True
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x")
