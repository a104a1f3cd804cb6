"""Libraries that come with the `data` extra, loaded when they are first needed."""

import importlib
from types import ModuleType

from surefoot.errors import InputError


def needed(module: str, purpose: str) -> ModuleType:
    """Import `module`, or say how to install it.

    Args:
        module: Name to import, such as ``"datasets"``.
        purpose: What it is needed for, the end of "... is needed to".

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise InputError(f"{error.name} is needed to {purpose}: pip install 'surefoot[data]'") from error
