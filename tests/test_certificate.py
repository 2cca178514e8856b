"""Certificates: genuine ones are accepted, and whatever is wrong with one is found.

The strictest test is the forged certificate: a proof of one property, made over into one of a
property that is violated (the counterexample is known). No change of it whatsoever may be accepted.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qverify import Options, Verdict, verify
from qverify.bounds.unsafe_regions import UnsafeRegions
from qverify.checker import Rejected, check
from qverify.checker.archive import Archive
from qverify.checker.proof import Proof
from qverify.checker.tree import Tree
from qverify.cli import main
from qverify.errors import CertificateError
from qverify.frontend.model import read_model
from qverify.kernels import open_kernels
from qverify.search import bab
from qverify.vnnlib.reader import read_property
from tests.graphs import Graph, write

EXAMPLES = Path(__file__).parents[1] / "specs" / "examples"
ONNX, VNNLIB = EXAMPLES / "onnx", EXAMPLES / "vnnlib"
CPU = open_kernels("cpu")
CUT, CLOSED, REGIONS, DUAL = range(4)
TREE = ("kind", "first", "value", "element", "threshold", "data")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Certificate:
    """A certificate taken apart, and what it is about."""

    model: Path
    spec: Path
    header: dict[str, Any]
    arrays: dict[str, Array] = field(default_factory=dict)

    @staticmethod
    def read(model: Path, spec: Path, data: bytes) -> Certificate:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            header = json.loads(archive.read("header.json"))
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return Certificate(
                model, spec, header, {n[:-4]: np.load(io.BytesIO(archive.read(n))) for n in names}
            )

    def data(self) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("header.json", json.dumps(self.header))
            for name, array in self.arrays.items():
                certificate = io.BytesIO()
                np.save(certificate, array)
                archive.writestr(f"{name}.npy", certificate.getvalue())
        return buffer.getvalue()

    def copy(self) -> Certificate:
        header = json.loads(json.dumps(self.header))
        return replace(self, header=header, arrays={n: a.copy() for n, a in self.arrays.items()})

    def about(self, model: Path, spec: Path) -> Certificate:
        """The same proof, said to be about other files."""
        certificate = replace(self.copy(), model=model, spec=spec)
        for key, path in (("model_sha256", model), ("spec_sha256", spec)):
            certificate.header[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return certificate

    def __getitem__(self, name: str) -> Array:
        return self.arrays[f"q0.{name}"]

    def __setitem__(self, name: str, array: Array) -> None:
        self.arrays[f"q0.{name}"] = array

    def entries(self, kind: int) -> list[int]:
        found: list[int] = np.flatnonzero(self["kind"] == kind).tolist()
        return found

    def check(self, folder: Path) -> Any:
        path = folder / "certificate.zip"
        path.write_bytes(self.data())
        return check(self.model, self.spec, path)

    def accepted(self, folder: Path) -> bool:
        try:
            self.check(folder)
        except Rejected:
            return False
        return True


# -- networks and their certificates ---------------------------------------------------------------


def codes(value: int) -> Array:
    return np.asarray(value, np.uint8)


def layer(
    g: Graph, rng: np.random.Generator, x: str, n: int, m: int, zero: int, scale: float
) -> str:
    w, bias = (
        rng.integers(-128, 128, (n, m)).astype(np.int8),
        rng.integers(-2000, 2000, m).astype(np.int32),
    )
    ends = g.f32(0.01), g.const(np.int8(0)), g.const(bias), g.f32(scale), g.const(codes(128))
    return g.node("QGemm", x, g.f32(0.05), g.const(codes(zero)), g.const(w), *ends)


def residual() -> tuple[Graph, str]:
    """Six inputs, and a sum of two quantized layers."""
    rng, g = np.random.default_rng(1), Graph()
    a = layer(g, rng, g.quantize(g.input((1, 6)), 0.05, codes(128)), 6, 6, 128, 0.05)
    b = layer(g, rng, a, 6, 6, 128, 0.05)
    ends = g.f32(0.05), g.const(codes(128))
    total = g.node("QLinearAdd", a, *ends, b, *ends, g.f32(0.07), g.const(codes(128)))
    return g, g.dequantize(layer(g, rng, total, 6, 2, 128, 0.06), 0.06, codes(128))


def pooled() -> tuple[Graph, str]:
    """A padded convolution of 4x4 pixels, max pooling, and a layer."""
    rng, g = np.random.default_rng(0), Graph()
    x = g.quantize(g.input((1, 1, 4, 4)), 0.05, codes(128))
    w, bias = (
        rng.integers(-128, 128, (2, 1, 3, 3)).astype(np.int8),
        rng.integers(-2000, 2000, 2).astype(np.int32),
    )
    ends = g.f32(0.01), g.const(np.int8(0)), g.f32(0.05), g.const(codes(100)), g.const(bias)
    y = g.node(
        "QLinearConv", x, g.f32(0.05), g.const(codes(128)), g.const(w), *ends, pads=[1, 1, 1, 1]
    )
    y = g.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = layer(g, rng, g.node("Reshape", y, g.const(np.array([1, 8]))), 8, 2, 100, 0.06)
    return g, g.dequantize(y, 0.06, codes(128))


def difference(inputs: int, radius: float, least: float) -> str:
    """Unsafe where Y_0 - Y_1 is at least that."""
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += ["(declare-const Y_0 Real)", "(declare-const Y_1 Real)"]
    lines += [f"(assert (>= X_{i} {-radius})) (assert (<= X_{i} {radius}))" for i in range(inputs)]
    return "\n".join([*lines, f"(assert (>= (- Y_0 Y_1) {least:.1f}))"])


def solved(model: Path, spec: Path, verdict: Verdict, **options: Any) -> Certificate:
    result = verify(model, spec, Options(device="cpu", timeout=60, certificate=True, **options))
    assert result.verdict == verdict, result.reason
    assert result.certificate is not None
    return Certificate.read(model, spec, result.certificate)


@functools.cache
def folder() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp())


@functools.cache
def by_cuts(
    make: Callable[[], tuple[Graph, str]], inputs: int, radius: float, most: float
) -> Certificate:
    """The first property, from an easy one on, that takes the network's own cuts."""
    graph, output = make()
    model = write(graph.model(output), folder() / f"{make.__name__}.onnx")
    for step in range(40):
        spec = folder() / f"{make.__name__}_{step}.vnnlib"
        spec.write_text(difference(inputs, radius, most - step / 10))
        old, bab.SPLITTABLE = bab.SPLITTABLE, 0
        try:
            certificate = solved(model, spec, Verdict.UNSAT)
        finally:
            bab.SPLITTABLE = old
        if len(certificate.entries(DUAL)) > 1:
            return certificate
    raise AssertionError("no property took a cut")


@functools.cache
def genuine(name: str) -> Certificate:
    match name:
        case "splits":
            return solved(ONNX / "tiny_mlp_qop.onnx", VNNLIB / "tiny_safe.vnnlib", Verdict.UNSAT)
        case "root":
            return solved(
                ONNX / "mnist_mlp_qop.onnx", VNNLIB / "mnist_8_eps_8.vnnlib.gz", Verdict.UNSAT
            )
        case "cuts":
            return solved(
                ONNX / "mnist_mlp_qop.onnx", VNNLIB / "mnist_33_eps_4.vnnlib.gz", Verdict.UNSAT
            )
        case "residual":
            return by_cuts(residual, 6, 0.3, 3.2)
        case "pooled":
            return by_cuts(pooled, 16, 0.2, 5.0)
    assert name == "sat"
    return solved(ONNX / "tiny_mlp_qdq.onnx", VNNLIB / "tiny_unsafe.vnnlib", Verdict.SAT)


UNSAT, CUTS = ("splits", "root", "cuts", "residual", "pooled"), ("cuts", "residual", "pooled")
every_kind = pytest.mark.parametrize("name", [*UNSAT, "sat"])


def violated(name: str) -> Certificate:
    """A genuine certificate, said to be about a property with a counterexample."""
    certificate = genuine(name)
    if name in ("residual", "pooled"):
        spec = folder() / f"{name}_violated.vnnlib"
        spec.write_text(difference(6 if name == "residual" else 16, 0.3, -40.0))
    else:
        spec = VNNLIB / {"splits": "tiny_unsafe.vnnlib"}.get(name, "mnist_33_eps_8.vnnlib.gz")
    assert verify(certificate.model, spec, Options(device="cpu", timeout=60)).verdict == Verdict.SAT
    return certificate.about(certificate.model, spec)


# -- genuine and forged certificates ---------------------------------------------------------------


@every_kind
def test_a_genuine_certificate_is_accepted(name: str, tmp_path: Path) -> None:
    certificate = genuine(name)
    report = certificate.check(tmp_path)
    assert report.verdict == certificate.header["verdict"]
    if name != "sat":
        assert report.leaves == len(certificate.entries(CLOSED)) + len(certificate.entries(DUAL))
    assert (len(certificate.entries(DUAL)) > 1) == (name in CUTS) if name != "sat" else True


def test_the_certified_networks_are_proved_and_their_certificates_accepted(tmp_path: Path) -> None:
    folder = EXAMPLES.parent / "certified"
    with (folder / "instances.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert len(rows) >= 8
    for model, spec, _ in rows:
        solved(folder / model, folder / spec, Verdict.UNSAT).check(tmp_path)


def test_every_example_s_certificate_is_accepted(tmp_path: Path) -> None:
    with (EXAMPLES / "expected.csv").open(newline="") as stream:
        rows = [
            row for row in csv.reader(stream) if row[2] and ("eps_4" in row[1] or "tiny" in row[1])
        ]
    for model, spec, verdict in rows:
        solved(EXAMPLES / model, EXAMPLES / spec, Verdict(verdict)).check(tmp_path)


@pytest.mark.parametrize("name", UNSAT)
def test_a_proof_for_another_property_is_rejected(name: str, tmp_path: Path) -> None:
    """One with the counterexample inside its box: the box is wider, or the rows are others."""
    assert not violated(name).accepted(tmp_path)


@pytest.mark.parametrize("name", UNSAT)
def test_no_change_proves_what_is_false(name: str, tmp_path: Path) -> None:
    """Random changes of a forged certificate: entries, kinds, multipliers, whatever."""
    forged, rng = violated(name), np.random.default_rng(7)
    for _ in range(60):
        certificate = forged.copy()
        for _ in range(int(rng.integers(1, 6))):
            key = str(rng.choice([n for n, a in certificate.arrays.items() if a.size]))
            array = certificate.arrays[key].reshape(-1)
            at = rng.integers(array.size, size=max(1, int(array.size * rng.choice([0.0, 0.3]))))
            change = (
                rng.integers(-3, 4, len(at))
                if rng.random() < 0.5
                else rng.integers(-(2**20), 2**20, len(at))
            )
            array[at] = (
                (array[at] + change).astype(array.dtype)
                if rng.random() < 0.8
                else rng.choice(array)
            )
        try:
            assert not certificate.accepted(tmp_path)
        except CertificateError:  # kinds in int8, shapes that do not fit
            continue


@every_kind
def test_another_model_or_property_is_rejected(name: str, tmp_path: Path) -> None:
    certificate = genuine(name)
    model, spec = tmp_path / "model.onnx", tmp_path / "spec.vnnlib.gz"
    shutil.copy(certificate.model, model)
    model.write_bytes(model.read_bytes() + b"\x1a\x02qv")  # the producer's name, once more
    with pytest.raises(Rejected, match="another model"):
        replace(certificate, model=model).check(tmp_path)
    shutil.copy(certificate.spec, spec)
    spec.write_bytes(spec.read_bytes() + (b"" if certificate.spec.suffix == ".gz" else b"\n"))
    if certificate.spec.suffix != ".gz":
        with pytest.raises(Rejected, match="another property"):
            replace(certificate, spec=spec).check(tmp_path)
    other = {"tiny": "mnist_cnn_qop", "mnis": "mnist_cnn_qop"}.get(certificate.model.stem[:4])
    if other and certificate.model.stem.startswith(
        "mnist"
    ):  # the same inputs and outputs, other layers
        assert not certificate.about(ONNX / f"{other}.onnx", certificate.spec).accepted(tmp_path)


def test_other_weights_are_rejected(tmp_path: Path) -> None:
    """A network that computes something else, although all sizes are the same."""
    import onnx

    certificate = genuine("cuts")
    proto = onnx.load(certificate.model)
    last = [
        i
        for i in proto.graph.initializer
        if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 2
    ][-1]
    values = onnx.numpy_helper.to_array(last)
    last.CopyFrom(
        onnx.numpy_helper.from_array(np.roll(values, 1, axis=int(values.shape[1] != 10)), last.name)
    )
    model = write(proto, tmp_path / "model.onnx")
    assert not certificate.about(model, certificate.spec).accepted(tmp_path)


# -- parts of proofs -------------------------------------------------------------------------------


def opened(certificate: Certificate, folder: Path) -> Any:
    """The proof of the first query, its intermediate bounds and its tree read."""
    path = folder / "certificate.zip"
    path.write_bytes(certificate.data())
    proof = Proof(
        Archive(path),
        0,
        read_model(certificate.model).lowered,
        read_property(certificate.spec).queries[0],
    )
    for j, step in enumerate(proof.header["inner"]):
        proof._intermediate_bounds(j, step)
    proof.root, possible = proof.net.part(1, {}, proof.known)
    assert possible.all()
    proof.known = list(proof.root.intervals)
    proof.tree = Tree(proof.archive, proof.name, proof.sizes, len(proof.unsafe.regions))
    return proof


def sampled(proof: Any, count: int) -> list[Array]:
    """Every value [count, size] for random code vectors of the root box, corners among them."""
    rng, (low, high) = np.random.default_rng(5), proof.known[0]
    x = rng.integers(low, high, size=(count, low.shape[1]), endpoint=True)
    x[::2] = np.where(rng.random(x[::2].shape) < 0.5, low, high)
    return [v.reshape(count, -1) for v in proof.network.values(CPU, x.astype(np.int32))]


@pytest.mark.parametrize("name", UNSAT)
def test_intermediate_bounds_hold(name: str, tmp_path: Path) -> None:
    proof = opened(genuine(name), tmp_path)
    for (low, high), value in zip(proof.root.intervals, sampled(proof, 3000), strict=True):
        assert (low <= value).all() and (value <= high).all()


@pytest.mark.parametrize("name", UNSAT)
def test_the_leaves_cover_the_root_box(name: str, tmp_path: Path) -> None:
    """Every code vector is in a leaf's box, for every region that the root is parted into; two
    leaves share none."""
    proof = opened(genuine(name), tmp_path)
    values, found = sampled(proof, 300), []
    for kind in (CLOSED, DUAL):
        for leaves in proof.tree.leaves(kind, 7):
            part, possible = proof._part(leaves)
            inside = np.tile(possible, (300, 1))
            for (low, high), value in zip(part.intervals, values, strict=True):
                inside &= ((low <= value[:, None]) & (value[:, None] <= high)).all(axis=2)
            found.append((leaves.region, inside))
    region, inside = (
        np.concatenate([r for r, _ in found]),
        np.concatenate([i for _, i in found], axis=1),
    )
    for r in set(region.tolist()):
        assert (inside[:, region == r].sum(axis=1) == 1).all()


@pytest.mark.parametrize("name", UNSAT)
def test_a_leaf_s_ends_are_those_of_all_cuts_above_it(name: str, tmp_path: Path) -> None:
    """Found once more by climbing from every leaf to the root."""
    proof = opened(genuine(name), tmp_path)
    tree = proof.tree
    parent = {
        int(tree.first[e]) + side: (e, side)
        for e in np.flatnonzero(tree.kind == CUT)
        for side in (0, 1)
    }
    met = []
    for leaves in (certificate for kind in (CLOSED, DUAL) for certificate in tree.leaves(kind, 5)):
        for n, leaf in enumerate(leaves.entries.tolist()):
            ends = {
                v: (np.full(proof.sizes[v], -(2**40)), np.full(proof.sizes[v], 2**40))
                for v in set(tree.value)
            }
            at = leaf
            while at in parent:
                at, side = parent[at]
                low, high = ends[tree.value[at]]
                element, t = tree.element[at], tree.threshold[at]
                if side:
                    low[element] = max(low[element], t)
                else:
                    high[element] = min(high[element], t - 1)
            for v, (low, high) in ends.items():
                if v in leaves.cuts:
                    assert (leaves.cuts[v][0][n] == low).all() and (
                        leaves.cuts[v][1][n] == high
                    ).all()
                else:
                    assert low.max() == -(2**40) and high.min() == 2**40
            top = at - int(tree.first[0])
            assert leaves.region[n] == (tree.regions[top] if tree.parted else -1)
            met.append(leaf)
    assert sorted(met) == np.flatnonzero((tree.kind == CLOSED) | (tree.kind == DUAL)).tolist()


@pytest.mark.parametrize("name", ["cuts", "residual", "pooled"])
def test_a_bound_of_a_combination_is_never_below_what_occurs(name: str, tmp_path: Path) -> None:
    proof = opened(genuine(name), tmp_path)
    rng, values = np.random.default_rng(6), sampled(proof, 500)
    for region in proof.unsafe.regions:
        mix = [int(v) for v in rng.integers(0, 1000, len(region))]
        given = {
            k: rng.integers(-900, 900, (1, 1, rule.size)) for k, rule in proof.net.rules.items()
        }
        for certificate in (None, {}, given):
            bound = proof._upper(proof.root, [[list(zip(region, mix, strict=True))]], certificate)[
                0, 0
            ]
            total = sum(
                f * (i.constant + sum(c * values[v][:, e].astype(np.int64) for v, e, c in i.terms))
                for i, f in zip(region, mix, strict=True)
            )
            assert total.max() <= bound


# -- single changes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUTS)
def test_multipliers_far_off_are_rejected(name: str, tmp_path: Path) -> None:
    certificate = genuine(name).copy()
    for size in (2**24, 2**40, 2**61, -(2**63)):
        changed = certificate.copy()
        changed["multipliers"][len(changed["multipliers"]) // 2] = size
        assert not changed.accepted(tmp_path)


@pytest.mark.parametrize("name", CUTS)
def test_multipliers_are_accepted_as_far_as_the_bound_holds(name: str, tmp_path: Path) -> None:
    """The bound is a convex function of the multipliers: along a line it stays negative up to a
    point, then never again."""
    certificate, rng = genuine(name), np.random.default_rng(3)
    for _ in range(4):
        rows = certificate["multipliers"]
        direction = rng.normal(size=rows.shape[1]) * (1 + np.abs(rows).mean())
        found = []
        for power in range(-20, 12, 2):
            changed = certificate.copy()
            changed["multipliers"][0] += np.rint(direction * 2.0**power).astype(np.int64)
            found.append(changed.accepted(tmp_path))
        assert found[0] and not found[-1]
        assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("name", CUTS)
def test_weights_of_a_combination_below_zero_are_rejected(name: str, tmp_path: Path) -> None:
    certificate = genuine(name).copy()
    certificate["mix"][0, 0] = -1
    with pytest.raises(Rejected, match="negative weight"):
        certificate.check(tmp_path)


def keep(certificate: Certificate, entries: list[int]) -> None:
    """Only some entries of the tree, numbered anew; cuts whose children are gone are said to be
    closed."""
    new = {old: k for k, old in enumerate(entries)}
    rows = sorted(int(certificate["data"][e]) for e in entries if certificate["kind"][e] == DUAL)
    for name in TREE:
        certificate[name] = certificate[name][entries]
    for entry in np.flatnonzero((certificate["kind"] == CUT) | (certificate["kind"] == REGIONS)):
        first = int(certificate["first"][entry])
        certificate["first"][entry] = new.get(first, 0)
        if certificate["kind"][entry] == CUT and first not in new:
            certificate["kind"][entry] = CLOSED
    for entry in np.flatnonzero(certificate["kind"] == DUAL):
        certificate["data"][entry] = rows.index(int(certificate["data"][entry]))
    certificate["mix"], certificate["multipliers"] = (
        certificate["mix"][rows],
        certificate["multipliers"][rows],
    )


def below(certificate: Certificate, entry: int) -> set[int]:
    """The entries of a subtree, without its root."""
    if certificate["kind"][entry] != CUT:
        return set()
    first = int(certificate["first"][entry])
    return {first, first + 1} | below(certificate, first) | below(certificate, first + 1)


def missing_last(certificate: Certificate) -> None:
    for name in TREE:
        certificate[name] = certificate[name][:-1]


def missing_leaf(certificate: Certificate) -> None:
    leaf = certificate.entries(DUAL if certificate.entries(DUAL) else CLOSED)[0]
    keep(certificate, [e for e in range(len(certificate["kind"])) if e != leaf])


def child_of_two(certificate: Certificate) -> None:
    cuts = certificate.entries(CUT)
    certificate["first"][cuts[1]] = (
        certificate["first"][cuts[0]]
        if certificate["first"][cuts[0]] > cuts[1]
        else certificate["first"][cuts[1]] - 1
    )


def own_child(certificate: Certificate) -> None:
    cut = certificate.entries(CUT)[0]
    certificate["first"][cut] = cut


def beyond(certificate: Certificate) -> None:
    certificate["first"][certificate.entries(CUT)[-1]] = 2**63 - 1


def negative(certificate: Certificate) -> None:
    certificate["first"][certificate.entries(CUT)[-1]] = -2


def no_kind(certificate: Certificate) -> None:
    certificate["kind"][-1] = 4


def regions_below(certificate: Certificate) -> None:
    certificate["kind"][-1] = REGIONS


def far_element(certificate: Certificate) -> None:
    certificate["element"][certificate.entries(CUT)[-1]] = 10**6


def negative_element(certificate: Certificate) -> None:
    certificate["element"][certificate.entries(CUT)[-1]] = -1


def no_value(certificate: Certificate) -> None:
    certificate["value"][certificate.entries(CUT)[-1]] = 99


def far_threshold(certificate: Certificate) -> None:
    certificate["threshold"][certificate.entries(CUT)[-1]] = -(2**63)


def no_cut(certificate: Certificate) -> None:
    """The first cut leaves one child empty and the other one whole: then that child's proof must be
    one of the whole."""
    certificate["threshold"][certificate.entries(CUT)[0]] = -(2**30)


def cut_elsewhere(certificate: Certificate) -> None:
    cut = certificate.entries(CUT)[0]
    certificate["value"][cut], certificate["element"][cut], certificate["threshold"][cut] = (
        1,
        0,
        2**30,
    )


def closed_early(certificate: Certificate) -> None:
    """The first cut's entry is said to be closed, and its subtree is taken out."""
    gone = below(certificate, certificate.entries(CUT)[0])
    keep(certificate, [e for e in range(len(certificate["kind"])) if e not in gone])


TREES = (
    *(
        missing_last,
        missing_leaf,
        child_of_two,
        own_child,
        beyond,
        negative,
        no_kind,
        regions_below,
        far_element,
    ),
    *(negative_element, no_value, far_threshold, no_cut, cut_elsewhere, closed_early),
)


@pytest.mark.parametrize("name", ["splits", "residual", "pooled"])
@pytest.mark.parametrize("change", TREES, ids=lambda change: change.__name__)
def test_a_tree_that_is_none_or_does_not_cover_is_rejected(
    name: str, change: Callable[[Certificate], None], tmp_path: Path
) -> None:
    certificate = genuine(name).copy()
    if (change is child_of_two and len(certificate.entries(CUT)) < 2) or (
        change is no_cut and name != "splits"
    ):
        pytest.skip("one cut only, or multipliers that may prove the whole as well")
    change(certificate)
    with pytest.raises(Rejected):
        certificate.check(tmp_path)


def test_a_region_cannot_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by an entry that nobody is the parent of, nor by one region less, nor by one region
    twice."""

    # Else one region is left.
    def none(self: UnsafeRegions, dual: Any, bound: Any, shift: int, boxes: Any, _: Any) -> Any:
        return np.zeros((len(boxes[0][0]), len(self.regions)), np.bool_)

    monkeypatch.setattr(UnsafeRegions, "refuted", none)
    certificate = solved(
        ONNX / "mnist_mlp_qop.onnx", VNNLIB / "mnist_33_eps_4.vnnlib.gz", Verdict.UNSAT
    )
    count = len(certificate["regions"])
    assert certificate["kind"][0] == REGIONS and count > 1
    changed = certificate.copy()
    changed["regions"] = certificate["regions"][:-1]
    with pytest.raises(Rejected, match="not a tree"):
        changed.check(tmp_path)
    changed["regions"] = np.r_[certificate["regions"][:-1], certificate["regions"][:1]]
    assert not changed.accepted(tmp_path)
    found = []
    for lost in range(count):
        changed = certificate.copy()
        top = int(certificate["first"][0]) + lost
        gone = {top} | below(certificate, top)
        keep(changed, [e for e in range(len(certificate["kind"])) if e not in gone])
        changed["regions"], changed["first"][0] = np.delete(certificate["regions"], lost), 1
        found.append(changed.accepted(tmp_path))
    # A region may be refuted at the root without its entry, but not all of them.
    assert not all(found)
    changed = certificate.copy()
    keep(changed, [0])
    changed["regions"] = certificate["regions"][:0]
    with pytest.raises(Rejected, match="a region of the property is missing"):
        changed.check(tmp_path)
    changed = certificate.copy()
    changed["regions"] = np.r_[certificate["regions"][:-1], 10**6]
    with pytest.raises(Rejected, match="does not have"):
        changed.check(tmp_path)
    for kind in (CLOSED, CUT, DUAL):
        changed = certificate.copy()
        changed["kind"][0] = kind
        assert not changed.accepted(tmp_path)


def inner_arrays(certificate: Certificate) -> list[str]:
    return [
        n.removeprefix("q0.")
        for n, a in certificate.arrays.items()
        if re.fullmatch(r"q0\.inner\d+", n) and a.size
    ]


@pytest.mark.parametrize("value", [-1, 10**6, 2**63 - 1])
def test_intermediate_bounds_of_elements_that_are_not_there_are_rejected(
    value: int, tmp_path: Path
) -> None:
    certificate = genuine("root").copy()
    certificate[inner_arrays(certificate)[-1]][0] = value
    with pytest.raises(Rejected, match="intermediate bound"):
        certificate.check(tmp_path)


def test_without_intermediate_bounds_the_root_stays_open(tmp_path: Path) -> None:
    certificate = genuine("root").copy()
    certificate.header["queries"][0]["inner"] = []
    with pytest.raises(Rejected, match="not closed"):
        certificate.check(tmp_path)


def test_rules_must_fit_the_nodes(tmp_path: Path) -> None:
    rules = genuine("residual").header["queries"][0]["rules"]
    (total,) = (k for k, rule in rules.items() if rule == "sum")
    (stairs, *_) = (k for k, rule in rules.items() if rule == "staircase")
    for node, rule in (
        (total, "staircase"),
        (stairs, "sum"),
        (stairs, "max"),
        (stairs, "nonsense"),
        ("99", "scan"),
        ("1.0", "scan"),
    ):
        certificate = genuine("residual").copy()
        certificate.header["queries"][0]["rules"][node] = rule
        with pytest.raises(Rejected):
            certificate.check(tmp_path)
    for slopes in (None, [1], [1, 2.5], [10**9, 1], [0, 0], [-3, 5]):
        certificate = genuine("residual").copy()
        certificate.header["queries"][0]["slopes"][total] = slopes
        assert not certificate.accepted(tmp_path)


def test_there_must_be_a_proof_for_every_query(tmp_path: Path) -> None:
    certificate = genuine("splits").copy()
    certificate.header["queries"] = []
    with pytest.raises(Rejected, match="0 queries, the property 1"):
        certificate.check(tmp_path)
    certificate.header["queries"] = genuine("splits").header["queries"] * 2
    with pytest.raises(Rejected, match="2 queries"):
        certificate.check(tmp_path)


def test_two_queries_have_two_proofs(tmp_path: Path) -> None:
    text = (VNNLIB / "tiny_safe.vnnlib").read_text()
    spec = tmp_path / "two.vnnlib"
    halves = "(assert (or (and (<= X_0 0.5) (>= X_1 0.1)) (and (>= X_0 0.5) (>= X_1 0.1))))"
    spec.write_text(text + halves)
    certificate = solved(ONNX / "tiny_mlp_qop.onnx", spec, Verdict.UNSAT)
    assert len(certificate.header["queries"]) == 2 and certificate.accepted(tmp_path)
    changed = certificate.copy()
    for name in list(certificate.arrays):
        if name.startswith("q1."):
            changed.arrays[name] = certificate.arrays["q0." + name[3:]]
    changed.header["queries"][1] = certificate.header["queries"][0]
    assert not changed.accepted(tmp_path)


# -- sat -------------------------------------------------------------------------------------------


def test_a_counterexample_outside_of_the_box_is_rejected(tmp_path: Path) -> None:
    certificate = genuine("sat").copy()
    certificate.header["inputs"][0] = "0.9"
    with pytest.raises(Rejected, match="outside"):
        certificate.check(tmp_path)


def test_a_safe_counterexample_is_rejected(tmp_path: Path) -> None:
    certificate = genuine("sat")
    with pytest.raises(Rejected, match=r"not unsafe|outside"):
        certificate.about(certificate.model, VNNLIB / "tiny_safe.vnnlib").check(tmp_path)
    spec = tmp_path / "other.vnnlib"
    spec.write_text(certificate.spec.read_text().replace("(>= Y_0 Y_1)", "(>= Y_0 1000)"))
    assert "1000" in spec.read_text()
    with pytest.raises(Rejected, match="not unsafe"):
        certificate.about(certificate.model, spec).check(tmp_path)


@pytest.mark.parametrize(
    "inputs", [[], ["0.7"], ["0.7", "0.7", "0.7"], ["0.7", 0.7], ["0.7", "NaN"], ["0.7", "1/2"]]
)
def test_a_counterexample_is_a_decimal_for_each_input(inputs: list[Any], tmp_path: Path) -> None:
    certificate = genuine("sat").copy()
    certificate.header["inputs"] = inputs
    with pytest.raises(Rejected):
        certificate.check(tmp_path)


def test_verdicts_cannot_be_exchanged(tmp_path: Path) -> None:
    for name, verdict in (("sat", "unsat"), ("splits", "sat")):
        certificate = genuine(name).copy()
        certificate.header["verdict"] = verdict
        with pytest.raises(CertificateError, match="missing"):
            certificate.check(tmp_path)
    certificate.header["verdict"] = "safe"
    with pytest.raises(Rejected, match="verdict"):
        certificate.check(tmp_path)


# -- the command, and files that are no certificates -----------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificate, path = genuine("splits"), tmp_path / "proof"
    assert main([str(certificate.model), str(certificate.spec), "--certificate", str(path)]) == 0
    capsys.readouterr()
    assert main(["check", str(certificate.model), str(certificate.spec), str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == "accepted unsat\n"
    assert re.fullmatch(r"qverify: checked \d+ leaves, 0 intermediate bounds in [\d.]+ s\n", err)
    assert (
        main(["check", str(certificate.model), str(VNNLIB / "tiny_unsafe.vnnlib"), str(path)]) == 1
    )
    out, err = capsys.readouterr()
    assert out.startswith("rejected: it is about another property: SHA-256 ") and not err


def damaged() -> Iterator[tuple[str, bytes]]:
    certificate = genuine("splits")
    data = certificate.data()
    yield "empty", b""
    yield "text", b"unsat\n"
    yield "a model", certificate.model.read_bytes()
    yield "truncated", data[: len(data) // 2]
    yield "damaged", data[:400] + bytes(255 - b for b in data[400:600]) + data[600:]
    for name, header in (
        ("a list", []),
        ("another format", certificate.header | {"format": "x"}),
        ("old", certificate.header | {"version": 0}),
    ):
        yield name, replace(certificate, header=header).data()  # type: ignore[arg-type]
    for key in ("verdict", "model_sha256", "queries"):
        yield (
            f"no {key}",
            replace(
                certificate, header={k: v for k, v in certificate.header.items() if k != key}
            ).data(),
        )
    value: Any
    for value in (7, None, [7], [{}]):
        yield (
            f"queries {value}",
            replace(certificate, header=certificate.header | {"queries": value}).data(),
        )
    for name, array in (
        ("float", certificate["kind"].astype(np.float64)),
        ("big endian", certificate["kind"].astype(">i8")),
        ("unsigned", certificate["kind"].astype(np.uint8)),
        ("objects", certificate["kind"].astype(object)),
        ("Fortran's order", np.asfortranarray(np.zeros((2, 2), np.int64))),
        ("a matrix", certificate["kind"][None]),
        ("a number", np.asarray(certificate["kind"][0])),
        ("an entry less", certificate["first"][1:]),
    ):
        changed = certificate.copy()
        changed["first" if name == "an entry less" else "kind"] = array
        yield name, changed.data()
    changed = certificate.copy()
    del changed.arrays["q0.data"]
    yield "an array missing", changed.data()
    big = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    for name, shape, body in (
        ("absurd", "9" * 18 + ",", b""),
        ("large", f"{2**40},", b""),
        ("short", "9,", b"12"),
    ):
        text = (
            f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({shape}), }}".encode().ljust(117)
            + b"\n"
        )
        yield f"{name} array", with_entry(certificate, "q0.kind.npy", big + text + body)
    yield "no array", with_entry(certificate, "q0.kind.npy", b"x")


def with_entry(certificate: Certificate, name: str, data: bytes) -> bytes:
    """The file with one of its entries replaced."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(certificate.data())) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, data if entry == name else old.read(entry))
    return buffer.getvalue()


def test_whatever_is_no_certificate_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, path = genuine("splits"), tmp_path / "proof"
    command = ["check", str(certificate.model), str(certificate.spec), str(path)]
    assert main(command) == 2  # it does not exist
    for name, data in damaged():
        capsys.readouterr()
        path.write_bytes(data)
        assert main(command) == 2, name
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"qverify: error: {path}: "), (
            name,
            err,
        )


def test_damage_of_any_byte_is_never_an_internal_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, rng, path = genuine("splits"), np.random.default_rng(11), tmp_path / "proof"
    data = bytearray(certificate.data())
    for _ in range(150):
        changed = bytearray(data)
        for at in rng.integers(len(data), size=int(rng.choice([1, 1, 3, 20]))):
            changed[at] = int(rng.integers(256))
        path.write_bytes(changed[: int(rng.integers(len(data)))] if rng.random() < 0.1 else changed)
        assert main(["check", str(certificate.model), str(certificate.spec), str(path)]) in (
            0,
            1,
            2,
        ), capsys.readouterr().err


def test_there_is_no_certificate_where_conditions_mention_inputs(tmp_path: Path) -> None:
    certificate, spec = genuine("splits"), tmp_path / "mixed.vnnlib"
    spec.write_text(certificate.spec.read_text() + "(assert (<= (+ X_0 Y_0) 1000))")
    with pytest.raises(Rejected, match="mention inputs"):
        certificate.about(certificate.model, spec).check(tmp_path)
