"""The dual over whole networks: its bounds hold and are tighter, and outputs really are what
regions take them for."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import Options, Verdict, verify
from qverify.boundary.outputs import described_outputs, make_decoder
from qverify.bounds.dual import Dual
from qverify.bounds.intermediate import crown_bounds
from qverify.bounds.unsafe_regions import UnsafeRegions, make_unsafe_regions
from qverify.deadline import Deadline
from qverify.frontend.encoder import make_encoder
from qverify.frontend.lower import codes_of
from qverify.frontend.model import read_model
from qverify.kernels import open_kernels
from qverify.property import Row

CPU = open_kernels("cpu")
EXAMPLES = Path(__file__).parents[2] / "specs" / "examples"
MODELS = sorted((EXAMPLES / "onnx").glob("*.onnx"))


def refuted_cases(regions: UnsafeRegions, dual: Dual, values: Any) -> Any:
    """The cases that last-layer intervals and CROWN slopes refute on one box, [cases]."""
    every, empty = np.ones(len(regions.cases), np.bool_), np.zeros(len(regions.regions), np.bool_)
    for shift, bound in ((0, dual.last_layer), (regions.precision(), dual.upper)):
        empty |= regions.refuted(dual, bound, shift, values, every)[0]
    return regions.refuted_cases(empty[None])[0]


@pytest.fixture(params=MODELS, ids=lambda p: p.stem)
def lowered(request: pytest.FixtureRequest):
    return read_model(request.param).lowered


def random_box(size: int, radius: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    centre = np.random.default_rng(seed).integers(0, 255, size=(1, size), endpoint=True)
    return np.maximum(centre - radius, 0).astype(np.int32), np.minimum(centre + radius, 255).astype(
        np.int32
    )


@pytest.mark.parametrize("radius", [0, 1, 4, 30])
def test_inner_bounds_hold_and_are_no_looser(lowered, radius: int) -> None:
    network = lowered.network
    dual = Dual.make(network, CPU)
    lower, upper = random_box(network.input_type.size, radius, radius)
    clamps = crown_bounds(dual, lower, upper, len(network.nodes), Deadline.after(None)).clamps
    rng = np.random.default_rng(1)
    x = rng.integers(lower[0], upper[0], size=(300, lower.shape[1]), endpoint=True, dtype=np.int32)
    x[:100] = np.where(rng.random((100, lower.shape[1])) < 0.5, lower, upper)
    values = network.values(CPU, x)
    (plain, _), (clamped, possible) = (network.boxes(CPU, lower, upper, c) for c in (None, clamps))
    assert possible.all()
    for k, value in enumerate(values):
        low, high = clamped[k]
        assert (low <= value).all() and (value <= high).all()
        assert (plain[k][0] <= low).all() and (high <= plain[k][1]).all()


def test_outputs_are_the_lines_they_are_taken_for(lowered) -> None:
    encoder, decoder = make_encoder(lowered), make_decoder(lowered)
    rng = np.random.default_rng(2)
    x = encoder.encode(rng.uniform(0, 1, size=(200, len(encoder.is_float))))
    values = lowered.network.values(CPU, x)
    y = decoder.decode(lowered.network.flat_outputs(CPU, values))
    start = 0
    for described, (_, output) in zip(described_outputs(lowered), lowered.outputs, strict=True):
        line, levels = described.line, described.levels
        assert line is not None
        size = codes_of(output).type.size
        v = values[line.value].reshape(len(x), -1)
        for i in range(size):
            for n in range(0, len(x), 7):
                rest = Fraction(y[n, start + i]) / Fraction(2) ** line.unit - int(
                    line.slope[i]
                ) * int(v[n, i])
                assert line.lower[i] <= rest <= line.upper[i]
        if levels is not None:
            codes = values[levels.value].reshape(len(x), -1)[:, levels.index]
            assert (levels.levels[codes - levels.low] == y[:, start : start + size]).all()
        start += size


def test_a_refuted_row_never_holds(lowered) -> None:
    """Rows with thresholds around what outputs reach: whatever is refuted holds at no sampled
    point, ties included."""
    network, decoder = lowered.network, make_decoder(lowered)
    dual = Dual.make(network, CPU)
    lower, upper = random_box(network.input_type.size, 3, 9)
    rng = np.random.default_rng(3)
    x = rng.integers(lower[0], upper[0], size=(300, lower.shape[1]), endpoint=True, dtype=np.int32)
    y = decoder.decode(network.run(CPU, x))
    rows = []
    for _ in range(60):
        c = [
            Fraction(int(v), int(rng.integers(1, 4)))
            for v in rng.integers(-3, 4, size=decoder.size)
        ]
        terms = tuple((i, v) for i, v in enumerate(c) if v)
        if terms:
            least = min(sum((v * Fraction(point[i]) for i, v in terms), Fraction(0)) for point in y)
            shift = Fraction(int(rng.integers(-3, 2)), int(rng.integers(1, 5)))
            rows.append(Row((), terms, least + shift, bool(rng.integers(2))))
    boxes, _ = network.boxes(CPU, lower, upper)
    regions = make_unsafe_regions(
        network, dual, described_outputs(lowered), [(row,) for row in rows], boxes
    )
    assert all(case is not None for case in regions.cases)
    clamps = crown_bounds(dual, lower, upper, regions.last, Deadline.after(None)).clamps
    values = network.boxes(CPU, lower, upper, clamps)[0]
    refuted = refuted_cases(regions, dual, values)
    twice = make_unsafe_regions(
        network, dual, described_outputs(lowered), [(row, row) for row in rows], boxes
    )
    assert (refuted_cases(twice, dual, values) >= refuted).all()
    for row in np.flatnonzero(refuted):
        value = min(
            sum((v * Fraction(point[i]) for i, v in rows[row].y), Fraction(0)) for point in y
        )
        assert value >= rows[row].rhs if rows[row].strict else value > rows[row].rhs


def test_backward_bounds_prove_what_intervals_leave_open() -> None:
    model, spec = (
        EXAMPLES / "onnx" / "mnist_mlp_qop.onnx",
        EXAMPLES / "vnnlib" / "mnist_2_eps_8.vnnlib",
    )
    with_them = verify(model, spec, Options(timeout=30, attack=False))
    without = verify(model, spec, Options(timeout=1, attack=False, backward=False))
    assert (with_them.verdict, without.verdict) == (Verdict.UNSAT, Verdict.TIMEOUT)
