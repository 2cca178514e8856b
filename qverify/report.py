"""What a run shows and writes: verdict text, JSON, files, and the lines for people. No NumPy is imported here."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qverify import __version__
from qverify.errors import SoundnessError, UsageError, one_line

if TYPE_CHECKING:
    from qverify.options import Options
    from qverify.property import Property, Variable
    from qverify.result import Progress, Result, Witness

LIVE_AFTER = 2.0  # seconds before a terminal shows the live line: a short run stays quiet
PLAIN_EVERY = 10.0  # seconds between progress lines where standard error is a file or a pipe


def counterexample(witness: Witness, spec: Property | None) -> str:
    """Return the counterexample as VNN-COMP wants it for the specification's version.

    1.0 (also without a specification): `((X_0 v)` ... `(Y_n v))`. 2.x: for every variable in the order of its
    declaration a line `name type [dims]` and then one value a line, row-major.
    """
    if spec is None or spec.version.startswith("1"):
        inputs = (f"(X_{i} {value})" for i, value in enumerate(witness.input_text))
        outputs = (f"(Y_{j} {value})" for j, value in enumerate(witness.output_text))
        return "(" + "\n ".join([*inputs, *outputs]) + ")\n"
    lines = [*_typed_blocks(spec.inputs, witness.input_text), *_typed_blocks(spec.outputs, witness.output_text)]
    return "\n".join(lines) + "\n"


def _typed_blocks(variables: tuple[Variable, ...], texts: tuple[str, ...]) -> Iterator[str]:
    if sum(math.prod(variable.shape) for variable in variables) != len(texts):
        raise SoundnessError(f"the counterexample has {len(texts)} values, which does not fit the declared variables")
    values = iter(texts)
    for variable in variables:
        yield f"{variable.name} {variable.dtype} [{','.join(map(str, variable.shape))}]"
        yield from itertools.islice(values, math.prod(variable.shape))


def read_counterexample(path: str, spec: Property) -> tuple[float, ...]:
    """Return the inputs (flat) of a file as `counterexample` writes it, after a first line `sat` or without."""
    wanted = sum(math.prod(variable.shape) for variable in spec.inputs)
    text = Path(path).read_text(encoding="utf-8", errors="replace").strip().removeprefix("sat").strip()
    if text.startswith("("):
        found = {int(i): value for i, value in re.findall(r"\(\s*X_(\d+)\s+([^\s()]+)\s*\)", text)}
        words = [found.get(i, "") for i in range(wanted)] if set(found) <= set(range(wanted)) else []
    else:
        blocks: dict[str, list[str]] = {}
        for line in filter(None, map(str.strip, text.splitlines())):
            name, *more = line.split()
            if more:
                own = blocks.setdefault(name, [])
            elif blocks:
                own.append(line)
        words = [word for variable in spec.inputs for word in blocks.get(variable.name, [])]
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        values = ()
    if len(values) != wanted:
        raise UsageError(
            f"{path}: it holds no counterexample with the property's {wanted} inputs, as printed after `sat`"
        )
    return values


def remove_old(path: str) -> None:
    """Remove a file that an earlier run has written; anything but a regular file stays. UsageError if that fails."""
    try:
        if os.path.isfile(path) and not os.path.islink(path):
            os.remove(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def verdict_text(result: Result) -> str:
    """Return the text of standard output and of the results file: the verdict's line, then any counterexample."""
    text = f"{result.verdict.value}\n"
    if result.witness is not None:
        text += counterexample(result.witness, result.details.get("property"))
    return text


def as_json(result: Result, model: str, spec: str, options: Options) -> str:
    """Return the result as a JSON document; values of a counterexample are decimal strings, so no digit is lost."""
    parsed: Property | None = result.details.get("property")
    witness = result.witness
    document: dict[str, Any] = {
        "qverify": __version__,
        "model": model,
        "spec": spec,
        "verdict": result.verdict.value,
        "reason": result.reason,
        "counterexample": None,
        "stats": dataclasses.asdict(result.stats),
        "options": dataclasses.asdict(options),
        "details": {key: value for key, value in result.details.items() if key != "property"},
    }
    if witness is not None:
        document["counterexample"] = {
            "inputs": _tensors(witness.inputs, witness.input_text, parsed.inputs if parsed else ()),
            "outputs": _tensors(witness.outputs, witness.output_text, parsed.outputs if parsed else ()),
        }
    return json.dumps(document, indent=2, default=str) + "\n"


def _tensors(arrays: Iterable[Any], texts: tuple[str, ...], variables: tuple[Variable, ...]) -> list[dict[str, Any]]:
    values = iter(texts)
    names = (variable.name for variable in variables)
    return [
        {
            "name": next(names, None),
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "values": list(itertools.islice(values, array.size)),
        }
        for array in arrays
    ]


def check_writable(path: str, *protected: str) -> None:
    """Raise UsageError unless `path` can be written later; `protected` are input files it must not replace."""
    for other in protected:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise UsageError(f"{path} would overwrite an input file of this run; name another file")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UsageError(f"cannot write {path}: it is a directory")
    if target.exists() and not target.is_file():
        return  # a device or a pipe, written in place
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {path}: the directory {target.parent} does not exist")
    try:
        # The only test that also sees read-only file systems and runs as root; on Linux the file never has a name.
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def write_text(path: str, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file or nothing: a temporary file in the same directory replaces it. UsageError if that fails.

    A symbolic link keeps pointing where it did; a device or a pipe (/dev/stdout) is written in place.
    """
    target = os.path.realpath(path)
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            with open(target, "wb") as stream:
                stream.write(data)
            return
        draft = os.path.join(os.path.dirname(target), f".qverify-{secrets.token_hex(8)}.tmp")
        try:
            with open(draft, "xb") as stream:  # not mkstemp: the user's umask decides who may read
                stream.write(data)
            os.replace(draft, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


class Printer:
    """The one place that writes to standard output (the answer) and standard error (everything for people).

    On a terminal a progress line is rewritten in place and removed before anything else is printed; elsewhere a plain
    line appears every 10 seconds. Losing standard error never stops a run.
    """

    def __init__(self) -> None:
        self.verbose = False
        self._started = time.monotonic()
        self._stdout: IO[str] = sys.stdout or io.StringIO()  # None where the caller closed the stream
        self._stderr: IO[str] = sys.stderr or io.StringIO()
        self._live = self._stderr.isatty()
        self._width = 0  # characters of the live line now on the screen
        self._next_plain = 0.0

    def elapsed(self) -> float:
        """Return the seconds since the command began, imports included."""
        return time.monotonic() - self._started

    def answer(self, text: str) -> None:
        """Print to standard output. A reader that has gone away is no error; a full disk is a UsageError. What the stream's
        encoding does not have is escaped."""
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
            f"{progress.seconds:.1f} s: {progress.subproblems:,} parts bounded, {progress.open:,} open, "
            f"{100 * progress.proved:.4g} % proved",
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
        """Send what is still buffered to nowhere; else the interpreter complains about it when it exits."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stdout.fileno())
            os.close(nowhere)


def _columns(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
