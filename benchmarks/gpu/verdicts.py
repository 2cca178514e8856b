"""Time to a verdict: qverify on the GPU, qverify on the CPU, and the 2023 procedure on the same
GPU, instance by instance.

One process answers all of them in turn, after one instance that is not counted, so that importing,
compiling and the driver's start are left out: what is compared is the work. An instance's methods
run one after the other, and instances come in an order that spreads over the list, so that a run
that is cut short holds a sample of everything.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Emit
from benchmarks.peers import paper2023
from benchmarks.peers.decide import load
from qverify import Options, verify
from qverify.errors import DeviceError, QverifyError
from qverify.kernels import Kernels
from qverify.propagate.device import opened

DECIDED = ("sat", "unsat")
PAPER_BATCH = 1024  # boxes at a time: in its favour, since its authors' code takes one


def instances(lists: list[Path], qdq: bool) -> Iterator[tuple[str, Path, Path]]:
    """(suite, model, property) in a spread order, the lists in turn; QDQ files only where
    onnxruntime can read them."""
    suites = []
    for path in lists:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row and (qdq or "qdq" not in row[0])]
        order = sorted(range(len(rows)), key=lambda k: int(f"{k:016b}"[::-1], 2))
        name = (
            path.parent.name if path.stem == "instances" else path.stem.removesuffix("_instances")
        )
        suites.append([(name, path.parent / rows[k][0], path.parent / rows[k][1]) for k in order])
    for k in range(max(map(len, suites), default=0)):
        yield from (suite[k] for suite in suites if k < len(suite))


def race(
    kernels: Kernels, lists: list[Path], timeout: float, qdq: bool, limit: int | None, emit: Emit
) -> None:
    """Rows of every method's verdict and seconds."""
    chosen = list(instances(lists, qdq))[:limit]
    devices = ["cpu"] if kernels.is_host else ["cuda", "cpu"]
    if not kernels.is_host:
        with suppress(DeviceError):
            opened(kernels)
    if chosen:
        for device in devices:
            _qverify(*chosen[0][1:], device, timeout)
    for suite, model, spec in chosen:
        for method in (*devices, "paper2023"):
            if method == "paper2023":
                found = _paper(model, spec, kernels, timeout)
            else:
                found = _qverify(model, spec, method, timeout)
            who = (
                f"2023 procedure, {kernels.name}" if method == "paper2023" else f"qverify, {method}"
            )
            emit(
                {
                    "row": {
                        "suite": suite,
                        "onnx": model.name,
                        "vnnlib": spec.name,
                        "method": who,
                        **found,
                    }
                }
            )


def _qverify(model: Path, spec: Path, device: str, timeout: float) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        result = verify(model, spec, Options(device=device, timeout=timeout))
    except QverifyError as error:
        return {
            "verdict": "error",
            "seconds": time.perf_counter() - start,
            "note": str(error)[:200],
        }
    note = result.reason if str(result.verdict) == "unknown" else ""
    by, count = result.details.get("intervals_by", ""), result.stats.subproblems
    seconds = time.perf_counter() - start
    return {
        "verdict": str(result.verdict),
        "seconds": seconds,
        "subproblems": count,
        "by": by,
        "note": note,
    }


def _paper(model: Path, spec: Path, kernels: Kernels, timeout: float) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        answer = paper2023.decide(load(model, spec), timeout, kernels, PAPER_BATCH)
    except QverifyError as error:
        return {
            "verdict": "error",
            "seconds": time.perf_counter() - start,
            "note": str(error)[:200],
        }
    return {
        "verdict": answer.verdict,
        "seconds": time.perf_counter() - start,
        "note": answer.reason,
    }


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Per suite and method: how many are decided, and in what time; contradictions; the GPU's time
    over the CPU's."""
    lines = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        of_suite = [row for row in rows if row["suite"] == suite]
        for method in dict.fromkeys(row["method"] for row in of_suite):
            some = [row for row in of_suite if row["method"] == method]
            times = [float(row["seconds"]) for row in some]
            decided = sum(row["verdict"] in DECIDED for row in some)
            lines.append(
                f"{suite}: {method}: {decided} of {len(some)} decided, median "
                f"{statistics.median(times):.3f} s, "
                f"sum {sum(times):.1f} s"
            )
        pairs = {}
        for row in of_suite:
            pairs.setdefault((row["onnx"], row["vnnlib"]), {})[row["method"]] = row
        both = [pair for pair in pairs.values() if {"qverify, cuda", "qverify, cpu"} <= pair.keys()]
        ratios = [
            float(pair["qverify, cuda"]["seconds"]) / float(pair["qverify, cpu"]["seconds"])
            for pair in both
            if all(
                pair[method]["verdict"] in DECIDED for method in ("qverify, cuda", "qverify, cpu")
            )
        ]
        if ratios:
            lines.append(
                f"{suite}: the GPU's time over the CPU's: median {statistics.median(ratios):.2f}"
            )
        for (model, spec), pair in pairs.items():
            verdicts = {row["verdict"] for row in pair.values()} & set(DECIDED)
            if len(verdicts) > 1:
                lines.append(f"CONTRADICTION: {model} {spec}: {sorted(verdicts)}")
    return lines
