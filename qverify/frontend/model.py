"""Reads an ONNX file: parse, check, choose the graph that the runtime runs, lower it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from qverify import runtime
from qverify.errors import ModelError, SoundnessError, UnsupportedModel, UsageError
from qverify.files import Damaged, is_packed, unpacked
from qverify.frontend.blockers import Blocker, refused
from qverify.frontend.compare import Compared, compare
from qverify.frontend.diagnose import foreign_nodes, spelled
from qverify.frontend.lower import Lowered, Trace, initializer, lower
from qverify.frontend.registry import RANDOM
from qverify.frontend.shapes import Shape, asked_shapes, batches_of_one, shapes_text


@dataclass(frozen=True, eq=False)
class Model:
    """A model as read; `sha256` covers every byte of it that the runtime reads, `runtime_version`
    names the onnxruntime whose graph was read. `shapes` are those of inputs that were fixed to read
    it (the file leaves them open), with which everything else has to run it too."""

    path: Path
    sha256: str
    lowered: Lowered
    runtime_version: str
    compared: Compared
    shapes: dict[str, Shape]
    assumed: bool  # whether nobody asked for these shapes by --shape
    warnings: tuple[str, ...]

    @property
    def identity(self) -> str:
        """What was read, and by whom: equal for models that the same onnxruntime computes alike."""
        return _identity(self.sha256, self.shapes)


def _identity(sha256: str, shapes: dict[str, Shape]) -> str:
    return f"{sha256} {shapes} {runtime.version()}"


# By identity: a process that decides many queries of a model compares it once.
_COMPARED: dict[str, Compared] = {}


def read_model(path: Path, shapes: Sequence[str] = (), declared: Sequence[Shape] = ()) -> Model:
    """Read and lower an ONNX file: the graph that the installed onnxruntime makes of it and runs.

    `shapes` (NAME=1,3,64,64) fix inputs that the file leaves open, and so do the shapes that a
    property has `declared` for the inputs in order. An open batch is 1; it is fixed only where the
    graph cannot be read otherwise.

    Raises UsageError (unreadable path, wrong shapes, no onnxruntime), ModelError (broken file),
    UnsupportedModel (no exact rule for some node).
    """
    try:
        data, packed = unpacked(path, runtime.MAX_BYTES), is_packed(path)
    except OSError as error:
        raise UsageError(f"cannot read the model '{path}': {error.strerror}") from None
    except Damaged as error:
        raise ModelError(f"{path}: {error}") from None
    try:
        proto, sha256 = _parse(path, data, packed)
        _check_nodes(proto)
        fixed = asked_shapes(proto, shapes, declared)
        lowered, trace, fixed, remarks = _lowered(path, proto, fixed)
        identity = _identity(sha256, fixed)
        if identity not in _COMPARED:
            _COMPARED[identity] = compare(trace, lowered)
        compared = _COMPARED[identity]
        warnings = (*runtime.machine_warnings(), *remarks)
        return Model(
            path, sha256, lowered, runtime.version(), compared, fixed, not shapes, warnings
        )
    except SoundnessError as error:
        raise SoundnessError(f"{path}: {error}") from None
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}", error.blockers) from None
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def _lowered(
    path: Path, proto: onnx.ModelProto, fixed: dict[str, Shape]
) -> tuple[Lowered, Trace, dict[str, Shape], list[str]]:
    """The network and how it was read.

    With the shapes that had to be fixed for it, and a remark on that.
    """

    def read(shapes: dict[str, Shape]) -> tuple[Lowered, Trace]:
        fused = runtime.optimised_graph(path, shapes)
        _drop_folded_inputs(proto, fused)
        return lower(fused, proto)

    batch = {} if fixed else batches_of_one(proto)
    try:
        return *read(fixed), fixed, []
    except UnsupportedModel:
        if not batch:
            raise
    remark = (
        "the file leaves the batch open, and is read with a batch of 1 (--shape "
        f"{shapes_text(batch)}): while it is open, onnxruntime makes fewer integer ops of it. "
        "Export the model with a batch of 1 to run what is verified"
    )
    return *read(batch), batch, [remark]


def _check_nodes(proto: onnx.ModelProto) -> None:
    """Refuse what the file alone tells: other formats, random numbers, networks of floats."""
    blockers = [*foreign_nodes(proto), *_random_nodes(proto), *_crashing_nodes(proto)]
    if blockers:
        raise refused(blockers)
    words = ("Quant", "QLinear", "QGemm", "Integer")
    eight_bit = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    codes = any(item.type.tensor_type.elem_type in eight_bit for item in proto.graph.input)
    if not codes and not any(word in node.op_type for node in proto.graph.node for word in words):
        raise UnsupportedModel(
            "no node quantizes anything to 8-bit codes: a float network, or one in a format that "
            "is not supported (see specs/semantics.md). Quantize it, for instance with "
            "onnxruntime's quantize_static"
        )


def _random_nodes(proto: onnx.ModelProto) -> Iterator[Blocker]:
    """Nodes that draw random numbers.

    This has to be asked of the file: onnxruntime may fold such a node into a constant, another one
    every time that it loads the model.
    """
    constants = {i.name: i for i in proto.graph.initializer}
    for node in _messages(proto, onnx.NodeProto):
        training = node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]
        if training and node.input[2] in constants:
            training = initializer(constants[node.input[2]]).any()
        if node.op_type in RANDOM or training:
            reason = (
                "it draws random numbers: what the model computes is not a function of its input. "
                "Export it for inference"
            )
            yield Blocker(reason, node.name, node.op_type)


def _crashing_nodes(proto: onnx.ModelProto) -> Iterator[Blocker]:
    """Nodes that end the whole process (measured: onnxruntime 1.32): a QLinearWhere looks for its
    parameters among the constants that the file stores, a QLinearConcat for each of its inputs, an
    activation for its output's zero point, and none sees whether they are there."""
    stored = {tensor.name for tensor in proto.graph.initializer} - {
        item.name for item in proto.graph.input
    }
    stored |= {
        name for node in proto.graph.node if node.op_type == "Constant" for name in node.output
    }
    for node in _messages(proto, onnx.NodeProto):
        given = [name for k, name in enumerate(node.input) if k not in (0, 1, 4)]
        if node.op_type == "QLinearWhere" and not stored.issuperset(given):
            reason = (
                "onnxruntime crashes where its scales and zero points are not constants that the "
                "file stores"
            )
            yield Blocker(reason, node.name, spelled(node))
        if node.op_type == "QLinearConcat" and "" in node.input:
            yield Blocker(
                "onnxruntime crashes where one of its inputs is left out", node.name, spelled(node)
            )
        if node.op_type in ("QLinearLeakyRelu", "QLinearSigmoid") and len(node.input) < 5:
            yield Blocker(
                "onnxruntime crashes where it has no zero point of its output",
                node.name,
                spelled(node),
            )


def _drop_folded_inputs(proto: onnx.ModelProto, fused: onnx.ModelProto) -> None:
    """Old files list initializers as inputs too.

    One that was folded away, or made by folding, is not an input of the file.
    """
    inputs = {i.name for i in proto.graph.input} - {i.name for i in proto.graph.initializer}
    kept = [i for i in fused.graph.input if i.name in inputs]
    del fused.graph.input[:]
    fused.graph.input.extend(kept)


def _parse(path: Path, data: bytes, packed: bool) -> tuple[onnx.ModelProto, str]:
    """The model, and the SHA-256 of the file with what it keeps in other files."""
    proto, digest = onnx.ModelProto(), hashlib.sha256(data)
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError("not an ONNX file, or a truncated one") from None
    if not proto.graph.node or not proto.graph.output:
        raise ModelError("not an ONNX file, or its graph is empty")
    if any(isinstance(name, bytes) for name in _names(proto)):
        raise ModelError("a damaged file: a name in it is not UTF-8 text")
    for tensor in _messages(proto, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if packed:  # it is handed over in memory, where it has no folder
                raise ModelError(
                    "it keeps data in other files, which a packed model has no place for: unpack it"
                )
            place = {entry.key: entry.value for entry in tensor.external_data}
            runtime.load_external(tensor, path)
            # Its place and length too: cut otherwise, the same bytes are other weights.
            digest.update(f"{sorted(place.items())} {len(tensor.raw_data)} ".encode())
            digest.update(tensor.raw_data)
    if proto.functions:
        raise UnsupportedModel(
            "model-local functions are not supported; inline them (onnx.inliner)"
        )
    _check_references(proto.graph)
    return proto, digest.hexdigest()


def _messages(message: Any, kind: type[Message]) -> Iterator[Any]:
    """All messages of a type inside another one, in attributes, subgraphs and functions too."""
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for part in value if hasattr(value, "__len__") else (value,):
                if isinstance(part, kind):
                    yield part
                elif isinstance(part, Message):
                    yield from _messages(part, kind)


def _names(proto: onnx.ModelProto) -> Iterator[Any]:
    """Everything that is text. Protobuf hands out bytes where it is not UTF-8."""
    graph = proto.graph
    for node in graph.node:
        yield from (node.op_type, node.name, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for item in (*graph.input, *graph.output, *graph.initializer):
        yield item.name
    for item in graph.input:
        yield from (dim.dim_param for dim in item.type.tensor_type.shape.dim)
    yield from (opset.domain for opset in proto.opset_import)


def _check_references(graph: onnx.GraphProto) -> None:
    """Every name that a node reads is an input, an initializer or an earlier node's output."""
    known = {i.name for i in graph.input} | {i.name for i in graph.initializer}
    known |= {i.values.name for i in graph.sparse_initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise ModelError(
                    f"node '{node.name}' ({node.op_type}) reads '{name}', which is neither an "
                    "input, nor an initializer, nor computed by an earlier node"
                )
        known.update(node.output)
