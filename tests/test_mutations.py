"""A few mutations of certificates, models and properties (`benchmarks/hostile/mutations.py` makes
thousands)."""

from __future__ import annotations

import platform
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from benchmarks.hostile import mutate_specs
from benchmarks.hostile.mutation_bases import Base, curved, make_base
from benchmarks.hostile.mutations import KINDS, judged
from tests.graphs import ROUNDS

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the formulas are those of x86-64"
)
EACH = 15


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    found = make_base(
        "curved", curved, np.random.default_rng([1, 3]), tmp_path_factory.mktemp("bases")
    )
    assert found is not None and len(found.proofs) == 2
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_mutation_is_accepted_wrongly_or_crashes(kind: str, base: Base, tmp_path: Path) -> None:
    outcomes = Counter[str]()
    for k in range(EACH * ROUNDS):
        outcome, text = judged(
            kind, base, np.random.default_rng([5, KINDS.index(kind), k]), tmp_path
        )
        assert outcome not in ("wrong", "crashed"), (k, text)
        outcomes[outcome] += 1
    assert kind != "forged" or not outcomes["accepted"]
    assert outcomes["rejected"] + outcomes["errors"] and len(outcomes) > 1


def test_the_other_reader_of_properties() -> None:
    text = b"; a comment\n(declare-const X_0 Real)(declare-const Y_0 Real)"
    text += b"(assert (or (<= X_0 0.5) (not (< Y_0 (- X_0)))))"
    asserts, names = mutate_specs.parsed(text)
    assert names == {"X_0", "Y_0"} and len(asserts) == 1
    points = ((0.5, -9, True), (1, -1, True), (1, -1.5, False))
    for x, y, unsafe in points:
        values = {"X_0": Fraction(x), "Y_0": Fraction(y)}
        assert mutate_specs.truth(asserts[0], values) is unsafe
    for bad in (b"(assert", b"assert)", b"(assert (<= X_0))", b"(foo)", b"\xff"):
        with pytest.raises(mutate_specs.Unclear):
            [mutate_specs.truth(tree, {}) for tree in mutate_specs.parsed(bad)[0]]
