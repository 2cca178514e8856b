"""How rows are read, against checkers written here: exact rationals, doubles, matrices of doubles,
float32 as in 2.x."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qverify.boundary.domain import Domain, make_domain
from qverify.boundary.readings import Readings, make_readings
from qverify.bounds.unsafe import Grid
from qverify.errors import SpecError
from qverify.frontend.builder import Quantizer
from qverify.frontend.encoder import Encoder
from qverify.property import Case, Query, Row
from qverify.vnnlib.reader import parse_property
from tests.graphs import ROUNDS

F32 = np.float32
Tree = Any  # a name, a decimal, or (head, operand, ...)
SIZE = 3  # inputs, and outputs
REACH = 100.0


@dataclass
class Described:
    """What a decoder says of the outputs: float32 up to REACH, on no known grid, or multiples of
    2**unit."""

    unit: int | None = None

    @property
    def is_float(self) -> npt.NDArray[np.bool_]:
        return np.ones(SIZE, np.bool_)

    @property
    def reach(self) -> npt.NDArray[np.float64]:
        return np.full(SIZE, REACH)

    @property
    def grid(self) -> Grid:
        return Grid((self.unit,) * SIZE, (REACH if self.unit is not None else 0.0,) * SIZE)


def spelled(tree: Tree) -> str:
    return tree if isinstance(tree, str) else f"({' '.join(map(spelled, tree))})"


def property_of(
    tree: Tree, second: bool, bounds: Sequence[tuple[str, str]] = (("-4", "4"),) * SIZE
) -> str:
    """A specification with one assertion about X_0, ... and Y_0, ..."""
    asserts = [
        f"(assert (>= X_{i} {a})) (assert (<= X_{i} {b}))" for i, (a, b) in enumerate(bounds)
    ]
    asserts.append(f"(assert {spelled(tree)})")
    if not second:
        declared = [f"(declare-const {letter}_{i} Real)" for letter in "XY" for i in range(SIZE)]
        return "\n".join([*declared, *asserts])
    tensors = f"(declare-input X float32 [{SIZE}]) (declare-output Y float32 [{SIZE}])"
    text = "\n".join(["(vnnlib-version <2.0>)", f"(declare-network N {tensors})", *asserts])
    for i in range(SIZE):
        text = text.replace(f"X_{i}", f"X[{i}]").replace(f"Y_{i}", f"Y[{i}]")
    return text


def domain_of(query: Query) -> Domain:
    part = Quantizer(
        np.arange(SIZE),
        np.zeros(SIZE, F32),
        (),
        np.full(SIZE, F32(0.1)),
        np.full(SIZE, 128, np.int32),
        0,
        255,
    )
    return make_domain(Encoder((part,), np.ones(SIZE, np.bool_)), query.box)


# -- the checkers ----------------------------------------------------------------------------------


def computed(tree: Tree, values: dict[str, Any], number: Callable[[str], Any]) -> Any:
    """An expression as the checker of VNN-COMP evaluates it, with the arithmetic of the values."""
    if isinstance(tree, str):
        return values[tree] if tree in values else number(tree)
    head, *parts = tree
    operands = [computed(part, values, number) for part in parts]
    if head == "+":
        return sum(operands)
    if head == "-":
        return operands[0] - sum(operands[1:]) if len(operands) > 1 else -operands[0]
    if head == "/":
        return operands[0] / operands[1]
    return math.prod(operands)


def accepts(tree: Tree, values: dict[str, Any], number: Callable[[str], Any]) -> bool:
    """A comparison."""
    op, left, right = tree
    with np.errstate(all="ignore"):
        a, b = computed(left, values, number), computed(right, values, number)
        found = {"<=": a <= b, "<": a < b, ">=": a >= b, ">": a > b, "==": a == b, "!=": a != b}[op]
    return bool(found)


def matrix_accepts(cases: Sequence[Case], x: Sequence[float], y: Sequence[float]) -> bool:
    """Each case as mat @ (x, y) <= rhs in doubles."""
    for case in cases:
        mat, rhs = np.zeros((len(case), 2 * SIZE)), np.array([float(row.rhs) for row in case])
        for k, row in enumerate(case):
            for i, c in row.x:
                mat[k, i] = float(c)
            for j, c in row.y:
                mat[k, SIZE + j] = float(c)
        vector = mat.dot(np.array([*x, *y]))
        if all(
            v < r if row.strict else v <= r for v, r, row in zip(vector, rhs, case, strict=True)
        ):
            return True
    return False


def named(x: Sequence[Any], y: Sequence[Any]) -> dict[str, Any]:
    return {
        f"{letter}_{i}": v for letter, values in (("X", x), ("Y", y)) for i, v in enumerate(values)
    }


def hold(cases: Sequence[Case], x: Sequence[Any], y: Sequence[Any]) -> bool:
    """Whether some case holds, exactly."""

    def value(row: Row) -> Fraction:
        total = sum((c * Fraction(float(y[j])) for j, c in row.y), Fraction(0))
        return total + sum(
            (c * (x[i] if isinstance(x[i], Fraction) else Fraction(x[i])) for i, c in row.x),
            Fraction(0),
        )

    return any(
        all(value(r) < r.rhs if r.strict else value(r) <= r.rhs for r in case) for case in cases
    )


@dataclass(frozen=True)
class Point:
    """Decimals of inputs, and the outputs that the runtime gives."""

    texts: tuple[str, ...]
    y: tuple[Any, ...]  # float32

    def answers(self, tree: Tree, query: Query) -> list[tuple[list[Any], bool]]:
        """The inputs that every reading takes, and whether it accepts."""
        exact, fed = [Fraction(t) for t in self.texts], [F32(float(t)) for t in self.texts]
        doubles, wide = [float(t) for t in self.texts], [float(v) for v in self.y]
        found: list[tuple[list[Any], bool]] = [
            (exact, accepts(tree, named(exact, [Fraction(v) for v in wide]), Fraction)),
            (
                fed,
                accepts(
                    tree,
                    named([Fraction(float(v)) for v in fed], [Fraction(v) for v in wide]),
                    Fraction,
                ),
            ),
            (doubles, accepts(tree, named(doubles, wide), float)),
            (fed, accepts(tree, named([float(v) for v in fed], wide), float)),
            (doubles, matrix_accepts(query.cases, doubles, wide)),
        ]
        if query.float32:
            found.append((fed, accepts(tree, named(fed, self.y), float)))
        return [
            ([v if isinstance(v, Fraction) else float(v) for v in x], answer) for x, answer in found
        ]


def check(tree: Tree, second: bool, point: Point, unit: int | None, met: Counter[str]) -> None:
    """Whatever reading accepts, the possible rows hold; and where the certain ones do, every
    reading accepts."""
    try:
        queries = parse_property(property_of(tree, second)).queries
    except SpecError:
        return  # contradictory bounds of an input
    if len(queries) != 1 or queries[0].cases == ((),):
        return  # a truth, or bounds of an input
    (query,) = queries
    domain, y = domain_of(query), np.array(point.y, np.float64)
    read = make_readings(query, domain, Described(unit))  # type: ignore[arg-type]
    fed = np.array([[F32(float(t)) for t in point.texts]], np.float64)
    low, high = domain.hull(fed, fed)
    answers = point.answers(tree, query)
    assert query.float32 == second
    inside = bool(((domain.lower <= fed) & (fed <= domain.upper)).all())
    for x, accepted in answers:
        if not inside:  # a row about one input has put its bound into the box
            assert not accepted
            continue
        within = all(
            Fraction(a) <= Fraction(v) <= Fraction(b)
            for a, v, b in zip(low[0], x, high[0], strict=True)
        )
        if not within:  # a bound's float32 may be one of a decimal that lies outside of it
            assert not accepted
            continue
        for possible, certain in versions(read, y):
            assert not accepted or hold(possible, x, point.y)
            if all(hold(certain, x, point.y) for x, _ in answers):
                assert accepted
                met["certain"] += 1
            elif not hold(possible, x, point.y):
                met["impossible"] += 1
            else:
                met["between"] += 1


def versions(read: Readings, y: npt.NDArray[np.float64]) -> list[tuple[list[Case], list[Case]]]:
    """The possible and the certain cases, for all outputs and at some."""
    at = [read.at(k, y) for k in range(len(read.query.cases))]
    assert [certain for _, certain in at] == list(
        read.certain_at(y).cases
    ) or read.certain is read.possible
    whole = list(read.possible.cases), list(read.certain.cases)
    return [whole, ([possible for possible, _ in at], [certain for _, certain in at])]


# -- random comparisons ----------------------------------------------------------------------------

values = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.25, 2.5]),
    st.integers(-255, 255).map(lambda k: float(F32(k) * F32(0.1))),
    st.floats(-REACH / 2, REACH / 2, width=32),
).map(F32)
simple = st.sampled_from(
    ["0", "0.1", "0.5", "0.59", "-0.31", "1", "3", "100", "0.3", "-2.5", "1e-3"]
)
factors = st.sampled_from(["2", "0.1", "-1", "3", "0.25", "0.7", "1e-40", "1e30", "0"])


@st.composite
def trees(draw: st.DrawFn, depth: int, names: list[str], second: bool) -> Tree:
    kind = draw(
        st.sampled_from(
            ["name", "name", "name", "number", "+", "-", "*", "negative", "/"][: 9 if depth else 4]
        )
    )
    if kind == "name":
        return draw(st.sampled_from(names))
    if kind == "number" or (kind == "/" and second):
        return draw(simple)
    part = trees(depth - 1, names, second)
    if kind == "negative":
        return ("-", draw(part))
    if kind == "/":
        return ("/", draw(part), draw(st.sampled_from(["3", "0.1", "-7"])))
    if kind == "*":
        product = (draw(factors), draw(part))
        return ("*", *(product if draw(st.booleans()) else product[::-1]))
    return (kind, *draw(st.lists(part, min_size=2, max_size=3)))


def ties(tree: Tree, point: Point) -> list[str]:
    """Decimals at and beside what an expression gives at a point."""
    wide = [float(v) for v in point.y]
    exact = computed(
        tree, named([Fraction(t) for t in point.texts], [Fraction(v) for v in wide]), Fraction
    )
    double = computed(tree, named([float(t) for t in point.texts], wide), float)
    with np.errstate(all="ignore"):
        single = F32(computed(tree, named([F32(float(t)) for t in point.texts], point.y), float))
    found = [
        repr(v)
        for v in (double, math.nextafter(double, math.inf), float(single))
        if math.isfinite(v)
    ]
    found += [str(single)] if np.isfinite(single) else []
    power = 1100
    if (exact * 10**power).denominator == 1 and abs(exact) < 10**6:
        digits = str(abs(int(exact * 10**power))).rjust(power + 1, "0")
        found.append(
            ("-" if exact < 0 else "") + f"{digits[:-power]}.{digits[-power:].rstrip('0')}0"
        )
    return [text for text in found if "inf" not in text and "nan" not in text]


@st.composite
def questions(draw: st.DrawFn) -> tuple[Tree, bool, Point, int | None]:
    second = draw(st.booleans())
    unit = draw(st.sampled_from([None, None, -2]))
    y = [
        draw(st.integers(-200, 200).map(lambda k: F32(k / 4)) if unit is not None else values)
        for _ in range(SIZE)
    ]
    texts = [
        draw(st.sampled_from(["0.1", "0.3", "0.7", "-0.9", "1", "2.5", "0.1000000014901161"]))
        for _ in range(SIZE)
    ]
    point = Point(tuple(texts), tuple(y))
    names = [f"Y_{i}" for i in range(SIZE)] + (
        [f"X_{i}" for i in range(SIZE)] if draw(st.booleans()) else []
    )
    left = draw(trees(draw(st.integers(0, 2)), names, second))
    others = [trees(draw(st.integers(0, 1)), names, second)]
    if near := ties(left, point):
        others += [st.sampled_from(near)] * 3
    pair = [left, draw(st.one_of(others))]
    op = draw(
        st.sampled_from(["<=", "<", ">=", ">", "==", "!="] if second else ["<=", "<", ">=", ">"])
    )
    return (op, *(pair if draw(st.booleans()) else pair[::-1])), second, point, unit


MET = Counter[str]()


@settings(max_examples=500 * ROUNDS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(questions())
@example(  # the bound's float32 is that of a decimal outside of it
    (
        (">=", ("/", "X_0", "3"), "0.03333333507180214"),
        False,
        Point(("0.1", "0.1", "0.1"), (F32(0), F32(0), F32(0))),
        -2,
    )
)
def test_readings_lie_between_the_versions_of_a_row(
    question: tuple[Tree, bool, Point, int | None],
) -> None:
    check(*question, MET)


def test_the_random_comparisons_are_of_every_kind() -> None:
    if MET.total() < 500:
        pytest.skip("needs the test above")
    assert min(MET[kind] for kind in ("certain", "impossible", "between")) > 50, MET
