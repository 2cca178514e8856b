"""The same network with fewer nodes. Every rewriting keeps every output integer, for every input.

* A convolution with a single output position is a dense layer.
* A clip of codes behind a requantization is a requantization with a narrower range: rounding is
  monotone, so clip(rint(clip(v, l, h)), a, b) = rint(clip(v, max(l, a), min(h, b))) for integers a
  <= b within [l, h].
* Moves of moved elements are one move; a move that moves nothing, and a node that no output needs,
  go.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from qverify.network import Network, Node
from qverify.ops import AbstractOp, Conv, Dense, Layout, Requantize, Table, Type


@dataclass
class _Rewriter:
    old: Network
    nodes: list[Node] = field(default_factory=list)
    names: list[int] = field(default_factory=lambda: [0])  # old value -> new value

    def type_of(self, value: int) -> Type:
        return self.old.input_type if value == 0 else self.nodes[value - 1].type

    def add(self, op: AbstractOp, inputs: tuple[int, ...], name: str) -> int:
        self.nodes.append(
            Node(op, inputs, op.output_type(*(self.type_of(i) for i in inputs)), name)
        )
        return len(self.nodes)

    def move(self, op: Layout, source: int, name: str) -> int:
        """A move of one value, after the move that made it."""
        before = self.nodes[source - 1] if source else None
        if before is not None and _is_move(before):
            assert isinstance(before.op, Layout)
            index = before.op.index if op.index is None else op.index
            if op.index is not None and before.op.index is not None:
                index = before.op.index[op.index]
            return self.move(Layout(op.shape, index), before.inputs[0], name)
        kind = self.type_of(source)
        if (
            op.index is not None
            and len(op.index) == kind.size
            and (op.index == np.arange(kind.size)).all()
        ):
            op = Layout(op.shape)
        return (
            source if op.index is None and op.shape == kind.shape else self.add(op, (source,), name)
        )


def _is_move(node: Node) -> bool:
    return isinstance(node.op, Layout) and node.op.constants is None and len(node.inputs) == 1


def simplified(network: Network) -> tuple[Network, list[int]]:
    """The network with fewer nodes, and the new number of every old value (0: it is gone)."""
    rewriter = _Rewriter(network)
    uses = np.zeros(len(network.nodes) + 1, np.int64)
    for i in (*network.outputs, *(i for node in network.nodes for i in node.inputs)):
        uses[i] += 1
    for k, node in enumerate(network.nodes):
        inputs = tuple(rewriter.names[i] for i in node.inputs)
        if _is_move(node):
            assert isinstance(node.op, Layout)
            value = rewriter.move(node.op, inputs[0], node.name)
        elif isinstance(node.op, Conv) and node.op.groups == 1 and set(node.type.shape[2:]) == {1}:
            value = _as_dense(rewriter, node, inputs[0])
        elif isinstance(node.op, Table) and (found := _clipped(network, k, uses)) is not None:
            value = _narrowed(rewriter, inputs[0], *found)
        else:
            value = rewriter.add(node.op, inputs, node.name)
        rewriter.names.append(value)
    return _without_dead(network, rewriter)


def _as_dense(rewriter: _Rewriter, node: Node, source: int) -> int:
    conv = node.op
    assert isinstance(conv, Conv)
    batch, channels, *spatial = rewriter.type_of(source).shape
    weight = np.zeros((channels, *spatial, conv.weight.shape[0]), np.int64)
    bias = conv.bias.copy()
    for tap in np.ndindex(*conv.weight.shape[2:]):
        at_tap = conv.weight[(slice(None), slice(None), *tap)]  # [M, C]
        at = tuple(t * d - p for t, d, p in zip(tap, conv.dilations, conv.pads, strict=False))
        if all(0 <= a < n for a, n in zip(at, spatial, strict=True)):
            weight[(slice(None), *at)] += at_tap.T
        else:
            bias += conv.pad_value * at_tap.sum(axis=1)
    flat = rewriter.move(Layout((batch, channels * int(np.prod(spatial)))), source, node.name)
    dense = Dense(weight.reshape(-1, weight.shape[-1]), bias, conv.x_low, conv.x_high)
    return rewriter.move(
        Layout(node.type.shape), rewriter.add(dense, (flat,), node.name), node.name
    )


def _clipped(network: Network, k: int, uses: np.ndarray) -> tuple[int, int] | None:
    """The range [a, b] of a table that only clips what a requantization has made.

    None where something else uses the requantization.
    """
    table, value = network.nodes[k].op, network.nodes[k].inputs[0]
    assert isinstance(table, Table)
    while value and uses[value] == 1 and _is_move(network.nodes[value - 1]):
        (value,) = network.nodes[value - 1].inputs
    if not value or uses[value] != 1 or len(table.values) != 1:
        return None
    op = network.nodes[value - 1].op
    if not isinstance(op, Requantize):
        return None
    codes = np.arange(op.low, op.high + 1)
    values = table.values[0][codes - table.low]
    a, b = int(values[0]), int(values[-1])
    return (
        (a, b) if op.low <= a <= b <= op.high and (values == np.clip(codes, a, b)).all() else None
    )


def _narrowed(rewriter: _Rewriter, value: int, low: int, high: int) -> int:
    """Narrow the range of the requantization behind `value`, and of the moves after it."""
    chain = [value]
    while not isinstance(rewriter.nodes[chain[-1] - 1].op, Requantize):
        chain.append(rewriter.nodes[chain[-1] - 1].inputs[0])
    for at in reversed(chain):
        node = rewriter.nodes[at - 1]
        op = replace(node.op, low=low, high=high) if isinstance(node.op, Requantize) else node.op
        rewriter.nodes[at - 1] = replace(
            node, op=op, type=op.output_type(*(rewriter.type_of(i) for i in node.inputs))
        )
    return value


def _without_dead(network: Network, rewriter: _Rewriter) -> tuple[Network, list[int]]:
    outputs = tuple(rewriter.names[i] for i in network.outputs)
    needed = set(outputs)
    for k in range(len(rewriter.nodes), 0, -1):
        if k in needed:
            needed.update(rewriter.nodes[k - 1].inputs)
    number, nodes = {0: 0}, []
    for k, node in enumerate(rewriter.nodes, 1):
        if k in needed:
            nodes.append(replace(node, inputs=tuple(number[i] for i in node.inputs)))
            number[k] = len(nodes)
    result = Network(network.input_type, tuple(nodes), tuple(number[i] for i in outputs))
    return result, [number.get(value, 0) for value in rewriter.names]
