"""Whether linear inequalities have a common point in a box, decided in exact rationals.

The first phase of the simplex method with bounded variables: every row is a slack variable with an
upper bound, and the sum of all violations of bounds is made smaller, by moving one variable at a
time, past corners while the sum still falls. Strict inequalities are bounds less an infinitesimal
(Dutertre and de Moura, "A fast linear-arithmetic solver for DPLL(T)", CAV 2006).

Sound because neither answer is taken on trust: a point is put into the inequalities, and the
multipliers of an empty set are multiplied out (`Combination`): they give one inequality that fails
on the whole box.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

from qverify.deadline import looking
from qverify.errors import SoundnessError

MAX_PIVOTS = 2_000
EFFORT = 1_000_000  # terms of the tableau that are gone through, half a microsecond or more each

Terms = Mapping[int, Fraction]
Function = tuple[dict[int, int], int]  # coefficients, and what their sum is divided by
Pair = tuple[Fraction, Fraction]  # (a, b): the number a + b infinitesimals
Bounds = Mapping[int, tuple[Fraction, Fraction]]  # (lower, upper) of each variable

ZERO, ONE = Fraction(0), Fraction(1)


@dataclass(frozen=True)
class RationalInequality:
    """sum of coefficient * variable <= rhs, or < if `strict`."""

    terms: Terms
    rhs: Fraction
    strict: bool = False

    def holds(self, point: Mapping[int, Fraction]) -> bool:
        """Whether it holds at a point."""
        value = sum((c * point[j] for j, c in self.terms.items()), ZERO)
        return value < self.rhs if self.strict else value <= self.rhs

    def fails_on(self, box: Bounds) -> bool:
        """Whether it fails on the whole box."""
        least = sum((c * box[j][c < 0] for j, c in self.terms.items()), ZERO)
        return least >= self.rhs if self.strict else least > self.rhs


def combined(
    rows: Sequence[RationalInequality], multipliers: Mapping[int, Fraction]
) -> RationalInequality:
    """The sum of rows times non-negative multipliers: it follows from the rows."""
    if any(m < 0 for m in multipliers.values()):
        raise SoundnessError(
            "a combination of inequalities has a negative multiplier; please report this"
        )
    terms: dict[int, Fraction] = {}
    for k, m in multipliers.items():
        for j, c in rows[k].terms.items():
            terms[j] = terms.get(j, ZERO) + m * c
    rhs = sum((m * rows[k].rhs for k, m in multipliers.items()), ZERO)
    strict = any(m > 0 and rows[k].strict for k, m in multipliers.items())
    return RationalInequality({j: c for j, c in terms.items() if c}, rhs, strict)


def common_point(
    rows: Sequence[RationalInequality],
    box: Bounds,
    start: Mapping[int, Fraction] | None = None,
    effort: int = EFFORT,
) -> dict[int, Fraction] | RationalInequality | None:
    """A point of `box` at which all rows hold, or an inequality that follows from the rows and
    fails on the whole box. None if neither was found with the given effort.

    `box` bounds every variable in the rows, from below by no more than from above. The search
    begins at `start` (clipped to the box; by default its middle) and changes no variable without
    need.
    """
    for row in rows:
        if row.fails_on(box):
            return row
    found = _Tableau.make(rows, box, start or {}).solve(effort)
    if found is None:
        return None
    values, multipliers = found
    if multipliers is not None:
        empty = combined(rows, multipliers)
        if not empty.fails_on(box):
            raise SoundnessError(
                "the proof that inequalities have no common point does not hold; please report this"
            )
        return empty
    inside = all(box[j][0] <= v <= box[j][1] for j, v in values.items())
    if not inside or not all(row.holds(values) for row in rows):
        raise SoundnessError(
            "the common point of inequalities does not satisfy them; please report this"
        )
    return values


# A point, or no point and the multipliers of the rows that prove it.
Found = tuple[dict[int, Fraction], dict[int, Fraction] | None]


@dataclass
class _Tableau:
    """The variables of a system: those of the rows, j >= 0, and the slack ~k of each row k.

    Slacks have no lower bound. Basic variables are linear functions of the others, the free ones,
    in integers: a basic variable times its function's divisor (positive) is the sum of coefficients
    times free variables. Free variables lie within their bounds; basic ones may violate theirs.
    """

    lower: dict[int, Pair]
    upper: dict[int, Pair]
    value: dict[int, Pair]
    basic: dict[int, Function]

    @staticmethod
    def make(
        rows: Sequence[RationalInequality], box: Bounds, start: Mapping[int, Fraction]
    ) -> _Tableau:
        used = sorted({j for row in rows for j in row.terms})
        lower, upper, value = {}, {}, {}
        for j in used:
            low, high = box[j]
            lower[j], upper[j] = (low, ZERO), (high, ZERO)
            value[j] = (min(max(start.get(j, (low + high) / 2), low), high), ZERO)
        basic = {}
        for k, row in enumerate(rows):
            upper[~k] = (row.rhs, -ONE if row.strict else ZERO)
            value[~k] = (sum((c * value[j][0] for j, c in row.terms.items()), ZERO), ZERO)
            scale = lcm(*(c.denominator for c in row.terms.values()))
            basic[~k] = {j: int(c * scale) for j, c in row.terms.items() if c}, scale
        return _Tableau(lower, upper, value, basic)

    def solve(self, effort: int) -> Found | None:
        """The values of a common point, or the multipliers that prove that there is none."""
        dice = random.Random(0)
        for step in looking(range(MAX_PIVOTS)):
            effort -= sum(len(coefficients) for coefficients, _ in self.basic.values())
            if effort < 0:
                return None
            wrong = {b: way for b in self.basic if (way := self._way(b))}
            if not wrong:
                return self._point(), None
            gain, scale = self._gains(wrong)
            useful = [n for n, g in gain.items() if g and self._can_move(n, g > 0)]
            if not useful:
                # The sum of violations is least here, and positive. It is a sum of rows (those of
                # the slacks that are wrong, and those of the slacks that stand at their bounds, by
                # their gain) and of bounds of variables: the rows, so combined, fail on the box.
                multipliers = {~n: Fraction(g, scale) for n, g in gain.items() if n < 0 and g}
                return {}, multipliers | {~b: ONE for b in wrong if b < 0}
            steepest = step < MAX_PIVOTS // 2  # later at random, which leaves any cycle
            n = max(useful, key=lambda n: abs(gain[n])) if steepest else dice.choice(useful)
            self._walk(n, Fraction(gain[n], scale), wrong)
        return None

    def _gains(self, wrong: Mapping[int, int]) -> tuple[dict[int, int], int]:
        """How fast the sum of violations shrinks as each free variable rises, times a scale that
        makes it an integer; and that scale."""
        scale = lcm(*(self.basic[b][1] for b in wrong))
        gain: dict[int, int] = {}
        for b, way in wrong.items():
            coefficients, divisor = self.basic[b]
            for n, c in coefficients.items():
                gain[n] = gain.get(n, 0) + way * (scale // divisor) * c
        return gain, scale

    def _way(self, b: int) -> int:
        """Where a variable must go to meet its bounds: 1 (up), -1 (down) or 0 (it meets them)."""
        if b in self.lower and self.value[b] < self.lower[b]:
            return 1
        return -1 if self.value[b] > self.upper[b] else 0

    def _can_move(self, n: int, rises: bool) -> bool:
        """Whether a variable can rise (or fall) within its bounds."""
        if rises:
            return self.value[n] < self.upper[n]
        return n not in self.lower or self.value[n] > self.lower[n]

    def _walk(self, n: int, gain: Fraction, wrong: Mapping[int, int]) -> None:
        """Move the free variable `n` while that shrinks the sum of violations; the basic variable
        that stops it becomes free in its place."""
        # The sum is convex and piecewise linear in n. Its slope changes where a basic variable
        # comes to a bound: there it stops being wrong, or begins to be.
        rises, slope = gain > 0, abs(gain)
        far = self.upper[n] if rises else self.lower.get(n)
        room = None
        if far is not None:
            room = _minus(far, self.value[n]) if rises else _minus(self.value[n], far)
        for distance, loss, b, bound in self._stops(n, rises, wrong):
            if room is not None and distance >= room:
                break
            slope -= loss
            if slope <= 0:
                self._exchange(b, n, bound)
                return
        assert far is not None  # else a slack fell for ever, and violations shrank without end
        self._move(n, far)

    def _stops(
        self, n: int, rises: bool, wrong: Mapping[int, int]
    ) -> list[tuple[Pair, Fraction, int, Pair]]:
        """Where basic variables come to their bounds as the free variable `n` moves, in order: how
        far n moves, how much the slope falls there, the variable and the bound."""
        stops: list[tuple[Pair, Fraction, int, Pair]] = []
        for b, (coefficients, divisor) in self.basic.items():
            if n not in coefficients:
                continue
            rate = Fraction(coefficients[n] if rises else -coefficients[n], divisor)
            if wrong.get(b, 0) * rate < 0:
                continue  # it is wrong, and moves further away
            bounds = [self.upper[b]] if rate > 0 else [self.lower[b]] if b in self.lower else []
            if b in wrong:  # it comes to the bound that it violates, too
                bounds += [self.lower[b] if rate > 0 else self.upper[b]]
            for bound in bounds:
                gap = _minus(bound, self.value[b])
                stops.append(((gap[0] / rate, gap[1] / rate), abs(rate), b, bound))
        return sorted(stops, key=lambda stop: (stop[0], -stop[1]))

    def _move(self, n: int, to: Pair) -> None:
        """Give the free variable `n` the value `to`; basic variables follow."""
        shift = _minus(to, self.value[n])
        self.value[n] = to
        for b, (coefficients, divisor) in self.basic.items():
            if n in coefficients:
                rate, value = Fraction(coefficients[n], divisor), self.value[b]
                self.value[b] = value[0] + rate * shift[0], value[1] + rate * shift[1]

    def _exchange(self, out: int, into: int, bound: Pair) -> None:
        """Make the basic variable `out` free, at `bound`, and the free one `into` basic."""
        coefficients, divisor = self.basic.pop(out)
        c = coefficients.pop(into)
        need, at, rate = _minus(bound, self.value[out]), self.value[into], Fraction(divisor, c)
        self._move(into, (at[0] + need[0] * rate, at[1] + need[1] * rate))
        self.value[out] = bound
        # divisor out = c into + rest, solved for `into`: fresh / |c|. Then that is put in place of
        # `into` in every other function, over a common divisor.
        sign, whole = (1 if c > 0 else -1), abs(c)
        fresh = {n: -sign * v for n, v in coefficients.items()}
        fresh[out] = sign * divisor
        for b, (row, size) in self.basic.items():
            if factor := row.pop(into, None):
                common = gcd(factor, whole)
                factor, times = factor // common, whole // common
                row = {n: times * v for n, v in row.items()}
                for n, v in fresh.items():
                    row[n] = row.get(n, 0) + factor * v
                self.basic[b] = _reduced(row, size * times)
        self.basic[into] = _reduced(fresh, whole)

    def _point(self) -> dict[int, Fraction]:
        """The values, with a number in place of the infinitesimal so small that all bounds hold."""
        small = ONE
        for n, (v, d) in self.value.items():
            gaps = [(self.upper[n][0] - v, d - self.upper[n][1])]
            gaps += [(v - self.lower[n][0], self.lower[n][1] - d)] if n in self.lower else []
            small = min([small, *(gap / rise for gap, rise in gaps if rise > 0)])
        return {n: v + small * d for n, (v, d) in self.value.items() if n >= 0}


def _reduced(row: dict[int, int], size: int) -> Function:
    common = gcd(size, *row.values())
    return {n: v // common for n, v in row.items() if v}, size // common


def _minus(a: Pair, b: Pair) -> Pair:
    return a[0] - b[0], a[1] - b[1]
