"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from qverify.errors import UsageError
from qverify.options import Options

Command = TypeVar("Command", bound=Callable[..., Any])

shape_option = click.option(
    "--shape",
    "shapes",
    metavar="NAME=1,3,64,64",
    multiple=True,
    help="Fix the shape of an input that MODEL leaves open; once for each such input.",
)
jobs_option = click.option(
    "--jobs", metavar="N", type=int, default=1, show_default=True, help="Worker processes."
)


def checked_option(flag: str, **settings: Any) -> Callable[[Command], Command]:
    """An option of the command line whose value is checked by the field of `Options` with its
    name."""

    def check(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            Options(**({} if value is None else {param.name: value}))
        except UsageError as error:
            raise click.BadParameter(str(error), ctx, param) from None
        return value

    return click.option(flag, callback=check, **settings)


def common_options(timeout: str, seconds: float | None = None) -> Callable[[Command], Command]:
    """Add the options that `verify`, `batch` and `robustness` share; their defaults are those of
    `Options`, but for --timeout, which has this help text and default."""
    default = Options()
    options = [
        checked_option(
            "--timeout", metavar="S", type=float, default=seconds, show_default=True, help=timeout
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default=default.device,
            show_default=True,
            help="Where to compute; auto takes an NVIDIA GPU if CuPy finds one.",
        ),
        checked_option(
            "--seed",
            metavar="N",
            type=int,
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

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
