"""What stops a model from being read, all of it at once, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qverify.errors import UnsupportedModel

NAMED, TOLD = 3, 4  # further nodes of a kind that are named; kinds that are told


@dataclass(frozen=True)
class Blocker:
    """A node (an input, an output) that cannot be read, and why.

    Those of one op and one `kind` are told together.
    """

    reason: str
    node: str = ""  # its name in the file
    what: str = ""  # its op, and perhaps its inputs
    kind: str = ""

    @property
    def text(self) -> str:
        """The whole line."""
        return f"node '{self.node}' ({self.what}): {self.reason}" if self.what else self.reason


def refused(blockers: Sequence[Blocker], behind: int = 0) -> UnsupportedModel:
    """The error of a model that has these blockers.

    `behind` nodes were not looked at, since they need what others give.
    """
    groups: dict[tuple[str, str], list[Blocker]] = {}
    for blocker in blockers:
        groups.setdefault((_op(blocker), blocker.kind or blocker.reason), []).append(blocker)
    told = [_together(group) for group in list(groups.values())[:TOLD]]
    if len(groups) > TOLD:
        count = sum(map(len, list(groups.values())[TOLD:]))
        told.append(f"and {count} more; qverify inspect MODEL lists all")
    lines = [blocker.text for blocker in blockers]
    if behind and len(lines) > 1:
        nodes = "1 node was" if behind == 1 else f"{behind} nodes were"
        lines.append(f"{nodes} not looked at, for want of what these would give")
    return UnsupportedModel("; ".join(told), lines if len(lines) > 1 else ())


def _op(blocker: Blocker) -> str:
    return blocker.what.split(" of ")[0]


def _together(group: list[Blocker]) -> str:
    first, *others = group
    if not others or not first.what:
        return "; ".join(blocker.text for blocker in group)
    names = (
        f"and '{others[0].node}'"
        if len(others) == 1
        else ", ".join(f"'{other.node}'" for other in others)
    )
    more = f"and {len(others)} more {_op(first)} nodes"
    if len(others) <= NAMED:
        more = names if len(others) == 1 else f"and {names}"
    return f"node '{first.node}' ({first.what}) {more}: {first.reason}"
