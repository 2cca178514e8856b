"""Columns: what one part of qverify does for each class of op.

An op stands in every column, either with a rule or with the reason why the op itself is enough
there. So a new op cannot get a slow or an empty default unnoticed: a test goes through all columns,
and an op that a column does not name raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from qverify.ops.base import AbstractOp

Rule = TypeVar("Rule")


class MissingRule(NotImplementedError):
    """An op that a column does not name: a mistake in qverify."""


@dataclass(frozen=True)
class Column(Generic[Rule]):
    """The rules of one part of qverify, by class of op."""

    place: str  # where its rules are written
    rules: Mapping[type[AbstractOp], Rule]
    by_the_op: Mapping[type[AbstractOp], str]  # and why that is enough

    def rule(self, op: AbstractOp) -> Rule | None:
        """The rule of an op; None where the op itself is enough. Raises MissingRule."""
        kind = type(op)
        if kind in self.rules:
            return self.rules[kind]
        if kind in self.by_the_op:
            return None
        raise MissingRule(
            f"{self.place} has no rule for {kind.__name__}, and does not say why it needs none"
        )
