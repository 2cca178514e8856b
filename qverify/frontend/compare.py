"""Every node of the graph, asked of onnxruntime by itself and compared with its rule.

The nodes stand in one model side by side, each with inputs and outputs of its own and its constants
in place, and that model is run without optimisation. A node's inputs are drawn over the whole range
of their types, not from what the nodes before it can produce, so a fault is seen that few inputs of
the network would show: all 256 codes of a function of one code, all 65,536 pairs of a function of
two, random and extreme codes for the rest. Where this samples it proves nothing: it is the net
under the rules. A difference refuses the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qverify import runtime
from qverify.deadline import looking
from qverify.errors import SoundnessError
from qverify.frontend.builder import Quantizer
from qverify.frontend.encoder import CPU, Encoder, make_encoder
from qverify.frontend.lower import Lowered, ReadNode, Trace
from qverify.frontend.tensors import (
    Codes,
    FloatAcc,
    FloatCodes,
    FloatInput,
    FloatPair,
    FloatSum,
    Tensor,
)
from qverify.network import Node
from qverify.ops import Conv, Dense, Pairwise, Requantize, Table

Array = npt.NDArray[Any]
Values = dict[int, Array]  # value number -> int32 [rounds, *shape]

MOST_ROUNDS, FEW_ROUNDS = 256, 32
WORK = 2**19  # elements, and multiplications at a sixteenth, that one node may cost
# elements of the vectors on which nodes that work element by element are asked as well
PAIRS = 2**16

# Ops that treat every element alike, whatever the shape. (QLinearAdd does for equal shapes of
# several elements.)
ELEMENTWISE = {
    "QuantizeLinear",
    "DequantizeLinear",
    "Cast",
    "Relu",
    "LeakyRelu",
    "Clip",
    "Neg",
    "Add",
    "Sub",
    "Mul",
}
ELEMENTWISE |= {
    "Div",
    "Min",
    "Max",
    "QLinearAdd",
    "QLinearMul",
    "QLinearLeakyRelu",
    "QLinearSigmoid",
}


@dataclass(frozen=True)
class Compared:
    """What was compared with the runtime: `values` output elements of `nodes` nodes.

    `complete` of the nodes were compared on every input that they can have.
    """

    nodes: int
    values: int
    complete: int


@dataclass(frozen=True, eq=False)
class NodeTrial:
    """A node with inputs to ask it for and the answers of its rule.

    Each array has the rounds as its first axis.
    """

    read: ReadNode
    feeds: dict[int, Array]  # input number -> what the runtime is given
    # Output number, values, how far the runtime may be off (None: not).
    answers: tuple[tuple[int, Array, Any], ...]
    rounds: int
    complete: bool


def compare(trace: Trace, lowered: Lowered) -> Compared:
    """Compare every node that was read.

    Raises SoundnessError that names a node which the runtime computes otherwise.

    Nodes whose int16 sums may saturate on this CPU (x86 without VNNI) are left out: verdicts are
    for exact sums.
    """
    left_out = (
        frozenset(lowered.saturable) if lowered.saturable and runtime.saturates() else frozenset()
    )
    asker = Asker(
        trace, replace(make_encoder(lowered), parts=trace.encoders), np.random.default_rng(0)
    )
    tasks = [
        task
        for read in looking(trace.nodes)
        if read.name not in left_out
        for task in asker.tasks(read)
    ]
    by_rounds: dict[int, list[NodeTrial]] = {}
    for task in tasks:
        by_rounds.setdefault(task.rounds.bit_length(), []).append(task)
    for group in by_rounds.values():
        _ask(group, trace.opsets)
    complete = {task.read.name for task in tasks if task.complete}
    return Compared(
        len({id(task.read) for task in tasks}),
        sum(values.size for task in tasks for _, values, _ in task.answers),
        len(complete),
    )


# -- asking the runtime ----------------------------------------------------------------------------


def _ask(tasks: list[NodeTrial], opsets: tuple[onnx.OperatorSetIdProto, ...]) -> None:
    """Run the nodes of some tasks side by side and compare."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {}
    feeds: dict[str, Array] = {}
    wanted: list[tuple[NodeTrial, str, Array, Any]] = []
    for k, task in enumerate(tasks):
        node = onnx.NodeProto()
        node.CopyFrom(task.read.node)
        for j, tensor in enumerate(task.read.inputs):
            if j in task.feeds:
                node.input[j] = f"{k}<{j}"
                feeds[node.input[j]] = task.feeds[j]
            elif isinstance(tensor, np.ndarray):
                node.input[j] = f"constant {id(tensor)}"
                constants[node.input[j]] = tensor
        for j, name in enumerate(node.output):
            node.output[j] = f"{k}>{j}" if name else ""
        wanted += [(task, f"{k}>{j}", values, error) for j, values, error in task.answers]
        nodes.append(node)
    inputs = {name: (value.dtype, value.shape[1:]) for name, value in feeds.items()}
    names = [name for _, name, _, _ in wanted]
    function = runtime.graph_function(
        "its nodes one by one", nodes, inputs, constants, names, opsets
    )
    for r in looking(range(max(task.rounds for task in tasks))):
        found = function(
            {name: runtime.aligned(value[min(r, len(value) - 1)]) for name, value in feeds.items()}
        )
        for (task, _, values, error), theirs in zip(wanted, found, strict=True):
            if r < len(values):
                _check_same(task.read, values[r], theirs, error)


def _check_same(read: ReadNode, ours: Array, theirs: Array, error: Any) -> None:
    what = f"node '{read.name}' ({read.node.op_type})"
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        kinds = f"{theirs.dtype}{list(theirs.shape)}, not {ours.dtype}{list(ours.shape)}"
        raise SoundnessError(f"{what}: onnxruntime's result is {kinds}; please report this model")
    with np.errstate(invalid="ignore"):
        same = (
            ours == theirs if error is None else np.abs(ours.astype(np.float64) - theirs) <= error
        )
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        raise SoundnessError(
            f"{what}: onnxruntime computes {theirs[at]} where the rule gives {ours[at]} (at "
            f"{list(at)}; {np.count_nonzero(~same)} of {same.size} elements differ); please report "
            "this model"
        )


# -- what the rules say ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asker:
    """Draws inputs of nodes and evaluates what their rules made of them."""

    trace: Trace
    encoder: Encoder
    rng: np.random.Generator

    def tasks(self, read: ReadNode) -> Iterator[NodeTrial]:
        """The node in its own shape, and on long vectors where it works element by element."""
        roots = self._roots(read)
        on_vectors = self._on_vectors(read, roots)
        if on_vectors is not None:
            yield on_vectors
        rounds, complete = self._rounds(read, roots, on_vectors is not None)
        values = {v: self._drawn(v, rounds, self._groups(read, v)) for v in roots}
        self._push(read, values)
        yield self._task(read, values, rounds, complete)

    def _task(self, read: ReadNode, values: Values, rounds: int, complete: bool) -> NodeTrial:
        x = self._inputs(rounds)

        def array(tensor: Tensor) -> Array:
            return self._array(tensor, values, x, rounds)

        feeds = {
            j: array(t)
            for j, t in enumerate(read.inputs)
            if t is not None and not isinstance(t, np.ndarray)
        }
        answers = tuple(
            (j, array(tensor), tensor.error if isinstance(tensor, FloatSum) else None)
            for j, (tensor, name) in enumerate(zip(read.outputs, read.node.output, strict=False))
            if name
        )
        return NodeTrial(read, feeds, answers, rounds, complete)

    def _roots(self, read: ReadNode) -> list[int]:
        """The values whose codes are drawn: those of the node's inputs.

        Where its rule has reached back behind them (a bias that joins a product), those that it
        started from.
        """
        roots = {v for tensor in read.inputs for v in _values_of(tensor)}
        stack, seen = [v for tensor in read.outputs for v in _values_of(tensor)], set[int]()
        behind: set[int] = set()
        while stack:
            v = stack.pop()
            if v in roots or v in seen or v == 0:
                continue
            seen.add(v)
            if v <= read.first:
                behind.add(v)
            else:
                stack += self.trace.values[v - 1].inputs
        return sorted(behind | {v for v in roots if not behind & self._sources(v)})

    def _sources(self, v: int) -> set[int]:
        found, stack = set[int](), [v]
        while stack:
            v = stack.pop()
            if v and v not in found:
                found.add(v)
                stack += self.trace.values[v - 1].inputs
        return found

    def _rounds(self, read: ReadNode, roots: list[int], on_vectors: bool) -> tuple[int, bool]:
        """How many rounds, and whether they take a function of one code through all its codes."""
        made = self.trace.values[read.first : read.last]
        elements = sum(prod(t.shape) for t in (*read.inputs, *read.outputs) if t is not None)
        cost = elements + sum(_terms(node) * node.type.size for node in made) // 16
        affordable = int(np.clip(WORK // max(cost, 1), 2, MOST_ROUNDS))
        tables = [t for t in read.outputs if isinstance(t, FloatCodes)]
        tabulated = bool(tables) or (bool(made) and all(isinstance(n.op, Table) for n in made))
        if on_vectors or len(roots) != 1 or not tabulated:
            return min(affordable, 4 if on_vectors else FEW_ROUNDS), False
        groups, count = self._groups(read, roots[0]), self.trace.values[roots[0] - 1].type.count
        # Elements that share a table's row.
        least = max(int(np.bincount(groups.reshape(-1), minlength=1).min()), 1)
        wanted = -(-count // least)
        return max(min(wanted, affordable), min(4, affordable)), wanted <= affordable

    def _groups(self, read: ReadNode, v: int) -> Array:
        """[*shape] of value `v`: which row of its table an element takes.

        All the same where there is no choice.
        """
        shape = self.trace.values[v - 1].type.shape
        choices: list[Any] = [
            t.which for t in (*read.inputs, *read.outputs) if isinstance(t, FloatCodes)
        ]
        choices += [
            n.op.which for n in self.trace.values[read.first : read.last] if isinstance(n.op, Table)
        ]
        fitting = [
            which.reshape(-1) for which in choices if which is not None and which.shape == shape
        ]
        if not fitting:
            return np.zeros(shape, np.int64)
        return np.unique(np.stack(fitting), axis=1, return_inverse=True)[1].reshape(shape)

    def _drawn(self, v: int, rounds: int, groups: Array) -> Array:
        """Codes of a value, [rounds, *shape] int32.

        A sweep through all of them comes first, then random and extreme ones.
        """
        kind, rng = self.trace.values[v - 1].type, self.rng
        size, full = prod(kind.shape), (rounds, *kind.shape)
        if kind.count > PAIRS:  # accumulators, ordinals of floats
            wide = rng.integers(kind.low, kind.high, full, np.int64, endpoint=True)
            scale = 2.0 ** -rng.integers(0, 31, (rounds, *[1] * len(kind.shape)))
            near = np.rint(wide * scale).astype(np.int64)
            mixed = np.where(
                rng.random(full) < 0.7, near, np.where(rng.random(full) < 0.5, kind.low, kind.high)
            )
            return np.clip(mixed, kind.low, kind.high).astype(np.int32)
        flat = groups.reshape(-1)
        order, counts = np.argsort(flat, kind="stable"), np.bincount(flat, minlength=1)
        rank = np.empty(size, np.int64)  # of an element among those that share its row
        rank[order] = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
        r = np.arange(rounds).reshape(rounds, *[1] * len(kind.shape))
        swept = kind.low + (rank.reshape(kind.shape) + r * counts[groups]) % kind.count
        # Rounds until every row has seen every code.
        sweep = -(-kind.count // max(int(counts.min()), 1))
        sweeps = sweep if sweep <= rounds else 1
        uniform = rng.integers(kind.low, kind.high, full, endpoint=True)
        extreme = np.where(rng.random(full) < 0.5, kind.low, kind.high)
        one = rng.integers(kind.low, kind.high, r.shape, endpoint=True)
        base = np.choose(rng.integers(0, 3, r.shape), [kind.low, kind.high, one])
        even = np.where(rng.random(full) < 0.05, uniform, base)  # the same code nearly everywhere
        rest = np.choose((r - sweeps) % 3, [uniform, extreme, even])
        return np.where(r < sweeps, swept, rest).astype(np.int32)

    def _push(self, read: ReadNode, values: Values) -> None:
        """Turn some rounds of a sum of products into inputs that take an element furthest."""
        made = self.trace.values[read.first : read.last]
        for node in made[:2]:
            if isinstance(node.op, Dense | Conv) and (v := node.inputs[0]) in values:
                x, kind = values[v], self.trace.values[v - 1].type
                for r in range(1, len(x), 3):
                    one = np.zeros((1, node.type.size), np.float32)
                    one[0, self.rng.integers(node.type.size)] = self.rng.choice((-1.0, 1.0))
                    (slope,) = node.op.gradient(
                        CPU, (x[r : r + 1],), one.reshape(1, *node.type.shape)
                    )
                    x[r] = np.where(slope[0] > 0, kind.high, np.where(slope[0] < 0, kind.low, x[r]))

    def _inputs(self, rounds: int) -> Array:
        """Values of the graph's inputs, float64 [rounds, inputs].

        They are of every size, also those where a quantizer's rounding turns.
        """
        rng, size = self.rng, len(self.encoder.is_float)
        x = rng.choice([1.0, 10.0, 255.0], (rounds, 1)) * rng.uniform(-1, 1, (rounds, size))
        for part in self.encoder.parts:
            real = part.source >= 0
            if isinstance(part, Quantizer) and real.any():
                ticks = rng.integers(part.low, part.high, (rounds, int(real.sum())), endpoint=True)
                ties = (
                    ticks - part.zero_point[real] + rng.choice([0.0, 0.5], ticks.shape)
                ) * part.scale[real]
                with np.errstate(over="ignore"):
                    ties = ties.astype(np.float32)
                moved = np.nextafter(ties, rng.choice([-np.inf, np.inf], ticks.shape))
                chosen = np.where(rng.random(ticks.shape) < 0.5, ties, moved)
                x[:, part.source[real]] = np.where(
                    rng.random(ticks.shape) < 0.7, chosen, x[:, part.source[real]]
                )
        whole = (
            rng.integers(self.encoder.low, self.encoder.high, x.shape, endpoint=True) if size else x
        )
        with np.errstate(over="ignore"):
            return np.where(self.encoder.is_float, x.astype(np.float32).astype(np.float64), whole)

    def _on_vectors(self, read: ReadNode, roots: list[int]) -> NodeTrial | None:
        """The node on all codes, or all pairs of codes, as vectors.

        None where that is another function or too many.
        """
        kinds = [self.trace.values[v - 1].type for v in roots]
        if not roots or prod(kind.count for kind in kinds) > PAIRS or not self._is_alike(read):
            return None
        codes = [np.arange(kind.low, kind.high + 1, dtype=np.int32) for kind in kinds]
        grid = np.meshgrid(*codes, indexing="ij")
        values = {v: g.reshape(1, -1) for v, g in zip(roots, grid, strict=True)}
        return self._task(read, values, 1, complete=True)

    def _is_alike(self, read: ReadNode) -> bool:
        """Whether all elements of the node are one function of codes, and there are several.

        Then it may be asked on vectors of any length.
        """
        constants = [t for t in read.inputs if isinstance(t, np.ndarray)]
        tensors = [t for t in read.inputs if t is not None and not isinstance(t, np.ndarray)]
        shapes = {t.shape for t in tensors}
        if read.node.op_type not in ELEMENTWISE or len(shapes) != 1 or prod(shapes.pop()) < 2:
            return False
        if any(t.size != 1 or t.ndim > 1 for t in constants):
            return False
        if any(isinstance(t, FloatInput) or not _is_uniform(t) for t in (*tensors, *read.outputs)):
            return False
        return all(
            isinstance(node.op, Pairwise | Table | Requantize) and _is_uniform(node)
            for node in self.trace.values[read.first : read.last]
        )

    def _array(self, tensor: Tensor, values: Values, x: Array, rounds: int) -> Array:
        """A tensor as the runtime would hold it, for drawn codes and inputs: [rounds, *shape]."""

        def of(codes: Codes) -> Array:
            return self._value(codes.value, values, x)

        match tensor:
            case Codes():
                return of(tensor).astype(tensor.dtype)
            case FloatCodes():
                row = 0 if tensor.which is None else tensor.which
                return np.asarray(tensor.table[row, of(tensor.codes) - tensor.low])
            case FloatPair():
                a, b = of(tensor.a) - tensor.a.type.low, of(tensor.b) - tensor.b.type.low
                axes = max(a.ndim, b.ndim)
                return np.asarray(tensor.table[_widened(a, axes), _widened(b, axes)])
            case FloatAcc():
                return np.asarray(tensor.program.run(CPU, of(tensor.codes)))
            case FloatSum():
                return self._array(tensor.acc, values, x, rounds)
            case FloatInput():
                v = np.where(
                    tensor.source < 0,
                    tensor.constant,
                    x[:, np.maximum(tensor.source, 0)].astype(np.float32),
                )
                with np.errstate(all="ignore"):
                    for step in tensor.steps:
                        v = step.apply(CPU, v)
                return v
        return np.broadcast_to(tensor, (rounds, *tensor.shape))

    def _value(self, v: int, values: Values, x: Array) -> Array:
        if v not in values:
            if v == 0:
                return self.encoder.encode(x)
            node = self.trace.values[v - 1]
            values[v] = node.op.run(CPU, *(self._value(i, values, x) for i in node.inputs))
        return values[v]


def _values_of(tensor: Tensor | None) -> tuple[int, ...]:
    """The numbers of the network's values that a tensor is a function of."""
    match tensor:
        case Codes():
            return (tensor.value,)
        case FloatCodes() | FloatAcc():
            return (tensor.codes.value,)
        case FloatSum():
            return (tensor.acc.codes.value,)
        case FloatPair():
            return (tensor.a.value, tensor.b.value)
    return ()


def _widened(values: Array, axes: int) -> Array:
    """[rounds, *shape] with axes of 1 after the first, so that it broadcasts as [*shape] does."""
    return values.reshape(len(values), *[1] * (axes - values.ndim), *values.shape[1:])


def _terms(node: Node) -> int:
    """Products per element of a sum of products; 0 for other ops."""
    match node.op:
        case Dense(weight=w):
            return int(w.shape[-2])
        case Conv(weight=w):
            return prod(w.shape[1:])
    return 0


def _is_uniform(thing: Tensor | Node) -> bool:
    """Whether all elements of a tensor or an op's result are the same function of their codes."""
    match thing:
        case Node(op=Table(which=which)) | FloatCodes(which=which):
            return which is None
        case Node(op=Requantize(program=program, zero_point=zero)):
            return zero.size == 1 and all(step.operand.size == 1 for step in program.steps)
        case FloatAcc(program=program):
            return all(step.operand.size == 1 for step in program.steps)
    return not isinstance(thing, FloatSum)
