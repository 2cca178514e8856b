"""The CUDA machine, through CuPy. The only module that names cupy."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from qverify.errors import DeviceError
from qverify.kernels import Kernels

# CuBLAS 12.9, 13: sliced factors.
EMULATED = (
    "CUBLAS_EMULATE_SINGLE_PRECISION",
    "CUBLAS_EMULATE_DOUBLE_PRECISION",
)
STEPS = {  # PTX
    "add": "add.rn",
    "subtract": "sub.rn",
    "multiply": "mul.rn",
    "divide": "div.rn",
    "maximum": "max",
    "minimum": "min",
}


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
    return Kernels("cuda", name, cupy, _ieee(cupy), lambda: _free(cupy))


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
