"""Inputs of a counterexample: float32 in a cell that satisfy conditions under every reading.

An input in a condition may be read as the decimal that a witness prints, as the double nearest to
it, or as the float32 that is fed. A counterexample needs all of them; a proof that there is none
needs that none of them will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from qverify.boundary.cells import may_hold, solve_in_cell
from qverify.boundary.domain import Domain
from qverify.boundary.rounding import float32s
from qverify.errors import SpecError
from qverify.property import Row

Float64Array = npt.NDArray[np.float64]


def solve_certain(
    domain: Domain, rows: Sequence[Row], y: Float64Array, first: Float64Array, last: Float64Array
) -> Float64Array | None:
    """Inputs in [first, last] for which all rows hold at outputs `y` under every reading, or None.

    They lie inside the box under every reading, too. A float32 inside the exact box is printed as
    it is, so all of its readings are one. Where an input has none, it is printed as a decimal
    beside it, and every row must hold for both. (A few float32 at the bounds of a box are not
    tried.)
    """
    first, last = np.maximum(first, domain.certain[0]), np.minimum(last, domain.certain[1])
    if (first > last).any():
        return None
    used = sorted({i for row in rows for i, _ in row.x})
    if not used:
        return (
            domain.middle(first, last)
            if may_hold(rows, y, first, last, domain.encoder.is_float)
            else None
        )
    left = list(rows)
    for i in used:
        if not domain.encoder.is_float[i]:
            continue
        low, high = _within(first[i], last[i], domain.box.lower[i], domain.box.upper[i])
        if low <= high:
            first[i], last[i] = low, high
            continue
        try:
            text = domain.decimal_for(i, float(first[i]), exactly=True)
        except SpecError:
            return None
        values = Fraction(text), Fraction(float(text)), Fraction(float(first[i]))
        last[i] = first[i]
        left = [_fixed(row, i, values) for row in left]
    return solve_in_cell(left, y, first, last, domain.encoder.is_float)


def _within(first: float, last: float, low: Fraction, high: Fraction) -> tuple[float, float]:
    """The least and the largest float32 of [first, last] that lie in [low, high] exactly."""
    up, down = float32s(low)[0], float32s(high)[0]
    up = np.nextafter(up, np.float32(np.inf)) if Fraction(float(up)) < low else up
    down = np.nextafter(down, np.float32(-np.inf)) if Fraction(float(down)) > high else down
    return max(first, float(up)), min(last, float(down))


def _fixed(row: Row, i: int, values: Sequence[Fraction]) -> Row:
    """The row with X_i replaced by the worst of some values."""
    x = tuple((k, c) for k, c in row.x if k != i)
    worst = max((c * value for k, c in row.x if k == i for value in values), default=Fraction(0))
    return Row(x, row.y, row.rhs - worst, row.strict)
