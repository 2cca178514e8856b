"""How many boxes a second intervals bound, and how many subproblems a second the dual.

Networks have random weights of a fixed seed, in the shapes of `SHAPES`. Inputs and results of what
is timed lie in the device's memory. Before anything is timed, the bounds of some boxes are compared
with NumPy's, bit for bit.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.gpu.device import Clock, Emit
from benchmarks.gpu.points import make_inference
from benchmarks.ibp_vs_inference import Chain, nets
from qverify.bounds.improve import Point, improve
from qverify.bounds.unsafe_regions import proved
from qverify.deadline import Deadline
from qverify.engine import Engine
from qverify.errors import DeviceError
from qverify.frontend.model import read_model
from qverify.kernels import Kernels, open_kernels
from qverify.network import Network
from qverify.ops import Conv, Dense
from qverify.ops.relax import GUIDE
from qverify.propagate import Propagator
from qverify.propagate.device import Plan, opened
from qverify.search.knowledge import Knowledge
from qverify.search.problem import Problem
from qverify.vnnlib.reader import read_property

ROOT = Path(__file__).resolve().parents[2]
CPU = open_kernels("cpu")
FOUR = ("mlp 784-64-32-10", "mlp 784-1024-1024-10", "mlp 5-6x50-5", "cnn 16k4s2-32k4s2-100-10")
CIFAR = "cnn 64-64-128s2-128-128-512-10 (32x32x3)"
SHAPES: dict[str, tuple[list[int], Callable[[Chain], Chain]]] = {
    **{name: nets()[name] for name in FOUR},
    CIFAR: (
        [3, 32, 32],
        lambda c: (
            c.conv(64, 3, 1, 1)
            .conv(64, 3, 1, 1)
            .conv(128, 3, 2, 1)
            .conv(128, 3, 1, 1)
            .conv(128, 3, 1, 1)
            .flatten()
            .dense(512)
            .dense(10)
        ),
    ),
}
BATCHES = (16384, 1024, 131072, 64, 1)
DUALS = (("mnist_mlp_qop", "mnist_33_eps_4"), ("mnist_cnn_qop", "mnist_8_eps_4"))
DUAL_BATCHES = (64, 256, 1024, 4096)
ROUNDS, RATE = 12, 0.1  # of the search's first phase
NEVER = Deadline.after(None)

# -- intervals -------------------------------------------------------------------------------------


def rounded(count: int, step: int) -> int:
    return -(-count // step) * step


def work_of(network: Network) -> tuple[int, int]:
    """Multiplications of one inference, with neurons rounded up to 16 and inputs to 32 as tensor
    cores take them; bytes that intervals read and write if every layer reads and writes pairs of
    bytes once."""
    multiplications, moved = 0, 0
    for node in network.nodes:
        if isinstance(node.op, Dense | Conv):
            weight = node.op.weight if isinstance(node.op, Conv) else node.op.weight.T
            neurons, inputs = len(weight), prod(weight.shape[1:])
            multiplications += (
                rounded(inputs, 32) * rounded(neurons, 16) * (node.type.size // neurons)
            )
            moved += 2 * (network.type_of(node.inputs[0]).size + node.type.size)
    return multiplications, moved


def limits(network: Network, ceilings: dict[str, float], one_launch: bool) -> dict[str, float]:
    """Boxes per second that the measured ceilings allow: two sparse products (four dense ones), or
    the bytes. A network in one launch moves its input and its output only."""
    multiplications, moved = work_of(network)
    if one_launch:
        moved = 2 * network.input_type.size + 8 * network.output_size
    found = {}
    products = {"mma_sparse": 2, "mma_dense": 4, "mma_small": 4}
    rates = [
        rate / (products[name] * multiplications)
        for name, rate in ceilings.items()
        if name in products
    ]
    if rates:
        found["tensor_limit"] = max(rates)
    if "copy" in ceilings:
        found["memory_limit"] = ceilings["copy"] / moved
    return found


def sampled(name: str) -> Network:
    """The integer network of a shape, NumPy's arrays."""
    sample, layers = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        onnx.save(layers(Chain([1, *sample], 0)).model([1, *sample]), path)
        return read_model(path).lowered.network


def boxes_of(network: Network, count: int) -> tuple[Any, Any]:
    """Random boxes, five codes wide."""
    rng, kind = np.random.default_rng(1), network.input_type
    centre = rng.integers(
        kind.low, kind.high, (min(count, 4096), kind.size), endpoint=True, dtype=np.int32
    )
    centre = np.resize(centre, (count, kind.size))
    return np.maximum(centre - 2, kind.low), np.minimum(centre + 2, kind.high)


@dataclass(eq=False)
class Timed:
    """One network on one machine."""

    host: Network
    network: Network
    propagator: Propagator
    inference: Plan | None = None  # by the same kernels

    @staticmethod
    def make(kernels: Kernels, name: str) -> Timed:
        host = sampled(name)
        network = host.on(kernels)
        result = Timed(host, network, Propagator(network, kernels, patience=0))
        if not kernels.is_host:
            with suppress(DeviceError):
                result.inference = make_inference(network, opened(kernels))
        return result

    def row(self, kernels: Kernels, batch: int, seconds: float) -> dict[str, Any]:
        """The times of a batch."""
        clock, (lower, upper) = Clock(kernels, seconds), boxes_of(self.host, batch)
        there, fast = (kernels.asarray(lower), kernels.asarray(upper)), self.propagator
        found = fast.intervals(*there)
        some = slice(None, None, max(1, batch // 16))
        expected = self.host.intervals(CPU, lower[some], upper[some])
        if any(
            not np.array_equal(a, kernels.to_host(b[some]))
            for a, b in zip(expected, found, strict=True)
        ):
            raise SystemExit("the bounds differ from NumPy's")
        row: dict[str, Any] = {
            "by": fast.name,
            "interval_s": clock.median(lambda: fast.intervals(*there)),
        }
        row["points_s"] = clock.median(lambda: fast.intervals(there[0], there[0]))
        if batch * self.host.elements_per_point() < 1 << 28:
            row["run_s"] = clock.median(lambda: self.network.run(kernels, there[0]))
        if self.inference is not None:
            row["inference_s"] = self._inference(kernels, there[0], lower, clock)
        plan = fast._fast
        if isinstance(plan, Plan):
            row |= _by_step(plan, clock, *there)
            row |= {"launches": " + ".join(plan.launches()), "steps": len(plan.steps)}
            row |= _products(kernels, self.host, batch, clock)
        return row

    def _inference(self, kernels: Kernels, there: Any, points: Any, clock: Clock) -> float:
        """Seconds of the exact inference of as many points, two to a pair."""
        plan, half = self.inference, len(points) // 2
        assert plan is not None
        first, second = (there[:half], there[half : 2 * half]) if half else (there, there)
        found = plan.run(first, second)
        for start, part in zip((0, half), found, strict=True):
            if not np.array_equal(
                kernels.to_host(part[:16]),
                self.host.run(CPU, points[start : start + len(part)][:16]),
            ):
                raise SystemExit("the inference differs from NumPy's")
        return clock.median(lambda: plan.run(first, second))


def intervals(
    kernels: Kernels, ort: Any, ceilings: dict[str, float], quick: bool, emit: Emit
) -> None:
    """Rows of bounds per second, by batch and network; the most telling batches first. What fails
    is a row, too."""
    nets = {name: Timed.make(kernels, name) for name in ((FOUR[0], FOUR[3]) if quick else SHAPES)}
    for batch in (8, 1) if quick else BATCHES:
        for name, net in nets.items():
            if 24 * batch * net.host.input_type.size > kernels.allowance(8 << 30, 0.3):
                continue
            row: dict[str, Any] = {"network": name, "batch": batch}
            try:
                row |= net.row(kernels, batch, 0.03 if quick else 0.2)
            except Exception as error:  # no memory, or a kernel that fails
                emit({"row": {**row, "by": f"failed: {type(error).__name__}: {error}"[:300]}})
                continue
            row |= _runtime(ort, name, min(batch, 1024), quick)
            emit({"row": row | _ratios(net.host, row, ceilings)})


def _ratios(host: Network, row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, float]:
    """What follows from the times of a row."""
    batch, found = row["batch"], {"boxes_per_second": row["batch"] / row["interval_s"]}
    if "fused_s" in row:
        one_launch = row["launches"].startswith("network") and "+" not in row["launches"]
        bound = limits(host, ceilings, one_launch)
        found |= bound
        if bound:
            found["of_limit_fused"] = batch / row["fused_s"] / min(bound.values())
            found["of_limit"] = found["boxes_per_second"] / min(bound.values())
    for what in ("inference_s", "run_s", "gemm_s"):
        if what in row:
            found[f"over_{what[:-2]}"] = row["interval_s"] / row[what]
    if "runtime_s_per_sample" in row:
        found["over_runtime"] = row["interval_s"] / batch / row["runtime_s_per_sample"]
    return found


def _by_step(plan: Any, clock: Clock, lower: Any, upper: Any) -> dict[str, float]:
    """The time of the fused kernels alone, each launched many times in a row: without gaps between
    launches, and without the steps that turn ends into pairs of bytes and back."""
    from qverify.propagate import device

    rows = max(1, device.BUDGET // max(plan.per_box, 1))
    share = min(1.0, rows / len(lower))
    buffers: dict[int, Any] = {0: (lower[:rows], upper[:rows])}
    fused, rest = 0.0, 0.0
    for number, step in enumerate(plan.steps):
        task = functools.partial(step.function, *(buffers[i] for i in step.reads))
        buffers[step.writes] = task()
        seconds = clock.median(task)
        fused, rest = (fused + seconds, rest) if step.kernel else (fused, rest + seconds)
        for i in set(step.reads):
            if plan.last[i] == number:
                del buffers[i]
    return {"fused_s": fused / share, "other_steps_s": rest / share}


def _products(kernels: Kernels, host: Network, batch: int, clock: Clock) -> dict[str, Any]:
    """An inference's int8 products by cuBLAS (int8 x int8 -> int32, nothing rounded after them). No
    convolutions."""
    layers = [node.op.weight.shape for node in host.nodes if isinstance(node.op, Dense)]
    if any(isinstance(node.op, Conv) for node in host.nodes) or batch < 16:
        return {}
    try:
        tasks = [
            _product(kernels, batch, rounded(inputs, 16), rounded(neurons, 16))
            for inputs, neurons in layers
        ]
        return {"gemm_s": sum(clock.median(task) for task in tasks)}
    except Exception as error:  # a comparison that this CuPy or cuBLAS does not offer
        return {"gemm_error": f"{type(error).__name__}: {error}"[:200]}


def _product(kernels: Kernels, rows: int, inputs: int, neurons: int) -> Callable[[], Any]:
    from cupy.cuda.device import get_cublas_handle
    from cupy_backends.cuda.libs import cublas

    xp, handle, rng = kernels.xp, get_cublas_handle(), np.random.default_rng(2)
    x, w = (rng.integers(-128, 128, (n, inputs), dtype=np.int8) for n in (rows, neurons))
    there_x, there_w = kernels.asarray(x), kernels.asarray(w)
    result, one, zero = (
        xp.empty((rows, neurons), dtype=xp.int32),
        np.ones(1, np.int32),
        np.zeros(1, np.int32),
    )
    int8, int32, default = 3, 10, -1  # CUDA_R_8I, CUDA_R_32I, CUBLAS_GEMM_DEFAULT

    def task() -> Any:
        first, second, target = (a.data.ptr for a in (there_w, there_x, result))
        cublas.gemmEx(
            *(
                handle,
                cublas.CUBLAS_OP_T,
                cublas.CUBLAS_OP_N,
                neurons,
                rows,
                inputs,
                one.ctypes.data,
            ),
            *(first, int8, inputs, second, int8, inputs, zero.ctypes.data, target, int32, neurons),
            *(cublas.CUBLAS_COMPUTE_32I, default),
        )
        return result

    if not np.array_equal(
        kernels.to_host(task()[:4]), x[:4].astype(np.int64) @ w.T.astype(np.int64)
    ):
        raise ValueError("cuBLAS's product is not the one that was meant")
    return task


def _runtime(ort: Any, name: str, batch: int, quick: bool) -> dict[str, Any]:
    """onnxruntime's inference of the same network: by CUDA where its provider is there, else by all
    cores."""
    if ort is None:
        return {}
    sample, layers = SHAPES[name]
    providers = [
        p
        for p in ("CUDAExecutionProvider", "CPUExecutionProvider")
        if p in ort.get_available_providers()
    ]
    model = layers(Chain([batch, *sample], 0)).model([batch, *sample]).SerializeToString()
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(model, options, providers=providers)
        x = np.random.default_rng(1).random((batch, *sample), dtype=np.float32)
        seconds = Clock(CPU, 0.03 if quick else 0.2).median(lambda: session.run(None, {"x": x}))
    except Exception as error:  # a provider that cannot run int8 ops
        return {"runtime_by": f"failed: {error}"[:100]}
    by = f"{session.get_providers()[0]}, {os.cpu_count()} cores, batch {batch}"
    return {"runtime_s_per_sample": seconds / batch, "runtime_by": by}


# -- the dual --------------------------------------------------------------------------------------


def problem_for(model: Path, spec: Path, kernels: Kernels) -> Problem:
    """The first query of an instance, as `verify` prepares it."""
    engine = Engine.make(read_model(model), kernels, backward=True)
    return engine.problem(read_property(spec).queries[0])


def dual(kernels: Kernels, quick: bool, emit: Emit) -> None:
    """Rows of subproblems per second: hulls, CROWN slopes, `ROUNDS` steps, the exact
    bound. On a GPU, the same batches on the CPU too, as long as they are not large."""
    for machine in [kernels] if kernels.is_host else [kernels, CPU]:
        for name, spec in DUALS:
            model, path = (
                ROOT / f"specs/examples/onnx/{name}.onnx",
                ROOT / f"specs/examples/vnnlib/{spec}.vnnlib",
            )
            problem = problem_for(model, path, machine)
            for batch in (4,) if quick else DUAL_BATCHES:
                if machine.is_host and batch > 1024:
                    continue
                row = _dual_row(problem, machine, batch, 2 if quick else ROUNDS)
                emit(
                    {
                        "row": {
                            "model": name,
                            "property": spec,
                            "device": machine.name,
                            "batch": batch,
                            **row,
                        }
                    }
                )


def _dual_row(problem: Problem, machine: Kernels, batch: int, rounds: int) -> dict[str, Any]:
    relaxed, rng = Knowledge(problem).relaxed(), np.random.default_rng(3)
    assert relaxed is not None
    dual, cover = relaxed.dual, relaxed.regions
    lower, upper = (np.repeat(end[None], batch, axis=0) for end in (problem.lower, problem.upper))
    middle = (
        lower + upper
    ) // 2  # every code is free, or is cut in the middle, in a part of its own
    cut = rng.integers(0, 8, lower.shape)
    upper, lower = (
        np.where(cut == 0, middle, upper),
        np.where(cut == 1, np.minimum(middle + 1, upper), lower),
    )
    there = machine.asarray(lower.astype(np.int32)), machine.asarray(upper.astype(np.int32))
    objective = cover.objective(dual, [0] * batch)
    guide = objective.as_guide()

    def task() -> Any:
        boxes, _ = dual.network.boxes(machine, *there)
        relaxations = dual.relaxations(boxes, cover.last)
        mu = machine.xp.zeros(objective.constants.shape, dtype=GUIDE)
        mu[:, 0] = 1
        start = Point(mu, dual.crown_multipliers(boxes, guide.weights(mu)), mu[:, 0])
        point = improve(
            dual, relaxations.as_guide(machine), guide, start, rounds, RATE, NEVER, enough=-1e30
        )
        return proved(dual, relaxations, objective, point, cover.precision())[0]

    seconds = Clock(machine, 0.5).median(task)
    found = int(machine.to_host(task()).sum())
    return {
        "seconds": seconds,
        "steps": rounds,
        "proved": found,
        "subproblems_per_second": batch / seconds,
    }
