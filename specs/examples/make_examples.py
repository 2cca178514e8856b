"""Make the example networks and specifications of this folder: train, export, quantize, attack,
write.

    pip install torch onnx onnxruntime numpy
    python make_examples.py --data mnist.npz [--out DIR]

`mnist.npz` holds `x_train`, `x_test` (uint8, 784 pixels a row) and `y_train`, `y_test`. Everything
is seeded and runs on one thread, so one machine writes the same bytes each time; another CPU or
library version may train weights that differ in the last bits. What each file is for stands in
README.md.

Only verdicts with a witness are written to expected.csv: `sat` when an input inside the box was run
through the very file in onnxruntime and was misclassified, and for the tiny network both verdicts,
because all its inputs are run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]

RADII = (1, 2, 4, 8)  # of the L-infinity balls, in 1/255
TIMEOUT = 60  # seconds, for instances.csv
POOL = 400  # the first test images, among which those of the specifications are chosen
CALIBRATION = 500  # training images
FORMS = {"qop": QuantFormat.QOperator, "qdq": QuantFormat.QDQ}


# --- networks
# --------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Flatten as a Reshape, which the quantizer leaves on codes; around a Flatten it dequantizes
    and quantizes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


@dataclass(frozen=True)
class Recipe:
    """One network and how it is quantized."""

    name: str
    net: nn.Sequential
    shape: tuple[int, ...]  # of the graph input
    per_channel: bool
    # 7-bit weights: then u8 x s8 kernels without VNNI cannot saturate, and every x86 CPU computes
    # the same codes.
    reduce_range: bool


def mnist_mlp() -> Recipe:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(784, 32), nn.ReLU(),
        nn.Linear(32, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip
    return Recipe("mnist_mlp", net, (1, 784), per_channel=True, reduce_range=False)


def mnist_cnn() -> Recipe:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 4, stride=2, padding=1), nn.ReLU(), Rows(),
        nn.Linear(8 * 7 * 7, 32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip
    return Recipe("mnist_cnn", net, (1, 1, 28, 28), per_channel=False, reduce_range=True)


def tiny_mlp() -> Recipe:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    return Recipe("tiny_mlp", net, (1, 2), per_channel=False, reduce_range=True)


# --- training
# --------------------------------------------------------------------------------------------------


def affine_radius(layer: nn.Module, radius: Tensor) -> Tensor:
    """How far an affine layer's output can move when its input moves by at most `radius`."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(radius, layer.weight.abs())
    assert isinstance(layer, nn.Conv2d)
    return nn.functional.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)


def intervals(net: nn.Sequential, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Interval bounds of the float network's outputs."""
    for layer in net:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            centre, radius = layer((low + high) / 2), affine_radius(layer, (high - low) / 2)
            low, high = centre - radius, centre + radius
        else:  # monotone
            low, high = layer(low), layer(high)
    return low, high


def worst_logits(net: nn.Sequential, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """The true class at its lower bound, every other at its upper: the argmax is y only if
    intervals prove it."""
    low, high = intervals(net, (x - radius).clamp(0, 1), (x + radius).clamp(0, 1))
    return torch.where(nn.functional.one_hot(y, low.shape[1]).bool(), low, high)


def train_robust(net: nn.Sequential, x: Tensor, y: Tensor, *, epochs: int, radius: float) -> None:
    """Interval-bound training (Gowal et al. 2018): half the loss on the worst logits, the radius
    ramped up."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    batches = len(x) // 128
    total = epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=total, pct_start=0.15
    )
    for step in range(total):
        if step % batches == 0:
            order = torch.randperm(len(x))
        rows = order[step % batches * 128 : (step % batches + 1) * 128]
        share = min(1.0, step / (0.6 * total))
        worst = worst_logits(net, x[rows], y[rows], radius * share)
        natural = nn.functional.cross_entropy(net(x[rows]), y[rows])
        loss = (1 - share / 2) * natural + share / 2 * nn.functional.cross_entropy(worst, y[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()


def train_plain(net: nn.Sequential, x: Tensor, y: Tensor, *, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def disc(count: int) -> tuple[Floats, Codes]:
    """Points of the unit square; class 1 is a disc in its middle."""
    points = np.random.default_rng(4).uniform(0, 1, (count, 2)).astype(np.float32)
    return points, (np.hypot(*(points - 0.5).T) < 0.35).astype(np.int64)


# --- ONNX
# --------------------------------------------------------------------------------------------------


def export(recipe: Recipe) -> onnx.ModelProto:
    """The float network as ONNX opset 13 with batch size 1."""
    recipe.net.eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The TorchScript exporter is deprecated, but needs no package beside torch.
        warnings.simplefilter("ignore")
        path = Path(folder) / "float.onnx"
        torch.onnx.export(
            recipe.net, (torch.zeros(recipe.shape),), path,
            dynamo=False, opset_version=13, input_names=["input"], output_names=["logits"],
        )  # fmt: skip
        return onnx.load(path)


class Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Feeds calibration inputs one by one."""

    def __init__(self, inputs: Floats, shape: tuple[int, ...]) -> None:
        self.feeds: Iterator[dict[str, Floats]] = iter(
            {"input": row.reshape(shape)} for row in inputs
        )

    def get_next(self) -> dict[str, Floats] | None:
        return next(self.feeds, None)


def strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what a file does not need to run; exporters and tools may leave local paths there."""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    return model


def quantize(recipe: Recipe, form: str, inputs: Floats, path: Path) -> None:
    """Write the network with uint8 activations and int8 weights."""
    quantize_static(
        export(recipe), path, Samples(inputs, recipe.shape),
        quant_format=FORMS[form], per_channel=recipe.per_channel, reduce_range=recipe.reduce_range,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    model = strip(onnx.load(path))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


class Runtime:
    """A quantized file in onnxruntime at its default settings, one thread."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.shape = tuple(self.session.get_inputs()[0].shape)

    def __call__(self, inputs: Floats) -> Floats:
        """Logits [n, classes] of inputs [n, ...]; the file has batch size 1."""
        runs = [self.session.run(None, {"input": row.reshape(self.shape)})[0][0] for row in inputs]
        return np.stack(runs)


def input_is_codes(path: Path) -> bool:
    """Whether the first quantizer maps k/255 to the code k, so that a box of codes and a float box
    are the same."""
    graph = onnx.load(path).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    first = next(node for node in graph.node if "input" in node.input)
    scale, zero = (values[name] for name in first.input[1:3])
    return (
        first.op_type == "QuantizeLinear"
        and float(scale) == float(np.float32(1 / 255))
        and int(zero) == 0
    )


# --- specifications
# -------------------------------------------------------------------------------------------------


def decimal(code: int) -> str:
    """code/255 to 12 places: far closer than a float32, and a point is always there, as VNN-LIB 2.0
    asks."""
    text = f"{code / 255:.12f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


@dataclass(frozen=True)
class Spec:
    """A box of codes around which the label must win strictly; `unsafe` is any other class that
    ties or wins."""

    name: str
    low: Codes
    high: Codes
    label: int
    classes: int
    comment: str

    def floats(self, codes: Codes) -> Floats:
        """codes/255 as float32 values that lie in the decimal box exactly (rounding could step over
        its border)."""
        low = np.array([float32_at_least(Fraction(decimal(k))) for k in range(256)], np.float32)
        high = np.array([-float32_at_least(-Fraction(decimal(k))) for k in range(256)], np.float32)
        return (codes / 255).astype(np.float32).clip(low[self.low], high[self.high])


def float32_at_least(value: Fraction) -> np.float32:
    """The least float32 that is not below `value`."""
    near = np.float32(float(value))
    return near if Fraction(float(near)) >= value else np.nextafter(near, np.float32(np.inf))


def vnnlib1(spec: Spec) -> str:
    """VNN-LIB 1.0: flat reals, the assertions describe the unsafe inputs and outputs."""
    others = [j for j in range(spec.classes) if j != spec.label]
    lines = [f"; {spec.comment}"]
    lines += [f"(declare-const X_{i} Real)" for i in range(len(spec.low))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(spec.classes)]
    for i, (low, high) in enumerate(zip(spec.low, spec.high, strict=True)):
        lines += [f"(assert (>= X_{i} {decimal(low)}))", f"(assert (<= X_{i} {decimal(high)}))"]
    cases = "\n".join(f"  (and (>= Y_{j} Y_{spec.label}))" for j in others)
    return "\n".join([*lines, f"(assert (or\n{cases}\n))", ""])


def vnnlib2(spec: Spec) -> str:
    """The same property as VNN-LIB 2.0, for an input [1, n] and an output [1, classes]."""
    others = [j for j in range(spec.classes) if j != spec.label]
    wins = [f"(>= Y[0,{j}] Y[0,{spec.label}])" for j in others]
    lines = [
        "(vnnlib-version <2.0>)",
        f"; {spec.comment}",
        "(declare-network f",
        f"  (declare-input X float32 [1,{len(spec.low)}])",
        f"  (declare-output Y float32 [1,{spec.classes}])",
        ")",
    ]
    for i, (low, high) in enumerate(zip(spec.low, spec.high, strict=True)):
        lines += [
            f"(assert (>= X[0,{i}] {decimal(low)}))",
            f"(assert (<= X[0,{i}] {decimal(high)}))",
        ]
    unsafe = wins[0] if len(wins) == 1 else "(or\n  " + "\n  ".join(wins) + "\n)"
    return "\n".join([*lines, f"(assert {unsafe})", ""])


def write_spec(path: Path, text: str) -> None:
    """Plain, or gzip without a time stamp or file name when the path says so."""
    data = text.encode("ascii")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


# --- MNIST
# --------------------------------------------------------------------------------------------------


def attack(
    net: nn.Sequential, shape: tuple[int, ...], pixels: Codes, y: Codes, radius: int
) -> Iterator[Codes]:
    """Sign-gradient ascent on the float network; yields pixels [images, 784] in the integer ball,
    per restart."""
    generator = torch.Generator().manual_seed(radius)
    x, labels = torch.tensor(pixels / 255, dtype=torch.float32), torch.tensor(y)
    truth = nn.functional.one_hot(labels, 10).bool()
    for _ in range(8):
        moved = x + (torch.rand(x.shape, generator=generator) * 2 - 1) * radius / 255
        for _ in range(25):
            moved = moved.clamp(0, 1).requires_grad_()
            logits = net(moved.reshape(-1, *shape[1:]))
            margin = logits.masked_fill(truth, -1e9).amax(1) - logits[truth]
            (gradient,) = torch.autograd.grad(margin.sum(), moved)
            step = moved.detach() + 0.3 * radius / 255 * gradient.sign()
            moved = torch.minimum(torch.maximum(step, x - radius / 255), x + radius / 255)
        codes = np.rint(moved.clamp(0, 1).numpy().astype(np.float64) * 255).astype(np.int64)
        yield codes.clip((pixels - radius).clip(0), (pixels + radius).clip(max=255))


def is_unsafe(logits: Floats, y: Codes) -> npt.NDArray[np.bool_]:
    """Per row: some other class ties with the label or beats it."""
    own = np.take_along_axis(logits, y[:, None], 1)
    return np.asarray((logits >= own).sum(1) > 1)


def ball(index: int, pixels: Codes, label: int, radius: int) -> Spec:
    return Spec(
        name=f"mnist_{index}_eps_{radius}",
        low=(pixels - radius).clip(0),
        high=(pixels + radius).clip(max=255),
        label=label,
        classes=10,
        comment=f"MNIST test image {index}, a {label}, pixels free by {radius}/255 in [0, 1]; "
        f"unsafe: not a {label}",
    )


@dataclass
class Findings:
    """What was found about the first POOL test images, per network name and per radius, [POOL]
    each."""

    right: npt.NDArray[np.bool_]  # classified right by every file
    # By intervals on the float network: only a hint.
    proved: dict[tuple[str, int], npt.NDArray[np.bool_]]
    # By an input replayed in every file of the network.
    broken: dict[tuple[str, int], npt.NDArray[np.bool_]]


def explore(
    recipes: Sequence[Recipe], files: dict[str, list[Runtime]], pixels: Codes, y: Codes
) -> Findings:
    """Bound and attack the images at every radius."""
    found = Findings(np.ones(len(y), bool), {}, {})
    x = torch.tensor(pixels / 255, dtype=torch.float32)
    for recipe in recipes:
        for run in files[recipe.name]:
            found.right &= ~is_unsafe(run((pixels / 255).astype(np.float32)), y)
        for radius in RADII:
            with torch.no_grad():
                worst = worst_logits(
                    recipe.net, x.reshape(-1, *recipe.shape[1:]), torch.tensor(y), radius / 255
                )
            found.proved[recipe.name, radius] = worst.argmax(1).numpy() == y
            found.broken[recipe.name, radius] = broken(
                recipe, files[recipe.name], pixels, y, radius
            )
    return found


def broken(
    recipe: Recipe, runs: list[Runtime], pixels: Codes, y: Codes, radius: int
) -> npt.NDArray[np.bool_]:
    """Which images have a counterexample that every file of the network confirms; inputs exactly
    inside the box."""
    found = np.zeros(len(y), bool)
    specs = [ball(i, pixels[i], int(y[i]), radius) for i in range(len(y))]
    for codes in attack(recipe.net, recipe.shape, pixels, y, radius):
        todo = np.flatnonzero(~found)
        inputs = np.stack([specs[i].floats(codes[i]) for i in todo])
        hit = np.ones(len(todo), bool)
        for run in runs:
            hit &= is_unsafe(run(inputs), y[todo])
        found[todo[hit]] = True
    return found


def choose(found: Findings, names: Sequence[str]) -> list[int]:
    """Image numbers: one that looks safe, some that are open, break late (at 8/255), early, or at
    once."""

    def proved(radius: int) -> npt.NDArray[np.bool_]:
        return np.asarray(np.array([found.proved[name, radius] for name in names]).all(0))

    def attacked(radius: int) -> npt.NDArray[np.bool_]:
        return np.asarray(np.array([found.broken[name, radius] for name in names]).any(0))

    kinds = (
        (proved(8), 1),
        (proved(2) & ~proved(8) & ~attacked(8), 2),
        (proved(1) & attacked(8) & ~attacked(4), 1),
        (attacked(4) & ~attacked(1), 1),
        (attacked(1), 1),
    )
    return sorted(
        {int(i) for kind, count in kinds for i in np.flatnonzero(found.right & kind)[:count]}
    )


def accuracy(run: Runtime, pixels: Codes, y: Codes) -> float:
    return float((run((pixels / 255).astype(np.float32)).argmax(1) == y).mean())


# --- the tiny network
# -----------------------------------------------------------------------------------------------


def grid(low: Codes, high: Codes) -> Codes:
    """All code pairs of a box, [n, 2]."""
    axes = [np.arange(first, last + 1) for first, last in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


def largest_square(safe: npt.NDArray[np.bool_]) -> tuple[Codes, Codes]:
    """The largest square of codes that is safe throughout, by the classical recurrence on its lower
    right corner."""
    side = np.zeros((safe.shape[0] + 1, safe.shape[1] + 1), np.int64)
    for i, j in np.argwhere(safe):
        side[i + 1, j + 1] = 1 + min(side[i, j], side[i, j + 1], side[i + 1, j])
    corner = np.array(np.unravel_index(side.argmax(), side.shape))
    return corner - side.max(), corner - 1


def tiny_specs(runs: list[Runtime]) -> dict[str, tuple[Spec, str]]:
    """A largest safe square (unsat) and the same square some codes wider (sat), both settled by
    running every code."""
    everything = grid(np.array([0, 0]), np.array([255, 255]))
    inputs = (everything / 255).astype(np.float32)
    label = np.ones(len(inputs), np.int64)
    unsafe = np.logical_or.reduce([is_unsafe(run(inputs), label) for run in runs]).reshape(256, 256)
    surely = np.logical_and.reduce([is_unsafe(run(inputs), label) for run in runs]).reshape(
        256, 256
    )
    low, high = largest_square(~unsafe)
    wide_low, wide_high = low, high
    while not surely[wide_low[0] : wide_high[0] + 1, wide_low[1] : wide_high[1] + 1].any():
        wide_low, wide_high = (wide_low - 1).clip(0), (wide_high + 1).clip(max=255)
    safe = Spec(
        "tiny_safe",
        low,
        high,
        1,
        2,
        "a largest square on which class 1 wins; unsafe: class 0 ties or wins",
    )
    wide = Spec(
        "tiny_unsafe",
        wide_low,
        wide_high,
        1,
        2,
        "that square, a little wider, so that its corner leaves class 1",
    )
    return {safe.name: (safe, "unsat"), wide.name: (wide, "sat")}


# --- everything together
# --------------------------------------------------------------------------------------------


def build(recipe: Recipe, calibration: Floats, out: Path) -> list[Runtime]:
    """Quantize into every form and open the files."""
    runs = []
    for form in FORMS:
        path = out / "onnx" / f"{recipe.name}_{form}.onnx"
        quantize(recipe, form, calibration, path)
        if not input_is_codes(path):
            raise SystemExit(
                f"{path.name}: the input scale is not 1/255 with zero point 0; check the "
                "calibration data"
            )
        runs.append(Runtime(path))
    return runs


Row = tuple[str, str, str]  # onnx, vnnlib, verdict or ""


def make_tiny(out: Path) -> list[Row]:
    recipe = tiny_mlp()
    x, y = disc(2000)
    train_plain(recipe.net, torch.tensor(x), torch.tensor(y), steps=2000)
    # So that the input range is [0, 1].
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    runs = build(recipe, np.concatenate([x[:CALIBRATION], corners]), out)
    rows = []
    for spec, verdict in tiny_specs(runs).values():
        write_spec(out / "vnnlib" / f"{spec.name}.vnnlib", vnnlib1(spec))
        write_spec(out / "vnnlib" / f"{spec.name}_v2.vnnlib", vnnlib2(spec))
        names = (f"{spec.name}.vnnlib", f"{spec.name}_v2.vnnlib")
        rows += [
            (f"onnx/{recipe.name}_{form}.onnx", f"vnnlib/{name}", verdict)
            for name in names
            for form in FORMS
        ]
        print(f"{spec.name}: codes {spec.low.tolist()} .. {spec.high.tolist()}, {verdict}")
    share = np.mean([(run(x).argmax(1) == y).mean() for run in runs])
    print(f"tiny_mlp: {share:.2%} of its training points")
    return rows


def make_mnist(data: Path, out: Path) -> list[Row]:
    with np.load(data) as file:
        pixels = {part: file[f"x_{part}"].astype(np.int64) for part in ("train", "test")}
        y = {part: file[f"y_{part}"].astype(np.int64) for part in ("train", "test")}
    recipes = [mnist_mlp(), mnist_cnn()]
    files: dict[str, list[Runtime]] = {}
    for recipe, epochs in zip(recipes, (20, 8), strict=True):
        x = torch.tensor(pixels["train"] / 255, dtype=torch.float32).reshape(-1, *recipe.shape[1:])
        train_robust(recipe.net, x, torch.tensor(y["train"]), epochs=epochs, radius=3 / 255)
        files[recipe.name] = build(recipe, x[:CALIBRATION].numpy(), out)
        for form, run in zip(FORMS, files[recipe.name], strict=True):
            print(
                f"{recipe.name}_{form}: test accuracy "
                f"{accuracy(run, pixels['test'], y['test']):.2%}",
                flush=True,
            )
    pool, labels = pixels["test"][:POOL], y["test"][:POOL]
    found = explore(recipes, files, pool, labels)
    report(found)
    return write_mnist_specs(found, recipes, pool, labels, out)


def report(found: Findings) -> None:
    print(f"first {POOL} test images: {found.right.sum()} right in every file")
    for (name, radius), proved in found.proved.items():
        broken = found.broken[name, radius]
        print(
            f"{name} radius {radius}/255: {proved.sum()} proved by float intervals, "
            f"{broken.sum()} broken"
        )


def write_mnist_specs(
    found: Findings, recipes: Sequence[Recipe], pool: Codes, y: Codes, out: Path
) -> list[Row]:
    rows = []
    images = choose(found, [recipe.name for recipe in recipes])
    for index in images:
        for radius in RADII:
            spec = ball(index, pool[index], int(y[index]), radius)
            write_spec(out / "vnnlib" / f"{spec.name}.vnnlib.gz", vnnlib1(spec))
            for recipe in recipes:
                verdict = "sat" if found.broken[recipe.name, radius][index] else ""
                models = [f"onnx/{recipe.name}_{form}.onnx" for form in FORMS]
                rows += [(model, f"vnnlib/{spec.name}.vnnlib.gz", verdict) for model in models]
    spec = ball(images[0], pool[images[0]], int(y[images[0]]), 1)
    write_spec(out / "vnnlib" / f"{spec.name}_v2.vnnlib.gz", vnnlib2(spec))
    verdict = "sat" if found.broken["mnist_mlp", 1][images[0]] else ""
    return [
        *rows,
        *(
            (f"onnx/mnist_mlp_{form}.onnx", f"vnnlib/{spec.name}_v2.vnnlib.gz", verdict)
            for form in FORMS
        ),
    ]


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train, quantize and specify the example networks of this folder."
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="mnist.npz with x_train, y_train, x_test, y_test"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="where to write (default: here)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # The quantizer's advice about pre-processing does not concern these networks.
    logging.disable(logging.WARNING)
    for folder in ("onnx", "vnnlib"):
        (arguments.out / folder).mkdir(parents=True, exist_ok=True)
    rows = make_tiny(arguments.out) + make_mnist(arguments.data, arguments.out)
    write_csv(arguments.out / "instances.csv", [(model, spec, TIMEOUT) for model, spec, _ in rows])
    write_csv(arguments.out / "expected.csv", rows)


if __name__ == "__main__":
    main()
