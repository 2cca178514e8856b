"""Interval bound propagation at the speed of int8 kernels, where they are there and compute
exactly.

`Network.intervals` defines the bounds. On a CPU, stretches of the network whose ops `rules` can
express become graphs that onnxruntime runs; on a GPU, `plan` maps the network onto qverify's own
CUDA kernels. What these cannot express is computed by the op itself. Nothing is trusted: kernels
that saturate or differ in a bit are found by worst cases on this machine and are not used, before
the first use the bounds of some boxes are compared, and so are some of the search's own, ever more
rarely.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qverify import runtime
from qverify.deadline import looking
from qverify.errors import DeviceError, ModelError, QverifyError, SoundnessError
from qverify.kernels import Array, Kernels, open_kernels
from qverify.network import Network, Node
from qverify.ops import AbstractOp, Conv, Dense, FloatProgram, Interval, Layout, Requantize, Type
from qverify.propagate.rules import Held, Rules
from qverify.propagate.weights import Inexpressible

if TYPE_CHECKING:
    from qverify.propagate.device import Plan

PATIENCE = 0.05  # seconds of NumPy's (or CuPy's) before a graph (or a plan) is built
# seconds of CuPy's before the CUDA kernels are compiled, which takes about as long, once per
# process
TO_COMPILE = 3.0
# Without one, passing values back and forth costs more.
WORTH_IT: tuple[type[AbstractOp], ...] = (
    Dense,
    Conv,
)
CHECKED = 2e7  # values to be computed by NumPy in the comparison, at most


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


class Propagator:
    """`Network.intervals` for one network, by the fastest way that computes the same integers."""

    def __init__(self, network: Network, kernels: Kernels, patience: float | None = None) -> None:
        self.name = kernels.library
        # whether a graph was dropped because its bounds differed, which is an error of ours
        self.disagreed = False
        self._network, self._kernels, self._patience = network, kernels, patience
        self._waiting = True
        self._spent = 0.0
        self._batches = 0  # bounded by graphs or by a plan
        self._steps: list[Stretch | int] | None = None
        self._last: dict[int, int] = {}
        self._plan: Plan | None = None

    def intervals(self, lower: Array, upper: Array) -> Interval:
        """As `Network.intervals`: the outputs' bounds, int32 [N, output_size] each, over boxes of
        code vectors [N, n]."""
        if self._waiting and self._spent >= self._enough():
            self._build() if self._kernels.is_host else self._build_plan()
            self._waiting = False
        if self._steps is not None or self._plan is not None:
            try:
                found = (
                    self._plan.run(lower, upper)
                    if self._plan
                    else self._run(self._steps or [], lower, upper)
                )
            except (ModelError, DeviceError):
                self._steps = self._plan = None
                self.name = self._kernels.library
            else:
                self._audit(lower, upper, found)
                return found
        start = time.perf_counter()
        result = self._network.intervals(self._kernels, lower, upper)
        if self._waiting:
            self._kernels.to_host(result[0][:1])  # waits for a GPU
            self._spent += time.perf_counter() - start
        return result

    def _enough(self) -> float:
        """Seconds to be spent on the ops before something faster is made."""
        if self._patience is not None:
            return self._patience
        if self._kernels.is_host:
            return PATIENCE
        from qverify.propagate.device import is_open

        return PATIENCE if is_open(self._kernels) else TO_COMPILE

    def _run(self, steps: list[Stretch | int], lower: Array, upper: Array) -> Interval:
        network, boxes = self._network, {0: (lower, upper)}
        for number, step in enumerate(looking(steps)):
            if isinstance(step, Stretch):
                step.run(network, boxes)
                read = list(step.inputs)
            else:
                node = network.nodes[step]
                boxes[step + 1] = node.op.interval(self._kernels, *(boxes[i] for i in node.inputs))
                read = list(node.inputs)
            for value in set(read):
                if self._last[value] == number:
                    del boxes[value]
        low, high = ([boxes[i][k].reshape(len(lower), -1) for i in network.outputs] for k in (0, 1))
        return (
            (low[0], high[0])
            if len(low) == 1
            else (np.concatenate(low, axis=1), np.concatenate(high, axis=1))
        )

    def _audit(self, lower: Array, upper: Array, found: Interval) -> None:
        """Compare the ends of batches number 1, 2, 4, 8, ... with NumPy's; SoundnessError if they
        differ."""
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:
            some = slice(None, None, max(1, len(lower) - 1))
            expected = self._network.intervals(self._kernels, lower[some], upper[some])
            if not self._same(expected, (found[0][some], found[1][some])):
                own = (
                    "onnxruntime's kernels and NumPy"
                    if self._plan is None
                    else f"the {self.name}, and CuPy"
                )
                raise SoundnessError(f"{own} bound a network differently; please report this model")

    def _same(self, slow: Interval, fast: Interval) -> bool:
        """Whether two bounds are equal; on the host, since nothing is trusted."""
        to_host = self._kernels.to_host
        return all(np.array_equal(to_host(a), to_host(b)) for a, b in zip(slow, fast, strict=True))

    def _build(self) -> None:
        """Make the graphs, and use them if they give the same bounds of some boxes."""
        exactly = product_option()
        if exactly is None:
            return
        try:
            steps = make_steps(self._network, exactly)
            if all(isinstance(step, int) for step in steps):
                return
            self._last = _last_use(self._network, steps)
            lower, upper = sample_boxes(self._network)
            fast = self._run(steps, lower, upper)
        except ModelError:
            return
        if self._same(self._network.intervals(self._kernels, lower, upper), fast):
            self._steps, self.name = steps, "onnxruntime"
        else:
            self.disagreed = True

    def _build_plan(self) -> None:
        """The same on a GPU, of which only somebody who uses one pays for the import."""
        from qverify.propagate.device import opened
        from qverify.propagate.plan import make_plan

        try:
            plan = make_plan(self._network, opened(self._kernels))
            if not plan.launches():
                return
            lower, upper = (self._kernels.asarray(end) for end in sample_boxes(self._network))
            fast = plan.run(lower, upper)
        except DeviceError:
            return
        if self._same(self._network.intervals(self._kernels, lower, upper), fast):
            self._plan, self.name = plan, f"CUDA kernels, {plan.variant.lower()}"
        else:
            self.disagreed = True


def make_propagator(network: Network, kernels: Kernels) -> Propagator:
    """The bounds of a network (its arrays on the machine of `kernels`); graphs or plans are made
    once they are worth it."""
    return Propagator(network, kernels)


# -- graphs ----------------------------------------------------------------------------------------


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
                    self._held[readers[0] + 1] = self._rules.add_rounded(
                        node.op, after.op, x, after.type
                    )
                    self._nodes += [k, readers[0]]
                    return [k, readers[0]]
                except Inexpressible:
                    pass  # the two one by one, then
        self._held[k + 1] = self._rules.add(
            node.op, [self._value(i) for i in node.inputs], node.type
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


# -- distrust --------------------------------------------------------------------------------------


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
