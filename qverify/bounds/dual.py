"""The Lagrangian dual of the integer network: upper bounds of linear functions of its values,
evaluated exactly.

Every nonlinear node y = f(z) is cut loose from its argument, at the price of a multiplier: for any
multipliers m and weights w of y, w . f(z) - m . z is at most its maximum over the node's hull, and
m . z is passed on to earlier nodes, down to the input codes, over which the maximum is known. So

    bound(m)  =  sum over nodes of max (w y - m z)  +  linear constants  +  max over the input box

is an upper bound for every choice of m, and a convex function of all of them: they can be improved
by subgradients, which say how far the maximizers break the equations z = argument(earlier
maximizers).

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
    """A batch of subproblems: intervals of every value ([N, *shape] ends), and every nonlinear
    node's hull there. Where they are all about one box, N may be 1."""

    boxes: list[Interval]
    hulls: dict[int, Hull]

    def as_guide(self, kernels: Kernels) -> Relaxations:
        """The same with input box and hulls in the guide's type."""
        codes = (self.boxes[0][0].astype(GUIDE), self.boxes[0][1].astype(GUIDE))
        hulls = {k: hull.as_guide(kernels) for k, hull in self.hulls.items()}
        return Relaxations([codes, *self.boxes[1:]], hulls)

    def take(self, rows: Array) -> Relaxations:
        """Some of the subproblems; a single box is the one of all."""
        if len(self.boxes[0][0]) == 1:
            return self
        return Relaxations(
            [(a[rows], b[rows]) for a, b in self.boxes],
            {k: h.take(rows) for k, h in self.hulls.items()},
        )


@dataclass(eq=False)
class Primal:
    """Where the maxima were taken: the input codes and their multipliers [N, R, codes] and, per
    nonlinear node, the weights of its result, its result and argument; per node that stops the
    pass, its result. Shapes [N, R, *shape], in the type of the pass."""

    codes: Array = None
    pull: Array = None
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
        """Codes per unit of the argument, in the guide's type, of the nodes for which that is
        known."""
        found = {
            k: rule.pace()
            for k, rule in enumerate(self.host_rules, 1)
            if isinstance(rule, NonlinearRelaxation)
        }
        return {
            k: self.kernels.asarray(np.asarray(p, GUIDE))
            for k, p in found.items()
            if p is not None and p.any()
        }

    @staticmethod
    def fixed(boxes: list[Interval]) -> dict[int, Array]:
        """Where values are fixed in boxes: bool [N, 1, *shape]."""
        return {k: (low == high)[:, None] for k, (low, high) in enumerate(boxes)}

    @staticmethod
    def make(network: Network, kernels: Kernels) -> Dual:
        """Prepare the rules of `network` (whose arrays are NumPy) for `kernels`."""
        cpu = [
            node.op.relaxation(kernels, *(network.type_of(i) for i in node.inputs))
            for node in looking(network.nodes)
        ]
        rules = cpu if kernels.is_host else [moved(rule, kernels) for rule in cpu]
        return Dual(kernels, network.on(kernels), tuple(rules), tuple(cpu))

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
        """Multipliers to start from, in the weights' type: edges of the hulls, from the back to the
        front (CROWN's choice)."""
        chosen: Multipliers = {}
        self._walk(Relaxations(boxes, {}), weights, chosen)
        return chosen

    def upper(
        self,
        relaxations: Relaxations,
        weights: Mapping[int, Array],
        multipliers: Multipliers | None = None,
    ) -> Array:
        """Upper bounds int64 [N, R] of the sum over v of weights[v] [N, R, *shape] . value v, all
        int64.

        `multipliers` int64, or None: edges of the hulls. Raises TooLarge where exact arithmetic
        would leave its types.
        """
        return self._walk(relaxations, weights, multipliers)[0]

    def last_layer(self, relaxations: Relaxations, weights: Mapping[int, Array]) -> Array:
        """Upper bounds as `upper`, with multipliers 0: the nonlinear nodes met first stand for
        their intervals. That is interval arithmetic with the last linear nodes fused with the
        weights (Gowal et al., 2018). Raises TooLarge.

        Sound because a node's result lies in its interval.
        """
        return self._walk(relaxations, weights, None, near=True)[0]

    def guide(
        self, relaxations: Relaxations, weights: Mapping[int, Array], multipliers: Multipliers
    ) -> tuple[Array, Primal]:
        """The bound in the guide's type [N, R] (not sound), and where the maxima were taken."""
        return self._walk(relaxations, weights, multipliers)

    @np.errstate(
        over="ignore", invalid="ignore"
    )  # of guides; nothing exact is computed in floats that could overflow
    def _walk(
        self,
        relaxations: Relaxations,
        weights: Mapping[int, Array],
        multipliers: Multipliers | None,
        near: bool = False,
    ) -> tuple[Array, Primal]:
        boxes = relaxations.boxes
        held: dict[int, Array] = dict(weights)
        primal = Primal()
        constants: list[Any] = []
        for k in looking(range(max(held, default=0), 0, -1)):
            own, node, rule = held.pop(k, None), self.network.nodes[k - 1], self.rules[k - 1]
            inputs = tuple(boxes[i] for i in node.inputs)
            if own is None:
                continue
            if near and isinstance(rule, NonlinearRelaxation):
                self._collect(constants, concretize(self.kernels, own, boxes[k])[0])
                continue
            if isinstance(rule, NonlinearRelaxation) and multipliers is not None:
                if k not in relaxations.hulls:  # choose
                    multipliers[k] = rule.slopes(self.kernels, own, inputs, boxes[k]).astype(
                        own.dtype
                    )
                    constant: Any = 0
                else:
                    hull = relaxations.hulls[k]
                    primal.w[k] = own
                    constant, primal.y[k], primal.z[k] = hull.best(
                        self.kernels, own, multipliers[k]
                    )
                parts = rule.spread(self.kernels, multipliers[k], inputs)
            else:
                parts, constant = rule.backward(self.kernels, own, inputs, boxes[k])
                if isinstance(rule, IntervalRelaxation) and not exact(own):
                    primal.y[k] = concretize(self.kernels, own, boxes[k])[1]
            self._collect(constants, constant)
            for i, part in zip(node.inputs, parts, strict=True):
                if part is not None:
                    held[i] = self._added(held[i], part) if i in held else part
        if 0 in held:
            constant, primal.codes = concretize(self.kernels, held[0], boxes[0])
            self._collect(constants, constant)
            primal.pull = held[0]
        return self.kernels.total(constants) if constants else 0, primal

    def _collect(self, constants: list[Any], constant: Any) -> None:
        """Let a constant into the list; if exact, added to what is there and measured."""
        if not hasattr(constant, "dtype"):
            return
        if exact(constant):
            constants[:] = [self._added(constants[0] if constants else 0, constant)]
        else:
            constants.append(constant.astype(GUIDE, copy=False))

    def _added(self, a: Any, b: Any) -> Any:
        """a + b; if exact, both and the sum well inside int64."""
        # each is below LIMIT = 2**61, so the sum does not wrap before it is measured
        result = a + b
        if hasattr(b, "dtype") and exact(b) and magnitude(self.kernels, b, result) >= LIMIT:
            raise TooLarge
        return result

    def follow(self, primal: Primal, last: int) -> list[Array]:
        """Every value up to `last` if linear nodes take the maximizers before them: [N * R, *shape]
        in the guide's type. A value that no maximizer reaches is None."""

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
