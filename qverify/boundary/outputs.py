"""The network's output integers as outputs of the runtime: values, bounds, lines, code levels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.boundary.domain import Float64Array, Int32Array
from qverify.bounds.regions import Levels, Line
from qverify.bounds.regions import Output as Described
from qverify.bounds.unsafe import Grid
from qverify.frontend.encoder import CPU
from qverify.frontend.lower import Lowered, Output, codes_of
from qverify.frontend.tensors import Codes, FloatAcc, FloatSum
from qverify.ops import Layout, Table
from qverify.ops.requantize import from_ordinals


@dataclass(frozen=True, eq=False)
class Decoder:
    """The network's output integers -> the graph's output values, as float64.

    Each is an exact float32, or an integer.
    """

    # (FloatProgram or None for integers, size, shape), in order.
    parts: tuple[tuple[Any, int, tuple[int, ...]], ...]
    steepness: npt.NDArray[np.float64]  # [outputs]: d value / d integer, a guide for gradients
    grid: Grid
    # [outputs]: how far the runtime's value may lie from the decoded one; mostly 0. Nobody else
    # computes with it: `around` and `decode_box` hold what the runtime may give.
    band: npt.NDArray[np.float64]
    types: tuple[tuple[int, int], ...]  # least and largest integer behind the outputs of each part

    @property
    def exact(self) -> bool:
        """Whether decoding gives the very bits of the runtime's outputs."""
        return not self.band.any()

    @property
    def size(self) -> int:
        return sum(size for _, size, _ in self.parts)

    @functools.cached_property
    def is_float(self) -> npt.NDArray[np.bool_]:
        """[outputs]: float32 (True) or integer (False)."""
        return np.repeat(
            [program is not None for program, _, _ in self.parts],
            [size for _, size, _ in self.parts],
        )

    @functools.cached_property
    def reach(self) -> Float64Array:
        """[outputs]: a magnitude that no value exceeds; not finite where it may overflow."""
        sizes = [size for _, size, _ in self.parts]
        low, high = (
            np.repeat(np.array(column, np.int32), sizes)[None]
            for column in zip(*self.types, strict=True)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            lower, upper = self.decode_box(low, high)
            reach: Float64Array = np.maximum(np.abs(lower[0]), np.abs(upper[0]))
        return reach

    def decode(self, z: Int32Array) -> Float64Array:
        """int32 [N, outputs] -> nominal output values, float64 [N, outputs].

        If this decoder is exact, they are the runtime's, bit for bit.
        """
        result, start = [], 0
        for program, size, shape in self.parts:
            values = z[:, start : start + size]
            start += size
            if program is not None:
                values = program.run(CPU, values.reshape(len(z), *shape)).reshape(len(z), size)
            result.append(values.astype(np.float64))
        return np.concatenate(result, axis=1)

    def decode_box(self, lower: Int32Array, upper: Int32Array) -> tuple[Float64Array, Float64Array]:
        """Bounds of every value that the runtime may give for integers in [lower, upper].

        Sound because each decoded value is a monotone function of its integer, and the runtime's
        lies within the band around it.
        """
        a, b = self.decode(lower), self.decode(upper)
        return np.minimum(a, b) - self.band, np.maximum(a, b) + self.band

    def around(self, y: Float64Array) -> tuple[Float64Array, Float64Array]:
        """The same for integers that decode to `y` [N, outputs]."""
        return y - self.band, y + self.band


def make_decoder(lowered: Lowered) -> Decoder:
    """The decoder of a lowered model."""
    parts: list[tuple[Any, int, tuple[int, ...]]] = []
    steep: list[Float64Array] = []
    units: list[int | None] = []
    largest: list[float] = []
    errors: list[Float64Array] = []
    types: list[tuple[int, int]] = []
    for _, tensor in lowered.outputs:
        codes = codes_of(tensor)
        errors.append(np.broadcast_to(_error_of(tensor), codes.shape).reshape(-1))
        tensor = tensor.acc if isinstance(tensor, FloatSum) else tensor
        program = tensor.program if isinstance(tensor, FloatAcc) else None
        size, shape = codes.type.size, codes.type.shape
        parts.append((program, size, shape))
        types.append((codes.type.low, codes.type.high))
        slope = np.asarray(1.0 if program is None else program.slope(), np.float64)
        steep.append(np.broadcast_to(slope, shape).reshape(-1))
        unit, most = _grid_of(lowered, codes, program)
        units += [unit] * size
        largest += [most] * size
    grid = Grid(tuple(units), tuple(largest))
    return Decoder(tuple(parts), np.concatenate(steep), grid, np.concatenate(errors), tuple(types))


def _error_of(output: Output) -> Float64Array:
    return output.error if isinstance(output, FloatSum) else np.zeros(())


def _grid_of(lowered: Lowered, codes: Codes, program: Any) -> tuple[int | None, float]:
    """The power of two that divides every value an output can take, and the largest magnitude.

    Known for integers, and for floats that stand in a table; for a scaled accumulator it is not.
    """
    if program is None:
        return 0, float(max(abs(codes.type.low), abs(codes.type.high)))
    op = lowered.network.nodes[codes.value - 1].op if codes.value else None
    # a reshape or a transpose after the table
    while isinstance(op, Layout) and op.constants is None:
        value, *more = lowered.network.nodes[codes.value - 1].inputs
        if value == 0 or more:
            return None, 0.0
        op = lowered.network.nodes[value - 1].op
        codes = Codes(value, lowered.network.type_of(value), codes.dtype)
    if not isinstance(op, Table) or not program.ordinal or program.steps:
        return None, 0.0
    values = from_ordinals(CPU, op.values).astype(np.float64)
    return _unit_of(values) if np.isfinite(values).all() else (None, 0.0)


def _unit_of(values: Float64Array) -> tuple[int, float]:
    """The power of two that divides all of some float32 values, and their largest magnitude."""
    mantissa, exponent = np.frexp(np.unique(values[values != 0]))
    whole = (np.abs(mantissa) * 2**24).astype(np.int64)  # float32: 24 significant bits
    trailing = np.array([(int(w) & -int(w)).bit_length() - 1 for w in whole], np.int64)
    unit = int((exponent - 24 + trailing).min()) if len(whole) else 0
    return unit, float(np.abs(values).max())


def described_outputs(lowered: Lowered) -> list[Described]:
    """Each graph output as `bounds.regions` needs it."""
    return [
        Described(
            codes_of(output).type.size, _line_of(lowered, output), _levels_of(lowered, output)
        )
        for _, output in lowered.outputs
    ]


def _levels_of(lowered: Lowered, output: Output) -> Levels | None:
    """An output that is a monotone function of codes, after moves and tables; None if it is not."""
    if isinstance(output, FloatSum):
        return None
    codes = codes_of(output)
    program = output.program if isinstance(output, FloatAcc) else None
    if program is not None and any(step.operand.size != 1 for step in program.steps):
        return None
    value, index, tables = codes.value, np.arange(codes.type.size), []
    while value:
        node = lowered.network.nodes[value - 1]
        if isinstance(node.op, Layout) and node.op.constants is None and len(node.inputs) == 1:
            index = index if node.op.index is None else node.op.index[index]
        elif isinstance(node.op, Table) and len(node.op.values) == 1:
            tables.append(node.op)
        else:
            break
        (value,) = node.inputs
    codes_there = lowered.network.type_of(value)
    if codes_there.count > 2**16:
        return None
    x = np.arange(codes_there.low, codes_there.high + 1, dtype=np.int32)
    for table in reversed(tables):
        x = table.values[0][x - table.low]
    floats = x if program is None else program.run(CPU, x).reshape(-1)
    y = floats.astype(np.float64)
    if not np.isfinite(y).all():
        return None
    rise = np.diff(y)
    monotone = (rise >= 0).all() or (rise <= 0).all()
    return Levels(value, index, codes_there.low, y) if monotone else None


def _line_of(lowered: Lowered, output: Output) -> Line | None:
    """An output between two lines over its integer; None where no such lines are known."""
    codes = codes_of(output)
    error = float(np.max(_error_of(output), initial=0.0))
    output = output.acc if isinstance(output, FloatSum) else output
    if isinstance(output, Codes):
        one, none = np.full(codes.type.size, 1 << 20, np.int64), np.zeros(codes.type.size, np.int64)
        return Line(codes.value, one, none, none, -20)
    if output.program.ordinal:
        return _line_of_table(lowered, codes) if not output.program.steps else None
    kinds = tuple(step.kind for step in output.program.steps)
    if kinds not in (("mul",), ("mul", "add")):
        return None
    factor, *addend = (step.operand.astype(np.float64) for step in output.program.steps)
    scale, shift = (
        np.broadcast_to(operand, codes.shape).reshape(-1)
        for operand in (factor, addend[0] if addend else np.zeros(()))
    )
    # Slopes become integers of 24 bits, in units of a power of two.
    unit = int(np.frexp(np.abs(scale).max())[1]) - 24
    if not np.isfinite(scale).all() or not scale.any() or not -200 < unit < 200:
        return None
    step = 2.0**unit
    slope = np.rint(scale / step)
    reach = float(max(abs(codes.type.low), abs(codes.type.high)))
    # How far the output may be from the line: by three float32 roundings (of the integer, the
    # product, the sum), by the rounding of the slope, and by the proved error of a float sum.
    loose = (
        reach * np.abs(scale - slope * step)
        + 2.0**-21 * (reach * np.abs(scale) + np.abs(shift))
        + error
    )
    loose = np.ceil(1.01 * loose / step) + 2
    middle = np.rint(shift / step)
    if float(np.abs(middle).max() + loose.max()) > 2.0**52:
        return None
    lower, upper = (middle - loose).astype(np.int64), (middle + loose).astype(np.int64)
    return Line(codes.value, slope.astype(np.int64), lower, upper, unit)


def _line_of_table(lowered: Lowered, codes: Codes) -> Line | None:
    """An output that is a table of floats over codes, straight from the codes or reshaped."""
    node = lowered.network.nodes[codes.value - 1]
    while isinstance(node.op, Layout) and node.op.index is None and node.inputs[0]:
        node = lowered.network.nodes[node.inputs[0] - 1]
    op = node.op
    if not isinstance(op, Table) or len(op.values) != 1:
        return None
    values = from_ordinals(CPU, op.values[0]).astype(np.float64)
    if not np.isfinite(values).all():
        return None
    unit, _ = _unit_of(values)
    whole = values / 2.0**unit  # integers, exact
    if float(np.abs(whole).max()) >= 2.0**52:
        return None
    x = np.arange(op.low, op.low + len(values), dtype=np.int64)
    rise = (whole[-1] - whole[0]) / max(len(values) - 1, 1)
    rest = whole.astype(np.int64) - int(np.rint(rise)) * x
    size = codes.type.size
    slope, lower, upper = (
        np.full(size, int(value), np.int64) for value in (np.rint(rise), rest.min(), rest.max())
    )
    return Line(node.inputs[0], slope, lower, upper, unit)
