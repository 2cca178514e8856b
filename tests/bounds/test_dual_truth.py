"""The dual on networks small enough to be enumerated: for every multiplier, box and cut, its exact
bound is at least the largest value over all points that are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qverify.bounds.dual import Dual, Multipliers, Relaxations
from qverify.bounds.improve import Objective, Point, improve, rounded
from qverify.bounds.intermediate import crown_bounds, optimized_bounds
from qverify.bounds.unsafe_regions import proved
from qverify.deadline import Deadline
from qverify.ops import Interval
from qverify.ops.relax import GUIDE, NonlinearRelaxation
from tests.graphs import ROUNDS
from tests.networks import CPU, all_points, random_network

NETWORKS = 60 * ROUNDS
Rng = np.random.Generator


@dataclass
class Part:
    """A part of a network's inputs: a box and cuts, its intervals, and every value at all points
    that lie in it."""

    dual: Dual
    boxes: list[Interval]  # of 1 subproblem
    values: list[Any]  # [P, *shape] each

    def best(self, weights: dict[int, Any]) -> Any:
        """The largest of sum weights[v] [1, R, *shape] . value v over all points: [R]."""
        total: Any = 0
        for value, w in weights.items():
            total = (
                total
                + self.values[value].reshape(len(self.values[0]), -1).astype(np.int64)
                @ flat(w)[0].T
            )
        return total.max(axis=0)


def flat(x: Any) -> Any:
    return x.reshape(*x.shape[:2], -1)


def parts(seed: int, cuts: bool = True) -> Iterator[tuple[Rng, Part]]:
    """Boxes of one random network, most of them cut at a point that is kept."""
    rng = np.random.default_rng([7, seed])
    network = random_network(rng, inputs=int(rng.integers(2, 4)))
    dual, t = Dual.make(network, CPU), network.input_type
    for _ in range(4):
        lower, upper = np.sort(rng.integers(0, t.high + 1, (2, t.size)), axis=0).astype(np.int32)
        if rng.random() < 0.3:
            lower, upper = np.zeros_like(lower), np.full_like(upper, t.high)
        x = all_points(lower, upper)
        values, clamps = network.values(CPU, x), {}
        if cuts and rng.random() < 0.8:
            kept = int(rng.integers(len(x)))
            plain = network.boxes(CPU, lower[None], upper[None])[0]
            for k in rng.permutation(len(network.nodes))[: rng.integers(1, 4)] + 1:
                low, high = plain[k]
                share = rng.random(low.shape) < 0.5
                point = values[k][kept][None]
                low = np.where(share, rng.integers(low, point + 1), low).astype(np.int32)
                high = np.where(
                    rng.random(low.shape) < 0.5, rng.integers(point, high + 1), high
                ).astype(np.int32)
                clamps[int(k)] = (low, high)
        boxes, possible = network.boxes(CPU, lower[None], upper[None], clamps)
        assert possible.all()
        inside = np.ones(len(x), np.bool_)
        for k, (low, high) in clamps.items():
            inside &= ((low <= values[k]) & (values[k] <= high)).reshape(len(x), -1).all(axis=1)
        assert inside.any()
        for k, (low, high) in enumerate(boxes):
            assert ((low <= values[k][inside]) & (values[k][inside] <= high)).all()
        yield rng, Part(dual, boxes, [v[inside] for v in values])


def functions(rng: Rng, part: Part, count: int, scale: int) -> dict[int, Any]:
    """Random linear functions of one to three values."""
    network = part.dual.network
    last = len(network.nodes)
    chosen = {last, *(int(v) for v in rng.integers(0, last + 1, rng.integers(0, 3)))}
    result = {}
    for v in chosen:
        shape = (1, count, *network.type_of(v).shape)
        result[v] = rng.integers(-scale, scale + 1, shape) * (rng.random(shape) < 0.6)
    return result


def disturbed(rng: Rng, start: Multipliers) -> Iterator[Multipliers]:
    """The multipliers to start from, others nearby and far away, and none."""
    yield start
    yield {k: np.zeros_like(m) for k, m in start.items()}
    yield {k: m + rng.integers(-9, 10, m.shape) for k, m in start.items()}
    yield {k: np.rint(m * rng.uniform(-0.5, 2, m.shape)).astype(np.int64) for k, m in start.items()}
    yield {k: rng.integers(-3000, 3001, m.shape) for k, m in start.items()}


def test_an_exact_bound_is_never_below_the_truth() -> None:
    bounds, tight = 0, 0
    for seed in range(NETWORKS):
        for rng, part in parts(seed):
            weights = functions(rng, part, 5, int(rng.choice([1, 30, 2**18])))
            true = part.best(weights)
            crown = part.dual.upper(Relaxations(part.boxes, {}), weights)[0]
            assert (crown >= true).all()
            assert (part.dual.last_layer(Relaxations(part.boxes, {}), weights)[0] >= true).all()
            relaxations = part.dual.relaxations(part.boxes, len(part.dual.network.nodes))
            for m in disturbed(rng, part.dual.crown_multipliers(part.boxes, weights)):
                bound = part.dual.upper(relaxations, weights, m)[0]
                assert (bound >= true).all()
                bounds, tight = bounds + bound.size, tight + int((bound == true).sum())
    assert bounds > 4_000 * ROUNDS and tight > bounds // 20  # not only wide of the mark


def test_the_guide_is_close_to_the_exact_bound() -> None:
    for seed in range(NETWORKS // 2):
        for rng, part in parts(seed):
            weights = functions(rng, part, 3, 30)
            relaxations = part.dual.relaxations(part.boxes, len(part.dual.network.nodes))
            for m in disturbed(rng, part.dual.crown_multipliers(part.boxes, weights)):
                exact = part.dual.upper(relaxations, weights, m)[0]
                floats, primal = part.dual.guide(
                    relaxations.as_guide(CPU),
                    {v: w.astype(GUIDE) for v, w in weights.items()},
                    {k: a.astype(GUIDE) for k, a in m.items()},
                )
                reach = 1.0 + sum(float(np.abs(flat(w)).sum()) for w in weights.values()) * 1e3
                reach += sum(float(np.abs(a).sum()) for a in m.values()) * 1e3
                assert (np.abs(floats[0] - exact) <= 1e-5 * reach).all()
                assert (
                    primal.codes is None
                    or (
                        (part.boxes[0][0] <= primal.codes) & (primal.codes <= part.boxes[0][1])
                    ).all()
                )


def regions(rng: Rng, part: Part, count: int) -> Objective:
    """Three inequalities for each of `count` subproblems (all on the same part): random functions,
    with constants at which they hold at some points, just not any more, or are out of reach."""
    rows = [functions(rng, part, 3, 9) for _ in range(count)]
    values = sorted({v for row in rows for v in row})
    network = part.dual.network
    terms = {
        v: np.concatenate(
            [r.get(v, np.zeros((1, 3, *network.type_of(v).shape), np.int64)) for r in rows]
        )
        for v in values
    }
    best = np.stack([part.best({v: w[n : n + 1] for v, w in terms.items()}) for n in range(count)])
    return Objective(terms, -best + rng.choice([-2, -1, 0, 1, 5], best.shape))


def repeated(part: Part, count: int) -> list[Interval]:
    return [(np.repeat(a, count, axis=0), np.repeat(b, count, axis=0)) for a, b in part.boxes]


def test_no_improved_point_is_below_the_truth_and_no_region_with_a_point_is_refuted() -> None:
    refuted, better = 0, 0
    for seed in range(NETWORKS // 2):
        for rng, part in parts(seed):
            count = 6
            objective = regions(rng, part, count)
            boxes = repeated(part, count)
            relaxations, guide = (
                part.dual.relaxations(boxes, max(objective.terms)),
                objective.as_guide(),
            )
            mu = np.zeros((count, 3), GUIDE)
            mu[:, 0] = 1
            start = Point(mu, part.dual.crown_multipliers(boxes, guide.weights(mu)), mu[:, 0])
            point = improve(
                part.dual, relaxations.as_guide(CPU), guide, start, 24, 0.5, Deadline.after(None)
            )
            # [count, P, 3].
            values: Any = np.stack(
                [
                    sum(
                        part.values[v].reshape(len(part.values[0]), -1).astype(np.int64)
                        @ flat(w)[n].T
                        for v, w in objective.terms.items()
                    )
                    + objective.constants[n]
                    for n in range(count)
                ]
            )
            for tried in (start, point):
                for precision in (18, 6):
                    whole, multipliers = rounded(part.dual, tried, precision)
                    assert (whole >= 0).all()
                    bound = part.dual.upper(relaxations, objective.weights(whole), multipliers)[
                        :, 0
                    ]
                    bound = bound + (whole * objective.constants).sum(axis=1)
                    assert (bound >= (values * whole[:, None]).sum(axis=2).max(axis=1)).all()
                done, _ = proved(part.dual, relaxations, objective, tried, 18)
                holds = (values >= 0).all(axis=2).any(axis=1)
                assert not (done & holds).any()
                refuted += int(done.sum())
            better += int((point.bound < start.bound).sum())
    assert refuted > 100 * ROUNDS and better > 100 * ROUNDS


def test_inner_bounds_hold_at_all_points() -> None:
    narrowed = 0
    for seed in range(NETWORKS):
        for _, part in parts(seed, cuts=False):
            network = part.dual.network
            last, forever = len(network.nodes), Deadline.after(None)
            lower, upper = part.boxes[0]
            inner = crown_bounds(part.dual, lower, upper, last, forever)
            better = optimized_bounds(part.dual, lower, upper, last, inner, forever)
            for clamps in (inner.clamps, better.clamps):
                boxes, possible = network.boxes(CPU, lower, upper, clamps)
                assert possible.all()
                for k, (low, high) in enumerate(boxes):
                    assert ((low <= part.values[k]) & (part.values[k] <= high)).all()
                narrowed += sum(
                    int((high - low < b - a).any())
                    for (low, high), (a, b) in zip(boxes, part.boxes, strict=True)
                )
    assert narrowed > 10 * ROUNDS


def test_every_kind_of_nonlinear_node_came_by() -> None:
    names = {
        rule.name
        for seed in range(NETWORKS)
        for rule in Dual.make(random_network(np.random.default_rng([7, seed]), inputs=2), CPU).rules
        if isinstance(rule, NonlinearRelaxation)
    }
    assert names == {"staircase", "scan", "sum", "max"}
