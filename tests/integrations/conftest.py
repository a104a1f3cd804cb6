"""What every test of the adapters may rely on."""

from collections.abc import Iterator

import pytest
from integrations_helpers import forget_accelerator


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    forget_accelerator()
    yield
    forget_accelerator()
