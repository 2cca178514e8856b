"""Every CUDA kernel compiles for every architecture that its variant supports, without spills or a
stack frame.

NVRTC, NVIDIA's compiler as a library, needs no GPU and no driver: it comes with the wheel
nvidia-cuda-nvrtc-cu12, which is a pin of requirements-dev.txt. The compiler's own report is read
(`--ptxas-options=-v`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.device import KINDS, PEAK, SINCE, peak_options
from qverify.kernels.fused import CAPABILITY, options, source
from qverify.kernels.packing import Variant

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# The slow ones show nothing new: SMALL is meant for sm_75, and later architectures have better
# variants; sm_86 and sm_89 have the instructions and the registers of sm_80.
SLOW = {(Variant.SMALL, a) for a in ARCHITECTURES if a > 75}
SLOW |= {(v, a) for v in (Variant.DENSE, Variant.SPARSE) for a in (86, 89)}
BUILDS = [
    pytest.param(v, a, id=f"{v.name}-sm_{a}", marks=[pytest.mark.slow] * ((v, a) in SLOW))
    for v in Variant
    for a in ARCHITECTURES
    if a >= CAPABILITY[v]
]
PROPERTIES = re.compile(
    r"Function properties for (\w+)\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) "
    r"bytes spill loads\n"
    r".*Used (\d+) registers"
)
REGISTERS = 65536  # of a multiprocessor


@functools.cache
def nvrtc() -> Any:
    """The library, from the wheel or the system; without it the test is skipped."""
    names = (
        ["nvrtc64_120_0.dll"]
        if sys.platform == "win32"
        else ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"]
    )
    folders = []
    for package in ("nvidia", "nvidia.cuda_nvrtc"):
        spec = importlib.util.find_spec(package) if importlib.util.find_spec("nvidia") else None
        folders += (
            [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
        )
    wheels = [path for folder in folders for name in names for path in sorted(folder.rglob(name))]
    for candidate in (*map(str, wheels), *names):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    if Path(sys.prefix) == Path(__file__).parents[2] / ".venv" and sys.platform != "darwin":
        pytest.fail(
            "NVRTC is a pin of requirements-dev.txt, but cannot be loaded from the environment "
            "that `make` made"
        )
    pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")


def text_of(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    """What nvrtcGet<what> gives."""
    size = ctypes.c_size_t()
    assert getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    held = ctypes.create_string_buffer(size.value)
    assert getattr(library, f"nvrtcGet{what}")(program, held) == 0
    return held.raw


def compiled(variant: Variant, architecture: int, more: tuple[str, ...] = ()) -> tuple[str, bytes]:
    """The compiler's report and the machine code."""
    return built(source(), architecture, (*options(variant), *more))


def built(text: str, architecture: int, more: tuple[str, ...]) -> tuple[str, bytes]:
    """The same for any source."""
    library, program = nvrtc(), ctypes.c_void_p()
    assert (
        library.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), b"source.cu", 0, None, None
        )
        == 0
    )
    words = [*more, f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    try:
        code = library.nvrtcCompileProgram(program, len(words), array)
        report = text_of(library, program, "ProgramLog").rstrip(b"\0").decode()
        assert code == 0, report
        return report, text_of(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@pytest.mark.parametrize(("variant", "architecture"), BUILDS)
def test_it_compiles_without_spills(variant: Variant, architecture: int) -> None:
    report, cubin = compiled(variant, architecture)
    kernels = re.findall(
        r'extern "C" __global__ void __launch_bounds__\((\d+)[^)]*\)\s+(\w+)', source()
    )
    wanted = {
        name: int(threads)
        for threads, name in kernels
        if name.endswith("_plain") == (variant is Variant.PLAIN)
    }
    found = PROPERTIES.findall(report)
    assert {name for name, *_ in found} == set(wanted)
    assert "warning" not in report
    for name, *bytes_of, registers in found:
        assert bytes_of == ["0", "0", "0"], (
            f"{name} on sm_{architecture}: {bytes_of} bytes of stack and spills"
        )
        assert int(registers) * wanted[name] <= REGISTERS, name
    assert cubin.startswith(b"\x7fELF")


def test_it_compiles_with_the_options_that_cupy_adds() -> None:
    """CuPy 13 and 14 do."""
    report, _ = compiled(Variant.PLAIN, 80, ("-ftz=true", "--device-as-default-execution-space"))
    assert "warning" not in report


@pytest.mark.parametrize(
    ("kind", "architecture"), [(k, a) for k in KINDS for a in ARCHITECTURES if a >= SINCE[k]]
)
def test_the_benchmark_s_kernel_compiles(kind: int, architecture: int) -> None:
    """That of the tensor cores' rates: it has no memory to wait for."""
    report, _ = built(PEAK, architecture, peak_options(kind))
    assert [found[:4] for found in PROPERTIES.findall(report)] == [
        ("peak", "0", "0", "0")
    ] and "warning" not in report
