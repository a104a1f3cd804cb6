"""The site: nothing is left out of its navigation, its reference or its table of errors. `make docs` builds it."""

import ast
import re
import runpy
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_pages import PAGES, ROOT, prose, table_rows

import surefoot
from surefoot.cli.main import COMMANDS

DOCS = ROOT / "docs"
VERDICTS = (DOCS / "verdicts.md").read_text(encoding="utf-8")
REFERENCE = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
PACKAGES = ("optim", "measure", "theorems", "certificates", "check", "train", "tune", "testing", "report")


def entries(nav: Any) -> list[str]:
    """The pages of a navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in entries(item)]


def test_every_page_is_in_the_navigation_once() -> None:
    found = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(found) > 30
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(found) == sorted(pages), "put the page into nav in mkdocs.yml"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_in_the_reference(package: str) -> None:
    shown = set(re.findall(rf"^::: surefoot\.{package}\.(\w+)$", REFERENCE, re.MULTILINE))
    assert set(import_module(f"surefoot.{package}").__all__) - shown == set(), "show these in docs/api"


def test_the_reference_names_what_there_is() -> None:
    found = re.findall(r"^::: (surefoot[\w.]*)\.(\w+)$", REFERENCE, re.MULTILINE)
    assert len(found) > 70
    for module, name in found:
        if ".integrations." not in module:  # each needs its library; mkdocs finds their names in the source
            assert hasattr(import_module(module), name), f"{module}.{name}"


def test_every_command_has_its_exit_codes() -> None:
    rows = {row[0] for row in table_rows(VERDICTS)}
    assert set(COMMANDS) <= rows


def messages() -> list[str]:
    """The messages of the table of errors, as they are written there."""
    part = VERDICTS[VERDICTS.index("## The commonest errors") :]
    return re.findall(r"^\| `(.+?)` \|", part, re.MULTILINE)


def texts() -> list[str]:
    """Every text in the source of surefoot, what is filled in as a NUL."""
    found = []
    for path in Path(surefoot.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_in(message: str, source: list[str]) -> bool:
    """Whether a text of the source reads like the message, `...` in it being anything."""
    return any(reads_like(text, message.split("...")) for text in source)


def reads_like(text: str, pieces: list[str]) -> bool:
    """Whether the pieces stand in the text in this order."""
    place = 0
    for piece in pieces:
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def test_the_errors_explained_are_those_of_the_source() -> None:
    source = texts()
    assert len(messages()) > 20
    assert [message for message in messages() if not is_in(message, source)] == []
    assert not is_in("--delta ... has no effect without --colour; give both", source)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lists_and_tables_stand_alone(page: Path) -> None:
    """GitHub does not need the blank line before a list or a table, the site does."""
    lines = prose(page.read_text(encoding="utf-8")).splitlines()
    for before, line in pairwise(lines):
        if re.match(r"([-*]|\d+\.) ", line):
            assert not before or re.match(r"([-*]|\d+\.| ) ?", before), f"a blank line before: {line}"
        if line.startswith("|"):
            assert not before or before.startswith("|"), f"a blank line before: {line}"


@pytest.mark.nightly
def test_the_picture_of_the_envelope_can_be_drawn_again(tmp_path: Path) -> None:
    """The script holds every step against the envelope before it draws."""
    script = ROOT / "docs" / "scripts" / "envelope_figure.py"
    runpy.run_path(str(script))["main"](tmp_path / "envelope.svg")
    assert (tmp_path / "envelope.svg").stat().st_size > 10_000
