"""Measurement: what it refuses, how it reads, and that it survives JSON."""

import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.errors import InputError
from surefoot.measure.measurement import Kind, Measurement

FULL = Measurement(
    "L1",
    0.25,
    "estimate",
    "estimate",
    "pinball fit",
    samples=12_000,
    seed=3,
    dtype="float32",
    error=0.0123,
    unit="1/m",
    cost="3 extra gradients a step",
    notes=("not identifiable", "range below half a decade"),
    details={"slope": 0.9, "points": [1, 2], "by layer": {"0.weight": None}},
)


@pytest.mark.parametrize("measured", [FULL, Measurement("x", 1, "exact", "audited", "by hand")])
def test_it_survives_json(measured: Measurement) -> None:
    text = json.dumps(measured.to_json(), allow_nan=False)
    assert Measurement.from_json(json.loads(text)) == measured


@given(st.floats(allow_nan=False), st.sampled_from(["upper bound", "lower bound", "exact", "estimate", "assumed"]))
@settings(max_examples=50, deadline=None)
def test_every_value_survives_json(value: float, kind: Kind) -> None:
    measured = Measurement("x", value, kind, "estimate", "by hand")
    again = Measurement.from_json(json.loads(json.dumps(measured.to_json(), allow_nan=False)))
    assert again == measured
    assert math.copysign(1, again.value) == math.copysign(1, value)


def test_infinity_is_a_word_in_json() -> None:
    document = Measurement("x", -math.inf, "lower bound", "verified", "nothing is known").to_json()
    assert document["value"] == "-inf"
    assert Measurement.from_json(document).value == -math.inf


def test_the_shortest_document_is_enough() -> None:
    document = {"name": "x", "value": "inf", "kind": "upper bound", "level": "estimate", "how": "by hand"}
    assert Measurement.from_json(document) == Measurement("x", math.inf, "upper bound", "estimate", "by hand")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "guess"}, "kind='guess'"),
        ({"level": "proved"}, "level='proved'"),
        ({"kind": "estimate", "level": "verified"}, "level='verified' goes with a bound .* not with kind='estimate'"),
        ({"kind": "assumed", "level": "audited"}, "level='audited' goes with a bound .* not with kind='assumed'"),
        ({"level": "verified", "dtype": "float32"}, "dtype='float32' cannot be verified"),
        ({"level": "audited", "dtype": "bfloat16"}, "dtype='bfloat16' cannot be audited"),
        ({"value": math.nan}, "value=nan of x is no number"),
    ],
)
def test_it_refuses(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"name": "x", "value": 1.0, "kind": "lower bound", "level": "verified", "how": "by hand"}
    assert Measurement(**good).proves
    with pytest.raises(InputError, match=message):
        Measurement(**(good | changes))
    with pytest.raises(InputError, match=message):
        Measurement.from_json(good | changes)


def test_documents_that_are_no_measurements() -> None:
    document = FULL.to_json()
    with pytest.raises(InputError, match=r"fields that no measurement has: \['colour'\]"):
        Measurement.from_json(document | {"colour": "red"})
    for field in ("name", "value", "kind", "level", "how"):
        with pytest.raises(InputError, match=rf"\['{field}'\] missing"):
            Measurement.from_json({key: value for key, value in document.items() if key != field})


@pytest.mark.parametrize("level", ["estimate", "verified", "audited"])
def test_what_proves(level: Any) -> None:
    assert Measurement("x", 1, "upper bound", level, "by hand").proves == (level != "estimate")


def test_it_is_a_number_and_stays_as_it_is() -> None:
    measured = Measurement("x", 2, "exact", "estimate", "by hand", notes=["one"])  # type: ignore[arg-type]
    assert float(measured) == 2.0
    assert isinstance(measured.value, float)
    assert measured.notes == ("one",)
    with pytest.raises(FrozenInstanceError):
        measured.value = 3.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "sign"),
    [("upper bound", "<="), ("lower bound", ">="), ("exact", "="), ("estimate", "~"), ("assumed", "~")],
)
def test_the_sign_says_the_kind(kind: Kind, sign: str) -> None:
    assert str(Measurement("x", 0.5, kind, "estimate", "by hand")).startswith(f"x {sign} 0.5 (")


def test_it_prints_all_it_knows_once() -> None:
    assert str(FULL) == (
        "L1 ~ 0.25 ± 0.012 1/m (estimate: pinball fit; n = 12,000; seed 3; float32; 3 extra gradients a step); "
        "not identifiable; range below half a decade"
    )


def test_it_prints_no_more_than_it_knows() -> None:
    assert str(Measurement("x", 1 / 3, "lower bound", "verified", "Cholesky", error=1e-9)) == (
        "x >= 0.333333 (lower bound, verified: Cholesky; float64)"
    )
