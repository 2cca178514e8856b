"""Linear expressions, inequalities and bounds of a property, in exact rationals.

The reader (`vnnlib.py`) hands in words and operators; out come atoms (a bound of one input, or a row), disjunctions of
conjunctions of them, and boxes. Nothing here knows the file's syntax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Final

from qverify.property import Box, Row, Variable

MAX_EXPONENT: Final = 1_000  # float64 ends at 1e308 and 5e-324
MAX_DIGITS: Final = 2_000  # the exact decimal of any float64 has fewer than 1,100
MAX_BITS: Final = 32_768  # of a computed number, so that a chain of products cannot grow without end

_NUMBER: Final = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
_INTEGER_TYPE: Final = re.compile(r"(u?)int(2|4|8|16|32|64)")

_ZERO: Final = Fraction(0)
ONE: Final = Fraction(1)
_SHARED: Final = {ONE: ONE, -ONE: -ONE}  # nearly all coefficients of real files: one object each
NEGATED: Final = {"<=": ">", ">=": "<", "<": ">=", ">": "<=", "==": "!=", "=": "!=", "!=": "=="}

# X_i has the key i and Y_j the key ~j (that is -1 - j), so that one dictionary holds both.
Linear = tuple[dict[int, Fraction], Fraction]  # sum of coefficient * variable, plus a constant
# Of X_i the lower bound has the key 2 * i and the upper bound 2 * i + 1; the bool says that the bound is excluded.
Bound = tuple[int, Fraction, bool]
Bounds = dict[int, tuple[Fraction, bool]]
Atom = Bound | Row
Disjunction = list[tuple[Atom, ...]]  # of conjunctions: [] is false, [()] is true


class Fault(Exception):
    """A SpecError in the making: `parse_property` adds source and line."""

    def __init__(self, message: str, pos: int | None = None) -> None:
        super().__init__(message)
        self.pos = pos  # in the text; the reader puts the current token's where none is given


# --- linear inequalities ---------------------------------------------------------------------------------------------


def linear(operand: int | Fraction) -> Linear:
    """A variable's key, or a constant, as a linear expression."""
    return ({operand: ONE}, _ZERO) if isinstance(operand, int) else ({}, operand)


def arithmetic(head: str, operands: list[Linear]) -> Linear:
    """`(head operands ...)`; may reuse the operands' dictionaries."""
    if len(operands) < (2 if head == "/" else 1):
        raise Fault(f"'{head}' needs more operands")
    if head == "+":
        return _sum(operands)
    if head == "-":
        start = min(1, len(operands) - 1)  # (- a) is -a
        return _sum(operands[:start] + [_scaled(operand, -ONE) for operand in operands[start:]])
    result = operands[0]
    for operand in operands[1:]:
        variables, constant = operand
        if variables and (head == "/" or result[0]):
            raise Fault(f"not linear: '{head}' of variables")
        if head == "/" and not constant:
            raise Fault("division by zero")
        factor = 1 / constant if head == "/" else constant
        result = _scaled(operand, result[1]) if variables else _scaled(result, factor)
    return result


def _sum(operands: list[Linear]) -> Linear:
    # Into the longest, in place: a sum nested (+ a (+ b (+ c ...))) takes linear time.
    terms = max((terms for terms, _ in operands), key=len)
    constant = _ZERO
    for others, other_constant in operands:
        constant = _checked(constant + other_constant)
        for key, coefficient in others.items() if others is not terms else ():
            total = _checked(terms.get(key, _ZERO) + coefficient)
            if total:
                terms[key] = total
            else:
                del terms[key]
    return terms, constant


def _scaled(operand: Linear, factor: Fraction) -> Linear:
    terms = {key: _checked(factor * coefficient) for key, coefficient in operand[0].items()} if factor else {}
    return terms, _checked(factor * operand[1])


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
    """`left <= right` (or `<`): a bound if it has one X and nothing else, a truth value if it has no variable."""
    terms, rhs = dict(left[0]), right[1] - left[1]
    for key, coefficient in right[0].items():
        terms[key] = terms.get(key, _ZERO) - coefficient
    x = tuple(sorted((key, _SHARED.get(value, value)) for key, value in terms.items() if key >= 0 and value))
    y = tuple(sorted((~key, _SHARED.get(value, value)) for key, value in terms.items() if key < 0 and value))
    if y or len(x) > 1:
        return [(Row(x, y, rhs, strict),)]
    if not x:
        return [()] if rhs > 0 or (rhs == 0 and not strict) else []
    index, coefficient = x[0]
    return [((2 * index + (coefficient > 0), rhs / coefficient, strict),)]


# --- bounds ----------------------------------------------------------------------------------------------------------


def type_ranges(inputs: tuple[Variable, ...]) -> Bounds:
    """The bounds that an input of an integer type has by its type."""
    bounds: Bounds = {}
    start = 0
    for variable in inputs:
        stop = start + 2 * math.prod(variable.shape)
        if match := _INTEGER_TYPE.fullmatch(variable.dtype):
            count = 2 ** int(match.group(2))
            lower = Fraction(0 if match.group(1) else -count // 2)
            ends = (lower, False), (lower + count - 1, False)
            bounds.update((key, ends[key & 1]) for key in range(start, stop))
        start = stop
    return bounds


def float_ranges(inputs: tuple[Variable, ...]) -> Bounds:
    """The bounds that an input of type float32 or real has by what can be fed: the finite float32 numbers."""
    largest = Fraction(2**128 - 2**104)
    bounds: Bounds = {}
    start = 0
    for variable in inputs:
        stop = start + 2 * math.prod(variable.shape)
        if variable.dtype.lower() in ("float32", "real"):
            ends = (-largest, False), (largest, False)
            bounds.update((key, ends[key & 1]) for key in range(start, stop))
        start = stop
    return bounds


def tighten(bounds: Bounds, atoms: Iterable[Atom], outer: Bounds) -> list[Row]:
    """Put the atoms that are bounds, where tighter than those in `outer`, into `bounds`; return the rows."""
    rows: list[Row] = []
    for atom in atoms:
        if isinstance(atom, Row):
            rows.append(atom)
            continue
        key, value, strict = atom
        old = bounds.get(key) or outer.get(key)
        if old is None or (strict and not old[1] if value == old[0] else (value < old[0]) == bool(key & 1)):
            bounds[key] = (value, strict)
    return rows


def contradictory(index: int, bounds: Bounds, outer: Bounds) -> bool:
    """Whether no value of X_index lies within `bounds`, completed by `outer`."""
    lower = bounds.get(2 * index) or outer.get(2 * index)
    upper = bounds.get(2 * index + 1) or outer.get(2 * index + 1)
    if lower is None or upper is None:
        return False
    return lower[0] > upper[0] or (lower[0] == upper[0] and (lower[1] or upper[1]))


def box(count: int, bounds: Bounds) -> Box:
    """The box of `count` inputs; every one must have both bounds."""
    lower, upper = (tuple([bounds[2 * index + side][0] for index in range(count)]) for side in (0, 1))
    strict = [frozenset(key >> 1 for key, bound in bounds.items() if bound[1] and key & 1 == side) for side in (0, 1)]
    return Box(lower, upper, strict[0], strict[1])


# --- words -----------------------------------------------------------------------------------------------------------


def number(word: str) -> Fraction:
    """The exact value of a decimal."""
    match = _NUMBER.fullmatch(word)
    if match is None:
        raise Fault(f"bad number {quote(word)}")
    sign, whole, part, exponent = match.group(1), match.group(2), match.group(3) or "", match.group(4) or "0"
    if len(word) > MAX_DIGITS or abs(int(exponent)) > MAX_EXPONENT:
        raise Fault(f"bad number {quote(word)}: too large, too small or too long")
    value, scale = int(sign + whole + part), int(exponent) - len(part)
    return Fraction(value * 10**scale) if scale >= 0 else Fraction(value, 10**-scale)


def quote(word: str) -> str:
    """A word of the file in quotes, shortened for a message."""
    return repr(word if len(word) <= 60 else word[:57] + "...")


def decimal(value: Fraction) -> str:
    """A short decimal where it is exact, else the fraction; huge ones in words, which str() would refuse."""
    if value.numerator.bit_length() + value.denominator.bit_length() > 1000:
        return f"about {'-' if value < 0 else ''}2^{value.numerator.bit_length() - value.denominator.bit_length()}"
    text = str(value) if value.denominator == 1 else repr(float(value))
    return text if Fraction(text) == value else str(value)
