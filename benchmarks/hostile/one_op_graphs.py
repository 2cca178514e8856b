"""Random graphs of one op each, for `one_op.py`: every op that has a rule, in odd forms.

A generator draws everything: opset 10 to 25, ranks and sizes (1 and vector tails among them),
attributes present, absent or odd, uint8 or int8, zero points at the ends, scales from subnormal to
nearly infinite. Where ONNX or onnxruntime rejects what was drawn, the graph is counted as invalid;
where qverify does, as refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tests.graphs import Graph

Array = npt.NDArray[Any]
Rng = np.random.Generator
U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 130)  # of matrices


@dataclass(frozen=True, eq=False)
class Input:
    """A graph input; `step` is the size of the floats it gets (unused for codes)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    step: float = 1.0


@dataclass(frozen=True, eq=False)
class Case:
    """A graph and what it is fed; `every` asks for all pairs of codes (or all codes) at least
    once."""

    model: onnx.ModelProto
    inputs: tuple[Input, ...]
    every: bool = False


GENERATORS: dict[str, Callable[[Rng], Case]] = {}


def graphs(name: str) -> Callable[[Callable[[Rng], Case]], Callable[[Rng], Case]]:
    """Register a generator."""

    def register(function: Callable[[Rng], Case]) -> Callable[[Rng], Case]:
        GENERATORS[name] = function
        return function

    return register


# -- random parameters -----------------------------------------------------------------------------


def chance(rng: Rng, p: float) -> bool:
    return bool(rng.random() < p)


def eight(rng: Rng) -> np.dtype[Any]:
    return (U8, S8)[rng.integers(2)]


def zero(rng: Rng, dtype: npt.DTypeLike, shape: tuple[int, ...] = ()) -> Array:
    """Zero points: the ends, the middle, zero, anything."""
    info = np.iinfo(np.dtype(dtype))
    usual = [
        info.min,
        info.max,
        0,
        (info.min + info.max + 1) // 2,
        rng.integers(info.min, info.max + 1),
    ]
    return rng.choice(usual, shape).astype(dtype)


def ratio(rng: Rng, shape: tuple[int, ...] = ()) -> Array:
    """Around one: powers of two and their small multiples (many ties), k / 255, anything."""
    kind = rng.integers(5)
    if kind == 0:
        value: Any = 2.0 ** rng.integers(-3, 4, shape)
    elif kind == 1:
        value = rng.integers(1, 16, shape) / 8
    elif kind == 2:
        value = rng.integers(1, 512, shape) / 255
    elif kind == 3:
        value = np.nextafter(np.float32(1), np.asarray(rng.choice([0, 2], shape), np.float32))
    else:
        value = 10 ** rng.uniform(-1, 1, shape)
    return np.asarray(value, np.float32)


def size(rng: Rng) -> float:
    """A magnitude: usual, large or small, and now and then at the ends of float32."""
    kind = rng.random()
    if kind < 0.6:
        return float(2.0 ** rng.integers(-12, 5))
    if kind < 0.9:
        return float(10 ** rng.uniform(-12, 12))
    return float(10 ** rng.uniform(-45, 38))


def scale(rng: Rng, natural: float | None = None, shape: tuple[int, ...] = ()) -> Array:
    """A scale near `natural` most often, else of any magnitude; positive float32."""
    if natural is None or not np.isfinite(natural) or natural <= 0 or chance(rng, 0.1):
        natural = size(rng)
    with np.errstate(all="ignore"):
        value = (ratio(rng, shape).astype(np.float64) * natural).astype(np.float32)
    return np.clip(value, np.float32(1e-45), np.float32(3e38))


def parameters(rng: Rng, g: Graph, natural: float | None, dtype: Any) -> tuple[str, str, float]:
    """(scale, zero point) as constants, as scalars or vectors of one, and the scale."""
    s, z = scale(rng, natural), zero(rng, dtype)
    if chance(rng, 0.1):
        return g.const(s.reshape(1)), g.const(z.reshape(1)), float(s)
    return g.const(s), g.const(z), float(s)


def codes(rng: Rng, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Codes of one of several distributions, the ends among them."""
    info = np.iinfo(np.dtype(dtype))
    kind = rng.integers(8)
    if kind == 0:
        return np.full(shape, rng.choice([info.min, info.max]), dtype)
    if kind == 1:
        return rng.choice([info.min, info.max], shape).astype(dtype)
    values = rng.integers(info.min, info.max + 1, shape)
    if kind == 2:
        values = np.clip(
            rng.integers(-20, 21, shape) + rng.integers(info.min, info.max + 1), info.min, info.max
        )
    ends = rng.random(shape)
    values = np.where(ends < 0.03, info.min, np.where(ends > 0.97, info.max, values))
    return np.asarray(values).astype(dtype)


def opset(rng: Rng, low: int = 10, high: int = 25) -> int:
    return int(rng.integers(low, high + 1))


def dims(rng: Rng, rank: int, most: int = 6) -> tuple[int, ...]:
    """Small sizes, ones among them."""
    return tuple(
        int(v) for v in np.where(rng.random(rank) < 0.25, 1, rng.integers(1, most + 1, rank))
    )


def long_shape(rng: Rng, most: int = 300) -> tuple[int, ...]:
    """A shape whose size meets all vector tails."""
    rank = int(rng.integers(1, 4))
    if rank == 1:
        return (int(rng.integers(1, most)),)
    return (*dims(rng, rank - 1, 4), int(rng.integers(1, max(2, most // 8))))


def finish(
    rng: Rng,
    g: Graph,
    y: str,
    natural: float | None,
    dtype: Any = None,
    shape: tuple[int, ...] | None = None,
) -> str:
    """The float `y` quantized (per axis at times, where its shape is given), dequantized after
    that, or left as it is."""
    kind = rng.random()
    if kind < 0.2:
        return y
    dtype = eight(rng) if dtype is None else dtype
    if shape and g.opset >= 13 and chance(rng, 0.25):
        axis = int(rng.integers(-len(shape), len(shape)))
        count = (shape[axis],)
        ends = (g.const(scale(rng, natural, count)), g.const(zero(rng, dtype, count)))
        y = g.node("QuantizeLinear", y, *ends, axis=axis)
        return y if kind < 0.8 else g.node("DequantizeLinear", y, *ends, axis=axis)
    s, z, _ = parameters(rng, g, natural, dtype)
    y = g.node("QuantizeLinear", y, s, z)
    return (
        y if kind < 0.8 else g.node("DequantizeLinear", y, *parameters(rng, g, natural, dtype)[:2])
    )


def dequantized(
    rng: Rng, g: Graph, shape: tuple[int, ...], dtype: Any = None
) -> tuple[str, Input, float]:
    """A new input of codes, dequantized: (name of the floats, input, scale)."""
    dtype = eight(rng) if dtype is None else dtype
    x = g.input(shape, dtype)
    s, z, step = parameters(rng, g, None, dtype)
    return g.node("DequantizeLinear", x, s, z), Input(shape, dtype), step


# -- quantizers ------------------------------------------------------------------------------------


@graphs("QuantizeLinear")
def quantize_linear(rng: Rng) -> Case:
    version = opset(rng)
    g, shape, dtype, more = Graph(version), long_shape(rng), eight(rng), {}
    step = scale(rng)
    inputs = [g.input(shape)]
    if version >= 13 and chance(rng, 0.4):
        axis = int(rng.integers(-len(shape), len(shape)))
        count = (shape[axis],)
        step = scale(rng, None, count)
        inputs += [g.const(step), g.const(zero(rng, dtype, count))]
        if chance(rng, 0.8):
            more["axis"] = axis
    else:
        inputs.append(g.const(step))
        if chance(rng, 0.8):
            inputs.append(g.const(zero(rng, dtype)))
        elif version >= 21 and chance(rng, 0.6):
            more["output_dtype"] = int(onnx.TensorProto.INT8)
    if version >= 19 and chance(rng, 0.2):
        more["saturate"] = int(rng.integers(2))
    if chance(rng, 0.1):
        more["domain"] = "com.microsoft"
    y = g.node("QuantizeLinear", *inputs, **more)
    if chance(rng, 0.3) and len(inputs) > 2:
        y = g.node("DequantizeLinear", y, g.f32(scale(rng)), g.const(zero(rng, dtype)))
    return Case(g.model(y), (Input(shape, np.dtype(np.float32), float(step.flat[0])),))


@graphs("floats before the quantizer")
def input_chain(rng: Rng) -> Case:
    g, shape = Graph(opset(rng, 13)), long_shape(rng, 100)
    step = size(rng) if chance(rng, 0.3) else 1.0
    x = g.input(shape)
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice(["Add", "Sub", "Mul", "Div", "Min", "Max", "Clip", "Relu", "Neg"]))
        c = rng.normal(size=() if chance(rng, 0.5) else shape[-1:]) * 3
        if name in ("Mul", "Div") and chance(rng, 0.3):
            c = np.abs(c) * size(rng)
        if name in ("Relu", "Neg"):
            x = g.node(name, x)
        elif name == "Clip":
            low, high = np.sort(rng.normal(size=2) * 100 * step)
            x = g.node(name, x, g.f32(low), g.f32(high))
        else:
            ends = (x, g.f32(c))
            x = g.node(name, *(ends[::-1] if chance(rng, 0.3) else ends))
    y = finish(rng, g, x, step, shape=shape)
    return Case(g.model(y), (Input(shape, np.dtype(np.float32), step),))


@graphs("DequantizeLinear")
def dequantize_linear(rng: Rng) -> Case:
    version = opset(rng)
    g, shape, dtype, more = Graph(version), long_shape(rng), eight(rng), {}
    inputs = [g.input(shape, dtype)]
    natural = None
    if version >= 13 and chance(rng, 0.4):
        axis = int(rng.integers(-len(shape), len(shape)))
        count = (shape[axis],)
        inputs += [g.const(scale(rng, None, count)), g.const(zero(rng, dtype, count))]
        if chance(rng, 0.8):
            more["axis"] = axis
    else:
        s = scale(rng)
        natural = float(s)
        inputs.append(g.const(s))
        if chance(rng, 0.8):
            inputs.append(g.const(zero(rng, dtype)))
    if chance(rng, 0.1):
        more["domain"] = "com.microsoft"
    y = g.node("DequantizeLinear", *inputs, **more)
    return Case(g.model(finish(rng, g, y, natural, shape=shape)), (Input(shape, dtype),))


@graphs("Cast")
def cast(rng: Rng) -> Case:
    g, shape, dtype = Graph(opset(rng)), long_shape(rng), eight(rng)
    kinds = [
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT8,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT32,
    ]
    y = g.node(
        "Cast", g.input(shape, dtype), to=int(rng.choice(kinds[:1] if chance(rng, 0.5) else kinds))
    )
    return Case(g.model(y), (Input(shape, dtype),))


# -- weighted sums ---------------------------------------------------------------------------------


def weight(rng: Rng, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Weights; a third of them small, so that bits of the sum matter."""
    info = np.iinfo(np.dtype(dtype))
    kind = rng.integers(4)
    if kind == 0:
        return rng.integers(max(info.min, -2), 3, shape).astype(dtype)
    if kind == 1:
        return np.full(shape, rng.choice([info.min, info.max]), dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution or a pool."""

    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    attributes: dict[str, Any]


def window(rng: Rng, pool: bool) -> Window:
    """Any kernel, stride, dilation and padding of rank 1 to 3 over few elements."""
    rank = int(rng.choice([1, 2, 2, 3]))
    spatial = dims(rng, rank, 9 if rank < 3 else 5)
    kernel = tuple(int(v) for v in np.minimum(dims(rng, rank, 4), np.asarray(spatial) + 1))
    if pool and chance(rng, 0.15):
        kernel = spatial
    more: dict[str, Any] = {}
    if chance(rng, 0.5):
        more["strides"] = [int(v) for v in rng.integers(1, 5, rank)]
    if chance(rng, 0.3):
        more["dilations"] = [int(v) for v in rng.integers(1, 4, rank)]
    form = rng.integers(6)
    if form < 2:
        more["pads"] = [int(v) for v in rng.integers(0, np.tile(np.maximum(kernel, 1), 2))]
    elif form < 4:
        more["auto_pad"] = str(rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"]))
        if chance(rng, 0.1):
            more["pads"] = [int(v) for v in rng.integers(0, 2, 2 * rank)]
    if pool and chance(rng, 0.4):
        more["ceil_mode"] = int(rng.integers(2))
    return Window(spatial, kernel, more)


def _convolution(rng: Rng) -> tuple[Window, int, int, int]:
    """(window, channels, filters, groups): plain, grouped, depthwise, pointwise."""
    w = window(rng, pool=False)
    kind = rng.integers(4)
    if kind == 0:
        groups = int(rng.choice([1, 2, 3, 8, 16, 17, 32]))
        return w, groups, groups * int(rng.integers(1, 3)), groups
    if kind == 1:
        groups = int(rng.integers(1, 4))
        return w, groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 4)), groups
    return w, int(rng.integers(1, 18)), int(rng.integers(1, 18)), 1


def _natural(a: Any, b: Any, depth: int, rng: Rng) -> float:
    """The size of a quantized product: from saturated everywhere to zero everywhere."""
    with np.errstate(all="ignore"):
        return float(a) * float(np.mean(b)) * 60 * np.sqrt(depth) * float(10 ** rng.normal(0, 0.7))


def _bias(rng: Rng, shape: tuple[int, ...]) -> Array:
    """int32 biases: usual ones, and such that sums pass 2**24, where float32 rounds."""
    reach = int(rng.choice([1_000, 100_000, 2**26, 2**30]))
    return rng.integers(-reach, reach, shape).astype(np.int32)


@graphs("QLinearConv")
def qlinear_conv(rng: Rng) -> Case:
    w, channels, filters, groups = _convolution(rng)
    g, act, kind = Graph(opset(rng)), eight(rng), eight(rng)
    last = chance(rng, 0.4)
    shape = (
        int(rng.choice([1, 1, 2])),
        *((*w.spatial, channels) if last else (channels, *w.spatial)),
    )
    columns = (filters,) if chance(rng, 0.5) else ()
    a, b = scale(rng), scale(rng, None, columns)
    depth = channels // groups * int(np.prod(w.kernel))
    out = act if chance(rng, 0.95) else eight(rng)
    w_zero = (
        np.full(columns, zero(rng, kind), kind) if chance(rng, 0.9) else zero(rng, kind, columns)
    )
    inputs = [g.input(shape, act), g.const(a), g.const(zero(rng, act))]
    inputs += [
        g.const(weight(rng, (filters, channels // groups, *w.kernel), kind)),
        g.const(b),
        g.const(w_zero),
    ]
    inputs += [g.const(scale(rng, _natural(a, b, depth, rng))), g.const(zero(rng, out))]
    if chance(rng, 0.6):
        inputs.append(g.const(_bias(rng, (filters,))))
    more = dict(w.attributes)
    if groups > 1 or chance(rng, 0.1):
        more["group"] = groups
    if chance(rng, 0.4):
        more["kernel_shape"] = list(w.kernel)
    if last:
        more |= {"domain": "com.microsoft", "channels_last": 1}
    elif chance(rng, 0.2):
        more["domain"] = "com.microsoft"
    return Case(g.model(g.node("QLinearConv", *inputs, **more)), (Input(shape, act),))


@graphs("ConvInteger")
def conv_integer(rng: Rng) -> Case:
    w, channels, filters, groups = _convolution(rng)
    g, act, kind = Graph(opset(rng)), eight(rng), eight(rng)
    shape = (int(rng.choice([1, 1, 2])), channels, *w.spatial)
    inputs = [
        g.input(shape, act),
        g.const(weight(rng, (filters, channels // groups, *w.kernel), kind)),
    ]
    if form := rng.integers(3):
        inputs += [g.const(zero(rng, act)), g.const(zero(rng, kind))][:form]
    more = dict(w.attributes)
    if groups > 1:
        more["group"] = groups
    y = g.node("ConvInteger", *inputs, **more)
    return Case(
        g.model(_after_sum(rng, g, y, (filters, *([1] * len(w.spatial))))), (Input(shape, act),)
    )


def _after_sum(rng: Rng, g: Graph, y: str, channel: tuple[int, ...]) -> str:
    """int32, or dequantized: by DequantizeLinear, or Cast and Mul; then perhaps more floats and a
    quantizer."""
    kind = rng.integers(4)
    if kind == 0:
        return y
    if kind == 1:
        per_axis = g.opset >= 13 and chance(rng, 0.4)
        s = scale(rng, None, (max(channel),) if per_axis else ())
        more = {"axis": -len(channel)} if per_axis else {}
        return finish(
            rng, g, g.node("DequantizeLinear", y, g.const(s), **more), float(s.flat[0]) * 300
        )
    s = scale(rng, None, channel if chance(rng, 0.5) else ())
    y = g.node("Mul", g.node("Cast", y, to=int(onnx.TensorProto.FLOAT)), g.const(s))
    natural = float(s.flat[0]) * 300
    if chance(rng, 0.5):
        y = g.node("Add", y, g.f32(np.clip(rng.normal(size=channel) * natural, -3e38, 3e38)))
    for name in rng.choice(["Relu", "Neg", "Sub", "Div", "Min"], rng.integers(3), replace=False):
        one = g.f32(np.clip(rng.normal(size=channel) * natural, -3e38, 3e38))
        y = g.node(str(name), y, *([] if name in ("Relu", "Neg") else [one]))
    return finish(rng, g, y, natural)


@graphs("Conv in QDQ form")
def conv_qdq(rng: Rng) -> Case:
    w, channels, filters, groups = _convolution(rng)
    g, act = Graph(opset(rng, 13)), eight(rng)
    kind = S8 if chance(rng, 0.7) else U8
    shape = (1, channels, *w.spatial)
    columns = (filters,) if kind == S8 and chance(rng, 0.5) else ()
    a, b = scale(rng), scale(rng, None, columns)
    w_zero = np.zeros(columns, kind) if kind == S8 else zero(rng, kind)
    x = g.dequantize(g.input(shape, act), a, zero(rng, act))
    v = g.dequantize(
        g.const(weight(rng, (filters, channels // groups, *w.kernel), kind)), b, w_zero, axis=0
    )
    ends = [x, v]
    if chance(rng, 0.6):
        with np.errstate(all="ignore"):
            product = np.broadcast_to(a * b, columns).astype(np.float32)
        if (product > 0).all() and np.isfinite(product).all():
            ends.append(
                g.dequantize(
                    g.const(_bias(rng, (filters,))), product, np.zeros(columns, np.int32), axis=0
                )
            )
    y = g.node("Conv", *ends, **w.attributes, **({"group": groups} if groups > 1 else {}))
    if chance(rng, 0.3):
        y = g.node("Relu", y)
    y = g.quantize(
        y, scale(rng, _natural(a, b, channels * int(np.prod(w.kernel)), rng)), zero(rng, act)
    )
    return Case(g.model(y), (Input(shape, act),))


def _matrices(rng: Rng) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of two matrices, or stacks of them, that can be multiplied."""
    depth, rows, columns = (int(rng.choice(SIZES)) for _ in range(3))
    kind = rng.integers(6)
    if kind == 0:
        return (depth,), (depth, columns)
    stack = dims(rng, int(rng.integers(1, 3)), 3)
    if kind == 1:
        return (*stack, rows, depth), (depth, columns)
    if kind == 2:
        own = tuple(1 if chance(rng, 0.4) else v for v in stack)
        return (*stack[int(rng.integers(2)) :], rows, depth), (*own, depth, columns)
    return (rows, depth), (depth, columns)


def _columns(rng: Rng, weight: tuple[int, ...]) -> tuple[int, ...]:
    """A shape for parameters of a weight [*stack, K, N]: one for all, or one for every column, in
    odd spellings too."""
    forms = [
        (),
        (),
        (1,),
        weight[-1:],
        (*weight[:-2], 1, weight[-1]),
        (1,) * len(weight),
        (1, weight[-1]),
    ]
    return forms[rng.integers(len(forms))]


@graphs("QLinearMatMul")
def qlinear_matmul(rng: Rng) -> Case:
    g, act, kind = Graph(opset(rng)), eight(rng), eight(rng)
    left, right = _matrices(rng)
    columns = _columns(rng, right)
    a, b = scale(rng), scale(rng, None, columns)
    zeros = zero(rng, kind, columns) if chance(rng, 0.9) else zero(rng, kind)
    out = act if chance(rng, 0.9) else eight(rng)
    x = [g.input(left, act), g.const(a), g.const(zero(rng, act))]
    w = [g.const(weight(rng, right, kind)), g.const(b), g.const(zeros)]
    used = Input(left, act)
    if chance(rng, 0.1) and len(left) == 2 == len(right) and columns == ():
        used = Input(right[::-1], act)
        g = Graph(g.opset)
        w = [g.const(weight(rng, left, kind)), g.const(a), g.const(zero(rng, kind))]
        x = [g.input(right, act), g.const(b), g.const(zero(rng, act))]
        x, w, used = w, x, Input(right, act)
    y = [g.const(scale(rng, _natural(a, b, left[-1], rng))), g.const(zero(rng, out))]
    more = {"domain": "com.microsoft"} if chance(rng, 0.1) else {}
    return Case(g.model(g.node("QLinearMatMul", *x, *w, *y, **more)), (used,))


@graphs("MatMulInteger")
def matmul_integer(rng: Rng) -> Case:
    g, act, kind = Graph(opset(rng)), eight(rng), eight(rng)
    left, right = _matrices(rng)
    inputs = [g.input(left, act), g.const(weight(rng, right, kind))]
    if form := rng.integers(3):
        inputs += [g.const(zero(rng, act)), g.const(zero(rng, kind, _columns(rng, right)))][:form]
    y = g.node("MatMulInteger", *inputs)
    if chance(rng, 0.2):
        y = g.node("Add", y, g.const(_bias(rng, right[-1:] if chance(rng, 0.7) else ())))
    return Case(g.model(_after_sum(rng, g, y, right[-1:])), (Input(left, act),))


@graphs("MatMulIntegerToFloat")
def matmul_integer_to_float(rng: Rng) -> Case:
    g, act, kind = Graph(opset(rng)), eight(rng), eight(rng)
    left, right = _matrices(rng)
    columns = _columns(rng, right)
    a, b = scale(rng), scale(rng, None, columns)
    inputs = [g.input(left, act), g.const(weight(rng, right, kind)), g.const(a), g.const(b)]
    form = rng.integers(4)
    natural = float(a) * float(b.flat[0]) * 300
    zeros = columns if chance(rng, 0.5) else _columns(rng, right)
    inputs += [g.const(zero(rng, act)), g.const(zero(rng, kind, zeros))][: min(form, 2)]
    if form == 3:
        inputs.append(g.f32(np.clip(rng.normal(size=right[-1:]) * natural, -3e38, 3e38)))
    y = g.node("MatMulIntegerToFloat", *inputs)
    return Case(g.model(finish(rng, g, y, natural)), (Input(left, act),))


@graphs("QGemm")
def qgemm(rng: Rng) -> Case:
    g, act, kind = Graph(opset(rng)), eight(rng), eight(rng)
    rows, depth, width = (int(rng.choice(SIZES)) for _ in range(3))
    columns = _columns(rng, (depth, width))
    a, b = scale(rng), scale(rng, None, columns)
    more: dict[str, Any] = {}
    if chance(rng, 0.5):
        more["alpha"] = float(np.float32(rng.choice([1.0, 0.5, 0.37, 3.0, -1.0, 1e-3])))
    turn_a, turn_b = chance(rng, 0.3), chance(rng, 0.5)
    if turn_a or chance(rng, 0.1):
        more["transA"] = int(turn_a)
    if turn_b or chance(rng, 0.1):
        more["transB"] = int(turn_b)
    shape = (depth, rows) if turn_a else (rows, depth)
    inputs = [g.input(shape, act), g.const(a), g.const(zero(rng, act))]
    inputs += [g.const(weight(rng, (width, depth) if turn_b else (depth, width), kind)), g.const(b)]
    inputs += [g.const(zero(rng, kind, columns)), ""]
    bias: Any = [None, (width,), (1, width), (rows, width), (rows, 1), (1,), ()][rng.integers(7)]
    if bias is not None:
        inputs[6] = g.const(_bias(rng, bias))
    out = act if chance(rng, 0.9) else eight(rng)
    if chance(rng, 0.7):
        natural = _natural(a, b, depth, rng) * abs(more.get("alpha", 1.0))
        inputs += [g.const(scale(rng, natural)), g.const(zero(rng, out))]
    return Case(g.model(g.node("QGemm", *inputs, **more)), (Input(shape, act),))


@graphs("MatMul and Gemm in QDQ form")
def products_qdq(rng: Rng) -> Case:
    g, act = Graph(opset(rng, 13)), eight(rng)
    gemm = chance(rng, 0.5)
    left, right = _matrices(rng)
    if gemm:
        left, right = (left[-2] if len(left) > 1 else 1, left[-1]), right[-2:]
    kind = S8 if chance(rng, 0.6) else U8
    columns = right[-1:] if kind == S8 and chance(rng, 0.3) else ()
    a, b = scale(rng), scale(rng, None, columns)
    zeros = np.zeros(columns, kind) if kind == S8 else zero(rng, kind)
    turned = gemm and chance(rng, 0.5)
    w = weight(rng, right, kind)
    x = g.dequantize(g.input(left, act), a, zero(rng, act))
    v = g.dequantize(
        g.const(w.T.copy() if turned else w), b, zeros, axis=0 if turned else len(right) - 1
    )
    ends, more = [x, v], {"transB": 1} if turned else {}
    if gemm and chance(rng, 0.6):
        with np.errstate(all="ignore"):
            product = np.broadcast_to(a * b, columns).astype(np.float32)
        if (product > 0).all() and np.isfinite(product).all():
            ends.append(
                g.dequantize(
                    g.const(_bias(rng, right[-1:])), product, np.zeros(columns, np.int32), axis=0
                )
            )
    y = g.node("Gemm" if gemm else "MatMul", *ends, **more)
    return Case(g.model(finish(rng, g, y, _natural(a, b, left[-1], rng), act)), (Input(left, act),))


@graphs("float MatMul or Gemm last")
def float_product(rng: Rng) -> Case:
    g, act = Graph(opset(rng, 13)), eight(rng)
    rows, depth, width = (int(rng.choice([1, 2, 3, 7, 8, 16, 33, 200])) for _ in range(3))
    gemm, more = chance(rng, 0.5), {}
    w = np.clip(rng.normal(size=(depth, width)) * size(rng), -3e38, 3e38).astype(np.float32)
    x = g.dequantize(g.input((rows, depth), act), scale(rng), zero(rng, act))
    if gemm and chance(rng, 0.5):
        w, more = np.ascontiguousarray(w.T), {"transB": 1}
    ends = [x, g.const(w)]
    if gemm and chance(rng, 0.6):
        form: Any = [(width,), (1, width), (rows, width), (rows, 1), (1,), ()][rng.integers(6)]
        ends.append(g.f32(np.clip(rng.normal(size=form) * size(rng), -3e38, 3e38)))
    y = g.node("Gemm" if gemm else "MatMul", *ends, **more)
    return Case(g.model(y), (Input((rows, depth), act),))


# -- two inputs ------------------------------------------------------------------------------------


def _pair(rng: Rng) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast, in either rank."""
    shape = (*dims(rng, int(rng.integers(0, 3)), 4), int(rng.integers(1, 70)))
    ends = []
    for _ in range(2):
        own = tuple(1 if chance(rng, 0.25) else v for v in shape)
        ends.append(own[int(rng.integers(0, len(own) + 1)) :] if chance(rng, 0.3) else own)
    return ends[0], ends[1]


def _of_two(rng: Rng, name: str) -> Case:
    g, dtype = Graph(opset(rng)), eight(rng)
    every = chance(rng, 0.03)
    shapes = ((65_536,), (65_536,)) if every else _pair(rng)
    a = scale(rng)
    b = scale(rng, float(a) if name == "QLinearAdd" else None)
    c = scale(rng, float(a) * 2 if name == "QLinearAdd" else float(a) * float(b) * 80)
    constant = -1 if every or chance(rng, 0.5) else int(rng.integers(2))
    ends = [
        g.const(codes(rng, shape, dtype)) if k == constant else g.input(shape, dtype)
        for k, shape in enumerate(shapes)
    ]
    zeros = ["" if chance(rng, 0.05) else g.const(zero(rng, dtype)) for _ in range(3)]
    y = g.node(
        name, ends[0], g.const(a), zeros[0], ends[1], g.const(b), zeros[1], g.const(c), zeros[2]
    )
    return Case(
        g.model(y), tuple(Input(s, dtype) for k, s in enumerate(shapes) if k != constant), every
    )


@graphs("QLinearAdd")
def qlinear_add(rng: Rng) -> Case:
    return _of_two(rng, "QLinearAdd")


@graphs("QLinearMul")
def qlinear_mul(rng: Rng) -> Case:
    return _of_two(rng, "QLinearMul")


@graphs("Add, Sub, Mul, Div, Min, Max of two tensors")
def two_floats(rng: Rng) -> Case:
    g, dtype = Graph(opset(rng, 13)), eight(rng)
    name = str(rng.choice(["Add", "Sub", "Mul", "Div", "Min", "Max"]))
    every = chance(rng, 0.03)
    shapes = ((65_536,), (65_536,)) if every else _pair(rng)
    x, first, a = dequantized(rng, g, shapes[0], dtype)
    if chance(rng, 0.2):
        y = g.quantize(g.node(name, x, x), scale(rng), zero(rng, dtype))
        return Case(g.model(y), (first,))
    y, second, b = dequantized(rng, g, shapes[1], dtype if chance(rng, 0.9) else eight(rng))
    natural = a * b * 80 if name == "Mul" else a + b
    z = g.node(name, x, y)
    if chance(rng, 0.2):
        z = g.node("Relu", z)
    return Case(
        g.model(g.quantize(z, scale(rng, natural), zero(rng, dtype))), (first, second), every
    )


@graphs("float arithmetic with a constant")
def float_constant(rng: Rng) -> Case:
    g = Graph(opset(rng, 13))
    ends = _pair(rng)
    x, item, s = dequantized(rng, g, ends[0])
    if chance(rng, 0.2) and ends[0]:
        x = g.node("Sigmoid", x)
    name = str(rng.choice(["Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu"]))
    c = np.clip(
        rng.normal(size=ends[1]) * (s * 50 if name not in ("Mul", "Div", "PRelu") else 1.0),
        -3e38,
        3e38,
    )
    if chance(rng, 0.1):
        c = c * size(rng)
    pair = (x, g.f32(np.clip(c, -3e38, 3e38)))
    y = g.node(name, *(pair[::-1] if chance(rng, 0.3) and name != "PRelu" else pair))
    return Case(g.model(finish(rng, g, y, s, shape=np.broadcast_shapes(*ends))), (item,))


# -- concatenation, where --------------------------------------------------------------------------


@graphs("QLinearConcat")
def qlinear_concat(rng: Rng) -> Case:
    g, dtype = Graph(opset(rng)), eight(rng)
    shape = long_shape(rng, 60)
    axis = int(rng.integers(-len(shape), len(shape)))
    y, y_zero = scale(rng), zero(rng, dtype)
    inputs, fed = [g.const(y), g.const(y_zero)], []
    for k in range(rng.integers(1, 4)):
        own = list(shape)
        own[axis] = int(rng.integers(1, 6))
        same = chance(rng, 0.3)
        if fed and chance(rng, 0.3):
            inputs.append(g.const(codes(rng, tuple(own), dtype)))
        else:
            inputs.append(g.input(tuple(own), dtype))
            fed.append(Input(tuple(own), dtype))
        inputs += [
            g.const(y if same else scale(rng, float(y))),
            g.const(y_zero if same else zero(rng, dtype)),
        ]
        del k
    return Case(g.model(g.node("QLinearConcat", *inputs, axis=axis)), tuple(fed))


@graphs("Concat")
def concat(rng: Rng) -> Case:
    g, dtype = Graph(opset(rng, 13)), eight(rng)
    shape = long_shape(rng, 60)
    axis = int(rng.integers(-len(shape), len(shape)))
    quantized, ends, fed, s = chance(rng, 0.5), [], [], scale(rng)
    for _ in range(rng.integers(1, 4)):
        own = list(shape)
        own[axis] = int(rng.integers(1, 6))
        if fed and not quantized and chance(rng, 0.3):
            ends.append(g.const(codes(rng, tuple(own), dtype)))
            continue
        fed.append(Input(tuple(own), dtype))
        x = g.input(tuple(own), dtype)
        ends.append(g.dequantize(x, scale(rng, float(s)), zero(rng, dtype)) if quantized else x)
    y = g.node("Concat", *ends, axis=axis)
    return Case(g.model(finish(rng, g, y, float(s), dtype) if quantized else y), tuple(fed))


@graphs("QLinearWhere")
def qlinear_where(rng: Rng) -> Case:
    g, dtype = Graph(opset(rng)), eight(rng)
    shapes = (*_pair(rng), ())
    third = np.broadcast_shapes(shapes[0], shapes[1])
    condition = tuple(1 if chance(rng, 0.3) else v for v in third)
    s = scale(rng)
    inputs, fed = [g.const(rng.random(condition) < 0.5)], []
    for k in range(2):
        if k and chance(rng, 0.3):
            inputs.append(g.const(codes(rng, shapes[k], dtype)))
        else:
            inputs.append(g.input(shapes[k], dtype))
            fed.append(Input(shapes[k], dtype))
        inputs += [g.const(scale(rng, float(s))), g.const(zero(rng, dtype))]
    return Case(
        g.model(g.node("QLinearWhere", *inputs, g.const(s), g.const(zero(rng, dtype)))), tuple(fed)
    )


# -- pools and means -------------------------------------------------------------------------------


@graphs("MaxPool")
def max_pool(rng: Rng) -> Case:
    w = window(rng, pool=True)
    g, dtype = Graph(opset(rng)), eight(rng)
    more = dict(w.attributes)
    if chance(rng, 0.1):
        more["storage_order"] = 0
    form = rng.integers(4)
    channels = int(rng.integers(1, 4))
    shape = (int(rng.choice([1, 1, 2])), channels, *w.spatial)
    if form == 3:
        shape = (shape[0], *w.spatial, channels)
        y = g.node("NhwcMaxPool", g.input(shape, dtype), kernel_shape=list(w.kernel), **more)
        return Case(g.model(y), (Input(shape, dtype),))
    if form == 2:
        x, item, s = dequantized(rng, g, shape, dtype)
        y = g.node("MaxPool", x, kernel_shape=list(w.kernel), **more)
        return Case(g.model(finish(rng, g, y, s)), (item,))
    y = g.node("MaxPool", g.input(shape, dtype), kernel_shape=list(w.kernel), **more)
    return Case(g.model(y), (Input(shape, dtype),))


@graphs("GlobalMaxPool")
def global_max_pool(rng: Rng) -> Case:
    g, shape = Graph(opset(rng, 13)), dims(rng, int(rng.integers(2, 6)), 6)
    if chance(rng, 0.3):
        dtype = eight(rng)
        return Case(g.model(g.node("GlobalMaxPool", g.input(shape, dtype))), (Input(shape, dtype),))
    x, item, s = dequantized(rng, g, shape)
    return Case(g.model(finish(rng, g, g.node("GlobalMaxPool", x), s)), (item,))


@graphs("QLinearAveragePool")
def qlinear_average_pool(rng: Rng) -> Case:
    w = window(rng, pool=True)
    g, dtype = Graph(opset(rng)), eight(rng)
    more = dict(w.attributes)
    if chance(rng, 0.5):
        more["count_include_pad"] = int(rng.integers(2))
    form, channels = rng.integers(3), int(rng.integers(1, 20))
    if form == 1:  # onnxruntime divides by zero where such a window does not fit
        w = Window(w.spatial, tuple(map(min, w.kernel, w.spatial)), w.attributes)
    shape = (
        int(rng.choice([1, 1, 2])),
        *((*w.spatial, channels) if form == 1 else (channels, *w.spatial)),
    )
    s = scale(rng)
    y_scale, x_zero, y_zero = scale(rng, float(s)), zero(rng, dtype), zero(rng, dtype)
    x = g.input(shape, dtype)
    if form == 2:
        y = g.node("AveragePool", g.dequantize(x, s, x_zero), kernel_shape=list(w.kernel), **more)
        return Case(g.model(g.quantize(y, y_scale, y_zero)), (Input(shape, dtype),))
    if form == 1:
        more["channels_last"] = 1
    zeros = ["" if chance(rng, 0.05) else g.const(z) for z in (x_zero, y_zero)]
    ends = (x, g.const(s), zeros[0], g.const(y_scale), zeros[1])
    y = g.node("QLinearAveragePool", *ends, kernel_shape=list(w.kernel), **more)
    return Case(g.model(y), (Input(shape, dtype),))


@graphs("QLinearGlobalAveragePool")
def qlinear_global_average_pool(rng: Rng) -> Case:
    g, dtype = Graph(opset(rng)), eight(rng)
    rank = int(rng.integers(1, 4))
    spatial, channels, batch = (
        dims(rng, rank, 9),
        int(rng.integers(1, 40)),
        int(rng.choice([1, 1, 2])),
    )
    s, x_zero, y_zero = scale(rng), zero(rng, dtype), zero(rng, dtype)
    y_scale = scale(rng, float(s) / np.sqrt(np.prod(spatial)))
    form = rng.integers(3)
    shape = (batch, *((*spatial, channels) if form == 1 else (channels, *spatial)))
    x = g.input(shape, dtype)
    if form == 2:
        y = g.quantize(g.node("GlobalAveragePool", g.dequantize(x, s, x_zero)), y_scale, y_zero)
    else:
        more = {"channels_last": 1} if form else ({"channels_last": 0} if chance(rng, 0.2) else {})
        ends = (x, g.const(s), g.const(x_zero), g.const(y_scale), g.const(y_zero))
        y = g.node("QLinearGlobalAveragePool", *ends, **more)
    return Case(g.model(y), (Input(shape, dtype),))


@graphs("ReduceMean")
def reduce_mean(rng: Rng) -> Case:
    version = opset(rng, 11)
    g, rank = Graph(version), int(rng.integers(1, 6))
    shape = list(dims(rng, rank, 5))
    if chance(rng, 0.7):
        shape[rng.integers(rank)] = int(rng.integers(1, 70))
    axes = [int(a) for a in np.flatnonzero(rng.random(rank) < 0.5)]
    axes = [a - rank if chance(rng, 0.3) else a for a in axes]
    rng.shuffle(axes)
    x, item, s = dequantized(rng, g, tuple(shape))
    more: dict[str, Any] = {"keepdims": int(rng.integers(2))} if chance(rng, 0.7) else {}
    inputs = [x]
    if version >= 18:
        if axes or chance(rng, 0.5):
            inputs.append(g.const(np.array(axes, np.int64)))
        if chance(rng, 0.3):
            more["noop_with_empty_axes"] = int(rng.integers(2))
    elif axes:
        more["axes"] = axes
    return Case(g.model(finish(rng, g, g.node("ReduceMean", *inputs, **more), s)), (item,))


# -- softmax, activations --------------------------------------------------------------------------


@graphs("QLinearSoftmax")
def qlinear_softmax(rng: Rng) -> Case:
    g, dtype, shape = Graph(opset(rng)), eight(rng), long_shape(rng, 400)
    x_scale = np.float32(10 ** rng.uniform(-3, 1)) if chance(rng, 0.7) else scale(rng, 0.1)
    y_scale = np.float32(rng.choice([1 / 256, 1 / 255, 1 / 128, 0.01, rng.uniform(0.001, 0.02)]))
    if chance(rng, 0.1):
        y_scale = np.float32(np.clip(10 ** rng.uniform(-45, 38), 1e-45, 3e38))
    more: dict[str, Any] = {}
    if chance(rng, 0.7):
        more["axis"] = int(rng.integers(-len(shape), len(shape)))
    more["opset"] = int(rng.choice([1, 10, 11, 12, 13, 17, 21]))
    ends = [g.const(x_scale), g.const(zero(rng, dtype)), g.const(y_scale)]
    if chance(rng, 0.9):
        ends.append(g.const(zero(rng, dtype)))
    y = g.node("QLinearSoftmax", g.input(shape, dtype), *ends, **more)
    return Case(g.model(y), (Input(shape, dtype),))


@graphs("Softmax in QDQ form")
def softmax_qdq(rng: Rng) -> Case:
    g, shape = Graph(opset(rng)), long_shape(rng, 400)
    dtype = eight(rng)
    x = g.dequantize(g.input(shape, dtype), scale(rng, 0.05), zero(rng, dtype))
    more = {"axis": int(rng.integers(-len(shape), len(shape)))} if chance(rng, 0.7) else {}
    y = g.quantize(
        g.node("Softmax", x, **more),
        np.float32(rng.choice([1 / 256, 1 / 255, 1 / 128])),
        zero(rng, dtype),
    )
    return Case(g.model(y), (Input(shape, dtype),))


ALPHAS = (0.01, 0.2, 0.0, 1.0, 1.5, -0.3, 1e-30, 3e38)


@graphs("QLinearLeakyRelu and QLinearSigmoid")
def qlinear_activation(rng: Rng) -> Case:
    g, dtype = Graph(opset(rng)), eight(rng)
    shape = (256,) if chance(rng, 0.5) else long_shape(rng)
    name = str(rng.choice(["QLinearLeakyRelu", "QLinearSigmoid"]))
    more = (
        {"alpha": float(rng.choice(ALPHAS))}
        if name == "QLinearLeakyRelu" and chance(rng, 0.7)
        else {}
    )
    s = scale(rng, 0.05 if name == "QLinearSigmoid" else None)
    zeros = ["" if chance(rng, 0.05) else g.const(zero(rng, dtype)) for _ in range(2)]
    y_scale = scale(rng, 0.01 if name == "QLinearSigmoid" else float(s))
    y = g.node(
        name, g.input(shape, dtype), g.const(s), zeros[0], g.const(y_scale), zeros[1], **more
    )
    return Case(g.model(y), (Input(shape, dtype),), every=shape == (256,))


FUNCTIONS: dict[str, tuple[str, ...]] = {
    **{
        name: ()
        for name in (
            "Abs",
            "Tanh",
            "Sigmoid",
            "HardSwish",
            "Erf",
            "Softplus",
            "Softsign",
            "Exp",
            "Sqrt",
            "Log",
        )
    },
    **{
        name: ()
        for name in (
            "Reciprocal",
            "Sin",
            "Cos",
            "Atan",
            "Floor",
            "Ceil",
            "Round",
            "Sign",
            "Mish",
            "Neg",
            "Relu",
        )
    },
    **{name: ("alpha",) for name in ("Elu", "Celu", "ThresholdedRelu", "LeakyRelu")},
    **{name: ("alpha", "beta") for name in ("HardSigmoid",)},
    "Selu": ("alpha", "gamma"),
    **{name: () for name in ("Gelu", "QuickGelu", "FastGelu")},
}


@graphs("unary functions of a dequantized tensor")
def unary(rng: Rng) -> Case:
    g, dtype = Graph(opset(rng)), eight(rng)
    shape = (256,) if chance(rng, 0.5) else long_shape(rng)
    name = str(rng.choice(list(FUNCTIONS)))
    s = scale(rng, 0.04)
    x = g.dequantize(g.input(shape, dtype), s, zero(rng, dtype))
    more: dict[str, Any] = {
        a: float(rng.choice(ALPHAS[:7])) for a in FUNCTIONS[name] if chance(rng, 0.6)
    }
    if name == "Gelu":
        more = [{}, {"approximate": "tanh"}, {"approximate": "none"}, {"domain": "com.microsoft"}][
            rng.integers(4)
        ]
    if name == "QuickGelu" and chance(rng, 0.5):
        more = {"alpha": float(rng.choice([1.0, 1.702, 0.5]))}
    y = finish(rng, g, g.node(name, x, **more), float(rng.choice([1.0, 0.01, float(s)])))
    return Case(g.model(y), (Input(shape, dtype),), every=shape == (256,))


@graphs("BatchNormalization")
def batch_normalization(rng: Rng) -> Case:
    g, shape = Graph(opset(rng, 10)), dims(rng, int(rng.integers(2, 5)), 9)
    x, item, s = dequantized(rng, g, shape)
    channels = shape[1]
    ends = [g.f32(np.clip(rng.normal(size=channels) * k, -3e38, 3e38)) for k in (1, s * 30, s * 30)]
    more = {"epsilon": float(rng.choice([1e-5, 1e-3, 0.0]))} if chance(rng, 0.5) else {}
    y = g.node(
        "BatchNormalization",
        x,
        *ends,
        g.f32(np.clip(rng.uniform(0.1, 9, channels) * s, 1e-38, 3e38)),
        **more,
    )
    return Case(g.model(finish(rng, g, y, s)), (item,))


@graphs("Clip, Relu, Min, Max of codes")
def clip_codes(rng: Rng) -> Case:
    g, dtype = Graph(opset(rng)), eight(rng)
    shape = (256,) if chance(rng, 0.5) else long_shape(rng)
    x = g.input(shape, dtype)
    name = str(rng.choice(["Clip", "Relu", "Min", "Max"]))
    if name == "Relu":
        y = g.node(name, x)
    elif name == "Clip":
        ends = [g.const(codes(rng, (), dtype)) if chance(rng, 0.7) else "" for _ in range(2)]
        y = g.node(name, x, *ends)
    else:
        own = () if chance(rng, 0.5) else shape[-1:]
        ends = [x, g.const(codes(rng, own, dtype))]
        y = g.node(name, *(ends[::-1] if chance(rng, 0.3) else ends))
    return Case(g.model(y), (Input(shape, dtype),), every=shape == (256,))


@graphs("Clip and Relu of floats")
def clip_floats(rng: Rng) -> Case:
    version = opset(rng)
    g = Graph(version)
    x, item, s = dequantized(rng, g, long_shape(rng))
    low, high = (float(np.float32(np.clip(v, -3e38, 3e38))) for v in rng.normal(size=2) * 100 * s)
    if chance(rng, 0.9):
        low, high = min(low, high), max(low, high)
    if chance(rng, 0.3):
        y = g.node("Relu", x)
    elif version < 11:
        bounds = {k: v for k, v in (("min", low), ("max", high)) if chance(rng, 0.7)}
        y = g.node("Clip", x, **bounds)
    else:
        y = g.node("Clip", x, *(g.f32(v) if chance(rng, 0.7) else "" for v in (low, high)))
    return Case(g.model(finish(rng, g, y, s)), (item,))


# -- moves -----------------------------------------------------------------------------------------


@graphs("Pad, Slice, Gather, Split, Transpose, Reshape, ...")
def moves(rng: Rng) -> Case:
    version = opset(rng)
    g, dtype, shape = Graph(version), eight(rng), dims(rng, int(rng.integers(1, 5)), 6)
    floats = chance(rng, 0.4)
    name = str(rng.choice(list(MOVES)))
    if name in ("DepthToSpace", "SpaceToDepth"):
        b = int(rng.integers(1, 4))
        n, c, h, w = dims(rng, 4, 3)
        shape = (n, c * b * b, h, w) if name == "DepthToSpace" else (n, c, h * b, w * b)
        ends: list[Any] = []
        more: dict[str, Any] = {"blocksize": b}
        if version >= 11 and name == "DepthToSpace" and chance(rng, 0.6):
            more["mode"] = str(rng.choice(["DCR", "CRD"]))
        outputs = 1
    else:
        shape, ends, more, outputs = MOVES[name](rng, shape, version)
    s, z = scale(rng), zero(rng, dtype)
    x = g.input(shape, dtype)
    start = g.dequantize(x, s, z) if floats else x
    constants = []
    for item in ends:
        if isinstance(item, str) and item == "fill":
            fill = codes(rng, (), dtype)
            with np.errstate(all="ignore"):
                item = (
                    ((fill.astype(np.int32) - z.astype(np.int32)).astype(np.float32) * s)
                    if floats
                    else fill
                )
            item = np.asarray(item, np.float32 if floats else dtype)
        constants.append(item if isinstance(item, str) else g.const(item))
    y = g.node(name, start, *constants, outputs=outputs, **more)
    names = [y, *(f"{y}_{k}" for k in range(1, outputs))]
    if floats:
        names = [finish(rng, g, part, float(s)) for part in names]
    return Case(g.model(*names), (Input(shape, dtype),))


Move = tuple[tuple[int, ...], list[Any], dict[str, Any], int]


def _listed(
    version: int, since: int, key: str, value: list[int]
) -> tuple[list[Any], dict[str, Any]]:
    """A list as an input from opset `since` on, as an attribute before."""
    return ([np.array(value, np.int64)], {}) if version >= since else ([], {key: value})


def _pad(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    rank = len(shape)
    pads = [int(v) for v in rng.integers(-1 if chance(rng, 0.3) else 0, 3, 2 * rank)]
    modes = ["constant", "edge", "reflect", *(["wrap"] if version >= 19 else [])]
    more = {"mode": str(rng.choice(modes))} if chance(rng, 0.6) else {}
    if version < 11:
        return shape, [], {"pads": pads, **more, **({"value": 0.0} if chance(rng, 0.3) else {})}, 1
    ends: list[Any] = [np.array(pads, np.int64)]
    if chance(rng, 0.5):
        ends.append("fill")
        if version >= 18 and chance(rng, 0.5):
            axes = sorted(rng.choice(rank, int(rng.integers(1, rank + 1)), replace=False))
            ends[0] = np.array(rng.integers(0, 3, 2 * len(axes)), np.int64)
            ends.append(np.array([a - rank if chance(rng, 0.3) else a for a in axes], np.int64))
    return shape, ends, more, 1


def _slice(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    rank = len(shape)
    axes = [int(a) for a in rng.choice(rank, int(rng.integers(1, rank + 1)), replace=False)]
    reach = 8 if chance(rng, 0.8) else 2**40
    starts, ends = (rng.integers(-reach, reach, len(axes)) for _ in range(2))
    inputs: list[Any] = [np.array(starts, np.int64), np.array(ends, np.int64)]
    if chance(rng, 0.7):
        inputs.append(np.array([a - rank if chance(rng, 0.3) else a for a in axes], np.int64))
        if chance(rng, 0.6):
            inputs.append(np.array(rng.choice([-3, -2, -1, 1, 2, 3], len(axes)), np.int64))
    return shape, inputs, {}, 1


def _gather(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    axis = int(rng.integers(-len(shape), len(shape)))
    default = chance(rng, 0.2)
    length = shape[0 if default else axis]
    at = rng.integers(-length, length, dims(rng, int(rng.integers(0, 3)), 3)).astype(
        rng.choice([np.int32, np.int64])
    )
    return shape, [at], {} if default else {"axis": axis}, 1


def _split(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    axis = int(rng.integers(-len(shape), len(shape)))
    parts = int(rng.integers(1, 4))
    more: dict[str, Any] = {"axis": axis}
    if chance(rng, 0.2):
        more, axis = {}, 0
    if chance(rng, 0.5):
        cuts = np.sort(rng.integers(0, shape[axis] + 1, parts - 1))
        sizes = [int(v) for v in np.diff([0, *cuts, shape[axis]])]
        ends, own = _listed(version, 13, "split", sizes)
        return shape, ends, more | own, parts
    if version >= 18:
        more["num_outputs"] = parts
    return shape, [], more, parts


def _reshape(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    total, wanted = int(np.prod(shape)), []
    while total > 1 and len(wanted) < 4:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        wanted.append(int(rng.choice(divisors)))
        total //= wanted[-1]
    wanted.append(total)
    if chance(rng, 0.4):
        wanted[rng.integers(len(wanted))] = -1
    elif chance(rng, 0.3):
        wanted = [0 if chance(rng, 0.5) else v for v in shape]
    return (
        shape,
        [np.array(wanted, np.int64)],
        {"allowzero": 0} if version >= 14 and chance(rng, 0.2) else {},
        1,
    )


def _squeeze(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    shape = tuple(1 if chance(rng, 0.3) else v for v in shape)
    ones = [
        i - len(shape) if version >= 11 and chance(rng, 0.3) else i
        for i, v in enumerate(shape)
        if v == 1
    ]
    if not ones or chance(rng, 0.3):
        return shape, [], {}, 1
    ends, more = _listed(version, 13, "axes", ones)
    return shape, ends, more, 1


def _unsqueeze(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    count = int(rng.integers(1, 3))
    axes = [int(v) for v in rng.choice(len(shape) + count, count, replace=False)]
    axes = [a - len(shape) - count if version >= 11 and chance(rng, 0.3) else a for a in axes]
    ends, more = _listed(version, 13, "axes", axes)
    return shape, ends, more, 1


def _transpose(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    return (
        shape,
        [],
        {"perm": [int(v) for v in rng.permutation(len(shape))]} if chance(rng, 0.8) else {},
        1,
    )


def _flatten(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    low = -len(shape) if version >= 11 else 0
    return (
        shape,
        [],
        {"axis": int(rng.integers(low, len(shape) + 1))} if chance(rng, 0.8) else {},
        1,
    )


def _expand(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    shape = tuple(1 if chance(rng, 0.4) else v for v in shape)
    wanted = [int(rng.integers(1, 4)) if v == 1 else (1 if chance(rng, 0.3) else v) for v in shape]
    wanted = [int(rng.integers(1, 3))] * int(rng.integers(2)) + wanted
    return (
        shape,
        [np.array(wanted[int(rng.integers(2)) if len(wanted) > 1 else 0 :], np.int64)],
        {},
        1,
    )


def _tile(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    return shape, [rng.integers(1, 4, len(shape)).astype(np.int64)], {}, 1


def _identity(rng: Rng, shape: tuple[int, ...], version: int) -> Move:
    return shape, [], {}, 1


MOVES: dict[str, Any] = {
    **{"Pad": _pad, "Slice": _slice, "Gather": _gather, "Split": _split, "Transpose": _transpose},
    **{"Reshape": _reshape, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Flatten": _flatten},
    **{"Expand": _expand, "Tile": _tile, "Identity": _identity, "Dropout": _identity},
    **{"DepthToSpace": None, "SpaceToDepth": None},
}
