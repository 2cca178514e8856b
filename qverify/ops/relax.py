"""Backward rules: how a linear function of an op's result is bounded by a linear function of its inputs, exactly.

A `Relaxation` takes integer multipliers `weights` [N, R, *shape] of a value y = op(x) (R functions per box) and returns
integer multipliers of x and constants [N, R] such that, for every x in its interval,

    sum weights * y  <=  sum multipliers * x + constant.

Everything is exact int64 (or float64 proved to stay below 2**53): any integer multipliers are allowed, so floats may choose
them, and the constant is then the exact (or a rounded-up) maximum of what is left. `TooLarge` is raised where int64 could
overflow; the caller then does without this bound.

This is CROWN (Zhang et al., NeurIPS 2018) read as the Lagrangian dual of Dvijotham et al. (UAI 2018), on integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qverify.kernels import Array, Kernels

if TYPE_CHECKING:
    from qverify.ops.base import Interval, Type

LIMIT = 2.0**61  # magnitudes are measured in float64 and kept well inside int64


class TooLarge(Exception):
    """An exact integer could leave its type; no bound is given."""


def magnitude(kernels: Kernels, x: Array) -> float:
    """The largest absolute value of an integer array, as a float."""
    return float(kernels.xp.abs(x).max()) if x.size else 0.0


def concretize(kernels: Kernels, weights: Array, box: Interval) -> Array:
    """max of sum weights * x over x in `box` ([N, *shape] ends): int64 [N, R]."""
    xp = kernels.xp
    lower, upper = (end.astype(xp.int64)[:, None] for end in box)
    reach = max(magnitude(kernels, box[0]), magnitude(kernels, box[1]))
    if magnitude(kernels, weights) * reach * max(1, box[0][0].size) >= LIMIT:
        raise TooLarge
    best = xp.maximum(weights * lower, weights * upper)
    return best.reshape(*best.shape[:2], -1).sum(axis=2)


class Relaxation(ABC):
    """The backward rule of one op with given input types; arrays are on the network's machine."""

    relaxes = False  # whether tighter bounds of the input make the rule tighter

    @abstractmethod
    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], own: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        """(multipliers of each input, or None; constants [N, R]) for `weights` of the result, whose bounds are `own`."""


@dataclass(frozen=True, eq=False)
class Concretized(Relaxation):
    """Stop here: the result's own bounds. Sound for every op."""

    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], own: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        return (None,) * len(boxes), concretize(kernels, weights, own)


@dataclass(frozen=True, eq=False)
class Staircase(Relaxation):
    """y = h(x), element by element, for a non-decreasing h given by its thresholds.

    `thresholds` [P, K + 1] int64: entry k - low is the least x with h(x) >= k, for k = low..high + 1 (beyond the input's
    range where no x reaches k; entry 0 is never used); `which` picks an element's row. Within a row the thresholds lie
    within `slack` [P] of the chord between any two of them.

    Sound because for integers w, m the maximum of w h(x) - m x over [A, B] is taken at an end of the interval or of a
    step: at steps' left ends where m >= 0, at their right ends where m < 0. Along the steps, w k - m t_k differs from a
    linear function of k by at most |m| slack, so it is at most its value at the first or the last step plus that.
    """

    relaxes = True
    thresholds: Array
    which: Array
    slack: Array
    low: int

    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], own: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        xp = kernels.xp
        (box,) = boxes
        a, b = (end.astype(xp.int64)[:, None] for end in box)
        first, last = (end.astype(xp.int64)[:, None] for end in own)
        flat, columns = self.thresholds.reshape(-1), self.thresholds.shape[1]
        offset = self.which * columns - self.low
        steps = last > first
        entry = xp.take(flat, xp.where(steps, first + 1, self.low + 1) + offset)  # where the second step begins
        top = xp.take(flat, xp.where(steps, last, self.low + 1) + offset)  # where the last step begins
        slopes = self._slopes(kernels, weights, a, b, first, last, entry, top)
        multipliers = xp.rint(weights * slopes).astype(xp.int64)
        reach = max(magnitude(kernels, box[0]), magnitude(kernels, box[1]), 256.0) + 4
        reach += magnitude(kernels, self.slack)
        codes = max(magnitude(kernels, own[0]), magnitude(kernels, own[1])) + 1
        total = magnitude(kernels, weights) * codes + magnitude(kernels, multipliers) * reach
        if total * max(1, box[0][0].size) >= LIMIT:
            raise TooLarge
        rising = multipliers >= 0
        slack = xp.where(last > first + 1, xp.abs(multipliers) * xp.take(self.slack, self.which), 0)
        left = weights * first - multipliers * a
        middle = xp.maximum(weights * (first + 1) - multipliers * entry, weights * last - multipliers * top) + slack
        up = xp.where(steps, xp.maximum(left, middle), left)
        right = weights * last - multipliers * b
        middle = weights * first - multipliers * (entry - 1)
        middle = xp.maximum(middle, weights * (last - 1) - multipliers * (top - 1)) + slack
        down = xp.where(steps, xp.maximum(right, middle), right)
        best = xp.where(rising, up, down)
        return (multipliers,), best.reshape(*best.shape[:2], -1).sum(axis=2)

    def _slopes(
        self, kernels: Kernels, weights: Array, a: Array, b: Array, first: Array, last: Array, entry: Array, top: Array
    ) -> Array:
        """A slope per function and element (float64, a guide): an edge of the concave hull of the steps where the weight
        is positive, of the convex hull (or 0, where the lowest step is the longer part) where it is negative."""
        xp = kernels.xp
        rise = (last - first).astype(xp.float64)
        above = rise / xp.maximum(top - a, 1)
        below = rise / xp.maximum(b - entry + 1, 1)
        below = xp.where((entry - a > b - entry) & (first == self.low), 0.0, below)
        return xp.where(weights > 0, above, below)


def make_staircase(
    run: Callable[[Any], Any], rows: int, which: Any, x: Type, low: int, high: int
) -> Staircase | Concretized:
    """The staircase of an element-wise op with `rows` parameter sets, `which` (broadcastable to x's shape) picking each
    element's. `run` maps int32 [N, rows] to codes in [low, high], one column per set. An op that is not non-decreasing is
    only concretized."""
    ends = [run(np.full((1, rows), end, np.int32)) for end in (x.low, x.high)]
    if (ends[0] > ends[1]).any():
        return Concretized()
    wanted = np.broadcast_to(np.arange(low, high + 2, dtype=np.int64)[:, None], (high + 2 - low, rows))
    begin, end = np.full(wanted.shape, x.low, np.int64), np.full(wanted.shape, x.high + 1, np.int64)
    while (begin < end).any():
        middle = (begin + end) // 2
        reached = run(np.minimum(middle, x.high).astype(np.int32)) >= wanted
        reached &= middle <= x.high
        end = np.where((begin < end) & reached, middle, end)
        begin = np.where((begin < end) & ~reached, middle + 1, begin)
    thresholds = np.ascontiguousarray(begin.T)  # [P, K + 1]
    return Staircase(thresholds, np.ascontiguousarray(np.broadcast_to(which, x.shape)), _slack(thresholds, x), low)


def _slack(thresholds: Any, x: Type) -> Any:
    """Per row: how far a threshold inside the input's range can lie from a chord between two others, rounded up."""
    slack = np.zeros(len(thresholds), np.int64)
    for p, row in enumerate(thresholds):
        inside = np.flatnonzero((row > x.low) & (row <= x.high))
        if len(inside) > 2:
            t = row[inside].astype(np.float64)
            line = t[0] + (t[-1] - t[0]) * (inside - inside[0]) / (inside[-1] - inside[0])
            away = t - line
            slack[p] = int(np.ceil((away.max() - away.min()) * (1 + 1e-9) + 1e-3))
    return slack
