"""VNN-LIB in, exact Property out: every form that is understood, every error, real files, and a
reference evaluator."""

from __future__ import annotations

import gzip
import os
import re
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qverify.deadline import Deadline, TimeUp
from qverify.errors import SpecError
from qverify.property import Box, Property, Row, Variable
from qverify.vnnlib import reader
from qverify.vnnlib.reader import parse_property, read_property

SHARED = Path(__file__).parents[3] / "shared"
# All points and most constants of the random tests: ends are hit.
VALUES = [Fraction(n, 2) for n in range(-4, 5)]


def flat(body: str, inputs: int = 2, outputs: int = 2, box: bool = True) -> str:
    """A VNN-LIB 1.0 file with X in [-2, 2]."""
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += [f"(declare-const Y_{j} Real)" for j in range(outputs)]
    lines += [f"(assert (<= X_{i} 2))(assert (>= X_{i} -2))" for i in range(inputs) if box]
    return "\n".join([*lines, body])


def network(
    body: str, declarations: str = "(declare-input X real [2]) (declare-output Y real [2])"
) -> str:
    """A VNN-LIB 2.0 file."""
    return f"(vnnlib-version <2.0>)\n(declare-network f {declarations})\n{body}"


def exact(*numbers: object) -> tuple[Fraction, ...]:
    return tuple(Fraction(str(number)) for number in numbers)


def row(x: dict[int, object], y: dict[int, object], rhs: object, strict: bool = False) -> Row:
    def terms(side: dict[int, object]) -> tuple[tuple[int, Fraction], ...]:
        return tuple((index, Fraction(str(value))) for index, value in side.items())

    return Row(terms(x), terms(y), Fraction(str(rhs)), strict)


def rows_of(body: str, **options: Any) -> tuple[Row, ...]:
    """The rows of the only case of the only query."""
    (query,) = parse_property(flat(body, **options)).queries
    (case,) = query.cases
    return case


def box_of(body: str, **options: Any) -> Box:
    (query,) = parse_property(flat(body, **options)).queries
    return query.box


def error_of(text: str, source: str = "prop.vnnlib") -> str:
    with pytest.raises(SpecError) as caught:
        parse_property(text, source)
    message = str(caught.value)
    assert message.startswith(source) and "\n" not in message
    return message.removeprefix(source)


def holds(row: Row, x: tuple[Fraction, ...], y: tuple[Fraction, ...]) -> bool:
    total = sum((c * x[i] for i, c in row.x), Fraction(0)) + sum(
        (c * y[j] for j, c in row.y), Fraction(0)
    )
    return total < row.rhs or (total == row.rhs and not row.strict)


def inside(box: Box, x: tuple[Fraction, ...]) -> bool:
    return all(
        (lower < value or (lower == value and i not in box.lower_strict))
        and (value < upper or (value == upper and i not in box.upper_strict))
        for i, (lower, value, upper) in enumerate(zip(box.lower, x, box.upper, strict=True))
    )


def unsafe(prop: Property, x: tuple[Fraction, ...], y: tuple[Fraction, ...]) -> bool:
    return any(
        inside(query.box, x) and any(all(holds(row, x, y) for row in case) for case in query.cases)
        for query in prop.queries
    )


# -- VNN-LIB 1.0 -----------------------------------------------------------------------------------


def test_a_small_property_in_full() -> None:
    text = """; a comment (with a parenthesis
        (set-logic QF_LRA) (declare-const Y_0 Real) (declare-fun X_1 () Real)
        (declare-const X_0 real) ; any order
        (assert (<= X_0 0.5)) (assert (>= X_0 -1e-1))
        (assert (and (<= X_1 1) (>= X_1 0)))
        (assert (or (and (>= Y_0 1)) (and (<= Y_0 -1.50))))
        (check-sat) (exit)"""
    prop = parse_property(text)
    assert prop.version == "1.0"
    assert prop.inputs == (Variable("X", "real", (2,)),)
    assert prop.outputs == (Variable("Y", "real", (1,)),)
    (query,) = prop.queries
    assert query.box == Box((Fraction(-1, 10), Fraction(0)), (Fraction(1, 2), Fraction(1)))
    assert query.cases == ((row({}, {0: -1}, -1),), (row({}, {0: 1}, -1.5),))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", Fraction(1, 10)),
        ("-0.30", Fraction(-3, 10)),
        ("+2", Fraction(2)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("1.127338e6", Fraction(1127338)),
        ("5.8E-05", Fraction(58, 10**6)),
        ("1e+3", Fraction(1000)),
        ("-0.0", Fraction(0)),
        ("0.1000000000000000055511151231257827021181583404541015625", Fraction(0.1)),
        ("1e-1000", Fraction(1, 10**1000)),
    ],
)
def test_numbers_are_exact(text: str, value: Fraction) -> None:
    assert rows_of(f"(assert (<= Y_0 {text}))") == (row({}, {0: 1}, value),)


@pytest.mark.parametrize(
    "text",
    ["1e999999999", "1e-999999999", "1e1001", "1" * 3000, "1e" + "9" * 5000, "--1", "1.2.3", "1e", "0x10", "1_000", ".",
     "nan", "NaN", "inf", "-inf", "+Infinity", "١"],
)  # fmt: skip
def test_bad_numbers(text: str) -> None:
    assert re.match(
        r":7: (bad number|undeclared variable '١')", error_of(flat(f"(assert (<= Y_0 {text}))"))
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("(<= Y_0 Y_1)", row({}, {0: 1, 1: -1}, 0)),
        ("(>= Y_0 Y_1)", row({}, {0: -1, 1: 1}, 0)),
        ("(< Y_0 3)", row({}, {0: 1}, 3, True)),
        ("(> 3 Y_0)", row({}, {0: 1}, 3, True)),
        ("(<= 3 Y_0)", row({}, {0: -1}, -3)),
        ("(<= X_0 X_1)", row({0: 1, 1: -1}, {}, 0)),
        ("(<= (+ X_1 X_0 1) (+ Y_1 0.5))", row({0: 1, 1: 1}, {1: -1}, -0.5)),
        ("(<= (- Y_0) 1)", row({}, {0: -1}, 1)),
        ("(<= (- Y_0 Y_1 1) (- 1))", row({}, {0: 1, 1: -1}, 0)),
        ("(<= (* 2 (+ Y_0 1) 3) 0)", row({}, {0: 6}, -6)),
        ("(<= (/ (- Y_0 X_0) 4 2) 1)", row({0: -0.125}, {0: 0.125}, 1)),
        ("(<= (* 0 Y_1 Y_0) Y_0)", row({}, {0: -1}, 0)),
        ("(<= (+ Y_0 Y_1) Y_1)", row({}, {0: 1}, 0)),
        ("(<= (+ Y_0 (- Y_0) Y_1) 0)", row({}, {1: 1}, 0)),
        ("(not (<= Y_0 1))", row({}, {0: -1}, -1, True)),
        ("(not (> Y_0 1))", row({}, {0: 1}, 1)),
        ("(not (not (< Y_0 1)))", row({}, {0: 1}, 1, True)),
        ("(not (or (<= Y_0 1) (> 0 1)))", row({}, {0: -1}, -1, True)),
    ],
)
def test_one_row(body: str, expected: Row) -> None:
    assert rows_of(f"(assert {body})") == (expected,)


@pytest.mark.parametrize("op", ["=", "=="])
def test_an_equality_is_two_rows(op: str) -> None:
    assert rows_of(f"(assert ({op} Y_0 1))") == (row({}, {0: 1}, 1), row({}, {0: -1}, -1))
    assert rows_of("(assert (not (!= Y_0 1)))") == (row({}, {0: 1}, 1), row({}, {0: -1}, -1))


@pytest.mark.parametrize("body", ["(!= Y_0 1)", "(not (= Y_0 1))", "(not (== Y_0 1))"])
def test_an_inequality_of_both_sides_is_two_cases(body: str) -> None:
    (query,) = parse_property(flat(f"(assert {body})")).queries
    assert query.cases == ((row({}, {0: 1}, 1, True),), (row({}, {0: -1}, -1, True),))


def test_rows_keep_order_and_drop_repetition() -> None:
    assert rows_of("(assert (<= Y_0 1))(assert (<= Y_1 2))(assert (>= 1 Y_0))") == (
        row({}, {0: 1}, 1),
        row({}, {1: 1}, 2),
    )
    # The same, but rounding changes only one.
    one, other = rows_of("(assert (<= Y_0 1))(assert (<= 0 (- 1 Y_0)))")
    assert one == other and one.arithmetic is None and other.arithmetic is not None


def test_rows_without_variables() -> None:
    assert rows_of("(assert (<= 1 2))(assert (= Y_0 Y_0))") == ()
    assert parse_property(flat("(assert (< Y_0 Y_0))")).queries == ()
    assert parse_property(flat("(assert (or (<= 2 1) (< 0 0)))")).queries == ()
    (query,) = parse_property(flat("(assert (or (and (<= 2 1) (<= Y_0 0)) (>= Y_1 7)))")).queries
    assert query.cases == ((row({}, {1: -1}, -7),),)


def test_no_assert_on_outputs_leaves_the_empty_case() -> None:
    assert rows_of("") == ()


@pytest.mark.parametrize(
    ("body", "lower", "upper"),
    [
        ("(assert (<= 1 X_0))", 1, 2),
        ("(assert (>= 1 X_0))", -2, 1),
        ("(assert (>= (* -2 X_0) -1))", -2, 0.5),
        ("(assert (<= (* 4 X_0) 1e-3))", -2, "1/4000"),
        ("(assert (= X_0 0.25))", 0.25, 0.25),
        ("(assert (and (<= X_0 1) (and (>= X_0 0))))", 0, 1),
        ("(assert (<= X_0 3))(assert (>= X_0 -3))", -2, 2),
        ("(assert (not (> X_0 1)))", -2, 1),
    ],
)
def test_a_single_input_tightens_the_box(body: str, lower: object, upper: object) -> None:
    box = box_of(body)
    assert (box.lower, box.upper) == (exact(lower, -2), exact(upper, 2))
    assert not box.lower_strict and not box.upper_strict


def rounded_bound(body: str, second: bool = False) -> tuple[Box, tuple[Row, ...]]:
    """The box of 1 input, and the rows that a counterexample must satisfy besides."""
    declared = "(declare-const X_0 Real)(declare-const Y_0 Real)"
    if second:
        declared, body = (
            network("", "(declare-input X real [1]) (declare-output Y real [1])"),
            body.replace("X_0", "X[0]"),
        )
    (query,) = parse_property(declared + body).queries
    return query.box, query.cases[0]


@pytest.mark.parametrize(
    ("bound", "exactly"),
    [
        ("(<= (* 3 X_0) 0.3)", "0.1"),
        ("(<= (* -0.3 X_0) -0.3)", "1"),
        ("(<= (- X_0 0.5) 0.1)", "0.6"),
        ("(<= (/ X_0 2) (- 1 (* 3 X_0)))", "2/7"),
        ("(<= X_0 (+ 0.1 0.2))", "0.3"),
        ("(<= (* 3 X_0) -0.3)", "-0.1"),
    ],
)
def test_arithmetic_is_rounded(bound: str, exactly: str) -> None:
    """In the box a bound lies where the most generous rounding puts it; the rest is a row."""
    falls = "-0.3 X_0" in bound
    other, sign = ("(assert (<= X_0 2))", -1) if falls else ("(assert (>= X_0 -2))", 1)
    for second, least, most in ((False, 2**-54, 2**-47), (True, 2**-25, 2**-18)):
        box, (row,) = rounded_bound(f"{other}(assert {bound})", second)
        off = sign * ((box.lower if falls else box.upper)[0] - Fraction(exactly))
        assert abs(Fraction(exactly)) * Fraction(least) < off < Fraction(most)
        assert row.bounds_input and row.arithmetic and not box.upper_strict and not box.lower_strict


def test_arithmetic_alone_bounds_a_box() -> None:
    box, rows = rounded_bound("(assert (and (<= (* 3 X_0) 6) (>= (* 3 X_0) -6)))")
    assert 2 < box.upper[0] < Fraction("2.0000000001") and box.lower[0] == -box.upper[0]
    assert len(rows) == 2
    # The factors cancel but for rounding.
    with pytest.raises(SpecError, match="X_0 has no upper bound"):
        rounded_bound(
            "(assert (>= X_0 0))(assert (<= (- (* 1e20 X_0) (* 99999999999999999999 X_0)) 1))"
        )


def test_bounds_that_are_exact() -> None:
    for bound in (
        "(<= (* 2 X_0) 0.2)",
        "(>= (* -4 X_0) -0.4)",
        "(>= 0.8 (* 8 X_0))",
        "(>= (- X_0) -0.1)",
    ):
        box, rows = rounded_bound(f"(assert (>= X_0 0))(assert {bound})", True)
        assert box.upper == exact("0.1") and len(rows) == ("*" in bound)
    for bound in ("(<= (* 0.5 X_0) 0.05)", "(<= (* 3 X_0) 0.3)", "(<= (+ X_0 X_0) 0.2)"):
        assert rounded_bound(f"(assert (>= X_0 0))(assert {bound})")[0].upper[0] > Fraction("0.1")


@pytest.mark.parametrize(
    ("body", "decided"),
    [
        ("(<= (+ 0.1 0.2) 0.3)", False),  # in double it is above
        ("(< 0.3 (+ 0.1 0.2))", False),
        ("(<= 0.3 0.3)", True),
        ("(< 0.3 0.4)", True),
        ("(<= (+ 0.1 0.2) 0.4)", True),
        ("(< 1e39 1e40)", False),  # infinities in float32
        ("(<= (* 1 (+ 3 Y_0 (- Y_0))) 3)", False),
    ],
)
def test_rounding_may_decide_what_no_variable_does(body: str, decided: bool) -> None:
    (query,) = parse_property(flat(f"(assert {body})")).queries
    assert (query.cases == ((),)) == decided


def test_factors_whose_variables_cancel_are_variables() -> None:
    for body in ("(<= (* Y_0 (+ 3 Y_1 (- Y_1))) 3)", "(<= (/ 3 (+ 3 Y_1 (- Y_1))) 3)"):
        assert "not linear" in error_of(flat(f"(assert {body})"))


def test_a_looser_bound_that_excludes_its_end_stays() -> None:
    """As the float32 next to it inside, which is excluded however the bound is rounded."""
    near, far = "0.10000000001", "0.11"
    below, above = (
        Fraction(float(v)) for v in (np.nextafter(np.float32(0.1), np.float32(0)), np.float32(0.1))
    )
    one = ("(<= X_0 0.1)", f"(< X_0 {near})")
    for pair in (one, one[::-1]):
        box, (row,) = rounded_bound(
            "(assert (>= X_0 0))" + "".join(f"(assert {atom})" for atom in pair)
        )
        assert box.upper == exact("0.1") and not box.upper_strict
        assert (row.x, row.rhs, row.strict) == (((0, Fraction(1)),), below, True)
    box, (row,) = rounded_bound(
        "(assert (<= X_0 3))(assert (> X_0 0.09999999999))(assert (or (>= X_0 0.1)))"
    )
    assert box.lower == exact("0.1") and (row.x, row.rhs) == (((0, Fraction(-1)),), -above)
    for atoms in (
        (one[0], f"(< X_0 {far})"),
        ("(< X_0 0.1)", f"(< X_0 {near})"),
        ("(< X_0 0.1)", f"(<= X_0 {near})"),
    ):
        assert not rounded_bound(
            "(assert (>= X_0 0))" + "".join(f"(assert {atom})" for atom in atoms)
        )[1]


def test_an_excluded_end_contradicts_a_point() -> None:
    point = "(assert (<= X_0 7.225))(assert (>= X_0 7.225))"
    for atom in ("(not (>= X_0 7.225))", "(not (<= X_0 7.225))", "(< X_0 7.225)"):
        with pytest.raises(
            SpecError, match=r"lower 7\.225 = upper 7\.225, and that value is excluded"
        ):
            rounded_bound(f"{point}(assert {atom})")
        second = network(f"{point}(assert {atom})".replace("X_0", "X[0]"))
        assert not parse_property(second).queries
        text = (
            "(declare-const X_0 Real)(declare-const Y_0 Real)"
            + point
            + f"(assert (or {atom} (>= Y_0 1)))"
        )
        (query,) = parse_property(text).queries
        assert [len(case) for case in query.cases] == [1]


def test_strict_bounds() -> None:
    # At the same value the strict one is tighter.
    assert box_of("(assert (< X_1 2))").upper_strict == {1}
    assert box_of("(assert (> X_1 -2))(assert (>= X_1 -1))").lower_strict == frozenset()
    assert box_of("(assert (> X_1 -3))").lower_strict == frozenset()
    queries = parse_property(flat("(assert (< X_0 1))(assert (or (<= X_0 0) (< X_1 1)))")).queries
    assert [sorted(query.box.upper_strict) for query in queries] == [[], [0, 1]]


def test_disjunctions_over_inputs_are_queries_and_over_outputs_are_cases() -> None:
    body = """(assert (or (and (<= X_0 -1) (<= Y_0 0)) (and (>= X_0 1) (<= Y_0 1)) (and (<= Y_1 2) (<= X_0 -1))))
              (assert (or (<= Y_0 5) (<= Y_1 5)))"""
    first, second = parse_property(flat(body)).queries
    y0, y1 = (lambda rhs: row({}, {0: 1}, rhs)), (lambda rhs: row({}, {1: 1}, rhs))
    assert (first.box.lower[0], first.box.upper[0]) == exact(-2, -1)
    assert first.cases == ((y0(0), y0(5)), (y0(0), y1(5)), (y1(2), y0(5)), (y1(2), y1(5)))
    assert (second.box.lower[0], second.box.upper[0]) == exact(1, 2)
    assert second.cases == ((y0(1), y0(5)), (y0(1), y1(5)))


def test_equal_boxes_and_equal_cases_are_one() -> None:
    body = "(assert (or (and (<= X_0 3) (<= Y_0 0)) (<= Y_0 0) (and (>= X_0 -2) (<= Y_1 0))))"
    (query,) = parse_property(flat(body)).queries
    assert query.cases == ((row({}, {0: 1}, 0),), (row({}, {1: 1}, 0),))


def test_nested_logic_is_multiplied_out() -> None:
    body = (
        "(assert (or (and (<= Y_0 0) (or (<= Y_1 1) (and (<= Y_1 2) (not (and (<= Y_0 3) (<= Y_1 "
        "3)))))) (<= Y_1 9)))"
    )
    (query,) = parse_property(flat(body)).queries
    assert [len(case) for case in query.cases] == [2, 3, 3, 1]


def test_the_box_may_come_from_disjuncts_alone() -> None:
    body = "(assert (or (and (>= X_0 -1) (<= X_0 1) (>= Y_0 100)) (and (= X_0 4))))"
    first, second = parse_property(flat(body, inputs=1, box=False)).queries
    assert first.box == Box((Fraction(-1),), (Fraction(1),))
    assert second.box == Box((Fraction(4),), (Fraction(4),)) and second.cases == ((),)


def test_contradictory_disjuncts_are_dropped() -> None:
    body = (
        "(assert (or (and (<= X_0 0) (>= X_0 1)) (>= X_0 3) (and (< X_0 0) (>= X_0 0)) (<= Y_0 0)))"
    )
    (query,) = parse_property(flat(body)).queries
    assert query.cases == ((row({}, {0: 1}, 0),),)
    assert parse_property(flat("(assert (or (and (<= X_0 0) (>= X_0 1))))")).queries == ()


def test_int_sort() -> None:
    text = "(declare-const X_0 Int)(declare-const Y_0 Real)(assert (= X_0 3))"
    assert parse_property(text).inputs == (Variable("X", "int", (1,)),)


def test_layout_does_not_matter() -> None:
    loose = "( declare-const\tX_0 Real )\r\n(declare-fun Y_0()Real)"
    loose += "(assert;c\n(<=;(\nX_0;)\n\n1 )\n)( assert ( >= X_0(- 1)))"
    tight = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert(<= X_0 1))(assert(>= X_0 -1))"
    assert parse_property(loose) == parse_property(tight)


def test_deep_sums_and_logic_do_not_recurse() -> None:
    depth = max(3000, sys.getrecursionlimit() * 2)
    assert rows_of("(assert (<= " + "(+ Y_0 " * depth + "0" + ")" * depth + " 0))") == (
        row({}, {0: depth}, 0),
    )
    for head in ("and ", "or ", "not (not ", "or (<= 1 0) "):
        closing = ")" * (depth * (2 if head.startswith("not") else 1))
        assert rows_of("(assert " + f"({head}" * depth + "(<= Y_0 0)" + closing + ")") == (
            row({}, {0: 1}, 0),
        )


# -- VNN-LIB 2.x -----------------------------------------------------------------------------------


def test_a_network_with_several_tensors() -> None:
    declarations = """(declare-input a float32 [2, 3]) (declare-input b uint8 []) ; scalars too
                      (declare-output c float32 [1,1])(declare-output d int8 [ 2 ])"""
    body = """(assert (<= a[1,2] 1.0)) (assert (>= a[1,2] -1e-1)) (assert (= a[1,0] 0)) (assert (= a[1,1] 0))
              (assert (and (== a[0,0] 0) (= a[0,1] 0) (= a[0, 2] 0))) (assert (<= b 7))
              (assert (!= d[1] c)) (assert (< c[0,0] b))"""
    prop = parse_property(network(body, declarations))
    assert prop.version == "2.0"
    assert prop.inputs == (Variable("a", "float32", (2, 3)), Variable("b", "uint8", ()))
    assert prop.outputs == (Variable("c", "float32", (1, 1)), Variable("d", "int8", (2,)))
    (query,) = prop.queries
    assert query.box == Box(exact(0, 0, 0, 0, 0, -0.1, 0), exact(0, 0, 0, 0, 0, 1, 7))
    c_below_b = row({6: -1}, {0: 1}, 0, True)
    assert query.cases == (
        (c_below_b, row({}, {0: -1, 2: 1}, 0, True)),
        (c_below_b, row({}, {0: 1, 2: -1}, 0, True)),
    )


def test_white_space_before_an_index() -> None:
    """As the reference library prints it, on one line."""
    plain = (
        "(assert (and (>= X[0] -1.0) (<= X[0] 1.0) (= X[1] 0.5))) (assert (>= (+ Y[0] (- Y[1])) "
        "0.5))"
    )
    spaced = plain.replace("[", " [ ").replace("]", "\n]")
    assert parse_property(network(spaced)) == parse_property(network(plain))
    assert "'X [2]' is not an element of X" in error_of(network("(assert (>= X [2] 0))"))


def test_an_empty_box_is_no_error_in_2_0() -> None:
    """It asks whether there is an input, and there is none; nor is one where all disjuncts
    contradict themselves."""
    prop = parse_property(network("(assert (and (>= X[0] 2.0) (<= X[0] 1.0)))"))
    assert prop.queries == ()
    assert prop.doubts == ("no input is allowed: contradictory bounds for X[0]: lower 2 > upper 1",)
    prop = parse_property(
        network("(assert (= X[0] 0))(assert (or (> X[0] 1) (and (< X[1] 0) (>= X[1] 0))))")
    )
    assert prop.queries == () and len(prop.doubts) == 1
    byte = "(declare-input X uint8 [1]) (declare-output Y real [1])"
    for wrong in ("(< X -1)", "(>= X 256)"):
        assert parse_property(network(f"(assert {wrong})", byte)).queries == ()


def test_an_input_without_bounds_ranges_over_its_type_in_2_0() -> None:
    largest = Fraction(float(np.finfo(np.float32).max))
    declarations = (
        "(declare-input X float32 [2]) (declare-input Z int8 [1]) (declare-output Y real [1])"
    )
    prop = parse_property(
        network("(assert (>= X[1] 0.5)) (assert (or (<= X[1] 9) (= X[0] 1)))", declarations)
    )
    first, second = prop.queries
    assert first.box == Box(
        (-largest, Fraction(1, 2), Fraction(-128)), (largest, Fraction(9), Fraction(127))
    )
    assert second.box == Box(exact(1, 0.5, -128), (Fraction(1), largest, Fraction(127)))
    assert prop.doubts == (
        "the property does not bound X[0] and 1 more on both sides: every finite float32 is "
        "allowed there",
    )
    boxes = "(assert (or (and (>= X[0] 0) (<= X[0] 1) (= X[1] 0)) (and (= X[0] 9) (= X[1] 0))))"
    assert parse_property(network(boxes)).doubts == ()


@pytest.mark.parametrize(
    ("dtype", "lower", "upper"),
    [
        ("uint8", 0, 255),
        ("int8", -128, 127),
        ("uint4", 0, 15),
        ("int4", -8, 7),
        ("int32", -(2**31), 2**31 - 1),
    ],
)
def test_integer_types_bound_their_inputs(dtype: str, lower: int, upper: int) -> None:
    declarations = (
        f"(declare-input a real [1]) (declare-input b {dtype} [2]) (declare-output Y int8 [1])"
    )
    (query,) = parse_property(
        network("(assert (= a 0.5)) (assert (<= b[1] 3))", declarations)
    ).queries
    assert query.box == Box(
        (Fraction(1, 2), Fraction(lower), Fraction(lower)),
        (Fraction(1, 2), Fraction(upper), Fraction(3)),
    )


def test_the_version_is_told_by_content() -> None:
    assert (
        parse_property(
            network("(assert (= X[0] 1))(assert (= X[1] 1))").replace("<2.0>", "<2.1>")
        ).version
        == "2.1"
    )
    assert "unknown command" in error_of("(declare-something X real [2])")


# -- errors ----------------------------------------------------------------------------------------

FLAT_ERRORS = [
    ("(assert (<= Y_0 0)))", "7: unbalanced parenthesis: ')' closes nothing"),
    ("(assert (<= Y_0 0)\n\n(assert (<= Y_1 0))", "7: unbalanced parenthesis: '(assert' is not closed by line 9"),
    ("\n(assert (or (<= Y_0 0)\n", "8: unbalanced parenthesis: '(assert' is not closed by line 9"),
    ("(assert (or (and (<= Y_0 0) (<= Y_1 0))\n(declare-const X_9 Real)", "7: unbalanced parenthesis"),
    ("(check-sat", "7: unbalanced parenthesis: '(check-sat' is not closed by line 7"),
    ("(", "7: unbalanced parenthesis"),
    ("\n\n(assert (<= Y_2 0))", "9: undeclared variable 'Y_2'"),
    ("(assert (<= (+ 1 Y_2) 0))", "7: undeclared variable 'Y_2'"),
    ("(assert (<= Y_0[0] 0))", "7: undeclared variable 'Y_0[0]'"),
    ("(assert (<= Y_0 [0] 0))", "7: undeclared variable 'Y_0 [0]'"),
    ('(assert (<= "Y_0" 0))', "7: undeclared variable"),
    ("(declare-const X_0 Real)", "7: X_0 is declared twice"),
    ("(declare-const X_02 Real)", "7: unknown name 'X_02'"),
    ("(declare-const Z_0 Real)", "7: unknown name 'Z_0'"),
    ("(declare-const X_2 Bool)", "7: sort 'Bool' of X_2"),
    ("(declare-const X_2 Int)", "7: sort 'Int' of X_2"),
    ("(declare-const X_2)", "7: malformed"),
    ("(declare-const X_2 (Array Real))", "7: malformed"),
    ("(declare-const X_3 Real)", " missing index: X_2 is not declared"),
    ("(declare-const Y_999999999 Real)", " missing index: Y_2 is not declared"),
    ("(assert (xor (<= Y_0 0) (<= Y_1 0)))", "7: unknown operator 'xor' in 'assert'"),
    ("(assert (<= (sin Y_0) 0))", "7: unknown operator 'sin' in '<='"),
    ("(assert (=< Y_0 0))", "7: unknown operator '=<' in 'assert'"),
    ("(assert (<= (and Y_0) 0))", "7: unknown operator 'and' in '<='"),
    ("(assert (+ Y_0 0))", "7: unknown operator '+' in 'assert'"),
    ("(assert (or (Y_0 0)))", "7: 'Y_0' cannot stand first: write (>= Y_0 ...), not (Y_0 >= ...)"),
    ("(assert (or ((<= Y_0 0))))", "7: unknown operator '' in 'or'"),
    ("(assert Y_0)", "7: unexpected 'Y_0': 'assert' needs conditions"),
    ("(assert (and (<= Y_0 0) Y_0))", "7: unexpected 'Y_0': 'and' needs conditions"),
    ("(assert)", "7: 'assert' needs exactly one condition, not 0"),
    ("(assert (<= Y_0 0) (<= Y_1 0))", "7: 'assert' needs exactly one condition, not 2"),
    ("(assert (not (<= Y_0 0) (<= Y_1 0)))", "7: 'not' needs exactly one condition, not 2"),
    ("(assert (or (<= Y_0 0) (and)))", "7: 'and' needs at least one condition, not 0"),
    ("(assert (<= Y_0))", "7: '<=' needs 2 operands, not 1"),
    ("(assert (<= Y_0 Y_1 2))", "7: '<=' needs 2 operands, not 3"),
    ("(assert (<= Y_0 (+)))", "7: '+' needs more operands"),
    ("(assert (<= (/ Y_0) 1))", "7: '/' needs more operands"),
    ("(assert (<= (* Y_0 X_0) 1))", "7: not linear"),
    ("(assert (<= (/ 1 X_0) 1))", "7: not linear"),
    ("(assert (<= (/ Y_0 (- 1 1)) 1))", "7: division by zero"),
    ("(<= Y_0 0)", "7: a comparison '<=' cannot stand here"),
    ("(set-info (<= Y_0 0))", "7: a comparison '<=' cannot stand here"),
    ("(maximize Y_0)", "7: unknown command 'maximize'"),
    ("()", "7: unknown command ''"),
    ("hello", "7: unexpected 'hello'"),
    ("(assert (<= Y_0 ]0))", "7: unexpected character ']'"),
    ("\x00\x01", "7: unexpected '\\x00"),
    ("(assert (<= X_0\u00a01))", "7: unexpected character"),
    ('(set-info "never closed)', "7: unexpected character '\"'"),
    ("(vnnlib-version <2.0>)", "7: expected one (vnnlib-version"),
    ("(declare-network f (declare-input X real [1]))", "7: declare-network needs (vnnlib-version <2.0>)"),
    ("(assert (<= X_0 -3))", " contradictory bounds for X_0: lower -2 > upper -3"),
    ("(assert (>= X_1 2.5))", " contradictory bounds for X_1: lower 2.5 > upper 2"),
    ("(assert (= X_1 (/ 7 3)))", " contradictory bounds for X_1: lower about 2.33333 > upper 2"),
    ("(assert (and (> X_1 1.5) (<= X_1 1.5)))", " contradictory bounds for X_1: lower 1.5 = upper 1.5, and that"),
    ("(assert (<= X_0 -1e999))", " contradictory bounds for X_0: lower -2 > upper about -2^3318"),
    ("(assert (>= X_0 1e999))", " contradictory bounds for X_0: lower about 2^3318 > upper 2"),
    ("(assert (= (* 2 X_1) -7e9))", " contradictory bounds for X_1: lower -2 > upper -3500000000"),
    ("(assert (<= " + "(* 1e999 " * 30 + "Y_0" + ")" * 30 + " 0))", "7: a computed number has more than"),
    ("(assert (<= (+ " + " ".join(f"(/ 1 1{'0' * 900}{n})" for n in range(1, 40, 2)) + ") Y_0))", "7: a computed"),
    ("(assert (<= " + "(+ " * 20_000 + "1", "7: more than 10000 nested parentheses"),
    ("(" * 200_000, "7: more than 10000 nested parentheses"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "expected"), FLAT_ERRORS, ids=[body[:40] for body, _ in FLAT_ERRORS]
)
def test_errors_in_1_0(body: str, expected: str) -> None:
    assert error_of(flat(body)).startswith(":" + expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ": empty file"),
        (" \n; only a comment\n", ": empty file"),
        ("(declare-const Y_0 Real)", ": no input is declared"),
        ("(declare-const X_0 Real)(assert (= X_0 0))", ": no output is declared"),
        ("(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= X_0 0))", ": X_0 has no lower bound"),
        (flat("(assert (or (<= Y_0 0) (<= X_0 1)))(assert (>= X_0 0))", 1, box=False), ": X_0 has no upper bound"),
        (flat("(assert (<= X_0 X_1))", box=False), ": X_0 has no lower bound"),
        (network("").replace("<2.0>", "<1.0>"), ":1: expected one (vnnlib-version <2.0>)"),
        (network("").replace("<2.0>", "2.0"), ":1: expected one (vnnlib-version <2.0>)"),
        ("(vnnlib-version <2.0>)" * 2, ":1: expected one (vnnlib-version <2.0>)"),
        ("(vnnlib-version <2.0>)", ": no input is declared"),
        (network("(declare-const X_0 Real)"), ":3: malformed '(declare-const X_0 Real)'"),
        (network("(declare-network g (declare-input X real [1]))"), ":3: two-network queries are not supported yet"),
        (network("", "\n(equal-to g) (declare-input X real [1])"), ":3: two-network queries are not supported yet"),
        (network("", '(declare-input X real [1])\n(declare-hidden h real [1] "n")'), ":3: declare-hidden is not"),
        (network("", "(declare-input X real [1])\n(declare-output X real [1])"), ":3: X is declared twice"),
        (network("", "(declare-input X real [1])\n(declare-output X real [])"), ":3: X is declared twice"),
        (network("", "\n\n(declare-input X real)"), ":4: malformed '(declare-input X real)'"),
        (network("", "(declare-input X real [1 4])"), ":2: malformed"),
        (network("", "(declare-input X real [-1])"), ":2: malformed"),
        (network("", "(declare-input X real [1] initialized)"), ":2: 'initialized' inputs are not supported yet"),
        (network("", '(declare-input X real [1] "data")'), ":2: malformed"),
        (network("", "(declare-input X-y real [1])"), ":2: malformed"),
        (network("", "(declare-input X real [4,0])"), ":2: X [4, 0] has no element"),
        (network("", "(declare-input X uint8 [999999999999,99999999999])"), ":2: X [999999999999, 99999999999] has no"),
        (network("", "(declare-outcome X real [1])"), ":2: malformed"),
        (network("", "X"), ":2: malformed declare-network"),
        (network("(assert (<= X[2] 0))"), ":3: 'X[2]' is not an element of X, whose shape is [2]"),
        (network("(assert (<= X[0,0] 0))"), ":3: 'X[0,0]' is not an element of X"),
        (network("(assert (<= X[-1] 0))"), ":3: 'X[-1]' is not an element of X"),
        (network("(assert (<= X 0))"), ":3: 'X' is not an element of X"),
        (network("(assert (<= X_0 0))"), ":3: undeclared variable 'X_0'"),
        (network("(assert (<= X[0] 0))", "(declare-input X float64 [2]) (declare-output Y real [2])"),
         ": X[0] has no lower bound"),
        (network("", "(declare-input a real [1]) (declare-input b bool [2,2]) (declare-output Y real [1])"
                 ) + "(assert (= b[0,0] 0)) (assert (<= b[0,1] 0))", ": b[0,1] has no lower bound"),
        (network("(assert (Y[0] >= 0.5))"), ":3: 'Y' cannot stand first: write (>= Y ...), not (Y >= ...)"),
        (network("(assert (<= (0.5 + Y[0]) 1))"), ":3: '0.5' cannot stand first"),
        (network("(assert (>= (* Y[0] Y[0]) 0.5))"), ":3: not linear: '*' of variables"),
    ],
)  # fmt: skip
def test_errors_in_whole_files(text: str, expected: str) -> None:
    assert error_of(text).startswith(expected)


def test_too_many_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    either = "(assert (or (<= Y_0 0) (<= Y_1 0)))"
    assert "more than 1000000 cases" in error_of(flat(either * 20))
    assert "more than 1000000 cases" in error_of(flat(either * 20_000))
    nested = "(assert (or (<= Y_0 9) (and " + "(or (<= Y_0 0) (<= Y_1 0))" * 20 + ")))"
    assert re.match(r":7: more than 1000000 cases", error_of(flat(nested)))
    assert parse_property(flat(either * 20_000 + "(assert (< 0 0))")).queries == ()
    monkeypatch.setattr(reader, "MAX_SIZE", 5000)
    assert "more than 5000 inequalities" in error_of(flat(either * 10))
    boxes = " ".join(f"(<= X_0 {n}e-9)" for n in range(100))
    assert "more than 5000 inequalities" in error_of(flat(f"(assert (or {boxes}))", inputs=50))


def test_nested_arithmetic_takes_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every level would multiply all terms again."""
    monkeypatch.setattr(reader, "LEAST_PRODUCTS", 1000)
    names = " ".join(f"Y_{k}" for k in range(500))
    for head in ("(- ", "(* 2 ", "(/ "):
        end = ")" if head != "(/ " else " 2)"
        text = flat(f"(assert (<= {head * 500}(+ {names}){end * 500} 0))", outputs=500)
        assert re.match(r":\d+: products or differences nest too deeply", error_of(text))
    text = flat(f"(assert (<= {'(- ' * 20}(+ {names}){')' * 20} 0))", outputs=500)
    assert len(parse_property(text).queries[0].cases[0][0].y) == 500


def test_reading_ends_in_time() -> None:
    for text in (
        flat("(assert (<= Y_0 1))" * 10_000),
        flat("(assert (or (<= Y_0 0) (<= Y_1 0)))" * 15),
    ):
        with pytest.raises(TimeUp), Deadline.after(-1.0).limits():
            parse_property(text)


# -- files -----------------------------------------------------------------------------------------


def test_files_plain_and_gzip_by_content(tmp_path: Path) -> None:
    text = flat("(assert (<= Y_0 0))")
    (tmp_path / "plain.vnnlib").write_text(text)
    (tmp_path / "packed.vnnlib").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "only.vnnlib.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    (tmp_path / "stale.vnnlib").write_text(text)
    (tmp_path / "stale.vnnlib.gz").write_bytes(b"not read")
    expected = parse_property(text)
    for name in ("plain.vnnlib", "packed.vnnlib", "only.vnnlib.gz", "only.vnnlib", "stale.vnnlib"):
        assert read_property(tmp_path / name) == expected
        assert read_property(str(tmp_path / name)) == expected


def test_unreadable_files(tmp_path: Path) -> None:
    packed = gzip.compress(flat("(assert (<= Y_0 0))").encode())
    wrong_sum = packed[:-8] + bytes(8)
    contents = {
        "garbage": (b"\xff\xfe\x00garbage", "not UTF-8"),
        "garbage.gz": (gzip.compress(bytes(range(256))), "not UTF-8"),
        "short": (packed[:-20], "truncated gzip"),
        "head": (packed[:4], "truncated gzip"),
        "sum": (wrong_sum, "truncated gzip"),
        "bits": (packed[:12] + bytes(40) + packed[52:], "truncated gzip"),
        "empty": (b"", "empty file"),
        "line": (b"\n\n(assert", ":3: unbalanced"),
    }
    for name, (data, expected) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SpecError, match=re.escape(str(tmp_path / name)) + ".*" + expected):
            read_property(tmp_path / name)
    with pytest.raises(SpecError, match="cannot read: No such file"):
        read_property(tmp_path / "absent.vnnlib")
    with pytest.raises(SpecError, match="cannot read: Is a directory"):
        read_property(tmp_path)
    with pytest.raises(SpecError, match="cannot read: embedded null"):
        read_property("a\0b")


def test_a_file_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_BYTES", 1 << 20)
    for name, data in (
        ("a.vnnlib", b" " * (1 << 20)),
        ("b.vnnlib.gz", gzip.compress(b" " * (1 << 20))),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SpecError, match="empty file"):
            read_property(tmp_path / name)
    (tmp_path / "a.vnnlib").write_bytes(b" " * (1 << 21))
    (tmp_path / "b.vnnlib.gz").write_bytes(gzip.compress(b" " * (1 << 24)))
    with pytest.raises(SpecError, match=r"a\.vnnlib: larger than 1 MiB$"):
        read_property(tmp_path / "a.vnnlib")
    with pytest.raises(SpecError, match=r"b\.vnnlib: larger than 1 MiB when unpacked"):
        read_property(tmp_path / "b.vnnlib")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)
def test_a_forbidden_file(tmp_path: Path) -> None:
    path = tmp_path / "closed.vnnlib"
    path.write_text(flat(""))
    path.chmod(0)
    with pytest.raises(SpecError, match="cannot read: Permission denied"):
        read_property(path)


# -- a reference evaluator -------------------------------------------------------------------------

Tree = tuple[Any, ...]  # (operator, operands...), whose leaves are variable names and Fractions


def show(tree: object) -> str:
    if isinstance(tree, tuple):
        return f"({tree[0]} {' '.join(map(show, tree[1:]))})"
    # Halves and quarters: exact.
    return str(float(tree)) if isinstance(tree, Fraction) else str(tree)


def value(tree: object, point: dict[str, Fraction]) -> Any:
    if isinstance(tree, Fraction):
        return tree
    if isinstance(tree, str):
        return point[tree]
    assert isinstance(tree, tuple)
    a, *rest = [value(operand, point) for operand in tree[1:]]
    match tree[0]:
        case "and":
            return all([a, *rest])
        case "or":
            return any([a, *rest])
        case "not":
            return not a
        case "+":
            return sum(rest, a)
        case "-":
            return a - sum(rest) if rest else -a
        case "*":
            return a * rest[0]
        case "/":
            return a / rest[0]
        case "<=" | ">=" | "<" | ">":
            return {"<=": a <= rest[0], ">=": a >= rest[0], "<": a < rest[0], ">": a > rest[0]}[
                tree[0]
            ]
        case _:
            return (a == rest[0]) != (tree[0] == "!=")


NAMES = ["X_0", "X_1", "Y_0", "Y_1"]
numbers = st.sampled_from(VALUES)
factors = st.sampled_from([Fraction(n) for n in (-2, -1, 1, 2, 4)])
expressions = st.recursive(
    st.sampled_from(NAMES) | numbers,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from("+-"), inner, inner),
        st.tuples(st.sampled_from("+-"), inner),
        st.tuples(st.just("+"), inner, inner, inner),
        st.tuples(st.just("*"), factors | st.just(Fraction(0)), inner),
        st.tuples(st.sampled_from("*/"), inner, factors),
    ),
    max_leaves=4,
)
operators = st.sampled_from(["<=", ">=", "<", ">", "=", "==", "!="])
comparisons = st.tuples(operators, st.sampled_from(NAMES), numbers) | st.tuples(
    operators, expressions, expressions
)
formulas = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("and", *parts)),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("or", *parts)),
        st.tuples(st.just("not"), inner),
    ),
    max_leaves=8,
)
points = st.tuples(*[numbers] * 4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(formulas, max_size=4), st.lists(points, min_size=1, max_size=12), st.booleans())
def test_membership_equals_the_reference(
    asserts: list[Tree], sample: list[tuple[Fraction, ...]], second: bool
) -> None:
    text = flat("\n".join(f"(assert {show(tree)})" for tree in asserts))
    if second:
        body = text[text.index("(assert") :]
        text = network(re.sub(r"([XY])_(\d)", r"\1[\2]", body))
    try:
        prop = parse_property(text)
    except SpecError as error:
        assert "contradictory bounds" in str(error) and not second
        prop = None
    for point in sample:
        x, y = point[:2], point[2:]
        named = dict(zip(NAMES, point, strict=True))
        expected = all(-2 <= v <= 2 for v in x) and all(value(tree, named) for tree in asserts)
        assert (prop is not None and unsafe(prop, x, y)) == expected
    for query in prop.queries if prop else ():
        ways = {tuple((row, row.arithmetic) for row in case) for case in query.cases}
        assert len(ways) == len(query.cases)
        for r in (r for case in query.cases for r in case):
            assert (
                [i for i, _ in r.x] == sorted({i for i, _ in r.x})
                and all(c for _, c in r.x + r.y)
                and (r.y or len(r.x) > 1 or r.arithmetic)
            )


# -- fuzzing ---------------------------------------------------------------------------------------

SEEDS = [
    flat("(assert (or (and (<= Y_0 Y_1) (>= X_0 0.5)) (not (= (+ X_0 (* 2 Y_1)) 1e-3))))"),
    network(
        "(assert (and (<= X[0] 1.0) (>= X[0] -1)))(assert (== X[1] 0.5))(assert (or (< Y[0] (- "
        "Y[1])) (!= Y[0] 1)))"
    ),
]
PIECES = [
    "(",
    ")",
    "[",
    "]",
    ",",
    ";",
    '"',
    "|",
    "\n",
    " ",
    "<",
    "=",
    "-",
    "/",
    "not",
    "assert",
    "(or ",
    "(and ",
    "X_0",
    "Y[0]",
    "1e9",
    "1e-999",
    "\x00",
    "é",
    "(declare-const X_2 Real)",
    "(assert (<= X_0 ",
]


def parses_or_refuses(text: str) -> None:
    try:
        prop = parse_property(text, "s")
    except SpecError as error:
        assert str(error).startswith("s:") and "\n" not in str(error)
    else:
        assert isinstance(prop, Property) and prop.inputs and prop.outputs


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_mutated_text_parses_or_is_refused(text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = start + data.draw(st.integers(0, 6))
        text = (
            text[:start]
            + data.draw(st.sampled_from(["", *PIECES, text[start:stop] * 2]))
            + text[stop:]
        )
    parses_or_refuses(text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join))
@example("\ud800")
def test_random_text_parses_or_is_refused(text: str) -> None:
    parses_or_refuses(text)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=60), st.booleans(), st.booleans())
def test_random_bytes_are_refused(tmp_path: Path, data: bytes, packed: bool, magic: bool) -> None:
    path = tmp_path / "random.vnnlib"
    path.write_bytes(b"\x1f\x8b" * magic + (gzip.compress(data) if packed else data))
    with pytest.raises(SpecError):
        read_property(path)


# -- real files ------------------------------------------------------------------------------------


def real_files(pattern: str) -> Iterable[Path]:
    return sorted(
        path for path in SHARED.glob(pattern) if path.name.endswith((".vnnlib", ".vnnlib.gz"))
    )


def check_real_file(path: Path) -> None:
    """The box and the row count must equal what plain regular expressions see."""
    prop = read_property(path)
    data = path.read_bytes()
    text = re.sub(r";.*", "", (gzip.decompress(data) if path.suffix == ".gz" else data).decode())
    assert prop.version == "1.0" and prop.queries
    assert prop.inputs[0].shape == (len(re.findall(r"declare-const X_", text)),)
    assert prop.outputs[0].shape == (len(re.findall(r"declare-const Y_", text)),)
    plain = re.findall(r"^\(assert \((<=|>=) X_(\d+) (\S+?)\)\)", text, re.MULTILINE)
    if len(plain) == 2 * prop.inputs[0].shape[0]:
        (query,) = prop.queries
        ends = {(op, int(index)): Fraction(end) for op, index, end in plain}
        assert all(query.box.upper[index] == end for (op, index), end in ends.items() if op == "<=")
        assert all(query.box.lower[index] == end for (op, index), end in ends.items() if op == ">=")
        output_rows = {atom for case in query.cases for atom in case}
        assert len(output_rows) == len(re.findall(r"[<>]=\s+\(?\S*\s*Y_", text))


needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real files are not here: no {SHARED}"
)


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for path in real_files("vnncomp/**/*")}),
    ids=lambda p: p.parent.name,
)
def test_vnncomp_files(folder: Path) -> None:
    for path in real_files(str(folder.relative_to(SHARED) / "*")):
        if folder.parent.name == "isomorphic_acasxu_2026_v2":
            with pytest.raises(SpecError, match=r":\d+: two-network queries"):
                read_property(path)
        else:
            check_real_file(path)


@pytest.mark.shared
@needs_shared
def test_aaai21_files() -> None:
    files = list(real_files("benchmarks/aaai21-mnist/vnnlib/*"))
    assert len(files) == 391
    for path in files[::5]:  # they differ in their numbers only; all 391 take 9 s
        check_real_file(path)


@pytest.mark.shared
@needs_shared
def test_acasxu_property_6_is_a_union_of_two_boxes() -> None:
    first, second = read_property(SHARED / "vnncomp/acasxu/prop_6.vnnlib").queries
    assert first.box.lower[1] == Fraction("0.11140846") and second.box.upper[1] == Fraction(
        "-0.11140846"
    )
    assert first.cases == second.cases == tuple((row({}, {0: -1, j: 1}, 0),) for j in (1, 2, 3, 4))
