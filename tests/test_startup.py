"""The command must start quickly: nothing heavy may be imported before a command needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("numpy", "onnx", "onnxruntime", "cupy", "multiprocessing")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["qverify", "qverify.cli", "qverify.report"])
def test_imports_nothing_heavy(module: str) -> None:
    assert python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = (
        f"import sys; from qverify.cli import main; main(['--help']); print([n for n in {HEAVY} if n in sys.modules])"
    )
    assert python(code).splitlines()[-1] == "[]"


def test_batch_parent_needs_no_numpy() -> None:
    assert python("import sys, qverify.batch; print('numpy' in sys.modules)") == "False"


def test_lazy_exports() -> None:
    python("from qverify import Options, Result, Verdict, Witness; import qverify; assert 'verify' in dir(qverify)")


def test_unknown_name_is_an_attribute_error() -> None:
    python("import qverify; assert not hasattr(qverify, 'nonsense')")


def test_verify_is_the_function_even_after_its_module_was_imported() -> None:
    python("import qverify.verify, types; assert isinstance(qverify.verify, types.FunctionType)")
    python("from qverify import verify; import qverify; assert qverify.verify is verify; assert callable(verify)")
