"""Files that cannot be read: each is refused with the right error, in one line that names the file
and the node."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qverify import runtime
from qverify.errors import ModelError, QverifyError, UnsupportedModel, UsageError
from qverify.frontend.model import _parse, read_model
from tests.graphs import Array, Graph, write
from tests.networks import CPU

U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
ZERO = np.zeros((), U8)


def small(form: str = "QOperator") -> onnx.ModelProto:
    """A valid model: quantizer, convolution or product, sum, pool, activation, float output."""
    g, rng = Graph(13), np.random.default_rng(0)
    x = g.quantize(g.node("Sub", g.input(("n", 1, 4, 4)), g.f32(0.25)), 0.1, np.array(7, U8))
    zero, one = g.const(ZERO), g.f32(0.5)
    if form == "QDQ":
        v = g.dequantize(x, 0.1, np.array(7, U8))
        w = g.dequantize(g.const(rng.integers(-60, 60, (2, 1, 3, 3)), S8), 0.02, np.zeros((), S8))
        b = g.dequantize(g.const([100, -200], np.int32), 0.002, np.zeros((), np.int32))
        v = g.dequantize(
            g.quantize(g.node("Relu", g.node("Conv", v, w, b)), 0.05, ZERO), 0.05, ZERO
        )
        v = g.node("Tanh", v)
        v = g.dequantize(g.quantize(v, 0.01, np.array(3, U8)), 0.01, np.array(3, U8))
        return g.model(g.node("Reshape", v, g.const(np.array([0, -1]))))
    w = g.const(rng.integers(-60, 60, (2, 1, 3, 3)), S8)
    x = g.node(
        "QLinearConv",
        x,
        g.f32(0.1),
        g.const(np.array(7, U8)),
        w,
        g.f32([0.02, 0.03]),
        g.const(np.zeros(2, S8)),
        one,
        zero,
    )
    x = g.node("MaxPool", x, kernel_shape=[2, 2])
    x = g.node("Flatten", x)
    x = g.node("QLinearAdd", x, one, zero, x, one, zero, g.f32(0.7), zero)
    x = g.node("QLinearLeakyRelu", x, one, zero, one, zero, alpha=0.5)
    w = g.const(rng.integers(0, 256, (2, 3)), U8)
    y = g.node(
        "QGemm",
        x,
        one,
        zero,
        w,
        g.f32(0.01),
        g.const(np.array(128, U8)),
        g.const([1, 2, 3], np.int32),
        alpha=0.5,
    )
    return g.model(y, g.dequantize(x, 0.5, ZERO))


def refusal(model: onnx.ModelProto | bytes, path: Path, kind: type[QverifyError]) -> str:
    """The message, less the file's name: one line that begins with it."""
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(QverifyError) as caught:
        read_model(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_the_small_model_is_read(form: str, path: Path) -> None:
    lowered = read_model(write(small(form), path)).lowered
    lowered.network.validate()
    assert [shape for _, shape, _ in lowered.inputs] == [(1, 1, 4, 4)]


# -- files -----------------------------------------------------------------------------------------


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the model '.*nothing.onnx': No such file"):
        read_model(tmp_path / "nothing.onnx")


def test_a_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the model '.*': Is a directory"):
        read_model(tmp_path)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)
def test_an_unreadable_file_is_a_usage_error(path: Path) -> None:
    write(small(), path).chmod(0)
    with pytest.raises(UsageError, match=r"cannot read the model '.*': Permission denied"):
        read_model(path)


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"hello", bytes(range(256)), b"\xff" * 999, b"PK\x03\x04" + bytes(99)]
)
def test_other_files_are_no_models(data: bytes, path: Path) -> None:
    assert refusal(data, path, ModelError).startswith("not an ONNX file")


def test_random_bytes_are_no_model(path: Path) -> None:
    rng = np.random.default_rng(0)
    for size in (10, 100, 1_000, 10_000):
        refusal(rng.bytes(size), path, ModelError)


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_a_truncated_file_is_no_model(form: str, path: Path) -> None:
    data = small(form).SerializeToString()
    for cut in (1, 2, 10, len(data) // 2, len(data) - 60):
        refusal(data[:-cut], path, ModelError)


# -- graphs ----------------------------------------------------------------------------------------


def model_of(build: Callable[[Graph], str], opset: int = 21) -> onnx.ModelProto:
    g = Graph(opset)
    return g.model(build(g))


def test_a_float_network_is_named_as_such(path: Path) -> None:
    model = model_of(
        lambda g: g.node("Relu", g.node("MatMul", g.input((1, 2)), g.f32(np.ones((2, 2)))))
    )
    assert "a float network" in refusal(model, path, UnsupportedModel)


def test_a_float_output_is_named(path: Path) -> None:
    g = Graph()
    x = g.input((1, 2))
    message = refusal(g.model(g.quantize(x, 1.0, ZERO), g.node("Relu", x)), path, UnsupportedModel)
    assert message.startswith("the output 'n1' does not pass a quantizer")


def test_a_constant_output_is_named(path: Path) -> None:
    g = Graph()
    codes, constant = g.quantize(g.input((1, 2)), 1.0, ZERO), g.const(np.ones((1, 2), U8))
    assert (
        refusal(g.model(codes, constant), path, UnsupportedModel)
        == f"the output '{constant}' is a constant"
    )


def test_names_that_nothing_computes(path: Path) -> None:
    model = small()
    node = model.graph.node[1]
    node.input[0] = "ghost"
    message = refusal(model, path, ModelError)
    assert message.startswith(
        f"node '{node.name}' (QuantizeLinear) reads 'ghost', which is neither an input"
    )
    model = small()
    del model.graph.initializer[0]
    assert f"reads '{small().graph.initializer[0].name}'" in refusal(model, path, ModelError)
    model = small()
    model.graph.output[1].name = "ghost"
    assert "Graph output (ghost) does not exist" in refusal(model, path, ModelError)


def test_nodes_in_the_wrong_order(path: Path) -> None:
    model = small()
    first = model.graph.node[0]
    model.graph.node.append(first)
    del model.graph.node[0]
    assert "reads 'n0'" in refusal(model, path, ModelError)


def test_no_input_and_no_output(path: Path) -> None:
    model = small()
    del model.graph.output[:]
    assert refusal(model, path, ModelError) == "not an ONNX file, or its graph is empty"
    g = Graph()
    assert (
        refusal(g.model(g.quantize(g.f32([1.0]), 1.0, ZERO)), path, ModelError)
        == "the graph has no input"
    )


def test_a_damaged_initializer(path: Path) -> None:
    model = small()
    model.graph.initializer[1].raw_data += b"x"
    name = model.graph.initializer[1].name
    assert f"Initializer '{name}': raw_data size" in refusal(model, path, ModelError)


def test_a_damaged_switch_of_dropout(path: Path) -> None:
    """Whether a node draws random numbers is read before onnxruntime has seen the file."""
    model = small()
    model.graph.node[2].op_type = "Dropout"
    model.graph.node[2].domain = ""
    tensor = next(i for i in model.graph.initializer if i.name == model.graph.node[2].input[2])
    tensor.raw_data += b"x"
    assert f"'{tensor.name}' cannot be read" in refusal(model, path, ModelError)


def test_external_data_that_is_missing(path: Path) -> None:
    model = small()
    tensor = model.graph.initializer[3]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="nowhere.bin")
    message = refusal(model, path, ModelError)
    assert message.startswith(
        f"the data of its tensor '{tensor.name}' are in the file 'nowhere.bin', which is not there"
    )


def test_external_data_belongs_to_the_model(path: Path) -> None:
    """Weights in a file of their own are read, and a change of them is a change of the model."""
    onnx.save(small(), path)
    whole = read_model(path)
    onnx.save_model(
        small(), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    parted, weights = read_model(path), path.parent / "weights.bin"
    x = (
        np.zeros((3, whole.lowered.network.input_type.size), np.int32)
        + np.arange(3, dtype=np.int32)[:, None]
    )
    for a, b in zip(*(m.lowered.network.values(CPU, x) for m in (whole, parted)), strict=True):
        assert np.array_equal(a, b)
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    assert len({whole.sha256, parted.sha256, read_model(path).sha256}) == 3


def test_external_data_of_an_attribute_belongs_to_the_model(path: Path) -> None:
    """A Constant node's tensor may lie in a file of its own, also inside a subgraph."""
    g = Graph()
    x = g.quantize(g.input((1, 2)), 0.1, ZERO)
    tensor = onnx.numpy_helper.from_array(np.array([[1, 2]], np.float32), "t")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    constant = g.node("Constant", value=tensor)
    y = g.quantize(g.node("Mul", g.dequantize(x, 0.1, ZERO), constant), 0.1, ZERO)
    found, tables = set(), set()
    for values in ([1, 2], [1, 3], [1, 2]):
        (path.parent / "weights.bin").write_bytes(np.array(values, np.float32).tobytes())
        path.write_bytes(g.model(y).SerializeToString())
        model = read_model(path)
        found.add(model.sha256)
        tables.add(model.lowered.network.run(CPU, np.full((1, 2), 40, np.int32)).tobytes())
    assert len(found) == len(tables) == 2


def test_external_data_cut_otherwise_is_another_model(path: Path) -> None:
    """Two tensors in files of their own: the hash says where the first one ends."""
    g = Graph()
    x, names = g.quantize(g.input((1, 2)), 0.1, ZERO), []
    for name in ("a.bin", "b.bin"):
        tensor = onnx.numpy_helper.from_array(np.array([[1, 2]], np.float32), name)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        names.append(g.node("Constant", value=tensor))
    y = x
    for name in names:
        y = g.quantize(g.node("Mul", g.dequantize(y, 0.1, ZERO), name), 0.1, ZERO)
    data, values = g.model(y).SerializeToString(), np.arange(1, 7, dtype=np.float32).tobytes()
    found = set()
    for cut in (8, 16):  # a file may be longer than its tensor, whose beginning the runtime takes
        (path.parent / "a.bin").write_bytes(values[:cut])
        (path.parent / "b.bin").write_bytes(values[cut:])
        found.add(_parse(path, data, packed=False)[1])
    assert len(found) == 2


def test_what_folding_makes_is_no_input(path: Path) -> None:
    """Files of IR version 3 list initializers as inputs; onnxruntime's graph then lists folded
    constants, too."""
    g = Graph(13)
    scale = g.node("Constant", value=onnx.numpy_helper.from_array(np.array(0.5, np.float32)))
    model = g.model(
        g.node("QuantizeLinear", g.input((1, 2)), g.node("Mul", scale, scale), g.const(ZERO))
    )
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    path.write_bytes(model.SerializeToString())
    assert [name for name, _, _ in read_model(path).lowered.inputs] == ["x0"]


INPUTS: dict[str, tuple[Callable[[onnx.ValueInfoProto], object], type[QverifyError], str]] = {
    "a dynamic axis": (
        lambda item: setattr(item.type.tensor_type.shape.dim[2], "dim_param", "height"),
        *(UnsupportedModel, "axis 2 of the input 'x0' is dynamic (height)"),
    ),
    "an unknown axis": (
        lambda item: item.type.tensor_type.shape.dim[3].Clear(),
        UnsupportedModel,
        "axis 3 of the input",
    ),
    "an empty axis": (
        lambda item: setattr(item.type.tensor_type.shape.dim[1], "dim_value", 0),
        *(UnsupportedModel, "axis 1 of the input"),
    ),
    "an empty batch": (
        lambda item: setattr(item.type.tensor_type.shape.dim[0], "dim_value", 0),
        *(UnsupportedModel, "axis 0 of the input"),
    ),
    "a negative axis": (
        lambda item: setattr(item.type.tensor_type.shape.dim[1], "dim_value", -3),
        *(UnsupportedModel, "axis 1 of the input"),
    ),
    "a gigantic axis": (
        lambda item: setattr(item.type.tensor_type.shape.dim[1], "dim_value", 2**40),
        *(UnsupportedModel, "elements; at most"),
    ),
    "no shape": (
        lambda item: item.type.tensor_type.ClearField("shape"),
        *(UnsupportedModel, "the input 'x0' has no tensor shape"),
    ),
    "no type": (
        lambda item: item.ClearField("type"),
        ModelError,
        "Model input (x0) does not have type information",
    ),
    "float64": (
        lambda item: setattr(item.type.tensor_type, "elem_type", onnx.TensorProto.DOUBLE),
        *(ModelError, "bound to different types (tensor(double) and tensor(float)"),
    ),
    "float16": (
        lambda item: setattr(item.type.tensor_type, "elem_type", onnx.TensorProto.FLOAT16),
        *(ModelError, "bound to different types (tensor(float16) and tensor(float)"),
    ),
    "an undefined type": (
        lambda item: setattr(item.type.tensor_type, "elem_type", 0),
        *(ModelError, "Invalid tensor data type 0"),
    ),
    "an unknown type": (
        lambda item: setattr(item.type.tensor_type, "elem_type", 99),
        *(ModelError, "Invalid tensor data type 99"),
    ),
}


@pytest.mark.parametrize("what", INPUTS)
def test_inputs_that_are_refused(what: str, path: Path) -> None:
    change, kind, words = INPUTS[what]
    model = small()
    change(model.graph.input[0])
    assert words in refusal(model, path, kind)


def test_inputs_of_two_kinds_are_refused(path: Path) -> None:
    g = Graph()
    model = g.model(g.input((1, 2), U8), g.input((1, 2), S8))
    model.graph.node.append(onnx.helper.make_node("Identity", ["x0"], ["copy"], name="copy"))
    assert "int8 and to uint8 in one network" in refusal(model, path, UnsupportedModel)


# -- scales ----------------------------------------------------------------------------------------

SCALES = {
    "NaN": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "zero": 0.0,
    "minus zero": -0.0,
    "negative": -0.5,
}


def _nodes(bad: float) -> dict[str, Callable[[Graph], str]]:
    """For every scale of every op: a graph in which just that one is bad."""
    codes = np.ones((2, 2), U8)
    graphs: dict[str, Callable[[Graph], str]] = {}

    def add(
        name: str, ends: str, shape: tuple[int, ...] = (1, 2), w: Array = codes, **attributes: Any
    ) -> None:
        """`ends` are the node's inputs: x codes, w weights, s a scale, z a zero point."""
        for k in [i for i, kind in enumerate(ends) if kind == "s"]:

            def build(g: Graph, k: int = k) -> str:
                make = {
                    "x": lambda: g.input(shape, U8),
                    "w": lambda: g.const(w),
                    "s": lambda: g.f32(0.5),
                    "z": lambda: g.const(ZERO),
                }
                inputs = [g.f32(bad) if i == k else make[kind]() for i, kind in enumerate(ends)]
                return g.node(name, *inputs, **attributes)

            graphs[f"{name} input {k}"] = build

    graphs["QuantizeLinear"] = lambda g: g.quantize(g.input((1, 2)), bad, ZERO)
    graphs["QuantizeLinear per channel"] = lambda g: g.quantize(
        g.input((1, 2)), [1.0, bad], np.zeros(2, U8)
    )
    graphs["DequantizeLinear"] = lambda g: g.dequantize(g.input((1, 2), U8), bad, ZERO)
    add("QLinearConv", "xszwszsz", (1, 1, 3), np.ones((2, 1, 2), U8))
    add("QLinearMatMul", "xszwszsz")
    add("QGemm", "xszwsz")
    add("MatMulIntegerToFloat", "xwss")
    add("QLinearAdd", "xszxszsz")
    add("QLinearMul", "xszwszsz")
    add("QLinearConcat", "szxszxsz", axis=1)
    add("QLinearAveragePool", "xszsz", (1, 1, 3), kernel_shape=[2])
    add("QLinearGlobalAveragePool", "xszsz", (1, 1, 3))
    add("QLinearLeakyRelu", "xszsz")
    add("QLinearSigmoid", "xszsz")
    add("QLinearSoftmax", "xszsz", opset=13)
    return graphs


@pytest.mark.parametrize("bad", SCALES)
@pytest.mark.parametrize("where", _nodes(1.0))
def test_scales_must_be_finite_and_positive(where: str, bad: str, path: Path) -> None:
    message = refusal(model_of(_nodes(SCALES[bad])[where]), path, UnsupportedModel)
    assert re.match(
        rf"node '{where.split()[0]}_n\d+' \((com\.microsoft\.)?{where.split()[0]} of ", message
    )
    assert ("is NaN or infinite" if bad in ("NaN", "inf", "-inf") else "is not positive") in message


# -- ops -------------------------------------------------------------------------------------------


def _weights(g: Graph, *shape: int, value: int = 1) -> str:
    return g.const(np.full(shape, value), U8)


def _conv(
    g: Graph, w_zero: Array, shape: tuple[int, ...] = (1, 2, 5), scales: int = 0, **attributes: Any
) -> str:
    one, zero = g.f32(1.0), g.const(ZERO)
    w_scale = g.f32(np.ones(scales or w_zero.shape))
    ends = (
        g.input(shape, U8),
        one,
        zero,
        _weights(g, 3, 2, 3),
        w_scale,
        g.const(w_zero),
        one,
        zero,
    )
    return g.node("QLinearConv", *ends, **attributes)


def _matmul(
    g: Graph, x: tuple[int, ...], w: tuple[int, ...], value: int = 1, w_zero: Array = ZERO
) -> str:
    one, zero = g.f32(1.0), g.const(ZERO)
    w_scale = one
    weights = _weights(g, *w, value=value), w_scale, g.const(w_zero)
    return g.node("QLinearMatMul", g.input(x, U8), one, zero, *weights, one, zero)


OPS: dict[str, tuple[Callable[[Graph], str], str]] = {
    # what: (graph, words of the message)
    "dynamic quantization": (
        lambda g: g.node("DynamicQuantizeLinear", g.input((1, 2)), outputs=3),
        "(DynamicQuantizeLinear of float32[1, 2]): dynamic quantization depends on each input's "
        "range",
    ),
    "uint16": (
        lambda g: g.quantize(g.input((1, 2)), 1.0, np.zeros((), np.uint16)),
        "quantization to uint16",
    ),
    "int16": (
        lambda g: g.quantize(g.input((1, 2)), 1.0, np.zeros((), np.int16)),
        "quantization to int16",
    ),
    "int32 activations": (
        lambda g: g.dequantize(
            g.node("MatMulInteger", g.input((1, 2), U8), _weights(g, 2, 2)),
            1.0,
            np.array(3, np.int32),
        ),
        "dequantizing int32 codes is not supported",
    ),
    "an int32 bias for every position": (
        lambda g: g.node(
            "Add",
            g.node(
                "ConvInteger", g.input((1, 1, 3, 3), U8), g.const(np.ones((1, 1, 2, 2), np.int8))
            ),
            g.const(np.arange(4, dtype=np.int32).reshape(2, 2)),
        ),
        "integer arithmetic on codes is not supported",
    ),
    "an int32 bias that leaves int32": (
        lambda g: g.node(
            "Add",
            g.node("MatMulInteger", g.input((1, 2), U8), _weights(g, 2, 2)),
            g.const(np.full(2, 2**31 - 1, np.int32)),
        ),
        "int32",
    ),
    "no rule": (
        lambda g: g.node(
            "CumSum", g.dequantize(g.input((1, 2), U8), 1.0, ZERO), g.const(np.array([1]))
        ),
        "(CumSum of float32[1, 2], constant int64[1]): no exact integer rule exists for this op",
    ),
    "a float op between codes": (
        lambda g: g.quantize(
            g.node("Softmax", g.dequantize(g.input((1, 2), U8), [1.0, 2.0], np.zeros(2, U8))),
            1.0,
            ZERO,
        ),
        "compare the scores before it",
    ),
    "the largest scores": (
        lambda g: g.node("TopK", g.input((1, 2), U8), g.const(np.array([1])), outputs=2),
        "(TopK of uint8[1, 2], constant int64[1]): it picks by the order of its input: end the "
        "model there",
    ),
    "scales that do not fit": (
        lambda g: _conv(g, np.zeros((), U8), scales=2),
        "the shapes [1, 3, 3] and [1, 2, 1] do not fit each other",
    ),
    "a slope of more axes": (
        lambda g: g.node("PRelu", g.dequantize(g.input((), U8), 1.0, ZERO), g.f32([0.5])),
        "a slope [1] does not fit an input []",
    ),
    "a bias that does not fit": (
        lambda g: g.node(
            *(
                "QGemm",
                g.input((1, 2), U8),
                g.f32(1.0),
                g.const(ZERO),
                _weights(g, 2, 3),
                g.f32(1.0),
                g.const(ZERO),
            ),
            g.const(np.ones((1, 2), np.int32)),
        ),
        "the shapes [1, 2] and [3] do not fit each other",
    ),
    "weights without an element": (
        lambda g: _matmul(g, (1, 3), (3, 0)),
        "a weight [3, 0] without an element",
    ),
    "a weight zero point for each row": (
        lambda g: _matmul(g, (1, 3), (3, 2), w_zero=np.zeros(3, U8)),
        "3 zero points do not fit 2 columns",
    ),
    "weight zero points per channel": (
        lambda g: _conv(g, np.arange(3).astype(U8)),
        "different weight zero points",
    ),
    "an overflow": (
        lambda g: _matmul(g, (1, 40_000), (40_000, 2), 255),
        "outside int32: the runtime would wrap around",
    ),
    "a product of vectors": (lambda g: _matmul(g, (2,), (2,)), "QLinearMatMul of uint8[2]"),
    "channels that do not fit": (lambda g: _conv(g, ZERO, (1, 3, 5)), "1 groups do not fit"),
    "a kernel that does not fit": (
        lambda g: _conv(g, ZERO, (1, 2, 2)),
        "a window of 3 does not fit 2 elements",
    ),
    "no groups": (lambda g: _conv(g, ZERO, group=0), "0 groups do not fit"),
    "scales that depend on the input": (
        lambda g: g.node("QuantizeLinear", g.input((1, 2)), g.input((1,)), g.const(ZERO)),
        "the scale (input 1) must be a constant",
    ),
    "an unknown shape": (
        lambda g: g.node("Reshape", g.input((1, 2), U8), g.const(np.array([3]))),
        "2 elements cannot be reshaped to [3]",
    ),
    "an index out of range": (
        lambda g: g.node("Gather", g.input((1, 2), U8), g.const(np.array([2])), axis=1),
        "an index lies outside an axis of 2",
    ),
}


@pytest.mark.parametrize("what", OPS)
def test_ops_that_are_refused(what: str, path: Path) -> None:
    if what == "a float op between codes" and runtime.release() < (1, 32):
        pytest.skip("this onnxruntime does not load the file")
    build, words = OPS[what]
    message = refusal(model_of(build), path, UnsupportedModel)
    assert re.match(r"node '\w+' \((com\.microsoft\.)?\w+ of ", message) and words in message


IMPOSSIBLE: dict[str, tuple[Callable[[Graph], str], str]] = {
    "a scalar operand": (lambda g: _matmul(g, (), (2, 2)), "Input tensors of wrong rank (0)"),
    "a matrix that does not fit": (
        lambda g: _matmul(g, (1, 3), (2, 2)),
        "Incompatible dimensions for matrix multiplication",
    ),
    "weights of another rank": (
        lambda g: _conv(g, ZERO, (1, 2, 5, 5)),
        "Number of spatial dimensions",
    ),
    "zero points of another type": (
        lambda g: g.node(
            "QLinearLeakyRelu",
            g.input((1, 2), U8),
            g.f32(1.0),
            g.const(np.zeros((), S8)),
            g.f32(1.0),
            "",
        ),
        "bound to different types (tensor(uint8) and tensor(int8)",
    ),
    "float64 scales": (
        lambda g: g.node("DequantizeLinear", g.input((1, 2), U8), g.const(1.0), g.const(ZERO)),
        "'tensor(double)'",
    ),
    "nothing to pad with": (
        lambda g: g.node("Pad", g.input((1, 2), U8), "", g.const(ZERO)),
        "input 1 is marked single but has an empty string",
    ),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_nodes_that_the_runtime_refuses(what: str, path: Path) -> None:
    build, words = IMPOSSIBLE[what]
    message = refusal(model_of(build), path, ModelError)
    assert message.startswith("onnxruntime ") and "cannot load" in message and words in message, (
        message
    )


def test_an_output_that_turns_is_refused(path: Path) -> None:
    """A float function of two codes must be monotone in each, also where no quantizer follows."""
    g = Graph()
    both = g.node("Add", *(g.dequantize(g.input((1, 2), U8), 1.0, np.array(9, U8)) for _ in "ab"))
    y = g.node("LeakyRelu", both, alpha=-1.0)
    assert refusal(g.model(y), path, UnsupportedModel).startswith(
        f"the output '{y}': a function of two codes must be"
    )


DOMAINS = {
    # domain, op: words of the message
    (
        "qonnx.custom_op.general",
        "Quant",
    ): "it is QONNX, which onnxruntime cannot run: export the network as QDQ or QCDQ",
    ("onnx.brevitas", "Quant"): "it is QONNX",
    ("finn.custom_op.general", "MultiThreshold"): "it is QONNX",
    ("", "BipolarQuant"): "it is QONNX",
    ("org.openvinotoolkit", "FakeQuantize"): "it is OpenVINO's own, which onnxruntime cannot run",
    ("trt", "TRT_FP8QuantizeLinear"): "it is TensorRT's own",
    ("com.amd.quark", "ExtendedQuantizeLinear"): "it is AMD Quark's own",
    ("org.example", "Own"): "'org.example' is not part of ONNX, and onnxruntime cannot run it",
}


@pytest.mark.parametrize(("domain", "op"), DOMAINS)
def test_other_formats_are_recognised(
    domain: str, op: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All nodes of the format at once, and without asking the runtime."""
    monkeypatch.setattr(runtime, "optimised_graph", None)
    g = Graph()
    y = g.node("Relu", g.node(op, g.input((1, 2)), g.f32(1.0), domain=domain))
    model = g.model(g.node(op, y, g.f32(1.0), domain=domain))
    spelled = f"{domain}.{op}" if domain else op
    message = refusal(model, path, UnsupportedModel)
    assert message.startswith(f"node '{op}_n0' ({spelled}) and '{op}_n2': {DOMAINS[domain, op]}")


@pytest.mark.parametrize("which", [2, 3, 5, 6, 7, 8])
def test_a_node_that_would_crash_is_not_given_to_the_runtime(which: int, path: Path) -> None:
    """A QLinearWhere whose parameters are computed ends the process, also where they are computed
    from constants."""
    g = Graph()
    x, one, zero = g.input((1, 2), U8), g.f32(1.0), g.const(ZERO)
    inputs = [g.const(np.array([[True, False]])), x, one, zero, x, one, zero, one, zero]
    inputs[which] = g.node("Identity", inputs[which])
    message = refusal(g.model(g.node("QLinearWhere", *inputs)), path, UnsupportedModel)
    assert message.startswith(
        "node 'QLinearWhere_n1' (com.microsoft.QLinearWhere): onnxruntime crashes"
    )


def test_an_input_that_a_concatenation_lacks(path: Path) -> None:
    """It, too, ends the process."""
    g = Graph()
    one, zero = g.f32(1.0), g.const(ZERO)
    y = g.node(
        "QLinearConcat",
        one,
        zero,
        g.input((1, 2), U8),
        one,
        "",
        g.input((1, 2), U8),
        one,
        zero,
        axis=1,
    )
    message = refusal(g.model(y), path, UnsupportedModel)
    assert message.startswith(
        "node 'QLinearConcat_n0' (com.microsoft.QLinearConcat): onnxruntime crashes"
    )


@pytest.mark.parametrize("op", ["QLinearLeakyRelu", "QLinearSigmoid"])
def test_an_activation_without_its_last_zero_point(op: str, path: Path) -> None:
    """So does this one, which ONNX's schema allows."""
    g = Graph()
    model = g.model(g.node(op, g.input((1, 2), U8), g.f32(1.0), g.const(ZERO), g.f32(1.0)))
    assert f"node '{op}_n0' (com.microsoft.{op}): onnxruntime crashes" in refusal(
        model, path, UnsupportedModel
    )


def test_a_folded_constant_is_no_input(path: Path) -> None:
    """IR version 3 lists initializers as inputs; onnxruntime lists constants that it has made
    there, too."""
    g = Graph(10)
    shape = g.node("Constant", value=onnx.numpy_helper.from_array(np.array([1, 4])))
    x = g.quantize(g.node("Reshape", g.input((1, 2, 2)), g.node("Abs", shape)), 0.1, ZERO)
    model = g.model(g.dequantize(x, 0.1, ZERO))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    assert [name for name, _, _ in read_model(write(model, path)).lowered.inputs] == ["x0"]


def test_functions_in_the_model_are_refused(path: Path) -> None:
    model = small()
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(
        onnx.helper.make_function("own", "F", ["a"], ["b"], [node], list(model.opset_import))
    )
    assert "model-local functions are not supported" in refusal(model, path, UnsupportedModel)


NONSENSE: dict[str, Callable[[Graph], str]] = {
    # attributes and inputs that no runtime would accept either
    "a permutation with a repeated axis": lambda g: g.node(
        "Transpose", g.input((1, 2), U8), perm=[0, 0]
    ),
    "a permutation of other axes": lambda g: g.node(
        "Transpose", g.input((1, 2), U8), perm=[0, 1, 2]
    ),
    "a permutation that is a number": lambda g: g.node("Transpose", g.input((1, 2), U8), perm=1.5),
    "a permutation that is a string": lambda g: g.node(
        "Transpose", g.input((1, 2), U8), perm="backwards"
    ),
    "no kernel": lambda g: g.node("MaxPool", g.input((1, 1, 4), U8)),
    "a kernel of zeros": lambda g: g.node("MaxPool", g.input((1, 1, 4), U8), kernel_shape=[0]),
    "a stride of zero": lambda g: g.node(
        "MaxPool", g.input((1, 1, 4), U8), kernel_shape=[2], strides=[0]
    ),
    "a negative stride": lambda g: g.node(
        "MaxPool", g.input((1, 1, 4), U8), kernel_shape=[2], strides=[-1]
    ),
    "a dilation of zero": lambda g: g.node(
        "MaxPool", g.input((1, 1, 4), U8), kernel_shape=[2], dilations=[0]
    ),
    "strides that are a string": lambda g: g.node(
        "MaxPool", g.input((1, 1, 4), U8), kernel_shape=[2], strides="two"
    ),
    "auto_pad of bytes": lambda g: g.node(
        "MaxPool", g.input((1, 1, 4), U8), kernel_shape=[2], auto_pad=b"\xff\xfe"
    ),
    "an axis out of range": lambda g: g.node("Concat", g.input((1, 2), U8), axis=7),
    "no axis": lambda g: g.node("Concat", g.input((1, 2), U8)),
    "parts of different shapes": lambda g: g.node(
        "Concat", g.input((1, 2), U8), g.input((2, 3), U8), axis=0
    ),
    "a squeezed axis that is no 1": lambda g: g.node(
        "Squeeze", g.input((1, 2), U8), g.const(np.array([1]))
    ),
    "an axis that is there twice": lambda g: g.node(
        "Unsqueeze", g.input((1, 2), U8), g.const(np.array([1, 1]))
    ),
    "a slice of a missing axis": lambda g: g.node(
        "Slice",
        g.input((1, 2), U8),
        g.const(np.array([0])),
        g.const(np.array([1])),
        g.const(np.array([5])),
    ),
    "a slice with a step of zero": lambda g: g.node(
        *(
            "Slice",
            g.input((1, 2), U8),
            g.const(np.array([0])),
            g.const(np.array([1])),
            g.const(np.array([1])),
        ),
        g.const(np.array([0])),
    ),
    "starts without ends": lambda g: g.node(
        "Slice", g.input((1, 2), U8), g.const(np.array([0, 0])), g.const(np.array([1]))
    ),
    "a block that does not divide": lambda g: g.node(
        "DepthToSpace", g.input((1, 3, 2, 2), U8), blocksize=2
    ),
    "blocks of a matrix": lambda g: g.node("SpaceToDepth", g.input((2, 2), U8), blocksize=2),
    "a block of zero": lambda g: g.node("SpaceToDepth", g.input((1, 1, 2, 2), U8), blocksize=0),
    "a split into nothing": lambda g: g.node("Split", g.input((1, 2), U8), num_outputs=0),
    "a split of a missing axis": lambda g: g.node(
        "Split", g.input((1, 2), U8), axis=3, num_outputs=2, outputs=2
    ),
    "a shape that does not broadcast": lambda g: g.node(
        "Expand", g.input((1, 2), U8), g.const(np.array([3, 3]))
    ),
    "a cast to nothing": lambda g: g.node("Cast", g.input((1, 2), U8)),
    "a cast to an unknown type": lambda g: g.node("Cast", g.input((1, 2), U8), to=99),
    "too few pads": lambda g: g.node(
        "Pad", g.input((1, 2), U8), g.const(np.array([1])), g.const(ZERO)
    ),
    "a mean of a missing axis": lambda g: g.node(
        "ReduceMean", g.dequantize(g.input((1, 2), U8), 1.0, ZERO), g.const(np.array([2]))
    ),
    "a flattening from a missing axis": lambda g: g.node("Flatten", g.input((1, 2), U8), axis=3),
    "a softmax over a missing axis": lambda g: g.node(
        *("QLinearSoftmax", g.input((1, 2), U8), g.f32(1), g.const(ZERO), g.f32(1), g.const(ZERO)),
        axis=2,
        opset=13,
    ),
    "an unknown approximation": lambda g: g.node(
        "Gelu", g.dequantize(g.input((1, 2), U8), 1.0, ZERO), approximate="roughly"
    ),
    "floats of different shapes": lambda g: g.node(
        *(
            "Add",
            g.dequantize(g.input((1, 2), U8), 1.0, ZERO),
            g.dequantize(g.input((1, 3), U8), 1.0, ZERO),
        )
    ),
    "gigantic pads": lambda g: g.node(
        "Pad", g.input((1, 2), U8), g.const(np.array([0, 2**40, 0, 0])), g.const(ZERO)
    ),
    "a gigantic expansion": lambda g: g.node(
        "Expand", g.input((1, 2), U8), g.const(np.array([2**40, 2]))
    ),
    "gigantic repetitions": lambda g: g.node(
        "Tile", g.input((1, 2), U8), g.const(np.array([2**40, 1]))
    ),
    "a gigantic window": lambda g: g.node(
        "MaxPool", g.input((1, 1, 4), U8), kernel_shape=[9], pads=[2**40, 2**40]
    ),
    "a relu of nothing": lambda g: g.node("Relu"),
    "a quantizer of nothing": lambda g: g.node("QLinearAdd", g.input((1, 2), U8)),
    "shapes that do not broadcast": lambda g: g.node(
        *(
            "QLinearAdd",
            g.input((1, 2), U8),
            g.f32(1),
            g.const(ZERO),
            g.input((1, 3), U8),
            g.f32(1),
            g.const(ZERO),
        ),
        *(g.f32(1), g.const(ZERO)),
    ),
    "a zero point of strings": lambda g: g.node(
        "QuantizeLinear", g.input((1, 2)), g.f32(1), g.const(np.array(["a"], object))
    ),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_by_name(what: str, path: Path) -> None:
    """Straight through the rules: whatever they trip over names the node."""
    model = model_of(lambda g: g.node("Identity", NONSENSE[what](g)))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError) as caught:
        read_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert (
        re.search(r"node '?\w+_?n\d+'?|Node \(\w+_n\d+\)|Name:'\w+_n\d+'", message)
        or "onnxruntime" in message
    ), message


# -- damaged files ---------------------------------------------------------------------------------

VALID = {form: small(form).SerializeToString() for form in ("QOperator", "QDQ")}


@st.composite
def damaged(draw: Any) -> bytes:
    data = bytearray(draw(st.sampled_from(list(VALID.values()))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["set", "flip", "delete", "insert", "copy", "cut"]))
        if kind == "set":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "flip":
            data[at : at + 1] = bytes(
                byte ^ 1 << draw(st.integers(0, 7)) for byte in data[at : at + 1]
            )
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 5))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=5))
        elif kind == "copy":
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        else:
            del data[max(at, 1) :]
    return bytes(data)


@settings(deadline=None, max_examples=400)
@given(damaged())
@example(b"")
def test_damaged_files_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """Bytes of a valid model changed at random: it is read, or refused by a QverifyError of one
    line."""
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(data)
    try:
        read_model(path)
    except QverifyError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
