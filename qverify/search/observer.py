"""The one observer of a search: statistics, progress, the proof, and a watched point.

The search says what it does, once; whoever wants to know it (a certificate, a terminal, a debugging
aid) is told here. No verdict depends on it; with a watched point the search never seeks less, so
that every pruning can be held against the point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.bounds.unsafe_regions import UnsafeRegions
from qverify.deadline import Deadline
from qverify.kernels import Array, Kernels
from qverify.ops import Interval
from qverify.result import Progress, Stats
from qverify.search.proof import Proof
from qverify.search.watch import Watch

IntArray = npt.NDArray[np.int64]


@dataclass(eq=False)
class Observer:
    """Hears what a search bounds, closes, splits and tries.

    `entries` are numbers of subproblems in the proof; without one they are all 0. With a watched
    point, whatever takes it away raises SoundnessError here.
    """

    kernels: Kernels
    stats: Stats
    deadline: Deadline
    proof: Proof | None = None
    report: Callable[[Progress], None] | None = None
    watch: Watch | None = None  # an input that nothing may lose, for debugging
    open: int = 1  # subproblems that wait
    share: float = 0.0  # of the search that is done

    def bounded(self, count: int) -> None:
        """So many subproblems are being bounded."""
        self.stats.subproblems += count

    def tried(self, count: int) -> None:
        """So many points were tried as counterexamples."""
        self.stats.attack_points += count

    def decided(self, count: int) -> None:
        """So many single code vectors were decided."""
        self.stats.leaves += count

    def closed(self, entries: IntArray, proved: bool = True) -> None:
        """Subproblems are closed: by bounds (`proved`), or since they hold no unsafe point."""
        self.stats.proved += len(entries) if proved else 0
        if self.proof is not None:
            self.proof.close(entries)

    def refuted(
        self, entries: IntArray, evidence: Callable[[], tuple[IntArray, IntArray, Any]]
    ) -> None:
        """Subproblems are refuted by multipliers: `evidence` gives their mu, their multipliers and
        the columns, if anybody asks."""
        self.stats.proved += len(entries)
        if self.proof is None or not len(entries):
            return
        mu, multipliers, self.proof.columns = evidence()
        for entry, one, row in zip(entries.tolist(), mu, multipliers, strict=True):
            self.proof.refute(entry, one, row)

    def parted(self, regions: Sequence[int]) -> IntArray:
        """The root box is searched once for each region: their entries."""
        if self.proof is None:
            return np.zeros(len(regions), np.int64)
        return self.proof.part(regions)

    def cut(
        self, entries: IntArray, value: int, elements: IntArray, thresholds: IntArray
    ) -> IntArray:
        """Subproblems are cut, each at an element of one value: the entries of the lower children,
        then of the upper ones."""
        if self.proof is None:
            return np.zeros(2 * len(entries), np.int64)
        return self.proof.cut(entries, value, elements, thresholds)

    # -- what a watched point is held against ------------------------------------------------------

    def ruled_out(self, lower: Array, upper: Array, cases: npt.NDArray[np.bool_], by: str) -> None:
        """Cases [N, cases] are refuted on boxes of codes [N, codes]."""
        if self.watch is not None:
            self.watch.boxes(lower, upper, cases, by)

    def compiled(self, regions: UnsafeRegions) -> None:
        """The cases are covered by regions."""
        if self.watch is not None:
            self.watch.regions(regions)

    def tightened(self, bounds: Mapping[int, Interval]) -> None:
        """Values have tighter bounds in the whole root box."""
        if self.watch is not None:
            self.watch.bounds(bounds, "intermediate bounds")

    def propagated(
        self, parts: Callable[[], Mapping[int, Interval]], values: list[Interval], possible: Array
    ) -> None:
        """Subproblems, given by the bounds that cuts left, have these intervals of all values."""
        if self.watch is not None:
            self.watch.parts(parts(), values, possible)

    def emptied(
        self,
        regions: UnsafeRegions,
        numbers: IntArray,
        parts: Callable[[], Mapping[int, Interval]],
    ) -> None:
        """Regions, by number [N], hold no point of subproblems."""
        if self.watch is not None:
            self.watch.refuted(regions, numbers, parts())

    def safe(self, parts: Callable[[], Mapping[int, Interval]]) -> None:
        """Single code vectors were evaluated, and none is unsafe."""
        if self.watch is not None:
            self.watch.safe(parts())

    # -- how far it is -----------------------------------------------------------------------------

    def forget_proof(self) -> None:
        """There will be no certificate."""
        self.proof = None

    def progress(self, open_: int, share: float) -> None:
        """So many subproblems are open, and about this share of the search is done."""
        self.stats.max_open = max(self.stats.max_open, open_)
        self.open, self.share = open_, min(max(share, 0.0), 1.0)  # sums of shares are rounded
        if self.report is not None:
            seconds = self.deadline.elapsed()
            self.report(Progress(seconds, self.stats.subproblems, open_, self.share))
