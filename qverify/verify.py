"""The whole story on one screen: read the model and the property, search each query, replay, answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import runtime
from qverify.bounds.dual import Dual
from qverify.bounds.unsafe import make_unsafe
from qverify.certificate import certificate
from qverify.check import NotReplayed, replay
from qverify.deadline import Deadline
from qverify.errors import SoundnessError, SpecError, UsageError
from qverify.frontend.boundary import Encoder, make_domain, make_encoder
from qverify.frontend.model import Model, read_model
from qverify.frontend.outputs import Decoder, described_outputs, make_decoder
from qverify.frontend.vnnlib import read_property
from qverify.kernels import Kernels, open_kernels
from qverify.network import Network
from qverify.options import Options
from qverify.propagate import make_propagator
from qverify.property import Property, Query, Variable
from qverify.result import Progress, Result, Stats, Verdict, Witness
from qverify.search.bab import Outcome, search
from qverify.search.branch import RULES
from qverify.search.problem import Candidate, Problem, Undecided
from qverify.search.proof import Proof
from qverify.search.watch import Watch

DEFAULTS = Options()


def verify(
    model: str | os.PathLike[str],
    spec: str | os.PathLike[str],
    options: Options = DEFAULTS,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Decide whether the quantized network in `model` can violate the property in `spec`.

    Returns SAT with a witness that onnxruntime has confirmed on the file, UNSAT where that is proved impossible, TIMEOUT,
    or UNKNOWN with a reason. Raises a QverifyError (one clear line) for input that cannot be read or is not supported.
    """
    deadline = Deadline.after(options.timeout)
    if options.branch not in RULES:
        raise UsageError(f"no branching rule '{options.branch}': use one of {', '.join(RULES)}")
    if options.batch is not None and options.batch < 1:
        raise UsageError(f"a batch of {options.batch} boxes is not possible: use at least 1")
    if options.timeout is not None and not options.timeout > 0:
        raise UsageError(f"a time limit of {options.timeout} seconds is not possible: use a positive number")
    path, spec_path = Path(model), Path(spec)
    kernels = open_kernels(options.device)
    read = read_model(path)
    prop = read_property(spec_path)
    _check_fit(prop, read, spec_path)
    encoder, decoder = make_encoder(read.lowered), make_decoder(read.lowered)
    stats = Stats(load_seconds=deadline.elapsed())
    network = read.lowered.network.on(kernels)
    dual = Dual.make(read.lowered.network, kernels) if options.backward else None
    described = described_outputs(read.lowered)
    propagator = make_propagator(network, kernels)
    rng = np.random.default_rng(options.seed)
    details = _details(read, prop, spec_path, kernels)
    if read.runtime_version is not None:  # otherwise onnxruntime is not there to compare with
        details["warnings"] += _cross_check(read, encoder, decoder)
    unknown: Outcome | None = None
    proofs: list[Proof] | None = [] if options.certificate else None
    for query in prop.queries:
        problem = _problem(read, kernels, network, encoder, decoder, query, spec_path)
        problem.dual, problem.described, problem.propagator = dual, described, propagator
        problem.watch = _watch(problem, options.watch)
        if options.watch is not None and (problem.watch is None or not problem.watch.holds.any()):
            why = "lies outside the box" if problem.watch is None else "is no counterexample"
            details["warnings"].append(f"the watched point {why}" + (" of a query" if len(prop.queries) > 1 else ""))
        try:
            outcome = search(problem, options, deadline, rng, stats, progress, _new_proof(problem, proofs))
        except Undecided as error:
            outcome = Outcome(Verdict.UNKNOWN, str(error))
        stats.seconds = deadline.elapsed()
        details["intervals_by"] = propagator.name
        if outcome.verdict is Verdict.SAT:
            assert outcome.candidate is not None
            found = _answer_sat(read, query, problem, outcome.candidate, outcome.reason, stats, details, deadline)
            return _certified(found, proofs)
        if outcome.verdict is Verdict.TIMEOUT:
            return Result(Verdict.TIMEOUT, outcome.reason, None, stats, details)
        if outcome.verdict is Verdict.UNKNOWN:
            unknown = outcome
        elif problem.watch is not None:
            problem.watch.unsat()
        if proofs is not None:
            problem.note(proofs[-1])
            if problem.unrealised:
                details["warnings"].append("no certificate: the proof meets unsafe codes that no input produces")
                proofs = None
    stats.seconds = deadline.elapsed()
    if unknown is not None:
        return Result(Verdict.UNKNOWN, unknown.reason, None, stats, details)
    return _certified(Result(Verdict.UNSAT, "every part of the input box is proved", None, stats, details), proofs)


def _new_proof(problem: Problem, proofs: list[Proof] | None) -> Proof | None:
    """A proof to be filled, if certificates are wanted. UsageError where there can be none."""
    if proofs is None:
        return None
    if problem.unsafe.mixed or not problem.decoder.exact:
        why = "its conditions mention inputs" if problem.unsafe.mixed else "the model ends in a float sum"
        raise UsageError(f"there is no certificate for this property: {why}; leave out --certificate")
    proofs.append(Proof())
    return proofs[-1]


def _certified(result: Result, proofs: list[Proof] | None) -> Result:
    if proofs is None or result.verdict not in (Verdict.SAT, Verdict.UNSAT):
        return result
    return replace(result, certificate=certificate(result, proofs))


def _cross_check(read: Model, encoder: Encoder, decoder: Decoder) -> list[str]:
    """Compare the integer network with onnxruntime running the file with default options, on a few inputs.

    Returns warnings: on x86 without VNNI a network that can saturate is computed differently there. Any other difference
    raises SoundnessError, since no verdict may be built on it.
    """
    rng, kernels = np.random.default_rng(0), open_kernels("cpu")
    count = int(np.clip(2e7 / read.lowered.network.elements_per_point(), 1, 16))
    wide = rng.choice([1.0, 10.0, 255.0], size=(count, 1)) * rng.uniform(-1, 1, size=(count, len(encoder.is_float)))
    whole = rng.integers(encoder.low, encoder.high, size=wide.shape, endpoint=True)
    flat = np.where(encoder.is_float, wide.astype(np.float32).astype(np.float64), whole)
    ask = _runtime(read)
    actual = np.stack([ask(row) for row in flat])
    with np.errstate(over="ignore"):
        ours = decoder.decode(read.lowered.network.run(kernels, encoder.encode(flat)))
    with np.errstate(invalid="ignore"):  # infinities on both sides are equal
        same = (actual == ours) | (np.abs(actual - ours) <= decoder.error)
    if same.all():
        return []
    if read.lowered.saturable and runtime.saturates():
        return [
            "onnxruntime computes other integers on this CPU (x86 without VNNI); the verdict is for exact accumulation"
        ]
    raise SoundnessError(
        f"{read.path}: onnxruntime's outputs differ from the integer network's; please report this model"
    )


def _problem(
    read: Model, kernels: Kernels, network: Network, encoder: Encoder, decoder: Decoder, query: Query, spec: Path
) -> Problem:
    try:
        domain = make_domain(encoder, query.box)
    except SpecError as error:
        raise SpecError(f"{spec}: {error}") from None
    lower, upper = domain.code_box()
    unsafe = make_unsafe(query, len(encoder.is_float), decoder.grid)
    ask = None if decoder.exact or not runtime.available() else _runtime(read)
    return Problem(kernels, network, domain, decoder, unsafe, lower, upper, ask)


def _watch(problem: Problem, point: tuple[float, ...] | None) -> Watch | None:
    """What `Options.watch` asks for. UsageError where the model has no such inputs."""
    if point is None:
        return None
    is_float, flat = problem.domain.encoder.is_float, np.array(point, np.float64)
    if len(flat) != len(is_float):
        raise UsageError(f"the point to watch has {len(flat)} values, but the model has {len(is_float)} input elements")
    if not np.isfinite(flat).all() or (flat != np.rint(flat))[~is_float].any():
        raise UsageError("the point to watch has a value that its input cannot take")
    with np.errstate(over="ignore"):
        flat = np.where(is_float, flat.astype(np.float32).astype(np.float64), flat)
    own = problem
    return Watch.make(own.kernels, own.network, own.domain, own.decoder, own.unsafe, own.runtime, flat)


def _runtime(read: Model) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """The user's file in onnxruntime as a function of flat inputs."""
    session = runtime.Session(read.path)

    def run(flat: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        outputs = session.run(_graph_inputs(read, flat))
        return np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in outputs])

    return run


def _answer_sat(
    read: Model,
    query: Query,
    problem: Problem,
    candidate: Candidate,
    reason: str,
    stats: Stats,
    details: dict[str, Any],
    deadline: Deadline,
) -> Result:
    """`sat` only after the replay; otherwise `unknown` with the reason."""
    inputs = _graph_inputs(read, candidate.inputs)
    witness: Witness | None = None
    verdict = Verdict.UNKNOWN
    if not runtime.available():
        reason = "a counterexample was found, but it cannot be replayed without onnxruntime: pip install 'qverify[cpu]'"
    else:
        try:
            exactly = problem.unsafe.mixed
            decimals = (problem.domain.decimal_for(i, float(v), exactly) for i, v in enumerate(candidate.inputs))
            text = tuple(decimals)
            witness = replay(read.path, query, inputs, text, candidate.outputs)
            verdict = Verdict.SAT
            details["onnxruntime"] = runtime.version()
        except SpecError as error:  # no decimal inside the bounds is read as the float32 that was found
            reason = f"a counterexample was found, but cannot be written down: {error}"
        except NotReplayed as error:
            reason = f"a counterexample of the integer network did not replay on the file ({error}); please report this"
    stats.seconds = deadline.elapsed()
    return Result(verdict, reason, witness, stats, details)


def _graph_inputs(read: Model, flat: npt.NDArray[np.float64]) -> list[npt.NDArray[Any]]:
    """Flat input values as the graph's input arrays."""
    arrays, start = [], 0
    for _, shape, dtype in read.lowered.inputs:
        size = int(np.prod(shape))
        arrays.append(flat[start : start + size].astype(dtype).reshape(shape))
        start += size
    return arrays


def _check_fit(prop: Property, read: Model, spec: Path) -> None:
    """Raise SpecError unless the property's variables are the model's inputs and outputs."""
    lowered = read.lowered
    for what, declared, actual in (
        ("input", prop.inputs, lowered.inputs),
        ("output", prop.outputs, lowered.graph_outputs),
    ):
        wanted = sum(int(np.prod(shape)) for _, shape, _ in actual)
        given = sum(int(np.prod(v.shape)) for v in declared)
        if wanted != given:
            raise SpecError(
                f"{spec}: it declares {given} {what} elements, but the model has {wanted}: another model's?"
            )
        if prop.version.startswith("1"):
            integers = any(v.dtype.lower() == "int" for v in declared)
            if integers and any(dtype == np.float32 for _, _, dtype in actual):
                raise SpecError(f"{spec}: it declares Int {what}s, but the model's are float32: declare Real")
            continue
        if len(declared) != len(actual):
            raise SpecError(f"{spec}: it declares {len(declared)} {what}s, but the model has {len(actual)}")
        for variable, (name, shape, dtype) in zip(declared, actual, strict=True):
            _check_variable(spec, variable, name, shape, dtype)


def _check_variable(spec: Path, variable: Variable, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if tuple(variable.shape) != shape:
        raise SpecError(f"{spec}: {variable.name} has shape {list(variable.shape)}, the model's '{name}' {list(shape)}")
    if variable.dtype.lower() not in ("real", str(dtype)):
        raise SpecError(f"{spec}: {variable.name} is {variable.dtype}, the model's '{name}' is {dtype}")


def _details(read: Model, prop: Property, spec: Path, kernels: Kernels) -> dict[str, Any]:
    """What a verdict is about: recorded with it."""
    saturable = read.lowered.saturable
    return {
        "device": kernels.description,
        "semantics": "exact int32 accumulation, float32 requantization as onnxruntime's CPU provider",
        "read_by": f"onnxruntime {read.runtime_version}'s fused graph" if read.runtime_version else "directly",
        "x86_without_vnni": f"may saturate in {len(saturable)} node(s)" if saturable else "computes the same integers",
        "model_sha256": read.sha256,
        "spec_sha256": hashlib.sha256(_spec_file(spec).read_bytes()).hexdigest(),
        "warnings": [*read.warnings, *_doubts(prop)],
        "property": prop,
    }


def _doubts(prop: Property) -> list[str]:
    """What is odd about a property, and hardly meant."""
    if any(not any(row.y for row in case) for query in prop.queries for case in query.cases):
        return [
            "the property calls some inputs unsafe whatever the outputs are: is a condition on the outputs missing?"
        ]
    return []


def _spec_file(spec: Path) -> Path:
    """The file that `read_property` read: PATH, or PATH.gz where only that exists."""
    return spec if spec.exists() else spec.with_name(spec.name + ".gz")
