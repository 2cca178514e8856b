"""Bounds of inner values over one box, tighter than intervals: the dual with unit vectors as objectives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qverify.bounds.dual import Dual
from qverify.deadline import Deadline
from qverify.kernels import Array
from qverify.ops import Interval
from qverify.ops.relax import Nonlinear, TooLarge

PRECISION = 16  # multipliers of a single value are multiples of 2**-16


@dataclass(frozen=True, eq=False)
class Inner:
    """Bounds of values, and whose arguments they were found for: (node, elements), in order."""

    clamps: dict[int, Interval]
    bounded: list[tuple[int, Array]]


def tightened(
    dual: Dual, lower: Array, upper: Array, last: int, deadline: Deadline, rows: int = 256, budget: float = 4e8
) -> Inner:
    """Bounds [1, *shape] of values up to `last` inside one box ([1, codes] ends) that hold in every part of the box.

    Node by node, the arguments that can reach a clip of their nonlinear node (elsewhere a tighter bound gains little) are
    bounded by the dual with multipliers at the hulls' edges, behind the first nonlinear nodes. A node whose bounds
    would touch more than `budget` elements is left out, and so is what the deadline leaves no time for.
    """
    network = dual.network
    clamps: dict[int, Interval] = {}
    bounded: list[tuple[int, Array]] = []
    before = network.input_type.size
    for k, (node, rule) in enumerate(zip(network.nodes[:last], dual.rules, strict=False), 1):
        before += node.type.size
        if not isinstance(rule, Nonlinear) or rule.whole or not _behind_a_hull(dual, k):
            continue  # intervals are exact for a linear function of the input box
        boxes, _ = network.boxes(dual.kernels, lower, upper, clamps)
        inputs = tuple(boxes[i] for i in node.inputs)
        first, end = boxes[k]
        open_ = (first < end) & ((first == node.type.low) | (end == node.type.high))
        chosen = np.flatnonzero(dual.kernels.to_host(open_))
        if 2 * len(chosen) * before > budget or deadline.passed():
            continue
        z, done = _bounds_of(dual, boxes, k, chosen, rows, deadline)
        bounded.append((k, done))
        which, found = rule.narrowed(dual.kernels, z, inputs, boxes[k])
        value = k if which < 0 else node.inputs[which]
        xp = dual.kernels.xp
        low, high = xp.maximum(found[0], boxes[value][0]), xp.minimum(found[1], boxes[value][1])
        sane = low <= high  # an empty interval can only mean an empty box of the caller's
        low, high = xp.where(sane, low, boxes[value][0]), xp.where(sane, high, boxes[value][1])
        clamps[value] = (low.astype(xp.int32), high.astype(xp.int32))
    return Inner(clamps, bounded)


def _behind_a_hull(dual: Dual, k: int) -> bool:
    """Whether a nonlinear node stands between the input and node k."""
    reached = set(dual.network.nodes[k - 1].inputs)
    for i in range(k - 1, 0, -1):
        if i in reached:
            if isinstance(dual.rules[i - 1], Nonlinear):
                return True
            reached.update(dual.network.nodes[i - 1].inputs)
    return False


def _bounds_of(
    dual: Dual, boxes: list[Interval], k: int, chosen: Array, rows: int, deadline: Deadline
) -> tuple[Interval, Array]:
    """Ends of node k's argument, int64 [1, *shape], for its elements `chosen` (flat, on the host), far apart elsewhere;
    and the elements that were bounded."""
    kernels, xp = dual.kernels, dual.kernels.xp
    node, rule = dual.network.nodes[k - 1], dual.rules[k - 1]
    assert isinstance(rule, Nonlinear)
    shape, inputs = node.type.shape, tuple(boxes[i] for i in node.inputs)
    size = int(np.prod(shape, dtype=np.int64))
    low, high = xp.full(size, -(1 << 31), dtype=xp.int64), xp.full(size, (1 << 31) - 1, dtype=xp.int64)
    scene = dual.scene(boxes, k - 1)
    done = [chosen[:0]]
    for start in range(0, len(chosen), rows):
        if deadline.passed():
            break
        own = chosen[start : start + rows]
        weights = np.zeros((1, 2 * len(own), size), np.int64)
        weights[0, np.arange(len(own)), own] = 1 << PRECISION
        weights[0, len(own) + np.arange(len(own)), own] = -(1 << PRECISION)
        try:
            parts = rule.spread(kernels, kernels.asarray(weights.reshape(1, -1, *shape)), inputs)
            objective: dict[int, Array] = {}
            for i, part in zip(node.inputs, parts, strict=True):
                if part is not None:
                    objective[i] = objective[i] + part if i in objective else part
            bound = dual.upper(scene, objective)[0] >> PRECISION
        except TooLarge:
            continue
        done.append(own)
        at = kernels.asarray(own)
        high[at], low[at] = xp.minimum(bound[: len(own)], high[at]), xp.maximum(-bound[len(own) :], low[at])
    return (low.reshape(1, *shape), high.reshape(1, *shape)), np.concatenate(done)
