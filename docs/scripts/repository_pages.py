"""What mkdocs does beside its own: pages from outside docs/, and the anchors that GitHub makes.

Every link in the repository is written for GitHub, relative to its own file. A file outside docs/ that a page links to,
or that such a file links to in turn, becomes part of the site under repository/, and so does the README of every folder
of reproductions/. Links are rewritten accordingly; a link that leads nowhere is left to mkdocs, which complains. The
README of a paper is written before its run: what it says of results/ that are not there yet stands without a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = "repository/"  # where in the site files from outside docs/ are

_RESULT = re.compile(r"!?\[([^\]]*)\]\((results/[^)\s#]+)[^)\s]*\)")
_LINK = re.compile(r"(?P<code>^```.*?^```$|`[^`\n]*`)|\]\((?P<target>[^)\s#]+)", re.MULTILINE | re.DOTALL)


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    return path.removeprefix("docs/") if is_page(path) else OUTSIDE + path


def is_page(path: str) -> bool:
    """Whether mkdocs finds the file by itself."""
    return path.startswith("docs/") and not path.startswith("docs/scripts/")


def in_repository(uri: str) -> str:
    """Which file of the repository a file of the site is."""
    return uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}"


def linked(page: str) -> set[str]:
    """The files of the repository that a page of it links to, by the page's path."""
    if not page.endswith(".md"):
        return set()
    found = (m["target"] for m in _LINK.finditer((ROOT / page).read_text(encoding="utf-8")))
    paths = {posixpath.normpath(posixpath.join(posixpath.dirname(page), t)) for t in found if t and ":" not in t}
    return {path for path in paths if (ROOT / path).is_file()}


def outside() -> list[str]:
    """The files from outside docs/ that belong to the site."""
    todo = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")}
    todo |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "reproductions").glob("*/README.md")}
    seen: set[str] = set()
    while todo:
        seen |= todo
        todo = {target for page in todo for target in linked(page)} - seen
    return sorted(path for path in seen if not is_page(path))


def github_anchor(heading: str, separator: str) -> str:
    """The anchor of a heading as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages from outside into the navigation: the papers under Reproductions, the others under Project."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_anchor
    sections: dict[str, list[Any]] = {name: entries for item in config.nav or [] for name, entries in item.items()}
    for path in outside():
        if path.endswith(".md"):
            sections["Reproductions" if path.startswith("reproductions/") else "Project"].append(in_site(path))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside."""
    for path in outside():
        files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their targets are in the site; indent lists as Python-Markdown wants them."""
    here = page.file.src_uri
    folder = posixpath.dirname(in_repository(here))

    def moved(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] or not target or ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).is_file():
            return match[0]
        return f"]({posixpath.relpath(in_site(path), posixpath.dirname(here) or '.')}"

    if here.startswith(f"{OUTSIDE}reproductions/"):
        markdown = _RESULT.sub(lambda m: m[0] if (ROOT / folder / m[2]).is_file() else m[1], markdown)
    nested = re.sub(r"^ {3}(?=- )", " " * 4, markdown, flags=re.MULTILINE)  # what GitHub takes for a nested list
    return _LINK.sub(moved, nested)
