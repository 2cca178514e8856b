"""Networks that hardly compute: outputs that are input codes, moved, twice, or of no size; inputs
that nothing reads, or that are quantized twice. Each is decided with all options, and its
certificate is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import Options, Verdict, verify
from qverify.checker import check
from qverify.errors import UsageError
from tests.graphs import Graph, write

Build = Callable[[Graph], list[str]]
Queries = dict[str, Verdict]
SAT, UNSAT = Verdict.SAT, Verdict.UNSAT
THREE = np.asarray(3, np.uint8)


def door(g: Graph, scale: float = 0.5) -> str:
    """An input of two elements as codes: a value v in [0, 20] becomes round(v / scale) + 3, at most
    43 with 0.5."""
    return g.quantize(g.input((1, 2)), scale, THREE)


def codes(g: Graph) -> list[str]:
    return [door(g)]


def floats(g: Graph) -> list[str]:
    return [g.dequantize(door(g), 0.5, THREE)]


def moved(g: Graph) -> list[str]:
    return [g.node("Transpose", door(g), perm=[1, 0])]


def moved_and_not(g: Graph) -> list[str]:
    x = door(g)
    return [g.node("Transpose", x, perm=[1, 0]), x]


def two_of_one_value(g: Graph) -> list[str]:
    x = door(g)
    return [g.dequantize(x, 0.5, THREE), g.dequantize(x, 0.25, THREE)]


def twice(g: Graph) -> list[str]:
    return [door(g)] * 2


def unread(g: Graph) -> list[str]:
    x = door(g)
    g.input((1, 2))
    return [g.dequantize(x, 0.5, THREE)]


def integers(g: Graph) -> list[str]:
    return [g.node("Identity", g.input((1, 2), np.uint8))]


def reshaped_integers(g: Graph) -> list[str]:
    return [g.node("Reshape", g.input((1, 2), np.uint8), g.const(np.array([2, 1])))]


def no_element(g: Graph) -> list[str]:
    x = door(g)
    none = g.node(
        "Slice", x, g.const(np.array([0])), g.const(np.array([0])), g.const(np.array([1]))
    )
    return [g.dequantize(x, 0.5, THREE), none]


def two_quantizers(g: Graph) -> list[str]:
    """Of an input's 41 x 68 pairs of codes few belong to any value."""
    x = g.input((1, 2))
    return [g.quantize(x, scale, THREE) for scale in (0.5, 0.3)]


def float_sum(g: Graph) -> list[str]:
    """Of two inputs: an output that is a function of two codes, with values of any float32."""
    return [g.node("Add", *(g.dequantize(door(g), 0.5, THREE) for _ in range(2)))]


CASES: list[tuple[Build, int, int, Queries]] = [
    (codes, 2, 2, {"(>= (+ Y_0 Y_1) 86)": SAT, "(>= (+ Y_0 Y_1) 87)": UNSAT}),
    (codes, 2, 2, {"(>= (+ Y_0 Y_1) 60)) (assert (<= (+ Y_0 Y_1) 59.5)": UNSAT}),
    (floats, 2, 2, {"(>= (- Y_0 Y_1) 20)": SAT, "(>= (- Y_0 Y_1) 20.5)": UNSAT}),
    (moved, 2, 2, {"(>= Y_0 43)": SAT, "(>= Y_0 44)": UNSAT}),
    (
        moved_and_not,
        2,
        4,
        {"(>= (- Y_0 Y_3) 40)": SAT, "(>= (- Y_0 Y_2) 1)": UNSAT, "(>= (- Y_1 Y_2) 41)": UNSAT},
    ),
    (two_of_one_value, 2, 4, {"(>= (- Y_0 Y_2) 10)": SAT, "(>= (- Y_0 Y_2) 10.5)": UNSAT}),
    (twice, 2, 4, {"(>= (- Y_0 Y_2) 0)": SAT, "(>= (- Y_0 Y_2) 1)": UNSAT}),
    (unread, 4, 2, {"(>= Y_0 20)": SAT, "(>= Y_0 21)": UNSAT}),
    (integers, 2, 2, {"(>= Y_0 20)": SAT, "(>= Y_0 21)": UNSAT}),
    (reshaped_integers, 2, 2, {"(>= Y_0 20)": SAT, "(>= Y_0 21)": UNSAT}),
    (no_element, 2, 2, {"(>= Y_0 20)": SAT, "(>= Y_0 21)": UNSAT}),
    (float_sum, 4, 2, {"(>= (+ Y_0 Y_1) 80)": SAT, "(>= (+ Y_0 Y_1) 80.5)": UNSAT}),
    (two_quantizers, 2, 4, {"(<= (- Y_0 Y_2) -27)": SAT, "(<= (- Y_0 Y_2) -28)": UNSAT}),
]


def spec(inputs: int, outputs: int, condition: str) -> str:
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    lines += [f"(assert (>= X_{i} 0)) (assert (<= X_{i} 20))" for i in range(inputs)]
    return "\n".join([*lines, f"(assert {condition})"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_what_hardly_computes_is_decided(
    case: tuple[Build, int, int, Queries], tmp_path: Path
) -> None:
    build, inputs, outputs, queries = case
    graph = Graph()
    model = write(graph.model(*build(graph)), tmp_path / "m.onnx")
    for condition, verdict in queries.items():
        path, proof = tmp_path / "p.vnnlib", tmp_path / "proof"
        path.write_text(spec(inputs, outputs, condition))
        options: list[dict[str, Any]] = [{}, {"attack": False, "backward": False, "batch": 3}]
        for chosen in options:
            result = verify(
                model, path, Options(device="cpu", timeout=30, certificate=True, **chosen)
            )
            assert result.verdict is verdict, (condition, chosen, result.reason)
            assert result.certificate is not None
            proof.write_bytes(result.certificate)
            assert check(model, path, proof).verdict == verdict.value


def test_a_certificate_is_refused_before_the_search_or_accepted_after_it(tmp_path: Path) -> None:
    """One query is sat at once, another one mentions inputs: no search can know which it ends
    with."""
    graph = Graph()
    model = write(graph.model(*floats(graph)), tmp_path / "m.onnx")
    path = tmp_path / "p.vnnlib"
    either = "(or (and (>= Y_0 1) (<= X_0 5)) (and (>= (- Y_0 X_0) 0.2) (>= X_0 6)))"
    path.write_text(spec(2, 2, either))
    assert verify(model, path, Options(device="cpu", timeout=30)).verdict is Verdict.SAT
    with pytest.raises(UsageError, match="conditions mention inputs"):
        verify(model, path, Options(device="cpu", timeout=30, certificate=True))
