"""The comparison of every node with onnxruntime: faults of one code, one pair, one weight are seen
and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import runtime
from qverify.errors import SoundnessError
from qverify.frontend.compare import compare
from qverify.frontend.lower import Lowered, Trace, lower
from qverify.frontend.model import read_model
from qverify.ops import AbstractOp, Conv, Dense, Layout, Mean, Pairwise, Requantize, Table
from tests.graphs import Graph, write

U8, S8 = np.uint8, np.int8
ZERO = np.array(0, U8)


def read(g: Graph, *outputs: str, folder: Path) -> tuple[Lowered, Trace]:
    return lower(runtime.optimised_graph(write(g.model(*outputs), folder / "model.onnx")))


def codes(g: Graph, shape: tuple[int, ...] = (1, 3)) -> str:
    return g.input(shape, U8)


def leaky(g: Graph) -> str:
    return g.node(
        "QLinearLeakyRelu",
        codes(g),
        g.f32(0.5),
        g.const(9, U8),
        g.f32(0.25),
        g.const(3, U8),
        alpha=0.3,
    )


def added(g: Graph, shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((1, 3), (1, 3))) -> str:
    a, b = (codes(g, shape) for shape in shapes)
    scales = [g.f32(v) for v in (0.11, 0.07, 0.19)]
    return g.node(
        "QLinearAdd",
        a,
        scales[0],
        g.const(3, U8),
        b,
        scales[1],
        g.const(9, U8),
        scales[2],
        g.const(5, U8),
    )


def product(g: Graph) -> str:
    w = g.const(np.arange(-6, 6).reshape(3, 4), S8)
    scale, zero = g.f32(0.1), g.const(3, U8)
    return g.node(
        "QLinearMatMul", codes(g), scale, zero, w, scale, g.const(0, S8), g.f32(0.3), zero
    )


def convolution(g: Graph) -> str:
    w = g.const(np.arange(-9, 9).reshape(2, 1, 3, 3), S8)
    scale, zero = g.f32(0.1), g.const(3, U8)
    return g.node(
        "QLinearConv",
        codes(g, (1, 1, 5, 5)),
        scale,
        zero,
        w,
        scale,
        g.const(0, S8),
        g.f32(0.3),
        zero,
    )


def per_channel(g: Graph) -> str:
    floats = g.dequantize(codes(g, (1, 3, 2)), [0.1, 0.2, 0.3], np.array([1, 2, 3], U8), axis=1)
    return g.quantize(g.node("Tanh", floats), 0.01, ZERO)


def mean(g: Graph) -> str:
    floats = g.dequantize(codes(g, (1, 2, 5)), 0.1, ZERO)
    return g.quantize(g.node("ReduceMean", floats, g.const([2], np.int64)), 0.03, ZERO)


def moved(g: Graph) -> str:
    return g.node("Transpose", codes(g, (1, 2, 3)), perm=[0, 2, 1])


def one_up(values: Any, rng: np.random.Generator) -> Any:
    """An array with one element increased by one, or decreased where it is the largest."""
    changed = np.array(values)
    at = rng.integers(changed.size)
    changed.reshape(-1)[at] += 1 if changed.reshape(-1)[at] < changed.max() else -1
    return changed


def one_pair_up(values: Any, rng: np.random.Generator) -> Any:
    """A table of pairs, monotone as before, with one entry increased by one."""
    inner = values[:-1, :-1]
    room = np.argwhere((inner < values[1:, :-1]) & (inner < values[:-1, 1:]))
    changed = np.array(values)
    changed[tuple(room[rng.integers(len(room))])] += 1
    return changed


def shuffled(op: Layout, rng: np.random.Generator) -> Layout:
    assert op.index is not None
    index = op.index.copy()
    index[[0, 1]] = index[[1, 0]]
    return replace(op, index=index)


FAULTS: dict[
    str,
    tuple[
        Callable[[Graph], str], type[AbstractOp], Callable[[Any, np.random.Generator], AbstractOp]
    ],
] = {
    "one code of a table": (
        leaky,
        Table,
        lambda op, rng: replace(op, values=one_up(op.values, rng)),
    ),
    "one code of one channel": (
        per_channel,
        Table,
        lambda op, rng: replace(op, values=one_up(op.values, rng)),
    ),
    "one pair of codes": (
        added,
        Pairwise,
        lambda op, rng: replace(op, values=one_pair_up(op.values, rng)),
    ),
    "one weight": (product, Dense, lambda op, rng: replace(op, weight=one_up(op.weight, rng))),
    "one weight of a window": (
        convolution,
        Conv,
        lambda op, rng: replace(op, weight=one_up(op.weight, rng)),
    ),
    "a bias": (convolution, Conv, lambda op, rng: replace(op, bias=op.bias + np.array([0, 5]))),
    "a window moved by one": (
        convolution,
        *(Conv, lambda op, rng: replace(op, pads=(1, 0, *op.pads[2:]), strides=(1, 1))),
    ),
    "a zero point": (
        product,
        Requantize,
        lambda op, rng: replace(op, zero_point=op.zero_point + np.int32(1)),
    ),
    "an order of additions": (mean, Mean, lambda op, rng: replace(op, order="sequential")),
    "two elements exchanged": (moved, Layout, shuffled),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_seen(what: str, seed: int, tmp_path: Path) -> None:
    build, kind, change = FAULTS[what]
    g = Graph()
    lowered, trace = read(g, build(g), folder=tmp_path)
    compare(trace, lowered)
    at = [k for k, node in enumerate(trace.values) if isinstance(node.op, kind)][-1]
    node = trace.values[at]
    wrong = replace(node, op=change(node.op, np.random.default_rng(seed)))
    values = (*trace.values[:at], wrong, *trace.values[at + 1 :])
    with pytest.raises(
        SoundnessError, match=r"node '\w+' \(\w+\): onnxruntime('s result is| computes)"
    ):
        compare(replace(trace, values=values), lowered)


def test_what_was_compared_is_counted(tmp_path: Path) -> None:
    g = Graph()
    x = g.quantize(g.input((1, 3)), 0.1, ZERO)
    y = g.node(
        "QLinearLeakyRelu", x, g.f32(0.5), g.const(9, U8), g.f32(0.25), g.const(3, U8), alpha=0.3
    )
    model = read_model(write(g.model(g.dequantize(y, 0.5, ZERO)), tmp_path / "model.onnx"))
    # Tables over all codes; the quantizer is sampled.
    assert (model.compared.nodes, model.compared.complete) == (3, 2)
    assert model.compared.values > 2 * 256


def test_a_shape_that_the_runtime_does_not_give_is_named(tmp_path: Path) -> None:
    g = Graph()
    lowered, trace = read(g, moved(g), folder=tmp_path)
    (node,) = trace.nodes
    turned = replace(node, node=type(node.node).FromString(node.node.SerializeToString()))
    turned.node.attribute[0].ints[:] = [1, 0, 2]
    with pytest.raises(SoundnessError, match=r"result is uint8\[2, 1, 3\], not uint8\[1, 3, 2\]"):
        compare(replace(trace, nodes=(turned,)), lowered)


def test_a_broadcast_sum_adds_in_the_runtime_s_order(tmp_path: Path) -> None:
    """The rule's two orders of a QLinearAdd differ in a few of 65,536 pairs; both are compared
    where they hold."""
    for k, shapes in enumerate(
        (((1, 1), (1, 1)), ((1, 3), (1, 1)), ((1, 1), (1, 3)), ((2, 3, 1), (2, 1, 1)))
    ):
        folder = tmp_path / str(k)
        folder.mkdir()
        g = Graph()
        lowered, trace = read(g, added(g, shapes), folder=folder)
        assert compare(trace, lowered).nodes == 1
