"""Which tests can run here: files need the `dev` extra, tests marked `gpu` need a GPU.

A machine that is only lent for its GPU may lack a part of the extra. There `make gpu` also asks
that an onnxruntime which qverify refuses as too old count as absent. Nobody else asks for it:
elsewhere the tests fail.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qverify import runtime
from qverify.errors import DeviceError, UsageError
from qverify.kernels import open_kernels

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import onnxruntime themselves
HERE = Path(__file__).parent
BARE = importlib.util.find_spec("hypothesis") is None
REFUSED = ""
if os.environ.get("QVERIFY_HIDE_OLD_RUNTIME"):
    try:
        runtime.version()
    except UsageError as error:
        # The tests then see none: those that need it skip themselves, or are left out.
        REFUSED = str(error)
        sys.modules["onnxruntime"] = None  # type: ignore[assignment]
MISSING = [
    word
    for word, is_missing in (("hypothesis import", BARE), ("import onnxruntime", bool(REFUSED)))
    if is_missing
]
collect_ignore = [
    str(path)
    for path in HERE.rglob("test_*.py")
    if any(word in path.read_text(encoding="utf-8") for word in MISSING)
]

if not BARE:  # how long an example takes says nothing on a busy machine
    from hypothesis import HealthCheck, settings

    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")


def pytest_report_header() -> list[str]:
    """Say what is missing."""
    lines = ["hypothesis is not installed"] if BARE else []
    lines += [REFUSED] if REFUSED else []
    return [f"{line}: files and tests that need it are left out" for line in lines]


# -- tests for a GPU -------------------------------------------------------------------------------

LEFT_OUT = pytest.StashKey[int]()


def has_gpu() -> bool:
    """Whether CuPy is installed and finds a GPU."""
    try:
        open_kernels("cuda")
    except DeviceError:
        return False
    return True


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests for a GPU where there is none, unless `-m` asks for them by name: then
    each is skipped with its reason."""
    for_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not for_gpu or "gpu" in config.option.markexpr or has_gpu():
        return
    items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
    config.hook.pytest_deselected(items=for_gpu)
    config.stash[LEFT_OUT] = len(for_gpu)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist, which collects in its parent's place, tells it the number."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects the same tests, so the last one's number is everybody's."""
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[LEFT_OUT] = left_out


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many tests were left out, and how to run them."""
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} GPU tests left out: make gpu, or pytest -m gpu on a machine with CuPy"
        )


@pytest.fixture(scope="session", autouse=True)
def _searched() -> Iterator[None]:
    """The boxes of tests are small, and are to be searched all the same; tests of
    `qverify.search.enumeration` undo this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qverify.search.enumeration.MOST", 0)
        patch.setattr("qverify.search.enumeration.MOST_CERTIFIED", 0)
        yield
