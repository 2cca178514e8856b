"""Small instances of every integer op, with the types of their inputs: what the laws are tested on.

To add an op, add its cases here; the laws themselves (test_laws.py, and the GPU's tests) name no
op.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qverify.ops import (
    AbstractOp,
    Conv,
    Dense,
    FloatProgram,
    Layout,
    Max,
    Mean,
    Pairwise,
    Requantize,
    Softmax,
    Table,
    Type,
)

F32 = np.float32
IntArray = npt.NDArray[np.int64]
INT32 = 2**31 - 1
LARGEST = 0x7F7FFFFF  # the ordinal of the largest float32


@dataclass(frozen=True, eq=False)
class Case:
    """An op and the types of its inputs."""

    name: str
    op: AbstractOp
    inputs: tuple[Type, ...]

    def __str__(self) -> str:
        return f"{type(self.op).__name__} {self.name}"


def u8(*shape: int) -> Type:
    return Type(shape, 0, 255)


def s8(*shape: int) -> Type:
    return Type(shape, -128, 127)


def bits3(*shape: int) -> Type:
    return Type(shape, 0, 7)


def bits4(*shape: int) -> Type:
    return Type(shape, -8, 7)


def layouts() -> Iterator[Case]:
    yield Case("reshape", Layout((3, 2)), (u8(2, 3),))
    yield Case("to a scalar", Layout(()), (bits4(1),))
    yield Case("transpose", Layout((3, 2), np.arange(6).reshape(2, 3).T.reshape(-1)), (s8(2, 3),))
    yield Case("slice", Layout((2,), np.array([5, 1])), (u8(6),))
    yield Case("repeat", Layout((2, 2), np.array([1, 1, 0, 1])), (bits3(2),))
    yield Case("pad", Layout((5,), np.array([3, 0, 1, 2, 4])), (u8(5),))
    yield Case(
        "pad by constants",
        Layout((4,), np.array([2, 0, 1, 3]), np.array([-9, 300], np.int32)),
        (bits4(2),),
    )
    yield Case("concat", Layout((5,), np.array([0, 1, 2, 3, 4])), (u8(2), s8(3)))
    yield Case("concat of one value", Layout((4,), np.array([0, 1, 2, 3])), (bits3(2), bits3(2)))
    constants = np.array([7], np.int32)
    yield Case(
        "mix",
        Layout((2, 3), np.array([4, 0, 6, 5, 0, 1]), constants),
        (u8(2, 2), Type((2,), -5, 5)),
    )


def dense(name: str, weight: npt.ArrayLike, bias: npt.ArrayLike, x: Type) -> Case:
    op = Dense(np.asarray(weight, np.int64), np.asarray(bias, np.int64), x.low, x.high)
    return Case(name, op, (x,))


def denses() -> Iterator[Case]:
    rng = np.random.default_rng(1)

    def w(*shape: int, high: int = 127) -> IntArray:
        return rng.integers(-high, high + 1, shape)

    yield dense("one weight", [[3]], 5, bits4(1))
    yield dense("a negative weight", [[-3]], [0], bits3(1))
    yield dense("two inputs", [[3, 0], [-7, 1]], [-4, 9], bits4(2))
    yield dense("three inputs", w(3, 2), [1, -2], bits3(3))
    yield dense("a vector", w(9, 4), w(4, high=9_999), u8(9))
    yield dense("rows", w(5, 3), w(3), s8(4, 5))
    yield dense("a bias for each row", w(5, 3), w(4, 3), s8(4, 5))
    yield dense("one bias", w(5, 3), 1_000_000, u8(2, 5))
    yield dense("a stack of rows", w(5, 3), 0, u8(2, 4, 5))
    yield dense("a stack of weights", w(2, 5, 3), w(2, 1, 3), u8(2, 4, 5))
    yield dense("a stack of weights for one matrix", w(2, 5, 3), w(2, 1, 3), u8(4, 5))
    yield dense("one weight matrix in a stack", w(1, 5, 3), w(1, 1, 3), s8(2, 4, 5))
    yield dense("a stack of weights for a stack of one", w(3, 5, 2), w(2), s8(1, 4, 5))
    yield dense("stacks of stacks", w(3, 1, 5, 2), w(2), s8(2, 4, 5))
    yield dense("zeros", np.zeros((4, 2)), [3, -3], u8(4))
    yield dense("pieces of exact float32", w(700, 3), w(3), u8(700))
    yield dense("pieces of very different sizes", np.r_[w(3, 2), w(3, 2, high=60_000)], w(2), u8(6))
    yield dense("float64", w(6, 2, high=900_000), w(2), s8(6))
    yield dense("nearly int32", [[4_000_000], [-4_000_000]], [INT32 - 255 * 4_000_000], u8(2))
    yield dense(
        "both ends of int32",
        [[4_210_000, -4_210_000], [4_210_000, -4_210_000]],
        [-2_000, 900],
        u8(2),
    )
    yield dense("nearly int32 in pieces", np.full((500, 2), 16_000), [5, -5], u8(500))
    yield dense("far from zero", w(3, 2), w(2), Type((3,), 90, 130))
    yield dense("one value", w(3, 2), w(2), Type((3,), 5, 5))


def conv(
    name: str,
    x: Type,
    weight: tuple[int, ...],
    *,
    strides: tuple[int, ...] = (),
    pads: tuple[int, ...] = (),
    dilations: tuple[int, ...] = (),
    groups: int = 1,
    pad_value: int = 0,
    high: int = 127,
) -> Case:
    rng, rank = np.random.default_rng(len(name)), len(weight) - 2
    w = rng.integers(-high, high + 1, weight)
    bias = rng.integers(-9_000, 9_000, weight[0])
    ends = min(x.low, pad_value), max(x.high, pad_value)
    window = strides or (1,) * rank, pads or (0,) * (2 * rank), dilations or (1,) * rank
    return Case(name, Conv(w, bias, *window, groups, pad_value, *ends), (x,))


def convs() -> Iterator[Case]:
    yield conv("of one element", bits4(1, 1, 1), (1, 1, 1))
    yield conv("of two elements", bits4(1, 1, 2), (2, 1, 2), pads=(1, 0), pad_value=3)
    yield conv("of two channels", bits4(1, 2, 1), (2, 2, 1))
    yield conv("of three elements, padded", bits3(1, 1, 3), (1, 1, 2), pads=(1, 1), pad_value=7)
    yield conv("1-D", u8(1, 2, 7), (3, 2, 3), strides=(2,), pads=(1, 2), pad_value=128)
    yield conv("2-D", u8(1, 2, 5, 4), (3, 2, 3, 2))
    yield conv("2-D padded", s8(1, 2, 4, 4), (3, 2, 3, 3), pads=(1, 0, 2, 1), pad_value=-128)
    yield conv(
        "2-D strided and dilated", u8(1, 1, 7, 6), (2, 1, 2, 3), strides=(2, 1), dilations=(3, 2)
    )
    yield conv(
        "2-D in groups", u8(1, 4, 3, 3), (6, 2, 2, 2), groups=2, pads=(1, 1, 0, 0), pad_value=255
    )
    yield conv(
        "2-D depthwise", s8(1, 3, 4, 4), (3, 1, 3, 3), groups=3, pads=(1, 1, 1, 1), pad_value=5
    )
    yield conv("2-D depthwise twice", u8(1, 2, 4, 4), (4, 1, 2, 2), groups=2)
    yield conv("2-D pointwise", u8(1, 5, 2, 2), (3, 5, 1, 1))
    yield conv(
        "3-D",
        u8(1, 2, 3, 4, 3),
        (2, 2, 2, 2, 2),
        pads=(0, 1, 0, 1, 0, 0),
        pad_value=9,
        strides=(1, 2, 1),
    )
    yield conv("a batch", u8(3, 2, 4), (2, 2, 2))
    yield conv(
        "in pieces of exact float32",
        u8(1, 90, 3, 3),
        (2, 90, 3, 3),
        pads=(1, 1, 1, 1),
        pad_value=17,
    )
    yield conv("in float64", u8(1, 2, 3, 3), (2, 2, 2, 2), high=200_000)
    yield conv(
        "padding beyond the input's range",
        Type((1, 1, 4), 10, 20),
        (2, 1, 3),
        pads=(2, 2),
        pad_value=0,
    )


def requantize(
    name: str, program: FloatProgram, x: Type, zero: npt.ArrayLike = 0, signed: bool = False
) -> Case:
    low, high = (-128, 127) if signed else (0, 255)
    return Case(name, Requantize(program, np.asarray(zero, np.int32), low, high), (x,))


def wide(*shape: int) -> Type:
    return Type(shape, -(2**31), 2**31 - 1)


def requantizes() -> Iterator[Case]:
    start, floats = FloatProgram(), FloatProgram(ordinal=True)
    yield requantize("ties", start.then("mul", 0.5), bits4(2), 3)
    yield requantize("all ties, signed", start.then("mul", 2.5), bits4(1), -1, signed=True)
    yield requantize("a negative factor", start.then("mul", -1.5), bits4(2), 9)
    yield requantize("factors of both signs", start.then("mul", [0.75, -0.25]), bits4(2), 128)
    yield requantize(
        "factors and zero points of channels",
        start.then("mul", [[2.5], [0.1]]),
        bits3(2, 1),
        [[5], [0]],
    )
    yield requantize("an accumulator", start.then("mul", 0.0123), Type((5,), -40_000, 40_000), 128)
    yield requantize("any int32", start.then("mul", 1e-7), wide(4), 0, signed=True)
    yield requantize("any int32, nearly constant", start.then("mul", 1e-30), wide(2), 77)
    yield requantize("any int32, saturating", start.then("mul", 3e5), wide(2), 128)
    yield requantize(
        "channels",
        start.then("mul", np.linspace(-0.02, 0.05, 3).reshape(3, 1)),
        Type((3, 4), -9_000, 9_999),
    )
    program = start.then("mul", 0.031).then("add", [1.5, -20.25]).then("max", 0).then("div", 0.37)
    yield requantize("mul, add, max, div", program, Type((2,), -9_000, 9_000), 4)
    program = (
        start.then("mul", 0.5).then("rsub", 3).then("min", 2.75).then("sub", 0.25).then("div", -0.5)
    )
    yield requantize("mul, rsub, min, sub, div", program, bits4(2), 100)
    finite = Type((5,), -LARGEST, LARGEST)
    yield requantize("floats by their ordinals", floats.then("div", 0.01).then("add", 3), finite, 0)
    yield requantize(
        "a few floats by their ordinals",
        floats.then("mul", -1e38),
        Type((2,), 1_065_353_210, 1_065_353_216),
    )
    # 1.0 and its neighbours: half integers below it.
    fine = floats.then("mul", 2.0**23).then("sub", 2.0**23)
    yield requantize(
        "neighbouring floats by their ordinals", fine, Type((2,), 0x3F800000 - 8, 0x3F800000 + 7), 5
    )


def tables() -> Iterator[Case]:
    rng = np.random.default_rng(3)

    def rows(*values: npt.ArrayLike) -> npt.NDArray[np.int32]:
        return np.array(values, np.int32)

    yield Case(
        "rising", Table(np.sort(rng.integers(-128, 128, (1, 16)).astype(np.int32)), -8), (bits4(2),)
    )
    yield Case(
        "falling",
        Table(np.sort(rng.integers(0, 256, (1, 8)).astype(np.int32))[:, ::-1].copy(), 0),
        (bits3(2),),
    )
    yield Case(
        "up and down", Table(rng.integers(0, 256, (1, 16)).astype(np.int32), -8), (bits4(2),)
    )
    yield Case("a constant", Table(rows([7] * 8), 0), (bits3(1),))
    yield Case("one entry", Table(rows([-3]), 5), (Type((2,), 5, 5),))
    yield Case("two entries", Table(rows([9, -3]), 5), (Type((2,), 5, 6),))
    yield Case("five entries", Table(rows([9, -3, 4, 4, 0]), -2), (Type((2,), -2, 2),))
    yield Case(
        "more entries than needed",
        Table(rng.integers(0, 256, (1, 40)).astype(np.int32), -20),
        (bits4(1),),
    )
    which = np.array([[0], [2]])
    yield Case(
        "one for each channel",
        Table(rng.integers(0, 256, (3, 16)).astype(np.int32), -8, which),
        (bits4(2, 1),),
    )
    rising = np.sort(rng.integers(0, 256, (2, 256)).astype(np.int32), axis=1)
    yield Case("rising for each channel", Table(rising, 0, np.array([1, 0, 1])), (u8(2, 3),))
    wild = rng.integers(-(2**31), 2**31, (4, 256)).astype(np.int32)
    yield Case("wild for each element", Table(wild, -128, rng.integers(0, 4, (2, 3))), (s8(2, 3),))
    sigmoid = 255 / (1 + np.exp(-np.arange(-128, 128) / 30))
    yield Case("a sigmoid of 256 codes", Table(sigmoid.astype(np.int32)[None], 0), (u8(7),))
    wave = np.rint(99 * np.sin(np.arange(256) / 9))
    yield Case("a wave of 256 codes", Table(wave.astype(np.int32)[None], 0), (u8(7),))


def pairwise(name: str, function: object, a: Type, b: Type) -> Case:
    assert callable(function)
    x, y = np.arange(a.low, a.high + 1)[:, None], np.arange(b.low, b.high + 1)[None]
    values = np.broadcast_to(function(x, y), (a.count, b.count))
    return Case(name, Pairwise(np.ascontiguousarray(values, np.int32), a.low, b.low), (a, b))


def pairwises() -> Iterator[Case]:
    def added(x: IntArray, y: IntArray) -> object:
        return np.clip(np.rint(0.4 * x + 1.7 * y), -4, 9)

    def multiplied(x: IntArray, y: IntArray) -> object:
        return np.clip(np.rint(0.3 * (x - 3) * (y + 2)), -20, 20)

    yield pairwise("a sum", added, bits4(1), bits3(1))
    yield pairwise("a difference", lambda x, y: x - 2 * y, bits4(1), bits4(1))
    yield pairwise("a falling sum", lambda x, y: -x - y, bits4(1), bits3(1))
    yield pairwise("a product", multiplied, bits4(1), bits4(1))
    yield pairwise("the first", lambda x, y: x, bits4(1), bits3(1))
    yield pairwise("a constant", lambda x, y: 3, bits3(1), bits3(1))
    for name, a, b in (
        ("of equal shapes", (2, 3), (2, 3)),
        ("with a row", (2, 3), (3,)),
        ("with a column", (2, 3), (2, 1)),
        ("of a row and a column", (1, 3), (2, 1)),
        ("with a scalar", (2, 3), ()),
        ("of a scalar", (), (2, 3)),
        ("of a stack", (3,), (2, 1, 3)),
        ("of a stack and a column", (4, 2, 1), (2, 3)),
    ):
        yield pairwise(f"a sum {name}", added, s8(*a), u8(*b))
        yield pairwise(f"a product {name}", multiplied, s8(*a), s8(*b))


def maxima() -> Iterator[Case]:
    yield Case("of one", Max(), (bits4(2, 1),))
    yield Case("of two", Max(), (bits4(2),))
    yield Case("of three", Max(), (bits3(3),))
    yield Case("of many", Max(), (s8(2, 3, 9),))


def means() -> Iterator[Case]:
    rng = np.random.default_rng(5)

    def mean(
        name: str, x: Type, order: str, divisor: npt.ArrayLike | None = None, step: float = 0.1
    ) -> Case:
        values = ((np.arange(x.low, x.high + 1) - 3).astype(F32) * F32(step)).astype(F32)
        count = x.shape[-1] if divisor is None else divisor
        return Case(name, Mean(values, x.low, np.asarray(count, F32), order), (x,))

    for order in ("sequential", "eigen"):
        yield mean(f"of one, {order}", bits4(2, 1), order)
        yield mean(f"of two, {order}", bits4(2), order)
        yield mean(f"of three, {order}", bits3(3), order)
        for length in (4, 5, 7, 8, 9, 11, 12, 15, 16, 23, 33):
            yield mean(
                f"of {length}, {order}", u8(3, length), order, step=float(rng.uniform(0.001, 1))
            )
        yield mean(f"of many rows, {order}", s8(2, 3, 3, 10), order)
        yield mean(f"of subnormal values, {order}", bits3(2, 3), order, step=1e-39)
        yield mean(f"of wide values, {order}", Type((2, 6), 0, 40), order, step=1e36)
    yield mean("with a divisor for each window", u8(2, 3, 4), "sequential", [[1, 4, 3], [2, 4, 4]])
    steps = np.array([-5, -5, -0.0, 0.0, 1e-30, 7, 7, 8], F32)
    yield Case("of uneven values", Mean(steps, 0, np.asarray(3, F32), "eigen"), (bits3(3),))


def softmaxes() -> Iterator[Case]:
    for length, scale, y_scale, zero, signed in (
        (1, 0.1, 1 / 256, 0, False),
        (2, 0.05, 1 / 256, 0, False),
        (3, 0.3, 1 / 255, -128, True),
        (5, 0.001, 1 / 128, 3, True),
        (10, 1.7, 0.01, 100, False),
        (4, 0.02, 1e-4, 0, False),
        (4, 0.02, 2.0, 9, False),
    ):
        low, high = (-128, 127) if signed else (0, 255)
        op = Softmax(F32(scale), F32(y_scale), low, high, zero, length)
        name = f"of {length}, scales {scale:.3g} and {y_scale:.3g}"
        yield Case(name, op, (Type((length,), low, high),))
        yield Case(f"{name}, in rows", op, (Type((2, 3, length), low, high),))
        if length <= 2:
            yield Case(f"{name}, of few codes", op, (Type((length,), 0, 15),))
        if length == 3:
            yield Case(f"{name}, of very few codes", op, (Type((length,), -3, 4),))


CASES: tuple[Case, ...] = (
    *layouts(),
    *denses(),
    *convs(),
    *requantizes(),
    *tables(),
    *pairwises(),
    *maxima(),
    *means(),
    *softmaxes(),
)
