"""Small ONNX graphs for the tests: one line per node, names made up, files written and read
back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]

MICROSOFT = {
    *(
        "QLinearAdd",
        "QLinearMul",
        "QLinearConcat",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
    ),
    *(
        "QLinearLeakyRelu",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
        "QGemm",
        "MatMulIntegerToFloat",
    ),
    *("NhwcMaxPool", "QuickGelu", "FastGelu"),
}


class Graph:
    """A graph under construction. Every method returns the name of what it made."""

    def __init__(self, opset: int = 21) -> None:
        self.opset = opset
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []

    def input(self, shape: tuple[int | str, ...], dtype: npt.DTypeLike = np.float32) -> str:
        name = f"x{len(self.inputs)}"
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def const(self, value: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def f32(self, value: npt.ArrayLike) -> str:
        return self.const(value, np.float32)

    def node(
        self, op: str, *inputs: str, domain: Any = None, outputs: int = 1, **attributes: Any
    ) -> str:
        """The name of the node's first output; the k-th further one is that name + f"_{k}"."""
        name = f"n{len(self.nodes)}"
        names = [name, *(f"{name}_{k}" for k in range(1, outputs))]
        domain = ("com.microsoft" if op in MICROSOFT else "") if domain is None else domain
        self.nodes.append(
            helper.make_node(op, inputs, names, name=f"{op}_{name}", domain=domain, **attributes)
        )
        return name

    def quantize(self, x: str, scale: npt.ArrayLike, zero_point: Array, **attributes: Any) -> str:
        return self.node("QuantizeLinear", x, self.f32(scale), self.const(zero_point), **attributes)

    def dequantize(self, x: str, scale: npt.ArrayLike, zero_point: Array, **attributes: Any) -> str:
        return self.node(
            "DequantizeLinear", x, self.f32(scale), self.const(zero_point), **attributes
        )

    def model(self, *outputs: str) -> onnx.ModelProto:
        results = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "test", self.inputs, results, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def exact_products() -> bool:
    """Whether this CPU multiplies uint8 by int8 exactly (VNNI); older x86 saturates pairs of
    products at int16."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


ROUNDS = int(os.environ.get("QVERIFY_TEST_ROUNDS", "1"))  # more for a long run
