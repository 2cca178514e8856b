"""A point in time after which work must stop."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """`start` and `end` on the monotonic clock; `end` is infinite where there is no limit."""

    start: float
    end: float

    @staticmethod
    def after(seconds: float | None) -> Deadline:
        """`seconds` from now (None: never)."""
        now = time.monotonic()
        return Deadline(now, float("inf") if seconds is None else now + seconds)

    def passed(self) -> bool:
        return time.monotonic() >= self.end

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def share(self, part: float) -> Deadline:
        """A deadline when this part of the time left is over."""
        now = time.monotonic()
        return Deadline(self.start, now + part * (self.end - now))
