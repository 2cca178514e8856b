"""The one door out for `sat`: a candidate is replayed in onnxruntime on the user's file, the property tested exactly.

Shares nothing with the solver's semantics: it knows the file, the property, and the runtime's answer.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import runtime
from qverify.property import Query, Row
from qverify.result import Witness


class NotReplayed(Exception):
    """The candidate is no counterexample on the user's file; the text says why."""


def replay(
    path: Path,
    query: Query,
    inputs: list[npt.NDArray[Any]],
    input_text: tuple[str, ...],
    expected: npt.NDArray[np.float64],
) -> Witness:
    """Run the file on `inputs` and return the witness, if the outputs are unsafe and are the `expected` ones (flat, as
    the integer network computed them). Raises NotReplayed otherwise, UsageError without onnxruntime."""
    outputs = runtime.Session(path).run(inputs)
    y = np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in outputs])
    if y.shape != expected.shape:
        raise NotReplayed(f"onnxruntime gives {len(y)} output elements, not {len(expected)}")
    if not np.isfinite(y).all():
        raise NotReplayed("onnxruntime's outputs are not finite")
    x = [Fraction(text) for text in input_text]
    for i, value in enumerate(x):
        if not _inside(query, i, value):
            raise NotReplayed(f"X_{i} = {input_text[i]} lies outside its bounds")
    fed = np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in inputs])
    read = np.concatenate([np.full(v.size, i) for i, v in enumerate(inputs)])  # which input an element belongs to
    for i, text in enumerate(input_text):
        if np.float64(np.asarray(float(text), inputs[read[i]].dtype)) != fed[i]:
            raise NotReplayed(f"X_{i} = {text} is not the value that was run, {fed[i]}")
    if not any(all(_holds(row, fed, y) for row in case) for case in query.cases):
        raise NotReplayed("onnxruntime's outputs satisfy the property")
    if (y != expected).any():
        worst = int(np.abs(y - expected).argmax())
        raise NotReplayed(f"onnxruntime's outputs differ from the integer network's, most at Y_{worst}")
    return Witness(tuple(inputs), tuple(outputs), input_text, tuple(t for v in outputs for t in _texts(v)))


def _inside(query: Query, i: int, value: Fraction) -> bool:
    box = query.box
    above = value > box.lower[i] if i in box.lower_strict else value >= box.lower[i]
    below = value < box.upper[i] if i in box.upper_strict else value <= box.upper[i]
    return above and below


def _holds(row: Row, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> bool:
    """Whether a row holds for the inputs that were fed (float32, whatever decimals spell them) and the outputs."""
    total = sum((c * Fraction(float(y[i])) for i, c in row.y), Fraction(0))
    total += sum((c * Fraction(float(x[i])) for i, c in row.x), Fraction(0))
    return total < row.rhs if row.strict else total <= row.rhs


def _texts(values: npt.NDArray[Any]) -> list[str]:
    """Shortest decimals that read back to the same value."""
    return [str(v) for v in np.asarray(values).reshape(-1)]
