"""The same network has the same numbers, whatever order and names its graph's nodes and quantizers
have."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest

from qverify import Options, Verdict, verify
from qverify.checker import Rejected, check
from qverify.frontend.lower import Lowered
from qverify.frontend.model import read_model
from qverify.kernels import open_kernels
from tests.graphs import Array, Graph, write

CPU = open_kernels("cpu")


def codes(value: int) -> Array:
    return np.asarray(value, np.uint8)


def two_branches() -> onnx.ModelProto:
    """Two inputs, the first of them quantized in three ways, of which two are the same; two
    outputs."""
    g, rng = Graph(), np.random.default_rng(4)
    x, z = g.input((1, 3)), g.input((1, 2))
    doors = [g.quantize(z, 0.2, codes(7)), g.quantize(x, 0.1, codes(3))]
    doors += [g.quantize(x, 0.25, codes(3)), g.quantize(x, 0.1, codes(3))]

    def layer(k: int, scale: float, zero: int, width: int) -> str:
        w = g.const(rng.integers(-128, 128, (width, 2)).astype(np.int8))
        weight = (
            w,
            g.f32(0.01),
            g.const(np.int8(0)),
            g.const(rng.integers(-99, 99, 2).astype(np.int32)),
        )
        return g.node(
            "QGemm",
            doors[k],
            g.f32(scale),
            g.const(codes(zero)),
            *weight,
            g.f32(0.05),
            g.const(codes(100)),
        )

    layers = [layer(*k) for k in ((0, 0.2, 7, 2), (1, 0.1, 3, 3), (2, 0.25, 3, 3), (3, 0.1, 3, 3))]
    ends = g.f32(0.05), g.const(codes(100))
    sums = [
        g.node("QLinearAdd", layers[a], *ends, layers[b], *ends, g.f32(0.06), g.const(codes(90)))
        for a, b in ((0, 1), (2, 3))
    ]
    return g.model(*(g.dequantize(s, 0.06, codes(90)) for s in sums))


def shuffled(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same graph: its nodes in another topological order, everything inside it with other
    names."""
    rng, result = random.Random(seed), onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    kept = {v.name for v in (*graph.input, *graph.output)}
    inner = sorted({name for node in graph.node for name in node.output} - kept)
    names = dict(zip(inner, (f"v{k}" for k in rng.sample(range(1000), len(inner))), strict=True))
    left, nodes = list(graph.node), []
    known = {
        "",
        *kept.difference(v.name for v in graph.output),
        *(i.name for i in graph.initializer),
    }
    while left:
        ready = [node for node in left if known.issuperset(node.input)]
        node = rng.choice(ready)
        left.remove(node)
        known.update(node.output)
        nodes.append(node)
    for k, node in enumerate(nodes):
        node.name = f"{rng.random()}_{k}"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def same(a: Lowered, b: Lowered) -> bool:
    return a.digest() == b.digest()


def test_order_and_names_do_not_matter(tmp_path: Path) -> None:
    model = two_branches()
    first = read_model(write(model, tmp_path / "m.onnx")).lowered
    # Equal ones once.
    assert [part.source.tolist() for part in first.encoders] == [
        [0, 1, 2],
        [0, 1, 2],
        [3, 4],
    ]
    for seed in range(8):
        again = read_model(write(shuffled(model, seed), tmp_path / f"{seed}.onnx")).lowered
        assert same(first, again)
        x = np.random.default_rng(seed).integers(0, 256, (20, 8)).astype(np.int32)
        assert (first.network.run(CPU, x) == again.network.run(CPU, x)).all()


def test_a_constant_matters(tmp_path: Path) -> None:
    model = two_branches()
    first = read_model(write(model, tmp_path / "m.onnx")).lowered
    for k, tensor in enumerate(model.graph.initializer):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[0] += 1
        other.graph.initializer[k].CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        assert not same(first, read_model(write(other, tmp_path / "other.onnx")).lowered)


SPEC = "\n".join(
    [f"(declare-const X_{i} Real)(assert (>= X_{i} 0.1))(assert (<= X_{i} 0.6))" for i in range(5)]
    + [f"(declare-const Y_{i} Real)" for i in range(4)]
)


def test_a_certificate_holds_where_the_same_network_is_read_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it is another network, the reason says so."""
    from qverify import runtime

    model = two_branches()
    path = write(model, tmp_path / "m.onnx")
    spec = tmp_path / "p.vnnlib"
    spec.write_text(SPEC + "(assert (>= (- Y_0 Y_2) 3.0))")
    result = verify(path, spec, Options(device="cpu", timeout=20, certificate=True))
    assert result.verdict is Verdict.UNSAT and result.certificate is not None
    proof = tmp_path / "proof"
    proof.write_bytes(result.certificate)
    for seed in range(4):
        monkeypatch.setattr(
            runtime, "optimised_graph", lambda path, shapes, seed=seed: shuffled(model, seed)
        )
        assert check(path, spec, proof).verdict == "unsat"
    other = onnx.ModelProto()
    other.CopyFrom(model)
    bias = next(t for t in other.graph.initializer if t.data_type == onnx.TensorProto.INT32)
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([30_000, 0], np.int32), bias.name))
    monkeypatch.setattr(runtime, "optimised_graph", lambda path, shapes: other)
    with pytest.raises(Rejected, match="another reading of the model"):
        check(path, spec, proof)


def test_the_digest_of_shipped_models_stays() -> None:
    """Certificates that exist hold it: renaming or reordering what is hashed would reject them."""
    known = {
        "tiny_mlp_qop": "7bff8fc015723af6",
        "mnist_mlp_qdq": "dd97f6e8270b1e46",
        "mnist_cnn_qop": "fa9a6a39bad8ee83",
    }
    folder = Path(__file__).parents[2] / "specs" / "examples" / "onnx"
    found = {name: read_model(folder / f"{name}.onnx").lowered.digest() for name in known}
    assert {name: text[:16] for name, text in found.items()} == known
