"""What a tensor of the ONNX graph is while it is being read.

    numpy.ndarray  a constant
    Codes          an integer value of the network
    FloatInput     float32: monotone steps on the graph's float input, before its quantizer
    FloatCodes     float32: a function of one 8-bit code, held as a table of all its values
    FloatPair      float32: a function of two codes (a sum of two dequantized tensors), as a table
    FloatAcc       float32: monotone steps on an accumulator, or on a float held as its ordinal
    FloatSum       float32: a float matrix product of dequantized codes, known up to a proved error

The float kinds are promises: they must end in a quantizer or as a graph output, and become integer
ops only there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qverify.ops import FloatProgram, FloatStep, Type
from qverify.ops.requantize import FloatArray

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Codes:
    """Value number `value` of the network under construction; `dtype` is the ONNX element type."""

    value: int
    type: Type
    dtype: np.dtype[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape


@dataclass(frozen=True, eq=False)
class FloatInput:
    """`source` [shape] is the flat index of the graph's input element behind each element, -1 for
    the constant `constant`; `steps` have operands of full shape."""

    source: IndexArray
    constant: FloatArray
    steps: tuple[FloatStep, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True, eq=False)
class FloatCodes:
    """element = table[which, code - low].

    `table` [P, K] float32; `which` has full shape, or is None where P = 1.
    """

    codes: Codes
    table: FloatArray
    which: IndexArray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def low(self) -> int:
        return self.codes.type.low


@dataclass(frozen=True, eq=False)
class FloatPair:
    """element = table[a - a.low, b - b.low], with broadcasting of the codes `a` and `b`.

    `table` [Ka, Kb] float32.
    """

    a: Codes
    b: Codes
    table: FloatArray

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.broadcast_shapes(self.a.shape, self.b.shape))


@dataclass(frozen=True, eq=False)
class FloatAcc:
    """element = program(code), where `codes` is an accumulator, or the ordinal of a float32."""

    codes: Codes
    program: FloatProgram

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


@dataclass(frozen=True, eq=False)
class FloatSum:
    """A float sum whose order of additions only the runtime knows.

    It is within `error` [shape] of program(accumulator).
    """

    acc: FloatAcc
    error: npt.NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.acc.shape


Float = FloatInput | FloatCodes | FloatPair | FloatAcc | FloatSum
Tensor = npt.NDArray[np.generic] | Codes | Float
