"""Builds the network while the ONNX graph is read.

It emits ops, moves elements of any tensor kind, and closes float chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.errors import SoundnessError
from qverify.frontend.tensors import (
    Codes,
    Float,
    FloatAcc,
    FloatCodes,
    FloatInput,
    FloatPair,
    FloatSum,
    IndexArray,
    Tensor,
)
from qverify.kernels import Kernels, open_kernels
from qverify.network import Node
from qverify.ops import (
    AbstractOp,
    FloatProgram,
    FloatStep,
    Layout,
    Pairwise,
    Requantize,
    Table,
    Type,
    Unfit,
    joint_shape,
)
from qverify.ops.requantize import ordinals

NEUTRAL = {"mul": 1.0, "div": 1.0, "add": 0.0, "sub": 0.0, "max": -np.inf, "min": np.inf}

INEXACT = (
    "it continues a float matrix product, whose order of additions (hence rounding) is unknown"
)


class Refusal(Exception):
    """A rule cannot read its node.

    The driver adds the node's name, op and types, and makes an error of it.
    """


@dataclass(frozen=True, eq=False)
class Quantizer:
    """One QuantizeLinear on the graph's float input, element by element: flat arrays of one length.

    `source` and `constant` as in FloatInput; code = rint(clip(steps(x) / scale, ...)) + zero_point.
    """

    source: IndexArray
    constant: npt.NDArray[np.float32]
    steps: tuple[FloatStep, ...]
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Identity:
    """Integer graph inputs, taken as they are: `source` the flat indices of their elements."""

    source: IndexArray
    low: int
    high: int


@dataclass
class Builder:
    """The network under construction. `encoders` fill the input code vector, one after another."""

    nodes: list[Node] = field(default_factory=list)
    encoders: list[Quantizer | Identity] = field(default_factory=list)
    # Nodes that x86 without VNNI may compute differently.
    saturable: list[str] = field(default_factory=list)
    node_name: str = ""
    kernels: Kernels = field(default_factory=lambda: open_kernels("cpu"))

    # -- emitting ----------------------------------------------------------------------------------

    def emit(self, op: AbstractOp, *inputs: Codes, dtype: npt.DTypeLike = np.int32) -> Codes:
        """Append an op; its type is worked out (and an int32 overflow refused) here.

        SoundnessError where its range does not fit the element type that the rule declares.
        """
        try:
            result = op.output_type(*(x.type for x in inputs))
        except Unfit as error:
            raise Refusal(str(error)) from None
        declared = np.iinfo(np.dtype(dtype))
        if result.low < declared.min or result.high > declared.max:
            raise SoundnessError(
                f"node '{self.node_name}': its rule declares {declared.dtype}, but "
                f"{type(op).__name__} gives codes from {result.low} to {result.high}"
            )
        self.nodes.append(Node(op, tuple(x.value for x in inputs), result, self.node_name))
        return Codes(len(self.nodes), result, np.dtype(dtype))

    def add_encoder(
        self, encoder: Quantizer | Identity, shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> Codes:
        """A slice of the input code vector, filled by `encoder`, as a tensor of the given shape."""
        start = sum(len(e.source) for e in self.encoders)
        self.encoders.append(encoder)
        index = np.arange(start, start + len(encoder.source), dtype=np.int64)
        value_type = Type(shape, encoder.low, encoder.high)
        self.nodes.append(Node(Layout(shape, index), (0,), value_type, self.node_name))
        return Codes(len(self.nodes), value_type, np.dtype(dtype))

    # -- moving elements ---------------------------------------------------------------------------

    def move(self, x: Tensor, index: IndexArray, fill: float | int | None = None) -> Tensor:
        """A tensor of index's shape: element i is x.flat[index.flat[i]], `fill` if that is -1."""
        index = np.asarray(index, dtype=np.int64, order="C")
        holes = index < 0
        if isinstance(x, np.ndarray):
            moved = (
                x.reshape(-1)[np.where(holes, 0, index)]
                if x.size
                else np.zeros(index.shape, x.dtype)
            )
            return np.where(holes, np.asarray(fill if fill is not None else 0, x.dtype), moved)
        if holes.any() and fill is None:
            raise Refusal("an element comes from nowhere")
        match x:
            case Codes():
                return self._move_codes(x, index, int(fill or 0))
            case FloatCodes():
                return self._move_table(x, index, fill)
            case FloatPair():
                ids = [
                    np.broadcast_to(np.arange(c.type.size).reshape(c.shape), x.shape).reshape(-1)
                    for c in (x.a, x.b)
                ]
                if holes.any():
                    raise Refusal("padding a float sum of two tensors is not supported")
                a, b = (
                    self._move_codes(c, i[index], 0) for c, i in zip((x.a, x.b), ids, strict=True)
                )
                return FloatPair(a, b, x.table)
            case FloatAcc():
                if holes.any():
                    raise Refusal("padding a dequantized accumulator is not supported")
                steps = tuple(
                    FloatStep(
                        s.kind,
                        s.operand.reshape(())
                        if s.operand.size == 1
                        else _spread(s.operand, x.shape)[index],
                    )
                    for s in x.program.steps
                )
                return FloatAcc(
                    self._move_codes(x.codes, index, 0), FloatProgram(steps, x.program.ordinal)
                )
            case FloatInput():
                return _move_input(x, index, holes, fill)
            case FloatSum():
                acc = self.move(x.acc, index)
                assert isinstance(acc, FloatAcc)
                return FloatSum(acc, x.error.reshape(-1)[index])

    def _move_codes(self, x: Codes, index: IndexArray, fill: int) -> Codes:
        flat = index.reshape(-1)
        if flat.size == x.type.size and np.array_equal(flat, np.arange(flat.size)):
            if index.shape == x.shape:
                return x
            return self.emit(Layout(index.shape), x, dtype=x.dtype)
        constants = None
        if (flat < 0).any():
            fits = np.can_cast(np.min_scalar_type(fill), x.dtype)
            if not fits and not x.type.low <= fill <= x.type.high:
                raise Refusal(f"the padding value {fill} does not fit {x.dtype}")
            constants = np.array([fill], np.int32)
            flat = np.where(flat < 0, x.type.size, flat)
        return self.emit(Layout(index.shape, flat, constants), x, dtype=x.dtype)

    def _move_table(self, x: FloatCodes, index: IndexArray, fill: float | int | None) -> FloatCodes:
        code = 0
        if (index < 0).any():
            if x.which is not None:
                raise Refusal("padding a tensor with per-channel scales is not supported")
            hits = np.flatnonzero(x.table[0] == np.float32(0 if fill is None else fill))
            if not hits.size:
                raise Refusal(f"the padding value {fill} is not the value of any code")
            code = x.low + int(hits[0])
        which = None if x.which is None else x.which.reshape(-1)[index]
        return FloatCodes(self._move_codes(x.codes, index, code), x.table, which)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Join tensors along an axis.

        All of one kind, constants of that kind's codes allowed among Codes.
        """
        if all(isinstance(p, np.ndarray) for p in parts):
            return np.concatenate([np.asarray(p) for p in parts], axis=axis)
        index, total = [], 0
        for p in parts:
            size = int(np.prod(p.shape, dtype=np.int64))
            index.append(np.arange(total, total + size).reshape(p.shape))
            total += size
        joined = np.concatenate(index, axis=axis)
        if all(isinstance(p, Codes | np.ndarray) for p in parts):
            return self._concat_codes(parts, joined)
        if all(isinstance(p, FloatCodes) for p in parts):
            return self._concat_tables([p for p in parts if isinstance(p, FloatCodes)], joined)
        inputs = [p for p in parts if isinstance(p, FloatInput)]
        if len(inputs) == len(parts) and len({tuple(s.kind for s in p.steps) for p in inputs}) == 1:
            return _concat_inputs(inputs, joined)
        raise Refusal("a concatenation of unlike tensors (quantize them first)")

    def _concat_codes(self, parts: Sequence[Tensor], joined: IndexArray) -> Codes:
        codes = [p for p in parts if isinstance(p, Codes)]
        constants = [np.asarray(p) for p in parts if isinstance(p, np.ndarray)]
        sizes = [int(np.prod(p.shape, dtype=np.int64)) for p in parts]
        starts, end = [0] * len(parts), 0
        # Constants come last.
        for i in sorted(range(len(parts)), key=lambda i: isinstance(parts[i], np.ndarray)):
            starts[i], end = end, end + sizes[i]
        source = np.concatenate(
            [np.arange(begin, begin + n) for begin, n in zip(starts, sizes, strict=True)]
        )
        tail = (
            np.concatenate([c.reshape(-1) for c in constants]).astype(np.int32)
            if constants
            else None
        )
        return self.emit(
            Layout(joined.shape, source[joined].reshape(-1), tail), *codes, dtype=codes[0].dtype
        )

    def _concat_tables(self, parts: list[FloatCodes], joined: IndexArray) -> FloatCodes:
        parts = self._alike(parts)
        codes = self._concat_codes([p.codes for p in parts], joined)
        if all(p.which is None and np.array_equal(p.table, parts[0].table) for p in parts):
            return FloatCodes(codes, parts[0].table)
        which, rows = [], 0
        for p in parts:
            chosen = np.zeros(p.shape, np.int64) if p.which is None else p.which
            which.append(chosen.reshape(-1) + rows)
            rows += len(p.table)
        return FloatCodes(
            codes, np.concatenate([p.table for p in parts]), np.concatenate(which)[joined]
        )

    def _alike(self, parts: list[FloatCodes]) -> list[FloatCodes]:
        """The same tensors with codes of one type and tables of one range.

        Sound because int8 codes move to uint8 one to one, and a part never has a code outside its
        range: what its table says there (the nearest value, so that tables still rise) is never
        looked at.
        """
        if len({p.codes.dtype for p in parts}) > 1:
            parts = [self._unsigned(p) for p in parts]
        low, high = min(p.low for p in parts), max(p.codes.type.high for p in parts)
        return [
            replace(
                p,
                table=np.pad(
                    p.table, ((0, 0), (p.low - low, high - p.codes.type.high)), mode="edge"
                ),
            )
            for p in parts
        ]

    def _unsigned(self, x: FloatCodes) -> FloatCodes:
        if x.codes.dtype != np.int8:
            return x
        shifted = Table(_range(x.codes.type)[None] + 128, x.low)
        return replace(x, codes=self.emit(shifted, x.codes, dtype=np.uint8))

    # -- float arithmetic --------------------------------------------------------------------------

    def step(self, x: Float, kind: str, operand: npt.NDArray[np.float32]) -> Float:
        """x <kind> operand, element by element, for a constant float32 operand (numpy broadcasting;
        x keeps its shape)."""
        if isinstance(x, FloatSum):
            raise Refusal(INEXACT)
        shape = joint_shape(x.shape, operand.shape)
        if shape != x.shape:
            if int(np.prod(shape)) != int(np.prod(x.shape)):
                moved = self.move(
                    x, np.broadcast_to(np.arange(int(np.prod(x.shape))).reshape(x.shape), shape)
                )
            else:
                moved = self.move(x, np.arange(int(np.prod(x.shape))).reshape(shape))
            assert isinstance(moved, FloatInput | FloatCodes | FloatPair | FloatAcc)
            return self.step(moved, kind, operand)
        step = FloatStep(kind, operand)
        match x:
            case FloatInput():
                return replace(
                    x, steps=(*x.steps, FloatStep(kind, np.broadcast_to(operand, x.shape)))
                )
            case FloatAcc():
                return FloatAcc(x.codes, x.program.then(kind, operand))
            case FloatCodes():
                return self.map_rows(
                    x, operand, lambda table, c: FloatStep(kind, c).apply(self.kernels, table)
                )
            case FloatPair():
                if operand.size != 1:
                    raise Refusal(
                        "a per-channel operation on a float sum of two tensors is not supported"
                    )
                return replace(x, table=step_scalar(step, self.kernels, x.table))

    def map_rows(
        self,
        x: FloatCodes,
        parameter: npt.NDArray[Any],
        function: Callable[[npt.NDArray[np.float32], npt.NDArray[Any]], npt.NDArray[np.float32]],
    ) -> FloatCodes:
        """x with its table changed by function(table [P, K], parameter [P, 1]); a row per distinct
        (row, parameter)."""
        if parameter.size == 1:
            column = np.full((len(x.table), 1), parameter.reshape(-1)[0], parameter.dtype)
            return replace(x, table=function(x.table, column))
        values, inverse = np.unique(parameter.reshape(-1), return_inverse=True)
        chosen = stretched(inverse.reshape(parameter.shape), x.shape)
        row = np.zeros(x.shape, np.int64) if x.which is None else x.which
        pairs, which = np.unique(row * len(values) + chosen, return_inverse=True)
        table = function(x.table[pairs // len(values)], values[pairs % len(values)][:, None])
        return FloatCodes(x.codes, table, which.reshape(x.shape).astype(np.int64))

    # -- closing a float chain ---------------------------------------------------------------------

    def quantize(
        self,
        x: Float,
        scale: npt.NDArray[np.float32],
        zero_point: npt.NDArray[np.int32],
        dtype: np.dtype[Any],
    ) -> Codes:
        """QuantizeLinear: `scale` and `zero_point` broadcast to x; `dtype` is uint8 or int8."""
        if isinstance(x, FloatSum):
            raise Refusal(INEXACT)
        info = np.iinfo(dtype)
        low, high = int(info.min), int(info.max)
        if isinstance(x, FloatInput):
            scales = stretched(scale, x.shape).reshape(-1)
            zeros = stretched(zero_point, x.shape).reshape(-1)
            steps = tuple(FloatStep(s.kind, s.operand.reshape(-1)) for s in x.steps)
            encoder = Quantizer(
                x.source.reshape(-1), x.constant.reshape(-1), steps, scales, zeros, low, high
            )
            return self.add_encoder(encoder, x.shape, dtype)
        if isinstance(x, FloatAcc):
            program = x.program.then("div", scale)
            return self.emit(Requantize(program, zero_point, low, high), x.codes, dtype=dtype)

        def rounded(v: npt.NDArray[np.float32], s: Any, z: Any) -> npt.NDArray[np.int32]:
            return quantize_linear(v, s, z, low, high)

        if isinstance(x, FloatPair):
            if scale.size != 1 or zero_point.size != 1:
                raise Refusal(
                    "a per-channel quantizer on a float sum of two tensors is not supported"
                )
            table = rounded(x.table, scale.reshape(()), zero_point.reshape(()))
            return self.emit(Pairwise(table, x.a.type.low, x.b.type.low), x.a, x.b, dtype=dtype)
        pairs = np.stack(
            [
                p.astype(np.float64)
                for p in np.broadcast_arrays(
                    scale, stretched(zero_point, joint_shape(scale.shape, zero_point.shape))
                )
            ],
            axis=-1,
        )
        distinct, key = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)

        def close(table: npt.NDArray[np.float32], row: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
            chosen = distinct[row[:, 0]]
            codes = rounded(table, chosen[:, :1].astype(np.float32), chosen[:, 1:].astype(np.int32))
            return codes.astype(np.float32)

        closed = self.map_rows(x, key.reshape(pairs.shape[:-1]), close)
        return self.table(closed, closed.table.astype(np.int32), dtype)

    def table(self, x: FloatCodes, values: npt.NDArray[np.int32], dtype: npt.DTypeLike) -> Codes:
        """A Table op on x's codes with x's row choice; the identity emits nothing."""
        codes = x.codes
        if (
            x.which is None
            and codes.dtype == np.dtype(dtype)
            and np.array_equal(values[0], _range(codes.type))
        ):
            return codes
        return self.emit(Table(values, x.low, x.which), codes, dtype=dtype)

    def as_accumulator(self, x: Float) -> FloatAcc:
        """The same float tensor as (integer value, program).

        Tables turn into ordinals of their floats. Unfit where it could be NaN.
        """
        match x:
            case FloatAcc():
                x.program.ends(x.codes.type)
                return x
            case FloatCodes():
                codes = self.emit(Table(ordinals(self.kernels, x.table), x.low, x.which), x.codes)
                return FloatAcc(codes, FloatProgram(ordinal=True))
            case FloatPair():
                op = Pairwise(ordinals(self.kernels, x.table), x.a.type.low, x.b.type.low)
                return FloatAcc(self.emit(op, x.a, x.b), FloatProgram(ordinal=True))
        raise Refusal("the float input reaches this node without being quantized")


def stretched(value: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """`value` broadcast to `shape`. Refusal where it does not fit."""
    try:
        return np.broadcast_to(value, shape)
    except ValueError:
        raise Refusal(
            f"a parameter of shape {list(value.shape)} does not fit a tensor {list(shape)}"
        ) from None


def quantize_linear(
    v: npt.NDArray[Any], scale: Any, zero_point: Any, low: int, high: int
) -> npt.NDArray[np.int32]:
    """ONNX QuantizeLinear as onnxruntime computes it, in float32.

    Divide, clip, round half to even, add the zero point.
    """
    zero_point = np.asarray(zero_point, np.int32)
    scaled = v / np.asarray(scale, np.float32)
    clipped = np.minimum(
        np.maximum(scaled, (low - zero_point).astype(np.float32)),
        (high - zero_point).astype(np.float32),
    )
    codes: npt.NDArray[np.int32] = np.rint(clipped).astype(np.int32) + zero_point
    return codes


def step_scalar(
    step: FloatStep, kernels: Kernels, table: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """A step with a one-element operand, applied to a table."""
    result: npt.NDArray[np.float32] = FloatStep(step.kind, step.operand.reshape(())).apply(
        kernels, table
    )
    return result


def _range(t: Type) -> npt.NDArray[np.int32]:
    return np.arange(t.low, t.high + 1, dtype=np.int32)


def _spread(operand: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """`operand` broadcast to `shape`, flat."""
    return np.broadcast_to(operand, shape).reshape(-1)


def _concat_inputs(parts: list[FloatInput], joined: IndexArray) -> FloatInput:
    """`parts` with steps of the same kinds, joined as the flat indices `joined` say."""
    source = np.concatenate([p.source.reshape(-1) for p in parts])
    constant = np.concatenate([p.constant.reshape(-1) for p in parts])
    steps = []
    for k, first in enumerate(parts[0].steps):
        operand = np.concatenate([_spread(p.steps[k].operand, p.shape) for p in parts])
        steps.append(FloatStep(first.kind, operand[joined]))
    return FloatInput(source[joined], constant[joined], tuple(steps))


def _move_input(
    x: FloatInput, index: IndexArray, holes: npt.NDArray[np.bool_], fill: float | int | None
) -> FloatInput:
    at = np.where(holes, 0, index)
    source = np.where(holes, -1, x.source.reshape(-1)[at])
    constant = np.where(holes, np.float32(fill or 0), x.constant.reshape(-1)[at]).astype(np.float32)
    steps = []
    for step in x.steps:
        operand = _spread(step.operand, x.shape)[at]
        if holes.any():
            if step.kind not in NEUTRAL:
                raise Refusal("padding after 'constant - x' is not supported")
            operand = np.where(holes, np.float32(NEUTRAL[step.kind]), operand)
        steps.append(FloatStep(step.kind, operand.astype(np.float32)))
    return FloatInput(source, constant, tuple(steps))
