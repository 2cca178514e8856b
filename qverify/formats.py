"""What a run writes: the verdict with its counterexample, and JSON. No NumPy is imported here."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qverify import __version__
from qverify.errors import SoundnessError, UsageError

if TYPE_CHECKING:
    from qverify.options import Options
    from qverify.property import Property, Variable
    from qverify.result import Result, Witness


def counterexample(witness: Witness, spec: Property | None) -> str:
    """Return the counterexample as VNN-COMP wants it for the specification's version.

    1.0 (also without a specification): `((X_0 v)` ... `(Y_n v))`. 2.x: for every variable in the
    order of its declaration a line `name type [dims]` and then one value a line, row-major.
    """
    if spec is None or spec.version.startswith("1"):
        inputs = (f"(X_{i} {value})" for i, value in enumerate(witness.input_text))
        outputs = (f"(Y_{j} {value})" for j, value in enumerate(witness.output_text))
        return "(" + "\n ".join([*inputs, *outputs]) + ")\n"
    lines = [
        *_typed_blocks(spec.inputs, witness.input_text),
        *_typed_blocks(spec.outputs, witness.output_text),
    ]
    return "\n".join(lines) + "\n"


def _typed_blocks(variables: tuple[Variable, ...], texts: tuple[str, ...]) -> Iterator[str]:
    if sum(math.prod(variable.shape) for variable in variables) != len(texts):
        raise SoundnessError(
            f"the counterexample has {len(texts)} values, which does not fit the declared variables"
        )
    values = iter(texts)
    for variable in variables:
        yield f"{variable.name} {variable.dtype} [{','.join(map(str, variable.shape))}]"
        yield from itertools.islice(values, math.prod(variable.shape))


def read_counterexample(path: str, spec: Property) -> tuple[float, ...]:
    """Return the inputs (flat) of a counterexample's file, with or without a first line `sat`."""
    wanted = sum(math.prod(variable.shape) for variable in spec.inputs)
    text = (
        Path(path).read_text(encoding="utf-8", errors="replace").strip().removeprefix("sat").strip()
    )
    if text.startswith("("):
        found = {int(i): value for i, value in re.findall(r"\(\s*X_(\d+)\s+([^\s()]+)\s*\)", text)}
        words = (
            [found.get(i, "") for i in range(wanted)] if set(found) <= set(range(wanted)) else []
        )
    else:
        blocks: dict[str, list[str]] = {}
        for line in filter(None, map(str.strip, text.splitlines())):
            name, *more = line.split()
            if more:
                block = blocks.setdefault(name, [])
            elif blocks:
                block.append(line)
        words = [word for variable in spec.inputs for word in blocks.get(variable.name, [])]
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        values = ()
    if len(values) != wanted:
        raise UsageError(
            f"{path}: it holds no counterexample with the property's {wanted} inputs, as printed "
            "after `sat`"
        )
    return values


def verdict_text(result: Result) -> str:
    """Return the text of standard output and of the results file.

    The verdict's line comes first, then any counterexample.
    """
    text = f"{result.verdict.value}\n"
    if result.witness is not None:
        text += counterexample(result.witness, result.details.get("property"))
    return text


def as_json(result: Result, model: str, spec: str, options: Options) -> str:
    """Return the result as a JSON document.

    Values of a counterexample are decimal strings, so no digit is lost.
    """
    parsed: Property | None = result.details.get("property")
    witness = result.witness
    document: dict[str, Any] = {
        "qverify": __version__,
        "model": model,
        "spec": spec,
        "verdict": result.verdict.value,
        "reason": result.reason,
        "counterexample": None,
        "stats": dataclasses.asdict(result.stats),
        "options": dataclasses.asdict(options),
        "details": {key: value for key, value in result.details.items() if key != "property"},
    }
    if witness is not None:
        document["counterexample"] = {
            "inputs": _tensors(witness.inputs, witness.input_text, parsed.inputs if parsed else ()),
            "outputs": _tensors(
                witness.outputs, witness.output_text, parsed.outputs if parsed else ()
            ),
        }
    return json.dumps(document, indent=2, default=str) + "\n"


def _tensors(
    arrays: Iterable[Any], texts: tuple[str, ...], variables: tuple[Variable, ...]
) -> list[dict[str, Any]]:
    values = iter(texts)
    names = (variable.name for variable in variables)
    return [
        {
            "name": next(names, None),
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "values": list(itertools.islice(values, array.size)),
        }
        for array in arrays
    ]
