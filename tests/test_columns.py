"""Every op stands in every column: with a rule, or with the reason why it needs none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.peers.encoding import ENCODINGS
from qverify import inspect
from qverify.checker import bounds as checker_bounds
from qverify.checker import ops as checker_ops
from qverify.errors import Rejected
from qverify.ops import ALL, AbstractOp, Mean, Requantize, Softmax, Type
from qverify.ops.columns import Column, MissingRule
from qverify.propagate.device_rules import DEVICE_RULES
from qverify.propagate.rules import GRAPH_RULES

COLUMNS: list[Column[Any]] = [GRAPH_RULES, DEVICE_RULES, inspect.DETAILS, ENCODINGS]
# Ops whose backward rule is that of `AbstractOp`: the pass stops at their results' bounds.
STOPS_THE_BACKWARD_PASS = {
    Mean: "its result is a float32's ordinal, of too many values for steps",
    Softmax: "a function of all its inputs, for which there is no hull",
}
by_place = pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.place)
by_op = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)


@dataclass(frozen=True)
class Unheard(Requantize):
    """An op that nobody has heard of, although it is like another one."""


def unheard() -> Unheard:
    op: Unheard = object.__new__(Unheard)
    return op


def test_all_ops_are_listed() -> None:
    """But for those that other tests define."""
    ops = {kind for kind in AbstractOp.__subclasses__() if kind.__module__.startswith("qverify.")}
    assert ops == set(ALL), "list them in ALL of qverify/ops/__init__.py"


@by_place
def test_no_column_names_anything_else(column: Column[Any]) -> None:
    assert {*column.rules, *column.by_the_op} <= set(ALL)
    assert all(reason.strip() for reason in column.by_the_op.values())


@by_op
@by_place
def test_a_rule_or_a_reason_and_not_both(column: Column[Any], kind: type[AbstractOp]) -> None:
    named = (kind in column.rules) + (kind in column.by_the_op)
    assert named == 1, f"give {kind.__name__} a rule or a reason in the column of {column.place}"


@by_place
def test_an_op_that_a_column_does_not_name_is_refused_by_name(column: Column[Any]) -> None:
    with pytest.raises(MissingRule, match=f"{column.place} has no rule for Unheard"):
        column.rule(unheard())


@by_op
def test_backward_rules(kind: type[AbstractOp]) -> None:
    stops = kind.relaxation is AbstractOp.relaxation
    assert stops == (kind in STOPS_THE_BACKWARD_PASS), (
        f"give {kind.__name__} a relaxation, or a reason in STOPS_THE_BACKWARD_PASS"
    )


# -- the checker's, which share nothing with the others --------------------------------------------


@by_op
def test_the_checker_knows_the_interval_of_every_op(kind: type[AbstractOp]) -> None:
    known = (kind in checker_ops.LINEAR) + (kind in checker_ops.NONLINEAR)
    assert known == 1, (
        f"give {kind.__name__} a rule in LINEAR or NONLINEAR of qverify/checker/ops.py"
    )


@by_op
def test_the_checker_takes_every_op_backward_or_says_why_not(kind: type[AbstractOp]) -> None:
    ruled = {op for _, op in checker_bounds.RULES}
    taken = (kind in checker_ops.LINEAR) + (kind in ruled) + (kind in checker_bounds.INTERVALS_ONLY)
    assert taken == 1, (
        f"give {kind.__name__} a rule in RULES, or a reason in INTERVALS_ONLY, of checker/bounds.py"
    )


def test_the_checker_rejects_an_op_that_it_does_not_know() -> None:
    kind = Type((1,), 0, 1)
    with pytest.raises(Rejected, match="Unheard"):
        checker_ops.nonlinear(unheard(), (kind,))
    with pytest.raises(Rejected, match="Unheard"):
        checker_bounds.make_rule("staircase", None, unheard(), (kind,), kind)
