"""Training runs: configuration, epochs, measurements, exact resumption, the exported model.

A run lives in one folder: `config.toml` (what was asked for), `checkpoint.pt` (after every epoch),
`log.csv` (a row for every epoch), `training.png` (its curves, where matplotlib is installed) and,
at the end, `model.onnx`. The same command goes on where it was cut off. All that is random in an
epoch is drawn from a generator seeded by the run's seed and the epoch's number, so that a resumed
run ends in the same weights, bit for bit, on the same machine with as many threads; it may go on
with others, in slightly other weights.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import math
import os
import pickle
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qverify import __version__, runtime
from qverify.data import Images, digest, load_images
from qverify.errors import DeviceError, UsageError
from qverify.files import write_bytes
from qverify.train import export
from qverify.train.codes import ActivationQuantizer
from qverify.train.config import Config
from qverify.train.curves import draw
from qverify.train.layers import Affine, QuantizedNetwork
from qverify.train.models import PAPER_INT_BITS, Precision, make_model
from qverify.train.recipes import Paper, Qverify, Recipe, box

MEASURED = 500  # images at once
LONG = 600.0  # seconds of training on one thread after which more of them are mentioned
FREEZE_AT = 0.8  # of the steps: from there on normalisation uses the population's statistics
CONFIG, CHECKPOINT, LOG, CURVES, MODEL = (
    "config.toml",
    "checkpoint.pt",
    "log.csv",
    "training.png",
    "model.onnx",
)
TRIALS = "trials"  # the runs of a search for bits
# A run may go on with others; of the data the content counts, not the place.
MACHINE = ("data", "device", "threads")


@dataclass
class TrainingRun:
    """A run in memory: the network, its optimiser, and the log's rows so far."""

    config: Config
    recipe: Recipe
    network: QuantizedNetwork
    optimiser: torch.optim.Optimizer
    images: Images
    test: Images
    device: torch.device
    rows: list[dict[str, float]]
    threads: int  # those before the run went on
    model: str = ""  # the exported file's SHA-256, once there is one

    @functools.cached_property
    def data(self) -> str:
        """The training images' SHA-256."""
        return digest(self.images.pixels, self.images.labels)

    @property
    def held_out(self) -> int:
        """How many images, the last ones, are not trained on."""
        return held_out(self.config, self.images)

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.rows)


def train(
    config: Config,
    out: str | os.PathLike[str],
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[float, str], None] = lambda seconds, text: None,
) -> Path:
    """TrainingRun the training, or go on with it, in the folder `out`.

    Returns the path of the exported model.

    `say` gets a line for every epoch, `progress` (seconds so far, a line) more often. The exported
    file is compared with the training graph in onnxruntime, where that is installed, bit for bit on
    all test images. Raises UsageError for settings or data that do not fit, and where `out` holds
    another run.
    """
    folder = Path(out)
    run = _open(config, folder)
    network = run.network
    kept = (
        run.epoch == config.epochs
        and (folder / MODEL).exists()
        and _sha256(folder / MODEL) == run.model
    )
    if kept:
        say(f"{folder} holds this run already, finished after {config.epochs} epochs")
    elif run.epoch:
        say(f"going on after epoch {run.epoch} of {config.epochs}")
        if run.threads != config.threads:
            say(
                f"with threads = {config.threads}, not {run.threads} as before: the weights will "
                "differ slightly"
            )
    elif 0 < config.eps < 1:
        say(f"warning: eps {config.eps:g} is in pixels, of which the range has 255")
    started = time.monotonic()
    kept_back = run.images[-run.held_out :]
    cores = torch.get_num_threads()
    with _settings(config):
        while run.epoch < config.epochs:
            seconds = time.monotonic()
            loss = _epoch(run, lambda text: progress(time.monotonic() - started, text))
            row = {"epoch": float(run.epoch + 1), "loss": loss} | measure(
                network, kept_back, config.eps, run.device
            )
            row["seconds"] = time.monotonic() - seconds
            run.rows.append(row)
            _save(run, folder)
            left = row["seconds"] * (config.epochs - run.epoch)
            parts = [f"{100 * row['certified_1']:.2f} % at eps 1"] if config.eps != 1 else []
            parts.append(f"{100 * row['certified']:.2f} % at {config.eps:g}")
            say(
                f"epoch {run.epoch} of {config.epochs}: loss {loss:.4f}, clean "
                f"{100 * row['clean']:.2f} %, certified by intervals {', '.join(parts)} (of "
                f"{len(kept_back):,} held-out images), {row['seconds']:.0f} s"
            )
            if (
                len(run.rows) == 1
                and left > LONG
                and config.threads == 1 < cores
                and run.device.type == "cpu"
            ):
                say(
                    f"about {left / 60:.0f} minutes are left; with --threads {cores}, fewer if "
                    "nothing else runs here"
                )
        if not kept:
            _export(run, folder, say)
            run.model = _sha256(folder / MODEL)
            _save(run, folder)
    return folder / MODEL


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _open(config: Config, folder: Path) -> TrainingRun:
    """A new run, or the one in the folder with its state."""
    if (folder / TRIALS).exists():
        raise UsageError(
            f"{folder} holds a search for bits, whose model is the smallest of many; name another "
            "folder"
        )
    device = _device(config.device)
    images, test = _data(config)
    torch.manual_seed(config.seed)
    network = make_network(config, images)
    recipe = _recipe(config)
    recipe.start(network)
    network.to(device)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=recipe.rate(0.0), weight_decay=recipe.weight_decay
    )
    run = TrainingRun(config, recipe, network, optimiser, images, test, device, [], config.threads)
    saved = folder / CHECKPOINT
    if saved.exists():
        state = _state(saved, device)
        if different := _difference(str(state.get("config")), config.text()):
            raise UsageError(
                f"{folder} holds a run with other settings ({different}); name another folder, or "
                "remove it"
            )
        if state.get("data", run.data) != run.data:
            raise UsageError(
                f"{config.data}: the training images are not those of the run in {folder}; name "
                "another folder, or remove it"
            )
        _load(saved, state, network)
        optimiser.load_state_dict(state["optimiser"])
        there = tomllib.loads(str(state["config"]))
        run.rows, run.model, run.threads = state["rows"], state.get("model", ""), there["threads"]
        if run.epoch == config.epochs:
            run.config = replace(config, **{name: there[name] for name in MACHINE})
    elif (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() != config.text().encode():
        raise UsageError(
            f"{folder / CONFIG} has other settings, or is not a run's; move it away, or name "
            "another folder"
        )
    elif config.start_from:
        _load(config.start_from, _state(config.start_from, device), network)
        for layer in network.modules():
            if isinstance(layer, Affine | ActivationQuantizer):
                layer.refit()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error
    write_bytes(str(folder / CONFIG), run.config.text().encode())
    return run


def _difference(there: str, here: str) -> str:
    """The settings that differ, but for the machine's, as `name = there, here`.

    Empty where there are none.
    """
    old = dict(line.partition(" = ")[::2] for line in there.splitlines())
    new = dict(line.partition(" = ")[::2] for line in here.splitlines())
    names = [
        name for name in {**new, **old} if old.get(name) != new.get(name) and name not in MACHINE
    ]
    values = [(name, old.get(name, "nothing"), new.get(name, "nothing")) for name in names[:3]]
    return "; ".join(f"{name} = {there} there, {here} here" for name, there, here in values)


def held_out(config: Config, images: Images) -> int:
    """How many of the training images, the last ones, are not trained on."""
    return config.held_out or min(5000, len(images) // 10)


def training_images(config: Config) -> Images:
    """The training images in the order that a run uses.

    Where the files have them by class, they are shuffled, always alike.
    """
    return load_images(config.data, "train").mixed()


def _data(config: Config) -> tuple[Images, Images]:
    """The training and the test images.

    UsageError where they do not fit each other or the configuration.
    """
    images, test = training_images(config), load_images(config.data, "test")
    kept = held_out(config, images)
    if len(images) < kept + config.batch:
        raise UsageError(
            f"{len(images)} training images are too few to hold out {kept} and fill a batch of "
            f"{config.batch}: choose a smaller --held-out or --batch"
        )
    if len(images) == len(test) and sorted(images.labels) == sorted(test.labels):
        order, other = (np.lexsort(part.pixels.reshape(len(part), -1).T) for part in (images, test))
        if np.array_equal(images.pixels[order], test.pixels[other]):
            raise UsageError(
                f"{config.data}: the training images are the test images; a folder needs train/ "
                "and test/"
            )
    if images.pixels.shape[1:] != test.pixels.shape[1:]:
        sizes = [" x ".join(map(str, part.pixels.shape[1:])) for part in (images, test)]
        raise UsageError(
            f"{config.data}: the training images are {sizes[0]}, those to be tested {sizes[1]}"
        )
    present = np.unique(images.labels)
    if len(present) < 2 or len(present) <= images.labels.max():
        names = ", ".join(map(str, present[:12]))
        raise UsageError(
            f"{config.data}: labels must be 0, 1, 2, ... without gaps, at least two; there are "
            f"{names}"
        )
    if test.labels.max() > images.labels.max():
        raise UsageError(
            f"{config.data}: the label {test.labels.max()} is tested, but not in the training "
            "images"
        )
    if "shift" in config.augment and min(images.pixels.shape[2:]) < 5:
        raise UsageError(
            "images of fewer than 5 rows or columns cannot be shifted: use --augment none"
        )
    return images, test


def _state(path: str | Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint. UsageError for a file that is none."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path} is not a checkpoint ({type(error).__name__}); it cannot be resumed"
        ) from None
    if not isinstance(state, dict) or not {"network", "config", "rows"} <= state.keys():
        raise UsageError(f"{path} is not a checkpoint of a training run; it cannot be resumed")
    return state


def _load(path: str | Path, state: dict[str, Any], network: QuantizedNetwork) -> None:
    """Put a checkpoint's weights into a network. UsageError for another network's."""
    try:
        network.load_state_dict(state["network"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is of another network ({type(error).__name__}); it cannot be resumed"
        ) from None


def make_network(config: Config, images: Images) -> QuantizedNetwork:
    """The network of a configuration, for these images, with the layers' own initial weights."""
    fixed = PAPER_INT_BITS.get(config.model, 2) if config.recipe == "paper" else None
    precision = Precision(
        config.weight_bits,
        config.activation_bits,
        config.input_bits,
        config.per_channel,
        config.weight_scale,  # type: ignore[arg-type]
        config.activation_scale,  # type: ignore[arg-type]
        config.symmetric,
        fixed,
    )
    channels, height, width = images.pixels.shape[1:]
    norm = config.norm and config.recipe != "paper"
    return make_model(
        config.model, (channels, height, width), int(images.labels.max()) + 1, precision, norm
    )


def _recipe(config: Config) -> Recipe:
    recipe: Paper | Qverify
    if config.recipe == "paper":
        recipe = Paper(config.eps, correct_only="cifar" not in config.model)
    else:
        recipe = Qverify(
            config.eps,
            mix=config.mix,
            shrink=config.shrink,
            boxed=config.boxed,
            least=config.least,
            attack_steps=config.attack_steps,
            past=config.past,
            regularise=config.regularise,
        )
    if config.rate:
        recipe = replace(recipe, peak_rate=config.rate)
    return replace(recipe, ramped=0.0) if config.start_from else recipe


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda needs an NVIDIA GPU and a PyTorch built for CUDA; or use --device cpu"
        )
    return torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )


@contextlib.contextmanager
def _settings(config: Config) -> Iterator[None]:
    """The threads asked for, deterministic kernels, and no TF32.

    Products of codes would not be exact in TF32.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    old, matmul, cudnn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul,
        torch.backends.cudnn,
    )
    tf32 = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    # What cuBLAS asks for to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(old)
        matmul.allow_tf32, cudnn.allow_tf32 = tf32


def _epoch(run: TrainingRun, progress: Callable[[str], None]) -> float:
    """Train for one epoch; returns the mean loss."""
    config, network, recipe = run.config, run.network, run.recipe
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + run.epoch)
    count = len(run.images) - run.held_out
    # A copy: files may be read-only.
    pixels = torch.from_numpy(run.images.pixels[:count].copy()).to(run.device)
    labels = torch.from_numpy(run.images.labels[:count].copy()).to(run.device)
    order = torch.randperm(count, generator=generator).to(run.device)
    steps = count // config.batch
    total = torch.zeros((), device=run.device)
    network.train()
    for step in range(steps):
        done = (run.epoch + step / steps) / config.epochs
        for layer in network.modules():
            if isinstance(layer, Affine):
                layer.frozen = done >= FREEZE_AT
        rows = order[step * config.batch : (step + 1) * config.batch]
        batch = augmented(pixels[rows].float(), config.augment, generator)
        for group in run.optimiser.param_groups:
            group["lr"] = recipe.rate(done)
        loss = recipe.loss(network, batch, labels[rows], done, generator)
        run.optimiser.zero_grad()
        torch.autograd.backward(loss)
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        run.optimiser.step()
        total += loss.detach()
        progress(f"epoch {run.epoch + 1} of {config.epochs}: {100 * (step + 1) // steps} %")
    mean = float(total) / steps
    if not math.isfinite(mean) or not all(
        bool(part.isfinite().all()) for part in network.parameters()
    ):
        raise UsageError(
            f"training diverged in epoch {run.epoch + 1} (loss {mean:g}); try a smaller --rate"
        )
    return mean


def augmented(pixels: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 2 pixels (zeros come in), mirrored with probability 1/2, both, or
    neither."""
    if kind == "none":
        return pixels
    count, _, height, width = pixels.shape
    images, device = torch.arange(count, device=pixels.device), pixels.device
    rows = torch.arange(2, 2 + height, device=device).expand(count, -1)
    columns = torch.arange(2, 2 + width, device=device).expand(count, -1)
    if "shift" in kind:
        places = torch.randint(-2, 3, (2, count, 1), generator=generator).to(device)
        rows, columns = rows + places[0], columns + places[1]
    if "flip" in kind:
        flip = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
        columns = torch.where(flip, columns.flip(1), columns)
    padded = functional.pad(pixels, [2, 2, 2, 2]).transpose(1, 3)
    return padded[images[:, None, None], columns[:, :, None], rows[:, None, :]].transpose(1, 3)


def measure(
    network: QuantizedNetwork, images: Images, eps: float, device: torch.device
) -> dict[str, float]:
    """Fractions of the images: `clean` ones, and those that intervals certify.

    These are certified at `eps` and at eps 1.
    """
    network.eval()
    counts = {"clean": 0, "certified_1": 0, "certified": 0}
    with torch.no_grad():
        for start in range(0, len(images), MEASURED):
            part = images[start : start + MEASURED]
            pixels = torch.from_numpy(part.pixels.copy()).to(device).float()
            labels = torch.from_numpy(part.labels.copy()).to(device)
            logits = network(pixels).logits
            counts["clean"] += int((logits.argmax(1) == labels).sum())
            for name, radius in (("certified_1", 1.0), ("certified", eps)):
                margins = network(None, *box(pixels, radius), labels).margins
                others = margins.scatter(1, labels[:, None], torch.inf)
                counts[name] += int((others.amin(1) > 0).sum())
    return {name: count / len(images) for name, count in counts.items()}


def _save(run: TrainingRun, folder: Path) -> None:
    """The checkpoint, then the log and the curves, each whole or as it was."""
    state = {
        "network": run.network.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "rows": run.rows,
        "config": run.config.text(),
        "data": run.data,
        "model": run.model,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(str(folder / CHECKPOINT), buffer.getvalue())
    _write_log(run, folder)


def _write_log(run: TrainingRun, folder: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(run.rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in run.rows)
    write_bytes(str(folder / LOG), text.getvalue().encode())
    config = run.config
    picture = draw(
        run.rows,
        config.eps,
        f"{config.model}, recipe {config.recipe}, eps {config.eps:g}, seed {config.seed}",
    )
    if picture is not None:
        write_bytes(str(folder / CURVES), picture)


def _export(run: TrainingRun, folder: Path, say: Callable[[str], None]) -> None:
    config = run.config
    about = {"qverify": __version__} | {
        f"qverify.{name}": str(value) for name, value in dataclasses.asdict(config).items()
    }
    for name in ("data", "start_from"):  # paths on this machine
        about.pop(f"qverify.{name}")
    path = folder / MODEL
    draft = path.with_name(f"draft.{MODEL}")
    export.export(run.network, draft, config.format, about)  # type: ignore[arg-type]
    try:
        test = run.test
        clean = float(
            np.mean(export.evaluate(run.network, test.pixels).argmax(axis=1) == test.labels)
        )
        if not runtime.available():
            say(
                f"exported, {100 * clean:.2f} % correct; not compared with the training graph, "
                "which needs onnxruntime"
            )
        elif runtime.saturates():
            say(
                f"exported, {100 * clean:.2f} % correct; not compared: onnxruntime's sums saturate "
                "on this CPU (no VNNI)"
            )
        else:
            compared = export.check(run.network, draft, test.pixels)
            say(
                f"exported; equal to onnxruntime bit for bit on {compared:,} test images, "
                f"{100 * clean:.2f} % correct"
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
