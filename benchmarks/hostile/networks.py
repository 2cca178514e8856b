"""Hostile small networks against brute force in onnxruntime.

    python benchmarks/hostile/networks.py --count 20000 --seed 1 [--jobs 2] [--seconds 3600] [--out
    FOLDER]

Network `index` is made from (seed, index) alone, so a run goes on where it stopped:
`FOLDER/log.jsonl` has a line for each. A network is verified with several properties and options;
every verdict is held against what onnxruntime gives on every code vector of the box, every
counterexample is checked by itself, and every certificate that a verdict comes with is given to
`qverify.checker`. A failure leaves `FOLDER/INDEX/` with the model, the property and `info.txt`.
Refusals are counted by reason. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

from benchmarks.hostile import oracle
from benchmarks.hostile.build import Network, random_network
from benchmarks.hostile.maker import RANDOM
from benchmarks.hostile.properties import Names, random_box, random_property
from qverify import Options, Verdict, verify
from qverify.boundary.leaves import make_leaves
from qverify.checker import Rejected, check
from qverify.errors import QverifyError, SoundnessError, SpecError, UnsupportedModel, UsageError
from qverify.formats import verdict_text
from qverify.frontend.encoder import make_encoder
from qverify.frontend.model import read_model
from qverify.search.branch import RULES

LIMIT = 20.0  # seconds for one verification
POINTS_READ = 40  # inputs on which the network is compared as read
POINTS = 300  # code vectors in a box
PROPERTIES = 2
SILENCE = 150.0  # seconds after which a process that says nothing is ended


# -- one network -----------------------------------------------------------------------------------


def examine(seed: int, index: int, folder: Path, begin: Callable[[], None]) -> dict[str, Any]:
    """The line of a network: what it is made of, its verdicts, and its faults as (kind, text) with
    files in `folder`. `begin` is called when the network is made, and qverify's turn comes."""
    rng = np.random.default_rng([seed, index])
    network = random_network(rng)
    model = folder / "model.onnx"
    proto = network.maker.model(network.outputs)
    model.write_bytes(proto.SerializeToString())
    line: dict[str, Any] = {"index": index, "opset": network.maker.opset}
    line["ops"] = sorted({node.op_type for node in proto.graph.node})
    try:
        brute = oracle.Brute(model, folder)
        brute.run(network.sample(0))
    except Exception as error:
        return line | {"status": "not runnable", "reason": reason_of(error)}
    begin()
    line |= {"status": "decided", "verdicts": [], "faults": [], "undecided": []}
    refused = same_outputs(line, model, network, brute, rng, folder)
    if refused:
        return line | {"status": "refused", "reason": refused}
    if network.maker.random and set(line["ops"]) & {*RANDOM, "Dropout"}:
        line["faults"].append(["wrong", "a random node is read as a function"])
        keep(folder, model, None, f"{line}\n")
        return line
    for number in range(PROPERTIES):
        spec = folder / "spec.vnnlib"
        text = property_of(network, brute, rng)
        if text is None:
            continue
        spec.write_text(text)
        truth = brute.truth(oracle.parse_spec(text), most=60_000)
        if truth is None:
            continue
        options = (
            options_of(rng, index)
            if number
            else Options(device="cpu", timeout=LIMIT, certificate=True)
        )
        refused = compare(line, model, spec, truth, options, index, folder)
        if refused:
            return line | {"status": "refused", "reason": refused}
    if not line["verdicts"] and not line["faults"]:
        line["status"] = "no property"
    return line


def same_outputs(
    line: dict[str, Any],
    model: Path,
    network: Network,
    brute: oracle.Brute,
    rng: np.random.Generator,
    folder: Path,
) -> str:
    """Compare the integer network with the file on inputs of the whole range, extreme ones among
    them. The reason of a refusal, or ""."""
    try:
        lowered = read_model(model).lowered
    except UnsupportedModel as error:
        return reason_of(error)
    except Exception as error:
        line["faults"].append(["error", f"reading: {type(error).__name__}: {reason_of(error)}"])
        keep(folder, model, None, "".join(traceback.format_exception(error)))
        return "an error"
    centres, steps = np.array(network.sample(0)), np.array(network.steps)
    reach = rng.choice([1, 4, 30, 128, 300], (POINTS_READ, 1)) * steps
    points = centres + rng.uniform(-1, 1, (POINTS_READ, len(steps))) * reach
    points[rng.random(points.shape) < 0.1] = float(rng.choice([0.0, 3e38, -3e38, 1e4, -1e4]))
    is_float = np.array(network.is_float)
    kinds = [i.dtype for i in network.maker.inputs for _ in range(i.array.size)]
    for k, kind in enumerate(kinds):
        if kind != np.float32:
            info = np.iinfo(kind)
            points[:, k] = np.clip(np.rint(points[:, k]), info.min, info.max)
    points[:, is_float] = points[:, is_float].astype(np.float32)
    codes, leaves = make_encoder(lowered).encode(points), make_leaves(lowered)
    ours = leaves.nominal(codes)
    theirs = np.array([brute.outputs(tuple(point)) for point in points.tolist()])
    different = ~leaves.allow(codes, theirs)
    if different.any():
        row = int(np.flatnonzero(different.any(axis=1))[0])
        text = (
            f"at {points[row].tolist()} onnxruntime gives {theirs[row].tolist()}, qverify "
            f"{ours[row].tolist()}"
        )
        line["faults"].append(
            ["outputs", f"{int(different.any(axis=1).sum())} of {len(points)} inputs"]
        )
        keep(folder, model, None, text)
    return ""


def property_of(network: Network, brute: oracle.Brute, rng: np.random.Generator) -> str | None:
    """A property about the values that onnxruntime gives in a random box."""
    names = Names(
        "1.0" if rng.random() < 0.6 else "2.0",
        [(i.shape, i.dtype.name) for i in network.maker.inputs],
        [(o.shape, o.dtype.name) for o in network.outputs],
    )
    for most in (POINTS, POINTS // 4, 8):
        box = random_box(
            rng, network.sample(int(rng.integers(5))), network.steps, network.is_float, most
        )
        spec = oracle.Spec(names.version, len(box), 0, [], {}, [], box)
        each = brute.candidates(spec)
        if each is None:
            return random_property(
                rng, names, box, [brute.outputs(tuple(network.sample(0)))], [Fraction(0)] * len(box)
            )
        if np.prod([len(c) for c in each], dtype=float) <= POINTS:
            chosen = [tuple(c[int(rng.integers(len(c)))] for c in each) for _ in range(12)]
            reached = [brute.outputs(tuple(f for _, f in point)) for point in chosen]
            reached = [row for row in reached if np.isfinite(row).all()]
            if reached:
                return random_property(rng, names, box, reached, [t for t, _ in chosen[0]])
    return None


def options_of(rng: np.random.Generator, k: int) -> Options:
    """Other options than the defaults: every branching rule comes by, with and without what can be
    switched off."""
    return Options(
        device="cpu",
        timeout=LIMIT,
        seed=k,
        batch=int(rng.choice([1, 7, 64])),
        branch=list(RULES)[k % len(RULES)],
        attack=k // 2 % 2 == 0,
        backward=k % 2 == 0,
        sweep=bool(rng.random() < 0.2),
        certificate=bool(rng.random() < 0.5),
    )


def compare(
    line: dict[str, Any],
    model: Path,
    spec: Path,
    truth: oracle.Truth,
    options: Options,
    index: int,
    folder: Path,
) -> str:
    """One verification, held against the truth. The reason of a refusal, or ""."""

    def fault(kind: str, text: str) -> None:
        line["faults"].append([kind, text])
        keep(folder, model, spec, f"{kind}: {text}\n{options}\nonnxruntime says: {truth}\n")

    try:
        result = verify(model, spec, options)
    except UnsupportedModel as error:
        return reason_of(error)
    except UsageError:
        if (
            options.certificate
        ):  # none is possible where conditions mention inputs, or after a float product
            return compare(
                line, model, spec, truth, replace(options, certificate=False), index, folder
            )
        raise
    except SoundnessError as error:
        fault("soundness", reason_of(error))
        return ""
    except SpecError as error:  # an empty box is an error in version 1.0
        if truth.verdict == "unsat" and "contradictory" in str(error):
            line["undecided"].append("the property is refused: its box is empty")
        else:
            fault("error", f"SpecError: {reason_of(error)}")
        return ""
    except QverifyError as error:
        fault("error", f"{type(error).__name__}: {reason_of(error)}")
        return ""
    except Exception as error:
        fault(
            "error",
            f"{type(error).__name__}: {reason_of(error)} at "
            f"{traceback.extract_tb(error.__traceback__)[-1]}",
        )
        return ""
    line["verdicts"].append(result.verdict.value)
    if result.verdict in (Verdict.UNKNOWN, Verdict.TIMEOUT):
        if truth.verdict != "unknown":
            line["undecided"].append(
                f"{result.verdict.value}: {result.reason} (truth: {truth.verdict})"
            )
        return ""
    if result.verdict is Verdict.UNSAT and truth.verdict != "unsat":
        fault("wrong" if truth.verdict == "sat" else "reading", f"unsat instead of {truth.verdict}")
    if result.verdict is Verdict.SAT:
        own = oracle.read_spec(spec)
        why = oracle.witness_fault(model, own, verdict_text(result).split("\n", 1)[1])
        if why is None and truth.verdict == "unsat" and not own.mixed():
            why = "brute force finds none"
        if why is not None:
            fault(
                "reading" if truth.verdict == "unknown" else "witness",
                f"{why} (truth: {truth.verdict})",
            )
    if result.certificate is not None:
        certificate = folder / "certificate.zip"
        certificate.write_bytes(result.certificate)
        try:
            report = check(model, spec, certificate)
            line["certificates"] = line.get("certificates", 0) + 1
            if report.verdict != result.verdict.value:
                fault("certificate", f"accepted as {report.verdict}")
        except Rejected as error:
            fault("certificate", reason_of(error))
        except Exception as error:
            fault("certificate", f"{type(error).__name__}: {reason_of(error)}")
    return ""


def keep(folder: Path, model: Path, spec: Path | None, text: str) -> None:
    """Files of the first fault, in `folder/kept`."""
    kept = folder / "kept"
    if not kept.exists():
        kept.mkdir()
        for path in (model, spec, folder / "certificate.zip"):
            if path is not None and path.exists():
                (kept / path.name).write_bytes(path.read_bytes())
    with (kept / "info.txt").open("a") as file:
        file.write(text + "\n")


def reason_of(error: BaseException) -> str:
    """The text of an error without what differs from network to network."""
    text = " ".join(str(error).split())
    text = re.sub(r"^.*?\.onnx: ", "", text)
    text = re.sub(r"node '.*?' \(([\w.]+) of .*?\): ", r"\1: ", text)
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", text)[:200]


# -- many networks ---------------------------------------------------------------------------------


def one(seed: int, index: int, out: Path, begin: Callable[[], None]) -> dict[str, Any]:
    """The line of a network; its faults are kept in `out`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            line = examine(seed, index, folder, begin)
        except Exception as error:
            line = {
                "index": index,
                "status": "failed",
                "faults": [["error", f"this script: {reason_of(error)}"]],
            }
            keep(folder, folder / "model.onnx", None, traceback.format_exc())
        if line.get("faults") and (folder / "kept").exists():
            target = out / str(index)
            target.mkdir(exist_ok=True)
            for path in (folder / "kept").iterdir():
                (target / path.name).write_bytes(path.read_bytes())
    return line


def work(seed: int, indices: list[int], out: Path, results: Any) -> None:
    """Examine networks; say which one begins, so that a crash has a name."""
    warnings.simplefilter("ignore")
    parent = os.getppid()
    for index in indices:
        if os.getppid() != parent:  # it is gone: nobody listens
            return
        results.put(("make", index, None))
        results.put(
            (
                "end",
                index,
                one(seed, index, out, functools.partial(results.put, ("begin", index, None))),
            )
        )
    results.put(("done", -1, None))


class Crew:
    """Processes that examine networks; one that dies or hangs is replaced."""

    def __init__(self, seed: int, out: Path) -> None:
        self.seed, self.out = seed, out
        self.context = multiprocessing.get_context("spawn")

    def run(self, indices: list[int], jobs: int, until: float) -> Iterator[dict[str, Any]]:
        """The lines as they come. No jobs: in this process."""
        if not jobs:
            for index in indices:
                if time.monotonic() > until:
                    return
                yield one(self.seed, index, self.out, lambda: None)
            return
        waiting = [indices[k::jobs] for k in range(jobs)]
        members = {k: self._start(own) for k, own in enumerate(waiting) if own}
        while members:
            for k, member in list(members.items()):
                process = member["process"]
                over = time.monotonic() > until or not process.is_alive()
                yield from self._hear(member)
                late = time.monotonic() - member["heard"] > SILENCE
                over |= late
                if member["done"] or over:
                    process.kill()
                    process.join()
                    del members[k]
                if over and not member["done"] and time.monotonic() <= until:
                    kind = "hang" if late else "crash"
                    faults = [[kind, f"exit code {process.exitcode}"]] if member["began"] else []
                    yield {
                        "index": member["at"],
                        "status": "failed" if faults else f"onnxruntime: {kind}",
                        "faults": faults,
                    }
                    rest = [i for i in waiting[k] if i > member["at"]]
                    if rest:
                        members[k] = self._start(rest)
            time.sleep(0.2)

    def _start(self, indices: list[int]) -> dict[str, Any]:
        queue = self.context.SimpleQueue()
        process = self.context.Process(
            target=work, args=(self.seed, indices, self.out, queue), daemon=True
        )
        process.start()
        return {
            "process": process,
            "queue": queue,
            "at": indices[0],
            "heard": time.monotonic(),
            "began": False,
            "done": False,
        }

    def _hear(self, member: dict[str, Any]) -> Iterator[dict[str, Any]]:
        while not member["queue"].empty():
            kind, index, line = member["queue"].get()
            member["heard"] = time.monotonic()
            if kind in ("make", "begin"):
                member["at"], member["began"] = index, kind == "begin"
            elif kind == "end":
                yield line
            else:
                member["done"] = True


def summary(lines: list[dict[str, Any]]) -> str:
    """Counts of everything."""
    status = Counter(line["status"] for line in lines)
    decided = [line for line in lines if line["status"] == "decided"]
    verdicts = Counter(v for line in lines for v in line.get("verdicts", ()))
    faults = Counter(f"{kind}: {text}" for line in lines for kind, text in line.get("faults", ()))
    reasons = Counter(
        line["reason"] for line in lines if line["status"] in ("refused", "not runnable")
    )
    undecided = Counter(text for line in lines for text in line.get("undecided", ()))
    ops = Counter(op for line in decided for op in line["ops"])
    certificates = sum(line.get("certificates", 0) for line in lines)
    parts = [f"{len(lines)} networks: " + ", ".join(f"{n} {s}" for s, n in status.most_common())]
    parts.append(
        "verdicts: "
        + ", ".join(f"{n} {v}" for v, n in verdicts.most_common())
        + f"; {certificates} certificates"
    )
    for title, counts in (
        ("faults", faults),
        ("undecided", undecided),
        ("refused or not runnable", reasons),
    ):
        parts.append(f"{title}: {sum(counts.values())}")
        parts += [f"  {n:6d}  {text}" for text, n in counts.most_common(60)]
    parts.append(
        "ops in decided networks: " + ", ".join(f"{op} {n}" for op, n in ops.most_common())
    )
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="networks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("hostile-networks"),
        help="folder of the log and of failures",
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "log.jsonl"
    lines = [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []
    done = {line["index"] for line in lines}
    indices = [i for i in range(options.count) if i not in done]
    until = time.monotonic() + options.seconds
    if indices:
        with log.open("a") as file:
            for line in Crew(options.seed, options.out).run(indices, options.jobs, until):
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                for kind, text in line.get("faults", ()):
                    print(f"{options.out / str(line['index'])}: {kind}: {text}", flush=True)
    print(summary(lines))
    return int(any(line.get("faults") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
