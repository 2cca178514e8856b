"""Networks with bands: ops whose result the runtime's order of float additions decides.

Small random networks, and for each of them a runtime that picks other codes than the nominal ones
wherever it may. What running every code vector says of that runtime decides the verdict: bounds
hold for every order, and at a single code vector that they leave open the runtime is asked.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction as F
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import robustness, verification, verify
from qverify.boundary.leaves import Leaves
from qverify.deadline import Deadline
from qverify.engine import Engine
from qverify.errors import SoundnessError, UsageError
from qverify.frontend.model import Model, read_model
from qverify.network import Network
from qverify.ops import AbstractOp, Dense, FloatProgram, Requantize
from qverify.options import Options
from qverify.property import Box, Query, Row
from qverify.result import Stats, Verdict
from qverify.robustness import certify
from qverify.search import bab
from qverify.search.bab import search
from qverify.search.problem import Problem
from qverify.search.run import Outcome
from qverify.search.watch import Watch
from tests.graphs import ROUNDS, Graph, write
from tests.networks import CPU, Maker, all_points, random_network
from tests.ops.banded import Blurred, blurred, in_some_order
from tests.search.queries import Asked, Rng, asked, holds
from tests.search.test_cuts import instances
from tests.test_robustness import FORMS, classifier, some_images, truth, verdicts

intel = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the formulas are those of x86-64"
)

WAYS = (
    Options(),
    Options(attack=False, sweep=False),
    Options(attack=False, sweep=False, backward=False, batch=3),
)


def unsafe_of(query: Query, y: Any) -> Any:
    """Which outputs [N, outputs] a query calls unsafe: bool [N]."""
    y = y.astype(np.int64)
    cases = [np.all([holds(row, y) for row in rows], axis=0) for rows in query.cases]
    return np.any(cases, axis=0)


@dataclass
class Banded:
    """A query over a network with bands, and a runtime that computes it in its own order."""

    asked: Asked  # of the nominal network
    runtime: Network
    questions: list[Any] = field(default_factory=list)  # inputs that the runtime was asked about

    @staticmethod
    def random(seed: int) -> Banded:
        rng = np.random.default_rng(seed)

        def network(rng: Rng) -> Network:
            while True:
                made = blurred(rng, random_network(rng))
                if not made.exact:
                    return made

        nominal = asked(rng, make=network)
        runtime = in_some_order(nominal.network, seed)
        # A row that is just true, or just not, in one order, which may be this runtime's.
        y = in_some_order(nominal.network, seed + seed % 2).run(CPU, nominal.points)
        weights = rng.choice([-2, -1, 1, 3], y.shape[1])
        terms = tuple((j, F(int(w))) for j, w in enumerate(weights))
        row = Row((), terms, F(int((y @ weights).min()) - seed // 2 % 2))
        query = replace(nominal.query, cases=((row,),))
        unsafe = unsafe_of(query, nominal.network.run(CPU, nominal.points))
        return Banded(replace(nominal, query=query, unsafe=unsafe), runtime)

    def __call__(self, inputs: Any) -> Any:
        """The runtime's outputs for inputs, which are their own codes."""
        self.questions.append(inputs)
        return self.runtime.run(CPU, inputs[None].astype(np.int32))[0].astype(np.float64)

    @property
    def outputs(self) -> Any:
        """What the runtime says of every code vector: [N, outputs]."""
        return self.runtime.run(CPU, self.asked.points)

    @property
    def unsafe(self) -> Any:
        """Which of the code vectors the runtime makes unsafe: bool [N]."""
        return unsafe_of(self.asked.query, self.outputs)

    def problem(self, backward: bool = True) -> Problem:
        return replace(self.asked.problem(backward=backward), runtime=self)

    def watched(self, problem: Problem, point: Any) -> Watch:
        watch = Watch.make(
            problem.kernels,
            problem.network,
            problem.domain,
            problem.decoder,
            problem.unsafe,
            self,
            point.astype(np.float64),
        )
        assert watch is not None
        return watch

    def searched(self, options: Options, watch: bool) -> Outcome:
        """How the search ends, after the test that it is right."""
        problem = self.problem(options.backward)
        watched = None
        if watch:
            points = self.asked.points[self.unsafe] if self.unsafe.any() else self.asked.points
            watched = self.watched(problem, points[len(points) // 2])
            self.questions.clear()
        rng, limit = np.random.default_rng(0), Deadline.after(60)
        outcome = search(problem, options, limit, rng, Stats(), watch=watched)
        assert outcome.verdict is (Verdict.SAT if self.unsafe.any() else Verdict.UNSAT)
        if outcome.candidate is not None:
            at = np.flatnonzero((self.asked.points == outcome.candidate.codes).all(axis=1))
            assert self.unsafe[at].all()
            assert (outcome.candidate.outputs == self.outputs[at[0]]).all()
        elif watched is not None:
            watched.unsat()
        return outcome


@pytest.fixture(params=["inputs", "neurons"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the search splits where it has the choice."""
    if request.param == "neurons":
        monkeypatch.setattr(bab, "SPLITTABLE", 0)
        # The root's bounds would leave little to do.
        monkeypatch.setattr(bab, "refute", lambda known, boxes, refuted, *_: refuted)
    return str(request.param)


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_verdicts_are_those_of_brute_force(way: int, split: str) -> None:
    questions = turned = 0
    for seed in range(120 * ROUNDS):
        query = Banded.random(seed)
        query.searched(WAYS[way], watch=seed % 2 == 0)
        questions += len(query.questions)
        turned += query.unsafe.any() != query.asked.unsafe.any()
    assert questions > 100 and turned > 5  # else these queries test nothing


def test_intervals_hold_every_order() -> None:
    """Of points and boxes, and the nominal values."""
    moved = 0
    for seed in range(40 * ROUNDS):
        query = Banded.random(seed)
        network, points = query.asked.network, query.asked.points
        lower, upper = network.intervals(CPU, points, points)
        whole = network.intervals(CPU, points.min(axis=0)[None], points.max(axis=0)[None])
        nominal = network.run(CPU, points)
        for y in (nominal, *(in_some_order(network, s).run(CPU, points) for s in range(5))):
            assert (lower <= y).all() and (y <= upper).all()
            assert (whole[0] <= lower).all() and (upper <= whole[1]).all()
            moved += int((y != nominal).sum())
        assert Leaves(CPU, network, query.problem().decoder).allow(points, query.outputs).all()
    assert moved > 100


# -- by hand ---------------------------------------------------------------------------------------


def halved() -> Banded:
    """3 rint(x / 2) for x in 0..5, with a band of 1/4 of a code: 2.5, at x = 5, may be rounded to 2
    (the even one, nominally) or to 3. Unsafe are outputs of at least 9."""
    maker = Maker(np.random.default_rng(0), 1, 7)
    half = Requantize(FloatProgram().then("mul", 0.5), np.asarray(0, np.int32), 0, 7)
    codes = maker.add(Blurred(half, 0.25), 0)
    weight, bias = np.array([[3]]), np.zeros(1, np.int64)
    network = maker.network(maker.add(Dense(weight, bias, 0, 7), codes))
    query = Query(Box((F(0),), (F(5),)), ((Row((), ((0, F(-1)),), F(-9)),),))
    points = all_points([0], [5])
    return Banded(Asked(network, query, points, network.run(CPU, points)[:, 0] >= 9), network)


@pytest.mark.parametrize("options", WAYS)
def test_only_a_point_that_the_band_leaves_open_is_asked_about(options: Options) -> None:
    query = halved()
    lower, upper = query.asked.network.intervals(CPU, query.asked.points, query.asked.points)
    assert lower.ravel().tolist() == [0, 0, 3, 3, 6, 6]
    assert upper.ravel().tolist() == [0, 3, 3, 6, 6, 9]
    assert query.searched(options, watch=True).verdict is Verdict.UNSAT
    assert {x.item() for x in query.questions} == {5.0}

    class Upwards(Blurred):
        def run(self, kernels: Any, *xs: Any) -> Any:
            return self.most.run(kernels, *xs)

    first, *rest = query.asked.network.nodes
    assert isinstance(first.op, Blurred)
    first = replace(first, op=Upwards(first.op.nominal, first.op.band))
    query.runtime = replace(query.runtime, nodes=(first, *rest))
    outcome = query.searched(options, watch=True)
    assert outcome.candidate is not None and outcome.candidate.inputs.tolist() == [5.0]
    assert outcome.candidate.outputs.tolist() == [9.0]


@pytest.mark.parametrize("answer", [12.0, 3.0, np.inf, np.nan])
def test_an_answer_outside_the_band_is_an_error(answer: float) -> None:
    problem = replace(halved().problem(), runtime=lambda x: np.array([answer]))
    with pytest.raises(SoundnessError, match="outside the band"):
        search(problem, Options(), Deadline.after(60), np.random.default_rng(0), Stats())


def test_one_op_with_a_band_makes_a_network_inexact() -> None:
    network = halved().asked.network
    assert not network.exact and not network.on(CPU).exact
    assert all(node.op.exact for node in network.nodes[1:])
    assert random_network(np.random.default_rng(0)).exact


# -- whole files -----------------------------------------------------------------------------------


def reader_of(change: Callable[[Requantize], AbstractOp]) -> Callable[..., Model]:
    """`read_model` with another op at every requantization."""

    def read(*arguments: Any) -> Model:
        found = read_model(*arguments)
        nodes = [
            replace(node, op=change(node.op)) if isinstance(node.op, Requantize) else node
            for node in found.lowered.network.nodes
        ]
        network = replace(found.lowered.network, nodes=tuple(nodes))
        return replace(found, lowered=replace(found.lowered, network=network))

    return read


def drift(op: Requantize, by: float, band: float) -> AbstractOp:
    """A band around another middle, `by` codes off."""
    return Blurred(replace(op, program=op.program.then("add", by)), band)


def drifting(rng: Rng) -> Callable[..., Model]:
    """A reader whose bands hold what onnxruntime computes, which is mostly not nominal."""

    def change(op: Requantize) -> AbstractOp:
        by = float(rng.uniform(-0.5, 0.5))
        return drift(op, by, abs(by) + 0.02)

    return reader_of(change)


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The inputs that onnxruntime is asked about."""
    asked_about: list[Any] = []
    ask = Leaves.ask

    def noted(leaves: Leaves, inputs: Any, lower: Any, upper: Any) -> Any:
        asked_about.append(inputs)
        return ask(leaves, inputs, lower, upper)

    monkeypatch.setattr(Leaves, "ask", noted)
    return asked_about


@intel
def test_files_are_decided_by_what_onnxruntime_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: list[Any]
) -> None:
    """Random files whose network, as read, knows many values within bands only."""
    monkeypatch.setattr(verification, "read_model", drifting(np.random.default_rng(0)))
    seen = Counter[Verdict]()
    for instance in instances(3, 24 * ROUNDS, tmp_path, most=12):
        for attack in (True, False):
            seen[instance.verified(timeout=20, attack=attack, sweep=attack).verdict] += 1
    assert len(questions) > 10 and min(seen[v] for v in (Verdict.SAT, Verdict.UNSAT)) > 5


def test_images_are_decided_by_what_onnxruntime_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: list[Any]
) -> None:
    """Ties among them: where the bands leave an image's label open, the file is asked."""
    form, options = FORMS["uint8"], Options(device="cpu")
    path = classifier(form, tmp_path / "m.onnx", gain=0.2)  # coarse scores
    pixels, labels = some_images(path, form, 60)
    expected = {(i, F(1)): truth(path, form, pixels[i], int(labels[i]), 1) for i in range(60)}
    exact = certify(path, pixels, labels, 1, options)
    assert not questions
    monkeypatch.setattr(robustness, "read_model", drifting(np.random.default_rng(1)))
    banded = certify(path, pixels, labels, 1, options)
    assert verdicts(banded) == expected == verdicts(exact) and len(set(expected.values())) == 3
    assert [level.ties for level in banded.levels] == [level.ties for level in exact.levels]
    assert len(questions) > 5


def halving(folder: Path, least: int) -> tuple[Path, Path]:
    """A file that halves the sum of two codes, and a property that asks for `least` or more."""
    g = Graph()
    one, zero = g.f32(1.0), g.const(np.uint8(0))
    weight = g.const(np.ones((2, 1)), np.int8)
    ends = one, zero, weight, one, g.const(np.int8(0)), g.f32(2.0), zero
    y = g.node("QLinearMatMul", g.input((1, 2), np.uint8), *ends)
    declared = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)"
    box = " ".join(f"(assert (>= X_{i} 0))(assert (<= X_{i} 8))" for i in range(2))
    spec = folder / "spec.vnnlib"
    spec.write_text(f"{declared} {box} (assert (>= Y_0 {least}))")
    return write(g.model(y), folder / "m.onnx"), spec


def test_a_file_outside_its_band_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the search, and whatever it would say."""
    model, spec = halving(tmp_path, least=10)
    monkeypatch.setattr(verification, "read_model", reader_of(lambda op: drift(op, 0.3, 0.5)))
    assert verify(model, spec, Options(device="cpu")).verdict is Verdict.UNSAT
    with pytest.raises(UsageError, match="no certificate"):
        verify(model, spec, Options(device="cpu", certificate=True))
    monkeypatch.setattr(verification, "read_model", reader_of(lambda op: drift(op, 3.0, 0.5)))
    with pytest.raises(SoundnessError, match="differ"):
        verify(model, spec, Options(device="cpu"))


def test_a_runtime_that_saturates_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU that computes other integers, a point that the band leaves open stays open."""
    model, spec = halving(tmp_path, least=9)
    monkeypatch.setattr(verification, "read_model", reader_of(lambda op: Blurred(op, 1.0)))
    monkeypatch.setattr(Engine, "_saturating", True)
    result = verify(model, spec, Options(device="cpu"))
    assert result.verdict is Verdict.UNKNOWN and "cannot be asked" in result.reason
