"""One op at a time against onnxruntime, bit for bit, over random graphs.

    python benchmarks/hostile/one_op.py --count 1000 --seed 1 [--op QLinearConv ...] [--out FILE]
    [--keep FOLDER]

For every op that has a rule, `--count` random graphs of that op alone (see `one_op_graphs.py`) are
read as the product reads a file (but for its own comparison with onnxruntime), and run as integers
and in onnxruntime with default options: all 256 codes of a unary op and all pairs of an op on two
codes are among the inputs, random and extreme codes for the others. A row per op: graphs that ran,
values that were compared, values and graphs that differ, graphs that qverify refused, graphs that
onnxruntime itself rejects (`invalid`) or dies of (`killed`). A difference is printed with the seed
and number that make its graph, and the file is kept with `--keep`. Exit status 1 if anything
differs or crashes.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

from benchmarks.hostile.one_op_graphs import GENERATORS, Array, Case, Rng, codes
from qverify.boundary.leaves import make_leaves
from qverify.errors import QverifyError
from qverify.frontend import model as reader
from qverify.frontend.compare import Compared
from qverify.frontend.encoder import make_encoder
from qverify.frontend.lower import Lowered
from qverify.runtime import Session

SAMPLES = 6  # inputs for every graph
COLUMNS = (
    "op",
    "graphs",
    "values",
    "different_values",
    "different_graphs",
    "refused",
    "invalid",
    "killed",
    "crashed",
)
FILE_NAME = str.maketrans(" ", "_", ",.")
Result = tuple[str, int, int, str]  # outcome, values, different values, what was said


def floats(rng: Rng, shape: tuple[int, ...], step: float) -> Array:
    """Multiples and half multiples of `step`, their neighbours, and values of all sizes."""
    with np.errstate(all="ignore"):
        x = (rng.integers(-300, 301, shape) / 2 * np.float32(step)).astype(np.float32)
        kind = rng.random(shape)
        x = np.where(kind < 0.25, np.nextafter(x, np.float32(np.inf)), x)
        x = np.where((kind > 0.25) & (kind < 0.5), np.nextafter(x, np.float32(-np.inf)), x)
        wild = rng.normal(size=shape) * 10 ** rng.uniform(-44, 38, shape)
        special = rng.choice([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.17549435e-38], shape)
        x = np.where(kind > 0.95, wild, np.where((kind > 0.92) & (kind <= 0.95), special, x))
        return np.asarray(np.clip(x, -3.4e38, 3.4e38), np.float32)


def feeds(case: Case, rng: Rng) -> list[list[Array]]:
    """The inputs of every sample."""
    result = [
        [
            floats(rng, i.shape, i.step) if i.dtype == np.float32 else codes(rng, i.shape, i.dtype)
            for i in case.inputs
        ]
        for _ in range(1 if case.every else SAMPLES)
    ]
    if case.every:
        count = 256 ** len(case.inputs)
        grid = np.arange(count)
        result.append(
            [
                (grid // 256**k % 256).astype(np.uint8).view(item.dtype).reshape(item.shape)
                for k, item in enumerate(case.inputs)
            ]
        )
    return result


def compare(path: Path, inputs: list[list[Array]]) -> Result:
    """Read the file, run it both ways."""
    try:
        session = Session(path)
        wanted = [session.run(list(arrays)) for arrays in inputs]
    except Exception as error:  # onnxruntime's own classes, and ModelError from loading
        return "invalid", 0, 0, " ".join(str(error).split())
    try:
        nothing = Compared(0, 0, 0)  # this comparison stands alone
        with mock.patch.multiple(reader, compare=lambda *_: nothing, _COMPARED={}):
            model = reader.read_model(path)
        return _compare(model.lowered, inputs, wanted)
    except QverifyError as error:
        return "refused", 0, 0, str(error)
    except Exception as error:  # whatever it is, it is a fault
        return "crashed", 0, 0, repr(error)


def _compare(lowered: Lowered, inputs: list[list[Array]], wanted: list[list[Array]]) -> Result:
    leaves, encoder = make_leaves(lowered), make_encoder(lowered)
    values = different = 0
    first = ""
    for arrays, outputs in zip(inputs, wanted, strict=True):
        x = np.concatenate([a.reshape(1, -1).astype(np.float64) for a in arrays], axis=1)
        codes = encoder.encode(x)
        got = leaves.nominal(codes)[0]
        want = np.concatenate([np.asarray(y, np.float64).reshape(-1) for y in outputs])
        if got.shape != want.shape:
            return "ran", values, 1, f"{got.size} values instead of {want.size}"
        wrong = ~leaves.allow(codes, want[None])[0]
        values += got.size
        different += int(wrong.sum())
        if wrong.any() and not first:
            k = int(np.flatnonzero(wrong)[0])
            first = f"value {k} is {got[k]} instead of {want[k]}"
    return "ran", values, different, first


def one_graph(op: str, seed: int, k: int, path: Path) -> Result:
    """Make graph number `k` of an op and compare it."""
    rng = np.random.default_rng([seed, zlib.crc32(op.encode()), k])
    try:
        case = GENERATORS[op](rng)
    except (OverflowError, ValueError) as error:  # a float that does not fit an attribute
        return "invalid", 0, 0, repr(error)
    path.write_bytes(case.model.SerializeToString())
    return compare(path, feeds(case, rng))


def _work(op: str, seed: int, start: int, stop: int, path: Path, pipe: Any) -> None:
    for k in range(start, stop):
        pipe.send(one_graph(op, seed, k, path))


def all_graphs(op: str, count: int, seed: int, path: Path) -> Iterator[Result]:
    """The result of every graph, worked out in a child process: onnxruntime may take the process
    with it."""
    context, k = multiprocessing.get_context("fork"), 0
    while k < count:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(op, seed, k, count, path, theirs), daemon=True)
        child.start()
        theirs.close()
        try:
            while k < count:
                yield ours.recv()
                k += 1
        except EOFError:
            child.join()
            yield (
                "killed",
                0,
                0,
                f"onnxruntime ended the process with signal {-(child.exitcode or 0)}",
            )
            k += 1
        child.join()


def run_op(op: str, count: int, seed: int, keep: Path | None, verbose: bool) -> dict[str, Any]:
    """A row of the table for one op."""
    tally: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.onnx"
        for k, (outcome, values, different, text) in enumerate(all_graphs(op, count, seed, path)):
            tally[outcome] += 1
            tally["values"] += values
            tally["different_values"] += different
            tally["different_graphs"] += different > 0
            if outcome not in ("ran", "crashed"):
                reasons[f"{outcome}: {text.split(': ', 1)[-1][-160:]}"] += 1
            if different or outcome == "crashed":
                print(
                    f"{op} seed {seed} graph {k}: {different} of {values} differ: {text}",
                    flush=True,
                )
                if keep is not None:
                    one_graph(op, seed, k, keep / f"{op.translate(FILE_NAME)[:30]}_{seed}_{k}.onnx")
    if verbose:
        for reason, times in reasons.most_common(12):
            print(f"    {times:5d} {reason}", file=sys.stderr)
    tally["graphs"] = tally["ran"]
    return {"op": op, **{column: tally[column] for column in COLUMNS[1:]}}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="graphs for every op")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--op", action="append", help="only these (names as printed)", choices=list(GENERATORS)
    )
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--keep", type=Path, help="write the files that differ here")
    parser.add_argument("--verbose", action="store_true", help="say why graphs were refused")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    rows = []
    for op in options.op or GENERATORS:
        rows.append(run_op(op, options.count, options.seed, options.keep, options.verbose))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    total = {key: sum(row[key] for row in rows) for key in COLUMNS[1:]}
    print(" ".join(f"{key}={value}" for key, value in total.items()))
    return 1 if total["different_graphs"] or total["crashed"] else 0


if __name__ == "__main__":
    sys.exit(main())
