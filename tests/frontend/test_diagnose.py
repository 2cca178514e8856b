"""What is said of a product that onnxruntime leaves in float: what it misses, at the node of the
user's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from qverify.cli import main
from qverify.errors import SoundnessError, UnsupportedModel
from qverify.frontend.builder import Builder, Identity
from qverify.frontend.model import read_model
from qverify.ops import Table
from tests.graphs import Array, Graph, write

U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
ZERO = np.zeros((), U8)
MIDDLE = np.array(128, U8)


def quantized(g: Graph, x: str, zero: Array = MIDDLE, scale: Any = 0.05) -> str:
    return g.dequantize(g.quantize(x, scale, zero), scale, zero)


def weights(g: Graph, *shape: int, scale: Any = 0.02, **attributes: Any) -> str:
    codes = g.const(np.random.default_rng(0).integers(-60, 60, shape), S8)
    return g.dequantize(codes, scale, np.zeros(np.shape(scale), S8), **attributes)


def image(g: Graph) -> str:
    return g.input((1, 2, 5, 5))


def conv(g: Graph) -> str:
    x, w = quantized(g, image(g)), weights(g, 2, 2, 3, 3)
    return g.node("Conv", x, w)


def gemm(g: Graph, w: str) -> str:
    return quantized(g, g.node("Gemm", quantized(g, g.input((1, 4))), w))


# -- graphs that the runtime does not fuse (`bad`), and what is right instead ----------------------


def zero_point(g: Graph, bad: bool) -> str:
    return gemm(
        g,
        g.node(
            "DequantizeLinear",
            g.const(np.ones((4, 3), S8)),
            g.f32(0.02),
            *["" if bad else g.const(np.array(0, S8))],
        ),
    )


def zero_point_of_the_input(g: Graph, bad: bool) -> str:
    zero = [] if bad else [g.const(np.array(0, S8))]
    kind: dict[str, Any] = {"output_dtype": onnx.TensorProto.INT8} if bad else {}
    x = g.node("QuantizeLinear", g.input((1, 4)), g.f32(0.05), *zero, **kind)
    x = g.node("DequantizeLinear", x, g.f32(0.05), *zero)
    return quantized(g, g.node("MatMul", x, weights(g, 4, 3)), np.zeros((), S8))


def bits(g: Graph, bad: bool) -> str:
    kind = onnx.TensorProto.INT4 if bad else onnx.TensorProto.INT8
    g.initializers += [
        helper.make_tensor("w", kind, [4, 3], [1] * 12),
        helper.make_tensor("z", kind, [], [0]),
    ]
    w = g.node("DequantizeLinear", "w", g.f32(0.02), "z")
    return quantized(g, g.node("MatMul", quantized(g, g.input((1, 4))), w))


def blocks(g: Graph, bad: bool) -> str:
    scale = np.full((2, 3), 0.1) if bad else np.full(3, 0.1)
    return gemm(
        g, weights(g, 4, 3, scale=scale, **({"block_size": 2, "axis": 0} if bad else {"axis": 1}))
    )


def stack(g: Graph, bad: bool) -> str:
    w = weights(g, 2, 4, 3, scale=[0.1, 0.2, 0.3], axis=2) if bad else weights(g, 2, 4, 3)
    return quantized(g, g.node("MatMul", quantized(g, g.input((2, 3, 4))), w))


def relu(g: Graph, bad: bool) -> str:
    return quantized(g, g.node("Relu", conv(g)), MIDDLE if bad else ZERO)


def clip(g: Graph, bad: bool) -> str:
    return quantized(g, g.node("Clip", conv(g), g.f32(0.0), g.f32(6.0 if bad else 13.0)), ZERO)


def quantized_clip(g: Graph, bad: bool) -> str:
    ends = (g.dequantize(g.const(np.array(v, U8)), 0.5, ZERO) for v in (0, 12 if bad else 26))
    return quantized(g, g.node("Clip", conv(g), *ends), ZERO)


def flatten(g: Graph, bad: bool) -> str:
    x = g.node("Flatten", quantized(g, g.input((1, 2, 2))))
    return quantized(g, g.node("Gemm", x if bad else quantized(g, x), weights(g, 4, 3)))


def float_input(g: Graph, bad: bool) -> str:
    x = image(g) if bad else quantized(g, image(g))
    return quantized(g, g.node("Conv", x, weights(g, 2, 2, 3, 3)))


def behind_relu(g: Graph, bad: bool) -> str:
    x = g.node("Abs", quantized(g, image(g)))
    return quantized(g, g.node("Conv", x if bad else quantized(g, x), weights(g, 2, 2, 3, 3)))


def before_sigmoid(g: Graph, bad: bool) -> str:
    return quantized(g, g.node("Sigmoid", conv(g) if bad else quantized(g, conv(g))))


def shared_output(g: Graph, bad: bool) -> str:
    y = conv(g)
    x = quantized(g, y)
    return g.node("Add", y if bad else x, x)


def shared_codes(g: Graph, bad: bool) -> str:
    zero = np.zeros((), S8) if bad else MIDDLE
    x = quantized(g, image(g), zero)
    y = quantized(g, g.node("Conv", x, weights(g, 2, 2, 3, 3), pads=[1, 1, 1, 1]), zero)
    return quantized(g, g.node("Add", x, y), zero)


FLOAT: dict[str, tuple[Callable[[Graph, bool], str], str, str]] = {
    # what: (graph, the node of the file, words of the message)
    "no zero point of the weights": (
        zero_point,
        "Gemm_n3",
        "the DequantizeLinear of its weights has no zero point",
    ),
    "no zero point of the input": (
        zero_point_of_the_input,
        "MatMul_n3",
        "the DequantizeLinear of its input has no zero",
    ),
    "4-bit weights": (bits, "MatMul_n3", "its weights are int4"),
    "blocked weights": (blocks, "Gemm_n3", "is blocked (scale [2, 3])"),
    "a stack per channel": (
        stack,
        "MatMul_n3",
        "a stack of matrices [2, 4, 3] with one scale per channel",
    ),
    "a kept Relu": (
        relu,
        "Conv_n3",
        "Relu 'Relu_n4' behind it stays, since the zero point of 'QuantizeLinear_n5' is 128",
    ),
    "quantized bounds of a Clip": (
        quantized_clip,
        "Conv_n3",
        "'Clip_n6' behind it stays, since it cuts the range of",
    ),
    "a Clip that cuts": (
        clip,
        "Conv_n3",
        "it cuts the range of 'QuantizeLinear_n5', 0 to 12.75, at 0 and 6",
    ),
    "a Flatten in between": (
        flatten,
        "Gemm_n4",
        "its input comes from Flatten 'Flatten_n2' without",
    ),
    "an unquantized input": (
        float_input,
        "Conv_n1",
        "its input is not quantized: put a QuantizeLinear",
    ),
    "a float op before": (behind_relu, "Conv_n4", "its input comes from Abs 'Abs_n2' without"),
    "a float op behind": (
        before_sigmoid,
        "Conv_n3",
        "its output goes into Sigmoid 'Sigmoid_n4' before it is quantized",
    ),
    "a shared output": (shared_output, "Conv_n3", "its output has 2 readers"),
    "shared int8 codes": (shared_codes, "Conv_n3", "its int8 input has 2 readers"),
}


@pytest.mark.parametrize("what", FLOAT)
def test_a_product_in_float_is_explained(what: str, tmp_path: Path) -> None:
    """With what helps indeed, and without advice to quantize what is quantized."""
    build, node, words = FLOAT[what]
    path = tmp_path / "m.onnx"
    for bad in (True, False):
        g = Graph(21)
        write(g.model(build(g, bad)), path)
        if not bad:
            read_model(path)
            continue
        with pytest.raises(UnsupportedModel) as caught:
            read_model(path)
        message = str(caught.value)
        assert (
            message.startswith(f"{path}: node '{node}' ({node.split('_')[0]} of ")
            and words in message
        ), message
        assert "uantize its inputs" not in message


def test_sixteen_bits_are_told_at_every_node(tmp_path: Path) -> None:
    g, zero = Graph(21), np.zeros((), np.uint16)
    y = quantized(g, g.node("Conv", quantized(g, image(g), zero), weights(g, 2, 2, 3, 3)), zero)
    with pytest.raises(UnsupportedModel) as caught:
        read_model(write(g.model(y), tmp_path / "m.onnx"))
    first, second, rest = caught.value.blockers
    assert "quantization to uint16 is not supported" in first
    assert second.startswith(
        "node 'Conv_n3' (Conv): its input is uint16, and onnxruntime fuses 8-bit activations only"
    )
    assert rest == "3 nodes were not looked at, for want of what these would give"


def test_all_that_stops_a_model_is_told_at_once(tmp_path: Path) -> None:
    """Equal causes together, and nodes behind a cause only where they are one themselves."""
    g = Graph(21)
    x = quantized(g, image(g))
    for _ in range(6):
        x = g.node("Conv", x, weights(g, 2, 2, 3, 3), pads=[1, 1, 1, 1])
        x = quantized(g, g.node("Relu", x))
    y = g.node("Softmax", g.node("CumSum", g.node("Tanh", x), g.const(np.array(1))))
    path = write(
        g.model(y, g.node("TopK", g.node("Tanh", x), g.const(np.array([1])), outputs=2)),
        tmp_path / "m.onnx",
    )
    with pytest.raises(UnsupportedModel) as caught:
        read_model(path)
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: node 'Conv_n3' (Conv of float32[1, 2, 5, 5], ")
        and "\n" not in message
    )
    assert (
        "and 5 more Conv nodes: the Relu 'Relu_n4' behind it stays" in message
        and message.count("Conv_n") == 1
    )
    assert (
        "; node 'CumSum_n" in message
        and "; node 'Softmax_n" in message
        and "; node 'TopK_n" in message
    )
    *lines, rest = caught.value.blockers
    ops = sorted(line.split("_")[0] for line in lines)
    assert ops == ["node 'Conv"] * 6 + ["node 'CumSum", "node 'Softmax", "node 'TopK"]
    assert "nodes were not looked at" in rest


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    g = Graph(21)
    x = g.dequantize(g.input((1, 4), U8), 1.0, ZERO)
    for op in ("CumSum", "Softmax", "Hardmax", "LogSoftmax", "ArgMax", "ArgMin"):
        x = g.node(op, x, g.const(np.array(1))) if op == "CumSum" else g.node(op, x)
        x = g.node("Cast", x, to=1) if op == "ArgMax" else x
    with pytest.raises(UnsupportedModel) as caught:
        read_model(write(g.model(x), tmp_path / "m.onnx"))
    assert str(caught.value).endswith("; and 2 more; qverify inspect MODEL lists all")
    assert sum("ArgMin" in line for line in caught.value.blockers) == 1


def test_inputs_and_outputs_are_told_too(tmp_path: Path) -> None:
    g = Graph(21)
    x = g.quantize(g.input((1, 2)), 1.0, ZERO)
    y = g.node("Relu", g.input((1, 2)))
    table = g.node("Gather", g.f32([1.0, 2.0]), g.input((1, 2), np.int64))
    with pytest.raises(UnsupportedModel) as caught:
        read_model(write(g.model(x, y, table), tmp_path / "m.onnx"))
    assert [line.split(" ")[:3] for line in caught.value.blockers] == [
        ["the", "input", "'x2'"],
        ["the", "output", f"'{y}'"],
        ["1", "node", "was"],
    ]


@pytest.mark.parametrize("name", ["Sigmoid", "Tanh", "Softmax", "LogSoftmax"])
def test_heads_that_keep_the_order(name: str, tmp_path: Path) -> None:
    """Behind a float output of the last product: the scores themselves can be compared."""
    g = Graph(21)
    y = g.node("Gemm", quantized(g, g.input((1, 4))), weights(g, 4, 3))
    with pytest.raises(
        UnsupportedModel,
        match=rf"'{name}_n4' \({name} of .*the order of its results is that of the scores",
    ):
        read_model(write(g.model(g.node(name, y)), tmp_path / "m.onnx"))


def test_a_fault_of_ours_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rule that trips is an internal error, whose traceback says at which node."""
    monkeypatch.setattr("qverify.frontend.builder.quantize_linear", lambda *_: [][0])
    g = Graph(21)
    y = quantized(g, g.node("Sqrt", g.dequantize(g.input((1, 2), U8), 1.0, ZERO)), ZERO)
    path = write(g.model(y), tmp_path / "m.onnx")
    with pytest.raises(IndexError) as caught:
        read_model(path)
    assert caught.value.__notes__ == ["while reading node 'QuantizeLinear_n2' (QuantizeLinear)"]
    assert main(["inspect", str(path), "-v"]) == 4
    told = capsys.readouterr().err
    assert "Traceback" in told and caught.value.__notes__[0] in told
    assert "internal error: IndexError: list index out of range; please report it" in told


def test_codes_that_do_not_fit_the_declared_type_are_an_internal_error() -> None:
    builder = Builder(node_name="n")
    x = builder.add_encoder(Identity(np.arange(1), 0, 255), (1,), np.uint8)
    shifted = Table(np.arange(1, 257, dtype=np.int32)[None], 0)
    with pytest.raises(
        SoundnessError, match=r"node 'n': .* uint8, but Table gives codes from 1 to 256"
    ):
        builder.emit(shifted, x, dtype=np.uint8)
    assert builder.emit(shifted, x, dtype=np.int32).type.high == 256
