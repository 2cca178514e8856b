"""The law of backward rules (L4), for every case without naming an op: for every x in its box,

    sum weights * y  <=  sum multipliers * x + constant     (in exact integers)

for y = run(x), and (of an op with a band) for every y in the interval of the point x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qverify.kernels import open_kernels
from qverify.ops.relax import IntervalRelaxation, StaircaseRelaxation, TooLarge, concretize
from tests.ops.banded import BANDED
from tests.ops.cases import CASES, Case

CPU = open_kernels("cpu")


def boxes(case: Case, rng: np.random.Generator, count: int) -> list[tuple[Any, Any]]:
    """`count` boxes of all widths for each input, points and whole ranges among them."""
    result = []
    for t in case.inputs:
        ends = np.sort(
            rng.integers(t.low, t.high, size=(2, count, *t.shape), endpoint=True, dtype=np.int64),
            axis=0,
        )
        width = rng.integers(0, 6, size=(count, *([1] * len(t.shape))))
        upper = np.where(width == 5, ends[1], np.minimum(ends[0] + width**3, t.high))
        lower, upper = ends[0].copy(), upper.copy()
        lower[0], upper[0] = t.low, t.high
        result.append((lower.astype(np.int32), upper.astype(np.int32)))
    return result


def points(box: tuple[Any, Any], rng: np.random.Generator, corner: bool) -> Any:
    lower, upper = box
    if corner:
        return np.where(rng.random(lower.shape) < 0.5, lower, upper).astype(np.int32)
    return rng.integers(lower, upper, endpoint=True, dtype=np.int32)


def dot(weights: Any, x: Any) -> Any:
    """Exact sum of weights [N, R, *shape] * x [N, *shape] as Python integers [N, R]."""
    flat = weights.reshape(*weights.shape[:2], -1).astype(object)
    return (flat * x.reshape(len(x), 1, -1).astype(object)).sum(axis=2)


@pytest.mark.parametrize("case", (*CASES, *BANDED), ids=str)
def test_a_backward_bound_is_never_below_the_function(case: Case) -> None:
    rng = np.random.default_rng(5)
    rule = case.op.relaxation(CPU, *case.inputs)
    count, functions = 12, 6
    inputs = boxes(case, rng, count)
    result = case.op.interval(CPU, *inputs)
    shape = result[0].shape[1:]
    for scale in (1, 1000, 2**20):
        weights = rng.integers(-scale, scale, size=(count, functions, *shape), endpoint=True)
        weights[:, 1] = np.abs(weights[:, 1])
        weights[:, 2] = -np.abs(weights[:, 2])
        weights[:, 3] *= rng.random(shape) < 0.2
        try:
            parts, constant = rule.backward(CPU, weights, tuple(inputs), result)
        except TooLarge:
            assert scale > 1
            continue
        for k in range(40):
            xs = tuple(points(box, rng, corner=k % 2 == 0) for box in inputs)
            bound = constant.astype(object)
            for part, x in zip(parts, xs, strict=True):
                if part is not None:
                    bound = bound + dot(part, x)
            lower, upper = case.op.interval(CPU, *zip(xs, xs, strict=True))
            most = dot(np.maximum(weights, 0), upper) + dot(np.minimum(weights, 0), lower)
            assert (most <= bound).all()


@pytest.mark.parametrize("case", [c for c in CASES if len(c.inputs) == 1], ids=str)
def test_on_points_a_backward_bound_is_exact(case: Case) -> None:
    """On single points nothing is lost: neither by stopping at the bounds nor along a staircase."""
    rng = np.random.default_rng(6)
    rule = case.op.relaxation(CPU, *case.inputs)
    (t,) = case.inputs
    x = rng.integers(t.low, t.high, size=(8, *t.shape), endpoint=True, dtype=np.int32)
    y = case.op.run(CPU, x)
    weights = rng.integers(-50, 50, size=(8, 3, *y.shape[1:]), endpoint=True)
    parts, constant = rule.backward(CPU, weights, ((x, x),), (y, y))
    bound = constant if parts[0] is None else constant + concretize(CPU, parts[0], (x, x))[0]
    assert (bound.astype(object) == dot(weights, y)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_thresholds_are_the_least_inputs_that_reach_a_code(case: Case) -> None:
    rule = case.op.relaxation(CPU, *case.inputs)
    if not isinstance(rule, StaircaseRelaxation):
        assert (
            isinstance(rule, IntervalRelaxation)
            or case.op.relaxation(CPU, *case.inputs) is not None
        )
        return
    (t,) = case.inputs
    out = case.op.output_type(t)
    for k in range(out.low + 1, out.high + 1, max(1, (out.high - out.low) // 16)):
        at = rule.thresholds[rule.which, k - rule.low]
        inside = np.clip(at, t.low, t.high)[None].astype(np.int32)
        below = np.clip(at - 1, t.low, t.high)[None].astype(np.int32)
        reached = case.op.run(CPU, inside)[0] >= k
        assert (reached == (at <= t.high)).all()
        assert ((case.op.run(CPU, below)[0] < k) | (at <= t.low)).all()
    assert ((rule.thresholds[:, 1:] - rule.thresholds[:, :-1]) >= 0).all()


def test_a_chord_is_never_further_than_the_slack() -> None:
    for case in CASES:
        rule = case.op.relaxation(CPU, *case.inputs)
        if isinstance(rule, StaircaseRelaxation):
            (t,) = case.inputs
            for row, slack in zip(rule.thresholds[:4], rule.slack[:4], strict=False):
                inside = np.flatnonzero((row > t.low) & (row <= t.high))
                for i in inside[::5]:
                    for j in inside[inside > i + 1][::5]:
                        k = np.arange(i, j + 1)
                        chord = row[i] + (row[j] - row[i]) * (k - i) / (j - i)
                        assert (np.abs(row[i : j + 1] - chord) <= slack + 1e-6).all()
