"""A network's bounds by onnxruntime: stretches of nodes that `rules` can express become graphs, the
nodes between them are left to the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qverify import runtime
from qverify.deadline import looking
from qverify.kernels import Kernels
from qverify.network import Network
from qverify.ops import AbstractOp, Conv, Dense, Interval, Requantize
from qverify.propagate.rules import Held, Rules, add, add_rounded
from qverify.propagate.weights import Inexpressible

# A stretch needs one of these: without it, passing values back and forth costs more than it saves.
WORTH_IT: tuple[type[AbstractOp], ...] = (Dense, Conv)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Nodes that one graph computes, from int32 values or codes above a low (see `Held`)."""

    nodes: tuple[int, ...]
    inputs: dict[int, tuple[str, int | None, tuple[int, ...]]]  # value: name, low, axes
    outputs: tuple[tuple[int, int | None], ...]  # value, low
    function: Callable[[dict[str, Any]], list[Any]]
    # One for each input: fresh memory costs more than filling it.
    buffers: dict[int, Any] = field(default_factory=dict)

    def run(self, network: Network, boxes: dict[int, Interval]) -> None:
        """Read from and add to `boxes`."""
        packed = {}
        for value, (name, low, axes) in self.inputs.items():
            ends = boxes[value]
            count, shape = len(ends[0]), ends[0].shape[1:]
            if value not in self.buffers or len(self.buffers[value]) < count:
                self.buffers[value] = np.empty(
                    (count, 2, *shape), np.int32 if low is None else np.uint8
                )
            array = self.buffers[value][:count]
            for k in (0, 1):
                array[:, k] = ends[k]  # modulo 256, hence right once low is subtracted
            if low:
                array -= np.uint8(low % 256)
            packed[name] = array.reshape(-1, *axes)
        for (value, low), array in zip(self.outputs, self.function(packed), strict=True):
            both = array.reshape(-1, 2, *network.type_of(value).shape)
            boxes[value] = (both[:, 0] + np.int32(low or 0), both[:, 1] + np.int32(low or 0))


@dataclass(frozen=True, eq=False)
class Graphs:
    """The steps of one network: stretches, and single nodes by number."""

    network: Network
    kernels: Kernels
    steps: tuple[Stretch | int, ...]
    last: dict[int, int]  # for each value that leaves a step, the last step that reads it
    name: str = "onnxruntime"

    @staticmethod
    def make(network: Network, kernels: Kernels, exactly: bool) -> Graphs | None:
        """The network's steps; None where no stretch is worth it. Raises ModelError where
        onnxruntime refuses a graph."""
        steps = make_steps(network, exactly)
        if all(isinstance(step, int) for step in steps):
            return None
        return Graphs(network, kernels, tuple(steps), _last_use(network, steps))

    def run(self, lower: Any, upper: Any) -> Interval:
        """As `Network.intervals`. Raises ModelError if onnxruntime fails."""
        network, boxes = self.network, {0: (lower, upper)}
        for number, step in enumerate(looking(self.steps)):
            if isinstance(step, Stretch):
                step.run(network, boxes)
                read: Iterable[int] = step.inputs
            else:
                node = network.nodes[step]
                boxes[step + 1] = node.op.interval(self.kernels, *(boxes[i] for i in node.inputs))
                read = set(node.inputs)
            for value in read:
                if self.last[value] == number:
                    del boxes[value]
        low, high = ([boxes[i][k].reshape(len(lower), -1) for i in network.outputs] for k in (0, 1))
        if len(low) == 1:
            return low[0], high[0]
        return np.concatenate(low, axis=1), np.concatenate(high, axis=1)


def make_steps(network: Network, exactly: bool) -> list[Stretch | int]:
    """The network as stretches for onnxruntime and nodes for NumPy, in order."""
    readers: list[list[int]] = [[] for _ in range(len(network.nodes) + 1)]
    for k, node in enumerate(network.nodes):
        for i in node.inputs:
            readers[i].append(k)
    steps: list[Stretch | int] = []
    done: set[int] = set()
    part = _Part(network, readers)
    for k in looking(range(len(network.nodes))):
        if k in done:
            continue
        try:
            done.update(part.add(k))
        except Inexpressible:
            steps += part.closed(exactly)
            steps.append(k)
            part = _Part(network, readers)
    return steps + part.closed(exactly)


class _Part:
    """A stretch under construction."""

    def __init__(self, network: Network, readers: list[list[int]]) -> None:
        self._network, self._readers = network, readers
        self._graph = runtime.IntegerGraph()
        self._rules = Rules(self._graph)
        self._held: dict[int, Held] = {}
        self._inputs: dict[int, tuple[str, int | None]] = {}
        self._nodes: list[int] = []

    def add(self, k: int) -> list[int]:
        """Add node k, and the rounding of its result if that can be fused; the nodes added. Raises
        Inexpressible."""
        node, readers = self._network.nodes[k], self._readers[k + 1]
        if node.type.size == 0 or any(self._network.type_of(i).size == 0 for i in node.inputs):
            raise Inexpressible
        if (
            isinstance(node.op, Dense | Conv)
            and len(readers) == 1
            and k + 1 not in self._network.outputs
        ):
            after = self._network.nodes[readers[0]]
            if isinstance(after.op, Requantize):
                try:
                    x = self._value(node.inputs[0])
                    self._held[readers[0] + 1] = add_rounded(
                        self._rules, node.op, after.op, x, after.type
                    )
                    self._nodes += [k, readers[0]]
                    return [k, readers[0]]
                except Inexpressible:
                    pass  # the two one by one, then
        self._held[k + 1] = add(
            self._rules, node.op, [self._value(i) for i in node.inputs], node.type
        )
        self._nodes.append(k)
        return [k]

    def _value(self, number: int) -> Held:
        if number not in self._held:
            kind = self._network.type_of(number)
            low = kind.low if kind.count <= 256 else None
            self._inputs[number] = f"x{number}", low
            self._held[number] = Held(kind, low, source=f"x{number}")
        return self._held[number]

    def closed(self, exactly: bool) -> list[Stretch | int]:
        """The stretch, or its nodes where that is not worth it."""
        nodes, network = sorted(self._nodes), self._network
        if not any(isinstance(network.nodes[k].op, WORTH_IT) for k in nodes):
            return list(nodes)
        inside = set(nodes)
        needed = [
            k + 1
            for k in nodes
            if k + 1 in self._held
            and (k + 1 in network.outputs or not inside.issuperset(self._readers[k + 1]))
        ]
        held = [self._held[i] for i in needed]
        names = [
            next(iter(x.pairs.values())) if x.pairs else self._rules.pair(x, 2 * x.type.size)
            for x in held
        ]
        axes = self._rules.inputs
        inputs = {
            i: (name, low, axes[name]) for i, (name, low) in self._inputs.items() if name in axes
        }
        outputs = tuple((i, self._held[i].low) for i in needed)
        return [Stretch(tuple(nodes), inputs, outputs, self._graph.compiled(names, exactly))]


def _last_use(network: Network, steps: list[Stretch | int]) -> dict[int, int]:
    """For each value that leaves a step, the last step that reads it."""
    last = {}
    for number, step in enumerate(steps):
        read = list(step.inputs) if isinstance(step, Stretch) else network.nodes[step].inputs
        last.update(dict.fromkeys(read, number))
    last.update(dict.fromkeys(network.outputs, len(steps)))
    return last
