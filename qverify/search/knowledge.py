"""What a search knows of its query so far: bounds that hold in the whole box, learned conditions,
and doubts.

A doubt is a code vector that readings of the property judge differently. Once there is one, the
answer is `unknown` unless there is a counterexample, so from then on only what every reading calls
unsafe is sought, and what was known of the other cases is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from qverify.bounds.dual import Dual
from qverify.bounds.intermediate import IntermediateBounds, crown_bounds, optimized_bounds
from qverify.bounds.unsafe import CERTAIN, REFUTED, Unsafe
from qverify.bounds.unsafe_regions import UnsafeRegions, make_unsafe_regions
from qverify.deadline import Deadline, looking
from qverify.errors import Undecided
from qverify.kernels import Array
from qverify.ops import Interval
from qverify.ops.relax import NonlinearRelaxation
from qverify.ops.table import PairwiseRelaxation
from qverify.search.joint import Joint
from qverify.search.observer import Observer
from qverify.search.problem import BoolArray, Candidate, Float64Array, Problem
from qverify.search.proof import Proof


@dataclass(frozen=True, eq=False)
class Relaxed:
    """What backward bounds need: the rules, the cases as regions, and bounds of intermediate values
    that hold in the whole root box."""

    dual: Dual
    regions: UnsafeRegions
    intermediate: IntermediateBounds | None  # None: intervals are all there is yet

    @property
    def clamps(self) -> dict[int, Interval]:
        """Bounds of intermediate values, by value."""
        return {} if self.intermediate is None else self.intermediate.clamps


@dataclass(eq=False)
class Knowledge:
    """What is known of a problem while it is searched."""

    problem: Problem
    observer: Observer | None = None  # hears what is found out; None: nobody does
    certified: bool = False  # whether a checker has to find every bound again
    undecided: str = ""  # why some code vector could be neither confirmed nor ruled out
    sought: Unsafe = field(init=False)  # what counterexamples are sought in
    narrowed: bool = field(default=False, init=False)
    _relaxed: Relaxed | None = field(default=None, init=False, repr=False)
    _hopeless: bool = field(default=False, init=False, repr=False)  # no case can be expressed
    _joint: Joint | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.sought = self.problem.unsafe
        self._hopeless = self.problem.dual is None

    @property
    def joint(self) -> Joint:
        """What is known of conditions that only together leave no input."""
        if self._joint is None or self._joint.unsafe is not self.sought:
            inputs = len(self.problem.domain.lower)
            self._joint = Joint.make(self.sought, self.problem.decoder.grid, inputs)
        return self._joint

    # -- backward bounds ---------------------------------------------------------------------------

    def relaxed(self) -> Relaxed | None:
        """What backward bounds need, made on the first call. None where they are not wanted or can
        say nothing about any case."""
        problem = self.problem
        if self._relaxed is None and not self._hopeless and problem.dual is not None:
            boxes, _ = problem.dual.network.boxes(problem.kernels, *problem.root)
            regions = make_unsafe_regions(
                problem.network, problem.dual, problem.described, self.sought.case_rows, boxes
            )
            self._hopeless = all(case is None for case in regions.cases)
            if not self._hopeless:
                self._relaxed = Relaxed(problem.dual, regions, None)
                if self.observer is not None:
                    self.observer.compiled(regions)
        return self._relaxed

    def bound_intermediate(self, deadline: Deadline) -> None:
        """Bound intermediate values over the root box: by CROWN, and at the second call by
        optimized multipliers."""
        relaxed = self._relaxed
        if relaxed is None:
            return
        lower, upper = self.problem.root
        dual, last = relaxed.dual, relaxed.regions.last
        if relaxed.intermediate is None:
            found = crown_bounds(dual, lower, upper, last, deadline)
        else:
            found = optimized_bounds(dual, lower, upper, last, relaxed.intermediate, deadline)
        self._relaxed = replace(relaxed, intermediate=found)
        if self.observer is not None:
            self.observer.tightened(found.clamps)

    def note(self, proof: Proof) -> None:
        """Put into a proof what its bounds rest on, once the search is over."""
        relaxed = self._relaxed
        if relaxed is None:
            return
        proof.intermediate = [] if relaxed.intermediate is None else relaxed.intermediate.steps
        for k, rule in enumerate(relaxed.dual.host_rules, 1):
            if isinstance(rule, NonlinearRelaxation):
                proof.rules[k] = rule.name
                if isinstance(rule, PairwiseRelaxation):
                    proof.slopes[k] = rule.slope

    # -- what is sought ----------------------------------------------------------------------------

    def narrow(self) -> bool:
        """Seek less from now on, if there is a doubt; True the first time that this changes what is
        sought. Rows and regions are numbered anew then, so trees over the old ones begin again."""
        watched = self.observer is not None and self.observer.watch is not None
        if not self.undecided or self.narrowed or watched:
            return False
        self.narrowed = True
        if self.problem.certain is None:
            return False
        self.sought, self._relaxed = self.problem.certain, None
        self._hopeless = self.problem.dual is None
        return True

    def input_bounds(self, lower: Array, upper: Array) -> tuple[Float64Array, Float64Array] | None:
        """Bounds of what the inputs stand for over code boxes, [N, inputs] each; None where no row
        of what is sought mentions one."""
        return self.problem.input_bounds(lower, upper) if self.sought.mixed else None

    def without_sought(self, lower: Array, upper: Array) -> BoolArray:
        """Which boxes of codes hold no input that is sought: [N]."""
        without = self.problem.without_input(lower, upper)
        return (
            without | self.problem.without_certain_input(lower, upper) if self.narrowed else without
        )

    # -- points ------------------------------------------------------------------------------------

    def find_unsafe(self, points: Array, y: Float64Array) -> Candidate | None:
        """The first of `points` [N, codes] with outputs `y` that is unsafe and that some input in
        the domain produces."""
        problem = self.problem
        lower, upper = problem.leaves.bounds(points, y)
        x = self.input_bounds(points, points)
        status = self.sought.status((lower, upper), x)
        self.joint.refine(status, (lower, upper), x, search=False)
        unsafe = (status != REFUTED).any(axis=1)
        if self.undecided:  # one more doubt would change nothing
            unsafe &= ~problem.without_certain_input(points, points)
            if problem.certain is not None and problem.leaves.exact and not problem.mixed:
                some = y[unsafe], y[unsafe]
                unsafe[unsafe] = (problem.certain.status(some) == CERTAIN).any(axis=1)
        for i in looking(np.flatnonzero(unsafe)):
            codes = problem.kernels.to_host(points[i])
            try:
                found = problem.candidate(codes, (lower[i], upper[i]), status[i])
            except Undecided as error:  # go on: another vector may be a counterexample
                self.undecided = str(error)
                continue
            if found is not None:
                return found
        if self.observer is not None and not self.undecided:
            self.observer.safe(lambda: {0: (points, points)})
        return None

    def try_joint(self) -> tuple[Candidate | None, int]:
        """Try the inputs that satisfied a case's conditions on inputs: a counterexample, and how
        many were tried."""
        waiting = [] if self._joint is None else self._joint.points
        if not waiting:
            return None, 0
        problem = self.problem
        inputs = np.stack([problem.completed(point) for point in waiting])
        waiting.clear()
        codes = problem.kernels.asarray(problem.domain.encoder.encode(inputs))
        return self.find_unsafe(codes, problem.leaves.nominal(codes)), len(inputs)
