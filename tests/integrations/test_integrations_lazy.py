"""Without its library an adapter says which extra has it, and nothing else of surefoot needs one."""

import subprocess
import sys

import pytest

LIBRARIES = {
    "transformers": ("transformers",),
    "lightning": ("lightning",),
    "optax": ("optax", "jax"),
}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_named_by_its_extra(name: str) -> None:
    for library in LIBRARIES[name]:
        code = (
            f"import sys; sys.modules[{library!r}] = None\n"
            "from surefoot.errors import InputError\n"
            f"try:\n    import surefoot.integrations.{name}\n"
            "except InputError as error:\n    print(error)\n"
        )
        said = run(code)
        assert f"pip install 'surefoot[{name}]'" in said
        assert f"surefoot.integrations.{name} needs" in said


def test_the_package_loads_no_library() -> None:
    libraries = {library for group in LIBRARIES.values() for library in group}
    code = f"import sys, surefoot.integrations.scalars; print(sorted({libraries!r} & set(sys.modules)))"
    assert run(code) == "[]"
