"""Every example of README.md and docs/ is run as it stands.

The blocks of a page share a temporary folder and, the Python ones, a namespace. A Python block that begins with
`# name.py` is saved under that name as well; `print(...)  # value` says what is printed. Of a console block the lines
that begin with `$ surefoot` are run; the lines below them are its output, `...` standing for anything, and a comment
`# exit code 2` says what it ends with.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from docs_pages import LANGUAGES, PAGES, Block, blocks

# Commands that a page may show without their being run here.
NOT_RUN = ("make", "git", "pip", "python -m venv", ". .venv/bin/activate")
PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    if saved := re.match(r"# ([\w-]+\.py)\n", block.text):
        Path(saved[1]).write_text(block.text, encoding="utf-8")
    source = "\n" * (block.line - 1) + block.text  # so that a traceback shows the line of the page
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out):
        warnings.simplefilter("error")
        exec(compile(source, str(page), "exec"), namespace)
    if expected := PRINTED.findall(block.text):
        assert out.getvalue().splitlines() == expected, f"{page.name}, line {block.line}"


def commands(block: Block) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output shown below it."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0].strip(), f"line {block.line}: begin with a line that starts with '$ '"
    return [(command, shown) for command, _, shown in (part.partition("\n") for part in parts[1:])]


def run_command(command: str, shown: str, where: str) -> None:
    words = shlex.split(command, comments=True)
    assert not {"|", "&&", ";", ">", "\\"} & set(words), f"{where}: no shell is started"
    code = re.search(r"# exit code (\d+)$", command)
    done = subprocess.run(
        [sys.executable, "-m", "surefoot.cli.main", *words[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == (int(code[1]) if code else 0), f"{where}: {command}\n{done.stdout}\n{done.stderr}"
    if not code:
        assert done.stderr == "", f"{where}: {command}"
    printed = " ".join((done.stdout + done.stderr).split())
    for piece in shown.split("..."):
        assert " ".join(piece.split()) in printed, f"{where}: {command}\n{done.stdout}\n{done.stderr}"


def is_run(command: str) -> bool:
    if command.split()[0] == "surefoot":
        return True
    assert command.startswith(NOT_RUN), f"{command!r} is neither run nor one of those that need not be"
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_do_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        assert block.language in LANGUAGES, f"{page.name}, line {block.line}: {block.language!r}"
        if block.language == "python":
            run_python(block, page, namespace)
        elif block.language in ("console", "bash"):
            for command, shown in commands(block):
                if is_run(command):
                    run_command(command, shown, f"{page.name}, line {block.line}")


def test_there_is_something_to_run() -> None:
    found = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    console = [command for block in found if block.language == "console" for command, _ in commands(block)]
    assert sum(block.language == "python" for block in found) >= 16
    assert sum(is_run(command) for command in console) >= 9
    assert sum(bool(PRINTED.search(block.text)) for block in found) >= 12


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise ValueError('no')\n", ValueError),
        ("import warnings\nwarnings.warn('no')\n", UserWarning),
        ("print(1 + 1)  # 3\n", AssertionError),
    ],
)
def test_a_wrong_example_fails(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run_python(Block("python", text, 1), Path("page.md"), {})


@pytest.mark.parametrize(
    ("command", "shown"),
    [("surefoot --version", "surefoot 99.0\n"), ("surefoot --version  # exit code 2", ""), ("surefoot nothing", "")],
)
def test_a_wrong_command_fails(command: str, shown: str) -> None:
    with pytest.raises(AssertionError):
        run_command(command, shown, "page.md, line 1")


def test_a_command_that_is_not_run_is_on_the_list() -> None:
    with pytest.raises(AssertionError, match="neither run"):
        is_run("curl example.org")
