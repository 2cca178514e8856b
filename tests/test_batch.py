"""`qverify batch`: instances files, results files that resume, and worker processes that die in
every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qverify
from qverify import batch, cli, workers
from qverify.batch import BatchResults, Instance
from qverify.errors import ModelError, QverifyError, SoundnessError, UsageError
from qverify.options import Options
from qverify.printer import Printer
from qverify.result import Result, Verdict, Witness
from qverify.workers import Answer, Solve

# The workers are processes of their own, so their fake is a module on the path. The network's name
# says what happens.
FAKE = """
import os, signal, sys, time
from pathlib import Path
from qverify.workers import Answer

def load():
    if os.environ.get("QVERIFY_TEST_LOAD_FAILS"):
        sys.exit(7)
    def solve(instance, options):
        with open(Path(instance.folder) / "pids", "a") as stream:
            stream.write(f"{os.getpid()} {instance.onnx}\\n")
        kind = Path(instance.onnx).stem.partition("_")[0]
        if kind == "sleep":
            time.sleep(60)
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "bug":
            raise RuntimeError("boom")
        if kind == "threads":
            return Answer("unknown", 0.0, "", os.environ.get("OMP_NUM_THREADS", "") + "\\n")
        return Answer(kind, 0.5, "why", "((X_0 1))\\n" if kind == "sat" else "")
    return solve
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "acasxu"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture
def load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Solve[Instance]]]:
    (tmp_path / "fake_verifier.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(qverify.__file__).parents[1]))
    import fake_verifier  # type: ignore[import-not-found]

    yield fake_verifier.load
    del sys.modules["fake_verifier"]


def instances(folder: Path, *names: str, timeout: float = 30.0) -> list[Instance]:
    return [
        Instance("acasxu", f"onnx/{name}.onnx", f"vnnlib/{name}.vnnlib", str(folder), timeout)
        for name in names
    ]


def run(
    entries: list[Instance], load: Callable[[], Solve[Instance]], jobs: int = 1
) -> list[list[str]]:
    batch.run(entries, "results.csv", Options(), jobs, Printer(), load)
    return [line.split(",") for line in Path("results.csv").read_text().splitlines()]


def verdicts(rows: list[list[str]]) -> dict[str, str]:
    return {Path(row[1]).stem: row[4] for row in rows}


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Wait until a process has ended; one that its new parent has not collected yet has ended
    too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def pids(folder: Path) -> list[int]:
    return [int(line.split()[0]) for line in (folder / "pids").read_text().splitlines()]


# -- instances files -------------------------------------------------------------------------------


def test_reads_what_benchmarks_contain(folder: Path) -> None:
    (folder / "instances.csv").write_bytes(
        b"\xef\xbb\xbfonnx/a.onnx,vnnlib/1.vnnlib,116\r\n"
        b"\r\n# a comment, with a comma\n./onnx/b.onnx, ./vnnlib/2.vnnlib , 11.5\r\n"
        b"\"[('f', 'onnx/a.onnx'), ('g', 'onnx/b.onnx')]\",./vnnlib/3.vnnlib,1e2"
    )
    assert batch.read_instances("acasxu/instances.csv") == [
        Instance("acasxu", "onnx/a.onnx", "vnnlib/1.vnnlib", str(folder), 116.0),
        Instance("acasxu", "onnx/b.onnx", "vnnlib/2.vnnlib", str(folder), 11.5),
        Instance(
            "acasxu",
            "[('f', 'onnx/a.onnx'), ('g', 'onnx/b.onnx')]",
            "vnnlib/3.vnnlib",
            str(folder),
            100.0,
        ),
    ]


def test_timeout_option_replaces_and_may_stand_in_for_the_column(folder: Path) -> None:
    (folder / "i.csv").write_text("a,b,10\nc,d\n")
    assert [entry.timeout for entry in batch.read_instances("acasxu/i.csv", 2.5)] == [2.5, 2.5]
    with pytest.raises(UsageError, match="line 2"):
        batch.read_instances("acasxu/i.csv")


def test_a_version_folder_is_not_the_category(folder: Path) -> None:
    (folder / "2.0").mkdir()
    (folder / "2.0" / "instances.csv").write_text("a,b,1\n")
    assert batch.read_instances("acasxu/2.0/instances.csv")[0].category == "acasxu"


@pytest.mark.parametrize(
    "text", ["a,b\n", "a,b,c,d\n", "a,b,soon\n", "a,b,0\n", "a,b,-1\n", "a,b,nan\n", "a,b,inf\n"]
)
def test_bad_instances_file(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "i.csv").write_text(text)
    assert cli.main(["batch", "acasxu/i.csv"]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.startswith("qverify: error: acasxu/i.csv, line 1: ")
        and err.count("\n") == 1
    )


def test_missing_empty_or_binary_instances_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.csv").write_text("\n")
    (folder / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.csv", "empty.csv", "binary.csv"):
        assert cli.main(["batch", f"acasxu/{name}"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not Path("results.csv").exists()


# -- results files ---------------------------------------------------------------------------------

ROW = "acasxu,onnx/a.onnx,vnnlib/1.vnnlib,0.0,unsat,1.500\n"


@pytest.mark.parametrize("torn", ["", "acasxu,onn", "acasxu,o,v,0.0,sat,1.2", '"[(', "a"])
def test_a_torn_last_line_is_cut_off(torn: str, folder: Path) -> None:
    Path("r.csv").write_text(ROW + torn)
    file = BatchResults("r.csv", "acasxu")
    file.append(Instance("acasxu", "o", "v", str(folder), 1), Answer("timeout", 2), "o_v")
    file.close()
    assert Path("r.csv").read_text() == ROW + "acasxu,o,v,0.0,timeout,2.000\n"


def test_a_file_with_nothing_but_a_torn_line(folder: Path) -> None:
    Path("r.csv").write_text("acas")
    BatchResults("r.csv", "acasxu").close()
    assert Path("r.csv").read_text() == ""


@pytest.mark.parametrize(
    "text", ["notes", "a,b,10\n", "a,b,c,d,e,f\n", ROW + "a,b,3\n", "x\n" + ROW]
)
def test_another_file_is_left_alone(text: str, folder: Path) -> None:
    Path("r.csv").write_text(text)
    with pytest.raises(UsageError, match="not a results file"):
        BatchResults("r.csv", "acasxu")
    assert Path("r.csv").read_text() == text


def test_summary() -> None:
    rows = [
        ["c", "o", "v", "0.0", verdict, text]
        for verdict, text in [("unsat", "1"), ("unsat", "4"), ("sat", "2")]
    ]
    assert batch.summary(rows).splitlines() == [
        "verdict   count  median s     max s",
        "unsat         2      2.50      4.00",
        "sat           1      2.00      2.00",
        "total         3      2.00      4.00",
    ]


# -- one instance ----------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, fake: Callable[..., Result]) -> None:
    module = types.ModuleType("qverify.verification")
    module.__dict__["verify"] = fake
    monkeypatch.setitem(sys.modules, "qverify.verification", module)


def test_solve_resolves_paths_and_passes_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    point = Witness(
        (np.array([1.5], np.float32),), (np.array([2.0], np.float32),), ("1.5",), ("2.0",)
    )

    def verify(*args: Any) -> Result:
        seen.extend(args)
        return Result(Verdict.SAT, "attack", point)

    install(monkeypatch, verify)
    answer = batch.solve(instances(folder, "a", timeout=12)[0], Options(seed=5))
    assert seen == [folder / "onnx/a.onnx", folder / "vnnlib/a.vnnlib", Options(timeout=12, seed=5)]
    assert (answer.verdict, answer.message) == ("sat", "attack")
    assert answer.counterexample == "((X_0 1.5)\n (Y_0 2.0))\n"


@pytest.mark.parametrize(
    ("error", "verdict", "message"),
    [
        (ModelError("broken"), "error", "broken"),
        (SoundnessError("differ"), "error", "internal error, please report it: differ"),
    ],
)
def test_solve_reports_errors(
    error: Exception, verdict: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*_: Any) -> Result:
        raise error

    install(monkeypatch, verify)
    answer = batch.solve(instances(folder, "a")[0], Options())
    assert (answer.verdict, answer.message) == (verdict, message)


# -- many instances --------------------------------------------------------------------------------


def test_every_instance_gets_a_row(
    folder: Path,
    load: Callable[[], Solve[Instance]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(workers, "grace", lambda _: 0.2)
    entries = [
        *instances(folder, "unsat_1", "sat_1", "crash_1", "bug_1"),
        *instances(folder, "sleep_1", timeout=0.3),
        Instance("acasxu", "[('f', 'a'), ('g', 'b')]", "v", str(folder), 1),
        *instances(folder, "unknown_1", "error_1"),
    ]
    rows = run(entries[:-3], load, jobs=2)
    assert verdicts(rows) == {
        "unsat_1": "unsat",
        "sat_1": "sat",
        "crash_1": "error",
        "bug_1": "error",
        "sleep_1": "timeout",
    }
    assert rows[[row[4] for row in rows].index("unsat")][:4] == [
        "acasxu",
        "onnx/unsat_1.onnx",
        "vnnlib/unsat_1.vnnlib",
        "0.0",
    ]
    assert Path("results_counterexamples/sat_1_sat_1.counterexample").read_text() == "((X_0 1))\n"
    assert len(set(pids(folder))) < len(pids(folder))  # a worker serves several instances
    assert all(map(gone, pids(folder)))
    out, err = capfd.readouterr()
    assert out == ""
    assert "the worker process was killed by SIGSEGV" in err and "RuntimeError: boom" in err
    assert "total         5" in err

    rows = run(entries, load)  # only what is missing runs
    assert len(pids(folder)) == 5 + 2
    text = Path("results.csv").read_text()
    assert """acasxu,"[('f', 'a'), ('g', 'b')]",v,0.0,error,0.000\n""" in text
    assert len(rows) == len(entries)
    assert "5 of 8 instances are in results.csv already (" in capfd.readouterr().err


def test_counterexamples_of_equal_stems_have_names_of_their_own() -> None:
    entries = [
        Instance("c", onnx, spec, ".", 1.0)
        for onnx, spec in [("m.onnx", "a/x.vnnlib"), ("m.onnx", "b/x.vnnlib")]
    ]
    found = batch.names([*entries, entries[0], Instance("c", "m.onnx", "y.vnnlib", ".", 1.0)])
    assert list(found.values()) == ["m_x", "m_x_2", "m_y"]
    # The number is taken.
    again = batch.names([*entries, Instance("c", "m.onnx", "x_2.vnnlib", ".", 1.0)])
    assert list(again.values()) == ["m_x", "m_x_2", "m_x_2_2"]


def test_cores_are_shared_among_workers(
    folder: Path, load: Callable[[], Solve[Instance]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in workers.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    run(instances(folder, "threads_1"), load, jobs=2)
    assert Path("results_counterexamples/threads_1_threads_1.counterexample").read_text() == "4\n"
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_worker_that_cannot_start_ends_the_run(
    folder: Path, load: Callable[[], Solve[Instance]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVERIFY_TEST_LOAD_FAILS", "1")
    with pytest.raises(QverifyError, match="exited with 7 before its first task"):
        run(instances(folder, "unsat_1"), load)


def test_options_select_instances(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "i.csv").write_text("a1,p,1\na2,q,1\na3,p,1\na4,p,1\n")
    seen: list[Any] = []
    monkeypatch.setattr(batch, "run", lambda *args: seen.extend(args))
    words = (
        "batch acasxu/i.csv --filter ,p --limit 2 --timeout 9 --jobs 3 --seed 4 --no-attack "
        "--results o.csv"
    )
    assert cli.main([*words.split(), "--device", "cpu"]) == 0
    assert [(entry.onnx, entry.timeout) for entry in seen[0]] == [("a1", 9), ("a3", 9)]
    assert seen[1:4] == ["o.csv", Options(device="cpu", seed=4, attack=False), 3]
    capsys.readouterr()


DRIVER = """
import signal, sys, fake_verifier
from pathlib import Path
from qverify import batch
from qverify.options import Options
from qverify.printer import Printer

if __name__ == "__main__":  # workers import this file too
    # Ignored where the tests run in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = str(Path("acasxu").resolve())
    names = ("unsat_1", "sleep_1", "sleep_2", "unsat_2")
    entries = [
        batch.Instance("acasxu", f"{name}.onnx", f"{name}.vnnlib", folder, 60.0) for name in names
    ]
    batch.run(entries, "results.csv", Options(), 2, Printer(), fake_verifier.load)
"""


@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)]
)
def test_an_interrupted_run_leaves_rows_and_no_processes(
    number: signal.Signals, group: bool, folder: Path, load: Callable[[], Solve[Instance]]
) -> None:
    Path("driver.py").write_text(DRIVER)
    process = subprocess.Popen(
        [sys.executable, "driver.py"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (folder / "pids").exists() and len(pids(folder)) == 3:
            break
        time.sleep(0.05)
    if group:
        os.killpg(process.pid, number)  # what a terminal does on Ctrl-C
    else:
        process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert all(map(gone, pids(folder)))
    assert Path("results.csv").read_text() == "acasxu,unsat_1.onnx,unsat_1.vnnlib,0.0,unsat,0.500\n"
    if number != signal.SIGKILL:
        assert "3 instances have no row yet" in err


def test_ctrl_c_while_a_worker_starts_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    reached = False
    # Ignored where the tests run in the background.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), workers._child_environment(2):
            # Another thread may take what the process gets.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            reached = True
    finally:
        signal.signal(signal.SIGINT, old)
    assert reached and "OMP_NUM_THREADS" not in os.environ
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_results_must_be_a_regular_file() -> None:
    """/dev/full never ends: reading what it holds already once went on until memory was full."""
    with pytest.raises(UsageError, match="not a regular file"):
        BatchResults("/dev/full", "category")
