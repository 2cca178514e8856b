"""Bounds as plugs: ways to say of boxes that no unsafe input lies in them.

Every `Bound` refutes cases of a query on boxes of codes. `BOUNDS` lists them, the cheapest first,
and `refute` goes up the list until nothing is left to refute: on the whole box, on the parts of it
that are split along inputs, and on images. The tree of `cuts` uses its first and its last. A new
one is a class here and a line in that list (`specs/extending.md`).

Sound because each bound is: what one of them refutes, no unsafe input of the box meets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from qverify.bounds.dual import Dual, Relaxations
from qverify.bounds.improve import Objective, Point, evaluate, improve, rounded
from qverify.bounds.unsafe import REFUTED
from qverify.bounds.unsafe_regions import UnsafeRegions, proved
from qverify.deadline import Deadline, looking
from qverify.kernels import Array
from qverify.ops import Interval
from qverify.ops.relax import GUIDE
from qverify.search import memory
from qverify.search.knowledge import Knowledge, Relaxed
from qverify.search.problem import BoolArray, Float64Array

IntArray = npt.NDArray[np.int64]
Phases = Sequence[tuple[int, float]]  # rounds and rate; each goes on with what the last left open
ROOT_PHASES: Phases = ((20, 0.1), (150, 0.2))


class Evidence(Enum):
    """How a certificate says that a bound refuted something."""

    REPEATED = "the checker finds it again from the box alone"
    # Only subproblems of cuts have a place for them (`qverify.search.cuts`): `refute` leaves such a
    # bound out.
    MULTIPLIERS = "the multipliers that prove it are written down"
    NONE = "it cannot: the bound is not used where a certificate is wanted"


@dataclass(eq=False)
class Boxes:
    """N boxes of codes, int32 [N, codes], and intervals of every network value there ([N, *shape]
    pairs, the codes first), which are computed when a bound asks for them."""

    lower: Array
    upper: Array
    values: list[Interval] | None = None

    def __len__(self) -> int:
        return len(self.lower)

    def intervals(self, known: Knowledge) -> list[Interval]:
        """Intervals of every value, no wider than what is known of the whole root box."""
        if self.values is None:
            relaxed = known.relaxed()
            clamps = {} if relaxed is None else relaxed.clamps
            problem = known.problem
            found = problem.network.boxes(problem.kernels, self.lower, self.upper, clamps)
            self.values, _ = found
        return self.values


@dataclass(frozen=True, eq=False)
class Refuted:
    """What a bound found out about N boxes."""

    cases: BoolArray  # [N, cases]
    # [N, regions] of the unsafe set, if the bound is about them: what one bound leaves of a case,
    # another may close.
    regions: BoolArray | None = None
    least: Float64Array | None = None  # [N, rows]: the rows' least values, a guide for branching


class Bound(ABC):
    """One way to refute cases on boxes. Subclasses are final and have no state."""

    name: ClassVar[str]
    cost: ClassVar[int]  # about so many interval propagations
    evidence: ClassVar[Evidence]

    @abstractmethod
    def refute(
        self, known: Knowledge, boxes: Boxes, asked: BoolArray, deadline: Deadline
    ) -> Refuted:
        """Refute what it can of the cases `asked` [N, cases] on the boxes; it may refute others.

        At the deadline it stops early and says what it has; at the limit of the run it raises
        TimeUp.
        """


class Intervals(Bound):
    """Intervals of the outputs.

    Sound because of the law of containment, and since a row that no output in its box meets is met
    by no input. Raises Undecided where an output may be infinite.
    """

    name, cost, evidence = "intervals", 1, Evidence.REPEATED

    def refute(
        self, known: Knowledge, boxes: Boxes, asked: BoolArray, deadline: Deadline
    ) -> Refuted:
        problem = known.problem
        if boxes.values is None:
            y = problem.output_bounds(boxes.lower, boxes.upper)
        else:
            flat = (
                problem.network.flat_outputs(problem.kernels, [box[i] for box in boxes.values])
                for i in (0, 1)
            )
            y = problem.decoded(*flat)
        x = known.input_bounds(boxes.lower, boxes.upper)
        status = known.sought.status(y, x)
        status[known.without_sought(boxes.lower, boxes.upper)] = REFUTED
        known.joint.refine(status, y, x)
        return Refuted(status == REFUTED, least=known.sought.row_bounds(y, x)[0])


class _Backward(Bound):
    """One inequality per region, bounded by one backward pass."""

    def refute(
        self, known: Knowledge, boxes: Boxes, asked: BoolArray, deadline: Deadline
    ) -> Refuted:
        relaxed = known.relaxed()
        if relaxed is None:
            return Refuted(np.zeros_like(asked))
        wanted = np.asarray(asked.any(axis=0))
        values = boxes.intervals(known)
        empty = self.regions(relaxed.regions, relaxed.dual, values, wanted)
        return Refuted(relaxed.regions.refuted_cases(empty), empty)

    @abstractmethod
    def regions(
        self, regions: UnsafeRegions, dual: Dual, values: list[Interval], wanted: BoolArray
    ) -> BoolArray:
        """Which regions are empty: [N, regions]; cases that are not `wanted` [cases] are left
        out."""


class LastLayer(_Backward):
    """Intervals of the inequalities themselves: the last linear layers are fused with them, and the
    first nonlinear ops met stand for their intervals (Gowal et al., 2018).

    Sound because a value lies in its interval.
    """

    name, cost, evidence = "last-layer intervals", 4, Evidence.REPEATED

    def regions(
        self, regions: UnsafeRegions, dual: Dual, values: list[Interval], wanted: BoolArray
    ) -> BoolArray:
        return regions.refuted(dual, dual.last_layer, 0, values, wanted)


class CrownSlopes(_Backward):
    """Linear bounds with CROWN's slopes (Zhang et al., NeurIPS 2018), in exact integers.

    Sound because the dual is an upper bound for any multipliers (`qverify.bounds.dual`).
    """

    name, cost, evidence = "CROWN slopes", 10, Evidence.REPEATED

    def regions(
        self, regions: UnsafeRegions, dual: Dual, values: list[Interval], wanted: BoolArray
    ) -> BoolArray:
        return regions.refuted(dual, dual.upper, regions.precision(), values, wanted)


@dataclass(eq=False)
class Optimized:
    """What is left of N subproblems after multipliers were optimized."""

    rows: IntArray  # which of them are open
    relaxations: Relaxations  # of those, in int64
    objective: Objective
    point: Point


class OptimizedMultipliers(Bound):
    """Multipliers improved by subgradient steps, one region of the unsafe set at a time, then
    rounded and evaluated in exact integers.

    Sound because the dual is an upper bound for any multipliers, and so for rounded ones.
    """

    name, cost, evidence = "optimized multipliers", 1000, Evidence.MULTIPLIERS

    def refute(
        self, known: Knowledge, boxes: Boxes, asked: BoolArray, deadline: Deadline
    ) -> Refuted:
        relaxed, refuted = known.relaxed(), np.zeros_like(asked)
        if relaxed is None:
            return Refuted(refuted)
        values = boxes.intervals(known)
        for case in np.flatnonzero(asked.any(axis=0)).tolist():
            rows = np.flatnonzero(asked[:, case])
            for region in looking(relaxed.regions.cases[case] or ()):
                if not len(rows):
                    break
                at = known.problem.kernels.asarray(rows)
                part = [(lower[at], upper[at]) for lower, upper in values]
                wanted = np.full(len(rows), region, np.int64)
                left = self.improve(relaxed, part, wanted, None, ROOT_PHASES, deadline)
                open_ = np.arange(0) if left is None else left.rows
                rows = np.delete(rows, open_)  # one open region leaves its case open
            if relaxed.regions.cases[case] is not None:
                refuted[rows, case] = True
        return Refuted(refuted)

    def improve(
        self,
        relaxed: Relaxed,
        values: list[Interval],
        regions: IntArray,
        start: Point | None,
        phases: Phases,
        deadline: Deadline,
        fixed: dict[int, Array] | None = None,
        closed: Callable[[IntArray, IntArray, Point, int], None] = lambda *_: None,
    ) -> Optimized | None:
        """Bound subproblems, each a region [N] on a box of `values` ([N, *shape] pairs; [1, ...]
        where all share one), from multipliers `start` (None: CROWN's slopes). What is left open
        comes back, None if nothing is. `closed` hears of what each phase refutes: rows of the
        subproblems, rows of the point, the point, and the precision that its multipliers need."""
        dual, cover = relaxed.dual, relaxed.regions
        kernels = dual.kernels
        rows = np.arange(len(regions))
        objective = cover.objective(dual, regions.tolist())
        point = crown_point(dual, values, objective.as_guide()) if start is None else start
        exact = dual.relaxations(values, cover.last)
        for rounds, rate in phases:
            point = improve(
                dual,
                exact.as_guide(kernels),
                objective.as_guide(),
                point,
                rounds,
                rate,
                deadline,
                fixed=fixed,
            )
            done, precision = proved(dual, exact, objective, point, cover.precision())
            host = kernels.to_host(done)
            closed(rows[host], np.flatnonzero(host), point, precision)
            keep = np.flatnonzero(~host)
            if not len(keep):
                return None
            at = kernels.asarray(keep)
            rows, exact, objective, point = (
                rows[keep],
                exact.take(at),
                objective.take(at),
                point.take(at),
            )
        return Optimized(rows, exact, objective, point)


INTERVALS, OPTIMIZED = Intervals(), OptimizedMultipliers()
BOUNDS: tuple[Bound, ...] = (INTERVALS, LastLayer(), CrownSlopes(), OPTIMIZED)


def backward_bounds(certified: bool) -> list[Bound]:
    """What `refute` goes through once intervals left a case open: the list without both ends.

    Intervals come first everywhere, and multipliers are optimized part by part in a tree (`cuts`).
    Where a certificate is wanted, only bounds that a checker can repeat are left.
    """
    between = [b for b in BOUNDS if b.evidence is not Evidence.MULTIPLIERS and b is not INTERVALS]
    return [b for b in between if not certified or b.evidence is Evidence.REPEATED]


def refute(
    known: Knowledge, boxes: Boxes, refuted: BoolArray, bounds: Sequence[Bound], deadline: Deadline
) -> BoolArray:
    """`refuted` [N, cases], with what bounds refute besides, the cheaper ones first. Intermediate
    values are as well known as `Knowledge.bound_intermediate` made them.

    Where a certificate is wanted, cases that are closed already are bounded again: a checker bounds
    all of them at once, and large numbers in one inequality may cost the others their bound.
    """
    result, relaxed = refuted.copy(), known.relaxed()
    for part in looking(memory.backward_parts(known, len(boxes))):
        chunk = Boxes(boxes.lower[part], boxes.upper[part])
        asked = np.ones_like(result[part]) if known.certified else ~result[part]
        count = 0 if relaxed is None else len(relaxed.regions.regions)
        empty = np.zeros((len(asked), count), np.bool_)
        for bound in bounds:
            if not asked.any():
                break
            answer = bound.refute(known, chunk, asked, deadline)
            found = answer.cases
            if answer.regions is not None and relaxed is not None:
                empty |= answer.regions
                found = found | relaxed.regions.refuted_cases(empty)
            result[part] |= found
            asked &= ~found
            if known.observer is not None:
                known.observer.ruled_out(chunk.lower, chunk.upper, found, bound.name)
    return result


def crown_point(dual: Dual, values: list[Interval], objective: Objective) -> Point:
    """Where steps begin: the first inequality alone, with CROWN's slopes. `objective` is in the
    guide's type."""
    xp = dual.kernels.xp
    n, count = objective.constants.shape
    mu = xp.zeros((n, count), dtype=GUIDE)
    mu[:, 0] = 1
    return Point(mu, dual.crown_multipliers(values, objective.weights(mu)), xp.full(n, xp.inf))


def region_guesses(
    relaxed: Relaxed, values: list[Interval], regions: IntArray, batch: int
) -> npt.NDArray[np.float64]:
    """What CROWN's slopes make of regions on one box: [regions], a guide."""
    dual, bounds = relaxed.dual, []
    relaxations = dual.relaxations(values, relaxed.regions.last).as_guide(dual.kernels)
    for start in range(0, len(regions), batch):
        some = regions[start : start + batch].tolist()
        objective = relaxed.regions.objective(dual, some).as_guide()
        point = crown_point(dual, values, objective)
        evaluate(dual, relaxations, objective, point)
        bounds.append(dual.kernels.to_host(point.bound).astype(np.float64))
    result: npt.NDArray[np.float64] = np.nan_to_num(np.concatenate(bounds))
    return result


def rounded_rows(
    dual: Dual, point: Point, rows: IntArray, precision: int
) -> tuple[IntArray, IntArray, list[tuple[int, int]]]:
    """Some rows of a point as a certificate holds them: mu [rows, K], multipliers [rows, M], and
    which (node, size) the columns of the second are."""
    at = dual.kernels.asarray(rows)
    mu, multipliers = rounded(dual, point.take(at), precision)
    columns = [(k, int(m[0].size)) for k, m in multipliers.items()]
    mu, *parts = (
        dual.kernels.to_host(m).reshape(len(rows), -1) for m in (mu, *multipliers.values())
    )
    return mu, np.concatenate([np.zeros((len(rows), 0), np.int64), *parts], axis=1), columns
