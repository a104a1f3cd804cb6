"""The recipes, one a module that defines RECIPE; `explore_exploit` is `surefoot reproduce explore-exploit`."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from surefoot.errors import InputError
from surefoot.reproduce.recipe import Recipe
from surefoot.train.config import unknown


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def recipe(name: str) -> Recipe:
    """Return a recipe.

    Raises:
        InputError: there is none of that name.
    """
    if name not in names():
        raise InputError(unknown("recipe", name, names()))
    return import_module(f"{__name__}.{name.replace('-', '_')}").RECIPE
