"""The laws that every op obeys, tested on all cases without naming an op: see
`qverify.ops.AbstractOp`.

On small inputs (a few elements of 3 or 4 bits) every box and every point in it; on others, boxes of
all widths, among them single points, whole ranges, and ends at the type's ends and at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qverify.kernels import open_kernels
from qverify.ops import (
    ALL,
    AbstractOp,
    Conv,
    Dense,
    FloatProgram,
    Interval,
    Layout,
    Max,
    Mean,
    Pairwise,
    Requantize,
    Softmax,
    Table,
    Type,
)
from tests.graphs import ROUNDS
from tests.ops.banded import BANDED, Blurred
from tests.ops.cases import CASES, Case, s8, u8

CPU = open_kernels("cpu")
Ints = npt.NDArray[np.int32]
SAMPLES = 500 * ROUNDS


def boxes_of(case: Case) -> int:
    """How many boxes its inputs have."""
    total = 1
    for t in case.inputs:
        total *= (t.count * (t.count + 1) // 2) ** t.size
    return total


LAWFUL = (*CASES, *BANDED)
EVERY = [case for case in LAWFUL if boxes_of(case) <= 60_000]


def test_every_op_has_cases() -> None:
    assert {type(case.op) for case in CASES} == set(ALL), "tests/ops/cases.py holds the cases"
    small = {type(case.op) for case in EVERY}
    assert small == {*ALL, Blurred}, "every op needs a case that is small enough for all boxes"
    assert len({str(case) for case in LAWFUL}) == len(LAWFUL)


def run(case: Case, xs: tuple[Ints, ...]) -> Any:
    """`run`, flattened to [N, elements], after checking it against the output type."""
    y = case.op.run(CPU, *xs)
    out = case.op.output_type(*case.inputs)
    assert y.dtype == np.int32 and y.shape == (len(xs[0]), *out.shape)
    assert out.low <= y.min(initial=out.high) and y.max(initial=out.low) <= out.high
    return y.reshape(len(y), -1)


def interval(case: Case, lower: tuple[Ints, ...], upper: tuple[Ints, ...]) -> Interval:
    """`interval`, flattened to [N, elements] each."""
    least, most = case.op.interval(CPU, *zip(lower, upper, strict=True))
    shape = (len(lower[0]), *case.op.output_type(*case.inputs).shape)
    for bound in (least, most):
        assert bound.dtype == np.int32 and bound.shape == shape
    assert (least <= most).all()
    return least.reshape(len(least), -1), most.reshape(len(most), -1)


def results(case: Case, xs: tuple[Ints, ...]) -> Interval:
    """The least and the largest result that the runtime may give for points: `run`, or (of an op
    with a band) some numbers around it."""
    y = run(case, xs)
    lower, upper = interval(case, xs, xs)
    if case.op.exact:  # a point stays a point
        np.testing.assert_array_equal(lower, y)
        np.testing.assert_array_equal(upper, y)
    assert (lower <= y).all() and (y <= upper).all()
    return lower, upper


def parts(case: Case, flat: Ints) -> tuple[Ints, ...]:
    """Columns of `flat` [N, elements of all inputs] as the inputs."""
    edges = np.cumsum([t.size for t in case.inputs])[:-1]
    return tuple(
        np.ascontiguousarray(part).reshape(len(flat), *t.shape)
        for part, t in zip(np.split(flat, edges, axis=1), case.inputs, strict=True)
    )


# -- all boxes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_laws_on_all_boxes(case: Case) -> None:
    elements = [t for t in case.inputs for _ in range(t.size)]
    codes = [range(t.low, t.high + 1) for t in elements]
    points = np.array(list(product(*codes)), np.int32)
    least, most = results(case, parts(case, points))
    pairs = [[(a, b) for a in code for b in code if a <= b] for code in codes]
    boxes = np.array(list(product(*pairs)), np.int32)
    a, b = boxes[:, :, 0].copy(), boxes[:, :, 1].copy()
    lower, upper = interval(case, parts(case, a), parts(case, b))

    for start in range(0, len(a), 2_000):  # containment
        chunk = slice(start, start + 2_000)
        inside = ((points >= a[chunk, None]) & (points <= b[chunk, None])).all(axis=2)
        for k in range(least.shape[1]):
            assert (np.where(inside, least[:, k], 2**31 - 1).min(axis=1) >= lower[chunk, k]).all()
            assert (np.where(inside, most[:, k], -(2**31)).max(axis=1) <= upper[chunk, k]).all()

    # monotone: one code less at one end, hence, step by step, for every smaller box
    for k in range(len(elements)):
        wide = a[:, k] < b[:, k]
        for rise, fall in ((1, 0), (0, 1)) if wide.any() else ():
            less_a, less_b = a[wide].copy(), b[wide].copy()
            less_a[:, k] += rise
            less_b[:, k] -= fall
            less = interval(case, parts(case, less_a), parts(case, less_b))
            assert (less[0] >= lower[wide]).all() and (less[1] <= upper[wide]).all()


# -- some boxes ------------------------------------------------------------------------------------


def inner_boxes(rng: np.random.Generator, lower: Ints, upper: Ints) -> tuple[Ints, Ints]:
    """Random boxes inside the given ones [N, elements]: anything, points, whole, from an end, from
    zero, narrow."""
    low, high = lower.astype(np.int64), upper.astype(np.int64)
    first, second = (rng.integers(low, high, endpoint=True) for _ in range(2))
    kind = rng.integers(0, 7, (len(low), 1))
    second = np.where(kind == 0, first, second)
    zero = np.clip(0, low, high)
    first = np.where(kind == 1, zero, np.where(kind == 2, low, np.where(kind == 3, high, first)))
    first, second = np.where(kind == 4, low, first), np.where(kind == 4, high, second)
    second = np.where(
        kind == 5, np.clip(first + rng.integers(-3, 4, first.shape), low, high), second
    )
    return np.minimum(first, second).astype(np.int32), np.maximum(first, second).astype(np.int32)


def whole(case: Case, count: int) -> tuple[Ints, Ints]:
    low = [t.low for t in case.inputs for _ in range(t.size)]
    high = [t.high for t in case.inputs for _ in range(t.size)]
    return np.tile(np.array(low, np.int32), (count, 1)), np.tile(
        np.array(high, np.int32), (count, 1)
    )


@pytest.mark.parametrize("case", LAWFUL, ids=str)
def test_laws_on_some_boxes(case: Case) -> None:
    rng = np.random.default_rng(0)
    a, b = inner_boxes(rng, *whole(case, SAMPLES))
    lower, upper = interval(case, parts(case, a), parts(case, b))
    for x in (
        a,
        b,
        np.where(rng.random(a.shape) < 0.5, a, b),
        *(rng.integers(a, b, endpoint=True) for _ in range(4)),
    ):
        x = x.astype(np.int32)
        least, most = results(case, parts(case, x))
        assert (lower <= least).all() and (most <= upper).all()
    for _ in range(3):
        a, b = inner_boxes(rng, a, b)
        less = interval(case, parts(case, a), parts(case, b))
        assert (less[0] >= lower).all() and (less[1] <= upper).all()
        lower, upper = less


@pytest.mark.parametrize("case", LAWFUL, ids=str)
def test_samples_are_independent(case: Case) -> None:
    """A batch gives what its samples give one by one."""
    rng = np.random.default_rng(1)
    a, b = inner_boxes(rng, *whole(case, 3))
    y, box = run(case, parts(case, a)), interval(case, parts(case, a), parts(case, b))
    for k in range(3):
        one, other = a[k : k + 1], b[k : k + 1]
        np.testing.assert_array_equal(run(case, parts(case, one)), y[k : k + 1])
        alone = interval(case, parts(case, one), parts(case, other))
        for bound, bounds in zip(alone, box, strict=True):
            np.testing.assert_array_equal(bound, bounds[k : k + 1])


@pytest.mark.parametrize("case", LAWFUL, ids=str)
def test_gradient_is_finite_and_shaped_like_the_inputs(case: Case) -> None:
    rng = np.random.default_rng(2)
    xs = parts(case, inner_boxes(rng, *whole(case, 5))[0])
    upstream = rng.normal(size=(5, *case.op.output_type(*case.inputs).shape)).astype(np.float32)
    gradients = case.op.gradient(CPU, xs, upstream)
    assert len(gradients) == len(xs)
    for gradient, x in zip(gradients, xs, strict=True):
        assert gradient.shape == x.shape and gradient.dtype == np.float32
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("case", LAWFUL, ids=str)
def test_on_the_same_machine_an_op_stays_itself(case: Case) -> None:
    assert case.op.on(CPU) is case.op


# -- refusals --------------------------------------------------------------------------------------

ONE = np.ones((2, 3), np.int64)
HALF = FloatProgram().then("mul", np.ones(3))
VALUES = np.arange(256, dtype=np.float32)
SUM = np.arange(256)[:, None].astype(np.int32) + np.arange(256)[None].astype(np.int32)


def conv(**changes: Any) -> Conv:
    fields: dict[str, Any] = {
        **{
            "weight": np.ones((2, 3, 2, 2), np.int64),
            "bias": np.zeros(2, np.int64),
            "strides": (1, 1),
        },
        **{
            "pads": (0,) * 4,
            "dilations": (1, 1),
            "groups": 1,
            "pad_value": 0,
            "x_low": 0,
            "x_high": 255,
        },
    }
    return Conv(**{**fields, **changes})


MISFITS: dict[str, tuple[Callable[[], AbstractOp], tuple[Type, ...]]] = {
    "a reshape to more": (lambda: Layout((7,)), (u8(6),)),
    "a reshape of two": (lambda: Layout((4,)), (u8(2), u8(2))),
    "too few indices": (lambda: Layout((3,), np.array([0, 1])), (u8(6),)),
    "an index too large": (lambda: Layout((2,), np.array([0, 6])), (u8(6),)),
    "a negative index": (lambda: Layout((2,), np.array([0, -1])), (u8(6),)),
    "a dense input of another size": (lambda: Dense(ONE, np.zeros(3, np.int64), 0, 255), (u8(3),)),
    "a dense scalar": (lambda: Dense(ONE, np.zeros(3, np.int64), 0, 255), (u8(),)),
    "a dense bias that does not fit": (lambda: Dense(ONE, np.zeros(2, np.int64), 0, 255), (u8(2),)),
    "a dense bias of more rows": (lambda: Dense(ONE, np.zeros((4, 3), np.int64), 0, 255), (u8(2),)),
    "a dense input out of range": (lambda: Dense(ONE, np.zeros(3, np.int64), 0, 255), (s8(2),)),
    "stacks that do not fit": (
        lambda: Dense(np.ones((3, 2, 3), np.int64), np.zeros(3, np.int64), 0, 255),
        (u8(2, 4, 2),),
    ),
    "a vector by a stack": (
        lambda: Dense(np.ones((3, 2, 3), np.int64), np.zeros(3, np.int64), 0, 255),
        (u8(2),),
    ),
    "a conv input of other channels": (lambda: conv(), (u8(1, 2, 4, 4),)),
    "a conv input of another rank": (lambda: conv(), (u8(1, 3, 4),)),
    "a kernel that is too large": (lambda: conv(), (u8(1, 3, 1, 4),)),
    "a conv input out of range": (lambda: conv(), (s8(1, 3, 4, 4),)),
    "a padding value out of range": (lambda: conv(pad_value=-1), (u8(1, 3, 4, 4),)),
    "a factor that does not fit": (
        lambda: Requantize(HALF, np.zeros((), np.int32), 0, 255),
        (u8(2),),
    ),
    "a factor of a larger shape": (
        lambda: Requantize(HALF, np.zeros((), np.int32), 0, 255),
        (u8(1),),
    ),
    "a zero point that does not fit": (
        lambda: Requantize(FloatProgram(), np.zeros(3, np.int32), 0, 255),
        (u8(2),),
    ),
    "a table that is too short": (lambda: Table(np.zeros((1, 100), np.int32), 0), (u8(2),)),
    "a table that begins too late": (lambda: Table(np.zeros((1, 300), np.int32), 0), (s8(2),)),
    "rows without a choice": (lambda: Table(np.zeros((2, 256), np.int32), 0), (u8(2),)),
    "a choice that does not fit": (
        lambda: Table(np.zeros((2, 256), np.int32), 0, np.zeros(3, np.int64)),
        (u8(2),),
    ),
    "a pair out of range": (lambda: Pairwise(SUM, 0, 0), (u8(2), s8(2))),
    "a pair that does not broadcast": (lambda: Pairwise(SUM, 0, 0), (u8(2), u8(3))),
    "the maximum of nothing": (lambda: Max(), (u8(2, 0),)),
    "the maximum of a scalar": (lambda: Max(), (u8(),)),
    "a mean out of range": (lambda: Mean(VALUES, 0, np.ones((), np.float32), "eigen"), (s8(3),)),
    "a mean of falling values": (
        lambda: Mean(-VALUES, 0, np.ones((), np.float32), "eigen"),
        (u8(3),),
    ),
    "a mean over zero": (lambda: Mean(VALUES, 0, np.zeros((), np.float32), "eigen"), (u8(3),)),
    "a mean that overflows": (
        lambda: Mean(1e36 * VALUES, 0, np.ones((), np.float32), "eigen"),
        (u8(3),),
    ),
    "a mean in no order": (lambda: Mean(VALUES, 0, np.ones((), np.float32), "pairwise"), (u8(3),)),
    "a mean of a scalar": (lambda: Mean(VALUES, 0, np.ones((), np.float32), "eigen"), (u8(),)),
    "a mean whose divisor does not fit": (
        lambda: Mean(VALUES, 0, np.ones(2, np.float32), "eigen"),
        (u8(4, 3),),
    ),
    "a softmax of another length": (
        lambda: Softmax(np.float32(1), np.float32(0.01), 0, 255, 0, 4),
        (u8(3),),
    ),
    "a softmax of a scalar": (
        lambda: Softmax(np.float32(1), np.float32(0.01), 0, 255, 0, 1),
        (u8(),),
    ),
    "a softmax of other codes": (
        lambda: Softmax(np.float32(1), np.float32(0.01), 0, 255, 0, 3),
        (s8(3),),
    ),
    "a softmax of 4 bits": (
        lambda: Softmax(np.float32(1), np.float32(0.01), 0, 15, 0, 3),
        (Type((3,), 0, 15),),
    ),
    "a softmax with a tiny scale": (
        lambda: Softmax(np.float32(1), np.float32(1e-39), 0, 255, 0, 3),
        (u8(3),),
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_refuses_types_that_do_not_fit(what: str) -> None:
    make, types = MISFITS[what]
    with pytest.raises(ValueError, match=r"."):
        make().output_type(*types)


OVERFLOWS: dict[str, tuple[AbstractOp, Type]] = {
    "dense, above": (Dense(np.full((1, 1), 8_421_505), np.zeros(1, np.int64), 0, 255), u8(1)),
    "dense, below": (Dense(np.full((1, 1), 16_777_217), np.zeros(1, np.int64), -128, 127), s8(1)),
    "dense, by its bias": (Dense(ONE, np.full(3, 2**31 - 510), 0, 255), u8(2)),
    "conv, above": (
        conv(weight=np.full((1, 1, 1, 1), 8_421_505), bias=np.zeros(1, np.int64)),
        u8(1, 1, 1, 1),
    ),
    "conv, by its bias": (conv(bias=np.full(2, -(2**31) - 1)), u8(1, 3, 2, 2)),
}


@pytest.mark.parametrize("what", OVERFLOWS)
def test_refuses_accumulators_beyond_int32(what: str) -> None:
    op, x = OVERFLOWS[what]
    with pytest.raises(ValueError, match="outside int32"):
        op.output_type(x)


def test_accumulators_may_reach_the_ends_of_int32() -> None:
    largest = Dense(np.full((1, 1), 8_421_504), np.full(1, 127), 0, 255)
    assert largest.output_type(u8(1)).high == 2**31 - 1
    least = Dense(np.full((1, 1), 2**24), np.zeros(1, np.int64), -128, 127)
    assert least.output_type(s8(1)).low == -(2**31)


def test_exact_products_end_at_float64() -> None:
    with pytest.raises(ValueError, match="beyond exact float64"):
        Dense(np.full((1, 1), 2**46), np.zeros(1, np.int64), 0, 255)


def test_a_pairwise_table_must_be_monotone() -> None:
    bumpy = np.array([[0, 1, 0]], np.int32)
    for values in (bumpy, bumpy.T):
        with pytest.raises(ValueError, match="monotone in each"):
            Pairwise(values, 0, 0)
