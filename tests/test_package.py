"""The package as a whole: what an import costs, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import surefoot

SOURCE = Path(surefoot.__file__).parent

# Who may import whom (besides errors and _version, which are everybody's).
MAY_IMPORT = {
    "optim": set(),
    "measure": set(),
    "theorems": {"measure"},
    "certificates": {"measure", "theorems"},
    "check": set(),
    "data": set(),
    "models": set(),
    "report": set(),
    "train": {"optim", "measure", "theorems", "certificates", "data", "models"},
    "tune": {"optim", "measure", "theorems", "certificates", "data", "models", "train"},
    "testing": {"optim", "measure", "theorems", "certificates"},
    "reproduce": {"optim", "measure", "theorems", "certificates", "data", "models", "train", "tune"},
    "cli": {
        "optim",
        "measure",
        "theorems",
        "certificates",
        "check",
        "data",
        "models",
        "report",
        "train",
        "tune",
        "reproduce",
    },
    "integrations": {"optim", "measure", "theorems", "certificates", "train"},
}
# Packages that the library part may load: base dependencies and the standard library, nothing else.
LIBRARY = ("optim", "measure", "theorems", "testing")


def imports(path: Path) -> set[str]:
    """Return the absolute names a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_one_way() -> None:
    seen = 0
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).parts[0]
        if package.endswith(".py"):
            continue
        assert package in MAY_IMPORT, f"say in MAY_IMPORT what {package} may import"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "surefoot" and len(parts) > 1:
                seen += 1
                allowed = MAY_IMPORT[package] | {package, "errors", "_version"}
                assert parts[1] in allowed, f"{path.relative_to(SOURCE)} imports {name}"
    assert seen > 20


def test_the_direction_test_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from surefoot.report import write_report\n")
    assert imports(path) == {"surefoot.report.write_report"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_surefoot_loads_no_torch() -> None:
    assert run("import sys, surefoot; print('torch' in sys.modules, 'numpy' in sys.modules)") == "False False"


@pytest.mark.parametrize("name", [n for n in surefoot.__all__ if n != "__version__"])
def test_public_names_load_on_first_use(name: str) -> None:
    assert getattr(surefoot, name).__name__ == name
    assert name in dir(surefoot)


def test_the_library_part_needs_only_the_base_install() -> None:
    foreign = "tyro rich matplotlib jinja2 pyarrow pandas tensorboard joblib datasets sklearn PIL transformers scipy"
    modules = [f"surefoot.{p}" for p in LIBRARY if (SOURCE / p).is_dir()]
    code = (
        f"import sys, torch; base = set(sys.modules)\nimport {', '.join(modules)}\n"
        f"print(sorted(m for m in set(sys.modules) - base if m.split('.')[0] in {foreign.split()}))"
    )
    assert run(code) == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        surefoot.nothing  # noqa: B018
