"""The command `qverify robustness`. Nothing heavy is imported here."""

from __future__ import annotations

import re
from typing import Any

import click

from qverify.cli.options import common_options, jobs_option
from qverify.options import Options
from qverify.printer import Printer

_NUMBERS = re.compile(r"\.?\d[\d.,/eE+-]*")


class _WithRadii(click.Command):
    """A command whose --eps takes all numbers that follow it.

    A number elsewhere is not a radius, nor is a path.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        radii = False  # whether the last of them are --eps and its numbers
        for word in args:
            if radii and joined[-1] != "--eps" and _NUMBERS.fullmatch(word):
                joined[-1] += f",{word}"
            else:
                radii = word.partition("=")[0] == "--eps" or (radii and joined[-1] == "--eps")
                joined.append(word)
        return super().parse_args(ctx, joined)


@click.command(
    "robustness",
    cls=_WithRadii,
    short_help="Certified accuracy of a classifier over labelled images.",
)
@click.argument("model", type=click.Path())
@click.argument("data", type=click.Path())
@click.option(
    "--eps",
    metavar="E,...",
    multiple=True,
    required=True,
    help="Radii in pixels (1/255 of the range): `--eps 1 2 4` or `--eps 1,2,4`.",
)
@click.option(
    "--norm",
    metavar="NORM",
    default="linf",
    show_default=True,
    help="linf: every pixel by at most eps.",
)
@click.option(
    "--scale",
    metavar="S",
    help="A pixel p becomes (p * S - M) / D. [1/255; integer input, see above]",
)
@click.option("--mean", metavar="M,...", help="One number, or one for each channel. [0]")
@click.option("--std", metavar="D,...", help="One number, or one for each channel. [1]")
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="test",
    show_default=True,
    help="Part of DATA.",
)
@click.option(
    "--first",
    metavar="K",
    type=click.IntRange(min=0),
    default=0,
    help="Begin with image K, counted from 0.",
)
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Only N images.")
@jobs_option
@click.option(
    "--results",
    metavar="CSV",
    type=click.Path(),
    help="Keep rows of images and radii; the same command goes on from them.",
)
@click.option(
    "--json", "json_file", metavar="FILE", type=click.Path(), help="Write the figures as JSON."
)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE.png",
    type=click.Path(),
    help="Draw accuracy against the radius (needs matplotlib).",
)
@common_options("Stop the search of an image at a radius after S seconds.", seconds=10.0)
@click.pass_obj
def robustness(
    printer: Printer,
    /,
    model: str,
    data: str,
    eps: tuple[str, ...],
    scale: str | None,
    mean: str | None,
    std: str | None,
    split: str,
    json_file: str | None,
    plot_file: str | None,
    timeout: float,
    device: str,
    seed: int,
    no_attack: bool,
    verbose: bool,
    shapes: tuple[str, ...],
    **chosen: Any,
) -> int:
    """Measure the clean, attacked and certified accuracy of the classifier MODEL over the labelled
    images DATA.

    DATA is a .npz file (x_test, y_test), a folder with MNIST's IDX files, or a folder
    [test/]CLASS/*.png. An image is certified at a radius if no input between its pixels - eps and +
    eps (clipped to 0 and 255) gives another class a score as high as the label's: ties count
    against the network, also in the clean accuracy. It is broken if an input is found that does,
    confirmed by onnxruntime.

    Without --scale, --mean and --std a pixel p becomes p / 255 for a float32 input, p for uint8 and
    p - 128 for int8; the model's shape says where channels, rows and columns go. What
    runs into --timeout counts as not certified. Prints a table. Exits with 0 when everything was
    tried.
    """
    from qverify.robustness.command import measure

    printer.verbose = verbose
    options = Options(
        timeout=timeout, device=device, seed=seed, attack=not no_attack, shapes=shapes
    )
    measure(
        printer,
        model,
        data,
        eps,
        (scale, mean, std),
        split,
        (json_file, plot_file),
        options,
        **chosen,
    )
    return 0
