"""The unsafe set against exact arithmetic: every status must be the one that Fractions give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import inf

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qverify.bounds.unsafe import CERTAIN, OPEN, REFUTED, Grid, Unsafe, make_unsafe
from qverify.property import Box, Case, Query, Row
from tests.graphs import ROUNDS

Float64Array = npt.NDArray[np.float64]
Pair = tuple[Float64Array, Float64Array]
F = Fraction
NOWHERE = Box((), ())  # the box of inputs plays no part here

# Dyadic and not; with more bits than float64 holds; beyond its range on either side (decimals may
# be 1e1000).
COEFFICIENTS = [F(n) for n in (1, -1, 2, -3, 7)] + [
    *(
        F(1, 2),
        F(-5, 8),
        F(1, 3),
        F(-1, 10),
        F(7, 9),
        F(2**60 + 1),
        F(-(2**54) - 1, 2**54),
        F(3, 2**200),
        F(-1, 2**950),
    ),
    *(
        F(10**30),
        F(-(10**40)),
        F(10) ** 320,
        -(F(10) ** 999),
        F(1, 10**30),
        F(-7, 10**320),
        F(1, 10**999),
    ),
    *(F(3, 2**1074), F(-1, 2**1100), F(2) ** 1100),
]
NUDGES = [F(0), F(1, 2**1200), F(1, 10**20), F(1, 2**60), F(1, 3)]


def examples(count: int) -> settings:
    """How many random scenarios; a busy computer is no reason to fail."""
    return settings(
        max_examples=count * ROUNDS, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@dataclass(frozen=True)
class Scenario:
    """A query and boxes of outputs (and inputs) for it."""

    query: Query
    grid: Grid
    y: Pair
    x: Pair | None

    def unsafe(self) -> Unsafe:
        return make_unsafe(self.query, 0 if self.x is None else self.x[0].shape[1], self.grid)


def extreme(row: Row, y: Pair, x: Pair | None, i: int, least: bool) -> Fraction:
    """The least (or largest) value of a row over box i."""
    total = F(0)
    for terms, bounds in ((row.y, y), (row.x, x)):
        for index, c in terms:
            assert bounds is not None
            total += c * F(float(bounds[0 if (c > 0) == least else 1][i, index]))
    return total


def holds(row: Row, value: Fraction) -> bool:
    return value < row.rhs if row.strict else value <= row.rhs


def exact_status(scenario: Scenario) -> npt.NDArray[np.int8]:
    """What `Unsafe.status` is specified to be."""
    y, x = scenario.y, scenario.x
    result = np.empty((len(y[0]), len(scenario.query.cases)), np.int8)
    for i in range(len(y[0])):
        for k, case in enumerate(scenario.query.cases):
            if all(holds(row, extreme(row, y, x, i, least=False)) for row in case):
                result[i, k] = CERTAIN
            elif all(holds(row, extreme(row, y, x, i, least=True)) for row in case):
                result[i, k] = OPEN
            else:
                result[i, k] = REFUTED
    return result


# -- random scenarios ------------------------------------------------------------------------------

float32 = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-8, 8, width=32),
    st.sampled_from(
        [
            0.0,
            1.0,
            -1.0,
            0.1,
            float(np.float32(0.1)),
            2.0**-149,
            -(2.0**-149),
            3.4028234663852886e38,
        ]
    ),
)


def gridded(unit: int, most: int) -> st.SearchStrategy[float]:
    return st.integers(-most, most).map(lambda k: float(F(k) * F(2) ** unit))


@st.composite
def boxes(
    draw: st.DrawFn, values: list[st.SearchStrategy[float]], count: int, points: bool
) -> Pair:
    """`count` boxes, one strategy for each coordinate."""
    first, second = (
        np.array([[draw(v) for v in values] for _ in range(count)]).reshape(count, -1) for _ in "ab"
    )
    return (first, first) if points else (np.minimum(first, second), np.maximum(first, second))


@st.composite
def terms(
    draw: st.DrawFn, size: int, coefficients: list[Fraction]
) -> tuple[tuple[int, Fraction], ...]:
    chosen = sorted(draw(st.sets(st.integers(0, size - 1), max_size=size))) if size else []
    return tuple((i, draw(st.sampled_from(coefficients))) for i in chosen)


@st.composite
def right_sides(draw: st.DrawFn, row: Row, y: Pair, x: Pair | None) -> Fraction:
    """Anything, or a value that the row takes at a box's end, hit exactly or missed by a little."""
    kind = draw(st.sampled_from(["any", "tie", "ulp"]))
    if kind == "any":
        return draw(st.sampled_from(COEFFICIENTS)) * draw(st.integers(-5, 5))
    value = extreme(row, y, x, draw(st.integers(0, len(y[0]) - 1)), draw(st.booleans()))
    if kind == "tie":
        return value + draw(st.sampled_from([-1, 1])) * draw(st.sampled_from(NUDGES))
    try:
        return F(float(np.nextafter(float(value), draw(st.sampled_from([-inf, inf])))))
    except OverflowError:
        return value


@st.composite
def scenarios(draw: st.DrawFn, points: bool = False, mixed: bool = False) -> Scenario:
    outputs, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    values, units, largest = [], [], []
    for _ in range(outputs):
        unit = draw(st.sampled_from([None, 0, 0, -3, 4, -149, 100]))
        most = draw(st.sampled_from([0, 1, 255, 2**24 - 1]))
        units.append(unit)
        largest.append(0.0 if unit is None else float(most) * 2.0**unit)
        values.append(float32 if unit is None else gridded(unit, most))
    y = draw(boxes(values, count, points))
    x = draw(boxes([float32] * 2, count, points)) if mixed else None
    coefficients = draw(st.sampled_from([COEFFICIENTS[:2], COEFFICIENTS[:9], COEFFICIENTS]))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        bare = Row(
            draw(terms(2 if mixed else 0, coefficients)), draw(terms(outputs, coefficients)), F(0)
        )
        rows.append(Row(bare.x, bare.y, draw(right_sides(bare, y, x)), draw(st.booleans())))
    cases = draw(
        st.lists(st.lists(st.sampled_from(rows), max_size=3).map(tuple), min_size=1, max_size=3)
    )
    mentioned = x if any(row.x for case in cases for row in case) else None
    return Scenario(Query(NOWHERE, tuple(cases)), Grid(tuple(units), tuple(largest)), y, mentioned)


@examples(300)
@given(scenarios())
def test_status_of_boxes_is_exact(scenario: Scenario) -> None:
    assert np.array_equal(scenario.unsafe().status(scenario.y), exact_status(scenario))


@examples(200)
@given(scenarios(points=True))
def test_status_of_points_is_exact_and_never_open(scenario: Scenario) -> None:
    status = scenario.unsafe().status(scenario.y)
    assert np.array_equal(status, exact_status(scenario))
    assert (status != OPEN).all()


@examples(200)
@given(scenarios(mixed=True))
def test_status_with_inputs_in_the_rows_is_exact(scenario: Scenario) -> None:
    unsafe = scenario.unsafe()
    assert unsafe.mixed == (scenario.x is not None)
    assert np.array_equal(unsafe.status(scenario.y, scenario.x), exact_status(scenario))


@examples(100)
@given(scenarios(), st.data())
def test_a_status_holds_for_every_point_of_its_box(scenario: Scenario, data: st.DataObject) -> None:
    """Sound: nowhere in a box is a refuted case unsafe, and everywhere a certain one."""
    unsafe, (lower, upper) = scenario.unsafe(), scenario.y
    status = unsafe.status(scenario.y)
    upward = np.array([data.draw(st.booleans()) for _ in range(lower.size)]).reshape(lower.shape)
    corner = np.where(upward, upper, lower)
    inner = unsafe.status((corner, corner))
    assert (inner[status == REFUTED] == REFUTED).all()
    assert (inner[status == CERTAIN] == CERTAIN).all()


# -- chosen scenarios ------------------------------------------------------------------------------


def between(*pairs: tuple[float, float]) -> Pair:
    """One box."""
    return np.array([[a for a, _ in pairs]]), np.array([[b for _, b in pairs]])


def at(*values: float) -> Pair:
    return between(*((v, v) for v in values))


def row(
    rhs: Fraction | int | str, *coefficients: Fraction | int | str, strict: bool = False
) -> Row:
    return Row((), tuple((i, F(c)) for i, c in enumerate(coefficients) if F(c)), F(rhs), strict)


def unsafe_of(
    *cases: Case, unit: int | None = None, largest: float = 0.0, outputs: int = 2, inputs: int = 0
) -> Unsafe:
    return make_unsafe(Query(NOWHERE, cases), inputs, Grid((unit,) * outputs, (largest,) * outputs))


def one(unsafe: Unsafe, y: Pair, x: Pair | None = None) -> int:
    """The status of the first case on the one box."""
    return int(unsafe.status(y, x)[0, 0])


KNOWN: list[tuple[int | None, float]] = [(None, 0.0), (0, 255.0)]


@pytest.mark.parametrize(("unit", "largest"), KNOWN)
def test_a_tie_decides_strictness(unit: int | None, largest: float) -> None:
    y = at(7.0, 7.0)
    assert one(unsafe_of((row(0, 1, -1),), unit=unit, largest=largest), y) == CERTAIN
    assert one(unsafe_of((row(0, 1, -1, strict=True),), unit=unit, largest=largest), y) == REFUTED


@pytest.mark.parametrize(("unit", "largest"), KNOWN)
@pytest.mark.parametrize("step", [F(1, 10**30), F(1, 2**1300), F(1, 3)])
def test_a_threshold_just_off_a_value(step: Fraction, unit: int | None, largest: float) -> None:
    for strict in (False, True):
        above = unsafe_of((row(5 + step, 1, strict=strict),), unit=unit, largest=largest)
        below = unsafe_of((row(5 - step, 1, strict=strict),), unit=unit, largest=largest)
        assert (one(above, at(5.0, 0.0)), one(below, at(5.0, 0.0))) == (CERTAIN, REFUTED)
        assert one(below, between((4.0, 5.0), (0.0, 0.0))) == OPEN


def test_a_decimal_coefficient_is_not_its_double() -> None:
    """0.1 as a rational times 3 is 0.3 exactly; in float64 the product lies above the nearest
    double of 0.3."""
    assert 0.1 * 3.0 > 0.3
    assert one(unsafe_of((row("0.3", "0.1"),)), at(3.0, 0.0)) == CERTAIN
    assert one(unsafe_of((row("0.3", "0.1", strict=True),)), at(3.0, 0.0)) == REFUTED


def test_known_grids_are_compared_without_fractions(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> bool:
        raise AssertionError("decided with Fractions")

    monkeypatch.setattr("qverify.bounds.unsafe._holds_exactly", never)
    unsafe = unsafe_of((row("0.5", 1, -1), row("-1/3", "-1/4", strict=True)), unit=-3, largest=31.0)
    assert unsafe.exact.all()
    assert one(unsafe, at(31.0, 31.0)) == CERTAIN
    assert one(unsafe, at(1.25, 31.0)) == REFUTED


@pytest.mark.parametrize(
    ("rhs", "status"), [("1e999", CERTAIN), ("-1e999", REFUTED), ("1e309", CERTAIN)]
)
@pytest.mark.parametrize(("unit", "largest"), KNOWN)
def test_a_right_side_beyond_float64(
    rhs: str, status: int, unit: int | None, largest: float
) -> None:
    assert one(unsafe_of((row(rhs, 1, -1),), unit=unit, largest=largest), at(200.0, 3.0)) == status


@pytest.mark.parametrize("coefficient", [F("1e400"), F("1e-400"), F(2) ** 1100, F(1, 2**1100)])
@pytest.mark.parametrize(("unit", "largest"), KNOWN)
def test_coefficients_beyond_float64(
    coefficient: Fraction, unit: int | None, largest: float
) -> None:
    """c Y_0 - c Y_1 < 0 is Y_0 < Y_1, whatever c is."""
    unsafe = unsafe_of(
        (row(0, coefficient, -coefficient, strict=True),), unit=unit, largest=largest
    )
    assert [one(unsafe, at(3.0, v)) for v in (2.0, 3.0, 4.0)] == [REFUTED, REFUTED, CERTAIN]
    assert one(unsafe, between((3.0, 3.0), (3.0, 4.0))) == OPEN


def test_many_tiny_terms_are_not_lost_to_underflow() -> None:
    """Each product underflows to zero, but their sum is beyond the right-hand side."""
    tiny = F(2, 5) / 2**1074
    case = (Row((), ((0, F(1)), *((i, -tiny) for i in range(1, 9))), F(-3) / 2**1074),)
    unsafe = unsafe_of(case, outputs=9)
    assert one(unsafe, at(0.0, *[1.0] * 8)) == CERTAIN
    assert one(unsafe, at(0.0, *[1.0] * 7, 0.0)) == REFUTED


def test_a_tiny_dyadic_coefficient_on_a_known_grid() -> None:
    """The coefficient is dyadic, but its products with the grid are below float64."""
    tiny = F(1, 2**1100)
    for strict in (False, True):
        unsafe = unsafe_of((row(-tiny, tiny, -1, strict=strict),), unit=0, largest=255.0)
        assert not unsafe.exact.any()
        assert one(unsafe, at(0.0, 0.0)) == REFUTED


def test_a_tiny_coefficient_beside_an_output_that_is_always_zero() -> None:
    """The first term keeps the row's scale at one and adds nothing; the second's products are below
    float64."""
    tiny = F(1, 2**1100)
    unsafe = make_unsafe(
        Query(NOWHERE, ((row(-2 * tiny, 1, -tiny),),)), 0, Grid((0, 0), (0.0, 255.0))
    )
    assert [one(unsafe, at(0.0, v)) for v in (1.0, 2.0, 3.0)] == [REFUTED, CERTAIN, CERTAIN]


def test_sums_of_more_than_53_bits_are_not_rounded() -> None:
    large = 2**50
    unsafe = unsafe_of((row(255 * large, large, 1),), unit=0, largest=255.0)
    assert [one(unsafe, at(255.0, v)) for v in (0.0, 1.0)] == [CERTAIN, REFUTED]


def test_the_largest_floats_do_not_overflow() -> None:
    most = float(np.finfo(np.float32).max)
    unsafe = unsafe_of((row(0, "1e1000", "1e1000", strict=True),))
    assert one(unsafe, at(most, -most)) == REFUTED
    assert one(unsafe, at(-most, float(np.nextafter(np.float32(most), np.float32(0))))) == CERTAIN
    assert one(unsafe, between((-most, most), (-most, most))) == OPEN


def test_an_unbounded_output_is_not_called_exact() -> None:
    assert not unsafe_of((row(3, 1),), unit=0, largest=inf).exact.any()


def test_the_empty_case_is_certain_and_no_case_is_none() -> None:
    assert one(unsafe_of(()), at(1.0, 2.0)) == CERTAIN
    assert unsafe_of().status(at(1.0, 2.0)).shape == (1, 0)


def test_a_row_without_terms_is_its_right_side() -> None:
    assert [one(unsafe_of((row(rhs),)), at(1.0, 2.0)) for rhs in (1, 0, -1)] == [
        CERTAIN,
        CERTAIN,
        REFUTED,
    ]
    assert one(unsafe_of((row(0, strict=True),)), at(1.0, 2.0)) == REFUTED


def test_rows_are_shared_between_cases() -> None:
    a, b = row(0, 1, -1), row(3, 1)
    unsafe = unsafe_of((a,), (a, b), (b, b))
    assert len(unsafe.rows) == 2
    assert unsafe.case_rows[1] == (a, b)
    assert unsafe.status(at(4.0, 5.0)).tolist() == [[CERTAIN, REFUTED, REFUTED]]


def test_inputs_and_outputs_in_one_row() -> None:
    case = (Row(((1, F(-1)),), ((0, F(1)),), F(0), True),)  # Y_0 < X_1
    unsafe = unsafe_of(case, unit=0, largest=255.0, inputs=2)
    assert unsafe.mixed and not unsafe.exact.any()
    for x, status in (((2.0, 3.0), REFUTED), ((2.0, 4.0), OPEN), ((3.5, 4.0), CERTAIN)):
        assert one(unsafe, at(3.0, 0.0), between((0.0, 9.0), x)) == status


def test_slack_names_the_worst_row() -> None:
    near, far = row(5, 1), row(0, 1, -1)
    unsafe = unsafe_of((near, far), (near,), ())
    slack, worst = unsafe.slack(np.array([[4.0, 1.0], [4.0, 8.0]]))
    assert slack.tolist() == [[-3.0, 1.0, inf], [1.0, 1.0, inf]]
    assert worst[:, 0].tolist() == [1, 0]


@pytest.mark.parametrize("shape", [lambda n: (n, 3), lambda n: (n, 1)])
def test_many_boxes_at_once_equal_one_at_a_time(shape: Callable[[int], tuple[int, int]]) -> None:
    rng = np.random.default_rng(5)
    y = np.sort(rng.integers(-4, 5, size=(2, *shape(50))).astype(np.float64), axis=0)
    outputs = y.shape[2]
    cases = ((row("1/3", *["1/3"] * outputs), row(0, -1)), (row(0, *[1] * outputs, strict=True),))
    unsafe = unsafe_of(*cases, outputs=outputs)
    together = unsafe.status((y[0], y[1]))
    for i in range(50):
        assert np.array_equal(unsafe.status((y[0, i : i + 1], y[1, i : i + 1]))[0], together[i])
