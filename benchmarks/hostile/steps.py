"""Steps of a hostile network: each makes one or a few nodes from a value, with odd attributes.

`ON_CODES` take codes (uint8 or int8, with a scale), `ON_FLOATS` real numbers. What onnxruntime refuses is raised as
`Impossible`, and the maker takes it back; what it computes is what it is, so nothing here needs to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.hostile.maker import F32, MICROSOFT, Impossible, Maker, Value

Array = npt.NDArray[Any]
Step = Callable[[Maker, Value], Value]
U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
ON_CODES: list[Step] = []
ON_FLOATS: list[Step] = []


def on_codes(weight: int = 1) -> Callable[[Step], Step]:
    def register(step: Step) -> Step:
        ON_CODES.extend([step] * weight)
        return step

    return register


def on_floats(weight: int = 1) -> Callable[[Step], Step]:
    def register(step: Step) -> Step:
        ON_FLOATS.extend([step] * weight)
        return step

    return register


# -- quantization ------------------------------------------------------------------------------------------------------


def domain(m: Maker) -> str:
    return MICROSOFT if m.chance(0.07) else ""


def code_type(m: Maker, like: np.dtype[Any] | None = None) -> np.dtype[Any]:
    return like if like is not None else m.pick(U8, U8, S8)


def parameters(m: Maker, reals: Sequence[Array], dtype: np.dtype[Any]) -> tuple[Any, Array]:
    """A scale and a zero point for these numbers: well used, coarse, or saturating at the ends."""
    flat = np.concatenate([np.asarray(r, np.float64).reshape(-1) for r in reals])
    flat = flat[np.isfinite(flat)]
    low, high = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 1.0)
    span = max(high - low, abs(high), 1e-3) if high - low < 1e-6 else high - low
    steps = m.pick(250, 120, 60, 20, 8, 4, 400)
    scale = m.scale(span / steps)
    info = np.iinfo(dtype)
    middle = np.rint((info.min + info.max) / 2 - (low + high) / 2 / float(scale))
    zero = m.pick(0, info.min, info.max, int(m.rng.integers(info.min, info.max + 1)), *[middle] * 6)
    return scale, np.array(np.clip(zero, info.min, info.max), dtype)


def scale_const(m: Maker, scale: npt.ArrayLike) -> Value:
    """A scale; [] or [1], sometimes one that the runtime computes."""
    array = np.asarray(scale, F32)
    if array.ndim == 0 and m.chance(0.2):
        array = array.reshape(1)
    if array.ndim == 0 and m.chance(0.04):
        odd = m.odd_float(array)
        return odd if float(odd.array) > 1e-5 else m.const(array)
    return m.const(array)


def quantize(m: Maker, x: Value, dtype: np.dtype[Any] | None = None, like: Value | None = None) -> Value:
    kind = code_type(m, dtype)
    if like is not None:
        assert like.scale is not None and like.zero is not None
        scale, zero = np.asarray(like.scale), np.asarray(like.zero)
        kind = like.dtype
    else:
        scale, zero = parameters(m, x.samples, kind)
    attributes: dict[str, Any] = {}
    if m.opset >= 13 and m.chance(0.2):
        attributes["axis"] = m.pick(0, 1, -1)
    if m.opset >= 19 and m.chance(0.1):
        attributes["saturate"] = m.pick(0, 1)
    if m.opset >= 21 and m.chance(0.1):
        attributes["output_dtype"] = {U8: 2, S8: 3}[kind]
    if m.opset >= 23 and m.chance(0.1):
        attributes["precision"] = m.pick(0, 1)
    if m.opset >= 21 and m.chance(0.05):
        attributes["block_size"] = 0
    s = scale_const(m, scale)
    absent = int(np.asarray(zero).reshape(-1)[0]) == 0 and np.asarray(zero).size == 1
    absent &= (kind == U8 or "output_dtype" in attributes) and m.chance(0.3)
    z: list[Value | None] = [m.const(np.asarray(zero, kind).reshape(s.shape))]
    if absent:
        z = [None] if m.chance(0.3) else []
    where = domain(m)
    if where:
        attributes = {k: v for k, v in attributes.items() if k == "axis"}
        z = z if z and z[0] is not None else [m.const(np.asarray(zero, kind).reshape(s.shape))]
    y = m.node("QuantizeLinear", x, s, *z, domain=where, **attributes)
    if y.dtype not in (U8, S8):
        raise Impossible
    y.scale, y.zero = s.array.reshape(()) if s.array.size == 1 else s.array, np.asarray(zero, y.dtype)
    return y


def dequantize(m: Maker, x: Value) -> Value:
    """Codes, or constant integers, as floats."""
    attributes: dict[str, Any] = {}
    if m.opset >= 13 and m.chance(0.15):
        attributes["axis"] = m.pick(0, 1, -1)
    if m.opset >= 23 and m.chance(0.06):
        attributes["output_dtype"] = m.pick(0, 1, 1, 10)
    assert x.scale is not None and x.zero is not None
    where = domain(m)
    s = m.const(x.scale) if np.asarray(x.scale).ndim or m.chance(0.8) else m.const(np.reshape(x.scale, (1,)))
    z: list[Value | None] = [m.const(np.asarray(x.zero, x.dtype).reshape(s.shape))]
    if not np.asarray(x.zero).any() and not where and m.chance(0.25):
        z = [None] if m.chance(0.3) else []
    if where:
        attributes.pop("output_dtype", None)
    y = m.node("DequantizeLinear", x, s, *z, domain=where, **attributes)
    return y if y.dtype == F32 else m.node("Cast", y, to=1)


def close(m: Maker, x: Value, like: Value | None = None, dtype: np.dtype[Any] | None = None) -> Value:
    """Quantize a float result, perhaps behind a Relu or a Clip."""
    if m.chance(0.25):
        x = m.node("Relu", x)
        if like is None and m.chance(0.7):  # onnxruntime fuses a Relu where its zero is the lowest code
            kind = code_type(m, dtype)
            scale, _ = parameters(m, x.samples, kind)
            return quantize(
                m, x, like=Value("", [np.zeros((), kind)], True, np.asarray(scale), np.array(np.iinfo(kind).min, kind))
            )
    elif m.chance(0.15):
        x = clip(m, x)
    elif m.chance(0.06):
        x = odd_move(m, x)
    return quantize(m, x, like=like, dtype=dtype)


def partner_type(m: Maker, x: Value, p: float = 0.0) -> np.dtype[Any] | None:
    """The type that onnxruntime fuses together with `x`: that of int8 codes, or (with probability `p`) of any."""
    return x.dtype if x.dtype == S8 or m.chance(p) else None


def clip(m: Maker, x: Value) -> Value:
    """Floats or codes between two of their values; one end may be absent."""
    flat = np.sort(np.concatenate([s.reshape(-1) for s in x.samples]))
    a, b = np.sort(flat[m.rng.integers(0, len(flat), 2)])
    if m.opset < 11:
        return m.node("Clip", x, **({"min": float(a)} if m.chance(0.8) else {}), max=float(b))
    ends: list[Value | None] = [m.const(a, x.dtype), m.const(b, x.dtype)]
    if m.chance(0.3):
        ends[int(m.rng.integers(2))] = None
    return m.node("Clip", x, *(ends if m.chance(0.8) else ends[:1]))


# -- weights -----------------------------------------------------------------------------------------------------------


def weights(m: Maker, shape: tuple[int, ...], axis: int, dtype: np.dtype[Any] | None = None) -> Value:
    """Integer weights with a scale (one, or one per entry of `axis`): full range, few levels, or sparse."""
    kind = dtype or m.pick(S8, S8, S8, U8)
    info = np.iinfo(kind)
    form = m.rng.integers(5)
    if form == 0:
        array = m.rng.integers(info.min, info.max + 1, shape)
    elif form == 1:
        array = m.rng.choice([-1, 1] if kind == S8 else [0, 1], shape)
    elif form == 2:
        array = m.rng.choice([-2, -1, 0, 1] if kind == S8 else [0, 1, 2, 3], shape)
    elif form == 3:
        array = m.rng.integers(-9, 10, shape) * (m.rng.random(shape) < 0.6) + (0 if kind == S8 else 12)
    else:
        array = m.rng.integers(-60, 61, shape) + (0 if kind == S8 else 64)
    array = np.clip(array, info.min, info.max).astype(kind)
    for own in m.known:
        if own.shape == shape and own.dtype == kind and own.scale is not None and m.chance(0.5):
            return own
    w = m.const(array)
    count = shape[axis] if m.chance(0.3) else 0
    size = 1 / max(float(np.abs(array.astype(int)).mean()), 0.5) * float(m.rng.uniform(0.3, 1.5))
    scale = np.array([m.scale(size * m.rng.uniform(0.5, 2)) for _ in range(count)], F32) if count else m.scale(size)
    own_zero = m.pick(0, 0, 0, 1) if kind == S8 else m.pick(0, 12, 64, 128)
    own = Value(w.name, w.samples, True, np.asarray(scale, F32), np.full(np.shape(scale), own_zero, kind))
    m.known.append(own)
    return own


def bias(m: Maker, count: int, unit: npt.ArrayLike, reach: float = 40) -> Array:
    """An int32 bias in units of the accumulator; sometimes large."""
    reach = m.pick(reach, 400, 5, 30_000)
    return m.rng.integers(-int(reach), int(reach) + 1, count).astype(np.int32)


def dequantized(m: Maker, w: Value, axis: int, rank: int) -> Value:
    """Weights in QDQ form."""
    assert w.scale is not None and w.zero is not None
    attributes: dict[str, Any] = {}
    if w.scale.ndim and m.opset >= 13:
        attributes["axis"] = m.pick(axis, axis - rank)
    source = w
    if m.chance(0.1):  # floats behind a quantizer
        source = m.node(
            "QuantizeLinear", m.const(_real(m, w, axis).array), m.const(w.scale), m.const(w.zero), **attributes
        )
    elif m.chance(0.06) and m.opset >= 21 and int(np.abs(w.array.astype(int)).max()) < 8:
        source = m.four_bits(w)
        attributes.pop("axis", None)
        return m.node("DequantizeLinear", source, m.const(np.reshape(w.scale, -1)[0]))
    inputs = [source, m.const(w.scale), m.const(w.zero)]
    if not w.zero.any() and m.chance(0.15):
        inputs = inputs[:2]
    return m.node("DequantizeLinear", *inputs, **attributes)


def reshaped(m: Maker, x: Value, shape: tuple[int, ...]) -> Value:
    """`x` in this shape, by one of the ops that do it."""
    if x.shape == shape:
        return x
    wanted = list(shape)
    if m.chance(0.3) and len(shape):
        wanted[int(m.rng.integers(len(shape)))] = -1
    y = m.node("Reshape", x, m.ints(wanted), **({"allowzero": 1} if m.opset >= 14 and m.chance(0.1) else {}))
    y.scale, y.zero = x.scale, x.zero
    return y


def image(m: Maker, x: Value) -> Value:
    """`x` as [N, C, L] or [N, C, H, W]."""
    n = int(np.prod(x.shape))
    if x.array.ndim in (3, 4) and m.chance(0.7):
        return x
    splits: list[tuple[int, ...]] = [(1, c, n // c) for c in (1, 2, 3) if n % c == 0]
    splits += [(1, c, h, n // c // h) for c in (1, 2, 4) for h in (1, 2, 3) if n % (c * h) == 0]
    return reshaped(m, x, m.pick(*splits))


def rows(m: Maker, x: Value) -> Value:
    """`x` as a matrix, or as a stack of them."""
    if x.array.ndim >= 2 and m.chance(0.6):
        return x
    n = int(np.prod(x.shape))
    if m.chance(0.3) and x.array.ndim > 1:
        y = m.node("Flatten", x, **m.pick({}, {"axis": 1}, {"axis": 0}, *([{"axis": -1}] if m.opset >= 11 else [])))
        y.scale, y.zero = x.scale, x.zero
        return y
    return reshaped(m, x, m.pick((1, n), (1, n), *([(2, n // 2)] if n % 2 == 0 else [(1, 1, n)])))


def window(m: Maker, spatial: Sequence[int], pool: bool) -> dict[str, Any]:
    """kernel_shape, strides, dilations, pads or auto_pad, ceil_mode: some left to their defaults."""
    rank, rng = len(spatial), m.rng
    kernel = [int(rng.integers(1, min(4, n + 2))) for n in spatial]
    result: dict[str, Any] = {"kernel_shape": kernel}
    if m.chance(0.5):
        result["strides"] = [int(rng.integers(1, 4)) for _ in range(rank)]
    if m.chance(0.25) and not (pool and m.opset < 10):
        result["dilations"] = [int(rng.integers(1, 3)) for _ in range(rank)]
    choice = rng.integers(4)
    if choice == 0:
        result["auto_pad"] = m.pick("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET")
    elif choice < 3:
        most = [k - 1 for k in kernel] if pool else [2] * rank
        result["pads"] = [int(rng.integers(0, p + 1)) for p in (*most, *most)]
    if pool and m.chance(0.35):
        result["ceil_mode"] = 1
    return result


# -- steps on codes ----------------------------------------------------------------------------------------------------


@on_codes(4)
def qlinear_matmul(m: Maker, x: Value) -> Value:
    x = rows(m, x)
    k, n = x.shape[-1], int(m.rng.integers(1, 5))
    stacked = x.array.ndim == 3 and m.chance(0.3)
    w = weights(m, (x.shape[0], k, n) if stacked else (k, n), -1, None if x.dtype == U8 else S8)
    reals = m.probe("MatMul", m.floats(x), _real(m, w, -1))
    scale, zero = parameters(m, reals, x.dtype)
    assert w.scale is not None and w.zero is not None and x.scale is not None
    inputs = [
        x,
        m.const(x.scale),
        m.const(x.zero),
        w,
        m.const(w.scale),
        m.const(w.zero),
        scale_const(m, scale),
        m.const(zero),
    ]
    y = m.node("QLinearMatMul", *inputs, domain=MICROSOFT if m.opset >= 21 and m.chance(0.05) else "")
    y.scale, y.zero = inputs[6].array.reshape(()), zero
    return y


def _real(m: Maker, w: Value, axis: int) -> Value:
    assert w.scale is not None and w.zero is not None
    shape = [1] * w.array.ndim
    if w.scale.ndim:
        shape[axis] = -1
    real = (w.array.astype(F32) - w.zero.astype(F32).reshape(shape)) * w.scale.reshape(shape)
    return Value("real weights", [real.astype(F32)], True)


@on_codes(4)
def qlinear_conv(m: Maker, x: Value) -> Value:
    x = image(m, x)
    channels, spatial = x.shape[1], x.shape[2:]
    groups = channels if channels > 1 and m.chance(0.25) else 1
    filters = groups * int(m.rng.integers(1, 4 if groups == 1 else 3))
    attributes = window(m, spatial, pool=False)
    w = weights(m, (filters, channels // groups, *attributes["kernel_shape"]), 0, None if x.dtype == U8 else S8)
    if groups > 1 or m.chance(0.2):
        attributes["group"] = groups
    reals = m.probe("Conv", m.floats(x), _real(m, w, 0), **attributes)
    scale, zero = parameters(m, reals, x.dtype)
    assert w.scale is not None and w.zero is not None and x.scale is not None
    if m.chance(0.3):
        del attributes["kernel_shape"]
    inputs: list[Value | None] = [x, m.const(x.scale), m.const(x.zero), w, m.const(w.scale), m.const(w.zero)]
    s = scale_const(m, scale)
    inputs += [s, m.const(zero)]
    if m.chance(0.5):
        inputs.append(m.const(bias(m, filters, 1)) if m.chance(0.9) else None)
    y = m.node("QLinearConv", *inputs, **attributes)
    y.scale, y.zero = s.array.reshape(()), zero
    return y


@on_codes(3)
def qgemm(m: Maker, x: Value) -> Value:
    x = rows(m, x)
    if x.array.ndim != 2:
        raise Impossible
    k, n, turned = x.shape[1], int(m.rng.integers(1, 5)), m.chance(0.5)
    w = weights(m, (n, k) if turned else (k, n), 0 if turned else 1, None if x.dtype == U8 else S8)
    attributes = {"transB": 1} if turned else m.pick({}, {"transB": 0})
    if m.chance(0.4):
        attributes["alpha"] = float(m.pick(1.0, 0.5, 2.0, 0.37))
    real = m.probe("Gemm", m.floats(x), _real(m, w, 0 if turned else 1), **attributes)
    assert w.scale is not None and w.zero is not None and x.scale is not None
    inputs: list[Value | None] = [x, m.const(x.scale), m.const(x.zero), w, m.const(w.scale), m.const(w.zero)]
    form = m.pick(None, (n,), (1, n), (x.shape[0], n), (1,), (x.shape[0], 1))
    inputs.append(None if form is None else m.const(bias(m, int(np.prod(form)), 1).reshape(form)))
    if m.chance(0.2):  # float output
        return m.node("QGemm", *inputs, domain=MICROSOFT, **attributes)
    scale, zero = parameters(m, real, x.dtype)
    s = scale_const(m, scale)
    y = m.node("QGemm", *inputs, s, m.const(zero), domain=MICROSOFT, **attributes)
    y.scale, y.zero = s.array.reshape(()), zero
    return y


def partner(m: Maker, x: Value) -> Value:
    """Another operand of the type of `x`: itself, itself turned, a constant that broadcasts, or part of itself."""
    form = m.rng.integers(4)
    if form == 0:
        return x
    if form == 1 or x.array.ndim == 0:
        y = layout(m, x)
        if y.shape != x.shape and m.chance(0.7):
            raise Impossible
        return y
    if form == 2:
        axis = int(m.rng.integers(x.array.ndim))
        y = m.node("Gather", x, m.const(np.array([x.shape[axis] - 1], np.int64)), axis=axis)
        y.scale, y.zero = x.scale, x.zero
        return y
    shape = m.pick((), (1,), x.shape, x.shape[-1:], (x.shape[0], *[1] * (x.array.ndim - 1)))
    info = np.iinfo(x.dtype)
    y = m.const(m.rng.integers(info.min, info.max + 1, shape).astype(x.dtype))
    own = Value(
        y.name,
        y.samples,
        True,
        np.asarray(m.scale(float(np.asarray(x.scale)) * m.rng.uniform(0.3, 2))),
        np.array(info.max // 2, x.dtype),
    )
    return own


def scalars(m: Maker, x: Value) -> list[Value | None]:
    assert x.scale is not None
    return [m.const(np.asarray(x.scale).reshape(())), m.const(np.asarray(x.zero, x.dtype).reshape(()))]


@on_codes(4)
def two_codes(m: Maker, x: Value) -> Value:
    """QLinearAdd or QLinearMul, with itself, a part of itself, or a constant; a zero point may be absent."""
    op = m.pick("Add", "Mul")
    other = partner(m, x)
    a, b = (x, other) if m.chance(0.6) else (other, x)
    scale, zero = parameters(m, m.probe(op, m.floats(a), m.floats(b)), x.dtype)
    s = scale_const(m, scale)
    first, second = scalars(m, a), scalars(m, b)
    for own, value in ((first, a), (second, b)):
        if not np.asarray(value.zero).any() and m.chance(0.3):
            own[1] = None
    y = m.node(f"QLinear{op}", a, *first, b, *second, s, m.const(zero), domain=MICROSOFT)
    y.scale, y.zero = s.array.reshape(()), zero
    return y


@on_codes(2)
def qlinear_average(m: Maker, x: Value) -> Value:
    x = image(m, x)
    last = m.chance(0.25)
    spatial = x.shape[1:-1] if last else x.shape[2:]
    attributes: dict[str, Any]
    if m.chance(0.4):
        scale, zero = parameters(m, x.reals, x.dtype)
        s = scale_const(m, scale)
        attributes = {"channels_last": int(last)}
        y = m.node("QLinearGlobalAveragePool", x, *scalars(m, x), s, m.const(zero), domain=MICROSOFT, **attributes)
    else:
        attributes = window(m, spatial, pool=True)
        attributes.pop("dilations", None)
        if m.chance(0.3):
            attributes["count_include_pad"] = 1
        if last:
            attributes["channels_last"] = 1
            if any(k > n for k, n in zip(attributes["kernel_shape"], spatial, strict=True)):
                raise Impossible  # onnxruntime 1.32 divides by zero, and the process dies
        scale, zero = parameters(m, x.reals, x.dtype)
        s = scale_const(m, scale)
        y = m.node("QLinearAveragePool", x, *scalars(m, x), s, m.const(zero), domain=MICROSOFT, **attributes)
    y.scale, y.zero = s.array.reshape(()), zero
    return y


@on_codes(2)
def qlinear_concat(m: Maker, x: Value) -> Value:
    other = partner(m, x)
    axis = int(m.rng.integers(x.array.ndim)) if x.array.ndim else 0
    scale, zero = parameters(m, [*x.reals, *other.reals], x.dtype)
    if m.chance(0.3):
        scale, zero = np.asarray(x.scale), np.asarray(x.zero)
    s = m.const(np.asarray(scale, F32).reshape(()))
    parts: list[Value | None] = [s, m.const(np.asarray(zero, x.dtype).reshape(()))]
    for part in m.pick((x, other), (other, x), (x, other, x)):
        parts += [part, *scalars(m, part)]
    y = m.node("QLinearConcat", *parts, domain=MICROSOFT, axis=m.pick(axis, axis - x.array.ndim))
    y.scale, y.zero = s.array, np.asarray(zero, x.dtype)
    return y


@on_codes(2)
def qlinear_function(m: Maker, x: Value) -> Value:
    op = m.pick("LeakyRelu", "Sigmoid", "Softmax", "Softmax", "Where")
    if op == "Softmax":
        rank = max(x.array.ndim, 1)
        attributes = {"opset": m.pick(m.opset, 11, 12, 13)}
        if m.chance(0.7):
            attributes["axis"] = int(m.rng.integers(-rank, rank))
        s, z = m.const(F32(m.pick(1 / 256, 1 / 256, 1 / 255, 0.01))), m.const(np.array(np.iinfo(x.dtype).min, x.dtype))
        y = m.node("QLinearSoftmax", x, *scalars(m, x), s, z, domain=MICROSOFT, **attributes)
    elif op == "Where":
        other = partner(m, x)
        condition = m.const(m.rng.random(x.shape[-1:]) < 0.5)
        scale, zero = parameters(m, [*x.reals, *other.reals], x.dtype)
        s, z = m.const(np.asarray(scale).reshape(())), m.const(zero)
        y = m.node("QLinearWhere", condition, x, *scalars(m, x), other, *scalars(m, other), s, z, domain=MICROSOFT)
    else:
        attributes = {"alpha": float(m.pick(0.01, 0.3, -0.5, 1.5))} if op == "LeakyRelu" and m.chance(0.7) else {}
        real = m.probe(op, m.floats(x), **attributes)
        scale, zero = parameters(m, real, x.dtype)
        s, z = m.const(np.asarray(scale).reshape(())), m.const(zero)
        y = m.node(f"QLinear{op}", x, *scalars(m, x), s, z, domain=MICROSOFT, **attributes)
    y.scale, y.zero = s.array, z.array
    return y


@on_codes(3)
def max_pool(m: Maker, x: Value) -> Value:
    x = image(m, x)
    if m.chance(0.15) and x.array.ndim == 4:
        y = m.node("NhwcMaxPool", x, domain=MICROSOFT, **window(m, x.shape[1:-1], pool=True))
    else:
        attributes = window(m, x.shape[2:], pool=True)
        if m.chance(0.1):
            attributes["storage_order"] = m.pick(0, 1)
        y = m.node("MaxPool", x, **attributes)
    y.scale, y.zero = x.scale, x.zero
    return y


@on_codes(4)
def moved(m: Maker, x: Value) -> Value:
    return layout(m, x)


def layout(m: Maker, x: Value) -> Value:
    """Elements of `x` in other places; also of floats."""
    rank = x.array.ndim
    axis = int(m.rng.integers(rank)) if rank else 0
    signed = m.pick(axis, axis - max(rank, 1))
    if m.opset < 11:
        signed = axis
    form = m.pick(
        "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Concat", "Split", "Pad", "Identity", "Tile", "Expand"
    )
    if form == "Transpose":
        y = m.node("Transpose", x, **({"perm": [int(v) for v in m.rng.permutation(rank)]} if m.chance(0.7) else {}))
    elif form in ("Squeeze", "Unsqueeze"):
        ones = [k for k, n in enumerate(x.shape) if n == 1]
        axes = [int(m.pick(*ones))] if form == "Squeeze" and ones else [int(m.rng.integers(0, rank + 1))]
        if m.opset >= 11 and m.chance(0.4):
            axes = [a - rank - (form == "Unsqueeze") for a in axes]
        y = m.node(form, x, m.ints(axes)) if m.opset >= 13 else m.node(form, x, axes=axes)
    elif form == "Slice":
        start, step = int(m.rng.integers(-3, 3)), int(m.pick(1, 1, 2, -1, -2))
        end = int(m.pick(2**31, x.shape[axis], -1, 1)) if step > 0 else -(2**31)
        inputs = [m.ints([start if step > 0 else -1]), m.ints([end]), m.ints([signed]), m.ints([step])]
        y = m.node("Slice", x, *(inputs if step != 1 or m.chance(0.5) else inputs[:3]))
    elif form == "Gather":
        at = m.rng.integers(-x.shape[axis] if m.opset >= 11 else 0, x.shape[axis], m.pick((), (2,), (3,), (1, 2)))
        y = m.node("Gather", x, m.const(np.asarray(at, m.pick(np.int64, np.int32))), axis=signed)
    elif form == "Concat":
        y = m.node("Concat", x, *[x] * int(m.rng.integers(1, 3)), axis=signed)
    elif form == "Split":
        if x.shape[axis] < 2:
            raise Impossible
        cut = int(m.rng.integers(1, x.shape[axis]))
        sizes = [cut, x.shape[axis] - cut]
        parts = (
            m.split("Split", x, m.ints(sizes), axis=signed, outputs=2)
            if m.opset >= 13
            else m.split("Split", x, axis=axis, split=sizes, outputs=2)
        )
        y = m.pick(*parts)
    elif form == "Pad":
        pads = [int(v) for v in m.rng.integers(-1 if m.chance(0.2) else 0, 2, 2 * rank)]
        mode = m.pick("constant", "constant", "edge", "reflect")
        if m.opset < 11:
            raise Impossible
        more: list[Value | None] = (
            [m.const(x.array.reshape(-1)[0].reshape(()))] if mode == "constant" and m.chance(0.6) else []
        )
        if m.opset >= 18 and m.chance(0.3):
            more = [more[0] if more else None, m.const(np.array([signed], np.int64))]
            pads = pads[:2]
        y = m.node("Pad", x, m.ints(pads), *more, mode=mode)
    elif form == "Tile":
        y = m.node("Tile", x, m.ints([int(v) for v in m.rng.integers(1, 3, rank)]))
    elif form == "Expand":
        y = m.node("Expand", x, m.ints([int(m.pick(1, 2)), *(n if n > 1 else int(m.pick(1, 2)) for n in x.shape)]))
    else:
        y = m.node("Identity", x)
    y.scale, y.zero = x.scale, x.zero
    return y


def _blocks(m: Maker, x: Value) -> Value:
    op = m.pick("DepthToSpace", "SpaceToDepth")
    y = m.node(op, x, blocksize=2, **({"mode": m.pick("DCR", "CRD")} if op == "DepthToSpace" and m.opset >= 11 else {}))
    y.scale, y.zero = x.scale, x.zero
    return y


@on_codes(2)
def clipped(m: Maker, x: Value) -> Value:
    """Clip, Min, Max or Relu of codes as integers."""
    op = m.pick("Clip", "Min", "Max", "Relu")
    if op == "Clip":
        y = clip(m, x)
    elif op == "Relu":
        y = m.node("Relu", x)
    else:
        y = m.node(
            op, *m.pick(lambda a, b: (a, b), lambda a, b: (b, a))(x, m.const(x.array.reshape(-1)[0].reshape(())))
        )
    y.scale, y.zero = x.scale, x.zero
    return y


@on_codes(2)
def integer_product(m: Maker, x: Value) -> Value:
    """MatMulInteger or ConvInteger, an int32 bias, Cast, Mul, Add, QuantizeLinear."""
    conv = m.chance(0.4)
    x = image(m, x) if conv else rows(m, x)
    assert x.scale is not None and x.zero is not None
    if conv:
        attributes = window(m, x.shape[2:], pool=False)
        w = weights(m, (int(m.rng.integers(1, 4)), x.shape[1], *attributes["kernel_shape"]), 0)
    else:
        attributes, w = {}, weights(m, (x.shape[-1], int(m.rng.integers(1, 5))), -1)
    assert w.scale is not None and w.zero is not None
    zeros: list[Value | None] = [m.const(x.zero), m.const(w.zero.reshape(-1)[0])]
    if not np.asarray(x.zero).any() and m.chance(0.4):
        zeros[0] = None
    acc = m.node("ConvInteger" if conv else "MatMulInteger", x, w, *zeros, **attributes)
    if m.chance(0.3):
        shape = (1, acc.shape[1], *[1] * (acc.array.ndim - 2)) if conv else acc.shape[-1:]
        acc = m.node("Add", acc, m.const(bias(m, int(np.prod(shape)), 1).reshape(shape)))
    y = m.node("Cast", acc, to=1)
    y = m.node(
        "Mul", y, m.const(F32(x.scale) * w.scale.reshape(-1)[:1]) if m.chance(0.5) else m.odd_float(np.array(0.01, F32))
    )
    if m.chance(0.3):
        y = m.node("Add", y, m.const(m.rng.normal(0, 1, acc.shape[-1:]).astype(F32)))
    return close(m, y)


@on_codes(2)
def to_floats(m: Maker, x: Value) -> Value:
    return dequantize(m, x)


@on_codes(2)
def requantized(m: Maker, x: Value) -> Value:
    """A second pair of QuantizeLinear and DequantizeLinear."""
    return quantize(m, dequantize(m, x), like=x if m.chance(0.2) else None)


# -- QDQ groups: floats between codes ----------------------------------------------------------------------------------


@on_codes(5)
def qdq_product(m: Maker, x: Value) -> Value:
    """DequantizeLinear, Gemm or MatMul (with an Add), perhaps Relu, QuantizeLinear."""
    x = rows(m, x)
    gemm = x.array.ndim == 2 and m.chance(0.5)
    turned = gemm and m.chance(0.5)
    k, n = x.shape[-1], int(m.rng.integers(1, 5))
    axis = 0 if turned else 1
    w = weights(m, (n, k) if turned else (k, n), axis, partner_type(m, x))
    inputs: list[Value | None] = [dequantize(m, x), dequantized(m, w, axis, 2)]
    own_bias = qdq_bias(m, x, w, n) if m.chance(0.5) else None
    if gemm:
        attributes: dict[str, Any] = {"transB": int(turned)} if turned or m.chance(0.3) else {}
        if m.chance(0.1):
            attributes |= m.pick({"alpha": 0.5}, {"beta": 2.0}, {"alpha": 1.0, "beta": 1.0})
        y = m.node("Gemm", *inputs, *([own_bias] if own_bias is not None else []), **attributes)
    else:
        y = m.node("MatMul", *inputs)
        if own_bias is not None:
            y = m.node("Add", *m.pick((y, own_bias), (own_bias, y)))
    return y if m.chance(0.08) else close(m, y, dtype=partner_type(m, x, 0.8))


def qdq_bias(m: Maker, x: Value, w: Value, count: int) -> Value:
    """An int32 bias behind a DequantizeLinear, of the product's scale or of another one; or floats."""
    assert x.scale is not None and w.scale is not None
    unit = np.asarray(F32(x.scale) * w.scale, F32)
    form = m.rng.integers(6)
    if form == 0:
        return m.const((bias(m, count, 1) * unit.reshape(-1)[0]).astype(F32))
    if form == 1:
        unit = np.asarray(unit * F32(m.pick(1.0005, 2.0, 0.5)), F32)
    zero = m.const(np.zeros(unit.shape, np.int32))
    inputs = [m.const(bias(m, count, 1)), m.const(unit), *([zero] if m.chance(0.7) else [])]
    attributes = {"axis": m.pick(0, -1)} if unit.ndim and m.opset >= 13 else {}
    return m.node("DequantizeLinear", *inputs, **attributes)


@on_codes(4)
def qdq_conv(m: Maker, x: Value) -> Value:
    x = image(m, x)
    channels = x.shape[1]
    groups = channels if channels > 1 and m.chance(0.25) else 1
    filters = groups * int(m.rng.integers(1, 4 if groups == 1 else 3))
    attributes = window(m, x.shape[2:], pool=False)
    w = weights(m, (filters, channels // groups, *attributes["kernel_shape"]), 0, partner_type(m, x))
    if groups > 1:
        attributes["group"] = groups
    if m.chance(0.3):
        del attributes["kernel_shape"]
    inputs = [dequantize(m, x), dequantized(m, w, 0, w.array.ndim)]
    if m.chance(0.5):
        inputs.append(qdq_bias(m, x, w, filters))
    return close(m, m.node("Conv", *inputs, **attributes), dtype=partner_type(m, x, 0.8))


@on_codes(3)
def qdq_two(m: Maker, x: Value) -> Value:
    """Add, Sub, Mul, Div, Min, Max of two dequantized tensors, or of one with itself; a Concat of them; a Where."""
    other = partner(m, x)
    a = dequantize(m, x)
    b = a if other is x and m.chance(0.5) else dequantize(m, other)
    a, b = (a, b) if m.chance(0.6) else (b, a)
    op = m.pick("Add", "Add", "Mul", "Mul", "Sub", "Min", "Max", "Concat", "Where", "Div")
    if op == "Concat":
        y = m.node("Concat", a, b, axis=int(m.rng.integers(-a.array.ndim if m.opset >= 11 else 0, a.array.ndim)))
    elif op == "Where":
        y = m.node("Where", m.const(m.rng.random(a.shape[-1:]) < 0.5), a, b)
    else:
        y = m.node(op, a, b)
    return close(m, y, like=x if m.chance(0.15) else None, dtype=partner_type(m, x, 0.8))


@on_codes(4)
def qdq_pool(m: Maker, x: Value) -> Value:
    x = image(m, x)
    y = dequantize(m, x)
    op = m.pick(
        "AveragePool", "AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean", "ReduceMean"
    )
    if op in ("AveragePool", "MaxPool"):
        attributes = window(m, x.shape[2:], pool=True)
        if op == "AveragePool":
            if m.opset < 19:
                attributes.pop("dilations", None)
            if m.chance(0.35):
                attributes["count_include_pad"] = 1
        y = m.node(op, y, **attributes)
    elif op == "ReduceMean":
        y = reduce(m, y, "ReduceMean")
    else:
        y = m.node(op, y)
    return close(m, y, like=x if m.chance(0.3) else None, dtype=partner_type(m, x, 0.8))


def reduce(m: Maker, x: Value, op: str) -> Value:
    rank = x.array.ndim
    axes = [int(v) for v in m.rng.permutation(rank)[: m.rng.integers(1, rank + 1)]]
    if m.opset >= 11:
        axes = [a - rank if m.chance(0.3) else a for a in axes]
    attributes: dict[str, Any] = {"keepdims": m.pick(0, 1)} if m.chance(0.7) else {}
    if m.chance(0.15):
        return m.node(op, x, **attributes)
    if m.opset >= 18:
        if m.chance(0.15):
            attributes["noop_with_empty_axes"] = m.pick(0, 1)
        return m.node(op, x, m.ints(axes), **attributes)
    return m.node(op, x, axes=axes, **attributes)


@on_codes(4)
def qdq_function(m: Maker, x: Value) -> Value:
    return close(m, function(m, dequantize(m, x)))


def function(m: Maker, x: Value) -> Value:
    """A function of each element; not all are monotone."""
    plain = [
        "Relu",
        "Sigmoid",
        "Tanh",
        "Abs",
        "Neg",
        "Erf",
        "HardSigmoid",
        "Elu",
        "Selu",
        "Softplus",
        "Softsign",
        "Sign",
    ]
    plain += [
        "Sin",
        "Cos",
        "Exp",
        "Floor",
        "Ceil",
        "Round",
        "LeakyRelu",
        "ThresholdedRelu",
        "Celu",
        "HardSwish",
        "Mish",
        "Gelu",
    ]
    form = m.rng.integers(10)
    if form < 6:
        op = m.pick(*plain)
        attributes: dict[str, Any] = {}
        if op in ("LeakyRelu", "Elu", "HardSigmoid", "ThresholdedRelu", "Celu") and m.chance(0.6):
            attributes["alpha"] = float(m.pick(0.1, 0.5, 1.5, 0.2))
        if op == "Gelu" and m.opset < 20:
            return m.node(m.pick("Gelu", "QuickGelu", "FastGelu"), x, domain=MICROSOFT)
        return m.node(op, x, **attributes)
    if form == 6:
        return m.node("Mul", x, m.node("Sigmoid", x))
    if form == 7:
        return m.node("PRelu", x, m.const(m.rng.normal(0, 1, m.pick((1,), x.shape[-1:])).astype(F32)))
    if form == 8:
        return m.node("Mul", x, x)
    return m.node("Pow", x, m.const(F32(m.pick(2.0, 3.0)))) if m.chance(0.2) else m.node("Mul", m.node("Abs", x), x)


@on_codes(1)
def qdq_softmax(m: Maker, x: Value) -> Value:
    rank = x.array.ndim
    axis = {"axis": int(m.rng.integers(-rank if m.opset >= 11 else 0, rank))} if rank and m.chance(0.7) else {}
    y = m.node("Softmax", dequantize(m, x), **axis)
    kind = code_type(m)
    own = Value("", [], False, np.asarray(F32(1 / 256)), np.array(np.iinfo(kind).min, kind))
    if not m.chance(0.7):
        return quantize(m, y)
    s, z = m.const(own.scale), m.const(own.zero)
    q = m.node("QuantizeLinear", y, s, z)
    q.scale, q.zero = s.array, z.array
    return q


@on_codes(3)
def residual(m: Maker, x: Value) -> Value:
    """A diamond: a step on `x`, then a sum (or a join) with `x` itself."""
    step = m.pick(qlinear_conv, qdq_conv, qdq_function, qdq_product, moved, clipped, max_pool, qdq_two)
    y = step(m, x)
    if y.scale is None or y.dtype != x.dtype or y.zero is None or np.asarray(y.scale).ndim or np.asarray(x.scale).ndim:
        raise Impossible
    op = m.pick("Add", "Mul", "qdq", "qdq", "Concat")
    if op == "qdq":
        return close(m, m.node(m.pick("Add", "Mul"), dequantize(m, x), dequantize(m, y)))
    if op == "Concat":
        scale, zero = parameters(m, [*x.reals, *y.reals], x.dtype)
        s = m.const(np.asarray(scale).reshape(()))
        inputs = [s, m.const(zero), x, *scalars(m, x), y, *scalars(m, y)]
        z = m.node("QLinearConcat", *inputs, domain=MICROSOFT, axis=int(m.rng.integers(x.array.ndim)))
    else:
        scale, zero = parameters(m, m.probe(op, m.floats(x), m.floats(y)), x.dtype)
        s = m.const(np.asarray(scale).reshape(()))
        z = m.node(f"QLinear{op}", x, *scalars(m, x), y, *scalars(m, y), s, m.const(zero), domain=MICROSOFT)
    z.scale, z.zero = s.array, zero
    return z


# -- steps on floats ---------------------------------------------------------------------------------------------------


@on_floats(6)
def closed(m: Maker, x: Value) -> Value:
    return close(m, x)


@on_floats(3)
def with_constant(m: Maker, x: Value) -> Value:
    """Add, Sub, Mul, Div, Min, Max with a constant: scalar, per channel, per element, on either side."""
    shape = m.pick((), (1,), x.shape[-1:], x.shape, (*x.shape[:1], *[1] * (x.array.ndim - 1)))
    size = max(float(np.abs(x.array).max()), 0.1)
    array = m.rng.normal(0, size, shape).astype(F32)
    c = m.odd_float(np.asarray(array)) if m.chance(0.3) else m.const(array)
    op = m.pick("Add", "Sub", "Mul", "Div", "Min", "Max")
    return m.node(op, *m.pick((x, c), (x, c), (c, x)))


@on_floats(2)
def of_floats(m: Maker, x: Value) -> Value:
    return function(m, x)


@on_floats(2)
def float_move(m: Maker, x: Value) -> Value:
    return layout(m, x)


@on_floats(1)
def odd_move(m: Maker, x: Value) -> Value:
    """Nodes that do nothing, or hardly anything."""
    form = m.rng.integers(5)
    if form == 0:
        return m.node("Identity", m.node("Identity", x))
    if form == 1:
        return m.node("Cast", m.node("Cast", x, to=11), to=1)  # to float64 and back
    if form == 2:
        return m.node("Cast", m.node("Cast", x, to=10), to=1)  # to float16: rounds
    if form == 3:
        return m.node("Dropout", x)
    flat = m.node("Reshape", x, m.ints([-1]))
    return m.node("Reshape", flat, m.ints(list(x.shape)))


@on_floats(1)
def noise(m: Maker, x: Value) -> Value:
    """Now and then a node that is no function; a network that has one must be refused."""
    if m.chance(0.8):
        raise Impossible
    form = m.rng.integers(4)
    if form == 0:
        op = m.pick("RandomNormal", "RandomUniform")
        seed = {"seed": 1.0} if m.chance(0.5) else {}
        return m.node("Add", x, m.node(op, shape=list(x.shape), **seed))
    if form == 1:
        return m.node("Add", x, m.node(m.pick("RandomNormalLike", "RandomUniformLike"), x))
    if form == 2 and m.opset >= 15:
        return m.node("Add", x, m.node("Bernoulli", m.node("Sigmoid", x)))
    if m.opset < 12:
        raise Impossible
    return m.node("Dropout", x, m.const(F32(0.5)), m.const(np.array(True)))


@on_floats(1)
def mean(m: Maker, x: Value) -> Value:
    return reduce(m, x, m.pick(*["ReduceMean"] * 8, "ReduceMax", "ReduceMin", "ReduceSum"))


@on_floats(1)
def normalised(m: Maker, x: Value) -> Value:
    """BatchNormalization."""
    x = image(m, x)
    c = x.shape[1]
    parts = [m.const(m.rng.uniform(0.3, 2, c).astype(F32)) for _ in range(4)]
    attributes = {"epsilon": 0.001} if m.chance(0.5) else {}
    return m.node("BatchNormalization", x, *parts, **attributes)
