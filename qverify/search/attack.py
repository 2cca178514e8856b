"""The search for counterexamples: sign steps on the integer network, with straight-through gradients.

Every point tried is evaluated exactly, so whatever is found is real for the integer network; finding nothing means
nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.deadline import Deadline
from qverify.kernels import Array
from qverify.result import Stats
from qverify.search.problem import Candidate, Problem

Float64Array = npt.NDArray[np.float64]


def slack_gradient(problem: Problem, values: list[Array], row: npt.NDArray[np.intp]) -> Array:
    """d (row value) / d codes at stored network values, for one row per point: float32 [N, codes]. Falling along it
    raises the row's slack. (Each row is scaled by a power of two into float32's range.)"""
    if not len(problem.unsafe.rows):  # the only case is the empty one: everywhere unsafe
        return problem.kernels.xp.zeros(values[0].shape, dtype=problem.kernels.xp.float32)
    upstream = problem.unsafe.y_matrix[row] * problem.decoder.steepness
    _, exponent = np.frexp(np.abs(upstream).max(axis=1, keepdims=True, initial=0.0))
    upstream = np.ldexp(upstream, -exponent)
    return problem.network.gradient(problem.kernels, values, problem.kernels.asarray(upstream.astype(np.float32)))


def corners(problem: Problem, lower: Array, upper: Array, gradient: Array) -> Array:
    """The corner of each box that the gradient points to (downhill)."""
    return problem.kernels.xp.where(gradient > 0, lower, upper)


def attack(
    problem: Problem, deadline: Deadline, rng: np.random.Generator, stats: Stats, restarts: int = 4, steps: int = 16
) -> Candidate | None:
    """Look for an unsafe point in the root box: the centre, random points and corners, each followed downhill for every
    case in turn."""
    xp = problem.kernels.xp
    lower, upper = problem.kernels.asarray(problem.lower), problem.kernels.asarray(problem.upper)
    cases = len(problem.unsafe.cases)
    if not cases:
        return None
    width = problem.upper - problem.lower
    group = max(1, min(cases, 4096 // max(restarts, 1)))
    for start in range(0, cases, group):
        own = np.arange(start, min(start + group, cases))
        target = np.repeat(own, restarts)
        points = _starts(problem, rng, len(own), restarts)
        for step in range(steps + 1):
            if deadline.passed():
                return None
            values = problem.network.values(problem.kernels, problem.kernels.asarray(points))
            y = problem.outputs(values)
            stats.attack_points += len(points)
            found = problem.find_unsafe(values[0], y)
            if found is not None:
                return found
            if step == steps:
                break
            x = problem.input_ends(values[0], values[0])
            row = _worst_row(problem, y, x, target)
            grad = slack_gradient(problem, values, row)
            size = problem.kernels.asarray(np.maximum(1, np.rint(width * (0.5 * 0.75**step))).astype(np.int32))
            moved = values[0] - xp.sign(grad).astype(xp.int32) * size
            points = xp.minimum(xp.maximum(moved, lower), upper)
    return None


def _starts(problem: Problem, rng: np.random.Generator, cases: int, restarts: int) -> Any:
    """[cases * restarts, codes]: per case the centre, a random corner, and random points."""
    codes = len(problem.lower)
    points = rng.integers(problem.lower, problem.upper, size=(cases, restarts, codes), endpoint=True, dtype=np.int32)
    points[:, 0] = (problem.lower + problem.upper) // 2
    if restarts > 2:
        points[:, 2] = np.where(rng.random((cases, codes)) < 0.5, problem.lower, problem.upper)
    return points.reshape(-1, codes)


def _worst_row(problem: Problem, y: Float64Array, x: Any, target: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    _, row = problem.unsafe.slack(y, None if x is None else x[0])
    chosen: npt.NDArray[np.intp] = row[np.arange(len(y)), target]
    return chosen
