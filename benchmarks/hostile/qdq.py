"""Steps of a hostile network with floats between codes: QDQ groups, functions, chains, and nodes
that do nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.hostile.maker import F32, MICROSOFT, Impossible, Maker, Value
from benchmarks.hostile.parts import (
    bias,
    close,
    code_type,
    dequantize,
    dequantized,
    image,
    layout,
    odd_move,
    on_codes,
    on_floats,
    parameters,
    partner,
    partner_type,
    quantize,
    rows,
    scalars,
    weights,
    window,
)
from benchmarks.hostile.steps import clipped, max_pool, moved, qlinear_conv


@on_codes(2)
def to_floats(m: Maker, x: Value) -> Value:
    return dequantize(m, x)


@on_codes(2)
def requantized(m: Maker, x: Value) -> Value:
    """A second pair of QuantizeLinear and DequantizeLinear."""
    return quantize(m, dequantize(m, x), like=x if m.chance(0.2) else None)


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
    """An int32 bias behind a DequantizeLinear, of the product's scale or of another one; or
    floats."""
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
    w = weights(
        m, (filters, channels // groups, *attributes["kernel_shape"]), 0, partner_type(m, x)
    )
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
    """Add, Sub, Mul, Div, Min, Max of two dequantized tensors, or of one with itself; a Concat of
    them; a Where."""
    other = partner(m, x)
    a = dequantize(m, x)
    b = a if other is x and m.chance(0.5) else dequantize(m, other)
    a, b = (a, b) if m.chance(0.6) else (b, a)
    op = m.pick("Add", "Add", "Mul", "Mul", "Sub", "Min", "Max", "Concat", "Where", "Div")
    if op == "Concat":
        y = m.node(
            "Concat",
            a,
            b,
            axis=int(m.rng.integers(-a.array.ndim if m.opset >= 11 else 0, a.array.ndim)),
        )
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
        "AveragePool",
        "AveragePool",
        "GlobalAveragePool",
        "MaxPool",
        "GlobalMaxPool",
        "ReduceMean",
        "ReduceMean",
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
        return m.node(
            "PRelu", x, m.const(m.rng.normal(0, 1, m.pick((1,), x.shape[-1:])).astype(F32))
        )
    if form == 8:
        return m.node("Mul", x, x)
    return (
        m.node("Pow", x, m.const(F32(m.pick(2.0, 3.0))))
        if m.chance(0.2)
        else m.node("Mul", m.node("Abs", x), x)
    )


@on_codes(1)
def qdq_softmax(m: Maker, x: Value) -> Value:
    rank = x.array.ndim
    axis = (
        {"axis": int(m.rng.integers(-rank if m.opset >= 11 else 0, rank))}
        if rank and m.chance(0.7)
        else {}
    )
    y = m.node("Softmax", dequantize(m, x), **axis)
    kind = code_type(m)
    own = Value("", [], False, np.asarray(F32(1 / 256)), np.array(np.iinfo(kind).min, kind))
    if not m.chance(0.7):
        return quantize(m, y)
    s, z = m.const(own.scale), m.const(own.zero)
    q = m.node("QuantizeLinear", y, s, z)
    q.scale, q.zero = s.array, z.array
    return q


@on_floats(6)
def closed(m: Maker, x: Value) -> Value:
    return close(m, x)


@on_floats(3)
def with_constant(m: Maker, x: Value) -> Value:
    """Add, Sub, Mul, Div, Min, Max with a constant: scalar, per channel, per element, on either
    side."""
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
def odd(m: Maker, x: Value) -> Value:
    return odd_move(m, x)


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


@on_codes(3)
def residual(m: Maker, x: Value) -> Value:
    """A diamond: a step on `x`, then a sum (or a join) with `x` itself."""
    step = m.pick(
        qlinear_conv, qdq_conv, qdq_function, qdq_product, moved, clipped, max_pool, qdq_two
    )
    y = step(m, x)
    if (
        y.scale is None
        or y.dtype != x.dtype
        or y.zero is None
        or np.asarray(y.scale).ndim
        or np.asarray(x.scale).ndim
    ):
        raise Impossible
    op = m.pick("Add", "Mul", "qdq", "qdq", "Concat")
    if op == "qdq":
        return close(m, m.node(m.pick("Add", "Mul"), dequantize(m, x), dequantize(m, y)))
    if op == "Concat":
        scale, zero = parameters(m, [*x.reals, *y.reals], x.dtype)
        s = m.const(np.asarray(scale).reshape(()))
        inputs = [s, m.const(zero), x, *scalars(m, x), y, *scalars(m, y)]
        z = m.node(
            "QLinearConcat", *inputs, domain=MICROSOFT, axis=int(m.rng.integers(x.array.ndim))
        )
    else:
        scale, zero = parameters(m, m.probe(op, m.floats(x), m.floats(y)), x.dtype)
        s = m.const(np.asarray(scale).reshape(()))
        z = m.node(
            f"QLinear{op}", x, *scalars(m, x), y, *scalars(m, y), s, m.const(zero), domain=MICROSOFT
        )
    z.scale, z.zero = s.array, zero
    return z
