"""Which model files load, and whether the integer network equals onnxruntime bit for bit on them.

    python benchmarks/model_table.py FOLDER [--inputs 1000] [--out benchmarks/results/models.csv]

Every *.onnx file below FOLDER becomes one row: `same` (all outputs equal on every input), `within
error` (the file adds floats in an order of its own; every output lies in its proved band),
`DIFFERENT` (a
bug: please report), `refused` with the reason, or `not runnable` (onnxruntime itself cannot load or
run it). Inputs are random at several magnitudes, plus edges: zeros, constants, the largest floats,
and values that fall on rounding ties of the first quantizer.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from qverify.boundary.leaves import make_leaves
from qverify.errors import QverifyError
from qverify.frontend.builder import Quantizer
from qverify.frontend.encoder import make_encoder
from qverify.frontend.lower import Lowered
from qverify.frontend.model import Model, read_model
from qverify.runtime import Session

COLUMNS = ("file", "status", "inputs", "values", "different", "ops", "read_by", "reason")


def sample(
    lowered: Lowered, count: int, rng: np.random.Generator
) -> list[list[np.ndarray[Any, Any]]]:
    """`count` lists of graph inputs: random at several magnitudes, every eighth one an edge
    case."""
    ties = [e for e in lowered.encoders if isinstance(e, Quantizer)]
    step = float(ties[0].scale[0]) if ties and ties[0].scale.size else 1.0
    result = []
    for k in range(count):
        arrays: list[np.ndarray[Any, Any]] = []
        for _, shape, dtype in lowered.inputs:
            if dtype != np.float32:
                info = np.iinfo(dtype)
                values = rng.integers(info.min, info.max, size=shape, endpoint=True)
                arrays.append(
                    (
                        np.full(shape, (info.min, info.max, 0)[k % 3]) if k % 8 == 7 else values
                    ).astype(dtype)
                )
            elif k % 8 == 7:
                edge = (0.0, -0.0, 1.0, 255.0, 3e38, -3e38, 1e-40)[(k // 8) % 7]
                arrays.append(np.full(shape, edge, np.float32))
            elif k % 8 == 6:
                arrays.append(
                    ((rng.integers(-300, 300, size=shape) + 0.5) * step).astype(np.float32)
                )
            else:
                reach = (step * 255, 0.3, 1.0, 5.0, 255.0, step * 40)[k % 6]
                arrays.append(
                    rng.uniform(-reach if k % 2 else 0.0, reach, size=shape).astype(np.float32)
                )
        result.append(arrays)
    return result


def compare(model: Model, count: int, seed: int) -> tuple[int, int, bool]:
    """(values compared, values that the network does not allow, whether it is exact) of a model
    against onnxruntime with default options."""
    lowered = model.lowered
    encoder, leaves = make_encoder(lowered), make_leaves(lowered)
    session = Session(model.path, shapes=model.shapes)
    points = sample(lowered, count, np.random.default_rng(seed))
    different = values = 0
    block = max(1, min(64, 20_000_000 // lowered.network.elements_per_point()))
    for start in range(0, count, block):
        group = points[start : start + block]
        actual = np.stack(
            [
                np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in session.run(arrays)])
                for arrays in group
            ]
        )
        flat = np.stack(
            [np.concatenate([a.reshape(-1) for a in arrays]).astype(np.float64) for arrays in group]
        )
        different += int((~leaves.allow(encoder.encode(flat), actual)).sum())
        values += actual.size
    return values, different, leaves.exact


def row(path: Path, name: str, count: int, seed: int) -> dict[str, Any]:
    """One row of the table."""
    try:
        model = read_model(path)
    except QverifyError as error:
        reason = str(error).removeprefix(f"{path}: ")
        runnable = "onnxruntime" not in reason or "cannot load" not in reason
        return {
            "file": name,
            "status": "refused" if runnable else "not runnable",
            "reason": reason[:300],
        }
    read_by = f"onnxruntime {model.runtime_version}"
    found = {
        "file": name,
        "inputs": count,
        "ops": len(model.lowered.network.nodes),
        "read_by": read_by,
    }
    try:
        values, different, exact = compare(model, count, seed)
    except QverifyError as error:
        return {**found, "status": "not runnable", "reason": str(error)[:300]}
    status = "DIFFERENT" if different else ("same" if exact else "within error")
    return {**found, "status": status, "values": values, "different": different}


def main() -> int:
    """Write the table; exit 1 if any file differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/models.csv"))
    options = parser.parse_args()
    files = sorted(options.folder.rglob("*.onnx"))
    counts: Counter[str] = Counter()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for k, path in enumerate(files):
            found = row(path, str(path.relative_to(options.folder)), options.inputs, options.seed)
            found["reason"] = str(found.get("reason", "")).replace(str(options.folder), "")
            counts[found["status"]] += 1
            writer.writerow(found)
            print(f"{k + 1}/{len(files)} {found['status']}: {found['file']}", file=sys.stderr)
    print(", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    return 1 if counts["DIFFERENT"] else 0


if __name__ == "__main__":
    sys.exit(main())
