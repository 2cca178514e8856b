"""Bounds of inner values over one box, tighter than intervals: the dual with unit vectors as
objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from qverify.bounds.dual import Dual, Multipliers
from qverify.bounds.improve import Objective, Point, improve, rounded
from qverify.deadline import Deadline
from qverify.kernels import Array
from qverify.ops import Interval
from qverify.ops.relax import GUIDE, NonlinearRelaxation, TooLarge

PRECISION = 16  # multipliers of a single value are multiples of 2**-16
ROUNDS, RATE = 120, 0.2
# One array of a chunk of functions: on a CPU what caches hold.
CHUNK = 128  # elements improved at a time
BUDGET = 4e9  # elements touched while a node's bounds are improved


@dataclass(frozen=True, eq=False)
class BoundStep:
    """Bounds of some elements of a node's argument, and how they were found: by edges, or with
    given multipliers in units of 2**-precision: int64 [2 elements, size] per node, rows for the
    upper ends, then for the lower ends."""

    node: int
    elements: Array
    precision: int = 0
    multipliers: Multipliers | None = None


@dataclass(frozen=True, eq=False)
class IntermediateBounds:
    """Bounds of values that hold in a whole box ([1, *shape] ends), and the steps that led to them,
    in order."""

    clamps: dict[int, Interval]
    steps: list[BoundStep]


def crown_bounds(
    dual: Dual, lower: Array, upper: Array, last: int, deadline: Deadline, budget: float = 4e8
) -> IntermediateBounds:
    """Bounds of values up to `last` inside one box ([1, codes] ends).

    Node by node, the arguments that can reach a clip of their nonlinear node (elsewhere a tighter
    bound gains little) are bounded by the dual with CROWN slopes as multipliers, behind the
    first nonlinear nodes. A node whose bounds would touch more than `budget` elements is left out,
    and so is what the deadline leaves no time for.
    """
    inner = IntermediateBounds({}, [])
    for k, chosen, before in _open_nodes(dual, last):
        boxes, _ = dual.network.boxes(dual.kernels, lower, upper, inner.clamps)
        elements = chosen(boxes)
        if 2 * len(elements) * before > budget or deadline.passed():
            continue
        z, done = _by_crown(dual, boxes, k, elements, deadline)
        _narrow(dual, boxes, k, z, inner, BoundStep(k, done))
    return inner


def optimized_bounds(
    dual: Dual, lower: Array, upper: Array, last: int, inner: IntermediateBounds, deadline: Deadline
) -> IntermediateBounds:
    """`inner` with better bounds where that is cheap: multipliers improved for every element by
    itself."""
    inner = IntermediateBounds(dict(inner.clamps), list(inner.steps))
    for k, chosen, before in _open_nodes(dual, last):
        boxes, _ = dual.network.boxes(dual.kernels, lower, upper, inner.clamps)
        elements = chosen(boxes)
        if 2 * len(elements) * before * ROUNDS > BUDGET or not len(elements):
            continue
        for start in range(0, len(elements), CHUNK):
            if deadline.passed():
                return inner
            own = elements[start : start + CHUNK]
            z, multipliers, precision = _by_optimizing(dual, boxes, k, own, deadline)
            if multipliers:
                _narrow(dual, boxes, k, z, inner, BoundStep(k, own, precision, multipliers))
    return inner


def _open_nodes(
    dual: Dual, last: int
) -> Iterator[tuple[int, Callable[[list[Interval]], Array], int]]:
    """The nodes whose arguments deserve bounds: (number, what picks the elements, elements of all
    values up to there)."""
    network = dual.network
    before = network.input_type.size
    for k, (node, rule) in enumerate(zip(network.nodes[:last], dual.rules, strict=False), 1):
        before += node.type.size
        if (
            not isinstance(rule, NonlinearRelaxation)
            or rule.cuts == "none"
            or rule.whole
            or not _behind_a_hull(dual, k)
        ):
            continue  # intervals are exact for a linear function of the input box

        def chosen(
            boxes: list[Interval], k: int = k, low: int = node.type.low, high: int = node.type.high
        ) -> Array:
            first, last = boxes[k]
            return np.flatnonzero(
                dual.kernels.to_host((first < last) & ((first == low) | (last == high)))
            )

        yield k, chosen, before


def _narrow(
    dual: Dual,
    boxes: list[Interval],
    k: int,
    z: Interval,
    inner: IntermediateBounds,
    step: BoundStep,
) -> None:
    """Let bounds of node k's argument into the clamps, and the step into the steps."""
    xp, node, rule = dual.kernels.xp, dual.network.nodes[k - 1], dual.rules[k - 1]
    assert isinstance(rule, NonlinearRelaxation)
    which, found = rule.narrowed(dual.kernels, z, tuple(boxes[i] for i in node.inputs), boxes[k])
    value = k if which < 0 else node.inputs[which]
    own = inner.clamps.get(value, boxes[value])
    own = xp.maximum(own[0], boxes[value][0]), xp.minimum(own[1], boxes[value][1])
    low, high = xp.maximum(found[0], own[0]), xp.minimum(found[1], own[1])
    sane = low <= high  # an empty interval can only mean an empty box of the caller's
    low, high = xp.where(sane, low, own[0]), xp.where(sane, high, own[1])
    inner.clamps[value] = (low.astype(xp.int32), high.astype(xp.int32))
    inner.steps.append(step)


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
    """Ends of node k's argument, int64 [1, *shape], for its elements `chosen` (flat, on the host),
    far apart elsewhere; and the elements that were bounded."""
    kernels, xp = dual.kernels, dual.kernels.xp
    node, rule = dual.network.nodes[k - 1], dual.rules[k - 1]
    assert isinstance(rule, NonlinearRelaxation)
    shape, inputs = node.type.shape, tuple(boxes[i] for i in node.inputs)
    size = int(np.prod(shape, dtype=np.int64))
    low, high = (
        xp.full(size, -(1 << 31), dtype=xp.int64),
        xp.full(size, (1 << 31) - 1, dtype=xp.int64),
    )
    relaxations = dual.relaxations(boxes, k - 1)
    done = [chosen[:0]]
    widest = max(n.type.size for n in dual.network.nodes[:k])
    rows = int(np.clip(kernels.chunk_bytes // (16 * widest), 4, 256))
    for start in range(0, len(chosen), rows):
        if deadline.passed():
            break
        own = chosen[start : start + rows]
        try:
            objective = _units(dual, k, own, 1 << PRECISION, inputs)
            bound = dual.upper(relaxations, objective)[0] >> PRECISION
        except TooLarge:
            continue
        done.append(own)
        at = kernels.asarray(own)
        high[at], low[at] = (
            xp.minimum(bound[: len(own)], high[at]),
            xp.maximum(-bound[len(own) :], low[at]),
        )
    return (low.reshape(1, *shape), high.reshape(1, *shape)), np.concatenate(done)


def _units(
    dual: Dual, k: int, elements: Array, unit: int, inputs: tuple[Interval, ...]
) -> dict[int, Array]:
    """The weights of + and of - unit times some elements of node k's argument: per input value
    int64 [1, 2 elements, *shape]."""
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
    """Ends of node k's argument, int64 [1, *shape], far apart but for `elements`; the multipliers
    that prove them, and their precision. No multipliers where exact arithmetic would leave its
    types."""
    kernels, xp, node = dual.kernels, dual.kernels.xp, dual.network.nodes[k - 1]
    shape, count = node.type.shape, len(elements)
    low, high = (
        xp.full(shape, -(1 << 31), dtype=xp.int64),
        xp.full(shape, (1 << 31) - 1, dtype=xp.int64),
    )
    units = _units(dual, k, elements, 1, tuple(boxes[i] for i in node.inputs))
    # Every function as a subproblem of its own, over the one box.
    objective = Objective(
        {v: xp.moveaxis(own, 1, 0) for v, own in units.items()},
        xp.zeros((2 * count, 1), dtype=xp.int64),
    )
    relaxations, guide = dual.relaxations(boxes, k - 1), objective.as_guide()
    mu = xp.ones((2 * count, 1), dtype=GUIDE)
    point = Point(mu, dual.crown_multipliers(boxes, guide.weights(mu)), mu[:, 0])
    point = improve(
        dual,
        relaxations.as_guide(kernels),
        guide,
        point,
        ROUNDS,
        RATE,
        deadline,
        -np.inf,
        Dual.fixed(relaxations.boxes[:k]),
    )
    for precision in (PRECISION, PRECISION - 4, PRECISION - 8):
        mu, multipliers = rounded(dual, point, precision)
        try:
            bound = dual.upper(relaxations, objective.weights(mu), multipliers)[:, 0] >> precision
        except TooLarge:
            continue
        at = kernels.asarray(elements)
        high.reshape(-1)[at] = xp.minimum(bound[:count], (1 << 31) - 1)
        low.reshape(-1)[at] = xp.maximum(-bound[count:], -(1 << 31))
        return (low[None], high[None]), multipliers, precision
    return (low[None], high[None]), {}, 0
