"""The CUDA machine, through CuPy. The only module that names cupy."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from qverify.errors import DeviceError
from qverify.kernels.base import Array, Budget, Kernels, fold_by_taps
from qverify.kernels.elementwise import dot_kernel, kernel, largest_kernel, total_kernel

# CuBLAS 12.9, 13: sliced factors.
EMULATED = ("CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION")
STEPS = {  # PTX
    "add": "add.rn",
    "subtract": "sub.rn",
    "multiply": "mul.rn",
    "divide": "div.rn",
    "maximum": "max",
    "minimum": "min",
}


@dataclass(frozen=True)
class CudaKernels(Kernels):
    """CuPy on the current device. Batches are as large as its memory allows."""

    free: Callable[[], int]  # bytes of the device's memory that are free

    name: ClassVar[str] = "cuda"
    library: ClassVar[str] = "CuPy"
    is_host: ClassVar[bool] = False
    look_every: ClassVar[int] = 8
    chunk_bytes: ClassVar[int] = 1 << 30
    # Two ends, and about as much again in scratch.
    box_budget: ClassVar[Budget] = Budget(4 << 30, 0.25, each=16, least=16, most=1 << 20)
    # All arrays, hulls in both types and columns of convolutions among them (NumPy's take 56 to 161
    # bytes at their peak).
    cut_budget: ClassVar[Budget] = Budget(8 << 30, 0.4, each=256, least=2, most=4096)

    def allowance(self, most: int, share: float) -> int:
        return min(most, int(share * self.free()))

    def resident_bytes(self) -> int:
        return self.allowance(16 << 30, 0.25)

    def device_limit(self, name: str, otherwise: int) -> int:
        return int(self.xp.cuda.Device().attributes[name])

    def to_host(self, values: Array) -> Any:
        return self.xp.asnumpy(values)

    def may_hold(self, mask: Array) -> bool:
        return True

    def scatter_add(self, target: Array, index: Array, values: Array) -> None:
        if target.dtype == self.xp.int64:  # CuPy 13 has no int64 here; both types wrap alike
            target, values = target.view(self.xp.uint64), values.view(self.xp.uint64)
        self.xp.add.at(target, (slice(None), index), values)

    def fold(
        self,
        columns: Array,
        output: tuple[int, ...],
        padded: tuple[int, ...],
        strides: tuple[int, ...],
        dilations: tuple[int, ...],
    ) -> Array:
        rank = len(output)
        if rank > 2:
            return fold_by_taps(self.xp, columns, output, padded, strides, dilations)
        (n, groups), channels = columns.shape[:2], columns.shape[2 + rank]
        lengths = (output, columns.shape[3 + rank :], strides, dilations)
        sides = [side for pair in lengths for side in (1, *pair)[-2:]]
        result = self.xp.empty((n, groups, channels, *padded), dtype=columns.dtype)
        return kernel(self.xp, "fold")(columns, channels, *(1, *padded)[-2:], *sides, result)

    def total(self, parts: list[Array]) -> Array:
        if len(parts) < 3:
            return functools.reduce(operator.add, parts)
        return total_kernel(self.xp, len(parts))(*parts)

    def dot(self, a: Array, b: Array) -> Array:
        return dot_kernel(self.xp)(a, b, axis=tuple(range(2, a.ndim))) if a.ndim > 2 else a * b

    def inner(self, a: Array, b: Array) -> Array:
        # Not einsum: CuPy's, of integers, is a matrix product in tiles of 128 x 128.
        return self.dot(a, b)

    def largest(self, *xs: Array) -> list[float]:
        found = [largest_kernel(self.xp)(x.reshape(-1), axis=(0,)) for x in xs if x.size]
        sizes = iter(self.to_host(self.xp.stack(found)).tolist() if found else [])
        return [next(sizes) if x.size else 0.0 for x in xs]

    def furthest(self, weights: Array, low: Array, high: Array) -> Array:
        return kernel(self.xp, "furthest")(weights, low, high)

    def best_corner(
        self, weights: Array, multipliers: Array, z: Array, y: Array, slack: Array | None
    ) -> tuple[Array, Array, Array]:
        xp, n = self.xp, max(len(weights), y.shape[2])
        if weights.shape != multipliers.shape or len(weights) < n:
            shape = (n, *weights.shape[1:])
            weights = xp.broadcast_to(weights, shape)
            multipliers = xp.broadcast_to(multipliers, shape)
        if y.shape[1:] != z.shape[1:]:
            raise ValueError(f"corners {y.shape} and {z.shape}")
        size = int(y[0, 0, 0].size)
        block, batch = y.shape[2] * size, size if y.shape[2] > 1 else 0
        falls = [block * part.shape[1] if len(part) > 1 else 0 for part in (y, z)]
        numbers = (weights.shape[1], size, y.shape[1], block, batch, *falls)
        name, slacks = ("corner", ()) if slack is None else ("corner_slack", (slack,))
        best, best_y, best_z = kernel(xp, name)(weights, multipliers, y, z, *numbers, *slacks)
        return best, best_y, best_z

    def descend(
        self,
        m: Array,
        argument: Array,
        z: Array | float,
        size: Array,
        moments: tuple[Array, Array],
        rate: float,
        least: float | None = None,
        mean: Array | None = None,
        share: float = 1.0,
    ) -> Array:
        xp = self.xp
        floor = -xp.inf if least is None else least
        given = (m, argument, z, size, rate, floor)
        made = (xp.empty(m.shape, dtype=m.dtype), *moments)
        if mean is None:
            return kernel(xp, "descend")(*given, *made)[0]
        return kernel(xp, "descend_mean")(*given, share, *made, mean)[0]

    def rows_where(self, better: Array, new: list[Array], old: list[Array]) -> list[Array]:
        return [
            self.xp.where(better.reshape(-1, *([1] * (a.ndim - 1))), a, b)
            for a, b in zip(new, old, strict=True)
        ]


def open_cuda() -> Kernels:
    """Kernels on the current CUDA device. Raises DeviceError with the missing piece and how to get
    it."""
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"--device cuda needs CuPy ({error}): pip install cupy-cuda12x, or use --device cpu"
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"--device cuda needs an NVIDIA GPU and its driver ({error}); use --device cpu"
        ) from None
    if count == 0:
        raise DeviceError("--device cuda needs an NVIDIA GPU: none is visible; use --device cpu")
    for name in EMULATED:
        if os.environ.get(name, "0") != "0":
            raise DeviceError(
                f"{name} makes cuBLAS's products inexact: unset it, or use --device cpu"
            )
    try:
        _check_products(cupy)
    except (ImportError, OSError, RuntimeError) as error:  # cuBLAS or NVRTC is missing
        raise DeviceError(
            f"--device cuda needs CuPy's CUDA libraries ({error}): pip install 'cupy-cuda12x[ctk]'"
        ) from None
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    name = f"CuPy {cupy.__version__} on {properties['name'].decode()}"
    return CudaKernels(name, cupy, _ieee(cupy), lambda: _free(cupy))


def _free(cupy: Any) -> int:
    """What the driver could still hand out, and what CuPy holds in reserve."""
    return int(cupy.cuda.runtime.memGetInfo()[0]) + int(cupy.get_default_memory_pool().free_bytes())


def _check_products(cupy: Any) -> None:
    """Refuse a device whose products round their factors (as TF32 does): exact integer products
    rest on them.

    CuPy has three ways to multiply: two matrices, two stacks of them, and a stack with one
    matrix.
    """
    for dtype, value in ((cupy.float32, 2**24 - 1), (cupy.float64, 2**53 - 1)):
        x, one = cupy.full((64, 64), value, dtype=dtype), cupy.eye(64, dtype=dtype)
        stack = cupy.full((2, 64, 64), value, dtype=dtype)
        ones = cupy.full((2, 64, 64), 0, dtype=dtype) + one
        for a, b in ((x, one), (stack, ones), (stack, one)):
            if not bool((cupy.matmul(a, b) == a).all()):
                name = cupy.dtype(dtype).name
                raise DeviceError(
                    f"{name} products are rounded (to TF32?) on this device: unset CUPY_TF32, or "
                    "use --device cpu"
                )


def _ieee(cupy: Any) -> SimpleNamespace:
    """Float32 arithmetic with subnormals. CuPy compiles with -ftz=true, which no option takes back;
    an instruction that is written out is not changed by it."""
    result = SimpleNamespace()
    for name, step in STEPS.items():
        code = f'asm("{step}.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y))'
        setattr(
            result,
            name,
            cupy.ElementwiseKernel("float32 x, float32 y", "float32 z", code, f"qverify_{name}"),
        )
    return result
