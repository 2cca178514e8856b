"""Real model files: all static 8-bit ones load and equal onnxruntime; the committed table says the
same of all files."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from qverify import runtime
from qverify.errors import UnsupportedModel
from qverify.frontend.model import read_model
from qverify.frontend.rules.softmax import OLDEST as OLDEST_SOFTMAX

ROOT = Path(__file__).parents[2]
MODELS = ROOT.parent / "shared" / "models"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not MODELS.is_dir(), reason="the folder ../shared/models is not here"),
]


def _model_table() -> ModuleType:
    path = ROOT / "benchmarks" / "model_table.py"
    spec = importlib.util.spec_from_file_location("model_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _static(form: str, activation: str) -> list[Path]:
    """onnxruntime's static quantizations in one form, 8-bit weights and activations of one type."""
    pattern = re.compile(rf"\.{form}\.{activation}(s8|u8)(\.|$)")
    return [p for p in sorted(MODELS.glob("ort_static/*.onnx")) if pattern.search(p.name)]


@pytest.mark.parametrize("form,activation", [("qop", "u8"), ("qop", "s8"), ("qdq", "u8")])
def test_static_8_bit_files_load_and_equal_onnxruntime(form: str, activation: str) -> None:
    if runtime.release() < OLDEST_SOFTMAX:
        pytest.skip(
            "some of the files end in a QLinearSoftmax, which this onnxruntime rounds otherwise"
        )
    table = _model_table()
    files = _static(form, activation)
    assert len(files) >= 20
    for path in files:
        values, different, exact = table.compare(read_model(path), 8, 0)
        assert exact and values and not different, path.name


def test_int8_qdq_files_load_unless_the_runtime_leaves_a_float_convolution() -> None:
    table = _model_table()
    loaded = 0
    for path in _static("qdq", "s8"):
        try:
            model = read_model(path)
        except UnsupportedModel as error:
            assert "Conv" in str(error) and "from fusing int8" in str(error), error
            continue
        assert table.compare(model, 8, 0)[1] == 0, path.name
        loaded += 1
    assert loaded >= 10


def test_the_committed_table_has_no_differing_file() -> None:
    with (ROOT / "benchmarks" / "results" / "models.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) > 500
    assert not [r["file"] for r in rows if r["status"] == "DIFFERENT"]
    assert sum(r["status"] == "same" for r in rows) >= 190
    assert all(r["reason"] for r in rows if r["status"] == "refused")
