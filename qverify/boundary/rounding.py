"""Rationals as floats and as decimals: how bounds are rounded for the runtime, and back."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def as_decimal(value: Fraction, upward: bool) -> str:
    """`value` in decimals: exactly if these end, else rounded far behind the digits of a double."""
    digits = max(value.denominator.bit_length() // 3 + 30, 60)
    scaled = value * 10**digits
    whole = (
        -(-scaled.numerator // scaled.denominator)
        if upward
        else scaled.numerator // scaled.denominator
    )
    if value.denominator & (value.denominator - 1) == 0:
        digits = max(value.denominator.bit_length() - 1, 0)  # 2**-k has k decimals
        whole = int(value * 10**digits)
    sign, text = ("-" if whole < 0 else ""), str(abs(whole)).rjust(digits + 1, "0")
    head, tail = text[: len(text) - digits], text[len(text) - digits :].rstrip("0")
    return f"{sign}{head}" + (f".{tail}" if tail else "")


def nudged_decimal(end: Fraction, towards: Fraction) -> str:
    """A decimal strictly between two rationals, next to `end`, or `end` where they are equal."""
    return as_decimal(end + (towards - end) / 2**40, upward=towards > end)


def float32s(value: Fraction) -> tuple[np.float32, np.float32]:
    """`value` rounded to float32, at once and by way of float64.

    The two differ where the double is halfway between two float32.
    """
    double = as_double(value)
    with np.errstate(over="ignore"):
        twice = np.float32(double)
    if float(twice) == double or not np.isfinite(twice):
        return twice, twice
    other = np.nextafter(twice, np.float32(np.inf if double > float(twice) else -np.inf))
    if 2 * double != float(twice) + float(other) or Fraction(double) == value:
        return twice, twice
    return (max if value > double else min)(twice, other), twice


def double_above(value: Fraction) -> float:
    """The least double that is at least `value`."""
    double = as_double(value)
    if np.isinf(double):
        return double if double > 0 else float(-np.finfo(np.float64).max)
    return double if Fraction(double) >= value else float(np.nextafter(double, np.inf))


def as_double(value: Fraction) -> float:
    """The nearest double; infinite beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
