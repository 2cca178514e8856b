"""`qverify batch`: a VNN-COMP instances file, run in worker processes, into a results file that can be resumed.

The results file has the competition's rows `category,onnx,vnnlib,prepare_time,result,run_time` without a header. A row
is appended and flushed when its instance ends, after its counterexample is on disk; a run that was cut off goes on
where it stopped. A worker serves many instances, since starting one costs more than most proofs. An instance that
overruns its limit by the grace is killed with its worker and recorded as `timeout`; a worker that dies by itself is
recorded as `error`. Nothing survives the parent: not after Ctrl-C, nor after SIGTERM or SIGKILL.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from qverify.errors import QverifyError, SoundnessError, UsageError
from qverify.options import Options
from qverify.report import Printer, check_writable, counterexample, write_text

VERDICTS = ("unsat", "sat", "unknown", "timeout", "error")
TICK = 0.25  # seconds between looks at the clock
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Instance:
    """One row of an instances file: its words as the results repeat them, and the folder they are relative to."""

    category: str
    onnx: str
    vnnlib: str
    folder: str
    timeout: float

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the instance in a results file."""
        return (self.category, self.onnx, self.vnnlib)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of an instance; `message` says why for `error` and is empty or a reason otherwise."""

    verdict: str
    seconds: float
    message: str = ""
    counterexample: str = ""


Solve = Callable[[Instance, Options], Answer]


def read_instances(path: str, timeout: float | None = None) -> list[Instance]:
    """Return the rows of an instances file; `timeout` replaces the limits in the file. UsageError if it is not one."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from error
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
            raise UsageError(f"{path}, line {reader.line_num}: not a row `onnx,vnnlib,timeout` (and no header, please)")
        limit = timeout if timeout is not None else _limit(fields[2], f"{path}, line {reader.line_num}")
        onnx, vnnlib = (field.removeprefix("./") for field in fields[:2])
        instances.append(Instance(category, onnx, vnnlib, str(folder), limit))
    return instances


def _limit(text: str, place: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise UsageError(f"{place}: the timeout {text!r} is not a positive number of seconds (a header? remove it)")


class ResultsFile:
    """A results file open for appending; a last line that was torn by a kill or a full disk is cut off first."""

    def __init__(self, path: str, category: str) -> None:
        check_writable(path)
        self.path = Path(path)
        self.rows: list[list[str]] = []
        if self.path.exists():
            if not self.path.is_file():  # a device or a pipe has no end to read to
                raise UsageError(f"{path} is not a regular file, so a batch cannot be resumed from it; name another")
            self._load(category)
        self._stream = self.path.open("a", encoding="utf-8", newline="")

    def _load(self, category: str) -> None:
        head, newline, torn = self.path.read_bytes().rpartition(b"\n")
        self.rows = [row for row in csv.reader(head.decode("utf-8", "replace").splitlines()) if row]
        # Cut off nothing from a file that some slip of the hand named: it must look like ours.
        start = torn.partition(b",")[0].decode("utf-8", "replace")
        if not all(map(_is_row, self.rows)) or (torn and not self.rows and not category.startswith(start)):
            raise UsageError(f"{self.path} is not a results file of qverify batch; name another with --results")
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
    """A file name without ending for every instance: the stems of its files, with a number where others have the same."""
    result: dict[tuple[str, str, str], str] = {}
    used: Counter[str] = Counter()
    for entry in instances:
        if entry.key not in result:
            name = f"{_stem(entry.onnx)}_{_stem(entry.vnnlib)}"
            used[name] += 1
            result[entry.key] = name if used[name] == 1 else f"{name}_{used[name]}"
    return result


def run(
    instances: Sequence[Instance],
    results: str,
    options: Options,
    jobs: int,
    printer: Printer,
    load: Callable[[], Solve] | None = None,
) -> None:
    """Give every instance a row in the file `results`; those that have one are not run again.

    `load` is called once in every worker and returns the function that decides an instance.
    """
    if not instances:
        raise UsageError("there is no instance to run")
    file = ResultsFile(results, instances[0].category)
    present = Counter((row[0], row[1], row[2]) for row in file.rows)
    wanted = Counter(entry.key for entry in instances)
    todo = [entry for entry in instances if not _take(present, entry.key)]
    skipped = len(instances) - len(todo)
    if skipped:
        old = Counter(row[4] for row in file.rows if (row[0], row[1], row[2]) in wanted)
        tally = ", ".join(f"{old[verdict]} {verdict}" for verdict in VERDICTS if old[verdict])
        printer.line(
            f"{skipped} of {len(instances)} instances are in {results} already ({tally}) and are not run again"
        )
    counts: Counter[str] = Counter()
    named = names(instances)
    try:
        with _sigterm_unwinds(), contextlib.closing(pool(todo, options, jobs, load or load_verifier)) as events:
            for event in events:
                if event is not None:
                    instance, answer = event
                    file.append(instance, answer, named[instance.key])
                    counts[answer.verdict] += 1
                    _show(instance, answer, printer)
                tally = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
                done = f"{skipped + counts.total()}/{len(instances)} done"
                printer.progress(printer.elapsed(), f"{done}, {printer.elapsed():.0f} s{': ' if tally else ''}{tally}")
    finally:
        file.close()
        printer.block(summary([row for row in file.rows if _take(wanted, (row[0], row[1], row[2]))]))
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
            lines.append(f"{verdict:8} {len(times):6} {statistics.median(times):9.2f} {max(times):9.2f}\n")
    return "".join(lines)


def grace(timeout: float) -> float:
    """Return the seconds beyond its limit after which an instance is killed."""
    return max(2.0, 0.05 * timeout)


def load_verifier() -> Solve:
    """Import the verifier, which is what a worker's start is spent on."""
    import qverify.verify  # noqa: F401

    return solve


def solve(instance: Instance, options: Options) -> Answer:
    """Decide one instance. An error made on purpose becomes the verdict `error`; any other ends the worker."""
    from qverify.verify import verify

    started = time.monotonic()
    folder = Path(instance.folder)
    limits = dataclasses.replace(options, timeout=instance.timeout)
    try:
        result = verify(folder / instance.onnx, folder / instance.vnnlib, limits)
    except SoundnessError as error:
        return Answer("error", time.monotonic() - started, f"internal error, please report it: {error}")
    except (QverifyError, OSError) as error:
        return Answer("error", time.monotonic() - started, str(error))
    except MemoryError:
        return Answer("unknown", time.monotonic() - started, "not enough memory")
    text = ""
    if result.witness is not None:
        text = counterexample(result.witness, result.details.get("property"))
    return Answer(result.verdict.value, time.monotonic() - started, result.reason, text)


def pool(
    instances: Sequence[Instance], options: Options, jobs: int, load: Callable[[], Solve]
) -> Generator[tuple[Instance, Answer] | None, None, None]:
    """Run the instances in up to `jobs` worker processes; yield each with its answer, and None while time passes.

    Closing the generator kills the workers.
    """
    queue: deque[Instance] = deque()
    for entry in instances:
        if entry.onnx.startswith("["):  # a Python list of named networks
            yield entry, Answer("error", 0.0, "properties of several networks are not supported")
        else:
            queue.append(entry)
    workers: list[_Worker] = []
    try:
        while queue or workers:
            idle = sum(worker.instance is None for worker in workers)
            if len(workers) < jobs and idle < len(queue):
                workers.append(_Worker(load, jobs))
            ready = multiprocessing.connection.wait([worker.connection for worker in workers], TICK)
            for worker in list(workers):
                event = worker.poll(worker.connection in ready)
                if event is not None:
                    yield event
                if worker.dead or (worker.instance is None and not queue):
                    worker.kill()
                    workers.remove(worker)
                elif worker.ready and worker.instance is None:
                    worker.give(queue.popleft(), options)
            yield None
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A worker process as its parent sees it: starting, idle, busy with `instance`, or dead."""

    def __init__(self, load: Callable[[], Solve], jobs: int) -> None:
        self.connection, child = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_work, args=(child, load), daemon=True)
        with _child_environment(jobs):
            self._process.start()
        child.close()  # so that the death of the worker reads as the end of the pipe
        self.ready = False
        self.dead = False
        self.instance: Instance | None = None
        self._started = 0.0

    def give(self, instance: Instance, options: Options) -> None:
        """Start an instance; its clock starts too."""
        self.instance, self._started = instance, time.monotonic()
        with contextlib.suppress(OSError):  # a worker that died meanwhile is found by `poll`
            self.connection.send((instance, options))

    def poll(self, readable: bool) -> tuple[Instance, Answer] | None:
        """Return the instance that ended, if one did: answered, overdue, or lost with its worker."""
        elapsed = time.monotonic() - self._started
        instance = self.instance
        if readable:
            try:
                answer: Answer | None = self.connection.recv()
            except (EOFError, OSError):
                answer = self._lost(elapsed)
            if answer is None:
                self.ready = True
                return None
        elif instance is not None and elapsed > instance.timeout + grace(instance.timeout):
            self.dead = True
            answer = Answer("timeout", elapsed, "killed")
        else:
            return None
        self.instance = None
        assert instance is not None
        return instance, answer

    def _lost(self, elapsed: float) -> Answer | None:
        """Return what becomes of the instance of a worker that died by itself; None if it had none."""
        self._process.join()
        self.dead = True
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if not self.ready:  # the next one would fare no better
            raise QverifyError(f"a worker process {how} before its first instance; see its output above")
        if self.instance is None:
            return None
        return Answer("error", elapsed, f"the worker process {how}")

    def kill(self) -> None:
        """End the process now and collect it."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(connection: Connection, load: Callable[[], Solve]) -> None:
    """Serve instances until the parent closes the pipe; end at once when the parent is gone."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    solve_one = load()
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send(None)
        while True:
            connection.send(solve_one(*connection.recv()))


def _die_with_parent() -> NoReturn:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)  # from a thread, and with the main one deep in a computation, nothing gentler works


@contextlib.contextmanager
def _child_environment(jobs: int) -> Iterator[None]:
    """While a worker is started: share the cores among the workers, and leave Ctrl-C to the parent."""
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    added = [name for name in THREAD_VARIABLES if jobs > 1 and name not in os.environ]
    os.environ.update(dict.fromkeys(added, share))
    # A blocked signal stays blocked in the new process, while here it is only delayed: ignoring it would lose a Ctrl-C
    # that comes now. The tracker is started first since it unblocks SIGINT when it starts.
    multiprocessing.resource_tracker.ensure_running()
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that the workers die and the summary appears."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
