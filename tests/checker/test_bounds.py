"""The checker's bounds, op by op and through networks: never below what occurs, for whatever
weights and multipliers; and no looser than the solver's where a certificate needs them to be as
tight."""

from __future__ import annotations

import ast
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qverify.checker import bounds, ops
from qverify.checker.bounds import Net, Rule, make_rule
from qverify.checker.ops import Interval, Ints, linear, nonlinear
from qverify.errors import Rejected
from qverify.frontend.model import read_model
from qverify.kernels import open_kernels
from qverify.ops import Type
from qverify.ops.relax import NonlinearRelaxation
from tests.ops.cases import CASES, Case

CPU = open_kernels("cpu")
EXAMPLES = Path(__file__).parents[2] / "specs" / "examples"
Rng = np.random.Generator

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def run(case: Case, *xs: Ints) -> Ints:
    """The op on flat inputs."""
    shaped = [
        x.astype(np.int32).reshape(-1, *t.shape) for x, t in zip(xs, case.inputs, strict=True)
    ]
    result: Ints = case.op.run(CPU, *shaped).reshape(len(xs[0]), -1).astype(np.int64)
    return result


def result_type(case: Case) -> Type:
    return case.op.output_type(*case.inputs)


def boxes(case: Case, rng: Rng, count: int) -> list[Interval]:
    """Boxes of all widths, the whole range and points among them: flat ends."""
    result = []
    for t in case.inputs:
        ends = np.sort(rng.integers(t.low, t.high, size=(2, count, t.size), endpoint=True), axis=0)
        width = rng.integers(0, 6, size=(count, 1))
        low, high = ends[0], np.where(width == 5, ends[1], np.minimum(ends[0] + width**3, t.high))
        low[0], high[0] = t.low, t.high
        result.append((low, high))
    return result


def points(box: Interval, rng: Rng, corner: bool) -> Ints:
    if corner:
        return np.where(rng.random(box[0].shape) < 0.5, *box)
    return rng.integers(*box, endpoint=True)


def ends_of(case: Case, box: list[Interval]) -> Interval:
    op = linear(case.op, case.inputs, result_type(case))
    return op.interval(box) if op else nonlinear(case.op, case.inputs)(box)


def dot(weights: Ints, x: Ints) -> npt.NDArray[Any]:
    """Exact sums of weights [N, R, size] * x [N, size], as Python integers [N, R]."""
    total: npt.NDArray[Any] = (weights.astype(object) * x[:, None].astype(object)).sum(axis=2)
    return total


# -- intervals and linear ops ----------------------------------------------------------------------


@every_case
def test_ends_hold_and_are_those_of_the_solver(case: Case) -> None:
    rng = np.random.default_rng(1)
    box = boxes(case, rng, 16)
    low, high = ends_of(case, box)
    for k in range(40):
        y = run(case, *(points(b, rng, k % 2 == 0) for b in box))
        assert (low <= y).all() and (y <= high).all()
    shaped = [
        tuple(e.astype(np.int32).reshape(-1, *t.shape) for e in b)
        for b, t in zip(box, case.inputs, strict=True)
    ]
    theirs = case.op.interval(CPU, *shaped)  # type: ignore[arg-type]
    assert (low == theirs[0].reshape(16, -1)).all() and (high == theirs[1].reshape(16, -1)).all()
    x = [b[0] for b in box]
    assert all((end == run(case, *x)).all() for end in ends_of(case, [(b, b) for b in x]))


@every_case
def test_a_linear_op_s_weights_are_exact(case: Case) -> None:
    op = linear(case.op, case.inputs, result_type(case))
    if op is None or (isinstance(op, ops.Product) and op.all.ndim > 2):
        return
    rng = np.random.default_rng(2)
    for size in (1, 1000, 2**17):
        w = rng.integers(-size, size, (5, 3, result_type(case).size), endpoint=True)
        parts, constant = op.back(w)
        xs = [rng.integers(t.low, t.high, (5, t.size), endpoint=True) for t in case.inputs]
        total = sum(
            (dot(part, x) for part, x in zip(parts, xs, strict=True)), constant.astype(object)
        )
        assert (total == dot(w, run(case, *xs))).all()


# -- rules -----------------------------------------------------------------------------------------


def rules(case: Case) -> list[tuple[str, Rule, Any]]:
    """All rules that a case's op allows, and what their argument is: a function of the inputs."""
    found: list[tuple[str, Rule, Any]] = []
    for name, slopes in (
        *((name, None) for name in ("staircase", "scan", "max")),
        *(("sum", list(pair)) for pair in ((1, 1), (60, 256), (-256, 7), (0, 5), (-3, -2))),
    ):
        try:
            rule = make_rule(name, slopes, case.op, case.inputs, result_type(case))
        except Rejected:
            continue
        if slopes is None:
            found.append((name, rule, lambda x: x))
        else:
            found.append((f"{name} {slopes}", rule, total_of(case, slopes)))
    return found


def total_of(case: Case, slopes: list[int]) -> Any:
    one, other = (ops.spots(t.shape, result_type(case).shape) for t in case.inputs)
    return lambda a, b: slopes[0] * a[:, one] + slopes[1] * b[:, other]


RULED = [case for case in CASES if rules(case)]


def narrowed(ends: Interval, rng: Rng) -> Interval:
    """Interval inside others, of some boxes."""
    first, last = np.sort(
        rng.integers(ends[0], ends[1], size=(2, *ends[0].shape), endpoint=True), axis=0
    )
    some = rng.random((len(first), 1)) < 0.7
    return np.where(some, first, ends[0]), np.where(some, last, ends[1])


def multipliers(rng: Rng, w: Ints, size: int, scale: int) -> Ints:
    each = size // w.shape[2]
    slopes = np.rint(
        np.repeat(w, each, axis=2) * rng.choice([0, 0.01, 0.3, 1, 3, -0.5], (*w.shape[:2], 1))
    )
    noise = rng.integers(-scale, scale, slopes.shape, endpoint=True)
    result: Ints = slopes.astype(np.int64) + noise
    return result


@pytest.mark.parametrize("case", RULED, ids=str)
def test_no_point_is_above_a_hull(case: Case) -> None:
    """Random weights and multipliers, boxes with narrowed results: where inputs and result lie
    inside, w y - m z is at most what the hull says."""
    rng = np.random.default_rng(3)
    for name, rule, argument in rules(case):
        for scale in (1, 1000, 2**18):
            box = boxes(case, rng, 12)
            result = narrowed(ends_of(case, box), rng)
            hull = rule.hull(box, result)
            w = rng.integers(-scale, scale, (12, 5, result_type(case).size), endpoint=True)
            w[:, 1], w[:, 2], w[:, 3] = abs(w[:, 1]), -abs(w[:, 2]), 0
            for m in (multipliers(rng, w, rule.size, scale), hull.slopes(w)):
                try:
                    most = hull.most(w, m)
                except Rejected:
                    assert "max" in name or scale > 1
                    continue
                back = rule.back(m)
                for k in range(30):
                    xs = [points(b, rng, k % 2 == 0) for b in box]
                    y, z = run(case, *xs), argument(*xs)
                    inside = np.flatnonzero(((result[0] <= y) & (y <= result[1])).all(axis=1))
                    assert (dot(w, y) - dot(m, z) <= most)[inside].all()
                    parts = [dot(part, x) for part, x in zip(back, xs, strict=True)]
                    assert (np.sum(parts, axis=0) == dot(m, z)).all()


SMALL = [
    c for c in RULED if sum(t.size for t in c.inputs) <= 3 and all(t.count <= 40 for t in c.inputs)
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_hulls_exhaustively(case: Case) -> None:
    """Every point of boxes over small ranges; for a table and a maximum, the bound is one that a
    point takes."""
    rng = np.random.default_rng(4)
    for name, rule, argument in rules(case):
        for _ in range(40):
            box = [
                (low[-1:], high[-1:])
                for low, high in boxes(case, rng, 2 if rng.random() < 0.9 else 1)
            ]
            result = narrowed(ends_of(case, box), rng)
            axes = [
                np.arange(a, b + 1)
                for low, high in box
                for a, b in zip(low[0], high[0], strict=True)
            ]
            every = np.array(list(product(*axes)))
            xs = np.split(every, np.cumsum([t.size for t in case.inputs])[:-1], axis=1)
            y, z = run(case, *xs), argument(*xs)
            inside = ((result[0] <= y) & (y <= result[1])).all(axis=1)
            w = rng.integers(-9, 9, (1, 4, y.shape[1]), endpoint=True)
            m = multipliers(rng, w, rule.size, 9)
            if not inside.any():
                continue  # no point, nothing to say
            most = rule.hull(box, result).most(w, m)[0]
            for r in range(4):
                values = (w[0, r] * y).sum(axis=1) - (m[0, r] * z).sum(axis=1)
                assert values[inside].max() <= most[r]
                if name in ("scan", "max") and inside.all():
                    assert values.max() == most[r]
            low, high = z[inside].min(axis=0)[None], z[inside].max(axis=0)[None]
            if name != "max":
                at, ends = rule.known((low, high))
                values = y if at is None else xs[at]
                assert (ends[0] <= values[inside]).all() and (values[inside] <= ends[1]).all()


@pytest.mark.parametrize("case", [c for c in RULED if len(c.inputs) < 3], ids=str)
def test_hulls_are_no_looser_than_the_solver_s(case: Case) -> None:
    rng = np.random.default_rng(5)
    relaxed = case.op.relaxation(CPU, *case.inputs)
    if not isinstance(relaxed, NonlinearRelaxation):
        return
    slopes = list(relaxed.slope) if relaxed.name == "sum" else None  # type: ignore[attr-defined]
    rule = make_rule(relaxed.name, slopes, case.op, case.inputs, result_type(case))
    box = boxes(case, rng, 12)
    result = ends_of(case, box)
    shape = result_type(case).shape
    inputs = tuple(
        (low.astype(np.int32).reshape(-1, *t.shape), high.astype(np.int32).reshape(-1, *t.shape))
        for (low, high), t in zip(box, case.inputs, strict=True)
    )
    ends = (
        result[0].astype(np.int32).reshape(-1, *shape),
        result[1].astype(np.int32).reshape(-1, *shape),
    )
    w = rng.integers(-500, 500, (12, 4, result_type(case).size), endpoint=True)
    shaped = w.reshape(12, 4, *shape)
    edge = np.rint(relaxed.slopes(CPU, shaped, inputs, ends)).astype(np.int64)
    hull = rule.hull(box, result)
    assert (hull.slopes(w) == edge.reshape(12, 4, -1)).all()
    for m in (edge, multipliers(rng, w, rule.size, 100).reshape(edge.shape)):
        theirs, _, _ = relaxed.hull(CPU, inputs, ends).best(CPU, shaped, m)
        assert (hull.most(w, m.reshape(12, 4, -1)) <= theirs).all()


def test_the_slack_of_a_row_of_thresholds() -> None:
    """By its definition, and against all chords."""
    rng = np.random.default_rng(6)
    for _ in range(200):
        row = np.sort(rng.integers(0, int(rng.choice([20, 1000])), int(rng.integers(1, 30))))
        slack, inside = bounds.slack_of(row, 3, 900), [int(t) for t in row if 3 < t <= 900]
        for i, j in product(range(len(inside)), repeat=2):
            for k in range(i + 1, j):
                assert abs(
                    (j - i) * (inside[k] - inside[i]) - (k - i) * (inside[j] - inside[i])
                ) <= slack * (j - i)


def test_what_is_no_staircase_is_refused() -> None:
    names = {str(case): case for case in CASES}
    for name in (
        "Table falling",
        "Table up and down",
        "Requantize a negative factor",
        "Requantize factors of both signs",
    ):
        case = names[name]
        with pytest.raises(Rejected):
            make_rule("staircase", None, case.op, case.inputs, result_type(case))


def test_numbers_that_could_leave_64_bits_are_rejected() -> None:
    for case in CASES:
        op = linear(case.op, case.inputs, result_type(case))
        w = np.full((1, 1, result_type(case).size), 2**61)
        w[0, 0, 0] = -(2**63)
        if op is not None and not (isinstance(op, ops.Move) and op.index is None):
            with pytest.raises(Rejected):
                op.back(w)
        box = [(np.full((1, t.size), t.low), np.full((1, t.size), t.high)) for t in case.inputs]
        for _, rule, _ in rules(case):
            hull = rule.hull(box, ends_of(case, box))
            with pytest.raises(Rejected):
                hull.most(w, np.zeros((1, 1, rule.size), np.int64))
                hull.most(w // 2**61, np.full((1, 1, rule.size), 2**62))


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", sorted((EXAMPLES / "onnx").glob("*.onnx")), ids=lambda p: p.stem)
@pytest.mark.parametrize("radius", [1, 20])
def test_no_output_is_above_a_network_s_bound(model: Path, radius: int) -> None:
    network = read_model(model).lowered.network
    kinds = {"Requantize": "staircase", "Table": "scan"}
    named = {
        k: kinds[type(n.op).__name__]
        for k, n in enumerate(network.nodes, 1)
        if type(n.op).__name__ in kinds
    }
    net = Net(network, {k: (name, None) for k, name in named.items() if k < len(network.nodes)})
    rng = np.random.default_rng(radius)
    centre = rng.integers(0, 255, (1, network.input_type.size), endpoint=True)
    box = np.maximum(centre - radius, 0), np.minimum(centre + radius, 255)
    part, possible = net.part(1, {}, [box, *([None] * len(network.nodes))])
    assert possible.all()
    x = rng.integers(box[0], box[1], size=(200, centre.shape[1]), endpoint=True)
    x[:100] = np.where(rng.random((100, x.shape[1])) < 0.5, *box)
    values = [
        v.reshape(len(x), -1).astype(np.int64) for v in network.values(CPU, x.astype(np.int32))
    ]
    for (low, high), value in zip(part.intervals, values, strict=True):
        assert (low <= value).all() and (value <= high).all()
    last = len(network.nodes) - 1
    for scale in (1, 2**16):
        w = rng.integers(-scale, scale, (1, 6, net.types[last].size), endpoint=True)
        given = {
            k: rng.integers(-scale, scale, (1, 6, net.rules[k].size))
            for k in net.rules
            if rng.random() < 0.5
        }
        for chosen in ({}, given):
            bound = net.upper(part, {last: w}, chosen)
            assert (np.einsum("rk,nk->nr", w[0], values[last]) <= bound).all()


def test_a_box_inside_another_one_has_the_ends_that_it_has_by_itself() -> None:
    network = read_model(EXAMPLES / "onnx" / "mnist_cnn_qop.onnx").lowered.network
    net, rng = Net(network, {}), np.random.default_rng(8)
    none: list[Any] = [None] * len(network.nodes)
    low, high = np.zeros((1, 784), np.int64), np.full((1, 784), 9)
    root, _ = net.part(1, {}, [(low, high), *none])
    cut = rng.integers(0, 9, (3, 784), endpoint=True)
    inside, possible = net.part(3, {0: (cut, np.full((3, 784), 100))}, list(root.intervals))
    assert possible.all()
    for n in range(3):
        alone, _ = net.part(1, {}, [(cut[n : n + 1], high), *none])
        assert all(
            (a[0][n] == b[0][0]).all() and (a[1][n] == b[1][0]).all()
            for a, b in zip(inside.intervals, alone.intervals, strict=True)
        )
    _, possible = net.part(
        2,
        {
            2: (
                np.full((2, 8 * 14 * 14), -(2**40)),
                np.array([[-(2**39)], [2**39]]) + np.zeros((2, 1568), np.int64),
            )
        },
        list(root.intervals),
    )
    assert possible.tolist() == [False, True]


# -- independence ----------------------------------------------------------------------------------

ALLOWED = {
    *(
        "qverify.checker",
        "qverify.errors",
        "qverify.frontend",
        "qverify.kernels",
        "qverify.network",
        "qverify.ops",
    ),
    *("qverify.boundary", "qverify.vnnlib", "qverify.property", "qverify.files"),
}
FORBIDDEN = {"interval", "relaxation", "gradient", "intervals", "boxes"}


def test_the_checker_shares_only_what_reads_files_and_the_meaning_of_ops() -> None:
    folder = Path(bounds.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qverify"):
                assert node.module is not None
                assert ".".join(node.module.split(".")[:2]) in ALLOWED, (
                    f"{path.name} imports {node.module}"
                )
                assert node.module.split(".")[1] != "ops" or node.module == "qverify.ops"
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in FORBIDDEN
            ):
                assert ast.unparse(node.func) == "self.interval", (
                    f"{path.name}:{node.lineno} asks an op for its bounds"
                )
