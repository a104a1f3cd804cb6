"""A CSV file: a header, then rows of numbers; the target may be text."""

import csv
import math
from array import array
from pathlib import Path

import numpy as np

from surefoot.data.dataset import Dataset
from surefoot.data.options import Options
from surefoot.data.tables import table_dataset, target_columns
from surefoot.errors import InputError


def load_csv(source: str, path: Path, options: Options) -> Dataset:
    """Read the table in one pass, each cell checked where its line number is known.

    Args:
        source: What the user asked for.
        path: The file: UTF-8, commas, a header.
        options: `target`, `task`, `test_fraction`, `limit`, `seed` and `dtype` are used.

    Raises:
        InputError: The target is missing or unknown, a cell is empty or not a finite number (its line and column are
            named), the rows are uneven, or the file is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            return _load(source, path, reader, options)
        except UnicodeDecodeError as error:
            raise InputError(f"data {source!r} is not UTF-8 text ({error}): save it as UTF-8") from error
        except csv.Error as error:
            raise InputError(
                f"data {source!r}: line {reader.line_num} is not well-formed CSV ({error}): correct its quotes"
            ) from error


def _load(source: str, path: Path, reader, options: Options) -> Dataset:
    header = _header(source, reader)
    wanted = target_columns(source, options, header)
    inputs = [i for i, name in enumerate(header) if name not in wanted]
    cells = array("d")
    targets: dict[str, list[str]] = {name: [] for name in wanted}
    lines: list[int] = []
    for row in reader:
        if not row:
            continue
        line = reader.line_num
        if len(row) != len(header):
            raise InputError(
                f"data {source!r}: line {line} has {len(row)} cells, the header has {len(header)}: even them"
            )
        cells.extend([_number(source, row[i], line, header[i]) for i in inputs])
        for name in wanted:
            cell = row[header.index(name)].strip()
            if not cell:
                raise _trouble(source, cell, line, name)
            targets[name].append(cell)
        lines.append(line)
    if not lines:
        raise InputError(f"data {source!r} has a header and no rows: add some")
    return table_dataset(
        source,
        path.name,
        options,
        columns=[header[i] for i in inputs],
        features=np.frombuffer(cells).reshape(len(lines), len(inputs)),
        targets={name: _target(source, name, column, lines, options) for name, column in targets.items()},
        where=lambda row: f"line {lines[row]}",
        notes=[],
    )


def _header(source: str, reader) -> list[str]:
    header = [name.strip() for name in next(reader, [])]
    if not any(header):
        raise InputError(f"data {source!r} is empty or starts with an empty line: begin with a line of column names")
    if all(_is_number(name) for name in header):
        raise InputError(
            f"data {source!r}: the first line holds numbers ({', '.join(header[:4])}): begin with column names"
        )
    if "" in header:
        raise InputError(
            f"data {source!r}: column {header.index('') + 1} has no name: name it or remove it "
            f"(pandas leaves it out with index=False)"
        )
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise InputError(f"data {source!r}: two columns are called {twice[0]!r}: rename one")
    if len(header) == 1:
        raise InputError(
            f"data {source!r} has one column, {header[0]!r}: put commas between columns, and have two or more"
        )
    return header


def _target(source: str, name: str, cells: list[str], lines: list[int], options: Options) -> np.ndarray:
    """The cells as numbers if all of them are, as text if none is or classes were asked for."""
    numeric = [_is_number(cell) for cell in cells]
    if all(numeric):
        return np.array([_number(source, cell, line, name) for cell, line in zip(cells, lines)])
    if not any(numeric) or options.task == "classification":
        return np.array(cells)
    row = numeric.index(False)
    raise InputError(
        f"data {source!r}: line {lines[row]}, column {name!r} holds {cells[row]!r}, where other rows hold numbers: "
        f"correct it, or give task='classification' if {name!r} names classes"
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python's 1_000 is no number in a CSV


def _number(source: str, cell: str, line: int, column: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        raise _trouble(source, cell, line, column) from None
    if "_" in cell or not math.isfinite(value):
        raise _trouble(source, cell, line, column)
    return value


def _trouble(source: str, cell: str, line: int, column: str) -> InputError:
    what = f"holds {cell!r}, which is not a finite number" if cell.strip() else "is empty"
    return InputError(
        f"data {source!r}: line {line}, column {column!r} {what}: correct it, or remove the row or the column"
    )
