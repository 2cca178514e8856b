"""Interval rules as nodes of a graph for onnxruntime's int8 kernels, for the ops that these can
express.

Both ends of a value travel through the graph, for N boxes: as uint8 codes (the value minus a low)
or as int32; in one tensor [N, 2, ...], lower ends first, or in two tensors [N, size]. An op that is
increasing treats ends like any points. For a weighted sum, with the positive part P and the
negative part Q of its weights W, and d = upper - lower,

    lower end = P lower + Q upper + b = W lower + Q d + b,
    upper end = Q lower + P upper + b = W lower + P d + b:

the first form is one product of twice the rows and columns, whose rounding onnxruntime fuses; the
second is three. Sound because both are the op's own interval rule, in integers, and a float step is
the same IEEE operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

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
from qverify.ops.columns import Column
from qverify.propagate.weights import (
    Codes,
    Inexpressible,
    IntArray,
    dense_bias,
    doubled,
    folded,
    output_zero,
    scale_of,
    stored,
    transposition,
    twice,
)
from qverify.runtime import IntegerGraph

UINT8, INT32, FLOAT = 2, 6, 1  # ONNX's numbers of types
# From these numbers of rows and columns of a weight on, three products are faster than one of twice
# the rows and columns (measured).
LONG, WIDE = 512, 128
STEPS = {"mul": "Mul", "add": "Add", "sub": "Sub", "div": "Div", "max": "Max", "min": "Min"}


@dataclass(eq=False)
class Held:
    """The ends of a value in a graph. `low`: codes are the value minus this; None for int32.
    `pairs` names tensors [N, *axes] by their axes, whose product is twice the value's size (a value
    and its reshapes share it); `ends` names two tensors [N, size]; `last` names one [N, *spatial,
    channels of both ends], for a value [1, C, *spatial]. Where there is none yet, the value is an
    input: `source` is its name."""

    type: Type
    low: int | None
    pairs: dict[tuple[int, ...], str] = field(default_factory=dict)
    ends: tuple[str, str] | None = None
    last: str = ""
    source: str = ""


@dataclass(eq=False)
class Rules:
    """What adds ops to a graph. A rule that raises Inexpressible leaves the graph as good as it
    was."""

    graph: IntegerGraph
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)  # their axes, as first wanted

    # -- the forms of a value ----------------------------------------------------------------------

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The only output of a new node."""
        return self.graph.node(op, *inputs, **attributes)[0]

    def float32(self, value: npt.ArrayLike) -> str:
        """A constant."""
        return self.graph.constant(value, np.float32)

    def uint8(self, value: npt.ArrayLike) -> str:
        """A constant."""
        return self.graph.constant(value, np.uint8)

    def int32(self, value: npt.ArrayLike) -> str:
        """A constant."""
        return self.graph.constant(value, np.int32)

    def reshaped(self, name: str, *shape: int) -> str:
        """A tensor [N, ...] as [N', *shape]."""
        return self.node("Reshape", name, self.graph.constant([-1, *shape], np.int64))

    def pair(self, x: Held, *axes: int) -> str:
        """Both ends in one tensor [N, *axes]."""
        if not x.pairs and x.last:
            channels, *spatial = x.type.shape[1:]
            order = [0, len(spatial) + 1, *range(1, len(spatial) + 1)]
            x.pairs[(2 * channels, *spatial)] = self.node("Transpose", x.last, perm=order)
        elif not x.pairs and x.ends is None:
            self.inputs[x.source] = axes
            x.pairs[axes] = self.graph.input(
                x.source, np.int32 if x.low is None else np.uint8, axes
            )
        elif not x.pairs and x.ends is not None:
            x.pairs[(2 * x.type.size,)] = self.node("Concat", *x.ends, axis=1)
        if axes not in x.pairs:
            x.pairs[axes] = self.reshaped(next(iter(x.pairs.values())), *axes)
        return x.pairs[axes]

    def ends(self, x: Held) -> tuple[str, str]:
        """The ends in two tensors [N, size]."""
        if x.ends is None:
            x.ends = self.halves(self.pair(x, 2 * x.type.size))
        return x.ends

    def halves(self, name: str) -> tuple[str, str]:
        """A tensor [N, 2 n] as two [N, n]."""
        low, high = self.graph.node("Split", name, outputs=2, axis=1, num_outputs=2)
        return low, high

    def each(
        self,
        x: Held,
        result: Type,
        low: int | None,
        function: Callable[[str, tuple[int, ...]], str],
    ) -> Held:
        """An elementwise function: called with a tensor and the axes of one end in it."""
        if not x.pairs and x.ends is not None:
            ends = [function(name, (x.type.size,)) for name in x.ends]
            return Held(result, low, ends=(ends[0], ends[1]))
        return Held(
            result,
            low,
            {(2, *result.shape): function(self.pair(x, 2, *x.type.shape), x.type.shape)},
        )

    def wide(self, x: Held) -> Held:
        """A value as int32."""
        if x.low is None:
            return x

        def plus(name: str, axes: tuple[int, ...]) -> str:
            name = self.node("Cast", name, to=INT32)
            return self.node("Add", name, self.int32(x.low or 0)) if x.low else name

        return self.each(x, x.type, None, plus)

    def codes(self, x: Held) -> Held:
        """A value as codes."""
        if x.low is not None:
            return x
        if x.type.count > 256:
            raise Inexpressible

        def minus(name: str, axes: tuple[int, ...]) -> str:
            return self.node("Cast", self.node("Sub", name, self.int32(x.type.low)), to=UINT8)

        return self.each(x, x.type, x.type.low, minus)

    # -- weighted sums -----------------------------------------------------------------------------

    def dense(self, op: Dense, xs: list[Held], result: Type) -> Held:
        """Accumulators by three products."""
        x, bias = self.codes(xs[0]), dense_bias(op)
        weights = [
            stored(part, columns=True)
            for part in (op.weight, np.minimum(op.weight, 0), np.maximum(op.weight, 0))
        ]
        bias = folded(op.weight, bias, x.low or 0)
        lower, upper = self.ends(x)
        one, zero = self.float32(1), self.uint8(0)
        radius = self.node("QLinearAdd", upper, one, zero, lower, self.float32(-1), zero, one, zero)
        if x.type.size != len(op.weight):
            lower, radius = (self.reshaped(end, len(op.weight)) for end in (lower, radius))

        def product(end: str, weight: Codes) -> str:
            codes, low = (self.graph.constant(part, weight[0].dtype) for part in weight)
            return self.node("MatMulInteger", end, codes, zero, low)

        base, below, above = map(product, (lower, radius, radius), weights)
        base = self.node("Add", base, self.int32(bias))
        low, high = (self.node("Add", base, part) for part in (below, above))
        if result.size != op.weight.shape[1]:
            low, high = (self.reshaped(end, result.size) for end in (low, high))
        return Held(result, None, ends=(low, high))

    def rounded_dense(self, op: Dense, rounding: Requantize, x: Held, result: Type) -> Held:
        """Codes by a doubled product."""
        x, bias = self.codes(x), dense_bias(op)
        inner, outer = op.weight.shape
        if inner >= LONG and outer >= WIDE:
            raise Inexpressible
        scale = scale_of(rounding, result.shape, len(result.shape) - 1)
        y_zero = output_zero(rounding)
        weight, zero = stored(doubled(op.weight), columns=True)
        bias = np.tile(folded(op.weight, bias, x.low or 0), 2)
        factor, zero = np.broadcast_arrays(twice(scale), zero)  # onnxruntime wants as many of both
        if x.type.size == inner:
            joined = self.pair(x, 2 * inner)
        else:
            joined = self.node(
                "Concat", *(self.reshaped(end, inner) for end in self.ends(x)), axis=1
            )
        name = self.node(
            "QGemm",
            *(joined, self.float32(1), self.uint8(0)),
            *(
                self.graph.constant(weight, weight.dtype),
                self.float32(factor),
                self.graph.constant(zero, weight.dtype),
            ),
            *(self.int32(bias), self.float32(1), self.uint8(y_zero)),
        )
        name = self.limited(name, rounding)
        if result.size == outer:
            return Held(result, rounding.low, {(2 * outer,): name})
        low, high = (self.reshaped(end, result.size) for end in self.halves(name))
        return Held(result, rounding.low, ends=(low, high))

    def rounded_conv(self, op: Conv, rounding: Requantize, x: Held, result: Type) -> Held:
        """Codes by a convolution of twice the channels. Where there are groups, by one for each
        end, in which the ends of x lie along one more spatial axis."""
        x = self.codes(x)
        pad = op.pad_value - (x.low or 0)
        if x.type.shape[0] != 1 or not 0 <= pad <= 255:
            raise Inexpressible
        scale, zero = scale_of(rounding, result.shape, 1), output_zero(rounding)
        filters, (channels, *spatial) = len(op.weight), x.type.shape[1:]
        bias = folded(op.weight.reshape(filters, -1).T, op.bias, op.pad_value)
        doubled_weight = stored(doubled(op.weight)) if op.groups == 1 else None

        def convolution(
            name: str, weight: Codes, scale: Any, bias: IntArray, front: tuple[int, ...]
        ) -> str:
            codes, low = weight
            name = self.node(
                "QLinearConv",
                *(name, self.float32(1), self.uint8(pad), self.graph.constant(codes, codes.dtype)),
                *(
                    self.float32(scale),
                    self.graph.constant(low, codes.dtype),
                    self.float32(1),
                    self.uint8(zero),
                    self.int32(bias),
                ),
                channels_last=int(not front),
                group=op.groups,
                strides=[*front, *op.strides],
                dilations=[*front, *op.dilations],
                pads=[
                    *(0 for _ in front),
                    *op.pads[: len(spatial)],
                    *(0 for _ in front),
                    *op.pads[len(spatial) :],
                ],
            )
            return self.limited(name, rounding)

        if doubled_weight is not None:
            name = convolution(
                self.channels_last(x), doubled_weight, twice(scale), np.tile(bias, 2), ()
            )
            return Held(result, rounding.low, last=name)
        parts = np.maximum(op.weight, 0), np.minimum(op.weight, 0)
        order = (0, 2, 1, *range(3, 3 + len(spatial)))
        joined = self.node("Transpose", self.pair(x, 2, channels, *spatial), perm=order)
        low, high = (
            self.reshaped(
                convolution(joined, stored(np.stack(both, axis=2)), scale, bias, (1,)), result.size
            )
            for both in (parts, parts[::-1])
        )
        return Held(result, rounding.low, ends=(low, high))

    def channels_last(self, x: Held) -> str:
        """A value [1, C, *spatial] as [N, *spatial, 2 C], as the kernels of convolutions want
        it."""
        if not x.last:
            channels, *spatial = x.type.shape[1:]
            order = [0, *range(2, len(spatial) + 2), 1]
            x.last = self.node("Transpose", self.pair(x, 2 * channels, *spatial), perm=order)
        return x.last

    def limited(self, name: str, rounding: Requantize) -> str:
        """Codes clipped to a type of less than 8 bits."""
        count = rounding.high - rounding.low
        return name if count == 255 else self.node("Clip", name, self.uint8(0), self.uint8(count))

    # -- elementwise ops and moves -----------------------------------------------------------------

    def largest(self, op: Max, xs: list[Held], result: Type) -> Held:
        """The largest along the last axis."""
        axis = self.graph.constant([len(result.shape) + 2], np.int64)
        name = self.node("ReduceMax", self.pair(xs[0], 2, *xs[0].type.shape), axis, keepdims=0)
        return Held(result, xs[0].low, {(2, *result.shape): name})

    def requantize(self, op: Requantize, xs: list[Held], result: Type) -> Held:
        """The float steps one by one; rounding by QuantizeLinear where that can express it."""
        if op.program.ordinal or any(step.kind not in STEPS for step in op.program.steps):
            raise Inexpressible
        if any(
            (step.operand < 0).any() for step in op.program.steps if step.kind in ("mul", "div")
        ):
            raise Inexpressible  # it falls: the ends would have to be exchanged
        if op.high - op.low > 255:
            raise Inexpressible
        x, shape = self.wide(xs[0]), xs[0].type.shape

        def constant(value: Any, axes: tuple[int, ...]) -> str:
            """An operand that broadcasts to `shape`, for a tensor whose ends have these axes."""
            value = np.asarray(value)
            if value.size == 1:
                return self.float32(value.reshape(()))
            return self.float32(
                value if axes == shape else np.broadcast_to(value, shape).reshape(axes)
            )

        def rounded(name: str, axes: tuple[int, ...]) -> str:
            steps = op.program.steps
            if steps and steps[0].kind == "mul" and steps[0].operand.size == 1:  # both in one pass
                name = self.node("DequantizeLinear", name, constant(steps[0].operand, axes))
                steps = steps[1:]
            else:
                name = self.node("Cast", name, to=FLOAT)
            for step in steps:
                name = self.node(STEPS[step.kind], name, constant(step.operand, axes))
            if op.zero_point.size == 1 and 0 <= int(op.zero_point.reshape(())) - op.low <= 255:
                zero = self.uint8(int(op.zero_point.reshape(())) - op.low)
                return self.limited(self.node("QuantizeLinear", name, self.float32(1), zero), op)
            name = self.node("Max", name, constant(op.low - op.zero_point, axes))
            name = self.node(
                "Round", self.node("Min", name, constant(op.high - op.zero_point, axes))
            )
            return self.node(
                "Cast", self.node("Add", name, constant(op.zero_point - op.low, axes)), to=UINT8
            )

        return self.each(x, result, op.low, rounded)

    def layout(self, op: Layout, xs: list[Held], result: Type) -> Held:
        """A reshape is another name; other moves gather elements."""
        index, sizes = op.index, [x.type.size for x in xs]
        if index is None or (len(xs) == 1 and np.array_equal(index, np.arange(sizes[0]))):
            if xs[0].last:
                self.pair(xs[0], 2 * xs[0].type.size)
            return Held(result, xs[0].low, xs[0].pairs, xs[0].ends, source=xs[0].source)
        total = sum(sizes)
        constants = _constants_read(op, total)
        if len(constants) > 1:
            raise Inexpressible  # Pad has one value
        low = xs[0].low
        if any(x.low != low for x in xs) or not _are_codes(constants, low):
            xs, low = [self.wide(x) for x in xs], None
        parts = [self.pair(x, 2, size) for x, size in zip(xs, sizes, strict=True)]
        name = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=2)
        if len(constants):
            value = self.int32(constants[0]) if low is None else self.uint8(constants[0] - low)
            one_behind = self.graph.constant([0, 0, 0, 0, 0, 1], np.int64)
            name = self.node("Pad", name, one_behind, value)
        exchange = (
            transposition(index, op.shape, total) if len(xs) == 1 and not len(constants) else None
        )
        if exchange is not None:
            split, order = exchange
            name = self.node(
                "Transpose", self.pair(xs[0], 2, *split), perm=[0, 1, *(2 + k for k in order)]
            )
            return Held(result, low, {(2, *(split[k] for k in order)): name})
        # With the boxes as the last axis, an element is copied for all of them at once: Gather is
        # slow where pieces are small.
        name = self.node(
            "Gather",
            self.node("Transpose", name, perm=[2, 0, 1]),
            self.int32(np.minimum(index, total)),
            axis=0,
        )
        return Held(result, low, {(2, len(index)): self.node("Transpose", name, perm=[1, 2, 0])})

    def table(self, op: Table, xs: list[Held], result: Type) -> Held:
        """An increasing table is looked up; one that only clips needs no table."""
        (x,) = xs
        if not op.monotone:
            raise Inexpressible
        values = op.values[0, x.type.low - op.low : x.type.high + 1 - op.low]
        if x.low is not None and op.which is None:
            least, most = int(values[0]), int(values[-1])
            if least >= x.low and np.array_equal(
                values, np.clip(np.arange(x.type.low, x.type.high + 1), least, most)
            ):
                ends = self.uint8(least - x.low), self.uint8(most - x.low)
                return self.each(
                    x, result, x.low, lambda name, axes: self.node("Clip", name, *ends)
                )
        offset = 0 if op.which is None else op.which * op.values.shape[1]
        name = self._index(self.pair(x, 2, *x.type.shape), x, 1, np.asarray(offset) - op.low)
        return self._looked_up(op.values, name, result)

    def pairwise(self, op: Pairwise, xs: list[Held], result: Type) -> Held:
        """An increasing table of two codes is looked up."""
        if not op.increasing:
            raise Inexpressible
        rank, row = len(result.shape), op.values.shape[1]
        a, b = (self.pair(x, 2, *[1] * (rank - len(x.type.shape)), *x.type.shape) for x in xs)
        a, b = self._index(a, xs[0], row, -op.a_low * row), self._index(b, xs[1], 1, -op.b_low)
        return self._looked_up(op.values, self.node("Add", a, b), result)

    def _index(self, name: str, x: Held, factor: int, offset: npt.ArrayLike) -> str:
        """factor * value + offset, int32."""
        if x.low is not None:
            name, offset = self.node("Cast", name, to=INT32), np.asarray(offset) + factor * x.low
        if factor != 1:
            name = self.node("Mul", name, self.int32(factor))
        return self.node("Add", name, self.int32(offset)) if np.any(offset) else name

    def _looked_up(self, values: npt.NDArray[np.int32], index: str, result: Type) -> Held:
        narrow, flat, axes = result.count <= 256, values.reshape(-1), (2, *result.shape)
        entries = self.uint8(flat - result.low) if narrow else self.int32(flat)
        # Not Gather, which takes eight times as long (measured).
        name = self.node("GatherElements", entries, self.reshaped(index))
        return Held(result, result.low if narrow else None, {axes: self.reshaped(name, *axes)})


def _constants_read(op: Layout, total: int) -> npt.NDArray[np.int32]:
    """The different constants that a move reads; `total` is the size of its inputs."""
    if op.index is None or op.constants is None:
        return np.zeros(0, np.int32)
    return np.unique(op.constants[np.unique(op.index[op.index >= total]) - total])


def _are_codes(values: npt.NDArray[np.int32], low: int | None) -> bool:
    """Whether values fit what is above a `low`: a byte, or without one an int32."""
    return low is None or bool(((values >= low) & (values <= low + 255)).all())


# -- which rule ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphRule:
    """How an op is added: (rules, op, inputs, type of the result) -> the result; and how it is
    added together with the rounding of its result: (rules, op, rounding, input, type)."""

    alone: Callable[[Rules, Any, list[Held], Type], Held] | None = None
    rounded: Callable[[Rules, Any, Requantize, Held, Type], Held] | None = None


GRAPH_RULES: Column[GraphRule] = Column(
    __name__,
    {
        Dense: GraphRule(Rules.dense, Rules.rounded_dense),
        # Accumulators that nothing rounds are rare behind a convolution: the op computes them.
        Conv: GraphRule(rounded=Rules.rounded_conv),
        Requantize: GraphRule(Rules.requantize),
        Layout: GraphRule(Rules.layout),
        Max: GraphRule(Rules.largest),
        Table: GraphRule(Rules.table),
        Pairwise: GraphRule(Rules.pairwise),
    },
    {
        Mean: "its float32 sum goes in an order that no node of onnxruntime's promises",
        Softmax: "an end of its result needs both ends of all its inputs; it has few elements",
    },
)


def add(rules: Rules, op: AbstractOp, xs: list[Held], result: Type) -> Held:
    """Add one op. Raises Inexpressible where the op has to compute its bounds itself."""
    rule = GRAPH_RULES.rule(op)
    if rule is None or rule.alone is None:
        raise Inexpressible
    return rule.alone(rules, op, xs, result)


def add_rounded(rules: Rules, op: AbstractOp, rounding: Requantize, x: Held, result: Type) -> Held:
    """Add a weighted sum and the rounding of its result, where nothing else reads that, in one
    node. Raises Inexpressible where the two have to be added one by one."""
    rule = GRAPH_RULES.rule(op)
    if rule is None or rule.rounded is None:
        raise Inexpressible
    return rule.rounded(rules, op, rounding, x, result)
