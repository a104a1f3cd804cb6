"""The checker where there is nothing but NumPy and safetensors."""

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy
import pytest
import safetensors
from check_cases import case

ROOT = Path(__file__).parents[2]


def test_it_imports_nothing_else() -> None:
    for path in (ROOT / "src/surefoot/check").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                known = top in (*sys.stdlib_module_names, "numpy", "safetensors") or name.startswith("surefoot.check")
                assert known or (path.name == "audit.py" and top == "flint"), (path.name, name)


def test_it_stays_short_enough_to_be_read() -> None:
    """In lines as an editor counts them; the audit, which nobody needs to believe, not counted."""
    files = [path for path in (ROOT / "src/surefoot/check").glob("*.py") if path.name != "audit.py"]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert 500 < lines <= 800


def test_it_runs_without_torch(tmp_path: Path) -> None:
    """In a virtual environment that sees NumPy, safetensors and this package, and no torch."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    for package in (numpy, safetensors):
        folder = Path(package.__file__).parent
        for path in (folder, folder.with_name(folder.name + ".libs")):
            if path.exists():
                (site / path.name).symlink_to(path)
    (site / "surefoot").symlink_to(ROOT / "src" / "surefoot")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *args], capture_output=True, text=True, env=clean, cwd=tmp_path, timeout=120)

    assert "No module named 'torch'" in run("-c", "import torch").stderr
    folder = case("cnn").write(tmp_path / "certificate")
    done = run("-W", "error", "-m", "surefoot.check", str(folder))
    assert done.returncode == 0, done.stderr
    assert "\nVERIFIED in " in done.stdout
    (folder / "tensors.safetensors").unlink()
    done = run("-m", "surefoot.check", str(folder))
    assert (done.returncode, done.stderr) == (1, "")
    assert run("-m", "surefoot.check", str(tmp_path / "nothing")).returncode == 2


@pytest.mark.nightly
def test_it_installs_without_torch(tmp_path: Path) -> None:
    """As a user does it: pip install numpy safetensors, pip install --no-deps of the checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", "numpy", "safetensors"], check=True)
    subprocess.run([*pip, "--no-deps", ROOT], check=True)
    folder = case("tanh").write(tmp_path / "certificate")
    subprocess.run([python, "-m", "surefoot.check", folder], check=True, cwd=tmp_path)
