"""Random queries over small integer networks, without any ONNX file, and what running every code
vector says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Any

import numpy as np

from qverify.boundary.domain import make_domain
from qverify.boundary.outputs import described_outputs, make_decoder
from qverify.boundary.readings import make_readings
from qverify.bounds.dual import Dual
from qverify.bounds.unsafe import make_unsafe
from qverify.deadline import Deadline
from qverify.frontend.builder import Identity
from qverify.frontend.encoder import Encoder
from qverify.frontend.lower import Lowered
from qverify.frontend.tensors import Codes
from qverify.kernels import Kernels
from qverify.network import Network
from qverify.ops import Dense, FloatProgram, Layout, Requantize
from qverify.options import Options
from qverify.property import Box, Case, Query, Row
from qverify.result import Stats, Verdict
from qverify.search.bab import search
from qverify.search.problem import Problem
from qverify.search.proof import Proof
from qverify.search.run import Outcome
from qverify.search.watch import Watch
from tests.networks import CPU, Maker, all_points, random_network

Rng = np.random.Generator
DENOMINATOR = 12  # of all numbers in a row


@dataclass
class Asked:
    """A query over a network, every code vector of its box, and which of them are unsafe."""

    network: Network
    query: Query
    points: Any  # [N, codes]
    unsafe: Any  # [N]

    @property
    def expected(self) -> Verdict:
        return Verdict.SAT if self.unsafe.any() else Verdict.UNSAT

    def watched(self, rng: Rng) -> Any:
        """A point: an unsafe one where there is one."""
        return rng.choice(self.points[self.unsafe] if self.unsafe.any() else self.points)

    @property
    def lowered(self) -> Lowered:
        """The network as if a file had been read: its inputs are its codes."""
        size, own = self.network.input_type.size, self.network.input_type
        encoders = (Identity(np.arange(size), own.low, own.high),)
        types = [self.network.type_of(v) for v in self.network.outputs]
        kind = np.dtype(np.int32)
        outputs = tuple(
            (f"y{i}", Codes(v, t, kind))
            for i, (v, t) in enumerate(zip(self.network.outputs, types, strict=True))
        )
        return Lowered(self.network, (("x", (size,), np.dtype(np.uint8)),), encoders, outputs, ())

    def problem(
        self,
        kernels: Kernels = CPU,
        backward: bool = True,
        readings: bool = False,
    ) -> Problem:
        lowered, size = self.lowered, self.network.input_type.size
        decoder = make_decoder(lowered)
        domain = make_domain(Encoder(lowered.encoders, np.zeros(size, np.bool_)), self.query.box)
        lower, upper = domain.code_box()
        read = make_readings(self.query, domain, decoder)
        # As the engine does; a tie of the readings leaves an exact answer open.
        differ = readings and read.certain is not read.possible
        possible = read.possible if readings else self.query
        return Problem(
            kernels,
            self.network.on(kernels),
            domain,
            decoder,
            make_unsafe(possible, size, decoder.grid),
            lower,
            upper,
            dual=Dual.make(self.network, kernels) if backward else None,
            described=described_outputs(lowered),
            readings=read if differ else None,
            certain=make_unsafe(read.certain, size, decoder.grid) if differ else None,
        )

    def watch(self, problem: Problem, point: Any) -> Watch | None:
        """A point that the search of the problem may not lose."""
        if point is None:
            return None
        watch = Watch.make(
            problem.kernels,
            problem.network,
            problem.domain,
            problem.decoder,
            problem.unsafe,
            None,
            point.astype(np.float64),
        )
        assert watch is not None
        assert watch.holds.any() == self.unsafe[(self.points == point).all(axis=1)][0]
        return watch

    def searched(
        self, watch: Any = None, proof: Proof | None = None, kernels: Kernels = CPU
    ) -> Outcome:
        """How the search ends, without the attack; SoundnessError where the watched point is
        lost."""
        problem, stats = self.problem(kernels), Stats()
        watched = self.watch(problem, watch)
        outcome = search(
            problem,
            Options(attack=False),
            Deadline.after(60),
            np.random.default_rng(0),
            stats,
            None,
            proof,
            watched,
        )
        if watched is not None and outcome.verdict is Verdict.UNSAT:
            watched.unsat()
        return outcome


def shortcut(rng: Rng) -> Network:
    """One input code, a staircase of it, and what lies between the two: how even the steps are
    matters to the last unit."""
    maker, width = Maker(rng, 1, int(rng.integers(20, 120))), rng.uniform(2, 9)
    steps = maker.add(
        Requantize(FloatProgram().then("mul", 1 / width), np.asarray(0, np.int32), 0, 15), 0
    )
    both = maker.add(Layout((2,), np.arange(2)), steps, 0)
    times = rng.choice([-7, -2, -1, 1, 3], 2)
    weight = np.stack([np.rint(times * width).astype(np.int64), -times])
    return maker.network(maker.add(Dense(weight, np.zeros(2, np.int64), 0, maker.input.high), both))


def asked(rng: Rng, most: int = 600, make: Callable[[Rng], Network] = random_network) -> Asked:
    """A random query. Its rows are often just true of one point, or of none."""
    while True:
        network = make(rng)
        size, high = network.input_type.size, network.input_type.high
        lower, upper = np.sort(rng.integers(0, high + 1, (2, size)), axis=0)
        if rng.random() < 0.5:
            lower, upper = np.zeros(size, np.int64), np.full(size, high)
        if int(np.prod(upper - lower + 1)) > most or not (upper > lower).any():
            continue
        points = all_points(lower, upper)
        y = network.run(CPU, points).astype(np.int64)
        cases = tuple(case(rng, y) for _ in range(int(rng.integers(1, 3))))
        unsafe = np.any([np.all([holds(row, y) for row in rows], axis=0) for rows in cases], axis=0)
        box = Box(tuple(Fraction(int(v)) for v in lower), tuple(Fraction(int(v)) for v in upper))
        return Asked(network, Query(box, cases), points, unsafe)


def holds(row: Row, y: Any) -> Any:
    """Whether a row holds at outputs [N, outputs]: [N]."""
    total = sum((int(c * DENOMINATOR) * y[:, j] for j, c in row.y), np.zeros(len(y), np.int64))
    rhs = row.rhs * DENOMINATOR
    return total < ceil(rhs) if row.strict else total <= floor(rhs)


def case(rng: Rng, y: Any) -> Case:
    """One or two rows over one to three outputs."""
    rows = []
    for _ in range(int(rng.integers(1, 3))):
        chosen = rng.permutation(y.shape[1])[: rng.integers(1, 4)].tolist()
        plain = rng.random() < 0.5
        sizes = [
            Fraction(
                int(rng.choice([-1, 1]) if plain else rng.choice([-5, -2, 1, 3])), 1 if plain else 3
            )
            for _ in chosen
        ]
        if plain and len(chosen) == 2:
            sizes[1] = -sizes[0]
        terms = tuple(zip(chosen, sizes, strict=True))
        total = sum((int(c * DENOMINATOR) * y[:, j] for j, c in terms), np.zeros(len(y), np.int64))
        low = int(rng.choice(np.sort(total)[: max(1, len(total) // 20)]))  # few points are as low
        rhs = Fraction(low, DENOMINATOR) + (
            Fraction(int(rng.integers(-3, 2)), 6) if rng.random() < 0.4 else 0
        )
        rows.append(Row((), terms, rhs, bool(rng.random() < 0.5)))
    return tuple(rows)
