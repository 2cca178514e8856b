"""Conditions that only together leave no input: inequalities of a case, some of them over inputs.

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

import numpy as np
import numpy.typing as npt

from qverify.bounds.simplex import RationalInequality, common_point
from qverify.bounds.unsafe import OPEN, REFUTED, Grid, Unsafe, make_unsafe
from qverify.property import Box, Query, Row

Float64Array = npt.NDArray[np.float64]
Bounds = tuple[Float64Array, Float64Array]  # least and largest values [N, elements]

MAX_LEARNED = 32  # combinations of each case: the newest
MAX_POINTS = 8  # inputs to be tried
MOST_TRIED = 8  # boxes of a batch that are put to the simplex method
EFFORT, EFFORT_ALONE = 100_000, 10_000_000  # for all of them together; for a box that comes alone


@dataclass(eq=False)
class System:
    """The rows of one case that hang together with inputs. X_i is variable i, and Y_j is variable
    `inputs` + j."""

    rows: list[RationalInequality]
    used: list[int]  # the variables in them
    learned: list[Row] = field(default_factory=list)
    test: Unsafe | None = None  # the learned rows, each as one case


@dataclass(eq=False)
class Joint:
    """The systems of a query's cases, by case number, and inputs that satisfy one."""

    unsafe: Unsafe
    grid: Grid
    inputs: int
    systems: dict[int, System]
    points: list[dict[int, Fraction]] = field(default_factory=list)  # inputs to be tried

    @staticmethod
    def make(unsafe: Unsafe, grid: Grid, inputs: int) -> Joint:
        """Collect the systems of cases."""
        systems = {}
        for k, case in enumerate(unsafe.cases if unsafe.mixed else ()):
            rows = _connected([unsafe.rows[r] for r in case])
            if len(rows) > 1:
                system = [_inequality(row, inputs) for row in rows]
                systems[k] = System(system, sorted({j for row in system for j in row.terms}))
        return Joint(unsafe, grid, inputs, systems)

    def refine(
        self, status: npt.NDArray[np.int8], y: Bounds, x: Bounds | None, search: bool = True
    ) -> None:
        """Mark in `status` [N, cases] more cases of boxes as refuted, given bounds of outputs and
        inputs there. Without `search`, only learned rows are used."""
        for k, system in self.systems.items():
            open_ = np.flatnonzero(status[:, k] == OPEN)
            if not len(open_) or x is None:
                continue
            if system.test is not None:
                some_y, some_x = ((lower[open_], upper[open_]) for lower, upper in (y, x))
                refuted = (system.test.status(some_y, some_x) == REFUTED).any(axis=1)
                status[open_[refuted], k] = REFUTED
                open_ = open_[~refuted]
            effort = EFFORT_ALONE if len(status) == 1 else EFFORT // MOST_TRIED
            for i in open_[:MOST_TRIED] if search else ():
                lower, upper = (np.concatenate([x[end][i], y[end][i]]) for end in (0, 1))
                if self._is_empty(system, lower, upper, effort):
                    status[i, k] = REFUTED

    def _is_empty(
        self, system: System, lower: Float64Array, upper: Float64Array, effort: int
    ) -> bool:
        """Whether the rows have no common point in the box of all variables from `lower` to
        `upper`. A row that refutes it is learned; a common point is to be tried."""
        box = {}
        for j in system.used:
            if lower[j] > upper[j]:
                return False  # there is no box
            box[j] = Fraction(float(lower[j])), Fraction(float(upper[j]))
        found = common_point(system.rows, box, effort=effort)
        if isinstance(found, RationalInequality):
            self._learn(system, found)
            return True
        if found is not None:
            inputs = {j: v for j, v in found.items() if j < self.inputs}
            self.points = [*self.points[1 - MAX_POINTS :], inputs]
        return False

    def _learn(self, system: System, found: RationalInequality) -> None:
        """Keep an inequality that follows from a system's rows."""
        terms = sorted(found.terms.items())
        x = tuple((j, c) for j, c in terms if j < self.inputs)
        y = tuple((j - self.inputs, c) for j, c in terms if j >= self.inputs)
        row = Row(x, y, found.rhs, found.strict)
        system.learned = [*system.learned[1 - MAX_LEARNED :], row]
        query = Query(Box((), ()), tuple((learned,) for learned in system.learned))
        system.test = make_unsafe(query, self.inputs, self.grid)


def _connected(rows: Sequence[Row]) -> list[Row]:
    """The rows that mention inputs, and those that share outputs with them or with each other."""
    found = [row for row in rows if row.x]
    rest = [row for row in rows if not row.x]
    outputs = {j for row in found for j, _ in row.y}
    while True:
        linked = [row for row in rest if any(j in outputs for j, _ in row.y)]
        if not linked:
            return found
        found += linked
        rest = [row for row in rest if not any(j in outputs for j, _ in row.y)]
        outputs |= {j for row in linked for j, _ in row.y}


def _inequality(row: Row, inputs: int) -> RationalInequality:
    terms = dict(row.x) | {inputs + j: c for j, c in row.y}
    return RationalInequality(terms, row.rhs, row.strict)
