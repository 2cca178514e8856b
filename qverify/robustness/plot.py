"""Accuracy against the radius, as a picture.

matplotlib (the extra `plot`) is imported when it is first needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qverify.errors import UsageError
from qverify.robustness.results import AccuracyReport

PROVED, BROKEN = "#1b6ca8", "#c8553d"


def pyplot() -> Any:
    """matplotlib, for files only. UsageError where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib ({error}): pip install matplotlib") from None
    return Figure, FigureCanvasAgg


def check_format(path: str) -> None:
    """UsageError if a picture of this ending cannot be written, before the work is done."""
    _, canvas_class = pyplot()
    known = canvas_class.get_supported_filetypes()
    ending = Path(path).suffix[1:].lower() or "png"
    if ending not in known:
        raise UsageError(
            f"cannot write {path}: there is no picture format '{ending}'; use one of "
            f"{', '.join(sorted(known))}"
        )


def draw(report: AccuracyReport, path: str, title: str) -> None:
    """Write a picture of the attacked and the certified accuracy at every radius.

    The truth lies in the band between. The format follows the file's ending, PNG without one.
    UsageError if that fails.
    """
    figure_class, canvas_class = pyplot()
    figure = figure_class(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    canvas_class(figure)
    axes = figure.add_subplot()
    levels = report.levels
    eps = [float(level.eps) for level in levels]
    attacked = [100 * level.attacked / level.images for level in levels]
    certified = [100 * level.certified / level.images for level in levels]
    clean = 100 * levels[0].correct / levels[0].images
    axes.fill_between(
        [0, *eps], [clean, *attacked], [clean, *certified], color="0.85", label="open", linewidth=0
    )
    axes.plot([0, *eps], [clean, *attacked], "s--", color=BROKEN, label="attacked", markersize=4)
    axes.plot([0, *eps], [clean, *certified], "o-", color=PROVED, label="certified", markersize=4)
    axes.annotate(
        f"clean {clean:.1f} %", (0, clean), (6, 6), textcoords="offset points", fontsize=8
    )
    axes.set(
        xlabel="radius in pixels (1/255 of the range), L-infinity",
        ylabel=f"accuracy on {levels[0].images:,} images, %",
        title=title,
        ylim=(max(0, 10 * ((min(certified) - 5) // 10)), 100.5 if min(certified) > 60 else 105),
        xlim=(0, max(*eps, 0.01) * 1.04),
    )
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    try:
        figure.savefig(path, format=Path(path).suffix[1:] or "png")
    except (OSError, ValueError) as error:  # ValueError: a format that it does not know
        raise UsageError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
