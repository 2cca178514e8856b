"""The options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from qverify.options import Options

Command = TypeVar("Command", bound=Callable[..., Any])


def _seconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Accept a positive finite number of seconds."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter("must be a positive number of seconds", ctx, param)
    return value


shape_option = click.option(
    "--shape",
    "shapes",
    metavar="NAME=1,3,64,64",
    multiple=True,
    help="Fix the shape of an input that MODEL leaves open; once for each such input.",
)


def common_options(command: Command) -> Command:
    """Add the options that `verify`, `batch` and `robustness` share; their defaults are those of
    `Options`."""
    default = Options()
    options = [
        click.option(
            "--timeout", metavar="S", type=float, callback=_seconds, help="Stop after S seconds."
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default=default.device,
            show_default=True,
            help="Where to compute; auto takes an NVIDIA GPU if CuPy finds one.",
        ),
        click.option(
            "--seed",
            metavar="N",
            type=click.IntRange(min=0),
            default=default.seed,
            show_default=True,
            help="Seed of every random choice.",
        ),
        shape_option,
        click.option(
            "--no-attack",
            is_flag=True,
            help="Do not look for counterexamples first (for debugging).",
        ),
        click.option(
            "-v", "--verbose", is_flag=True, help="Show statistics, early progress, tracebacks."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
