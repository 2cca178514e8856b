"""Quantization-aware layers: the exported network's integers, on points and on intervals.

They have gradients.

Tensors hold integers: codes and accumulators as floats, `real = (code - zero_point) * scale`. So a
layer's forward pass is the arithmetic of onnxruntime (`specs/semantics.md`) on the point and on
both ends of the interval, and what the loss sees is what the verifier will compute. Sums of points
are exact while they stay below 2**24, of boxes (halves) below 2**23; inside `exact()` both are
exact for every network that fits int32, and so are residual sums, of which a code in 100,000 may
otherwise round differently. Rounding is differentiated as the identity (straight-through: Bengio et
al. 2013), clipping as what it is; with a learned scale that is the gradient of LSQ (Esser et al.,
ICLR 2020) up to its scaling.

A layer is one class here, and one method of `export.Writer`, which writes it to an ONNX graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qverify.train.codes import (
    PIXELS,
    ActivationCodes,
    ActivationQuantizer,
    Quantized,
    ScaleKind,
    StepSize,
    Sums,
    along,
    clip,
    is_exact,
    round_through,
)

BIAS_LIMIT = 2**30  # int32 with room for the sum
TINY = 2.0**-60  # a step: far from underflow, also when it is multiplied with another
NORM_MOMENTUM = 0.1
NORM_EPSILON = 1e-5


def _per_row(values: Tensor, weight: Tensor) -> Tensor:
    """Values [] or [M], shaped to meet axis 0 of a weight [M, ...]."""
    return values.reshape(-1, *[1] * (weight.ndim - 1)) if values.ndim else values


class Input(nn.Module):
    """Pixels 0..255 -> codes: QuantizeLinear of float32(pixel / 255) with the step 1 / (2**bits -
    1)."""

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"{bits} bits are not supported: use 2 to 8")
        self.high = 2**bits - 1
        self.register_buffer("step", torch.tensor(1.0 / self.high))

    step: Tensor

    def codes(self, pixels: Tensor) -> Tensor:
        """Float32 pixels, possibly fractional (an attack's) -> codes; the gradient passes."""
        return round_through((pixels / PIXELS / self.step).clamp(0, self.high))

    def forward(
        self, point: Tensor | None, lower: Tensor | None, upper: Tensor | None
    ) -> ActivationCodes:
        point, lower, upper = (
            None if pixels is None else self.codes(pixels) for pixels in (point, lower, upper)
        )
        return ActivationCodes(point, lower, upper, self.step, 0, self.high)


def _centred(codes: Tensor, zero_point: int) -> Tensor:
    return codes - zero_point if zero_point else codes


class Affine(nn.Module):
    """A weighted sum with quantized weights, `quantizer` following.

    `None` leaves the accumulators (the last layer).

    The weights have `weight_bits` bits, symmetric, per output channel or per tensor. With `norm`,
    batch normalisation (statistics of the points, of the batch in training) is folded into the
    steps of the channels, which must be free. That leaves the weights the codes that they would get
    if it were folded into them before they are quantized.
    """

    mean: Tensor
    variance: Tensor
    levels: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        quantizer: ActivationQuantizer | None,
        weight_bits: int = 8,
        per_channel: bool = True,
        weight_scale: ScaleKind = "range",
        weight_step: float = 1.0,
        bias_bits: int | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= weight_bits <= 8:
            raise ValueError(f"{weight_bits} bits are not supported: use 2 to 8")
        if norm and not (per_channel and weight_scale in ("range", "learned")):
            raise ValueError(
                "normalisation needs a weight scale per channel that is not tied to powers of two"
            )
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        self.quantizer, self.weight_bits, self.bias_bits, self.norm = (
            quantizer,
            weight_bits,
            bias_bits,
            norm,
        )
        self.weight_scale = StepSize(weight_scale, shape[0] if per_channel else None, weight_step)
        if norm:
            self.gain = nn.Parameter(torch.ones(shape[0]))
            self.register_buffer("mean", torch.zeros(shape[0]))
            self.register_buffer("variance", torch.ones(shape[0]))
        # In checkpoints: what the step was for.
        self.register_buffer("levels", torch.tensor(self.high))
        self.frozen = False  # the population's statistics instead of the batch's
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / self.fan_in))

    @property
    def fan_in(self) -> int:
        return self.weight[0].numel()

    @property
    def high(self) -> int:
        """Weights lie in [-high, high]."""
        return int(2 ** (self.weight_bits - 1)) - 1

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The weighted sums [B, M, ...] of `x` [B, ...]."""
        raise NotImplementedError

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same, of integers or halves of them."""
        if is_exact():
            return self.product(
                x.double(), weight.double(), None if bias is None else bias.double()
            )
        return self.product(x, weight, bias)

    def _folded(
        self, weight: Tensor, step: Tensor, x: ActivationCodes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(weight, step, real bias, sums of the points where they were made), normalised.

        A channel's gain multiplies its step, and its sign the codes; so what is normalised are the
        sums that the integer network makes, and they are made once.
        """
        if not self.norm:
            return weight, step, self.bias, None
        sign = torch.where(self.gain.detach() < 0, -1.0, 1.0)
        weight = weight * _per_row(sign, weight)
        mean, variance, sums = self.mean, self.variance, None
        if self.training and not self.frozen:
            if x.point is None:
                raise ValueError("batch normalisation needs the points in training")
            sums = self.sums(_centred(x.point, x.zero_point), weight)
            axes = [axis for axis in range(sums.ndim) if axis != 1]
            variance, mean = torch.var_mean(sums.to(step.dtype), axes, correction=0)
            scale = x.scale * step
            variance, mean = variance * scale**2, mean * (scale * sign)
            with torch.no_grad():
                self.mean.lerp_(mean, NORM_MOMENTUM)
                self.variance.lerp_(variance, NORM_MOMENTUM)
        gain = self.gain / torch.sqrt(variance + NORM_EPSILON)
        return weight, step * gain.abs().clamp_min(TINY), self.bias - mean * gain, sums

    def refit(self) -> None:
        """After a state for another number of bits was loaded: cover the same range."""
        old = int(self.levels)
        if old != self.high:
            self.weight_scale.stretch(old / self.high)
            self.levels.fill_(self.high)

    def _step(self, weight: Tensor) -> Tensor:
        """The weights' step: what covers the largest (each channel's, where there are several), or
        learned from there."""
        scale = self.weight_scale
        if not scale.wants_range:
            return cast(Tensor, scale())
        size = weight.detach().abs()
        most = size.flatten(1).amax(1) if scale.log2.ndim else size.amax()
        step = torch.where(most > 0, most / self.high, 1.0).clamp_min(TINY)
        if scale.kind == "range":
            return step
        scale.observe(step)
        return cast(Tensor, scale())

    def quantized(self, x: ActivationCodes) -> Quantized:
        """The weights and biases for codes like `x`.

        Only the scale and zero point of `x` matter (but see `norm`).
        """
        step = self._step(self.weight)
        codes = round_through(
            (self.weight / _per_row(step, self.weight)).clamp(-self.high, self.high)
        )
        codes, step, bias, sums = self._folded(codes, step, x)
        scale = x.scale * step
        biases = bias / scale
        if self.bias_bits is not None:  # fixed point: the bias has a coarser step of its own
            most = bias.detach().abs().amax() / (2 ** (self.bias_bits - 1) - 1)
            coarse = torch.maximum(
                torch.exp2(torch.ceil(torch.log2(most.clamp_min(2.0**-40)))), scale.detach().max()
            )
            biases = round_through(bias / coarse) * (coarse / scale)
        biases = round_through(biases.clamp(-BIAS_LIMIT, BIAS_LIMIT))
        return Quantized(
            codes, biases, step, scale, None if sums is None else sums + along(biases, sums.ndim)
        )

    def accumulate(self, x: ActivationCodes) -> Sums:
        weight, bias, _, scale, point = self.quantized(x)
        centre = radius = None
        if x.point is not None and point is None:
            point = self.sums(_centred(x.point, x.zero_point), weight, bias)
        if x.lower is not None and x.upper is not None:
            centre = self.sums(_centred((x.lower + x.upper).mul_(0.5), x.zero_point), weight, bias)
            radius = self.sums((x.upper - x.lower).mul_(0.5), weight.abs())
        sums = Sums(point, centre, radius, scale)
        if x.trace is not None:
            x.trace.append(sums)
        return sums

    def forward(self, x: ActivationCodes) -> ActivationCodes:
        assert self.quantizer is not None
        return cast(ActivationCodes, self.quantizer(self.accumulate(x), x.trace))


class _Linear(Affine):
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)


class DenseLayer(_Linear):
    """A fully connected layer [B, inputs] -> [B, outputs]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        quantizer: ActivationQuantizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__((outputs, inputs), quantizer or ActivationQuantizer(), **options)


class ConvLayer(Affine):
    """A convolution [B, C, H, W] -> [B, M, H', W'], the same stride, padding and kernel on both
    axes."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        quantizer: ActivationQuantizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            (outputs, inputs // groups, kernel, kernel),
            quantizer or ActivationQuantizer(),
            **options,
        )
        self.stride, self.padding, self.groups = stride, padding, groups

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[1] > 1:
            # 1.4 times as fast on a CPU; the rest follows suit.
            x = x.contiguous(memory_format=torch.channels_last)
        return functional.conv2d(x, weight, bias, self.stride, self.padding, 1, self.groups)


class Logits(_Linear):
    """The last layer: accumulators with one scale for all classes, so that scores compare as
    integers do."""

    def __init__(self, inputs: int, classes: int, **options: Any) -> None:
        super().__init__((classes, inputs), None, per_channel=False, **options)

    def margins(self, x: ActivationCodes, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds [B, classes] of score[label] - score[class] over the box, as integers, and
        their scale.

        The differences of the rows are formed before the box is propagated, so this is exact over
        the box of `x`.
        """
        assert x.lower is not None and x.upper is not None
        weight, bias, _, scale, _ = self.quantized(x)
        centre = self.sums((x.lower + x.upper) / 2 - x.zero_point, weight, bias)
        present, place = torch.unique(labels, return_inverse=True)
        apart = (weight[present][:, None] - weight).abs().flatten(0, 1)
        radius = self.sums((x.upper - x.lower) / 2, apart).reshape(-1, len(present), len(weight))
        rows = torch.arange(len(labels), device=labels.device)
        return centre[rows, labels][:, None] - centre - radius[rows, place], scale


class Flatten(nn.Module):
    """[B, ...] -> [B, n]."""

    def forward(self, x: ActivationCodes) -> ActivationCodes:
        return x.map(lambda end: end.flatten(1))


class MaxPool(nn.Module):
    """The largest of each kernel x kernel window, windows side by side."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: ActivationCodes) -> ActivationCodes:
        return x.map(lambda end: functional.max_pool2d(end, self.kernel))


class AveragePool(nn.Module):
    """The mean of each kernel x kernel window, windows side by side, rounded to the input's codes.

    Exported as a depthwise convolution with ones: integer sums, so that no order of float additions
    matters.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel

    def _mean(self, end: Tensor, zero: int, high: int, factor: Tensor) -> Tensor:
        sums = functional.avg_pool2d(_centred(end, zero), self.kernel, divisor_override=1)
        return clip(sums, factor, zero, high)

    def forward(self, x: ActivationCodes) -> ActivationCodes:
        factor = (x.scale * (1.0 / self.kernel**2)) / x.scale  # float32, as the runtime forms it
        return x.map(lambda end: self._mean(end, x.zero_point, x.high, factor))


class Residual(nn.Module):
    """`body(x) + shortcut(x)`, both codes, requantized: QLinearAdd, two fused multiply-adds in
    float32.

    `body` and `shortcut` end in quantizers without `relu`; without a shortcut x itself is added. v
    = fma(a, ra, fma(b, rb, fixed)) with ra = as / ys, rb = bs / ys, fixed = yz - fma(ra, az, rb *
    bz).
    """

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        quantizer: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.body, self.shortcut, self.quantizer = (
            body,
            shortcut,
            quantizer or ActivationQuantizer(),
        )

    def forward(self, x: ActivationCodes) -> ActivationCodes:
        a: ActivationCodes = self.body(x)
        b: ActivationCodes = x if self.shortcut is None else self.shortcut(x)
        quantizer = self.quantizer
        pairs = list(zip((a.point, a.lower, a.upper), (b.point, b.lower, b.upper), strict=True))
        if quantizer.training and quantizer.scale.wants_range:
            quantizer.observe(
                *(
                    (p.detach() - a.zero_point) * a.scale + (q.detach() - b.zero_point) * b.scale
                    for p, q in pairs
                    if p is not None and q is not None
                )
            )
        step: Tensor = quantizer.scale()
        ra, rb, zero = a.scale / step, b.scale / step, int(quantizer.zero)
        one = torch.ones_like(step)

        def total(p: Tensor, q: Tensor) -> Tensor:
            """In steps from zero."""
            if not is_exact():
                return (p - a.zero_point) * ra + (q - b.zero_point) * rb
            fixed = (
                zero - (ra.double() * a.zero_point + (rb * b.zero_point).double()).float()
            ).double()
            inner = (q.double() * rb.double() + fixed).float().double()
            return (p.double() * ra.double() + inner).float() - zero

        point, lower, upper = (
            None if p is None or q is None else clip(total(p, q), one, zero, quantizer.high)
            for p, q in pairs
        )
        return ActivationCodes(point, lower, upper, step, zero, quantizer.high, x.trace)


@dataclass(frozen=True)
class Evaluation:
    """What a network says of a batch: real `logits` [B, classes] of the points.

    `margins` [B, classes] of the boxes, lower bounds of logit[label] - logit[class] (0 at the label
    itself).
    """

    logits: Tensor | None
    margins: Tensor | None


class QuantizedNetwork(nn.Module):
    """Layers from an `Input` to `Logits`: a `torch.nn.Sequential` of the layers of this module."""

    def __init__(self, *layers: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        if (
            len(layers) < 2
            or not isinstance(layers[0], Input)
            or not isinstance(layers[-1], Logits)
        ):
            raise ValueError("a network starts with Input and ends with Logits")
        self.layers = nn.Sequential(*layers)
        self.shape = shape  # of an image: (channels, height, width), or (n,)

    @property
    def head(self) -> Logits:
        return cast(Logits, self.layers[-1])

    def body(
        self,
        point: Tensor | None,
        lower: Tensor | None,
        upper: Tensor | None,
        trace: list[Sums] | None = None,
    ) -> ActivationCodes:
        """The codes that the head reads."""
        x = replace(cast(ActivationCodes, self.layers[0](point, lower, upper)), trace=trace)
        for layer in list(self.layers)[1:-1]:
            x = layer(x)
        return x

    def forward(
        self,
        point: Tensor | None,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
        labels: Tensor | None = None,
        trace: list[Sums] | None = None,
    ) -> Evaluation:
        """Evaluate pixels [B, *shape] (0..255, float32), boxes of pixels with their labels [B], or
        both."""
        x = self.body(point, lower, upper, trace)
        logits = margins = None
        if x.point is not None:
            sums = self.head.accumulate(replace(x, lower=None, upper=None))
            assert sums.point is not None
            logits = sums.point * sums.scale
        if x.lower is not None and labels is not None:
            bounds, scale = self.head.margins(x, labels)
            margins = bounds * scale
        return Evaluation(logits, margins)
