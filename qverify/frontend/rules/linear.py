"""Weighted sums: QLinearConv, QLinearMatMul, QGemm, ConvInteger, MatMulInteger."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.frontend.builder import Refusal, stretched
from qverify.frontend.registry import MICROSOFT, View, along, lowers, scalar
from qverify.frontend.rules.layout import indices
from qverify.frontend.rules.quantize import EIGHT_BIT
from qverify.frontend.rules.windows import WINDOW, read_window, uncut
from qverify.frontend.tensors import Codes, FloatAcc, FloatCodes, FloatSum, Tensor
from qverify.ops import Conv, Dense, FloatProgram, Requantize, Unfit, joint_shape

F32 = np.float32
IntArray = npt.NDArray[np.int64]


def activation(n: View, k: int) -> Codes:
    """Input k as uint8 or int8 codes."""
    x = n.codes(k)
    if x.dtype not in EIGHT_BIT:
        raise Refusal(f"input {k} is {x.dtype} (uint8 and int8 are supported)")
    return x


def _weight(n: View, k: int) -> npt.NDArray[Any]:
    w = n.constant(k, "the weight")
    if w.dtype not in EIGHT_BIT:
        raise Refusal(f"the weight is {w.dtype} (uint8 and int8 are supported)")
    if not w.size:
        raise Refusal(f"a weight {list(w.shape)} without an element is not supported")
    return w


def requantized(
    n: View, acc: Codes, factor: npt.NDArray[Any], zero_point: npt.NDArray[Any]
) -> Codes:
    """rint(clip(float32(acc) * factor)) + zero_point in the zero point's type."""
    if zero_point.dtype not in EIGHT_BIT:
        raise Refusal(f"an output of {zero_point.dtype} is not supported yet (uint8 and int8 are)")
    info = np.iinfo(zero_point.dtype)
    zero = np.asarray(scalar(zero_point, "the output zero point"), np.int32)
    op = Requantize(FloatProgram().then("mul", _finite(factor)), zero, int(info.min), int(info.max))
    return n.builder.emit(op, acc, dtype=zero_point.dtype)


def _finite(factor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A product or quotient of scales. An infinite one would make NaN of an accumulator of zero."""
    if not np.isfinite(factor).all():
        raise Refusal("the product or the quotient of its scales overflows float32")
    return factor


def _note_saturation(n: View, x: Codes, pairs: npt.NDArray[Any]) -> None:
    """Record a product that x86 CPUs without VNNI may get wrong.

    `pairs` [..., K]: raw weights in the kernel's order.

    There onnxruntime multiplies uint8 by int8 and adds neighbours with an instruction that
    saturates at int16 (VPMADDUBSW); it cannot if no neighbouring pair can leave int16. Other type
    combinations do not use it.
    """
    if x.dtype != np.uint8 or pairs.dtype != np.int8:
        return
    wide = pairs.astype(np.int64)
    if wide.shape[-1] % 2:
        wide = np.concatenate([wide, np.zeros_like(wide[..., :1])], axis=-1)
    first, second = wide[..., 0::2], wide[..., 1::2]
    most = x.type.high * (np.maximum(first, 0) + np.maximum(second, 0))
    least = x.type.high * (np.minimum(first, 0) + np.minimum(second, 0))
    if (most > 32767).any() or (least < -32768).any():
        n.builder.saturable.append(n.builder.node_name)


# -- matrix products -------------------------------------------------------------------------------


def dense(
    n: View, x: Codes, x_zero: Any, w: npt.NDArray[Any], w_zero: npt.NDArray[Any], bias: IntArray
) -> Codes:
    """acc = (x - x_zero) @ (w - w_zero) + bias, zero points folded.

    `w_zero` [] or [M] or like w with K reduced.
    """
    if w.ndim < 2 or not x.shape:
        raise Refusal("a product with a vector is not supported (reshape it to a matrix)")
    if w_zero.ndim == 1 and w_zero.size not in (1, w.shape[-1]):
        raise Refusal(
            f"{w_zero.size} zero points do not fit {w.shape[-1]} columns of weights: one for each, "
            "or one for all"
        )
    centred = w.astype(np.int64) - stretched(w_zero, w.shape).astype(np.int64)
    shift = int(x_zero) * centred.sum(axis=-2, keepdims=w.ndim > 2)
    if w.ndim == 2:
        shift = shift.reshape(-1)
    joint_shape(bias.shape, shift.shape)
    try:
        op = Dense(centred, np.asarray(bias - shift, np.int64), x.type.low, x.type.high)
    except Unfit as error:
        raise Refusal(str(error)) from None
    return n.builder.emit(op, x)


def _product(
    n: View, a: int, b: int, a_zero: int, b_zero: int, bias: IntArray
) -> tuple[Codes, bool]:
    """The accumulator of inputs a @ b, one of them constant.

    The flag says that the result is transposed.
    """
    left, right = n.tensor(a), n.tensor(b)
    if isinstance(left, Codes) and isinstance(right, Codes):
        raise Refusal("a product of two tensors that both depend on the input is not supported")
    if isinstance(right, np.ndarray):
        w = _weight(n, b)
        zero = n.zero_point(b_zero, w.dtype)
        if zero.ndim == 1 and zero.size == 1:
            zero = zero.reshape(())
        x = activation(n, a)
        x_zero = scalar(n.zero_point(a_zero, x.dtype), "the input zero point")
        _note_saturation(n, x, np.moveaxis(w, -2, -1) if w.ndim > 1 else w)
        return dense(n, x, x_zero, w, zero, bias), False
    if not isinstance(left, np.ndarray) or left.ndim != 2 or len(right.shape) > 2 or bias.any():
        raise Refusal("a constant left operand is supported for plain matrices only")
    w = _weight(n, a)
    x = activation(n, b)
    turned = n.builder.move(x, indices(x).T)  # a vector stays one: W x = x Wᵀ
    assert isinstance(turned, Codes)
    x_zero = scalar(n.zero_point(b_zero, x.dtype), "the input zero point")
    w_zero = np.asarray(scalar(n.zero_point(a_zero, w.dtype), "the weight zero point"))
    return dense(n, turned, x_zero, w.T, w_zero, bias), True


def _columns(n: View, k: int, weight: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The scales of B [*stack, K, N], input k: one for all, [], or one for every column, [N] or
    [*stack, 1, N]. The runtime rejects other shapes, or multiplies by them at another place."""
    scale = n.scale(k, "the scale of B")
    if scale.shape in ((), (1,)):
        return scale.reshape(())
    if len(weight) == 2 and scale.shape in (weight[1:], (1, weight[1])):
        return scale.reshape(-1)
    if scale.shape == (*weight[:-2], 1, *weight[-1:]):
        return scale
    raise Refusal(f"scales {list(scale.shape)} for a weight {list(weight)} are not supported")


@lowers("MatMulInteger", inputs=4)
def matmul_integer(n: View) -> Tensor:
    acc, turned = _product(n, 0, 1, 2, 3, np.zeros((), np.int64))
    return n.builder.move(acc, indices(acc).T) if turned else acc


@lowers("QLinearMatMul", inputs=8, domains=("", MICROSOFT))
def qlinear_matmul(n: View) -> Tensor:
    x_scale = scalar(n.scale(1, "the scale of A"), "the scale of A")
    w_scale = _columns(n, 4, n.tensor(3).shape)
    y_scale = scalar(n.scale(6, "the output scale"), "the output scale")
    acc, turned = _product(n, 0, 3, 2, 5, np.zeros((), np.int64))
    if turned and w_scale.size > 1:
        raise Refusal(
            "per-column scales of a right operand that depends on the input are not supported"
        )
    y = requantized(
        n, acc, (F32(x_scale) * w_scale) / F32(y_scale), n.constant(7, "the output zero point")
    )
    return n.builder.move(y, indices(y).T) if turned else y


@lowers("QGemm", inputs=9, attributes="alpha transA transB", domains=(MICROSOFT,))
def qgemm(n: View) -> Tensor:
    """alpha * (A - az)(B - bz) + C; C is int32 in units of alpha * a_scale * b_scale.

    No output scale: float output.
    """
    x = activation(n, 0)
    if n.attr("transA", 0):
        moved = n.builder.move(x, indices(x).T)
        assert isinstance(moved, Codes)
        x = moved
    w = _weight(n, 3)
    w_zero = n.zero_point(5, w.dtype)
    if n.attr("transB", 0):
        w = w.T
    w_scale = _columns(n, 4, w.shape)
    w_zero = w_zero.reshape(()) if w_zero.size == 1 else w_zero
    bias = n.constant(6, "the bias").astype(np.int64) if n.has(6) else np.zeros((), np.int64)
    x_zero = scalar(n.zero_point(2, x.dtype), "the zero point of A")
    _note_saturation(n, x, w.T)
    acc = dense(n, x, x_zero, w, w_zero, bias)
    alpha, x_scale = (
        F32(n.attr("alpha", 1.0)),
        scalar(n.scale(1, "the scale of A"), "the scale of A"),
    )
    factor = np.asarray((alpha * F32(x_scale)) * w_scale, F32)
    if not n.has(7):
        return FloatAcc(acc, FloatProgram().then("mul", _finite(factor)))
    y_scale = scalar(n.scale(7, "the output scale"), "the output scale")
    return requantized(n, acc, factor / F32(y_scale), n.constant(8, "the output zero point"))


@lowers("MatMulIntegerToFloat", inputs=7, domains=(MICROSOFT,))
def matmul_integer_to_float(n: View) -> Tensor:
    """float32(acc) * (a_scale * b_scale) + bias: one multiplication, then one addition.

    The runtime multiplies the scales first only where B's are a scalar, or one for every column of
    each matrix; others it multiplies one after the other.
    """
    acc, turned = _product(n, 0, 1, 4, 5, np.zeros((), np.int64))
    if turned:
        raise Refusal("a constant left operand is not supported")
    factor = scalar(n.scale(2, "the scale of A"), "the scale of A") * _columns(
        n, 3, n.tensor(1).shape
    )
    program = FloatProgram().then("mul", _finite(factor))
    if n.has(6):
        program = program.then("add", n.constant(6, "the bias"))
    return FloatAcc(acc, program)


@lowers("Gemm", inputs=3, attributes="alpha beta transA transB")
@lowers("MatMul", inputs=2)
def float_product(n: View) -> Tensor:
    """A float product of dequantized codes with constant weights, as the network's last op.

    The order of its additions is the runtime's secret, so its result is known up to an error, which
    is proved here. With u = 2**-24, x = float32(s (q - z)), n terms of magnitude at most A in all
    (bias included), any order of float32 operations, fused or not, is within 2 (n + 2) u A of the
    exact sum (Higham 2002, section 3.1, for n u < 1/2). The integer model replaces x by s (q - z)
    (within 4 u of its range, checked), w by step * round(w / step), and rounds four times more.
    """
    if n.op == "Gemm" and (
        n.attr("alpha", 1.0) != 1.0 or n.attr("beta", 1.0) != 1.0 or n.attr("transA", 0)
    ):
        raise Refusal("a float Gemm with alpha, beta or transA is not supported")
    x, w = n.tensor(0), n.tensor(1)
    if isinstance(w, np.ndarray) and n.op == "Gemm" and n.attr("transB", 0):
        w = w.T
    if (
        isinstance(x, np.ndarray)
        or not isinstance(x, FloatCodes)
        or not isinstance(w, np.ndarray)
        or w.ndim != 2
    ):
        raise Refusal(
            "a float product is supported only of dequantized 8-bit codes with a constant matrix, "
            "as the network's last op"
        )
    if not w.size:
        raise Refusal(f"weights {list(w.shape)} without an element are not supported")
    bias = n.constant(2, "the bias").astype(np.float32) if n.has(2) else np.zeros((), np.float32)
    scale, zero = _affine_table(x)
    reach = max(abs(x.codes.type.low - zero), abs(x.codes.type.high - zero))
    exact = w.astype(np.float64)
    sums = np.abs(exact).sum(axis=0)
    # the finest that keeps the accumulator in int32
    step = np.maximum(sums, sums.max() * 2.0**-20) * reach / 2.0**30
    step = np.where(step == 0, 1.0, step)
    weight = np.rint(exact / step).astype(np.int64)
    op = Dense(weight, -zero * weight.sum(axis=0), x.codes.type.low, x.codes.type.high)
    acc = n.builder.emit(op, x.codes)
    unit, terms = 2.0**-24, w.shape[0] + 1
    size = scale * reach * sums + np.abs(bias)
    grid = scale * reach * w.shape[0] * step / 2
    error = 1.01 * (
        2 * (terms + 2) * unit * size + 4 * unit * size + grid + 6 * unit * (size + grid)
    )
    error = error + (terms + 4) * 2.0**-149  # underflow
    if not float((scale * step).min()) > 2.0**-100 or not float(size.max(initial=0.0)) < 2.0**100:
        raise Refusal("its weights are so small or so large that float32 underflows or overflows")
    program = FloatProgram().then("mul", (scale * step).astype(np.float32)).then("add", bias)
    return FloatSum(FloatAcc(acc, program), np.broadcast_to(error, acc.shape))


def _affine_table(x: FloatCodes) -> tuple[float, int]:
    """(scale, zero point) with table[k] = scale * (low + k - zero point) up to float32 rounding."""
    table = x.table[0].astype(np.float64)
    scale = (table[-1] - table[0]) / (len(table) - 1) if len(table) > 1 else 0.0
    if len(x.table) > 1 or scale <= 0:
        raise Refusal(
            "a float product of anything but plainly dequantized codes with one scale is not "
            "supported"
        )
    zero = x.low - int(np.rint(table[0] / scale))
    line = scale * (np.arange(len(table)) + x.low - zero)
    if (np.abs(table - line) > 2.0**-22 * np.abs(line).max()).any():
        raise Refusal(
            "a float product of anything but plainly dequantized codes with one scale is not "
            "supported"
        )
    return float(scale), zero


# -- convolutions ----------------------------------------------------------------------------------


def _convolution(
    n: View, x: Codes, x_zero: Any, w: npt.NDArray[Any], w_zero: Any, bias: IntArray
) -> Codes:
    groups = n.attr("group", 1)
    if len(x.shape) != w.ndim or w.ndim < 3:
        raise Refusal(f"a weight {list(w.shape)} does not fit an input {list(x.shape)}")
    if groups < 1 or w.shape[0] % groups or x.shape[1] != w.shape[1] * groups:
        raise Refusal(
            f"{groups} groups do not fit a weight {list(w.shape)} and an input {list(x.shape)}"
        )
    is_depthwise = w.shape[1] == 1 and w.shape[0] == groups
    if not is_depthwise:  # whose kernels accumulate exactly everywhere
        _note_saturation(n, x, np.moveaxis(w, 1, -1).reshape(len(w), -1))
    index, window = uncut(x, read_window(n, x.shape[2:], tuple(w.shape[2:]), pool=False))
    kept = n.builder.move(x, index)
    assert isinstance(kept, Codes)
    centred = w.astype(np.int64) - w_zero
    bias = stretched(bias, (w.shape[0],)) - int(x_zero) * centred.reshape(len(w), -1).sum(axis=1)
    zero = int(x_zero)
    low, high = min(x.type.low, zero), max(x.type.high, zero)
    geometry = (window.strides, window.pads, window.dilations, groups)
    try:
        op = Conv(centred, bias, *geometry, zero, low, high)
    except Unfit as error:
        raise Refusal(str(error)) from None
    return n.builder.emit(op, kept)


@lowers("ConvInteger", inputs=4, attributes=f"{WINDOW} group")
def conv_integer(n: View) -> Tensor:
    x, w = activation(n, 0), _weight(n, 1)
    w_zero = n.zero_point(3, w.dtype).astype(np.int64)
    w_zero = w_zero.reshape(-1, *([1] * (w.ndim - 1))) if w_zero.size > 1 else w_zero.reshape(())
    x_zero = scalar(n.zero_point(2, x.dtype), "the input zero point")
    return _convolution(n, x, x_zero, w, w_zero, np.zeros((), np.int64))


@lowers(
    "QLinearConv", inputs=9, attributes=f"{WINDOW} channels_last group", domains=("", MICROSOFT)
)
def qlinear_conv(n: View) -> Tensor:
    x, w = activation(n, 0), _weight(n, 3)
    last = bool(n.attr("channels_last", 0))
    if last:
        moved = n.builder.move(x, np.moveaxis(indices(x), -1, 1))
        assert isinstance(moved, Codes)
        x = moved
    x_scale = scalar(n.scale(1, "the input scale"), "the input scale")
    y_scale = scalar(n.scale(6, "the output scale"), "the output scale")
    w_zero = n.zero_point(5, w.dtype).reshape(-1)
    if (w_zero != w_zero[0]).any():
        raise Refusal("different weight zero points per channel are not supported by the runtime")
    bias = n.constant(8, "the bias") if n.has(8) else np.zeros((), np.int32)
    if bias.dtype != np.int32:
        raise Refusal(f"the bias is {bias.dtype} (int32 is expected)")
    x_zero = scalar(n.zero_point(2, x.dtype), "the input zero point")
    acc = _convolution(n, x, x_zero, w, int(w_zero[0]), bias.astype(np.int64))
    factor = (F32(x_scale) * n.scale(4, "the weight scale")) / F32(y_scale)
    y = requantized(n, acc, along(factor, 1, len(x.shape)), n.constant(7, "the output zero point"))
    return n.builder.move(y, np.moveaxis(indices(y), 1, -1)) if last else y
