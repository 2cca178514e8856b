"""How much memory a search may plan with.

What a machine's caches or its memory hold is said by its `Kernels`; here it is applied to boxes,
subproblems and what waits. No budget changes what is proved.
"""

from __future__ import annotations

from collections.abc import Iterator

from qverify.kernels import Kernels
from qverify.network import Network
from qverify.search.frontier import Frontier, OpenBoxes, Subproblems
from qverify.search.knowledge import Knowledge

FRONTIER_BYTES = 4 << 30  # of open boxes in the host's memory


def box_batch(kernels: Kernels, network: Network) -> int:
    """How many boxes intervals bound at once."""
    return kernels.batch(kernels.box_budget, network.elements_per_point())


def subproblem_batch(kernels: Kernels, network: Network) -> int:
    """How many subproblems with cuts are bounded at once."""
    return kernels.batch(kernels.cut_budget, sum(node.type.size for node in network.nodes))


def backward_parts(known: Knowledge, count: int) -> Iterator[slice]:
    """`count` boxes in parts whose multipliers, for every inequality, fit the machine's chunks."""
    relaxed, problem = known.relaxed(), known.problem
    inequalities = 1 if relaxed is None else max(1, len(relaxed.regions.inequalities))
    each = 8 * inequalities * problem.network.widest
    step = max(1, problem.kernels.chunk_bytes // each)
    return (slice(start, start + step) for start in range(0, count, step))


def cut_frontier(kernels: Kernels) -> Frontier[Subproblems]:
    """A frontier for subproblems of a search by cuts."""
    return Frontier(kernels, kernels.resident_bytes())


def box_frontier(kernels: Kernels, codes: int, itemsize: int) -> Frontier[OpenBoxes]:
    """A frontier for boxes of `codes` codes, held in so many bytes each."""
    resident = kernels.resident_bytes()
    each = 2 * itemsize * max(codes, 1)
    return Frontier(kernels, resident, max(64, (FRONTIER_BYTES + (resident or 0)) // each))
