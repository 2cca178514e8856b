"""Data sets: every form that is read gives the same images, and what does not fit is one line."""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify.data import Images, load_images
from qverify.errors import UsageError

Image = pytest.importorskip("PIL.Image")  # a machine that is only lent for its GPU may lack it
SHARED = Path(__file__).parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 1, 6, 4), np.uint8)
COLOUR = RNG.integers(0, 256, (4, 3, 8, 6), np.uint8)
LABELS = np.array([2, 0, 1, 2, 9])


def check(images: Images, pixels: Any, labels: Any) -> None:
    assert images.pixels.dtype == np.uint8 and images.labels.dtype == np.int64
    assert np.array_equal(images.pixels, pixels) and np.array_equal(images.labels, labels)


# -- archives --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "pixels"),
    [
        (GREY[:, 0], GREY),
        (GREY.transpose(0, 2, 3, 1), GREY),
        (GREY, GREY),
        (GREY.reshape(5, 24), GREY.reshape(5, 1, 1, 24)),
        (COLOUR.transpose(0, 2, 3, 1), COLOUR),
        (COLOUR, COLOUR),
    ],
)
def test_forms_of_arrays(x: Any, pixels: Any, tmp_path: Path) -> None:
    labels = LABELS[: len(x)]
    np.savez(
        tmp_path / "d.npz",
        x_test=x,
        y_test=labels.astype(np.uint8),
        x_train=x[::-1],
        y_train=labels[::-1, None],
    )
    check(load_images(tmp_path / "d.npz"), pixels, labels)
    check(load_images(str(tmp_path / "d.npz"), "train"), pixels[::-1], labels[::-1])


@pytest.mark.parametrize(("length", "shape"), [(784, (1, 28, 28)), (3072, (3, 32, 32))])
def test_flat_rows_of_known_lengths(length: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (2, length), np.uint8)
    np.savez_compressed(tmp_path / "d.npz", x_test=x, y_test=[1, 0], classes=["cat", "dog"])
    images = load_images(tmp_path / "d.npz")
    check(images, x.reshape(2, *shape), [1, 0])
    assert images.classes == ("cat", "dog")
    assert len(images[1:]) == 1 and images[1:].labels[0] == 0


def png(array: Any, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def test_jpeg_in_an_archive(tmp_path: Path) -> None:
    files = [png(image.transpose(1, 2, 0), "JPEG") for image in COLOUR]
    data = np.frombuffer(b"".join(files), np.uint8)
    offset = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "d.npz", test_jpeg=data, test_offset=offset, y_test=LABELS[:4])
    expected = np.stack([np.asarray(Image.open(io.BytesIO(f))).transpose(2, 0, 1) for f in files])
    check(load_images(tmp_path / "d.npz"), expected, LABELS[:4])


def archive(**arrays: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "d.npz", **arrays)
        return folder / "d.npz"

    return make


def raw(data: bytes, name: str = "d.npz") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def single(folder: Path) -> Path:
    with open(folder / "d.npz", "wb") as stream:
        np.save(stream, GREY)
    return folder / "d.npz"


JPEG = np.frombuffer(png(GREY[0, 0], "JPEG"), np.uint8)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: folder / "absent.npz", "there is no such file"),
        (raw(b"PK nonsense"), "cannot be read as a NumPy archive"),
        (raw(b""), "cannot be read as a NumPy archive"),
        (raw(b"a,b", "d.csv"), "not a data set"),
        (single, "a single array"),
        (archive(x_test=GREY), "no array 'y_test', only x_test"),
        (archive(y_test=LABELS), "no array 'x_test', only y_test"),
        (
            archive(x_test=GREY / 255, y_test=LABELS),
            "float64, but pixels must be uint8, 0 to 255; multiply",
        ),
        (archive(x_test=GREY.astype(np.int64), y_test=LABELS), "int64, but pixels must be uint8"),
        (archive(x_test=GREY[0, 0, 0], y_test=LABELS), r"shape \[4\]"),
        (archive(x_test=np.zeros((5, 2, 2, 2), np.uint8), y_test=LABELS), r"shape \[5, 2, 2, 2\]"),
        (archive(x_test=GREY, y_test=LABELS[:4]), "5 images, but 4 labels"),
        (archive(x_test=GREY, y_test=LABELS / 2), "labels must be integers"),
        (archive(x_test=GREY, y_test=LABELS - 1), "the label -1"),
        (archive(x_test=GREY, y_test=LABELS.astype(object)), "'y_test' cannot be read"),
        (archive(x_test=GREY[:0], y_test=LABELS[:0]), "holds no image"),
        (archive(test_jpeg=JPEG, test_offset=[0, 10**6], y_test=[1]), "does not rise within"),
        (archive(test_jpeg=JPEG, test_offset=[0, 0], y_test=[1]), "does not rise within"),
        (
            archive(test_jpeg=JPEG, test_offset=[0, len(JPEG)], y_test=[1, 2]),
            "1 images, but 2 labels",
        ),
        (archive(test_jpeg=JPEG, test_offset=[0.0, 9.0], y_test=[1]), "must be uint8"),
        (
            archive(test_jpeg=JPEG, test_offset=[0, 100], y_test=[1]),
            "image 0: it cannot be decoded",
        ),
    ],
)
def test_bad_archives(make: Callable[[Path], Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        load_images(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_split_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no part 'validation'"):
        load_images(tmp_path, "validation")


def test_images_are_checked() -> None:
    with pytest.raises(ValueError, match="pixels"):
        Images(GREY[:, 0], LABELS)
    with pytest.raises(ValueError, match="labels"):
        Images(GREY, LABELS[:2])


# -- IDX -------------------------------------------------------------------------------------------


def idx(array: Any) -> bytes:
    head = bytes((0, 0, 8, array.ndim))
    return b"".join(
        [head, *(n.to_bytes(4, "big") for n in array.shape), array.astype(np.uint8).tobytes()]
    )


@pytest.mark.parametrize("packed", [False, True])
def test_idx(packed: bool, tmp_path: Path) -> None:
    for name, rows in (("train", slice(None)), ("t10k", slice(2, None))):
        for kind, array in (("images-idx3", GREY[rows, 0]), ("labels-idx1", LABELS[rows])):
            data = idx(array)
            path = tmp_path / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
    check(load_images(tmp_path, "train"), GREY, LABELS)
    check(load_images(tmp_path), GREY[2:], LABELS[2:])


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (idx(GREY[:, 0])[:-1], idx(LABELS), "truncated"),
        (idx(GREY[:, 0]) + b"x", idx(LABELS), "truncated"),
        (idx(GREY[:, 0])[:9], idx(LABELS), "not an IDX file"),
        (b"", idx(LABELS), "not an IDX file"),
        (idx(LABELS), idx(LABELS), "with 3 axes"),
        (idx(GREY[:, 0]), idx(LABELS[:3]), "5 images, but 3 labels"),
        (idx(GREY[:, 0]), None, "no t10k-labels-idx1-ubyte"),
    ],
)
def test_bad_idx(images: bytes, labels: bytes | None, text: str, tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(images)
    if labels is not None:
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(UsageError, match=text):
        load_images(tmp_path)


@pytest.mark.parametrize(
    "data", [b"no gzip", gzip.compress(idx(LABELS))[:-9]], ids=["another", "truncated"]
)
def test_damaged_gzip(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(UsageError, match=r"idx3-ubyte\.gz: (it cannot be read|not an IDX file)"):
        load_images(tmp_path)


# -- pictures --------------------------------------------------------------------------------------


def pictures(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_pictures(tmp_path: Path) -> None:
    a, b = GREY[0, 0], GREY[1, 0]
    files = {
        "test/dog/1.png": png(a),
        "test/cat/2.PNG": png(b),
        "test/cat/1.png": png(a),
        "test/cat/notes.txt": b"",
        "test/.cache/notes.txt": b"",
    }
    images = load_images(pictures(tmp_path, {**files, "train/cat/1.png": png(b)}))
    check(images, np.stack([a, b, a])[:, None], [0, 0, 1])
    assert images.classes == ("cat", "dog")
    check(load_images(tmp_path, "train"), b[None, None], [0])


def test_folders_named_by_numbers_are_labels(tmp_path: Path) -> None:
    files = {
        "10/a.png": png(GREY[0, 0]),
        "2/a.png": png(GREY[1, 0]),
        "2/b.jpg": png(GREY[2, 0], "JPEG"),
    }
    for split in ("train", "test"):
        images = load_images(pictures(tmp_path, files), split)
        assert images.labels.tolist() == [10, 2, 2] and images.classes == ()


def test_colours(tmp_path: Path) -> None:
    colour = COLOUR[0].transpose(1, 2, 0)
    alpha = np.concatenate([colour, np.full((8, 6, 1), 7, np.uint8)], axis=2)
    files = {"0/a.png": png(colour), "1/a.png": png(alpha), "2/a.png": png(colour[:, :, 0])}
    grey = np.repeat(COLOUR[0][:1], 3, axis=0)
    check(load_images(pictures(tmp_path, files)), np.stack([COLOUR[0], COLOUR[0], grey]), [0, 1, 2])


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"notes.txt": b""}, "neither IDX files nor folders"),
        ({"cat/a.txt": b""}, "neither IDX files nor folders"),
        (
            {"docs/a.png": b"", "src/a.py": b""},
            "not a data set: among its folders, 'src' has no .png",
        ),
        ({"train/cat/a.png": png(GREY[0, 0])}, "it has no folder 'test'"),
        ({"train/a.png": png(GREY[0, 0])}, "it has no folder 'test'"),
        ({"cat/a.png": b"no picture"}, "cat.a.png: it cannot be decoded"),
        ({"cat/a.png": png(GREY[0, 0])[:50]}, "cat.a.png: it cannot be decoded"),
        (
            {"cat/a.png": png(GREY[0, 0]), "cat/b.png": png(GREY[0, 0, :3])},
            "different sizes, 4x6 and 4x3",
        ),
        ({"cat/a.png": png(GREY[0, 0].astype(np.uint16))}, "more than 8 bits"),
    ],
)
def test_bad_folders(files: dict[str, bytes], text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        load_images(pictures(tmp_path, files))
    assert "\n" not in str(caught.value)


def test_an_empty_class_keeps_its_number(tmp_path: Path) -> None:
    folder = pictures(tmp_path, {"a/1.png": png(GREY[0, 0]), "c/1.png": png(GREY[1, 0])})
    (folder / "b").mkdir()
    assert load_images(folder).labels.tolist() == [0, 2]


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for where there are pictures of classes, not where a folder is no data set."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match="not a data set"):
        load_images(pictures(tmp_path / "other", {"docs/a.png": b"", "src/a.py": b""}))
    with pytest.raises(UsageError, match=r"need Pillow.*pip install pillow"):
        load_images(pictures(tmp_path / "data", {"cat/a.png": b""}))


# -- real files ------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared/data is not here")
@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10_jpeg", (3, 32, 32))])
def test_real_files(name: str, shape: tuple[int, ...]) -> None:
    images = load_images(SHARED / f"{name}.npz")
    assert images.pixels.shape == (10_000, *shape)
    assert np.bincount(images.labels).shape == (10,)
    assert 25 < images.pixels.mean() < 130
