"""Reductions over the last axis: the maximum of codes, and the float32 mean of dequantized codes.

Pooling windows are gathered by a `Layout` first, so these ops know nothing of strides and pads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels
from qverify.ops.base import AbstractOp, Interval, Type
from qverify.ops.requantize import ordinals

LARGEST = 0x7F7FFFFF  # the ordinal of the largest float32; beyond it are infinity and NaN


@dataclass(frozen=True, eq=False)
class Max(AbstractOp):
    """The maximum over the last axis. Sound and exact because max is increasing in every argument."""

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if not x.shape or x.shape[-1] == 0:
            raise ValueError("the maximum of nothing")
        return Type(x.shape[:-1], x.low, x.high)

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        return xs[0].max(axis=-1)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        return boxes[0][0].max(axis=-1), boxes[0][1].max(axis=-1)

    def gradient(self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array) -> tuple[Array, ...]:
        xp = kernels.xp
        first = xs[0].argmax(axis=-1)[..., None] == xp.arange(xs[0].shape[-1])
        return (first * upstream[..., None],)


@dataclass(frozen=True, eq=False)
class Mean(AbstractOp):
    """The float32 mean over the last axis of values[x - low], as an ordinal (see `requantize.ordinals`).

    `values` [K] float32 must be non-decreasing; `divisor` float32 broadcasts to the result. `order` is the order of the
    float32 additions, which decides the rounding: "sequential" (onnxruntime's QLinearAveragePool: row by row through
    the window) or "eigen" (ReduceMean over trailing axes: Eigen's linear vectorized reduction with four lanes, where
    a row that does not begin at a multiple of four elements is first brought to one).

    Sound because float32 addition and division by a positive number are monotone in each argument, in any fixed order.
    """

    values: npt.NDArray[np.float32]
    low: int
    divisor: npt.NDArray[np.float32]
    order: str

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if x.low < self.low or x.high >= self.low + len(self.values):
            raise ValueError(f"a table of {len(self.values)} entries from {self.low} misses [{x.low}, {x.high}]")
        if not (np.diff(self.values) >= 0).all() or not (self.divisor > 0).all():
            raise ValueError("a mean needs non-decreasing values and a positive divisor")
        if not x.shape or x.shape[-1] == 0 or np.broadcast_shapes(self.divisor.shape, x.shape[:-1]) != x.shape[:-1]:
            raise ValueError(f"a mean with divisors {list(self.divisor.shape)} does not fit {list(x.shape)}")
        if float(np.abs(self.values).max()) * x.shape[-1] > 3e38:
            raise ValueError("the sum before the mean can overflow float32")
        if self.order not in ("sequential", "eigen"):
            raise ValueError(f"no summation order '{self.order}'")
        return Type(x.shape[:-1], -LARGEST, LARGEST)

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        v = kernels.xp.take(self.values, xs[0] - self.low)
        total = _sequential_sum(v) if self.order == "sequential" else _eigen_sum(kernels, v)
        return ordinals(kernels, total / self.divisor)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        return self.run(kernels, boxes[0][0]), self.run(kernels, boxes[0][1])

    def gradient(self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array) -> tuple[Array, ...]:
        xp = kernels.xp
        slope = float(self.values[-1] - self.values[0]) / max(len(self.values) - 1, 1)
        share = upstream * slope / kernels.asarray(self.divisor)
        return (xp.broadcast_to(share[..., None], xs[0].shape).astype(xp.float32),)


def _sequential_sum(v: Array) -> Array:
    """((v0 + v1) + v2) + ... in float32."""
    total = v[..., 0]
    for k in range(1, v.shape[-1]):
        total = total + v[..., k]
    return total


def _eigen_sum(kernels: Kernels, v: Array) -> Array:
    """Eigen 3's redux with packets of four floats over each row of a contiguous float32 matrix [rows, T]."""
    xp = kernels.xp
    size = v.shape[-1]
    rows = int(np.prod(v.shape[1:-1], dtype=np.int64))
    flat = v.reshape(v.shape[0], rows, size)
    lead = (-np.arange(rows) * size) % 4  # elements of a row before the next 16-byte boundary
    result = xp.empty((v.shape[0], rows), dtype=xp.float32)
    for offset in sorted(set(lead.tolist())):
        at = kernels.asarray(np.flatnonzero(lead == offset))
        result[:, at] = _eigen_row(flat[:, at], min(offset, size))
    return result.reshape(v.shape[:-1])


def _eigen_row(v: Array, start: int) -> Array:
    """One alignment class of `_eigen_sum`: `v` [N, rows, T], the first aligned element is `start`."""
    size = v.shape[-1]
    packets, pairs = (size - start) // 4, (size - start) // 8

    def packet(k: int) -> Array:
        return v[..., start + 4 * k : start + 4 * k + 4]

    if packets == 0:
        return _sequential_sum(v)
    lanes = packet(0)
    if packets > 1:
        odd = packet(1)
        for k in range(1, pairs):
            lanes, odd = lanes + packet(2 * k), odd + packet(2 * k + 1)
        lanes = lanes + odd
        if packets > 2 * pairs:
            lanes = lanes + packet(2 * pairs)
    total = (lanes[..., 0] + lanes[..., 2]) + (lanes[..., 1] + lanes[..., 3])
    for k in (*range(start), *range(start + 4 * packets, size)):
        total = total + v[..., k]
    return total
