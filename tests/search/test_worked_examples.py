"""Searches that can be followed with a pencil. Each says in full what happens, and why."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from qverify.deadline import Deadline
from qverify.network import Network
from qverify.ops import Dense, FloatProgram, Requantize
from qverify.options import Options
from qverify.property import Box, Query, Row
from qverify.result import Stats, Verdict
from qverify.search.bab import search
from qverify.search.bounds import BOUNDS, Boxes
from qverify.search.knowledge import Knowledge
from qverify.search.proof import CLOSED, CUT, DUAL, REGIONS, Proof
from tests.networks import Maker
from tests.search.queries import Asked

FOREVER = Deadline.after(None)
INTERVALS, LAST_LAYER, CROWN, _ = BOUNDS
PLAIN = Options(attack=False, sweep=False, backward=False, branch="widest")


def linear(weight: list[list[int]], bias: list[int], high: int) -> Dense:
    """x W + b for codes 0..high."""
    return Dense(np.array(weight, np.int64), np.array(bias, np.int64), 0, high)


def at_least(value: int, *coefficients: int) -> Row:
    """sum of coefficient * Y >= value, as a row: -sum <= -value."""
    return Row((), tuple((j, Fraction(-c)) for j, c in enumerate(coefficients) if c), -value * ONE)


ONE = Fraction(1)


def query(network: Network, spans: list[tuple[int, int]], *cases: tuple[Row, ...]) -> Asked:
    """A query over the codes; its brute force is not needed here."""
    box = Box(tuple(Fraction(a) for a, _ in spans), tuple(Fraction(b) for _, b in spans))
    return Asked(network, Query(box, cases), None, None)


def refuted(bound: object, asked: Asked) -> bool:
    """Whether a bound alone refutes the only case on the whole box."""
    known = Knowledge(asked.problem())
    box = Boxes(*known.problem.root)
    every = np.ones((1, 1), np.bool_)
    return bool(bound.refute(known, box, every, FOREVER).cases.all())  # type: ignore[attr-defined]


def test_intervals_of_one_layer() -> None:
    """y = 2 a - 3 b + 5 on a in [0, 3], b in [1, 2].

    Its largest value takes the largest a and the least b: 6 - 3 + 5 = 8. So y >= 9 is impossible,
    and y >= 8 is true at (3, 1) alone.
    """
    maker = Maker(np.random.default_rng(0), 2, 3)
    network = maker.network(maker.add(linear([[2], [-3]], [5], 3), 0))
    spans = [(0, 3), (1, 2)]
    assert refuted(INTERVALS, query(network, spans, (at_least(9, 1),)))
    problem = query(network, spans, (at_least(8, 1),)).problem()
    outcome = search(problem, PLAIN, FOREVER, np.random.default_rng(0), Stats())
    assert outcome.verdict is Verdict.SAT and outcome.candidate is not None
    assert outcome.candidate.codes.tolist() == [3, 1]


def test_two_outputs_that_move_together() -> None:
    """Y_0 = Y_1 = a. Alone each may be 0 or 7, so intervals let their difference be 7; as one
    linear function it is 0."""
    maker = Maker(np.random.default_rng(0), 1)
    network = maker.network(maker.add(linear([[1, 1]], [0, 0], 7), 0))
    asked = query(network, [(0, 7)], (at_least(1, 1, -1),))
    assert not refuted(INTERVALS, asked)
    assert refuted(LAST_LAYER, asked)


def test_a_box_that_is_split_once() -> None:
    """y = 2 a - 3 on a in [0, 3] is -3, -1, 1 or 3, and never 0.

    Intervals say [-3, 3]: open. The middle cut gives a <= 1 with [-3, -1], and a >= 2 with [1, 3]:
    both closed. Three boxes were bounded, two are proved, no point was looked at.
    """
    maker = Maker(np.random.default_rng(0), 1, 3)
    network = maker.network(maker.add(linear([[2]], [-3], 3), 0))
    asked = query(network, [(0, 3)], (at_least(0, 1), at_least(0, -1)))
    stats, proof = Stats(), Proof()
    rng = np.random.default_rng(0)
    outcome = search(asked.problem(), PLAIN, FOREVER, rng, stats, None, proof)
    assert outcome.verdict is Verdict.UNSAT
    assert (stats.subproblems, stats.proved, stats.leaves) == (3, 2, 0)
    assert list(proof.kind) == [CUT, CLOSED, CLOSED]
    assert (proof.value[0], proof.element[0], proof.threshold[0]) == (0, 0, 2)


def distance(spans: list[tuple[int, int]], least: int) -> Asked:
    """|a + b - 3| >= `least`, as relu(z) + relu(-z) of z = a + b - 3."""
    maker = Maker(np.random.default_rng(0), 2, 3)
    relu = Requantize(FloatProgram().then("mul", 1.0), np.asarray(0, np.int32), 0, 255)
    both = maker.add(relu, maker.add(linear([[1, -1], [1, -1]], [-3, 3], 3), 0))
    network = maker.network(maker.add(linear([[1], [1]], [0], 255), both))
    return query(network, spans, (at_least(least, 1),))


def test_triangles_close_what_intervals_cannot() -> None:
    """On a, b in [0, 3], z lies in [-3, 3] and |z| is at most 3.

    Intervals let both relus be 3 at once: 6. CROWN's triangles say relu(z) <= (z + 3) / 2 and
    relu(-z) <= (3 - z) / 2, whose sum is 3 whatever z is. The rules allow for a step that begins up
    to 1 beside the triangle's edge, which costs 1/2 each: 4. So |z| >= 5 is refuted at once.
    """
    asked = distance([(0, 3), (0, 3)], 5)
    assert not refuted(INTERVALS, asked)
    assert not refuted(LAST_LAYER, asked)  # 3 + 3 once more: the relus stand for their intervals
    assert refuted(CROWN, asked)


def test_what_the_root_leaves_is_cut_at_a_neuron() -> None:
    """|z| >= 4 needs cuts, since 4 is what the triangles allow. The accumulators are z and -z.

    Cut z into z <= 0, where relu(z) = 0 and intervals leave 3 for the other, and z >= 1. There cut
    -z into -z <= 0, the same again, and -z >= 1: with z >= 1 that is 0 >= 2, which multipliers of 1
    for both accumulators refute.
    """
    asked = distance([(0, 3), (0, 3)], 4)
    assert not refuted(CROWN, asked)
    for branch in ("gap", "filtered"):
        proof, stats, rng = Proof(), Stats(), np.random.default_rng(0)
        options = Options(attack=False, sweep=False, branch=branch)
        outcome = search(asked.problem(), options, FOREVER, rng, stats, None, proof)
        assert outcome.verdict is Verdict.UNSAT
        assert list(proof.kind) == [REGIONS, CUT, CLOSED, CUT, CLOSED, DUAL]
        cuts = [(proof.value[e], proof.element[e], proof.threshold[e]) for e in (1, 3)]
        assert sorted(cuts) == [(1, 0, 1), (1, 1, 1)]
