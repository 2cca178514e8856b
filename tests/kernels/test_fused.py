"""The CUDA kernels of exact interval propagation, bit for bit against int64 NumPy and against
qverify's own ops.

Everywhere: the unchanged source, compiled for the CPU against a shim of CUDA (tests/kernels/shim),
in two schedules, and the unchanged host code. On an NVIDIA GPU (`-m gpu`): the same cases, compiled
by CuPy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from qverify.errors import DeviceError
from qverify.kernels import Kernels, open_kernels
from qverify.kernels.fused import (
    CAPABILITY,
    Fused,
    channels_last,
    choose,
    coded,
    expected,
    interleave,
    is_exact,
    open_fused,
    options,
    same,
    separate,
    source,
)
from qverify.kernels.packing import (
    TILES,
    Ends,
    Epilogue,
    PackedConv,
    PackedDense,
    PackedNetwork,
    PackedScale,
    PackedWindow,
    Thresholds,
    Unpackable,
    Variant,
    image_width,
)
from qverify.ops import Conv, Dense, FloatProgram, Requantize
from tests.kernels.shim.build import Module, ShimError
from tests.kernels.strict import Module as StrictModule
from tests.kernels.strict import open_strict

CPU = open_kernels("cpu")
TENSOR = tuple(v for v in Variant if v is not Variant.PLAIN)


def gpu() -> Kernels:
    """The GPU's machine; without one the test is skipped, with the reason."""
    try:
        return open_kernels("cuda")
    except DeviceError as error:
        pytest.skip(str(error))


def on_gpu(variant: Variant) -> Fused:
    kernels = gpu()
    if int(kernels.xp.cuda.Device().compute_capability) < CAPABILITY[variant]:
        pytest.skip(f"this device cannot run the variant {variant.name}")
    return Fused(kernels, variant, kernels.xp.RawModule(code=source(), options=options(variant)))


def variants() -> Iterator[Any]:
    for variant in Variant:
        yield pytest.param(("shim", variant), id=f"shim-{variant.name}")
        yield pytest.param(("cuda", variant), id=f"cuda-{variant.name}", marks=pytest.mark.gpu)


@pytest.fixture(params=variants())
def fused(request: pytest.FixtureRequest) -> Fused:
    where, variant = request.param
    return on_gpu(variant) if where == "cuda" else Fused(CPU, variant, Module(variant))


# -- dense layers ----------------------------------------------------------------------------------


def epilogues(rng: np.random.Generator, neurons: int, reach: int) -> tuple[Epilogue, ...]:
    """Every kind; multipliers that saturate, that leave a code or two, and powers of two, which
    meet halves."""
    multiplier = (rng.uniform(0.1, 6.0, neurons) * 255 / max(reach, 1)).astype(np.float32)
    multiplier[::5] = 2.0 ** np.round(np.log2(multiplier[::5]))
    multiplier[1::7] = np.float32(1e-40)  # denormal: a GPU may take it for zero
    multiplier[2::7] = np.float32(3e38)
    table = np.sort(rng.integers(-reach, reach + 1, (4, 255)), axis=1).astype(np.int32)
    table[1] = table[1, 7]  # a jump over all codes
    row = rng.integers(0, 4, neurons).astype(np.int32)
    return (
        Ends(),
        PackedScale(multiplier, 3, 0, 255, 0),
        PackedScale(multiplier, -128, -128, 127, -128),
        PackedScale(multiplier, 200, 10, 250, 0),
        Thresholds(table, row),
        Thresholds(
            np.concatenate(
                [[[-(2**40)]] * 4, table[:, :17].astype(np.int64), [[2**31]] * 4], axis=1
            ),
            row,
        ),
        Thresholds(np.zeros((1, 0), np.int32), np.zeros(neurons, np.int32)),
    )


def box(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Ends in [0, 255]: random ones, points, whole ranges."""
    lower, upper = np.sort(rng.integers(0, 256, (2, *shape)), axis=0)
    kind = rng.integers(0, 4, shape)
    lower = np.where(kind == 1, 0, lower)
    return lower, np.where(kind == 1, 255, np.where(kind == 2, lower, upper))


# rows, inputs, neurons, spare codes of a row
SIZES = (
    (1, 1, 1, 0),
    (5, 8, 16, 0),
    (130, 33, 17, 0),
    (40, 64, 64, 8),
    (128, 100, 65, 0),
    (3, 257, 128, 16),
    (129, 320, 10, 0),
    (40, 300, 130, 0),
)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dense_layers(size: tuple[int, int, int, int], fused: Fused) -> None:
    rows, inputs, neurons, spare = size
    rng = np.random.default_rng(size)
    weight, bias = rng.integers(-128, 128, (inputs, neurons)), rng.integers(-9999, 9999, neurons)
    lower, upper = box(rng, (rows, inputs))
    ends = expected(weight, bias, lower, upper)
    x = interleave(CPU, lower, upper, (inputs + 7) // 8 * 8 + spare)
    x[:, inputs:] = 119  # spare codes may hold anything
    x = fused.kernels.asarray(x)
    reach = int(np.abs(ends).max())
    for epilogue in epilogues(rng, neurons, reach):
        layer = fused.pack_dense(weight, bias, epilogue, x.shape[1])
        assert same(fused, epilogue, fused.dense(layer, x), ends)


@pytest.mark.parametrize("value", (-128, -1, 0, 127))
def test_extreme_weights(value: int, fused: Fused) -> None:
    """The largest sums of either sign, over whole ranges and at either end."""
    weight = np.full((260, 20), value)
    weight[1::2, ::2] = ~value
    lower, upper = (
        np.array([[0] * 260, [255] * 260, [0] * 260]),
        np.array([[0] * 260, [255] * 260, [255] * 260]),
    )
    bias = np.full(20, -(2**31) + 2 + 260 * 128 * 255)
    ends = expected(weight, bias, lower, upper)
    result = fused.dense(
        fused.pack_dense(weight, bias, Ends()), interleave(fused.kernels, lower, upper)
    )
    assert same(fused, Ends(), result, ends)


def test_every_pattern_of_signs(fused: Fused) -> None:
    """Neurons 0 ... 255: all patterns of eight neighbouring weights, at every place of a block of
    32 inputs."""
    patterns = np.where(np.arange(256)[None] >> np.arange(8)[:, None] & 1, -1, 1)
    weight = np.tile(patterns, (4, 1)) * (np.arange(32)[:, None] * 3 + 5)
    rng = np.random.default_rng(0)
    lower, upper = box(rng, (9, 32))
    ends = expected(weight, np.zeros(256, np.int64), lower, upper)
    layer = fused.pack_dense(weight, np.zeros(256, np.int64), Ends())
    assert same(fused, Ends(), fused.dense(layer, interleave(fused.kernels, lower, upper)), ends)


@pytest.mark.parametrize("tile", TILES)
def test_any_tile_may_be_asked_for(tile: str, fused: Fused) -> None:
    rng = np.random.default_rng(9)
    weight, bias = rng.integers(-128, 128, (70, 40)), rng.integers(-99, 99, 40)
    lower, upper = box(rng, (150, 70))
    scale = PackedScale(np.full(40, 1e-3, np.float32), 0, 0, 255, 0)
    layer = fused.pack_dense(weight, bias, scale, tile=tile)
    ends = expected(weight, bias, lower, upper)
    assert same(fused, scale, fused.dense(layer, interleave(fused.kernels, lower, upper)), ends)


def test_an_empty_batch(fused: Fused) -> None:
    layer = fused.pack_dense(np.ones((8, 3), np.int64), np.zeros(3, np.int64), Ends())
    lower, upper = fused.dense(layer, interleave(fused.kernels, np.zeros((0, 8)), np.zeros((0, 8))))
    assert lower.shape == upper.shape == (0, 3)


def test_spare_codes_are_zero_and_feed_the_next_layer(fused: Fused) -> None:
    """Two layers in a row, the pairs handed over as they are."""
    rng = np.random.default_rng(5)
    first, second = rng.integers(-128, 128, (20, 13)), rng.integers(-128, 128, (13, 9))
    scale = PackedScale(np.full(13, 3e-3, np.float32), 100, 0, 255, 0)
    lower, upper = box(rng, (30, 20))
    bias = rng.integers(-500, 500, 13)
    middle = fused.dense(
        fused.pack_dense(first, bias, scale), interleave(fused.kernels, lower, upper)
    )
    assert middle.shape == (30, 16, 2) and not fused.kernels.to_host(middle)[:, 13:].any()
    layer = fused.pack_dense(second, bias[:9], Ends())
    codes = [coded(scale, end) for end in expected(first, bias, lower, upper)]
    assert same(fused, Ends(), fused.dense(layer, middle), expected(second, bias[:9], *codes))


@pytest.mark.parametrize("low", (0, -128, 3))
def test_a_layer_as_the_ops_bound_it(low: int, fused: Fused) -> None:
    """Dense and Requantize of qverify.ops over a type [low, low + 200], without and with a
    requantization."""
    rng = np.random.default_rng(low + 128)
    high = low + 200
    op = Dense(rng.integers(-128, 128, (50, 21)), rng.integers(-999, 999, 21), low, high)
    lower, upper = np.sort(rng.integers(low, high + 1, (2, 33, 50)), axis=0).astype(np.int32)
    ends = op.interval(CPU, (lower, upper))
    multiplier = rng.uniform(1e-5, 2e-3, 21).astype(np.float32)
    multiplier[:6] = 2.0**-9
    requantize = Requantize(
        FloatProgram().then("mul", multiplier), np.array(-5, np.int32), -128, 127
    )
    codes = requantize.interval(CPU, ends)
    x = interleave(fused.kernels, lower - low, upper - low)
    bias = op.bias + low * op.weight.sum(axis=0)
    accumulators = fused.dense(fused.pack_dense(op.weight, bias, Ends()), x)
    pairs = fused.dense(
        fused.pack_dense(op.weight, bias, PackedScale(multiplier, -5, -128, 127, -128)), x
    )
    for ours, theirs in zip(accumulators, ends, strict=True):
        assert np.array_equal(fused.kernels.to_host(ours), theirs)
    for ours, theirs in zip(separate(fused.kernels, pairs, 21), codes, strict=True):
        assert np.array_equal(fused.kernels.to_host(ours) - 128, theirs)


NETWORKS = {  # neurons, boxes
    "5-50-50-5": ((5, 50, 50, 5), 70),
    "100-64-32-10": ((100, 64, 32, 10), 300),
    "40-128-7-100": ((40, 128, 7, 100), 150),
    "one layer": ((33, 65), 3),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ends", (True, False), ids=("ends", "codes"))
def test_whole_networks(name: str, ends: bool, fused: Fused) -> None:
    """All layers in one kernel, with boxes that widen from layer to layer."""
    widths, rows = NETWORKS[name]
    rng = np.random.default_rng(len(name))
    lower = rng.integers(0, 250, (rows, widths[0]))
    x = interleave(fused.kernels, lower, lower + rng.integers(0, 6, lower.shape))
    box_of: tuple[Any, Any] = (lower, fused.kernels.to_host(x)[:, : widths[0], 1].astype(np.int64))
    layers: list[tuple[Any, Any, Epilogue]] = []
    for inputs, neurons in pairwise(widths):
        weight, bias = (
            rng.integers(-128, 128, (inputs, neurons)),
            rng.integers(-5000, 5000, neurons),
        )
        multiplier = (rng.uniform(0.5, 2, neurons) * 60 / (inputs**0.5 * 128 * 75)).astype(
            np.float32
        )
        last = len(layers) == len(widths) - 2
        epilogue: Epilogue = (
            Ends() if last and ends else PackedScale(multiplier, 100, 0, 255 - last, 0)
        )
        sums = expected(weight, bias, *box_of)
        layers.append((weight, bias, epilogue))
        if not last:
            box_of = (coded(epilogue, sums[0]), coded(epilogue, sums[1]))
    packed = fused.pack_network(layers)
    assert same(fused, layers[-1][2], fused.network(packed, x), sums)


def test_a_large_network_after_a_small_one(fused: Fused) -> None:
    """The second asks for more shared memory than the first."""
    rng = np.random.default_rng(4)
    for inputs in (8, 600):
        weight, bias = rng.integers(-128, 128, (inputs, 60)), rng.integers(-99, 99, 60)
        lower, upper = box(rng, (3, inputs))
        result = fused.network(
            fused.pack_network([(weight, bias, Ends())]), interleave(fused.kernels, lower, upper)
        )
        assert same(fused, Ends(), result, expected(weight, bias, lower, upper))


def test_networks_that_are_refused() -> None:
    def layer(inputs: int, neurons: int, epilogue: Epilogue) -> tuple[Any, Any, Epilogue]:
        return np.ones((inputs, neurons), np.int64), np.zeros(neurons, np.int64), epilogue

    scale = PackedScale(np.full(1, 0.5, np.float32), 0, 0, 255, 0)
    steps = Thresholds(np.zeros((1, 1), np.int32), np.zeros(1, np.int32))
    for layers in (
        [layer(8, 129, Ends())],
        [layer(8, 8, scale), layer(9, 3, Ends())],
        [layer(8, 8, Ends()), layer(8, 3, Ends())],
        [layer(8, 8, steps), layer(8, 3, Ends())],
    ):
        with pytest.raises(Unpackable, match="not a network"):
            PackedNetwork.make(Variant.SPARSE, layers)
    large = [layer(3000, 64, scale), layer(64, 3, Ends())]
    fused = Fused(CPU, Variant.SPARSE, None)
    with pytest.raises(Unpackable, match="shared memory"):
        fused.pack_network(large)


# -- convolutions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvCase:
    """A convolution; `stored`: the channels of a stored pixel, if not as few as can be."""

    channels: int
    neurons: int
    window: PackedWindow
    groups: int = 1
    stored: int | None = None
    pad: int = 0
    images: int = 2


def window(
    height: int,
    width: int,
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
) -> PackedWindow:
    return PackedWindow(height, width, kernel, strides, pads, dilations)


CONVS = {
    "3x3": ConvCase(8, 16, window(6, 5, (3, 3), pads=(1, 1, 1, 1)), pad=7),
    "stride, one-sided pads": ConvCase(16, 24, window(9, 8, (3, 2), (2, 3), (0, 1, 2, 0)), pad=255),
    "dilation": ConvCase(8, 70, window(11, 12, (3, 3), (1, 2), (2, 0, 1, 3), (2, 3))),
    "1x1": ConvCase(40, 130, window(7, 3, (1, 1)), images=7),
    "one channel": ConvCase(1, 16, window(12, 12, (4, 4), (4, 4), (1, 1, 1, 1)), pad=5, images=3),
    "three channels": ConvCase(3, 20, window(9, 9, (5, 5), (2, 2), (2, 2, 2, 2)), pad=128),
    "three channels, stored as eight": ConvCase(
        3, 20, window(5, 6, (3, 3), pads=(1, 1, 1, 1)), stored=8, pad=1
    ),
    "six channels, stored as six": ConvCase(
        6, 5, window(5, 6, (2, 3), pads=(0, 1, 1, 0)), stored=6, pad=9
    ),
    "groups": ConvCase(32, 48, window(5, 5, (3, 3), pads=(1, 1, 1, 1)), groups=2, pad=3),
    "small groups": ConvCase(16, 32, window(5, 4, (3, 3), pads=(1, 0, 1, 1)), groups=8),
    "depthwise": ConvCase(24, 24, window(6, 6, (3, 3), (2, 2), (1, 1, 1, 1)), groups=24, pad=17),
    "depthwise, odd": ConvCase(5, 10, window(6, 5, (3, 3), pads=(1, 1, 1, 1)), groups=5, pad=2),
    "one row": ConvCase(8, 8, window(1, 30, (1, 7), (1, 2), (0, 3, 0, 3)), pad=1),
    "many images": ConvCase(2, 3, window(3, 3, (2, 2), pads=(1, 0, 0, 1)), images=50),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name: str, fused: Fused) -> None:
    """Against Conv of qverify.ops, on a type that begins at -100."""
    case, low = CONVS[name], -100
    rng = np.random.default_rng(len(name))
    view, per_group = case.window, case.channels // case.groups
    weight = rng.integers(-128, 128, (case.neurons, per_group, *view.kernel))
    bias = rng.integers(-2000, 2000, case.neurons)
    op = Conv(
        weight,
        bias,
        view.strides,
        view.pads,
        view.dilations,
        case.groups,
        case.pad + low,
        low,
        low + 255,
    )
    lower, upper = (
        end + low for end in box(rng, (case.images, 1, case.channels, view.height, view.width))
    )
    ends = [np.moveaxis(e[:, 0], 1, -1).astype(np.int64) for e in op.interval(CPU, (lower, upper))]
    width = case.stored or image_width(case.channels)
    first, second = (np.moveaxis(end[:, 0], 1, -1) - low for end in (lower, upper))
    x = interleave(CPU, first, second, width)
    x[..., case.channels :, :] = 201
    x = fused.kernels.asarray(x)
    ours = bias + low * weight.sum(axis=(1, 2, 3))
    reach = int(np.abs(ends).max())
    for epilogue in epilogues(rng, case.neurons, reach)[
        :: 1 if fused.kernels.name == "cuda" else 2
    ]:
        layer = fused.pack_conv(weight, ours, epilogue, view, case.groups, case.pad, width)
        assert same(fused, epilogue, fused.conv(layer, x), (ends[0], ends[1]))


def test_a_flattened_image_meets_a_dense_layer(fused: Fused) -> None:
    """`channels_last` puts the rows of a weight where the image keeps its codes."""
    rng = np.random.default_rng(2)
    weight, bias = rng.integers(-128, 128, (5 * 3 * 4, 6)), np.zeros(6, np.int64)
    lower, upper = box(rng, (4, 5, 3, 4))
    x = interleave(fused.kernels, np.moveaxis(lower, 1, -1), np.moveaxis(upper, 1, -1)).reshape(
        4, -1, 2
    )
    layer = fused.pack_dense(channels_last(weight, (5, 3, 4), 8), bias, Ends())
    ends = expected(weight, bias, lower.reshape(4, -1), upper.reshape(4, -1))
    assert same(fused, Ends(), fused.dense(layer, x), ends)


# -- what is refused -------------------------------------------------------------------------------

ONE = np.ones(1, np.float32)
REFUSED: dict[str, tuple[Any, Any, Epilogue]] = {
    "wide weights": (np.full((8, 1), 128), np.zeros(1, np.int64), Ends()),
    "sums outside int32": (np.full((8, 1), 127), np.full(1, 2**31 - 1), Ends()),
    "a bias outside int32": (np.zeros((8, 1), np.int64), np.full(1, -(2**40)), Ends()),
    "a negative multiplier": (
        np.ones((8, 1), np.int64),
        np.zeros(1, np.int64),
        PackedScale(-ONE, 0, 0, 255, 0),
    ),
    "a multiplier of zero": (
        np.ones((8, 1), np.int64),
        np.zeros(1, np.int64),
        PackedScale(0 * ONE, 0, 0, 255, 0),
    ),
    "an infinite multiplier": (
        np.ones((8, 1), np.int64),
        np.zeros(1, np.int64),
        PackedScale(np.inf * ONE, 0, 0, 255, 0),
    ),
    "too many codes": (
        np.ones((8, 1), np.int64),
        np.zeros(1, np.int64),
        PackedScale(ONE, 0, -1, 255, -1),
    ),
    "codes below the byte": (
        np.ones((8, 1), np.int64),
        np.zeros(1, np.int64),
        PackedScale(ONE, 0, -1, 200, 0),
    ),
    "an unsorted table": (
        np.ones((8, 1), np.int64),
        np.zeros(1, np.int64),
        Thresholds(np.array([[2, 1]], np.int32), np.zeros(1, np.int32)),
    ),
    "a large table": (
        np.ones((8, 1), np.int64),
        np.zeros(1, np.int64),
        Thresholds(np.zeros((1, 256), np.int32), np.zeros(1, np.int32)),
    ),
    "a row that is not there": (
        np.ones((8, 1), np.int64),
        np.zeros(1, np.int64),
        Thresholds(np.zeros((1, 2), np.int32), np.ones(1, np.int32)),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("variant", (Variant.PLAIN, Variant.SPARSE))
def test_refused_layers(name: str, variant: Variant) -> None:
    weight, bias, epilogue = REFUSED[name]
    with pytest.raises((Unpackable, ValueError)):
        PackedDense.make(variant, weight, bias, epilogue)
    with pytest.raises((Unpackable, ValueError)):
        PackedConv.make(variant, weight.T.reshape(1, 8, 1, 1), bias, epilogue, window(3, 3, (1, 1)))


def test_values_that_do_not_fit(fused: Fused) -> None:
    layer = fused.pack_dense(np.ones((8, 3), np.int64), np.zeros(3, np.int64), Ends())
    xp = fused.kernels.xp
    gaps = xp.zeros((2, 16, 2), dtype=xp.uint8)[:, :8]
    for x in (xp.zeros((2, 16, 2), dtype=xp.uint8), xp.zeros((2, 8, 2), dtype=xp.int8), gaps):
        with pytest.raises(ValueError, match="do not fit"):
            fused.dense(layer, x)
    other = Variant.PLAIN if fused.variant is not Variant.PLAIN else Variant.SPARSE
    with pytest.raises(ValueError, match="compiled for"):
        fused.dense(replace(layer, variant=other), xp.zeros((2, 8, 2), dtype=xp.uint8))


# -- the choice, and planted bugs ------------------------------------------------------------------


def planted(variant: Variant, old: str, new: str) -> Fused:
    """The kernels with one text replaced; only those of thin tiles, where the fault shows there."""
    text = source()
    assert text.count(old) == 1, f"{old!r} is not in the source once"
    small = variant is not Variant.PLAIN and text.index(old) < text.index(
        "// ---- a whole small network"
    )
    return Fused(CPU, variant, Module(variant, text.replace(old, new), only_thin=small))


def agrees(fused: Fused, network: bool = False) -> bool:
    """Whether a thin dense layer and a thin convolution, both of several stages, come out right; or
    a network."""
    from qverify.kernels import fused as module

    rng = np.random.default_rng(3)
    agree: tuple[Callable[[], bool], ...] = (
        lambda: module._dense_agrees(fused, rng, 140, 330, 14),
        lambda: module._conv_agrees(fused, rng, 16, 14),
        lambda: module._conv_agrees(fused, rng, 1, 14),
    )
    if network:
        return module._network_agrees(fused, rng, 70, 50, 20)
    return all(check() for check in agree)


BUGS = {
    "no barrier between stages": (
        Variant.SPARSE,
        "__syncthreads();  // stage k is here, slot `next` is free",
        "",
    ),
    "no barrier before the pipeline's memory is reused": (
        Variant.SPARSE,
        "__syncthreads();  // every warp is done with the pipeline: its memory is free",
        "",
    ),
    "no barrier before the output tile is read": (
        Variant.SPARSE,
        "__syncthreads();  // the tile is complete",
        "",
    ),
    "no barrier before a slice is read": (
        Variant.SPARSE,
        "__syncthreads();  // the slice is complete",
        "",
    ),
    "no barrier before a slice is written": (
        Variant.SPARSE,
        "__syncthreads();  // the slice is free",
        "",
    ),
    "no barrier after the windows": (
        Variant.SPARSE,
        "__syncthreads();  // the windows are known",
        "",
    ),
    "a copy not waited for": (
        Variant.SPARSE,
        "copy_wait<STAGES - 2>();",
        "copy_wait<STAGES - 1>();",
    ),
    "a neighbour's metadata": (
        Variant.SPARSE,
        "(record + 512 + lane * 4)",
        "(record + 512 + (lane ^ 1) * 4)",
    ),
    "one index not turned": (Variant.SPARSE, "w.indices ^ 0x55555555u", "w.indices ^ 0x55455555u"),
    "no meeting between layers": (Variant.SPARSE, "__syncwarp();  // the codes are here", ""),
    "upper accumulates lower": (Variant.DENSE, "__byte_perm(pairs, 0, 0x2301)", "pairs"),
    "lower and upper swapped": (
        Variant.PLAIN,
        "return scaled(e, lower, multiplier) | scaled(e, upper, multiplier) << 8;",
        "return scaled(e, upper, multiplier) | scaled(e, lower, multiplier) << 8;",
    ),
    "halves rounded up": (
        Variant.PLAIN,
        "__float2int_rn(fminf(fmaxf(v, e.least), e.most))",
        "(int)floorf(fminf(fmaxf(v, e.least), e.most) + 0.5f)",
    ),
    "a threshold that does not count itself": (
        Variant.PLAIN,
        "sorted[next - 1] <= acc",
        "sorted[next - 1] < acc",
    ),
    "padding read from the image": (Variant.PLAIN, "widen(lower, upper, *weight, fill, fill);", ""),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name: str) -> None:
    variant, old, new = BUGS[name]
    fused = planted(variant, old, new)
    with contextlib.suppress(ShimError):  # the shim itself has seen it
        assert not agrees(fused, network="codes are here" in old)


def test_thin_layers_are_right_without_a_bug() -> None:
    for variant in (Variant.PLAIN, Variant.SPARSE):
        assert agrees(Fused(CPU, variant, Module(variant)))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("if (threadIdx.x < 40) __syncthreads();", "never come"),
        (
            "if (threadIdx.x != 3) __syncwarp(); else mma_small(slot, next, 0, 0);",
            "different instructions",
        ),
        ("*(uint4*)(tile.memory + T::PIPELINE + 4096) = uint4();", "past the shared memory"),
        ("copy_async<16>(tile.memory, &slot);", "aligned|outside the kernel's arrays"),
        ("copy_async<16>(tile.memory + 8, tile.memory);", "not aligned"),
    ],
)
def test_the_shim_is_strict(new: str, message: str) -> None:
    fused = planted(Variant.DENSE, "__syncthreads();  // stage k is here, slot `next` is free", new)
    with pytest.raises(ShimError, match=message):
        agrees(fused)


def test_the_choice_drops_what_differs_in_a_bit() -> None:
    wrong = planted(*BUGS["halves rounded up"])
    right = Module(Variant.DENSE)
    assert choose(CPU, {Variant.PLAIN: wrong.module, Variant.DENSE: right}).variant is Variant.DENSE
    with pytest.raises(DeviceError):
        choose(CPU, {Variant.PLAIN: wrong.module})


@pytest.mark.parametrize("variant", Variant)
def test_the_comparison_reaches_every_kernel(variant: Variant) -> None:
    fused = Fused(CPU, variant, Module(variant, seeds=(3,)))
    assert is_exact(fused)
    kernels = set(
        re.findall(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s+(\w+)', source())
    )
    assert set(fused._functions) == {
        k for k in kernels if k.endswith("_plain") == (variant is Variant.PLAIN)
    }


def test_the_choice_takes_the_fastest() -> None:
    chosen = choose(
        CPU, {v: Module(v, seeds=(2,)) for v in (Variant.SPARSE, Variant.DENSE)}, (64, 64, 64)
    )
    assert chosen.variant in (Variant.SPARSE, Variant.DENSE) and is_exact(chosen)


class FakeDevice(StrictModule):
    """NumPy in the role of CuPy (see strict.py) on a device of compute capability 8.0, which is the
    shim."""

    class CompileError(Exception):
        """Stands for cupy.cuda.compiler.CompileException."""

    cuda = types.SimpleNamespace(
        Device=lambda: types.SimpleNamespace(
            compute_capability="80",
            attributes={"MaxSharedMemoryPerBlockOptin": 166912, "MultiProcessorCount": 2},
        ),
        compiler=types.SimpleNamespace(CompileException=CompileError),
    )

    @staticmethod
    def RawModule(code: str, options: tuple[str, ...]) -> Any:
        """Refuses one variant, as an old compiler would."""
        variant = Variant(int(options[0].removeprefix("-DVARIANT=")))
        if variant is Variant.SMALL:
            return types.SimpleNamespace(compile=FakeDevice.fail)
        return Module(variant, code, seeds=(2,))

    @staticmethod
    def fail() -> None:
        raise FakeDevice.CompileError


def test_opening_a_device_compiles_compares_and_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that mixes host and device arrays as little as CuPy does."""
    tried: dict[Variant, int] = {}
    monkeypatch.setattr(
        "qverify.kernels.fused._seconds",
        lambda fused, _: tried.setdefault(fused.variant, -fused.variant),
    )
    chosen = open_fused(replace(open_strict(), xp=FakeDevice()))
    assert chosen.variant is Variant.DENSE and set(tried) == {
        Variant.PLAIN,
        Variant.SPARSE,
        Variant.DENSE,
    }


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.filterwarnings("ignore")  # CuPy warns where it finds no CUDA
def test_cupy_has_what_is_asked_of_it() -> None:
    import cupy
    import cupy.cuda.compiler

    assert issubclass(cupy.cuda.compiler.CompileException, Exception)
    assert callable(cupy.RawModule.compile) and callable(cupy.RawModule.get_function)
    assert hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes")
    assert hasattr(cupy.cuda.Device, "compute_capability") and hasattr(
        cupy.cuda.Device, "attributes"
    )


@pytest.mark.gpu
def test_the_choice_on_a_gpu() -> None:
    assert is_exact(open_fused(gpu()))
