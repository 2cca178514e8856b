"""What is open: stacks of arrays in the machine's memory, taken in batches from the top (depth
first). The bottom of one that outgrows a GPU's memory waits in the host's; what is taken, and in
which order, does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels


class Frontier:
    """Boxes as int16 arrays [capacity, 2, codes]; the first `_held` rows are in use.

    Depth first with batches keeps it small: every step takes up to a batch from the top and returns
    at most two children for each. When it outgrows its byte budget, batches shrink, and at a batch
    of one it can grow by one box a step at most, along one path of the tree.

    No more than `resident_bytes` (if given) stay in a GPU's memory: beyond them the bottom of the
    stack goes to the host, half of what may be resident at a time, and comes back in the same
    blocks before it is needed. So the boxes come in the same order and in the same batches as
    without that limit.
    """

    def __init__(
        self, kernels: Kernels, codes: int, budget_bytes: int, resident_bytes: int | None = None
    ) -> None:
        self._kernels = kernels
        self._boxes = kernels.xp.empty((64, 2, codes), dtype=kernels.xp.int16)
        self._entries = np.zeros(64, np.int64)  # of all boxes, those on the host among them
        self._budget = max(64, budget_bytes // (4 * max(codes, 1)))
        self._resident = max(
            2, (budget_bytes if resident_bytes is None else resident_bytes) // (4 * max(codes, 1))
        )
        self._below: list[Any] = []  # blocks on the host, from the bottom up
        self._held = 0
        self.size = 0  # of all boxes
        self.taken = self._entries[:0]  # the entries of the boxes taken last

    def push(self, lower: Array, upper: Array, entries: Any = 0) -> None:
        """Add boxes [N, codes], with their numbers in the proof; the last is taken first."""
        count = lower.shape[0]
        while self._held and self._held + count > self._resident:
            self._put_away(min(self._held, self._resident // 2))
        if self._held + count > self._boxes.shape[0]:
            self._grow(max(min(2 * self._boxes.shape[0], self._resident), self._held + count))
        if self.size + count > len(self._entries):
            more = max(len(self._entries), count)
            self._entries = np.concatenate([self._entries, np.zeros(more, np.int64)])
        self._boxes[self._held : self._held + count, 0] = lower
        self._boxes[self._held : self._held + count, 1] = upper
        self._entries[self.size : self.size + count] = entries
        self._held += count
        self.size += count

    def pop(self, batch: int) -> tuple[Array, Array]:
        """Take up to `batch` boxes from the top: (lower, upper), int32 [N, codes]."""
        fullness = self.size / self._budget
        if fullness > 0.5:
            batch = max(1, int(batch * (1.0 - fullness)))
        count = min(batch, self.size)
        while self._held < count:
            self._bring_back()
        self.size -= count
        self._held -= count
        self.taken = self._entries[self.size : self.size + count].copy()
        taken: Any = self._boxes[self._held : self._held + count].astype(self._kernels.xp.int32)
        return taken[:, 0], taken[:, 1]

    def _grow(self, capacity: int) -> None:
        xp = self._kernels.xp
        grown = xp.empty((capacity, *self._boxes.shape[1:]), dtype=xp.int16)
        grown[: self._held] = self._boxes[: self._held]
        self._boxes = grown

    def _put_away(self, count: int) -> None:
        """Move the lowest boxes on the machine to the host."""
        self._below.append(self._kernels.to_host(self._boxes[:count].copy()))
        self._held -= count
        self._boxes[: self._held] = self._boxes[
            count : count + self._held
        ].copy()  # the two may overlap

    def _bring_back(self) -> None:
        """Put the topmost block of the host's below the boxes on the machine."""
        block = self._kernels.asarray(self._below.pop())
        xp, own = self._kernels.xp, self._boxes[: self._held]
        self._boxes = xp.concatenate([block, own])
        self._held += len(block)


@dataclass(frozen=True, eq=False)
class Provenance:
    """What N subproblems are parts of; on the host."""

    region: npt.NDArray[np.int64]
    entry: npt.NDArray[np.int64]  # numbers in the proof
    share: npt.NDArray[np.float64]  # of the whole search, halved by every cut (for progress only)

    def __len__(self) -> int:
        return len(self.region)

    def __getitem__(self, rows: Any) -> Provenance:
        return Provenance(self.region[rows], self.entry[rows], self.share[rows])

    @staticmethod
    def joined(parts: Sequence[Provenance]) -> Provenance:
        """All of some."""
        return Provenance(
            *(
                np.concatenate([getattr(p, name) for p in parts])
                for name in ("region", "entry", "share")
            )
        )


@dataclass(frozen=True, eq=False)
class Subproblems:
    """N open subproblems, as arrays of one machine."""

    lower: Array  # int32 [N, size of the layout]
    upper: Array
    origin: Provenance
    mu: Array  # float32 [N, K]
    multipliers: Array  # float32 [N, all of them]
    bound: npt.NDArray[np.float64]  # [N], on the host; a guide
    branch: Array  # int64 [N]: the entry to cut
    threshold: Array  # int32 [N]: into at most threshold - 1 and at least threshold

    def take(self, rows: Any, there: Any) -> Subproblems:
        """Some of them: a slice, or numbers on the host, and `there` the same on the machine."""
        host = ("origin", "bound")
        return Subproblems(
            *(
                getattr(self, name)[rows if name in host else there]
                for name in self.__dataclass_fields__
            )
        )

    def moved(self, move: Callable[[Array], Array]) -> Subproblems:
        """The same with its arrays of the machine on another one."""
        names = ("lower", "upper", "mu", "multipliers", "branch", "threshold")
        return replace(self, **{name: move(getattr(self, name)) for name in names})

    def bytes(self) -> int:
        """What they take of the machine's memory."""
        flat = (self.lower, self.upper, self.mu, self.multipliers, self.branch, self.threshold)
        return sum(int(a.size) * a.dtype.itemsize for a in flat)


class Waiting:
    """A stack of open subproblems, in blocks. The top one is in the machine's memory; of the others
    no more than `room` bytes (None: all). What is below lies in the host's memory, and comes back
    block by block, when it is the top."""

    def __init__(self, kernels: Kernels, room: int | None) -> None:
        self.blocks: list[Subproblems] = []
        self.away = 0  # so many blocks, from the bottom up, are on the host
        self._kernels, self._room, self._resident = kernels, room, 0

    def __len__(self) -> int:
        return sum(len(nodes.origin) for nodes in self.blocks)

    def push(self, nodes: Subproblems) -> None:
        """Put a block on top."""
        self.blocks.append(nodes)
        self._resident += nodes.bytes()
        while (
            self._room is not None
            and self._resident > self._room
            and self.away < len(self.blocks) - 1
        ):
            self._resident -= self.blocks[self.away].bytes()
            self.blocks[self.away] = self.blocks[self.away].moved(self._kernels.to_host)
            self.away += 1

    def pop(self, count: int) -> Subproblems:
        """Take up to `count` subproblems off the top block."""
        nodes = self.blocks.pop()
        if len(self.blocks) < self.away:
            self.away -= 1
            nodes = nodes.moved(self._kernels.asarray)
        else:
            self._resident -= nodes.bytes()
        if len(nodes.origin) > count:
            rest, top = slice(None, -count), slice(-count, None)
            self.push(nodes.take(rest, rest))
            nodes = nodes.take(top, top)
        return nodes
