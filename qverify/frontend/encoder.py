"""From the graph's inputs to the network's codes, exactly as the runtime quantizes them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qverify.frontend.builder import Identity, Quantizer, quantize_linear
from qverify.frontend.lower import Lowered
from qverify.kernels import open_kernels

CPU = open_kernels("cpu")
Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Encoder:
    """Graph inputs (flat, one after another) -> the code vector, as the runtime quantizes them.

    A float input is held as float64 that is a float32; an integer input likewise as the integer.
    """

    parts: tuple[Quantizer | Identity, ...]
    is_float: npt.NDArray[np.bool_]  # [inputs]: float32 (True) or integer (False)

    @property
    def size(self) -> int:
        return sum(len(p.source) for p in self.parts)

    @property
    def low(self) -> int:
        """The least code of any variable."""
        return min(p.low for p in self.parts)

    @property
    def high(self) -> int:
        """The largest code of any variable."""
        return max(p.high for p in self.parts)

    @property
    def source(self) -> npt.NDArray[np.int64]:
        """[codes]: the input element behind each code, -1 for a constant."""
        return np.concatenate([p.source for p in self.parts])

    @functools.cached_property
    def shared(self) -> bool:
        """Whether several codes come from one input element."""
        real = self.source[self.source >= 0]
        return len(np.unique(real)) < len(real)

    def encode(self, x: Float64Array) -> Int32Array:
        """`x` [N, inputs] -> int32 [N, codes]."""
        return np.concatenate([_encode_part(p, x) for p in self.parts], axis=1)

    def scaled(self, x: Float64Array) -> npt.NDArray[np.float32]:
        """The float32 values just before rounding, [N, float codes].

        An infinity is clipped to the last code.
        """
        with np.errstate(all="ignore"):
            parts = [_prefix(p, x) / p.scale for p in self.parts if isinstance(p, Quantizer)]
        return np.concatenate([np.zeros((len(x), 0), np.float32), *parts], axis=1)

    def encode_at(self, x: Float64Array) -> Int32Array:
        """The codes, were each code's own source element `x` [codes] (constants ignore it)."""
        result, start = [], 0
        for p in self.parts:
            elements = x[start : start + len(p.source)]
            start += len(p.source)
            if isinstance(p, Identity):
                result.append(elements.astype(np.int32))
            else:
                values = np.where(p.source < 0, p.constant, elements.astype(np.float32))
                result.append(_quantized(p, values[None])[0])
        return np.concatenate(result)


def _encode_part(part: Quantizer | Identity, x: Float64Array) -> Int32Array:
    if isinstance(part, Identity):
        return x[:, part.source].astype(np.int32)
    return _quantized(part, _source_values(part, x))


def _source_values(part: Quantizer, x: Float64Array) -> npt.NDArray[np.float32]:
    return np.where(
        part.source < 0, part.constant, x[:, np.maximum(part.source, 0)].astype(np.float32)
    )


def _prefix(part: Quantizer, x: Float64Array) -> npt.NDArray[np.float32]:
    return _stepped(part, _source_values(part, x))


def _stepped(part: Quantizer, v: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    for step in part.steps:
        v = step.apply(CPU, v)
    return v


def _quantized(part: Quantizer, v: npt.NDArray[np.float32]) -> Int32Array:
    with np.errstate(over="ignore"):
        return quantize_linear(_stepped(part, v), part.scale, part.zero_point, part.low, part.high)


def make_encoder(lowered: Lowered) -> Encoder:
    """The encoder of a lowered model."""
    kinds = [
        np.full(int(np.prod(shape)), dtype == np.float32) for _, shape, dtype in lowered.inputs
    ]
    return Encoder(lowered.encoders, np.concatenate(kinds))
