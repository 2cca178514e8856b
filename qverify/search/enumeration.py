"""Boxes with few points: all of them are evaluated, which decides a query exactly.

Sound and complete: a point stands for the inputs that quantize to it, and the leaf rule
(`boundary/leaves.py`) decides each.
"""

from __future__ import annotations

import time
from math import prod

import numpy as np

from qverify.deadline import Deadline, look
from qverify.kernels import Array
from qverify.search.bounds import INTERVALS, Boxes
from qverify.search.branch import halves, middle
from qverify.search.knowledge import Knowledge
from qverify.search.observer import Observer
from qverify.search.problem import Candidate

MOST = 1 << 22  # points; a box with more is not enumerated
MOST_CERTIFIED = 1 << 16  # the same where a certificate has to part the box into its points
TRIAL = 2, 2  # points of the first batches: during them, faster kernels are still being made


class Points:
    """The points of a query's box, in order."""

    def __init__(self, known: Knowledge, batch: int, most: int) -> None:
        problem = known.problem
        self._known, self._problem, self._batch = known, problem, batch
        self._varied = np.flatnonzero(problem.upper > problem.lower)
        self._sizes = (problem.upper - problem.lower)[self._varied].astype(np.int64) + 1
        self.count = prod(self._sizes.tolist())
        self.few = self.count <= most
        self.done = 0  # evaluated
        self._batches = 0

    def sweep(self, patience: float) -> Candidate | None:
        """Evaluate points from where the last call stopped: a counterexample, or None. It gives up
        when the speed so far says that all of them will take more than `patience` seconds."""
        spent = 0.0
        while self.few and self.done < self.count:
            look()
            size = TRIAL[self._batches] if self._batches < len(TRIAL) else self._batch
            start, stop = self.done, min(self.done + size, self.count)
            began = time.perf_counter()
            points = self._points(start, stop)
            found = self._known.find_unsafe(points, self._problem.evaluate(points))
            took = time.perf_counter() - began
            self._batches, self.done, spent = self._batches + 1, stop, spent + took
            if found is not None:
                return found
            left = (self.count - stop) * took / (stop - start)
            if self._batches > len(TRIAL) and spent + left > patience:
                break
        return None

    def _points(self, start: int, stop: int) -> Array:
        """Points `start` to `stop` - 1: int32 [N, codes]."""
        points = np.repeat(self._problem.lower[None], stop - start, axis=0)
        digits = np.unravel_index(np.arange(start, stop), tuple(self._sizes.tolist()))
        points[:, self._varied] += np.stack(digits, axis=1).astype(np.int32)
        return self._problem.kernels.asarray(points)

    def note(self, observer: Observer) -> None:
        """Tell of a tree for the proof, once no point was found unsafe: the box in halves, down to
        parts that intervals close. On a point they are exact."""
        kernels, limit = self._problem.kernels, Deadline.after(None)
        waiting = [(*self._problem.root, np.zeros(1, np.int64))]
        while waiting:
            look()
            lower, upper, entries = waiting.pop()
            asked = np.ones((len(entries), len(self._known.sought.cases)), np.bool_)
            found = INTERVALS.refute(self._known, Boxes(lower, upper), asked, limit)
            wide = kernels.to_host((lower < upper).any(axis=1))
            open_ = ~found.cases.all(axis=1) & wide
            observer.closed(entries[~open_], proved=False)
            at = kernels.asarray(np.flatnonzero(open_))
            lower, upper, entries = lower[at], upper[at], entries[open_]
            cut = middle(kernels, lower, upper, (upper - lower).argmax(axis=1))
            variable, threshold = kernels.to_host(cut.entry), kernels.to_host(cut.threshold)
            entries = observer.cut(entries, 0, variable, threshold)
            lower, upper = halves(kernels, lower, upper, cut)
            for start in range(0, len(entries), self._batch):
                part = slice(start, start + self._batch)
                waiting.append((lower[part], upper[part], entries[part]))
