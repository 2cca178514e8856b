"""From an ONNX graph to the integer network: node by node, through the rules; nothing is skipped.

A node whose inputs are all constants is computed by onnxruntime itself. What cannot be read is told
all at once, with its name, op, input types and a hint. A node that needs what such a node gives is
named as well only where no input would help.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

import qverify.frontend.rules  # noqa: F401  (registers the rules)
from qverify import runtime
from qverify.deadline import looking
from qverify.errors import ModelError, UnsupportedModel
from qverify.frontend.blockers import Blocker, refused
from qverify.frontend.builder import Builder, Identity, Refusal
from qverify.frontend.canonical import canonical_codes, canonical_values, digest
from qverify.frontend.diagnose import IN_FLOAT, PRODUCTS, Diagnosis, spelled
from qverify.frontend.registry import CONTROL_FLOW, RANDOM, RULES, View, refuse_unknown
from qverify.frontend.simplify import simplified
from qverify.frontend.tensors import Codes, FloatAcc, FloatInput, FloatSum, Tensor
from qverify.network import Network, Node
from qverify.ops import Type, Unfit

Output = Codes | FloatAcc | FloatSum
MAX_INPUTS = 2**24  # elements of one input: a shape is believed before anything bounds it
GraphValue = tuple[str, tuple[int, ...], np.dtype[Any]]  # name, shape, element type


@dataclass(frozen=True, eq=False)
class Lowered:
    """What reading a graph gives.

    The network, how inputs become codes, and what each graph output is.
    """

    network: Network
    inputs: tuple[GraphValue, ...]
    encoders: tuple[Any, ...]  # Quantizer | Identity, in the order of the code vector
    outputs: tuple[tuple[str, Output], ...]
    saturable: tuple[str, ...]  # nodes that an x86 CPU without VNNI may compute differently

    @property
    def graph_outputs(self) -> tuple[GraphValue, ...]:
        """(name, shape, dtype) of each graph output."""
        float32 = np.dtype(np.float32)
        return tuple(
            (name, t.shape, t.dtype if isinstance(t, Codes) else float32)
            for name, t in self.outputs
        )

    def digest(self) -> str:
        """SHA-256 of all of this without names.

        Equal where values and codes have the same numbers and meaning.
        """
        inputs = [(shape, dtype) for _, shape, dtype in self.inputs]
        return digest(self.network, self.encoders, inputs, [output for _, output in self.outputs])


@dataclass(frozen=True, eq=False)
class ReadNode:
    """One node as it was read: its inputs (None: absent) and outputs.

    `values[first:last]` are the nodes of the network, not yet simplified, that its rule made.
    """

    node: onnx.NodeProto
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Trace:
    """How a graph was read, node by node.

    Without the nodes that onnxruntime computed because all their inputs are constants.
    """

    nodes: tuple[ReadNode, ...]
    values: tuple[Node, ...]  # of the network as the rules made it
    encoders: tuple[Any, ...]  # Quantizer | Identity, as the rules made them
    opsets: tuple[onnx.OperatorSetIdProto, ...]


def lower(model: onnx.ModelProto, file: onnx.ModelProto | None = None) -> tuple[Lowered, Trace]:
    """Read a graph; `file` is what the runtime made it of, whose names the user knows.

    Raises UnsupportedModel for nodes that no rule reads, ModelError for a broken graph.
    """
    reader = _GraphReader(model, Diagnosis(model.graph, (file or model).graph))
    inputs = reader.declare_inputs()
    read = [reader.node(node) for node in looking(model.graph.node)]
    trace = reader.trace([node for node in read if node is not None])
    outputs = reader.outputs()
    if reader.blockers:
        raise refused(reader.blockers, reader.behind)
    return _lowered(reader.builder, inputs, outputs), trace


def _lowered(
    builder: Builder, inputs: list[GraphValue], outputs: list[tuple[str, Output]]
) -> Lowered:
    """The network that the rules have built, simplified and in its canonical order."""
    ranges = {(encoder.low, encoder.high) for encoder in builder.encoders}
    if not ranges:
        raise UnsupportedModel(
            "no output depends on a quantized input: this is not a quantized network"
        )
    if len(ranges) > 1:
        raise UnsupportedModel(
            "inputs quantized to int8 and to uint8 in one network are not supported"
        )
    nodes, encoders = canonical_codes(builder.nodes, builder.encoders)
    codes = Type((sum(len(encoder.source) for encoder in encoders),), *ranges.pop())
    built = Network(codes, tuple(nodes), tuple(codes_of(output).value for _, output in outputs))
    network, simpler = simplified(built)
    network, last = canonical_values(network)
    number = [last[k] for k in simpler]  # of every value that was built, in the network
    renumbered = tuple((name, _renumbered(output, network, number)) for name, output in outputs)
    return Lowered(network, tuple(inputs), tuple(encoders), renumbered, tuple(builder.saturable))


def _renumbered(output: Output, network: Network, number: list[int]) -> Output:
    if isinstance(output, FloatSum):
        acc = _renumbered(output.acc, network, number)
        assert isinstance(acc, FloatAcc)
        return replace(output, acc=acc)
    if isinstance(output, FloatAcc):
        codes = _renumbered(output.codes, network, number)
        assert isinstance(codes, Codes)
        return replace(output, codes=codes)
    value = number[output.value]
    return replace(output, value=value, type=network.type_of(value))


def initializer(tensor: onnx.TensorProto) -> npt.NDArray[Any]:
    """A constant's array. ModelError where its data does not fit its type and shape."""
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"the initializer '{tensor.name}' cannot be read: {error}") from None


def _static_shape(item: onnx.ValueInfoProto) -> tuple[int, ...]:
    """The declared shape; a dynamic first axis is the batch and becomes 1.

    Any other dynamic axis is refused.
    """
    if not item.type.HasField("tensor_type") or not item.type.tensor_type.HasField("shape"):
        raise UnsupportedModel(
            f"the input '{item.name}' has no tensor shape; give one: --shape {item.name}=1,3,64,64"
        )
    shape: list[int] = []
    for axis, dim in enumerate(item.type.tensor_type.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            shape.append(dim.dim_value)
        elif axis == 0 and not (
            dim.HasField("dim_value") and dim.dim_value <= 0 and dim.dim_value != -1
        ):
            shape.append(1)
        else:
            name = dim.dim_param or "?"
            sizes = ",".join(
                str(d.dim_value) if d.dim_value > 0 else "1" if place == 0 else (d.dim_param or "N")
                for place, d in enumerate(item.type.tensor_type.shape.dim)
            )
            raise UnsupportedModel(
                f"axis {axis} of the input '{item.name}' is dynamic ({name}); fix it with --shape "
                f"{item.name}={sizes}"
            )
    return tuple(shape)


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    shape = list(tensor.shape)
    if isinstance(tensor, np.ndarray):
        return f"constant {tensor.dtype}{shape}"
    return f"{tensor.dtype}{shape}" if isinstance(tensor, Codes) else f"float32{shape}"


@dataclass
class _GraphReader:
    """The state of reading a graph: what its tensors are, and what could not be read."""

    model: onnx.ModelProto
    diagnosis: Diagnosis
    builder: Builder = field(default_factory=Builder)
    blockers: list[Blocker] = field(default_factory=list)
    behind: int = 0  # nodes that need what a blocker gives

    def __post_init__(self) -> None:
        self._imports = list(self.model.opset_import)
        self._opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in self._imports}
        self._env: dict[str, Tensor] = {
            i.name: initializer(i) for i in self.model.graph.initializer
        }
        self._stored = frozenset(self._env)
        self._unread: set[str] = set()  # tensors that would come from what cannot be read
        # Tensor -> the float product that it is, or is moved from.
        self._sums: dict[str, onnx.NodeProto] = {}

    def trace(self, nodes: list[ReadNode]) -> Trace:
        """How the graph was read."""
        built, encoders = tuple(self.builder.nodes), tuple(self.builder.encoders)
        return Trace(tuple(nodes), built, encoders, tuple(self.model.opset_import))

    def declare_inputs(self) -> list[GraphValue]:
        """The inputs of the graph that are not initializers."""
        inputs: list[GraphValue] = []
        start = 0
        for item in self.model.graph.input:
            if item.name in self._env:
                continue  # an initializer listed as input (IR version 3) keeps its value
            try:
                inputs.append(self._declare(item, start))
                start += prod(inputs[-1][1])
            except UnsupportedModel as error:
                self.blockers.append(Blocker(str(error)))
                self._unread.add(item.name)
        if not inputs and not self.blockers:
            raise ModelError("the graph has no input")
        return inputs

    def _declare(self, item: onnx.ValueInfoProto, start: int) -> GraphValue:
        shape = _static_shape(item)
        try:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type))
        except KeyError:
            raise ModelError(f"the input '{item.name}' has no known element type") from None
        size = prod(shape)
        if size > MAX_INPUTS:
            raise UnsupportedModel(
                f"the input '{item.name}' has {size} elements; at most {MAX_INPUTS} are supported"
            )
        source = np.arange(start, start + size, dtype=np.int64)
        if dtype == np.float32:
            self._env[item.name] = FloatInput(source.reshape(shape), np.zeros(shape, np.float32))
        elif dtype in (np.dtype(np.uint8), np.dtype(np.int8)):
            info = np.iinfo(dtype)
            encoder = Identity(source, int(info.min), int(info.max))
            self._env[item.name] = self.builder.add_encoder(encoder, shape, dtype)
        else:
            raise UnsupportedModel(
                f"the input '{item.name}' is {dtype}; float32, uint8 and int8 are supported"
            )
        return item.name, shape, dtype

    def node(self, node: onnx.NodeProto) -> ReadNode | None:
        """Evaluate one node. None where onnxruntime did it, and where it cannot be read."""
        self.builder.node_name = self.diagnosis.name_in_file(node.name) or next(
            iter(node.output), ""
        )
        if any(name in self._unread for name in node.input):
            self._behind(node)
            return None
        inputs: list[Tensor | None] = []
        for name in node.input:
            if name and name not in self._env:
                raise ModelError(
                    f"node '{node.name}' ({node.op_type}) reads '{name}', which nothing computes"
                )
            inputs.append(self._env[name] if name else None)
        first = len(self.builder.nodes)
        try:
            results = self._results(node, inputs)
        except Refusal as refusal:
            self._refuse(node, inputs, str(refusal))
            self._unread.update(name for name in node.output if name)
            return None
        self._env.update(
            (name, result) for name, result in zip(node.output, results, strict=False) if name
        )
        if all(tensor is None or isinstance(tensor, np.ndarray) for tensor in inputs):
            return None
        return ReadNode(
            node, self.builder.node_name, tuple(inputs), results, first, len(self.builder.nodes)
        )

    def _results(self, node: onnx.NodeProto, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
        try:
            # An infinity may still be clipped by a quantizer; NaN never becomes a code.
            with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="raise"):
                results = self._evaluate(node, inputs)
        except FloatingPointError:
            raise Refusal("its arithmetic gives NaN for some codes") from None
        except Unfit as error:
            raise Refusal(str(error)) from None
        except OURS as error:
            error.add_note(f"while reading node '{self.builder.node_name}' ({spelled(node)})")
            raise
        for k, name in enumerate(node.output[len(results) :], len(results)):
            if name:
                raise Refusal(f"its output {k} ('{name}') is not supported")
        results = tuple(
            np.asarray(result) if isinstance(result, np.generic) else result for result in results
        )
        for name, result in zip(node.output, results, strict=False):
            if isinstance(result, FloatSum):
                moved = next((self._sums[i] for i in node.input if i in self._sums), node)
                self._sums[name] = node if node.op_type in PRODUCTS else moved
        return results

    def _evaluate(self, node: onnx.NodeProto, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        opset = self._opsets.get(domain, 1)
        constants = [i for i in inputs if i is None or isinstance(i, np.ndarray)]
        if len(constants) == len(inputs) and _is_function(node.op_type, domain, opset):
            try:
                stored = [name in self._stored for name in node.input]
                return runtime.constant_node(node, constants, stored, self._imports)
            except ModelError as error:
                raise Refusal(str(error)) from None
        rule = RULES.get((domain, node.op_type))
        if rule is None:
            raise Refusal(self._without_rule(node)[0])
        refuse_unknown(node, rule, domain, opset)
        value = rule.function(
            View(node, inputs, self.builder, opset, self._imports, rule.attributes)
        )
        return value if isinstance(value, tuple) else (value,)

    # -- what cannot be read -----------------------------------------------------------------------

    def _without_rule(self, node: onnx.NodeProto) -> tuple[str, str]:
        """What to say of an op that has no rule, and the kind of it."""
        if node.op_type in PRODUCTS:
            return self.diagnosis.product(node) or (IN_FLOAT, IN_FLOAT)
        hint = self.diagnosis.hint(node) or "no exact integer rule exists for this op"
        return hint, hint

    def _refuse(self, node: onnx.NodeProto, inputs: list[Tensor | None], reason: str) -> None:
        """Note why a node cannot be read: for what follows a float product, blame the product."""
        kind = ""
        product = next((self._sums[name] for name in node.input if name in self._sums), None)
        known = (node.domain.replace("ai.onnx", ""), node.op_type) in RULES
        if product is not None and known:
            return self._blame(product, node)
        if node.op_type in PRODUCTS:
            found = self.diagnosis.product(node)
            if found is not None and self.diagnosis.is_head(node):
                reason, kind = f"{reason}; {found[0]}", found[1]
            elif found is not None:
                reason, kind = found
        elif hint := (self.diagnosis.hint(node) if known else ""):
            reason = f"{reason}; {hint}"
        what = f"{self.diagnosis.op_in_file(node)} of {', '.join(map(_describe, inputs))}"
        self.blockers.append(Blocker(reason, self.builder.node_name, what, kind))

    def _blame(self, product: onnx.NodeProto, reader: onnx.NodeProto) -> None:
        """A float product is the last op that can be read, and `reader` follows it."""
        name = self.diagnosis.name_in_file(product.name) or product.output[0]
        if any(blocker.node == name for blocker in self.blockers):
            return
        follows = f"{spelled(reader)} '{self.builder.node_name}' follows"
        reason, kind = self.diagnosis.product(product) or (f"{IN_FLOAT}, but {follows}", IN_FLOAT)
        inputs = ", ".join(_describe(self._env.get(name)) for name in product.input)
        self.blockers.append(
            Blocker(reason, name, f"{self.diagnosis.op_in_file(product)} of {inputs}", kind)
        )

    def _behind(self, node: onnx.NodeProto) -> None:
        """A node that needs what could not be read.

        It is to blame only where it could not be read for any input.
        """
        self._unread.update(name for name in node.output if name)
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) not in RULES:
            reason, kind = self._without_rule(node)
        else:
            lost = node.op_type in PRODUCTS and not self.diagnosis.is_head(node)
            reason, kind = (self.diagnosis.product(node) if lost else None) or ("", "")
        if reason:
            self.blockers.append(
                Blocker(reason, self.builder.node_name, self.diagnosis.op_in_file(node), kind)
            )
        else:
            self.behind += 1

    def outputs(self) -> list[tuple[str, Output]]:
        """What each output of the graph is; without those that could not be read."""
        found: list[tuple[str, Output]] = []
        for item in self.model.graph.output:
            if item.name in self._unread:
                continue
            if item.name not in self._env:
                raise ModelError(f"the output '{item.name}' is computed by no node")
            try:
                found.append((item.name, self._output(item.name)))
            except UnsupportedModel as error:
                self.blockers.append(Blocker(str(error)))
        return found

    def _output(self, name: str) -> Output:
        tensor = self._env[name]
        self.builder.node_name = f"output {name}"
        if isinstance(tensor, np.ndarray):
            raise UnsupportedModel(f"the output '{name}' is a constant")
        try:
            if isinstance(tensor, Codes | FloatSum):
                return tensor
            return self.builder.as_accumulator(tensor)
        except Refusal:
            raise UnsupportedModel(
                f"the output '{name}' does not pass a quantizer: a float network cannot be "
                "verified exactly; quantize it first (for instance with onnxruntime's "
                "quantize_static)"
            ) from None
        except Unfit as error:  # a function of two codes that is not monotone in each
            raise UnsupportedModel(f"the output '{name}': {error}; quantize it first") from None


# What a fault in a rule of ours raises. By then the runtime has accepted the file, so the file is
# not blamed.
OURS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


def _is_function(op: str, domain: str, opset: int) -> bool:
    """Whether an op is known to give the same result for the same inputs every time.

    Such an op may be computed once, when the model is read. Of Microsoft's ops, those that have a
    rule are known.
    """
    if domain:
        return (domain, op) in RULES
    return op not in RANDOM | CONTROL_FLOW | {"Dropout"} and onnx.defs.has(op, opset, domain)


def codes_of(output: Output) -> Codes:
    """The integer value behind a graph output."""
    if isinstance(output, Codes):
        return output
    return output.codes if isinstance(output, FloatAcc) else output.acc.codes
