"""A rule speaks for no more than it declares: what else stands on a node is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import qverify.frontend.rules as rules
from qverify.errors import UnsupportedModel
from qverify.frontend.builder import Refusal
from qverify.frontend.model import read_model
from qverify.frontend.registry import ANY, CONTROL_FLOW, MICROSOFT, RANDOM, RULES, refuse_unknown
from tests.graphs import Graph, write

ZERO = np.array(0, np.uint8)
OPSETS = range(10, 26)
SAMPLES = {
    "INT": 7,
    "FLOAT": 7.5,
    "STRING": "other",
    "INTS": [7],
    "FLOATS": [7.5],
    "STRINGS": ["other"],
}
SOURCES = "".join(
    path.read_text(encoding="utf-8") for path in Path(rules.__file__).parent.glob("*.py")
)


def standard() -> Iterator[tuple[str, int, dict[str, str]]]:
    """Op, opset, and the types of its attributes, for every op with a rule in every opset that is
    read."""
    for domain, op in RULES:
        for opset in OPSETS if domain == "" else ():
            if onnx.defs.has(op, opset, ""):
                schema = onnx.defs.get_schema(op, opset, "")
                yield (
                    op,
                    opset,
                    {name: str(a.type).rsplit(".", 1)[-1] for name, a in schema.attributes.items()},
                )


def microsoft() -> Iterator[tuple[str, int, dict[str, str]]]:
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    for schema in state.get_all_operator_schema():
        if schema.domain == MICROSOFT and (MICROSOFT, schema.name) in RULES:
            kinds = {name: str(a.type).rsplit(".", 1)[-1] for name, a in schema.attributes.items()}
            yield schema.name, schema.since_version, kinds


def every() -> Iterator[tuple[str, str, int, dict[str, str]]]:
    yield from (("", *row) for row in standard())
    yield from ((MICROSOFT, *row) for row in microsoft())


def test_every_attribute_of_every_schema_is_declared_or_refused() -> None:
    seen = 0
    for domain, op, opset, attributes in every():
        rule = RULES[domain, op]
        for name, kind in attributes.items():
            if rule.attributes is None or name in rule.attributes:
                continue
            node = helper.make_node(op, ["x"], ["y"], domain=domain)
            if kind in SAMPLES:
                node.attribute.append(helper.make_attribute(name, SAMPLES[kind]))
            else:
                node.attribute.add(name=name, type=getattr(onnx.AttributeProto, kind))
            with pytest.raises(Refusal, match=f"its attribute '{name}' is not supported"):
                refuse_unknown(node, rule, domain, opset)
            seen += 1
    assert seen > 30


def test_every_declared_attribute_exists_and_is_read() -> None:
    known = {name for *_, attributes in every() for name in attributes}
    # Of Dropout for inference; of nodes that onnxruntime itself runs.
    untouched = {"ratio", "seed", "epsilon", "momentum"}
    for key, rule in RULES.items():
        extra = (rule.attributes or frozenset()) - known
        assert not extra, f"{key}: no schema has {extra}"
        for name in (rule.attributes or frozenset()) - untouched:
            assert re.search(rf'(attr\(|, )"{name}"', SOURCES), f"{key}: nothing reads '{name}'"


def test_an_attribute_that_spells_out_the_default_says_nothing() -> None:
    rule = RULES["", "QuantizeLinear"]
    refuse_unknown(helper.make_node("QuantizeLinear", ["x", "s"], ["y"], saturate=1), rule, "", 21)
    with pytest.raises(Refusal, match=r"its attribute 'saturate' is not supported \(0\)"):
        refuse_unknown(
            helper.make_node("QuantizeLinear", ["x", "s"], ["y"], saturate=0), rule, "", 21
        )


def test_every_input_of_every_schema_is_declared_or_refused() -> None:
    for domain, op in RULES:
        rule = RULES[domain, op]
        if rule.inputs == ANY:
            continue
        node = helper.make_node(op, ["x"] * rule.inputs + ["", "further"], ["y"], domain=domain)
        with pytest.raises(
            Refusal, match=f"its input {rule.inputs + 1} \\('further'\\) is not supported"
        ):
            refuse_unknown(node, rule, domain, 21)


def test_random_ops_are_those_that_onnx_calls_so() -> None:
    """ONNX calls ops that only contain others, and two that move elements, not deterministic; those
    are no draws."""
    loose = {
        s.name
        for s in onnx.defs.get_all_schemas_with_history()
        if getattr(s, "non_deterministic", False)
    }
    moves = {
        "DepthToSpace",
        "SpaceToDepth",
        "AffineGrid",
        "CausalConvWithState",
        "LinearAttention",
        "Dropout",
    }
    assert loose - moves - CONTROL_FLOW <= RANDOM


DRAWS = ("Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike")


@pytest.mark.parametrize("op", [*DRAWS, "RandomNormal", "RandomUniform"])
@pytest.mark.parametrize("seeded", [True, False])
def test_a_node_that_draws_is_refused_by_name(op: str, seeded: bool, tmp_path: Path) -> None:
    """Also where its inputs are constants: onnxruntime may fold them into other constants every
    time."""
    g = Graph()
    attributes: dict[str, Any] = {"seed": 3.0} if seeded else {}
    attributes |= {} if op in DRAWS else {"shape": [1, 2]}
    drawn = g.node(op, *([g.f32([[0.5, 0.25]])] if op in DRAWS else []), **attributes)
    drawn = g.node("Cast", drawn, to=1) if op == "Multinomial" else drawn
    y = g.quantize(g.node("Add", g.input((1, 2)), drawn), 0.1, ZERO)
    path = write(g.model(y), tmp_path / "model.onnx")
    with pytest.raises(
        UnsupportedModel, match=rf"node '{op}_n0' \({op}\): it draws random numbers"
    ):
        read_model(path)


def test_dropout_in_training_is_refused(tmp_path: Path) -> None:
    for training in (False, True):
        g = Graph()
        x = g.quantize(g.input((1, 2)), 0.1, ZERO)
        kept = g.node("Dropout", g.f32([[1.0, 2.0]]), g.f32(0.5), g.const(training, np.bool_))
        y = g.quantize(g.node("Add", g.dequantize(x, 0.1, ZERO), kept), 0.1, ZERO)
        path = write(g.model(y), tmp_path / f"{training}.onnx")
        if training:
            with pytest.raises(UnsupportedModel, match="draws random numbers"):
                read_model(path)
        else:
            read_model(path)
