"""Random boxes and properties about a small network, biased to ties: thresholds that outputs reach
exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from benchmarks.hostile.oracle import F32, Interval, number, ordinal

Rng = np.random.Generator


@dataclass(frozen=True)
class Names:
    """How a version of VNN-LIB spells variables. Shapes and types are those of the graph."""

    version: str
    inputs: Sequence[tuple[tuple[int, ...], str]]
    outputs: Sequence[tuple[tuple[int, ...], str]]

    def variables(self, kind: str) -> list[str]:
        """The elements in order."""
        tensors, letter = (self.inputs, "X") if kind == "x" else (self.outputs, "Y")
        if self.version == "1.0":
            return [
                f"{letter}_{k}" for k in range(sum(int(np.prod(shape)) for shape, _ in tensors))
            ]
        return [
            f"{letter}{t}[{','.join(map(str, at))}]"
            for t, (shape, _) in enumerate(tensors)
            for at in np.ndindex(shape)
        ]

    def declarations(self) -> list[str]:
        if self.version == "1.0":
            return [
                f"(declare-const {v} Real)" for v in (*self.variables("x"), *self.variables("y"))
            ]
        words = [
            f"(declare-{what} {letter}{t} {kind} [{','.join(map(str, shape))}])"
            for what, letter, tensors in (
                ("input", "X", self.inputs),
                ("output", "Y", self.outputs),
            )
            for t, (shape, kind) in enumerate(tensors)
        ]
        return ["(vnnlib-version <2.0>)", f"(declare-network N {' '.join(words)})"]


def decimal(value: Fraction) -> str:
    """A rational whose denominator has no factor but 2 and 5, in digits."""
    sign, value = ("-" if value < 0 else ""), abs(value)
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    text = str(int(value * 10**digits)).rjust(digits + 1, "0")
    return sign + (f"{text[:-digits]}.{text[-digits:]}" if digits else text)


def bound(rng: Rng, value: float) -> Fraction:
    """A decimal near a value: few digits, many, a float32 exactly, or just beside one."""
    form = rng.integers(5)
    if form < 3:
        return Fraction(f"{value:.{(1, 3, 7)[form]}f}")
    at = ordinal(value) + int(rng.integers(-1, 2))
    return (
        Fraction(number(at)) if form == 3 else (Fraction(number(at)) + Fraction(number(at + 1))) / 2
    )


def random_box(
    rng: Rng, centres: Sequence[float], steps: Sequence[float], is_float: Sequence[bool], most: int
) -> list[Interval]:
    """A box around an input; few codes wide in each element, about `most` in all, sometimes a point
    or half a step."""
    widest = max(1.0, most ** (1 / len(centres)) - 1)
    box: list[Interval] = []
    for centre, step, real in zip(centres, steps, is_float, strict=True):
        width = 0.0 if rng.random() < 0.15 else float(rng.uniform(0, widest))
        if not real:
            half = Fraction(int(rng.integers(0, 2)), 2)
            box.append((int(centre) - half, int(centre) + int(width) + half))
            continue
        # on the edges between codes, if the chain before the quantizer is plain
        tie = rng.random() < 0.3
        start = (np.rint(centre / step) + 0.5) * step if tie else centre
        a, b = bound(rng, start), bound(rng, start + (round(width) if tie else width) * step)
        box.append((a, b) if a <= b else (a, a))
    return box


def box_lines(rng: Rng, names: Names, box: Sequence[Interval]) -> list[str]:
    lines = []
    for variable, (low, high) in zip(names.variables("x"), box, strict=True):
        assert low is not None and high is not None
        pair = [f"(>= {variable} {decimal(low)})", f"(<= {variable} {decimal(high)})"]
        lines += (
            [f"(assert (and {pair[0]} {pair[1]}))"]
            if rng.random() < 0.3
            else [f"(assert {atom})" for atom in pair]
        )
    return lines


def threshold(rng: Rng, total: Fraction, single: bool) -> str:
    """A number at a reached value: exactly, one float32 beside it, its shortest decimal, or a
    little away."""
    form = rng.integers(10)
    if form < 5:
        return decimal(total)
    if form == 5 and single:
        return decimal(Fraction(number(ordinal(float(total)) + int(rng.choice([-1, 1])))))
    if form == 6 and single:
        return decimal(Fraction(str(F32(float(total)))))
    if form == 7:
        return decimal(total + Fraction(int(rng.integers(-9, 10)), 8))
    return decimal(total)


def random_row(
    rng: Rng, names: Names, reached: Sequence[tuple[float, ...]], x: Sequence[Fraction], mixed: bool
) -> str:
    """An inequality over one to three outputs, and inputs if `mixed`, at a value that is
    reached."""
    y = names.variables("y")
    row = reached[int(rng.integers(len(reached)))]
    if rng.random() < 0.4:
        k = int(rng.integers(len(y)))
        row = (min if rng.random() < 0.5 else max)(reached, key=lambda r: r[k])
    chosen = [int(j) for j in rng.permutation(len(y))[: rng.choice([1, 1, 2, 2, 3])]]
    relation = str(rng.choice(["<", "<=", ">", ">="]))
    if len(chosen) == 2 and rng.random() < 0.5:
        return f"({relation} {y[chosen[0]]} {y[chosen[1]]})"
    plain = len(chosen) == 1 and rng.random() < 0.7
    factors = (
        [Fraction(1)]
        if plain
        else [Fraction(int(rng.choice([-3, -1, 1, 2])), int(rng.choice([1, 1, 4]))) for _ in chosen]
    )
    terms = [
        y[j] if c == 1 else f"(* {decimal(c)} {y[j]})" for j, c in zip(chosen, factors, strict=True)
    ]
    total = sum((c * Fraction(row[j]) for j, c in zip(chosen, factors, strict=True)), Fraction(0))
    if mixed:
        k = int(rng.integers(len(x)))
        factor = Fraction(int(rng.choice([-2, -1, 1])), int(rng.choice([1, 2])))
        terms.append(f"(* {decimal(factor)} {names.variables('x')[k]})")
        total += factor * x[k]
    left = terms[0] if len(terms) == 1 else f"(+ {' '.join(terms)})"
    right = threshold(rng, total, plain and not mixed)
    return f"({relation} {left} {right})" if rng.random() < 0.8 else f"({relation} {right} {left})"


def random_property(
    rng: Rng,
    names: Names,
    box: Sequence[Interval],
    reached: Sequence[tuple[float, ...]],
    x: Sequence[Fraction],
) -> str:
    """A property in text. `reached` are outputs at points of the box, `x` a point of it."""
    mixed = rng.random() < 0.12
    cases = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        rows = [
            random_row(rng, names, reached, x, mixed and rng.random() < 0.6)
            for _ in range(int(rng.choice([1, 1, 2, 3])))
        ]
        if mixed and rng.random() < 0.2:
            k = int(rng.integers(len(x)))
            rows.append(
                f"({rng.choice(['<', '<=', '>', '>='])} {names.variables('x')[k]} {decimal(x[k])})"
            )
        rows = [f"(not {r})" if rng.random() < 0.1 else r for r in rows]
        cases.append(rows)
    lines = [*names.declarations(), *box_lines(rng, names, box)]
    if len(cases) == 1:
        lines += [f"(assert {row})" for row in cases[0]]
    else:
        words = [
            f"(and {' '.join(rows)})" if len(rows) > 1 or rng.random() < 0.5 else rows[0]
            for rows in cases
        ]
        lines.append(f"(assert (or {' '.join(words)}))")
    return "\n".join(lines) + "\n"
