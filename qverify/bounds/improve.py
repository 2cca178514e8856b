"""Better multipliers: subgradient steps on the dual, in floats. Nothing that is proved rests on this file.

The dual bound is convex and piecewise linear in the multipliers. Its subgradient costs one forward pass of the linear
nodes: for the multiplier of a nonlinear node it is how far the node's own maximizer lies from its argument at the
maximizers before it; for the weight of an inequality it is the inequality's value there. Steps are those of Adam
(Kingma and Ba, 2015) on falling rates, scaled layer by layer by the size of the multipliers to start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qverify.bounds.dual import Dual, Multipliers, Primal, Scene
from qverify.kernels import Array, Kernels

FADE = 0.03  # the last step's rate over the first's


@dataclass(frozen=True, eq=False)
class Objective:
    """K inequalities per subproblem: sum over v of terms[v] [N, K, *shape] . value v + constants [N, K] >= 0; float64.

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

    def take(self, rows: Array) -> Point:
        """The same for some of the subproblems."""
        return Point(self.mix[rows], {k: m[rows] for k, m in self.multipliers.items()}, self.bound[rows])


@dataclass(eq=False)
class _Adam:
    """First and second moments of one array of variables."""

    first: Array
    second: Array
    steps: int = 0

    def step(self, kernels: Kernels, gradient: Array) -> Array:
        xp = kernels.xp
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.99 * self.second + 0.01 * gradient * gradient
        scale = xp.sqrt(self.second / (1 - 0.99**self.steps)) + 1e-12
        return self.first / (1 - 0.9**self.steps) / scale


def evaluate(dual: Dual, scene: Scene, objective: Objective, point: Point) -> Primal:
    """Set the point's bound; where the maxima are taken comes back."""
    total, primal = dual.guide(scene, objective.weights(point.mix), point.multipliers)
    point.bound = total[:, 0] + (point.mix * objective.constants).sum(axis=1)
    return primal


def improve(dual: Dual, scene: Scene, objective: Objective, point: Point, rounds: int, rate: float) -> Point:
    """The best point found in `rounds` steps from `point`. Ends early when every bound is negative."""
    kernels, xp = dual.kernels, dual.kernels.xp
    count = (len(point.mix), 1)
    last = max(objective.terms)
    best = Point(point.mix.copy(), {k: m.copy() for k, m in point.multipliers.items()}, xp.full(count[0], xp.inf))
    moments = {k: _Adam(xp.zeros_like(m), xp.zeros_like(m)) for k, m in point.multipliers.items()}
    mixing = _Adam(xp.zeros_like(point.mix), xp.zeros_like(point.mix))
    sizes = {
        k: xp.abs(m).reshape(len(m), -1).mean(axis=1).reshape(-1, *([1] * (m.ndim - 1))) + 1e-9
        for k, m in point.multipliers.items()
    }
    for t in range(rounds):
        primal = evaluate(dual, scene, objective, point)
        better = point.bound < best.bound
        best.bound = xp.where(better, point.bound, best.bound)
        best.mix = xp.where(better[:, None], point.mix, best.mix)
        for k, m in point.multipliers.items():
            best.multipliers[k] = xp.where(better.reshape(-1, *([1] * (m.ndim - 1))), m, best.multipliers[k])
        if bool((best.bound < -0.5).all()):
            break
        pace = rate * FADE ** (t / rounds)
        values = dual.follow(primal, last, count)
        for k, m in point.multipliers.items():
            argument = dual.argument(values, k).reshape(m.shape)
            step = moments[k].step(kernels, argument - primal.z[k])
            point.multipliers[k] = m - pace * sizes[k] * step
        if point.mix.shape[1] > 1:
            gradient = objective.at(values)
            gradient[:, 0] = 0  # the first inequality's weight stays 1: it is the scale
            point.mix = xp.maximum(point.mix - pace * mixing.step(kernels, gradient) / 3, 0)
    return best
