"""Better multipliers: subgradient steps on the dual, in floats. Nothing that is proved rests on
this file.

The dual bound is convex and piecewise linear in the multipliers. Its subgradient costs one forward
pass of the linear nodes: for the multiplier of a nonlinear node it is how far the node's own
maximizer lies from its argument at the maximizers before it; for the weight of an inequality it is
the inequality's value there. Steps are those of Adam (Kingma and Ba, 2015) on falling rates. A
multiplier's step is as large as the weight of its neuron's result times the codes per unit of its
argument, which is about what the multiplier itself will be. Where the result is fixed in the whole
root box, the multiplier stays: any but 0 only costs. A neuron that cuts have fixed is free: its
multiplier is the cuts'.
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
LEAST_WEIGHT = 0.3  # of a layer's mean: neurons with smaller weights take steps as large as these
FADE = 0.03  # the last step's rate over the first's
# Steps from one look at the bounds to the next: on a GPU the host waits for it.


@dataclass(frozen=True, eq=False)
class Objective:
    """K inequalities per subproblem: sum over v of terms[v] [N, K, *shape] . value v + constants
    [N, K] >= 0.

    The region is empty if a combination with weights mu >= 0 [N, K] has a negative upper bound.
    """

    terms: Mapping[int, Array]
    constants: Array

    def weights(self, mu: Array) -> dict[int, Array]:
        """The combination's weights of each value, [N, 1, *shape]."""
        return {
            value: (own * mu.reshape(*mu.shape, *([1] * (own.ndim - 2)))).sum(axis=1, keepdims=True)
            for value, own in self.terms.items()
        }

    def at(self, kernels: Kernels, values: list[Array]) -> Array:
        """Every inequality's value at stored network values [N, *shape]: [N, K]."""
        products = [kernels.dot(own, values[value][:, None]) for value, own in self.terms.items()]
        return kernels.total([self.constants, *products])

    def as_guide(self) -> Objective:
        """The same in the guide's type."""
        return Objective(
            {v: own.astype(GUIDE) for v, own in self.terms.items()}, self.constants.astype(GUIDE)
        )

    def take(self, rows: Array) -> Objective:
        """The same for some of the subproblems."""
        return Objective({v: own[rows] for v, own in self.terms.items()}, self.constants[rows])


@dataclass(eq=False)
class Point:
    """A point of the dual for N subproblems: the inequalities' mu [N, K], the multipliers [N, 1,
    *shape], and the float bound [N] there."""

    mu: Array
    multipliers: Multipliers
    bound: Array
    # The nonlinear nodes' arguments, averaged over the last steps.
    arguments: Multipliers = field(default_factory=dict)

    def take(self, rows: Array) -> Point:
        """The same for some of the subproblems."""
        multipliers, arguments = (
            {k: a[rows] for k, a in own.items()} for own in (self.multipliers, self.arguments)
        )
        return Point(self.mu[rows], multipliers, self.bound[rows], arguments)

    def copy(self) -> Point:
        """The same in arrays of its own."""
        multipliers, arguments = (
            {k: a.copy() for k, a in own.items()} for own in (self.multipliers, self.arguments)
        )
        return Point(self.mu.copy(), multipliers, self.bound.copy(), arguments)

    def parts(self) -> list[Array]:
        """All of its arrays."""
        return [self.mu, self.bound, *self.multipliers.values(), *self.arguments.values()]


def evaluate(dual: Dual, relaxations: Relaxations, objective: Objective, point: Point) -> Primal:
    """Set the point's bound; where the maxima are taken comes back. All in the guide's type."""
    upper, primal = dual.guide(relaxations, objective.weights(point.mu), point.multipliers)
    point.bound = (upper + dual.kernels.dot(point.mu[:, None], objective.constants[:, None]))[:, 0]
    return primal


@dataclass(eq=False)
class _Adam:
    """First and second moments of one array of variables, and the size of its steps."""

    first: Array
    second: Array
    size: Array
    steps: int = 0

    @staticmethod
    def make(xp: Any, variables: Array, size: Array) -> _Adam:
        return _Adam(xp.zeros_like(variables), xp.zeros_like(variables), size)

    def take(self, rows: Array) -> _Adam:
        return _Adam(self.first[rows], self.second[rows], self.size[rows], self.steps)

    def rate(self, pace: float) -> float:
        """The next step's rate, which makes up for moments that begin at 0."""
        self.steps += 1
        return pace * float((1 - 0.99**self.steps) ** 0.5 / (1 - 0.9**self.steps))


@dataclass(eq=False)
class _Best:
    """The best point so far of the subproblems that are still improved, and where they stand among
    all of them."""

    kernels: Kernels
    point: Point
    rows: Array | None = None  # None: they are all of them
    all: Point | None = None

    def keep(self, point: Point) -> None:
        """Take over what is better in `point`."""
        best = self.point
        new, old = ([p.bound, p.mu, *p.multipliers.values()] for p in (point, best))
        best.bound, best.mu, *rest = self.kernels.rows_where(point.bound < best.bound, new, old)
        best.multipliers = dict(zip(best.multipliers, rest, strict=True))

    def leave(self, left: Array) -> None:
        """Go on with the rows `left` only."""
        self.all = self.point.copy() if self.all is None else self.whole()
        self.rows = left if self.rows is None else self.rows[left]
        self.point = self.point.take(left)

    def whole(self) -> Point:
        """The best points of all."""
        if self.all is None or self.rows is None:
            return self.point
        for whole, own in zip(self.all.parts(), self.point.parts(), strict=True):
            whole[self.rows] = own
        return self.all


@np.errstate(over="ignore", invalid="ignore")  # what only guides may lose its meaning
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
    type. A subproblem whose bound is below `enough` is left alone from then on; at the deadline the
    steps end. Multipliers of results that are `fixed` (bool, broadcastable) stay as they are."""
    kernels, last = dual.kernels, max(objective.terms)
    xp = kernels.xp
    point = Point(start.mu, dict(start.multipliers), xp.full(len(start.mu), xp.inf, dtype=GUIDE))
    best = _Best(kernels, Point(point.mu, point.multipliers, point.bound))
    moments: dict[int, _Adam] = {}
    mu_moments = _Adam.make(xp, point.mu, xp.ones((len(point.mu), 1), dtype=GUIDE))
    for t in range(rounds):
        primal = evaluate(dual, relaxations, objective, point)
        best.keep(point)
        if t % kernels.look_every == kernels.look_every - 1:
            closed = kernels.to_host(point.bound < enough)
            if closed.all():
                break
        if t and deadline.passed():
            break
        if t % 8 == 7 and 4 * closed.sum() > len(closed):
            left = kernels.asarray(np.flatnonzero(~closed))
            best.leave(left)
            relaxations, objective, point = (
                relaxations.take(left),
                objective.take(left),
                point.take(left),
            )
            moments, mu_moments = (
                {k: a.take(left) for k, a in moments.items()},
                mu_moments.take(left),
            )
            continue
        pace, share = rate * FADE ** (t / rounds), max(1 / (t + 1), MEMORY)
        values, means = dual.follow(primal, last), best.point.arguments
        for k, m in point.multipliers.items():
            argument = dual.argument(values, k).reshape(m.shape)
            if not t:
                means[k] = xp.empty(m.shape, dtype=GUIDE)
                moments[k] = _Adam.make(
                    xp, m, _sizes(dual, k, m, primal.w[k], (fixed or {}).get(k))
                )
            own = moments[k]
            moment = (own.first, own.second)
            speed = own.rate(pace)
            point.multipliers[k] = kernels.descend(
                m,
                argument,
                primal.z[k],
                own.size,
                moment,
                speed,
                mean=means[k],
                share=share,
            )
        if point.mu.shape[1] > 1:
            gradient, moment = objective.at(kernels, values), (mu_moments.first, mu_moments.second)
            gradient[:, 0] = 0  # the first inequality's weight stays 1: it is the scale
            point.mu = kernels.descend(
                point.mu,
                gradient,
                0.0,
                mu_moments.size,
                moment,
                mu_moments.rate(pace),
                least=0.0,
            )
    return best.whole()


def _sizes(dual: Dual, k: int, m: Array, w: Array, fixed: Array | None) -> Array:
    """How large the steps of node k's multipliers `m` are, where later nodes pass `w` on to its
    result."""
    xp = dual.kernels.xp
    if k not in dual.paces:
        return _typical(xp, m)
    size = xp.maximum(xp.abs(w), GUIDE(LEAST_WEIGHT) * _typical(xp, w)) * dual.paces[k]
    return size if fixed is None else xp.where(fixed, GUIDE(0), size)


def _typical(xp: Any, m: Array) -> Array:
    """The mean magnitude of each subproblem's multipliers, as [N, 1, ...]."""
    return xp.abs(m).reshape(len(m), -1).mean(axis=1).reshape(-1, *([1] * (m.ndim - 1))) + GUIDE(
        1e-9
    )


def rounded(dual: Dual, point: Point, precision: int) -> tuple[Array, Multipliers]:
    """The point in multiples of 2**-precision, int64; the mu is not negative."""
    xp, unit, whole = dual.kernels.xp, float(2**precision), dual.kernels.whole
    multipliers = {k: whole(m.astype(xp.float64) * unit) for k, m in point.multipliers.items()}
    return whole(xp.maximum(point.mu, 0).astype(xp.float64) * unit), multipliers
