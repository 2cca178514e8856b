"""What is open: a stack of blocks of subproblems, taken in batches from the top (depth first).

On a GPU with little memory, blocks at the bottom wait in the host's. What is taken, and in which
order, does not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from qverify.kernels import Array, Kernels


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows of several arrays, [N, ...] each: on the machine, but for those named `on_host`."""

    on_host: ClassVar[frozenset[str]]

    def __len__(self) -> int:
        first: Array = getattr(self, fields(self)[0].name)
        return len(first)

    def take(self, rows: Any, there: Any) -> Self:
        """Some of them: a slice, or numbers on the host, and `there` the same on the machine."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{
                f.name: kept[f.name][rows if f.name in self.on_host else there]
                for f in fields(self)
            },
        )

    def moved(self, move: Callable[[Array], Array]) -> Self:
        """The same with its arrays of the machine on another one."""
        names = [f.name for f in fields(self) if f.name not in self.on_host]
        return replace(self, **{name: move(getattr(self, name)) for name in names})

    def bytes(self) -> int:
        """What they take of the machine's memory."""
        arrays = (getattr(self, f.name) for f in fields(self) if f.name not in self.on_host)
        return sum(int(array.size) * array.dtype.itemsize for array in arrays)

    @classmethod
    def joined(cls, kernels: Kernels, parts: Sequence[Self]) -> Self:
        """The rows of several parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        columns: dict[str, Any] = {}
        for f in fields(cls):
            column = [getattr(part, f.name) for part in parts]
            xp = np if f.name in cls.on_host else kernels.xp
            nested = isinstance(column[0], Rows)
            columns[f.name] = (
                type(column[0]).joined(kernels, column) if nested else xp.concatenate(column)
            )
        return cls(**columns)


@dataclass(frozen=True, eq=False)
class OpenBoxes(Rows):
    """Boxes of codes that wait to be bounded and split."""

    on_host: ClassVar[frozenset[str]] = frozenset({"entry"})

    lower: Array  # [N, codes], in the narrowest type that holds the root box
    upper: Array
    entry: npt.NDArray[np.int64]  # [N]: numbers in the proof

    @staticmethod
    def narrowest(lower: npt.NDArray[np.int32], upper: npt.NDArray[np.int32]) -> Any:
        """The integer type that holds every code of a root box [codes], as NumPy's."""
        least, most = int(lower.min(initial=0)), int(upper.max(initial=0))
        return np.int16 if least >= -(2**15) and most < 2**15 else np.int32


@dataclass(frozen=True, eq=False)
class Provenance(Rows):
    """What N subproblems are parts of."""

    on_host: ClassVar[frozenset[str]] = frozenset({"region", "entry", "share"})

    region: npt.NDArray[np.int64]
    entry: npt.NDArray[np.int64]  # numbers in the proof
    share: npt.NDArray[np.float64]  # of the search, halved by every cut (for progress)

    def __getitem__(self, rows: Any) -> Provenance:
        return self.take(rows, rows)


@dataclass(frozen=True, eq=False)
class Subproblems(Rows):
    """Regions of the unsafe set on parts of the root box, with what was found about them."""

    on_host: ClassVar[frozenset[str]] = frozenset({"provenance", "bound"})

    lower: Array  # int32 [N, size of the layout]: bounds of every value that may be cut
    upper: Array
    provenance: Provenance
    mu: Array  # float32 [N, K]
    multipliers: Array  # float32 [N, all of them]
    bound: npt.NDArray[np.float64]  # [N]; a guide
    branch: Array  # int64 [N]: the entry of the layout to cut
    threshold: Array  # int32 [N]: into at most threshold - 1 and at least threshold


Block = TypeVar("Block", bound=Rows)


class Frontier(Generic[Block]):
    """A stack of open subproblems, in blocks.

    The top block is in the machine's memory, and as many of the others as keep what is there within
    `room` bytes (None: all of them).

    Depth first with batches keeps it small: every step takes up to a batch from the top and returns
    at most two children for each. Beyond half of `most` rows, `pop` takes fewer; at a batch of one
    the stack can grow by one row a step at most, along one path of the tree.
    """

    def __init__(self, kernels: Kernels, room: int | None, most: int | None = None) -> None:
        self.blocks: list[Block] = []
        self.size = 0  # rows of all blocks
        self.away = 0  # so many blocks, from the bottom up, are on the host
        self._kernels, self._room, self._most, self._resident = kernels, room, most, 0

    def __len__(self) -> int:
        return self.size

    def push(self, block: Block) -> None:
        """Put a block on top."""
        if not len(block):
            return
        self.blocks.append(block)
        self.size += len(block)
        self._resident += block.bytes()
        while (
            self._room is not None
            and self._resident > self._room
            and self.away < len(self.blocks) - 1
        ):
            self._resident -= self.blocks[self.away].bytes()
            self.blocks[self.away] = self.blocks[self.away].moved(self._kernels.to_host)
            self.away += 1

    def pop_block(self, count: int) -> Block:
        """Take up to `count` subproblems off the top block, its last rows first."""
        block = self.blocks.pop()
        self.size -= len(block)
        if len(self.blocks) < self.away:
            self.away -= 1
            block = block.moved(self._kernels.asarray)
        else:
            self._resident -= block.bytes()
        if len(block) > count:
            rest, top = slice(None, -count), slice(-count, None)
            self.push(block.take(rest, rest))
            block = block.take(top, top)
        return block

    def pop(self, count: int) -> Block:
        """Take `count` subproblems off the top (all, if there are fewer), in the order in which
        they lie; fewer where the stack is large."""
        fullness = 0.0 if self._most is None else self.size / self._most
        if fullness > 0.5:
            count = max(1, int(count * (1.0 - fullness)))
        taken = [self.pop_block(count)]
        count -= len(taken[0])
        while count > 0 and self.blocks:
            taken.append(self.pop_block(count))
            count -= len(taken[-1])
        return type(taken[0]).joined(self._kernels, taken[::-1])
