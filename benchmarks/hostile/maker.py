"""ONNX graphs under construction, with onnxruntime asked after every node.

Every value carries what it is on a few sample inputs, so that scales and zero points can be chosen
to fit, and a node that onnxruntime does not take is taken back (`Impossible`). Constants come in
every spelling that ONNX has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from benchmarks.hostile.oracle import session

Array = npt.NDArray[Any]
Rng = np.random.Generator
F32 = np.float32
MICROSOFT = "com.microsoft"
SAMPLES = 5
NAMES = (
    "{}",
    "/layer.{}/out_0",
    "a b {}",
    "ß→{}",
    "{}",
    "node:{}@x",
    "'{}\"",
    "{}" + "x" * 90,
    "n-{}.weight",
    "_{}",
)
IR_OF = {
    10: (5, 6),
    11: (6, 7),
    12: (7, 8),
    13: (7, 8),
    15: (8, 9),
    17: (8, 9),
    19: (9, 10),
    21: (10, 11),
}


RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli")


class Impossible(Exception):
    """onnxruntime does not take the node."""


@dataclass(eq=False)
class Value:
    """A tensor of the graph. `samples` holds one array of a constant, else one of every sample
    input. Codes know their scale and zero point."""

    name: str
    samples: list[Array]
    constant: bool = False
    scale: Array | None = None
    zero: Array | None = None
    tensor: onnx.TensorProto | None = None  # of a constant that NumPy has no type for

    @property
    def array(self) -> Array:
        return self.samples[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.samples[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.samples[0].dtype

    @property
    def reals(self) -> list[Array]:
        """What codes stand for, per tensor."""
        assert self.scale is not None and self.zero is not None
        return [(s.astype(F32) - self.zero.astype(F32)) * self.scale for s in self.samples]


@dataclass
class Maker:
    """A graph under construction."""

    rng: Rng
    opset: int = 21
    inputs: list[Value] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)  # initializers that are listed as inputs too
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    known: list[Value] = field(default_factory=list)  # constants, to be shared
    count: int = 0
    style: str = "{}"
    random: bool = False  # some node is no function of its inputs
    dyadic: bool = False  # scales are powers of two, so that ties are frequent

    # -- names and choices

    def name(self) -> str:
        self.count += 1
        return self.style.format(self.count)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def scale(self, size: float) -> np.float32:
        """A scale of about this size."""
        size = min(max(size, 1e-6), 1e6)
        if self.dyadic:
            return F32(2.0 ** np.rint(np.log2(size)))
        return F32(round(size, 3)) if self.chance(0.3) and size > 0.01 else F32(size)

    # -- constants

    def const(
        self, value: npt.ArrayLike | None, dtype: npt.DTypeLike | None = None, plain: bool = False
    ) -> Value:
        """A constant in one of its spellings, or one that is there already."""
        array: Array = np.asarray(value, dtype)
        if not plain and self.chance(0.4):
            for own in self.known:
                if (
                    own.dtype == array.dtype
                    and own.shape == array.shape
                    and own.array.tobytes() == array.tobytes()
                ):
                    return own
        forms = [
            self._initializer,
            self._initializer,
            self._initializer,
            self._listed,
            self._node,
            self._short,
        ]
        forms += [
            self._identity,
            self._filled,
            self._reshaped,
            self._cast,
            self._sparse,
            self._joined,
            self._typed,
        ]
        for _ in range(4):
            form = self._initializer if plain or self.chance(0.6) else self.pick(*forms)
            try:
                made = form(array)
            except Impossible:
                continue
            if made.array.dtype == array.dtype and made.array.tobytes() == array.tobytes():
                self.known.append(made)
                return made
        return self._initializer(array)

    def _initializer(self, array: Array) -> Value:
        own = Value(self.name(), [array], True)
        self.initializers.append(numpy_helper.from_array(array, own.name))
        return own

    def _typed(self, array: Array) -> Value:
        """In the field of its type instead of raw bytes."""
        own = Value(self.name(), [array], True)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.initializers.append(
            helper.make_tensor(own.name, kind, array.shape, array.reshape(-1).tolist())
        )
        return own

    def _listed(self, array: Array) -> Value:
        own = self._initializer(array)
        self.listed.append(own.name)
        return own

    def _node(self, array: Array) -> Value:
        return self.node("Constant", value=numpy_helper.from_array(array, "v"))

    def _short(self, array: Array) -> Value:
        """value_float, value_floats, value_int, value_ints."""
        kind = {np.dtype(F32): "float", np.dtype(np.int64): "int"}.get(array.dtype)
        if kind is None or array.ndim > 1 or self.opset < 12:
            raise Impossible
        value = array.tolist()
        return self.node("Constant", **{f"value_{kind}" + ("s" if array.ndim else ""): value})

    def _identity(self, array: Array) -> Value:
        return self.node("Identity", self.pick(self._initializer, self._node)(array))

    def _filled(self, array: Array) -> Value:
        if array.size == 0 or (array != array.reshape(-1)[0]).any():
            raise Impossible
        shape = self._initializer(np.array(array.shape, np.int64))
        return self.node(
            "ConstantOfShape", shape, value=numpy_helper.from_array(array.reshape(-1)[:1], "v")
        )

    def _reshaped(self, array: Array) -> Value:
        flat = self._initializer(array.reshape(-1))
        return self.node("Reshape", flat, self._initializer(np.array(array.shape, np.int64)))

    def _cast(self, array: Array) -> Value:
        other = self.pick(np.float32, np.int32, np.int64, np.float64)
        if other == array.dtype or (array.astype(other).astype(array.dtype) != array).any():
            raise Impossible
        return self.node(
            "Cast",
            self._initializer(array.astype(other)),
            to=helper.np_dtype_to_tensor_dtype(array.dtype),
        )

    def _sparse(self, array: Array) -> Value:
        if (
            array.ndim != 1
            or array.dtype not in (np.dtype(F32), np.dtype(np.int64))
            or self.opset < 11
            or array.size < 2
        ):
            raise Impossible
        at = np.flatnonzero(array)
        own = helper.make_sparse_tensor(
            numpy_helper.from_array(array[at], "v"),
            numpy_helper.from_array(at.astype(np.int64), "i"),
            array.shape,
        )
        return self.node("Constant", sparse_value=own)

    def _joined(self, array: Array) -> Value:
        if array.ndim == 0 or array.shape[0] < 2:
            raise Impossible
        parts = [self._initializer(array[:1]), self._initializer(array[1:])]
        return self.node("Concat", *parts, axis=self.pick(0, -array.ndim))

    def odd_float(self, array: Array) -> Value:
        """About this float32 constant: one that only the runtime knows to the last bit."""
        small = np.rint(
            np.clip(array / max(float(np.abs(array).max()), 1e-6) * 20, -100, 100)
        ).astype(np.int8)
        step = F32(max(float(np.abs(array).max()), 1e-6) / 20)
        if step <= 1e-5:
            return self.const(array)
        zero = self.const(np.zeros((), np.int8))
        real = self.node("DequantizeLinear", self.const(small), self.const(step), zero)
        op = self.pick(
            "Tanh", "Erf", "Sigmoid", "Softplus", "Atan", "Identity", "Exp", "Sqrt", "Div"
        )
        if op == "Div":
            return self.node("Div", real, self.const(F32(1.7)))
        if op == "Sqrt":
            real = self.node("Abs", real)
        made = self.node(op, real)
        if self.chance(0.3):  # a branch of constants with quantizers of its own
            two = (
                self.const(F32(step * 3)),
                self.const(np.array(int(self.rng.integers(256)), np.uint8)),
            )
            made = self.node("DequantizeLinear", self.node("QuantizeLinear", made, *two), *two)
        return made

    def four_bits(self, value: Value) -> Value:
        """A constant's integers as INT4 or UINT4."""
        low = int(value.array.min())
        kind = onnx.TensorProto.INT4 if low < 0 or self.chance(0.5) else onnx.TensorProto.UINT4
        own = Value(self.name(), [value.array], True)
        own.tensor = helper.make_tensor(
            own.name, kind, value.shape, value.array.reshape(-1).astype(int).tolist()
        )
        self.initializers.append(own.tensor)
        return own

    def ints(self, values: Sequence[int]) -> Value:
        """An int64 vector, sometimes by shape arithmetic."""
        array = np.array(values, np.int64)
        if self.chance(0.15) and self.inputs:
            whole = self.node("Shape", self.inputs[0])
            try:
                first = self.node("Gather", whole, self.const(np.array([0], np.int64)))
                nothing = self.node("Sub", first, first)
                return (
                    self.node("Add", self.const(array), nothing)
                    if array.size
                    else self.const(array)
                )
            except Impossible:
                pass
        return self.const(array)

    # -- nodes

    def node(self, op: str, *inputs: Value | None, domain: Any = "", **attributes: Any) -> Value:
        """The node's first output; Impossible where onnxruntime does not take it. Empty inputs at
        the end are kept."""
        return self.split(op, *inputs, domain=domain, outputs=1, **attributes)[0]

    def split(
        self, op: str, *inputs: Value | None, domain: Any = "", outputs: int, **attributes: Any
    ) -> list[Value]:
        """The node's outputs."""
        names = [self.name() for _ in range(outputs)]
        proto = helper.make_node(
            op,
            [i.name if i is not None else "" for i in inputs],
            names,
            name=self.pick("", f"{op}_{names[0]}", f"{op}_{names[0]}"),
            domain=domain,
            **attributes,
        )
        given = [i for i in inputs if i is not None]
        results = self.run(proto, given)
        self.nodes.append(proto)
        constant = all(i.constant for i in given) and op not in RANDOM
        self.random |= op in RANDOM or (op == "Dropout" and len(inputs) > 2)
        return [Value(name, [r[k] for r in results], constant) for k, name in enumerate(names)]

    def probe(
        self, op: str, *inputs: Value | None, domain: Any = "", **attributes: Any
    ) -> list[Array]:
        """What the node would give, on every sample; it is not added."""
        proto = helper.make_node(
            op,
            [i.name if i is not None else "" for i in inputs],
            ["y"],
            domain=domain,
            **attributes,
        )
        return [r[0] for r in self.run(proto, [i for i in inputs if i is not None])]

    def floats(self, value: Value) -> Value:
        """A value that stands for codes' real numbers, for `probe`."""
        return Value(f"real of {value.name}", value.reals, value.constant)

    def run(self, proto: onnx.NodeProto, inputs: Sequence[Value]) -> list[list[Array]]:
        distinct = {i.name: i for i in inputs}
        infos = [
            helper.make_tensor_value_info(i.name, helper.np_dtype_to_tensor_dtype(i.dtype), i.shape)
            for i in distinct.values()
            if not i.constant
        ]
        constants = [
            i.tensor or numpy_helper.from_array(i.array, i.name)
            for i in distinct.values()
            if i.constant
        ]
        results = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        graph = helper.make_graph([proto], "one", infos, results, constants)
        model = self.wrapped(graph, 10)
        try:
            own = session(model.SerializeToString())
            runs = SAMPLES if infos else 1
            found = [
                [
                    np.asarray(r)
                    for r in own.run(
                        None, {i.name: i.samples[k] for i in distinct.values() if not i.constant}
                    )
                ]
                for k in range(runs)
            ]
        except Exception as error:
            raise Impossible(str(error)) from None
        if any(r.size > 4096 or r.size == 0 for r in found[0]):
            raise Impossible("too large, or empty")
        return found

    def wrapped(self, graph: onnx.GraphProto, ir: int) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir)

    def attempt(self, step: Callable[[Maker, Value], Value], x: Value) -> Value | None:
        """The step's result, or None with the graph as it was."""
        before = [
            len(part)
            for part in (self.initializers, self.nodes, self.listed, self.known, self.inputs)
        ]
        try:
            return step(self, x)
        except (Impossible, ValueError, IndexError, TypeError, AssertionError, ArithmeticError):
            for part, length in zip(
                (self.initializers, self.nodes, self.listed, self.known, self.inputs),
                before,
                strict=True,
            ):
                del part[length:]  # type: ignore[attr-defined]
            return None

    # -- the file

    def model(self, outputs: Sequence[Value]) -> onnx.ModelProto:
        """The file; without nodes and constants that nothing needs, but for a few."""
        needed = {o.name for o in outputs}
        nodes: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output) or self.chance(0.03):
                nodes.append(node)
                needed.update(node.input)
        kinds = [
            helper.make_tensor_value_info(i.name, helper.np_dtype_to_tensor_dtype(i.dtype), i.shape)
            for i in self.inputs
        ]
        constants = [i for i in self.initializers if i.name in needed or self.chance(0.05)]
        old = self.opset < 13 and self.chance(0.1)
        for tensor in constants:
            if old or tensor.name in self.listed:
                kinds.append(
                    helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims))
                )
        typed = self.chance(0.5)
        results = [
            helper.make_tensor_value_info(o.name, helper.np_dtype_to_tensor_dtype(o.dtype), o.shape)
            if typed
            else onnx.ValueInfoProto(name=o.name)
            for o in outputs
        ]
        graph = helper.make_graph(list(reversed(nodes)), "hostile", kinds, results, constants)
        near = max(k for k in IR_OF if k <= self.opset)
        return self.wrapped(graph, 3 if old else self.pick(*IR_OF[near]))


def size(shape: Sequence[int]) -> int:
    return prod(shape)
