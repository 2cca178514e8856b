"""The rows of a property as linear functions of network integers, to be refuted by backward bounds.

An output value Y is, up to a known remainder, a multiple of the integer behind it: Y = (a v + e) * 2**unit with integers
a, v and lower <= e <= upper (a dequantized code exactly, up to the float32 rounding of its table; a scaled accumulator up
to the rounding of its multiplication). So an integer bound tells how small a row can be on a box.

Sound: coefficients are scaled to integers exactly, remainders are replaced by their worst value, and the comparison with
the right-hand side is made between integers, rounded to the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.bounds.backward import Backward
from qverify.ops import Interval
from qverify.ops.relax import TooLarge
from qverify.property import Row

IntArray = npt.NDArray[np.int64]
COEFFICIENT = 2**24  # rows with larger integer coefficients are left to interval bounds
WIDEST = 2**48  # magnitude of a row's multipliers and constants


@dataclass(frozen=True, eq=False)
class Line:
    """Output elements as lines over value v: Y[i] = (slope[i] * v.flat[i] + e) * 2**unit, lower[i] <= e <= upper[i]."""

    value: int
    slope: IntArray
    lower: IntArray
    upper: IntArray
    unit: int


@dataclass(frozen=True, eq=False)
class Margins:
    """For each supported row, -(row value) / 2**unit <= sum of weights . values + constant; a row is refuted on a box where
    an upper bound of the right side is at most `threshold`."""

    rows: npt.NDArray[np.intp]  # numbers of the supported rows
    weights: Mapping[int, IntArray]  # value -> [rows, *shape]
    constant: IntArray  # [rows]
    threshold: IntArray  # [rows]

    def refuted(self, backward: Backward, boxes: list[Interval]) -> npt.NDArray[np.bool_]:
        """Which supported rows fail everywhere on each box: bool [N, rows]. `boxes` are of every network value."""
        kernels, n = backward.kernels, boxes[0][0].shape[0]
        try:
            start = {
                value: kernels.xp.broadcast_to(kernels.asarray(own), (n, *own.shape))
                for value, own in self.weights.items()
            }
            bound = kernels.to_host(backward.upper(boxes, start)) + self.constant
        except TooLarge:
            return np.zeros((n, len(self.rows)), np.bool_)
        result: npt.NDArray[np.bool_] = bound <= self.threshold
        return result


def make_margins(
    rows: Sequence[Row], lines: Sequence[Line | None], shapes: Mapping[int, tuple[int, ...]]
) -> Margins | None:
    """Compile rows over outputs described by `lines` (in output order); `shapes` gives each value's shape. None if no row
    can be expressed."""
    starts = np.cumsum([0, *(0 if line is None else len(line.slope) for line in lines)])
    if any(line is None for line in lines):
        return None
    known = [line for line in lines if line is not None]
    unit = min(line.unit for line in known)
    if any(line.unit - unit > 40 for line in known):
        return None
    numbers, compiled = [], []
    for number, row in enumerate(rows):
        found = _compile(row, known, starts, unit, shapes)
        if found is not None:
            numbers.append(number)
            compiled.append(found)
    if not numbers:
        return None
    weights = {
        value: np.stack([c[0].get(value, np.zeros(shapes[value], np.int64)) for c in compiled])
        for value in sorted({line.value for line in known})
    }
    constant = np.array([c[1] for c in compiled], np.int64)
    threshold = np.array([c[2] for c in compiled], np.int64)
    return Margins(np.array(numbers, np.intp), weights, constant, threshold)


def _compile(row: Row, lines: Sequence[Line], starts: Any, unit: int, shapes: Mapping[int, tuple[int, ...]]) -> Any:
    """(weights by value, constant, threshold) of one row, as Python and NumPy integers; None if it is not supported."""
    if row.x or not row.y:
        return None
    scale = lcm(*(c.denominator for _, c in row.y))
    weights: dict[int, IntArray] = {}
    constant = 0
    for index, c in row.y:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        line, at = lines[part], index - int(starts[part])
        factor = int(c * scale) << (line.unit - unit)
        if abs(int(c * scale)) > COEFFICIENT or abs(factor * int(line.slope[at])) > WIDEST:
            return None
        own = weights.setdefault(line.value, np.zeros(shapes[line.value], np.int64))
        own.reshape(-1)[at] -= factor * int(line.slope[at])
        constant += max(-factor * int(line.lower[at]), -factor * int(line.upper[at]))
    limit = -row.rhs * scale / Fraction(2) ** unit
    threshold = limit.numerator // limit.denominator if row.strict else -(-limit.numerator // limit.denominator) - 1
    if abs(constant) > 2**61 or abs(threshold) > 2**61:
        return None
    return weights, constant, threshold
