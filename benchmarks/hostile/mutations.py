"""Smart mutations of certificates, models and properties: none may be accepted wrongly, crash,
hang, or take much memory.

    python -m benchmarks.hostile.mutations --count 1000 --seed 1 [--kind forged ...] [--keep FOLDER]
    [--out FILE.csv]

Small networks are made by lot, and every code vector is run in onnxruntime, so that the truth is
known. Then, `--count` times each:

* `forged`: a proof is said to be about a property that some input violates (with the right hashes),
  and changed: an accepted one is wrong.
* `changed`: a genuine certificate is changed; an accepted one must claim what is true.
* `file`: the certificate's file is damaged: arrays, header, archive.
* `model`: an ONNX file is changed; `unsat` is wrong where onnxruntime, running the changed file,
  meets a violation among some hundred inputs; so is `sat` where the counterexample is none.
* `spec`: a property's tokens are changed; the same, by a reader of properties that shares nothing
  with qverify.

Everything goes through the command line's door in a child process. Wrong is also: exit code 4, a
line that cannot be printed, MEGABYTES more of memory than before; `hung`: more than SECONDS of
processor time. `unclear`: onnxruntime cannot run the file as it is, or the other reader does not
understand the text. `died`: onnxruntime took the process with it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.hostile import mutate_certificates, mutate_models, mutate_specs
from benchmarks.hostile.mutation_bases import Array, Base, Rng, Taken, make_bases, run
from qverify.cli import main as command

KINDS = ("forged", "changed", "file", "model", "spec")
SECONDS, MEGABYTES = 20, 400
TIMEOUT = 3  # for a search
COLUMNS = (
    "kind",
    "seed",
    "runs",
    "accepted",
    "unsat",
    "sat",
    "open",
    "rejected",
    "errors",
    "unclear",
    "wrong",
    "crashed",
    "hung",
    "died",
)
# Too odd to be changed once more.
TWICE = (
    AttributeError,
    BufferError,
    LookupError,
    OverflowError,
    onnx.checker.ValidationError,
    TypeError,
    ValueError,
)
Outcome = tuple[str, str]  # column, what was said


# -- one run ---------------------------------------------------------------------------------------


def called(*arguments: str) -> tuple[int, str, str]:
    """The command's exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(arguments)
    return code, out.getvalue(), err.getvalue()


def judged(kind: str, base: Base, rng: Rng, folder: Path) -> Outcome:
    """One mutation and its outcome."""
    if kind in ("forged", "changed", "file"):
        return certificate_run(kind, base, rng, folder)
    return (model_run if kind == "model" else spec_run)(base, rng, folder)


def certificate_run(kind: str, base: Base, rng: Rng, folder: Path) -> Outcome:
    about, truth, data = genuine(base, rng)
    own = Taken.apart(data)
    if kind == "forged":
        about, truth = (base.proofs[0][0], "unsat") if truth == "sat" else (base.unsafe, "sat")
        own.header["spec_sha256"] = hashlib.sha256(about.read_bytes()).hexdigest()
        if truth == "unsat" and rng.random() < 0.3:
            own.header["verdict"] = "sat"
    changes = mutate_certificates.WITNESS if "inputs" in own.header else mutate_certificates.PROOF
    count = int(rng.choice([1, 1, 2, 4])) if kind != "file" else 0
    chosen = [changes[int(rng.integers(len(changes)))] for _ in range(count)]
    if kind == "file" or rng.random() < 0.1:
        chosen.append(mutate_certificates.FILE[int(rng.integers(len(mutate_certificates.FILE)))])
    path, done = folder / "proof", None
    for change in chosen:
        with contextlib.suppress(*TWICE), np.errstate(all="ignore"):
            done = change(own, rng)
    path.write_bytes(own.joined() if done is None else done)
    code, out, err = called("check", str(base.model), str(about), str(path))
    if (fault := unprintable(code, out, err)) is not None:
        return fault
    if code == 0:
        return ("accepted" if out == f"accepted {truth}\n" else "wrong"), out
    return {1: "rejected", 2: "errors"}.get(code, "crashed"), out + err


def genuine(base: Base, rng: Rng) -> tuple[Path, str, bytes]:
    """A property, its truth, and its certificate."""
    k = int(rng.integers(len(base.proofs) + 1))
    return (
        (base.unsafe, "sat", base.witness)
        if k == len(base.proofs)
        else (base.proofs[k][0], "unsat", base.proofs[k][1])
    )


def unprintable(code: int, out: str, err: str) -> Outcome | None:
    """What no run may do: end with 4, print what is no printable line, or no reason."""
    if code not in (0, 1, 2, 3):
        return "crashed", err
    lines = (out + err).splitlines()
    if not all(line.isprintable() for line in lines) or (code == 2 and len(lines) != 1):
        return "wrong", f"not a printable line: {out + err!r}"
    return None


def model_run(base: Base, rng: Rng, folder: Path) -> Outcome:
    model = onnx.ModelProto.FromString(base.model.read_bytes())
    done = None
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        with contextlib.suppress(*TWICE):
            done = mutate_models.CHANGES[int(rng.integers(len(mutate_models.CHANGES)))](model, rng)
        if done is not None:
            break
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString() if done is None else done)
    about = genuine(base, rng)[0]
    code, out, err = called(str(path), str(about), "--timeout", str(TIMEOUT), "--seed", "1")
    if (fault := unprintable(code, out, err)) is not None:
        return fault
    if code >= 2:
        return ("errors" if code == 2 else "open"), err
    called("inspect", str(path))
    try:
        values = [*sampled(base.points, rng), *([witness(out)] if code == 1 else [])]
        outputs = run(path, np.array(values, np.float32))
    except Exception as error:  # the runtime's own, or another number of inputs
        return "unclear", repr(error)
    return compared(code, out, parsed_or_none(about.read_bytes()), values, outputs)


def spec_run(base: Base, rng: Rng, folder: Path) -> Outcome:
    data = mutate_specs.change(genuine(base, rng)[0].read_text(), rng)
    path = folder / "p.vnnlib"
    path.write_bytes(data)
    code, out, err = called(str(base.model), str(path), "--timeout", str(TIMEOUT), "--seed", "1")
    if (fault := unprintable(code, out, err)) is not None:
        return fault
    if code >= 2:
        return ("errors" if code == 2 else "open"), err
    values = [*sampled(base.points, rng), *rng.uniform(-2, 2, (300, base.points.shape[1])).tolist()]
    values += [witness(out)] if code == 1 else []
    outputs = run(base.model, np.array(values, np.float32))
    return compared(code, out, parsed_or_none(data), values, outputs)


def sampled(points: Array, rng: Rng) -> list[list[float]]:
    """Some of the points that meet every code vector, and values in between."""
    some = points[rng.permutation(len(points))[:700]]
    return [*some.tolist(), *(some[:100] + rng.uniform(-0.06, 0.06, some[:100].shape)).tolist()]


def witness(out: str) -> list[float]:
    return [float(value) for value in re.findall(r"\(X_\d+ ([^\s()]+)\)", out)]


def parsed_or_none(data: bytes) -> Any:
    try:
        return mutate_specs.parsed(data)
    except (mutate_specs.Unclear, RecursionError):
        return None


def compared(code: int, out: str, prop: Any, values: list[list[float]], outputs: Array) -> Outcome:
    """`unsat` (code 0) or `sat` held against what the points say; the witness is the last one."""
    verdict = "unsat" if code == 0 else "sat"
    if prop is None:
        return "unclear", out
    asserts, _ = prop
    try:
        for x, y in zip(values[::-1], outputs[::-1], strict=True):
            point = {f"X_{i}": Fraction(float(np.float32(v))) for i, v in enumerate(x)}
            point |= {f"Y_{j}": Fraction(float(v)) for j, v in enumerate(y)}
            holds = all([mutate_specs.truth(tree, point) for tree in asserts])
            if code == 1:
                decimals = point | {
                    f"X_{i}": Fraction(value)
                    for i, value in enumerate(re.findall(r"\(X_\d+ ([^\s()]+)\)", out))
                }
                exactly = all([mutate_specs.truth(tree, decimals) for tree in asserts])
                return ("sat" if exactly else "wrong"), out
            if holds:
                return "wrong", f"unsat, but {point}"
    except (mutate_specs.Unclear, RecursionError, OverflowError, ValueError):
        return "unclear", out
    return verdict, out


# -- all runs --------------------------------------------------------------------------------------


def _work(
    kind: str, bases: list[Base], seed: int, start: int, stop: int, folder: Path, pipe: Any
) -> None:
    """Runs number `start` to `stop`, in a child. What takes too much memory is noticed
    afterwards."""
    for k in range(start, stop):
        rng = np.random.default_rng([seed, KINDS.index(kind), k])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcome = judged(kind, bases[int(rng.integers(len(bases)))], rng, folder)
        except Exception:  # of this script, or what the door should have held
            outcome = "crashed", traceback.format_exc()
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        if more > MEGABYTES:
            outcome = "wrong", f"{more} MB more of memory; {outcome}"
        pipe.send(outcome)
        pipe.recv()  # the files may be looked at until then


def all_runs(kind: str, bases: list[Base], count: int, seed: int, folder: Path) -> Any:
    """The outcome of every run; a child that takes too long is ended, one that died is replaced."""
    context, k = multiprocessing.get_context("fork"), 0
    while k < count:
        ours, theirs = context.Pipe()
        child = context.Process(
            target=_work, args=(kind, bases, seed, k, count, folder, theirs), daemon=True
        )
        child.start()
        theirs.close()
        try:
            while k < count:
                if not ours.poll(20 * SECONDS):
                    child.kill()
                    yield "hung", "it waits"
                    k += 1
                    break
                yield ours.recv()
                k += 1
                ours.send(None)
        except EOFError:
            child.join()
            late = child.exitcode == -signal.SIGPROF
            yield ("hung" if late else "died"), f"the process ended with {child.exitcode}"
            k += 1
        child.join()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="mutations of every kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bases", type=int, default=5, help="networks that they are about")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--keep", type=Path, help="keep files of what went wrong here")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--verbose", action="store_true", help="say what was answered most often")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = make_bases(options.bases, options.seed, folder)
        rows = [
            row
            for kind in options.kind or KINDS
            if (row := table_row(kind, bases, options, folder))
        ]
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 1 if any(row[column] for row in rows for column in ("wrong", "crashed", "hung")) else 0


def table_row(
    kind: str, bases: list[Base], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """All runs of a kind; prints what went wrong at once, and the row."""
    tally, said, started = Counter[str](), Counter[str](), time.monotonic()
    for k, (outcome, text) in enumerate(all_runs(kind, bases, options.count, options.seed, folder)):
        tally[outcome] += 1
        said[f"{outcome}: {re.sub(r'[0-9]+', '#', ' '.join(text.split()))[:150]}"] += 1
        if outcome in ("wrong", "crashed", "hung", "died"):
            print(
                f"{kind} seed {options.seed} number {k} {outcome}: {text.strip()[-1500:]}",
                flush=True,
            )
            if options.keep:
                target = options.keep / f"{kind}_{options.seed}_{k}"
                target.mkdir(parents=True, exist_ok=True)
                for file in sorted(folder.glob("*")):
                    if file.name in ("proof", "m.onnx", "p.vnnlib"):
                        (target / file.name).write_bytes(file.read_bytes())
    row = {"kind": kind, "seed": options.seed, "runs": options.count}
    row |= {column: tally[column] for column in COLUMNS[3:]}
    print(
        " ".join(f"{key}={value}" for key, value in row.items()),
        f"({time.monotonic() - started:.0f} s)",
        flush=True,
    )
    if options.verbose:
        for text, times in said.most_common(25):
            print(f"    {times:5d} {text}")
    return row


if __name__ == "__main__":
    sys.exit(main())
