"""A machine that is NumPy underneath, but whose arrays mix with NumPy's as little as CuPy's do.

It finds, on a computer without a GPU, what a GPU would refuse: host arrays in device arithmetic, device arrays in NumPy
functions, conversions that nobody asked for.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from qverify.kernels import Kernels


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


class Function:
    """A NumPy function (or a ufunc with its methods) on device arrays."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return outside(self._function(*inside(args), **inside(options)))

    def __getattr__(self, name: str) -> Function:
        return Function(getattr(self._function, name))


class StrictArray:
    """An array of the strict machine."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("implicit conversion of a device array to a NumPy array")

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} of a device array")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return outside(getattr(ufunc, method)(*inside(inputs), **inside(options)))  # a NumPy scalar on the left

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # __array_interface__ would be a back door
            raise AttributeError(name)
        value = getattr(self.held, name)
        return Function(value) if callable(value) else outside(value)

    def __getitem__(self, key: Any) -> StrictArray:
        return StrictArray(np.asarray(self.held[inside(key)]))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held[inside(key)] = inside(value)

    def __len__(self) -> int:
        return len(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __float__(self) -> float:
        return float(self.held)

    def __int__(self) -> int:
        return int(self.held)


def _operators() -> None:
    def forward(function: Any, turned: bool) -> Any:
        def method(self: StrictArray, *others: Any) -> Any:
            values = (self.held, *inside(others))
            return outside(function(*(values[::-1] if turned else values)))

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
        "matmul",
    )
    for name in (*binary, "lt", "le", "gt", "ge", "eq", "ne", "neg", "invert", "abs"):
        function = getattr(operator, f"__{name}__")
        setattr(StrictArray, f"__{name}__", forward(function, turned=False))
        if name in binary:
            setattr(StrictArray, f"__r{name}__", forward(function, turned=True))


_operators()


class Module:
    """NumPy (or a submodule) in the role of `cupy`."""

    def __init__(self, module: Any = np) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, type) or not callable(value):
            return Module(value) if hasattr(value, "__spec__") else value
        return Function(value)

    @staticmethod
    def asarray(values: Any, dtype: Any = None) -> StrictArray:
        """The way in: host or device values."""
        return StrictArray(np.asarray(values.held if isinstance(values, StrictArray) else values, dtype=dtype))

    @staticmethod
    def asnumpy(values: Any) -> Any:
        """The way out."""
        return values.held if isinstance(values, StrictArray) else np.asarray(values)


def open_strict() -> Kernels:
    """Kernels that call themselves "cuda"."""
    return Kernels("cuda", "the strict machine", Module())
