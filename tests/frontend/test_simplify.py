"""The simplified network gives the same output integers, for every input; and it is simplified
where that is right only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qverify.frontend import simplify
from qverify.frontend.simplify import simplified
from qverify.network import Network
from qverify.ops import Conv, Dense, FloatProgram, Layout, Requantize, Table
from tests.graphs import ROUNDS
from tests.networks import CPU, Maker, all_points, random_network

Rng = np.random.Generator


def same(network: Network, rng: Rng, most: int = 4096) -> Network:
    """The simplified network, after a comparison of all outputs on all inputs (or on `most` of
    them)."""
    result, number = simplified(network)
    result.validate()
    size, high = network.input_type.size, network.input_type.high
    if (high + 1) ** size <= most:
        x = all_points(np.zeros(size, int), np.full(size, high))
    else:
        x = rng.integers(0, high + 1, (most, size)).astype(np.int32)
    np.testing.assert_array_equal(result.run(CPU, x), network.run(CPU, x))
    assert len(number) == len(network.nodes) + 1
    assert tuple(number[i] for i in network.outputs) == result.outputs
    assert [result.type_of(i).shape for i in result.outputs] == [
        network.type_of(i).shape for i in network.outputs
    ]
    values = result.values(CPU, x)
    for k, value in enumerate(values):  # a narrower range is still the value's own
        assert result.type_of(k).low <= value.min() and value.max() <= result.type_of(k).high
    assert len(result.nodes) <= len(network.nodes) + 2 * sum(
        isinstance(n.op, Conv) for n in network.nodes
    )
    return result


def count(network: Network, kind: type) -> int:
    return sum(isinstance(node.op, kind) for node in network.nodes)


def test_random_networks_keep_every_output() -> None:
    shorter = 0
    for seed in range(150 * ROUNDS):
        rng = np.random.default_rng([1, seed])
        network = random_network(rng, inputs=int(rng.integers(1, 5)), layers=5)
        shorter += len(same(network, rng, 600).nodes) < len(network.nodes)
    assert shorter > 50 * ROUNDS


def test_a_simplified_network_stays_as_it_is() -> None:
    for seed in range(40 * ROUNDS):
        rng = np.random.default_rng([1, seed])
        once, _ = simplified(random_network(rng, layers=5))
        twice, number = simplified(once)
        if len(twice.nodes) == len(once.nodes):
            assert number == list(range(len(once.nodes) + 1))
        assert len(twice.nodes) <= len(once.nodes)


def test_a_convolution_of_one_position_is_dense() -> None:
    """Any rank, stride, padding and dilation; inputs of several channels; more than one image."""
    changed = 0
    for seed in range(200 * ROUNDS):
        rng = np.random.default_rng([2, seed])
        rank, channels, batch = (
            int(rng.integers(1, 4)),
            int(rng.integers(1, 4)),
            int(rng.choice([1, 1, 2])),
        )
        spatial = tuple(int(v) for v in rng.integers(1, 4, rank))
        kernel = tuple(int(v) for v in rng.integers(1, 4, rank))
        dilations = tuple(int(v) for v in rng.integers(1, 4, rank))
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        before = [int(rng.integers(0, 3)) for _ in range(rank)]
        after = [
            max(0, r - n - p) + int(rng.integers(0, 2))
            for r, n, p in zip(reach, spatial, before, strict=True)
        ]
        strides = [n + p + q for n, p, q in zip(spatial, before, after, strict=True)]
        if rng.random() < 0.3:
            strides = [int(rng.integers(1, 3)) for _ in range(rank)]
        maker = Maker(rng, batch * channels * int(np.prod(spatial)), 255)
        x = maker.move(0, (batch, channels, *spatial))
        filters, pad = int(rng.integers(1, 4)), int(rng.integers(-9, 300))
        groups = channels if rng.random() < 0.1 else 1
        weight = rng.integers(-99, 100, (filters * groups, channels // groups, *kernel))
        bias = rng.integers(-5000, 5000, filters * groups)
        window = (tuple(strides), (*before, *after), dilations)
        x = maker.add(Conv(weight, bias, *window, groups, pad, min(0, pad), max(255, pad)), x)
        one = set(maker.type(x).shape[2:]) == {1}
        if rng.random() < 0.5:
            x = maker.requantize(x, channels=False)
        result = same(maker.network(x), rng, 60)
        assert count(result, Conv) == (0 if one and groups == 1 else 1)
        assert count(result, Dense) == 1 - count(result, Conv)
        changed += count(result, Dense)
    assert 80 * ROUNDS < changed < 190 * ROUNDS


def clipped(
    rng: Rng, table: Any, moved: bool = True, signed: bool = False, uses: str = "one"
) -> Network:
    """Dense, requantization to 3 bits, perhaps moves, and a table of it; used as `uses` says."""
    maker = Maker(rng, 3, 7)
    low = -4 if signed else 0
    scale = rng.uniform(0.05, 0.3)
    op = Requantize(
        FloatProgram().then("mul", scale),
        np.asarray(rng.integers(low, low + 8), np.int32),
        low,
        low + 7,
    )
    q = x = maker.add(op, maker.dense(0, 4))
    if moved:
        x = maker.move(maker.shuffle(maker.move(x, (2, 2))), (2, 2))
    y = maker.add(Table(np.asarray([table], np.int32), low), x)
    if uses == "twice":
        return maker.network(maker.two(maker.flat(y), q))
    return maker.network(*{"one": (y,), "output": (y, q), "moved": (y, x)}[uses])


def test_a_clip_is_merged_into_the_requantization() -> None:
    for seed in range(100 * ROUNDS):
        rng = np.random.default_rng([3, seed])
        signed = bool(rng.integers(2))
        codes = np.arange(8) - (4 if signed else 0)
        a, b = np.sort(rng.choice(codes, 2))
        network = clipped(rng, np.clip(codes, a, b), bool(rng.integers(2)), signed)
        result = same(network, rng, 600)
        assert count(result, Table) == 0 and count(result, Requantize) == 1
        (clip,) = (node for node in result.nodes if isinstance(node.op, Requantize))
        assert (clip.type.low, clip.type.high) == (a, b)


@pytest.mark.parametrize("uses", ["output", "twice", "moved"])
def test_a_clip_stays_where_the_codes_have_other_uses(uses: str) -> None:
    for seed in range(20 * ROUNDS):
        rng = np.random.default_rng([4, seed])
        network = clipped(rng, np.clip(np.arange(8), 2, 5), moved=uses == "moved", uses=uses)
        result = same(network, rng, 600)
        assert count(result, Table) == 1
        (clip,) = (node for node in result.nodes if isinstance(node.op, Requantize))
        assert (clip.type.low, clip.type.high) == (0, 7)


def test_a_table_that_is_no_clip_stays() -> None:
    clips = {tuple(np.clip(np.arange(8), a, b)) for a in range(8) for b in range(a, 8)}
    stayed = 0
    for seed in range(100 * ROUNDS):
        rng = np.random.default_rng([5, seed])
        table = np.clip(np.arange(8), 1, 6)
        table[rng.integers(8)] += rng.integers(-1, 2)
        if rng.random() < 0.3:
            table = np.clip(np.arange(8) + rng.integers(-2, 3), 0, 7)
        if rng.random() < 0.1:
            table = np.full(8, rng.integers(-3, 12))
        result = same(clipped(rng, table), rng, 600)
        assert count(result, Table) == (tuple(table) not in clips)
        stayed += count(result, Table)
    assert stayed > 30 * ROUNDS


def test_a_table_for_each_channel_stays() -> None:
    rng = np.random.default_rng(6)
    maker = Maker(rng, 3)
    x = maker.requantize(maker.dense(0, 2), channels=False)
    t = maker.type(x)
    codes = np.arange(t.low, t.high + 1)
    rows = np.stack([np.clip(codes, t.low, 1), np.clip(codes, t.low, 2)]).astype(np.int32)
    x = maker.add(Table(rows, t.low, np.array([0, 1])), x)
    assert count(same(maker.network(x), rng), Table) == 1


def test_two_clips_in_a_row_and_one_of_the_inputs() -> None:
    rng = np.random.default_rng(7)
    maker = Maker(rng, 3)
    x = maker.clip(0)  # of codes that no requantization made
    x = maker.requantize(maker.dense(x, 2))
    x = maker.clip(maker.shuffle(maker.clip(x)))
    assert count(same(maker.network(x), rng), Table) >= 1


def test_moves_are_joined_and_those_that_move_nothing_go() -> None:
    for seed in range(60 * ROUNDS):
        rng = np.random.default_rng([8, seed])
        maker = Maker(rng, 4)
        x = 0
        for _ in range(int(rng.integers(1, 6))):
            size = maker.type(x).size
            if rng.random() < 0.4:
                x = maker.move(x, (2, size // 2) if size % 2 == 0 else (1, size))
            else:
                index = rng.integers(0, size, size) if rng.random() < 0.5 else np.arange(size)
                x = maker.move(x, (size,), index)
        result = same(maker.network(x, 0) if rng.random() < 0.3 else maker.network(x), rng, 600)
        assert count(result, Layout) <= 1


def test_nodes_without_use_go() -> None:
    rng = np.random.default_rng(9)
    maker = Maker(rng, 3)
    x = maker.dense(0, 2)
    maker.table(maker.requantize(maker.dense(0, 3)))
    assert [type(node.op) for node in same(maker.network(x), rng).nodes] == [Dense]


def test_merging_a_clip_of_codes_with_other_uses_is_caught_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = simplify._clipped

    def wrong(network: Network, k: int, uses: Any) -> Any:
        return right(network, k, np.minimum(uses, 1))

    monkeypatch.setattr(simplify, "_clipped", wrong)
    with pytest.raises(AssertionError):
        test_a_clip_stays_where_the_codes_have_other_uses("output")
