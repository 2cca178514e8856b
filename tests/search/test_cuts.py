"""The search by cuts on neurons against brute force: random small networks and properties whose
boxes would be split along the inputs otherwise; with a watched point, which is a counterexample
wherever there is one."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qverify import Options, Result, Verdict, verify
from qverify.bounds import unsafe_regions
from qverify.checker import check
from qverify.deadline import Deadline
from qverify.errors import UnsupportedModel
from qverify.frontend.model import read_model
from qverify.kernels import Kernels, open_kernels
from qverify.kernels.gpu import CudaKernels
from qverify.ops import Dense, Type, relax
from qverify.property import Box, Query
from qverify.property import Row as Condition
from qverify.result import Stats
from qverify.search import bab, bounds, cuts, watch
from qverify.search.bounds import Boxes, backward_bounds, refute
from qverify.search.cuts import NeuronCuts
from qverify.search.frontier import Subproblems
from qverify.search.knowledge import Knowledge
from qverify.search.memory import subproblem_batch
from qverify.search.observer import Observer
from qverify.search.proof import Proof
from qverify.search.run import Run
from tests.graphs import ROUNDS, Graph, write
from tests.kernels.strict import open_strict
from tests.networks import CPU, Maker, all_points
from tests.search.queries import Asked, asked
from tests.test_brute_force import (
    Row,
    check_witness,
    network,
    points_of,
    random_box,
    random_case,
    specification,
)

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the formulas are those of x86-64"
)

CHUNKS, EACH = 3, 10
Rng = np.random.Generator


@dataclass
class Instance:
    """A network, a property, and what brute force says of it."""

    net: Any
    box: Any
    cases: list[list[Row]]
    expected: Verdict
    allowed: set[Verdict]  # also `unknown`, where readings of the property's numbers differ
    point: tuple[float, ...]  # in the box; a counterexample where there is one
    model: Path
    spec: Path
    folder: Path

    @property
    def mixed(self) -> bool:
        return any(row.x for case in self.cases for row in case)

    def verified(self, **options: Any) -> Result:
        """The result, after the test that it is right."""
        result = verify(self.model, self.spec, Options(device="cpu", **options))
        assert result.verdict in self.allowed, (
            result,
            options,
            [n.op_type for n in self.net.g.nodes],
        )
        if result.witness is not None:
            check_witness(self.net, result.witness, self.box, self.cases, self.folder / "part.onnx")
        return result


def instances(seed: Any, count: int, folder: Path, most: int = 40) -> Iterator[Instance]:
    """Random instances, about as many of either verdict; `most`: how many codes wide a box is."""
    rng, verdicts = np.random.default_rng(seed), Counter[Verdict]()
    part, model, spec = folder / "part.onnx", folder / "model.onnx", folder / "spec.vnnlib"
    while sum(verdicts.values()) < count:
        net = network(rng)
        wide = len(net.doors) < 2
        box = random_box(net, {2: most, 3: most // 3, 4: most // 6}[net.size] if wide else 5)
        points = points_of(net, *box, part)
        if points is None:
            continue
        rarer = min((Verdict.SAT, Verdict.UNSAT), key=lambda v: verdicts[v])
        for _ in range(5):
            cases = [random_case(rng, points) for _ in range(int(rng.integers(1, 4)))]
            holds = [np.logical_and.reduce([points.holds(row) for row in case]) for case in cases]
            expected = Verdict.SAT if np.any(holds) else Verdict.UNSAT
            if expected == rarer:
                break
        at, case = int(rng.integers(len(points.first))), cases[0]
        if expected is Verdict.SAT:
            k, at = (int(v) for v in rng.permutation(np.argwhere(holds))[0])
            case = cases[k]
        signs = {i: c for row in case for i, c in row.x.items()}
        point = [
            (points.last if signs.get(i, 1) < 0 else points.first)[at, i] for i in range(net.size)
        ]
        write(net.g.model(*net.outputs), model)
        spec.write_text(specification(net, *box, points.y.shape[1], cases))
        try:
            read_model(model)
        except UnsupportedModel:
            continue
        verdicts[expected] += 1
        allowed = points.verdicts(cases)
        yield Instance(
            net, box, cases, expected, allowed, tuple(float(v) for v in point), model, spec, folder
        )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Small boxes are searched by cuts; and what came by is counted."""
    counts = Counter[str]()
    monkeypatch.setattr(bab, "SPLITTABLE", 0)

    def spy(place: Any, name: str) -> None:
        right = getattr(place, name)

        def counted(*args: Any, **more: Any) -> Any:
            counts[name] += 1
            return right(*args, **more)

        monkeypatch.setattr(place, name, counted)

    spy(bab, "cut_neurons")
    spy(cuts.NeuronCuts, "step")
    for name in ("boxes", "parts", "refuted", "regions", "bounds"):
        spy(watch.Watch, name)
    return counts


@pytest.mark.parametrize("chunk", range(CHUNKS * ROUNDS))
def test_the_search_by_cuts_equals_brute_force(
    chunk: int, tmp_path: Path, seen: Counter[str]
) -> None:
    verdicts = Counter[Verdict]()
    for k, own in enumerate(instances([1, chunk], EACH, tmp_path)):
        verdicts[own.expected] += 1
        exact = not own.mixed
        own.verified(certificate=exact, seed=k)
        result = own.verified(attack=False, certificate=exact)
        proved = result.verdict is Verdict.UNSAT
        assert (
            not exact or not proved or result.certificate is not None or result.details["warnings"]
        )
        own.verified(attack=False, watch=own.point)  # no SoundnessError
    assert min(verdicts[v] for v in (Verdict.SAT, Verdict.UNSAT)) >= EACH // 5
    assert seen["cut_neurons"] and seen["boxes"] >= EACH and seen["regions"]


def test_an_inequality_of_a_value_without_axes_keeps_its_weight() -> None:
    maker = Maker(np.random.default_rng(0), 2)
    scalar = maker.network(maker.move(0, (), [1]))
    box = Box((Fraction(0),) * 2, (Fraction(5),) * 2)
    for least, closed in ((4, False), (6, True)):  # Y_0 >= least
        row = Condition((), ((0, Fraction(-1)),), Fraction(-least), False)
        problem = Asked(scalar, Query(box, ((row,),)), None, np.ones(1)).problem()
        none = np.zeros((1, 1), np.bool_)
        boxes, limit = Boxes(*problem.root), Deadline.after(None)
        found = refute(Knowledge(problem), boxes, none, backward_bounds(False), limit)
        assert found.all() == closed


@pytest.mark.parametrize("share,count", [(1.0, 16), (0.4, 30), (0.0, 30)])
def test_trees_of_cuts_on_integer_networks(
    share: float, count: int, seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with hardly a step of improvement, and when only some of the proofs are taken, or none:
    then the cuts themselves have to decide, down to single codes. Every other query does without
    backward bounds before the cuts."""
    if share < 1:
        hobble(monkeypatch, share)
    verdicts = Counter[Verdict]()
    for seed in range(count * ROUNDS):
        off = seed % 2 == 0
        monkeypatch.setattr(bab, "refute", leave if off else refute)
        rng = np.random.default_rng([3, seed])
        own = asked(rng, 600 if share else 60)
        verdicts[own.expected] += 1
        for watched in (None, own.watched(rng), rng.choice(own.points)):
            assert own.searched(watched, Proof()).verdict == own.expected, seed
    assert min(verdicts.values()) >= count // 5
    assert (
        min(seen[name] for name in ("refuted", "parts", "bounds")) >= count
        and seen["step"] >= count // 2
    )


def leave(known: Knowledge, boxes: Boxes, refuted: Any, *_: Any) -> Any:
    """No backward bound refutes anything."""
    return refuted


def classifier(seed: int) -> Asked:
    """Three codes, two layers and five scores: is another one as large as the first, less what few
    points reach?"""
    rng = np.random.default_rng([8, seed])
    maker = Maker(rng, 3)
    hidden = maker.requantize(maker.dense(0, 6))
    scores = maker.requantize(maker.dense(hidden, 5), channels=False)
    points = all_points(np.zeros(3, np.int64), np.full(3, 7))
    net = maker.network(scores)
    y = net.run(CPU, points).astype(np.int64)
    gaps = y[:, :1] - y[:, 1:]
    margin = int(gaps.min()) - int(rng.random() < 0.5)
    one = Fraction(1)
    cases = tuple((Condition((), ((0, one), (j, -one)), Fraction(margin)),) for j in range(1, 5))
    return Asked(
        net,
        Query(Box((Fraction(0),) * 3, (Fraction(7),) * 3), cases),
        points,
        (gaps <= margin).any(axis=1),
    )


def classifiers(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Some that bounds of the whole box do not decide; those of several regions have to be
    taken."""
    monkeypatch.setattr(bab, "SPLITTABLE", 0)
    monkeypatch.setattr(bab, "refute", leave)
    return [classifier(seed) for seed in range(8)]


@pytest.mark.parametrize("kernels", [CPU, open_strict()], ids=lambda own: own.name)
def test_regions_in_groups_end_as_one_by_one(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict does not depend on how many regions are bounded at once, and every one has its
    place in the proof."""
    tried = Counter[Verdict]()
    for own in classifiers(monkeypatch)[: None if kernels is CPU else 2]:
        for most in (1, 2, 256):
            monkeypatch.setattr(NeuronCuts, "_batch_size", lambda self, most=most: most)
            proof = Proof()
            assert (
                own.searched(own.watched(np.random.default_rng(0)), proof, kernels).verdict
                == own.expected
            )
            assert own.expected is Verdict.SAT or -1 not in proof.kind
            tried[own.expected] += len(proof.regions) > 2
    assert kernels is not CPU or min(tried.values()) > 2


def test_the_worst_region_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one: what is left out when the first is not closed are the others, from bad to
    good."""
    queries = classifiers(monkeypatch)
    monkeypatch.setattr(NeuronCuts, "_batch_size", lambda self: 1)
    monkeypatch.setattr(cuts, "ROOT_PHASES", ((1, 0.1),))
    seen: list[Any] = []
    honest = NeuronCuts.root

    def root(self: NeuronCuts, provenance: Any, to_the_end: bool = True) -> Any:
        guesses = bounds.region_guesses(self.relaxed, self.root_values, provenance.region, 1)
        guess = dict(zip(provenance.region.tolist(), guesses.tolist(), strict=True))
        result = honest(self, provenance, to_the_end)
        seen.append([guess[r] for r in result[1].region.tolist()])
        assert not seen[-1] or max(guess.values()) >= seen[-1][0]
        return result

    monkeypatch.setattr(NeuronCuts, "root", root)
    for own in queries:
        own.searched(None, Proof())
    assert max(map(len, seen)) > 1 and all(own == sorted(own, reverse=True) for own in seen)


def hobble(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Improve little, and take this share of the proofs only."""
    right, rng = unsafe_regions.proved, np.random.default_rng(0)

    def sometimes(*args: Any) -> Any:
        done, precision = right(*args)
        return done & (rng.random(len(done)) < share), precision

    monkeypatch.setattr(bounds, "proved", sometimes)
    monkeypatch.setattr(cuts, "ROOT_PHASES", ((1, 0.1),))
    monkeypatch.setattr(cuts, "PHASES", ((1, 0.1),))


# -- what once gave a wrong `unsat` ----------------------------------------------------------------


def needle(folder: Path, inputs: int, looked_at: int, deep: int) -> tuple[Path, list[float], float]:
    """A network of 8 bits whose first output is large at one vector of `looked_at` codes only,
    behind `deep` layers of one steep neuron each; that vector as inputs; and the output there."""
    g, rng = Graph(), np.random.default_rng(1)
    x = g.quantize(g.input((1, inputs)), 0.05, np.asarray(128, np.uint8))
    at = rng.integers(-15, 15, looked_at)
    w, b = np.zeros((inputs, 2 * looked_at), np.int8), np.zeros(2 * looked_at, np.int32)
    for i, t in enumerate(at):
        w[i, 2 * i] = w[i, 2 * i + 1] = 1
        b[2 * i], b[2 * i + 1] = 1 - t, -t

    def layer(x: str, zero: int, weight: Any, bias: Any, *ends: str) -> str:
        codes, weights = g.const(np.asarray(zero, np.uint8)), g.const(np.asarray(weight, np.int8))
        zero_weight = g.const(np.asarray(0, np.int8))
        return g.node(
            "QGemm",
            x,
            g.f32(0.01),
            codes,
            weights,
            g.f32(0.01),
            zero_weight,
            g.const(np.asarray(bias, np.int32)),
            *ends,
        )

    steep = g.f32(0.01 / 300 * 0.01), g.const(np.asarray(0, np.uint8))
    h = layer(x, 128, w, b, *steep)
    h = layer(h, 0, np.tile([[1], [-1]], (looked_at, 1)), [1 - 255 * looked_at], *steep)
    for _ in range(deep):
        h = layer(h, 0, [[127]], [0], *steep)
    y = layer(h, 0, [[127, 1]], [0, 0])
    model = write(g.model(y), folder / "needle.onnx")
    point = [*(float(v) * 0.05 for v in at), *[0.0] * (inputs - looked_at)]
    return model, point, 255 * 127 * 1e-4


def needle_spec(folder: Path, inputs: int, box: float, rows: str) -> Path:
    declared = [f"(declare-const X_{i} Real)" for i in range(inputs)] + [
        f"(declare-const Y_{i} Real)" for i in range(2)
    ]
    ends = [f"(assert (>= X_{i} -{box}))\n(assert (<= X_{i} {box}))" for i in range(inputs)]
    spec = folder / "needle.vnnlib"
    spec.write_text("\n".join([*declared, *ends, rows]))
    return spec


@pytest.mark.parametrize("deep", [0, 12])
def test_floats_without_a_meaning_prove_nothing(deep: int, tmp_path: Path) -> None:
    """Behind many steep neurons the multipliers overflow float32: a part whose guides are NaN is no
    leaf."""
    model, point, top = needle(tmp_path, 14, 3, deep)
    spec = needle_spec(tmp_path, 14, 1.0, f"(assert (>= Y_0 {top - 0.1}))")
    options = Options(device="cpu", timeout=10, attack=False, watch=tuple(point))
    assert verify(model, spec, options).verdict in (Verdict.SAT, Verdict.TIMEOUT)


@pytest.mark.parametrize("far", ["1e2", "1e7", "1e8", "5e8", "1e9", "1e30"])
def test_a_row_without_a_meaning_changes_nothing(far: str, tmp_path: Path) -> None:
    """`Y_1 <= far` always holds; its constant must not wrap around and refute the case."""
    model, point, top = needle(tmp_path, 14, 3, 0)
    spec = needle_spec(tmp_path, 14, 1.0, f"(assert (>= Y_0 {top - 0.1}))\n(assert (<= Y_1 {far}))")
    options = Options(device="cpu", timeout=10, attack=False, watch=tuple(point))
    assert verify(model, spec, options).verdict in (Verdict.SAT, Verdict.TIMEOUT)
    hopeless = needle_spec(
        tmp_path, 14, 1.0, f"(assert (>= Y_0 {top + 1}))\n(assert (<= Y_1 {far}))"
    )
    found = verify(model, hopeless, Options(device="cpu", timeout=10, certificate=True))
    assert found.verdict is Verdict.UNSAT and found.certificate is not None
    (tmp_path / "proof").write_bytes(found.certificate)
    assert check(model, hopeless, tmp_path / "proof").verdict == "unsat"


def test_multipliers_beyond_int64_are_no_multipliers() -> None:
    assert relax.magnitude(CPU, np.array([-(2**63), 5])) == 2.0**63
    assert CPU.whole(np.array([np.nan, np.inf, -np.inf, 2.0**62, -(2.0**63), -3.5])).tolist() == [
        0,
        0,
        0,
        0,
        0,
        -4,
    ]


def test_a_batch_follows_the_memory() -> None:
    def batch(machine: str, size: int, free: int | None = None) -> int:
        nodes = [SimpleNamespace(type=Type((size,), 0, 255))]
        machines: dict[str, Kernels] = {
            "cpu": open_kernels("cpu"),
            "cuda": CudaKernels("", np, np, lambda: 1 << 60 if free is None else free),
        }
        network: Any = SimpleNamespace(nodes=nodes)
        return subproblem_batch(machines[machine], network)

    assert [batch("cpu", size) for size in (10, 10_000, 10**7)] == [256, 39, 2]
    assert [batch("cuda", size) for size in (10, 10_000, 10**7)] == [4096, 3355, 3]
    assert [batch("cuda", 10_000, free) for free in (1 << 40, 1 << 30, 0)] == [3355, 167, 2]


def parity(width: int) -> Asked:
    """An even sum is never one: bounds cannot see it, and the search has to go down to small
    boxes."""
    maker = Maker(np.random.default_rng(0), 3, 255)
    sum_ = maker.add(
        Dense(np.full((3, 1), 2, np.int64), np.array([-3 * width], np.int64), 0, 255), 0
    )
    points = all_points(np.zeros(3, np.int64), np.full(3, width))
    rows = (row_of(1, 1), row_of(-1, -1))
    box = Box((Fraction(0),) * 3, (Fraction(width),) * 3)
    return Asked(maker.network(sum_), Query(box, (rows,)), points, np.zeros(len(points), np.bool_))


def row_of(rhs: int, coefficient: int) -> Condition:
    return Condition((), ((0, Fraction(coefficient)),), Fraction(rhs))


def test_what_waits_on_the_host_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without memory to spare, and one with plenty: the same subproblems, the same proof, the
    same verdict."""
    monkeypatch.setattr(bab, "SPLITTABLE", 0)
    monkeypatch.setattr(bab, "refute", leave)
    monkeypatch.setattr(cuts, "ROOT_PHASES", ((2, 0.1),))
    monkeypatch.setattr(cuts, "PHASES", ((2, 0.1),))
    monkeypatch.setattr(NeuronCuts, "_batch_size", lambda self: 2)
    original, moved, found = Subproblems.moved, 0, []

    def counted(self: Subproblems, move: Any) -> Subproblems:
        nonlocal moved
        moved += 1
        return original(self, move)

    monkeypatch.setattr(Subproblems, "moved", counted)
    for room in (1 << 40, 200, 1):
        strict = open_strict()
        monkeypatch.setattr(type(strict), "resident_bytes", lambda self, most=room: most)
        before, proof = moved, Proof()
        outcome = parity(6).searched(None, proof, strict)
        assert outcome.verdict is Verdict.UNSAT
        found.append((proof.kind, proof.element, proof.threshold, proof.data))
        assert (moved > before) == (room < 1 << 40)
    assert found[0] == found[1] == found[2]


def test_a_search_without_open_regions_ends() -> None:
    """Once less is sought, bounds may refute all of it: nothing is left to cut. A doubt stays."""
    query = asked(np.random.default_rng(0))
    problem, stats, limit = query.problem(), Stats(), Deadline.after(None)
    observer = Observer(CPU, stats, limit)
    known = Knowledge(problem, observer)
    run, relaxed = Run(Options(), limit, known, observer), known.relaxed()
    assert relaxed is not None
    none = np.ones(len(known.sought.cases), np.bool_)
    assert bab.cut_neurons(run, relaxed, none).verdict is Verdict.UNSAT
    known.undecided = "a doubt"
    assert bab.cut_neurons(run, relaxed, none).verdict is Verdict.UNKNOWN


def test_less_is_sought_once_there_is_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree over the old regions begins anew, at most once in a search."""
    monkeypatch.setattr(bab, "SPLITTABLE", 0)
    monkeypatch.setattr(bab, "refute", leave)
    restarts: list[int] = []
    right = bab._searched

    def counted(run: Any, refuted: Any) -> Any:
        restarts[-1] += 1
        return right(run, refuted)

    def doubting(self: Any) -> Any:
        self.run.known.undecided = "a doubt"
        return step(self)

    step = NeuronCuts.step
    monkeypatch.setattr(NeuronCuts, "step", doubting)
    monkeypatch.setattr(bab, "_searched", counted)
    for seed in range(8):
        query, rng = classifier(seed), np.random.default_rng(0)
        problem = query.problem()
        problem = replace(problem, certain=problem.unsafe)
        restarts.append(0)
        options, limit = Options(attack=False, sweep=False), Deadline.after(60)
        outcome = bab.search(problem, options, limit, rng, Stats())
        if query.unsafe.any():
            assert outcome.verdict is Verdict.SAT
        else:  # a doubt forbids `unsat`, and comes with the first step
            assert outcome.verdict is (Verdict.UNKNOWN if restarts[-1] > 1 else Verdict.UNSAT)
    assert max(restarts) == 2  # the first search, and one more
