"""Backward linear bounds over the integer network, evaluated exactly.

Sound: a linear function of network values is replaced, op by op from the back, by a linear function of earlier values that
is nowhere smaller on the box (`qverify.ops.relax`), until only the input codes are left, over which its maximum is known.
All of it is integer arithmetic; slopes are chosen in floats, but any slope gives a valid bound.
Cost: about one transposed inference for every function and box.
Reference: CROWN (Zhang et al., NeurIPS 2018); the dual view is Dvijotham et al. (UAI 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qverify.deadline import Deadline
from qverify.kernels import Array, Kernels
from qverify.network import Network
from qverify.ops import Interval
from qverify.ops.base import moved
from qverify.ops.relax import LIMIT, Relaxation, TooLarge, concretize, magnitude

PRECISION = 16  # multipliers of a single accumulator are multiples of 2**-16


@dataclass(frozen=True, eq=False)
class Backward:
    """The backward rules of a network, on a machine."""

    kernels: Kernels
    network: Network
    rules: tuple[Relaxation, ...]  # one per node

    @staticmethod
    def make(network: Network, kernels: Kernels) -> Backward:
        """Prepare the rules of `network` (whose arrays are NumPy) for `kernels`."""
        cpu = [node.op.relaxation(kernels, *(network.type_of(i) for i in node.inputs)) for node in network.nodes]
        rules = cpu if kernels.name == "cpu" else [moved(rule, kernels) for rule in cpu]
        return Backward(kernels, network.on(kernels), tuple(rules))

    def upper(self, boxes: list[Interval], start: Mapping[int, Array]) -> Array:
        """Upper bounds int64 [N, R] of the sum over v of start[v] [N, R, *shape] . value v, on boxes of every value.

        Raises TooLarge where exact arithmetic would leave its types.
        """
        held: dict[int, Array] = dict(start)
        total: Any = 0
        for k in range(max(held, default=0), 0, -1):
            weights = held.pop(k, None)
            if weights is None:
                continue
            node = self.network.nodes[k - 1]
            parts, constant = self.rules[k - 1].backward(
                self.kernels, weights, tuple(boxes[i] for i in node.inputs), boxes[k]
            )
            total = self._added(total, constant)
            for i, part in zip(node.inputs, parts, strict=True):
                if part is not None:
                    held[i] = self._added(held[i], part) if i in held else part
        if 0 in held:
            total = self._added(total, concretize(self.kernels, held[0], boxes[0]))
        return total

    def _added(self, a: Any, b: Array) -> Array:
        """a + b, both and the sum well inside int64."""
        result = a + b  # each is below LIMIT = 2**61, so the sum does not wrap before it is measured
        if magnitude(self.kernels, b) >= LIMIT or magnitude(self.kernels, result) >= LIMIT:
            raise TooLarge
        return result

    def tightened(
        self, lower: Array, upper: Array, deadline: Deadline, rows: int = 256, budget: float = 2e8
    ) -> dict[int, Interval]:
        """Bounds [1, *shape] of values inside one box ([1, codes] ends), by backward bounds of every element of every
        value that a rule relaxes; they hold in every part of the box. A value whose bounds would touch more than `budget`
        elements is left out, and so is what the deadline leaves no time for."""
        clamps: dict[int, Interval] = {}
        whole = self.network.elements_per_point()
        targets = sorted(
            {node.inputs[0] for node, rule in zip(self.network.nodes, self.rules, strict=True) if rule.relaxes}
        )
        for value in targets[1:]:  # intervals are as good for the first, which is a sum over the input box
            if 2 * self.network.type_of(value).size * whole > budget:
                continue
            boxes = self.network.boxes(self.kernels, lower, upper, clamps)
            clamps[value] = self._tightened_value(boxes, value, rows, deadline)
        return clamps

    def _tightened_value(self, boxes: list[Interval], value: int, rows: int, deadline: Deadline) -> Interval:
        xp = self.kernels.xp
        low, high = (end.copy() for end in boxes[value])
        shape = low.shape[1:]
        size = int(np.prod(shape, dtype=np.int64))
        low, high = low.reshape(size), high.reshape(size)
        chosen = self.kernels.to_host(xp.flatnonzero(high > low))
        for start in range(0, len(chosen), rows):
            if deadline.passed():
                break
            own = chosen[start : start + rows]
            weights = np.zeros((1, 2 * len(own), size), np.int64)
            weights[0, np.arange(len(own)), own] = 1 << PRECISION
            weights[0, len(own) + np.arange(len(own)), own] = -(1 << PRECISION)
            try:
                bound = self.upper(boxes, {value: self.kernels.asarray(weights.reshape(1, -1, *shape))})[0] >> PRECISION
            except TooLarge:
                continue
            at = self.kernels.asarray(own)
            # The minimum first, in int64: a bound may leave int32, what is kept of it does not (unless both ends crossed).
            upper, lower = xp.minimum(high[at], bound[: len(own)]), xp.maximum(low[at], -bound[len(own) :])
            sane = lower <= upper  # an empty interval can only mean an empty box of the caller's
            high[at] = xp.where(sane, upper, high[at]).astype(high.dtype)
            low[at] = xp.where(sane, lower, low[at]).astype(low.dtype)
        return low.reshape(1, *shape), high.reshape(1, *shape)
