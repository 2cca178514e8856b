"""Whether linear inequalities have a common point in a box, decided in exact rationals.

The first phase of the simplex method with bounded variables: every row is a slack variable with an upper bound, and the
sum of all violations of bounds is walked down, along one variable at a time and past corners while it still falls.
Strict inequalities are bounds less an infinitesimal (Dutertre and de Moura, "A fast linear-arithmetic solver for
DPLL(T)", CAV 2006).

Sound because neither answer is taken on trust: a point is put into the inequalities, and the multipliers of an empty
set are multiplied out (`Combination`): they give one inequality that fails on the whole box.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from qverify.deadline import looking
from qverify.errors import SoundnessError

MAX_PIVOTS = 2_000
EFFORT = 300_000  # terms of the tableau that are gone through, about a microsecond or a few each

Terms = Mapping[int, Fraction]
Pair = tuple[Fraction, Fraction]  # a number, and how many infinitesimals it has more
Ends = Mapping[int, tuple[Fraction, Fraction]]  # of each variable

ZERO, ONE = Fraction(0), Fraction(1)
NOTHING: Pair = (ZERO, ZERO)
BEYOND: Pair = (Fraction(2) ** 9999, ZERO)  # farther than anything


@dataclass(frozen=True)
class Inequality:
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


def combined(rows: Sequence[Inequality], multipliers: Mapping[int, Fraction]) -> Inequality:
    """The sum of rows times non-negative multipliers: it follows from them."""
    if any(m < 0 for m in multipliers.values()):
        raise SoundnessError("a combination of inequalities has a negative multiplier; please report this")
    terms: dict[int, Fraction] = {}
    for k, m in multipliers.items():
        for j, c in rows[k].terms.items():
            terms[j] = terms.get(j, ZERO) + m * c
    rhs = sum((m * rows[k].rhs for k, m in multipliers.items()), ZERO)
    strict = any(m > 0 and rows[k].strict for k, m in multipliers.items())
    return Inequality({j: c for j, c in terms.items() if c}, rhs, strict)


def common_point(
    rows: Sequence[Inequality], ends: Ends, start: Mapping[int, Fraction] | None = None, effort: int = EFFORT
) -> dict[int, Fraction] | Inequality | None:
    """A point of the box `ends` at which all rows hold, or an inequality that follows from the rows and fails on the whole
    box. None if neither was found with the given effort.

    `ends` has the ends of every variable in the rows, the lower one not above the upper. The search begins at `start`
    (clipped to the box; by default its middle) and changes no variable without need.
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
            raise SoundnessError("the proof that inequalities have no common point does not hold; please report this")
        return empty
    if not all(ends[j][0] <= v <= ends[j][1] for j, v in values.items()) or not all(r.holds(values) for r in rows):
        raise SoundnessError("the common point of inequalities does not satisfy them; please report this")
    return values


Found = tuple[dict[int, Fraction], dict[int, Fraction] | None]


@dataclass
class _Tableau:
    """Row k of the system is the variable ~k. Basic variables are linear functions of the others."""

    lower: dict[int, Pair]
    upper: dict[int, Pair]
    value: dict[int, Pair]
    basic: dict[int, dict[int, Fraction]]  # of each basic variable, its coefficients

    @staticmethod
    def make(rows: Sequence[Inequality], ends: Ends, start: Mapping[int, Fraction]) -> _Tableau:
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
            basic[~k] = {j: c for j, c in row.terms.items() if c}
        return _Tableau(lower, upper, value, basic)

    def solve(self, effort: int) -> Found | None:
        """The values of a common point, or the multipliers that prove that there is none."""
        dice = random.Random(0)
        for step in looking(range(MAX_PIVOTS)):
            effort -= sum(map(len, self.basic.values()))
            if effort < 0:
                return None
            wrong = {b: way for b in self.basic if (way := self._way(b))}
            if not wrong:
                return self._point(), None
            gain: dict[int, Fraction] = {}  # of each free variable: how fast the violations shrink as it rises
            for b, way in wrong.items():
                for n, c in self.basic[b].items():
                    gain[n] = gain.get(n, ZERO) + way * c
            useful = [n for n, g in gain.items() if g and self._room(n, g > 0) > NOTHING]
            if not useful:  # the slacks that cannot rise are the proof
                multipliers = {~n: g for n, g in gain.items() if n < 0 and g}
                return {}, multipliers | {~b: ONE for b in wrong if b < 0}
            steepest = step < MAX_PIVOTS // 2  # later, at random: that does not cycle
            self._walk(max(useful, key=lambda n: abs(gain[n])) if steepest else dice.choice(useful), gain, wrong)
        return None

    def _way(self, b: int) -> int:
        """Where a variable must go to meet its bounds: 1 (up), -1 (down) or 0 (it meets them)."""
        if b in self.lower and self.value[b] < self.lower[b]:
            return 1
        return -1 if self.value[b] > self.upper[b] else 0

    def _room(self, n: int, rises: bool) -> Pair:
        """How far a variable can rise (or fall) within its bounds."""
        if rises:
            return _minus(self.upper[n], self.value[n])
        return _minus(self.value[n], self.lower[n]) if n in self.lower else BEYOND

    def _walk(self, n: int, gain: Mapping[int, Fraction], wrong: Mapping[int, int]) -> None:
        """Move the free variable `n` as long as that shrinks the sum of violations; a variable that stops it is freed."""
        rises = gain[n] > 0
        sign, slope = (1 if rises else -1), abs(gain[n])
        stops: list[tuple[Pair, Fraction, int, Pair]] = []  # distance, loss of slope, the variable and where it is then
        for b, own in self.basic.items():
            if n not in own:
                continue
            rate = sign * own[n]
            if wrong.get(b, 0) * rate < 0:
                continue  # it moves away already
            ends = [self.upper[b]] if rate > 0 else [self.lower[b]] if b in self.lower else []
            if b in wrong:  # it reaches the near end first
                ends += [self.lower[b] if rate > 0 else self.upper[b]]
            for end in ends:
                gap = _minus(end, self.value[b])
                stops.append(((gap[0] / rate, gap[1] / rate), abs(rate), b, end))
        room = self._room(n, rises)
        for distance, loss, b, end in sorted(stops, key=lambda stop: (stop[0], -stop[1])):
            if distance >= room:
                break
            slope -= loss
            if slope <= 0:
                self._exchange(b, n, end)
                return
        self._move(n, self.upper[n] if rises else self.lower[n])

    def _move(self, n: int, end: Pair) -> None:
        shift = _minus(end, self.value[n])
        self.value[n] = end
        for b, own in self.basic.items():
            if c := own.get(n):
                value = self.value[b]
                self.value[b] = value[0] + c * shift[0], value[1] + c * shift[1]

    def _exchange(self, out: int, into: int, end: Pair) -> None:
        """Make `out` take the value `end` and be free, and `into` basic in its place."""
        own = self.basic.pop(out)
        c = own.pop(into)
        need = _minus(end, self.value[out])
        at = self.value[into]
        self.basic[out] = {}  # moved below like the rest
        self._move(into, (at[0] + need[0] / c, at[1] + need[1] / c))
        del self.basic[out]
        self.value[out] = end
        fresh = {n: -v / c for n, v in own.items()}
        fresh[out] = 1 / c
        for row in self.basic.values():
            if factor := row.pop(into, None):
                for n, v in fresh.items():
                    total = row.get(n, ZERO) + factor * v
                    if total:
                        row[n] = total
                    else:
                        del row[n]
        self.basic[into] = fresh

    def _point(self) -> dict[int, Fraction]:
        """The values, with a number small enough in place of the infinitesimal."""
        small = ONE
        for n, (v, d) in self.value.items():
            gaps = [(self.upper[n][0] - v, d - self.upper[n][1])]
            gaps += [(v - self.lower[n][0], self.lower[n][1] - d)] if n in self.lower else []
            small = min([small, *(gap / rise for gap, rise in gaps if rise > 0)])
        return {n: v + small * d for n, (v, d) in self.value.items() if n >= 0}


def _minus(a: Pair, b: Pair) -> Pair:
    return a[0] - b[0], a[1] - b[1]
