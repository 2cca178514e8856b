"""`qverify robustness`: every verdict against brute force or `verify`, figures, files that can be
resumed, and errors."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from qverify import Options, cli, runtime, verify
from qverify.boundary.domain import make_domain
from qverify.engine import Engine
from qverify.errors import DeviceError, QverifyError, SoundnessError, UsageError
from qverify.frontend.model import read_model
from qverify.kernels import gpu, open_kernels
from qverify.propagate import Propagator
from qverify.robustness import AccuracyReport, ImageRow, Scaling, certify, decide
from qverify.robustness.decide import Decider
from qverify.robustness.results import ImageResults, Known, spelled
from tests.graphs import Graph, exact_products, write
from tests.kernels.strict import open_strict

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "specs" / "examples" / "onnx"
MNIST = ROOT.parent / "shared" / "data" / "mnist.npz"
CPU = Options(device="cpu", timeout=30.0)
ONE = Fraction(1)


@dataclass(frozen=True)
class Form:
    """How a small classifier takes its four pixels (or six, with three channels)."""

    shape: tuple[int, ...]
    dtype: Any = np.float32
    scale: float = 1 / 255  # of the quantizer
    zero: Any = 0
    scaling: Scaling | None = None
    channels_last: bool = False


NORMAL = Scaling(mean=(Fraction("0.2"),), std=(Fraction("0.25"),))
FORMS = {
    "float": Form((1, 1, 2, 2)),
    "flat": Form((1, 4)),
    "batch": Form(("n", 4)),  # type: ignore[arg-type]
    "uint8": Form((1, 1, 2, 2), np.uint8),
    "int8": Form((1, 4), np.int8, zero=-128),
    "shifted": Form(
        (1, 2, 2, 1), scale=1.0, scaling=Scaling(ONE, (Fraction(10),))
    ),  # codes end at 245
    "normalised": Form((1, 1, 2, 2), scale=4 / 255, zero=60, scaling=NORMAL),  # codes begin at 9
    "channels first": Form((1, 3, 1, 2)),
    "channels last": Form((1, 1, 2, 3), channels_last=True),
}


def classifier(form: Form, path: Path, seed: int = 0, gain: float = 1.0) -> Path:
    """A quantized product of the pixels' codes with small weights, three classes; ties are
    frequent."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(form.shape[1:]))
    weight = rng.integers(-60, 61, (count, 3)).astype(np.int8)
    if form.channels_last:  # the same function of the pixels
        weight = weight.reshape(3, 2, 3).transpose(1, 0, 2).reshape(count, 3)
    codes = np.int8 if form.dtype == np.int8 else np.uint8
    zero = np.array(form.zero, codes)
    g = Graph()
    x = g.input(form.shape, form.dtype)
    if form.dtype == np.float32:
        x = g.quantize(x, form.scale, zero)
    if len(form.shape) > 2:
        x = g.node("Reshape", x, g.const([1, count], np.int64))
    return write(g.model(product(g, x, zero, weight, 120.0 / gain)), path)


def product(g: Graph, x: str, zero: Any, weight: Any, scale: float) -> str:
    """Scores: a product of codes [1, n] and weights, in 256 steps."""
    middle = np.array(0 if zero.dtype == np.int8 else 128, zero.dtype)
    one, none, ends = g.f32(1.0), g.const(np.int8(0)), (g.f32(scale), g.const(middle))
    y = g.node("QLinearMatMul", x, one, g.const(zero), g.const(weight), one, none, *ends)
    return g.dequantize(y, 1.0, middle)


def some_images(path: Path, form: Form, count: int) -> tuple[Any, Any]:
    """Images, two thirds of them near the border of two classes, and the labels that the network
    gives them."""
    shape = (3, 1, 2) if np.prod(form.shape[1:]) == 6 else (1, 2, 2)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (300, *shape))
    pixels = np.where(
        rng.random(pixels.shape) < 0.3, rng.choice([0, 1, 254, 255], pixels.shape), pixels
    )
    y = scores(path, form, pixels)
    margin = np.sort(y, axis=1)[:, -1] - np.sort(y, axis=1)[:, -2]
    contested = np.argsort(margin, kind="stable")[: count * 2]
    chosen = rng.permutation(
        np.concatenate([contested[::3], np.arange(count - len(contested[::3]))])
    )
    return pixels[chosen].astype(np.uint8), y[chosen].argmax(axis=1)


def scores(path: Path, form: Form, pixels: Any) -> Any:
    """onnxruntime's scores [N, 3] of pixels [N, C, H, W], scaled as the documentation says, in
    plain floats."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (spec,) = session.get_inputs()
    if form.channels_last:
        pixels = pixels.transpose(0, 2, 3, 1)
    if form.dtype == np.float32:
        scaling = form.scaling or Scaling()
        x = (pixels * float(scaling.scale) - float(scaling.mean[0])) / float(scaling.std[0])
    else:
        x = pixels.astype(np.int64) + int(np.iinfo(form.dtype).min)
    feeds = [p.astype(form.dtype).reshape(1, *form.shape[1:]) for p in x]
    return np.concatenate([session.run(None, {spec.name: feed})[0] for feed in feeds])


def ball(pixels: Any, eps: int) -> Any:
    """Every image of whole pixels within eps."""
    ranges = [range(max(int(p) - eps, 0), min(int(p) + eps, 255) + 1) for p in pixels.reshape(-1)]
    return np.array(list(itertools.product(*ranges))).reshape(-1, *pixels.shape)


def truth(path: Path, form: Form, pixels: Any, label: int, eps: int) -> str:
    """By trying every image of the ball. Every code that real pixels reach, whole ones reach: codes
    are pixels."""
    if not wins(scores(path, form, pixels[None].astype(np.int64)), label)[0]:
        return "misclassified"
    return "unsat" if wins(scores(path, form, ball(pixels, eps)), label).all() else "sat"


def wins(y: Any, label: int) -> Any:
    others = np.delete(y, label, axis=1)
    return y[:, label] > others.max(axis=1)


def verdicts(report: AccuracyReport) -> dict[tuple[int, Fraction], str]:
    return {(row.image, row.eps): row.verdict for row in report.rows}


# -- verdicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_brute_force(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    path = classifier(form, tmp_path / "m.onnx")
    count, radii = (24, (1, 2)) if "channels" not in name else (12, (1,))
    pixels, best = some_images(path, form, count)
    labels = np.where(np.arange(count) % 6 == 5, (best + 1) % 3, best)  # some are wrong
    report = certify(path, pixels, labels, radii, CPU, scaling=form.scaling)
    expected = {
        (i, Fraction(eps)): truth(path, form, pixels[i], int(labels[i]), eps)
        for i in range(count)
        for eps in radii
    }
    assert verdicts(report) == expected
    assert {"unsat", "sat", "misclassified"} <= set(expected.values())
    assert report.warnings == ()


def test_a_falling_quantizer(tmp_path: Path) -> None:
    """The model negates its input before it quantizes: lower pixels are higher codes."""
    g = Graph()
    x = g.quantize(g.node("Sub", g.f32(1.0), g.input((1, 4))), 1 / 255, np.array(0, np.uint8))
    weight = np.random.default_rng(3).integers(-60, 61, (4, 3)).astype(np.int8)
    path = write(g.model(product(g, x, np.array(0, np.uint8), weight, 120.0)), tmp_path / "m.onnx")
    form = FORMS["flat"]
    pixels, labels = some_images(path, form, 20)
    report = certify(path, pixels, labels, 1, CPU)
    expected = {(i, ONE): truth(path, form, pixels[i], int(labels[i]), 1) for i in range(20)}
    assert verdicts(report) == expected and len(set(expected.values())) == 3


def test_ties_are_violations(tmp_path: Path) -> None:
    """Without them the same images are certified more often; a tie of the image itself is told from
    another error."""
    form = FORMS["uint8"]
    path = classifier(form, tmp_path / "m.onnx", gain=0.2)  # coarse scores
    pixels, labels = some_images(path, form, 60)
    y = scores(path, form, pixels.astype(np.int64))
    report = certify(path, pixels, labels, 1, CPU)
    tied = {i for i in range(60) if not wins(y[i : i + 1], labels[i])[0]}
    assert tied and {row.image for row in report.rows if row.stage == "tie"} == tied
    assert {row.image for row in report.rows if row.verdict == "misclassified"} == tied
    (level,) = report.levels
    assert (level.images, level.correct, level.ties) == (60, 60 - len(tied), len(tied))
    lenient = [
        i
        for i in range(60)
        if (scores(path, form, ball(pixels[i], 1)).argmax(axis=1) == labels[i]).all()
    ]
    assert level.certified < len(lenient)


def test_scores_that_may_be_infinite_are_not_certified(tmp_path: Path) -> None:
    """Two infinities tie, although the one sum of products is always the larger."""
    g = Graph()
    x = g.quantize(g.input((1, 1)), 1 / 255, np.array(0, np.uint8))
    sums = g.node(
        "MatMulInteger", x, g.const(np.array([[10, 9]], np.int8)), g.const(np.array(0, np.uint8))
    )
    path = write(g.model(g.node("DequantizeLinear", sums, g.f32(6.7e35))), tmp_path / "m.onnx")
    pixels, labels = np.full((2, 1, 1, 1), [[[[30]]], [[[50]]]], np.uint8), np.zeros(2, np.int64)
    (tied,) = onnxruntime.InferenceSession(path).run(
        None, {"x0": np.array([[99 / 255]], np.float32)}
    )
    assert np.isinf(tied).all()
    report = certify(path, pixels, labels, [5, 49], CPU)
    assert {key: verdict == "unsat" for key, verdict in verdicts(report).items()} == {
        (0, Fraction(5)): True,
        (0, Fraction(49)): False,
        (1, Fraction(5)): False,
        (1, Fraction(49)): False,
    }


def test_the_radius_is_of_real_pixels(tmp_path: Path) -> None:
    """Half a pixel away a float input may have another code, and between whole pixels there are
    inputs too."""
    form = FORMS["float"]
    path = classifier(form, tmp_path / "m.onnx")
    pixels, labels = some_images(path, form, 40)
    report = certify(path, pixels, labels, ["0.5", 0.7, np.int64(1)], CPU)
    found = verdicts(report)
    for i in range(40):
        assert found[i, Fraction("0.7")] == found[i, ONE]  # 0.7 rounds to 1
    assert [spelled(level.eps) for level in report.levels] == ["0.5", "0.7", "1"]
    assert not report.warnings
    whole = classifier(FORMS["uint8"], tmp_path / "w.onnx")
    assert {v for (_, e), v in verdicts(certify(whole, pixels, labels, 0.7, CPU)).items()} <= {
        "unsat",
        "misclassified",
    }


@pytest.mark.parametrize("name", ["normalised", "int8", "channels last"])
def test_bounds_are_those_of_a_property(name: str, tmp_path: Path) -> None:
    """Exact, clipped to the range, and read as `make_domain` reads a property's."""
    form = FORMS[name]
    read = read_model(classifier(form, tmp_path / "m.onnx"))
    pixels, _ = some_images(read.path, form, 6)
    inputs = Decider.make(read, pixels.shape[1:], form.scaling, CPU).inputs
    radius, value = inputs.radius(Fraction(3, 2)), inputs.scaling.value
    for low, high, p in (
        (0, Fraction(3, 2), 0),
        (Fraction(17, 2), Fraction(23, 2), 10),
        (Fraction(507, 2), 255, 255),
    ):
        assert radius.lower[0][p] == value(Fraction(low), 0) and radius.upper[0][p] == value(
            Fraction(high), 0
        )
    lower, upper = inputs.ends(pixels, radius)
    clean = inputs.clean(pixels)
    assert (lower < clean).any() and (lower <= clean).all() and (clean <= upper).all()
    for i, image in enumerate(pixels):
        domain = make_domain(inputs.encoder, inputs.box(image, radius))
        assert np.array_equal(domain.lower, lower[i]) and np.array_equal(domain.upper, upper[i])


SPEC = """(declare-const X_{i} Real)
(assert (>= X_{i} {low}))
(assert (<= X_{i} {high}))
"""


def spec(pixels: Any, eps: Fraction, label: int, classes: int) -> str:
    """The VNN-LIB property of an image, by decimals of 30 digits rounded outwards."""
    parts = []
    for i, p in enumerate(pixels.reshape(-1).tolist()):
        ends = max(p - eps, Fraction(0)) / 255, min(p + eps, Fraction(255)) / 255
        low, high = ends[0] * 10**30 // 1, -(-ends[1] * 10**30 // 1)
        parts.append(SPEC.format(i=i, low=f"{low}e-30", high=f"{high}e-30"))
    parts += [f"(declare-const Y_{j} Real)\n" for j in range(classes)]
    others = " ".join(f"(and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label)
    return "".join(parts) + f"(assert (or {others}))\n"


def test_tiny_example_against_verify_and_all_codes(tmp_path: Path) -> None:
    path = EXAMPLES / "tiny_mlp_qop.onnx"
    network, cpu = read_model(path).lowered.network, open_kernels("cpu")
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (30, 1, 1, 2)).astype(np.uint8)
    labels = network.run(cpu, pixels.reshape(-1, 2).astype(np.int32)).argmax(axis=1)
    radii = (3, 10, 40)
    found = verdicts(certify(path, pixels, labels, radii, CPU))
    for i, eps in itertools.product(range(30), radii):
        expected = wins(
            network.run(cpu, ball(pixels[i], eps).reshape(-1, 2).astype(np.int32)), int(labels[i])
        ).all()
        assert found[i, Fraction(eps)] == ("unsat" if expected else "sat")
        if i < 6:
            (tmp_path / "p.vnnlib").write_text(spec(pixels[i], Fraction(eps), int(labels[i]), 2))
            assert verify(path, tmp_path / "p.vnnlib", CPU).verdict.value == found[i, Fraction(eps)]


@pytest.mark.shared
@pytest.mark.skipif(not MNIST.exists(), reason="the folder ../shared/data is not here")
@pytest.mark.parametrize("name", ["mnist_mlp_qop", "mnist_cnn_qdq"])
def test_mnist_against_verify(name: str, tmp_path: Path) -> None:
    if name == "mnist_mlp_qop" and not exact_products():
        pytest.skip("onnxruntime computes other integers on this CPU")
    from qverify.data import load_images

    chosen = [0, 2, 33, 92, 217, 241]
    images = load_images(MNIST)
    pixels, labels = images.pixels[chosen], images.labels[chosen]
    report = certify(EXAMPLES / f"{name}.onnx", pixels, labels, [1, 4], replace(CPU, timeout=3.0))
    assert {row.verdict for row in report.rows} >= {"unsat", "sat"}
    for row in report.rows:
        if row.verdict in ("timeout", "misclassified"):
            continue
        (tmp_path / "p.vnnlib").write_text(spec(pixels[row.image], row.eps, row.label, 10))
        result = verify(EXAMPLES / f"{name}.onnx", tmp_path / "p.vnnlib", replace(CPU, timeout=3.0))
        assert result.verdict.value in (row.verdict, "timeout")


# -- how they are found ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Any, Any]:
    """A classifier, images and labels with all kinds of verdicts at radius 1 and 3."""
    form = FORMS["float"]
    path = classifier(form, tmp_path / "small.onnx")
    pixels, labels = some_images(path, form, 30)
    y = scores(path, form, pixels.astype(np.int64))
    wrong = np.ptp(y, axis=1).argmax()
    labels[wrong] = y[wrong].argmin()
    return path, pixels, labels


def test_stages_agree(small: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without backward bounds, without the attack, and by the search alone, all verdicts are the
    same."""
    plain = certify(*small, [1, 3], CPU)
    assert {row.stage for row in plain.rows} == {"clean", "tie", "intervals", "bounds", "search"}
    for options in (replace(CPU, backward=False), replace(CPU, attack=False, seed=3)):
        assert verdicts(certify(*small, [1, 3], options)) == verdicts(plain)

    def unable(self: Any, task: Any, rows: Any, *rest: Any) -> Any:
        return {"intervals": (np.zeros(len(rows), np.bool_), 0.0)}

    monkeypatch.setattr(Decider, "_bounded", unable)
    searched = certify(*small, [1, 3], CPU)
    assert verdicts(searched) == verdicts(plain)
    assert {row.stage for row in searched.rows if row.verdict == "unsat"} == {"search"}


def test_worker_processes(small: tuple[Path, Any, Any], tmp_path: Path) -> None:
    results = str(tmp_path / "r.csv")
    report = certify(*small, [1, 2, 3], CPU, jobs=2, results=results)
    assert verdicts(report) == verdicts(certify(*small, [1, 2, 3], CPU))
    assert len(Path(results).read_text().splitlines()) == 2 + 90


@pytest.mark.parametrize("machine", ["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_a_gpu(
    machine: str, small: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one, or on a machine that keeps host and device arrays apart as one does."""
    if machine == "strict":
        monkeypatch.setattr(gpu, "open_cuda", open_strict)
    try:
        open_kernels("cuda")
    except DeviceError as error:
        pytest.skip(str(error))
    report = certify(*small, [1, 3], replace(CPU, device="cuda"), limit=12)
    assert verdicts(report) == verdicts(certify(*small, [1, 3], CPU, limit=12))


def test_what_runs_out_of_time_is_open(small: tuple[Path, Any, Any]) -> None:
    report = certify(*small, [1, 3], replace(CPU, timeout=1e-9, attack=False))
    for level, whole in zip(report.levels, certify(*small, [1, 3], CPU).levels, strict=True):
        assert level.correct == whole.correct
        assert (
            level.certified == level.stages["intervals"] + level.stages["bounds"] <= whole.certified
        )
        assert level.open == level.attacked - level.certified > 0


def test_what_ran_out_of_time_is_tried_again_with_more_time(
    small: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    results = str(tmp_path / "rows.csv")
    cut = certify(*small, [1, 3], replace(CPU, timeout=1e-4, attack=False), results=results)
    same = certify(*small, [1, 3], replace(CPU, timeout=1e-4, attack=False), results=results)
    assert verdicts(same) == verdicts(cut) and "taken over" in " ".join(same.warnings)
    for _ in range(2):  # the second time from the file alone
        longer = certify(*small, [1, 3], CPU, results=results)
        assert verdicts(longer) == verdicts(certify(*small, [1, 3], CPU)) != verdicts(cut)
        assert "taken over" not in " ".join(longer.warnings)
    path = Path(results)
    *_, last = lines = path.read_text().splitlines()
    for seconds, again in (("15.0001", False), ("15.0000", True)):  # of 30
        row = ",".join([*last.split(",")[:3], "timeout", "search", seconds])
        path.write_text("\n".join([*lines[:2], row]) + "\n")
        warnings = " ".join(certify(*small, [1, 3], CPU, results=results).warnings)
        assert ("1 open rows are taken over" in warnings) is not again


def test_a_worker_that_fails_at_a_batch_ends_the_run(
    small: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qverify.workers import Answer

    monkeypatch.setattr(
        Decider, "__call__", lambda *_: Answer("error", 1.0, "the worker process exited with 1")
    )
    with pytest.raises(
        QverifyError, match="images 0 to 29 could not be bounded: the worker process exited with 1"
    ):
        certify(*small, 1, CPU)


def test_a_counterexample_that_does_not_replay_counts_for_nothing(
    small: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = certify(*small, 3, CPU)
    broken = {row.image for row in plain.rows if row.verdict == "sat"}
    honest = runtime.Session.run
    monkeypatch.setattr(
        runtime.Session, "run", lambda *args: [value - np.float32(0.125) for value in honest(*args)]
    )
    with pytest.raises(SoundnessError, match="onnxruntime's outputs differ"):
        certify(*small, 3, CPU)
    monkeypatch.setattr(Engine, "_check_same", lambda *_: None)
    report = certify(*small, 3, CPU)
    assert broken and {row.image for row in report.rows if row.verdict == "unknown"} == broken
    assert report.levels[0].attacked == plain.levels[0].attacked + len(broken)
    assert report.levels[0].certified == plain.levels[0].certified


def test_errors_of_a_search_are_told(
    small: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> Any:
        raise SoundnessError("differ")

    monkeypatch.setattr(decide, "search", wrong)
    report = certify(*small, 3, CPU)
    failed = [row for row in report.rows if row.verdict == "error"]
    assert failed and len(report.warnings) == len(failed)
    assert (
        report.warnings[0]
        == f"image {failed[0].image} at eps 3: internal error, please report it: differ"
    )
    assert report.levels[0].open == len(failed)


# -- rows ------------------------------------------------------------------------------------------

RADII = tuple(map(Fraction, (1, 2, 3, 4)))


def row(eps: int, verdict: str) -> ImageRow:
    return ImageRow(7, 0, Fraction(eps), verdict, "search", 1.0)


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ([row(2, "unsat")], ["unsat", "unsat", None, None]),
        ([row(3, "sat")], [None, None, "sat", "sat"]),
        ([row(1, "misclassified")], ["misclassified"] * 4),
        ([row(2, "timeout")], [None, "timeout", None, None]),
        ([row(2, "timeout"), row(3, "unsat")], ["unsat", "unsat", "unsat", None]),
        ([row(2, "timeout"), row(1, "sat")], ["sat"] * 4),
        ([row(5, "unsat")], ["unsat"] * 4),  # a radius that is not asked for
    ],
)
def test_what_follows(added: list[ImageRow], expected: list[str | None]) -> None:
    known = Known(RADII)
    written = [new for row in added for new in known.add(row)]
    found = [known.rows.get((7, eps)) for eps in RADII]
    assert [None if row is None else row.verdict for row in found] == expected
    assert known.open(7) == [eps for eps, row in zip(RADII, expected, strict=True) if row is None]
    # What is written says the same.
    assert {(row.image, row.eps): row for row in written} == known.rows
    assert all(not known.add(row) for row in added)


@pytest.mark.parametrize(
    "pair", [(row(2, "unsat"), row(2, "sat")), (row(1, "sat"), row(3, "unsat"))]
)
def test_contradictions_are_errors(pair: tuple[ImageRow, ImageRow]) -> None:
    known = Known(RADII)
    known.add(pair[0])
    with pytest.raises(SoundnessError, match="image 7 is sat at eps"):
        known.add(pair[1])


def test_spelled() -> None:
    assert [spelled(Fraction(text)) for text in ("2", "0.5", "1/3", "0.1")] == [
        "2",
        "0.5",
        "1/3",
        "0.1",
    ]


ABOUT = {"model": "a" * 64, "data": "b" * 64, "norm": "linf", "scaling": "s"}


@pytest.fixture
def finished(small: tuple[Path, Any, Any], tmp_path: Path) -> tuple[Path, str]:
    results = tmp_path / "r.csv"
    certify(*small, [1, 3], CPU, results=str(results))
    return results, results.read_text()


def test_a_finished_run_is_not_run_again(
    small: tuple[Path, Any, Any], finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = certify(*small, [1, 3], CPU)
    monkeypatch.setattr(Decider, "__call__", lambda *_: pytest.fail("nothing is left to do"))
    report = certify(*small, [1, 3], CPU, results=str(finished[0]))
    assert finished[0].read_text() == finished[1]
    assert verdicts(report) == verdicts(plain)
    assert report.levels[0].certified == plain.levels[0].certified > 0


@pytest.mark.parametrize("keep", [0, 1, 100, 300, 320, 331, 700, -1, -2])
def test_a_run_that_was_cut_off_goes_on(
    keep: int, small: tuple[Path, Any, Any], finished: tuple[Path, str]
) -> None:
    path, text = finished
    path.write_text(text[:keep])
    certify(*small, [1, 3], CPU, results=str(path))
    again = path.read_text()
    assert again.startswith(text[:keep].rpartition("\n")[0])
    cells = [
        sorted(line.split(",")[:5] for line in content.splitlines()) for content in (text, again)
    ]
    assert cells[0] == cells[1]


def test_more_radii_and_images_use_what_is_known(
    small: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pixels, labels = small
    results = str(tmp_path / "r.csv")
    part = certify(path, pixels, labels, [1, 3], CPU, results=results, first=4, limit=10)
    assert sorted({row.image for row in part.rows}) == list(range(4, 14))
    seen: list[Any] = []
    call = Decider.__call__

    def watched(self: Decider, task: Any, options: Options) -> Any:
        seen.append(task)
        return call(self, task, options)

    monkeypatch.setattr(Decider, "__call__", watched)
    report = certify(path, pixels, labels, [1, 2, 3], CPU, results=results)
    assert verdicts(report) == verdicts(certify(path, pixels, labels, [1, 2, 3], CPU))
    settled = {row.image for row in part.rows if row.eps == 3 and row.verdict == "unsat"}
    assert settled and not settled & set(seen[0].numbers)


@pytest.mark.parametrize("what", ["model", "data", "scaling"])
def test_rows_of_another_run_are_refused(
    what: str, small: tuple[Path, Any, Any], finished: tuple[Path, str], tmp_path: Path
) -> None:
    path, pixels, labels = small
    scaling = None
    if what == "model":
        path = classifier(FORMS["float"], tmp_path / "other.onnx", seed=9)
    elif what == "data":
        labels = labels[::-1]
    else:
        scaling = Scaling(Fraction(1, 256))
    with pytest.raises(UsageError, match=f"rows of another {what} .*--results"):
        certify(path, pixels, labels, 1, CPU, scaling=scaling, results=str(finished[0]))
    assert finished[0].read_text() == finished[1]


@pytest.mark.parametrize(
    "text", ["notes\n", "a,b\n1,2\n", "# qverify robustness 7\n", "# qverify robustness {\n"]
)
def test_another_file_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(UsageError, match="not a results file"):
        ImageResults(str(tmp_path / "r.csv"), ABOUT)
    assert (tmp_path / "r.csv").read_text() == text


@pytest.mark.parametrize(
    "line", ["1,2,3\n", "1,0,1,fine,search,0.1\n", "1,0,1/0,unsat,search,0.1\n", "\n"]
)
def test_a_damaged_results_file(line: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    ImageResults(str(path), ABOUT).close()
    path.write_text(path.read_text() + line + "1,0,1,unsat,search,0.1\n")
    with pytest.raises(UsageError, match=r"damaged results file \(line 3\)"):
        ImageResults(str(path), ABOUT)


def test_a_torn_line_that_is_no_text_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    file = ImageResults(str(path), ABOUT)
    file.append([ImageRow(11, 0, ONE, "unsat", "search", 0.1)])
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b"12,0,1" + b"\xff" * 12)
    file = ImageResults(str(path), ABOUT)
    file.close()
    assert [row.image for row in file.rows] == [11]
    assert path.read_bytes() == whole


def test_a_row_with_another_label_is_not_taken_over(
    small: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    path = tmp_path / "r.csv"
    certify(*small, [1], CPU, results=str(path))
    first, second, row, *rest = path.read_text().splitlines(keepends=True)
    number, label, *words = row.split(",")
    path.write_text(
        "".join([first, second, ",".join([number, str(int(label) + 1), *words]), *rest])
    )
    with pytest.raises(
        UsageError, match=f"damaged results file: image {number} has the label {label}"
    ):
        certify(*small, [1], CPU, results=str(path))


@pytest.mark.parametrize("verdict", ["unknown", "error"])
def test_what_stayed_open_but_for_the_time_is_tried_again(
    verdict: str, small: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    path = tmp_path / "r.csv"
    before = certify(*small, [1], CPU, results=str(path))
    path.write_text(re.sub("unsat,[a-z]+", f"{verdict},search", path.read_text()))
    assert verdicts(certify(*small, [1], CPU, results=str(path))) == verdicts(before)


def test_results_must_be_a_regular_file() -> None:
    with pytest.raises(UsageError, match="not a regular file"):
        ImageResults("/dev/full", ABOUT)


# -- what does not fit -----------------------------------------------------------------------------


def bad(**changes: Any) -> dict[str, Any]:
    return changes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (bad(eps=[]), "--eps must be radii"),
        (bad(eps=-1), "--eps must be radii"),
        (bad(eps=[1, 256]), "--eps must be radii"),
        (
            bad(eps=8 / 255),
            r"--eps 0.03137: radii are in pixels, from 0 to 255, .* \(is 8 meant\?\)",
        ),
        (bad(eps=[0, 1, "0.49"]), r"--eps 0.49: radii are in pixels"),
        (bad(eps=["one"]), "--eps one: radii are numbers of pixels"),
        (bad(norm="l2"), "the norm 'l2' is not supported"),
        (bad(first=30), "no image to decide: the data set has 30"),
        (bad(images=np.zeros((30, 4), np.uint8)), "images must be uint8"),
        (bad(images=[[1, 2], [3, 4]]), "images must be uint8"),
        (bad(labels=np.arange(30)), "3 scores, but the labels go from 0 to 29"),
        (bad(labels=np.zeros(3, np.int64)), "labels integers"),
        (bad(labels=np.zeros(30)), "labels integers"),
        (
            bad(images=np.zeros((30, 1, 2, 3), np.uint8)),
            r"shape \[1, 1, 2, 2\], 4 elements, but an image has 1 channel",
        ),
        (
            bad(images=np.zeros((30, 1, 1, 4), np.uint8)),
            r"go into \[1, 1, 1, 4\], \[1, 1, 4, 1\] or \[1, 4\]",
        ),
        (
            bad(images=np.zeros((30, 2, 2, 1), np.uint8)),
            r"go into \[1, 2, 2, 1\], \[1, 2, 1, 2\] or \[1, 4\]",
        ),
        (
            bad(scaling=Scaling(mean=(ONE, ONE))),
            r"--mean has 2 values, but the images have 1 channel\(s\)",
        ),
        (bad(scaling=Scaling(Fraction(10**38))), "overflows float32: choose another --scale"),
        (bad(jobs=0), "--jobs must be at least 1"),
    ],
)
def test_what_does_not_fit(
    changes: dict[str, Any], text: str, small: tuple[Path, Any, Any]
) -> None:
    path, pixels, labels = small
    arguments: dict[str, Any] = {
        "images": pixels,
        "labels": labels,
        "eps": 1,
        "options": CPU,
        **changes,
    }
    with pytest.raises(UsageError, match=text) as caught:
        certify(path, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scaling", "text"),
    [
        (Scaling(), "the pixel 1 becomes 1/255"),
        (Scaling(Fraction(2)), "the pixel 128 becomes 256"),
        (Scaling(ONE, (ONE,)), "the pixel 0 becomes -1"),
    ],
)
def test_scalings_that_an_integer_input_cannot_take(
    scaling: Scaling, text: str, tmp_path: Path
) -> None:
    form = FORMS["uint8"]
    path = classifier(form, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=text):
        certify(path, *some_images(path, form, 2), 1, CPU, scaling=scaling)


def test_models_that_are_no_classifiers(tmp_path: Path) -> None:
    g = Graph()
    codes = g.quantize(g.input((1, 4)), 1 / 255, np.array(0, np.uint8))
    two = write(
        g.model(codes, g.dequantize(codes, 1.0, np.array(0, np.uint8))), tmp_path / "two.onnx"
    )
    pixels, labels = np.zeros((2, 1, 2, 2), np.uint8), np.zeros(2, np.int64)
    with pytest.raises(UsageError, match="1 inputs and 2 outputs"):
        certify(two, pixels, labels, 1, CPU)
    g = Graph()
    one = write(
        g.model(g.quantize(g.input((1, 1)), 1 / 255, np.array(0, np.uint8))), tmp_path / "one.onnx"
    )
    with pytest.raises(UsageError, match="one score only"):
        certify(one, pixels[:, :, :1, :1], labels, 1, CPU)
    with pytest.raises(UsageError, match="positive"):
        Scaling(Fraction(0))


def test_a_model_that_changes_under_the_workers(small: tuple[Path, Any, Any]) -> None:
    with pytest.raises(UsageError, match="the file has changed"):
        decide.load_decider(small[0], "another", (1, 2, 2), None, CPU)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(small: tuple[Path, Any, Any], tmp_path: Path) -> Iterator[list[str]]:
    path, pixels, labels = small
    np.savez(
        tmp_path / "d.npz",
        x_test=pixels[:, 0],
        y_test=labels,
        x_train=pixels[:5, 0],
        y_train=labels[:5],
    )
    yield ["robustness", str(path), str(tmp_path / "d.npz"), "--device", "cpu"]


def test_table_json_and_picture(
    command: list[str],
    small: tuple[Path, Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    json_file, plot = tmp_path / "r.json", tmp_path / "r.png"
    words = [*command, "--eps", "3", "1", "2", "--json", str(json_file), "--plot", str(plot)]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert len(lines) == 4 and [line[0] for line in lines[1:]] == ["1", "2", "3"]
    document = json.loads(json_file.read_text())
    report = certify(*small, [1, 2, 3], CPU)
    for figures, line, level in zip(document["levels"], lines[1:], report.levels, strict=True):
        assert figures["images"] == level.images == 30
        assert figures["clean"] == level.correct / 30 and figures["attacked"] == level.attacked / 30
        assert figures["certified"] == level.certified / 30 and figures[
            "open"
        ] == level.open == int(line[5])
        assert (
            figures["proved_by"] == level.stages and sum(level.stages.values()) == level.certified
        )
        assert [float(word) for word in line[2:5]] == [
            round(100 * figures[key], 2) for key in ("clean", "attacked", "certified")
        ]
    assert (
        document["model"] == report.about["model"]
        and document["scaling"] == "(pixel * 1/255 - 0) / 1"
    )
    assert document["options"]["timeout"] == 10.0 and document["split"] == "test"
    ties = report.levels[0].ties
    assert (f"{ties} images count as misclassified" in err) == bool(ties)
    from PIL import Image

    with Image.open(plot) as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(10**6) or ()) > 50


def test_split_selection_and_scaling(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--eps", "1", "--split", "train"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1] == "5"
    assert (
        cli.main([*command, "--eps", "1,1.0", "--eps", "1", "--first", "10", "--limit", "7"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[1].split()[1] == "7"
    assert cli.main([*command, "--eps", "1"]) == 0
    plain = capsys.readouterr().out.splitlines()[1].split()[:8]
    assert (
        cli.main([*command, "--eps", "1", "--scale", "0.5", "--mean", "0", "--std", "127.5"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[1].split()[:8] == plain


def test_radii_may_stand_anywhere(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, *files = command
    for words in (["--eps", "1", "2", ".5", *files], [*files, "--eps=1", "2", "--eps", ".5"]):
        assert cli.main([name, *words]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
            "0.5",
            "1",
            "2",
        ]


def test_an_accuracy_near_chance_is_pointed_out(small: tuple[Path, Any, Any]) -> None:
    path, pixels, labels = small
    assert not certify(path, pixels, labels, 0, CPU).warnings
    wrong = certify(path, pixels, (labels + 1) % 3, 0, CPU)
    assert "is near that of guessing (33.3 %)" in wrong.warnings[-1]
    assert not certify(path, pixels, (labels + 1) % 3, 0, CPU, limit=5).warnings


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "Missing option '--eps'"),
        (["--eps", "1", "two"], "Got unexpected extra argument (two)"),
        (["--eps", "two"], "radii are numbers of pixels"),
        (["8", "--eps", "1"], "Got unexpected extra argument (8)"),
        (["--eps", "1", "2", "--jobs", "1", "4"], "Got unexpected extra argument (4)"),
        (["--eps", "0.0314"], "--eps 0.0314: radii are in pixels, from 0 to 255"),
        (["--eps", "1/255"], "--eps 1/255: radii are in pixels, from 0 to 255"),
        (["--eps", "1", "--norm", "l1"], "the norm 'l1' is not supported"),
        (["--eps", "1", "--scale", "1,2"], "--scale 1,2: a number is wanted"),
        (["--eps", "1", "--mean", "x"], "--mean x: a number is wanted, or one for each channel"),
        (["--eps", "1", "--std", "0"], "--scale and --std must be positive"),
        (["--eps", "1", "--results", "a.csv", "--json", "a.csv"], "must name different files"),
        (["--eps", "1", "--plot", "p.nonsense"], "cannot write p.nonsense"),
    ],
)
def test_errors_of_the_command(
    words: list[str],
    text: str,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, *words]) == 2
    err = capsys.readouterr().err
    assert text in err and "qverify: error: " in err and err.count("\n") == 1


def test_without_matplotlib(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*command, "--eps", "1", "--plot", str(tmp_path / "p.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--plot needs matplotlib" in err and "pip install matplotlib" in err


def test_an_interrupted_run_keeps_its_rows(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    results = tmp_path / "r.csv"

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Decider, "single", interrupted)
        assert cli.main([*command, "--eps", "3", "--results", str(results)]) == 130
    assert f"the rows so far are in {results}; the same command goes on" in capsys.readouterr().err
    first = results.read_text()
    assert len(first.splitlines()) > 2
    assert cli.main([*command, "--eps", "3", "--results", str(results)]) == 0
    assert results.read_text().startswith(first) and len(results.read_text().splitlines()) == 2 + 30


def test_inputs_are_not_overwritten(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--eps", "1", "--json", command[1]]) == 2
    assert "would overwrite an input" in capsys.readouterr().err
    assert onnx.load(command[1]).graph.node


def test_the_figures_of_the_certified_networks_are_of_the_shipped_files() -> None:
    folder = EXAMPLES.parent.parent / "certified"
    table = [
        line
        for line in (folder / "README.md").read_text().splitlines()
        if line.startswith("| `onnx/")
    ]
    models = sorted((folder / "onnx").glob("*.onnx"))
    assert models and len(table) == len(models)
    for model in models:
        (row,) = (line for line in table if line.startswith(f"| `onnx/{model.name}` |"))
        document = json.loads((folder / f"{model.stem}.json").read_text())
        assert document["model"] == hashlib.sha256(model.read_bytes()).hexdigest()
        one, four = document["levels"]
        shown = [
            f"{100 * share:.2f}" for share in (one["clean"], one["certified"], four["certified"])
        ]
        assert " | ".join(["", *shown, f"{one['open']}, {four['open']} images", ""]) in row
        assert one["images"] == four["images"] == 10_000


def test_warnings_of_whoever_bounds_are_reported_once(
    small: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds that differ from the reference, for instance; every task may say it."""
    monkeypatch.setattr(Propagator, "take_warnings", lambda self: ["the kernels differ"])
    path, pixels, labels = small
    report = certify(path, pixels, labels, [1, 2], CPU)
    assert list(report.warnings).count("the kernels differ") == 1
