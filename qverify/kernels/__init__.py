"""The array machine: NumPy or CuPy behind one small face.

Everything above this floor is written once, against `Kernels`: `xp` for element-wise array code, and the few functions
whose spelling or speed depends on the machine. An array of network values is int32, batch axis first.

Bit-for-bit: both machines compute the same integers because every operation used is exact in integers, or a single
IEEE-754 float32 operation (never a fused pair), or a float64 sum of integers proved to stay below 2**53.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qverify.errors import DeviceError

Array = Any  # numpy.ndarray or cupy.ndarray; the machine is known by the `Kernels` that goes with it


@dataclass(frozen=True)
class Kernels:
    """One machine. `xp` is its array module (`numpy` or `cupy`)."""

    name: str  # "cpu" or "cuda"
    description: str  # for the user, e.g. "NumPy 2.4.6"
    xp: Any

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        """`values` (host or device) as an array of this machine."""
        return self.xp.asarray(values, dtype=dtype)

    def to_host(self, values: Array) -> Any:
        """`values` as a NumPy array."""
        return values if self.name == "cpu" else self.xp.asnumpy(values)

    def as_float32(self, values: Array) -> Array:
        """int32 -> float32, rounded half to even, as CVTDQ2PS does."""
        return values.astype(self.xp.float32)

    def matmul(self, x: Array, weight: Array) -> Array:
        """`x @ weight` for integer `x` [..., K] and a float `weight` [K, M] that holds integers; the result is float.

        Exact because the caller chose `weight`'s dtype so that every partial sum of |x||w| stays below 2**24 (float32)
        or 2**53 (float64): all intermediate values are then representable, in whatever order they are added.
        """
        return self.xp.matmul(x.astype(weight.dtype), weight)

    def windows(self, x: Array, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]) -> Array:
        """A view [N, C, *output, *kernel] of `x` [N, C, *spatial]; nothing is copied."""
        spatial = x.shape[2:]
        span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        output = tuple((n - s) // t + 1 for n, s, t in zip(spatial, span, strides, strict=True))
        step = x.strides[2:]
        return self.xp.lib.stride_tricks.as_strided(
            x,
            shape=(*x.shape[:2], *output, *kernel),
            strides=(
                *x.strides[:2],
                *(s * t for s, t in zip(step, strides, strict=True)),
                *(s * d for s, d in zip(step, dilations, strict=True)),
            ),
        )

    def scatter_add(self, target: Array, index: Array, values: Array) -> None:
        """`target[:, index] += values`, repeated indices added up. `target` [N, n], `index` [m], `values` [N, m]."""
        self.xp.add.at(target, (slice(None), index), values)


def open_kernels(device: str) -> Kernels:
    """The kernels for "cpu", "cuda" or "auto". Raises DeviceError, with what is missing, if "cuda" cannot be used."""
    if device == "cpu":
        return _cpu()
    from qverify.kernels.gpu import open_cuda

    if device == "cuda":
        return open_cuda()
    if device != "auto":
        raise DeviceError(f"unknown device '{device}': use cpu, cuda or auto")
    try:
        return open_cuda()
    except DeviceError:
        return _cpu()


def _cpu() -> Kernels:
    import numpy

    return Kernels("cpu", f"NumPy {numpy.__version__}", numpy)
