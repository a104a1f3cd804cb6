"""Every example in a docstring is run."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import surefoot

ELSEWHERE = {"integrations"}  # each adapter needs its library: tests/integrations runs theirs
PACKAGES = [
    module.name for module in pkgutil.iter_modules(surefoot.__path__) if module.ispkg and module.name not in ELSEWHERE
]
WITH_EXAMPLES = ("optim", "data", "models", "train")


@pytest.mark.parametrize("name", PACKAGES)
def test_docstring_examples(name: str) -> None:
    package = import_module(f"surefoot.{name}")
    modules = [m.name for m in pkgutil.walk_packages(package.__path__, f"surefoot.{name}.")]
    results = [doctest.testmod(module) for module in (package, *map(import_module, modules))]
    assert sum(result.failed for result in results) == 0
    if name in WITH_EXAMPLES:
        assert sum(result.attempted for result in results) > 0


def test_the_packages_are_found() -> None:
    assert set(WITH_EXAMPLES) <= set(PACKAGES)
