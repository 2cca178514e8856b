"""The array machine: NumPy or CuPy behind one small face.

Everything above this floor is written once, against `Kernels`: `xp` for element-wise array code,
and methods for what differs between the machines in spelling, speed or memory. An array of network
values is int32, batch axis first.

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
  a sum. (Those of `elementwise` are several: they compute with integers, add integers in float64,
  or only guide.) Float64 arithmetic has its subnormals. Conversions of integers round to nearest.
- Conversions of floats to integers agree inside the integers' range only: `whole` keeps to it.
- Integer sums wrap alike; shifts of negative integers are arithmetic and `//` rounds down on both.
- Sums of floats (a reduction's order, atomic additions) differ from machine to machine, and from
  run to run: guides only.
"""

from __future__ import annotations

from qverify.errors import DeviceError
from qverify.kernels.base import Array, Budget, Kernels

__all__ = ["Array", "Budget", "Kernels", "open_kernels"]


def open_kernels(device: str) -> Kernels:
    """The kernels for "cpu", "cuda" or "auto". Raises DeviceError, with what is missing, if "cuda"
    cannot be used."""
    if device not in ("cpu", "cuda", "auto"):
        raise DeviceError(f"unknown device '{device}': use cpu, cuda or auto")
    if device != "cpu":
        from qverify.kernels import gpu

        try:
            return gpu.open_cuda()
        except DeviceError:
            if device == "cuda":
                raise
    from qverify.kernels.cpu import open_cpu

    return open_cpu()
