"""The options of a verification run, in one frozen value; the command line's flags carry the same
names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """What `qverify.verify` may be told.

    `timeout` is wall-clock seconds for the whole run, loading included (None: no limit). `device`
    is "cpu", "cuda" or "auto" (cuda where it can be used, else cpu). `seed` fixes every random
    choice; it never changes what is proved. `batch` is the number of boxes bounded at once (None:
    chosen from the network's size). `branch` names the rule that picks where to split
    (`qverify.search.branch.RULES`). `attack` switches the counterexample search off for debugging,
    `backward` the backward linear bounds, and `sweep` the evaluation of all points of a box that
    has few: the verdict must not depend on them. `certificate` asks for what the verdict rests on
    (`Result.certificate`). `shapes` fix inputs whose shapes the file leaves open, each written
    NAME=1,3,64,64. `watch` is an input (flat) that nothing may lose: whatever the search prunes is
    held against it, and SoundnessError says what was pruned wrongly (for debugging).
    """

    timeout: float | None = None
    device: str = "auto"
    seed: int = 0
    batch: int | None = None
    branch: str = "balanced"
    attack: bool = True
    backward: bool = True
    sweep: bool = True
    certificate: bool = False
    shapes: tuple[str, ...] = ()
    watch: tuple[float, ...] | None = None
