"""Bounds of intermediate values over one box, tighter than intervals.

An element of a value, and its negative, are linear functions of the values: the dual bounds both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qverify.bounds.dual import Dual, Multipliers, Relaxations
from qverify.bounds.improve import Objective, Point, improve, rounded
from qverify.deadline import Deadline
from qverify.kernels import Array, Kernels
from qverify.ops import Interval
from qverify.ops.relax import GUIDE, NonlinearRelaxation, TooLarge

PRECISION = 16  # multipliers of a single value are multiples of 2**-16
PRECISIONS = (PRECISION, PRECISION - 4, PRECISION - 8)  # of optimized ones: the first that fits
ROUNDS, RATE = 120, 0.2
CHUNK = 128  # elements improved at a time
BUDGET = 4e9  # elements touched while a node's bounds are improved
LOWEST, HIGHEST = -(1 << 31), (1 << 31) - 1  # of any value: int32


@dataclass(frozen=True, eq=False)
class BoundStep:
    """Bounds of some elements of a node's argument, and how they were found: with CROWN's slopes,
    or with the given multipliers, in units of 2**-precision."""

    node: int
    elements: Array
    precision: int = 0
    # By node: int64 [2 elements, size], one row for each upper bound, then one for each lower.
    multipliers: Multipliers | None = None


@dataclass(frozen=True, eq=False)
class IntermediateBounds:
    """Bounds of values that hold in a whole box."""

    clamps: dict[int, Interval]  # by value: [1, *shape] each
    steps: list[BoundStep]  # how they were found, in order


def crown_bounds(
    dual: Dual, lower: Array, upper: Array, last: int, deadline: Deadline, budget: float = 4e8
) -> IntermediateBounds:
    """Bounds of values up to `last` in the box from `lower` to `upper` ([1, codes] each).

    Node by node, the dual with CROWN's slopes bounds the arguments of nonlinear nodes: those that
    lie behind another nonlinear node and can reach a clip (elsewhere a tighter bound gains little).
    A node whose bounds would touch more than `budget` elements is left out, and so is what the
    deadline leaves no time for.
    """
    known = IntermediateBounds({}, [])
    for k, before in _nodes_to_bound(dual, last):
        boxes, _ = dual.network.boxes(dual.kernels, lower, upper, known.clamps)
        elements = _at_a_clip(dual, boxes, k)
        if 2 * len(elements) * before > budget or deadline.passed():
            continue
        z, done = _by_crown(dual, boxes, k, elements, deadline)
        _narrow(dual, boxes, k, z, known, BoundStep(k, done))
    return known


def optimized_bounds(
    dual: Dual, lower: Array, upper: Array, last: int, known: IntermediateBounds, deadline: Deadline
) -> IntermediateBounds:
    """`known` with better bounds where they are cheap, from multipliers that are improved for each
    element by itself."""
    known = IntermediateBounds(dict(known.clamps), list(known.steps))
    for k, before in _nodes_to_bound(dual, last):
        boxes, _ = dual.network.boxes(dual.kernels, lower, upper, known.clamps)
        elements = _at_a_clip(dual, boxes, k)
        if 2 * len(elements) * before * ROUNDS > BUDGET or not len(elements):
            continue
        for start in range(0, len(elements), CHUNK):
            if deadline.passed():
                return known
            chunk = elements[start : start + CHUNK]
            z, multipliers, precision = _by_optimizing(dual, boxes, k, chunk, deadline)
            if multipliers:
                _narrow(dual, boxes, k, z, known, BoundStep(k, chunk, precision, multipliers))
    return known


def _nodes_to_bound(dual: Dual, last: int) -> Iterator[tuple[int, int]]:
    """The nodes whose arguments are worth bounds: (node, elements of all values up to there)."""
    network = dual.network
    before = network.input_type.size
    for k, (node, rule) in enumerate(zip(network.nodes[:last], dual.rules, strict=False), 1):
        before += node.type.size
        if not isinstance(rule, NonlinearRelaxation) or rule.cuts == "none" or rule.whole:
            continue
        if _behind_a_hull(dual, k):  # else intervals are exact: it is linear in the input box
            yield k, before


def _at_a_clip(dual: Dual, boxes: list[Interval], k: int) -> Array:
    """The elements of node k that are not fixed and reach an end of their type's range."""
    (lower, upper), type_ = boxes[k], dual.network.nodes[k - 1].type
    clipped = (lower == type_.low) | (upper == type_.high)
    return np.flatnonzero(dual.kernels.to_host((lower < upper) & clipped))


def _narrow(
    dual: Dual,
    boxes: list[Interval],
    k: int,
    z: Interval,
    known: IntermediateBounds,
    step: BoundStep,
) -> None:
    """Let bounds of node k's argument into the clamps, and the step into the steps."""
    xp, node, rule = dual.kernels.xp, dual.network.nodes[k - 1], dual.rules[k - 1]
    assert isinstance(rule, NonlinearRelaxation)
    which, found = rule.narrowed(dual.kernels, z, tuple(boxes[i] for i in node.inputs), boxes[k])
    value = k if which < 0 else node.inputs[which]
    lower, upper = known.clamps.get(value, boxes[value])
    lower, upper = xp.maximum(lower, boxes[value][0]), xp.minimum(upper, boxes[value][1])
    low, high = xp.maximum(found[0], lower), xp.minimum(found[1], upper)
    sane = low <= high  # an interval can only become empty if the caller's box is
    low, high = xp.where(sane, low, lower), xp.where(sane, high, upper)
    known.clamps[value] = (low.astype(xp.int32), high.astype(xp.int32))
    known.steps.append(step)


def _behind_a_hull(dual: Dual, k: int) -> bool:
    """Whether a nonlinear node stands between the input and node k."""
    reached = set(dual.network.nodes[k - 1].inputs)
    for i in range(k - 1, 0, -1):
        if i in reached:
            if isinstance(dual.rules[i - 1], NonlinearRelaxation):
                return True
            reached.update(dual.network.nodes[i - 1].inputs)
    return False


def _by_crown(
    dual: Dual, boxes: list[Interval], k: int, chosen: Array, deadline: Deadline
) -> tuple[Interval, Array]:
    """Bounds of node k's argument, int64 [1, *shape], narrow for some of its elements `chosen`
    (flat, on the host); and those elements."""
    bounds = _ArgumentBounds.make(dual, k)
    inputs = tuple(boxes[i] for i in dual.network.nodes[k - 1].inputs)
    relaxations = dual.relaxations(boxes, k - 1)
    done = [chosen[:0]]
    # Of one array of functions, a CPU takes what its caches hold.
    widest = max(n.type.size for n in dual.network.nodes[:k])
    rows = int(np.clip(dual.kernels.chunk_bytes // (16 * widest), 4, 256))
    for start in range(0, len(chosen), rows):
        if deadline.passed():
            break
        chunk = chosen[start : start + rows]
        try:
            objective = _units(dual, k, chunk, 1 << PRECISION, inputs)
            upper = dual.upper(relaxations, objective)[0] >> PRECISION
        except TooLarge:
            continue
        done.append(chunk)
        bounds.narrow(chunk, upper)
    return bounds.interval(), np.concatenate(done)


@dataclass(frozen=True, eq=False)
class _ArgumentBounds:
    """Bounds of a node's argument: those of int32 where nothing better is known."""

    kernels: Kernels
    shape: tuple[int, ...]
    lower: Array  # int64, flat
    upper: Array

    @staticmethod
    def make(dual: Dual, k: int) -> _ArgumentBounds:
        xp, type_ = dual.kernels.xp, dual.network.nodes[k - 1].type
        lower = xp.full(type_.size, LOWEST, dtype=xp.int64)
        upper = xp.full(type_.size, HIGHEST, dtype=xp.int64)
        return _ArgumentBounds(dual.kernels, type_.shape, lower, upper)

    def narrow(self, elements: Array, upper: Array) -> None:
        """Let in upper bounds [2 elements] of the elements, then of their negatives."""
        xp, at, count = self.kernels.xp, self.kernels.asarray(elements), len(elements)
        self.upper[at] = xp.minimum(upper[:count], self.upper[at])
        self.lower[at] = xp.maximum(-upper[count:], self.lower[at])

    def interval(self) -> Interval:
        """The bounds, [1, *shape] each."""
        return self.lower.reshape(1, *self.shape), self.upper.reshape(1, *self.shape)


def _units(
    dual: Dual, k: int, elements: Array, unit: int, inputs: tuple[Interval, ...]
) -> dict[int, Array]:
    """Weights of `unit` times some elements of node k's argument, then of -unit times them: by
    input value, int64 [1, 2 elements, *shape]."""
    node, rule, count = dual.network.nodes[k - 1], dual.rules[k - 1], len(elements)
    assert isinstance(rule, NonlinearRelaxation)
    weights = np.zeros((1, 2 * count, node.type.size), np.int64)
    weights[0, np.arange(count), elements] = unit
    weights[0, count + np.arange(count), elements] = -unit
    parts = rule.spread(
        dual.kernels, dual.kernels.asarray(weights.reshape(1, -1, *node.type.shape)), inputs
    )
    objective: dict[int, Array] = {}
    for i, part in zip(node.inputs, parts, strict=True):
        if part is not None:
            objective[i] = objective[i] + part if i in objective else part
    return objective


def _by_optimizing(
    dual: Dual, boxes: list[Interval], k: int, elements: Array, deadline: Deadline
) -> tuple[Interval, Multipliers, int]:
    """Bounds of node k's argument, int64 [1, *shape], narrow for `elements`; the multipliers that
    prove them, and their precision. No multipliers where exact arithmetic would leave its types."""
    bounds = _ArgumentBounds.make(dual, k)
    relaxations = dual.relaxations(boxes, k - 1)
    objective = _single_functions(dual, boxes, k, elements)
    point = _optimized(dual, relaxations, objective, deadline)
    for precision in PRECISIONS:
        mu, multipliers = rounded(dual, point, precision)
        try:
            upper = dual.upper(relaxations, objective.weights(mu), multipliers)[:, 0] >> precision
        except TooLarge:
            continue
        bounds.narrow(elements, upper)
        return bounds.interval(), multipliers, precision
    return bounds.interval(), {}, 0


def _single_functions(dual: Dual, boxes: list[Interval], k: int, elements: Array) -> Objective:
    """Some elements of node k's argument, and their negatives: each a subproblem, over one box."""
    xp = dual.kernels.xp
    units = _units(dual, k, elements, 1, tuple(boxes[i] for i in dual.network.nodes[k - 1].inputs))
    terms = {value: xp.moveaxis(weights, 1, 0) for value, weights in units.items()}
    return Objective(terms, xp.zeros((2 * len(elements), 1), dtype=xp.int64))


def _optimized(
    dual: Dual, relaxations: Relaxations, objective: Objective, deadline: Deadline
) -> Point:
    """The point after all steps from CROWN's slopes: no bound is so good that they end early."""
    boxes, guide = relaxations.boxes, objective.as_guide()
    mu = dual.kernels.xp.ones(objective.constants.shape, dtype=GUIDE)
    start = Point(mu, dual.crown_multipliers(boxes, guide.weights(mu)), mu[:, 0])
    relaxed, fixed = relaxations.as_guide(dual.kernels), Dual.fixed(boxes[: max(guide.terms) + 1])
    return improve(dual, relaxed, guide, start, ROUNDS, RATE, deadline, -np.inf, fixed)
