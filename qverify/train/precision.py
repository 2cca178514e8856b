"""How few bits the weights of a network need, by what the verifier still proves.

Greedy: the layer that would save most goes to the next smaller width, the network is trained on for
a few epochs, exported, and certified on held-out images; where enough of them are, the widths stay,
otherwise that layer keeps its own for good. Each trial is a training run of its own in
`OUT/trials`, so a search that was cut off goes on where it was.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qverify.errors import UsageError
from qverify.files import write_bytes
from qverify.options import Options
from qverify.robustness import certify
from qverify.train.config import Config
from qverify.train.layers import Affine
from qverify.train.loop import (
    CHECKPOINT,
    MODEL,
    TRIALS,
    held_out,
    make_network,
    train,
    training_images,
)

WIDTHS = (8, 6, 5, 4, 3, 2)
TABLE = "bits.csv"
RATE = 2e-4  # of the epochs after a layer lost bits


@dataclass(frozen=True)
class Goal:
    """What a network must keep: a fraction `certified` of the last held-out images.

    `images` says how many are the last ones; eps is the run's.

    Each image may take `timeout` seconds; `epochs` are trained after every change; `jobs` worker
    processes certify.
    """

    certified: float
    images: int = 200
    timeout: float = 10.0
    epochs: int = 2
    jobs: int = 1


@dataclass(frozen=True)
class Trial:
    """One choice of widths and what became of it."""

    bits: tuple[int, ...]
    size: int  # bits of all weights
    clean: float
    certified: float
    kept: bool
    folder: Path


def search_bits(
    config: Config,
    out: str | os.PathLike[str],
    goal: Goal,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[float, str], None] = lambda seconds, text: None,
) -> Path:
    """Train as `config` says, then take bits from the layers' weights while `goal` is met.

    Returns the smallest model.

    `out` receives the model and `bits.csv`, a row for every trial. Raises UsageError where the
    network misses the goal before it has lost a bit, and where `out` holds a training run.
    """
    folder = Path(out)
    if not 0 < goal.certified <= 1:
        raise UsageError(f"the target {goal.certified:g} is not a fraction of 1, such as 0.95")
    if (folder / CHECKPOINT).exists():
        raise UsageError(
            f"{folder} holds a training run, whose model would be lost; name another folder"
        )
    images = training_images(config)
    kept = held_out(config, images)
    if not 0 < goal.images <= kept:
        raise UsageError(
            f"{goal.images} images to certify are more than the {kept} held-out ones: choose fewer "
            "--images"
        )
    network = make_network(config, images)
    layers = tuple(layer.weight.numel() for layer in network.modules() if isinstance(layer, Affine))
    bits = (
        config.weight_bits
        if len(config.weight_bits) == len(layers)
        else config.weight_bits * len(layers)
    )
    best = _try(
        replace(config, weight_bits=bits), layers, folder / TRIALS / "start", goal, say, progress
    )
    write_bytes(str(folder / TABLE), _table([best], config.eps, goal))
    if not best.kept:
        raise UsageError(
            f"the network certifies {100 * best.certified:.1f} % at eps {config.eps:g} before any "
            f"bit is taken, less than the target {100 * goal.certified:.1f} %; train it longer, or "
            "lower the target"
        )
    trials, frozen = [best], set[int]()
    while len(frozen) < len(layers):
        saving = [
            (size * (width - _narrower(width)), k)
            for k, (size, width) in enumerate(zip(layers, best.bits, strict=True))
        ]
        _, layer = max((gain, k) for gain, k in saving if k not in frozen)
        width = _narrower(best.bits[layer])
        if width == best.bits[layer]:
            frozen.add(layer)
            continue
        bits = (*best.bits[:layer], width, *best.bits[layer + 1 :])
        changed = replace(
            config,
            weight_bits=bits,
            epochs=goal.epochs,
            rate=RATE,
            start_from=str(best.folder / CHECKPOINT),
        )
        trial = _try(
            changed, layers, folder / TRIALS / "-".join(map(str, bits)), goal, say, progress
        )
        trials.append(trial)
        write_bytes(str(folder / TABLE), _table(trials, config.eps, goal))
        if trial.kept:
            best = trial
        else:
            frozen.add(layer)
    write_bytes(str(folder / MODEL), (best.folder / MODEL).read_bytes())
    saved = 100 * (1 - best.size / trials[0].size)
    say(f"weights of {best.size / 8192:.1f} KiB, {saved:.0f} % less: {_spelled(best.bits)} bits")
    return folder / MODEL


def _narrower(width: int) -> int:
    return max((other for other in WIDTHS if other < width), default=width)


def _spelled(bits: tuple[int, ...]) -> str:
    return ", ".join(map(str, bits))


def _try(
    config: Config,
    layers: tuple[int, ...],
    folder: Path,
    goal: Goal,
    say: Callable[[str], None],
    progress: Callable[[float, str], None],
) -> Trial:
    """Train, export, certify; what is there already is not done again."""
    say(f"trial with {_spelled(config.weight_bits)} bits")
    model = train(config, folder, say, progress)
    images = training_images(config)[-goal.images :]
    report = certify(
        model,
        images.pixels,
        images.labels,
        config.eps,
        Options(timeout=goal.timeout, seed=config.seed, device=config.device),
        jobs=goal.jobs,
        results=str(folder / "certified.csv"),
        progress=progress,
    )
    (level,) = report.levels
    clean, certified = level.correct / level.images, level.certified / level.images
    size = sum(count * bits for count, bits in zip(layers, config.weight_bits, strict=True))
    kept = certified >= goal.certified
    error = math.sqrt(certified * (1 - certified) / level.images)
    say(
        f"{_spelled(config.weight_bits)} bits, {size / 8192:.1f} KiB: clean {100 * clean:.1f} %, "
        f"certified {100 * certified:.1f} % (standard error {100 * error:.1f}) of {level.images} "
        f"held-out images: {'kept' if kept else 'not enough'}"
    )
    return Trial(config.weight_bits, size, clean, certified, kept, folder)


def _table(trials: list[Trial], eps: float, goal: Goal) -> bytes:
    """A trial's figures: `certified` at `eps` pixels, `target` what was asked for.

    Accuracies are fractions of `images` held-out images.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["bits", "kib", "clean", "certified", "kept", "eps", "target", "images"])
    for trial in trials:
        bits, kept = " ".join(map(str, trial.bits)), "yes" if trial.kept else "no"
        figures = [f"{trial.size / 8192:.3f}", f"{trial.clean:.4f}", f"{trial.certified:.4f}"]
        table.writerow([bits, *figures, kept, f"{eps:g}", f"{goal.certified:g}", goal.images])
    return text.getvalue().encode()
