"""A point in time after which work must stop, and the look at it that every long loop takes.

Whoever starts work says until when (`with deadline.limits():`), and whatever runs below looks
(`look()`) once for every piece that costs well under a second. So no loop needs to be handed the
limit, and none can go past it: it leaves by `TimeUp`, and what it was about counts for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


class TimeUp(Exception):
    """The limit of the work going on has passed."""


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

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def share(self, part: float) -> Deadline:
        """A deadline when this part of the time left is over."""
        now = time.monotonic()
        return Deadline(self.start, now + part * (self.end - now))

    @contextmanager
    def limits(self) -> Iterator[None]:
        """While this is open, `look` holds the work to this deadline."""
        token = _LIMIT.set(self)
        try:
            yield
        finally:
            _LIMIT.reset(token)


_LIMIT: ContextVar[Deadline | None] = ContextVar("qverify_limit", default=None)


def look() -> None:
    """Raise TimeUp if the work going on has a limit, and it has passed."""
    limit = _LIMIT.get()
    if limit is not None and limit.passed():
        raise TimeUp


def looking(items: Iterable[Item], every: int = 1) -> Iterator[Item]:
    """The same items, with a look before each, or before every so many."""
    for count, item in enumerate(items):
        if count % every == 0:
            look()
        yield item
