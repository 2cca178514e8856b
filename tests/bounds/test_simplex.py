"""Linear inequalities in exact rationals, against Fourier-Motzkin elimination, which decides small
ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction as F

import pytest

from qverify.bounds.simplex import RationalInequality, combined, common_point
from qverify.deadline import Deadline, TimeUp
from qverify.errors import SoundnessError
from tests.graphs import ROUNDS

Bounds = dict[int, tuple[F, F]]


def eliminated(rows: Sequence[RationalInequality], box: Bounds) -> bool:
    """Whether the rows have a common point in the box: one variable after another is eliminated."""
    left: list[tuple[Mapping[int, F], F, bool]] = [(row.terms, row.rhs, row.strict) for row in rows]
    for j, (low, high) in box.items():
        left += [({j: F(1)}, high, False), ({j: F(-1)}, -low, False)]
    for j in box:
        tightest: dict[tuple[tuple[int, F], ...], tuple[F, bool]] = {}
        rest = [row for row in left if not row[0].get(j)]
        for p in (row for row in left if row[0].get(j, 0) > 0):
            for q in (row for row in left if row[0].get(j, 0) < 0):
                a, b = p[0][j], -q[0][j]
                terms = {
                    k: b * p[0].get(k, F(0)) + a * q[0].get(k, F(0)) for k in {*p[0], *q[0]} - {j}
                }
                rest.append((terms, b * p[1] + a * q[1], p[2] or q[2]))
        for terms_, rhs, strict in rest:
            key = tuple(sorted((k, c) for k, c in terms_.items() if c))
            if key not in tightest or (rhs, not strict) < (tightest[key][0], not tightest[key][1]):
                tightest[key] = rhs, strict
        left = [(dict(key), rhs, strict) for key, (rhs, strict) in tightest.items()]
    return all(rhs > 0 or (rhs == 0 and not strict) for _, rhs, strict in left)


def random_system(rng: random.Random) -> tuple[list[RationalInequality], Bounds]:
    """Rows through points of the box or close by, equalities among them."""
    box = {}
    for j in range(rng.randint(1, 3)):
        low = F(rng.randint(-4, 4), rng.choice([1, 2, 3]))
        box[j] = low, low + F(rng.randint(0, 6), rng.choice([1, 2, 3]))
    rows = []
    for _ in range(rng.randint(1, 5)):
        used = rng.sample(range(len(box)), rng.randint(1, len(box)))
        terms = {j: F(rng.choice([-3, -2, -1, 1, 2, 3]), rng.choice([1, 1, 3])) for j in used}
        at = {j: low + (high - low) * F(rng.randint(0, 4), 4) for j, (low, high) in box.items()}
        rhs = sum((c * at[j] for j, c in terms.items()), F(0)) + rng.choice(
            [F(0), F(0), F(0), F(-1, 2), F(-1, 10**9), F(1)]
        )
        rows.append(RationalInequality(terms, rhs, rng.random() < 0.4))
        if rng.random() < 0.2:
            rows.append(
                RationalInequality({j: -c for j, c in terms.items()}, -rhs, rng.random() < 0.2)
            )
    return rows, box


def test_it_decides_what_elimination_decides() -> None:
    rng, feasible = random.Random(0), 0
    for _ in range(400 * ROUNDS):
        rows, box = random_system(rng)
        found = common_point(rows, box)
        if isinstance(found, RationalInequality):
            assert found.fails_on(box) and not eliminated(rows, box)
        else:
            assert found is not None and eliminated(rows, box)
            assert all(box[j][0] <= v <= box[j][1] for j, v in found.items())
            assert all(row.holds(found) for row in rows)
            feasible += 1
    assert 100 * ROUNDS < feasible < 300 * ROUNDS


def chain(count: int, gap: F) -> list[RationalInequality]:
    """x_0 <= x_1 <= ... <= x_n <= x_0 - gap."""
    rows = [RationalInequality({j: F(1), j + 1: F(-1)}, F(0)) for j in range(count)]
    return [*rows, RationalInequality({count: F(1), 0: F(-1)}, -gap)]


@pytest.mark.parametrize("count", [2, 10, 40])
def test_a_circle_of_inequalities(count: int) -> None:
    box = {j: (F(-1), F(1)) for j in range(count + 1)}
    assert isinstance(common_point(chain(count, F(0)), box), dict)
    found = common_point(chain(count, F(1, 10**30)), box)
    assert found == RationalInequality({}, F(-1, 10**30))


def test_many_variables_and_few_rows() -> None:
    rng = random.Random(1)
    terms = [{j: F(rng.randint(-1000, 1000), 1000) for j in range(300)} for _ in range(3)]
    at = [F(rng.randint(0, 1000), 1000) for _ in range(300)]
    for nudge, kind in ((0, dict), (F(-1, 10**6), RationalInequality)):
        rows = []
        for row_terms in terms:
            value = sum((c * at[j] for j, c in row_terms.items()), F(0))
            rows += [
                RationalInequality(row_terms, value + nudge),
                RationalInequality({j: -c for j, c in row_terms.items()}, -value + nudge),
            ]
        assert isinstance(common_point(rows, {j: (F(0), F(1)) for j in range(300)}), kind)


def test_it_starts_where_it_is_told() -> None:
    box = {0: (F(0), F(9)), 1: (F(0), F(9))}
    rows = [RationalInequality({0: F(1), 1: F(1)}, F(7))]
    assert common_point(rows, box, {0: F(2), 1: F(3)}) == {0: F(2), 1: F(3)}
    assert common_point([], {}) == {} and common_point(
        [RationalInequality({}, F(0), True)], {}
    ) == RationalInequality({}, F(0), True)


def test_it_ends_in_time() -> None:
    rows, box = chain(40, F(1)), {j: (F(-1), F(1)) for j in range(41)}
    assert common_point(rows, box, effort=100) is None
    with pytest.raises(TimeUp), Deadline.after(-1.0).limits():
        common_point(rows, box)


def test_a_combination_needs_multipliers_that_are_not_negative() -> None:
    rows = chain(1, F(1))
    assert combined(rows, {0: F(1), 1: F(1)}) == RationalInequality({}, F(-1))
    with pytest.raises(SoundnessError):
        combined(rows, {0: F(1), 1: F(-1)})
