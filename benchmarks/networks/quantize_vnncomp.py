"""Quantize the float networks of VNN-COMP benchmarks, so that the competition's own specifications
have int8 networks.

    python benchmarks/networks/quantize_vnncomp.py SOURCE OUT [--only acasxu mnist_fc] [--formats
    qop qdq] [--samples 200]

SOURCE holds one folder per benchmark, each with an instance list (`onnx,vnnlib,timeout`). For every
benchmark, every format and both granularities (per tensor, and `.pc` per output channel) a folder
`OUT/<benchmark>.<format>[.pc]` is written, with `onnx/*.onnx` and an `instances.csv` that points
back to the original specifications.

Activations are uint8 and weights int8, calibrated by minimum and maximum on inputs drawn uniformly
from the boxes of the specifications that go with a network, and on the least and greatest corner of
each box. A network that the tools refuse is one line of the report, nothing more.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from qverify.vnnlib.reader import read_property

Floats = npt.NDArray[np.float32]
Boxes = list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]

FORMATS = {"qop": QuantFormat.QOperator, "qdq": QuantFormat.QDQ}
OPSET = 13  # the first whose QuantizeLinear knows an axis
LISTS = ("instances_available.csv", "instances.csv", "*_instances.csv")


# -- instance lists --------------------------------------------------------------------------------


@dataclass
class Network:
    """A float network of a benchmark and the (specification, timeout) pairs that go with it."""

    path: Path
    specs: list[tuple[Path, str]] = field(default_factory=list)


def read_networks(benchmark: Path) -> list[Network]:
    """The networks of a benchmark's instance list whose files are present."""
    lists = [path for pattern in LISTS for path in sorted(benchmark.glob(pattern))]
    networks: dict[Path, Network] = {}
    if not lists:
        return []
    with lists[0].open(newline="") as file:
        for name, spec, timeout in (row[:3] for row in csv.reader(file) if len(row) >= 3):
            model, text = benchmark / name.strip(), find_spec(benchmark / spec.strip())
            if model.is_file() and text is not None:
                networks.setdefault(model, Network(model)).specs.append((text, timeout.strip()))
    return list(networks.values())


def find_spec(path: Path) -> Path | None:
    """The file itself or its .gz, which instance lists leave out."""
    return next((found for found in (path, Path(f"{path}.gz")) if found.is_file()), None)


def read_boxes(specs: list[tuple[Path, str]]) -> Boxes:
    """All input boxes of the specifications, as floats: they only guide the calibration."""
    boxes: dict[tuple[bytes, bytes], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}
    for path in dict.fromkeys(path for path, _ in specs):
        for query in read_property(path).queries:
            low, high = (np.array(side, np.float64) for side in (query.box.lower, query.box.upper))
            boxes[low.tobytes(), high.tobytes()] = low, high
    return list(boxes.values())


def draw(boxes: Boxes, count: int, rng: np.random.Generator) -> Floats:
    """Inputs [count, n]: a box, then a point in it, both uniform."""
    chosen = [boxes[i] for i in rng.integers(len(boxes), size=count)]
    return np.stack([rng.uniform(low, high) for low, high in chosen]).astype(np.float32)


# -- networks --------------------------------------------------------------------------------------


def load_float(path: Path) -> onnx.ModelProto:
    """The network in a shape the quantizer takes: opset 13 or newer, batch size 1, no initializer
    as input."""
    model = onnx.load(path)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for value in model.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if not dimension.dim_value:
                dimension.dim_value = 1
    # Before 4, an initializer had to be listed as an input.
    model.ir_version = max(model.ir_version, 7)
    if (
        max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        < OPSET
    ):
        model = onnx.version_converter.convert_version(model, OPSET)
    del model.graph.value_info[:]  # shapes of another opset or batch size
    return model


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float graph after onnxruntime's basic rewrites; the one that matters merges MatMul and
    Add into Gemm."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "simple.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


class Runtime:
    """A network in onnxruntime, one input and one flat output."""

    def __init__(self, model: onnx.ModelProto) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        if len(self.session.get_inputs()) != 1:
            raise ValueError("more than one input")
        self.input = self.session.get_inputs()[0]

    def feeds(self, inputs: Floats) -> Iterator[dict[str, Floats]]:
        return ({self.input.name: row.reshape(self.input.shape)} for row in inputs)

    def __call__(self, inputs: Floats) -> Floats:
        """Outputs [count, m] of inputs [count, n]."""
        return np.stack(
            [self.session.run(None, feed)[0].reshape(-1) for feed in self.feeds(inputs)]
        )


class Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Feeds calibration inputs one by one."""

    def __init__(self, feeds: Iterator[dict[str, Floats]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, Floats] | None:
        return next(self.feeds, None)


@dataclass(frozen=True)
class Prepared:
    """A float network with the inputs to calibrate on and others to compare on."""

    model: onnx.ModelProto
    run: Runtime
    calibration: Floats
    fresh: Floats
    expected: Floats  # outputs of the float network on `fresh`


def prepare(network: Network, samples: int, seed: int, simpler: bool) -> Prepared:
    rng = np.random.default_rng([seed, zlib.crc32(network.path.name.encode())])
    boxes = read_boxes(network.specs)
    model = load_float(network.path)
    if simpler:
        model = simplify(model)
    run = Runtime(model)
    # The corners make the input quantizer cover the boxes; samples of a low-dimensional box stay
    # clear of its ends.
    corners = np.array([corner for box in boxes for corner in box], np.float32)
    calibration, fresh = (draw(boxes, samples, rng) for _ in range(2))
    return Prepared(model, run, np.concatenate([calibration, corners]), fresh, run(fresh))


def quantize(prepared: Prepared, form: str, per_channel: bool, path: Path) -> float | None:
    """Write the quantized network; how often its argmax is the float network's (None: a single
    output)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)  # the quantizer edits what it is given
    quantize_static(
        model, path, Samples(prepared.run.feeds(prepared.calibration)),
        quant_format=FORMATS[form], per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    outputs = Runtime(onnx.load(path))(prepared.fresh)
    if outputs.shape[1] == 1:
        return None
    return float((outputs.argmax(1) == prepared.expected.argmax(1)).mean())


# -- folders ---------------------------------------------------------------------------------------


@dataclass
class Target:
    """One folder to write and what became of it."""

    folder: Path
    form: str
    per_channel: bool
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    done: int = 0
    failed: int = 0
    agreements: list[float] = field(default_factory=list)

    def add(self, network: Network, prepared: Prepared) -> None:
        path = self.folder / "onnx" / network.path.name
        try:
            agreement = quantize(prepared, self.form, self.per_channel, path)
        except (
            Exception
        ) as error:  # the quantizer and the runtime raise anything; a report line is all we owe
            path.unlink(missing_ok=True)
            self.fail(network, error)
            return
        self.done += 1
        self.agreements += [] if agreement is None else [agreement]
        self.rows += [
            (f"onnx/{path.name}", os.path.relpath(spec, self.folder), timeout)
            for spec, timeout in network.specs
        ]

    def fail(self, network: Network, error: Exception) -> None:
        self.failed += 1
        reason = next(iter(str(error).strip().splitlines()), "")
        print(
            f"FAILED {self.folder.name} {network.path.name}: {type(error).__name__}: "
            f"{reason[:160]}",
            flush=True,
        )

    def write(self) -> None:
        if not self.rows:
            return
        with (self.folder / "instances.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(self.rows)


def convert(benchmark: Path, targets: list[Target], samples: int, seed: int, simpler: bool) -> None:
    """Quantize every network of a benchmark into every target."""
    networks = read_networks(benchmark)
    if not networks:
        print(
            f"FAILED {benchmark.name}: no instance (one network, one specification) whose files "
            "are here",
            flush=True,
        )
    for network in networks:
        try:
            prepared = prepare(network, samples, seed, simpler)
        except Exception as error:  # a broken file must not stop the others
            for target in targets:
                target.fail(network, error)
            continue
        for target in targets:
            target.add(network, prepared)
    for target in targets:
        target.write()


def summarize(targets: list[Target]) -> None:
    """A table: networks done and failed, instances, and how often the argmax stayed the same."""
    width = max((len(target.folder.name) for target in targets), default=6)
    print(
        f"\n{'folder':{width}}  {'done':>4}  {'failed':>6}  {'rows':>5}  same argmax: mean (least)"
    )
    for target in targets:
        same = (
            f"{np.mean(target.agreements):.1%} ({min(target.agreements):.1%})"
            if target.agreements
            else "-"
        )
        print(
            f"{target.folder.name:{width}}  {target.done:4}  {target.failed:6}  "
            f"{len(target.rows):5}  {same}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Quantize the float networks of VNN-COMP benchmarks."
    )
    parser.add_argument("source", type=Path, help="folder with one folder per benchmark")
    parser.add_argument("out", type=Path, help="where to write")
    parser.add_argument(
        "--only", nargs="+", metavar="BENCHMARK", help="these benchmarks (default: all)"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: both"
    )
    parser.add_argument(
        "--samples", type=int, default=200, help="calibration inputs, and as many to compare (200)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--simplify", action="store_true", help="first merge MatMul and Add into Gemm, and the like"
    )
    arguments = parser.parse_args()
    if not arguments.source.is_dir():
        parser.error(f"{arguments.source} is not a folder")
    if arguments.samples < 1:
        parser.error("--samples must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    logging.disable(logging.WARNING)  # the quantizer's advice, once per network
    warnings.simplefilter("ignore")
    ort.set_default_logger_severity(4)  # errors arrive as exceptions
    source, out = arguments.source.resolve(), arguments.out.resolve()
    names = arguments.only or sorted(path.name for path in source.iterdir() if path.is_dir())
    targets: list[Target] = []
    for name in names:
        here = [
            Target(out / f"{name}.{form}{'.pc' if per_channel else ''}", form, per_channel)
            for form in arguments.formats
            for per_channel in (False, True)
        ]
        convert(source / name, here, arguments.samples, arguments.seed, arguments.simplify)
        targets += here
    summarize(targets)


if __name__ == "__main__":
    main()
