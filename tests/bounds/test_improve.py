"""The steps of multipliers: as large as what they step towards, and none where the result is fixed
in the root box."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qverify.bounds.dual import Dual
from qverify.bounds.improve import Objective, Point, improve
from qverify.deadline import Deadline
from qverify.ops import Dense, FloatProgram, Requantize
from qverify.ops.relax import GUIDE, NonlinearRelaxation, steepness
from tests.networks import CPU, Maker

FOREVER = Deadline.after(None)


@pytest.mark.parametrize("width", [3, 10, 250])
def test_a_staircase_knows_its_codes_per_unit(width: int) -> None:
    far = 2**31
    rows = np.array(
        [[0, *(width * k for k in range(1, 16)), far], [0, 5, *[far] * 14, far]], np.int64
    )
    # A row with one step takes the other's.
    assert steepness(rows) == pytest.approx([1 / width, 1 / width])
    assert steepness(rows[1:]) == [0.0] and steepness(np.zeros((2, 2))).tolist() == [0.0, 0.0]


def layers(seed: int) -> tuple[Dual, list[Any], Objective, Point]:
    """Two layers and a function of the last one, over a box that fixes some neurons at a clip, with
    CROWN's slopes to start from."""
    rng = np.random.default_rng(seed)
    maker = Maker(rng, 12, 15)
    value = 0
    for width in (24, 24):
        t = maker.type(value)
        weight = rng.integers(-20, 21, (t.size, width))
        middle = (weight * (t.low + t.high) / 2).sum(axis=0)
        bias = np.rint(rng.normal(0, 2, width) * np.abs(weight).sum(axis=0) - middle).astype(
            np.int64
        )
        value = maker.add(Dense(weight, bias, t.low, t.high), value)
        scale = 15 / (0.5 * maker.type(value).high)
        value = maker.add(
            Requantize(FloatProgram().then("mul", scale), np.asarray(0, np.int32), 0, 15), value
        )
    network = maker.network(value)
    dual = Dual.make(network, CPU)
    centre = rng.integers(3, 13, 12)
    lower, upper = (np.asarray(centre + d, np.int32)[None] for d in (-2, 2))
    boxes, _ = network.boxes(CPU, lower, upper)
    terms = {value: rng.integers(-9, 10, (4, 1, 24)).astype(np.int64)}
    objective = Objective(terms, np.zeros((4, 1), np.int64))
    mu = np.ones((4, 1), GUIDE)
    return (
        dual,
        boxes,
        objective,
        Point(mu, dual.crown_multipliers(boxes, objective.as_guide().weights(mu)), mu[:, 0]),
    )


def test_multipliers_of_fixed_results_stay_and_the_others_move() -> None:
    seen = 0
    for seed in range(6):
        dual, boxes, objective, start = layers(seed)
        relaxations = dual.relaxations(boxes, max(objective.terms)).as_guide(CPU)
        fixed = Dual.fixed(boxes)
        point = improve(
            dual, relaxations, objective.as_guide(), start, 9, 0.2, FOREVER, -np.inf, fixed
        )
        assert set(dual.paces) == {
            k for k, rule in enumerate(dual.rules, 1) if isinstance(rule, NonlinearRelaxation)
        }
        for k, m in point.multipliers.items():
            still = np.broadcast_to(fixed[k], m.shape)
            assert (m == start.multipliers[k])[still].all()
            seen += int(still.any() and (m != start.multipliers[k])[~still].any())
    assert seen >= 4


def test_steps_pay_sooner_than_steps_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over some networks: the sum of the bounds after few steps."""
    totals = {True: 0.0, False: 0.0}
    for paced in totals:
        with monkeypatch.context() as patch:
            if not paced:
                patch.setattr(Dual, "paces", {})
            for seed in range(8):
                dual, boxes, objective, start = layers(seed)
                relaxations = dual.relaxations(boxes, max(objective.terms)).as_guide(CPU)
                fixed = Dual.fixed(boxes)
                point = improve(
                    dual, relaxations, objective.as_guide(), start, 40, 0.2, FOREVER, -np.inf, fixed
                )
                totals[paced] += float(point.bound.sum())
    assert totals[True] < totals[False]
