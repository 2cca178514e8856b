"""The tree of a query's proof: read and held against what a tree is, then walked leaf by leaf.

The walk keeps one box and changes one end of it per step down, and puts it back on the way up. So
its time and memory grow with the number of entries times the size of the values that are cut,
however deep the tree is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qverify.checker.archive import Archive
from qverify.checker.ops import Interval, Ints, reach
from qverify.errors import Rejected

CUT, CLOSED, REGIONS, DUAL = range(4)  # kinds of entries
BEYOND = 2**40  # all values


@dataclass(frozen=True)
class Leaves:
    """Some leaves in the order of the walk: their entries, the regions that they are about (-1:
    all), and the bounds that cuts give values, each [N, size]."""

    entries: Ints
    region: Ints
    cuts: dict[int, Interval]

    def take(self, rows: Ints) -> Leaves:
        """Some of them."""
        cuts = {v: (low[rows], high[rows]) for v, (low, high) in self.cuts.items()}
        return Leaves(self.entries[rows], self.region[rows], cuts)


class Tree:
    """The arrays of a tree over values of the given sizes; `regions` is how many the property has.
    Rejected unless every entry but the first is the child of one earlier entry."""

    def __init__(self, archive: Archive, name: str, sizes: Ints, regions: int) -> None:
        self.kind = archive.array(f"{name}kind", None)
        self.sizes, count = sizes, len(self.kind)
        self.first, self.value, self.element, self.threshold, self.data = (
            archive.array(name + part, count)
            for part in ("first", "value", "element", "threshold", "data")
        )
        if (
            not count
            or self.kind.min() < 0
            or self.kind.max() > DUAL
            or (self.kind[1:] == REGIONS).any()
        ):
            raise Rejected("its tree has an entry of no kind, or regions below the root")
        self.regions = np.zeros(0, np.int64)
        if self.parted:
            self.regions = archive.array(f"{name}regions", None)
        elif (self.kind == DUAL).any():
            raise Rejected("its tree has an entry about no region that is closed by multipliers")
        if len(self.regions) and not 0 <= self.regions.min() <= self.regions.max() < regions:
            raise Rejected("its tree names a region that the property does not have")
        self._check_children()

    @property
    def parted(self) -> bool:
        """Whether the root's children stand for regions."""
        return bool(self.kind[0] == REGIONS)

    def _check_children(self) -> None:
        count, cuts = len(self.kind), np.flatnonzero(self.kind == CUT)
        top = np.arange(len(self.regions))  # the root's children, where they stand for regions
        first = self.first[cuts]
        if (
            (first <= cuts).any()
            or (first >= count - 1).any()
            or (len(top) and not 0 < self.first[0] <= count - len(top))
        ):
            raise Rejected("a child in its tree does not exist, or comes before its parent")
        children = np.concatenate([first, first + 1, self.first[0] + top])
        if (np.bincount(children, minlength=count) != (np.arange(count) > 0)).any():
            raise Rejected("its tree is not a tree: an entry has no parent, or two")
        value, element = self.value[cuts], self.element[cuts]
        if ((value < 0) | (value >= len(self.sizes))).any() or (
            (element < 0) | (element >= self.sizes[value])
        ).any():
            raise Rejected("a cut is on an element that the network does not have")
        if reach(self.threshold[cuts]) >= BEYOND:
            raise Rejected("a cut is beyond all values")

    def leaves(self, kind: int, most: int) -> Iterator[Leaves]:
        """All leaves of a kind, depth first, the first child first, at most `most` at a time."""
        values = np.unique(self.value[self.kind == CUT])
        starts = dict(
            zip(values.tolist(), np.cumsum([0, *self.sizes[values]]).tolist(), strict=False)
        )
        total = int(self.sizes[values].sum())
        # What the cuts above the entry leave of every value.
        box = np.full(total, -BEYOND), np.full(total, BEYOND)
        held: list[tuple[int, int]] = []
        low, high = (np.empty((most, total), np.int64) for _ in range(2))

        def joined() -> Leaves:
            n = len(held)
            cuts: dict[int, Interval] = {}
            for v, a in starts.items():
                bounds = low[:n, a : a + self.sizes[v]], high[:n, a : a + self.sizes[v]]
                if bounds[0].max() > -BEYOND or bounds[1].min() < BEYOND:
                    cuts[v] = bounds[0].copy(), bounds[1].copy()
            entries, region = np.array(held, np.int64).reshape(n, 2).T
            held.clear()
            return Leaves(entries, region, cuts)

        for entry, region in self._walk(starts, box):
            if self.kind[entry] == kind:
                low[len(held)], high[len(held)] = box
                held.append((entry, region))
                if len(held) == most:
                    yield joined()
        if held:
            yield joined()

    def _walk(self, starts: dict[int, int], box: Interval) -> Iterator[tuple[int, int]]:
        """Every leaf and its region, while `box` is cut to it."""
        kind, first = self.kind.tolist(), self.first.tolist()
        # Entry, region, side (-1: none), place, end.
        stack: list[tuple[int, int, int, int, int]] = [(0, -1, -1, 0, 0)]
        while stack:
            entry, region, side, place, end = stack.pop()
            if side >= 0:
                bounds_of_side = box[side]
                before = int(bounds_of_side[place])
                bounds_of_side[place] = end
                if entry < 0:  # the end was only put back
                    continue
                if (end < before) == (side == 0):  # the cut above leaves less already
                    bounds_of_side[place] = before
                stack.append((-1, -1, side, place, before))
            if kind[entry] == REGIONS:
                stack += [
                    (first[0] + i, int(r), -1, 0, 0)
                    for i, r in reversed(list(enumerate(self.regions)))
                ]
            elif kind[entry] == CUT:
                place = starts[int(self.value[entry])] + int(self.element[entry])
                threshold = int(self.threshold[entry])
                stack.append((first[entry] + 1, region, 0, place, threshold))
                stack.append((first[entry], region, 1, place, threshold - 1))
            else:
                yield entry, region
