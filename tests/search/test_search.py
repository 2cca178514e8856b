"""The search: splits that lose no point, rules that make progress, a frontier that keeps its order
and its budget, and verdicts that are the brute-force ones whatever the options say. Problems are
built by hand, without any ONNX file."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qverify.boundary.domain import make_domain
from qverify.boundary.outputs import Decoder
from qverify.bounds.unsafe import OPEN, Grid, make_unsafe
from qverify.deadline import Deadline, TimeUp
from qverify.errors import SoundnessError, Undecided
from qverify.frontend.builder import Identity, Quantizer
from qverify.frontend.encoder import Encoder
from qverify.kernels import Kernels, open_kernels
from qverify.network import Network, Node
from qverify.ops import AbstractOp, Dense, FloatProgram, Requantize, Type
from qverify.options import Options
from qverify.property import Box, Case, Query, Row
from qverify.result import Progress, Stats, Verdict
from qverify.search.attack import Attack, corners, slack_gradient
from qverify.search.bab import search
from qverify.search.branch import INPUT_RULES, RULES, BoxView, halves, middle
from qverify.search.frontier import Frontier, OpenBoxes
from qverify.search.knowledge import Knowledge
from qverify.search.memory import box_batch
from qverify.search.observer import Observer
from qverify.search.problem import Candidate, Problem
from qverify.search.run import Outcome
from tests.graphs import ROUNDS
from tests.kernels.strict import open_strict

CPU = open_kernels("cpu")
F = Fraction
Int32Array = npt.NDArray[np.int32]
FOREVER = Deadline.after(None)


def int32(values: Any) -> Int32Array:
    return np.asarray(values, np.int32)


# -- splits and rules ------------------------------------------------------------------------------


def points_of(lower: Iterable[int], upper: Iterable[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(a, b + 1) for a, b in zip(lower, upper, strict=True))))


SPANS = [(a, b) for a in range(-2, 3) for b in range(a, 3)]


def split(lower: Int32Array, upper: Int32Array, variable: Any) -> tuple[Any, Any]:
    return halves(CPU, lower, upper, middle(CPU, lower, upper, variable))


def test_halves_share_no_point_and_cover_their_parent() -> None:
    for box in itertools.product(SPANS, repeat=2):
        lower, upper = ([span[end] for span in box] for end in (0, 1))
        for variable in range(2):
            if lower[variable] == upper[variable]:
                continue
            lows, highs = split(int32([lower]), int32([upper]), np.array([variable]))
            parts = [points_of(low, high) for low, high in zip(lows, highs, strict=True)]
            assert all(parts)
            assert sorted(parts[0] + parts[1]) == points_of(lower, upper)


def test_many_boxes_are_split_at_once() -> None:
    lower, upper = int32([[0, 0, 5], [-3, 2, 2]]), int32([[0, 9, 6], [4, 2, 3]])
    lows, highs = split(lower, upper, np.array([1, 0]))
    assert lows.tolist() == [[0, 0, 5], [-3, 2, 2], [0, 5, 5], [1, 2, 2]]
    assert highs.tolist() == [[0, 4, 6], [0, 2, 3], [0, 9, 6], [4, 2, 3]]


GRADIENTS = [0.0, -0.0, 1.0, -1e-3, 1e-45, 1e38, -3e38, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("name", INPUT_RULES)
@settings(max_examples=100 * ROUNDS, deadline=None)
@given(data=st.data())
def test_every_rule_picks_a_variable_with_codes_left(name: str, data: st.DataObject) -> None:
    """Also where the gradient vanishes, or overflowed."""
    codes = data.draw(st.integers(1, 5))
    widths = st.lists(st.sampled_from([0, 0, 0, 1, 2, 255]), min_size=codes, max_size=codes).filter(
        any
    )
    slopes = st.lists(st.sampled_from(GRADIENTS), min_size=codes, max_size=codes)
    width = int32(data.draw(st.lists(widths, min_size=1, max_size=4)))
    gradient = np.array([data.draw(slopes) for _ in width], np.float32)
    lower = int32(np.full(width.shape, -128))
    cut = INPUT_RULES[name].choose(BoxView(CPU, lower, lower + width, gradient))
    assert (width[np.arange(len(width)), cut.entry] > 0).all() and cut.possible.all()


def test_influence_prefers_the_steep_and_widest_the_wide() -> None:
    view = BoxView(
        CPU, int32([[0, 0, 0]]), int32([[9, 3, 3]]), np.array([[0.1, 0.0, -8.0]], np.float32)
    )
    for name, entry in (("influence", 2), ("balanced", 2), ("widest", 0)):
        assert INPUT_RULES[name].choose(view).entry.tolist() == [entry]


# -- the frontier ----------------------------------------------------------------------------------


def numbered(first: int, count: int) -> tuple[Int32Array, Int32Array]:
    lower = int32(np.arange(first, first + count))[:, None] + int32([0, -300])
    return lower, lower + 1


def block(first: int, count: int, kernels: Kernels = CPU) -> OpenBoxes:
    lower, upper = (kernels.asarray(bound) for bound in numbered(first, count))
    return OpenBoxes(lower, upper, np.arange(first, first + count))


def test_the_last_pushed_is_popped_first() -> None:
    frontier = Frontier[OpenBoxes](CPU, None)
    frontier.push(block(0, 3))
    frontier.push(block(3, 200))
    assert len(frontier) == 203
    taken = frontier.pop(4)
    assert np.array_equal(taken.lower, numbered(199, 4)[0])
    assert np.array_equal(taken.upper, numbered(199, 4)[1])
    frontier.push(block(500, 1))
    assert frontier.pop(2).entry.tolist() == [198, 500]
    assert frontier.pop(1000).entry.tolist() == list(range(198))
    assert len(frontier) == 0
    frontier.push(block(7, 0))
    assert not frontier.blocks


def test_the_top_block_alone_can_be_asked_for() -> None:
    frontier = Frontier[OpenBoxes](CPU, None)
    frontier.push(block(0, 3))
    frontier.push(block(3, 2))
    assert frontier.pop_block(4).entry.tolist() == [3, 4]
    assert frontier.pop_block(2).entry.tolist() == [1, 2]


@pytest.mark.parametrize("low,high", [(-128, 127), (0, 255), (-(2**15), 2**15 - 1), (0, 65535)])
def test_the_codes_of_all_types_survive_the_narrow_storage(low: int, high: int) -> None:
    """65535 does not fit int16."""
    dtype = OpenBoxes.narrowest(int32([low]), int32([high]))
    assert np.array([low, high]).astype(dtype).tolist() == [low, high]
    assert dtype is (np.int32 if high > 2**15 else np.int16)


def test_batches_shrink_when_the_budget_is_half_used() -> None:
    frontier = Frontier[OpenBoxes](CPU, None, 1000)
    frontier.push(block(0, 500))
    assert len(frontier.pop(100)) == 100
    frontier.push(block(0, 350))  # 750 boxes
    assert len(frontier.pop(100)) == 25
    frontier.push(block(0, 500))  # beyond the budget
    assert [len(frontier.pop(100)) for _ in range(3)] == [1, 1, 1]
    assert len(frontier) == 1222


# -- problems, and their brute-force answers -------------------------------------------------------


def network_of(ops: Sequence[AbstractOp], inputs: int) -> Network:
    types, nodes = [Type((inputs,), 0, 255)], []
    for k, op in enumerate(ops):
        types.append(op.output_type(types[-1]))
        nodes.append(Node(op, (k,), types[-1]))
    network = Network(types[0], tuple(nodes), (len(ops),))
    network.validate()
    return network


def box_of(*spans: tuple[Fraction | int, Fraction | int]) -> Box:
    return Box(tuple(F(a) for a, _ in spans), tuple(F(b) for _, b in spans))


def problem_of(
    ops: Sequence[AbstractOp],
    box: Box,
    cases: Sequence[Case],
    scale: float | None = None,
    program: Any = None,
) -> Problem:
    """Integer inputs, or with `scale` float ones; outputs are the integers, or floats by
    `program`."""
    size = len(box.lower)
    source = np.arange(size)
    whole = np.full(size, scale or 1.0, np.float32)
    part = (
        Quantizer(source, np.zeros(size, np.float32), (), whole, int32(np.zeros(size)), 0, 255)
        if scale
        else Identity(source, 0, 255)
    )
    encoder = Encoder((part,), np.full(size, scale is not None))
    network = network_of(ops, size)
    outputs = network.output_size
    grid = Grid((None if program else 0,) * outputs, (float(2**31),) * outputs)
    types = ((-(2**31), 2**31 - 1),)
    decoder = Decoder(
        ((program, outputs, (outputs,)),), np.ones(outputs), grid, np.zeros(outputs), types
    )
    domain = make_domain(encoder, box)
    lower, upper = domain.code_box()
    unsafe = make_unsafe(Query(box, tuple(cases)), size, grid)
    return Problem(CPU, network, domain, decoder, unsafe, lower, upper)


def dense(weight: Any, bias: Any, low: int = 0, high: int = 255) -> Dense:
    return Dense(np.asarray(weight, np.int64), np.asarray(bias, np.int64), low, high)


def random_ops(rng: np.random.Generator, inputs: int, outputs: int) -> list[AbstractOp]:
    """Two layers with a rounding between them."""
    hidden = 4
    first = dense(rng.integers(-60, 61, (inputs, hidden)), rng.integers(-3000, 3000, hidden))
    between = Requantize(FloatProgram().then("mul", 0.02), np.asarray(100, np.int32), 0, 255)
    return [
        first,
        between,
        dense(rng.integers(-9, 10, (hidden, outputs)), rng.integers(-2000, 2000, outputs)),
    ]


def y_row(rhs: Fraction | int, *coefficients: Fraction | int, strict: bool = False) -> Row:
    return Row((), tuple((i, F(c)) for i, c in enumerate(coefficients) if c), F(rhs), strict)


DEFAULT = Options()


def run(
    problem: Problem, options: Options = DEFAULT, deadline: Deadline = FOREVER
) -> tuple[Outcome, Stats]:
    stats = Stats()
    return search(problem, options, deadline, np.random.default_rng(options.seed), stats), stats


def brute_force(problem: Problem) -> bool:
    """Whether some code vector of the root box is unsafe (rows over outputs only)."""
    points = int32(points_of(problem.lower, problem.upper))
    y = problem.decoder.decode(problem.network.run(CPU, points))
    return bool((problem.unsafe.status((y, y)) != 0).any())


def check_candidate(problem: Problem, outcome: Outcome) -> None:
    """A candidate is inside the domain, has the codes and outputs that it says, and is unsafe."""
    found = outcome.candidate
    assert found is not None
    assert ((problem.domain.lower <= found.inputs) & (found.inputs <= problem.domain.upper)).all()
    assert np.array_equal(problem.domain.encoder.encode(found.inputs[None])[0], found.codes)
    y = problem.decoder.decode(problem.network.run(CPU, found.codes[None]))
    assert np.array_equal(y[0], found.outputs)
    x = found.inputs[None]
    assert (problem.unsafe.status((y, y), (x, x) if problem.unsafe.mixed else None) != 0).any()


WAYS = [
    *(Options(branch=branch, batch=batch) for branch in RULES for batch in (1, 7, None)),
    *(Options(seed=seed, attack=attack) for seed in (1, 2) for attack in (True, False)),
    Options(batch=3, attack=False, branch="widest"),
]


def random_problem(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    inputs = int(rng.integers(1, 4))
    low = rng.integers(0, 200, inputs)
    spans = [(int(a), int(a + rng.integers(0, 12))) for a in low]
    ops = random_ops(rng, inputs, 2)
    bare = problem_of(ops, box_of(*spans), [])
    y = bare.decoder.decode(bare.network.run(CPU, int32(points_of(bare.lower, bare.upper))))
    # Thresholds at the ends of what the outputs reach decide sat and unsat about equally often.
    cases: list[Case] = []
    for _ in range(int(rng.integers(1, 4))):
        sign = int(rng.choice([-1, 1]))
        value = sign * y @ np.array([1.0, -1.0])
        edge = int(value.min()) - int(rng.integers(0, 2))
        cases.append(
            (
                y_row(edge, sign, -sign, strict=bool(rng.integers(2))),
                y_row(int(y[:, 0].max()) - 1, 1),
            )
        )
    return problem_of(ops, box_of(*spans), cases)


@pytest.mark.parametrize("seed", range(30))
def test_the_verdict_is_brute_force_s_whatever_the_options(seed: int) -> None:
    problem = random_problem(seed)
    expected = Verdict.SAT if brute_force(problem) else Verdict.UNSAT
    for options in WAYS:
        outcome, stats = run(problem, options)
        assert outcome.verdict == expected, options
        if expected is Verdict.SAT:
            check_candidate(problem, outcome)
        else:
            assert outcome.candidate is None
            assert stats.proved + stats.leaves > 0
        if not options.attack:
            assert stats.attack_points == 0


def test_the_random_problems_are_of_both_kinds() -> None:
    verdicts = [brute_force(random_problem(seed)) for seed in range(30)]
    assert 5 < sum(verdicts) < 25


def parity_problem(inputs: int, width: int) -> Problem:
    """An even sum is never one: bounds cannot see it, so every single code vector must be tried."""
    # Zero near the middle of the box.
    ops = [dense(np.full((inputs, 1), 2), [-(inputs * width // 2 * 2)])]
    return problem_of(ops, box_of(*[(0, width)] * inputs), [(y_row(1, 1), y_row(-1, -1))])


@pytest.mark.parametrize("options", WAYS[::3], ids=str)
def test_what_only_single_points_decide_ends(options: Options) -> None:
    outcome, stats = run(parity_problem(2, 15), options)
    assert outcome.verdict is Verdict.UNSAT
    # A sum in (0, 2) is refuted as soon as its box is a point.
    assert stats.leaves == 0 and stats.proved >= 31


def test_coefficients_beyond_float32_still_end() -> None:
    """Their gradient overflowed once; then a rule picked a variable with a single code, for
    ever."""
    huge = F(10) ** 40
    problem = parity_problem(3, 5)
    rows = (y_row(huge, huge), y_row(-huge, -huge))
    unsafe = make_unsafe(Query(problem.domain.box, (rows,)), 3, problem.decoder.grid)
    problem = Problem(
        CPU, problem.network, problem.domain, problem.decoder, unsafe, problem.lower, problem.upper
    )
    for branch in RULES:
        deadline = Deadline.after(20)
        assert run(problem, Options(branch=branch), deadline)[0].verdict is Verdict.UNSAT


def test_a_flat_network_ends() -> None:
    """All gradients vanish."""
    ops = [
        dense(np.ones((2, 2)), [0, 0]),
        Requantize(FloatProgram().then("mul", 0.0), int32(7), 0, 255),
    ]
    for rhs, verdict in ((6, Verdict.UNSAT), (7, Verdict.SAT)):
        assert (
            run(problem_of(ops, box_of((0, 9), (0, 9)), [(y_row(rhs, 1),)]))[0].verdict is verdict
        )


def test_a_single_point_needs_one_evaluation() -> None:
    ops = [dense([[1], [1]], [0])]
    for rhs, verdict in ((7, Verdict.SAT), (6, Verdict.UNSAT)):
        outcome, stats = run(problem_of(ops, box_of((3, 3), (4, 4)), [(y_row(rhs, 1),)]))
        assert outcome.verdict is verdict
        assert (stats.subproblems, stats.attack_points) == (1, 0)


def test_a_query_without_cases_is_unsat_and_an_empty_case_is_sat() -> None:
    """The empty case once ended in an IndexError without the attack."""
    ops = [dense([[1]], [0])]
    assert run(problem_of(ops, box_of((0, 255)), []))[0].verdict is Verdict.UNSAT
    for options in WAYS:
        assert run(problem_of(ops, box_of((0, 255)), [()]), options)[0].verdict is Verdict.SAT


def test_an_infinite_output_is_not_decided() -> None:
    """The rows say nothing about an infinity, and infinity times zero would compare as false: that
    once meant unsat."""
    ops = [dense([[1000, 0], [1000, 1]], [0, 0])]
    program = FloatProgram().then("mul", np.float32(1e34))
    cases = [(y_row(F(10) ** 34 * 5, 0, 1),)]
    with pytest.raises(Undecided, match="overflow"):
        run(problem_of(ops, box_of((0, 255), (0, 255)), cases, program=program))
    outcome, _ = run(problem_of(ops, box_of((0, 9), (0, 9)), cases, program=program))
    assert outcome.verdict is Verdict.SAT


# -- outputs known up to an error: the runtime decides ---------------------------------------------


def blurred(
    problem: Problem, ask: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> Problem:
    """The problem with outputs that the runtime gives within 0.75 of the decoded ones."""
    decoder = replace(problem.decoder, grid=Grid((None,), (0.0,)), band=np.array([0.75]))
    unsafe = make_unsafe(Query(problem.domain.box, (problem.unsafe.case_rows[0],)), 1, decoder.grid)
    return Problem(
        CPU, problem.network, problem.domain, decoder, unsafe, problem.lower, problem.upper, ask
    )


def test_a_float_sum_is_decided_by_the_runtime() -> None:
    """The network says 3 x; the runtime 3 x + 0.5 at x = 7 alone. Unsafe is an output in [21.4,
    21.6]."""
    exact = problem_of(
        [dense([[3]], [0])], box_of((0, 20)), [(y_row(F(216, 10), 1), y_row(F(-214, 10), -1))]
    )
    asked: list[float] = []

    def ask(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        asked.append(float(x[0]))
        return 3 * x + (0.5 if x[0] == 7 else 0.0)

    for options in WAYS:
        outcome, _ = run(blurred(exact, ask), options)
        assert outcome.verdict is Verdict.SAT
        assert outcome.candidate is not None and outcome.candidate.outputs.tolist() == [21.5]
        assert run(blurred(exact, lambda x: 3 * x), options)[0].verdict is Verdict.UNSAT
    assert set(asked) == {7.0}  # elsewhere the bounds suffice
    with pytest.raises(SoundnessError):
        run(blurred(exact, lambda x: 3 * x + 1))


# -- limits and reports ----------------------------------------------------------------------------


def test_no_time_is_a_timeout_before_any_work() -> None:
    outcome, stats = run(random_problem(0), deadline=Deadline.after(0))
    assert outcome.verdict is Verdict.TIMEOUT
    assert stats.subproblems == 0
    assert "1 parts open, 0.0% proved" in outcome.reason


@pytest.mark.parametrize("batch", [1, None, 4096])
def test_a_timeout_is_prompt(batch: int | None) -> None:
    started, busy = time.monotonic(), time.process_time()
    outcome, stats = run(parity_problem(40, 255), Options(batch=batch), Deadline.after(0.3))
    assert outcome.verdict is Verdict.TIMEOUT
    assert time.monotonic() - started >= 0.3
    # Of this process alone: others may keep the machine busy.
    assert time.process_time() - busy < 2.0
    assert stats.subproblems > 10


def test_progress_never_falls_and_counts_what_is_open() -> None:
    seen: list[Progress] = []
    problem = parity_problem(2, 15)
    search(problem, Options(batch=4), FOREVER, np.random.default_rng(0), Stats(), seen.append)
    shares = [p.proved for p in seen]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] == pytest.approx(1.0)
    assert seen[-1].open == 0
    assert [p.subproblems for p in seen] == sorted({p.subproblems for p in seen})


def test_a_batch_fits_the_share_of_memory() -> None:
    assert box_batch(CPU, random_problem(0).network) == 4096
    wide = [dense(np.ones((1, 200_000)), np.zeros(200_000))]
    assert box_batch(CPU, problem_of(wide, box_of((0, 1)), []).network) == 16


@pytest.mark.parametrize("kernels", [CPU, open_strict()], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("room", [1, 1 << 8, 1 << 10])
def test_the_host_holds_the_bottom_of_the_stack(room: int, kernels: Kernels) -> None:
    """Whatever is resident, the same boxes come in the same batches."""
    rng, next_ = np.random.default_rng(room), 0
    whole, part = Frontier[OpenBoxes](CPU, None, 2000), Frontier[OpenBoxes](kernels, room, 2000)
    away = 0
    for _ in range(300):
        count = int(rng.integers(0, 30))
        whole.push(block(next_ % 10_000, count))
        part.push(block(next_ % 10_000, count, kernels))
        next_, away = next_ + count, max(away, part.away)
        if len(whole):
            batch = int(rng.integers(1, 40))
            ours, theirs = whole.pop(batch), part.pop(batch)
            assert np.array_equal(ours.lower, kernels.to_host(theirs.lower))
            assert np.array_equal(ours.upper, kernels.to_host(theirs.upper))
            assert np.array_equal(ours.entry, theirs.entry)
        assert len(whole) == len(part)
    assert away > 2


def test_a_small_gpu_splits_the_same_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search whose frontier is mostly on the host: the same boxes, the same verdict."""
    counts = set()
    for resident in (1, 1 << 30):
        strict = open_strict()
        monkeypatch.setattr(type(strict), "resident_bytes", lambda self, most=resident: most)
        problem = parity_problem(3, 15)
        problem = replace(problem, kernels=strict, network=problem.network.on(strict))
        outcome, stats = run(problem, Options(batch=16, attack=False))
        assert outcome.verdict is Verdict.UNSAT
        counts.add((stats.subproblems, stats.leaves, stats.max_open))
    assert len(counts) == 1 and max(counts)[2] > 16


# -- the attack ------------------------------------------------------------------------------------


def attack_of(problem: Problem, stats: Stats, batch: int) -> Attack:
    observer = Observer(problem.kernels, stats, FOREVER)
    return Attack(Knowledge(problem), np.random.default_rng(0), observer, batch)


def attack_round(problem: Problem, rounds: int = 1) -> Candidate | None:
    """What some rounds of the attack find."""
    attack = attack_of(problem, Stats(), 4096)
    return next(
        (found for _ in range(rounds) if (found := attack.attack_round()) is not None), None
    )


def test_the_attack_walks_downhill_to_a_corner() -> None:
    ops = [dense([[3], [-2], [1]], [0])]
    box = box_of((10, 200), (10, 200), (5, 5))
    # Reached at one corner only.
    problem = problem_of(ops, box, [(y_row(3 * 10 - 2 * 200 + 5, 1),)])
    found = attack_round(problem)
    assert found is not None
    assert found.codes.tolist() == [10, 200, 5]


def test_the_attack_gives_up() -> None:
    with Deadline.after(0).limits(), pytest.raises(TimeUp):
        attack_round(random_problem(1))
    assert attack_round(parity_problem(2, 15), rounds=3) is None
    assert attack_round(problem_of([dense([[1]], [0])], box_of((0, 9)), []), rounds=3) is None


def test_the_attack_tries_every_case_of_many() -> None:
    """More cases than one group holds; only the last can hold, at one code."""
    ops = [dense([[1]], [0])]
    cases = [*((y_row(-1 - k, 1),) for k in range(1500)), (y_row(-255, -1),)]
    found = attack_round(problem_of(ops, box_of((0, 255)), cases))
    assert found is not None and found.codes.tolist() == [255]


@pytest.mark.parametrize("before", [0, 10**9])
def test_the_attack_takes_its_share_of_the_work(before: int) -> None:
    """What was bounded for earlier queries is no reason to attack this one more often."""
    problem, stats = parity_problem(2, 15), Stats(subproblems=before)
    attack = attack_of(problem, stats, 4096)
    assert attack.due()
    attack.attack_round()
    assert stats.attack_points > 0 and not attack.due()
    stats.subproblems += 100 * stats.attack_points
    assert attack.due()


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_the_attack_keeps_to_what_fits_the_memory(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    honest = Network.values

    def values(self: Network, kernels: Kernels, x: Any) -> list[Any]:
        sizes.append(len(x))
        return honest(self, kernels, x)

    monkeypatch.setattr(Network, "values", values)
    problem = problem_of(
        [dense([[1]], [0])], box_of((0, 255)), [(y_row(-1 - k, 1),) for k in range(30)]
    )
    assert attack_of(problem, Stats(), batch).attack_round() is None
    assert max(sizes) <= max(batch, 4)


def test_gradient_and_corner_point_downhill() -> None:
    problem = problem_of(
        [dense([[3, 0], [-2, 1]], [0, 0])], box_of((0, 9), (0, 9)), [(y_row(0, 1, -1),)]
    )
    lower, upper = problem.lower[None], problem.upper[None]
    gradient = slack_gradient(Knowledge(problem), problem.network.values(CPU, lower), np.array([0]))
    assert np.sign(gradient).tolist() == [[1, -1]]
    assert corners(problem, lower, upper, gradient).tolist() == [[0, 9]]


# -- rows over inputs inside a cell ----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_rows_over_inputs_and_outputs_are_brute_force_s(seed: int) -> None:
    """Each row mentions one float input, so a cell's ends decide it."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 50, 2)
    box = box_of(*((F(int(a), 10), F(int(a) + 4, 10)) for a in low))
    ops = random_ops(rng, 2, 1)
    bare = problem_of(ops, box, [], scale=0.1)
    points = int32(points_of(bare.lower, bare.upper))
    y = bare.decoder.decode(bare.network.run(CPU, points))[:, 0]
    sign = int(rng.choice([-1, 1]))
    row = Row(
        ((int(rng.integers(2)), F(sign * 400)),), ((0, F(sign)),), F(0), bool(rng.integers(2))
    )
    cells = [bare.domain.cells(p, p) for p in points]
    index = row.x[0][0]
    ends = [
        (F(float(c[sign < 0][index])), F(v)) for c, v in zip(cells, y, strict=True) if c is not None
    ]
    least = min(sign * (400 * x + v) for x, v in ends)
    for nudge in (F(0), F(-1, 10**40), F(1, 10**40), F(-1, 100), F(1, 100)):
        exact = Row(row.x, row.y, least + nudge, row.strict)
        expected = nudge > 0 or (nudge == 0 and not row.strict)
        problem = problem_of(ops, box, [(exact,)], scale=0.1)
        for options in (Options(), Options(attack=False, batch=5, branch="widest")):
            outcome, _ = run(problem, options)
            if abs(nudge) < F(1, 100) and outcome.verdict is Verdict.UNKNOWN:
                continue  # a decimal beside the float32 decides otherwise
            assert outcome.verdict is (Verdict.SAT if expected else Verdict.UNSAT)
            if expected:
                check_candidate(problem, outcome)


def test_open_points_are_realised_inside_their_cell() -> None:
    """A row over the input alone cuts a cell in two; the witness lies in the right part."""
    ops = [dense([[1]], [0])]
    case = (Row(((0, F(-1)),), (), F(-32, 100)), y_row(3, 1))  # x >= 0.32 and its code <= 3
    problem = problem_of(ops, box_of((F(3, 10), F(4, 10))), [case], scale=0.1)
    point = int32([[3]])
    y = problem.decoder.decode(problem.network.run(CPU, point))
    assert problem.unsafe.status((y, y), problem.input_bounds(point, point)).tolist() == [[OPEN]]
    outcome, _ = run(problem)
    check_candidate(problem, outcome)
    assert outcome.candidate is not None and 0.32 <= outcome.candidate.inputs[0] < 0.36
