"""From a drawing to inline SVG that takes its colours and its font from the page.

Matplotlib draws with stand-in colours, one for each CSS variable of the page; afterwards they are replaced by
`var(--name)`, so that one drawing serves light, dark and print. Every figure is drawn twice, wide and compact: a
wide one scaled down to a phone would have unreadable letters. One SVG unit is one CSS pixel at natural size.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from surefoot.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 960
COMPACT = 360
ARM_COLOURS = 8

_VARIABLES = (
    "ink",
    "muted",
    "grid",
    "series",
    "guide",
    "unclipped",
    "clipped",
    "floored",
    "skipped",
    *(f"arm-{i}" for i in range(ARM_COLOURS)),
)
_STAND_INS = {name: f"#01{i:02x}fe" for i, name in enumerate(_VARIABLES)}
_MEANINGS = {stand_in: "currentColor" if name == "ink" else f"var(--{name})" for name, stand_in in _STAND_INS.items()}

Paint = Callable[["Figure", bool], None]


def colour(name: str) -> str:
    """The stand-in for the page's CSS variable `--name`; `ink` stands for currentColor."""
    return _STAND_INS[name]


def draw(figure_id: str, label: str, paint: Paint, *, wide: int, compact: int) -> str:
    """Draw a figure in both sizes.

    Args:
        figure_id: prefix of the ids inside the SVG, so that they are unique on the page.
        label: what a screen reader says.
        paint: `paint(figure, compact)` puts the axes into an empty figure of 72 dots an inch.
        wide: height of the wide drawing in pixels.
        compact: height of the compact drawing in pixels.

    Returns:
        Two `<svg>` elements, of class `wide` and `compact`.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise InputError(
            f"report: {missing.name} is not installed, and the figures need it; pip install 'surefoot[cli]'"
        ) from missing

    drawn = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The page must not depend on the user's matplotlibrc. rc_context puts everything back.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "surefoot", "text.parse_math": False})
        # Text stays text, and the reader's browser finds the glyphs.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
        for variant, width, height in (("wide", WIDE, wide), ("compact", COMPACT, compact)):
            figure = Figure(figsize=(width / 72, height / 72), dpi=72)
            paint(figure, variant == "compact")
            file = io.StringIO()
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=metadata)
            drawn.append(_inline(file.getvalue(), f"{figure_id}-{variant}", variant, label))
    return "".join(drawn)


def _inline(document: str, prefix: str, variant: str, label: str) -> str:
    """An SVG document as an element of the page: unique ids, no namespaces, the page's colours, short numbers."""
    root = ElementTree.fromstring(document)
    used = dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^)"]+)', document))
    names = {old: f"{prefix}-{i}" for i, old in enumerate(used)}
    for parent in root.iter():
        for child in list(parent):
            # Its style element would rule the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip(), ""
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            key = key.rpartition("}")[2]
            if key == "id":
                if value in names:
                    element.set("id", names[value])
                continue
            if key == "href":
                value = f"#{names[value[1:]]}"
            elif key in ("d", "x", "y", "width", "height", "transform", "points"):
                value = _short_numbers(value)
            elif key == "clip-path":
                value = f"url(#{names[value[5:-1]]})"
            elif key == "style":
                value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
                value = re.sub(r"#[0-9a-f]{6}", lambda m: _MEANINGS.get(m[0], m[0]), value)
            element.set(key, value)
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.attrib.update({"class": variant, "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _short_numbers(text: str) -> str:
    """A tenth of a pixel is fine enough for any screen."""
    text = re.sub(r"\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), text)
    return " ".join(text.split())
