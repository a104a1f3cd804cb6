"""Numbers as people read them."""

import doctest
import math

import pytest

from surefoot.report import build, formats
from surefoot.report.axes import log_label, log_ticks


@pytest.mark.parametrize("module", [formats, build])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.0, "0"),
        (1500, "1,500"),
        (0.034871, "0.03487"),
        (-2.5, "−2.5"),
        (4312.7, "4,313"),
        (0.99999, "1"),
        (1.0e-5, "1×10⁻⁵"),
        (3.25e12, "3.25×10¹²"),
        (10**20, "1×10²⁰"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (True, "yes"),
        ("some text", "some text"),
    ],
)
def test_number(value, text):
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, "0%"), (1, "100%"), (0.9996, ">99.9%"), (0.0004, "<0.1%"), (0.5, "50%"), (0.123456, "12.3%"), (None, "–")],
)
def test_percent_never_rounds_some_to_none(fraction, text):
    assert formats.percent(fraction) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.0042, "4.2 ms"), (0.5, "0.5 s"), (12.34, "12.3 s"), (252, "4 min 12 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds, text):
    assert formats.duration(seconds) == text


def test_mean_and_error_show_the_same_digits():
    assert formats.mean_se(1.23456, 0.031) == "1.235 ± 0.031"
    assert formats.mean_se(0.97, None, True) == "97.00%"
    assert formats.mean_se(0.5, 0.0) == "0.5 ± 0"
    assert formats.mean_se(None, None) == "–"
    assert formats.mean_se(1e-300, 1e-301) == "(1.00 ± 0.10)×10⁻³⁰⁰"


@pytest.mark.parametrize(("n", "text"), [(2, "2nd"), (3, "3rd"), (11, "11th"), (21, "21st"), (112, "112th")])
def test_ordinal(n, text):
    assert formats.ordinal(n) == text


@pytest.mark.parametrize(("bottom", "top"), [(0.9, 1.1), (0.2, 0.9), (0.03, 7), (1e-9, 1e4), (1e-140, 1e140), (2, 2.1)])
def test_log_axes_have_a_few_ticks_inside(bottom, top):
    ticks = log_ticks(bottom, top)
    assert 2 <= len(ticks) <= 10
    assert all(bottom * (1 - 1e-9) <= tick <= top * (1 + 1e-9) for tick in ticks)
    assert len({log_label(tick) for tick in ticks}) == len(ticks)
