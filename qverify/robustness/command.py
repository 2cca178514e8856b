"""The command `qverify robustness`, behind its options: images in.

Table, rows, JSON and picture out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qverify import __version__
from qverify.data import load_images
from qverify.errors import UsageError
from qverify.files import check_writable, write_text
from qverify.options import Options
from qverify.printer import Printer
from qverify.robustness import certify
from qverify.robustness.pixels import Scaling, fractions
from qverify.robustness.plot import check_format, draw
from qverify.workers import sigterm_unwinds


def measure(
    printer: Printer,
    model: str,
    data: str,
    eps: Sequence[str],
    scaling: tuple[str | None, str | None, str | None],
    split: str,
    files: tuple[str | None, str | None],
    options: Options,
    **chosen: Any,
) -> None:
    """Run `certify` and print its table.

    `scaling` holds the words of --scale, --mean and --std, `files` those of --json and --plot; what
    is `chosen` goes to `certify`.
    """
    json_file, plot_file = files
    written = [path for path in (chosen["results"], *files) if path is not None]
    for path in written:
        check_writable(path, model, data)
    if len({os.path.realpath(path) for path in written}) < len(written):
        raise UsageError("--results, --json and --plot must name different files")
    if plot_file is not None:
        check_format(plot_file)
    radii = [word for words in eps for word in words.replace(",", " ").split()]
    known = _scaling(*scaling)
    images = load_images(data, split)
    if chosen["limit"] is not None and len(images) > 1 and images.by_class:
        printer.line(
            "warning: the images are sorted by class, so that a part of them is of a few classes "
            "only"
        )
    try:
        with sigterm_unwinds():
            report = certify(
                model,
                images.pixels,
                images.labels,
                radii,
                options,
                scaling=known,
                progress=printer.progress,
                **chosen,
            )
    except (KeyboardInterrupt, SystemExit):
        if chosen["results"] is not None:
            printer.line(
                f"the rows so far are in {chosen['results']}; the same command goes on with them"
            )
        raise
    printer.answer(report.table())
    if json_file is not None:
        used = dataclasses.asdict(options) | {"jobs": chosen["jobs"], "first": chosen["first"]}
        more = {
            "qverify": __version__,
            "model_file": model,
            "data_file": data,
            "split": split,
            "options": used,
        }
        write_text(json_file, report.as_json(**more))
    if plot_file is not None:
        draw(report, plot_file, f"{Path(model).name} on {Path(data).name}")
    for warning in report.warnings:
        printer.line(f"warning: {warning}")
    if ties := report.levels[0].ties:
        printer.line(
            f"{ties} images count as misclassified because another class has the same score as the "
            "label"
        )


def _scaling(scale: str | None, mean: str | None, std: str | None) -> Scaling | None:
    """What --scale, --mean and --std say together; None if they say nothing."""
    if scale is None and mean is None and std is None:
        return None
    (factor,) = fractions("--scale", scale or "1/255", 1)
    return Scaling(factor, fractions("--mean", mean or "0"), fractions("--std", std or "1"))
