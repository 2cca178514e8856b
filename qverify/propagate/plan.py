"""From an integer network to a plan of fused CUDA kernels, gathers of bytes and the ops' own
interval rules.

A weighted sum with its rounding is one kernel, from pairs to pairs; a move of elements costs
nothing until a kernel needs another order (the rows of a dense weight are put in the order that is
there). Rising functions of a code, functions of two codes and maxima are computed on the bytes.
Everything else, and whatever packing refuses, is computed by the op itself, on ends.

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
from qverify.kernels.fused import Fused
from qverify.kernels.packing import (
    Ends,
    Epilogue,
    PackedScale,
    PackedWindow,
    Thresholds,
    Unpackable,
    image_width,
    rounded,
)
from qverify.network import Network
from qverify.ops import (
    Conv,
    Dense,
    FloatProgram,
    FloatStep,
    Interval,
    Layout,
    Max,
    Pairwise,
    Requantize,
    Table,
    Type,
)
from qverify.ops.relax import StaircaseRelaxation, make_staircase
from qverify.propagate import device
from qverify.propagate.device import IntArray, Layer, Pairs, Plan, finished, gathered


class _Refused(Unpackable):
    """The op computes this itself."""


def make_plan(network: Network, fused: Fused) -> Plan:
    """The plan for a network whose arrays are on the machine of `fused`."""
    return _Planner(network, fused).plan()


class _Planner:
    """A plan under construction. A value may be in a buffer of ends, in one of pairs, or in
    both."""

    def __init__(self, network: Network, fused: Fused) -> None:
        self._network, self._fused, self._kernels = network, fused, fused.kernels
        self._steps: list[device.DeviceStep] = []
        self._ends: dict[int, int] = {0: 0}
        self._pairs: dict[int, Pairs] = {}
        self._forms: dict[tuple[int, bytes, int], Pairs] = {}  # gathered before
        self._readers: list[list[int]] = [[] for _ in range(len(network.nodes) + 1)]
        for k, node in enumerate(network.nodes):
            for i in node.inputs:
                self._readers[i].append(k)

    def plan(self) -> Plan:
        """All nodes in order."""
        done: set[int] = set()
        for k in range(len(self._network.nodes)):
            if k not in done:
                done.update(self._add(k))
        outputs = tuple(self._in_ends(i) for i in self._network.outputs)
        return finished(self._fused, self._steps, outputs)

    def _add(self, k: int) -> list[int]:
        """Add node k, and the rounding of its result if that can be fused; the nodes added."""
        node = self._network.nodes[k]
        if node.type.size and all(self._network.type_of(i).size for i in node.inputs):
            for rounding in dict.fromkeys((self._rounding(k), None)):
                try:
                    self._fast(k, rounding)
                    return [k] if rounding is None else [k, rounding]
                except Unpackable:
                    continue
        op, types = node.op, [self._network.type_of(i) for i in (k + 1, *node.inputs)]
        size = 32 * sum(t.size for t in types)
        if isinstance(op, Conv):
            size += (
                8
                * prod(op.weight.shape[1:])
                * op.groups
                * prod(node.type.shape[2:])
                * node.type.shape[0]
            )
        reads = tuple(self._in_ends(i) for i in node.inputs)
        self._ends[k + 1] = self._step(
            lambda *boxes: op.interval(self._kernels, *boxes), reads, size
        )
        return [k]

    def _rounding(self, k: int) -> int | None:
        """The node that rounds the result of node k, if nothing else reads it."""
        readers = self._readers[k + 1]
        if isinstance(self._network.nodes[k].op, Dense | Conv) and len(readers) == 1:
            after = self._network.nodes[readers[0]].op
            if isinstance(after, Requantize) and k + 1 not in self._network.outputs:
                return readers[0]
        return None

    def _fast(self, k: int, rounding: int | None) -> None:
        """Node k by kernels or on bytes; raises Unpackable if it must be left to the op."""
        match self._network.nodes[k].op:
            case Dense() as op:
                self._dense(op, k, rounding)
            case Conv() as op:
                self._conv(op, k, rounding)
            case Layout() as op:
                self._layout(op, k)
            case Max():
                self._max(k)
            case Table() as op if op.monotone:
                self._table(op, k)
            case Pairwise() as op:
                self._pairwise(op, k)
            case _:
                raise _Refused

    # -- formats -----------------------------------------------------------------------------------

    def _step(
        self, function: Callable[..., Any], reads: tuple[int, ...], size: int, **more: Any
    ) -> int:
        """Add a step; its buffer."""
        self._steps.append(device.DeviceStep(function, reads, len(self._steps) + 1, size, **more))
        return len(self._steps)

    def _home(self, array: Array) -> Any:
        """An op's array in NumPy."""
        return np.asarray(self._kernels.to_host(array))

    def _in_ends(self, value: int) -> int:
        """The buffer of a value's ends."""
        if value not in self._ends:
            pairs, kind, kernels = self._pairs[value], self._network.type_of(value), self._kernels
            in_order = np.array_equal(pairs.at, np.arange(kind.size))
            index = None if in_order else kernels.asarray(pairs.at)

            def separated(x: Array) -> Interval:
                codes = x if index is None else gathered(kernels, x, index)
                lower, upper = (
                    codes[:, : kind.size, end].astype(kernels.xp.int32) for end in (0, 1)
                )
                if kind.low:
                    lower, upper = lower + kind.low, upper + kind.low
                return lower.reshape(-1, *kind.shape), upper.reshape(-1, *kind.shape)

            self._ends[value] = self._step(separated, (pairs.buffer,), 12 * kind.size)
        return self._ends[value]

    def _in_pairs(self, value: int) -> Pairs:
        """Where a value's pairs are; refused where its codes do not fit a byte."""
        kind, kernels = self._network.type_of(value), self._kernels
        if kind.count > 256 or kind.size == 0:
            raise _Refused
        if value not in self._pairs:
            codes = rounded(kind.size, 8)

            def interleaved(ends: Interval) -> Array:
                # Spare codes hold anything.
                pairs = kernels.xp.empty((len(ends[0]), codes, 2), dtype=kernels.xp.uint8)
                for k, end in enumerate(ends):
                    flat = end.reshape(-1, kind.size)
                    pairs[:, : kind.size, k] = flat - kind.low if kind.low else flat
                return pairs

            buffer = self._step(interleaved, (self._ends[value],), 2 * codes + 8 * kind.size)
            self._pairs[value] = Pairs(buffer, np.arange(kind.size), codes)
        return self._pairs[value]

    def _moved(self, held: Pairs, at: IntArray, codes: int) -> Pairs:
        """The same value in another form, gathered if need be."""
        if held.is_at(at, codes):
            return held
        index = np.zeros(codes, np.int64)
        index[at] = held.at
        key = held.buffer, index.tobytes(), codes
        if key not in self._forms:
            there, kernels = self._kernels.asarray(index), self._kernels
            buffer = self._step(lambda x: gathered(kernels, x, there), (held.buffer,), 2 * codes)
            self._forms[key] = Pairs(buffer, at, codes)
        return replace(self._forms[key], at=at)

    # -- weighted sums -----------------------------------------------------------------------------

    def _dense(self, op: Dense, k: int, rounding: int | None) -> None:
        """A product with one matrix, for every row of the value."""
        node, (x,) = self._network.nodes[k], self._network.nodes[k].inputs
        kind = self._network.type_of(x)
        weight, bias = (np.asarray(self._home(v), np.int64) for v in (op.weight, op.bias))
        if weight.ndim != 2:
            raise _Refused
        held = self._in_pairs(x)
        (inputs, neurons), rows = weight.shape, kind.size // weight.shape[0]
        bias = _along(
            bias, node.type.shape, len(node.type.shape) - 1, neurons
        ) + kind.low * weight.sum(axis=0)
        epilogue = self._epilogue(k, rounding, len(node.type.shape) - 1)
        width = rounded(inputs, 8)
        if rows == 1 and held.codes % 8 == 0 and held.codes <= 2 * width and held.is_injective():
            width, order = held.codes, weight
            weight = np.zeros((int(held.at.max()) + 1, neurons), np.int64)
            weight[held.at] = order
        else:
            at = (np.arange(rows)[:, None] * width + np.arange(inputs)).reshape(-1)
            held = self._moved(held, at, rows * width)
        fused, layer = self._fused, self._fused.pack_dense(weight, bias, epilogue, width)

        def function(pairs: Array) -> Any:
            result = fused.dense(layer, pairs.reshape(-1, width, 2))
            return result if rounding is None or rows == 1 else result.reshape(-1, rows * out, 2)

        shape, out = node.type.shape, rounded(neurons, 8)
        more: dict[str, Any] = {"kernel": "dense"}
        if rows == 1:
            more["layer"] = Layer(weight, bias, epilogue, width)
        if rounding is None:
            buffer = self._step(function, (held.buffer,), 8 * prod(shape), **more)
            self._ends[k + 1] = self._shaped(buffer, lambda end: end.reshape(-1, *shape), 0)
        else:
            buffer = self._step(function, (held.buffer,), 2 * rows * out, **more)
            at = (np.arange(rows)[:, None] * out + np.arange(neurons)).reshape(-1)
            self._pairs[rounding + 1] = Pairs(buffer, at, rows * out)

    def _shaped(self, buffer: int, change: Callable[[Array], Array], size: int) -> int:
        """A buffer of ends in another shape."""
        return self._step(lambda ends: (change(ends[0]), change(ends[1])), (buffer,), size)

    def _conv(self, op: Conv, k: int, rounding: int | None) -> None:
        """A convolution along one or two axes, on images with channels last."""
        node, (x,) = self._network.nodes[k], self._network.nodes[k].inputs
        kind, rank = self._network.type_of(x), len(op.strides)
        weight, bias = (np.asarray(self._home(v), np.int64) for v in (op.weight, op.bias))
        if rank not in (1, 2):
            raise _Refused
        held = self._in_pairs(x)
        one, two = (1,) * (2 - rank), (0,) * (2 - rank)
        weight = weight.reshape(*weight.shape[:2], *one, *weight.shape[2:])
        batch, channels = kind.shape[:2]
        high, wide = (*one, *kind.shape[2:])
        pads = (*two, *op.pads[:rank], *two, *op.pads[rank:])
        strides, dilations = (*one, *op.strides), (*one, *op.dilations)
        window = PackedWindow(high, wide, weight.shape[2:], strides, pads, dilations)  # type: ignore[arg-type]
        pad = op.pad_value - kind.low if any(pads) else 0
        bias = bias + kind.low * weight.sum(axis=(1, 2, 3))
        epilogue = self._epilogue(k, rounding, 1)
        places = batch * high * wide
        width = held.codes // places
        if (
            width % 2
            or width < channels
            or not held.is_at(_image(batch, channels, high * wide, width), places * width)
        ):
            width = image_width(channels)
            held = self._moved(held, _image(batch, channels, high * wide, width), places * width)
        fused, layer = (
            self._fused,
            self._fused.pack_conv(weight, bias, epilogue, window, op.groups, pad, width),
        )
        neurons, shape = len(weight), node.type.shape
        out = rounded(neurons, 8)
        codes = prod(shape) // neurons * out

        def convolved(pairs: Array) -> Any:
            result = fused.conv(layer, pairs.reshape(-1, high, wide, width, 2))
            return result if rounding is None else result.reshape(-1, codes, 2)

        def first(end: Array) -> Array:
            last = end.reshape(-1, *shape[:1], *shape[2:], neurons)
            return self._kernels.xp.ascontiguousarray(self._kernels.xp.moveaxis(last, -1, 2))

        size = 8 * prod(shape) if rounding is None else 2 * codes
        buffer = self._step(convolved, (held.buffer,), size, kernel="conv")
        if rounding is None:
            self._ends[k + 1] = self._shaped(buffer, first, size)
        else:
            self._pairs[rounding + 1] = Pairs(
                buffer, _image(batch, neurons, prod(shape[2:]), out), codes
            )

    def _epilogue(self, k: int, rounding: int | None, axis: int) -> Epilogue:
        """What becomes of the accumulators of node k, whose neurons lie along `axis`."""
        if rounding is None:
            return Ends()
        kind, op = self._network.nodes[k].type, self._network.nodes[rounding].op
        assert isinstance(op, Requantize)
        if op.high - op.low > 255:
            raise _Refused
        steps = tuple(FloatStep(step.kind, self._home(step.operand)) for step in op.program.steps)
        op = Requantize(
            FloatProgram(steps, op.program.ordinal), self._home(op.zero_point), op.low, op.high
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

    # -- moves and functions of codes --------------------------------------------------------------

    def _layout(self, op: Layout, k: int) -> None:
        """Elements move without a step, unless several values or constants meet."""
        node, network, kernels = self._network.nodes[k], self._network, self._kernels
        if node.type.count > 256:
            raise _Refused
        parts = [self._in_pairs(i) for i in node.inputs]
        index = None if op.index is None else self._home(op.index)
        total = sum(network.type_of(i).size for i in node.inputs)
        constants = np.zeros(0, np.int32) if op.constants is None else self._home(op.constants)
        used = len(constants) if index is not None and index.max() >= total else 0
        shifts = [np.uint8(network.type_of(i).low - node.type.low) for i in node.inputs]
        if len(parts) == 1 and not used and not shifts[0]:
            at = parts[0].at if index is None else parts[0].at[index]
            self._pairs[k + 1] = replace(parts[0], at=at)
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
            own = [x + shift if shift else x for x, shift in zip(values, shifts, strict=True)]
            rows = (
                [kernels.xp.broadcast_to(tail, (len(own[0]), *rest.shape[1:]))] if rest.size else []
            )
            return kernels.xp.ascontiguousarray(kernels.xp.concatenate([*own, *rows], axis=1))

        buffer = self._step(joined, tuple(part.buffer for part in parts), 4 * codes)
        at = np.concatenate(places)
        self._pairs[k + 1] = Pairs(buffer, at if index is None else at[index], codes)

    def _max(self, k: int) -> None:
        """The largest of each row. Results lie in the order of their first elements, so that images
        keep their form."""
        node = self._network.nodes[k]
        held = self._in_pairs(node.inputs[0])
        count = self._network.type_of(node.inputs[0]).shape[-1]
        rows = held.at.reshape(-1, count)
        order = np.argsort(rows[:, 0], kind="stable")
        index, kernels = self._kernels.asarray(rows[order].reshape(-1)), self._kernels

        def largest(x: Array) -> Array:
            windows = gathered(kernels, x, index)
            return windows.reshape(len(x), len(order), count, 2).max(axis=2)

        buffer = self._step(largest, (held.buffer,), 2 * held.at.size + 2 * len(order))
        at = np.empty(len(order), np.int64)
        at[order] = np.arange(len(order))
        self._pairs[k + 1] = Pairs(buffer, at, len(order))

    def _table(self, op: Table, k: int) -> None:
        """A rising function, byte by byte; or from bytes to ends, where the results are wide."""
        node, (x,) = self._network.nodes[k], self._network.nodes[k].inputs
        held, kind, kernels, xp = (
            self._in_pairs(x),
            self._network.type_of(x),
            self._kernels,
            self._kernels.xp,
        )
        values = self._home(op.values)[:, kind.low - op.low : kind.high + 1 - op.low]
        narrow = node.type.count <= 256
        entries = np.zeros((len(values), 256), np.uint8 if narrow else np.int32)
        entries[:, : kind.count] = values - node.type.low if narrow else values
        there = kernels.asarray(entries.reshape(-1))
        if op.which is not None or not narrow:
            held = self._moved(held, np.arange(kind.size), rounded(kind.size, 8))
        offset = None
        if op.which is not None:
            which = np.zeros((held.codes, 1), np.int32)
            which[: kind.size, 0] = 256 * np.broadcast_to(self._home(op.which), kind.shape).reshape(
                -1
            )
            offset = kernels.asarray(which)

        def looked_up(codes: Array) -> Array:
            return xp.take(there, codes if offset is None else codes.astype(xp.int32) + offset)

        def ends(codes: Array) -> Interval:
            both = looked_up(codes)[:, : kind.size]
            return both[:, :, 0].reshape(-1, *kind.shape), both[:, :, 1].reshape(-1, *kind.shape)

        if narrow:
            buffer = self._step(looked_up, (held.buffer,), 10 * held.codes)
            self._pairs[k + 1] = replace(held, buffer=buffer)
        else:
            self._ends[k + 1] = self._step(ends, (held.buffer,), 24 * held.codes)

    def _pairwise(self, op: Pairwise, k: int) -> None:
        """A function of two codes, byte by byte; unless it rises, from all corners of the two
        intervals, as the op does."""
        node, kernels, xp = self._network.nodes[k], self._kernels, self._kernels.xp
        if node.type.count > 256:
            raise _Refused
        kinds, shape = [self._network.type_of(i) for i in node.inputs], node.type.shape
        parts = []
        for i, kind in zip(node.inputs, kinds, strict=True):
            held = self._in_pairs(i)
            at = np.broadcast_to(held.at.reshape(kind.shape), shape).reshape(-1)
            parts.append(replace(held, at=at))
        first, second = parts
        if not first.is_injective():
            first = self._moved(first, np.arange(node.type.size), rounded(node.type.size, 8))
        second = self._moved(second, first.at, first.codes)
        rows = slice(kinds[0].low - op.a_low, kinds[0].high + 1 - op.a_low)
        columns = slice(kinds[1].low - op.b_low, kinds[1].high + 1 - op.b_low)
        entries = np.zeros((256, 256), np.uint8)
        entries[: kinds[0].count, : kinds[1].count] = (
            self._home(op.values)[rows, columns] - node.type.low
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
        buffer = self._step(looked_up if op.increasing else enclosed, reads, size)
        self._pairs[k + 1] = replace(first, buffer=buffer)


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
        raise _Refused
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
        raise _Refused
    return Thresholds(found.thresholds[:, 1:-1], row)
