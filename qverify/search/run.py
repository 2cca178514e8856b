"""What goes along with the search of one query, whichever way it is searched."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qverify.deadline import Deadline
from qverify.options import Options
from qverify.result import Verdict
from qverify.search import memory
from qverify.search.attack import Attack
from qverify.search.enumeration import Points
from qverify.search.knowledge import Knowledge
from qverify.search.observer import Observer
from qverify.search.problem import BoolArray, Candidate, Problem

PROVED = "every part of the box is proved"


@dataclass(frozen=True)
class Outcome:
    """How the search of one query ended; `candidate` is present where it ended with `sat`, to be
    replayed."""

    verdict: Verdict
    reason: str
    candidate: Candidate | None = None


@dataclass(frozen=True)
class Found:
    """A counterexample, and what found it."""

    candidate: Candidate
    how: str

    def outcome(self) -> Outcome:
        """The end of the search."""
        return Outcome(Verdict.SAT, self.how, self.candidate)


@dataclass(eq=False)
class Run:
    """One search: its problem, what is known, who observes, and the attack."""

    options: Options
    deadline: Deadline
    known: Knowledge
    observer: Observer
    attack: Attack | None = None
    box_batch: int = field(init=False)  # boxes that are bounded at once

    def __post_init__(self) -> None:
        problem = self.problem
        fitting = memory.box_batch(problem.kernels, problem.network)
        self.box_batch = self.options.batch or fitting

    @property
    def problem(self) -> Problem:
        """The query."""
        return self.known.problem

    def all_cases(self, count: int) -> BoolArray:
        """Every case asked of `count` boxes: [count, cases]."""
        return np.ones((count, len(self.known.sought.cases)), np.bool_)

    def attack_round(self) -> Found | None:
        """A round of the attack, if its turn has come."""
        if self.attack is None or not self.attack.due():
            return None
        found = self.attack.attack_round()
        return None if found is None else Found(found, "found by the attack")

    def sweep(self, points: Points, patience: float) -> Outcome | None:
        """Evaluate all points of the box; None where they are too many for the options or for so
        many seconds."""
        if not self.options.sweep:
            return None
        before = points.done
        found = points.sweep(patience)
        self.observer.decided(points.done - before)
        if found is not None:
            return Found(found, "found among all points of the box").outcome()
        if points.done < points.count:
            return None
        if self.observer.proof is not None:
            points.note(self.observer)
        self.observer.progress(0, 1.0)
        return self.done()

    def done(self) -> Outcome:
        """The outcome when nothing is open."""
        doubt = self.known.undecided
        return Outcome(Verdict.UNKNOWN, doubt) if doubt else Outcome(Verdict.UNSAT, PROVED)
