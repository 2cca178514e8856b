"""An integer network as a solver-neutral description: integer variables, sums, step functions,
tables, maxima.

No float is left in it: every requantization and every table becomes the exact list of its steps
over the integers that can reach it, found by running the op itself. Bounds of variables are
computed here, in Python integers, and not by `qverify`'s interval rules, so that the peers are a
third opinion on those too. Definitions come in an order in which each reads only earlier variables.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peers.lines import additive, common_slope
from qverify.kernels import open_kernels
from qverify.network import Network
from qverify.ops import Conv, Dense, Layout, Max, Mean, Pairwise, Requantize, Softmax, Table
from qverify.ops.columns import Column

CPU = open_kernels("cpu")
EXHAUSTIVE = 1 << 22  # so many evaluations of an op may be spent on listing all its values
Ids = npt.NDArray[np.int64]  # variable numbers, in the shape of a network value
Run = Callable[[npt.NDArray[np.int32]], npt.NDArray[np.int32]]


class Unsupported(Exception):
    """The encoding has no form for this; the text names the op or the kind of condition."""


@dataclass(frozen=True, slots=True)
class Linear:
    """y = bias + sum coefficient * variable; at least one term, each variable once, no coefficient
    is zero."""

    y: int
    terms: tuple[tuple[int, int], ...]  # (coefficient, variable)
    bias: int


@dataclass(frozen=True, slots=True)
class Steps:
    """y = values[k] for the last k with starts[k] <= x; starts[0] is the lower bound of x;
    neighbours differ."""

    y: int
    x: int
    starts: tuple[int, ...]
    values: tuple[int, ...]

    def at(self, x: int) -> int:
        """The value at x."""
        return self.values[bisect_right(self.starts, x) - 1]

    def line(self) -> tuple[int, int, int] | None:
        """(p, q, r), r and p positive, with: the piece number of x is floor((r x - q) / p), clipped
        to the pieces.

        None where the values are no arithmetic progression or the steps are too uneven. Exact: step
        k >= 1 begins at t_k iff r (t_k - 1) < p k + q <= r t_k, and the q that satisfy this for all
        k are computed in integers.
        """
        rises = {b - a for a, b in zip(self.values, self.values[1:], strict=False)}
        if len(rises) != 1:
            return None
        t = np.array(self.starts[1:], np.int64)
        slope = common_slope(t)
        if slope is None:
            return None
        p, r = slope.numerator, slope.denominator
        ends = [(r * int(s) - r + 1 - p * k, r * int(s) - p * k) for k, s in enumerate(t, 1)]
        low, high = max(a for a, _ in ends), min(b for _, b in ends)
        return (p, high, r) if low <= high else None


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """y = table[a - lower(a), b - lower(b)]; the table covers the bounds of a and b."""

    y: int
    a: int
    b: int
    table: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Maximum:
    """y = max of the variables xs, of which there are at least two."""

    y: int
    xs: tuple[int, ...]


Definition = Linear | Steps | Pair | Maximum


@dataclass(frozen=True, slots=True)
class Inequality:
    """sum coefficient * variable <= rhs, in integers; no terms means 0 <= rhs."""

    terms: tuple[tuple[int, int], ...]
    rhs: int

    def holds(self, values: Sequence[int]) -> bool:
        """Whether it holds for these values of all variables."""
        return sum(c * values[v] for c, v in self.terms) <= self.rhs


Clause = tuple[Inequality, ...]  # one of them holds; the empty clause never does


@dataclass
class Formula:
    """Is there an assignment within bounds that meets all definitions, all `clauses`, and all
    clauses of one case?

    `lower` and `upper` bound each variable (int, by number); `inputs` are the variables of the code
    vector; `kept` are variables that later clauses may mention.
    """

    lower: list[int] = field(default_factory=list)
    upper: list[int] = field(default_factory=list)
    definitions: list[Definition] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    clauses: list[Clause] = field(default_factory=list)
    cases: list[list[Clause]] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    _constants: dict[int, int] = field(default_factory=dict)
    _by_result: dict[int, Definition] = field(default_factory=dict)

    def variable(self, low: int, high: int) -> int:
        """A new variable with these bounds."""
        self.lower.append(int(low))
        self.upper.append(int(high))
        return len(self.lower) - 1

    def constant(self, value: int) -> int:
        """The variable that is always `value`."""
        if value not in self._constants:
            self._constants[value] = self.variable(value, value)
        return self._constants[value]

    def fixed(self, v: int) -> bool:
        """Whether the bounds leave one value."""
        return self.lower[v] == self.upper[v]

    def definition(self, v: int) -> Definition | None:
        """What defines a variable; None for inputs and constants."""
        return self._by_result.get(v)

    def _define(self, d: Definition) -> int:
        self.definitions.append(d)
        self._by_result[d.y] = d
        return d.y

    def linear(self, coefficients: Iterable[int], variables: Iterable[int], bias: int) -> int:
        """A variable for bias + sum of products (Python integers)."""
        sums: Counter[int] = Counter()
        for c, v in zip(coefficients, variables, strict=True):
            if self.lower[v] == self.upper[v]:
                bias += c * self.lower[v]
            else:
                sums[v] += c
        terms = tuple((c, v) for v, c in sorted(sums.items()) if c)
        if not terms:
            return self.constant(bias)
        if terms[0][0] == 1 and len(terms) == 1 and not bias:
            return terms[0][1]
        return self._define(
            Linear(self.variable(bias + self.least(terms), bias + self.most(terms)), terms, bias)
        )

    def steps(self, x: int, starts: Sequence[int], values: Sequence[int]) -> int:
        """A variable for a step function of x; pieces may repeat a value and may begin outside the
        bounds of x."""
        kept: list[tuple[int, int]] = []
        for k, (start, value) in enumerate(zip(starts, values, strict=True)):
            if start > self.upper[x] or (k + 1 < len(starts) and starts[k + 1] <= self.lower[x]):
                continue
            if not kept or kept[-1][1] != value:
                kept.append((max(int(start), self.lower[x]), int(value)))
        if len(kept) == 1:
            return self.constant(kept[0][1])
        begin, found = zip(*kept, strict=True)
        return self._define(Steps(self.variable(min(found), max(found)), x, begin, found))

    def pair(self, a: int, b: int, table: npt.NDArray[np.int64]) -> int:
        """A variable for table[a - lower(a), b - lower(b)]."""
        if a == b:
            return self.steps(
                a, range(self.lower[a], self.upper[a] + 1), np.diagonal(table).tolist()
            )
        if self.fixed(a) or self.fixed(b):
            x = b if self.fixed(a) else a
            return self.steps(
                x, range(self.lower[x], self.upper[x] + 1), table.reshape(-1).tolist()
            )
        low, high = int(table.min()), int(table.max())
        if low == high:
            return self.constant(low)
        return self._define(Pair(self.variable(low, high), a, b, table))

    def maximum(self, variables: Iterable[int]) -> int:
        """A variable for the maximum."""
        xs = sorted(set(variables))
        floor = max(self.lower[v] for v in xs)
        some = [v for v in xs if self.upper[v] > floor]
        at_floor = next(v for v in xs if self.lower[v] == floor)
        if not some:
            return self.constant(floor)
        if at_floor not in some:  # a constant, or one whose bounds touch the floor only
            some.append(self.constant(floor))
        if len(some) == 1:
            return some[0]
        return self._define(
            Maximum(self.variable(floor, max(self.upper[v] for v in some)), tuple(some))
        )

    def evaluate(self, codes: Sequence[int]) -> list[int]:
        """The values of all variables for a code vector."""
        values = list(self.lower)
        for v, code in zip(self.inputs, codes, strict=True):
            values[v] = int(code)
        for d in self.definitions:
            match d:
                case Linear():
                    values[d.y] = d.bias + sum(c * values[v] for c, v in d.terms)
                case Steps():
                    values[d.y] = d.at(values[d.x])
                case Pair():
                    values[d.y] = int(
                        d.table[values[d.a] - self.lower[d.a], values[d.b] - self.lower[d.b]]
                    )
                case Maximum():
                    values[d.y] = max(values[v] for v in d.xs)
        return values

    def tidy(self) -> None:
        """Drop definitions that no row reads; join a step function to the one it alone reads, and
        take the bias and a common factor of the coefficients from a sum that a step function alone
        reads."""
        uses = self._uses()
        at = {d.y: k for k, d in enumerate(self.definitions)}
        for k, d in enumerate(self.definitions):
            inner = self._by_result.get(d.x) if isinstance(d, Steps) else None
            if not isinstance(d, Steps) or inner is None or uses[d.x] != 1:
                continue
            if isinstance(inner, Steps):
                joined = [(s, d.at(v)) for s, v in zip(inner.starts, inner.values, strict=True)]
                d = _merged(d.y, inner.x, joined)
            elif isinstance(inner, Linear):
                factor = gcd(*(c for c, _ in inner.terms))
                joined = [
                    (-((inner.bias - s) // factor), v)
                    for s, v in zip(d.starts, d.values, strict=True)
                ]
                inner = Linear(inner.y, tuple((c // factor, v) for c, v in inner.terms), 0)
                self.lower[inner.y] = self.least(inner.terms)
                self.upper[inner.y] = self.most(inner.terms)
                self.definitions[at[inner.y]] = self._by_result[inner.y] = inner
                d = _merged(d.y, inner.y, joined)
            self.definitions[k] = self._by_result[d.y] = d
        used = self._uses()
        self.definitions = [d for d in self.definitions if used[d.y]]

    def least(self, terms: Sequence[tuple[int, int]]) -> int:
        """The least value of a sum of products within the variables' bounds."""
        return sum(c * (self.lower[v] if c > 0 else self.upper[v]) for c, v in terms)

    def most(self, terms: Sequence[tuple[int, int]]) -> int:
        """The largest value of a sum of products within the variables' bounds."""
        return sum(c * (self.upper[v] if c > 0 else self.lower[v]) for c, v in terms)

    def _uses(self) -> Counter[int]:
        """How often each variable is read, by what leads to a row."""
        rows = [clause for case in self.cases for clause in case] + self.clauses
        mentioned = {v for clause in rows for row in clause for _, v in row.terms} | self.kept
        uses = Counter(dict.fromkeys(mentioned, 2))  # read by a row: never to be joined away
        for d in reversed(self.definitions):
            if uses[d.y]:
                uses.update(reads(d))
        return uses


def _merged(y: int, x: int, pieces: list[tuple[int, int]]) -> Steps:
    """A step function from (start, value) pairs; of equal starts the last counts, equal neighbours
    become one piece."""
    last = [
        pair
        for pair, other in zip(pieces, [*pieces[1:], None], strict=True)
        if other is None or pair[0] != other[0]
    ]
    first = [pair for i, pair in enumerate(last) if not i or pair[1] != last[i - 1][1]]
    starts, values = zip(*first, strict=True)
    return Steps(y, x, starts, values)


def reads(d: Definition) -> tuple[int, ...]:
    """The variables that a definition reads."""
    match d:
        case Linear():
            return tuple(v for _, v in d.terms)
        case Steps():
            return (d.x,)
        case Pair():
            return (d.a, d.b)
        case Maximum():
            return d.xs


def encode_network(
    network: Network, lower: npt.NDArray[np.int32], upper: npt.NDArray[np.int32]
) -> tuple[Formula, list[int]]:
    """The network over the box of codes [lower, upper] (int32 [codes]), and the variables of its
    flat outputs.

    Raises Unsupported with the op's name where an op that must be encoded has no form here.
    """
    formula = Formula()
    formula.inputs = [
        formula.variable(a, b) for a, b in zip(lower.tolist(), upper.tolist(), strict=True)
    ]
    values: list[Ids] = [np.array(formula.inputs, np.int64)]
    for node in network.nodes:
        rule = ENCODINGS.rule(node.op)
        if rule is None:
            raise Unsupported(type(node.op).__name__)
        ids = rule(formula, node.op, [values[i] for i in node.inputs], node.type.shape)
        values.append(np.asarray(ids, np.int64).reshape(node.type.shape))
    return formula, [int(v) for i in network.outputs for v in values[i].reshape(-1)]


def _layout(formula: Formula, op: Layout, xs: list[Ids], shape: tuple[int, ...]) -> Ids:
    if op.index is None:
        return xs[0]
    constants = [] if op.constants is None else [formula.constant(int(c)) for c in op.constants]
    source = np.concatenate([*(x.reshape(-1) for x in xs), np.array(constants, np.int64)])
    moved: Ids = source[op.index]
    return moved


def _dense(formula: Formula, op: Dense, xs: list[Ids], shape: tuple[int, ...]) -> list[int]:
    (x,), (depth, width) = xs, op.weight.shape[-2:]
    rows = np.broadcast_to(x, (*shape[:-2], *x.shape[-2:])) if x.ndim > 1 else x
    weight = (
        np.broadcast_to(op.weight, (*shape[:-2], depth, width)) if op.weight.ndim > 2 else op.weight
    )
    bias = np.broadcast_to(op.bias, shape)
    result = []
    for at in np.ndindex(*shape):
        stack = at[:-2] if op.weight.ndim > 2 else ()
        column = weight[(*stack, slice(None), at[-1])]
        result.append(formula.linear(column.tolist(), rows[at[:-1]].tolist(), int(bias[at])))
    return result


def _conv(formula: Formula, op: Conv, xs: list[Ids], shape: tuple[int, ...]) -> list[int]:
    (x,), rank = xs, len(op.strides)
    pads = [(0, 0), (0, 0), *((op.pads[i], op.pads[rank + i]) for i in range(rank))]
    padded = np.pad(x, pads, constant_values=formula.constant(op.pad_value)) if any(op.pads) else x
    neurons, channels, *kernel = op.weight.shape
    filters = neurons // op.groups
    result = []
    for n, m, *at in np.ndindex(*shape):
        first = m // filters * channels
        window = tuple(
            slice(a * s, a * s + (k - 1) * d + 1, d)
            for a, s, k, d in zip(at, op.strides, kernel, op.dilations, strict=True)
        )
        ids = padded[(n, slice(first, first + channels), *window)]
        weight = op.weight[m].reshape(-1).tolist()
        result.append(formula.linear(weight, ids.reshape(-1).tolist(), int(op.bias[m])))
    return result


def _largest(formula: Formula, op: Max, xs: list[Ids], shape: tuple[int, ...]) -> list[int]:
    return [formula.maximum(row.tolist()) for row in xs[0].reshape(-1, xs[0].shape[-1])]


def _elementwise(
    formula: Formula, op: Requantize | Table, xs: list[Ids], shape: tuple[int, ...]
) -> list[int]:
    """Every element's steps, from the op run on all values that its elements may have, or by
    bisection."""
    (x,) = xs
    flat = x.reshape(-1)
    lower = np.array([formula.lower[v] for v in flat], np.int64)
    upper = np.array([formula.upper[v] for v in flat], np.int64)
    width = int((upper - lower).max(initial=0)) + 1

    def run(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        shaped = values.astype(np.int32).reshape(len(values), *x.shape)
        return np.asarray(op.run(CPU, shaped), np.int64).reshape(len(values), -1)

    if isinstance(op, Requantize) and width * flat.size > EXHAUSTIVE:
        starts, values = _by_bisection(run, lower, upper)
    else:
        every = np.minimum(lower + np.arange(width)[:, None], upper)
        starts, values = [], []
        table = run(every)
        for i in range(flat.size):
            new = np.flatnonzero(np.diff(table[:, i], prepend=table[0, i] - 1))
            starts.append(every[new, i].tolist())
            values.append(table[new, i].tolist())
    return [formula.steps(int(v), s, f) for v, s, f in zip(flat, starts, values, strict=True)]


def _by_bisection(
    run: Callable[[Any], Any], lower: Any, upper: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Per element: where a monotone op's value changes over [lower, upper], and to what.
    (`Requantize` is monotone, since each of its float32 operations is.)"""
    ends = run(np.stack([lower, upper]))
    sign = np.where(ends[1] < ends[0], -1, 1)
    first, last = ends[0] * sign, ends[1] * sign
    steps = int((last - first).max(initial=0))
    wanted = first + 1 + np.arange(steps)[:, None]
    begin, end = np.broadcast_to(lower, wanted.shape), np.broadcast_to(upper + 1, wanted.shape)
    while (begin < end).any():
        middle = (begin + end) // 2
        reached = run(np.minimum(middle, upper)) * sign >= wanted
        begin, end = (
            np.where((begin < end) & ~reached, middle + 1, begin),
            np.where(reached, middle, end),
        )
    starts, values = [], []
    for i in range(len(lower)):
        at, count = np.unique(begin[: int(last[i] - first[i]), i], return_counts=True)
        starts.append([int(lower[i]), *at.tolist()])
        values.append([int(ends[0, i]), *(sign[i] * (first[i] + np.cumsum(count))).tolist()])
    return starts, values


def _pairwise(formula: Formula, op: Pairwise, xs: list[Ids], shape: tuple[int, ...]) -> list[int]:
    """Steps of a sum where the op's whole table is that, else the part of the table that bounds
    leave."""
    result = []
    form = additive(op.values.astype(np.int64))
    for u, v in np.broadcast(*xs):
        if form is not None:
            total = formula.linear(
                (form.m, form.n), (int(u), int(v)), -form.m * op.a_low - form.n * op.b_low
            )
            result.append(formula.steps(total, form.starts, form.values))
            continue
        rows = slice(formula.lower[u] - op.a_low, formula.upper[u] - op.a_low + 1)
        columns = slice(formula.lower[v] - op.b_low, formula.upper[v] - op.b_low + 1)
        result.append(formula.pair(int(u), int(v), op.values[rows, columns].astype(np.int64)))
    return result


# (formula, op, variables of the inputs, shape of the result) -> variables of the result
Encoding = Callable[[Formula, Any, list[Ids], tuple[int, ...]], Any]

ENCODINGS: Column[Encoding] = Column(
    __name__,
    {
        Layout: _layout,
        Dense: _dense,
        Conv: _conv,
        Requantize: _elementwise,
        Table: _elementwise,
        Pairwise: _pairwise,
        Max: _largest,
    },
    # `encode_network` raises Unsupported.
    {
        Mean: "the solvers know no float32 sums in an order",
        Softmax: "the solvers know no float32 sums in an order",
    },
)
