"""The command must start quickly: nothing heavy may be imported before a command needs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HEAVY = ("numpy", "onnx", "onnxruntime", "cupy", "multiprocessing")


def python(code: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["qverify", "qverify.cli", "qverify.printer"])
def test_imports_nothing_heavy(module: str) -> None:
    assert (
        python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])")
        == "[]"
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        f"import sys; from qverify.cli import main; main(['--help']); print([n for n in {HEAVY} if "
        "n in sys.modules])"
    )
    assert python(code).splitlines()[-1] == "[]"


def test_batch_parent_needs_no_numpy() -> None:
    assert python("import sys, qverify.batch; print('numpy' in sys.modules)") == "False"


def test_lazy_exports() -> None:
    python(
        "from qverify import Options, Result, Verdict, Witness; import qverify; assert 'verify' "
        "in dir(qverify)"
    )


def test_unknown_name_is_an_attribute_error() -> None:
    python("import qverify; assert not hasattr(qverify, 'nonsense')")


def test_verify_is_the_function_even_after_its_module_was_imported() -> None:
    python(
        "import qverify.verification, types; assert isinstance(qverify.verify, types.FunctionType)"
    )
    python(
        "from qverify import verify; import qverify; assert qverify.verify is verify; assert "
        "callable(verify)"
    )


def test_onnxruntime_writes_nothing_under_the_user_s_home(tmp_path: Path) -> None:
    """It would keep a device id there, and what it wants to send."""
    pytest.importorskip("onnxruntime")
    left_out = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    home = environment | {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    code = (
        "import os; from qverify import runtime; runtime.version(); "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    assert python(code, home) == "1"
    assert not list(tmp_path.iterdir())
    # The user's own choice stays.
    assert python(code, home | {"ORT_DISABLE_TELEMETRY": "true"}) == "true"


def test_the_command_s_pins_are_complete_and_apart() -> None:
    """`make demo` installs requirements.txt alone."""
    root = Path(__file__).parents[1]

    def names(lines: list[str]) -> set[str]:
        found = [re.match(r"[\w-]+", line) for line in lines]
        return {match[0].lower().replace("_", "-") for match in found if match}

    base, more = (
        (root / f"requirements{name}.txt").read_text().splitlines() for name in ("", "-dev")
    )
    project = tomllib.loads((root / "pyproject.toml").read_text())
    needed = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["cpu"],
    ]
    assert names([*needed, *project["build-system"]["requires"], "editables"]) <= names(base)
    assert not names(base) & names(more) and "-r requirements.txt" in more


def test_an_interruption_while_modules_load_is_one_line() -> None:
    code = (
        "import sys; from qverify.__main__ import main\n"
        "class Interrupt:\n"
        "    def find_spec(self, *_): raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt()); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qverify: interrupted\n")
