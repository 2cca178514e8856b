"""The integer network: a frozen list of ops over int32 tensors, and how to run it.

Value 0 is the input: one flat vector of codes. Node k computes value k + 1 from earlier values.
`run` is the living definition of what the network means; every faster way must equal it bit for
bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qverify.deadline import looking
from qverify.kernels import Array, Kernels
from qverify.ops import AbstractOp, Interval, Type


@dataclass(frozen=True)
class Node:
    """One op applied to earlier values; `name` is the node's in the ONNX file, for messages."""

    op: AbstractOp
    inputs: tuple[int, ...]
    type: Type
    name: str = ""


@dataclass(frozen=True)
class Network:
    """A list of ops over int32 tensors.

    `input_type` is that of the flat code vector [n]; `outputs` are value numbers, flattened and
    joined on output.
    """

    input_type: Type
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @functools.cached_property
    def exact(self) -> bool:
        """Whether no op has a band.

        Then `run` gives the runtime's integers, and so does `intervals` on points.
        """
        return all(node.op.exact for node in self.nodes)

    def type_of(self, value: int) -> Type:
        return self.input_type if value == 0 else self.nodes[value - 1].type

    def validate(self) -> None:
        """Raise ValueError unless every node reads earlier values only, and has its op's type."""
        for k, node in enumerate(self.nodes):
            if any(not 0 <= i <= k for i in node.inputs):
                raise ValueError(f"node {k} '{node.name}' reads a later value")
            if node.op.output_type(*(self.type_of(i) for i in node.inputs)) != node.type:
                raise ValueError(f"node {k} '{node.name}' is mistyped")
        if not self.outputs or any(not 0 <= i <= len(self.nodes) for i in self.outputs):
            raise ValueError("an output is not one of the values")

    def on(self, kernels: Kernels) -> Network:
        """This network with its arrays on the given machine."""
        return replace(
            self, nodes=tuple(replace(node, op=node.op.on(kernels)) for node in self.nodes)
        )

    @property
    def output_size(self) -> int:
        return sum(self.type_of(i).size for i in self.outputs)

    @property
    def widest(self) -> int:
        """The elements of the largest value."""
        return max(self.input_type.size, *(node.type.size for node in self.nodes), 1)

    def elements_per_point(self) -> int:
        """How many int32 values one evaluation makes: what a batch size is chosen by."""
        return self.input_type.size + sum(node.type.size for node in self.nodes)

    def last_use(self) -> list[int]:
        """For each value the last node that reads it (len(nodes) for outputs), to free memory."""
        last = [-1] * (len(self.nodes) + 1)
        for k, node in enumerate(self.nodes):
            for i in node.inputs:
                last[i] = k
        for i in self.outputs:
            last[i] = len(self.nodes)
        return last

    def values(self, kernels: Kernels, x: Array) -> list[Array]:
        """All values for a batch of code vectors `x` int32 [N, n]."""
        values = [x]
        for node in looking(self.nodes):
            values.append(node.op.run(kernels, *(values[i] for i in node.inputs)))
        return values

    def run(self, kernels: Kernels, x: Array) -> Array:
        """The outputs, int32 [N, output_size], for a batch of code vectors `x` int32 [N, n]."""
        values: list[Array | None] = [x]
        last = self.last_use()
        for k, node in enumerate(looking(self.nodes)):
            values.append(node.op.run(kernels, *(values[i] for i in node.inputs)))
            for i in node.inputs:
                if last[i] == k:
                    values[i] = None
        return self.flat_outputs(kernels, values)

    def flat_outputs(self, kernels: Kernels, values: Sequence[Array | None]) -> Array:
        """The outputs among `values`, flattened and joined: [N, output_size]."""
        parts = [values[i].reshape(values[i].shape[0], -1) for i in self.outputs]  # type: ignore[union-attr]
        return parts[0] if len(parts) == 1 else kernels.xp.concatenate(parts, axis=1)

    def intervals(self, kernels: Kernels, lower: Array, upper: Array) -> Interval:
        """Interval bound propagation: bounds of the outputs over boxes of code vectors [N, n].

        Each is int32 [N, output_size]. Sound by induction over the nodes: each op's `interval`
        contains every result that the runtime may give for inputs in their intervals. Exact on
        points, if the network is exact.
        """
        boxes: list[Interval | None] = [(lower, upper)]
        last = self.last_use()
        for k, node in enumerate(looking(self.nodes)):
            boxes.append(node.op.interval(kernels, *(boxes[i] for i in node.inputs)))  # type: ignore[arg-type]
            for i in node.inputs:
                if last[i] == k:
                    boxes[i] = None
        lowers = [None if box is None else box[0] for box in boxes]
        uppers = [None if box is None else box[1] for box in boxes]
        return self.flat_outputs(kernels, lowers), self.flat_outputs(kernels, uppers)

    def boxes(
        self,
        kernels: Kernels,
        lower: Array,
        upper: Array,
        clamps: Mapping[int, Interval] | None = None,
        known: Mapping[int, Interval] | None = None,
    ) -> tuple[list[Interval], Array]:
        """Intervals of every value over boxes [N, codes], each intersected with its clamp, if any.

        Clamps are [N or 1, *shape] each. A value in `known` takes the bounds given there ([1,
        *shape], before its clamp) instead of being computed. Also says which boxes may hold a point
        that meets all clamps: bool [N]; in the others, some interval is empty.
        """
        xp, n = kernels.xp, lower.shape[0]
        boxes: list[Interval] = [(lower, upper)]
        possible = xp.ones(n, dtype=xp.bool_)
        for k, node in enumerate(looking(self.nodes), 1):
            if known and k in known:
                low, high = (xp.broadcast_to(end, (n, *end.shape[1:])) for end in known[k])
            else:
                low, high = node.op.interval(kernels, *(boxes[i] for i in node.inputs))
            if clamps and k in clamps:
                low, high = xp.maximum(low, clamps[k][0]), xp.minimum(high, clamps[k][1])
                possible &= (low <= high).reshape(n, -1).all(axis=1)
                high = xp.maximum(low, high)
            boxes.append((low, high))
        return boxes, possible

    def gradient(self, kernels: Kernels, values: list[Array], upstream: Array) -> Array:
        """A straight-through gradient [N, n] of `upstream` [N, output_size] . outputs (a guide)."""
        xp = kernels.xp
        grads: list[Array | None] = [None] * len(values)
        start = 0
        for i in self.outputs:
            size = self.type_of(i).size
            part = upstream[:, start : start + size].reshape(values[i].shape).astype(xp.float32)
            held = grads[i]
            grads[i] = part if held is None else held + part
            start += size
        for k in looking(range(len(self.nodes) - 1, -1, -1)):
            grad = grads[k + 1]
            if grad is None:
                continue
            node = self.nodes[k]
            parts = node.op.gradient(kernels, tuple(values[i] for i in node.inputs), grad)
            for i, piece in zip(node.inputs, parts, strict=True):
                held = grads[i]
                grads[i] = piece if held is None else held + piece
            grads[k + 1] = None
        if grads[0] is None:
            return xp.zeros(values[0].shape, dtype=xp.float32)
        return grads[0]
