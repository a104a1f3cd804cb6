"""Names that lead nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from surefoot.data import load
from surefoot.data.extra import needed
from surefoot.errors import InputError


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("digit", "did you mean 'digits'?"),
        ("nothing-like-it", "Hugging Face hub id"),
        ("", "Hugging Face hub id"),
        ("missing/table.csv", "no such file or folder"),
    ],
)
def test_unknown(source: str, said: str, network_calls: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load(source)
    assert repr(source) in str(caught.value)
    assert said in str(caught.value)
    assert not network_calls


def test_a_neighbour_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "houses.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"did you mean '.*houses\.csv'"):
        load(str(tmp_path / "house.csv"))


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"not a kind of file that is known: give digits"):
        load(str(tmp_path / "rows.xlsx"))


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(InputError, match=r"no_such_library is needed to read rows: pip install 'surefoot\[data\]'"):
        needed("no_such_library.part", "read rows")
    with pytest.raises(ModuleNotFoundError):  # an installed library that is broken is not called missing
        needed("json.no_such_part", "read rows")


def test_importing_loads_no_reader() -> None:
    code = "import sys, surefoot.data; print({'datasets', 'sklearn', 'PIL', 'pyarrow', 'pandas'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
