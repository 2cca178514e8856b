"""Regions against the truth: for every pair of accumulators for which a row holds, some region of
it holds, and where steps allow it no other pair lies in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import product
from math import ceil, floor
from typing import Any

import numpy as np
import pytest

from qverify.bounds import regions as regions_module
from qverify.bounds.regions import Compiler, Levels, Line, Output, Region
from qverify.ops import Type
from qverify.ops.relax import StaircaseRelaxation, make_staircase
from qverify.property import Row
from tests.graphs import ROUNDS

Rng = np.random.Generator
X = Type((), -12, 13)  # accumulators
SPAN = np.arange(X.low, X.high + 1)
ACCUMULATORS, CODES = 1, 2  # network values
NOTHING = np.zeros(0, np.int64)


@dataclass
class World:
    """Output elements, each a monotone function of the code of its accumulator."""

    rules: list[StaircaseRelaxation]
    codes: list[Any]  # per element: the code for each accumulator in SPAN
    levels: Any  # of all codes: the output value, monotone
    low: int  # the least code
    root_bounds: tuple[Any, Any]  # of the codes

    def y(self, element: int) -> list[Fraction]:
        """The output for each accumulator."""
        return [Fraction(float(self.levels[c - self.low])) for c in self.codes[element]]

    def allowed(self, element: int) -> Any:
        """Which accumulators the root box leaves."""
        return (self.root_bounds[0][element] <= self.codes[element]) & (
            self.codes[element] <= self.root_bounds[1][element]
        )

    def compiler(self) -> Compiler:
        count = len(self.rules)
        thresholds = np.concatenate([rule.thresholds for rule in self.rules])
        slack = np.concatenate([rule.slack for rule in self.rules])
        joint = StaircaseRelaxation(thresholds, np.arange(count), slack, self.low)
        one = np.ones(count, np.int64)
        worst = self.levels.astype(np.float64) - np.arange(self.low, self.low + len(self.levels))
        line = Line(
            CODES, one, one * int(np.floor(worst.min())), one * int(np.ceil(worst.max())), 0
        )
        output = Output(count, line, Levels(CODES, np.arange(count), self.low, self.levels))
        return Compiler(
            [output],
            lambda value: (joint, ACCUMULATORS) if value == CODES else None,
            lambda value: self.root_bounds,
            lambda value: 1 << 8,
        )


def _entries(table: Any, v: Any) -> Any:
    return table[v - X.low]


def world(rng: Rng, count: int, even: bool = False) -> World:
    """Staircases of all kinds: even, uneven, with jumps, constant; levels rising or falling, with
    plateaus or not."""
    high = int(rng.integers(2, 9))
    low = int(rng.integers(-4, 3))
    rules, codes = [], []
    for _ in range(count):
        kind = rng.integers(4)
        if even:
            table = np.clip(np.arange(X.count) + int(rng.integers(-20, 3)), 0, high)
        elif kind == 0:
            table = np.clip(
                (np.arange(X.count) + rng.integers(-9, 9)) // rng.integers(1, 6), 0, high
            )
        elif kind == 1:
            table = np.minimum(np.cumsum(rng.random(X.count) < 0.4), high)
        elif kind == 2:
            table = np.sort(rng.integers(0, high + 1, X.count))
        else:
            table = np.clip(
                np.rint(np.arange(X.count) * rng.uniform(0.05, 2) + rng.uniform(-9, 2)), 0, high
            )
        table = table.astype(np.int64) + low
        rule = make_staircase(
            partial(_entries, table),
            1,
            np.zeros(1, np.int64),
            Type((1,), X.low, X.high),
            low,
            low + high,
        )
        assert isinstance(rule, StaircaseRelaxation)
        rules.append(rule)
        codes.append(table)
    steps = rng.integers(0, 3, high) if not even and rng.random() < 0.4 else np.ones(high, np.int64)
    levels = np.concatenate([[0], np.cumsum(steps)]) * float(rng.choice([1, 0.5, 0.25])) + int(
        rng.integers(-3, 4)
    )
    if rng.random() < 0.4:
        levels = levels[::-1]
    first, last = (np.array([c[i] for c in codes]) for i in (0, -1))
    if rng.random() < 0.5:  # a root box that leaves fewer codes
        first, last = np.sort(
            np.stack([rng.integers(first, last + 1), rng.integers(first, last + 1)]), axis=0
        )
    return World(rules, codes, levels.copy(), low, (first, last))


def row(rng: Rng, example: World, elements: Sequence[int], plain: bool = False) -> Row:
    """A row about some outputs; its right-hand side is often a value that it takes: a tie."""
    choice = (
        [Fraction(1), Fraction(-1)]
        if plain
        else [Fraction(n, d) for n in (-7, -3, -1, 1, 2, 5) for d in (1, 3)]
    )
    terms = tuple((e, choice[rng.integers(len(choice))]) for e in elements)
    if plain and len(elements) == 2:
        terms = ((elements[0], terms[0][1]), (elements[1], -terms[0][1]))
    at = [int(rng.integers(X.count)) for _ in elements]
    rhs = sum((c * example.y(e)[i] for (e, c), i in zip(terms, at, strict=True)), Fraction(0))
    if rng.random() < 0.3:
        rhs += Fraction(int(rng.integers(-5, 6)), 4)
    return Row((), terms, rhs, bool(rng.random() < 0.5))


def holds(example: World, rows: Sequence[Row], elements: int) -> Any:
    """Whether all rows hold at each tuple of accumulators: bool [X.count] * elements. In integers:
    everything times 12."""
    result = np.ones((X.count,) * elements, np.bool_)
    values = [np.array([int(4 * v) for v in example.y(e)], np.int64) for e in range(elements)]
    grids = np.meshgrid(*values, indexing="ij")
    for r in rows:
        total = sum((int(3 * c) * grids[e] for e, c in r.y), np.zeros(result.shape, np.int64))
        result &= total < ceil(12 * r.rhs) if r.strict else total <= floor(12 * r.rhs)
    return result


def covered(example: World, found: list[Region], elements: int) -> Any:
    """Whether some region holds at each tuple of accumulators."""
    shape = (X.count,) * elements
    grids = np.meshgrid(*[SPAN] * elements, indexing="ij") if elements else []
    codes = np.meshgrid(*example.codes[:elements], indexing="ij") if elements else []
    result = np.zeros(shape, np.bool_)
    for region in found:
        met = np.ones(shape, np.bool_)
        for inequality in region:
            total = np.full(shape, inequality.constant, np.int64)
            for value, index, c in inequality.terms:
                total = total + c * (grids if value == ACCUMULATORS else codes)[index]
            met &= total >= 0
        result |= met
    return result


def inside(example: World, elements: int) -> Any:
    return np.logical_and.reduce(
        np.meshgrid(*(example.allowed(e) for e in range(elements)), indexing="ij")
    )


def test_one_output_is_exact() -> None:
    for seed in range(400 * ROUNDS):
        rng = np.random.default_rng([1, seed])
        example = world(rng, 1)
        r = row(rng, example, [0])
        found = example.compiler().regions((r,))
        assert found is not None and len(found) <= 1
        true, got, box = holds(example, [r], 1), covered(example, found, 1), inside(example, 1)
        assert (true == got)[box].all()


def test_two_outputs_are_covered() -> None:
    slopes, ties = 0, 0
    for seed in range(600 * ROUNDS):
        rng = np.random.default_rng([2, seed])
        example = world(rng, 2)
        r = row(rng, example, rng.permutation(2).tolist())
        found = example.compiler().regions((r,))
        assert found is not None
        true, got, box = holds(example, [r], 2), covered(example, found, 2), inside(example, 2)
        assert (got | ~true)[box].all()
        slope = any(len(region) == 3 for region in found)
        if not slope:
            assert (true == got)[box].all()
        else:  # a pair too many only lies beyond both ends of the slope
            extra = got & ~true & box
            (last,) = (region for region in found if len(region) == 3)
            assert (covered(example, [last], 2) | ~extra).all()
        slopes += slope
        ties += bool((holds(example, [Row((), r.y, r.rhs, not r.strict)], 2) != true).any())
        assert len(found) <= 3
    assert slopes > 50 * ROUNDS and ties > 200 * ROUNDS


@pytest.mark.parametrize("power", [0, -20, 60, 300])
def test_needs_are_the_same_in_integers_and_in_fractions(power: int) -> None:
    """The least step of the first output at which a row holds, for every step of the second; values
    and coefficients of all sizes, so that either way is taken."""
    factors = [Fraction(n, d) for n in (-(2**70), -7, -1, 1, 3, 2**40) for d in (1, 3)]
    for seed in range(200 * ROUNDS):
        rng = np.random.default_rng([9, seed])
        first, second = (
            regions_module._Steps(
                0, 0, 1, values.astype(np.float32).astype(np.float64), np.zeros(0, np.int64)
            )
            for values in np.sort(
                rng.integers(-40, 40, (2, 12)) * np.ldexp(1.0, rng.integers(-9, 9, (2, 1)))
            )
        )
        c1, c2 = (factors[rng.integers(len(factors))] for _ in "ab")
        falling = [
            replace(s, values=s.values[:: -1 if c > 0 else 1])
            for s, c in ((first, c1), (second, c2))
        ]
        rhs = c1 * Fraction(float(rng.choice(first.values))) + c2 * Fraction(
            float(rng.choice(second.values))
        )
        rhs = rhs * Fraction(2) ** power + Fraction(int(rng.integers(-2, 3)), 6)
        bound_row = Row((), ((0, c1), (1, c2)), rhs, bool(rng.random() < 0.5))
        expected = [
            regions_module._least(bound_row, c1, falling[0], c2 * Fraction(float(y)))
            for y in falling[1].values
        ]
        assert regions_module._needs(bound_row, *falling).tolist() == expected


def test_two_outputs_of_equal_scales_and_single_steps_are_exact() -> None:
    slopes = 0
    for seed in range(300 * ROUNDS):
        rng = np.random.default_rng([3, seed])
        example = world(rng, 2, even=True)
        r = row(rng, example, rng.permutation(2).tolist(), plain=True)
        found = example.compiler().regions((r,))
        assert found is not None
        assert (holds(example, [r], 2) == covered(example, found, 2))[inside(example, 2)].all()
        slopes += any(len(region) == 3 for region in found)
    assert slopes > 70 * ROUNDS


def test_a_case_of_several_rows_is_covered() -> None:
    seen = 0
    for seed in range(300 * ROUNDS):
        rng = np.random.default_rng([4, seed])
        example = world(rng, 2)
        rows = tuple(
            row(
                rng,
                example,
                rng.permutation(2)[: rng.integers(1, 3)].tolist(),
                plain=bool(rng.random() < 0.5),
            )
            for _ in range(int(rng.integers(2, 4)))
        )
        found = example.compiler().regions(rows)
        assert found is not None
        true, box = holds(example, rows, 2), inside(example, 2)
        assert (covered(example, found, 2) | ~true)[box].all()
        seen += bool((true & box).any())
    assert seen > 30 * ROUNDS


def test_many_regions_become_lines_and_still_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions_module, "MOST", 2)
    lines = 0
    for seed in range(300 * ROUNDS):
        rng = np.random.default_rng([5, seed])
        example = world(rng, 2)
        rows = tuple(row(rng, example, rng.permutation(2).tolist()) for _ in range(2))
        found = example.compiler().regions(rows)
        assert found is not None
        true, box = holds(example, rows, 2), inside(example, 2)
        assert (covered(example, found, 2) | ~true)[box].all()
        lines += any(v == CODES for region in found for i in region for v, _, _ in i.terms)
    assert lines > 30 * ROUNDS


def test_three_outputs_are_a_line() -> None:
    seen = 0
    for seed in range(12 * ROUNDS):
        rng = np.random.default_rng([6, seed])
        example = world(rng, 3)
        r = row(rng, example, rng.permutation(3).tolist())
        found = example.compiler().regions((r,))
        assert found is not None and len(found) == 1 and len(found[0]) == 1
        true, box = holds(example, [r], 3), inside(example, 3)
        got = covered(example, found, 3)
        assert (got | ~true)[box].all()
        seen += bool((true & box).any() and (~got & box).any())
    assert seen > 2 * ROUNDS


@pytest.mark.parametrize("unit", [0, -20, 5])
def test_lines_with_remainders_cover(unit: int) -> None:
    """Y = (slope v + e) 2^unit with any e within its bounds, over one to three elements and every v
    in a range. A row that holds everywhere has one region without inequalities, one that holds
    nowhere has none."""
    kinds = set()
    for seed in range(60 * ROUNDS):
        rng = np.random.default_rng([7, seed])
        count = int(rng.integers(1, 4))
        large = 2 ** int(rng.integers(1, 30))
        slope = rng.integers(-large, large + 1, count)
        lower = rng.integers(-large, large + 1, count)
        upper = lower + rng.integers(0, large + 1, count)
        output = Output(count, Line(ACCUMULATORS, slope, lower, upper, unit), None)
        compiler = Compiler([output], lambda v: None, lambda v: (NOTHING, NOTHING), lambda v: 6)
        v = np.array(list(product(range(-6, 7, 2 if count > 2 else 1), repeat=count)), object)
        e = np.array(rng.integers(lower, upper + 1, v.shape), object)
        extreme = rng.integers(0, 3, v.shape)
        e = np.where(
            extreme == 0, lower.astype(object), np.where(extreme == 1, upper.astype(object), e)
        )
        y = (slope.astype(object) * v + e) * (Fraction(2) ** unit)
        terms = tuple(
            (i, Fraction(int(rng.choice([-5, -1, 1, 3])), int(rng.choice([1, 2, 7]))))
            for i in range(count)
        )
        total = sum((c * y[:, i] for i, c in terms), np.zeros(len(y), object))
        r = Row((), terms, total[rng.integers(len(total))], bool(rng.random() < 0.5))
        found = compiler.regions((r,))
        assert found is not None
        true = [bool(t < r.rhs if r.strict else t <= r.rhs) for t in total]
        kinds.add((len(found), sum(map(len, found))))
        if not found or not found[0]:
            assert not any(true) if not found else len(found) == 1
            continue
        ((inequality,),) = found
        left = (
            sum((c * v[:, i] for _, i, c in inequality.terms), np.zeros(len(v), object))
            + inequality.constant
        )
        assert all(q >= 0 for q, t in zip(left, true, strict=True) if t)
        assert abs(inequality.constant) <= 6 * sum(abs(c) for _, _, c in inequality.terms)
        assert all(abs(c) <= 2**21 for _, _, c in inequality.terms)
    assert (1, 1) in kinds and len(kinds) > 1


@pytest.mark.parametrize("rhs", [10**8, 2**62, 10**40, -(10**40)])
def test_rows_far_from_every_value_leave_no_constant(rhs: int) -> None:
    """A row with "no limit", or an absurd one: its constant would leave int64."""
    output = Output(
        2,
        Line(ACCUMULATORS, np.ones(2, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64), 0),
        None,
    )
    compiler = Compiler([output], lambda v: None, lambda v: (NOTHING, NOTHING), lambda v: 1000)
    near, far = (
        Row((), ((0, Fraction(1)),), Fraction(3), False),
        Row((), ((1, Fraction(1)),), Fraction(rhs), False),
    )
    alone, both = compiler.regions((far,)), compiler.regions((near, far))
    assert (alone, both) == (([()], compiler.regions((near,))) if rhs > 0 else ([], []))


def test_lines_beyond_all_types_are_not_taken() -> None:
    output = Output(
        1,
        Line(ACCUMULATORS, np.ones(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64), 0),
        None,
    )
    compiler = Compiler([output], lambda v: None, lambda v: (NOTHING, NOTHING), lambda v: 2**61)
    assert compiler.regions((Row((), ((0, Fraction(1)),), Fraction(3), False),)) is None


def test_rows_without_outputs() -> None:
    example = world(np.random.default_rng(0), 2)
    for rhs, strict, number in ((1, False, 1), (0, False, 1), (0, True, 0), (-1, False, 0)):
        found = example.compiler().regions((Row((), (), Fraction(rhs), strict),))
        assert found is not None and len(found) == number and not any(found)


def test_a_dropped_region_is_caught_here(monkeypatch: pytest.MonkeyPatch) -> None:
    right = regions_module._two
    monkeypatch.setattr(regions_module, "_two", lambda *args: right(*args)[:-1])
    with pytest.raises(AssertionError):
        test_two_outputs_are_covered()


def test_a_slope_one_too_steep_is_caught_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inequality of a tie that is lost: its constant is one too small."""
    right = regions_module._two

    def wrong(*args: Any) -> list[Region]:
        found = right(*args)
        return [
            (regions_module.Inequality(r[0].terms, r[0].constant - 1), *r[1:]) if r else r
            for r in found
        ]

    monkeypatch.setattr(regions_module, "_two", wrong)
    with pytest.raises(AssertionError):
        test_two_outputs_are_covered()
