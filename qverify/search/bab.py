"""Branch and bound over boxes of input codes.

Sound: a box is closed only when interval or backward bounds refute every unsafe case on it, or when
it is a single code vector that is not unsafe or that no input in the domain produces. The children
of a split cover their parent. So an empty frontier means that no input in the domain is unsafe.

Complete (the lemma): every split cuts the range of a variable that holds at least two codes, so
both children hold fewer code vectors than their parent, which are finitely many; a single code
vector is closed by bounds, or the leaf rule decides it (`boundary/leaves.py`): by exact evaluation,
or by the runtime where an op has a band. Hence the search ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qverify.deadline import Deadline, TimeUp, look
from qverify.options import Options
from qverify.result import Progress, Stats, Verdict
from qverify.search import enumeration
from qverify.search.attack import Attack, corners, slack_gradient
from qverify.search.branch import RULES, BranchingContext, split
from qverify.search.cuts import CutSearch
from qverify.search.enumeration import Points
from qverify.search.frontier import Frontier, Provenance
from qverify.search.problem import Candidate, Problem
from qverify.search.proof import Proof

FRONTIER_BYTES = 4 << 30  # in the host's memory
# On a GPU, so much more in its memory: at most so many bytes, and this part of what is free.
RESIDENT = (
    16 << 30,
    0.25,
)
PROVED = "every part of the box is proved"
# points for each case that are evaluated rather than attacked, which costs no less: 17 steps from
# four starts
SWEPT = 68
# Seconds for the points of a box after a first look at it; or this part of the time left.
PATIENCE, PATIENT = (
    2.0,
    0.05,
)
INNER_PART = 0.25  # of the time left for the first bounds of inner values
SPLITTABLE = 12  # inputs: a box with more that vary is searched by cuts on neurons
TRIED_CORNERS = 64  # of a batch's boxes, those that look most unsafe also have a corner tried
# On a CPU what caches hold (measured: half the time per box).
BATCH_BYTES = {
    "cpu": 8 << 20,
    "cuda": 4 << 30,
}
BATCH_PART = 0.25  # of a GPU's free memory, where that is less


@dataclass(frozen=True)
class Outcome:
    """How the search of one query ended; `candidate` is present where it ended with `sat`, to be
    replayed."""

    verdict: Verdict
    reason: str
    candidate: Candidate | None = None


class BackwardBudget:
    """Whether backward bounds are worth their price: they cost some ten interval bounds, so they go
    on while they close at least every eighth box, and are tried again from time to time."""

    def __init__(self, possible: bool) -> None:
        self._possible, self._tried, self._closed, self._skipped = possible, 0.0, 0.0, 0

    def now(self) -> bool:
        """Whether the next batch should be bounded backward."""
        if not self._possible:
            return False
        if 8 * self._closed >= self._tried or self._tried < 256 or self._skipped >= 32:
            self._skipped = 0
            return True
        self._skipped += 1
        return False

    def count(self, tried: int, closed: int) -> None:
        """Record a batch; older ones fade."""
        self._tried, self._closed = 0.9 * self._tried + tried, 0.9 * self._closed + closed


def batch_size(problem: Problem) -> int:
    """As many boxes as fit the machine's share of memory: two ends and about as much again in
    scratch per value."""
    each, kernels = 16 * problem.network.elements_per_point(), problem.kernels
    room = kernels.allowance(BATCH_BYTES[kernels.name], BATCH_PART)
    return int(np.clip(room // each, 16, 4096 if kernels.name == "cpu" else 1 << 20))


def search(
    problem: Problem,
    options: Options,
    deadline: Deadline,
    rng: np.random.Generator,
    stats: Stats,
    report: Callable[[Progress], None] | None = None,
    proof: Proof | None = None,
) -> Outcome:
    """Decide one query: bounds and attack on the whole box, then split until nothing is open, a
    counterexample is found, or time is up. Where the box has few points, all of them are evaluated
    instead."""
    run = Run(problem, options, deadline, stats, report, proof)
    problem.thorough = proof is not None
    try:
        with deadline.limits():
            return _searched(run, rng)
    except TimeUp:
        return Outcome(
            Verdict.TIMEOUT, f"time is up with {run.open} parts open, {run.proved:.1%} proved"
        )


def _searched(run: Run, rng: np.random.Generator) -> Outcome:
    problem, options, stats, proof = run.problem, run.options, run.stats, run.proof
    kernels = problem.kernels
    if options.attack:
        run.attack = Attack(problem, rng, stats, options.batch or batch_size(problem))
    lower, upper = kernels.asarray(problem.lower[None]), kernels.asarray(problem.upper[None])
    status, _ = problem.bound(lower, upper)
    if (status == 0).all() or bool((lower == upper).all()):
        return split_boxes(run)
    points = Points(
        problem,
        options.batch or batch_size(problem),
        enumeration.MOST if proof is None else enumeration.MOST_CERTIFIED,
    )
    if (
        points.count <= SWEPT * len(problem.unsafe.cases)
        and (outcome := run.sweep(points, np.inf)) is not None
    ):
        return outcome
    if run.attack is not None and (found := run.attack.attack_round()) is not None:
        return Outcome(Verdict.SAT, "found by the attack", found)
    status = problem.refute(lower, upper, status)
    if status.any() and problem.relaxed() is not None:
        if (
            outcome := run.sweep(points, max(PATIENCE, PATIENT * min(run.deadline.left(), 600.0)))
        ) is not None:
            return outcome
        problem.bound_intermediate(run.deadline.share(INNER_PART))
        status = problem.refute(lower, upper, status)
    if (status == 0).all():
        stats.subproblems += 1
        stats.proved += 1
        if proof is not None:
            proof.close([0])
        return run.done()
    return cut_neurons(run, status[0]) if _prefers_cuts(problem, status[0]) else split_boxes(run)


@dataclass(eq=False)
class Run:
    """What goes along with a search."""

    problem: Problem
    options: Options
    deadline: Deadline
    stats: Stats
    report: Callable[[Progress], None] | None
    proof: Proof | None
    attack: Attack | None = None
    open: int = 1  # parts that wait
    proved: float = 0.0  # the share of the search that is done

    def attack_round(self) -> Outcome | None:
        """A round of the attack, if its turn has come."""
        if self.attack is None or not self.attack.due():
            return None
        found = self.attack.attack_round()
        return None if found is None else Outcome(Verdict.SAT, "found by the attack", found)

    def sweep(self, points: Points, patience: float) -> Outcome | None:
        """Evaluate all points of the box; None where they are too many for the options or for so
        many seconds."""
        if not self.options.sweep:
            return None
        before = points.done
        found = points.sweep(patience)
        self.stats.leaves += points.done - before
        if found is not None:
            return Outcome(Verdict.SAT, "found among all points of the box", found)
        if points.done < points.count:
            return None
        if self.proof is not None:
            points.note(self.proof)
        self.tell(0, 1.0)
        return self.done()

    def close(self, entries: Any) -> None:
        """Note boxes that were closed."""
        if self.proof is not None:
            self.proof.close(entries)

    def cut(self, entries: Any, lower: Any, upper: Any, variable: Any) -> Any:
        """Note that boxes are split in the middle of a variable; the children's entries."""
        if self.proof is None:
            return 0
        rows = self.problem.kernels.xp.arange(len(variable))
        low, high = (self.problem.kernels.to_host(end[rows, variable]) for end in (lower, upper))
        return self.proof.cut(
            entries, 0, self.problem.kernels.to_host(variable), (low + high) // 2 + 1
        )

    def tell(self, open_: int, proved: float) -> None:
        """Note how many subproblems are open, and report progress."""
        self.stats.max_open = max(self.stats.max_open, open_)
        self.open, self.proved = open_, min(max(proved, 0.0), 1.0)  # sums of shares are rounded
        if self.report is not None:
            self.report(
                Progress(self.deadline.elapsed(), self.stats.subproblems, open_, self.proved)
            )

    def done(self) -> Outcome:
        """The outcome when nothing is open."""
        reason = self.problem.undecided
        return Outcome(Verdict.UNKNOWN, reason) if reason else Outcome(Verdict.UNSAT, PROVED)


def _prefers_cuts(problem: Problem, status: Any) -> bool:
    """Whether to cut neurons: where all open cases can be expressed, and the box is too wide to be
    split along its inputs."""
    relaxed = problem.relaxed()
    if relaxed is None or any(relaxed.cover.cases[k] is None for k in np.flatnonzero(status)):
        return False
    return int((problem.upper > problem.lower).sum()) > SPLITTABLE


def cut_neurons(run: Run, status: Any) -> Outcome:
    """Refute the regions of the open cases (`status` [cases] on the whole box) by cuts on
    neurons."""
    problem = run.problem
    relaxed = problem.relaxed()
    assert relaxed is not None
    regions = [r for k in np.flatnonzero(status) for r in relaxed.cover.cases[k] or ()]
    entries = np.zeros(len(regions), np.int64) if run.proof is None else run.proof.part(regions)
    tree = _rooted(run)
    whole = Provenance(
        np.array(regions, np.int64), entries, np.full(len(regions), 1 / len(regions))
    )
    run.tell(len(regions), 0.0)
    found, rest = tree.root(whole, to_the_end=False)
    if (
        found is None and tree.open
    ):  # it takes more: better bounds of inner values, and the rest of the regions again
        run.tell(tree.open + len(rest), 1 - tree.open_share - rest.share.sum())
        problem.bound_intermediate(run.deadline.share(0.25))
        rest = Provenance.joined([*(nodes.origin for nodes in tree.waiting.blocks), rest])
        tree = _rooted(run)
        found, _ = tree.root(rest)
    while found is None and tree.open:
        look()
        outcome = run.attack_round()
        if outcome is not None:
            return outcome
        if problem.narrow():  # from the beginning, with fewer regions
            run.proof = None
            status, _ = problem.bound(
                *(problem.kernels.asarray(end[None]) for end in (problem.lower, problem.upper))
            )
            return (
                cut_neurons(run, status[0])
                if _prefers_cuts(problem, status[0])
                else split_boxes(run)
            )
        found = tree.step()
        run.tell(tree.open, 1 - tree.open_share)
    return run.done() if found is None else Outcome(Verdict.SAT, "found by the search", found)


def _rooted(run: Run) -> CutSearch:
    """A search by cuts, with the bounds of inner values that are known by now."""
    problem, relaxed = run.problem, run.problem.relaxed()
    assert relaxed is not None
    lower, upper = (problem.kernels.asarray(end[None]) for end in (problem.lower, problem.upper))
    clamps = relaxed.inner.clamps if relaxed.inner is not None else {}
    root, _ = problem.network.boxes(problem.kernels, lower, upper, clamps)
    return CutSearch.make(problem, relaxed, root, run.stats, run.proof, run.deadline)


def split_boxes(run: Run) -> Outcome:
    """Split the input box along its variables."""
    problem, stats = run.problem, run.stats
    kernels, xp = problem.kernels, problem.kernels.xp
    root = _log_volume(problem.lower[None], problem.upper[None])[0]
    resident = kernels.allowance(*RESIDENT) if kernels.name != "cpu" else 0
    frontier = Frontier(kernels, len(problem.lower), FRONTIER_BYTES + resident, resident or None)
    frontier.push(kernels.asarray(problem.lower[None]), kernels.asarray(problem.upper[None]))
    batch = run.options.batch or batch_size(problem)
    rule = RULES[run.options.branch]
    pays = BackwardBudget(problem.dual is not None)
    proved = 0.0
    while frontier.size:
        look()
        lower, upper = frontier.pop(batch)
        entries = frontier.taken
        status, least = problem.bound(lower, upper)
        stats.subproblems += len(status)
        open_ = (status != 0).any(axis=1)
        closed = np.flatnonzero(~open_)
        proved += _volume_share(kernels, lower, upper, closed, root)
        stats.proved += len(closed)
        run.close(entries[closed])
        if open_.any():
            at = kernels.asarray(np.flatnonzero(open_))
            lower, upper, least, status, entries = (
                lower[at],
                upper[at],
                least[open_],
                status[open_],
                entries[open_],
            )
            points = (lower == upper).all(axis=1)
            if points.any():
                found = _leaves(problem, lower[points], stats)
                if found is not None:
                    return Outcome(Verdict.SAT, "found by the search", found)
                proved += _volume_share(
                    kernels, lower, upper, np.flatnonzero(kernels.to_host(points)), root
                )
                wide = ~kernels.to_host(points)
                run.close(entries[~wide])
                lower, upper, least, status = (
                    lower[~points],
                    upper[~points],
                    least[wide],
                    status[wide],
                )
                entries = entries[wide]
            if len(least) and (outcome := run.attack_round()) is not None:
                return outcome
            if len(least) and pays.now():
                left = (problem.refute(lower, upper, status) != 0).any(axis=1)
                pays.count(len(left), int((~left).sum()))
                stats.proved += int((~left).sum())
                proved += _volume_share(kernels, lower, upper, np.flatnonzero(~left), root)
                run.close(entries[~left])
                at = kernels.asarray(np.flatnonzero(left))
                lower, upper, least, entries = lower[at], upper[at], least[left], entries[left]
            if len(least):
                variable, found = _choose(
                    problem, rule, lower, upper, least, stats, run.options.attack
                )
                if found is not None:
                    return Outcome(Verdict.SAT, "found by the attack on a part of the box", found)
                variable = xp.asarray(variable)
                entries = run.cut(entries, lower, upper, variable)
                frontier.push(*split(kernels, lower, upper, variable), entries)
        run.tell(frontier.size, proved)
    return run.done()


def _leaves(problem: Problem, points: Any, stats: Stats) -> Candidate | None:
    """Decide single code vectors."""
    stats.leaves += points.shape[0]
    return problem.find_unsafe(points, problem.evaluate(points))


def _choose(
    problem: Problem, rule: Any, lower: Any, upper: Any, least: Any, stats: Stats, try_points: bool
) -> tuple[Any, Candidate | None]:
    """The variable to split in each box, by the gradient at its centre; on the way, the centre and
    the corner that the gradient points to are tried as counterexamples."""
    centre = (lower + upper) // 2
    values = problem.network.values(problem.kernels, centre)
    slack, rows = problem.unsafe.slack_of(least)
    case = slack.argmax(axis=1)  # the case with the most room to be unsafe
    gradient = slack_gradient(problem, values, rows[np.arange(len(case)), case])
    context = BranchingContext(problem.kernels, lower, upper, gradient)
    if try_points:
        found, tried = problem.try_joint()
        if found is None:
            found = problem.find_unsafe(centre, problem.outputs(values))
        if found is None:
            best = problem.kernels.asarray(np.argsort(-slack.max(axis=1))[:TRIED_CORNERS])
            corner = corners(problem, lower[best], upper[best], gradient[best])
            found = problem.find_unsafe(corner, problem.evaluate(corner))
        stats.attack_points += tried + len(case) + min(len(case), TRIED_CORNERS)
        if found is not None:
            return None, found
    return rule(context), None


def _log_volume(lower: Any, upper: Any) -> Any:
    """log2 of the number of code vectors in each box, on the host."""
    return np.log2((upper - lower + 1).astype(np.float64)).sum(axis=1)


def _volume_share(kernels: Any, lower: Any, upper: Any, rows: Any, root: float) -> float:
    """The share of the root box's code vectors that the given boxes hold (for progress only)."""
    if not len(rows):
        return 0.0
    at = kernels.asarray(rows)
    logs = _log_volume(kernels.to_host(lower[at]), kernels.to_host(upper[at]))
    return float(np.exp2(logs - root).sum())
