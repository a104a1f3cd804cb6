"""The rows a run leaves behind: one a step, one an evaluation, as columns in parquet files."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from surefoot.errors import InputError
from surefoot.train.files import write_bytes

STEP_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "lr",
    "gamma",
    "delta",
    "scale",
    "regime",
    "step_length",
)
SMOOTHNESS_COLUMNS = (
    "step",
    "loss",
    "grad_norm",
    "step_length",
    "smoothness",
    "noise",
    "rounding",
    "outcome",
    "ratios",
)
LAST_LAYER_COLUMNS = ("step", "loss", "bound")
CERTIFIED_COLUMNS = ("step", "residual", "envelope", "distance", "path", "step_size")


class Table:
    """Columns of numbers and words that grow by rows and are written whole.

    Args:
        columns: names; rows give a value for each. NaN stands for "does not apply".
    """

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in columns}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; its names must be the columns'."""
        assert row.keys() == self.columns.keys(), (row.keys(), self.columns.keys())
        for name, value in row.items():
            self.columns[name].append(value)

    def write(self, path: Path) -> None:
        """Write the parquet file whole."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        pq.write_table(pa.table({k: pa.array(v, type=_arrow_type(k)) for k, v in self.columns.items()}), buffer)
        write_bytes(path, buffer.getvalue())

    def load(self, path: Path, *, through: int) -> None:
        """Take over the rows of a file with step <= `through`."""
        import pyarrow.parquet as pq

        try:
            stored = pq.read_table(path).to_pydict()
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a parquet file: {error}") from error
        if stored.keys() != self.columns.keys():
            raise InputError(f"{path} has the columns {list(stored)}, not {list(self.columns)}")
        keep = [i for i, step in enumerate(stored["step"]) if step <= through]
        self.columns = {name: [values[i] for i in keep] for name, values in stored.items()}


def _arrow_type(name: str) -> Any:
    import pyarrow as pa

    special = {"step": pa.int64(), "regime": pa.string(), "outcome": pa.string(), "ratios": pa.list_(pa.float64())}
    return special.get(name, pa.float64())


def thinned(columns: dict[str, list[Any]], most: int = 2000) -> dict[str, Any]:
    """Return every k-th row as JSON columns, k as small as keeps them to `most`, with `rows` and `stride` beside.

    Within each run of k rows the one with the largest gradient norm is taken, so that no spike is lost.
    """
    rows = len(columns["step"])
    stride = max(1, math.ceil(rows / most))
    norms = columns["grad_norm"]
    picked = [
        max(range(i, min(i + stride, rows)), key=lambda j: norms[j] if math.isfinite(norms[j]) else math.inf)
        for i in range(0, rows, stride)
    ]
    series: dict[str, Any] = {name: [json_number(values[i]) for i in picked] for name, values in columns.items()}
    return {**series, "rows": rows, "stride": stride}


def json_number(value: Any) -> Any:
    """Return None for a NaN or an infinity, else the value."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
