"""Mixed integer linear programming with HiGHS, one thread; each case of the property is a program
of its own.

Encodings are exact in rationals and chosen for floats: accumulators are continuous (sums of
integers times integers are integers by themselves), steps are given by their own thresholds and
never by an arbitrary big M, and two different answers of a step function lie a whole unit of an
integer sum apart (1/r of one where its steps are a line of slope p/r). HiGHS works in float64 with
tolerances 1e-7 (rows, integrality), so a coefficient of 10^6 already moves a row by 0.1.

What an `unsat` of this peer deserves: no proof. A point whose integer variables are within the
tolerance, and which rounding could repair, is not lost; but infeasibility rests on floating-point
bounds, and HiGHS gives no certificate. A `sat` is checked exactly like every peer's; an incumbent
that fails the check is `unknown` ("within tolerances only").
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

import highspy
import numpy as np

from benchmarks.peers.decide import Answer
from benchmarks.peers.encoding import Clause, Formula, Linear, Maximum, Pair, Steps, Unsupported

SMALL = 4  # a step function of fewer pieces gets a binary for each step
CELLS = 1 << 14  # a table of two variables may have so many cells
INFINITY = highspy.kHighsInf


@dataclass
class Program:
    """Columns with bounds and rows low <= sum <= high; the first columns are the formula's
    variables."""

    formula: Formula
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[float, list[tuple[float, int]], float]] = field(default_factory=list)

    def column(self, low: float, high: float, integer: bool = True) -> int:
        """A new column."""
        self.lower.append(low)
        self.upper.append(high)
        self.integer.append(integer)
        return len(self.lower) - 1

    def row(self, low: float, terms: list[tuple[float, int]], high: float) -> None:
        """A new row; fixed variables are columns too."""
        self.rows.append((low, terms, high))

    def define(self) -> None:
        """Columns for all variables and rows for all definitions."""
        sums = {d.y for d in self.formula.definitions if isinstance(d, Linear)}
        for v, (a, b) in enumerate(zip(self.formula.lower, self.formula.upper, strict=True)):
            self.column(a, b, v not in sums)
        for d in self.formula.definitions:
            match d:
                case Linear():
                    self.row(-d.bias, [*((float(c), v) for c, v in d.terms), (-1.0, d.y)], -d.bias)
                case Steps():
                    self._steps(d)
                case Pair():
                    self._pair(d)
                case Maximum():
                    self._maximum(d)

    def _steps(self, d: Steps) -> None:
        line = d.line() if len(d.values) >= SMALL else None
        if line is None:
            self._chain(d)
            return
        p, q, r = line
        low, high = self.formula.lower[d.x], self.formula.upper[d.x]
        last, rise = len(d.values) - 1, d.values[1] - d.values[0]
        piece, above, top = self.column(0, last), self.column(0, 1), self.column(0, 1)
        self.row(d.values[0], [(1.0, d.y), (-float(rise), piece)], d.values[0])
        self.row(0, [(1.0, piece), (-1.0, above)], INFINITY)  # above: piece >= 1; top: piece = last
        self.row(-INFINITY, [(1.0, piece), (-float(last), above)], 0)
        self.row(0, [(1.0, piece), (-float(last), top)], INFINITY)
        self.row(-INFINITY, [(1.0, piece), (-1.0, top)], last - 1)
        below = max(0, q - r * low)  # what the lower line needs where x is under the first step
        over = max(0, r * high - p * last - q - p + 1)
        self.row((q - below) / r, [(1.0, d.x), (-p / r, piece), (-below / r, above)], INFINITY)
        self.row(-INFINITY, [(1.0, d.x), (-p / r, piece), (-over / r, top)], (p + q - 1) / r)

    def _chain(self, d: Steps) -> None:
        """One binary per step, each at most the one before; x lies between the last step taken and
        the next."""
        steps = [self.column(0, 1) for _ in d.values[1:]]
        for one, other in pairwise(steps):
            self.row(0, [(1.0, one), (-1.0, other)], INFINITY)
        rises = [float(b - a) for a, b in pairwise(d.values)]
        self.row(
            d.values[0], [(1.0, d.y), *zip([-v for v in rises], steps, strict=True)], d.values[0]
        )
        ends = [*(s - 1 for s in d.starts[1:]), self.formula.upper[d.x]]
        for edges, low, high in (
            (d.starts, float(d.starts[0]), INFINITY),
            (ends, -INFINITY, float(ends[0])),
        ):
            moves = [-float(b - a) for a, b in pairwise(edges)]
            self.row(low, [(1.0, d.x), *zip(moves, steps, strict=True)], high)

    def _pair(self, d: Pair) -> None:
        """One binary per rectangle of equal values: a run along b, shared by neighbouring a with
        the same row."""
        lower = self.formula.lower
        if d.table.size > CELLS:
            raise Unsupported(f"Pairwise with {d.table.size} reachable cells")
        cells: list[tuple[int, int, int, int, int]] = []
        rows = d.table.tolist()
        first = 0
        for k, row in enumerate(rows):
            if k + 1 < len(rows) and rows[k + 1] == row:
                continue
            begin = [i for i, v in enumerate(row) if not i or v != row[i - 1]]
            for i, j in zip(begin, [*begin[1:], len(row)], strict=True):
                cells.append(
                    (lower[d.a] + first, lower[d.a] + k, lower[d.b] + i, lower[d.b] + j - 1, row[i])
                )
            first = k + 1
        chosen = [self.column(0, 1) for _ in cells]
        self.row(1, [(1.0, c) for c in chosen], 1)
        for x, low, high in ((d.a, 0, 1), (d.b, 2, 3), (d.y, 4, 4)):
            self.row(
                0,
                [
                    (1.0, x),
                    *((-float(cell[low]), c) for cell, c in zip(cells, chosen, strict=True)),
                ],
                INFINITY,
            )
            self.row(
                -INFINITY,
                [
                    (1.0, x),
                    *((-float(cell[high]), c) for cell, c in zip(cells, chosen, strict=True)),
                ],
                0,
            )

    def _maximum(self, d: Maximum) -> None:
        chosen = [self.column(0, 1) for _ in d.xs]
        self.row(1, [(1.0, c) for c in chosen], 1)
        for x, c in zip(d.xs, chosen, strict=True):
            self.row(0, [(1.0, d.y), (-1.0, x)], INFINITY)
            most = float(self.formula.upper[d.y] - self.formula.lower[x])
            self.row(-INFINITY, [(1.0, d.y), (-1.0, x), (most, c)], most)

    def clause(self, clause: Clause) -> None:
        """One of the inequalities holds."""
        if len(clause) == 1:
            self.row(-INFINITY, [(float(c), v) for c, v in clause[0].terms], clause[0].rhs)
            return
        chosen = [self.column(0, 1) for _ in clause]
        self.row(1, [(1.0, c) for c in chosen], INFINITY)
        for row, c in zip(clause, chosen, strict=True):
            most = max(0, self.formula.most(row.terms) - row.rhs)
            self.row(
                -INFINITY,
                [*((float(k), v) for k, v in row.terms), (float(most), c)],
                row.rhs + most,
            )

    def lp(self) -> highspy.HighsLp:
        """The program as HiGHS takes it, without an objective."""
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.lower), len(self.rows)
        lp.col_cost_ = np.zeros(lp.num_col_)
        lp.col_lower_, lp.col_upper_ = (
            np.array(self.lower, np.float64),
            np.array(self.upper, np.float64),
        )
        lp.row_lower_ = np.array([low for low, _, _ in self.rows], np.float64)
        lp.row_upper_ = np.array([high for _, _, high in self.rows], np.float64)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum(
            [0, *(len(terms) for _, terms, _ in self.rows)], dtype=np.int32
        )
        lp.a_matrix_.index_ = np.array([v for _, terms, _ in self.rows for _, v in terms], np.int32)
        lp.a_matrix_.value_ = np.array(
            [c for _, terms, _ in self.rows for c, _ in terms], np.float64
        )
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[whole] for whole in self.integer]
        return lp


def solve(formula: Formula, seconds: float) -> Answer:
    """The answers of one program per case: sat at the first, unsat where all are infeasible, else
    what stopped."""
    end = time.monotonic() + seconds
    for case in formula.cases:
        if any(not clause for clause in (*case, *formula.clauses)):
            continue  # a clause that never holds
        program = Program(formula)
        program.define()
        for clause in (*case, *formula.clauses):
            program.clause(clause)
        answer = _run(program, end - time.monotonic())
        if answer.verdict != "unsat":
            return answer
    return Answer("unsat")


def _run(program: Program, seconds: float) -> Answer:
    if seconds <= 0:
        return Answer("timeout")
    highs = highspy.Highs()  # type: ignore[no-untyped-call]
    for name, value in (
        ("output_flag", False),
        ("threads", 1),
        ("time_limit", seconds),
        ("primal_feasibility_tolerance", 1e-7),
        ("mip_feasibility_tolerance", 1e-7),
    ):
        highs.setOptionValue(name, value)
    highs.passModel(program.lp())
    highs.run()
    status = highs.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return Answer("unsat")
    if status != highspy.HighsModelStatus.kOptimal:
        timed_out = status == highspy.HighsModelStatus.kTimeLimit
        return Answer("timeout" if timed_out else "unknown", highs.modelStatusToString(status))
    values = highs.getSolution().col_value
    codes = []
    for v in program.formula.inputs:
        code = round(values[v])
        codes.append(min(max(code, program.formula.lower[v]), program.formula.upper[v]))
    return Answer("sat", "within tolerances only", tuple(codes))
