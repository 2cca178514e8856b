"""qverify and its peers on the same instances, side by side.

    python benchmarks/peers/run.py INSTANCES.csv [--timeout 20] [--limit N] [--filter TEXT ...]
        [--peers smt,milp,cpsat,paper2023,qverify] --out rows.csv

INSTANCES.csv is VNN-COMP's (rows onnx,vnnlib,timeout; paths relative to it); --timeout replaces the
third column. Every peer gets each instance in a fresh process, one process at a time, one thread,
killed soon after the limit; its seconds count from the end of the imports to the answer, reading
the files included. Rows that are in the output are not run again (but for crashes). A peer whose
solver is not installed is not asked, and the table says so. The table is printed and written beside
the rows (.md). A `sat` against an `unsat`, or a solver whose codes are no counterexample, is
printed loudly, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs without an installation

PEERS = ("smt", "milp", "cpsat", "paper2023", "qverify")
COLUMNS = ("onnx", "vnnlib", "peer", "verdict", "seconds", "timeout", "reason")
DECIDED = ("sat", "unsat")
# seconds beyond the limit after which a process is killed: imports, and a solver that stops late
STARTUP = 10.0
Row = dict[str, Any]


def one(peer: str, model: Path, spec: Path, timeout: float) -> tuple[str, str, float]:
    """(verdict, reason, seconds) of one peer on one instance, in this process."""
    from benchmarks.peers import decide, paper2023
    from benchmarks.peers.workers import solve_here
    from qverify import Options, verify
    from qverify.errors import QverifyError

    if peer in ("smt", "milp", "cpsat"):
        __import__(f"benchmarks.peers.{peer}")
    start = time.perf_counter()
    try:
        if peer == "qverify":
            result = verify(model, spec, Options(timeout=timeout, device="cpu"))
            answer = decide.Answer(str(result.verdict), result.reason)
        elif peer == "paper2023":
            answer = paper2023.decide(decide.load(model, spec), timeout)
        else:
            instance = decide.load(model, spec)
            left = timeout - (time.perf_counter() - start)
            answer = decide.decide(
                instance, lambda formula, limit: solve_here(peer, formula, limit), left
            )
    except QverifyError as error:
        answer = decide.Answer("refused", str(error))
    seconds = time.perf_counter() - start
    if seconds > timeout and answer.verdict in DECIDED:
        answer = decide.Answer("timeout", f"{answer.verdict} came late")
    return answer.verdict, answer.reason, seconds


def installed(peer: str) -> bool:
    """Whether the package of a peer's solver is here; no process is started to find out."""
    from benchmarks.peers.workers import PACKAGES

    return peer not in PACKAGES or importlib.util.find_spec(PACKAGES[peer]) is not None


def ask(peer: str, model: Path, spec: Path, timeout: float) -> tuple[str, str, float]:
    """`one` in a process of its own, which is killed when it runs over."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--one",
        peer,
        str(model),
        str(spec),
        str(timeout),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | threads,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout + STARTUP)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "timeout", "killed", timeout
    if process.returncode:
        last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return "crash", last[:200], timeout
    verdict, reason, seconds = json.loads(output.strip().splitlines()[-1])
    return verdict, reason, seconds


def instances(path: Path, words: list[str], limit: int | None) -> list[tuple[str, str, float]]:
    """(onnx, vnnlib, timeout) of the rows that contain one of the words."""
    with path.open(newline="") as stream:
        rows = [
            (r[0].strip(), r[1].strip(), float(r[2])) for r in csv.reader(stream) if len(r) >= 3
        ]
    return [r for r in rows if not words or any(w in f"{r[0]} {r[1]}" for w in words)][:limit]


def contradictions(rows: Iterable[Row]) -> list[str]:
    """One line for each instance with both verdicts, and for each answer that failed its check."""
    verdicts: dict[tuple[str, str], dict[str, str]] = {}
    lines = []
    for row in rows:
        verdicts.setdefault((row["onnx"], row["vnnlib"]), {})[row["peer"]] = row["verdict"]
        if row["verdict"] == "error":
            lines.append(f"ERROR: {row['peer']} on {row['onnx']} {row['vnnlib']}: {row['reason']}")
    for (model, spec), said in verdicts.items():
        if {"sat", "unsat"} <= set(said.values()):
            lines.append(f"CONTRADICTION: {model} {spec}: {said}")
    return lines


def table(rows: list[Row], peers: Sequence[str], absent: Sequence[str] = ()) -> str:
    """A Markdown table over the instances that all peers were asked; `absent` ones were not, for
    want of their solver."""
    by = {(r["onnx"], r["vnnlib"], r["peer"]): r for r in rows}
    names = {(r["onnx"], r["vnnlib"]) for r in rows}
    common = sorted(n for n in names if all((*n, peer) in by for peer in peers))
    head = (
        "peer",
        "decided",
        "sat",
        "unsat",
        "unsupported",
        "PAR-2 (s)",
        "median (s)",
        "PAR-2 / qverify",
        "time / qverify",
    )
    lines = [" | ".join(head), " | ".join(["---"] + ["--:"] * (len(head) - 1))]
    par: dict[str, float] = {}
    rows_of: dict[str, list[Row]] = {peer: [by[(*n, peer)] for n in common] for peer in peers}
    for peer, mine in rows_of.items():
        cost = [
            float(r["seconds"]) if r["verdict"] in DECIDED else 2 * float(r["timeout"])
            for r in mine
        ]
        par[peer] = sum(cost) / max(len(cost), 1)
    for peer, mine in rows_of.items():
        said = [r["verdict"] for r in mine]
        times = [float(r["seconds"]) for r in mine if r["verdict"] in DECIDED]
        both = [
            float(a["seconds"]) / float(b["seconds"])
            for a, b in zip(mine, rows_of.get("qverify", []), strict=False)
            if a["verdict"] in DECIDED and b["verdict"] in DECIDED
        ]
        cells = (
            *(
                peer,
                len(times),
                said.count("sat"),
                said.count("unsat"),
                said.count("unsupported") + said.count("refused"),
            ),
            *(f"{par[peer]:.2f}", f"{median(times):.2f}" if times else "-"),
            f"{par[peer] / par['qverify']:.1f}" if par.get("qverify") else "-",
            f"{median(both):.1f}" if both else "-",
        )
        lines.append(" | ".join(map(str, cells)))
    lines += [" | ".join([peer, "not installed", *["-"] * (len(head) - 2)]) for peer in absent]
    note = (
        "PAR-2: mean seconds, an undecided instance counting twice its limit. Median: of the "
        "decided. Ratios: to qverify; "
        "of times: the median over the instances that both decide."
    )
    return (
        f"{len(common)} instances\n\n"
        + "\n".join(f"| {line} |" for line in lines)
        + f"\n\n{note}\n"
    )


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the peers that it names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instances", type=Path)
    parser.add_argument("--timeout", type=float, help="seconds for each, instead of the file's")
    parser.add_argument("--limit", type=int, help="only the first N instances")
    parser.add_argument(
        "--filter", nargs="+", default=[], help="only instances whose paths contain one of these"
    )
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    peers = options.peers.split(",")
    if wrong := set(peers) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(wrong))}: there are {', '.join(PEERS)}")
    return options, peers


def main() -> int:
    """Run what is missing, print the table; 1 on a contradiction."""
    if sys.argv[1:2] == ["--one"]:
        print(
            json.dumps(one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5])))
        )
        return 0
    options, asked = arguments()
    absent = [peer for peer in asked if not installed(peer)]
    peers = [peer for peer in asked if peer not in absent]
    for peer in absent:
        print(
            f"{peer} is left out: its solver is not installed (pip install '.[peers]')", flush=True
        )
    rows: list[Row] = []
    if options.out.exists():
        with options.out.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["onnx"], r["vnnlib"], r["peer"]) for r in rows if r["verdict"] != "crash"}
    folder = options.instances.parent
    with options.out.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if not stream.tell():
            writer.writeheader()
        for model, spec, limit in instances(options.instances, options.filter, options.limit):
            for peer in peers:
                if (model, spec, peer) in done:
                    continue
                timeout = options.timeout or limit
                verdict, reason, seconds = ask(peer, folder / model, folder / spec, timeout)
                values = (model, spec, peer, verdict, f"{seconds:.3f}", f"{timeout:g}", reason)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                writer.writerow(rows[-1])
                stream.flush()
                print(f"{spec:40} {peer:10} {verdict:8} {seconds:8.2f} s  {reason}", flush=True)
    text = table(rows, peers, absent)
    problems = contradictions(rows)
    text = "\n".join([text, *problems])
    options.out.with_suffix(".md").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
