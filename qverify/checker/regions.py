"""The cases of a property over a network's integers: their regions, and which cases intervals
refute.

Every (input, output) pair for which a case's rows hold satisfies all inequalities of one of the
case's regions. See "Regions" in specs/certificate.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, product
from math import ceil, floor, lcm, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.checker.bounds import Staircase, Steps
from qverify.checker.ops import Floats, Interval
from qverify.errors import Rejected
from qverify.network import Network
from qverify.ops import Requantize, Table
from qverify.property import Case, Row

MOST = 64  # regions of a case; with more, every row is taken as a line
LARGEST = 2**24  # of a row's integer coefficients, taken as a line
BITS = 21  # of a line's coefficients
REACH = 2**61  # what a line stays below
APART = 40  # powers of two between the units of a row's lines


@dataclass(frozen=True)
class Inequality:
    """sum of coefficient * value.flat[element] + constant >= 0; `terms` are (value, element,
    coefficient)."""

    terms: tuple[tuple[int, int, int], ...]
    constant: int


Region = tuple[Inequality, ...]


@dataclass(frozen=True)
class Along:
    """c Y along u = 0, 1, ..., in which it does not rise; u >= k (k > 0) if and only if sign *
    accumulator >= begin[k]."""

    value: int
    element: int
    sign: int
    terms: list[Fraction]  # c Y
    begin: list[int]

    def least(self, k: int) -> Inequality:
        """u >= k."""
        return Inequality(((self.value, self.element, self.sign),), -self.begin[k])


@dataclass(frozen=True)
class UnsafeRegions:
    """The regions of a query's cases; a case is the numbers of its regions, or None if it has none
    that could be refuted."""

    regions: list[Region]
    cases: list[list[int] | None]

    @property
    def inequalities(self) -> list[Inequality]:
        """All of them, each once."""
        return list(dict.fromkeys(inequality for region in self.regions for inequality in region))


@dataclass
class Compiler:
    """Makes regions of rows: `root` holds the interval of every value over the root box, without
    further bounds; `taken` says which tables are taken as staircases."""

    network: Network
    outputs: Sequence[Any]  # what the frontend says of every output tensor
    root: list[Interval]
    taken: set[int]
    known: dict[int, Steps | None] = field(default_factory=dict)

    def unsafe_regions(self, cases: Sequence[Case]) -> UnsafeRegions:
        """The regions of all cases, numbered through."""
        regions: list[Region] = []
        numbers: list[list[int] | None] = []
        for case in cases:
            found = self.case(case)
            if not found or all(found):
                numbers.append(
                    None if found is None else list(range(len(regions), len(regions) + len(found)))
                )
                regions += found or []
            else:
                numbers.append(None)  # a region without inequalities
        return UnsafeRegions(regions, numbers)

    def case(self, case: Case) -> list[Region] | None:
        """The regions of one case, or None if none of its rows can be expressed."""
        options = [found for row in case if (found := self.row(row)) is not None]
        if prod(len(found) for found in options) > MOST:
            options = [found for row in case if (found := self.as_line(row)) is not None]
        if not options:
            return None
        return [tuple(chain.from_iterable(regions)) for regions in product(*options)]

    def row(self, row: Row) -> list[Region] | None:
        """The regions of one row."""
        if not row.y:
            return [()] if holds(row, Fraction(0)) else []
        if len(row.y) <= 2:
            steps = [step for j, c in row.y if (step := self.along(j, c)) is not None]
            if len({(step.value, step.element) for step in steps}) == len(row.y):
                return _one(row, *steps) if len(steps) == 1 else _two(row, *steps)
        return self.as_line(row)

    def as_line(self, row: Row) -> list[Region] | None:
        """The regions of a row that is taken as a line: none where it never holds, one without
        inequalities where it always does."""
        line = self.line(row)
        far = (
            0
            if line is None
            else sum(abs(factor) * self.reach(value) for value, _, factor in line.terms)
        )
        if line is None or far >= REACH:
            return None
        if line.constant < -far:
            return []
        return [()] if line.constant >= far else [(line,)]

    def reach(self, value: int) -> int:
        """The largest magnitude in a value's type."""
        kind = self.network.type_of(value)
        return max(abs(kind.low), abs(kind.high))

    def output(self, j: int) -> tuple[Any, int]:
        """The tensor of output element j, and its place there."""
        for output in self.outputs:
            if j < output.size:
                return output, j
            j -= output.size
        raise Rejected("the property speaks of an output that the model does not have")

    def along(self, j: int, c: Fraction) -> Along | None:
        """Output j as steps, in the direction in which c Y_j does not rise."""
        output, at = self.output(j)
        steps = None if output.levels is None else self.staircase(output.levels.value)
        if steps is None:
            return None
        element, levels = int(output.levels.index[at]), output.levels.levels
        low, high = (int(end[0, element]) for end in self.root[output.levels.value])
        codes = np.arange(low, high + 1)
        begin = steps.begin[steps.row[element], np.arange(low, high + 2) - steps.low]
        terms = [c * Fraction(float(y)) for y in levels[codes - output.levels.low]]
        (accumulator,) = self.network.nodes[output.levels.value - 1].inputs
        if (levels[-1] >= levels[0]) == (c < 0):
            return Along(accumulator, element, 1, terms, [int(t) for t in begin[:-1]])
        return Along(accumulator, element, -1, terms[::-1], [1 - int(t) for t in begin[:0:-1]])

    def staircase(self, value: int) -> Steps | None:
        """A value as non-decreasing steps of its node's input."""
        if value and value not in self.known:
            node, steps = self.network.nodes[value - 1], None
            if isinstance(node.op, Requantize) or (
                isinstance(node.op, Table) and value in self.taken
            ):
                try:
                    steps = Staircase(
                        node.op, self.network.type_of(node.inputs[0]), node.type
                    ).steps
                except Rejected:  # it decreases
                    steps = None
            self.known[value] = steps
        return self.known.get(value)

    def line(self, row: Row) -> Inequality | None:
        """A row as one inequality over lines."""
        parts = [(*self.output(j), c) for j, c in row.y]
        if not parts or any(output.line is None for output, _, _ in parts):
            return None
        units, scale = (
            [output.line.unit for output, _, _ in parts],
            lcm(*(c.denominator for _, _, c in parts)),
        )
        if max(units) - min(units) > APART or any(abs(c * scale) > LARGEST for _, _, c in parts):
            return None
        terms: dict[tuple[int, int], int] = {}
        limit = row.rhs * scale / Fraction(2) ** min(units)
        constant = ceil(limit) - 1 if row.strict else floor(limit)
        for (output, at, c), unit in zip(parts, units, strict=True):
            factor, line = -int(c * scale) << (unit - min(units)), output.line
            terms[line.value, at] = terms.get((line.value, at), 0) + factor * int(line.slope[at])
            constant += max(factor * int(line.lower[at]), factor * int(line.upper[at]))
        shift = max(0, max(abs(c).bit_length() for c in terms.values()) - BITS)
        rounded = {key: (c + (1 << shift >> 1)) >> shift for key, c in terms.items()}
        for (value, at), exact in terms.items():  # what rounding can lose
            constant += abs(exact - (rounded[value, at] << shift)) * self.reach(value)
        kept = tuple(
            (value, at, factor) for (value, at), factor in sorted(rounded.items()) if factor
        )
        return Inequality(kept, -(-constant >> shift))


def holds(row: Row, value: Fraction) -> bool:
    """Whether a row holds where its left side is `value`."""
    return value < row.rhs if row.strict else value <= row.rhs


def _one(row: Row, first: Along) -> list[Region]:
    k = next((k for k, value in enumerate(first.terms) if holds(row, value)), None)
    return [] if k is None else [(first.least(k),) if k else ()]


def _two(row: Row, first: Along, second: Along) -> list[Region]:
    corners: list[tuple[int, int]] = []
    need = len(first.terms)
    for k, value in enumerate(second.terms):
        before = need
        while need and holds(row, first.terms[need - 1] + value):  # what is needed falls as k rises
            need -= 1
        if need < before:
            corners.append((need, k))
    if (0, 0) in corners:
        return [()]
    regions: list[Region] = []
    if corners and corners[0][1] == 0:
        regions.append((first.least(corners.pop(0)[0]),))
    if corners and corners[-1][0] == 0:
        regions.append((second.least(corners.pop()[1]),))
    if not corners:
        return regions
    sides = first.least(corners[-1][0]), second.least(corners[0][1])
    if len(corners) == 1:
        return [*regions, sides]
    x, y = [first.begin[k] for k, _ in corners], [second.begin[k] for _, k in corners]
    wide, high, p, q = x[0] - x[-1], y[-1] - y[0], 1, 1
    if 256 * (abs(wide - high) - 2) > max(wide, high):  # the two are not on the same scale
        p, q = (max(1, (4096 * side) // max(wide, high)) for side in (high, wide))
    least = min(p * a + q * b for a, b in zip(x, y, strict=True))
    terms = (
        (first.value, first.element, p * first.sign),
        (second.value, second.element, q * second.sign),
    )
    return [*regions, (Inequality(terms, -least), *sides)]


# -- intervals -------------------------------------------------------------------------------------


def refuted(cases: Sequence[Case], low: Floats, high: Floats) -> npt.NDArray[np.bool_]:
    """Which cases have a row that fails for all outputs between `low` and `high` [N, outputs]: bool
    [N, cases]."""
    fails: dict[Row, npt.NDArray[np.bool_]] = {}
    result = np.zeros((len(low), len(cases)), np.bool_)
    for i, case in enumerate(cases):
        for row in case:
            if row not in fails:
                fails[row] = _fails(row, low, high)
            result[:, i] |= fails[row]
    return result


def _fails(row: Row, low: Floats, high: Floats) -> npt.NDArray[np.bool_]:
    """Whether a row's least value violates it, [N]: in float64 beyond doubt, else in exact
    rationals."""
    extremes = [(c, (low if c > 0 else high)[:, j]) for j, c in row.y]
    total = np.zeros(len(low))
    result, doubt = np.zeros(len(low), np.bool_), np.ones(len(low), np.bool_)
    if all(
        Fraction(1, 2**200) < abs(c) < 2**200 for c in (*(c for _, c in row.y), row.rhs) if c
    ):  # no under- or overflow
        size = np.full(len(low), abs(float(row.rhs)))
        for c, y in extremes:
            total += float(c) * y
            size += abs(float(c)) * np.abs(y)
        gap = total - float(row.rhs)
        result, doubt = gap > 0, np.abs(gap) <= size * (len(extremes) + 4) * 2.0**-52
    for i in np.flatnonzero(doubt):
        value = sum((c * Fraction(float(y[i])) for c, y in extremes), Fraction(0))
        result[i] = not holds(row, value)
    return result
