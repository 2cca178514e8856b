"""Constants of a network are onnxruntime's own, to the last bit, however they are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from qverify.boundary.outputs import make_decoder
from qverify.frontend.encoder import make_encoder
from qverify.frontend.model import read_model
from qverify.kernels import open_kernels
from tests.graphs import Graph, write

CPU = open_kernels("cpu")
ZERO = np.array(0, np.uint8)
COUNT = 512

UNARY = (
    "Tanh",
    "Exp",
    "Sigmoid",
    "Erf",
    "Softplus",
    "Sqrt",
    "Log",
    "Sin",
    "Atan",
    "Reciprocal",
    "Softsign",
    "Elu",
)


def some(g: Graph) -> str:
    """Dequantized constants: onnxruntime leaves what follows them as it stands."""
    codes = np.random.default_rng(3).integers(1, 256, (1, COUNT)).astype(np.uint8)
    return g.dequantize(g.const(codes), 0.0137, ZERO)


def quantized(g: Graph, x: str) -> str:
    return g.dequantize(g.quantize(x, 0.0071, ZERO), 0.0071, ZERO)


CONSTANTS: dict[str, Callable[[Graph], str]] = {
    **{op: lambda g, op=op: g.node(op, some(g)) for op in UNARY},  # type: ignore[misc]
    "a chain": lambda g: g.node("Exp", g.node("Tanh", g.node("Exp", g.node("Sigmoid", some(g))))),
    "a quantized branch": lambda g: quantized(
        g, g.node("Mul", quantized(g, some(g)), g.node("Tanh", some(g)))
    ),
    "Microsoft's ops": lambda g: g.dequantize(
        g.node(
            "QLinearAdd",
            *(g.const(np.arange(COUNT, dtype=np.uint8)[None]), g.f32(0.013), g.const(ZERO)),
            *(
                g.const(np.arange(COUNT, dtype=np.uint8)[None][:, ::-1]),
                g.f32(0.017),
                g.const(ZERO),
            ),
            *(g.f32(0.0231), g.const(ZERO)),
        ),
        0.0231,
        ZERO,
    ),
    "a float product": lambda g: g.node(
        "MatMul",
        some(g),
        g.node("Tanh", g.node("Reshape", _square(g), g.const([COUNT, COUNT], np.int64))),
    ),
    "a softmax": lambda g: g.node("Softmax", some(g)),
}


def _square(g: Graph) -> str:
    codes = np.random.default_rng(4).integers(0, 256, COUNT * COUNT).astype(np.uint8)
    return g.dequantize(g.const(codes), 0.001, np.array(128, np.uint8))


@pytest.mark.parametrize("what", CONSTANTS)
def test_constants_are_the_runtime_s(what: str, tmp_path: Path) -> None:
    """Scaled so that another last bit of a constant is another value of the output."""
    g = Graph(21)
    x = g.dequantize(g.quantize(g.input((1, COUNT)), 1.0, ZERO), 1.0, ZERO)
    path = write(g.model(g.node("Mul", x, CONSTANTS[what](g))), tmp_path / "model.onnx")
    lowered = read_model(path).lowered
    inputs = np.random.default_rng(5).integers(0, 256, (4, COUNT)).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    actual = [session.run(None, {"x0": row[None]})[0].reshape(-1) for row in inputs]
    codes = make_encoder(lowered).encode(inputs.astype(np.float64))
    ours = make_decoder(lowered).decode(lowered.network.run(CPU, codes))
    assert np.array_equal(np.stack(actual).astype(np.float64), ours)


FORMS: dict[str, Callable[[Graph], str]] = {
    "value": lambda g: g.node(
        "Constant", value=onnx.numpy_helper.from_array(np.array([[0.25, 0.5]], np.float32))
    ),
    "value_floats": lambda g: g.node(
        "Unsqueeze", g.node("Constant", value_floats=[0.25, 0.5]), g.const([0], np.int64)
    ),
    "value_float": lambda g: g.node("Constant", value_float=0.25),
    "ConstantOfShape": lambda g: g.node(
        "ConstantOfShape",
        g.node("Constant", value_ints=[1, 2]),
        value=onnx.numpy_helper.from_array(np.array([0.25], np.float32)),
    ),
    "a shape": lambda g: g.node(
        "Cast", g.node("Shape", g.const(np.zeros((3, 7), np.float32))), to=1
    ),
}


@pytest.mark.parametrize("what", FORMS)
def test_constants_of_every_form_are_read(what: str, tmp_path: Path) -> None:
    g = Graph(21)
    x = g.dequantize(g.quantize(g.input((1, 2)), 1.0, ZERO), 1.0, ZERO)
    path = write(g.model(g.node("Mul", x, FORMS[what](g))), tmp_path / "model.onnx")
    lowered = read_model(path).lowered
    (actual,) = onnxruntime.InferenceSession(path).run(None, {"x0": np.array([[3, 5]], np.float32)})
    ours = make_decoder(lowered).decode(lowered.network.run(CPU, np.array([[3, 5]], np.int32)))
    assert np.array_equal(actual, ours)
