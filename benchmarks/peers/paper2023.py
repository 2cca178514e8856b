"""The decision procedure of Lechner et al. (AAAI 2023), Algorithm 1, on the same integers.

A stack of boxes, one box at a time: interval bounds; where they refute the property on the box, drop it; else look for a
counterexample in it, and split along the longest axis (the first of equals) into two halves. The paper looks with PGD;
here the box's centre and its two extreme corners are tried, so this stands for the bounding and splitting alone. The
authors' released code differs from the paper's text (first in, first out; real boxes whose halves share the cut); this
is the text, on integer boxes, whose halves share no point.

`kernels` says on which machine the bounds are computed (NumPy, or CuPy on a GPU), and `batch` how many boxes are taken off
the stack at a time, which the text does not do (it is 1 there): a GPU is slower than a CPU on one small box.
"""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from benchmarks.peers.decide import Answer, Instance, is_unsafe
from benchmarks.peers.encoding import CPU
from qverify.frontend.boundary import make_domain
from qverify.kernels import Kernels
from qverify.network import Network
from qverify.property import Query, Row

Float64Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int32]


def decide(instance: Instance, timeout: float, kernels: Kernels = CPU, batch: int = 1) -> Answer:
    """sat, unsat, timeout, or unsupported, within `timeout` seconds."""
    end = time.monotonic() + timeout
    if not instance.decoder.exact:
        return Answer("unsupported", "a float product as the last op")
    boxes, network = 0, instance.network.on(kernels)
    for query in instance.property.queries:
        if any(row.x for case in query.cases for row in case):
            return Answer("unsupported", "a condition on inputs and outputs")
        answer, own = _decide_query(instance, query, end, network, kernels, batch)
        boxes += own
        if answer.verdict != "unsat":
            return answer
    return Answer("unsat", f"{boxes} boxes")


def _decide_query(
    instance: Instance, query: Query, end: float, network: Network, kernels: Kernels, batch: int
) -> tuple[Answer, int]:
    domain = make_domain(instance.encoder, query.box)
    stack: list[tuple[Codes, Codes]] = [domain.code_box()]
    boxes = 0
    while stack:
        if time.monotonic() > end:
            return Answer("timeout", f"{boxes} boxes"), boxes
        taken = [stack.pop() for _ in range(min(batch, len(stack)))]
        boxes += len(taken)
        ends = (kernels.asarray(np.stack(own)) for own in zip(*taken, strict=True))
        y = instance.decoder.decode_box(*(kernels.to_host(z) for z in network.intervals(kernels, *ends)))
        for (lower, upper), least, most in zip(taken, *y, strict=True):
            if all(any(_refuted(row, least, most) for row in case) for case in query.cases):
                continue
            for codes in np.unique(np.stack([(lower + upper) // 2, lower, upper]), axis=0):
                if is_unsafe(instance, query, codes) and domain.lift(codes) is not None:
                    return Answer("sat", f"{boxes} boxes", tuple(codes.tolist())), boxes
            axis = int((upper - lower).argmax())
            if upper[axis] == lower[axis]:
                continue  # one code vector: unsafe codes that no input in the box has
            middle = (lower[axis] + upper[axis]) // 2
            left, right = upper.copy(), lower.copy()
            left[axis], right[axis] = middle, middle + 1
            stack += [(lower, left), (right, upper)]
    return Answer("unsat"), boxes


def _refuted(row: Row, lower: Float64Array, upper: Float64Array) -> bool:
    """Whether the row fails everywhere between two output vectors: in float64 where that is clear, else exactly."""
    ends = [(c, float(lower[j] if c > 0 else upper[j])) for j, c in row.y]
    products = [float(c) * v for c, v in ends]
    least, rhs = sum(products), float(row.rhs)
    doubt = 2.0**-40 * (sum(map(abs, products)) + abs(rhs)) + 1e-300
    if abs(least - rhs) > doubt:
        return least > rhs
    exact = sum((c * Fraction(v) for c, v in ends), Fraction(0))
    return exact >= row.rhs if row.strict else exact > row.rhs
