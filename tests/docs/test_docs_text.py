"""What the pages say: links lead somewhere, and nothing that a user may write is left out."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from docs_pages import PAGES, ROOT, anchors, links, table_rows

import surefoot
from surefoot.cli.compare import CompareArgs
from surefoot.cli.train import TrainArgs
from surefoot.optim.telemetry import Telemetry
from surefoot.train.config import LETTERS, TrainConfig, flag
from surefoot.train.loop import train

EVERY_PAGE = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def quoted(page: str) -> set[str]:
    """What stands in backticks in a page."""
    return set(re.findall(r"`([^`\n]+)`", page))


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 100


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name} links to {link}"


def test_links_are_found() -> None:
    found = [link for page in EVERY_PAGE for link in links(page.read_text(encoding="utf-8"))]
    assert "docs/images/report.png" in found
    assert sum("#" in link for link in found) >= 2
    assert len(found) >= 25


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    assert all(picture.stat().st_size < 250_000 for picture in pictures)


@pytest.mark.parametrize("name", surefoot.__all__)
def test_public_names_are_explained(name: str) -> None:
    assert name in "".join(read(f"docs/{page}.md") for page in ("optimizers", "certificates", "explore-exploit"))


@pytest.mark.parametrize(("page", "args"), [("docs/train.md", TrainArgs), ("docs/compare.md", CompareArgs)])
def test_options_are_explained(page: str, args: type[TrainConfig]) -> None:
    shared = {field.name for field in dataclasses.fields(TrainConfig)} if args is CompareArgs else set()
    words = quoted(read(page))
    options = {field.name for field in dataclasses.fields(args)}
    assert {flag(name) for name in options - shared} <= words
    mentioned = {word.split()[0] for word in words if word.startswith("--")}
    assert mentioned <= {flag(name) for name in options}, "a page names an option that there is not"


def test_defaults_are_those_of_the_code() -> None:
    rows = {row[0]: row[1] for row in table_rows(read("docs/train.md"))}
    checked = 0
    for field in dataclasses.fields(TrainConfig):
        if field.default is not None:
            assert rows[flag(field.name)] == as_written(field.default), field.name
            checked += 1
    assert checked > 10


def as_written(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return default if isinstance(default, str) else f"{default:g}"


@pytest.mark.parametrize("optimizer", LETTERS)
def test_letters_are_those_of_the_code(optimizer: str) -> None:
    letters = LETTERS[optimizer]
    text = ", ".join(f"{letter} {value:g}" for letter, value in letters.items() if value is not None)
    if None in letters.values():
        text += "; clips when gamma is given"
    assert [optimizer, text] in table_rows(read("docs/train.md"))


def test_telemetry_keys_are_explained() -> None:
    assert set(Telemetry().read(reset=False)) <= quoted(read("docs/telemetry.md"))


def test_what_a_run_leaves_is_explained(tmp_path: Path) -> None:
    document = train(TrainConfig(steps=2, limit=100, width=(8,)), tmp_path / "run", quiet=True)
    page = quoted(read("docs/train.md"))
    names = {path.name + "/" * path.is_dir() for path in (tmp_path / "run").iterdir()} - {"checkpoints/"}
    saved = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-00000002").iterdir()}
    assert {"metrics.parquet", "tensorboard/"} <= names
    assert len(saved) == 3
    columns = {*document["series"], *document["evals"]} - {"rows", "stride"}
    assert names | saved | columns | set(document) <= page
