"""Where the file's floats and the network's integers meet: box -> codes, codes -> floats, outputs as floats.

The runtime is fed float32, so a box of rationals stands for a set of float32 values, and there are two readings of a
decimal bound: the exact rational, and its float32 rounding (which is what a harness compares with). `Domain` takes the
union of both, so that `unsat` holds under either. Every float32 in it is the rounding of some rational inside the exact
box, and a witness is printed as such a rational (see `decimal_for`): then `sat` holds under either reading as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.errors import SpecError
from qverify.frontend.builder import Identity, Quantizer, quantize_linear
from qverify.frontend.lower import Lowered
from qverify.kernels import open_kernels
from qverify.ops.requantize import from_ordinals, ordinals
from qverify.property import Box

CPU = open_kernels("cpu")
Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Encoder:
    """Graph inputs (flat, all inputs one after another) -> the code vector, exactly as the runtime quantizes them.

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

    def encode(self, x: Float64Array) -> Int32Array:
        """`x` [N, inputs] -> int32 [N, codes]."""
        return np.concatenate([_encode_part(p, x) for p in self.parts], axis=1)

    def scaled(self, x: Float64Array) -> npt.NDArray[np.float32]:
        """The float32 values just before rounding, [N, float codes]; an infinity is clipped to the last code."""
        with np.errstate(all="ignore"):
            parts = [_prefix(p, x) / p.scale for p in self.parts if isinstance(p, Quantizer)]
        return np.concatenate([np.zeros((len(x), 0), np.float32), *parts], axis=1)

    def encode_at(self, x: Float64Array) -> Int32Array:
        """The codes, were each code's own source element `x` [codes] (constants ignore it)."""
        result, start = [], 0
        for p in self.parts:
            own = x[start : start + len(p.source)]
            start += len(p.source)
            if isinstance(p, Identity):
                result.append(own.astype(np.int32))
            else:
                result.append(_quantized(p, np.where(p.source < 0, p.constant, own.astype(np.float32))[None])[0])
        return np.concatenate(result)


def _encode_part(part: Quantizer | Identity, x: Float64Array) -> Int32Array:
    if isinstance(part, Identity):
        return x[:, part.source].astype(np.int32)
    return _quantized(part, _source_values(part, x))


def _source_values(part: Quantizer, x: Float64Array) -> npt.NDArray[np.float32]:
    return np.where(part.source < 0, part.constant, x[:, np.maximum(part.source, 0)].astype(np.float32))


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
    kinds = [np.full(int(np.prod(shape)), dtype == np.float32) for _, shape, dtype in lowered.inputs]
    return Encoder(lowered.encoders, np.concatenate(kinds))


@dataclass(frozen=True, eq=False)
class Domain:
    """The input values that a box allows, element by element: every float32 (or integer) in [lower, upper]."""

    encoder: Encoder
    box: Box
    lower: Float64Array  # [inputs]
    upper: Float64Array  # [inputs]

    def code_box(self) -> tuple[Int32Array, Int32Array]:
        """Least and largest code of each code variable over the domain.

        Sound and tight because each quantizer is a monotone function of its one source element.
        """
        ends = self.encoder.encode(np.stack([self.lower, self.upper]))
        return ends.min(axis=0), ends.max(axis=0)

    def cells(self, low: Int32Array, high: Int32Array) -> tuple[Float64Array, Float64Array] | None:
        """Per input element, the least and largest value in the domain whose codes lie in [low, high] (int32 [codes]).

        None if for some element there is no such value.
        """
        first, last, empty = self.code_cells(low, high)
        lower, upper = self.spread(first[None], last[None])
        if empty.any() or (lower > upper).any():
            return None
        return lower[0], upper[0]

    def spread(self, first: Float64Array, last: Float64Array) -> tuple[Float64Array, Float64Array]:
        """From ends per code variable [N, codes] to ends per input element [N, inputs], within the domain."""
        source = self.encoder.source
        real = source >= 0
        lower, upper = (np.repeat(end[None], len(first), axis=0) for end in (self.lower, self.upper))
        at: Any = (slice(None), source[real])
        np.maximum.at(lower, at, first[:, real])
        np.minimum.at(upper, at, last[:, real])
        return lower, upper

    def code_cells(self, low: Int32Array, high: Int32Array) -> tuple[Float64Array, Float64Array, npt.NDArray[np.bool_]]:
        """Per code variable: the ends of the domain's values whose code lies in [low, high], and whether there are none.

        Bisection over the ordinals of float32: the set is an interval, since each quantizer is monotone.
        """
        source = self.encoder.source
        at = np.maximum(source, 0)
        a, b = self._ordinals(self.lower[at]), self._ordinals(self.upper[at])
        rising = ~self.falling()
        enters = _first_true(a, b, lambda m: np.where(rising, self._codes_at(m) >= low, self._codes_at(m) <= high))
        leaves = _first_true(a, b, lambda m: np.where(rising, self._codes_at(m) > high, self._codes_at(m) < low)) - 1
        constant = source < 0
        fixed = self._codes_at(a)
        empty = np.where(constant, (fixed < low) | (fixed > high), enters > leaves)
        return self._values(np.minimum(enters, b)), self._values(np.maximum(leaves, a)), empty

    def falling(self) -> npt.NDArray[np.bool_]:
        """[codes]: whether the code falls as the input rises, over the domain."""
        at = np.maximum(self.encoder.source, 0)
        result: npt.NDArray[np.bool_] = self.encoder.encode_at(self.upper[at]) < self.encoder.encode_at(self.lower[at])
        return result

    def _ordinals(self, value: Float64Array) -> npt.NDArray[np.int64]:
        """Input values of the code variables [codes] -> integers in the same order."""
        floats = ordinals(CPU, value.astype(np.float32)).astype(np.int64)
        whole = np.where(self._float_codes(), 0.0, value).astype(np.int64)
        return np.where(self._float_codes(), floats, whole)

    def _values(self, ordinal: npt.NDArray[np.int64]) -> Float64Array:
        """The inverse of `_ordinals`."""
        floats = from_ordinals(CPU, ordinal.astype(np.int32)).astype(np.float64)
        return np.where(self._float_codes(), floats, ordinal.astype(np.float64))

    def _float_codes(self) -> npt.NDArray[np.bool_]:
        """[codes]: whether the variable's source is a float input."""
        result: npt.NDArray[np.bool_] = self.encoder.is_float[np.maximum(self.encoder.source, 0)]
        return result

    def _codes_at(self, ordinal: npt.NDArray[np.int64]) -> Int32Array:
        return self.encoder.encode_at(self._values(ordinal))

    def lift(self, codes: Int32Array) -> Float64Array | None:
        """Input values in the domain that quantize to `codes` [codes], away from cell borders and inside the exact box
        where possible; None if there are none."""
        cell = self.cells(codes, codes)
        if cell is None:
            return None
        first, last = cell
        middle = first + (last - first) * 0.5
        rounded = np.where(self.encoder.is_float, middle.astype(np.float32).astype(np.float64), np.floor(middle))
        return np.clip(rounded, first, last)

    def decimal_for(self, index: int, value: float, exactly: bool = False) -> str:
        """A decimal that lies in the exact box and that float32(float64(...)) rounds to `value`: a short one, or
        (`exactly`) the value itself where it lies in the box."""
        lower, upper = self.box.lower[index], self.box.upper[index]
        if not self.encoder.is_float[index]:
            return str(int(value))
        number = np.float32(value)
        exact = Fraction(float(number))
        ends = (_decimal(lower, upward=True), _decimal(upper, upward=False))
        inside = (_nudged(lower, exact), _nudged(upper, exact))  # for ends that are excluded
        short = (str(number), repr(float(number)), _decimal(exact, upward=True))
        for text in (*(short[::-1] if exactly else short), *ends, *inside):
            point = Fraction(text)
            above = point > lower if index in self.box.lower_strict else point >= lower
            below = point < upper if index in self.box.upper_strict else point <= upper
            if above and below and np.float32(float(text)) == number:
                return text
        raise SpecError(f"no decimal inside the bounds of X_{index} rounds to {number}")


def _first_true(a: Any, b: Any, predicate: Any) -> npt.NDArray[np.int64]:
    """Element-wise: the least m in [a, b] where a monotone predicate holds, b + 1 if nowhere."""
    low, high = a.astype(np.int64), b.astype(np.int64) + 1
    while (low < high).any():
        middle = (low + high) // 2
        holds = predicate(np.minimum(middle, b))
        high = np.where((low < high) & holds, middle, high)
        low = np.where((low < high) & ~holds, middle + 1, low)
    least: npt.NDArray[np.int64] = low
    return least


def _decimal(value: Fraction, upward: bool) -> str:
    """`value` in decimals, exactly if it terminates; else rounded up or down far behind the digits of a float64."""
    digits = max(value.denominator.bit_length() // 3 + 30, 60)
    scaled = value * 10**digits
    whole = -(-scaled.numerator // scaled.denominator) if upward else scaled.numerator // scaled.denominator
    if value.denominator & (value.denominator - 1) == 0:
        digits = max(value.denominator.bit_length() - 1, 0)  # 2**-k has k decimals
        whole = int(value * 10**digits)
    sign, text = ("-" if whole < 0 else ""), str(abs(whole)).rjust(digits + 1, "0")
    head, tail = text[: len(text) - digits], text[len(text) - digits :].rstrip("0")
    return f"{sign}{head}" + (f".{tail}" if tail else "")


def _nudged(end: Fraction, towards: Fraction) -> str:
    """A decimal strictly between two rationals, next to `end`; `end` itself where they are equal."""
    return _decimal(end + (towards - end) / 2**40, upward=towards > end)


def make_domain(encoder: Encoder, box: Box) -> Domain:
    """The domain of a box. Integer inputs have the integers of their type that lie within it. Raises SpecError where an
    input has no value inside its bounds, or where the bounds overflow float32 on the way to the quantizer."""
    lower = np.empty(len(box.lower))
    upper = np.empty(len(box.upper))
    for i, (low, high) in enumerate(zip(box.lower, box.upper, strict=True)):
        lower[i], upper[i] = element_ends(encoder, i, low, high, i in box.lower_strict, i in box.upper_strict)
    if (lower > upper).any():
        i = int(np.flatnonzero(lower > upper)[0])
        raise SpecError(f"no value of X_{i} lies within its bounds [{float(box.lower[i])}, {float(box.upper[i])}]")
    check_range(encoder, lower, upper)
    return Domain(encoder, box, lower, upper)


def check_range(encoder: Encoder, lower: Float64Array, upper: Float64Array) -> None:
    """Raise SpecError where inputs between `lower` and `upper` [inputs] may be infinite or become NaN before rounding.

    Sound because each step by a constant is monotone also where it overflows: an infinity between the ends is one at an
    end too, so a product with 0, the only step that makes a NaN of it, makes one at that end.
    """
    ends = np.stack([lower, upper])
    if not np.isfinite(ends).all() or np.isnan(encoder.scaled(ends)).any():
        raise SpecError("the bounds are so large that the model's input arithmetic overflows float32")


def element_ends(
    encoder: Encoder, index: int, low: Fraction, high: Fraction, low_strict: bool = False, high_strict: bool = False
) -> tuple[float, float]:
    """Least and largest value of an input element between its bounds: the union of both readings for float32, the integers
    of its type otherwise. The first is the larger one where there is none."""
    if encoder.is_float[index]:
        return _float_ends(low, high, low_strict, high_strict)
    first = -(-low // 1) + (1 if low_strict and low.denominator == 1 else 0)
    last = high // 1 - (1 if high_strict and high.denominator == 1 else 0)
    return float(max(first, encoder.low)), float(min(last, encoder.high))


def _float_ends(low: Fraction, high: Fraction, low_strict: bool, high_strict: bool) -> tuple[float, float]:
    """Least and largest float32 of the union of both readings of [low, high]."""
    with np.errstate(over="ignore"):  # a bound beyond float32 becomes infinite, and is refused by the caller
        near_low, near_high = np.float32(_double(low)), np.float32(_double(high))
        first, last = _round_up(low), -_round_up(-high)
    if low_strict:
        first = first if Fraction(float(first)) > low else np.nextafter(first, np.float32(np.inf))
        near_low = first
    if high_strict:
        last = last if Fraction(float(last)) < high else np.nextafter(last, np.float32(-np.inf))
        near_high = last
    return float(min(first, near_low)), float(max(last, near_high))


def _double(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _round_up(value: Fraction) -> np.float32:
    """The least float32 that is at least `value`, within the finite range."""
    limit = np.finfo(np.float32).max
    guess = np.float32(np.clip(_double(value), -float(limit), float(limit)))
    while Fraction(float(guess)) < value and guess < limit:
        guess = np.nextafter(guess, np.float32(np.inf))
    below = np.nextafter(guess, np.float32(-np.inf))
    while guess > -limit and Fraction(float(below)) >= value:
        guess, below = below, np.nextafter(below, np.float32(-np.inf))
    return guess
