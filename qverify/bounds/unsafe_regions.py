"""The regions of a property as arrays, and how they are refuted in exact integers.

A region is refuted by a combination of its inequalities sum w . v + c >= 0, with weights mu >= 0,
whose upper bound is below 0.

Sound: where all inequalities hold, so does every combination with weights that are not negative; a
negative upper bound says that it holds nowhere in the box.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.bounds.dual import Dual, Relaxations
from qverify.bounds.improve import Objective, Point, rounded
from qverify.bounds.regions import Compiler, Inequality, Output, Region
from qverify.deadline import looking
from qverify.kernels import Array
from qverify.network import Network
from qverify.ops import Interval
from qverify.ops.relax import LIMIT, StaircaseRelaxation, TooLarge
from qverify.property import Case

PRECISION = 18  # a mu of 1 becomes 2**18, less what the inequalities' coefficients take
LEAST_PRECISION = 4
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class UnsafeRegions:
    """Every case's regions, over a network; arrays are on the host."""

    network: Network
    inequalities: tuple[Inequality, ...]
    regions: tuple[tuple[int, ...], ...]  # numbers of inequalities
    cases: tuple[tuple[int, ...] | None, ...]  # numbers of regions; None: it cannot be expressed

    @property
    def last(self) -> int:
        """The last network value that an inequality speaks of."""
        return max((value for i in self.inequalities for value, _, _ in i.terms), default=0)

    def precision(self) -> int:
        """How many binary places multipliers are rounded to: fewer where coefficients are large."""
        largest = max((abs(c) for i in self.inequalities for _, _, c in i.terms), default=1)
        return max(PRECISION - largest.bit_length() + 1, 8)

    def rows(
        self, numbers: Sequence[Sequence[int]]
    ) -> tuple[dict[int, npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
        """Inequalities, given as N lists of their numbers, as arrays: weights of each value
        [N, K, *shape], and constants [N, K]. Short lists are filled up with 0 >= 0."""
        count = max((len(listed) for listed in (*numbers, *self.regions)), default=0)
        values = sorted({value for i in self.inequalities for value, _, _ in i.terms})
        terms = {
            v: np.zeros((len(numbers), count, self.network.type_of(v).size), np.int64)
            for v in values
        }
        constants = np.zeros((len(numbers), count), np.int64)
        for n, listed in enumerate(numbers):
            for k, i in enumerate(listed):
                constants[n, k] = self.inequalities[i].constant
                for value, index, c in self.inequalities[i].terms:
                    terms[value][n, k, index] = c
        shaped = {
            v: weights.reshape(*weights.shape[:2], *self.network.type_of(v).shape)
            for v, weights in terms.items()
        }
        return shaped, constants

    def objective(self, dual: Dual, regions: Sequence[int]) -> Objective:
        """Some regions as an objective in int64, on the dual's machine."""
        terms, constants = self.rows([self.regions[r] for r in regions])
        kernels = dual.kernels
        return Objective(
            {v: kernels.asarray(weights) for v, weights in terms.items()},
            kernels.asarray(constants),
        )

    def refuted(
        self,
        dual: Dual,
        bound: Callable[[Relaxations, dict[int, Array]], Array],
        shift: int,
        values: list[Interval],
        wanted: BoolArray,
    ) -> BoolArray:
        """Which regions are refuted by one of their inequalities alone: [N, regions].

        `bound` bounds inequalities from above. It gets them times 2**shift, since it rounds
        multipliers to integers. Only inequalities of the cases `wanted` [cases] are bounded.
        """
        negative = np.zeros((len(values[0][0]), len(self.inequalities)), np.bool_)
        numbers = self._numbers(wanted)
        if numbers and self._size << shift < LIMIT:
            with contextlib.suppress(TooLarge):  # then there is no bound
                relaxations = Relaxations(values, {})
                negative[:, numbers] = self._negative(dual, relaxations, bound, numbers, shift)
        empty = np.zeros((len(negative), len(self.regions)), np.bool_)
        for r, region in enumerate(self.regions):
            empty[:, r] = negative[:, list(region)].any(axis=1)
        return empty

    @functools.cached_property
    def _size(self) -> int:
        """The largest number in an inequality, in magnitude."""
        numbers = (c for i in self.inequalities for c in (i.constant, *(c for _, _, c in i.terms)))
        return max(map(abs, numbers), default=0)

    def _numbers(self, wanted: BoolArray) -> list[int]:
        """The inequalities of the cases `wanted`."""
        regions = (r for k in np.flatnonzero(wanted) for r in self.cases[k] or ())
        return sorted({i for region in regions for i in self.regions[region]})

    def _negative(
        self, dual: Dual, relaxations: Relaxations, bound: Any, numbers: list[int], shift: int
    ) -> BoolArray:
        """Which of some inequalities have a bound below 0: [N, numbers]. Raises TooLarge."""
        kernels, n = dual.kernels, len(relaxations.boxes[0][0])
        widest = max((node.type.size for node in self.network.nodes[: self.last]), default=1)
        step = max(1, kernels.chunk_bytes // (8 * n * max(widest, self.network.input_type.size)))
        parts = []
        for start in looking(range(0, len(numbers), step)):
            chunk = numbers[start : start + step]
            terms, constants = self.rows([chunk])
            weights = {
                value: kernels.xp.broadcast_to(kernels.asarray(w << shift), (n, *w.shape[1:]))
                for value, w in terms.items()
            }
            total = kernels.to_host(bound(relaxations, weights)) + (constants << shift)
            parts.append(total[:, : len(chunk)] < 0)
        return np.concatenate(parts, axis=1)

    def refuted_cases(self, empty: BoolArray) -> BoolArray:
        """The cases whose regions are all `empty` [N, regions]: [N, cases]."""
        result = np.zeros((len(empty), len(self.cases)), np.bool_)
        for k, regions in enumerate(self.cases if self.inequalities else ()):
            if regions is not None:
                result[:, k] = empty[:, list(regions)].all(axis=1)
        return result


def make_unsafe_regions(
    network: Network,
    dual: Dual,
    outputs: Sequence[Output],
    cases: Sequence[Case],
    boxes: list[Interval],
) -> UnsafeRegions:
    """Compile the cases of a query; `boxes` are the intervals of the dual's network over the root
    box ([1, *shape] each)."""

    def staircase(value: int) -> tuple[StaircaseRelaxation, int] | None:
        rule = dual.host_rules[value - 1] if value else None
        if not isinstance(rule, StaircaseRelaxation):
            return None
        return rule, network.nodes[value - 1].inputs[0]

    def reach(value: int) -> int:
        type_ = network.type_of(value)
        return max(abs(type_.low), abs(type_.high))

    @functools.cache  # on a GPU the host has to wait for the values
    def root_bounds(value: int) -> tuple[Any, Any]:
        lower, upper = boxes[value]
        return dual.kernels.to_host(lower).reshape(-1), dual.kernels.to_host(upper).reshape(-1)

    compiler = Compiler(outputs, staircase, root_bounds, reach)
    numbers: dict[Inequality, int] = {}
    regions: list[tuple[int, ...]] = []
    expressed: list[tuple[int, ...] | None] = []
    for case in looking(cases, 16):
        found: list[Region] | None = compiler.regions(case)
        if found is None or not all(found):  # a region without inequalities cannot be refuted
            expressed.append(None)
            continue
        expressed.append(tuple(range(len(regions), len(regions) + len(found))))
        regions += [tuple(numbers.setdefault(i, len(numbers)) for i in region) for region in found]
    return UnsafeRegions(network, tuple(numbers), tuple(regions), tuple(expressed))


def proved(
    dual: Dual, relaxations: Relaxations, objective: Objective, point: Point, precision: int
) -> tuple[Array, int]:
    """Which regions the point refutes, in exact integers: bool [N], and the precision to which its
    multipliers were rounded. `relaxations` and `objective` hold int64."""
    xp, terms, constants = dual.kernels.xp, objective.terms, objective.constants
    while precision >= LEAST_PRECISION:
        mu, multipliers = rounded(dual, point, precision)
        try:
            size, *reach = dual.kernels.largest(mu, constants, *terms.values())
            if size * max(reach) * mu.shape[1] >= LIMIT:
                raise TooLarge
            total = dual.upper(relaxations, objective.weights(mu), multipliers)[:, 0]
            return total + (mu * constants).sum(axis=1) < 0, precision
        except TooLarge:  # a coarser point is as sound, and its numbers are smaller
            precision -= 4
    return xp.zeros(len(point.mu), dtype=xp.bool_), precision
