"""Branch and bound on inputs: boxes of codes, bounded by intervals and backward bounds, split along
a code.

Sound: a box is closed only when a bound refutes every unsafe case on it, or when it is a single
code vector that is not unsafe or that no input in the domain produces. The children of a split
cover their parent.

Complete (the lemma): every split cuts the range of a code that holds at least two values, so both
children hold fewer code vectors than their parent, which are finitely many; a single code vector is
closed by bounds, or the leaf rule decides it (`boundary/leaves.py`): by exact evaluation, or by the
runtime where an op has a band. Hence the search ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array
from qverify.search import memory
from qverify.search.attack import corners, slack_gradient
from qverify.search.bounds import INTERVALS, Boxes, backward_bounds, refute
from qverify.search.branch import BoxView, Branching, Cut, halves
from qverify.search.frontier import Frontier, OpenBoxes
from qverify.search.problem import BoolArray, Candidate, Float64Array
from qverify.search.run import Found, Run

TRIED_CORNERS = 64  # of a batch's boxes, those that look most unsafe also have a corner tried


class BackwardBudget:
    """Whether backward bounds are worth their price: they cost some ten interval bounds, so they go
    on while they close at least every eighth box, and are tried again from time to time."""

    def __init__(self, possible: bool) -> None:
        self._possible, self._tried, self._closed, self._skipped = possible, 0.0, 0.0, 0

    def now(self) -> bool:
        """Whether the next batch should be bounded backward."""
        if not self._possible:
            return False
        if 8 * self._closed >= self._tried or self._tried < 256 or self._skipped >= 32:
            self._skipped = 0
            return True
        self._skipped += 1
        return False

    def count(self, tried: int, closed: int) -> None:
        """Record a batch; older ones fade."""
        self._tried, self._closed = 0.9 * self._tried + tried, 0.9 * self._closed + closed


@dataclass(frozen=True, eq=False)
class _Batch:
    """Boxes that are being decided; rows leave it as they are closed."""

    lower: Array  # int32 [N, codes]
    upper: Array
    entry: npt.NDArray[np.int64]  # [N]
    refuted: BoolArray  # [N, cases]
    least: Float64Array  # [N, rows]: the rows' least values

    def keep(self, rows: BoolArray, there: Array) -> _Batch:
        """The rows where a mask holds; `there` is the mask, or the numbers, on the machine."""
        return _Batch(
            self.lower[there],
            self.upper[there],
            self.entry[rows],
            self.refuted[rows],
            self.least[rows],
        )


@dataclass(eq=False)
class BoxSplitting:
    """The open boxes of a query, split along their inputs."""

    run: Run
    rule: Branching[BoxView]
    frontier: Frontier[OpenBoxes] = field(init=False)
    share: float = 0.0  # of the root box's code vectors that are decided

    def __post_init__(self) -> None:
        problem = self.run.problem
        kernels, lower, upper = problem.kernels, problem.lower, problem.upper
        self._dtype = getattr(kernels.xp, np.dtype(OpenBoxes.narrowest(lower, upper)).name)
        self.frontier = memory.box_frontier(kernels, len(lower), np.dtype(self._dtype).itemsize)
        self._batch = self.run.box_batch
        self._root = _log_volume(lower[None], upper[None])[0]
        self._pays = BackwardBudget(problem.dual is not None)
        self._push(*problem.root, np.zeros(1, np.int64))

    @property
    def open(self) -> int:
        """How many boxes wait."""
        return len(self.frontier)

    def step(self) -> Found | None:
        """Bound a batch of boxes, decide its points, attack, and split what is left."""
        run = self.run
        batch = self._bounded()
        batch, found = self._pointed(batch)
        if found is not None:
            return Found(found, "found by the search")
        if not len(batch.entry):
            return None
        if (attacked := run.attack_round()) is not None:
            return attacked
        if self._pays.now():
            batch = self._refuted(batch)
        if not len(batch.entry):
            return None
        cut, found = self._choose(batch)
        if cut is None:
            assert found is not None
            return Found(found, "found by the attack on a part of the box")
        entries = self._noted(batch, cut)
        lower, upper = halves(run.problem.kernels, batch.lower, batch.upper, cut)
        self._push(lower, upper, entries)
        return None

    def _noted(self, batch: _Batch, cut: Cut) -> npt.NDArray[np.int64]:
        """Tell the observer of the cuts: entries of the lower halves, then of the upper ones."""
        observer, to_host = self.run.observer, self.run.problem.kernels.to_host
        if observer.proof is None:  # a GPU need not be asked
            return np.zeros(2 * len(batch.entry), np.int64)
        return observer.cut(batch.entry, 0, to_host(cut.entry), to_host(cut.threshold))

    def _push(self, lower: Array, upper: Array, entries: npt.NDArray[np.int64]) -> None:
        self.frontier.push(OpenBoxes(lower.astype(self._dtype), upper.astype(self._dtype), entries))

    def _bounded(self) -> _Batch:
        """The next batch, without what intervals close."""
        run, xp = self.run, self.run.problem.kernels.xp
        block = self.frontier.pop(self._batch)
        lower, upper = block.lower.astype(xp.int32), block.upper.astype(xp.int32)
        boxes = Boxes(lower, upper)
        found = INTERVALS.refute(run.known, boxes, run.all_cases(len(boxes)), run.deadline)
        run.observer.bounded(len(boxes))
        run.observer.ruled_out(lower, upper, found.cases, INTERVALS.name)
        assert found.least is not None
        batch = _Batch(lower, upper, block.entry, found.cases, found.least)
        closed = np.asarray(found.cases.all(axis=1))
        return self._without(batch, closed)

    def _without(self, batch: _Batch, closed: BoolArray) -> _Batch:
        """A batch without the boxes that bounds close, [N]."""
        if not closed.any():
            return batch
        self._count(batch, closed)
        self.run.observer.closed(batch.entry[closed])
        at = self.run.problem.kernels.asarray(np.flatnonzero(~closed))
        return batch.keep(~closed, at)

    def _pointed(self, batch: _Batch) -> tuple[_Batch, Candidate | None]:
        """Decide the boxes that are single code vectors, by exact evaluation."""
        run, kernels = self.run, self.run.problem.kernels
        points = (batch.lower == batch.upper).all(axis=1)
        if not len(batch.entry) or not points.any():
            return batch, None
        codes = batch.lower[points]
        run.observer.decided(len(codes))
        found = run.known.find_unsafe(codes, run.problem.evaluate(codes))
        if found is not None:
            return batch, found
        single = kernels.to_host(points)
        self._count(batch, single)
        run.observer.closed(batch.entry[single], proved=False)
        return batch.keep(~single, ~points), None

    def _refuted(self, batch: _Batch) -> _Batch:
        """A batch without what backward bounds close."""
        run = self.run
        bounds = backward_bounds(run.known.certified)
        boxes = Boxes(batch.lower, batch.upper)
        refuted = refute(run.known, boxes, batch.refuted, bounds, run.deadline)
        closed = np.asarray(refuted.all(axis=1))
        self._pays.count(len(closed), int(closed.sum()))
        return self._without(batch, closed)

    def _choose(self, batch: _Batch) -> tuple[Cut | None, Candidate | None]:
        """Where to split each box, by the gradient at its centre. On the way, the centre and the
        corner that the gradient points to are tried as counterexamples: then that comes instead."""
        run, known, problem = self.run, self.run.known, self.run.problem
        centre = (batch.lower + batch.upper) // 2
        values = problem.network.values(problem.kernels, centre)
        slack, rows = known.sought.slack_of(batch.least)
        case = slack.argmax(axis=1)  # the case with the most room to be unsafe
        gradient = slack_gradient(known, values, rows[np.arange(len(case)), case])
        if run.options.attack:
            found, tried = known.try_joint()
            if found is None:
                found = known.find_unsafe(centre, problem.outputs(values))
            if found is None:
                worst = np.argsort(-slack.max(axis=1))[:TRIED_CORNERS]
                best = problem.kernels.asarray(worst)
                some = batch.lower[best], batch.upper[best], gradient[best]
                corner = corners(problem, *some)
                found = known.find_unsafe(corner, problem.evaluate(corner))
            run.observer.tried(tried + len(case) + min(len(case), TRIED_CORNERS))
            if found is not None:
                return None, found
        return self.rule.choose(BoxView(problem.kernels, batch.lower, batch.upper, gradient)), None

    def _count(self, batch: _Batch, closed: BoolArray) -> None:
        """Add the code vectors of closed boxes to the share that is decided (for progress only)."""
        kernels = self.run.problem.kernels
        at = kernels.asarray(np.flatnonzero(closed))
        lower, upper = kernels.to_host(batch.lower[at]), kernels.to_host(batch.upper[at])
        self.share += float(np.exp2(_log_volume(lower, upper) - self._root).sum())


def _log_volume(lower: Any, upper: Any) -> Any:
    """log2 of the number of code vectors in each box, on the host."""
    return np.log2((upper - lower + 1).astype(np.float64)).sum(axis=1)
