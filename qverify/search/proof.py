"""What a search leaves behind for a certificate: the tree of cuts, and how every leaf was closed.

`specs/certificate.md` says what entries mean. They are numbered in the order in which the search
makes them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.bounds.intermediate import BoundStep

CUT, CLOSED, REGIONS, DUAL = range(4)
IntArray = npt.NDArray[np.int64]


@dataclass(eq=False)
class Proof:
    """The tree of one query; entry 0 is the root box. The kind of an open entry is -1."""

    kind: array[int] = field(default_factory=lambda: array("b", [-1]))
    first: array[int] = field(default_factory=lambda: array("q", [0]))
    value: array[int] = field(default_factory=lambda: array("q", [0]))
    element: array[int] = field(default_factory=lambda: array("q", [0]))
    threshold: array[int] = field(default_factory=lambda: array("q", [0]))
    data: array[int] = field(default_factory=lambda: array("q", [0]))
    regions: list[int] = field(default_factory=list)
    mu: list[IntArray] = field(default_factory=list)  # [K] each
    multipliers: list[IntArray] = field(default_factory=list)  # [M] each
    intermediate: list[BoundStep] = field(default_factory=list)
    columns: list[tuple[int, int]] = field(default_factory=list)  # (node, size)
    rules: dict[int, str] = field(default_factory=dict)
    slopes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def _grow(self, count: int) -> int:
        start = len(self.kind)
        self.kind.extend([-1] * count)
        for column in (self.first, self.value, self.element, self.threshold, self.data):
            column.extend([0] * count)
        return start

    def cut(self, entries: Any, value: int, elements: Any, thresholds: Any) -> IntArray:
        """Cut entries [N], each at one element of `value` [N]. Returns their children [2 N]: first
        all lower ones, then all upper ones."""
        start = self._grow(2 * len(entries))
        for i, (entry, element, threshold) in enumerate(
            zip(entries, elements, thresholds, strict=True)
        ):
            self.kind[entry], self.first[entry], self.value[entry] = CUT, start + 2 * i, value
            self.element[entry], self.threshold[entry] = int(element), int(threshold)
        lower = start + 2 * np.arange(len(entries), dtype=np.int64)
        return np.concatenate([lower, lower + 1])

    def close(self, entries: Any) -> None:
        """Close entries that hold no point, or are refuted by bounds that a checker can repeat."""
        for entry in entries:
            self.kind[entry] = CLOSED

    def part(self, regions: Sequence[int]) -> IntArray:
        """One child of the root for each region."""
        start = self._grow(len(regions))
        self.kind[0], self.first[0], self.data[0] = REGIONS, start, len(regions)
        self.regions = list(regions)
        return np.arange(start, start + len(regions), dtype=np.int64)

    def refute(self, entry: int, mu: IntArray, multipliers: IntArray) -> None:
        """Close a region's entry: this combination, with these multipliers, refutes it."""
        self.kind[entry], self.data[entry] = DUAL, len(self.mu)
        self.mu.append(mu)
        self.multipliers.append(multipliers)

    def walked(self) -> list[int]:
        """The entries that multipliers close, in the order of a depth-first walk that takes the
        first child first."""
        found: list[int] = []
        stack = [0]
        while stack:
            entry = stack.pop()
            if self.kind[entry] in (CUT, REGIONS):
                count = 2 if self.kind[entry] == CUT else self.data[entry]
                stack += range(self.first[entry] + count - 1, self.first[entry] - 1, -1)
            elif self.kind[entry] == DUAL:
                found.append(entry)
        return found
