"""The ends of float arithmetic: infinities, NaN, roundings that leave int32, nothing at all. Read
exactly or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.hostile.one_op import all_graphs
from benchmarks.hostile.one_op_graphs import GENERATORS
from qverify.errors import UnsupportedModel
from qverify.frontend.model import read_model
from qverify.ops import FloatProgram, Mean, Requantize, Type
from tests.frontend.test_onnxruntime_ops import Case, compare
from tests.graphs import ROUNDS, Graph, write

U8 = np.dtype(np.uint8)
ZERO = np.array(0, np.uint8)
EVERY = np.arange(256, dtype=np.uint8)[None]


@pytest.mark.parametrize("op", GENERATORS)
def test_one_op_at_a_time(op: str, tmp_path: Path) -> None:
    """A few graphs of every op; benchmarks/hostile/one_op.py makes as many as you like."""
    results = list(all_graphs(op, 8 * ROUNDS, 99, tmp_path / "one.onnx"))
    assert not [
        text for outcome, _, different, text in results if different or outcome == "crashed"
    ]
    assert any(outcome == "ran" for outcome, *_ in results)


def refusal(g: Graph, output: str, path: Path) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        read_model(write(g.model(output), path / "model.onnx"))
    return str(caught.value)


def test_an_infinite_factor_is_refused(tmp_path: Path) -> None:
    """Of an accumulator of zero it makes NaN, between two ends that are no NaN."""
    for op in ("MatMulIntegerToFloat", "QGemm"):
        g = Graph()
        x, w, huge = g.input((2, 3), U8), g.const(np.ones((3, 4), np.int8)), g.f32(3e38)
        if op == "QGemm":
            y = g.node(op, x, huge, g.const(ZERO), w, huge, g.const(np.int8(0)))
        else:
            y = g.node(op, x, w, huge, huge)
        assert "overflows float32" in refusal(g, g.quantize(y, 1.0, ZERO), tmp_path)


def test_a_program_names_constants_that_make_nan() -> None:
    codes = Type((2,), -5, 5)
    for kind, operand in (("mul", np.inf), ("add", np.nan), ("div", 0.0)):
        op = Requantize(
            FloatProgram().then(kind, np.float32(operand)), np.zeros((), np.int32), 0, 255
        )
        with pytest.raises(ValueError, match=r"NaN or infinite|by zero"):
            op.output_type(codes)
    assert Requantize(
        FloatProgram().then("max", -np.inf), np.zeros((), np.int32), 0, 255
    ).output_type(codes)


def test_scales_of_a_stack_are_multiplied_one_after_the_other(tmp_path: Path) -> None:
    """Unless they are given for every column of each matrix, so that one rounding is not two."""
    rng = np.random.default_rng(3)
    w, scales = (
        rng.integers(-128, 128, (2, 5, 7)).astype(np.int8),
        rng.uniform(0.1, 0.9, 7).astype(np.float32),
    )
    feed = rng.integers(0, 256, (2, 40, 5)).astype(np.uint8)
    g = Graph()
    y = g.node(
        "MatMulIntegerToFloat", g.input(feed.shape, U8), g.const(w), g.f32(0.3), g.f32(scales)
    )
    assert "scales [7] for a weight [2, 5, 7]" in refusal(g, y, tmp_path)
    g = Graph()
    each = np.broadcast_to(scales, (2, 1, 7))
    y = g.node("MatMulIntegerToFloat", g.input(feed.shape, U8), g.const(w), g.f32(0.3), g.f32(each))
    assert compare(Case(g.model(y), (feed,)), tmp_path / "model.onnx") == 2 * 40 * 7


def test_an_average_whose_rounding_leaves_int32_is_refused(tmp_path: Path) -> None:
    g = Graph()
    ends = (g.input((1, 1, 4), U8), g.f32(1e9), g.const(ZERO), g.f32(1e-3), g.const(ZERO))
    y = g.node("QLinearAveragePool", *ends, kernel_shape=[2])
    assert "conversion to int32 overflows" in refusal(g, y, tmp_path)


def test_clip_cuts_infinities_where_a_bound_is_left_out(tmp_path: Path) -> None:
    for bounds in ((), (-1e38,), ("", 1e38)):
        g = Graph(21)
        x = g.dequantize(g.input((1, 256), U8), np.float32(3e37), np.array(128, np.uint8))
        y = g.node("Clip", x, *(b if isinstance(b, str) else g.f32(b) for b in bounds))
        y = g.quantize(y, np.float32(3e36), np.array(128, np.uint8))
        assert compare(Case(g.model(y), (EVERY,)), tmp_path / "model.onnx") == 256


def test_an_output_may_be_infinite_but_not_nan(tmp_path: Path) -> None:
    g = Graph(21)
    y = g.dequantize(g.input((1, 256), U8), np.float32(3e37), np.array(9, np.uint8))
    assert compare(Case(g.model(y), (EVERY,)), tmp_path / "model.onnx") == 256
    g = Graph(21)
    acc = g.node("MatMulInteger", g.input((1, 4), U8), g.const(np.ones((4, 2), np.int8)))
    y = g.node("Mul", g.node("Cast", acc, to=1), g.f32(3e38))
    assert "NaN" in refusal(g, g.node("Mul", y, g.f32(0.0)), tmp_path)


def test_an_empty_output_is_read(tmp_path: Path) -> None:
    g = Graph(21)
    x = g.dequantize(g.input((2, 3), U8), 0.5, ZERO)
    empty, rest = (
        g.node("Slice", x, g.const([0]), g.const([0]), g.const([1])),
        g.node("Identity", x),
    )
    feed = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert compare(Case(g.model(empty, g.node("Neg", rest)), (feed,)), tmp_path / "model.onnx") == 6


def test_the_range_of_a_mean_is_that_of_its_table() -> None:
    values = np.arange(-3, 4, dtype=np.float32)
    kind = Mean(values, 0, np.array(5, np.float32), "sequential").output_type(Type((2, 5), 0, 6))
    bits = int(np.float32(3).view(np.int32))
    assert (kind.shape, kind.low, kind.high) == ((2,), -bits, bits)
