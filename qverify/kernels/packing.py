"""Layers in the order of the CUDA kernels of `interval.cu`: weights, metadata, epilogues, taps.
NumPy only.

A value is a uint8 array of pairs, codes minus the type's low: [N, width, 2] or, channels last, [N,
H, W, width, 2], with lower before upper. `width` is the number of codes or channels rounded up;
what the spare ones hold does not matter.

Sound because nothing rounds before the requantization: acc_lower = W+ lower + W- upper + bias and
its counterpart are exact in int32 (`_admit` refuses a layer whose sums could leave it), and the
requantization is the runtime's own float32 arithmetic (`PackedScale`) or a table of its steps
(`Thresholds`), which never decreases: ends go to ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cache
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels

Ints = npt.NDArray[np.integer[Any]]
LIMIT = 2**31
OUTSIDE = -(2**15)  # a tap's row that lies in no image


class Unpackable(Exception):
    """A layer that the kernels do not take; its op computes it instead."""


class Variant(IntEnum):
    """How the products are computed; `-DVARIANT` of the source."""

    PLAIN = 0  # one thread per output
    SPARSE = 1  # mma.sp m16n8k64
    DENSE = 2  # mma m16n8k32
    SMALL = 3  # mma m8n8k16


# Bytes that the weights of 16 neurons x 32 inputs take, metadata included.
RECORD = {Variant.SPARSE: 640, Variant.DENSE: 512, Variant.SMALL: 512}
# What a block computes: neurons, rows; and its threads.
TILES = {"wide": (128, 128, 256), "narrow": (64, 128, 128), "thin": (16, 128, 128)}


def rounded(count: int, step: int) -> int:
    """`count` rounded up to a multiple of `step`."""
    return -(-count // step) * step


# -- what becomes of an accumulator ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ends:
    """The accumulators themselves, int32 [rows, M] each."""


@dataclass(frozen=True, eq=False)
class PackedScale:
    """code = rint(clip(float32(acc) * multiplier[m], low - zero_point, high - zero_point)) +
    zero_point, in float32 and rounded half to even; stored as code - out_low. The same as
    `qverify.ops.Requantize` with a program of one "mul"."""

    multiplier: npt.NDArray[np.float32]  # [M], positive
    zero_point: int
    low: int
    high: int
    out_low: int


@dataclass(frozen=True, eq=False)
class Thresholds:
    """code - out_low = how many of table[row[m]] are <= acc: any requantization that never
    decreases, as its steps."""

    # [rows, T], T <= 255, each row sorted; thresholds outside int32 are always or never reached
    table: Ints
    row: Ints  # [M]


Epilogue = Ends | PackedScale | Thresholds


@dataclass(frozen=True, eq=False)
class PackedEpilogue:
    """The parameters that all kernels share, per neuron in the padded order of the tiles."""

    bias: Array  # int32 [P]
    multiplier: Array  # float32 [P], or [1]
    thresholds: Array  # int32 [rows, T], or [1, 1]
    threshold_row: Array  # int32 [P], or [1]
    kind: int
    count: int
    least: float
    most: float
    offset: int
    neurons: int


Packed = TypeVar("Packed", bound="PackedEpilogue | PackedDense | PackedConv | PackedNetwork")


def moved(packed: Packed, kernels: Kernels) -> Packed:
    """A copy with its arrays on the given machine."""
    changes: dict[str, Any] = {}
    for field in fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, np.ndarray):
            changes[field.name] = kernels.asarray(value)
        elif isinstance(value, PackedEpilogue):
            changes[field.name] = moved(value, kernels)
        elif field.name == "chain":
            changes[field.name] = tuple(moved(layer, kernels) for layer in value)
    return replace(packed, **changes)


def _padded(values: npt.NDArray[Any], groups: int, size: int, dtype: Any) -> Any:
    """[M] -> [groups * size]: every group's part, followed by zeros."""
    result = np.zeros((groups, size), dtype)
    result[:, : len(values) // groups] = np.asarray(values).reshape(groups, -1)
    return result.reshape(-1)


def _pack_epilogue(epilogue: Epilogue, bias: Ints, groups: int, size: int) -> PackedEpilogue:
    neurons = len(bias)
    packed_bias = _padded(bias, groups, size, np.int32)
    one, table, row = np.zeros(1, np.float32), np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
    match epilogue:
        case Ends():
            return PackedEpilogue(packed_bias, one, table, row, 0, 0, 0.0, 0.0, 0, neurons)
        case PackedScale(multiplier, zero_point, low, high, out_low):
            scale = np.broadcast_to(np.asarray(multiplier, np.float32), (neurons,))
            if not (np.isfinite(scale).all() and (scale > 0).all()):
                raise Unpackable("a multiplier is not positive: the ends would change places")
            if not out_low <= low <= high <= out_low + 255:
                raise Unpackable(f"codes [{low}, {high}] do not fit a byte from {out_low} on")
            if max(abs(low - zero_point), abs(high - zero_point)) > 2**24:
                raise Unpackable(
                    f"float32 does not hold the codes [{low}, {high}] from the zero point "
                    f"{zero_point}"
                )
            one = _padded(scale, groups, size, np.float32)
            least, most = float(low - zero_point), float(high - zero_point)
            offset = zero_point - out_low
            return PackedEpilogue(packed_bias, one, table, row, 1, 0, least, most, offset, neurons)
        case Thresholds(steps, rows):
            steps, rows = np.asarray(steps), np.broadcast_to(np.asarray(rows), (neurons,))
            if steps.ndim != 2 or (np.diff(steps.astype(np.int64), axis=1) < 0).any():
                raise ValueError("thresholds must be sorted rows")
            if rows.min(initial=0) < 0 or rows.max(initial=0) >= len(steps):
                raise ValueError("a neuron names a row that is not in the table")
            if steps.shape[1] > 255:
                raise Unpackable(f"a row of {steps.shape[1]} thresholds: a byte counts to 255")
            count, row = steps.shape[1], _padded(rows, groups, size, np.int32)
            # No accumulator reaches the largest int32 (`_admit`), so that it stands for everything
            # beyond it.
            if steps.size:
                table = np.clip(steps.astype(np.int64), -LIMIT, LIMIT - 1).astype(np.int32)
            return PackedEpilogue(packed_bias, one, table, row, 2, count, 0.0, 0.0, 0, neurons)


def _admit(weight: Ints, bias: Ints) -> None:
    """Refuse a layer [K, M] that the kernels could not compute exactly.

    Sound because every partial sum of acc_lower and acc_upper lies within 255 sum|w| + |b|.
    """
    if weight.size and not -128 <= int(weight.min()) <= int(weight.max()) <= 127:
        raise Unpackable(f"a weight in [{weight.min()}, {weight.max()}] does not fit int8")
    reach = np.abs(weight.astype(np.int64)).sum(axis=0) * 255 + np.abs(np.asarray(bias, np.int64))
    if int(reach.max(initial=0)) >= LIMIT - 1:
        raise Unpackable(f"an accumulator's partial sum can reach {reach.max()}, outside int32")


# -- weights in the order of the tensor cores ------------------------------------------------------


@cache
def _orders(sparse: bool) -> tuple[Ints, Ints]:
    """For lane l, register r, byte i of an A fragment: which of 16 neurons and of 32 inputs it
    holds, [32, 4, 4] each.

    Layouts of mma.m16n8k32, mma.m8n8k16 (PTX ISA) and, for mma.sp.m16n8k64, of its compressed
    operand. The four B registers of lane t hold inputs 8 t ... 8 t + 7 as they lie in memory.
    """
    lane, register, byte = np.ogrid[:32, :4, :4]
    group, t = lane >> 2, lane & 3
    neuron = group + 8 * (register & 1) + 0 * byte
    if sparse:
        column = 16 * (register >> 1) + 4 * t + byte
        return neuron, _input_of(column)
    return neuron, 8 * t + 4 * (register >> 1) + byte + 0 * neuron


def _input_of(column: Ints) -> Ints:
    """The input that a column of the compressed operand stands for: columns are numbered by B
    register, then lane."""
    couple = column >> 1
    order: Ints = 2 * (4 * (couple & 3) + (couple >> 2)) + (column & 1)
    return order


def _records(variant: Variant, weight: Ints) -> npt.NDArray[np.uint8]:
    """int8 weights [P, K] (P a multiple of 16, K of 64) -> records, uint8 [P / 16, K / 32,
    RECORD]."""
    tiles, blocks = weight.shape[0] // 16, weight.shape[1] // 32
    block = weight.reshape(tiles, 16, blocks, 32).swapaxes(1, 2)
    neuron, k = _orders(variant is Variant.SPARSE)
    fragments = (
        np.ascontiguousarray(block[:, :, neuron, k].astype(np.int8))
        .view(np.uint8)
        .reshape(tiles, blocks, 512)
    )
    if variant is not Variant.SPARSE:
        return fragments
    # Lane l holds the indices of row (l >> 2) + 8 (l & 1), columns 16 ((l >> 1) & 1) ... + 15, two
    # bits each: which of the four bytes of two pairs a weight meets, 0 or 1 in the first pair, 2 or
    # 3 in the second (the upper byte: w < 0).
    lane, entry = np.ogrid[:32, :16]
    row, column = (lane >> 2) + 8 * (lane & 1) + 0 * entry, 16 * ((lane >> 1) & 1) + entry
    index = (block[:, :, row, _input_of(column)] < 0).astype(np.uint64) + 2 * (column & 1).astype(
        np.uint64
    )
    words = np.ascontiguousarray(
        (index << (2 * entry).astype(np.uint64)).sum(axis=-1).astype("<u4")
    )
    return np.concatenate([fragments, words.view(np.uint8).reshape(tiles, blocks, 128)], axis=-1)


def _tile(neurons: int) -> str:
    """The block shape for so many neurons: the large one unless it pads much more than the middle
    one."""
    if neurons <= 16:
        return "thin"
    return "wide" if rounded(neurons, 128) <= 1.2 * rounded(neurons, 64) else "narrow"


def _pack_groups(variant: Variant, weight: Ints, tile: str) -> tuple[npt.NDArray[np.uint8], int]:
    """`weight` [groups, K, M] -> the records of all groups, and how many neurons of each were
    stored."""
    groups, inputs, neurons = weight.shape
    size = rounded(neurons, TILES[tile][0])
    full = np.zeros((groups, size, rounded(max(inputs, 1), 64)), np.int64)
    full[:, :neurons, :inputs] = weight.swapaxes(1, 2)
    return _records(variant, full.reshape(groups * size, -1)), size


@dataclass(frozen=True, eq=False)
class PackedDense:
    """A dense layer in the order of one variant. Input: pairs [N, width, 2]; output: pairs [N,
    width_out, 2] or ends."""

    variant: Variant
    tile: str
    inputs: int
    width: int
    weights: Array  # records; for PLAIN int8 [inputs, M]
    epilogue: PackedEpilogue

    @property
    def width_out(self) -> int:
        return rounded(self.epilogue.neurons, 8)

    @staticmethod
    def make(
        variant: Variant,
        weight: Ints,
        bias: Ints,
        epilogue: Epilogue,
        width: int | None = None,
        tile: str | None = None,
    ) -> PackedDense:
        """`weight` [K, M] in [-128, 127] and `bias` [M], for codes minus the type's low; raises
        Unpackable for a layer that the kernels cannot compute exactly. `width` >= K, a multiple of
        8: codes in a row of the input; `tile`: one of TILES, chosen by the number of neurons if
        left out."""
        inputs, neurons = weight.shape
        width = rounded(inputs, 8) if width is None else width
        if width < inputs or width % 8 or width > 2**22 or not inputs * neurons:
            raise Unpackable(f"a layer of {inputs} x {neurons} on rows of {width} codes")
        _admit(weight, bias)
        if variant is Variant.PLAIN:
            plain = np.ascontiguousarray(weight, np.int8)
            return PackedDense(
                variant, "", inputs, width, plain, _pack_epilogue(epilogue, bias, 1, neurons)
            )
        tile = _tile(neurons) if tile is None else tile
        weights, size = _pack_groups(variant, weight[None], tile)
        return PackedDense(
            variant, tile, inputs, width, weights, _pack_epilogue(epilogue, bias, 1, size)
        )


@dataclass(frozen=True, eq=False)
class PackedNetwork:
    """Several dense layers that run as one kernel, their weights in shared memory. Input: pairs [N,
    width, 2]; output: that of the last layer."""

    variant: Variant
    size: int  # neurons that a layer may have: 64 or 128
    inputs: int
    width: int
    records: Array  # of all layers
    layers: Array  # int32 [count, 8], see `Network` in the source
    bias: Array  # int32, of all layers, padded to 16
    multiplier: Array  # float32, likewise
    between: int  # bytes of a row between layers
    kind: int
    neurons: int
    chain: tuple[PackedDense, ...]  # PLAIN: the layers one by one

    @property
    def width_out(self) -> int:
        return rounded(self.neurons, 8)

    @staticmethod
    def make(
        variant: Variant, layers: Sequence[tuple[Ints, Ints, Epilogue]], width: int | None = None
    ) -> PackedNetwork:
        """(weight [K, M], bias [M], epilogue) of every layer, M <= 128: `PackedScale` everywhere,
        or `Ends` at the end. Raises Unpackable for layers that do not follow each other, or that
        are no such network."""
        counts = [weight.shape[1] for weight, _, _ in layers]
        follow = all(
            weight.shape[0] == m for (weight, _, _), m in zip(layers[1:], counts, strict=False)
        )
        kinds = [isinstance(epilogue, PackedScale) for _, _, epilogue in layers]
        last = isinstance(layers[-1][2], PackedScale | Ends)
        if not (layers and follow and last and all(kinds[:-1])) or max(counts) > 128:
            raise Unpackable("not a network of scaled layers of at most 128 neurons")
        packed = [PackedDense.make(variant, *layers[0], width)]
        packed += [PackedDense.make(variant, *layer) for layer in layers[1:]]
        kind, size = packed[-1].epilogue.kind, 64 if max(counts) <= 64 else 128
        between = rounded(2 * max(counts), 128)
        shape = (variant, size, packed[0].inputs, packed[0].width)
        if variant is Variant.PLAIN:
            none, real = np.zeros(1, np.int32), np.zeros(1, np.float32)
            return PackedNetwork(
                *shape, none, none, none, real, between, kind, counts[-1], tuple(packed)
            )
        arrays = _layers_in_a_row(variant, layers, [layer.epilogue for layer in packed])
        return PackedNetwork(*shape, *arrays, between + 64, kind, counts[-1], ())


def _layers_in_a_row(
    variant: Variant,
    layers: Sequence[tuple[Ints, Ints, Epilogue]],
    epilogues: Sequence[PackedEpilogue],
) -> tuple[Array, Array, Array, Array]:
    """The records, the table of layers, biases and multipliers of a `PackedNetwork`."""
    records, rows, bias, multiplier, byte, place = [], [], [], [], 0, 0
    for (weight, offset, _), end in zip(layers, epilogues, strict=True):
        piece, padded = _pack_groups(variant, weight[None], "thin")
        bits = np.array([end.least, end.most], np.float32).view(np.int32)
        blocks, tiles = rounded(weight.shape[0], 32) // 32, padded // 16
        rows.append([blocks, tiles, byte, place, *bits, end.offset, 0])
        records.append(piece.reshape(-1))
        bias.append(_padded(offset, 1, padded, np.int32))
        scale = end.multiplier[: len(offset)] if end.kind == 1 else np.zeros(len(offset))
        multiplier.append(_padded(scale, 1, padded, np.float32))
        byte, place = byte + piece.size, place + padded
    table = np.array(rows, np.int32)
    return np.concatenate(records), table, np.concatenate(bias), np.concatenate(multiplier)


@dataclass(frozen=True, eq=False)
class PackedWindow:
    """Where a convolution looks: images [height, width], ONNX's strides, pads (top, left, bottom,
    right), dilations."""

    height: int
    width: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]

    @property
    def output(self) -> tuple[int, int]:
        def count(size: int, axis: int) -> int:
            padded = size + self.pads[axis] + self.pads[axis + 2]
            span = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            return (padded - span) // self.strides[axis] + 1

        return count(self.height, 0), count(self.width, 1)


@dataclass(frozen=True, eq=False)
class PackedConv:
    """A convolution in the order of one variant. Input: pairs [N, H, W, width, 2]; output: [N, OH,
    OW, width_out, 2]."""

    variant: Variant
    tile: str
    piece: int  # bytes that are copied at a time
    groups: int  # after merging
    channels: int  # of one group
    width: int
    window: PackedWindow
    pad: int  # padding, as a byte
    weights: Array  # records; for PLAIN int8 [kernel_y, kernel_x, channels, M]
    taps: Array  # int32 [pieces, 2]: dy << 16 | dx & 0xffff, offset in bytes
    fill: Array  # uint8 [16], all `pad`
    epilogue: PackedEpilogue

    @property
    def width_out(self) -> int:
        return rounded(self.epilogue.neurons, 8)

    @staticmethod
    def make(
        variant: Variant,
        weight: Ints,
        bias: Ints,
        epilogue: Epilogue,
        window: PackedWindow,
        groups: int = 1,
        pad: int = 0,
        width: int | None = None,
    ) -> PackedConv:
        """`weight` [M, C / groups, KH, KW] in [-128, 127], `bias` [M], `pad` the padding's code
        minus the type's low. `width` >= C, even: channels of a pixel as stored. Raises Unpackable
        for what the kernels cannot compute."""
        neurons, per_group = weight.shape[:2]
        channels = per_group * groups
        width = image_width(channels) if width is None else width
        if (
            width < channels
            or width % 2
            or not 0 <= pad <= 255
            or min(window.output) <= 0
            or neurons % groups
        ):
            raise Unpackable(
                f"a convolution of {channels} channels in {groups} groups, width {width}, padding "
                f"{pad}"
            )
        if (
            max(window.height, window.width, *window.pads)
            + max(weight.shape[2:]) * max(window.dilations)
            >= -OUTSIDE
        ):
            raise Unpackable("an image of more than 2^15 rows or columns")
        if window.height * window.width * width * 2 >= LIMIT:
            raise Unpackable("an image of more than 2^31 bytes")
        _admit(weight.reshape(neurons, -1).T, bias)
        fill, plain_taps = np.full(16, pad, np.uint8), np.zeros((1, 2), np.int32)
        if variant is Variant.PLAIN:
            plain = np.ascontiguousarray(weight.transpose(2, 3, 1, 0), np.int8)
            end = _pack_epilogue(epilogue, bias, 1, neurons)
            return PackedConv(
                variant, "", 16, groups, per_group, width, window, pad, plain, plain_taps, fill, end
            )
        merged = _merge(weight, groups, width)  # [groups, KH, KW, channels, M / groups]
        count, stored = merged.shape[0], merged.shape[3]
        piece = 16 if width % 8 == 0 else 4
        tile = _tile(neurons // count)
        if piece == 4 and tile == "wide":
            tile = "narrow"
        flat = merged.reshape(count, -1, neurons // count)
        weights, size = _pack_groups(variant, flat, tile)
        end = _pack_epilogue(epilogue, bias, count, size)
        taps = _taps(window, stored, width, piece, rounded(flat.shape[1], 64))
        return PackedConv(
            variant, tile, piece, count, stored, width, window, pad, weights, taps, fill, end
        )


def image_width(channels: int) -> int:
    """Channels of a stored pixel: few channels are not padded to eight, so that a first layer reads
    little."""
    return next((few for few in (2, 4) if channels <= few), rounded(channels, 8))


def _merge(weight: Ints, groups: int, width: int) -> Ints:
    """[M, C / groups, KH, KW] -> [fewer groups, KH, KW, channels, M / groups], zero outside the
    blocks of the old groups, so that every group begins at a multiple of 16 bytes, in the input and
    in the output."""
    neurons, channels = weight.shape[0] // groups, weight.shape[1]
    together = next(
        (
            f
            for f in range(1, groups)
            if groups % f == 0 and f * channels % 8 == 0 and f * neurons % 8 == 0
        ),
        groups,
    )
    count = groups // together
    stored = width if count == 1 else together * channels
    result = np.zeros((count, *weight.shape[2:], stored, together * neurons), np.int64)
    for group in range(groups):
        where, at = group // together, group % together
        block = weight[group * neurons : (group + 1) * neurons].transpose(2, 3, 1, 0)
        rows, columns = (
            slice(at * channels, (at + 1) * channels),
            slice(at * neurons, (at + 1) * neurons),
        )
        result[where, :, :, rows, columns] = block
    return result


def _taps(
    window: PackedWindow, channels: int, width: int, piece: int, inputs: int
) -> npt.NDArray[np.int32]:
    """For every piece of the flattened (tap, channel) axis, padded to `inputs`: where it lies in
    the image."""
    k = np.arange(0, inputs, piece // 2)
    tap, channel = k // channels, k % channels
    dy, dx = (
        tap // window.kernel[1] * window.dilations[0],
        tap % window.kernel[1] * window.dilations[1],
    )
    offset = ((dy * window.width + dx) * width + channel) * 2
    real = tap < prod(window.kernel)
    return np.stack(
        [np.where(real, dy << 16 | dx, OUTSIDE << 16), np.where(real, offset, 0)], axis=-1
    ).astype(np.int32)
