"""Every error that qverify raises on purpose.

    QverifyError
    ├── UsageError            an argument, a path or an option is wrong
    ├── ModelError            the ONNX file is broken or contradicts itself
    │   └── UnsupportedModel  it is valid, but some node has no integer rule here
    ├── SpecError             the VNN-LIB file is broken or is for another model
    │   └── EmptyBox          no input lies within a query's bounds (`verify`: the query is refuted)
    ├── CertificateError      the certificate's file is broken, or larger than its limits
    ├── Rejected              the certificate proves nothing about this model and property
    ├── DeviceError           the device asked for cannot be used
    └── SoundnessError        a self-check failed: no verdict is given (our fault, please report)

A message is one line: what, where, and what to do next. Names and numbers in it may come from
hostile files, so every message goes through `one_line`.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 10_000  # characters of a message


def one_line(text: str) -> str:
    """`text` as one line that can be shown anywhere.

    White space becomes single spaces, any other character that cannot be printed (control
    characters, directions of writing, lone surrogates) the replacement character; what is longer
    than LONGEST is cut.
    """
    text = " ".join(text[: LONGEST + 1].split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."


class QverifyError(Exception):
    """Base of all errors below; its text is one line fit for a user."""

    def __init__(self, text: str = "") -> None:
        super().__init__(one_line(text))


class UsageError(QverifyError):
    """An argument, a path or an option is wrong."""


class ModelError(QverifyError):
    """The ONNX file is broken or contradicts itself."""


class UnsupportedModel(ModelError):
    """The ONNX file is valid, but some nodes have no exact integer rule in qverify.

    Where there are several, `blockers` holds a line for each, while the text may leave some out.
    """

    def __init__(self, text: str = "", blockers: Iterable[str] = ()) -> None:
        super().__init__(text)
        self.blockers = tuple(map(one_line, blockers))


class SpecError(QverifyError):
    """The VNN-LIB file is broken or does not fit the model."""


class EmptyBox(SpecError):
    """No input lies within the bounds of a query, under any reading of them."""


class CertificateError(QverifyError):
    """The file of a certificate is broken, is none, or is larger than the checker's limits."""


class Rejected(QverifyError):
    """A certificate does not prove its verdict; the text says why."""


class DeviceError(QverifyError):
    """The device asked for cannot be used on this machine."""


class SoundnessError(QverifyError):
    """Two computations that must agree did not; no verdict may be built on them."""


class Undecided(Exception):
    """The query has no answer here; the text says why."""
