"""What the steps of a hostile network are made of: quantizers, weights, windows, moves, and the
list of all steps."""

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


def quantize(
    m: Maker, x: Value, dtype: np.dtype[Any] | None = None, like: Value | None = None
) -> Value:
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
    y.scale, y.zero = (
        s.array.reshape(()) if s.array.size == 1 else s.array,
        np.asarray(zero, y.dtype),
    )
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
    s = (
        m.const(x.scale)
        if np.asarray(x.scale).ndim or m.chance(0.8)
        else m.const(np.reshape(x.scale, (1,)))
    )
    z: list[Value | None] = [m.const(np.asarray(x.zero, x.dtype).reshape(s.shape))]
    if not np.asarray(x.zero).any() and not where and m.chance(0.25):
        z = [None] if m.chance(0.3) else []
    if where:
        attributes.pop("output_dtype", None)
    y = m.node("DequantizeLinear", x, s, *z, domain=where, **attributes)
    return y if y.dtype == F32 else m.node("Cast", y, to=1)


def close(
    m: Maker, x: Value, like: Value | None = None, dtype: np.dtype[Any] | None = None
) -> Value:
    """Quantize a float result, perhaps behind a Relu or a Clip."""
    if m.chance(0.25):
        x = m.node("Relu", x)
        if like is None and m.chance(
            0.7
        ):  # onnxruntime fuses a Relu where its zero is the lowest code
            kind = code_type(m, dtype)
            scale, _ = parameters(m, x.samples, kind)
            return quantize(
                m,
                x,
                like=Value(
                    "",
                    [np.zeros((), kind)],
                    True,
                    np.asarray(scale),
                    np.array(np.iinfo(kind).min, kind),
                ),
            )
    elif m.chance(0.15):
        x = clip(m, x)
    elif m.chance(0.06):
        x = odd_move(m, x)
    return quantize(m, x, like=like, dtype=dtype)


def partner_type(m: Maker, x: Value, p: float = 0.0) -> np.dtype[Any] | None:
    """The type that onnxruntime fuses together with `x`: that of int8 codes, or (with probability
    `p`) of any."""
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


def weights(
    m: Maker, shape: tuple[int, ...], axis: int, dtype: np.dtype[Any] | None = None
) -> Value:
    """Integer weights with a scale (one, or one per entry of `axis`): full range, few levels, or
    sparse."""
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
        array = m.rng.integers(-9, 10, shape) * (m.rng.random(shape) < 0.6) + (
            0 if kind == S8 else 12
        )
    else:
        array = m.rng.integers(-60, 61, shape) + (0 if kind == S8 else 64)
    array = np.clip(array, info.min, info.max).astype(kind)
    for own in m.known:
        if own.shape == shape and own.dtype == kind and own.scale is not None and m.chance(0.5):
            return own
    w = m.const(array)
    count = shape[axis] if m.chance(0.3) else 0
    size = 1 / max(float(np.abs(array.astype(int)).mean()), 0.5) * float(m.rng.uniform(0.3, 1.5))
    scale = (
        np.array([m.scale(size * m.rng.uniform(0.5, 2)) for _ in range(count)], F32)
        if count
        else m.scale(size)
    )
    own_zero = m.pick(0, 0, 0, 1) if kind == S8 else m.pick(0, 12, 64, 128)
    own = Value(
        w.name, w.samples, True, np.asarray(scale, F32), np.full(np.shape(scale), own_zero, kind)
    )
    m.known.append(own)
    return own


def real_weights(m: Maker, w: Value, axis: int) -> Value:
    assert w.scale is not None and w.zero is not None
    shape = [1] * w.array.ndim
    if w.scale.ndim:
        shape[axis] = -1
    real = (w.array.astype(F32) - w.zero.astype(F32).reshape(shape)) * w.scale.reshape(shape)
    return Value("real weights", [real.astype(F32)], True)


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
            "QuantizeLinear",
            m.const(real_weights(m, w, axis).array),
            m.const(w.scale),
            m.const(w.zero),
            **attributes,
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
    y = m.node(
        "Reshape",
        x,
        m.ints(wanted),
        **({"allowzero": 1} if m.opset >= 14 and m.chance(0.1) else {}),
    )
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
        y = m.node(
            "Flatten",
            x,
            **m.pick({}, {"axis": 1}, {"axis": 0}, *([{"axis": -1}] if m.opset >= 11 else [])),
        )
        y.scale, y.zero = x.scale, x.zero
        return y
    return reshaped(m, x, m.pick((1, n), (1, n), *([(2, n // 2)] if n % 2 == 0 else [(1, 1, n)])))


def window(m: Maker, spatial: Sequence[int], pool: bool) -> dict[str, Any]:
    """kernel_shape, strides, dilations, pads or auto_pad, ceil_mode: some left to their
    defaults."""
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


def partner(m: Maker, x: Value) -> Value:
    """Another operand of the type of `x`: itself, itself turned, a constant that broadcasts, or
    part of itself."""
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
    return [
        m.const(np.asarray(x.scale).reshape(())),
        m.const(np.asarray(x.zero, x.dtype).reshape(())),
    ]


def layout(m: Maker, x: Value) -> Value:
    """Elements of `x` in other places; also of floats."""
    rank = x.array.ndim
    axis = int(m.rng.integers(rank)) if rank else 0
    signed = m.pick(axis, axis - max(rank, 1))
    if m.opset < 11:
        signed = axis
    form = m.pick(
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Gather",
        "Concat",
        "Split",
        "Pad",
        "Identity",
        "Tile",
        "Expand",
    )
    if form == "Transpose":
        y = m.node(
            "Transpose",
            x,
            **({"perm": [int(v) for v in m.rng.permutation(rank)]} if m.chance(0.7) else {}),
        )
    elif form in ("Squeeze", "Unsqueeze"):
        ones = [k for k, n in enumerate(x.shape) if n == 1]
        axes = (
            [int(m.pick(*ones))]
            if form == "Squeeze" and ones
            else [int(m.rng.integers(0, rank + 1))]
        )
        if m.opset >= 11 and m.chance(0.4):
            axes = [a - rank - (form == "Unsqueeze") for a in axes]
        y = m.node(form, x, m.ints(axes)) if m.opset >= 13 else m.node(form, x, axes=axes)
    elif form == "Slice":
        start, step = int(m.rng.integers(-3, 3)), int(m.pick(1, 1, 2, -1, -2))
        end = int(m.pick(2**31, x.shape[axis], -1, 1)) if step > 0 else -(2**31)
        inputs = [
            m.ints([start if step > 0 else -1]),
            m.ints([end]),
            m.ints([signed]),
            m.ints([step]),
        ]
        y = m.node("Slice", x, *(inputs if step != 1 or m.chance(0.5) else inputs[:3]))
    elif form == "Gather":
        at = m.rng.integers(
            -x.shape[axis] if m.opset >= 11 else 0, x.shape[axis], m.pick((), (2,), (3,), (1, 2))
        )
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
            [m.const(x.array.reshape(-1)[0].reshape(()))]
            if mode == "constant" and m.chance(0.6)
            else []
        )
        if m.opset >= 18 and m.chance(0.3):
            more = [more[0] if more else None, m.const(np.array([signed], np.int64))]
            pads = pads[:2]
        y = m.node("Pad", x, m.ints(pads), *more, mode=mode)
    elif form == "Tile":
        y = m.node("Tile", x, m.ints([int(v) for v in m.rng.integers(1, 3, rank)]))
    elif form == "Expand":
        y = m.node(
            "Expand",
            x,
            m.ints([int(m.pick(1, 2)), *(n if n > 1 else int(m.pick(1, 2)) for n in x.shape)]),
        )
    else:
        y = m.node("Identity", x)
    y.scale, y.zero = x.scale, x.zero
    return y


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
