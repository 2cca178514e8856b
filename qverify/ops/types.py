"""What a network value may be: its shape, its range of integers, and intervals of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from qverify.kernels import Array

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

Interval = tuple[Array, Array]


class Unfit(ValueError):
    """An op that cannot be, or cannot take its input; the text says why.

    Its parameters came from a file.
    """


def joint_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """What shapes broadcast to, as NumPy and ONNX do. Raises Unfit where they do not fit."""
    try:
        return tuple(np.broadcast_shapes(*shapes))
    except ValueError:
        raise Unfit(
            f"the shapes {' and '.join(str(list(shape)) for shape in shapes)} do not fit each other"
        ) from None


@dataclass(frozen=True, slots=True)
class Type:
    """The type of a network value: its shape without batch axis, and the range of its elements."""

    shape: tuple[int, ...]
    low: int
    high: int

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def count(self) -> int:
        """How many integers an element may be."""
        return self.high - self.low + 1
