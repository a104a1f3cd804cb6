import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.measure.rounding import TINY, U, down, gam, norm_up, power_of_two, sum_up, up

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(k=st.integers(0, 2**40))
@settings(deadline=None, max_examples=100)
def test_gam_is_an_upper_bound_and_close(k: int) -> None:
    exact = Fraction(k, 2**53) / (1 - Fraction(k, 2**53))
    assert exact <= Fraction(gam(k))
    assert gam(k) <= float(exact) * (1 + 1e-15) + 1e-300


@pytest.mark.parametrize("k", [-1, 2**52 + 1])
def test_gam_refuses(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}"):
        gam(k)


@given(a=FINITE, b=FINITE)
@settings(deadline=None, max_examples=200)
def test_one_operation_rounds_outward(a: float, b: float) -> None:
    for rounded, exact in ((a + b, Fraction(a) + Fraction(b)), (a * b, Fraction(a) * Fraction(b))):
        low, high = down(rounded), up(rounded)
        assert math.isinf(low) or Fraction(low) < exact
        assert math.isinf(high) or Fraction(high) > exact


@given(terms=st.lists(st.floats(-1e300, 1e300), max_size=20))
@settings(deadline=None, max_examples=100)
def test_sum_up(terms: list[float]) -> None:
    assert Fraction(sum_up(*terms)) > sum(map(Fraction, terms))


@given(
    x=st.lists(st.floats(-1.0, 1.0, width=64), min_size=1, max_size=12),
    exponent=st.integers(-1080, 1020),
)
@settings(deadline=None, max_examples=200)
def test_norm_up_at_every_scale(x: list[float], exponent: int) -> None:
    tensor = torch.tensor(x, dtype=torch.float64) * math.ldexp(1.0, max(exponent, -1074))
    squares = sum(Fraction(v) ** 2 for v in tensor.tolist())
    found = norm_up(tensor)
    assert Fraction(found) ** 2 >= squares
    # and no worse than its rounding: 1e-14 relative, or the last denormal
    assert Fraction(found) ** 2 <= squares * (1 + Fraction(1, 10**14)) + Fraction(2) ** -2100


def test_norm_up_of_many_small_beside_one_large() -> None:
    x = torch.full((100_000,), 1e-8, dtype=torch.float64)
    x[0] = 1.0
    assert norm_up(x) ** 2 >= 1 + 99_999e-16


def test_norm_up_of_nothing_and_of_no_numbers() -> None:
    assert norm_up(torch.zeros(3, 4)) == norm_up(torch.zeros(0)) == 0.0
    assert norm_up(torch.tensor([1.0, math.inf])) == norm_up(torch.tensor([math.nan, 1.0])) == math.inf


def test_norm_up_of_a_strided_float32_view() -> None:
    x = torch.arange(12, dtype=torch.float32).view(3, 4).T[1:]
    assert norm_up(x) == pytest.approx(float(x.double().norm()), rel=1e-14)
    assert norm_up(x) >= math.sqrt(sum(v * v for v in x.flatten().tolist()))


@pytest.mark.parametrize("top", [1.0, 0.75, 3.7, 1e300, 1e-300])
def test_power_of_two(top: float) -> None:
    assert 0.5 <= top * power_of_two(top) <= 1.0
    assert math.frexp(power_of_two(top))[0] == 0.5


@pytest.mark.parametrize("top", [5e-324, 1.7e308])
def test_power_of_two_is_a_normal_number(top: float) -> None:
    assert TINY <= power_of_two(top) < math.inf
    assert top * power_of_two(top) <= 4.0


def test_the_constants() -> None:
    assert 1.0 + U == 1.0
    assert 1.0 + 2 * U > 1.0
    assert float(torch.finfo(torch.float64).tiny) == TINY
