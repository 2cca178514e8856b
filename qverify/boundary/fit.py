"""Whether a property is about a model: its variables must be the model's inputs and outputs."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qverify.errors import SpecError
from qverify.frontend.lower import Lowered
from qverify.property import Property, Variable


def check_fit(prop: Property, lowered: Lowered, spec: Path) -> list[str]:
    """Raise SpecError unless a property's variables are the model's; remarks on what differs.

    The error is one line that begins with `spec`. 1.0 counts elements only. 2.x declares tensors,
    and as the VNNLIB-Standard wants it, they are the model's in number, order, type and shape.
    Shapes may differ by axes of size 1, which leave every element in its place; a remark on each is
    returned.
    """
    remarks = []
    for what, declared, actual in (
        ("input", prop.inputs, lowered.inputs),
        ("output", prop.outputs, lowered.graph_outputs),
    ):
        wanted = sum(prod(shape) for _, shape, _ in actual)
        given = sum(prod(v.shape) for v in declared)
        if wanted != given:
            raise SpecError(f"{spec}: {_other_sizes(what, declared, actual, given, wanted)}")
        if prop.version.startswith("1"):
            integers = any(v.dtype.lower() == "int" for v in declared)
            if integers and any(dtype == np.float32 for _, _, dtype in actual):
                raise SpecError(
                    f"{spec}: it declares Int {what}s, but the model's are float32: declare Real"
                )
            continue
        if len(declared) != len(actual):
            raise SpecError(
                f"{spec}: it declares {len(declared)} {what}s, but the model has {len(actual)}"
            )
        for variable, (name, shape, dtype) in zip(declared, actual, strict=True):
            remarks += _check_variable(spec, variable, name, shape, dtype)
    return remarks


def _other_sizes(
    what: str, declared: tuple[Variable, ...], actual: Any, given: int, wanted: int
) -> str:
    """What to say where the numbers of elements differ."""
    if len(declared) == len(actual) == 1 and len(declared[0].shape) == len(actual[0][1]) > 1:
        ours, theirs = (list(shape) for shape in (declared[0].shape, actual[0][1]))
        if ours[1:] == theirs[1:]:
            return (
                f"it declares {declared[0].name} {ours}, a batch of {ours[0]}, but the model's "
                f"'{actual[0][0]}' is read as {theirs}: export the model with that batch size"
            )
    return f"it declares {given} {what} elements, but the model has {wanted}: another model's?"


def _check_variable(
    spec: Path, variable: Variable, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> list[str]:
    differs = (
        f"{variable.name} has shape {list(variable.shape)}, the model's '{name}' {list(shape)}"
    )
    if [size for size in variable.shape if size != 1] != [size for size in shape if size != 1]:
        raise SpecError(f"{spec}: {differs}")
    if variable.dtype.lower() not in ("real", str(dtype)):
        raise SpecError(
            f"{spec}: {variable.name} is {variable.dtype}, the model's '{name}' is {dtype}"
        )
    if tuple(variable.shape) == shape:
        return []
    return [f"{differs}: taken as the same elements in the same order"]
