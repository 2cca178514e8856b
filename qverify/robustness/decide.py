"""How images are decided: many at once by bounds, one by one by the search.

Unsafe is an input in the box for which some other class's score is at least the label's: ties are
violations. So `unsat` says that the label wins, everywhere in the box, by the integers that
onnxruntime computes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.boundary.domain import Domain
from qverify.bounds.unsafe import CERTAIN, REFUTED
from qverify.deadline import Deadline, TimeUp
from qverify.engine import Engine
from qverify.errors import SoundnessError, Undecided, UsageError
from qverify.frontend.model import Model, read_model
from qverify.kernels import open_kernels
from qverify.options import Options
from qverify.property import Case, Query, Row
from qverify.result import Stats, Verdict
from qverify.robustness.pixels import PIXEL_MAX, Inputs, Pixels, Radius, Scaling
from qverify.search import memory
from qverify.search.bab import search
from qverify.search.bounds import Boxes, backward_bounds, refute
from qverify.search.knowledge import Knowledge
from qverify.workers import Answer

# Number in the batch, radius, verdict, stage, seconds.
Found = tuple[int, Fraction, str, str, float]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Batch:
    """Many images to be classified and bounded, each at the radii that are still open for it."""

    numbers: tuple[int, ...]  # [N], among all images
    pixels: Pixels  # [N, C, H, W]
    labels: npt.NDArray[np.int64]  # [N]
    eps: tuple[tuple[Fraction, ...], ...]  # [N], sorted
    timeout: float = float("inf")


@dataclass(frozen=True, eq=False)
class Single:
    """One image at one radius, for the search."""

    number: int  # among all images
    pixels: Pixels  # [C, H, W]
    label: int
    eps: Fraction
    timeout: float


Task = Batch | Single


def cases(label: int, outputs: int) -> tuple[Case, ...]:
    """The unsafe cases of a label: Y_label - Y_j <= 0, for every other class j."""
    one = Fraction(1)
    return tuple(
        (Row((), tuple(sorted(((label, one), (j, -one)))), Fraction(0)),)
        for j in range(outputs)
        if j != label
    )


@dataclass(frozen=True)
class Decided:
    """The answer to a task: a list of `Found` for a batch, an `Answer` for a single image."""

    answer: Any
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class Decider:
    """A classifier made ready to decide images of one shape."""

    engine: Engine
    inputs: Inputs
    _roots: dict[int, Knowledge] = field(default_factory=dict)
    _radii: dict[Fraction, Radius] = field(default_factory=dict)

    @staticmethod
    def make(
        read: Model, shape: tuple[int, int, int], scaling: Scaling | None, options: Options
    ) -> Decider:
        """For a model and the shape of the images. UsageError where they do not fit."""
        inputs, outputs = read.lowered.inputs, read.lowered.graph_outputs
        if len(inputs) != 1 or len(outputs) != 1:
            raise UsageError(
                f"{read.path}: it has {len(inputs)} inputs and {len(outputs)} outputs; a "
                "classifier has one of each"
            )
        engine = Engine.make(read, open_kernels(options.device), options.backward)
        if engine.decoder.size < 2:
            raise UsageError(
                f"{read.path}: it has one score only; a classifier has one for each class"
            )
        return Decider(engine, Inputs.make(engine.encoder, inputs[0], shape, scaling))

    def __call__(self, task: Task, options: Options) -> Decided:
        """What becomes of a task, and warnings that came up."""
        answer = self.batch(task) if isinstance(task, Batch) else self.single(task, options)
        return Decided(answer, tuple(self.engine.propagator.take_warnings()))

    def batch(self, task: Batch) -> list[Found]:
        """Classify images, then bound the right ones at ever larger radii, while that suffices."""
        found: list[Found] = []
        started = time.perf_counter()
        right, tied = self._classified(task)
        each = (time.perf_counter() - started) / len(right)
        for i in np.flatnonzero(~right).tolist():
            found.append((i, task.eps[i][0], "misclassified", "tie" if tied[i] else "clean", each))
        left = np.flatnonzero(right)
        for eps in sorted({eps for radii in task.eps for eps in radii}):
            rows = np.array([i for i in left if eps in task.eps[i]], np.int64)
            if not len(rows):
                continue
            lost = set()
            for stage, (proved, seconds) in self._bounded(task, rows, eps).items():
                if proved.any():  # nothing is certified on a network that the file is not
                    lower, upper = self.inputs.ends(task.pixels[rows[proved]], self._radius(eps))
                    self.engine.check_points(np.concatenate([lower, upper]))
                found += [(i, eps, "unsat", stage, seconds) for i in rows[proved].tolist()]
                lost = set(rows[~proved].tolist())
                rows = rows[~proved]
            left = np.array([i for i in left.tolist() if i not in lost], np.int64)
        return found

    def single(self, task: Single, options: Options) -> Answer:
        """Decide one image at one radius by the whole search."""
        deadline = Deadline.after(options.timeout)
        radius = self._radius(task.eps)
        query = Query(
            self.inputs.box(task.pixels, radius), cases(task.label, self.engine.decoder.size)
        )
        lower, upper = (end[0] for end in self.inputs.ends(task.pixels[None], radius))
        try:
            with deadline.limits():
                problem = self.engine.problem(
                    query, Domain(self.engine.encoder, query.box, lower, upper)
                )
            outcome = search(
                problem, options, deadline, np.random.default_rng(options.seed), Stats()
            )
            verdict, reason = outcome.verdict, outcome.reason
            if outcome.candidate is not None:
                verdict, reason, _ = self.engine.replayed(query, problem, outcome.candidate)
            elif verdict is Verdict.UNSAT and (doubt := self.engine.confirm(problem)):
                verdict, reason = Verdict.UNKNOWN, doubt
        except Undecided as error:
            verdict, reason = Verdict.UNKNOWN, str(error)
        except TimeUp:
            verdict, reason = Verdict.TIMEOUT, "time is up before the search began"
        except SoundnessError as error:
            return Answer("error", deadline.elapsed(), f"internal error, please report it: {error}")
        except MemoryError:
            verdict, reason = Verdict.UNKNOWN, "not enough memory"
        return Answer(verdict.value, deadline.elapsed(), reason)

    def _radius(self, eps: Fraction) -> Radius:
        if eps not in self._radii:
            self._radii[eps] = self.inputs.radius(eps)
        return self._radii[eps]

    def _root(self, label: int) -> Knowledge:
        """What is known of a label over all images, which holds in the box of every one."""
        if label not in self._roots:
            radius = self._radius(Fraction(PIXEL_MAX))
            blank = np.zeros((1, 1, len(self.inputs.order)), np.uint8)
            lower, upper = (end[0] for end in self.inputs.ends(blank[None], radius))
            box = self.inputs.box(blank, radius)
            query = Query(box, cases(label, self.engine.decoder.size))
            domain = Domain(self.engine.encoder, box, lower, upper)
            self._roots[label] = Knowledge(self.engine.problem(query, domain))
        return self._roots[label]

    def _scores(
        self, lower: Any, upper: Any
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Bounds of the scores over boxes of codes [N, codes]; maybe NaN or infinite."""
        engine = self.engine
        step = memory.box_batch(engine.kernels, engine.network)
        parts = []
        for start in range(0, len(lower), step):
            part = (engine.kernels.asarray(end[start : start + step]) for end in (lower, upper))
            codes = (engine.kernels.to_host(end) for end in engine.propagator.intervals(*part))
            with np.errstate(over="ignore", invalid="ignore"):
                parts.append(engine.decoder.decode_box(*codes))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _status(
        self, labels: Any, y: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
    ) -> Any:
        """The status of every case, int8 [N, classes - 1].

        Nothing is refuted where a score may be infinite.
        """
        status = np.full((len(labels), self.engine.decoder.size - 1), CERTAIN, np.int8)
        finite = _finite(y)
        for label in np.unique(labels).tolist():
            rows = np.flatnonzero((labels == label) & finite)
            status[rows] = self._root(label).sought.status((y[0][rows], y[1][rows]))
        return status

    def _classified(self, task: Batch) -> tuple[BoolArray, BoolArray]:
        """Which images the network gives their label, and which others tie with it.

        By bounds of the scores at points, and where these do not decide, by the runtime.
        """
        flat = self.inputs.clean(task.pixels)
        codes = self.engine.encoder.encode(flat)
        y = self._scores(codes, codes)
        status = self._status(task.labels, y)
        leaves = self.engine.leaves
        if not leaves.exact:  # where the bounds of an image's scores do not decide, ask the file
            open_ = (status != REFUTED).any(axis=1) & (status != CERTAIN).all(axis=1)
            for i in np.flatnonzero(open_).tolist():
                try:
                    actual = leaves.ask(flat[i], y[0][i], y[1][i])[None]
                except Undecided as error:
                    raise UsageError(f"{self.engine.read.path}: {error}") from None
                y[0][i] = y[1][i] = actual
                status[i] = self._status(task.labels[i : i + 1], (actual, actual))[0]
        right: BoolArray = (status == REFUTED).all(axis=1)
        tied: BoolArray = y[0][np.arange(len(right)), task.labels] >= y[0].max(axis=1)
        return right, tied & ~right

    def _bounded(
        self, task: Batch, rows: npt.NDArray[np.int64], eps: Fraction
    ) -> dict[str, tuple[BoolArray, float]]:
        """By stage: which images left by the stage before are proved, and the seconds for each.

        Nothing is proved where a score may be infinite: the rows say nothing about infinities, and
        two of them tie.
        """
        started = time.perf_counter()
        lower, upper = self.inputs.ends(task.pixels[rows], self._radius(eps))
        codes = self.engine.encoder.encode(lower), self.engine.encoder.encode(upper)
        low, high = np.minimum(*codes), np.maximum(*codes)  # a quantizer may fall
        y = self._scores(low, high)
        status = self._status(task.labels[rows], y)
        proved: BoolArray = (status == REFUTED).all(axis=1)
        result = {"intervals": (proved, (time.perf_counter() - started) / len(rows))}
        left = np.flatnonzero(~proved)
        if self.engine.dual is None or not len(left):
            return result
        started = time.perf_counter()
        labels, finite, asarray = task.labels[rows], _finite(y), self.engine.kernels.asarray
        bounds, limit, refuted = backward_bounds(False), Deadline.after(None), status == REFUTED
        for label in np.unique(labels[left]).tolist():
            some = left[(labels[left] == label) & finite[left]]
            boxes = Boxes(asarray(low[some]), asarray(high[some]))
            refuted[some] = refute(self._root(label), boxes, refuted[some], bounds, limit)
        done: BoolArray = refuted[left].all(axis=1)
        return {**result, "bounds": (done, (time.perf_counter() - started) / len(left))}


def _finite(y: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]) -> BoolArray:
    """Where all bounds of the scores are finite [N]."""
    finite: Any = np.isfinite(np.hstack(y))
    return finite.all(axis=1)  # type: ignore[no-any-return]


def load_decider(
    path: Path, sha256: str, shape: tuple[int, int, int], scaling: Scaling | None, options: Options
) -> Callable[[Task, Options], Any]:
    """The decider of a model, in a worker process. UsageError if the file has changed since."""
    read = read_model(path, options.shapes)
    if read.sha256 != sha256:
        raise UsageError(f"{path}: the file has changed")
    decider = Decider.make(read, shape, scaling, options)
    decider.engine.cross_check()
    return decider


def loader(
    path: Path, sha256: str, shape: Sequence[int], scaling: Scaling | None, options: Options
) -> Callable[[], Callable[[Task, Options], Any]]:
    """What a worker process is started with."""
    c, h, w = shape
    return functools.partial(load_decider, path, sha256, (c, h, w), scaling, options)
