"""The kernels of the dual's steps: the C++ text for one element, compiled, against NumPy; and what
NVRTC makes of it."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify.bounds.dual import Dual
from qverify.bounds.improve import Objective, Point, improve
from qverify.deadline import Deadline
from qverify.frontend.model import read_model
from qverify.kernels import elementwise, open_kernels
from qverify.ops.relax import GUIDE
from tests.kernels.elementwise import NAMES, Parameter
from tests.kernels.strict import Count, open_strict
from tests.kernels.test_nvrtc import nvrtc, text_of

CPU, STRICT = open_kernels("cpu"), open_strict()
EXAMPLES = Path(__file__).parents[2] / "specs" / "examples" / "onnx"
Rng = np.random.Generator
KINDS = [np.int64, np.float32]
NORMAL = np.finfo(np.float32).tiny


def numbers(rng: Rng, kind: Any, shape: tuple[int, ...], largest: float) -> Any:
    """Random numbers of all sizes, many of them equal or 0; no subnormal floats, which only CPUs
    keep."""
    size = np.exp(rng.uniform(0, np.log(largest), shape)) * rng.choice([-1, 1], shape)
    result = np.where(rng.random(shape) < 0.3, rng.integers(-2, 3, shape), size)
    if kind is np.int64:
        return result.astype(np.int64)
    result = np.where(rng.random(shape) < 0.1, result * 1e-30, result).astype(np.float32)
    return np.where(np.abs(result) < NORMAL, np.float32(0), result)


def same(ours: Any, theirs: Any) -> None:
    """Equal type, shape and values; NaN is NaN."""
    host = STRICT.to_host(theirs)
    assert (ours.dtype, ours.shape) == (host.dtype, host.shape)
    assert np.array_equal(ours, host, equal_nan=ours.dtype.kind == "f")


def there(*arrays: Any) -> tuple[Any, ...]:
    return tuple(STRICT.asarray(a) if isinstance(a, np.ndarray) else a for a in arrays)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_corner_is_numpy_s(kind: Any) -> None:
    """In all shapes of hulls: one box for all or one each, one set of corners for both signs or
    two, slack or none."""
    rng = np.random.default_rng(20)
    for seed in range(60):
        n, r, corners = (int(v) for v in rng.integers(1, 5, 3))
        shape = tuple(int(v) for v in rng.integers(1, 6, rng.integers(0, 4)))
        boxes = n if seed % 3 else 1
        largest = 2.0**29 if kind is np.int64 else [1e3, 1e20, 1e38][seed % 3]
        w, m = (numbers(rng, kind, (n, r, *shape), largest) for _ in range(2))
        z, y = (
            numbers(rng, kind, (int(rng.integers(1, 3)), corners, boxes, 1, *shape), largest)
            for _ in range(2)
        )
        slack = np.abs(numbers(rng, kind, (boxes, 1, *shape), largest)) if seed % 2 else None
        if seed % 5 == 4 and kind is np.float32:
            w.reshape(-1)[::3], m.reshape(-1)[1::3] = np.nan, np.inf
        if seed % 4 == 3:  # not contiguous
            w, z = np.moveaxis(np.ascontiguousarray(np.moveaxis(w, 0, -1)), -1, 0), z[:, ::-1]
        with np.errstate(all="ignore"):
            ours = CPU.best_corner(w, m, z, y, slack)
        if kind is np.float32:
            best, best_y, best_z = (np.where(np.abs(a) < NORMAL, np.float32(0), a) for a in ours)
            ours = best, best_y, best_z
        for a, b in zip(ours, STRICT.best_corner(*there(w, m, z, y, slack)), strict=True):
            same(a, b)


def test_the_first_of_equal_corners_is_taken() -> None:
    z, y = np.zeros((1, 3, 1, 1, 2), np.int64), np.arange(6).reshape(1, 3, 1, 1, 2)
    z[0, :, 0, 0] = y[0, :, 0, 0]
    w = np.full((1, 1, 2), 7)
    for value, best_y, best_z in (
        CPU.best_corner(w, w, z, y, None),
        map(STRICT.to_host, STRICT.best_corner(*there(w, w, z, y, None))),
    ):
        assert (value.tolist(), best_y.tolist(), best_z.tolist()) == (
            [[[0, 0]]],
            [[[0, 1]]],
            [[[0, 1]]],
        )


@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_ends_are_numpy_s(kind: Any) -> None:
    rng = np.random.default_rng(21)
    for shape in ((), (7,), (2, 3, 4)):
        w, low = (
            numbers(rng, kind, (5, 3, *shape), 2.0**20),
            numbers(rng, kind, (5, 1, *shape), 2.0**20),
        )
        same(CPU.furthest(w, low, low + 9), STRICT.furthest(*there(w, low, low + 9)))
        ours, theirs = CPU.dot(w, low), STRICT.to_host(STRICT.dot(*there(w, low)))
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert (
            np.array_equal(ours, theirs)
            if kind is np.int64
            else np.allclose(ours, theirs, rtol=1e-4, atol=1e7)
        )


@pytest.mark.parametrize("averaged", [True, False])
def test_a_step_is_numpy_s(averaged: bool) -> None:
    """Several steps in a row, which change moments and the mean in place, and nothing else."""
    rng = np.random.default_rng(22)
    m, z = (numbers(rng, np.float32, (4, 1, 3, 5), 1e4) for _ in range(2))
    size = np.abs(numbers(rng, np.float32, (4, 1, 1, 1), 1e3))
    state = [np.zeros_like(m) for _ in range(3)]
    far, m_far, z_far, size_far = (
        [STRICT.asarray(a.copy()) for a in state],
        *there(m.copy(), z, size),
    )
    for t in range(8):
        argument = numbers(rng, np.float32, m.shape, 1e4)
        more: dict[str, Any] = {"share": 1 / (t + 1)} if averaged else {"least": 0.0}
        with np.errstate(all="ignore"):
            before = m.copy()
            after = CPU.descend(
                m,
                argument,
                z,
                size,
                (state[0], state[1]),
                0.3,
                mean=state[2] if averaged else None,
                **more,
            )
        mean = far[2] if averaged else None
        (on,) = there(argument)
        m_far = STRICT.descend(m_far, on, z_far, size_far, (far[0], far[1]), 0.3, mean=mean, **more)
        assert np.array_equal(before, m)
        for a, b in zip((after, *state), (m_far, *far), strict=True):
            assert np.allclose(a, STRICT.to_host(b), rtol=1e-5, atol=1e-6)
        m = after
    assert averaged or after.min() == 0


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_folded_columns_and_sums_are_numpy_s(kind: Any) -> None:
    """Bit for bit: additions in the same order."""
    rng = np.random.default_rng(24)
    for seed in range(30):
        rank = 1 + seed % 3
        output, kernel, strides, dilations = (
            tuple(int(v) for v in rng.integers(1, 4, rank)) for _ in range(4)
        )
        more = rng.integers(0, 3, rank)
        sides = zip(output, kernel, strides, dilations, more, strict=True)
        padded = tuple((o - 1) * s + (k - 1) * d + 1 + int(m) for o, k, s, d, m in sides)
        columns = rng.normal(size=(2, 3, *output, 4, *kernel)).astype(kind)
        ours, theirs = (
            k.fold(k.asarray(columns), output, padded, strides, dilations) for k in (CPU, STRICT)
        )
        same(ours, theirs)
    for count in range(1, 6):
        parts = [rng.normal(size=(4, 1 + k % 2)).astype(kind) for k in range(count)]
        same(CPU.total(parts), STRICT.total(list(there(*parts))))


def test_the_largest_magnitudes_are_known_at_one_wait() -> None:
    ends = np.array([[-(2**63), 5], [2**63 - 1, 0]], np.int64)
    arrays = [
        ends,
        ends[1:],
        np.array([-7, 3], np.int32),
        np.zeros((0, 2), np.int64),
        np.array(-4),
        ends[:, 1:],
    ]
    Count.waits = 0
    theirs = STRICT.largest(*map(STRICT.asarray, arrays))
    assert CPU.largest(*arrays) == theirs == [2.0**63, 2.0**63, 7, 0, 4, 5] and Count.waits == 1


def test_what_is_better_is_kept() -> None:
    rng = np.random.default_rng(23)
    new, old = (
        [rng.normal(size=s).astype(np.float32) for s in ((6,), (6, 2), (6, 1, 3))] for _ in range(2)
    )
    copies = [a.copy() for a in (*new, *old)]
    for better in (np.ones(6, bool), np.zeros(6, bool), np.arange(6) % 2 == 0):
        expected = [
            np.where(better.reshape(-1, *([1] * (a.ndim - 1))), a, b)
            for a, b in zip(new, old, strict=True)
        ]
        ours = CPU.rows_where(better, new, old)
        theirs = STRICT.rows_where(STRICT.asarray(better), list(there(*new)), list(there(*old)))
        for a, b, c in zip(expected, ours, theirs, strict=True):
            assert np.array_equal(a, b)
            same(a, c)
    assert all(np.array_equal(a, b) for a, b in zip((*new, *old), copies, strict=True))


@pytest.mark.parametrize(("name", "most"), [("mnist_mlp_qop", 36), ("mnist_cnn_qop", 60)])
def test_a_step_takes_few_launches_and_no_wait(name: str, most: int) -> None:
    """Steps 10 to 17 of an improvement, on the strict machine: one look at the bounds for all of
    them."""
    network = read_model(EXAMPLES / f"{name}.onnx").lowered.network
    dual, rng, last = Dual.make(network, STRICT), np.random.default_rng(25), len(network.nodes)
    lower = rng.integers(0, 250, (1, network.input_type.size), dtype=np.int32)
    boxes, _ = dual.network.boxes(STRICT, STRICT.asarray(lower), STRICT.asarray(lower + 5))
    weights = rng.normal(size=(1, 2, *network.type_of(last).shape)).astype(GUIDE)
    objective = Objective({last: STRICT.asarray(weights)}, STRICT.asarray(np.ones((1, 2), GUIDE)))
    relaxations, mu = (
        dual.relaxations(boxes, last).as_guide(STRICT),
        STRICT.asarray(np.ones((1, 2), GUIDE)),
    )
    start = Point(mu, dual.crown_multipliers(boxes, objective.weights(mu)), mu[:, 0])
    counts = []
    for rounds in (9, 17):
        Count.launches = Count.waits = 0
        improve(
            dual, relaxations, objective, start, rounds, 0.1, Deadline.after(None), enough=-np.inf
        )
        counts.append((Count.launches, Count.waits))
    assert (counts[1][0] - counts[0][0]) / 8 <= most
    assert counts[1][1] - counts[0][1] == 1


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.filterwarnings("ignore")  # CuPy warns where it finds no CUDA
def test_cupy_reads_every_kernel() -> None:
    """Parameters and names; the text is compiled when a kernel is first called."""
    import cupy

    for inputs, outputs, text in elementwise.KERNELS.values():
        made = cupy.ElementwiseKernel(inputs, outputs, text, "qverify_some")
        assert made.nin == len(Parameter.read(inputs)) and made.nout == len(Parameter.read(outputs))
    assert (
        all(make(cupy) is not None for make in (elementwise.dot_kernel, elementwise.largest_kernel))
        and elementwise.total_kernel(cupy, 5).nin == 5
    )


def cuda_source(name: str, kind: str) -> str:
    """Close to what CuPy makes of a kernel (its arrays have strides besides, its loop a grid)."""
    inputs, outputs, operation = elementwise.KERNELS[name]
    arguments, each = [], []
    for k, p in enumerate([*Parameter.read(inputs), *Parameter.read(outputs)]):
        kind_of = NAMES.get(p.type, p.type)
        scalar = p.type == "int64" or p.name in ("rate", "least", "share")
        arguments.append(
            f"{kind_of} {p.name}" if scalar else f"{kind_of} *{p.name if p.raw else f'held{k}'}"
        )
        if not (scalar or p.raw):
            const = "" if k >= len(Parameter.read(inputs)) else "const "
            each.append(f"{const}{kind_of} &{p.name} = held{k}[i];")
    return f"""
    typedef {kind} T;
    extern "C" __global__ void {name}({", ".join(arguments)}, ptrdiff_t size_) {{
        for (ptrdiff_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size_; i += blockDim.x * gridDim.x) {{
            {" ".join(each)}
            {operation};
        }}
    }}"""


@pytest.mark.parametrize("kind", ["float", "long long"])
@pytest.mark.parametrize("name", elementwise.KERNELS)
def test_nvrtc_compiles_it(name: str, kind: str) -> None:
    if kind != "float" and name.startswith("descend"):
        pytest.skip("floats only")
    library, program = nvrtc(), ctypes.c_void_p()
    held = ("typedef signed long ptrdiff_t;" + cuda_source(name, kind)).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), held, b"step.cu", 0, None, None) == 0
    words = [
        b"--std=c++17",
        b"-ftz=true",
        b"--device-as-default-execution-space",
        b"--gpu-architecture=sm_80",
    ]
    code = library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
    report = text_of(library, program, "ProgramLog").rstrip(b"\0").decode()
    assert code == 0, report
    library.nvrtcDestroyProgram(ctypes.byref(program))
