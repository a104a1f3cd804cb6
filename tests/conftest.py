"""What every test may use."""

import os
from pathlib import Path

import pytest
import torch

os.environ.pop("COLUMNS", None)  # the width of the terminal that pytest runs in, which parallel workers inherit


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the longer campaigns to make nightly."""
    if not os.environ.get("SUREFOOT_NIGHTLY"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="a longer campaign: make nightly runs it"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout (or where SUREFOOT_TEST_DATA points)."""
    folder = Path(os.environ.get("SUREFOOT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SUREFOOT_TEST_DATA to a folder laid out like it")
    return folder


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
