"""Moving elements without changing them.

Reshape, transpose, slice, pad, concat, split, gather, im2col, ... are one op.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels
from qverify.ops.base import AbstractOp
from qverify.ops.relax import LIMIT, Relaxation, TooLarge, exact, magnitude
from qverify.ops.types import Interval, Type, Unfit


@dataclass(frozen=True, eq=False)
class Layout(AbstractOp):
    """result.flat[i] = source.flat[index[i]], for all inputs and then `constants` as the source.

    Inputs are flattened, one after another. `index` is None for a pure reshape. Sound because
    elements are only moved.
    """

    shape: tuple[int, ...]
    index: npt.NDArray[np.int64] | None = None  # [prod(shape)]
    constants: npt.NDArray[np.int32] | None = None  # [c]

    def output_type(self, *types: Type) -> Type:
        size = sum(t.size for t in types) + (0 if self.constants is None else len(self.constants))
        wanted = int(np.prod(self.shape, dtype=np.int64))
        if self.index is None and (len(types) != 1 or size != wanted):
            raise Unfit(f"cannot reshape {size} elements to {list(self.shape)}")
        if self.index is not None:
            if len(self.index) != wanted:
                raise Unfit(f"{len(self.index)} indices do not fill {list(self.shape)}")
            if wanted and (self.index.min() < 0 or self.index.max() >= size):
                raise Unfit("an index lies outside the input")
        low, high = min(t.low for t in types), max(t.high for t in types)
        if self.constants is not None and len(self.constants):
            low, high = min(low, int(self.constants.min())), max(high, int(self.constants.max()))
        return Type(self.shape, low, high)

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        n = xs[0].shape[0]
        if self.index is None:
            return xs[0].reshape(n, *self.shape)
        parts = [x.reshape(n, -1) for x in xs]
        if self.constants is not None and len(self.constants):
            parts.append(kernels.xp.broadcast_to(self.constants, (n, len(self.constants))))
        source = parts[0] if len(parts) == 1 else kernels.xp.concatenate(parts, axis=1)
        return kernels.xp.take(source, self.index, axis=1).reshape(n, *self.shape)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        return self.run(kernels, *(b[0] for b in boxes)), self.run(kernels, *(b[1] for b in boxes))

    def relaxation(self, kernels: Kernels, *types: Type) -> Relaxation:
        return LayoutRelaxation(
            self, self.index is not None and len(np.unique(self.index)) == len(self.index)
        )

    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        n = xs[0].shape[0]
        if self.index is None:
            return (upstream.reshape(xs[0].shape),)
        sizes = [x[0].size for x in xs]
        extra = 0 if self.constants is None else len(self.constants)
        total = kernels.xp.zeros((n, sum(sizes) + extra), dtype=kernels.xp.float32)
        kernels.scatter_add(total, self.index, upstream.reshape(n, -1))
        grads, start = [], 0
        for x, size in zip(xs, sizes, strict=True):
            grads.append(total[:, start : start + size].reshape(x.shape))
            start += size
        return tuple(grads)


@dataclass(frozen=True, eq=False)
class LayoutRelaxation(Relaxation):
    """Each multiplier goes back to the element it came from; those of one element add up. Exact:
    equality holds."""

    op: Layout
    once: bool  # whether no element is used twice

    def forward(self, kernels: Kernels, *xs: Array) -> Array:
        return self.op.run(kernels, *xs)

    def backward(
        self, kernels: Kernels, weights: Array, boxes: tuple[Interval, ...], result: Interval
    ) -> tuple[tuple[Array | None, ...], Array]:
        xp = kernels.xp
        n, r = weights.shape[:2]
        zero = xp.zeros((n, r), dtype=weights.dtype)
        if self.op.index is None:
            return (weights.reshape(n, r, *boxes[0][0].shape[1:]),), zero
        sizes = [box[0][0].size for box in boxes]
        constants = self.op.constants
        extra = 0 if constants is None else len(constants)
        if exact(weights):
            reach = (
                1.0
                if constants is None or not extra
                else 1.0 + magnitude(kernels, constants) * extra
            )
            if magnitude(kernels, weights) * max(1, len(self.op.index)) * reach >= LIMIT:
                raise TooLarge
        total = xp.zeros((n * r, sum(sizes) + extra), dtype=weights.dtype)
        if self.once:
            total[:, self.op.index] = weights.reshape(n * r, -1)
        else:
            kernels.scatter_add(total, self.op.index, weights.reshape(n * r, -1))
        parts, start = [], 0
        for box, size in zip(boxes, sizes, strict=True):
            parts.append(total[:, start : start + size].reshape(n, r, *box[0].shape[1:]))
            start += size
        if constants is not None and extra:
            zero = (total[:, start:] * constants).sum(axis=1).reshape(n, r)
        return tuple(parts), zero
