"""Labelled images from files: what robustness is measured on, and what networks are trained on.

Read are: NumPy archives (`.npz`), folders with the four IDX files of MNIST, and folders with one
folder of pictures for each class. Everything comes out in one form, uint8 pixels [N, channels,
height, width], in the order of the files. JPEG and PNG need Pillow (the extra `images`), the rest
NumPy alone.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.errors import UsageError
from qverify.files import Damaged, existing, unpacked

SPLITS = ("train", "test")
# MNIST and CIFAR-10, as their flat rows are usually stored.
FLAT = {784: (1, 28, 28), 3072: (3, 32, 32)}
CHANNELS = (1, 3)
IDX_BYTES = 2**32  # of an IDX file, unpacked
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")

Uint8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Images:
    """N labelled images: `pixels` uint8 [N, channels, height, width], 0 to 255.

    `labels` int64 [N], at least 0; `classes` the name of each label, where the files say.
    """

    pixels: Uint8Array
    labels: Int64Array
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4:
            raise ValueError("pixels must be uint8 [N, channels, height, width]")
        if self.labels.dtype != np.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError("labels must be int64 [N], one for each image")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def by_class(self) -> bool:
        """Whether the labels never fall: a part of such images is of a few classes only."""
        return bool((self.labels[1:] >= self.labels[:-1]).all())

    def mixed(self) -> Images:
        """The same images, shuffled (always alike) if they come by class.

        Then a part of them has all classes.
        """
        if not self.by_class:
            return self
        order = np.random.default_rng(0).permutation(len(self))
        return Images(self.pixels[order], self.labels[order], self.classes)

    def __getitem__(self, rows: slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows], self.classes)


def digest(pixels: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> str:
    """The SHA-256 of images and their labels, whatever files they came in."""
    result = hashlib.sha256(str(pixels.shape).encode())
    result.update(np.ascontiguousarray(pixels).data)
    result.update(labels.astype("<i8").tobytes())
    return result.hexdigest()


def load_images(path: str | Path, split: str = "test") -> Images:
    """The images of a data set's part `split`, "train" or "test".

    - `FILE.npz`: arrays `x_<split>` uint8 [N, n], [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1
      or 3, and `y_<split>` integers [N]. Flat rows of 784 are 1x28x28, of 3072 are 3x32x32 (channel
      by channel, as CIFAR-10 has them), of any other length n are 1x1xn. Instead of `x_<split>`
      there may be `<split>_jpeg`, JPEG files one after another (uint8), and `<split>_offset` [N +
      1], where each begins. `classes` may name the classes.
    - a folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`
      and `t10k-labels-idx1-ubyte` (MNIST's format, http://yann.lecun.com/exdb/mnist), also with
      `.gz`.
    - a folder `[<split>/]CLASS/*.png` (or .jpg, .jpeg, .bmp), images of one size. Without a folder
      `<split>` all images are meant. Classes are numbered in the order of their names, or by their
      names if these are numbers. Images are grey if all of them are, else RGB (transparency is
      dropped).

    Raises UsageError, one line, for what is missing or does not fit.
    """
    if split not in SPLITS:
        raise UsageError(f"no part '{split}' of a data set: use train or test")
    place = Path(path)
    if place.is_dir():
        images = _read_idx(place, split) or _read_folder(place, split)
    elif not place.exists():
        raise UsageError(f"{path}: there is no such file or folder of images")
    elif place.suffix == ".npz":
        images = _read_npz(place, split)
    else:
        raise UsageError(
            f"{path}: not a data set; a .npz file, a folder with IDX files or one with pictures is "
            "read"
        )
    if not len(images):
        raise UsageError(f"{path}: the part '{split}' holds no image")
    return images


# -- NumPy archives --------------------------------------------------------------------------------


def _read_npz(path: Path, split: str) -> Images:
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path}: it cannot be read as a NumPy archive ({_short(error)})"
        ) from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UsageError(f"{path}: it holds a single array, not an archive (numpy.savez)")
    with archive:
        labels = _labels(_array(path, archive, f"y_{split}"), f"{path}: 'y_{split}'")
        if f"{split}_jpeg" in archive and f"x_{split}" not in archive:
            data, offset = (
                _array(path, archive, f"{split}_jpeg"),
                _array(path, archive, f"{split}_offset"),
            )
            pixels = _decoded(path, data, offset, split)
        else:
            pixels = _shaped(_array(path, archive, f"x_{split}"), f"{path}: 'x_{split}'")
        names = (
            _array(path, archive, "classes").reshape(-1).tolist() if "classes" in archive else []
        )
    _check_lengths(path, pixels, labels)
    return Images(pixels, labels, tuple(map(str, names)))


def _array(path: Path, archive: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
    if name not in archive:
        raise UsageError(
            f"{path}: it holds no array '{name}', only {', '.join(sorted(archive)) or 'nothing'}"
        )
    try:
        return np.asarray(archive[name])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: its array '{name}' cannot be read ({_short(error)})") from None


def _shaped(x: npt.NDArray[Any], what: str) -> Uint8Array:
    """An array in any of the forms that are read as uint8 [N, C, H, W]."""
    if x.dtype != np.uint8:
        hint = "; multiply values in [0, 1] by 255 and round" if x.dtype.kind == "f" else ""
        raise UsageError(f"{what} is {x.dtype}, but pixels must be uint8, 0 to 255{hint}")
    if x.ndim == 2:
        return x.reshape(-1, *FLAT.get(x.shape[1], (1, 1, x.shape[1])))
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in CHANNELS:
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if x.ndim == 4 and x.shape[1] in CHANNELS:
        return x
    raise UsageError(
        f"{what} has shape {list(x.shape)}; [N, n], [N, H, W], [N, H, W, C] or [N, C, H, W] is "
        "read, C 1 or 3"
    )


def _labels(y: npt.NDArray[Any], what: str) -> Int64Array:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "ui" or y.ndim != 1:
        raise UsageError(
            f"{what} is {y.dtype} of shape {list(y.shape)}, but labels must be integers [N]"
        )
    if len(y) and y.min() < 0:
        raise UsageError(f"{what} holds the label {y.min()}; labels begin at 0")
    return y.astype(np.int64)


def _check_lengths(path: Path, pixels: Uint8Array, labels: Int64Array) -> None:
    if len(pixels) != len(labels):
        raise UsageError(f"{path}: {len(pixels)} images, but {len(labels)} labels")


def _decoded(
    path: Path, data: npt.NDArray[Any], offset: npt.NDArray[Any], split: str
) -> Uint8Array:
    """JPEG files one after another, decoded."""
    if (
        data.dtype != np.uint8
        or data.ndim != 1
        or offset.dtype.kind not in "ui"
        or offset.ndim != 1
    ):
        raise UsageError(
            f"{path}: '{split}_jpeg' must be uint8 [bytes] and '{split}_offset' integers [N + 1]"
        )
    places = offset.astype(np.int64)
    if not len(places) or places[0] < 0 or places[-1] > len(data) or (np.diff(places) <= 0).any():
        raise UsageError(
            f"{path}: '{split}_offset' does not rise within the {len(data)} bytes of '{split}_jpeg'"
        )
    raw = data.tobytes()
    spans = zip(places[:-1].tolist(), places[1:].tolist(), strict=True)
    return _pictures((f"{path}, image {i}", raw[a:b]) for i, (a, b) in enumerate(spans))


# -- IDX files -------------------------------------------------------------------------------------


def _read_idx(folder: Path, split: str) -> Images | None:
    """MNIST's files in a folder; None if there are none at all."""
    if not any(next(folder.glob(f"{name}-*-idx?-ubyte*"), None) for name in ("train", "t10k")):
        return None
    name = "train" if split == "train" else "t10k"
    pixels = _idx_file(folder, f"{name}-images-idx3-ubyte", 3)
    labels = _idx_file(folder, f"{name}-labels-idx1-ubyte", 1)
    _check_lengths(folder, pixels, labels.astype(np.int64))
    return Images(pixels[:, None], labels.astype(np.int64))


def _idx_file(folder: Path, name: str, axes: int) -> Uint8Array:
    """One file: 0, 0, 8 (uint8), the number of axes.

    Each length as four bytes, the largest first; the values.
    """
    path = existing(folder / name)
    try:
        data = unpacked(path, IDX_BYTES)
    except FileNotFoundError:
        raise UsageError(f"{folder}: it holds no {name} (or {name}.gz)") from None
    except (OSError, Damaged) as error:
        raise UsageError(f"{path}: it cannot be read ({_short(error)})") from None
    if data[:4] != bytes((0, 0, 8, axes)) or len(data) < 4 + 4 * axes:
        raise UsageError(f"{path}: not an IDX file of unsigned bytes with {axes} axes")
    shape = [int(n) for n in np.frombuffer(data, ">u4", axes, 4)]
    values = np.frombuffer(data, np.uint8, -1, 4 + 4 * axes)
    if len(values) != np.prod(shape, dtype=object):
        raise UsageError(
            f"{path}: its header announces {shape}, but {len(values)} values follow: truncated?"
        )
    return values.reshape(shape)


# -- pictures --------------------------------------------------------------------------------------


def _read_folder(folder: Path, split: str) -> Images:
    """`[<split>/]CLASS/*.png`."""
    place = folder / split if (folder / split).is_dir() else folder
    if place is folder and any((folder / name).is_dir() for name in SPLITS):
        raise UsageError(f"{folder}: it has no folder '{split}'")
    classes = _class_folders(place)
    names = list(classes)
    numbered = all(name.isascii() and name.isdigit() for name in names)
    numbers = [int(name) for name in names] if numbered else list(range(len(names)))
    labels = np.repeat(np.array(numbers, np.int64), [len(files) for files in classes.values()])
    pixels = _pictures((str(file), file) for files in classes.values() for file in files)
    return Images(pixels, labels, () if numbered else tuple(names))


def _class_folders(place: Path) -> dict[str, list[Path]]:
    """The pictures in every folder of a place, by the folder's name, in order.

    A folder with other files only is not a class, and hardly any data set has one: this is said
    before any picture is opened.
    """
    try:
        folders = sorted(
            (entry for entry in place.iterdir() if entry.is_dir() and entry.name[0] != "."),
            key=lambda entry: entry.name,
        )
        inside = {folder.name: sorted(folder.iterdir()) for folder in folders}
    except OSError as error:
        raise UsageError(f"{place}: it cannot be read ({_short(error)})") from None
    endings = ", ".join(PICTURES)
    found = {
        name: [file for file in files if file.suffix.lower() in PICTURES]
        for name, files in inside.items()
    }
    if not any(found.values()):
        raise UsageError(
            f"{place}: neither IDX files nor folders CLASS with {endings} files are in it"
        )
    for name, files in inside.items():
        if files and not found[name]:
            raise UsageError(
                f"{place}: not a data set: among its folders, '{name}' has no {endings} files"
            )
    return found


def _pictures(files: Iterator[tuple[str, bytes | Path]]) -> Uint8Array:
    """Decode pictures of one size, each with what to call it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(f"JPEG and PNG images need Pillow ({error}): pip install pillow") from None
    arrays: list[Uint8Array] = []
    for name, file in files:
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
                if picture.mode[0] in "IF":
                    raise UsageError(
                        f"{name}: more than 8 bits per pixel ({picture.mode}) are not read"
                    )
                array = np.asarray(
                    picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
                )
        # Pillow's errors for damaged files, of which it makes several kinds
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"{name}: it cannot be decoded ({_short(error)})") from None
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            sizes = " and ".join("x".join(map(str, a.shape[1::-1])) for a in (arrays[0], array))
            raise UsageError(f"{name}: images of different sizes, {sizes}; resize them first")
        arrays.append(array)
    if all(array.ndim == 2 for array in arrays):
        return np.stack(arrays)[:, None] if arrays else np.zeros((0, 1, 1, 1), np.uint8)
    coloured = [
        array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2) for array in arrays
    ]
    return np.ascontiguousarray(np.stack(coloured).transpose(0, 3, 1, 2))


def _short(error: BaseException) -> str:
    """An error's text in one line."""
    return (
        " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        or type(error).__name__
    )
