"""Bounds as plugs: every bound of the list is sound, and a new one is one file and one line."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from qverify.bounds.unsafe import REFUTED
from qverify.deadline import Deadline
from qverify.options import Options
from qverify.result import Stats, Verdict
from qverify.search import bab, bounds
from qverify.search.bab import search
from qverify.search.bounds import (
    BOUNDS,
    Bound,
    Boxes,
    Evidence,
    Refuted,
    backward_bounds,
    refute,
)
from qverify.search.knowledge import Knowledge
from qverify.search.problem import BoolArray
from qverify.search.proof import Proof
from tests.graphs import ROUNDS
from tests.search.queries import Asked, asked

FOREVER = Deadline.after(None)


def parts_of(query: Asked, rng: np.random.Generator, count: int) -> Boxes:
    """Random boxes in the root box of a query."""
    corners = rng.integers(
        query.points.min(axis=0), query.points.max(axis=0) + 1, (2, count, query.points.shape[1])
    )
    lower, upper = np.sort(corners, axis=0).astype(np.int32)
    return Boxes(lower, upper)


def unsafe_cases(query: Asked, known: Knowledge, boxes: Boxes) -> BoolArray:
    """By brute force: which cases hold at some point of which boxes, [N, cases]."""
    y = known.problem.evaluate(query.points.astype(np.int32))
    holds = known.sought.status((y, y)) != REFUTED
    inside = (boxes.lower[:, None] <= query.points) & (query.points <= boxes.upper[:, None])
    found: BoolArray = (inside.all(axis=2)[:, :, None] & holds).any(axis=1)
    return found


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.name)
def test_what_a_bound_refutes_holds_nowhere(bound: Bound) -> None:
    """And with tighter intermediate bounds, too. It refutes something, and leaves something."""
    refuted = left = 0
    for seed in range(30 * ROUNDS):
        rng = np.random.default_rng([11, seed])
        query = asked(rng, 300)
        known = Knowledge(query.problem())
        for _ in range(2):
            boxes = parts_of(query, rng, 6)
            wanted = np.ones((6, len(known.sought.cases)), np.bool_)
            found = bound.refute(known, boxes, wanted, FOREVER).cases
            assert not (found & unsafe_cases(query, known, boxes)).any(), seed
            refuted, left = refuted + int(found.sum()), left + int((~found).sum())
            known.relaxed()
            known.bound_intermediate(FOREVER)
    assert min(refuted, left) > 20


def test_the_list_goes_from_cheap_to_dear_and_names_are_unique() -> None:
    assert [bound.cost for bound in BOUNDS] == sorted(bound.cost for bound in BOUNDS)
    assert len({bound.name for bound in BOUNDS}) == len(BOUNDS)
    assert BOUNDS[0] is bounds.INTERVALS


def test_a_dearer_bound_is_asked_for_what_is_left_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for certificates, where a checker bounds everything."""
    query = next(
        q for s in range(99) if len((q := asked(np.random.default_rng(s))).query.cases) > 1
    )
    known, asked_of = Knowledge(query.problem()), []

    class Counts(Bound):
        name, cost, evidence = "counts", 1, Evidence.REPEATED

        def refute(
            self, known: Knowledge, boxes: Boxes, asked: BoolArray, deadline: Deadline
        ) -> Refuted:
            asked_of.append(asked.tolist())
            return Refuted(np.zeros_like(asked))

    done = np.array([[True, *[False] * (len(query.query.cases) - 1)]])
    for known.certified in (False, True):
        refute(known, Boxes(*known.problem.root), done, [Counts()], FOREVER)
    assert asked_of == [(~done).tolist(), np.ones_like(done).tolist()]


# -- a new bound, in one class and one line --------------------------------------------------------


class Corners(Bound):
    """The trial of `specs/extending.md`: boxes with few points are evaluated.

    Sound because all points of a box are all of its inputs' codes. No certificate can say it.
    """

    name: ClassVar[str] = "all points of small boxes"
    cost: ClassVar[int] = 50
    evidence: ClassVar[Evidence] = Evidence.NONE

    def refute(
        self, known: Knowledge, boxes: Boxes, asked: BoolArray, deadline: Deadline
    ) -> Refuted:
        refuted = np.zeros_like(asked)
        sizes = np.prod((boxes.upper - boxes.lower + 1).astype(np.float64), axis=1)
        for row in np.flatnonzero((sizes <= 64) & asked.any(axis=1)):
            spans = zip(boxes.lower[row], boxes.upper[row], strict=True)
            axes = [np.arange(low, high + 1) for low, high in spans]
            points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
            y = known.problem.evaluate(points.astype(np.int32))
            refuted[row] = (known.sought.status((y, y)) == REFUTED).all(axis=0)
        return Refuted(refuted)


def test_a_new_bound_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search with it decides the same queries with fewer boxes; where a certificate is wanted,
    it is left out."""
    monkeypatch.setattr(bab, "SPLITTABLE", 99)
    saved = 0
    for seed in range(20 * ROUNDS):
        query, boxes = asked(np.random.default_rng([12, seed])), []
        for more in ((), (Corners(),)):
            monkeypatch.setattr(bounds, "BOUNDS", (*BOUNDS[:-1], *more, BOUNDS[-1]))
            rng, stats = np.random.default_rng(0), Stats()
            options = Options(attack=False, sweep=False)
            outcome = search(query.problem(), options, FOREVER, rng, stats)
            assert outcome.verdict is query.expected
            boxes.append(stats.subproblems)
        saved += boxes[0] - boxes[1]
        proof = Proof()
        search(query.problem(), options, FOREVER, rng, Stats(), None, proof)
        assert query.expected is Verdict.SAT or -1 not in proof.kind
    assert saved > 0
    assert any(isinstance(bound, Corners) for bound in backward_bounds(certified=False))
    assert not any(isinstance(bound, Corners) for bound in backward_bounds(certified=True))
