"""The one door out for `sat`: a candidate is replayed in onnxruntime on the user's file, the
property tested exactly.

Shares nothing with the solver's semantics: it knows the file, the property, and the runtime's
answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import runtime
from qverify.property import Box, Query, Row
from qverify.result import Witness


class NotReplayed(Exception):
    """The candidate is no counterexample on the user's file; the text says why."""


def replay(
    path: Path,
    query: Query,
    inputs: list[npt.NDArray[Any]],
    input_text: tuple[str, ...],
    expected: npt.NDArray[np.float64],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Witness:
    """Run the file on `inputs` and return the witness, if the outputs are unsafe and are the
    `expected` ones (flat, as the integer network computed them). Raises NotReplayed otherwise,
    UsageError without onnxruntime. `shapes` fix inputs whose shapes the file leaves open.

    `query` has the rows that hold only where every reading accepts; its box is the property's. A
    decimal of the witness may be read as the rational that it spells, as a double, or as the
    float32 that was run: all of them must do.
    """
    outputs = runtime.Session(path, shapes=shapes).run(inputs)
    y = np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in outputs])
    if y.shape != expected.shape:
        raise NotReplayed(f"onnxruntime gives {len(y)} output elements, not {len(expected)}")
    if not np.isfinite(y).all():
        raise NotReplayed("onnxruntime's outputs are not finite")
    fed = [v for array in inputs for v in np.asarray(array).reshape(-1)]
    x = [Fraction(text) for text in input_text]
    for i, (value, text, run) in enumerate(zip(x, input_text, fed, strict=True)):
        if not _inside(query.box, i, value, run):
            raise NotReplayed(f"X_{i} = {text} lies outside its bounds")
        if np.asarray(float(text), run.dtype) != run or not _nearest(value, run):
            raise NotReplayed(f"X_{i} = {text} is not the value that was run, {float(run)}")
    readings = (x, [Fraction(float(v)) for v in x], [Fraction(float(v)) for v in fed])
    if not any(
        all(_holds(row, own, y) for row in case for own in readings) for case in query.cases
    ):
        raise NotReplayed("onnxruntime's outputs satisfy the property")
    if (y != expected).any():
        worst = int(np.abs(y - expected).argmax())
        raise NotReplayed(
            f"onnxruntime's outputs differ from the integer network's, most at Y_{worst}"
        )
    return Witness(
        tuple(inputs), tuple(outputs), input_text, tuple(t for v in outputs for t in _texts(v))
    )


def _inside(box: Box, i: int, value: Fraction, run: Any) -> bool:
    """Whether an input lies within its bounds: as a rational, as a double, and as the value that
    was run, which a float32 checker compares with the bounds in its own type."""
    low, high = box.lower[i], box.upper[i]
    readings: list[tuple[Any, Any, Any]] = [
        (low, value, high),
        (_double(low), float(value), _double(high)),
    ]
    if run.dtype == np.float32:
        with np.errstate(over="ignore"):
            readings.append((np.float32(_double(low)), run, np.float32(_double(high))))
    return all(
        (a < v if i in box.lower_strict else a <= v)
        and (v < b if i in box.upper_strict else v <= b)
        for a, v, b in readings
    )


def _double(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _nearest(value: Fraction, run: Any) -> bool:
    """Whether an input, rounded at once, is the value that was run."""
    if run.dtype != np.float32:
        return value == int(run)
    off = abs(value - Fraction(float(run)))
    for side in (-np.inf, np.inf):
        other = float(np.nextafter(run, np.float32(side)))
        if np.isfinite(other) and abs(value - Fraction(other)) < off:
            return False
    return True


def _holds(row: Row, x: Sequence[Fraction], y: npt.NDArray[np.float64]) -> bool:
    """Whether a row holds for these inputs and the outputs."""
    total = sum((c * Fraction(float(y[i])) for i, c in row.y), Fraction(0))
    total += sum((c * x[i] for i, c in row.x), Fraction(0))
    return total < row.rhs if row.strict else total <= row.rhs


def _texts(values: npt.NDArray[Any]) -> list[str]:
    """Shortest decimals that read back to the same value."""
    return [str(v) for v in np.asarray(values).reshape(-1)]
