"""What every machine can do: an abstract base, and budgets of memory."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

# numpy.ndarray or cupy.ndarray; the machine is known by the `Kernels` that goes with it.
Array = Any


@dataclass(frozen=True)
class Budget:
    """How many rows a batch may have."""

    total: int  # bytes of the whole batch
    share: float  # of a device's free memory, where that is less
    each: int  # bytes for each element of a row, scratch included
    least: int  # rows
    most: int


@dataclass(frozen=True)
class Kernels(ABC):
    """One machine. `xp` is its array module (`numpy` or `cupy`).

    A method is either the same for all machines and written here, or abstract here and written once
    for each machine.
    """

    description: str  # for the user, e.g. "NumPy 2.4.6"
    xp: Any
    # add, subtract, multiply, divide, maximum, minimum of float32 (not of NaN), subnormals included
    ieee: Any

    name: ClassVar[str]  # "cpu" or "cuda": for printing
    library: ClassVar[str]  # "NumPy" or "CuPy": for printing
    # Whether arrays are NumPy's, in the host's memory: nothing has to be moved.
    is_host: ClassVar[bool]
    # Steps of an improvement from one look at its bounds to the next: a look at a device waits.
    look_every: ClassVar[int]
    chunk_bytes: ClassVar[int]  # of one array of a chunk of functions or inequalities
    box_budget: ClassVar[Budget]  # of boxes whose intervals are computed at once
    cut_budget: ClassVar[Budget]  # of subproblems with cuts that are bounded at once

    # -- memory ------------------------------------------------------------------------------------

    @abstractmethod
    def allowance(self, most: int, share: float) -> int:
        """Bytes of memory to plan with: `most`, or a share of a device's free memory where that is
        less."""

    @abstractmethod
    def resident_bytes(self) -> int | None:
        """How much of what waits to be searched may stay in the device's memory; None on the host,
        whose memory it fills in any case."""

    def batch(self, budget: Budget, elements: int) -> int:
        """How many rows of so many elements fit a budget."""
        rows = self.allowance(budget.total, budget.share) // (budget.each * max(elements, 1))
        return max(budget.least, min(rows, budget.most))

    @abstractmethod
    def device_limit(self, name: str, otherwise: int) -> int:
        """A CUDA device's attribute; `otherwise` on a host, which has none."""

    # -- between host and machine ------------------------------------------------------------------

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        """`values` (host or device) as an array of this machine."""
        return self.xp.asarray(values, dtype=dtype)

    @abstractmethod
    def to_host(self, values: Array) -> Any:
        """`values` as a NumPy array."""

    @abstractmethod
    def may_hold(self, mask: Array) -> bool:
        """Whether `mask` may be true anywhere. A device says yes unasked: waiting for its answer
        takes longer than the work that a no would save."""

    # -- products and moves ------------------------------------------------------------------------

    def as_float32(self, values: Array) -> Array:
        """int32 -> float32, rounded half to even, as CVTDQ2PS does."""
        return values.astype(self.xp.float32)

    def matmul(self, x: Array, weight: Array) -> Array:
        """`x @ weight` for integer `x` [..., K] and a float `weight` [K, M] that holds integers;
        the result is float.

        Exact because the caller chose `weight`'s dtype so that every partial sum of |x||w| stays
        below 2**24 (float32) or 2**53 (float64): all intermediate values are then representable, in
        whatever order they are added.
        """
        x = x.astype(weight.dtype, copy=False)
        if weight.ndim > 2 or x.ndim <= 2:
            return self.xp.matmul(x, weight)
        # One large product instead of a batch of small ones.
        rows = self.xp.matmul(x.reshape(-1, x.shape[-1]), weight)
        return rows.reshape(*x.shape[:-1], weight.shape[-1])

    def whole(self, values: Array) -> Array:
        """The nearest int64 of floats; 0 for NaN and what is 2**62 or more, which every machine
        converts differently."""
        values = self.xp.rint(values)
        return self.xp.where(self.xp.abs(values) < 2.0**62, values, 0).astype(self.xp.int64)

    def windows(
        self,
        x: Array,
        kernel: tuple[int, ...],
        strides: tuple[int, ...],
        dilations: tuple[int, ...],
    ) -> Array:
        """A view [N, C, *output, *kernel] of `x` [N, C, *spatial]; nothing is copied."""
        spatial = x.shape[2:]
        span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        output = tuple((n - s) // t + 1 for n, s, t in zip(spatial, span, strides, strict=True))
        step = x.strides[2:]
        return self.xp.lib.stride_tricks.as_strided(
            x,
            shape=(*x.shape[:2], *output, *kernel),
            strides=(
                *x.strides[:2],
                *(s * t for s, t in zip(step, strides, strict=True)),
                *(s * d for s, d in zip(step, dilations, strict=True)),
            ),
        )

    @abstractmethod
    def scatter_add(self, target: Array, index: Array, values: Array) -> None:
        """`target[:, index] += values`, repeated indices added up. `target` [N, n], `index` [m],
        `values` [N, m]."""

    @abstractmethod
    def fold(
        self,
        columns: Array,
        output: tuple[int, ...],
        padded: tuple[int, ...],
        strides: tuple[int, ...],
        dilations: tuple[int, ...],
    ) -> Array:
        """Columns [N, groups, *output, channels, *kernel] added up where their taps meet the input:
        [N, groups, channels, *padded]. In the order of the taps, from 0."""

    # -- element by element, in one pass -----------------------------------------------------------
    # Both machines agree bit for bit on int64. Float32 is for guides only.

    @abstractmethod
    def total(self, parts: list[Array]) -> Array:
        """The sum of the parts, from the first to the last."""

    @abstractmethod
    def dot(self, a: Array, b: Array) -> Array:
        """The sum of a * b over the elements: [N, R, *shape] and what broadcasts to it -> [N,
        R]."""

    @abstractmethod
    def inner(self, a: Array, b: Array) -> Array:
        """`dot` of two arrays of one shape [N, R, *shape] and one type -> [N, R]; integers wrap."""

    @abstractmethod
    def largest(self, *xs: Array) -> list[float]:
        """The largest absolute value of each of some arrays of integers, in float64 (0 if it is
        empty). The host waits once."""

    @abstractmethod
    def furthest(self, weights: Array, low: Array, high: Array) -> Array:
        """Where weights * x is largest for x in [low, high], element by element, all of one
        type."""

    @abstractmethod
    def best_corner(
        self, weights: Array, multipliers: Array, z: Array, y: Array, slack: Array | None
    ) -> tuple[Array, Array, Array]:
        """(max over corners of weights * y - multipliers * z, plus |multipliers| slack, the
        corner's y and z), element by element: [N, R, *shape]. For z, y and slack see
        `qverify.ops.relax.Hull`; all of one type, int64 or float32.

        Integers must not leave int64. The first of several best corners is taken.
        """

    @abstractmethod
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
        """One step of Adam from m [N, ...] along the gradient argument - z, no lower than `least`;
        float32. The `moments` are brought up to date in place, and so is the running `mean` of
        arguments, into which this one goes with a `share`."""

    @abstractmethod
    def rows_where(self, better: Array, new: list[Array], old: list[Array]) -> list[Array]:
        """The rows of `new` where `better` [N], those of `old` elsewhere. Neither is changed, but a
        result may be one of them."""


def fold_by_taps(
    xp: Any,
    columns: Array,
    output: tuple[int, ...],
    padded: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> Array:
    """`Kernels.fold`, with one array addition for every tap of the kernel."""
    rank = len(output)
    (n, groups), channels = columns.shape[:2], columns.shape[2 + rank]
    result = xp.zeros((n, groups, channels, *padded), dtype=columns.dtype)
    for tap in itertools.product(*map(range, columns.shape[3 + rank :])):
        where = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, d, o, s in zip(tap, dilations, output, strides, strict=True)
        )
        part = columns[(..., *tap)]  # [N, groups, *output, channels]
        result[(slice(None), slice(None), slice(None), *where)] += xp.moveaxis(part, -1, 2)
    return result
