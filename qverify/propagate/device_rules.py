"""The ops by fused CUDA kernels, gathers of bytes and look-ups of bytes.

A weighted sum with its rounding is one kernel, from pairs to pairs; a move of elements costs
nothing until a kernel needs another order (the rows of a dense weight are put in the order that is
there). Rising functions of a code, functions of two codes and maxima are computed on the bytes.

Sound because each step gives its op's own interval: a kernel computes the same two integer sums and
the same rounding (see `packing`), an increasing function and a move take ends to ends. Two codes
that come from one element are gathered before they are multiplied, so that they move independently,
as in the op's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np

from qverify.kernels import Array, open_kernels
from qverify.kernels.packing import (
    Ends,
    Epilogue,
    PackedScale,
    PackedWindow,
    Thresholds,
    image_width,
    rounded,
)
from qverify.ops import (
    Conv,
    Dense,
    FloatProgram,
    FloatStep,
    Interval,
    Layout,
    Max,
    Mean,
    Pairwise,
    Requantize,
    Softmax,
    Table,
    Type,
)
from qverify.ops.columns import Column
from qverify.ops.relax import StaircaseRelaxation, make_staircase
from qverify.propagate.buffers import Buffers, Refused
from qverify.propagate.device import IntArray, Layer, Pairs, gathered

# -- weighted sums --------------------------------------------------------------------------------


def dense(buffers: Buffers, op: Dense, k: int, rounding: int | None) -> None:
    """A product with one matrix, for every row of the value."""
    node, (x,) = buffers.network.nodes[k], buffers.network.nodes[k].inputs
    kind = buffers.network.type_of(x)
    weight, bias = (np.asarray(buffers.home(v), np.int64) for v in (op.weight, op.bias))
    if weight.ndim != 2:
        raise Refused
    held = buffers.in_pairs(x)
    (inputs, neurons), rows = weight.shape, kind.size // weight.shape[0]
    bias = _along(bias, node.type.shape, len(node.type.shape) - 1, neurons) + kind.low * weight.sum(
        axis=0
    )
    epilogue = _epilogue(buffers, k, rounding, len(node.type.shape) - 1)
    width = rounded(inputs, 8)
    if rows == 1 and held.codes % 8 == 0 and held.codes <= 2 * width and held.is_injective():
        width, order = held.codes, weight
        weight = np.zeros((int(held.at.max()) + 1, neurons), np.int64)
        weight[held.at] = order
    else:
        at = (np.arange(rows)[:, None] * width + np.arange(inputs)).reshape(-1)
        held = buffers.moved(held, at, rows * width)
    fused, layer = buffers.fused, buffers.fused.pack_dense(weight, bias, epilogue, width)

    def function(pairs: Array) -> Any:
        result = fused.dense(layer, pairs.reshape(-1, width, 2))
        return result if rounding is None or rows == 1 else result.reshape(-1, rows * out, 2)

    shape, out = node.type.shape, rounded(neurons, 8)
    more: dict[str, Any] = {"kernel": "dense"}
    if rows == 1:
        more["layer"] = Layer(weight, bias, epilogue, width)
    if rounding is None:
        buffer = buffers.step(function, (held.buffer,), 8 * prod(shape), **more)
        buffers.ends[k + 1] = _shaped(buffers, buffer, lambda end: end.reshape(-1, *shape), 0)
    else:
        buffer = buffers.step(function, (held.buffer,), 2 * rows * out, **more)
        at = (np.arange(rows)[:, None] * out + np.arange(neurons)).reshape(-1)
        buffers.pairs[rounding + 1] = Pairs(buffer, at, rows * out)


def _shaped(buffers: Buffers, buffer: int, change: Callable[[Array], Array], size: int) -> int:
    """A buffer of ends in another shape."""
    return buffers.step(lambda ends: (change(ends[0]), change(ends[1])), (buffer,), size)


def conv(buffers: Buffers, op: Conv, k: int, rounding: int | None) -> None:
    """A convolution along one or two axes, on images with channels last."""
    node, (x,) = buffers.network.nodes[k], buffers.network.nodes[k].inputs
    kind = buffers.network.type_of(x)
    if len(op.strides) not in (1, 2):
        raise Refused
    held = buffers.in_pairs(x)
    weight, bias = (np.asarray(buffers.home(v), np.int64) for v in (op.weight, op.bias))
    window = _window(op, kind.shape, weight.shape)
    weight = weight.reshape(*weight.shape[:2], *window.kernel)
    pad = op.pad_value - kind.low if any(window.pads) else 0
    bias = bias + kind.low * weight.sum(axis=(1, 2, 3))
    epilogue = _epilogue(buffers, k, rounding, 1)
    held, width = _channels_last(buffers, held, kind.shape)
    fused = buffers.fused
    layer = fused.pack_conv(weight, bias, epilogue, window, op.groups, pad, width)
    neurons, shape = len(weight), node.type.shape
    out = rounded(neurons, 8)
    codes = prod(shape) // neurons * out

    def convolved(pairs: Array) -> Any:
        result = fused.conv(layer, pairs.reshape(-1, window.height, window.width, width, 2))
        return result if rounding is None else result.reshape(-1, codes, 2)

    def channels_first(end: Array) -> Array:
        last = end.reshape(-1, *shape[:1], *shape[2:], neurons)
        return buffers.kernels.xp.ascontiguousarray(buffers.kernels.xp.moveaxis(last, -1, 2))

    size = 8 * prod(shape) if rounding is None else 2 * codes
    buffer = buffers.step(convolved, (held.buffer,), size, kernel="conv")
    if rounding is None:
        buffers.ends[k + 1] = _shaped(buffers, buffer, channels_first, size)
    else:
        at = _image(shape[0], neurons, prod(shape[2:]), out)
        buffers.pairs[rounding + 1] = Pairs(buffer, at, codes)


def _window(op: Conv, image: tuple[int, ...], weight: tuple[int, ...]) -> PackedWindow:
    """Where a convolution along one or two axes looks; one axis becomes the second of two. The
    shapes are [N, C, *spatial] and [M, C / groups, *kernel]."""
    rank = len(op.strides)
    one, none = (1,) * (2 - rank), (0,) * (2 - rank)
    height, width = (*one, *image[2:])
    kernel_height, kernel_width = (*one, *weight[2:])
    top, left, bottom, right = (*none, *op.pads[:rank], *none, *op.pads[rank:])
    down, across = (*one, *op.strides)
    apart_down, apart_across = (*one, *op.dilations)
    return PackedWindow(
        height,
        width,
        (kernel_height, kernel_width),
        (down, across),
        (top, left, bottom, right),
        (apart_down, apart_across),
    )


def _channels_last(buffers: Buffers, held: Pairs, shape: tuple[int, ...]) -> tuple[Pairs, int]:
    """Images [N, C, *spatial] with channels last, and how many channels of a pixel are stored."""
    batch, channels, places = *shape[:2], prod(shape[2:])
    width = held.codes // (batch * places)
    codes = batch * places * width
    if (
        width < channels
        or width % 2
        or not held.is_at(_image(batch, channels, places, width), codes)
    ):
        width = image_width(channels)
        at = _image(batch, channels, places, width)
        held = buffers.moved(held, at, batch * places * width)
    return held, width


def _epilogue(buffers: Buffers, k: int, rounding: int | None, axis: int) -> Epilogue:
    """What becomes of the accumulators of node k, whose neurons lie along `axis`."""
    if rounding is None:
        return Ends()
    kind, op = buffers.network.nodes[k].type, buffers.network.nodes[rounding].op
    assert isinstance(op, Requantize)
    if op.high - op.low > 255:
        raise Refused
    steps = tuple(FloatStep(step.kind, buffers.home(step.operand)) for step in op.program.steps)
    op = Requantize(
        FloatProgram(steps, op.program.ordinal), buffers.home(op.zero_point), op.low, op.high
    )
    neurons = kind.shape[axis]
    if (
        len(steps) == 1
        and steps[0].kind == "mul"
        and not op.program.ordinal
        and op.zero_point.size == 1
    ):
        factor = _along(steps[0].operand, kind.shape, axis, neurons)
        if (np.isfinite(factor) & (factor > 0)).all():
            return PackedScale(factor, int(op.zero_point.reshape(())), op.low, op.high, op.low)
    return _thresholds(op, kind, axis)


# -- moves and functions of codes -----------------------------------------------------------------


def layout(buffers: Buffers, op: Layout, k: int, rounding: int | None) -> None:
    """Elements move without a step, unless several values or constants meet."""
    node, network, kernels = buffers.network.nodes[k], buffers.network, buffers.kernels
    if node.type.count > 256:
        raise Refused
    parts = [buffers.in_pairs(i) for i in node.inputs]
    index = None if op.index is None else buffers.home(op.index)
    total = sum(network.type_of(i).size for i in node.inputs)
    constants = np.zeros(0, np.int32) if op.constants is None else buffers.home(op.constants)
    used = len(constants) if index is not None and index.max() >= total else 0
    shifts = [np.uint8(network.type_of(i).low - node.type.low) for i in node.inputs]
    if len(parts) == 1 and not used and not shifts[0]:
        at = parts[0].at if index is None else parts[0].at[index]
        buffers.pairs[k + 1] = replace(parts[0], at=at)
        return
    places, start = [], 0
    for part in parts:
        places.append(part.at + start)
        start += part.codes
    places.append(start + np.arange(used))
    codes = rounded(start + used, 8)
    rest = np.zeros((1, codes - start, 2), np.uint8)
    rest[0, :used] = (constants[:used].astype(np.int64) - node.type.low)[:, None]
    tail = kernels.asarray(rest)

    def joined(*values: Array) -> Array:
        blocks = [x + shift if shift else x for x, shift in zip(values, shifts, strict=True)]
        if rest.size:
            blocks.append(kernels.xp.broadcast_to(tail, (len(blocks[0]), *rest.shape[1:])))
        return kernels.xp.ascontiguousarray(kernels.xp.concatenate(blocks, axis=1))

    buffer = buffers.step(joined, tuple(part.buffer for part in parts), 4 * codes)
    at = np.concatenate(places)
    buffers.pairs[k + 1] = Pairs(buffer, at if index is None else at[index], codes)


def largest(buffers: Buffers, op: Max, k: int, rounding: int | None) -> None:
    """The largest of each row. Results lie in the order of their first elements, so that images
    keep their form."""
    node = buffers.network.nodes[k]
    held = buffers.in_pairs(node.inputs[0])
    count = buffers.network.type_of(node.inputs[0]).shape[-1]
    rows = held.at.reshape(-1, count)
    order = np.argsort(rows[:, 0], kind="stable")
    index, kernels = buffers.kernels.asarray(rows[order].reshape(-1)), buffers.kernels

    def of_windows(x: Array) -> Array:
        windows = gathered(kernels, x, index)
        return windows.reshape(len(x), len(order), count, 2).max(axis=2)

    buffer = buffers.step(of_windows, (held.buffer,), 2 * held.at.size + 2 * len(order))
    at = np.empty(len(order), np.int64)
    at[order] = np.arange(len(order))
    buffers.pairs[k + 1] = Pairs(buffer, at, len(order))


def table(buffers: Buffers, op: Table, k: int, rounding: int | None) -> None:
    """A rising function, byte by byte; or from bytes to ends, where the results are wide."""
    if not op.monotone:
        raise Refused
    node, (x,) = buffers.network.nodes[k], buffers.network.nodes[k].inputs
    held, kind = buffers.in_pairs(x), buffers.network.type_of(x)
    kernels, xp = buffers.kernels, buffers.kernels.xp
    values = buffers.home(op.values)[:, kind.low - op.low : kind.high + 1 - op.low]
    narrow = node.type.count <= 256
    entries = np.zeros((len(values), 256), np.uint8 if narrow else np.int32)
    entries[:, : kind.count] = values - node.type.low if narrow else values
    there = kernels.asarray(entries.reshape(-1))
    if op.which is not None or not narrow:
        held = buffers.moved(held, np.arange(kind.size), rounded(kind.size, 8))
    offset = None
    if op.which is not None:
        which = np.zeros((held.codes, 1), np.int32)
        which[: kind.size, 0] = 256 * np.broadcast_to(buffers.home(op.which), kind.shape).reshape(
            -1
        )
        offset = kernels.asarray(which)

    def looked_up(codes: Array) -> Array:
        return xp.take(there, codes if offset is None else codes.astype(xp.int32) + offset)

    def ends(codes: Array) -> Interval:
        both = looked_up(codes)[:, : kind.size]
        return both[:, :, 0].reshape(-1, *kind.shape), both[:, :, 1].reshape(-1, *kind.shape)

    if narrow:
        buffer = buffers.step(looked_up, (held.buffer,), 10 * held.codes)
        buffers.pairs[k + 1] = replace(held, buffer=buffer)
    else:
        buffers.ends[k + 1] = buffers.step(ends, (held.buffer,), 24 * held.codes)


def pairwise(buffers: Buffers, op: Pairwise, k: int, rounding: int | None) -> None:
    """A function of two codes, byte by byte; unless it rises, from all corners of the two
    intervals, as the op does."""
    node, kernels, xp = buffers.network.nodes[k], buffers.kernels, buffers.kernels.xp
    if node.type.count > 256:
        raise Refused
    kinds = [buffers.network.type_of(i) for i in node.inputs]
    first, second = (_broadcast(buffers, i, node.type.shape) for i in node.inputs)
    if not first.is_injective():
        first = buffers.moved(first, np.arange(node.type.size), rounded(node.type.size, 8))
    second = buffers.moved(second, first.at, first.codes)
    rows = slice(kinds[0].low - op.a_low, kinds[0].high + 1 - op.a_low)
    columns = slice(kinds[1].low - op.b_low, kinds[1].high + 1 - op.b_low)
    entries = np.zeros((256, 256), np.uint8)
    entries[: kinds[0].count, : kinds[1].count] = (
        buffers.home(op.values)[rows, columns] - node.type.low
    )
    there = kernels.asarray(entries.reshape(-1))

    def looked_up(a: Array, b: Array) -> Array:
        return xp.take(there, a.astype(xp.int32) * 256 + b)

    def enclosed(a: Array, b: Array) -> Array:
        corners = [looked_up(a[:, :, i], b[:, :, j]) for i in (0, 1) for j in (0, 1)]
        result = xp.empty(a.shape, dtype=xp.uint8)
        for end, extreme in enumerate((xp.minimum, xp.maximum)):
            result[:, :, end] = reduce(extreme, corners)
        return result

    reads, size = (first.buffer, second.buffer), 18 * first.codes
    buffer = buffers.step(looked_up if op.increasing else enclosed, reads, size)
    buffers.pairs[k + 1] = replace(first, buffer=buffer)


def _broadcast(buffers: Buffers, value: int, shape: tuple[int, ...]) -> Pairs:
    """A value's pairs, read as if it had a shape that it broadcasts to."""
    held, kind = buffers.in_pairs(value), buffers.network.type_of(value)
    return replace(held, at=np.broadcast_to(held.at.reshape(kind.shape), shape).reshape(-1))


def _image(batch: int, channels: int, places: int, width: int) -> IntArray:
    """Where the elements of [batch, channels, places] lie, channels last, `width` of them
    stored."""
    image, channel, place = np.ogrid[:batch, :channels, :places]
    at: IntArray = ((image * places + place) * width + channel).reshape(-1)
    return at


def _along(values: Any, shape: tuple[int, ...], axis: int, count: int) -> Any:
    """A parameter of every neuron, [count], from one that broadcasts to `shape`; refused if it
    varies elsewhere."""
    full = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
    if any(n != 1 for k, n in enumerate(full.shape) if k != axis):
        raise Refused
    return np.broadcast_to(full.reshape(-1), (count,))


def _thresholds(op: Requantize, kind: Type, axis: int) -> Thresholds:
    """The steps of a rounding that never falls, for every neuron along `axis` of accumulators of
    this type."""
    shape = np.broadcast_shapes(
        *(step.operand.shape for step in op.program.steps), op.zero_point.shape
    )
    shape = (1,) * (len(kind.shape) - len(shape)) + tuple(shape)
    row = _along(np.arange(prod(shape)).reshape(shape), kind.shape, axis, kind.shape[axis])
    cpu, count = open_kernels("cpu"), prod(shape)

    def run(values: Any) -> Any:
        return op.run(cpu, values.reshape(-1, *shape)).reshape(-1, count)

    found = make_staircase(run, count, np.zeros((), np.int64), kind, op.low, op.high)
    if not isinstance(found, StaircaseRelaxation):
        raise Refused
    return Thresholds(found.thresholds[:, 1:-1], row)


# -- which rule ------------------------------------------------------------------------------------

# Adds node k, and, where it is given, the node `rounding` that rounds its result: (buffers, op, k,
# rounding). Raises Unpackable where the op has to do it; what was added by then is dropped later,
# since nothing reads it.
DeviceRule = Callable[[Buffers, Any, int, int | None], None]

DEVICE_RULES: Column[DeviceRule] = Column(
    __name__,
    {
        Dense: dense,
        Conv: conv,
        Layout: layout,
        Max: largest,
        Table: table,
        Pairwise: pairwise,
    },
    {
        Requantize: "behind a weighted sum it is part of that kernel; elsewhere it is rare",
        Mean: "its float32 sum goes in the order of the runtime's kernels",
        Softmax: "an end of its result needs both ends of all its inputs; it has few elements",
    },
)
