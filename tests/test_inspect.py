"""What `qverify inspect` says of a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qverify.inspect import describe
from tests.graphs import Graph, write

EXAMPLES = Path(__file__).parent.parent / "specs" / "examples" / "onnx"


@pytest.mark.parametrize(
    ("low", "high", "bits"), [(-8, 7, 4), (-7, 8, 5), (0, 3, 3), (-128, 0, 8), (-2, 1, 2)]
)
def test_weights_are_counted_in_the_bits_that_they_need(
    low: int, high: int, bits: int, tmp_path: Path
) -> None:
    weight = np.zeros((512, 2), np.int8)
    weight[0] = low, high
    g = Graph()
    one, zero = g.f32(1.0), g.const(np.array(0, np.uint8))
    x = g.quantize(g.input((1, 512)), 1.0, np.array(0, np.uint8))
    y = g.node("QLinearMatMul", x, one, zero, g.const(weight), one, g.const(np.int8(0)), one, zero)
    text = describe(
        write(g.model(g.dequantize(y, 1.0, np.array(0, np.uint8))), tmp_path / "m.onnx")
    )
    assert f"512x2, {bits}-bit weights" in text
    assert f"1,024 weights, {bits / 8:.1f} KiB" in text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.onnx")), ids=lambda path: path.stem)
def test_every_layer_of_the_examples_is_shown(path: Path) -> None:
    text = describe(path)
    assert path.name in text and "outputs; " in text and "accumulators: at most" in text
