"""Better multipliers: subgradient steps on the dual, in floats. Nothing that is proved rests on this file.

The dual bound is convex and piecewise linear in the multipliers. Its subgradient costs one forward pass of the linear
nodes: for the multiplier of a nonlinear node it is how far the node's own maximizer lies from its argument at the
maximizers before it; for the weight of an inequality it is the inequality's value there. Steps are those of Adam
(Kingma and Ba, 2015) on falling rates, scaled layer by layer by the size of the multipliers to start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qverify.bounds.dual import Dual, Multipliers, Primal, Scene
from qverify.deadline import Deadline
from qverify.kernels import Array
from qverify.ops.relax import GUIDE

MEMORY = 0.05  # the share of the last step in the averages of arguments
FADE = 0.03  # the last step's rate over the first's


@dataclass(frozen=True, eq=False)
class Objective:
    """K inequalities per subproblem: sum over v of terms[v] [N, K, *shape] . value v + constants [N, K] >= 0.

    The region is empty if a combination with weights mix >= 0 [N, K] has a negative upper bound."""

    terms: Mapping[int, Array]
    constants: Array

    def weights(self, mix: Array) -> dict[int, Array]:
        """The combination's weights of each value, [N, 1, *shape]."""
        return {
            value: (own * mix.reshape(*mix.shape, *([1] * (own.ndim - 2)))).sum(axis=1, keepdims=True)
            for value, own in self.terms.items()
        }

    def at(self, values: list[Array]) -> Array:
        """Every inequality's value at stored network values [N, *shape]: [N, K]."""
        total = self.constants
        for value, own in self.terms.items():
            product = own * values[value][:, None]
            total = total + product.reshape(*product.shape[:2], -1).sum(axis=2)
        return total

    def as_guide(self) -> Objective:
        """The same in the guide's type."""
        return Objective({v: own.astype(GUIDE) for v, own in self.terms.items()}, self.constants.astype(GUIDE))

    def take(self, rows: Array) -> Objective:
        """The same for some of the subproblems."""
        return Objective({v: own[rows] for v, own in self.terms.items()}, self.constants[rows])


@dataclass(eq=False)
class Point:
    """A point of the dual for N subproblems: the inequalities' mix [N, K], the multipliers [N, 1, *shape], and the float
    bound [N] there."""

    mix: Array
    multipliers: Multipliers
    bound: Array
    arguments: Multipliers = field(default_factory=dict)  # the nonlinear nodes' arguments, averaged over the last steps

    def take(self, rows: Array) -> Point:
        """The same for some of the subproblems."""
        multipliers, arguments = ({k: a[rows] for k, a in own.items()} for own in (self.multipliers, self.arguments))
        return Point(self.mix[rows], multipliers, self.bound[rows], arguments)


def evaluate(dual: Dual, scene: Scene, objective: Objective, point: Point) -> Primal:
    """Set the point's bound; where the maxima are taken comes back. All in the guide's type."""
    total, primal = dual.guide(scene, objective.weights(point.mix), point.multipliers)
    point.bound = total[:, 0] + (point.mix * objective.constants).sum(axis=1)
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

    def step(self, xp: Any, gradient: Array, pace: float) -> Array:
        self.steps += 1
        self.first += 0.1 * (gradient - self.first)
        gradient *= gradient
        self.second += 0.01 * (gradient - self.second)
        scale = xp.sqrt(self.second)
        scale += 1e-9
        rate = pace * (1 - 0.99**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        return (rate * self.size) * self.first / scale


def improve(
    dual: Dual,
    scene: Scene,
    objective: Objective,
    start: Point,
    rounds: int,
    rate: float,
    deadline: Deadline,
    enough: float = -0.5,
) -> Point:
    """The best point found in `rounds` steps from `start`; scene and objective in the guide's type. A subproblem whose
    bound is below `enough` is left alone from then on; at the deadline the steps end."""
    xp, last = dual.kernels.xp, max(objective.terms)
    best = Point(start.mix, dict(start.multipliers), xp.full(len(start.mix), xp.inf, dtype=GUIDE))
    point, rows = Point(start.mix, dict(start.multipliers), best.bound), None
    moments = {k: _Adam.make(xp, m, _typical(xp, m)) for k, m in start.multipliers.items()}
    mixing = _Adam.make(xp, point.mix, xp.full((len(point.mix), 1), 1 / 3, dtype=GUIDE))
    for t in range(rounds):
        primal = evaluate(dual, scene, objective, point)
        _keep(xp, best, point, rows)
        closed = point.bound < enough
        if bool(closed.all()) or (t and deadline.passed()):
            break
        if t % 8 == 7 and int(closed.sum()) * 4 > len(closed):
            left = xp.flatnonzero(~closed)
            rows = left if rows is None else rows[left]
            scene, objective, point = scene.take(left), objective.take(left), point.take(left)
            moments, mixing = {k: a.take(left) for k, a in moments.items()}, mixing.take(left)
            continue
        pace = rate * FADE ** (t / rounds)
        values = dual.follow(primal, last)
        for k, m in point.multipliers.items():
            argument = dual.argument(values, k).reshape(m.shape)
            _average(best.arguments, k, argument, rows, max(1 / (t + 1), MEMORY))
            gap = argument - primal.z[k]
            point.multipliers[k] = m - moments[k].step(xp, gap, pace)
        if point.mix.shape[1] > 1:
            gradient = objective.at(values)
            gradient[:, 0] = 0  # the first inequality's weight stays 1: it is the scale
            point.mix = xp.maximum(point.mix - mixing.step(xp, gradient, pace), 0)
    return best


def _typical(xp: Any, m: Array) -> Array:
    """The mean magnitude of each subproblem's multipliers, as [N, 1, ...]."""
    return xp.abs(m).reshape(len(m), -1).mean(axis=1).reshape(-1, *([1] * (m.ndim - 1))) + GUIDE(1e-9)


def _average(means: Multipliers, k: int, argument: Array, rows: Array | None, share: float) -> None:
    """Let `argument` (of some rows) into the running mean of node k with this share."""
    if k not in means:
        means[k] = argument.copy()
    elif rows is None:
        means[k] += share * (argument - means[k])
    else:
        means[k][rows] += share * (argument - means[k][rows])


def _keep(xp: Any, best: Point, point: Point, rows: Array | None) -> None:
    """Take over what is better in `point`, whose rows are `rows` of `best` (None: all of them)."""
    if rows is None:
        better = point.bound < best.bound
        if bool(better.all()):
            best.bound, best.mix, best.multipliers = point.bound, point.mix, dict(point.multipliers)
            return
        own = at = xp.flatnonzero(better)
    else:
        own = xp.flatnonzero(point.bound < best.bound[rows])
        at = rows[own]
    if not len(at):
        return
    best.bound, best.mix = best.bound.copy(), best.mix.copy()
    best.bound[at], best.mix[at] = point.bound[own], point.mix[own]
    for k, m in point.multipliers.items():
        best.multipliers[k] = best.multipliers[k].copy()
        best.multipliers[k][at] = m[own]


def rounded(dual: Dual, point: Point, precision: int) -> tuple[Array, Multipliers]:
    """The point in multiples of 2**-precision, int64; the mix is not negative."""
    xp, unit, whole = dual.kernels.xp, float(2**precision), dual.kernels.whole
    multipliers = {k: whole(m.astype(xp.float64) * unit) for k, m in point.multipliers.items()}
    return whole(xp.maximum(point.mix, 0).astype(xp.float64) * unit), multipliers
