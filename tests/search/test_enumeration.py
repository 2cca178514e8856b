"""Boxes with few points are decided by evaluating them all: verdicts are brute force's, and
certificates are accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qverify import Verdict
from qverify.checker import check
from qverify.deadline import Deadline, TimeUp
from qverify.kernels import Kernels
from qverify.options import Options
from qverify.result import Stats
from qverify.search import bab, enumeration
from qverify.search.bab import search
from qverify.search.enumeration import Points
from qverify.search.knowledge import Knowledge
from qverify.search.problem import Problem
from tests.graphs import ROUNDS
from tests.kernels.strict import open_strict
from tests.networks import CPU
from tests.search.queries import asked
from tests.search.test_cuts import instances
from tests.test_deadline import Looks

FOREVER = Deadline.after(None)


@pytest.fixture(autouse=True)
def swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enumeration, "MOST", 1 << 22)
    monkeypatch.setattr(enumeration, "MOST_CERTIFIED", 1 << 16)


@pytest.mark.parametrize("kernels", [CPU, open_strict()], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("seed", range(20 * ROUNDS))
def test_the_verdict_is_brute_force_s(
    seed: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no box is split, nor a neuron cut. In batches of three, so that digits carry over."""
    rng = np.random.default_rng([seed, 5])
    query = asked(rng)
    problem, stats = query.problem(kernels), Stats()
    watch = query.watch(problem, query.watched(rng))
    monkeypatch.setattr(bab, "SWEPT", 10**6)
    monkeypatch.delattr(bab, "cut_neurons")
    options = Options(attack=False, batch=3)
    outcome = search(problem, options, FOREVER, np.random.default_rng(0), stats, watch=watch)
    assert outcome.verdict is query.expected
    if outcome.candidate is None:
        # Unless intervals refute the whole box.
        assert stats.leaves == (0 if stats.subproblems else len(query.points))


def test_every_point_comes_once() -> None:
    lower, upper = np.array([3, 7, -2, 0], np.int32), np.array([5, 7, 1, 1], np.int32)
    problem = SimpleNamespace(kernels=CPU, lower=lower, upper=upper)
    known: Any = SimpleNamespace(problem=problem)
    points = Points(known, 4, 100)
    assert points.count == 3 * 4 * 2 and points.few
    found = np.concatenate(
        [points._points(start, min(start + 5, points.count)) for start in range(0, points.count, 5)]
    )
    assert len(np.unique(found, axis=0)) == len(found) == points.count
    assert ((lower <= found) & (found <= upper)).all()


def test_certificates_of_points_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {Verdict.SAT: 0, Verdict.UNSAT: 0}
    monkeypatch.setattr(bab, "SWEPT", 10**6)
    for query in instances([1, 4], 8 * ROUNDS, tmp_path, most=12):
        if query.mixed:
            continue
        result = query.verified(certificate=True, attack=False)
        assert query.verified(sweep=False).verdict is result.verdict
        if result.certificate is not None:
            (tmp_path / "certificate.zip").write_bytes(result.certificate)
            assert (
                check(query.model, query.spec, tmp_path / "certificate.zip").verdict
                == result.verdict.value
            )
            kinds[result.verdict] += 1
    assert min(kinds.values()) > 0


def slow(per_point: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock that evaluation moves; how many points were evaluated at a time."""
    sizes: list[int] = []
    clock = SimpleNamespace(perf_counter=lambda: per_point * sum(sizes))
    monkeypatch.setattr(enumeration, "time", clock)
    honest = Problem.evaluate

    def evaluate(self: Problem, points: Any) -> Any:
        sizes.append(len(points))
        return honest(self, points)

    monkeypatch.setattr(Problem, "evaluate", evaluate)
    return sizes


def test_points_are_given_up_where_they_would_take_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a few of them; with more time it goes on from there."""
    rng = np.random.default_rng(2)
    query = next(
        q
        for q in iter(lambda: asked(rng), None)
        if q.expected is Verdict.UNSAT and len(q.points) > 200
    )
    known = Knowledge(query.problem())
    sizes = slow(1.0, monkeypatch)
    few = Points(known, 10, 10**6)
    assert few.sweep(patience=100.0) is None
    assert few.done == sum(sizes) == sum(enumeration.TRIAL) + 10 < few.count
    assert few.sweep(patience=1.0 * few.count) is None
    assert few.done == sum(sizes) == few.count
    assert Points(known, 10, few.count - 1).sweep(np.inf) is None
    assert sum(sizes) == few.count  # beyond the most, none is


def test_time_is_up_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    query = next(q for q in iter(lambda: asked(rng), None) if len(q.points) > 200)
    known = Knowledge(query.problem())
    sizes = slow(1.0, monkeypatch)
    monkeypatch.setattr(Knowledge, "find_unsafe", lambda *_: None)
    with Looks.of(3).limits(), pytest.raises(TimeUp):
        Points(known, 10, 10**6).sweep(np.inf)
    assert len(sizes) <= 3
