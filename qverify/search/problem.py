"""One query, ready to be searched: network, domain and unsafe set, bound or evaluated in
batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.boundary.cells import CellTable, may_hold
from qverify.boundary.domain import Domain
from qverify.boundary.inputs import solve_surely
from qverify.boundary.leaves import Leaves, Runtime
from qverify.boundary.outputs import Decoder
from qverify.boundary.readings import Readings
from qverify.bounds.dual import Dual
from qverify.bounds.intermediate import IntermediateBounds, crown_bounds, optimized_bounds
from qverify.bounds.regions import Output
from qverify.bounds.unsafe import CERTAIN, REFUTED, Unsafe
from qverify.bounds.unsafe_regions import UnsafeRegions, make_unsafe_regions
from qverify.deadline import Deadline, looking
from qverify.errors import Undecided
from qverify.kernels import Array, Kernels
from qverify.network import Network
from qverify.ops import Interval
from qverify.ops.relax import NonlinearRelaxation
from qverify.ops.table import PairwiseRelaxation
from qverify.propagate import Propagator
from qverify.property import Case
from qverify.search.joint import Joint
from qverify.search.proof import Proof
from qverify.search.watch import Watch

DIFFERS = (
    "a counterexample under some readings of the property's numbers only (exact, as doubles, in "
    "float32): "
)
NEAR_TIE, NEAR_BOUND = (
    DIFFERS + "it is within rounding of a tie",
    DIFFERS + "an input is within rounding of its bound",
)
BACKWARD_BYTES = 32 << 20  # one array of multipliers of a batch

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Codes that some case may call unsafe, with input values that produce them."""

    codes: npt.NDArray[np.int32]  # [codes]
    inputs: Float64Array  # [inputs], exact float32 or integers
    outputs: Float64Array  # [outputs], what the integer network says the runtime will return


@dataclass(frozen=True, eq=False)
class Relaxed:
    """What the dual needs: the rules, the cases as regions, and bounds of inner values that hold in
    the whole root box."""

    dual: Dual
    cover: UnsafeRegions
    inner: IntermediateBounds | None  # None: nothing but intervals yet


@dataclass(eq=False)
class Problem:
    """A query over a network on a machine. Boxes and points are int32 [N, codes] arrays of
    `kernels`."""

    kernels: Kernels
    network: Network
    domain: Domain
    decoder: Decoder
    unsafe: Unsafe  # what some reading of the property calls unsafe: refuted, or there is no proof
    lower: npt.NDArray[np.int32]  # [codes], the root box
    upper: npt.NDArray[np.int32]
    runtime: Runtime | None = None  # asked at leaves where network or decoder is not exact
    dual: Dual | None = None  # where the dual's bounds are wanted
    described: Sequence[Output] = ()  # the outputs, for it
    propagator: Propagator | None = None  # a faster `network.intervals`
    # The query's versions, where they differ; `unsafe` is of the possible one,.
    readings: Readings | None = None
    certain: Unsafe | None = None  # and this of the certain one, case by case
    watch: Watch | None = None  # an input that nothing may lose, for debugging
    undecided: str = ""  # why some code vector could be neither confirmed nor ruled out
    # Whether the dual bounds the inequalities of closed cases too, as a checker will.
    thorough: bool = False
    _relaxed: Relaxed | None = field(default=None, repr=False)
    _cells: Any = field(default=None, repr=False)
    _joint: Joint | None = field(default=None, repr=False)
    _narrowed: bool = False

    def relaxed(self) -> Relaxed | None:
        """The dual of this query, made on the first call. None where it is not wanted or can say
        nothing about any case."""
        if self._relaxed is None and self.dual is not None:
            lower, upper = (self.kernels.asarray(end[None]) for end in (self.lower, self.upper))
            boxes, _ = self.dual.network.boxes(self.kernels, lower, upper)
            cover = make_unsafe_regions(
                self.network, self.dual, self.described, self.unsafe.case_rows, boxes
            )
            if any(own is not None for own in cover.cases):
                self._relaxed = Relaxed(self.dual, cover, None)
                if self.watch is not None:
                    self.watch.cover(cover)
            else:
                self.dual = None
        return self._relaxed

    def bound_intermediate(self, deadline: Deadline) -> None:
        """Bounds of inner values over the root box; better ones with every call, up to the
        second."""
        own = self._relaxed
        if own is not None:
            lower, upper = (self.kernels.asarray(end[None]) for end in (self.lower, self.upper))
            if own.inner is None:
                inner = crown_bounds(own.dual, lower, upper, own.cover.last, deadline)
            else:
                inner = optimized_bounds(
                    own.dual, lower, upper, own.cover.last, own.inner, deadline
                )
            self._relaxed = replace(own, inner=inner)
            if self.watch is not None:
                self.watch.bounds(inner.clamps, "inner bounds")

    def note(self, proof: Proof) -> None:
        """Put into a proof what its bounds rest on, once the search is over."""
        if self._relaxed is None:
            return
        proof.inner = [] if self._relaxed.inner is None else self._relaxed.inner.steps
        for k, rule in enumerate(self._relaxed.dual.host_rules, 1):
            if isinstance(rule, NonlinearRelaxation):
                proof.rules[k] = rule.name
                if isinstance(rule, PairwiseRelaxation):
                    proof.slopes[k] = rule.slope

    def refute(
        self, lower: Array, upper: Array, status: npt.NDArray[np.int8]
    ) -> npt.NDArray[np.int8]:
        """`status` [N, cases] of boxes, with cases refuted by the dual, where there are any; inner
        values are as well known as `bound_intermediate` made them."""
        relaxed = self.relaxed()
        if relaxed is None:
            return status
        clamps = relaxed.inner.clamps if relaxed.inner is not None else {}
        result = status.copy()
        each = 8 * max(1, len(relaxed.cover.inequalities)) * self.network.widest
        step = max(1, BACKWARD_BYTES // each)
        for start in looking(range(0, len(status), step)):
            part = slice(start, start + step)
            boxes, _ = self.network.boxes(self.kernels, lower[part], upper[part], clamps)
            asked = None if self.thorough else (status[part] != REFUTED).any(axis=0)
            result[part][relaxed.cover.refuted(relaxed.dual, boxes, asked)] = REFUTED
        if self.watch is not None:
            self.watch.boxes(lower, upper, result, "edges")
        return result

    @property
    def mixed(self) -> bool:
        """Whether a counterexample has to meet rows that mention inputs."""
        return self.unsafe.mixed or (self.certain is not None and self.certain.mixed)

    @property
    def joint(self) -> Joint:
        """What is known of the conditions that only together leave no input."""
        if self._joint is None or self._joint.unsafe is not self.unsafe:
            self._joint = Joint.make(self.unsafe, self.decoder.grid, len(self.domain.lower))
        return self._joint

    def input_ends(self, lower: Array, upper: Array) -> tuple[Float64Array, Float64Array] | None:
        """Bounds of what the inputs stand for over code boxes; only where rows mention inputs (None
        otherwise)."""
        return self.domain.hull(*self._ends_in_cells(lower, upper)) if self.unsafe.mixed else None

    def _ends_in_cells(self, lower: Array, upper: Array) -> tuple[Float64Array, Float64Array]:
        if self._cells is None:
            self._cells = CellTable.make(self.domain, self.lower, self.upper)
        cells: CellTable = self._cells
        return cells.ends(self.kernels.to_host(lower), self.kernels.to_host(upper))

    def without_input(self, lower: Array, upper: Array) -> npt.NDArray[np.bool_]:
        """In which code boxes no input's codes lie, bool [N]: where several codes come from one
        input element, most code vectors come from none."""
        if not self.domain.encoder.shared:
            return np.zeros(len(lower), np.bool_)
        first, last = self._ends_in_cells(lower, upper)
        return np.asarray((first > last).any(axis=1), np.bool_)

    def bound(self, lower: Array, upper: Array) -> tuple[npt.NDArray[np.int8], Float64Array]:
        """Interval bounds: the status of every case [N, cases], and the rows' least values [N,
        rows] (a guide).

        Raises Undecided where an output may be infinite: no real number stands for it in a row.
        """
        self.narrow()
        fast = self.propagator
        ends = (
            fast.intervals(lower, upper)
            if fast
            else self.network.intervals(self.kernels, lower, upper)
        )
        y = self._decoded(*ends)
        x = self.input_ends(lower, upper)
        status = self.unsafe.status(y, x)
        status[self._without_wanted(lower, upper)] = REFUTED
        self.joint.refine(status, y, x)
        if self.watch is not None:
            self.watch.boxes(lower, upper, status, "intervals")
        return status, self.unsafe.ends(y, x)[0]

    def _decoded(self, lower: Array, upper: Array) -> tuple[Float64Array, Float64Array]:
        """Bounds of the outputs, from those of the network's. Undecided where one may be
        infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            y = self.decoder.decode_box(self.kernels.to_host(lower), self.kernels.to_host(upper))
        self._finite(*y)
        return y

    def _finite(self, *ends: Float64Array) -> None:
        if not all(np.isfinite(end).all() for end in ends):
            raise Undecided(
                "an output can overflow float32: the rows of the property say nothing about an "
                "infinity"
            )

    def refuted_by(self, boxes: list[Interval]) -> npt.NDArray[np.bool_]:
        """Which cases the intervals of all values refute: bool [N, cases]."""
        self.narrow()
        ends = (self.network.flat_outputs(self.kernels, [box[i] for box in boxes]) for i in (0, 1))
        y, x = self._decoded(*ends), self.input_ends(*boxes[0])
        status = self.unsafe.status(y, x)
        self.joint.refine(status, y, x)
        found: npt.NDArray[np.bool_] = status == REFUTED
        found[self._without_wanted(*boxes[0])] = True
        return found

    def narrow(self) -> bool:
        """Once there is a doubt, the answer is `unknown` unless there is a counterexample, so from
        then on only what every reading calls unsafe is sought; whether that is news. (It is called
        where no numbers of rows are held.)"""
        if not self.undecided or self._narrowed or self.watch is not None:
            return False
        if self.certain is not None:
            self.unsafe, self._relaxed = self.certain, None
        self._narrowed = True
        return self.certain is not None

    def _without_wanted(self, lower: Array, upper: Array) -> npt.NDArray[np.bool_]:
        """Which boxes of codes hold no input that is sought, bool [N]."""
        without = self.without_input(lower, upper)
        return (
            without | self.domain.beyond_surely(*map(self.kernels.to_host, (lower, upper)))
            if self._narrowed
            else without
        )

    @property
    def leaves(self) -> Leaves:
        """What the runtime may give at single code vectors."""
        return Leaves(self.kernels, self.network, self.decoder, self.runtime)

    def evaluate(self, points: Array) -> Float64Array:
        """The nominal output values [N, outputs] of code vectors [N, codes]. Raises Undecided where
        one may be infinite.

        By intervals where the network is exact: they are exact on points, and have the faster
        kernels.
        """
        fast = self.propagator if self.network.exact else None
        codes = (
            fast.intervals(points, points)[0] if fast else self.network.run(self.kernels, points)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            y = self.decoder.decode(self.kernels.to_host(codes))
        self._finite(*self.decoder.around(y))
        return y

    def outputs(self, values: list[Array]) -> Float64Array:
        """The output values [N, outputs] of stored network values."""
        return self.decoder.decode(
            self.kernels.to_host(self.network.flat_outputs(self.kernels, values))
        )

    def find_unsafe(self, points: Array, y: Float64Array) -> Candidate | None:
        """The first of `points` [N, codes] with outputs `y` that is unsafe and that some input in
        the domain produces."""
        leaves = self.leaves
        lower, upper = leaves.bounds(points, y)
        x = self.input_ends(points, points)
        status = self.unsafe.status((lower, upper), x)
        self.joint.refine(status, (lower, upper), x, search=False)
        unsafe = (status != REFUTED).any(axis=1)
        if self.undecided:  # one more doubt would change nothing
            host = self.kernels.to_host(points)
            unsafe &= ~self.domain.beyond_surely(host, host)
            if self.certain is not None and leaves.exact and not self.mixed:
                unsafe[unsafe] = (self.certain.status((y[unsafe], y[unsafe])) == CERTAIN).any(
                    axis=1
                )
        for i in looking(np.flatnonzero(unsafe)):
            codes = self.kernels.to_host(points[i])
            try:
                if leaves.exact:
                    found = self._candidate(codes, y[i], status[i])
                else:
                    found = self._ask_runtime(codes, lower[i], upper[i])
            except Undecided as error:  # go on: another vector may be a counterexample
                self.undecided = str(error)
                continue
            if found is not None:
                return found
        if self.watch is not None and not self.undecided:
            self.watch.safe({0: (points, points)})
        return None

    def try_joint(self) -> tuple[Candidate | None, int]:
        """Try the inputs that satisfied a case's conditions on inputs: a counterexample, and how
        many were tried."""
        points = [] if self._joint is None else self._joint.points
        if not points:
            return None, 0
        inputs = np.stack([self._completed(point) for point in points])
        points.clear()
        codes = self.kernels.asarray(self.domain.encoder.encode(inputs))
        y = self.decoder.decode(self.kernels.to_host(self.network.run(self.kernels, codes)))
        return self.find_unsafe(codes, y), len(inputs)

    def _completed(self, point: dict[int, Fraction]) -> Float64Array:
        """Input values near those of `point`, in the middle of the domain where it says nothing."""
        own = self.domain
        result = own.lower + (own.upper - own.lower) * 0.5
        for i, value in point.items():
            result[i] = float(value)
        rounded = np.where(
            own.encoder.is_float, result.astype(np.float32).astype(np.float64), np.rint(result)
        )
        return np.clip(rounded, own.lower, own.upper)

    def _candidate(
        self, codes: npt.NDArray[np.int32], y: Float64Array, status: npt.NDArray[np.int8]
    ) -> Candidate | None:
        inputs = self.realise(codes, y, status)
        return None if inputs is None else Candidate(codes, inputs, y)

    def _ask_runtime(
        self, codes: npt.NDArray[np.int32], lower: Float64Array, upper: Float64Array
    ) -> Candidate | None:
        """Decide one code vector, whose outputs lie in [lower, upper], by the runtime's own."""
        inputs = self.domain.lift(codes)
        if inputs is None:
            return None
        actual = self.leaves.ask(inputs, lower, upper)
        x = self.input_ends(codes[None], codes[None])
        status = self.unsafe.status((actual[None], actual[None]), x)[0]
        return self._candidate(codes, actual, status) if status.any() else None

    def realise(
        self, codes: npt.NDArray[np.int32], y: Float64Array, status: npt.NDArray[np.int8]
    ) -> Float64Array | None:
        """Input values that quantize to `codes` and for which one of the cases left by `status`
        holds under every reading; None if none holds under any. Raises Undecided where readings
        differ."""
        cell = self.domain.cells(codes, codes)
        if cell is None:
            return None
        ends = (
            *(end[0] for end in self.domain.hull(cell[0][None], cell[1][None])),
            self.domain.encoder.is_float,
        )
        doubt = ""
        for k in looking(np.flatnonzero(status != REFUTED)):
            possible, certain = self._versions(int(k), y)
            if not may_hold(possible, y, *ends):
                continue
            try:
                found = solve_surely(self.domain, certain, y, *cell)
            except Undecided as error:
                found, doubt = None, str(error)
            if found is not None:
                return found
            doubt = doubt or (NEAR_BOUND if may_hold(certain, y, *ends) else NEAR_TIE)
        if doubt:
            raise Undecided(doubt)
        return None

    def _versions(self, case: int, y: Float64Array) -> tuple[Case, Case]:
        """The rows of a case that some reading of the property accepts at outputs `y`, and those
        that every one does."""
        if self.readings is not None:
            return self.readings.at(case, y)
        rows = tuple(self.unsafe.rows[r] for r in self.unsafe.cases[case])
        return rows, rows
