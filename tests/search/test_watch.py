"""The watched point: it is never lost by the search as it is, whatever the point; and bugs planted
all over the search lose it, or give a wrong verdict."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify import Options, Verdict, cli, verify
from qverify.bounds import dual, intermediate, regions, unsafe_regions
from qverify.errors import SoundnessError, UsageError
from qverify.network import Network
from qverify.ops import Requantize, relax, table
from qverify.ops.pool import MaxHull
from qverify.ops.relax import StaircaseRelaxation
from qverify.search import bab, frontier, splitting
from qverify.search.bounds import Intervals
from qverify.search.knowledge import Knowledge
from tests.graphs import ROUNDS
from tests.networks import CPU, random_network
from tests.search.queries import asked, shortcut

EXAMPLES = Path(__file__).parents[2] / "specs" / "examples"
TINY = (EXAMPLES / "onnx" / "tiny_mlp_qop.onnx", EXAMPLES / "vnnlib" / "tiny_unsafe.vnnlib")
SHARED = Path(__file__).parents[3] / "shared" / "benchmarks" / "aaai21-mnist"
WITNESS = (0.74803925, 0.7558824)

# -- the option and the command --------------------------------------------------------------------


@pytest.mark.parametrize("version", ["", "_v2"])
def test_the_command_reads_what_it_printed(
    version: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, spec = str(TINY[0]), str(EXAMPLES / "vnnlib" / f"tiny_unsafe{version}.vnnlib")
    found = tmp_path / "found.txt"
    assert cli.main([model, spec, str(found), "--device", "cpu"]) == 1
    short = tmp_path / "short.txt"
    short.write_text(found.read_text().removeprefix("sat\n"))
    asked_for: list[Any] = []
    right = cli._decide

    def decide(model: str, spec: str, options: Options, printer: Any) -> Any:
        asked_for.append(options.watch)
        return right(model, spec, options, printer)

    monkeypatch.setattr(cli, "_decide", decide)
    for file in (found, short):
        assert (
            cli.main([model, spec, "--device", "cpu", "--no-attack", "--watch-point", str(file)])
            == 1
        )
    assert asked_for == [WITNESS, WITNESS]
    assert capsys.readouterr().out.count("sat\n") == 3


@pytest.mark.parametrize(
    "text",
    ["", "sat\n", "unsat\n", "((X_0 1))", "((X_0 1)\n (X_1 2)\n (X_2 3))", "((X_0 1) (X_1 a))"],
)
def test_a_file_that_does_not_fit_is_an_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "point.txt"
    file.write_text(text)
    assert cli.main([str(TINY[0]), str(TINY[1]), "--watch-point", str(file)]) == 2
    assert "holds no counterexample with the property's 2 inputs" in capsys.readouterr().err
    assert cli.main([str(TINY[0]), str(TINY[1]), "--watch-point", str(tmp_path / "none.txt")]) == 2


@pytest.mark.parametrize(
    "point", [(), (0.5,), (0.5, 0.5, 0.5), (0.5, float("nan")), (float("inf"), 0.5)]
)
def test_a_point_that_no_input_can_be_is_an_error(point: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="point to watch"):
        verify(*TINY, Options(device="cpu", watch=point))


def test_a_point_that_tests_nothing_is_a_warning() -> None:
    safe = EXAMPLES / "vnnlib" / "tiny_safe.vnnlib"
    for spec, point, word in (
        (TINY[1], (0.0, 0.0), "lies outside the box"),
        (safe, (0.5, 0.5), "is no counterexample"),
    ):
        found = verify(TINY[0], spec, Options(device="cpu", watch=point)).details["warnings"]
        assert found == [f"the watched point {word}"]
    assert not verify(*TINY, Options(device="cpu", watch=WITNESS)).details["warnings"]


def test_a_point_outside_the_box_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Knowledge, "find_unsafe", lambda *args: None)  # loses every counterexample
    assert (
        verify(*TINY, Options(device="cpu", attack=False, watch=(99.0, -99.0))).verdict
        is Verdict.UNSAT
    )
    with pytest.raises(SoundnessError, match="the watched point is lost"):
        verify(*TINY, Options(device="cpu", attack=False, watch=WITNESS))


# -- planted bugs ----------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def changed(place: Any, name: str, change: Callable[..., Any]) -> Plant:
    """A bug: `change` gets a function's result and its arguments."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **more: change(right(*args, **more), *args))

    return plant


def hull_without(row: int) -> Callable[..., Any]:
    """A hull that has lost one of its corners."""

    def change(hull: Any, *args: Any) -> Any:
        keep = [i for i in range(hull.z.shape[1]) if i != row % hull.z.shape[1]]
        return dataclasses.replace(hull, z=hull.z[:, keep or [0]], y=hull.y[:, keep or [0]])

    return change


def less(name: str = "constant", by: int = 1) -> Callable[..., Any]:
    """One of a result's fields is too small; nothing where there is no result."""
    return lambda found, *args: (
        found and dataclasses.replace(found, **{name: getattr(found, name) - by})
    )


def without_lowest(nodes: Any, *args: Any) -> Any:
    """Subproblems whose cut values have all lost their lowest integer."""
    return dataclasses.replace(nodes, lower=np.minimum(nodes.lower + 1, nodes.upper))


BUGS: dict[str, Plant] = {
    "thresholds too high": changed(StaircaseRelaxation, "begin", lambda t, *args: t + 1),
    "thresholds too low": changed(StaircaseRelaxation, "begin", lambda t, *args: t - 1),
    "a region dropped": changed(
        regions.Compiler, "regions", lambda found, *args: found and found[1:]
    ),
    "steps that begin late": changed(regions._Steps, "at_least", less()),
    "ties of lines lost": changed(regions.Compiler, "_line", less()),
    "regions refuted at zero": changed(
        unsafe_regions.UnsafeRegions, "objective", less("constants")
    ),
    "bounds too low": changed(dual.Dual, "upper", lambda total, *args: total - (1 << 18)),
    "no slack": changed(relax, "slack_of", lambda slack, *args: slack * 0),
    "a staircase's hull without a corner": changed(StaircaseRelaxation, "hull", hull_without(1)),
    "a table's hull without an entry": changed(table.TableRelaxation, "hull", hull_without(-1)),
    "a sum's hull too low": changed(table.PairwiseRelaxation, "hull", less("y")),
    "a maximum's bound too low": changed(
        MaxHull, "best", lambda found, *args: (found[0] - (1 << 17), *found[1:])
    ),
    "intermediate bounds too tight": changed(
        relax.NonlinearRelaxation, "narrowed", lambda r, *args: (r[0], (r[1][0] + 1, r[1][1]))
    ),
    "CROWN bounds too tight": changed(
        intermediate, "_by_crown", lambda r, *args: ((r[0][0] + 3, r[0][1] - 3), r[1])
    ),
    "an interval too short": changed(
        Requantize, "interval", lambda box, *args: (box[0], np.maximum(box[0], box[1] - 1))
    ),
    "everything refuted": changed(
        Intervals, "refute", lambda r, *args: dataclasses.replace(r, cases=r.cases | True)
    ),
    "single code vectors not looked at": changed(
        Knowledge, "find_unsafe", lambda found, *args: None
    ),
    "halves that leave a gap": changed(
        splitting, "halves", lambda h, *args: (np.minimum(h[0] + 1, h[1]), h[1])
    ),
    "parts that leave a gap": changed(frontier.Frontier, "pop_block", without_lowest),
}


def with_rules(name: str, count: int) -> Callable[[Any], Network]:
    """Random networks in which so many nodes have this rule."""

    def make(rng: Any) -> Network:
        while True:
            network = random_network(rng)
            rules = dual.Dual.make(network, CPU).rules
            if (
                sum(
                    isinstance(rule, relax.NonlinearRelaxation) and rule.name == name
                    for rule in rules
                )
                >= count
            ):
                return network

    return make


def to_codes(rng: Any) -> Network:
    """A random network whose last value is a requantization."""
    while True:
        network = random_network(rng)
        if isinstance(network.nodes[network.outputs[0] - 1].op, Requantize):
            return network


NEEDS = {  # other networks than any
    "no slack": shortcut,
    "steps that begin late": to_codes,
    "a table's hull without an entry": with_rules("scan", 1),
    "a sum's hull too low": with_rules("sum", 1),
    "a maximum's bound too low": with_rules("max", 1),
    "intermediate bounds too tight": with_rules("staircase", 2),
    "CROWN bounds too tight": with_rules("staircase", 2),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[name](monkeypatch)
    monkeypatch.setattr(bab, "SPLITTABLE", 12 if name.startswith("halves") else 0)
    for seed in range(600):
        rng = np.random.default_rng([9, seed])
        query = asked(rng, 200, NEEDS.get(name, random_network))
        try:
            if query.searched(query.watched(rng)).verdict != query.expected:
                return
        except SoundnessError as error:
            assert "the watched point is lost" in str(error)
            return
    pytest.fail("nothing noticed it")


# -- with the falsifier off ------------------------------------------------------------------------


def falsified(model: Path, spec: Path, seconds: float) -> Verdict:
    """The verdict without the attack, while the counterexample that the attack has found is
    watched."""
    found = verify(model, spec, Options(device="cpu", timeout=60))
    assert found.verdict is Verdict.SAT and found.witness is not None
    point = tuple(float(v) for array in found.witness.inputs for v in array.reshape(-1))
    return verify(
        model, spec, Options(device="cpu", timeout=seconds, attack=False, watch=point)
    ).verdict


def known_to_be_unsafe() -> list[tuple[str, str]]:
    with (EXAMPLES / "expected.csv").open(newline="") as file:
        rows = [(onnx, vnnlib) for onnx, vnnlib, verdict in csv.reader(file) if verdict == "sat"]
    return rows if ROUNDS > 1 else [row for row in rows if "mnist" not in row[0] or "qop" in row[0]]


@pytest.mark.parametrize("onnx,vnnlib", known_to_be_unsafe())
def test_without_the_attack_an_unsafe_example_is_never_unsat(onnx: str, vnnlib: str) -> None:
    assert falsified(EXAMPLES / onnx, EXAMPLES / vnnlib, 5 if ROUNDS > 1 else 2) in (
        Verdict.SAT,
        Verdict.TIMEOUT,
    )


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared/benchmarks is not here")
@pytest.mark.parametrize("name", ["0104_eps2", "0158_eps2", "0233_eps3", "0282_eps3", "0300_eps4"])
def test_without_the_attack_an_unsafe_instance_is_never_unsat(name: str) -> None:
    verdict = falsified(
        SHARED / "mnist_784-64-32_6bit.onnx", SHARED / "vnnlib" / f"sample{name}.vnnlib", 5
    )
    assert verdict in (Verdict.SAT, Verdict.TIMEOUT)
