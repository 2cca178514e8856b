"""Conditions that only together leave no input: refuted on boxes, decided by the search, against
every code vector."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest

from qverify.bounds.unsafe import OPEN, REFUTED, Grid, make_unsafe
from qverify.options import Options
from qverify.property import Box, Query, Row
from qverify.result import Verdict
from qverify.search.joint import MAX_LEARNED, Joint
from tests.search.test_search import (
    box_of,
    check_candidate,
    int32,
    points_of,
    problem_of,
    random_ops,
    run,
    y_row,
)

GRID = Grid((0, 0), (1000.0, 1000.0))


def x_row(rhs: F | int, *c: int, y: tuple[tuple[int, F], ...] = (), strict: bool = False) -> Row:
    return Row(tuple((i, F(v)) for i, v in enumerate(c) if v), y, F(rhs), strict)


def joint_of(*cases: tuple[Row, ...]) -> Joint:
    return Joint.make(make_unsafe(Query(Box((), ()), cases), 3, GRID), GRID, 3)


def test_the_systems_are_what_hangs_together_with_inputs() -> None:
    inputs, mixed = x_row(0, 1, -1), x_row(0, 1, y=((0, F(1)),))
    near, far = y_row(5, 1, 1), y_row(5, 0, 1)
    joint = joint_of((near, far), (inputs, near), (mixed, far), (mixed, near, far), (inputs,))
    assert {k: len(system.rows) for k, system in joint.systems.items()} == {3: 3}


def test_what_is_learned_from_one_box_refutes_others() -> None:
    """A thin band around the diagonal that a second one misses: every box around the diagonal meets
    both."""
    joint = joint_of(
        (x_row(F(-2, 10), 1, -1), x_row(F(1, 10), -1, 1)), (x_row(0, 1, -1), x_row(0, -1, 1))
    )
    low, high = np.zeros((500, 3)), np.ones((500, 3))
    y = np.full((500, 2), -9.0), np.full((500, 2), 9.0)
    status = np.full((500, 2), OPEN, np.int8)
    joint.refine(status, y, (low, high))
    assert (status[:8, 0] == REFUTED).all() and (status[:, 1] == OPEN).all()
    joint.refine(status, y, (low, high), search=False)
    assert (status[:, 0] == REFUTED).all() and (status[:, 1] == OPEN).all()
    assert joint.points and all(point[0] == point[1] for point in joint.points)


def test_outputs_take_part_with_their_bounds() -> None:
    # X <= y and y < x - 1.
    rows = (
        x_row(0, 1, y=((0, F(-1)),)),
        x_row(-1, -1, y=((0, F(1)),), strict=True),
    )
    joint, status = joint_of(rows), np.full((1, 1), OPEN, np.int8)
    joint.refine(
        status, (np.zeros((1, 2)), np.ones((1, 2))), (np.zeros((1, 3)), np.full((1, 3), 5.0))
    )
    assert status.tolist() == [[REFUTED]]


def test_little_is_remembered() -> None:
    joint = joint_of((x_row(0, 1, -1), x_row(0, 0, 1, -1)))
    for k in range(60):
        x = np.array([[k + 1.5, k + 0.5, k]]), np.array([[k + 2.0, k + 2.0, k + 1.0]])
        joint.refine(np.full((1, 1), OPEN, np.int8), (np.zeros((1, 2)), np.ones((1, 2))), x)
    assert len(joint.systems[0].learned) <= MAX_LEARNED and len(joint.points) <= MAX_LEARNED


@pytest.mark.parametrize("seed", range(24))
def test_the_verdict_is_brute_force_s(seed: int) -> None:
    """Integer inputs: the rows hold at a code vector or they do not."""
    rng = np.random.default_rng(seed)
    spans = [(int(a), int(a) + 11) for a in rng.integers(0, 100, 3)]
    ops = random_ops(rng, 3, 2)
    bare = problem_of(ops, box_of(*spans), [])
    points = points_of(bare.lower, bare.upper)
    y = bare.decoder.decode(bare.network.run(bare.kernels, int32(points)))
    rows, holds = [], np.ones(len(points), np.bool_)
    for k in range(4):
        c = rng.integers(-3, 4, 3)
        d = rng.integers(-1, 2, 2) * (k % 2)
        value = points @ c + y @ d
        rhs = int(np.quantile(value, rng.choice([0.1, 0.3, 0.5])))
        terms = tuple((j, F(int(v))) for j, v in enumerate(d) if v)
        rows.append(x_row(rhs, *c.tolist(), y=terms))
        holds &= value <= rhs
    problem_rows = tuple(row for row in rows if row.x or row.y)
    for options in (Options(), Options(attack=False, batch=5), Options(branch="widest", batch=1)):
        problem = problem_of(ops, box_of(*spans), [problem_rows])
        outcome, _ = run(problem, options)
        assert outcome.verdict is (Verdict.SAT if holds.any() else Verdict.UNSAT)
        if holds.any():
            check_candidate(problem, outcome)
