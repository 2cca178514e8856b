"""A property as exact rationals: which inputs are allowed, and which (input, output) pairs are
unsafe.

The sign convention is stated here, once. A `Row` is one linear inequality

    sum x[i] * X_i + sum y[j] * Y_j  <=  rhs        (or < when strict)

and a property describes the *unsafe* set: the verdict is `sat` iff some input inside a query's box,
together with the network's output for it, satisfies every row of at least one of that query's
cases; otherwise it is `unsat`.

X_i and Y_j count the elements of all graph inputs and all graph outputs, each row-major, one after
another in the graph's order. Nothing here is a float: a decimal in the file is the rational it
spells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a row's two sides are computed, as far as it decides what rounding can do to them
    (`boundary/readings.py`).

    A side is a sum of leaves: constants, and variables times constants. In a float evaluation each
    leaf arrives with at most `depth` roundings of its own or of sums that it is part of.
    """

    depth: int
    # the sum of the constants' magnitudes (2**-126 at least, where rounding can underflow)
    constants: Fraction
    # Of variables (X_i: i, Y_j: ~j), magnitude of leaves beyond |coefficient|.
    excess: tuple[tuple[int, Fraction], ...]
    # no value on the way is larger than so many times the sum of the leaves' magnitudes
    shrink: Fraction
    # every variable occurs once, times at most one constant, and there is at most one other
    # constant
    plain: bool
    alone: bool  # one side is a constant as it stands, and the other has none

    @property
    def once(self) -> bool:
        """Whether one side is the sum or difference of two variables, the other a constant as it
        stands."""
        return self.alone and self.depth == 1


@dataclass(frozen=True, slots=True)
class Row:
    """One linear inequality over inputs and outputs; terms are (index, non-zero coefficient),
    sorted by index."""

    x: tuple[tuple[int, Fraction], ...]
    y: tuple[tuple[int, Fraction], ...]
    rhs: Fraction
    strict: bool = False
    # None: it compares what stands there as it is.
    arithmetic: Arithmetic | None = field(default=None, compare=False)

    @property
    def bounds_input(self) -> bool:
        """Whether it is about one input alone: the box has a bound that is no tighter, and
        `readings.py` does the rest."""
        return len(self.x) == 1 and not self.y


Case = tuple[Row, ...]  # a conjunction; the empty case is always true


@dataclass(frozen=True, slots=True)
class Box:
    """Bounds of every input element. `*_strict` holds the indices whose bound is excluded (almost
    always empty)."""

    lower: tuple[Fraction, ...]  # [inputs]
    upper: tuple[Fraction, ...]  # [inputs]
    lower_strict: frozenset[int] = frozenset()
    upper_strict: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Query:
    """One input box and the disjunction of cases that are unsafe inside it."""

    box: Box
    cases: tuple[Case, ...]
    # whether a checker may compute its rows in float32 (VNN-LIB 2.x), not only in float64
    float32: bool = False


@dataclass(frozen=True, slots=True)
class Variable:
    """A declared input or output tensor. VNN-LIB 1.0 declares flat reals: one variable named X (or
    Y), shape [n]."""

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

    @property
    def mixed(self) -> bool:
        """Whether some row mentions an input and is no bound of it."""
        return any(
            row.x and not row.bounds_input
            for query in self.queries
            for case in query.cases
            for row in case
        )
