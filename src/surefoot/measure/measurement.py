"""Measurement: a number that says what kind of number it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from surefoot.errors import InputError

Kind = Literal["exact", "upper bound", "lower bound", "estimate", "assumed"]
Level = Literal["estimate", "verified", "audited"]


@dataclass(frozen=True)
class Measurement:
    """A measured number, what it may be used for, and how it came about.

    A bound proves only at the level "verified" (every rounding error counted, in float64) or "audited" (repeated in
    ball arithmetic). At the level "estimate" it is plain floating-point arithmetic: it can refute, never prove.

    Attributes:
        name: what was measured, as a reader would write it: "lambda_min(K)".
        value: the number. A bound may be infinite (nothing is known); never NaN.
        kind: "exact", "upper bound", "lower bound", "estimate" or "assumed" (somebody said so).
        level: "estimate", "verified" or "audited".
        how: the method in a few words: "shifted Cholesky and its residual".
        samples: how many samples, steps or probes it rests on; None where that has no meaning.
        seed: of the random numbers used; None where none were.
        dtype: of the arithmetic.
        error: of an estimate, its standard error or tolerance; of a bound, how far it may lie from the truth. Absolute,
            in the unit of the value; None where nobody knows.
        unit: of the value; "" for a pure number.
        cost: what it took, in the reader's terms: "3 extra gradients a step".
        notes: what a reader has to know besides: sentences, without a full stop at their end.
        details: more numbers that belong to it, as JSON has them.

    Raises:
        InputError: the value is NaN, or kind or level are none of the words above, or a bound of the wrong level.

    Example:
        >>> m = Measurement("lambda_min(K)", 0.0123, "lower bound", "verified", "shifted Cholesky and its residual")
        >>> print(m)
        lambda_min(K) >= 0.0123 (lower bound, verified: shifted Cholesky and its residual; float64)
        >>> Measurement.from_json(m.to_json()) == m
        True
    """

    name: str
    value: float
    kind: Kind
    level: Level
    how: str
    samples: int | None = None
    seed: int | None = None
    dtype: str = "float64"
    error: float | None = None
    unit: str = ""
    cost: str = ""
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"kind={self.kind!r} is no kind of measurement; choose one of {get_args(Kind)}")
        if self.level not in get_args(Level):
            raise InputError(f"level={self.level!r} is no level; choose one of {get_args(Level)}")
        if self.level != "estimate" and self.kind in ("estimate", "assumed"):
            raise InputError(f"level={self.level!r} goes with a bound or an exact number, not with kind={self.kind!r}")
        if self.level != "estimate" and self.dtype != "float64":
            raise InputError(f"dtype={self.dtype!r} cannot be {self.level}; measure in float64")
        if math.isnan(self.value):
            raise InputError(f"value={self.value!r} of {self.name} is no number")
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "notes", tuple(self.notes))

    def __float__(self) -> float:
        return self.value

    @property
    def proves(self) -> bool:
        """Whether a theorem may build on it."""
        return self.level != "estimate"

    def __str__(self) -> str:
        sign = {"upper bound": "<=", "lower bound": ">=", "exact": "="}.get(self.kind, "~")
        value = _number(self.value, self.kind)
        if self.error is not None and self.kind == "estimate":
            value += f" ± {self.error:.2g}"
        if self.unit:
            value += f" {self.unit}"
        about = [f"{self.kind}, {self.level}: {self.how}" if self.kind != "estimate" else f"estimate: {self.how}"]
        if self.samples is not None:
            about.append(f"n = {self.samples:,}")
        if self.seed is not None:
            about.append(f"seed {self.seed}")
        about.append(self.dtype)
        if self.cost:
            about.append(self.cost)
        return f"{self.name} {sign} {value} ({'; '.join(about)})" + "".join(f"; {note}" for note in self.notes)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold; infinities become the words "inf" and "-inf"."""
        found = asdict(self)
        found["value"] = self.value if math.isfinite(self.value) else str(self.value)
        found["notes"] = list(self.notes)
        return json.loads(json.dumps(found, allow_nan=False))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Measurement:
        """Return the measurement that `to_json` wrote.

        Raises:
            InputError: a field is missing or unknown.
        """
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(document) - known):
            raise InputError(f"document={sorted(document)} has fields that no measurement has: {unknown}")
        if missing := sorted({"name", "value", "kind", "level", "how"} - set(document)):
            raise InputError(f"document={sorted(document)} is no measurement: {missing} missing")
        return cls(**{**document, "value": float(document["value"]), "notes": tuple(document.get("notes", ()))})


def _number(value: float, kind: Kind) -> str:
    """Return six significant digits at most, a bound rounded to the safe side."""
    shown = float(f"{value:.6g}")
    wrong = shown < value if kind == "upper bound" else shown > value if kind == "lower bound" else False
    if wrong and math.isfinite(value):
        unit = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
        shown += unit if kind == "upper bound" else -unit
    return f"{shown:.6g}"
