"""Which choices of the trainer matter? The same network and budget, one setting changed at a time.

    python benchmarks/training.py --mnist mnist.npz --fashion fashion_mnist.npz [--runs DIR] [--only
    NAME ...] python benchmarks/training.py --cifar FOLDER --model paper-cifar --only default
    'recipe of 2023' \
        --device cuda --epochs 100 --images 10000 --out paper.csv

Every variant is trained from the same seed with one thread, exported, and its file is certified by
`qverify robustness` on the first test images at 1/255 and 4/255. Rows go to `results/training.csv`
as they come; those that are there, with the same epochs, images, time limit and device, are not
made again. `attacked` counts the images without a counterexample, so `certified` is at most that,
and what lies between is open. The second command puts both recipes side by side on an architecture
of the 2023 paper (`paper-mnist`, `paper-fashion`, `paper-cifar`), which wants a GPU.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from qverify.data import load_images
from qverify.options import Options
from qverify.robustness import certify
from qverify.train.config import read_config
from qverify.train.loop import LOG, train

RESULTS = Path(__file__).parent / "results" / "training.csv"
EPS = (1, 4)
AUGMENT = {"mnist": "shift", "fashion": "flip", "cifar": "shift-flip"}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "box only": {"mix": 1.0, "attack_steps": 0},
    "mix 0.5": {"mix": 0.5},
    "mix 0.02": {"mix": 0.02},
    "attack only": {"mix": 0.0},
    "clean images instead of attacked": {"attack_steps": 0},
    "boxes of half the radius": {"shrink": 0.5},
    "one radius": {"least": 1.0},
    "a box for every image": {"boxed": 1.0},
    "eps up to 1.25 times the target": {"past": 1.25},
    "no normalisation": {"norm": False},
    "regularisers": {"regularise": 0.5},
    "power-of-two scales (no normalisation)": {
        "norm": False,
        "weight_scale": "power-of-two",
        "activation_scale": "power-of-two",
    },
    "one weight scale per layer (no normalisation)": {"norm": False, "per_channel": False},
    "4-bit weights": {"weight_bits": (4,)},
    "4-bit weights and activations": {"weight_bits": (4,), "activation_bits": (4,)},
    "recipe of 2023": {"recipe": "paper"},
}
FIGURES = [f"{what}_{eps}" for eps in EPS for what in ("intervals", "attacked", "certified")]
COLUMNS = (
    "data",
    "variant",
    "model",
    "device",
    "epochs",
    "images",
    "timeout",
    "training_seconds",
    "clean",
    *FIGURES,
)


def measured(
    name: str, variant: dict[str, Any], data: Path, run: Path, words: argparse.Namespace
) -> dict[str, str]:
    """Train one variant on the data set `name` and certify its file; accuracies in percent."""
    settings = {"data": str(data), "model": words.model, "epochs": words.epochs, "threads": 1}
    settings |= {"augment": AUGMENT[name], "device": words.device}
    model = train(read_config(None, settings | variant), run)
    seconds = sum(float(row["seconds"]) for row in csv.DictReader((run / LOG).open(newline="")))
    images = load_images(data, "test").mixed()
    options = Options(timeout=words.timeout, device=words.device)
    report = certify(model, images.pixels, images.labels, EPS, options, limit=words.images)
    row = {
        "training_seconds": f"{seconds:.0f}",
        "clean": f"{100 * report.levels[0].correct / report.levels[0].images:.2f}",
    }
    for level in report.levels:
        counts = {
            "intervals": level.stages["intervals"],
            "attacked": level.attacked,
            "certified": level.certified,
        }
        row |= {
            f"{what}_{level.eps}": f"{100 * count / level.images:.2f}"
            for what, count in counts.items()
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in AUGMENT:
        parser.add_argument(f"--{name}", type=Path, metavar="DATA")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="a folder for the runs [runs]"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--model", default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument(
        "--timeout", type=float, default=2.0, help="seconds for an image in the search [2]"
    )
    words = parser.parse_args()
    sets = {name: path for name in AUGMENT if (path := getattr(words, name))}
    if not sets:
        parser.error(f"name a data set: {', '.join(f'--{name}' for name in AUGMENT)}")
    rows = list(csv.DictReader(words.out.open(newline=""))) if words.out.exists() else []
    for variant in words.only:
        for name, data in sets.items():
            key = {"data": name, "variant": variant, "model": words.model}
            key |= {"device": words.device, "epochs": str(words.epochs)}
            key |= {"images": str(words.images), "timeout": f"{words.timeout:g}"}
            if any(key.items() <= row.items() for row in rows):
                continue
            run = (
                words.runs
                / f"{name} {variant} {words.model} {words.device} {words.epochs}".replace(" ", "_")
            )
            rows.append(key | measured(name, VARIANTS[variant], data, run, words))
            print(rows[-1], file=sys.stderr, flush=True)
            words.out.parent.mkdir(parents=True, exist_ok=True)
            with words.out.open("w", newline="") as stream:
                table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)


if __name__ == "__main__":
    main()
