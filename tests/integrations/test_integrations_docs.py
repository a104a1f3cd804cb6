"""The examples of the adapters' docstrings and pages: those that the plain suite leaves out, for want of a library.

In a page such blocks are marked ```py; a page's blocks share a namespace and a temporary folder.
"""

import contextlib
import doctest
import io
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from integrations_helpers import forget_accelerator, need

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)
# What the libraries themselves warn of.
OF_OTHERS = (
    "The '.*_dataloader' does not have many workers",
    ".*isinstance\\(treespec, LeafSpec\\)",
    "'pin_memory' argument is set as true",
)


def run_block(source: str, name: str, namespace: dict[str, Any]) -> None:
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out):
        warnings.simplefilter("error")
        for message in OF_OTHERS:
            warnings.filterwarnings("ignore", message)
        exec(compile(source, name, "exec"), namespace)
    if expected := PRINTED.findall(source):
        assert out.getvalue().splitlines()[-len(expected) :] == expected


def test_examples_do_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "accelerate", "lightning.pytorch", "optax", "jax"):
        need(name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    found = [match[1] for match in BLOCK.finditer((DOCS / "integrations.md").read_text(encoding="utf-8"))]
    assert len(found) >= 6
    for source in found:
        forget_accelerator()  # each section is a program of its own
        run_block(source, "integrations.md", namespace)


def test_a_wrong_example_fails() -> None:
    with pytest.raises(AssertionError):
        run_block("print(1 + 1)  # 3\n", "page.md", {})


@pytest.mark.parametrize(
    ("name", "libraries"),
    [
        ("scalars", ()),
        ("transformers", ("transformers", "accelerate")),
        ("lightning", ("lightning.pytorch",)),
        ("optax", ("optax", "jax")),
    ],
)
def test_docstring_examples(name: str, libraries: tuple[str, ...]) -> None:
    for library in libraries:
        need(library)
    result = doctest.testmod(import_module(f"surefoot.integrations.{name}"))
    assert result.failed == 0
    assert result.attempted > 0
