"""What the checker knows of each op: bounds of its result over a box, and, where it is linear,
how weights of the result become weights of its inputs.

A value is flat here: bounds in N boxes are [N, size], weights of R functions in each box [N, R,
size]. All integers are int64, and before every product or sum a Python integer bounds the magnitude
of whatever it can give: what could reach 2**62 has no bound (`TooLarge`). Floats stand in two
places: in an op's own `run`, and in products of integers whose partial sums stay below 2**53, which
are exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.errors import Rejected
from qverify.kernels import open_kernels
from qverify.ops import (
    AbstractOp,
    Conv,
    Dense,
    Layout,
    Max,
    Mean,
    Pairwise,
    Requantize,
    Softmax,
    Table,
    Type,
)

CPU = open_kernels("cpu")
LIMIT = 2**62
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Interval = tuple[Ints, Ints]  # lower and upper bounds, [N, size] each


class TooLarge(Rejected):
    """Numbers so large that a sum could leave 64 bits: there is no bound."""


def reach(*arrays: Ints) -> int:
    """The largest magnitude in some arrays."""
    return max((max(int(x.max()), -int(x.min())) for x in arrays if x.size), default=0)


def fits(size: int, limit: int = LIMIT) -> None:
    """Reject what could leave its type; `size` bounds the magnitude of every intermediate
    result."""
    if size >= limit:
        raise TooLarge("its numbers are so large that a sum could leave 64 bits")


def added(a: Ints, b: Ints) -> Ints:
    """a + b, for numbers below 2**62."""
    total = a + b
    fits(reach(a, b, total))
    return total


def maximum(w: Ints, box: Interval) -> Ints:
    """max of w . x over boxes: [N, R]."""
    low, high = (end[:, None] for end in box)
    fits(reach(w) * reach(*box) * max(w.shape[2], 1))
    best: Ints = (w * np.where(w > 0, high, low)).sum(axis=2)
    return best


def gathered(w: Ints, index: Ints, size: int) -> Ints:
    """Weights of `source[index]` as weights of source: those of one element add up."""
    fits(reach(w) * max(len(index), 1))
    order = np.argsort(index, kind="stable")
    found, starts = np.unique(index[order], return_index=True)
    result = np.zeros((*w.shape[:2], size), np.int64)
    if len(found):
        result[:, :, found] = np.add.reduceat(w[:, :, order], starts, axis=2)
    return result


def spots(inner: tuple[int, ...], outer: tuple[int, ...]) -> Ints:
    """Which element of a value of shape `inner` each element of `outer` reads by broadcasting."""
    return np.broadcast_to(
        np.arange(int(np.prod(inner, dtype=np.int64))).reshape(inner), outer
    ).reshape(-1)


# -- weighted sums and moves -----------------------------------------------------------------------


class Linear:
    """An op whose result is a linear function of its inputs."""

    def interval(self, boxes: list[Interval]) -> Interval:
        """The interval of the result."""
        raise NotImplementedError

    def back(self, w: Ints) -> tuple[list[Ints], Ints]:
        """The sum of w . result as weights of each input, and constants [N, R]."""
        raise NotImplementedError


class Weighted(Linear):
    """weight . x + bias: each input takes its better end. The subclasses multiply by the positive
    weights, by the negative ones, or by all of them, in float64: no sum of magnitudes reaches
    2**53."""

    def __init__(
        self, weight: Ints, bias: Ints, over_inputs: int, over_results: int, x: int
    ) -> None:
        self.all = weight.astype(np.float64)
        self.positive, self.negative = np.maximum(self.all, 0), np.minimum(self.all, 0)
        self.bias, self.over_inputs, self.over_results = bias, over_inputs, over_results
        fits(2 * over_inputs * x + reach(bias), 2**53)

    def times(self, x: Ints, weight: Floats) -> Ints:
        """`x` [N, size of the input] times a part of the weights: [N, size of the result]."""
        raise NotImplementedError

    def interval(self, boxes: list[Interval]) -> Interval:
        low, high = boxes[0]
        least = self.times(low, self.positive) + self.times(high, self.negative)
        most = self.times(high, self.positive) + self.times(low, self.negative)
        return least + self.bias, most + self.bias


class Product(Weighted):
    """Dense: x [..., K] @ weight [*stack, K, M] + bias. (`back` is for weights without a stack.)"""

    def __init__(self, op: Dense, x: Type, y: Type) -> None:
        over = [int(np.abs(op.weight).sum(axis=axis).max(initial=0)) for axis in (-2, -1)]
        bias = np.broadcast_to(op.bias, y.shape).reshape(-1)
        super().__init__(op.weight, bias, over[0], over[1], max(abs(x.low), abs(x.high)))
        stacks = op.weight.ndim - len(x.shape) if op.weight.ndim > 2 else 0
        self.shape = (*([1] * stacks), *x.shape)

    def times(self, x: Ints, weight: Floats) -> Ints:
        rows = x.reshape(-1, weight.shape[0]) if weight.ndim == 2 else x.reshape(-1, *self.shape)
        product: Ints = np.matmul(rows.astype(np.float64), weight).astype(np.int64)
        return product.reshape(len(x), -1)

    def back(self, w: Ints) -> tuple[list[Ints], Ints]:
        fits(reach(w) * self.over_results, 2**53)
        fits(reach(w) * reach(self.bias) * w.shape[2])
        parts = w.reshape(-1, self.all.shape[1]).astype(np.float64) @ self.all.T
        return [parts.astype(np.int64).reshape(*w.shape[:2], -1)], (w * self.bias).sum(axis=2)


class Convolution(Weighted):
    """Conv, tap by tap of its kernel; while it works, values are [groups, n, B, *spatial, channels
    of a group]."""

    def __init__(self, op: Conv, x: Type, y: Type) -> None:
        channels, inputs, *kernel = op.weight.shape
        self.op, self.x, self.y, self.rank = op, x.shape, y.shape, len(kernel)
        weight = op.weight.reshape(op.groups, channels // op.groups, inputs, *kernel)
        size = np.abs(weight).reshape(*weight.shape[:3], -1)
        over = [int(size.sum(axis=axes).max(initial=0)) for axes in ((2, 3), (1, 3))]
        bias = np.broadcast_to(op.bias.reshape(-1, *([1] * self.rank)), y.shape).reshape(-1)
        super().__init__(
            weight, bias, over[0], over[1], max(abs(x.low), abs(x.high), abs(op.pad_value))
        )
        self.padded = [n + op.pads[i] + op.pads[self.rank + i] for i, n in enumerate(x.shape[2:])]
        inside = (slice(op.pads[i], op.pads[i] + n) for i, n in enumerate(x.shape[2:]))
        self.inside: Any = (..., *inside, slice(None))

    def split(self, x: Ints, shape: tuple[int, ...]) -> Floats:
        """[n, size of a value B x C x spatial] in the form that it has while it works."""
        groups = x.reshape(-1, shape[0], self.op.groups, shape[1] // self.op.groups, *shape[2:])
        return np.moveaxis(np.moveaxis(groups, 2, 0), 3, -1).astype(np.float64)

    def joined(self, x: Floats) -> Ints:
        """The inverse of `split`."""
        return np.moveaxis(np.moveaxis(x, -1, 3), 0, 2).reshape(x.shape[1], -1).astype(np.int64)

    def taps(self) -> Iterator[tuple[Any, Any]]:
        """Every tap, and where it reads in the padded input."""
        for tap in np.ndindex(*self.all.shape[3:]):
            starts = [t * d for t, d in zip(tap, self.op.dilations, strict=True)]
            reads = (
                (a, a + (n - 1) * s + 1, s)
                for a, n, s in zip(starts, self.y[2:], self.op.strides, strict=True)
            )
            yield (..., *tap), (..., *(slice(*end) for end in reads), slice(None))

    def times(self, x: Ints, weight: Floats) -> Ints:
        groups, results, inputs = weight.shape[:3]
        shape = (groups, len(x), self.x[0], *self.padded, inputs)
        padded = np.full(shape, float(self.op.pad_value))
        padded[self.inside] = self.split(x, self.x)
        shape = (groups, len(x), self.y[0], *self.y[2:], results)
        total = np.zeros(shape)
        for tap, where in self.taps():
            total += np.matmul(
                padded[where].reshape(groups, -1, inputs), weight[tap].swapaxes(1, 2)
            ).reshape(shape)
        return self.joined(total)

    def back(self, w: Ints) -> tuple[list[Ints], Ints]:
        fits(reach(w) * self.over_results, 2**53)
        fits(reach(w) * (reach(self.bias) + abs(self.op.pad_value) * self.over_inputs) * w.shape[2])
        groups, results, inputs = self.all.shape[:3]
        weights = self.split(w, self.y).reshape(groups, -1, results)
        total = np.zeros((groups, w.shape[0] * w.shape[1], self.x[0], *self.padded, inputs))
        for tap, where in self.taps():
            total[where] += np.matmul(weights, self.all[tap]).reshape(total[where].shape)
        parts = self.joined(total[self.inside]).reshape(*w.shape[:2], -1)
        constant = (w * self.bias).sum(axis=2)
        if self.op.pad_value and any(self.op.pads):  # weights of the padding
            everywhere = (
                total.astype(np.int64).sum(axis=(0, *range(2, total.ndim))).reshape(w.shape[:2])
            )
            constant = constant + self.op.pad_value * (everywhere - parts.sum(axis=2))
        return [parts], constant


class Move(Linear):
    """Layout: every element of the result is an element of an input, or a constant."""

    def __init__(self, op: Layout, inputs: tuple[Type, ...]) -> None:
        self.sizes, self.index = [x.size for x in inputs], op.index
        self.constants = (
            np.zeros(0, np.int64) if op.constants is None else op.constants.astype(np.int64)
        )

    def interval(self, boxes: list[Interval]) -> Interval:
        if self.index is None:
            return boxes[0]
        fixed = np.broadcast_to(self.constants, (len(boxes[0][0]), len(self.constants)))
        low, high = (
            np.concatenate([*(box[i] for box in boxes), fixed], axis=1)[:, self.index]
            for i in (0, 1)
        )
        return low, high

    def back(self, w: Ints) -> tuple[list[Ints], Ints]:
        if self.index is None:
            return [w], np.zeros(w.shape[:2], np.int64)
        total = gathered(w, self.index, sum(self.sizes) + len(self.constants))
        *parts, fixed = np.split(total, np.cumsum(self.sizes), axis=2)
        fits(reach(fixed) * reach(self.constants) * max(len(self.constants), 1))
        return parts, (fixed * self.constants).sum(axis=2)


# (op, types of the inputs, type of the result) -> the op as a linear function
LINEAR: dict[type[AbstractOp], Callable[[Any, tuple[Type, ...], Type], Linear]] = {
    Dense: lambda op, types, y: Product(op, types[0], y),
    Conv: lambda op, types, y: Convolution(op, types[0], y),
    Layout: lambda op, types, y: Move(op, types),
}


def linear(op: AbstractOp, types: tuple[Type, ...], y: Type) -> Linear | None:
    """The op as a linear function, if it is one."""
    make = LINEAR.get(type(op))
    return None if make is None else make(op, types, y)


# -- intervals of the other ops --------------------------------------------------------------------


BoxRule = Callable[[list[Interval]], Interval]  # from the inputs' to the result's


def nonlinear(op: AbstractOp, types: tuple[Type, ...]) -> BoxRule:
    """The rule for the result's interval of an op that is not linear."""
    make = NONLINEAR.get(type(op))
    if make is None:
        raise Rejected(f"the checker has no rule for {type(op).__name__}")
    return make(op, types)


def _running(op: AbstractOp, types: tuple[Type, ...]) -> Callable[..., Ints]:
    """The op on flat values."""

    def run(*xs: Ints) -> Ints:
        shaped = (x.astype(np.int32).reshape(-1, *t.shape) for x, t in zip(xs, types, strict=True))
        result: Ints = op.run(CPU, *shaped).reshape(len(xs[0]), -1).astype(np.int64)
        return result

    return run


def _rising(op: AbstractOp, types: tuple[Type, ...]) -> BoxRule:
    """Non-decreasing in every element."""
    run = _running(op, types)
    return lambda boxes: (run(boxes[0][0]), run(boxes[0][1]))


def _corners(op: AbstractOp, types: tuple[Type, ...]) -> BoxRule:
    """Monotone in each input, in one direction or the other, so that extremes lie at corners."""
    run = _running(op, types)

    def interval(boxes: list[Interval]) -> Interval:
        results = [run(*corner) for corner in itertools.product(*boxes)]
        return np.minimum.reduce(results), np.maximum.reduce(results)

    return interval


def rows_of(op: Table, x: Type) -> Ints:
    """The row of a table that each element of its input reads."""
    which = np.zeros((), np.int64) if op.which is None else op.which
    return np.broadcast_to(which, x.shape).reshape(-1)


def _table(op: Table, types: tuple[Type, ...]) -> BoxRule:
    """The least and the largest entry of a range, from two ranges of 2**level entries that cover
    it."""
    rows, levels = rows_of(op, types[0]), [(op.values.astype(np.int64),) * 2]
    while 2 ** len(levels) <= op.values.shape[1]:
        (least, most), half = levels[-1], 2 ** (len(levels) - 1)
        apart = np.minimum(np.arange(op.values.shape[1]) + half, op.values.shape[1] - 1)
        levels.append((np.minimum(least, least[:, apart]), np.maximum(most, most[:, apart])))
    least, most = (np.stack([level[i] for level in levels]) for i in (0, 1))

    def interval(boxes: list[Interval]) -> Interval:
        first, last = boxes[0][0] - op.low, boxes[0][1] - op.low
        level = np.frexp((last - first + 1).astype(np.float64))[1] - 1
        second = last + 1 - (1 << level)
        low = np.minimum(least[level, rows, first], least[level, rows, second])
        return low, np.maximum(most[level, rows, first], most[level, rows, second])

    return interval


def _softmax(op: Softmax, low: Ints, high: Ints) -> Interval:
    """The least term over the largest sum, and conversely: every step of `run` is monotone in the
    terms and the sum.

    A term falls as the row's maximum rises; the sum is never below the term of the maximum
    itself.
    """
    n, low, high = len(low), low.reshape(-1, op.length), high.reshape(-1, op.length)
    tops = (high.max(axis=1, keepdims=True), low.max(axis=1, keepdims=True))
    terms = [
        op._table[np.clip(x - top + 255, 0, 255)] for x, top in zip((low, high), tops, strict=True)
    ]
    least, most = (np.add.accumulate(t, axis=1, dtype=np.float32)[:, -1:] for t in terms)
    factor = float(np.floor(np.float32(1) / op.y_scale))
    bounds = []
    for term, total in zip(terms, (most, np.maximum(least, op._table[255])), strict=True):
        code = np.rint(term.astype(np.float64) * factor / total.astype(np.float64))
        code = np.clip(code, op.low - op.zero_point, op.high - op.zero_point) + op.zero_point
        bounds.append(code.astype(np.int64).reshape(n, -1))
    return bounds[0], bounds[1]


# (op, types of the inputs) -> its rule
NONLINEAR: dict[type[AbstractOp], Callable[[Any, tuple[Type, ...]], BoxRule]] = {
    Mean: _rising,
    Max: _rising,
    Requantize: _corners,
    Pairwise: _corners,
    Table: _table,
    Softmax: lambda op, types: lambda boxes: _softmax(op, *boxes[0]),
}
