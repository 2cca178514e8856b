"""What graphs of bounds are made of: 8-bit weights, folded biases, the factor and the zero point of
a rounding."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.ops import Dense, Requantize

IntArray = npt.NDArray[np.int64]
# 8-bit weights and their zero point, [] or one for each column.
Codes = tuple[npt.NDArray[Any], IntArray]


class Inexpressible(Exception):
    """The graph cannot express an op with these parameters."""


def stored(weight: IntArray, columns: bool = False) -> Codes:
    """Weights as int8, or as uint8 with a zero point, where that helps with one for each of the
    `columns`."""
    low, high = int(weight.min(initial=0)), int(weight.max(initial=0))
    if low >= -128 and high <= 127:
        return weight.astype(np.int8), np.zeros((), np.int64)
    axis = 0 if columns and high - low > 255 else None
    least, most = weight.min(axis=axis, initial=0), weight.max(axis=axis, initial=0)
    if (most - least).max() > 255 or least.min() < -255:
        raise Inexpressible
    return (weight - least).astype(np.uint8), -np.asarray(least)


def doubled(weight: IntArray) -> IntArray:
    """Weights [A, B, ...] from both ends to both ends: [2 A, 2 B, ...]."""
    positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
    rows = [np.concatenate(parts, axis=1) for parts in ((positive, negative), (negative, positive))]
    return np.concatenate(rows, axis=0)


def transposition(
    index: IntArray, shape: tuple[int, ...], size: int
) -> tuple[list[int], list[int]] | None:
    """Where `index` only exchanges axes of a source of that size: these axes, and their order in
    the result."""
    axes: list[
        tuple[int, int]
    ] = []  # length and step of the result's, neighbours joined where they step alike
    for k, n in enumerate(shape):
        if n > 1:
            step = int(index[prod(shape[k + 1 :])] - index[0])
            if axes and axes[-1][1] == n * step:
                axes[-1] = axes[-1][0] * n, step
            else:
                axes.append((n, step))
    order = sorted(range(len(axes)), key=lambda k: -axes[k][1])
    split = [axes[k][0] for k in order]
    places = [order.index(k) for k in range(len(axes))]
    if prod(split) != size or not np.array_equal(
        np.arange(size).reshape(split).transpose(places).reshape(-1), index
    ):
        return None
    return split, places


def dense_bias(op: Dense) -> IntArray:
    """The bias [M] of a product with one matrix."""
    if op.weight.ndim != 2 or op.bias.size not in (1, op.bias.shape[-1] if op.bias.ndim else 1):
        raise Inexpressible
    return np.broadcast_to(op.bias.reshape(-1), op.weight.shape[1:])


def folded(weight: IntArray, bias: IntArray, low: int) -> IntArray:
    """The bias [M] for codes above `low`, with weights [K, M]."""
    folded: IntArray = bias + low * weight.sum(axis=0)
    if int((255 * np.abs(weight).sum(axis=0) + np.abs(folded)).max(initial=0)) >= 2**31:
        raise Inexpressible
    return folded


def scale_of(rounding: Requantize, shape: tuple[int, ...], axis: int) -> npt.NDArray[np.float32]:
    """The factor of a rounding that only multiplies: [] or one along `axis`."""
    steps = rounding.program.steps
    if rounding.program.ordinal or len(steps) != 1 or steps[0].kind != "mul":
        raise Inexpressible
    factor = steps[0].operand
    if not (np.isfinite(factor) & (factor >= 0)).all():
        raise Inexpressible
    if factor.size == 1:
        return factor.reshape(())
    place = len(factor.shape) - len(shape) + axis
    if place < 0 or factor.size != factor.shape[place]:
        raise Inexpressible
    return factor.reshape(-1)


def twice(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A factor, or one for each element, for both ends."""
    return np.tile(scale, 2) if scale.ndim else scale


def output_zero(rounding: Requantize) -> int:
    """The zero point of a rounding's codes."""
    if rounding.zero_point.size != 1 or rounding.high - rounding.low > 255:
        raise Inexpressible
    zero = int(rounding.zero_point.reshape(())) - rounding.low
    if not 0 <= zero <= 255:
        raise Inexpressible
    return zero
