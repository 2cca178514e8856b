"""The unsafe set as regions: conjunctions of linear inequalities between network integers.

A row of a property speaks of output values. Where an output is a monotone function of a code, and
the code a staircase of an accumulator, a row over one or two outputs is turned into conditions on
the accumulators themselves, exactly at ties and at both clips: in the plane of the two accumulators
the row holds on a set bounded by steps. Its first and last step, where one code is saturated, each
become a region ("this accumulator alone is beyond its threshold"); the steps between them lie close
to a line, and together they become one region of three inequalities. Any other row is taken as one
inequality over the outputs' integers (`Line`), up to a remainder.

Sound: every (input, output) pair for which a case's rows hold satisfies all inequalities of one of
the case's regions. So a case is refuted where all of its regions are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import ceil, floor, lcm

import numpy as np
import numpy.typing as npt

from qverify.ops.relax import StaircaseRelaxation
from qverify.property import Case, Row

IntArray = npt.NDArray[np.int64]
COEFFICIENT = 2**24  # rows with larger integer coefficients are not compiled
WIDEST = 2**20  # larger coefficients of an inequality are rounded, and the constant takes the error
REACH = 2**61  # rows whose value could grow so large are not compiled
MOST = 64  # regions of a case; with more, rows that have several regions are taken as lines


@dataclass(frozen=True, eq=False)
class Line:
    """Output elements as lines over a network value v.

    Y[i] = (slope[i] * v.flat[i] + e) * 2**unit for some e with lower[i] <= e <= upper[i].
    """

    value: int
    slope: IntArray
    lower: IntArray
    upper: IntArray
    unit: int


@dataclass(frozen=True, eq=False)
class Levels:
    """Output elements as codes: Y[i] = levels[code - low], where `levels` is monotone and the code
    is value.flat[index[i]]."""

    value: int
    index: npt.NDArray[np.int64]  # [size]
    low: int
    levels: npt.NDArray[np.float64]  # [K], exact float32 or integers


@dataclass(frozen=True, eq=False)
class Output:
    """What is known of one output tensor of `size` elements."""

    size: int
    line: Line | None
    levels: Levels | None


@dataclass(frozen=True)
class Inequality:
    """sum of coefficient * (value).flat[index] + constant >= 0, all integers."""

    terms: tuple[tuple[int, int, int], ...]  # (value, index, coefficient)
    constant: int


Region = tuple[Inequality, ...]


@dataclass(frozen=True, eq=False)
class Compiler:
    """Turns rows into regions."""

    outputs: Sequence[Output]
    # Of a value of codes: the rule of the staircase that gives it, and the accumulator behind it.
    staircase: Callable[[int], tuple[StaircaseRelaxation, int] | None]
    root_bounds: Callable[[int], tuple[IntArray, IntArray]]  # of a value over the root box, flat
    reach: Callable[[int], int]  # the largest magnitude among a value's integers

    def regions(self, case: Case) -> list[Region] | None:
        """Regions that cover a case; None if none of its rows can be expressed."""
        options = [found for row in case if (found := self._of_row(row)) is not None]
        if not options:
            return None
        if np.prod([float(len(o)) for o in options]) > MOST:
            options = [found for row in case if (found := self._as_line(row)) is not None]
            if not options:
                return None
        # All rows of the case hold, so for each row one of its regions does: distribute "and" over
        # "or". A row that cannot be expressed is left out, which only makes the regions larger.
        return [
            tuple(inequality for part in parts for inequality in part)
            for parts in product(*options)
        ]

    def _of_row(self, row: Row) -> list[Region] | None:
        if row.x:
            return None
        if not row.y:
            return [()] if row.rhs > 0 or (row.rhs == 0 and not row.strict) else []
        steps = [self._steps(index, c) for index, c in row.y] if len(row.y) <= 2 else [None]
        known = [s for s in steps if s is not None]
        if len(known) == len(row.y) and len({(s.value, s.index) for s in known}) == len(known):
            return _one(row, known[0]) if len(known) == 1 else _two(row, known[0], known[1])
        return self._as_line(row)

    def _as_line(self, row: Row) -> list[Region] | None:
        """The regions of a row taken as a line: itself, or the one without inequalities if it
        always holds, or none if it never does; None if it is not supported."""
        line = self._line(row)
        if line is None:
            return None
        reach = sum(abs(c) * self.reach(value) for value, _, c in line.terms)
        if reach >= REACH:
            return None
        if line.constant >= reach:
            return [()]
        return [(line,)] if line.constant >= -reach else []

    def _steps(self, index: int, coefficient: Fraction) -> _Steps | None:
        """Output `index` as steps in the direction in which coefficient * Y falls."""
        part, at = self._part(index)
        levels = self.outputs[part].levels
        found = None if levels is None else self.staircase(levels.value)
        if levels is None or found is None:
            return None
        rule, accumulator = found
        element = int(levels.index[at])
        thresholds = rule.thresholds[int(rule.which.reshape(-1)[element])]
        low, high = (int(bound[element]) for bound in self.root_bounds(levels.value))
        rising = levels.levels[-1] >= levels.levels[0]
        codes = np.arange(low, high + 1)
        values = levels.levels[codes - levels.low]
        begin = thresholds[codes - rule.low].astype(np.int64)  # [n]; the first is not needed
        if rising == (coefficient < 0):
            return _Steps(accumulator, element, 1, values, begin)
        # Against the codes: u counts down from the code `high`, and the code is at most k iff the
        # accumulator a <= threshold[k + 1] - 1, that is -a >= 1 - threshold[k + 1].
        above = thresholds[codes + 1 - rule.low].astype(np.int64)
        return _Steps(accumulator, element, -1, values[::-1], 1 - above[::-1])

    def _part(self, index: int) -> tuple[int, int]:
        for part, output in enumerate(self.outputs):
            if index < output.size:
                return part, index
            index -= output.size
        raise IndexError(index)

    def _line(self, row: Row) -> Inequality | None:
        """A row as one inequality over the outputs' integers; None if it is not supported."""
        if row.x or not row.y:
            return None
        parts = [(self._part(index), c) for index, c in row.y]
        lines = [self.outputs[part].line for (part, _), _ in parts]
        known = [line for line in lines if line is not None]
        units = [line.unit for line in known]
        if len(known) < len(lines) or max(units) - min(units) > 40:
            return None
        # Times `scale` and in units of 2**unit, everything in the row but rhs is an integer.
        unit, scale = min(units), lcm(*(c.denominator for _, c in row.y))
        terms: dict[tuple[int, int], int] = {}
        constant = 0
        for ((_, at), c), line in zip(parts, known, strict=True):
            factor = int(c * scale) << (line.unit - unit)
            if abs(int(c * scale)) > COEFFICIENT:
                return None
            key = (line.value, at)
            terms[key] = terms.get(key, 0) - factor * int(line.slope[at])
            constant += max(-factor * int(line.lower[at]), -factor * int(line.upper[at]))
        # -(row value) <= terms + constant, and the row holds iff row value <= limit: so where it
        # holds, terms + constant + limit >= 0.
        limit = largest_integer(row.rhs * scale / Fraction(2) ** unit, row.strict)
        return self._rounded(terms, constant + limit)

    def _rounded(self, terms: Mapping[tuple[int, int], int], constant: int) -> Inequality:
        """Coefficients of at most about WIDEST; what rounding can lose is added to the constant."""
        bits = max((abs(c).bit_length() for c in terms.values()), default=0)
        shift = max(0, bits - WIDEST.bit_length())
        rounded = {key: (c + (1 << shift >> 1)) >> shift for key, c in terms.items()}
        loss = sum(
            abs(c - (rounded[key] << shift)) * self.reach(key[0]) for key, c in terms.items()
        )
        kept = tuple((value, index, c) for (value, index), c in sorted(rounded.items()) if c)
        return Inequality(kept, -(-(constant + loss) >> shift))


@dataclass(frozen=True, eq=False)
class _Steps:
    """An output along u = 0, 1, ..., in which coefficient * Y does not rise.

    Y = values[u], and for k > 0 u is at least k iff sign * accumulator >= begin[k]. (begin[0] is
    not used: u is never below 0.)
    """

    value: int
    index: int
    sign: int
    values: npt.NDArray[np.float64]
    begin: IntArray

    def at_least(self, k: int) -> Inequality:
        """u >= k."""
        return Inequality(((self.value, self.index, self.sign),), -int(self.begin[k]))


def largest_integer(limit: Fraction, strict: bool) -> int:
    """The largest integer that is at most `limit`, or below it if `strict`."""
    return ceil(limit) - 1 if strict else floor(limit)


def _holds(total: Fraction, row: Row) -> bool:
    return total < row.rhs if row.strict else total <= row.rhs


def _least(row: Row, c: Fraction, steps: _Steps, rest: Fraction) -> int:
    """The least u for which c * Y + rest satisfies the row; one past the end if there is none."""
    begin, end = 0, len(steps.values)
    while begin < end:
        middle = (begin + end) // 2
        if _holds(c * Fraction(float(steps.values[middle])) + rest, row):
            end = middle
        else:
            begin = middle + 1
    return begin


def _one(row: Row, steps: _Steps) -> list[Region]:
    k = _least(row, row.y[0][1], steps, Fraction(0))
    if k == len(steps.values):
        return []
    return [() if k == 0 else (steps.at_least(k),)]


def _needs(row: Row, first: _Steps, second: _Steps) -> IntArray:
    """For every step of the second, the least one of the first at which the row holds; one past the
    end if there is none."""
    (_, c1), (_, c2) = row.y
    scale = lcm(c1.denominator, c2.denominator)
    unit = min(_unit(first.values), _unit(second.values))
    terms = [_in_units(int(c * scale), s.values, unit) for c, s in ((c1, first), (c2, second))]
    falling, other = terms
    if falling is None or other is None:
        rests = [c2 * Fraction(float(y)) for y in second.values]
        return np.array([_least(row, c1, first, rest) for rest in rests], np.int64)
    # The row says: first term <= limit - second term, in integers. Both terms lie within REACH / 2,
    # so a limit beyond REACH may be clamped to it: that changes no comparison, and the difference
    # fits int64. The first term does not rise, so the steps that are too large come first.
    limit = largest_integer(row.rhs * scale / Fraction(2) ** unit, row.strict)
    room = max(min(limit, REACH), -REACH) - other
    return len(falling) - np.searchsorted(falling[::-1], room, side="right")


def _in_units(factor: int, values: npt.NDArray[np.float64], unit: int) -> IntArray | None:
    """factor * values, in units of 2**unit, which divides the values; None where that may not be
    exact or not stay within REACH / 2."""
    with np.errstate(over="ignore"):
        whole = values / 2.0**unit
    size = max(float(np.abs(whole).max(initial=0.0)), 1.0)
    if not size < 2.0**53 or not abs(factor) < REACH / 2 / size:
        return None
    return factor * whole.astype(np.int64)


def _unit(values: npt.NDArray[np.float64]) -> int:
    """The largest u for which 2**u divides all values (float32 or integers); 0 if all are 0."""
    mantissa, exponent = np.frexp(values[values != 0])
    if not len(mantissa):
        return 0
    whole = (np.abs(mantissa) * 2.0**53).astype(np.int64)  # value = whole * 2**(exponent - 53)
    lowest_bit = np.frexp((whole & -whole).astype(np.float64))[1] - 1
    return int((exponent - 53 + lowest_bit).min())


def _two(row: Row, first: _Steps, second: _Steps) -> list[Region]:
    """Regions of a row over two outputs.

    Both terms of the row fall along their steps, so it holds on a union of quadrants "first is at
    least j and second at least k", one for each corner (j, k). Sound because a corner where one of
    them is 0 becomes a region exactly, and every other corner satisfies all three inequalities of
    the last region.
    """
    needs = _needs(row, first, second)
    before = np.minimum.accumulate(np.concatenate([[len(first.values)], needs[:-1]]))
    at = np.flatnonzero(needs < before)  # the other quadrants lie within an earlier one
    corners = list(zip(needs[at].tolist(), at.tolist(), strict=True))  # j falls, k rises
    result: list[Region] = []
    if (0, 0) in corners:
        return [()]
    if corners and corners[0][1] == 0:
        result.append((first.at_least(corners.pop(0)[0]),))
    if corners and corners[-1][0] == 0:
        result.append((second.at_least(corners.pop()[1]),))
    if corners:
        result.append(_quadrants(first, second, corners))
    return result


def _quadrants(first: _Steps, second: _Steps, corners: Sequence[tuple[int, int]]) -> Region:
    """One region around the quadrants of these corners (j falls, k rises): the least that any of
    them needs of either output, and a line below all the corners."""
    quarter = (first.at_least(corners[-1][0]), second.at_least(corners[0][1]))
    if len(corners) == 1:
        return quarter
    x = np.array([first.begin[j] for j, _ in corners], np.int64)  # falling
    y = np.array([second.begin[k] for _, k in corners], np.int64)  # rising
    # The line is parallel to the one from the first corner to the last, to 12 bits. It has slope 1
    # where that is near (two outputs of one scale): then it is exact on regular steps.
    wide, high = int(x[0] - x[-1]), int(y[-1] - y[0])
    largest = max(wide, high)
    a, b = 1, 1
    if abs(wide - high) > largest / 256 + 2:
        a, b = max(1, (high << 12) // largest), max(1, (wide << 12) // largest)
    # With a, b > 0 the line's value on a quadrant is least at its corner.
    least = int((a * x + b * y).min())
    terms = (
        (first.value, first.index, a * first.sign),
        (second.value, second.index, b * second.sign),
    )
    return (Inequality(terms, -least), *quarter)
