"""Exact integer bounds of one layer in one launch: geometry and choice of the CUDA kernels of
`interval.cu`.

    fused = open_fused(kernels)  # compiles, compares, chooses; once per device
    layer = fused.pack_dense(weight, bias, PackedScale(multiplier, zero_point, low, high, low))
    pairs = fused.dense(layer, interleave(kernels, lower - low, upper - low))

That a compiled kernel computes what it should is not taken from the name of a device: `choose`
compares every variant with NumPy on the device itself, on layers of every pattern of signs and of
extreme values, and drops one that differs in a single bit.

Kernels are launched through a module as `cupy.RawModule` is one: `get_function(name)` gives a
callable that takes (grid, block, arguments, shared_mem=bytes). The tests' module runs the same
source on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from time import perf_counter
from typing import Any

import numpy as np

from qverify.errors import DeviceError
from qverify.kernels import Array, Kernels
from qverify.kernels.packing import (
    RECORD,
    TILES,
    Ends,
    Epilogue,
    Ints,
    PackedConv,
    PackedDense,
    PackedEpilogue,
    PackedNetwork,
    PackedScale,
    PackedWindow,
    Thresholds,
    Unpackable,
    Variant,
    moved,
    rounded,
)

Bounds = tuple[Array, Array]
# The least compute capability of a device that a variant compiles for.
CAPABILITY = {
    Variant.PLAIN: 50,
    Variant.SPARSE: 80,
    Variant.DENSE: 80,
    Variant.SMALL: 75,
}
STAGES = {Variant.SPARSE: 3, Variant.DENSE: 3, Variant.SMALL: 2}
NETWORKS = {64: (384, 16), 128: (256, 8)}  # by size: threads of a block, rows of a warp
STATIC = 48 * 1024  # more shared memory than this has to be asked for


def source() -> str:
    """The CUDA source. It includes nothing."""
    return files("qverify.kernels").joinpath("interval.cu").read_text(encoding="utf-8")


def options(variant: Variant) -> tuple[str, ...]:
    """The compiler's options; without `--fmad=false` it might fuse a product with a sum."""
    return (f"-DVARIANT={int(variant)}", "-std=c++17", "--fmad=false")


# -- values ----------------------------------------------------------------------------------------


def interleave(kernels: Kernels, lower: Array, upper: Array, width: int | None = None) -> Array:
    """Ends [N, ..., C], integers in [0, 255], as pairs uint8 [N, ..., width, 2]; spare codes are
    zero."""
    xp, count = kernels.xp, lower.shape[-1]
    pairs = xp.zeros(
        (*lower.shape[:-1], rounded(count, 8) if width is None else width, 2), dtype=xp.uint8
    )
    pairs[..., :count, 0] = kernels.asarray(lower)
    pairs[..., :count, 1] = kernels.asarray(upper)
    return pairs


def separate(kernels: Kernels, pairs: Array, count: int) -> Bounds:
    """The first `count` codes of pairs uint8 [N, ..., width, 2] as int32 (lower, upper) [N, ...,
    count]."""
    lower, upper = (pairs[..., :count, end].astype(kernels.xp.int32) for end in (0, 1))
    return lower, upper


def channels_last(weight: Ints, shape: tuple[int, int, int], width: int) -> Ints:
    """The rows of a dense weight [C * H * W, M], which follow a flattened [C, H, W], in the order
    of a flattened [H, W, width]; rows of spare channels are zero."""
    channels, height, breadth = shape
    result = np.zeros((height, breadth, width, weight.shape[-1]), weight.dtype)
    result[:, :, :channels] = weight.reshape(channels, height, breadth, -1).transpose(1, 2, 0, 3)
    return result.reshape(-1, weight.shape[-1])


# -- launches --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Fused:
    """One variant's compiled kernels on one machine."""

    kernels: Kernels
    variant: Variant
    module: Any
    # Functions of the module by name, with the bytes of shared memory that they were granted.
    _functions: dict[str, tuple[Any, int]] = field(default_factory=dict, repr=False)
    # Attributes of the device that were asked for.
    _limits: dict[str, int] = field(default_factory=dict, repr=False)

    def pack_dense(
        self,
        weight: Ints,
        bias: Ints,
        epilogue: Epilogue,
        width: int | None = None,
        tile: str | None = None,
    ) -> PackedDense:
        """See `PackedDense.make`; on this machine."""
        return moved(
            PackedDense.make(self.variant, weight, bias, epilogue, width, tile), self.kernels
        )

    def pack_conv(
        self,
        weight: Ints,
        bias: Ints,
        epilogue: Epilogue,
        window: PackedWindow,
        groups: int = 1,
        pad: int = 0,
        width: int | None = None,
    ) -> PackedConv:
        """See `PackedConv.make`; on this machine."""
        return moved(
            PackedConv.make(self.variant, weight, bias, epilogue, window, groups, pad, width),
            self.kernels,
        )

    def pack_network(
        self, layers: Sequence[tuple[Ints, Ints, Epilogue]], width: int | None = None
    ) -> PackedNetwork:
        """See `PackedNetwork.make`; on this machine. Raises Unpackable if its shared memory cannot
        hold the weights."""
        packed = PackedNetwork.make(self.variant, layers, width)
        most = self._limit("MaxSharedMemoryPerBlockOptin", 99 * 1024)
        if self.variant is not Variant.PLAIN and _shared_of(packed) > most:
            raise Unpackable(
                f"the network needs {_shared_of(packed)} bytes of shared memory, more than {most}"
            )
        return moved(packed, self.kernels)

    def _limit(self, name: str, otherwise: int) -> int:
        """An attribute of the device; on a CPU, that of a common one."""
        if name not in self._limits:
            self._limits[name] = self.kernels.device_limit(name, otherwise)
        return self._limits[name]

    def network(self, packed: PackedNetwork, x: Array) -> Any:
        """Pairs `x` [N, width, 2] -> what the last layer gives, as from `dense`."""
        rows = self._expect(packed, x, (packed.width, 2))
        if self.variant is Variant.PLAIN:
            for layer in packed.chain:
                x = self.dense(layer, x)
            return x
        result = self._results(packed.kind, packed.neurons, (rows,))
        first, second = result if packed.kind == 0 else (result, packed.bias)
        numbers = (
            packed.kind,
            len(packed.layers),
            packed.records.size,
            rows,
            2 * packed.width,
            packed.neurons,
        )
        arrays = (packed.records, packed.layers, packed.bias, packed.multiplier, x, first, second)
        threads, per_warp = NETWORKS[packed.size]
        per_block = threads // 32 * per_warp
        blocks = min(
            rounded(rows, per_block) // per_block,
            (1 if threads == 384 else 2) * self._limit("MultiProcessorCount", 1),
        )
        values = (*numbers, 2 * packed.width_out, packed.between)
        self._run(
            f"network_{packed.size}",
            (blocks, 1),
            threads,
            _shared_of(packed),
            (*arrays, *map(_int, values)),
        )
        return result

    def dense(self, layer: PackedDense, x: Array) -> Any:
        """Pairs `x` [N, width, 2] -> pairs [N, width_out, 2], or with `Ends` int32 (lower, upper)
        [N, M]."""
        rows = self._expect(layer, x, (layer.width, 2))
        result = self._results(layer.epilogue.kind, layer.epilogue.neurons, (rows,))
        end, pitch = layer.epilogue, 2 * layer.width
        extra: tuple[Any, ...] = (x, layer.weights, _int(rows), _int(pitch))
        if self.variant is Variant.PLAIN:
            self._launch_plain("dense_plain", end, result, rows, (*extra, _int(layer.inputs)))
            return result
        tiles = rounded(end.neurons, TILES[layer.tile][0]) // TILES[layer.tile][0]
        extra = (*extra, _int(rounded(layer.inputs, 32) // 32), _int(tiles))
        self._launch(f"dense_{layer.tile}", layer, result, rows, (tiles, 1), 0, extra)
        return result

    def conv(self, layer: PackedConv, x: Array) -> Any:
        """Pairs `x` [N, H, W, width, 2] -> pairs [N, OH, OW, width_out, 2], or with `Ends` int32
        (lower, upper) [N, OH, OW, M]."""
        window, end = layer.window, layer.epilogue
        images = self._expect(layer, x, (window.height, window.width, layer.width, 2))
        out_height, out_width = window.output
        rows = images * out_height * out_width
        result = self._results(end.kind, end.neurons, (images, out_height, out_width))
        shape = (
            window.height,
            window.width,
            out_height,
            out_width,
            *window.strides,
            *window.pads[:2],
            2 * layer.width,
        )
        place = (_int(rows), *map(_int, shape))
        if self.variant is Variant.PLAIN:
            more = (*window.kernel, *window.dilations, layer.channels, layer.groups, layer.pad)
            self._launch_plain(
                "conv_plain", end, result, rows, (x, layer.weights, *place, *map(_int, more))
            )
            return result
        tiles = rounded(end.neurons // layer.groups, TILES[layer.tile][0]) // TILES[layer.tile][0]
        blocks = rounded(window.kernel[0] * window.kernel[1] * layer.channels, 32) // 32
        rest = (blocks, tiles, layer.groups, 2 * layer.channels)
        extra = (x, layer.weights, layer.taps, layer.fill, *place, *map(_int, rest))
        name = f"conv_{layer.tile}" if layer.piece == 16 else f"conv_few_{layer.tile}"
        self._launch(
            name, layer, result, rows, (tiles, layer.groups), 16 * TILES[layer.tile][1], extra
        )
        return result

    def _expect(
        self, layer: PackedDense | PackedConv | PackedNetwork, x: Array, shape: tuple[int, ...]
    ) -> int:
        """The length of the batch; raises ValueError for a value that the layer was not packed
        for."""
        if layer.variant is not self.variant:
            raise ValueError(
                f"a layer packed for {layer.variant.name} meets kernels compiled for "
                f"{self.variant.name}"
            )
        if x.dtype != self.kernels.xp.uint8 or tuple(x.shape[1:]) != shape or not _is_contiguous(x):
            raise ValueError(
                f"{x.dtype} pairs {list(x.shape)} do not fit a layer for {['N', *shape]}"
            )
        return int(x.shape[0])

    def _results(self, kind: int, neurons: int, shape: tuple[int, ...]) -> Any:
        xp = self.kernels.xp
        if kind == 0:
            return xp.empty((*shape, neurons), dtype=xp.int32), xp.empty(
                (*shape, neurons), dtype=xp.int32
            )
        return xp.empty((*shape, rounded(neurons, 8), 2), dtype=xp.uint8)

    def _arguments(self, end: PackedEpilogue, result: Any) -> tuple[Any, ...]:
        """EPILOGUE_PARAMETERS of the source."""
        first, second = result if end.kind == 0 else (result, end.threshold_row)
        return (
            *(end.bias, end.multiplier, end.thresholds, end.threshold_row, first, second),
            *(_int(end.kind), _int(end.count), np.float32(end.least), np.float32(end.most)),
            *(_int(end.offset), _int(end.neurons), _int(2 * rounded(end.neurons, 8))),
        )

    def _launch_plain(
        self, name: str, end: PackedEpilogue, result: Any, rows: int, extra: tuple[Any, ...]
    ) -> None:
        columns = end.neurons if end.kind == 0 else rounded(end.neurons, 8)
        self._run(
            name,
            (rounded(rows * columns, 256) // 256, 1),
            256,
            0,
            (*self._arguments(end, result), *extra),
        )

    def _launch(
        self,
        name: str,
        layer: PackedDense | PackedConv,
        result: Any,
        rows: int,
        tiles: tuple[int, int],
        beside: int,
        extra: tuple[Any, ...],
    ) -> None:
        """One block per tile of neurons (`tiles`: of a group, groups) and of rows; `beside`: bytes
        after the pipeline."""
        neurons, height, threads = TILES[layer.tile]
        grid = (tiles[0] * (rounded(rows, height) // height), tiles[1])
        stage = neurons // 16 * 2 * RECORD[self.variant] + height * 128
        shared = STAGES[self.variant] * stage + beside
        self._run(name, grid, threads, shared, (*self._arguments(layer.epilogue, result), *extra))

    def _run(
        self,
        name: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: tuple[Any, ...],
    ) -> None:
        if grid[0] == 0:
            return  # an empty batch
        function, granted = self._functions.get(name) or (self.module.get_function(name), STATIC)
        if shared > granted:
            function.max_dynamic_shared_size_bytes = granted = shared
        self._functions[name] = function, granted
        function(grid, (threads,), arguments, shared_mem=shared)


def _is_contiguous(x: Array) -> bool:
    """Whether bytes `x` lie in memory in the order of their indices, without gaps."""
    step = 1
    for size, stride in zip(reversed(x.shape), reversed(x.strides), strict=True):
        if size > 1 and stride != step and x.size:
            return False
        step *= size
    return True


def _shared_of(packed: PackedNetwork) -> int:
    """Bytes of shared memory: the weights, and every warp's rows between layers."""
    threads, per_warp = NETWORKS[packed.size]
    return int(packed.records.size) + threads // 32 * per_warp * packed.between


def _int(value: int) -> np.int32:
    if not -(2**31) <= value < 2**31 - 256:
        raise DeviceError(f"{value} does not fit a kernel's int32 parameter: use smaller batches")
    return np.int32(value)


# -- which variant ---------------------------------------------------------------------------------


def open_fused(kernels: Kernels) -> Fused:
    """The fastest exact variant on the current CUDA device. Raises DeviceError where none is
    exact."""
    library, modules = kernels.xp, {}
    capability = int(library.cuda.Device().compute_capability)
    for variant in Variant:
        if CAPABILITY[variant] <= capability:
            module = library.RawModule(code=source(), options=options(variant))
            with suppress(
                library.cuda.compiler.CompileException
            ):  # an older compiler: the other variants remain
                module.compile()
                modules[variant] = module
    return choose(kernels, modules)


def choose(
    kernels: Kernels, modules: Mapping[Variant, Any], size: tuple[int, int, int] = (16384, 512, 512)
) -> Fused:
    """Of the variants that compute exactly what NumPy does, the fastest on a layer of `size` (rows,
    inputs, neurons).

    Raises DeviceError if none is exact. Layers: every pattern of signs within four neighbouring
    weights, extreme weights and codes, ragged sizes, all epilogues, a convolution with padding.
    """
    exact = [Fused(kernels, variant, module) for variant, module in modules.items()]
    exact = [fused for fused in exact if is_exact(fused)]
    if not exact:
        raise DeviceError("no CUDA kernel computes exact bounds on this device: use --device cpu")
    return min(exact, key=lambda fused: _seconds(fused, size)) if len(exact) > 1 else exact[0]


def is_exact(fused: Fused) -> bool:
    """Whether layers that reach every kernel of the variant come out bit for bit as NumPy computes
    them. A launch that fails counts as wrong (CuPy's driver errors are RuntimeErrors)."""
    try:
        return all(agrees() for agrees in comparisons(fused).values())
    except RuntimeError:
        return False


def comparisons(fused: Fused) -> dict[str, Callable[[], bool]]:
    """By name, what `is_exact` compares."""
    rng = np.random.default_rng(20)
    found: dict[str, Callable[[], bool]] = {}
    for dense in ((70, 300, 126), (131, 45, 64), (9, 64, 10)):
        found[f"dense {dense}"] = partial(_dense_agrees, fused, rng, *dense)
    for conv in ((1, 20), (1, 12), (16, 100), (16, 20), (8, 12)):
        found[f"conv {conv}"] = partial(_conv_agrees, fused, rng, *conv)
    for network in ((70, 50, 20), (33, 128, 9)):
        found[f"network {network}"] = partial(_network_agrees, fused, rng, *network)
    return found


def _trial(
    rng: np.random.Generator, inputs: int, neurons: int
) -> tuple[Ints, Ints, tuple[Epilogue, ...]]:
    """A layer [inputs, neurons] whose columns go through all sign patterns of four weights, and
    through extremes."""
    weight = rng.integers(0, 128, (inputs, neurons))
    signs = np.arange(neurons)[None, :] >> (np.arange(inputs)[:, None] % 4) & 1
    weight = np.where(signs == 1, ~weight, weight)
    weight[:, neurons // 2 :: 3] = np.where(signs == 1, -128, 127)[:, neurons // 2 :: 3]
    weight[:, neurons // 2 + 1 :: 3] = rng.integers(
        -128, 128, weight[:, neurons // 2 + 1 :: 3].shape
    )
    bias = rng.integers(-(2**20), 2**20, neurons)
    reach = float(np.abs(weight).sum(axis=0).max() * 255)
    multiplier = (rng.uniform(0.2, 4.0, neurons) * 255 / reach).astype(np.float32)
    # Every fourth column has many halves to round: (x - y + 60) / 2 for two inputs x and y.
    weight[:, 3::4] = 0
    weight[:2, 3::4] = [[1], [-1]]
    bias[3::4], multiplier[3::4] = 60, 0.5
    table = np.sort(rng.integers(-int(reach), int(reach), (3, 200)), axis=1).astype(np.int32)
    table[0] = np.arange(-40, 160)  # met exactly by the small sums
    row = np.where(np.arange(neurons) % 4 == 3, 0, rng.integers(0, 3, neurons)).astype(np.int32)
    epilogues = (
        Ends(),
        PackedScale(multiplier, 7, 0, 255, 0),
        PackedScale(multiplier, -3, -128, 100, -128),
        Thresholds(table, row),
    )
    return weight, bias, epilogues


def _box(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Ints, Ints]:
    """Ends of boxes: random, points, and whole ranges."""
    ends = np.sort(rng.integers(0, 256, (2, *shape)), axis=0)
    ends[1, ::3] = ends[0, ::3]
    ends[0, 1::5], ends[1, 1::5] = 0, 255
    return ends[0], ends[1]


def expected(weight: Ints, bias: Ints, lower: Ints, upper: Ints) -> tuple[Ints, Ints]:
    """int64 reference: ends of the accumulators of `weight` [K, M] for rows [N, K]."""
    positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
    return lower @ positive + upper @ negative + bias, upper @ positive + lower @ negative + bias


def coded(epilogue: Epilogue, accumulator: Ints) -> Ints:
    """Reference of an epilogue on accumulators [..., M]: bytes, as int64."""
    match epilogue:
        case PackedScale(multiplier, zero_point, low, high, out_low):
            with np.errstate(over="ignore"):  # an infinity is clipped
                v = accumulator.astype(np.int32).astype(np.float32) * multiplier
            v = np.minimum(
                np.maximum(v, np.float32(low - zero_point)), np.float32(high - zero_point)
            )
            codes: Ints = np.rint(v).astype(np.int64) + (zero_point - out_low)
            return codes
        case Thresholds(table, row):
            columns = [
                np.searchsorted(table[r], accumulator[..., m], side="right")
                for m, r in enumerate(row)
            ]
            return np.stack(columns, axis=-1).astype(np.int64)
        case Ends():
            return accumulator.astype(np.int64)


def same(fused: Fused, epilogue: Epilogue, result: Any, ends: tuple[Ints, Ints]) -> bool:
    """Whether a launch's result is what the reference accumulators `ends` [..., M] become."""
    if not isinstance(epilogue, Ends):
        result = separate(fused.kernels, result, ends[0].shape[-1])
    return all(
        np.array_equal(fused.kernels.to_host(ours), coded(epilogue, theirs))
        for ours, theirs in zip(result, ends, strict=True)
    )


def _dense_agrees(
    fused: Fused, rng: np.random.Generator, rows: int, inputs: int, neurons: int
) -> bool:
    kernels = fused.kernels
    weight, bias, epilogues = _trial(rng, inputs, neurons)
    lower, upper = _box(rng, (rows, inputs))
    ends = expected(weight, bias, lower, upper)
    x = interleave(kernels, lower, upper)
    return all(
        same(fused, e, fused.dense(fused.pack_dense(weight, bias, e), x), ends) for e in epilogues
    )


def _conv_agrees(fused: Fused, rng: np.random.Generator, channels: int, neurons: int) -> bool:
    """3 x 3, stride 2, padding 1 with the byte 9, on images of 6 x 7."""
    kernels, width = fused.kernels, 2 if channels == 1 else channels
    weight, bias, epilogues = _trial(rng, 9 * channels, neurons)
    window = PackedWindow(6, 7, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1))
    box = _box(rng, (5, 6, 7, channels))
    columns = [_columns(end, window, 9) for end in box]
    ends = expected(weight, bias, *columns)
    filters = weight.reshape(3, 3, channels, neurons).transpose(3, 2, 0, 1)
    x = interleave(kernels, *box, width)
    layers = [(e, fused.pack_conv(filters, bias, e, window, pad=9, width=width)) for e in epilogues]
    return all(same(fused, e, fused.conv(layer, x), ends) for e, layer in layers)


def _network_agrees(
    fused: Fused, rng: np.random.Generator, inputs: int, middle: int, neurons: int
) -> bool:
    """Two layers in one kernel, on more boxes than a block holds."""
    weight, bias, epilogues = _trial(rng, inputs, middle)
    lower, upper = _box(rng, (250, inputs))
    codes = [coded(epilogues[1], end) for end in expected(weight, bias, lower, upper)]
    first = (weight, bias, epilogues[1])
    weight, bias, epilogues = _trial(rng, middle, neurons)
    ends = expected(weight, bias, *codes)
    x = interleave(fused.kernels, lower, upper)
    packed = [(e, fused.pack_network([first, (weight, bias, e)])) for e in epilogues[:3]]
    return all(same(fused, e, fused.network(p, x), ends) for e, p in packed)


def _columns(x: Ints, window: PackedWindow, pad: int) -> Ints:
    """im2col of [N, H, W, C] without dilation: [N, OH, OW, KH * KW * C]."""
    top, left, bottom, right = window.pads
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=pad)
    (height, width), (sy, sx) = window.output, window.strides
    taps = [
        x[:, ky:, kx:][:, ::sy, ::sx][:, :height, :width] for ky, kx in np.ndindex(*window.kernel)
    ]
    columns: Ints = np.concatenate(taps, axis=-1)
    return columns


def _seconds(fused: Fused, size: tuple[int, int, int]) -> float:
    """The time of a dense layer with a fused requantization; the least of three runs after one."""
    kernels, (rows, inputs, neurons) = fused.kernels, size
    rng = np.random.default_rng(0)
    weight, bias, epilogues = _trial(rng, inputs, neurons)
    layer = fused.pack_dense(weight, bias, epilogues[1])
    lower, upper = (np.resize(end, (rows, inputs)) for end in _box(rng, (min(rows, 512), inputs)))
    x = interleave(kernels, lower, upper)
    times = []
    for _ in range(4):
        start = perf_counter()
        kernels.to_host(fused.dense(layer, x)[-1:])  # the copy waits for the kernel
        times.append(perf_counter() - start)
    return min(times[1:])
