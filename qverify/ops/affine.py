"""Integer weighted sums: dense layers and convolutions, zero points folded into weights and bias.

Interval rule (both ops): with centre c = lower + upper and radius r = upper - lower, W x + b lies
between (W c - |W| r) / 2 + b and (W c + |W| r) / 2 + b over the box. Sound because each product w x
lies in (w c -+ |w| r) / 2; exact per output because the inputs move independently; W c and |W| r
have equal parity, so the halving is exact. The centre is shifted by the middle of the input's type
before it is multiplied (and W times the shift is added back), which halves its magnitude.

Exact arithmetic on fast float units: the products are cut along K into pieces for which sum |w| |x|
stays below 2**24, so that float32 represents every partial sum, in whatever order it is added;
pieces are added up as integers. Weights too large for that are multiplied in float64 (below 2**53).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels
from qverify.ops.base import AbstractOp, unbroadcast
from qverify.ops.relax import GUIDE, LIMIT, IntervalRelaxation, Relaxation, TooLarge, exact
from qverify.ops.types import INT32_MAX, INT32_MIN, Interval, Type, Unfit, joint_shape

IntArray = npt.NDArray[np.int64]


def _accumulator_range(weight: IntArray, bias: IntArray, x: Type) -> tuple[int, int]:
    """Least and largest accumulator over x in its type's range.

    `weight` [..., K, M] is reduced over K, `bias` broadcasts to the result.
    """
    positive = np.maximum(weight, 0).sum(axis=-2, keepdims=True)
    negative = np.minimum(weight, 0).sum(axis=-2, keepdims=True)
    lower = positive * x.low + negative * x.high + bias
    upper = positive * x.high + negative * x.low + bias
    return int(lower.min(initial=0)), int(upper.max(initial=0))


def _checked(shape: tuple[int, ...], low: int, high: int) -> Type:
    if low < INT32_MIN or high > INT32_MAX:
        raise Unfit(
            f"the accumulator can reach [{low}, {high}], outside int32: the runtime would wrap "
            "around"
        )
    return Type(shape, low, high)


@dataclass(frozen=True, eq=False)
class ExactProduct:
    """x -> x @ weight for integers |x| <= reach, without any rounding.

    `pieces` are float weights for slices of K.
    """

    stops: tuple[int, ...]  # where the pieces end along K
    pieces: tuple[Array, ...]  # [..., k, M], float32 or float64
    reach: int  # the largest magnitude of a result

    @staticmethod
    def make(weight: IntArray, reach: int) -> ExactProduct:
        """Cut `weight` [..., K, M] (int64) along K for inputs of magnitude up to `reach`."""
        reach = max(reach, 1)
        size = np.abs(weight).reshape(-1, *weight.shape[-2:])
        total = int(size.sum(axis=1).max(initial=0)) * reach
        if total >= 2**53:
            raise Unfit(f"a partial sum can reach {total}, beyond exact float64")
        if int(size.max(initial=0)) * reach >= 2**24:
            return ExactProduct((weight.shape[-2],), (weight.astype(np.float64),), total)
        stops: list[int] = []
        running = np.zeros((size.shape[0], size.shape[2]), np.int64)
        for k in range(size.shape[1]):
            running += size[:, k]
            if int(running.max(initial=0)) * reach >= 2**24:
                stops.append(k)
                running = size[:, k].copy()
        edges = [0, *stops, size.shape[1]]
        pieces = tuple(
            np.ascontiguousarray(weight[..., a:b, :].astype(np.float32)) for a, b in pairwise(edges)
        )
        return ExactProduct(tuple(edges[1:]), pieces, total)

    def __call__(self, kernels: Kernels, x: Array) -> Array:
        """`x` [..., K] (integers of any numeric type) -> integers [..., M].

        They are int32 where that holds them, else int64.
        """
        integer = kernels.xp.int64 if self.reach >= 2**31 else kernels.xp.int32
        result, start = None, 0
        for stop, piece in zip(self.stops, self.pieces, strict=True):
            part = kernels.matmul(x[..., start:stop], piece).astype(integer)
            result = part if result is None else result + part
            start = stop
        return result


def _narrowest(values: IntArray, *products: ExactProduct) -> Array:
    """`values` as int32, unless their sum with the products' results could leave it."""
    reach = sum(p.reach for p in products) + int(np.abs(values).max(initial=0))
    return values if reach >= 2**31 else values.astype(np.int32)


def _halved(kernels: Kernels, centre: Array, radius: Array) -> Interval:
    """(centre -+ radius) / 2 for integers of equal parity, exactly: an arithmetic shift."""
    integer = kernels.xp.int32
    return ((centre - radius) >> 1).astype(integer), ((centre + radius) >> 1).astype(integer)


def _reaches(x: Type, low: int, high: int) -> None:
    if x.low < low or x.high > high:
        raise Unfit(f"an input in [{x.low}, {x.high}] leaves the declared [{low}, {high}]")


@dataclass(frozen=True, eq=False)
class Dense(AbstractOp):
    """acc[..., m] = sum_k x[..., k] * weight[k, m] + bias[m].

    `weight` [*batch, K, M] and `bias` (broadcastable to the result) are int64 with zero points
    folded in; x lies in [x_low, x_high]. Source: ONNX MatMulInteger-10, QLinearMatMul-21,
    com.microsoft QGemm-1 before requantization.
    """

    weight: IntArray
    bias: IntArray
    x_low: int
    x_high: int
    _product: ExactProduct = field(init=False, repr=False)
    _absolute: ExactProduct = field(init=False, repr=False)
    # Bias plus half of W times the centre's shift.
    _centre_bias: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shift, width = self.x_low + self.x_high, self.x_high - self.x_low
        object.__setattr__(
            self,
            "_product",
            ExactProduct.make(self.weight, max(abs(self.x_low), abs(self.x_high), width)),
        )
        object.__setattr__(self, "_absolute", ExactProduct.make(np.abs(self.weight), width))
        sums = self.weight.sum(axis=-2, keepdims=self.weight.ndim > 2)
        centre_bias = _narrowest(2 * self.bias + shift * sums, self._product, self._absolute)
        object.__setattr__(self, "_centre_bias", centre_bias)

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if not x.shape or x.shape[-1] != self.weight.shape[-2]:
            raise Unfit(f"a weight {list(self.weight.shape)} does not fit an input {list(x.shape)}")
        _reaches(x, self.x_low, self.x_high)
        if len(x.shape) == 1 and self.weight.ndim > 2:
            raise Unfit(f"a stack of weights {list(self.weight.shape)} does not fit a vector")
        batch = joint_shape(x.shape[:-2], self.weight.shape[:-2])
        shape = (*batch, *x.shape[-2:-1], self.weight.shape[-1])
        if joint_shape(shape, self.bias.shape) != shape:
            raise Unfit(f"a bias {list(self.bias.shape)} does not fit an output {list(shape)}")
        return _checked(shape, *_accumulator_range(self.weight, self.bias, x))

    def _stacked(self, x: Array) -> Array:
        """`x` with the axes of the weight that it lacks, so that none meets the batch axis."""
        lacking = self.weight.ndim - (x.ndim - 1) if self.weight.ndim > 2 else 0
        return x.reshape(x.shape[0], *([1] * lacking), *x.shape[1:]) if lacking > 0 else x

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        return (self._product(kernels, self._stacked(xs[0])) + self.bias).astype(kernels.xp.int32)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        lower, upper = (self._stacked(end) for end in boxes[0])
        centre = self._product(kernels, lower + upper - (self.x_low + self.x_high))
        radius = self._absolute(kernels, upper - lower)
        return _halved(kernels, centre + self._centre_bias, radius)

    def relaxation(self, kernels: Kernels, *types: Type) -> Relaxation:
        if self.weight.ndim > 2:
            return IntervalRelaxation()
        weight = kernels.asarray(self.weight.T.astype(np.float64))
        column = float(np.abs(self.weight).sum(axis=1).max(initial=0))
        return DenseRelaxation(weight, weight.astype(GUIDE), _biases(kernels, self.bias), column)

    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        weight = kernels.asarray(self.weight, dtype=kernels.xp.float32)
        grad = kernels.xp.matmul(upstream, kernels.xp.swapaxes(weight, -1, -2))
        return (unbroadcast(grad, xs[0]),)


@dataclass(frozen=True, eq=False)
class Conv(AbstractOp):
    """A convolution of integer codes, over any number of spatial axes.

    [B, C, *spatial] -> accumulators [B, M, *output]. `weight` [M, C/groups, *kernel] int64 (zero
    point subtracted), `bias` [M] int64 (input zero point folded in), `pads` as ONNX orders them
    (all begins, all ends); padding holds `pad_value`, the input's zero point, so that it
    contributes nothing. Source: ONNX QLinearConv-10, ConvInteger-10 before requantization.
    """

    weight: IntArray
    bias: IntArray
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    pad_value: int
    x_low: int
    x_high: int
    # Weights [groups, C/groups*prod(kernel), M/groups].
    _product: ExactProduct = field(init=False, repr=False)
    _absolute: ExactProduct = field(init=False, repr=False)
    _centre_bias: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        flat = self.weight.reshape(self.groups, self.weight.shape[0] // self.groups, -1).swapaxes(
            1, 2
        )
        shift, width = self.x_low + self.x_high, self.x_high - self.x_low
        object.__setattr__(
            self, "_product", ExactProduct.make(flat, max(abs(self.x_low), abs(self.x_high), width))
        )
        object.__setattr__(self, "_absolute", ExactProduct.make(np.abs(flat), width))
        object.__setattr__(
            self,
            "_centre_bias",
            self._per_channel(2 * self.bias + shift * flat.sum(axis=1).reshape(-1)),
        )

    def _per_channel(self, values: IntArray) -> IntArray:
        return values.reshape(-1, *([1] * len(self.strides)))

    def _output_shape(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        rank = len(spatial)
        kernel = self.weight.shape[2:]
        return tuple(
            (
                spatial[i]
                + self.pads[i]
                + self.pads[rank + i]
                - ((kernel[i] - 1) * self.dilations[i] + 1)
            )
            // self.strides[i]
            + 1
            for i in range(rank)
        )

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        if len(x.shape) != self.weight.ndim or x.shape[1] != self.weight.shape[1] * self.groups:
            raise Unfit(f"a weight {list(self.weight.shape)} does not fit an input {list(x.shape)}")
        padded = Type(x.shape, min(x.low, self.pad_value), max(x.high, self.pad_value))
        _reaches(padded, self.x_low, self.x_high)
        output = self._output_shape(x.shape[2:])
        if min(output, default=1) <= 0:
            raise Unfit(f"the kernel is larger than the padded input {list(x.shape)}")
        flat = self.weight.reshape(self.weight.shape[0], -1).T
        low, high = _accumulator_range(flat, self.bias, padded)
        return _checked((x.shape[0], self.weight.shape[0], *output), low, high)

    def _columns(self, kernels: Kernels, x: Array, fill: int) -> tuple[Array, tuple[int, ...]]:
        """im2col in float32, and the output's shape.

        The columns are [N, groups, positions, C/groups*prod(kernel)].
        """
        xp = kernels.xp
        rank = len(self.strides)
        x = kernels.as_float32(x)  # |x| < 2**24
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

    def _linear(self, kernels: Kernels, x: Array, product: ExactProduct, fill: int) -> Array:
        n, batch = x.shape[:2]
        columns, output = self._columns(kernels, x.reshape(n * batch, *x.shape[2:]), fill)
        acc = product(kernels, columns)  # [N * B, groups, positions, M/groups]
        return acc.swapaxes(2, 3).reshape(n, batch, -1, *output)

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        acc = self._linear(kernels, xs[0], self._product, self.pad_value)
        return (acc + self._per_channel(self.bias)).astype(kernels.xp.int32)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        lower, upper = boxes[0]
        # padding is the constant pad_value: centre 2 * pad_value, radius 0
        shift = self.x_low + self.x_high
        centre = self._linear(
            kernels, lower + upper - shift, self._product, 2 * self.pad_value - shift
        )
        radius = self._linear(kernels, upper - lower, self._absolute, 0)
        return _halved(kernels, centre + self._centre_bias, radius)

    def relaxation(self, kernels: Kernels, *types: Type) -> Relaxation:
        flat = self.weight.reshape(self.groups, self.weight.shape[0] // self.groups, -1)
        # An input element meets each output channel of its group at most once per tap.
        column = float(np.abs(flat).sum(axis=1).sum(axis=1).max(initial=0))
        weight = kernels.asarray(flat.astype(np.float64))
        return ConvRelaxation(
            self, weight, weight.astype(GUIDE), _biases(kernels, self.bias), column
        )

    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        xp = kernels.xp
        flat = self.weight.reshape(self.groups, self.weight.shape[0] // self.groups, -1)
        weight = kernels.asarray(flat, dtype=xp.float32)
        return (transposed(self, kernels, upstream, weight, tuple(xs[0].shape))[0],)


def transposed(
    op: Conv, kernels: Kernels, upstream: Array, weight: Array, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """The transposed convolution, in `weight`'s float type.

    upstream [N, B, M, *output] -> [N, B, C, *spatial] of `shape`, and the same with the padding
    kept [N * B, C, *padded].
    """
    xp = kernels.xp
    samples, batch, channels, *spatial = shape
    rank, n = len(spatial), samples * batch
    kernel, output = op.weight.shape[2:], upstream.shape[3:]
    grad_out = upstream.reshape(n, op.groups, -1, int(np.prod(output))).swapaxes(2, 3)
    columns = xp.matmul(grad_out, weight)
    columns = columns.reshape(n, op.groups, *output, channels // op.groups, *kernel)
    padded = tuple(spatial[i] + op.pads[i] + op.pads[rank + i] for i in range(rank))
    grad = kernels.fold(columns, output, padded, op.strides, op.dilations)
    grad = grad.reshape(n, channels, *padded)
    inner = tuple(slice(op.pads[i], op.pads[i] + spatial[i]) for i in range(rank))
    return grad[(slice(None), slice(None), *inner)].reshape(shape), grad


def _biases(kernels: Kernels, bias: IntArray) -> tuple[Array, Array]:
    """A bias in int64, and in the guide's type."""
    return kernels.asarray(bias.astype(np.int64)), kernels.asarray(bias.astype(GUIDE))


@dataclass(frozen=True, eq=False)
class DenseRelaxation(Relaxation):
    """weights . (x W + b) = (weights Wᵀ) . x + weights . b.

    Exact: float64 holds every partial sum (checked).
    """

    weight: Array  # [M, K] float64
    guide: Array  # the same in the guide's type
    bias: tuple[Array, Array]  # int64; in the guide's type
    column: float  # the largest sum of |W| that one input meets

    def forward(self, kernels: Kernels, *xs: Array) -> Array:
        return kernels.matmul(xs[0], self.guide.T) + self.bias[1]

    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        if exact(weights):
            size, bias = kernels.largest(weights, self.bias[0])
            if size * self.column >= 2.0**53 or size * (bias + 1) * result[0][0].size >= LIMIT:
                raise TooLarge
            multipliers = kernels.matmul(weights, self.weight).astype(weights.dtype)
        else:
            multipliers = kernels.matmul(weights, self.guide)
        return (multipliers,), kernels.dot(weights, self.bias[not exact(weights)])


@dataclass(frozen=True, eq=False)
class ConvRelaxation(Relaxation):
    """The same for a convolution; multipliers of the padding go to the constant."""

    op: Conv
    weight: Array  # [groups, M/groups, C/groups*prod(kernel)] float64
    guide: Array  # the same in the guide's type
    bias: tuple[Array, Array]  # [M] int64; in the guide's type
    column: float

    def forward(self, kernels: Kernels, *xs: Array) -> Array:
        n, batch = xs[0].shape[:2]
        columns, output = self.op._columns(
            kernels, xs[0].reshape(n * batch, *xs[0].shape[2:]), self.op.pad_value
        )
        sums = kernels.xp.matmul(columns, self.guide.swapaxes(1, 2))
        sums = sums.swapaxes(2, 3).reshape(n, batch, -1, *output)
        return sums + self.op._per_channel(self.bias[1])

    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        n, r = weights.shape[:2]
        shape = (n * r, *boxes[0][0].shape[1:])
        if exact(weights):
            size, bias = kernels.largest(weights, self.bias[0])
            reach = (bias + abs(self.op.pad_value) * self.column + 1) * result[0][0].size
            if size * self.column >= 2.0**53 or size * reach >= LIMIT:
                raise TooLarge
        weight = self.weight if exact(weights) else self.guide
        upstream = weights.reshape(n * r, *weights.shape[2:]).astype(weight.dtype, copy=False)
        inner, padded = transposed(self.op, kernels, upstream, weight, shape)
        multipliers = inner.astype(weights.dtype, copy=False).reshape(n, r, *boxes[0][0].shape[1:])
        per_channel = weights.reshape(n, r, weights.shape[2], weights.shape[3], -1).sum(axis=(2, 4))
        constant = kernels.dot(per_channel, self.bias[not exact(weights)])
        if self.op.pad_value and any(self.op.pads):
            everywhere = padded.astype(weights.dtype).reshape(n, r, -1).sum(axis=2)
            outside = everywhere - multipliers.reshape(n, r, -1).sum(axis=2)
            constant = constant + outside * self.op.pad_value
        return (multipliers,), constant
