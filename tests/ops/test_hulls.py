"""Hulls against the truth: for every sub-interval of the arguments and every part of the results,
the best corner is never below the largest w y - m z over the points that lie there, and equal to it
where steps are even."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qverify.kernels import open_kernels
from qverify.ops import FloatProgram, Requantize, Type
from qverify.ops.pool import MaxRelaxation
from qverify.ops.relax import NonlinearRelaxation, StaircaseRelaxation, make_staircase
from qverify.ops.table import PairwiseRelaxation, Table, TableRelaxation, make_sandwich
from tests.graphs import ROUNDS

CPU = open_kernels("cpu")
FAR = -(1 << 60)  # the best of no points
Rng = np.random.Generator

GRID = np.array(
    [(w, m) for w in (-31, -2, -1, 0, 1, 5) for m in (-29, -7, -3, -1, 0, 1, 2, 6, 40)], np.int64
)


def grid(rng: Rng, span: float) -> Any:
    """Pairs (weight, multiplier) [R, 2]: a fixed grid, and others near the slope `span` = rise /
    run of the function."""
    w = rng.integers(-1000, 1001, 24)
    m = np.rint(w * span * rng.choice([-1, 0.5, 0.9, 1, 1.1, 2], 24)).astype(np.int64)
    return np.concatenate([GRID, np.stack([w, m], axis=1)])


def intervals(low: int, high: int) -> Any:
    """All [a, b] within [low, high]: int32 [N, 2]."""
    a, b = np.triu_indices(high - low + 1)
    return np.stack([a, b], axis=1).astype(np.int32) + low


def with_parts(first: Any, last: Any) -> Iterator[tuple[int, int, int]]:
    """(row, first, last) for all non-empty parts of the results."""
    for i, (f, t) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        yield from ((i, p, q) for p in range(f, t + 1) for q in range(p, t + 1))


def best_of(
    rule: NonlinearRelaxation, boxes: list[Any], result: Any, pairs: Any
) -> tuple[Any, Any]:
    """(the hull's best [N, R], its slack [N] or zeros) for N scalar subproblems."""
    inputs = tuple((b[:, 0].astype(np.int32), b[:, 1].astype(np.int32)) for b in boxes)
    hull = rule.hull(CPU, inputs, (result[:, 0].astype(np.int32), result[:, 1].astype(np.int32)))
    n = len(result)
    weights, multipliers = (np.broadcast_to(p, (n, len(pairs))).copy() for p in pairs.T)
    best, y, z = hull.best(CPU, weights, multipliers)
    spread = weights * y - multipliers * z
    slack = (
        np.zeros(n, np.int64)
        if hull.slack is None
        else np.broadcast_to(hull.slack.reshape(-1), (n,))
    )
    assert (best >= spread).all() and (best - spread == np.abs(multipliers) * slack[:, None]).all()
    return best, slack


def truth(z: Any, y: Any, inside: Any, pairs: Any) -> Any:
    """max of w y - m z over the points [P] that are `inside` [N, P]: [N, R]."""
    value = pairs[:, :1] * y - pairs[:, 1:] * z  # [R, P]
    return np.where(inside[:, None], value[None], FAR).max(axis=2, initial=FAR)


def monotone(kind: str, rng: Rng, count: int, high: int) -> Any:
    """A non-decreasing function of `count` arguments with results in 0..high."""
    if kind == "even":
        return np.clip(
            (np.arange(count) + rng.integers(3)) // rng.integers(1, 4) + rng.integers(-2, 3),
            0,
            high,
        )
    if kind == "linear":
        return np.clip(
            np.rint(np.arange(count) * rng.uniform(0.1, 0.9) + rng.uniform(-2, 2)), 0, high
        ).astype(np.int64)
    if kind == "uneven":
        return np.minimum(np.cumsum(rng.random(count) < rng.uniform(0.1, 0.9)), high)
    return np.sort(rng.integers(0, high + 1, count))  # jumps over codes


def staircase(table: Any, x: Type, high: int) -> StaircaseRelaxation:
    rule = make_staircase(lambda v: table[v - x.low], 1, np.zeros((), np.int64), x, 0, high)
    assert isinstance(rule, StaircaseRelaxation)
    return rule


@pytest.mark.parametrize("kind", ["even", "linear", "uneven", "jumps"])
def test_a_staircase_of_4_bits_on_every_interval(kind: str) -> None:
    x, high = Type((), -8, 7), 7
    arguments = np.arange(x.low, x.high + 1)
    seen = 0
    for seed in range(8 * ROUNDS):
        rng = np.random.default_rng([1, seed])
        table = monotone(kind, rng, x.count, high)
        rule, ends = staircase(table, x, high), intervals(x.low, x.high)
        rows = np.array(list(with_parts(*(table[ends[:, i] - x.low] for i in (0, 1)))))
        box, result = ends[rows[:, 0]], rows[:, 1:]
        inside = (
            (box[:, :1] <= arguments)
            & (arguments <= box[:, 1:])
            & (result[:, :1] <= table)
            & (table <= result[:, 1:])
        )
        keep = inside.any(axis=1)  # a part whose codes are all jumped over holds no point
        box, result, inside = box[keep], result[keep], inside[keep]
        pairs = grid(rng, (table[-1] - table[0]) / x.count)
        best, slack = best_of(rule, [box], result, pairs)
        true = truth(arguments, table, inside, pairs)
        assert (best >= true).all()
        if kind in ("even", "linear", "uneven"):  # every code occurs, so corners are points
            assert (best <= true + np.abs(pairs[:, 1]) * slack[:, None]).all()
            assert int(rule.slack.max()) <= {"even": 1, "linear": 2, "uneven": 16}[kind]
            assert (slack[result[:, 1] - result[:, 0] < 2] == 0).all()
        seen += best.size
    assert seen > 100_000


@pytest.mark.parametrize("bits", [8, 16])
def test_a_requantization_on_sampled_intervals(bits: int) -> None:
    for seed in range(25 * ROUNDS):
        rng = np.random.default_rng([bits, seed])
        reach = 2 ** (bits - 1)
        x = Type((), -reach, reach - 1)
        low, high = ((0, 255), (-128, 127), (0, 63))[rng.integers(3)]
        program = FloatProgram().then(
            "mul", (high - low) / x.count * rng.choice([0.3, 0.9, 1.7, 8.0])
        )
        if rng.random() < 0.3:
            program = program.then("add", rng.normal() * 30)
        op = Requantize(program, np.asarray(rng.integers(low, high + 1), np.int32), low, high)
        rule = op.relaxation(CPU, x)
        assert isinstance(rule, StaircaseRelaxation)
        arguments = np.arange(x.low, x.high + 1)
        y = op.run(CPU, arguments.astype(np.int32)[:, None])[:, 0].astype(np.int64)
        slope = (y[-1] - y[0]) / x.count
        for _ in range(6):
            a = int(rng.integers(x.low, x.high + 1))
            b = min(a + int(rng.integers(0, 2 ** int(rng.integers(1, bits + 1)))), x.high)
            first, last = np.sort(rng.integers(y[a - x.low], y[b - x.low] + 1, 2))
            if rng.random() < 0.4:
                first, last = y[a - x.low], y[b - x.low]
            at = slice(a - x.low, b - x.low + 1)
            inside = ((first <= y[at]) & (y[at] <= last))[None]
            if not inside.any():
                continue
            pairs = grid(rng, slope)
            best, slack = best_of(rule, [np.array([[a, b]])], np.array([[first, last]]), pairs)
            true = truth(arguments[at], y[at], inside, pairs)
            assert (best >= true).all()
            if np.diff(y).max() <= 1:  # no code is jumped over
                assert (best <= true + np.abs(pairs[:, 1]) * slack).all() and slack.max() <= 2


@pytest.mark.parametrize("form", ["falling", "rising", "any"])
def test_a_scanned_table_of_4_bits_is_exact_on_every_interval(form: str) -> None:
    x = Type((), -8, 7)
    arguments, ends = np.arange(x.low, x.high + 1), intervals(x.low, x.high)
    inside = (ends[:, :1] <= arguments) & (arguments <= ends[:, 1:])
    for seed in range(20 * ROUNDS):
        rng = np.random.default_rng([2, seed])
        table = rng.integers(-20, 21, x.count)
        table = table if form == "any" else np.sort(table)[:: -1 if form == "falling" else 1]
        rule = TableRelaxation(table[None].astype(np.int32), np.zeros((), np.int64), x.low)
        least, most = (
            f(np.where(inside, table, v), axis=1) for f, v in ((np.min, 99), (np.max, -99))
        )
        pairs = grid(rng, 1.5)
        best, _ = best_of(rule, [ends], np.stack([least, most], axis=1), pairs)
        assert (best == truth(arguments, table, inside, pairs)).all()
        op = Table(table[None].astype(np.int32), x.low)
        assert isinstance(
            op.relaxation(CPU, x), TableRelaxation if form == "falling" else NonlinearRelaxation
        )


def sums(rng: Rng, a: Type, b: Type) -> Any:
    """A table of a rounded, clipped linear function of two codes, possibly with a little noise."""
    x, y = np.arange(a.low, a.high + 1)[:, None], np.arange(b.low, b.high + 1)[None]
    p, q = rng.uniform(-1.2, 1.2, 2)
    noise = rng.uniform(-0.6, 0.6, (a.count, b.count)) if rng.random() < 0.3 else 0
    values = np.rint(p * x + q * y + rng.uniform(-3, 3) + noise)
    low, high = np.sort(rng.integers(-9, 10, 2))
    return np.clip(values, low, max(high, low + 3)).astype(np.int64)


def test_a_sum_of_two_codes_on_every_box() -> None:
    a, b = Type((), -3, 3), Type((), 0, 5)
    ends = [intervals(t.low, t.high) for t in (a, b)]
    at = [
        v.reshape(-1)
        for v in np.meshgrid(*(np.arange(t.low, t.high + 1) for t in (a, b)), indexing="ij")
    ]
    i, j = (
        v.reshape(-1)
        for v in np.meshgrid(np.arange(len(ends[0])), np.arange(len(ends[1])), indexing="ij")
    )
    box = [ends[0][i], ends[1][j]]
    within = np.logical_and.reduce(
        [(e[:, :1] <= v) & (v <= e[:, 1:]) for e, v in zip(box, at, strict=True)]
    )
    found = 0
    for seed in range(30 * ROUNDS):
        rng = np.random.default_rng([3, seed])
        table = sums(rng, a, b)
        rule = make_sandwich(table.astype(np.int32), (a.low, a), (b.low, b))
        if rule is None:
            continue
        assert isinstance(rule, PairwiseRelaxation)
        found += 1
        y = table.reshape(-1)
        z = rule.slope[0] * at[0] + rule.slope[1] * at[1]
        assert (rule.least[z - rule.z_low] <= y).all() and (y <= rule.most[z - rule.z_low]).all()
        least, most = (f(np.where(within, y, v), axis=1) for f, v in ((np.min, 99), (np.max, -99)))
        reach = (
            np.where(within, z, 1 << 30).min(axis=1),
            np.where(within, z, -(1 << 30)).max(axis=1),
        )
        which, (low, high) = rule.narrowed(CPU, reach, (), (least, most))
        assert which == -1 and (low <= least).all() and (most <= high).all()
        pairs = grid(rng, 1 / 256)
        pairs[:, 1] = np.where(
            rng.random(len(pairs)) < 0.5, pairs[:, 1], np.rint(pairs[:, 0] * rng.normal() / 256)
        )
        for _ in range(3):
            cut = np.sort(rng.integers(least, most + 1, (2, len(least))), axis=0)
            whole = rng.random(len(least)) < 0.3
            result = np.stack(
                [np.where(whole, least, cut[0]), np.where(whole, most, cut[1])], axis=1
            )
            inside = within & (result[:, :1] <= y) & (y <= result[:, 1:])
            keep = inside.any(axis=1)
            best, _ = best_of(rule, [e[keep] for e in box], result[keep], pairs)
            assert (best >= truth(z, y, inside[keep], pairs)).all()
    assert found >= 12 * ROUNDS


@pytest.mark.parametrize("count,high", [(2, 4), (3, 2), (4, 1)])
def test_a_maximum_on_every_box(count: int, high: int) -> None:
    ends = intervals(0, high)
    points = np.stack(np.meshgrid(*[np.arange(high + 1)] * count, indexing="ij"), axis=-1).reshape(
        -1, count
    )
    chosen = np.stack(np.meshgrid(*[np.arange(len(ends))] * count, indexing="ij"), axis=-1).reshape(
        -1, count
    )
    lower, upper = ends[chosen, 0], ends[chosen, 1]  # [N, count]
    y = points.max(axis=1)
    within = ((lower[:, None] <= points) & (points <= upper[:, None])).all(axis=2)
    rule = MaxRelaxation()
    for seed in range(6 * ROUNDS):
        rng = np.random.default_rng([4, count, seed])
        first, last = np.sort(
            rng.integers(lower.max(axis=1), upper.max(axis=1) + 1, (2, len(lower))), axis=0
        )
        if seed == 0:
            first, last = lower.max(axis=1), upper.max(axis=1)
        inside = within & (first[:, None] <= y) & (y <= last[:, None])
        hull = rule.hull(CPU, ((lower, upper),), (first.astype(np.int32), last.astype(np.int32)))
        for _ in range(12):
            w, m = int(rng.integers(-9, 10)), rng.integers(-6, 7, count)
            if rng.random() < 0.4:
                m = np.abs(m) * (1 if w >= 0 else -1)
            shape = (len(lower), 1)
            best, _, _ = hull.best(
                CPU, np.full(shape, w), np.broadcast_to(m, (*shape, count)).copy()
            )
            true = np.where(inside, w * y - points @ m, FAR).max(axis=1)
            assert inside.any(axis=1).all() and (best[:, 0] >= true).all()
            point = (lower == upper).all(axis=1)
            assert (best[point, 0] == true[point]).all()
            if (w >= 0 and (m >= 0).all()) or (w <= m.sum() and (m <= 0).all()):
                assert (best[:, 0] == true).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_maximum_on_sampled_boxes(bits: int) -> None:
    top = 2**bits
    for seed in range(300 * ROUNDS):
        rng = np.random.default_rng([5, bits, seed])
        count = int(rng.integers(1, 10))
        lower, upper = np.sort(rng.integers(0, top, (2, 1, count)), axis=0)
        first, last = np.sort(rng.integers(lower.max(), upper.max() + 1, 2))
        hull = MaxRelaxation().hull(CPU, ((lower, upper),), (first[None], last[None]))
        w, m = rng.integers(-999, 1000, (1, 1)), rng.integers(-999, 1000, (1, 1, count))
        best, _, _ = hull.best(CPU, w, m)
        points = rng.integers(lower, upper + 1, (400, count))
        points = np.where(
            rng.random(points.shape) < 0.4,
            np.where(rng.random(points.shape) < 0.5, lower, upper),
            points,
        )
        y = points.max(axis=1)
        value = (w[0, 0] * y - points @ m[0, 0])[(first <= y) & (y <= last)]
        assert best[0, 0] >= value.max(initial=FAR)


def test_slack_of_nothing_is_caught_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above see an unsound hull: without slack, uneven steps stand out of their corners'
    hull."""
    monkeypatch.setattr(
        "qverify.ops.relax.slack_of", lambda thresholds, x: np.zeros(len(thresholds), np.int64)
    )
    with pytest.raises(AssertionError):
        test_a_staircase_of_4_bits_on_every_interval("uneven")


def test_a_threshold_off_by_one_is_caught_here(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StaircaseRelaxation.begin
    monkeypatch.setattr(
        StaircaseRelaxation, "begin", lambda self, kernels, code: right(self, kernels, code) + 1
    )
    with pytest.raises(AssertionError):
        test_a_staircase_of_4_bits_on_every_interval("even")


def test_the_kink_of_a_rectifier() -> None:
    """max(z, 0): on [-3, 3] its first step begins at 1, where the edge from (-3, 0) to (3, 3) is 2
    codes high. Without the flat part there is no kink, and without a step neither."""
    ops = Requantize(FloatProgram().then("mul", 1.0), np.asarray(0, np.int32), 0, 255)
    x = Type((3,), -9, 9)
    rule = ops.relaxation(CPU, x)
    assert isinstance(rule, StaircaseRelaxation)
    z = np.array([[-3, 1, -3]], np.int32), np.array([[3, 3, 0]], np.int32)
    found = rule.kink(CPU, (z,), ops.interval(CPU, z))
    assert found is not None
    step, rise = found
    assert step[0, 0] == 1
    assert rise.tolist() == [[2.0, 0.0, 0.0]]
