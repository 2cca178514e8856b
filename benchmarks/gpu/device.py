"""What the device is and what it can do: its versions, which kernels are exact on it, its bandwidth
and its int8 rates.

`peak` below is the benchmark's own kernel: every warp repeats one tensor core instruction on eight
accumulators, with operands that are not zero. Rates count multiplications that matter, as a layer
does: 16 x 8 x 32 of an `mma.m16n8k32`, and as many of an `mma.sp.m16n8k64`, half of whose 64
columns are zeros by construction.
"""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from qverify.errors import DeviceError
from qverify.kernels import Kernels
from qverify.kernels.fused import CAPABILITY, Fused, _seconds, comparisons, options, source
from qverify.kernels.packing import Variant
from qverify.propagate import device

Emit = Callable[[dict[str, Any]], None]

PEAK = """
#if KIND == 1
#define STEP(d)                                                                                                       \\
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, "               \\
                 "{%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"                                           \\
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                                     \\
                 : "r"(a), "r"(a ^ 1), "r"(a ^ 2), "r"(a ^ 3), "r"(b), "r"(b ^ 1), "r"(b ^ 2), "r"(b ^ 3),            \\
                   "r"(0x44444444))
#elif KIND == 2
#define STEP(d)                                                                                                       \\
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "            \\
                 "{%0,%1,%2,%3};"                                                                                     \\
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                                     \\
                 : "r"(a), "r"(a ^ 1), "r"(a ^ 2), "r"(a ^ 3), "r"(b), "r"(b ^ 1))
#else
#define STEP(d)                                                                                                       \\
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"                       \\
                 : "+r"(d[0]), "+r"(d[1])                                                                             \\
                 : "r"(a), "r"(b))
#endif
extern "C" __global__ void __launch_bounds__(256) peak(int *out, int rounds, unsigned seed) {
    const unsigned a = seed * (threadIdx.x + 1u), b = seed ^ (a << 7) ^ (a >> 5);
    int d[8][4] = {};
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int k = 0; k < 8; ++k) STEP(d[k]);
    }
    int sum = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += d[k][0] + d[k][1] + d[k][2] + d[k][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
"""
MACS = {1: 16 * 8 * 32, 2: 16 * 8 * 32, 3: 8 * 8 * 16}  # per instruction of a warp
KINDS = {1: "mma_sparse", 2: "mma_dense", 3: "mma_small"}
SINCE = {1: 80, 2: 80, 3: 75}


def peak_options(kind: int) -> tuple[str, ...]:
    """The compiler's."""
    return (f"-DKIND={kind}", "-std=c++17")


class Clock:
    """Times of work on one machine: medians over repeats, after a warm-up; by CUDA's events on a
    GPU."""

    def __init__(self, kernels: Kernels, seconds: float = 0.3) -> None:
        self._cuda = None if kernels.is_host else kernels.xp.cuda
        self._seconds = seconds  # about so long may one measurement take

    def once(self, task: Callable[[], Any], inner: int = 1) -> float:
        """Seconds of a call, the mean of `inner` in a row; the device has finished when the clock
        stops."""
        if self._cuda is None:
            start = time.perf_counter()
            for _ in range(inner):
                task()
            return (time.perf_counter() - start) / inner
        begin, end = self._cuda.Event(), self._cuda.Event()
        begin.record()
        for _ in range(inner):
            task()
        end.record()
        end.synchronize()
        return float(self._cuda.get_elapsed_time(begin, end)) / 1000 / inner

    def median(self, task: Callable[[], Any]) -> float:
        """Seconds of a call: the median of at least three groups of calls, each of some
        milliseconds where calls are short, so that launches overlap with work as they do in a
        search."""
        self.once(task)
        guess = max(self.once(task), 1e-7)
        inner = int(np.clip(0.003 / guess, 1, 100))
        groups = int(np.clip(self._seconds / (guess * inner), 3, 25))
        return statistics.median(self.once(task, inner) for _ in range(groups))


def versions() -> dict[str, str]:
    """Of Python and what else matters."""
    found = {"python": platform.python_version()}
    for name in ("numpy", "onnx", "onnxruntime", "cupy-cuda12x", "cupy-cuda13x", "qverify"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(kernels: Kernels, what: str, emit: Emit, timed: bool = True) -> None:
    """The machine; or, on a GPU, one variant of the kernels; or, "chosen", which of them qverify
    takes."""
    if what == "chosen":
        try:
            emit({"chosen": device.opened(kernels).variant.name})
        except DeviceError as error:
            emit({"chosen": "", "chosen_why": str(error)})
        return
    if what:
        variant = Variant[what]
        if CAPABILITY[variant] <= int(kernels.xp.cuda.Device().compute_capability):
            emit({"variants": {what: examined(kernels, variant, timed)}})
        return
    emit(
        {
            "device": kernels.description,
            "versions": versions(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
        }
    )
    if kernels.is_host:
        return
    cuda = kernels.xp.cuda
    properties = cuda.runtime.getDeviceProperties(cuda.Device().id)
    emit(
        {
            "name": properties["name"].decode(),
            "capability": cuda.Device().compute_capability,
            "multiprocessors": int(properties["multiProcessorCount"]),
            "memory_bytes": int(properties["totalGlobalMem"]),
            "free_bytes": kernels.allowance(1 << 60, 1.0),
            "driver": cuda.runtime.driverGetVersion(),
            "runtime": cuda.runtime.runtimeGetVersion(),
        }
    )


def examined(kernels: Kernels, variant: Variant, timed: bool) -> dict[str, Any]:
    """Seconds of compiling, whether all test layers come out exactly, microseconds of a layer of
    16384 x 512 x 512."""
    row: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        module = kernels.xp.RawModule(code=source(), options=options(variant))
        module.compile()
        row["compile_s"] = round(time.perf_counter() - start, 2)
        fused = Fused(kernels, variant, module)
        wrong = {
            name: text for name, check in comparisons(fused).items() if (text := _outcome(check))
        }
        row |= {"exact": not wrong, "wrong": wrong} if wrong else {"exact": True}
        if timed:
            row["layer_us"] = round(1e6 * _seconds(fused, (16384, 512, 512)), 1)
    except Exception as error:  # whatever a first run on a new device brings is a result
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    return row


def _outcome(check: Callable[[], bool]) -> str:
    """Nothing if a comparison holds, else what came of it."""
    try:
        return "" if check() else "differs"
    except RuntimeError as error:  # CuPy's driver errors
        return f"{type(error).__name__}: {error}"[:300]


def ceilings(kernels: Kernels, quick: bool, emit: Emit) -> None:
    """Rows of what the device reaches: bytes copied per second (read and written), and
    multiplications per second."""
    xp, clock = kernels.xp, Clock(kernels, 0.05 if quick else 0.5)
    size = 1 << (20 if quick else 30)
    there, here = xp.ones(size, dtype=xp.uint8), xp.empty(size, dtype=xp.uint8)

    def copy() -> None:
        here[...] = there

    emit({"row": {"what": "copy", "unit": "bytes/s", "rate": 2 * size / clock.median(copy)}})
    if kernels.is_host:
        return
    capability, count = int(xp.cuda.Device().compute_capability), 64 if quick else 20_000
    blocks = 8 * int(xp.cuda.Device().attributes["MultiProcessorCount"])
    out = xp.empty(blocks * 256, dtype=xp.int32)
    for kind, name in KINDS.items():
        if capability < SINCE[kind] or (kind == 3 and capability >= 80):
            continue
        try:
            function = xp.RawModule(code=PEAK, options=peak_options(kind)).get_function("peak")
            arguments = (out, np.int32(count), np.uint32(2654435761))
            seconds = clock.median(functools.partial(function, (blocks,), (256,), arguments))
        except Exception as error:
            emit({"row": {"what": name, "unit": "error", "rate": 0.0}, "error": str(error)[:2000]})
            continue
        emit(
            {
                "row": {
                    "what": name,
                    "unit": "mac/s",
                    "rate": blocks * 8 * count * 8 * MACS[kind] / seconds,
                }
            }
        )
