"""Conditions on inputs inside one cell: real numbers exactly, floats as far as they can be
found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction as F

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qverify.boundary.cells import halves, may_hold, solve_in_cell
from qverify.errors import Undecided
from qverify.property import Row
from tests.graphs import ROUNDS


def neighbours(start: float, count: int) -> list[float]:
    """`start` and the next float32 values above it, as far as there are any."""
    values = [np.float32(start)]
    while len(values) <= count and values[-1] < np.finfo(np.float32).max:
        values.append(np.nextafter(values[-1], np.float32(np.inf)))
    return [float(v) for v in values]


def satisfied(rows: Sequence[Row], x: Sequence[float], y: Sequence[float]) -> bool:
    for row in rows:
        total = sum((c * F(x[i]) for i, c in row.x), F(0)) + sum(
            (c * F(y[i]) for i, c in row.y), F(0)
        )
        if not (total < row.rhs if row.strict else total <= row.rhs):
            return False
    return True


STARTS = [
    0.5,
    1.0,
    -1.0,
    float(np.float32(0.1)),
    -float(np.float32(0.3)),
    0.0,
    -(2.0**-149),
    2.0**-126,
    1e30,
    255.0,
]


@settings(max_examples=150 * ROUNDS, deadline=None)
@given(st.data())
def test_solving_in_a_cell_is_brute_force_over_the_floats(data: st.DataObject) -> None:
    is_float = [data.draw(st.booleans()) for _ in range(data.draw(st.integers(1, 3)))]
    axes = []
    for real in is_float:
        if real:
            axes.append(
                neighbours(data.draw(st.sampled_from(STARTS)), data.draw(st.integers(0, 5)))
            )
        else:
            low = data.draw(st.integers(-3, 3))
            axes.append([float(v) for v in range(low, low + data.draw(st.integers(0, 5)) + 1)])
    y = [1.5]
    coefficients = st.sampled_from([F(1), F(-1), F(2), F(-1, 3), F(7, 10)])
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        used = sorted(data.draw(st.sets(st.integers(0, len(axes) - 1), max_size=2)))
        x = tuple((i, data.draw(coefficients)) for i in used)
        bare = Row(x, ((0, F(1)),) if data.draw(st.booleans()) else (), F(0))
        at = [data.draw(st.sampled_from(axis)) for axis in axes]
        value = sum((c * F(at[i]) for i, c in bare.x), F(0)) + sum(
            (c * F(y[i]) for i, c in bare.y), F(0)
        )
        nudge = data.draw(st.sampled_from([F(0), F(1, 10**50), F(-1, 10**50)]))
        rows.append(Row(bare.x, bare.y, value + nudge, data.draw(st.booleans())))
    expected = any(satisfied(rows, x, y) for x in itertools.product(*axes))
    first, last = (np.array([axis[end] for axis in axes]) for end in (0, -1))
    try:
        found = solve_in_cell(rows, np.array(y), first, last, np.array(is_float))
    except Undecided:
        assert not expected and any(is_float)
        return
    assert (found is not None) == expected
    if found is not None:
        assert satisfied(rows, found.tolist(), y)
        assert all(v in axis for v, axis in zip(found.tolist(), axes, strict=True))
    else:
        assert not may_hold(rows, np.array(y), first, last, np.array(is_float))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300 * ROUNDS, deadline=None)
@given(floats, st.one_of(floats, st.integers(0, 4)))
def test_thehalves_of_a_float_range_are_neighbours(a: float, b: float) -> None:
    """Ranges between any two floats, and ranges of a few."""
    low, high = (a, neighbours(a, b)[-1]) if isinstance(b, int) else (min(a, b), max(a, b))
    if low == high:
        return
    below, above = halves(low, high, True)
    assert low <= below < above <= high
    assert np.nextafter(np.float32(below), np.float32(np.inf)) == np.float32(above)


def test_a_cell_too_hard_for_its_budget_is_undecided() -> None:
    """x_0 + x_1 = 1/3 has no solution in floats, and bounds see it only close by."""
    terms = ((0, F(1)), (1, F(1)))
    rows = [Row(terms, (), F(1, 3)), Row(tuple((i, -c) for i, c in terms), (), F(-1, 3))]
    with pytest.raises(Undecided):
        solve_in_cell(rows, np.zeros(1), np.zeros(2), np.ones(2), np.array([True, True]))


X, ONE = (lambda *c: tuple((i, F(v)) for i, v in enumerate(c) if v)), F(1)


def equal(terms: tuple[tuple[int, F], ...], rhs: F | int) -> list[Row]:
    return [Row(terms, (), F(rhs)), Row(tuple((i, -c) for i, c in terms), (), F(-rhs))]


@pytest.mark.parametrize(
    "rows",
    [
        equal(X(1, 1), 1),
        equal(X(1, -1), 0),
        equal(X(1, -10), 0),
        equal(X(3, -1), F(1, 8)) + equal(X(0, 1, -2), F(1, 1024)),
        [
            *equal(X(1, 1, 1), 1),
            Row(X(1, -1), (), F(0), strict=True),
            Row(X(0, 1, -1), (), F(0), strict=True),
        ],
        [Row(X(1, 1, 1), (), F(9, 10)), Row(X(-1, -1, -1), (), F(-9, 10) + F(1, 10**6))],
        equal(X(*[1] * 40), 20),
        equal(X(*[1] * 300), 111) + equal(X(*[1, -1] * 150), F(5, 8)),
    ],
)
def test_equalities_that_floats_satisfy(rows: list[Row]) -> None:
    """In a cell with millions of floats along every axis; its ends have all their bits."""
    count = 1 + max(i for row in rows for i, _ in row.x)
    first, last = np.full(count, float(np.float32(0.01))), np.full(count, float(np.float32(0.7)))
    found = solve_in_cell(rows, np.zeros(1), first, last, np.ones(count, np.bool_))
    assert found is not None and satisfied(rows, found.tolist(), [0.0])
    assert ((first <= found) & (found <= last) & (found == found.astype(np.float32))).all()


def test_conditions_that_only_together_are_empty() -> None:
    band = [Row(X(1, -1), (), F(-1, 10), strict=True), Row(X(-1, 1), (), F(1, 10))]
    order = [
        Row(X(1, -1), (), F(0)),
        Row(X(0, 1, -1), (), F(0)),
        Row(X(-1, 0, 1), (), F(-1, 10**9)),
    ]
    outputs = [Row(X(1, -1), ((0, F(1)),), F(0)), Row(X(-1, 1), ((0, F(-1)),), F(0), strict=True)]
    for rows in (band, order, outputs):
        assert (
            solve_in_cell(rows, np.array([0.5]), np.zeros(3), np.ones(3), np.ones(3, np.bool_))
            is None
        )


def test_integers_are_parted_to_the_end() -> None:
    rows = equal(X(2, 4, -6), 1)
    assert (
        solve_in_cell(rows, np.zeros(1), np.zeros(3), np.full(3, 5.0), np.zeros(3, np.bool_))
        is None
    )
    found = solve_in_cell(
        equal(X(2, 4, -7), 1), np.zeros(1), np.zeros(3), np.full(3, 5.0), np.zeros(3, np.bool_)
    )
    assert found is not None and found @ [2, 4, -7] == 1
    mixed = equal(X(2, 1), F(1, 2)) + equal(X(2, -1), F(1, 2))
    assert (
        solve_in_cell(mixed, np.zeros(1), np.zeros(2), np.full(2, 5.0), np.array([False, True]))
        is None
    )
