"""The host as a machine: NumPy."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qverify.kernels.base import Array, Budget, Kernels, fold_by_taps


@dataclass(frozen=True)
class CpuKernels(Kernels):
    """NumPy. Batches are as large as what caches hold (measured: half the time per box)."""

    name: ClassVar[str] = "cpu"
    library: ClassVar[str] = "NumPy"
    is_host: ClassVar[bool] = True
    look_every: ClassVar[int] = 1
    chunk_bytes: ClassVar[int] = 8 << 20
    # Two ends, and about as much again in scratch.
    box_budget: ClassVar[Budget] = Budget(8 << 20, 1.0, each=16, least=16, most=4096)
    # The arrays of one step.
    cut_budget: ClassVar[Budget] = Budget(24 << 20, 1.0, each=64, least=2, most=256)

    def allowance(self, most: int, share: float) -> int:
        return most

    def resident_bytes(self) -> None:
        return None

    def device_limit(self, name: str, otherwise: int) -> int:
        return otherwise

    def to_host(self, values: Array) -> Any:
        return values

    def may_hold(self, mask: Array) -> bool:
        return bool(mask.any())

    def scatter_add(self, target: Array, index: Array, values: Array) -> None:
        self.xp.add.at(target, (slice(None), index), values)

    def fold(
        self,
        columns: Array,
        output: tuple[int, ...],
        padded: tuple[int, ...],
        strides: tuple[int, ...],
        dilations: tuple[int, ...],
    ) -> Array:
        return fold_by_taps(self.xp, columns, output, padded, strides, dilations)

    def total(self, parts: list[Array]) -> Array:
        return functools.reduce(operator.add, parts)

    def dot(self, a: Array, b: Array) -> Array:
        product = a * b
        return product.reshape(*product.shape[:2], -1).sum(axis=2)

    def inner(self, a: Array, b: Array) -> Array:
        n, r = a.shape[:2]
        return np.einsum("nk,nk->n", a.reshape(n * r, -1), b.reshape(n * r, -1)).reshape(n, r)

    def largest(self, *xs: Array) -> list[float]:
        return [max(float(x.max()), -float(x.min())) if x.size else 0.0 for x in xs]

    def furthest(self, weights: Array, low: Array, high: Array) -> Array:
        return np.where(weights > 0, high, low)

    def best_corner(
        self, weights: Array, multipliers: Array, z: Array, y: Array, slack: Array | None
    ) -> tuple[Array, Array, Array]:
        rising = multipliers >= 0
        best: Any = None
        best_y: Any = None
        best_z: Any = None
        for k in range(z.shape[1]):
            corner_y = y[0, k] if len(y) == 1 else np.where(rising, y[0, k], y[1, k])
            corner_z = z[0, k] if len(z) == 1 else np.where(rising, z[0, k], z[1, k])
            value = weights * corner_y
            value -= multipliers * corner_z
            if best is None:
                best = value
                best_y = np.broadcast_to(corner_y, value.shape)
                best_z = np.broadcast_to(corner_z, value.shape)
            else:
                better = value > best
                best = np.maximum(best, value)
                best_y = np.where(better, corner_y, best_y)
                best_z = np.where(better, corner_z, best_z)
        if slack is not None:
            best = best + np.abs(multipliers) * slack
        return best, best_y, best_z

    def descend(
        self,
        m: Array,
        argument: Array,
        z: Array | float,
        size: Array,
        moments: tuple[Array, Array],
        rate: float,
        least: float | None = None,
        mean: Array | None = None,
        share: float = 1.0,
    ) -> Array:
        if mean is not None:
            if share < 1:
                mean += share * (argument - mean)
            else:
                mean[...] = argument
        first, second = moments
        gap = argument - z
        change = gap - first
        change *= 0.1
        first += change
        gap *= gap
        gap -= second
        gap *= 0.01
        second += gap
        np.sqrt(second, out=gap)
        gap += 1e-9
        step = (rate * size) * first
        step /= gap
        np.subtract(m, step, out=step)
        return step if least is None else np.maximum(step, least)

    def rows_where(self, better: Array, new: list[Array], old: list[Array]) -> list[Array]:
        rows = np.flatnonzero(better)
        if len(rows) in (0, len(better)):
            return list(new if len(rows) else old)
        result = [b.copy() for b in old]
        for mixed, a in zip(result, new, strict=True):
            mixed[rows] = a[rows]
        return result


def open_cpu() -> CpuKernels:
    """The kernels of the host."""
    return CpuKernels(f"NumPy {np.__version__}", np, np)
