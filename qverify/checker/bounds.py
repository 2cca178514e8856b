"""Upper bounds of weighted sums of values, from the back (see "Bounds" in specs/certificate.md).

A nonlinear node y = f(z) is cut loose from its argument: for weights w of y and any multipliers m
of z, w y is at most m z plus the largest w y - m z over the node's hull. Each of the four rules
says what its argument is, what bounds of the argument tell, and what the hull is in N boxes. Sound
for all multipliers: a certificate's are only better than others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.checker.ops import (
    CPU,
    Floats,
    Interval,
    Ints,
    added,
    fits,
    gathered,
    linear,
    maximum,
    nonlinear,
    reach,
    rows_of,
    spots,
)
from qverify.errors import Rejected
from qverify.network import Network
from qverify.ops import AbstractOp, Dense, Max, Mean, Pairwise, Requantize, Softmax, Table, Type

STEPS = 2**13  # values of a function that is taken as steps
SLOPE = 2**16
ENTRIES = 2**10  # of a table that is scanned
ARGUMENTS = 16  # of a maximum that is taken apart


class Hull:
    """What a node can do in N boxes. Weights w are [N, R, size], multipliers m [N, R, size of the
    argument]; N may be 1."""

    def most(self, w: Ints, m: Ints) -> Ints:
        """The largest w y - m z, summed over the elements: [N, R]."""
        raise NotImplementedError

    def slopes(self, w: Ints) -> Ints:
        """The multipliers where a certificate has none."""
        raise NotImplementedError


class Rule:
    """How a node is taken; `size` is that of its argument, which is its only input unless a rule
    says otherwise."""

    size: int

    def hull(self, boxes: list[Interval], result: Interval) -> Hull:
        """The hull where the inputs lie in `boxes` and the result in `result`."""
        raise NotImplementedError

    def back(self, m: Ints) -> list[Ints]:
        """Multipliers of the argument as weights of each input."""
        return [m]

    def known(self, z: Interval) -> tuple[int | None, Interval]:
        """What bounds of the argument tell: the number of an input (None: the result), and its
        bounds."""
        return 0, z


def make_rule(name: str, slopes: Any, op: AbstractOp, types: tuple[Type, ...], y: Type) -> Rule:
    """The rule of that name, rejected where the node's op does not allow it."""
    make = RULES.get((name, type(op)))
    if make is None:
        raise Rejected(f"the rule '{name[:20]}' is not for a {type(op).__name__}")
    return make(op, types, y, slopes)


# -- staircases ------------------------------------------------------------------------------------


def thresholds(run: Callable[[Any], Any], rows: int, x: Type, low: int, high: int) -> Ints:
    """[rows, high - low + 2]: entry k - low is the least x for which a non-decreasing function is
    at least k, one more than the largest x if there is none. `run` maps x [n, rows] to codes,
    column by column."""
    if high - low >= STEPS:
        raise Rejected(f"a function with {high - low + 1} values is taken as steps")
    least, most = (run(np.full((1, rows), end)) for end in (x.low, x.high))
    if (least > most).any():
        raise Rejected("a function that falls is taken as a staircase")
    wanted = np.arange(low, high + 2)[:, None]
    begin, end = np.full((len(wanted), rows), x.low), np.full((len(wanted), rows), x.high + 1)
    while (begin < end).any():
        middle = (begin + end) // 2  # below x.high + 1 wherever the two still differ
        reached = run(np.minimum(middle, x.high)) >= wanted
        begin, end = (
            np.where(reached | (begin == end), begin, middle + 1),
            np.where(reached, middle, end),
        )
    return np.ascontiguousarray(begin.T)


def slack_of(row: Ints, low: int, high: int) -> int:
    """How far the thresholds inside the argument's range can lie from a chord between two of
    them."""
    inside = row[(row > low) & (row <= high)]
    n = len(inside) - 1
    if n < 2:
        return 0
    away = n * inside - (inside[-1] - inside[0]) * np.arange(n + 1)
    return -(-int(away.max() - away.min()) // n)


class Steps:
    """Non-decreasing functions by their thresholds `begin` [rows, codes + 1]; `row` [size] is that
    of each element, and the arguments lie in `reached`."""

    def __init__(self, begin: Ints, row: Ints, low: int, reached: tuple[int, int]) -> None:
        self.begin, self.row, self.low = begin, row, low
        self.slack = np.array([slack_of(row_begin, *reached) for row_begin in begin], np.int64)[row]

    def at(self, code: Ints) -> Ints:
        """The least argument from which the result is at least `code` [N, size]."""
        found: Ints = self.begin[self.row, code - self.low]
        return found

    def graph(self, a: Ints, b: Ints, first: Ints, last: Ints) -> Graph:
        """The part over [a, b], where the codes are `first` to `last`."""
        steps = last > first
        entry, top = (
            self.at(np.where(steps, first + 1, self.low)),
            self.at(np.where(steps, last, self.low)),
        )
        second, before = np.where(steps, first + 1, first), np.where(steps, last - 1, first)
        left = (a, first), (np.where(steps, entry, a), second), (np.where(steps, top, a), last)
        right = (
            (b, last),
            (np.where(steps, entry - 1, b), first),
            (np.where(steps, top - 1, b), before),
        )
        slack = np.where(last > first + 1, self.slack, 0)
        rise = (last - first).astype(np.float64)
        below = np.where(
            (entry - a > b - entry) & (first == self.low), 0.0, rise / np.maximum(b - entry + 1, 1)
        )
        return Graph(
            left, right, slack[:, None], (rise / np.maximum(top - a, 1))[:, None], below[:, None]
        )


@dataclass(frozen=True)
class Graph:
    """A part of a staircase: where w y - m z is largest if it is so at the left end of a step (that
    is for m >= 0), and at the right end of one (m < 0): pairs (z, y), each [N, size].

    Along the ends of the steps between the first and the last one, w y - m z differs from a linear
    function by at most |m| `slack`, so it is nowhere more than that above those two.
    """

    left: tuple[Interval, ...]
    right: tuple[Interval, ...]
    slack: Ints  # [N, 1, size]
    above: Floats
    below: Floats

    def best(self, w: Ints, m: Ints) -> Ints:
        """The largest w y - m z, element by element."""
        z, y = (reach(*(pair[i] for pair in (*self.left, *self.right))) for i in (0, 1))
        fits((reach(w) * y + reach(m) * (z + reach(self.slack))) * max(w.shape[2], 1))
        rises = m >= 0
        result: Any = None
        for (z0, y0), (z1, y1) in zip(self.left, self.right, strict=True):
            value = w * np.where(rises, y0[:, None], y1[:, None])
            value = value - m * np.where(rises, z0[:, None], z1[:, None])
            result = value if result is None else np.maximum(result, value)
        result += np.abs(m) * self.slack
        return result  # type: ignore[no-any-return]


def rounded(w: Ints, slope: Floats) -> Ints:
    """w * slope, rounded half to even."""
    product = np.rint(w * slope)
    fits(int(np.abs(product).max(initial=0)))
    return product.astype(np.int64)


@dataclass(frozen=True)
class Between(Hull):
    """Results between two staircases, which may be the same."""

    upper: Graph
    lower: Graph

    def most(self, w: Ints, m: Ints) -> Ints:
        best = self.upper.best(w, m)
        if self.lower is not self.upper:
            best = np.maximum(best, self.lower.best(w, m))
        total: Ints = best.sum(axis=2)
        return total

    def slopes(self, w: Ints) -> Ints:
        return rounded(w, np.where(w > 0, self.upper.above, self.lower.below))


class Staircase(Rule):
    """y = h(x), element by element, for non-decreasing h."""

    def __init__(self, op: Requantize | Table, x: Type, y: Type) -> None:
        if isinstance(op, Table):
            if (np.diff(op.values[:, x.low - op.low : x.high - op.low + 1], axis=1) < 0).any():
                raise Rejected("a table that falls is taken as a staircase")
            numbers, row = np.arange(len(op.values)), rows_of(op, x)
            begin = thresholds(
                lambda v: op.values[numbers, v - op.low], len(numbers), x, y.low, y.high
            )
        else:  # all elements with the same parameters behave alike
            shape = np.broadcast_shapes(
                op.zero_point.shape, *(step.operand.shape for step in op.program.steps)
            )
            count = int(np.prod(shape, dtype=np.int64))
            row = spots(shape, x.shape)

            def run(v: Any) -> Any:
                return op.run(CPU, v.astype(np.int32).reshape(-1, *shape)).reshape(-1, count)

            begin = thresholds(run, count, x, y.low, y.high)
        self.steps, self.size = Steps(begin, row, y.low, (x.low, x.high)), x.size

    def hull(self, boxes: list[Interval], result: Interval) -> Hull:
        (a, b), (first, last) = boxes[0], result
        a, b = np.maximum(a, self.steps.at(first)), np.minimum(b, self.steps.at(last + 1) - 1)
        graph = self.steps.graph(a, b, first, last)
        return Between(graph, graph)


class Sum(Rule):
    """y = f(a, b) between two staircases of z = p a + q b: over all entries of the table for the
    inputs' types, `left` says where a code can first be reached, `right` from where on it always
    is."""

    def __init__(self, op: Pairwise, types: tuple[Type, ...], y: Type, slopes: Any) -> None:
        if (
            type(slopes) is not list
            or len(slopes) != 2
            or any(type(s) is not int or abs(s) > SLOPE for s in slopes)
        ):
            raise Rejected("a sum has no two slopes")
        self.slopes, self.size = slopes, y.size
        self.inputs = [(spots(x.shape, y.shape), x.size) for x in types]
        a, b = (np.arange(x.low, x.high + 1) for x in types)
        z = (slopes[0] * a[:, None] + slopes[1] * b).reshape(-1)
        codes = op.values[np.ix_(a - op.a_low, b - op.b_low)].reshape(-1).astype(np.int64)
        low, high, reached = int(codes.min()), int(codes.max()), (int(z.min()), int(z.max()))
        if high - low >= STEPS:
            raise Rejected(f"a function with {high - low + 1} values is taken as steps")
        left, right = np.full(high - low + 2, reached[1] + 1), np.full(high - low + 2, reached[0])
        np.minimum.at(left, codes - low, z)
        np.maximum.at(right, codes - low + 1, z + 1)
        left, right = np.minimum.accumulate(left[::-1])[::-1], np.maximum.accumulate(right)
        row = np.zeros(y.size, np.int64)
        self.left, self.right = (Steps(begin[None], row, low, reached) for begin in (left, right))

    def hull(self, boxes: list[Interval], result: Interval) -> Hull:
        (first, last), bounds = result, [np.zeros((1, 1), np.int64)] * 2
        for slope, (spot, _), box in zip(self.slopes, self.inputs, boxes, strict=True):
            bounds = [
                e + slope * end[:, spot]
                for e, end in zip(bounds, box if slope >= 0 else box[::-1], strict=True)
            ]
        a, b = (
            np.maximum(bounds[0], self.left.at(first)),
            np.minimum(bounds[1], self.right.at(last + 1) - 1),
        )
        b = np.maximum(a, b)  # else no entry of the table is here, and any bound holds
        upper, lower = (
            steps.graph(a, b, *(np.clip(self.code(steps, z), first, last) for z in (a, b)))
            for steps in (self.left, self.right)
        )
        return Between(upper, lower)

    def code(self, steps: Steps, z: Ints) -> Ints:
        """The largest code that begins at z or before."""
        return steps.low + np.searchsorted(steps.begin[0, 1:-1], z, side="right")

    def back(self, m: Ints) -> list[Ints]:
        fits(reach(m) * SLOPE)
        return [
            gathered(s * m, spot, n) for s, (spot, n) in zip(self.slopes, self.inputs, strict=True)
        ]

    def known(self, z: Interval) -> tuple[int | None, Interval]:
        return None, (self.code(self.right, z[0]), self.code(self.left, z[1]))


# -- tables and maxima -----------------------------------------------------------------------------


class Scan(Rule):
    """y = T[x] for any table."""

    def __init__(self, op: Table, x: Type) -> None:
        if x.count > ENTRIES:
            raise Rejected(f"a table of {x.count} entries is scanned")
        self.values, self.low = op.values.astype(np.int64), op.low
        self.rows, self.size = rows_of(op, x), x.size

    def at(self, x: Ints) -> Ints:
        """The entries for `x` [N, size]."""
        found: Ints = self.values[self.rows, x - self.low]
        return found

    def hull(self, boxes: list[Interval], result: Interval) -> Hull:
        return Entries(self, *boxes[0])


@dataclass(frozen=True)
class Entries(Hull):
    """All entries of a table from a to b [N, size]."""

    table: Scan
    a: Ints
    b: Ints

    def most(self, w: Ints, m: Ints) -> Ints:
        fits(
            (reach(w) * reach(self.table.values) + reach(m) * reach(self.a, self.b))
            * max(w.shape[2], 1)
        )
        best = w * self.table.at(self.a)[:, None] - m * self.a[:, None]
        for step in range(1, reach(self.b - self.a) + 1):
            x = np.minimum(self.a + step, self.b)
            best = np.maximum(best, w * self.table.at(x)[:, None] - m * x[:, None])
        total: Ints = best.sum(axis=2)
        return total

    def slopes(self, w: Ints) -> Ints:
        rise = (self.table.at(self.b) - self.table.at(self.a)).astype(np.float64)
        return rounded(w, (rise / np.maximum(self.b - self.a, 1))[:, None])


class Largest(Rule):
    """y = max z over the last axis."""

    def __init__(self, x: Type) -> None:
        self.size, self.each = x.size, x.shape[-1]
        if self.each > ARGUMENTS:
            raise Rejected(f"a maximum of {self.each} values is taken apart")

    def hull(self, boxes: list[Interval], result: Interval) -> Hull:
        low, high = (end.reshape(len(end), 1, -1, self.each) for end in boxes[0])
        return Highest(low, high, result[0][:, None], result[1][:, None])

    def known(self, z: Interval) -> tuple[int | None, Interval]:
        raise Rejected("intermediate bounds are not for the arguments of a maximum")


@dataclass(frozen=True)
class Highest(Hull):
    """Arguments between `low` and `high` [N, 1, size, K], whose maximum t lies between `first` and
    `last` [N, 1, size].

    Some z_j is t, every other z_i at most t. For each j, the largest w t - m z is concave and
    piecewise linear in t: it is taken at the least t, or at an upper end (of z_j or of another, up
    to `last`).
    """

    low: Ints
    high: Ints
    first: Ints
    last: Ints

    def most(self, w: Ints, m: Ints) -> Ints:
        each = self.low.shape[3]
        m = m.reshape(*m.shape[:2], -1, each)
        fits(
            (reach(w) + (each + 2) * reach(m))
            * reach(self.low, self.high, self.first, self.last)
            * max(w.shape[2], 1)
        )
        high, none = np.minimum(self.high, self.last[..., None]), np.int64(-(2**63))
        best = np.full((len(self.first), *w.shape[1:]), none)
        for t in (self.first, *(np.clip(high[..., i], self.first, self.last) for i in range(each))):
            others = -m * np.where(m < 0, np.minimum(t[..., None], high), self.low)
            total = w * t + others.sum(axis=3)
            for j in range(each):
                value = total - others[..., j] - m[..., j] * t
                best = np.maximum(
                    best, np.where((self.low[..., j] <= t) & (t <= high[..., j]), value, none)
                )
        if (best == none).any():
            raise Rejected("a maximum lies where none of its arguments can")
        result: Ints = best.sum(axis=2)
        return result

    def slopes(self, w: Ints) -> Ints:
        sums = self.low + self.high
        m = np.where(sums.argmax(axis=3)[..., None] == np.arange(sums.shape[3]), w[..., None], 0)
        return m.reshape(*m.shape[:2], -1)


# -- which rule ------------------------------------------------------------------------------------

# Its name in a certificate, and the class of op -> (op, types of the inputs, type of the result,
# slopes) -> the rule
RULES: dict[tuple[str, type[AbstractOp]], Callable[[Any, tuple[Type, ...], Type, Any], Rule]] = {
    ("staircase", Requantize): lambda op, types, y, slopes: Staircase(op, types[0], y),
    ("staircase", Table): lambda op, types, y, slopes: Staircase(op, types[0], y),
    ("scan", Table): lambda op, types, y, slopes: Scan(op, types[0]),
    ("sum", Pairwise): lambda op, types, y, slopes: Sum(op, types, y, slopes),
    ("max", Max): lambda op, types, y, slopes: Largest(types[0]),
}
# Ops that are neither linear nor taken by a rule: their results stand for their intervals.
INTERVALS_ONLY: dict[type[AbstractOp], str] = {
    Mean: "its result is a float32's ordinal, of too many values for steps",
    Softmax: "a function of all its inputs, for which there is no hull",
}


# -- the network -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """N boxes: the interval of every value, and the hulls that were asked for."""

    intervals: list[Interval]
    hulls: dict[int, Hull] = field(default_factory=dict)

    def take(self, rows: Any) -> Part:
        """Some of the boxes."""
        return Part([(low[rows], high[rows]) for low, high in self.intervals])


class Net:
    """A network, and how a certificate takes its nodes: `named` maps a node to its rule's name and
    slopes."""

    def __init__(self, network: Network, named: Mapping[int, tuple[str, Any]]) -> None:
        network.validate()
        self.types = [network.type_of(v) for v in range(len(network.nodes) + 1)]
        self.inputs = [(), *(node.inputs for node in network.nodes)]
        self.interval: dict[int, Callable[[list[Interval]], Interval]] = {}
        self.back: dict[int, Callable[[Ints], tuple[list[Ints], Ints]]] = {}
        self.rules: dict[int, Rule] = {}
        for k, node in enumerate(network.nodes, 1):
            types = tuple(self.types[i] for i in node.inputs)
            op = linear(node.op, types, node.type)
            self.interval[k] = op.interval if op else nonlinear(node.op, types)
            if op and not (isinstance(node.op, Dense) and node.op.weight.ndim > 2):
                self.back[k] = op.back
            if k in named:
                self.rules[k] = make_rule(*named[k], node.op, types, node.type)

    def part(
        self, n: int, cuts: Mapping[int, Interval], known: list[Interval | None]
    ) -> tuple[Part, npt.NDArray[np.bool_]]:
        """`n` boxes inside a box with the intervals `known` (None: to be found out), cut to the
        bounds `cuts` [n, size] of some values; and which of them may hold a point."""
        possible = np.ones(n, np.bool_)
        intervals: list[Interval] = []
        changed: set[int] = set()
        for k, before in enumerate(known):
            limits = [cuts[k]] if k in cuts else []
            if before is None or not changed.isdisjoint(self.inputs[k]):
                box = self.interval[k]([intervals[i] for i in self.inputs[k]])
                limits += [] if before is None else [before]
                changed.add(k)
            else:
                shape = n, before[0].shape[1]
                box = np.broadcast_to(before[0], shape), np.broadcast_to(before[1], shape)
            for limit in limits:
                changed.add(k)
                low, high = np.maximum(box[0], limit[0]), np.minimum(box[1], limit[1])
                none = low > high
                possible &= ~none.any(axis=1)
                # Where no point is left, any bounds will do.
                box = np.where(none, box[0], low), np.where(none, box[1], high)
            intervals.append(box)
        return Part(intervals), possible

    def upper(
        self, part: Part, weights: Mapping[int, Ints], given: Mapping[int, Ints] | None
    ) -> Ints:
        """Upper bounds [N, R] of the sum of weights[v] [N, R, size] . value v, with the multipliers
        `given` for some nodes [N, R, size of the argument]; None: the nonlinear nodes met first
        stand for their intervals."""
        held = dict(weights)
        total: Any = np.zeros((1, 1), np.int64)
        for k in range(max(held, default=0), -1, -1):
            w = held.pop(k, None)
            if w is None:
                continue
            parts: list[Ints] = []
            if k in self.rules and given is not None:
                if k not in part.hulls:
                    part.hulls[k] = self.rules[k].hull(
                        [part.intervals[i] for i in self.inputs[k]], part.intervals[k]
                    )
                m = given[k] if k in given else part.hulls[k].slopes(w)
                constant, parts = part.hulls[k].most(w, m), self.rules[k].back(m)
            elif k in self.back:
                parts, constant = self.back[k](w)
            else:
                constant = maximum(w, part.intervals[k])
            total = added(total, constant)
            for i, back in zip(self.inputs[k], parts, strict=False):
                held[i] = added(held[i], back) if i in held else back
        return total  # type: ignore[no-any-return]
