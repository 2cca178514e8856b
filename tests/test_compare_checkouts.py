"""`benchmarks/compare_checkouts.py`, on packages that only look like qverify."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare_checkouts as script
from benchmarks.compare_checkouts import Answer, Instance, Pair, differences, members

PROOF = {"header.json:8": "1", "q0.npy:8": "2"}
REVERSED = dict(reversed(PROOF.items()))
FOUND = Answer("unsat", "proved", {"leaves": 3, "proved": 2}, "", PROOF, 2.0)

PACKAGE = """
from dataclasses import dataclass, field
from types import SimpleNamespace

@dataclass
class Options:
    timeout: float
    device: str
    seed: int
    certificate: bool

@dataclass
class Stats:
    seconds: float = 0.5
    leaves: int = {leaves}

def verify(model, spec, options):
    if spec.name == "broken":
        raise ValueError("no property")
    witness = SimpleNamespace(input_text=("0.5",), output_text=("1",))
    proof = b"proof" if options.certificate else None
    return SimpleNamespace(
        verdict="timeout" if spec.name == "hard" else "sat", reason="found",
        witness=witness, stats=Stats(), certificate=proof,
    )
"""


def archive(year: int, **contents: str) -> bytes:
    """A zip file written in that year."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in contents.items():
            file.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), text)
    return buffer.getvalue()


def checkout(folder: Path, leaves: int) -> Path:
    (folder / "qverify").mkdir(parents=True)
    (folder / "qverify" / "__init__.py").write_text(PACKAGE.format(leaves=leaves), encoding="utf-8")
    return folder


def test_the_time_of_a_certificate_is_not_compared() -> None:
    assert archive(2000, a="1", b="2") != archive(2001, a="1", b="2")
    assert members(archive(2000, a="1", b="2")) == members(archive(2001, a="1", b="2"))
    assert members(archive(2000, a="1", b="2")) != members(archive(2000, a="1", b="3"))
    assert list(members(archive(2000, a="1", b="2"))) != list(members(archive(2000, b="2", a="1")))
    assert members(b"") == {}
    assert members(b"something else") != members(b"something new")


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (replace(FOUND, seconds=9.0), []),
        (replace(FOUND, verdict="sat"), ["verdict: unsat, sat"]),
        (replace(FOUND, reason="found"), ["reason: proved, found"]),
        (replace(FOUND, counters={"leaves": 4, "added": 1}), ["leaves: 3, 4"]),
        (replace(FOUND, counterexample="0.5 | 1"), ["counterexample"]),
        (replace(FOUND, certificate=PROOF | {"q0.npy:8": "3"}), ["certificate: q0.npy"]),
        (replace(FOUND, certificate=REVERSED), ["certificate: order of members"]),
        (Answer("timeout", "time is up", {"leaves": 1}), []),
        (Answer("killed"), []),
    ],
)
def test_what_differs(new: Answer, expected: list[str]) -> None:
    assert differences(FOUND, new) == expected


def test_ratios_are_of_pairs_that_both_ended() -> None:
    instance = Instance("set", "a.onnx", "b.vnnlib", ".", 1.0)
    times = [(3.0, 1.0), (2.0, 2.0), (1.0, 2.0)]
    answers = [(replace(FOUND, seconds=old), replace(FOUND, seconds=new)) for old, new in times]
    answers.append((FOUND, Answer("timeout", seconds=1.0)))
    answers.append((FOUND, replace(FOUND, counters={"leaves": 4, "proved": 3})))
    pairs = [Pair(instance, "plain", old, new) for old, new in answers]
    head, _, line = script.table(pairs).splitlines()
    names, cells = ([cell.strip() for cell in text.split("|")[1:-1]] for text in (head, line))
    row = dict(zip(names, cells, strict=True))
    assert (row["instances"], row["same verdict"], row["both ended in time"]) == ("5", "4", "4")
    assert (row["same counters"], row["same certificate"]) == ("3", "4 of 4")
    assert (row["old s"], row["new s"]) == ("8.00", "7.00")
    assert (row["old / new (median)"], row["old / new (total)"]) == ("1.000", "1.143")


def test_instances_files(tmp_path: Path) -> None:
    path = tmp_path / "mlp_instances.csv"
    text = "# a list\na.onnx, p.vnnlib, 60\n\nb.onnx,q.vnnlib,20\nc.onnx,r.vnnlib,10\n"
    path.write_text(text, encoding="utf-8")
    assert [(i.group, i.onnx, i.vnnlib, i.limit) for i in script.read_instances(path, 2, None)] == [
        ("mlp", "a.onnx", "p.vnnlib", 60.0),
        ("mlp", "c.onnx", "r.vnnlib", 10.0),
    ]
    assert {i.limit for i in script.read_instances(path, 1, 3.0)} == {3.0}
    renamed = path.rename(tmp_path / "instances.csv")
    assert script.read_instances(renamed, 3, None)[0].group == tmp_path.name


def test_two_packages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [checkout(tmp_path / name, leaves) for name, leaves in (("a", 1), ("b", 2))]
    path, rows = tmp_path / "some" / "instances.csv", tmp_path / "rows.csv"
    path.parent.mkdir()
    path.write_text("m.onnx,easy,5\nm.onnx,hard,5\nm.onnx,broken,5\n", encoding="utf-8")

    def compare(old: Path, new: Path) -> int:
        arguments = ["compare_checkouts.py", str(old), str(new), str(path), "--out", str(rows)]
        monkeypatch.setattr(sys, "argv", arguments)
        return script.main()

    assert compare(folders[0], folders[0]) == 0
    assert "differs" not in capsys.readouterr().out
    assert compare(*folders) == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("differs")] == [
        f"differs: some, {run}: m.onnx easy: leaves: 1, 2" for run in ("plain", "certified")
    ]
    with rows.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["old_verdict"] for row in found[::2]] == ["sat", "timeout", "error"]
    assert [bool(row["old_certificate"]) for row in found[:2]] == [False, True]
    assert {row["new_reason"] for row in found[4:]} == {"ValueError: no property"}


def test_a_checkout_without_the_package(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no package qverify"):
        script.Worker(tmp_path)
