"""Linear expressions, inequalities and bounds of a property, in exact rationals.

The reader (`reader.py`) hands in words and operators; out come atoms (a bound of one input, or a
row), disjunctions of conjunctions of them, and boxes. Nothing here knows the file's syntax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Final, NamedTuple

from qverify.property import Arithmetic, Box, Case, Row, Variable

MAX_EXPONENT: Final = 1_000  # float64 ends at 1e308 and 5e-324
MAX_DIGITS: Final = 2_000  # the exact decimal of any float64 has fewer than 1,100
# Of a computed number, so that a chain of products cannot grow without end.
MAX_BITS: Final = 32_768

_NUMBER: Final = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
_INTEGER_TYPE: Final = re.compile(r"(u?)int(2|4|8|16|32|64)")

_ZERO: Final = Fraction(0)
ONE: Final = Fraction(1)
_SHARED: Final = {ONE: ONE, -ONE: -ONE}  # nearly all coefficients of real files: one object each
NEGATED: Final = {"<=": ">", ">=": "<", "<": ">=", ">": "<=", "==": "!=", "=": "!=", "!=": "=="}

# Of float32: smaller magnitudes are not rounded relatively.
LEAST_NORMAL: Final = Fraction(1, 2**126)
BEYOND: Final = Fraction(2**2000)  # more than a float holds
LOOSE: Final = Fraction(1, 2**20)  # rounding changes a comparison of constants by less
FED: Final = Fraction(2**128)  # no float32, and no integer that is fed, is larger


class Steps(NamedTuple):
    """How an expression is computed; see `Arithmetic`."""

    depth: int
    constants: Fraction
    excess: dict[int, Fraction]
    shrink: Fraction
    plain: bool
    numbers: int  # constants among the leaves


class Linear(NamedTuple):
    """A sum of coefficient * variable, plus a constant.

    X_i has the key i and Y_j the key ~j (that is -1 - j), so that one dictionary holds both.
    """

    terms: dict[int, Fraction]
    constant: Fraction
    steps: Steps | None = None  # None: a variable, its negative, or a constant, as it stands


# Of X_i the lower bound has the key 2 * i and the upper bound 2 * i + 1; the bool says that the
# bound is excluded.
Bound = tuple[int, Fraction, bool]
Bounds = dict[int, tuple[Fraction, bool]]
Atom = Bound | Row
Disjunction = list[tuple[Atom, ...]]  # of conjunctions: [] is false, [()] is true


class Fault(Exception):
    """A SpecError in the making: `parse_property` adds source and line."""

    def __init__(self, message: str, pos: int | None = None) -> None:
        super().__init__(message)
        self.pos = pos  # in the text; the reader puts the current token's where none is given


# -- linear inequalities ---------------------------------------------------------------------------


def linear(operand: int | Fraction) -> Linear:
    """A variable's key, or a constant, as a linear expression."""
    return Linear({operand: ONE}, _ZERO) if isinstance(operand, int) else Linear({}, operand)


def arithmetic(head: str, operands: list[Linear]) -> Linear:
    """`(head operands ...)`; may reuse the operands' dictionaries."""
    if len(operands) < (2 if head == "/" else 1):
        raise Fault(f"'{head}' needs more operands")
    if head == "+":
        return _sum(operands)
    if head == "-":
        start = min(1, len(operands) - 1)  # (- a) is -a
        return _sum(operands[:start] + [_negated(operand) for operand in operands[start:]])
    result = operands[0]
    for operand in operands[1:]:
        one, other = (operand, result) if _varies(operand) and head == "*" else (result, operand)
        if _varies(other):
            raise Fault(f"not linear: '{head}' of variables")
        if head == "/" and not operand.constant:
            raise Fault("division by zero")
        result = _product(one, other, head == "/")
    return result


def _varies(operand: Linear) -> bool:
    """Whether variables are in an expression, be it that they cancel but for rounding."""
    return bool(operand.terms or (operand.steps and operand.steps.excess))


def _sum(operands: list[Linear]) -> Linear:
    # Into the longest, in place: a sum nested (+ a (+ b (+ c ...))) takes linear time.
    if len(operands) == 1:
        return operands[0]
    steps = [_steps(operand) for operand in operands]
    longest = max(range(len(operands)), key=lambda k: len(operands[k].terms))
    terms, excess = operands[longest].terms, steps[longest].excess
    constant, plain = _ZERO, True
    for k, (operand, step) in enumerate(zip(operands, steps, strict=True)):
        constant = _checked(constant + operand.constant)
        for key, magnitude in step.excess.items() if k != longest else ():
            excess[key] = _checked(excess.get(key, _ZERO) + magnitude)
        for key, coefficient in operand.terms.items() if k != longest else ():
            before = terms.get(key)
            total = coefficient if before is None else _checked(before + coefficient)
            if before is not None:
                plain = False
                excess[key] = excess.get(key, _ZERO) + abs(before) + abs(coefficient) - abs(total)
            if total:
                terms[key] = total
            else:
                del terms[key]
    numbers = sum(step.numbers for step in steps)
    return Linear(
        terms,
        constant,
        Steps(
            max(step.depth for step in steps) + len(steps) - 1,
            _checked(sum((step.constants for step in steps), _ZERO)),
            excess,
            max(step.shrink for step in steps),
            plain and numbers <= 1 and all(step.plain for step in steps),
            numbers,
        ),
    )


def _negated(operand: Linear) -> Linear:
    return Linear(
        {key: -coefficient for key, coefficient in operand.terms.items()},
        -operand.constant,
        operand.steps,
    )


def _steps(operand: Linear) -> Steps:
    if operand.steps is not None:
        return operand.steps
    constant = abs(operand.constant)
    constants = max(constant, LEAST_NORMAL) if constant else _ZERO
    return Steps(0 if operand.terms else 1, constants, {}, ONE, True, 0 if operand.terms else 1)


def _product(operand: Linear, constant: Linear, division: bool = False) -> Linear:
    """`operand` times (or through) an expression without variables."""
    one, two = _steps(operand), _steps(constant)
    factor = 1 / constant.constant if division else constant.constant
    size = max(abs(factor), two.constants)
    shrink = (
        one.shrink
        if operand.steps is None or abs(factor) >= 1
        else one.shrink / abs(factor)
        if factor
        else BEYOND
    )
    if division:
        size = abs(factor)
        if constant.steps is not None or abs(constant.constant) < LEAST_NORMAL:
            shrink = BEYOND  # what is divided through is known too badly
    terms = (
        {key: _checked(factor * coefficient) for key, coefficient in operand.terms.items()}
        if factor
        else {}
    )
    excess = {key: _checked(size * magnitude) for key, magnitude in one.excess.items()}
    if size != abs(factor):
        for key, coefficient in operand.terms.items():
            excess[key] = _checked(excess.get(key, _ZERO) + (size - abs(factor)) * abs(coefficient))
    steps = Steps(
        one.depth + two.depth + 1 + division,
        _checked(one.constants * size + LEAST_NORMAL),
        excess,
        _checked(min(shrink, BEYOND)),
        bool(operand.terms) and operand.steps is None and constant.steps is None and not division,
        one.numbers,
    )
    return Linear(terms, _checked(factor * operand.constant), steps)


def _checked(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise Fault(f"a computed number has more than {MAX_BITS} bits")
    return value


def compare(op: str, left: Linear, right: Linear, positive: bool) -> Disjunction:
    """`left op right`, or its negation."""
    op = op if positive else NEGATED[op]
    if op == "!=":
        return _below(left, right, True) + _below(right, left, True)
    if op in ("=", "=="):
        return [a + b for a in _below(left, right, False) for b in _below(right, left, False)]
    if op in (">", ">="):
        left, right = right, left
    return _below(left, right, op in ("<", ">"))


def _below(left: Linear, right: Linear, strict: bool) -> Disjunction:
    """`left <= right` (or `<`) as a row.

    A bound, if it has one X and nothing to compute; a truth value, if it has no variable.
    """
    terms, rhs = dict(left.terms), right.constant - left.constant
    for key, coefficient in right.terms.items():
        terms[key] = terms.get(key, _ZERO) - coefficient
    kept = [(key, _SHARED.get(value, value)) for key, value in terms.items() if value]
    x = tuple(sorted((key, value) for key, value in kept if key >= 0))
    y = tuple(sorted((~key, value) for key, value in kept if key < 0))
    computed = left.steps is not None or right.steps is not None
    row = Row(x, y, rhs, strict, _joined(left, right) if computed else None)
    if not x and not y:
        return _truth(row, _joined(left, right))
    if y or len(x) > 1 or computed:
        return [(row,)]
    index, coefficient = x[0]
    return [((2 * index + (coefficient > 0), rhs / coefficient, strict),)]


def _truth(row: Row, arithmetic: Arithmetic) -> Disjunction:
    """What a row without variables says.

    The row itself, where rounding or an overflow may decide.
    """
    rhs, near = row.rhs, LOOSE * (arithmetic.depth + 1) * arithmetic.constants
    rounded = abs(rhs) <= near and (rhs or row.arithmetic)
    cancelled = row.arithmetic and arithmetic.excess
    if rounded or cancelled or arithmetic.constants * arithmetic.shrink >= FED / 2:
        return [(replace(row, arithmetic=arithmetic),)]
    return [()] if rhs > 0 or (rhs == 0 and not row.strict) else []


def is_scaled(row: Row) -> bool:
    """Whether a row compares one input times a power of two with a constant.

    That is the same as comparing the input with the quotient, however they are rounded, since
    neither can become subnormal or overflow alone.
    """
    arithmetic, whole, size = row.arithmetic, abs(row.x[0][1]), abs(row.rhs)
    power = whole.denominator == 1 and whole.numerator & (whole.numerator - 1) == 0
    normal = not size or (size / whole >= LEAST_NORMAL and size < FED / 2)
    return (
        arithmetic is not None
        and arithmetic.plain
        and arithmetic.alone
        and power
        and whole < 2**64
        and normal
    )


def _joined(left: Linear, right: Linear) -> Arithmetic:
    """How two sides are computed, together."""
    one, other = _steps(left), _steps(right)
    excess = dict(one.excess)
    for key, magnitude in other.excess.items():
        excess[key] = excess.get(key, _ZERO) + magnitude
    both = left.terms.keys() & right.terms.keys()
    for key in both:
        a, b = left.terms[key], right.terms[key]
        excess[key] = excess.get(key, _ZERO) + abs(a) + abs(b) - abs(a - b)
    alone = any(
        not side.terms and side.steps is None and steps.numbers == 0
        for side, steps in ((left, other), (right, one))
    )
    return Arithmetic(
        other.depth
        if alone and not left.terms
        else one.depth
        if alone
        else max(one.depth, other.depth),
        one.constants + other.constants,
        tuple(sorted((key, magnitude) for key, magnitude in excess.items() if magnitude)),
        max(one.shrink, other.shrink),
        one.plain and other.plain and not both and one.numbers + other.numbers <= 1,
        alone,
    )


# -- bounds ----------------------------------------------------------------------------------------


def type_ranges(inputs: tuple[Variable, ...]) -> Bounds:
    """The bounds that an input of an integer type has by its type."""
    bounds: Bounds = {}
    start = 0
    for variable in inputs:
        stop = start + 2 * math.prod(variable.shape)
        if match := _INTEGER_TYPE.fullmatch(variable.dtype):
            count = 2 ** int(match.group(2))
            lower = Fraction(0 if match.group(1) else -count // 2)
            sides = (lower, False), (lower + count - 1, False)
            bounds.update((key, sides[key & 1]) for key in range(start, stop))
        start = stop
    return bounds


def float_ranges(inputs: tuple[Variable, ...]) -> Bounds:
    """The bounds of float32 and real inputs: the finite float32 numbers, which can be fed."""
    largest = Fraction(2**128 - 2**104)
    bounds: Bounds = {}
    start = 0
    for variable in inputs:
        stop = start + 2 * math.prod(variable.shape)
        if variable.dtype.lower() in ("float32", "real"):
            sides = (-largest, False), (largest, False)
            bounds.update((key, sides[key & 1]) for key in range(start, stop))
        start = stop
    return bounds


def tighten(bounds: Bounds, atoms: Iterable[Atom], outer: Bounds, float32: bool) -> list[Row]:
    """Put the atoms that are bounds, where tighter than those in `outer`, into `bounds`.

    Return the rows, which may be computed in `float32`.

    Two kinds of rows bound one input. One that takes arithmetic gives a bound that holds for
    whoever accepts it; what it says more is asked of counterexamples only, as a row. So is a looser
    bound that excludes its end, where both ends may be rounded to one number: a tighter one that
    includes it does not imply it.
    """
    rows: list[Row] = []
    for atom in atoms:
        if isinstance(atom, Row):
            rows.append(atom)
        else:
            _put(bounds, atom, outer, rows)
    for row in [row for row in rows if row.bounds_input and row.arithmetic]:
        if (bound := _outer_bound(row, bounds, outer, float32)) is not None:
            _put(bounds, bound, outer, rows)
    return rows


def _put(bounds: Bounds, bound: Bound, outer: Bounds, rows: list[Row]) -> None:
    key, value, strict = bound
    old = bounds.get(key) or outer.get(key)
    tighter = old is None or (
        strict and not old[1] if value == old[0] else (value < old[0]) == bool(key & 1)
    )
    if tighter:
        bounds[key] = (value, strict)
    if old is not None and strict != old[1] == tighter and value != old[0] and _near(value, old[0]):
        sign, looser = ONE if key & 1 else -ONE, old[0] if tighter else value
        rows.append(Row(((key >> 1, sign),), (), _float32_below(sign * looser), True))


def _outer_bound(row: Row, bounds: Bounds, outer: Bounds, float32: bool) -> Bound | None:
    """The bound that a row with arithmetic puts on its one input, whoever computes it.

    None where rounding leaves none.

    Sound because of the standard model (`readings.py`): |c| |X| <= r + e w |X| where the sides are
    off by e times their leaves, of which X has the weight w. Without overflow, that is; where X
    occurs once, or always in one direction, what is computed is monotone in X also beyond, and so
    the same on its far side as at a number twice as large as the bound.
    """
    ((i, c),), arithmetic = row.x, row.arithmetic
    assert arithmetic is not None
    if is_scaled(row):
        value = row.rhs / c
        # Else a float32 beside it may be compared.
        return (
            2 * i + (c > 0),
            value,
            row.strict and _is_float32(value),
        )
    reach = {key: _reach(key, bounds, outer) for key in (i, *(key for key, _ in arithmetic.excess))}
    excess = dict(arithmetic.excess)
    weight = max(abs(c), LEAST_NORMAL) + excess.pop(i, _ZERO)
    rest = (
        abs(row.rhs)
        + arithmetic.constants
        + sum((reach[key] * size for key, size in excess.items()), _ZERO)
    )
    limits = []
    for bits, top in ((53, 1023), (24, 127)) if float32 else ((53, 1023),):
        count = max(arithmetic.depth, 2) + 1
        error = Fraction(count, 2**bits - count)
        if 2 * count > 2**bits or 2 * error * weight > abs(c):
            return None
        most = row.rhs + error * rest
        limit = most / (abs(c) - error * weight if most > 0 else abs(c) + error * weight)
        far = reach[i] if arithmetic.excess else min(reach[i], 2 * abs(limit) + 1)
        if 2 * (weight * far + rest) * arithmetic.shrink >= 2**top:
            return None
        limits.append(limit)
    return 2 * i + (c > 0), max(limits) if c > 0 else -max(limits), False


def _is_float32(value: Fraction) -> bool:
    """Whether a number is a normal float32, or 0."""
    digits = abs(value.numerator) // (value.numerator & -value.numerator) if value else 0
    whole = value.denominator & (value.denominator - 1) == 0 and digits < 2**24
    return whole and (not value or LEAST_NORMAL <= abs(value) < FED)


def _float32_below(value: Fraction) -> Fraction:
    """The largest float32 that is at most `value`.

    Numbers below it are so however `value` is rounded.
    """
    size = max(abs(value), LEAST_NORMAL)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    step = Fraction(2) ** (exponent - 23)
    return value // step * step


def _reach(key: int, bounds: Bounds, outer: Bounds) -> Fraction:
    """A magnitude that X_key does not exceed, whatever it stands for (Y: ~key)."""
    if key < 0:
        return FED
    sides = [bounds.get(2 * key + side) or outer.get(2 * key + side) for side in (0, 1)]
    most = max(FED if bound is None else abs(bound[0]) for bound in sides)
    return min(FED, 2 * most + LEAST_NORMAL)


def distinct(rows: Iterable[Row]) -> Case:
    """The rows in their order, each once.

    Those that are computed in different ways are different.
    """
    return tuple({(row, row.arithmetic): row for row in rows}.values())


def contradictory(index: int, bounds: Bounds, outer: Bounds) -> bool:
    """Whether no value of X_index lies within `bounds`, however they are rounded.

    `outer` completes the bounds.
    """
    lower = bounds.get(2 * index) or outer.get(2 * index)
    upper = bounds.get(2 * index + 1) or outer.get(2 * index + 1)
    if lower is None or upper is None:
        return False
    return lower[0] >= upper[0] and (lower[1] or upper[1] or not _near(lower[0], upper[0]))


def _near(one: Fraction, other: Fraction) -> bool:
    """Whether both may be rounded to one float32."""
    return abs(one - other) <= LOOSE * max(abs(one), abs(other), LEAST_NORMAL)


def box(count: int, bounds: Bounds) -> Box:
    """The box of `count` inputs; every one must have both bounds."""
    lower, upper = (
        tuple([bounds[2 * index + side][0] for index in range(count)]) for side in (0, 1)
    )
    strict = [
        frozenset(key >> 1 for key, bound in bounds.items() if bound[1] and key & 1 == side)
        for side in (0, 1)
    ]
    return Box(lower, upper, strict[0], strict[1])


# -- words -----------------------------------------------------------------------------------------


def number(word: str) -> Fraction:
    """The exact value of a decimal."""
    match = _NUMBER.fullmatch(word)
    if match is None:
        raise Fault(f"bad number {quote(word)}")
    sign, whole, part, exponent = (
        match.group(1),
        match.group(2),
        match.group(3) or "",
        match.group(4) or "0",
    )
    if len(word) > MAX_DIGITS or abs(int(exponent)) > MAX_EXPONENT:
        raise Fault(f"bad number {quote(word)}: too large, too small or too long")
    value, scale = int(sign + whole + part), int(exponent) - len(part)
    return Fraction(value * 10**scale) if scale >= 0 else Fraction(value, 10**-scale)


def quote(word: str) -> str:
    """A word of the file in quotes, shortened for a message."""
    return repr(word if len(word) <= 60 else word[:57] + "...")


def decimal(value: Fraction) -> str:
    """A short decimal where it is exact, else the fraction.

    Huge ones in words, which str() would refuse.
    """
    if value.numerator.bit_length() + value.denominator.bit_length() > 1000:
        exponent = value.numerator.bit_length() - value.denominator.bit_length()
        return f"about {'-' if value < 0 else ''}2^{exponent}"
    text = str(value) if value.denominator == 1 else repr(float(value))
    if Fraction(text) == value:
        return text
    return str(value) if len(str(value)) <= 40 else f"about {float(value):.6g}"
