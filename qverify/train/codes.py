"""Codes, sums and step sizes of the training graph: integers as floats with gradients.

Rounding passes gradients straight through.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

ScaleKind = Literal["learned", "power-of-two", "range", "fixed"]
SCALE_KINDS: tuple[ScaleKind, ...] = ("learned", "power-of-two", "range", "fixed")
RANGE_MOMENTUM = 0.05
PIXELS = 255
# of a rectifier's inputs, where a learned step starts: what finer steps lose in range, bounds win
COVERED = 0.95

_exact = False
_rounding = True


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Sums in float64 instead of float32: exact for every network that fits int32.

    Slow, hence not for training.
    """
    global _exact
    old, _exact = _exact, True
    try:
        yield
    finally:
        _exact = old


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """No rounding at all: for checking the gradients.

    The straight-through gradients are those of this smooth graph.
    """
    global _rounding
    old, _rounding = _rounding, False
    try:
        yield
    finally:
        _rounding = old


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x) if _rounding else x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def round_through(x: Tensor) -> Tensor:
    """`torch.round` (half to even), differentiated as the identity."""
    return cast(Tensor, _Round.apply(x))  # type: ignore[no-untyped-call]


class _Clip(torch.autograd.Function):
    """One node of the graph instead of five, which saves half of the time."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, factor: Tensor, zero: int, high: int) -> Tensor:
        steps = sums.to(factor.dtype) * factor
        if any(ctx.needs_input_grad):
            outside = (steps < -zero) | (steps > high - zero)
            ctx.save_for_backward(sums if ctx.needs_input_grad[1] else None, factor, outside)
        steps = steps.clamp_(-zero, high - zero)
        if _rounding:
            steps = steps.round_()
        return steps.add_(zero) if zero else steps

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sums, factor, outside = ctx.saved_tensors
        grad = grads[0].masked_fill(outside, 0.0)
        to_factor = None
        if ctx.needs_input_grad[1]:
            to_factor = (
                (grad * sums).sum_to_size(factor.shape) if factor.ndim else (grad * sums).sum()
            )
        return grad.mul_(factor) if ctx.needs_input_grad[0] else None, to_factor, None, None


def clip(sums: Tensor, factor: Tensor, zero: int, high: int) -> Tensor:
    """float32(sum) * factor, clipped and rounded: rint(clip(v, -zero, high - zero)) + zero, codes
    in [0, high]."""
    return cast(Tensor, _Clip.apply(sums, factor, zero, high))  # type: ignore[no-untyped-call]


def is_exact() -> bool:
    """Whether sums are to be made in float64 (inside `exact()`)."""
    return _exact


@dataclass(frozen=True)
class ActivationCodes:
    """Activations of a batch: the codes of a `point` of each image, bounds of them over a box
    (`lower`, `upper`), or both.

    Floats [B, ...] that hold integers in [0, high]; the real value is (code - zero_point) * scale,
    `scale` float32 []. `trace`, if it is there, collects the accumulators of every layer, for
    regularisers.
    """

    point: Tensor | None
    lower: Tensor | None
    upper: Tensor | None
    scale: Tensor
    zero_point: int
    high: int
    trace: list[Sums] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> ActivationCodes:
        """These codes after a monotone function that keeps scale and range: a reshape, a
        maximum."""
        point, lower, upper = (
            None if end is None else function(end) for end in (self.point, self.lower, self.upper)
        )
        return replace(self, point=point, lower=lower, upper=upper)


@dataclass(frozen=True)
class Sums:
    """Accumulators: a `point`, or the box with the given `centre` and `radius` [B, ...], or both.

    All bias included.

    The real value is sum * scale, `scale` float32 [] or [channels] along axis 1.
    """

    point: Tensor | None
    centre: Tensor | None
    radius: Tensor | None
    scale: Tensor

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(point, lower, upper)"""
        if self.centre is None or self.radius is None:
            return self.point, None, None
        return self.point, self.centre - self.radius, self.centre + self.radius


class Quantized(NamedTuple):
    """The integers of a weighted sum, as floats with gradients.

    `weight` is [M, ...], `bias` [M] in units of `scale`.

    `step` [] or [M] is the weights' step, `scale` = float32(input scale * step) the accumulators'.
    `point` holds the sums of the points, where they were needed on the way (for a batch's
    statistics).
    """

    weight: Tensor
    bias: Tensor
    step: Tensor
    scale: Tensor
    point: Tensor | None = None


def along(scale: Tensor, rank: int) -> Tensor:
    """A scale [] or [channels], shaped to meet axis 1 of a tensor of this rank."""
    return scale.reshape(-1, *[1] * (rank - 2)) if scale.ndim else scale


def _quantile(parts: tuple[Tensor, ...], share: float) -> Tensor:
    """The value below which this share of some tensors' elements lies, by at most a million of
    them."""
    values = torch.cat([part.flatten() for part in parts])
    return torch.quantile(values[:: 1 + len(values) // 1_000_000], share)


class StepSize(nn.Module):
    """A step size [] or [channels]: learned, a learned power of two, the range's, or fixed.

    Kept as its binary logarithm, so that an optimiser's step is relative.
    """

    log2: Tensor
    started: Tensor

    def __init__(self, kind: ScaleKind, channels: int | None = None, fixed: float = 1.0) -> None:
        super().__init__()
        if kind not in SCALE_KINDS:
            raise ValueError(f"no scale '{kind}': use one of {', '.join(SCALE_KINDS)}")
        self.kind = kind
        start = torch.full([] if channels is None else [channels], math.log2(fixed))
        if kind in ("learned", "power-of-two"):
            self.log2 = nn.Parameter(start)
        else:
            # A fixed one goes with the bits.
            self.register_buffer("log2", start, persistent=kind != "fixed")
        self.register_buffer("started", torch.tensor(kind == "fixed"))

    @property
    def wants_range(self) -> bool:
        """Whether `observe` would change anything."""
        return self.kind == "range" or not bool(self.started)

    def observe(self, step: Tensor) -> None:
        """Note the step that would just cover what was seen.

        It is the start of a learned scale, and a part of a running average.
        """
        with torch.no_grad():
            log2 = torch.log2(step.detach().clamp_min(2.0**-40))
            if bool(self.started):
                log2 = torch.lerp(self.log2, log2, RANGE_MOMENTUM)
            self.log2.copy_(log2)
            self.started.fill_(True)

    def stretch(self, factor: float) -> None:
        """Multiply the step, unless it is fixed."""
        if self.kind != "fixed":
            with torch.no_grad():
                self.log2.add_(math.log2(factor))

    def forward(self) -> Tensor:
        return torch.exp2(round_through(self.log2) if self.kind == "power-of-two" else self.log2)


class ActivationQuantizer(nn.Module):
    """Activations of `bits` bits. `relu`: codes from 0 up, so that clipping at 0 is the rectifier.

    Otherwise the zero point lies in the middle (`symmetric`), or where the range that was seen
    first puts it.
    """

    zero: Tensor
    levels: Tensor

    def __init__(
        self,
        bits: int = 8,
        relu: bool = True,
        scale: ScaleKind = "learned",
        symmetric: bool = True,
        step: float = 1.0,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"{bits} bits are not supported: use 2 to 8")
        self.bits, self.relu, self.symmetric = bits, relu, symmetric
        self.high = 2**bits - 1
        self.scale = StepSize(scale, fixed=step)
        self.register_buffer("zero", torch.tensor(0 if relu else 2 ** (bits - 1)))
        # In checkpoints: what scale and zero point were for.
        self.register_buffer("levels", torch.tensor(self.high))

    def observe(self, *real: Tensor) -> None:
        """Note the range of some real values (before clipping), where the scale depends on it."""
        with torch.no_grad():
            most = torch.stack([values.amax() for values in real]).amax().clamp_min(0)
            least = torch.stack([values.amin() for values in real]).amin().clamp_max(0)
            if self.relu:
                if self.scale.kind in ("learned", "power-of-two"):
                    covered = _quantile(real, COVERED)
                    most = torch.where(covered > 0, covered, most)
                # a layer that starts dead may wake up
                step = torch.where(most > 0, most, -least) / self.high
            elif self.symmetric:
                step = torch.maximum(most / (self.high - self.zero), -least / self.zero)
            else:
                step = (most - least) / self.high
                self.zero.copy_(
                    torch.round(-least / step.clamp_min(1e-30)).clamp(0, self.high).to(self.zero)
                )
            self.scale.observe(step)

    def refit(self) -> None:
        """After a state for another number of bits was loaded: cover the same range."""
        old = int(self.levels)
        if old != self.high:
            self.scale.stretch(old / self.high)
            self.zero.copy_(torch.round(self.zero * (self.high / old)).to(self.zero))
            self.levels.fill_(self.high)

    def forward(self, sums: Sums, trace: list[Sums] | None = None) -> ActivationCodes:
        """float32(acc) * ((xs * ws) / ys), clipped and rounded: QLinearConv, QLinearMatMul,
        QGemm."""
        parts = sums.parts
        scale = along(sums.scale, max(part.ndim for part in parts if part is not None))
        if self.training and self.scale.wants_range:
            self.observe(*(part.detach() * scale for part in parts if part is not None))
        step = self.scale()
        point, lower, upper = (
            None if part is None else clip(part, scale / step, int(self.zero), self.high)
            for part in parts
        )
        return ActivationCodes(point, lower, upper, step, int(self.zero), self.high, trace)
