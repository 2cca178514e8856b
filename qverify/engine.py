"""A model made ready once, to decide many queries: their problems, and the door for `sat`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify import runtime
from qverify.boundary.domain import Domain, make_domain
from qverify.boundary.leaves import Leaves, make_leaves
from qverify.boundary.outputs import Decoder, described_outputs, make_decoder
from qverify.boundary.readings import make_readings
from qverify.bounds.dual import Dual
from qverify.bounds.regions import Output
from qverify.bounds.unsafe import make_unsafe
from qverify.errors import SoundnessError, SpecError, Undecided, UsageError
from qverify.frontend.encoder import Encoder, make_encoder
from qverify.frontend.model import Model
from qverify.frontend.shapes import shapes_text
from qverify.kernels import Kernels
from qverify.network import Network
from qverify.propagate import Propagator, make_propagator
from qverify.property import Query
from qverify.replay import NotReplayed, replay
from qverify.result import Verdict, Witness
from qverify.search.problem import Candidate, Problem

FIX_THE_SHAPES = (
    "fix the shapes in the file (onnxruntime.tools.make_dynamic_shape_fixed) to run what is "
    "verified"
)
# Of the outputs' range: up to here, a difference is no more than another rounding of some codes.
FUSION_SHARE = 0.005


@dataclass(frozen=True)
class AsWritten:
    """How the file's graph as it is written differs from the one that onnxruntime makes of it.

    The outputs differ by at most `share` of their range, on `inputs` of `count` random inputs, on
    `turned` with another largest output.
    """

    share: float
    inputs: int
    turned: int
    count: int

    @property
    def text(self) -> str:
        if not self.inputs:
            return (
                f"the unoptimised graph gives the same outputs as the fused one (on {self.count} "
                "random inputs)"
            )
        return (
            "onnxruntime's fused graph, which verdicts are about, differs from the unoptimised "
            "graph as it is written on "
            f"{self.inputs} of {self.count} random inputs, by up to {self.share:.2%} of the "
            "outputs' range"
            + (f"; on {self.turned} another output is the largest" if self.turned else "")
        )


_WRITTEN: dict[str, AsWritten] = {}  # by a model's identity: asked once in a process


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
        """A query, ready to be searched; `domain` is its box's, where it is known already.

        Raises EmptyBox for a box without a point, SpecError for one beyond float32.
        """
        domain = make_domain(self.encoder, query.box) if domain is None else domain
        lower, upper = domain.code_box()
        read = make_readings(query, domain, self.decoder)
        unsafe = make_unsafe(read.possible, len(self.encoder.is_float), self.decoder.grid)
        ask = None if self.leaves.exact else self._ask
        certain = None
        if read.certain is not read.possible:
            certain = make_unsafe(read.certain, len(self.encoder.is_float), self.decoder.grid)
        return Problem(
            self.kernels,
            self.network,
            domain,
            self.decoder,
            unsafe,
            lower,
            upper,
            ask,
            self.dual,
            self.described,
            self.propagator,
            None if certain is None else read,
            certain,
        )

    def file_function(
        self, as_written: bool = False, with_shapes: bool = True
    ) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        """The user's file in onnxruntime as a function of flat inputs.

        `as_written` is without optimisation. The shapes are those that were fixed to read the file,
        or as open as they are.
        """
        session = runtime.Session(
            self.read.path, as_written, self.read.shapes if with_shapes else {}
        )

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

    def replayed(
        self, query: Query, problem: Problem, candidate: Candidate
    ) -> tuple[Verdict, str, Witness | None]:
        """`sat` with its witness only after the replay; otherwise `unknown` with the reason."""
        exactly = problem.mixed
        try:
            decimals = (
                problem.domain.decimal_for(i, float(v), exactly)
                for i, v in enumerate(candidate.inputs)
            )
            text = tuple(decimals)
            outputs, read = candidate.outputs, self.read
            certain = make_readings(query, problem.domain, self.decoder).certain_at(outputs)
            inputs = self.graph_inputs(candidate.inputs)
            witness = replay(read.path, certain, inputs, text, outputs, read.shapes)
            if read.shapes and read.assumed:
                replay(read.path, certain, inputs, text, outputs, {})
        except SpecError as error:
            # No decimal inside the bounds is read as the float32 that was found.
            reason = f"a counterexample was found, but cannot be written down: {error}"
            return Verdict.UNKNOWN, reason, None
        except NotReplayed as error:
            if self.read.shapes and self.read.assumed:
                reason = (
                    f"a counterexample did not replay on the file as it stands ({error}): "
                    f"{FIX_THE_SHAPES}"
                )
            else:
                reason = (
                    "a counterexample of the integer network did not replay on the file "
                    f"({error}); please report this"
                )
            return Verdict.UNKNOWN, reason, None
        return Verdict.SAT, "", witness

    def cross_check(self) -> list[str]:
        """Compare the network with onnxruntime running the file, on a few inputs; returns warnings.

        With default options, and that with the file as it is written. Raises SoundnessError as
        `_check_same` does.
        """
        flat = self._random_inputs(min(16, self._affordable()))
        self._check_same(flat, "on random inputs")
        if self._saturating:
            return [
                "onnxruntime computes other integers on this CPU (x86 without VNNI); the verdict "
                "is for exact accumulation"
            ]
        warnings = [self.written.text] if self.written.share > FUSION_SHARE else []
        if self.read.shapes:
            warnings.append(
                f"verdicts are about the model with --shape {shapes_text(self.read.shapes)}; "
                f"{FIX_THE_SHAPES}"
            )
        return warnings

    @property
    def written(self) -> AsWritten:
        """The file as written, without optimisation, against what onnxruntime runs by default."""
        if self.read.identity not in _WRITTEN:
            _WRITTEN[self.read.identity] = self._as_written()
        return _WRITTEN[self.read.identity]

    def _as_written(self) -> AsWritten:
        flat = self._random_inputs(min(8, self._affordable()))
        fused, literal = (
            np.stack([ask(row) for row in flat])
            for ask in (self._file, self.file_function(as_written=True))
        )
        if not fused.size:
            return AsWritten(0.0, 0, 0, len(flat))
        with np.errstate(invalid="ignore"):
            gaps = np.where(fused == literal, 0.0, np.abs(fused - literal))
            differ = np.where(np.isnan(gaps), np.inf, gaps).max(axis=1, initial=0.0)
            span = max(fused.max(), literal.max()) - min(fused.min(), literal.min())
        share = 0.0
        if differ.any():
            share = float(differ.max() / span) if np.isfinite(span) and span else 1.0
        turned = np.count_nonzero(fused.argmax(axis=1) != literal.argmax(axis=1))
        return AsWritten(share, int(np.count_nonzero(differ)), int(turned), len(flat))

    def _random_inputs(self, count: int) -> npt.NDArray[np.float64]:
        encoder, rng = self.encoder, np.random.default_rng(0)
        wide = rng.choice([1.0, 10.0, 255.0], size=(count, 1)) * rng.uniform(
            -1, 1, size=(count, len(encoder.is_float))
        )
        whole = rng.integers(encoder.low, encoder.high, size=wide.shape, endpoint=True)
        return np.where(encoder.is_float, wide.astype(np.float32).astype(np.float64), whole)

    def confirm(self, problem: Problem) -> str:
        """Compare the network with the file inside a query's box, before it is said to be safe.

        At the corners of its domain, at random inputs, and at those of many that come nearest to
        being unsafe. Verdicts are sound without this, if the file was read right. If it was not,
        the fault is likeliest to show where the query looks. Raises SoundnessError as `_check_same`
        does.

        Returns why the query is not decided after all, "" if it is: where shapes that the file
        leaves open were fixed without being asked for, the file as it stands may be fused
        otherwise, and is compared as well.
        """
        domain, rng = problem.domain, np.random.default_rng(1)
        count = self._affordable()
        inside = domain.lower + (domain.upper - domain.lower) * rng.random(
            (min(64, 4 * count), len(domain.lower))
        )
        corners = np.where(rng.random(inside.shape) < 0.5, domain.lower, domain.upper)
        many = np.concatenate([domain.lower[None], domain.upper[None], inside[1::2], corners[::2]])
        many = np.where(
            self.encoder.is_float, many.astype(np.float32).astype(np.float64), np.rint(many)
        )
        many = np.clip(many, domain.lower, domain.upper)
        with np.errstate(over="ignore", invalid="ignore"):
            y = self.leaves.nominal(self.encoder.encode(many))
            slack = problem.unsafe.slack(y, many)[0].max(axis=1, initial=-np.inf)
        nearest = np.argsort(-slack[4:], kind="stable")[: max(count // 4, 1)] + 4
        chosen = many[
            np.unique(np.concatenate([np.arange(min(4, len(many))), nearest[: len(many) - 4]]))
        ]
        self._check_same(chosen, "inside the query's box")
        return self._open_doubt(chosen)

    def check_points(self, flat: npt.NDArray[np.float64]) -> None:
        """Compare the network with the file on given inputs [N, inputs].

        Raises SoundnessError as `_check_same` does, and UsageError where the file as it stands,
        with open shapes, computes otherwise.
        """
        self._check_same(flat, "at the ends of an image's box")
        if doubt := self._open_doubt(flat):
            raise UsageError(f"{self.read.path}: {doubt}, or give them with --shape")

    def _open_doubt(self, flat: npt.NDArray[np.float64]) -> str:
        """Why the file as it stands, with open shapes, is not what was read; "" if it is.

        There is a doubt only where shapes were fixed without being asked for.
        """
        if not self.read.shapes or not self.read.assumed or self._saturating:
            return ""
        differ = np.count_nonzero(self._differs(self._open_file, flat))
        if not differ:
            return ""
        return (
            f"with open shapes the file itself gives other outputs (on {differ} of {len(flat)} "
            f"inputs tried): {FIX_THE_SHAPES}"
        )

    def _affordable(self) -> int:
        return int(np.clip(2e7 / self.read.lowered.network.elements_per_point(), 1, 16))

    @functools.cached_property
    def leaves(self) -> Leaves:
        """The outputs at single code vectors, by NumPy, and the file to be asked."""
        return make_leaves(self.read.lowered, self._ask)

    def _ask(self, flat: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The file's outputs for inputs [inputs], where these decide a point."""
        if self._saturating:
            raise Undecided(
                "float sums decide a point, and onnxruntime cannot be asked: it computes other "
                "integers on this CPU (x86 without VNNI)"
            )
        return self._file(flat)

    @functools.cached_property
    def _saturating(self) -> bool:
        """Whether this CPU computes other integers than those that verdicts are about.

        That is x86 without VNNI, on a network that can saturate there.
        """
        return bool(self.read.lowered.saturable) and runtime.saturates()

    @functools.cached_property
    def _open_file(self) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        return self.file_function(with_shapes=False)

    @functools.cached_property
    def _file(self) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        return self.file_function()

    def _check_same(self, flat: npt.NDArray[np.float64], where: str) -> None:
        """Raise SoundnessError unless onnxruntime gives what the network allows.

        For inputs [N, inputs], that is the same bits, or values within its bands: no verdict may be
        built on another network. Where this CPU saturates, nothing is asked.
        """
        if self._saturating:
            return
        if differ := np.count_nonzero(self._differs(self._file, flat)):
            raise SoundnessError(
                f"{self.read.path}: onnxruntime's outputs differ from the integer network's "
                f"{where} "
                f"({differ} of {len(flat)} inputs); please report this model"
            )

    def _differs(
        self,
        file: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
        flat: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.bool_]:
        """On which inputs [N, inputs] a file gives outputs that the network does not allow: [N]."""
        actual = np.stack([file(row) for row in flat])
        with np.errstate(over="ignore", invalid="ignore"):
            allowed = self.leaves.allow(self.encoder.encode(flat), actual)
        return np.asarray(~allowed.all(axis=1))
