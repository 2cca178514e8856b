"""The decision procedure of Lechner et al. (AAAI 2023), Algorithm 1, on the same integers.

A stack of boxes, one box at a time: interval bounds; where they refute the property on the box,
drop it; else look for a counterexample in it, and split along the longest axis (the first of
equals) into two halves. The paper looks with PGD; here the box's centre and its two extreme corners
are tried, so this stands for the bounding and splitting alone. The authors' released code differs
from the paper's text (first in, first out; real boxes whose halves share the cut); this is the
text, on integer boxes, whose halves share no point.

`kernels` says on which machine the bounds are computed (NumPy, or CuPy on a GPU), and `batch` how
many boxes are taken off the stack at a time, which the text does not do (it is 1 there): a GPU is
slower than a CPU on one small box.
"""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from benchmarks.peers.decide import Answer, Instance, is_unsafe
from benchmarks.peers.encoding import CPU
from qverify.boundary.domain import make_domain
from qverify.kernels import Kernels
from qverify.network import Network
from qverify.property import Query, Row

Float64Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int32]


def decide(instance: Instance, timeout: float, kernels: Kernels = CPU, batch: int = 1) -> Answer:
    """sat, unsat, timeout, or unsupported, within `timeout` seconds."""
    end = time.monotonic() + timeout
    if not (instance.network.exact and instance.decoder.exact):
        return Answer("unsupported", "float sums in an order that is not known")
    boxes, network = 0, instance.network.on(kernels)
    for query in instance.property.queries:
        if any(row.x for case in query.cases for row in case):
            return Answer("unsupported", "a condition on inputs and outputs")
        answer, tried = _decide_query(instance, query, end, network, kernels, batch)
        boxes += tried
        if answer.verdict != "unsat":
            return answer
    return Answer("unsat", f"{boxes} boxes")


def _decide_query(
    instance: Instance, query: Query, end: float, network: Network, kernels: Kernels, batch: int
) -> tuple[Answer, int]:
    domain, decode = make_domain(instance.encoder, query.box), instance.decoder.decode_box
    rows = _Rows(query, instance.decoder.size)
    stack: list[tuple[Codes, Codes]] = [domain.code_box()]
    boxes = 0
    while stack:
        if time.monotonic() > end:
            return Answer("timeout", f"{boxes} boxes"), boxes
        taken = [stack.pop() for _ in range(min(batch, len(stack)))]
        boxes += len(taken)
        lower, upper = (np.stack(ends) for ends in zip(*taken, strict=True))
        ends = network.intervals(kernels, kernels.asarray(lower), kernels.asarray(upper))
        left = ~rows.refuted(*decode(*(kernels.to_host(z) for z in ends)))
        lower, upper = lower[left], upper[left]
        if not len(lower):
            continue
        points = np.concatenate([(lower + upper) // 2, lower, upper])
        y = instance.decoder.decode(kernels.to_host(network.run(kernels, kernels.asarray(points))))
        for codes in points[~rows.refuted(y, y)]:
            if is_unsafe(instance, query, codes) and domain.lift(codes) is not None:
                return Answer("sat", f"{boxes} boxes", tuple(codes.tolist())), boxes
        axis, at = (upper - lower).argmax(axis=1), np.arange(len(lower))
        middle = (lower[at, axis] + upper[at, axis]) // 2
        left_upper, right_lower = upper.copy(), lower.copy()
        left_upper[at, axis], right_lower[at, axis] = middle, middle + 1
        # a single code vector: unsafe codes that no input in the box has
        wide = upper[at, axis] > lower[at, axis]
        for k in np.flatnonzero(wide):
            stack += [(lower[k], left_upper[k]), (right_lower[k], upper[k])]
    return Answer("unsat"), boxes


class _Rows:
    """The rows of a query, for many boxes at once."""

    def __init__(self, query: Query, outputs: int) -> None:
        self._cases, self._all = query.cases, [row for case in query.cases for row in case]
        weight = np.zeros((len(self._all), outputs))
        for row, coefficients in zip(self._all, weight, strict=True):
            for j, c in row.y:
                coefficients[j] += float(c)
        self._positive, self._negative = np.maximum(weight, 0).T, np.minimum(weight, 0).T
        self._rhs = np.array([float(row.rhs) for row in self._all])

    def refuted(self, lower: Float64Array, upper: Float64Array) -> npt.NDArray[np.bool_]:
        """Whether every case has a row that fails everywhere between two output vectors [N,
        outputs]: [N]."""
        least = lower @ self._positive + upper @ self._negative
        size = np.maximum(np.abs(lower), np.abs(upper)) @ (self._positive - self._negative)
        doubt = 2.0**-40 * (size + np.abs(self._rhs)) + 1e-300
        fails = least - self._rhs > doubt
        for i, k in zip(*np.nonzero(np.abs(least - self._rhs) <= doubt), strict=True):
            fails[i, k] = _refuted(self._all[k], lower[i], upper[i])
        result, start = np.ones(len(lower), np.bool_), 0
        for case in self._cases:
            result &= fails[:, start : start + len(case)].any(axis=1)
            start += len(case)
        return result


def _refuted(row: Row, lower: Float64Array, upper: Float64Array) -> bool:
    """Whether the row fails everywhere between two output vectors: in float64 where that is clear,
    else exactly."""
    ends = [(c, float(lower[j] if c > 0 else upper[j])) for j, c in row.y]
    products = [float(c) * v for c, v in ends]
    least, rhs = sum(products), float(row.rhs)
    doubt = 2.0**-40 * (sum(map(abs, products)) + abs(rhs)) + 1e-300
    if abs(least - rhs) > doubt:
        return least > rhs
    exact = sum((c * Fraction(v) for c, v in ends), Fraction(0))
    return exact >= row.rhs if row.strict else exact > row.rhs
