"""Whether a certificate is about the model and the property that it is held against, as they are
read here."""

from __future__ import annotations

from pathlib import Path

from qverify.checker.archive import Archive
from qverify.errors import Rejected
from qverify.frontend.model import Model
from qverify.frontend.shapes import shapes_text
from qverify.vnnlib.reader import property_sha256


def check_identity(archive: Archive, read: Model, spec: Path) -> None:
    """The certificate must be about these very files."""
    for key, what, digest in (
        ("model", "model", read.sha256),
        ("spec", "property", property_sha256(spec)),
    ):
        wanted = archive.field(archive.header, f"{key}_sha256", str)
        if wanted != digest:
            raise Rejected(
                f"it is about another {what}: SHA-256 {wanted[:16]!r}..., this file has "
                f"{digest[:16]!r}..."
            )
    made, here = archive.header.get("shapes", ""), shapes_text(read.shapes)
    if made != here:
        raise Rejected(
            f"it is about the model with --shape {str(made)[:200]!r}, not {here!r}: give the "
            "check the same"
        )


def other_reading(archive: Archive, read: Model, reason: Rejected) -> Rejected:
    """`reason`; in front of it, if so, that the certificate's numbers are those of another network
    than was read here."""
    if archive.header.get("reading") == read.lowered.digest():
        return reason
    there, here = (
        str(archive.header.get("read_by"))[:80],
        f"onnxruntime {read.runtime_version}'s fused graph",
    )
    return Rejected(
        f"it was made for another reading of the model (there: {there}; here: {here}; or by "
        "another version of qverify), "
        f"and does not hold for this one: {reason}; make it anew in this environment"
    )
