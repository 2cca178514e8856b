"""One numbering for one network, whatever order and names its graph's nodes had.

A digest that tells networks apart.

Two environments may write the same graph in different orders. Values and codes are numbered by what
they are instead: codes by the input elements they come from, values as a walk from the outputs
meets them. So certificates, whose cuts speak of numbers, hold wherever the same network is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from qverify.frontend.builder import Identity, Quantizer
from qverify.network import Network, Node
from qverify.ops import FloatStep, Layout

Part = Quantizer | Identity


def canonical_codes(nodes: Sequence[Node], parts: Sequence[Part]) -> tuple[list[Node], list[Part]]:
    """The parts of the code vector in an order of their content, equal ones once.

    And the nodes for them, of which only moves read value 0.
    """
    keys = [(part.source.astype(">i8").tobytes(), _digest(part)) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: keys[i])
    kept = [i for n, i in enumerate(order) if not n or keys[i] != keys[order[n - 1]]]
    start = dict(
        zip(
            (keys[i] for i in kept),
            np.cumsum([0, *(len(parts[i].source) for i in kept)]),
            strict=False,
        )
    )
    new = [start[key] + np.arange(len(part.source)) for key, part in zip(keys, parts, strict=True)]
    number = np.concatenate(new) if new else np.zeros(0, np.int64)
    result = list(nodes)
    for k, node in enumerate(nodes):
        if 0 in node.inputs:
            assert isinstance(node.op, Layout) and node.op.index is not None and node.inputs == (0,)
            result[k] = replace(node, op=replace(node.op, index=number[node.op.index]))
    return result, [parts[i] for i in kept]


def canonical_values(network: Network) -> tuple[Network, list[int]]:
    """The network with its nodes in the order of a walk from the outputs, inputs first.

    And the new number of every value (0 for one that no output needs).
    """
    number = {0: 0}
    order: list[int] = []
    for output in network.outputs:
        stack = [output]
        while stack:
            value = stack[-1]
            left = (
                []
                if value in number
                else [i for i in network.nodes[value - 1].inputs if i not in number]
            )
            if left:
                stack.append(left[0])
                continue
            stack.pop()
            if value not in number:
                order.append(value)
                number[value] = len(order)
    nodes = [network.nodes[value - 1] for value in order]
    nodes = [replace(node, inputs=tuple(number[i] for i in node.inputs)) for node in nodes]
    outputs = tuple(number[value] for value in network.outputs)
    return Network(network.input_type, tuple(nodes), outputs), [
        number.get(value, 0) for value in range(len(network.nodes) + 1)
    ]


def digest(network: Network, *others: Any) -> str:
    """SHA-256 of what a network computes, node by node, without the nodes' names.

    `others` are values that count as well.
    """
    nodes = [(node.op, node.inputs, node.type) for node in network.nodes]
    return _digest((network.input_type, nodes, network.outputs, others))


def _digest(value: Any) -> str:
    result = hashlib.sha256()
    for piece in _pieces(value):
        result.update(len(piece).to_bytes(8, "little") + piece)
    return result.hexdigest()


# The digest stands in certificates: a class that is renamed keeps the name that was hashed first.
WRITTEN_AS: dict[type, str] = {FloatStep: "Step"}


def _pieces(value: Any) -> Iterator[bytes]:
    """A value as bytes that tell it apart from any other one."""
    if isinstance(value, np.ndarray):
        array = value.astype(value.dtype.newbyteorder("<"))
        yield f"{array.dtype.str}{list(array.shape)}".encode()
        yield array.tobytes()
    elif is_dataclass(value):
        yield WRITTEN_AS.get(type(value), type(value).__name__).encode()
        for field in fields(value):
            if field.init:
                yield from _pieces(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        yield f"{len(value)} values".encode()
        for one in value:
            yield from _pieces(one)
    else:
        plain = value.item() if isinstance(value, np.generic) else value
        assert isinstance(plain, int | float | str | np.dtype | None), type(plain)
        yield repr(plain).encode()
