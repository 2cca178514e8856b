"""Conditions on inputs inside one quantization cell: linear inequalities over float32.

The outputs are constant there. Whether real numbers satisfy the conditions is decided exactly.
Whether float32 numbers do is an integer problem: a real solution is rounded, with room to spare
where there is room; where equalities leave none, its numbers are replaced one after another by
nearby ones of few bits; and small cells are searched through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from qverify.boundary.domain import Domain
from qverify.bounds.simplex import RationalInequality, common_point
from qverify.deadline import looking
from qverify.errors import Undecided
from qverify.property import Row

Float64Array = npt.NDArray[np.float64]
Point = dict[int, Fraction]
Bounds = dict[int, tuple[Fraction, Fraction]]  # of inputs, by their numbers

MAX_BOXES = 500  # of the search through a cell
ONE_BY_ONE = 24  # numbers of a solution that are replaced one after another
HALVINGS = 24  # of the distance in which a number of few bits is looked for


def conditions(rows: Sequence[Row], y: Float64Array) -> list[RationalInequality]:
    """Rows at outputs `y`, as inequalities over the inputs."""
    return [
        RationalInequality(
            dict(row.x),
            row.rhs - sum((c * Fraction(float(y[j])) for j, c in row.y), Fraction(0)),
            row.strict,
        )
        for row in rows
    ]


def may_hold(
    rows: Sequence[Row],
    y: Float64Array,
    lower: Float64Array,
    upper: Float64Array,
    is_float: npt.NDArray[np.bool_],
) -> bool:
    """Whether all rows may hold together at outputs `y`; False is a proof that they do not.

    The inputs are real numbers, or integers, in [lower, upper].
    """
    inequalities = conditions(rows, y)
    return any(True for _ in _parts(inequalities, _box_of(inequalities, lower, upper), is_float))


def solve_in_cell(
    rows: Sequence[Row],
    y: Float64Array,
    first: Float64Array,
    last: Float64Array,
    is_float: npt.NDArray[np.bool_],
) -> Float64Array | None:
    """Values in [first, last], float32 or integers, for which all rows hold at outputs `y`.

    None if no real numbers are (nor integers, for integer inputs). Raises Undecided if that is not
    known.
    """
    inequalities = conditions(rows, y)
    doubt = False
    for box, found in _parts(inequalities, _box_of(inequalities, first, last), is_float):
        for point in _tries(inequalities, box, found, is_float):
            if all(row.holds(point) for row in inequalities):
                result = first.copy()
                for j, value in point.items():
                    result[j] = float(value)
                return result
        doubt = True
    if doubt:
        raise Undecided(
            "the conditions on inputs hold together for real numbers, but no float32 numbers were "
            "found"
        )
    return None


def _parts(
    rows: list[RationalInequality], box: Bounds, is_float: npt.NDArray[np.bool_]
) -> Iterator[tuple[Bounds, Point | None]]:
    """The parts of a box in which all integer inputs are fixed and all rows may hold.

    With each, real numbers for which they hold (None: not known). After MAX_BOXES parts comes what
    is left, undivided.
    """
    stack = [box]
    for _ in looking(range(MAX_BOXES)):
        if not stack:
            return
        box = stack.pop()
        found = common_point(rows, box)
        if isinstance(found, RationalInequality):
            continue
        whole = [j for j, (low, high) in box.items() if not is_float[j] and low < high]
        if not whole:
            yield box, found
            continue
        j = max(whole, key=lambda j: box[j][1] - box[j][0])
        middle = found[j] if found else (box[j][0] + box[j][1]) / 2
        at = min(Fraction(middle // 1), box[j][1] - 1)
        stack += [{**box, j: (at + 1, box[j][1])}, {**box, j: (box[j][0], at)}]
    yield from ((box, None) for box in stack)


def _box_of(rows: Sequence[RationalInequality], lower: Float64Array, upper: Float64Array) -> Bounds:
    used = sorted({j for row in rows for j in row.terms})
    return {j: (Fraction(float(lower[j])), Fraction(float(upper[j]))) for j in used}


def _tries(
    rows: list[RationalInequality],
    box: Bounds,
    found: Point | None,
    is_float: npt.NDArray[np.bool_],
) -> Iterator[Mapping[int, Fraction]]:
    """Points of float32 in a box of float32 that may satisfy all rows; integers are fixed."""
    yield {j: low for j, (low, _) in box.items()}
    if found is None:
        return
    yield _rounded(found, box)
    roomy = common_point([_with_room(row, rows, box) for row in rows], box)
    if isinstance(roomy, dict):
        yield _rounded(roomy, box)
        found = roomy
    for order in (list(box), list(box)[::-1]):
        yield from _few_bits(rows, box, found, order)
    yield from _searched(
        rows, {j: (float(low), float(high)) for j, (low, high) in box.items()}, is_float
    )


def _rounded(point: Point, box: Bounds) -> Point:
    return {
        j: min(max(Fraction(float(np.float32(float(v)))), box[j][0]), box[j][1])
        for j, v in point.items()
    }


def _with_room(
    row: RationalInequality, rows: list[RationalInequality], box: Bounds
) -> RationalInequality:
    """The row, tighter by what rounding its variables can change; half of an equality as it is."""
    opposite = {j: -c for j, c in row.terms.items()}
    if any(other.rhs == -row.rhs and other.terms == opposite for other in rows):
        return row
    room = sum(
        (abs(c) * _spacing(*box[j]) for j, c in row.terms.items() if box[j][0] < box[j][1]),
        Fraction(0),
    )
    return replace(row, rhs=row.rhs - room)


def _spacing(low: Fraction, high: Fraction) -> Fraction:
    return Fraction(float(np.spacing(np.float32(float(max(abs(low), abs(high)))))))


def _few_bits(
    rows: list[RationalInequality], box: Bounds, point: Point, order: list[int]
) -> Iterator[Point]:
    """Fix one variable after another at a number of few bits near its value.

    The others always keep a solution. Of many variables, all but the last are fixed together: these
    make up for it.
    """
    box = dict(box)
    most = [j for j in order if box[j][0] < box[j][1]][:-ONE_BY_ONE]
    for bits in (6, 9, 12) if most else ():  # simple ones first, then ever nearer to the solution
        simple = {j: next(_simple_numbers(point[j], *box[j], bits)) for j in most}
        fixed = {**box, **{j: (value, value) for j, value in simple.items()}}
        near = common_point(rows, fixed, point)
        if isinstance(near, dict):
            box, point = fixed, near
            break
    else:
        if most:
            return
    for j in order:
        low, high = box[j]
        for value in _simple_numbers(point[j], low, high) if low < high else ():
            near = common_point(rows, {**box, j: (value, value)}, point)
            if isinstance(near, dict):
                box[j], point = (value, value), near
                break
        else:
            if low < high:
                return
    yield point


def _simple_numbers(
    value: Fraction, low: Fraction, high: Fraction, least: int = 0
) -> Iterator[Fraction]:
    """float32 numbers in [low, high] near `value`, those of few bits first.

    They are closer than the width halved `least` times.
    """
    seen = set()
    width = high - low
    for k in range(least, HALVINGS) if width else ():
        step = Fraction(2) ** (_log2(width) - k)
        rounded = Fraction(round(value / step)) * step
        if (
            low <= rounded <= high
            and rounded not in seen
            and Fraction(float(np.float32(float(rounded)))) == rounded
        ):
            seen.add(rounded)
            yield rounded
    nearest = Fraction(float(np.float32(float(value))))
    yield min(max(nearest, low), high)


def _log2(value: Fraction) -> int:
    return value.numerator.bit_length() - value.denominator.bit_length()


def _searched(
    rows: list[RationalInequality],
    start: dict[int, tuple[float, float]],
    is_float: npt.NDArray[np.bool_],
) -> Iterator[Point]:
    """Corners of ever smaller boxes of float32; all of them, where they are few."""
    stack = [start]
    for _ in looking(range(MAX_BOXES), 16):
        if not stack:
            return
        box = stack.pop()
        exact = {j: (Fraction(low), Fraction(high)) for j, (low, high) in box.items()}
        for row in rows:
            yield {j: pair[row.terms.get(j, 0) < 0] for j, pair in exact.items()}
        wide = [j for j, (low, high) in box.items() if low < high]
        if any(row.fails_on(exact) for row in rows) or not wide:
            continue
        j = max(
            wide,
            key=lambda j: (
                (box[j][1] - box[j][0]) * max(abs(float(row.terms.get(j, 0))) for row in rows)
            ),
        )
        below, above = halves(*box[j], bool(is_float[j]))
        stack += [{**box, j: (box[j][0], below)}, {**box, j: (above, box[j][1])}]


def halves(low: float, high: float, is_float: bool) -> tuple[float, float]:
    """Neighbouring values between low and high: where the two halves meet, sharing no point."""
    if not is_float:
        middle = float(np.floor((low + high) / 2))
        return middle, middle + 1
    below = np.float32(low + (high - low) / 2)
    if below >= np.float32(high):
        below = np.nextafter(np.float32(high), np.float32(-np.inf))
    return float(below), float(np.nextafter(below, np.float32(np.inf)))


@dataclass(frozen=True, eq=False)
class CellTable:
    """For every code variable and code k: which inputs have at least, and at most, that code.

    Made once for a root box, for properties whose rows mention inputs.
    """

    domain: Domain
    low: npt.NDArray[np.int32]  # [codes]: the code of column 0
    first: Float64Array  # [codes, K]
    last: Float64Array  # [codes, K]

    @staticmethod
    def make(
        domain: Domain, lower: npt.NDArray[np.int32], upper: npt.NDArray[np.int32]
    ) -> CellTable:
        """Tabulate a domain over the root box."""
        width = int((upper - lower).max(initial=0)) + 1
        first, last = np.empty((len(lower), width)), np.empty((len(lower), width))
        for k in looking(range(width)):
            code = np.minimum(lower + k, upper)
            above, below = domain.code_cells(code, upper), domain.code_cells(lower, code)
            first[:, k] = np.where(domain.falling(), above[1], above[0])
            last[:, k] = np.where(domain.falling(), below[0], below[1])
        return CellTable(domain, lower, first, last)

    def bounds(
        self, lower: npt.NDArray[np.int32], upper: npt.NDArray[np.int32]
    ) -> tuple[Float64Array, Float64Array]:
        """Bounds of each input element over code boxes [N, codes]: float64 [N, inputs] pairs."""
        at = np.arange(len(self.low))
        # A falling quantizer gives its largest code for the least input.
        one, other = self.first[at, lower - self.low], self.last[at, upper - self.low]
        return self.domain.spread(np.minimum(one, other), np.maximum(one, other))
