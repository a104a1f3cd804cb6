"""A figure of a page and what is said of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Drawing:
    """A figure of the page; without `svg` its caption stands alone."""

    id: str
    title: str
    caption: str
    svg: str
    legend: tuple[str, ...] = ()
