"""Steps of a hostile network on codes: QLinear ops, pools, moves and integer products, with odd
attributes.

What onnxruntime refuses is raised as `Impossible`, and the maker takes it back; what it computes is
what it is, so nothing here needs to be right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.hostile.maker import F32, MICROSOFT, Impossible, Maker, Value
from benchmarks.hostile.parts import (
    S8,
    U8,
    bias,
    clip,
    close,
    image,
    layout,
    on_codes,
    parameters,
    partner,
    real_weights,
    rows,
    scalars,
    scale_const,
    weights,
    window,
)


@on_codes(4)
def qlinear_matmul(m: Maker, x: Value) -> Value:
    x = rows(m, x)
    k, n = x.shape[-1], int(m.rng.integers(1, 5))
    stacked = x.array.ndim == 3 and m.chance(0.3)
    w = weights(m, (x.shape[0], k, n) if stacked else (k, n), -1, None if x.dtype == U8 else S8)
    reals = m.probe("MatMul", m.floats(x), real_weights(m, w, -1))
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
    y = m.node(
        "QLinearMatMul", *inputs, domain=MICROSOFT if m.opset >= 21 and m.chance(0.05) else ""
    )
    y.scale, y.zero = inputs[6].array.reshape(()), zero
    return y


@on_codes(4)
def qlinear_conv(m: Maker, x: Value) -> Value:
    x = image(m, x)
    channels, spatial = x.shape[1], x.shape[2:]
    groups = channels if channels > 1 and m.chance(0.25) else 1
    filters = groups * int(m.rng.integers(1, 4 if groups == 1 else 3))
    attributes = window(m, spatial, pool=False)
    w = weights(
        m,
        (filters, channels // groups, *attributes["kernel_shape"]),
        0,
        None if x.dtype == U8 else S8,
    )
    if groups > 1 or m.chance(0.2):
        attributes["group"] = groups
    reals = m.probe("Conv", m.floats(x), real_weights(m, w, 0), **attributes)
    scale, zero = parameters(m, reals, x.dtype)
    assert w.scale is not None and w.zero is not None and x.scale is not None
    if m.chance(0.3):
        del attributes["kernel_shape"]
    inputs: list[Value | None] = [
        x,
        m.const(x.scale),
        m.const(x.zero),
        w,
        m.const(w.scale),
        m.const(w.zero),
    ]
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
    real = m.probe("Gemm", m.floats(x), real_weights(m, w, 0 if turned else 1), **attributes)
    assert w.scale is not None and w.zero is not None and x.scale is not None
    inputs: list[Value | None] = [
        x,
        m.const(x.scale),
        m.const(x.zero),
        w,
        m.const(w.scale),
        m.const(w.zero),
    ]
    form = m.pick(None, (n,), (1, n), (x.shape[0], n), (1,), (x.shape[0], 1))
    inputs.append(None if form is None else m.const(bias(m, int(np.prod(form)), 1).reshape(form)))
    if m.chance(0.2):  # float output
        return m.node("QGemm", *inputs, domain=MICROSOFT, **attributes)
    scale, zero = parameters(m, real, x.dtype)
    s = scale_const(m, scale)
    y = m.node("QGemm", *inputs, s, m.const(zero), domain=MICROSOFT, **attributes)
    y.scale, y.zero = s.array.reshape(()), zero
    return y


@on_codes(4)
def two_codes(m: Maker, x: Value) -> Value:
    """QLinearAdd or QLinearMul, with itself, a part of itself, or a constant; a zero point may be
    absent."""
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
        y = m.node(
            "QLinearGlobalAveragePool",
            x,
            *scalars(m, x),
            s,
            m.const(zero),
            domain=MICROSOFT,
            **attributes,
        )
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
        y = m.node(
            "QLinearAveragePool",
            x,
            *scalars(m, x),
            s,
            m.const(zero),
            domain=MICROSOFT,
            **attributes,
        )
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
        s, z = (
            m.const(F32(m.pick(1 / 256, 1 / 256, 1 / 255, 0.01))),
            m.const(np.array(np.iinfo(x.dtype).min, x.dtype)),
        )
        y = m.node("QLinearSoftmax", x, *scalars(m, x), s, z, domain=MICROSOFT, **attributes)
    elif op == "Where":
        other = partner(m, x)
        condition = m.const(m.rng.random(x.shape[-1:]) < 0.5)
        scale, zero = parameters(m, [*x.reals, *other.reals], x.dtype)
        s, z = m.const(np.asarray(scale).reshape(())), m.const(zero)
        y = m.node(
            "QLinearWhere",
            condition,
            x,
            *scalars(m, x),
            other,
            *scalars(m, other),
            s,
            z,
            domain=MICROSOFT,
        )
    else:
        attributes = (
            {"alpha": float(m.pick(0.01, 0.3, -0.5, 1.5))}
            if op == "LeakyRelu" and m.chance(0.7)
            else {}
        )
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
            op,
            *m.pick(lambda a, b: (a, b), lambda a, b: (b, a))(
                x, m.const(x.array.reshape(-1)[0].reshape(()))
            ),
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
        "Mul",
        y,
        m.const(F32(x.scale) * w.scale.reshape(-1)[:1])
        if m.chance(0.5)
        else m.odd_float(np.array(0.01, F32)),
    )
    if m.chance(0.3):
        y = m.node("Add", y, m.const(m.rng.normal(0, 1, acc.shape[-1:]).astype(F32)))
    return close(m, y)
