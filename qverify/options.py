"""The options of a verification run, in one frozen value that keeps their limits.

The command line's flags carry the same names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from qverify.errors import UsageError


@dataclass(frozen=True, slots=True)
class Options:
    """What `qverify.verify` may be told.

    `timeout` is wall-clock seconds for the whole run, loading included (None: no limit). `device`
    is "cpu", "cuda" or "auto" (cuda where it can be used, else cpu). `seed` fixes every random
    choice; it never changes what is proved. `batch` is the number of boxes bounded at once (None:
    chosen from the network's size). `branch` names the rule that picks where to split
    (`qverify.search.branch.RULES`): one for inputs, one for neurons, or "auto", which takes neurons
    where many inputs vary. `attack` switches the counterexample search off for debugging,
    `backward` the backward linear bounds, and `sweep` the evaluation of all points of a box that
    has few: the verdict must not depend on them. `certificate` asks for what the verdict rests on
    (`Result.certificate`). `shapes` fix inputs whose shapes the file leaves open, each written
    NAME=1,3,64,64. `watch` is an input (flat) that nothing may lose: whatever the search prunes is
    held against it, and SoundnessError says what was pruned wrongly (for debugging).

    Raises UsageError for a number that no run can have; names (`device`, `branch`) are checked by
    those who know them.
    """

    timeout: float | None = None
    device: str = "auto"
    seed: int = 0
    batch: int | None = None
    branch: str = "auto"
    attack: bool = True
    backward: bool = True
    sweep: bool = True
    certificate: bool = False
    shapes: tuple[str, ...] = ()
    watch: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not _is_positive(self.timeout):
            raise UsageError(
                f"a time limit of {self.timeout} seconds is not possible: use a positive number"
            )
        if not _is_whole(self.seed, 0):
            raise UsageError(f"a seed of {self.seed} is not possible: use a whole number from 0 on")
        if self.batch is not None and not _is_whole(self.batch, 1):
            raise UsageError(f"a batch of {self.batch} boxes is not possible: use at least 1")
        shapes: Any = self.shapes
        if isinstance(shapes, str):
            raise UsageError(f"shapes are a tuple of texts: ({shapes!r},)")


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) < math.inf


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least
