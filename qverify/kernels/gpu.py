"""The CUDA machine, through CuPy. The only module that names cupy."""

from __future__ import annotations

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
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return Kernels("cuda", f"CuPy {cupy.__version__} on {properties['name'].decode()}", cupy)
