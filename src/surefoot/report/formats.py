"""Numbers as people read them."""

import json
import math
from typing import Any, TypeGuard

MISSING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(exponent: int) -> str:
    """`10⁻³` for -3."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float; a bool is no number here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """A number to `digits` significant digits, whole numbers in full; a dash for None, other values as text.

    Example:
        >>> number(52650), number(0.0123456), number(3.1e-7), number(None)
        ('52,650', '0.01235', '3.1×10⁻⁷', '–')
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return anything(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        if value == 0:
            return "0"
        if not 1e-3 <= abs(value) < 1e6:
            mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
            return f"{_trimmed(mantissa)}×{power_of_ten(int(exponent))}".replace("-", "−")
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return _trimmed(f"{value:,.{decimals}f}").replace("-", "−")
    if abs(value) >= 10**15:
        return number(float(value), digits)
    return f"{value:,}".replace("-", "−")


def percent(fraction: Any, decimals: int = 1) -> str:
    """A fraction as a percentage that never rounds "some" to none, nor "not all" to all.

    Example:
        >>> percent(0.9722), percent(0.00001), percent(0.99999), percent(1)
        ('97.2%', '<0.1%', '>99.9%', '100%')
    """
    if not is_number(fraction):
        return number(fraction)
    small = 10.0**-decimals
    hundred = 100 * fraction
    if 0 < hundred < small:
        return f"<{small:.{decimals}f}%"
    if 100 - small < hundred < 100:
        return f">{100 - small:.{decimals}f}%"
    return f"{_trimmed(f'{hundred:.{decimals}f}')}%".replace("-", "−")


def quantity(value: Any, as_percent: bool = False) -> str:
    """A metric's value: 0.9722 as `97.22%` where it is a percentage, else as a number."""
    if as_percent and is_number(value) and abs(value) < 1e4:
        return f"{100 * value:.2f}%".replace("-", "−")
    return number(value)


def mean_se(mean: Any, se: Any, as_percent: bool = False) -> str:
    """`97.21 ± 0.34%`: the mean to the digits that its standard error (to two digits) supports.

    Example:
        >>> mean_se(0.97213, 0.0034, True), mean_se(1.234e-5, 2e-7), mean_se(0.5, None)
        ('97.21 ± 0.34%', '(1.234 ± 0.020)×10⁻⁵', '0.5')
    """
    if not is_number(mean) or not is_number(se) or se <= 0:
        text = quantity(mean, as_percent)
        return f"{text} ± 0" if is_number(mean) and se == 0 else text
    if as_percent and max(abs(mean), se) < 1e4:
        return f"{_plus_minus(100 * mean, 100 * se)}%"
    largest = max(abs(mean), se)
    if 1e-3 <= largest < 1e6:
        return _plus_minus(mean, se)
    exponent = math.floor(math.log10(largest))
    # Two divisions: 10**-exponent alone overflows for the smallest numbers.
    half = 10.0 ** (exponent // 2), 10.0 ** (exponent - exponent // 2)
    return f"({_plus_minus(mean / half[0] / half[1], se / half[0] / half[1])})×{power_of_ten(exponent)}"


def _plus_minus(mean: float, se: float) -> str:
    decimals = min(12, max(0, 1 - math.floor(math.log10(se)))) if se > 0 else 3
    return f"{mean:,.{decimals}f} ± {se:,.{decimals}f}".replace("-", "−")


def duration(seconds: Any) -> str:
    """`3.2 s`, `4 min 12 s`, `2 h 5 min`."""
    if not is_number(seconds):
        return MISSING
    if seconds < 0.1:
        return f"{number(1000 * seconds, 2)} ms"
    if seconds < 99.95:
        return f"{number(float(seconds), 3 if seconds >= 1 else 2)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{number(seconds / 86400, 3)} days"


def ordinal(n: int) -> str:
    """`2nd`, `3rd`, `11th`."""
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n:,}{ending}"


def plural(n: int, word: str) -> str:
    """`1 step`, `1,500 steps`."""
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def words(name: Any) -> str:
    """A key as words: `test_loss` becomes `test loss`."""
    return str(name).replace("_", " ")


def anything(value: Any) -> str:
    """Any JSON value in a table cell: numbers in full precision, lists separated by commas."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(anything(v) for v in value) or MISSING
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
