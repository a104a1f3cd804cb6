"""From a document to a page, and from a page to a file."""

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot.errors import InputError
from surefoot.report.certified import certificate_page
from surefoot.report.comparison_page import comparison_page
from surefoot.report.measured import measurements_page
from surefoot.report.run_page import run_page
from surefoot.report.suggested import suggestion_page

if TYPE_CHECKING:
    from jinja2 import Environment

VERSION = 1

_PAGES = {
    "surefoot.run": ("run.html.jinja", run_page),
    "surefoot.comparison": ("comparison.html.jinja", comparison_page),
    "surefoot.measurements": ("measurements.html.jinja", measurements_page),
    "surefoot.certified": ("certificate.html.jinja", certificate_page),
    "surefoot.suggestion": ("suggestion.html.jinja", suggestion_page),
}


def render(document: dict[str, Any]) -> str:
    """The HTML page of a document: self-contained, without scripts, the same bytes for the same document.

    Args:
        document: parsed JSON of format `surefoot.run`, `surefoot.comparison`, `surefoot.measurements`,
            `surefoot.certified` or `surefoot.suggestion`, version 1. Any number in it may be null, and any part but
            `format` and `version` may be missing. A run may hold its measurements, a document of their own format,
            under the key `measurements`.

    Returns:
        The whole page, in UTF-8 once encoded.

    Raises:
        InputError: the document is of another format or version, its columns differ in length, or a package that the
            page needs is missing.

    Example:
        >>> from surefoot.report import render
        >>> page = render({"format": "surefoot.run", "version": 1, "title": "nothing yet"})
        >>> "No steps were taken." in page
        True
    """
    if not isinstance(document, dict):
        raise InputError(f"document: expected an object, got {type(document).__name__}; pass what json.load returned")
    kind, version = document.get("format"), document.get("version")
    if not isinstance(kind, str) or kind not in _PAGES:
        raise InputError(f"document: format is {kind!r}; a report can be made of {' or '.join(map(repr, _PAGES))}")
    if version != VERSION or isinstance(version, bool):
        raise InputError(
            f"document: version is {version!r}, this surefoot reads version {VERSION}; "
            "use the release that wrote the document"
        )
    template, page = _PAGES[kind]
    html = _templates().get_template(template).render(page(document))
    # A lone surrogate is valid JSON but no text: it has no encoding.
    return html.encode("utf-8", "replace").decode("utf-8")


def write_report(document: dict[str, Any], path: Path) -> Path:
    """Render `document` and put the page at `path`: whole or not at all.

    The page is written under a temporary name in the same folder, flushed to disk and moved into place, so that a
    reader of `path` sees the old page or the new one.

    Args:
        document: as for `render`.
        path: the HTML file; its folder must exist.

    Returns:
        `path`.

    Raises:
        InputError: as for `render`, or the folder does not exist. Nothing has been written then.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"path: {path} lies in a folder that does not exist; create {path.parent} first")
    page = render(document).encode("utf-8")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a page is made like any other file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


@cache
def _templates() -> "Environment":
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as missing:
        raise InputError(
            f"report: {missing.name} is not installed, and the page needs it; pip install 'surefoot[cli]'"
        ) from missing
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
