"""Sliding windows: the attributes that convolutions and pools share, and pooling nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qverify.frontend.builder import Refusal
from qverify.frontend.registry import MICROSOFT, View, checked_size, lowers
from qverify.frontend.rules.layout import indices
from qverify.frontend.tensors import Codes, FloatAcc, FloatCodes, IndexArray, Tensor
from qverify.ops import FloatProgram, Max

# the attributes that `read_window` reads, but for ceil_mode
WINDOW = "auto_pad dilations kernel_shape pads strides"


@dataclass(frozen=True)
class Window:
    """A resolved sliding window with explicit pads: all begins, then all ends.

    What ceil_mode adds is in the ends already. A negative pad leaves elements out.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    output: tuple[int, ...]


def read_window(n: View, spatial: tuple[int, ...], kernel: tuple[int, ...], pool: bool) -> Window:
    """The window of a pool or a convolution over an input of `spatial` size.

    It has strides, dilations, pads, auto_pad and ceil_mode.
    """
    rank = len(spatial)
    strides, dilations, pads, auto = _attributes(n, rank, kernel, pool)
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    up = pool and bool(n.attr("ceil_mode", 0))
    output = []
    for i, size in enumerate(spatial):
        first, last = pads[i], pads[rank + i]
        if auto.startswith("SAME"):
            first, last = _same(size, kernel[i], strides[i], auto == "SAME_LOWER", pool)
        elif auto == "VALID":
            first = last = 0
        pads[i], pads[rank + i] = first, last
        room = size + first + last - span[i]  # behind the first window
        if room < 0 and pool and -room < strides[i]:
            # The runtime's division rounds towards zero: one window, which sticks out.
            pads[rank + i], room = last - room, 0
        if room < 0:
            raise Refusal(f"a window of {span[i]} does not fit {size} elements with pads {pads}")
        count, beyond = room // strides[i] + 1, room % strides[i]
        if up and beyond and count * strides[i] < size + first:
            # A last window that begins inside the padded input.
            pads[rank + i], count = last + strides[i] - beyond, count + 1
        output.append(count)
    checked_size(s + pads[i] + pads[rank + i] for i, s in enumerate(spatial))
    checked_size((*output, *kernel))
    return Window(kernel, strides, dilations, tuple(pads), tuple(output))


def _attributes(
    n: View, rank: int, kernel: tuple[int, ...], pool: bool
) -> tuple[tuple[int, ...], tuple[int, ...], list[int], str]:
    """strides, dilations, pads and auto_pad, checked."""
    strides = tuple(n.attr("strides", [1] * rank))
    dilations = tuple(n.attr("dilations", [1] * rank))
    declared = tuple(n.attr("kernel_shape", kernel))
    pads = list(n.attr("pads", [0] * (2 * rank)))
    if (
        not len(strides) == len(dilations) == len(kernel) == rank
        or len(pads) != 2 * rank
        or declared != kernel
    ):
        raise Refusal("its window attributes do not fit the input's rank or the weight")
    if min(*strides, *dilations, *kernel) < 1 or min(pads) < 0:
        raise Refusal("a stride, a dilation or a kernel size is not positive, or a pad is negative")
    auto = n.attr("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise Refusal(f"auto_pad '{auto}' is not known")
    if auto.startswith("SAME") and not pool and max(dilations) > 1:
        raise Refusal(
            f"auto_pad '{auto}' of a convolution with dilations is not supported by the runtime"
        )
    return strides, dilations, pads, auto


def _same(size: int, kernel: int, stride: int, lower: bool, pool: bool) -> tuple[int, int]:
    """onnxruntime's pads for SAME_UPPER and SAME_LOWER: those of the undilated kernel.

    Where strides jump over elements they are negative, halved towards zero as C divides, and begin
    otherwise for pools than for convolutions. Measured for every small size
    (tests/frontend/test_windows.py).
    """
    total = (-(-size // stride) - 1) * stride + kernel - size
    first = int((total + lower + (total < 0 and not pool)) / 2)
    return first, total - first


def uncut(x: Tensor, window: Window) -> tuple[IndexArray, Window]:
    """The flat indices of `x` [batch, channels, *spatial] without what negative pads leave out.

    And the window with these pads zero.
    """
    rank = len(window.kernel)
    cut = [
        slice(max(0, -window.pads[i]), x.shape[2 + i] - max(0, -window.pads[rank + i]))
        for i in range(rank)
    ]
    return indices(x)[(slice(None), slice(None), *cut)], replace(
        window, pads=tuple(max(0, p) for p in window.pads)
    )


def window_index(x: Tensor, window: Window) -> IndexArray:
    """[batch, channels, *output, taps]: the flat index of every tap, -1 in the padding.

    `x` is NC*spatial.
    """
    rank = len(window.kernel)
    index, window = uncut(x, window)
    width = [(0, 0), (0, 0), *((window.pads[i], window.pads[rank + i]) for i in range(rank))]
    padded = np.pad(index, width, constant_values=-1)
    span = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, span, axis=tuple(range(2, 2 + rank)))
    view = view[(slice(None), slice(None), *(slice(None, None, s) for s in window.strides))]
    taps: Any = (..., *(slice(None, None, d) for d in window.dilations))
    view = view[taps]
    flat: IndexArray = view.reshape(*view.shape[: 2 + rank], -1)
    if (flat < 0).all(axis=-1).any():
        raise Refusal("a window lies wholly in the padding")
    return flat


@lowers("MaxPool", inputs=1, attributes=f"{WINDOW} ceil_mode", domains=("", MICROSOFT))
@lowers("NhwcMaxPool", inputs=1, attributes=f"{WINDOW} ceil_mode", domains=(MICROSOFT,))
def max_pool(n: View) -> Tensor:
    """The maximum of codes; of floats too, as an increasing function of codes gives them.

    max(f(a), f(b)) = f(max(a, b)).
    """
    x = n.tensor(0)
    last = n.op == "NhwcMaxPool"
    if last:
        x = n.builder.move(x, np.moveaxis(indices(x), -1, 1))
    taps = window_index(x, read_window(n, x.shape[2:], tuple(n.attr("kernel_shape")), pool=True))
    best = taps.max(axis=-1, keepdims=True)
    taps = np.where(taps < 0, best, taps)  # repeat a real element: the maximum is the same
    pooled = _max_over(n, n.builder.move(x, taps))
    return n.builder.move(pooled, np.moveaxis(indices(pooled), 1, -1)) if last else pooled


@lowers("GlobalMaxPool", inputs=1)
def global_max_pool(n: View) -> Tensor:
    x = n.tensor(0)
    rows = n.builder.move(x, indices(x).reshape(*x.shape[:2], *([1] * (len(x.shape) - 2)), -1))
    return _max_over(n, rows)


def _max_over(n: View, x: Tensor) -> Tensor:
    """The maximum over the last axis of any tensor whose floats increase with its codes."""
    match x:
        case Codes():
            return n.builder.emit(Max(), x, dtype=x.dtype)
        case FloatCodes():
            if not (np.diff(x.table, axis=1) >= 0).all():
                raise Refusal(
                    "a maximum of floats that do not increase with their codes is not supported"
                )
            if x.which is not None and (x.which != x.which[..., :1]).any():
                raise Refusal("a maximum over elements with different scales is not supported")
            which = None if x.which is None else x.which[..., 0]
            return FloatCodes(n.builder.emit(Max(), x.codes, dtype=x.codes.dtype), x.table, which)
        case FloatAcc():
            for step in x.program.steps:
                falling = step.kind == "rsub" or (
                    step.kind in ("mul", "div") and (step.operand <= 0).any()
                )
                varied = (
                    step.operand.ndim == len(x.shape)
                    and (step.operand != step.operand[..., :1]).any()
                )
                if falling or (step.operand.size > 1 and varied):
                    raise Refusal(
                        "a maximum of floats that do not increase alike with their accumulators"
                    )
            steps = tuple(
                type(s)(
                    s.kind,
                    s.operand
                    if s.operand.size == 1
                    else np.broadcast_to(s.operand, x.shape)[..., 0],
                )
                for s in x.program.steps
            )
            return FloatAcc(n.builder.emit(Max(), x.codes), FloatProgram(steps, x.program.ordinal))
    raise Refusal("it is supported on codes and on functions of them only")
