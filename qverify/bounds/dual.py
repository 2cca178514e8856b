"""The Lagrangian dual of the integer network: exact upper bounds of linear functions of its values.

Every nonlinear node y = f(z) is cut loose from its argument, at the price of a multiplier: for any
multipliers m and weights w of y, w . f(z) - m . z is at most its maximum over the node's hull, and
m . z is passed on to earlier nodes, down to the input codes, over which the maximum is known. So

    bound(m)  =  sum over nodes of max (w y - m z)  +  linear constants  +  max over the input box

is an upper bound for every choice of m. It is a convex function of the multipliers, so subgradients
improve them: these say how far the maximizers break the equations z = argument(earlier maximizers).

Sound: multipliers are rounded to integers, and `upper` evaluates the bound without rounding; floats
only choose. References: Dvijotham et al. (UAI 2018) for the dual; CROWN (Zhang et al., NeurIPS
2018) for the multipliers to start from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qverify.deadline import looking
from qverify.kernels import Array, Kernels
from qverify.network import Network
from qverify.ops import Interval
from qverify.ops.base import moved
from qverify.ops.relax import (
    GUIDE,
    LIMIT,
    Hull,
    IntervalRelaxation,
    NonlinearRelaxation,
    Relaxation,
    TooLarge,
    concretize,
    exact,
    magnitude,
)

Multipliers = dict[int, Array]  # node (the value it computes) -> [N, R, *shape of its argument]


@dataclass(frozen=True, eq=False)
class Relaxations:
    """A batch of N subproblems; where all of them are about one box, N may be 1."""

    boxes: list[Interval]  # of every value, [N, *shape] each
    hulls: dict[int, Hull]  # of the nonlinear nodes there

    def as_guide(self, kernels: Kernels) -> Relaxations:
        """The same with input box and hulls in the guide's type."""
        codes = (self.boxes[0][0].astype(GUIDE), self.boxes[0][1].astype(GUIDE))
        hulls = {k: hull.as_guide(kernels) for k, hull in self.hulls.items()}
        return Relaxations([codes, *self.boxes[1:]], hulls)

    def take(self, rows: Array) -> Relaxations:
        """Some of the subproblems; a single box serves all of them."""
        if len(self.boxes[0][0]) == 1:
            return self
        return Relaxations(
            [(lower[rows], upper[rows]) for lower, upper in self.boxes],
            {k: hull.take(rows) for k, hull in self.hulls.items()},
        )


@dataclass(eq=False)
class Primal:
    """Where the maxima were taken: [N, R, *shape] each, in the type of the pass."""

    codes: Array = None  # the input codes
    pull: Array = None  # their weights
    # By nonlinear node: the weights of its result, the result and the argument. `y` also has the
    # results of nodes that stop the pass.
    w: dict[int, Array] = field(default_factory=dict)
    y: dict[int, Array] = field(default_factory=dict)
    z: dict[int, Array] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Dual:
    """The backward rules of a network, on a machine."""

    kernels: Kernels
    network: Network
    rules: tuple[Relaxation, ...]  # one per node
    host_rules: tuple[Relaxation, ...]  # the same, their arrays NumPy's

    @functools.cached_property
    def paces(self) -> dict[int, Array]:
        """Codes per unit of the argument, in the guide's type, for the nodes where it is known."""
        found = {
            k: rule.pace()
            for k, rule in enumerate(self.host_rules, 1)
            if isinstance(rule, NonlinearRelaxation)
        }
        return {
            k: self.kernels.asarray(np.asarray(pace, GUIDE))
            for k, pace in found.items()
            if pace is not None and pace.any()
        }

    @staticmethod
    def fixed(boxes: list[Interval]) -> dict[int, Array]:
        """Where values are fixed in boxes: bool [N, 1, *shape]."""
        return {k: (lower == upper)[:, None] for k, (lower, upper) in enumerate(boxes)}

    @staticmethod
    def make(network: Network, kernels: Kernels) -> Dual:
        """Prepare the rules of `network` (whose arrays are NumPy) for `kernels`."""
        host = [
            node.op.relaxation(kernels, *(network.type_of(i) for i in node.inputs))
            for node in looking(network.nodes)
        ]
        rules = host if kernels.is_host else [moved(rule, kernels) for rule in host]
        return Dual(kernels, network.on(kernels), tuple(rules), tuple(host))

    def relaxations(self, boxes: list[Interval], last: int) -> Relaxations:
        """Boxes with the hulls of the nonlinear nodes up to value `last`."""
        hulls = {}
        for k, (node, rule) in enumerate(
            looking(zip(self.network.nodes[:last], self.rules, strict=False)), 1
        ):
            if isinstance(rule, NonlinearRelaxation):
                hulls[k] = rule.hull(self.kernels, tuple(boxes[i] for i in node.inputs), boxes[k])
        return Relaxations(boxes, hulls)

    def crown_multipliers(self, boxes: list[Interval], weights: Mapping[int, Array]) -> Multipliers:
        """Multipliers to start from, in the weights' type: CROWN's slopes, which are those of edges
        of the hulls, chosen from the last node to the first."""
        chosen: Multipliers = {}
        self._walk(Relaxations(boxes, {}), weights, chosen)
        return chosen

    def upper(
        self,
        relaxations: Relaxations,
        weights: Mapping[int, Array],
        multipliers: Multipliers | None = None,
    ) -> Array:
        """Upper bounds [N, R] of the sum over v of weights[v] [N, R, *shape] . value v, in int64.

        `multipliers` int64, or None: CROWN's slopes, rounded. Raises TooLarge where exact
        arithmetic would leave its types.
        """
        return self._walk(relaxations, weights, multipliers)[0]

    def last_layer(self, relaxations: Relaxations, weights: Mapping[int, Array]) -> Array:
        """Upper bounds like `upper`, with multipliers 0: the pass stops at the first nonlinear
        nodes it meets and takes their intervals. This is interval arithmetic after the last linear
        nodes were fused with the weights (Gowal et al., 2018). Raises TooLarge.

        Sound because a node's result lies in its interval.
        """
        return self._walk(relaxations, weights, None, last_layer=True)[0]

    def guide(
        self, relaxations: Relaxations, weights: Mapping[int, Array], multipliers: Multipliers
    ) -> tuple[Array, Primal]:
        """The bound in the guide's type [N, R] (not sound), and where the maxima were taken."""
        return self._walk(relaxations, weights, multipliers)

    # Guides may overflow in float32; nothing exact is computed in floats that could.
    @np.errstate(over="ignore", invalid="ignore")
    def _walk(
        self,
        relaxations: Relaxations,
        weights: Mapping[int, Array],
        multipliers: Multipliers | None,
        last_layer: bool = False,
    ) -> tuple[Array, Primal]:
        """(bounds [N, R], where the maxima were taken), in one pass from the last value back to the
        input. Everywhere in the box, before and after every step,

            sum of weights[v] . v  <=  sum of `constants` + sum of held[v] . v.

        A step puts the inputs of a node in place of its result, the last of the values held.
        """
        held: dict[int, Array] = dict(weights)
        primal = Primal()
        constants: list[Any] = []
        for k in looking(range(max(held, default=0), 0, -1)):
            w = held.pop(k, None)
            if w is None:
                continue
            parts, constant = self._step(k, w, relaxations, multipliers, last_layer, primal)
            self._collect(constants, constant)
            for i, part in zip(self.network.nodes[k - 1].inputs, parts, strict=True):
                if part is not None:
                    held[i] = self._added(held[i], part) if i in held else part
        if 0 in held:
            constant, primal.codes = concretize(self.kernels, held[0], relaxations.boxes[0])
            self._collect(constants, constant)
            primal.pull = held[0]
        return self.kernels.total(constants) if constants else 0, primal

    def _step(
        self,
        k: int,
        weights: Array,
        relaxations: Relaxations,
        multipliers: Multipliers | None,
        last_layer: bool,
        primal: Primal,
    ) -> tuple[tuple[Array | None, ...], Any]:
        """Weights of the inputs of node k (or None) and a constant that together are never smaller
        than `weights` . its result."""
        boxes, rule = relaxations.boxes, self.rules[k - 1]
        inputs = tuple(boxes[i] for i in self.network.nodes[k - 1].inputs)
        if isinstance(rule, NonlinearRelaxation):
            if last_layer:
                return (None,) * len(inputs), concretize(self.kernels, weights, boxes[k])[0]
            if multipliers is not None:
                constant: Any = 0
                hull = relaxations.hulls.get(k)
                if hull is None:  # `crown_multipliers`: they are being chosen, nothing is bounded
                    slopes = rule.slopes(self.kernels, weights, inputs, boxes[k])
                    multipliers[k] = slopes.astype(weights.dtype)
                else:
                    primal.w[k] = weights
                    constant, primal.y[k], primal.z[k] = hull.best(
                        self.kernels, weights, multipliers[k]
                    )
                return rule.spread(self.kernels, multipliers[k], inputs), constant
        if isinstance(rule, IntervalRelaxation) and not exact(weights):
            primal.y[k] = concretize(self.kernels, weights, boxes[k])[1]
        return rule.backward(self.kernels, weights, inputs, boxes[k])

    def _collect(self, constants: list[Any], constant: Any) -> None:
        """Add a constant to the list: exact ones at once, since the sum is measured; those of a
        guide are summed at the end, in one step."""
        if not hasattr(constant, "dtype"):  # a plain 0
            return
        if exact(constant):
            constants[:] = [self._added(constants[0] if constants else 0, constant)]
        else:
            constants.append(constant.astype(GUIDE, copy=False))

    def _added(self, a: Any, b: Any) -> Any:
        """a + b; if exact, both of them and the sum well inside int64."""
        # Each is below LIMIT = 2**61, so the sum does not wrap before it is measured.
        result = a + b
        if hasattr(b, "dtype") and exact(b) and magnitude(self.kernels, b, result) >= LIMIT:
            raise TooLarge
        return result

    def follow(self, primal: Primal, last: int) -> list[Array]:
        """Every value up to `last` where linear nodes are fed the maximizers before them:
        [N * R, *shape] in the guide's type. A value that no maximizer reaches is None."""

        def flat(x: Array) -> Array:
            return x.reshape(-1, *x.shape[2:])

        values: list[Any] = [None if primal.codes is None else flat(primal.codes)]
        for k, node in enumerate(looking(self.network.nodes[:last]), 1):
            rule = self.rules[k - 1]
            if k in primal.y:
                values.append(flat(primal.y[k]))
            elif isinstance(rule, NonlinearRelaxation | IntervalRelaxation) or any(
                values[i] is None for i in node.inputs
            ):
                values.append(None)
            else:
                result = rule.forward(self.kernels, *(values[i] for i in node.inputs))
                # Constants among codes make float64.
                values.append(result.astype(GUIDE, copy=False))
        return values

    def argument(self, values: list[Array], k: int) -> Array:
        """The argument of nonlinear node k at stored network values."""
        rule = self.rules[k - 1]
        assert isinstance(rule, NonlinearRelaxation)
        return rule.argument(self.kernels, *(values[i] for i in self.network.nodes[k - 1].inputs))
