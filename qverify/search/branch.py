"""Where to split: branching rules, for inputs and for neurons. Guides only.

A rule looks at subproblems and says of each where it is cut in two: an entry of its bounds and a
threshold, at most `threshold` - 1 on one side and at least `threshold` on the other. An entry that
may be cut holds more than one integer, so each child is strictly smaller than its parent: that, and
the exactness of bounds on points, makes the search end (see `splitting` and `cuts`).

`RULES` names the rules that `--branch` offers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from qverify.bounds.dual import Dual, Primal
from qverify.bounds.improve import Point
from qverify.kernels import Array, Kernels
from qverify.ops import Interval
from qverify.ops.relax import GUIDE, NonlinearRelaxation


@dataclass(frozen=True, eq=False)
class Cut:
    """Where N subproblems are cut, on the machine."""

    entry: Array  # int64 [N]
    threshold: Array  # int32 [N]
    possible: Array  # bool [N]: False where there is nothing to cut


CANDIDATES = 6  # cuts whose parts are looked at

View = TypeVar("View", contravariant=True)


class Branching(ABC, Generic[View]):
    """A rule, for subproblems that are seen as a `View`."""

    @abstractmethod
    def choose(self, view: View) -> Cut:
        """Where to cut each subproblem."""


# -- inputs ----------------------------------------------------------------------------------------


def middle(kernels: Kernels, lower: Array, upper: Array, variable: Array) -> Cut:
    """Boxes [N, codes] cut in the middle of a variable each [N]."""
    rows = kernels.xp.arange(len(lower))
    low, high = lower[rows, variable], upper[rows, variable]
    return Cut(variable, (low + high) // 2 + 1, low < high)


@dataclass(frozen=True, eq=False)
class BoxView:
    """What a rule for inputs looks at: boxes int32 [N, codes] and, per box, the gradient float32
    [N, codes] of the slack of the case that looks most unsafe, at the box's centre."""

    kernels: Kernels
    lower: Array
    upper: Array
    gradient: Array

    def steepness(self) -> Array:
        """The gradient's magnitudes, finite (they may have overflowed), so that a width of zero
        makes a product of zero."""
        xp = self.kernels.xp
        return xp.fmin(xp.abs(self.gradient), xp.float32(1e30))

    def halved(self, variable: Array) -> Cut:
        """Every box cut in the middle of its variable [N]."""
        return middle(self.kernels, self.lower, self.upper, variable)


class Widest(Branching[BoxView]):
    """The variable with the most codes left (the first of them): the 2023 paper's rule."""

    def choose(self, view: BoxView) -> Cut:
        return view.halved((view.upper - view.lower).argmax(axis=1))


class Influence(Branching[BoxView]):
    """The variable whose whole range moves the slack most, to first order; ties and flat gradients
    by width."""

    def choose(self, view: BoxView) -> Cut:
        width = (view.upper - view.lower).astype(view.kernels.xp.float32)
        steep = view.steepness()
        floor = 1e-3 * steep.max(axis=1, keepdims=True) + 1e-30
        return view.halved((width * (steep + floor)).argmax(axis=1))


class Balanced(Branching[BoxView]):
    """Between the two: width times the square root of the gradient."""

    def choose(self, view: BoxView) -> Cut:
        xp = view.kernels.xp
        width = (view.upper - view.lower).astype(xp.float32)
        steep = xp.sqrt(view.steepness())
        floor = 0.05 * steep.max(axis=1, keepdims=True) + 1e-30
        return view.halved((width * (steep + floor)).argmax(axis=1))


# -- neurons ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CutLayout:
    """Where the bounds of every value that may be cut lie in one flat row: value 0 (the input
    codes) first."""

    values: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    size: int

    @staticmethod
    def make(dual: Dual, last: int) -> CutLayout:
        """Of the values up to `last` that a rule of the dual says may be cut."""
        values = [0]
        for k, (node, rule) in enumerate(
            zip(dual.network.nodes[:last], dual.rules, strict=False), 1
        ):
            if isinstance(rule, NonlinearRelaxation) and rule.cuts != "none":
                value = node.inputs[0] if rule.cuts == "input" else k
                if value not in values:
                    values.append(value)
        shapes = tuple(dual.network.type_of(v).shape for v in values)
        starts = np.cumsum([0, *(int(np.prod(s, dtype=np.int64)) for s in shapes)])
        return CutLayout(tuple(values), shapes, tuple(int(s) for s in starts[:-1]), int(starts[-1]))

    def columns(self, value: int) -> slice:
        """Where a value's entries lie in a flat row."""
        i = self.values.index(value)
        return slice(self.starts[i], self.starts[i] + int(np.prod(self.shapes[i], dtype=np.int64)))

    def part(self, flat: Array, value: int) -> Array:
        """A value's part of flat rows [N, size]: [N, *shape]."""
        shape = self.shapes[self.values.index(value)]
        return flat[:, self.columns(value)].reshape(len(flat), *shape)

    def split(self, flat: tuple[Array, Array]) -> dict[int, Interval]:
        """Flat lower and upper bounds [N, size] as the bounds of every value."""
        lower, upper = flat
        return {v: (self.part(lower, v), self.part(upper, v)) for v in self.values}


@dataclass(frozen=True, eq=False)
class NeuronView:
    """What a rule for neurons looks at: subproblems as flat bounds [N, layout.size], the intervals
    of all values there, and the dual's point with where its maxima are taken."""

    dual: Dual
    layout: CutLayout
    lower: Array
    upper: Array
    values: list[Interval]
    point: Point
    primal: Primal
    # What bounds of both parts of a cut are like, [N] each: a guide, after a few steps. None while
    # a query is easy: a better cut would save less than it costs.
    look_ahead: Callable[[Cut], tuple[Array, Array]] | None

    def cuttable(self) -> Iterator[tuple[int, NonlinearRelaxation, slice]]:
        """Every node that may be cut: its number, its rule, and the columns of the value to cut."""
        for k in self.primal.y:
            rule, node = self.dual.rules[k - 1], self.dual.network.nodes[k - 1]
            if isinstance(rule, NonlinearRelaxation) and rule.cuts != "none":
                yield k, rule, self.layout.columns(node.inputs[0] if rule.cuts == "input" else k)

    def inputs(self, k: int) -> tuple[Interval, ...]:
        """Intervals of the inputs of node k."""
        return tuple(self.values[i] for i in self.dual.network.nodes[k - 1].inputs)


class LargestGap(Branching[NeuronView]):
    """The neuron where cutting the node loose gains most: by how much the bound takes its result to
    exceed what it gives at its argument, followed from the earlier maximizers and averaged over the
    last steps. Where no neuron gains, the input with the largest share of the bound."""

    @np.errstate(over="ignore", invalid="ignore")
    def choose(self, view: NeuronView) -> Cut:
        return _at_best(view, *_gaps(view))


class Filtered(Branching[NeuronView]):
    """The cut whose parts look best after a few steps, of the CANDIDATES with the best scores.

    A neuron's score is what a cut at its kink gains, the gap of the upper hull there; of other cuts
    it is the gap that `LargestGap` sees, but no more than half a code, which is what a rounding can
    cost. Where no cut scores, or a query is easy, it is `LargestGap`. Filtered smart branching (De
    Palma et al., 2021), for integers.
    """

    @np.errstate(over="ignore", invalid="ignore")
    def choose(self, view: NeuronView) -> Cut:
        xp = view.dual.kernels.xp
        score, threshold = _gaps(view)
        best = _at_best(view, score, threshold)
        if view.look_ahead is None:
            return best
        self._prefer_kinks(view, score, threshold)
        rows, least = xp.arange(len(score)), xp.full(len(score), xp.inf)
        for _ in range(min(CANDIDATES, score.shape[1])):
            entry = score.argmax(axis=1)
            possible = score[rows, entry] > 0
            score[rows, entry] = -xp.inf
            if not view.dual.kernels.may_hold(possible):
                break
            cut = Cut(entry, threshold[rows, entry], possible)
            parts = [xp.maximum(part, GUIDE(-1)) for part in view.look_ahead(cut)]
            worse = xp.maximum(*parts) + GUIDE(0.1) * xp.minimum(*parts)
            better = possible & (worse < least)
            least = xp.where(better, worse, least)
            best = Cut(
                xp.where(better, entry, best.entry),
                xp.where(better, cut.threshold, best.threshold),
                best.possible,
            )
        return best

    def _prefer_kinks(self, view: NeuronView, score: Array, threshold: Array) -> None:
        """Turn gaps into scores, and thresholds into those of kinks where these gain more."""
        xp, n = view.dual.kernels.xp, len(score)
        for k, rule, columns in view.cuttable():
            w = view.primal.w[k][:, 0]
            if not rule.whole:
                half = xp.abs(w).reshape(n, -1) / 2
                score[:, columns] = xp.minimum(score[:, columns], half)
            found = rule.kink(view.dual.kernels, view.inputs(k), view.values[k])
            if found is not None:
                step, rise = found
                gain = (xp.maximum(w, 0) * rise).reshape(n, -1)
                better = gain > score[:, columns]
                score[:, columns] = xp.where(better, gain, score[:, columns])
                step = step.reshape(n, -1).astype(xp.int32)
                threshold[:, columns] = xp.where(better, step, threshold[:, columns])


def _gaps(view: NeuronView) -> tuple[Array, Array]:
    """What a cut at each entry of the layout gains (-inf: none is possible), and the threshold
    there: [N, layout.size] each."""
    dual, xp, n = view.dual, view.dual.kernels.xp, len(view.lower)
    score = xp.full((n, view.layout.size), -xp.inf)
    threshold = xp.zeros((n, view.layout.size), dtype=xp.int32)
    point, primal = view.point, view.primal
    for k, rule, columns in view.cuttable():
        # Without steps there is no average of arguments; then where the hull's corners lie.
        z = (point.arguments[k] if k in point.arguments else primal.z[k])[:, 0]
        spot = xp.rint(z).astype(xp.int32)
        weights, multipliers = primal.w[k][:, 0], point.multipliers[k][:, 0]
        passed = multipliers * (z - primal.z[k][:, 0])
        result = rule.value(dual.kernels, dual.network.nodes[k - 1].op.run, spot)
        gap = weights * (primal.y[k][:, 0] - result)
        gap = xp.nan_to_num(gap + (passed.sum(axis=-1) if rule.whole else passed))
        t, possible = rule.cut(dual.kernels, spot, view.inputs(k), view.values[k])
        score[:, columns] = xp.where(possible, gap, -xp.inf).reshape(n, -1)
        threshold[:, columns] = t.reshape(n, -1)
    return score, threshold


def _at_best(view: NeuronView, score: Array, threshold: Array) -> Cut:
    """The entry with the best score, where one gains; else an input, in the middle."""
    xp = view.dual.kernels.xp
    best, rows = score.argmax(axis=1), xp.arange(len(score))
    at = threshold[rows, best]
    lower, upper = view.layout.part(view.lower, 0), view.layout.part(view.upper, 0)
    width = upper - lower
    # A part with one code vector is the only leaf, whatever the floats say, and whatever a band
    # leaves to be cut in it: the vector was evaluated, or the runtime asked.
    wide = (width > 0).any(axis=1)
    by_input = wide & (score[rows, best] <= 0)
    if view.dual.kernels.may_hold(by_input):
        variable = _steepest_input(view, width)
        half = lower[rows, variable] + (width[rows, variable] + 1) // 2
        best, at = xp.where(by_input, variable, best), xp.where(by_input, half, at)
    return Cut(best, at.astype(xp.int32), wide)


def _steepest_input(view: NeuronView, width: Array) -> Array:
    """The input code with the largest share of the bound, of those that can be split."""
    xp, pull = view.dual.kernels.xp, view.primal.pull
    steep = xp.nan_to_num(xp.abs(pull[:, 0])) if pull is not None else xp.ones(width.shape)
    share = xp.where(width > 0, width * (steep.astype(xp.float64) + 1e-9), -1.0)
    return share.argmax(axis=1)


INPUT_RULES: dict[str, Branching[BoxView]] = {
    "influence": Influence(),
    "balanced": Balanced(),
    "widest": Widest(),
}
NEURON_RULES: dict[str, Branching[NeuronView]] = {"gap": LargestGap(), "filtered": Filtered()}
AUTO, AUTO_INPUTS, AUTO_NEURONS = "auto", "balanced", "filtered"
RULES = (AUTO, *INPUT_RULES, *NEURON_RULES)


def halves(kernels: Kernels, lower: Array, upper: Array, cut: Cut) -> tuple[Array, Array]:
    """Both parts of every box of integers [N, entries], the lower ones first: [2 N, entries]. They
    share no point, and together they are the whole."""
    xp = kernels.xp
    rows = xp.arange(lower.shape[0])
    left, right = upper.copy(), lower.copy()
    left[rows, cut.entry] = cut.threshold - 1
    right[rows, cut.entry] = cut.threshold
    return xp.concatenate([lower, right]), xp.concatenate([left, upper])
