"""Verdicts against the official checkers, which compare doubles (1.0) and float32 (2.x); both are
written here anew.

Small networks, every code of their inputs: what some checker accepts is never called `unsat`, and a
counterexample as it is printed is accepted by every one.
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
from qverify.errors import SpecError
from qverify.search import bab
from tests.graphs import ROUNDS, Graph, write

F32 = np.float32
CPU = Options(device="cpu", timeout=60.0)
COMPARED = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
INPUTS, OUTPUTS = 2, 3
Array = npt.NDArray[Any]
Tree = Any  # a name, a decimal, or (head, operand, ...)
Comparison = tuple[str, Tree, Tree]


# -- the checkers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """Bounds of the inputs, further ones of single inputs, and the unsafe cases: comparisons (op,
    left, right)."""

    bounds: tuple[tuple[str, str], ...]
    cases: tuple[tuple[Comparison, ...], ...]
    second: bool  # VNN-LIB 2.0
    more: tuple[Comparison, ...] = ()

    def text(self) -> str:
        def show(tree: Tree) -> str:
            if not isinstance(tree, str):
                return f"({' '.join(map(show, tree))})"
            return f"{tree[0]}[0,{tree[2:]}]" if self.second and tree[0] in "XY" else tree

        lines = [
            f"(declare-const {letter}_{i} Real)"
            for letter, n in (("X", INPUTS), ("Y", OUTPUTS))
            for i in range(n)
        ]
        if self.second:
            tensors = (
                f"(declare-input X float32 [1,{INPUTS}]) (declare-output Y float32 [1,{OUTPUTS}])"
            )
            lines = ["(vnnlib-version <2.0>)", f"(declare-network N {tensors})"]
        for i, (low, high) in enumerate(self.bounds):
            lines += [
                f"(assert (>= {show(f'X_{i}')} {low}))",
                f"(assert (<= {show(f'X_{i}')} {high}))",
            ]
        lines += [f"(assert {show(line)})" for line in self.more]
        cases = [f"(and {' '.join(map(show, case))})" for case in self.cases]
        return "\n".join([*lines, f"(assert (or {' '.join(cases)}))", ""])

    def accepted(self, texts: Sequence[str], y: Array) -> dict[str, bool]:
        """What every checker says of a printed input and the runtime's outputs."""
        wide, fed = [float(v) for v in y], [F32(float(t)) for t in texts]
        exact = self._holds([Fraction(t) for t in texts], [Fraction(v) for v in wide], Fraction)
        found = {"exact": exact, "double": self._holds([float(t) for t in texts], wide, float)}
        # 1.0: inputs are cast to the model's type first, and NumPy compares them with a bound in
        # that type.
        again = named([float(v) for v in fed], wide)
        more = all(
            self._all([condition], named(fed, []) if condition[1] in again else again, float)
            for condition in self.more
        )
        found["1.0"] = self._inside(fed, float) and more and self._cases(again, float)
        if self.second:
            found["2.0"] = self._holds(fed, list(y), float)
        return found

    def _holds(self, x: Sequence[Any], y: Sequence[Any], number: Any) -> bool:
        values = named(x, y)
        return (
            self._inside(x, number)
            and self._all(self.more, values, number)
            and self._cases(values, number)
        )

    def _inside(self, x: Sequence[Any], number: Any) -> bool:
        return all(
            number(low) <= v <= number(high) for v, (low, high) in zip(x, self.bounds, strict=True)
        )

    def _cases(self, values: dict[str, Any], number: Any) -> bool:
        return any(self._all(case, values, number) for case in self.cases)

    def _all(self, case: Sequence[Comparison], values: dict[str, Any], number: Any) -> bool:
        return all(
            COMPARED[op](computed(a, values, number), computed(b, values, number))
            for op, a, b in case
        )


def named(x: Sequence[Any], y: Sequence[Any]) -> dict[str, Any]:
    return {
        f"{letter}_{i}": v for letter, values in (("X", x), ("Y", y)) for i, v in enumerate(values)
    }


def computed(tree: Tree, values: dict[str, Any], number: Any) -> Any:
    if isinstance(tree, str):
        return values[tree] if tree in values else number(tree)
    head, *rest = tree
    operands = [computed(part, values, number) for part in rest]
    if head == "+":
        return sum(operands)
    return operands[0] - sum(operands[1:]) if head == "-" else math.prod(operands)


# -- networks and properties -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Net:
    """A model, and what it gives for inputs."""

    path: Path
    scale: float
    zero: int

    @staticmethod
    def random(rng: np.random.Generator, path: Path) -> Net:
        """QuantizeLinear, an integer product, DequantizeLinear."""
        g, scale, zero = (
            Graph(),
            float(F32(rng.choice([0.1, 0.05, 0.25, 0.0039215686]))),
            int(rng.integers(0, 200)),
        )
        step, u8 = g.f32(float(rng.choice([0.01, 0.1, 0.03125]))), np.array(zero, np.uint8)
        q = g.quantize(g.input((1, INPUTS)), scale, u8)
        weights, scales = (
            g.const(rng.integers(-40, 41, (INPUTS, OUTPUTS)), np.int8),
            (g.f32(scale), g.f32(0.02)),
        )
        middle = g.const(np.array(int(rng.integers(60, 200)), np.uint8))
        y = g.node(
            "QLinearMatMul",
            q,
            scales[0],
            g.const(u8),
            weights,
            scales[1],
            g.const(np.int8(0)),
            step,
            middle,
        )
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

    def inputs(
        self, bounds: Sequence[tuple[str, str]], rng: np.random.Generator
    ) -> list[tuple[str, ...]]:
        """Decimals in a box: its ends, as spelled and as float32, and some of every code between
        them."""
        axes = []
        for low, high in bounds:
            a, b = float(low), float(high)
            words = {low, high, str(F32(a)), str(F32(b)), repr(float(F32(a))), repr(float(F32(b)))}
            codes = range(math.ceil(a / self.scale), math.floor(b / self.scale) + 1)
            words |= {str(F32(k * self.scale)) for k in codes} | {
                f"{rng.uniform(a, b):.9f}" for _ in range(2)
            }
            axes.append(sorted(words))
        return list(itertools.product(*axes))


def case(
    rng: np.random.Generator, texts: list[tuple[str, ...]], y: Array, mixed: bool
) -> tuple[Any, ...]:
    """Comparisons, at or beside a value that occurs, or beyond all of them."""
    rows = []
    for _ in range(int(rng.integers(1, 3))):
        j, k = (f"Y_{i}" for i in rng.permutation(OUTPUTS)[:2])
        at = int(rng.integers(len(y))) if rng.random() < 0.4 else int(y[:, int(j[2:])].argmax())
        kinds: list[Tree] = [
            j,
            j,
            j,
            ("-", j, k),
            ("+", j, k),
            ("*", "3", j),
            ("+", ("*", "0.7", j), k),
        ]
        kinds += [("+", "X_0", j), ("-", "X_1", j), ("-", j, ("*", "0.3", "X_0"))] if mixed else []
        tree = kinds[int(rng.integers(len(kinds)))]
        if rng.random() < 0.15:
            rows.append((">=", j, k))
            continue
        wide, fed = [float(v) for v in y[at]], [F32(float(t)) for t in texts[at]]
        double, single = computed(tree, named([float(t) for t in texts[at]], wide), float), None
        single = F32(computed(tree, named(fed, list(y[at])), float))
        spelled = [
            f"{double:.2f}",
            repr(float(single)),
            str(single),
            repr(double),
            repr(math.nextafter(double, 99)),
        ]
        spelled = [text for text in spelled if "e" not in text]
        rows.append((str(rng.choice([">=", ">", "<=", "<"])), tree, str(rng.choice(spelled))))
    return tuple(rows)


def single(
    rng: np.random.Generator, texts: list[tuple[str, ...]], bounds: Sequence[tuple[str, str]]
) -> Comparison:
    """A bound of one input, at or beside a value of it: with arithmetic, or one that may exclude
    its end."""
    i = int(rng.integers(INPUTS))
    x, other = f"X_{i}", f"X_{1 - i}"
    at = (
        texts[int(rng.integers(len(texts)))]
        if rng.random() < 0.3
        else [pair[int(rng.integers(2))] for pair in bounds]
    )
    if rng.random() < 0.4:
        value = Fraction(at[i]) + Fraction(
            int(rng.integers(-1, 2)), 10 ** int(rng.choice([9, 11, 20, 400]))
        )
        return str(rng.choice([">=", ">", "<=", "<"])), x, plain(value)
    kinds: list[Tree] = [
        ("*", "3", x),
        ("*", x, "-0.7"),
        ("*", "2", x),
        ("+", x, "1000000000.0"),
        ("-", x, "0.3"),
    ]
    kinds += [
        ("-", ("*", "4", x), x),
        ("+", x, x),
        ("-", ("+", x, other), other),
        ("+", x, "100000000000000000.0"),
    ]
    tree = kinds[int(rng.integers(len(kinds)))]
    double = computed(tree, named([float(t) for t in at], []), float)
    single = F32(computed(tree, named([F32(float(t)) for t in at], []), F32))
    spelled = [double, float(single), math.nextafter(double, 9e99), math.nextafter(double, -9e99)]
    sides = [tree, plain(Fraction(spelled[int(rng.integers(len(spelled)))]))]
    return str(rng.choice([">=", ">", "<=", "<"])), *(sides if rng.random() < 0.8 else sides[::-1])


def plain(value: Fraction) -> str:
    """A decimal number without an exponent."""
    digits = 0
    while (value * 10**digits).denominator > 1:
        digits += 1
    text = str(abs(int(value * 10**digits))).rjust(digits + 1, "0")
    return ("-" if value < 0 else "") + (
        f"{text[:-digits]}.{text[-digits:]}" if digits else f"{text}.0"
    )


def judged(
    spec: Spec, net: Net, result: Result, answers: list[dict[str, bool]], met: Counter[str]
) -> None:
    """The verdict must be right for every checker."""
    some = any(any(answer.values()) for answer in answers)
    every = any(all(answer.values()) for answer in answers)
    assert result.verdict is not Verdict.UNSAT or not some, (spec, result)
    if result.witness is not None:
        fed = np.array([[F32(float(t)) for t in result.witness.input_text]])
        assert all(spec.accepted(result.witness.input_text, net.run(fed)[0]).values()), (
            spec,
            result.witness,
        )
    met[f"{result.verdict}, {'sure' if every else 'some' if some else 'none'}"] += 1


MET, BOUNDED = Counter[str](), Counter[str]()


@pytest.mark.parametrize("seed", range(25 * ROUNDS))
def test_bounds_stand_before_every_checker(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds of one input with arithmetic, and bounds that exclude an end beside another one."""
    rng = np.random.default_rng([17, seed])
    monkeypatch.setattr(bab, "SPLITTABLE", 12 if seed % 3 < 2 else 0)
    net = Net.random(rng, tmp_path / "m.onnx")
    for _ in range(3):
        bounds = net.bounds(rng)
        texts = net.inputs(bounds, rng)
        y = net.run(np.array([[F32(float(t)) for t in text] for text in texts]))
        mixed = bool(rng.random() < 0.1)
        cases = (
            (case(rng, texts, y, mixed)[:1],)
            if rng.random() < 0.5
            else ((("<=", "-1000.0", "Y_0"),),)
        )
        more = tuple(single(rng, texts, bounds) for _ in range(int(rng.integers(1, 3))))
        spec = Spec(bounds, cases, bool(rng.random() < 0.6), more)
        # as part of the only case, whose box is smaller than the property's
        inside = rng.random() < 0.3
        spelled = Spec(bounds, ((*more, *cases[0]),), spec.second) if inside else spec
        path = tmp_path / "p.vnnlib"
        path.write_text(spelled.text())
        answers = [spec.accepted(text, row) for text, row in zip(texts, y, strict=True)]
        quick = bool(rng.random() < 0.5)
        wanted = not any("X_" in str(case) for case in cases) and bool(rng.random() < 0.5)
        try:
            result = verify(
                net.path,
                path,
                Options(device="cpu", seed=seed, certificate=wanted, attack=quick, sweep=quick),
            )
        except SpecError as error:
            assert "contradictory bounds" in str(error) and not any(
                any(answer.values()) for answer in answers
            ), spec
            continue
        judged(spec, net, result, answers, BOUNDED)
        if result.certificate is not None:
            (tmp_path / "c.zip").write_bytes(result.certificate)
            assert check(net.path, path, tmp_path / "c.zip").verdict == result.verdict.value


def test_the_verdicts_of_bounds_are_of_every_kind() -> None:
    if BOUNDED.total() < 60:
        pytest.skip("needs the test above")
    assert (
        min(
            sum(n for kind, n in BOUNDED.items() if kind.startswith(v))
            for v in ("sat", "unsat", "unknown")
        )
        > 5
    ), BOUNDED
    # Nearly all bounds lie at a tie; of 1e9 + X little is left in floats.
    for kind in ("unknown, sure", "unknown, none"):
        assert BOUNDED[kind] <= BOUNDED.total() / 5, BOUNDED


@pytest.mark.parametrize("seed", range(40 * ROUNDS))
def test_verdicts_stand_before_every_checker(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng([13, seed])
    quick = seed % 3 == 0  # otherwise by splitting inputs, or by cuts on neurons
    monkeypatch.setattr(bab, "SPLITTABLE", 12 if seed % 3 < 2 else 0)
    net = Net.random(rng, tmp_path / "m.onnx")
    for _ in range(3):
        bounds, mixed = net.bounds(rng), bool(rng.random() < 0.3)
        texts = net.inputs(bounds, rng)
        y = net.run(np.array([[F32(float(t)) for t in text] for text in texts]))
        cases = tuple(case(rng, texts, y, mixed) for _ in range(int(rng.integers(1, 3))))
        spec = Spec(bounds, cases, bool(rng.random() < 0.6))
        path = tmp_path / "p.vnnlib"
        path.write_text(spec.text())
        answers = [spec.accepted(text, row) for text, row in zip(texts, y, strict=True)]
        wanted = not any("X_" in str(case) for case in cases) and bool(rng.random() < 0.5)
        result = verify(
            net.path,
            path,
            Options(device="cpu", seed=seed, certificate=wanted, attack=quick, sweep=quick),
        )
        judged(spec, net, result, answers, MET)
        if result.certificate is not None:
            (tmp_path / "c.zip").write_bytes(result.certificate)
            assert check(net.path, path, tmp_path / "c.zip").verdict == result.verdict.value


def test_the_verdicts_are_of_every_kind() -> None:
    if MET.total() < 100:
        pytest.skip("needs the test above")
    assert (
        min(
            sum(n for kind, n in MET.items() if kind.startswith(v))
            for v in ("sat", "unsat", "unknown")
        )
        > 5
    ), MET
    # Where rows are accepted by different readings.
    assert MET["unknown, none"] <= MET.total() / 20, MET
    # Sums of products at a tie, or another case for every checker.
    assert MET["unknown, sure"] <= MET.total() / 15, MET


# -- chosen properties -----------------------------------------------------------------------------


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Y_0 = X_0, rounded to multiples of 1/4."""
    g = Graph()
    quarter, zero = 0.25, np.array(0, np.uint8)
    return write(
        g.model(g.dequantize(g.quantize(g.input((1, 1)), quarter, zero), quarter, zero)),
        tmp_path / "steps.onnx",
    )


def verdict(model: Path, *asserts: str, second: bool = False, options: Options = CPU) -> Result:
    lines = [
        "(declare-const X_0 Real)",
        "(declare-const Y_0 Real)",
        *(f"(assert {line})" for line in asserts),
    ]
    if second:
        tensors = "(declare-input X float32 [1,1]) (declare-output Y float32 [1,1])"
        lines = ["(vnnlib-version <2.0>)", f"(declare-network N {tensors})", *lines[2:]]
    text = "\n".join(lines)
    path = model.with_name("p.vnnlib")
    path.write_text(text.replace("X_0", "X[0,0]").replace("Y_0", "Y[0,0]") if second else text)
    result = verify(model, path, options)
    if result.certificate is not None:
        model.with_name("c.zip").write_bytes(result.certificate)
        assert check(model, path, model.with_name("c.zip")).verdict == result.verdict.value
    return result


@pytest.mark.parametrize(
    "options", [CPU, Options(device="cpu", attack=False, sweep=False)], ids=["default", "search"]
)
@pytest.mark.parametrize(
    ("asserts", "expected"),
    [
        # 0.1 + 0 <= 0.1 for the decimal; the float32 that is fed lies above.
        (("(>= X_0 0.1)", "(<= X_0 0.12)", "(<= (+ X_0 Y_0) 0.1)"), Verdict.UNKNOWN),
        (
            ("(>= X_0 0.1)", "(<= X_0 0.1)", "(>= (+ X_0 Y_0) 0.100000001)"),
            Verdict.UNKNOWN,
        ),  # and the other way round
        (
            ("(>= X_0 0.2)", "(<= X_0 0.37)", "(<= (+ X_0 Y_0) 0.55)", "(>= (+ X_0 Y_0) 0.55)"),
            Verdict.UNKNOWN,
        ),
        (("(>= X_0 0.1)", "(<= X_0 0.12)", "(<= (+ X_0 Y_0) 0.0999999)"), Verdict.UNSAT),
        (("(>= X_0 0.1)", "(<= X_0 0.12)", "(<= (+ X_0 Y_0) 0.1000001)"), Verdict.SAT),
        (
            ("(>= X_0 0.2)", "(<= X_0 0.37)", "(<= (- X_0 0.25) Y_0)", "(>= X_0 0.3125)"),
            Verdict.SAT,
        ),
        (("(>= X_0 0.5)", "(<= X_0 0.5)", "(= X_0 Y_0)"), Verdict.SAT),
    ],
)
def test_inputs_in_conditions_are_decimals_and_float32(
    asserts: tuple[str, ...], expected: Verdict, steps: Path, options: Options
) -> None:
    result = verdict(steps, *asserts, options=options)
    assert result.verdict is expected, result.reason
    if expected is Verdict.UNKNOWN:
        assert "under some readings of the property's numbers only" in result.reason


@pytest.mark.parametrize(
    ("row", "second", "expected"),
    [
        ("(>= Y_0 0.25)", False, Verdict.SAT),
        ("(> Y_0 0.25)", False, Verdict.UNSAT),
        ("(>= Y_0 0.25000000000000000001)", False, Verdict.UNKNOWN),  # 0.25 as a double
        ("(>= Y_0 0.25000001)", False, Verdict.UNSAT),
        ("(>= Y_0 0.25000001)", True, Verdict.UNKNOWN),  # 0.25 as a float32
        ("(< Y_0 0.25000001)", True, Verdict.SAT),
        ("(and (< Y_0 0.25000001) (> Y_0 0))", True, Verdict.UNKNOWN),
        ("(>= Y_0 0.250001)", True, Verdict.UNSAT),
        (
            "(>= (- (+ Y_0 10000000000.0) 10000000000.0) 0.5)",
            True,
            Verdict.UNKNOWN,
        ),  # float32 has lost Y_0 by then
        ("(<= (- (+ Y_0 10000000000.0) 10000000000.0) -1.0)", False, Verdict.UNSAT),
        ("(<= (* 3 Y_0) 0.75)", False, Verdict.SAT),
        ("(> (* 3 Y_0) 0.75)", False, Verdict.UNSAT),
    ],
)
def test_constants_are_rationals_doubles_and_float32(
    row: str, second: bool, expected: Verdict, steps: Path
) -> None:
    wanted = Options(device="cpu", timeout=60.0, certificate=True)
    result = verdict(steps, "(>= X_0 0.0)", "(<= X_0 0.3)", row, second=second, options=wanted)
    assert result.verdict is expected, result.reason
    assert (result.certificate is not None) == (expected is not Verdict.UNKNOWN)


@pytest.mark.parametrize(
    ("bounds", "second", "expected"),
    [
        # A looser bound that excludes its end, where both are rounded to one number.
        (("(>= X_0 0.1)", "(<= X_0 0.1)", "(< X_0 0.10000000001)"), True, Verdict.UNKNOWN),
        (
            ("(>= X_0 0.1)", "(<= X_0 0.1)", "(< X_0 0.100000000000000000001)"),
            False,
            Verdict.UNKNOWN,
        ),
        (
            ("(> X_0 0.09999999999)", "(<= X_0 0.1)", "(or (and (>= X_0 0.1)))"),
            True,
            Verdict.UNKNOWN,
        ),
        (("(>= X_0 0.1)", "(<= X_0 0.1)", "(< X_0 0.11)"), True, Verdict.SAT),
        (("(>= X_0 0.05)", "(<= X_0 0.1)", "(< X_0 0.10000000001)"), True, Verdict.SAT),
        # Arithmetic, of which floats keep less.
        (
            ("(>= X_0 0.5)", "(<= X_0 1)", "(<= (+ X_0 1000000000.0) 1000000000.0)"),
            True,
            Verdict.UNKNOWN,
        ),
        (
            ("(>= X_0 0.5)", "(<= X_0 1)", "(<= (+ X_0 1000000000.0) 1000000000.0)"),
            False,
            Verdict.UNSAT,
        ),
        (
            (
                "(>= X_0 0.5)",
                "(<= X_0 1)",
                "(<= (+ X_0 100000000000000000.0) 100000000000000000.0)",
            ),
            False,
            Verdict.UNKNOWN,
        ),
        (("(>= X_0 0)", "(<= (* 3 X_0) 0.3)"), True, Verdict.SAT),
        (("(>= (* 3 X_0) 0.3)", "(<= (* 3 X_0) 0.3)"), False, Verdict.UNKNOWN),
        (("(>= (* 4 X_0) 1)", "(<= (* 4 X_0) 1)"), True, Verdict.SAT),
        (("(>= X_0 0.1001)", "(<= (* 3 X_0) 0.3)"), True, Verdict.UNSAT),
        (("(>= X_0 0)", "(<= X_0 1)", "(<= (- (+ Y_0 X_0) Y_0) 0.25)"), True, Verdict.SAT),
    ],
)
def test_bounds_of_one_input_have_every_reading(
    bounds: tuple[str, ...], second: bool, expected: Verdict, steps: Path
) -> None:
    for options in (CPU, Options(device="cpu", attack=False, sweep=False, certificate=True)):
        try:
            result = verdict(steps, *bounds, "(>= Y_0 -5)", second=second, options=options)
        except SpecError as error:  # in 1.0 a box without a point is an error
            assert expected is Verdict.UNSAT and not second and "contradictory" in str(error)
            continue
        assert result.verdict is expected, result.reason
        assert (result.certificate is not None) == (
            options.certificate and expected is not Verdict.UNKNOWN
        )


def test_a_counterexample_is_sought_beyond_a_doubt(steps: Path) -> None:
    """0.25 is a tie in float32; other codes are none. Not by the attack, nor by evaluating all
    points."""
    for options in (CPU, Options(device="cpu", attack=False, sweep=False, batch=1)):
        result = verdict(
            steps, "(>= X_0 0)", "(<= X_0 60)", "(>= Y_0 0.25000001)", second=True, options=options
        )
        assert result.verdict is Verdict.SAT


def test_a_part_without_an_input_is_refuted(steps: Path) -> None:
    """Bounds that no reading satisfies: the rest of the property decides, with a certificate."""
    wanted = Options(device="cpu", timeout=60.0, certificate=True)
    box = ("(>= X_0 0)", "(<= X_0 1)")
    near = "(and (>= X_0 0.2) (< X_0 0.2) (>= Y_0 -5))"
    for far, expected in (("(>= Y_0 0.7)", Verdict.SAT), ("(>= Y_0 7)", Verdict.UNSAT)):
        result = verdict(steps, *box, f"(or {near} (and (>= X_0 0.5) {far}))", options=wanted)
        assert result.verdict is expected and result.certificate is not None
    # decimals, which are fed as a float32 outside
    between = "(and (> X_0 0.1) (< X_0 0.1000000001) (>= Y_0 {}))"
    for least, expected in ((7, Verdict.UNSAT), (-5, Verdict.UNKNOWN)):
        assert (
            verdict(
                steps, *box, f"(or {between.format(least)} (and (>= X_0 0.5) (>= Y_0 7)))"
            ).verdict
            is expected
        )
    sure = f"(or {between.format(-5)} (and (>= X_0 0.5) (>= Y_0 0.5)))"
    assert verdict(steps, *box, sure).verdict is Verdict.SAT


def test_integers_without_a_value_in_their_bounds(tmp_path: Path) -> None:
    g = Graph()
    x = g.input((1, 1), np.uint8)
    model = write(g.model(g.dequantize(x, 0.25, np.array(0, np.uint8))), tmp_path / "m.onnx")
    wanted = Options(device="cpu", timeout=60.0, certificate=True)
    result = verdict(model, "(>= X_0 0.2)", "(<= X_0 0.8)", "(>= Y_0 -5)", options=wanted)
    assert result.verdict is Verdict.UNSAT and result.certificate is not None
    assert any("allows no input" in text for text in result.details["warnings"])
