"""The unsafe set of one query, asked of output boxes: refuted, open, or certain, case by case.

Sound: a case is refuted only if some row fails for every output in the box, in exact arithmetic.
A row's least value is compared with its right-hand side in float64 where that is proved exact
(every output is a multiple of a common power of two and the sum stays below 2**53 of them), or
where the two lie further apart than rounding errors (underflow included) can reach; everything else
is decided with Fractions. Outputs and inputs are finite float32 or integers of at most 32 bits;
decimals in a property may be anything, so rows are scaled into float64's range.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.deadline import looking
from qverify.property import Case, Query, Row

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

REFUTED, OPEN, CERTAIN = 0, 1, 2
HALF_ULP = 2.0**-53
# Times HALF_ULP: more than a coefficient, a product or a right-hand side that underflows can lose.
TINY = 2.0**-800
HUGE = Fraction(2) ** 400  # beyond the value of every scaled row


@dataclass(frozen=True)
class Grid:
    """What is known of the output values."""

    unit: tuple[int | None, ...]  # [outputs]: they are multiples of 2**unit; None: unknown
    largest: tuple[float, ...]  # [outputs]: the largest magnitude


@dataclass(frozen=True, eq=False)
class Matrix:
    """Rows of coefficients, nearly all of them 0: entry e adds coefficient[e] * x[index[e]] to the
    last row whose entries begin at or before e. Every row has an entry."""

    index: npt.NDArray[np.intp]  # [E]
    coefficient: Float64Array  # [E]
    start: npt.NDArray[np.intp]  # [rows]
    columns: int

    @staticmethod
    def make(rows: Iterable[Sequence[tuple[int, Fraction]]], columns: int) -> Matrix:
        """Make a matrix from the terms (index, coefficient) of every row."""
        index: list[int] = []
        coefficient: list[float] = []
        start: list[int] = []
        for terms in looking(rows, 1024):
            start.append(len(index))
            index += [i for i, _ in terms] or [0]
            coefficient += [float(c) for _, c in terms] or [0.0]
        return Matrix(
            np.array(index, np.intp), np.array(coefficient), np.array(start, np.intp), columns
        )

    @functools.cached_property
    def longest(self) -> int:
        """The number of entries of the longest row."""
        return int(np.diff(self.start, append=len(self.index)).max(initial=1))

    def range(
        self, lower: Float64Array, upper: Float64Array
    ) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Least and largest value of every row over boxes [N, columns], and the sum of its terms'
        magnitudes: [N, rows]."""
        if not len(self.start):  # reduceat wants a row
            return (np.zeros((len(lower), 0)),) * 3
        low, high = lower[:, self.index] * self.coefficient, upper[:, self.index] * self.coefficient
        size = np.maximum(np.abs(low), np.abs(high))
        parts = (np.minimum(low, high), np.maximum(low, high), size)
        least, most, sizes = (np.add.reduceat(part, self.start, axis=1) for part in parts)
        return least, most, sizes

    def dense(self, rows: npt.NDArray[np.intp]) -> Float64Array:
        """Some rows [N], in full: [N, columns]."""
        result = np.zeros((len(rows), self.columns))
        count = np.diff(self.start, append=len(self.index))[rows]
        # The numbers of all their entries, one row's after another's.
        first = np.concatenate([[0], np.cumsum(count)[:-1]]) if len(rows) else count
        entry = np.arange(count.sum()) + np.repeat(self.start[rows] - first, count)
        result[np.repeat(np.arange(len(rows)), count), self.index[entry]] = self.coefficient[entry]
        return result


@dataclass(frozen=True, eq=False)
class Unsafe:
    """The rows of a query over Y (and X), and which rows make up each case."""

    rows: tuple[Row, ...]
    cases: tuple[tuple[int, ...], ...]  # each case's row numbers
    y_matrix: Matrix  # [rows, outputs]
    x_matrix: Matrix | None  # [rows, inputs]; None if no row mentions an input
    threshold: Float64Array  # [rows]: the row holds iff its value <= threshold, where `exact`
    exact: BoolArray  # [rows]: float64 evaluation cannot round

    @property
    def case_rows(self) -> tuple[Case, ...]:
        """The rows of every case."""
        return tuple(tuple(self.rows[r] for r in case) for case in self.cases)

    @property
    def mixed(self) -> bool:
        """Whether some row mentions an input."""
        return self.x_matrix is not None

    def row_bounds(
        self, y: tuple[Float64Array, Float64Array], x: tuple[Float64Array, Float64Array] | None
    ) -> Any:
        """Least and largest value of every row over the boxes (float64 [N, rows], possibly
        rounded), and the sum of the terms' magnitudes, which bounds the rounding error."""
        low, high, size = self.y_matrix.range(*y)
        if self.x_matrix is not None:
            assert x is not None
            more = self.x_matrix.range(*x)
            low, high, size = low + more[0], high + more[1], size + more[2]
        return low, high, size

    def status(
        self,
        y: tuple[Float64Array, Float64Array],
        x: tuple[Float64Array, Float64Array] | None = None,
    ) -> npt.NDArray[np.int8]:
        """REFUTED, OPEN or CERTAIN for each box and case: int8 [N, cases]. Never OPEN on points,
        unless rows mention inputs."""
        low, high, size = self.row_bounds(y, x)
        # Each of these loses at most half an ulp: a coefficient, its product, every sum of a row
        # (one fewer than its terms), the threshold, and value - threshold. Two more halves pay for
        # products of errors and the rounding of `size` itself. (Higham, "Accuracy and Stability of
        # Numerical Algorithms", 2002, section 3.1.)
        terms = self.y_matrix.longest + (0 if self.x_matrix is None else self.x_matrix.longest)
        slack = np.where(
            self.exact, 0.0, (size + np.abs(self.threshold) + TINY) * ((terms + 4) * HALF_ULP)
        )
        possible = self._decide(low, slack, y, x, least=True)
        sure = self._decide(high, slack, y, x, least=False)
        # A row whose least value fails, fails everywhere; one whose largest value holds, holds
        # everywhere. A case is a conjunction of rows.
        result = np.empty((len(low), len(self.cases)), np.int8)
        for cases, rows in self._cases_by_length:
            certain, open_ = sure[:, rows].all(axis=2), possible[:, rows].all(axis=2)
            result[:, cases] = np.where(certain, CERTAIN, np.where(open_, OPEN, REFUTED))
        return result

    @functools.cached_property
    def _cases_by_length(self) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
        """The cases in groups of the same number of rows: case numbers [M], row numbers [M, L]."""
        groups: dict[int, list[int]] = {}
        for k, case in enumerate(self.cases):
            groups.setdefault(len(case), []).append(k)
        return [
            (
                np.array(cases, np.intp),
                np.array([self.cases[k] for k in cases], np.intp).reshape(len(cases), length),
            )
            for length, cases in groups.items()
        ]

    def _decide(
        self, value: Float64Array, slack: Float64Array, y: Any, x: Any, least: bool
    ) -> BoolArray:
        """Whether each row holds at its least (or largest) value: [N, rows]."""
        holds: BoolArray = value <= self.threshold
        close = ~self.exact & (np.abs(value - self.threshold) <= slack)
        for i, r in zip(*np.nonzero(close), strict=True):
            box = [(lower[i], upper[i]) for lower, upper in ([y] if x is None else [y, x])]
            holds[i, r] = _holds_exactly(self.rows[r], box, least)
        return holds

    def slack(
        self, y: Float64Array, x: Float64Array | None = None
    ) -> tuple[Float64Array, npt.NDArray[np.intp]]:
        """A guide: how far each case is from being unsafe at points, and its worst row: [N, cases].

        The slack is min over rows of (rhs - value); it is >= 0 where the case is unsafe (up to
        rounding).
        """
        return self.slack_of(self.row_bounds((y, y), None if x is None else (x, x))[0])

    def slack_of(self, values: Float64Array) -> tuple[Float64Array, npt.NDArray[np.intp]]:
        """`slack` for given row values [N, rows]."""
        room = self.threshold - values
        best = np.full((len(values), len(self.cases)), np.inf)
        row = np.zeros((len(values), len(self.cases)), np.intp)
        for cases, rows in self._cases_by_length:
            if rows.shape[1]:
                of_cases = room[:, rows]
                worst = of_cases.argmin(axis=2)
                best[:, cases] = np.take_along_axis(of_cases, worst[:, :, None], axis=2)[:, :, 0]
                row[:, cases] = rows[np.arange(len(rows)), worst]
        return best, row


def _holds_exactly(row: Row, box: Sequence[tuple[Float64Array, Float64Array]], least: bool) -> bool:
    """Whether a row holds at its least (or largest) value over a box: bounds of y, and of x where
    the row mentions inputs."""
    total = Fraction(0)
    for terms, (lower, upper) in zip((row.y, row.x), box, strict=False):
        for index, coefficient in terms:
            extreme = lower if (coefficient > 0) == least else upper
            total += coefficient * Fraction(float(extreme[index]))
    return total < row.rhs if row.strict else total <= row.rhs


def make_unsafe(query: Query, inputs: int, grid: Grid) -> Unsafe:
    """Compile a query's cases for `inputs` input elements and the outputs of `grid`."""
    numbers: dict[Row, int] = {}
    cases = tuple(
        tuple(numbers.setdefault(row, len(numbers)) for row in case)
        for case in looking(query.cases, 1024)
    )
    rows = tuple(_scaled(row) for row in looking(numbers, 1024))
    y_matrix = Matrix.make((row.y for row in rows), len(grid.unit))
    x_matrix = Matrix.make((row.x for row in rows), inputs) if any(row.x for row in rows) else None
    threshold, exact = np.zeros(len(rows)), np.zeros(len(rows), np.bool_)
    for r, row in enumerate(looking(rows, 1024)):
        threshold[r], exact[r] = _threshold(row, grid)
    return Unsafe(rows, cases, y_matrix, x_matrix, threshold, exact)


def _scaled(row: Row) -> Row:
    """The row, multiplied by a power of two if its coefficients come near the range of float64."""
    largest = max((abs(c) for _, c in (*row.x, *row.y)), default=Fraction(1))
    exponent = largest.numerator.bit_length() - largest.denominator.bit_length()
    if abs(exponent) <= 64:
        return row
    factor = Fraction(2) ** -exponent
    x, y = (tuple((i, c * factor) for i, c in terms) for terms in (row.x, row.y))
    return Row(x, y, row.rhs * factor, row.strict)


def _threshold(row: Row, grid: Grid) -> tuple[float, bool]:
    """The float64 t with "row holds iff value <= t", and whether value is computed without
    rounding. If it is not, t is rhs, rounded.

    Exact because all products and partial sums are multiples of one power of two, u, and below
    2**53 of them: float64 holds each. On multiples of u, value <= rhs iff value <= floor(rhs / u)
    u, and value < rhs iff value <= (ceil(rhs / u) - 1) u, which turns any rhs into such a multiple.
    """
    rounded = float(max(min(row.rhs, HUGE), -HUGE))
    if row.x:
        return rounded, False
    units = []
    reach = Fraction(0)  # no partial sum has a larger magnitude
    for index, c in row.y:
        unit = grid.unit[index]
        power = power_of_two(c)
        if unit is None or power is None or not isfinite(grid.largest[index]):
            return rounded, False
        units.append(unit + power)
        reach += abs(c) * Fraction(grid.largest[index])
    step = Fraction(2) ** min(units, default=0)
    if reach / step >= 2**53:
        return rounded, False
    multiple = -(-row.rhs // step) - 1 if row.strict else row.rhs // step
    limit = reach / step + 1  # beyond every value: clamping there changes no comparison
    whole = max(min(Fraction(multiple), limit), -limit - 1)
    return float(Fraction(int(whole)) * step), True


def power_of_two(c: Fraction) -> int | None:
    """The largest p with c a multiple of 2**p, for a dyadic c that float64 holds exactly and with
    room to spare; None otherwise."""
    if c.denominator & (c.denominator - 1):
        return None
    trailing = (c.numerator & -c.numerator).bit_length() - 1
    if abs(c.numerator) >> trailing >= 2**53:
        return None
    power = trailing - (c.denominator.bit_length() - 1)
    # Times a float32's unit, 2**-149 or more: no product underflows.
    return power if power >= -900 else None
