"""A model made ready once, to decide many queries: how problems are made of it, and how counterexamples leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import runtime
from qverify.bounds.dual import Dual
from qverify.bounds.regions import Output
from qverify.bounds.unsafe import make_unsafe
from qverify.check import NotReplayed, replay
from qverify.errors import SoundnessError, SpecError
from qverify.frontend.boundary import Domain, Encoder, make_domain, make_encoder
from qverify.frontend.model import Model
from qverify.frontend.outputs import Decoder, described_outputs, make_decoder
from qverify.kernels import Kernels, open_kernels
from qverify.network import Network
from qverify.propagate import Propagator, make_propagator
from qverify.property import Query
from qverify.result import Verdict, Witness
from qverify.search.problem import Candidate, Problem


@dataclass(frozen=True, eq=False)
class Engine:
    """A model with everything that its queries share."""

    read: Model
    kernels: Kernels
    network: Network  # on the machine of `kernels`
    encoder: Encoder
    decoder: Decoder
    dual: Dual | None  # None: no backward bounds
    described: Sequence[Output]
    propagator: Propagator

    @staticmethod
    def make(read: Model, kernels: Kernels, backward: bool) -> Engine:
        """Prepare a model for a machine, with the backward bounds or without."""
        network = read.lowered.network.on(kernels)
        return Engine(
            read,
            kernels,
            network,
            make_encoder(read.lowered),
            make_decoder(read.lowered),
            Dual.make(read.lowered.network, kernels) if backward else None,
            described_outputs(read.lowered),
            make_propagator(network, kernels),
        )

    def problem(self, query: Query, domain: Domain | None = None) -> Problem:
        """A query, ready to be searched; `domain` is its box's where that is known already. Raises SpecError for a box
        without a point or beyond float32."""
        domain = make_domain(self.encoder, query.box) if domain is None else domain
        lower, upper = domain.code_box()
        unsafe = make_unsafe(query, len(self.encoder.is_float), self.decoder.grid)
        ask = None if self.decoder.exact else self.file_function()
        problem = Problem(self.kernels, self.network, domain, self.decoder, unsafe, lower, upper, ask)
        problem.dual, problem.described, problem.propagator = self.dual, self.described, self.propagator
        return problem

    def file_function(self) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        """The user's file in onnxruntime as a function of flat inputs."""
        session = runtime.Session(self.read.path)

        def run(flat: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            outputs = session.run(self.graph_inputs(flat))
            return np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in outputs])

        return run

    def graph_inputs(self, flat: npt.NDArray[np.float64]) -> list[npt.NDArray[Any]]:
        """Flat input values as the graph's input arrays."""
        arrays, start = [], 0
        for _, shape, dtype in self.read.lowered.inputs:
            size = int(np.prod(shape))
            arrays.append(flat[start : start + size].astype(dtype).reshape(shape))
            start += size
        return arrays

    def replayed(self, query: Query, problem: Problem, candidate: Candidate) -> tuple[Verdict, str, Witness | None]:
        """`sat` with its witness only after the replay; otherwise `unknown` with the reason."""
        exactly = problem.unsafe.mixed
        try:
            decimals = (problem.domain.decimal_for(i, float(v), exactly) for i, v in enumerate(candidate.inputs))
            text = tuple(decimals)
            witness = replay(self.read.path, query, self.graph_inputs(candidate.inputs), text, candidate.outputs)
        except SpecError as error:  # no decimal inside the bounds is read as the float32 that was found
            return Verdict.UNKNOWN, f"a counterexample was found, but cannot be written down: {error}", None
        except NotReplayed as error:
            reason = f"a counterexample of the integer network did not replay on the file ({error}); please report this"
            return Verdict.UNKNOWN, reason, None
        return Verdict.SAT, "", witness

    def cross_check(self) -> list[str]:
        """Compare the integer network with onnxruntime running the file with default options, on a few inputs.

        Returns warnings: on x86 without VNNI a network that can saturate is computed differently there. Any other
        difference raises SoundnessError, since no verdict may be built on it.
        """
        lowered, encoder = self.read.lowered, self.encoder
        rng, kernels = np.random.default_rng(0), open_kernels("cpu")
        count = int(np.clip(2e7 / lowered.network.elements_per_point(), 1, 16))
        wide = rng.choice([1.0, 10.0, 255.0], size=(count, 1)) * rng.uniform(-1, 1, size=(count, len(encoder.is_float)))
        whole = rng.integers(encoder.low, encoder.high, size=wide.shape, endpoint=True)
        flat = np.where(encoder.is_float, wide.astype(np.float32).astype(np.float64), whole)
        ask = self.file_function()
        actual = np.stack([ask(row) for row in flat])
        with np.errstate(over="ignore"):
            ours = self.decoder.decode(lowered.network.run(kernels, encoder.encode(flat)))
        with np.errstate(invalid="ignore"):  # infinities on both sides are equal
            same = (actual == ours) | (np.abs(actual - ours) <= self.decoder.error)
        if same.all():
            return []
        if lowered.saturable and runtime.saturates():
            return [
                "onnxruntime computes other integers on this CPU (x86 without VNNI); the verdict is for exact accumulation"
            ]
        raise SoundnessError(
            f"{self.read.path}: onnxruntime's outputs differ from the integer network's; please report this model"
        )
