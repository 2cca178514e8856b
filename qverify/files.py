"""Files as they are given: plain, or packed by gzip (told by content); and PATH.gz where there is no PATH."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path


class Damaged(Exception):
    """A file that cannot be unpacked, or not to a reasonable size; the text says why."""


def existing(path: Path) -> Path:
    """PATH, or PATH.gz where only that exists."""
    packed = path.with_name(path.name + ".gz") if path.name else path
    return packed if not path.exists() and packed.exists() else path


def is_packed(path: Path) -> bool:
    """Whether a file is packed by gzip. Raises OSError."""
    with path.open("rb") as file:
        return file.peek(2).startswith(b"\x1f\x8b")


def unpacked(path: Path, limit: int) -> bytes:
    """The bytes of a file, unpacked. Raises OSError where it cannot be read, Damaged where it cannot be unpacked or has
    more than `limit` bytes then."""
    pieces, size = [], 0
    with path.open("rb") as file:
        packed = file.peek(2).startswith(b"\x1f\x8b")
        stream = gzip.GzipFile(fileobj=file) if packed else file
        try:
            while piece := stream.read(1 << 20):  # read(n) of a file reserves n bytes
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise Damaged(f"larger than {limit >> 20} MiB{' when unpacked' if packed else ''}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Damaged(f"damaged or truncated gzip file: {error}") from error
    return b"".join(pieces)
