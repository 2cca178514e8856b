"""`unsat`: the proof of a query, in the terms of specs/certificate.md."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.boundary.domain import make_domain
from qverify.boundary.outputs import described_outputs, make_decoder
from qverify.boundary.readings import make_readings
from qverify.checker.archive import Archive
from qverify.checker.bounds import Net, Part
from qverify.checker.ops import CPU, Floats, Interval, Ints, TooLarge, added, fits
from qverify.checker.regions import Compiler, Inequality, refuted
from qverify.checker.tree import BEYOND, CLOSED, DUAL, Leaves, Tree
from qverify.errors import Rejected
from qverify.frontend.encoder import make_encoder
from qverify.frontend.lower import Lowered
from qverify.property import Query

# Powers of two that sums are multiplied by before CROWN slopes are rounded: for intermediate
# bounds, and for inequalities, at most (less the bits of the largest coefficient) and at least.
INNER, PRECISION, LEAST_PRECISION = 16, 18, 8
BATCH = 2**19  # elements of an array
BoolArray = npt.NDArray[np.bool_]
Terms = list[tuple[Inequality, int]]  # inequalities and their factors


class Proof:
    """The proof of a query: intermediate bounds, and a tree of parts of the root box, whose leaves
    are closed one by one."""

    def __init__(self, archive: Archive, query_number: int, lowered: Lowered, query: Query) -> None:
        self.archive, self.name = archive, f"q{query_number}."
        self.header = archive.header["queries"][query_number]
        if not isinstance(self.header, dict):
            raise archive.fault(f"query {query_number} in header.json is not an object")
        self.network, self.decoder = lowered.network, make_decoder(lowered)
        rules, slopes = (archive.field(self.header, key, dict) for key in ("rules", "slopes"))
        nodes = {str(k): k for k in range(1, len(self.network.nodes) + 1)}
        if any(k not in nodes or type(name) is not str for k, name in rules.items()):
            raise Rejected("a rule is not for a node of the network")
        self.net = Net(self.network, {nodes[k]: (name, slopes.get(k)) for k, name in rules.items()})
        self.domain = make_domain(make_encoder(lowered), query.box)
        self.readings = make_readings(query, self.domain, self.decoder)
        self.query = query = self.readings.possible
        low, high = (end[None].astype(np.int64) for end in self.domain.code_box())
        self.known: list[Interval | None] = [(low, high), *([None] * len(self.network.nodes))]
        root, _ = self.net.part(1, {}, self.known)
        if not all(np.isfinite(end).all() for end in self._outputs(root)):
            raise Rejected("an output can overflow float32")
        tables = {nodes[k] for k, name in rules.items() if name == "staircase"}
        compiler = Compiler(self.network, described_outputs(lowered), root.intervals, tables)
        self.unsafe = compiler.unsafe_regions(query.cases)
        self.inequalities = self.unsafe.inequalities
        self.values = sorted({v for row in self.inequalities for v, _, _ in row.terms})
        self.sizes = np.array([t.size for t in self.net.types])
        self.leaves = self.intermediate = self.duals = 0
        self.bare, self.at_root = root, np.zeros(len(query.cases), np.bool_)

    def check(self) -> None:
        """Everything in turn."""
        steps = self.archive.field(self.header, "inner", list)
        for j, step in enumerate(steps):
            self._intermediate_bounds(j, step)
        self.root, possible = self.net.part(1, {}, self.known)
        if not possible.all():
            return  # no point meets the intermediate bounds
        self.known = list(self.root.intervals)
        self.tree = Tree(self.archive, self.name, self.sizes, len(self.unsafe.regions))
        kinds = self.tree.kind
        if self.tree.parted or (kinds == CLOSED).any():
            # What is refuted in the whole box is refuted in every part. (Both are needed: tighter
            # bounds do not always give a tighter bound by CROWN slopes.)
            self.at_root = (self._closed_cases(self.bare) | self._closed_cases(self.root))[0]
        if self.tree.parted:
            self._check_root()
        step = max(1, min(256, BATCH // max(int(self.sizes.sum()), 1)))
        for leaves in self.tree.leaves(CLOSED, step):
            self._check_closed(leaves)
        if (kinds == DUAL).any():
            self._check_dual(step)

    # -- intermediate bounds

    def _intermediate_bounds(self, j: int, step: Any) -> None:
        """Bounds of elements of a node's argument, which hold in the whole box: proved from those
        before them."""
        if not isinstance(step, dict):
            raise self.archive.fault("'inner' in header.json is not a list of objects")
        node = self.archive.field(step, "node", int)
        if node not in self.net.rules:
            raise Rejected(f"intermediate bounds are for node {node}, which has no rule")
        elements, rule = self.archive.array(f"{self.name}inner{j}", None), self.net.rules[node]
        if len(elements) and not 0 <= elements.min() <= elements.max() < rule.size:
            raise Rejected(
                f"an intermediate bound is for an element that node {node} does not have"
            )
        precision, given = INNER, {}
        if "columns" in step:
            precision = self.archive.field(step, "precision", int)
            columns = self._columns(step)
            given = _split(
                self.archive.array(
                    f"{self.name}given{j}", 2 * len(elements), sum(columns.values())
                ),
                columns,
            )
        part, _ = self.net.part(1, {}, self.known)
        value, found = rule.known(self._arguments(node, elements, part, precision, given))
        at = node if value is None else self.net.inputs[node][value]
        low, high = (
            np.maximum(found[0], part.intervals[at][0]),
            np.minimum(found[1], part.intervals[at][1]),
        )
        sane = low <= high
        self.known[at] = (
            np.where(sane, low, part.intervals[at][0]),
            np.where(sane, high, part.intervals[at][1]),
        )
        self.intermediate += len(elements)

    def _columns(self, where: dict[str, Any]) -> dict[int, int]:
        """The nodes that multipliers are given for, and how many for each."""
        pairs = self.archive.pairs(where, "columns")
        if len(dict(pairs)) < len(pairs) or any(
            k not in self.net.rules or self.net.rules[k].size != n for k, n in pairs
        ):
            raise Rejected("multipliers are not for the arguments of nodes with rules")
        return dict(pairs)

    def _arguments(
        self, node: int, elements: Ints, part: Part, precision: int, given: dict[int, Ints]
    ) -> Interval:
        """Bounds [1, size] of some elements of a node's argument; of the others, numbers beyond all
        values."""
        rule, count = self.net.rules[node], len(elements)
        if not 0 <= precision <= 32:
            raise Rejected(f"an intermediate bound has the precision {precision}")
        low, high = np.full((1, rule.size), -BEYOND), np.full((1, rule.size), BEYOND)
        step = max(1, BATCH // (2 * int(self.sizes.max())))
        for start in range(0, count, step):
            some = elements[start : start + step]
            unit = np.zeros((1, 2 * len(some), rule.size), np.int64)
            unit[0, np.arange(len(some)), some] = 1 << precision
            unit[0, len(some) + np.arange(len(some)), some] = -1 << precision
            weights: dict[int, Ints] = {}
            for i, w in zip(self.net.inputs[node], rule.back(unit), strict=True):
                weights[i] = added(weights[i], w) if i in weights else w
            rows = np.r_[start : start + len(some), count + start : count + start + len(some)]
            mine = {k: m[rows].swapaxes(0, 1) for k, m in given.items()}
            bound = self._bounds(part, weights, mine, precision)[0]
            low[0, some], high[0, some] = -bound[len(some) :], bound[: len(some)]
        return low, high

    def _bounds(
        self, part: Part, weights: dict[int, Ints], given: dict[int, Ints], precision: int
    ) -> Ints:
        """Upper bounds [1, R] over one box, in units of 2**precision; of what has none, a number
        beyond all values."""
        try:
            return self.net.upper(part, weights, given) >> precision
        except TooLarge:  # one function may be, and the others not
            count = max(w.shape[1] for w in weights.values())
            if count == 1:
                return np.full((1, 1), BEYOND)
        halves = slice(0, count // 2), slice(count // 2, None)
        bounds = [
            self._bounds(part, _columns_of(weights, half), _columns_of(given, half), precision)
            for half in halves
        ]
        return np.concatenate(bounds, axis=1)

    # -- leaves

    def _outputs(self, part: Part) -> tuple[Floats, Floats]:
        """Interval of the output values."""
        low, high = (
            np.concatenate([part.intervals[v][i] for v in self.network.outputs], axis=1).astype(
                np.int32
            )
            for i in (0, 1)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            return self.decoder.decode_box(low, high)

    def _closed_cases(self, part: Part) -> BoolArray:
        """Which cases are refuted in some boxes [N, cases]: by intervals, or in each of their
        regions by an inequality."""
        result = refuted(self.query.cases, *self._outputs(part))
        left = np.flatnonzero(~result.all(axis=1))
        step = max(1, BATCH // (int(self.sizes.max()) * max(len(self.inequalities), 1)))
        for start in range(0, len(left) if self.inequalities else 0, step):
            rows = left[start : start + step]
            fails = dict(zip(self.inequalities, self._negative(part.take(rows)).T, strict=True))
            empty = [
                np.any([fails[row] for row in region], axis=0) for region in self.unsafe.regions
            ]
            for case, regions in enumerate(self.unsafe.cases):
                if regions is not None:
                    result[rows, case] |= np.all(
                        [np.ones(len(rows), np.bool_), *(empty[r] for r in regions)], axis=0
                    )
        return result

    def _negative(self, part: Part) -> BoolArray:
        """Which inequalities have a negative upper bound, by last-layer intervals or by CROWN
        slopes: [N, inequalities]."""
        most = max((abs(c) for row in self.inequalities for _, _, c in row.terms), default=1)
        precision = max(PRECISION - most.bit_length() + 1, LEAST_PRECISION)
        by_intervals, by_slopes = (1, None), (1 << precision, dict[int, Ints]())
        result = np.zeros((len(part.intervals[0][0]), len(self.inequalities)), np.bool_)
        for unit, given in (by_intervals, by_slopes):
            try:
                sums = [[(row, unit)] for row in self.inequalities]
                result |= self._upper(part, [sums], given) < 0
                continue
            except TooLarge:  # one of them may be, and the others not
                pass
            for n, i in np.ndindex(*result.shape):
                with contextlib.suppress(TooLarge):
                    bound = self._upper(part.take([n]), [[[(self.inequalities[i], unit)]]], given)
                    result[n, i] |= bool(bound[0, 0] < 0)
        return result

    def _upper(self, part: Part, sums: list[list[Terms]], given: dict[int, Ints] | None) -> Ints:
        """Upper bounds [N, R] of R sums of multiples of inequalities' left sides: others in each
        box, or the same in all."""
        shape = len(sums), len(sums[0])
        weights = {v: np.zeros((*shape, self.sizes[v]), np.int64) for v in self.values}
        constants = np.zeros(shape, np.int64)
        for n, row in enumerate(sums):
            for r, terms in enumerate(row):
                fits(sum(abs(factor) * _magnitude(inequality) for inequality, factor in terms))
                for inequality, factor in terms:
                    constants[n, r] += factor * inequality.constant
                    for value, element, c in inequality.terms:
                        weights[value][n, r, element] += factor * c
        return added(self.net.upper(part, weights, given), constants)

    def _check_root(self) -> None:
        """The root's children stand for regions; a case that has another one must be closed."""
        named = set(self.tree.regions.tolist())
        left = [
            i
            for i, regions in enumerate(self.unsafe.cases)
            if regions is None or not named.issuperset(regions)
        ]
        if not self.at_root[left].all():
            raise Rejected("a region of the property is missing, and its case is not refuted")

    def _part(self, leaves: Leaves) -> tuple[Part, BoolArray]:
        """The boxes of some leaves, and which of them may hold a point."""
        return self.net.part(len(leaves.entries), leaves.cuts, self.known)

    def _check_closed(self, leaves: Leaves) -> None:
        """Parts without a point, or in which every case is refuted: of a part that is about a
        region, the region's case."""
        part, possible = self._part(leaves)
        rows = np.flatnonzero(possible)
        if len(rows):
            closed = self._closed_cases(part.take(rows)) | self.at_root
            for i, region in enumerate(leaves.region[rows].tolist()):
                closed[i] |= region >= 0 and np.array(
                    [region not in (case or ()) for case in self.unsafe.cases]
                )
            for row in np.flatnonzero(~closed.all(axis=1)):
                if not self._holds_nothing(part, rows[row], np.flatnonzero(~closed[row])):
                    raise Rejected(
                        f"entry {leaves.entries[rows[row]]} of its tree is not closed: a case is "
                        "not refuted there"
                    )
        self.leaves += len(leaves.entries)

    def _holds_nothing(self, part: Part, row: int, cases: Ints) -> bool:
        """Whether no input has codes in a part (several codes may come from one input element), or
        it is one code vector and no reading of the property accepts these cases there.

        Sound because `cells` gives, for every input element, all its values whose codes lie in the
        part.
        """
        low, high = (end[row].astype(np.int32) for end in part.intervals[0])
        without = self.domain.encoder.shared and self.domain.cells(low, high) is None
        if without or (low < high).any():
            return without
        y = self.decoder.decode(self.network.run(CPU, low[None]))[0]
        return not any(self.readings.accept(int(k), y) for k in cases)

    def _check_dual(self, step: int) -> None:
        """Parts in which a combination of a region's inequalities has a negative upper bound."""
        columns = self._columns(self.header)
        count = int((self.tree.kind == DUAL).sum())
        longest = max(len(region) for region in self.unsafe.regions)
        all_mu = self.archive.rows(f"{self.name}mix", count, longest)
        multipliers = self.archive.rows(f"{self.name}multipliers", count, sum(columns.values()))
        for leaves in self.tree.leaves(DUAL, step):
            entries = leaves.entries
            if (self.tree.data[entries] != np.arange(self.duals, self.duals + len(entries))).any():
                raise Rejected(
                    "its rows of multipliers are not those of its tree's entries, in the order of "
                    "a walk"
                )
            self.duals += len(entries)
            mu, given = all_mu.take(len(entries)), _split(multipliers.take(len(entries)), columns)
            if (mu < 0).any():
                raise Rejected("a combination of inequalities has a negative weight")
            part, possible = self._part(leaves)
            sums = [
                [list(zip(self.unsafe.regions[r], m, strict=False))]
                for r, m in zip(leaves.region, mu.tolist(), strict=True)
            ]
            rows = np.flatnonzero(possible)
            if (bad := self._first_open(part, sums, given, rows)) is not None:
                raise Rejected(
                    f"entry {entries[bad]} of its tree is not closed: its bound is not negative"
                )
            self.leaves += len(entries)

    def _first_open(
        self, part: Part, sums: list[list[Terms]], given: dict[int, Ints], rows: Ints
    ) -> int | None:
        """The first of `rows` whose sum has no negative upper bound."""
        if not len(rows):
            return None
        chosen = {k: m[rows] for k, m in given.items()}
        try:
            bound = self._upper(part.take(rows), [sums[i] for i in rows], chosen)[:, 0]
        except TooLarge:  # one of them may be, and the others not
            if len(rows) == 1:
                return int(rows[0])
            found = (self._first_open(part, sums, given, rows[i : i + 1]) for i in range(len(rows)))
            return next((row for row in found if row is not None), None)
        return int(rows[(bound >= 0).argmax()]) if (bound >= 0).any() else None


def _magnitude(inequality: Inequality) -> int:
    """The largest magnitude of its coefficients and its constant."""
    return max(abs(c) for c in (inequality.constant, *(c for _, _, c in inequality.terms)))


def _columns_of(numbers: dict[int, Ints], columns: slice) -> dict[int, Ints]:
    """Some columns of every array."""
    return {k: array[:, columns] for k, array in numbers.items()}


def _split(rows: Ints, columns: dict[int, int]) -> dict[int, Ints]:
    """Rows of multipliers, node by node: [N, 1, size]."""
    stops = np.cumsum(list(columns.values()))
    return (
        dict(zip(columns, np.split(rows[:, None], stops[:-1], axis=2), strict=True))
        if columns
        else {}
    )
