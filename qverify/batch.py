"""`qverify batch`: a VNN-COMP instances file, run in worker processes, that can be resumed.

The results file has the competition's rows `category,onnx,vnnlib,prepare_time,result,run_time`
without a header. A row is appended and flushed when its instance ends, after its counterexample is
on disk; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import os
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qverify.errors import QverifyError, SoundnessError, UsageError
from qverify.files import check_writable, write_text
from qverify.formats import counterexample
from qverify.options import Options
from qverify.printer import Printer
from qverify.workers import Answer, Solve, check_jobs, pool, sigterm_unwinds

VERDICTS = ("unsat", "sat", "unknown", "timeout", "error")


@dataclass(frozen=True, slots=True)
class Instance:
    """One row of an instances file.

    Its words are kept as the results repeat them, with the folder that they are relative to.
    """

    category: str
    onnx: str
    vnnlib: str
    folder: str
    timeout: float

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the instance in a results file."""
        return (self.category, self.onnx, self.vnnlib)


def read_instances(path: str, timeout: float | None = None) -> list[Instance]:
    """Return the rows of an instances file; `timeout` replaces the limits in the file.

    UsageError if it is not one.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}"
        ) from error
    folder = file.resolve().parent
    # The layout of 2026 is <category>/<version of VNN-LIB>/instances.csv.
    category = folder.parent.name if re.fullmatch(r"\d+(\.\d+)*", folder.name) else folder.name
    instances = []
    reader = csv.reader(text.splitlines(), skipinitialspace=True)
    for row in reader:
        fields = [field.strip() for field in row]
        if not any(fields) or fields[0].startswith("#"):
            continue
        if len(fields) != 3 and not (len(fields) == 2 and timeout is not None):
            raise UsageError(
                f"{path}, line {reader.line_num}: not a row `onnx,vnnlib,timeout` (and no header, "
                "please)"
            )
        limit = (
            timeout if timeout is not None else _limit(fields[2], f"{path}, line {reader.line_num}")
        )
        onnx, vnnlib = (field.removeprefix("./") for field in fields[:2])
        instances.append(Instance(category, onnx, vnnlib, str(folder), limit))
    return instances


def _limit(text: str, place: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise UsageError(
        f"{place}: the timeout {text!r} is not a positive number of seconds (a header? remove it)"
    )


class BatchResults:
    """A results file open for appending.

    A last line that was torn by a kill or a full disk is cut off first.
    """

    def __init__(self, path: str, category: str) -> None:
        check_writable(path)
        self.path = Path(path)
        self.rows: list[list[str]] = []
        if self.path.exists():
            if not self.path.is_file():  # a device or a pipe has no end to read to
                raise UsageError(
                    f"{path} is not a regular file, so a batch cannot be resumed from it; name "
                    "another"
                )
            self._load(category)
        self._stream = self.path.open("a", encoding="utf-8", errors="surrogateescape", newline="")

    def _load(self, category: str) -> None:
        head, newline, torn = self.path.read_bytes().rpartition(b"\n")
        self.rows = [
            row for row in csv.reader(head.decode("utf-8", "surrogateescape").splitlines()) if row
        ]
        # Cut off nothing from a file that some slip of the hand named: it must look like ours.
        start = torn.partition(b",")[0].decode("utf-8", "replace")
        if not all(map(_is_row, self.rows)) or (
            torn and not self.rows and not category.startswith(start)
        ):
            raise UsageError(
                f"{self.path} is not a results file of qverify batch; name another with --results"
            )
        if torn:
            os.truncate(self.path, len(head + newline))

    def append(self, instance: Instance, answer: Answer, name: str) -> None:
        """Write the counterexample under this name, then the row. UsageError if that fails."""
        if answer.counterexample:
            folder = self.path.with_name(f"{self.path.stem}_counterexamples")
            folder.mkdir(exist_ok=True)
            write_text(str(folder / f"{name}.counterexample"), answer.counterexample)
        row = [*instance.key, "0.0", answer.verdict, f"{answer.seconds:.3f}"]
        try:
            csv.writer(self._stream, lineterminator="\n").writerow(row)
            self._stream.flush()
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror}") from error
        self.rows.append(row)

    def close(self) -> None:
        """Close the file; what could not be written was reported when it was appended."""
        with contextlib.suppress(OSError):
            self._stream.close()


def _is_row(row: Sequence[str]) -> bool:
    return len(row) == 6 and row[4] in VERDICTS and re.fullmatch(r"\d+(\.\d+)?", row[5]) is not None


def _stem(path: str) -> str:
    return Path(path.removesuffix(".gz")).stem


def names(instances: Sequence[Instance]) -> dict[tuple[str, str, str], str]:
    """A file name without ending for every instance: the stems of its files.

    Where several instances have the same stems, a number is added.
    """
    result: dict[tuple[str, str, str], str] = {}
    used: Counter[str] = Counter()
    taken: set[str] = set()
    for entry in instances:
        if entry.key not in result:
            name = stem = f"{_stem(entry.onnx)}_{_stem(entry.vnnlib)}"
            while name in taken:
                used[stem] += 1
                name = f"{stem}_{used[stem] + 1}"
            taken.add(name)
            result[entry.key] = name
    return result


def run(
    instances: Sequence[Instance],
    results: str,
    options: Options,
    jobs: int,
    printer: Printer,
    load: Callable[[], Solve[Instance]] | None = None,
) -> None:
    """Give every instance a row in the file `results`; those that have one are not run again.

    `load` is called once in every worker and returns the function that decides an instance.
    """
    if not instances:
        raise UsageError("there is no instance to run")
    check_jobs(jobs)
    file = BatchResults(results, instances[0].category)
    present = Counter((row[0], row[1], row[2]) for row in file.rows)
    wanted = Counter(entry.key for entry in instances)
    todo = [entry for entry in instances if not _take(present, entry.key)]
    skipped = len(instances) - len(todo)
    if skipped:
        old = Counter(row[4] for row in file.rows if (row[0], row[1], row[2]) in wanted)
        tally = ", ".join(f"{old[verdict]} {verdict}" for verdict in VERDICTS if old[verdict])
        printer.line(
            f"{skipped} of {len(instances)} instances are in {results} already ({tally}) and are "
            "not run again"
        )
    counts: Counter[str] = Counter()
    named = names(instances)
    try:
        with (
            sigterm_unwinds(),
            contextlib.closing(_answers(todo, options, jobs, load or load_verifier)) as events,
        ):
            for event in events:
                if event is not None:
                    instance, answer = event
                    file.append(instance, answer, named[instance.key])
                    counts[answer.verdict] += 1
                    _show(instance, answer, printer)
                tally = ", ".join(
                    f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]
                )
                done = f"{skipped + counts.total()}/{len(instances)} done"
                printer.progress(
                    printer.elapsed(),
                    f"{done}, {printer.elapsed():.0f} s{': ' if tally else ''}{tally}",
                )
    finally:
        file.close()
        printer.block(
            summary([row for row in file.rows if _take(wanted, (row[0], row[1], row[2]))])
        )
        missing = len(instances) - skipped - counts.total()
        if missing:
            printer.line(f"{missing} instances have no row yet; the same command goes on with them")


def _take(counter: Counter[tuple[str, str, str]], key: tuple[str, str, str]) -> bool:
    """Take one off the counter if there is one: an instance listed twice needs two rows."""
    counter[key] -= 1
    return counter[key] >= 0


def _show(instance: Instance, answer: Answer, printer: Printer) -> None:
    text = f"{answer.verdict} in {answer.seconds:.2f} s: {instance.onnx} {instance.vnnlib}"
    if answer.verdict == "error":
        printer.line(f"{text}: {answer.message}")
    elif printer.verbose:
        printer.line(text)


def summary(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of the verdicts in results rows: how many, median and longest time."""
    lines = [f"{'verdict':8} {'count':>6} {'median s':>9} {'max s':>9}\n"]
    for verdict in (*VERDICTS, "total"):
        times = [float(row[5]) for row in rows if verdict in (row[4], "total")]
        if times:
            lines.append(
                f"{verdict:8} {len(times):6} {statistics.median(times):9.2f} {max(times):9.2f}\n"
            )
    return "".join(lines)


def load_verifier() -> Solve[Instance]:
    """Import the verifier, which is what a worker's start is spent on."""
    import qverify.verification  # noqa: F401

    return solve


def solve(instance: Instance, options: Options) -> Answer:
    """Decide one instance.

    An error made on purpose becomes the verdict `error`; any other ends the worker.
    """
    from qverify.verification import verify

    started = time.monotonic()
    folder = Path(instance.folder)
    limits = dataclasses.replace(options, timeout=instance.timeout)
    try:
        result = verify(folder / instance.onnx, folder / instance.vnnlib, limits)
    except SoundnessError as error:
        return Answer(
            "error", time.monotonic() - started, f"internal error, please report it: {error}"
        )
    except (QverifyError, OSError) as error:
        return Answer("error", time.monotonic() - started, str(error))
    text = ""
    if result.witness is not None:
        text = counterexample(result.witness, result.details.get("property"))
    return Answer(result.verdict.value, time.monotonic() - started, result.reason, text)


def _answers(
    instances: Sequence[Instance], options: Options, jobs: int, load: Callable[[], Solve[Instance]]
) -> Generator[tuple[Instance, Answer] | None, None, None]:
    """Every instance with its answer, as `pool` yields them."""
    queue: deque[Instance] = deque()
    for entry in instances:
        if entry.onnx.startswith("["):  # a Python list of named networks
            yield entry, Answer("error", 0.0, "properties of several networks are not supported")
        else:
            queue.append(entry)
    with contextlib.closing(pool(queue, options, jobs, load)) as events:
        yield from events
