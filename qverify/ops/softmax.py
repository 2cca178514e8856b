"""com.microsoft QLinearSoftmax: codes to codes, over the last axis."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from qverify.kernels import Array, Kernels
from qverify.ops.base import AbstractOp
from qverify.ops.types import Interval, Type, Unfit

LONGEST = 60_000  # up to here float32(log(x)) is what glibc's logf gives for every row length


@dataclass(frozen=True, eq=False)
class Softmax(AbstractOp):
    """onnxruntime's QLinearSoftmax-1 over the last axis, as measured bit for bit (version 1.32).

    A table holds float32(exp((k - 255 + headroom / scale) * scale)) for k = 0..255, in float64 but
    for the headroom, a float32 logarithm of a float32 quotient; every code is shifted so that the
    row's maximum meets entry 255; the sum adds float32 from left to right; q_i = rint(t_i * floor(1
    / y_scale) / sum t) + zero_point in float64, clipped to the type. (Up to onnxruntime 1.26 the
    quotient was float32, which rounds it onto a tie in a few of ten million.)

    Interval: t_i lies between the entries for (lower_i, largest possible maximum) and (upper_i,
    least possible maximum), and so does every term of the sum. Sound because addition,
    multiplication, division and rounding are monotone in each argument, in float32 and in float64:
    the least numerator over the largest sum bounds q_i from below, and conversely. The sum is never
    below entry 255, the term of the row's maximum (all least terms may underflow to 0). Not tight
    (the numerator is also a term of the sum), but a point stays a point, since lower and upper
    terms coincide.
    """

    scale: np.float32
    y_scale: np.float32
    low: int  # of the input and output type
    high: int
    zero_point: int
    length: int  # of the last axis
    _table: Array = field(init=False, repr=False)  # [256] float32

    def __post_init__(self) -> None:
        room = np.float32(math.log(np.finfo(np.float32).max / np.float32(self.length)))
        headroom = max(0.0, float(room) - 5.0) / float(self.scale)
        entries = [math.exp((k - 255 + headroom) * float(self.scale)) for k in range(256)]
        object.__setattr__(self, "_table", np.array(entries, np.float32))

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if x.low < self.low or x.high > self.high or self.high - self.low != 255:
            raise Unfit(
                f"softmax of 8-bit codes in [{self.low}, {self.high}] got [{x.low}, {x.high}]"
            )
        if x.shape[-1:] != (self.length,):
            raise Unfit(f"softmax over {self.length} elements got {list(x.shape)}")
        if self.length > LONGEST or 1 / float(self.y_scale) > 3e38:
            raise Unfit(
                f"softmax over {self.length} elements with an output scale {self.y_scale} is not "
                "supported"
            )
        return Type(x.shape, self.low, self.high)

    def _terms(self, kernels: Kernels, x: Array, top: Array) -> Array:
        """The table's entries for codes `x` in a row with maximum `top`, clipped to the table."""
        xp = kernels.xp
        return xp.take(self._table, xp.clip(x - top + 255, 0, 255))

    def _quotient(self, kernels: Kernels, terms: Array, total: Array) -> Array:
        xp = kernels.xp
        factor = float(np.floor(np.float32(1) / self.y_scale))
        q = xp.rint(terms.astype(xp.float64) * factor / total.astype(xp.float64))
        return (
            xp.clip(q, self.low - self.zero_point, self.high - self.zero_point).astype(xp.int32)
            + self.zero_point
        )

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        terms = self._terms(kernels, xs[0], xs[0].max(axis=-1, keepdims=True))
        return self._quotient(kernels, terms, _running_sum(kernels, terms))

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        lower, upper = boxes[0]
        least_top, most_top = lower.max(axis=-1, keepdims=True), upper.max(axis=-1, keepdims=True)
        least = self._terms(kernels, lower, most_top)
        most = self._terms(kernels, upper, least_top)
        return (
            self._quotient(kernels, least, _running_sum(kernels, most)),
            self._quotient(
                kernels, most, kernels.xp.maximum(_running_sum(kernels, least), self._table[255])
            ),
        )

    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        xp = kernels.xp
        z = (xs[0] - xs[0].max(axis=-1, keepdims=True)).astype(xp.float32) * xp.float32(self.scale)
        p = xp.exp(z)
        p = p / p.sum(axis=-1, keepdims=True)
        inner = (upstream * p).sum(axis=-1, keepdims=True)
        return (p * (upstream - inner) * xp.float32(self.scale / self.y_scale),)


def _running_sum(kernels: Kernels, terms: Array) -> Array:
    """Sum over the last axis, left to right in float32, kept as an axis of one."""
    total = terms[..., :1]
    for k in range(1, terms.shape[-1]):
        total = kernels.ieee.add(total, terms[..., k : k + 1])
    return total
