"""A network's bounds by the CUDA kernels of `qverify.kernels.fused`: what a plan is, and how it
runs.

A plan is a list of steps over buffers. A buffer holds one value for N boxes, in one of two formats:
its ends, int32 lower and upper [N, *shape] each; or pairs, uint8 [N, codes, 2], bytes above the
type's low, whose elements lie where `Pairs` says. Buffer 0 holds the boxes. `plan` makes the steps
of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qverify.errors import DeviceError
from qverify.kernels import Array, Kernels
from qverify.kernels.fused import Fused, open_fused
from qverify.kernels.packing import Ends, Epilogue, PackedScale, Unpackable
from qverify.ops import Interval

IntArray = npt.NDArray[np.int64]
BUDGET = 2**30  # bytes that the buffers of a batch may take; a larger batch is cut
FEW = 128  # neurons of a layer that may run with others in one launch


@dataclass(frozen=True, eq=False)
class Pairs:
    """Where a value lies in a buffer of pairs: element i of the flattened value is code number
    at[i] of each box."""

    buffer: int
    at: IntArray
    codes: int  # that the buffer holds for a box

    def is_injective(self) -> bool:
        """Whether no two elements share a code."""
        return len(np.unique(self.at)) == len(self.at)

    def is_at(self, at: IntArray, codes: int) -> bool:
        """Whether the value lies in this form."""
        return self.codes == codes and np.array_equal(self.at, at)


@dataclass(frozen=True, eq=False)
class Layer:
    """A dense layer that reads one row of pairs in its order: what `pack_network` joins."""

    weight: IntArray
    bias: IntArray
    epilogue: Epilogue
    width: int  # codes of a row that it reads


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """A buffer from earlier ones."""

    function: Callable[..., Any]
    reads: tuple[int, ...]
    writes: int
    size: int  # bytes that it takes for one box, with what is made on the way
    kernel: str = ""  # what computes it, if it is a fused kernel
    layer: Layer | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of one network."""

    kernels: Kernels
    variant: str
    steps: tuple[DeviceStep, ...]
    outputs: tuple[int, ...]  # buffers of ends
    last: dict[int, int]  # for each buffer, the last step that reads it
    per_box: int  # bytes

    @property
    def name(self) -> str:
        """What computes the bounds, for the user."""
        return f"CUDA kernels, {self.variant.lower()}"

    def run(self, lower: Array, upper: Array) -> Interval:
        """As `Network.intervals`. Raises DeviceError if the device cannot (no memory, a kernel that
        fails)."""
        rows = max(1, BUDGET // max(self.per_box, 1))
        starts = range(0, max(len(lower), 1), rows)
        try:
            parts = [self._run(lower[a : a + rows], upper[a : a + rows]) for a in starts]
        except (RuntimeError, MemoryError) as error:  # CuPy's errors are of these classes
            raise DeviceError(f"the fused kernels failed: {error}") from error
        low, high = ([part[k] for part in parts] for k in (0, 1))
        return self._joined(low, 0), self._joined(high, 0)

    def _run(self, lower: Array, upper: Array) -> Interval:
        buffers: dict[int, Any] = {0: (lower, upper)}
        for number, step in enumerate(self.steps):
            buffers[step.writes] = step.function(*(buffers[i] for i in step.reads))
            for i in set(step.reads):
                if self.last[i] == number:
                    del buffers[i]
        low, high = ([buffers[i][k].reshape(len(lower), -1) for i in self.outputs] for k in (0, 1))
        return self._joined(low, 1), self._joined(high, 1)

    def _joined(self, parts: list[Array], axis: int) -> Array:
        return parts[0] if len(parts) == 1 else self.kernels.xp.concatenate(parts, axis=axis)

    def launches(self) -> list[str]:
        """The fused kernels, in order."""
        return [step.kernel for step in self.steps if step.kernel]


def last_reads(steps: Sequence[DeviceStep], outputs: tuple[int, ...]) -> dict[int, int]:
    """For each buffer, the last step that reads it; for outputs, none of the steps."""
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        last.update(dict.fromkeys(step.reads, number))
    last.update(dict.fromkeys(outputs, len(steps)))
    return last


def finished(fused: Fused, steps: list[DeviceStep], outputs: tuple[int, ...]) -> Plan:
    """A plan without the steps that nothing needs, and with small dense layers joined."""
    needed, kept = set(outputs), []
    for step in reversed(steps):
        if step.writes in needed:
            needed.update(step.reads)
            kept.append(step)
    joined = chained(fused, kept[::-1], outputs)
    last, live, most = last_reads(joined, outputs), dict[int, int](), 0
    for number, step in enumerate(joined):
        live[step.writes] = step.size
        most = max(most, sum(live.values()))
        live = {i: size for i, size in live.items() if last[i] > number}
    return Plan(fused.kernels, fused.variant.name, tuple(joined), outputs, last, most)


def chained(fused: Fused, steps: list[DeviceStep], outputs: tuple[int, ...]) -> list[DeviceStep]:
    """Runs of dense layers that only read each other become one launch, where they fit."""
    uses: dict[int, int] = dict.fromkeys(outputs, 1)
    for step in steps:
        for i in step.reads:
            uses[i] = uses.get(i, 0) + 1
    result: list[DeviceStep] = []
    while steps:
        for length in range(_run_length(steps, uses), 1, -1):
            run = [step.layer for step in steps[:length] if step.layer is not None]
            try:
                packed = fused.pack_network(
                    [(x.weight, x.bias, x.epilogue) for x in run], run[0].width
                )
            except Unpackable:
                continue
            function = _network(fused, packed)
            size = max(step.size for step in steps[:length])
            name = f"network of {length}"
            result.append(
                replace(
                    steps[length - 1],
                    function=function,
                    reads=steps[0].reads,
                    size=size,
                    kernel=name,
                )
            )
            steps = steps[length:]
            break
        else:
            result.append(steps[0])
            steps = steps[1:]
    return result


def _network(fused: Fused, packed: Any) -> Callable[[Array], Any]:
    return lambda x: fused.network(packed, x)


def _run_length(steps: list[DeviceStep], uses: dict[int, int]) -> int:
    """How many of the first steps are layers that could run together."""
    length = 0
    for k, step in enumerate(steps):
        layer = step.layer
        if (
            layer is None
            or layer.weight.shape[1] > FEW
            or not isinstance(layer.epilogue, PackedScale | Ends)
        ):
            break
        if k:
            before = steps[k - 1]
            assert before.layer is not None
            follows = step.reads == (before.writes,) and uses[before.writes] == 1
            if not (follows and layer.weight.shape[0] == before.layer.weight.shape[1]):
                break
        length = k + 1
    return length


# -- buffers ---------------------------------------------------------------------------------------


def gathered(kernels: Kernels, pairs: Array, index: Array) -> Array:
    """The codes number `index` [m] of every box: uint8 [N, codes, 2] -> [N, m, 2]."""
    xp, (count, codes, _) = kernels.xp, pairs.shape
    both = pairs.reshape(count, 2 * codes).view(xp.uint16)  # both ends in one move
    return xp.take(both, index, axis=1).view(xp.uint8).reshape(count, len(index), 2)


# -- which kernels ---------------------------------------------------------------------------------

_OPENED: list[tuple[Any, Fused | None]] = []  # by array module: once per process


def is_open(kernels: Kernels) -> bool:
    """Whether `opened` costs nothing any more."""
    return any(library is kernels.xp for library, _ in _OPENED)


def opened(kernels: Kernels) -> Fused:
    """The fastest exact kernels of the current device. Raises DeviceError where there are none."""
    if not is_open(kernels):
        try:
            found: Fused | None = open_fused(kernels)
        except (
            DeviceError,
            ImportError,
            OSError,
            RuntimeError,
            MemoryError,
        ):  # none is exact, or NVRTC is missing
            found = None
        _OPENED.append((kernels.xp, found))
    fused = next(fused for library, fused in _OPENED if library is kernels.xp)
    if fused is None:
        raise DeviceError("the fused kernels cannot be used on this device")
    return fused
