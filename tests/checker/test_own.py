"""The checker accepts every certificate that the solver writes: random networks and queries, all
options, also where floats guide the search badly."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qverify.certificate import certificate
from qverify.checker.archive import Archive
from qverify.checker.proof import Proof as Checked
from qverify.deadline import Deadline
from qverify.kernels import Kernels
from qverify.network import Network
from qverify.options import Options
from qverify.result import Result, Stats, Verdict
from qverify.search import bab
from qverify.search.bab import search
from qverify.search.proof import Proof
from tests.graphs import ROUNDS
from tests.networks import CPU, random_network
from tests.search.queries import Asked, asked, shortcut
from tests.search.test_cuts import hobble

CHUNKS, EACH = 6, 60
ABOUT = {
    key: "" for key in ("model_sha256", "spec_sha256", "reading", "semantics", "read_by", "shapes")
}


def proofs_of(
    queries: list[Asked], rng: np.random.Generator, kernels: Kernels = CPU
) -> dict[int, Proof]:
    """A search of each query, with options drawn by lot: its proof. (At a tie of the rows' readings
    there may be none.)"""
    found = {}
    backward, attack = bool(rng.random() < 0.75), bool(rng.random() < 0.5)
    batch = None if rng.random() < 0.5 else int(rng.integers(1, 6))
    for i, question in enumerate(queries):
        problem = question.problem(backward=backward, kernels=kernels, readings=True)
        proof = Proof()
        options = Options(attack=attack, backward=backward, batch=batch)
        outcome = search(problem, options, Deadline.after(600), rng, Stats(), None, proof)
        assert outcome.verdict in (Verdict.UNSAT, Verdict.UNKNOWN)
        if outcome.verdict is Verdict.UNSAT:
            found[i] = proof
    return found


def accept(queries: list[Asked], proofs: list[Proof], path: Path) -> Counter[str]:
    """Write the certificate, and check every query's proof."""
    path.write_bytes(certificate(Result(Verdict.UNSAT, "", None, Stats(), dict(ABOUT)), proofs))
    archive, met = Archive(path), Counter[str]()
    for i, question in enumerate(queries):
        checked = Checked(archive, i, question.lowered, question.query)
        checked.check()
        met.update(leaves=checked.leaves, duals=checked.duals, intermediate=checked.intermediate)
    archive.close()
    return met


def _same(network: Network, _: np.random.Generator) -> Network:
    return network


@pytest.mark.parametrize("chunk", range(CHUNKS * ROUNDS))
def test_own_certificates_are_accepted(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, met = np.random.default_rng([77, chunk]), Counter[str]()
    if chunk % 3:
        hobble(monkeypatch, (1.0, 0.4, 0.0)[chunk % 3])
    while met["queries"] < EACH:
        make = shortcut if rng.random() < 0.2 else functools.partial(random_network, scalars=True)
        first = asked(rng, 400, make)
        queries = [first]
        while len(queries) < 1 + int(rng.integers(3)):  # other queries of the same network
            queries.append(asked(rng, 400, functools.partial(_same, first.network)))
        queries = [question for question in queries if question.expected is Verdict.UNSAT]
        monkeypatch.setattr(bab, "SPLITTABLE", int(rng.choice([0, 12])))
        proofs = proofs_of(queries, rng)
        met += accept([queries[i] for i in proofs], list(proofs.values()), tmp_path / "proof")
        met["queries"] += len(proofs)
    assert met["leaves"] > EACH and (met["duals"] or chunk % 3)
