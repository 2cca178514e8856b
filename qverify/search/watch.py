"""A watched point: an input that nothing may lose. A debugging aid, off by default; no proof rests
on this file.

With `Options.watch` one input goes along with the search, as its codes and as every network value
they give. Whatever is pruned (boxes, cases, regions, values outside bounds) is held against it: a
pruning that is sound never takes away the point itself, and refutes neither a case nor a region
that holds there. Otherwise SoundnessError says which one did. The point need not be unsafe: bounds
and regions are tested with any input; one outside a query's box never triggers.
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
    # Of the network there [*shape], the codes first; on the host. (Nominal ones, if an op has a
    # band: intervals hold them, too.)
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
        """Watch `inputs` [inputs] (exact float32 or integers) in a query; None where its box does
        not hold them."""
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

    def within(self, ends: Mapping[int, Interval]) -> BoolArray:
        """Which of N subproblems hold the point: the ends [N, *shape] of each value given lie
        around its own. [N]"""
        inside: Any = True
        for value, (lower, upper) in ends.items():
            low, high = self.kernels.to_host(lower), self.kernels.to_host(upper)
            own = (low <= self.values[value]) & (self.values[value] <= high)
            inside = inside & own.all(axis=tuple(range(1, own.ndim)))
        return np.asarray(inside)

    def boxes(self, lower: Array, upper: Array, refuted: BoolArray, by: str) -> None:
        """No case that holds at the point was refuted, in boxes of codes [N, codes] with `refuted`
        [N, cases]."""
        wrong = (refuted & self.holds)[self.within({0: (lower, upper)})]
        if wrong.any():
            case = int(np.flatnonzero(wrong.any(axis=0))[0])
            _lost(f"{by} refute case {case}, which holds there")

    def bounds(self, ends: Mapping[int, Interval], by: str) -> None:
        """Bounds of values that should hold in the whole root box hold at the point."""
        for value, own in ends.items():
            if not self.within({value: own}).all():
                _lost(f"{by} of value {value} do not hold there")

    def parts(
        self, ends: Mapping[int, Interval], boxes: Sequence[Interval], possible: Array
    ) -> None:
        """The intervals of subproblems given by `ends` hold the point where these do, and are not
        called impossible."""
        at = np.flatnonzero(self.within(ends))
        if not self.kernels.to_host(possible)[at].all():
            _lost("its subproblem is called impossible")
        rows = self.kernels.asarray(at)
        if len(at):
            self.bounds(
                {k: (lower[rows], upper[rows]) for k, (lower, upper) in enumerate(boxes)},
                "intervals",
            )

    def regions(self, cover: UnsafeRegions) -> None:
        """Every case that holds at the point and is expressed by regions has a region that holds
        there."""
        for k in np.flatnonzero(self.nominal):
            regions = cover.cases[k]
            if regions is not None and not any(self._meets(cover, r) for r in regions):
                _lost(f"case {int(k)} holds there, but none of its {len(regions)} regions does")

    def refuted(
        self, cover: UnsafeRegions, regions: npt.NDArray[np.int64], ends: Mapping[int, Interval]
    ) -> None:
        """No region that holds at the point was refuted, in subproblems given by `ends`."""
        for region in sorted(set(regions[self.within(ends)].tolist())):
            if self._meets(cover, region):
                _lost(f"multipliers refute region {region}, which holds there")

    def safe(self, ends: Mapping[int, Interval]) -> None:
        """Subproblems given by `ends`, single code vectors that were evaluated and found safe, are
        not an unsafe one's."""
        if self.holds.any() and self.within(ends).any():
            _lost("its codes are called safe")

    def unsat(self) -> None:
        """The query has no counterexample."""
        if self.holds.any():
            _lost("the verdict is unsat, and it is a counterexample")

    def _meets(self, cover: UnsafeRegions, region: int) -> bool:
        """Whether all inequalities of a region hold at the point."""
        for inequality in (cover.inequalities[i] for i in cover.regions[region]):
            terms = (
                c * int(self.values[value].reshape(-1)[index])
                for value, index, c in inequality.terms
            )
            if sum(terms) + inequality.constant < 0:
                return False
        return True


def _certain(
    unsafe: Unsafe, lower: Float64Array, upper: Float64Array, x: tuple[Any, Any] | None
) -> BoolArray:
    """Which cases hold for all outputs in [lower, upper] (both [1, outputs]): [cases]. None where
    an output may be infinite: the rows say nothing about infinities."""
    if not (np.isfinite(lower).all() and np.isfinite(upper).all()):
        return np.zeros(len(unsafe.cases), np.bool_)
    return np.asarray(unsafe.status((lower, upper), x)[0] == CERTAIN)


def _lost(how: str) -> NoReturn:
    raise SoundnessError(
        f"the watched point is lost: {how}; please report this with the model and the point"
    )
