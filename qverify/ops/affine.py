"""Integer weighted sums: dense layers and convolutions, zero points already folded into weights and bias.

Interval rule (both ops): with centre m = lower + upper and radius r = upper - lower, the ends of W x + b over the box
are (W m -+ |W| r) / 2 + b. Sound because each product w x lies in (w m -+ |w| r) / 2; exact per output because the
inputs move independently; W m and |W| r have equal parity, so the halving is exact.

Exact arithmetic: integers are multiplied as float32 where sum |w| * 2 max|x| < 2**24, else as float64 (below 2**53),
so no product and no partial sum is ever rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels
from qverify.ops.base import INT32_MAX, INT32_MIN, AbstractOp, Interval, Type

IntArray = npt.NDArray[np.int64]


def _accumulator_range(weight: IntArray, bias: IntArray, x: Type) -> tuple[int, int]:
    """Least and largest accumulator for `weight` [K, M] (reduced over K) and `bias` [M], over x in its type's range."""
    positive, negative = np.maximum(weight, 0).sum(axis=-2), np.minimum(weight, 0).sum(axis=-2)
    lower = positive * x.low + negative * x.high + bias
    upper = positive * x.high + negative * x.low + bias
    return int(lower.min(initial=0)), int(upper.max(initial=0))


def _checked(shape: tuple[int, ...], low: int, high: int) -> Type:
    if low < INT32_MIN or high > INT32_MAX:
        raise ValueError(f"the accumulator can reach [{low}, {high}], outside int32: the runtime would wrap around")
    return Type(shape, low, high)


def _float_weights(weight: IntArray, sums: Any, x_max: int) -> npt.NDArray[Any]:
    """`weight` in the narrowest float type in which every partial sum of w * (lower + upper) is exact."""
    reach = 2 * int(np.max(sums, initial=0)) * x_max
    if reach >= 2**53:
        raise ValueError(f"a partial sum can reach {reach}, beyond exact float64")
    return weight.astype(np.float32 if reach < 2**24 else np.float64)


@dataclass(frozen=True, eq=False)
class Dense(AbstractOp):
    """acc[..., m] = sum_k x[..., k] * weight[k, m] + bias[m].

    `weight` [*batch, K, M] and `bias` (broadcastable to the result) are int64 with zero points folded in; `x_max` is
    the largest |x|. Source: ONNX MatMulInteger-10, QLinearMatMul-21, com.microsoft QGemm-1 before requantization.
    """

    weight: IntArray
    bias: IntArray
    x_max: int
    _weight: Array = field(init=False, repr=False)
    _absolute: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        magnitude = np.abs(self.weight)
        exact = _float_weights(self.weight, magnitude.sum(axis=-2), self.x_max)
        object.__setattr__(self, "_weight", exact)
        object.__setattr__(self, "_absolute", np.abs(exact))

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if not x.shape or x.shape[-1] != self.weight.shape[-2]:
            raise ValueError(f"a weight {list(self.weight.shape)} does not fit an input {list(x.shape)}")
        if max(abs(x.low), abs(x.high)) > self.x_max:
            raise ValueError(f"x_max {self.x_max} does not cover [{x.low}, {x.high}]")
        batch = np.broadcast_shapes(x.shape[:-2], self.weight.shape[:-2])
        shape = (*batch, *x.shape[-2:-1], self.weight.shape[-1])
        if np.broadcast_shapes(shape, self.bias.shape) != shape:
            raise ValueError(f"a bias {list(self.bias.shape)} does not fit an output {list(shape)}")
        low, high = _accumulator_range(self.weight, np.zeros(1, np.int64), x)
        return _checked(shape, low + int(self.bias.min(initial=0)), high + int(self.bias.max(initial=0)))

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        acc = kernels.matmul(xs[0], self._weight).astype(kernels.xp.int64) + self.bias
        return acc.astype(kernels.xp.int32)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        lower, upper = boxes[0]
        centre = kernels.matmul(lower + upper, self._weight)
        radius = kernels.matmul(upper - lower, self._absolute)
        return _ends(kernels, centre, radius, self.bias)

    def gradient(self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array) -> tuple[Array, ...]:
        weight = self._weight.astype(kernels.xp.float32)
        grad = kernels.xp.matmul(upstream, kernels.xp.swapaxes(weight, -1, -2))
        while grad.ndim > xs[0].ndim:  # the weight had batch axes that the input lacked
            grad = grad.sum(axis=1)
        return (grad,)


def _ends(kernels: Kernels, centre: Array, radius: Array, bias: Array) -> Interval:
    """(centre -+ radius) / 2 + bias, exactly: float64 holds the integers below 2**53 that centre and radius are."""
    xp = kernels.xp
    centre, radius = centre.astype(xp.float64), radius.astype(xp.float64)
    lower = ((centre - radius) * 0.5 + bias).astype(xp.int32)
    upper = ((centre + radius) * 0.5 + bias).astype(xp.int32)
    return lower, upper


@dataclass(frozen=True, eq=False)
class Conv(AbstractOp):
    """A convolution of integer codes [B, C, *spatial] -> accumulators [B, M, *output], any number of spatial axes.

    `weight` [M, C/groups, *kernel] int64 (zero point subtracted), `bias` [M] int64 (input zero point folded in),
    `pads` as ONNX orders them (all begins, all ends); padding holds `pad_value`, the input's zero point, so that it
    contributes nothing. Source: ONNX QLinearConv-10, ConvInteger-10 before requantization.
    """

    weight: IntArray
    bias: IntArray
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    pad_value: int
    x_max: int
    _weight: Array = field(init=False, repr=False)  # [groups, C/groups*prod(kernel), M/groups]
    _absolute: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        flat = self.weight.reshape(self.groups, self.weight.shape[0] // self.groups, -1).swapaxes(1, 2)
        exact = np.ascontiguousarray(_float_weights(flat, np.abs(flat).sum(axis=1), self.x_max))
        object.__setattr__(self, "_weight", exact)
        object.__setattr__(self, "_absolute", np.abs(exact))

    def _output_shape(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        rank = len(spatial)
        kernel = self.weight.shape[2:]
        return tuple(
            (spatial[i] + self.pads[i] + self.pads[rank + i] - ((kernel[i] - 1) * self.dilations[i] + 1))
            // self.strides[i]
            + 1
            for i in range(rank)
        )

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if len(x.shape) != self.weight.ndim or x.shape[1] != self.weight.shape[1] * self.groups:
            raise ValueError(f"a weight {list(self.weight.shape)} does not fit an input {list(x.shape)}")
        if max(abs(x.low), abs(x.high), abs(self.pad_value)) > self.x_max:
            raise ValueError(f"x_max {self.x_max} does not cover [{x.low}, {x.high}]")
        output = self._output_shape(x.shape[2:])
        if min(output, default=1) <= 0:
            raise ValueError(f"the kernel is larger than the padded input {list(x.shape)}")
        ends = Type(x.shape, min(x.low, self.pad_value), max(x.high, self.pad_value))
        flat = self.weight.reshape(self.weight.shape[0], -1).T
        low, high = _accumulator_range(flat, self.bias, ends)
        return _checked((x.shape[0], self.weight.shape[0], *output), low, high)

    def _columns(self, kernels: Kernels, x: Array, fill: int) -> tuple[Array, tuple[int, ...]]:
        """im2col: [N, groups, positions, C/groups*prod(kernel)] in the weights' dtype, and the output's spatial shape."""
        xp = kernels.xp
        rank = len(self.strides)
        x = x.astype(self._weight.dtype)
        if any(self.pads):
            width = [(0, 0), (0, 0), *((self.pads[i], self.pads[rank + i]) for i in range(rank))]
            x = xp.pad(x, width, constant_values=fill)
        kernel = self.weight.shape[2:]
        view = kernels.windows(xp.ascontiguousarray(x), kernel, self.strides, self.dilations)
        n, channels = view.shape[:2]
        output = view.shape[2 : 2 + rank]
        view = view.reshape(n, self.groups, channels // self.groups, *view.shape[2:])
        axes = (0, 1, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
        columns = view.transpose(axes).reshape(n, self.groups, int(np.prod(output)), -1)
        return columns, output

    def _linear(self, kernels: Kernels, x: Array, weight: Array, fill: int) -> Array:
        n, batch = x.shape[:2]
        columns, output = self._columns(kernels, x.reshape(n * batch, *x.shape[2:]), fill)
        acc = kernels.xp.matmul(columns, weight)  # [N * B, groups, positions, M/groups]
        return acc.swapaxes(2, 3).reshape(n, batch, -1, *output)

    def _bias(self) -> Array:
        return self.bias.reshape(-1, *([1] * len(self.strides)))

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        acc = self._linear(kernels, xs[0], self._weight, self.pad_value).astype(kernels.xp.int64) + self._bias()
        return acc.astype(kernels.xp.int32)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        lower, upper = boxes[0]
        # Padding is the constant pad_value: its lower + upper is 2 * pad_value, its radius 0.
        centre = self._linear(kernels, lower + upper, self._weight, 2 * self.pad_value)
        radius = self._linear(kernels, upper - lower, self._absolute, 0)
        return _ends(kernels, centre, radius, self._bias())

    def gradient(self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array) -> tuple[Array, ...]:
        xp = kernels.xp
        samples, batch, channels, *spatial = xs[0].shape
        rank, n = len(spatial), samples * batch
        kernel, output = self.weight.shape[2:], upstream.shape[3:]
        grad_out = upstream.reshape(n, self.groups, -1, int(np.prod(output))).swapaxes(2, 3)
        columns = xp.matmul(grad_out, xp.swapaxes(self._weight.astype(xp.float32), 1, 2))
        columns = columns.reshape(n, self.groups, *output, channels // self.groups, *kernel)
        padded = [spatial[i] + self.pads[i] + self.pads[rank + i] for i in range(rank)]
        grad = xp.zeros((n, self.groups, channels // self.groups, *padded), dtype=xp.float32)
        for tap in np.ndindex(*kernel):
            part = columns[(..., *tap)]  # [n, groups, *output, C/groups]
            where = tuple(
                slice(
                    tap[i] * self.dilations[i],
                    tap[i] * self.dilations[i] + (output[i] - 1) * self.strides[i] + 1,
                    self.strides[i],
                )
                for i in range(rank)
            )
            grad[(slice(None), slice(None), slice(None), *where)] += xp.moveaxis(part, -1, 2)
        grad = grad.reshape(n, channels, *padded)
        inner = tuple(slice(self.pads[i], self.pads[i] + spatial[i]) for i in range(rank))
        return (grad[(slice(None), slice(None), *inner)].reshape(xs[0].shape),)
