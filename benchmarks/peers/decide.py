"""One instance for a peer: read it as qverify does, ask the peer, check what it says on the integer
network, refine.

`unsat` is the peer's word. `sat` is believed only after the codes have been run through the integer
network, the rows compared as rationals, and an input in the box found that quantizes to these
codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from benchmarks.peers.encoding import CPU, Clause, Formula, Inequality, Unsupported, encode_network
from benchmarks.peers.rows import encode_rows
from qverify.boundary.domain import Domain, make_domain
from qverify.boundary.outputs import Decoder, make_decoder
from qverify.frontend.encoder import Encoder, make_encoder
from qverify.frontend.model import read_model
from qverify.network import Network
from qverify.property import Property, Query, Row
from qverify.vnnlib.reader import read_property

REFINEMENTS = 1000  # so often may a peer's answer be refined


@dataclass(frozen=True)
class Answer:
    """`verdict` is sat, unsat, timeout, unknown, unsupported or error; `codes` [codes] go with
    sat."""

    verdict: str
    reason: str = ""
    codes: tuple[int, ...] | None = None


Solve = Callable[[Formula, float], Answer]  # a formula and the seconds left


@dataclass(frozen=True, eq=False)
class Instance:
    """A model and a property as `read_model` and `read_property` give them."""

    network: Network
    encoder: Encoder
    decoder: Decoder
    property: Property


def load(model: Path, spec: Path) -> Instance:
    """Read both files. Raises qverify's own errors."""
    lowered = read_model(model).lowered
    return Instance(
        lowered.network, make_encoder(lowered), make_decoder(lowered), read_property(spec)
    )


def row_holds(row: Row, y: Sequence[float]) -> bool:
    """Whether a row without inputs holds for exact output values."""
    total = sum((c * Fraction(float(y[j])) for j, c in row.y), Fraction(0))
    return total < row.rhs if row.strict else total <= row.rhs


def is_unsafe(instance: Instance, query: Query, codes: Sequence[int]) -> bool:
    """Whether the integer network's outputs for `codes` satisfy a case of the query; exact."""
    y = instance.decoder.decode(instance.network.run(CPU, np.array([codes], np.int32)))[0]
    return any(all(row_holds(row, y) for row in case) for case in query.cases)


def unreachable(domain: Domain, formula: Formula, codes: Sequence[int]) -> Clause | None:
    """None where some input in the domain has these codes; else a clause that rules out codes which
    none has."""
    point = np.array(codes, np.int32)
    if domain.lift(point) is not None:
        return None
    first, last, empty = domain.code_cells(point, point)
    lower, upper = domain.spread(first[None], last[None])
    source = domain.encoder.source
    bad = empty | np.where(source >= 0, (lower > upper)[0][np.maximum(source, 0)], False)
    element = source[np.flatnonzero(bad)[0]]
    guilty = np.flatnonzero(empty)[:1] if empty.any() else np.flatnonzero(source == element)
    free = [i for i in guilty.tolist() if not formula.fixed(formula.inputs[i])]
    return tuple(
        Inequality(((step, formula.inputs[i]),), step * codes[i] - 1)
        for i in free
        for step in (1, -1)
    )


def decide(instance: Instance, solve: Solve, timeout: float) -> Answer:
    """The peer's answer to all queries of an instance within `timeout` seconds, checked and
    refined.

    A `sat` that fails the check is an `error`, or `unknown` where the peer said with its answer why
    that may be.
    """
    end = time.monotonic() + timeout
    undecided: Answer | None = None
    try:
        for query in instance.property.queries:
            answer = _decide_query(instance, query, solve, end)
            if answer.verdict == "sat":
                return answer
            undecided = undecided if answer.verdict == "unsat" else undecided or answer
    except Unsupported as error:
        return Answer("unsupported", str(error))
    return undecided or Answer("unsat")


def _decide_query(instance: Instance, query: Query, solve: Solve, end: float) -> Answer:
    domain = make_domain(instance.encoder, query.box)
    formula, outputs = encode_network(instance.network, *domain.code_box())
    rows = encode_rows(formula, outputs, instance.decoder, query)
    formula.tidy()
    for _ in range(REFINEMENTS):
        left = end - time.monotonic()
        if left <= 0:
            return Answer("timeout")
        answer = solve(formula, left)
        if answer.verdict != "sat":
            return answer
        assert answer.codes is not None
        if is_unsafe(instance, query, answer.codes):
            clause = unreachable(domain, formula, answer.codes)
            if clause is None:
                return Answer("sat", codes=answer.codes)
            formula.clauses.append(clause)
        elif not rows.refine(formula, formula.evaluate(answer.codes)):
            verdict = "unknown" if answer.reason else "error"
            return Answer(verdict, answer.reason or "the solver's codes are no counterexample")
    return Answer("unknown", f"{REFINEMENTS} answers were refined")
