"""What every integer op answers. An op is a frozen value; bounds live beside the network.

Conventions: an op's arrays are NumPy until `on(kernels)` moves them; a value is an int32 array [N,
*shape] whose elements lie in [low, high] of its `Type`. `interval` takes and returns (lower, upper)
pairs of such arrays.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from qverify.kernels import Array, Kernels
from qverify.ops.relax import IntervalRelaxation, Relaxation
from qverify.ops.types import Interval, Type


@dataclass(frozen=True, eq=False)
class AbstractOp(ABC):
    """One integer operation. Subclasses are final dataclasses.

    Most ops are *exact*: the runtime gives one integer, and `run` gives it too. An op with a *band*
    stands for float operations whose order is the runtime's secret: `run` is the nominal result,
    one of those that some order gives.

    The laws (tested for every op): *containment*, if x lies in the box, then every result that any
    order of float operations gives for x lies in interval(box), run(x) among them; *a point stays a
    point*, interval([x, x]) = [run(x), run(x)] for an exact op; *monotone*, a smaller box gives a
    smaller interval. The second makes the search complete: an exact network is bounded exactly on a
    box of one code vector. Otherwise the runtime is asked there (`boundary/leaves.py`).
    """

    @property
    def exact(self) -> bool:
        """Whether `run` gives the runtime's result, bit for bit.

        Otherwise the runtime may give any result in the interval of a point.
        """
        return True

    @abstractmethod
    def output_type(self, *types: Type) -> Type:
        """The type of the result. ValueError where shapes do not fit or int32 could overflow."""

    @abstractmethod
    def run(self, kernels: Kernels, *xs: Array) -> Array:
        """The result as the runtime computes it, or (of an op with a band) may compute it."""

    @abstractmethod
    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        """Bounds of every result that the runtime may give, over all inputs in the boxes."""

    @abstractmethod
    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        """A straight-through gradient, float32: rounding counts as the identity.

        It guides the attack and the branching; nothing that is proved rests on it.
        """

    def relaxation(self, kernels: Kernels, *types: Type) -> Relaxation:
        """The backward rule for inputs of these types (see `relax`).

        By default the backward pass stops at the bounds of the result.
        """
        return IntervalRelaxation()

    def on(self, kernels: Kernels) -> Self:
        """This op with its arrays on the given machine."""
        if kernels.is_host:
            return self
        copy: Self = moved(self, kernels)
        return copy


def unbroadcast(full: Array, x: Array) -> Array:
    """Sum `full` over the axes along which `x` was broadcast; the batch axis, the first, stays."""
    while full.ndim > x.ndim:
        full = full.sum(axis=1)
    axes = tuple(i for i in range(1, x.ndim) if x.shape[i] == 1 and full.shape[i] != 1)
    return full.sum(axis=axes, keepdims=True) if axes else full


def moved(value: Any, kernels: Kernels) -> Any:
    """A copy of a dataclass with every NumPy array field, also inside tuples, on the machine."""
    if isinstance(value, np.ndarray):
        return kernels.asarray(value)
    if isinstance(value, tuple):
        return tuple(moved(item, kernels) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        copy = object.__new__(type(value))
        for field in dataclasses.fields(value):
            object.__setattr__(copy, field.name, moved(getattr(value, field.name), kernels))
        return copy
    return value
