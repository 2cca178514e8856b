"""Why onnxruntime leaves a product in float, and what to do about an op that has no rule.

A product (Conv, Gemm, MatMul) becomes an integer op where the runtime finds it between
DequantizeLinear and QuantizeLinear nodes that suit it. What is said here only helps the user to
mend the file: nothing is read or refused for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from qverify.frontend.blockers import Blocker

PRODUCTS = {
    "Conv": "Conv",
    "FusedConv": "Conv",
    "Gemm": "Gemm",
    "FusedGemm": "Gemm",
    "MatMul": "MatMul",
}
LAYOUT = {
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Gather",
    "Pad",
    "Expand",
    "Split",
}
PASSING = {"Identity", "Cast"}
EIGHT_BIT = {onnx.TensorProto.UINT8, onnx.TensorProto.INT8}

IN_FLOAT = (
    "onnxruntime computes it in float, in an order of additions that it does not promise; such a "
    "product can only be the network's last op"
)
SURELY = (
    "uint8 activations fuse most surely (quantize_static with activation_type=QuantType.QUInt8)"
)
_ORDER = (
    "the order of its results is that of the scores: end the model there, and compare the scores "
    "before it"
)
_DYNAMIC = (
    "dynamic quantization depends on each input's range; quantize statically (onnxruntime "
    "quantize_static)"
)
_PICKS = "it picks by the order of its input: end the model there, and compare the scores before it"

HINTS = {
    **dict.fromkeys(
        ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"), _DYNAMIC
    ),
    **dict.fromkeys(
        ("ConvTranspose", "Einsum"),
        "onnxruntime has no integer kernel for it, and computes it in float, in an order of "
        "additions that it does not promise",
    ),
    "MatMulNBits": "it quantizes activations at run time; use 8-bit QDQ weights and activations",
    "Softmax": f"{_ORDER}; or let the exporter quantize it",
    **dict.fromkeys(("LogSoftmax", "Hardmax"), _ORDER),
    **dict.fromkeys(("ArgMax", "ArgMin", "TopK"), _PICKS),
}
RISING = {"Sigmoid", "Tanh", "Softplus", "Softsign", "Exp", "Log", "Sqrt", "Erf"}

QDQ = "export the network with QuantizeLinear and DequantizeLinear pairs of 8 bits (QDQ)"
QONNX = (
    "it is QONNX, which onnxruntime cannot run: export the network as QDQ or QCDQ instead "
    "(Brevitas: brevitas.export.export_onnx_qcdq; up to 8 bits)"
)
FORMATS = {  # the beginning of a domain: whose ops they are, and what to do
    "qonnx.": QONNX,
    "onnx.brevitas": QONNX,
    "finn.": QONNX,
    "org.openvinotoolkit": "it is OpenVINO's own, which onnxruntime cannot run: "
    f"{QDQ}, as NNCF does for ONNX",
    "trt": f"it is TensorRT's own, which onnxruntime's CPU provider cannot run: {QDQ}",
    "com.amd.quark": f"it is AMD Quark's own, which onnxruntime cannot run: {QDQ}",
    "com.vai.quantize": f"it is Vitis AI's own, which onnxruntime cannot run: {QDQ}",
    "aimet": f"it is AIMET's own, which onnxruntime cannot run: {QDQ}",
}
QONNX_OPS = {"Quant", "BipolarQuant", "IntQuant", "MultiThreshold", "Trunc", "FloatQuant"}
RUNTIME = {
    "",
    "ai.onnx",
    "ai.onnx.ml",
    "ai.onnx.preview",
    "ai.onnx.preview.training",
    "ai.onnx.training",
}
RUNTIME |= {
    "com.microsoft",
    "com.microsoft.experimental",
    "com.microsoft.nchwc",
    "com.ms.internal.nhwc",
}
RUNTIME |= {"org.pytorch.aten"}


def foreign_nodes(model: onnx.ModelProto) -> list[Blocker]:
    """Nodes of formats that onnxruntime does not know.

    It would only say that it cannot load the file.
    """
    found = []
    for node in model.graph.node:
        reason = next(
            (text for start, text in FORMATS.items() if node.domain.startswith(start)), None
        )
        if reason is None and node.op_type in QONNX_OPS and node.domain in ("", "ai.onnx"):
            reason = QONNX
        if reason is None and node.domain not in RUNTIME:
            reason = (
                f"'{node.domain}' is not part of ONNX, and onnxruntime cannot run it: export with "
                "ONNX's own ops"
            )
        if reason is not None:
            found.append(Blocker(reason, node.name or next(iter(node.output), ""), spelled(node)))
    return found


def spelled(node: onnx.NodeProto) -> str:
    """The op with its domain, where that is not ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


@dataclass(frozen=True)
class Finding:
    """One thing that keeps a node from being fused.

    `kind` is the text without what differs between nodes.
    """

    text: str
    kind: str


class Diagnosis:
    """Says what keeps a product from being fused.

    Looks at the nodes of the user's file, since its names are theirs, and at the runtime's graph
    where it must.
    """

    def __init__(self, graph: onnx.GraphProto, file: onnx.GraphProto) -> None:
        self._ours, self._theirs = Wiring(graph), Wiring(file)
        self._named = {node.name: node for node in file.node if node.name}

    def name_in_file(self, name: str) -> str:
        """The file's name of a node of the runtime's graph.

        The runtime adds suffixes to some names (Conv_1_token_3, Gemm/...).
        """
        if name in self._named:
            return name
        cuts = (name[:k] for k in range(len(name) - 1, 0, -1) if name[k] in "_/")
        return next((cut for cut in cuts if cut in self._named), name)

    def op_in_file(self, node: onnx.NodeProto) -> str:
        """The op of a node as the file has it: what the runtime fuses gets other names."""
        theirs = self._named.get(self.name_in_file(node.name))
        if theirs is not None and {theirs.op_type, node.op_type} <= {*PRODUCTS}:
            return str(theirs.op_type)
        return spelled(node)

    def is_head(self, node: onnx.NodeProto) -> bool:
        """Whether all that a node gives are outputs of the model, perhaps moved."""
        return all(self._ours.ends(name) for name in node.output if name)

    def hint(self, node: onnx.NodeProto) -> str:
        """What to do about an op that has no rule, or none in its place."""
        if node.op_type in HINTS:
            return HINTS[node.op_type]
        return _ORDER if node.op_type in RISING and self.is_head(node) else ""

    def product(self, node: onnx.NodeProto) -> tuple[str, str] | None:
        """Why the runtime did not fuse a product of floats, and the kind of reason.

        None if there is nothing to see.
        """
        theirs = self._named.get(self.name_in_file(node.name))
        if theirs is not None and PRODUCTS.get(theirs.op_type) in (
            PRODUCTS[node.op_type],
            "MatMul",
        ):
            faults = list(self._theirs.faults(theirs))
        else:
            faults = list(self._ours.faults(node))
        if not faults:
            return None
        return "; ".join(fault.text for fault in faults), ", ".join(fault.kind for fault in faults)


class Wiring:
    """Who makes and who reads the tensors of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._maker = {name: node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._constants: dict[str, onnx.TensorProto] = {
            tensor.name: tensor for tensor in graph.initializer
        }
        self._kinds = {item.name: item.type.tensor_type.elem_type for item in graph.input}
        self._outputs = {item.name for item in graph.output}

    def ends(self, name: str) -> bool:
        """Whether a tensor goes to the model's outputs only, perhaps moved."""
        readers = self._readers.get(name, [])
        moved = all(
            r.op_type in LAYOUT | PASSING and all(map(self.ends, r.output)) for r in readers
        )
        return moved and (name in self._outputs or bool(readers))

    def faults(self, node: onnx.NodeProto) -> Iterator[Finding]:
        """What keeps the runtime from making an integer op of a product.

        Or what perhaps does, if nothing surely does.
        """
        sure = [*self._of_weights(node), *self._of_input(node), *self._of_output(node)]
        yield from sure or self._perhaps(node)

    # -- its inputs --------------------------------------------------------------------------------

    def _of_weights(self, node: onnx.NodeProto) -> Iterator[Finding]:
        name = node.input[1] if len(node.input) > 1 else ""
        dequantizer = self._made_by(name, "DequantizeLinear")
        if dequantizer is None:
            if not self._is_constant(name):
                yield _fault(
                    "both of its operands depend on the input, and such products have no rule"
                )
            return
        kind = self._codes_of(dequantizer)
        if kind is not None and kind not in EIGHT_BIT:
            yield _fault(
                f"its weights are {_type_name(kind)}, and onnxruntime fuses 8-bit weights only: "
                "use 8 bits"
            )
            return
        yield from self._of_parameters(dequantizer, "its weights", node)

    def _of_input(self, node: onnx.NodeProto) -> Iterator[Finding]:
        name = node.input[0]
        dequantizer = self._made_by(name, "DequantizeLinear")
        if dequantizer is not None:
            kind = self._codes_of(dequantizer)
            if kind is not None and kind not in EIGHT_BIT:
                yield _fault(
                    f"its input is {_type_name(kind)}, and onnxruntime fuses 8-bit activations "
                    "only: use uint8"
                )
                return
            yield from self._of_parameters(dequantizer, "its input", None)
            return
        maker = self._maker.get(name)
        while maker is not None and maker.op_type in PASSING and maker.input:
            maker = self._maker.get(maker.input[0])
        if maker is None:
            yield _fault(
                "its input is not quantized: put a QuantizeLinear and a DequantizeLinear in front "
                "of it"
            )
        else:
            yield _fault(
                f"its input comes from {maker.op_type} '{maker.name}' without a QuantizeLinear "
                f"and a DequantizeLinear in between: put them behind the {maker.op_type}",
                f"input from {maker.op_type}",
            )

    def _of_parameters(
        self, dequantizer: onnx.NodeProto, what: str, product: onnx.NodeProto | None
    ) -> Iterator[Finding]:
        """Of a DequantizeLinear; `product` is the node whose weights it makes."""
        where = f"the {dequantizer.op_type} of {what}"
        scale, codes = (
            self._constants.get(dequantizer.input[1]),
            self._constants.get(dequantizer.input[0]),
        )
        if scale is None:
            return
        rank, count = len(scale.dims), int(np.prod(scale.dims, dtype=np.int64))
        if rank > 1 or _attribute(dequantizer, "block_size", 0):
            yield _fault(
                f"{where} is blocked (scale {list(scale.dims)}): use one scale, or one per channel"
            )
        elif count > 1 and product is None:
            yield _fault(
                f"{where} has {count} scales: use one for all channels of activations",
                f"{where} per channel",
            )
        elif (
            count > 1
            and codes is not None
            and product is not None
            and product.op_type == "MatMul"
            and len(codes.dims) > 2
        ):
            yield _fault(
                f"its weights are a stack of matrices {list(codes.dims)} with one scale per "
                "channel: use one scale for all",
                "stack per channel",
            )

    # -- its output --------------------------------------------------------------------------------

    def _of_output(self, node: onnx.NodeProto) -> Iterator[Finding]:
        name, between = node.output[0], _activation(node)
        while True:
            readers = self._readers.get(name, [])
            if not readers:
                if not between and node.op_type == "Conv":
                    yield _fault(
                        "its output is not quantized: put a QuantizeLinear and a DequantizeLinear "
                        "behind it"
                    )
                return
            if len(readers) > 1 or name in self._outputs:
                yield _fault(
                    f"its output has {len(readers) + (name in self._outputs)} readers, and "
                    "onnxruntime fuses only where a QuantizeLinear is the only one: quantize it "
                    "before it is shared",
                    "shared output",
                )
                return
            reader = readers[0]
            if reader.op_type == "QuantizeLinear":
                yield from self._of_quantizer(reader, between)
                return
            if reader.op_type in ("Relu", "Clip"):
                between.append(reader)
            elif not (reader.op_type in PASSING or self._adds_bias(node, reader)):
                yield _fault(
                    f"its output goes into {reader.op_type} '{reader.name}' before it is "
                    "quantized: put a QuantizeLinear and a DequantizeLinear in between",
                    f"output into {reader.op_type}",
                )
                return
            name = reader.output[0]

    def _adds_bias(self, node: onnx.NodeProto, reader: onnx.NodeProto) -> bool:
        return (
            node.op_type == "MatMul"
            and reader.op_type == "Add"
            and any(self._is_constant(name) for name in reader.input)
        )

    def _of_quantizer(
        self, quantizer: onnx.NodeProto, between: list[onnx.NodeProto]
    ) -> Iterator[Finding]:
        kind = self._codes_of(quantizer)
        if kind is not None and kind not in EIGHT_BIT:
            yield _fault(
                f"its output is {_type_name(kind)}, and onnxruntime fuses 8-bit activations only: "
                "use uint8"
            )
            return
        if len(quantizer.input) < 3:
            return
        zero, scale = (self._value(name) for name in (quantizer.input[2], quantizer.input[1]))
        if zero is None or scale is None or zero.size != 1 or scale.size != 1:
            return
        info = np.iinfo(np.uint8 if kind == onnx.TensorProto.UINT8 else np.int8)
        point, step = int(zero.reshape(-1)[0]), float(scale.reshape(-1)[0])
        for node in between:
            if node.op_type == "Relu" and point != info.min:
                yield _fault(
                    f"the Relu '{node.name}' behind it stays, since the zero point of "
                    f"'{quantizer.name}' is {point}, not the lowest code {info.min}: quantize the "
                    f"Relu's output with the zero point {info.min}",
                    "zero point behind Relu",
                )
            elif node.op_type == "Clip":
                covered = ((info.min - point) * step, (info.max - point) * step)
                yield from self._of_clip(node, quantizer.name, covered)

    def _of_clip(
        self, clip: onnx.NodeProto, quantizer: str, covered: tuple[float, float]
    ) -> Iterator[Finding]:
        names = [*clip.input[1:3], "", ""][:2]
        given = [self._number(name) for name in names]
        if any(name and value is None for name, value in zip(names, given, strict=True)):
            return
        bounds = [_attribute(clip, key, end) for key, end in (("min", -np.inf), ("max", np.inf))]
        least, most = (float(b if v is None else v) for v, b in zip(given, bounds, strict=True))
        if covered[0] < least or covered[1] > most:
            yield _fault(
                f"the Clip '{clip.name}' behind it stays, since it cuts the range of "
                f"'{quantizer}', {covered[0]:.4g} to {covered[1]:.4g}, at {least:.4g} and "
                f"{most:.4g}: choose scale and zero point so that the range ends there",
                "Clip cuts",
            )

    # -- what may be the reason --------------------------------------------------------------------

    def _perhaps(self, node: onnx.NodeProto) -> Iterator[Finding]:
        dequantizer = self._made_by(node.input[0], "DequantizeLinear")
        quantizer = dequantizer and self._made_by(dequantizer.input[0], "QuantizeLinear")
        behind = self._readers.get(node.output[0], [])
        around = (
            ("input", dequantizer),
            ("input", quantizer),
            ("weights", self._made_by(node.input[1], "DequantizeLinear")),
            ("output", next((r for r in behind if r.op_type == "QuantizeLinear"), None)),
        )
        for what, other in around:
            if other is not None and (len(other.input) < 3 or not other.input[2]):
                yield _fault(
                    f"the {other.op_type} of its {what} has no zero point, which can keep "
                    "onnxruntime from fusing it: give it a zero point of 0, typed as its codes"
                )
        if self._made_by(node.input[1], "DequantizeLinear") is None:
            yield _fault(
                "its weights are floats without a DequantizeLinear: quantize them to 8 bits"
            )
        if dequantizer is None or self._codes_of(dequantizer) != onnx.TensorProto.INT8:
            return
        readers = max(
            len(self._readers.get(name, []))
            for name in (dequantizer.input[0], dequantizer.output[0])
        )
        if readers > 1:
            yield _fault(
                f"its int8 input has {readers} readers, which keeps onnxruntime from fusing int8 "
                f"activations: {SURELY}",
                "shared int8",
            )
        else:
            yield _fault(f"onnxruntime did not fuse it; its input is int8, and {SURELY}")

    # -- looking around ----------------------------------------------------------------------------

    def _made_by(self, name: str, op: str) -> onnx.NodeProto | None:
        maker = self._maker.get(name)
        while maker is not None and maker.op_type == "Identity":
            maker = self._maker.get(maker.input[0])
        return maker if maker is not None and maker.op_type == op else None

    def _codes_of(self, node: onnx.NodeProto) -> int | None:
        """The element type of what a QuantizeLinear gives or a DequantizeLinear takes.

        None if it cannot be told.
        """
        if len(node.input) > 2 and node.input[2]:
            zero = self._constant_of(node.input[2])
            return None if zero is None else zero.data_type
        if node.op_type == "QuantizeLinear":
            return int(_attribute(node, "output_dtype", 0)) or int(onnx.TensorProto.UINT8)
        codes, quantizer = (
            self._constant_of(node.input[0]),
            self._made_by(node.input[0], "QuantizeLinear"),
        )
        if codes is not None:
            return codes.data_type
        return (
            self._codes_of(quantizer) if quantizer is not None else self._kinds.get(node.input[0])
        )

    def _constant_of(self, name: str) -> onnx.TensorProto | None:
        if name in self._constants:
            return self._constants[name]
        maker = self._maker.get(name)
        if maker is not None and maker.op_type == "Constant":
            for attribute in maker.attribute:
                if attribute.name == "value":
                    tensor: onnx.TensorProto = attribute.t
                    return tensor
        return None

    def _number(self, name: str) -> float | None:
        """A constant of one element, perhaps dequantized."""
        value, maker = self._value(name), self._made_by(name, "DequantizeLinear")
        if value is None and maker is not None:
            codes, scale, zero = (self._value(part) for part in [*maker.input, ""][:3])
            if codes is not None and scale is not None and codes.size == scale.size == 1:
                value = (codes.astype(np.float64) - (0 if zero is None else zero)) * scale
        return None if value is None or value.size != 1 else float(value.reshape(-1)[0])

    def _value(self, name: str) -> npt.NDArray[Any] | None:
        tensor = self._constant_of(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError):  # damaged, which is not what is diagnosed here
            return None

    def _is_constant(self, name: str) -> bool:
        """Whether a tensor does not depend on the model's inputs."""
        stack, seen = [name], set[str]()
        while stack:
            name = stack.pop()
            if name in self._constants or name in seen or not name:
                continue
            seen.add(name)
            if name not in self._maker:
                return False
            stack += self._maker[name].input
        return True


def _activation(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """What the runtime has already fused into a float product, as a separate node."""
    op = _attribute(node, "activation", b"").decode()
    if not op:
        return []
    names = ("min", "max") if op == "Clip" else ()
    bounds = dict(zip(names, _attribute(node, "activation_params", ()), strict=False))
    return [onnx.helper.make_node(op, [], [], name=node.name, **bounds)]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found: Iterable[Any] = (
        onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name
    )
    return next(iter(found), default)


def _type_name(kind: int) -> str:
    return str(onnx.TensorProto.DataType.Name(kind)).lower()


def _fault(text: str, kind: str = "") -> Finding:
    return Finding(text, kind or text)
