"""The fast bounds: those of `Network.intervals` bit for bit, refused where kernels are not exact,
and not needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import Options, Verdict, propagate, runtime, verify
from qverify.errors import ModelError, SoundnessError
from qverify.frontend.model import read_model
from qverify.network import Network
from qverify.ops import AbstractOp, Conv, Dense, FloatProgram, Layout, Max, Requantize, Table
from qverify.propagate import Propagator, distrust, graphs, rules
from qverify.propagate.distrust import product_option
from qverify.propagate.graphs import Graphs, Stretch, make_steps
from tests.graphs import ROUNDS
from tests.networks import CPU, Maker, Rng, boxes, one_op, random_network
from tests.ops.cases import CASES, Case

pytest.importorskip("onnxruntime")

EXAMPLES = sorted((Path(__file__).parents[1] / "specs" / "examples" / "onnx").glob("*.onnx"))


@pytest.fixture
def anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for every stretch, however small."""
    monkeypatch.setattr(graphs, "WORTH_IT", (AbstractOp,))


def same_as_defined(network: Network, rng: Rng) -> int:
    """Compare; how many of the nodes were in graphs."""
    fast = Propagator(network, CPU, patience=0)
    for count in (24, 24, 1):
        lower, upper = (end[:count] for end in boxes(rng, network.input_type))
        expected, found = network.intervals(CPU, lower, upper), fast.intervals(lower, upper)
        for a, b in zip(expected, found, strict=True):
            assert a.dtype == b.dtype == np.int32
            np.testing.assert_array_equal(a, b)
    assert fast.take_warnings() == []
    steps = fast._fast.steps if isinstance(fast._fast, Graphs) else ()
    assert fast.name == ("onnxruntime" if steps else "NumPy")
    return sum(len(step.nodes) for step in steps if isinstance(step, Stretch))


def expressible(case: Case) -> bool:
    """Which of the cases have a rule; a conv alone has none, since only its rounding makes codes of
    it."""
    op = case.op
    match op:
        case Dense():
            return (
                op.weight.ndim == 2
                and int(np.ptp(np.append(op.weight, 0))) < 256
                and op.bias.shape in ((), (1,), op.weight.shape[1:])
            )
        case Table():
            return op.monotone
        case Requantize():
            falls = any(
                s.kind == "rsub" or (s.kind in ("mul", "div") and (s.operand < 0).any())
                for s in op.program.steps
            )
            return not falls and not op.program.ordinal
        case Layout() | Max():
            return case.name != "pad by constants"
    return bool(getattr(op, "increasing", False))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op(case: Case, anything: None) -> None:
    network = one_op(case)
    done = same_as_defined(network, np.random.default_rng(0))
    assert (done == len(network.nodes)) == expressible(case)


@pytest.mark.parametrize("seed", range(150 * ROUNDS))
def test_random_networks(seed: int, anything: None) -> None:
    rng = np.random.default_rng(seed)
    same_as_defined(random_network(rng, inputs=int(rng.integers(2, 12))), rng)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.stem))
def test_examples(path: Path) -> None:
    network = read_model(path).lowered.network
    assert same_as_defined(network, np.random.default_rng(0)) >= 1


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("channels", [False, True], ids=["one scale", "scales"])
def test_rounded_convolutions(groups: int, rank: int, channels: bool) -> None:
    rng = np.random.default_rng(groups + 10 * rank)
    maker = Maker(rng, 4 * 5**rank, 255)
    weight = rng.integers(-128, 128, (8, 4 // groups, *[3, 2, 1][:rank]))
    pads, strides, dilations = (
        [1, 0, 2][:rank] + [0, 1, 1][:rank],
        [2, 1, 1][:rank],
        [1, 2, 1][:rank],
    )
    bias = rng.integers(-999, 999, 8)
    op = Conv(weight, bias, tuple(strides), tuple(pads), tuple(dilations), groups, 77, 0, 255)
    x = maker.add(op, maker.move(0, (1, 4, *[5] * rank)))
    count = maker.type(x).count
    factor = rng.uniform(100, 900, (8, *[1] * rank) if channels else ()) / count
    low, high = (-8, 7) if channels else (-128, 127)
    y = maker.add(
        Requantize(FloatProgram().then("mul", factor), np.array(3, np.int32), low, high), x
    )
    assert same_as_defined(maker.network(y), rng) == 3


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("inner", "outer"), [(7, 5), (rules.LONG, rules.WIDE)])
@pytest.mark.parametrize("low", [-128, 0])
def test_dense_layers(rows: int, inner: int, outer: int, low: int) -> None:
    """In both forms, with int8 and with uint8 weights that have one or more zero points, and rows
    of several vectors."""
    rng = np.random.default_rng(inner + rows)
    maker = Maker(rng, rows * inner, 255)
    x = maker.add(
        Table(np.arange(low, low + 256, dtype=np.int32)[None], 0), maker.move(0, (rows, inner))
    )
    for ends, channels, shift in (
        ((-128, 127), False, 0),
        ((-50, 200), True, 0),
        ((-50, 200), False, 150),
    ):
        weight = (
            rng.integers(*ends, (maker.type(x).shape[-1], outer), endpoint=True)
            - shift * np.arange(outer) % 151
        )
        x = maker.add(Dense(weight, rng.integers(-999, 999, outer), low, low + 255), x)
        factor = rng.uniform(100, 900, outer if channels else ()) / maker.type(x).count
        x = maker.add(
            Requantize(
                FloatProgram().then("mul", factor), np.array(low + 3, np.int32), low, low + 255
            ),
            x,
        )
    x = maker.add(Dense(weight[:outer, :4], rng.integers(-999, 999, 4), low, low + 255), x)
    assert same_as_defined(maker.network(x), rng) == len(maker.nodes)


def test_factors_of_other_axes_than_the_channels() -> None:
    """A convolution's rounding by factors of its columns is no channel's, though they be as
    many."""
    rng = np.random.default_rng(0)
    maker = Maker(rng, 3 * 9, 255)
    x = maker.add(
        Conv(
            rng.integers(-99, 99, (3, 3, 1, 1)),
            np.zeros(3, np.int64),
            (1, 1),
            (0,) * 4,
            (1, 1),
            1,
            0,
            0,
            255,
        ),
        maker.move(0, (1, 3, 3, 3)),
    )
    for shape in ((3,), (1, 3), (3, 1)):
        program = FloatProgram().then("mul", rng.uniform(50, 900, shape) / maker.type(x).count)
        y = maker.add(Requantize(program, np.array(99, np.int32), 0, 255), x)
        assert same_as_defined(maker.network(y), rng) == 0
        maker.nodes.pop()


def test_what_has_no_rule_is_computed_by_the_op() -> None:
    """A convolution without rounding, a table that is not monotone, a mean: graphs before, between
    and after."""
    rng = np.random.default_rng(0)
    maker = Maker(rng, 32, 255)
    x = maker.requantize(maker.dense(0, 16), channels=False)
    t = maker.type(x)
    wave = maker.add(Table(rng.integers(0, 200, (1, t.count)).astype(np.int32), t.low), x)
    y = maker.requantize(maker.dense(wave, 12), channels=False)
    acc = maker.add(
        Conv(
            rng.integers(-9, 9, (2, 1, 3)), np.zeros(2, np.int64), (1,), (0, 0), (1,), 1, 0, -9, 20
        ),
        maker.move(y, (1, 1, 12)),
    )
    z = maker.requantize(maker.dense(maker.requantize(acc, channels=False), 5), channels=False)
    network = maker.network(z, wave, acc)
    done = same_as_defined(network, rng)
    assert 0 < done < len(network.nodes)


def ordinary_network(rng: Rng) -> Network:
    maker = Maker(rng, 40, 255)
    x = maker.requantize(maker.dense(0, 24), channels=False)
    return maker.network(maker.requantize(maker.dense(x, 6), channels=False))


def test_graphs_come_after_some_patience() -> None:
    rng = np.random.default_rng(0)
    network = ordinary_network(rng)
    fast = Propagator(network, CPU, patience=1e-9)
    fast.intervals(*boxes(rng, network.input_type))
    assert fast.name == "NumPy"
    fast.intervals(*boxes(rng, network.input_type))
    assert fast.name == "onnxruntime"


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available", lambda: False)
    monkeypatch.setattr(distrust, "product_option", product_option.__wrapped__)
    rng = np.random.default_rng(0)
    assert same_as_defined(ordinary_network(rng), rng) == 0


def test_an_onnxruntime_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "OLDEST", (9, 0))
    monkeypatch.setattr(distrust, "product_option", product_option.__wrapped__)
    rng = np.random.default_rng(0)
    assert same_as_defined(ordinary_network(rng), rng) == 0


Compiled = Callable[[dict[str, Any]], list[Any]]


def wrapped(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any], bool], list[Any]]
) -> None:
    """Let every graph's results pass through `change`, and probe anew."""
    compiled = runtime.IntegerGraph.compiled

    def other(graph: runtime.IntegerGraph, outputs: list[str], exactly: bool) -> Compiled:
        function = compiled(graph, outputs, exactly)
        return lambda inputs: change(function(inputs), exactly)

    monkeypatch.setattr(runtime.IntegerGraph, "compiled", other)
    monkeypatch.setattr(distrust, "product_option", product_option.__wrapped__)


def change_stretches(fast: Propagator, change: Callable[[Compiled], Compiled]) -> None:
    """Replace what the graphs in use compute."""
    assert isinstance(fast._fast, Graphs)
    steps = (
        replace(step, function=change(step.function)) if isinstance(step, Stretch) else step
        for step in fast._fast.steps
    )
    fast._fast = replace(fast._fast, steps=tuple(steps))


def saturated(values: list[Any]) -> list[Any]:
    """What is left of sums where pairs of products are cut at int16."""
    return [np.where(value > 100, value // 2, value).astype(value.dtype) for value in values]


def test_kernels_that_saturate_are_asked_for_exact_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrapped(monkeypatch, lambda values, exactly: values if exactly else saturated(values))
    assert distrust.product_option() is True
    rng = np.random.default_rng(0)
    assert same_as_defined(ordinary_network(rng), rng) > 0


def test_kernels_that_saturate_all_the_same_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped(monkeypatch, lambda values, exactly: saturated(values))
    assert distrust.product_option() is None
    rng = np.random.default_rng(0)
    assert same_as_defined(ordinary_network(rng), rng) == 0


def test_the_worst_case_reaches_every_kernel() -> None:
    """Every kind of product is there, alone in its output; cut pairs would change each of them."""
    network = distrust.worst_case()
    (stretch,) = make_steps(network, False)
    assert isinstance(stretch, Stretch) and len(stretch.nodes) == len(network.nodes)
    ops = [node.op for node in network.nodes if isinstance(node.op, Dense | Conv)]
    assert len(ops) == len(network.outputs)
    points = np.full((1, network.input_type.size), 255, np.int32)
    for (
        op
    ) in ops:  # 127 and -128 as stored, or 255 and 0: pairs of products with 255 lie beyond int16
        assert np.ptp(op.weight) == 255
    low, high = network.intervals(CPU, points, points)
    assert (low == high).all() and len(np.unique(low)) > 3


def test_different_bounds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison before the first use, should a rule be wrong."""
    assert product_option() is not None
    monkeypatch.setattr(
        rules, "doubled", lambda weight: np.concatenate([np.concatenate([weight] * 2, 1)] * 2)
    )
    rng = np.random.default_rng(0)
    network = ordinary_network(rng)
    fast = Propagator(network, CPU, patience=0)
    lower, upper = boxes(rng, network.input_type)
    expected, found = network.intervals(CPU, lower, upper), fast.intervals(lower, upper)
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))
    (warning,) = fast.take_warnings()
    assert "onnxruntime and NumPy bound this network differently" in warning
    assert fast.name == "NumPy" and fast.take_warnings() == []


def test_a_failure_while_running_falls_back() -> None:
    rng = np.random.default_rng(0)
    network = ordinary_network(rng)
    fast = Propagator(network, CPU, patience=0)
    lower, upper = boxes(rng, network.input_type)
    expected = fast.intervals(lower, upper)
    assert fast.name == "onnxruntime" and isinstance(fast._fast, Graphs)

    def fails(inputs: dict[str, Any]) -> list[Any]:
        raise ModelError("no memory")

    change_stretches(fast, lambda function: fails)
    assert all((a == b).all() for a, b in zip(expected, fast.intervals(lower, upper), strict=True))
    assert fast.name == "NumPy"


def test_a_later_difference_ends_the_search() -> None:
    rng = np.random.default_rng(0)
    network = ordinary_network(rng)
    fast = Propagator(network, CPU, patience=0)
    lower, upper = boxes(rng, network.input_type)
    fast.intervals(lower, upper)

    def last_is_wrong(function: Compiled) -> Compiled:
        def other(inputs: dict[str, Any]) -> list[Any]:
            (values,) = function(inputs)
            values[-1] ^= 1
            return [values]

        return other

    change_stretches(fast, last_is_wrong)
    with pytest.raises(SoundnessError, match="report"):
        fast.intervals(lower, upper)


def test_a_difference_is_a_warning_with_the_verdict(
    monkeypatch: pytest.MonkeyPatch, anything: None
) -> None:
    monkeypatch.setattr(propagate, "PATIENCE", 0)
    monkeypatch.setattr(Graphs, "run", lambda graphs, lower, upper: (lower, upper))
    model = EXAMPLES[0].parent / "tiny_mlp_qop.onnx"
    result = verify(
        model, model.parents[1] / "vnnlib" / "tiny_safe.vnnlib", Options(attack=False, device="cpu")
    )
    assert result.verdict is Verdict.UNSAT and result.details["intervals_by"] == "NumPy"
    assert any("bound this network differently" in text for text in result.details["warnings"])
