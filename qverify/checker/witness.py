"""`sat`: a certificate's counterexample, as decimals."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from qverify.boundary.domain import inside_bounds, make_domain
from qverify.boundary.outputs import Decoder, make_decoder
from qverify.boundary.readings import make_readings
from qverify.boundary.rounding import float32s
from qverify.checker.archive import Archive
from qverify.checker.ops import CPU, Floats
from qverify.checker.regions import holds
from qverify.errors import Rejected
from qverify.frontend.encoder import Encoder, make_encoder
from qverify.frontend.lower import Lowered
from qverify.property import Case, Property, Query, Row
from qverify.vnnlib.constraints import Fault, number


def check_sat(archive: Archive, prop: Property, lowered: Lowered) -> None:
    """The counterexample must lie in a query's box, and the integer network's outputs there satisfy
    one of its cases."""
    texts, encoder = archive.field(archive.header, "inputs", list), make_encoder(lowered)
    try:
        point = [number(text) for text in texts if type(text) is str]
    except Fault as fault:
        raise Rejected(f"an input: {fault}") from None
    if len(point) != len(texts) or len(point) != len(encoder.is_float):
        raise Rejected(f"it gives {len(point)} decimals for {len(encoder.is_float)} inputs")
    inside = [
        q for q in prop.queries if all(inside_bounds(q.box, i, x) for i, x in enumerate(point))
    ]
    if not inside:
        raise Rejected("its inputs lie outside of the property's box")
    x = _rounded(point, texts, encoder)
    y = make_decoder(lowered).decode(lowered.network.run(CPU, encoder.encode(x[None])))[0]
    if not np.isfinite(y).all():
        raise Rejected("an output for its inputs is not finite")
    exact = [Fraction(float(v)) for v in y]
    readings = point, [Fraction(float(v)) for v in point], [Fraction(float(v)) for v in x]
    for case in (
        case for query in inside for case in _certain(query, encoder, make_decoder(lowered), x, y)
    ):
        if all(holds(row, _left(row, inputs, exact)) for row in case for inputs in readings):
            return
    raise Rejected("the outputs for its inputs are not unsafe")


def _left(row: Row, x: Sequence[Fraction], y: Sequence[Fraction]) -> Fraction:
    """The left side of a row."""
    return sum((c * x[i] for i, c in row.x), Fraction(0)) + sum(
        (c * y[j] for j, c in row.y), Fraction(0)
    )


def _certain(
    query: Query, encoder: Encoder, decoder: Decoder, x: Floats, y: Floats
) -> Sequence[Case]:
    """The cases of a query with the rows that no reading of their numbers doubts at outputs `y`;
    none where `x` lies within rounding of the box's bounds."""
    domain = make_domain(encoder, query.box)
    return make_readings(query, domain, decoder).certain_at(y).cases if domain.is_certain(x) else ()


def _rounded(point: Sequence[Fraction], texts: Sequence[str], encoder: Encoder) -> Floats:
    """A point in the types of the model's inputs, float32 or 8-bit integers."""
    if any(
        not (f or (x.denominator == 1 and encoder.low <= x <= encoder.high))
        for f, x in zip(encoder.is_float, point, strict=True)
    ):
        raise Rejected("an input is not an integer of its integer type")
    with np.errstate(over="ignore"):
        x = np.array(
            [
                float(np.float32(float(t)) if f else float(t))
                for f, t in zip(encoder.is_float, texts, strict=True)
            ]
        )
    if not np.isfinite(x).all() or np.isnan(encoder.scaled(x[None])).any():
        raise Rejected("an input overflows float32")
    if any(
        f and float32s(text)[0] != v for f, text, v in zip(encoder.is_float, point, x, strict=True)
    ):
        raise Rejected("an input is another float32 where it is rounded at once")
    return x
