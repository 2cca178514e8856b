"""What people see of a run: the answer on standard output, everything else on standard error.

No NumPy is imported here.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from typing import IO, TYPE_CHECKING

from qverify.errors import UsageError, one_line

if TYPE_CHECKING:
    from qverify.result import Progress

LIVE_AFTER = 2.0  # seconds before a terminal shows the live line: a short run stays quiet
PLAIN_EVERY = 10.0  # seconds between progress lines where standard error is a file or a pipe


class Printer:
    """The one place that writes to standard output (the answer) and standard error (the rest).

    On a terminal a progress line is rewritten in place and removed before anything else is printed;
    elsewhere a plain line appears every 10 seconds. Losing standard error never stops a run.
    """

    def __init__(self) -> None:
        self.verbose = False
        self._started = time.monotonic()
        # None where the caller closed the stream
        self._stdout: IO[str] = sys.stdout or io.StringIO()
        self._stderr: IO[str] = sys.stderr or io.StringIO()
        self._live = self._stderr.isatty()
        self._width = 0  # characters of the live line now on the screen
        self._next_plain = 0.0

    def elapsed(self) -> float:
        """Return the seconds since the command began, imports included."""
        return time.monotonic() - self._started

    def answer(self, text: str) -> None:
        """Print to standard output.

        A reader that has gone away is not an error; a full disk is a UsageError. What the stream's
        encoding does not have is escaped.
        """
        self.clear()
        encoding = getattr(self._stdout, "encoding", None) or "utf-8"
        try:
            self._stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stdout.flush()
        except OSError as error:
            self._discard_stdout()
            if not isinstance(error, BrokenPipeError):
                raise UsageError(f"cannot write to standard output: {error.strerror}") from error

    def line(self, text: str) -> None:
        """Print one line for people, whatever the text holds."""
        self.block(f"qverify: {one_line(text)}\n")

    def block(self, text: str) -> None:
        """Print text for people as it is."""
        self.clear()
        self._put(text)

    def progress(self, seconds: float, text: str) -> None:
        """Show how far a run is, `seconds` after its start, if it is time to."""
        if self._live:
            if self.verbose or seconds >= LIVE_AFTER:
                text = text[: max(_columns(self._stderr) - 1, 1)]
                self._put("\r" + text.ljust(self._width))
                self._width = len(text)
        elif seconds >= (self._next_plain or (0.0 if self.verbose else PLAIN_EVERY)):
            self._next_plain = seconds + PLAIN_EVERY
            self._put(f"qverify: {text}\n")

    def search(self, progress: Progress) -> None:
        """Show a snapshot of a search; this is what `verify` calls back."""
        self.progress(
            progress.seconds,
            f"{progress.seconds:.1f} s: {progress.subproblems:,} parts bounded, {progress.open:,} "
            f"open, {100 * progress.proved:.4g} % proved",
        )

    def clear(self) -> None:
        """Remove the live line, if there is one."""
        if self._width:
            self._put("\r" + " " * self._width + "\r")
            self._width = 0

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stderr.write(text)
            self._stderr.flush()

    def _discard_stdout(self) -> None:
        """Send what is still buffered to nowhere.

        Otherwise the interpreter complains about it when it exits.
        """
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stdout.fileno())
            os.close(nowhere)


def _columns(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
