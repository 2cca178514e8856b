"""The independent checker of certificates (specs/certificate.md): it accepts what it can prove by
itself, or says why not.

With the solver it shares the frontend and the meaning of every op (`run`), so that both speak of
the same question. How the answer is proved is its own: intervals and bounds of ops (`ops`,
`bounds`), the regions of a property (`regions`), the tree of cuts (`tree`), and how they make a
proof (`proof`). A certificate is not believed. It only says where to cut and which multipliers to
take, and all cuts and all multipliers are right, if they lead to a proof.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qverify.boundary.fit import check_fit
from qverify.boundary.leaves import make_leaves
from qverify.checker.archive import Archive
from qverify.checker.identity import check_identity, other_reading
from qverify.checker.proof import Proof
from qverify.checker.witness import check_sat
from qverify.errors import EmptyBox, Rejected, SpecError
from qverify.frontend.lower import Lowered
from qverify.frontend.model import read_model
from qverify.frontend.shapes import declared_shapes
from qverify.property import Property
from qverify.vnnlib.reader import read_property

__all__ = ["Rejected", "Report", "check"]

File = str | os.PathLike[str]


@dataclass(frozen=True)
class Report:
    """What was checked: so many parts of the box (`leaves`) were proved one by one, and so many
    `intermediate` bounds."""

    verdict: str
    leaves: int
    intermediate: int
    seconds: float


def check(model: File, spec: File, certificate: File, shapes: Sequence[str] = ()) -> Report:
    """Accept a certificate for a model and a property; `shapes` (NAME=1,3,64,64) fix inputs that
    the model leaves open, as `Options.shapes` did when it was made. Raises Rejected if it does not
    prove its verdict, and another QverifyError for files that cannot be read."""
    start = time.perf_counter()
    archive = Archive(Path(certificate))
    try:
        verdict = archive.field(archive.header, "verdict", str)
        prop = read_property(spec)
        read = read_model(Path(model), shapes, declared_shapes(prop))
        check_identity(archive, read, Path(spec))
        check_fit(prop, read.lowered, Path(spec))
        if not make_leaves(read.lowered).exact:
            raise Rejected("no certificate is possible where outputs are float sums")
        leaves = intermediate = 0
        if verdict == "sat":
            check_sat(archive, prop, read.lowered)
        elif verdict == "unsat":
            try:
                leaves, intermediate = _check_unsat(archive, prop, read.lowered, Path(spec))
            except Rejected as reason:
                raise other_reading(archive, read, reason) from None
        else:
            raise Rejected(f"its verdict is {verdict[:20]!r}")
    finally:
        archive.close()
    return Report(verdict, leaves, intermediate, time.perf_counter() - start)


def _check_unsat(archive: Archive, prop: Property, lowered: Lowered, spec: Path) -> tuple[int, int]:
    """A proof for every query; how many leaves and intermediate bounds they have."""
    if prop.mixed:
        raise Rejected("no certificate of unsat is possible where conditions mention inputs")
    queries = archive.field(archive.header, "queries", list)
    if len(queries) != len(prop.queries):
        raise Rejected(f"it has {len(queries)} queries, the property {len(prop.queries)}")
    leaves = intermediate = 0
    for i, query in enumerate(prop.queries):
        try:
            proof = Proof(archive, i, lowered, query)
        except EmptyBox:
            continue  # nothing to prove
        except SpecError as error:
            raise SpecError(f"{spec}: {error}") from None
        proof.check()
        leaves, intermediate = leaves + proof.leaves, intermediate + proof.intermediate
    return leaves, intermediate
