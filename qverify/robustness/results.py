"""What is known of every image at every radius: rows, their file, and the figures.

Two things follow without being run. A proof at some radius holds at every smaller one, and a
counterexample at some radius is one at every larger one, since the boxes lie within each other. An
image that is not classified correctly is misclassified at every radius.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from qverify.errors import SoundnessError, UsageError
from qverify.files import check_writable

VERDICTS = ("unsat", "sat", "misclassified", "timeout", "unknown", "error")
STAGES = ("clean", "tie", "intervals", "bounds", "search")
SETTLED = VERDICTS[:3]  # the others are open
PROOFS = STAGES[2:]
COLUMNS = ("image", "label", "eps", "verdict", "stage", "seconds")
MAGIC = "# qverify robustness "


@dataclass(frozen=True, slots=True)
class ImageRow:
    """What became of an image (its number in the data set) at a radius in pixels.

    `unsat`: proved, no input in the box gives another class a score as high as the label's; `sat`:
    there is one, replayed; `misclassified`: the image itself is one (by a tie, where the stage says
    so); the others are open. `stage` found it out, in `seconds` (0 where it follows from another
    row).
    """

    image: int
    label: int
    eps: Fraction
    verdict: str
    stage: str
    seconds: float

    def words(self) -> list[str]:
        """As in the file."""
        eps = spelled(self.eps)
        return [
            str(self.image),
            str(self.label),
            eps,
            self.verdict,
            self.stage,
            f"{self.seconds:.4f}",
        ]


def spelled(eps: Fraction) -> str:
    """A radius in decimals where it has some."""
    text = f"{float(eps):.12g}"
    return text if "e" not in text and Fraction(text) == eps else str(eps)


def read_row(words: Sequence[str]) -> ImageRow:
    """The inverse of `ImageRow.words`. ValueError where that is not one."""
    image, label, eps, verdict, stage, seconds = words
    if verdict not in VERDICTS or stage not in STAGES:
        raise ValueError
    try:
        return ImageRow(int(image), int(label), Fraction(eps), verdict, stage, float(seconds))
    except ZeroDivisionError:
        raise ValueError from None


@dataclass(eq=False)
class Known:
    """Rows by image and radius, and what follows for the radii that are asked for, sorted."""

    eps: tuple[Fraction, ...]
    rows: dict[tuple[int, Fraction], ImageRow] = field(default_factory=dict)
    # Image: widest proof, least sat.
    _settled: dict[int, tuple[ImageRow | None, ImageRow | None]] = field(default_factory=dict)

    def add(self, row: ImageRow) -> list[ImageRow]:
        """Let a row in; it and what follows from it come back, without what is known already."""
        safe, broken = self._settled.get(row.image, (None, None))
        if row.verdict == "unsat" and (safe is None or row.eps > safe.eps):
            safe = row
        if row.verdict in ("sat", "misclassified") and (broken is None or row.eps < broken.eps):
            broken = row
        self._settled[row.image] = safe, broken
        if safe and broken and _reaches(broken, safe.eps):
            raise SoundnessError(
                f"image {row.image} is {broken.verdict} at eps {spelled(broken.eps)}, but proved "
                f"at {spelled(safe.eps)}"
            )
        new = [] if (row.image, row.eps) in self.rows else [row]
        for eps in self.eps:
            old = self.rows.get((row.image, eps))
            if eps == row.eps or (old is not None and old.verdict in SETTLED):
                continue
            if safe and eps <= safe.eps:
                new.append(replace(safe, eps=eps, seconds=0.0))
            elif broken and _reaches(broken, eps):
                new.append(replace(broken, eps=eps, seconds=0.0))
        self.rows.update({(added.image, added.eps): added for added in new})
        return new

    def open(self, image: int) -> list[Fraction]:
        """The radii without a row, in order."""
        return [eps for eps in self.eps if (image, eps) not in self.rows]


def _reaches(broken: ImageRow, eps: Fraction) -> bool:
    """Whether what breaks an image breaks it at this radius, too."""
    return broken.verdict == "misclassified" or broken.eps <= eps


class ImageResults:
    """Rows on disk, appended as they come: of two about the same box the last one counts.

    The first line says of which model, data and boxes they are.
    """

    def __init__(self, path: str, about: dict[str, str]) -> None:
        check_writable(path)
        self.path = Path(path)
        self.rows: list[ImageRow] = []
        head = MAGIC + json.dumps(about, sort_keys=True) + "\n" + ",".join(COLUMNS) + "\n"
        whole = self.path.exists()
        if whole:
            if not self.path.is_file():
                raise UsageError(
                    f"{path} is not a regular file, so nothing can be resumed from it; name another"
                )
            whole = self._load(head, about)
        self._stream = self.path.open("a", encoding="utf-8", newline="")
        if not whole:
            self._write(head)

    def _load(self, head: str, about: dict[str, str]) -> bool:
        """Read the rows; whether the head is there.

        A last line that was torn by a kill or a full disk is cut off.
        """
        data = self.path.read_bytes()
        if head.encode().startswith(data) and len(data) < len(head.encode()):
            os.truncate(self.path, 0)
            return False
        kept = data[: data.rfind(b"\n") + 1]
        first, *rest = (kept or data).decode("utf-8", "replace").splitlines(keepends=True)
        _compare(self.path, first, about)
        reader = csv.reader(rest[1:])
        try:
            if rest[:1] != head.splitlines(keepends=True)[1:]:
                raise ValueError
            self.rows = [read_row(words) for words in reader]
        except (ValueError, csv.Error):
            line = 2 + reader.line_num
            raise UsageError(
                f"{self.path} is a damaged results file (line {line}); mend it, or name another "
                "with --results"
            ) from None
        os.truncate(self.path, len(kept))
        return True

    def append(self, rows: Iterable[ImageRow]) -> None:
        """Write rows. UsageError if that fails."""
        self._write("".join(",".join(row.words()) + "\n" for row in rows))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file; what could not be written was reported when it was appended."""
        with contextlib.suppress(OSError):
            self._stream.close()


def _compare(path: Path, line: str, about: dict[str, str]) -> None:
    """UsageError unless the first line of a file is about the same."""
    old: Any = None
    if line.startswith(MAGIC):
        with contextlib.suppress(ValueError):
            old = json.loads(line.removeprefix(MAGIC))
    if not isinstance(old, dict):
        raise UsageError(
            f"{path} is not a results file of qverify robustness; name another with --results"
        )
    for key in sorted({*about, *old}):
        if old.get(key) != about.get(key):
            texts = (str(rows.get(key, "none")) for rows in (old, about))
            there, here = (f"{text[:16]}…" if len(text) == 64 else text for text in texts)
            what = "data set" if key == "data" else key
            raise UsageError(
                f"{path} holds rows of another {what} ({there}, not {here}); name another file "
                "with --results"
            )


@dataclass(frozen=True)
class Level:
    """The figures at one radius: counts of images, and the seconds that all processes spent."""

    eps: Fraction
    images: int
    correct: int  # the label's score is above every other
    ties: int  # misclassified by a tie only
    broken: int  # of the correct ones, those with a counterexample
    certified: int  # of the correct ones, those that are proved
    stages: dict[str, int]  # proofs by the stage that found them
    seconds: float

    @property
    def attacked(self) -> int:
        """Correct ones without a counterexample."""
        return self.correct - self.broken

    @property
    def open(self) -> int:
        """Correct ones with neither a proof nor a counterexample."""
        return self.attacked - self.certified


@dataclass(frozen=True)
class AccuracyReport:
    """What `certify` says: every row, sorted by image and radius, and figures for every radius."""

    rows: tuple[ImageRow, ...]
    levels: tuple[Level, ...]
    about: dict[str, str]  # hashes of model and data, norm and scaling: what the rows are about
    warnings: tuple[str, ...]
    seconds: float

    @staticmethod
    def make(
        rows: Iterable[ImageRow],
        eps: Sequence[Fraction],
        about: dict[str, str],
        warnings: Sequence[str],
        seconds: float,
    ) -> AccuracyReport:
        """Sort the rows and count."""
        asked = set(eps)
        wanted = sorted(
            (row for row in rows if row.eps in asked), key=lambda row: (row.image, row.eps)
        )
        levels = tuple(_level(e, [row for row in wanted if row.eps == e]) for e in eps)
        return AccuracyReport(tuple(wanted), levels, about, tuple(warnings), seconds)

    def table(self) -> str:
        """The figures for people, in percent of all images."""
        heads = (
            "eps",
            "images",
            "clean %",
            "attacked %",
            "certified %",
            "open",
            *(f"by {s}" for s in PROOFS),
            "seconds",
        )
        lines = [" ".join(f"{head:>{_width(head)}}" for head in heads)]
        for level in self.levels:
            share = (
                f"{100 * count / level.images:.2f}"
                for count in (level.correct, level.attacked, level.certified)
            )
            stages = (str(level.stages[stage]) for stage in PROOFS)
            cells = (
                spelled(level.eps),
                str(level.images),
                *share,
                str(level.open),
                *stages,
                f"{level.seconds:.1f}",
            )
            lines.append(
                " ".join(f"{cell:>{_width(head)}}" for head, cell in zip(heads, cells, strict=True))
            )
        return "\n".join(lines) + "\n"

    def as_json(self, **more: Any) -> str:
        """The figures as a JSON document, after what the caller adds."""
        levels = [
            {
                "eps": spelled(level.eps),
                "images": level.images,
                "clean": level.correct / level.images,
                "attacked": level.attacked / level.images,
                "certified": level.certified / level.images,
                **{"correct": level.correct, "ties": level.ties, "counterexamples": level.broken},
                **{"proved": level.certified, "open": level.open},
                "proved_by": level.stages,
                "seconds": round(level.seconds, 4),
            }
            for level in self.levels
        ]
        document = {
            **more,
            **self.about,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            "levels": levels,
        }
        return json.dumps(document, indent=2) + "\n"


def _width(head: str) -> int:
    return max(len(head), 7)


def _level(eps: Fraction, rows: Sequence[ImageRow]) -> Level:
    def count(verdict: str, stage: str = "") -> int:
        return sum(row.verdict == verdict and stage in ("", row.stage) for row in rows)

    stages = {stage: count("unsat", stage) for stage in PROOFS}
    correct = len(rows) - count("misclassified")
    ties = count("misclassified", "tie")
    return Level(
        eps,
        len(rows),
        correct,
        ties,
        count("sat"),
        count("unsat"),
        stages,
        sum(row.seconds for row in rows),
    )
