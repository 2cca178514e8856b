"""The search by cuts on neurons against brute force: random small networks and properties whose boxes would be split along
the inputs otherwise; with a watched point, which is a counterexample wherever there is one."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import Options, Result, Verdict, verify
from qverify.bounds import cover
from qverify.errors import UnsupportedModel
from qverify.search import bab, cuts, watch
from qverify.search.problem import Problem
from qverify.search.proof import Proof
from tests.graphs import ROUNDS, write
from tests.search.queries import asked
from tests.test_brute_force import Row, check_witness, network, points_of, random_box, random_case, specification

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
        assert result.verdict == self.expected, (result, options, [n.op_type for n in self.net.g.nodes])
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
        point = [(points.last if signs.get(i, 1) < 0 else points.first)[at, i] for i in range(net.size)]
        write(net.g.model(*net.outputs), model)
        spec.write_text(specification(net, *box, points.y.shape[1], cases))
        try:
            verify(model, spec, Options(device="cpu", timeout=1e-9))
        except UnsupportedModel:
            continue
        verdicts[expected] += 1
        yield Instance(net, box, cases, expected, tuple(float(v) for v in point), model, spec, folder)


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
    spy(bab, "split_boxes")
    spy(cuts.CutSearch, "step")
    for name in ("boxes", "parts", "refuted", "cover", "bounds"):
        spy(watch.Watch, name)
    return counts


@pytest.mark.parametrize("chunk", range(CHUNKS * ROUNDS))
def test_the_search_by_cuts_equals_brute_force(chunk: int, tmp_path: Path, seen: Counter[str]) -> None:
    verdicts = Counter[Verdict]()
    for k, own in enumerate(instances([1, chunk], EACH, tmp_path)):
        verdicts[own.expected] += 1
        exact = not own.mixed
        own.verified(certificate=exact, seed=k)
        result = own.verified(attack=False, certificate=exact)
        assert not exact or own.expected is Verdict.SAT or result.certificate is not None or result.details["warnings"]
        own.verified(attack=False, watch=own.point)  # no SoundnessError
    assert min(verdicts[v] for v in (Verdict.SAT, Verdict.UNSAT)) >= EACH // 5
    assert seen["cut_neurons"] and seen["boxes"] >= EACH and seen["cover"]


@pytest.mark.parametrize("share,count", [(1.0, 16), (0.4, 30), (0.0, 30)])
def test_trees_of_cuts_on_integer_networks(
    share: float, count: int, seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with hardly a step of improvement, and when only some of the proofs are taken, or none: then the cuts themselves
    have to decide, down to single codes. Every other query does without edges before the cuts."""
    if share < 1:
        hobble(monkeypatch, share)
    right, verdicts = Problem.refute, Counter[Verdict]()
    for seed in range(count * ROUNDS):
        off = seed % 2 == 0
        monkeypatch.setattr(Problem, "refute", (lambda self, lower, upper, status, deadline: status) if off else right)
        rng = np.random.default_rng([3, seed])
        own = asked(rng, 600 if share else 60)
        verdicts[own.expected] += 1
        for watched in (None, own.watched(rng), rng.choice(own.points)):
            assert own.searched(watched, Proof()).verdict == own.expected, seed
    assert min(verdicts.values()) >= count // 5
    assert min(seen[name] for name in ("refuted", "parts", "bounds")) >= count and seen["step"] >= count // 2


def hobble(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Improve little, and take this share of the proofs only."""
    right, rng = cover.proved, np.random.default_rng(0)

    def sometimes(*args: Any) -> Any:
        done, precision = right(*args)
        return done & (rng.random(len(done)) < share), precision

    monkeypatch.setattr(cuts, "proved", sometimes)
    monkeypatch.setattr(cuts, "ROOT", ((1, 0.1),))
    monkeypatch.setattr(cuts, "PHASES", ((1, 0.1),))
