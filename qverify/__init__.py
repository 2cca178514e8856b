"""Decides whether a quantized ONNX network satisfies a VNN-LIB property, in the integers the
runtime computes with.

    from qverify import verify
    result = verify("model.onnx", "property.vnnlib")
    result.verdict, result.witness

The names below are loaded on first use, so that `import qverify` costs nothing: NumPy and onnx come
only with them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qverify.options import Options as Options
    from qverify.result import Result as Result
    from qverify.result import Verdict as Verdict
    from qverify.result import Witness as Witness
    from qverify.verification import verify as verify

__version__ = "0.1.0"

__all__ = ["Options", "Result", "Verdict", "Witness", "__version__", "verify"]

_HOME = {
    "Options": "qverify.options",
    "Result": "qverify.result",
    "Verdict": "qverify.result",
    "Witness": "qverify.result",
    "verify": "qverify.verification",
}


def __getattr__(name: str) -> object:
    """Load a public name on its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name the lazy exports too."""
    return sorted({*globals(), *__all__})
