"""From an ONNX graph to the integer network: node by node, through the rules; nothing is skipped.

A node whose inputs are all constants is computed by onnxruntime itself; a node that has no rule stops the reading with
its name, op, input types and a hint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

import qverify.frontend.rules  # noqa: F401  (registers the rules)
from qverify import runtime
from qverify.errors import ModelError, UnsupportedModel
from qverify.frontend.builder import Builder, Identity, Refusal
from qverify.frontend.canonical import canonical_codes, canonical_values, digest
from qverify.frontend.registry import CONTROL_FLOW, RANDOM, RULES, View, refuse_unknown
from qverify.frontend.simplify import simplified
from qverify.frontend.tensors import Codes, FloatAcc, FloatInput, FloatSum, Tensor
from qverify.network import Network, Node
from qverify.ops import Type

HINTS = {
    **dict.fromkeys(
        ("Conv", "FusedConv", "FusedGemm", "ConvTranspose", "Einsum"),
        "onnxruntime computes it in float, in an order of additions that it does not promise. It makes integer ops of a "
        "QDQ group when input, weights and output are all quantized; uint8 activations fuse most surely "
        "(quantize_static with activation_type=QuantType.QUInt8)",
    ),
    **dict.fromkeys(
        ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"),
        "dynamic quantization depends on each input's range; quantize statically (onnxruntime quantize_static)",
    ),
    **dict.fromkeys(
        ("Quant", "BipolarQuant", "IntQuant", "MultiThreshold", "Trunc", "FloatQuant"),
        "export as QDQ or QCDQ instead of QONNX",
    ),
    "MatMulNBits": "it quantizes activations at run time; use 8-bit QDQ weights and activations",
    "Softmax": "compare the scores before it, or let the exporter quantize it",
}

Output = Codes | FloatAcc | FloatSum
MAX_INPUTS = 2**24  # elements of one input: a shape is believed before anything bounds it
GraphValue = tuple[str, tuple[int, ...], np.dtype[Any]]  # name, shape, element type


@dataclass(frozen=True, eq=False)
class Lowered:
    """What reading a graph gives: the network, how inputs become codes, and what each graph output is."""

    network: Network
    inputs: tuple[GraphValue, ...]
    encoders: tuple[Any, ...]  # Quantizer | Identity, in the order of the code vector
    outputs: tuple[tuple[str, Output], ...]
    saturable: tuple[str, ...]  # nodes that an x86 CPU without VNNI may compute differently

    @property
    def graph_outputs(self) -> tuple[GraphValue, ...]:
        """(name, shape, dtype) of each graph output."""
        float32 = np.dtype(np.float32)
        return tuple((name, t.shape, t.dtype if isinstance(t, Codes) else float32) for name, t in self.outputs)

    def digest(self) -> str:
        """SHA-256 of all of this but names: equal where values and codes have the same numbers and meaning."""
        inputs = [(shape, dtype) for _, shape, dtype in self.inputs]
        return digest(self.network, self.encoders, inputs, [output for _, output in self.outputs])


@dataclass(frozen=True, eq=False)
class ReadNode:
    """One node as it was read: its inputs (None: absent) and outputs, and the part `values[first:last]` of the network's
    nodes, not yet simplified, that its rule made."""

    node: onnx.NodeProto
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Trace:
    """How a graph was read, node by node, but for those that onnxruntime itself computed since all inputs are constants."""

    nodes: tuple[ReadNode, ...]
    values: tuple[Node, ...]  # of the network as the rules made it
    encoders: tuple[Any, ...]  # Quantizer | Identity, as the rules made them
    opsets: tuple[onnx.OperatorSetIdProto, ...]


def lower(model: onnx.ModelProto) -> tuple[Lowered, Trace]:
    """Read a graph. Raises UnsupportedModel for a node without a rule, ModelError for a broken graph."""
    graph = model.graph
    builder = Builder()
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    env: dict[str, Tensor] = {i.name: _initializer(i) for i in graph.initializer}
    stored = frozenset(env)
    inputs = _declare_inputs(graph, env, builder)
    read = [_read_node(node, env, stored, builder, opsets, list(model.opset_import)) for node in graph.node]
    made, encoders = tuple(builder.nodes), tuple(builder.encoders)
    trace = Trace(tuple(r for r in read if r is not None), made, encoders, tuple(model.opset_import))
    outputs = _close_outputs(graph, env, builder)
    if not builder.encoders:
        raise UnsupportedModel("no output depends on a quantized input: this is not a quantized network")
    low, high = {e.low for e in builder.encoders}, {e.high for e in builder.encoders}
    if len(low) > 1 or len(high) > 1:
        raise UnsupportedModel("inputs quantized to int8 and to uint8 in one network are not supported")
    nodes, ordered = canonical_codes(builder.nodes, builder.encoders)
    size = sum(len(e.source) for e in ordered)
    values = tuple(codes_of(t).value for _, t in outputs)
    network, number = simplified(Network(Type((size,), low.pop(), high.pop()), tuple(nodes), values))
    network, last = canonical_values(network)
    outputs = [(name, _renumbered(output, network, [last[k] for k in number])) for name, output in outputs]
    saturable = tuple(builder.saturable)
    return Lowered(network, tuple(inputs), tuple(ordered), tuple(outputs), saturable), trace


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


def _initializer(tensor: onnx.TensorProto) -> npt.NDArray[Any]:
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"the initializer '{tensor.name}' cannot be read: {error}") from None


def _declare_inputs(graph: onnx.GraphProto, env: dict[str, Tensor], builder: Builder) -> list[GraphValue]:
    inputs: list[GraphValue] = []
    start = 0
    for item in graph.input:
        if item.name in env:
            continue  # an initializer listed as input (IR version 3) keeps its value
        shape = _static_shape(item)
        try:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type))
        except KeyError:
            raise ModelError(f"the input '{item.name}' has no known element type") from None
        size = prod(shape)
        if size > MAX_INPUTS:
            raise UnsupportedModel(f"the input '{item.name}' has {size} elements; at most {MAX_INPUTS} are supported")
        source = np.arange(start, start + size, dtype=np.int64)
        if dtype == np.float32:
            env[item.name] = FloatInput(source.reshape(shape), np.zeros(shape, np.float32))
        elif dtype in (np.dtype(np.uint8), np.dtype(np.int8)):
            info = np.iinfo(dtype)
            env[item.name] = builder.add_encoder(Identity(source, int(info.min), int(info.max)), shape, dtype)
        else:
            raise UnsupportedModel(f"the input '{item.name}' is {dtype}; float32, uint8 and int8 are supported")
        inputs.append((item.name, shape, dtype))
        start += size
    if not inputs:
        raise ModelError("the graph has no input")
    return inputs


def _static_shape(item: onnx.ValueInfoProto) -> tuple[int, ...]:
    """The declared shape; a dynamic first axis is the batch and becomes 1, any other dynamic axis is refused."""
    if not item.type.HasField("tensor_type") or not item.type.tensor_type.HasField("shape"):
        raise UnsupportedModel(f"the input '{item.name}' has no tensor shape; export it with a fixed shape")
    shape = []
    for axis, dim in enumerate(item.type.tensor_type.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            shape.append(dim.dim_value)
        elif axis == 0 and not (dim.HasField("dim_value") and dim.dim_value <= 0 and dim.dim_value != -1):
            shape.append(1)
        else:
            name = dim.dim_param or "?"
            raise UnsupportedModel(f"axis {axis} of the input '{item.name}' is dynamic ({name}); export a fixed shape")
    return tuple(shape)


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    shape = list(tensor.shape)
    if isinstance(tensor, np.ndarray):
        return f"constant {tensor.dtype}{shape}"
    return f"{tensor.dtype}{shape}" if isinstance(tensor, Codes) else f"float32{shape}"


def _read_node(
    node: onnx.NodeProto,
    env: dict[str, Tensor],
    stored: frozenset[str],
    builder: Builder,
    opsets: dict[str, int],
    imports: list[onnx.OperatorSetIdProto],
) -> ReadNode | None:
    """Evaluate one node into `env`. None where onnxruntime did it."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    inputs: list[Tensor | None] = []
    for name in node.input:
        if name and name not in env:
            raise ModelError(f"node '{node.name}' ({node.op_type}) reads '{name}', which nothing computes")
        inputs.append(env[name] if name else None)
    builder.node_name = re.sub(r"(_token_\d+)$", "", node.name) or next(iter(node.output), "")  # a copy's suffix
    first = len(builder.nodes)
    op = f"{domain}.{node.op_type}" if domain else node.op_type
    where = f"node '{builder.node_name}' ({op} of {', '.join(_describe(i) for i in inputs)})"
    try:
        # An infinity may still be clipped by a quantizer; NaN never becomes a code.
        with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="raise"):
            results = _evaluate(node, inputs, stored, builder, domain, opsets.get(domain, 1), imports)
        for k, name in enumerate(node.output[len(results) :], len(results)):
            if name:
                raise Refusal(f"its output {k} ('{name}') is not supported")
    except Refusal as refusal:
        raise UnsupportedModel(f"{where}: {refusal}") from None
    except UNREADABLE as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedModel(
            f"{where}: it cannot be read ({text}); if onnxruntime runs the model, please report this"
        ) from error
    results = tuple(np.asarray(result) if isinstance(result, np.generic) else result for result in results)
    env.update((name, result) for name, result in zip(node.output, results, strict=False) if name)
    if all(tensor is None or isinstance(tensor, np.ndarray) for tensor in inputs):
        return None
    return ReadNode(node, builder.node_name, tuple(inputs), results, first, len(builder.nodes))


# What a rule, written for well-formed nodes, meets in others, or where it is wrong itself.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


def _evaluate(
    node: onnx.NodeProto,
    inputs: list[Tensor | None],
    stored: frozenset[str],
    builder: Builder,
    domain: str,
    opset: int,
    imports: list[onnx.OperatorSetIdProto],
) -> tuple[Tensor, ...]:
    constants = [i for i in inputs if i is None or isinstance(i, np.ndarray)]
    if len(constants) == len(inputs) and _is_function(node.op_type, domain, opset):
        return runtime.constant_node(node, constants, [name in stored for name in node.input], imports)
    rule = RULES.get((domain, node.op_type))
    if rule is None:
        raise Refusal(HINTS.get(node.op_type, "no exact integer rule exists for this op"))
    refuse_unknown(node, rule, domain, opset)
    value = rule.function(View(node, inputs, builder, opset, imports, rule.attributes))
    return value if isinstance(value, tuple) else (value,)


def _is_function(op: str, domain: str, opset: int) -> bool:
    """Whether an op is known to give the same result for the same inputs every time: what may be computed once, when the
    model is read. Of Microsoft's ops, those that have a rule are."""
    if domain:
        return (domain, op) in RULES
    return op not in RANDOM | CONTROL_FLOW | {"Dropout"} and onnx.defs.has(op, opset, domain)


def _close_outputs(graph: onnx.GraphProto, env: dict[str, Tensor], builder: Builder) -> list[tuple[str, Output]]:
    outputs: list[tuple[str, Output]] = []
    for item in graph.output:
        if item.name not in env:
            raise ModelError(f"the output '{item.name}' is computed by no node")
        tensor = env[item.name]
        builder.node_name = f"output {item.name}"
        if isinstance(tensor, np.ndarray):
            raise UnsupportedModel(f"the output '{item.name}' is a constant")
        try:
            outputs.append(
                (item.name, tensor if isinstance(tensor, Codes | FloatSum) else builder.as_accumulator(tensor))
            )
        except Refusal:
            raise UnsupportedModel(
                f"the output '{item.name}' does not pass a quantizer: a float network cannot be verified exactly; "
                "quantize it first (for instance with onnxruntime's quantize_static)"
            ) from None
        except ValueError as error:  # a function of two codes that is not monotone in each
            raise UnsupportedModel(f"the output '{item.name}': {error}; quantize it first") from None
    return outputs


def codes_of(output: Output) -> Codes:
    """The integer value behind a graph output."""
    if isinstance(output, Codes):
        return output
    return output.codes if isinstance(output, FloatAcc) else output.acc.codes
