"""Where floats meet codes: encoders, domains of boxes, cells of codes, decimals, decoders. Brute
force over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qverify.boundary.domain import Domain, make_domain
from qverify.boundary.outputs import make_decoder
from qverify.boundary.rounding import float32s
from qverify.errors import EmptyBox, SpecError
from qverify.frontend.builder import Identity, Quantizer
from qverify.frontend.encoder import Encoder, make_encoder
from qverify.frontend.lower import Lowered
from qverify.frontend.model import read_model
from qverify.kernels import open_kernels
from qverify.ops import FloatStep
from qverify.property import Box
from tests.graphs import Array, Graph, write

CPU = open_kernels("cpu")
F32 = np.float32
LARGEST = Fraction(float(np.finfo(F32).max))
INF = F32(np.inf)


def quantizer(
    *,
    scale: float = 1.0,
    zero: int = 0,
    signed: bool = False,
    source: int = 0,
    steps: tuple[tuple[str, float], ...] = (),
) -> Quantizer:
    """Of one input element (-1: of the constant 1.5)."""
    low, high = (-128, 127) if signed else (0, 255)
    chain = tuple(FloatStep(kind, np.array([operand], F32)) for kind, operand in steps)
    ends = np.array([scale], F32), np.array([zero], np.int32)
    return Quantizer(np.array([source]), np.array([1.5], F32), chain, *ends, low, high)


def encoder(*parts: Quantizer | Identity, inputs: int = 1) -> Encoder:
    is_float = np.ones(inputs, np.bool_)
    for part in parts:
        if isinstance(part, Identity):
            is_float[part.source] = False
    return Encoder(parts, is_float)


def box(*ends: tuple[object, object], strict: bool = False) -> Box:
    which = frozenset(range(len(ends))) if strict else frozenset()
    lower, upper = (tuple(Fraction(str(e)) for e in side) for side in zip(*ends, strict=True))
    return Box(lower, upper, which, which)


def neighbours(first: float, last: float) -> npt.NDArray[np.float32]:
    """All float32 from first to last."""
    assert first <= last
    values = [F32(first)]
    while values[-1] < last:
        values.append(np.nextafter(values[-1], INF))
    return np.array(values, F32)


def lowered(g: Graph, path: Path, *outputs: str) -> Lowered:
    return read_model(write(g.model(*outputs), path / "model.onnx")).lowered


# -- floats to codes -------------------------------------------------------------------------------


def test_encode_rounds_half_to_even_after_clipping() -> None:
    e = encoder(quantizer(scale=0.5, zero=3))
    x = np.array(
        [
            [-9.0],
            [-1.75],
            [-1.25],
            [-0.75],
            [0.0],
            [0.25],
            [0.75],
            [1.25],
            [125.75],
            [126.25],
            [1e30],
        ]
    )
    assert e.encode(x)[:, 0].tolist() == [0, 0, 1, 1, 3, 3, 5, 5, 255, 255, 255]
    assert e.size == 1 and (e.low, e.high) == (0, 255)


def test_encode_divides_in_float32() -> None:
    """0.35 / 0.1 is a little more than 3.5 in exact arithmetic on these float32, and 3.5 in
    float32: the even code is 4; 0.45 / 0.1 is a little less than 4.5 there, and 4.5 in float32."""
    e = encoder(quantizer(scale=0.1))
    for value, code in ((0.05, 0), (0.15, 2), (0.25, 2), (0.35, 4), (0.45, 4)):
        assert (
            e.encode(np.array([[F32(value)]], np.float64))[0, 0]
            == np.rint(F32(value) / F32(0.1))
            == code
        )


def test_encode_takes_sources_constants_and_integers() -> None:
    parts = (
        quantizer(source=2),
        quantizer(source=-1, zero=7),
        quantizer(source=2, zero=100),
        quantizer(source=0),
    )
    e = encoder(*parts, Identity(np.array([3, 1]), 0, 255), inputs=4)
    assert e.is_float.tolist() == [True, False, True, False]
    assert e.source.tolist() == [2, -1, 2, 0, 3, 1]
    codes = e.encode(np.array([[4.0, 5.0, 6.0, 8.0], [1.0, 0.0, 2.4, 255.0]]))
    assert (
        codes.tolist() == [[6, 9, 106, 4, 8, 5], [2, 9, 102, 1, 255, 0]] and codes.dtype == np.int32
    )
    assert e.encode_at(np.array([1.0, 77.0, 3.0, 4.0, 5.0, 6.0])).tolist() == [1, 9, 103, 4, 5, 6]


def test_encode_applies_every_step_in_order() -> None:
    steps = (
        ("sub", 1.0),
        ("mul", -2.0),
        ("max", -3.0),
        ("min", 5.0),
        ("rsub", 1.0),
        ("div", 0.5),
        ("add", 4.0),
    )
    e = encoder(quantizer(zero=100, steps=steps))
    for x in np.linspace(-9, 9, 37, dtype=F32):
        v = (1 - min(max((x - 1) * -2, -3), 5)) / 0.5 + 4
        assert e.encode(np.array([[x]]))[0, 0] == np.clip(np.rint(v) + 100, 0, 255)


def test_encoder_of_a_model(tmp_path: Path) -> None:
    g = Graph()
    x = g.input((2, 3))
    y = g.node("Transpose", g.node("Div", g.node("Sub", x, g.f32([1.0, 2.0, 3.0])), g.f32(-2.0)))
    padded = g.node("Pad", y, g.const(np.array([0, 1, 0, 0])), g.f32(0.5))
    e = make_encoder(lowered(g, tmp_path, g.quantize(padded, 0.25, np.array(10, np.uint8))))
    assert e.size == 9 and e.source.tolist() == [-1, 0, 3, -1, 1, 4, -1, 2, 5]
    values = np.array([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]])
    assert e.encode(values).tolist() == [[12, 10, 14, 12, 12, 16, 12, 14, 18]]


# -- boxes to domains ------------------------------------------------------------------------------


def domain(e: Encoder, *ends: tuple[object, object], strict: bool = False) -> Domain:
    return make_domain(e, box(*ends, strict=strict))


def test_a_bound_is_read_both_ways() -> None:
    d = domain(encoder(quantizer()), ("0.1", "0.3"))
    tenth, three = F32(0.1), F32(0.3)  # both above the decimals
    assert Fraction(float(tenth)) > Fraction("0.1") and Fraction(float(three)) > Fraction("0.3")
    assert (d.lower[0], d.upper[0]) == (tenth, three)
    d = domain(encoder(quantizer()), ("0.7", "0.9"))  # both below
    assert (d.lower[0], d.upper[0]) == (F32(0.7), F32(0.9)) and Fraction(
        float(F32(0.7))
    ) < Fraction("0.7")


def test_a_point_that_is_no_float32_is_its_rounding() -> None:
    e = encoder(quantizer(scale=0.2, zero=0))
    d = domain(e, ("0.1", "0.1"))
    assert d.lower[0] == d.upper[0] == F32(0.1)
    low, high = d.code_box()
    assert low.tolist() == high.tolist() == e.encode(np.array([[F32(0.1)]])).tolist()[0]
    assert d.decimal_for(0, float(F32(0.1))) == "0.1"
    assert d.lift(low) is not None and d.lift(low + 1) is None


def test_a_point_between_two_codes_has_the_code_of_its_float32() -> None:
    # Rounds to 0.5, which rounds to even: the code is 0 under both readings.
    below = Fraction(1, 2) - Fraction(1, 10**12)
    above = Fraction(1, 2) + Fraction(1, 10**12)
    for end in (below, above):
        d = make_domain(encoder(quantizer()), Box((end,), (end,)))
        assert d.lower[0] == d.upper[0] == 0.5 and d.code_box()[0].tolist() == [0]
        assert Fraction(d.decimal_for(0, 0.5)) == end


def test_strict_bounds_are_not_certain() -> None:
    """X > 1 excludes 1, but the decimal 1.00000000001 lies inside and is fed as 1: under some
    reading 1 is inside."""
    d = domain(encoder(quantizer()), (1, 3), strict=True)
    assert (d.lower[0], d.upper[0]) == (1, 3)
    assert (d.certain[0][0], d.certain[1][0]) == (
        np.nextafter(F32(1), INF),
        np.nextafter(F32(3), -INF),
    )
    d = domain(encoder(quantizer()), ("0.1", "0.3"), strict=True)
    assert (d.lower[0], d.upper[0]) == (F32(0.1), F32(0.3))
    assert (d.certain[0][0], d.certain[1][0]) == (
        np.nextafter(F32(0.1), INF),
        np.nextafter(F32(0.3), -INF),
    )


@pytest.mark.parametrize("ends", [(1, 1), (2, 1), ("0.1", "0.1")])
def test_a_strict_box_without_a_number_is_empty(ends: tuple[object, object]) -> None:
    with pytest.raises(EmptyBox, match="no value of X_0 lies within its bounds"):
        domain(encoder(quantizer()), ends, strict=True)


def test_bounds_between_two_float32() -> None:
    """A decimal inside is fed as a float32 outside: an input under some reading, under every one
    there is none."""
    d = domain(encoder(quantizer()), ("0.1", "0.1000000001"), strict=True)
    assert d.lower[0] == d.upper[0] == F32(0.1) and not d.is_certain(d.lower)
    d = domain(encoder(quantizer()), ("0.1", "0.1000000001"))
    assert d.lower[0] == d.upper[0] == F32(0.1) and d.is_certain(d.lower)
    # Excluded as decimals, one point as float32.
    d = domain(encoder(quantizer()), ("0.1000000001", "0.1"))
    assert d.lower[0] == d.upper[0] == F32(0.1) and not d.is_certain(d.lower)
    with pytest.raises(EmptyBox):
        domain(encoder(quantizer()), ("0.1", "0.09"))


def test_lift_prefers_values_that_lie_inside_under_every_reading() -> None:
    d = domain(encoder(quantizer()), ("0.1", "0.10000002"), strict=True)
    first, second = F32(0.1), np.nextafter(F32(0.1), INF)
    assert d.lower[0] == first and d.upper[0] >= second and d.certain[0][0] == second
    x = d.lift(d.encoder.encode(np.array([[first]]))[0])
    assert x is not None and d.is_certain(x) and x[0] == second


def test_strict_bounds_are_kept_by_decimals() -> None:
    d = domain(encoder(quantizer()), ("0.1", 3), strict=True)
    assert Fraction(d.decimal_for(0, d.lower[0])) > Fraction("0.1")


def test_decimals_lie_inside_bounds_that_are_no_decimals() -> None:
    d = make_domain(encoder(quantizer()), Box((Fraction(5, 6),), (Fraction(2),)))
    assert Fraction(d.lower[0]) < Fraction(5, 6)  # by its rounding only
    assert Fraction(5, 6) <= Fraction(d.decimal_for(0, d.lower[0])) <= 2


def test_integer_inputs_have_the_values_of_their_type() -> None:
    d = domain(encoder(Identity(np.array([0]), 0, 255)), (-5, 300))
    assert d.lower.tolist() == [0] and d.upper.tolist() == [255]


def test_integer_inputs_have_the_integers_of_their_box() -> None:
    e = encoder(Identity(np.array([1, 0]), -128, 127), quantizer(source=2), inputs=3)
    d = domain(e, ("1.5", "3.2"), (-4, 7), (0, 1))
    assert d.lower.tolist() == [2, -4, 0] and d.upper.tolist() == [3, 7, 1]
    low, high = d.code_box()
    assert low.tolist() == [-4, 2, 0] and high.tolist() == [7, 3, 1]
    assert d.decimal_for(0, 2.0) == "2" and d.decimal_for(1, -4.0) == "-4"
    cell = d.cells(np.array([-2, 2, 0], np.int32), np.array([5, 2, 1], np.int32))
    assert cell is not None and cell[0].tolist() == [2, -2, 0] and cell[1].tolist() == [2, 5, 1]
    lifted = d.lift(np.array([6, 3, 1], np.int32))
    assert lifted is not None and e.encode(lifted[None]).tolist() == [[6, 3, 1]]
    assert d.lift(np.array([6, 4, 1], np.int32)) is None
    strict = domain(encoder(Identity(np.array([0]), 0, 255)), (1, 4), strict=True)
    assert strict.lower.tolist() == [2] and strict.upper.tolist() == [3]


def test_bounds_of_integers_are_read_as_doubles_too() -> None:
    e = encoder(Identity(np.array([0]), 0, 255))
    d = domain(e, ("3.00000000000000000001", "6.99999999999999999999"))
    assert (d.lower[0], d.upper[0]) == (3, 7) and (d.certain[0][0], d.certain[1][0]) == (4, 6)
    d = domain(e, ("2.99999999999999999999", "7.00000000000000000001"), strict=True)
    assert (d.lower[0], d.upper[0]) == (3, 7) and (d.certain[0][0], d.certain[1][0]) == (4, 6)
    d = domain(e, (-(10**400), 10**400))
    assert (d.lower[0], d.upper[0]) == (0, 255) == (d.certain[0][0], d.certain[1][0])


@pytest.mark.parametrize(("low", "high"), [("0.2", "0.8"), (3, 2.5)])
def test_an_integer_input_needs_an_integer(low: object, high: object) -> None:
    with pytest.raises(EmptyBox, match="no value of X_0 lies within its bounds"):
        domain(encoder(Identity(np.array([0]), 0, 255)), (low, high))


def test_an_infinity_before_the_quantizer_is_its_last_code() -> None:
    """As in onnxruntime: it clips, then rounds."""
    d = domain(encoder(quantizer(steps=(("mul", 1e30),))), (0, 10**30))
    assert [end.tolist() for end in d.code_box()] == [[0], [255]]
    falling = domain(encoder(quantizer(steps=(("div", -1e-30), ("add", 1.0)))), (-(10**30), 10**30))
    assert [end.tolist() for end in falling.code_box()] == [[0], [255]]


def test_bounds_that_give_a_nan_are_refused() -> None:
    with pytest.raises(SpecError, match="overflows float32"):
        domain(encoder(quantizer(steps=(("mul", 1e30), ("mul", 0.0)))), (0, 10**30))


def test_cells_of_large_values() -> None:
    d = domain(encoder(quantizer(scale=1e20)), (0, 10**20))
    assert d.lift(np.array([1], np.int32)) is not None


def test_bounds_beyond_float32_are_refused() -> None:
    with pytest.raises(SpecError, match="overflows float32"):
        domain(encoder(quantizer()), (0, 10**39))


decimals = st.one_of(
    st.decimals(-1000, 1000, places=3),
    st.decimals(-2, 2, places=12),
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**18), max_value=10**18),
    st.sampled_from(
        ["0", "0.1", "-0.1", "1e-40", "-1e-46", "1e-60", "16777217", "33554431.5", "9e17"]
    ),
).map(lambda d: Fraction(str(d)))


def rounded(value: Fraction) -> np.float32:
    """The nearest float32, the even one of two: straight from the rational."""
    start = F32(float(value))
    near = [np.nextafter(start, -INF), start, np.nextafter(start, INF)]
    return min(near, key=lambda v: (abs(Fraction(float(v)) - value), int(v.view(np.int32)) & 1))


@st.composite
def beside_a_midpoint(draw: Any) -> Fraction:
    """A rational at or just beside the middle of two float32, nearer than a double can say, or
    not."""
    a = F32(draw(st.floats(-(2.0**100), 2.0**100, width=32)))
    middle = (Fraction(float(a)) + Fraction(float(np.nextafter(a, INF)))) / 2
    off: Fraction = draw(
        st.sampled_from(
            [
                Fraction(0),
                Fraction(1, 10**40),
                Fraction(1, 2**54),
                Fraction(1, 2**52),
                Fraction(1, 2**30),
            ]
        )
    )
    sign: int = draw(st.sampled_from([-1, 1]))
    return middle + sign * off * (abs(middle) or Fraction(1, 2**149))


ends_of_boxes = st.one_of(decimals, beside_a_midpoint())


@settings(deadline=None)
@given(ends_of_boxes)
@example(Fraction(1, 10**60))
@example(-Fraction(1, 10**60))
@example(
    (Fraction(float(F32(1))) + Fraction(float(np.nextafter(F32(1), INF)))) / 2 + Fraction(1, 10**40)
)
def test_rounding_at_once_and_by_way_of_a_double(value: Fraction) -> None:
    once, twice = float32s(value)
    assert once == rounded(value) and twice == F32(float(value))


def is_inside(low: Any, x: Any, high: Any, strict: bool) -> bool:
    return bool(low < x < high if strict else low <= x <= high)


@settings(deadline=None)
@given(ends_of_boxes, ends_of_boxes, st.booleans(), st.lists(st.fractions(0, 1), max_size=3))
@example(Fraction("0.1"), Fraction("0.1"), False, [])
@example(Fraction(1, 10**60), Fraction(1, 10**50), False, [])
def test_ends_of_a_domain(
    one: Fraction, other: Fraction, strict: bool, parts: list[Fraction]
) -> None:
    """What lies inside under any reading is in the domain, and what is `certain` does under every
    one."""
    low, high = sorted((one, other))
    which = frozenset([0]) if strict else frozenset()
    bounds = Box((low,), (high,), which, which)
    if low == high and strict:
        with pytest.raises(EmptyBox):
            make_domain(encoder(quantizer(scale=1e10)), bounds)
        return
    d = make_domain(encoder(quantizer(scale=1e10)), bounds)
    readings: list[tuple[Any, Any]] = [
        (low, high),
        (float(low), float(high)),
        (rounded(low), rounded(high)),
    ]
    readings.append((F32(float(low)), F32(float(high))))
    around = [*(F32(float(end)) for end in (low, high)), F32(d.lower[0]), F32(d.upper[0])]
    around += [np.nextafter(v, side) for v in around for side in (-INF, INF)]
    for v in filter(np.isfinite, around):
        found = [
            is_inside(a, Fraction(float(v)) if type(a) is Fraction else v, b, strict)
            for a, b in readings
        ]
        assert d.lower[0] <= v <= d.upper[0] or not any(found)
        if d.certain[0][0] <= v <= d.certain[1][0]:
            assert all(found[1:])
            text = d.decimal_for(0, float(v))
            assert is_inside(low, Fraction(text), high, strict) and is_inside(
                float(low), float(text), float(high), strict
            )
            assert rounded(Fraction(text)) == F32(float(text)) == v
    for part in parts:  # decimals inside are fed as values of the domain
        x = low + part * (high - low)
        assert d.lower[0] <= rounded(x) <= d.upper[0] and d.lower[0] <= F32(float(x)) <= d.upper[0]
    assert d.lower[0] == min(rounded(low), F32(float(low))) and d.upper[0] == max(
        rounded(high), F32(float(high))
    )


# -- decimals --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(decimals, st.integers(0, 40), st.integers(0, 12), st.data())
def test_decimals_lie_in_the_box_and_round_to_the_value(
    low: Fraction, ulps: int, places: int, data: Any
) -> None:
    """For every float32 of a narrow domain."""
    start = F32(float(low))
    assume(abs(low) < LARGEST / 2)
    end = start
    for _ in range(ulps):
        end = np.nextafter(end, INF)
    high = max(
        low, Fraction(f"{float(end):.{places}f}") if abs(end) < 1e6 else Fraction(float(end))
    )
    assume(high - low < Fraction(float(np.nextafter(end, INF))) - low + 1)
    d = make_domain(encoder(quantizer(scale=1e10)), Box((low,), (high,)))
    assume(high - low <= 60 * Fraction(float(np.spacing(np.abs(end)))))
    for value in neighbours(d.lower[0], d.upper[0]):
        text = d.decimal_for(0, float(value))
        assert low <= Fraction(text) <= high
        assert F32(float(text)) == value
        assert "e" not in text or abs(value) < 1e-4 or abs(value) > 1e6


# -- codes to floats -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Narrow:
    """Quantizers of one input, and a narrow range of float32 around one of their borders."""

    parts: tuple[Quantizer, ...]
    values: npt.NDArray[np.float32]


def codes_by_hand(part: Quantizer, x: Array) -> Array:
    v = x.astype(F32)
    for step in part.steps:
        v = step.apply(CPU, v)
    scaled = np.clip(
        v / part.scale, F32(part.low) - part.zero_point, F32(part.high) - part.zero_point
    )
    codes: Array = (np.rint(scaled) + part.zero_point).astype(np.int32)
    return codes


PREFIXES: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    (("mul", -1.0),),
    (("sub", 0.1307), ("div", 0.3081)),
    (("mul", -0.37), ("add", 2.0)),
    (("rsub", 1.0),),
    (("div", -3.0), ("max", -1.0), ("min", 1.0)),
    (("mul", 0.0),),
)


@st.composite
def narrow(draw: Any) -> Narrow:
    scale = draw(st.sampled_from([1.0, 0.1, 0.0039215686, 0.25, 3.7e-3, 1e-20, 1e15]))
    zero = draw(st.sampled_from([0, 255, 128, 3]))
    parts = [quantizer(scale=scale, zero=zero, steps=draw(st.sampled_from(PREFIXES)))]
    if draw(st.booleans()):
        parts.append(
            quantizer(
                scale=scale * draw(st.sampled_from([1.0, 0.99999, 2.0, 3.0])),
                zero=draw(st.integers(0, 255)),
            )
        )
    border = (draw(st.integers(-5, 260)) - zero + draw(st.sampled_from([0.5, 0.0]))) * scale
    x = F32(border)
    for _ in range(draw(st.integers(0, 30))):
        x = np.nextafter(x, -INF)
    values = [x]
    for _ in range(draw(st.integers(0, 60))):
        values.append(np.nextafter(values[-1], INF))
    return Narrow(tuple(parts), np.array(values, F32))


def exact_box(values: npt.NDArray[np.float32]) -> Box:
    return Box((Fraction(float(values[0])),), (Fraction(float(values[-1])),))


@settings(deadline=None)
@given(narrow(), st.integers(0, 255), st.integers(0, 3))
def test_cells_are_all_values_with_these_codes(n: Narrow, start: int, width: int) -> None:
    e = encoder(*n.parts)
    d = make_domain(e, exact_box(n.values))
    np.testing.assert_array_equal(neighbours(d.lower[0], d.upper[0]), n.values)
    codes = np.stack([codes_by_hand(part, n.values) for part in n.parts], axis=1)
    np.testing.assert_array_equal(e.encode(n.values[:, None].astype(np.float64)), codes)
    low, high = d.code_box()
    np.testing.assert_array_equal(low, codes.min(axis=0))
    np.testing.assert_array_equal(high, codes.max(axis=0))
    wanted = [(row, row) for row in np.unique(codes, axis=0)]  # codes that occur, and any others
    wanted += [
        (low, high),
        (low + 1, high),
        (np.full_like(low, start), np.full_like(low, start + width)),
    ]
    for a, b in wanted:
        inside = n.values[((codes >= a) & (codes <= b)).all(axis=1)]
        cell = d.cells(a.astype(np.int32), b.astype(np.int32))
        if not len(inside):
            assert cell is None
        else:
            assert cell is not None and (cell[0][0], cell[1][0]) == (inside[0], inside[-1])


@settings(deadline=None)
@given(narrow())
def test_lift_finds_an_input_for_the_codes_that_occur(n: Narrow) -> None:
    e = encoder(*n.parts)
    d = make_domain(e, exact_box(n.values))
    codes = e.encode(n.values[:, None].astype(np.float64))
    occurring = {tuple(row) for row in codes.tolist()}
    for row in occurring:
        x = d.lift(np.array(row, np.int32))
        assert x is not None and n.values[0] <= x[0] <= n.values[-1] and x[0] == F32(x[0])
        assert tuple(e.encode(x[None])[0].tolist()) == row
    low, high = d.code_box()
    for one in range(low[0] - 1, high[0] + 2):
        row = (one, *codes[0, 1:].tolist())
        assert (d.lift(np.array(row, np.int32)) is None) == (row not in occurring)


def test_lift_stays_away_from_borders() -> None:
    d = domain(encoder(quantizer(scale=1.0)), (0, 10))
    for code in range(1, 10):
        x = d.lift(np.array([code], np.int32))
        assert x is not None and x[0] == code
    x = d.lift(np.array([0], np.int32))
    assert x is not None and x[0] == 0.25  # halfway between the box's end and the border


def test_a_falling_prefix_turns_the_ends() -> None:
    d = domain(encoder(quantizer(zero=100, steps=(("mul", -2.0),))), (-1, 3))
    low, high = d.code_box()
    assert (low.tolist(), high.tolist()) == ([94], [102]) and d.falling().tolist() == [True]
    cell = d.cells(np.array([96], np.int32), np.array([98], np.int32))
    # Both ends tie to the even codes 98 and 96.
    assert cell is not None and (cell[0][0], cell[1][0]) == (
        0.75,
        2.25,
    )
    lifted = d.lift(np.array([99], np.int32))
    assert lifted is not None and lifted[0] == 0.5


def test_constants_have_their_own_code() -> None:
    d = domain(encoder(quantizer(source=-1, zero=1), quantizer()), (0, 9))
    assert d.code_box()[0].tolist() == [3, 0]
    assert d.lift(np.array([3, 4], np.int32)) is not None
    assert d.lift(np.array([4, 4], np.int32)) is None


def test_ends_of_many_boxes_at_once() -> None:
    d = domain(
        encoder(quantizer(source=1), quantizer(source=0, scale=2.0), inputs=2), (0, 9), (1, 5)
    )
    first, last = np.array([[2.0, 3.0], [0.0, 0.0]]), np.array([[4.0, 5.0], [99.0, 99.0]])
    lower, upper = d.spread(first, last)
    assert lower.tolist() == [[3, 2], [0, 1]] and upper.tolist() == [[5, 4], [9, 5]]


# -- integers to outputs ---------------------------------------------------------------------------


def test_decode_joins_outputs_of_all_kinds(tmp_path: Path) -> None:
    g = Graph()
    x = g.input((1, 2), np.uint8)
    acc = g.node("MatMulInteger", x, g.const(np.array([[2, -1], [0, 3]], np.int8)))
    scaled = g.node("Mul", g.node("Cast", acc, to=1), g.f32([0.1, -0.5]))
    floats = g.dequantize(x, 0.1, np.array(3, np.uint8))
    low = lowered(g, tmp_path, x, scaled, floats, acc)
    decoder, network = make_decoder(low), low.network
    codes = np.array([[7, 250], [0, 3]], np.int32)
    z = network.run(CPU, codes)
    tenth = F32(0.1)
    wanted = [[7, 250, F32(14) * tenth, -371.5, F32(4) * tenth, F32(247) * tenth, 14, 743]]
    wanted += [[0, 3, 0, -4.5, F32(-3) * tenth, 0, 0, 9]]
    np.testing.assert_array_equal(decoder.decode(z), np.array(wanted, np.float64))
    assert decoder.size == 8 and decoder.exact and not decoder.band.any()
    np.testing.assert_allclose(
        decoder.steepness[[0, 1, 2, 3, 6, 7]], [1, 1, 0.1, -0.5, 1, 1], rtol=1e-6
    )


def test_decode_box_turns_ends_where_an_output_falls(tmp_path: Path) -> None:
    g = Graph()
    acc = g.node("MatMulInteger", g.input((1, 1), np.int8), g.const(np.array([[1, 1, 1]], np.int8)))
    low = lowered(g, tmp_path, g.node("Mul", g.node("Cast", acc, to=1), g.f32([2.0, -3.0, 0.0])))
    lower, upper = make_decoder(low).decode_box(
        np.full((1, 3), -4, np.int32), np.full((1, 3), 5, np.int32)
    )
    assert lower.tolist() == [[-8, -15, 0]] and upper.tolist() == [[10, 12, 0]]


def test_the_grid_of_outputs_divides_them(tmp_path: Path) -> None:
    """`unit` is a power of two that divides every value an output takes, `largest` their largest
    magnitude."""
    g = Graph()
    x = g.input((1, 3), np.int8)
    outputs = (
        x,
        g.dequantize(x, 0.1, np.array(5, np.int8)),
        g.dequantize(x, 0.25, np.array(-128, np.int8)),
    )
    low = lowered(g, tmp_path, *outputs)
    decoder = make_decoder(low)
    codes = np.repeat(np.arange(-128, 128, dtype=np.int32)[:, None], 3, axis=1)
    y = decoder.decode(low.network.run(CPU, codes))
    for k in range(decoder.size):
        unit = decoder.grid.unit[k]
        assert unit is not None and all(
            (Fraction(v) / Fraction(2) ** unit).denominator == 1 for v in y[:, k]
        )
        assert any((Fraction(v) / Fraction(2) ** (unit + 1)).denominator != 1 for v in y[:, k])
        assert decoder.grid.largest[k] == np.abs(y[:, k]).max()
