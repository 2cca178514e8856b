"""`verify` as a whole, on the shipped examples: known verdicts, witnesses that hold, and every way
of saying no."""

from __future__ import annotations

import csv
import functools
import gzip
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import qverify
from qverify import Options, Result, Verdict, runtime, verify
from qverify.engine import Engine
from qverify.errors import ModelError, QverifyError, SpecError, UsageError
from qverify.formats import as_json
from qverify.property import Property, Query, Row
from qverify.replay import NotReplayed, replay
from qverify.search.branch import RULES
from qverify.vnnlib.reader import read_property
from tests.graphs import Graph, exact_products, write

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "specs" / "examples"
SCRIPTS = REPOSITORY / "benchmarks" / "vnncomp"
QOP, QDQ = (EXAMPLES / "onnx" / f"tiny_mlp_{form}.onnx" for form in ("qop", "qdq"))
SAFE, UNSAFE = (EXAMPLES / "vnnlib" / f"tiny_{kind}.vnnlib" for kind in ("safe", "unsafe"))
CPU = Options(device="cpu", timeout=30.0)


def rows_of(name: str) -> list[list[str]]:
    with (EXAMPLES / name).open(newline="") as stream:
        return list(csv.reader(stream))


EXPECTED = [(model, spec, verdict) for model, spec, verdict in rows_of("expected.csv") if verdict]


def name_of(value: str) -> str:
    return Path(value.removesuffix(".gz")).stem


def holds(row: Row, x: Sequence[float], y: Sequence[float]) -> bool:
    total = sum((c * Fraction(x[i]) for i, c in row.x), Fraction(0))
    total += sum((c * Fraction(y[i]) for i, c in row.y), Fraction(0))
    return total < row.rhs if row.strict else total <= row.rhs


def run_file(model: Path, inputs: Sequence[Any]) -> list[Any]:
    """The file in onnxruntime, without qverify's help."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return list(
        session.run(None, dict(zip((i.name for i in session.get_inputs()), inputs, strict=True)))
    )


def check_witness(result: Result, model: Path) -> None:
    """The witness lies in the exact box, gives its outputs on the file, and is unsafe. Nothing of
    qverify is used but the parsed property."""
    witness = result.witness
    assert witness is not None
    prop: Property = result.details["property"]
    outputs = run_file(model, witness.inputs)
    assert all(np.array_equal(a, b) for a, b in zip(outputs, witness.outputs, strict=True))
    x = np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in witness.inputs]).tolist()
    y = np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in outputs]).tolist()
    texts = [Fraction(text) for text in witness.input_text]
    assert [float(np.float32(float(text))) for text in witness.input_text] == x
    assert [float(np.float32(text)) for text in witness.output_text] == y
    assert any(
        all(
            low <= v <= high
            for low, v, high in zip(query.box.lower, texts, query.box.upper, strict=True)
        )
        and any(all(holds(row, x, y) for row in case) for case in query.cases)
        for query in prop.queries
    )


# -- known verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "spec", "verdict"), EXPECTED, ids=name_of)
def test_known_verdicts(model: str, spec: str, verdict: str) -> None:
    if verdict == "sat" and "mnist_mlp" in model and not exact_products():
        pytest.skip(
            "this CPU saturates products of mnist_mlp's weights, so its counterexamples may not "
            "replay"
        )
    result = verify(EXAMPLES / model, EXAMPLES / spec, CPU)
    assert result.verdict == verdict, result.reason
    assert (result.witness is not None) == (verdict == "sat")
    if result.witness is not None:
        check_witness(result, EXAMPLES / model)


@pytest.mark.parametrize("seconds", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model", "spec"),
    [(model, spec) for model, spec, verdict in EXPECTED if verdict == "sat"],
    ids=name_of,
)
def test_without_the_attack_a_counterexample_is_never_proved_away(
    model: str, spec: str, seconds: int
) -> None:
    """The falsifier-off gate: where a counterexample is known, bounds alone must not say unsat."""
    result = verify(
        EXAMPLES / model, EXAMPLES / spec, Options(device="cpu", timeout=seconds, attack=False)
    )
    assert result.verdict in (Verdict.SAT, Verdict.TIMEOUT, Verdict.UNKNOWN)
    assert result.witness is None or result.verdict is Verdict.SAT


def test_a_property_without_conditions_on_outputs_is_a_warning(tmp_path: Path) -> None:
    spec = tmp_path / "p.vnnlib"
    spec.write_text(UNSAFE.read_text().partition("(assert (or")[0])
    found = verify(QOP, spec, CPU)
    assert (
        found.verdict is Verdict.SAT and "whatever the outputs are" in found.details["warnings"][0]
    )
    assert not verify(QOP, UNSAFE, CPU).details["warnings"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timeout", value) for value in (0.0, -3.0, float("nan"), float("inf"), "9")),
        *(("seed", value) for value in (-1, 1.5, "1", None)),
        *(("batch", value) for value in (0, -1, 2.0, "8")),
        ("shapes", "x=1,2"),
    ],
)
def test_options_keep_their_limits(name: str, value: Any) -> None:
    words = {"timeout": "time limit of", "seed": "seed of", "batch": "batch of", "shapes": "shapes"}
    with pytest.raises(UsageError, match=words[name]):
        Options(**{name: value})


def test_too_little_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("qverify.verification.read_model", starved)
    result = verify(QOP, UNSAFE, CPU)
    assert result.verdict is Verdict.UNKNOWN and "not enough memory" in result.reason


def test_the_lists_of_the_examples_agree() -> None:
    instances, expected = rows_of("instances.csv"), rows_of("expected.csv")
    assert [row[:2] for row in instances] == [row[:2] for row in expected]
    assert {row[2] for row in expected} <= {"sat", "unsat", ""}
    assert all((EXAMPLES / path).is_file() for row in instances for path in row[:2])


@pytest.mark.parametrize("model", [QOP, QDQ], ids=["qop", "qdq"])
@pytest.mark.parametrize("spec", [SAFE, UNSAFE], ids=["safe", "unsafe"])
def test_both_versions_of_vnnlib_give_one_verdict(model: Path, spec: Path) -> None:
    first = verify(model, spec, CPU)
    second = verify(model, spec.with_name(spec.stem + "_v2.vnnlib"), CPU)
    assert first.verdict == second.verdict
    if first.witness is not None and second.witness is not None:
        assert first.witness.input_text == second.witness.input_text
        assert first.details["property"].version != second.details["property"].version


@pytest.mark.parametrize(
    "options",
    [
        *(Options(branch=name, batch=5) for name in RULES),
        Options(seed=7),
        Options(attack=False),
        Options(batch=1),
    ],
    ids=str,
)
def test_options_never_change_a_verdict(options: Options) -> None:
    assert verify(QOP, SAFE, options).verdict is Verdict.UNSAT
    result = verify(QOP, UNSAFE, options)
    assert result.verdict is Verdict.SAT
    check_witness(result, QOP)


# -- properties written for the tiny network -------------------------------------------------------

HEAD = "".join(f"(declare-const {name} Real)\n" for name in ("X_0", "X_1", "Y_0", "Y_1"))
HEAD_2 = """(vnnlib-version <2.0>)
(declare-network f
  (declare-input X float32 [1,2])
  (declare-output Y float32 [1,2])
)
"""


def spec_file(folder: Path, text: str, head: str = HEAD) -> Path:
    path = folder / "p.vnnlib"
    path.write_text(head + text)
    return path


def in_box(x0: tuple[str, str], x1: tuple[str, str]) -> str:
    lines = [
        f"(assert (>= X_{i} {low}))(assert (<= X_{i} {high}))"
        for i, (low, high) in enumerate((x0, x1))
    ]
    return "\n".join(lines) + "\n"


SMALL = in_box(("0.3", "0.34"), ("0.3", "0.34"))


@functools.cache
def tiny_outputs(x0: str, x1: str) -> tuple[float, float]:
    y = run_file(QOP, [np.array([[x0, x1]], np.float32)])[0].reshape(-1)
    return float(y[0]), float(y[1])


@pytest.mark.parametrize("point", [("0.3", "0.7"), ("1", "0.1"), ("0.5", "0.5")])
def test_a_box_of_one_point_is_one_evaluation(point: tuple[str, str], tmp_path: Path) -> None:
    y0, y1 = tiny_outputs(*point)
    box = in_box((point[0], point[0]), (point[1], point[1]))
    for relation, unsafe in (("<=", y0 <= y1), (">=", y0 >= y1)):
        result = verify(QOP, spec_file(tmp_path, box + f"(assert ({relation} Y_0 Y_1))"), CPU)
        assert result.verdict is (Verdict.SAT if unsafe else Verdict.UNSAT)
        assert result.stats.subproblems == 1
        assert result.stats.leaves == int(unsafe)
        assert result.stats.attack_points == 0
        if unsafe:
            check_witness(result, QOP)


def test_an_exact_tie_decides_strictness(tmp_path: Path) -> None:
    """The threshold is the very float that onnxruntime gives, then one digit beyond its last, which
    a double does not hold: a checker that compares doubles sees a tie, and one that compares
    rationals does not."""
    y0, _ = tiny_outputs("0.3", "0.3")
    assert y0 < 0
    exact = f"{y0:.200f}".rstrip("0")  # all digits
    assert Fraction(exact) == Fraction(y0)
    for text, verdict in (
        (f"(<= Y_0 {exact})", Verdict.SAT),
        (f"(< Y_0 {exact})", Verdict.UNSAT),
        (f"(>= Y_0 {exact})", Verdict.SAT),
        (f"(<= Y_0 {exact}1)", Verdict.UNKNOWN),
        (f"(> Y_0 {exact}1)", Verdict.UNKNOWN),
        (f"(>= Y_0 {exact}1)", Verdict.SAT),
        (f"(< Y_0 {exact}1)", Verdict.UNSAT),
        (f"(<= Y_0 {math.nextafter(y0, -math.inf)!r})", Verdict.UNSAT),
        (f"(> Y_0 {math.nextafter(y0, -math.inf)!r})", Verdict.SAT),
    ):
        path = spec_file(tmp_path, in_box(("0.3", "0.3"), ("0.3", "0.3")) + f"(assert {text})")
        assert verify(QOP, path, CPU).verdict is verdict, text


def test_contradictory_disjuncts_are_unsat(tmp_path: Path) -> None:
    """No row alone is refuted by the bounds, so this needs the search (Y_0 has no value so close to
    -12)."""
    text = (
        "(assert (or (and (<= Y_0 -12.0) (>= Y_0 -11.99)) (and (> Y_1 Y_0) (< Y_1 Y_0)) (and (< "
        "Y_1 9) (> Y_1 9))))"
    )
    result = verify(QOP, spec_file(tmp_path, SMALL + text), CPU)
    assert result.verdict is Verdict.UNSAT
    assert result.stats.subproblems > 1


@pytest.mark.parametrize(
    "nothing", ["(assert (> 0 1))", "(assert (or (and (>= X_0 0.8) (>= Y_0 0))))"]
)
def test_no_query_left_is_unsat(nothing: str, tmp_path: Path) -> None:
    result = verify(QOP, spec_file(tmp_path, SMALL + nothing), CPU)
    assert result.details["property"].queries == ()
    assert result.verdict is Verdict.UNSAT
    assert result.stats.subproblems == 0


@pytest.mark.parametrize("attack", [True, False])
def test_a_property_without_outputs_is_sat(attack: bool, tmp_path: Path) -> None:
    result = verify(
        QOP, spec_file(tmp_path, SMALL), Options(device="cpu", timeout=30, attack=attack)
    )
    assert result.verdict is Verdict.SAT
    check_witness(result, QOP)


def test_one_unsafe_box_of_several_is_enough(tmp_path: Path) -> None:
    y0, y1 = tiny_outputs("0.3", "0.3")
    wrong = "(>= Y_0 Y_1)" if y0 < y1 else "(<= Y_0 Y_1)"
    right = "(<= Y_0 Y_1)" if y0 < y1 else "(>= Y_0 Y_1)"
    safe = f"(and (<= X_0 0.31) (<= X_1 0.31) {wrong})"
    unsafe = f"(and (>= X_0 0.3) (<= X_0 0.31) (<= X_1 0.305) {right})"
    for parts, verdict in (
        ((safe, unsafe), "sat"),
        ((unsafe, safe), "sat"),
        ((safe, safe), "unsat"),
    ):
        result = verify(QOP, spec_file(tmp_path, SMALL + f"(assert (or {' '.join(parts)}))"), CPU)
        assert result.verdict == verdict
        if verdict == "sat":
            check_witness(result, QOP)


def test_rows_that_mention_inputs(tmp_path: Path) -> None:
    y0, _ = tiny_outputs("0.3", "0.3")
    for offset, verdict in ((-50, "sat"), (50, "unsat")):
        text = f"(assert (>= (+ Y_0 (* 0.5 X_0)) {y0 + offset:.6f}))"
        result = verify(QOP, spec_file(tmp_path, SMALL + text), CPU)
        assert result.verdict == verdict
        if verdict == "sat":
            check_witness(result, QOP)


def test_numbers_beyond_float64(tmp_path: Path) -> None:
    for text, verdict in (
        ("(assert (<= Y_0 1e400))", "sat"),
        ("(assert (>= Y_0 1e400))", "unsat"),
        (
            "(assert (<= (* 1e200 Y_0) (* 1e200 Y_1)))",
            verify(QOP, spec_file(tmp_path, SMALL + TIE), CPU).verdict,
        ),
        ("(assert (<= (* 1e400 Y_0) (* 1e400 Y_1)))", "unknown"),  # as a double, 1e400 is infinite
    ):
        assert verify(QOP, spec_file(tmp_path, SMALL + text), CPU).verdict == verdict


TIE = "(assert (<= Y_0 Y_1))"


def test_a_gzip_file_and_its_missing_ending(tmp_path: Path) -> None:
    (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(UNSAFE.read_bytes()))
    for name in ("p.vnnlib.gz", "p.vnnlib"):
        assert verify(QOP, tmp_path / name, CPU).verdict is Verdict.SAT


@pytest.mark.parametrize("model", [QOP, QDQ], ids=["qop", "qdq"])
def test_a_packed_model_is_the_model(model: Path, tmp_path: Path) -> None:
    """By its own name, or by that of the file it was packed from; with one hash, and certificates
    for both."""
    packed = tmp_path / "m.onnx.gz"
    packed.write_bytes(gzip.compress(model.read_bytes()))
    plain = verify(model, UNSAFE, CPU)
    for path in (packed, packed.with_suffix("")):
        found = verify(path, UNSAFE, CPU)
        assert found.verdict is Verdict.SAT
        assert found.details["model_sha256"] == plain.details["model_sha256"]
        check_witness(found, model)


def test_a_packed_model_that_cannot_be_unpacked(tmp_path: Path) -> None:
    data = gzip.compress(QOP.read_bytes())
    for name, broken in (
        ("short", data[:-20]),
        ("sum", data[:-8] + bytes(8)),
        ("bits", data[:40] + b"!" * 40),
    ):
        path = tmp_path / f"{name}.onnx.gz"
        path.write_bytes(broken)
        with pytest.raises(ModelError, match=rf"{name}\.onnx: damaged or truncated gzip file"):
            verify(path.with_suffix(""), UNSAFE, CPU)


def test_a_packed_model_has_no_data_beside_it(tmp_path: Path) -> None:
    model = onnx.load(QOP)
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.data"
    )
    assert verify(tmp_path / "m.onnx", UNSAFE, CPU).verdict is Verdict.SAT
    (tmp_path / "p.onnx.gz").write_bytes(gzip.compress((tmp_path / "m.onnx").read_bytes()))
    with pytest.raises(ModelError, match=r"p\.onnx: it keeps data in other files.*: unpack it"):
        verify(tmp_path / "p.onnx", UNSAFE, CPU)


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [True, False])
def test_a_timeout_is_prompt_and_said(attack: bool) -> None:
    started = time.process_time()  # of this process alone: others may keep the machine busy
    model, spec = (
        EXAMPLES / "onnx" / "mnist_cnn_qop.onnx",
        EXAMPLES / "vnnlib" / "mnist_8_eps_8.vnnlib.gz",
    )
    result = verify(model, spec, Options(device="cpu", timeout=0.5, attack=attack, backward=False))
    assert result.verdict is Verdict.TIMEOUT
    assert result.witness is None and "time is up" in result.reason
    assert time.process_time() - started < 3.0


def test_no_time_at_all_is_a_timeout() -> None:
    assert verify(QOP, SAFE, Options(device="cpu", timeout=1e-9)).verdict is Verdict.TIMEOUT


# -- `sat` only after the replay -------------------------------------------------------------------


def changed(outputs: list[Any]) -> list[Any]:
    return [value - np.float32(0.125) for value in outputs]


def swapped(outputs: list[Any]) -> list[Any]:
    return [value[..., ::-1] for value in outputs]


def infinite(outputs: list[Any]) -> list[Any]:
    return [value + np.float32(np.inf) for value in outputs]


def truncated(outputs: list[Any]) -> list[Any]:
    return [value[..., :1] for value in outputs]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (changed, "differ"),
        (swapped, "satisfy the property"),
        (infinite, "not finite"),
        (truncated, "1 output"),
    ],
)
def test_a_witness_that_does_not_replay_is_unknown(
    other: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = runtime.Session.run
    monkeypatch.setattr(runtime.Session, "run", lambda self, inputs: other(honest(self, inputs)))
    monkeypatch.setattr(Engine, "cross_check", lambda *_: [])  # which would notice first
    result = verify(QOP, UNSAFE, CPU)
    assert result.verdict is Verdict.UNKNOWN
    assert result.witness is None
    assert "did not replay" in result.reason and reason in result.reason


def test_the_replay_trusts_nobody() -> None:
    """It tests the printed decimals against the exact box, strict bounds included, and the outputs
    against the rows."""
    found = verify(QOP, UNSAFE, CPU).witness
    assert found is not None
    (query,) = read_property(UNSAFE).queries
    y = np.asarray(found.outputs[0], np.float64).reshape(-1)

    def again(query: Query, text: tuple[str, ...]) -> Any:
        fed = [np.array([float(t) for t in text], np.float32).reshape(found.inputs[0].shape)]
        outputs = runtime.Session(QOP).run(fed)
        return replay(QOP, query, fed, text, np.asarray(outputs[0], np.float64).reshape(-1))

    assert again(query, found.input_text).output_text == found.output_text
    with pytest.raises(NotReplayed, match="is not the value that was run"):
        other = f"{(float(found.input_text[0]) + float(query.box.upper[0])) / 2 + 1e-4:.6f}"
        replay(QOP, query, list(found.inputs), (other, found.input_text[1]), y)
    always = replace(query, cases=((),))
    box = query.box
    with pytest.raises(NotReplayed, match=r"X_1 = .* lies outside"):
        again(query, (found.input_text[0], "0.9"))
    first = frozenset({0})
    for end, open_box in (
        (box.lower, replace(box, lower_strict=first)),
        (box.upper, replace(box, upper_strict=first)),
    ):
        edge = (f"{float(end[0]):.12f}", found.input_text[1])
        assert again(always, edge).input_text == edge
        with pytest.raises(NotReplayed, match=r"X_0 .* outside"):
            again(replace(always, box=open_box), edge)
    for impossible in (
        Row(((0, Fraction(1)),), (), Fraction(0)),  # X_0 <= 0
        Row((), ((0, Fraction(1)),), Fraction(float(y[0])), True),  # Y_0 less than itself
    ):
        with pytest.raises(NotReplayed, match="satisfy the property"):
            again(
                replace(query, cases=((impossible,), (*query.cases[0], impossible))),
                found.input_text,
            )


def test_without_onnxruntime_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is read as the graph that onnxruntime makes of it; there is no other way in."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not runtime.available()
    with pytest.raises(
        UsageError, match=r"^Reading a model needs onnxruntime .*pip install onnxruntime$"
    ):
        verify(QOP, SAFE)


def test_an_output_that_can_be_infinite_is_unknown(tmp_path: Path) -> None:
    g = Graph()
    x = g.quantize(g.input((1, 2)), 1.0, np.array(0, np.uint8))
    weight, scale = g.const([[100, 0], [100, 1]], np.int8), g.f32(1e18)
    zero, minus = g.const(0, np.uint8), g.const(0, np.int8)
    y = g.node(
        "QGemm", x, g.f32(1e18), zero, weight, scale, minus, g.const([0, 0], np.int32), "", ""
    )
    model = write(g.model(y), tmp_path / "m.onnx")
    text = in_box(("0", "255"), ("0", "255")) + "(assert (<= Y_1 5))"
    result = verify(model, spec_file(tmp_path, text), CPU)
    assert result.verdict is Verdict.UNKNOWN
    assert "overflow" in result.reason
    text = in_box(("0", "1"), ("0", "1")) + "(assert (<= Y_1 5))"
    assert verify(model, spec_file(tmp_path, text), CPU).verdict is Verdict.SAT


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "(declare-const Y_1 Real)\n",
            "(declare-const Y_1 Real)\n(declare-const Y_2 Real)\n",
            "3 output elements",
        ),
        ("(declare-const X_1 Real)\n", "", "1 input elements"),
        ("Real", "Int", "Int inputs"),
    ],
)
def test_a_1_0_property_of_another_model(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = in_box(("0", "1"), ("0", "1")) if new else "(assert (>= X_0 0))(assert (<= X_0 1))"
    with pytest.raises(SpecError, match=message) as info:
        verify(QOP, spec_file(tmp_path, text + "(assert (>= Y_0 0))", HEAD.replace(old, new)), CPU)
    assert "p.vnnlib" in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("X float32", "X uint8", "X is uint8, the model's '.*' is float32"),
        ("Y float32", "Y float64", "Y is float64"),
        (
            "X float32 [1,2]",
            "X float32 [2,2]",
            r"X \[2, 2\], a batch of 2, but the model's '.*' is read as \[1, 2\]",
        ),
        ("X float32 [1,2]", "X float32 [1,3]", "3 input elements"),
        (
            "(declare-input X float32 [1,2])",
            "(declare-input X float32 [1]) (declare-input Z float32 [1])",
            "2 inputs",
        ),
    ],
)
def test_a_2_0_property_of_another_model(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in HEAD_2
    names = ["X[0]", "Z[0]"] if "Z" in new else ["X[0,0]", "X[0,1]"]
    names += ["X[1,0]", "X[1,1]"] if "[2,2]" in new else []
    names += ["X[0,2]"] if "[1,3]" in new else []
    bounds = "".join(f"(assert (>= {name} 0)) (assert (<= {name} 1))" for name in names)
    with pytest.raises(SpecError, match=message):
        verify(
            QOP,
            spec_file(tmp_path, bounds + "(assert (>= Y[0,0] 0.0))", HEAD_2.replace(old, new)),
            CPU,
        )


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 1, 2)])
def test_axes_of_one_may_differ(shape: tuple[int, ...], tmp_path: Path) -> None:
    """They leave every element in its place; the counterexample is printed in the declared
    shape."""
    text = UNSAFE.with_name("tiny_unsafe_v2.vnnlib").read_text()

    def renamed(match: re.Match[str]) -> str:
        index = np.unravel_index(int(match[2]), shape)
        return f"{match[1]}[{','.join(map(str, index))}]"

    text = re.sub(r"\b([XY])\[0,(\d)\]", renamed, text).replace("[1,2]", str(list(shape)))
    found = verify(QOP, spec_file(tmp_path, text, ""), CPU)
    assert found.verdict is Verdict.SAT
    check_witness(found, QOP)
    first, second = found.details["warnings"]
    assert f"X has shape {list(shape)}" in first and f"Y has shape {list(shape)}" in second


def test_another_order_of_axes_is_refused(tmp_path: Path) -> None:
    g = Graph()
    x = g.quantize(g.input((1, 2, 3)), 1.0, np.array(0, np.uint8))
    model = write(g.model(g.dequantize(x, 1.0, np.array(0, np.uint8))), tmp_path / "m.onnx")
    head = (
        "(vnnlib-version <2.0>)(declare-network f (declare-input X real [3,2])(declare-output Y "
        "real [1,2,3]))"
    )
    with pytest.raises(SpecError, match=r"X has shape \[3, 2\], the model's 'x0' \[1, 2, 3\]"):
        verify(model, spec_file(tmp_path, "(assert (> X[0,0] Y[0,0,0]))", head), CPU)


def test_an_empty_box_is_unsat_in_2_0(tmp_path: Path) -> None:
    bounds = "(assert (and (>= X[0,0] 2.0) (<= X[0,0] 1.0) (>= X[0,1] 0.0) (<= X[0,1] 1.0)))"
    result = verify(QOP, spec_file(tmp_path, bounds + "(assert (>= Y[0,0] 0.0))", HEAD_2), CPU)
    assert result.verdict is Verdict.UNSAT
    assert "no input is allowed: contradictory bounds for X[0,0]" in result.details["warnings"][0]
    assert result.reason == "no input is allowed"


def test_inputs_without_bounds_are_all_floats(tmp_path: Path) -> None:
    """All codes occur then, also where a step before the quantizer overflows."""
    g = Graph()
    x = g.node("Mul", g.input((1, 2)), g.f32([10.0, -1e3]))
    x = g.quantize(x, 0.5, np.array(7, np.uint8))
    model = write(g.model(g.dequantize(x, 0.5, np.array(7, np.uint8))), tmp_path / "m.onnx")
    for bounds, condition, verdict in (
        ("", "(>= Y[0,0] 124.0)", "sat"),
        ("", "(> Y[0,0] 124.0)", "unsat"),
        ("(assert (>= X[0,1] 1e30))", "(>= Y[0,1] -3.4)", "unsat"),
        ("(assert (>= X[0,1] 1e30))", "(<= Y[0,1] -3.5)", "sat"),
    ):
        result = verify(model, spec_file(tmp_path, f"{bounds}(assert {condition})", HEAD_2), CPU)
        assert result.verdict == verdict, (bounds, condition)
        assert "every finite float32" in result.details["warnings"][0]
        if verdict == "sat":
            check_witness(result, model)


def test_an_unknown_branch_rule_is_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="nonsense") as info:
        verify(QOP, SAFE, Options(branch="nonsense"))
    assert all(name in str(info.value) for name in RULES)


def test_missing_files() -> None:
    for model, spec in (("absent.onnx", SAFE), (QOP, "absent.vnnlib")):
        with pytest.raises(QverifyError, match="absent"):
            verify(model, spec, CPU)


# -- what is recorded ------------------------------------------------------------------------------


def refuse(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


@pytest.mark.parametrize(
    ("model", "spec"), [(QOP, SAFE), (QDQ, SAFE), (QOP, UNSAFE), (QDQ, UNSAFE)]
)
def test_details_are_plain_json(model: Path, spec: Path) -> None:
    result = verify(model, spec, CPU)
    document = json.loads(as_json(result, str(model), str(spec), CPU), parse_constant=refuse)
    plain = {key: value for key, value in result.details.items() if key != "property"}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain == document["details"]
    assert {
        "device",
        "semantics",
        "read_by",
        "model_sha256",
        "spec_sha256",
        "warnings",
    } <= plain.keys()
    assert ("onnxruntime" in plain) == (result.verdict is Verdict.SAT)
    assert 0 <= result.stats.load_seconds <= result.stats.seconds


def test_progress_is_reported() -> None:
    seen: list[float] = []
    verify(QOP, SAFE, CPU, lambda progress: seen.append(progress.proved))
    assert seen and seen[-1] == pytest.approx(1.0)


# -- end to end ------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An executable `qverify` that is this package, and a working directory to use it in."""
    monkeypatch.setenv("PYTHONPATH", str(Path(qverify.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "qverify"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qverify "$@"\n')
    script.chmod(0o755)
    return script


def check_counterexample(text: str, model: Path, spec: Path) -> None:
    """A 1.0 counterexample of a tiny network: inside the box, and onnxruntime gives its outputs."""
    values = {name: value for name, value in re.findall(r"\(([XY]_\d+) ([^()\s]+)\)", text)}
    assert list(values) == ["X_0", "X_1", "Y_0", "Y_1"]
    for relation, name, bound in re.findall(
        r"\(assert \(([<>]=) (X_\d) ([\d.]+)\)\)", spec.read_text()
    ):
        difference = Fraction(values[name]) - Fraction(bound)
        assert difference >= 0 if relation == ">=" else difference <= 0
    outputs = run_file(model, [np.array([[values["X_0"], values["X_1"]]], np.float32)])[0].reshape(
        -1
    )
    assert [np.float32(values["Y_0"]), np.float32(values["Y_1"])] == outputs.tolist()
    assert outputs[0] >= outputs[1]


def test_batch_end_to_end(command: Path) -> None:
    folder = Path("tiny")
    for kind, files in (("onnx", (QOP, QDQ)), ("vnnlib", (SAFE, UNSAFE))):
        (folder / kind).mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder / kind)
    rows = [(m.name, s.name) for m in (QOP, QDQ) for s in (SAFE, UNSAFE)]
    rows.append(("absent.onnx", SAFE.name))
    (folder / "instances.csv").write_text("".join(f"onnx/{m},vnnlib/{s},30\n" for m, s in rows))
    arguments = [
        "batch",
        "tiny/instances.csv",
        "--jobs",
        "2",
        "--results",
        "r.csv",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [command, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    found = {tuple(row[:3]): row for row in csv.reader(Path("r.csv").read_text().splitlines())}
    assert len(found) == len(rows)
    for model, spec in rows:
        row = found["tiny", f"onnx/{model}", f"vnnlib/{spec}"]
        assert row[4] == (
            "error" if model.startswith("absent") else "sat" if spec == UNSAFE.name else "unsat"
        )
        assert row[3] == "0.0" and 0 <= float(row[5]) < 30
    texts = {path.name: path.read_text() for path in Path("r_counterexamples").iterdir()}
    assert sorted(texts) == [
        f"tiny_mlp_{form}_tiny_unsafe.counterexample" for form in ("qdq", "qop")
    ]
    for file in (QDQ, QOP):
        check_counterexample(texts[f"{file.stem}_tiny_unsafe.counterexample"], file, UNSAFE)
    again = subprocess.run(
        [command, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert again.returncode == 0 and "5 of 5 instances are in r.csv already" in again.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_competition_s_scripts_end_to_end(command: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "QVERIFY_BIN": str(command), "TMPDIR": str(tmp_path)}
    for spec, verdict in ((SAFE, "unsat"), (UNSAFE, "sat")):
        steps = (
            ("prepare_instance.sh", "v1", "tiny", str(QOP), str(spec)),
            ("run_instance.sh", "v1", "tiny", str(QOP), str(spec), "result.txt", "30"),
        )
        for name, *arguments in steps:
            line = ["bash", str(SCRIPTS / name), *arguments]
            done = subprocess.run(
                line, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr
        first, _, rest = Path("result.txt").read_text().partition("\n")
        assert first == verdict
        if verdict == "sat":
            check_counterexample(rest, QOP, spec)
        else:
            assert rest == ""


def test_a_machine_without_tested_rules_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    result = verify(QOP, SAFE, CPU)
    assert result.details["machine"] == "amd64"
    assert not any("x86-64" in text for text in result.details["warnings"])
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    other = verify(QOP, SAFE, CPU)
    assert other.details["machine"] == "arm64"
    assert any(
        "on this machine (arm64) onnxruntime has other kernels" in text
        for text in other.details["warnings"]
    )


@pytest.mark.parametrize("version", ["1.31.1", "1.31rc2", "1.31.0.dev20261101", "1.31+local"])
def test_a_version_of_the_runtime_is_read(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert runtime.release() == (1, 31)
    monkeypatch.setattr(runtime, "OLDEST", (1, 32))
    with pytest.raises(UsageError, match=r"is too old: install 1\.32 or newer"):
        runtime.release()


# -- shapes that the file leaves open --------------------------------------------------------------


def open_query(folder: Path, bound: str) -> tuple[Path, Path]:
    """A model with an open batch, and a property of version 2.0 that declares a batch of 2."""
    g = Graph()
    x = g.quantize(g.input(("n", 2)), 0.5, np.array(0, np.uint8))
    model = write(g.model(g.dequantize(x, 0.5, np.array(0, np.uint8))), folder / "open.onnx")
    bounds = "".join(
        f"(assert (and (>= X[{i},{j}] 0.0) (<= X[{i},{j}] 9.0)))" for i in (0, 1) for j in (0, 1)
    )
    network = "(declare-network N (declare-input X float32 [2,2]) (declare-output Y float32 [2,2]))"
    spec = folder / "open.vnnlib"
    spec.write_text(f"(vnnlib-version <2.0>)\n{network}{bounds}(assert (>= Y[1,1] {bound}))")
    return model, spec


def test_a_verdict_on_assumed_shapes_says_so(tmp_path: Path) -> None:
    for bound, verdict in (("9.25", Verdict.UNSAT), ("8.75", Verdict.SAT)):
        result = verify(*open_query(tmp_path, bound), CPU)
        assert result.verdict is verdict
        assert any(
            "verdicts are about the model with --shape x0=2,2" in w
            for w in result.details["warnings"]
        )


@pytest.mark.parametrize("bound", ["9.25", "8.75"])
def test_an_open_file_that_computes_otherwise_is_unknown(
    bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime fuses less where shapes are open: the file that the user runs may be another
    network."""
    honest = runtime.Session.__init__
    with_open = set[int]()

    def noted(self: Any, path: Path, as_written: bool = False, shapes: Any = None) -> None:
        honest(self, path, as_written, shapes)
        if not shapes and not as_written:
            with_open.add(id(self))

    run = runtime.Session.run
    monkeypatch.setattr(runtime.Session, "__init__", noted)
    monkeypatch.setattr(
        runtime.Session,
        "run",
        lambda self, x: [y + np.float32(0.5) * (id(self) in with_open) for y in run(self, x)],
    )
    result = verify(*open_query(tmp_path, bound), CPU)
    assert result.verdict is Verdict.UNKNOWN and "make_dynamic_shape_fixed" in result.reason
    asked = replace(CPU, shapes=("x0=2,2",))
    assert verify(*open_query(tmp_path, bound), asked).verdict in (Verdict.SAT, Verdict.UNSAT)
