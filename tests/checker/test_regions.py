"""The checker's regions and refutations by intervals: whatever satisfies a case lies in one of its
regions, ties included; and they are those of the solver, since certificates number them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify.boundary.outputs import described_outputs, make_decoder
from qverify.bounds.dual import Dual
from qverify.bounds.unsafe_regions import make_unsafe_regions
from qverify.checker.bounds import Net
from qverify.checker.regions import Compiler, Inequality, UnsafeRegions, refuted
from qverify.frontend.lower import Lowered
from qverify.frontend.model import read_model
from qverify.kernels import open_kernels
from qverify.property import Case, Row
from tests.graphs import Graph, write

CPU = open_kernels("cpu")
EXAMPLES = Path(__file__).parents[2] / "specs" / "examples"
Rng = np.random.Generator


def graph(outputs: str) -> Graph:
    """Two inputs and two layers; the last one has channels of its own scales."""
    rng, g = np.random.default_rng(0), Graph()
    x = g.quantize(g.input((1, 2)), 0.05, np.asarray(128, np.uint8))
    zero, ends = (
        g.const(np.asarray(128, np.uint8)),
        (g.f32(0.05), g.const(np.asarray(100, np.uint8))),
    )
    w = g.const(rng.integers(-128, 128, (2, 3)).astype(np.int8))
    x = g.node("QGemm", x, g.f32(0.05), zero, w, g.f32(0.01), g.const(np.int8(0)), "", *ends)
    w = g.const(rng.integers(-128, 128, (3, 3)).astype(np.int8))
    scales = g.f32([0.01, 0.003, 0.02]) if outputs == "channels" else g.f32(0.01)
    zeros = g.const(np.zeros(3 if outputs == "channels" else (), np.int8))
    last = () if outputs == "accumulators" else (g.f32(0.07), zero)
    y = g.node("QGemm", x, *ends, w, scales, zeros, "", *last)
    if outputs == "codes":
        g.outputs = y  # type: ignore[attr-defined]
    elif outputs == "falling":
        y = g.node("Neg", g.dequantize(y, 0.07, np.asarray(128, np.uint8)))
    elif outputs != "accumulators":
        y = g.dequantize(y, 0.07, np.asarray(128, np.uint8))
    g.result = y  # type: ignore[attr-defined]
    return g


KINDS = ("one scale", "channels", "falling", "codes", "accumulators")


@pytest.fixture(params=[*KINDS, "tiny_mlp_qdq", "mnist_mlp_qop"])
def lowered(request: pytest.FixtureRequest, tmp_path: Path) -> Lowered:
    if request.param not in KINDS:
        return read_model(EXAMPLES / "onnx" / f"{request.param}.onnx").lowered
    g: Any = graph(request.param)
    return read_model(write(g.model(g.result), tmp_path / "model.onnx")).lowered


def random_rows(rng: Rng, y: Any, count: int) -> list[Row]:
    """Rows of one to three terms whose right-hand sides are values that occur, or lie beside
    one."""
    rows = []
    for _ in range(count):
        chosen = np.sort(rng.permutation(y.shape[1])[: rng.choice([1, 2, 2, 3])])
        pool = (
            [Fraction(1), Fraction(-1)]
            if rng.random() < 0.5
            else [Fraction(7, 10), Fraction(-3), Fraction(1, 3)]
        )
        terms = tuple((int(j), pool[rng.integers(len(pool))]) for j in chosen)
        at = y[rng.integers(len(y))]
        rhs = sum((c * Fraction(float(at[j])) for j, c in terms), Fraction(0))
        rhs += Fraction(int(rng.choice([0, 0, 3, -35])), 21)
        rows.append(Row((), terms, rhs, bool(rng.integers(2))))
    return rows


def holds(row: Row, y: Any) -> bool:
    value = sum((c * Fraction(float(y[j])) for j, c in row.y), Fraction(0))
    return value < row.rhs if row.strict else value <= row.rhs


def at(inequality: Inequality, values: list[Any], n: int) -> int:
    return (
        sum(c * int(values[v][n].reshape(-1)[e]) for v, e, c in inequality.terms)
        + inequality.constant
    )


def compiled(
    lowered: Lowered, rng: Rng, radius: int
) -> tuple[UnsafeRegions, Any, list[Case], Any, list[Any]]:
    """Random cases over a random box: their regions, the solver's, the cases, sampled outputs and
    values."""
    network, decoder = lowered.network, make_decoder(lowered)
    centre = rng.integers(0, 255, (1, network.input_type.size), endpoint=True)
    low, high = np.maximum(centre - radius, 0), np.minimum(centre + radius, 255)
    x = rng.integers(low, high, size=(400, low.shape[1]), endpoint=True).astype(np.int32)
    x[:100] = np.where(rng.random((100, x.shape[1])) < 0.5, low, high)
    values = network.values(CPU, x)
    y = decoder.decode(network.flat_outputs(CPU, values))
    rows = random_rows(rng, y, 40)
    cases: list[Case] = [
        *((row,) for row in rows[:24]),
        *zip(rows[24:32], rows[32:], strict=True),
        tuple(rows[:9]),
    ]
    root, _ = Net(network, {}).part(1, {}, [(low, high), *([None] * len(network.nodes))])
    dual, outputs = Dual.make(network, CPU), described_outputs(lowered)
    tables = {k for k, rule in enumerate(dual.rules, 1) if getattr(rule, "name", "") == "staircase"}
    unsafe = Compiler(network, outputs, root.intervals, tables).unsafe_regions(cases)
    boxes, _ = network.boxes(CPU, low.astype(np.int32), high.astype(np.int32))
    return unsafe, make_unsafe_regions(network, dual, outputs, cases, boxes), cases, y, values


@pytest.mark.parametrize("radius", [2, 60])
def test_what_satisfies_a_case_lies_in_one_of_its_regions(lowered: Lowered, radius: int) -> None:
    unsafe, _, cases, y, values = compiled(lowered, np.random.default_rng(radius), radius)
    met = 0
    for case, numbers in zip(cases, unsafe.cases, strict=True):
        for n in range(0, len(y), 3):
            if numbers is not None and all(holds(row, y[n]) for row in case):
                met += 1
                assert any(
                    all(at(inequality, values, n) >= 0 for inequality in unsafe.regions[r])
                    for r in numbers
                )
    assert met > 50


@pytest.mark.parametrize("radius", [2, 60])
def test_regions_are_those_of_the_solver(lowered: Lowered, radius: int) -> None:
    for seed in range(3):
        unsafe, theirs, *_ = compiled(lowered, np.random.default_rng([seed, radius]), radius)
        numbered = [tuple(theirs.inequalities[i] for i in region) for region in theirs.regions]
        assert [[(i.terms, i.constant) for i in region] for region in unsafe.regions] == [
            [(i.terms, i.constant) for i in region] for region in numbered
        ]
        assert [None if numbers is None else tuple(numbers) for numbers in unsafe.cases] == list(
            theirs.cases
        )


def test_regions_of_one_or_two_steps_are_exact(lowered: Lowered) -> None:
    """A region of single steps holds only where its row does, too."""
    unsafe, _, cases, y, values = compiled(lowered, np.random.default_rng(5), 30)
    for case, numbers in zip(cases, unsafe.cases, strict=True):
        if len(case) > 1 or numbers is None:
            continue
        for r in numbers:
            region = unsafe.regions[r]
            if all(
                len(inequality.terms) == 1 and abs(inequality.terms[0][2]) == 1
                for inequality in region
            ):
                for n in range(0, len(y), 7):
                    if all(at(inequality, values, n) >= 0 for inequality in region):
                        assert holds(case[0], y[n])


def test_intervals_refute_what_no_output_satisfies() -> None:
    """Against exact rationals: refuted if and only if the least value fails, at ties as well."""
    rng = np.random.default_rng(9)
    low = rng.choice([0.1, 0.25, -3.0, 7e30, 1e-40], (60, 3)).astype(np.float32).astype(np.float64)
    high = low + rng.choice([0.0, 0.5, 1e-3], (60, 3)).astype(np.float32)
    numbers = [
        Fraction(1),
        Fraction(-1),
        Fraction(1, 3),
        Fraction(10) ** 300,
        Fraction(-1, 10**320),
        Fraction(22, 7),
    ]
    cases: list[Case] = []
    for _ in range(60):
        terms = tuple(
            (j, numbers[rng.integers(len(numbers))])
            for j in np.flatnonzero(rng.random(3) < 0.6).tolist()
        )
        ends = (low if rng.random() < 0.5 else high)[rng.integers(60)]
        rhs = sum(
            (c * Fraction(float(ends[j])) for j, c in terms), Fraction(int(rng.integers(2)), 10**30)
        )
        cases.append((Row((), terms, rhs, bool(rng.integers(2))),))
    cases += [cases[0] + cases[1], ()]
    found = refuted(cases, low, high)
    for n in range(60):
        for k, case in enumerate(cases):
            fails = [
                not holds(
                    row, [low[n, j] if dict(row.y).get(j, 0) > 0 else high[n, j] for j in range(3)]
                )
                for row in case
            ]
            assert found[n, k] == any(fails)
