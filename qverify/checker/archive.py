"""Reads the file of a certificate: nothing in it is believed, and nothing in it is run.

Everything is read in pieces and counted before it is kept, since sizes in a ZIP archive's directory
are only claims: what a file holds may be at most CONTENT + RATIO times as large as the file itself.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.errors import CertificateError

FORMAT, VERSION = "qverify certificate", 2
# A file may hold CONTENT bytes, and RATIO times its own size besides. Numbers count as int64, the
# header HEADER_COST times.
CONTENT, RATIO = 2**19, 16
HEADER_COST = 8  # what a text takes as Python's objects
PIECE = 2**16
_NPY = re.compile(
    rb"\{'descr': '(?:<i([248])|\|i(1))', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n"
)
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(NotImplementedError, OverflowError, RuntimeError, ValueError),
)


class Archive:
    """An open certificate. Raises CertificateError, one line, for anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():  # a device or a pipe has no end to read to
            raise self.fault("not a regular file")
        try:
            self._zip = zipfile.ZipFile(path)
            self._room = self._most = CONTENT + RATIO * path.stat().st_size
        except OSError as error:
            raise self.fault(error.strerror or "it cannot be read") from None
        except _BROKEN:
            raise self.fault("not a ZIP archive, or a damaged one") from None
        names = self._zip.namelist()
        if len(set(names)) < len(names):
            raise self.fault("it has two entries of one name")
        try:
            header = json.loads(self._header(), object_pairs_hook=_once, parse_constant=_no_number)
        except (*_BROKEN, RecursionError):
            raise self.fault("header.json cannot be read") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise self.fault("not a certificate of qverify")
        if type(header.get("version")) is not int or header["version"] != VERSION:
            raise self.fault(
                f"its version is {str(header.get('version'))[:20]!r}, this program reads version "
                f"{VERSION}"
            )
        self.header: dict[str, Any] = header

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def fault(self, text: str) -> CertificateError:
        """An error about this file."""
        return CertificateError(f"{self.path}: {text}")

    def charge(self, count: int) -> None:
        """Count bytes of content, before they are kept."""
        self._room -= count
        if self._room < 0:
            raise self.fault(
                f"it is packed too densely: a file of this size may hold {self._most:,} bytes "
                "(see Limits in "
                "specs/certificate.md)"
            )

    def _header(self) -> str:
        stream, text = self.open("header.json"), bytearray()
        while piece := stream.read(PIECE):
            self.charge(HEADER_COST * len(piece))
            text += piece
        return text.decode("utf-8")

    def open(self, name: str) -> Any:
        """The stream of an entry."""
        try:
            info = self._zip.getinfo(name)
        except KeyError:
            raise self.fault(f"it has no {name}") from None
        if info.flag_bits & 1 or info.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise self.fault(f"{name} is encrypted or packed by a method that is not read")
        try:
            return self._zip.open(info)
        except _BROKEN:
            raise self.fault(f"{name} cannot be read") from None

    def field(self, where: dict[str, Any], key: str, kind: type) -> Any:
        """An entry of the header, of the type that it must have."""
        value = where.get(key)
        if type(value) is not kind:
            raise self.fault(f"'{key}' in header.json is missing or not of type {kind.__name__}")
        return value

    def pairs(self, where: dict[str, Any], key: str) -> list[tuple[int, int]]:
        """An entry of the header that is a list of pairs of integers that are not negative."""
        found = self.field(where, key, list)
        for pair in found:
            if (
                not isinstance(pair, list)
                or len(pair) != 2
                or any(type(v) is not int or not 0 <= v < 2**40 for v in pair)
            ):
                raise self.fault(f"'{key}' in header.json is not a list of pairs")
        return [(a, b) for a, b in found]

    def array(self, name: str, *shape: int | None) -> npt.NDArray[np.int64]:
        """A whole array of integers, as int64; `shape` has None where any length will do."""
        rows = self.rows(name, *shape)
        return rows.take(rows.shape[0])

    def rows(self, name: str, *shape: int | None) -> Rows:
        """An array of integers, to be read row by row."""
        return Rows(self, f"{name}.npy", shape)


class Rows:
    """An array in the NPY format, read from its first row to its last."""

    def __init__(self, archive: Archive, name: str, wanted: tuple[int | None, ...]) -> None:
        self._archive, self._name, self._stream = archive, name, archive.open(name)
        start = self._read(10)
        if start[:8] != b"\x93NUMPY\x01\x00":
            raise archive.fault(f"{name} is not in the NPY format, version 1.0")
        length = int.from_bytes(start[8:], "little")
        archive.charge(length)
        match = _NPY.fullmatch(self._read(length))
        numbers = match and re.fullmatch(rb"(?:\d{1,18},|\d{1,18}(?:, \d{1,18})+)?", match[3])
        if not match or not numbers:
            raise archive.fault(f"{name} is not an array of little-endian integers in rows")
        self.shape = tuple(int(n) for n in re.findall(rb"\d+", match[3]))
        self._type = np.dtype(f"<i{int(match[1] or match[2])}")
        if len(self.shape) != len(wanted) or any(
            n not in (None, length) for n, length in zip(wanted, self.shape, strict=True)
        ):
            raise archive.fault(
                f"{name} has the shape {list(self.shape)}, which does not fit the rest"
            )
        self._left = self.shape[0]

    def _read(self, count: int, end: bool = False) -> bytes:
        try:
            data = self._stream.read(count)
        except _BROKEN:
            raise self._archive.fault(f"{self._name} is damaged") from None
        if len(data) != count and not end:
            raise self._archive.fault(f"{self._name} is truncated")
        return data  # type: ignore[no-any-return]

    def take(self, count: int) -> npt.NDArray[np.int64]:
        """The next `count` rows. Behind the last one the entry must end, with the right
        checksum."""
        shape = (count, *self.shape[1:])
        size = prod(shape)
        self._archive.charge(8 * size)
        data = self._read(size * self._type.itemsize)
        self._left -= count
        if not self._left and self._read(1, True):
            raise self._archive.fault(f"{self._name} goes on behind its last number")
        return (
            np.frombuffer(data, self._type).reshape(shape).astype(np.int64)
            if size
            else np.zeros(shape, np.int64)
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys comes twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key comes twice")
    return result


def _no_number(text: str) -> Any:
    """JSON has no NaN and no Infinity."""
    raise ValueError(text)
