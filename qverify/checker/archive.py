"""Reads the file of a certificate: nothing in it is believed, and nothing in it is run."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.errors import CertificateError

FORMAT, VERSION = "qverify certificate", 1
MOST_BYTES = 2**32  # of an array that is read at once, as int64
MOST_HEADER = 2**28
_NPY = re.compile(rb"\{'descr': '(?:<i([248])|\|i(1))', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n")
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


class Archive:
    """An open certificate. Raises CertificateError, one line, for whatever is no certificate."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise self.fault(error.strerror or str(error)) from None
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            raise self.fault("not a ZIP archive, or a damaged one") from None
        try:
            text = self._entry("header.json", MOST_HEADER).read()
            header = json.loads(text)
        except (*_BROKEN, RecursionError):
            raise self.fault("header.json cannot be read") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise self.fault("not a certificate of qverify")
        if header.get("version") != VERSION:
            raise self.fault(
                f"its version is {str(header.get('version'))[:20]!r}, this program reads version {VERSION}"
            )
        self.header: dict[str, Any] = header

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def fault(self, text: str) -> CertificateError:
        """An error about this file."""
        return CertificateError(f"{self.path}: {text}")

    def _entry(self, name: str, most: int) -> Any:
        try:
            info = self._zip.getinfo(name)
        except KeyError:
            raise self.fault(f"it has no {name}") from None
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.fault(f"{name} is encrypted or packed by a method that is not read")
        if info.file_size > most:
            raise self.fault(f"{name} is too large")
        return self._zip.open(info)

    def field(self, where: dict[str, Any], key: str, kind: type) -> Any:
        """An entry of the header, of the type that it must have."""
        value = where.get(key)
        if type(value) is not kind:
            raise self.fault(f"'{key}' in header.json is missing or is no {kind.__name__}")
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
                raise self.fault(f"'{key}' in header.json is no list of pairs")
        return [(a, b) for a, b in found]

    def array(self, name: str, *shape: int | None) -> npt.NDArray[np.int64]:
        """A whole array of integers, as int64; `shape` has None where any length will do."""
        rows = self.rows(name, *shape)
        return rows.take(rows.shape[0])

    def rows(self, name: str, *shape: int | None) -> Rows:
        """An array of integers, to be read row by row."""
        return Rows(self, f"{name}.npy", shape)

    def open(self, name: str) -> Any:
        """The stream of an entry."""
        try:
            return self._entry(name, 2**62)
        except _BROKEN:
            raise self.fault(f"{name} cannot be read") from None


class Rows:
    """An array in the NPY format, read from its first row to its last."""

    def __init__(self, archive: Archive, name: str, wanted: tuple[int | None, ...]) -> None:
        self._archive, self._name, self._stream = archive, name, archive.open(name)
        start = self._read(10)
        if start[:8] != b"\x93NUMPY\x01\x00":
            raise archive.fault(f"{name} is not in the NPY format, version 1.0")
        match = _NPY.fullmatch(self._read(int.from_bytes(start[8:], "little")))
        numbers = match and re.fullmatch(rb"(?:\d{1,18},|\d{1,18}(?:, \d{1,18})+)?", match[3])
        if not match or not numbers:
            raise archive.fault(f"{name} is no array of little-endian integers in rows")
        self.shape = tuple(int(n) for n in re.findall(rb"\d+", match[3]))
        self._type = np.dtype(f"<i{int(match[1] or match[2])}")
        if len(self.shape) != len(wanted) or any(
            n not in (None, own) for n, own in zip(wanted, self.shape, strict=True)
        ):
            raise archive.fault(f"{name} has the shape {list(self.shape)}, which does not fit the rest")

    def _read(self, count: int) -> bytes:
        try:
            data = self._stream.read(count)
        except _BROKEN:
            raise self._archive.fault(f"{self._name} is damaged") from None
        if len(data) != count:
            raise self._archive.fault(f"{self._name} is truncated")
        return data  # type: ignore[no-any-return]

    def take(self, count: int) -> npt.NDArray[np.int64]:
        """The next `count` rows."""
        shape = (count, *self.shape[1:])
        size = int(np.prod(shape, dtype=object)) * self._type.itemsize
        if size // self._type.itemsize * 8 > MOST_BYTES:
            raise self._archive.fault(f"{self._name} is too large")
        return np.frombuffer(self._read(size), self._type).reshape(shape).astype(np.int64)
