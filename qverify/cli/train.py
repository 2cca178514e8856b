"""The command `qverify train`. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import click

from qverify.cli.options import Command
from qverify.errors import UsageError
from qverify.printer import Printer
from qverify.train.config import AUGMENTS, DEVICES, FORMATS, RECIPES, Config, read_config

_EPILOG = (
    "\b\nOUT receives config.toml, log.csv, training.png, checkpoint.pt after every epoch, and at "
    "the end model.onnx. The\n"
    "same command goes on with a run that was cut off. Then: qverify robustness OUT/model.onnx "
    "DATA --eps 1 4"
)


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}


def _setting(name: str, help: str, **options: Any) -> Callable[[Command], Command]:
    """An option that the configuration has as well: without it the file, or the default there,
    decides."""
    default = _DEFAULTS[name.removeprefix("--").replace("-", "_")]
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return click.option(name, default=None, help=f"{help} [{shown}]", **options)


@click.command(
    "train", short_help="Train a certifiably robust quantized classifier.", epilog=_EPILOG
)
@click.argument("data", required=False, type=click.Path())
@click.option("--out", metavar="DIR", type=click.Path(), required=True, help="The run's folder.")
@click.option(
    "--config",
    "config_file",
    metavar="TOML",
    type=click.Path(),
    help="Settings by name (eps = 4.0, ...); options win.",
)
@_setting(
    "--model",
    metavar="NAME",
    help="mlp, small, wide, medium, cnn7, resnet, paper-{mnist,fashion,cifar}.",
)
@_setting("--recipe", type=click.Choice(RECIPES), help="Ours, or QA-IBP as published in 2023.")
@_setting("--eps", type=float, metavar="PIXELS", help="Perturbation to be certified, of 255.")
@_setting("--epochs", type=int, metavar="N", help="Passes over the data.")
@_setting("--batch", type=int, metavar="N", help="Images in a step.")
@_setting(
    "--held-out", type=int, metavar="N", help="Training images kept back for the log; 0: a tenth."
)
@_setting("--rate", type=float, metavar="R", help="Peak learning rate; 0: the recipe's.")
@_setting("--seed", type=int, metavar="N", help="Seed of every random choice.")
@_setting("--augment", type=click.Choice(AUGMENTS), help="Random changes of the images.")
@_setting("--mix", type=float, metavar="M", help="Weight of the box's loss, between 0 and 1.")
@_setting(
    "--shrink",
    type=float,
    metavar="S",
    help="Radius of the box in the loss, as a part of its ball's.",
)
@_setting(
    "--attack-steps",
    type=int,
    metavar="N",
    help="Steps of the attack that the network is trained on; 0: none.",
)
@_setting("--weight-bits", metavar="B[,B...]", help="2 to 8, for all layers or for each.")
@_setting("--activation-bits", metavar="B[,B...]", help="2 to 8, for all layers or for each.")
@_setting("--format", type=click.Choice(FORMATS), help="How the ONNX file spells quantization.")
@_setting("--device", type=click.Choice(DEVICES), help="Where to train.")
@_setting("--threads", type=int, metavar="N", help="CPU threads; 0: one for each core.")
@click.option(
    "--search-bits",
    is_flag=True,
    help="Then take bits from the weights while --target is certified.",
)
@click.option(
    "--target",
    type=float,
    metavar="F",
    help="With --search-bits: certified accuracy to keep, 0 to 1.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --search-bits: held-out images. [200]",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --search-bits: certifying processes. [1]",
)
@click.option("-v", "--verbose", is_flag=True, help="Show early progress, tracebacks.")
@click.pass_obj
def train(
    printer: Printer,
    /,
    data: str | None,
    out: str,
    config_file: str | None,
    search_bits: bool,
    target: float | None,
    images: int | None,
    jobs: int | None,
    verbose: bool,
    **chosen: Any,
) -> int:
    """Train on the data set DATA (.npz, a folder of IDX files or of pictures) and export an ONNX
    file.

    The network is trained with interval bounds that equal the exported integer network's (QA-IBP,
    AAAI 2023, and what certified training has learned since). --config knows more settings than
    there are options: see specs/training.md.
    """
    printer.verbose = verbose
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "training needs PyTorch: pip install torch (without a GPU: --index-url "
            "https://download.pytorch.org/whl/cpu, which is much smaller)"
        )
    if search_bits != (target is not None) or (not search_bits and (images or jobs)):
        raise UsageError("--search-bits and --target go together; --images and --jobs go with them")
    # Threads that wait for each other must not spin meanwhile.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from qverify.train import loop, precision

    given = {name: value for name, value in chosen.items() if value is not None}
    for name in ("weight_bits", "activation_bits"):
        if name in given:
            try:
                given[name] = tuple(int(word) for word in given[name].split(","))
            except ValueError:
                words = name.replace("_", " ")
                raise UsageError(
                    f"{words} {given[name]!r}: numbers separated by commas are wanted"
                ) from None
    if data is not None:
        given["data"] = data
    config = read_config(config_file, given)
    if target is None:
        path = loop.train(config, out, printer.line, printer.progress)
    else:
        goal = precision.Goal(target, images or precision.Goal.images, jobs=jobs or 1)
        path = precision.search_bits(config, out, goal, printer.line, printer.progress)
    printer.answer(f"{path}\n")
    return 0
