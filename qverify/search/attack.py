"""The search for counterexamples: sign steps on the integer network.

The steps follow straight-through gradients (Bengio et al., 2013), as if rounding were the identity.
Every point tried is evaluated exactly, so whatever is found is real for the integer network;
finding nothing means nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.deadline import look
from qverify.kernels import Array
from qverify.search.knowledge import Knowledge
from qverify.search.observer import Observer
from qverify.search.problem import Candidate, Problem

MANY = 64  # cases of a round; of more, those are taken that some point came closest to meeting
Float64Array = npt.NDArray[np.float64]


def slack_gradient(known: Knowledge, values: list[Array], row: npt.NDArray[np.intp]) -> Array:
    """d (row value) / d codes at stored network values, for one row per point: float32 [N, codes].
    A step against it raises the row's slack."""
    problem, sought = known.problem, known.sought
    if not len(sought.rows):  # the only case is the empty one: everywhere unsafe
        return problem.kernels.xp.zeros(values[0].shape, dtype=problem.kernels.xp.float32)
    upstream = sought.y_matrix.dense(row) * problem.decoder.steepness
    # Only signs count: scale each row by a power of two into float32's range.
    _, exponent = np.frexp(np.abs(upstream).max(axis=1, keepdims=True, initial=0.0))
    upstream = np.ldexp(upstream, -exponent)
    return problem.network.gradient(
        problem.kernels, values, problem.kernels.asarray(upstream.astype(np.float32))
    )


def corners(problem: Problem, lower: Array, upper: Array, gradient: Array) -> Array:
    """The corner of each box that the gradient points to (downhill)."""
    return problem.kernels.xp.where(gradient > 0, lower, upper)


class Attack:
    """The attack on the root box, in rounds that the search asks for as it goes on.

    The first round follows the centre, a random corner and random points downhill for every case in
    turn, or for the worst of many. Later rounds take the cases that came closest to being unsafe,
    with more random starts and finer steps. Rounds are counted in points against the boxes bounded
    so far, not in seconds, so that a seed fixes the search.
    """

    def __init__(
        self, known: Knowledge, rng: np.random.Generator, observer: Observer, batch: int
    ) -> None:
        self._known, self._problem, self._rng = known, known.problem, rng
        self._observer = observer
        self._batch = batch  # about as many points as fit the memory
        self._bounded_before = observer.stats.subproblems  # for earlier queries
        self._best_slack = np.full(len(known.sought.cases), -np.inf)  # [cases], of all points seen
        self._spent = 0  # points tried
        self._rounds = 0

    def due(self) -> bool:
        """Whether the next round's turn has come: the attack takes about a fifth of the work."""
        return (
            self._rounds == 0
            or 4 * self._spent < self._observer.stats.subproblems - self._bounded_before
        )

    def attack_round(self) -> Candidate | None:
        """One round: an unsafe point, or None. Inputs known to satisfy the conditions on inputs
        come first."""
        found, tried = self._known.try_joint()
        self._count(tried)
        if found is not None:
            return found
        first = self._rounds == 0
        self._rounds += 1
        if first and len(self._best_slack) > MANY and (found := self._look_around()) is not None:
            return found
        cases = np.argsort(-self._best_slack, kind="stable")[:MANY]
        restarts, steps, decay = (4, 16, 0.75) if first else (16, 40, 0.9)
        group = max(1, min(1024, self._batch // restarts)) if first else 4
        for start in range(0, len(cases) if first else min(len(cases), group), group):
            found = self._descend(
                np.repeat(cases[start : start + group], restarts), restarts, steps, decay
            )
            if found is not None:
                return found
        return None

    def _look_around(self) -> Candidate | None:
        """Evaluate the centre, a corner and random points: an unsafe one, or None. The slack of
        every case is noted."""
        problem = self._problem
        points = problem.kernels.asarray(
            _starts(problem, self._rng, 1, max(4, min(self._batch, MANY)))
        )
        y = problem.evaluate(points)
        self._count(len(points))
        found = self._known.find_unsafe(points, y)
        if found is None:
            x = self._known.input_bounds(points, points)
            slack, _ = self._known.sought.slack(y, None if x is None else x[0])
            np.maximum(self._best_slack, slack.max(axis=0), out=self._best_slack)
        return found

    def _count(self, points: int) -> None:
        self._spent += points
        self._observer.tried(points)

    def _descend(
        self, target: npt.NDArray[np.intp], restarts: int, steps: int, decay: float
    ) -> Candidate | None:
        """Sign steps from `restarts` starts per case; `target` is each point's case."""
        problem, xp = self._problem, self._problem.kernels.xp
        lower = problem.kernels.asarray(problem.lower)
        upper = problem.kernels.asarray(problem.upper)
        width = problem.upper - problem.lower
        points: Any = _starts(problem, self._rng, len(target) // restarts, restarts)
        for step in range(steps + 1):
            look()
            values = problem.network.values(problem.kernels, problem.kernels.asarray(points))
            y = problem.outputs(values)
            self._count(len(points))
            found = self._known.find_unsafe(values[0], y)
            if found is not None or step == steps:
                return found
            x = self._known.input_bounds(values[0], values[0])
            slack, row = self._known.sought.slack(y, None if x is None else x[0])
            at = np.arange(len(y))
            np.maximum.at(self._best_slack, target, slack[at, target])
            grad = slack_gradient(self._known, values, row[at, target])
            size = np.maximum(1, np.rint(width * (0.5 * decay**step))).astype(np.int32)
            moved = values[0] - xp.sign(grad).astype(xp.int32) * problem.kernels.asarray(size)
            points = xp.minimum(xp.maximum(moved, lower), upper)
        return None


def _starts(problem: Problem, rng: np.random.Generator, cases: int, restarts: int) -> Any:
    """[cases * restarts, codes]: per case the centre, a random corner, and random points."""
    codes = len(problem.lower)
    points = rng.integers(
        problem.lower, problem.upper, size=(cases, restarts, codes), endpoint=True, dtype=np.int32
    )
    points[:, 0] = (problem.lower + problem.upper) // 2
    if restarts > 2:
        points[:, 2] = np.where(rng.random((cases, codes)) < 0.5, problem.lower, problem.upper)
    return points.reshape(-1, codes)
