"""Time limits: whatever the search is about when the time is up, it stops at its next look, and
nothing is done after it.

Clocks are not used: a fake deadline passes after so many looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import Options, Verdict, verify
from qverify.deadline import Deadline, TimeUp, look, looking
from qverify.ops import AbstractOp
from qverify.result import Stats
from qverify.search.bab import search
from tests.search.queries import Asked, asked

EXAMPLES = Path(__file__).parents[1] / "specs" / "examples"


@dataclass(frozen=True)
class Looks(Deadline):
    """Passes after so many looks."""

    left_: list[int] = field(default_factory=list)

    @staticmethod
    def of(count: int) -> Looks:
        return Looks(0.0, float("inf"), [count])

    def passed(self) -> bool:
        self.left_[0] -= 1
        return self.left_[0] < 0

    def share(self, part: float) -> Deadline:
        return self


def test_without_a_limit_a_look_is_nothing() -> None:
    look()
    assert list(looking("abc")) == ["a", "b", "c"]


def test_limits_end_where_they_are_left_and_the_inner_one_counts() -> None:
    with Deadline.after(0).limits():
        with Deadline.after(None).limits():
            look()
        with pytest.raises(TimeUp):
            look()
    look()


def test_looking_looks_before_every_so_many() -> None:
    seen: list[int] = []
    with Looks.of(2).limits(), pytest.raises(TimeUp):
        seen += [0]
        for item in looking(range(100), 10):
            seen.append(item)
    assert seen[-1] == 19


def counted(monkeypatch: pytest.MonkeyPatch, deadline: Looks) -> Callable[[], tuple[int, int]]:
    """How often ops compute at most between two looks, and after the time is up."""
    last, since, most, after = [-1], [0], [0], [0]
    for op in {op for kind in AbstractOp.__subclasses__() for op in (kind, *kind.__subclasses__())}:
        for name in ("run", "interval", "gradient"):
            if name in vars(op):
                right = vars(op)[name]

                def spied(self: Any, *args: Any, right: Any = right) -> Any:
                    since[0] = since[0] + 1 if last[0] == deadline.left_[0] else 1
                    last[0], most[0] = deadline.left_[0], max(most[0], since[0])
                    after[0] += deadline.left_[0] < 0
                    return right(self, *args)

                monkeypatch.setattr(op, name, spied)
    return lambda: (most[0], after[0])


def queries(count: int) -> list[Asked]:
    rng = np.random.default_rng(7)
    return [asked(rng) for _ in range(count)]


@pytest.mark.parametrize("splittable", [0, 12])
@pytest.mark.parametrize("number", range(6))
def test_nothing_is_done_after_the_time_is_up(
    number: int, splittable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of looks until then is drawn; a verdict that comes before is brute force's."""
    monkeypatch.setattr("qverify.search.bab.SPLITTABLE", splittable)
    query, verdicts = queries(6)[number], []
    for looks in [0, 1, *np.geomspace(3, 3000, 12).astype(int).tolist()]:
        deadline = Looks.of(looks)
        with monkeypatch.context() as patch:
            problem = query.problem()
            done = counted(patch, deadline)
            outcome = search(problem, Options(), deadline, np.random.default_rng(0), Stats())
        assert done()[0] <= 8 and not done()[1]  # an op may ask another one
        assert outcome.verdict in (Verdict.TIMEOUT, query.expected)
        verdicts.append(outcome.verdict)
    assert verdicts[0] is Verdict.TIMEOUT


@pytest.mark.parametrize("looks", [0, 1, 2, 5, 20])
def test_loading_ends_too(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Deadline, "after", staticmethod(lambda seconds: Looks.of(looks if seconds else 10**9))
    )
    model, spec = (
        EXAMPLES / "onnx" / "mnist_cnn_qop.onnx",
        EXAMPLES / "vnnlib" / "mnist_8_eps_8.vnnlib.gz",
    )
    result = verify(model, spec, Options(device="cpu", timeout=1.0))
    assert (
        result.verdict is Verdict.TIMEOUT
        and result.reason == "time is up while the model or the property was made ready"
    )
