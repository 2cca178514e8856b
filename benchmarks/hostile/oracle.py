"""What is true about a small network and a property, found without qverify.

onnxruntime (default options) runs the file on one input of every cell of the box, that is, of every
vector of input codes; where the cells end is found by bisection on the input quantizers, which
onnxruntime runs too. The property is read and evaluated here, in exact rationals and, for the
comparisons, in every reading that the official checkers use.

The answer is `sat` if some input is unsafe in every reading, `unsat` if none is in any, else
`unknown`.
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime

F32 = np.float32
Expression = Any  # a token, or a list of expressions
MOST = 20_000  # inputs that are run

# -- properties ------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\(|\)|\[[^\]]*\]|[^\s()\[\]]+")


def expressions(text: str) -> list[Expression]:
    """The S-expressions of a text; an index, `[0, 1]`, joins the name before it."""
    stack: list[list[Expression]] = [[]]
    for token in _TOKEN.findall(re.sub(r";[^\n]*", "", text)):
        if token == "(":
            stack.append([])
        elif token == ")":
            done = stack.pop()
            stack[-1].append(done)
        elif (
            token[0] == "["
            and stack[-1]
            and isinstance(stack[-1][-1], str)
            and "[" not in stack[-1][-1]
        ):
            stack[-1][-1] += token.replace(" ", "")
        else:
            stack[-1].append(token)
    assert len(stack) == 1, "parentheses do not match"
    return stack[0]


RELATIONS = {"<": -1, "<=": -1, ">": 1, ">=": 1, "=": 0, "==": 0}
Interval = tuple[Fraction | None, Fraction | None]


@dataclass(frozen=True)
class Reading:
    """How numbers become values: `x` and `y` are exact, double or single."""

    x: str
    y: str


@dataclass
class Spec:
    """A property: its variables and assertions. Elements of all inputs are numbered one after
    another, outputs too."""

    version: str
    inputs: int
    outputs: int
    shapes: list[tuple[int, ...]]  # of the inputs, where the version says them
    names: dict[str, tuple[str, int]]  # element -> ("x" or "y", its number)
    asserts: list[Expression]
    box: list[Interval] = field(default_factory=list)

    @property
    def readings(self) -> list[Reading]:
        return [
            Reading(x, y)
            for x in ("exact", "single")
            for y in ("exact", "double", *(("single",) if self.version.startswith("2") else ()))
        ]

    def mixed(self) -> bool:
        """Whether some condition beyond the box mentions an input."""
        return any(_kinds(self, a) & {"x"} for a in self.rest())

    def rest(self) -> list[Expression]:
        """The assertions that are no plain bounds of inputs."""
        return [a for a in self.asserts if not _is_bound(self, a)]


def read_spec(path: Path) -> Spec:
    """A property file, plain or gzipped."""
    data = path.read_bytes()
    return parse_spec((gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode())


def parse_spec(text: str) -> Spec:
    """VNN-LIB 1.0 (X_0, Y_0) or 2.x (tensors)."""
    names: dict[str, tuple[str, int]] = {}
    shapes: list[tuple[int, ...]] = []
    asserts: list[Expression] = []
    version, counts = "1.0", {"x": 0, "y": 0}
    for own in expressions(text):
        if own[0] == "vnnlib-version":
            version = own[1].strip("<>")
        elif own[0] == "declare-const" and own[1][0] in "XY":
            kind = own[1][0].lower()
            names[own[1]] = (kind, int(own[1][2:]))
            counts[kind] += 1
        elif own[0] == "declare-network":
            for part in own[2:]:
                kind = {"declare-input": "x", "declare-output": "y"}[part[0]]
                words = " ".join(part[1:])
                shape = tuple(int(v) for v in re.findall(r"\d+", words[words.index("[") :]))
                if kind == "x":
                    shapes.append(shape)
                for k, at in enumerate(np.ndindex(shape)):
                    names[f"{part[1]}[{','.join(map(str, at))}]"] = (kind, counts[kind] + k)
                counts[kind] += prod(shape)
        elif own[0] == "assert":
            asserts += _conjuncts(own[1])
    spec = Spec(version, counts["x"], counts["y"], shapes, names, asserts)
    spec.box = [(None, None)] * spec.inputs
    for a in spec.asserts:
        if _is_bound(spec, a):
            _tighten(spec, a)
    return spec


def _conjuncts(a: Expression) -> Iterator[Expression]:
    if a[0] == "and":
        for part in a[1:]:
            yield from _conjuncts(part)
    else:
        yield a


def _kinds(spec: Spec, a: Expression) -> set[str]:
    if isinstance(a, str):
        return {spec.names[a][0]} if a in spec.names else set()
    return set().union(*(_kinds(spec, part) for part in a))


def _is_bound(spec: Spec, a: Expression) -> bool:
    """x <= c, x >= c or c <= x."""
    return (
        a[0] in RELATIONS
        and len(a) == 3
        and all(isinstance(v, str) for v in a[1:])
        and _kinds(spec, a) == {"x"}
        and sum(v in spec.names for v in a[1:]) == 1
    )


def _tighten(spec: Spec, a: Expression) -> None:
    sign = RELATIONS[a[0]] * (1 if a[1] in spec.names else -1)
    name, text = (a[1], a[2]) if a[1] in spec.names else (a[2], a[1])
    k, value = spec.names[name][1], Fraction(text)
    low, high = spec.box[k]
    if sign >= 0 and (low is None or value > low):
        low = value
    if sign <= 0 and (high is None or value < high):
        high = value
    spec.box[k] = (low, high)


@dataclass(frozen=True)
class Point:
    """An input: `text` are the decimals, `fed` the numbers that the runtime gets."""

    text: tuple[Fraction, ...]
    fed: tuple[float, ...]


def holds(spec: Spec, a: Expression, point: Point, y: Sequence[float], reading: Reading) -> bool:
    """Whether an assertion holds in a reading."""
    head = a[0]
    if head == "and":
        return all(holds(spec, part, point, y, reading) for part in a[1:])
    if head == "or":
        return any(holds(spec, part, point, y, reading) for part in a[1:])
    if head == "not":
        return not holds(spec, a[1], point, y, reading)
    if head == "=>":
        return not holds(spec, a[1], point, y, reading) or holds(spec, a[2], point, y, reading)
    kinds = _kinds(spec, a)
    if kinds == {"y"}:
        convert = {"exact": Fraction, "double": float, "single": F32}[reading.y]
    elif kinds == {"x"} and _is_bound(spec, a) and reading.x == "single":
        convert = F32
    else:
        convert = Fraction

    def value(e: Expression) -> Any:
        if isinstance(e, str):
            if e not in spec.names:
                return convert(e) if convert is not F32 else F32(single(Fraction(e)))
            kind, k = spec.names[e]
            if kind == "y":
                return convert(float(y[k])) if convert is not Fraction else Fraction(float(y[k]))
            if reading.x == "exact":
                return point.text[k] if convert is Fraction else convert(float(point.text[k]))
            return Fraction(float(point.fed[k])) if convert is Fraction else convert(point.fed[k])
        parts = [value(part) for part in e[1:]]
        if e[0] == "-" and len(parts) == 1:
            return -parts[0]
        total = parts[0]
        for part in parts[1:]:
            total = {"+": lambda p, q: p + q, "-": lambda p, q: p - q, "*": lambda p, q: p * q}[
                e[0]
            ](total, part)
        return total

    parts = [value(part) for part in a[1:]]
    compare: Callable[[Any, Any], bool] = {
        "<": lambda p, q: p < q,
        "<=": lambda p, q: p <= q,
        ">": lambda p, q: p > q,
        ">=": lambda p, q: p >= q,
        "=": lambda p, q: p == q,
        "==": lambda p, q: p == q,
    }[head]
    return all(bool(compare(p, q)) for p, q in pairwise(parts))


def unsafe(spec: Spec, point: Point, y: Sequence[float]) -> tuple[bool, bool]:
    """(in some reading, in all readings) the point and its outputs satisfy every assertion."""
    each = [
        all(holds(spec, a, point, y, reading) for a in spec.asserts) for reading in spec.readings
    ]
    return any(each), all(each)


# -- networks --------------------------------------------------------------------------------------


def session(source: Path | bytes, **more: Any) -> onnxruntime.InferenceSession:
    """onnxruntime as it is by default, on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for name, value in more.items():
        setattr(options, name, value)
    where = str(source) if isinstance(source, Path) else source
    return onnxruntime.InferenceSession(where, options, providers=["CPUExecutionProvider"])


class Runner:
    """A file that can be run: flat inputs in, flat outputs out."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, ...]] = ()) -> None:
        self.path, self._session = path, session(path)
        wanted = self._session.get_inputs()
        self.names = [i.name for i in wanted]
        self.types = [
            {"tensor(float)": F32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8}[i.type]
            for i in wanted
        ]
        own = [tuple(n if isinstance(n, int) and n > 0 else 1 for n in i.shape) for i in wanted]
        given = [tuple(s) for s in shapes]
        fits = len(given) == len(own) and all(
            len(a) == len(b) for a, b in zip(given, own, strict=True)
        )
        self.shapes = given if fits else own
        self.is_float = [
            t is F32 for t, s in zip(self.types, self.shapes, strict=True) for _ in range(prod(s))
        ]

    def feeds(self, x: Sequence[float]) -> dict[str, Any]:
        result, start = {}, 0
        for name, shape, kind in zip(self.names, self.shapes, self.types, strict=True):
            size = prod(shape)
            result[name] = np.array(x[start : start + size], np.float64).astype(kind).reshape(shape)
            start += size
        return result

    def __call__(self, x: Sequence[float]) -> tuple[float, ...]:
        parts = self._session.run(None, self.feeds(x))
        return tuple(float(v) for part in parts for v in np.asarray(part).reshape(-1))


def optimised(path: Path, folder: Path) -> onnx.ModelProto | None:
    """The graph that onnxruntime makes of the file, or None where it cannot be written."""
    out = folder / "optimised.onnx"
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        session(path, optimized_model_filepath=str(out), graph_optimization_level=level)
        return onnx.load(out)
    except Exception:
        return None


def doors(model: onnx.ModelProto, inputs: Sequence[str]) -> onnx.ModelProto | None:
    """The model cut after the first quantizers of its inputs; None if it has none. What else is
    listed as an input has a value."""
    graph = model.graph
    floats = set(inputs)
    found = []
    for node in graph.node:
        if any(name in floats for name in node.input):
            if node.op_type == "QuantizeLinear":
                found.append(node.output[0])
            else:
                floats.update(node.output)
    if not found:
        return None
    needed, nodes = set(found), []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            nodes.append(node)
            needed.update(node.input)
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    constants = [i for i in cut.graph.initializer if i.name in needed]
    kept = [i for i in cut.graph.input if i.name in inputs]
    del (
        cut.graph.node[:],
        cut.graph.output[:],
        cut.graph.value_info[:],
        cut.graph.initializer[:],
        cut.graph.input[:],
    )
    cut.graph.initializer.extend(constants)
    cut.graph.input.extend(kept)
    cut.ir_version = max(cut.ir_version, 4)
    cut.graph.node.extend(reversed(nodes))
    cut.graph.output.extend(onnx.ValueInfoProto(name=name) for name in found)
    return cut


def ordinal(x: float) -> int:
    """The place of a float32 in their order."""
    bits = int(np.asarray(x, F32).view(np.int32))
    return -(bits & 0x7FFFFFFF) if bits < 0 else bits


def number(k: int) -> float:
    """The float32 at a place."""
    return float(np.array(-k | 0x80000000 if k < 0 else k, np.uint32).view(F32))


def float_ends(low: Fraction | None, high: Fraction | None) -> tuple[float, float]:
    """Least and largest float32 within [low, high] or that an end rounds to."""
    most = float(np.finfo(F32).max)
    first, last = (-most if low is None else single(low)), (most if high is None else single(high))
    if low is not None and Fraction(number(ordinal(first) - 1)) >= low:
        first = number(ordinal(first) - 1)
    if high is not None and Fraction(number(ordinal(last) + 1)) <= high:
        last = number(ordinal(last) + 1)
    return first, last


def single(value: Fraction) -> float:
    """The float32 nearest to a rational, ties to even; not through a double, which would round
    twice."""
    guess = F32(float(value))
    near = [number(ordinal(float(guess)) + d) for d in (-1, 0, 1)]
    return min(near, key=lambda v: (abs(Fraction(v) - value), ordinal(v) % 2))


def borders(
    runners: Sequence[Runner], base: list[float], k: int, first: float, last: float
) -> list[int]:
    """Ordinals of the last float32 of each cell of element k in [first, last], but for the last
    one."""

    def ask(at: int) -> tuple[Any, ...]:
        x = list(base)
        x[k] = number(at)
        return tuple(runner(x) for runner in runners)

    found: list[int] = []
    work = [(ordinal(first), ordinal(last), ask(ordinal(first)), ask(ordinal(last)))]
    while work:
        a, b, left, right = work.pop()
        if left == right or a >= b:
            continue
        if b - a == 1:
            found.append(a)
            continue
        middle = (a + b) // 2
        half = ask(middle)
        work += [(a, middle, left, half), (middle, b, half, right)]
    return sorted(found)


# -- the truth -------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What brute force says: the verdict, a witness if there is one, and how many inputs were
    run."""

    verdict: str
    points: int
    witness: Point | None = None
    outputs: tuple[float, ...] = ()


def constants(spec: Spec) -> list[Fraction]:
    """All numbers in the assertions that mention inputs beyond the box."""
    found: list[Fraction] = []

    def walk(e: Expression) -> None:
        if isinstance(e, str):
            if e not in spec.names and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?\d+)?", e):
                found.append(Fraction(e))
        else:
            for part in e[1:]:
                walk(part)

    for a in spec.rest():
        if "x" in _kinds(spec, a):
            walk(a)
    return found


class Brute:
    """A file whose cells are known. `folder` receives scratch files."""

    def __init__(self, model: Path, folder: Path, shapes: Sequence[tuple[int, ...]] = ()) -> None:
        self.run, self.doors = Runner(model, shapes), list[Runner]()
        self._outputs: dict[tuple[float, ...], tuple[float, ...]] = {}
        if any(self.run.is_float):
            for own in (onnx.load(model), optimised(model, folder)):
                cut = None if own is None else doors(own, self.run.names)
                if cut is not None:
                    path = folder / f"doors{len(self.doors)}.onnx"
                    path.write_bytes(cut.SerializeToString())
                    self.doors.append(Runner(path, shapes))

    def outputs(self, fed: tuple[float, ...]) -> tuple[float, ...]:
        """What the file gives."""
        if fed not in self._outputs:
            self._outputs[fed] = self.run(fed)
        return self._outputs[fed]

    def candidates(self, spec: Spec) -> list[list[tuple[Fraction, float]]] | None:
        """Per element: (decimal, float) pairs, one of every cell; with mixed conditions, its ends
        and the numbers that the conditions name. None where the box of an element is empty."""
        result: list[list[tuple[Fraction, float]]] = []
        if any(low is not None and high is not None and low > high for low, high in spec.box):
            return None
        ends = [
            float_ends(*own) if is_float else (0.0, 0.0)
            for own, is_float in zip(spec.box, self.run.is_float, strict=True)
        ]
        kinds = [
            t for t, s in zip(self.run.types, self.run.shapes, strict=True) for _ in range(prod(s))
        ]
        mixed, named = spec.mixed(), constants(spec)
        for k, (low, high) in enumerate(spec.box):
            if self.run.is_float[k]:
                cuts = borders(self.doors, [a for a, _ in ends], k, *ends[k])
                floats = _representatives(*ends[k], cuts, mixed)
                if mixed:
                    floats |= _around(named, *ends[k])
                pairs = [_with_decimal(number(at), low, high) for at in sorted(floats)]
                if mixed:
                    inside = [
                        v
                        for v in named
                        if (low is None or v >= low) and (high is None or v <= high)
                    ]
                    pairs += [(v, single(v)) for v in inside]
                result.append(sorted(set(pairs)))
            else:
                info = np.iinfo(np.uint8 if kinds[k] is np.uint8 else np.int8)
                a = (
                    info.min
                    if low is None
                    else max(info.min, -((-low.numerator) // low.denominator))
                )
                b = info.max if high is None else min(info.max, high.numerator // high.denominator)
                result.append([(Fraction(v), float(v)) for v in range(a, b + 1)])
        return result if all(result) else None

    def truth(self, spec: Spec, most: int = MOST) -> Truth | None:
        """The verdict; None where the box has too many cells."""
        assert len(self.run.is_float) == spec.inputs, (
            f"{len(self.run.is_float)} inputs, the property has {spec.inputs}"
        )
        each = self.candidates(spec)
        if each is None:
            return Truth("unsat", 0)
        if prod(len(c) for c in each) > most:
            return None
        decided: dict[Any, bool] = {}  # whether outputs satisfy the rest in some reading
        some, mixed, count, rest = False, spec.mixed(), 0, spec.rest()
        for chosen in product(*each):
            point = Point(tuple(t for t, _ in chosen), tuple(f for _, f in chosen))
            y, count = self.outputs(point.fed), count + 1
            if not mixed:
                if y not in decided:
                    decided[y] = any(
                        all(holds(spec, a, point, y, r) for a in rest) for r in spec.readings
                    )
                if not decided[y]:
                    continue
            possible, certain = unsafe(spec, point, y)
            if certain:
                return Truth("sat", count, point, y)
            some |= possible
        return Truth("unknown" if some else "unsat", count)


def _representatives(first: float, last: float, cuts: list[int], mixed: bool) -> set[int]:
    """Ordinals of a float32 of every cell, within the exact box where the cell holds one; of both
    ends if `mixed`."""
    found: set[int] = set()
    begin = ordinal(first)
    for cut in [*cuts, ordinal(last)]:
        if mixed or cut - begin < 2:
            found |= {begin, cut}
        elif begin == ordinal(first) and cuts:
            found.add(cut)
        else:
            found.add((begin + cut) // 2)
        begin = cut + 1
    return found


def _around(named: list[Fraction], first: float, last: float) -> set[int]:
    near = {ordinal(single(value)) + d for value in named for d in (-1, 0, 1)}
    return {at for at in near if ordinal(first) <= at <= ordinal(last)}


def _with_decimal(
    value: float, low: Fraction | None, high: Fraction | None
) -> tuple[Fraction, float]:
    """A float32 with a rational in the box that rounds to it, if there is one."""
    text = Fraction(value)
    clipped = text if low is None else max(text, low)
    clipped = clipped if high is None else min(clipped, high)
    return (clipped if single(clipped) == value else text), value


def truth(model: Path, spec: Spec, folder: Path, most: int = MOST) -> Truth | None:
    """The verdict about a file by brute force; None where the box has too many cells."""
    return Brute(model, folder, spec.shapes).truth(spec, most)


# -- witnesses -------------------------------------------------------------------------------------


def witness_fault(model: Path, spec: Spec, printed: str) -> str | None:
    """Why a printed counterexample (after the line `sat`) is none, or None: its decimals lie in the
    box, and on the file, run on their float32 values, the outputs satisfy the property in every
    reading."""
    run = Runner(model, spec.shapes)
    if printed.lstrip().startswith("("):
        values = dict(re.findall(r"\(\s*([XY]_\d+)\s+([^\s()]+)\s*\)", printed))
        x, y = (
            [values.get(f"{v}_{k}", "") for k in range(n)]
            for v, n in (("X", spec.inputs), ("Y", spec.outputs))
        )
    else:
        words = [
            line
            for line in printed.split("\n")
            if line.strip() and not re.search(r"[A-Za-z]\w* \w+ ?\[", line)
        ]
        flat = " ".join(words).split()
        x, y = flat[: spec.inputs], flat[spec.inputs :]
    if "" in x or "" in y or len(x) != spec.inputs or len(y) != spec.outputs:
        return "it does not name every variable"
    text = tuple(Fraction(v) for v in x)
    fed = tuple(single(v) if f else float(v) for v, f in zip(text, run.is_float, strict=True))
    outputs = run(fed)
    if [F32(float(v)) for v in y] != [F32(v) for v in outputs]:
        return f"onnxruntime gives other outputs: {outputs}"
    if not unsafe(spec, Point(text, fed), outputs)[1]:
        return "the property does not hold at it in every reading"
    return None
