"""What faster kernels are tested on before they are used: worst cases for products, and boxes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qverify import runtime
from qverify.errors import QverifyError
from qverify.kernels import open_kernels
from qverify.network import Network, Node
from qverify.ops import AbstractOp, Conv, Dense, FloatProgram, Interval, Layout, Requantize, Type
from qverify.propagate.graphs import Stretch, make_steps

CHECKED = 2e7  # values to be computed by NumPy in the comparison, at most


def sample_boxes(network: Network) -> Interval:
    """Boxes to compare on: the whole range, both of its ends, random points, narrow and wide
    boxes."""
    rng, kind = np.random.default_rng(0), network.input_type
    count = int(np.clip(CHECKED / network.elements_per_point(), 2, 8))
    points = rng.integers(
        kind.low, kind.high, (count + 3, kind.size), dtype=np.int64, endpoint=True
    )
    reach = (
        kind.count * rng.choice([0.0, 0.01, 0.1, 1.0], (count + 3, 1)) * rng.random(points.shape)
    )
    lower, upper = (
        np.maximum(points - reach.astype(np.int64), kind.low),
        np.minimum(points + reach.astype(np.int64), kind.high),
    )
    lower[:2], upper[:1], upper[2], lower[2] = kind.low, kind.high, kind.high, kind.high
    upper[1] = kind.low
    return lower.astype(np.int32), upper.astype(np.int32)


@functools.cache
def product_option() -> bool | None:
    """What must be asked of onnxruntime for exact products on this CPU: nothing (False), or slower
    ones (True); None where there is no (fitting) onnxruntime, or it is not exact either way."""
    if not runtime.available():
        return None
    network = worst_case()
    size = network.input_type.size
    ends = np.array([[0, 255], [255, 255], [0, 0]] * 11, np.int32)
    lower, upper = (np.repeat(ends[:, k : k + 1], size, axis=1) for k in (0, 1))
    expected = network.intervals(open_kernels("cpu"), lower, upper)
    for exactly in (False, True):
        try:
            (stretch,) = make_steps(network, exactly)
            assert isinstance(stretch, Stretch)
            same = True
            for rows in (slice(0, 1), slice(1, 2), slice(None)):  # one row has a kernel of its own
                boxes = {0: (lower[rows], upper[rows])}
                stretch.run(network, boxes)
                found = [
                    np.concatenate([boxes[i][k] for i in network.outputs], axis=1) for k in (0, 1)
                ]
                same = same and all(
                    np.array_equal(a, b[rows]) for a, b in zip(found, expected, strict=True)
                )
            if same:
                return exactly
        except QverifyError:
            continue
    return None


def worst_case() -> Network:
    """A network in which every kind of product has pairs of neighbours that reach furthest: 255 *
    127 and 255 * -128, both twice. Saturation at int16 changes each of its outputs."""
    nodes: list[Node] = []

    def add(op: AbstractOp, x: int) -> int:
        kind = (nodes[x - 1].type,) if x else (Type((512,), 0, 255),)
        nodes.append(Node(op, (x,), op.output_type(*kind)))
        return len(nodes)

    def rounded(x: int) -> int:
        kind = nodes[x - 1].type
        factor = np.float32(250 / kind.count)
        return add(
            Requantize(FloatProgram().then("mul", factor), np.array(127, np.int32), 0, 255), x
        )

    def weight(*shape: int) -> Any:
        """Filters of 127, of -128, and of pairs of both."""
        size = int(np.prod(shape[1:]))
        rows = np.stack(
            [np.full(size, 127), np.full(size, -128), np.resize([127, 127, -128, -128], size)]
        )
        return np.resize(rows, (shape[0], size)).reshape(shape)

    outputs = []
    for shift in (0, 73):  # int8, and uint8 with a zero point
        dense = Dense(weight(72, 512).T - shift, np.zeros(72, np.int64), 0, 255)
        outputs += [add(dense, 0), rounded(add(dense, 0))]
    image = add(Layout((1, 32, 4, 4)), 0)
    for filters, groups, kernel in ((32, 1, 1), (32, 1, 3), (32, 32, 3), (32, 4, 3)):
        shape = (filters, 32 // groups, kernel, kernel)
        pads = (kernel // 2,) * 4
        conv = Conv(
            weight(*shape), np.zeros(filters, np.int64), (1, 1), pads, (1, 1), groups, 0, 0, 255
        )
        outputs.append(add(Layout((filters * 16,)), rounded(add(conv, image))))
    return Network(Type((512,), 0, 255), tuple(nodes), tuple(outputs))
