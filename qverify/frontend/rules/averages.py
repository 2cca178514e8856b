"""Averages: QLinearAveragePool, QLinearGlobalAveragePool, and the float mean between codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.frontend.builder import Refusal
from qverify.frontend.registry import MICROSOFT, View, checked_axis, lowers, scalar
from qverify.frontend.rules.layout import indices
from qverify.frontend.rules.linear import activation, dense, requantized
from qverify.frontend.rules.quantize import dequantized
from qverify.frontend.rules.windows import WINDOW, read_window, window_index
from qverify.frontend.tensors import Codes, FloatAcc, FloatCodes, Tensor
from qverify.ops import FloatProgram, Mean, Requantize

F32 = np.float32


def _global_mean(n: View, x: Codes) -> Codes:
    """requantize(sum - count * x_zero) with the factor x_scale / (y_scale * float32(count)), over
    all spatial axes of NC... codes: an integer sum."""
    rows = n.builder.move(x, indices(x).reshape(x.shape[0], x.shape[1], -1))
    assert isinstance(rows, Codes)
    count = rows.shape[-1]
    x_zero = scalar(n.zero_point(2, x.dtype), "the input zero point")
    acc = dense(
        n,
        rows,
        x_zero,
        np.ones((count, 1), np.int8),
        np.zeros((), np.int64),
        np.zeros((), np.int64),
    )
    x_scale = scalar(n.scale(1, "the input scale"), "the input scale")
    y_scale = scalar(n.scale(3, "the output scale"), "the output scale")
    zero = n.constant(4, "the output zero point") if n.has(4) else np.zeros((), x.dtype)
    y = requantized(n, acc, np.asarray(F32(x_scale) / (F32(y_scale) * F32(count))), zero)
    pooled = n.builder.move(y, indices(y).reshape(*x.shape[:2], *([1] * (len(x.shape) - 2))))
    assert isinstance(pooled, Codes)
    return pooled


def _channels_second(n: View, x: Codes) -> Codes:
    """`x` with its channels moved to the second axis, if they come last."""
    if not n.attr("channels_last", 0):
        return x
    moved = n.builder.move(x, np.moveaxis(indices(x), -1, 1))
    assert isinstance(moved, Codes)
    return moved


def _as_it_came(n: View, y: Codes) -> Tensor:
    return n.builder.move(y, np.moveaxis(indices(y), 1, -1)) if n.attr("channels_last", 0) else y


@lowers("QLinearGlobalAveragePool", inputs=5, attributes="channels_last", domains=(MICROSOFT,))
def qlinear_global_average_pool(n: View) -> Tensor:
    return _as_it_came(n, _global_mean(n, _channels_second(n, activation(n, 0))))


@lowers(
    "QLinearAveragePool",
    inputs=5,
    attributes=f"{WINDOW} ceil_mode channels_last count_include_pad",
    domains=(MICROSOFT,),
)
def qlinear_average_pool(n: View) -> Tensor:
    """Dequantize, add row by row in float32, divide by the count, then rint(v / y_scale + y_zero).

    A window that is the whole input is computed as a QLinearGlobalAveragePool, which rounds
    otherwise.
    """
    x = _channels_second(n, activation(n, 0))
    window = read_window(n, x.shape[2:], tuple(n.attr("kernel_shape")), pool=True)
    if window.kernel == x.shape[2:] and not any(window.pads):
        return _as_it_came(n, _global_mean(n, x))
    taps = window_index(x, window)
    zero = int(scalar(n.zero_point(2, x.dtype), "the zero point"))
    inside = (taps >= 0).sum(axis=-1)
    if n.attr("count_include_pad", 0):
        if n.attr("ceil_mode", 0):
            raise Refusal("count_include_pad together with ceil_mode is not supported")
        inside = np.full_like(inside, taps.shape[-1])
    # A padded tap dequantizes to +0.0, which changes no sum.
    rows = n.builder.move(x, taps, fill=zero)
    assert isinstance(rows, Codes)
    values = _values(n, rows, 1, zero)
    mean = n.builder.emit(Mean(values, rows.type.low, _divisor(inside), "sequential"), rows)
    y_scale = n.scale(3, "the output scale").reshape(())
    y_zero = n.constant(4, "the output zero point") if n.has(4) else np.zeros((), x.dtype)
    if float(np.abs(values).max()) / float(y_scale) > 2.0**30:
        raise Refusal(
            "its scales' quotient is so large that the runtime's conversion to int32 overflows"
        )
    info = np.iinfo(y_zero.dtype)
    program = (
        FloatProgram(ordinal=True)
        .then("div", y_scale)
        .then("add", y_zero.reshape(()).astype(np.float32))
    )
    op = Requantize(program, np.zeros((), np.int32), int(info.min), int(info.max))
    y = n.builder.emit(op, mean, dtype=y_zero.dtype)
    return _as_it_came(n, y)


def _values(n: View, rows: Codes, scale_input: int, zero: int) -> npt.NDArray[np.float32]:
    scale = n.scale(scale_input, "the scale").reshape(())
    table: npt.NDArray[np.float32] = dequantized(n, rows, scale, np.asarray(zero, np.int32)).table[
        0
    ]
    return table


def _divisor(counts: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return (
        counts.reshape(-1)[0].astype(np.float32).reshape(())
        if (counts == counts.flat[0]).all()
        else counts.astype(np.float32)
    )


@lowers("ReduceMean", inputs=2, attributes="axes keepdims noop_with_empty_axes")
def reduce_mean(n: View) -> Tensor:
    """A float mean of dequantized codes, in the runtime's order of additions.

    Its axes, as they stand (those of one element too), fall into groups that are kept (K) or
    reduced (R). Measured over all patterns (tests/frontend/test_means.py): R and KR add in Eigen's
    order, RK and KRK behind a single first element one after another. The order of the others is
    unknown.
    """
    x = n.tensor(0)
    rank = len(x.shape)
    axes = n.attr("axes")
    if axes is None and n.has(1):
        axes = [int(v) for v in n.constant(1, "the axes").reshape(-1)]
    if not axes and n.attr("noop_with_empty_axes", 0):
        return x
    axes = sorted(checked_axis(a, rank) for a in axes) if axes else list(range(rank))
    kept = [1 if i in axes else s for i, s in enumerate(x.shape)]
    shape = kept if n.attr("keepdims", 1) else [s for i, s in enumerate(kept) if i not in axes]
    if all(x.shape[a] == 1 for a in axes):
        return n.builder.move(x, indices(x).reshape(shape))
    count = int(np.prod([x.shape[a] for a in axes]))
    order = _order(x.shape, axes, count)
    if not isinstance(x, FloatCodes) or x.which is not None:
        raise Refusal("a float mean is supported on dequantized 8-bit codes with one scale only")
    index = indices(x).reshape(*x.shape[: axes[0]], count, *x.shape[axes[-1] + 1 :])
    rows = n.builder.move(x.codes, np.moveaxis(index, axes[0], -1))
    assert isinstance(rows, Codes)
    op = Mean(x.table[0], rows.type.low, np.array(count, np.float32), order)
    acc = n.builder.emit(op, rows)
    return n.builder.move(FloatAcc(acc, FloatProgram(ordinal=True)), indices(acc).reshape(shape))


def _order(shape: tuple[int, ...], axes: list[int], count: int) -> str:
    """The order of additions in a float mean of `count` elements over the sorted axes."""
    first, last = axes[0], axes[-1] + 1
    if axes == list(range(first, last)):
        if last == len(shape):
            return "eigen"
        if first == 0 or int(np.prod(shape[:first])) == 1 or count <= 2:
            return "sequential"
    raise Refusal(
        "a float mean over axes that are neither the trailing nor the leading ones is not supported"
    )
