"""Backward rules: a linear function of an op's result, bounded by one of its inputs, exactly.

A `Relaxation` takes multipliers `weights` [N, R, *shape] of a value y = op(x) (R functions per box)
and returns multipliers of x and constants [N, R] such that, for every x in its interval,

    sum weights * y  <=  sum multipliers * x + constant.

Linear ops have one answer, an equality. A `NonlinearRelaxation` op has a choice: any multipliers of
its argument are allowed, and the constant is then the maximum of what is left, taken over the op's
`Hull`. So floats may choose the multipliers.

Every rule is written once for two number types. On int64 arrays everything is exact, and `TooLarge`
is raised where int64 (or a float64 product, 2**53) could be left; the caller then does without this
bound. On float32 arrays the same formulas are a guide for the choice of multipliers, and nothing is
checked.

This is CROWN (Zhang et al., NeurIPS 2018) read as the Lagrangian dual of Dvijotham et al. (UAI
2018), on integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qverify.kernels import Array, Kernels
from qverify.ops.types import Interval, Type

GUIDE = np.float32  # the number type of what only guides
LIMIT = 2.0**61  # magnitudes are measured in float64 and kept well inside int64


class TooLarge(Exception):
    """An exact integer could leave its type; no bound is given."""


def exact(array: Array) -> bool:
    """Whether an array's arithmetic is to be exact (int64), not a guide (float32)."""
    return bool(array.dtype.kind == "i")


def magnitude(kernels: Kernels, *xs: Array) -> float:
    """The largest absolute value in some arrays, as a float."""
    return max(kernels.largest(*xs))


def summed(x: Array) -> Array:
    """[N, R, *shape] -> [N, R], summed over the elements."""
    return x.reshape(*x.shape[:2], -1).sum(axis=2)


def concretize(kernels: Kernels, weights: Array, box: Interval) -> tuple[Array, Array]:
    """max of sum weights * x over x in `box` [N, R], and where it is taken [N, R, *shape].

    The bounds in `box` are [N or 1, *shape] each.
    """
    lower, upper = (end.astype(weights.dtype, copy=False)[:, None] for end in box)
    if exact(weights):
        size, *reach = kernels.largest(weights, *box)
        if size * max(reach) * max(1, box[0][0].size) >= LIMIT:
            raise TooLarge
    best = kernels.furthest(weights, lower, upper)
    return kernels.inner(weights, best), best


class Relaxation(ABC):
    """The backward rule of one op with given input types; arrays are on the network's machine."""

    def forward(self, kernels: Kernels, *xs: Array) -> Array:
        """The result of a linear op for `xs` in the guide's type [N, *shape]."""
        raise NotImplementedError(f"{type(self).__name__} is not linear")

    @abstractmethod
    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        """Multipliers of each input (or None), and constants [N, R], for `weights` of the result.

        The inputs lie in `boxes`, the result in `result`.
        """


@dataclass(frozen=True, eq=False)
class IntervalRelaxation(Relaxation):
    """Stop here, at the result's bounds. Sound for every op."""

    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        return (None,) * len(boxes), concretize(kernels, weights, result)[0]


@dataclass(frozen=True, eq=False)
class Hull:
    """What a nonlinear op can do on given boxes: pairs (z, y) of argument and result, per element.

    Of `z` and `y` [2, C, N, 1, *shape], row 0 holds the C corners that matter where z has a
    multiplier m >= 0, row 1 those for m < 0; [1, C, ...] where they are the same. For every
    multiplier, no pair that occurs exceeds the best of its corners by more than |m| `slack` [N, 1,
    *shape] (None: by nothing).
    """

    z: Array
    y: Array
    slack: Array | None

    def as_guide(self, kernels: Kernels) -> Hull:
        """The same in the guide's type."""
        slack = None if self.slack is None else self.slack.astype(GUIDE)
        return replace(self, z=self.z.astype(GUIDE), y=self.y.astype(GUIDE), slack=slack)

    def take(self, rows: Array) -> Hull:
        """Some of the subproblems."""
        slack = None if self.slack is None else self.slack[rows]
        return replace(self, z=self.z[:, :, rows], y=self.y[:, :, rows], slack=slack)

    def best(
        self, kernels: Kernels, weights: Array, multipliers: Array
    ) -> tuple[Array, Array, Array]:
        """(max of weights * y - multipliers * z [N, R], the corner's y and z [N, R, *shape]).

        Sound because a linear function takes its maximum over a set at one of its corners; slack
        costs |multiplier| each.
        """
        if exact(weights):
            slack = () if self.slack is None else (self.slack,)
            w, y_size, m, *z_sizes = kernels.largest(weights, self.y, multipliers, self.z, *slack)
            if (w * y_size + m * sum(z_sizes)) * max(1, weights[0, 0].size) >= LIMIT:
                raise TooLarge
        best, y, z = kernels.best_corner(weights, multipliers, self.z, self.y, self.slack)
        return summed(best), y, z


class NonlinearRelaxation(Relaxation):
    """y = f(z), element by element, for an integer linear function z of the inputs.

    `cuts` says which value the search may cut to make the hull smaller: the op's "input", its
    "result", or "none".
    """

    name = ""  # in certificates
    cuts = "none"
    whole = False  # whether the argument has other elements than the result

    @abstractmethod
    def hull(self, kernels: Kernels, boxes: tuple[Interval, ...], result: Interval) -> Hull:
        """What f can do where the inputs lie in `boxes` and the result in `result`; int64."""

    @abstractmethod
    def slopes(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> Array:
        """A multiplier per function and element to start from: weights times an edge of the hull.

        In float64: a guide.
        """

    def cut(
        self, kernels: Kernels, z: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[Array, Array]:
        """Where to cut near arguments z [N, *shape], and where that is possible: both [N, *shape].

        A threshold t parts the op's `cuts` value into at most t - 1 and at least t. Never possible
        for an op without cuts.
        """
        return z, kernels.xp.zeros(z.shape, dtype=kernels.xp.bool_)

    def kink(
        self, kernels: Kernels, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[Array, Array] | None:
        """Where the op stops being constant, if it begins so: a threshold, and by how much a hull
        exceeds the op there, in codes (0: it does not); both [N, *shape]. None: not known."""
        return None

    def pace(self) -> Array | None:
        """Codes per unit of the argument, along the steps: float64 that broadcasts to the result.
        None if unknown."""
        return None

    def value(self, kernels: Kernels, run: Callable[..., Array], z: Array) -> Array:
        """The result of the op at arguments z int32 [N, *shape] (a guide)."""
        return run(kernels, z)

    def narrowed(
        self, kernels: Kernels, z: Interval, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[int, Interval]:
        """What bounds `z` of the argument, [N, *shape] each, say of a network value.

        The number of an input and bounds of it, or -1 and bounds of the result.
        """
        return 0, z

    def argument(self, kernels: Kernels, *xs: Array) -> Array:
        """z for inputs [N, *shape]; the input itself for an op of one input."""
        return xs[0]

    def spread(
        self, kernels: Kernels, multipliers: Array, boxes: tuple[Interval, ...]
    ) -> tuple[Array | None, ...]:
        """Multipliers of z as multipliers of each input."""
        return (multipliers,)

    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        slopes = self.slopes(kernels, weights, boxes, result)
        multipliers = kernels.whole(slopes).astype(weights.dtype)
        value, _, _ = self.hull(kernels, boxes, result).best(kernels, weights, multipliers)
        return self.spread(kernels, multipliers, boxes), value


def steepness(thresholds: Array) -> Array:
    """Steps per unit of the argument, of rows of NumPy thresholds [P, K + 1]: [P].

    Counted between the first and the last one that the argument can reach. A row with fewer than
    two takes the most of any; 0 if there is none.
    """
    inner = np.atleast_2d(thresholds)[:, 1:-1].astype(np.float64)
    if not inner.size:
        return np.zeros(len(np.atleast_2d(thresholds)))
    low, high = inner.min(), inner.max()  # beyond reach, where some are
    inside = np.where((inner > low) & (inner < high), inner, np.nan)
    count = np.isfinite(inside).sum(axis=1)
    first, last = (
        np.nan_to_num(inside, nan=np.inf).min(axis=1),
        np.nan_to_num(inside, nan=-np.inf).max(axis=1),
    )
    steep = np.where(count > 1, (count - 1) / np.maximum(last - first, 1), 0.0)
    return np.where(count > 1, steep, steep.max())


@dataclass(frozen=True, eq=False)
class StaircaseRelaxation(NonlinearRelaxation):
    """y = h(x), element by element, for a non-decreasing h given by its thresholds.

    `thresholds` [P, K + 1] int64: entry k - low is the least x with h(x) >= k, for k = low..high +
    1 (beyond the input's range where no x reaches k; entry 0 is never used); `which` picks an
    element's row. Within a row the thresholds lie within `slack` [P] of the chord between any two
    of them.

    Sound because for integers w, m the maximum of w h(x) - m x over [A, B] is taken at an end of
    the interval or of a step: at steps' left ends where m >= 0, at their right ends where m < 0.
    Along the steps, w k - m t_k differs from a linear function of k by at most |m| slack, so it is
    at most its value at the first or the last step plus that.
    """

    name = "staircase"
    cuts = "input"
    thresholds: Array
    which: Array
    slack: Array
    low: int

    def begin(self, kernels: Kernels, code: Array) -> Array:
        """The least x whose result is at least `code` [N, *shape] (above the least possible code):
        int64."""
        offset = self.which * self.thresholds.shape[1] - self.low
        return kernels.xp.take(self.thresholds.reshape(-1), code + offset)

    def _bounds(
        self, kernels: Kernels, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[Array, ...]:
        """Bounds of x where the result lies in `result`, then its first and its last code.

        int64 [N, 1, *shape] each.
        """
        a, b, first, last = (end.astype(kernels.xp.int64)[:, None] for end in (*boxes[0], *result))
        xp, low, high = kernels.xp, self.low, self.low + self.thresholds.shape[1] - 2
        a = xp.where(first > low, xp.maximum(a, self.begin(kernels, xp.maximum(first, low + 1))), a)
        b = xp.where(
            last < high, xp.minimum(b, self.begin(kernels, xp.minimum(last + 1, high)) - 1), b
        )
        return a, b, first, last

    def hull(self, kernels: Kernels, boxes: tuple[Interval, ...], result: Interval) -> Hull:
        a, b, first, last = self._bounds(kernels, boxes, result)
        z, y, interior = corners(
            kernels, a, b, first, last, self.low, lambda code: self.begin(kernels, code)
        )
        slack = kernels.xp.where(interior, kernels.xp.take(self.slack, self.which), 0)
        shape = (2, 3, *a.shape)
        return Hull(kernels.xp.stack(z).reshape(shape), kernels.xp.stack(y).reshape(shape), slack)

    def slopes(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> Array:
        a, b, first, last = self._bounds(kernels, boxes, result)
        above, below = edges(
            kernels, a, b, first, last, self.low, lambda code: self.begin(kernels, code)
        )
        return weights * kernels.xp.where(weights > 0, above, below)

    def kink(
        self, kernels: Kernels, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[Array, Array] | None:
        """At the first step, where the lowest code is clipped: a rectifier's kink."""
        xp = kernels.xp
        a, b, first, last = (bound[:, 0] for bound in self._bounds(kernels, boxes, result))
        begins = (first == self.low) & (last > first)
        step = self.begin(kernels, xp.where(begins, first + 1, self.low + 1))
        top = self.begin(kernels, xp.where(begins, last, self.low + 1))
        begins &= (step > a) & (step <= b)
        rise = (last - first) * ((step - a) / xp.maximum(top - a, 1))
        return step, xp.where(begins, rise, 0.0)

    def pace(self) -> Array | None:
        return steepness(np.asarray(self.thresholds))[np.asarray(self.which)]

    def cut(
        self, kernels: Kernels, z: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[Array, Array]:
        """At the step that begins nearest to z."""
        xp = kernels.xp
        a, b = boxes[0]
        first, last = result
        steps = last > first
        share = xp.clip((z - a) / xp.maximum(b - a, 1), 0.0, 1.0)
        guess = first + xp.rint(share * (last - first)).astype(first.dtype)
        below = xp.clip(guess, first + 1, xp.maximum(last, first + 1))
        begin = self.begin(kernels, xp.where(steps, below, self.low + 1))
        for shift in (-2, -1, 1, 2):  # all steps but the first and last are even
            code = xp.clip(below + shift, first + 1, xp.maximum(last, first + 1))
            other = self.begin(kernels, xp.where(steps, code, self.low + 1))
            begin = xp.where(xp.abs(other - z) < xp.abs(begin - z), other, begin)
        return begin, steps & (begin > a) & (begin <= b)


def corners(
    kernels: Kernels,
    a: Array,
    b: Array,
    first: Array,
    last: Array,
    low: int,
    begin: Callable[[Array], Array],
) -> tuple[tuple[Array, ...], tuple[Array, ...], Array]:
    """The corners (z, y) of a staircase on [a, b], and where it has more than two steps.

    Its codes are `first`..`last`; `begin` says where a step begins (for codes above `low`). The
    corners are the left ends of the first, the second and the last step, then the right ends of the
    last, the first and the last but one. Where there is one step, its ends are repeated.
    """
    xp = kernels.xp
    steps = last > first
    entry = xp.where(steps, begin(xp.where(steps, first + 1, low + 1)), a)
    top = xp.where(steps, begin(xp.where(steps, last, low + 1)), a)
    z = (a, entry, top, b, xp.where(steps, entry - 1, b), xp.where(steps, top - 1, b))
    y = (
        first,
        xp.where(steps, first + 1, first),
        last,
        last,
        first,
        xp.where(steps, last - 1, first),
    )
    return z, y, last > first + 1


def edges(
    kernels: Kernels,
    a: Array,
    b: Array,
    first: Array,
    last: Array,
    low: int,
    begin: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """Slopes to start from (float64): an edge of a staircase's concave hull, and one of its convex.

    The second is 0 where the lowest step is the longer part.
    """
    xp = kernels.xp
    steps = last > first
    entry = begin(xp.where(steps, first + 1, low + 1))
    top = begin(xp.where(steps, last, low + 1))
    rise = (last - first).astype(xp.float64)
    below = rise / xp.maximum(b - entry + 1, 1)
    below = xp.where((entry - a > b - entry) & (first == low), 0.0, below)
    return rise / xp.maximum(top - a, 1), below


def make_staircase(
    run: Callable[[Any], Any], rows: int, which: Any, x: Type, low: int, high: int
) -> StaircaseRelaxation | IntervalRelaxation:
    """The staircase of an element-wise op with `rows` parameter sets.

    `which` (broadcastable to x's shape) picks each element's set. `run` maps int32 [N, rows] to
    codes in [low, high], one column per set. An op that is not non-decreasing is only concretized.
    """
    first, last = (run(np.full((1, rows), end, np.int32)) for end in (x.low, x.high))
    if (first > last).any():
        return IntervalRelaxation()
    wanted = np.broadcast_to(
        np.arange(low, high + 2, dtype=np.int64)[:, None], (high + 2 - low, rows)
    )
    begin, end = np.full(wanted.shape, x.low, np.int64), np.full(wanted.shape, x.high + 1, np.int64)
    while (begin < end).any():
        middle = (begin + end) // 2
        reached = run(np.minimum(middle, x.high).astype(np.int32)) >= wanted
        reached &= middle <= x.high
        end = np.where((begin < end) & reached, middle, end)
        begin = np.where((begin < end) & ~reached, middle + 1, begin)
    thresholds = np.ascontiguousarray(begin.T)  # [P, K + 1]
    return StaircaseRelaxation(
        thresholds,
        np.ascontiguousarray(np.broadcast_to(which, x.shape)),
        slack_of(thresholds, x),
        low,
    )


def slack_of(thresholds: Any, x: Type) -> Any:
    """Per row: how far a threshold inside the input's range can lie from a chord, rounded up."""
    slack = np.zeros(len(thresholds), np.int64)
    for p, row in enumerate(thresholds):
        inside = np.flatnonzero((row > x.low) & (row <= x.high))
        if len(inside) > 2:
            t = row[inside].astype(np.float64)
            line = t[0] + (t[-1] - t[0]) * (inside - inside[0]) / (inside[-1] - inside[0])
            away = t - line
            slack[p] = int(np.ceil((away.max() - away.min()) * (1 + 1e-9) + 1e-3))
    return slack
