"""The independent checker of certificates (specs/certificate.md): it accepts what it can prove by itself, or says why not.

With the solver it shares the frontend and the meaning of every op (`run`), so that both speak of the same question. How the
answer is proved is its own: intervals and bounds of ops (`ops`, `bounds`), the regions of a property (`regions`), and the
tree of cuts (here). A certificate is not believed. It only says where to cut and which multipliers to take, and all cuts
and all multipliers are right, if they lead to a proof.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.checker.archive import Archive
from qverify.checker.bounds import Net, Part
from qverify.checker.ops import CPU, Ends, Floats, Ints, Rejected, added, fits, reach
from qverify.checker.regions import Compiler, Inequality, holds, refuted
from qverify.errors import SpecError
from qverify.frontend.boundary import Encoder, make_domain, make_encoder
from qverify.frontend.constraints import Fault, number
from qverify.frontend.fit import check_fit
from qverify.frontend.lower import Lowered
from qverify.frontend.model import read_model
from qverify.frontend.outputs import described_outputs, make_decoder
from qverify.frontend.vnnlib import read_property
from qverify.property import Box, Property, Query

__all__ = ["Rejected", "Report", "check"]

CUT, CLOSED, REGIONS, DUAL = range(4)  # kinds of entries of a tree
INNER, PRECISION, LEAST_PRECISION = 16, 18, 8  # powers of two that sums are multiplied by before edges are taken
BEYOND = 2**40  # all values
BATCH = 2**22  # elements of an array
BoolArray = npt.NDArray[np.bool_]
Terms = list[tuple[Inequality, int]]  # inequalities and their factors


@dataclass(frozen=True)
class Report:
    """What was checked: `leaves` parts of the box were proved one by one, and `inner` bounds of inner values."""

    verdict: str
    leaves: int
    inner: int
    seconds: float


def check(model: Path, spec: Path, certificate: Path) -> Report:
    """Accept a certificate for a model and a property. Raises Rejected if it does not prove its verdict, and a QverifyError
    for files that cannot be read."""
    start = time.perf_counter()
    archive = Archive(certificate)
    try:
        verdict = archive.field(archive.header, "verdict", str)
        read, prop = read_model(model), read_property(spec)
        text = (spec if spec.exists() else spec.with_name(spec.name + ".gz")).read_bytes()  # as the reader does
        for key, what, digest in (
            ("model", "model", read.sha256),
            ("spec", "property", hashlib.sha256(text).hexdigest()),
        ):
            wanted = archive.field(archive.header, f"{key}_sha256", str)
            if wanted != digest:
                raise Rejected(
                    f"it is about another {what}: SHA-256 {wanted[:16]!r}..., this file has {digest[:16]!r}..."
                )
        check_fit(prop, read.lowered, spec)
        if any(row.x for query in prop.queries for case in query.cases for row in case):
            raise Rejected("no certificate is possible where conditions mention inputs")
        if not make_decoder(read.lowered).exact:
            raise Rejected("no certificate is possible where outputs are float sums")
        leaves = inner = 0
        if verdict == "sat":
            check_sat(archive, prop, read.lowered)
        elif verdict == "unsat":
            queries = archive.field(archive.header, "queries", list)
            if len(queries) != len(prop.queries):
                raise Rejected(f"it has {len(queries)} queries, the property {len(prop.queries)}")
            for i, query in enumerate(prop.queries):
                try:
                    proof = Proof(archive, i, read.lowered, query)
                except SpecError as error:
                    raise SpecError(f"{spec}: {error}") from None
                proof.check()
                leaves, inner = leaves + proof.leaves, inner + proof.inner
        else:
            raise Rejected(f"its verdict is {verdict[:20]!r}")
    finally:
        archive.close()
    return Report(verdict, leaves, inner, time.perf_counter() - start)


# -- sat ---------------------------------------------------------------------------------------------------------------


def check_sat(archive: Archive, prop: Property, lowered: Lowered) -> None:
    """The counterexample must lie in a query's box, and the integer network's outputs there satisfy one of its cases."""
    texts, encoder = archive.field(archive.header, "inputs", list), make_encoder(lowered)
    try:
        point = [number(text) for text in texts if type(text) is str]
    except Fault as fault:
        raise Rejected(f"an input: {fault}") from None
    if len(point) != len(texts) or len(point) != len(encoder.is_float):
        raise Rejected(f"it gives {len(point)} decimals for {len(encoder.is_float)} inputs")
    inside = [query for query in prop.queries if _within(point, query.box)]
    if not inside:
        raise Rejected("its inputs lie outside of the property's box")
    x = _rounded(point, texts, encoder)
    y = make_decoder(lowered).decode(lowered.network.run(CPU, encoder.encode(x[None])))[0]
    if not np.isfinite(y).all():
        raise Rejected("an output for its inputs is not finite")
    exact = [Fraction(float(v)) for v in y]
    for case in (case for query in inside for case in query.cases):
        if all(holds(row, sum((c * exact[j] for j, c in row.y), Fraction(0))) for row in case):
            return
    raise Rejected("the outputs for its inputs are not unsafe")


def _within(point: Sequence[Fraction], box: Box) -> bool:
    ends = enumerate(zip(box.lower, point, box.upper, strict=True))
    return all(
        low <= x <= high and not (x == low and i in box.lower_strict) and not (x == high and i in box.upper_strict)
        for i, (low, x, high) in ends
    )


def _rounded(point: Sequence[Fraction], texts: Sequence[str], encoder: Encoder) -> Floats:
    """A point in the types of the model's inputs, float32 or 8-bit integers."""
    if any(
        not (f or (x.denominator == 1 and encoder.low <= x <= encoder.high))
        for f, x in zip(encoder.is_float, point, strict=True)
    ):
        raise Rejected("an input of an integer type is no integer of its type")
    with np.errstate(over="ignore"):
        x = np.array(
            [float(np.float32(float(t)) if f else float(t)) for f, t in zip(encoder.is_float, texts, strict=True)]
        )
    if not np.isfinite(x).all() or np.isnan(encoder.scaled(x[None])).any():
        raise Rejected("an input overflows float32")
    return x


# -- unsat -------------------------------------------------------------------------------------------------------------


class Proof:
    """The proof of a query: inner bounds, and a tree of parts of the root box whose leaves are closed one by one."""

    def __init__(self, archive: Archive, query_number: int, lowered: Lowered, query: Query) -> None:
        self.archive, self.name, self.query = archive, f"q{query_number}.", query
        self.header = archive.header["queries"][query_number]
        if not isinstance(self.header, dict):
            raise archive.fault(f"query {query_number} in header.json is no object")
        self.network, self.decoder = lowered.network, make_decoder(lowered)
        rules, slopes = (archive.field(self.header, key, dict) for key in ("rules", "slopes"))
        nodes = {str(k): k for k in range(1, len(self.network.nodes) + 1)}
        if any(k not in nodes or type(name) is not str for k, name in rules.items()):
            raise Rejected("a rule is not for a node of the network")
        self.net = Net(self.network, {nodes[k]: (name, slopes.get(k)) for k, name in rules.items()})
        low, high = (end[None].astype(np.int64) for end in make_domain(make_encoder(lowered), query.box).code_box())
        self.known: list[Ends | None] = [(low, high), *([None] * len(self.network.nodes))]
        root, _ = self.net.part(1, {}, self.known)
        if not all(np.isfinite(end).all() for end in self._outputs(root)):
            raise Rejected("an output can overflow float32")
        tables = {nodes[k] for k, name in rules.items() if name == "staircase"}
        self.cover = Compiler(self.network, described_outputs(lowered), root.ends, tables).cover(query.cases)
        self.inequalities = self.cover.inequalities
        self.values = sorted({v for own in self.inequalities for v, _, _ in own.terms})
        self.sizes = np.array([t.size for t in self.net.types])
        self.leaves = self.inner = 0
        self.bare, self.at_root = root, np.zeros(len(query.cases), np.bool_)

    def check(self) -> None:
        """Everything in turn."""
        steps = self.archive.field(self.header, "inner", list)
        for j, step in enumerate(steps):
            self._inner_bounds(j, step)
        self.root, possible = self.net.part(1, {}, self.known)
        if not possible.all():
            return  # no point meets the inner bounds
        self.known = list(self.root.ends)
        self._read_tree()
        if self.kind[0] == REGIONS or (self.kind == CLOSED).any():
            # What is refuted in the whole box is so in every part. (Edges need not be better where bounds are.)
            self.at_root = (self._closed_cases(self.bare) | self._closed_cases(self.root))[0]
        if self.kind[0] == REGIONS:
            self._check_root()
        step = max(1, min(256, BATCH // max(int(self.sizes.sum()), 1)))
        closed, dual = np.flatnonzero(self.kind == CLOSED), np.flatnonzero(self.kind == DUAL)
        for start in range(0, len(closed), step):
            self._check_closed(closed[start : start + step])
        if len(dual):
            self._check_dual(dual, step)

    # -- inner bounds

    def _inner_bounds(self, j: int, step: Any) -> None:
        """Bounds of elements of a node's argument, which hold in the whole box: proved from those before them."""
        if not isinstance(step, dict):
            raise self.archive.fault("'inner' in header.json is no list of objects")
        node = self.archive.field(step, "node", int)
        if node not in self.net.rules:
            raise Rejected(f"inner bounds are for node {node}, which has no rule")
        elements, rule = self.archive.array(f"{self.name}inner{j}", None), self.net.rules[node]
        if len(elements) and not 0 <= elements.min() <= elements.max() < rule.size:
            raise Rejected(f"an inner bound is for an element that node {node} does not have")
        precision, given = INNER, {}
        if "columns" in step:
            precision = self.archive.field(step, "precision", int)
            columns = self._columns(step)
            given = _split(
                self.archive.array(f"{self.name}given{j}", 2 * len(elements), sum(columns.values())), columns
            )
        part, _ = self.net.part(1, {}, self.known)
        value, found = rule.known(self._arguments(node, elements, part, precision, given))
        at = node if value is None else self.net.inputs[node][value]
        low, high = np.maximum(found[0], part.ends[at][0]), np.minimum(found[1], part.ends[at][1])
        sane = low <= high
        self.known[at] = np.where(sane, low, part.ends[at][0]), np.where(sane, high, part.ends[at][1])
        self.inner += len(elements)

    def _columns(self, where: dict[str, Any]) -> dict[int, int]:
        """The nodes that multipliers are given for, and how many for each."""
        pairs = self.archive.pairs(where, "columns")
        if len(dict(pairs)) < len(pairs) or any(
            k not in self.net.rules or self.net.rules[k].size != n for k, n in pairs
        ):
            raise Rejected("multipliers are not for the arguments of nodes with rules")
        return dict(pairs)

    def _arguments(self, node: int, elements: Ints, part: Part, precision: int, given: dict[int, Ints]) -> Ends:
        """Bounds [1, size] of some elements of a node's argument; of the others, numbers beyond all values."""
        rule, count = self.net.rules[node], len(elements)
        if not 0 <= precision <= 32:
            raise Rejected(f"an inner bound has the precision {precision}")
        low, high = np.full((1, rule.size), -BEYOND), np.full((1, rule.size), BEYOND)
        step = max(1, BATCH // (2 * int(self.sizes.max())))
        for start in range(0, count, step):
            own = elements[start : start + step]
            unit = np.zeros((1, 2 * len(own), rule.size), np.int64)
            unit[0, np.arange(len(own)), own] = 1 << precision
            unit[0, len(own) + np.arange(len(own)), own] = -1 << precision
            weights: dict[int, Ints] = {}
            for i, w in zip(self.net.inputs[node], rule.back(unit), strict=True):
                weights[i] = added(weights[i], w) if i in weights else w
            rows = np.r_[start : start + len(own), count + start : count + start + len(own)]
            bound = self.net.upper(part, weights, {k: m[rows].swapaxes(0, 1) for k, m in given.items()})[0] >> precision
            low[0, own], high[0, own] = -bound[len(own) :], bound[: len(own)]
        return low, high

    # -- the tree

    def _read_tree(self) -> None:
        """The arrays of the tree; rejected unless every entry but the first is the child of one earlier entry."""
        self.kind = self.archive.array(f"{self.name}kind", None)
        count = len(self.kind)
        names = ("first", "value", "element", "threshold", "data")
        self.first, self.value, self.element, self.threshold, self.data = (
            self.archive.array(self.name + name, count) for name in names
        )
        if not count or self.kind.min() < 0 or self.kind.max() > DUAL or (self.kind[1:] == REGIONS).any():
            raise Rejected("its tree has an entry of no kind, or regions below the root")
        self.regions = np.zeros(0, np.int64)
        if self.kind[0] == REGIONS:
            self.regions = self.archive.array(f"{self.name}regions", None)
        elif (self.kind == DUAL).any():
            raise Rejected("its tree has an entry about no region that is closed by multipliers")
        if len(self.regions) and not 0 <= self.regions.min() <= self.regions.max() < len(self.cover.regions):
            raise Rejected("its tree names a region that the property does not have")
        cuts, top = np.flatnonzero(self.kind == CUT), np.arange(len(self.regions))
        first = self.first[cuts]
        if (
            (first <= cuts).any()
            or (first >= count - 1).any()
            or (len(top) and not 0 < self.first[0] <= count - len(top))
        ):
            raise Rejected("a child in its tree does not exist, or comes before its parent")
        children = np.concatenate([first, first + 1, self.first[0] + top])
        if (np.bincount(children, minlength=count) != (np.arange(count) > 0)).any():
            raise Rejected("its tree is no tree: an entry is nobody's child, or that of two")
        self.parent = np.zeros(count, np.int64)
        self.parent[children] = np.concatenate([cuts, cuts, 0 * top])
        value, element = self.value[cuts], self.element[cuts]
        if ((value < 0) | (value >= len(self.sizes))).any() or ((element < 0) | (element >= self.sizes[value])).any():
            raise Rejected("a cut is on an element that the network does not have")
        if reach(self.threshold[cuts]) >= BEYOND:
            raise Rejected("a cut is beyond all values")

    def _part(self, entries: Ints) -> tuple[Part, BoolArray, Ints]:
        """The boxes of some entries, which of them may hold a point, and the regions that they are about (-1: all)."""
        n, at, region = len(entries), entries.copy(), np.full(len(entries), -1)
        cuts: dict[int, Ends] = {}
        while len(rows := np.flatnonzero(at)):  # one step up
            child, parent = at[rows], self.parent[at[rows]]
            at[rows] = parent
            if self.kind[0] == REGIONS and not parent.all():
                top = parent == 0
                region[rows[top]] = self.regions[child[top] - self.first[0]]
                rows, child, parent = rows[~top], child[~top], parent[~top]
            right = child > self.first[parent]
            for value in np.unique(self.value[parent]).tolist():
                if value not in cuts:
                    cuts[value] = np.full((n, self.sizes[value]), -BEYOND), np.full((n, self.sizes[value]), BEYOND)
                low, high = cuts[value]
                for end, own in ((high, ~right), (low, right)):
                    own = own & (self.value[parent] == value)
                    spot, t = (rows[own], self.element[parent[own]]), self.threshold[parent[own]]
                    end[spot] = np.maximum(end[spot], t) if end is low else np.minimum(end[spot], t - 1)
        part, possible = self.net.part(n, cuts, self.known)
        return part, possible, region

    # -- leaves

    def _outputs(self, part: Part) -> tuple[Floats, Floats]:
        """Ends of the output values."""
        low, high = (
            np.concatenate([part.ends[v][i] for v in self.network.outputs], axis=1).astype(np.int32) for i in (0, 1)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            return self.decoder.decode_box(low, high)

    def _closed_cases(self, part: Part) -> BoolArray:
        """Which cases are refuted in some boxes [N, cases]: by intervals, or in each of their regions by an inequality."""
        result = refuted(self.query.cases, *self._outputs(part))
        left = np.flatnonzero(~result.all(axis=1))
        step = max(1, BATCH // (int(self.sizes.max()) * max(len(self.inequalities), 1)))
        for start in range(0, len(left) if self.inequalities else 0, step):
            rows = left[start : start + step]
            fails = dict(zip(self.inequalities, self._negative(part.take(rows)).T, strict=True))
            empty = [np.any([fails[own] for own in region], axis=0) for region in self.cover.regions]
            for case, regions in enumerate(self.cover.cases):
                if regions is not None:
                    result[rows, case] |= np.all([np.ones(len(rows), np.bool_), *(empty[r] for r in regions)], axis=0)
        return result

    def _negative(self, part: Part) -> BoolArray:
        """Which inequalities have a negative upper bound, by ends or by edges: [N, inequalities]."""
        most = max((abs(c) for own in self.inequalities for _, _, c in own.terms), default=1)
        ends, edges = (1, None), (1 << max(PRECISION - most.bit_length() + 1, LEAST_PRECISION), dict[int, Ints]())
        result = np.zeros((len(part.ends[0][0]), len(self.inequalities)), np.bool_)
        for unit, given in (ends, edges):
            result |= self._upper(part, [[[(own, unit)] for own in self.inequalities]], given) < 0
        return result

    def _upper(self, part: Part, sums: list[list[Terms]], given: dict[int, Ints] | None) -> Ints:
        """Upper bounds [N, R] of R sums of multiples of inequalities' left sides: others in each box, or the same in
        all."""
        shape = len(sums), len(sums[0])
        weights = {v: np.zeros((*shape, self.sizes[v]), np.int64) for v in self.values}
        constants = np.zeros(shape, np.int64)
        for n, row in enumerate(sums):
            for r, terms in enumerate(row):
                fits(
                    sum(abs(f) * max(abs(v) for v in (own.constant, *(c for _, _, c in own.terms))) for own, f in terms)
                )
                for own, factor in terms:
                    constants[n, r] += factor * own.constant
                    for value, element, c in own.terms:
                        weights[value][n, r, element] += factor * c
        return added(self.net.upper(part, weights, given), constants)

    def _check_root(self) -> None:
        """The root's children stand for regions; a case that has another one must be closed."""
        named = set(self.regions.tolist())
        left = [i for i, own in enumerate(self.cover.cases) if own is None or not named.issuperset(own)]
        if not self.at_root[left].all():
            raise Rejected("a region of the property is missing, and its case is not refuted")

    def _check_closed(self, entries: Ints) -> None:
        """Parts without a point, or in which every case is refuted: of a part that is about a region, the region's case."""
        part, possible, region = self._part(entries)
        rows = np.flatnonzero(possible)
        if len(rows):
            closed = self._closed_cases(part.take(rows)) | self.at_root
            for i, own in enumerate(region[rows].tolist()):
                closed[i] |= own >= 0 and np.array([own not in (case or ()) for case in self.cover.cases])
            if not (every := closed.all(axis=1)).all():
                raise Rejected(
                    f"entry {entries[rows[every.argmin()]]} of its tree is not closed: a case is not refuted there"
                )
        self.leaves += len(entries)

    def _check_dual(self, entries: Ints, step: int) -> None:
        """Parts in which a combination of a region's inequalities has a negative upper bound."""
        columns = self._columns(self.header)
        entries = entries[np.argsort(self.data[entries], kind="stable")]
        count, longest = len(entries), max(len(own) for own in self.cover.regions)
        if (self.data[entries] != np.arange(count)).any():
            raise Rejected("a row of multipliers is used twice, or not at all")
        mixes = self.archive.rows(f"{self.name}mix", count, longest)
        multipliers = self.archive.rows(f"{self.name}multipliers", count, sum(columns.values()))
        for start in range(0, count, step):
            own = entries[start : start + step]
            mix, given = mixes.take(len(own)), _split(multipliers.take(len(own)), columns)
            if (mix < 0).any():
                raise Rejected("a combination of inequalities has a negative weight")
            part, possible, region = self._part(own)
            sums = [
                [list(zip(self.cover.regions[r], m, strict=False))] for r, m in zip(region, mix.tolist(), strict=True)
            ]
            open_ = possible & (self._upper(part, sums, given)[:, 0] >= 0)
            if open_.any():
                raise Rejected(f"entry {own[open_.argmax()]} of its tree is not closed: its bound is not negative")
            self.leaves += len(own)


def _split(rows: Ints, columns: dict[int, int]) -> dict[int, Ints]:
    """Rows of multipliers, node by node: [N, 1, size]."""
    ends = np.cumsum(list(columns.values()))
    return dict(zip(columns, np.split(rows[:, None], ends[:-1], axis=2), strict=True)) if columns else {}
