"""Verdicts against the official checkers, which compare doubles (1.0) and float32 (2.x); both are written here anew.

Small networks, every code of their inputs: what some checker accepts is never called `unsat`, and a counterexample as it is
printed is accepted by every one.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from qverify import Options, Result, Verdict, verify
from qverify.checker import check
from tests.graphs import ROUNDS, Graph, write

F32 = np.float32
CPU = Options(device="cpu", timeout=60.0)
COMPARED = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
INPUTS, OUTPUTS = 2, 3
Array = npt.NDArray[Any]
Tree = Any  # a name, a decimal, or (head, operand, ...)


# -- the checkers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """Bounds of the inputs, and the unsafe cases, each some comparisons (op, left, right)."""

    bounds: tuple[tuple[str, str], ...]
    cases: tuple[tuple[tuple[str, Tree, Tree], ...], ...]
    second: bool  # VNN-LIB 2.0

    def text(self) -> str:
        def show(tree: Tree) -> str:
            if not isinstance(tree, str):
                return f"({' '.join(map(show, tree))})"
            return f"{tree[0]}[0,{tree[2:]}]" if self.second and tree[0] in "XY" else tree

        lines = [
            f"(declare-const {letter}_{i} Real)" for letter, n in (("X", INPUTS), ("Y", OUTPUTS)) for i in range(n)
        ]
        if self.second:
            tensors = f"(declare-input X float32 [1,{INPUTS}]) (declare-output Y float32 [1,{OUTPUTS}])"
            lines = ["(vnnlib-version <2.0>)", f"(declare-network N {tensors})"]
        for i, (low, high) in enumerate(self.bounds):
            lines += [f"(assert (>= {show(f'X_{i}')} {low}))", f"(assert (<= {show(f'X_{i}')} {high}))"]
        cases = [f"(and {' '.join(map(show, case))})" for case in self.cases]
        return "\n".join([*lines, f"(assert (or {' '.join(cases)}))", ""])

    def accepted(self, texts: Sequence[str], y: Array) -> dict[str, bool]:
        """What every checker says of a printed input and the runtime's outputs."""
        wide, fed = [float(v) for v in y], [F32(float(t)) for t in texts]
        exact = self._holds([Fraction(t) for t in texts], [Fraction(v) for v in wide], Fraction)
        found = {"exact": exact, "double": self._holds([float(t) for t in texts], wide, float)}
        # 1.0: inputs are cast to the model's type first, and NumPy compares them with a bound in that type.
        found["1.0"] = self._inside(fed, float) and self._cases(named(fed, wide), float)
        if self.second:
            found["2.0"] = self._holds(fed, list(y), float)
        return found

    def _holds(self, x: Sequence[Any], y: Sequence[Any], number: Any) -> bool:
        return self._inside(x, number) and self._cases(named(x, y), number)

    def _inside(self, x: Sequence[Any], number: Any) -> bool:
        return all(number(low) <= v <= number(high) for v, (low, high) in zip(x, self.bounds, strict=True))

    def _cases(self, values: dict[str, Any], number: Any) -> bool:
        return any(
            all(COMPARED[op](computed(a, values, number), computed(b, values, number)) for op, a, b in case)
            for case in self.cases
        )


def named(x: Sequence[Any], y: Sequence[Any]) -> dict[str, Any]:
    return {f"{letter}_{i}": v for letter, own in (("X", x), ("Y", y)) for i, v in enumerate(own)}


def computed(tree: Tree, values: dict[str, Any], number: Any) -> Any:
    if isinstance(tree, str):
        return values[tree] if tree in values else number(tree)
    head, *own = tree
    operands = [computed(part, values, number) for part in own]
    if head == "+":
        return sum(operands)
    return operands[0] - sum(operands[1:]) if head == "-" else math.prod(operands)


# -- networks and properties ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Net:
    """A model, and what it gives for inputs."""

    path: Path
    scale: float
    zero: int

    @staticmethod
    def random(rng: np.random.Generator, path: Path) -> Net:
        """QuantizeLinear, an integer product, DequantizeLinear."""
        g, scale, zero = Graph(), float(F32(rng.choice([0.1, 0.05, 0.25, 0.0039215686]))), int(rng.integers(0, 200))
        step, u8 = g.f32(float(rng.choice([0.01, 0.1, 0.03125]))), np.array(zero, np.uint8)
        q = g.quantize(g.input((1, INPUTS)), scale, u8)
        weights, scales = g.const(rng.integers(-40, 41, (INPUTS, OUTPUTS)), np.int8), (g.f32(scale), g.f32(0.02))
        middle = g.const(np.array(int(rng.integers(60, 200)), np.uint8))
        y = g.node("QLinearMatMul", q, scales[0], g.const(u8), weights, scales[1], g.const(np.int8(0)), step, middle)
        write(g.model(g.node("DequantizeLinear", y, step, middle)), path)
        return Net(path, scale, zero)

    def run(self, x: Array) -> Array:
        session = onnxruntime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return np.concatenate([session.run(None, {name: row[None].astype(F32)})[0] for row in x])

    def bounds(self, rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
        """A few codes wide; a point now and then."""
        found = []
        for _ in range(INPUTS):
            low = (int(rng.integers(0, 250)) - self.zero + rng.uniform(-0.5, 0.5)) * self.scale
            width = 0 if rng.random() < 0.2 else rng.uniform(0, 4) * self.scale
            digits = int(rng.choice([2, 4, 17]))
            one, other = f"{low:.{digits}f}", f"{low + width:.{digits}f}"
            found.append((one, max(one, other, key=Fraction)))
        return tuple(found)

    def inputs(self, bounds: Sequence[tuple[str, str]], rng: np.random.Generator) -> list[tuple[str, ...]]:
        """Decimals in a box: its ends, as spelled and as float32, and some of every code between them."""
        axes = []
        for low, high in bounds:
            a, b = float(low), float(high)
            words = {low, high, str(F32(a)), str(F32(b)), repr(float(F32(a))), repr(float(F32(b)))}
            codes = range(math.ceil(a / self.scale), math.floor(b / self.scale) + 1)
            words |= {str(F32(k * self.scale)) for k in codes} | {f"{rng.uniform(a, b):.9f}" for _ in range(2)}
            axes.append(sorted(words))
        return list(itertools.product(*axes))


def case(rng: np.random.Generator, texts: list[tuple[str, ...]], y: Array, mixed: bool) -> tuple[Any, ...]:
    """Comparisons, at or beside a value that occurs, or beyond all of them."""
    rows = []
    for _ in range(int(rng.integers(1, 3))):
        j, k = (f"Y_{i}" for i in rng.permutation(OUTPUTS)[:2])
        at = int(rng.integers(len(y))) if rng.random() < 0.4 else int(y[:, int(j[2:])].argmax())
        kinds: list[Tree] = [j, j, j, ("-", j, k), ("+", j, k), ("*", "3", j), ("+", ("*", "0.7", j), k)]
        kinds += [("+", "X_0", j), ("-", "X_1", j), ("-", j, ("*", "0.3", "X_0"))] if mixed else []
        tree = kinds[int(rng.integers(len(kinds)))]
        if rng.random() < 0.15:
            rows.append((">=", j, k))
            continue
        wide, fed = [float(v) for v in y[at]], [F32(float(t)) for t in texts[at]]
        double, single = computed(tree, named([float(t) for t in texts[at]], wide), float), None
        single = F32(computed(tree, named(fed, list(y[at])), float))
        spelled = [f"{double:.2f}", repr(float(single)), str(single), repr(double), repr(math.nextafter(double, 99))]
        spelled = [text for text in spelled if "e" not in text]
        rows.append((str(rng.choice([">=", ">", "<=", "<"])), tree, str(rng.choice(spelled))))
    return tuple(rows)


def judged(spec: Spec, net: Net, result: Result, answers: list[dict[str, bool]], met: Counter[str]) -> None:
    """The verdict must be right for every checker."""
    some = any(any(own.values()) for own in answers)
    every = any(all(own.values()) for own in answers)
    assert result.verdict is not Verdict.UNSAT or not some, (spec, result)
    if result.witness is not None:
        fed = np.array([[F32(float(t)) for t in result.witness.input_text]])
        assert all(spec.accepted(result.witness.input_text, net.run(fed)[0]).values()), (spec, result.witness)
    met[f"{result.verdict}, {'sure' if every else 'some' if some else 'none'}"] += 1


MET = Counter[str]()


@pytest.mark.parametrize("seed", range(40 * ROUNDS))
def test_verdicts_stand_before_every_checker(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([13, seed])
    net = Net.random(rng, tmp_path / "m.onnx")
    for _ in range(3):
        bounds, mixed = net.bounds(rng), bool(rng.random() < 0.3)
        texts = net.inputs(bounds, rng)
        y = net.run(np.array([[F32(float(t)) for t in own] for own in texts]))
        cases = tuple(case(rng, texts, y, mixed) for _ in range(int(rng.integers(1, 3))))
        spec = Spec(bounds, cases, bool(rng.random() < 0.6))
        path = tmp_path / "p.vnnlib"
        path.write_text(spec.text())
        answers = [spec.accepted(own, row) for own, row in zip(texts, y, strict=True)]
        wanted = not any("X_" in str(own) for own in cases) and bool(rng.random() < 0.5)
        result = verify(net.path, path, Options(device="cpu", seed=seed, certificate=wanted))
        judged(spec, net, result, answers, MET)
        if result.certificate is not None:
            (tmp_path / "c.zip").write_bytes(result.certificate)
            assert check(net.path, path, tmp_path / "c.zip").verdict == result.verdict.value


def test_the_verdicts_are_of_every_kind() -> None:
    assert min(sum(n for kind, n in MET.items() if kind.startswith(v)) for v in ("sat", "unsat", "unknown")) > 5, MET
    assert MET["unknown, none"] <= MET.total() / 20, MET  # where rows are accepted by different readings
    assert MET["unknown, sure"] <= MET.total() / 50, MET
