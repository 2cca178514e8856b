"""Better multipliers: subgradient steps on the dual, in floats. No proof rests on this file.

The dual bound is convex and piecewise linear in the multipliers. Its subgradient costs one forward
pass of the linear nodes: for the multiplier of a nonlinear node it is how far the argument at which
the node takes its maximum lies from the argument that the maximizers before it give; for the weight
of an inequality it is the inequality's value there. Steps are those of Adam (Kingma and Ba, 2015)
with falling rates. A multiplier's step is as large as the weight of its neuron's result times the
codes per unit of its argument, which is about what the multiplier itself will be. Where the result
is fixed in the whole root box, the multiplier stays: any other than 0 only costs. The multiplier of
a neuron that cuts have fixed moves: it is that of the cuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qverify.bounds.dual import Dual, Multipliers, Primal, Relaxations
from qverify.deadline import Deadline
from qverify.kernels import Array, Kernels
from qverify.ops.relax import GUIDE

MEMORY = 0.05  # the share of the last step in the averages of arguments
LEAST_WEIGHT = 0.3  # of a layer's mean: neurons with smaller weights step as if they had this one
FADE = 0.03  # the last step's rate over the first's
REGROUP_EVERY = 8  # steps; then subproblems that are done are left out, if they are a quarter


@dataclass(frozen=True, eq=False)
class Objective:
    """K inequalities per subproblem: sum over v of terms[v] . (value v) + constants >= 0.

    A subproblem is empty if a combination with weights mu >= 0 [N, K] has a negative upper bound.
    """

    terms: Mapping[int, Array]  # by value: [N, K, *shape]
    constants: Array  # [N, K]

    def weights(self, mu: Array) -> dict[int, Array]:
        """The combination's weights of each value, [N, 1, *shape]."""

        def combined(weights: Array) -> Array:
            factors = mu.reshape(*mu.shape, *([1] * (weights.ndim - 2)))
            return (weights * factors).sum(axis=1, keepdims=True)

        return {v: combined(weights) for v, weights in self.terms.items()}

    def at(self, kernels: Kernels, values: list[Array]) -> Array:
        """Every inequality's value at stored network values [N, *shape]: [N, K]."""
        products = [kernels.dot(w, values[v][:, None]) for v, w in self.terms.items()]
        return kernels.total([self.constants, *products])

    def as_guide(self) -> Objective:
        """The same in the guide's type."""
        return Objective(
            {v: w.astype(GUIDE) for v, w in self.terms.items()}, self.constants.astype(GUIDE)
        )

    def take(self, rows: Array) -> Objective:
        """The same for some of the subproblems."""
        return Objective({v: w[rows] for v, w in self.terms.items()}, self.constants[rows])


@dataclass(eq=False)
class Point:
    """A point of the dual for N subproblems, and the float bound there."""

    mu: Array  # of the inequalities, [N, K]
    multipliers: Multipliers  # [N, 1, *shape]
    bound: Array  # [N]
    # The nonlinear nodes' arguments, averaged over the last steps: shapes as the multipliers'.
    arguments: Multipliers = field(default_factory=dict)

    def take(self, rows: Array) -> Point:
        """The same for some of the subproblems."""
        multipliers = {k: m[rows] for k, m in self.multipliers.items()}
        arguments = {k: z[rows] for k, z in self.arguments.items()}
        return Point(self.mu[rows], multipliers, self.bound[rows], arguments)

    def copy(self) -> Point:
        """The same point, with copies of its arrays."""
        multipliers = {k: m.copy() for k, m in self.multipliers.items()}
        arguments = {k: z.copy() for k, z in self.arguments.items()}
        return Point(self.mu.copy(), multipliers, self.bound.copy(), arguments)

    def parts(self) -> list[Array]:
        """All of its arrays."""
        return [self.mu, self.bound, *self.multipliers.values(), *self.arguments.values()]


def evaluate(dual: Dual, relaxations: Relaxations, objective: Objective, point: Point) -> Primal:
    """Set the point's bound, and return where its maxima are taken. All in the guide's type."""
    upper, primal = dual.guide(relaxations, objective.weights(point.mu), point.multipliers)
    point.bound = (upper + dual.kernels.dot(point.mu[:, None], objective.constants[:, None]))[:, 0]
    return primal


@dataclass(eq=False)
class _Adam:
    """Adam's first and second moments of one array of variables, and the size of its steps."""

    first: Array
    second: Array
    size: Array
    steps: int = 0

    @staticmethod
    def make(xp: Any, variables: Array, size: Array) -> _Adam:
        return _Adam(xp.zeros_like(variables), xp.zeros_like(variables), size)

    def take(self, rows: Array) -> _Adam:
        return _Adam(self.first[rows], self.second[rows], self.size[rows], self.steps)

    def step(
        self, kernels: Kernels, variables: Array, argument: Array, z: Any, pace: float, **more: Any
    ) -> Array:
        """The variables after one step along the gradient argument - z: see `Kernels.descend`."""
        self.steps += 1
        # Corrected for moments that begin at 0, as in the paper.
        rate = pace * float((1 - 0.99**self.steps) ** 0.5 / (1 - 0.9**self.steps))
        moments = (self.first, self.second)
        return kernels.descend(variables, argument, z, self.size, moments, rate, **more)


@dataclass(eq=False)
class _Best:
    """The best point so far of the subproblems that still take steps."""

    kernels: Kernels
    point: Point
    rows: Array | None = None  # which they are among all subproblems; None: all
    all: Point | None = None  # the best points of all subproblems when some were last left out

    def keep(self, point: Point) -> None:
        """Take over what is better in `point`."""
        best = self.point
        new, old = ([p.bound, p.mu, *p.multipliers.values()] for p in (point, best))
        best.bound, best.mu, *rest = self.kernels.rows_where(point.bound < best.bound, new, old)
        best.multipliers = dict(zip(best.multipliers, rest, strict=True))

    def go_on_with(self, rows: Array) -> None:
        """Leave out the subproblems that are not in `rows`."""
        self.all = self.point.copy() if self.all is None else self.whole()
        self.rows = rows if self.rows is None else self.rows[rows]
        self.point = self.point.take(rows)

    def whole(self) -> Point:
        """The best points of all subproblems."""
        if self.all is None or self.rows is None:
            return self.point
        for array, newer in zip(self.all.parts(), self.point.parts(), strict=True):
            array[self.rows] = newer
        return self.all


@dataclass(eq=False)
class _Descent:
    """The subproblems that still take steps, where they are, and what Adam remembers of them."""

    dual: Dual
    relaxations: Relaxations
    objective: Objective
    point: Point
    fixed: Mapping[int, Array]
    mu_moments: _Adam
    moments: dict[int, _Adam] = field(default_factory=dict)  # by nonlinear node, once it has moved

    @staticmethod
    def make(
        dual: Dual,
        relaxations: Relaxations,
        objective: Objective,
        start: Point,
        fixed: Mapping[int, Array] | None,
    ) -> _Descent:
        xp, count = dual.kernels.xp, len(start.mu)
        unknown = xp.full(count, xp.inf, dtype=GUIDE)
        point = Point(start.mu, dict(start.multipliers), unknown)
        mu_moments = _Adam.make(xp, point.mu, xp.ones((count, 1), dtype=GUIDE))
        return _Descent(dual, relaxations, objective, point, fixed or {}, mu_moments)

    def go_on_with(self, rows: Array) -> None:
        """Leave out the subproblems that are not in `rows`."""
        self.relaxations = self.relaxations.take(rows)
        self.objective = self.objective.take(rows)
        self.point = self.point.take(rows)
        self.moments = {k: adam.take(rows) for k, adam in self.moments.items()}
        self.mu_moments = self.mu_moments.take(rows)

    def step(self, primal: Primal, pace: float, means: Multipliers, share: float) -> None:
        """Move the point down the subgradient at the maximizers `primal`. The nonlinear nodes'
        arguments there go into the averages `means` with a `share`."""
        kernels, point = self.dual.kernels, self.point
        values = self.dual.follow(primal, max(self.objective.terms))
        for k, m in point.multipliers.items():
            # The bound has m in max (w y - m z) + m . argument: its slope is argument - z.
            argument = self.dual.argument(values, k).reshape(m.shape)
            if k not in self.moments:
                means[k] = kernels.xp.empty(m.shape, dtype=GUIDE)
                size = _sizes(self.dual, k, m, primal.w[k], self.fixed.get(k))
                self.moments[k] = _Adam.make(kernels.xp, m, size)
            point.multipliers[k] = self.moments[k].step(
                kernels, m, argument, primal.z[k], pace, mean=means[k], share=share
            )
        if point.mu.shape[1] > 1:
            gradient = self.objective.at(kernels, values)
            gradient[:, 0] = 0  # the first inequality's weight stays 1: it sets the scale
            point.mu = self.mu_moments.step(kernels, point.mu, gradient, 0.0, pace, least=0.0)


@np.errstate(over="ignore", invalid="ignore")  # floats that only guide may lose their meaning
def improve(
    dual: Dual,
    relaxations: Relaxations,
    objective: Objective,
    start: Point,
    rounds: int,
    rate: float,
    deadline: Deadline,
    enough: float = -0.5,
    fixed: Mapping[int, Array] | None = None,
) -> Point:
    """The best point found in `rounds` steps from `start`; relaxations and objective in the guide's
    type. A subproblem whose bound is below `enough` is done; at the deadline all are. Multipliers
    of results that are `fixed` (bool, broadcastable) stay as they are."""
    kernels = dual.kernels
    descent = _Descent.make(dual, relaxations, objective, start, fixed)
    point = descent.point
    best = _Best(kernels, Point(point.mu, point.multipliers, point.bound))
    for t in range(rounds):
        primal = evaluate(dual, descent.relaxations, descent.objective, descent.point)
        best.keep(descent.point)
        if t % kernels.look_every == kernels.look_every - 1:  # on a GPU, a look is a wait
            done = kernels.to_host(descent.point.bound < enough)
            if done.all():
                break
        if t and deadline.passed():
            break
        if t % REGROUP_EVERY == REGROUP_EVERY - 1 and 4 * done.sum() > len(done):
            rows = kernels.asarray(np.flatnonzero(~done))
            best.go_on_with(rows)
            descent.go_on_with(rows)
            continue
        share = max(1 / (t + 1), MEMORY)  # first the plain mean, then a moving one
        descent.step(primal, rate * FADE ** (t / rounds), best.point.arguments, share)
    return best.whole()


def _sizes(dual: Dual, k: int, m: Array, w: Array, fixed: Array | None) -> Array:
    """How large the steps of node k's multipliers `m` are, where `w` are its result's weights."""
    xp = dual.kernels.xp
    if k not in dual.paces:
        return _typical(xp, m)
    size = xp.maximum(xp.abs(w), GUIDE(LEAST_WEIGHT) * _typical(xp, w)) * dual.paces[k]
    return size if fixed is None else xp.where(fixed, GUIDE(0), size)


def _typical(xp: Any, m: Array) -> Array:
    """The mean magnitude of each subproblem's multipliers (never 0), as [N, 1, ...]."""
    mean = xp.abs(m).reshape(len(m), -1).mean(axis=1)
    return mean.reshape(-1, *([1] * (m.ndim - 1))) + GUIDE(1e-9)


def rounded(dual: Dual, point: Point, precision: int) -> tuple[Array, Multipliers]:
    """The point (mu, multipliers) in multiples of 2**-precision, int64; mu is not negative."""
    xp, unit, whole = dual.kernels.xp, float(2**precision), dual.kernels.whole
    multipliers = {k: whole(m.astype(xp.float64) * unit) for k, m in point.multipliers.items()}
    return whole(xp.maximum(point.mu, 0).astype(xp.float64) * unit), multipliers
