"""The doors between floats and codes: QuantizeLinear, DequantizeLinear, Cast, ops of a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qverify.frontend.builder import Refusal, quantize_linear
from qverify.frontend.registry import ANY, MICROSOFT, View, along, checked_axis, lowers, scalar
from qverify.frontend.tensors import Codes, FloatAcc, FloatCodes, Tensor
from qverify.ops import FloatProgram, joint_shape

EIGHT_BIT = (np.dtype(np.uint8), np.dtype(np.int8))


def dequantized(
    n: View, x: Codes, scale: npt.NDArray[np.float32], zero_point: npt.NDArray[np.int32]
) -> FloatCodes:
    """float32(code - zero_point) * scale, parameters already shaped to broadcast to x."""
    codes = np.arange(x.type.low, x.type.high + 1, dtype=np.int64)
    # Exact integers; float32 after the subtraction below.
    start = FloatCodes(x, codes[None].astype(np.float64))
    shifted = n.builder.map_rows(start, zero_point, lambda t, z: (t - z).astype(np.float32))
    return n.builder.map_rows(shifted, scale, lambda t, s: t * s.astype(np.float32))


@lowers(
    "QuantizeLinear", inputs=3, attributes="axis output_dtype precision", domains=("", MICROSOFT)
)
def quantize(n: View) -> Tensor:
    x = n.tensor(0)
    scale = n.scale(1, "the scale")
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    if n.has(2):
        dtype = n.constant(2, "the zero point").dtype
    elif n.attr("output_dtype", 0):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(n.attr("output_dtype"))
    if dtype not in EIGHT_BIT:
        raise Refusal(f"quantization to {dtype} is not supported yet (uint8 and int8 are)")
    if n.attr("precision", 0) not in (0, onnx.TensorProto.FLOAT):
        raise Refusal("a precision other than float32 is not supported")
    zero_point = n.zero_point(2, dtype)
    axis, rank = n.attr("axis", 1), len(x.shape)
    scale, zero_point = along(scale, axis, rank), along(zero_point, axis, rank)
    if isinstance(x, Codes):
        raise Refusal(f"its input is {x.dtype}; float32 is expected")
    assert not isinstance(x, np.ndarray)
    return n.builder.quantize(x, scale, zero_point, dtype)


@lowers("DequantizeLinear", inputs=3, attributes="axis", domains=("", MICROSOFT))
def dequantize(n: View) -> Tensor:
    x, scale = n.codes(0), n.scale(1, "the scale")
    zero_point = n.zero_point(2, x.dtype)
    axis, rank = n.attr("axis", 1), len(x.shape)
    scale, zero_point = along(scale, axis, rank), along(zero_point, axis, rank)
    if x.dtype in EIGHT_BIT:
        return dequantized(n, x, scale, zero_point)
    if x.dtype == np.int32 and not zero_point.any():
        return FloatAcc(x, FloatProgram().then("mul", scale))
    raise Refusal(f"dequantizing {x.dtype} codes is not supported")


@lowers("Cast", inputs=1, attributes="to")
def cast(n: View) -> Tensor:
    target = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(n.attr("to")))
    x = n.tensor(0)
    if isinstance(x, Codes):
        if target == x.dtype:
            return x
        if target == np.float32:
            if x.dtype in EIGHT_BIT:
                table = np.arange(x.type.low, x.type.high + 1).astype(np.float32)
                return FloatCodes(x, table[None])
            return FloatAcc(x, FloatProgram())
        info = np.iinfo(target) if np.issubdtype(target, np.integer) else None
        if info and info.min <= x.type.low and x.type.high <= info.max:
            return Codes(x.value, x.type, target)
        if target in EIGHT_BIT and x.dtype in EIGHT_BIT:
            codes = (
                np.arange(x.type.low, x.type.high + 1)
                .astype(x.dtype)
                .astype(target)
                .astype(np.int32)
            )
            return n.builder.table(
                FloatCodes(x, np.zeros((1, len(codes)), np.float32)), codes[None], target
            )
        raise Refusal(f"a cast from {x.dtype} to {target} is not supported")
    if target == np.float32:
        return n.floats(0)
    raise Refusal(f"a cast from float32 to {target} is not supported")


@lowers("QLinearConcat", inputs=ANY, attributes="axis", domains=(MICROSOFT,))
def qlinear_concat(n: View) -> Tensor:
    """Every input is requantized to the output's scale by a table.

    It is copied where scale and zero point agree.
    """
    y_scale = scalar(n.scale(0, "the output scale"), "the output scale")
    y_zero = n.constant(1, "the output zero point")
    parts: list[Tensor] = []
    for k in range(2, len(n.inputs), 3):
        scale = scalar(n.scale(k + 1, "an input scale"), "an input scale")
        x = n.tensor(k)
        if not isinstance(x, Codes | np.ndarray):
            raise Refusal(f"input {k} is not quantized")
        zero = scalar(n.zero_point(k + 2, x.dtype), "an input zero point")
        same = scale == y_scale and zero == int(y_zero.reshape(-1)[0])
        parts.append(x if same else _requantized(n, x, scale, zero, y_scale, y_zero))
    return n.builder.concat(parts, checked_axis(n.attr("axis"), len(parts[0].shape)))


def _requantized(
    n: View, x: Tensor, scale: Any, zero: Any, y_scale: Any, y_zero: npt.NDArray[Any]
) -> Tensor:
    out_zero = np.asarray(y_zero.reshape(-1)[0], np.int32)
    info = np.iinfo(y_zero.dtype)
    if isinstance(x, np.ndarray):
        v = (x.astype(np.int32) - zero).astype(np.float32) * np.float32(scale)
        return np.asarray(
            quantize_linear(v, y_scale, out_zero, int(info.min), int(info.max)), y_zero.dtype
        )
    assert isinstance(x, Codes)
    floats = dequantized(n, x, np.asarray(scale, np.float32), np.asarray(zero, np.int32))
    return n.builder.quantize(floats, np.asarray(y_scale, np.float32), out_zero, y_zero.dtype)


@lowers("QLinearWhere", inputs=9, domains=(MICROSOFT,))
def qlinear_where(n: View) -> Tensor:
    """Where with a constant condition: both branches are requantized, then picked from."""
    condition = n.constant(0, "the condition").astype(bool)
    z_scale = scalar(n.scale(7, "the output scale"), "the output scale")
    z_zero = n.constant(8, "the output zero point")
    branches: list[Tensor] = []
    for k in (1, 4):
        x = n.tensor(k)
        if not isinstance(x, Codes | np.ndarray):
            raise Refusal(f"input {k} is not quantized")
        scale = scalar(n.scale(k + 1, "an input scale"), "an input scale")
        zero = scalar(n.zero_point(k + 2, x.dtype), "an input zero point")
        branches.append(_requantized(n, x, scale, zero, z_scale, z_zero))
    shape = joint_shape(condition.shape, *(b.shape for b in branches))
    flat: list[Tensor] = []
    for branch in branches:
        index = np.arange(int(np.prod(branch.shape))).reshape(branch.shape)
        flat.append(n.builder.move(branch, np.broadcast_to(index, shape).reshape(-1)))
    count = int(np.prod(shape))
    both = n.builder.concat(flat, 0)
    pick = np.where(np.broadcast_to(condition, shape).reshape(-1), 0, count) + np.arange(count)
    return n.builder.move(both, pick.reshape(shape))
