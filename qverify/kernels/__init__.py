"""The array machine: NumPy or CuPy behind one small face.

Everything above this floor is written once, against `Kernels`: `xp` for element-wise array code,
and the few functions whose spelling or speed depends on the machine. An array of network values is
int32, batch axis first.

Bit-for-bit: both machines compute the same integers because every operation used is exact in
integers, or a single IEEE-754 float32 operation (never a fused pair), or a float64 sum of integers
proved to stay below 2**53. In detail:

- Products of matrices of integers whose partial sums, in magnitudes, stay below 2**24 (float32) or
  2**53 (float64) are exact in any order of addition: blocks, split K, fused multiply-adds and
  float64 tensor cores do no harm. Rounding the factors (TF32) or slicing them (cuBLAS's emulated
  modes) can; `gpu.open_cuda` refuses a device that does.
- Float32 arithmetic that a verdict rests on goes through `ieee`. CuPy compiles its own kernels to
  flush subnormals to zero, which is another function: `xp`'s float32 arithmetic is for guides, and
  where a subnormal cannot matter (a clip between integers and `rint`). Moving a float (`take`,
  `where`, `view`, assignment) keeps its bits.
- Division is correctly rounded; CuPy's kernels are one operation each, so no product is fused with
  a sum. (Those of `steps` are several: they compute with integers, add integers in float64, or only
  guide.) Float64 arithmetic has its subnormals. Conversions of integers round to nearest.
- Conversions of floats to integers agree inside the integers' range only: `whole` keeps to it.
- Integer sums wrap alike; shifts of negative integers are arithmetic and `//` rounds down on both.
- Sums of floats (a reduction's order, atomic additions) differ from machine to machine, and from
  run to run: guides only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qverify.errors import DeviceError

# numpy.ndarray or cupy.ndarray; the machine is known by the `Kernels` that goes with it.
Array = Any


@dataclass(frozen=True)
class Kernels:
    """One machine. `xp` is its array module (`numpy` or `cupy`)."""

    name: str  # "cpu" or "cuda"
    description: str  # for the user, e.g. "NumPy 2.4.6"
    xp: Any
    # add, subtract, multiply, divide, maximum, minimum of float32 (not of NaN), subnormals included
    ieee: Any
    # Bytes of the device's memory that are free; None: the host's own.
    free: Callable[[], int] | None = None

    def allowance(self, most: int, part: float) -> int:
        """Bytes of memory to plan with: `most`, or a part of the device's free memory where that is
        less."""
        return most if self.free is None else min(most, int(part * self.free()))

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
        """`x @ weight` for integer `x` [..., K] and a float `weight` [K, M] that holds integers;
        the result is float.

        Exact because the caller chose `weight`'s dtype so that every partial sum of |x||w| stays
        below 2**24 (float32) or 2**53 (float64): all intermediate values are then representable, in
        whatever order they are added.
        """
        x = x.astype(weight.dtype, copy=False)
        if weight.ndim > 2 or x.ndim <= 2:
            return self.xp.matmul(x, weight)
        # One large product instead of a batch of small ones.
        rows = self.xp.matmul(x.reshape(-1, x.shape[-1]), weight)
        return rows.reshape(*x.shape[:-1], weight.shape[-1])

    def row_products(self, a: Array, b: Array) -> Array:
        """sum_k a[n, k] * b[n, k] of two arrays of the same type: [N]."""
        if self.name == "cpu":
            return self.xp.einsum("nk,nk->n", a, b)
        # CuPy's einsum of integers is a matrix product in tiles of 128 x 128.
        return (a * b).sum(axis=1)

    def whole(self, values: Array) -> Array:
        """The nearest int64 of floats; 0 for NaN and what is 2**62 or more, which every machine
        converts differently."""
        values = self.xp.rint(values)
        return self.xp.where(self.xp.abs(values) < 2.0**62, values, 0).astype(self.xp.int64)

    def windows(
        self,
        x: Array,
        kernel: tuple[int, ...],
        strides: tuple[int, ...],
        dilations: tuple[int, ...],
    ) -> Array:
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
        """`target[:, index] += values`, repeated indices added up. `target` [N, n], `index` [m],
        `values` [N, m]."""
        if (
            target.dtype == self.xp.int64 and self.name != "cpu"
        ):  # CuPy 13 has no int64 here; both types wrap alike
            target, values = target.view(self.xp.uint64), values.view(self.xp.uint64)
        self.xp.add.at(target, (slice(None), index), values)


def open_kernels(device: str) -> Kernels:
    """The kernels for "cpu", "cuda" or "auto". Raises DeviceError, with what is missing, if "cuda"
    cannot be used."""
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

    return Kernels("cpu", f"NumPy {numpy.__version__}", numpy, numpy)
