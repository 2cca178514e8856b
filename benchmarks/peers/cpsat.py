"""CP-SAT (OR-Tools): integer variables, one worker, exact arithmetic in 64 bits.

A requantization whose steps fit a line floor((r x - q) / p) is that division between its two clips;
other step functions have one Boolean per piece; tables of two variables are element constraints.
"""

from __future__ import annotations

from typing import Any

from ortools.sat.python import cp_model

from benchmarks.peers.decide import Answer
from benchmarks.peers.encoding import Clause, Formula, Linear, Maximum, Pair, Steps, Unsupported

SMALL = 4  # a step function of fewer pieces gets a Boolean for each
LARGEST = 1 << 60


def build(formula: Formula) -> tuple[cp_model.CpModel, list[Any]]:
    """The model, and an expression for each variable (None where it is not used)."""
    model = cp_model.CpModel()
    used = {v for d in formula.definitions for v in (d.y,)} | set(formula.inputs) | formula.kept
    expression: list[Any] = [
        (a if a == b else model.new_int_var(a, b, f"v{k}")) if k in used or a == b else None
        for k, (a, b) in enumerate(zip(formula.lower, formula.upper, strict=True))
    ]
    for d in formula.definitions:
        match d:
            case Linear():
                size = sum(
                    abs(c) * max(abs(formula.lower[v]), abs(formula.upper[v])) for c, v in d.terms
                )
                if size > LARGEST:
                    raise Unsupported("a sum beyond 64 bits")
                variables, weights = [expression[v] for _, v in d.terms], [c for c, _ in d.terms]
                model.add(
                    cp_model.LinearExpr.weighted_sum(variables, weights) + d.bias == expression[d.y]
                )
            case Steps():
                _add_steps(model, formula, d, expression[d.x], expression[d.y])
            case Pair():
                rows, columns = d.table.shape
                index = model.new_int_var(0, rows * columns - 1, "")
                a, b = expression[d.a] - formula.lower[d.a], expression[d.b] - formula.lower[d.b]
                model.add(index == a * columns + b)
                model.add_element(index, d.table.reshape(-1).tolist(), expression[d.y])
            case Maximum():
                model.add_max_equality(expression[d.y], [expression[v] for v in d.xs])
    return model, expression


def _add_steps(model: cp_model.CpModel, formula: Formula, d: Steps, x: Any, y: Any) -> None:
    line = d.line() if len(d.values) >= SMALL else None
    if line is None:
        pieces = [model.new_bool_var("") for _ in d.values]
        model.add_exactly_one(pieces)
        ends = [*(s - 1 for s in d.starts[1:]), formula.upper[d.x]]
        for piece, a, b, value in zip(pieces, d.starts, ends, d.values, strict=True):
            model.add_linear_constraint(x, a, b).only_enforce_if(piece)
            model.add(y == value).only_enforce_if(piece)
        return
    p, q, r = line
    last, rise = len(d.values) - 1, d.values[1] - d.values[0]
    piece = model.new_int_var(0, last, "")
    model.add(y == piece * rise + d.values[0])
    above, top = model.new_bool_var(""), model.new_bool_var("")
    model.add(x >= d.starts[1]).only_enforce_if(above)
    model.add(x < d.starts[1]).only_enforce_if(~above)
    model.add(piece == 0).only_enforce_if(~above)
    model.add(x >= d.starts[-1]).only_enforce_if(top)
    model.add(x < d.starts[-1]).only_enforce_if(~top)
    model.add(piece == last).only_enforce_if(top)
    model.add(r * x - p * piece >= q).only_enforce_if(above)
    model.add(r * x - p * piece <= p + q - 1).only_enforce_if(~top)


def solve(formula: Formula, seconds: float) -> Answer:
    """CP-SAT's answer; sat, unsat or timeout."""
    model, expression = build(formula)

    def clause(clause: Clause, enforce: Any = None) -> None:
        literals = []
        for row in clause:
            if not row.terms:
                if row.rhs >= 0:
                    return
                continue
            literal = model.new_bool_var("")
            variables, weights = [expression[v] for _, v in row.terms], [c for c, _ in row.terms]
            left = cp_model.LinearExpr.weighted_sum(variables, weights)
            model.add(left <= row.rhs).only_enforce_if(literal)
            literals.append(literal)
        model.add_bool_or([*literals, *([] if enforce is None else [~enforce])])

    for rows in formula.clauses:
        clause(rows)
    cases = [model.new_bool_var("") for _ in formula.cases]
    model.add_bool_or(cases)
    for case, literal in zip(formula.cases, cases, strict=True):
        for rows in case:
            clause(rows, literal)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    if status == cp_model.MODEL_INVALID:
        return Answer("error", model.validate()[:200])
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer("sat", codes=tuple(int(solver.value(expression[v])) for v in formula.inputs))
    return Answer("unsat" if status == cp_model.INFEASIBLE else "timeout")
