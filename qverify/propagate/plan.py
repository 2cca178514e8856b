"""From an integer network to a plan: node by node, by a rule of `device_rules`, or by the op's own
interval rule on ends where there is none, or where packing refuses the node's parameters."""

from __future__ import annotations

from math import prod

from qverify.kernels.fused import Fused
from qverify.kernels.packing import Unpackable
from qverify.network import Network
from qverify.ops import Conv, Dense, Requantize
from qverify.propagate.buffers import Buffers
from qverify.propagate.device import Plan, finished
from qverify.propagate.device_rules import DEVICE_RULES


def make_plan(network: Network, fused: Fused) -> Plan:
    """The plan for a network whose arrays are on the machine of `fused`."""
    return _Planner(network, fused).plan()


class _Planner:
    """A plan under construction."""

    def __init__(self, network: Network, fused: Fused) -> None:
        self._network, self._fused = network, fused
        self._buffers = Buffers(network, fused)
        self._readers: list[list[int]] = [[] for _ in range(len(network.nodes) + 1)]
        for k, node in enumerate(network.nodes):
            for i in node.inputs:
                self._readers[i].append(k)

    def plan(self) -> Plan:
        """All nodes in order."""
        done: set[int] = set()
        for k in range(len(self._network.nodes)):
            if k not in done:
                done.update(self._add(k))
        outputs = tuple(self._buffers.in_ends(i) for i in self._network.outputs)
        return finished(self._fused, self._buffers.steps, outputs)

    def _add(self, k: int) -> list[int]:
        """Add node k, and the rounding of its result if that can be fused; the nodes added."""
        node = self._network.nodes[k]
        rule = DEVICE_RULES.rule(node.op)
        sizes = [self._network.type_of(i).size for i in (k + 1, *node.inputs)]
        if rule is not None and all(sizes):
            for rounding in dict.fromkeys((self._rounding(k), None)):
                try:
                    rule(self._buffers, node.op, k, rounding)
                except Unpackable:
                    continue
                return [k] if rounding is None else [k, rounding]
        self._by_the_op(k)
        return [k]

    def _by_the_op(self, k: int) -> None:
        """Add node k by its op's own interval rule."""
        node, op = self._network.nodes[k], self._network.nodes[k].op
        size = 32 * sum(self._network.type_of(i).size for i in (k + 1, *node.inputs))
        if isinstance(op, Conv):  # windows are copied
            batch, _, *places = node.type.shape
            size += 8 * prod(op.weight.shape[1:]) * op.groups * prod(places) * batch
        buffers = self._buffers
        reads = tuple(buffers.in_ends(i) for i in node.inputs)
        buffers.ends[k + 1] = buffers.step(
            lambda *boxes: op.interval(buffers.kernels, *boxes), reads, size
        )

    def _rounding(self, k: int) -> int | None:
        """The node that rounds the result of the weighted sum k, if nothing else reads it."""
        readers = self._readers[k + 1]
        if isinstance(self._network.nodes[k].op, Dense | Conv) and len(readers) == 1:
            after = self._network.nodes[readers[0]].op
            if isinstance(after, Requantize) and k + 1 not in self._network.outputs:
                return readers[0]
        return None
