"""Where the file's floats meet the network's integers on the way in: boxes, cells, decimals.

The runtime is fed float32, so a box of rationals stands for a set of float32 values, and there are
several readings of a decimal bound: the rational that it spells, the nearest double, and the
nearest float32 (at once, or by way of the double, as a harness does that compares in float32). An
input may be a decimal too, of which the network is fed the rounding, so the rounding of an excluded
bound counts as well. `Domain` holds the values that lie inside under some reading, and `unsat`
holds for all of them; `Domain.certain` are those that lie inside under every reading, and only they
are counterexamples. A witness is printed as a decimal inside the exact box that every one of these
roundings turns into the value that was run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.boundary.rounding import as_decimal, as_double, double_above, float32s, nudged_decimal
from qverify.errors import EmptyBox, SpecError
from qverify.frontend.encoder import CPU, Encoder
from qverify.ops.requantize import from_ordinals, ordinals
from qverify.property import Box

Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Domain:
    """The input values that a box allows under some reading.

    Element by element, they are every float32 (or integer) in [lower, upper].
    """

    encoder: Encoder
    box: Box
    lower: Float64Array  # [inputs]
    upper: Float64Array  # [inputs]

    def code_box(self) -> tuple[Int32Array, Int32Array]:
        """Least and largest code of each code variable over the domain.

        Sound and tight because each quantizer is a monotone function of its one source element.
        """
        codes = self.encoder.encode(np.stack([self.lower, self.upper]))
        return codes.min(axis=0), codes.max(axis=0)

    def cells(self, low: Int32Array, high: Int32Array) -> tuple[Float64Array, Float64Array] | None:
        """Per input element, the least and the largest value whose codes lie in [low, high].

        None if for some element no value in the domain has such codes (int32 [codes]).
        """
        first, last, empty = self.code_cells(low, high)
        lower, upper = self.spread(first[None], last[None])
        if empty.any() or (lower > upper).any():
            return None
        return lower[0], upper[0]

    def spread(self, first: Float64Array, last: Float64Array) -> tuple[Float64Array, Float64Array]:
        """From bounds per code variable [N, codes] to bounds per input element [N, inputs]."""
        source = self.encoder.source
        real = source >= 0
        lower = np.repeat(self.lower[None], len(first), axis=0)
        upper = np.repeat(self.upper[None], len(first), axis=0)
        at: Any = (slice(None), source[real])
        np.maximum.at(lower, at, first[:, real])
        np.minimum.at(upper, at, last[:, real])
        return lower, upper

    def code_cells(
        self, low: Int32Array, high: Int32Array
    ) -> tuple[Float64Array, Float64Array, npt.NDArray[np.bool_]]:
        """Per code variable, the least and the largest value whose code lies in [low, high].

        The third result says where there is none. By bisection over the ordinals of float32: the
        set is an interval, since each quantizer is monotone.
        """
        source = self.encoder.source
        at = np.maximum(source, 0)
        a, b = self._ordinals(self.lower[at]), self._ordinals(self.upper[at])
        rising = ~self.falling()

        def inside(ordinal: Any) -> Any:  # or already beyond
            codes = self._codes_at(ordinal)
            return np.where(rising, codes >= low, codes <= high)

        def beyond(ordinal: Any) -> Any:
            codes = self._codes_at(ordinal)
            return np.where(rising, codes > high, codes < low)

        first, last = _first_true(a, b, inside), _first_true(a, b, beyond) - 1
        fixed = self._codes_at(a)
        empty = np.where(source < 0, (fixed < low) | (fixed > high), first > last)
        return self._values(np.minimum(first, b)), self._values(np.maximum(last, a)), empty

    def falling(self) -> npt.NDArray[np.bool_]:
        """[codes]: whether the code falls as the input rises, over the domain."""
        at = np.maximum(self.encoder.source, 0)
        result: npt.NDArray[np.bool_] = self.encoder.encode_at(
            self.upper[at]
        ) < self.encoder.encode_at(self.lower[at])
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

    @functools.cached_property
    def certain(self) -> tuple[Float64Array, Float64Array]:
        """Least and largest value of each input [inputs] inside its bounds under every reading.

        The first is the larger one where there is none.
        """
        bounds = [_bounds(self.encoder, self.box, i, certain=True) for i in range(len(self.lower))]
        return np.array([low for low, _ in bounds]), np.array([high for _, high in bounds])

    def lift(self, codes: Int32Array) -> Float64Array | None:
        """Input values in the domain that quantize to `codes` [codes]; None if there are none.

        They lie away from the borders of the cell, and inside the box under every reading where
        possible.
        """
        cell = self.cells(codes, codes)
        if cell is None:
            return None
        first, last = cell
        low, high = np.maximum(first, self.certain[0]), np.minimum(last, self.certain[1])
        possible = low <= high
        return self.middle(np.where(possible, low, first), np.where(possible, high, last))

    def middle(self, first: Float64Array, last: Float64Array) -> Float64Array:
        """Input values halfway between others [inputs]."""
        middle = first + (last - first) * 0.5
        rounded = np.where(
            self.encoder.is_float, middle.astype(np.float32).astype(np.float64), np.floor(middle)
        )
        return np.clip(rounded, first, last)

    def hull(self, lower: Float64Array, upper: Float64Array) -> tuple[Float64Array, Float64Array]:
        """From bounds of inputs [N, inputs] to bounds of all that these inputs may stand for.

        That is themselves, and the decimals inside the box that are fed as one of them, also after
        they became doubles. Sound because a decimal lies at most half a step from its float32; one
        that becomes a double first, and is then halfway between two, half a step of that more.
        """

        def border(value: Float64Array, side: float) -> Float64Array:
            """What the last decimal on that side that is fed as `value` may become."""
            beyond = np.nextafter(value.astype(np.float32), np.float32(side)).astype(np.float64)
            result: Float64Array = np.nextafter((value + beyond) / 2, side)
            return result

        with np.errstate(over="ignore", invalid="ignore"):
            low = np.minimum(lower, np.maximum(border(lower, -np.inf), self._outside[0]))
            high = np.maximum(upper, np.minimum(border(upper, np.inf), self._outside[1]))
        is_float = self.encoder.is_float
        return np.where(is_float, low, lower), np.where(is_float, high, upper)

    @functools.cached_property
    def _outside(self) -> tuple[Float64Array, Float64Array]:
        """The bounds as doubles, not inside of them."""
        lower = [-double_above(-low) for low in self.box.lower]
        return np.array(lower), np.array([double_above(high) for high in self.box.upper])

    @functools.cached_property
    def _certain_codes(self) -> tuple[Int32Array, Int32Array] | None:
        low, high = self.certain
        return None if (low > high).any() else replace(self, lower=low, upper=high).code_box()

    def without_certain(self, low: Int32Array, high: Int32Array) -> npt.NDArray[np.bool_]:
        """Which boxes of codes [N, codes] no input in `certain` has a code in: [N]."""
        if self._certain_codes is None:
            return np.ones(len(low), np.bool_)
        first, last = self._certain_codes
        return np.asarray(((high < first) | (low > last)).any(axis=1), np.bool_)

    def is_certain(self, x: Float64Array) -> bool:
        """Whether inputs [inputs] lie inside the box under every reading of its bounds."""
        return bool(((self.certain[0] <= x) & (x <= self.certain[1])).all())

    def decimal_for(self, index: int, value: float, exactly: bool = False) -> str:
        """A decimal in the exact box (as a double, in the box of doubles) that is fed as `value`.

        It is rounded to the float32 `value` at once and by way of float64. It is a short one, or
        (`exactly`) the value itself where that lies in the box. Raises SpecError if there is none.
        """
        if not self.encoder.is_float[index]:
            return str(int(value))
        lower, upper = self.box.lower[index], self.box.upper[index]
        number = np.float32(value)
        exact = Fraction(float(number))
        short = (str(number), repr(float(number)), as_decimal(exact, upward=True))
        bounds = (as_decimal(lower, upward=True), as_decimal(upper, upward=False))
        # Where a bound is excluded: decimals just inside of it.
        inside = (nudged_decimal(lower, exact), nudged_decimal(upper, exact))
        for text in (*(short[::-1] if exactly else short), *bounds, *inside):
            point = Fraction(text)
            if inside_bounds(self.box, index, point) and set(float32s(point)) == {number}:
                return text
        raise SpecError(f"no decimal inside the bounds of X_{index} rounds to {number}")


def inside_bounds(box: Box, index: int, point: Fraction) -> bool:
    """Whether an input element lies within its bounds, both as rationals and as doubles."""
    lower, upper = box.lower[index], box.upper[index]
    for low, x, high in (
        (lower, point, upper),
        (as_double(lower), as_double(point), as_double(upper)),
    ):
        above = x > low if index in box.lower_strict else x >= low
        below = x < high if index in box.upper_strict else x <= high
        if not (above and below):
            return False
    return True


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


def make_domain(encoder: Encoder, box: Box) -> Domain:
    """The domain of a box. Integer inputs have the integers of their type that lie within it.
    Raises EmptyBox where an input has no value inside its bounds under any reading, SpecError where
    the bounds overflow float32 on the way to the quantizer."""
    bounds = np.array([_bounds(encoder, box, i) for i in range(len(box.lower))]).reshape(-1, 2)
    lower, upper = bounds[:, 0].copy(), bounds[:, 1].copy()
    if (lower > upper).any():
        i = int(np.flatnonzero(lower > upper)[0])
        raise EmptyBox(f"no value of X_{i} lies within its bounds {_interval(box, i)}")
    check_range(encoder, lower, upper)
    return Domain(encoder, box, lower, upper)


def _interval(box: Box, i: int) -> str:
    opening, closing = "(" if i in box.lower_strict else "[", ")" if i in box.upper_strict else "]"
    return f"{opening}{as_double(box.lower[i])}, {as_double(box.upper[i])}{closing}"


def check_range(encoder: Encoder, lower: Float64Array, upper: Float64Array) -> None:
    """Raise SpecError where inputs in [lower, upper] could become infinite or NaN before rounding.

    Sound because each step by a constant is monotone also where it overflows: an infinity in
    between is one at `lower` or `upper` too, so a product with 0, the only step that makes a NaN of
    it, makes one there.
    """
    bounds = np.stack([lower, upper])
    if not np.isfinite(bounds).all() or np.isnan(encoder.scaled(bounds)).any():
        raise SpecError(
            "the bounds are so large that the model's input arithmetic overflows float32"
        )


def _bounds(encoder: Encoder, box: Box, i: int, certain: bool = False) -> tuple[float, float]:
    strict = i in box.lower_strict, i in box.upper_strict
    return element_bounds(encoder, i, box.lower[i], box.upper[i], strict, certain)


def element_bounds(
    encoder: Encoder,
    index: int,
    low: Fraction,
    high: Fraction,
    strict: tuple[bool, bool] = (False, False),
    certain: bool = False,
) -> tuple[float, float]:
    """Least and largest value of an input element that lies within its bounds under some reading.

    With `certain`: under every one. The first is the larger one where there is none.

    Sound because rounding is monotone: a decimal inside the bounds is fed as a float32 between
    their roundings, and so is every float32 inside; where bounds exclude one another, so do their
    roundings.
    """
    if low >= high if any(strict) else low > high and certain:
        return np.inf, -np.inf
    wider: Callable[..., Any] = min if certain else max
    if not encoder.is_float[index]:
        first, last = -wider(_last(-low, strict[0])), wider(_last(high, strict[1]))
        return float(max(first, encoder.low)), float(min(last, encoder.high))
    first, last = -wider(float32s(-low)), wider(float32s(high))
    if certain:
        # The rounding of an excluded bound may stand for a decimal inside; as a float32 it is
        # excluded.
        first = np.nextafter(first, np.float32(np.inf)) if strict[0] else first
        last = np.nextafter(last, np.float32(-np.inf)) if strict[1] else last
    return float(first) + 0.0, float(last) + 0.0  # no -0.0


def _last(high: Fraction, strict: bool) -> list[Any]:
    """The largest integer at most `high` (less, if `strict`), as a rational and as a double."""
    readings = {high} if np.isinf(as_double(high)) else {high, Fraction(as_double(high))}
    return [-(-r // 1) - 1 if strict else r // 1 for r in readings]
