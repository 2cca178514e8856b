"""The regions of a property as arrays, and what it takes to refute them: a combination of a
region's inequalities sum w . v + c >= 0 with weights mu >= 0 and an upper bound below 0, in exact
integers.

Sound: where all inequalities hold, so does every combination with weights that are not negative; a
negative upper bound says that it does not hold anywhere in the box.
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
from qverify.kernels.steps import largest
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
    # Numbers of regions; None: the case cannot be expressed.
    cases: tuple[tuple[int, ...] | None, ...]

    @property
    def last(self) -> int:
        """The last network value that an inequality speaks of."""
        return max((value for i in self.inequalities for value, _, _ in i.terms), default=0)

    def precision(self) -> int:
        largest = max((abs(c) for i in self.inequalities for _, _, c in i.terms), default=1)
        return max(PRECISION - largest.bit_length() + 1, 8)

    def rows(
        self, numbers: Sequence[Sequence[int]]
    ) -> tuple[dict[int, npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
        """Inequalities as arrays: per value weights [N, K, *shape], and constants [N, K]; short
        rows end in 0 >= 0."""
        count = max((len(own) for own in (*numbers, *self.regions)), default=0)
        values = sorted({value for i in self.inequalities for value, _, _ in i.terms})
        terms = {
            v: np.zeros((len(numbers), count, self.network.type_of(v).size), np.int64)
            for v in values
        }
        constants = np.zeros((len(numbers), count), np.int64)
        for n, own in enumerate(numbers):
            for k, i in enumerate(own):
                constants[n, k] = self.inequalities[i].constant
                for value, index, c in self.inequalities[i].terms:
                    terms[value][n, k, index] = c
        shaped = {
            v: own.reshape(*own.shape[:2], *self.network.type_of(v).shape)
            for v, own in terms.items()
        }
        return shaped, constants

    def objective(self, dual: Dual, regions: Sequence[int]) -> Objective:
        """Some regions as an objective in int64, on the dual's machine."""
        terms, constants = self.rows([self.regions[r] for r in regions])
        kernels = dual.kernels
        return Objective(
            {v: kernels.asarray(own) for v, own in terms.items()}, kernels.asarray(constants)
        )

    def refuted(
        self,
        dual: Dual,
        bound: Callable[[Relaxations, dict[int, Array]], Array],
        shift: int,
        values: list[Interval],
        wanted: BoolArray,
    ) -> BoolArray:
        """Which regions some single inequality refutes, where `bound` bounds inequalities from
        above: [N, regions]. They are bounded 2**shift fold, since `bound` rounds multipliers to
        integers. Only the inequalities of the cases `wanted` [cases] are bounded."""
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
        """The inequalities that the cases `wanted` rest on."""
        regions = (r for k in np.flatnonzero(wanted) for r in self.cases[k] or ())
        return sorted({i for region in regions for i in self.regions[region]})

    def _negative(
        self, dual: Dual, relaxations: Relaxations, bound: Any, numbers: list[int], shift: int
    ) -> BoolArray:
        """Which of some inequalities, 2**shift fold, `bound` bounds below 0: [N, numbers]. Raises
        TooLarge."""
        kernels, n = dual.kernels, len(relaxations.boxes[0][0])
        widest = max((node.type.size for node in self.network.nodes[: self.last]), default=1)
        step = max(1, kernels.chunk_bytes // (8 * n * max(widest, self.network.input_type.size)))
        parts = []
        for start in looking(range(0, len(numbers), step)):
            own = numbers[start : start + step]
            terms, constants = self.rows([own])
            weights = {
                value: kernels.xp.broadcast_to(kernels.asarray(w << shift), (n, *w.shape[1:]))
                for value, w in terms.items()
            }
            total = kernels.to_host(bound(relaxations, weights)) + (constants << shift)
            parts.append(total[:, : len(own)] < 0)
        return np.concatenate(parts, axis=1)

    def refuted_cases(self, empty: BoolArray) -> BoolArray:
        """The cases of which every region is `empty` [N, regions]: [N, cases]."""
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
    """Compile the cases of a query; `boxes` are root intervals ([1, *shape] ends) of the dual's
    network."""

    def staircase(value: int) -> tuple[StaircaseRelaxation, int] | None:
        rule = host_rules[value - 1] if value else None
        return (
            (rule, network.nodes[value - 1].inputs[0])
            if isinstance(rule, StaircaseRelaxation)
            else None
        )

    def reach(value: int) -> int:
        own = network.type_of(value)
        return max(abs(own.low), abs(own.high))

    host_rules = dual.host_rules

    @functools.cache  # on a GPU every look is a wait
    def ends(value: int) -> tuple[Any, Any]:
        low, high = (dual.kernels.to_host(end).reshape(-1) for end in boxes[value])
        return low, high

    compiler = Compiler(outputs, staircase, ends, reach)
    numbers: dict[Inequality, int] = {}
    regions: list[tuple[int, ...]] = []
    covered: list[tuple[int, ...] | None] = []
    for case in looking(cases, 16):
        found: list[Region] | None = compiler.regions(case)
        if found is None or any(
            not region for region in found
        ):  # a region without a condition cannot be refuted
            covered.append(None)
            continue
        covered.append(tuple(range(len(regions), len(regions) + len(found))))
        regions += [tuple(numbers.setdefault(i, len(numbers)) for i in region) for region in found]
    return UnsafeRegions(network, tuple(numbers), tuple(regions), tuple(covered))


def proved(
    dual: Dual, relaxations: Relaxations, objective: Objective, point: Point, precision: int
) -> tuple[Array, int]:
    """Which regions the point refutes, in exact integers: bool [N], and the precision at which it
    was found out.

    `relaxations` and `objective` hold int64.
    """
    xp, terms, constants = dual.kernels.xp, objective.terms, objective.constants
    while precision >= LEAST_PRECISION:
        mu, multipliers = rounded(dual, point, precision)
        try:
            size, *reach = largest(dual.kernels, mu, constants, *terms.values())
            if size * max(reach) * mu.shape[1] >= LIMIT:
                raise TooLarge
            total = dual.upper(relaxations, objective.weights(mu), multipliers)[:, 0]
            return total + (mu * constants).sum(axis=1) < 0, precision
        except TooLarge:
            precision -= 4
    return xp.zeros(len(point.mu), dtype=xp.bool_), precision
