"""The fast bounds: those of `Network.intervals` bit for bit, refused where kernels are not exact, and not needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qverify import propagate
from qverify.frontend.model import read_model
from qverify.network import Network, Node
from qverify.ops import (
    AbstractOp,
    Dense,
    Interval,
    Layout,
    Max,
    Requantize,
    Table,
    Type,
)
from qverify.propagate import Propagator, Stretch
from tests.graphs import ROUNDS
from tests.networks import CPU, Rng, random_network
from tests.ops.cases import CASES, Case

pytest.importorskip("onnxruntime")

EXAMPLES = sorted((Path(__file__).parents[1] / "specs" / "examples" / "onnx").glob("*.onnx"))


@pytest.fixture
def anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for every stretch, however small."""
    monkeypatch.setattr(propagate, "WORTH_IT", (AbstractOp,))


def boxes(rng: Rng, kind: Type, count: int = 24) -> Interval:
    """Points, corners, narrow and wide boxes, the whole range."""
    ends = rng.integers(kind.low, kind.high, (2, count, kind.size), dtype=np.int64, endpoint=True)
    lower, upper = ends.min(axis=0), ends.max(axis=0)
    upper[:4] = lower[:4]
    upper[4:10] = np.minimum(lower[4:10] + rng.integers(0, 4, (6, kind.size)), kind.high)
    lower[10:13], upper[10], upper[11] = kind.low, kind.high, kind.low
    lower[13:15], upper[13:15] = kind.high, kind.high
    extreme = rng.random((2, 5, kind.size)) < 0.5
    lower[15:20] = np.where(extreme[0], kind.low, kind.high)
    upper[15:20] = np.where(extreme[0] & extreme[1], kind.low, kind.high)
    return lower.astype(np.int32), upper.astype(np.int32)


def same_as_defined(network: Network, rng: Rng) -> int:
    """Compare; how many of the nodes were in graphs."""
    fast = Propagator(network, CPU, patience=0)
    for count in (24, 24, 1):
        lower, upper = (end[:count] for end in boxes(rng, network.input_type))
        expected, found = network.intervals(CPU, lower, upper), fast.intervals(lower, upper)
        for a, b in zip(expected, found, strict=True):
            assert a.dtype == b.dtype == np.int32
            np.testing.assert_array_equal(a, b)
    assert not fast.disagreed
    steps = fast._steps or []
    assert fast.name == ("onnxruntime" if steps else "NumPy")
    return sum(len(step.nodes) for step in steps if isinstance(step, Stretch))


def one_op(case: Case) -> Network:
    """The op of a case on a flat input: its own types, by a table that clips where there are several."""
    whole = Type((sum(t.size for t in case.inputs),), min(t.low for t in case.inputs), max(t.high for t in case.inputs))
    nodes: list[Node] = []

    def add(op: AbstractOp, *inputs: int) -> int:
        kinds = [nodes[i - 1].type if i else whole for i in inputs]
        nodes.append(Node(op, inputs, op.output_type(*kinds)))
        return len(nodes)

    values, start = [], 0
    codes = np.arange(whole.low, whole.high + 1) if whole.count < 1000 else np.zeros(0)
    for t in case.inputs:
        if len(case.inputs) == 1:
            values.append(add(Layout(t.shape), 0))
        else:
            part = add(Layout(t.shape, np.arange(start, start + t.size)), 0)
            values.append(add(Table(np.clip(codes, t.low, t.high).astype(np.int32)[None], whole.low), part))
        start += t.size
    network = Network(whole, tuple(nodes), (add(case.op, *values),))
    return Network(whole, tuple(nodes), network.outputs)


def expressible(case: Case) -> bool:
    """Which of the cases have a rule; a conv alone has none, since only its rounding makes codes of it."""
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
                s.kind == "rsub" or (s.kind in ("mul", "div") and (s.operand < 0).any()) for s in op.program.steps
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
