"""Clean, attacked and certified accuracy of a classifier over a data set, in the norm linf.

    from qverify.data import load_images
    from qverify.robustness import certify
    images = load_images("mnist.npz")
    report = certify("model.onnx", images.pixels, images.labels, [1, 2, 4])
    print(report.table())

Bounds of many images at once come first (intervals, then backward bounds with CROWN slopes); what
they leave open is searched, image by image."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import __version__, runtime
from qverify.data import digest
from qverify.errors import QverifyError, UsageError
from qverify.frontend.model import read_model
from qverify.frontend.shapes import shapes_text
from qverify.options import Options
from qverify.robustness.decide import Batch, Decided, Decider, Single, Task, loader
from qverify.robustness.pixels import PIXEL_MAX, Scaling
from qverify.robustness.results import (
    SETTLED,
    AccuracyReport,
    ImageResults,
    ImageRow,
    Known,
    Level,
    spelled,
)
from qverify.workers import Answer, check_jobs, pool

__all__ = ["AccuracyReport", "ImageRow", "Level", "Scaling", "certify"]

DEFAULTS = Options(timeout=10.0)
# Pixels: a smaller radius is hardly meant, for it leaves most codes as they are.
LEAST = Fraction(1, 2)
BATCH = 128  # images bounded at once: enough of each label, and seconds at most
Number = int | float | str | Fraction | np.number[Any]
Tell = Callable[[float, str], None]


def certify(
    model: str | os.PathLike[str],
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[Any],
    eps: Number | Iterable[Number],
    options: Options = DEFAULTS,
    *,
    norm: str = "linf",
    scaling: Scaling | None = None,
    first: int = 0,
    limit: int | None = None,
    jobs: int = 1,
    results: str | None = None,
    progress: Tell | None = None,
) -> AccuracyReport:
    """Decide for each image and radius whether a classifier keeps the image's label within it.

    `images` are uint8 [N, channels, height, width], `labels` integers [N], `eps` radii in pixels
    (8, not 8/255). The box of an image holds every input between those that pixels p - eps and p +
    eps (clipped to 0 and 255) become by `scaling` (None: p / 255 for float32 inputs, p for uint8, p
    - 128 for int8). It is unsafe if some input in it gives another class a score that is at least
    the label's: a tie counts against the network, also in the clean accuracy.

    `options.timeout` is for one image at one radius, in the search. Only `limit` images from number
    `first` on are decided. `jobs` above 1 takes worker processes, which are killed where they
    overrun; without, a search may take a little longer than its limit. `results` names a file that
    keeps the rows, and from which the same call goes on; what ran out of time is tried again where
    the limit is now at least twice as long, what stayed open otherwise always. `progress` is called
    with the seconds so far and a line of text.

    Raises a QverifyError (one line) for input that cannot be read or does not fit.
    """
    started = time.monotonic()
    radii = _radii(eps, norm)
    images, labels = np.asarray(images), np.asarray(labels)
    chosen = _chosen(images, labels, first, limit)
    check_jobs(jobs)
    read = read_model(Path(model), options.shapes)
    decider = Decider.make(read, images.shape[1:], scaling, options)
    size = decider.engine.decoder.size
    _check_labels(labels[chosen], size, read.path)
    about = _about(decider, images, labels, norm)
    file = None if results is None else ImageResults(results, about)
    run = _Run(decider, images, labels, Known(radii), file, options, jobs)
    try:
        run.resume([] if file is None else [row for row in file.rows if row.image in chosen])
        warnings = [*read.warnings, *decider.engine.cross_check(), *run.taken_over()]
        for text in run.all(chosen):
            if progress is not None:
                progress(time.monotonic() - started, text)
    finally:
        if file is not None:
            file.close()
    warnings += run.warnings
    rows = [row for row in run.known.rows.values() if row.image in chosen]
    report = AccuracyReport.make(
        rows, radii, about, [*warnings, *run.errors], time.monotonic() - started
    )
    return replace(report, warnings=(*report.warnings, *_near_chance(report.levels[0], size)))


def _chosen(
    images: npt.NDArray[Any], labels: npt.NDArray[Any], first: int, limit: int | None
) -> range:
    """The numbers of the images to decide.

    UsageError where there are none, or where these are no labelled images.
    """
    whole = labels.dtype.kind in "ui" and labels.shape == images.shape[:1]
    if images.dtype != np.uint8 or images.ndim != 4 or not whole:
        raise UsageError(
            "images must be uint8 [N, channels, height, width] and labels integers [N]"
        )
    chosen = range(len(images))[first : None if limit is None else first + limit]
    if not 0 <= first < len(images) or not len(chosen):
        raise UsageError(
            f"there is no image to decide: the data set has {len(images)}, numbered from 0"
        )
    return chosen


def _check_labels(labels: npt.NDArray[Any], scores: int, model: Path) -> None:
    least, most = labels.min(), labels.max()
    if least < 0 or most >= scores:
        raise UsageError(
            f"{model}: it has {scores} scores, but the labels go from {least} to {most}"
        )


def _near_chance(level: Level, classes: int) -> list[str]:
    """A warning where the model hardly knows the labels.

    That is: less than a tenth of the way from chance to all.
    """
    share = level.correct / level.images
    if level.images < 20 or share >= 1 / classes + (1 - 1 / classes) / 10:
        return []
    return [
        f"the clean accuracy of {100 * share:.1f} % is near that of guessing ({100 / classes:.1f} "
        "%): do --scale, --mean and --std, and the labels' numbers, fit the model?"
    ]


def _radii(eps: Number | Iterable[Number], norm: str) -> tuple[Fraction, ...]:
    """Radii in order, each once."""
    if norm != "linf":
        raise UsageError(
            f"the norm '{norm}' is not supported: only linf, every pixel by at most eps"
        )
    numbers = list(eps) if isinstance(eps, Iterable) and not isinstance(eps, str) else [eps]
    text = ", ".join(map(str, numbers))
    # 8/255 is not meant to be 0.03 pixels.
    if any(isinstance(number, str) and "/" in number for number in numbers):
        raise UsageError(f"--eps {text}: radii are in pixels, from 0 to {PIXEL_MAX}: 8, not 8/255")
    try:
        radii = sorted({Fraction(str(number)) for number in numbers})
    except ValueError:
        raise UsageError(f"--eps {text}: radii are numbers of pixels") from None
    if not radii or radii[0] < 0 or radii[-1] > PIXEL_MAX:
        raise UsageError(f"--eps must be radii in pixels, from 0 to {PIXEL_MAX}")
    if small := [float(radius) for radius in radii if 0 < radius < LEAST]:
        raise UsageError(
            f"--eps {small[0]:.4g}: radii are in pixels, from 0 to {PIXEL_MAX}, and less than half "
            f"a pixel says nothing (is {small[0] * PIXEL_MAX:.4g} meant?)"
        )
    return tuple(radii)


def _about(
    decider: Decider, images: npt.NDArray[np.uint8], labels: npt.NDArray[Any], norm: str
) -> dict[str, str]:
    """What rows rest on. onnxruntime is named because its fusions decide which integer network a
    file is, the machine because its kernels may round otherwise."""
    read = decider.engine.read
    shapes = {"shape": shapes_text(read.shapes)} if read.shapes else {}
    return shapes | {
        "qverify": __version__,
        "machine": runtime.machine(),
        "onnxruntime": read.runtime_version,
        "model": read.sha256,
        "data": digest(images, labels),
        "norm": norm,
        "scaling": decider.inputs.scaling.text(),
    }


@dataclass(eq=False)
class _Run:
    """The images on their way: bounded in batches, then searched one by one."""

    decider: Decider
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]
    known: Known
    file: ImageResults | None
    options: Options
    jobs: int

    def __post_init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []  # of all processes, each once
        self._counts: Counter[str] = Counter()
        self._waiting = 0

    def resume(self, rows: Sequence[ImageRow]) -> None:
        """Take in what an earlier run found out, but for what ran out of at most half the time that
        there is now, and what stayed open for another reason. UsageError for a row with another
        label than the image has."""
        limit = math.inf if self.options.timeout is None else self.options.timeout
        if wrong := [row for row in rows if row.label != self.labels[row.image]]:
            raise UsageError(
                f"{self.file.path if self.file else ''} is a damaged results file: image "
                f"{wrong[0].image} has the label {self.labels[wrong[0].image]}, not "
                f"{wrong[0].label}; name another with --results"
            )
        rows = [
            row
            for row in rows
            if row.verdict in SETTLED or (row.verdict == "timeout" and row.seconds > limit / 2)
        ]
        self.known.rows.update({(row.image, row.eps): row for row in rows})
        self._counts.update(
            row.verdict for row in self.known.rows.values() if row.eps in self.known.eps
        )
        self._put(rows)

    def taken_over(self) -> list[str]:
        """A warning where an earlier run left rows open that are not tried again."""
        rows = self.known.rows.values()
        still_open = sum(row.verdict == "timeout" and row.eps in self.known.eps for row in rows)
        if not still_open or self.file is None:
            return []
        return [
            f"{still_open} open rows are taken over from {self.file.path} as they are; twice the "
            "time tries them again"
        ]

    def all(self, chosen: range) -> Generator[str, None, None]:
        """Decide everything; yield a line about the progress now and then."""
        queue = deque[Task](self._batches(chosen))
        total = len(chosen) * len(self.known.eps)
        with contextlib.closing(self._answers(queue)) as events:
            for event in events:
                if event is not None:
                    self._take(*event, queue)
                tally = ", ".join(
                    f"{count} {verdict}" for verdict, count in sorted(self._counts.items())
                )
                search = f", {self._waiting} images wait for the search" if self._waiting else ""
                done = f"{self._counts.total()}/{total} verdicts"
                yield f"{done}{': ' if tally else ''}{tally}{search}"

    def _batches(self, chosen: range) -> Generator[Task, None, None]:
        todo = [i for i in chosen if self.known.open(i)]
        for start in range(0, len(todo), BATCH):
            rows = todo[start : start + BATCH]
            eps = tuple(tuple(self.known.open(i)) for i in rows)
            yield Batch(tuple(rows), self.images[rows], self.labels[rows].astype(np.int64), eps)

    def _answers(self, queue: deque[Task]) -> Generator[tuple[Task, Any] | None, None, None]:
        """Every task with its answer; tasks may be put into the queue meanwhile."""
        if self.jobs > 1 and queue:
            read, (c, h, w) = self.decider.engine.read, self.images.shape[1:]
            load = loader(
                read.path, read.sha256, (c, h, w), self.decider.inputs.scaling, self.options
            )
            yield from pool(queue, self.options, self.jobs, load)
            return
        while queue:
            task = queue.popleft()
            yield task, self.decider(task, self.options)

    def _take(self, task: Task, answer: Any, queue: deque[Task]) -> None:
        """Note what became of a task, and queue what is to be done next for its images."""
        if isinstance(answer, Decided):
            self.warnings += [text for text in answer.warnings if text not in self.warnings]
            answer = answer.answer
        if isinstance(task, Single):
            self._waiting -= 1
            if answer.message and answer.verdict == "error":
                self.errors.append(
                    f"image {task.number} at eps {spelled(task.eps)}: {answer.message}"
                )
            verdict, seconds = answer.verdict, answer.seconds
            if verdict == "timeout":
                seconds = min(seconds, task.timeout)
            self._put([ImageRow(task.number, task.label, task.eps, verdict, "search", seconds)])
            self._next(task.number, queue)
            return
        # A worker that was killed; the next one would fare no better.
        if isinstance(answer, Answer):
            raise QverifyError(
                f"images {task.numbers[0]} to {task.numbers[-1]} could not be bounded: "
                f"{answer.message}"
            )
        self._put([ImageRow(task.numbers[i], int(task.labels[i]), *rest) for i, *rest in answer])
        for number in task.numbers:
            self._next(number, queue)

    def _next(self, number: int, queue: deque[Task]) -> None:
        """Queue the search of an image at the middle one of its open radii.

        A proof settles the smaller ones, a counterexample the larger ones.
        """
        left = self.known.open(number)
        if left:
            limit = float("inf") if self.options.timeout is None else self.options.timeout
            eps = left[(len(left) - 1) // 2]
            self._waiting += 1
            queue.append(Single(number, self.images[number], int(self.labels[number]), eps, limit))

    def _put(self, rows: Iterable[ImageRow]) -> None:
        new = [implied for row in rows for implied in self.known.add(row)]
        self._counts.update(row.verdict for row in new)
        if self.file is not None and new:
            self.file.append(new)
