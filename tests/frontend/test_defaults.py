"""An attribute that is left out has onnxruntime's own default: every rule, every attribute it
declares, opsets 10 to 25.

What a rule takes for a missing attribute is recorded while random graphs of its op are read. Each
of these graphs is run by onnxruntime as it stands and with that value written out: the results must
be equal, and for every attribute some other value must change them in some graph, or be rejected,
so that a wrong default would be seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from benchmarks.hostile.one_op import feeds
from benchmarks.hostile.one_op_graphs import GENERATORS, Case, Input
from qverify.errors import QverifyError
from qverify.frontend.lower import lower
from qverify.frontend.registry import RULES, View
from tests.graphs import Array, Graph

GRAPHS = 40  # of each generator
Attribute = tuple[str, str]  # op, name

# Attributes without a default: they must be there (or stand in an input), or mean no bound, no
# change, all of the axis.
WITHOUT = {
    "axes",
    "blocksize",
    "end",
    "ends",
    "kernel_shape",
    "max",
    "min",
    "perm",
    "shape",
    "split",
    "starts",
    "to",
}
WITHOUT |= {"num_outputs", "opset"}
# Declared; the runtime uses them, or inference has no use for them.
NEVER_READ = {"epsilon", "momentum", "ratio", "seed"}
# Of these ops: the attribute is none of theirs (a rule for two ops), has no default, or no other
# value is accepted.
EXCEPT = {
    *(
        ("Concat", "axis"),
        ("QLinearConcat", "axis"),
        ("Pad", "pads"),
        ("QLinearAveragePool", "dilations"),
    ),
}


def run(model: onnx.ModelProto, inputs: list[Array]) -> list[Array] | None:
    """onnxruntime's outputs, without optimisation; None where it rejects the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        names = [item.name for item in session.get_inputs()]
        return [np.asarray(y) for y in session.run(None, dict(zip(names, inputs, strict=True)))]
    except Exception:  # onnxruntime's own classes
        return None


def equal(a: list[Array], b: list[Array]) -> bool:
    return all(
        x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in zip(a, b, strict=True)
    )


def with_attribute(model: onnx.ModelProto, name: str, k: int, value: Any) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.node[k].attribute.append(helper.make_attribute(name, value))
    return copy


def others(name: str, value: Any, rank: int) -> list[Any]:
    """Other values of an attribute."""
    match value:
        case str():
            return [v for v in ("SAME_UPPER", "VALID", "edge", "CRD") if v != value]
        case float():
            return [value + 0.5]
        case list() | tuple():
            return [[v + 1 for v in value]]
        case _ if name == "axis":
            return [axis for axis in range(-rank, rank) if axis != value]
    return [value + 1, value + 2]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[View, str, Any]]:
    """What rules ask for and do not find, with the value that they take instead."""
    log: list[tuple[View, str, Any]] = []
    attr = View.attr

    def logged(view: View, name: str, default: Any = None) -> Any:
        if all(attribute.name != name for attribute in view.node.attribute):
            log.append((view, name, default))
        return attr(view, name, default)

    monkeypatch.setattr(View, "attr", logged)
    return log


def plain() -> Iterator[Case]:
    """Graphs whose attributes random ones seldom leave out where it matters."""
    for opset in range(10, 26):
        for op, shape, constants, outputs in (
            ("Split", (4, 4), (), 2),
            ("Flatten", (3, 4, 5), (), 1),
            ("MaxPool", (1, 2, 7), (), 1),
            ("Shape", (3, 4, 5), (), 1),
            ("Reshape", (3, 4, 5), (np.array([0, 5, 4]),), 1),
            (
                "DequantizeLinear",
                (3, 3, 3),
                (np.array([1, 2, 3], np.float32), np.array([5, 6, 7], np.uint8)),
                1,
            ),
            ("QuantizeLinear", (3, 3), (np.float32(2),), 1),
            ("Pad", (3, 3), (), 1),
        ):
            g, floats = Graph(opset), op in ("QuantizeLinear", "Pad")
            x = g.input(shape, np.float32 if floats else np.uint8)
            more: dict[str, Any] = {}
            if op == "MaxPool":
                more = {"kernel_shape": [2], "strides": [2]}
            elif op == "Pad":
                more = {"pads": [0, 1, 1, 0]}
            elif op == "Split" and opset >= 18:
                more = {"num_outputs": 2}
            y = g.node(op, x, *(g.const(c) for c in constants), outputs=outputs, **more)
            yield Case(g.model(y), (Input(shape, np.dtype(np.float32 if floats else np.uint8)),))


def cases() -> Iterator[tuple[Case, list[Array]]]:
    for case in plain():
        yield case, feeds(case, np.random.default_rng(1))[0]
    for name, generator in GENERATORS.items():
        rng = np.random.default_rng(len(name))
        for _ in range(GRAPHS):
            case = generator(rng)
            yield case, feeds(case, rng)[0]


def test_defaults_are_the_runtimes(asked: list[tuple[View, str, Any]]) -> None:
    declared = {
        (op, name)
        for (_, op), rule in RULES.items()
        for name in (rule.attributes or frozenset()) - WITHOUT - NEVER_READ
    }
    equals: set[Attribute] = set()
    felt: set[Attribute] = set()
    for case, inputs in cases():
        asked.clear()
        with contextlib.suppress(QverifyError):
            lower(case.model)
        want = run(case.model, inputs)
        if want is None:
            continue
        nodes = [(node.name, node.domain, node.op_type) for node in case.model.graph.node]
        for view, name, default in asked:
            key = (view.op, name)
            if default is None or view.inputs[0] is None:
                continue
            k = nodes.index((view.node.name, view.node.domain, view.op))
            got = run(with_attribute(case.model, name, k, default), inputs)
            if got is None:
                continue  # an attribute that this opset does not have
            assert equal(want, got), (
                f"{key} of opset {view.opset}: the default is not {default!r}\n{view.node}"
            )
            equals.add(key)
            if key in felt:
                continue
            for other in others(name, default, len(view.inputs[0].shape)):
                changed = run(with_attribute(case.model, name, k, other), inputs)
                if changed is None or not equal(want, changed):
                    felt.add(key)
    assert sorted(declared - equals) == sorted(EXCEPT), "never left out and written out"
    assert sorted(declared - felt) == sorted(EXCEPT), "no other value makes a difference"
