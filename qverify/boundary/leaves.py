"""The leaf rule: which outputs the runtime may give at a single code vector, and when it is asked.

An exact network with an exact decoder gives the runtime's very outputs, and nothing is asked. If an
op or the decoder has a band, because the order of float additions is the runtime's secret, then a
code vector has bounds of its outputs, not values. Where these bounds leave a case open, the runtime
itself is run on an input with these codes, and its answer decides.

Sound because the bounds hold for every order of float operations, and because all inputs of a
quantization cell have the same codes: a deterministic runtime gives all of them the same outputs.
What the bounds decide holds for every order; what was asked holds for this runtime on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qverify.boundary.outputs import Decoder, make_decoder
from qverify.errors import SoundnessError
from qverify.frontend.lower import Lowered
from qverify.kernels import Array, Kernels, open_kernels
from qverify.network import Network

Float64Array = npt.NDArray[np.float64]
Runtime = Callable[[Float64Array], Float64Array]  # inputs [inputs] -> outputs [outputs]


@dataclass(frozen=True, eq=False)
class Leaves:
    """The outputs at single code vectors of a network, which is on the machine of `kernels`."""

    kernels: Kernels
    network: Network
    decoder: Decoder
    runtime: Runtime | None = None  # the file itself; needed only where something is not exact

    @property
    def exact(self) -> bool:
        """Whether the network gives the very bits of the runtime's outputs."""
        return self.network.exact and self.decoder.exact

    def nominal(self, points: Array) -> Float64Array:
        """Outputs [N, outputs] that the runtime may give for code vectors [N, codes]."""
        return self.decoder.decode(
            self.kernels.to_host(self.network.run(self.kernels, self.kernels.asarray(points)))
        )

    def bounds(
        self, points: Array, nominal: Float64Array | None = None
    ) -> tuple[Float64Array, Float64Array]:
        """Bounds [N, outputs] of what the runtime may give at code vectors [N, codes].

        `nominal` are the outputs that the network gives, where they are known already.
        """
        if self.network.exact:
            return self.decoder.around(self.nominal(points) if nominal is None else nominal)
        points = self.kernels.asarray(points)
        lower, upper = self.network.intervals(self.kernels, points, points)
        return self.decoder.decode_box(self.kernels.to_host(lower), self.kernels.to_host(upper))

    def allow(self, points: Array, actual: Float64Array) -> npt.NDArray[np.bool_]:
        """Whether the runtime may give outputs `actual` [N, outputs] at code vectors [N, codes].

        Each by itself, bool [N, outputs]. NaN is never allowed, infinities are where the network
        gives the same.
        """
        lower, upper = self.bounds(points)
        with np.errstate(invalid="ignore"):
            allowed: npt.NDArray[np.bool_] = (lower <= actual) & (actual <= upper)
        return allowed

    def ask(self, inputs: Float64Array, lower: Float64Array, upper: Float64Array) -> Float64Array:
        """The outputs [outputs] that the runtime gives for `inputs` [inputs], which decide.

        The codes of the inputs allow outputs in [lower, upper]. SoundnessError if the runtime gives
        others: then a proved band is wrong.
        """
        assert self.runtime is not None, "a point is open, and there is no runtime to ask"
        actual = self.runtime(inputs)
        if not ((lower <= actual) & (actual <= upper)).all():
            raise SoundnessError(
                "onnxruntime's outputs lie outside the band that is proved for its float sums; "
                "please report this model"
            )
        return actual


def make_leaves(lowered: Lowered, runtime: Runtime | None = None) -> Leaves:
    """The outputs of a lowered model at single code vectors, by NumPy."""
    return Leaves(open_kernels("cpu"), lowered.network, make_decoder(lowered), runtime)
