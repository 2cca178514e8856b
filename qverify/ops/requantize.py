"""From accumulator to code: the network's rounding, evaluated exactly as the runtime does.

A `FloatProgram` is the float32 arithmetic that stands between an integer and the next rounding: one
IEEE-754 float32 operation per step, with constant operands. Each step is monotone in its argument
(round-to-nearest is monotone), so the whole program is, and so is `Requantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels, open_kernels
from qverify.ops.base import AbstractOp
from qverify.ops.relax import Relaxation, make_staircase
from qverify.ops.types import Interval, Type, Unfit, joint_shape

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FloatStep:
    """v -> v <kind> operand in float32; the operand broadcasts to the value."""

    kind: str  # "mul", "add", "sub" (v - c), "rsub" (c - v), "div" (v / c), "max", "min"
    operand: FloatArray

    def apply(self, kernels: Kernels, v: Array) -> Array:
        ieee, c = kernels.ieee, self.operand
        match self.kind:
            case "mul":
                return ieee.multiply(v, c)
            case "add":
                return ieee.add(v, c)
            case "sub":
                return ieee.subtract(v, c)
            case "rsub":
                return ieee.subtract(c, v)
            case "div":
                return ieee.divide(v, c)
            case "max":
                return ieee.maximum(v, c)
            case "min":
                return ieee.minimum(v, c)
        raise ValueError(f"no float step '{self.kind}'")

    def chain(self, slope: Any) -> Any:
        """`slope` times this step's derivative where it is not clipped (a guide for gradients)."""
        match self.kind:
            case "mul":
                return slope * self.operand
            case "div":
                return slope / self.operand
            case "rsub":
                return -slope
        return slope


@dataclass(frozen=True, eq=False)
class FloatProgram:
    """int32 -> float32, then the steps; with `ordinal`, the integer is the ordinal of a float32."""

    steps: tuple[FloatStep, ...] = ()
    ordinal: bool = False

    def then(self, kind: str, operand: npt.ArrayLike) -> FloatProgram:
        """This program with one more step."""
        return FloatProgram(
            (*self.steps, FloatStep(kind, np.asarray(operand, np.float32))), self.ordinal
        )

    def run(self, kernels: Kernels, x: Array) -> Array:
        """`x` int32 [N, *shape] -> float32 [N, *shape]."""
        v = from_ordinals(kernels, x) if self.ordinal else kernels.as_float32(x)
        with np.errstate(over="ignore"):  # an infinity is the runtime's too; a quantizer clips it
            for step in self.steps:
                v = step.apply(kernels, v)
        return v

    def ends(self, x: Type) -> FloatArray:
        """float32 [2, *shape]: its values at the least and the largest integer of `x`.

        All others lie between, since every step is monotone. Raises ValueError where it could be
        NaN.
        """
        for step in self.steps:
            if step.kind not in ("max", "min") and not np.isfinite(step.operand).all():
                # 0 * infinity may lie between the two.
                raise Unfit("a float constant is NaN or infinite")
            if step.kind == "div" and not step.operand.all():
                raise Unfit("a division by zero")
        shape = joint_shape((1,) * len(x.shape), *(step.operand.shape for step in self.steps))
        bounds = np.array([x.low, x.high], np.int32).reshape(2, *([1] * len(shape)))
        with np.errstate(all="ignore"):
            result: FloatArray = self.run(open_kernels("cpu"), bounds)
        if np.isnan(result).any():
            raise Unfit("an accumulator can overflow float32 and then become NaN")
        return result

    def slope(self) -> Any:
        """The product of the steps' derivatives, a float or an array: a guide only."""
        total: Any = 1.0
        for step in self.steps:
            total = step.chain(total)
        return total


def ordinals(kernels: Kernels, v: Array) -> Array:
    """float32 -> int32 in the same order; -0 and +0 share 0. NaN is not allowed."""
    xp = kernels.xp
    bits = v.view(xp.int32)
    return xp.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def from_ordinals(kernels: Kernels, x: Array) -> Array:
    """The inverse of `ordinals`."""
    xp = kernels.xp
    bits = xp.where(x < 0, xp.int32(-(2**31)) | -x, x).astype(xp.int32)
    return bits.view(xp.float32)


@dataclass(frozen=True, eq=False)
class Requantize(AbstractOp):
    """q = rint(clip(program(acc), low - zero_point, high - zero_point)) + zero_point, half to even.

    For QLinearConv, QLinearMatMul and QGemm the program is one multiplication by the float32
    (x_scale * w_scale) / y_scale, per channel; a QuantizeLinear after float steps divides by its
    scale. `zero_point` broadcasts like a step's operand. Source: onnxruntime's MlasRequantizeOutput
    and MlasQuantizeLinear, measured bit for bit.

    Sound because every step is monotone, hence q is a monotone function of acc (increasing or
    decreasing, per channel): over an interval it takes its extremes at the bounds.
    """

    program: FloatProgram
    zero_point: npt.NDArray[np.int32]
    low: int
    high: int

    def output_type(self, *types: Type) -> Type:
        (x,) = types
        for operand in (*(step.operand for step in self.program.steps), self.zero_point):
            if joint_shape(x.shape, operand.shape) != x.shape:
                raise Unfit(
                    f"a parameter {list(operand.shape)} does not fit a value {list(x.shape)}"
                )
        self.program.ends(x)
        return Type(x.shape, self.low, self.high)

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        xp = kernels.xp
        v = self.program.run(kernels, xs[0])
        low = (self.low - self.zero_point).astype(xp.float32)
        high = (self.high - self.zero_point).astype(xp.float32)
        return xp.rint(xp.minimum(xp.maximum(v, low), high)).astype(xp.int32) + self.zero_point

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        a, b = self.run(kernels, boxes[0][0]), self.run(kernels, boxes[0][1])
        return kernels.xp.minimum(a, b), kernels.xp.maximum(a, b)

    def relaxation(self, kernels: Kernels, *types: Type) -> Relaxation:
        (x,) = types
        shape = joint_shape(*(s.operand.shape for s in self.program.steps), self.zero_point.shape)
        shape = (1,) * (len(x.shape) - len(shape)) + tuple(shape)
        cpu, count = open_kernels("cpu"), int(np.prod(shape))

        def run(values: Array) -> Array:
            return self.run(cpu, values.reshape(-1, *shape)).reshape(-1, count)

        return make_staircase(run, count, np.arange(count).reshape(shape), x, self.low, self.high)

    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        # Where the program starts from an ordinal, the gradient is taken against the float it
        # stands for.
        q = self.run(kernels, xs[0])
        inside = (q > self.low) & (q < self.high)
        return ((upstream * self.program.slope() * inside).astype(kernels.xp.float32),)
