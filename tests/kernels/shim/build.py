"""`interval.cu` compiled for the CPU by the C++ compiler at hand, in the role of a
`cupy.RawModule`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify.kernels.fused import options, source
from qverify.kernels.packing import Variant
from tests.kernels.elementwise import compiler
from tests.kernels.strict import StrictArray

HERE = Path(__file__).parent
GUARD, POISON = 4096, 0xA5


def build(variant: Variant, text: str, only_thin: bool = False) -> Path:
    """The library for a source, made once per content; skips the test where there is no
    compiler."""
    program = compiler()
    if program is None or sys.platform == "win32":  # the shim's contexts are POSIX
        pytest.skip("no C++ compiler: the CUDA kernels cannot run on this machine's CPU")
    if only_thin:  # a build in half the time, for faults that any tile shows
        text = re.sub(r'extern "C" .* (DENSE|CONV|NETWORK)\((Wide|Narrow|4|8).*', "", text)
    flags = [
        "-O1",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-U_FORTIFY_SOURCE",
        "-ffp-contract=off",
        "-w",
    ]
    flags += [options(variant)[0], *["-DONLY_THIN"] * only_thin]
    sources = [(HERE / name).read_text(encoding="utf-8") for name in ("shim.h", "main.cpp")]
    digest = hashlib.sha256("\0".join([program, *flags, *sources, text]).encode()).hexdigest()[:24]
    folder = (
        Path(tempfile.gettempdir()) / f"qverify-shim-{os.getuid() if hasattr(os, 'getuid') else 0}"
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / "interval.cu").write_text(text, encoding="utf-8")
            made = Path(work) / "made.so"
            include = ["-I", str(HERE), "-I", work, '-DKERNEL_SOURCE="interval.cu"']
            command = [program, *flags, *include, str(HERE / "main.cpp"), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            made.replace(library)  # at once, whoever else builds the same
    return library


class ShimError(RuntimeError):
    """What a GPU would answer with an error, or not at all: a barrier that not all threads reach, a
    stray write."""


class Guarded:
    """An array copied between two guard zones, aligned to 256 bytes as CUDA allocates."""

    def __init__(self, array: Any) -> None:
        assert array.flags.c_contiguous
        self.array, self.size = array, array.nbytes
        self.buffer = np.full(self.size + 2 * GUARD + 256, POISON, np.uint8)
        self.start = GUARD + -(self.buffer.ctypes.data + GUARD) % 256
        self.inside = self.buffer[self.start : self.start + self.size]
        self.inside[:] = array.reshape(-1).view(np.uint8)
        self.pointer = self.buffer.ctypes.data + self.start

    def give_back(self, name: str) -> None:
        for zone in (self.buffer[: self.start], self.buffer[self.start + self.size :]):
            if (zone != POISON).any():
                raise ShimError(f"{name} wrote beside an array {self.array.shape}")
        self.array.reshape(-1).view(np.uint8)[:] = self.inside


class Function:
    """One kernel; called as CuPy's are."""

    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, library: Any, name: str, seeds: tuple[int, ...]) -> None:
        self._library, self._name, self._seeds = library, name, seeds
        self._count = library.shim_parameters(name.encode())
        assert self._count >= 0, f"no kernel '{name}'"

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        """Every schedule in turn. Arrays are NumPy's, or the strict machine's."""
        arguments = tuple(
            argument.held if isinstance(argument, StrictArray) else argument
            for argument in arguments
        )
        assert shared_mem <= self.max_dynamic_shared_size_bytes, (
            "more shared memory than was asked for"
        )
        assert len(arguments) == self._count, (
            f"{self._name} takes {self._count} arguments, not {len(arguments)}"
        )
        for seed in self._seeds:
            self._once(grid, block, arguments, shared_mem, seed)

    def _once(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared: int,
        seed: int,
    ) -> None:
        held: dict[int, Guarded] = {}
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                guarded = held.setdefault(id(argument), Guarded(argument))
                values.append(ctypes.c_void_p(guarded.pointer))
            else:
                values.append(np.ctypeslib.as_ctypes(np.asarray(argument)))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        arrays = list(held.values())
        begins = (ctypes.c_void_p * len(arrays))(*(array.pointer for array in arrays))
        sizes = (ctypes.c_size_t * len(arrays))(*(array.size for array in arrays))
        size = (*grid, 1)[:2]
        code = self._library.shim_launch(
            self._name.encode(),
            *map(ctypes.c_uint, (*size, block[0])),
            ctypes.c_size_t(shared),
            ctypes.c_uint(seed),
            pointers,
            begins,
            sizes,
            len(arrays),
        )
        if code:
            raise ShimError(self._library.shim_message().decode())
        for array in arrays:
            array.give_back(self._name)


class Module:
    """The kernels of one variant. `seeds`: schedules; an odd one lets warps run ahead."""

    def __init__(
        self,
        variant: Variant,
        text: str | None = None,
        seeds: tuple[int, ...] = (2, 3),
        only_thin: bool = False,
    ) -> None:
        library: Any = ctypes.CDLL(
            str(build(variant, source() if text is None else text, only_thin))
        )
        library.shim_message.restype = ctypes.c_char_p
        self._library, self._seeds = library, seeds

    def compile(self) -> None:
        """Done already."""

    def get_function(self, name: str) -> Function:
        return Function(self._library, name, self._seeds)
