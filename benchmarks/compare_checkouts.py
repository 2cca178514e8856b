"""Two checkouts of qverify on the same instances: do they answer alike, and how fast is each?

    python benchmarks/compare_checkouts.py OLD NEW INSTANCES.csv [...]
        [--every N] [--limit SECONDS] [--out rows.csv]

OLD and NEW are folders that hold the package `qverify`; each runs in one worker process (the same
Python, one thread) for as long as the comparison takes. INSTANCES.csv are lists as `qverify batch`
takes them. Every instance is decided with and without a certificate, by the two workers in turn
(old, new, new, old, ...), never by both at once, so that noise hits both alike.

Compared are the verdict, its reason, every counter of the statistics, the counterexample, and the
certificate (the names and the contents of its members in order, but not the time that the archive
records). Seconds are user CPU seconds of the call of `verify`; a ratio is old / new, so above 1 the
new checkout is faster. Where one of the two ran into the limit, only contradicting verdicts count
as a difference, and the time is left out. The exit status is 1 if anything differs.

Give a limit far above what the instances need. The search asks the clock whether to go on with the
points of a small box and with intermediate bounds, and grants them a share of the time left: close
to the limit, or on a machine that stalls, the same code may take another way to the same verdict.

Only `qverify.verify`, `qverify.Options` and the fields of `qverify.Result` are used, so that
checkouts with other modules inside can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import hashlib
import io
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DECIDED = ("unsat", "sat")
KILLED = "killed"
RUNS = {"plain": False, "certified": True}  # whether a certificate is asked for
WARM_UP = 5.0  # seconds at most for each run before the first that counts
GRACE = 30.0  # seconds after the limit before a worker counts as hung
SIDE = ("verdict", "reason", "counters", "counterexample", "certificate", "seconds")
COLUMNS = (
    *("set", "onnx", "vnnlib", "run", "differs", "ratio"),
    *(f"{checkout}_{name}" for checkout in ("old", "new") for name in SIDE),
)


@dataclass(frozen=True)
class Instance:
    """A row of an instances file, the folder that it is relative to, and its limit in seconds."""

    group: str
    onnx: str
    vnnlib: str
    folder: str
    limit: float


@dataclass
class Answer:
    """What a checkout said about an instance; of a certificate, the hash of each member."""

    verdict: str
    reason: str = ""
    counters: dict[str, int] = field(default_factory=dict)
    counterexample: str = ""
    certificate: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether the search ended by itself: what it did then does not depend on the time."""
        return self.verdict not in ("timeout", KILLED)


@dataclass(frozen=True)
class Pair:
    """The two answers to one run of an instance."""

    instance: Instance
    run: str
    old: Answer
    new: Answer

    @property
    def complete(self) -> bool:
        return self.old.complete and self.new.complete

    @property
    def ratio(self) -> float | None:
        """Old seconds / new seconds, where both are a measurement."""
        timed = self.complete and min(self.old.seconds, self.new.seconds) > 0
        return self.old.seconds / self.new.seconds if timed else None


# --- what is compared ----------------------------------------------------------------------------


def read_instances(path: Path, every: int, limit: float | None) -> list[Instance]:
    """Every n-th row of an instances file. `limit` replaces the file's."""
    group = path.stem.removesuffix("instances").rstrip("_") or path.resolve().parent.name
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [[word.strip() for word in row] for row in csv.reader(file, skipinitialspace=True)]
    folder = str(path.resolve().parent)
    return [
        Instance(group, row[0], row[1], folder, limit or float(row[2]))
        for row in [row for row in rows if any(row) and not row[0].startswith("#")][::every]
    ]


def members(certificate: bytes) -> dict[str, str]:
    """SHA-256 of each member of a certificate, by name and in order; no times."""
    if not zipfile.is_zipfile(io.BytesIO(certificate)):
        return {"certificate": sha256(certificate)} if certificate else {}
    with zipfile.ZipFile(io.BytesIO(certificate)) as archive:
        entries = archive.infolist()
        return {f"{e.filename}:{e.compress_type}": sha256(archive.read(e)) for e in entries}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def differences(old: Answer, new: Answer) -> list[str]:
    """What differs, in words. A counter that only one checkout has is not compared."""
    if not (old.complete and new.complete):
        contradict = {old.verdict, new.verdict} == set(DECIDED)
        return [f"verdict: {old.verdict}, {new.verdict}"] if contradict else []
    found = [
        f"{name}: {getattr(old, name)}, {getattr(new, name)}"
        for name in ("verdict", "reason")
        if getattr(old, name) != getattr(new, name)
    ]
    for name in [name for name in old.counters if name in new.counters]:
        if old.counters[name] != new.counters[name]:
            found.append(f"{name}: {old.counters[name]}, {new.counters[name]}")
    if old.counterexample != new.counterexample:
        found.append("counterexample")
    proofs = [list(answer.certificate.items()) for answer in (old, new)]
    if proofs[0] != proofs[1]:
        changed = {name.partition(":")[0] for name, _ in set(proofs[0]) ^ set(proofs[1])}
        found.append(f"certificate: {' '.join(sorted(changed)) or 'order of members'}")
    return found


def table(pairs: Sequence[Pair]) -> str:
    """A Markdown table, one line for each set and run."""
    heads = "set, run, instances, same verdict, both ended in time, `unsat`, `sat`, same reason"
    heads += ", same counters, same counterexample, same certificate, old s, new s"
    heads += ", old / new (median), old / new (total)"
    lines = [f"| {' | '.join(heads.split(', '))} |", "|" + "---|" * len(heads.split(", "))]
    for group, run in dict.fromkeys((pair.instance.group, pair.run) for pair in pairs):
        chosen = [pair for pair in pairs if (pair.instance.group, pair.run) == (group, run)]
        lines.append(f"| {group} | {run} | {' | '.join(map(str, counted(chosen)))} |")
    return "\n".join(lines)


def counted(pairs: Sequence[Pair]) -> list[object]:
    """The cells of the table for one set and run."""
    ended = [pair for pair in pairs if pair.complete]
    verdicts = Counter(pair.new.verdict for pair in ended)
    differ = Counter(kind for pair in ended for kind in kinds(pair))
    proofs = sum(bool(pair.old.certificate or pair.new.certificate) for pair in ended)
    ratios = [pair.ratio for pair in ended if pair.ratio is not None]
    old = sum(pair.old.seconds for pair in ended if pair.ratio is not None)
    new = sum(pair.new.seconds for pair in ended if pair.ratio is not None)
    return [
        len(pairs),
        sum(pair.old.verdict == pair.new.verdict for pair in pairs),
        len(ended),
        *(verdicts[verdict] for verdict in DECIDED),
        *(len(ended) - differ[kind] for kind in ("reason", "counters", "counterexample")),
        f"{proofs - differ['certificate']} of {proofs}" if proofs else "-",
        f"{old:.2f}",
        f"{new:.2f}",
        f"{statistics.median(ratios):.3f}" if ratios else "-",
        f"{old / new:.3f}" if ratios else "-",
    ]


def kinds(pair: Pair) -> set[str]:
    """Which columns of the table a pair's differences belong to."""
    words = {text.partition(":")[0] for text in differences(pair.old, pair.new)}
    return {"counters" if word in pair.old.counters else word for word in words}


def only_one_has(pairs: Sequence[Pair]) -> list[str]:
    """The counters that cannot be compared."""
    both = [(pair.old.counters, pair.new.counters) for pair in pairs if pair.complete]
    return sorted({name for old, new in both if old and new for name in old.keys() ^ new.keys()})


def as_row(pair: Pair) -> dict[str, str]:
    """The row of the rows file."""
    ratio = "" if pair.ratio is None else f"{pair.ratio:.4f}"
    row = [pair.instance.group, pair.instance.onnx, pair.instance.vnnlib, pair.run]
    row += ["; ".join(differences(pair.old, pair.new)), ratio]
    for answer in (pair.old, pair.new):
        counters = " ".join(f"{name}={value}" for name, value in answer.counters.items())
        proof = json.dumps(list(answer.certificate.items())) if answer.certificate else ""
        hashes = [sha256(text.encode()) if text else "" for text in (answer.counterexample, proof)]
        row += [answer.verdict, answer.reason, counters, *hashes, f"{answer.seconds:.6f}"]
    return dict(zip(COLUMNS, row, strict=True))


# --- the workers ---------------------------------------------------------------------------------


def serve() -> None:
    """Answer instances on standard input with the qverify on the path, a JSON line each."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    import qverify

    print(json.dumps(str(Path(qverify.__file__).resolve())), file=replies, flush=True)
    for line in sys.stdin:
        model, spec, limit, certificate = json.loads(line)
        answer = decide(qverify, Path(model), Path(spec), limit, certificate)
        print(json.dumps(asdict(answer)), file=replies, flush=True)


def decide(package: Any, model: Path, spec: Path, limit: float, certificate: bool) -> Answer:
    """The answer of this process; an exception is one, too."""
    options = package.Options(timeout=limit, device="cpu", seed=0, certificate=certificate)
    gc.collect()  # not at the expense of whoever comes next
    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        result = package.verify(model, spec, options)
    except Exception as error:  # the two may fail alike, and the rest is to be compared anyway
        return Answer("error", f"{type(error).__name__}: {error}")
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - start
    counters = {k: v for k, v in asdict(result.stats).items() if isinstance(v, int)}
    example = ""
    if (witness := result.witness) is not None:
        example = " ".join([*witness.input_text, "|", *witness.output_text])
    proof = members(result.certificate or b"")
    return Answer(str(result.verdict), result.reason, counters, example, proof, seconds)


class Worker:
    """A process that imports qverify from one checkout; it is started again when it was lost."""

    def __init__(self, checkout: Path) -> None:
        self._checkout = checkout.resolve()
        self._start()

    def _start(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--worker"],
            env={**os.environ, **threads, "PYTHONPATH": str(self._checkout)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        imported = self._reply(GRACE)
        if imported is None or not Path(imported).is_relative_to(self._checkout):
            self.close()
            sys.exit(f"error: {self._checkout} holds no package qverify (imported: {imported})")

    def ask(self, instance: Instance, certificate: bool, limit: float) -> Answer:
        """Decide an instance; a process that dies or hangs is an answer, too."""
        assert self._process.stdin is not None
        paths = (os.path.join(instance.folder, name) for name in (instance.onnx, instance.vnnlib))
        with contextlib.suppress(BrokenPipeError):  # of a process that died meanwhile
            print(json.dumps([*paths, limit, certificate]), file=self._process.stdin, flush=True)
        reply = self._reply(limit + GRACE)
        if reply is not None:
            return Answer(**reply)
        code = self._process.wait()
        self.close()
        self._start()
        verdict = KILLED if code == -signal.SIGKILL else "error"
        return Answer(verdict, f"the process ended with {code}")

    def _reply(self, patience: float) -> Any:
        """The next reply; None if the process ended, or was ended here after so many seconds."""
        assert self._process.stdout is not None
        timer = threading.Timer(patience, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()  # closes its pipes and waits


def compare(workers: Sequence[Worker], instances: Sequence[Instance]) -> Iterator[Pair]:
    """The answers of the old and the new worker to every run of every instance."""
    turn = 0
    for place, instance in enumerate(instances):
        if place == 0 or instance.group != instances[place - 1].group:
            for certificate in RUNS.values():  # what is loaded once is loaded before the clock runs
                for worker in workers:
                    worker.ask(instance, certificate, min(WARM_UP, instance.limit))
        for run, certificate in RUNS.items():
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            found = {i: workers[i].ask(instance, certificate, instance.limit) for i in order}
            yield Pair(instance, run, found[0], found[1])
            turn += 1


def main() -> int:
    """Print the table and what differs."""
    if sys.argv[1:] == ["--worker"]:
        serve()
        return 0
    given = arguments()
    lists = (read_instances(path, given.every, given.limit) for path in given.instances)
    instances = [instance for rows in lists for instance in rows]
    workers = [Worker(given.old), Worker(given.new)]
    pairs = []
    for pair in compare(workers, instances):
        pairs.append(pair)
        if sys.stderr.isatty():
            print(f"\r{len(pairs)} of {len(RUNS) * len(instances)}", end="", file=sys.stderr)
    for worker in workers:
        worker.close()
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(as_row, pairs))
    print(table(pairs))
    return 1 if show_differences(pairs) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="folder of one checkout")
    parser.add_argument("new", type=Path, metavar="NEW", help="folder of the other")
    parser.add_argument("instances", type=Path, nargs="+", metavar="INSTANCES.csv")
    parser.add_argument("--every", type=int, default=1, help="take every n-th instance of a list")
    parser.add_argument("--limit", type=float, help="wall-clock seconds (default: the list's)")
    parser.add_argument("--out", type=Path, help="CSV with a row for each run of each instance")
    return parser.parse_args()


def show_differences(pairs: Sequence[Pair]) -> bool:
    """Name every pair that differs; whether there is one."""
    if names := only_one_has(pairs):
        print(f"counters that only one of the two has, not compared: {', '.join(names)}")
    differ = False
    for pair in pairs:
        place = f"{pair.instance.group}, {pair.run}: {pair.instance.onnx} {pair.instance.vnnlib}"
        if found := differences(pair.old, pair.new):
            differ = True
            print(f"differs: {place}: {'; '.join(found)}")
        elif pair.old.verdict != pair.new.verdict:
            print(f"only one ended in time: {place}: {pair.old.verdict}, {pair.new.verdict}")
    return differ


if __name__ == "__main__":
    sys.exit(main())
