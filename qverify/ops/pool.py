"""Reductions over the last axis: the maximum of codes, and the float32 mean of dequantized codes.

Pooling windows are gathered by a `Layout` first, so these ops know nothing of strides and pads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels, open_kernels
from qverify.ops.base import AbstractOp
from qverify.ops.relax import (
    LIMIT,
    Hull,
    IntervalRelaxation,
    NonlinearRelaxation,
    Relaxation,
    TooLarge,
    exact,
    summed,
)
from qverify.ops.requantize import ordinals
from qverify.ops.types import Interval, Type, Unfit, joint_shape


@dataclass(frozen=True, eq=False)
class Max(AbstractOp):
    """The maximum over the last axis. Sound and exact because max increases in every argument."""

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if not x.shape or x.shape[-1] == 0:
            raise Unfit("the maximum of nothing")
        return Type(x.shape[:-1], x.low, x.high)

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        return xs[0].max(axis=-1)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        return boxes[0][0].max(axis=-1), boxes[0][1].max(axis=-1)

    def relaxation(self, kernels: Kernels, *types: Type) -> Relaxation:
        return MaxRelaxation() if types[0].shape[-1] <= 9 else IntervalRelaxation()

    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        xp = kernels.xp
        first = xs[0].argmax(axis=-1)[..., None] == xp.arange(xs[0].shape[-1])
        return (first * upstream[..., None],)


@dataclass(frozen=True, eq=False)
class MaxHull(Hull):
    """The hull of y = max z_i over the last axis.

    Bounds of every z_i, `z` [1, 2, N, 1, *shape, K], and of y, `y` [1, 2, N, 1, *shape].

    Sound, for w >= 0: some z_j is y, so that with its multiplier m_j >= 0 it gives (w - m_j) y,
    largest at a bound of y or of z_j; every other term is at most what a bound of its z_i gives.
    For w < 0: every z_i is at most y, so that for m_i <= 0 the sum is at most w y + sum |m_i|
    min(y, upper_i), which grows by at most sum |m_i| - |w| for each unit above y's lower bound;
    terms with m_i > 0 are at most what z_i's lower bound gives.
    """

    def _check_sizes(self, kernels: Kernels, weights: Array, multipliers: Array) -> None:
        """Raise TooLarge where a sum could leave int64."""
        z, y, w, m = kernels.largest(self.z, self.y, weights, multipliers)
        if (w + 2 * self.z.shape[-1] * m) * (z + y) * weights[0, 0].size >= LIMIT:
            raise TooLarge

    def best(
        self, kernels: Kernels, weights: Array, multipliers: Array
    ) -> tuple[Array, Array, Array]:
        xp = kernels.xp
        (lower, upper), (first, last) = self.z[0], self.y[0]
        if exact(weights):
            self._check_sizes(kernels, weights, multipliers)
        rises, falls = xp.maximum(multipliers, 0), xp.maximum(-multipliers, 0)
        floor = rises * lower
        # Where w >= 0: the best element to be the maximum, among those that reach y's lower bound.
        left = weights[..., None] - rises
        gain = xp.maximum(left * first[..., None], left * upper) + floor
        gain = xp.where(upper >= first[..., None], gain, gain.min(axis=-1, keepdims=True))
        at = gain.argmax(axis=-1)[..., None]
        upwards = (falls * upper - floor).sum(axis=-1) + gain.max(axis=-1)
        # Where w < 0: y at its lower bound, and what it may gain above.
        beside = xp.minimum(first[..., None], upper)
        excess = xp.maximum(falls.sum(axis=-1) + weights, 0)
        downwards = (
            weights * first + (falls * beside - floor).sum(axis=-1) + excess * (last - first)
        )
        best = xp.where(weights >= 0, upwards, downwards)
        if exact(weights):  # a bound; where it is taken is for guides only
            return summed(best), first, lower
        chosen = xp.take_along_axis(xp.broadcast_to(upper, left.shape), at, axis=-1)
        top = xp.where(xp.take_along_axis(left, at, axis=-1) > 0, chosen, first[..., None])
        y = xp.where(weights[..., None] >= 0, top, xp.where(excess > 0, last, first)[..., None])
        z = xp.where(falls > 0, xp.minimum(y, upper), lower)
        z = xp.where((weights[..., None] >= 0) & (xp.arange(upper.shape[-1]) == at), y, z)
        return summed(best), y[..., 0], z


@dataclass(frozen=True, eq=False)
class MaxRelaxation(NonlinearRelaxation):
    """y = max over the last axis; its argument is all of them."""

    name = "max"
    cuts = "result"
    whole = True

    def hull(self, kernels: Kernels, boxes: tuple[Interval, ...], result: Interval) -> Hull:
        xp = kernels.xp
        lower, upper = (end.astype(xp.int64)[:, None] for end in boxes[0])
        first, last = (end.astype(xp.int64)[:, None] for end in result)
        upper = xp.maximum(xp.minimum(upper, last[..., None]), lower)
        return MaxHull(xp.stack([lower, upper])[None], xp.stack([first, last])[None], None)

    def slopes(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> Array:
        """All of the weight on the element whose bounds add up to most (the first of them)."""
        xp = kernels.xp
        middle = (boxes[0][0] + boxes[0][1])[:, None]
        chosen = middle.argmax(axis=-1)[..., None] == xp.arange(middle.shape[-1])
        return xp.where(chosen, weights[..., None], 0.0).astype(xp.float64)

    def cut(
        self, kernels: Kernels, z: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[Array, Array]:
        first, last = result
        top = z.max(axis=-1)
        return kernels.xp.clip(top, first + 1, kernels.xp.maximum(last, first + 1)), last > first


@dataclass(frozen=True, eq=False)
class Mean(AbstractOp):
    """The float32 mean over the last axis of values[x - low], as an ordinal.

    `values` [K] float32 must be non-decreasing; `divisor` float32 broadcasts to the result (see
    `requantize.ordinals` for its integers). `order` is the order of the float32 additions, which
    decides the rounding: "sequential" (onnxruntime's QLinearAveragePool: row by row through the
    window) or "eigen" (ReduceMean over trailing axes: Eigen's linear vectorized reduction with four
    lanes, where a row that does not begin at a multiple of four elements is first brought to one).

    Sound because float32 addition and division by a positive number are monotone in each argument,
    in any fixed order.
    """

    values: npt.NDArray[np.float32]
    low: int
    divisor: npt.NDArray[np.float32]
    order: str

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if x.low < self.low or x.high >= self.low + len(self.values):
            raise Unfit(
                f"a table of {len(self.values)} entries from {self.low} misses [{x.low}, {x.high}]"
            )
        if not (np.diff(self.values) >= 0).all() or not (self.divisor > 0).all():
            raise Unfit("a mean needs non-decreasing values and a positive divisor")
        if (
            not x.shape
            or x.shape[-1] == 0
            or joint_shape(self.divisor.shape, x.shape[:-1]) != x.shape[:-1]
        ):
            raise Unfit(
                f"a mean with divisors {list(self.divisor.shape)} does not fit {list(x.shape)}"
            )
        if float(np.abs(self.values).max()) * x.shape[-1] > 3e38:
            raise Unfit("the sum before the mean can overflow float32")
        if self.order not in ("sequential", "eigen"):
            raise ValueError(f"no summation order '{self.order}'")
        bounds = np.array([x.low, x.high], np.int32).reshape(2, *([1] * len(x.shape)))
        least, most = self.run(open_kernels("cpu"), np.broadcast_to(bounds, (2, *x.shape)))
        return Type(x.shape[:-1], int(least.min()), int(most.max()))

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        v = kernels.xp.take(self.values, xs[0] - self.low)
        total = (
            _sequential_sum(kernels, v) if self.order == "sequential" else _eigen_sum(kernels, v)
        )
        return ordinals(kernels, kernels.ieee.divide(total, self.divisor))

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        return self.run(kernels, boxes[0][0]), self.run(kernels, boxes[0][1])

    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        xp = kernels.xp
        slope = float(self.values[-1] - self.values[0]) / max(len(self.values) - 1, 1)
        share = upstream * slope / kernels.asarray(self.divisor)
        return (xp.broadcast_to(share[..., None], xs[0].shape).astype(xp.float32),)


def _sequential_sum(kernels: Kernels, v: Array) -> Array:
    """((v0 + v1) + v2) + ... in float32."""
    total = v[..., 0]
    for k in range(1, v.shape[-1]):
        total = kernels.ieee.add(total, v[..., k])
    return total


def _eigen_sum(kernels: Kernels, v: Array) -> Array:
    """Eigen 3's redux with packets of four, over each row of a contiguous float32 [rows, T]."""
    xp = kernels.xp
    size = v.shape[-1]
    rows = int(np.prod(v.shape[1:-1], dtype=np.int64))
    flat = v.reshape(v.shape[0], rows, size)
    lead = (-np.arange(rows) * size) % 4  # elements of a row before the next 16-byte boundary
    result = xp.empty((v.shape[0], rows), dtype=xp.float32)
    for offset in sorted(set(lead.tolist())):
        at = kernels.asarray(np.flatnonzero(lead == offset))
        result[:, at] = _eigen_row(kernels, flat[:, at], min(offset, size))
    return result.reshape(v.shape[:-1])


def _eigen_row(kernels: Kernels, v: Array, start: int) -> Array:
    """One alignment class of `_eigen_sum`: `v` [N, rows, T], aligned from element `start` on."""
    add, size = kernels.ieee.add, v.shape[-1]
    packets, pairs = (size - start) // 4, (size - start) // 8

    def packet(k: int) -> Array:
        return v[..., start + 4 * k : start + 4 * k + 4]

    if packets == 0:
        return _sequential_sum(kernels, v)
    lanes = packet(0)
    if packets > 1:
        odd = packet(1)
        for k in range(1, pairs):
            lanes, odd = add(lanes, packet(2 * k)), add(odd, packet(2 * k + 1))
        lanes = add(lanes, odd)
        if packets > 2 * pairs:
            lanes = add(lanes, packet(2 * pairs))
    total = add(add(lanes[..., 0], lanes[..., 2]), add(lanes[..., 1], lanes[..., 3]))
    for k in (*range(start), *range(start + 4 * packets, size)):
        total = add(total, v[..., k])
    return total
