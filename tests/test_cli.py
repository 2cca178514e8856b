"""The command line: shapes of the output, exit codes, files. The verifier behind it is a fake."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import subprocess
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qverify
from qverify import cli
from qverify.errors import ModelError, SoundnessError, SpecError, UnsupportedModel
from qverify.files import write_text
from qverify.options import Options
from qverify.property import Box, Property, Query, Variable
from qverify.result import Progress, Result, Stats, Verdict, Witness
from qverify.search.branch import RULES

Fake = Callable[..., Result]


def witness() -> Witness:
    return Witness(
        inputs=(np.array([[0.1, 2.0]], np.float32), np.array(7, np.uint8)),
        outputs=(np.array([-0.5, 1e-05], np.float32),),
        input_text=("0.1", "2", "7"),
        output_text=("-0.5", "1e-05"),
    )


def prop(version: str) -> Property:
    box = Box((Fraction(0),) * 3, (Fraction(9),) * 3)
    inputs = (Variable("image", "float32", (1, 2)), Variable("mode", "uint8", ()))
    return Property(version, inputs, (Variable("logits", "real", (2,)),), (Query(box, ((),)),))


def sat(version: str = "1.0") -> Result:
    details = {
        "property": prop(version),
        "onnxruntime": "1.32.0",
        "warnings": ["the scale of node 3 is zero"],
    }
    return Result(
        Verdict.SAT, "found by the attack", witness(), Stats(seconds=0.5, attack_points=3), details
    )


UNSAT = Result(Verdict.UNSAT, "all 12 boxes closed", stats=Stats(subproblems=12))
V1_TEXT = "sat\n((X_0 0.1)\n (X_1 2)\n (X_2 7)\n (Y_0 -0.5)\n (Y_1 1e-05))\n"
V2_TEXT = "sat\nimage float32 [1,2]\n0.1\n2\nmode uint8 []\n7\nlogits real [2]\n-0.5\n1e-05\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(qverify.__file__).parents[1]))  # for subprocesses
    (tmp_path / "m.onnx").write_bytes(b"model")
    (tmp_path / "s.vnnlib").write_text("spec")
    return tmp_path


@pytest.fixture
def solver(
    monkeypatch: pytest.MonkeyPatch, files: Path
) -> Callable[[Fake | Result], list[tuple[Any, ...]]]:
    """Install a fake verifier, which returns a result or is a function; return the list of its
    calls."""

    def install(fake: Fake | Result) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def verify(*args: Any) -> Result:
            calls.append(args)
            return fake if isinstance(fake, Result) else fake(*args)

        module = types.ModuleType("qverify.verification")
        module.__dict__["verify"] = verify
        monkeypatch.setitem(sys.modules, "qverify.verification", module)
        return calls

    return install


def raising(error: BaseException) -> Fake:
    def verify(*_: Any) -> Result:
        raise error

    return verify


def expect_one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Nothing on standard output, one line on standard error that holds the words."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qverify: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


# -- verdicts --------------------------------------------------------------------------------------


def test_unsat(solver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    solver(UNSAT)
    assert cli.main(["m.onnx", "s.vnnlib"]) == 0
    out, err = capsys.readouterr()
    assert out == "unsat\n"
    assert err.startswith("qverify: unsat in ") and err.endswith(" s: all 12 boxes closed\n")


@pytest.mark.parametrize(
    ("version", "text"), [("1.0", V1_TEXT), ("2.0", V2_TEXT), ("2.1", V2_TEXT)]
)
def test_sat_prints_the_counterexample(
    version: str, text: str, solver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(sat(version))
    assert cli.main(["m.onnx", "s.vnnlib"]) == 1
    out, err = capsys.readouterr()
    assert out == text
    assert err.splitlines()[0] == "qverify: warning: the scale of node 3 is zero"


@pytest.mark.parametrize("verdict", [Verdict.UNKNOWN, Verdict.TIMEOUT])
def test_undecided(verdict: Verdict, solver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    solver(Result(verdict))
    assert cli.main(["m.onnx", "s.vnnlib"]) == 3
    assert capsys.readouterr().out == f"{verdict.value}\n"


def test_exit_zero(solver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    solver(sat())
    assert cli.main(["m.onnx", "s.vnnlib", "--exit-zero"]) == 0
    solver(raising(ModelError("no")))
    assert cli.main(["m.onnx", "s.vnnlib", "--exit-zero"]) == 2
    capsys.readouterr()


def test_counterexample_that_does_not_fit_the_declarations_is_withheld(
    solver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    result = sat("2.0")
    short = Witness(result.witness.inputs, result.witness.outputs, ("1",), ("2", "3"))  # type: ignore[union-attr]
    solver(Result(Verdict.SAT, "", short, details=result.details))
    assert cli.main(["m.onnx", "s.vnnlib"]) == 4
    assert "please report" in capsys.readouterr().err


def test_verbose_shows_the_counters(solver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    solver(sat())
    cli.main(["-v", "m.onnx", "s.vnnlib"])
    err = capsys.readouterr().err
    assert "  attack_points    3\n" in err and "  onnxruntime      1.32.0\n" in err


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["m.onnx", "s.vnnlib"],
        ["verify", "m.onnx", "s.vnnlib"],
        ["--seed", "0", "m.onnx", "s.vnnlib"],
        ["--", "m.onnx", "s.vnnlib"],
    ],
)
def test_verify_is_the_default_command(
    arguments: list[str], solver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = solver(UNSAT)
    assert cli.main(arguments) == 0
    assert calls[0][:3] == ("m.onnx", "s.vnnlib", Options())
    capsys.readouterr()


def test_the_help_names_every_branching_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """It is written by hand: the command line loads no search before it has to."""
    assert cli.main(["verify", "--help"]) == 0
    words = set(re.findall(r"\w+", capsys.readouterr().out))
    assert words >= set(RULES), "see --branch in qverify/cli/__init__.py"


def test_options_reach_the_verifier(solver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = solver(UNSAT)
    words = (
        "m.onnx s.vnnlib --timeout 7.5 --device cpu --seed 3 --batch 64 --branch widest --no-attack"
    )
    assert cli.main(words.split()) == 0
    options = calls[0][2]
    assert 0 < options.timeout <= 7.5  # what the start took is taken off
    assert options == Options(options.timeout, "cpu", 3, 64, "widest", attack=False)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "MODEL"),
        (["m.onnx"], "SPEC"),
        (["m.onnx", "s.vnnlib", "r", "extra"], "extra"),
        (["m.onnx", "s.vnnlib", "--nonsense"], "--nonsense"),
        (["m.onnx", "s.vnnlib", "--timeout", "0"], "--timeout"),
        (["m.onnx", "s.vnnlib", "--timeout", "-3"], "--timeout"),
        (["m.onnx", "s.vnnlib", "--timeout", "nan"], "--timeout"),
        (["m.onnx", "s.vnnlib", "--timeout", "inf"], "--timeout"),
        (["m.onnx", "s.vnnlib", "--batch", "0"], "--batch"),
        (["m.onnx", "s.vnnlib", "--device", "tpu"], "--device"),
        (["m.onnx", "s.vnnlib", "--seed", "-1"], "--seed"),
        (["s.vnnlib", "m.onnx"], "the files are swapped (m.onnx as SPEC): the order is MODEL SPEC"),
        (["check", "s.vnnlib", "m.onnx.gz", "c"], "swapped (m.onnx.gz as SPEC)"),
        (["check", "m.onnx", "c", "s.vnnlib.gz"], "the order is MODEL SPEC CERTIFICATE"),
        (["check", "c", "s.vnnlib", "m.onnx"], "swapped (m.onnx as CERTIFICATE)"),
        (["batch"], "INSTANCES"),
        (["inspect"], "Missing argument 'MODEL'. (qverify inspect --help shows the usage)"),
        (["m.onnx"], "(qverify --help shows the usage)"),
        (["insepct", "m.onnx"], "there is no command and no file 'insepct': is 'inspect' meant?"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], word: str, solver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = solver(UNSAT)
    assert cli.main(arguments) == 2
    expect_one_line(capsys, "error: ", word)
    assert not calls


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in (
        "MODEL SPEC [RESULTS_FILE]",
        "batch INSTANCES.csv",
        "inspect MODEL",
        "--timeout",
        "Exit codes",
    ):
        assert word in out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qverify ")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("qverify ", {"plain,batch", "plain,robustness", "file,"}),
        ("qverify ins", {"plain,inspect", "file,ins"}),
        ("qverify m.onnx s", {"file,s"}),
        ("qverify m.onnx s.vnnlib --dev", {"plain,--device"}),
        ("qverify m.onnx s.vnnlib --json r", {"file,r"}),
        ("qverify robustness m.onnx d", {"file,d"}),
        ("qverify train --recipe ", {"plain,qverify", "plain,paper"}),
    ],
)
def test_shell_completion(
    words: str, found: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_QVERIFY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    out, err = capsys.readouterr()
    lines = set(out.splitlines())
    assert (
        (stop.value.code, err) == (0, "")
        and found <= lines
        and (words.endswith(" ") or found == lines)
    )


def test_inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = types.ModuleType("qverify.inspect")
    module.__dict__["describe"] = lambda path, shapes: f"a network in {path} with {shapes}"
    monkeypatch.setitem(sys.modules, "qverify.inspect", module)
    assert cli.main(["inspect", "m.onnx", "--shape", "x=1,2", "--shape", "y=3"]) == 0
    assert capsys.readouterr().out == "a network in m.onnx with ('x=1,2', 'y=3')\n"


def test_inspect_lists_all_that_stops_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def describe(path: str, shapes: tuple[str, ...]) -> str:
        raise UnsupportedModel(f"{path}: nodes a and 2 more", ["node a", "node b", "node c"])

    module = types.ModuleType("qverify.inspect")
    module.__dict__["describe"] = describe
    monkeypatch.setitem(sys.modules, "qverify.inspect", module)
    assert cli.main(["inspect", "m.onnx"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[:3] == ["node a", "node b", "node c"]
    (last,) = err.splitlines()[3:]  # which does not say them again
    assert last == "qverify: error: m.onnx: it cannot be read, for the reasons above"


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ModelError("m.onnx: broken\nat byte 3"), 2, ("error: m.onnx: broken at byte 3",)),
        (UnsupportedModel("node 3 (Tanh)"), 2, ("error: node 3 (Tanh)",)),
        (SpecError("line 4"), 2, ("error: line 4",)),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.onnx"),
            2,
            ("error: x.onnx: No such file",),
        ),
        (
            SoundnessError("evaluators differ"),
            4,
            ("internal error", "evaluators differ", "please report"),
        ),
        (RuntimeError("boom"), 4, ("internal error: RuntimeError: boom", "please report")),
        (KeyboardInterrupt(), 130, ("interrupted",)),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    code: int,
    words: tuple[str, ...],
    solver: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    solver(raising(error))
    assert cli.main(["m.onnx", "s.vnnlib"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    # Click ends the terminal's ^C line with an empty one.
    assert err.lstrip("\n").count("\n") == 1, err
    for word in words:
        assert word in err


def test_verbose_shows_the_traceback_of_our_own_faults(
    solver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(raising(RuntimeError("boom")))
    assert cli.main(["m.onnx", "s.vnnlib", "-v"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_too_little_memory_is_no_fault_of_ours(
    solver: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starved = Result(Verdict.UNKNOWN, "not enough memory")
    solver(starved)
    assert cli.main(["m.onnx", "s.vnnlib"]) == 3
    assert capsys.readouterr().out == "unknown\n"
    module = types.ModuleType("qverify.inspect")
    module.__dict__["describe"] = raising(MemoryError())
    monkeypatch.setitem(sys.modules, "qverify.inspect", module)
    assert cli.main(["inspect", "m.onnx"]) == 2
    expect_one_line(capsys, "error: ", "not enough memory")


# -- files -----------------------------------------------------------------------------------------


def test_results_file_is_what_standard_output_says(
    solver: Any, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(sat())
    old = os.umask(0o022)
    try:
        assert cli.main(["m.onnx", "s.vnnlib", "r.txt"]) == 1
    finally:
        os.umask(old)
    assert (files / "r.txt").read_text() == capsys.readouterr().out == V1_TEXT
    # The harness may be another user.
    assert stat.S_IMODE((files / "r.txt").stat().st_mode) == 0o644
    assert sorted(os.listdir(files)) == ["m.onnx", "r.txt", "s.vnnlib"]


def test_json(solver: Any, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver(sat("2.0"))
    cli.main(["m.onnx", "s.vnnlib", "--json", "r.json", "--timeout", "9"])
    document = json.loads((files / "r.json").read_text())
    assert document["verdict"] == "sat" and document["reason"] == "found by the attack"
    assert (document["model"], document["spec"]) == ("m.onnx", "s.vnnlib")
    assert document["options"]["timeout"] == 9
    assert document["stats"]["attack_points"] == 3
    assert document["details"]["onnxruntime"] == "1.32.0" and "property" not in document["details"]
    assert document["counterexample"]["inputs"] == [
        {"name": "image", "dtype": "float32", "shape": [1, 2], "values": ["0.1", "2"]},
        {"name": "mode", "dtype": "uint8", "shape": [], "values": ["7"]},
    ]
    assert document["counterexample"]["outputs"][0]["values"] == ["-0.5", "1e-05"]
    capsys.readouterr()


def test_json_without_a_counterexample(
    solver: Any, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(UNSAT)
    cli.main(["m.onnx", "s.vnnlib", "--json", "r.json"])
    assert json.loads((files / "r.json").read_text())["counterexample"] is None
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["no/such/folder/r.txt"], "does not exist"),
        (["."], "is a directory"),
        (["m.onnx"], "overwrite an input"),
        (["./s.vnnlib"], "overwrite an input"),
        (["--json", "m.onnx"], "overwrite an input"),
        (["r", "--json", "./r"], "different files"),
    ],
)
def test_files_are_checked_before_the_run(
    arguments: list[str], word: str, solver: Any, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = solver(UNSAT)
    assert cli.main(["m.onnx", "s.vnnlib", *arguments]) == 2
    expect_one_line(capsys, "error: ", word)
    assert not calls
    assert sorted(os.listdir(files)) == ["m.onnx", "s.vnnlib"]
    assert (files / "m.onnx").read_bytes() == b"model"


def test_no_answer_to_an_earlier_question_stays_behind(
    solver: Any, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("r.txt", "r.json", "r.zip")
    arguments = ["m.onnx", "s.vnnlib", "r.txt", "--json", "r.json", "--certificate", "r.zip"]
    for name in names:
        (files / name).write_text("old")

    def broken(*_: Any) -> Result:
        raise SpecError("s.vnnlib, line 3: no such operator")

    solver(broken)
    assert cli.main(arguments) == 2
    assert sorted(os.listdir(files)) == ["m.onnx", "r.zip", "s.vnnlib"]
    capsys.readouterr()
    solver(Result(Verdict.TIMEOUT, "time is up"))
    assert cli.main(arguments) == 3
    said = "no certificate is written to r.zip: timeout has none here"
    assert f"{said}; what that file holds is from before\n" in capsys.readouterr().err
    assert (
        files / "r.zip"
    ).read_text() == "old"  # it may have taken hours, and is checked before it is believed
    (files / "r.zip").unlink()
    assert cli.main(arguments) == 3
    assert f"{said}\n" in capsys.readouterr().err
    assert sorted(os.listdir(files)) == ["m.onnx", "r.json", "r.txt", "s.vnnlib"]


def test_full_disk_leaves_no_file_and_still_says_the_verdict(
    solver: Any, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(UNSAT)
    (files / "r.txt").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(["m.onnx", "s.vnnlib", "r.txt"]) == 2
    out, err = capsys.readouterr()
    assert out == "unsat\n"
    assert err == "qverify: error: cannot write r.txt: No space left on device\n"
    assert sorted(os.listdir(files)) == ["m.onnx", "s.vnnlib"]


def test_a_link_keeps_pointing_where_it_did(files: Path) -> None:
    (files / "real").write_text("old")
    (files / "link").symlink_to("real")
    write_text("link", "new")
    assert (files / "link").is_symlink() and (files / "real").read_text() == "new"


def test_a_device_is_not_replaced(solver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    solver(UNSAT)
    assert cli.main(["m.onnx", "s.vnnlib", os.devnull]) == 0
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    capsys.readouterr()


# -- streams ---------------------------------------------------------------------------------------

DRIVER = """
import sys, types
from qverify.result import Result, Verdict
module = types.ModuleType("qverify.verification")
module.verify = lambda *_: Result(Verdict.UNSAT, "proved")
sys.modules["qverify.verification"] = module
from qverify.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_closed_pipe_is_no_error(files: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "m", "s", "r.txt"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write)
    assert done.returncode == 0
    assert done.stderr.startswith("qverify: unsat in ") and done.stderr.count("\n") == 1
    assert (files / "r.txt").read_text() == "unsat\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_standard_output_on_a_full_disk_is_one_line(files: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, "m", "s"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert (
        done.stderr == "qverify: error: cannot write to standard output: No space left on device\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def reports(*args: Any) -> Result:
    for second in range(25):
        args[3](
            Progress(seconds=float(second), subproblems=1000 * second, open=5, proved=second / 100)
        )
    return UNSAT


def test_progress_on_a_terminal_is_one_line_that_goes_away(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver(reports)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["m.onnx", "s.vnnlib"]) == 0
    text = terminal.getvalue()
    assert "\r1.0 s" not in text  # short runs stay quiet
    assert "\r24.0 s: 24,000 parts bounded, 5 open, 24 % proved" in text
    live, final = text[: text.rindex("\r") + 1], text[text.rindex("\r") + 1 :]
    assert "\n" not in live and live.endswith("  \r")
    assert final.startswith("qverify: unsat in ") and final.endswith("\n")


def test_progress_elsewhere_is_a_line_every_ten_seconds(
    solver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    solver(reports)
    cli.main(["m.onnx", "s.vnnlib"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["10.0", "20.0"]
    cli.main(["-v", "m.onnx", "s.vnnlib"])
    assert "qverify: 0.0 s: 0 parts bounded, 5 open, 0 % proved" in capsys.readouterr().err


def test_losing_standard_error_does_not_stop_a_run(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    solver(UNSAT)
    monkeypatch.setattr(sys, "stderr", Broken())
    assert cli.main(["m.onnx", "s.vnnlib"]) == 0


def test_closed_streams_do_not_stop_a_run(
    solver: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver(UNSAT)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["m.onnx", "s.vnnlib", "r.txt"]) == 0
    assert (files / "r.txt").read_text() == "unsat\n"
