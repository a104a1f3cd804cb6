"""From the values of a label column to class numbers 0 .. C-1."""

from collections.abc import Sequence

import numpy as np

from surefoot.errors import InputError


def distinct(values: np.ndarray) -> list:
    """The different values, ascending: position in the list is the class number."""
    return np.unique(values).tolist()


def class_numbers(source: str, values: np.ndarray, known: Sequence, which: str) -> np.ndarray:
    """The class number of each value.

    Args:
        source: What the user asked for, for messages.
        values: Labels as they stand in the data, ``(N,)``.
        known: What `distinct` gave for the training rows.
        which: The rows meant, such as "the test split".

    Raises:
        InputError: A value is not among the known.
    """
    table = np.asarray(known)
    places = np.searchsorted(table, values).clip(max=len(table) - 1)
    strange = table[places] != values
    if strange.any():
        value = values[strange][0]
        raise InputError(
            f"data {source!r}: {which} has the label {str(value)!r}, which no training row has: "
            f"add training rows of that class or remove it (known: {', '.join(map(str, known[:10]))}"
            f"{', ...' if len(known) > 10 else ''})"
        )
    return places.astype(np.int64)
