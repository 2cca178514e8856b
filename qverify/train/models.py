"""Ready architectures, by name, for images of any size.

`qverify.train.layers` has the parts for others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qverify.errors import UsageError
from qverify.train.codes import ActivationQuantizer, ScaleKind
from qverify.train.layers import (
    AveragePool,
    ConvLayer,
    DenseLayer,
    Flatten,
    Input,
    Logits,
    QuantizedNetwork,
    Residual,
)


@dataclass(frozen=True)
class Precision:
    """How a network is quantized.

    Bits are one number for all layers or one for each weighted layer, first to last.

    `activation_bits` are those of the layers' outputs (the last layer has none). `fixed_int_bits`:
    the 2023 paper's fixed point, with steps of 2**(1 - bits) for weights and 2**(fixed_int_bits -
    bits) for activations.
    """

    weight_bits: tuple[int, ...] = (8,)
    activation_bits: tuple[int, ...] = (8,)
    input_bits: int = 8
    per_channel: bool = True
    weight_scale: ScaleKind = "range"
    activation_scale: ScaleKind = "learned"
    symmetric: bool = True
    fixed_int_bits: int | None = None


class _Parts:
    """Gives layer after layer its precision."""

    def __init__(self, precision: Precision, norm: bool) -> None:
        self.precision, self.norm, self.count = precision, norm, 0

    def _bits(self, bits: Sequence[int], what: str) -> int:
        if len(bits) == 1:
            return bits[0]
        return bits[min(self.count, len(bits) - 1)]  # how many there must be is known at the end

    def options(self) -> dict[str, Any]:
        p = self.precision
        options: dict[str, Any] = {"weight_bits": self._bits(p.weight_bits, "weight bits")}
        if p.fixed_int_bits is None:
            options |= {"per_channel": p.per_channel, "weight_scale": p.weight_scale}
        else:
            step = 2.0 ** (1 - options["weight_bits"])  # one integer bit, the sign
            options |= {
                "per_channel": False,
                "weight_scale": "fixed",
                "weight_step": step,
                "bias_bits": 8,
            }
        return options

    def quantizer(self, relu: bool = True) -> ActivationQuantizer:
        p = self.precision
        bits = self._bits(p.activation_bits, "activation bits")
        if p.fixed_int_bits is not None:
            return ActivationQuantizer(bits, relu, "fixed", step=2.0 ** (p.fixed_int_bits - bits))
        return ActivationQuantizer(bits, relu, p.activation_scale, p.symmetric)

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        relu: bool = True,
    ) -> ConvLayer:
        layer = ConvLayer(
            inputs,
            outputs,
            kernel,
            stride,
            padding,
            quantizer=self.quantizer(relu),
            norm=self.norm,
            **self.options(),
        )
        self.count += 1
        return layer

    def dense(self, inputs: int, outputs: int) -> DenseLayer:
        layer = DenseLayer(inputs, outputs, self.quantizer(), norm=self.norm, **self.options())
        self.count += 1
        return layer

    def logits(self, inputs: int, classes: int) -> Logits:
        options = self.options()
        options.pop("per_channel")
        self.count += 1
        for bits, what in (
            (self.precision.weight_bits, "weight bits"),
            (self.precision.activation_bits, "activation bits"),
        ):
            if len(bits) not in (1, self.count, self.count - (what == "activation bits")):
                raise UsageError(f"{len(bits)} {what} are given for {self.count} weighted layers")
        return Logits(inputs, classes, **options)


def _side(n: int, kernel: int, stride: int, padding: int = 0) -> int:
    return (n + 2 * padding - kernel) // stride + 1


def _plain(
    convs: Sequence[tuple[int, int, int, int]], hidden: Sequence[int]
) -> Callable[[_Parts, tuple[int, int, int], int], list[nn.Module]]:
    """Convolutions (channels, kernel, stride, padding), then dense layers."""

    def make(parts: _Parts, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        channels, height, width = shape
        layers: list[nn.Module] = []
        for outputs, kernel, stride, padding in convs:
            layers.append(parts.conv(channels, outputs, kernel, stride, padding))
            channels = outputs
            height, width = (_side(n, kernel, stride, padding) for n in (height, width))
        if min(height, width) < 1:
            raise UsageError(
                f"images of {shape[1]} x {shape[2]} are too small for this architecture"
            )
        size = channels * height * width
        layers.append(Flatten())
        for outputs in hidden:
            layers.append(parts.dense(size, outputs))
            size = outputs
        return [*layers, parts.logits(size, classes)]

    return make


def _residual(parts: _Parts, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
    """A stem and two residual blocks, the second at half the resolution, then the mean of every
    channel."""
    channels, height, width = shape
    if height != width:
        raise UsageError(
            f"images of {height} x {width} do not fit this architecture: it needs square ones"
        )
    layers: list[nn.Module] = [parts.conv(channels, 16, 3, 2, 1)]
    side = _side(height, 3, 2, 1)
    body = nn.Sequential(parts.conv(16, 16, 3, 1, 1), parts.conv(16, 16, 3, 1, 1, relu=False))
    layers.append(Residual(body, None, parts.quantizer()))
    body = nn.Sequential(parts.conv(16, 32, 3, 2, 1), parts.conv(32, 32, 3, 1, 1, relu=False))
    layers.append(Residual(body, parts.conv(16, 32, 1, 2, 0, relu=False), parts.quantizer()))
    side = _side(side, 3, 2, 1)
    layers += [AveragePool(side), Flatten()]
    return [*layers, parts.logits(32, classes)]


MODELS: dict[str, Callable[[_Parts, tuple[int, int, int], int], list[nn.Module]]] = {
    "mlp": _plain((), (128, 128)),
    "small": _plain(((32, 5, 2, 0), (64, 4, 2, 0)), (128,)),
    "wide": _plain(((64, 5, 2, 0), (128, 4, 2, 0)), (256,)),
    "medium": _plain(((32, 5, 2, 0), (64, 3, 1, 0), (128, 3, 2, 0)), (256,)),
    "cnn7": _plain(
        ((64, 3, 1, 1), (64, 3, 1, 1), (128, 3, 2, 1), (128, 3, 1, 1), (128, 3, 1, 1)), (512,)
    ),
    "resnet": _residual,
    # The architectures of Lechner et al. (AAAI 2023), as their released code has them
    "paper-mnist": _plain(
        ((64, 5, 2, 0), (128, 3, 1, 0), (256, 3, 1, 0), (384, 3, 1, 0), (512, 3, 2, 0)), (128,)
    ),
    "paper-fashion": _plain(((64, 5, 2, 0), (96, 3, 1, 0), (128, 3, 2, 0)), (128,)),
}
MODELS["paper-cifar"] = MODELS["paper-fashion"]
PAPER_INT_BITS = {"paper-fashion": 3, "paper-cifar": 3}  # of activations; 2 otherwise


def make_model(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    precision: Precision | None = None,
    norm: bool = False,
) -> QuantizedNetwork:
    """The architecture `name` for images [channels, height, width].

    UsageError for a name or bits that do not fit.
    """
    if name not in MODELS:
        raise UsageError(f"no model '{name}': use one of {', '.join(MODELS)}")
    precision = precision or Precision()
    for bits in (*precision.weight_bits, *precision.activation_bits, precision.input_bits):
        if not 2 <= bits <= 8:
            raise UsageError(f"{bits} bits are not supported: use 2 to 8")
    layers = MODELS[name](_Parts(precision, norm), shape, classes)
    return QuantizedNetwork(Input(precision.input_bits), *layers, shape=shape)
