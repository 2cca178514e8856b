"""Files: read plain or packed by gzip (told by content), PATH.gz where there is no PATH.

They are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import secrets
import tempfile
import zlib
from pathlib import Path

from qverify.errors import UsageError


class Damaged(Exception):
    """A file that cannot be unpacked, or not to a reasonable size; the text says why."""


def existing(path: Path) -> Path:
    """PATH, or PATH.gz where only that exists."""
    packed = path.with_name(path.name + ".gz") if path.name else path
    return packed if not path.exists() and packed.exists() else path


def is_packed(path: Path) -> bool:
    """Whether the `existing` file is packed by gzip. Raises OSError."""
    with existing(path).open("rb") as file:
        return file.peek(2).startswith(b"\x1f\x8b")


def unpacked(path: Path, limit: int) -> bytes:
    """The bytes of the `existing` file, unpacked.

    Raises OSError where it cannot be read, Damaged where it cannot be unpacked or has more than
    `limit` bytes then.
    """
    pieces, size = [], 0
    with existing(path).open("rb") as file:
        packed = file.peek(2).startswith(b"\x1f\x8b")
        stream = gzip.GzipFile(fileobj=file) if packed else file
        try:
            while piece := stream.read(1 << 20):  # read(n) of a file reserves n bytes
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise Damaged(
                        f"larger than {limit >> 20} MiB{' when unpacked' if packed else ''}"
                    )
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Damaged(f"damaged or truncated gzip file: {error}") from error
    return b"".join(pieces)


def remove_old(path: str) -> None:
    """Remove a file that an earlier run has written; anything but a regular file stays.

    UsageError if that fails.
    """
    try:
        if os.path.isfile(path) and not os.path.islink(path):
            os.remove(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def check_writable(path: str, *protected: str) -> None:
    """Raise UsageError unless `path` can be written later.

    `protected` are input files it must not replace.
    """
    for other in protected:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise UsageError(f"{path} would overwrite an input file of this run; name another file")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UsageError(f"cannot write {path}: it is a directory")
    if target.exists() and not target.is_file():
        return  # a device or a pipe, written in place
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {path}: the directory {target.parent} does not exist")
    try:
        # The only test that also sees read-only file systems and runs as root; on Linux the file
        # never has a name.
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def write_text(path: str, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file or nothing: a temporary file in the same directory replaces it.

    UsageError if that fails.

    A symbolic link keeps pointing where it did; a device or a pipe (/dev/stdout) is written in
    place.
    """
    target = os.path.realpath(path)
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            with open(target, "wb") as stream:
                stream.write(data)
            return
        draft = os.path.join(os.path.dirname(target), f".qverify-{secrets.token_hex(8)}.tmp")
        try:
            with open(draft, "xb") as stream:  # not mkstemp: the user's umask decides who may read
                stream.write(data)
            os.replace(draft, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
