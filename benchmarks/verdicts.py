"""Tables of verdicts by network and radius, from the rows of `qverify batch`, beside what intervals
alone decide.

    python benchmarks/verdicts.py INSTANCES.csv RESULTS.csv [--intervals SECONDS] [--out rows.csv]

INSTANCES.csv is what the batch ran, RESULTS.csv what it wrote. The radius is read off the
property's name (`..._eps2.vnnlib`, `prop_7_0.03.vnnlib`; one group per network where there is
none). With --intervals every instance is also given to intervals and input splitting alone, without
an attack, for so many seconds (that is the 2023 paper's procedure, in batches). The rows of --out
are those of RESULTS.csv, with the radius and that verdict; the table goes to standard output.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported

from qverify import Options, verify

COLUMNS = ("onnx", "vnnlib", "radius", "result", "seconds", "intervals")
DECIDED = ("unsat", "sat")


def radius(name: str) -> str:
    """The last number of a property's name that looks like a radius, else nothing."""
    found = re.findall(
        r"eps_?(\d+(?:\.\d+)?)|_(0\.\d+)",
        Path(name).name.removesuffix(".gz").removesuffix(".vnnlib"),
    )
    return "" if not found else found[-1][0] or found[-1][1]


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table, one line per network and radius."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[Path(row["onnx"]).stem, row["radius"]].append(row)
    lines = [
        "| network | radius | instances | `unsat` | `sat` | open | median s | most s | intervals "
        "alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (network, size), own in sorted(
        groups.items(), key=lambda group: (group[0][0], float(group[0][1] or 0))
    ):
        count = {verdict: sum(row["result"] == verdict for row in own) for verdict in DECIDED}
        times = [float(row["seconds"]) for row in own]
        alone = sum(row["intervals"] in DECIDED for row in own) if own[0]["intervals"] else "-"
        lines.append(
            f"| {network} | {size or '-'} | {len(own)} | {count['unsat']} | {count['sat']} "
            f"| {len(own) - sum(count.values())} | {statistics.median(times):.2f} | "
            f"{max(times):.1f} | {alone} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("instances", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--intervals", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    with given.instances.open(newline="") as file:
        wanted = {(row[0], row[1]) for row in csv.reader(file) if row}
    rows = []
    with given.results.open(newline="") as file:
        for row in csv.reader(file):
            _, onnx, vnnlib, _, result, seconds, *_ = row
            if (onnx, vnnlib) not in wanted:
                continue
            alone = ""
            if given.intervals:
                model, spec = (given.instances.parent / name for name in (onnx, vnnlib))
                options = Options(
                    timeout=given.intervals, device="cpu", backward=False, attack=False
                )
                alone = verify(model, spec, options).verdict.value
            values = (
                onnx,
                Path(vnnlib).name,
                radius(vnnlib),
                result,
                f"{float(seconds):.2f}",
                alone,
            )
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    if not rows:
        sys.exit("error: no row of the results is an instance of the list")
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
