"""Bit-vector SMT (QF_BV) with Bitwuzla: every variable a two's complement vector of its least
width.

As in Giacobbe et al. (TACAS 2020) and Henzinger et al. (AAAI 2021): sums are balanced trees, widths
are minimal, branches that bounds exclude are not built. A step function with steps at multiples of
a power of two is a shift, any other a balanced tree of comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bitwuzla  # type: ignore[import-not-found]

from benchmarks.peers.decide import Answer
from benchmarks.peers.encoding import Clause, Formula, Inequality, Linear, Maximum, Pair, Steps

Kind = bitwuzla.Kind
SMALL = 4  # a step function of fewer pieces is always a tree


def width_of(low: int, high: int) -> int:
    """Bits of a two's complement vector that holds [low, high]."""
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1


class Terms:
    """The terms of a formula in one term manager; one per variable, built in the order of the
    definitions."""

    def __init__(self, formula: Formula) -> None:
        self.tm = bitwuzla.TermManager()
        self.formula = formula
        self.width = [width_of(a, b) for a, b in zip(formula.lower, formula.upper, strict=True)]
        self.term: dict[int, Any] = {}
        self.assertions: list[Any] = []
        for v in formula.inputs:
            if not formula.fixed(v):
                self.term[v] = self.tm.mk_const(self.tm.mk_bv_sort(self.width[v]), f"x{v}")
                for kind, end in ((Kind.BV_SGE, formula.lower[v]), (Kind.BV_SLE, formula.upper[v])):
                    self.assertions.append(
                        self.tm.mk_term(kind, [self.term[v], self.value(end, self.width[v])])
                    )
        for d in formula.definitions:
            match d:
                case Linear():
                    self.term[d.y] = self.sum(d.terms, d.bias, self.width[d.y])
                case Steps():
                    self.term[d.y] = self.steps(d)
                case Pair():
                    self.term[d.y] = self.pair(d)
                case Maximum():
                    self.term[d.y] = self.maximum(d)

    def value(self, value: int, width: int) -> Any:
        """A constant, modulo 2**width."""
        return self.tm.mk_bv_value(self.tm.mk_bv_sort(width), value % (1 << width))

    def of(self, v: int) -> Any:
        """The term of a variable; a fixed one is a constant."""
        if v not in self.term:
            self.term[v] = self.value(self.formula.lower[v], self.width[v])
        return self.term[v]

    def resized(self, v: int, width: int) -> Any:
        """The variable modulo 2**width."""
        bits = self.width[v]
        if bits > width:
            return self.tm.mk_term(Kind.BV_EXTRACT, [self.of(v)], [width - 1, 0])
        return (
            self.tm.mk_term(Kind.BV_SIGN_EXTEND, [self.of(v)], [width - bits])
            if bits < width
            else self.of(v)
        )

    def not_(self, term: Any) -> Any:
        """Its negation."""
        return self.tm.mk_term(Kind.NOT, [term])

    def any_of(self, terms: Sequence[Any]) -> Any:
        """The disjunction; false for none."""
        if not terms:
            return self.tm.mk_false()
        return terms[0] if len(terms) == 1 else self.tm.mk_term(Kind.OR, list(terms))

    def all_of(self, terms: Sequence[Any]) -> Any:
        """The conjunction; true for none."""
        return self.not_(self.any_of([self.not_(t) for t in terms]))

    def at_least(self, v: int, value: int) -> Any:
        """v >= value, for a v within its bounds."""
        if value <= self.formula.lower[v]:
            return self.tm.mk_true()
        if value > self.formula.upper[v]:
            return self.tm.mk_false()
        return self.tm.mk_term(Kind.BV_SGE, [self.of(v), self.value(value, self.width[v])])

    def sum(self, terms: Sequence[tuple[int, int]], bias: int, width: int) -> Any:
        """bias + sum of products modulo 2**width, as a balanced tree."""
        parts = [self.value(bias, width)] if bias or not terms else []
        for c, v in terms:
            x = self.resized(v, width)
            parts.append(x if c == 1 else self.tm.mk_term(Kind.BV_MUL, [x, self.value(c, width)]))
        while len(parts) > 1:
            pairs = [
                self.tm.mk_term(Kind.BV_ADD, parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)
            ]
            parts = pairs + parts[len(parts) - len(parts) % 2 :]
        return parts[0]

    def steps(self, d: Steps) -> Any:
        """A shift where the steps are those of one, else a tree over the pieces."""
        line = d.line() if len(d.values) >= SMALL else None
        if line is not None and line[2] == 1 and line[0] & (line[0] - 1) == 0:
            return self._shifted(d, *line[:2])
        width = self.width[d.y]
        return self._tree(d.x, list(d.starts), [self.value(v, width) for v in d.values])

    def _shifted(self, d: Steps, p: int, q: int) -> Any:
        """values[0] + rise * ((x - q) >> log2 p) between the first and the last piece."""
        low, high = self.formula.lower[d.x] - q, self.formula.upper[d.x] - q
        rise = d.values[1] - d.values[0]
        reach = max(abs(low // p), abs(high // p)) * abs(rise) + abs(d.values[0])
        wide = max(width_of(low, high), width_of(-reach, reach))
        moved = self.tm.mk_term(Kind.BV_SUB, [self.resized(d.x, wide), self.value(q, wide)])
        piece = self.tm.mk_term(Kind.BV_ASHR, [moved, self.value(p.bit_length() - 1, wide)])
        full = self.tm.mk_term(Kind.BV_MUL, [piece, self.value(rise, wide)]) if rise != 1 else piece
        full = self.tm.mk_term(Kind.BV_ADD, [full, self.value(d.values[0], wide)])
        width = self.width[d.y]
        inner = self.tm.mk_term(Kind.BV_EXTRACT, [full], [width - 1, 0]) if wide > width else full
        last = self.at_least(d.x, d.starts[-1])
        upper = self.tm.mk_term(Kind.ITE, [last, self.value(d.values[-1], width), inner])
        first = self.at_least(d.x, d.starts[1])
        return self.tm.mk_term(Kind.ITE, [first, upper, self.value(d.values[0], width)])

    def _tree(self, x: int, starts: list[int], leaves: list[Any]) -> Any:
        """The leaf whose piece x lies in; `starts[0]` is never asked."""
        if len(leaves) == 1:
            return leaves[0]
        half = len(leaves) // 2
        low, high = (
            self._tree(x, starts[:half], leaves[:half]),
            self._tree(x, starts[half:], leaves[half:]),
        )
        return self.tm.mk_term(Kind.ITE, [self.at_least(x, starts[half]), high, low])

    def pair(self, d: Pair) -> Any:
        """A tree over a of trees over b."""
        lower, width = self.formula.lower, self.width[d.y]
        starts, leaves, last = [], [], None
        for k, row in enumerate(d.table.tolist()):
            if row == last:
                continue
            last = row
            begin = [i for i, v in enumerate(row) if not i or v != row[i - 1]]
            starts.append(lower[d.a] + k)
            leaves.append(
                self._tree(
                    d.b, [lower[d.b] + i for i in begin], [self.value(row[i], width) for i in begin]
                )
            )
        return self._tree(d.a, starts, leaves)

    def maximum(self, d: Maximum) -> Any:
        """Pairwise, in the widest argument's width."""
        width = max(self.width[v] for v in (d.y, *d.xs))
        best = self.resized(d.xs[0], width)
        for v in d.xs[1:]:
            x = self.resized(v, width)
            best = self.tm.mk_term(Kind.ITE, [self.tm.mk_term(Kind.BV_SGE, [x, best]), x, best])
        bits = self.width[d.y]
        return self.tm.mk_term(Kind.BV_EXTRACT, [best], [bits - 1, 0]) if bits < width else best

    def inequality(self, row: Inequality) -> Any:
        """sum <= rhs, in a width that holds both."""
        low, high = self.formula.least(row.terms), self.formula.most(row.terms)
        if row.rhs >= high or row.rhs < low:
            return self.tm.mk_true() if row.rhs >= high else self.tm.mk_false()
        width = width_of(low, high)
        return self.tm.mk_term(
            Kind.BV_SLE, [self.sum(row.terms, 0, width), self.value(row.rhs, width)]
        )

    def clause(self, clause: Clause) -> Any:
        """One of its inequalities."""
        return self.any_of([self.inequality(row) for row in clause])


def solve(formula: Formula, seconds: float) -> Answer:
    """Bitwuzla's answer; sat, unsat or timeout."""
    options = bitwuzla.Options()
    options.set(bitwuzla.Option.PRODUCE_MODELS, True)
    options.set(bitwuzla.Option.TIME_LIMIT_PER, max(1, int(1000 * seconds)))
    terms = Terms(formula)
    solver = bitwuzla.Bitwuzla(terms.tm, options)
    for term in terms.assertions:
        solver.assert_formula(term)
    for clause in formula.clauses:
        solver.assert_formula(terms.clause(clause))
    solver.assert_formula(
        terms.any_of([terms.all_of([terms.clause(c) for c in case]) for case in formula.cases])
    )
    result = solver.check_sat()
    if result != bitwuzla.Result.SAT:
        return Answer("unsat" if result == bitwuzla.Result.UNSAT else "timeout")
    get: Callable[[Any], Any] = solver.get_value
    codes = []
    for v in formula.inputs:
        bits = int(str(get(terms.of(v)).value(2)), 2)
        codes.append(bits - (1 << terms.width[v]) if bits >> (terms.width[v] - 1) else bits)
    return Answer("sat", codes=tuple(codes))
