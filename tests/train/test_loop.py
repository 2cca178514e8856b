"""Training runs: they learn, they are reproducible, they survive being killed, and they say what is
wrong."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")

from qverify import cli  # noqa: E402
from qverify.data import load_images  # noqa: E402
from qverify.errors import QverifyError, UsageError  # noqa: E402
from qverify.train import loop  # noqa: E402
from qverify.train.codes import ActivationQuantizer  # noqa: E402
from qverify.train.config import Config, read_config  # noqa: E402
from qverify.train.loop import augmented, held_out, train, training_images  # noqa: E402
from qverify.train.precision import Goal, search_bits  # noqa: E402
from qverify.train.recipes import Qverify  # noqa: E402

LABELS = 3


def made_data(folder: Path, count: int = 400) -> Path:
    """Images of 6 x 6 whose class is the bright third, with noise."""
    rng = np.random.default_rng(0)
    parts: dict[str, Any] = {}
    for split, n in (("train", count), ("test", 90)):
        labels = rng.integers(0, LABELS, n)
        pixels = rng.integers(0, 60, (n, 6, 6))
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label : 2 * label + 2] += rng.integers(90, 180)
        parts |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels}
    path = folder / "thirds.npz"
    np.savez(path, **parts)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_data(tmp_path_factory.mktemp("data"))


def config(data: Path, **options: Any) -> Config:
    base: dict[str, Any] = {
        "data": str(data),
        "model": "mlp",
        "epochs": 4,
        "batch": 32,
        "held_out": 80,
        "threads": 1,
    }
    return Config(
        **(base | {"augment": "none", "rate": 3e-3, "mix": 0.5, "attack_steps": 0} | options)
    )


def weights(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)["network"]
    return state


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recipe": "paper", "rate": 3e-3},
        {"shrink": 0.4, "attack_steps": 2, "mix": 0.8, "regularise": 0.5},
        {"weight_bits": (8, 4, 8), "activation_bits": (4, 4)},
        {"norm": False, "format": "qdq"},
        {"activation_scale": "power-of-two", "weight_scale": "power-of-two", "norm": False},
    ],
    ids=["qverify", "paper", "small boxes", "4 bits", "plain", "power of two"],
)
def test_it_learns_and_exports(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    path = train(config(data, eps=4.0, epochs=8, **options), tmp_path / "run", said.append)
    assert path == tmp_path / "run" / "model.onnx"
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == [str(k) for k in range(1, 9)]
    last = {name: float(value) for name, value in rows[-1].items()}
    assert last["clean"] > 0.95 and last["certified"] > 0.8
    assert last["certified"] <= last["certified_1"] <= last["clean"]
    assert float(rows[0]["loss"]) > last["loss"] or options.get("recipe") == "paper"
    assert "equal to onnxruntime bit for bit on 90 test images" in said[-1]
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert about["qverify.eps"] == "4.0" and not any("thirds" in value for value in about.values())


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("eps", [1.0, 4.0])
def test_the_curves_of_a_run_are_drawn(eps: float, data: Path, tmp_path: Path) -> None:
    train(config(data, epochs=2, eps=eps), tmp_path)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options", [{"norm": False}, {"shrink": 0.5, "attack_steps": 1, "augment": "shift-flip"}]
)
def test_a_run_cut_off_anywhere_ends_in_the_same_weights(
    options: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    chosen = config(data, **options)
    train(chosen, tmp_path / "whole")

    def cut(steps: int) -> Callable[[float, str], None]:
        left = [steps]

        def progress(seconds: float, text: str) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        return progress

    for steps in (5, 13, 17):  # ten steps in an epoch
        with pytest.raises(KeyboardInterrupt):
            train(chosen, tmp_path / "parts", progress=cut(steps))
        assert not (tmp_path / "parts" / "model.onnx").exists()
    said: list[str] = []
    train(chosen, tmp_path / "parts", said.append)
    assert said[0] == "going on after epoch 2 of 4"
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    models = [(tmp_path / name / "model.onnx").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]


def test_images_sorted_by_class_are_shuffled(data: Path, tmp_path: Path) -> None:
    with np.load(data) as file:
        order = np.argsort(file["y_train"], kind="stable")
        (tmp_path / "s").mkdir()
        sorted_data = tmp_path / "s" / "sorted.npz"
        np.savez(
            sorted_data,
            **(dict(file) | {"x_train": file["x_train"][order], "y_train": file["y_train"][order]}),
        )
    images = training_images(config(sorted_data))
    assert set(images.labels[-80:].tolist()) == {0, 1, 2} and len(images) == 400
    plain = load_images(data, "train")
    assert np.array_equal(training_images(config(data)).labels, plain.labels)  # left as they are
    assert sorted(row.tobytes() for row in images.pixels) == sorted(
        row.tobytes() for row in plain.pixels
    )
    assert held_out(config(data, held_out=0), images) == 40


def test_the_seed_decides(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(data, epochs=1, seed=seed), tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_finished_run_is_left_alone(data: Path, tmp_path: Path) -> None:
    path = train(config(data, epochs=1), tmp_path)
    before = path.stat().st_mtime_ns
    said: list[str] = []
    train(config(data, epochs=1), tmp_path, said.append)
    assert said == [f"{tmp_path} holds this run already, finished after 1 epochs"]
    assert path.stat().st_mtime_ns == before


def test_another_run_is_not_touched(data: Path, tmp_path: Path) -> None:
    path = train(config(data, epochs=1), tmp_path)
    before = path.read_bytes()
    for gone in (False, True):
        if gone:
            (tmp_path / "config.toml").unlink()  # what it was is in the checkpoint as well
        with pytest.raises(UsageError, match=r"other settings \(epochs = 1 there, 2 here\)"):
            train(config(data, epochs=2), tmp_path)
    assert path.read_bytes() == before
    train(config(data, epochs=1), tmp_path)
    assert (tmp_path / "config.toml").read_text() == config(data, epochs=1).text()


def test_a_long_run_on_one_thread_is_told_of_more(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Config("d").threads == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for name, seconds, told in (("long", 0.0, 1), ("short", 600.0, 0)):
        monkeypatch.setattr(loop, "LONG", seconds)
        said: list[str] = []
        train(config(data, epochs=3, device="cpu"), tmp_path / name, said.append)
        assert sum("minutes are left; with --threads 8," in text for text in said) == told


def test_a_run_goes_on_with_other_threads(data: Path, tmp_path: Path) -> None:
    class Cut(Exception): ...

    def cut(text: str) -> None:
        if text.startswith("epoch 1 of 2"):
            raise Cut

    with pytest.raises(Cut):
        train(config(data, epochs=2, threads=1), tmp_path, cut)
    with pytest.raises(UsageError, match=r"other settings \(epochs = 2 there, 3 here\)"):
        train(config(data, epochs=3, threads=2), tmp_path)
    said: list[tuple[str, int]] = []
    before = torch.get_num_threads()
    train(
        config(data, epochs=2, threads=2, device="cpu"),
        tmp_path,
        lambda s: said.append((s, torch.get_num_threads())),
    )
    assert said[0][0] == "going on after epoch 1 of 2" and said[2][1] == 2
    assert said[1][0] == "with threads = 2, not 1 as before: the weights will differ slightly"
    assert torch.get_num_threads() == before
    finished = (tmp_path / "config.toml").read_text()
    assert "threads = 2" in finished
    # The finished run's settings stay what they were.
    train(config(data, epochs=2, threads=1), tmp_path)
    assert (tmp_path / "config.toml").read_text() == finished and 'device = "cpu"' in finished


def test_a_configuration_in_the_folder_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    settings = tmp_path / "config.toml"
    settings.write_text("# mine\nepochs = 1\n")
    with pytest.raises(UsageError, match=r"config\.toml has other settings, or is not a run's"):
        train(config(data, epochs=1), tmp_path)
    assert settings.read_text() == "# mine\nepochs = 1\n"


def test_another_model_is_another_setting(data: Path, tmp_path: Path) -> None:
    train(config(data, epochs=1), tmp_path)
    with pytest.raises(
        UsageError, match=r"other settings \(model = \"mlp\" there, \"resnet\" here\)"
    ):
        train(config(data, epochs=1, model="resnet"), tmp_path)


def test_the_datas_content_counts(data: Path, tmp_path: Path) -> None:
    """A run goes on wherever its data are, but not with others of the same name."""
    elsewhere = tmp_path / "elsewhere.npz"
    elsewhere.write_bytes(data.read_bytes())
    train(config(elsewhere, epochs=1), tmp_path / "run")
    said: list[str] = []
    train(config(data, epochs=1), tmp_path / "run", said.append)
    assert said == [f"{tmp_path / 'run'} holds this run already, finished after 1 epochs"]
    parts = dict(np.load(data))
    np.savez(elsewhere, **(parts | {"y_train": np.roll(parts["y_train"], 1)}))
    with pytest.raises(UsageError, match="the training images are not those of the run"):
        train(config(elsewhere, epochs=1), tmp_path / "run")


def test_a_setting_that_there_is_no_more_is_another_run(data: Path, tmp_path: Path) -> None:
    train(config(data, epochs=1), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"config": state["config"] + "gone = 3\n"}, tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match=r"other settings \(gone = 3 there, nothing here\)"):
        train(config(data, epochs=1), tmp_path)


def test_another_model_in_the_folder_is_not_the_runs(data: Path, tmp_path: Path) -> None:
    """One that replaces it is not taken for it: the run's is exported again."""
    other = train(config(data, epochs=1, seed=5), tmp_path / "other").read_bytes()
    path = train(config(data, epochs=1), tmp_path / "run")
    exported = path.read_bytes()
    path.write_bytes(other)
    said: list[str] = []
    assert (
        train(config(data, epochs=1), tmp_path / "run", said.append).read_bytes()
        == exported
        != other
    )
    assert said[0] == "going on after epoch 1 of 1" and said[1].startswith("exported")


def test_runs_and_searches_for_bits_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    train(config(data, epochs=1), tmp_path / "run")
    with pytest.raises(UsageError, match="holds a training run"):
        search_bits(config(data, epochs=1), tmp_path / "run", Goal(0.5))
    (tmp_path / "search" / "trials").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds a search for bits"):
        train(config(data, epochs=1), tmp_path / "search")


def test_a_broken_checkpoint_is_said(data: Path, tmp_path: Path) -> None:
    train(config(data, epochs=1), tmp_path)
    for text in (b"no checkpoint", b""):
        (tmp_path / "checkpoint.pt").write_bytes(text)
        with pytest.raises(UsageError, match=r"checkpoint\.pt is not a checkpoint"):
            train(config(data, epochs=1), tmp_path)
    torch.save([1, 2], tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="is not a checkpoint of a training run"):
        train(config(data, epochs=1), tmp_path)


def test_a_log_that_was_lost_is_written_again(data: Path, tmp_path: Path) -> None:
    train(config(data, epochs=2), tmp_path)
    whole = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text("epoch\n1\n")
    (tmp_path / "model.onnx").unlink()  # as after a kill between two files
    train(config(data, epochs=2), tmp_path)
    assert (tmp_path / "log.csv").read_text() == whole


def test_the_held_out_images_are_not_trained_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every other is, in every epoch, in another order."""
    seen: list[Any] = []
    loss = Qverify.loss

    def watched(self: Any, network: Any, pixels: Any, *rest: Any) -> Any:
        seen.append(pixels.flatten(1).numpy())
        return loss(self, network, pixels, *rest)

    monkeypatch.setattr(Qverify, "loss", watched)
    train(config(data, epochs=2), tmp_path)
    rows = np.concatenate(seen).reshape(2, -1, 36)
    images = load_images(data, "train").pixels.reshape(-1, 36).astype(np.float32)
    numbers = {image.tobytes(): k for k, image in enumerate(images)}
    first, second = ([numbers[row.tobytes()] for row in epoch] for epoch in rows)
    assert sorted(first) == sorted(second) == list(range(320)) and first != second


def test_augmented_images() -> None:
    pixels = torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4) + 1
    generator = torch.Generator().manual_seed(0)
    assert augmented(pixels, "none", generator) is pixels
    padded = torch.nn.functional.pad(pixels, [2, 2, 2, 2])
    seen = set()
    for kind in ("shift", "flip", "shift-flip"):
        for _ in range(60):
            moved = augmented(pixels, kind, generator)
            for before, after in zip(padded, moved, strict=True):
                places = {
                    (row, column, flip)
                    for row in range(5)
                    for column in range(5)
                    for flip in (False, True)
                    for part in (before[:, row : row + 4, column : column + 4],)
                    if torch.equal(after, part.flip(2) if flip else part)
                }
                assert len(places) == 1
                row, column, flip = next(iter(places))
                assert "flip" in kind or not flip
                assert "shift" in kind or (row, column) == (2, 2)
                seen |= places
    assert len(seen) > 40


def test_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'data = "x.npz"\neps = 2\nweight_bits = [8, 4]\nactivation_bits = 6\nnorm = true\n'
    )
    read = read_config(path, {"seed": 3})
    assert (read.data, read.eps) == (os.path.abspath("x.npz"), 2.0)
    assert (read.weight_bits, read.activation_bits) == ((8, 4), (6,))
    assert read.norm and read.seed == 3
    path.write_text(read.text())
    assert read_config(path, {}) == read


def test_a_run_that_starts_from_another(data: Path, tmp_path: Path) -> None:
    train(config(data, epochs=6), tmp_path / "first")
    start = str(tmp_path / "first" / "checkpoint.pt")
    train(
        config(data, epochs=1, rate=1e-4, weight_bits=(6, 5, 4), start_from=start),
        tmp_path / "second",
    )
    row = next(csv.DictReader((tmp_path / "second" / "log.csv").read_text().splitlines()))
    assert float(row["clean"]) > 0.9 and float(row["certified"]) > 0.6
    about = {
        entry.key: entry.value
        for entry in onnx.load(tmp_path / "second" / "model.onnx").metadata_props
    }
    assert about["qverify.weight_bits"] == "(6, 5, 4)" and str(tmp_path) not in str(about)
    with pytest.raises(UsageError, match="is of another network"):
        train(config(data, model="resnet", start_from=start), tmp_path / "other")
    (tmp_path / "first" / "checkpoint.pt").unlink()
    # Finished.
    train(
        config(data, epochs=1, rate=1e-4, weight_bits=(6, 5, 4), start_from=start),
        tmp_path / "second",
    )
    with pytest.raises(UsageError, match="cannot read"):
        train(config(data, start_from=start), tmp_path / "third")


def test_fewer_bits_of_the_papers_fixed_point_have_its_steps(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "paper", "epochs": 1}
    narrow: dict[str, Any] = {"weight_bits": (4,), "activation_bits": (4,)}
    train(config(data, **options), tmp_path / "first")
    start = {"start_from": str(tmp_path / "first" / "checkpoint.pt")}
    steps = []
    for name, more in (("from it", narrow | start), ("anew", narrow)):
        chosen = config(data, **(options | more))
        train(chosen, tmp_path / name)
        model = onnx.load(tmp_path / name / "model.onnx")
        scales = [
            numpy_helper.to_array(i)
            for i in model.graph.initializer
            if i.data_type == onnx.TensorProto.FLOAT
        ]
        steps.append(sorted(float(value) for scale in scales for value in scale.reshape(-1)))
    assert steps[0] == steps[1]


def test_fewer_bits_cover_the_same_ranges(data: Path, tmp_path: Path) -> None:
    """Learned steps and zero points of a run with 8 bits, taken over by one with 4 and 5."""
    options: dict[str, Any] = {"weight_scale": "learned", "epochs": 8}
    train(config(data, **options), tmp_path / "first")
    start = {"start_from": str(tmp_path / "first" / "checkpoint.pt"), "rate": 1e-9}
    narrow: dict[str, Any] = {"weight_bits": (5,), "activation_bits": (4,)}
    train(config(data, **(options | start | narrow | {"epochs": 1})), tmp_path / "second")
    row = next(csv.DictReader((tmp_path / "second" / "log.csv").read_text().splitlines()))
    assert float(row["clean"]) > 0.9  # without any training to speak of
    quantizer = ActivationQuantizer(8, relu=False)
    quantizer.scale.observe(torch.tensor(0.25))
    narrower = ActivationQuantizer(4, relu=False)
    narrower.load_state_dict(quantizer.state_dict())
    narrower.refit()
    assert int(narrower.zero) == 8 and float(narrower.scale().detach()) == pytest.approx(
        0.25 * 255 / 15
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eps = [", "is not a TOML file"),
        ("epsilon = 1", "no setting 'epsilon'"),
        ("eps = 'four'", "eps must be a number"),
        ("eps = nan", "eps must be a number"),
        ("eps = -1", "eps must lie between 0 and 255"),
        ("eps = 0.0314", "eps = 0.0314 is in pixels, from 0 to 255: is 8.007 meant?"),
        ("epochs = 1.5", "epochs must be a whole number"),
        ("epochs = 0", "epochs must be at least 1"),
        ("norm = 1", "norm must be true or false"),
        ("recipe = 'best'", "no recipe 'best': use one of qverify, paper"),
        ("format = 'tflite'", "no format 'tflite'"),
        ("weight_bits = ['8']", "weight_bits must be a whole number or a list"),
        ("boxed = 0", "boxed must be above 0"),
        ("least = 0.0", "least must be above 0"),
        ("per_channel = false", "set norm = false"),
        ("weight_scale = 'power-of-two'", "set norm = false"),
        ("shrink = 2", "shrink must lie between"),
        ("shrink = 0.5\nattack_steps = 0", "a box with shrink < 1 lies around an attacked point"),
        ("weight_scale = 'fixed'", "no weight_scale 'fixed'"),
        ("activation_scale = 'best'", "no activation_scale 'best'"),
        ("seed = 10000000000000000", "seed must lie between"),
    ],
)
def test_bad_configurations(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('data = "x.npz"\n' + text)
    with pytest.raises(UsageError, match=message):
        read_config(path, {})


def test_data_must_be_named() -> None:
    with pytest.raises(UsageError, match="the data set is missing"):
        read_config(None, {})


def changed(data: Path, folder: Path, **arrays: Any) -> str:
    with np.load(data) as file:
        parts = dict(file)
    parts |= arrays
    folder.mkdir()
    path = folder / "changed.npz"
    np.savez(path, **{name: value for name, value in parts.items() if value is not None})
    return str(path)


def test_bad_runs(data: Path, tmp_path: Path) -> None:
    with np.load(data) as file:
        labels, pixels, test = file["y_train"], file["x_train"], file["x_test"]
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({"model": "vit"}, "no model 'vit'"),
        (
            {"held_out": 390},
            "400 training images are too few to hold out 390 and fill a batch of 32",
        ),
        ({"model": "medium"}, "images of 6 x 6 are too small"),
        ({"data": str(tmp_path / "none.npz")}, "none.npz"),
        ({"device": "cuda"}, "--device cuda needs an NVIDIA GPU"),
        ({"data": changed(data, tmp_path / "a", x_test=None)}, "x_test"),
        (
            {"data": changed(data, tmp_path / "b", x_test=test.reshape(-1, 4, 9))},
            "are 1 x 6 x 6, those to be tested 1 x 4 x 9",
        ),
        (
            {"data": changed(data, tmp_path / "h", x_test=pixels[::-1], y_test=labels[::-1])},
            "the training images are the test images",
        ),
        (
            {"data": changed(data, tmp_path / "c", y_train=labels * 2)},
            "without gaps, at least two; there are 0, 2, 4",
        ),
        (
            {"data": changed(data, tmp_path / "d", y_train=labels * 0)},
            "without gaps, at least two; there are 0",
        ),
        ({"data": changed(data, tmp_path / "e", y_test=np.full(90, 3))}, "the label 3 is tested"),
        (
            {
                "data": changed(
                    data,
                    tmp_path / "f",
                    x_train=pixels.reshape(-1, 36),
                    x_test=test.reshape(-1, 36),
                ),
                "augment": "shift",
            },
            "cannot be shifted: use --augment none",
        ),
        (
            {
                "data": changed(data, tmp_path / "g", x_train=pixels[:, :5], x_test=test[:, :5]),
                "model": "resnet",
            },
            "it needs square ones",
        ),
    )
    for options, message in bad:
        if "device" in options and torch.cuda.is_available():
            continue
        with pytest.raises(QverifyError, match=message):
            train(replace(config(data), **options), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("curves")
def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = (
        f"train {data} --out {out} --model mlp --epochs 1 --batch 32 --weight-bits 8,4,8 --eps 2 "
        "--threads 1"
    )
    (tmp_path / "c.toml").write_text("held_out = 80\nepochs = 3\nmix = 0.5\n")
    assert cli.main([*words.split(), "--config", str(tmp_path / "c.toml")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out / 'model.onnx'}\n"
    assert "epoch 1 of 1: loss" in shown.err
    assert "weight_bits = [8, 4, 8]" in (out / "config.toml").read_text()
    assert cli.main([*words.split(), "--weight-bits", "8;4"]) == 2
    assert "numbers separated by commas" in capsys.readouterr().err
