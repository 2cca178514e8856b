"""Every op that is read, against onnxruntime, bit for bit: the file is read, run as integers, and
run by onnxruntime.

Each entry of OPS makes random graphs of one op in its forms (QOperator, QDQ, types, zero points at
the ends, scales over orders of magnitude and scales that make ties). At least VALUES output values
are compared for each, and no difference is allowed. `QVERIFY_TEST_ROUNDS=10 pytest
tests/frontend/test_onnxruntime_ops.py` makes ten times as many.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented

from qverify import runtime
from qverify.boundary.leaves import make_leaves
from qverify.boundary.outputs import make_decoder
from qverify.errors import UnsupportedModel
from qverify.frontend.encoder import make_encoder
from qverify.frontend.model import read_model
from qverify.frontend.rules import softmax
from qverify.kernels import open_kernels
from tests.graphs import ROUNDS, Array, Graph, exact_products, write

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the formulas are those of x86-64"
)

Rng = np.random.Generator
CPU = open_kernels("cpu")
VALUES = 500_000
U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
EIGHT = (U8, S8)


@dataclass(frozen=True, eq=False)
class Case:
    """A graph and its inputs, and what it is about. With a batch axis "n" every input holds as many
    samples.

    `kernel` is False where onnxruntime 1.32 has no kernel: then the case is left out, unless a
    later version has one.
    """

    model: onnx.ModelProto
    feeds: tuple[Array, ...]
    what: str = ""
    kernel: bool = True


OPS: dict[str, Callable[[Rng], Iterator[Case]]] = {}
TARGET: dict[str, int] = {}  # values to compare: VALUES, fewer where a graph gives few


def op(
    name: str, values: int = VALUES
) -> Callable[[Callable[[Rng], Iterator[Case]]], Callable[[Rng], Iterator[Case]]]:
    """Register one round of graphs; it is repeated with fresh random numbers until enough values
    were compared."""

    def register(cases: Callable[[Rng], Iterator[Case]]) -> Callable[[Rng], Iterator[Case]]:
        OPS[name] = cases
        TARGET[name] = values
        return cases

    return register


# -- random parameters -----------------------------------------------------------------------------


def codes(rng: Rng, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Codes of the whole range, its ends among them more often than the others."""
    info = np.iinfo(np.dtype(dtype))
    values = rng.integers(info.min, info.max + 1, shape)
    ends = rng.random(shape)
    values = np.where(ends < 0.03, info.min, np.where(ends > 0.97, info.max, values))
    return values.astype(dtype)


def weights(rng: Rng, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Codes; small ones where the CPU's uint8 x int8 products saturate (what it computes then is
    not what we verify)."""
    w = codes(rng, shape, dtype)
    return w if exact_products() or np.dtype(dtype) == U8 else w // 2


def zero_point(rng: Rng, dtype: npt.DTypeLike, shape: tuple[int, ...] = ()) -> Array:
    info = np.iinfo(np.dtype(dtype))
    usual = [
        info.min,
        info.max,
        0,
        (info.min + info.max + 1) // 2,
        *rng.integers(info.min, info.max + 1, 2),
    ]
    return rng.choice(usual, shape).astype(dtype)


def scale(rng: Rng, shape: tuple[int, ...] = (), size: float = 1.0) -> Array:
    """About `size`: powers of two and small multiples of them (many ties), k / 255, and anything,
    over two decades."""
    kind = rng.integers(4)
    if kind == 0:
        value = 2.0 ** rng.integers(-3, 4, shape)
    elif kind == 1:
        value = rng.integers(1, 16, shape) / 8
    elif kind == 2:
        value = rng.integers(1, 512, shape) / 255
    else:
        value = 10 ** rng.uniform(-1, 1, shape)
    return np.asarray(value * size, np.float32)


def magnitude(rng: Rng) -> float:
    """Anything between very small and very large; a power of two half of the time, which keeps
    ties."""
    return float(2.0 ** rng.integers(-30, 30) if rng.random() < 0.5 else 10 ** rng.uniform(-9, 9))


def floats(rng: Rng, shape: tuple[int, ...], step: float) -> Array:
    """Multiples and half multiples of `step`, their neighbours, and values of all sizes."""
    k = rng.integers(-300, 301, shape) / 2
    x = (k * np.float32(step)).astype(np.float32)
    kind = rng.random(shape)
    with np.errstate(over="ignore"):
        x = np.where(kind < 0.25, np.nextafter(x, np.float32(np.inf)), x)
        x = np.where((kind > 0.25) & (kind < 0.5), np.nextafter(x, np.float32(-np.inf)), x)
    wild = rng.normal(size=shape) * 10 ** rng.uniform(-44, 38, shape)
    special = rng.choice([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.17549435e-38], shape)
    x = np.where(kind > 0.95, wild, np.where((kind > 0.92) & (kind <= 0.95), special, x))
    return np.clip(x, -3.4e38, 3.4e38).astype(np.float32)


# -- comparing -------------------------------------------------------------------------------------


def session(path: Path) -> Any:
    """onnxruntime with default options (quiet, and not spinning where tests share two cores)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(case: Case, path: Path) -> int:
    """Assert that qverify and onnxruntime agree on every output value; how many those are."""
    write(case.model, path)
    try:
        runtime = session(path)
    except NotImplemented:
        if case.kernel:
            raise
        return 0
    lowered = read_model(path).lowered
    sizes = [int(np.prod(shape)) for _, shape, _ in lowered.inputs]
    samples = case.feeds[0].size // sizes[0]
    x = np.concatenate([f.reshape(samples, -1).astype(np.float64) for f in case.feeds], axis=1)
    got = make_decoder(lowered).decode(lowered.network.run(CPU, make_encoder(lowered).encode(x)))
    names = [item.name for item in case.model.graph.input]
    outputs = runtime.run(None, dict(zip(names, case.feeds, strict=True)))
    want = np.concatenate([np.asarray(y, np.float64).reshape(samples, -1) for y in outputs], axis=1)
    wrong = np.argwhere(got != want)
    if len(wrong):
        i, j = wrong[0]
        about = [f"{n.op_type} {n.name}" for n in case.model.graph.node]
        raise AssertionError(
            f"{case.what}: {len(wrong)} of {got.size} values differ, first sample {i} output {j}: "
            f"{got[i, j]!r} instead of {want[i, j]!r}; input {x[i, :8]}...; nodes {about}; kept as "
            f"{path}"
        )
    return int(got.size)


# -- quantizers ------------------------------------------------------------------------------------


@op("QuantizeLinear")
def quantize_linear(rng: Rng) -> Iterator[Case]:
    for opset in (10, 13, 19, 21, 23):
        for dtype in EIGHT:
            g, step = Graph(opset), scale(rng, (), magnitude(rng))
            x = g.input((1, 30_000))
            model = g.model(g.quantize(x, step, zero_point(rng, dtype)))
            yield Case(model, (floats(rng, (1, 30_000), float(step)),), f"opset {opset} {dtype}")
            if opset < 13:
                continue
            g, steps = Graph(opset), scale(rng, (6,), magnitude(rng))
            axis = int(rng.integers(-3, 3))
            shape = [30, 40, 7]
            shape[axis] = 6
            x = g.input(tuple(shape))
            model = g.model(g.quantize(x, steps, zero_point(rng, dtype, (6,)), axis=axis))
            yield Case(
                model,
                (floats(rng, tuple(shape), float(steps[0])),),
                f"opset {opset} {dtype} axis {axis}",
            )
    g, step = Graph(21), scale(rng)
    y = g.node(
        "QuantizeLinear", g.input((1, 9_999)), g.f32(step), output_dtype=int(onnx.TensorProto.INT8)
    )
    yield Case(g.model(y), (floats(rng, (1, 9_999), float(step)),), "output_dtype")
    g = Graph(21)
    y = g.node("QuantizeLinear", g.input((1, 9_999)), g.f32(step))
    yield Case(g.model(y), (floats(rng, (1, 9_999), float(step)),), "no zero point")
    g = Graph(21)
    y = g.quantize(g.input((1, 9_999)), step, zero_point(rng, U8), domain="com.microsoft")
    yield Case(g.model(y), (floats(rng, (1, 9_999), float(step)),), "com.microsoft")


@op("DequantizeLinear")
def dequantize_linear(rng: Rng) -> Iterator[Case]:
    for opset in (10, 13, 19, 21, 23):
        for dtype in EIGHT:
            g = Graph(opset)
            x = g.input((1, 20_000), dtype)
            model = g.model(g.dequantize(x, scale(rng, (), magnitude(rng)), zero_point(rng, dtype)))
            yield Case(model, (codes(rng, (1, 20_000), dtype),), f"opset {opset} {dtype}")
            if opset >= 13:
                g = Graph(opset)
                x = g.input((50, 5, 90), dtype)
                y = g.dequantize(
                    x, scale(rng, (5,), magnitude(rng)), zero_point(rng, dtype, (5,)), axis=1
                )
                yield Case(
                    g.model(y), (codes(rng, (50, 5, 90), dtype),), f"opset {opset} {dtype} per axis"
                )
    for dtype in EIGHT:
        g = Graph(21)
        y = g.node("DequantizeLinear", g.input((1, 9_999), dtype), g.f32(scale(rng)))
        yield Case(g.model(y), (codes(rng, (1, 9_999), dtype),), f"{dtype} without zero point")
        g = Graph(21)
        x = g.input((40, 256), dtype)
        acc = g.node("MatMulInteger", x, g.const(weights(rng, (256, 300), U8)))
        yield Case(
            g.model(g.node("DequantizeLinear", acc, g.f32(scale(rng, (), magnitude(rng))))),
            (codes(rng, (40, 256), dtype),),
            f"of int32, {dtype}",
        )


# -- weighted sums ---------------------------------------------------------------------------------

PAIRS = ((U8, U8), (U8, S8), (S8, S8), (S8, U8))  # activations, weights
NO_KERNEL = (S8, U8)  # for QLinearConv, QLinearMatMul, QGemm, MatMulIntegerToFloat


@dataclass(frozen=True)
class Shape:
    """A convolution's geometry: input [channels, *spatial], weight [filters, channels / group,
    *kernel]."""

    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    channels: int
    filters: int
    attributes: dict[str, Any]

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.filters, self.channels // self.attributes.get("group", 1), *self.kernel)


CONVOLUTIONS = (
    Shape((8, 8), (1, 1), 3, 5, {}),
    Shape((7, 6), (3, 3), 3, 4, {"pads": [1, 1, 1, 1]}),
    Shape((9, 8), (3, 2), 2, 3, {"pads": [2, 0, 1, 1], "strides": [2, 1]}),
    Shape((9, 9), (3, 3), 4, 4, {"group": 4, "pads": [1, 1, 1, 1]}),
    Shape((9, 9), (5, 5), 3, 6, {"group": 3, "pads": [2, 2, 2, 2], "strides": [2, 2]}),
    Shape((6, 7), (3, 3), 4, 6, {"group": 2}),
    Shape((9, 9), (3, 3), 2, 3, {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    Shape((8, 7), (3, 3), 2, 3, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Shape((8, 7), (4, 2), 2, 3, {"auto_pad": "SAME_LOWER"}),
    Shape((8, 7), (3, 3), 2, 3, {"auto_pad": "VALID", "strides": [3, 2]}),
    Shape((31,), (4,), 3, 5, {"pads": [3, 1], "strides": [2], "dilations": [2]}),
    Shape((31,), (3,), 4, 4, {"group": 4}),
    Shape((5, 4, 6), (2, 3, 3), 2, 3, {"pads": [0, 1, 1, 1, 1, 0]}),
)


@op("QLinearConv")
def qlinear_conv(rng: Rng) -> Iterator[Case]:
    for shape in CONVOLUTIONS:
        for act, wt in PAIRS:
            yield _conv_case(rng, shape, act, wt, last=False)


@op("QLinearConv channels_last")
def qlinear_conv_nhwc(rng: Rng) -> Iterator[Case]:
    for shape in CONVOLUTIONS:
        for act, wt in PAIRS:
            yield _conv_case(rng, shape, act, wt, last=True)


def _conv_case(rng: Rng, shape: Shape, act: np.dtype[Any], wt: np.dtype[Any], last: bool) -> Case:
    g = Graph(int(rng.choice([10, 13, 21])))
    dims = (*shape.spatial, shape.channels) if last else (shape.channels, *shape.spatial)
    per_channel = (shape.filters,) if rng.random() < 0.5 else ()
    x_scale, w_scale = scale(rng, (), magnitude(rng)), scale(rng, per_channel, magnitude(rng))
    y_scale = scale(
        rng, (), float(x_scale * w_scale.mean()) * 40 * np.sqrt(np.prod(shape.weight[1:]))
    )
    # ONNX wants one weight zero point per channel or one for all; onnxruntime takes equal ones only
    w_zero = np.full(per_channel, zero_point(rng, wt), wt)
    inputs = [
        *(g.input(("n", *dims), act), g.f32(x_scale), g.const(zero_point(rng, act))),
        *(g.const(weights(rng, shape.weight, wt)), g.f32(w_scale), g.const(w_zero)),
        *(g.f32(y_scale), g.const(zero_point(rng, act))),
    ]
    if rng.random() < 0.7:
        inputs.append(g.const(rng.integers(-20_000, 20_000, shape.filters), np.int32))
    more: dict[str, Any] = {"domain": "com.microsoft", "channels_last": 1} if last else {}
    if rng.random() < 0.5:
        more["kernel_shape"] = list(shape.kernel)
    y = g.node("QLinearConv", *inputs, **shape.attributes, **more)
    what = f"{act} {wt} {shape.kernel} {shape.attributes} {'per channel' if per_channel else ''}"
    return Case(g.model(y), (codes(rng, (256, *dims), act),), what, (act, wt) != NO_KERNEL)


@op("Conv in QDQ form")
def conv_qdq(rng: Rng) -> Iterator[Case]:
    for shape in CONVOLUTIONS:
        for act, wt in PAIRS:
            if wt == U8 and act == S8:
                continue  # left as a float Conv by onnxruntime, and refused
            g = Graph(int(rng.choice([13, 19, 21])))
            x = g.input(("n", shape.channels, *shape.spatial))
            per_channel = (shape.filters,) if wt == S8 and rng.random() < 0.5 else ()
            x_scale, w_scale = (
                scale(rng, (), magnitude(rng)),
                scale(rng, per_channel, magnitude(rng)),
            )
            y_scale = scale(
                rng, (), float(x_scale * w_scale.mean()) * 40 * np.sqrt(np.prod(shape.weight[1:]))
            )
            x_zero, w_zero = zero_point(rng, act), np.zeros(per_channel, wt)
            if wt == U8:
                w_zero = zero_point(rng, wt)
            bias = rng.integers(-20_000, 20_000, shape.filters).astype(np.int32)
            bias_scale = np.broadcast_to(x_scale * w_scale, per_channel).astype(np.float32)
            q = g.dequantize(g.quantize(x, x_scale, x_zero), x_scale, x_zero)
            w = g.dequantize(g.const(weights(rng, shape.weight, wt)), w_scale, w_zero, axis=0)
            b = g.dequantize(g.const(bias), bias_scale, np.zeros(per_channel, np.int32), axis=0)
            if rng.random() < 0.3:
                # Onnxruntime quantizes it itself.
                b = g.f32(bias * bias_scale * rng.uniform(0.9, 1.1))
            y = g.node("Conv", q, w, *([b] if rng.random() < 0.7 else []), **shape.attributes)
            if rng.random() < 0.3:
                y = g.node("Relu", y)
                y_zero = np.asarray(np.iinfo(act).min, act)
            else:
                y_zero = zero_point(rng, act)
            y = g.dequantize(g.quantize(y, y_scale, y_zero), y_scale, y_zero)
            feed = floats(rng, (128, shape.channels, *shape.spatial), float(x_scale))
            yield Case(g.model(y), (feed,), f"{act} {wt} {shape.kernel} {shape.attributes}")


def _product_scales(rng: Rng, depth: int, columns: tuple[int, ...]) -> tuple[Array, Array, Array]:
    a, b = scale(rng, (), magnitude(rng)), scale(rng, columns, magnitude(rng))
    return a, b, scale(rng, (), float(a * b.mean()) * 40 * np.sqrt(depth))


@op("QLinearMatMul")
def qlinear_matmul(rng: Rng) -> Iterator[Case]:
    for act, wt in PAIRS:
        for depth, width in ((1, 9), (7, 16), (64, 33), (300, 8)):
            for stack in ((), (5,), (2, 3)):
                for columns in ((), (width,)):
                    g = Graph(int(rng.choice([10, 21])))
                    a, b, y = _product_scales(rng, depth, columns)
                    z = g.node(
                        "QLinearMatMul",
                        *(
                            g.input(("n", *stack, depth), act),
                            g.f32(a),
                            g.const(zero_point(rng, act)),
                        ),
                        *(
                            g.const(weights(rng, (depth, width), wt)),
                            g.f32(b),
                            g.const(zero_point(rng, wt, columns)),
                        ),
                        *(g.f32(y), g.const(zero_point(rng, act))),
                    )
                    feed = codes(rng, (400, *stack, depth), act)
                    yield Case(
                        g.model(z),
                        (feed,),
                        f"{act} {wt} {stack} {depth} {width} {columns}",
                        (act, wt) != NO_KERNEL,
                    )
        for rows, stack in (
            ((4, 90), (4,)),
            ((90,), (4,)),
            ((1, 90), (4,)),
            ((2, 90), (3, 1)),
            ((3, 90), (1,)),
        ):
            g = Graph(21)  # a stack of weights, with parameters for all or for every column of each
            columns = (*stack, 1, 50) if rng.random() < 0.5 else ()
            a, b, y = _product_scales(rng, 6, columns)
            z = g.node(
                "QLinearMatMul",
                *(g.input((*rows, 6), act), g.f32(a), g.const(zero_point(rng, act))),
                *(
                    g.const(weights(rng, (*stack, 6, 50), wt)),
                    g.f32(b),
                    g.const(zero_point(rng, wt, columns)),
                ),
                *(g.f32(y), g.const(zero_point(rng, act))),
            )
            feed = codes(rng, (*rows, 6), act)
            yield Case(
                g.model(z), (feed,), f"{act} {wt} {rows} times {stack}", (act, wt) != NO_KERNEL
            )
        g = Graph(21)  # the constant on the left
        a, b, y = _product_scales(rng, 20, ())
        z = g.node(
            "QLinearMatMul",
            *(g.const(weights(rng, (50, 20), wt)), g.f32(a), g.const(zero_point(rng, wt))),
            *(g.input((20, 300), act), g.f32(b), g.const(zero_point(rng, act))),
            *(g.f32(y), g.const(zero_point(rng, wt))),
        )
        yield Case(
            g.model(z),
            (codes(rng, (20, 300), act),),
            f"{act} {wt} constant left",
            (wt, act) != NO_KERNEL,
        )


@op("QLinearMatMul and MatMulInteger of vectors")
def vectors(rng: Rng) -> Iterator[Case]:
    for act, wt in PAIRS:
        if (act, wt) == NO_KERNEL:
            continue
        for left in (False, True):
            g, depth, width = Graph(21), 9, 70_000
            a, b, y = _product_scales(rng, depth, ())
            x, feed = g.input((depth,), act), codes(rng, (depth,), act)
            shape = (width, depth) if left else (depth, width)
            w, w_zero, x_zero = (
                g.const(weights(rng, shape, wt)),
                g.const(zero_point(rng, wt)),
                g.const(zero_point(rng, act)),
            )
            if not left:
                ends = (
                    x,
                    g.f32(a),
                    x_zero,
                    w,
                    g.f32(b),
                    w_zero,
                    g.f32(y),
                    g.const(zero_point(rng, act)),
                )
                yield Case(g.model(g.node("QLinearMatMul", *ends)), (feed,), f"{act} {wt}")
            elif wt == U8 or act == S8:
                ends = (
                    w,
                    g.f32(b),
                    w_zero,
                    x,
                    g.f32(a),
                    x_zero,
                    g.f32(y),
                    g.const(zero_point(rng, wt)),
                )
                yield Case(g.model(g.node("QLinearMatMul", *ends)), (feed,), f"{wt} {act} left")
            g = Graph(21)
            x, w = g.input((depth,), act), g.const(weights(rng, shape, wt))
            yield Case(
                g.model(g.node("MatMulInteger", *((w, x) if left else (x, w)))),
                (feed,),
                f"integer {act} {wt} {left}",
            )


@op("MatMul in QDQ form")
def matmul_qdq(rng: Rng) -> Iterator[Case]:
    for act, wt in PAIRS:
        for depth, width in ((1, 9), (7, 16), (64, 33)):
            for stack in ((), (5,)):
                g = Graph(int(rng.choice([13, 21])))
                a, b, y = _product_scales(rng, depth, ())
                x_zero, y_zero = zero_point(rng, act), zero_point(rng, act)
                x = g.dequantize(g.quantize(g.input(("n", *stack, depth)), a, x_zero), a, x_zero)
                w_zero = zero_point(rng, wt) if wt == U8 else np.zeros((), S8)
                w = g.dequantize(g.const(weights(rng, (depth, width), wt)), b, w_zero)
                z = g.dequantize(g.quantize(g.node("MatMul", x, w), y, y_zero), y, y_zero)
                feed = floats(rng, (1_000, *stack, depth), float(a))
                yield Case(g.model(z), (feed,), f"{act} {wt} {stack} {depth} {width}")


@op("QGemm")
def qgemm(rng: Rng) -> Iterator[Case]:
    for act, wt in PAIRS:
        for depth, width in ((1, 9), (7, 16), (64, 33)):
            for columns in ((), (width,)):
                for float_output in (False, True):
                    g, rows = Graph(), 300
                    a, b, y = _product_scales(rng, depth, columns)
                    turn_a, turn_b = bool(rng.integers(2)), bool(rng.integers(2))
                    alpha = float(np.float32(rng.choice([1.0, 0.5, 0.37, 3.0])))
                    bias_shape: Any = [
                        None,
                        (width,),
                        (1, width),
                        (rows, width),
                        (rows, 1),
                        (1,),
                        (),
                    ][rng.integers(7)]
                    x_shape = (depth, rows) if turn_a else (rows, depth)
                    w = weights(rng, (depth, width), wt)
                    inputs = [
                        *(g.input(x_shape, act), g.f32(a), g.const(zero_point(rng, act))),
                        *(g.const(np.ascontiguousarray(w.T) if turn_b else w), g.f32(b)),
                        *(g.const(zero_point(rng, wt, columns)), ""),
                    ]
                    if bias_shape is not None:
                        inputs[6] = g.const(rng.integers(-9_000, 9_000, bias_shape), np.int32)
                    if not float_output:
                        inputs += [g.f32(y * np.float32(alpha)), g.const(zero_point(rng, act))]
                    z = g.node(
                        "QGemm", *inputs, alpha=alpha, transA=int(turn_a), transB=int(turn_b)
                    )
                    what = (
                        f"{act} {wt} {depth} {width} {columns} bias {bias_shape} {turn_a} {turn_b}"
                    )
                    yield Case(
                        g.model(z), (codes(rng, x_shape, act),), what, (act, wt) != NO_KERNEL
                    )


@op("Gemm in QDQ form")
def gemm_qdq(rng: Rng) -> Iterator[Case]:
    for act, wt in PAIRS:
        for depth, width in ((1, 9), (7, 16), (64, 33)):
            for float_output in (False, True):
                g = Graph(int(rng.choice([13, 21])))
                columns = (width,) if wt == S8 and rng.random() < 0.5 else ()
                a, b, y = _product_scales(rng, depth, columns)
                x_zero, y_zero = zero_point(rng, act), zero_point(rng, act)
                x = g.dequantize(g.quantize(g.input(("n", depth)), a, x_zero), a, x_zero)
                w_zero = zero_point(rng, wt) if wt == U8 else np.zeros(columns, S8)
                w = g.dequantize(g.const(weights(rng, (width, depth), wt)), b, w_zero, axis=0)
                bias = rng.integers(-9_000, 9_000, width).astype(np.int32)
                c = g.dequantize(
                    g.const(bias),
                    np.broadcast_to(a * b, columns),
                    np.zeros(columns, np.int32),
                    axis=0,
                )
                if not float_output and rng.random() < 0.3:
                    c = g.f32(bias * np.broadcast_to(a * b, columns) * rng.uniform(0.9, 1.1))
                z = g.node("Gemm", x, w, c, transB=1)
                if not float_output:
                    z = g.dequantize(g.quantize(z, y, y_zero), y, y_zero)
                feed = floats(rng, (3_000, depth), float(a))
                yield Case(
                    g.model(z),
                    (feed,),
                    f"{act} {wt} {depth} {width} {columns} float {float_output}",
                )


@op("MatMulIntegerToFloat")
def matmul_integer_to_float(rng: Rng) -> Iterator[Case]:
    for act, wt in PAIRS:
        for depth, width in ((1, 9), (7, 16), (64, 33)):
            for columns in ((), (width,)):
                for stack in ((), (3,)):
                    g = Graph()
                    a, b, _ = _product_scales(rng, depth, columns)
                    inputs = [
                        *(
                            g.input(("n", *stack, depth), act),
                            g.const(weights(rng, (depth, width), wt)),
                        ),
                        *(
                            g.f32(a),
                            g.f32(b),
                            g.const(zero_point(rng, act)),
                            g.const(zero_point(rng, wt, columns)),
                        ),
                    ]
                    if rng.random() < 0.5:
                        inputs.append(g.f32(rng.normal(size=width) * float(a * b.mean()) * 1_000))
                    z = g.node("MatMulIntegerToFloat", *inputs)
                    feed = codes(rng, (600, *stack, depth), act)
                    yield Case(
                        g.model(z),
                        (feed,),
                        f"{act} {wt} {stack} {depth} {width} {columns}",
                        (act, wt) != NO_KERNEL,
                    )


def _tail(
    g: Graph, rng: Rng, acc: str, size: float, columns: Array | None, channel_shape: tuple[int, ...]
) -> str:
    """int32 -> Cast -> Mul (-> Add (-> Relu)) (-> QuantizeLinear)."""
    factor = scale(rng, channel_shape if columns is not None else (), size)
    y = g.node("Mul", g.node("Cast", acc, to=int(onnx.TensorProto.FLOAT)), g.f32(factor))
    if rng.random() < 0.6:
        y = g.node("Add", y, g.f32(rng.normal(size=channel_shape) * 30))
        if rng.random() < 0.5:
            y = g.node("Relu", y)
    if rng.random() < 0.6:
        y = g.quantize(y, scale(rng), zero_point(rng, rng.choice(["u1", "i1"])))
    return y


@op("MatMulInteger, Cast, Mul, ...")
def matmul_integer(rng: Rng) -> Iterator[Case]:
    for act, wt in PAIRS:
        for depth, width in ((1, 9), (7, 16), (64, 33)):
            for columns in (None, np.zeros(width)):
                g = Graph()
                inputs = [g.input(("n", depth), act), g.const(weights(rng, (depth, width), wt))]
                form = rng.integers(3)
                if form:
                    inputs += [
                        g.const(zero_point(rng, act)),
                        g.const(zero_point(rng, wt, (width,) * int(form - 1))),
                    ]
                acc = g.node("MatMulInteger", *inputs)
                y = _tail(g, rng, acc, 1 / (40 * np.sqrt(depth)), columns, (width,))
                yield Case(
                    g.model(y),
                    (codes(rng, (3_000, depth), act),),
                    f"{act} {wt} {depth} {width} form {form}",
                )


@op("ConvInteger, Cast, Mul, ...")
def conv_integer(rng: Rng) -> Iterator[Case]:
    for shape in CONVOLUTIONS:
        for act, wt in PAIRS:
            g = Graph()
            inputs = [
                g.input(("n", shape.channels, *shape.spatial), act),
                g.const(weights(rng, shape.weight, wt)),
            ]
            form = rng.integers(3)
            if form:
                inputs += [g.const(zero_point(rng, act)), g.const(zero_point(rng, wt))][:form]
            acc = g.node("ConvInteger", *inputs, **shape.attributes)
            channel = (shape.filters, *([1] * len(shape.spatial)))
            y = _tail(
                g, rng, acc, 1 / (40 * np.sqrt(np.prod(shape.weight[1:]))), np.zeros(1), channel
            )
            feed = codes(rng, (256, shape.channels, *shape.spatial), act)
            yield Case(
                g.model(y), (feed,), f"{act} {wt} {shape.kernel} {shape.attributes} form {form}"
            )


@op("int32 biases")
def integer_bias(rng: Rng) -> Iterator[Case]:
    for act, wt in PAIRS:
        for shape in ((), (300,), (1, 300), (40, 1), (40, 300)):
            g = Graph()
            acc = g.node(
                "MatMulInteger", g.input((40, 256), act), g.const(weights(rng, (256, 300), wt))
            )
            bias = g.const(rng.integers(-(2**20), 2**20, shape).astype(np.int32))
            y = g.node("Add", *((acc, bias) if len(shape) == 1 else (bias, acc)))
            yield Case(g.model(y), (codes(rng, (40, 256), act),), f"{act} {wt} {shape}")
        for channel in ((), (1, 9, 1, 1), (9, 1, 1)):
            g = Graph()
            acc = g.node(
                "ConvInteger", g.input(("n", 4, 7, 6), act), g.const(weights(rng, (9, 4, 3, 2), wt))
            )
            y = g.node("Add", acc, g.const(rng.integers(-(2**20), 2**20, channel).astype(np.int32)))
            yield Case(
                g.model(y),
                (codes(rng, (256, 4, 7, 6), act),),
                f"{act} {wt} {channel} after a convolution",
            )


# -- two inputs ------------------------------------------------------------------------------------

EVERY_A, EVERY_B = (
    (np.arange(65_536) // 256).astype(np.uint8),
    (np.arange(65_536) % 256).astype(np.uint8),
)
BROADCASTS = (
    ((40, 60), (40, 60)),
    ((40, 60), (60,)),
    ((40, 60), (1, 60)),
    ((40, 60), (40, 1)),
    ((60,), (40, 60)),
    ((40, 1), (40, 60)),
    ((40, 1), (1, 60)),
    ((1, 60), (40, 1)),
    ((40, 60), ()),
    ((), (40, 60)),
    ((1, 1), (40, 60)),
    ((5, 1, 60), (1, 9, 1)),
    ((5, 9, 1), (1, 9, 60)),
    ((5, 9, 60), (9, 1)),
    ((1,), (1,)),
    ((40, 1), (40, 1)),
    ((40, 1), (1, 1)),
    ((1, 40, 1), (7, 1, 1)),
)


def _two_inputs(rng: Rng, name: str) -> Iterator[Case]:
    for dtype in EIGHT:
        for form in ("every", *BROADCASTS):
            a, b = scale(rng, (), magnitude(rng)), scale(rng)
            b = b * a if name == "QLinearAdd" else b * np.float32(magnitude(rng))
            c = scale(rng, (), float(a * 2 if name == "QLinearAdd" else a * b * 80))
            parameters = [[g_scale, zero_point(rng, dtype)] for g_scale in (a, b, c)]
            if form == "every":
                feeds = (EVERY_A.view(dtype), EVERY_B.view(dtype))
                yield _binary(name, parameters, feeds, None)
                continue
            shapes: Any = form
            feeds = (codes(rng, shapes[0], dtype), codes(rng, shapes[1], dtype))
            for constant in (None, 0, 1):
                yield _binary(name, parameters, feeds, constant)


def _binary(
    name: str, parameters: list[list[Array]], feeds: tuple[Array, Array], constant: int | None
) -> Case:
    g = Graph()
    ends = [
        g.const(feed) if k == constant else g.input(feed.shape, feed.dtype)
        for k, feed in enumerate(feeds)
    ]
    (a, az), (b, bz), (c, cz) = ((g.f32(s), g.const(z)) for s, z in parameters)
    y = g.node(name, ends[0], a, az, ends[1], b, bz, c, cz)
    used = tuple(feed for k, feed in enumerate(feeds) if k != constant)
    return Case(
        g.model(y), used, f"{feeds[0].dtype} {feeds[0].shape} {feeds[1].shape} constant {constant}"
    )


@op("QLinearAdd")
def qlinear_add(rng: Rng) -> Iterator[Case]:
    return _two_inputs(rng, "QLinearAdd")


@op("QLinearMul")
def qlinear_mul(rng: Rng) -> Iterator[Case]:
    return _two_inputs(rng, "QLinearMul")


@op("Add, Sub, Mul in QDQ form")
def two_inputs_qdq(rng: Rng) -> Iterator[Case]:
    for name in ("Add", "Mul", "Sub"):
        for dtype in EIGHT:
            for shapes in ("every", *BROADCASTS[:11]):
                g = Graph(int(rng.choice([13, 21])))
                feeds: Any = (EVERY_A.view(dtype), EVERY_B.view(dtype))
                if not isinstance(shapes, str):
                    feeds = tuple(codes(rng, shape, dtype) for shape in shapes)
                scales = (scale(rng), scale(rng))
                floats_ = [
                    g.dequantize(g.input(feed.shape, dtype), s, zero_point(rng, dtype))
                    for feed, s in zip(feeds, scales, strict=True)
                ]
                out = scale(rng, (), 2.0 if name != "Mul" else 80.0)
                y = g.quantize(g.node(name, *floats_), out, zero_point(rng, dtype))
                yield Case(g.model(y), feeds, f"{name} {dtype} {shapes}")


# -- concatenation, pools, activations, softmax, where ---------------------------------------------


@op("QLinearConcat")
def qlinear_concat(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for axis in (1, 2, -1, 0):
            for constant in (False, True):
                g = Graph()
                y, y_zero = scale(rng, (), magnitude(rng)), zero_point(rng, dtype)
                inputs, feeds = [g.f32(y), g.const(y_zero)], []
                for k in range(3):
                    shape = [20, 30, 40]
                    shape[axis] += k
                    feed = codes(rng, tuple(shape), dtype)
                    same = rng.random() < 0.3
                    s, z = (
                        (y, y_zero) if same else (scale(rng, (), float(y)), zero_point(rng, dtype))
                    )
                    if constant and k == 1:
                        inputs += [g.const(feed), g.f32(s), g.const(z)]
                    else:
                        inputs += [g.input(tuple(shape), dtype), g.f32(s), g.const(z)]
                        feeds.append(feed)
                yield Case(
                    g.model(g.node("QLinearConcat", *inputs, axis=axis)),
                    tuple(feeds),
                    f"{dtype} axis {axis}",
                )
                if constant:
                    continue
                g = Graph()
                parts = [
                    g.dequantize(
                        g.input(feed.shape, dtype), scale(rng, (), float(y)), zero_point(rng, dtype)
                    )
                    for feed in feeds
                ]
                z_ = g.quantize(g.node("Concat", *parts, axis=axis), y, y_zero)
                yield Case(g.model(z_), tuple(feeds), f"QDQ {dtype} axis {axis}")


POOLS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((8, 8), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ((9, 7), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ((9, 7), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ((9, 8), {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
    ((8, 9), {"kernel_shape": [3, 3], "strides": [3, 2], "pads": [1, 0, 0, 1], "ceil_mode": 1}),
    ((9, 8), {"kernel_shape": [4, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((9, 8), {"kernel_shape": [4, 3], "strides": [2, 1], "auto_pad": "SAME_LOWER"}),
    ((9, 8), {"kernel_shape": [4, 3], "auto_pad": "VALID"}),
    ((30,), {"kernel_shape": [5], "strides": [3], "pads": [2, 1]}),
    ((5, 6, 4), {"kernel_shape": [2, 3, 2], "strides": [1, 2, 1], "pads": [1, 0, 1, 0, 1, 0]}),
    (
        (4, 3),
        {"kernel_shape": [4, 3]},
    ),  # the whole input: onnxruntime's QLinearAveragePool turns into the global one
    ((5,), {"kernel_shape": [5], "strides": [2], "count_include_pad": 1}),
    ((4, 3), {"kernel_shape": [4, 3], "auto_pad": "SAME_LOWER", "strides": [2, 4]}),
    ((1, 1), {"kernel_shape": [1, 1]}),
)


@op("QLinearAveragePool")
def qlinear_average_pool(rng: Rng) -> Iterator[Case]:
    for spatial, attributes in POOLS:
        for dtype in EIGHT:
            for form in ("QOperator", "channels_last", "QDQ"):
                x_scale = scale(rng, (), magnitude(rng))
                x_zero, y_scale, y_zero = (
                    zero_point(rng, dtype),
                    scale(rng, (), float(x_scale)),
                    zero_point(rng, dtype),
                )
                g = Graph(int(rng.choice([13, 19, 21])))
                dims = (*spatial, 3) if form == "channels_last" else (3, *spatial)
                x = g.input(("n", *dims), dtype)
                if form == "QDQ":
                    y = g.node("AveragePool", g.dequantize(x, x_scale, x_zero), **attributes)
                    y = g.quantize(y, y_scale, y_zero)
                else:
                    more = {"channels_last": 1} if form == "channels_last" else {}
                    inputs = (x, g.f32(x_scale), g.const(x_zero), g.f32(y_scale), g.const(y_zero))
                    y = g.node("QLinearAveragePool", *inputs, **attributes, **more)
                yield Case(
                    g.model(y),
                    (codes(rng, (300, *dims), dtype),),
                    f"{form} {dtype} {spatial} {attributes}",
                )


@op("QLinearGlobalAveragePool")
def qlinear_global_average_pool(rng: Rng) -> Iterator[Case]:
    for spatial in ((1, 1), (2, 3), (7, 7), (5, 13), (31, 9)):
        for dtype in EIGHT:
            for form in ("QOperator", "channels_last", "QDQ"):
                x_scale = scale(rng, (), magnitude(rng))
                x_zero, y_zero = zero_point(rng, dtype), zero_point(rng, dtype)
                y_scale = scale(rng, (), float(x_scale) / np.sqrt(np.prod(spatial)))
                g = Graph(int(rng.choice([13, 21])))
                dims = (*spatial, 32) if form == "channels_last" else (32, *spatial)
                x = g.input(("n", *dims), dtype)
                if form == "QDQ":
                    y = g.node("GlobalAveragePool", g.dequantize(x, x_scale, x_zero))
                    y = g.quantize(y, y_scale, y_zero)
                else:
                    inputs = (x, g.f32(x_scale), g.const(x_zero), g.f32(y_scale), g.const(y_zero))
                    y = g.node(
                        "QLinearGlobalAveragePool",
                        *inputs,
                        channels_last=int(form == "channels_last"),
                    )
                samples = max(100, 300_000 // int(np.prod(dims)))
                yield Case(
                    g.model(y), (codes(rng, (samples, *dims), dtype),), f"{form} {dtype} {spatial}"
                )


@op("QLinearLeakyRelu")
def qlinear_leaky_relu(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for alpha in (0.01, 0.2, 0.0, 1.5):
            yield from _activation(rng, dtype, "LeakyRelu", 1.0, alpha=alpha)


@op("QLinearSigmoid")
def qlinear_sigmoid(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        yield from _activation(rng, dtype, "Sigmoid", 0.02)


def _activation(
    rng: Rng, dtype: np.dtype[Any], name: str, y_size: float, **attributes: Any
) -> Iterator[Case]:
    for form in ("QOperator", "QDQ"):
        g = Graph()
        x = g.input((1, 30_001), dtype)
        x_scale, x_zero = scale(rng, (), 0.05 if name == "Sigmoid" else 1.0), zero_point(rng, dtype)
        y_scale, y_zero = scale(rng, (), y_size), zero_point(rng, dtype)
        if form == "QDQ":
            y = g.quantize(
                g.node(name, g.dequantize(x, x_scale, x_zero), **attributes), y_scale, y_zero
            )
        else:
            inputs = (x, g.f32(x_scale), g.const(x_zero), g.f32(y_scale), g.const(y_zero))
            y = g.node("QLinear" + name, *inputs, **attributes)
        yield Case(g.model(y), (codes(rng, (1, 30_001), dtype),), f"{form} {dtype} {attributes}")


def needs_its_softmax() -> None:
    if runtime.release() < softmax.OLDEST:
        pytest.skip("this onnxruntime rounds QLinearSoftmax otherwise; such models are refused")


@op("QLinearSoftmax")
def qlinear_softmax(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for length in (1, 2, 3, 10, 37, 100, 1_000):
            g = Graph()
            x = g.input(("n", length), dtype)
            x_scale = (
                np.float32(10 ** rng.uniform(-3, 1)) if rng.random() < 0.7 else scale(rng, (), 0.1)
            )
            y_scale = np.float32(
                rng.choice([1 / 256, 1 / 255, 1 / 128, 1 / 200, 0.01, rng.uniform(0.001, 0.02)])
            )
            inputs = (
                x,
                g.f32(x_scale),
                g.const(zero_point(rng, dtype)),
                g.f32(y_scale),
                g.const(zero_point(rng, dtype)),
            )
            y = g.node("QLinearSoftmax", *inputs, axis=-1, opset=13)
            yield Case(
                g.model(y), (codes(rng, (60_000 // length, length), dtype),), f"{dtype} {length}"
            )
            g = Graph()
            shape = (30, 5, 4)
            x = g.input(shape, dtype)
            inputs = (
                x,
                g.f32(x_scale),
                g.const(zero_point(rng, dtype)),
                g.f32(y_scale),
                g.const(zero_point(rng, dtype)),
            )
            axis, opset = int(rng.integers(-3, 3)), int(rng.choice([11, 13]))
            y = g.node("QLinearSoftmax", *inputs, axis=axis, opset=opset)
            yield Case(
                g.model(y),
                (codes(rng, shape, dtype),),
                f"{dtype} {shape} axis {axis} opset {opset}",
            )


@op("Softmax in QDQ form")
def softmax_qdq(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for length in (2, 10, 37, 1_000):
            g, x_scale = Graph(int(rng.choice([13, 21]))), scale(rng, (), 0.02)
            x = g.dequantize(g.input(("n", length), dtype), x_scale, zero_point(rng, dtype))
            y_scale = np.float32(rng.choice([1 / 256, 1 / 255, 1 / 128]))
            y = g.quantize(g.node("Softmax", x, axis=-1), y_scale, zero_point(rng, dtype))
            yield Case(
                g.model(y), (codes(rng, (200_000 // length, length), dtype),), f"{dtype} {length}"
            )


@op("QLinearWhere")
def qlinear_where(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for pick, one, other in (
            ((120, 150), (120, 150), (120, 150)),
            ((150,), (120, 150), (120, 1)),
            ((120, 1), (1, 150), (120, 150)),
            ((120, 150), (), (120, 150)),
            ((120, 150), (120, 150), ()),
        ):
            for constant in (None, 0, 1):
                g, size = Graph(), magnitude(rng)
                feeds = (codes(rng, one, dtype), codes(rng, other, dtype))
                x, y = (
                    g.const(f) if k == constant else g.input(f.shape, dtype)
                    for k, f in enumerate(feeds)
                )
                inputs = [g.const(rng.random(pick) < 0.5)]
                for end in (x, y):
                    inputs += [end, g.f32(scale(rng, (), size)), g.const(zero_point(rng, dtype))]
                z = g.node(
                    "QLinearWhere",
                    *inputs,
                    g.f32(scale(rng, (), size)),
                    g.const(zero_point(rng, dtype)),
                )
                used = tuple(f for k, f in enumerate(feeds) if k != constant)
                yield Case(g.model(z), used, f"{dtype} {pick} {one} {other} constant {constant}")
            g, size = Graph(), magnitude(rng)
            ends = [
                g.dequantize(g.input(f.shape, dtype), scale(rng, (), size), zero_point(rng, dtype))
                for f in feeds
            ]
            y = g.quantize(
                g.node("Where", g.const(rng.random(pick) < 0.5), *ends),
                scale(rng, (), size),
                feeds[0].flat[0],
            )
            yield Case(g.model(y), feeds, f"QDQ {dtype} {pick} {one} {other}")


# -- codes to codes --------------------------------------------------------------------------------


@op("MaxPool")
def max_pool(rng: Rng) -> Iterator[Case]:
    more: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
        ((9, 9), {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [1, 0, 2, 1]}),
        ((31,), {"kernel_shape": [3], "dilations": [4], "strides": [2], "ceil_mode": 1}),
    )
    for spatial, attributes in (*POOLS, *more):
        for dtype in EIGHT:
            for form in ("codes", "QDQ"):
                g = Graph(int(rng.choice([12, 13, 21])))
                x = g.input(("n", 3, *spatial), dtype)
                kept = {k: v for k, v in attributes.items() if k != "count_include_pad"}
                if form == "codes":
                    y = g.node("MaxPool", x, **kept)
                else:
                    s, z = scale(rng), zero_point(rng, dtype)
                    y = g.quantize(g.node("MaxPool", g.dequantize(x, s, z), **kept), s, z)
                feed = codes(rng, (300, 3, *spatial), dtype)
                yield Case(g.model(y), (feed,), f"{form} {dtype} {spatial} {kept}")


@op("GlobalMaxPool between codes")
def global_max_pool(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for spatial in ((1, 1), (3, 5), (11,)):
            g, s, z = Graph(13), scale(rng), zero_point(rng, dtype)
            x = g.dequantize(g.input(("n", 9, *spatial), dtype), s, z)
            y = g.quantize(
                g.node("GlobalMaxPool", x), scale(rng, (), float(s)), zero_point(rng, dtype)
            )
            yield Case(g.model(y), (codes(rng, (3_000, 9, *spatial), dtype),), f"{dtype} {spatial}")


@op("Clip, Relu, Min, Max of codes")
def clip(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        feed = codes(rng, (1, 100_000), dtype)
        low, high = np.sort(codes(rng, (2,), dtype))
        for form in ("both", "low", "high"):
            g = Graph(21)
            x = g.input(feed.shape, dtype)
            ends = [g.const(low) if form != "high" else "", g.const(high) if form != "low" else ""]
            yield Case(
                g.model(g.node("Clip", x, *(ends if ends[1] else ends[:1]))),
                (feed,),
                f"Clip {dtype} {form}",
            )
        for name in ("Min", "Max"):
            for other in (low, codes(rng, feed.shape, dtype)):
                g = Graph(21)
                x = g.input(feed.shape, dtype)
                yield Case(g.model(g.node(name, x, g.const(other))), (feed,), f"{name} {dtype}")
        if dtype == S8:  # ONNX has no Relu of uint8
            g = Graph(21)
            yield Case(
                g.model(g.node("Relu", g.input(feed.shape, dtype))), (feed,), f"Relu {dtype}"
            )
        for name in ("Relu", "Clip"):
            g, s, z = Graph(21), scale(rng), zero_point(rng, dtype)
            y = g.dequantize(g.input(feed.shape, dtype), s, z)
            y = g.node(name, y, *([g.f32(-s * 3), g.f32(s * 20)] if name == "Clip" else []))
            yield Case(
                g.model(g.quantize(y, scale(rng, (), float(s)), zero_point(rng, dtype))),
                (feed,),
                f"QDQ {name}",
            )


LAYOUTS: tuple[tuple[str, int, tuple[int, ...], list[Any], dict[str, Any], int], ...] = (
    # op, opset, input shape, constant inputs, attributes, outputs
    ("Pad", 21, (4, 6, 20, 20), [np.array([0, 1, 2, 0, 1, 0, 0, 3]), "fill"], {}, 1),
    ("Pad", 21, (4, 6, 20, 20), [np.array([0, 0, -2, 3, 0, 0, 1, -4]), "fill"], {}, 1),
    ("Pad", 21, (4, 6, 20, 20), [np.array([1, 2, 2, 0]), "fill", np.array([-1, 1])], {}, 1),
    ("Pad", 21, (4, 6, 20, 20), [np.array([0, 0, 1, 2, 0, 0, 3, 4])], {"mode": "edge"}, 1),
    ("Pad", 21, (4, 6, 20, 20), [np.array([0, 0, 1, 2, 0, 0, 3, 4])], {"mode": "reflect"}, 1),
    ("Pad", 21, (4, 6, 20, 20), [np.array([0, 0, 1, 2, 0, 0, 3, 4])], {"mode": "wrap"}, 1),
    (
        "Slice",
        21,
        (30, 20, 20),
        [np.array([2, -9]), np.array([25, 2**62]), np.array([0, 2])],
        {},
        1,
    ),
    (
        "Slice",
        21,
        (30, 20, 20),
        [np.array([2**40]), np.array([-(2**60)]), np.array([1]), np.array([-3])],
        {},
        1,
    ),
    (
        "Slice",
        21,
        (30, 20, 20),
        [np.array([-1, 1]), np.array([3, 19]), np.array([0, -1]), np.array([-2, 4])],
        {},
        1,
    ),
    ("Slice", 21, (30, 20, 20), [np.array([-99, 0]), np.array([-3, 99])], {}, 1),
    ("Gather", 21, (30, 20, 20), [np.array([[1, 0, -1], [19, -20, 3]])], {"axis": 1}, 1),
    ("Gather", 21, (30, 20, 20), [np.array(7)], {"axis": -1}, 1),
    ("Split", 21, (30, 21, 20), [], {"axis": 1, "num_outputs": 4}, 4),
    ("Split", 13, (30, 21, 20), [np.array([1, 13, 7])], {"axis": -2}, 3),
    ("Split", 12, (30, 21, 20), [], {"axis": 0}, 3),
    ("Transpose", 21, (30, 20, 20), [], {"perm": [2, 0, 1]}, 1),
    ("Transpose", 21, (30, 20, 20), [], {}, 1),
    ("Reshape", 21, (30, 20, 20), [np.array([0, -1, 5])], {}, 1),
    ("Flatten", 21, (30, 4, 5, 20), [], {"axis": 2}, 1),
    ("Flatten", 21, (30, 4, 5, 20), [], {"axis": -1}, 1),
    ("Flatten", 21, (30, 4, 5, 20), [], {"axis": 0}, 1),
    ("Squeeze", 21, (30, 1, 20, 1, 20), [np.array([1, -2])], {}, 1),
    ("Squeeze", 12, (30, 1, 20, 1, 20), [], {"axes": [3]}, 1),
    ("Squeeze", 21, (30, 1, 20, 1, 20), [], {}, 1),
    ("Unsqueeze", 21, (30, 20, 20), [np.array([0, -1, 2])], {}, 1),
    ("Expand", 21, (30, 1, 20), [np.array([2, 1, 5, 1])], {}, 1),
    ("Tile", 21, (30, 2, 20), [np.array([2, 3, 1])], {}, 1),
    ("DepthToSpace", 21, (2, 18, 10, 12), [], {"blocksize": 3}, 1),
    ("DepthToSpace", 21, (2, 18, 10, 12), [], {"blocksize": 3, "mode": "CRD"}, 1),
    ("SpaceToDepth", 21, (2, 3, 21, 24), [], {"blocksize": 3}, 1),
    ("Identity", 21, (30, 20, 20), [], {}, 1),
)


@op("Pad, Slice, Gather, Split, Transpose, Reshape, ...")
def layouts(rng: Rng) -> Iterator[Case]:
    for name, opset, shape, extra, attributes, outputs in LAYOUTS:
        for dtype in EIGHT:
            for form in ("codes", "QDQ"):
                g, s, z = Graph(opset), scale(rng), zero_point(rng, dtype)
                constants = []
                for item in extra:
                    value = item
                    if isinstance(item, str):
                        value = codes(rng, () if item == "fill" else shape, dtype)
                        if form == "QDQ":
                            value = ((value.astype(np.int32) - z) * s).astype(np.float32)
                    constants.append(g.const(value))
                x = g.input(shape, dtype)
                y = g.node(
                    name,
                    g.dequantize(x, s, z) if form == "QDQ" else x,
                    *constants,
                    outputs=outputs,
                    **attributes,
                )
                names = [y, *(f"{y}_{k}" for k in range(1, outputs))]
                if form == "QDQ":
                    names = [g.quantize(part, s, z) for part in names]
                yield Case(
                    g.model(*names),
                    (codes(rng, shape, dtype),),
                    f"{form} {name} {dtype} {attributes}",
                )


@op("Concat of floats from other codes")
def concat_of_other_codes(rng: Rng) -> Iterator[Case]:
    """Tables of different ranges, int8 beside uint8, several scales beside one."""
    for axis in (1, 2):
        g = Graph(21)
        shape = (2, 3)
        x, (feed,) = g.input(("n", *shape), U8), (codes(rng, (300, *shape), U8),)
        low, high = np.sort(rng.integers(0, 256, 2)).astype(np.uint8)
        cut = g.node("Clip", x, g.const(low), g.const(high))  # codes that use a part of their range
        signed = g.quantize(
            g.dequantize(x, 0.1, zero_point(rng, U8)), scale(rng, (), 0.1), zero_point(rng, S8)
        )
        parts = [
            g.dequantize(x, scale(rng), zero_point(rng, U8)),
            g.dequantize(cut, scale(rng), zero_point(rng, U8)),
            g.dequantize(signed, scale(rng, (2,)), zero_point(rng, S8, (2,)), axis=1),
            g.node("Tanh", g.dequantize(cut, scale(rng, (), 0.01), zero_point(rng, U8))),
        ]
        y = g.node("Concat", *(parts[k] for k in rng.permutation(4)), axis=axis)
        z = g.quantize(y, scale(rng, (), 0.5), zero_point(rng, U8))
        yield Case(g.model(y, z), (feed,), f"axis {axis}")


@op("Concat of codes and constants")
def concat(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for axis in (0, 1, -1):
            g, shape = Graph(21), (30, 20, 20)
            x, y, c = (
                g.input(shape, dtype),
                g.input(shape, dtype),
                g.const(codes(rng, shape, dtype)),
            )
            feeds = (codes(rng, shape, dtype), codes(rng, shape, dtype))
            yield Case(
                g.model(g.node("Concat", c, x, y, c, x, axis=axis)), feeds, f"{dtype} {axis}"
            )
            g, s, z = Graph(21), scale(rng), zero_point(rng, dtype)
            parts = [g.dequantize(g.input(shape, dtype), s, z) for _ in feeds]
            y = g.quantize(
                g.node("Concat", *parts, axis=axis),
                scale(rng, (), float(s)),
                zero_point(rng, dtype),
            )
            yield Case(g.model(y), feeds, f"QDQ {dtype} {axis}")


@op("integer graph inputs and outputs")
def integers(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for steps in range(3):
            g = Graph(21)
            a, b = g.input((300, 50), dtype), g.input((50, 7), dtype)
            y = [g.node("Transpose", a), b]
            if steps:
                y[0] = g.node("Concat", y[0], b, axis=1)
            if steps > 1:
                y.append(g.dequantize(b, scale(rng), zero_point(rng, dtype)))
            feeds = (codes(rng, (300, 50), dtype), codes(rng, (50, 7), dtype))
            yield Case(g.model(*y), feeds, f"{dtype} {steps}")


# -- float islands between codes -------------------------------------------------------------------

UNARY: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            "Abs",
            "Tanh",
            "Sigmoid",
            "HardSigmoid",
            "HardSwish",
            "Erf",
            "Softsign",
            "Exp",
            "Neg",
        )
    },
    **{
        name: {}
        for name in (
            "Floor",
            "Ceil",
            "Round",
            "Sign",
            "ThresholdedRelu",
            "LeakyRelu",
            "Gelu",
            "QuickGelu",
        )
    },
    "FastGelu": {},
    "Gelu tanh": {"approximate": "tanh"},
    "LeakyRelu 0.3": {"alpha": 0.3},
}
# onnxruntime computes the last few elements of a tensor otherwise than the others: refused
UNEVEN = ("Elu", "Selu", "Celu", "Softplus", "Sin", "Cos", "Atan")


@op("unary functions between codes")
def unary(rng: Rng) -> Iterator[Case]:
    for k, (key, attributes) in enumerate(UNARY.items()):
        g, dtype = Graph(22), EIGHT[k % 2]
        x = g.input(("n", 509), dtype)
        s = scale(rng, (), 0.04)
        y = g.node(key.split()[0], g.dequantize(x, s, zero_point(rng, dtype)), **attributes)
        reach = (
            max(np.exp(float(s) * 255) / 300, 1e-3)
            if key == "Exp"
            else float(rng.choice([1.0, 0.01, float(s)]))
        )
        y = g.quantize(y, scale(rng, (), reach), zero_point(rng, dtype))
        yield Case(g.model(y), (codes(rng, (97, 509), dtype),), f"{key} {dtype}")


@op("float arithmetic between codes")
def float_arithmetic(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for name in ("Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu", "Clip", "Relu"):
            for constant_shape in ((), (1,), (50,), (20, 1), (1, 20, 1)):
                for swapped in (False, True):
                    g, s, z = Graph(21), scale(rng), zero_point(rng, dtype)
                    shape = (15, 20, 50)
                    x = g.dequantize(g.input(shape, dtype), s, z)
                    if name == "Relu":
                        y = g.node(name, x)
                    elif name == "Clip":
                        y = g.node(name, x, g.f32(-s * 20), g.f32(s * 30.5))
                    elif name == "Div" and swapped:
                        continue  # by zero for some code
                    else:
                        c = g.f32(scale(rng, constant_shape) * rng.choice([-1, 1], constant_shape))
                        turned = swapped and name != "PRelu"
                        y = g.node(name, c, x) if turned else g.node(name, x, c)
                    if rng.random() < 0.7:
                        y = g.quantize(y, scale(rng, (), float(s)), zero_point(rng, dtype))
                    yield Case(
                        g.model(y),
                        (codes(rng, shape, dtype),),
                        f"{name} {dtype} {constant_shape} {swapped}",
                    )


@op("float tail")
def float_tail(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        for axis in (None, 1):
            for tail in (
                ("Mul",),
                ("Mul", "Add"),
                ("Mul", "Sigmoid"),
                ("Add", "Tanh", "Mul"),
                ("Sub", "Relu", "Div"),
            ):
                g = Graph(21)
                size = () if axis is None else (23,)
                x = g.input(("n", 23), dtype)
                y = g.dequantize(x, scale(rng, size, 0.05), zero_point(rng, dtype, size), axis=1)
                for name in tail:
                    unary_op = name in ("Sigmoid", "Tanh", "Relu")
                    y = g.node(
                        name,
                        y,
                        *(
                            []
                            if unary_op
                            else [g.f32(scale(rng, (23,) if rng.random() < 0.5 else ()))]
                        ),
                    )
                yield Case(g.model(y), (codes(rng, (4_000, 23), dtype),), f"{dtype} {axis} {tail}")


@op("ReduceMean between codes", values=100_000)
def reduce_mean(rng: Rng) -> Iterator[Case]:
    """Rows of every length from 1 to 130, of which most begin at no multiple of 16 bytes; a graph
    of many rows now and then, which onnxruntime parts among its threads."""
    for k, length in enumerate([*range(1, 131), 196, 255, 256, 257, 1_000, 1_023]):
        dtype, opset = EIGHT[k % 2], int(rng.choice([13, 18, 21]))
        g, s = Graph(opset), scale(rng)
        rows = 1_023 if k % 26 == 0 else 127
        shape, axes = (8, rows, length), [-1]
        if length % 3 == 0:
            shape, axes = (8, rows, length // 3, 3), [2, 3]  # type: ignore[assignment]
        elif length > 130:
            shape, axes = (1, length), [[0, 1], [1]][int(rng.integers(2))]  # type: ignore[assignment]
        x = g.dequantize(g.input(shape, dtype), s, zero_point(rng, dtype))
        keep = int(rng.integers(2))
        if opset < 18:
            y = g.node("ReduceMean", x, axes=axes, keepdims=keep)
        else:
            y = g.node("ReduceMean", x, g.const(np.array(axes)), keepdims=keep)
        if rng.random() < 0.5:
            y = g.quantize(y, scale(rng, (), float(s)), zero_point(rng, dtype))
        yield Case(g.model(y), (codes(rng, shape, dtype),), f"{dtype} {shape} axes {axes}")


@op("ReduceMean over leading axes", values=100_000)
def reduce_mean_leading(rng: Rng) -> Iterator[Case]:
    """Over the axes before channels that come last, as layouts at the default level make of a mean
    over an image."""
    for k, shape in enumerate(
        [(1, 4, 4, 40_001), (1, 7, 7, 6_400), (1, 1, 130, 3_333), (1, 16, 17, 24), (1, 30, 31, 5)]
    ):
        dtype = EIGHT[k % 2]
        g, s = Graph(13), scale(rng)
        x = g.dequantize(g.input(shape, dtype), s, zero_point(rng, dtype))
        y = g.node("ReduceMean", x, axes=[1, 2], keepdims=int(rng.integers(2)))
        if rng.random() < 0.5:
            y = g.quantize(y, scale(rng, (), float(s)), zero_point(rng, dtype))
        yield Case(
            g.model(y), tuple(codes(rng, shape, dtype) for _ in range(1)), f"{dtype} {shape}"
        )


@op("ReduceMean after a convolution", values=700)
def reduce_mean_after_conv(rng: Rng) -> Iterator[Case]:
    """At the default level the convolution's NHWC layout reaches the mean, whose order of additions
    changes with it."""
    for k in range(6):
        size, channels = int(rng.integers(3, 9)), 8
        g = Graph(17)
        x = g.quantize(
            g.node("Transpose", g.input((1, size, size, channels)), perm=[0, 3, 1, 2]),
            0.02,
            np.array(128, np.uint8),
        )
        w = g.const(rng.integers(-60, 61, (channels, channels, 3, 3)), np.int8)
        c = g.node(
            *(
                "QLinearConv",
                x,
                g.f32(0.02),
                g.const(np.uint8(128)),
                w,
                g.f32(0.01),
                g.const(np.int8(0)),
            ),
            *(g.f32(0.05), g.const(np.uint8(128))),
            pads=[1] * 4,
        )
        m = g.node(
            "ReduceMean", g.dequantize(c, 0.0371, np.array(128, np.uint8)), axes=[2, 3], keepdims=1
        )
        y = g.node("Transpose", m, perm=[0, 2, 3, 1]) if k % 2 else m
        inputs = tuple(
            rng.uniform(-2.6, 2.6, (1, size, size, channels)).astype(np.float32) for _ in range(1)
        )
        yield Case(g.model(y), inputs, f"{size} {k}")


@op("BatchNormalization between codes")
def batch_normalization(rng: Rng) -> Iterator[Case]:
    for dtype in EIGHT:
        g, s = Graph(15), scale(rng)
        x = g.dequantize(g.input(("n", 5, 24), dtype), s, zero_point(rng, dtype))
        parameters = [g.f32(rng.normal(size=5) * float(s) * size) for size in (1, 30, 30)]
        y = g.node("BatchNormalization", x, *parameters, g.f32(rng.uniform(0.1, 9, 5) * s))
        y = g.quantize(y, scale(rng, (), float(s)), zero_point(rng, dtype))
        yield Case(g.model(y), (codes(rng, (700, 5, 24), dtype),), f"{dtype}")


# -- float prefixes --------------------------------------------------------------------------------


@op("float prefix before the quantizer")
def float_prefix(rng: Rng) -> Iterator[Case]:
    channels = (4, 1, 1)  # of [50, 4, 6, 20]
    for dtype in EIGHT:
        for steps in (
            *(
                "Sub Div",
                "Mul Add",
                "Sub Mul",
                "Div Sub",
                "Add Clip",
                "Mul Relu",
                "Pad Mul",
                "Sub Div Pad",
            ),
            *(
                "Transpose Sub",
                "Flatten Div",
                "Neg Add",
                "Sub Transpose Div",
                "rsub",
                "Min Max",
                "Sub Div Clip Flatten",
            ),
        ):
            g, step = Graph(21), scale(rng)
            y, per_channel = g.input((50, 4, 6, 20)), True
            for name in steps.split():
                shape = channels if per_channel and rng.random() < 0.5 else ()
                c = g.f32(scale(rng, shape) * rng.choice([-1, 1], shape))
                if name in ("Transpose", "Flatten"):
                    y, per_channel = g.node(name, y), False
                elif name == "rsub":
                    y = g.node("Sub", c, y)
                elif name == "Clip":
                    y = g.node("Clip", y, g.f32(-3 * step), g.f32(20.5 * step))
                elif name == "Pad":
                    pads = np.array([0, 0, 1, 2, 0, 0, 0, 1])
                    y = g.node("Pad", y, g.const(pads), g.f32(rng.choice([0.0, 0.5])))
                else:
                    y = g.node(name, y, *([] if name in ("Relu", "Neg") else [c]))
            model = g.model(g.quantize(y, step, zero_point(rng, dtype)))
            yield Case(model, (floats(rng, (50, 4, 6, 20), float(step)),), f"{dtype} {steps}")


# -- the tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_equals_onnxruntime(name: str, tmp_path: Path) -> None:
    if name in ("QLinearSoftmax", "Softmax in QDQ form"):
        needs_its_softmax()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    compared = 0
    while compared < TARGET[name] * ROUNDS:
        for case in OPS[name](rng):
            compared += compare(case, tmp_path / "model.onnx")
    print(f"{name}: {compared:,} values, no difference")  # shown with -s


def test_a_float_product_lies_within_its_proved_error(tmp_path: Path) -> None:
    rng, compared = np.random.default_rng(7), 0
    for k in range(24):
        g, dtype = Graph(13), EIGHT[k % 2]
        depth, width = int(rng.choice([1, 3, 17, 200, 900])), int(rng.integers(1, 40))
        s = scale(rng, (), magnitude(rng))
        x = g.dequantize(g.input(("n", depth), dtype), s, zero_point(rng, dtype))
        w, bias = (
            rng.normal(size=(depth, width)),
            rng.normal(size=width) * rng.choice([0.1, 1e4]) * s,
        )
        y = g.node("Gemm", x, g.f32(w), g.f32(bias)) if k % 3 else g.node("MatMul", x, g.f32(w))
        feed, path = codes(rng, (500, depth), dtype), tmp_path / "model.onnx"
        write(g.model(y), path)
        lowered = read_model(path).lowered
        leaves = make_leaves(lowered)
        want = np.asarray(session(path).run(None, {"x0": feed})[0], np.float64)
        assert leaves.allow(feed.astype(np.int32), want).all()
        assert lowered.network.exact and not leaves.decoder.exact
        compared += want.size
    assert compared > 100_000


# -- refusals --------------------------------------------------------------------------------------

ZERO = np.zeros((), U8)


def _floats(
    g: Graph, shape: tuple[int, ...] = (1, 4, 6), dtype: np.dtype[Any] = U8, size: Any = 0.05
) -> str:
    """Dequantized codes; `size` may hold a scale for each channel."""
    return g.dequantize(g.input(shape, dtype), size, np.zeros(np.shape(size), dtype), axis=1)


def _codes(g: Graph, y: str) -> str:
    return g.quantize(y, 0.05, ZERO)


def _unary(name: str) -> Callable[[Graph], str]:
    return lambda g: _codes(g, g.node(name, _floats(g, dtype=S8)))


def _conv(g: Graph) -> str:
    one, zero = g.f32(1.0), g.const(ZERO)
    w, w_zero = g.const(np.ones((3, 2, 3, 3), U8)), g.const(np.arange(3, dtype=np.uint8))
    return g.node(
        "QLinearConv", g.input((1, 2, 5, 5), U8), one, zero, w, g.f32(np.ones(3)), w_zero, one, zero
    )


def _pool(g: Graph) -> str:
    ends = (g.input((1, 2, 8, 8), U8), g.f32(1.0), g.const(ZERO), g.f32(1.0), g.const(ZERO))
    window: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    return g.node("QLinearAveragePool", *ends, **window, ceil_mode=1, count_include_pad=1)


def _two_codes(g: Graph) -> str:
    one, zero = g.f32(1.0), g.const(ZERO)
    return g.node(
        "QLinearMatMul", g.input((3, 4), U8), one, zero, g.input((4, 5), U8), one, zero, one, zero
    )


def _float_conv(g: Graph) -> str:
    w = g.dequantize(g.const(np.ones((3, 4, 3), U8)), 0.1, ZERO)
    return _codes(g, g.node("Conv", _floats(g, dtype=S8), w))


def _huge_sum(g: Graph) -> str:
    one, zero = g.f32(1.0), g.const(ZERO)
    return g.node(
        "QLinearAdd", g.input((9,), U8), g.f32(1e9), zero, g.input((9,), U8), one, zero, one, zero
    )


def _softmax(g: Graph) -> str:
    ends = (g.input((1, 9), U8), g.f32(1.0), g.const(ZERO), g.f32(1e-39), g.const(ZERO))
    return g.node("QLinearSoftmax", *ends, axis=-1, opset=13)


REFUSALS: dict[str, tuple[Callable[[Graph], str], str, str]] = {
    # what: (graph, op of the node that is named, words of the message)
    **{
        name: (_unary(name), name, "not one finite number")
        for name in (*UNEVEN, "Reciprocal", "Sqrt", "Log")
    },
    "zero points per channel": (
        _conv,
        "com.microsoft.QLinearConv",
        "different weight zero points per channel",
    ),
    "pads counted and ceil_mode": (
        _pool,
        "com.microsoft.QLinearAveragePool",
        "count_include_pad together with ceil_mode",
    ),
    "mean over a middle axis": (
        lambda g: _codes(g, g.node("ReduceMean", _floats(g, (2, 4, 6)), g.const(np.array([1])))),
        *("ReduceMean", "neither the trailing nor the leading ones"),
    ),
    "mean of channels": (
        lambda g: _codes(
            g, g.node("ReduceMean", _floats(g, size=np.full(4, 0.1)), g.const(np.array([-1])))
        ),
        *("ReduceMean", "with one scale only"),
    ),
    "product of two codes": (_two_codes, "QLinearMatMul", "both depend on the input"),
    "integer product of two codes": (
        lambda g: g.node("MatMulInteger", g.input((3, 4), U8), g.input((4, 5), U8)),
        *("MatMulInteger", "both depend on the input"),
    ),
    "16 bits": (
        lambda g: g.quantize(g.input((1, 9)), 0.1, np.zeros((), np.uint16)),
        *("QuantizeLinear", "quantization to uint16 is not supported"),
    ),
    "blocks in": (
        lambda g: g.quantize(
            g.input((4, 6)), np.ones((2, 6)), np.zeros((2, 6), U8), axis=0, block_size=2
        ),
        *("QuantizeLinear", "its attribute 'block_size' is not supported (2)"),
    ),
    "blocks out": (
        lambda g: g.dequantize(
            g.input((4, 6), U8), np.ones((2, 6)), np.zeros((2, 6), U8), axis=0, block_size=2
        ),
        *("DequantizeLinear", "its attribute 'block_size' is not supported (2)"),
    ),
    "indices of a maximum": (
        lambda g: g.node("MaxPool", g.input((1, 2, 8), U8), outputs=2, kernel_shape=[2]),
        *("MaxPool", "its output 1"),
    ),
    "maximum of falling floats": (
        lambda g: g.node("MaxPool", g.node("Neg", _floats(g)), kernel_shape=[2]),
        *("MaxPool", "do not increase with their codes"),
    ),
    "float padding": (
        lambda g: _codes(
            g, g.node("Pad", _floats(g), g.const(np.array([0, 0, 1, 0, 0, 0])), g.f32(0.07))
        ),
        *("Pad", "is not the value of any code"),
    ),
    "float softmax": (
        lambda g: g.node("Softmax", _floats(g)),
        "Softmax",
        "compare the scores before it",
    ),
    "dynamic quantization": (
        lambda g: g.node("DynamicQuantizeLinear", g.input((1, 9)), outputs=3),
        *("DynamicQuantizeLinear", "quantize statically"),
    ),
    "float convolution": (_float_conv, "Conv", "QuantType.QUInt8"),
    "cast of floats": (
        lambda g: g.node("Cast", _floats(g), to=3),
        "Cast",
        "a cast from float32 to int8",
    ),
    "saturating conversion": (
        _huge_sum,
        "com.microsoft.QLinearAdd",
        "conversion to int32 overflows",
    ),
    "function of a sum": (
        lambda g: _codes(g, g.node("Tanh", g.node("Add", _floats(g), _floats(g)))),
        *("Tanh", "between 8-bit codes only"),
    ),
    "a tiny output scale": (_softmax, "com.microsoft.QLinearSoftmax", "is not supported"),
    "no rule": (
        lambda g: g.node("CumSum", _floats(g), g.const(np.array(1))),
        "CumSum",
        "no exact integer rule",
    ),
    "overflow": (
        lambda g: g.node(
            "MatMulInteger", g.input((1, 40_000), U8), g.const(np.full((40_000, 1), 255, U8))
        ),
        *("MatMulInteger", "outside int32"),
    ),
    "constants in a float concatenation": (
        lambda g: _codes(g, g.node("Concat", _floats(g), g.f32(np.zeros((1, 4, 2))), axis=-1)),
        *("Concat", "a concatenation of unlike tensors"),
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refuses_by_name(what: str, tmp_path: Path) -> None:
    """Files that onnxruntime runs and that have no exact rule: one line that names file, node and
    op."""
    if what == "a tiny output scale":
        needs_its_softmax()
    graph, name, words = REFUSALS[what]
    g = Graph(21)
    path = write(g.model(graph(g)), tmp_path / "model.onnx")
    session(path)
    with pytest.raises(UnsupportedModel) as caught:
        read_model(path)
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: node '") and f"' ({name} of " in message and words in message
    )
    assert "\n" not in message


def test_a_softmax_that_the_runtime_rounds_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only this op asks for more than the oldest onnxruntime that is supported."""
    monkeypatch.setattr(softmax, "OLDEST", (9, 0))
    g = Graph(21)
    path = write(g.model(_softmax(g)), tmp_path / "model.onnx")
    with pytest.raises(
        UnsupportedModel, match=r"QLinearSoftmax of .*: onnxruntime .* install 9\.0 or newer$"
    ):
        read_model(path)
