"""Everything that only a GPU can tell, in one command: `make gpu`, or

    python benchmarks/gpu/run.py [--device cuda|cpu] [--out FOLDER] [--seconds 540]
        [--stages NAME ...] [--quick] [--instances INSTANCES.csv ...] [--timeout 5]

Needed are Python 3.11 or newer, NumPy, CuPy, onnx, click and pytest; no network, no installation.
Stages run in the order of their importance, each in a process of its own (a kernel that fails takes
its process along, not the run) and in its share of the time: what one leaves goes to the next ones.
What a stage finds is written at once:

| stage | question | file |
|---|---|---|
| `device` | what is this; is every kernel variant exact here? | `gpu_summary.json` |
| `ceilings` | bytes copied and int8 multiplications per second | `gpu_ceilings.csv` |
| `intervals` | boxes per second; against inference and ceilings | `gpu_intervals.csv` |
| `tests` | the tests marked `gpu`: the same bits as the CPU | `gpu_tests.xml`, `gpu_log.txt` |
| `dual` | subproblems per second of the dual, on the GPU and the CPU | `gpu_dual.csv` |
| `verdicts` | time to a verdict: GPU, CPU, 2023 procedure on the GPU | `gpu_verdicts.csv` |
| `sanitizer` | compute-sanitizer, where it is on PATH, on test layers | `gpu_log.txt` |

`gpu_summary.json` holds every stage's state (`ok`, `out of time`, `failed`, `left out`) and the
table that is printed last; it is rewritten after every stage. With --device cpu and --quick all
stages run in a tiny form on any computer, which shows that the script works and measures nothing.

Columns end in their unit: `_s` seconds of a whole batch. `interval_s` is bounds of boxes by what
the search uses, `fused_s` the fused kernels alone, `points_s` the same on single points,
`inference_s` an exact inference of as many points by the same kernels (`points.py`), `run_s` one by
the integer ops on the same machine, `gemm_s` cuBLAS's int8 products of one, `runtime_s_per_sample`
onnxruntime's (`runtime_by` says where). `over_*` is `interval_s` over these; `of_limit` the share
of the smaller of `tensor_limit` and `memory_limit` that is reached, `of_limit_fused` that of the
fused kernels alone.

An onnxruntime that qverify refuses as too old is hidden from it, as if there were none: QDQ files
and the replay of counterexamples are left out then, which the summary says.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs without an installation

# in the order of their importance, with their shares of the time
STAGES = {
    "device": 12,
    "ceilings": 4,
    "intervals": 20,
    "tests": 34,
    "dual": 12,
    "verdicts": 20,
    "sanitizer": 16,
}
LAST = 15.0  # seconds that a stage has to end in, once its time is up
TESTS = ("tests/kernels", "tests/test_propagate_device.py", "tests/test_gpu.py")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TOOLS = ("memcheck", "racecheck", "synccheck")
VARIANTS = ("PLAIN", "SPARSE", "DENSE", "SMALL")
COLUMNS = {
    "ceilings": ("what", "unit", "rate"),
    "intervals": (
        *(
            "network",
            "batch",
            "by",
            "interval_s",
            "boxes_per_second",
            "fused_s",
            "other_steps_s",
            "points_s",
        ),
        *(
            "inference_s",
            "over_inference",
            "run_s",
            "over_run",
            "gemm_s",
            "gemm_error",
            "over_gemm",
        ),
        *("runtime_s_per_sample", "runtime_by", "over_runtime"),
        *("tensor_limit", "memory_limit", "of_limit_fused", "of_limit", "steps", "launches"),
    ),
    "dual": (
        "model",
        "property",
        "device",
        "batch",
        "steps",
        "seconds",
        "proved",
        "subproblems_per_second",
    ),
    "verdicts": (
        "suite",
        "onnx",
        "vnnlib",
        "method",
        "verdict",
        "seconds",
        "subproblems",
        "by",
        "note",
    ),
}

# -- one stage, in this process --------------------------------------------------------------------


def emit(found: dict[str, Any]) -> None:
    """A finding, as a line for the process that collects them."""
    print(json.dumps(found), flush=True)


def hidden_runtime() -> Any:
    """onnxruntime, or None; qverify does not see it if it is too old."""
    from qverify import runtime
    from qverify.errors import UsageError

    try:
        import onnxruntime as ort
    except ImportError:
        ort = None
    try:
        runtime.version()
    except UsageError as error:
        sys.modules["onnxruntime"] = None  # type: ignore[assignment]
        emit({"left_out": f"QDQ files and the replay of counterexamples ({error})"})
    return ort


def stage(name: str, given: argparse.Namespace) -> None:
    """Run one of the stages that are Python of ours."""
    from benchmarks.gpu import device, rates, verdicts
    from qverify import runtime
    from qverify.kernels import open_kernels

    ort, kernels, quick = hidden_runtime(), open_kernels(given.device), given.quick
    if name == "device":
        device.describe(kernels, given.variant, emit)
    elif name == "ceilings":
        device.ceilings(kernels, quick, emit)
    elif name == "intervals":
        rates.intervals(kernels, ort, json.loads(given.ceilings), quick, emit)
    elif name == "dual":
        rates.dual(kernels, quick, emit)
    elif name == "verdicts":
        limit = 2 if quick else None
        verdicts.race(kernels, given.instances, given.timeout, runtime.available(), limit, emit)
    elif name == "exact" and not kernels.is_host:  # under compute-sanitizer
        # Every array its own allocation, so that a stray access is seen.
        kernels.xp.cuda.set_allocator(None)
        for variant in ("SPARSE", "DENSE", "PLAIN", "SMALL"):
            device.describe(kernels, variant, emit, timed=False)


# -- all stages ------------------------------------------------------------------------------------


class Report:
    """The files: rows as they come, the summary after every stage."""

    def __init__(self, out: Path, given: argparse.Namespace) -> None:
        self.out, self.stages, self.rows = (
            out,
            dict[str, dict[str, Any]](),
            dict[str, list[dict[str, Any]]](),
        )
        self.table: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        for name in (*(f"gpu_{stage}.csv" for stage in COLUMNS), "gpu_tests.xml", "gpu_log.txt"):
            (out / name).unlink(missing_ok=True)  # of an earlier run
        self.about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": given.device,
            "quick": given.quick,
        }
        self.write()

    def log(self) -> Any:
        return (self.out / "gpu_log.txt").open("a")

    def add(self, name: str, line: str) -> None:
        """One line of a stage's output."""
        try:
            found = json.loads(line)
        except ValueError:
            with self.log() as log:
                log.write(line)
            if line.strip():
                self.stages[name]["last_line"] = line.strip()[:300]
            if line.startswith(("FAILED", "ERROR")):
                self.stages[name].setdefault("failed", []).append(line.strip()[:200])
            return
        row = found.pop("row", None)
        if "variants" in found:
            self.stages[name].setdefault("variants", {}).update(found.pop("variants"))
        self.stages[name].update(found)
        if row is None:
            return
        path, columns = self.out / f"gpu_{name}.csv", COLUMNS[name]
        self.rows.setdefault(name, []).append(row)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(
                {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()}
            )

    def write(self) -> None:
        """The summary, at once."""
        whole = {**self.about, "stages": self.stages, "table": self.table}
        made = self.out / "gpu_summary.json.new"
        made.write_text(json.dumps(whole, indent=1) + "\n")
        made.replace(self.out / "gpu_summary.json")


def follow(command: list[str], limit: float, report: Report, name: str) -> tuple[int, bool]:
    """Run a process; its exit code, and whether its time was up. Its errors go to the log, and its
    output to the report."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "QVERIFY_HIDE_OLD_RUNTIME": "1"}  # for the tests
    more |= dict.fromkeys(THREADS, "1")  # all methods on the CPU use one
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), **more}
    with report.log() as log:
        log.write(f"\n==== {name}: {' '.join(command[1:])}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                report.add(name, line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    late = False
    for seconds, what in ((limit, None), (LAST, signal.SIGINT), (LAST, signal.SIGKILL)):
        if what is not None:  # the first lets pytest write what it knows
            late = True
            os.killpg(process.pid, what)
        try:
            process.wait(seconds)
            break
        except subprocess.TimeoutExpired:
            continue  # after the last: it hangs in the driver, and is left behind
    reader.join(5)
    return -9 if process.returncode is None else process.returncode, late


Command = tuple[str, list[str]]  # with a name, where a stage has several


def commands(name: str, given: argparse.Namespace, report: Report) -> list[Command]:
    """What a stage runs."""
    this = [sys.executable, str(Path(__file__).resolve())]
    base = ["--device", given.device, "--timeout", str(given.timeout), *["--quick"] * given.quick]
    if (
        name == "device" and given.device != "cpu"
    ):  # each variant for itself: one that fails leaves a dead process
        found = [["--variant", variant] for variant in (*VARIANTS, "chosen")]
        return [
            (" ".join(more[1:]), [*this, "--stage", name, *base, *more]) for more in ([], *found)
        ]
    if name == "tests":
        return [("", _tests(given, report))]
    if name == "sanitizer":
        tool = shutil.which("compute-sanitizer")
        checks = [(t, [tool, "--tool", t, "--error-exitcode", "9"]) for t in TOOLS] if tool else []
        return [(t, [*check, *this, "--stage", "exact", *base]) for t, check in checks]
    if name == "intervals":
        base += [
            "--ceilings",
            json.dumps({row["what"]: row["rate"] for row in report.rows.get("ceilings", [])}),
        ]
    if name == "verdicts":
        base += ["--instances", *map(str, given.instances)]
    return [("", [*this, "--stage", name, *base])]


def _tests(given: argparse.Namespace, report: Report) -> list[str]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if given.quick:
        return [*pytest, "--co", TESTS[0]]
    if (
        importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8
    ):  # compiling takes time, on the CPU
        pytest += ["-p", "xdist.plugin", "-n", "4"]
    return [
        *pytest,
        "--durations=15",
        f"--junitxml={report.out.resolve() / 'gpu_tests.xml'}",
        *TESTS,
    ]


def run_stage(name: str, given: argparse.Namespace, report: Report, limit: float) -> None:
    """One stage, within so many seconds."""
    start = time.monotonic()
    stage = report.stages[name] = {"state": "running", "limit_s": round(limit, 1)}
    report.write()
    wanted = commands(name, given, report)
    state = "ok" if wanted else "left out"
    for k, (which, command) in enumerate(wanted):
        left = (limit - (time.monotonic() - start)) / (len(wanted) - k)
        code, late = follow(command, max(left, 1.0), report, name)
        if which:
            end = "out of time" if late else f"exit code {code}"
            stage.setdefault("processes", {})[which] = end
        if late or code:
            state = "out of time" if late and state != "failed" else "failed"
            log = (report.out / "gpu_log.txt").read_text(errors="replace")
            last = log.rstrip().splitlines()[-3:]
            stage.setdefault("why", " | ".join(line[:200] for line in last))
        report.write()
    if not wanted:
        stage["why"] = "compute-sanitizer is not on PATH"
    stage |= {"state": state, "seconds": round(time.monotonic() - start, 1)}


def tables(report: Report) -> list[str]:
    """What is printed at the end: the states, and the figures that matter most."""
    lines = []
    for name, stage in report.stages.items():
        more = stage.get("why") or stage.get("last_line", "")
        lines.append(f"{name:10} {stage['state']:12} {stage.get('seconds', '')} s  {more}".rstrip())
        lines += [f"  {line}" for line in stage.get("failed", [])[:20]]
    for name, result in report.stages.get("device", {}).get("variants", {}).items():
        lines.append(
            f"variant {name}: " + ", ".join(f"{key} {value}" for key, value in result.items())
        )
    lines += [
        f"{row['what']}: {row['rate']:.4g} {row['unit']}" for row in report.rows.get("ceilings", [])
    ]
    for row in report.rows.get("intervals", []):
        if "boxes_per_second" not in row:
            lines.append(f"{row['network']} x {row['batch']}: {row['by']}")
            continue
        ratios = (
            f"{key} {row[key]:.2f}"
            for key in (
                "over_inference",
                "over_run",
                "over_gemm",
                "over_runtime",
                "of_limit_fused",
                "of_limit",
            )
            if key in row
        )
        lines.append(
            f"{row['network']} x {row['batch']}: {row['boxes_per_second']:.4g} boxes/s, "
            f"{', '.join(ratios)} ({row['by']})"
        )
    for row in report.rows.get("dual", []):
        lines.append(
            f"dual {row['model']} {row['device']} x {row['batch']}: "
            f"{row['subproblems_per_second']:.4g} /s"
        )
    if "verdicts" in report.rows:
        from benchmarks.gpu.verdicts import summary

        lines += summary(report.rows["verdicts"])
    notes = {stage["left_out"] for stage in report.stages.values() if "left_out" in stage}
    return lines + [f"left out: {note}" for note in sorted(notes)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=540.0, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument(
        "--instances", nargs="+", type=Path, default=[ROOT / "specs" / "examples" / "instances.csv"]
    )
    parser.add_argument("--timeout", type=float, default=5.0, help="of one method on one instance")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """All stages; 1 if one failed."""
    given = parse(arguments)
    given.instances = [path.resolve() for path in given.instances]
    if given.stage:
        stage(given.stage, given)
        return 0
    from qverify.errors import DeviceError
    from qverify.kernels import open_kernels

    end = time.monotonic() + given.seconds
    try:
        print(open_kernels(given.device).description)
    except DeviceError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    report = Report(given.out, given)
    for k, name in enumerate(given.stages):
        left = end - time.monotonic()
        share = STAGES[name] / sum(STAGES[later] for later in given.stages[k:])
        if left < 2:
            report.stages[name] = {"state": "left out", "why": "no time was left"}
            continue
        run_stage(name, given, report, left * share)
        report.table = tables(report)
        report.write()
        print(
            f"{name}: {report.stages[name]['state']}, {report.stages[name]['seconds']} s",
            flush=True,
        )
    print("\n".join(report.table))
    return int(any(stage["state"] == "failed" for stage in report.stages.values()))


if __name__ == "__main__":
    sys.exit(main())
