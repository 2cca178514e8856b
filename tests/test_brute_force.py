"""Verdicts against brute force: random small networks and properties, every code vector of the box
run by onnxruntime.

What counts as true is found without qverify: onnxruntime itself says where its quantizers step
(bisection over float32), and what comes out for one input of every cell; the rows are evaluated in
integers. Each network is verified with the defaults and with other options, and every
counterexample is checked on its own.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from math import lcm, prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from qverify import Options, Verdict, Witness, runtime, verify
from qverify.errors import UnsupportedModel
from qverify.frontend.rules.softmax import OLDEST as OLDEST_SOFTMAX
from qverify.search.branch import RULES
from tests.graphs import ROUNDS, Array, Graph, exact_products, write

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the formulas are those of x86-64"
)

Rng = np.random.Generator
F32 = np.float32
U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
CHUNKS, EACH = 20, 16
MOST = 4_096  # code vectors in a box

# -- random networks -------------------------------------------------------------------------------


@dataclass
class Codes:
    """A quantized tensor of a graph under construction: its name, shape without the batch, scale
    and zero point."""

    name: str
    shape: tuple[int, ...]
    scale: np.float32
    zero: Array

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass
class Net:
    """A random network. `doors` are the outputs of its input quantizers; `step` is about one code's
    width in the input."""

    rng: Rng
    g: Graph = field(default_factory=lambda: Graph(21))
    dtype: np.dtype[Any] = U8
    shape: tuple[int, ...] = ()
    x: str = ""
    integer: bool = False
    step: float = 1.0
    centre: float = 0.0
    doors: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return prod(self.shape)

    def zero(self) -> Array:
        info = np.iinfo(self.dtype)
        usual = (
            info.min,
            info.max,
            0,
            (info.min + info.max + 1) // 2,
            int(self.rng.integers(info.min, info.max + 1)),
        )
        return np.asarray(self.rng.choice(usual), self.dtype)

    def scale(self, size: float = 1.0) -> np.float32:
        kind = self.rng.integers(3)
        value = (
            2.0 ** self.rng.integers(-2, 3)
            if kind == 0
            else self.rng.integers(1, 40) / (10 if kind == 1 else 8)
        )
        return F32(value * size)

    def weight(self, *shape: int) -> Array:
        dtype = U8 if self.dtype == U8 and self.rng.random() < 0.5 else S8
        info = np.iinfo(dtype)
        w = self.rng.integers(info.min, info.max + 1, shape)
        return (w if exact_products() or dtype == U8 else w // 2).astype(dtype)

    def door(self, x: str) -> Codes:
        """Quantize the float input."""
        s, z = self.scale(0.1), self.zero()
        name = self.g.quantize(x, s, z)
        self.doors.append(name)
        self.step = float(s)
        return Codes(name, self.shape, s, z)


def begin(net: Net) -> Codes:
    """The input and its quantizer, sometimes after float steps; or integers, taken as they are."""
    rng, g = net.rng, net.g
    net.dtype = U8 if rng.random() < 0.6 else S8
    count = int(rng.choice([2, 2, 3, 3, 4]))
    net.shape = ((count,), (1, count), (count, 1), (1, 1, count))[rng.integers(4)]
    form = rng.integers(8)
    net.integer = bool(form == 0)
    net.x = g.input(("n", *net.shape), net.dtype if net.integer else F32)
    if net.integer:
        net.centre = float(np.mean([np.iinfo(net.dtype).min, np.iinfo(net.dtype).max]))
        return Codes(net.x, net.shape, F32(0.1), net.zero())
    if form > 3:
        x = net.door(net.x)
        net.centre = float(rng.normal() * 20 * net.step)
        return x
    mean, factor = (
        F32(rng.choice([0.0, 0.5, -1.25, 0.1307])),
        F32(rng.choice([-2.0, 0.3081, 0.5, -0.7, 3.0])),
    )
    if form == 1:
        x = net.door(g.node("Div", g.node("Sub", net.x, g.f32(mean)), g.f32(factor)))
        net.step *= abs(float(factor))
    elif form == 2:
        x = net.door(g.node("Add", g.node("Mul", net.x, g.f32(factor)), g.f32(mean)))
        net.step /= abs(float(factor))
    else:
        x = net.door(g.node("Clip", net.x, g.f32(-1.0), g.f32(2.0)))
    net.centre = float(rng.normal() * 5 * net.step)
    return x


def parameters(net: Net, x: Codes) -> tuple[str, str]:
    return net.g.f32(x.scale), net.g.const(x.zero)


def result(
    net: Net, name: str, shape: tuple[int, ...], size: float
) -> tuple[Codes, tuple[str, str]]:
    y = Codes(name, shape, net.scale(size), net.zero())
    return y, parameters(net, y)


def dense(net: Net, x: Codes) -> Codes:
    rng, g = net.rng, net.g
    width = int(rng.integers(1, 5))
    if len(x.shape) > 1 and rng.random() < 0.5:
        x = reshape(net, x, (x.size,))
    w, depth = net.weight(x.shape[-1], width), x.shape[-1]
    w_scale, w_zero = (
        net.scale(0.02),
        np.zeros((), w.dtype) if rng.random() < 0.5 else w.reshape(-1)[0],
    )
    y, ends = result(net, "", (*x.shape[:-1], width), float(x.scale * w_scale) * 30 * depth**0.5)
    if len(x.shape) == 1 and rng.random() < 0.5:
        bias = g.const(rng.integers(-4_000, 4_000, width), np.int32)
        y.name = g.node(
            "QGemm",
            x.name,
            *parameters(net, x),
            g.const(w),
            g.f32(w_scale),
            g.const(w_zero),
            bias,
            *ends,
        )
    else:
        y.name = g.node(
            "QLinearMatMul",
            x.name,
            *parameters(net, x),
            g.const(w),
            g.f32(w_scale),
            g.const(w_zero),
            *ends,
        )
    return y


def reshape(net: Net, x: Codes, shape: tuple[int, ...]) -> Codes:
    return Codes(
        net.g.node("Reshape", x.name, net.g.const(np.array([0, *shape]))), shape, x.scale, x.zero
    )


def conv(net: Net, x: Codes) -> Codes:
    rng, g = net.rng, net.g
    if len(x.shape) < 2:
        x = reshape(net, x, (1, x.size) if rng.random() < 0.5 else (1, 1, x.size))
    filters, rank = int(rng.integers(1, 4)), len(x.shape) - 1
    kernel = tuple(int(rng.integers(1, min(n, 2) + 1)) for n in x.shape[1:])
    pads = [int(v) for v in rng.integers(0, 2, 2 * rank)]
    shape = tuple(n + pads[i] + pads[rank + i] - kernel[i] + 1 for i, n in enumerate(x.shape[1:]))
    w = net.weight(filters, x.shape[0], *kernel)
    w_scale, w_zero = (
        net.scale(0.02),
        np.zeros((), w.dtype) if rng.random() < 0.5 else w.reshape(-1)[0],
    )
    y, ends = result(net, "", (filters, *shape), float(x.scale * w_scale) * 40)
    bias = g.const(rng.integers(-4_000, 4_000, filters), np.int32)
    y.name = g.node(
        *(
            "QLinearConv",
            x.name,
            *parameters(net, x),
            g.const(w),
            g.f32(w_scale),
            g.const(w_zero),
            *ends,
            bias,
        ),
        pads=pads,
    )
    return y


def two(net: Net, x: Codes) -> Codes:
    """QLinearAdd or QLinearMul with itself, a part of itself, or a constant."""
    rng, g = net.rng, net.g
    name = "QLinearAdd" if rng.random() < 0.6 else "QLinearMul"
    kind = rng.integers(3)
    other = x
    if kind == 0:
        s, z = net.scale(float(x.scale)), net.zero()
        info = np.iinfo(net.dtype)
        shape = x.shape if rng.random() < 0.5 else x.shape[-1:] if rng.random() < 0.5 else ()
        value = rng.integers(info.min, info.max + 1, shape).astype(net.dtype)
        other = Codes(g.const(value), shape, s, z)
    elif kind == 1:
        cut = g.node(
            "Slice",
            x.name,
            g.const(np.array([0])),
            g.const(np.array([1])),
            g.const(np.array([len(x.shape)])),
        )
        other = Codes(cut, (*x.shape[:-1], 1), net.scale(float(x.scale)), net.zero())
    size = float(x.scale) * 1.5 if name == "QLinearAdd" else float(x.scale * other.scale) * 60
    y, ends = result(net, "", x.shape, size)
    a, b = (x, other) if rng.random() < 0.5 else (other, x)
    y.name = g.node(name, a.name, *parameters(net, a), b.name, *parameters(net, b), *ends)
    return y


def activation(net: Net, x: Codes) -> Codes:
    name = ("QLinearLeakyRelu", "QLinearSigmoid")[net.rng.integers(2)]
    y, ends = result(net, "", x.shape, 0.02 if name == "QLinearSigmoid" else float(x.scale))
    attributes: dict[str, Any] = {"alpha": 0.3} if name == "QLinearLeakyRelu" else {}
    y.name = net.g.node(name, x.name, *parameters(net, x), *ends, **attributes)
    return y


def softmax(net: Net, x: Codes) -> Codes:
    y, _ = result(net, "", x.shape, 1.0)
    y.scale = F32(1 / 256)
    scale = net.g.f32(net.scale(0.05))
    ends = parameters(net, y)
    y.name = net.g.node(
        "QLinearSoftmax", x.name, scale, net.g.const(x.zero), *ends, axis=-1, opset=13
    )
    return y


def pool(net: Net, x: Codes) -> Codes:
    rng, g = net.rng, net.g
    if len(x.shape) < 2:
        x = reshape(net, x, (1, x.size))
    kernel = [min(n, 2) for n in x.shape[1:]]
    shape = (x.shape[0], *(n - k + 1 for n, k in zip(x.shape[1:], kernel, strict=True)))
    kind = rng.integers(3)
    if kind == 0:
        return Codes(g.node("MaxPool", x.name, kernel_shape=kernel), shape, x.scale, x.zero)
    y, ends = result(
        net, "", shape if kind == 1 else (x.shape[0], *([1] * len(kernel))), float(x.scale)
    )
    if kind == 1:
        y.name = g.node(
            "QLinearAveragePool", x.name, *parameters(net, x), *ends, kernel_shape=kernel
        )
    else:
        y.name = g.node(
            "QLinearGlobalAveragePool", x.name, *parameters(net, x), *ends, channels_last=0
        )
    return y


def joint(net: Net, x: Codes) -> Codes:
    """QLinearConcat or QLinearWhere of the value and a shuffled copy of it."""
    rng, g = net.rng, net.g
    order = g.const(rng.permutation(x.shape[-1]))
    other = Codes(
        g.node("Gather", x.name, order, axis=len(x.shape)),
        x.shape,
        net.scale(float(x.scale)),
        net.zero(),
    )
    if rng.random() < 0.5:
        y, ends = result(net, "", (*x.shape[:-1], 2 * x.shape[-1]), float(x.scale))
        parts = (x.name, *parameters(net, x), other.name, *parameters(net, other))
        y.name = g.node("QLinearConcat", *ends, *parts, axis=len(x.shape))
        return y
    y, ends = result(net, "", x.shape, float(x.scale))
    condition = g.const(rng.random(x.shape) < 0.5)
    y.name = g.node(
        "QLinearWhere",
        condition,
        x.name,
        *parameters(net, x),
        other.name,
        *parameters(net, other),
        *ends,
    )
    return y


def clip(net: Net, x: Codes) -> Codes:
    info = np.iinfo(net.dtype)
    low, high = np.sort(net.rng.integers(info.min, info.max + 1, 2)).astype(net.dtype)
    name = net.g.node("Clip", x.name, net.g.const(low), net.g.const(high))
    return Codes(name, x.shape, x.scale, x.zero)


def island(net: Net, x: Codes) -> Codes:
    """Floats between codes: onnxruntime fuses some of these groups, and runs others as they
    stand."""
    rng, g = net.rng, net.g
    v = g.dequantize(x.name, x.scale, x.zero)
    shape = x.shape
    kind = ("Tanh", "HardSwish", "Erf", "Relu", "LeakyRelu", "Neg", "Mul", "Add", "Mean", "Both")[
        rng.integers(10)
    ]
    if kind == "Mean":
        v = g.node("ReduceMean", v, g.const(np.array([-1])), keepdims=1)
        shape = (*x.shape[:-1], 1)
    elif kind == "Both":
        v = g.node(
            rng.choice(["Add", "Sub", "Mul"]),
            v,
            g.dequantize(x.name, net.scale(float(x.scale)), x.zero),
        )
    elif kind in ("Mul", "Add"):
        v = g.node(kind, v, g.f32(net.scale() * rng.choice([-1, 1])))
    else:
        v = g.node(kind, v)
    y, _ = result(net, "", shape, 0.02 if kind in ("Tanh", "Erf") else float(x.scale))
    y.name = g.quantize(v, y.scale, y.zero)
    return y


def fused(net: Net, x: Codes) -> Codes:
    """Gemm or Conv in QDQ form, which onnxruntime fuses to QGemm or QLinearConv."""
    rng, g = net.rng, net.g
    v = g.dequantize(x.name, x.scale, x.zero)
    w_scale = net.scale(0.02)
    if len(x.shape) == 1:
        width = int(rng.integers(1, 5))
        w = net.weight(width, x.size)
        shape: tuple[int, ...] = (width,)
    else:
        width = int(rng.integers(1, 4))
        w = net.weight(width, x.shape[0], *([1] * (len(x.shape) - 1)))
        shape = (width, *x.shape[1:])
    bias = g.const(rng.integers(-4_000, 4_000, width), np.int32)
    b = g.dequantize(bias, F32(x.scale * w_scale), np.zeros((), np.int32))
    d = g.dequantize(g.const(w), w_scale, np.zeros((), w.dtype))
    v = g.node("Gemm", v, d, b, transB=1) if len(x.shape) == 1 else g.node("Conv", v, d, b)
    y, _ = result(net, "", shape, float(x.scale * w_scale) * 40)
    y.name = g.quantize(v, y.scale, y.zero)
    return y


OPERATORS: tuple[Callable[[Net, Codes], Codes], ...] = (
    dense,
    dense,
    conv,
    two,
    two,
    activation,
    softmax,
    pool,
    joint,
    clip,
)
if runtime.release() < OLDEST_SOFTMAX:  # refused by name
    OPERATORS = tuple(conv if operator is softmax else operator for operator in OPERATORS)
FLOATS = (island, island, fused, fused)


def end(net: Net, x: Codes) -> None:
    """Codes, floats, or a scaled accumulator."""
    rng, g = net.rng, net.g
    if x.size > 6:
        x = Codes(
            g.node("Slice", x.name, g.const([0]), g.const([2]), g.const([len(x.shape)])),
            (),
            x.scale,
            x.zero,
        )
    form = rng.integers(4)
    if form == 0:
        net.outputs.append(x.name)
    elif form == 1 and x.shape:
        w = net.weight(x.shape[-1], int(rng.integers(1, 4)))
        acc = g.node("MatMulInteger", x.name, g.const(w), g.const(x.zero))
        y = g.node("Mul", g.node("Cast", acc, to=1), g.f32(net.scale(0.003)))
        net.outputs.append(g.node("Add", y, g.f32(net.scale())) if rng.random() < 0.5 else y)
    else:
        net.outputs.append(g.dequantize(x.name, x.scale, x.zero))
        if form == 2 and rng.random() < 0.5:
            net.outputs.append(g.node("Identity", x.name))


def network(rng: Rng) -> Net:
    net = Net(rng)
    x = begin(net)
    # another quantizer of the input
    second = net.door(net.x) if not net.integer and rng.random() < 0.06 else None
    kinds = OPERATORS if rng.random() < 0.5 else (*OPERATORS, *FLOATS, *FLOATS)
    for _ in range(int(rng.integers(1, 4))):
        x = kinds[int(rng.integers(len(kinds)))](net, x)
    if second is not None and x.size * second.size <= 12:
        x, second = reshape(net, x, (x.size,)), reshape(net, second, (second.size,))
        y, ends = result(net, "", (x.size + second.size,), float(x.scale))
        y.name = net.g.node(
            *(
                "QLinearConcat",
                *ends,
                x.name,
                *parameters(net, x),
                second.name,
                *parameters(net, second),
            ),
            axis=1,
        )
        x = dense(net, y)
    end(net, x)
    return net


# -- what is true ----------------------------------------------------------------------------------


def session(net: Net, outputs: list[str], path: Path) -> Callable[[Array], list[Array]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    write(net.g.model(*outputs), path)
    model = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: Array) -> list[Array]:
        """`x` [N, elements] -> the outputs, each [N, elements]."""
        x = x.astype(net.dtype if net.integer else F32).reshape(len(x), *net.shape)
        return [np.asarray(y).reshape(len(x), -1) for y in model.run(None, {net.x: x})]

    return run


def ordinal(x: Array) -> npt.NDArray[np.int64]:
    bits = np.asarray(x, F32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def number(k: Array) -> npt.NDArray[np.float32]:
    bits = np.where(k < 0, -k | 0x80000000, k).astype(np.uint32)
    return bits.view(F32)


Cell = tuple[float, float]


def cells(doors: Callable[[Array], list[Array]], lower: Array, upper: Array) -> list[list[Cell]]:
    """Per input element: the ends of the intervals of [lower, upper] in which all quantizers give
    the same codes."""

    def ask(element: Array, at: Array) -> list[bytes]:
        x = np.tile(lower, (len(element), 1))
        x[np.arange(len(element)), element] = number(at)
        return [row.tobytes() for row in np.concatenate(doors(x), axis=1)]

    count = len(lower)
    element, a, b = np.arange(count), ordinal(lower), ordinal(upper)
    # Last ordinals of all cells but the last one.
    borders: list[list[int]] = [[] for _ in range(count)]
    left, right = ask(element, a), ask(element, b)
    while len(element):
        differ = np.array([one != other for one, other in zip(left, right, strict=True)])
        done = differ & (b - a == 1)
        for i, last in zip(element[done], a[done], strict=True):
            borders[i].append(int(last))
        at = np.flatnonzero(differ & ~done)
        element, a, b = element[at], a[at], b[at]
        if not len(at):
            break
        left, right = [left[i] for i in at], [right[i] for i in at]
        middle = (a + b) // 2
        half = ask(element, middle)
        element, a, b = np.r_[element, element], np.r_[a, middle], np.r_[middle, b]
        left, right = left + half, half + right
    found = []
    for i in range(count):
        last = [*sorted(borders[i]), int(ordinal(upper)[i])]
        first = [int(ordinal(lower)[i]), *(k + 1 for k in last[:-1])]
        found.append(
            [
                (float(number(np.array(p))), float(number(np.array(q))))
                for p, q in zip(first, last, strict=True)
            ]
        )
    return found


@dataclass(frozen=True)
class Row:
    """sum x[i] X_i + sum y[j] Y_j <= rhs, or < rhs."""

    x: dict[int, Fraction]
    y: dict[int, Fraction]
    rhs: Fraction
    strict: bool

    def text(self, rng: Rng) -> str:
        """One of its spellings."""
        sign = int(rng.choice([-1, 1]))
        relation = ("<" if sign > 0 else ">") + ("" if self.strict else "=")
        terms = [
            (f"{v}_{i}", sign * c)
            for v, part in (("X", self.x), ("Y", self.y))
            for i, c in part.items()
        ]
        if sorted(c for _, c in terms) == [-1, 1] and not self.rhs:
            (one, c), (other, _) = terms
            return f"({relation} {one} {other})" if c > 0 else f"({relation} (- {one}) (- {other}))"
        words = [name if c == 1 else f"(* {decimal(c)} {name})" for name, c in terms]
        left = words[0] if len(words) == 1 else f"(+ {' '.join(words)})"
        return f"({relation} {left} {decimal(sign * self.rhs)})"


def decimal(value: Fraction) -> str:
    """A terminating decimal, written out."""
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    text = str(abs(value * 10**digits)).rjust(digits + 1, "0")
    return ("-" if value < 0 else "") + (f"{text[:-digits]}.{text[-digits:]}" if digits else text)


@dataclass(frozen=True, eq=False)
class Points:
    """One input of every cell of a box: the cell's ends [N, inputs], and onnxruntime's outputs
    there, as integers over one denominator [N, outputs]."""

    first: Array
    last: Array
    y: npt.NDArray[Any]
    unit: int

    def totals(self, y: dict[int, Fraction]) -> tuple[npt.NDArray[Any], int]:
        """sum y[j] Y_j at all points, as integers over a denominator."""
        common = lcm(*(c.denominator for c in y.values()))
        total = sum(
            (int(c * common) * self.y[:, j] for j, c in y.items()), np.zeros(len(self.y), object)
        )
        return total, common * self.unit

    def holds(self, row: Row, slack: int = 0) -> npt.NDArray[np.bool_]:
        """[N]: whether the row holds somewhere in the cell (with the inputs at its best corner);
        with `slack` 1 by any reading of its numbers, or more, with -1 by every one, or less."""
        total, unit = self.totals(row.y)
        rhs = np.full(len(total), (row.rhs + slack * self.blur(row)) * unit, object)
        for i, c in row.x.items():
            best = self.first[:, i] if c > 0 else self.last[:, i]
            rhs = rhs - np.array([c * unit * Fraction(float(v)) for v in best], object)
        result: npt.NDArray[np.bool_] = ((total < rhs) if row.strict else (total <= rhs)).astype(
            bool
        )
        return result

    def blur(self, row: Row) -> Fraction:
        """More than rounding can do to a row: in double, and in float32 to the inputs."""
        if sorted([*row.x.values(), *row.y.values()]) == [-1, 1] and not row.rhs and not row.x:
            return Fraction(0)
        y = (
            sum((abs(c) * max(abs(v) for v in self.y[:, j]) for j, c in row.y.items()), Fraction(0))
            / self.unit
        )
        x = [
            abs(c) * Fraction(float(max(-self.first[:, i].min(), self.last[:, i].max())))
            for i, c in row.x.items()
        ]
        return (
            (abs(row.rhs) + y) / 2**45
            + sum(x, Fraction(0)) / 2**22
            + (Fraction(1, 10**40) if row.x else 0)
        )

    def verdicts(self, cases: list[list[Row]]) -> set[Verdict]:
        """What may be said: where readings of the property's numbers differ, also `unknown`."""
        unsafe = [
            any(
                np.logical_and.reduce([self.holds(row, slack) for row in case]).any()
                for case in cases
            )
            for slack in (-1, 0, 1)
        ]
        exact = Verdict.SAT if unsafe[1] else Verdict.UNSAT
        return {exact} if unsafe[0] == unsafe[2] else {exact, Verdict.UNKNOWN}


def points_of(net: Net, lower: list[Fraction], upper: list[Fraction], path: Path) -> Points | None:
    """None where the box has too many cells."""
    if net.integer:
        whole = [range(-(-a // 1), b // 1 + 1) for a, b in zip(lower, upper, strict=True)]
        per_element = [[(float(v), float(v)) for v in values] for values in whole]
    else:
        ends = [float_ends(a, b) for a, b in zip(lower, upper, strict=True)]
        first, last = (np.array(side, F32) for side in zip(*ends, strict=True))
        per_element = cells(session(net, net.doors, path), first, last)
    if prod(len(c) for c in per_element) > MOST:
        return None
    both = np.array(list(product(*per_element)))  # [N, inputs, 2]
    at = np.where(net.rng.random(both.shape[:2]) < 0.5, both[:, :, 0], both[:, :, 1])
    y = np.concatenate(
        [part.astype(np.float64) for part in session(net, net.outputs, path)(at)], axis=1
    )
    assert np.isfinite(y).all()
    ratios = [[float(v).as_integer_ratio() for v in row] for row in y]
    unit = max(q for row in ratios for _, q in row)
    integers = np.empty(y.shape, object)
    for k, row in enumerate(ratios):
        integers[k] = [p * (unit // q) for p, q in row]
    return Points(both[:, :, 0], both[:, :, 1], integers, unit)


def float_ends(low: Fraction, high: Fraction) -> tuple[np.float32, np.float32]:
    """Least and largest float32 that lie in [low, high] or are the rounding of an end."""
    first, last = F32(float(low)), F32(float(high))
    below, above = np.nextafter(first, F32(-np.inf)), np.nextafter(last, F32(np.inf))
    first = below if Fraction(float(below)) >= low else first
    last = above if Fraction(float(above)) <= high else last
    return first, last


# -- random properties -----------------------------------------------------------------------------


def random_box(net: Net, most: int) -> tuple[list[Fraction], list[Fraction]]:
    """Decimals; up to about `most` codes wide in each element, sometimes a point."""
    rng, lower, upper = net.rng, [], []
    for _ in range(net.size):
        if net.integer:
            info = np.iinfo(net.dtype)
            a = int(rng.integers(info.min, info.max + 1))
            b = min(a + int(rng.integers(0, most)), int(info.max))
            half = Fraction(int(rng.integers(0, 2)), 2)
            lower.append(a - half)
            upper.append(b + half)
        else:
            width = 0.0 if rng.random() < 0.08 else rng.uniform(0, most) * net.step
            start, digits = (
                net.centre + rng.normal() * 10 * net.step,
                int(rng.choice([1, 3, 6, 12])),
            )
            lower.append(Fraction(f"{start:.{digits}f}"))
            upper.append(max(lower[-1], Fraction(f"{start + width:.{digits}f}")))
    return lower, upper


def random_case(rng: Rng, points: Points) -> list[Row]:
    """Rows about the outputs that occur: between them, at their ends, and often exactly on one of
    them.

    All rows agree in the signs of the inputs, so that one corner of a cell is best for all.
    """
    inputs, outputs = points.first.shape[1], points.y.shape[1]
    signs, mixed = rng.choice([-1, 1], inputs), rng.random() < 0.12
    rows = []
    for _ in range(int(rng.integers(1, 4))):
        chosen = [int(j) for j in rng.permutation(outputs)[: rng.integers(1, 3)]]
        if rng.random() < 0.5:
            sizes = [Fraction(1), Fraction(-1)]
        else:
            sizes = [
                Fraction(int(rng.choice([-7, -3, -2, 1, 4, 9])), int(rng.choice([1, 2, 10])))
                for _ in "ab"
            ]
        flip = int(rng.choice([-1, 1]))
        y = {j: flip * c for j, c in zip(chosen, sizes, strict=False)}
        x: dict[int, Fraction] = {}
        if mixed and rng.random() < 0.7:
            for i in rng.permutation(inputs)[: rng.integers(1, 3)]:
                x[int(i)] = int(signs[i]) * Fraction(
                    int(rng.integers(1, 9)), int(rng.choice([1, 4, 10]))
                )
        total, unit = points.totals(y)
        k = int(total.argmin()) if rng.random() < 0.4 else int(rng.integers(len(total)))
        rhs = Fraction(int(total[k]), unit) + sum(
            c * Fraction(float(points.first[k, i])) for i, c in x.items()
        )
        if rng.random() < 0.3:
            rhs += Fraction(int(rng.integers(-9, 10)), 8)
        elif not x and len(y) == 2 and rng.random() < 0.3:
            rhs = Fraction(0)
        rows.append(Row(x, y, rhs, bool(rng.random() < 0.5)))
    return rows


def specification(
    net: Net, lower: list[Fraction], upper: list[Fraction], outputs: int, cases: list[list[Row]]
) -> str:
    lines = [f"(declare-const X_{i} Real)" for i in range(net.size)]
    lines += [f"(declare-const Y_{j} Real)" for j in range(outputs)]
    for i, (a, b) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (>= X_{i} {decimal(a)}))", f"(assert (<= X_{i} {decimal(b)}))"]
    words = [[row.text(net.rng) for row in case] for case in cases]
    if len(words) == 1 and net.rng.random() < 0.5:
        lines += [f"(assert {row})" for row in words[0]]
    else:
        conjunctions = [f"(and {' '.join(case)})" for case in words]
        lines.append(f"(assert (or {' '.join(conjunctions)}))")
    return "\n".join(lines)


# -- the test --------------------------------------------------------------------------------------


def check_witness(net: Net, witness: Witness, box: Any, cases: list[list[Row]], path: Path) -> None:
    """The decimals lie in the box and round to what was fed; on that, onnxruntime's outputs satisfy
    a case exactly."""
    texts = [Fraction(text) for text in witness.input_text]
    assert all(a <= v <= b for a, v, b in zip(box[0], texts, box[1], strict=True))
    (fed,) = witness.inputs
    flat = fed.reshape(-1)
    rounded = [F32(float(text)) for text in witness.input_text]
    assert fed.dtype == (net.dtype if net.integer else F32)
    assert [float(v) for v in flat] == (
        [int(v) for v in texts] if net.integer else [float(v) for v in rounded]
    )
    y = np.concatenate(
        [part[0] for part in session(net, net.outputs, path)(flat[None])], dtype=np.float64
    )
    np.testing.assert_array_equal(
        y, np.concatenate([v.reshape(-1) for v in witness.outputs], dtype=np.float64)
    )

    def value(row: Row) -> Fraction:
        total = sum((c * Fraction(float(y[j])) for j, c in row.y.items()), Fraction(0))
        return total + sum((c * Fraction(float(flat[i])) for i, c in row.x.items()), Fraction(0))

    assert any(
        all(value(r) < r.rhs if r.strict else value(r) <= r.rhs for r in case) for case in cases
    )


def options_of(rng: Rng, k: int) -> Iterator[Options]:
    """The defaults, and others: every branching rule comes by, with and without the attack."""
    yield Options(device="cpu")
    rule = list(RULES)[k % len(RULES)]
    yield Options(
        device="cpu", branch=rule, attack=k % 2 == 0, batch=int(rng.choice([1, 5, 64])), seed=k
    )


@pytest.mark.parametrize("chunk", range(CHUNKS * ROUNDS))
def test_verdict_equals_brute_force(chunk: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([2026, chunk])
    path, model, spec = tmp_path / "part.onnx", tmp_path / "model.onnx", tmp_path / "spec.vnnlib"
    verdicts: list[Verdict] = []
    refused = 0
    while len(verdicts) < EACH:
        net = network(rng)
        # few codes go together where two quantizers read one input, and that is slow to find
        wide = len(net.doors) < 2
        box = random_box(net, {2: 50, 3: 15, 4: 8}[net.size] if wide else 6)
        points = points_of(net, *box, path)
        if points is None:
            continue
        rarer = min((Verdict.SAT, Verdict.UNSAT), key=verdicts.count)
        for _ in range(5):  # for about as many of either
            cases = [random_case(rng, points) for _ in range(int(rng.integers(1, 4)))]
            unsafe = any(
                np.logical_and.reduce([points.holds(row) for row in case]).any() for case in cases
            )
            expected = Verdict.SAT if unsafe else Verdict.UNSAT
            if expected == rarer:
                break
        allowed = points.verdicts(cases)
        write(net.g.model(*net.outputs), model)
        spec.write_text(specification(net, *box, points.y.shape[1], cases))
        try:
            for options in options_of(rng, chunk + len(verdicts)):
                result = verify(model, spec, options)
                assert result.verdict in allowed, (
                    result,
                    options,
                    [n.op_type for n in net.g.nodes],
                )
                if result.witness is not None:
                    check_witness(net, result.witness, box, cases, path)
        except UnsupportedModel:
            refused += 1
            continue
        verdicts.append(expected)
    # >= 100 in all.
    assert verdicts.count(Verdict.SAT) >= EACH // 5 and verdicts.count(Verdict.UNSAT) >= EACH // 5
    assert refused <= EACH // 2
