"""Make a benchmark of ordinarily trained (not robustly trained) int8 networks on MNIST.

    python benchmarks/networks/ordinary_mnist.py DATA_DIR OUT_DIR [--networks mlp,cnn] [--eps
    1,2,3,4,5,6] [--images 100] [--seed 0]

DATA_DIR holds `mnist.npz` (`x_train` [60000, 784] uint8, `y_train`, `x_test` [10000, 784],
`y_test`). Two networks are trained with Adam and cross entropy on the plain images, nothing else:
`mlp` (784-128-128-128-10) and `cnn` (two 3x3 convolutions of 16 and 32 channels, each with 2x2 max
pooling, then 1152-100-10). onnxruntime quantizes them statically (QLinear operators, per tensor,
uint8 activations, int8 weights), calibrated on 500 training images. OUT_DIR receives, for NET = mlp
and cnn:

    float/NET.seed0.onnx           the float network; delete it to train again (that alone needs
    PyTorch) NET.onnx                       the int8 network: input [1, 784] or [1, 1, 28, 28],
    pixels / 255 vnnlib/NET_img7_eps2.vnnlib.gz image 7 of the test set, every pixel up to 2/255
    away and within [0, 1]; unsafe where
                                   another class scores at least as high as the label
    NET_instances.csv              rows `onnx,vnnlib,timeout`, ordered by eps, then image

The images are the first that the int8 network classifies correctly with no tie for the highest
score, since a tie counts as unsafe. Test accuracies go to standard error.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Weights = dict[str, Floats]

PIXEL_MAX = 255
CLASSES = 10
CALIBRATION_IMAGES = 500
BATCH = 128
LEARNING_RATE = 1e-3
TIMEOUT = 60  # seconds, in the instance list
OPSET = 13
IR_VERSION = 8


@dataclass(frozen=True)
class Layer:
    """One step of a network; `sizes` is (inputs, outputs) of a conv or a dense layer and empty
    otherwise."""

    kind: str  # conv, dense, relu, pool or flatten
    sizes: tuple[int, ...] = ()
    pad: int = 0  # of a conv, on every side


@dataclass(frozen=True)
class Architecture:
    input_shape: tuple[int, ...]
    epochs: int
    layers: tuple[Layer, ...]


KERNEL = 3  # of every convolution
NETWORKS = {
    "mlp": Architecture(
        (1, 784),
        10,
        (
            *(Layer("dense", (784, 128)), Layer("relu")),
            *(Layer("dense", (128, 128)), Layer("relu")),
            *(Layer("dense", (128, 128)), Layer("relu")),
            Layer("dense", (128, CLASSES)),
        ),
    ),
    "cnn": Architecture(
        (1, 1, 28, 28),
        5,
        (
            *(Layer("conv", (1, 16), pad=1), Layer("relu"), Layer("pool")),  # 28 -> 14
            *(Layer("conv", (16, 32)), Layer("relu"), Layer("pool")),  # 14 -> 12 -> 6
            *(Layer("flatten"), Layer("dense", (32 * 6 * 6, 100)), Layer("relu")),
            Layer("dense", (100, CLASSES)),
        ),
    ),
}


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Data:
    """MNIST as it is stored: images [n, 784] of bytes, labels [n]."""

    train: Bytes
    train_labels: npt.NDArray[np.int64]
    test: Bytes
    test_labels: npt.NDArray[np.int64]


def load_data(folder: Path) -> Data:
    with np.load(folder / "mnist.npz") as file:
        labels = (file[name].astype(np.int64) for name in ("y_train", "y_test"))
        return Data(file["x_train"], next(labels), file["x_test"], next(labels))


def scale(images: Bytes) -> Floats:
    return images.astype(np.float32) / np.float32(PIXEL_MAX)


# -- float networks --------------------------------------------------------------------------------


def train(architecture: Architecture, data: Data, seed: int) -> Weights:
    """Ordinary training: `w0`, `b0`, `w1`, ... of the layers that have weights, by the layer's
    place."""
    try:
        import torch
    except ImportError:
        sys.exit(
            "error: training needs PyTorch (pip install torch); without it, provide the float "
            "networks in OUT_DIR"
        )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)

    def module(layer: Layer) -> Any:
        match layer.kind:
            case "conv":
                return torch.nn.Conv2d(*layer.sizes, KERNEL, padding=layer.pad)
            case "dense":
                return torch.nn.Linear(*layer.sizes)
            case "pool":
                return torch.nn.MaxPool2d(2)
            case "flatten":
                return torch.nn.Flatten()
            case _:
                return torch.nn.ReLU()

    network = torch.nn.Sequential(*map(module, architecture.layers))
    images = torch.from_numpy(scale(data.train)).reshape(-1, *architecture.input_shape[1:])
    labels = torch.from_numpy(data.train_labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for epoch in range(architecture.epochs):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        seconds = time.perf_counter() - start
        report(
            f"  epoch {epoch + 1}/{architecture.epochs}: loss {total / len(images):.4f}, "
            f"{seconds:.0f} s"
        )
    return {
        name + str(place): value.detach().numpy()
        for place, layer in enumerate(network)
        if layer.state_dict()
        for name, value in (("w", layer.weight), ("b", layer.bias))
    }


def build_model(name: str, architecture: Architecture, weights: Weights) -> onnx.ModelProto:
    """The float network in ONNX, its input called `input` and its output `output`."""
    nodes, last = [], "input"
    for place, layer in enumerate(architecture.layers):
        output = "output" if place == len(architecture.layers) - 1 else f"{layer.kind}{place}"
        parameters = [f"w{place}", f"b{place}"]
        match layer.kind:
            case "conv":
                kernel, pads = [KERNEL] * 2, [layer.pad] * 4
                node = helper.make_node(
                    "Conv", [last, *parameters], [output], kernel_shape=kernel, pads=pads
                )
            case "dense":
                node = helper.make_node("Gemm", [last, *parameters], [output], transB=1)
            case "pool":
                node = helper.make_node(
                    "MaxPool", [last], [output], kernel_shape=[2, 2], strides=[2, 2]
                )
            case "flatten":
                node = helper.make_node("Flatten", [last], [output])
            case _:
                node = helper.make_node("Relu", [last], [output])
        node.name, last = output, output
        nodes.append(node)
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, architecture.input_shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, (1, CLASSES))],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def float_network(name: str, data: Data, out: Path, seed: int) -> Path:
    """The float network's file; trained unless it is there."""
    path = out / "float" / f"{name}.seed{seed}.onnx"
    if path.is_file():
        report(f"{name}: reusing {path}")
        return path
    report(f"{name}: training")
    model = build_model(name, NETWORKS[name], train(NETWORKS[name], data, seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    onnx.save(model, partial)
    os.replace(partial, path)  # an interrupted run leaves no half-written network to reuse
    return path


# -- int8 networks ---------------------------------------------------------------------------------


class Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Feeds calibration images one by one."""

    def __init__(self, images: Floats, shape: tuple[int, ...]) -> None:
        self.feeds: Iterator[dict[str, Floats]] = (
            {"input": image.reshape(shape)} for image in images
        )

    def get_next(self) -> dict[str, Floats] | None:
        return next(self.feeds, None)


def quantize(name: str, source: Path, data: Data, target: Path, seed: int) -> None:
    chosen = np.random.default_rng(seed).choice(len(data.train), CALIBRATION_IMAGES, replace=False)
    quantize_static(
        source, target, Samples(scale(data.train[np.sort(chosen)]), NETWORKS[name].input_shape),
        quant_format=QuantFormat.QOperator, per_channel=False,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def run_model(path: Path, images: Bytes) -> Floats:
    """Outputs [n, 10] of a network, one image at a time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    value = session.get_inputs()[0]
    return np.concatenate(
        [session.run(None, {value.name: row.reshape(value.shape)})[0] for row in scale(images)]
    )


def accuracy(outputs: Floats, labels: npt.NDArray[np.int64]) -> float:
    return float((outputs.argmax(1) == labels).mean())


# -- properties ------------------------------------------------------------------------------------


def choose_images(outputs: Floats, labels: npt.NDArray[np.int64], count: int) -> list[int]:
    """The first images whose label alone has the highest score."""
    rivals = outputs.copy()
    rivals[np.arange(len(labels)), labels] = -np.inf
    right = outputs[np.arange(len(labels)), labels] > rivals.max(1)
    return [int(image) for image in np.flatnonzero(right)[:count]]


def format_property(pixels: Bytes, label: int, eps: int, comment: str) -> str:
    """VNN-LIB 1.0: every pixel within eps of its value and in [0, 1], and another class at least as
    high."""
    center = pixels.astype(np.int64)
    lower, upper = (
        np.maximum(center - eps, 0) / PIXEL_MAX,
        np.minimum(center + eps, PIXEL_MAX) / PIXEL_MAX,
    )
    lines = [f"; {comment}"]
    lines += [f"(declare-const X_{i} Real)" for i in range(len(center))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(CLASSES)]
    for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (>= X_{i} {low:.12f}))", f"(assert (<= X_{i} {high:.12f}))"]
    rivals = [f"  (and (>= Y_{j} Y_{label}))" for j in range(CLASSES) if j != label]
    return "\n".join([*lines, "(assert (or", *rivals, "))", ""])


def write_properties(name: str, data: Data, images: list[int], radii: list[int], out: Path) -> None:
    folder = out / "vnnlib"
    folder.mkdir(exist_ok=True)
    rows = []
    for eps in radii:
        for image in images:
            label = int(data.test_labels[image])
            path = folder / f"{name}_img{image}_eps{eps}.vnnlib.gz"
            text = format_property(
                data.test[image], label, eps, f"MNIST test image {image}, label {label}, {eps}/255"
            )
            path.write_bytes(gzip.compress(text.encode(), mtime=0))  # the same bytes in every run
            rows.append((f"{name}.onnx", f"vnnlib/{path.name}", str(TIMEOUT)))
    with (out / f"{name}_instances.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    report(
        f"{name}: {len(rows)} properties of {len(images)} images, listed in "
        f"{out / f'{name}_instances.csv'}"
    )


# -- command ---------------------------------------------------------------------------------------


def make(name: str, data: Data, out: Path, arguments: argparse.Namespace) -> None:
    """Everything of one network."""
    start = time.perf_counter()
    source, target = float_network(name, data, out, arguments.seed), out / f"{name}.onnx"
    quantize(name, source, data, target, arguments.seed)
    outputs = run_model(target, data.test)
    exact = accuracy(run_model(source, data.test), data.test_labels)
    report(
        f"{name}: test accuracy float {exact:.2%}, int8 {accuracy(outputs, data.test_labels):.2%}"
    )
    images = choose_images(outputs, data.test_labels, arguments.images)
    write_properties(name, data, images, arguments.eps, out)
    report(f"{name}: done in {time.perf_counter() - start:.0f} s")


def parse_networks(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NETWORKS]:
        raise argparse.ArgumentTypeError(
            f"no network {', '.join(unknown)}; there are {', '.join(NETWORKS)}"
        )
    return list(dict.fromkeys(names))


def parse_radii(text: str) -> list[int]:
    try:
        radii = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None
    if radii[0] < 0 or radii[-1] > PIXEL_MAX:
        raise argparse.ArgumentTypeError(f"a radius must be from 0 to {PIXEL_MAX}")
    return radii


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a benchmark of ordinarily trained int8 networks on MNIST."
    )
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with mnist.npz")
    parser.add_argument(
        "out", type=Path, metavar="OUT_DIR", help="where to write, outside the repository"
    )
    parser.add_argument(
        "--networks", type=parse_networks, default=list(NETWORKS), help="default: mlp,cnn"
    )
    parser.add_argument(
        "--eps", type=parse_radii, default=[1, 2, 3, 4, 5, 6], help="of 255 (default: 1,2,3,4,5,6)"
    )
    parser.add_argument("--images", type=int, default=100, help="test images per network (100)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.data / "mnist.npz").is_file():
        parser.error(f"{arguments.data} has no mnist.npz")
    if arguments.images < 1:
        parser.error("--images must be at least 1")
    if arguments.seed < 0:
        parser.error("--seed must not be negative")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    logging.disable(logging.WARNING)  # the quantizer's advice, once per network
    warnings.simplefilter("ignore")
    ort.set_default_logger_severity(4)  # errors arrive as exceptions
    data = load_data(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.networks:
        make(name, data, arguments.out, arguments)


if __name__ == "__main__":
    main()
