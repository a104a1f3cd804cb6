"""Models from a Python file of the user's own: "path/to/file.py:factory"."""

import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from surefoot.errors import InputError

_loads = itertools.count()


def from_file(name: str, facts: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Run the file and call the factory in it.

    The factory gets those facts and options that its signature names (all of them if it has `**kwargs`). An option that
    was not given is left to the factory's own default, and is None where the factory has none.

    Args:
        name: "path/to/file.py:factory".
        facts: kind, task, input_shape, outputs, vocabulary_size.
        options: Those of width, depth and activation that were given.

    Returns:
        What the factory returned.

    Raises:
        InputError: If the file, the factory or its result is not usable, or an option would have no effect. When the
            user's code raised, the message holds its error and line, and the error is chained.
    """
    path, factory_name = _split(name)
    with _importable(path.parent):
        module = _load(path)
        factory = _find(module, path, factory_name)
        try:
            model = factory(**_arguments(factory, name, facts, options))
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            raise InputError(f"model={name!r}: {factory_name} raised {_where(error, path)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model={name!r}: {factory_name} returned a {type(model).__name__}, not a torch.nn.Module")
    parameters = list(model.parameters())
    if any(nn.parameter.is_lazy(parameter) for parameter in parameters):
        raise InputError(f"model={name!r} has lazy parameters without a size: take the sizes from input_shape instead")
    if not any(parameter.requires_grad for parameter in parameters):
        raise InputError(f"model={name!r} has no trainable parameters: there is nothing to train")
    return model


def _split(name: str) -> tuple[Path, str]:
    file, _, factory = (name, "", "") if name.endswith(".py") else name.rpartition(":")
    if not factory:
        raise InputError(f"model={name!r} does not say what to call in the file: write path/to/file.py:factory")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"model={name!r}: there is no file {path}")
    return path, factory


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    # As when the file is run as a script: it may import the files beside it.
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"surefoot_user_{path.stem}_{next(_loads)}", path)
    if spec is None:
        raise InputError(f"model file {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    try:
        # Compiled from the source each time: Python's cache misses an edit within the same second.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise InputError(f"model file {path} does not import: {_where(error, path)}") from error
    return module


def _find(module: ModuleType, path: Path, name: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        names = [key for key in own if callable(vars(module)[key]) and not key.startswith("_")]
        close = get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"model file {path} has no {name!r}: {hint}Callables there: {', '.join(names) or 'none'}")
    found = getattr(module, name)
    if isinstance(found, nn.Module) or not callable(found):
        raise InputError(f"{name!r} in {path} is a {type(found).__name__}: give a function that makes the model")
    return found


def _arguments(
    factory: Callable[..., Any], name: str, facts: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    everything = facts | dict.fromkeys(("width", "depth", "activation")) | options
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return everything
    for option, value in options.items():
        if option not in parameters:
            raise InputError(f"{option}={value!r} has no effect on model={name!r}: its signature has no {option!r}")
    wanted = {key: value for key, value in everything.items() if key in parameters}
    return {
        key: value
        for key, value in wanted.items()
        if value is not None or parameters[key].default is inspect.Parameter.empty
    }


def _where(error: BaseException, path: Path) -> str:
    """The type and message of an error and its last line in the user's file (a SyntaxError's message has its own)."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = f" (line {lines[-1]} of {path.name})" if lines else ""
    return f"{type(error).__name__}: {error}{line}"
