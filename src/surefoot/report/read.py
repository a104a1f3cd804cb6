"""Reading a document: every value may be missing or null, yet what is there must make sense."""

from typing import Any

import numpy as np

from surefoot.errors import InputError

Array = np.ndarray[Any, np.dtype[np.float64]]

# Beyond these an axis has no meaning, and differences and ratios of what is drawn would overflow.
_HUGE = 1e150


def mapping(document: dict[str, Any], key: str) -> dict[str, Any]:
    """`document[key]` as a dict; missing or null is empty."""
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{key}: expected an object, got {_short(value)}; write {{}} where there is nothing to say")
    return value


def listing(document: dict[str, Any], key: str) -> list[Any]:
    """`document[key]` as a list; missing or null is empty."""
    value = document.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InputError(f"{key}: expected a list, got {_short(value)}; write [] where there is nothing to say")
    return value


def count(value: Any) -> int:
    """A whole number of things; missing is none."""
    return int(value) if isinstance(value, (int, float)) and np.isfinite(value) else 0


class Table:
    """Columns of equal length over `step`, as the documents hold them.

    Args:
        columns: name -> list; a missing or null column reads as all missing.
        where: how error messages call the table.

    Raises:
        InputError: a column is no list, or its length differs from that of `step`, or it holds something that is
            neither a number nor null.
    """

    def __init__(self, columns: dict[str, Any], where: str) -> None:
        self.where = where
        lists = {name: listing(columns, name) for name, value in columns.items() if isinstance(value, list)}
        self.rows = len(lists.get("step", []))
        for name, values in lists.items():
            if len(values) not in (0, self.rows):
                raise InputError(
                    f"{where}.{name}: {len(values)} values, but {where}.step has {self.rows}; "
                    "give every column one value (or null) a step"
                )
        self._lists = {name: values for name, values in lists.items() if values}

    def names(self) -> list[str]:
        """The columns that hold anything."""
        return list(self._lists)

    def raw(self, name: str) -> list[Any]:
        """A column as it stands."""
        return self._lists.get(name, [None] * self.rows)

    def numbers(self, name: str) -> Array:  # (rows,)
        """A column as float64, NaN where it is null or not finite."""
        try:
            values = np.array([np.nan if v is None else float(v) for v in self.raw(name)], dtype=np.float64)
        except (TypeError, ValueError) as problem:
            raise InputError(f"{self.where}.{name}: {problem}; give numbers or null") from problem
        values[~np.isfinite(values)] = np.nan
        values = np.clip(values, -_HUGE, _HUGE)
        return np.where(np.abs(values) < 1 / _HUGE, 0.0, values) if values.size else values


def known(values: Array) -> Array:
    """The finite entries."""
    return values[np.isfinite(values)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
