"""The optimizers over 2 and 4 real processes follow one process on the whole batch."""

import sys
from functools import cache
from pathlib import Path

import pytest
from distributed_cases import CASES
from distributed_launch import run_all

SCRIPT = Path(__file__).with_name("distributed_cases.py")
SECONDS = 300  # a case takes ten; beside other work ten times as long


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory):
    """Ranks -> (what each case that ended had to complain of, what the processes printed)."""

    @cache
    def run(ranks: int) -> tuple[dict[str, str], str]:
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        [(code, printed)] = run_all([[sys.executable, str(SCRIPT), str(folder), str(ranks)]], folder, SECONDS)
        return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}, f"[{code}] {printed}"

    return run


@pytest.mark.parametrize(
    ("name", "ranks"), [(name, ranks) for name, (sizes, _) in CASES.items() for ranks in sizes], ids=str
)
def test_follows_one_process(name: str, ranks: int, outcomes) -> None:
    found, printed = outcomes(ranks)
    assert name in found, f"hung or died before its end:\n{printed}"
    assert found[name] == "", found[name]
