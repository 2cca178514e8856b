"""CuPy's ElementwiseKernel and ReductionKernel on a CPU: the same parameters, and the same text for
one element, compiled by the C++ compiler at hand. It checks what CuPy checks (types, counts,
shapes) and computes with flushed subnormals, as -ftz=true does; products and sums are not fused.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# As CuPy's typedefs have them.
NAMES = {
    "float32": "float",
    "float64": "double",
    "int32": "int",
    "int64": "long long",
    "bool": "bool",
}
FRAME = """
#include <cmath>
#include <cstddef>
#include <xmmintrin.h>
{types}
extern "C" void run(ptrdiff_t size_, void **held_, bool flush_) {{
    const unsigned before_ = _mm_getcsr();
    if (flush_) _mm_setcsr(before_ | 0x8040);
    {whole}
    for (ptrdiff_t i = 0; i < size_; ++i) {{
        {each}
        {operation};
    }}
    _mm_setcsr(before_);
}}
"""


@dataclass(frozen=True)
class Parameter:
    """One of a kernel's parameters."""

    raw: bool
    type: str  # a NumPy type, or a letter for any
    name: str

    @staticmethod
    def read(text: str) -> list[Parameter]:
        words = [part.split() for part in text.split(",")]
        return [Parameter(part[0] == "raw", part[-2], part[-1]) for part in words]


@functools.cache
def compiler() -> str | None:
    """A C++17 compiler, if there is one."""
    return next(
        filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None
    )


@functools.cache
def library(text: str) -> Any:
    """Compiled once per content; skips the test where there is no compiler."""
    program = compiler()
    if program is None or sys.platform == "win32":
        pytest.skip("no C++ compiler: the CUDA kernels cannot run on this machine's CPU")
    flags = [
        "-O2",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        "-fwrapv",
        "-Wall",
        "-Werror",
        "-Wno-tautological-compare",
    ]
    digest = hashlib.sha256("\0".join([program, *flags, text]).encode()).hexdigest()[:24]
    folder = (
        Path(tempfile.gettempdir()) / f"qverify-shim-{os.getuid() if hasattr(os, 'getuid') else 0}"
    )
    folder.mkdir(mode=0o700, exist_ok=True)
    made = folder / f"{digest}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / "kernel.cpp").write_text(text, encoding="utf-8")
            command = [
                program,
                *flags,
                str(Path(work) / "kernel.cpp"),
                "-o",
                str(Path(work) / "made.so"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            (Path(work) / "made.so").replace(made)  # at once, whoever else builds the same
    return ctypes.CDLL(str(made))


class ElementwiseKernel:
    """On NumPy arrays. `flush` says whether subnormals are zero."""

    def __init__(
        self, inputs: str, outputs: str, operation: str, name: str, flush: bool = True
    ) -> None:
        self._in, self._out = Parameter.read(inputs), Parameter.read(outputs)
        self._operation, self.name, self._flush = operation, name, flush

    def __call__(self, *args: Any) -> Any:
        if len(args) not in (len(self._in), len(self._in) + len(self._out)):
            raise TypeError(f"{self.name}: {len(args)} arguments")
        given, outputs = args[: len(self._in)], args[len(self._in) :]
        types = self._types(
            [*zip(self._in, given, strict=True), *zip(self._out, outputs, strict=False)]
        )
        like = [
            a
            for p, a in zip(self._in, given, strict=True)
            if isinstance(a, np.ndarray) and not p.raw
        ]
        shape = np.broadcast_shapes(*(a.shape for a in (*like, *outputs)))
        made = outputs or [np.empty(shape, types[p.type]) for p in self._out]
        if any(a.shape != shape for a in made):
            raise ValueError(f"{self.name}: outputs {[a.shape for a in made]} for {shape}")
        results = [np.ascontiguousarray(a) for a in made]
        held = [
            *(self._held(p, a, shape, types) for p, a in zip(self._in, given, strict=True)),
            *results,
        ]
        pointers = (ctypes.c_void_p * len(held))(*(a.ctypes.data for a in held))
        library(self._text(types)).run(
            ctypes.c_ssize_t(int(np.prod(shape, dtype=int))), pointers, self._flush
        )
        for array, result in zip(made, results, strict=True):
            if array is not result:
                array[...] = result
        return tuple(made) if len(made) > 1 else made[0]

    def _types(self, pairs: Sequence[tuple[Parameter, Any]]) -> dict[str, np.dtype[Any]]:
        types: dict[str, np.dtype[Any]] = {
            name: np.dtype(name) for name in ("int64", "float64", "bool")
        }
        for p, a in pairs:
            if isinstance(a, np.ndarray):
                if types.setdefault(p.type, a.dtype) != a.dtype:
                    raise TypeError(
                        f"{self.name}: {p.name} is {a.dtype}, {p.type} is {types[p.type]}"
                    )
            elif p.raw or not isinstance(a, int | float):
                raise TypeError(f"{self.name}: {p.name} is {type(a)}")
        return types

    @staticmethod
    def _held(p: Parameter, a: Any, shape: tuple[int, ...], types: dict[str, np.dtype[Any]]) -> Any:
        if p.raw:
            return np.ascontiguousarray(a)
        return np.ascontiguousarray(np.broadcast_to(np.asarray(a, types[p.type]), shape))

    def _text(self, types: dict[str, np.dtype[Any]]) -> str:
        decls = "".join(
            f"typedef {NAMES[kind.name]} {name};\n"
            for name, kind in types.items()
            if len(name) == 1
        )
        whole, each = [], []
        for k, p in enumerate((*self._in, *self._out)):
            name = NAMES.get(p.type, p.type)
            if p.raw:
                whole.append(f"const {name} *{p.name} = (const {name} *)held_[{k}];")
            elif k < len(self._in):
                each.append(f"const {name} {p.name} = (({name} *)held_[{k}])[i];")
            else:
                each.append(f"{name} &{p.name} = (({name} *)held_[{k}])[i];")
        return FRAME.format(
            types=decls, whole=" ".join(whole), each=" ".join(each), operation=self._operation
        )


class ReductionKernel:
    """Sums of products and largest magnitudes only."""

    def __init__(self, inputs: str, outputs: str, each: str, *rest: str) -> None:
        self._largest = rest[0] == "a > b ? a : b"
        if rest[:-1] != (
            ("a > b ? a : b", "size = a", "0") if self._largest else ("a + b", "sum = a", "0")
        ):
            raise NotImplementedError(rest)
        self._each = ElementwiseKernel(inputs, outputs, f"{outputs.split()[-1]} = {each}", rest[-1])

    def __call__(self, *args: Any, axis: tuple[int, ...]) -> Any:
        each = self._each(*args)
        return np.asarray(each.max(axis=axis, initial=0) if self._largest else each.sum(axis=axis))
