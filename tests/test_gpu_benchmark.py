"""The script that `make gpu` runs, where there is no GPU: tiny, on the CPU; and its stages on a
stand-in for CuPy."""

from __future__ import annotations

import csv
import json
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import device as machine
from benchmarks.gpu import rates, run, verdicts
from benchmarks.gpu.points import make_inference
from qverify.errors import DeviceError
from qverify.frontend.model import read_model
from qverify.kernels import Kernels, gpu
from qverify.kernels.packing import Variant
from qverify.propagate import device
from tests.kernels.strict import open_strict
from tests.kernels.test_fused import FakeDevice
from tests.networks import CPU

EXAMPLES = Path(__file__).parents[1] / "specs" / "examples"
STATES = {"ok", "left out"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_script_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_summary.json").read_text())
    assert list(found["stages"]) == list(run.STAGES)
    assert {stage["state"] for stage in found["stages"].values()} <= STATES
    assert found["stages"]["device"]["versions"]["numpy"] == np.__version__
    assert len(list(tmp_path.iterdir())) <= 8
    for stage, columns in run.COLUMNS.items():
        rows = rows_of(tmp_path / f"gpu_{stage}.csv")
        assert rows and tuple(rows[0]) == columns
    assert "tests collected" in (tmp_path / "gpu_log.txt").read_text()
    assert "boxes/s" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Kernels:
        raise DeviceError("--device cuda needs an NVIDIA GPU: none is visible; use --device cpu")

    monkeypatch.setattr(gpu, "open_cuda", missing)
    assert run.main(["--out", str(tmp_path / "none")]) == 2
    assert (
        capsys.readouterr().err
        == "make gpu: --device cuda needs an NVIDIA GPU: none is visible; use --device cpu\n"
    )
    assert not (tmp_path / "none").exists()


STUCK = """
import json, time
print(json.dumps({"row": {"what": "copy", "unit": "bytes/s", "rate": 1.5}}), flush=True)
print("a line that is no finding", flush=True)
time.sleep(60)
"""


def test_what_was_found_before_the_time_was_up_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a stage that does not heed an interrupt, as a kernel that hangs."""
    given = run.parse(["--device", "cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(run, "LAST", 0.3)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    for text, more in (
        (STUCK, 1.0),
        (deaf + STUCK, 1.0),
        (STUCK.replace("time.sleep(60)", "1 / 0"), 20.0),
    ):
        report = run.Report(tmp_path, given)
        monkeypatch.setattr(
            run, "commands", lambda *_, text=text: [("", [sys.executable, "-c", text])]
        )
        run.run_stage("ceilings", given, report, more)
        late = more < 20
        assert report.stages["ceilings"]["state"] == ("out of time" if late else "failed")
        assert (
            report.stages["ceilings"]["seconds"] < 15
            and "no finding" in report.stages["ceilings"]["last_line"]
        )
        assert rows_of(tmp_path / "gpu_ceilings.csv") == [
            {"what": "copy", "unit": "bytes/s", "rate": "1.5"}
        ]
        log = (tmp_path / "gpu_log.txt").read_text()
        assert "a line that is no finding" in log and late != ("ZeroDivisionError" in log)
        assert late or "division by zero" in report.stages["ceilings"]["why"]


def test_instances_spread_over_every_list(tmp_path: Path) -> None:
    for name, count in (("one", 5), ("two", 2)):
        (tmp_path / f"{name}_instances.csv").write_text(
            "".join(f"{name}.onnx,{k}.vnnlib,60\n" for k in range(count))
        )
    lists = [tmp_path / "one_instances.csv", tmp_path / "two_instances.csv"]
    order = [(suite, spec.stem) for suite, _, spec in verdicts.instances(lists, True)]
    assert order[:4] == [("one", "0"), ("two", "0"), ("one", "4"), ("two", "1")] and len(order) == 7
    assert all(
        "qdq" not in str(model)
        for _, model, _ in verdicts.instances([EXAMPLES / "instances.csv"], False)
    )


def test_a_contradiction_is_loud() -> None:
    row = {"suite": "a", "onnx": "b", "vnnlib": "c", "seconds": 1.0}
    both = [
        {**row, "method": "qverify, cuda", "verdict": "sat"},
        {**row, "method": "qverify, cpu", "verdict": "unsat"},
    ]
    assert any("CONTRADICTION" in line for line in verdicts.summary(both))
    lines = verdicts.summary([both[0] | {"verdict": "unsat", "seconds": 0.5}, both[1]])
    assert not any("CONTRADICTION" in line for line in lines) and "median 0.50" in lines[-1]


# -- on a stand-in for CuPy ------------------------------------------------------------------------


class Event:
    """A CUDA event, on the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass


class FakeGpu(FakeDevice):
    """What the benchmark asks of CuPy besides."""

    cuda = types.SimpleNamespace(
        **vars(FakeDevice.cuda)
        | {
            "Event": Event,
            "get_elapsed_time": lambda a, b: 1000 * (b.at - a.at),
            "Device": lambda: types.SimpleNamespace(id=0, **vars(FakeDevice.cuda.Device())),
            "runtime": types.SimpleNamespace(
                getDeviceProperties=lambda _: {
                    "name": b"Fake",
                    "multiProcessorCount": 2,
                    "totalGlobalMem": 1 << 30,
                },
                driverGetVersion=lambda: 13000,
                runtimeGetVersion=lambda: 13000,
            ),
        }
    )

    @staticmethod
    def RawModule(code: str, options: tuple[str, ...]) -> Any:
        if code == machine.PEAK:
            return types.SimpleNamespace(
                get_function=lambda name: lambda grid, block, arguments: None
            )
        module = FakeDevice.RawModule(code, options)
        module.compile = getattr(module, "compile", lambda: None)
        return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """A machine that calls itself "cuda", with the kernels on the shim."""
    kernels = replace(open_strict(), xp=FakeGpu(), free=lambda: 1 << 30)
    fused = replace(_shim(), kernels=kernels)
    monkeypatch.setattr(gpu, "open_cuda", lambda: kernels)
    monkeypatch.setattr(device, "_OPENED", [(kernels.xp, fused)])
    return kernels


def _shim() -> Any:
    from tests.test_propagate_device import on_shim

    return on_shim(Variant.SPARSE)


def test_the_stages_on_a_stand_in(fake: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would be asked for exists in CuPy's face, and rows have the columns that are
    written."""
    found: dict[str, list[dict[str, Any]]] = {}

    def emitter(stage: str) -> machine.Emit:
        return lambda said: found.setdefault(stage, []).append(json.loads(json.dumps(said)))

    monkeypatch.setattr(machine, "_seconds", lambda fused, size: 1e-3)
    checks = {"one": lambda: True, "two": lambda: False}
    monkeypatch.setattr(
        machine,
        "comparisons",
        lambda fused: dict(list(checks.items())[: 1 + (fused.variant is Variant.DENSE)]),
    )
    for what in ("", *run.VARIANTS, "chosen"):
        machine.describe(fake, what, emitter("device"))
    whole = {key: value for said in found["device"] for key, value in said.items()}
    assert (
        whole["chosen"] == "SPARSE" and whole["name"] == "Fake" and whole["free_bytes"] == 1 << 30
    )
    exact = {
        name: one for said in found["device"] for name, one in said.get("variants", {}).items()
    }
    assert exact["SPARSE"]["exact"] and exact["DENSE"]["wrong"] == {"two": "differs"}
    assert "CompileError" in exact["SMALL"]["error"] and list(exact) == list(run.VARIANTS)
    machine.ceilings(fake, True, emitter("ceilings"))
    ceilings = {said["row"]["what"]: said["row"]["rate"] for said in found["ceilings"]}
    assert set(ceilings) == {"copy", "mma_sparse", "mma_dense"} and min(ceilings.values()) > 0
    rates.intervals(fake, None, ceilings, True, emitter("intervals"))
    for said in found["intervals"]:
        row = said["row"]
        assert row.keys() <= set(run.COLUMNS["intervals"]) and row["by"] == "CUDA kernels, sparse"
        assert (
            row["over_inference"] > 0
            and row["of_limit_fused"] > 0
            and row["fused_s"] > 0
            and row["over_run"] > 0
        )
    rates.dual(fake, True, emitter("dual"))
    assert [said["row"]["device"] for said in found["dual"]] == ["cuda"] * len(rates.DUALS) + [
        "cpu"
    ] * len(rates.DUALS)
    proved = [said["row"]["proved"] for said in found["dual"]]
    assert proved[: len(rates.DUALS)] == proved[len(rates.DUALS) :]
    verdicts.race(fake, [EXAMPLES / "instances.csv"], 5.0, False, 1, emitter("verdicts"))
    rows = [said["row"] for said in found["verdicts"]]
    assert [row["method"] for row in rows] == [
        "qverify, cuda",
        "qverify, cpu",
        "2023 procedure, cuda",
    ]
    assert {row["verdict"] for row in rows} == {"unsat"}
    for stage in run.COLUMNS:
        assert all(
            said["row"].keys() <= set(run.COLUMNS[stage]) for said in found[stage] if "row" in said
        )


def test_what_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise MemoryError("nothing is left")

    monkeypatch.setattr(rates.Timed, "row", full)
    found: list[dict[str, Any]] = []
    rates.intervals(CPU, None, {}, True, found.append)
    assert len(found) == 4 and all(
        said["row"]["by"] == "failed: MemoryError: nothing is left" for said in found
    )
    report = run.Report(tmp_path, run.parse(["--device", "cpu"]))
    report.stages["intervals"] = {"state": "ok"}
    report.add("intervals", json.dumps(found[0]))
    assert "nothing is left" in run.tables(report)[-1]


@pytest.mark.parametrize("name", ["mnist_cnn_qop", "mnist_mlp_qop", "tiny_mlp_qop"])
def test_pairs_of_points_are_inferred_exactly(name: str) -> None:
    """By the unchanged kernels, with metadata that ignore the signs of the weights."""
    network, fused = read_model(EXAMPLES / "onnx" / f"{name}.onnx").lowered.network, _shim()
    plan = make_inference(network.on(fused.kernels), fused)
    assert plan is not None and plan.launches()
    points = np.random.default_rng(0).integers(
        0, 256, (2, 7, network.input_type.size), dtype=np.int32
    )
    there = [fused.kernels.asarray(point) for point in points]
    for point, found in zip(points, plan.run(*there), strict=True):
        assert np.array_equal(network.run(CPU, point), fused.kernels.to_host(found))
    assert make_inference(network.on(fused.kernels), replace(fused, variant=Variant.DENSE)) is None


def test_the_roofs_of_performance() -> None:
    """Multiplications (padded as tensor cores take them) and bytes of a network by hand."""
    network = rates.sampled("mlp 784-64-32-10")
    assert rates.work_of(network) == (
        800 * 64 + 64 * 32 + 32 * 16,
        2 * (784 + 64 + 64 + 32 + 32 + 10),
    )
    found = rates.limits(
        network, {"copy": 1e12, "mma_sparse": 1e15, "mma_dense": 1e15}, one_launch=True
    )
    assert found == {"tensor_limit": 1e15 / (2 * 53760), "memory_limit": 1e12 / (2 * 784 + 8 * 10)}
