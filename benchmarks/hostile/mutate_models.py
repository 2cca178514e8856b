"""Changes of ONNX files at the level of protobuf: a function changes the model, or returns the
bytes of a file."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.hostile.mutation_bases import Array, Rng

Change = Callable[[onnx.ModelProto, Rng], "bytes | None"]
NAMES = (
    "",
    "x0",
    "n1",
    "c0",
    "\n",
    "\u202e",
    "a" * 3000,
    "accepted unsat\nunsat",
    "é",
    "{}",
    "%s",
    "../../etc",
)


def one(rng: Rng, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def node_of(model: onnx.ModelProto, rng: Rng) -> onnx.NodeProto:
    return one(rng, model.graph.node)


def change_array(model: onnx.ModelProto, rng: Rng) -> None:
    """A constant's numbers: scales of NaN, 0, subnormals, infinities and below 0; codes at their
    ends."""
    tensor = one(rng, model.graph.initializer)
    array = numpy_helper.to_array(tensor).copy()
    if not array.size:
        return
    flat = array.reshape(-1)
    at = rng.integers(flat.size, size=1 if rng.random() < 0.7 else flat.size)
    if array.dtype.kind == "f":
        special = [
            0.0,
            -0.0,
            np.nan,
            np.inf,
            -np.inf,
            1e-45,
            3.4e38,
            -1.0,
            1e-38,
            float(flat[0]) * 2,
            float(flat[0]) / 3,
        ]
        flat[at] = np.float32(one(rng, special))
    else:
        info = np.iinfo(array.dtype)
        flat[at] = one(
            rng,
            [info.min, info.max, 0, 1, int(rng.integers(info.min, info.max, dtype=array.dtype))],
        )
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def change_shape(model: onnx.ModelProto, rng: Rng) -> None:
    """A constant's dimensions, with its data as they are or to match."""
    tensor = one(rng, model.graph.initializer)
    if rng.random() < 0.5:
        array = numpy_helper.to_array(tensor)
        shapes: list[Callable[[], Array]] = [
            *(
                lambda: array[None],
                lambda: array.reshape(-1),
                lambda: array.T,
                lambda: array[..., :0],
            ),
            *(
                lambda: np.concatenate([array.reshape(-1)] * 2),
                lambda: np.broadcast_to(array, (2, *array.shape)).copy(),
            ),
        ]
        tensor.CopyFrom(
            numpy_helper.from_array(np.ascontiguousarray(one(rng, shapes)()), tensor.name)
        )
    else:
        dims = list(tensor.dims) or [1]
        dims[int(rng.integers(len(dims)))] = one(
            rng, [0, -1, 1, 2, 7, 2**31, 2**40, 2**62, -(2**63)]
        )
        del tensor.dims[:]
        tensor.dims.extend(dims)


def change_type(model: onnx.ModelProto, rng: Rng) -> None:
    tensor = one(rng, model.graph.initializer)
    if rng.random() < 0.5:
        tensor.data_type = int(rng.integers(0, 26))
    else:
        kind = one(
            rng, [np.float64, np.float16, np.int8, np.uint8, np.int16, np.int32, np.int64, np.bool_]
        )
        with np.errstate(all="ignore"):
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), tensor.name)
            )


def change_data(model: onnx.ModelProto, rng: Rng) -> None:
    """The bytes behind a constant: too few, too many, elsewhere."""
    tensor = one(rng, model.graph.initializer)
    match int(rng.integers(4)):
        case 0:
            tensor.raw_data = tensor.raw_data[: int(rng.integers(len(tensor.raw_data) + 1))]
        case 1:
            tensor.raw_data += rng.bytes(8)
        case 2:
            tensor.float_data.extend([1.0, 2.0])
        case _:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            location = one(rng, ["/etc/passwd", "../x", "missing.bin", "", "\x00", "m.onnx"])
            tensor.external_data.add(key="location", value=location)
            if rng.random() < 0.5:
                tensor.external_data.add(
                    key="offset", value=one(rng, ["-1", "x", str(2**62), "1e9"])
                )


def drop_array(model: onnx.ModelProto, rng: Rng) -> None:
    del model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]


def array_twice(model: onnx.ModelProto, rng: Rng) -> None:
    tensor = onnx.TensorProto()
    tensor.CopyFrom(one(rng, model.graph.initializer))
    if rng.random() < 0.5:
        tensor.name = one(rng, [one(rng, model.graph.node).output[0], model.graph.input[0].name])
    model.graph.initializer.append(tensor)


def rewire(model: onnx.ModelProto, rng: Rng) -> None:
    """A node reads another value: a later one, its own, none."""
    node = node_of(model, rng)
    names = [
        *(name for other in model.graph.node for name in other.output),
        *(tensor.name for tensor in model.graph.initializer),
        *(item.name for item in model.graph.input),
        *NAMES,
    ]
    if node.input and rng.random() < 0.8:
        node.input[int(rng.integers(len(node.input)))] = one(rng, names)
    elif rng.random() < 0.5:
        node.input.append(one(rng, names))
    elif node.input:
        del node.input[int(rng.integers(len(node.input))) :]


def rename(model: onnx.ModelProto, rng: Rng) -> None:
    node = node_of(model, rng)
    name = one(rng, [*NAMES, one(rng, model.graph.node).output[0]])
    if rng.random() < 0.5:
        node.output[0] = name
    else:
        node.name = name


def change_op(model: onnx.ModelProto, rng: Rng) -> None:
    ops = (
        *(
            "Relu",
            "Add",
            "Mul",
            "MatMul",
            "Conv",
            "Softmax",
            "Identity",
            "Transpose",
            "QuantizeLinear",
            "DequantizeLinear",
        ),
        *(
            "QLinearConv",
            "QLinearMatMul",
            "QGemm",
            "QLinearAdd",
            "MaxPool",
            "RandomNormal",
            "If",
            "Loop",
            "Nonsense",
            "\n",
        ),
        *(
            "Dropout",
            "Clip",
            "Concat",
            "Split",
            "Cast",
            "Tanh",
            "ArgMax",
            "TopK",
            "NonZero",
            "Shape",
            "Where",
            "LSTM",
        ),
    )
    node = node_of(model, rng)
    node.op_type = one(rng, ops)
    if rng.random() < 0.3:
        node.domain = one(rng, ["", "ai.onnx", "com.microsoft", "com.example", "ai.onnx.ml", "\n"])


def change_attribute(model: onnx.ModelProto, rng: Rng) -> None:
    node = node_of(model, rng)
    names = (
        "axis",
        "perm",
        "pads",
        "strides",
        "dilations",
        "group",
        "kernel_shape",
        "auto_pad",
        "alpha",
        "transB",
    )
    names += (
        "ceil_mode",
        "storage_order",
        "saturate",
        "block_size",
        "output_dtype",
        "channels_last",
        "to",
        "nonsense",
    )
    known = [attribute.name for attribute in node.attribute]
    name = one(rng, [*names, *known, *known])
    values: list[Any] = [
        0,
        1,
        -1,
        2,
        99,
        2**40,
        [1, 1],
        [0, 0, 0, 0],
        [-1, 2, 3, 4],
        [2**31] * 4,
        0.5,
        float("nan"),
        "SAME_UPPER",
    ]
    values += ["VALID", "", [1.5], onnx.TensorProto.FLOAT16, [3, 3], [2, 2], [1, 0]]
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if rng.random() < 0.8:
        node.attribute.append(helper.make_attribute(name, one(rng, values)))
        if rng.random() < 0.1:
            node.attribute[-1].type = int(rng.integers(0, 15))


def order_nodes(model: onnx.ModelProto, rng: Rng) -> None:
    nodes = list(model.graph.node)
    match int(rng.integers(4)):
        case 0:
            nodes.reverse()
        case 1:
            nodes.pop(int(rng.integers(len(nodes))))
        case 2:
            nodes.append(one(rng, nodes))
        case _:
            nodes.insert(
                0,
                helper.make_node(
                    one(rng, ["Identity", "Relu"]), [one(rng, nodes).output[0]], ["loop"]
                ),
            )
            one(rng, nodes[1:]).input[0] = "loop"
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def change_ends(model: onnx.ModelProto, rng: Rng) -> None:
    """Inputs and outputs of the graph."""
    graph, item = model.graph, one(rng, [*model.graph.input, *model.graph.output])
    match int(rng.integers(7)):
        case 0:
            dims = item.type.tensor_type.shape.dim
            if dims:
                one(rng, dims).dim_value = one(rng, [0, -1, 1, 3, 2**31, 2**62, 10**6])
        case 1:
            dims = item.type.tensor_type.shape.dim
            if dims:
                one(rng, dims).dim_param = one(rng, NAMES)
        case 2:
            item.type.tensor_type.elem_type = int(rng.integers(0, 26))
        case 3:
            item.name = one(rng, [*NAMES, one(rng, graph.node).output[0]])
        case 4:
            item.ClearField("type")
        case 5:
            copied = onnx.ValueInfoProto.FromString(item.SerializeToString())
            (graph.output if rng.random() < 0.5 else graph.input).append(copied)
        case _:
            del graph.output[:]
            graph.output.append(onnx.ValueInfoProto(name=one(rng, [*graph.node]).output[0]))


def change_versions(model: onnx.ModelProto, rng: Rng) -> None:
    match int(rng.integers(4)):
        case 0:
            model.ir_version = one(rng, [0, 1, 3, 99, 2**40, -1])
        case 1:
            one(rng, model.opset_import).version = one(
                rng, [0, 1, 7, 9, 10, 13, 25, 26, 99, -1, 2**40]
            )
        case 2:
            del model.opset_import[int(rng.integers(len(model.opset_import))) :]
        case _:
            model.opset_import.append(helper.make_opsetid(one(rng, ["", "com.example", "\n"]), 3))


def other_fields(model: onnx.ModelProto, rng: Rng) -> None:
    graph = model.graph
    match int(rng.integers(6)):
        case 0:
            model.functions.add(name="f", domain="com.example")
        case 1:
            graph.sparse_initializer.add()
        case 2:
            graph.quantization_annotation.add(tensor_name=NAMES[1])
        case 3:
            node = node_of(model, rng)
            node.attribute.append(
                helper.make_attribute(
                    "then_branch", onnx.GraphProto.FromString(graph.SerializeToString())
                )
            )
        case 4:
            graph.value_info.add(name=one(rng, NAMES))
        case _:
            graph.name = one(rng, NAMES)
            model.metadata_props.add(key=one(rng, NAMES), value=one(rng, NAMES))


def fields_of_bytes(model: onnx.ModelProto, rng: Rng) -> bytes:
    """Bytes of the file: flipped, cut, doubled, packed."""
    data = bytearray(model.SerializeToString())
    match int(rng.integers(6)):
        case 0:
            del data[int(rng.integers(len(data))) :]
        case 1:
            data = data * 2
        case 2:
            data = bytearray(gzip.compress(bytes(data)))
        case 3:
            start, count = int(rng.integers(len(data))), int(rng.integers(1, 40))
            data[start:start] = rng.bytes(count)
        case 4:
            start = int(rng.integers(len(data)))
            del data[start : start + int(rng.integers(1, 20))]
        case _:
            for at in rng.integers(len(data), size=int(rng.choice([1, 1, 2, 8]))):
                data[at] = int(rng.integers(256))
    return bytes(data)


CHANGES: tuple[Change, ...] = (
    *(
        change_array,
        change_array,
        change_shape,
        change_type,
        change_data,
        drop_array,
        array_twice,
        rewire,
        rewire,
    ),
    *(
        rename,
        change_op,
        change_attribute,
        change_attribute,
        order_nodes,
        change_ends,
        change_versions,
        other_fields,
    ),
    fields_of_bytes,
)
