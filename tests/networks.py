"""Random integer networks that are small enough for every code vector to be run."""

from __future__ import annotations

from typing import Any

import numpy as np

from qverify.kernels import open_kernels
from qverify.network import Network, Node
from qverify.ops import (
    AbstractOp,
    Conv,
    Dense,
    FloatProgram,
    Interval,
    Layout,
    Max,
    Mean,
    Pairwise,
    Requantize,
    Table,
    Type,
)
from tests.ops.cases import Case

CPU = open_kernels("cpu")
Rng = np.random.Generator


class Maker:
    """A network under construction. Every method returns the number of the value it made."""

    def __init__(self, rng: Rng, inputs: int, high: int = 7) -> None:
        self.rng, self.input, self.nodes = rng, Type((inputs,), 0, high), list[Node]()

    def type(self, value: int) -> Type:
        return self.input if value == 0 else self.nodes[value - 1].type

    def add(self, op: AbstractOp, *inputs: int) -> int:
        self.nodes.append(
            Node(op, inputs, op.output_type(*(self.type(i) for i in inputs)), f"n{len(self.nodes)}")
        )
        return len(self.nodes)

    def network(self, *outputs: int) -> Network:
        result = Network(self.input, tuple(self.nodes), outputs)
        result.validate()
        return result

    def flat(self, x: int) -> int:
        return self.move(x, (self.type(x).size,))

    def move(self, x: int, shape: tuple[int, ...], index: Any = None) -> int:
        return self.add(Layout(shape, None if index is None else np.asarray(index, np.int64)), x)

    def dense(self, x: int, width: int) -> int:
        x, rng = self.flat(x), self.rng
        weight = rng.integers(-9, 10, (self.type(x).size, width)) * (
            rng.random((self.type(x).size, width)) < 0.8
        )
        return self.add(
            Dense(weight, rng.integers(-30, 31, width), self.type(x).low, self.type(x).high), x
        )

    def conv(self, x: int, positions: int = 0) -> int:
        """A convolution of rank 1 or 2 over the moved value; with `positions` 1, of a single output
        position."""
        x, rng = self.flat(x), self.rng
        size, t = self.type(x).size, self.type(x)
        shape = [(1, 1, size), (1, size, 1), (1, 1, size, 1), (1, 1, 1, size)][rng.integers(4)]
        x = self.move(x, shape)
        rank, filters = len(shape) - 2, int(rng.integers(1, 4))
        kernel = [int(rng.integers(1, 4)) for _ in range(rank)]
        dilations = [int(rng.integers(1, 3)) for _ in range(rank)]
        before = [int(v) for v in rng.integers(0, 3, rank)]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        after = [
            max(0, r - n - p) + int(rng.integers(0, 2))
            for r, n, p in zip(reach, shape[2:], before, strict=True)
        ]
        full = [n + p + q for n, p, q in zip(shape[2:], before, after, strict=True)]
        strides = [f if positions == 1 else int(rng.integers(1, 3)) for f in full]
        weight = rng.integers(-9, 10, (filters, shape[1], *kernel))
        pad = int(rng.integers(t.low - 2, t.high + 3))
        ends = min(t.low, pad), max(t.high, pad)
        bias = rng.integers(-30, 31, filters)
        return self.add(
            Conv(weight, bias, tuple(strides), (*before, *after), tuple(dilations), 1, pad, *ends),
            self.widen(x, *ends),
        )

    def widen(self, x: int, low: int, high: int) -> int:
        """The value itself; ops check ranges against their own."""
        assert low <= self.type(x).low and self.type(x).high <= high
        return x

    def requantize(self, x: int, channels: bool = True) -> int:
        """To 3 or 4 bits, such that most of the range is used; steps are even, but for rounding."""
        rng, t = self.rng, self.type(x)
        low, high = ((0, 7), (-4, 3), (0, 15), (-8, 7))[rng.integers(4)]
        count = t.shape[-1] if channels and t.shape and rng.random() < 0.4 else 1
        scale = (
            (high - low)
            / max(t.count, 2)
            * rng.uniform(0.8, 4, count)
            * (-1 if rng.random() < 0.1 else 1)
        )
        zero = rng.integers(low, high + 1, count)
        if count == 1:
            scale, zero = scale[0], zero[0]
        program = FloatProgram().then("mul", scale)
        if rng.random() < 0.2:
            program = program.then("add", float(rng.normal()))
        return self.add(Requantize(program, np.asarray(zero, np.int32), low, high), x)

    def table(self, x: int) -> int:
        rng, t = self.rng, self.type(x)
        values = rng.integers(-8, 9, (1, t.count))
        kind = rng.integers(4)
        if kind < 2:
            values = np.sort(values, axis=1)
        if kind == 1:
            values = values[:, ::-1]
        if kind == 2:
            values = np.rint(np.arange(t.count) * rng.uniform(-1, 1)).astype(np.int64)[None]
        return self.add(Table(np.ascontiguousarray(values, np.int32), t.low), x)

    def clip(self, x: int) -> int:
        t = self.type(x)
        a, b = np.sort(self.rng.integers(t.low - 1, t.high + 2, 2))
        return self.add(
            Table(np.clip(np.arange(t.low, t.high + 1), a, b).astype(np.int32)[None], t.low), x
        )

    def two(self, a: int, b: int) -> int:
        """A sum, a difference or a product of two values that fit."""
        rng, ta, tb = self.rng, self.type(a), self.type(b)
        x, y = np.arange(ta.low, ta.high + 1)[:, None], np.arange(tb.low, tb.high + 1)[None]
        p, q, shift = rng.uniform(-1.5, 1.5, 3)
        values = p * x + q * y + shift * 4 if rng.random() < 0.75 else 0.2 * (x - 2) * (y - 1)
        values = np.clip(np.rint(values), -8, 7)
        return self.add(Pairwise(np.ascontiguousarray(values, np.int32), ta.low, tb.low), a, b)

    def maximum(self, x: int) -> int:
        x = self.flat(x)
        size = self.type(x).size
        width = min(int(self.rng.integers(1, 5)), size)
        return self.add(
            Max(), self.move(x, (size // width, width), np.arange(size // width * width))
        )

    def mean(self, x: int) -> int:
        """The float32 mean of all elements, a scalar: its ordinals, of about 2**30, or codes
        again."""
        x, rng = self.flat(x), self.rng
        t = self.type(x)
        values = (np.arange(t.count) * rng.uniform(0.01, 2)).astype(np.float32)
        order = str(rng.choice(["sequential", "eigen"]))
        x = self.add(Mean(values, t.low, np.asarray(t.size, np.float32), order), x)
        if rng.random() < 0.5:
            return x
        program = FloatProgram(ordinal=True).then(
            "mul", rng.uniform(4, 30) / max(float(values[-1]), 1e-3)
        )
        return self.add(Requantize(program, np.asarray(0, np.int32), 0, 15), x)

    def scalar(self, x: int) -> int:
        """One element, without an axis."""
        x = self.flat(x)
        return self.move(x, (), [self.rng.integers(self.type(x).size)])

    def shuffle(self, x: int) -> int:
        size = self.type(x).size
        return self.move(x, (size,), self.rng.permutation(size))

    def join(self, a: int, b: int) -> int:
        """Some elements of two values and a constant."""
        total = self.type(a).size + self.type(b).size + 1
        index = self.rng.integers(0, total, int(self.rng.integers(2, 5)))
        constants = self.rng.integers(-4, 4, 1).astype(np.int32)
        return self.add(Layout((len(index),), index, constants), a, b)


def random_network(rng: Rng, inputs: int = 0, layers: int = 4, scalars: bool = False) -> Network:
    """Layers of all kinds of ops; the last value is an output, sometimes with an earlier one.
    `inputs`: 0 is 2 to 4. With `scalars`, some values have no axes, and the last may be a mean."""
    maker = Maker(rng, inputs or int(rng.integers(2, 5)), int(rng.choice([3, 7])))
    x, earlier = 0, 0
    for _ in range(int(rng.integers(1, layers + 1))):
        before = x
        kind = rng.integers(11 if scalars else 10)
        if kind < 4:
            x = maker.requantize(maker.dense(x, int(rng.integers(1, 5))))
        elif kind == 4:
            x = maker.requantize(maker.conv(x), channels=False)
        elif kind == 5:
            x = maker.table(x)
        elif kind == 6:
            x = maker.flat(x)
            x = maker.two(x, x if rng.random() < 0.3 else maker.shuffle(x))
        elif kind == 7:
            x = maker.maximum(x)
        elif kind == 8:
            x = maker.join(x, earlier)
        elif kind == 10:
            x = maker.scalar(x)
        else:
            x = maker.clip(maker.shuffle(x))
        if maker.type(x).size > 8:
            x = maker.move(x, (6,), np.arange(6))
        earlier = before
    end = rng.integers(5 if scalars else 3)
    if end == 0:
        x = maker.dense(x, int(rng.integers(1, 3)))
    elif end == 1:
        x = maker.requantize(maker.dense(x, int(rng.integers(1, 4))))
    elif end > 2:
        x = maker.mean(x) if rng.random() < 0.5 else maker.scalar(x)
    outputs = (x, earlier) if rng.random() < 0.2 else (x,)
    return maker.network(*outputs)


def boxes(rng: Rng, kind: Type, count: int = 24) -> Interval:
    """Points, corners, narrow and wide boxes, the whole range."""
    ends = rng.integers(kind.low, kind.high, (2, count, kind.size), dtype=np.int64, endpoint=True)
    lower, upper = ends.min(axis=0), ends.max(axis=0)
    upper[:4] = lower[:4]
    upper[4:10] = np.minimum(lower[4:10] + rng.integers(0, 4, (6, kind.size)), kind.high)
    lower[10:13], upper[10], upper[11] = kind.low, kind.high, kind.low
    lower[13:15], upper[13:15] = kind.high, kind.high
    extreme = rng.random((2, 5, kind.size)) < 0.5
    lower[15:20] = np.where(extreme[0], kind.low, kind.high)
    upper[15:20] = np.where(extreme[0] & extreme[1], kind.low, kind.high)
    return lower.astype(np.int32), upper.astype(np.int32)


def one_op(case: Case) -> Network:
    """The op of a case on a flat input: its own types, by a table that clips where there are
    several."""
    whole = Type(
        (sum(t.size for t in case.inputs),),
        min(t.low for t in case.inputs),
        max(t.high for t in case.inputs),
    )
    nodes: list[Node] = []

    def add(op: AbstractOp, *inputs: int) -> int:
        kinds = [nodes[i - 1].type if i else whole for i in inputs]
        nodes.append(Node(op, inputs, op.output_type(*kinds)))
        return len(nodes)

    values, start = [], 0
    codes = np.arange(whole.low, whole.high + 1) if whole.count < 1000 else np.zeros(0)
    for t in case.inputs:
        if len(case.inputs) == 1:
            values.append(add(Layout(t.shape), 0))
        else:
            part = add(Layout(t.shape, np.arange(start, start + t.size)), 0)
            values.append(
                add(Table(np.clip(codes, t.low, t.high).astype(np.int32)[None], whole.low), part)
            )
        start += t.size
    network = Network(whole, tuple(nodes), (add(case.op, *values),))
    return Network(whole, tuple(nodes), network.outputs)


def all_points(lower: Any, upper: Any) -> Any:
    """Every code vector of a box [codes], int32 [N, codes]."""
    axes = [np.arange(a, b + 1) for a, b in zip(lower, upper, strict=True)]
    return (
        np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes)).astype(np.int32)
    )
