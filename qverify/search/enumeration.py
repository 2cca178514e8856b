"""Boxes with few points: all of them are evaluated, which decides a query exactly.

Sound and complete: a point stands for the inputs that quantize to it, and the leaf rule
(`boundary/leaves.py`) decides each.
"""

from __future__ import annotations

import time
from math import prod

import numpy as np

from qverify.deadline import look
from qverify.kernels import Array
from qverify.search.branch import split
from qverify.search.problem import Candidate, Problem
from qverify.search.proof import Proof

MOST = 1 << 22  # points; of more, none is evaluated here
MOST_CERTIFIED = 1 << 16  # of a box that a certificate parts into points
TRIAL = 2, 2  # points of the first batches: until the second, faster kernels are made


class Points:
    """The points of a query's box, in order."""

    def __init__(self, problem: Problem, batch: int, most: int) -> None:
        self._problem, self._batch = problem, batch
        self._varied = np.flatnonzero(problem.upper > problem.lower)
        self._sizes = (problem.upper - problem.lower)[self._varied].astype(np.int64) + 1
        self.count = prod(self._sizes.tolist())
        self.few = self.count <= most
        self.done = 0  # evaluated
        self._batches = 0

    def sweep(self, patience: float) -> Candidate | None:
        """Evaluate points from where the last call stopped: a counterexample, or None. It gives up
        where the speed so far says that all of them will take more than `patience` seconds."""
        spent = 0.0
        while self.few and self.done < self.count:
            look()
            size = TRIAL[self._batches] if self._batches < len(TRIAL) else self._batch
            start, stop = self.done, min(self.done + size, self.count)
            began = time.perf_counter()
            found = self._problem.find_unsafe(
                points := self._points(start, stop), self._problem.evaluate(points)
            )
            took = time.perf_counter() - began
            self._batches, self.done, spent = self._batches + 1, stop, spent + took
            if found is not None:
                return found
            left = (self.count - stop) * took / (stop - start)
            if self._batches > len(TRIAL) and spent + left > patience:
                break
        return None

    def _points(self, start: int, stop: int) -> Array:
        """The points number start to stop - 1: int32 [N, codes]."""
        points = np.repeat(self._problem.lower[None], stop - start, axis=0)
        digits = np.unravel_index(np.arange(start, stop), tuple(self._sizes.tolist()))
        points[:, self._varied] += np.stack(digits, axis=1).astype(np.int32)
        return self._problem.kernels.asarray(points)

    def note(self, proof: Proof) -> None:
        """The tree of a proof, once no point was found unsafe: the box in halves, down to parts
        that intervals close. On a point they are exact."""
        problem, kernels = self._problem, self._problem.kernels
        ends = [kernels.asarray(end[None]) for end in (problem.lower, problem.upper)]
        waiting = [(*ends, np.zeros(1, np.int64))]
        while waiting:
            look()
            lower, upper, entries = waiting.pop()
            open_ = (problem.bound(lower, upper)[0] != 0).any(axis=1) & kernels.to_host(
                (lower < upper).any(axis=1)
            )
            proof.close(entries[~open_])
            at = kernels.asarray(np.flatnonzero(open_))
            lower, upper, entries = lower[at], upper[at], entries[open_]
            variable, rows = (upper - lower).argmax(axis=1), kernels.xp.arange(len(entries))
            low, high = (kernels.to_host(end[rows, variable]) for end in (lower, upper))
            entries = proof.cut(entries, 0, kernels.to_host(variable), (low + high) // 2 + 1)
            lower, upper = split(kernels, lower, upper, variable)
            for start in range(0, len(entries), self._batch):
                part = slice(start, start + self._batch)
                waiting.append((lower[part], upper[part], entries[part]))
