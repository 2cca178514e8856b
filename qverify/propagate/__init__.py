"""Interval bound propagation at the speed of int8 kernels, where they are there and compute
exactly.

`Network.intervals` defines the bounds. On a CPU, stretches of the network whose ops `rules` can
express become `graphs` that onnxruntime runs; on a GPU, `plan` maps the network onto qverify's own
CUDA kernels. What these cannot express is computed by the op itself. Nothing is trusted: kernels
that saturate or differ in a bit are found by worst cases on this machine and are not used, before
the first use the bounds of some boxes are compared, and so are some of the search's own, ever more
rarely.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from qverify.errors import DeviceError, ModelError, SoundnessError
from qverify.kernels import Array, Kernels
from qverify.network import Network
from qverify.ops import Interval
from qverify.propagate import distrust
from qverify.propagate.graphs import Graphs

PATIENCE = 0.05  # seconds of NumPy's (or CuPy's) work before a graph (or a plan) is built
# Seconds of CuPy's work before the CUDA kernels are compiled, once per process: compiling takes
# about as long.
TO_COMPILE = 3.0


class Fast(Protocol):
    """A faster way to the bounds of one network."""

    @property
    def name(self) -> str:
        """What computes them, for the user."""

    def run(self, lower: Array, upper: Array) -> Interval:
        """As `Network.intervals`. Raises ModelError or DeviceError where the machine cannot."""


class Propagator:
    """`Network.intervals` for one network, by the fastest way that computes the same integers."""

    def __init__(self, network: Network, kernels: Kernels, patience: float | None = None) -> None:
        self._network, self._kernels, self._patience = network, kernels, patience
        self._waiting = True  # for enough work to make something faster
        self._spent = 0.0
        self._batches = 0  # bounded by `_fast`
        self._fast: Fast | None = None
        self._warnings: list[str] = []

    @property
    def name(self) -> str:
        """What computes the bounds, for the user."""
        return self._kernels.library if self._fast is None else self._fast.name

    def take_warnings(self) -> list[str]:
        """What the user should know about the bounds so far, each text once."""
        taken, self._warnings = self._warnings, []
        return taken

    def intervals(self, lower: Array, upper: Array) -> Interval:
        """As `Network.intervals`: the outputs' bounds, int32 [N, output_size] each, over boxes of
        code vectors [N, n]."""
        if self._waiting and self._spent >= self._enough():
            self._fast, self._waiting = self._make(), False
        if self._fast is not None:
            try:
                found = self._fast.run(lower, upper)
            except (ModelError, DeviceError):
                self._fast = None
            else:
                self._audit(self._fast, lower, upper, found)
                return found
        start = time.perf_counter()
        result = self._network.intervals(self._kernels, lower, upper)
        if self._waiting:
            self._kernels.to_host(result[0][:1])  # waits for a GPU
            self._spent += time.perf_counter() - start
        return result

    def _enough(self) -> float:
        """Seconds to be spent on the ops before something faster is made."""
        if self._patience is not None:
            return self._patience
        if self._kernels.is_host:
            return PATIENCE
        from qverify.propagate.device import is_open

        return PATIENCE if is_open(self._kernels) else TO_COMPILE

    def _make(self) -> Fast | None:
        """Something faster, if there is any and it gives the same bounds of some boxes."""
        try:
            fast = self._candidate()
            if fast is None:
                return None
            lower, upper = (
                self._kernels.asarray(end) for end in distrust.sample_boxes(self._network)
            )
            found = fast.run(lower, upper)
        except (ModelError, DeviceError):  # no memory, for instance
            return None
        if self._same(self._network.intervals(self._kernels, lower, upper), found):
            return fast
        library = self._kernels.library
        self._warnings.append(
            f"{fast.name} and {library} bound this network differently on some boxes; {library}'s "
            "bounds, which are slower, are used; please report this model"
        )
        return None

    def _candidate(self) -> Fast | None:
        """What could be faster on this machine. Raises ModelError or DeviceError where the machine
        cannot."""
        if self._kernels.is_host:
            exactly = distrust.product_option()
            return None if exactly is None else Graphs.make(self._network, self._kernels, exactly)
        # Imported here, since a CPU never needs it.
        from qverify.propagate.device import opened
        from qverify.propagate.plan import make_plan

        plan = make_plan(self._network, opened(self._kernels))
        return plan if plan.launches() else None

    def _audit(self, fast: Fast, lower: Array, upper: Array, found: Interval) -> None:
        """Compare the ends of batches number 1, 2, 4, 8, ... with NumPy's. SoundnessError if they
        differ: earlier batches, which were not compared, may have been closed wrongly."""
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:
            some = slice(None, None, max(1, len(lower) - 1))
            expected = self._network.intervals(self._kernels, lower[some], upper[some])
            if not self._same(expected, (found[0][some], found[1][some])):
                raise SoundnessError(
                    f"{fast.name} and {self._kernels.library} bound a network differently; please "
                    "report this model"
                )

    def _same(self, slow: Interval, fast: Interval) -> bool:
        """Whether two bounds are equal; on the host, since nothing is trusted."""
        to_host = self._kernels.to_host
        return all(np.array_equal(to_host(a), to_host(b)) for a, b in zip(slow, fast, strict=True))


def make_propagator(network: Network, kernels: Kernels) -> Propagator:
    """The bounds of a network (its arrays on the machine of `kernels`); graphs or plans are made
    once they are worth it."""
    return Propagator(network, kernels)
