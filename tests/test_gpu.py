"""Bit for bit: every op and whole networks on an NVIDIA GPU compute the integers of the CPU, and verdicts agree.

`make gpu` runs the tests marked `gpu` alone; without a GPU they are skipped and say why. The same tests also run on the
strict machine (tests/kernels/strict.py), which is NumPy, but keeps host and device arrays apart as CuPy does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qverify import Options, runtime, verify
from qverify.errors import DeviceError
from qverify.frontend.model import read_model
from qverify.frontend.outputs import make_decoder
from qverify.kernels import Kernels, gpu, open_kernels
from qverify.ops import Type
from qverify.search.branch import RULES, Scene, split
from qverify.search.frontier import Frontier
from tests.kernels.strict import open_strict
from tests.ops.cases import CASES, Case

EXAMPLES = Path(__file__).parents[1] / "specs" / "examples"
CPU = open_kernels("cpu")
Ints = npt.NDArray[np.int32]
Box = tuple[Ints, Ints]


@pytest.fixture(params=["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The GPU's kernels; without them the test is skipped, with the reason. Or the strict machine in its place."""
    if request.param == "strict":
        monkeypatch.setattr(gpu, "open_cuda", open_strict)
    try:
        return open_kernels("cuda")
    except DeviceError as error:
        pytest.skip(str(error))


def boxes(rng: np.random.Generator, types: tuple[Type, ...], count: int = 200) -> tuple[Box, ...]:
    """Random boxes of every width; the first ones are the extremes: whole ranges, and points at either end."""
    result = []
    for t in types:
        ends = np.sort(rng.integers(t.low, t.high, size=(2, count, *t.shape), endpoint=True), axis=0)
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


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_every_op_runs_and_bounds_alike(case: Case, cuda: Kernels) -> None:
    on_gpu = case.op.on(cuda)
    pairs = boxes(np.random.default_rng(0), case.inputs)
    moved = [(cuda.asarray(a), cuda.asarray(b)) for a, b in pairs]
    for end in (0, 1):
        x, there = [pair[end] for pair in pairs], [pair[end] for pair in moved]
        same(case.op.run(CPU, *x), on_gpu.run(cuda, *there), cuda)
    for ours, theirs in zip(case.op.interval(CPU, *pairs), on_gpu.interval(cuda, *moved), strict=True):
        same(ours, theirs, cuda)


@every_case
def test_every_gradient_works(case: Case, cuda: Kernels) -> None:
    """A guide only, so about equal is enough."""
    rng = np.random.default_rng(1)
    x = [pair[0] for pair in boxes(rng, case.inputs, 8)]
    upstream = rng.normal(size=case.op.run(CPU, *x).shape).astype(np.float32)
    ours = case.op.gradient(CPU, tuple(x), upstream)
    theirs = case.op.on(cuda).gradient(cuda, tuple(cuda.asarray(v) for v in x), cuda.asarray(upstream))
    for a, b in zip(ours, theirs, strict=True):
        host = cuda.to_host(b)
        assert host.shape == a.shape
        scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
        assert np.allclose(a, host, rtol=1e-3, atol=1e-4 * scale + 1e-30, equal_nan=True)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "onnx").glob("*.onnx")), ids=lambda path: path.stem)
def test_whole_networks_run_and_bound_alike(path: Path, cuda: Kernels) -> None:
    if path.stem.endswith("qdq") and not runtime.available():
        pytest.skip("a QDQ file needs onnxruntime")
    lowered = read_model(path).lowered
    network, on_gpu = lowered.network, lowered.network.on(cuda)
    ((lower, upper),) = boxes(np.random.default_rng(2), (network.input_type,), 500)
    near = np.minimum(lower + 3, upper)
    for high in (upper, near):
        moved = cuda.asarray(lower), cuda.asarray(high)
        for ours, theirs in zip(network.intervals(CPU, lower, high), on_gpu.intervals(cuda, *moved), strict=True):
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
    for rule in RULES.values():
        variable = rule(Scene(CPU, lower, upper, gradient))
        same(variable, rule(Scene(cuda, *there, cuda.asarray(gradient))), cuda)
        halves = split(CPU, lower, upper, variable)
        for ours, theirs in zip(halves, split(cuda, *there, cuda.asarray(variable)), strict=True):
            same(ours, theirs, cuda)
    stacks = Frontier(CPU, 5, 1 << 20), Frontier(cuda, 5, 1 << 20)
    stacks[0].push(lower, upper)
    stacks[1].push(*there)
    for ours, theirs in zip(stacks[0].pop(30), stacks[1].pop(30), strict=True):
        same(ours, theirs, cuda)


@pytest.mark.parametrize("options", [Options(device="cuda"), Options(device="cuda", attack=False, batch=7)], ids=str)
@pytest.mark.parametrize("spec", ["tiny_safe", "tiny_unsafe", "tiny_unsafe_v2"])
def test_verdicts_are_the_cpu_s(spec: str, options: Options, cuda: Kernels) -> None:
    model, path = EXAMPLES / "onnx" / "tiny_mlp_qop.onnx", EXAMPLES / "vnnlib" / f"{spec}.vnnlib"
    on_gpu, on_cpu = verify(model, path, options), verify(model, path, Options(device="cpu"))
    if "unsafe" in spec and not runtime.available():
        pytest.skip("a counterexample needs onnxruntime")
    assert on_gpu.verdict == on_cpu.verdict
    assert (on_gpu.witness is None) == (on_cpu.witness is None)
    assert on_gpu.details["device"] == cuda.description
