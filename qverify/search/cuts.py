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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.bounds.dual import Dual, Primal
from qverify.bounds.improve import Objective, Point, evaluate, improve, rounded
from qverify.bounds.unsafe_regions import UnsafeRegions, proved
from qverify.deadline import Deadline
from qverify.kernels import Array
from qverify.ops import Interval
from qverify.ops.relax import GUIDE, NonlinearRelaxation
from qverify.result import Stats
from qverify.search.frontier import Provenance, Subproblems, Waiting
from qverify.search.problem import Candidate, Problem, Relaxed
from qverify.search.proof import Proof

# Rounds and rate of every phase; a phase goes on with what the one before left open.
ROOT = (
    (20, 0.1),
    (150, 0.2),
)
PHASES = ((12, 0.1), (60, 0.2))
# A batch: bytes in all, bytes for each element of a subproblem's values, most subproblems. On a CPU
# what caches hold of one step's arrays; on a GPU the memory of all arrays, hulls in both types and
# columns of convolutions among them (NumPy's take 56 to 161 bytes at their peak).
BATCH = {"cpu": (24 << 20, 64, 256), "cuda": (8 << 30, 256, 4096)}
BATCH_PART = 0.4  # of a GPU's free memory, where that is less
# Bytes of waiting subproblems in a GPU's memory: at most, and this part of what is free.
RESIDENT = (
    16 << 30,
    0.25,
)


@dataclass(frozen=True, eq=False)
class CutLayout:
    """Where the ends of every cut value lie in one flat row: value 0 (the input codes) first."""

    values: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    size: int

    @staticmethod
    def make(dual: Dual, last: int) -> CutLayout:
        values = [0]
        for k, (node, rule) in enumerate(
            zip(dual.network.nodes[:last], dual.rules, strict=False), 1
        ):
            if isinstance(rule, NonlinearRelaxation) and rule.cuts != "none":
                value = node.inputs[0] if rule.cuts == "input" else k
                if value not in values:
                    values.append(value)
        shapes = tuple(dual.network.type_of(v).shape for v in values)
        starts = np.cumsum([0, *(int(np.prod(s, dtype=np.int64)) for s in shapes)])
        return CutLayout(tuple(values), shapes, tuple(int(s) for s in starts[:-1]), int(starts[-1]))

    def part(self, flat: Array, value: int) -> Array:
        """A value's own part of flat rows [N, size]: [N, *shape]."""
        i = self.values.index(value)
        size = int(np.prod(self.shapes[i], dtype=np.int64))
        return flat[:, self.starts[i] : self.starts[i] + size].reshape(len(flat), *self.shapes[i])


@dataclass(eq=False)
class CutSearch:
    """The regions left of one query, over the root box."""

    problem: Problem
    dual: Dual
    cover: UnsafeRegions
    # Bounds of values over the root box [1, *shape], ends of every value.
    known: dict[int, Interval]
    layout: CutLayout
    stats: Stats
    proof: Proof | None
    deadline: Deadline

    def __post_init__(self) -> None:
        kernels = self.problem.kernels
        self.waiting = Waiting(
            kernels, None if kernels.name == "cpu" else kernels.allowance(*RESIDENT)
        )
        self._batch = self._batch_size()
        self._fixed = Dual.fixed([self.known[v] for v in range(len(self.known))])
        self._case = np.zeros(len(self.cover.regions), np.int64)  # of every region
        for k, regions in enumerate(self.cover.cases):
            self._case[list(regions or ())] = k

    @staticmethod
    def make(
        problem: Problem,
        relaxed: Relaxed,
        root: list[Interval],
        stats: Stats,
        proof: Proof | None,
        deadline: Deadline,
    ) -> CutSearch:
        """A search over the root box, whose intervals are `root`."""
        dual, cover = relaxed.dual, relaxed.cover
        layout = CutLayout.make(dual, cover.last)
        return CutSearch(
            problem, dual, cover, dict(enumerate(root)), layout, stats, proof, deadline
        )

    @property
    def open(self) -> int:
        """How many subproblems wait."""
        return len(self.waiting)

    @property
    def open_share(self) -> float:
        """The part of the search that waits, if every cut halves it."""
        return float(sum(nodes.origin.share.sum() for nodes in self.waiting.blocks))

    def _batch_size(self) -> int:
        """How many subproblems fit a batch."""
        widest = sum(int(np.prod(t.type.shape, dtype=np.int64)) for t in self.dual.network.nodes)
        budget, each, most = BATCH[self.problem.kernels.name]
        return int(
            np.clip(self.problem.kernels.allowance(budget, BATCH_PART) // (each * widest), 2, most)
        )

    def root(
        self, origin: Provenance, to_the_end: bool = True
    ) -> tuple[Candidate | None, Provenance]:
        """Bound regions on the root box, group by group, those that look worst first; what is open
        waits. Either to the end, or until a group leaves something open. A counterexample, if one
        is met, and the regions that are left out."""
        xp = self.problem.kernels.xp
        flat = [
            xp.concatenate(
                [self.known[v][end].reshape(1, -1) for v in self.layout.values], axis=1
            ).astype(xp.int32)
            for end in (0, 1)
        ]
        if len(origin) > self._batch:
            origin = origin[np.argsort(-self._at_crown_slopes(origin), kind="stable")]
        found, start = None, 0
        while found is None and start < len(origin) and (to_the_end or not self.open):
            part = origin[start : start + self._batch]
            lower, upper = (xp.repeat(end, len(part), axis=0) for end in flat)
            found, start = self._bound(lower, upper, part, None, None, ROOT), start + len(part)
        return found, origin[start:]

    def _at_crown_slopes(self, origin: Provenance) -> npt.NDArray[np.float64]:
        """What the multipliers to start from make of regions on the root box: [N], a guide."""
        boxes = [self.known[v] for v in range(len(self.known))]
        relaxations, bounds = (
            self.dual.relaxations(boxes, self.cover.last).as_guide(self.dual.kernels),
            [],
        )
        for start in range(0, len(origin), self._batch):
            own = self.cover.objective(
                self.dual, origin[start : start + self._batch].region.tolist()
            ).as_guide()
            point = self._start(boxes, own, None, None)
            evaluate(self.dual, relaxations, own, point)
            bounds.append(self.dual.kernels.to_host(point.bound).astype(np.float64))
        result: npt.NDArray[np.float64] = np.nan_to_num(np.concatenate(bounds))
        return result

    def step(self) -> Candidate | None:
        """Split a batch of subproblems and bound their children; a counterexample, if one is
        met."""
        xp = self.problem.kernels.xp
        nodes = self.waiting.pop(self._batch // 2 or 1)
        rows = xp.arange(len(nodes.origin))
        left, right = nodes.upper.copy(), nodes.lower.copy()
        left[rows, nodes.branch] = nodes.threshold - 1
        right[rows, nodes.branch] = nodes.threshold
        lower, upper = xp.concatenate([nodes.lower, right]), xp.concatenate([left, nodes.upper])
        both = [xp.concatenate([a, a]) for a in (nodes.mu, nodes.multipliers)]
        origin = Provenance(
            np.tile(nodes.origin.region, 2), self._noted(nodes), np.tile(nodes.origin.share / 2, 2)
        )
        return self._bound(lower, upper, origin, both[0], both[1], PHASES)

    def _noted(self, nodes: Subproblems) -> npt.NDArray[np.int64]:
        """Note the cuts in the proof: the entries of the lower children, then of the upper ones."""
        count = len(nodes.origin)
        result = np.zeros(2 * count, np.int64)
        if self.proof is not None:
            branch, threshold = (
                self.dual.kernels.to_host(a) for a in (nodes.branch, nodes.threshold)
            )
            part = np.searchsorted(np.array(self.layout.starts), branch, side="right") - 1
            for i in sorted(set(part.tolist())):
                at = np.flatnonzero(part == i)
                elements = branch[at] - self.layout.starts[i]
                children = self.proof.cut(
                    nodes.origin.entry[at], self.layout.values[i], elements, threshold[at]
                )
                result[at], result[at + count] = children[: len(at)], children[len(at) :]
        return result

    def _boxes(self, lower: Array, upper: Array) -> tuple[list[Interval], Array]:
        """Intervals of every value for flat ends. What only depends on an input box that is still
        the root's is not computed again."""
        clamps = {
            v: (self.layout.part(lower, v), self.layout.part(upper, v))
            for v in self.layout.values[1:]
        }
        x = self.layout.part(lower, 0), self.layout.part(upper, 0)
        whole = bool(((x[0] == self.known[0][0]) & (x[1] == self.known[0][1])).all())
        known = {v: self.known[v] for v in self._linear_in_input()} if whole else None
        return self.dual.network.boxes(self.dual.kernels, *x, clamps, known)

    def _linear_in_input(self) -> list[int]:
        """Values that no cut can tighten, other than a cut on an input."""
        free = {0}
        for k, (node, rule) in enumerate(
            zip(self.dual.network.nodes, self.dual.rules, strict=True), 1
        ):
            if not isinstance(rule, NonlinearRelaxation) and set(node.inputs) <= free:
                free.add(k)
        return sorted(free - {0})

    def _bound(
        self,
        lower: Array,
        upper: Array,
        origin: Provenance,
        mu: Array | None,
        multipliers: Array | None,
        phases: Sequence[tuple[int, float]],
    ) -> Candidate | None:
        """Bound subproblems, all of the root box where no multipliers are given; the open ones are
        pushed, with what to cut next."""
        kernels, dual = self.problem.kernels, self.dual
        self.stats.subproblems += len(origin)
        alike = mu is None
        some = slice(1 if alike else None)
        boxes, possible = self._boxes(lower[some], upper[some])
        if self.problem.watch is not None:
            self.problem.watch.parts(self._ends(lower[some], upper[some]), boxes, possible)
        refuted = self.problem.refuted_by(boxes)[
            0 if alike else np.arange(len(origin)), self._case[origin.region]
        ]
        if self.problem.watch is not None:
            self._watched(lower, upper, origin.region, kernels.asarray(refuted))
        left = kernels.to_host(possible) & ~refuted
        if not left.all():
            keep = np.flatnonzero(left)
            self.stats.proved += len(origin) - len(keep)
            if self.proof is not None:
                self.proof.close(origin.entry[~left])
            if not len(keep):
                return None
            at = kernels.asarray(keep)
            lower, upper, origin = lower[at], upper[at], origin[keep]
            boxes = boxes if alike else [(a[at], b[at]) for a, b in boxes]
            if mu is not None and multipliers is not None:
                mu, multipliers = mu[at], multipliers[at]
        objective = self.cover.objective(dual, origin.region.tolist())
        point = self._start(boxes, objective.as_guide(), mu, multipliers)
        exact = dual.relaxations(boxes, self.cover.last)
        for rounds, rate in phases:
            guide = exact.as_guide(kernels)
            point = improve(
                dual,
                guide,
                objective.as_guide(),
                point,
                rounds,
                rate,
                self.deadline,
                fixed=self._fixed,
            )
            done, precision = proved(dual, exact, objective, point, self.cover.precision())
            self._watched(lower, upper, origin.region, done)
            closed = kernels.to_host(done)
            self._refuted(origin.entry, np.flatnonzero(closed), point, precision)
            keep = np.flatnonzero(~closed)
            self.stats.proved += len(origin) - len(keep)
            if not len(keep):
                return None
            at = kernels.asarray(keep)
            lower, upper, origin = lower[at], upper[at], origin[keep]
            exact, objective, point = exact.take(at), objective.take(at), point.take(at)
        guide = exact.as_guide(kernels)
        primal = evaluate(dual, guide, objective.as_guide(), point)
        boxes = [
            tuple(kernels.xp.broadcast_to(a, (len(origin), *a.shape[1:])) for a in own)
            for own in exact.boxes
        ]
        return self._push(lower, upper, origin, boxes, point, primal)

    def _ends(self, lower: Array, upper: Array) -> dict[int, Interval]:
        """Flat ends as the ends of every cut value."""
        return {
            v: (self.layout.part(lower, v), self.layout.part(upper, v)) for v in self.layout.values
        }

    def _watched(
        self, lower: Array, upper: Array, region: npt.NDArray[np.int64], done: Array
    ) -> None:
        """Hold the subproblems refuted, `done` [N], against the watched point, if there is one."""
        if self.problem.watch is not None:
            ends = self._ends(lower[done], upper[done])
            self.problem.watch.refuted(self.cover, region[self.dual.kernels.to_host(done)], ends)

    def _refuted(
        self, entry: npt.NDArray[np.int64], rows: Any, point: Point, precision: int
    ) -> None:
        """Note what refuted some of the subproblems."""
        if self.proof is None or not len(rows):
            return
        mu, multipliers = rounded(self.dual, point.take(self.dual.kernels.asarray(rows)), precision)
        self.proof.columns = [(k, int(m[0].size)) for k, m in multipliers.items()]
        mu, *host = (
            self.dual.kernels.to_host(m).reshape(len(rows), -1) for m in (mu, *multipliers.values())
        )
        flat = np.concatenate([np.zeros((len(rows), 0), np.int64), *host], axis=1)
        for i, row in enumerate(rows):
            self.proof.refute(int(entry[row]), mu[i], flat[i])

    def _start(
        self, boxes: list[Interval], objective: Objective, mu: Array | None, flat: Array | None
    ) -> Point:
        """The parent's multipliers, or edges of the hulls."""
        xp = self.dual.kernels.xp
        n, count = objective.constants.shape
        if mu is None or flat is None:
            mu = xp.zeros((n, count), dtype=GUIDE)
            mu[:, 0] = 1
            multipliers = self.dual.crown_multipliers(boxes, objective.weights(mu))
            self._sizes = {k: tuple(m.shape[1:]) for k, m in multipliers.items()}
            return Point(mu, multipliers, xp.full(n, xp.inf))
        multipliers, start = {}, 0
        for k, shape in self._sizes.items():
            size = int(np.prod(shape, dtype=np.int64))
            multipliers[k] = flat[:, start : start + size].reshape(n, *shape)
            start += size
        return Point(mu, multipliers, xp.full(n, xp.inf))

    def _push(
        self,
        lower: Array,
        upper: Array,
        origin: Provenance,
        boxes: list[Interval],
        point: Point,
        primal: Primal,
    ) -> Candidate | None:
        """Keep open subproblems, easiest last, with what to cut in each; try the maximizers as
        counterexamples."""
        kernels, xp = self.problem.kernels, self.problem.kernels.xp
        n = len(origin)
        # None: an op without a rule stands between
        codes = boxes[0][0] if primal.codes is None else primal.codes[:, 0]
        found = self._try(codes.astype(xp.int32))
        if found is not None:
            return found
        branch, threshold, possible = self._choose(lower, upper, boxes, point, primal)
        bound = kernels.to_host(point.bound)
        none = xp.zeros((n, 0), dtype=GUIDE)
        flat = xp.concatenate(
            [none, *(m.reshape(n, -1) for m in point.multipliers.values())], axis=1
        )
        nodes = Subproblems(lower, upper, origin, point.mu, flat, bound, branch, threshold)
        if self.problem.watch is not None and not self.problem.undecided:
            self.problem.watch.safe(self._ends(lower[~possible], upper[~possible]))
        divisible = kernels.to_host(possible)
        left = np.flatnonzero(divisible)
        # Single code vectors: tried above, and no counterexample.
        self.stats.leaves += n - len(left)
        if self.proof is not None:
            self.proof.close(origin.entry[~divisible])
        if len(left):
            order = left[np.argsort(-bound[left], kind="stable")]
            self.waiting.push(nodes.take(order, kernels.asarray(order)))
        return None

    def _try(self, codes: Array) -> Candidate | None:
        """Evaluate code vectors exactly."""
        problem = self.problem
        self.stats.attack_points += len(codes)
        return problem.find_unsafe(codes, problem.evaluate(codes))

    @np.errstate(over="ignore", invalid="ignore")
    def _choose(
        self,
        lower: Array,
        upper: Array,
        boxes: list[Interval],
        point: Point,
        primal: Primal,
    ) -> tuple[Array, Array, Array]:
        """What to cut: the entry, the threshold, and whether anything can be cut, each [N].

        The neuron where cutting the node loose gains most: by how much the bound takes it to exceed
        what it gives at its argument, followed from the earlier maximizers and averaged over the
        last steps. Where no neuron gains, the input with the largest share of the bound.
        """
        xp, dual = self.dual.kernels.xp, self.dual
        n = len(lower)
        score = xp.full((n, self.layout.size), -xp.inf)
        threshold = xp.zeros((n, self.layout.size), dtype=xp.int32)
        for k, y in primal.y.items():
            rule = dual.rules[k - 1]
            if not isinstance(rule, NonlinearRelaxation) or rule.cuts == "none":
                continue
            node = dual.network.nodes[k - 1]
            inputs = tuple(boxes[i] for i in node.inputs)
            # Absent where no step was made.
            z = (point.arguments[k] if k in point.arguments else primal.z[k])[:, 0]
            spot = xp.rint(z).astype(xp.int32)
            w, m = primal.w[k][:, 0], point.multipliers[k][:, 0]
            passed = m * (z - primal.z[k][:, 0])
            gap = w * (y[:, 0] - rule.value(dual.kernels, node.op.run, spot))
            gap = xp.nan_to_num(gap + (passed.sum(axis=-1) if rule.whole else passed))
            t, possible = rule.cut(dual.kernels, spot, inputs, boxes[k])
            value = node.inputs[0] if rule.cuts == "input" else k
            start = self.layout.starts[self.layout.values.index(value)]
            size = int(np.prod(t.shape[1:], dtype=np.int64))
            score[:, start : start + size] = xp.where(possible, gap, -xp.inf).reshape(n, size)
            threshold[:, start : start + size] = t.reshape(n, size)
        best = score.argmax(axis=1)
        rows = xp.arange(n)
        t = threshold[rows, best]
        width = self.layout.part(upper, 0) - self.layout.part(lower, 0)
        # A part with one code vector is the only leaf, whatever the floats say, and whatever a band
        # leaves to be cut in it: the vector was evaluated, or the runtime asked.
        wide = (width > 0).any(axis=1)
        own = wide & (score[rows, best] <= 0)
        if dual.kernels.name != "cpu" or own.any():  # a GPU does not wait to be asked
            pull = (
                xp.nan_to_num(xp.abs(primal.pull[:, 0]))
                if primal.pull is not None
                else xp.ones(width.shape)
            )
            share = xp.where(width > 0, width * (pull.astype(xp.float64) + 1e-9), -1.0)
            variable = share.argmax(axis=1)
            best = xp.where(own, variable, best)
            t = xp.where(own, lower[rows, variable] + (width[rows, variable] + 1) // 2, t)
        return best, t.astype(xp.int32), wide
