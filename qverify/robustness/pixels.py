"""How images become inputs of a model, and boxes around images become boxes of inputs.

Sound: a pixel's bounds are exact rationals, and they become ends of float32 (or integer) values by
the same function that reads the bounds of a VNN-LIB property; there are at most 256 different ones
for each channel and radius.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.boundary.domain import check_range, element_bounds
from qverify.errors import SpecError, UsageError
from qverify.frontend.encoder import Encoder
from qverify.frontend.lower import GraphValue
from qverify.property import Box

PIXEL_MAX = 255
Float64Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Scaling:
    """A pixel p, 0 to 255, of channel c becomes the input (p * scale - mean[c]) / std[c], in exact
    rationals; `mean` and `std` have one value, or one for each channel."""

    scale: Fraction = Fraction(1, PIXEL_MAX)
    mean: tuple[Fraction, ...] = (Fraction(0),)
    std: tuple[Fraction, ...] = (Fraction(1),)

    def __post_init__(self) -> None:
        if self.scale <= 0 or any(s <= 0 for s in self.std) or not self.mean or not self.std:
            raise UsageError("--scale and --std must be positive numbers")

    def value(self, pixel: Fraction, channel: int) -> Fraction:
        """The input that a pixel becomes."""
        mean, std = (values[channel if len(values) > 1 else 0] for values in (self.mean, self.std))
        return (pixel * self.scale - mean) / std

    def text(self) -> str:
        """For people and for files."""
        mean, std = (",".join(map(str, values)) for values in (self.mean, self.std))
        return f"(pixel * {self.scale} - {mean}) / {std}"


def fractions(what: str, text: str, count: int | None = None) -> tuple[Fraction, ...]:
    """Numbers with commas between them, decimals or quotients such as 1/255, of which there must be
    `count`. UsageError that begins with `what` where they are not."""
    try:
        result = tuple(Fraction(word.strip()) for word in text.split(","))
    except (ValueError, ZeroDivisionError):
        result = ()
    if not result or (count is not None and len(result) != count):
        raise UsageError(
            f"{what} {text}: a number is wanted"
            + ("" if count == 1 else ", or one for each channel")
        )
    return result


def default_scaling(dtype: np.dtype[Any]) -> Scaling:
    """Pixels / 255 for float32, pixels for uint8, pixels - 128 for int8."""
    if dtype == np.float32:
        return Scaling()
    return Scaling(Fraction(1), (Fraction(-int(np.iinfo(dtype).min)),))


@dataclass(frozen=True, eq=False)
class Radius:
    """What the bounds of each pixel become for one radius: [channels][256]."""

    lower: list[list[Fraction]]
    upper: list[list[Fraction]]
    ends: tuple[Float64Array, Float64Array]  # [channels, 256], the least and largest input


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images of one shape as the flat input of a model."""

    encoder: Encoder
    scaling: Scaling
    # [inputs]: the pixel behind each element, in an image's [channels, height, width].
    order: npt.NDArray[np.int64]
    channel: npt.NDArray[np.int64]  # [inputs]

    @staticmethod
    def make(
        encoder: Encoder, value: GraphValue, shape: tuple[int, int, int], scaling: Scaling | None
    ) -> Inputs:
        """For images [channels, height, width].

        The model's input `value` takes them flat, with the channels first or last, by its shape.
        UsageError where it does not take them.
        """
        name, wanted, dtype = value
        scaling = default_scaling(dtype) if scaling is None else scaling
        for what, each in (("--mean", scaling.mean), ("--std", scaling.std)):
            if len(each) not in (1, shape[0]):
                raise UsageError(
                    f"{what} has {len(each)} values, but the images have {shape[0]} channel(s)"
                )
        order = _order(name, wanted, shape)
        inputs = Inputs(encoder, scaling, order, order // (shape[1] * shape[2]))
        inputs._check(name, dtype)
        return inputs

    def _check(self, name: str, dtype: np.dtype[Any]) -> None:
        """UsageError unless every pixel becomes an input that the model can take."""
        if dtype != np.float32:
            info = np.iinfo(dtype)
            for c in range(int(self.channel.max()) + 1):
                for p in range(PIXEL_MAX + 1):
                    x = self.scaling.value(Fraction(p), c)
                    if x.denominator != 1 or not info.min <= x <= info.max:
                        raise UsageError(
                            f"the pixel {p} becomes {x} by {self.scaling.text()}, which the "
                            f"{dtype} input '{name}' cannot take: choose another --scale and --mean"
                        )
        radius = self.radius(Fraction(PIXEL_MAX))
        try:
            check_range(self.encoder, *(end[self.channel, 0] for end in radius.ends))
        except SpecError as error:
            raise UsageError(f"{error}: choose another --scale") from None

    def clean(self, pixels: Pixels) -> Float64Array:
        """Images [N, C, H, W] as inputs [N, inputs]: the exact value, rounded once to float32."""
        channels = range(int(self.channel.max()) + 1)
        exact = [
            [float(self.scaling.value(Fraction(p), c)) for p in range(PIXEL_MAX + 1)]
            for c in channels
        ]
        table = np.array(exact)
        if self.encoder.is_float[0]:
            table = table.astype(np.float32).astype(np.float64)
        return table[self.channel, self._flat(pixels)]

    def radius(self, eps: Fraction) -> Radius:
        """The tables for a radius in pixels: bounds are clipped to 0 and 255."""
        channels = range(int(self.channel.max()) + 1)
        around = [
            (max(Fraction(p) - eps, Fraction(0)), min(p + eps, Fraction(PIXEL_MAX)))
            for p in range(PIXEL_MAX + 1)
        ]
        lower, upper = (
            [[self.scaling.value(pair[k], c) for pair in around] for c in channels] for k in (0, 1)
        )
        ends = [
            [element_bounds(self.encoder, 0, a, b) for a, b in zip(low, high, strict=True)]
            for low, high in zip(lower, upper, strict=True)
        ]
        both = np.array(ends)
        return Radius(lower, upper, (both[:, :, 0], both[:, :, 1]))

    def ends(self, pixels: Pixels, radius: Radius) -> tuple[Float64Array, Float64Array]:
        """Least and largest inputs [N, inputs] around images [N, C, H, W]."""
        flat = self._flat(pixels)
        return radius.ends[0][self.channel, flat], radius.ends[1][self.channel, flat]

    def box(self, pixels: Pixels, radius: Radius) -> Box:
        """The exact box around one image [C, H, W]."""
        at = list(zip(self.channel.tolist(), self._flat(pixels[None])[0].tolist(), strict=True))
        return Box(
            tuple(radius.lower[c][p] for c, p in at), tuple(radius.upper[c][p] for c, p in at)
        )

    def _flat(self, pixels: Pixels) -> npt.NDArray[np.uint8]:
        """Images as pixels in the order of the model's input: [N, inputs]."""
        return pixels.reshape(len(pixels), -1)[:, self.order]


def _order(
    name: str, wanted: tuple[int, ...], shape: tuple[int, int, int]
) -> npt.NDArray[np.int64]:
    """For every element of an input of shape `wanted`, the number of its pixel.

    UsageError where the shapes do not fit.
    """
    c, h, w = shape
    if prod(wanted) != c * h * w:
        raise UsageError(
            f"the model's input '{name}' has shape {list(wanted)}, {prod(wanted)} elements, but an "
            f"image has {c} channel(s) of {h} x {w} pixels"
        )
    axes = list(wanted)
    while axes and axes[0] == 1 and len(axes) > 1 and tuple(axes) not in ((c, h, w), (h, w, c)):
        axes.pop(0)  # the batch
    pixels = np.arange(c * h * w, dtype=np.int64)
    long, image = ([n for n in sizes if n > 1] for sizes in (axes, shape))
    # With one channel every order is the same.
    if len(long) <= 1 or tuple(axes) == (c, h, w) or (c == 1 and long == image):
        return pixels
    if tuple(axes) == (h, w, c):
        return pixels.reshape(shape).transpose(1, 2, 0).reshape(-1)
    raise UsageError(
        f"the model's input '{name}' has shape {list(wanted)}; images of {c} channels and {h} x "
        f"{w} pixels go into [1, {c}, {h}, {w}], [1, {h}, {w}, {c}] or [1, {c * h * w}] (channel "
        "by channel)"
    )
