"""One query, ready to be searched: network, domain and unsafe set. Nothing here changes.

What a search learns on its way stands in `qverify.search.knowledge`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from qverify.boundary.cells import CellTable, may_hold
from qverify.boundary.domain import Domain
from qverify.boundary.inputs import solve_certain
from qverify.boundary.leaves import Leaves, Runtime
from qverify.boundary.outputs import Decoder
from qverify.boundary.readings import Readings
from qverify.bounds.dual import Dual
from qverify.bounds.regions import Output
from qverify.bounds.unsafe import REFUTED, Unsafe
from qverify.deadline import looking
from qverify.errors import Undecided
from qverify.kernels import Array, Kernels
from qverify.network import Network
from qverify.propagate import Propagator
from qverify.property import Case

DIFFERS = (
    "a counterexample under some readings of the property's numbers only "
    "(exact, as doubles, in float32): "
)
NEAR_TIE = DIFFERS + "it is within rounding of a tie"
NEAR_BOUND = DIFFERS + "an input is within rounding of its bound"

Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Codes that some case may call unsafe, with input values that produce them."""

    codes: Int32Array  # [codes]
    inputs: Float64Array  # [inputs], exact float32 or integers
    outputs: Float64Array  # [outputs], what the integer network says the runtime will return


@dataclass(frozen=True, eq=False)
class Problem:
    """A query over a network on a machine. Boxes and points are int32 [N, codes] arrays of
    `kernels`."""

    kernels: Kernels
    network: Network
    domain: Domain
    decoder: Decoder
    # What some reading of the property calls unsafe: `unsat` says that there is no such input.
    unsafe: Unsafe
    lower: Int32Array  # [codes], the root box
    upper: Int32Array
    runtime: Runtime | None = None  # asked at leaves where network or decoder is not exact
    dual: Dual | None = None  # where backward bounds are wanted
    described: Sequence[Output] = ()  # the outputs, for it
    propagator: Propagator | None = None  # a faster `network.intervals`
    readings: Readings | None = None  # where the readings of the property differ,
    certain: Unsafe | None = None  # and what every one of them calls unsafe, case by case

    @property
    def mixed(self) -> bool:
        """Whether a counterexample has to meet rows that mention inputs."""
        return self.unsafe.mixed or (self.certain is not None and self.certain.mixed)

    @property
    def root(self) -> tuple[Array, Array]:
        """The root box on the machine: int32 [1, codes] each."""
        return self.kernels.asarray(self.lower[None]), self.kernels.asarray(self.upper[None])

    # -- inputs ------------------------------------------------------------------------------------

    @functools.cached_property
    def _cells(self) -> CellTable:
        return CellTable.make(self.domain, self.lower, self.upper)

    def _cell_bounds(self, lower: Array, upper: Array) -> tuple[Float64Array, Float64Array]:
        return self._cells.bounds(self.kernels.to_host(lower), self.kernels.to_host(upper))

    def input_bounds(self, lower: Array, upper: Array) -> tuple[Float64Array, Float64Array]:
        """Bounds of what the inputs stand for over code boxes: [N, inputs] each."""
        return self.domain.hull(*self._cell_bounds(lower, upper))

    def without_input(self, lower: Array, upper: Array) -> BoolArray:
        """In which code boxes no input's codes lie, bool [N]: where several codes come from one
        input element, most code vectors come from none."""
        if not self.domain.encoder.shared:
            return np.zeros(len(lower), np.bool_)
        first, last = self._cell_bounds(lower, upper)
        return np.asarray((first > last).any(axis=1), np.bool_)

    def without_certain_input(self, lower: Array, upper: Array) -> BoolArray:
        """In which code boxes no input lies that is inside its bounds under every reading: [N]."""
        low, high = self.kernels.to_host(lower), self.kernels.to_host(upper)
        return self.domain.without_certain(low, high)

    def completed(self, point: dict[int, Fraction]) -> Float64Array:
        """Input values near those of `point`, in the middle of the domain where it says nothing."""
        domain = self.domain
        values = domain.lower + (domain.upper - domain.lower) * 0.5
        for i, value in point.items():
            values[i] = float(value)
        floats = values.astype(np.float32).astype(np.float64)
        rounded = np.where(domain.encoder.is_float, floats, np.rint(values))
        return np.clip(rounded, domain.lower, domain.upper)

    # -- outputs -----------------------------------------------------------------------------------

    def output_bounds(self, lower: Array, upper: Array) -> tuple[Float64Array, Float64Array]:
        """Bounds of the output values over code boxes: [N, outputs] each."""
        fast = self.propagator
        if fast is not None:
            return self.decoded(*fast.intervals(lower, upper))
        return self.decoded(*self.network.intervals(self.kernels, lower, upper))

    def decoded(self, lower: Array, upper: Array) -> tuple[Float64Array, Float64Array]:
        """Bounds of the output values, from those of the network's integers.

        Raises Undecided where an output may be infinite: no real number stands for it in a row.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            y = self.decoder.decode_box(self.kernels.to_host(lower), self.kernels.to_host(upper))
        _check_finite(*y)
        return y

    def evaluate(self, points: Array) -> Float64Array:
        """The nominal output values [N, outputs] of code vectors [N, codes]. Raises Undecided where
        one may be infinite.

        By intervals where the network is exact: they are exact on points, and have the faster
        kernels.
        """
        fast = self.propagator if self.network.exact else None
        if fast is not None:
            codes = fast.intervals(points, points)[0]
        else:
            codes = self.network.run(self.kernels, points)
        with np.errstate(over="ignore", invalid="ignore"):
            y = self.decoder.decode(self.kernels.to_host(codes))
        _check_finite(*self.decoder.around(y))
        return y

    def outputs(self, values: list[Array]) -> Float64Array:
        """The output values [N, outputs] of stored network values."""
        codes = self.network.flat_outputs(self.kernels, values)
        return self.decoder.decode(self.kernels.to_host(codes))

    @functools.cached_property
    def leaves(self) -> Leaves:
        """What the runtime may give at single code vectors."""
        return Leaves(self.kernels, self.network, self.decoder, self.runtime)

    # -- counterexamples ---------------------------------------------------------------------------

    def candidate(
        self,
        codes: Int32Array,
        outputs: tuple[Float64Array, Float64Array],
        status: npt.NDArray[np.int8],
    ) -> Candidate | None:
        """A counterexample with these codes [codes], whose outputs lie within `outputs`, for one of
        the cases that `status` [cases] leaves; None if there is none. Raises Undecided where
        readings differ.

        Where outputs are not exact, the runtime's own decide (`qverify.boundary.leaves`).
        """
        y = outputs[0]
        if not self.leaves.exact:
            inputs = self.domain.lift(codes)
            if inputs is None:
                return None
            y = self.leaves.ask(inputs, *outputs)
            x = self.input_bounds(codes[None], codes[None]) if self.unsafe.mixed else None
            status = self.unsafe.status((y[None], y[None]), x)[0]
        found = self.realise(codes, y, status) if status.any() else None
        return None if found is None else Candidate(codes, found, y)

    def realise(
        self, codes: Int32Array, y: Float64Array, status: npt.NDArray[np.int8]
    ) -> Float64Array | None:
        """Input values that quantize to `codes` and for which one of the cases left by `status`
        holds under every reading; None if none holds under any. Raises Undecided where readings
        differ."""
        cell = self.domain.cells(codes, codes)
        if cell is None:
            return None
        first, last = self.domain.hull(cell[0][None], cell[1][None])
        hull = first[0], last[0], self.domain.encoder.is_float
        doubt = ""
        for k in looking(np.flatnonzero(status != REFUTED)):
            possible, certain = self._versions(int(k), y)
            if not may_hold(possible, y, *hull):
                continue
            try:
                found = solve_certain(self.domain, certain, y, *cell)
            except Undecided as error:
                found, doubt = None, str(error)
            if found is not None:
                return found
            doubt = doubt or (NEAR_BOUND if may_hold(certain, y, *hull) else NEAR_TIE)
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


def _check_finite(*bounds: Float64Array) -> None:
    if not all(np.isfinite(bound).all() for bound in bounds):
        raise Undecided(
            "an output can overflow float32: the rows of the property say nothing about an infinity"
        )
