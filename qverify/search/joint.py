"""Conditions that only together leave no input: several inequalities of a case, of which some
mention inputs.

Each alone may hold on a part of the box where all together do not: X_0 - X_1 >= 0.2 and X_0 - X_1
<= 0.1 overlap every box around the diagonal. So boxes that no single row refutes are put to the
exact simplex method. The inequality that it gives for an empty set follows from the rows, and is
kept: it refutes most of the other boxes as cheaply as a row.

Sound because a combination of rows with non-negative multipliers holds wherever they all hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import compress

import numpy as np
import numpy.typing as npt

from qverify.bounds.simplex import RationalInequality, common_point
from qverify.bounds.unsafe import OPEN, REFUTED, Grid, Unsafe, make_unsafe
from qverify.property import Box, Query, Row

Float64Array = npt.NDArray[np.float64]
Ends = tuple[Float64Array, Float64Array]  # least and largest values [N, elements]

MAX_LEARNED = 32  # combinations of each case: the newest
MAX_POINTS = 8  # inputs to be tried
MOST_TRIED = 8  # boxes of a batch that are put to the simplex method
# For all of them together, and for a box that comes alone.
EFFORT, EFFORT_ALONE = (
    100_000,
    10_000_000,
)


@dataclass(eq=False)
class System:
    """The rows of one case that hang together with inputs. X_i is variable i, Y_j is variable
    `inputs` + j."""

    rows: list[RationalInequality]
    used: list[int]
    learned: list[Row] = field(default_factory=list)
    test: Unsafe | None = None  # of the learned rows, each a case of its own


@dataclass(eq=False)
class Joint:
    """The systems of a query's cases, by case number, and what was learned about them."""

    unsafe: Unsafe
    grid: Grid
    inputs: int
    systems: dict[int, System]
    # Inputs that satisfy a system, to be tried.
    points: list[dict[int, Fraction]] = field(default_factory=list)

    @staticmethod
    def make(unsafe: Unsafe, grid: Grid, inputs: int) -> Joint:
        """Collect the systems of cases."""
        systems = {}
        for k, case in enumerate(unsafe.cases if unsafe.mixed else ()):
            rows = _connected([unsafe.rows[r] for r in case])
            if len(rows) > 1:
                own = [_inequality(row, inputs) for row in rows]
                systems[k] = System(own, sorted({j for row in own for j in row.terms}))
        return Joint(unsafe, grid, inputs, systems)

    def refine(
        self, status: npt.NDArray[np.int8], y: Ends, x: Ends | None, search: bool = True
    ) -> None:
        """Refute cases of boxes in `status` [N, cases], given the ends of outputs and inputs; by
        what is known only, unless `search`."""
        for k, system in self.systems.items():
            open_ = np.flatnonzero(status[:, k] == OPEN)
            if not len(open_) or x is None:
                continue
            if system.test is not None:
                ends = ((low[open_], high[open_]) for low, high in (y, x))
                refuted = (system.test.status(*ends) == REFUTED).any(axis=1)
                status[open_[refuted], k] = REFUTED
                open_ = open_[~refuted]
            effort = EFFORT_ALONE if len(status) == 1 else EFFORT // MOST_TRIED
            for i in open_[:MOST_TRIED] if search else ():
                if self._is_empty(system, (y[0][i], y[1][i], x[0][i], x[1][i]), effort):
                    status[i, k] = REFUTED

    def _is_empty(self, system: System, ends: tuple[Float64Array, ...], effort: int) -> bool:
        """Whether a box has no common point of the rows; if so, that is remembered."""
        box = {}
        for j in system.used:
            low, high = (
                (end[j - self.inputs] for end in ends[:2])
                if j >= self.inputs
                else (e[j] for e in ends[2:])
            )
            if low > high:
                return False  # no box
            box[j] = Fraction(float(low)), Fraction(float(high))
        found = common_point(system.rows, box, effort=effort)
        if isinstance(found, RationalInequality):
            x = tuple(sorted((j, c) for j, c in found.terms.items() if j < self.inputs))
            y = tuple(
                sorted((j - self.inputs, c) for j, c in found.terms.items() if j >= self.inputs)
            )
            system.learned = [
                *system.learned[1 - MAX_LEARNED :],
                Row(x, y, found.rhs, found.strict),
            ]
            query = Query(Box((), ()), tuple((row,) for row in system.learned))
            system.test = make_unsafe(query, self.inputs, self.grid)
            return True
        if found is not None:
            self.points = [
                *self.points[1 - MAX_POINTS :],
                {j: v for j, v in found.items() if j < self.inputs},
            ]
        return False


def _connected(rows: Sequence[Row]) -> list[Row]:
    """The rows that mention inputs, and those that share outputs with them, also by way of
    others."""
    found = [row for row in rows if row.x]
    rest = [row for row in rows if not row.x]
    outputs = {j for row in found for j, _ in row.y}
    while True:
        near = [any(j in outputs for j, _ in row.y) for row in rest]
        if not any(near):
            return found
        found += compress(rest, near)
        outputs |= {j for row in compress(rest, near) for j, _ in row.y}
        rest = [row for row, own in zip(rest, near, strict=True) if not own]


def _inequality(row: Row, inputs: int) -> RationalInequality:
    return RationalInequality(
        {**dict(row.x), **{inputs + j: c for j, c in row.y}}, row.rhs, row.strict
    )
