"""Branch and bound on neurons: one region of the unsafe set at a time, refuted by the dual, split
by integer cuts.

A subproblem is a region, an interval for every cut value (input codes, accumulators, ...), and the
multipliers it starts from. It is closed when its intervals hold no point, or when the dual refutes
the region on it in exact integers. Otherwise one interval is parted into at most t - 1 and at least
t.

Sound: both parts together are the whole; bounds that hold in the root box hold in each of its
parts.

Complete (the lemma): every split parts an interval of at least two integers into two that are not
empty, and the intervals of a subproblem are finite in number and size. A subproblem that no neuron
can be cut in is split on an input code. A single code vector is not split any more: the region is
refuted there, or the vector is decided by the leaf rule (`boundary/leaves.py`): it is a
counterexample, or it is safe. So every path ends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qverify.bounds.dual import Dual, Primal
from qverify.bounds.improve import Objective, Point, evaluate, improve
from qverify.kernels import Array
from qverify.ops import Interval
from qverify.ops.relax import GUIDE, NonlinearRelaxation
from qverify.search import memory
from qverify.search.bounds import (
    INTERVALS,
    OPTIMIZED,
    ROOT_PHASES,
    Boxes,
    Optimized,
    Phases,
    region_guesses,
    rounded_rows,
)
from qverify.search.branch import Branching, Cut, CutLayout, NeuronView, halves
from qverify.search.frontier import Frontier, Provenance, Subproblems
from qverify.search.knowledge import Relaxed
from qverify.search.problem import BoolArray, Candidate
from qverify.search.run import Found, Run

PHASES: Phases = ((12, 0.1), (60, 0.2))  # of a part; the root's are longer
GLANCE = 6, 0.1  # of the parts of a cut that is considered
LONG = 400, 0.3  # of a part of a hard query
# Subproblems bounded so far from which on it pays to compare cuts, and to add the long phase.
FILTERED, HARD = 16, 64
IntArray = npt.NDArray[np.int64]


@dataclass(eq=False)
class NeuronCuts:
    """The open regions of a query on parts of the root box, whose intervals are `root_values`."""

    run: Run
    rule: Branching[NeuronView]
    relaxed: Relaxed
    root_values: list[Interval]  # bounds of every value over the root box, [1, *shape] pairs
    frontier: Frontier[Subproblems] = field(init=False)

    def __post_init__(self) -> None:
        kernels, cover = self.run.problem.kernels, self.relaxed.regions
        self.frontier = memory.cut_frontier(kernels)
        self.layout = CutLayout.make(self.relaxed.dual, cover.last)
        self._batch = self._batch_size()
        self._fixed = Dual.fixed(self.root_values)
        self._bounded = 0  # subproblems so far
        self._sizes: dict[int, tuple[int, ...]] = {}  # of every node's multipliers
        self._case = np.zeros(len(cover.regions), np.int64)  # of every region
        for k, regions in enumerate(cover.cases):
            self._case[list(regions or ())] = k

    @staticmethod
    def make(run: Run, rule: Branching[NeuronView], relaxed: Relaxed) -> NeuronCuts:
        """A search with the bounds of intermediate values that are known by now."""
        boxes = Boxes(*run.problem.root)
        return NeuronCuts(run, rule, relaxed, boxes.intervals(run.known))

    def _batch_size(self) -> int:
        """How many subproblems fit a batch."""
        return memory.subproblem_batch(self.run.problem.kernels, self.relaxed.dual.network)

    @property
    def open(self) -> int:
        """How many subproblems wait."""
        return len(self.frontier)

    @property
    def share(self) -> float:
        """The part of the search that is done, if every cut halves what is left."""
        return 1.0 - float(sum(block.provenance.share.sum() for block in self.frontier.blocks))

    # -- the root box ------------------------------------------------------------------------------

    def root(
        self, provenance: Provenance, to_the_end: bool = True
    ) -> tuple[Found | None, Provenance]:
        """Bound regions on the root box, group by group, those that look worst first; what is open
        waits. Either to the end, or until a group leaves something open. A counterexample, if one
        is met, and the regions that are left out."""
        xp = self.run.problem.kernels.xp
        lower, upper = (
            xp.concatenate(
                [self.root_values[v][i].reshape(1, -1) for v in self.layout.values], axis=1
            ).astype(xp.int32)
            for i in (0, 1)
        )
        if len(provenance) > self._batch:
            guesses = region_guesses(self.relaxed, self.root_values, provenance.region, self._batch)
            provenance = provenance[np.argsort(-guesses, kind="stable")]
        found, start = None, 0
        while found is None and start < len(provenance) and (to_the_end or not self.open):
            group = provenance[start : start + self._batch]
            low, high = (xp.repeat(bound, len(group), axis=0) for bound in (lower, upper))
            found = self._bound(low, high, group, None, ROOT_PHASES)
            start += len(group)
        return found, provenance[start:]

    # -- a step ------------------------------------------------------------------------------------

    def step(self) -> Found | None:
        """Split a batch of subproblems and bound their children; a counterexample, if one is
        met."""
        if (attacked := self.run.attack_round()) is not None:
            return attacked
        xp = self.run.problem.kernels.xp
        parents = self.frontier.pop_block(self._batch // 2 or 1)
        cut = Cut(parents.branch, parents.threshold, xp.ones(len(parents), dtype=xp.bool_))
        lower, upper = halves(self.run.problem.kernels, parents.lower, parents.upper, cut)
        mu, multipliers = (xp.concatenate([a, a]) for a in (parents.mu, parents.multipliers))
        provenance = Provenance(
            np.tile(parents.provenance.region, 2),
            self._noted(parents),
            np.tile(parents.provenance.share / 2, 2),
        )
        phases = PHASES if self._bounded < HARD else (*PHASES, LONG)
        return self._bound(lower, upper, provenance, (mu, multipliers), phases)

    def _noted(self, parents: Subproblems) -> IntArray:
        """Tell the observer of the cuts: the entries of the lower children, then of the upper
        ones."""
        observer, count = self.run.observer, len(parents)
        children = np.zeros(2 * count, np.int64)
        if observer.proof is None:
            return children
        to_host = self.run.problem.kernels.to_host
        branch, threshold = to_host(parents.branch), to_host(parents.threshold)
        part = np.searchsorted(np.array(self.layout.starts), branch, side="right") - 1
        for i in sorted(set(part.tolist())):
            at = np.flatnonzero(part == i)
            both = observer.cut(
                parents.provenance.entry[at],
                self.layout.values[i],
                branch[at] - self.layout.starts[i],
                threshold[at],
            )
            children[at], children[at + count] = both[: len(at)], both[len(at) :]
        return children

    def _bound(
        self,
        lower: Array,
        upper: Array,
        provenance: Provenance,
        start: tuple[Array, Array] | None,
        phases: Phases,
    ) -> Found | None:
        """Bound subproblems, flat bounds [N, layout.size], from multipliers `start` (mu, and all
        others flat; None: they are all of the root box). The open ones wait, with what to cut
        next."""
        run, kernels = self.run, self.run.problem.kernels
        run.observer.bounded(len(provenance))
        self._bounded += len(provenance)
        alike = start is None
        some = slice(1 if alike else None)
        values, possible = self._values(lower[some], upper[some])
        refuted = self._by_intervals(values, provenance, alike)
        run.observer.propagated(
            lambda: self.layout.split((lower[some], upper[some])), values, possible
        )
        self._emptied(lower, upper, provenance.region, refuted)
        left = kernels.to_host(possible) & ~refuted
        run.observer.closed(provenance.entry[~left])
        if not left.any():
            return None
        if not left.all():
            at = kernels.asarray(np.flatnonzero(left))
            lower, upper, provenance = lower[at], upper[at], provenance[left]
            values = values if alike else [(a[at], b[at]) for a, b in values]
            start = None if start is None else (start[0][at], start[1][at])

        def closed(rows: IntArray, at: IntArray, point: Point, precision: int) -> None:
            """Some are refuted by multipliers: `rows` of them, rows `at` of the point."""
            mask = np.zeros(len(provenance), np.bool_)
            mask[rows] = True
            self._emptied(lower, upper, provenance.region, mask)
            entries = provenance.entry[rows]
            dual = self.relaxed.dual
            run.observer.refuted(entries, lambda: rounded_rows(dual, point, at, precision))

        optimized = OPTIMIZED.improve(
            self.relaxed,
            values,
            provenance.region,
            None if start is None else self._point(*start),
            phases,
            run.deadline,
            self._fixed,
            closed,
        )
        if optimized is None:
            return None
        at = kernels.asarray(optimized.rows)
        return self._push(lower[at], upper[at], provenance[optimized.rows], optimized)

    def _values(self, lower: Array, upper: Array) -> tuple[list[Interval], Array]:
        """Intervals of every value for flat bounds, and whether they hold a point [N]. What only
        depends on an input box that is still the root's is not computed again."""
        dual, bounds = self.relaxed.dual, self.layout.split((lower, upper))
        codes = bounds.pop(0)
        root = self.root_values[0]
        whole = bool(((codes[0] == root[0]) & (codes[1] == root[1])).all())
        known = {v: self.root_values[v] for v in self._linear_in_input} if whole else None
        return dual.network.boxes(dual.kernels, *codes, bounds, known)

    @functools.cached_property
    def _linear_in_input(self) -> list[int]:
        """Values that no cut can tighten, other than a cut on an input."""
        dual, free = self.relaxed.dual, {0}
        for k, (node, rule) in enumerate(zip(dual.network.nodes, dual.rules, strict=True), 1):
            if not isinstance(rule, NonlinearRelaxation) and set(node.inputs) <= free:
                free.add(k)
        return sorted(free - {0})

    def _by_intervals(
        self,
        values: list[Interval],
        provenance: Provenance,
        alike: bool,
    ) -> BoolArray:
        """Which subproblems intervals refute, [N]: those whose region's case they refute."""
        run = self.run
        boxes = Boxes(*values[0], values=values)
        asked = run.all_cases(len(boxes))
        cases = INTERVALS.refute(run.known, boxes, asked, run.deadline).cases
        rows = 0 if alike else np.arange(len(provenance))
        found: BoolArray = cases[rows, self._case[provenance.region]]
        return found

    def _emptied(self, lower: Array, upper: Array, region: IntArray, refuted: BoolArray) -> None:
        """Tell the observer which subproblems are refuted, [N]."""

        def parts() -> dict[int, Interval]:
            at = self.run.problem.kernels.asarray(np.flatnonzero(refuted))
            return self.layout.split((lower[at], upper[at]))

        self.run.observer.emptied(self.relaxed.regions, region[refuted], parts)

    def _point(self, mu: Array, flat: Array) -> Point:
        """A parent's multipliers [N, all of them] as a point to start from."""
        xp, multipliers, start = self.run.problem.kernels.xp, {}, 0
        for k, shape in self._sizes.items():
            size = int(np.prod(shape, dtype=np.int64))
            multipliers[k] = flat[:, start : start + size].reshape(len(mu), *shape)
            start += size
        return Point(mu, multipliers, xp.full(len(mu), xp.inf))

    # -- what stays open ---------------------------------------------------------------------------

    def _push(
        self, lower: Array, upper: Array, provenance: Provenance, optimized: Optimized
    ) -> Found | None:
        """Keep open subproblems, easiest last, with what to cut in each; try the maximizers as
        counterexamples."""
        run, dual, point = self.run, self.relaxed.dual, optimized.point
        kernels, xp, n = dual.kernels, dual.kernels.xp, len(provenance)
        guide = optimized.relaxations.as_guide(kernels), optimized.objective.as_guide()
        primal = evaluate(dual, *guide, point)
        values: list[Interval] = [
            (xp.broadcast_to(a, (n, *a.shape[1:])), xp.broadcast_to(b, (n, *b.shape[1:])))
            for a, b in optimized.relaxations.boxes
        ]
        found = self._try(primal, values)
        if found is not None:
            return Found(found, "found by the search")
        view = NeuronView(
            dual,
            self.layout,
            lower,
            upper,
            values,
            point,
            primal,
            None
            if self._bounded < FILTERED
            else lambda cut: self._look_ahead(lower, upper, guide[1], point, cut),
        )
        cut = self.rule.choose(view)
        open_ = self._waiting(lower, upper, provenance, point, cut)
        if not run.known.undecided:
            single = ~cut.possible
            run.observer.safe(lambda: self.layout.split((lower[single], upper[single])))
        divisible = kernels.to_host(cut.possible)
        left = np.flatnonzero(divisible)
        run.observer.decided(n - len(left))  # single code vectors: tried, and no counterexample
        run.observer.closed(provenance.entry[~divisible], proved=False)
        if len(left):
            order = left[np.argsort(-open_.bound[left], kind="stable")]
            self.frontier.push(open_.take(order, kernels.asarray(order)))
        return None

    def _waiting(
        self, lower: Array, upper: Array, provenance: Provenance, point: Point, cut: Cut
    ) -> Subproblems:
        """Subproblems as they wait, their multipliers in one flat row each."""
        kernels, n = self.run.problem.kernels, len(provenance)
        self._sizes = {k: tuple(m.shape[1:]) for k, m in point.multipliers.items()}
        none = kernels.xp.zeros((n, 0), dtype=GUIDE)
        flat = [none, *(m.reshape(n, -1) for m in point.multipliers.values())]
        return Subproblems(
            lower,
            upper,
            provenance,
            point.mu,
            kernels.xp.concatenate(flat, axis=1),
            kernels.to_host(point.bound),
            cut.entry,
            cut.threshold,
        )

    def _look_ahead(
        self, lower: Array, upper: Array, objective: Objective, point: Point, cut: Cut
    ) -> tuple[Array, Array]:
        """Bounds of both parts of every subproblem, [N] each, after a few steps: a guide. Rows
        without a cut stay whole."""
        dual, xp, n = self.relaxed.dual, self.run.problem.kernels.xp, len(lower)
        whole = ~xp.concatenate([cut.possible, cut.possible])
        low, high = halves(dual.kernels, lower, upper, cut)
        low = xp.where(whole[:, None], xp.concatenate([lower, lower]), low)
        high = xp.where(whole[:, None], xp.concatenate([upper, upper]), high)
        values, possible = self._values(low, high)
        twice = xp.concatenate([xp.arange(n), xp.arange(n)])
        relaxations = dual.relaxations(values, self.relaxed.regions.last).as_guide(dual.kernels)
        found = improve(
            dual,
            relaxations,
            objective.take(twice),
            point.take(twice),
            *GLANCE,
            self.run.deadline,
            fixed=self._fixed,
        )
        bound = xp.where(possible, found.bound, -xp.inf)
        return bound[:n], bound[n:]

    def _try(self, primal: Primal, values: list[Interval]) -> Candidate | None:
        """Evaluate the codes where the maxima were taken, exactly."""
        run, xp = self.run, self.run.problem.kernels.xp
        # None: an op without a rule stands between.
        codes = values[0][0] if primal.codes is None else primal.codes[:, 0]
        codes = codes.astype(xp.int32)
        run.observer.tried(len(codes))
        return run.known.find_unsafe(codes, run.problem.evaluate(codes))
