"""Interval propagation against one onnxruntime int8 inference of the same network, side by side.

    python benchmarks/ibp_vs_inference.py [--rounds 9] [--out
    benchmarks/results/ibp_vs_inference.csv]

For each network and batch size, rounds alternate between three tasks: the runtime's inference of a
batch, the interval bounds of a batch of boxes by the integer ops themselves (`Network.intervals`:
NumPy), and the same by what the search uses (`qverify.propagate`: onnxruntime's kernels). The
medians of their CPU times are compared, one thread each. Networks have random weights and the
shapes of `nets()`; before timing, the integer network is checked against the runtime on the batch,
and both ways of bounding against each other.

Columns: `machine` and `device` say where; `network`, `batch` what; `inference_us`, `reference_us`,
`interval_us` are the three times of a whole batch; `by` is what computed the last;
`reference_ratio` and `ratio` are the second and the third time over the first; `boxes_per_second`
belongs to the third.

On a GPU, `benchmarks/gpu` measures this and more.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread each; BLAS libraries read these when NumPy is imported.
if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qverify.boundary.outputs import make_decoder
from qverify.frontend.encoder import make_encoder
from qverify.frontend.model import read_model
from qverify.kernels import open_kernels
from qverify.propagate import Propagator

COLUMNS = (
    *(
        "date",
        "machine",
        "device",
        "network",
        "batch",
        "inference_us",
        "reference_us",
        "interval_us",
        "by",
    ),
    *("reference_ratio", "ratio", "boxes_per_second"),
)


class Chain:
    """A QOperator chain under construction: uint8 activations, int8 weights, scales that keep
    activations alive."""

    def __init__(self, shape: list[int], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.value = self._node(
            "QuantizeLinear", ["x", self.c(np.float32(1 / 255)), self.c(np.uint8(0))]
        )

    def c(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, op: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, inputs, [name], name=name, domain=domain, **attributes)
        )
        return name

    def _common(self, fan_in: int) -> tuple[str, str, str, str]:
        """Scales and zero points that spread the next activations over their range."""
        return (
            self.c(np.float32(0.02)),
            self.c(np.uint8(0)),
            self.c(np.float32(0.02 * 0.02 * fan_in**0.5 * 25)),
            self.c(np.uint8(64)),
        )

    def dense(self, width: int) -> Chain:
        fan_in = self.shape[1]
        w = self.rng.integers(-127, 128, (fan_in, width)).astype(np.int8)
        bias = self.rng.integers(-2000, 2000, width).astype(np.int32)
        xs, xz, ys, yz = self._common(fan_in)
        ws, wz = self.c(np.float32(0.02)), self.c(np.int8(0))
        inputs = [self.value, xs, xz, self.c(w), ws, wz, self.c(bias), ys, yz]
        self.value = self._node("QGemm", inputs, "com.microsoft")
        self.shape = [self.shape[0], width]
        return self

    def conv(self, channels: int, kernel: int, stride: int, pad: int = 0) -> Chain:
        b, c, h, w = self.shape
        weight = self.rng.integers(-127, 128, (channels, c, kernel, kernel)).astype(np.int8)
        bias = self.rng.integers(-2000, 2000, channels).astype(np.int32)
        xs, xz, ys, yz = self._common(c * kernel * kernel)
        ws, wz = self.c(np.float32(0.02)), self.c(np.int8(0))
        inputs = [self.value, xs, xz, self.c(weight), ws, wz, ys, yz, self.c(bias)]
        self.value = self._node("QLinearConv", inputs, strides=[stride] * 2, pads=[pad] * 4)
        size = [(s + 2 * pad - kernel) // stride + 1 for s in (h, w)]
        self.shape = [b, channels, *size]
        return self

    def flatten(self) -> Chain:
        self.value = self._node("Flatten", [self.value])
        self.shape = [self.shape[0], int(np.prod(self.shape[1:]))]
        return self

    def model(self, first: list[int]) -> onnx.ModelProto:
        self.value = self._node(
            "DequantizeLinear", [self.value, self.c(np.float32(0.1)), self.c(np.uint8(64))]
        )
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, first)
        y = helper.make_tensor_value_info(self.value, TensorProto.FLOAT, self.shape)
        graph = helper.make_graph(self.nodes, "net", [x], [y], self.constants)
        opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def nets() -> dict[str, tuple[list[int], Callable[[Chain], Chain]]]:
    """Name -> (input shape of one sample, layers)."""

    def acas(c: Chain) -> Chain:
        for _ in range(6):
            c = c.dense(50)
        return c.dense(5)

    return {
        "mlp 784-64-32-10": ([784], lambda c: c.dense(64).dense(32).dense(10)),
        "mlp 784-1024-1024-10": ([784], lambda c: c.dense(1024).dense(1024).dense(10)),
        "mlp 5-6x50-5": ([5], acas),
        "cnn 16k4s2-32k4s2-100-10": (
            [1, 28, 28],
            lambda c: c.conv(16, 4, 2).conv(32, 4, 2).flatten().dense(100).dense(10),
        ),
        "cnn 64-64-128s2-10 (32x32x3)": (
            [3, 32, 32],
            lambda c: c.conv(64, 3, 1, 1).conv(64, 3, 1, 1).conv(128, 3, 2, 1).flatten().dense(10),
        ),
    }


@dataclass(frozen=True)
class Times:
    """Median microseconds of one batch."""

    inference: float
    reference: float
    interval: float
    by: str


def measure(name: str, batch: int, rounds: int, folder: Path) -> Times:
    """The times of one network."""
    import onnxruntime as ort

    sample, layers = nets()[name]
    first = [batch, *sample]
    path, single = folder / "batch.onnx", folder / "single.onnx"
    onnx.save(layers(Chain(first, 0)).model(first), path)
    onnx.save(layers(Chain([1, *sample], 0)).model([1, *sample]), single)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kernels = open_kernels("cpu")
    lowered = read_model(single).lowered
    network = lowered.network.on(kernels)
    rng = np.random.default_rng(1)
    x = rng.random(first, dtype=np.float32)
    codes = np.ascontiguousarray(
        make_encoder(lowered).encode(x.reshape(batch, -1).astype(np.float64))
    )
    expected = np.asarray(session.run(None, {"x": x})[0]).reshape(batch, -1)
    ours = make_decoder(lowered).decode(
        kernels.to_host(network.run(kernels, kernels.asarray(codes)))
    )
    if (ours != expected).any():
        raise SystemExit(f"{name}: the integer network differs from the runtime")
    lower, upper = (
        kernels.asarray(np.maximum(codes - 2, 0)),
        kernels.asarray(np.minimum(codes + 2, 255)),
    )
    propagator = Propagator(network, kernels, patience=0)
    clock = time.process_time

    def infer() -> Any:
        return session.run(None, {"x": x})

    def reference() -> Any:
        return [kernels.to_host(end) for end in network.intervals(kernels, lower, upper)]

    def bound() -> Any:
        return [kernels.to_host(end) for end in propagator.intervals(lower, upper)]

    infer()
    if any((a != b).any() for a, b in zip(reference(), bound(), strict=True)):
        raise SystemExit(f"{name}: the two ways of bounding differ")
    times: dict[Callable[[], Any], list[float]] = {task: [] for task in (infer, reference, bound)}
    for _ in range(rounds):
        for task, own in times.items():
            repeats, start = 0, clock()
            while clock() - start < 0.05 or repeats < 2:
                task()
                repeats += 1
            own.append((clock() - start) / repeats)
    return Times(*(statistics.median(own) * 1e6 for own in times.values()), propagator.name)


def machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {(names or [platform.processor() or platform.system()])[0]}"


def main() -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--networks", nargs="+", choices=list(nets()))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ibp_vs_inference.csv"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in options.networks or nets():
            for batch in options.batches:
                found = measure(name, batch, options.rounds, Path(folder))
                row = {
                    "date": datetime.date.today().isoformat(),
                    "machine": machine(),
                    "device": open_kernels("cpu").description,
                    "network": name,
                    "batch": batch,
                    "inference_us": f"{found.inference:.1f}",
                    "reference_us": f"{found.reference:.1f}",
                    "interval_us": f"{found.interval:.1f}",
                    "by": found.by,
                    "reference_ratio": f"{found.reference / found.inference:.2f}",
                    "ratio": f"{found.interval / found.inference:.2f}",
                    "boxes_per_second": f"{batch / found.interval * 1e6:.0f}",
                }
                writer.writerow(row)
                stream.flush()
                print(
                    f"{name:32} batch {batch:5}: inference {found.inference:10.1f} us, reference "
                    f"{row['reference_ratio']:>6}x, {found.by} {found.interval:10.1f} us, "
                    f"{row['ratio']:>5}x"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
