"""The competition's scripts, driven as its harness drives them, with a fake `qverify` behind
them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "vnncomp"
NETWORKS = "[('f', 'onnx/a.onnx'), ('g', 'onnx/b.onnx')]"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# The name of the network says what happens.
FAKE = """#!{python}
import os, sys, time
from pathlib import Path
print(sys.argv[1:], file=sys.stderr)
Path("pid").write_text(str(os.getpid()))
if "sleep" in sys.argv[1]:
    time.sleep(60)
if "unsupported" in sys.argv[1]:
    sys.exit(2)
Path(sys.argv[3]).write_text("sat\\n((X_0 1)\\n (Y_0 2))\\n")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is not the repository, with spaces in its name, and the fake in
    QVERIFY_BIN."""
    home = tmp_path / "some place"
    home.mkdir()
    fake = home / "qverify"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    for name in ("a.onnx", "sleep.onnx", "unsupported.onnx", "p.vnnlib"):
        (home / name).touch()
    monkeypatch.setenv("QVERIFY_BIN", str(fake))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(home)
    return home


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for_pid(place: Path) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (place / "pid").exists() and (place / "pid").read_text():
            return int((place / "pid").read_text())
        time.sleep(0.02)
    raise AssertionError("the fake did not start")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.parametrize("name", ["install_tool.sh", "prepare_instance.sh", "run_instance.sh"])
def test_scripts_are_executable_and_want_v1(name: str, place: Path) -> None:
    assert os.access(SCRIPTS / name, os.X_OK)
    for arguments in ([], ["v2", "c", "a.onnx", "p.vnnlib", "r", "10"]):
        done = script(name, *arguments)
        assert done.returncode == 1
        assert "v1" in done.stderr and done.stdout == ""


# -- prepare_instance.sh ---------------------------------------------------------------------------


def test_prepare(place: Path) -> None:
    assert script("prepare_instance.sh", "v1", "cat", "a.onnx", "p.vnnlib").returncode == 0
    Path("z.onnx.gz").touch()
    assert script("prepare_instance.sh", "v1", "cat", "z.onnx", "p.vnnlib").returncode == 0


@pytest.mark.parametrize("onnx", ["absent.onnx", NETWORKS])
def test_prepare_refuses(onnx: str, place: Path) -> None:
    done = script("prepare_instance.sh", "v1", "cat", onnx, "p.vnnlib")
    assert done.returncode == 1
    assert done.stderr.startswith("prepare_instance.sh: ") and done.stderr.count("\n") == 1


def test_prepare_ends_a_stray_run(place: Path) -> None:
    arguments = ["v1", "cat", "sleep.onnx", "p.vnnlib", "r", "50"]
    with subprocess.Popen(
        ["bash", SCRIPTS / "run_instance.sh", *arguments], stderr=subprocess.DEVNULL
    ) as process:
        assert wait_for_pid(place) == process.pid
        assert script("prepare_instance.sh", "v1", "cat", "a.onnx", "p.vnnlib").returncode == 0
        assert process.wait(timeout=10) == -signal.SIGKILL


def test_prepare_spares_another_process_with_the_same_number(place: Path, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        state = tmp_path / f"qverify-vnncomp-{os.getuid()}"
        state.mkdir()
        (state / "running").write_text(f"{other.pid} 1\n")
        assert script("prepare_instance.sh", "v1", "cat", "a.onnx", "p.vnnlib").returncode == 0
        assert other.poll() is None
        other.kill()


# -- run_instance.sh -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout", "limit"),
    [("100", "98.000"), ("30.0", "29.000"), ("1", "0.500"), ("20.", "19.000"), (".5", "0.250")],
)
def test_run_writes_the_results_within_the_limit(timeout: str, limit: str, place: Path) -> None:
    Path("out").mkdir()
    done = script("run_instance.sh", "v1", "cat", "a.onnx", "p.vnnlib", "out/r.txt", timeout)
    assert done.returncode == 0
    assert Path("out/r.txt").read_text().splitlines()[0] == "sat"
    assert (
        f"['a.onnx', 'p.vnnlib', 'out/r.txt', '--timeout', '{limit}', '--exit-zero']" in done.stderr
    )


@pytest.mark.parametrize("timeout", ["", "soon", "0", "-1", "1;2", "."])
def test_run_refuses_a_bad_timeout(timeout: str, place: Path) -> None:
    done = script("run_instance.sh", "v1", "cat", "a.onnx", "p.vnnlib", "r", timeout)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_run_with_several_networks_is_unknown(place: Path) -> None:
    done = script("run_instance.sh", "v1", "cat", NETWORKS, "p.vnnlib", "r", "10")
    assert done.returncode == 0
    assert Path("r").read_text() == "unknown\n"
    assert not Path("pid").exists()


def test_run_leaves_no_stale_verdict(place: Path) -> None:
    Path("r").write_text("unsat\n")
    assert (
        script("run_instance.sh", "v1", "cat", "unsupported.onnx", "p.vnnlib", "r", "10").returncode
        == 2
    )
    assert not Path("r").exists()


@pytest.mark.parametrize("way", ["timeout", "kill the script", "terminate the group"])
def test_nothing_survives_the_harness(way: str, place: Path) -> None:
    arguments = [str(SCRIPTS / "run_instance.sh"), "v1", "cat", "sleep.onnx", "p.vnnlib", "r", "50"]
    if way == "timeout":
        arguments = ["timeout", "--kill-after=1", "2", *arguments]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        pid = wait_for_pid(place)
        if way == "kill the script":
            process.kill()
        elif way == "terminate the group":
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
    if way == "timeout":
        assert process.returncode == 124
    assert gone(pid)
    assert not Path("r").exists()
