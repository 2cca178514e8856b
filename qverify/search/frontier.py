"""The open boxes: a stack of arrays in the machine's memory, taken in batches from its top (depth first)."""

from __future__ import annotations

from typing import Any

import numpy as np

from qverify.kernels import Array, Kernels


class Frontier:
    """Boxes as int16 arrays [capacity, 2, codes]; the first `size` rows are in use.

    Depth first with batches keeps it small: every step takes up to a batch from the top and returns at most two
    children for each. When it outgrows its byte budget, batches shrink, and at a batch of one it can grow by one box a
    step at most, along one path of the tree.
    """

    def __init__(self, kernels: Kernels, codes: int, budget_bytes: int) -> None:
        self._kernels = kernels
        self._boxes = kernels.xp.empty((64, 2, codes), dtype=kernels.xp.int16)
        self._entries = np.zeros(64, np.int64)
        self._budget = max(64, budget_bytes // (4 * max(codes, 1)))
        self.size = 0
        self.taken = self._entries[:0]  # the entries of the boxes taken last

    def push(self, lower: Array, upper: Array, entries: Any = 0) -> None:
        """Add boxes [N, codes], with their numbers in the proof; the last is taken first."""
        count = lower.shape[0]
        if self.size + count > self._boxes.shape[0]:
            xp = self._kernels.xp
            grown = xp.empty((max(2 * self._boxes.shape[0], self.size + count), *self._boxes.shape[1:]), dtype=xp.int16)
            grown[: self.size] = self._boxes[: self.size]
            self._boxes = grown
            self._entries = np.concatenate([self._entries, np.zeros(len(grown) - len(self._entries), np.int64)])
        self._boxes[self.size : self.size + count, 0] = lower
        self._boxes[self.size : self.size + count, 1] = upper
        self._entries[self.size : self.size + count] = entries
        self.size += count

    def pop(self, batch: int) -> tuple[Array, Array]:
        """Take up to `batch` boxes from the top: (lower, upper), int32 [N, codes]."""
        fullness = self.size / self._budget
        if fullness > 0.5:
            batch = max(1, int(batch * (1.0 - fullness)))
        count = min(batch, self.size)
        self.size -= count
        self.taken = self._entries[self.size : self.size + count].copy()
        taken: Any = self._boxes[self.size : self.size + count].astype(self._kernels.xp.int32)
        return taken[:, 0], taken[:, 1]
