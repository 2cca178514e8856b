"""Functions of one or two codes, as tables of all their values.

Every unary function between two codes (LeakyRelu, Sigmoid, Tanh, HardSwish, a requantizing copy, ...) is a `Table`;
every function of two codes (QLinearAdd, QLinearMul, ...) is a `Pairwise`. Filled once by the runtime's own arithmetic
when the model is read, they carry no float semantics any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels
from qverify.ops.base import AbstractOp, Interval, Type, unbroadcast
from qverify.ops.relax import Concretized, Relaxation, make_staircase

Int32Array = npt.NDArray[np.int32]


def _range_extremes(values: Int32Array) -> tuple[Int32Array, Int32Array]:
    """Sparse tables [levels, P, K]: level l holds the minimum (maximum) of values[p, k : k + 2**l] (clipped at K)."""
    least, most = [values], [values]
    width = 1
    while 2 * width <= values.shape[1]:
        shifted = np.minimum(np.arange(values.shape[1]) + width, values.shape[1] - 1)
        least.append(np.minimum(least[-1], least[-1][:, shifted]))
        most.append(np.maximum(most[-1], most[-1][:, shifted]))
        width *= 2
    return np.stack(least), np.stack(most)


@dataclass(frozen=True, eq=False)
class Table(AbstractOp):
    """y = values[which, x - low]. `values` [P, K] int32: one row per parameter set; `which` picks an element's row
    (broadcastable to the value's shape; None where P = 1).

    Interval: the exact minimum and maximum of the row over [lower, upper] (range queries on sparse tables), so the
    function need not be monotone. Sound because every entry in the range is considered; exact for the same reason.
    """

    values: Int32Array
    low: int
    which: npt.NDArray[np.int64] | None = None
    monotone: bool = field(init=False)
    _least: Array = field(init=False, repr=False)
    _most: Array = field(init=False, repr=False)
    _levels: Array = field(init=False, repr=False)  # [K + 1]: floor(log2(count))

    def __post_init__(self) -> None:
        object.__setattr__(self, "monotone", bool((np.diff(self.values, axis=1) >= 0).all()))
        least, most = (self.values[None],) * 2 if self.monotone else _range_extremes(self.values)
        object.__setattr__(self, "_least", least)
        object.__setattr__(self, "_most", most)
        levels = [max(count.bit_length() - 1, 0) for count in range(self.values.shape[1] + 1)]
        object.__setattr__(self, "_levels", np.array(levels, np.int32))

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if x.low < self.low or x.high >= self.low + self.values.shape[1]:
            raise ValueError(f"a table of {self.values.shape[1]} entries from {self.low} misses [{x.low}, {x.high}]")
        if self.which is None and len(self.values) != 1:
            raise ValueError("several rows need `which`")
        if self.which is not None and np.broadcast_shapes(self.which.shape, x.shape) != x.shape:
            raise ValueError(f"`which` {list(self.which.shape)} does not fit a value {list(x.shape)}")
        return Type(x.shape, int(self.values.min()), int(self.values.max()))

    def _entry(self, kernels: Kernels, table: Array, x: Array) -> Array:
        """table[which, x - low] for `table` [P, K] (or any leading level folded into x)."""
        offset = 0 if self.which is None else self.which * self.values.shape[1]
        return kernels.xp.take(table.reshape(-1), x - self.low + offset)

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        return self._entry(kernels, self.values, xs[0])

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        lower, upper = boxes[0]
        if self.monotone:
            return self.run(kernels, lower), self.run(kernels, upper)
        xp = kernels.xp
        level = xp.take(self._levels, upper - lower + 1)
        stride = self.values.size
        second = upper - (xp.int32(1) << level) + 1
        first_at, second_at = lower + level * stride, second + level * stride
        least = xp.minimum(self._entry(kernels, self._least, first_at), self._entry(kernels, self._least, second_at))
        most = xp.maximum(self._entry(kernels, self._most, first_at), self._entry(kernels, self._most, second_at))
        return least, most

    def relaxation(self, kernels: Kernels, *types: Type) -> Relaxation:
        low, high = int(self.values.min()), int(self.values.max())
        if not self.monotone or high - low > 4096:
            return Concretized()
        which = np.zeros((), np.int64) if self.which is None else self.which
        rows = np.arange(len(self.values))
        return make_staircase(lambda x: self.values[rows, x - self.low], len(rows), which, types[0], low, high)

    def gradient(self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array) -> tuple[Array, ...]:
        xp = kernels.xp
        last = self.low + self.values.shape[1] - 1
        right, left = xp.minimum(xs[0] + 4, last), xp.maximum(xs[0] - 4, self.low)
        top, bottom = (kernels.as_float32(self._entry(kernels, self.values, x)) for x in (right, left))
        return (upstream * (top - bottom) / kernels.as_float32(xp.maximum(right - left, 1)),)


@dataclass(frozen=True, eq=False)
class Pairwise(AbstractOp):
    """y = values[a - a_low, b - b_low], with numpy broadcasting of the two inputs.

    `values` [Ka, Kb] int32 must be monotone along each axis (its direction may change with the other argument, as in a
    product); the constructor checks all entries. Sound because such a function takes its extremes over a box of (a, b)
    at the box's corners: moving a alone to one of its ends does not lower (raise) the value, then b likewise.
    """

    values: Int32Array
    a_low: int
    b_low: int
    increasing: bool = field(init=False)

    def __post_init__(self) -> None:
        steps = [np.diff(self.values, axis=axis) for axis in (0, 1)]
        for axis, step in enumerate(steps):
            if not ((step >= 0).all(axis=axis) | (step <= 0).all(axis=axis)).all():
                raise ValueError("a function of two codes must be monotone in each of them")
        object.__setattr__(self, "increasing", all(bool((step >= 0).all()) for step in steps))

    def output_type(self, *types: Type) -> Type:
        a, b = types
        for x, low, count in ((a, self.a_low, self.values.shape[0]), (b, self.b_low, self.values.shape[1])):
            if x.low < low or x.high >= low + count:
                raise ValueError(f"a table of {count} entries from {low} misses [{x.low}, {x.high}]")
        shape = np.broadcast_shapes(a.shape, b.shape)
        return Type(tuple(shape), int(self.values.min()), int(self.values.max()))

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        rank = max(x.ndim for x in xs)
        a, b = (x.reshape(x.shape[0], *([1] * (rank - x.ndim)), *x.shape[1:]) for x in xs)
        at = (a - self.a_low) * self.values.shape[1] + (b - self.b_low)
        return kernels.xp.take(self.values.reshape(-1), at)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        (al, au), (bl, bu) = boxes
        first, last = self.run(kernels, al, bl), self.run(kernels, au, bu)
        if self.increasing:
            return first, last
        xp = kernels.xp
        second, third = self.run(kernels, al, bu), self.run(kernels, au, bl)
        least = xp.minimum(xp.minimum(first, last), xp.minimum(second, third))
        most = xp.maximum(xp.maximum(first, last), xp.maximum(second, third))
        return least, most

    def gradient(self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array) -> tuple[Array, ...]:
        xp = kernels.xp
        grads = []
        for axis, (x, low) in enumerate(zip(xs, (self.a_low, self.b_low), strict=True)):
            last = low + self.values.shape[axis] - 1
            right, left = xp.minimum(x + 4, last), xp.maximum(x - 4, low)
            ends = [self.run(kernels, *(e if i == axis else xs[i] for i in (0, 1))) for e in (left, right)]
            rise = kernels.as_float32(ends[1]) - kernels.as_float32(ends[0])
            grads.append(unbroadcast(upstream * rise, x) / kernels.as_float32(xp.maximum(right - left, 1)))
        return tuple(grads)
