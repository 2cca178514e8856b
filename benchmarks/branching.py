"""Branching rules on the same instances, side by side.

    python benchmarks/branching.py INSTANCES.csv [...] [--timeout 10] [--every 1] [--out
    benchmarks/results/branching.csv]

Each instance is run once with every rule (in turn, so that a noisy machine hits all alike); the
attack is on, as in use. The table at the end counts what each rule decided and adds up the time
with undecided instances at the limit.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

from qverify import Options, verify
from qverify.errors import QverifyError
from qverify.search.branch import RULES

COLUMNS = ("network", "property", "rule", "verdict", "seconds", "boxes")


def main() -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instances", type=Path, nargs="+")
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--every", type=int, default=1, help="take every n-th instance")
    parser.add_argument("--contains", default="", help="only properties whose path contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/branching.csv"))
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for source in options.instances:
        lines = [line for line in csv.reader(source.open()) if line and options.contains in line[1]]
        for network, prop, *_ in lines[:: options.every]:
            for rule in RULES:
                start = time.perf_counter()
                try:
                    result = verify(
                        source.parent / network,
                        source.parent / prop,
                        Options(timeout=options.timeout, branch=rule),
                    )
                    verdict, boxes = str(result.verdict), result.stats.subproblems
                except QverifyError as error:
                    print(f"{network} {prop}: {error}", file=sys.stderr)
                    break
                seconds = time.perf_counter() - start
                values = (
                    Path(network).name,
                    Path(prop).name,
                    rule,
                    verdict,
                    f"{seconds:.3f}",
                    boxes,
                )
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for rule in RULES:
        own = [r for r in rows if r["rule"] == rule]
        decided = [r for r in own if r["verdict"] in ("sat", "unsat")]
        total = sum(float(str(r["seconds"])) if r in decided else options.timeout for r in own)
        boxes = sum(int(str(r["boxes"])) for r in decided)
        print(f"{rule:10}: {len(decided)} of {len(own)} decided, {total:.1f} s, {boxes} boxes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
