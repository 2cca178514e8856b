"""How the rows of a property may be read: with exact numbers, in double, or (VNN-LIB 2.x) float32.

A checker of counterexamples computes with floats: the one of VNN-COMP multiplies a matrix of
doubles for 1.0, and evaluates the expressions of 2.x in float32, with constants rounded to it. Near
a tie they disagree, with one another and with the rationals that the file spells. So every row has
two versions, both exact: whatever reading accepts a row, the `possible` one holds; and where the
`certain` one holds, every reading accepts. `unsat` is proved of the first, `sat` needs the second.

Sound because of the standard model of float arithmetic. An operation's result is the exact one
times 1 + d, |d| <= u (u = 2**-53 or 2**-24), plus at most 2**-150 where a product underflows; sums
do not. So in an evaluation that rounds a leaf k times, its share is off by at most k u / (1 - k u)
of itself, and a side is off by the sum of that over the leaves, whose magnitudes are bounded by the
ranges of inputs and outputs. Three cases are tighter. Comparing floats is exact, so a variable
against a constant depends on the constant's rounding only, and one variable against another on
nothing. A single operation is rounded monotonically, so its result is compared with a constant d as
the exact one with a border of d's cell; and a sum of two floats is zero only where it is zero
exactly. Sums that need no rounding (all leaves are small multiples of one power of two) are exact.
Integers are never rounded to float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.boundary.domain import Domain
from qverify.boundary.outputs import Decoder
from qverify.boundary.rounding import float32s
from qverify.bounds.unsafe import Grid, power_of_two
from qverify.deadline import looking
from qverify.property import Arithmetic, Case, Query, Row
from qverify.vnnlib.constraints import LEAST_NORMAL, is_scaled

SAFE = Fraction(1, 2**100)  # products of at least this do not underflow
ALWAYS, NEVER = Row((), (), Fraction(0)), Row((), (), Fraction(-1))
# Right-hand sides: accepted below the first, not above the second.
Interval = tuple[Fraction | float, Fraction | float]


@dataclass(frozen=True)
class Format:
    """A binary float format."""

    bits: int  # of a number, the significant ones
    top: int  # below 2**top nothing overflows
    bottom: int  # 2**bottom is the least positive number

    def rounded(self, value: Fraction) -> set[float]:
        """What a constant may become; infinite beyond the format."""
        if self is SINGLE:
            return {float(v) for v in float32s(value)}
        try:
            return {float(value)}
        except OverflowError:
            return {math.inf if value > 0 else -math.inf}

    def next(self, value: float, towards: float) -> float:
        """The neighbour of a number of the format."""
        if self is SINGLE:
            return float(np.nextafter(np.float32(value), np.float32(towards)))
        return math.nextafter(value, towards)


DOUBLE = Format(53, 1023, -1074)
SINGLE = Format(24, 127, -149)


@dataclass(frozen=True, eq=False)
class Readings:
    """The two versions of a query's rows; its cases keep their places."""

    query: Query
    possible: Query
    certain: Query  # the same object where reading makes no difference
    reader: _RowReader

    def at(self, case: int, y: npt.NDArray[np.float64]) -> tuple[Case, Case]:
        """The possible and the certain version of a case at outputs `y` [outputs].

        More is known of these outputs than of all, so the two versions are closer.
        """
        reader = _reader_at(self.reader, np.asarray(y, np.float64).tobytes())
        return _cases([reader.versions(row) for row in self.query.cases[case]])

    def accept(self, case: int, y: npt.NDArray[np.float64]) -> bool:
        """Whether some reading may accept a case about outputs only, at outputs `y` [outputs]."""
        for row in self.at(case, y)[0]:
            value = sum((c * Fraction(float(y[j])) for j, c in row.y), Fraction(0))
            if not (value < row.rhs if row.strict else value <= row.rhs):
                return False
        return True

    def certain_at(self, y: npt.NDArray[np.float64]) -> Query:
        """The certain version of the query at outputs `y` [outputs]."""
        if self.certain is self.possible:
            return self.certain
        return replace(
            self.query, cases=tuple(self.at(k, y)[1] for k in range(len(self.query.cases)))
        )


def make_readings(query: Query, domain: Domain, decoder: Decoder) -> Readings:
    """Read a query over the inputs of `domain` and the outputs of `decoder`."""
    least = np.where(decoder.is_float, 2.0**-149, 1.0)
    reader = _RowReader(
        query.float32, domain, Outputs(decoder.is_float, decoder.reach, least, decoder.grid)
    )
    known: dict[tuple[Row, Arithmetic | None], tuple[Row, Row]] = {}
    possible: list[Case] = []
    certain: list[Case] = []
    same = True
    for case in looking(query.cases, 1024):
        pairs = []
        for row in case:
            key = row, row.arithmetic
            if key not in known:
                known[key] = reader.versions(row)
            pairs.append(known[key])
            same = same and known[key][0] is known[key][1]
        one, other = _cases(pairs)
        possible.append(one)
        certain.append(other)
    wide = replace(query, cases=tuple(possible))
    return Readings(query, wide, wide if same else replace(query, cases=tuple(certain)), reader)


@dataclass(frozen=True, eq=False)
class Outputs:
    """What is known of the outputs: their types, the range of their magnitudes, their grid.

    A value that is not zero has a magnitude in [least, reach].
    """

    is_float: npt.NDArray[np.bool_]
    reach: npt.NDArray[np.float64]
    least: npt.NDArray[np.float64]
    grid: Grid

    @staticmethod
    def point(y: npt.NDArray[np.float64], is_float: npt.NDArray[np.bool_]) -> Outputs:
        """Known outputs."""
        size = np.abs(y)
        units = tuple(power_of_two(Fraction(float(v))) if v else 0 for v in y)
        return Outputs(
            is_float, size, np.where(size > 0, size, np.inf), Grid(units, tuple(size.tolist()))
        )


@dataclass(frozen=True, eq=False)
class _RowReader:
    float32: bool
    domain: Domain
    outputs: Outputs

    def versions(self, row: Row) -> tuple[Row, Row]:
        """The possible and the certain version of a row; the same object where they are equal."""
        terms = [*row.x, *row.y]
        if row.arithmetic is None and (len(terms) != 1 or abs(terms[0][1]) != 1):
            return row, row
        if row.bounds_input:
            return ALWAYS, self._certain_bound(row)
        found = [
            (row.rhs, row.rhs),
            *(pair for form in self._formats(row) for pair in self._right_sides(row, form)),
        ]
        low, high = min(low for low, _ in found), max(high for _, high in found)
        if low == high:
            both = row if row.arithmetic is None else replace(row, arithmetic=None)
            return both, both
        return _with(row, high), _with(row, low)

    def _certain_bound(self, row: Row) -> Row:
        """The certain version of a row about one input; ALWAYS where it holds in the whole domain.
        (The possible version is the bound that the box has of it.)"""
        least = min(
            low
            for low, _ in [
                (row.rhs, row.rhs),
                *(pair for f in self._formats(row) for pair in self._right_sides(row, f)),
            ]
        )
        certain = _with(row, least)
        if certain is NEVER:
            return certain
        ((i, c),) = certain.x
        largest = c * Fraction(float(self._hull[int(c > 0)][i]))
        holds = largest < certain.rhs if certain.strict else largest <= certain.rhs
        return ALWAYS if holds else certain

    def _formats(self, row: Row) -> list[Format]:
        floats = any(self.outputs.is_float[j] for j, _ in row.y) or any(
            self.domain.encoder.is_float[i] for i, _ in row.x
        )
        return [DOUBLE, SINGLE] if self.float32 and (floats or not (row.x or row.y)) else [DOUBLE]

    def _right_sides(self, row: Row, form: Format) -> Iterator[Interval]:
        """What the right-hand side may stand for in a format."""
        arithmetic = row.arithmetic
        alone = arithmetic is None or arithmetic.alone
        constants = form.rounded(row.rhs) if alone else {row.rhs}
        if arithmetic is None or self._is_exact(row, arithmetic, form):
            yield from ((exact(d), exact(d)) for d in constants)
        elif self._is_rounded_once(row, arithmetic, form):
            yield from (_cell(d, form, row.strict) for d in form.rounded(row.rhs))
        else:
            error = self._error(row, arithmetic, form)
            for d in (exact(d) for d in {*form.rounded(row.rhs), row.rhs}):
                yield (-math.inf, math.inf) if error is None else (d - error, d + error)

    def _error(self, row: Row, arithmetic: Arithmetic, form: Format) -> Fraction | None:
        """How far rounding may move a row's two sides apart; None where one may overflow."""
        size = arithmetic.constants
        if (
            arithmetic.plain
            and not row.x
            and all(abs(c) * _finite(self.outputs.least[j]) >= SAFE for j, c in row.y)
        ):
            size = Fraction(0) if arithmetic.alone else abs(row.rhs)  # no product underflows
        for terms, reach in ((row.x, self._input_reach), (row.y, self.outputs.reach)):
            for index, c in terms:
                size += max(abs(c), LEAST_NORMAL) * _finite(reach[index])
        for key, magnitude in arithmetic.excess:
            size += magnitude * _finite(
                self.outputs.reach[~key] if key < 0 else self._input_reach[key]
            )
        # As an expression, or as a matrix.
        count = max(arithmetic.depth, len(row.x) + len(row.y) + 1 if form is DOUBLE else 0)
        loss = Fraction(count, 2**form.bits)
        if loss > Fraction(1, 4) or 2 * size * arithmetic.shrink >= Fraction(2) ** form.top:
            return None
        return size * loss / (1 - loss)

    @functools.cached_property
    def _input_reach(self) -> npt.NDArray[np.float64]:
        """[inputs]: a magnitude that no input exceeds, whatever it stands for."""
        lower, upper = self._hull
        reach: npt.NDArray[np.float64] = np.maximum(np.abs(lower), np.abs(upper))
        return reach

    @functools.cached_property
    def _hull(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Bounds of what the inputs may stand for: [inputs] each."""
        lower, upper = self.domain.hull(self.domain.lower[None], self.domain.upper[None])
        return lower[0], upper[0]

    def _is_rounded_once(self, row: Row, arithmetic: Arithmetic, form: Format) -> bool:
        """Whether a single operation, of exact operands, is compared with a constant as it stands.

        That is a sum, or a product that is not compared with 0.
        """
        if arithmetic.once:
            return True
        if not (arithmetic.plain and arithmetic.alone) or row.x:
            return False
        if len(row.y) == 1:
            ((j, c),) = row.y
            far = 2 * abs(c) * _finite(self.outputs.reach[j]) < Fraction(2) ** form.top
            return far and _fits(c, form) and 0 not in form.rounded(row.rhs)
        return len(row.y) == 2 and self._leaves_are_exact(row, form)

    def _leaves_are_exact(self, row: Row, form: Format) -> bool:
        """Whether all coefficients are powers of two of at least 1, and nothing overflows."""
        return all(
            abs(c) >= 1
            and abs(c) == Fraction(2) ** (power_of_two(c) or 0)
            and 4 * abs(c) * _finite(self.outputs.reach[j]) < Fraction(2) ** form.top
            for j, c in row.y
        )

    def _sign_is_exact(self, row: Row, form: Format) -> bool:
        """Whether one scaled output is compared with 0, and can neither underflow nor overflow."""
        ((j, c),) = row.y
        least, most = (abs(c) * _finite(end[j]) for end in (self.outputs.least, self.outputs.reach))
        far = least >= Fraction(2) ** (form.bottom + 1) and most < Fraction(2) ** (form.top - 1)
        return not row.rhs and abs(c) >= LEAST_NORMAL and far

    def _is_exact(self, row: Row, arithmetic: Arithmetic, form: Format) -> bool:
        """Whether a row's sides are computed without rounding, or rounded without consequence.

        One output times a constant has the right sign; or all leaves are multiples of one power of
        two, and their sum is below 2**bits of it.
        """
        if row.bounds_input and is_scaled(row):
            return True
        if not arithmetic.plain or row.x:
            return False
        if (
            arithmetic.alone
            and len(row.y) == 1
            and (self._leaves_are_exact(row, form) or self._sign_is_exact(row, form))
        ):
            return True
        constants = [] if arithmetic.alone or not row.rhs else [(row.rhs, 0, Fraction(1))]
        grid = self.outputs.grid
        leaves = [(c, grid.unit[j], _finite(grid.largest[j])) for j, c in row.y]
        step, total = 0, Fraction(0)
        for k, (c, unit, largest) in enumerate([*constants, *leaves]):
            power = power_of_two(c)
            if unit is None or power is None or not _fits(c, form):
                return False
            step = min(step, unit + power) if k else unit + power
            total += abs(c) * largest
        return step >= form.bottom and total < Fraction(2) ** min(step + form.bits, form.top)


@functools.lru_cache(maxsize=8)
def _reader_at(reader: _RowReader, y: bytes) -> _RowReader:
    """The reader for known outputs (float64, as bytes); many cases are read at the same ones."""
    return replace(reader, outputs=Outputs.point(np.frombuffer(y), reader.outputs.is_float))


def _fits(c: Fraction, form: Format) -> bool:
    """Whether a format holds a number's digits."""
    power = power_of_two(c)
    return power is not None and LEAST_NORMAL <= abs(c) < Fraction(2) ** min(
        power + form.bits, form.top
    )


def _cases(pairs: list[tuple[Row, Row]]) -> tuple[Case, Case]:
    """The possible and the certain version of a case, without the rows that always hold."""
    one, other = (
        tuple(pair[side] for pair in pairs if pair[side] is not ALWAYS) for side in (0, 1)
    )
    return one, other


def _with(row: Row, rhs: Fraction | float) -> Row:
    if isinstance(rhs, float):
        return ALWAYS if rhs > 0 else NEVER
    return replace(row, rhs=rhs, arithmetic=None)


def exact(value: Any) -> Fraction | float:
    """A finite number as a rational; infinities as they are."""
    return value if isinstance(value, float) and math.isinf(value) else Fraction(value)


def _finite(value: float) -> Fraction:
    """A magnitude as a rational; more than any float holds where it is not finite."""
    return Fraction(float(value)) if math.isfinite(value) else Fraction(2) ** 2000


def _cell(d: float, form: Format, strict: bool) -> Interval:
    """Bounds of what is rounded to at most (less than, if `strict`) the constant d of a format."""
    if not d or math.isinf(d):
        return exact(d), exact(d)
    other = form.next(d, -math.inf if strict else math.inf)
    middle = exact(other) if math.isinf(other) else (Fraction(d) + Fraction(other)) / 2
    return (middle, Fraction(d)) if strict else (Fraction(d), middle)
