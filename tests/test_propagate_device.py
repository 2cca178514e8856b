"""A network's bounds by the CUDA kernels: those of `Network.intervals` bit for bit, or not used.

Everywhere: the kernels on a CPU shim (tests/kernels/shim), the rest on the strict machine, which
keeps host and device apart as CuPy does. On an NVIDIA GPU (`-m gpu`): the same, on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import Options, Verdict, propagate, runtime, verify
from qverify.errors import DeviceError, SoundnessError
from qverify.frontend.model import read_model
from qverify.kernels import Kernels, gpu, open_kernels
from qverify.kernels.fused import Fused
from qverify.kernels.packing import Variant
from qverify.network import Network
from qverify.ops import Conv, Dense, FloatProgram, Layout, Max, Pairwise, Requantize, Table
from qverify.propagate import Propagator, device, device_rules, make_propagator
from qverify.propagate.device import Plan
from qverify.propagate.plan import make_plan
from tests.graphs import ROUNDS
from tests.kernels.shim.build import Module
from tests.kernels.strict import open_strict
from tests.kernels.test_fused import FakeDevice
from tests.networks import CPU, Maker, Rng, boxes, one_op, random_network
from tests.ops.cases import CASES, Case

EXAMPLES = sorted((Path(__file__).parents[1] / "specs" / "examples" / "onnx").glob("*.onnx"))


def on_shim(variant: Variant) -> Fused:
    return Fused(replace(open_strict(), xp=FakeDevice()), variant, Module(variant, seeds=(2,)))


@functools.cache
def on_gpu() -> Fused:
    """The GPU's kernels; without one the test is skipped, with the reason."""
    try:
        return device.opened(open_kernels("cuda"))
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[*Variant, pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
def fused(request: pytest.FixtureRequest) -> Iterator[Fused]:
    yield on_gpu() if request.param == "cuda" else on_shim(request.param)


@pytest.fixture(params=[Variant.SPARSE, pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
def one(request: pytest.FixtureRequest) -> Iterator[Fused]:
    """One variant: where another would show nothing new."""
    yield on_gpu() if request.param == "cuda" else on_shim(request.param)


@pytest.fixture
def opened(one: Fused, monkeypatch: pytest.MonkeyPatch) -> Fused:
    """What a propagator finds open."""
    monkeypatch.setattr(device, "_OPENED", [(one.kernels.xp, one)])
    return one


def planned(network: Network, fused: Fused, rng: Rng, counts: tuple[int, ...] = (24, 1)) -> Plan:
    """Compare a plan's bounds; the plan."""
    kernels = fused.kernels
    plan = make_plan(network.on(kernels), fused)
    for count in counts:
        lower, upper = (end[:count] for end in boxes(rng, network.input_type))
        expected = network.intervals(CPU, lower, upper)
        found = plan.run(kernels.asarray(lower), kernels.asarray(upper))
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == np.int32
            np.testing.assert_array_equal(a, kernels.to_host(b))
    return plan


def ordinary_network(rng: Rng, widths: tuple[int, ...] = (24, 6), inputs: int = 40) -> Network:
    maker = Maker(rng, inputs, 255)
    x = 0
    for width in widths:
        x = maker.requantize(maker.dense(x, width), channels=False)
    return maker.network(x)


def scaled(maker: Maker, x: int, channels: bool = False, low: int = 0) -> int:
    """Rounded to 8 bits by positive factors."""
    kind = maker.type(x)
    shape = (kind.shape[1], *[1] * len(kind.shape[2:])) if channels else ()
    factor = maker.rng.uniform(100, 900, shape) / kind.count
    return maker.add(
        Requantize(FloatProgram().then("mul", factor), np.array(low + 9, np.int32), low, low + 255),
        x,
    )


# -- dense layers ----------------------------------------------------------------------------------


def test_a_small_network_is_one_launch(fused: Fused) -> None:
    rng = np.random.default_rng(0)
    maker = Maker(rng, 60, 255)
    x = scaled(maker, maker.dense(scaled(maker, maker.dense(0, 33), low=-128), 20), low=-100)
    plan = planned(maker.network(maker.dense(x, 5)), fused, rng)
    assert plan.launches() == ["network of 3"]


def test_large_layers_run_one_by_one_before_small_ones(one: Fused) -> None:
    rng = np.random.default_rng(1)
    maker = Maker(rng, 20, 255)
    x = scaled(maker, maker.dense(0, 130))
    x = scaled(maker, maker.dense(scaled(maker, maker.dense(x, 30)), 12))
    plan = planned(maker.network(x), one, rng)
    assert plan.launches() == ["dense", "network of 2"]


def test_a_value_read_twice_ends_a_launch(one: Fused) -> None:
    rng = np.random.default_rng(2)
    maker = Maker(rng, 20, 255)
    x = scaled(maker, maker.dense(0, 30))
    y = scaled(maker, maker.dense(x, 9))
    plan = planned(maker.network(y, x), one, rng)
    assert plan.launches() == ["dense", "dense"]


def test_any_rounding_that_rises_is_fused(fused: Fused) -> None:
    """Several steps, factors of zero, zero points of channels: by thresholds."""
    rng = np.random.default_rng(3)
    maker = Maker(rng, 30, 255)
    x = maker.dense(0, 12)
    count = maker.type(x).count
    program = (
        FloatProgram().then("mul", 700 / count).then("add", rng.normal(size=12)).then("max", 0.3)
    )
    x = maker.add(Requantize(program, rng.integers(-9, 9, 12).astype(np.int32), -20, 40), x)
    x = maker.dense(x, 7)
    factor = 700 / maker.type(x).count * (np.arange(7) % 3)
    x = maker.add(
        Requantize(FloatProgram().then("mul", factor), np.array(3, np.int32), -128, 127), x
    )
    assert planned(maker.network(x), fused, rng).launches() == ["dense", "dense"]


def test_a_rounding_that_falls_is_left_to_the_op(one: Fused) -> None:
    rng = np.random.default_rng(4)
    maker = Maker(rng, 30, 255)
    x = maker.dense(0, 12)
    factor = 700 / maker.type(x).count * (np.arange(12) % 2 * 2 - 1)
    x = maker.add(
        Requantize(FloatProgram().then("mul", factor), np.array(3, np.int32), -128, 127), x
    )
    plan = planned(maker.network(maker.dense(x, 3)), one, rng)
    assert plan.launches() == ["dense", "dense"] and len(plan.steps) > 4


def test_weights_beyond_a_byte_are_left_to_the_op(one: Fused) -> None:
    rng = np.random.default_rng(5)
    maker = Maker(rng, 10, 255)
    x = scaled(
        maker, maker.add(Dense(rng.integers(-300, 300, (10, 6)), rng.integers(-9, 9, 6), 0, 255), 0)
    )
    plan = planned(maker.network(scaled(maker, maker.dense(x, 4))), one, rng)
    assert plan.launches() == ["dense"]


@pytest.mark.parametrize("low", [-128, 0, 3])
def test_rows_and_lows(low: int, one: Fused) -> None:
    """Several rows of a value, and types that do not begin at zero."""
    rng = np.random.default_rng(low + 128)
    maker = Maker(rng, 36, 252)
    x = maker.add(
        Table(np.arange(low, low + 253, dtype=np.int32)[None], 0), maker.move(0, (2, 3, 6))
    )
    for outer in (11, 5):
        width = maker.type(x).shape[-1]
        weight = rng.integers(-128, 128, (width, outer))
        x = scaled(
            maker, maker.add(Dense(weight, rng.integers(-999, 999, outer), -128, 258), x), low=low
        )
    plan = planned(maker.network(x), one, rng)
    assert plan.launches() == ["dense", "dense"]


def test_elements_that_are_used_twice_move_apart(one: Fused) -> None:
    """x - x is not zero for an interval; a permutation is free."""
    rng = np.random.default_rng(6)
    maker = Maker(rng, 16, 255)
    x = scaled(maker, maker.dense(maker.move(0, (16,), np.arange(16) // 2), 9))
    plan = planned(maker.network(scaled(maker, maker.dense(maker.shuffle(x), 4))), one, rng)
    assert plan.launches() == ["network of 2"]
    assert [step.kernel for step in plan.steps].count(
        ""
    ) == 3  # pairs of the input, repeated ones, ends of the output


# -- all ops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op(case: Case, one: Fused) -> None:
    planned(one_op(case), one, np.random.default_rng(0), (24,))


@pytest.mark.parametrize("seed", range(100 * ROUNDS))
def test_random_networks(seed: int, one: Fused) -> None:
    rng = np.random.default_rng(seed)
    planned(random_network(rng, inputs=int(rng.integers(2, 12)), layers=7), one, rng)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.stem))
def test_examples(path: Path, one: Fused) -> None:
    if path.stem.endswith("qdq") and not runtime.available():
        pytest.skip("a QDQ file needs onnxruntime")
    network = read_model(path).lowered.network
    plan = planned(network, one, np.random.default_rng(0))
    if "cnn" in path.stem:
        assert plan.launches() == ["conv", "conv", "network of 2"]
    else:
        assert plan.launches() == ["network of 2" if "tiny" in path.stem else "network of 3"]


# -- convolutions and functions of codes -----------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2])
def test_convolutions_in_a_row(groups: int, rank: int, fused: Fused) -> None:
    """One factor, and one for each channel; a type that does not begin at zero; the last one
    unrounded."""
    rng = np.random.default_rng(groups + 10 * rank)
    maker = Maker(rng, 2 * 4 * 7**rank, 255)
    x = maker.move(0, (2, 4, *[7] * rank))
    pads, strides, dilations = [1, 0][:rank] + [2, 1][:rank], [2, 1][:rank], [1, 2][:rank]
    for low, filters in ((-128, 12), (3, 8), (0, 4)):
        kind = maker.type(x)
        weight = rng.integers(-128, 128, (filters, kind.shape[1] // groups, *[3, 2][:rank]))
        pad = int(rng.integers(kind.low, kind.high + 1))
        window = tuple(strides), tuple(pads), tuple(dilations)
        x = maker.add(
            Conv(
                weight, rng.integers(-999, 999, filters), *window, groups, pad, kind.low, kind.high
            ),
            x,
        )
        if low:
            x = scaled(maker, x, channels=low == 3, low=low)
    plan = planned(maker.network(x), fused, rng, (24,))
    assert plan.launches() == ["conv"] * 3
    assert len(plan.steps) == 6  # pairs, their order, and the order of the ends at the end


def test_a_residual_network(one: Fused) -> None:
    """Images keep their form through sums, maxima, tables and flattening: pairs are gathered once,
    for the first layer."""
    rng = np.random.default_rng(7)
    maker = Maker(rng, 3 * 8 * 8, 255)

    def conv(x: int, filters: int) -> int:
        weight = rng.integers(-128, 128, (filters, maker.type(x).shape[1], 3, 3))
        op = Conv(weight, rng.integers(-999, 999, filters), (1, 1), (1,) * 4, (1, 1), 1, 7, 0, 255)
        return scaled(maker, maker.add(op, x))

    first = conv(maker.move(0, (1, 3, 8, 8)), 16)
    second = conv(first, 16)
    codes = np.arange(256)
    total = np.rint(0.4 * codes[:, None] + 0.5 * codes[None]).astype(np.int32)
    x = maker.add(Pairwise(total, 0, 0), first, second)
    x = maker.add(Table(np.maximum(codes - 100, 0).astype(np.int32)[None], 0), x)
    size = maker.type(x).size
    windows = np.arange(size).reshape(16, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4)
    x = maker.add(Max(), maker.move(x, (1, 16, 4, 4, 4), windows.reshape(-1)))
    x = scaled(maker, maker.dense(maker.flat(conv(x, 8)), 10))
    plan = planned(maker.network(x), one, rng, (8,))
    assert plan.launches() == ["conv", "conv", "conv", "dense"]
    assert len(plan.steps) == 4 + 2 + 3 + 1  # kernels; pairs and their order; the functions; ends


def test_values_of_several_types_are_joined(one: Fused) -> None:
    rng = np.random.default_rng(8)
    maker = Maker(rng, 12, 100)
    x = scaled(maker, maker.dense(0, 9), low=-100)
    y = maker.add(
        Layout((7,), np.array([3, 21, 0, 14, 20, 22, 2]), np.array([-55, 99], np.int32)), 0, x
    )
    assert maker.type(y).count == 256
    plan = planned(maker.network(scaled(maker, maker.dense(y, 5))), one, rng)
    assert plan.launches() == ["dense", "dense"]


def test_constants_that_no_element_takes(one: Fused) -> None:
    """They widen the type all the same."""
    rng = np.random.default_rng(12)
    maker = Maker(rng, 8, 100)
    y = maker.add(Layout((3,), np.array([5, 0, 2]), np.array([-50], np.int32)), 0)
    planned(maker.network(y, maker.dense(y, 5)), one, rng)


def test_factors_of_other_axes_than_the_channels(one: Fused) -> None:
    """A convolution's rounding by factors of its columns is no channel's, though they be as
    many."""
    rng = np.random.default_rng(13)
    for shape in ((3,), (1, 3), (3, 1), (1, 3, 1), (3, 1, 1)):
        maker = Maker(rng, 3 * 9, 255)
        weight = rng.integers(-99, 99, (3, 3, 1, 1))
        op = Conv(weight, np.zeros(3, np.int64), (1, 1), (0,) * 4, (1, 1), 1, 0, 0, 255)
        x = maker.add(op, maker.move(0, (1, 3, 3, 3)))
        program = FloatProgram().then("mul", rng.uniform(50, 900, shape) / maker.type(x).count)
        plan = planned(
            maker.network(maker.add(Requantize(program, np.array(99, np.int32), 0, 255), x)),
            one,
            rng,
        )
        rounding_is_fused = len(plan.steps) == 4
        assert plan.launches() == ["conv"] and rounding_is_fused == (shape == (3, 1, 1))


def test_accumulators_that_are_an_output(one: Fused) -> None:
    rng = np.random.default_rng(14)
    maker = Maker(rng, 8, 100)
    x = maker.dense(0, 6)
    plan = planned(maker.network(scaled(maker, x), x), one, rng)
    assert plan.launches() == ["dense"]


def test_large_batches_are_cut(one: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    network = ordinary_network(rng)
    monkeypatch.setattr(device, "BUDGET", 5 * planned(network, one, rng).per_box)
    planned(network, one, rng)


# -- the propagator --------------------------------------------------------------------------------


def network_and_boxes(fused: Fused) -> tuple[Network, Any, Any]:
    rng = np.random.default_rng(10)
    maker = Maker(rng, 40, 255)
    network = maker.network(maker.dense(scaled(maker, maker.dense(0, 30)), 6))
    lower, upper = boxes(rng, network.input_type)
    return network, fused.kernels.asarray(lower), fused.kernels.asarray(upper)


def agrees(fast: Propagator, network: Network, kernels: Kernels, lower: Any, upper: Any) -> bool:
    """Whether the propagator's bounds are the defined ones."""
    expected = network.intervals(CPU, kernels.to_host(lower), kernels.to_host(upper))
    found = [kernels.to_host(end) for end in fast.intervals(lower, upper)]
    return all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_propagator_uses_the_kernels_after_some_patience(opened: Fused) -> None:
    network, lower, upper = network_and_boxes(opened)
    kernels = opened.kernels
    fast = Propagator(network.on(kernels), kernels, patience=1e-9)
    assert agrees(fast, network, kernels, lower, upper) and fast.name == "CuPy"
    for _ in range(3):
        assert agrees(fast, network, kernels, lower, upper)
    assert (
        fast.name == f"CUDA kernels, {opened.variant.name.lower()}" and fast.take_warnings() == []
    )


def test_compiling_takes_more_patience_than_planning(
    one: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _, _ = network_and_boxes(one)
    fast = make_propagator(network.on(one.kernels), one.kernels)
    monkeypatch.setattr(device, "_OPENED", [])
    assert fast._enough() == propagate.TO_COMPILE
    monkeypatch.setattr(device, "_OPENED", [(one.kernels.xp, one)])
    assert fast._enough() == propagate.PATIENCE


@pytest.mark.parametrize("failure", [DeviceError, ImportError, OSError, RuntimeError])
def test_without_exact_kernels(failure: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """None is exact, or the compiler is missing: asked once, and then it is the ops' own rules."""
    asked = []

    def fails(kernels: Kernels) -> Fused:
        asked.append(kernels)
        raise failure("no kernels")

    fused = on_shim(Variant.PLAIN)
    kernels = fused.kernels
    monkeypatch.setattr(device, "_OPENED", [])
    monkeypatch.setattr(device, "open_fused", fails)
    network, lower, upper = network_and_boxes(fused)
    for _ in range(2):
        fast = Propagator(network.on(kernels), kernels, patience=0)
        assert (
            agrees(fast, network, kernels, lower, upper)
            and fast.name == "CuPy"
            and fast.take_warnings() == []
        )
    assert len(asked) == 1


def test_opening_compiles_and_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, from nothing open."""
    monkeypatch.setattr(device, "_OPENED", [])
    monkeypatch.setattr("qverify.kernels.fused._seconds", lambda fused, _: -fused.variant)
    kernels = on_shim(Variant.PLAIN).kernels
    network, lower, upper = network_and_boxes(on_shim(Variant.PLAIN))
    fast = Propagator(network.on(kernels), kernels, patience=0)
    assert agrees(fast, network, kernels, lower, upper) and fast.name == "CUDA kernels, dense"


def test_a_network_without_a_weighted_sum_needs_no_plan(opened: Fused) -> None:
    rng = np.random.default_rng(11)
    maker = Maker(rng, 4, 7)
    network = maker.network(maker.clip(0))
    kernels = opened.kernels
    fast = Propagator(network.on(kernels), kernels, patience=0)
    lower, upper = (kernels.asarray(end) for end in boxes(rng, network.input_type))
    assert agrees(fast, network, kernels, lower, upper) and fast.name == "CuPy"


def test_different_bounds_are_refused(opened: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison before the first use, should a plan be wrong."""
    monkeypatch.setattr(
        device_rules,
        "_along",
        lambda values, shape, axis, count: np.broadcast_to(values, (count,)) + 1,
    )
    network, lower, upper = network_and_boxes(opened)
    fast = Propagator(network.on(opened.kernels), opened.kernels, patience=0)
    assert agrees(fast, network, opened.kernels, lower, upper)
    (warning,) = fast.take_warnings()
    assert f"CUDA kernels, {opened.variant.name.lower()} and CuPy bound this network" in warning
    assert fast.name == "CuPy"


@pytest.mark.parametrize("failure", [RuntimeError, MemoryError, DeviceError])
def test_a_failure_while_running_falls_back(failure: type[Exception], opened: Fused) -> None:
    network, lower, upper = network_and_boxes(opened)
    fast = Propagator(network.on(opened.kernels), opened.kernels, patience=0)
    assert agrees(fast, network, opened.kernels, lower, upper) and isinstance(fast._fast, Plan)

    def fails(*buffers: Any) -> Any:
        raise failure("no memory")

    steps = tuple(replace(step, function=fails) for step in fast._fast.steps)
    fast._fast = replace(fast._fast, steps=steps)
    assert agrees(fast, network, opened.kernels, lower, upper) and fast.name == "CuPy"


def test_a_mistake_of_a_plan_is_not_hidden(opened: Fused) -> None:
    """A ValueError is an error of ours, which must not become slower bounds."""
    network, lower, upper = network_and_boxes(opened)
    fast = Propagator(network.on(opened.kernels), opened.kernels, patience=0)
    fast.intervals(lower, upper)

    def mistaken(*buffers: Any) -> Any:
        raise ValueError("pairs do not fit a layer")

    assert isinstance(fast._fast, Plan)
    steps = tuple(replace(step, function=mistaken) for step in fast._fast.steps)
    fast._fast = replace(fast._fast, steps=steps)
    with pytest.raises(ValueError, match="do not fit"):
        fast.intervals(lower, upper)


def test_a_later_difference_ends_the_search(opened: Fused) -> None:
    network, lower, upper = network_and_boxes(opened)
    fast = Propagator(network.on(opened.kernels), opened.kernels, patience=0)
    fast.intervals(lower, upper)
    assert isinstance(fast._fast, Plan)
    last = fast._fast.steps[-1]
    wrong = replace(last, function=lambda *xs: tuple(end + 1 for end in last.function(*xs)))
    fast._fast = replace(fast._fast, steps=(*fast._fast.steps[:-1], wrong))
    with pytest.raises(SoundnessError, match="report"):
        fast.intervals(lower, upper)


def test_a_search_by_the_kernels(opened: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same verdict, from the first box on by the kernels."""
    monkeypatch.setattr(propagate, "PATIENCE", 0)
    monkeypatch.setattr(gpu, "open_cuda", lambda: opened.kernels)
    examples = EXAMPLES[0].parents[1]
    model, path = examples / "onnx" / "tiny_mlp_qop.onnx", examples / "vnnlib" / "tiny_safe.vnnlib"
    result = verify(model, path, Options(device="cuda", attack=False, backward=False, batch=50))
    assert result.verdict is Verdict.UNSAT
    assert result.details["intervals_by"] == f"CUDA kernels, {opened.variant.name.lower()}"
