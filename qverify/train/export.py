"""Training graph -> ONNX file, in QLinear operators or QDQ pairs; then the bit-for-bit check.

Operators of the standard domain at opset 13, so that every runtime can read the file; the exception
is a residual sum among QLinear operators, for which the standard has none (com.microsoft
QLinearAdd). Weights of fewer than 8 bits are int8 codes in a smaller range; activations of fewer
than 8 bits are uint8 codes that a Clip keeps in range.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from qverify import __version__
from qverify.errors import QverifyError
from qverify.files import write_bytes
from qverify.runtime import Session
from qverify.train.codes import ActivationCodes, ActivationQuantizer, Quantized, exact
from qverify.train.config import FORMATS
from qverify.train.layers import (
    BIAS_LIMIT,
    Affine,
    AveragePool,
    ConvLayer,
    DenseLayer,
    Flatten,
    Input,
    Logits,
    MaxPool,
    QuantizedNetwork,
    Residual,
)

Format = Literal["qoperator", "qdq"]
OPSET, IR_VERSION = 13, 8
MICROSOFT = "com.microsoft"
CHECK_BATCH = 500


@dataclass(frozen=True)
class Value:
    """Codes in the graph: the tensor's name, its shape without the batch axis, their meaning."""

    name: str
    shape: tuple[int, ...]
    scale: torch.Tensor
    zero_point: int
    high: int

    @property
    def codes(self) -> ActivationCodes:
        """What a layer needs to know of its input in order to give its weights."""
        return ActivationCodes(None, None, None, self.scale, self.zero_point, self.high)


class Writer:
    """Collects the nodes and constants of one graph.

    Every layer's `emit` calls the method for its kind.
    """

    def __init__(self, form: Format, shape: tuple[int, ...]) -> None:
        if form not in FORMATS:
            raise ValueError(f"no format '{form}': use one of {', '.join(FORMATS)}")
        self.qdq = form == "qdq"
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.domains = {""}

    # -- pieces ------------------------------------------------------------------------------------

    def constant(self, value: Any, dtype: npt.DTypeLike, what: str) -> str:
        """The name of a constant, which is stored once however often it is asked for."""
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        array = np.asarray(value, dtype)
        for name, tensor in self.constants.items():
            if tensor.dims == list(array.shape) and array.size <= 1:
                held = numpy_helper.to_array(tensor)
                if held.dtype == array.dtype and held.tobytes() == array.tobytes():
                    return name
        name = f"{what}_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.domains.add(domain)
        self.nodes.append(
            helper.make_node(kind, list(inputs), [name], name=name, domain=domain, **attributes)
        )
        return name

    def _parameters(self, scale: torch.Tensor, zero_point: int) -> tuple[str, str]:
        return self.constant(scale, np.float32, "scale"), self.constant(
            zero_point, np.uint8, "zero_point"
        )

    def _dequantized(self, x: Value) -> str:
        return self.node("DequantizeLinear", x.name, *self._parameters(x.scale, x.zero_point))

    def _constant_dequantized(
        self, codes: Any, dtype: npt.DTypeLike, scale: torch.Tensor, what: str
    ) -> str:
        # onnxruntime fuses a Gemm only where every zero point is written out
        zero = self.constant(np.zeros(scale.shape, dtype), dtype, "zero_point")
        names = (self.constant(codes, dtype, what), self.constant(scale, np.float32, "scale"), zero)
        if scale.ndim:
            return self.node("DequantizeLinear", *names, axis=0)
        return self.node("DequantizeLinear", *names)

    def _kept_below(self, high: int, name: str) -> str:
        """The codes after a Clip, if they have fewer than 8 bits."""
        if high == 255:
            return name
        return self.node(
            "Clip", name, self.constant(0, np.uint8, "low"), self.constant(high, np.uint8, "high")
        )

    def _clipped(self, name: str, shape: tuple[int, ...], quantizer: ActivationQuantizer) -> Value:
        high = quantizer.high
        return Value(
            self._kept_below(high, name), shape, quantizer.scale(), int(quantizer.zero), high
        )

    def _affine(
        self,
        kind: Literal["Conv", "Gemm"],
        x: Value,
        layer: Quantized,
        y: tuple[torch.Tensor, int],
        **attributes: Any,
    ) -> str:
        """A convolution (or, in QDQ, a Gemm) and its requantization to the scale and zero point
        `y`."""
        weight, bias, step, total, _ = layer
        _check_int32(weight, bias, x)
        y_parameters = self._parameters(*y)
        if not self.qdq:
            assert kind == "Conv"
            x_parameters = self._parameters(x.scale, x.zero_point)
            w = (self.constant(weight, np.int8, "weight"), self.constant(step, np.float32, "scale"))
            w_zero = self.constant(np.zeros(step.shape, np.int8), np.int8, "zero_point")
            return self.node(
                "QLinearConv",
                x.name,
                *x_parameters,
                *w,
                w_zero,
                *y_parameters,
                self.constant(bias, np.int32, "bias"),
                **attributes,
            )
        w_float = self._constant_dequantized(weight, np.int8, step, "weight")
        b_float = self._constant_dequantized(bias, np.int32, total, "bias")
        y_float = self.node(kind, self._dequantized(x), w_float, b_float, **attributes)
        return self.node("QuantizeLinear", y_float, *y_parameters)

    # -- layers ------------------------------------------------------------------------------------

    def quantize(self, layer: Input) -> Value:
        name = self._kept_below(
            layer.high, self.node("QuantizeLinear", "input", *self._parameters(layer.step, 0))
        )
        return Value(name, self.shape, layer.step, 0, layer.high)

    def conv(self, layer: ConvLayer, x: Value) -> Value:
        quantizer = _quantizer(layer)
        name = self._affine(
            "Conv",
            x,
            layer.quantized(x.codes),
            (quantizer.scale(), int(quantizer.zero)),
            kernel_shape=list(layer.weight.shape[2:]),
            strides=[layer.stride] * 2,
            pads=[layer.padding] * 4,
            group=layer.groups,
        )
        spatial = tuple(
            (n + 2 * layer.padding - k) // layer.stride + 1
            for n, k in zip(x.shape[1:], layer.weight.shape[2:], strict=True)
        )
        return self._clipped(name, (len(layer.weight), *spatial), quantizer)

    def dense(self, layer: DenseLayer, x: Value) -> Value:
        """QDQ has Gemm; among QLinear operators only the convolution takes a bias, so that one of 1
        x 1 is used."""
        quantizer = _quantizer(layer)
        integers = layer.quantized(x.codes)
        y = (quantizer.scale(), int(quantizer.zero))
        if self.qdq:
            name = self._affine("Gemm", x, integers, y, transB=1)
            return self._clipped(name, (len(integers.bias),), quantizer)
        shape = self.constant(np.array([0, -1, 1, 1]), np.int64, "shape")
        pixel = replace(x, name=self.node("Reshape", x.name, shape))
        integers = integers._replace(weight=integers.weight[:, :, None, None])
        name = self.node("Flatten", self._affine("Conv", pixel, integers, y, kernel_shape=[1, 1]))
        return self._clipped(name, (len(integers.bias),), quantizer)

    def logits(self, layer: Logits, x: Value) -> Value:
        """float32(accumulator) * scale: as Gemm without an output quantizer, or MatMulInteger, Add,
        DequantizeLinear."""
        weight, bias, step, scale, _ = layer.quantized(x.codes)
        _check_int32(weight, bias, x)
        if self.qdq:
            w_float = self._constant_dequantized(weight, np.int8, step, "weight")
            b_float = self._constant_dequantized(bias, np.int32, scale, "bias")
            name = self.node("Gemm", self._dequantized(x), w_float, b_float, transB=1)
        else:
            zero = self.constant(x.zero_point, np.uint8, "zero_point")
            sums = self.node(
                "MatMulInteger", x.name, self.constant(weight.T, np.int8, "weight"), zero
            )
            sums = self.node("Add", sums, self.constant(bias, np.int32, "bias"))
            name = self.node("DequantizeLinear", sums, self.constant(scale, np.float32, "scale"))
        return Value(name, (len(weight),), scale, 0, 0)

    def flatten(self, x: Value) -> Value:
        return replace(x, name=self.node("Flatten", x.name), shape=(int(np.prod(x.shape)),))

    def max_pool(self, layer: MaxPool, x: Value) -> Value:
        window = [layer.kernel] * 2
        name = self.node("MaxPool", x.name, kernel_shape=window, strides=window)
        return replace(x, name=name, shape=(x.shape[0], *(n // layer.kernel for n in x.shape[1:])))

    def average_pool(self, layer: AveragePool, x: Value) -> Value:
        k, channels = layer.kernel, x.shape[0]
        mean = torch.tensor(1.0 / k**2)
        ones = Quantized(torch.ones(channels, 1, k, k), torch.zeros(channels), mean, x.scale * mean)
        name = self._affine(
            "Conv",
            x,
            ones,
            (x.scale, x.zero_point),
            kernel_shape=[k, k],
            strides=[k, k],
            group=channels,
        )
        return replace(x, name=name, shape=(channels, *(n // k for n in x.shape[1:])))

    def residual(self, layer: Residual, x: Value) -> Value:
        a = emit(layer.body, self, x)
        b = x if layer.shortcut is None else emit(layer.shortcut, self, x)
        quantizer = layer.quantizer
        y_parameters = self._parameters(quantizer.scale(), int(quantizer.zero))
        if self.qdq:
            total = self.node("Add", self._dequantized(a), self._dequantized(b))
            name = self.node("QuantizeLinear", total, *y_parameters)
        else:
            a_parameters = self._parameters(a.scale, a.zero_point)
            b_parameters = self._parameters(b.scale, b.zero_point)
            inputs = (a.name, *a_parameters, b.name, *b_parameters, *y_parameters)
            name = self.node("QLinearAdd", *inputs, domain=MICROSOFT)
        return self._clipped(name, a.shape, quantizer)

    def model(self, output: Value, properties: Mapping[str, str]) -> onnx.ModelProto:
        """The finished model, with the batch size open."""
        self.nodes[-1].output[0] = "output"
        graph = helper.make_graph(
            self.nodes,
            "qverify",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", *output.shape])],
            list(self.constants.values()),
        )
        opsets = [
            helper.make_opsetid(domain, OPSET if not domain else 1)
            for domain in sorted(self.domains)
        ]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="qverify",
            producer_version=__version__,
        )
        helper.set_model_props(model, dict(properties))
        onnx.checker.check_model(model, full_check=True)
        return model


def _check_int32(weight: torch.Tensor, bias: torch.Tensor, x: Value) -> None:
    """QverifyError where a sum could leave int32, or a bias was cut off."""
    reach = max(x.high - x.zero_point, x.zero_point)
    most = (weight.double().abs().flatten(1).sum(1) * reach + bias.double().abs()).max()
    if float(most) >= 2**31 or float(bias.abs().max()) >= BIAS_LIMIT:
        raise QverifyError(
            "a layer's accumulators do not fit int32: its weights are tiny beside its bias, or it "
            "is very wide; train with weight decay or normalisation, or with fewer bits"
        )


def _quantizer(layer: Affine) -> ActivationQuantizer:
    assert layer.quantizer is not None
    return layer.quantizer


def emit(layer: torch.nn.Module, writer: Writer, x: Value) -> Value:
    """Write a layer, or a `torch.nn.Sequential` of layers.

    QverifyError for a module that is none of ours.
    """
    if isinstance(layer, torch.nn.Sequential):
        for part in layer:
            x = emit(part, writer, x)
        return x
    match layer:
        case ConvLayer():
            return writer.conv(layer, x)
        case DenseLayer():
            return writer.dense(layer, x)
        case Logits():
            return writer.logits(layer, x)
        case Flatten():
            return writer.flatten(x)
        case MaxPool():
            return writer.max_pool(layer, x)
        case AveragePool():
            return writer.average_pool(layer, x)
        case Residual():
            return writer.residual(layer, x)
    raise QverifyError(
        f"a {type(layer).__name__} cannot be exported: build the network from qverify.train.layers"
    )


def export(
    network: QuantizedNetwork,
    path: str | os.PathLike[str],
    form: Format = "qoperator",
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the network to an ONNX file: float32 [batch, *shape] of pixels / 255 -> float32 [batch,
    classes].

    `about` goes into the file's metadata. The file appears whole or not at all.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            writer = Writer(form, network.shape)
            first, *rest = network.layers
            assert isinstance(first, Input)
            x = writer.quantize(first)
            for layer in rest:
                x = emit(layer, writer, x)
            model = writer.model(x, about or {})
    finally:
        network.train(was_training)
    write_bytes(str(path), model.SerializeToString())


def evaluate(network: QuantizedNetwork, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The exported network's outputs as the training graph computes them, float32 [N, classes]."""
    was_training, device = network.training, network.head.weight.device
    network.eval()
    results = []
    try:
        with torch.no_grad(), exact():
            for start in range(0, len(pixels), CHECK_BATCH):
                batch = torch.from_numpy(pixels[start : start + CHECK_BATCH]).to(device).float()
                x = network.body(batch.reshape(-1, *network.shape), None, None)
                sums = network.head.accumulate(x)
                assert sums.point is not None
                results.append((sums.point.float() * sums.scale).cpu().numpy())
    finally:
        network.train(was_training)
    return np.concatenate(results)


def check(
    network: QuantizedNetwork, path: str | os.PathLike[str], pixels: npt.NDArray[np.uint8]
) -> int:
    """Compare the exported file in onnxruntime with the training graph, bit for bit.

    On images uint8 [N, ...].

    Returns how many images were compared. QverifyError if an output differs.
    """
    session = Session(Path(path))
    expected = evaluate(network, pixels)
    for start in range(0, len(pixels), CHECK_BATCH):
        batch = pixels[start : start + CHECK_BATCH].reshape(-1, *network.shape)
        (actual,) = session.run([batch.astype(np.float32) / np.float32(255)])
        same = np.asarray(actual == expected[start : start + CHECK_BATCH]).all(axis=1)
        if not same.all():
            image = start + int(np.argmin(same))
            raise QverifyError(
                f"{path}: onnxruntime and the training graph differ on image {image}; please "
                "report it, unless this CPU is an x86 without VNNI, whose sums saturate"
            )
    return len(pixels)
