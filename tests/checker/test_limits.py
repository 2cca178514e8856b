"""What a hostile certificate can cost, and what it can print: both are bounded."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qverify import certificate
from qverify.checker import Rejected, archive, check
from qverify.checker.bounds import Net
from qverify.cli import main
from qverify.errors import CertificateError, QverifyError, one_line
from tests.test_certificate import Certificate, genuine

ZIP = zipfile.ZIP_DEFLATED


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def packed(header: Any, entries: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", ZIP) as new:
        new.writestr(
            "header.json", header if isinstance(header, str | bytes) else json.dumps(header)
        )
        for name, data in (entries or {}).items():
            new.writestr(name, data)
    return buffer.getvalue()


def chain(original: Certificate, depth: int) -> Certificate:
    """A tree that cuts off an empty part `depth` times."""
    result, count = original.copy(), 2 * depth + 1
    at = np.arange(depth)
    result["kind"] = np.ones(count, np.int8)
    for name in ("first", "value", "element", "threshold", "data"):
        result[name] = np.zeros(count, np.int64)
    result["kind"][2 * at], result["first"][2 * at] = 0, 2 * at + 1
    result["threshold"][2 * at] = -1000
    entry = np.arange(count)
    result["kind"] = np.where((entry % 2 == 0) & (entry < 2 * depth), 0, 1).astype(np.int8)
    return result


def bombs(original: Certificate) -> Iterator[tuple[str, bytes]]:
    """Small files that hold much: arrays, headers of objects, headers of spaces, and sizes that are
    lies."""
    arrays = {f"{n}.npy": npy(a) for n, a in original.arrays.items()}
    large = npy(np.zeros(2**22, np.int8))
    yield "arrays", packed(original.header, arrays | {n: large for n in arrays})
    one = {"q0.kind.npy": npy(np.zeros(2**25, np.int8))}
    yield "one array", packed(original.header, arrays | one)
    text = json.dumps(original.header)
    yield "spaces", packed(text + " " * 2**25)
    yield "lists", packed(text[:-1] + ', "x": [' + "[]," * 2**22 + "0]}")
    yield "objects", packed(text[:-1] + ', "x": [' + "{}," * 2**22 + "0]}")
    for wanted, what in (
        (b"header.json", text.encode() + b" " * 2**25),
        (b"q0.kind.npy", npy(np.zeros(2**25, np.int8))),
    ):
        data = bytearray(
            packed(what, arrays)
            if wanted == b"header.json"
            else packed(text, arrays | {"q0.kind.npy": what})
        )
        at = data.rindex(b"PK\x01\x02", 0, data.rindex(wanted))
        # The directory's size of the content.
        data[at + 24 : at + 28] = (1000).to_bytes(4, "little")
        yield f"a lie about {wanted.decode()}", bytes(data)


def test_a_small_file_costs_little_memory(tmp_path: Path) -> None:
    """Whatever it holds is counted before it is kept. (What a lie about a size cuts short cannot be
    read.)"""
    original, path = genuine("splits"), tmp_path / "proof"
    for name, data in bombs(original):
        assert len(data) < 2**18, name
        path.write_bytes(data)
        tracemalloc.start()
        with pytest.raises(CertificateError, match=r"packed too densely|damaged|cannot be read"):
            check(original.model, original.spec, path)
        assert tracemalloc.get_traced_memory()[1] < 2**26, name
        tracemalloc.stop()


def test_work_is_linear_in_the_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep the tree: every leaf's box is made once, and a step of the walk changes one
    end."""
    boxes = []
    genuine_part = Net.part

    def part(self: Net, n: int, *others: Any) -> Any:
        boxes.append(n)
        return genuine_part(self, n, *others)

    monkeypatch.setattr(Net, "part", part)
    for depth in (50, 2000):
        boxes.clear()
        with pytest.raises(Rejected, match=f"entry {2 * depth} of its tree is not closed"):
            chain(genuine("splits"), depth).check(tmp_path)
        assert (
            sum(boxes) == depth + 1 + 2
        )  # the leaves, and the root before and after intermediate bounds


def test_a_dense_certificate_is_written_so_that_it_can_be_read(tmp_path: Path) -> None:
    """The limits are known to the writer, which then does not pack."""
    assert (
        certificate.VERSION,
        certificate.CONTENT,
        certificate.RATIO,
        certificate.HEADER_COST,
    ) == (
        archive.VERSION,
        archive.CONTENT,
        archive.RATIO,
        archive.HEADER_COST,
    )
    original = chain(genuine("splits"), 40_000)
    data = certificate._zip(original.header, original.arrays)
    assert len(original.data()) * 10 < len(data)
    path = tmp_path / "proof"
    path.write_bytes(data)
    read = archive.Archive(path)
    for name, array in original.arrays.items():
        assert (read.array(name, *array.shape) == array).all()
    path.write_bytes(original.data())
    read = archive.Archive(path)
    with pytest.raises(CertificateError, match="packed too densely"):
        for name, array in original.arrays.items():
            read.array(name, *array.shape)


HOSTILE = (
    "\naccepted unsat\n",
    "\ud800",
    "\x1b[2J",
    "\u202eqvak",
    "\x00",
    "é" * 20_000,
    "\r\n\u2028accepted unsat",
)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_file_says_is_one_printable_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in a rejected certificate can print a line of its own, or break the terminal or the
    program."""
    original, path = genuine("splits"), tmp_path / "proof"
    queries = original.header["queries"][0]
    changes: list[dict[str, Any]] = [
        {key: text}
        for key in ("format", "version", "verdict", "model_sha256", "spec_sha256", "queries")
    ]
    changes += [
        {"queries": [queries | change]}
        for change in (
            *(
                {"rules": {"1": text}},
                {"rules": {"2": text}},
                {"rules": {text: "staircase"}},
                {"slopes": {text: text}},
            ),
            *(
                {"inner": [{"node": text}]},
                {"inner": [{"node": 1, "columns": text}]},
                {"columns": [[text, text]]},
            ),
        )
    ]
    for change in changes:
        changed = original.copy()
        changed.header.update(change)
        path.write_bytes(changed.data())
        code = main(["check", str(original.model), str(original.spec), str(path)])
        out, err = capsys.readouterr()
        assert code in (0, 1, 2) and (code == 0) == (out == "accepted unsat\n")
        lines = (out + err).splitlines()
        assert len(lines) == 1 + (code == 0) and all(line.isprintable() for line in lines), (
            change,
            lines,
        )


def test_one_line() -> None:
    assert one_line("as it is: é, '漢'") == "as it is: é, '漢'"
    assert one_line(" a\n\tb  c\u2028d ") == "a b c d"
    assert (
        one_line("\x1b[2J\ud800\u202e\x00")
        == "\N{REPLACEMENT CHARACTER}[2J" + 3 * "\N{REPLACEMENT CHARACTER}"
    )
    assert len(one_line("x" * 10**6)) < 11_000
    assert str(QverifyError("a\nb")) == "a b"


def test_paths_are_strings_or_paths(tmp_path: Path) -> None:
    original, path = genuine("splits"), tmp_path / "proof"
    path.write_bytes(original.data())
    assert check(str(original.model), str(original.spec), str(path)).verdict == "unsat"


def test_names_in_a_model_cannot_print_lines_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = genuine("splits")
    model = onnx.load(original.model)
    for k, node in enumerate(model.graph.node):
        node.name = f"\nunsat\n\x1b[2J\u202e{k}"
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    counts = []
    for name in (original.model, path):
        assert main(["inspect", str(name)]) == 0
        lines = capsys.readouterr().out.split("\n")
        assert all(line.isprintable() for line in lines)
        counts.append(len(lines))
    assert counts[0] == counts[1]
    model.graph.node[0].op_type = "\naccepted unsat"
    path.write_bytes(model.SerializeToString())
    assert main([str(path), str(original.spec)]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and err.removesuffix("\n").isprintable()


def test_a_device_is_no_certificate() -> None:
    """It has no end to read to."""
    with pytest.raises(CertificateError, match="not a regular file"):
        archive.Archive(Path("/dev/zero"))
