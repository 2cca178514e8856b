"""Bit for bit: every op, every rule and whole networks on an NVIDIA GPU compute the integers of the
CPU, and verdicts agree. What only guides is about equal.

`make gpu` runs the tests marked `gpu` alone; without a GPU they are skipped and say why. The same
tests also run on the strict machine (tests/kernels/strict.py), which is NumPy, but keeps host and
device arrays apart as CuPy does.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qverify import Options, Verdict, runtime, verify
from qverify.boundary.outputs import described_outputs, make_decoder
from qverify.bounds.dual import Dual
from qverify.bounds.improve import Point, evaluate, improve, rounded
from qverify.bounds.intermediate import IntermediateBounds, crown_bounds, optimized_bounds
from qverify.bounds.unsafe_regions import make_unsafe_regions, proved
from qverify.checker import check
from qverify.deadline import Deadline
from qverify.errors import DeviceError
from qverify.frontend.model import read_model
from qverify.kernels import Kernels, gpu, open_kernels
from qverify.network import Network
from qverify.ops import FloatProgram, Type
from qverify.ops.base import moved
from qverify.ops.relax import GUIDE, IntervalRelaxation, NonlinearRelaxation, TooLarge, concretize
from qverify.property import Row
from qverify.search import bab
from qverify.search.branch import INPUT_RULES, BoxView, halves
from qverify.search.frontier import Frontier, OpenBoxes
from qverify.search.proof import Proof
from tests.kernels.strict import open_strict
from tests.ops.cases import CASES, Case
from tests.search.queries import asked

EXAMPLES = Path(__file__).parents[1] / "specs" / "examples"
CPU = open_kernels("cpu")
Ints = npt.NDArray[np.int32]
Box = tuple[Ints, Ints]


@pytest.fixture(params=["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The GPU's kernels; without them the test is skipped, with the reason. Or the strict machine
    in its place."""
    if request.param == "strict":
        monkeypatch.setattr(gpu, "open_cuda", open_strict)
    try:
        return open_kernels("cuda")
    except DeviceError as error:
        pytest.skip(str(error))


def boxes(rng: np.random.Generator, types: tuple[Type, ...], count: int = 200) -> tuple[Box, ...]:
    """Random boxes of every width; the first ones are the extremes: whole ranges, and points at
    either end."""
    result = []
    for t in types:
        ends = np.sort(
            rng.integers(t.low, t.high, size=(2, count, *t.shape), endpoint=True), axis=0
        )
        narrow = rng.random(ends.shape[1:]) < 0.3
        ends[1] = np.where(narrow, ends[0], ends[1])
        ends[:, 0], ends[:, 1] = t.low, t.high
        ends[0, 2], ends[1, 2] = t.low, t.high
        result.append((ends[0].astype(np.int32), ends[1].astype(np.int32)))
    return tuple(result)


def same(cpu: Any, gpu: Any, kernels: Kernels) -> None:
    """Equal type, shape and bits."""
    host = kernels.to_host(gpu)
    assert (cpu.dtype, cpu.shape) == (host.dtype, host.shape)
    assert np.array_equal(cpu, host)


def about(cpu: Any, gpu: Any, kernels: Kernels, share: float = 1e-3) -> None:
    """Equal shape, and values within a share of the largest."""
    host = kernels.to_host(gpu)
    assert (cpu.dtype, cpu.shape) == (host.dtype, host.shape)
    scale = float(np.abs(cpu).max(initial=0.0))
    assert np.allclose(cpu, host, rtol=share, atol=share * scale)


def alike(ours: Any, theirs: Any, compare: Callable[[Any, Any], None]) -> None:
    """Compare arrays inside tuples, lists and dicts; what is no array is equal."""
    if isinstance(ours, tuple | list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            alike(a, b, compare)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            alike(ours[key], theirs[key], compare)
    elif isinstance(ours, np.ndarray):
        compare(ours, theirs)
    else:
        assert ours == theirs


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_every_op_runs_and_bounds_alike(case: Case, cuda: Kernels) -> None:
    on_gpu = case.op.on(cuda)
    pairs = boxes(np.random.default_rng(0), case.inputs)
    moved = [(cuda.asarray(a), cuda.asarray(b)) for a, b in pairs]
    for end in (0, 1):
        x, there = [pair[end] for pair in pairs], [pair[end] for pair in moved]
        same(case.op.run(CPU, *x), on_gpu.run(cuda, *there), cuda)
    for ours, theirs in zip(
        case.op.interval(CPU, *pairs), on_gpu.interval(cuda, *moved), strict=True
    ):
        same(ours, theirs, cuda)


@every_case
def test_every_gradient_works(case: Case, cuda: Kernels) -> None:
    """A guide only, so about equal is enough."""
    rng = np.random.default_rng(1)
    x = [pair[0] for pair in boxes(rng, case.inputs, 8)]
    upstream = rng.normal(size=case.op.run(CPU, *x).shape).astype(np.float32)
    ours = case.op.gradient(CPU, tuple(x), upstream)
    theirs = case.op.on(cuda).gradient(
        cuda, tuple(cuda.asarray(v) for v in x), cuda.asarray(upstream)
    )
    for a, b in zip(ours, theirs, strict=True):
        host = cuda.to_host(b)
        assert host.shape == a.shape
        scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
        assert np.allclose(a, host, rtol=1e-3, atol=1e-4 * scale + 1e-30, equal_nan=True)


def test_float32_steps_keep_subnormals(cuda: Kernels) -> None:
    """CuPy's own arithmetic flushes them to zero; a verdict must not rest on it."""
    rng = np.random.default_rng(6)
    # half of them subnormal
    bits = rng.integers(0, 0x01000000, (2, 4000)) | rng.integers(0, 2, (2, 4000)) << 31
    x, y = bits.astype(np.uint32).view(np.float32)
    for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum"):
        a, b = (
            (x * np.float32(2e19) if name == "multiply" else x),
            np.where(y == 0, np.float32(1), y),
        )
        if name == "multiply":
            b = b * np.float32(2e19)
        for c, d in ((a, b), (x, np.float32(0.3) * np.ones_like(x))):
            same(
                getattr(np, name)(c, d),
                getattr(cuda.ieee, name)(cuda.asarray(c), cuda.asarray(d)),
                cuda,
            )
    program = (
        FloatProgram().then("mul", 1e-42).then("add", 3e-41).then("div", 1e-41).then("sub", 2.5)
    )
    acc = np.arange(-300, 300, dtype=np.int32)[:, None]
    same(program.run(CPU, acc), moved(program, cuda).run(cuda, cuda.asarray(acc)), cuda)


def test_the_machine_s_own_functions(cuda: Kernels) -> None:
    """Products in all forms, with sums that just fit; scattered sums; windows; whole numbers."""
    rng = np.random.default_rng(7)
    for dtype, reach in ((np.float32, 2**24 // 300), (np.float64, 2**53 // 300)):
        for shapes in (
            ((70, 300), (300, 40)),
            ((5, 6, 300), (300, 7)),
            ((4, 9, 300), (4, 300, 5)),
            ((8, 1, 3, 300), (2, 300, 5)),
        ):
            limit = int(np.sqrt(reach)) - 1
            x, w = (rng.integers(-limit, limit, shape) for shape in shapes)
            x, w = x.astype(np.int32), w.astype(dtype)
            exactly = np.matmul(x.astype(np.int64), w.astype(np.int64)).astype(dtype)
            same(exactly, cuda.matmul(cuda.asarray(x), cuda.asarray(w)), cuda)
    index = rng.integers(0, 20, 500)
    for kind in (np.int64, np.float32):
        target, values = (
            np.zeros((30, 20), kind),
            rng.integers(-(2**20), 2**20, (30, 500)).astype(kind),
        )
        there = cuda.asarray(target)
        cuda.scatter_add(there, cuda.asarray(index), cuda.asarray(values))
        CPU.scatter_add(target, index, values)
        same(target, there, cuda) if kind is np.int64 else about(target, there, cuda)
    a, b = rng.integers(-(2**28), 2**28, (2, 700, 100, 3))
    same(CPU.inner(a, b), cuda.inner(cuda.asarray(a), cuda.asarray(b)), cuda)


@every_case
def test_every_rule_is_alike(case: Case, cuda: Kernels) -> None:
    rng = np.random.default_rng(8)
    count = 12
    rule, there = (
        case.op.relaxation(CPU, *case.inputs),
        moved(case.op.relaxation(cuda, *case.inputs), cuda),
    )
    inputs = boxes(rng, case.inputs, count)
    result = case.op.interval(CPU, *inputs)
    shape = result[0].shape[1:]
    on = (
        [(cuda.asarray(a), cuda.asarray(b)) for a, b in inputs],
        tuple(cuda.asarray(end) for end in result),
    )

    def exactly(ours: Any, theirs: Any) -> None:
        alike(ours, theirs, lambda a, b: same(a, b, cuda))

    def nearly(ours: Any, theirs: Any) -> None:
        alike(ours, theirs, lambda a, b: about(a, b, cuda))

    for scale in (1, 1000, 2**20):
        weights = rng.integers(-scale, scale, size=(count, 2, *shape), endpoint=True)
        try:
            expected = rule.backward(CPU, weights, inputs, result)
        except TooLarge:
            with pytest.raises(TooLarge):
                there.backward(cuda, cuda.asarray(weights), tuple(on[0]), on[1])
            continue
        exactly(expected, there.backward(cuda, cuda.asarray(weights), tuple(on[0]), on[1]))
        exactly(concretize(CPU, weights, result), concretize(cuda, cuda.asarray(weights), on[1]))
    guide = rng.normal(size=weights.shape).astype(GUIDE)
    if not isinstance(rule, NonlinearRelaxation):
        nearly(
            rule.backward(CPU, guide, inputs, result)[0],
            there.backward(cuda, cuda.asarray(guide), tuple(on[0]), on[1])[0],
        )
        if not isinstance(rule, IntervalRelaxation):
            at = [a.astype(GUIDE) for a, _ in inputs]
            nearly(rule.forward(CPU, *at), there.forward(cuda, *(cuda.asarray(x) for x in at)))
        return
    assert isinstance(there, NonlinearRelaxation)
    hull, far = rule.hull(CPU, inputs, result), there.hull(cuda, tuple(on[0]), on[1])
    exactly((hull.z, hull.y, hull.slack), (far.z, far.y, far.slack))
    rows = np.array([3, 0, 7])
    exactly(hull.take(rows).z, far.take(cuda.asarray(rows)).z)
    slopes = rule.slopes(CPU, weights, inputs, result)
    exactly(slopes, there.slopes(cuda, cuda.asarray(weights), tuple(on[0]), on[1]))
    nearly(
        rule.slopes(CPU, guide, inputs, result),
        there.slopes(cuda, cuda.asarray(guide), tuple(on[0]), on[1]),
    )
    multipliers = CPU.whole(slopes) if scale == 1 else rng.integers(-900, 900, slopes.shape)
    small = rng.integers(-900, 900, weights.shape)
    exactly(
        hull.best(CPU, small, multipliers),
        far.best(cuda, cuda.asarray(small), cuda.asarray(multipliers)),
    )
    spread = rule.spread(CPU, multipliers, inputs)
    exactly(spread, there.spread(cuda, cuda.asarray(multipliers), tuple(on[0])))
    m = multipliers.astype(GUIDE)
    ours, theirs = (
        h.as_guide(k).best(k, k.asarray(guide), k.asarray(m))[0]
        for k, h in ((CPU, hull), (cuda, far))
    )
    nearly(ours, theirs)
    z = rule.argument(CPU, *(a for a, _ in inputs))
    z_there = there.argument(cuda, *(a for a, _ in on[0]))
    exactly(z, z_there)
    exactly(rule.cut(CPU, z, inputs, result), there.cut(cuda, z_there, tuple(on[0]), on[1]))
    exactly(rule.value(CPU, case.op.run, z), there.value(cuda, case.op.on(cuda).run, z_there))
    ends, ends_there = (z, z + 1), (z_there, z_there + 1)
    exactly(
        rule.narrowed(CPU, ends, inputs, result),
        there.narrowed(cuda, ends_there, tuple(on[0]), on[1]),
    )


def dual_of(
    network: Network, kernels: Kernels, low: Ints, high: Ints
) -> tuple[Dual, list[Any], Any, Any]:
    dual = Dual.make(network, kernels)
    lower, upper = kernels.asarray(low), kernels.asarray(high)
    return dual, dual.network.boxes(kernels, lower, upper)[0], lower, upper


@pytest.mark.parametrize("name", ["mnist_mlp_qop", "mnist_cnn_qop"])
def test_the_dual_is_alike(name: str, cuda: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relaxations, bounds with CROWN slopes and with multipliers, proofs and intermediate bounds;
    then the steps that improve multipliers."""
    lowered, rng = read_model(EXAMPLES / "onnx" / f"{name}.onnx").lowered, np.random.default_rng(9)
    network, never = lowered.network, Deadline.after(None)
    centre = rng.integers(0, 255, size=(1, network.input_type.size), dtype=np.int32)
    ends = np.maximum(centre - 3, 0), np.minimum(centre + 3, 255)
    (ours, boxes_, *box), (theirs, boxes_there, *box_there) = (
        dual_of(network, k, *ends) for k in (CPU, cuda)
    )
    y = make_decoder(lowered).decode(network.run(CPU, centre))[0]
    rows = [
        Row((), ((0, Fraction(1)), (i, Fraction(-1))), Fraction(float(y[0] - y[i])) - 1, False)
        for i in range(1, 5)
    ]
    covers = [
        make_unsafe_regions(network, d, described_outputs(lowered), [(row,) for row in rows], b)
        for d, b in ((ours, boxes_), (theirs, boxes_there))
    ]
    assert (covers[0].inequalities, covers[0].regions) == (
        covers[1].inequalities,
        covers[1].regions,
    )
    cover, regions = covers[0], range(min(4, len(covers[0].regions)))
    every = np.ones(len(rows), np.bool_)
    for host_bound, there in ((ours.last_layer, theirs.last_layer), (ours.upper, theirs.upper)):
        shift = 0 if host_bound == ours.last_layer else cover.precision()
        assert np.array_equal(
            cover.refuted(ours, host_bound, shift, boxes_, every),
            covers[1].refuted(theirs, there, shift, boxes_there, every),
        )
    found = []
    for dual, boxes_on, kernels in ((ours, boxes_, CPU), (theirs, boxes_there, cuda)):
        boxes_on = [
            tuple(kernels.xp.repeat(end, len(regions), axis=0) for end in pair) for pair in boxes_on
        ]
        objective, relaxations = (
            cover.objective(dual, regions),
            dual.relaxations(boxes_on, cover.last),
        )
        guide, far = objective.as_guide(), relaxations.as_guide(kernels)
        mu = kernels.asarray(
            np.where(np.arange(objective.constants.shape[1]) == 0, 1, 0.25)[None]
            .repeat(len(regions), 0)
            .astype(GUIDE)
        )
        start = Point(mu, dual.crown_multipliers(boxes_on, guide.weights(mu)), mu[:, 0])
        found.append((dual, kernels, objective, relaxations, guide, far, start))
    host = found[0][-1]
    shared = {k: np.rint(m * 64) / 64 for k, m in host.multipliers.items()}
    exactly, nearly = [], []
    for dual, kernels, objective, relaxations, guide, far, start in found:
        point = Point(
            start.mu, {k: kernels.asarray(m.astype(GUIDE)) for k, m in shared.items()}, start.bound
        )
        mu, whole = rounded(dual, point, 12)
        done, precision = proved(dual, relaxations, objective, point, cover.precision())
        bound = dual.upper(relaxations, objective.weights(mu), whole)
        exactly.append(
            [*(kernels.to_host(a) for a in (mu, bound, done, *whole.values())), precision]
        )
        primal = evaluate(dual, far, guide, point)
        better = improve(dual, far, guide, start, 12, 0.1, never)
        nearly.append([start.multipliers, point.bound, primal.pull, better.bound])
    alike(exactly[0], exactly[1], lambda a, b: same(a, b, CPU))
    alike(nearly[0], nearly[1], lambda a, b: about(a, b, cuda, 0.1))  # steps make noise larger
    inner = [
        crown_bounds(d, b[0], b[1], cover.last, never, 4e7)
        for d, b in ((ours, box), (theirs, box_there))
    ]
    alike(inner[0].clamps, inner[1].clamps, lambda a, b: same(a, b, cuda))
    monkeypatch.setattr("qverify.bounds.intermediate.ROUNDS", 3)
    monkeypatch.setattr("qverify.bounds.intermediate.BUDGET", 4e7)
    for start_, d, b in zip(inner, (ours, theirs), (box, box_there), strict=True):
        sharper = optimized_bounds(
            d, b[0], b[1], cover.last, IntermediateBounds(start_.clamps, start_.steps), never
        )
        for k, (low, high) in sharper.clamps.items():
            one = d.kernels.to_host
            assert (one(low) >= one(start_.clamps[k][0])).all() and (
                one(high) <= one(start_.clamps[k][1])
            ).all()


@pytest.mark.parametrize(
    "path", sorted((EXAMPLES / "onnx").glob("*.onnx")), ids=lambda path: path.stem
)
def test_whole_networks_run_and_bound_alike(path: Path, cuda: Kernels) -> None:
    if path.stem.endswith("qdq") and not runtime.available():
        pytest.skip("a QDQ file needs onnxruntime")
    lowered = read_model(path).lowered
    network, on_gpu = lowered.network, lowered.network.on(cuda)
    ((lower, upper),) = boxes(np.random.default_rng(2), (network.input_type,), 500)
    near = np.minimum(lower + 3, upper)
    for high in (upper, near):
        moved = cuda.asarray(lower), cuda.asarray(high)
        for ours, theirs in zip(
            network.intervals(CPU, lower, high), on_gpu.intervals(cuda, *moved), strict=True
        ):
            same(ours, theirs, cuda)
    same(network.run(CPU, lower), on_gpu.run(cuda, cuda.asarray(lower)), cuda)
    y = make_decoder(lowered).decode(cuda.to_host(on_gpu.run(cuda, cuda.asarray(upper))))
    assert np.array_equal(y, make_decoder(lowered).decode(network.run(CPU, upper)))


def test_the_search_s_own_arrays(cuda: Kernels) -> None:
    """Splitting, the rules and the frontier."""
    ((lower, upper),) = boxes(np.random.default_rng(3), (Type((5,), 0, 255),), 100)
    upper = np.maximum(upper, np.minimum(lower + 1, 255)).astype(np.int32)
    keep = (lower < upper).any(axis=1)
    lower, upper = lower[keep], upper[keep]
    gradient = np.random.default_rng(4).normal(size=lower.shape).astype(np.float32)
    there = cuda.asarray(lower), cuda.asarray(upper)
    for rule in INPUT_RULES.values():
        cut = rule.choose(BoxView(CPU, lower, upper, gradient))
        cut_there = rule.choose(BoxView(cuda, *there, cuda.asarray(gradient)))
        same(cut.entry, cut_there.entry, cuda)
        same(cut.threshold, cut_there.threshold, cuda)
        parts = halves(CPU, lower, upper, cut), halves(cuda, *there, cut_there)
        for ours, theirs in zip(*parts, strict=True):
            same(ours, theirs, cuda)
    whole, stack, small = (
        Frontier[OpenBoxes](CPU, None),
        Frontier[OpenBoxes](cuda, None),
        Frontier[OpenBoxes](cuda, 30 * 20),
    )
    entries = np.arange(len(lower))
    for _ in range(3):
        whole.push(OpenBoxes(lower, upper, entries))
        stack.push(OpenBoxes(*there, entries))
        small.push(OpenBoxes(*there, entries))  # most of it on the host
    while len(whole):
        expected = whole.pop(30)
        for other in (stack, small):
            found = other.pop(30)
            same(expected.lower, found.lower, cuda)
            same(expected.upper, found.upper, cuda)
    assert cuda.allowance(100, 0.5) == 100


@pytest.mark.parametrize(
    "options", [Options(device="cuda"), Options(device="cuda", attack=False, batch=7)], ids=str
)
@pytest.mark.parametrize("spec", ["tiny_safe", "tiny_unsafe", "tiny_unsafe_v2"])
def test_verdicts_are_the_cpu_s(spec: str, options: Options, cuda: Kernels) -> None:
    model, path = EXAMPLES / "onnx" / "tiny_mlp_qop.onnx", EXAMPLES / "vnnlib" / f"{spec}.vnnlib"
    on_gpu, on_cpu = verify(model, path, options), verify(model, path, Options(device="cpu"))
    if "unsafe" in spec and not runtime.available():
        pytest.skip("a counterexample needs onnxruntime")
    assert on_gpu.verdict == on_cpu.verdict
    assert (on_gpu.witness is None) == (on_cpu.witness is None)
    assert on_gpu.details["device"] == cuda.description


def only_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is left to cuts on neurons, however small the box."""
    monkeypatch.setattr(bab, "SPLITTABLE", 0)
    monkeypatch.setattr(bab, "refute", lambda known, boxes, refuted, *_: refuted)


def test_trees_of_cuts_are_right(cuda: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small random queries, decided by brute force: with a proof, with a watched point, and with
    few steps."""
    only_cuts(monkeypatch)
    monkeypatch.setattr("qverify.search.cuts.ROOT_PHASES", ((3, 0.1),))
    monkeypatch.setattr("qverify.search.cuts.PHASES", ((3, 0.1),))
    verdicts = set()
    for seed in range(12):
        rng = np.random.default_rng([10, seed])
        question = asked(rng, 60)
        verdicts.add(question.expected)
        for watched in (None, question.watched(rng)):
            assert question.searched(watched, Proof(), cuda).verdict == question.expected, seed
    assert len(verdicts) == 2


@pytest.mark.parametrize(
    "name,spec,edges",
    [
        ("mnist_mlp_qop", "mnist_33_eps_4", False),
        ("mnist_cnn_qop", "mnist_8_eps_4", False),
        ("mnist_cnn_qop", "mnist_8_eps_4", True),
        ("mnist_cnn_qop", "mnist_18_eps_2", True),
    ],
)
def test_whole_queries_with_cuts_and_certificates(
    name: str,
    spec: str,
    edges: bool,
    cuda: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if not edges:
        only_cuts(monkeypatch)
    model, path = EXAMPLES / "onnx" / f"{name}.onnx", EXAMPLES / "vnnlib" / f"{spec}.vnnlib"
    expected = verify(model, path, Options(device="cpu", timeout=60))
    if expected.verdict is Verdict.UNKNOWN and not runtime.available():
        pytest.skip("a counterexample needs onnxruntime")
    result = verify(model, path, Options(device="cuda", timeout=60, certificate=True))
    assert result.verdict == expected.verdict and result.certificate is not None
    certificate = tmp_path / "certificate.zip"
    certificate.write_bytes(result.certificate)
    assert check(model, path, certificate).verdict == expected.verdict.value
