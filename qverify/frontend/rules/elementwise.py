"""Element-wise nodes: float chains, activations, and com.microsoft's ops of two inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import runtime
from qverify.frontend.builder import Refusal
from qverify.frontend.registry import MICROSOFT, View, lowers, scalar
from qverify.frontend.rules.quantize import EIGHT_BIT, dequantized
from qverify.frontend.tensors import Codes, Float, FloatCodes, FloatPair, Tensor
from qverify.ops import Conv, Dense, Pairwise, joint_shape

F32 = np.float32
LARGEST = np.finfo(F32).max

ARITHMETIC = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Min": np.minimum,
    "Max": np.maximum,
}
STEPS = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Min": "min", "Max": "max"}


@lowers(*ARITHMETIC, inputs=2)
def arithmetic(n: View) -> Tensor:
    """One IEEE operation per element in float32, as the runtime's kernels do."""
    if len(n.inputs) != 2:
        raise Refusal(f"{len(n.inputs)} inputs are not supported (two are)")
    a, b = n.tensor(0), n.tensor(1)
    if isinstance(a, Codes) or isinstance(b, Codes):
        return _integer_arithmetic(n, a, b)
    if isinstance(b, np.ndarray) and not isinstance(a, np.ndarray):
        return _with_constant(n, a, _float_constant(b), swapped=False)
    if isinstance(a, np.ndarray) and not isinstance(b, np.ndarray):
        return _with_constant(n, b, _float_constant(a), swapped=True)
    assert not isinstance(a, np.ndarray) and not isinstance(b, np.ndarray)
    return _two_floats(n, a, b)


def _float_constant(c: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if c.dtype != np.float32:
        raise Refusal(f"a {c.dtype} constant is not supported here (float32 is)")
    if np.isnan(c).any():
        raise Refusal("a constant is NaN: the file is broken, export it again")
    return c


def _with_constant(n: View, x: Float, c: npt.NDArray[np.float32], swapped: bool) -> Tensor:
    if not np.isfinite(c).all() and n.op not in ("Min", "Max"):
        raise Refusal("a constant is infinite: the file is broken, export it again")
    if n.op == "Div" and not swapped and (c == 0).any():
        raise Refusal("a division by zero")
    if n.op == "Sub" and swapped:
        return n.builder.step(x, "rsub", c)
    if n.op == "Div" and swapped:
        if not isinstance(x, FloatCodes):
            raise Refusal("a constant divided by a tensor is supported between codes only")
        result = n.builder.map_rows(x, c, lambda t, v: (v / t).astype(F32))
        if not np.isfinite(result.table).all():
            raise Refusal("a division by zero")
        return result
    return n.builder.step(x, STEPS[n.op], c)


def _two_floats(n: View, a: Float, b: Float) -> Tensor:
    """Of one tensor: still a function of its code. Of two: a function of two codes."""
    if not isinstance(a, FloatCodes) or not isinstance(b, FloatCodes):
        raise Refusal(
            "a float operation on two tensors is supported between dequantized 8-bit codes only"
        )
    if a.codes.value == b.codes.value and a.shape == b.shape:
        rows = np.zeros(a.shape, np.int64) if b.which is None else b.which
        table = n.builder.map_rows(
            a, rows, lambda t, r: _safe(n.op, t, b.table[r[:, 0].astype(np.int64)])
        )
        return table
    if a.which is not None or b.which is not None or len(a.table) > 1 or len(b.table) > 1:
        raise Refusal("a float operation on two tensors with per-channel scales is not supported")
    joint_shape(a.shape, b.shape)
    return FloatPair(a.codes, b.codes, _safe(n.op, a.table[0][:, None], b.table[0][None, :]))


def _safe(
    op: str, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):
        result = np.asarray(ARITHMETIC[op](a, b), F32)
    if not np.isfinite(result).all():
        raise Refusal(f"{op} gives an infinity or NaN for some codes")
    return result


def _integer_arithmetic(n: View, a: Tensor, b: Tensor) -> Tensor:
    """A bias added to an accumulator; Min and Max of 8-bit codes with a constant.

    No other arithmetic has a rule.
    """
    x, c = (a, b) if isinstance(a, Codes) else (b, a)
    if (
        n.op in ("Min", "Max")
        and isinstance(x, Codes)
        and isinstance(c, np.ndarray)
        and x.dtype in EIGHT_BIT
    ):
        start = FloatCodes(x, _codes(x).astype(F32))
        function = ARITHMETIC[n.op]
        floats = n.builder.map_rows(
            start, c.astype(F32), lambda t, v: np.asarray(function(t, v), F32)
        )
        return n.builder.table(floats, floats.table.astype(np.int32), x.dtype)
    if (
        n.op == "Add"
        and isinstance(x, Codes)
        and isinstance(c, np.ndarray)
        and x.dtype == c.dtype == np.int32
    ):
        with_bias = _with_bias(n, x, c.astype(np.int64))
        if with_bias is not None:
            return with_bias
    raise Refusal(
        "integer arithmetic on codes is not supported (quantize through QLinear ops instead)"
    )


def _with_bias(n: View, x: Codes, c: npt.NDArray[np.int64]) -> Codes | None:
    """The product that made the accumulator `x`, made again with a bias.

    None if no product made it or `c` does not fit.

    Exact because a sum that could leave int32, with or without the bias, is refused.
    """
    if joint_shape(x.shape, c.shape) != x.shape:
        return None
    maker = n.builder.nodes[x.value - 1]
    (source,) = maker.inputs[:1]
    taken = Codes(source, n.builder.nodes[source - 1].type, x.dtype)
    match maker.op:
        case Dense():
            return n.builder.emit(replace(maker.op, bias=maker.op.bias + c), taken)
        case Conv():
            whole = np.broadcast_to(c, x.shape)
            channels = whole[0].reshape(x.shape[1], -1)[:, 0]
            if (whole == channels.reshape(1, -1, *[1] * (whole.ndim - 2))).all():
                return n.builder.emit(replace(maker.op, bias=maker.op.bias + channels), taken)
    return None


def _codes(x: Codes) -> npt.NDArray[np.int32]:
    return np.arange(x.type.low, x.type.high + 1, dtype=np.int32)[None]


@lowers("Relu", inputs=1)
def relu(n: View) -> Tensor:
    return _clip(n, np.float32(0), None)


@lowers("Clip", inputs=3, attributes="max min")
def clip(n: View) -> Tensor:
    bounds: list[Any] = [n.attr("min"), n.attr("max")]
    for i in (0, 1):
        if n.has(i + 1):
            bounds[i] = scalar(n.constant(i + 1, "a clip bound"), "a clip bound")
    return _clip(n, *bounds)


def _clip(n: View, low: Any, high: Any) -> Tensor:
    """min(max(x, low), high), on floats or on codes."""
    x = n.tensor(0)
    if any(end is not None and np.isnan(end) for end in (low, high)):
        raise Refusal("a clip bound is NaN: the file is broken, export it again")
    assert not isinstance(x, np.ndarray)
    if isinstance(x, Codes):
        if x.dtype not in EIGHT_BIT:
            raise Refusal(f"clipping {x.dtype} codes is not supported")
        values = _codes(x)
        values = values if low is None else np.maximum(values, int(low))
        values = values if high is None else np.minimum(values, int(high))
        return n.builder.table(FloatCodes(x, values.astype(F32)), values, x.dtype)
    if n.op == "Clip":
        # A bound that is left out is the end of float32, which infinities are clipped to.
        low, high = (-LARGEST if low is None else low), (LARGEST if high is None else high)
    for kind, end in (("max", low), ("min", high)):
        if end is not None:
            x = n.builder.step(x, kind, np.asarray(end, F32))
    return x


@lowers("Neg", inputs=1)
def neg(n: View) -> Tensor:
    return n.builder.step(n.floats(0), "mul", np.array(-1, np.float32))


@lowers("LeakyRelu", inputs=1, attributes="alpha")
def leaky_relu(n: View) -> Tensor:
    alpha = F32(n.attr("alpha", 0.01))
    return _tabulated(n, lambda t: np.where(t >= 0, t, alpha * t))


@lowers("PRelu", inputs=2)
def prelu(n: View) -> Tensor:
    x, slope = n.floats(0), _float_constant(n.constant(1, "the slope"))
    if not isinstance(x, FloatCodes):
        raise Refusal("PRelu is supported between 8-bit codes only")
    if joint_shape(x.shape, slope.shape) != x.shape:
        raise Refusal(f"a slope {list(slope.shape)} does not fit an input {list(x.shape)}")
    return n.builder.map_rows(x, slope, lambda t, s: np.where(t < 0, s * t, t).astype(F32))


def _tabulated(n: View, function: Any) -> Tensor:
    """A unary float function whose float32 arithmetic NumPy repeats exactly."""
    x = n.floats(0)
    if isinstance(x, FloatCodes):
        return FloatCodes(x.codes, np.asarray(function(x.table), F32), x.which)
    if isinstance(x, FloatPair):
        return FloatPair(x.a, x.b, np.asarray(function(x.table), F32))
    raise Refusal("it is supported between 8-bit codes only")


UNARY = (
    *(
        "Abs",
        "Tanh",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Erf",
        "Elu",
        "Selu",
        "Celu",
        "Softplus",
        "Softsign",
    ),
    *(
        "Exp",
        "Sqrt",
        "Log",
        "Reciprocal",
        "Sin",
        "Cos",
        "Atan",
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Mish",
        "ThresholdedRelu",
    ),
)


@lowers(*UNARY, inputs=1, attributes=None)
@lowers("Gelu", inputs=1, attributes=None, domains=("", MICROSOFT))
@lowers("QuickGelu", "FastGelu", inputs=1, attributes=None, domains=(MICROSOFT,))
def unary(n: View) -> Tensor:
    """Any other unary function of one code.

    onnxruntime itself is asked, for every code at every place.
    """
    x = n.floats(0)
    if not isinstance(x, FloatCodes):
        raise Refusal("it is supported between 8-bit codes only")
    function = runtime.node_function(n.node, {}, F32, n.opsets)
    return FloatCodes(x.codes, np.stack([_asked(n, function, row) for row in x.table]), x.which)


def _asked(n: View, function: Any, row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """f(row[k]) by onnxruntime.

    A vectorized kernel may treat the last elements of a tensor (or of one thread's share) otherwise
    than the others, so every value is asked at many places: in a long run of itself, and in short
    tensors. A function that answers differently at different places is refused.
    """
    long = function(np.repeat(row, 64)).reshape(len(row), 64)
    result: npt.NDArray[np.float32] = np.ascontiguousarray(long[:, 0])
    answers = [long]
    for length in (1, 3, 7, 13):
        answers.append(np.stack([function(np.full(length, value, F32)) for value in row]))
    for answer in answers:
        if not np.isfinite(answer).all() or (answer != result[:, None]).any():
            raise Refusal(f"the runtime's {n.op} is not one finite number for every code and place")
    return result


@lowers("BatchNormalization", inputs=5, attributes="epsilon momentum")
def batch_normalization(n: View) -> Tensor:
    """Per channel a function of one code; asked of onnxruntime, element by element."""
    x = n.floats(0)
    if not isinstance(x, FloatCodes) or len(x.table) > 1:
        raise Refusal("it is supported between 8-bit codes with one scale only")
    if len([name for name in n.node.output if name]) > 1:
        raise Refusal("its training form is not supported")
    constants = {n.node.input[k]: n.constant(k, "a parameter") for k in range(1, 5)}
    function = runtime.node_function(n.node, constants, F32, n.opsets)
    # [elements, codes].
    rows = np.stack([function(np.full(x.shape, v, F32)).reshape(-1) for v in x.table[0]], axis=1)
    if not np.isfinite(rows).all():
        raise Refusal("it gives an infinity or NaN for some codes")
    table, which = np.unique(rows, axis=0, return_inverse=True)
    return FloatCodes(x.codes, table, which.reshape(x.shape).astype(np.int64))


@lowers("QLinearLeakyRelu", inputs=5, attributes="alpha", domains=(MICROSOFT,))
def qlinear_leaky_relu(n: View) -> Tensor:
    alpha = F32(n.attr("alpha", 0.01))
    return _lookup(n, lambda t: np.where(t >= 0, t, alpha * t).astype(F32))


@lowers("QLinearSigmoid", inputs=5, domains=(MICROSOFT,))
def qlinear_sigmoid(n: View) -> Tensor:
    """The runtime builds the table when constants allow it; ask it for all 256 codes."""
    x = n.codes(0)
    n.scale(1, "the scale"), n.scale(3, "the output scale")
    constants = {
        n.node.input[k]: n.constant(k, "a parameter") for k in range(1, len(n.inputs)) if n.has(k)
    }
    values = runtime.node_function(n.node, constants, x.dtype, n.opsets)(_codes(x).astype(x.dtype))
    out_dtype = values.dtype
    return n.builder.table(
        FloatCodes(x, np.zeros(values.shape, F32)), values.astype(np.int32), out_dtype
    )


def _lookup(n: View, function: Any) -> Tensor:
    """QLinear unary: dequantize, function, QuantizeLinear."""
    x = n.codes(0)
    scale, zero = n.scale(1, "the scale").reshape(()), n.zero_point(2, x.dtype).reshape(())
    y_scale, y_zero = (
        n.scale(3, "the output scale").reshape(()),
        n.zero_point(4, x.dtype).reshape(()),
    )
    floats = dequantized(n, x, scale, zero)
    return n.builder.quantize(FloatCodes(x, function(floats.table)), y_scale, y_zero, x.dtype)


# -- com.microsoft QLinearAdd and QLinearMul -------------------------------------------------------


@lowers("QLinearAdd", inputs=8, domains=(MICROSOFT,))
def qlinear_add(n: View) -> Tensor:
    return _pairwise(n, _add_table)


@lowers("QLinearMul", inputs=8, domains=(MICROSOFT,))
def qlinear_mul(n: View) -> Tensor:
    return _pairwise(n, lambda a, b, p, scalar_first: _mul_table(a, b, p))


def _pairwise(n: View, fill: Any) -> Tensor:
    a, b = n.tensor(0), n.tensor(3)
    if not isinstance(a, Codes | np.ndarray) or not isinstance(b, Codes | np.ndarray):
        raise Refusal("both inputs must be integer codes")
    dtype = np.dtype(a.dtype)
    if dtype not in EIGHT_BIT or b.dtype != dtype:
        raise Refusal(
            f"inputs of {a.dtype} and {b.dtype} are not supported (both uint8 or both int8 are)"
        )
    scales = [scalar(n.scale(k, "a scale"), "a scale") for k in (1, 4, 6)]
    zeros = [scalar(n.zero_point(k, dtype), "a zero point") for k in (2, 5, 7)]
    info = np.iinfo(np.uint8 if dtype == np.uint8 else np.int8)
    every = np.arange(info.min, info.max + 1)
    values = fill(
        every[:, None], every[None, :], (*scales, *zeros, info), _scalar_first(a.shape, b.shape)
    )
    if isinstance(a, Codes) and isinstance(b, Codes):
        table = values[
            a.type.low - info.min : a.type.high + 1 - info.min,
            b.type.low - info.min : b.type.high + 1 - info.min,
        ]
        return n.builder.emit(
            Pairwise(np.ascontiguousarray(table), a.type.low, b.type.low), a, b, dtype=dtype
        )
    x, c = (a, b) if isinstance(a, Codes) else (b, a)
    assert isinstance(x, Codes) and isinstance(c, np.ndarray)
    rows = values.T if isinstance(a, Codes) else values  # one row per constant code
    rows = rows[:, x.type.low - info.min : x.type.high + 1 - info.min]
    return _with_constant_codes(n, x, c.astype(np.int64) - info.min, rows)


def _with_constant_codes(
    n: View, x: Codes, row: npt.NDArray[np.int64], rows: npt.NDArray[np.int32]
) -> Tensor:
    shape = joint_shape(x.shape, row.shape)
    index = np.broadcast_to(np.arange(x.type.size).reshape(x.shape), shape)
    moved = n.builder.move(x, index)
    assert isinstance(moved, Codes)
    start = FloatCodes(moved, np.zeros((1, rows.shape[1]), F32))
    floats = n.builder.map_rows(start, row, lambda t, r: rows[r[:, 0]].astype(F32))
    return n.builder.table(floats, floats.table.astype(np.int32), x.dtype)


def _scalar_first(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether onnxruntime's broadcasting walks `a` as a scalar in the innermost span.

    Then the product of `a` is added first.
    """
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    for i in range(rank - 1, -1, -1):
        if a[i] != 1 or b[i] != 1:
            return a[i] == 1
    return True


def _add_table(a: Any, b: Any, p: Any, scalar_first: bool) -> npt.NDArray[np.int32]:
    """QLinearAdd on x86-64: fixed = cz - fma(ra, az, rb * bz); v = fma(a, ra, fma(b, rb, fixed));
    saturate(rint(v)).

    ra and rb are a_scale / c_scale and b_scale / c_scale. A scalar operand's fma is the inner one:
    the runtime exchanges the operands, in `fixed` too, where a is the scalar.
    """
    a_scale, b_scale, c_scale, a_zero, b_zero, c_zero, info = p
    if scalar_first:
        return _add_table(b, a, (b_scale, a_scale, c_scale, b_zero, a_zero, c_zero, info), False)
    ra, rb = F32(a_scale) / F32(c_scale), F32(b_scale) / F32(c_scale)
    inner = fma32(np.asarray(ra), np.asarray(F32(a_zero)), np.asarray(rb * F32(b_zero)))
    fixed = np.asarray(F32(F32(c_zero) - inner))
    x, y = a.astype(F32), b.astype(F32)
    return _saturate(fma32(x, ra, fma32(y, rb, fixed)), info)


def _mul_table(a: Any, b: Any, p: Any) -> npt.NDArray[np.int32]:
    """QLinearMul on x86-64: v = float32((a - az)(b - bz)) * ((a_scale * b_scale) / c_scale) + cz;
    saturate(rint(v))."""
    a_scale, b_scale, c_scale, a_zero, b_zero, c_zero, info = p
    ratio = F32(F32(a_scale) * F32(b_scale)) / F32(c_scale)
    product = ((a - a_zero) * (b - b_zero)).astype(F32)
    return _saturate(product * ratio + F32(c_zero), info)


def _saturate(v: npt.NDArray[np.float32], info: Any) -> npt.NDArray[np.int32]:
    if (np.abs(v) >= 2**31).any():
        raise Refusal("a scale ratio is so large that the runtime's conversion to int32 overflows")
    return np.clip(np.rint(v), info.min, info.max).astype(np.int32)


def fma32(a: Any, b: Any, c: Any) -> npt.NDArray[np.float32]:
    """A correctly rounded float32 fused multiply-add.

    The product of two float32 is exact in float64. The sum is rounded to odd there (Boldo and
    Melquiond 2008), after which the rounding to float32 cannot be a double rounding.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    product, addend = np.broadcast_arrays(product, np.asarray(c, np.float64))
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # TwoSum
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact_even = (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)  # the exact sum lies farther from zero
    odd = bits + np.where(inexact_even, np.where(away, 1, -1), 0)
    return odd.view(np.float64).astype(F32)
