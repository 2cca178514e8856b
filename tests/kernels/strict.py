"""A machine that is NumPy underneath, but whose arrays do no more than CuPy's (13.6 and 14.2) do.

It finds, on a computer without a GPU, what a GPU would refuse or compute differently: host arrays
in device arithmetic, device arrays in NumPy functions, functions, methods, keywords and types that
CuPy lacks or does badly, conversions to integers that are out of range (x86 and CUDA give different
ones), and float32 arithmetic that a verdict rests on but that is not `Kernels.ieee`'s: as CuPy's
kernels do, arithmetic here flushes subnormals to zero.

To use a function that is not listed, read its CuPy source (types, keywords, whether it
synchronises) and list it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from qverify.kernels.gpu import CudaKernels
from tests.kernels import elementwise

TINY = np.finfo(np.float32).tiny

# name -> keywords that may be given; the functions in ARITHMETIC compute with floats, the others
# move them
ARITHMETIC: dict[str, set[str]] = {
    **{
        name: set()
        for name in (
            "abs",
            "clip",
            "exp",
            "fmin",
            "maximum",
            "minimum",
            "nan_to_num",
            "rint",
            "sign",
            "sqrt",
        )
    },
    "add": set(),
    "matmul": set(),  # through cuBLAS; of integers by a slow kernel: refused here
}
MOVES: dict[str, set[str]] = {
    "arange": {"dtype"},
    "ascontiguousarray": set(),
    "broadcast_to": set(),
    "concatenate": {"axis"},
    "empty": {"dtype"},
    "flatnonzero": set(),
    "full": {"dtype"},
    "moveaxis": set(),
    "ones": {"dtype"},
    "pad": {"constant_values"},
    "repeat": {"axis"},
    "stack": {"axis"},
    "swapaxes": set(),
    "take": {"axis"},
    "take_along_axis": {"axis"},
    "where": set(),
    "zeros": {"dtype"},
    "zeros_like": {"dtype"},
    "as_strided": {"shape", "strides"},
}
VIEWS = {"as_strided", "broadcast_to", "empty", "moveaxis", "swapaxes"}  # no launch
TYPES = {
    "bool_",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float32",
    "float64",
}
# No initial, no where.
REDUCTIONS = {name: {"axis", "keepdims"} for name in ("all", "any", "sum", "max", "min", "mean")}
METHODS: dict[str, set[str]] = {
    **REDUCTIONS,
    "argmax": {"axis"},  # one axis or none
    "astype": {"copy"},
    "copy": set(),
    "reshape": set(),
    "swapaxes": set(),
    "transpose": set(),
    "view": set(),
}
COMPUTING = {"sum", "max", "min", "mean", "astype"}
ATTRIBUTES = {"T", "dtype", "ndim", "shape", "size", "strides"}
ADDABLE = {"int32", "uint32", "uint64", "float32", "float64"}  # CuPy 13's add.at; no int64


def inside(value: Any) -> Any:
    """What NumPy may compute with: device arrays opened, host arrays refused."""
    if isinstance(value, StrictArray):
        return value.held
    if isinstance(value, np.ndarray):
        raise TypeError(f"a host array of shape {value.shape} meets device arrays")
    if isinstance(value, list | tuple):
        return type(value)(inside(item) for item in value)
    if isinstance(value, dict):
        return {key: inside(item) for key, item in value.items()}
    return value


def outside(value: Any) -> Any:
    """A result as device arrays; scalars too, as CuPy has it."""
    if isinstance(value, np.ndarray | np.generic):
        return StrictArray(np.asarray(value))
    if isinstance(value, list | tuple) and any(isinstance(item, np.ndarray) for item in value):
        return type(value)(outside(item) for item in value)
    return value


def flushed(value: Any) -> Any:
    """Float32 without subnormals, as -ftz=true has them; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(flushed(item) for item in value)
    if getattr(value, "dtype", None) == np.float32:
        return np.where(np.abs(value) < TINY, np.float32(0), value)
    return value


def converted(value: Any, dtype: Any) -> Any:
    """`value` as another type; refused where a float leaves the integer's range, or is none."""
    dtype = np.dtype(dtype)
    if dtype.kind in "iu" and getattr(value, "dtype", dtype).kind == "f" and value.size:
        ends = np.iinfo(dtype)
        if not (np.trunc(value).min() >= ends.min and np.trunc(value).max() <= ends.max):
            raise OverflowError(
                f"{value.dtype} values in [{value.min()}, {value.max()}] as {dtype}"
            )
    return np.asarray(value).astype(dtype)


def check_options(name: str, options: dict[str, Any], allowed: set[str]) -> None:
    """Raise TypeError for a keyword that CuPy lacks, or that nobody has looked up."""
    if options.keys() - allowed:
        raise TypeError(f"{name} is not known to take {sorted(options.keys() - allowed)} in CuPy")


class Count:
    """What a GPU would be asked for: launches of kernels, and waits of the host for a result. What
    CuPy does in several launches counts as one."""

    launches = 0
    waits = 0


class Compiled:
    """A kernel of the program's own, as CuPy makes them."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __call__(self, *args: Any, **options: Any) -> Any:
        Count.launches += 1
        return outside(self._kernel(*inside(args), **options))


class Function:
    """A NumPy function on device arrays."""

    def __init__(self, name: str, function: Any, options: set[str], computes: bool) -> None:
        self._name, self._function, self._options, self._computes = (
            name,
            function,
            options,
            computes,
        )

    def __call__(self, *args: Any, **options: Any) -> Any:
        check_options(self._name, options, self._options)
        values = inside(args)
        if self._name == "matmul" and any(v.dtype.kind != "f" for v in values):
            raise TypeError("matmul of integers: CuPy has a slow kernel for them")
        if self._name in ("rint", "sqrt", "exp", "sign") and values[0].dtype.kind != "f":
            raise TypeError(f"{self._name} of {values[0].dtype}")
        if self._name == "take_along_axis" and values[1].dtype.kind not in "iu":
            raise IndexError("`indices` must be an integer array")
        Count.launches += self._name not in VIEWS
        Count.waits += self._name == "flatnonzero"
        if self._computes:
            return outside(flushed(self._function(*flushed(values), **inside(options))))
        return outside(self._function(*values, **inside(options)))

    def at(self, target: StrictArray, index: Any, values: StrictArray) -> None:
        """add.at, the only one in use."""
        if self._name != "add" or target.dtype.name not in ADDABLE or values.dtype != target.dtype:
            raise TypeError(f"{self._name}.at for {target.dtype} and {values.dtype}")
        self._function.at(target.held, inside(index), values.held)


class StrictArray:
    """An array of the strict machine."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("implicit conversion of a device array to a NumPy array")

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} of a device array")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options:
            raise TypeError(f"numpy.{ufunc.__name__}.{method} of a device array")
        return outside(flushed(ufunc(*flushed(inside(inputs)))))  # a NumPy scalar on the left

    def __getattr__(self, name: str) -> Any:
        if name == "get":
            return lambda: Module.asnumpy(self)
        if name in ATTRIBUTES:
            return outside(getattr(self.held, name)) if name == "T" else getattr(self.held, name)
        if name not in METHODS:
            raise AttributeError(f"no array of CuPy is known to have '{name}'")
        return lambda *args, **options: self._method(name, args, options)

    def _method(self, name: str, args: Any, options: dict[str, Any]) -> Any:
        check_options(name, options, METHODS[name])
        args, options, held = inside(args), inside(options), self.held
        same = name == "astype" and not options.get("copy", True) and held.dtype == args[0]
        Count.launches += not same and name not in ("reshape", "swapaxes", "transpose", "view")
        if name == "argmax" and isinstance(options.get("axis"), tuple):
            raise TypeError("argmax over several axes")
        if name in COMPUTING:
            held = flushed(held)
        if name == "astype":
            return outside(flushed(converted(held, args[0])))
        result = getattr(held, name)(*args, **options)
        return outside(flushed(result) if name in COMPUTING else result)

    def __getitem__(self, key: Any) -> StrictArray:
        opened = inside(key)
        chosen = [
            k
            for k in (opened if isinstance(opened, tuple) else (opened,))
            if isinstance(k, np.ndarray)
        ]
        Count.launches += bool(chosen)
        Count.waits += any(k.dtype == np.bool_ for k in chosen)
        return StrictArray(np.asarray(self.held[opened]))

    def __setitem__(self, key: Any, value: Any) -> None:
        opened = inside(value)
        Count.launches += 1
        self.held[inside(key)] = (
            converted(opened, self.held.dtype) if isinstance(opened, np.ndarray) else opened
        )

    def __iter__(self) -> Iterator[StrictArray]:
        return (self[i] for i in range(len(self.held)))

    def __len__(self) -> int:
        return len(self.held)

    def __bool__(self) -> bool:
        Count.waits += 1
        return bool(self.held)

    def __float__(self) -> float:
        Count.waits += 1
        return float(self.held)

    def __int__(self) -> int:
        Count.waits += 1
        return int(self.held)


def _operators() -> None:
    def forward(function: Any, turned: bool) -> Any:
        def method(self: StrictArray, *others: Any) -> Any:
            Count.launches += 1
            values = flushed((self.held, *inside(others)))
            return outside(flushed(function(*(values[::-1] if turned else values))))

        return method

    def in_place(function: Any) -> Any:
        def method(self: StrictArray, other: Any) -> StrictArray:
            Count.launches += 1
            result = flushed(function(flushed(self.held), flushed(inside(other))))
            if result.shape != self.held.shape or not np.can_cast(
                result.dtype, self.held.dtype, "same_kind"
            ):
                raise TypeError(
                    f"{self.held.dtype}{list(self.held.shape)} becomes "
                    f"{result.dtype}{list(result.shape)}"
                )
            self.held[...] = result
            return self

        return method

    binary = (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "lshift",
        "rshift",
        "and",
        "or",
        "xor",
    )
    for name in (*binary, "lt", "le", "gt", "ge", "eq", "ne", "neg", "invert", "abs"):
        function = getattr(operator, f"__{name}__")
        setattr(StrictArray, f"__{name}__", forward(function, turned=False))
        if name in binary:
            setattr(StrictArray, f"__r{name}__", forward(function, turned=True))
            setattr(StrictArray, f"__i{name}__", in_place(function))


_operators()


class Module:
    """NumPy (or a submodule) in the role of `cupy`."""

    def __init__(self, module: Any = np) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name in ARITHMETIC or name in MOVES:
            options = ARITHMETIC.get(name, set()) | MOVES.get(name, set())
            return Function(name, getattr(self._module, name), options, name in ARITHMETIC)
        if name in TYPES or name == "inf":
            return getattr(self._module, name)
        if name in ("ElementwiseKernel", "ReductionKernel"):
            return lambda *text: Compiled(getattr(elementwise, name)(*text))
        if name in ("lib", "stride_tricks"):
            return Module(getattr(self._module, name))
        raise AttributeError(f"'{name}' has not been looked up in CuPy: see {__name__}")

    @staticmethod
    def asarray(values: Any, dtype: Any = None) -> StrictArray:
        """The way in: host or device values."""
        Count.launches += not isinstance(values, StrictArray)
        return StrictArray(
            np.asarray(values.held if isinstance(values, StrictArray) else values, dtype=dtype)
        )

    @staticmethod
    def asnumpy(values: Any) -> Any:
        """The way out."""
        Count.waits += isinstance(values, StrictArray)
        return values.held if isinstance(values, StrictArray) else np.asarray(values)


class Ieee:
    """Float32 arithmetic, subnormals included: what `gpu.open_cuda` writes in PTX."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("add", "subtract", "multiply", "divide", "maximum", "minimum"):
            raise AttributeError(name)

        def step(*args: Any) -> Any:
            Count.launches += 1
            values = inside(args)
            if any(v.dtype != np.float32 for v in values):
                raise TypeError(f"{name} of {[v.dtype for v in values]}")
            return outside(getattr(np, name)(*values))

        return step


def open_strict() -> CudaKernels:
    """The GPU's kernels on this machine, which has memory without end."""
    return CudaKernels("the strict machine", Module(), Ieee(), lambda: 1 << 60)
