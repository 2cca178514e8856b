"""Whether linear inequalities have a common point in a box, decided in exact rationals.

The first phase of the simplex method with bounded variables: every row is a slack variable with an
upper bound, and the sum of all violations of bounds is walked down, along one variable at a time
and past corners while it still falls. Strict inequalities are bounds less an infinitesimal
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
Function = tuple[dict[int, int], int]
Pair = tuple[Fraction, Fraction]  # a number, and how many infinitesimals it has more
Ends = Mapping[int, tuple[Fraction, Fraction]]  # of each variable

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

    def fails_on(self, ends: Ends) -> bool:
        """Whether it fails on the whole box."""
        least = sum((c * ends[j][c < 0] for j, c in self.terms.items()), ZERO)
        return least >= self.rhs if self.strict else least > self.rhs


def combined(
    rows: Sequence[RationalInequality], multipliers: Mapping[int, Fraction]
) -> RationalInequality:
    """The sum of rows times non-negative multipliers: it follows from them."""
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
    ends: Ends,
    start: Mapping[int, Fraction] | None = None,
    effort: int = EFFORT,
) -> dict[int, Fraction] | RationalInequality | None:
    """A point of the box `ends` at which all rows hold, or an inequality that follows from the rows
    and fails on the whole box. None if neither was found with the given effort.

    `ends` has the ends of every variable in the rows, the lower one not above the upper. The search
    begins at `start` (clipped to the box; by default its middle) and changes no variable without
    need.
    """
    for row in rows:
        if row.fails_on(ends):
            return row
    found = _Tableau.make(rows, ends, start or {}).solve(effort)
    if found is None:
        return None
    values, multipliers = found
    if multipliers is not None:
        empty = combined(rows, multipliers)
        if not empty.fails_on(ends):
            raise SoundnessError(
                "the proof that inequalities have no common point does not hold; please report this"
            )
        return empty
    if not all(ends[j][0] <= v <= ends[j][1] for j, v in values.items()) or not all(
        r.holds(values) for r in rows
    ):
        raise SoundnessError(
            "the common point of inequalities does not satisfy them; please report this"
        )
    return values


Found = tuple[dict[int, Fraction], dict[int, Fraction] | None]


@dataclass
class _Tableau:
    """Row k of the system is the variable ~k. Basic variables are linear functions of the others,
    in integers: a variable times the second entry of its function (positive) is the sum of the
    coefficients in the first."""

    lower: dict[int, Pair]
    upper: dict[int, Pair]
    value: dict[int, Pair]
    basic: dict[int, Function]

    @staticmethod
    def make(
        rows: Sequence[RationalInequality], ends: Ends, start: Mapping[int, Fraction]
    ) -> _Tableau:
        used = sorted({j for row in rows for j in row.terms})
        lower, upper, value = {}, {}, {}
        for j in used:
            low, high = ends[j]
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
            effort -= sum(len(own) for own, _ in self.basic.values())
            if effort < 0:
                return None
            wrong = {b: way for b in self.basic if (way := self._way(b))}
            if not wrong:
                return self._point(), None
            scale = lcm(*(self.basic[b][1] for b in wrong))
            gain: dict[
                int, int
                # of each free variable: how fast the violations shrink as it rises, times `scale`
            ] = {}
            for b, way in wrong.items():
                own, part = self.basic[b]
                for n, c in own.items():
                    gain[n] = gain.get(n, 0) + way * (scale // part) * c
            useful = [n for n, g in gain.items() if g and self._can_move(n, g > 0)]
            if not useful:  # the slacks that cannot rise are the proof
                multipliers = {~n: Fraction(g, scale) for n, g in gain.items() if n < 0 and g}
                return {}, multipliers | {~b: ONE for b in wrong if b < 0}
            steepest = step < MAX_PIVOTS // 2  # later, at random: that does not cycle
            n = max(useful, key=lambda n: abs(gain[n])) if steepest else dice.choice(useful)
            self._walk(n, Fraction(gain[n], scale), wrong)
        return None

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
        """Move the free variable `n` as long as that shrinks the sum of violations; a variable that
        stops it is freed."""
        rises, slope = gain > 0, abs(gain)
        stops: list[
            tuple[Pair, Fraction, int, Pair]
        ] = []  # distance, loss of slope, the variable and where it is then
        for b, (own, part) in self.basic.items():
            if n not in own:
                continue
            rate = Fraction(own[n] if rises else -own[n], part)
            if wrong.get(b, 0) * rate < 0:
                continue  # it moves away already
            ends = [self.upper[b]] if rate > 0 else [self.lower[b]] if b in self.lower else []
            if b in wrong:  # it reaches the near end first
                ends += [self.lower[b] if rate > 0 else self.upper[b]]
            for end in ends:
                gap = _minus(end, self.value[b])
                stops.append(((gap[0] / rate, gap[1] / rate), abs(rate), b, end))
        far = self.upper[n] if rises else self.lower.get(n)
        room = (
            None
            if far is None
            else _minus(far, self.value[n])
            if rises
            else _minus(self.value[n], far)
        )
        for distance, loss, b, at in sorted(stops, key=lambda stop: (stop[0], -stop[1])):
            if room is not None and distance >= room:
                break
            slope -= loss
            if slope <= 0:
                self._exchange(b, n, at)
                return
        assert far is not None  # a slack that falls for ever would make good violations without end
        self._move(n, far)

    def _move(self, n: int, end: Pair) -> None:
        shift = _minus(end, self.value[n])
        self.value[n] = end
        for b, (own, part) in self.basic.items():
            if n in own:
                rate, value = Fraction(own[n], part), self.value[b]
                self.value[b] = value[0] + rate * shift[0], value[1] + rate * shift[1]

    def _exchange(self, out: int, into: int, end: Pair) -> None:
        """Make `out` take the value `end` and be free, and `into` basic in its place."""
        own, part = self.basic.pop(out)
        c = own.pop(into)
        need, at, rate = _minus(end, self.value[out]), self.value[into], Fraction(part, c)
        self._move(into, (at[0] + need[0] * rate, at[1] + need[1] * rate))
        self.value[out] = end
        sign = 1 if c > 0 else -1
        fresh, whole = {n: -sign * v for n, v in own.items()}, abs(c)  # `into` is fresh / whole
        fresh[out] = sign * part
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
        """The values, with a number small enough in place of the infinitesimal."""
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
