"""Branch and bound: how one query is decided.

`RUNGS` are tried in order, each cheaper than what follows: a rung returns the outcome, or None to
go on. What they leave open is searched as a tree, by cuts on neurons or by splitting the input box.

Sound: a query is safe only if bounds refute every unsafe case on the whole box, if all of its
points were evaluated, or if a tree whose children cover their parents has nothing open. Complete:
both trees are finite (`splitting`, `cuts`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qverify.deadline import Deadline, TimeUp, look
from qverify.options import Options
from qverify.result import Progress, Stats, Verdict
from qverify.search import enumeration
from qverify.search.attack import Attack
from qverify.search.bounds import INTERVALS, Boxes, backward_bounds, refute
from qverify.search.branch import AUTO, AUTO_INPUTS, AUTO_NEURONS, INPUT_RULES, NEURON_RULES
from qverify.search.cuts import NeuronCuts
from qverify.search.enumeration import Points
from qverify.search.frontier import Provenance
from qverify.search.knowledge import Knowledge, Relaxed
from qverify.search.observer import Observer
from qverify.search.problem import BoolArray, Problem
from qverify.search.proof import Proof
from qverify.search.run import Found, Outcome, Run
from qverify.search.splitting import BoxSplitting
from qverify.search.watch import Watch

# Points for each case that are evaluated rather than attacked, which costs no less: 17 steps from
# four starts.
SWEPT = 68
# Seconds for the points of a box after a first look at it; or this part of the time left.
PATIENCE, PATIENT = 2.0, 0.05
INTERMEDIATE_PART = 0.25  # of the time left, for bounds of intermediate values
SPLITTABLE = 12  # inputs: a box with more that vary is searched by cuts on neurons

Tree = BoxSplitting | NeuronCuts


def search(
    problem: Problem,
    options: Options,
    deadline: Deadline,
    rng: np.random.Generator,
    stats: Stats,
    report: Callable[[Progress], None] | None = None,
    proof: Proof | None = None,
    watch: Watch | None = None,
) -> Outcome:
    """Decide one query: bounds and attack on the whole box, then split until nothing is open, a
    counterexample is found, or time is up. Where the box has few points, all of them are evaluated
    instead. Raises Undecided where an output may be infinite."""
    observer = Observer(problem.kernels, stats, deadline, proof, report, watch)
    known = Knowledge(problem, observer, certified=proof is not None)
    run = Run(options, deadline, known, observer)
    if options.attack:
        run.attack = Attack(known, rng, observer, run.box_batch)
    try:
        with deadline.limits():
            outcome = _decide(run)
    except TimeUp:
        reason = f"time is up with {observer.open} parts open, {observer.share:.1%} proved"
        return Outcome(Verdict.TIMEOUT, reason)
    if proof is not None:
        known.note(proof)
    return outcome


def _decide(run: Run) -> Outcome:
    root = Root(run)
    for rung in RUNGS:
        if (outcome := rung(root)) is not None:
            return outcome
    return _searched(run, root.refuted[0])


# -- the whole box ---------------------------------------------------------------------------------


class Root:
    """The whole box, and which cases are refuted there: bool [1, cases]."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.box = Boxes(*run.problem.root)
        self.refuted = bounded_root(run)
        most = enumeration.MOST_CERTIFIED if run.known.certified else enumeration.MOST
        self.points = Points(run.known, run.box_batch, most)

    @property
    def settled(self) -> bool:
        """Whether one batch of the search by boxes is all that it takes."""
        return bool(self.refuted.all() or (self.box.lower == self.box.upper).all())


def bounded_root(run: Run) -> BoolArray:
    """The cases that intervals refute on the whole box: [1, cases]."""
    box = Boxes(*run.problem.root)
    found = INTERVALS.refute(run.known, box, run.all_cases(1), run.deadline).cases
    run.observer.ruled_out(box.lower, box.upper, found, INTERVALS.name)
    return found


def settle(root: Root) -> Outcome | None:
    """Intervals close the box, or it is a point."""
    return grown(root.run, _splitting(root.run)) if root.settled else None


def enumerate_few(root: Root) -> Outcome | None:
    """Evaluate all points, if the attack would try about as many."""
    few = root.points.count <= SWEPT * len(root.run.known.sought.cases)
    return root.run.sweep(root.points, np.inf) if few else None


def attack(root: Root) -> Outcome | None:
    """A first round of the attack."""
    found = root.run.attack_round()
    return None if found is None else found.outcome()


def bound_backward(root: Root) -> Outcome | None:
    """Backward bounds, with intervals of the intermediate values."""
    _refute(root)
    return None


def enumerate_patiently(root: Root) -> Outcome | None:
    """Evaluate all points, if that takes little of the time left."""
    run = root.run
    if not _worth_more(root):
        return None
    return run.sweep(root.points, max(PATIENCE, PATIENT * min(run.deadline.left(), 600.0)))


def bound_intermediate(root: Root) -> Outcome | None:
    """Backward bounds once more, with tighter intermediate bounds."""
    run = root.run
    if _worth_more(root):
        run.known.bound_intermediate(run.deadline.share(INTERMEDIATE_PART))
        _refute(root)
    if not root.refuted.all():
        return None
    run.observer.bounded(1)
    run.observer.closed(np.zeros(1, np.int64))
    return run.done()


RUNGS: tuple[Callable[[Root], Outcome | None], ...] = (
    settle,
    enumerate_few,
    attack,
    bound_backward,
    enumerate_patiently,
    bound_intermediate,
)


def _worth_more(root: Root) -> bool:
    return not root.refuted.all() and root.run.known.relaxed() is not None


def _refute(root: Root) -> None:
    run = root.run
    bounds = backward_bounds(run.known.certified)
    root.refuted = refute(run.known, root.box, root.refuted, bounds, run.deadline)


# -- trees -----------------------------------------------------------------------------------------


def _searched(run: Run, refuted: BoolArray) -> Outcome:
    """Search what is left of the cases, `refuted` [cases] on the whole box, as a tree."""
    relaxed = run.known.relaxed()
    if relaxed is not None and prefers_cuts(run, relaxed, refuted):
        return cut_neurons(run, relaxed, refuted)
    return grown(run, _splitting(run))


def prefers_cuts(run: Run, relaxed: Relaxed, refuted: BoolArray) -> bool:
    """Whether to cut neurons: where all open cases can be expressed, and the user asked for it or
    the box is too wide to be split along its inputs."""
    if any(relaxed.regions.cases[k] is None for k in np.flatnonzero(~refuted)):
        return False
    if run.options.branch != AUTO:
        return run.options.branch in NEURON_RULES
    return int((run.problem.upper > run.problem.lower).sum()) > SPLITTABLE


def _splitting(run: Run) -> BoxSplitting:
    asked = run.options.branch
    return BoxSplitting(run, INPUT_RULES[asked if asked in INPUT_RULES else AUTO_INPUTS])


def _cutting(run: Run, relaxed: Relaxed) -> NeuronCuts:
    asked = run.options.branch
    rule = NEURON_RULES[asked if asked in NEURON_RULES else AUTO_NEURONS]
    return NeuronCuts.make(run, rule, relaxed)


def cut_neurons(run: Run, relaxed: Relaxed, refuted: BoolArray) -> Outcome:
    """Refute the regions of the open cases by cuts on neurons."""
    regions = [r for k in np.flatnonzero(~refuted) for r in relaxed.regions.cases[k] or ()]
    if not regions:  # a case without a region holds nowhere
        run.observer.closed(np.zeros(1, np.int64))
        return run.done()
    share = np.full(len(regions), 1 / len(regions))
    entries = run.observer.parted(regions)
    whole = Provenance(np.array(regions, np.int64), entries, share)
    tree = _cutting(run, relaxed)
    run.observer.progress(len(regions), 0.0)
    found, rest = tree.root(whole, to_the_end=False)
    if found is None and tree.open:
        # One group was not enough: bound intermediate values better, then begin again.
        run.observer.progress(tree.open + len(rest), tree.share - rest.share.sum())
        run.known.bound_intermediate(run.deadline.share(INTERMEDIATE_PART))
        waiting = [block.provenance for block in tree.frontier.blocks]
        again = run.known.relaxed()
        assert again is not None
        tree = _cutting(run, again)
        found, _ = tree.root(Provenance.joined(run.problem.kernels, [*waiting, rest]))
    return grown(run, tree) if found is None else found.outcome()


def grown(run: Run, tree: Tree) -> Outcome:
    """Step until nothing is open. Where less is sought on the way, cuts begin anew."""
    while tree.open:
        look()
        if run.known.narrow() and isinstance(tree, NeuronCuts):
            run.observer.forget_proof()
            return _searched(run, bounded_root(run)[0])
        found: Found | None = tree.step()
        run.observer.progress(tree.open, tree.share)
        if found is not None:
            return found.outcome()
    return run.done()
