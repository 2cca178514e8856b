"""The whole story on one screen: read model and property, search each query, replay, answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qverify import runtime
from qverify.boundary.fit import check_fit
from qverify.certificate import certificate
from qverify.deadline import Deadline, TimeUp
from qverify.engine import Engine
from qverify.errors import EmptyBox, SpecError, Undecided, UsageError
from qverify.frontend.model import Model, read_model
from qverify.frontend.shapes import declared_shapes, shapes_text
from qverify.kernels import Kernels, open_kernels
from qverify.options import Options
from qverify.property import Property, Query
from qverify.result import Progress, Result, Stats, Verdict
from qverify.search.bab import search
from qverify.search.branch import RULES
from qverify.search.problem import Problem
from qverify.search.proof import Proof
from qverify.search.run import Outcome
from qverify.search.watch import Watch
from qverify.vnnlib.reader import property_sha256, read_property

DEFAULTS = Options()


def verify(
    model: str | os.PathLike[str],
    spec: str | os.PathLike[str],
    options: Options = DEFAULTS,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Decide whether the quantized network in `model` can violate the property in `spec`.

    Returns SAT with a witness that onnxruntime has confirmed on the file, UNSAT where that is
    proved impossible, TIMEOUT, or UNKNOWN with a reason, also where memory runs out. Raises a
    QverifyError (one clear line) for input that cannot be read or is not supported.
    """
    deadline = Deadline.after(options.timeout)
    if options.branch not in RULES:
        raise UsageError(f"no branching rule '{options.branch}': use one of {', '.join(RULES)}")
    stats = Stats()
    try:
        with deadline.limits():
            return _verify(Path(model), Path(spec), options, progress, deadline, stats)
    except TimeUp:
        verdict = Verdict.TIMEOUT
        reason = "time is up while the model or the property was made ready"
    except MemoryError:
        verdict = Verdict.UNKNOWN
        reason = "not enough memory; a smaller --batch may help"
    stats.seconds = deadline.elapsed()
    return Result(verdict, reason, None, stats)


def _verify(
    path: Path,
    spec_path: Path,
    options: Options,
    progress: Callable[[Progress], None] | None,
    deadline: Deadline,
    stats: Stats,
) -> Result:
    kernels = open_kernels(options.device)
    prop = read_property(spec_path)
    read = read_model(path, options.shapes, declared_shapes(prop))
    remarks = check_fit(prop, read.lowered, spec_path)
    stats.load_seconds = deadline.elapsed()
    engine = Engine.make(read, kernels, options.backward)
    rng = np.random.default_rng(options.seed)
    details = _details(read, prop, spec_path, kernels)
    details["warnings"] += [*remarks, *engine.cross_check()]
    if options.certificate:
        details["reading"] = read.lowered.digest()
    unknown: Outcome | None = None
    empty: list[str] = []  # why queries allow no input
    proofs = _wanted_proofs(options, prop, engine)
    for query in prop.queries:
        try:
            problem = _problem(engine, query, spec_path)
        except EmptyBox as error:
            empty.append(str(error))
            if proofs is not None:
                proofs.append(Proof())
            continue
        watch = _watch(problem, options.watch)
        if options.watch is not None and (watch is None or not watch.holds.any()):
            why = "lies outside the box" if watch is None else "is no counterexample"
            details["warnings"].append(
                f"the watched point {why}" + (" of a query" if len(prop.queries) > 1 else "")
            )
        try:
            proof = _new_proof(proofs)
            outcome = search(problem, options, deadline, rng, stats, progress, proof, watch)
        except Undecided as error:
            outcome = Outcome(Verdict.UNKNOWN, str(error))
        stats.seconds = deadline.elapsed()
        details["intervals_by"] = engine.propagator.name
        details["warnings"] += engine.propagator.take_warnings()
        if outcome.verdict is Verdict.SAT:
            # What was found in time is replayed, however long that takes.
            with Deadline.after(None).limits():
                found = _answer_sat(engine, query, problem, outcome, stats, details, deadline)
            if found.verdict is Verdict.SAT:
                return _certified(found, proofs)
            outcome = Outcome(found.verdict, found.reason)
        if outcome.verdict is Verdict.TIMEOUT:
            return Result(Verdict.TIMEOUT, outcome.reason, None, stats, details)
        if outcome.verdict is Verdict.UNKNOWN:
            unknown = outcome
        else:
            if doubt := engine.confirm(problem):
                unknown = Outcome(Verdict.UNKNOWN, doubt)
            if watch is not None:
                watch.unsat()
    details["warnings"] += _said_of(empty)
    stats.seconds = deadline.elapsed()
    if unknown is not None:
        return Result(Verdict.UNKNOWN, unknown.reason, None, stats, details)
    why = (
        "every part of the input box is proved"
        if len(empty) < len(prop.queries)
        else "no input is allowed"
    )
    return _certified(Result(Verdict.UNSAT, why, None, stats, details), proofs)


def _said_of(empty: list[str]) -> list[str]:
    """A warning about queries that allow no input, if there are any."""
    more = f" (and so are {len(empty) - 1} more)" if len(empty) > 1 else ""
    return (
        [f"a part of the property allows no input and is refuted{more}: {empty[0]}"]
        if empty
        else []
    )


def _wanted_proofs(options: Options, prop: Property, engine: Engine) -> list[Proof] | None:
    """Where the proofs of the queries will be, if a certificate is wanted.

    UsageError, before the search, where there can be none: no search can tell beforehand which
    query it will end with.
    """
    if not options.certificate:
        return None
    mixed = prop.mixed
    if mixed or not engine.leaves.exact:
        why = "its conditions mention inputs" if mixed else "the model ends in a float sum"
        if not engine.network.exact:
            why = "the model adds floats in an order that is not known"
        raise UsageError(
            f"there is no certificate for this property: {why}; leave out --certificate"
        )
    return []


def _new_proof(proofs: list[Proof] | None) -> Proof | None:
    """The next proof to be filled, if certificates are wanted."""
    if proofs is None:
        return None
    proofs.append(Proof())
    return proofs[-1]


def _certified(result: Result, proofs: list[Proof] | None) -> Result:
    if proofs is None or result.verdict not in (Verdict.SAT, Verdict.UNSAT):
        return result
    return replace(result, certificate=certificate(result, proofs))


def _problem(engine: Engine, query: Query, spec: Path) -> Problem:
    try:
        return engine.problem(query)
    except SpecError as error:
        raise type(error)(f"{spec}: {error}") from None


def _watch(problem: Problem, point: tuple[float, ...] | None) -> Watch | None:
    """What `Options.watch` asks for. UsageError where the model has no such inputs."""
    if point is None:
        return None
    is_float, flat = problem.domain.encoder.is_float, np.array(point, np.float64)
    if len(flat) != len(is_float):
        raise UsageError(
            f"the point to watch has {len(flat)} values, but the model has {len(is_float)} input "
            "elements"
        )
    if not np.isfinite(flat).all() or (flat != np.rint(flat))[~is_float].any():
        raise UsageError("the point to watch has a value that its input cannot take")
    with np.errstate(over="ignore"):
        flat = np.where(is_float, flat.astype(np.float32).astype(np.float64), flat)
    return Watch.make(
        problem.kernels,
        problem.network,
        problem.domain,
        problem.decoder,
        problem.unsafe,
        problem.runtime,
        flat,
    )


def _answer_sat(
    engine: Engine,
    query: Query,
    problem: Problem,
    outcome: Outcome,
    stats: Stats,
    details: dict[str, Any],
    deadline: Deadline,
) -> Result:
    """`sat` only after the replay; otherwise `unknown` with the reason."""
    assert outcome.candidate is not None
    verdict, reason, witness = engine.replayed(query, problem, outcome.candidate)
    if witness is not None:
        details["onnxruntime"] = runtime.version()
    stats.seconds = deadline.elapsed()
    return Result(verdict, reason or outcome.reason, witness, stats, details)


def _details(read: Model, prop: Property, spec: Path, kernels: Kernels) -> dict[str, Any]:
    """What a verdict is about: recorded with it."""
    saturable = read.lowered.saturable
    return {
        "device": kernels.description,
        "machine": runtime.machine(),
        "semantics": "exact int32 accumulation, "
        "float32 requantization as onnxruntime's CPU provider",
        "read_by": f"onnxruntime {read.runtime_version}'s fused graph",
        "x86_without_vnni": f"may saturate in {len(saturable)} node(s)"
        if saturable
        else "computes the same integers",
        "model_sha256": read.sha256,
        "shapes": shapes_text(read.shapes),
        "spec_sha256": property_sha256(spec),
        "warnings": [*read.warnings, *_doubts(prop)],
        "property": prop,
    }


def _doubts(prop: Property) -> list[str]:
    """What is odd about a property, and hardly meant."""
    doubts = list(prop.doubts)
    if any(not any(row.y for row in case) for query in prop.queries for case in query.cases):
        doubts.append(
            "the property calls some inputs unsafe whatever the outputs are: is a condition on "
            "the outputs missing?"
        )
    return doubts
