"""A property as exact rationals: which inputs are allowed, and which (input, output) pairs are unsafe.

The sign convention is stated here, once. A `Row` is one linear inequality

    sum x[i] * X_i + sum y[j] * Y_j  <=  rhs        (or < when strict)

and a property describes the *unsafe* set: the verdict is `sat` iff some input inside a query's box, together with the
network's output for it, satisfies every row of at least one of that query's cases; otherwise it is `unsat`.

X_i and Y_j count the elements of all graph inputs and all graph outputs, each row-major, one after another in the
graph's order. Nothing here is a float: a decimal in the file is the rational it spells.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Row:
    """One linear inequality over inputs and outputs; terms are (index, non-zero coefficient), sorted by index."""

    x: tuple[tuple[int, Fraction], ...]
    y: tuple[tuple[int, Fraction], ...]
    rhs: Fraction
    strict: bool = False


Case = tuple[Row, ...]  # a conjunction; the empty case is always true


@dataclass(frozen=True, slots=True)
class Box:
    """Bounds of every input element. `*_strict` holds the indices whose bound is excluded (almost always empty)."""

    lower: tuple[Fraction, ...]  # [inputs]
    upper: tuple[Fraction, ...]  # [inputs]
    lower_strict: frozenset[int] = frozenset()
    upper_strict: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Query:
    """One input box and the disjunction of cases that are unsafe inside it."""

    box: Box
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A declared input or output tensor. VNN-LIB 1.0 declares flat reals: one variable named X (or Y), shape [n]."""

    name: str
    dtype: str  # VNN-LIB's word: "real", "float32", "uint8", ...
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Property:
    """All queries of a specification file; unsafe if any query is."""

    version: str  # "1.0", "2.0", ...
    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    queries: tuple[Query, ...]
    doubts: tuple[str, ...] = ()  # what is odd in the file, and hardly meant: for warnings
