"""The CUDA machine, through CuPy. The only module that names cupy."""

from __future__ import annotations

from typing import Any

from qverify.errors import DeviceError
from qverify.kernels import Kernels


def open_cuda() -> Kernels:
    """Kernels on the current CUDA device. Raises DeviceError with the missing piece and how to get it."""
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"--device cuda needs CuPy ({error}): pip install 'qverify[gpu]', or use --device cpu"
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f"--device cuda needs an NVIDIA GPU and its driver ({error}); use --device cpu") from None
    if count == 0:
        raise DeviceError("--device cuda needs an NVIDIA GPU: none is visible; use --device cpu")
    try:
        _check_products(cupy)
    except (ImportError, OSError, RuntimeError) as error:  # cuBLAS or NVRTC is missing
        raise DeviceError(
            f"--device cuda needs CuPy's CUDA libraries ({error}): pip install 'cupy-cuda12x[ctk]'"
        ) from None
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return Kernels("cuda", f"CuPy {cupy.__version__} on {properties['name'].decode()}", cupy)


def _check_products(cupy: Any) -> None:
    """Refuse a device whose float32 products round their factors (TF32): exact integer products rest on them."""
    x = cupy.full((64, 64), 4097, dtype=cupy.float32)  # 13 significant bits, TF32 keeps 11
    if not bool((cupy.matmul(x, cupy.eye(64, dtype=cupy.float32)) == x).all()):
        raise DeviceError("float32 products are rounded to TF32 on this device: unset CUPY_TF32, or use --device cpu")
