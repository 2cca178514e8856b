"""Make the certified networks of this folder: train them by their TOML files, export, and write
properties.

    pip install '.[train,plot]'
    python make_certified.py --mnist mnist.npz --fashion fashion_mnist.npz [--runs DIR] [--out DIR]

The archives hold `x_train`, `y_train`, `x_test`, `y_test`. Each `NAME.toml` is a configuration of
`qverify train`; a run that was cut off goes on, and a finished one is taken as it is. For the first
images of the test set that a network classifies correctly, `vnnlib/SET_IMAGE_eps_R.vnnlib.gz` is
the ball of radius R/255 around the image within [0, 1]; unsafe is any other class that wins or
ties. SET is what NAME begins with, `mnist` or `fashion`.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qverify.data import load_images
from qverify.runtime import Session
from qverify.train.config import read_config
from qverify.train.loop import train

HERE = Path(__file__).parent
DIGITS = 12  # of the decimals in the properties; rounded outwards
RADII = (1, 4)
IMAGES = 4
TIMEOUT = 60


def decimal(value: Fraction, up: bool) -> str:
    """A decimal at most 10**-DIGITS away from the value, above or below it."""
    scaled = value * 10**DIGITS
    whole = (
        -((-scaled.numerator) // scaled.denominator)
        if up
        else scaled.numerator // scaled.denominator
    )
    return f"{whole // 10**DIGITS}.{whole % 10**DIGITS:0{DIGITS}d}"


def specification(pixels: npt.NDArray[np.uint8], label: int, radius: int, classes: int) -> str:
    """The ball around an image, and the classes that may not reach the label's score."""
    flat = [int(pixel) for pixel in pixels.reshape(-1)]
    lines = [f"; label {label}, every pixel within {radius}/255\n"]
    lines += [f"(declare-const X_{k} Real)\n" for k in range(len(flat))]
    lines += [f"(declare-const Y_{k} Real)\n" for k in range(classes)]
    for k, pixel in enumerate(flat):
        low, high = Fraction(max(pixel - radius, 0), 255), Fraction(min(pixel + radius, 255), 255)
        lines.append(
            f"(assert (>= X_{k} {decimal(low, False)}))\n(assert (<= X_{k} "
            f"{decimal(high, True)}))\n"
        )
    others = " ".join(f"(and (>= Y_{k} Y_{label}))" for k in range(classes) if k != label)
    return "".join([*lines, f"(assert (or {others}))\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--fashion", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=HERE)
    words = parser.parse_args()
    folders = [words.out / name for name in ("onnx", "vnnlib")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in sorted(HERE.glob("*.toml")):
        kind = path.stem.partition("_")[0]
        data = {"mnist": words.mnist, "fashion": words.fashion}[kind]
        config = read_config(path, {"data": str(data)})
        run = words.runs / path.stem
        model = train(config, run, lambda text: print(text, file=sys.stderr, flush=True))
        shutil.copyfile(model, folders[0] / f"{path.stem}.onnx")
        if (run / "training.png").exists():  # without matplotlib there is none
            shutil.copyfile(run / "training.png", words.out / f"{path.stem}.png")
        images = load_images(data, "test")
        (scores,) = Session(model).run([images.pixels[:100].astype(np.float32) / np.float32(255)])
        right = np.flatnonzero(scores.argmax(axis=1) == images.labels[:100])[:IMAGES]
        for image in right:
            for radius in RADII:
                name = f"{kind}_{image}_eps_{radius}.vnnlib.gz"
                text = specification(
                    images.pixels[image], int(images.labels[image]), radius, scores.shape[1]
                )
                (folders[1] / name).write_bytes(gzip.compress(text.encode(), mtime=0))
                rows.append(f"onnx/{path.stem}.onnx,vnnlib/{name},{TIMEOUT}\n")
    (words.out / "instances.csv").write_text("".join(rows))


if __name__ == "__main__":
    main()
