"""A watched point: an input that nothing may lose. A debugging aid; no proof rests on this file.

It is off by default. With `Options.watch` one input goes along with the search, as its codes and as
every network value they give. Whatever is pruned (boxes, cases, regions, values outside bounds) is
compared with it: sound pruning never takes away the point itself, and refutes neither a case nor a
region that holds there. If some does, SoundnessError says which. The point need not be unsafe:
bounds and regions are tested with any input. An input outside a query's box tests nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from qverify.boundary.domain import Domain
from qverify.boundary.leaves import Leaves
from qverify.boundary.outputs import Decoder
from qverify.bounds.unsafe import CERTAIN, Unsafe
from qverify.bounds.unsafe_regions import UnsafeRegions
from qverify.errors import SoundnessError
from qverify.kernels import Array, Kernels
from qverify.network import Network
from qverify.ops import Interval

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Watch:
    """One input of a query's box."""

    kernels: Kernels
    # The network's values there [*shape], the codes first; on the host. If an op has a band, they
    # are nominal ones, which intervals hold, too.
    values: tuple[npt.NDArray[np.int64], ...]
    holds: BoolArray  # [cases]: which of them call the input unsafe
    nominal: BoolArray  # [cases]: which of them do so at these values; the same if all are exact

    @staticmethod
    def make(
        kernels: Kernels,
        network: Network,
        domain: Domain,
        decoder: Decoder,
        unsafe: Unsafe,
        runtime: Callable[[Float64Array], Float64Array] | None,
        inputs: Float64Array,
    ) -> Watch | None:
        """Watch `inputs` (exact float32 or integers) in a query; None if outside its box."""
        if not ((domain.lower <= inputs) & (inputs <= domain.upper)).all():
            return None
        codes = domain.encoder.encode(inputs[None])
        lower, upper = domain.code_box()
        if ((codes < lower) | (codes > upper)).any():
            _lost("the box of codes does not hold it")
        values = network.values(kernels, kernels.asarray(codes))
        y = decoder.decode(kernels.to_host(network.flat_outputs(kernels, values)))
        x = (inputs[None], inputs[None]) if unsafe.mixed else None
        leaves = Leaves(kernels, network, decoder, runtime)
        outputs = leaves.bounds(codes, y)
        if not leaves.exact and runtime is not None:
            actual = leaves.ask(inputs, outputs[0][0], outputs[1][0])[None]
            outputs = actual, actual
        holds = nominal = _certain(unsafe, *outputs, x)
        if not network.exact:  # the watched values are nominal, and regions are about values
            nominal = _certain(unsafe, *decoder.around(y), x)
        host = tuple(kernels.to_host(value)[0].astype(np.int64) for value in values)
        return Watch(kernels, host, holds, nominal)

    def within(self, intervals: Mapping[int, Interval]) -> BoolArray:
        """Which subproblems, given by intervals [N, *shape] of some values, hold the point: [N]."""
        inside: Any = True
        for value, (lower, upper) in intervals.items():
            low, high = self.kernels.to_host(lower), self.kernels.to_host(upper)
            between = (low <= self.values[value]) & (self.values[value] <= high)
            inside = inside & between.all(axis=tuple(range(1, between.ndim)))
        return np.asarray(inside)

    def boxes(self, lower: Array, upper: Array, refuted: BoolArray, by: str) -> None:
        """No case that holds at the point was refuted, in boxes of codes [N, codes] with `refuted`
        [N, cases]."""
        wrong = (refuted & self.holds)[self.within({0: (lower, upper)})]
        if wrong.any():
            case = int(np.flatnonzero(wrong.any(axis=0))[0])
            _lost(f"{by} refute case {case}, which holds there")

    def bounds(self, intervals: Mapping[int, Interval], by: str) -> None:
        """Bounds of values that should hold in the whole root box hold at the point."""
        for value, interval in intervals.items():
            if not self.within({value: interval}).all():
                _lost(f"{by} of value {value} do not hold there")

    def parts(
        self, given: Mapping[int, Interval], boxes: Sequence[Interval], possible: Array
    ) -> None:
        """Where a subproblem holds the point by the intervals `given`, so do the intervals `boxes`
        of all its values, and it is not called impossible."""
        at = np.flatnonzero(self.within(given))
        if not self.kernels.to_host(possible)[at].all():
            _lost("its subproblem is called impossible")
        rows = self.kernels.asarray(at)
        if len(at):
            self.bounds(
                {k: (lower[rows], upper[rows]) for k, (lower, upper) in enumerate(boxes)},
                "intervals",
            )

    def regions(self, unsafe_regions: UnsafeRegions) -> None:
        """Every case that holds at the point, if it is expressed by regions, has one that holds."""
        for k in np.flatnonzero(self.nominal):
            regions = unsafe_regions.cases[k]
            if regions is not None and not any(self._meets(unsafe_regions, r) for r in regions):
                _lost(f"case {int(k)} holds there, but none of its {len(regions)} regions does")

    def refuted(
        self,
        unsafe_regions: UnsafeRegions,
        regions: npt.NDArray[np.int64],
        intervals: Mapping[int, Interval],
    ) -> None:
        """No region that holds at the point was refuted, in subproblems given by `intervals`."""
        for region in sorted(set(regions[self.within(intervals)].tolist())):
            if self._meets(unsafe_regions, region):
                _lost(f"multipliers refute region {region}, which holds there")

    def safe(self, intervals: Mapping[int, Interval]) -> None:
        """Of the single code vectors given by `intervals`, which were evaluated and found safe,
        none is the point's if that is unsafe."""
        if self.holds.any() and self.within(intervals).any():
            _lost("its codes are called safe")

    def unsat(self) -> None:
        """The query has no counterexample."""
        if self.holds.any():
            _lost("the verdict is unsat, and it is a counterexample")

    def _meets(self, unsafe_regions: UnsafeRegions, region: int) -> bool:
        """Whether all inequalities of a region hold at the point."""
        for inequality in (unsafe_regions.inequalities[i] for i in unsafe_regions.regions[region]):
            total = inequality.constant
            for value, index, c in inequality.terms:
                total += c * int(self.values[value].reshape(-1)[index])
            if total < 0:
                return False
        return True


def _certain(
    unsafe: Unsafe, lower: Float64Array, upper: Float64Array, x: tuple[Any, Any] | None
) -> BoolArray:
    """Which cases hold for all outputs in [lower, upper] (both [1, outputs]): [cases]. None of them
    where an output may be infinite: the rows say nothing about infinities."""
    if not (np.isfinite(lower).all() and np.isfinite(upper).all()):
        return np.zeros(len(unsafe.cases), np.bool_)
    return np.asarray(unsafe.status((lower, upper), x)[0] == CERTAIN)


def _lost(how: str) -> NoReturn:
    raise SoundnessError(
        f"the watched point is lost: {how}; please report this with the model and the point"
    )
