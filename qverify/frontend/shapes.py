"""The shapes of a model's inputs that the file leaves open, and what fixes them.

An axis without a number is fixed by the user (--shape NAME=1,3,64,64), by a property of version
2.x, which declares the shapes of its tensors, or, where it is the first one, is the batch, of 1.
onnxruntime fuses less where a shape is open, so a file is another network once its shapes are
fixed: every run of it is then made with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from qverify.errors import UsageError
from qverify.property import Property

Shape = tuple[int, ...]
Axis = int | str | None  # a number; else the name of what is open, None: it has no name


def asked_shapes(
    model: onnx.ModelProto, given: Sequence[str], declared: Sequence[Shape]
) -> dict[str, Shape]:
    """The shapes of inputs that somebody asks for, where the file leaves them open: `given` by the
    user (NAME=1,3,64,64) or, where those say nothing, `declared` by a property for its inputs in
    order. Empty where nothing has to be fixed.

    Raises UsageError for a shape that is not the model's.
    """
    axes = dict(_inputs(model))
    wanted = dict(map(_parsed, given))
    if len(wanted) < len(given):
        raise UsageError(
            f"--shape: one shape for each input, please (given: {', '.join(given)})"[:400]
        )
    for name, shape in wanted.items():
        _check(name, shape, axes)
    if len(declared) == len(axes):
        for (name, known), shape in zip(axes.items(), declared, strict=True):
            if name not in wanted and known is not None and _fits(shape, known):
                wanted[name] = shape
    sizes = _sizes_by_name(wanted, axes)
    if not any(
        _is_open(axes[name]) and not _is_batch_of_one(axes[name], wanted[name], name, given)
        for name in wanted
    ):
        return {}
    fixed = {
        name: wanted.get(name) or _filled(known or (), sizes)
        for name, known in axes.items()
        if _is_open(known)
    }
    return {name: shape for name, shape in fixed.items() if min(shape, default=0) > 0}


def _sizes_by_name(
    wanted: Mapping[str, Shape], axes: Mapping[str, tuple[Axis, ...] | None]
) -> dict[str, int]:
    """What the named axes become. UsageError where one would have two sizes."""
    sizes: dict[str, int] = {}
    for name, shape in wanted.items():
        for size, axis in zip(shape, axes[name] or (), strict=False):
            if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                raise UsageError(
                    f"--shape: the axis '{axis}' of the model cannot be both {sizes[axis]} and "
                    f"{size}"
                )
    return sizes


def batches_of_one(model: onnx.ModelProto) -> dict[str, Shape]:
    """The inputs whose batch alone is open, with the shape that they have for a batch of 1."""
    return {
        name: _filled(known, {})
        for name, known in _inputs(model)
        if known is not None
        and _is_open(known)
        and all(isinstance(axis, int) for axis in known[1:])
    }


def declared_shapes(prop: Property) -> tuple[Shape, ...]:
    """The shapes of a property's inputs; none where they only count elements (version 1.0)."""
    return (
        ()
        if prop.version.startswith("1")
        else tuple(tuple(variable.shape) for variable in prop.inputs)
    )


def shapes_text(shapes: Mapping[str, Shape]) -> str:
    """Shapes as the option --shape has them; "" where there are none."""
    return " ".join(f"{name}={','.join(map(str, shape))}" for name, shape in sorted(shapes.items()))


def _parsed(text: str) -> tuple[str, Shape]:
    name, _, numbers = text.rpartition("=")
    try:
        shape = tuple(int(number) for number in numbers.split(","))
    except ValueError:
        shape = ()
    if not name or not shape or min(shape) < 1 or max(shape) >= 2**31:
        raise UsageError(
            f"--shape {text[:200]}: a name and positive numbers are expected, such as x=1,3,64,64"
        )
    return name, shape


def _check(name: str, shape: Shape, axes: Mapping[str, tuple[Axis, ...] | None]) -> None:
    if name not in axes:
        raise UsageError(
            f"--shape {name}: the model has no such input; it has {', '.join(map(repr, axes))}"
        )
    known = axes[name]
    if known is not None and not _fits(shape, known):
        there = ", ".join("?" if axis is None else str(axis) for axis in known)
        raise UsageError(
            f"--shape {name}: {list(shape)} does not fit the input's shape in the file, [{there}]"
        )


def _inputs(model: onnx.ModelProto) -> Iterator[tuple[str, tuple[Axis, ...] | None]]:
    """Each input that is not an initializer, and its axes; None where it has no shape."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for item in model.graph.input:
        if item.name in constants:
            continue
        kind = item.type.tensor_type
        if not item.type.HasField("tensor_type") or not kind.HasField("shape"):
            yield item.name, None
        else:
            yield (
                item.name,
                tuple(
                    dim.dim_value
                    if dim.HasField("dim_value") and dim.dim_value != -1
                    else dim.dim_param or None
                    for dim in kind.shape.dim
                ),
            )


def _is_open(axes: tuple[Axis, ...] | None) -> bool:
    return axes is None or not all(isinstance(axis, int) for axis in axes)


def _is_batch_of_one(
    axes: tuple[Axis, ...] | None, shape: Shape, name: str, given: Sequence[str]
) -> bool:
    """Whether a shape that a property declares is what would be read anyway."""
    asked = any(_parsed(text)[0] == name for text in given)
    return not asked and axes is not None and not _is_open(axes[1:]) and shape[0] == 1


def _fits(shape: Shape, axes: tuple[Axis, ...]) -> bool:
    return len(shape) == len(axes) and all(
        size == axis or not isinstance(axis, int) for size, axis in zip(shape, axes, strict=True)
    )


def _filled(axes: tuple[Axis, ...], sizes: Mapping[str, int]) -> Shape:
    """Axes of one name are of one size; the batch is 1. What stays open is 0."""
    known = [
        axis if isinstance(axis, int) else sizes.get(axis or "", 1 if k == 0 else 0)
        for k, axis in enumerate(axes)
    ]
    return tuple(known)
