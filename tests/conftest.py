"""Which files can be collected where not all of the `dev` extra is installed: a machine that is
only lent for its GPU.

There `make gpu` also asks that an onnxruntime which qverify refuses as too old count as absent.
Nobody else asks for it: elsewhere the tests fail.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qverify import runtime
from qverify.errors import UsageError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import onnxruntime themselves
HERE = Path(__file__).parent
BARE = importlib.util.find_spec("hypothesis") is None
REFUSED = ""
if os.environ.get("QVERIFY_HIDE_OLD_RUNTIME"):
    try:
        runtime.version()
    except (
        UsageError
    ) as error:  # the tests then see none: those that need it skip themselves, or are left out
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


@pytest.fixture(scope="session", autouse=True)
def _searched() -> Iterator[None]:
    """The boxes of tests are small, and are to be searched all the same; tests of
    `qverify.search.enumeration` undo this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qverify.search.enumeration.MOST", 0)
        patch.setattr("qverify.search.enumeration.MOST_CERTIFIED", 0)
        yield
