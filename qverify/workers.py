"""Worker processes: one task after another, killed when they overrun or the parent dies.

A worker serves many tasks, since starting one costs more than most proofs. A task that overruns its
limit by the grace is killed with its worker and answered `timeout`; a worker that dies by itself
answers `error`. Nothing survives the parent: not after Ctrl-C, nor after SIGTERM or SIGKILL. NumPy
is not imported here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from qverify.errors import QverifyError, UsageError
from qverify.options import Options

TICK = 0.25  # seconds between looks at the clock
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Task(Protocol):
    """Anything that can be sent to a process and has a limit in seconds."""

    @property
    def timeout(self) -> float:
        """The limit."""
        ...


TaskType = TypeVar("TaskType", bound=Task)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a task; `message` says why for `error` and is empty or a reason otherwise."""

    verdict: str
    seconds: float
    message: str = ""
    counterexample: str = ""


Solve = Callable[[TaskType, Options], Any]  # mostly an Answer


def check_jobs(jobs: int) -> None:
    """Raise UsageError unless there can be so many worker processes."""
    if jobs < 1:
        raise UsageError(f"{jobs} worker processes are not possible: --jobs must be at least 1")


def grace(timeout: float) -> float:
    """Return the seconds beyond its limit after which a task is killed."""
    return max(2.0, 0.05 * timeout)


def pool(
    queue: deque[TaskType], options: Options, jobs: int, load: Callable[[], Solve[TaskType]]
) -> Generator[tuple[TaskType, Any] | None, None, None]:
    """Run the tasks in up to `jobs` worker processes.

    Yield each with its answer, and None while time passes.

    `load` is called once in every worker and returns the function that decides a task, given the
    options; what it returns is the answer, but for tasks that were killed or lost. Whoever takes an
    answer may put more tasks into the queue. Closing the generator kills the workers.
    """
    workers: list[_Worker[TaskType]] = []
    try:
        while queue or workers:
            idle = sum(worker.task is None for worker in workers)
            if len(workers) < jobs and idle < len(queue):
                workers.append(_Worker(load, jobs))
            ready = multiprocessing.connection.wait([worker.connection for worker in workers], TICK)
            for worker in list(workers):
                event = worker.poll(worker.connection in ready)
                if event is not None:
                    yield event
                if worker.dead or (worker.task is None and not queue):
                    worker.kill()
                    workers.remove(worker)
                elif worker.ready and worker.task is None:
                    worker.give(queue.popleft(), options)
            yield None
    finally:
        for worker in workers:
            worker.kill()


class _Worker(Generic[TaskType]):
    """A worker process as its parent sees it: starting, idle, busy with `task`, or dead."""

    def __init__(self, load: Callable[[], Solve[TaskType]], jobs: int) -> None:
        self.connection, child = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_work, args=(child, load), daemon=True)
        with _child_environment(jobs):
            self._process.start()
        child.close()  # so that the death of the worker reads as the end of the pipe
        self.ready = False
        self.dead = False
        self.task: TaskType | None = None
        self._started = 0.0

    def give(self, task: TaskType, options: Options) -> None:
        """Start a task; its clock starts too."""
        self.task, self._started = task, time.monotonic()
        with contextlib.suppress(OSError):  # a worker that died meanwhile is found by `poll`
            self.connection.send((task, options))

    def poll(self, readable: bool) -> tuple[TaskType, Any] | None:
        """Return the task that ended, if one did: answered, overdue, or lost with its worker."""
        elapsed = time.monotonic() - self._started
        task = self.task
        if readable:
            try:
                answer: Any = self.connection.recv()
            except (EOFError, OSError):
                answer = self._lost(elapsed)
            if answer is None:
                self.ready = True
                return None
        elif task is not None and elapsed > task.timeout + grace(task.timeout):
            self.dead = True
            answer = Answer("timeout", elapsed, "killed")
        else:
            return None
        self.task = None
        assert task is not None
        return task, answer

    def _lost(self, elapsed: float) -> Answer | None:
        """Return what becomes of the task of a worker that died by itself; None if it had none."""
        self._process.join()
        self.dead = True
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if not self.ready:  # the next one would fare no better
            raise QverifyError(
                f"a worker process {how} before its first task; see its output above"
            )
        if self.task is None:
            return None
        return Answer("error", elapsed, f"the worker process {how}")

    def kill(self) -> None:
        """End the process now and collect it."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(connection: Connection, load: Callable[[], Solve[Any]]) -> None:
    """Serve tasks until the parent closes the pipe; end at once when the parent is gone."""
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
    """While a worker starts: share the cores among the workers, and leave Ctrl-C to the parent."""
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    added = [name for name in THREAD_VARIABLES if jobs > 1 and name not in os.environ]
    os.environ.update(dict.fromkeys(added, share))
    # A blocked signal stays blocked in the new process, while here it is only delayed: ignoring it
    # would lose a Ctrl-C that comes now. The tracker is started first since it unblocks SIGINT when
    # it starts.
    multiprocessing.resource_tracker.ensure_running()
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does.

    So the workers die and the summary appears.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
