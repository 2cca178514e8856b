"""The search for bit widths: it keeps its promise on the verifier's word, and goes on where it
was."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import onnx
import pytest

torch = pytest.importorskip("torch")

from qverify import cli  # noqa: E402
from qverify.data import load_images  # noqa: E402
from qverify.errors import UsageError  # noqa: E402
from qverify.robustness import certify  # noqa: E402
from qverify.train.config import Config  # noqa: E402
from qverify.train.precision import Goal, search_bits  # noqa: E402
from tests.train.test_loop import made_data  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_data(tmp_path_factory.mktemp("data"))


def config(data: Path, **options: Any) -> Config:
    base: dict[str, Any] = {
        "model": "mlp",
        "epochs": 5,
        "batch": 32,
        "held_out": 80,
        "threads": 1,
        "rate": 3e-3,
    }
    base |= {"augment": "none", "device": "cpu", "mix": 0.5, "attack_steps": 0}
    return Config(str(data), **(base | options))


def test_bits_are_taken_while_the_target_is_certified(data: Path, tmp_path: Path) -> None:
    chosen, goal = config(data), Goal(0.8, images=40, epochs=1)
    said: list[str] = []
    path = search_bits(chosen, tmp_path, goal, said.append)
    rows = list(csv.DictReader((tmp_path / "bits.csv").read_text().splitlines()))
    kept = [row for row in rows if row["kept"] == "yes"]
    assert rows[0]["bits"] == "8 8 8" and len(kept) > 2
    assert all((float(row["certified"]) >= 0.8) == (row["kept"] == "yes") for row in rows)
    assert {(row["eps"], row["target"], row["images"]) for row in rows} == {
        (f"{chosen.eps:g}", "0.8", str(goal.images))
    }
    sizes = [float(row["kib"]) for row in kept]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.8 * sizes[0]

    bits = tuple(map(int, kept[-1]["bits"].split()))
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert about["qverify.weight_bits"] == str(bits)
    weights = [
        tensor for tensor in onnx.load(path).graph.initializer if tensor.name.startswith("weight")
    ]
    for width, layer in zip(bits, weights, strict=True):  # the codes really need no more
        assert abs(onnx.numpy_helper.to_array(layer)).max() < 2 ** (width - 1)
    images = load_images(data, "train")[-40:]
    (level,) = certify(path, images.pixels, images.labels, chosen.eps).levels
    assert level.certified / 40 == float(kept[-1]["certified"])

    before = path.read_bytes()
    marks = {file: file.stat().st_mtime_ns for file in (tmp_path / "trials").rglob("checkpoint.pt")}
    # From what is there: nothing is trained again.
    assert search_bits(chosen, tmp_path, goal).read_bytes() == before
    assert marks == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "trials").rglob("checkpoint.pt")
    }


def test_a_target_out_of_reach(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="before any bit is taken, less than the target"):
        search_bits(config(data, epochs=1, eps=60.0, rate=1e-5), tmp_path, Goal(0.99, images=20))
    assert not (tmp_path / "model.onnx").exists()
    with pytest.raises(UsageError, match="81 images to certify are more than the 80"):
        search_bits(config(data), tmp_path, Goal(0.9, images=81))


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text("held_out = 80\nrate = 3e-3\naugment = 'none'\nmix = 0.5\n")
    words = [
        "train",
        str(data),
        "--config",
        str(tmp_path / "c.toml"),
        "--out",
        str(tmp_path / "out"),
        "--model",
        "mlp",
    ]
    words += ["--epochs", "3", "--batch", "32", "--threads", "1", "--search-bits"]
    assert cli.main(words) == 2
    assert "--search-bits and --target go together" in capsys.readouterr().err
    assert cli.main([*words, "--target", "0.7", "--images", "30"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out' / 'model.onnx'}\n"
    assert "trial with 8, 8, 8 bits" in shown.err and "% less" in shown.err
