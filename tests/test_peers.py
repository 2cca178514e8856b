"""The peers' encodings against brute force, and against the integer network, on a few small
networks.

The long run is `benchmarks/peers/agree.py`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import agree, paper2023, run
from benchmarks.peers.decide import Answer, decide
from benchmarks.peers.encoding import CPU, Formula, Steps, Unsupported, encode_network
from benchmarks.peers.lines import additive, simplest
from benchmarks.peers.workers import PACKAGES, Workers, missing
from qverify.boundary.domain import make_domain
from tests import test_brute_force
from tests.kernels.strict import open_strict

SAMPLES = 12

pytestmark = test_brute_force.pytestmark
needs_solvers = pytest.mark.skipif(
    bool(missing()), reason=f"not installed: {', '.join(missing())} (pip install '.[peers]')"
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[agree.Sample]:
    """Random networks and properties that the encodings carry, with the truth; half are sat."""
    folder, found = tmp_path_factory.mktemp("peers"), list[agree.Sample]()
    for k in range(100):
        sample = agree.draw(np.random.default_rng([7, k]), agree.DECIDED[len(found) % 2], folder)
        if "Mean" not in sample.ops and "Softmax" not in sample.ops and not mixed(sample):
            found.append(sample)
        if len(found) == SAMPLES:
            break
    return found


def mixed(sample: agree.Sample) -> bool:
    return any(
        row.x for query in sample.instance.property.queries for case in query.cases for row in case
    )


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as running:
        yield running


@needs_solvers
@pytest.mark.parametrize("name", PACKAGES)
def test_encoding_equals_brute_force(
    name: str, samples: list[agree.Sample], workers: Workers
) -> None:
    truth = Counter(sample.truth for sample in samples)
    assert min(truth["sat"], truth["unsat"]) >= 3
    for sample in samples:
        answer = decide(sample.instance, workers.solver(name), 60)
        assert answer.verdict == sample.truth, (answer, sample.ops)


def test_paper_equals_brute_force(samples: list[agree.Sample]) -> None:
    """One box at a time, as the text has it; many; and many on a machine that calls itself a
    GPU."""
    for how in ((CPU, 1), (CPU, 64), (open_strict(), 64)):
        assert [paper2023.decide(sample.instance, 60, *how).verdict for sample in samples] == [
            s.truth for s in samples
        ]


def test_formula_computes_the_network(samples: list[agree.Sample]) -> None:
    rng = np.random.default_rng(1)
    for sample in samples:
        instance = sample.instance
        lower, upper = make_domain(instance.encoder, instance.property.queries[0].box).code_box()
        formula, outputs = encode_network(instance.network, lower, upper)
        codes = rng.integers(lower, upper, size=(20, len(lower)), endpoint=True, dtype=np.int32)
        wanted = instance.network.run(CPU, codes)
        for row, expected in zip(codes.tolist(), wanted.tolist(), strict=True):
            values = formula.evaluate(row)
            assert [values[v] for v in outputs] == expected, sample.ops
            assert all(
                a <= v <= b for a, v, b in zip(formula.lower, values, formula.upper, strict=True)
            )


def test_false_counterexamples_are_errors(samples: list[agree.Sample]) -> None:
    for sample in samples:
        if sample.truth == "unsat":
            answer = decide(
                sample.instance, lambda formula, _: Answer("sat", codes=tuple(_lower(formula))), 60
            )
            assert answer.verdict in ("error", "unsat")


def _lower(formula: Formula) -> list[int]:
    return [formula.lower[v] for v in formula.inputs]


def test_ops_without_a_form_are_named(tmp_path: Path) -> None:
    for k in range(200):
        sample = agree.draw(np.random.default_rng([8, k]), "unsat", tmp_path)
        if {"Mean", "Softmax"} & set(sample.ops.split()):
            lower, upper = make_domain(
                sample.instance.encoder, sample.instance.property.queries[0].box
            ).code_box()
            with pytest.raises(Unsupported, match=r"^(Mean|Softmax)$"):
                encode_network(sample.instance.network, lower, upper)
            return
    raise AssertionError("no network with Mean or Softmax")


def test_a_line_is_exactly_the_steps() -> None:
    rng, lines = np.random.default_rng(2), 0
    for _ in range(200):
        gap, start = float(rng.uniform(1, 40)), int(rng.integers(-500, 500))
        count = int(rng.integers(2, 40))
        uneven = rng.random() < 0.3
        starts = [
            start + round(k * gap + (float(rng.normal()) if uneven else 0)) for k in range(count)
        ]
        if len(set(starts)) < count or starts != sorted(starts):
            continue
        steps = Steps(0, 1, (start - 5, *(s + 1 for s in starts)), tuple(range(count + 1)))
        line = steps.line()
        if line is None:
            continue
        lines += 1
        p, q, r = line
        for x in range(start - 5, starts[-1] + 60):
            assert min(max((r * x - q) // p, 0), count) == steps.at(x)
    assert lines > 50


def test_additive_tables() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        m, n = (float(v) for v in rng.choice([-1, 1], 2) * rng.uniform(0.05, 1.5, 2))
        a, b = np.arange(64)[:, None], np.arange(50)
        table = np.clip(np.rint(m * (a - 20) + n * (b - 25) + 7), 0, 40).astype(np.int64)
        found = additive(table)
        assert found is not None
        at = np.searchsorted(found.starts, found.m * a + found.n * b, side="right") - 1
        np.testing.assert_array_equal(np.array(found.values)[at], table)
    product = np.rint((a - 20) * (b - 25) / 16).astype(np.int64)
    assert additive(product) is None


def test_simplest_fraction() -> None:
    for a in range(0, 12):
        for b in range(a + 1, 24):
            low, high = Fraction(a, 7), Fraction(b, 9)
            if low < high:
                best = simplest(low, high)
                assert low < best < high
                n = best.denominator
                assert all(
                    not low * m < k < high * m
                    for m in range(1, n)
                    for k in range(int(low * m), int(high * m) + 2)
                )


def test_a_contradiction_is_loud() -> None:
    row = {"onnx": "a", "vnnlib": "b", "reason": "", "seconds": "1", "timeout": "5"}
    rows = [
        {**row, "peer": "smt", "verdict": "sat"},
        {**row, "peer": "qverify", "verdict": "unsat"},
    ]
    assert "CONTRADICTION" in run.contradictions(rows)[0]
    assert not run.contradictions([rows[0], {**rows[1], "verdict": "timeout"}])
    assert "| qverify | 1 | 0 | 1 |" in run.table(rows, ["smt", "qverify"])


def test_a_peer_that_is_not_installed_is_not_beaten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is not asked, and the table has no figures of it."""
    monkeypatch.setitem(PACKAGES, "smt", "a_package_that_nobody_has")
    monkeypatch.setattr(run, "ask", lambda peer, *_: ("unsat", "", 1.0))
    (tmp_path / "i.csv").write_text("a.onnx,b.vnnlib,5\n")
    out = tmp_path / "rows.csv"
    arguments = [
        "run.py",
        str(tmp_path / "i.csv"),
        "--peers",
        "smt,paper2023,qverify",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert run.main() == 0
    text = out.with_suffix(".md").read_text()
    assert (
        "| smt | not installed | - | - | - | - | - | - | - |" in text
        and "| paper2023 | 1 | 0 | 1 |" in text
    )
    assert "1 instances" in text and "smt" not in out.read_text()
