"""Where the values of a network lie while its plan is made, and in which format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qverify.kernels import Array
from qverify.kernels.fused import Fused
from qverify.kernels.packing import Unpackable, rounded
from qverify.network import Network
from qverify.ops import Interval
from qverify.propagate.device import DeviceStep, IntArray, Pairs, gathered


class Refused(Unpackable):
    """The op computes this itself."""


class Buffers:
    """The steps of a plan so far, and where they leave the values: in a buffer of ends, in one of
    pairs, or in both."""

    def __init__(self, network: Network, fused: Fused) -> None:
        self.network, self.fused, self.kernels = network, fused, fused.kernels
        self.steps: list[DeviceStep] = []
        self.ends: dict[int, int] = {0: 0}  # value: buffer
        self.pairs: dict[int, Pairs] = {}
        self.forms: dict[tuple[int, bytes, int], Pairs] = {}  # gathered before

    def step(
        self, function: Callable[..., Any], reads: tuple[int, ...], size: int, **more: Any
    ) -> int:
        """Add a step; its buffer."""
        self.steps.append(DeviceStep(function, reads, len(self.steps) + 1, size, **more))
        return len(self.steps)

    def home(self, array: Array) -> Any:
        """An op's array in NumPy."""
        return np.asarray(self.kernels.to_host(array))

    def in_ends(self, value: int) -> int:
        """The buffer of a value's ends."""
        if value not in self.ends:
            pairs, kind, kernels = self.pairs[value], self.network.type_of(value), self.kernels
            in_order = np.array_equal(pairs.at, np.arange(kind.size))
            index = None if in_order else kernels.asarray(pairs.at)

            def separated(x: Array) -> Interval:
                codes = x if index is None else gathered(kernels, x, index)
                lower, upper = (
                    codes[:, : kind.size, end].astype(kernels.xp.int32) for end in (0, 1)
                )
                if kind.low:
                    lower, upper = lower + kind.low, upper + kind.low
                return lower.reshape(-1, *kind.shape), upper.reshape(-1, *kind.shape)

            self.ends[value] = self.step(separated, (pairs.buffer,), 12 * kind.size)
        return self.ends[value]

    def in_pairs(self, value: int) -> Pairs:
        """Where a value's pairs are; refused where its codes do not fit a byte."""
        kind, kernels = self.network.type_of(value), self.kernels
        if kind.count > 256 or kind.size == 0:
            raise Refused
        if value not in self.pairs:
            codes = rounded(kind.size, 8)

            def interleaved(ends: Interval) -> Array:
                # Spare codes hold anything.
                pairs = kernels.xp.empty((len(ends[0]), codes, 2), dtype=kernels.xp.uint8)
                for k, end in enumerate(ends):
                    flat = end.reshape(-1, kind.size)
                    pairs[:, : kind.size, k] = flat - kind.low if kind.low else flat
                return pairs

            buffer = self.step(interleaved, (self.ends[value],), 2 * codes + 8 * kind.size)
            self.pairs[value] = Pairs(buffer, np.arange(kind.size), codes)
        return self.pairs[value]

    def moved(self, held: Pairs, at: IntArray, codes: int) -> Pairs:
        """The same value in another form, gathered if need be."""
        if held.is_at(at, codes):
            return held
        index = np.zeros(codes, np.int64)
        index[at] = held.at
        key = held.buffer, index.tobytes(), codes
        if key not in self.forms:
            there, kernels = self.kernels.asarray(index), self.kernels
            buffer = self.step(lambda x: gathered(kernels, x, there), (held.buffer,), 2 * codes)
            self.forms[key] = Pairs(buffer, at, codes)
        return replace(self.forms[key], at=at)
