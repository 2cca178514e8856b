"""The rows of a property over the integer variables of a formula, without any float, and without
losing a case.

An output value is a monotone function F of an integer variable x: the decoder's float32 arithmetic.
It lies within an exactly known distance of a line s x + c, so a row over output values implies an
integer inequality over variables, with small coefficients; where all values are integers the two
are the same. Where a solver's answer meets the inequality but not the row, the row gets a cut: F is
monotone, so a row that fails at a point fails wherever every variable has moved the wrong way. Cuts
make the loop in `decide.py` exact: it ends because each cut removes a point for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peers.encoding import CPU, Clause, Formula, Inequality, Pair, Steps, Unsupported
from qverify.boundary.outputs import Decoder
from qverify.property import Query, Row

WIDEST = 1 << 22  # an output accumulator may take so many values
COEFFICIENT = 1 << 20  # the largest coefficient of an inequality that is rounded


@dataclass(frozen=True, eq=False)
class Value:
    """An output's value: `table[x - lower(x)]`, float64 that are exact, monotone; about `slope` *
    x."""

    variable: int
    table: npt.NDArray[np.float64]
    slope: Fraction
    whole: bool  # the value is x itself

    @property
    def rising(self) -> bool:
        """Whether the value grows with x (constant counts as growing)."""
        return bool(self.table[-1] >= self.table[0])

    def residual(self, low: int, slope: Fraction) -> tuple[Fraction, Fraction]:
        """Bounds of table[x - low] - slope * x over all x."""
        if self.whole and slope == 1:
            return Fraction(0), Fraction(0)
        line = (low + np.arange(len(self.table), dtype=np.float64)) * float(slope)
        rest = self.table - line
        size = float(np.abs(self.table).max() + np.abs(line).max())
        # more than float64 can round here, the slope's own rounding included
        slack = Fraction(size) / 2**48
        return Fraction(float(rest.min())) - slack, Fraction(float(rest.max())) + slack


@dataclass(frozen=True, eq=False)
class ExactRow:
    """sum coefficient * value <= rhs (< where strict), by the tables."""

    terms: tuple[tuple[Fraction, Value], ...]
    rhs: Fraction
    strict: bool

    def holds(self, formula: Formula, at: dict[int, int]) -> bool:
        """Exactly, where the values' variables have the values `at`."""
        total = sum((c * _value(formula, v, at[v.variable]) for c, v in self.terms), Fraction(0))
        return total < self.rhs if self.strict else total <= self.rhs

    def cut(self, formula: Formula, at: dict[int, int]) -> Clause:
        """A clause that the row implies and that fails at `at`, where the row fails; as strong as
        moving one variable after another can make it."""
        at = dict(at)
        directions = self._directions()
        for v, step in directions.items():  # step: the direction in which the row's value falls
            end = formula.upper[v] if step > 0 else formula.lower[v]
            # The row fails at distance `near`, and first may hold at `far`.
            near, far = 0, abs(end - at[v]) + 1
            while far - near > 1:
                middle = (near + far) // 2
                if self.holds(formula, {**at, v: at[v] + step * middle}):
                    far = middle
                else:
                    near = middle
            at[v] += step * near
        both = [(v, step) for v in at if v not in directions for step in (-1, 1)]
        return tuple(
            Inequality(((-step, v),), -step * at[v] - 1)
            for v, step in (*directions.items(), *both)
            if at[v] != (formula.upper[v] if step > 0 else formula.lower[v])
        )

    def _directions(self) -> dict[int, int]:
        """Per variable, the direction in which the row's value falls; without variables that move
        two values against each other."""
        found: dict[int, set[int]] = {}
        for c, value in self.terms:
            found.setdefault(value.variable, set()).add(-1 if (c > 0) == value.rising else 1)
        return {v: steps.pop() for v, steps in found.items() if len(steps) == 1}


def _value(formula: Formula, v: Value, x: int) -> Fraction:
    return Fraction(float(v.table[x - formula.lower[v.variable]]))


@dataclass(frozen=True, eq=False)
class Rows:
    """The exact rows behind the cases of a formula: `cases[k]` belongs to `formula.cases[k]`."""

    cases: list[list[ExactRow]]

    def refine(self, formula: Formula, values: Sequence[int]) -> bool:
        """Add cuts to every case that these values of all variables meet although a row fails.
        False if there is none: then the values meet a case for good, or no case at all."""
        changed = False
        for exact, clauses in zip(self.cases, formula.cases, strict=True):
            if not all(any(row.holds(values) for row in clause) for clause in clauses):
                continue
            for row in exact:
                at = {v.variable: values[v.variable] for _, v in row.terms}
                if not row.holds(formula, at):
                    clauses.append(row.cut(formula, at))
                    changed = True
        return changed


def encode_rows(formula: Formula, outputs: Sequence[int], decoder: Decoder, query: Query) -> Rows:
    """Give `formula` the cases of a query. `outputs` are the variables of the network's flat
    outputs.

    Raises Unsupported where rows mention inputs, where the runtime's value is known up to an error
    only, and where an output has no monotone table.
    """
    if any(row.x for case in query.cases for row in case):
        raise Unsupported("a condition on inputs and outputs")
    if not decoder.exact:
        raise Unsupported("a float product as the last op")
    values: dict[int, Value] = {}
    found: dict[Row, ExactRow] = {}
    cases = []
    for case in query.cases:
        for row in case:
            if row not in found:
                for j, _ in row.y:
                    if j not in values:
                        values[j] = _output_value(formula, outputs, decoder, j)
                found[row] = ExactRow(tuple((c, values[j]) for j, c in row.y), row.rhs, row.strict)
        cases.append([found[row] for row in case])
    formula.kept |= {value.variable for value in values.values()}
    relaxed = {id(row): relax(formula, row) for row in found.values()}
    possible = {key for key, row in relaxed.items() if formula.least(row.terms) <= row.rhs}
    cases = [case for case in cases if all(id(row) in possible for row in case)]
    formula.cases = [[(relaxed[id(row)],) for row in case] for case in cases]
    return Rows(cases)


def _output_value(formula: Formula, outputs: Sequence[int], decoder: Decoder, j: int) -> Value:
    z, start, at = outputs[j], 0, 0
    while j >= start + decoder.parts[at][1]:
        start += decoder.parts[at][1]
        at += 1
    program, size, shape = decoder.parts[at]
    if program is None:
        every = np.arange(formula.lower[z], formula.upper[z] + 1, dtype=np.float64)
        return Value(z, every, Fraction(1), True)

    def decode(integers: Sequence[int]) -> npt.NDArray[np.float64]:
        """The output values for some values of its integer."""
        filled = np.zeros((len(integers), size), np.int32)
        filled[:, j - start] = integers
        decoded = program.run(CPU, filled.reshape(-1, *shape)).reshape(len(filled), -1)
        return np.asarray(decoded[:, j - start], np.float64)

    if program.ordinal:
        return _ordinal_value(formula, z, decode)
    if formula.upper[z] - formula.lower[z] >= WIDEST:
        raise Unsupported(
            f"an output accumulator with {formula.upper[z] - formula.lower[z] + 1} values"
        )
    stop = formula.upper[z] + 1
    table = np.concatenate(
        [decode(range(a, min(a + 4096, stop))) for a in range(formula.lower[z], stop, 4096)]
    )
    return _monotone(formula, z, table)


def _monotone(formula: Formula, x: int, table: npt.NDArray[np.float64]) -> Value:
    if not np.isfinite(table).all():
        raise Unsupported("an output that can overflow float32")
    rises = np.diff(table)
    if not ((rises >= 0).all() or (rises <= 0).all()):
        raise Unsupported("an output that is no monotone function of an integer")
    slope = Fraction(float(table[-1] - table[0])) / max(len(table) - 1, 1)
    return Value(x, table, Fraction(float(slope)), False)


def _ordinal_value(formula: Formula, z: int, decode: Any) -> Value:
    """A float that is held as its ordinal: as a function of the code behind it, or of its rank
    among all values."""
    d = formula.definition(z)
    if formula.fixed(z):
        return _monotone(formula, z, decode([formula.lower[z]]))
    if isinstance(d, Steps) and formula.upper[d.x] - formula.lower[d.x] < 1024:
        table = decode([d.at(x) for x in range(formula.lower[d.x], formula.upper[d.x] + 1)])
        rises = np.diff(table)
        if (rises >= 0).all() or (rises <= 0).all():
            return _monotone(formula, d.x, table)
    if isinstance(d, Steps):
        ranks = sorted(set(d.values))
        r = formula.steps(d.x, d.starts, [ranks.index(v) for v in d.values])
    elif isinstance(d, Pair):
        ranks = np.unique(d.table).tolist()
        r = formula.pair(d.a, d.b, np.searchsorted(ranks, d.table))
    else:
        raise Unsupported(f"a float output held by {type(d).__name__}")
    return _monotone(formula, r, decode(ranks))


def relax(formula: Formula, row: ExactRow) -> Inequality:
    """An inequality in integers that the row implies; equivalent where the values are integers."""
    slopes = _shared_slopes([v.slope for _, v in row.terms])
    rest = row.rhs
    sharp = True
    for (c, value), slope in zip(row.terms, slopes, strict=True):
        low, high = value.residual(formula.lower[value.variable], slope)
        rest -= c * (low if c > 0 else high)
        sharp &= low == high
    products: dict[int, Fraction] = {}
    for (c, value), slope in zip(row.terms, slopes, strict=True):
        products[value.variable] = products.get(value.variable, Fraction(0)) + c * slope
    for v in [v for v in products if formula.fixed(v)]:
        rest -= products.pop(v) * formula.lower[v]
    products = {v: c for v, c in products.items() if c}
    if not products:
        return Inequality((), 0 if (rest > 0 if row.strict and sharp else rest >= 0) else -1)
    common = lcm(*(c.denominator for c in products.values()))
    factor = Fraction(common, gcd(*(int(c * common) for c in products.values())))
    if max(abs(c) for c in products.values()) * factor > COEFFICIENT:
        factor = COEFFICIENT / max(abs(c) for c in products.values())
    terms, bound = [], rest * factor
    for v, c in products.items():
        rounded = round(c * factor)
        lost = abs(c * factor - rounded)
        sharp &= not lost
        bound += lost * max(abs(formula.lower[v]), abs(formula.upper[v]))
        if rounded:
            terms.append((rounded, v))
    limit = -(-bound // 1) - 1 if row.strict and sharp else bound // 1
    return Inequality(tuple(terms), int(limit))


def _shared_slopes(slopes: list[Fraction]) -> list[Fraction]:
    """Slopes that agree up to the rounding of a table become one, so that they cancel."""
    shared: list[Fraction] = []
    for slope in slopes:
        near = next((s for s in shared if abs(s - slope) <= abs(s) / 10**4), slope)
        shared.append(near)
    return shared
