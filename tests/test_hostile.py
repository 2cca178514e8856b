"""The scripts of `benchmarks/hostile` still run: a few of their networks, and their brute force
against known answers."""

from __future__ import annotations

import platform
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from benchmarks.hostile import cases, networks, oracle, planted
from tests.graphs import Graph, write

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the formulas are those of x86-64"
)

TIE = """(declare-const X_0 Real) (declare-const Y_0 Real)
(assert (>= X_0 0.1)) (assert (<= X_0 0.12)) {}
"""


def rounded(tmp_path: Path) -> Path:
    """Y = X rounded to 0.1, as float32."""
    g = Graph(21)
    x = g.input((1, 1))
    zero = np.array(3, np.uint8)
    return write(
        g.model(g.dequantize(g.quantize(x, 0.1, zero), 0.1, zero)), tmp_path / "model.onnx"
    )


@pytest.mark.parametrize(
    ("condition", "verdict"),
    [
        ("(assert (>= Y_0 0.05))", "sat"),
        ("(assert (< Y_0 0.1))", "unsat"),  # Y_0 is 0.1000000015, above it in double and exactly
        ("(assert (>= Y_0 0.10000000149011612))", "unknown"),  # holds in double, not exactly
        ("(assert (<= (+ X_0 Y_0) 0.2))", "unsat"),
        ("(assert (> Y_0 0.05)) (assert (> X_0 0.12))", "unsat"),
        ("(assert (>= (* 2 X_0) (+ Y_0 0.1)))", "sat"),
        (
            "(assert (<= X_0 (* 1 0.1)))",
            "unknown",
        ),  # X_0 = 0.1 holds as a decimal, its float32 is above
    ],
)
def test_brute_force_knows_readings(condition: str, verdict: str, tmp_path: Path) -> None:
    found = oracle.truth(rounded(tmp_path), oracle.parse_spec(TIE.format(condition)), tmp_path)
    assert found is not None and found.verdict == verdict


def test_brute_force_finds_every_cell(tmp_path: Path) -> None:
    brute = oracle.Brute(rounded(tmp_path), tmp_path)
    spec = oracle.parse_spec(TIE.format("").replace("0.12", "0.449"))
    each = brute.candidates(spec)
    assert each is not None and len(each[0]) == 4  # codes 1 to 4
    assert sorted({brute.outputs((f,)) for _, f in each[0]}) == [
        (float(np.float32(k) * np.float32(0.1)),) for k in range(1, 5)
    ]


def test_single_is_rounded_once() -> None:
    # a double cannot tell it from the middle
    middle = Fraction(1) + Fraction(1, 2**24) + Fraction(1, 2**80)
    assert oracle.single(middle) == float(np.nextafter(np.float32(1), np.float32(2)))


def test_a_false_witness_is_found_out(tmp_path: Path) -> None:
    model, spec = rounded(tmp_path), oracle.parse_spec(TIE.format("(assert (>= Y_0 0.05))"))
    assert oracle.witness_fault(model, spec, "((X_0 0.11)\n(Y_0 0.1))") is None
    for text in ("((X_0 0.13)\n(Y_0 0.1))", "((X_0 0.11)\n(Y_0 0.2))", "((X_0 0.11))"):
        assert oracle.witness_fault(model, spec, text)


def test_hostile_networks(tmp_path: Path) -> None:
    lines = [networks.one(8, index, tmp_path, lambda: None) for index in range(14)]
    assert [line["faults"] for line in lines if line.get("faults")] == []
    assert sum(line["status"] == "decided" for line in lines) >= 5
    assert "14 networks" in networks.summary(lines)


@pytest.mark.slow
def test_hostile_networks_in_processes(tmp_path: Path) -> None:
    lines = list(networks.Crew(7, tmp_path).run(list(range(6)), 2, float("inf")))
    assert sorted(line["index"] for line in lines) == list(range(6))


def test_planted(tmp_path: Path) -> None:
    for index in range(3):
        _, verdict, fault = planted.examine(7, index, tmp_path, 1.0)
        assert not fault and verdict != "unsat"


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names) > 100


def test_a_missing_case_is_told(tmp_path: Path) -> None:
    assert cases.decide(cases.CASES[0], tmp_path, tmp_path)[0] == "missing"
