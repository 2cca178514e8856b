"""Do brute force, SMT, MILP, CP-SAT, the 2023 procedure and qverify say the same of random small
networks?

    python benchmarks/peers/agree.py [--count 2000] [--seed 0] [--timeout 60]
        [--out benchmarks/results/agree.csv]

The networks, the properties and the brute force (every code vector run by onnxruntime) are those of
`tests/test_brute_force.py`. One row per network; a row that is there is not run again. A
contradiction is printed, its model and property are kept beside the rows, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs without an installation

from benchmarks.peers import decide, paper2023
from benchmarks.peers.workers import PACKAGES, Workers, missing
from qverify import Options, verify
from qverify.errors import UnsupportedModel
from tests import test_brute_force as brute
from tests.graphs import write

SOLVERS = (*PACKAGES, "paper2023", "qverify")
COLUMNS = ("seed", "network", "ops", "refused", "truth", *SOLVERS, "reasons")
DECIDED = ("sat", "unsat")


@dataclass(frozen=True)
class Sample:
    """A random network and property that qverify reads, with the truth about them."""

    ops: str
    refused: int  # networks drawn before it that qverify does not read
    truth: str
    instance: decide.Instance


def draw(rng: np.random.Generator, wanted: str, folder: Path) -> Sample:
    """A sample with (mostly) the wanted truth; its files are `model.onnx` and `spec.vnnlib` in
    `folder`."""
    model, spec, refused = folder / "model.onnx", folder / "spec.vnnlib", 0
    while True:
        net = brute.network(rng)
        wide = len(net.doors) < 2
        box = brute.random_box(net, {2: 50, 3: 15, 4: 8}[net.size] if wide else 6)
        points = brute.points_of(net, *box, folder / "part.onnx")
        if points is None:
            continue
        for _ in range(8):
            cases = [brute.random_case(rng, points) for _ in range(int(rng.integers(1, 4)))]
            unsafe = any(
                np.logical_and.reduce([points.holds(row) for row in case]).any() for case in cases
            )
            truth = "sat" if unsafe else "unsat"
            # No encoding has rows that mix inputs and outputs, so a few of them suffice.
            mixed = any(row.x for case in cases for row in case)
            if truth == wanted and (not mixed or rng.random() < 0.1):
                break
        write(net.g.model(*net.outputs), model)
        spec.write_text(brute.specification(net, *box, points.y.shape[1], cases))
        try:
            instance = decide.load(model, spec)
        except UnsupportedModel:
            refused += 1
            continue
        names = " ".join(type(node.op).__name__ for node in instance.network.nodes)
        return Sample(names, refused, truth, instance)


def ask(sample: Sample, workers: Workers, timeout: float, folder: Path) -> dict[str, decide.Answer]:
    """What everyone says."""
    answers = {
        name: decide.decide(sample.instance, workers.solver(name), timeout) for name in PACKAGES
    }
    answers["paper2023"] = paper2023.decide(sample.instance, timeout)
    result = verify(
        folder / "model.onnx", folder / "spec.vnnlib", Options(timeout=timeout, device="cpu")
    )
    answers["qverify"] = decide.Answer(str(result.verdict), result.reason)
    return answers


def contradicts(row: dict[str, Any]) -> bool:
    """Whether someone decided against the truth or failed."""
    return any(
        row[name] == "error" or (row[name] in DECIDED and row[name] != row["truth"])
        for name in SOLVERS
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """Counts by solver, and what the encodings do not carry."""
    truth = Counter(row["truth"] for row in rows)
    lines = [f"{len(rows)} networks: {truth['sat']} sat, {truth['unsat']} unsat by brute force"]
    for name in SOLVERS:
        said = Counter(row[name] for row in rows)
        lines.append(
            f"{name:10} "
            + ", ".join(f"{count} {verdict}" for verdict, count in sorted(said.items()))
        )
    reasons = Counter(
        part for row in rows for part in row["reasons"].split("; ") if ": unsupported" in part
    )
    lines += [f"  {count:5} {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def main() -> int:
    """Run what is missing, print the counts; 1 if anyone contradicts the truth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds for each solver and network"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/agree.csv"))
    options = parser.parse_args()
    if missing():
        parser.error(f"not installed: {', '.join(missing())}; pip install '.[peers]'")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        with options.out.open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if int(row["seed"]) == options.seed]
    done = {int(row["network"]) for row in rows}
    with (
        options.out.open("a", newline="") as stream,
        Workers() as workers,
        tempfile.TemporaryDirectory() as name,
    ):
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if not stream.tell():
            writer.writeheader()
        for k in range(options.count):
            if k in done:
                continue
            folder = Path(name)
            sample = draw(np.random.default_rng([options.seed, k]), DECIDED[k % 2], folder)
            answers = ask(sample, workers, options.timeout, folder)
            verdicts = {solver: answer.verdict for solver, answer in answers.items()}
            reasons = [
                f"{n}: {a.verdict}: {a.reason}"
                for n, a in answers.items()
                if a.verdict not in DECIDED
            ]
            row: dict[str, Any] = {
                "seed": options.seed,
                "network": k,
                "ops": sample.ops,
                "refused": sample.refused,
            }
            row |= {"truth": sample.truth, **verdicts, "reasons": "; ".join(reasons)}
            writer.writerow(row)
            stream.flush()
            rows.append(row)
            if contradicts(row):
                kept = options.out.with_suffix("") / f"{options.seed}_{k}"
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                print(
                    f"CONTRADICTION: network {k}: truth {sample.truth}, {verdicts}; kept in {kept}",
                    flush=True,
                )
    print(summary(rows))
    return 1 if any(contradicts(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
