"""Small networks with properties whose truth is known by running all codes in onnxruntime, and
their certificates."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import Options, Verdict, verify
from qverify.runtime import Session
from qverify.search import bab
from tests.graphs import Graph, write

Array = npt.NDArray[Any]
Rng = np.random.Generator
SCALE, ZERO = 0.125, 4  # of the input quantizers: code c stands for (c - ZERO) * SCALE
CODES = 5  # of every input, from ZERO on


@dataclass(frozen=True)
class Base:
    """A model; properties that no input violates, with their certificates (by splits; by cuts, if
    that was quick), and one that some input does violate, with its own; every code vector as inputs
    [N, inputs], and outputs [N, outputs]."""

    name: str
    model: Path
    proofs: list[tuple[Path, bytes]]
    unsafe: Path
    witness: bytes
    points: Array
    outputs: Array


@dataclass
class Taken:
    """A certificate taken apart."""

    header: Any
    arrays: dict[str, Array] = field(default_factory=dict)

    @staticmethod
    def apart(data: bytes) -> Taken:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            arrays = {name[:-4]: np.load(io.BytesIO(archive.read(name))) for name in names}
            return Taken(json.loads(archive.read("header.json")), arrays)

    def entries(self) -> dict[str, bytes]:
        """The files in the archive."""
        result = {"header.json": json.dumps(self.header).encode()}
        for name, array in self.arrays.items():
            own = io.BytesIO()
            np.save(own, array, allow_pickle=True)
            result[f"{name}.npy"] = own.getvalue()
        return result

    def joined(self) -> bytes:
        return packed(self.entries())


def packed(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# -- networks --------------------------------------------------------------------------------------


def codes(value: int) -> Array:
    return np.asarray(value, np.uint8)


def layer(g: Graph, rng: Rng, x: str, n: int, m: int, scale: float, zero: int = 128) -> str:
    """Codes of scale 0.05 (the input's: SCALE) to codes of scale 0.05 and zero point 128."""
    w, bias = (
        rng.integers(-128, 128, (n, m)).astype(np.int8),
        rng.integers(-300, 300, m).astype(np.int32),
    )
    weight = g.const(w), g.f32(0.01), g.const(np.int8(0)), g.const(bias)
    return g.node(
        "QGemm", x, g.f32(scale), g.const(codes(zero)), *weight, g.f32(0.05), g.const(codes(128))
    )


def plain(g: Graph, rng: Rng) -> list[str]:
    x = g.quantize(g.input((1, 3)), SCALE, codes(ZERO))
    y = layer(g, rng, layer(g, rng, x, 3, 4, SCALE, ZERO), 4, 2, 0.05)
    return [g.dequantize(y, 0.05, codes(128))]


def residual(g: Graph, rng: Rng) -> list[str]:
    a = layer(g, rng, g.quantize(g.input((1, 4)), SCALE, codes(ZERO)), 4, 3, SCALE, ZERO)
    ends = g.f32(0.05), g.const(codes(128))
    total = g.node(
        "QLinearAdd",
        a,
        *ends,
        layer(g, rng, a, 3, 3, 0.05),
        *ends,
        g.f32(0.07),
        g.const(codes(128)),
    )
    return [g.dequantize(layer(g, rng, total, 3, 2, 0.07), 0.05, codes(128))]


def pooled(g: Graph, rng: Rng) -> list[str]:
    x = g.quantize(g.input((1, 1, 2, 2)), SCALE, codes(ZERO))
    w, bias = (
        rng.integers(-128, 128, (2, 1, 2, 2)).astype(np.int8),
        rng.integers(-300, 300, 2).astype(np.int32),
    )
    ends = g.f32(0.01), g.const(np.int8(0)), g.f32(0.05), g.const(codes(128)), g.const(bias)
    y = g.node(
        "QLinearConv", x, g.f32(SCALE), g.const(codes(ZERO)), g.const(w), *ends, pads=[0, 0, 1, 1]
    )
    y = g.node("MaxPool", y, kernel_shape=[2, 2], strides=[1, 1])
    y = layer(g, rng, g.node("Reshape", y, g.const(np.array([1, 2]))), 2, 2, 0.05)
    return [g.dequantize(y, 0.05, codes(128))]


def curved(g: Graph, rng: Rng) -> list[str]:
    """A table, and a function of two codes."""
    a = layer(g, rng, g.quantize(g.input((1, 3)), SCALE, codes(ZERO)), 3, 3, SCALE, ZERO)
    ends = g.f32(0.05), g.const(codes(128))
    b = g.node("QLinearSigmoid", a, *ends, g.f32(1 / 256), g.const(codes(0)))
    c = g.node(
        "QLinearMul",
        a,
        *ends,
        b,
        g.f32(1 / 256),
        g.const(codes(0)),
        g.f32(0.03),
        g.const(codes(100)),
    )
    return [g.dequantize(layer(g, rng, c, 3, 2, 0.03, 100), 0.05, codes(128))]


def two_doors(g: Graph, rng: Rng) -> list[str]:
    """An input that is quantized twice, and integer outputs."""
    x = g.input((1, 2))
    a, b = g.quantize(x, SCALE, codes(ZERO)), g.quantize(x, 0.2, codes(9))
    return [layer(g, rng, a, 2, 2, SCALE, ZERO), layer(g, rng, b, 2, 2, 0.2, 9)]


NETWORKS: tuple[Callable[[Graph, Rng], list[str]], ...] = (
    plain,
    residual,
    pooled,
    curved,
    two_doors,
)


def make_bases(count: int, seed: int, folder: Path) -> list[Base]:
    """`count` bases, of all networks in turn."""
    found: list[Base] = []
    k = 0
    while len(found) < count:
        build, rng = NETWORKS[k % len(NETWORKS)], np.random.default_rng([seed, k])
        base = make_base(f"{build.__name__}_{k}", build, rng, folder)
        k += 1
        if base is not None:
            found.append(base)
    return found


def make_base(
    name: str, build: Callable[[Graph, Rng], list[str]], rng: Rng, folder: Path
) -> Base | None:
    """None where the outputs hardly vary."""
    g = Graph()
    model = write(g.model(*build(g, rng)), folder / f"{name}.onnx")
    size = int(np.prod(shape_of(model)))
    points = grid(build, size)
    outputs = run(model, points)
    gap = outputs[:, 0] - outputs[:, -1]
    levels = np.unique(gap.round(6))  # of float32, without their last bits
    if len(levels) < 4:
        return None
    most, unit = float(levels[-1]), float(np.diff(levels).min())
    proofs = []
    for splittable, steps in ((12, (0.25,)), (0, (0.25, 8, 40))):  # by splits, by cuts
        for step in steps:
            path = folder / f"{name}_{splittable}_{step}.vnnlib"
            path.write_text(specification(points, outputs.shape[1], most + step * unit))
            if (proof := proved(model, path, splittable)) is not None:
                proofs.append((path, proof))
                break
    if not proofs:
        return None
    unsafe = folder / f"{name}_unsafe.vnnlib"
    unsafe.write_text(specification(points, outputs.shape[1], most - unit / 4))
    result = verify(model, unsafe, Options(device="cpu", timeout=20, certificate=True))
    assert result.verdict is Verdict.SAT and result.certificate is not None, (name, result)
    return Base(name, model, proofs, unsafe, result.certificate, points, outputs)


def proved(model: Path, path: Path, splittable: int) -> bytes | None:
    """A certificate of unsat, by cuts where more than `splittable` inputs vary; None where that
    takes long."""
    old, bab.SPLITTABLE = bab.SPLITTABLE, splittable
    options = Options(
        device="cpu", timeout=20, attack=False, certificate=True, backward=splittable == 0
    )
    try:
        return verify(model, path, options).certificate
    finally:
        bab.SPLITTABLE = old


def grid(build: Callable[[Graph, Rng], list[str]], size: int) -> Array:
    """Inputs that meet every code vector of the box [0, CODES - 1] * SCALE: [N, size]."""
    codes_of_one = np.arange(CODES) * SCALE
    if build is two_doors:  # the steps of both quantizers, and values on both sides of them
        codes_of_one = np.linspace(0, (CODES - 1) * SCALE, 41)
    return np.array(list(product(codes_of_one.tolist(), repeat=size)), np.float32)


def run(model: Path, points: Array) -> Array:
    """The outputs [N, outputs] of onnxruntime for inputs [N, inputs]."""
    session = Session(model)
    shape = shape_of(model)
    rows = [session.run([point.astype(np.float32).reshape(shape)]) for point in points]
    return np.array(
        [np.concatenate([np.asarray(y, np.float64).reshape(-1) for y in row]) for row in rows]
    )


def shape_of(model: Path) -> tuple[int, ...]:
    """The shape of the model's first input."""
    import onnx

    dims = onnx.load(model, load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims)


def specification(points: Array, outputs: int, least: float) -> str:
    """Unsafe where the first output exceeds the last one by `least`."""
    size = points.shape[1]
    lines = [f"(declare-const X_{i} Real)" for i in range(size)] + [
        f"(declare-const Y_{i} Real)" for i in range(outputs)
    ]
    lines += [
        f"(assert (>= X_{i} 0.0))\n(assert (<= X_{i} {(CODES - 1) * SCALE}))" for i in range(size)
    ]
    return "\n".join([*lines, f"(assert (>= (- Y_0 Y_{outputs - 1}) {least!r}))"]) + "\n"
