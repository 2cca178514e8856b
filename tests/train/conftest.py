"""What tests of training do without: threads, which wait for each other longer than they compute,
and curves after every epoch, which take longer than the epoch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is drawn, except in tests that use the fixture `curves`."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("qverify.train.loop.draw", lambda *_: None)


@pytest.fixture
def curves() -> None:
    """The curves are drawn as they are for users."""
