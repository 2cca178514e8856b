"""The log of a training run as a picture: accuracies and loss against the epoch."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from qverify.errors import UsageError
from qverify.robustness.plot import PROVED, pyplot

CLEAN, LOSS = "0.35", "#c8553d"


def draw(rows: Sequence[Mapping[str, float]], eps: float, title: str) -> bytes | None:
    """A PNG of the log's rows (see `loop.measure`).

    None where matplotlib, the extra `plot`, is not installed.
    """
    try:
        figure_class, canvas_class = pyplot()
    except UsageError:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = figure_class(figsize=(8.4, 3.6), dpi=150, layout="constrained")
    canvas_class(figure)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    parts = [("clean", "clean", CLEAN, "-"), ("certified_1", "certified at eps 1", PROVED, "--")]
    if eps != 1:
        parts.append(("certified", f"certified at eps {eps:g}", PROVED, "-"))
    for name, label, colour, line in parts:
        left.plot(
            epochs,
            [100 * row[name] for row in rows],
            line,
            color=colour,
            label=label,
            linewidth=1.6,
        )
    left.set(ylabel="held-out accuracy, % (intervals only)", ylim=(_floor(rows), 100.5))
    right.plot(epochs, [row["loss"] for row in rows], color=LOSS, linewidth=1.6)
    right.set(ylabel="training loss", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="best")
    figure.suptitle(title, fontsize=10)
    buffer: Any = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return bytes(buffer.getvalue())


def _floor(rows: Sequence[Mapping[str, float]]) -> float:
    """Where the accuracies' axis begins: below what the last half of the run reached.

    So its end can be read.
    """
    late = rows[len(rows) // 2 :]
    least = min(100 * min(row["certified"], row["certified_1"], row["clean"]) for row in late)
    return max(0.0, 10 * ((least - 5) // 10))
