"""Docstrings for the site: they are plain text with formulas, and what shows them takes them for Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"^(\w+):$")
_CODE = re.compile(r"(`[^`]*`)")


def as_markdown(text: str) -> str:
    """The docstring with `<`, `*` and `[` escaped outside of code, and `Example:` named as griffe wants it."""
    lines, section, code = [], "", False
    for line in tables_as_code(text).splitlines():
        if match := _SECTION.match(line):
            section, code = match[1], False
            lines.append("Examples:" if section == "Example" else line)
            continue
        blank_before = not lines or not lines[-1].strip()
        code = line.startswith("    ") and not section and (code or blank_before)  # an indented formula
        lines.append(line if code or section == "Example" else _escaped(line))
    return "\n".join(lines)


def tables_as_code(text: str) -> str:
    """The docstring with its tables, which are ruled by rows of =, indented."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(re.sub("^", "    ", p, flags=re.MULTILINE) if p.startswith("====") else p for p in paragraphs)


def _escaped(line: str) -> str:
    stars = line[: len(line) - len(line.lstrip(" *"))]  # of **options
    pieces = _CODE.split(line[len(stars) :])
    return stars + "".join(p if p.startswith("`") else _plain(p) for p in pieces)


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", r"\*").replace("[", r"\[")


class PlainDocstrings(Extension):
    """Have docstrings shown as they are written."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
