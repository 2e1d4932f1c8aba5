"""Numbers as the report prints them: bytes, shares, changes, errors."""

from __future__ import annotations

import math
from typing import Literal

Tone = Literal["", "good", "bad", "muted"]


def human_bytes(count: float) -> str:
    """1,234,567 -> 1.23 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return (
                f"{count:.0f} B"
                if unit == "B"
                else f"{significant(count)} {unit}"
                if count < 999.5
                else f"{count:,.0f} {unit}"
            )
        count /= 1000
    raise AssertionError


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent down to 0.00001."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits - 1}e}" if places > 7 else f"{value:.{places}f}"


def quantity(value: float) -> str:
    """A perplexity: two places, or none and separators from 10,000 on."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.2f}"


def percent(value: float, places: int = 2) -> str:
    """0.1234 -> 12.34 %."""
    return f"{100 * value:.{places}f} %"


def signed(value: float, places: int) -> str:
    """+1.20, with a minus sign where it is one."""
    return f"{value:+.{places}f}".replace("-", "\u2212")


def signed_percent(value: float) -> str:
    """+0.012 % with as many places as show the change."""
    return f"{signed(100 * value, 3 if abs(value) < 0.01 else 2)} %"


def plus_minus(se: float | None, *, percent: bool = False) -> str:
    """± and two significant digits; empty where the error is not known."""
    if se is None:
        return ""
    if percent:
        return f"± {significant(100 * se, 2)} %"
    return f"± {quantity(se) if se >= 10_000 else significant(se, 2)}"


def tone(difference: float, se: float | None, *, higher_is_better: bool) -> Tone:
    """Colour only what two standard errors make certain."""
    if se is None or abs(difference) <= 2 * se:
        return ""
    return "good" if (difference > 0) == higher_is_better else "bad"
