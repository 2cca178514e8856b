"""Nodes that only move elements.

Each is read by applying NumPy's own function to the tensor's indices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.frontend.builder import Refusal
from qverify.frontend.registry import ANY, View, checked_axis, checked_size, lowers
from qverify.frontend.tensors import IndexArray, Tensor
from qverify.ops import joint_shape


def indices(x: Tensor) -> IndexArray:
    """0, 1, 2, ... in the tensor's shape."""
    return np.arange(int(np.prod(x.shape, dtype=np.int64)), dtype=np.int64).reshape(x.shape)


def _ints(n: View, k: int, name: str, default: list[int] | None = None) -> list[int] | None:
    """A list given as an attribute (old opsets) or as constant input k (newer ones)."""
    value = n.attr(name) if name in (n.attributes or ()) else None
    if value is not None:
        return list(value)
    if n.has(k):
        return [int(v) for v in n.constant(k, name).reshape(-1)]
    return default


@lowers("Identity", inputs=1)
@lowers("Dropout", inputs=3, attributes="ratio seed")
def identity(n: View) -> Tensor:
    if n.op == "Dropout" and n.has(2) and n.constant(2, "the training mode").any():
        raise Refusal("in training mode it is random; export the model for inference")
    return n.tensor(0)


@lowers("Reshape", inputs=2, attributes="allowzero")
def reshape(n: View) -> Tensor:
    x = n.tensor(0)
    wanted = _ints(n, 1, "shape")
    if wanted is None:
        raise Refusal("the target shape is missing")
    size = int(np.prod(x.shape, dtype=np.int64))
    if not n.attr("allowzero", 0):
        wanted = [x.shape[i] if v == 0 and i < len(x.shape) else v for i, v in enumerate(wanted)]
    try:
        return n.builder.move(x, indices(x).reshape(wanted))
    except ValueError:
        raise Refusal(f"{size} elements cannot be reshaped to {wanted}") from None


@lowers("Flatten", inputs=1, attributes="axis")
def flatten(n: View) -> Tensor:
    x = n.tensor(0)
    axis = n.attr("axis", 1)
    axis = axis if axis == len(x.shape) else checked_axis(axis, len(x.shape))
    rows = int(np.prod(x.shape[:axis], dtype=np.int64))
    return n.builder.move(x, indices(x).reshape(rows, -1))


@lowers("Transpose", inputs=1, attributes="perm")
def transpose(n: View) -> Tensor:
    x = n.tensor(0)
    return n.builder.move(x, indices(x).transpose(n.attr("perm")))


@lowers("Squeeze", inputs=2, attributes="axes")
def squeeze(n: View) -> Tensor:
    x = n.tensor(0)
    axes = _ints(n, 1, "axes")
    return n.builder.move(x, indices(x).squeeze(None if axes is None else tuple(axes)))


@lowers("Unsqueeze", inputs=2, attributes="axes")
def unsqueeze(n: View) -> Tensor:
    x = n.tensor(0)
    axes = _ints(n, 1, "axes")
    if axes is None:
        raise Refusal("the axes are missing")
    return n.builder.move(x, np.expand_dims(indices(x), tuple(axes)))


@lowers("Concat", inputs=ANY, attributes="axis")
def concat(n: View) -> Tensor:
    parts = [n.tensor(k) for k in range(len(n.inputs))]
    return n.builder.concat(parts, checked_axis(n.attr("axis"), len(parts[0].shape)))


@lowers("Slice", inputs=5)
def slice_(n: View) -> Tensor:
    x = n.tensor(0)
    starts, ends = _ints(n, 1, "starts"), _ints(n, 2, "ends")
    if starts is None or ends is None:
        raise Refusal("starts or ends are missing")
    axes = _ints(n, 3, "axes", list(range(len(starts))))
    steps = _ints(n, 4, "steps", [1] * len(starts))
    assert axes is not None and steps is not None
    cut = [slice(None)] * len(x.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        start, end = (v + size if v < 0 else v for v in (start, end))
        if step > 0:
            cut[axis] = slice(min(max(start, 0), size), min(max(end, 0), size), step)
        else:
            stop = min(max(end, -1), size - 1)
            cut[axis] = slice(min(max(start, 0), size - 1), None if stop < 0 else stop, step)
    return n.builder.move(x, indices(x)[tuple(cut)])


@lowers("Split", inputs=2, attributes="axis num_outputs split")
def split(n: View) -> tuple[Tensor, ...]:
    x = n.tensor(0)
    axis = n.attr("axis", 0)
    sizes = _ints(n, 1, "split")
    count = n.attr("num_outputs", len(n.node.output))
    if sizes is None:
        chunk = -(-x.shape[axis] // count)
        sizes = [min(chunk, x.shape[axis] - i * chunk) for i in range(count)]
    if sum(sizes) != x.shape[axis] or min(sizes) < 0:
        raise Refusal(f"parts {sizes} do not add up to {x.shape[axis]}")
    return tuple(
        n.builder.move(x, part) for part in np.split(indices(x), np.cumsum(sizes)[:-1], axis=axis)
    )


@lowers("Gather", inputs=2, attributes="axis")
def gather(n: View) -> Tensor:
    x, axis = n.tensor(0), n.attr("axis", 0)
    at = n.constant(1, "the indices")
    size = x.shape[axis] if -len(x.shape) <= axis < len(x.shape) else 0
    if at.size and (at.min() < -size or at.max() >= size):
        raise Refusal(f"an index lies outside an axis of {size}")
    return n.builder.move(x, np.take(indices(x), at, axis=axis))


@lowers("Expand", inputs=2)
def expand(n: View) -> Tensor:
    x = n.tensor(0)
    wanted = tuple(int(v) for v in n.constant(1, "the shape").reshape(-1))
    result = joint_shape(x.shape, wanted)
    checked_size(result)
    return n.builder.move(x, np.broadcast_to(indices(x), result))


@lowers("Tile", inputs=2)
def tile(n: View) -> Tensor:
    x = n.tensor(0)
    repeats = tuple(int(v) for v in n.constant(1, "the repeats").reshape(-1))
    checked_size((*x.shape, *repeats))
    return n.builder.move(x, np.tile(indices(x), repeats))


def _blocked(x: Tensor, block: Any) -> tuple[int, int, int, int]:
    """The shape of what is cut into blocks."""
    if len(x.shape) != 4 or not isinstance(block, int) or block < 1:
        raise Refusal(f"blocks of {block} of a tensor {list(x.shape)} are not supported")
    batch, channels, height, width = x.shape
    return batch, channels, height, width


@lowers("DepthToSpace", inputs=1, attributes="blocksize mode")
def depth_to_space(n: View) -> Tensor:
    x, b = n.tensor(0), n.attr("blocksize")
    batch, c, h, w = _blocked(x, b)
    if c % (b * b):
        raise Refusal(f"{c} channels are no multiple of {b} x {b}")
    if n.attr("mode", "DCR") == "DCR":
        moved = indices(x).reshape(batch, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        moved = indices(x).reshape(batch, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return n.builder.move(x, moved.reshape(batch, c // (b * b), h * b, w * b))


@lowers("SpaceToDepth", inputs=1, attributes="blocksize")
def space_to_depth(n: View) -> Tensor:
    x, b = n.tensor(0), n.attr("blocksize")
    batch, c, h, w = _blocked(x, b)
    if h % b or w % b:
        raise Refusal(f"{h} x {w} elements are not made of blocks of {b} x {b}")
    moved = indices(x).reshape(batch, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
    return n.builder.move(x, moved.reshape(batch, c * b * b, h // b, w // b))


@lowers("Pad", inputs=4, attributes="mode pads value")
def pad(n: View) -> Tensor:
    x = n.tensor(0)
    pads = _ints(n, 1, "pads")
    if pads is None:
        raise Refusal("the pads are missing")
    value: Any = n.attr("value", 0.0)
    if n.has(2):
        filler = n.constant(2, "the padding value")
        value = filler.reshape(-1)[0].item() if filler.size else 0
    rank = len(x.shape)
    axes = _ints(n, 3, "axes", list(range(rank)))
    assert axes is not None
    width = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        width[axis] = (pads[i], pads[len(axes) + i])
    cut = tuple(slice(max(-a, 0), s - max(-b, 0)) for (a, b), s in zip(width, x.shape, strict=True))
    width = [(max(a, 0), max(b, 0)) for a, b in width]
    checked_size(s + a + b for s, (a, b) in zip(x.shape, width, strict=True))
    return n.builder.move(
        x, _padded(indices(x)[cut], width, n.attr("mode", "constant")), fill=value
    )


def _padded(index: IndexArray, width: list[tuple[int, int]], mode: str) -> IndexArray:
    if mode == "constant":
        return np.pad(index, width, constant_values=-1)
    if mode in ("edge", "reflect", "wrap"):
        return np.pad(index, width, mode=mode)  # type: ignore[call-overload, no-any-return]
    raise Refusal(f"padding mode '{mode}' is not supported")


@lowers("Shape", inputs=1, attributes="end start")
def shape(n: View) -> npt.NDArray[np.generic]:
    full = np.array(n.tensor(0).shape, np.int64)
    return full[n.attr("start", 0) : n.attr("end", len(full))]


@lowers("Size", inputs=1)
def size(n: View) -> npt.NDArray[np.generic]:
    return np.array(int(np.prod(n.tensor(0).shape, dtype=np.int64)), np.int64)
