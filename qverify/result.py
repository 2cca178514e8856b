"""What a verification run says: the verdict, why, the counterexample, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


class Verdict(StrEnum):
    """The one word on the first line of standard output (VNN-COMP's words)."""

    SAT = "sat"
    UNSAT = "unsat"
    UNKNOWN = "unknown"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Witness:
    """A counterexample that was replayed on the user's file.

    `inputs` and `outputs` are the arrays fed to and returned by onnxruntime, in the graph's order;
    `input_text` are decimals (flat, row-major, all inputs one after another) that lie inside the
    property's exact box and round to `inputs`; `output_text` are the outputs' shortest decimals
    that read back to the same value.
    """

    inputs: tuple[np.ndarray[Any, Any], ...]
    outputs: tuple[np.ndarray[Any, Any], ...]
    input_text: tuple[str, ...]
    output_text: tuple[str, ...]


@dataclass
class Stats:
    """Counters and timers of one run; printed with -v and written with --json."""

    seconds: float = 0.0
    load_seconds: float = 0.0
    attack_points: int = 0  # exact evaluations made by the attack
    # Parts (boxes, regions of the property in parts of the box) that were bounded.
    subproblems: int = 0
    proved: int = 0  # of them closed by bounds
    leaves: int = 0  # single code vectors decided by exact evaluation
    max_open: int = 0  # most parts open at once


@dataclass(frozen=True)
class Result:
    """The outcome of `qverify.verify`: `witness` is present exactly when the verdict is `sat`."""

    verdict: Verdict
    reason: str = ""  # one line: why unknown, which limit, how the proof or the witness was found
    witness: Witness | None = None
    stats: Stats = field(default_factory=Stats)
    # Versions, device, semantics, warnings, file hashes.
    details: dict[str, Any] = field(default_factory=dict)
    # Where it was asked for, and there is one.
    certificate: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot of a running search, for the progress line."""

    seconds: float  # since the verification began
    subproblems: int  # bounded so far
    open: int  # waiting
    # share closed so far, 0 to 1: of the box by volume in code vectors, or of cuts if each halves
    # its part
    proved: float
