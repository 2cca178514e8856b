"""Which files can be collected where not all of the `dev` extra is installed: a machine that is only lent for its GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent
BARE = importlib.util.find_spec("hypothesis") is None
collect_ignore = [
    str(path) for path in HERE.rglob("test_*.py") if BARE and "hypothesis import" in path.read_text(encoding="utf-8")
]


def pytest_report_header() -> list[str]:
    """Say what is missing."""
    return [f"hypothesis is not installed: {len(collect_ignore)} files are left out"] if BARE else []
