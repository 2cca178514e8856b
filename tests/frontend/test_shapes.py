"""Shapes that a file leaves open: fixed by --shape, by a property of version 2, or as a batch of 1,
for every run alike."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qverify import Options, Verdict, runtime, verify
from qverify.checker import Rejected, check
from qverify.errors import UnsupportedModel, UsageError
from qverify.frontend.model import read_model
from qverify.inspect import describe
from qverify.robustness import certify
from tests.graphs import Graph, write

U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
ZERO, SIGNED = np.zeros((), U8), np.zeros((), S8)


def convolution(*shape: int | str) -> onnx.ModelProto:
    """The shape of int8 codes is asked for, as exporters do before a Reshape: onnxruntime fuses the
    Conv only where that is a constant."""
    g = Graph(17)
    w = g.dequantize(
        g.const(np.random.default_rng(0).integers(-60, 60, (2, 1, 3, 3)), S8), 0.02, SIGNED
    )
    x = g.dequantize(g.quantize(g.input(shape), 0.05, SIGNED), 0.05, SIGNED)
    y = g.dequantize(g.quantize(g.node("Conv", x, w), 0.04, SIGNED), 0.04, SIGNED)
    wanted = g.node("Concat", g.node("Shape", x, start=0, end=1), g.const(np.array([-1])), axis=0)
    y = g.node("Reshape", y, wanted)
    v = g.dequantize(g.const(np.random.default_rng(1).integers(-60, 60, (8, 3)), S8), 0.02, SIGNED)
    return g.model(g.dequantize(g.quantize(g.node("Gemm", y, v), 0.1, SIGNED), 0.1, SIGNED))


def doubled(*shape: int | str) -> onnx.ModelProto:
    """Twice its input, in steps of 0.5."""
    g = Graph(21)
    codes = g.quantize(g.input(shape), 0.5, ZERO)
    return g.model(g.dequantize(codes, 1.0, ZERO))


def spec(path: Path, x: str, y: str, conditions: str) -> Path:
    path.write_text(
        "(vnnlib-version <2.0>)\n(declare-network N (declare-input X float32 "
        f"[{x}]) (declare-output Y float32 [{y}]))\n{conditions}\n"
    )
    return path


ROW = "(assert (and (>= X[0,0] 1) (<= X[0,0] 2) (>= X[0,1] 1) (<= X[0,1] 2)))"


def test_a_batch_is_fixed_where_nothing_else_helps(tmp_path: Path) -> None:
    """The network is that of the file exported with the shape; an open file that can be read stays
    as it is."""
    path = write(convolution("batch", 1, 4, 4), tmp_path / "open.onnx")
    fixed = read_model(write(convolution(1, 1, 4, 4), tmp_path / "fixed.onnx"))
    read = read_model(path)
    assert read.lowered.digest() == fixed.lowered.digest() and (read.shapes, fixed.shapes) == (
        {"x0": (1, 1, 4, 4)},
        {},
    )
    (warning,) = (text for text in read.warnings if "batch" in text)
    assert "--shape x0=1,1,4,4" in warning
    plain = read_model(write(doubled("N", 2), tmp_path / "plain.onnx"))
    assert plain.shapes == {} and not [text for text in plain.warnings if "batch" in text]


def test_every_run_is_made_with_the_same_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = write(convolution("batch", 1, 4, 4), tmp_path / "open.onnx"), list[Any]()
    real = runtime._fixed

    def noted(path: Path, shapes: Any, options: Any) -> str | bytes:
        made.append(shapes)
        return real(path, shapes, options)

    monkeypatch.setattr(runtime, "_fixed", noted)
    box = "".join(f"(assert (>= X_{i} 0.1))(assert (<= X_{i} 0.9))" for i in range(16))
    names = "".join(f"(declare-const X_{i} Real)" for i in range(16)) + "".join(
        f"(declare-const Y_{i} Real)" for i in range(3)
    )
    text = tmp_path / "p.vnnlib"
    text.write_text(f"{names}{box}(assert (>= Y_0 -99))")
    result = verify(path, text, Options(certificate=True))
    assert result.verdict is Verdict.SAT and result.details["shapes"] == "x0=1,1,4,4"
    # First the file is tried as it stands, and a counterexample on shapes that nobody asked for has
    # to hold there at last.
    assert made[0] == made[-1] == {} and len(made) > 4
    assert all(shapes == {"x0": (1, 1, 4, 4)} for shapes in made[1:-1])
    assert result.certificate is not None
    proof = tmp_path / "proof.zip"
    proof.write_bytes(result.certificate)
    assert check(path, text, proof).verdict == "sat"
    again = verify(path, text, Options(shapes=("x0=1,1,4,4",)))
    assert again.details["shapes"] == result.details["shapes"]


def test_a_property_declares_the_shape(tmp_path: Path) -> None:
    """Version 2: the batch is the declared one; `unsat` and its certificate are about that."""
    path = write(doubled("N", 2), tmp_path / "m.onnx")
    assert describe(path).count("float32[1, 2]") == 2
    rows = ROW + ROW.replace("[0,", "[1,")
    large = spec(tmp_path / "large.vnnlib", "2,2", "2,2", f"{rows}(assert (>= Y[1,0] 4.1))")
    small = spec(tmp_path / "small.vnnlib", "1,2", "1,2", f"{ROW}(assert (>= Y[0,0] 4.1))")
    for text, shapes in ((large, "x0=2,2"), (small, "")):
        result = verify(path, text, Options(certificate=True))
        assert result.verdict is Verdict.UNSAT and result.details["shapes"] == shapes
        assert result.certificate is not None
        (tmp_path / "proof.zip").write_bytes(result.certificate)
        assert check(path, text, tmp_path / "proof.zip").verdict == "unsat"
    with pytest.raises(
        Rejected,
        match="it is about the model with --shape '', not 'x0=1,2': give the check the same",
    ):
        check(path, small, tmp_path / "proof.zip", ("x0=1,2",))


def test_other_open_axes(tmp_path: Path) -> None:
    path = write(doubled(1, "length"), tmp_path / "m.onnx")
    with pytest.raises(
        UnsupportedModel,
        match=r"axis 1 of the input 'x0' is dynamic \(length\); fix it with --shape x0=1,length$",
    ):
        read_model(path)
    assert read_model(path, ["x0=1,5"]).lowered.inputs == (("x0", (1, 5), np.dtype(np.float32)),)
    assert "with --shape x0=1,5" in describe(path, ["x0=1,5"])


def test_axes_of_one_name_have_one_size(tmp_path: Path) -> None:
    g = Graph(21)
    a, b = (g.quantize(g.input(("N", "M")), 0.5, ZERO) for _ in range(2))
    path = write(
        g.model(g.dequantize(a, 1.0, ZERO), g.dequantize(b, 1.0, ZERO)), tmp_path / "m.onnx"
    )
    assert read_model(path, ["x1=3,2"]).shapes == {"x0": (3, 2), "x1": (3, 2)}
    with pytest.raises(UsageError, match="the axis 'N' of the model cannot be both 3 and 4"):
        read_model(path, ["x1=3,2", "x0=4,2"])


def test_an_input_without_a_shape(tmp_path: Path) -> None:
    model = doubled(1, 2)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    path = write(model, tmp_path / "m.onnx")
    with pytest.raises(
        UnsupportedModel, match="the input 'x0' has no tensor shape; give one: --shape x0="
    ):
        read_model(path)
    assert read_model(path, ["x0=3,2"]).lowered.inputs[0][1] == (3, 2)


def test_external_data_beside_a_model_with_a_fixed_shape(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(
        convolution("batch", 1, 4, 4),
        path,
        save_as_external_data=True,
        location="w.bin",
        size_threshold=60,
    )
    inside = read_model(write(convolution("batch", 1, 4, 4), tmp_path / "inside.onnx"))
    assert read_model(path, ["x0=1,1,4,4"]).lowered.digest() == inside.lowered.digest()
    assert inside.sha256 == hashlib.sha256((tmp_path / "inside.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("x0", "a name and positive numbers are expected, such as x=1,3,64,64"),
        ("x0=", "a name and positive numbers"),
        ("x0=1,-2", "a name and positive numbers"),
        ("x0=99999999999999999999,2", "a name and positive numbers"),
        ("x0=1,two", "a name and positive numbers"),
        ("y=1,2", "the model has no such input; it has 'x0'"),
        ("x0=1,3", r"\[1, 3\] does not fit the input's shape in the file, \[N, 2\]"),
        ("x0=1", r"\[1\] does not fit"),
    ],
)
def test_shapes_that_are_not_the_model_s(given: str, words: str, tmp_path: Path) -> None:
    path = write(doubled("N", 2), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=words):
        read_model(path, [given])
    with pytest.raises(UsageError, match="one shape for each input"):
        read_model(path, ["x0=1,2", "x0=1,2"])


def test_a_shape_that_the_file_has_anyway(tmp_path: Path) -> None:
    assert read_model(write(doubled(1, 2), tmp_path / "m.onnx"), ["x0=1,2"]).shapes == {}


def test_rows_of_images_are_about_the_shape(tmp_path: Path) -> None:
    """What was fixed to read a classifier is part of what its rows rest on."""
    path, rows = (
        write(convolution("batch", 1, 4, 4), tmp_path / "m.onnx"),
        str(tmp_path / "rows.csv"),
    )
    images, labels = np.full((2, 1, 4, 4), 128, np.uint8), np.zeros(2, np.int64)
    report = certify(path, images, labels, [1], options=Options(timeout=5.0), results=rows)
    assert report.about["shape"] == "x0=1,1,4,4" and len(report.rows) == 2
    assert any("batch of 1" in text for text in report.warnings)
    kept = Path(rows).read_text()
    again = certify(
        path,
        images,
        labels,
        [1],
        options=Options(timeout=5.0, shapes=("x0=1,1,4,4",)),
        results=rows,
    )
    assert len(again.rows) == 2 and Path(rows).read_text() == kept
    Path(rows).write_text(kept.replace("x0=1,1,4,4", "x0=1,1,2,8"))
    with pytest.raises(
        UsageError, match=r"holds rows of another shape \(x0=1,1,2,8, not x0=1,1,4,4\)"
    ):
        certify(path, images, labels, [1], options=Options(timeout=5.0), results=rows)
